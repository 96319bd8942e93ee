"""DFDNet: blind face restoration with deep multi-scale component dictionaries.

Li, Chen, Zhou, Lin, Zuo, Zhang: "Blind Face Restoration via Deep Multi-scale Component Dictionaries",
ECCV 2020.

Eyes, noses and mouths of different people resemble each other. So K-means over many sharp faces gives a
dictionary of each component, at four scales of a face recognition network's features. To restore a face
without a picture of the same person, take each of its components, find the dictionary entry that is most
like it once both have the same style, and add the detail of that entry where the input lacks it. A decoder,
modulated by these enriched features, paints the face.

Equation → name
    (1) build_dictionary, kmeans      (5) ConfidenceScore                 (9) adversarial_loss
    (2) DFDNet                        (6) SFTStage                       (10) the sum in train
    (3) normalise_entries, restyle    (7) pixel_loss, perceptual_loss    (11) common.degrade, "dfdnet"
    (4) match_features                (8) discriminator_loss

    python dfdnet.py --train                           # rendered faces, minutes on two CPU cores
    python dfdnet.py --evaluate                        # the trained network on people it has never seen
    python dfdnet.py --restore photo.jpg --aligned     # your picture

Open in the paper, chosen here: each training image is blurred by a Gaussian or by a motion kernel with equal
chance; what is pasted back is the change of a component, so that the input's own detail never passes through
RoIAlign; where boxes overlap their changes are averaged; the dictionary's faces are not balanced by pose and
expression; layers the paper does not describe (MSDilate, the last convolutions) are the released network's.
TINY differs from the paper in size, and in what Config says beside it.
"""
import argparse
import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.ops import roi_align

import common
from common import InputError

SCRIPT = "dfdnet"
PARTS = tuple(common.COMPONENTS)           # left eye, right eye, nose, mouth


# -----------------------------------------------------------------------------------------------------------
# 2. Config
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """Every number of the method. The defaults are TINY."""
    preset: str = "tiny"
    variant: str = "full"
    size: int = 128                          # pixels, height = width
    seed: int = 0

    encoder: str = "recogniser"              # Ψ; "vgg" is VGG-Face, or VGG-19 where no file is given
    entries: int = 64                        # K, clusters for each component and scale
    dictionary_images: int = 768             # faces the dictionaries are made of; 10,000 in the paper
    dft_scales: tuple = (1, 2, 3, 4)         # s, where DFT blocks enrich the features; 1 is the finest
    cadain: bool = True                      # Eq. (3)
    confidence: bool = True                  # Eq. (5)
    width: int = 16                          # channels at full size, after the last decoder stage
    paint_blocks: int = 0                    # residual blocks there; 2 in the released network
    residual: bool = True                    # added to I^d: a short training need not learn to copy
    released: bool = False                   # the network of the published weights, see the last chapter

    weight_pixel: float = 100.0              # λ_l2
    weight_perceptual: tuple = (0.05, 0.1, 0.2, 0.4)     # λ_p,1 … λ_p,4; paper's / 10: another encoder
    weight_adversarial: tuple = (0.04, 0.02, 0.01, 0.01)  # λ_a,r for r = 1, 2, 4, 8; paper's / 100
    discriminator_width: int = 16
    learning_rate: float = 3e-3              # 15 times the paper's: the network is small
    betas: tuple = (0.5, 0.999)              # β1, β2 of Adam
    clip: float = 1.0                        # longest gradient; the paper clips none
    cooldown: float = 0.3                    # last part of the steps: the rate falls to 0; none in the paper
    patience: int = 1                        # validations without a better loss before the rate is halved
    steps: int = 650
    batch: int = 4                           # images a process and step
    validate_every: int = 50                 # steps; also when a checkpoint is written
    degradation: str = "dfdnet"              # Eq. (11)

    @property
    def part_sizes(self):
        """(4 scales) × (4 parts): side of the resampled components; 40, 40, 25, 55 at scale 1 of 256 pixels,
        halved from scale to scale, in proportion for other sizes; in TINY never under 4, below which Eq. (3)
        has no statistics to match."""
        base, least = 512 if self.released else 256, 4 if self.encoder == "recogniser" else 1
        return [[max(part * self.size // base >> scale, least) for part in (40, 40, 25, 55)]
                for scale in range(4)]


TINY = Config()
PAPER = replace(TINY, preset="paper", size=256, encoder="vgg", entries=256, dictionary_images=10_000,
                width=64, paint_blocks=2, residual=False, weight_perceptual=(0.5, 1.0, 2.0, 4.0),
                weight_adversarial=(4.0, 2.0, 1.0, 1.0), discriminator_width=64, learning_rate=2e-4,
                clip=math.inf, cooldown=0, patience=0, steps=400_000, batch=8, validate_every=5_000)
# The paper gives 4 days on 4 V100s, not steps or batch.
RELEASED = replace(PAPER, preset="released", size=512, released=True, entries=512, batch=2)
PRESETS = {"tiny": TINY, "paper": PAPER, "released": RELEASED}
VARIANTS = {                                 # Tables 2 and 3 of the paper
    "full": {}, "0dft": {"dft_scales": ()}, "2dft": {"dft_scales": (3, 4)}, "no-cadain": {"cadain": False},
    "no-confidence": {"confidence": False}, **{f"k{k}": {"entries": k} for k in (16, 64, 128, 256, 512)}}


# -----------------------------------------------------------------------------------------------------------
# 3. Network
# -----------------------------------------------------------------------------------------------------------

def crop_components(features, boxes, stride, sizes):
    """RoIAlign: features (B,C,h,w) of `stride` pixels each, boxes (B,4,4) → four parts (B,C,size,size)."""
    sample = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None]
    features = features.float().contiguous()    # for RoIAlign: converted once, not once a component
    return [roi_align(features, torch.cat([sample, box], 1), size, 1 / stride, sampling_ratio=2,
                      aligned=True) for box, size in zip(boxes.unbind(1), sizes)]


def paste_components(parts, boxes, stride, shape):
    """Reverse RoIAlign: four (B,C,size,size) resampled into their boxes, else 0; shape (h,w) → (B,C,h,w).

    Bilinear resampling is separable, so a part becomes Y · part · Xᵀ with two small matrices, zero outside
    the box. Where boxes overlap, the mean is taken.
    """
    sides = [part.shape[-1] for part in parts]
    sizes = torch.tensor(sides, device=boxes.device)[:, None]                                   # (parts,1)
    columns = torch.arange(max(sides), device=boxes.device)
    weights, inside = [], []
    for axis, length in ((1, shape[0]), (0, shape[1])):                                      # y, then x
        low, high = (boxes[:, :, edge, None] / stride for edge in (axis, axis + 2))
        centre = torch.arange(length, device=boxes.device) + 0.5
        inside.append(((centre > low) & (centre < high)).float())
        # Which of a part's positions, 0 to size - 1, each of the map's takes: (B,parts,length).
        position = ((centre - low) / (high - low) * sizes - 0.5).clamp(min=0).minimum(sizes - 1)
        hat = (1 - (position[..., None] - columns).abs()).clamp(min=0)
        weights.append(hat * inside[-1][..., None])                           # (B,parts,length,largest side)
    total = 0
    for index, (part, side) in enumerate(zip(parts, sides)):                     # a loop, as sizes differ
        y, x = (weight[:, index, None, :, :side] for weight in weights)
        total = total + y @ part.float() @ x.transpose(2, 3)
    cover = (inside[0][:, :, :, None] * inside[1][:, :, None]).sum(1, keepdim=True)
    return total / cover.clamp(min=1)


def statistics(part):
    """μ and σ of each channel over the positions: (…,C,h,w) → two (…,C,1,1)."""
    deviation, mean = torch.std_mean(part.float(), (-2, -1), keepdim=True)
    return mean, (deviation.square() + 1e-5).sqrt()


def normalise_entries(entries):
    """The bracket of Eq. (3): (Dic − μ(Dic)) / σ(Dic), (K,C,h,w) → the same. Needs no input: done once."""
    mean, deviation = statistics(entries)
    return (entries.float() - mean) / deviation


def restyle(normalised, part):
    """Eq. (3), CAdaIN: RDic = σ(F^d) · normalised + μ(F^d); both (B,C,h,w). (The text below Eq. (3) swaps
    the words for σ and μ: σ is the standard deviation.)"""
    mean, deviation = statistics(part)
    return deviation * normalised + mean


def match_features(part, normalised, cadain=True):
    """Eq. (4): k of the highest S_k = ⟨F^d, RDic_k⟩. part (B,C,h,w), normalised (K,C,h,w) → indices (B,).

    Re-norming all K entries for every input is not needed. With Z_k the normalised entry, RDic_k = σ Z_k + μ
    and S_k = Σ_c σ_c ⟨F_c, Z_k,c⟩ + Σ_c μ_c Σ F_c.
    The last sum is the same for all k, so it cannot change the winner, and what is left is one matrix
    product of the vector σ·F with the fixed matrix Z. As every Z_k,c sums to 0, F may be centred first, to
    keep the numbers small: the dropped constant is a thousand times larger than the differences between
    entries. Without CAdaIN, S_k = ⟨F, Dic_k⟩. Scores are float32 even where the rest is not. Of entries kept
    in half precision, the eight best by scores as coarse as they are get a float32 score.
    """
    entries = normalised.flatten(1)
    with torch.autocast(part.device.type, enabled=False):
        query = part.float()
        if cadain:
            mean, deviation = statistics(part)
            query = deviation * (query - mean)
        query = query.flatten(1)
        if entries.dtype == torch.float32:
            return (query @ entries.T).argmax(1)
        best = (query.to(entries.dtype) @ entries.T).topk(min(8, len(entries)), 1).indices        # (B,8)
        scores = (entries[best].float() @ query[:, :, None])[..., 0]
        return best.gather(1, scores.argmax(1, keepdim=True))[:, 0]


def convolution(before, after, dilation=1):
    """3×3 under spectral norm, zero-padded to the same size: all of the released network's but the last."""
    return spectral_norm(nn.Conv2d(before, after, 3, padding=dilation, dilation=dilation))


def pair(before, after, dilation=1):
    """Two convolutions, a LeakyReLU between: the block that scores confidence, scales, shifts, dilates."""
    return nn.Sequential(convolution(before, after, dilation), nn.LeakyReLU(0.2),
                         convolution(after, after, dilation))


class ConfidenceScore(nn.Module):
    """Eq. (5): F̂ = F^d + RDic* · F_Conf(RDic* − F^d). (B,C,h,w) each.

    The score is a convolution's output, bounded by nothing: small where F^d lacks little only if so learned.
    """

    def __init__(self, channels):
        super().__init__()
        self.score = pair(channels, channels)

    def forward(self, part, matched):
        return part + matched * self.score(matched - part)


class DFTBlock(nn.Module):
    """Dictionary feature transfer at one scale: RoIAlign, CAdaIN, match, confidence, reverse (Figure 1b)."""
    def __init__(self, channels, sizes, stride, cfg):
        super().__init__()
        self.sizes, self.stride, self.cadain = sizes, stride, cfg.cadain
        for name, size in zip(PARTS, sizes):         # kept in dictionary.pt: gigabytes at full size
            self.register_buffer(name, torch.zeros(cfg.entries, channels, size**2), persistent=False)
        self.confidence = nn.ModuleList(ConfidenceScore(channels) for _ in PARTS) if cfg.confidence else None

    def set_dictionary(self, dictionary):
        """Take over Dic of this scale, {part: (K,C,h,w)}; pre-normalised where CAdaIN is in use."""
        for name in PARTS:
            self.set_entries(name, dictionary[name])

    def set_entries(self, name, entries, dtype=torch.float32):
        """Take over the entries (K,C,h,w) of a part, a few at a time: in float32 all of them are large."""
        stored = torch.empty(entries.flatten(2).shape, dtype=dtype, device=getattr(self, name).device)
        for target, part in zip(stored.split(16), entries.split(16)):
            part = part.to(stored.device)
            target.copy_((normalise_entries(part) if self.cadain else part).flatten(2))
        setattr(self, name, stored)

    def entries(self, index):
        """Those of part number `index`, (K,C,h,w). They are kept as (K,C,h·w), in the order that matching
        reads, which channels_last would change."""
        return getattr(self, PARTS[index]).unflatten(2, (self.sizes[index],) * 2)

    def forward(self, features, boxes):
        changes = []                                 # a loop, as the four sizes differ
        for index, part in enumerate(crop_components(features, boxes, self.stride, self.sizes)):
            entries = self.entries(index)
            matched = entries[match_features(part, entries, self.cadain)]
            matched = restyle(matched, part) if self.cadain else matched
            changes.append(self.confidence[index](part, matched) - part if self.confidence
                           else matched - part)
        change = paste_components(changes, boxes, self.stride, features.shape[2:])
        return features + change.to(features.dtype, memory_format=torch.channels_last)


class MSDilate(nn.Module):
    """The decoder's start: four pairs of convolutions, dilations 4, 3, 2, 1, fused, added to the input."""

    def __init__(self, channels):
        super().__init__()
        self.branches = nn.ModuleList(pair(channels, channels, dilation) for dilation in (4, 3, 2, 1))
        self.fuse = convolution(4 * channels, channels)

    def forward(self, x):
        return x + self.fuse(torch.cat([branch(x) for branch in self.branches], 1))


class SFTStage(nn.Module):
    """A decoder stage with Eq. (6): SFT = α ⊙ F^decoder + β, α and β from the enriched features F̂_s by two
    convolutions. x, skip (B,before,h,w) → (B,after,2h,2w)."""

    def __init__(self, before, after):
        super().__init__()
        self.reduce, self.widen = convolution(before, after), convolution(after, after)
        self.scale, self.shift = pair(before, after), pair(before, after)

    def forward(self, x, skip):
        x = F.leaky_relu(self.reduce(x), 0.2)
        x = self.scale(skip) * x + self.shift(skip)
        return F.leaky_relu(self.widen(F.interpolate(x, scale_factor=2, mode="bilinear")), 0.2)


class Residual(nn.Module):
    """x + two convolutions, without spectral norm."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(0.2),
                                  nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


class DFDNet(nn.Module):
    """Eq. (2): Î = F(I^d | L^d, Dic). degraded (B,3,H,W) in [-1,1], boxes (B,4,4) from landmarks → restored.

    The encoder is frozen (were it trained, its features would drift away from the dictionaries'), and a list
    hides it from the state dict: it is kept with the dictionaries.
    """
    def __init__(self, cfg, encoder):
        super().__init__()
        self.cfg, self._encoder = cfg, [encoder]
        widths = encoder.widths                                                  # C of scales 1 … 4
        block, stage = (ReleasedDFTBlock, ReleasedSFTStage) if cfg.released else (DFTBlock, SFTStage)
        self.blocks = nn.ModuleDict({f"scale{s}": block(
            widths[s - 1], cfg.part_sizes[s - 1], 2**s, cfg) for s in cfg.dft_scales})
        self.context = MSDilate(widths[3])
        outputs = (widths[2], widths[1], widths[0], cfg.width)
        self.stages = nn.ModuleList(stage(before, after) for before, after in zip(reversed(widths), outputs))
        self.paint = nn.Sequential(convolution(cfg.width, cfg.width), nn.LeakyReLU(0.2),
                                   *[Residual(cfg.width) for _ in range(cfg.paint_blocks)],
                                   nn.Conv2d(cfg.width, 3, 3, padding=1))
        if cfg.residual:
            nn.init.zeros_(self.paint[-1].weight)

    @property
    def encoder(self):
        return self._encoder[0]

    def set_dictionary(self, dictionary):
        """dictionary: {"scale1": {part: (K,C,h,w)}, …}, as build_dictionary makes it."""
        for name, block in self.blocks.items():
            block.set_dictionary(dictionary[name])

    def forward(self, degraded, boxes):
        with torch.no_grad():
            features = self.encoder.features(degraded)
        x = self.context(features[3])
        for stage, scale in zip(self.stages, (4, 3, 2, 1)):
            skip, name = features[scale - 1], f"scale{scale}"
            x = stage(x, self.blocks[name](skip, boxes) if name in self.blocks else skip)
        image = self.paint(x).float()
        return degraded + image if self.cfg.residual else torch.tanh(image)


class Discriminator(nn.Module):
    """D_r: an SN-GAN patch discriminator, all under SN, of images reduced r times: (B,3,H,W) → (B,1,h,w)."""
    def __init__(self, width):
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        self.layers = nn.Sequential(
            *[nn.Sequential(spectral_norm(nn.Conv2d(a, b, 4, 2, 1)), nn.LeakyReLU(0.2))
              for a, b in zip(widths, widths[1:])],
            spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1)))

    def forward(self, image):
        return self.layers(image)


class Discriminators(nn.ModuleList):
    """The four D_r, r = 1, 2, 4, 8: image (B,3,H,W) → their four score maps."""
    def __init__(self, width):
        super().__init__(Discriminator(width) for _ in range(4))

    def forward(self, image):
        reduced = [image if level == 0 else F.avg_pool2d(image, 2**level) for level in range(4)]
        return [net(x) for net, x in zip(self, reduced)]


# -----------------------------------------------------------------------------------------------------------
# 4. Losses
# -----------------------------------------------------------------------------------------------------------

def pixel_loss(restored, target):
    """Eq. (7), first term: ‖Î − I^h‖², as a mean over pixels (the paper names it the mean square error)."""
    return F.mse_loss(restored.float(), target.float())


def perceptual_loss(features, target_features, weights):
    """Eq. (7), second term: Σ_m λ_p,m / (C_m H_m W_m) · ‖Ψ_m(Î) − Ψ_m(I^h)‖², a mean over the batch."""
    return sum(w * F.mse_loss(a.float(), b.float()) for w, a, b in zip(weights, features, target_features))


def discriminator_loss(real, fake):
    """Eq. (8): −Σ_r E[min(0, D_r(I_↓r) − 1)] + E[min(0, −1 − D_r(Î_↓r))]. The paper's ℓ is what D maximises;
    this is its negative, to be minimised. real, fake: lists of score maps."""
    return sum(F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean() for r, f in zip(real, fake))


def adversarial_loss(fake, weights):
    """Eq. (9): −Σ_r λ_a,r E[D_r(Î_↓r)], with λ_a,r inside the sum, as its index asks for."""
    return -sum(w * f.float().mean() for w, f in zip(weights, fake))


# -----------------------------------------------------------------------------------------------------------
# 5. Data
# -----------------------------------------------------------------------------------------------------------

def load_faces(cfg, args):
    """The faces of --data, or rendered ones."""
    if args.data is None:
        return common.RenderedFaces(cfg.size)
    return common.FaceFolder(args.data, cfg.size, args.landmarks, args.aligned)


class Batches(torch.utils.data.Dataset):
    """Training batch number `step`: (degraded, target, boxes), a pure function of (seed, rank, step), so
    that a resumed run sees what an unbroken one would have seen."""

    def __init__(self, faces, indices, cfg, rank=0):
        self.faces, self.indices, self.cfg, self.rank = faces, indices, cfg, rank

    def __len__(self):
        return self.cfg.steps

    def __getitem__(self, step):
        generator = common.seeded(self.cfg.seed, 1, self.rank, step)
        chosen = torch.randint(len(self.indices), (self.cfg.batch,), generator=generator).tolist()
        target, landmarks = common.stack_faces(self.faces, [self.indices[i] for i in chosen])
        degraded = common.degrade(target, common.DEGRADATIONS[self.cfg.degradation], generator)
        return degraded, target, common.component_boxes(landmarks, self.cfg.size)


def kmeans(points, clusters, generator, rounds=15):
    """Lloyd's K-means from k-means++ seeds, in chunks that bound memory. points (N,D) → centres (K,D)
    float32, the cluster of each point (N,), its squared distance to the centre (N,). A cluster that runs
    empty restarts at the worst-served point."""
    if len(points) < clusters:
        raise InputError(f"{len(points)} faces cannot make {clusters} clusters; give more faces, or a "
                         "variant of fewer (k16)")
    chunks = points.split(max(2**26 // points.shape[1], 1))
    norms = torch.cat([chunk.float().square().sum(1) for chunk in chunks])

    def distances(centres):
        products = torch.cat([chunk.float() @ centres.T for chunk in chunks])
        return (norms[:, None] - 2 * products + centres.square().sum(1)).clamp(min=0)

    seeds = [torch.randint(len(points), (), generator=generator).item()]
    nearest = distances(points[seeds].float())[:, 0]
    while len(seeds) < clusters:                     # k-means++: the farther from all seeds, the likelier
        seeds.append(torch.multinomial(nearest.cpu() + 1e-9, 1, generator=generator).item())
        nearest = nearest.minimum(distances(points[seeds[-1:]].float())[:, 0])
    centres, before = points[seeds].float(), None
    for _ in range(rounds):
        nearest, cluster = distances(centres).min(1)
        if before is not None and torch.equal(cluster, before):
            break
        before, count = cluster, torch.bincount(cluster, minlength=clusters)
        total = torch.zeros_like(centres)
        for chunk, part in zip(chunks, cluster.split(len(chunks[0]))):
            total.index_add_(0, part, chunk.float())
        centres = total / count.clamp(min=1)[:, None]
        empty = torch.nonzero(count == 0)[:, 0]
        centres[empty] = points[nearest.topk(len(empty)).indices].float()
    nearest, cluster = distances(centres).min(1)
    return centres, cluster, nearest


@torch.inference_mode()
def build_dictionary(cfg, encoder, faces, indices, device, quiet=False):
    """Eq. (1): Dic_{s,c} = K-means of the components' features in sharp faces → ({"scale1": {part: (K,C,h,w)
    float16}, …}, a picture of the faces nearest to some clusters). One pass a scale bounds memory."""
    indices = common.spread(indices, cfg.dictionary_images)
    dictionary, members, progress = {}, {}, common.Progress("dictionaries", 4 * len(indices), quiet=quiet)
    for scale, sizes in enumerate(cfg.part_sizes, 1):
        features = {name: [] for name in PARTS}
        for start in range(0, len(indices), 16):
            images, landmarks = common.stack_faces(faces, indices[start:start + 16])
            boxes = common.component_boxes(landmarks, cfg.size).to(device)
            with common.autocast(device):
                maps = encoder.features(images.to(device, memory_format=torch.channels_last))
            for name, part in zip(PARTS, crop_components(maps[scale - 1], boxes, 2**scale, sizes)):
                features[name].append(part.flatten(1).half())
            progress.update((scale - 1) * len(indices) + start)
        dictionary[f"scale{scale}"] = {}
        for number, name in enumerate(PARTS):
            points, shape = torch.cat(features.pop(name)), (-1, encoder.widths[scale - 1],
                                                            sizes[number], sizes[number])
            centres, cluster, distance = kmeans(points, cfg.entries,
                                                common.seeded(cfg.seed, 3, scale, number))
            dictionary[f"scale{scale}"][name] = centres.view(shape).half().cpu()
            members[name] = cluster, distance
    megabytes = sum(part.numel() * 2 for scale in dictionary.values() for part in scale.values()) / 2**20
    progress.close(f"{cfg.entries} entries a component and scale, {megabytes:.0f} MB")
    columns, count = {}, min(6, *(len(cluster.unique()) for cluster, _ in members.values()))
    for number, (name, (cluster, distance)) in enumerate(members.items()):   # scale 4 groups by meaning best
        rows = []
        for largest in torch.bincount(cluster).topk(count).indices:
            nearest = [i for i in distance.argsort().tolist() if cluster[i] == largest][:5]
            images, landmarks = common.stack_faces(faces, [indices[i] for i in (nearest * 5)[:5]])
            boxes = common.component_boxes(landmarks, cfg.size)
            rows.append(torch.cat(list(crop_components(images, boxes, 1, [64] * 4)[number]), 2))
        columns[name.replace("_", " ")] = torch.stack(rows)
    return dictionary, common.comparison_grid(columns)


def prepare(cfg, args, faces, train_indices, device, rank=0):
    """Encoder and dictionaries, frozen: from the run's dictionary.pt if it fits, else built and saved."""
    path = Path(args.out) / "dictionary.pt"
    key = json.dumps([faces.fingerprint, cfg.encoder, str(args.vggface), cfg.size, cfg.entries,
                      cfg.dictionary_images, cfg.seed])
    if rank == 0 and not (path.is_file() and common.load_weights(path).get("key") == key):
        encoder = (common.load_vgg(args.vggface, not cfg.released) if cfg.encoder == "vgg"
                   else common.recogniser(faces)).to(device)
        arguments = encoder.arguments if cfg.encoder == "vgg" else {"widths": encoder.widths}
        dictionary, picture = build_dictionary(cfg, encoder, faces, train_indices, device)
        common.write_image(path.with_suffix(".png"), picture)
        common.save_checkpoint(path, {"key": key, "arguments": arguments, "encoder": encoder.state_dict(),
                                      "dictionary": dictionary})
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return load_frozen(cfg, path, device)


def load_frozen(cfg, path, device):
    """dictionary.pt → encoder, dictionary."""
    if not path.is_file():
        raise InputError(f"{path}: missing; a checkpoint needs the dictionary.pt of its run beside it")
    frozen = common.load_weights(path)
    encoder = (common.VGG(**frozen["arguments"]) if cfg.encoder == "vgg"
               else common.Recogniser(**frozen["arguments"]).folded())
    encoder.load_state_dict(frozen["encoder"])
    return encoder.to(device, memory_format=torch.channels_last), frozen["dictionary"]


# -----------------------------------------------------------------------------------------------------------
# 6. Training
# -----------------------------------------------------------------------------------------------------------

def train(cfg, args):
    """Train on args.data, write the run into args.out; see Config for every number."""
    begin, device, out = time.monotonic(), common.choose_device(args.device), Path(args.out)
    with common.process_group() as (rank, world):
        if rank == 0:
            common.write_json(out / "config.json", asdict(cfg))
        faces = load_faces(cfg, args)
        train_indices, validation, test = common.split_identities(faces)
        encoder, dictionary = prepare(cfg, args, faces, train_indices, device, rank)
        torch.manual_seed(cfg.seed)
        net = DFDNet(cfg, encoder).to(device, memory_format=torch.channels_last)
        net.set_dictionary(dictionary)
        discriminators = Discriminators(cfg.discriminator_width).to(
            device, memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(net.parameters(), cfg.learning_rate, cfg.betas)
        optimizer_d = torch.optim.Adam(discriminators.parameters(), cfg.learning_rate, cfg.betas)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=cfg.patience)
        parts = {"net": net, "discriminators": discriminators, "optimizer": optimizer,
                 "optimizer_d": optimizer_d, "schedule": schedule}
        start, rows = 0, []
        if args.resume:
            state = common.load_checkpoint(args.checkpoint, SCRIPT, device)
            start, rows = state["step"], state["rows"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
        forward, forward_d = net, discriminators
        if world > 1:
            forward, forward_d = (nn.parallel.DistributedDataParallel(m, broadcast_buffers=False)
                                  for m in (net, discriminators))
        batches = torch.utils.data.DataLoader(Batches(faces, train_indices, cfg, rank), batch_size=None,
                                              sampler=range(start, cfg.steps), num_workers=args.workers,
                                              pin_memory=device.type == "cuda", persistent_workers=False)
        progress = common.Progress(f"{SCRIPT} {cfg.variant}", cfg.steps, start, quiet=rank > 0)
        for step, batch in enumerate(batches, start + 1):
            degraded, target = (x.to(device, non_blocking=True, memory_format=torch.channels_last)
                                for x in batch[:2])
            boxes = batch[2].to(device, non_blocking=True)
            with common.autocast(device):                                       # generator
                restored = forward(degraded, boxes)
                with torch.no_grad():
                    target_features = encoder.features(target)
                discriminators.requires_grad_(False)
                losses = {"pixel": cfg.weight_pixel * pixel_loss(restored, target),
                          "perceptual": perceptual_loss(encoder.features(restored), target_features,
                                                        cfg.weight_perceptual),
                          "adversarial": adversarial_loss(discriminators(restored), cfg.weight_adversarial)}
            optimizer.zero_grad(set_to_none=True)
            sum(losses.values()).backward()                                     # Eq. (10)
            nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
            group = optimizer.param_groups[0]
            left = min((cfg.steps - step + 1) / max(cfg.cooldown * cfg.steps, 1), 1)
            rate, group["lr"] = group["lr"], group["lr"] * left
            optimizer.step()
            group["lr"] = rate
            discriminators.requires_grad_(True)
            with common.autocast(device):                                       # discriminators
                scores = forward_d(torch.cat([target, restored.detach()]))
                losses["discriminator"] = discriminator_loss(*zip(*(score.chunk(2) for score in scores)))
            optimizer_d.zero_grad(set_to_none=True)
            losses["discriminator"].backward()
            optimizer_d.step()
            last = step == cfg.steps or step % cfg.validate_every == 0
            if last or step % 10 == 0:                                # the only place that waits for the GPU
                values = {name: loss.item() for name, loss in losses.items()}
                if bad := [name for name, value in values.items() if not math.isfinite(value)]:
                    raise InputError(f"step {step}: the {', '.join(bad)} loss is not finite; the last good "
                                     f"state is in {args.checkpoint}; try a lower learning rate")
                rows.append({"step": step, **values})
                progress.update(step, "  ".join(f"{name} {value:.3f}" for name, value in values.items()))
            if last:
                reconstruction, quality = validate(net, faces, common.spread(validation, 32), cfg, device)
                if not math.isfinite(reconstruction):
                    raise InputError(f"step {step}: the validation loss is not finite; the last good state "
                                     f"is in {args.checkpoint}")
                schedule.step(reconstruction)
                optimizer_d.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
                rows[-1] |= {"validation": reconstruction, "validation_psnr": quality,
                             "rate": rate * left}
                if rank == 0:
                    progress.line(f"step {step}: validation reconstruction {reconstruction:.3f}, "
                                  f"PSNR {quality:.2f} dB")
                    common.save_checkpoint(args.checkpoint, {
                        "script": SCRIPT, "config": asdict(cfg), "step": step, "rows": rows,
                        **{name: part.state_dict() for name, part in parts.items()}})
                    common.write_log(out, rows)
        if rank == 0:
            progress.close()
            finish(net, faces, test, cfg, args, device, time.monotonic() - begin)


@torch.inference_mode()
def validate(net, faces, indices, cfg, device):
    """Reconstruction loss (Eq. 7) and PSNR in dB on held-out faces, always degraded alike."""
    loss, quality = 0.0, 0.0
    for degraded, restored, target in restored_batches(net, faces, indices, cfg, device, None):
        with common.autocast(device):
            a, b = (net.encoder.features(x.to(device)) for x in (restored, target))
        total = (cfg.weight_pixel * pixel_loss(restored, target)
                 + perceptual_loss(a, b, cfg.weight_perceptual).cpu())
        loss, quality = (loss + total.item() * len(target),
                         quality + common.psnr(restored, target).sum().item())
    return loss / len(indices), quality / len(indices)


def finish(net, faces, test, cfg, args, device, seconds):
    """Measure on held-out people; write result.json, samples.png; print the table and where things are."""
    out, net = Path(args.out), net.eval()
    result = {"script": SCRIPT, "variant": cfg.variant, "preset": cfg.preset,
              "data": str(args.data or "rendered"), "size": cfg.size,
              "steps": cfg.steps, "seconds": round(seconds, 1),
              "test": evaluate(net, faces, common.spread(test, 128), cfg, device, args.precision)}
    common.write_json(out / "result.json", result)
    degraded, restored, target = next(
        restored_batches(net, faces, common.spread(test, 6), cfg, device, None, precision=args.precision))
    common.write_image(out / "samples.png", common.comparison_grid(
        {"degraded": degraded, "restored": restored, "target": target}))
    common.print_table(result["test"])
    written = [name for name in ("checkpoint.pt", "dictionary.pt", "dictionary.png", "config.json",
                                 "log.csv", "curves.png", "samples.png", "result.json")
               if (out / name).is_file()]
    print(f"\n{out}: {', '.join(written)}")


# -----------------------------------------------------------------------------------------------------------
# 7. Restoration
# -----------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def restore(net, degraded, landmarks, batch=8, precision="auto"):
    """Restore faces: degraded (N,3,size,size) in [-1,1], landmarks (N,68,2) → (N,3,size,size) in [-1,1], on
    the CPU. Out of GPU memory, the batch is halved, with a line that says so."""
    device, results, start = next(net.parameters()).device, [], 0
    boxes = common.component_boxes(landmarks, degraded.shape[-1])
    training = net.training
    net.eval()
    while start < len(degraded):
        part = slice(start, start + batch)
        try:
            with common.autocast(device, precision):
                images = degraded[part].to(device, memory_format=torch.channels_last)
                results.append(net(images, boxes[part].to(device)).float().clamp(-1, 1).cpu())
            start += batch
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise InputError("not enough GPU memory for one face; use --device cpu or a smaller "
                                 "--size") from None
            batch //= 2
            print(f"out of GPU memory: going on with {batch} faces at a time", file=sys.stderr)
    net.train(training)
    return torch.cat(results)


def restored_batches(net, faces, indices, cfg, device, scale, batch=16, precision="auto"):
    """Held-out faces in batches (degraded, restored, target), degraded by (seed, scale, place) alone."""
    for start in range(0, len(indices), batch):
        target, landmarks = common.stack_faces(faces, indices[start:start + batch])
        generator = common.seeded(cfg.seed, 4, scale or 0, start)
        degraded = common.degrade(target, common.DEGRADATIONS[cfg.degradation], generator, scale)
        yield degraded, restore(net, degraded, landmarks, batch, precision), target


def evaluate(net, faces, indices, cfg, device, precision="auto"):
    """The paper's ×4, ×8 on held-out faces → "test" of result.json: PSNR dB, SSIM, identity in degrees."""
    judge = common.recogniser(faces, "metric")
    table = {}
    for scale in (4, 8):
        columns = {"input": [], "restored": []}
        for degraded, restored, target in restored_batches(net, faces, indices, cfg, device, scale,
                                                           precision=precision):
            for name, image in (("input", degraded), ("restored", restored)):
                columns[name].append(torch.stack([common.psnr(image, target), common.ssim(image, target),
                                                  common.identity_distance(judge, image, target)]))
        values = {name: torch.cat(column, 1) for name, column in columns.items()}
        table[f"x{scale}"] = {"faces": len(indices), **{
            name: dict(zip(("psnr", "ssim", "identity"), value.mean(1).tolist()))
            for name, value in values.items()},
            "paired_psnr_gain": common.paired_gain(values["restored"][0], values["input"][0], cfg.seed)}
    return table


def entry_type(device, precision):
    """How the dictionaries are kept to restore with: in float32 the authors' have 3 GB. The rounding of half
    precision is small beside that of the features, which are computed in it."""
    with common.autocast(device, precision):
        return torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32


def for_restoration(net, device, precision="auto"):
    """The network and its encoder made ready to restore with, once; they cannot be trained any more. What
    they paint stays the same up to rounding: see common.for_inference; entries are cast as well. (Not those
    of --variant no-cadain: they are not centred, and rank by differences too small.)"""
    common.for_inference(net.encoder, device, precision)
    net = common.for_inference(net, device, precision)
    for block in net.blocks.values():
        for name in PARTS if block.cadain else ():
            setattr(block, name, getattr(block, name).to(entry_type(device, precision)))
    return net


def fresh_network(cfg, device, precision):
    """An untrained network for --benchmark, with entries of noise."""
    torch.manual_seed(cfg.seed)
    encoder = (common.VGG(last_relu=not cfg.released) if cfg.encoder == "vgg"
               else common.Recogniser().folded())
    net = DFDNet(replace(cfg, entries=1), encoder)
    for block in net.blocks.values():
        for name in PARTS:
            noise = torch.randn(8, *block.entries(PARTS.index(name)).shape[1:])
            block.set_entries(name, noise.repeat(-(-cfg.entries // 8), 1, 1, 1)[:cfg.entries],
                              entry_type(device, precision))
    return net


def benchmark(net, cfg, args, device):
    """Time restore() on --batch pictures of noise with the landmarks of an average face: what a picture
    shows does not change the speed."""
    count = args.batch or 1
    degraded = torch.rand(count, 3, cfg.size, cfg.size, generator=common.seeded(args.seed or 0, 7)) * 2 - 1
    landmarks = common.mean_landmarks(cfg.size).expand(count, -1, -1)
    return common.benchmark(lambda: restore(net, degraded, landmarks, count, args.precision), count, device,
                            args.precision)


def load_network(args, device):
    """The network of --checkpoint with its dictionaries, and its Config. Spectral norm is folded in."""
    state = common.load_checkpoint(args.checkpoint, SCRIPT, device)
    cfg = Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in state["config"].items()})
    if args.preset and args.preset != cfg.preset:
        raise InputError(f"{args.checkpoint}: a checkpoint of --preset {cfg.preset}, not {args.preset}")
    encoder, dictionary = load_frozen(cfg, Path(args.checkpoint).with_name("dictionary.pt"), device)
    net = DFDNet(cfg, encoder).to(device, memory_format=torch.channels_last)
    net.load_state_dict(state["net"])
    net.set_dictionary(dictionary)
    return common.fold(net.eval()), cfg


# -----------------------------------------------------------------------------------------------------------
# 8. Command line
# -----------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)

    def refuse(message):
        raise InputError(f"{message}; --help lists the options")

    def positive(text):
        if not text.isdecimal() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
        return int(text)

    def natural(text):
        if not text.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
        return int(text)

    parser.error = refuse
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--train", action="store_true", help="train, then measure on held-out identities")
    action.add_argument("--evaluate", action="store_true",
                        help="measure a trained network on held-out identities")
    action.add_argument("--restore", metavar="PATH", help="restore a picture, or every picture of a folder")
    action.add_argument("--benchmark", action="store_true", help="time restoration: images/s, peak memory, "
                                                                 "share of a matrix product's speed")
    parser.add_argument("--data", metavar="DIR",
                        help="a folder of pictures or of one folder per identity (default: rendered faces)")
    parser.add_argument("--preset", choices=PRESETS,
                        help="tiny (default): minutes on a CPU; paper: the paper's sizes and schedule")
    parser.add_argument("--variant", choices=VARIANTS, help="an ablation row of the paper's Tables 2 and 3")
    parser.add_argument("--resume", action="store_true",
                        help="go on exactly where the last checkpoint stopped")
    parser.add_argument("--size", type=positive, help="pixels, a multiple of 16")
    parser.add_argument("--steps", type=positive, help="training steps")
    parser.add_argument("--batch", type=positive, help="faces a step and process")
    parser.add_argument("--seed", type=natural, help="fixes data, initialisation and order (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="of restoration: auto is bfloat16 where the processor gains and the result "
                             "stays the same to the eye")
    parser.add_argument("--workers", type=natural, default=0,
                        help="processes that read and degrade images (default 0)")
    parser.add_argument("--out", metavar="DIR", help=f"the run's folder (default runs/{SCRIPT}), or where "
                                                     "restored pictures go (restored)")
    parser.add_argument("--checkpoint", metavar="FILE", help="default: the run's own")
    parser.add_argument("--weights", metavar="FILE",
                        help="for --restore: the authors' latest_net_G.pth, a file or its address "
                             "(https://…)")
    parser.add_argument("--official-dictionary", metavar="DIR",
                        help="for --weights: the authors' DictionaryCenter512, a folder of *.npy")
    parser.add_argument("--vgg", metavar="FILE",
                        help="for --weights without a VGG-19: torchvision's, which the authors began with")
    parser.add_argument("--vggface", metavar="FILE", help="VGG-Face weights, the encoder of --preset paper")
    parser.add_argument("--landmarks", metavar="DIR",
                        help="a parallel folder of landmark files photo.jpg.txt")
    parser.add_argument("--aligned", action="store_true",
                        help="pictures are FFHQ-aligned crops; no landmarks needed")
    parser.add_argument("--overwrite", action="store_true", help="restore pictures again that have a result")
    parser.add_argument("--check", action="store_true",
                        help="also write the input with its landmarks and component boxes")
    args = parser.parse_args(argv)
    run = Path("runs") / (SCRIPT if args.variant in (None, "full") else f"{SCRIPT}-{args.variant}")
    if args.restore is None:
        run = Path(args.out or run)
    args.out = args.out or ("restored" if args.restore is not None else run)
    if args.weights is not None:
        for name in ("train", "evaluate", "checkpoint", "preset", "variant", "resume", "size", "vggface"):
            if getattr(args, name):
                raise InputError(f"--weights and --{name} do not go together: --weights is the authors' "
                                 "network, to restore with")
        if args.official_dictionary is None:
            raise InputError("--weights wants --official-dictionary: the folder of the authors' 16 files "
                             "*_center.npy")
    elif args.official_dictionary is not None or args.vgg is not None:
        raise InputError("--official-dictionary and --vgg belong to --weights, the authors' network; a "
                         "trained one has its dictionary.pt")
    fresh = args.benchmark and args.checkpoint is None and args.weights is None
    if args.train and args.precision != "auto":
        raise InputError("--precision and --train do not go together: it is of restoration; training takes "
                         "bfloat16 where the processor gains")
    if args.benchmark and args.size and not fresh:
        raise InputError("--size and --checkpoint do not go together in --benchmark: a trained network has "
                         "its size")
    args.checkpoint = args.checkpoint or run / "checkpoint.pt"
    device = common.choose_device(args.device)

    if args.train or fresh:
        chosen = {name: getattr(args, name) for name in ("size", "steps", "batch", "seed")
                  if getattr(args, name) is not None}
        if args.train and args.resume:
            _, cfg = load_network(args, torch.device("cpu"))
            if (args.variant or cfg.variant) != cfg.variant:
                raise InputError(f"{args.checkpoint}: a checkpoint of --variant {cfg.variant}, "
                                 f"not {args.variant}")
            if fixed := [name for name, value in chosen.items()
                         if name != "steps" and value != getattr(cfg, name)]:
                raise InputError(f"--resume goes on with the run as it began; --{fixed[0]} cannot change")
            cfg = replace(cfg, steps=chosen.get("steps", cfg.steps))
        else:
            preset, variant = args.preset or "tiny", args.variant or "full"
            if preset == "released" and variant != "full":
                raise InputError("--variant: the paper's ablations are of its own network, not of "
                                 "--preset released")
            cfg = replace(PRESETS[preset], variant=variant, **VARIANTS[variant], **chosen)
        if cfg.size % 16 or cfg.size < 64:
            raise InputError(f"--size {cfg.size}: must be a multiple of 16, at least 64")
    if args.train:
        train(cfg, args)
        return 0
    if fresh:
        net = fresh_network(cfg, device, args.precision)
    elif args.weights is not None:
        net, cfg = load_official(args.weights, args.official_dictionary, args.vgg,
                                 entry_type(device, args.precision)), RELEASED
    else:
        net, cfg = load_network(args, device)
    net = for_restoration(net, device, args.precision)
    if args.benchmark:
        benchmark(net, cfg, args, device)
        return 0
    if args.evaluate:
        faces = load_faces(cfg, args)
        test = common.split_identities(faces)[2]
        finish(net, faces, test, cfg, args, device, 0.0)
        return 0
    failures = common.restore_files(
        args.restore, args.out, cfg.size,
        lambda crops, landmarks, file: restore(net, crops, landmarks, precision=args.precision),
        aligned=args.aligned, landmarks=args.landmarks, overwrite=args.overwrite, check=args.check,
        device=device)
    return 1 if failures else 0


# -----------------------------------------------------------------------------------------------------------
# 9. Released network
# -----------------------------------------------------------------------------------------------------------
# What the authors' published weights were trained as differs from the paper: VGG-19 with its last map before
# the ReLU, boxes cut at whole features instead of RoIAlign, the entry brought to the box's size by nearest
# neighbour and the confidence computed there, later components over earlier ones, a blurred and twice
# rectified decoder input, a sigmoid on β.

class ReleasedDFTBlock(DFTBlock):
    """DFTBlock with whole-feature boxes: each has its own size, so only matching takes a whole batch."""

    def forward(self, features, boxes):
        enriched, corners = features.clone(), (boxes.long() // self.stride).tolist()
        for index, size in enumerate(self.sizes):
            places = [(slice(sample, sample + 1), slice(None), slice(y1, y2), slice(x1, x2))
                      for sample, (x1, y1, x2, y2) in enumerate(corner[index] for corner in corners)]
            parts, entries = [features[place].float() for place in places], self.entries(index)
            queries = torch.cat([F.interpolate(part.contiguous(), (size, size), mode="bilinear")
                                 for part in parts])
            matched = entries[match_features(queries, entries, self.cadain)]
            matched = restyle(matched, queries) if self.cadain else matched
            for place, part, entry in zip(places, parts, matched.split(1)):
                entry = F.interpolate(entry, part.shape[2:])
                changed = self.confidence[index](part, entry) if self.confidence else entry
                enriched[place] = changed.to(enriched.dtype)
        return enriched


class ReleasedSFTStage(SFTStage):
    """SFTStage with a blur and a second LeakyReLU around its first convolution and a sigmoid on β."""

    def __init__(self, before, after):
        super().__init__(before, after)
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("blur", (line[:, None] * line).expand(before, 1, 3, 3).clone())

    def forward(self, x, skip):
        x = F.conv2d(x, self.blur.to(x.dtype), padding=1, groups=x.shape[1])
        x = F.leaky_relu(self.reduce(x), 0.2 * 0.2, inplace=True)
        x = torch.addcmul(self.shift(skip).sigmoid_(), self.scale(skip), x)
        return F.leaky_relu(self.widen(F.interpolate(x, scale_factor=2, mode="bilinear")), 0.2, inplace=True)


def released_name(name):
    """A name in the official checkpoint → ("net" or "encoder", the name here), None if no output uses it."""
    spectral = {"weight_orig": "parametrizations.weight.original",
                "weight_u": "parametrizations.weight.0._u", "weight_v": "parametrizations.weight.0._v"}
    path = name.split(".")
    path[-1] = spectral.get(path[-1], path[-1])
    component, _, width = path[0].partition("_")
    if component in ("le", "re", "no", "mo"):
        scale, index = ({"256": 1, "128": 2, "64": 3, "32": 4}[width],
                        ("le", "re", "no", "mo").index(component))
        return "net", ".".join([f"blocks.scale{scale}.confidence.{index}.score", *path[1:]])
    if path[0] == "MSDilate":
        branch = "fuse" if path[1] == "convi" else f"branches.{int(path[1][-1]) - 1}"
        return "net", ".".join(["context", branch, *path[2:]])
    if path[0] == "up4":
        return "net", ".".join(["paint", *path[1:]]).replace("Model", "body")
    if path[0].startswith("up"):
        if name.endswith("conv1.0.weight_flip"):
            return None
        layer = {"conv1.0": "blur", "conv1.1": "reduce", "convup.1": "widen"}.get(".".join(path[1:3]))
        if layer is None:
            layer = {"ScaleModel1": "scale", "ShiftModel1": "shift"}[path[1]] + "." + path[2]
        return "net", ".".join(["stages", path[0][2:], layer, *([] if layer == "blur" else path[3:])])
    if path[:2] == ["VggExtract", "RGB_mean"] or path[:2] == ["VggExtract", "RGB_std"]:
        return "encoder", {"RGB_mean": "mean", "RGB_std": "deviation"}[path[1]]
    if path[:3] == ["VggExtract", "model", "features"]:
        number = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34).index(int(path[3]))
        block, layer = (number // 2, number % 2) if number < 4 else (2 + (number - 4) // 4, (number - 4) % 4)
        return "encoder", f"blocks.{block}.{layer}.{path[4]}"
    if path[0] in ("VggExtract", "to_rgb0", "to_rgb1", "to_rgb2", "to_rgb3") and path[1] in (
            "features", "model", "0", "2"):
        return None                                # aliases of the encoder, VGG's classifier, to_rgb
    raise KeyError(name)


def official_file(part, scale):
    """The name of a file of the official dictionary."""
    return f"{part}_{256 >> (scale - 1)}_center.npy"


def official_entries(source, part, scale, channels, side):
    """Entries (K,channels,side,side) of a component and scale, of a file or array (K, channels·side²)."""
    name = official_file(part, scale)
    file, wanted = name if isinstance(source, dict) else Path(source) / name, channels * side**2
    try:
        array = source[name] if isinstance(source, dict) else np.load(file, allow_pickle=False)
        array = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise InputError(f"{file}: not an array of numbers ({str(error).splitlines()[0]}); give the file "
                         "that the authors released") from None
    if array.ndim != 2 or array.shape[1] != wanted or not len(array):
        raise InputError(f"{file}: {'×'.join(map(str, array.shape))} numbers, not K×{wanted}; give the file "
                         "that the authors released")
    return array.view(-1, channels, side, side)


def load_official(source, dictionary, vgg=None, entries=torch.float32):
    """latest_net_G.pth as its authors released it, a file, its address or its state dict, with their
    dictionary (a folder of *_center.npy, or {file name: array}) → the network, frozen: degraded
    (B,3,512,512) in [-1,1], boxes (B,4,4) → restored (B,3,512,512). InputError for what does not fit.

    The file holds the authors' VGG-19. What of it is missing is taken from `vgg`, a file of torchvision's.
    `entries` is the type that the dictionary is kept in, see entry_type.
    """
    names = [official_file(part, scale) for scale in RELEASED.dft_scales for part in PARTS]
    there = dictionary if isinstance(dictionary, dict) else {x.name for x in Path(dictionary).glob("*.npy")}
    if missing := [name for name in names if name not in there]:
        folder = "the dictionary" if isinstance(dictionary, dict) else dictionary
        raise InputError(f"{folder}: {len(missing)} of the 16 files *_center.npy are missing, the first "
                         f"{missing[0]}; give the folder that the authors released")
    state = {}
    if vgg is not None:
        state = {f"VggExtract.model.{name}": value for name, value in common.read_published(vgg).items()}
        state |= {"VggExtract.RGB_mean": torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1),
                  "VggExtract.RGB_std": torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)}
    for name, value in common.read_published(source).items():      # features.0.2 is model.features.2 again
        state[re.sub(r"^VggExtract\.features\.\d\.", "VggExtract.model.features.", name)] = value
    encoder = common.VGG(last_relu=False)
    net = DFDNet(replace(RELEASED, entries=1), encoder)
    common.load_named(nn.ModuleDict({"net": net, "encoder": encoder}), state,
                      lambda name: ".".join(released_name(name) or ()) or None, "DFDNet's weights",
                      "the state dict" if isinstance(source, dict) else source)
    del state                      # before the dictionary comes, which is larger: one file at a time
    for scale, part in ((scale, part) for scale in RELEASED.dft_scales for part in PARTS):
        side = RELEASED.part_sizes[scale - 1][PARTS.index(part)]
        net.blocks[f"scale{scale}"].set_entries(
            part, official_entries(dictionary, part, scale, encoder.widths[scale - 1], side), entries)
    net.cfg = replace(RELEASED, entries=len(net.blocks["scale1"].nose))
    return net


if __name__ == "__main__":
    common.run_script(main)
