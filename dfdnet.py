"""DFDNet: blind face restoration with deep multi-scale component dictionaries.

Li, Chen, Zhou, Lin, Zuo, Zhang: "Blind Face Restoration via Deep Multi-scale Component
Dictionaries", ECCV 2020.

Eyes, noses and mouths of different people resemble each other. So K-means over many sharp
faces gives a dictionary of each component, at four scales of a face recognition network's
features. Restoring a face then needs no picture of the same person: each of its
components finds the entry most like it, once the entries have taken on its style, and
adds what that entry has and the input lacks. A decoder, modulated by these enriched
features, paints the face.

Equation → name
    (1) build_dictionary, kmeans     (5) ConfidenceScore                (9) adversarial_loss
    (2) DFDNet                       (6) SFTStage                      (10) the sum in train
    (3) normalise_entries, restyle   (7) pixel_loss, perceptual_loss   (11) common.degrade
    (4) match_features               (8) discriminator_loss

    python dfdnet.py --train                        # rendered faces, minutes on two cores
    python dfdnet.py --evaluate                     # on people it has never seen
    python dfdnet.py --restore photo.jpg --aligned     # your picture

Open in the paper, chosen here: a training image is blurred by a Gaussian or by a motion
kernel with equal chance. What is pasted back is the change of a component, so that the
input's own detail never passes through RoIAlign. Where boxes overlap, their changes are
averaged. The dictionary's faces are not balanced by pose and expression. Without
--dictionary-data the training faces make it; the paper makes it of FFHQ and trains
on VGGFace2. Layers that the paper does not describe (MSDilate, the last convolutions) are
the released network's. TINY differs from the paper in size, and in what Config says
beside it.
"""
import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.ops import roi_align

import common
from common import Claim, InputError

SCRIPT = "dfdnet"
COMPONENTS = tuple(common.COMPONENTS)           # left eye, right eye, nose, mouth


# 2. Config ----------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """Every number of the method. The defaults are TINY."""
    preset: str = "tiny"
    variant: str = "full"
    size: int = 128                          # pixels, height = width
    people: int = 288                        # rendered ones, without --data
    seed: int = 0

    encoder: str = "recogniser"              # Ψ; "vgg": VGG-Face, or VGG-19 without a file
    entries: int = 64                        # K, clusters for each component and scale
    dictionary_images: int = 768             # faces for the dictionaries; 10,000 in the paper
    kmeans_rounds: int = 15                  # rounds of K-means, at most
    component_base: int = 256                # image size of 40, 40, 25, 55 (component_sizes)
    smallest: int = 4                        # least side in component_sizes

    dft_scales: tuple = (1, 2, 3, 4)         # s of the DFT blocks; 1 is the finest
    cadain: bool = True                      # Eq. (3)
    confidence: bool = True                  # Eq. (5)
    width: int = 16                          # channels of the decoder at full size
    paint_blocks: int = 0                    # residual blocks there; 2 as released
    residual: bool = True                    # what is painted is added to I^d
    discriminator_width: int = 16

    weight_pixel: float = 100.0              # λ_l2
    weight_perceptual: tuple = (0.1, 0.2, 0.4, 0.8)  # λ_p,1 … λ_p,4; a 5th of the paper's
    weight_adversarial: tuple = (0.2, 0.1, 0.05, 0.05)   # λ_a,1, 2, 4, 8; a 20th

    learning_rate: float = 3e-3              # 15 times the paper's: the network is small
    betas: tuple = (0.5, 0.999)              # β1, β2 of Adam
    clip: float | None = 1.0                 # longest gradient; the paper clips none
    cooldown: float = 0.3                    # last part of the steps: the rate falls to 0
    patience: int | None = None              # so many validations may be no better: after
    plateau: float = 0.5                     # one more the rate is multiplied by this
    steps: int = 450
    batch: int = 8                           # faces a process and step
    validate_every: int = 50                 # steps; also when a checkpoint is written
    validated: int = 32                      # faces
    tested: int | None = 128                 # held-out faces measured in the end, at most
    degradation: str = "dfdnet"              # Eq. (11)

    def rate(self, step):
        """The learning rate of a step from 1 on: constant, then falling to 0."""
        left = (self.steps - step + 1) / max(self.cooldown * self.steps, 1)
        return self.learning_rate * min(left, 1)

    @property
    def component_sizes(self):
        """(4 scales) × (4 components): side of the resampled features.

        The paper's are 40, 40, 25, 55 at scale 1 of 256 pixels, halved from scale to
        scale; in proportion for other sizes. Below `smallest`, Eq. (3) has no statistics
        to match.
        """
        sizes = []
        for scale in range(4):
            shrink = self.component_base * 2**scale
            sides = [side * self.size // shrink for side in (40, 40, 25, 55)]
            sizes.append([max(side, self.smallest) for side in sides])
        return sizes


TINY = Config()
HOUR = replace(TINY, preset="hour", people=1500, steps=9_000, validate_every=500)
PAPER = replace(
    TINY, preset="paper", size=256, encoder="vgg", entries=256, dictionary_images=10_000,
    kmeans_rounds=100, smallest=2, width=64, paint_blocks=2, residual=False,
    discriminator_width=64, weight_perceptual=(0.5, 1.0, 2.0, 4.0),
    weight_adversarial=(4.0, 2.0, 1.0, 1.0), learning_rate=2e-4, clip=None, cooldown=0,
    patience=3, steps=400_000, batch=8, validate_every=5_000, validated=200, tested=None)
# The paper gives 4 days on 4 V100s, not steps or batch.
RELEASED = replace(PAPER, preset="released", size=512, component_base=512, entries=512)
PRESETS = {"tiny": TINY, "hour": HOUR, "paper": PAPER}
VARIANTS = {                                 # the rows of Tables 2 and 3
    "full": {}, "0dft": {"dft_scales": ()}, "2dft": {"dft_scales": (3, 4)},
    "no-cadain": {"cadain": False}, "no-confidence": {"confidence": False},
    **{f"k{k}": {"entries": k} for k in (16, 64, 128, 256, 512)}}
COLUMNS = ("x4_psnr", "x4_ssim", "x4_lpips", "x8_psnr", "x8_ssim", "x8_lpips")
PAPER_FIGURES = {variant: dict(zip(COLUMNS, row)) for variant, row in {
    "full": (27.54, 0.923, 0.114, 23.73, 0.872, 0.239),
    "0dft": (25.30, 0.896, 0.239, 23.06, 0.839, 0.253),
    "2dft": (26.43, 0.905, 0.161, 23.24, 0.848, 0.261),
    "no-cadain": (25.47, 0.897, 0.190, 22.97, 0.836, 0.270),
    "no-confidence": (27.23, 0.914, 0.129, 23.51, 0.862, 0.246),
    "k16": (26.79, 0.908, 0.144, 23.21, 0.839, 0.257),
    "k64": (27.15, 0.914, 0.126, 23.38, 0.856, 0.266),
    "k128": (27.43, 0.919, 0.120, 23.56, 0.867, 0.248),
    "k256": (27.54, 0.923, 0.114, 23.73, 0.872, 0.239),
    "k512": (27.55, 0.923, 0.110, 23.75, 0.873, 0.231),
}.items()}
CLAIMS = [
    Claim("k64", "k16"), Claim("k128", "k64"), Claim("k256", "k128"),        # Table 2
    Claim("2dft", "0dft"), Claim("full", "2dft"), Claim("full", "no-cadain"),   # Table 3
    Claim("full", "no-confidence")]


# 3. Network ---------------------------------------------------------------------------

def crop_components(features, boxes, stride, sizes):
    """RoIAlign: features (B,C,h,w), boxes (B,parts,4) in pixels → parts, (B,C,n,n) each.

    stride: pixels a feature; sizes: n of each part.
    """
    sample = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None]
    features = features.float().contiguous()       # converted once, not once a component
    return [roi_align(features, torch.cat([sample, box], 1), size, 1 / stride,
                      sampling_ratio=2, aligned=True)
            for box, size in zip(boxes.unbind(1), sizes)]


def paste_components(parts, boxes, stride, shape):
    """Reverse RoIAlign: parts (B,C,n,n) are resampled into their boxes (B,parts,4).

    Bilinear; 0 outside the boxes, the mean where they overlap; shape (h,w) → (B,C,h,w).
    Resampling is separable: a small matrix an axis.
    """
    total, cover = 0, 0
    for part, box in zip(parts, boxes.unbind(1)):              # a loop: sizes n differ
        x1, y1, x2, y2 = (box / stride)[:, :, None].unbind(1)
        rows = spread_matrix(y1, y2, part.shape[2], shape[0])
        columns = spread_matrix(x1, x2, part.shape[3], shape[1])
        with torch.autocast(box.device.type, enabled=False):
            total = total + torch.einsum("byi,bcij,bxj->bcyx", rows, part.float(), columns)
        cover = cover + torch.einsum("byi,bxj->byx", rows, columns)[:, None]
    return total / cover.clamp(min=1)


def spread_matrix(low, high, count, length):
    """`count` samples over low … high (B,1) → values at `length` features, (B,length,count).

    A feature's row holds the weights of its two nearest samples; outside it is 0.
    """
    centres = torch.arange(length, device=low.device) + 0.5
    place = (centres - low) / (high - low) * count - 0.5       # in samples, (B,length)
    inside = (place > -0.5) & (place < count - 0.5)
    place = place.clamp(0, count - 1)
    distance = (place[:, :, None] - torch.arange(count, device=low.device)).abs()
    return (1 - distance).clamp(min=0) * inside[:, :, None]


def statistics(part):
    """μ and σ of each channel over the positions: (…,C,h,w) → two (…,C,1,1).

    1e-5 keeps σ of a flat channel above 0, which is divided by.
    """
    deviation, mean = torch.std_mean(part.float(), (-2, -1), keepdim=True)
    return mean, (deviation.square() + 1e-5).sqrt()


def normalise_entries(entries):
    """The bracket of Eq. (3): (Dic − μ(Dic)) / σ(Dic), (K,C,h,w) → the same. Needs no
    input: done once."""
    mean, deviation = statistics(entries)
    return (entries.float() - mean) / deviation


def restyle(normalised, part):
    """Eq. (3), CAdaIN: RDic = σ(F^d) · normalised + μ(F^d); both (B,C,h,w).

    (The text below Eq. (3) swaps the words for σ and μ: σ is the standard deviation.)
    """
    mean, deviation = statistics(part)
    return deviation * normalised + mean


def match_features(part, entries, cadain=True):
    """Eq. (4): the k of the highest S_k = ⟨F^d, RDic_k⟩. part (B,C,h,w), entries
    (K,C,h,w) → (B,).

    No entry has to be restyled. With Z_k the normalised entry, RDic_k = σ Z_k + μ and
    S_k = Σ_c σ_c ⟨F_c, Z_k,c⟩ + Σ_c μ_c Σ F_c. The second sum is the same for all k, so it
    cannot change the winner: one product of the vector σ·F with the fixed matrix Z
    decides. As every Z_k,c sums to 0, F may be centred first. That keeps the numbers
    small: what it drops is a thousand times larger than the differences between entries.
    Without CAdaIN, S_k = ⟨F, Dic_k⟩.
    """
    with torch.autocast(part.device.type, enabled=False):      # else scores have three digits
        return (matching_query(part, cadain) @ entries.flatten(1).T).argmax(1)


def matching_query(part, cadain):
    """The vector of match_features: σ·(F − μ), without CAdaIN F; (B,C,h,w) →
    (B,C·h·w)."""
    query = part.float()
    if cadain:
        mean, deviation = statistics(part)
        query = deviation * (query - mean)
    return query.flatten(1)


def convolution(before, after, dilation=1):
    """3×3 under spectral norm, zero-padded to the same size."""
    return spectral_norm(nn.Conv2d(before, after, 3, padding=dilation, dilation=dilation))


def pair(before, after, dilation=1):
    """Two convolutions, a LeakyReLU between: confidence, α, β and MSDilate's branches are
    such pairs."""
    return nn.Sequential(convolution(before, after, dilation), nn.LeakyReLU(0.2),
                         convolution(after, after, dilation))


class ConfidenceScore(nn.Module):
    """Eq. (5): F̂ = F^d + RDic* · F_Conf(RDic* − F^d). (B,C,h,w) each.

    The score is a convolution's output, bounded by nothing: it learns to be small where
    F^d lacks little.
    """

    def __init__(self, channels):
        super().__init__()
        self.score = pair(channels, channels)

    def forward(self, part, matched):
        return part + matched * self.score(matched - part)


class DFTBlock(nn.Module):
    """Dictionary feature transfer at one scale: RoIAlign, CAdaIN, match, confidence,
    reverse (Figure 1b)."""

    def __init__(self, channels, sizes, stride, cfg):
        super().__init__()
        self.sizes = sizes
        self.stride = stride
        self.cadain = cfg.cadain
        for name, size in zip(COMPONENTS, sizes):        # kept in dictionary.pt: gigabytes
            entries = torch.zeros(cfg.entries, channels, size**2)
            self.register_buffer(name, entries, persistent=False)
        self.confidence = None
        if cfg.confidence:
            self.confidence = nn.ModuleList(ConfidenceScore(channels) for _ in COMPONENTS)

    def set_entries(self, name, entries, dtype=torch.float32):
        """Take over Dic of a component, (K,C,h,w), normalised where CAdaIN is in use.

        A few at a time: in float32 all of them are large.
        """
        stored = torch.empty(entries.flatten(2).shape, dtype=dtype,
                             device=getattr(self, name).device)
        for target, some in zip(stored.split(16), entries.split(16)):
            some = some.to(stored.device)
            target.copy_((normalise_entries(some) if self.cadain else some).flatten(2))
        setattr(self, name, stored)

    def entries(self, index):
        """Dic of component number `index`, (K,C,h,w). It is stored flat, in the order in
        which matching reads it."""
        size = self.sizes[index]
        return getattr(self, COMPONENTS[index]).unflatten(2, (size, size))

    def matched(self, index, part):
        """RDic* of component number `index` for part (B,C,h,w), Eq. (3) and (4)."""
        entries = self.entries(index)
        match = match_features if entries.dtype == torch.float32 else match_coarsely
        best = entries[match(part, entries, self.cadain)]
        return restyle(best, part) if self.cadain else best.float()

    def forward(self, features, boxes):
        parts = crop_components(features, boxes, self.stride, self.sizes)
        matched = [self.matched(index, part) for index, part in enumerate(parts)]
        if self.confidence is None:                  # "-CS": RDic* takes the component's place
            swapped = paste_components(matched, boxes, self.stride, features.shape[2:])
            ones = [torch.ones_like(part[:, :1]) for part in parts]
            inside = paste_components(ones, boxes, self.stride, features.shape[2:])
            return torch.where(inside > 0, swapped, features.float()).to(features.dtype)
        changes = [score(part, best) - part
                   for score, part, best in zip(self.confidence, parts, matched)]
        change = paste_components(changes, boxes, self.stride, features.shape[2:])
        return features + change.to(features.dtype, memory_format=torch.channels_last)


class MSDilate(nn.Module):
    """The decoder's start: four pairs of convolutions, dilations 4, 3, 2, 1, fused, added
    to the input."""

    def __init__(self, channels):
        super().__init__()
        self.branches = nn.ModuleList(pair(channels, channels, d) for d in (4, 3, 2, 1))
        self.fuse = convolution(4 * channels, channels)

    def forward(self, x):
        return x + self.fuse(torch.cat([branch(x) for branch in self.branches], 1))


class SFTStage(nn.Module):
    """A decoder stage with Eq. (6): SFT = α ⊙ F^decoder + β; α and β come from the
    enriched features F̂_s by two convolutions each. x, skip (B,before,h,w) →
    (B,after,2h,2w)."""

    def __init__(self, before, after):
        super().__init__()
        self.reduce = convolution(before, after)
        self.widen = convolution(after, after)
        self.scale = pair(before, after)
        self.shift = pair(before, after)

    def forward(self, x, skip):
        x = F.leaky_relu(self.reduce(x), 0.2)
        x = self.scale(skip) * x + self.shift(skip)                             # Eq. (6)
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
        return F.leaky_relu(self.widen(x), 0.2)


class Residual(nn.Module):
    """x + two convolutions, without spectral norm."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(0.2),
                                  nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


class DFDNet(nn.Module):
    """Eq. (2): Î = F(I^d | L^d, Dic). degraded (B,3,H,W) in [-1,1], boxes (B,4,4) from
    landmarks → restored.

    The encoder is frozen: were it trained, its features would drift away from the
    dictionaries'.
    """
    block = DFTBlock
    stage = SFTStage

    def __init__(self, cfg, encoder):
        super().__init__()
        self.cfg = cfg
        self.__dict__["encoder"] = encoder        # no submodule: stored with the dictionaries
        widths = encoder.widths                                         # C of scales 1 … 4
        self.blocks = nn.ModuleDict()
        for s in cfg.dft_scales:
            sizes = cfg.component_sizes[s - 1]
            self.blocks[f"scale{s}"] = self.block(widths[s - 1], sizes, 2**s, cfg)
        self.context = MSDilate(widths[3])
        outputs = (widths[2], widths[1], widths[0], cfg.width)
        self.stages = nn.ModuleList(self.stage(before, after)
                                    for before, after in zip(reversed(widths), outputs))
        self.paint = nn.Sequential(convolution(cfg.width, cfg.width), nn.LeakyReLU(0.2),
                                   *[Residual(cfg.width) for _ in range(cfg.paint_blocks)],
                                   nn.Conv2d(cfg.width, 3, 3, padding=1))
        if cfg.residual:
            nn.init.zeros_(self.paint[-1].weight)

    def set_dictionary(self, dictionary):
        """dictionary: {"scale1": {component: (K,C,h,w)}, …}, as build_dictionary makes
        it."""
        for scale, block in self.blocks.items():
            for name, entries in dictionary[scale].items():
                block.set_entries(name, entries)

    def forward(self, degraded, boxes):
        with torch.no_grad():
            features = self.encoder.features(degraded)
        x = self.context(features[3])
        for stage, s in zip(self.stages, (4, 3, 2, 1)):
            skip = features[s - 1]
            if f"scale{s}" in self.blocks:
                skip = self.blocks[f"scale{s}"](skip, boxes)
            x = stage(x, skip)
        image = self.paint(x).float()
        return degraded + image if self.cfg.residual else torch.tanh(image)


class Discriminator(nn.Module):
    """D_r: an SN-GAN patch discriminator of images reduced r times, (B,3,H,W) → scores."""

    def __init__(self, width):
        super().__init__()
        layers = []
        for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [spectral_norm(nn.Conv2d(before, after, 4, 2, 1)),
                       nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(
            *layers, spectral_norm(nn.Conv2d(4 * width, 1, 3, padding=1)))

    def forward(self, image):
        return self.layers(image)


class Discriminators(nn.ModuleList):
    """The four D_r, r = 1, 2, 4, 8: image (B,3,H,W) → their four score maps."""

    def __init__(self, width):
        super().__init__(Discriminator(width) for _ in range(4))

    def forward(self, image):
        return [net(F.avg_pool2d(image, r)) for net, r in zip(self, (1, 2, 4, 8))]


# 4. Losses ----------------------------------------------------------------------------

def pixel_loss(restored, target):
    """Eq. (7), first term: ‖Î − I^h‖², as a mean over pixels (the paper names it the mean
    square error)."""
    return F.mse_loss(restored.float(), target.float())


def perceptual_loss(features, target_features, weights):
    """Eq. (7), second term: Σ_m λ_p,m / (C_m H_m W_m) · ‖Ψ_m(Î) − Ψ_m(I^h)‖², a mean over
    the batch."""
    return sum(weight * F.mse_loss(a.float(), b.float())
               for weight, a, b in zip(weights, features, target_features))


def reconstruction_losses(restored, target, features, target_features, cfg):
    """Eq. (7): its two terms by name; their sum is also what validation looks at."""
    return {
        "pixel": cfg.weight_pixel * pixel_loss(restored, target),
        "perceptual": perceptual_loss(features, target_features, cfg.weight_perceptual)}


def discriminator_loss(real, fake):
    """Eq. (8): −Σ_r ( E[min(0, D_r(I_↓r) − 1)] + E[min(0, −1 − D_r(Î_↓r))] ).

    real, fake: lists of score maps. The paper's ℓ is what D maximises; this is its
    negative, to be minimised.
    """
    return sum(F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean()
               for r, f in zip(real, fake))


def adversarial_loss(fake, weights):
    """Eq. (9): −Σ_r λ_a,r E[D_r(Î_↓r)], with λ_a,r inside the sum, as its index asks
    for."""
    return -sum(w * f.float().mean() for w, f in zip(weights, fake))


# 5. Data ------------------------------------------------------------------------------

class Batches(torch.utils.data.Dataset):
    """Training batch number `step`, from 0: (degraded, target, boxes).

    Every face draws from a random stream of its own, (seed, step, place in the whole batch):
    resuming, or more processes of smaller batches, changes nothing.
    """

    def __init__(self, faces, indices, cfg):
        self.faces = faces
        self.indices = indices
        self.cfg = cfg
        self.first = common.rank() * cfg.batch

    def sample(self, step, place):
        """One face: degraded, target (3,H,W), boxes (4,4)."""
        generator = common.seeded(self.cfg.seed, 1, step, place)
        chosen = torch.randint(len(self.indices), (), generator=generator).item()
        target, landmarks = common.stack_faces(self.faces, [self.indices[chosen]])
        degradation = common.DEGRADATIONS[self.cfg.degradation]
        degraded = common.degrade(target, degradation, generator)
        return degraded[0], target[0], common.component_boxes(landmarks, self.cfg.size)[0]

    def __getitem__(self, step):
        samples = [self.sample(step, self.first + k) for k in range(self.cfg.batch)]
        return [torch.stack(part) for part in zip(*samples)]


def kmeans(points, clusters, generator, rounds):
    """Lloyd's K-means from k-means++ seeds. points (N,D) → centres (K,D) float32, the
    cluster of each point (N,), its squared distance to the centre (N,). A cluster that
    runs empty restarts at the worst-served point. Works in chunks, which bound memory."""
    if len(points) < clusters:
        raise InputError(f"{len(points)} faces cannot make {clusters} clusters; give more, or a "
                         "variant of fewer (k16)")
    chunks = points.split(max(2**26 // points.shape[1], 1))
    norms = torch.cat([chunk.float().square().sum(1) for chunk in chunks])

    def distances(centres):
        products = torch.cat([chunk.float() @ centres.T for chunk in chunks])
        return (norms[:, None] - 2 * products + centres.square().sum(1)).clamp(min=0)

    seeds = [torch.randint(len(points), (), generator=generator).item()]
    nearest = distances(points[seeds].float())[:, 0]
    while len(seeds) < clusters:          # k-means++: the farther from all seeds, the likelier
        seeds.append(torch.multinomial(nearest.cpu() + 1e-9, 1, generator=generator).item())
        nearest = nearest.minimum(distances(points[seeds[-1:]].float())[:, 0])
    centres = points[seeds].float()
    before = None
    for _ in range(rounds):
        nearest, cluster = distances(centres).min(1)
        if before is not None and torch.equal(cluster, before):
            break
        before = cluster
        count = torch.bincount(cluster, minlength=clusters)
        total = torch.zeros_like(centres)
        for chunk, members in zip(chunks, cluster.split(len(chunks[0]))):
            total.index_add_(0, members, chunk.float())
        centres = total / count.clamp(min=1)[:, None]
        empty = torch.nonzero(count == 0)[:, 0]
        centres[empty] = points[nearest.topk(len(empty)).indices].float()
    nearest, cluster = distances(centres).min(1)
    return centres, cluster, nearest


@torch.inference_mode()
def component_features(cfg, encoder, faces, indices, scale, progress):
    """Ψ's features of all components of sharp faces at one scale: {component: (N,C·h·w)
    float16}."""
    device = next(encoder.parameters()).device
    features = {name: [] for name in COMPONENTS}
    for start in range(0, len(indices), 16):
        images, landmarks = common.stack_faces(faces, indices[start:start + 16])
        boxes = common.component_boxes(landmarks, cfg.size).to(device)
        with common.autocast(device):
            maps = encoder.features(images.to(device, memory_format=torch.channels_last))
        sizes = cfg.component_sizes[scale - 1]
        parts = crop_components(maps[scale - 1], boxes, 2**scale, sizes)
        for name, part in zip(COMPONENTS, parts):
            features[name].append(part.flatten(1).half())
        progress.update((scale - 1) * len(indices) + start)
    return {name: torch.cat(parts) for name, parts in features.items()}


def build_dictionary(cfg, encoder, faces, indices, quiet=False):
    """Eq. (1): Dic_{s,c} = K-means of the components' features in sharp faces.

    → {"scale1": {component: (K,C,h,w) float16}, …}, and for scale 4 {component: (the
    cluster of every face, its distance to the centre)}. Each scale is a pass over the
    faces of its own: that keeps memory small.
    """
    dictionary = {}
    progress = common.Progress("dictionaries", 4 * len(indices), quiet=quiet)
    for scale in (1, 2, 3, 4):
        features = component_features(cfg, encoder, faces, indices, scale, progress)
        dictionary[f"scale{scale}"] = {}
        members = {}                               # scale 4's, the last, are returned
        for number, name in enumerate(COMPONENTS):
            generator = common.seeded(cfg.seed, 3, scale, number)
            centres, cluster, distance = kmeans(features.pop(name), cfg.entries, generator,
                                                cfg.kmeans_rounds)
            size = cfg.component_sizes[scale - 1][number]
            centres = centres.unflatten(1, (-1, size, size))
            dictionary[f"scale{scale}"][name] = centres.half().cpu()
            members[name] = cluster.cpu(), distance.cpu()
    progress.close(f"{cfg.entries} entries a component and scale")
    return dictionary, members


def draw_dictionary(cfg, faces, indices, members):
    """For each component six rows, its largest clusters; in a row the five faces nearest
    to the centre."""
    columns = {}
    count = min(6, *(len(cluster.unique()) for cluster, _ in members.values()))
    for number, (name, (cluster, distance)) in enumerate(members.items()):
        rows = []
        for largest in torch.bincount(cluster).topk(count).indices:
            nearest = [i for i in distance.argsort().tolist() if cluster[i] == largest][:5]
            shown = [indices[i] for i in (nearest * 5)[:5]]
            images, landmarks = common.stack_faces(faces, shown)
            boxes = common.component_boxes(landmarks, cfg.size)
            crops = crop_components(images, boxes, 1, [64] * 4)[number]
            rows.append(torch.cat(list(crops), 2))
        columns[name.replace("_", " ")] = torch.stack(rows)
    return common.comparison_grid(columns)


def prepare(cfg, args, faces, people):
    """Encoder, dictionaries and their key, all frozen. They are read from the dictionary.pt
    beside the checkpoint. Where that does not fit they are made, of the faces `people` or
    of --dictionary-data."""
    if args.resume:
        return load_frozen(args, args.state.get("dictionary_key"))
    sources = faces
    if args.dictionary_data is not None:
        sources = common.FaceFolder(args.dictionary_data, cfg.size, device=args.device)
        people = list(range(len(sources)))
    indices = common.spread(people, cfg.dictionary_images)
    key = json.dumps([faces.fingerprint, sources.fingerprint, cfg.encoder, args.vggface,
                      cfg.size, cfg.entries, cfg.dictionary_images, cfg.kmeans_rounds,
                      cfg.seed])
    path = args.checkpoint.with_name("dictionary.pt")
    with common.first():
        with contextlib.suppress(InputError):           # none there, damaged, or others
            return load_frozen(args, key)
        encoder = common.load_encoder(cfg.encoder, args, faces)
        dictionary, members = build_dictionary(cfg, encoder, sources, indices)
        picture = draw_dictionary(cfg, sources, indices, members)
        common.write_image(path.with_suffix(".png"), picture)
        common.save_checkpoint(path, {"key": key, "encoder": common.pack(encoder),
                                      "dictionary": dictionary})
    return load_frozen(args, key)


def load_frozen(args, key):
    """The dictionary.pt of a checkpoint → encoder, dictionaries, key."""
    path = args.checkpoint.with_name("dictionary.pt")
    if not path.is_file():
        raise InputError(f"{path}: missing; a checkpoint needs the dictionary.pt of its run")
    frozen = common.load_weights(path)
    if frozen.get("key") != key:
        raise InputError(f"{path}: not the dictionaries that {args.checkpoint} was trained "
                         "with; put back the file of its run")
    encoder = common.unpack(frozen["encoder"])
    encoder.to(args.device, memory_format=torch.channels_last)
    return encoder, frozen["dictionary"], key


# 6. Training --------------------------------------------------------------------------

def train(cfg, args):
    """Train on args.data, write the run into args.folder; see Config for every number."""
    faces = common.load_faces(args, cfg)
    people, validation, test = common.split_identities(faces)
    validation = common.spread(validation, cfg.validated)
    test = common.spread(test, cfg.tested)
    encoder, dictionary, key = prepare(cfg, args, faces, people)                # Eq. (1)

    torch.manual_seed(cfg.seed)
    net = DFDNet(cfg, encoder).to(args.device, memory_format=torch.channels_last)
    net.set_dictionary(dictionary)
    discriminators = Discriminators(cfg.discriminator_width)
    discriminators.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), betas=cfg.betas, fused=True)
    optimizer_d = torch.optim.Adam(discriminators.parameters(), betas=cfg.betas, fused=True)
    run = common.Run(SCRIPT, cfg, args, faces, net=net, discriminators=discriminators,
                     optimizer=optimizer, optimizer_d=optimizer_d, dictionary_key=key)
    forward, forward_d = common.parallel(net, discriminators)

    for step, (degraded, target, boxes) in run.batches(Batches(faces, people, cfg)):
        common.set_rate(cfg.rate(step) * run.factor, optimizer, optimizer_d)

        # Generator
        discriminators.requires_grad_(False)
        with common.autocast(args.device, args.precision):
            restored = forward(degraded, boxes)
            features = encoder.features(restored), encoder.features(target)
            losses = reconstruction_losses(restored, target, *features, cfg)
            fake = discriminators(restored)
            losses["adversarial"] = adversarial_loss(fake, cfg.weight_adversarial)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()                                         # Eq. (10)
        if cfg.clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
        optimizer.step()

        # Discriminators
        discriminators.requires_grad_(True)
        with common.autocast(args.device, args.precision):
            real = forward_d(target)
            fake = forward_d(restored.detach())
            losses["discriminator"] = discriminator_loss(real, fake)
        optimizer_d.zero_grad(set_to_none=True)
        losses["discriminator"].backward()
        optimizer_d.step()

        run.log(step, losses)
        if run.due(step):
            run.save(step, validate(net, faces, validation, cfg))

    common.report(run, evaluate(net, faces, test, cfg, args),
                  samples(net, faces, test, cfg, args.precision))


@torch.inference_mode()
def validate(net, faces, indices, cfg):
    """Reconstruction loss, Eq. (7), and PSNR in dB on held-out faces, always degraded
    alike."""
    device = next(net.parameters()).device
    loss, quality = 0.0, 0.0
    for batch in restored_batches(net, faces, indices, cfg, None):
        restored, target = batch["restored"].to(device), batch["target"].to(device)
        with common.autocast(device):
            features = net.encoder.features(restored), net.encoder.features(target)
            losses = reconstruction_losses(restored, target, *features, cfg)
        loss += sum(losses.values()).item() * len(target)
        quality += common.psnr(restored, target).sum().item()
    return {"validation": loss / len(indices), "validation_psnr": quality / len(indices)}


def samples(net, faces, indices, cfg, precision="auto"):
    """Pictures of six held-out faces, degraded ×4."""
    six = common.spread(indices, 6)
    batch = next(restored_batches(net, faces, six, cfg, 4, precision=precision))
    shown = {name: batch[name] for name in ("degraded", "restored", "target")}
    return {"samples.png": common.comparison_grid(shown)}


# 7. Restoration -----------------------------------------------------------------------

def restore(net, degraded, landmarks, batch=8, precision="auto"):
    """Restore faces: degraded (N,3,size,size) in [-1,1], landmarks (N,68,2) →
    (N,3,size,size) in [-1,1], on the CPU."""
    boxes = common.component_boxes(landmarks, degraded.shape[-1])
    with common.inference(net, precision) as device:

        def some(part):
            images = degraded[part].to(device, memory_format=torch.channels_last)
            return net(images, boxes[part].to(device)).float().clamp(-1, 1).cpu()

        return common.in_batches(some, len(degraded), batch)


def restored_batches(net, faces, indices, cfg, scale, batch=16, precision="auto"):
    """Held-out faces in batches, {"faces" (their indices), "degraded", "restored",
    "target"}."""
    for start in range(0, len(indices), batch):
        some = indices[start:start + batch]
        target, landmarks = common.stack_faces(faces, some)
        degradation = common.DEGRADATIONS[cfg.degradation]
        degraded = common.degrade_each(target, degradation, scale, cfg.seed, some)
        restored = restore(net, degraded, landmarks, batch, precision)
        yield {"faces": torch.tensor(some), "degraded": degraded, "restored": restored,
               "target": target}


def evaluate(net, faces, indices, cfg, args):
    """The paper's ×4 and ×8 and random scales on held-out faces → "test" of
    result.json."""
    metrics = common.metrics(faces, args)
    table = {}
    for task, scale in common.TASKS.items():
        batches = restored_batches(net, faces, indices, cfg, scale,
                                   precision=args.precision)
        table[task] = common.measure({"restored": batches}, metrics)
    return table


def match_coarsely(part, entries, cadain=True):
    """match_features for entries in half precision: coarse scores choose eight, exact
    scores the best of these."""
    query = matching_query(part, cadain)
    entries = entries.flatten(1)
    with torch.autocast(part.device.type, enabled=False):
        coarse = query.to(entries.dtype) @ entries.T
        best = coarse.topk(min(8, len(entries)), 1).indices                     # (B,8)
        scores = (entries[best].float() @ query[:, :, None])[..., 0]
    winner = scores.argmax(1, keepdim=True)
    return best.gather(1, winner)[:, 0]


def entry_type(device, precision):
    """The type of the entries while restoring. In float32 the authors' take 3 GB; where
    features are bfloat16, rounding the entries adds little error."""
    with common.autocast(device, precision):
        return torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32


def for_restoration(net, device, precision="auto"):
    """The network and its encoder made ready to restore with, for good: see
    common.for_inference. Entries are cast as well, except those of --variant no-cadain:
    not centred, their scores differ too little."""
    common.for_inference(net.encoder, device, precision)
    common.for_inference(net, device, precision)
    dtype = entry_type(device, precision)
    for block in net.blocks.values():
        if block.cadain and dtype != torch.float32:
            for name in COMPONENTS:
                setattr(block, name, getattr(block, name).to(dtype))
    return net


def load_network(args):
    """The network of the checkpoint with its dictionaries, and its Config."""
    cfg = common.recorded_config(args, Config)
    encoder, dictionary, _ = load_frozen(args, args.state.get("dictionary_key"))
    net = DFDNet(cfg, encoder)
    common.load_part(net, args.state, "net")
    net.set_dictionary(dictionary)
    return net, cfg


# 8. Command line ----------------------------------------------------------------------

def main(argv=None):
    parser = common.arguments(__doc__, PRESETS, VARIANTS)
    parser.add_argument("--dictionary-data", metavar="DIR",
                        help="faces that make the dictionaries (default: the training's)")
    parser.add_argument("--official-dictionary", metavar="DIR",
                        help="for --weights: the authors' folder DictionaryCenter512")
    args = common.parse(parser, argv, SCRIPT)
    if args.weights and not args.official_dictionary:
        raise InputError("--weights wants --official-dictionary: the folder of the "
                         "authors' 16 files *_center.npy")
    if args.official_dictionary and not args.weights:
        raise InputError("--official-dictionary belongs to --weights, the authors' "
                         "network; a trained one has its dictionary.pt")
    if args.train:
        for run in common.planned_runs(args, SCRIPT, PRESETS, VARIANTS, CLAIMS, PAPER_FIGURES,
                                       prepared="entries"):
            cfg = common.chosen_config(run, PRESETS, VARIANTS)
            common.check_size(cfg.size, 16)
            train(cfg, run)
        return 0

    if args.weights:
        net = load_official(args.weights, args.official_dictionary,
                            entry_type(args.device, args.precision))
        cfg = net.cfg
    else:
        net, cfg = load_network(args)
    net = for_restoration(net, args.device, args.precision)
    if args.evaluate:
        faces = common.load_faces(args, cfg)
        test = common.test_faces(faces, args, cfg.tested)
        run = common.Run(SCRIPT, cfg, args, faces)
        common.report(run, evaluate(net, faces, test, cfg, args),
                      samples(net, faces, test, cfg, args.precision))
        return 0

    def restore_crops(crops, landmarks, files):
        return restore(net, crops, landmarks, precision=args.precision), {}

    return 1 if common.restore_files(args, cfg.size, restore_crops) else 0


# 9. Released network ------------------------------------------------------------------
# The published weights belong to another network than the paper's: VGG-19 with its last map
# before the ReLU, boxes cut at whole features instead of RoIAlign, the entry brought to the
# box's size by nearest neighbour and the confidence computed there, later components over
# earlier ones, a blurred and twice rectified decoder input, a sigmoid on β.

class ReleasedDFTBlock(DFTBlock):
    """DFTBlock with whole-feature boxes: each has its own size, so only matching takes a
    whole batch."""

    def forward(self, features, boxes):
        enriched = features.clone()
        corners = (boxes.long() // self.stride).tolist()
        for index, size in enumerate(self.sizes):
            places = []
            for sample, corner in enumerate(corners):
                x1, y1, x2, y2 = corner[index]
                one = slice(sample, sample + 1)
                places.append((one, slice(None), slice(y1, y2), slice(x1, x2)))
            parts = [features[place].float().contiguous() for place in places]
            queries = torch.cat([F.interpolate(part, (size, size), mode="bilinear")
                                 for part in parts])
            for place, part, best in zip(places, parts, self.matched(index, queries).split(1)):
                best = F.interpolate(best, part.shape[2:])
                enriched[place] = self.confidence[index](part, best).to(enriched.dtype)
        return enriched


class ReleasedSFTStage(SFTStage):
    """SFTStage with a blur and a second LeakyReLU around its first convolution and a
    sigmoid on β."""

    def __init__(self, before, after):
        super().__init__(before, after)
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("blur", (line[:, None] * line).expand(before, 1, 3, 3).clone())

    def forward(self, x, skip):
        x = F.conv2d(x, self.blur.to(x.dtype), padding=1, groups=x.shape[1])
        x = F.leaky_relu(self.reduce(x), 0.2 * 0.2, inplace=True)
        x = torch.addcmul(self.shift(skip).sigmoid_(), self.scale(skip), x)
        x = self.widen(F.interpolate(x, scale_factor=2, mode="bilinear"))
        return F.leaky_relu(x, 0.2, inplace=True)


class ReleasedDFDNet(DFDNet):
    """The network of latest_net_G.pth."""
    block = ReleasedDFTBlock
    stage = ReleasedSFTStage


def official_names():
    """(pattern, name here) of every tensor in latest_net_G.pth; None for what no output
    uses."""
    table = [
        (r"MSDilate\.convi\.(.+)", r"net.context.fuse.\1"),
        (r"up\d\.conv1\.0\.weight_flip", None),
        (r"up(\d)\.conv1\.0\.weight", r"net.stages.\1.blur"),
        (r"up(\d)\.conv1\.1\.(.+)", r"net.stages.\1.reduce.\2"),
        (r"up(\d)\.convup\.1\.(.+)", r"net.stages.\1.widen.\2"),
        (r"up(\d)\.ScaleModel1\.(.+)", r"net.stages.\1.scale.\2"),
        (r"up(\d)\.ShiftModel1\.(.+)", r"net.stages.\1.shift.\2"),
        (r"up4\.(\d)\.Model\.(.+)", r"net.paint.\1.body.\2"),
        (r"up4\.(.+)", r"net.paint.\1"),
        (r"VggExtract\.RGB_mean", "encoder.mean"),
        (r"VggExtract\.RGB_std", "encoder.deviation"),
        (r"(to_rgb\d|VggExtract\.model\.classifier)\..+", None),
    ]
    for branch in range(4):
        table.append((rf"MSDilate\.conv{branch + 1}\.(.+)", rf"net.context.branches.{branch}.\1"))
    for scale, side in enumerate((256, 128, 64, 32), 1):
        for index, short in enumerate(("le", "re", "no", "mo")):
            here = rf"net.blocks.scale{scale}.confidence.{index}.score.\1"
            table.append((rf"{short}_{side}\.(.+)", here))
    vgg = ((0, 2), (5, 7), (10, 12, 14, 16), (19, 21, 23, 25), (28, 30, 32, 34))
    for block, numbers in enumerate(vgg):
        for layer, number in enumerate(numbers):
            there = rf"VggExtract\.(?:model\.features|features\.\d)\.{number}\.(.+)"
            table.append((there, rf"encoder.blocks.{block}.{layer}.\1"))
    return table


def official_entries(source, name, channels, side):
    """Entries (K,channels,side,side) of a file of the official dictionary, (K,
    channels·side²)."""
    file = name if isinstance(source, dict) else Path(source) / name
    wanted = channels * side**2
    try:
        array = source[name] if isinstance(source, dict) else np.load(file, allow_pickle=False)
        array = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise InputError(f"{file}: not an array of numbers ({str(error).splitlines()[0]}); "
                         "give the file that the authors released") from None
    if array.ndim != 2 or array.shape[1] != wanted or not len(array):
        raise InputError(f"{file}: {'×'.join(map(str, array.shape))} numbers, not K×{wanted}; "
                         "give the file that the authors released")
    return array.view(-1, channels, side, side)


def load_official(source, dictionary, entries=torch.float32):
    """latest_net_G.pth as its authors released it → the network, frozen.

    source: a file, its address or its state dict; dictionary: the folder of *_center.npy
    or {file name: array}. The network: degraded (B,3,512,512) in [-1,1], boxes (B,4,4) →
    restored (B,3,512,512). `entries`: the type that the dictionary is kept in, see
    entry_type. InputError for what does not fit.
    """
    sides = {scale: 512 >> scale for scale in RELEASED.dft_scales}
    names = [f"{name}_{side}_center.npy" for side in sides.values() for name in COMPONENTS]
    there = dictionary
    if not isinstance(dictionary, dict):
        there = {file.name for file in Path(dictionary).glob("*.npy")}
    if missing := [name for name in names if name not in there]:
        folder = "the dictionary" if isinstance(dictionary, dict) else dictionary
        raise InputError(f"{folder}: {len(missing)} of the 16 files *_center.npy are missing, "
                         f"the first {missing[0]}; give the folder that the authors released")

    encoder = common.VGG(last_relu=False)
    net = ReleasedDFDNet(replace(RELEASED, entries=1), encoder)
    common.load_named(nn.ModuleDict({"net": net, "encoder": encoder}), source,
                      official_names(), "DFDNet's weights")
    for scale, side in sides.items():
        for name, size in zip(COMPONENTS, RELEASED.component_sizes[scale - 1]):
            part = official_entries(dictionary, f"{name}_{side}_center.npy",
                                    encoder.widths[scale - 1], size)
            net.blocks[f"scale{scale}"].set_entries(name, part, entries)
    net.cfg = replace(RELEASED, entries=len(net.blocks["scale1"].nose))
    return net


if __name__ == "__main__":
    common.run_script(main)
