"""RestoreFormer: blind face restoration by attention over a dictionary learned to paint sharp faces.

Wang, Zhang, Chen, Wang, Luo: "RestoreFormer: High-Quality Blind Face Restoration from Undegraded Key-Value
Pairs", CVPR 2022.

First, an encoder, a decoder and a dictionary of code vectors learn to reconstruct sharp faces, with each of
the encoder's features replaced by the nearest code. Then a degraded face is encoded, and the codes nearest
to its features are its priors: sharp material that fits roughly, all over the face. Cross-attention fuses
both: each degraded feature asks, all priors answer, and their answer is added to the prior found there. The
decoder paints the face. Neither landmarks nor pictures of the same person are needed.

Equation → name
     (1) MHSA                (7) Dictionary           (13) the sum in train_stage
     (2) attention_map       (8) RestoreFormer        (14) Dictionary
     (3) MHCA                (9) pixel_loss,          (15) codebook_loss
     (4) MHSA                    perceptual_loss      (16) commitment_loss
     (5) MHCA               (10) code_loss            (17) as (9) and (12)
     (6) MHCA               (11) discriminator_loss,  (18) the sum in train_stage
                                 style_loss           (19) degradation_of, common.degrade
                            (12) discriminator_loss, adversarial_loss, identity_loss

    python restoreformer.py --train                           # rendered faces, minutes on two CPU cores
    python restoreformer.py --evaluate                        # on people it has never seen
    python restoreformer.py --restore photo.jpg --aligned     # your picture

Open in the paper, chosen here: its log D + log(1 − D) is what a discriminator maximises, by binary
cross-entropy on logits; the generators get the usual non-saturating form, −log D, of the same game. Layers
are the released network's where they fit (residual blocks of GroupNorm and SiLU, eight heads). The decoder
begins with a layer normalisation and the attention's two convolutions near the identity, so that the second
stage starts as the first one ended. The gradient passes the dictionary straight through in both stages.
Identity is measured by the recognition network of the faces at hand, in ArcFace's place.
TINY differs from the paper in size, and in what Config says beside it.
"""
import argparse
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib.figure
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.ops import roi_align

import common
from common import InputError

SCRIPT = "restoreformer"
REGIONS = {"left_eye": 80, "right_eye": 80, "mouth": 120}      # R_r of Eq. (11): pixels a side, of 512


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

    encoder: str = "recogniser"              # φ of Eq. (9); "vgg" is VGG-19, or VGG-Face
    sources: str = "both"                    # what is fused: "degraded" features, their "prior", or both
    fusion: str = "mhca"                     # or "mhca-d" (residual on Z_d), "mhsa", "sft", "none"
    recognition: bool = False                # E_h and E_d are the frozen recognition network
    codes: int = 512                         # M
    code_channels: int = 64                  # C, the length of a code
    heads: int = 2                           # N_h; 8 in the released network
    widths: tuple = (16, 32, 64)             # channels of each level; full size first, then ever half of it
    blocks: tuple = (0, 1, 2)                # residual blocks of each level, in encoder and decoder
    doubling: str = "bilinear"               # of the decoder's maps: few steps leave a lattice of "nearest"
    groups: int = 1                          # of GroupNorm in them; 32 in the released network
    restart_every: int = 20                  # steps after which unused codes restart; the paper has none
    released: bool = False                   # the network of the published weights, see the last chapter

    weight_perceptual: float = 0.25          # λ_per; 1 in the paper, with another encoder
    weight_code: float = 0.25                # λ_p
    weight_component: float = 0.005          # λ_disc; 1 in the paper, for many more steps
    weight_style: float = 1.0                # λ_style; 2000 in the paper
    weight_adversarial: float = 0.005        # λ_adv; 0.8 in the paper
    weight_identity: float = 0.3             # λ_id; 1.5 in the paper
    weight_codebook: float = 1.0             # λ_d
    weight_commitment: float = 0.25          # λ_c
    discriminator_width: int = 16
    dictionary_rate: float = 8e-4            # learning rate of the first stage; 7e-5 in the paper
    dictionary_decay: float = 1.0            # part of its steps after which the rate falls to a tenth
    learning_rate: float = 3e-4              # of the second stage; 7e-6 in the paper
    betas: tuple = (0.9, 0.99)               # β1, β2 of Adam
    clip: float = 1.0                        # longest gradient; the paper clips none
    cooldown: float = 0.6                    # last part of the steps: the rate falls to 0; none in the paper
    crop: float = 0.05                       # largest random change of scale and place, parts of the size
    jitter: float = 0.1                      # of brightness and contrast
    dictionary_steps: int = 860              # of the first stage
    steps: int = 820                         # of the second stage
    batch: int = 4                           # faces a process and step
    validate_every: int = 200                # steps; also when a checkpoint is written
    degradation: str = "restoreformer"       # Eq. (19)
    blur: float = 2.5                        # its widest σ; 10 in the paper, of 512 pixels

    @property
    def stride(self):
        """Pixels a feature of Z_d, on a side."""
        return 2 ** (len(self.widths) - 1)

    def steps_of(self, stage):
        return self.dictionary_steps if stage == 1 else self.steps

    def rate(self, stage, step):
        """The learning rate of a step from 1 on."""
        steps, rate = self.steps_of(stage), self.dictionary_rate if stage == 1 else self.learning_rate
        if stage == 1 and step > self.dictionary_decay * steps:
            rate /= 10
        return rate * min((steps - step + 1) / max(self.cooldown * steps, 1), 1)


TINY = Config()
PAPER = replace(TINY, preset="paper", size=512, encoder="vgg", codes=1024, code_channels=256,
                widths=(64, 128, 128, 256, 256, 512), blocks=(2,) * 6, groups=32, heads=8,
                doubling="nearest", restart_every=0, weight_perceptual=1.0, weight_component=1.0,
                weight_style=2000.0, weight_adversarial=0.8, weight_identity=1.5, discriminator_width=64,
                dictionary_rate=7e-5, dictionary_decay=0.75, learning_rate=7e-6, clip=math.inf, cooldown=0,
                crop=0, jitter=0, dictionary_steps=800_000, steps=60_000, batch=16, validate_every=5_000,
                blur=10.0)
RELEASED = replace(PAPER, preset="released", released=True, batch=4)
PRESETS = {"tiny": TINY, "paper": PAPER, "released": RELEASED}
VARIANTS = {                                 # Table 4 and the last paragraph of Section 4.4
    "full": {}, "exp1": {"sources": "degraded", "fusion": "none"},
    "exp2": {"sources": "degraded", "fusion": "mhsa"}, "exp3": {"sources": "prior", "fusion": "mhsa"},
    "exp4": {"fusion": "sft"}, "exp5": {"fusion": "mhca-d"}, "recognition-dictionary": {"recognition": True}}


# -----------------------------------------------------------------------------------------------------------
# 3. Network
# -----------------------------------------------------------------------------------------------------------

def convolution(before, after, kernel=3):
    """A convolution, zero-padded to the same size, with He's initialisation."""
    layer = nn.Conv2d(before, after, kernel, padding=kernel // 2)
    nn.init.kaiming_normal_(layer.weight, 0.2)
    nn.init.zeros_(layer.bias)
    return layer


def normalisation(channels, groups):
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Residual(nn.Module):
    """x + two 3×3 convolutions, each behind normalisation and SiLU: (B,before,h,w) → (B,after,h,w). It
    begins close to x."""

    def __init__(self, before, after, groups):
        super().__init__()
        self.body = nn.Sequential(
            normalisation(before, groups), nn.SiLU(), convolution(before, after),
            normalisation(after, groups), nn.SiLU(), convolution(after, after))
        self.shortcut = convolution(before, after, 1) if before != after else nn.Identity()
        with torch.no_grad():
            self.body[-1].weight *= 0.1

    def forward(self, x):
        return self.shortcut(x) + self.body(x)


def level(before, after, blocks, resize, groups):
    """The layers of a level: a change of size and of width, unless it is the first, and residual blocks."""
    return [*([resize, convolution(before, after)] if before else []),
            *(Residual(after, after, groups) for _ in range(blocks))]


class Encoder(nn.Sequential):
    """E_h, E_d: (B,3,H,W) → Z (B,C,H/s,W/s) of stride s; residual blocks, average pooling between levels."""

    def __init__(self, cfg):
        before, layers = None, [convolution(3, cfg.widths[0])]
        for width, blocks in zip(cfg.widths, cfg.blocks):
            layers += level(before, width, blocks, nn.AvgPool2d(2), cfg.groups)
            before = width
        super().__init__(*layers, normalisation(before, cfg.groups), nn.SiLU(),
                         convolution(before, cfg.code_channels))


class RecognitionEncoder(nn.Module):
    """The encoder of --variant recognition-dictionary: features of a frozen recognition network, scaled to
    mean 0 and variance 1 at each position, and brought to C channels by a fixed orthogonal matrix."""

    def __init__(self, encoder, cfg):
        super().__init__()
        self.encoder, self.stride = encoder, cfg.stride
        self.level = min(cfg.stride.bit_length() - 2, len(encoder.widths) - 1)
        self.project = nn.Conv2d(encoder.widths[self.level], cfg.code_channels, 1, bias=False)
        nn.init.orthogonal_(self.project.weight)
        self.requires_grad_(False)

    def forward(self, image):
        x = self.encoder.features(image)[self.level].float()
        x = F.avg_pool2d(x, self.stride // 2 ** (self.level + 1))
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt()
        return self.project(x)


class Dictionary(nn.Module):
    """The HQ dictionary D, d_m (M,C), and Eq. (7) and (14): at each position (i,j) Z_p is the d_m of the
    smallest ‖Z(i,j) − d_m‖². features (B,C,h,w) → Z_p (B,C,h,w), m (B,h,w); float32, as two codes may be
    nearly as near."""

    def __init__(self, codes, channels):
        super().__init__()
        self.codes = nn.Parameter(torch.empty(codes, channels).uniform_(-1 / codes, 1 / codes))

    def forward(self, features):
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            points = features.float().permute(0, 2, 3, 1)
            nearest = (self.codes.square().sum(1) - 2 * points @ self.codes.T).argmin(-1)  # ‖Z‖² is the same
        return F.embedding(nearest, self.codes).permute(0, 3, 1, 2), nearest


def tokens(features):
    """(B,C,h,w) → (B,h·w,C), row by row."""
    return features.flatten(2).transpose(1, 2)


def attention_map(query, key):
    """The softmax of Eq. (2): softmax(Q_i K_iᵀ / √C_h) of each head i, (B,N_h,N,C_h) → (B,N_h,N,N)."""
    return (query.float() @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)


class MHCA(nn.Module):
    """Multi-head cross-attention: Z_d, Z_p (B,C,h,w) → Z_f (B,C,h,w).

    Eq. (5): Q = Z_d W_q + b_q, K = Z_p W_k + b_k, V = Z_p W_v + b_v. Eq. (2) for each of N_h heads, Eq. (3):
    Z_mh is what the heads read, side by side. Eq. (6): Z_f = FFN(LN(Z_mh + Z_p)). With residual "degraded"
    it is Z_mh + Z_d instead, row exp5 of Table 4.
    """

    def __init__(self, channels, heads, residual="prior"):
        super().__init__()
        self.heads, self.residual = heads, residual
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))
        self.norm = nn.LayerNorm(channels)
        self.feed_forward = nn.Sequential(convolution(channels, 2 * channels), nn.LeakyReLU(0.2),
                                          convolution(2 * channels, channels))
        with torch.no_grad():            # near the identity: x is in what LeakyReLU leaves of x and of −x
            first, _, second = self.feed_forward
            both = torch.cat([torch.eye(channels), -torch.eye(channels)])
            for layer, middle in ((first, both), (second, both.T / 1.2)):
                layer.weight *= 0.1
                layer.weight[:, :, 1, 1] += middle

    def split(self, features, project):
        """(B,C,h,w) → Q, K or V of all heads, (B,N_h,N,C_h)."""
        return project(tokens(features)).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def attention(self, features, priors):
        """The attention maps, (B,N_h,N,N): from which position each position reads, and how much."""
        return attention_map(self.split(features, self.query), self.split(priors, self.key))

    def forward(self, features, priors):
        read = F.scaled_dot_product_attention(*(self.split(source, project) for source, project in (
            (features, self.query), (priors, self.key), (priors, self.value))))
        added = features if self.residual == "degraded" else priors
        fused = self.norm(read.transpose(1, 2).flatten(2) + tokens(added))
        return self.feed_forward(fused.transpose(1, 2).unflatten(2, added.shape[2:]))


class MHSA(MHCA):
    """Multi-head self-attention, rows exp2 and exp3 of Table 4. Eq. (1): Q, K and V are all of what is to be
    refined, Z; Eq. (4): Z_a = FFN(LN(Z_mh + Z)). It takes Z_d as well, and makes no use of it."""

    def attention(self, features, z):
        return super().attention(z, z)

    def forward(self, features, z):
        return super().forward(z, z)


class SFT(nn.Module):
    """Spatial feature transform, row exp4 of Table 4: α ⊙ Z_p + β at each position, α and β from Z_d by two
    convolutions each. It begins close to Z_p."""

    def __init__(self, channels):
        super().__init__()
        self.scale, self.shift = (nn.Sequential(convolution(channels, channels), nn.LeakyReLU(0.2),
                                                convolution(channels, channels)) for _ in range(2))
        with torch.no_grad():
            self.scale[-1].weight *= 0.1
            self.shift[-1].weight *= 0.1

    def forward(self, features, priors):
        return (1 + self.scale(features)) * priors + self.shift(features)


class Decoder(nn.Module):
    """D_h, D_d: (B,C,H/s,W/s) → (B,3,H,W), bounded by nothing; doublings between the levels."""

    def __init__(self, cfg):
        super().__init__()
        self.norm = nn.LayerNorm(cfg.code_channels)
        before, layers = None, [convolution(cfg.code_channels, cfg.widths[-1])]
        for width, blocks in zip(reversed(cfg.widths), reversed(cfg.blocks)):
            double = nn.Upsample(scale_factor=2, mode=cfg.doubling)
            layers += level(before, width, blocks, double, cfg.groups)
            before = width
        self.layers = nn.Sequential(*layers, normalisation(before, cfg.groups), nn.SiLU(),
                                    convolution(before, 3))

    def forward(self, x):
        return self.layers(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).float()


class RestoreFormer(nn.Module):
    """degraded (B,3,H,W) in [-1,1] → restored (B,3,H,W); with `latents` also Z_d and Z_p (None if unused).

    Stage 2, Eq. (8): Z'_f = MHCA(Z_d, MHCA(Z_d, Z_p)), then the decoder. Stage 1 is the same without
    attention: a sharp face, Z_h, Z_p, the decoder. A recognition network is needed for --variant
    recognition-dictionary only.
    """

    def __init__(self, cfg, stage=2, encoder=None):
        super().__init__()
        self.sources = "prior" if stage == 1 else cfg.sources
        fusion, channels = "none" if stage == 1 else cfg.fusion, cfg.code_channels
        self.encoder = RecognitionEncoder(encoder, cfg) if cfg.recognition else Encoder(cfg)
        self.dictionary = Dictionary(cfg.codes, channels)
        if fusion == "none":
            blocks = []
        elif fusion == "sft":
            blocks = [SFT(channels), SFT(channels)]
        elif fusion == "mhsa":
            blocks = [MHSA(channels, cfg.heads), MHSA(channels, cfg.heads)]
        else:
            residual = "degraded" if fusion == "mhca-d" else "prior"
            blocks = [MHCA(channels, cfg.heads, residual), MHCA(channels, cfg.heads, residual)]
        self.fusion = nn.ModuleList(blocks)
        self.decoder = Decoder(cfg)

    def latents(self, image):
        """image → Z_d, Z_p, and what fusion begins with, (B,C,h,w) each."""
        features = self.encoder(image).float()
        if self.sources == "degraded":
            return features, None, features
        priors, _ = self.dictionary(features)
        return features, priors, features + (priors - features).detach()      # the gradient passes unchanged

    def forward(self, image, latents=False):
        features, priors, fused = self.latents(image)
        for block in self.fusion:
            fused = block(features, fused)
        restored = self.decoder(fused)
        return (restored, features, priors) if latents else restored

    def attention_maps(self, image):
        """The maps (B,N_h,N,N) of each attention, in order; none without attention."""
        features, _, fused = self.latents(image)
        maps = []
        for block in self.fusion:
            if isinstance(block, MHCA):
                maps.append(block.attention(features, fused))
            fused = block(features, fused)
        return maps

    def matched(self, image):
        """m of Eq. (7) and (14): the code's number at each position, (B,h,w)."""
        return self.dictionary(self.encoder(image).float())[1]


def build(cfg, stage=2, encoder=None):
    """The network of a Config, in the form of stage 1 or 2."""
    return ReleasedRestoreFormer(cfg, stage) if cfg.released else RestoreFormer(cfg, stage, encoder)


class Discriminator(nn.Module):
    """A patch discriminator, all under spectral norm: (B,3,h,w) → scores (B,1,h',w') before the sigmoid, and
    the features φ of its three layers, for Eq. (11)."""

    def __init__(self, width):
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        self.layers = nn.ModuleList(spectral_norm(nn.Conv2d(a, b, 4, 2, 1))
                                    for a, b in zip(widths, widths[1:]))
        self.score = spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, image):
        features = []
        for layer in self.layers:
            image = F.leaky_relu(layer(image), 0.2)
            features.append(image)
        return self.score(image), features


def crop_regions(image, boxes):
    """R_r of Eq. (11), RoIAlign: image (B,3,H,W), boxes (B,4,4) → {region: (B,3,n,n)}."""
    sample = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None]
    image, places = image.float().contiguous(), list(common.COMPONENTS)
    return {name: roi_align(image, torch.cat([sample, boxes[:, places.index(name)]], 1),
                            max(side * image.shape[-1] // 512, 16), sampling_ratio=2, aligned=True)
            for name, side in REGIONS.items()}


class Discriminators(nn.ModuleDict):
    """D of the whole image and, in stage 2, a D_r of each region: → {name: (scores, features)}."""

    def __init__(self, cfg, stage):
        super().__init__({name: Discriminator(cfg.discriminator_width)
                          for name in ("image", *(REGIONS if stage == 2 else ()))})

    def forward(self, image, boxes):
        parts = {"image": image, **(crop_regions(image, boxes) if len(self) > 1 else {})}
        return {name: self[name](part) for name, part in parts.items()}


# -----------------------------------------------------------------------------------------------------------
# 4. Losses
# -----------------------------------------------------------------------------------------------------------

def pixel_loss(restored, target):
    """Eq. (9) and (17): |I_h − Î_d|₁, a mean over pixels and batch."""
    return F.l1_loss(restored.float(), target.float())


def perceptual_loss(features, target_features):
    """Eq. (9) and (17): ‖φ(I_h) − φ(Î_d)‖² of each of the encoder's four maps, a mean over its elements, and
    their sum. (The paper takes one of each of VGG-19's five blocks; the first one's is not among these.)"""
    return sum(F.mse_loss(a.float(), b.float()) for a, b in zip(features, target_features))


def code_loss(features, priors):
    """Eq. (10): ‖Z_p − Z_d‖², a mean over the elements. The dictionary stands still, so it draws Z_d."""
    return F.mse_loss(features, priors.detach())


def discriminator_loss(real, fake):
    """Eq. (11), (12) and (17): −E[log D(I_h)] − E[log(1 − D(Î_d))] of scores before the sigmoid. The paper's
    loss is what D maximises; this is its negative, to be minimised."""
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def adversarial_loss(fake):
    """The generator's side of Eq. (11), (12) and (17), in its non-saturating form: −E[log D(Î_d)]."""
    return F.softplus(-fake.float()).mean()


def gram(features):
    """Correlations of the channels: (B,C,h,w) → (B,C,C), divided by C·h·w."""
    with torch.autocast(features.device.type, enabled=False):
        flat = features.float().flatten(2)
        return flat @ flat.transpose(1, 2) / flat[0].numel()


def style_loss(features, target_features):
    """Eq. (11) of one region: ‖Gram(φ(R_r(I_h))) − Gram(φ(R_r(Î_d)))‖², summed over the discriminator's
    layers, a mean over the batch."""
    return sum((gram(a) - gram(b)).square().sum((1, 2)).mean() for a, b in zip(features, target_features))


def identity_loss(identity, target_identity):
    """Eq. (12): ‖η(I_h) − η(Î_d)‖² of unit vectors (B,D), a mean over the batch."""
    return (identity.float() - target_identity.float()).square().sum(1).mean()


# The authors' code gives λ_c to Eq. (15) and λ_d to Eq. (16); here they are as printed.
def codebook_loss(features, priors):
    """Eq. (15): ‖sg[Z_h] − Z_p‖², a mean over the elements. It moves the codes."""
    return F.mse_loss(priors, features.detach())


def commitment_loss(features, priors):
    """Eq. (16): ‖Z_h − sg[Z_p]‖², a mean over the elements. It holds the encoder near the codes."""
    return F.mse_loss(features, priors.detach())


# -----------------------------------------------------------------------------------------------------------
# 5. Data
# -----------------------------------------------------------------------------------------------------------

def load_faces(cfg, args):
    """The faces of --data, or rendered ones."""
    if args.data is None:
        return common.RenderedFaces(cfg.size)
    return common.FaceFolder(args.data, cfg.size, args.landmarks, args.aligned)


def degradation_of(cfg):
    """Eq. (19), with the blur of the Config."""
    degradation = common.DEGRADATIONS[cfg.degradation]
    return replace(degradation, blur=degradation.blur._replace(high=cfg.blur))


class Batches(torch.utils.data.Dataset):
    """Training batch number `step` of a stage: (degraded, target, boxes), a pure function of (seed, stage,
    rank, step), so that a resumed run sees what an unbroken one would have seen. In stage 1 the first is the
    target itself."""

    def __init__(self, faces, indices, cfg, stage, rank=0):
        self.faces, self.indices, self.cfg, self.stage, self.rank = faces, indices, cfg, stage, rank

    def __len__(self):
        return self.cfg.steps_of(self.stage)

    def __getitem__(self, step):
        generator, cfg = common.seeded(self.cfg.seed, self.stage, self.rank, step), self.cfg
        chosen = torch.randint(len(self.indices), (cfg.batch,), generator=generator).tolist()
        images, landmarks = common.stack_faces(self.faces, [self.indices[i] for i in chosen])
        pairs = [common.augment(image[None], points[None], generator, cfg.crop, cfg.jitter)
                 for image, points in zip(images, landmarks)]
        target, landmarks = (torch.cat(part) for part in zip(*pairs))
        degraded = target if self.stage == 1 else common.degrade(target, degradation_of(cfg), generator)
        return degraded, target, common.component_boxes(landmarks, cfg.size)


def load_encoders(cfg, args, faces, device):
    """φ of Eq. (9), the recogniser of these faces or VGG, and η of Eq. (12), the recogniser; frozen."""
    recogniser = common.recogniser(faces)
    encoder = common.load_vgg(args.vggface) if cfg.encoder == "vgg" else recogniser
    return [net.to(device, memory_format=torch.channels_last) for net in (encoder, recogniser)]


# -----------------------------------------------------------------------------------------------------------
# 6. Training
# -----------------------------------------------------------------------------------------------------------

def train(cfg, args):
    """Train both stages, or the one of args.stage, on args.data; write the run into args.out; see Config for
    every number. A resumed run whose second stage had begun goes on there."""
    begin, device, out = time.monotonic(), common.choose_device(args.device), Path(args.out)
    with common.process_group() as (rank, world):
        if rank == 0:
            common.write_json(out / "config.json", asdict(cfg))
        faces = load_faces(cfg, args)
        _, _, test = common.split_identities(faces)
        encoders = load_encoders(cfg, args, faces, device) if rank == 0 else None  # one process trains them,
        wait()                                                                     # others find them cached
        encoders = encoders or load_encoders(cfg, args, faces, device)
        stages = (2,) if args.resume and second_stage_begun(args) else (1, 2)
        for stage in (args.stage,) if args.stage else stages:
            net = train_stage(stage, cfg, args, faces, encoders, device, rank, world)
            wait()
        if rank == 0:
            finish(net if stage == 2 else None, faces, test, cfg, args, device, time.monotonic() - begin)


def wait():
    """Until all processes of a group have come here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def dictionary_file(args):
    """Where stage 1 keeps its networks: beside the checkpoint."""
    return Path(args.checkpoint).with_name("dictionary.pt")


def second_stage_begun(args):
    """Whether the checkpoint goes on from this first stage: the codes stand still in the second one."""
    if not Path(args.checkpoint).is_file() or not dictionary_file(args).is_file():
        return Path(args.checkpoint).is_file()
    first, second = (common.load_checkpoint(path, SCRIPT)["net"]["dictionary.codes"]
                     for path in (dictionary_file(args), args.checkpoint))
    return first.shape == second.shape and torch.equal(first, second)


def start_from_dictionary(net, path, cfg, device):
    """The start of stage 2: E_d, D_d and the dictionary as stage 1 left them. → its log's rows."""
    if not path.is_file():
        raise InputError(f"{path}: missing; stage 2 starts from what stage 1 learned: --train --stage 1")
    state = common.load_checkpoint(path, SCRIPT, device)
    if state["step"] < state["config"]["dictionary_steps"]:
        raise InputError(f"{path}: stage 1 is not finished; --train --stage 1 --resume goes on with it")
    own = net.state_dict()
    if any(name not in own or own[name].shape != value.shape for name, value in state["net"].items()):
        raise InputError(f"{path}: of another network; train stage 1 anew with this preset and variant")
    net.load_state_dict(state["net"], strict=False)
    return state["rows"]


def train_stage(stage, cfg, args, faces, encoders, device, rank, world):
    """Train one stage; → its network. Stage 1 writes dictionary.pt and reconstructions.png, stage 2
    checkpoint.pt."""
    out, (encoder, recogniser), steps = Path(args.out), encoders, cfg.steps_of(stage)
    path, title = (dictionary_file(args), "dictionary ") if stage == 1 else (Path(args.checkpoint), "")
    train_indices, validation, _ = common.split_identities(faces)
    torch.manual_seed(cfg.seed)
    net = build(cfg, stage, encoder if cfg.recognition else None).to(
        device, memory_format=torch.channels_last)
    discriminators = Discriminators(cfg, stage).to(device, memory_format=torch.channels_last)
    history, resumed = [], args.resume and path.is_file()
    if stage == 2:
        if not resumed:
            history = start_from_dictionary(net, dictionary_file(args), cfg, device)
        net.dictionary.requires_grad_(False)
    learned = [weight for weight in net.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(learned, cfg.rate(stage, 1), cfg.betas)
    optimizer_d = torch.optim.Adam(discriminators.parameters(), cfg.rate(stage, 1), cfg.betas)
    parts = {"net": net, "discriminators": discriminators, "optimizer": optimizer,
             "optimizer_d": optimizer_d}
    start, rows, usage = 0, [], torch.zeros(cfg.codes, device=device)
    if resumed:
        state = common.load_checkpoint(path, SCRIPT, device)
        start, rows, history, usage = (state[name] for name in ("step", "rows", "history", "usage"))
        for name, part in parts.items():
            part.load_state_dict(state[name])
    forward, forward_d = net, discriminators
    if world > 1:
        forward, forward_d = (nn.parallel.DistributedDataParallel(m, broadcast_buffers=False)
                              for m in (net, discriminators))
    batches = torch.utils.data.DataLoader(Batches(faces, train_indices, cfg, stage, rank), batch_size=None,
                                          sampler=range(start, steps), num_workers=args.workers,
                                          pin_memory=device.type == "cuda")
    progress = common.Progress(f"{SCRIPT} {title}{cfg.variant}", steps, start, quiet=rank > 0)
    for step, batch in enumerate(batches, start + 1):
        degraded, target = (x.to(device, non_blocking=True, memory_format=torch.channels_last)
                            for x in batch[:2])
        boxes = batch[2].to(device, non_blocking=True)
        for group in (*optimizer.param_groups, *optimizer_d.param_groups):
            group["lr"] = cfg.rate(stage, step)
        with common.autocast(device):                                       # generator
            restored, features, priors = forward(degraded, latents=True)
            discriminators.requires_grad_(False)
            with torch.no_grad():
                target_features = encoder.features(target)
            judged = discriminators(restored, boxes)
            losses = {"pixel": pixel_loss(restored, target),
                      "perceptual": cfg.weight_perceptual * perceptual_loss(
                          encoder.features(restored), target_features),
                      "adversarial": cfg.weight_adversarial * adversarial_loss(judged["image"][0])}
            if stage == 1:                                                  # Eq. (18)
                losses |= {"codebook": cfg.weight_codebook * codebook_loss(features, priors),
                           "commitment": cfg.weight_commitment * commitment_loss(features, priors)}
            else:                                                           # Eq. (13)
                with torch.no_grad():
                    real, target_identity = discriminators(target, boxes), recogniser(target)
                losses |= {
                    "component": cfg.weight_component * sum(
                        adversarial_loss(judged[name][0]) for name in REGIONS),
                    "style": cfg.weight_style * sum(
                        style_loss(judged[name][1], real[name][1]) for name in REGIONS),
                    "identity": cfg.weight_identity * identity_loss(recogniser(restored), target_identity)}
                if priors is not None:
                    losses["code"] = cfg.weight_code * code_loss(features, priors)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(learned, cfg.clip)
        optimizer.step()
        discriminators.requires_grad_(True)
        with common.autocast(device):                                       # discriminators
            judged = forward_d(torch.cat([target, restored.detach()]), torch.cat([boxes, boxes]))
            losses["discriminator"] = sum(discriminator_loss(*scores.chunk(2))
                                          for scores, _ in judged.values())
        optimizer_d.zero_grad(set_to_none=True)
        losses["discriminator"].backward()
        optimizer_d.step()
        if stage == 1 and cfg.restart_every:
            restart_codes(net.dictionary, features.detach(), usage, step, cfg, world)
        last = step == steps or step % cfg.validate_every == 0
        if last or step % 10 == 0:                                    # the only place that waits for the GPU
            values = {name: loss.item() for name, loss in losses.items()}
            if bad := [name for name, value in values.items() if not math.isfinite(value)]:
                raise InputError(f"{title}step {step}: the {', '.join(bad)} loss is not finite; the last "
                                 f"good state is in {path}; try a lower learning rate")
            rows.append({"step": step, **values})
            progress.update(step, "  ".join(f"{name} {value:.3f}" for name, value in values.items()))
        if last:
            reconstruction, quality, perplexity, used = validate(
                net, encoder, faces, common.spread(validation, 32), cfg, device, stage)
            if not math.isfinite(reconstruction):
                raise InputError(f"{title}step {step}: the validation loss is not finite; the last good "
                                 f"state is in {path}")
            rows[-1] |= {"validation": reconstruction, "validation_psnr": quality, "perplexity": perplexity,
                         "codes_used": used, "rate": cfg.rate(stage, step)}
            if rank == 0:
                progress.line(f"{title}step {step}: validation reconstruction {reconstruction:.3f}, "
                              f"PSNR {quality:.2f} dB, codes' perplexity {perplexity:.0f}, {used:.0%} used")
                kept = {} if not cfg.recognition else {"arguments": (
                    encoder.arguments if cfg.encoder == "vgg" else {"widths": encoder.widths})}
                common.save_checkpoint(path, {
                    "script": SCRIPT, "stage": stage, "config": asdict(cfg), "step": step, "rows": rows,
                    "history": history, "usage": usage, **kept,
                    **{name: part.state_dict() for name, part in parts.items()}})
                common.write_log(out, [
                    {name if name == "step" else f"dictionary_{name}": value for name, value in row.items()}
                    for row in (rows if stage == 1 else history)] + (rows if stage == 2 else []))
    if rank == 0:
        progress.close()
        if stage == 1:
            batch = next(restored_batches(net, faces, common.spread(validation, 6), cfg, device, None, 1))
            common.write_image(out / "reconstructions.png", common.comparison_grid(
                {"target": batch["target"], "reconstruction": batch["restored"]}))
    return net


@torch.no_grad()
def restart_codes(dictionary, features, usage, step, cfg, world):
    """Keep account of each code's share in `usage` (M,), a running mean of about ten steps. Every few steps
    until the rate cools down, codes of less than a fiftieth of an even share become features of this batch:
    a code far from all features is never the nearest, and no gradient would ever move it."""
    share = torch.bincount(dictionary(features)[1].flatten(), minlength=cfg.codes).float()
    share /= share.sum()
    if world > 1:
        torch.distributed.all_reduce(share)
        share /= world
    usage.mul_(0.9).add_(share, alpha=0.1)
    if (step - 1) % cfg.restart_every or step > (1 - cfg.cooldown) * cfg.dictionary_steps:
        return
    unused = torch.nonzero(usage < 0.02 / cfg.codes)[:, 0]
    points = features.permute(0, 2, 3, 1).flatten(0, 2)
    order = torch.randperm(len(points), generator=common.seeded(cfg.seed, 6, step))
    dictionary.codes[unused] = points[order.to(points.device)[torch.arange(len(unused)) % len(points)]]
    usage[unused] = 1 / cfg.codes
    if world > 1:
        torch.distributed.broadcast(dictionary.codes, 0)


@torch.inference_mode()
def validate(net, encoder, faces, indices, cfg, device, stage):
    """On held-out faces, always degraded alike (in stage 1 sharp): L1 and perceptual loss, PSNR in dB, the
    perplexity of the codes met, exp(−Σ p log p), and the share of the codes that is met at all."""
    totals, count, met = torch.zeros(2), 0, torch.zeros(cfg.codes, device=device)
    for batch in restored_batches(net, faces, indices, cfg, device, None, stage):
        restored, target = batch["restored"], batch["target"]
        with common.autocast(device):
            a, b = (encoder.features(x.to(device)) for x in (restored, target))
            matched = net.matched(batch["degraded"].to(device, memory_format=torch.channels_last))
        loss = pixel_loss(restored, target) + cfg.weight_perceptual * perceptual_loss(a, b).cpu()
        totals += torch.stack([loss * len(target), common.psnr(restored, target).sum()])
        count, met = count + len(target), met + torch.bincount(matched.flatten(), minlength=cfg.codes)
    share = met / met.sum()
    perplexity = torch.special.entr(share).sum().exp().item()
    return (*(totals / count).tolist(), perplexity, (met > 0).float().mean().item())


def finish(net, faces, test, cfg, args, device, seconds):
    """Measure on held-out people; write result.json, samples.png (at ×4) and attention.png; print the table
    and what was written. Without a network (stage 1 alone) only the last."""
    out = Path(args.out)
    if net is not None:
        net.eval()
        result = {"script": SCRIPT, "variant": cfg.variant, "preset": cfg.preset,
                  "data": str(args.data or "rendered"), "size": cfg.size,
                  "steps": cfg.steps, "seconds": round(seconds, 1),
                  "test": evaluate(net, faces, common.spread(test, 128), cfg, device, args.lpips, args.fid,
                                   args.precision)}
        common.write_json(out / "result.json", result)
        batch = next(restored_batches(net, faces, common.spread(test, 6), cfg, device, 4,
                                      precision=args.precision))
        common.write_image(out / "samples.png", common.comparison_grid({name: batch[name] for name in (
            "degraded", "restored", "target")}))
        draw_attention(out / "attention.png", net, batch, cfg, device, args.precision)
        print_results(result["test"])
    written = [name for name in ("checkpoint.pt", "dictionary.pt", "config.json", "log.csv", "curves.png",
                                 "reconstructions.png", "samples.png", "attention.png", "result.json")
               if (out / name).is_file()]
    print(f"\n{out}: {', '.join(written)}")


@torch.inference_mode()
def draw_attention(path, net, batch, cfg, device, precision="auto"):
    """attention.png: what the feature at the left eye (+) reads, per head, over the degraded face; a row for
    each attention of each of three faces. Bright is much."""
    shown = batch["degraded"][:3]
    with common.autocast(device, precision):
        maps = net.attention_maps(shown.to(device, memory_format=torch.channels_last))
    if not maps:
        return
    side = round(maps[0].shape[-1] ** 0.5)
    eyes = batch["landmarks"][:3, common.LEFT_EYE].mean(1)
    column, line = ((eyes + 0.5) * side / cfg.size).long().clamp(0, side - 1).unbind(1)
    rows = [(face, depth) for face in range(len(shown)) for depth in range(len(maps))]
    heads = maps[0].shape[1]
    figure = matplotlib.figure.Figure(figsize=(1.3 * (1 + heads), 1.35 * len(rows) + 0.2),
                                      layout="constrained")
    axes = figure.subplots(len(rows), 1 + heads, squeeze=False)
    for row, (face, depth) in zip(axes, rows):
        picture = common.to_uint8(shown[face]).permute(1, 2, 0).numpy()
        read = maps[depth][face, :, line[face] * side + column[face]].float().view(heads, side, side).cpu()
        row[0].imshow(picture)
        row[0].set_ylabel(f"attention {depth + 1}", fontsize=8)
        for head, axis in enumerate(row[1:]):
            axis.imshow(picture.mean(2), cmap="gray")
            axis.imshow(read[head].numpy(), cmap="magma", alpha=0.65, interpolation="bilinear",
                        extent=(-0.5, cfg.size - 0.5, cfg.size - 0.5, -0.5))
            axis.set_title(f"head {head + 1}: to {read[head].max():.1%}", fontsize=7)
        for axis in row:
            axis.plot(*eyes[face].tolist(), "+", color="cyan")
            axis.set(xticks=[], yticks=[])
    with common.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


# -----------------------------------------------------------------------------------------------------------
# 7. Restoration
# -----------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def restore(net, degraded, landmarks=None, batch=8, precision="auto"):
    """Restore faces: degraded (N,3,size,size) in [-1,1] → (N,3,size,size) in [-1,1], on the CPU. Landmarks
    are not needed. Out of GPU memory, the batch is halved, with a line that says so."""
    device, results, start = next(net.parameters()).device, [], 0
    training = net.training
    net.eval()
    while start < len(degraded):
        part = slice(start, start + batch)
        try:
            with common.autocast(device, precision):
                images = degraded[part].to(device, memory_format=torch.channels_last)
                results.append(net(images).float().clamp(-1, 1).cpu())
            start += batch
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise InputError("not enough GPU memory for one face; use --device cpu or a smaller "
                                 "--size") from None
            batch //= 2
            print(f"out of GPU memory: going on with {batch} faces at a time", file=sys.stderr)
    net.train(training)
    return torch.cat(results)


def restored_batches(net, faces, indices, cfg, device, scale, stage=2, batch=16, precision="auto"):
    """Held-out faces in batches, by name: degraded, restored, target, landmarks. Degraded by (seed, scale,
    place) alone; in stage 1 not at all."""
    for start in range(0, len(indices), batch):
        target, landmarks = common.stack_faces(faces, indices[start:start + batch])
        generator = common.seeded(cfg.seed, 4, scale or 0, start)
        degraded = target if stage == 1 else common.degrade(target, degradation_of(cfg), generator, scale)
        yield {"degraded": degraded, "restored": restore(net, degraded, landmarks, batch, precision),
               "target": target, "landmarks": landmarks}


def feature_distance(judge, image, target):
    """Perceptual distance without a published network: the squared distance of a recogniser's features, each
    position's scaled to length 1, a mean over positions and over its four maps. (B,3,H,W) twice → (B,)."""
    with torch.inference_mode():
        pairs = zip(judge.features(image.float()), judge.features(target.float()))
        return sum((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2))
                   for a, b in pairs) / 4


def evaluate(net, faces, indices, cfg, device, lpips_files=None, fid_file=None, precision="auto"):
    """×4 and ×8 on held-out faces → "test" of result.json: PSNR dB, SSIM, identity in degrees, feature
    distance; LPIPS and FID (from these people's sharp faces) where files of their weights are given."""
    judge = common.recogniser(faces, "metric")
    lpips = common.LPIPS(*lpips_files) if lpips_files else None
    fid = common.FID(fid_file, device) if fid_file else None
    table = {}
    for scale in (4, 8):
        columns, seen = {"input": [], "restored": []}, {"input": [], "restored": [], "target": []}
        for batch in restored_batches(net, faces, indices, cfg, device, scale, precision=precision):
            target = batch["target"]
            for name, image in (("input", batch["degraded"]), ("restored", batch["restored"])):
                measures = [common.psnr(image, target), common.ssim(image, target),
                            common.identity_distance(judge, image, target),
                            feature_distance(judge, image, target)]
                if lpips:
                    with torch.inference_mode():
                        measures.append(lpips(image, target))
                columns[name].append(torch.stack(measures))
            if fid:
                for name, image in (("input", batch["degraded"]), ("restored", batch["restored"]),
                                    ("target", target)):
                    seen[name].append(image)
        values = {name: torch.cat(column, 1) for name, column in columns.items()}
        rows = {name: dict(zip(("psnr", "ssim", "identity", "features", "lpips"), value.mean(1).tolist()))
                for name, value in values.items()}
        if fid:
            for name, row in rows.items():
                row["fid"] = fid(seen[name], seen["target"])
        table[f"x{scale}"] = {
            "faces": len(indices), **rows,
            "paired_psnr_gain": common.paired_gain(values["restored"][0], values["input"][0], cfg.seed)}
    return table


def print_results(table):
    """The table, and below it a line a task for LPIPS and FID, if measured."""
    names = ("psnr", "ssim", "identity", "features")
    common.print_table({task: row | {column: {name: row[column][name] for name in names}
                                     for column in ("input", "restored")} for task, row in table.items()})
    for task, row in table.items():
        if more := [f"{name} {row['input'][name]:.3f} → {row['restored'][name]:.3f}"
                    for name in row["input"] if name not in names]:
            print(f"{task}: {', '.join(more)}")


def for_restoration(net, device, precision="auto"):
    """The network made ready to restore with, once; it cannot be trained any more. What it paints stays the
    same up to rounding: doublings and the convolutions behind them are merged; for the rest see
    common.for_inference. The released encoder keeps float32 unless all is to be bfloat16."""
    released = isinstance(net, ReleasedRestoreFormer)
    for module in list(net.modules()):
        if isinstance(module, ReleasedLevel) and module.up is not None:
            module.up = merge_doubling(module.up)
    return common.for_inference(net, device, precision,
                                ("encoder", "before") if released and precision != "bfloat16" else ())


def benchmark(net, cfg, args, device):
    """Time restore() on --batch pictures of noise: what a picture shows does not change the speed."""
    count = args.batch or 1
    degraded = torch.rand(count, 3, cfg.size, cfg.size, generator=common.seeded(args.seed or 0, 7)) * 2 - 1
    return common.benchmark(lambda: restore(net, degraded, None, count, args.precision), count, device,
                            args.precision)


def load_network(args, device, path=None):
    """The network of --checkpoint (or of `path`, which may be of stage 1), and its Config."""
    state = common.load_checkpoint(path or args.checkpoint, SCRIPT, device)
    cfg = Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in state["config"].items()})
    if args.preset and args.preset != cfg.preset:
        raise InputError(f"{args.checkpoint}: a checkpoint of --preset {cfg.preset}, not {args.preset}")
    if state["stage"] == 1 and path is None:
        raise InputError(f"{args.checkpoint}: holds stage 1, which restores nothing; --train --stage 2 "
                         "makes a checkpoint.pt of it")
    encoder = None
    if cfg.recognition:
        encoder = (common.VGG(**state["arguments"]) if cfg.encoder == "vgg"
                   else common.Recogniser(**state["arguments"]).folded())
    net = build(cfg, state["stage"], encoder).to(device, memory_format=torch.channels_last)
    net.load_state_dict(state["net"])
    return net.eval(), cfg


# -----------------------------------------------------------------------------------------------------------
# 8. Command line
# -----------------------------------------------------------------------------------------------------------

def chosen_config(args):
    """The Config that a command line asks for, but for --steps, which change two of its numbers."""
    preset, variant = args.preset or "tiny", args.variant or "full"
    if preset == "released" and variant != "full":
        raise InputError("--variant: the paper's ablations are of its own network, not of --preset released")
    chosen = {name: getattr(args, name) for name in ("size", "batch", "seed")
              if getattr(args, name) is not None}
    cfg = replace(PRESETS[preset], variant=variant, **VARIANTS[variant], **chosen)
    if cfg.size % max(cfg.stride, 16) or cfg.size < 64:
        raise InputError(f"--size {cfg.size}: must be a multiple of {max(cfg.stride, 16)}, at least 64")
    return cfg


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
    parser.add_argument("--stage", type=int, choices=(1, 2),
                        help="train only the dictionary (1), or only what comes after it (2); default: both")
    parser.add_argument("--data", metavar="DIR",
                        help="a folder of pictures or of one folder per identity (default: rendered faces)")
    parser.add_argument("--preset", choices=PRESETS,
                        help="tiny (default): minutes on a CPU; paper: the paper's sizes and schedule")
    parser.add_argument("--variant", choices=VARIANTS, help="an ablation row of the paper's Table 4")
    parser.add_argument("--resume", action="store_true",
                        help="go on exactly where the last checkpoint stopped")
    parser.add_argument("--size", type=positive, help="pixels, a multiple of 16, or of 32 at full scale")
    parser.add_argument("--steps", type=positive,
                        help="steps of the second stage; those of the first change in proportion")
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
                        help="for --restore: the authors' RestoreFormer.ckpt, a file or its address (https://…)")
    parser.add_argument("--vggface", metavar="FILE",
                        help="VGG-Face weights, in VGG-19's place in --preset paper's perceptual loss")
    parser.add_argument("--lpips", metavar=("ALEXNET", "LINEAR"), nargs=2,
                        help="published weights of LPIPS, which is then measured too")
    parser.add_argument("--fid", metavar="FILE", help="published weights of FID, which is then measured too")
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
        for name in ("train", "evaluate", "checkpoint", "preset", "variant", "resume", "size", "stage"):
            if getattr(args, name):
                raise InputError(f"--weights and --{name} do not go together: --weights is the authors' "
                                 "network, to restore with")
    fresh = args.benchmark and args.checkpoint is None and args.weights is None
    if args.train and args.precision != "auto":
        raise InputError("--precision and --train do not go together: it is of restoration; training takes "
                         "bfloat16 where the processor gains")
    if args.benchmark and args.size and not fresh:
        raise InputError("--size and --checkpoint do not go together in --benchmark: a trained network has "
                         "its size")
    args.checkpoint = args.checkpoint or run / "checkpoint.pt"
    device = common.choose_device(args.device)

    if args.train:
        chosen = {name: getattr(args, name) for name in ("size", "steps", "batch", "seed")
                  if getattr(args, name) is not None}
        if args.resume:
            first = args.stage == 1 or (args.stage is None and dictionary_file(args).is_file()
                                        and not second_stage_begun(args))
            _, cfg = load_network(args, torch.device("cpu"), dictionary_file(args) if first else None)
            if (args.variant or cfg.variant) != cfg.variant:
                raise InputError(f"{args.checkpoint}: a checkpoint of --variant {cfg.variant}, "
                                 f"not {args.variant}")
            if fixed := [name for name, value in chosen.items()
                         if name != "steps" and value != getattr(cfg, name)]:
                raise InputError(f"--resume goes on with the run as it began; --{fixed[0]} cannot change")
        else:
            cfg, first = chosen_config(args), True
        if args.steps and args.steps != cfg.steps:
            dictionary_steps = max(round(cfg.dictionary_steps * args.steps / cfg.steps), 1)
            cfg = replace(cfg, steps=args.steps,
                          dictionary_steps=dictionary_steps if first else cfg.dictionary_steps)
        train(cfg, args)
        return 0
    if fresh:
        cfg = chosen_config(args)
        torch.manual_seed(cfg.seed)
        net = build(cfg, encoder=common.Recogniser().folded() if cfg.recognition else None)
    elif args.weights is not None:
        net, cfg = load_official(args.weights), RELEASED
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

# What the authors' published weights were trained as differs from the paper: the attention has no layer
# normalisation and no feed-forward behind it, but group normalisation before and a projection after it;
# queries are two wide maps from the end of the encoder, not Z_d; there are four cross-attentions, not two,
# with residual blocks between; three self-attentions in the encoder, and in stage 1 four in the decoder;
# strided convolutions padded on one side pool; a convolution on each side of the dictionary.

class ReleasedAttention(nn.Module):
    """x (B,C,h,w) + what its positions answer to queries of y; of x itself where there is no y."""

    def __init__(self, channels, heads, groups, cross):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_query = (normalisation(channels, groups) for _ in range(2))
        self.norm_query.requires_grad_(cross)                    # a self-attention carries it unused
        self.query, self.key, self.value, self.project = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def split(self, x):
        return tokens(x).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def query_and_key(self, x, y):
        normal = self.norm(x)
        asking = normal if y is None else self.norm_query(y)
        return self.split(self.query(asking)), self.split(self.key(normal)), normal

    def attention(self, x, y=None):
        return attention_map(*self.query_and_key(x, y)[:2])

    def forward(self, x, y=None):
        query, key, normal = self.query_and_key(x, y)
        read = F.scaled_dot_product_attention(query, key, self.split(self.value(normal)))
        return x + self.project(read.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:]))


class ReleasedLevel(nn.Module):
    """Residual blocks at one size, an attention after each at the smallest, then a change of size."""

    def __init__(self, before, after, blocks, cfg, attend=False, cross=False, resize=None):
        super().__init__()
        self.blocks = nn.ModuleList(Residual(after if i else before, after, cfg.groups)
                                    for i in range(blocks))
        self.attentions = nn.ModuleList(ReleasedAttention(after, cfg.heads, cfg.groups, cross)
                                        for _ in range(blocks if attend else 0))
        self.down = nn.Conv2d(after, after, 3, 2) if resize == "down" else None
        self.up = convolution(after, after) if resize == "up" else None

    def forward(self, x, query=None, maps=None):
        for index, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                if maps is not None:
                    maps.append(self.attentions[index].attention(x, query))
                x = self.attentions[index](x, query)
        if self.down:
            x = self.down(F.pad(x, (0, 1, 0, 1)))
        if isinstance(self.up, nn.ConvTranspose2d):              # both steps in one, see merge_doubling
            return self.up(x)
        return self.up(F.interpolate(x, scale_factor=2)) if self.up else x


def merge_doubling(layer):
    """A nearest doubling and the 3×3 convolution behind it as one transposed 4×4 convolution of stride 2.

    The doubling repeats each value 2×2 times, which is a transposed convolution of stride 2 with ones; a
    convolution behind it convolves its kernel with those ones. Zeros around the doubled map are zeros around
    the small one. Four of the sixteen weights reach an output, in place of nine: 2.25 times less work.
    """
    merged = nn.ConvTranspose2d(layer.in_channels, layer.out_channels, 4, 2, 1)
    with torch.no_grad():
        kernel = layer.weight.flip(2, 3).transpose(0, 1)         # as a transposed convolution has it
        merged.weight.copy_(sum(F.pad(kernel, (x, 1 - x, y, 1 - y)) for x in (0, 1) for y in (0, 1)))
        merged.bias.copy_(layer.bias)
    return merged


class ReleasedMiddle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels, cfg, cross=False):
        super().__init__()
        self.first, self.second = (Residual(channels, channels, cfg.groups) for _ in range(2))
        self.attend = ReleasedAttention(channels, cfg.heads, cfg.groups, cross)

    def forward(self, x, query=None, maps=None):
        first = self.first(x)
        if maps is not None:
            maps.append(self.attend.attention(first, query))
        return first, self.second(self.attend(first, query))


class ReleasedEncoder(nn.Module):
    """(B,3,H,W) → two maps that ask, of the last width, and one of C channels; all (B,…,H/32,W/32)."""

    def __init__(self, cfg):
        super().__init__()
        widths, last = cfg.widths, len(cfg.widths) - 1
        self.enter = convolution(3, widths[0])
        self.levels = nn.ModuleList(ReleasedLevel(
            widths[max(level - 1, 0)], width, 2, cfg, attend=level == last,
            resize="down" if level < last else None) for level, width in enumerate(widths))
        self.middle = ReleasedMiddle(widths[-1], cfg)
        self.leave = nn.Sequential(normalisation(widths[-1], cfg.groups), nn.SiLU(),
                                   convolution(widths[-1], cfg.code_channels))

    def forward(self, image):
        x = self.enter(image)
        for level in self.levels:
            x = level(x)
        first, second = self.middle(x)
        return first, second, self.leave(second)


class ReleasedDecoder(nn.Module):
    """(B,C,h,w), and the two maps that ask in stage 2 (None in stage 1) → (B,3,32h,32w)."""

    def __init__(self, cfg, cross):
        super().__init__()
        widths, last = cfg.widths, len(cfg.widths) - 1
        self.enter = convolution(cfg.code_channels, widths[-1])
        self.middle = ReleasedMiddle(widths[-1], cfg, cross)
        self.levels = nn.ModuleList(ReleasedLevel(
            widths[min(level + 1, last)], width, 3, cfg, attend=level == last, cross=cross,
            resize="up" if level else None) for level, width in enumerate(widths))
        self.leave = nn.Sequential(normalisation(widths[0], cfg.groups), nn.SiLU(),
                                   convolution(widths[0], 3))

    def forward(self, x, first, second, maps=None):
        _, x = self.middle(self.enter(x), second, maps)
        for level in reversed(self.levels):
            x = level(x, first, maps)
        return self.leave(x).float()


class ReleasedRestoreFormer(nn.Module):
    """The network of RestoreFormer.ckpt (stage 2) and of its dictionary (stage 1); interface and shapes of
    RestoreFormer."""

    def __init__(self, cfg, stage=2):
        super().__init__()
        self.cross, channels = stage == 2, cfg.code_channels
        self.encoder, self.decoder = ReleasedEncoder(cfg), ReleasedDecoder(cfg, self.cross)
        self.dictionary = Dictionary(cfg.codes, channels)
        self.before, self.after = (nn.Conv2d(channels, channels, 1) for _ in range(2))

    def latents(self, image):
        # Half precision would give some features another code, and the picture other details: float32,
        # unless the weights have been cast on demand.
        exact = not self.training and self.before.weight.dtype == torch.float32
        with torch.autocast(image.device.type, enabled=False) if exact else nullcontext():
            first, second, x = self.encoder(image)
            features = self.before(x).float()
        priors, _ = self.dictionary(features)
        asking = (first, second) if self.cross else (None, None)
        return features, priors, self.after(features + (priors - features).detach()), asking

    def forward(self, image, latents=False):
        features, priors, x, asking = self.latents(image)
        restored = self.decoder(x, *asking)
        return (restored, features, priors) if latents else restored

    def attention_maps(self, image):
        *_, x, asking = self.latents(image)
        maps = []
        self.decoder(x, *asking, maps)
        return maps

    def matched(self, image):
        return self.dictionary(self.before(self.encoder(image)[2]).float())[1]


def released_name(name):
    """A name in the official checkpoint (with or without its prefix) → the name here; one to one. None for
    what is not the network's: the losses' networks."""
    name = name.removeprefix("vqvae.")
    if name.startswith("loss."):
        return None
    layers = {"norm1": "body.0", "conv1": "body.2", "norm2": "body.3", "conv2": "body.5",
              "nin_shortcut": "shortcut"}
    attention = {"norm1": "norm", "norm2": "norm_query", "q": "query", "k": "key", "v": "value",
                 "proj_out": "project"}
    whole = {"quantize.embedding.weight": "dictionary.codes"}
    model, *path = name.split(".")
    if name in whole:
        return whole[name]
    if model in ("quant_conv", "post_quant_conv"):
        return ".".join(["before" if model == "quant_conv" else "after", *path])
    ends = {"conv_in": "enter", "norm_out": "leave.0", "conv_out": "leave.2"}
    if path[0] in ends:
        return ".".join([model, ends[path[0]], *path[1:]])
    if path[0] == "mid":
        place = {"block_1": "first", "block_2": "second", "attn_1": "attend"}[path[1]]
        return ".".join([model, "middle", place, (attention if place == "attend" else layers)[path[2]],
                         *path[3:]])
    _, level, kind, *rest = path                                # down.0.block.1.conv1.weight
    if kind in ("downsample", "upsample"):
        return ".".join([model, "levels", level, kind.removesuffix("sample"), *rest[1:]])
    kind, table = ("attentions", attention) if kind == "attn" else ("blocks", layers)
    return ".".join([model, "levels", level, kind, rest[0], table[rest[1]], *rest[2:]])


def load_official(source):
    """RestoreFormer.ckpt as its authors released it, a file, its address or its state dict → the network,
    frozen: degraded (B,3,512,512) in [-1,1] → restored, the same. InputError for what does not fit."""
    # Lightning names a class of its own among the settings that it saves; an empty one may stand for it.
    torch.serialization.add_safe_globals([type("ModelCheckpoint", (), {
        "__module__": "pytorch_lightning.callbacks.model_checkpoint"})])
    return common.load_named(ReleasedRestoreFormer(RELEASED), source, released_name,
                             "RestoreFormer's weights")


if __name__ == "__main__":
    common.run_script(main)
