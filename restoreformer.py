"""RestoreFormer: blind face restoration by attention over a dictionary of sharp faces.

Wang, Zhang, Chen, Wang, Luo: "RestoreFormer: High-Quality Blind Face Restoration from
Undegraded Key-Value Pairs", CVPR 2022.

Stage 1: an encoder, a decoder and a dictionary of codes learn to repaint sharp faces from
the codes nearest to their features. Stage 2: the codes nearest to a degraded face's
features are its priors, sharp but only roughly right. Cross-attention fuses both: every
degraded feature asks, all priors answer, and the answer is added to the prior there. The
decoder paints the face. Neither landmarks nor other pictures of the person are needed.

Equation → name
    (1) MultiHead            (7) Dictionary            (13) restoration_losses
    (2) attention_map        (8) RestoreFormer.fuse    (14) Dictionary
    (3) merge_heads          (9) pixel_loss,           (15) codebook_loss
    (4) Attention                perceptual_loss       (16) commitment_loss
    (5) MultiHead           (10) code_loss             (17) as (9) and (12)
    (6) Attention           (11) component_loss,       (18) dictionary_losses
                                 style_loss            (19) common.degrade
                            (12) adversarial_loss, identity_loss; D's: discriminator_loss

    python restoreformer.py --train                       # rendered faces, two CPU cores
    python restoreformer.py --evaluate                    # on people it has never seen
    python restoreformer.py --restore photo.jpg --aligned # your picture

Open in the paper, chosen here: a discriminator maximises log D + log(1 − D), by
cross-entropy on logits; the generator gets the non-saturating −log D. Layers are the
released network's where they fit: residual blocks of GroupNorm and SiLU, eight heads. The
decoder begins with a layer normalisation, and feed-forward networks near the identity, so
that stage 2 starts as stage 1 ended. The squared norms of Eq. (9), (10), (15), (16) are
means over the elements, those of Eq. (11), (12) sums; η has length 1, as ArcFace compares
directions.
While restoring, encoder and codes are float32 at every precision but bfloat16: in half
precision 3 % of the features would meet another code.
TINY differs from the paper in size, and in what Config says beside it.
"""
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.ops import roi_align

import common
from common import Claim, InputError

SCRIPT = "restoreformer"
REGIONS = {"left_eye": 80, "right_eye": 80, "mouth": 120}   # r of Eq. (11): pixels of 512


# 2. Config ----------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """Every number of the method. The defaults are TINY."""
    preset: str = "tiny"
    variant: str = "full"
    size: int = 128                    # pixels, height = width
    people: int = 288                  # rendered ones, without --data
    seed: int = 0

    encoder: str = "recogniser"        # φ of Eq. (9); "vgg": VGG-19 or VGG-Face
    arcface: bool = False              # η of Eq. (12) is ArcFace, not the recogniser
    sources: str = "both"              # "degraded" features, "prior" or both
    fusion: str = "mhca"               # "mhca-d" (adds Z_d), "mhsa", "sft", "none"
    recognition: bool = False          # E_h and E_d are the frozen recognition network
    codes: int = 512                   # M; 1024 in the paper
    code_channels: int = 64            # C, the length of a code; 256 in the paper
    heads: int = 2                     # N_h; 8 in the released network
    widths: tuple = (16, 32, 64)       # channels of levels: full size, half …
    blocks: tuple = (0, 1, 2)          # residual blocks of each level
    doubling: str = "bilinear"         # the paper's "nearest" leaves a lattice
    groups: int = 1                    # of GroupNorm; 32 in the released network
    restart_every: int = 20            # steps; unused codes restart; the paper has none

    weight_perceptual: float = 0.25    # λ_per; 1 in the paper, with another encoder
    weight_code: float = 0.25          # λ_p
    weight_component: float = 0.005    # λ_disc; 1 in the paper, for many more steps
    weight_style: float = 1.0          # λ_style; 2000 in the paper
    weight_adversarial: float = 0.005  # λ_adv; 0.8 in the paper
    weight_identity: float = 0.3       # λ_id; 1.5 in the paper
    weight_codebook: float = 1.0       # λ_d
    weight_commitment: float = 0.25    # λ_c
    discriminator_width: int = 16

    dictionary_rate: float = 8e-4      # learning rate of stage 1; 7e-5 in the paper
    dictionary_decay: float = 1.0      # share of stage 1 after which its rate is a tenth
    codes_times: float = 10.0          # factor on it for the codes; 1 in the paper
    learning_rate: float = 3e-4        # of stage 2; 7e-6 in the paper
    betas: tuple = (0.9, 0.99)         # β1, β2 of Adam; the paper gives none
    clip: float | None = 1.0           # longest gradient; the paper clips none
    cooldown: float = 0.6              # last share of a stage: the rate falls to 0
    patience: int | None = None        # no plateaus: rate(step) says all
    steps: int = 1680                  # of both stages
    dictionary_share: float = 0.512    # first share of the steps: stage 1
    batch: int = 4                     # faces a process and step
    shift: float = 0.02                # largest change of place, a share of the size
    jitter: float = 0.1                # of brightness and contrast
    validate_every: int = 200          # steps; also when a checkpoint is written
    validated: int = 32                # validation faces
    tested: int | None = 128           # held-out faces measured at most, None: all
    degradation: str = "restoreformer" # Eq. (19)

    @property
    def stride(self):
        """Pixels a feature of Z_d, on a side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def dictionary_steps(self):
        """The first steps, of stage 1."""
        return min(max(round(self.dictionary_share * self.steps), 1), self.steps - 1)

    def stage(self, step):
        """1 or 2, for a step from 1 on."""
        return 1 if step <= self.dictionary_steps else 2

    def restarts(self, step):
        """Whether unused codes restart after a step: every few, in the first 80 %."""
        if not self.restart_every or step - 1 >= 0.8 * self.dictionary_steps:
            return False
        return (step - 1) % self.restart_every == 0

    def rate(self, step):
        """Learning rate of a step from 1 on: in a stage constant, then falling to 0."""
        rate, begin, end = self.learning_rate, self.dictionary_steps, self.steps
        if self.stage(step) == 1:
            rate, begin, end = self.dictionary_rate, 0, self.dictionary_steps
            if step > self.dictionary_decay * self.dictionary_steps:
                rate /= 10
        left = (end - step + 1) / max(self.cooldown * (end - begin), 1)
        return rate * min(left, 1)


TINY = Config()
HOUR = replace(TINY, preset="hour", people=1500, steps=14_000, validate_every=1_000)
PAPER = replace(
    TINY, preset="paper", size=512, encoder="vgg", arcface=True, codes=1024,
    code_channels=256, heads=8, widths=(64, 128, 128, 256, 256, 512), blocks=(2,) * 6,
    doubling="nearest", groups=32, restart_every=0, codes_times=1.0, weight_perceptual=1.0,
    weight_component=1.0, weight_style=2000.0, weight_adversarial=0.8,
    weight_identity=1.5, discriminator_width=64, dictionary_rate=7e-5,
    dictionary_decay=0.75, learning_rate=7e-6, clip=None, cooldown=0, steps=860_000,
    dictionary_share=800 / 860, batch=16, shift=0, jitter=0, validate_every=5_000,
    validated=200, tested=None)
RELEASED = replace(PAPER, preset="released")
PRESETS = {"tiny": TINY, "hour": HOUR, "paper": PAPER}

VARIANTS = {                             # Table 4, and the last paragraph of Section 4.4
    "full": {},
    "exp1": {"sources": "degraded", "fusion": "none"},
    "exp2": {"sources": "degraded", "fusion": "mhsa"},
    "exp3": {"sources": "prior", "fusion": "mhsa"},
    "exp4": {"fusion": "sft"},
    "exp5": {"fusion": "mhca-d"},
    "recognition-dictionary": {"recognition": True},
}
PAPER_FIGURES = {                        # CelebA-Test, scales 1 to 8
    "full": {"random_fid": 41.45, "random_idd": 0.5650},
    "exp1": {"random_idd": 0.6401},
    "exp2": {"random_idd": 0.6284},
    "exp3": {"random_idd": 0.7662},
    "recognition-dictionary": {"random_fid": 61.43, "random_idd": 1.1401},
}
CLAIMS = [
    Claim("exp2", "exp1", "identity"), Claim("full", "exp2", "identity"),
    Claim("full", "exp3", "identity"), Claim("full", "exp4", "identity"),
    Claim("full", "exp5", "identity"), Claim("full", "recognition-dictionary", "identity")]


# 3. Network ---------------------------------------------------------------------------

def convolution(before, after, kernel=3):
    """A convolution, zero-padded to the same size, with He's initialisation."""
    layer = nn.Conv2d(before, after, kernel, padding=kernel // 2)
    nn.init.kaiming_normal_(layer.weight, 0.2)
    nn.init.zeros_(layer.bias)
    return layer


def normalisation(channels, groups):
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Residual(nn.Module):
    """x + two 3×3 convolutions, each behind normalisation and SiLU.

    (B,before,h,w) → (B,after,h,w). It begins close to x.
    """
    def __init__(self, before, after, groups):
        super().__init__()
        self.body = nn.Sequential(
            normalisation(before, groups), nn.SiLU(), convolution(before, after),
            normalisation(after, groups), nn.SiLU(), convolution(after, after))
        same = before == after
        self.shortcut = nn.Identity() if same else convolution(before, after, 1)
        with torch.no_grad():
            self.body[-1].weight *= 0.1            # close to x, however deep the network

    def forward(self, x):
        return self.shortcut(x) + self.body(x)


class Encoder(nn.Sequential):
    """E_h, E_d: (B,3,H,W) → Z (B,C,H/s,W/s), stride s; average pooling between levels."""

    def __init__(self, cfg):
        before = cfg.widths[0]
        layers = [convolution(3, before)]
        for level, width in enumerate(cfg.widths):
            if level > 0:
                layers += [nn.AvgPool2d(2), convolution(before, width)]
            for _ in range(cfg.blocks[level]):
                layers.append(Residual(width, width, cfg.groups))
            before = width
        layers += [normalisation(before, cfg.groups), nn.SiLU()]
        layers.append(convolution(before, cfg.code_channels))
        super().__init__(*layers)


class RecognitionEncoder(nn.Module):
    """The encoder of --variant recognition-dictionary, frozen.

    Features of a recognition network, scaled to mean 0 and variance 1 at each position,
    and brought to C channels by a fixed orthogonal matrix.
    """
    def __init__(self, encoder, cfg):
        super().__init__()
        self.encoder = encoder
        last = len(encoder.widths) - 1
        self.level = min(len(cfg.widths) - 2, last)             # map i has stride 2^(i+1)
        self.pool = cfg.stride // 2 ** (self.level + 1)
        width = encoder.widths[self.level]
        self.project = nn.Conv2d(width, cfg.code_channels, 1, bias=False)
        nn.init.orthogonal_(self.project.weight)
        self.requires_grad_(False)

    def forward(self, image):
        x = self.encoder.features(image)[self.level].float()
        x = F.avg_pool2d(x, self.pool)
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt()
        return self.project(x)


class Dictionary(nn.Module):
    """The HQ dictionary D of codes d_m (M,C).

    Eq. (7), (14): at each position (i,j) Z_p is the d_m of the smallest ‖Z(i,j) − d_m‖².
    features Z (B,C,h,w) → Z_p (B,C,h,w), m (B,h,w).
    """
    def __init__(self, codes, channels):
        super().__init__()
        start = torch.empty(codes, channels).uniform_(-1 / codes, 1 / codes)
        self.codes = nn.Parameter(start)

    def forward(self, features):
        # float32: two codes may be nearly as near. ‖Z‖² is the same for all codes.
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            points = features.float().permute(0, 2, 3, 1)                      # (B,h,w,C)
            distances = self.codes.square().sum(1) - 2 * points @ self.codes.T # (B,h,w,M)
            nearest = distances.argmin(-1)
        return F.embedding(nearest, self.codes).permute(0, 3, 1, 2), nearest


class Usage(nn.Module):
    """Each code's share of the features (M,), a running mean of about ten steps."""

    def __init__(self, codes):
        super().__init__()
        self.register_buffer("share", torch.zeros(codes))

    def update(self, codes):
        """codes: m of a batch, of any shape."""
        met = torch.bincount(codes.flatten(), minlength=len(self.share)).float()
        if common.world() > 1:
            torch.distributed.all_reduce(met)
        self.share.mul_(0.9).add_(met / met.sum(), alpha=0.1)


@torch.no_grad()
def restart_codes(dictionary, usage, features, generator):
    """Codes that met less than a fiftieth of an even share of the features become features
    of this batch, (B,C,h,w).

    A code far from all features is never the nearest: no gradient would ever move it.
    """
    count = len(dictionary.codes)
    unused = torch.nonzero(usage.share < 0.02 / count)[:, 0]
    points = features.permute(0, 2, 3, 1).flatten(0, 2).contiguous()
    if common.world() > 1:                                      # of the whole batch
        shares = [torch.empty_like(points) for _ in range(common.world())]
        torch.distributed.all_gather(shares, points)
        points = torch.cat(shares)
    order = torch.randperm(len(points), generator=generator).to(points.device)
    again = torch.arange(len(unused), device=points.device) % len(points)
    dictionary.codes[unused] = points[order[again]]
    usage.share[unused] = 1 / count


class ChannelNorm(nn.LayerNorm):
    """LN: over the channels of (B,C,h,w), at each position."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def split_heads(x, heads):
    """(B,C,h,w) → Q_i, K_i or V_i of all heads, (B,N_h,N,C_h), N = h·w row by row."""
    return x.unflatten(1, (heads, -1)).flatten(3).transpose(2, 3)


def merge_heads(read, shape):
    """Eq. (3): Z_mh, what the heads read, side by side: (B,N_h,N,C_h) → (B,C,h,w)."""
    return read.transpose(2, 3).flatten(1, 2).unflatten(2, shape)


def attention_map(query, key):
    """Eq. (2), softmax(Q_i K_iᵀ / √C_h): (B,N_h,N,C_h) twice → (B,N_h,N,N)."""
    scores = query.float() @ key.float().transpose(2, 3)
    return (scores / query.shape[-1] ** 0.5).softmax(-1)


class MultiHead(nn.Module):
    """Attention of N_h heads: asking, answering (B,C,h,w) → Z_mh (B,C,h,w)."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Conv2d(channels, channels, 1)      # W_q, b_q
        self.key = nn.Conv2d(channels, channels, 1)        # W_k, b_k
        self.value = nn.Conv2d(channels, channels, 1)      # W_v, b_v

    def maps(self, asking, answering):
        """Where each position reads, and how much: (B,N_h,N,N), rows of sum 1."""
        query = split_heads(self.query(asking), self.heads)
        key = split_heads(self.key(answering), self.heads)
        return attention_map(query, key)

    def forward(self, asking, answering):
        query = split_heads(self.query(asking), self.heads)         # Eq. (1), (5)
        key = split_heads(self.key(answering), self.heads)          # Eq. (1), (5)
        value = split_heads(self.value(answering), self.heads)      # Eq. (1), (5)
        # Eq. (2): attention_map(query, key) @ value, without holding the whole map.
        read = F.scaled_dot_product_attention(query, key, value)
        return merge_heads(read, asking.shape[2:])                  # Eq. (3)


class Attention(nn.Module):
    """Attention and its feed-forward network, MHSA or MHCA: (B,C,h,w) thrice → (B,C,h,w).

    MHSA, Eq. (1), (4): one Z is all three, Z_a = FFN(LN(Z_mh + Z)).
    MHCA, Eq. (5), (6): Z_d asks, Z_p answers, Z_f = FFN(LN(Z_mh + Z_p)).
    """
    def __init__(self, channels, heads):
        super().__init__()
        self.multi_head = MultiHead(channels, heads)
        self.norm = ChannelNorm(channels)
        first = convolution(channels, 2 * channels)
        second = convolution(2 * channels, channels)
        self.feed_forward = nn.Sequential(first, nn.LeakyReLU(0.2), second)
        # FFN(x) ≈ x at first: one layer gives ±x, and LReLU(x) − LReLU(−x) = 1.2 x.
        both = torch.cat([torch.eye(channels), -torch.eye(channels)])
        with torch.no_grad():
            first.weight *= 0.1
            second.weight *= 0.1
            first.weight[:, :, 1, 1] += both
            second.weight[:, :, 1, 1] += both.T / 1.2

    def forward(self, asking, answering, added):
        heads = self.multi_head(asking, answering)                  # Z_mh
        return self.feed_forward(self.norm(heads + added))          # Eq. (4), (6)


class SFT(nn.Module):
    """Spatial feature transform, row exp4 of Table 4: α ⊙ Z_p + β at each position.

    α and β come from Z_d by two convolutions each. It begins close to Z_p.
    """
    def __init__(self, channels):
        super().__init__()
        self.scale = self.layers(channels)
        self.shift = self.layers(channels)

    @staticmethod
    def layers(channels):
        first = convolution(channels, channels)
        last = convolution(channels, channels)
        with torch.no_grad():
            last.weight *= 0.1
        return nn.Sequential(first, nn.LeakyReLU(0.2), last)

    def forward(self, features, priors):
        return (1 + self.scale(features)) * priors + self.shift(features)


class Decoder(nn.Module):
    """D_h, D_d: (B,C,H/s,W/s) → (B,3,H,W), not bounded; doublings between levels."""

    def __init__(self, cfg):
        super().__init__()
        self.norm = ChannelNorm(cfg.code_channels)
        last = len(cfg.widths) - 1
        before = cfg.widths[last]
        layers = [convolution(cfg.code_channels, before)]
        for level in range(last, -1, -1):
            width = cfg.widths[level]
            if level < last:
                layers += [nn.Upsample(scale_factor=2, mode=cfg.doubling),
                           convolution(before, width)]
            for _ in range(cfg.blocks[level]):
                layers.append(Residual(width, width, cfg.groups))
            before = width
        layers += [normalisation(before, cfg.groups), nn.SiLU(), convolution(before, 3)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(self.norm(x)).float()


def exact_encoding(encoder):
    """While restoring, autocast does not round an encoder whose weights are float32: some
    features would meet another code, and the picture get other details.
    """
    weight = next(encoder.parameters())
    exact = not encoder.training and weight.dtype == torch.float32
    mixed = torch.is_autocast_enabled(weight.device.type)
    return torch.autocast(weight.device.type, enabled=mixed and not exact)


class Latents(NamedTuple):
    """What encoder and dictionary make of a face."""
    features: torch.Tensor     # Z_d, in stage 1 Z_h: (B,C,h,w)
    priors: torch.Tensor       # Z_p: (B,C,h,w)
    codes: torch.Tensor        # m of Eq. (7) and (14): (B,h,w)


class RestoreFormer(nn.Module):
    """degraded (B,3,H,W) in [-1,1] → restored (B,3,H,W); `with_latents` also its Latents.

    Stage 1 is the same without attention: a sharp face, Z_h, Z_p, the decoder. `encoder`
    is the recognition network of --variant recognition-dictionary.
    """
    exact = ("encoder",)       # what chooses the codes

    def __init__(self, cfg, stage=2, encoder=None):
        super().__init__()
        self.sources = "prior" if stage == 1 else cfg.sources
        self.fusion = "none" if stage == 1 else cfg.fusion
        if cfg.recognition:
            self.encoder = RecognitionEncoder(encoder, cfg)
        else:
            self.encoder = Encoder(cfg)
        self.dictionary = Dictionary(cfg.codes, cfg.code_channels)
        self.dictionary.requires_grad_(stage == 1)
        self.blocks = nn.ModuleList()
        for _ in range(0 if self.fusion == "none" else 2):
            if self.fusion == "sft":
                self.blocks.append(SFT(cfg.code_channels))
            else:
                self.blocks.append(Attention(cfg.code_channels, cfg.heads))
        self.decoder = Decoder(cfg)

    def encode(self, image):
        with exact_encoding(self.encoder):
            features = self.encoder(image).float()
        return Latents(features, *self.dictionary(features))

    def fuse(self, features, priors):
        """Eq. (8): Z'_f = MHCA(Z_d, MHCA(Z_d, Z_p)), or a row of Table 4 in its place."""
        if self.sources == "degraded":
            fused = features
        else:      # the choice of a code has no gradient: that at Z_p is copied to Z_d
            fused = features + (priors - features).detach()
        for block in self.blocks:
            if self.fusion == "mhca":
                fused = block(features, fused, added=fused)          # Eq. (6)
            elif self.fusion == "mhca-d":
                fused = block(features, fused, added=features)       # exp5
            elif self.fusion == "mhsa":
                fused = block(fused, fused, added=fused)             # Eq. (4): exp2, exp3
            else:
                fused = block(features, fused)                       # exp4
        return fused

    def forward(self, image, with_latents=False):
        latents = self.encode(image)
        restored = self.decoder(self.fuse(latents.features, latents.priors))
        return (restored, latents) if with_latents else restored

    def attention_maps(self, image):
        """What the heads of each Attention read where: a list of (B,N_h,N,N)."""
        maps = []
        hooks = [block.multi_head.register_forward_pre_hook(
                     lambda heads, given: maps.append(heads.maps(*given)))
                 for block in self.blocks if isinstance(block, Attention)]
        self(image)
        for hook in hooks:
            hook.remove()
        return maps


class Judgement(NamedTuple):
    """What a discriminator says of a picture."""
    scores: torch.Tensor       # logits of D, one a patch: (B,1,h,w)
    features: list             # φ of Eq. (11): the maps of its layers


class Discriminator(nn.Module):
    """A patch discriminator, all under spectral norm: (B,3,h,w) → Judgement."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleList([
            spectral_norm(nn.Conv2d(3, width, 4, 2, 1)),
            spectral_norm(nn.Conv2d(width, 2 * width, 4, 2, 1)),
            spectral_norm(nn.Conv2d(2 * width, 4 * width, 4, 2, 1))])
        self.score = spectral_norm(nn.Conv2d(4 * width, 1, 3, padding=1))

    def forward(self, image):
        features = []
        for layer in self.layers:
            image = F.leaky_relu(layer(image), 0.2)
            features.append(image)
        return Judgement(self.score(image), features)


def crop_regions(image, boxes):
    """R_r of Eq. (11), RoIAlign: image (B,3,H,W), boxes (B,4,4) → {r: (B,3,n,n)}."""
    image = image.float().contiguous()
    crops = {}
    for name, side in REGIONS.items():
        box = boxes[:, list(common.COMPONENTS).index(name)]
        pixels = max(side * image.shape[-1] // 512, 16)
        crops[name] = roi_align(image, list(box[:, None]), pixels, sampling_ratio=2,
                                aligned=True)
    return crops


class Discriminators(nn.ModuleDict):
    """D of the picture and, in stage 2, a D_r of each region: → {name: Judgement}."""

    def __init__(self, cfg, stage):
        names = ["image"] if stage == 1 else ["image", *REGIONS]
        super().__init__({name: Discriminator(cfg.discriminator_width) for name in names})

    def forward(self, image, boxes):
        parts = {"image": image}
        if "mouth" in self:
            parts |= crop_regions(image, boxes)
        return {name: self[name](part) for name, part in parts.items()}


# 4. Losses ----------------------------------------------------------------------------

def pixel_loss(restored, target):
    """Eq. (9), (17): |I_h − Î_d|₁, a mean over pixels and batch."""
    return F.l1_loss(restored.float(), target.float())


def perceptual_loss(features, target_features):
    """Eq. (9), (17): ‖φ(I_h) − φ(Î_d)‖², lists of maps, a mean over each and their sum.

    The paper takes a map of each of VGG-19's five blocks; here they are the last four.
    """
    pairs = zip(features, target_features)
    return sum(F.mse_loss(ours.float(), theirs.float()) for ours, theirs in pairs)


def code_loss(features, priors):
    """Eq. (10): ‖Z_p − Z_d‖². The dictionary stands still, so it draws Z_d."""
    return F.mse_loss(features, priors.detach())


def discriminator_loss(real, fake):
    """Eq. (11), (12), (17), what D maximises, negated, of logits.

    −E[log D(I_h)] − E[log(1 − D(Î_d))].
    """
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def adversarial_loss(fake):
    """The generator's side of Eq. (12), (17): −E[log D(Î_d)] of logits."""
    return F.softplus(-fake.float()).mean()


def component_loss(fake):
    """The generator's side of Eq. (11): Σ_r −E[log D_r(R_r(Î_d))], {name: Judgement}."""
    return sum(adversarial_loss(fake[name].scores) for name in REGIONS)


def gram_matrix(maps):
    """φᵀφ / (C h w), φ of h·w rows: (B,C,h,w) → (B,C,C), in float32."""
    with torch.autocast(maps.device.type, enabled=False):
        rows = maps.float().flatten(2)
        return rows @ rows.transpose(1, 2) / maps[0].numel()


def style_loss(fake, real):
    """Eq. (11): Σ_r ‖Gram(φ(R_r(I_h))) − Gram(φ(R_r(Î_d)))‖², {name: Judgement} twice.

    Summed over the layers of D_r, a mean over the batch.
    """
    loss = 0
    for name in REGIONS:
        for ours, theirs in zip(fake[name].features, real[name].features):
            change = gram_matrix(ours) - gram_matrix(theirs)
            loss = loss + change.square().sum((1, 2)).mean()
    return loss


def identity_loss(identity, target_identity):
    """Eq. (12): ‖η(I_h) − η(Î_d)‖², (B,D) twice, a mean over the batch."""
    return (identity - target_identity).square().sum(1).mean()


def identity_of(recogniser, image):
    """η: (B,3,H,W) → (B,D) of length 1."""
    return F.normalize(recogniser(image).float(), dim=1)


# The authors' code gives λ_c to Eq. (15) and λ_d to Eq. (16); here they are as printed.
def codebook_loss(features, priors):
    """Eq. (15): ‖sg[Z_h] − Z_p‖². It moves the codes."""
    return F.mse_loss(priors, features.detach())


def commitment_loss(features, priors):
    """Eq. (16): ‖Z_h − sg[Z_p]‖². It holds the encoder near the codes."""
    return F.mse_loss(features, priors.detach())


def dictionary_losses(cfg, restored, target, latents, fake, encoder):
    """Eq. (18), stage 1: its terms by name. fake: what D says of `restored`."""
    features, priors, _ = latents
    phi, target_phi = encoder.features(restored), encoder.features(target)
    return {
        "pixel": pixel_loss(restored, target),
        "perceptual": cfg.weight_perceptual * perceptual_loss(phi, target_phi),
        "adversarial": cfg.weight_adversarial * adversarial_loss(fake["image"].scores),
        "codebook": cfg.weight_codebook * codebook_loss(features, priors),
        "commitment": cfg.weight_commitment * commitment_loss(features, priors)}


def restoration_losses(cfg, restored, target, latents, fake, real, encoder, recogniser):
    """Eq. (13), stage 2: its terms by name. fake, real: what D and all D_r say."""
    features, priors, _ = latents
    phi, target_phi = encoder.features(restored), encoder.features(target)
    eta, target_eta = identity_of(recogniser, restored), identity_of(recogniser, target)
    losses = {
        "pixel": pixel_loss(restored, target),
        "perceptual": cfg.weight_perceptual * perceptual_loss(phi, target_phi),
        "component": cfg.weight_component * component_loss(fake),
        "style": cfg.weight_style * style_loss(fake, real),
        "adversarial": cfg.weight_adversarial * adversarial_loss(fake["image"].scores),
        "identity": cfg.weight_identity * identity_loss(eta, target_eta)}
    if cfg.sources != "degraded":      # exp1 and exp2 have no use for the codes
        losses["code"] = cfg.weight_code * code_loss(features, priors)
    return losses


# 5. Data ------------------------------------------------------------------------------

class Batches(torch.utils.data.Dataset):
    """Training batch number `step`, from 0: (degraded, target, boxes).

    Every face draws from a random stream of its own, (seed, stage, step, place in the
    whole batch): resuming, or more processes of smaller batches, changes nothing.
    """
    def __init__(self, faces, indices, cfg):
        self.faces = faces
        self.indices = indices
        self.cfg = cfg
        self.first = common.rank() * cfg.batch

    def sample(self, step, place):
        """One face: degraded (in stage 1 the target), target (3,H,W), boxes (4,4)."""
        cfg = self.cfg
        stage = cfg.stage(step + 1)
        generator = common.seeded(cfg.seed, stage, step, place)
        chosen = torch.randint(len(self.indices), (), generator=generator).item()
        target, landmarks = common.stack_faces(self.faces, [self.indices[chosen]])
        target, landmarks = common.augment(target, landmarks, generator, cfg.shift,
                                           cfg.jitter)
        degraded = target
        if stage == 2:
            degradation = common.DEGRADATIONS[cfg.degradation]
            degraded = common.degrade(target, degradation, generator)           # Eq. (19)
        return degraded[0], target[0], common.component_boxes(landmarks, cfg.size)[0]

    def __getitem__(self, step):
        samples = [self.sample(step, self.first + k) for k in range(self.cfg.batch)]
        return [torch.stack(part) for part in zip(*samples)]


def load_recogniser(cfg, args, faces):
    """η of Eq. (12), frozen: ArcFace from --arcface; else that of the checkpoint; else the
    recogniser of these faces.
    """
    if args.arcface is not None:
        net = common.ArcFace(args.arcface)
    elif args.state is not None:
        net = common.unpack(args.state["frozen"].get("recogniser"))
    elif cfg.arcface:
        raise InputError("--preset paper wants --arcface FILE: arcface_resnet18.pth from "
                         "https://github.com/TencentARC/GFPGAN/releases/tag/v0.1.0")
    else:
        net = common.recogniser(faces, device=args.device)
    return net.to(args.device, memory_format=torch.channels_last)


# 6. Training --------------------------------------------------------------------------

def train(cfg, args):
    """Train both stages, or that of --stage, on --data; see Config for every number.

    checkpoint.pt holds the stage in training, dictionary.pt the end of stage 1.
    """
    faces = common.load_faces(args, cfg)
    _, validation, test = common.split_identities(faces)
    test = common.spread(test, cfg.tested)
    encoder = common.load_encoder(cfg.encoder, args, faces)
    recogniser = load_recogniser(cfg, args, faces)

    if args.state is None or args.state["step"] < cfg.dictionary_steps:
        net, _ = train_stage(1, cfg, args, faces, encoder, recogniser)
        if common.rank() == 0:
            six = common.spread(validation, 6)
            batch = next(restored_batches(net, faces, six, cfg, None, stage=1))
            shown = {"sharp": batch["target"], "stage 1": batch["restored"]}
            picture = common.comparison_grid(shown)
            common.write_image(args.folder / "reconstructions.png", picture)
        with common.first():                           # process 0 has written it
            args.state = common.load_checkpoint(args.checkpoint, SCRIPT)
        args.begin = time.monotonic()                  # earlier seconds are in the state
    if args.state["stage"] == 1 and common.rank() == 0:
        common.save_checkpoint(args.dictionary, dict(args.state))
        print(f"{args.dictionary}: what stage 1 learned")
    if args.stage == 1:
        return

    net, run = train_stage(2, cfg, args, faces, encoder, recogniser)
    common.report(run, evaluate(net, faces, test, cfg, args),
                  samples(net, faces, test, cfg, args.precision))


def train_stage(stage, cfg, args, faces, encoder, recogniser):
    """Train stage 1 or 2 → its network and its run."""
    people, validation, _ = common.split_identities(faces)
    validation = common.spread(validation, cfg.validated)

    torch.manual_seed(cfg.seed)
    net = RestoreFormer(cfg, stage, encoder)
    net.to(args.device, memory_format=torch.channels_last)
    discriminators = Discriminators(cfg, stage)
    discriminators.to(args.device, memory_format=torch.channels_last)
    usage = Usage(cfg.codes).to(args.device)
    learned = [weight for weight in net.parameters() if weight.requires_grad]
    groups = [{"params": learned}]
    if stage == 1:                     # at the encoder's own rate the codes lag behind it
        codes = net.dictionary.codes
        groups = [{"params": [weight for weight in learned if weight is not codes]},
                  {"params": [codes], "times": cfg.codes_times}]
    optimizer = torch.optim.Adam(groups, betas=cfg.betas, fused=True)
    optimizer_d = torch.optim.Adam(discriminators.parameters(), betas=cfg.betas,
                                   fused=True)
    run = open_run(stage, cfg, args, faces, encoder, recogniser, net=net, usage=usage,
                   discriminators=discriminators, optimizer=optimizer,
                   optimizer_d=optimizer_d)
    forward, forward_d = common.parallel(net, discriminators)

    for step, (degraded, target, boxes) in run.batches(Batches(faces, people, cfg)):
        common.set_rate(cfg.rate(step) * run.factor, optimizer, optimizer_d)

        # Generator
        discriminators.requires_grad_(False)
        with common.autocast(args.device, args.precision):
            restored, latents = forward(degraded, with_latents=True)
            fake = discriminators(restored, boxes)
            if stage == 1:
                losses = dictionary_losses(cfg, restored, target, latents, fake, encoder)
            else:
                real = discriminators(target, boxes)
                losses = restoration_losses(cfg, restored, target, latents, fake, real,
                                            encoder, recogniser)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()                                 # Eq. (18), (13)
        if cfg.clip is not None:
            nn.utils.clip_grad_norm_(learned, cfg.clip)
        optimizer.step()

        # Discriminators
        discriminators.requires_grad_(True)
        with common.autocast(args.device, args.precision):
            real = forward_d(target, boxes)
            fake = forward_d(restored.detach(), boxes)
            losses["discriminator"] = sum(
                discriminator_loss(real[name].scores, fake[name].scores) for name in real)
        optimizer_d.zero_grad(set_to_none=True)
        losses["discriminator"].backward()
        optimizer_d.step()

        if stage == 1:
            usage.update(latents.codes)
            if cfg.restarts(step):
                generator = common.seeded(cfg.seed, 6, step)
                restart_codes(net.dictionary, usage, latents.features, generator)
        run.log(step, losses)
        if run.due(step):
            run.save(step, validate(net, encoder, faces, validation, cfg, stage))
    return net, run


def open_run(stage, cfg, args, faces, encoder, recogniser, **parts):
    """The run of a stage. Stage 2 begins with what stage 1 learned."""
    frozen = {"encoder": encoder, "recogniser": recogniser}
    end = cfg.dictionary_steps if stage == 1 else cfg.steps
    goes_on = args.state is not None and args.state["stage"] == stage
    run = common.Run(SCRIPT, cfg, args, faces, frozen, end, f"stage {stage} ",
                     **(parts if goes_on else {}))
    if stage == 2 and not goes_on:
        start = parts["net"].state_dict() | args.state["net"]
        common.load_part(parts["net"], {"net": start}, "net")
    run.parts = {"stage": stage, **parts}
    return run


@torch.inference_mode()
def validate(net, encoder, faces, indices, cfg, stage):
    """Eq. (9) and PSNR in dB on held-out faces, always degraded alike; in stage 1 sharp.

    Also the perplexity exp(−Σ p log p) of the codes that were met, and which share of all
    codes these are.
    """
    device = next(net.parameters()).device
    loss, quality = 0.0, 0.0
    met = torch.zeros(cfg.codes, device=device)
    for batch in restored_batches(net, faces, indices, cfg, None, stage):
        restored, target = batch["restored"].to(device), batch["target"].to(device)
        with common.inference(net):
            phi, target_phi = encoder.features(restored), encoder.features(target)
            codes = net.encode(batch["degraded"].to(device)).codes
        total = pixel_loss(restored, target)
        total += cfg.weight_perceptual * perceptual_loss(phi, target_phi)
        loss += total.item() * len(target)
        quality += common.psnr(restored, target).sum().item()
        met += torch.bincount(codes.flatten(), minlength=cfg.codes)
    entropy = torch.special.entr(met / met.sum()).sum()
    return {"validation": loss / len(indices), "validation_psnr": quality / len(indices),
            "perplexity": entropy.exp().item(), "used": (met > 0).float().mean().item()}


def samples(net, faces, indices, cfg, precision="auto"):
    """Pictures of six held-out faces, degraded ×4, and of what their left eyes read."""
    six = common.spread(indices, 6)
    batch = next(restored_batches(net, faces, six, cfg, 4, precision=precision))
    shown = {name: batch[name] for name in ("degraded", "restored", "target")}
    pictures = {"samples.png": common.comparison_grid(shown)}
    if read := attention_pictures(net, batch["degraded"], batch["landmarks"]):
        pictures["attention.png"] = common.comparison_grid(
            {"degraded": batch["degraded"], **read})
    return pictures


def attention_pictures(net, images, landmarks):
    """What the feature at the left eye reads, white most: {"attention 1": (B,3,H,W)}."""
    with common.inference(net) as device:
        maps = net.attention_maps(images.to(device))
    pictures = {}
    for number, heads in enumerate(maps, 1):
        side = round(heads.shape[-1] ** 0.5)
        eyes = (landmarks[:, common.LEFT_EYE].mean(1) + 0.5) * side / images.shape[-1]
        x, y = eyes.long().clamp(0, side - 1).unbind(1)
        read = heads.float().mean(1).cpu()[torch.arange(len(images)), y * side + x]
        read = (read / read.amax(1, keepdim=True)).view(-1, 1, side, side)
        read = F.interpolate(2 * read - 1, images.shape[2:])
        pictures[f"attention {number}"] = read.expand(-1, 3, -1, -1)
    return pictures


# 7. Restoration -----------------------------------------------------------------------

def restore(net, degraded, landmarks=None, batch=8, precision="auto"):
    """Restore faces (N,3,size,size) in [-1,1] → the same, on the CPU. Landmarks are not
    looked at."""
    with common.inference(net, precision) as device:

        def some(part):
            images = degraded[part].to(device, memory_format=torch.channels_last)
            return net(images).float().clamp(-1, 1).cpu()

        return common.in_batches(some, len(degraded), batch)


def restored_batches(net, faces, indices, cfg, scale, stage=2, batch=16,
                     precision="auto"):
    """Held-out faces in batches, {"faces" (their indices), "degraded", "restored",
    "target", "landmarks"}; in stage 1 they are not degraded."""
    for start in range(0, len(indices), batch):
        some = indices[start:start + batch]
        target, landmarks = common.stack_faces(faces, some)
        degraded = target
        if stage == 2:
            degradation = common.DEGRADATIONS[cfg.degradation]
            degraded = common.degrade_each(target, degradation, scale, cfg.seed, some)
        restored = restore(net, degraded, landmarks, batch, precision)
        yield {"faces": torch.tensor(some), "degraded": degraded, "restored": restored,
               "target": target, "landmarks": landmarks}


@torch.inference_mode()
def feature_distance(judge, image, target):
    """Perceptual distance without published weights: (B,3,H,W) twice → (B,).

    The squared distance of a recogniser's features, each position's scaled to length 1, a
    mean over positions and over its four maps.
    """
    device = next(judge.parameters()).device
    total = 0
    for one, two in zip(judge.features(image.to(device)), judge.features(target.to(device))):
        gap = F.normalize(one, dim=1) - F.normalize(two, dim=1)
        total += gap.square().sum(1).mean((1, 2)).cpu() / 4
    return total


def evaluate(net, faces, indices, cfg, args):
    """×4, ×8 and the paper's random scales on held-out faces → "test" of result.json."""
    metrics = common.metrics(faces, args)
    judge = common.judge(faces, args)
    metrics["features"] = lambda image, target: feature_distance(judge, image, target)
    if args.arcface is not None:
        eta = common.ArcFace(args.arcface).to(args.device)
        metrics["identity"] = lambda image, target: common.identity_distance(
            eta, image.to(args.device), target.to(args.device)).cpu()
    fid = common.load_fid(args)
    table = {}
    for task, scale in common.TASKS.items():
        batches = restored_batches(net, faces, indices, cfg, scale,
                                   precision=args.precision)
        table[task] = common.measure({"restored": batches}, metrics, fid)
    return table


def for_restoration(net, device, precision="auto"):
    """The network made ready to restore with, for good: see common.for_inference.

    What chooses the codes keeps float32, unless all is to be bfloat16. The released
    decoder's doublings become one with the convolutions behind them.
    """
    for module in list(net.modules()):
        if isinstance(module, ReleasedLevel):
            module.resize = merge_doubling(module.resize)
    exact = () if precision == "bfloat16" else net.exact
    return common.for_inference(net, device, precision, exact)


def load_network(args):
    """The network of the checkpoint, and its Config."""
    cfg = common.recorded_config(args, Config)
    if args.state["stage"] != 2:
        raise InputError(f"{args.checkpoint}: holds stage 1, which restores nothing; "
                         "--train --resume goes on to stage 2")
    encoder = common.load_encoder(cfg.encoder, args, None) if cfg.recognition else None
    net = RestoreFormer(cfg, 2, encoder)
    common.load_part(net, args.state, "net")
    return net, cfg


# 8. Command line ----------------------------------------------------------------------

def training_config(args):
    """Preset, variant and options; stage 1 ends where it did when the run began."""
    args.dictionary = args.checkpoint.with_name("dictionary.pt")
    if args.prepared:
        args.stage = 2                                # rows share what stage 1 learned
    if args.resume and args.stage not in (None, args.state["stage"]):
        raise InputError(f"{args.checkpoint}: not of stage {args.stage}; --resume goes "
                         "on with the stage that the checkpoint is of")
    if args.stage == 2 and not args.resume:
        if not args.dictionary.is_file():
            raise InputError(f"{args.dictionary}: missing; stage 2 starts from what "
                             "stage 1 learned: --train --stage 1")
        args.state = common.load_checkpoint(args.dictionary, SCRIPT)
    cfg = common.chosen_config(args, PRESETS, VARIANTS)
    common.check_size(cfg.size, max(cfg.stride, 16))
    first = 1
    if args.state is not None:
        first = common.recorded_config(args, Config).dictionary_steps
        if cfg.dictionary_steps != first:
            cfg = replace(cfg, dictionary_share=first / cfg.steps)
    if cfg.steps <= first:
        raise InputError(f"--steps {cfg.steps}: must be more than stage 1's {first}")
    return cfg


def main(argv=None):
    parser = common.arguments(__doc__, PRESETS, VARIANTS)
    parser.add_argument("--stage", type=int, choices=(1, 2),
                        help="train the dictionary alone (1), or what comes after it (2)")
    parser.add_argument("--arcface", metavar="FILE",
                        help="weights of ArcFace, for the loss and metric of identity")
    common.add_fid(parser)
    args = common.parse(parser, argv, SCRIPT)
    if args.stage and not args.train:
        raise InputError("--stage belongs to --train")
    if args.train:
        for run in common.planned_runs(args, SCRIPT, PRESETS, VARIANTS, CLAIMS, PAPER_FIGURES,
                                       prepared="recognition"):
            train(training_config(run), run)
        return 0

    if args.weights:
        net, cfg = load_official(args.weights), RELEASED
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

# The published weights are of a network that differs from the paper's. Attention has a
# group norm before it and a projection after it, no layer norm and no feed-forward. Two
# wide maps from the end of the encoder ask, not Z_d. There are four cross-attentions with
# residual blocks between, not two, three self-attentions in the encoder and, in stage 1,
# four in the decoder. Convolutions of stride 2 pool. A convolution stands on each side of
# the dictionary. Names are the authors'.

class ReleasedAttention(nn.Module):
    """x (B,C,h,w) + what x answers to the positions of y, or of x itself without y."""

    def __init__(self, channels, cfg):
        super().__init__()
        self.norm1 = normalisation(channels, cfg.groups)
        self.norm2 = normalisation(channels, cfg.groups)         # unused without y
        self.multi_head = MultiHead(channels, cfg.heads)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, y=None):
        answering = self.norm1(x)
        asking = answering if y is None else self.norm2(y)
        return x + self.proj_out(self.multi_head(asking, answering))


class ReleasedLevel(nn.Module):
    """Residual blocks, with `attend` an attention after each, then a change of size."""

    def __init__(self, before, after, blocks, attend, resize, cfg):
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        for _ in range(blocks):
            self.block.append(Residual(before, after, cfg.groups))
            if attend:
                self.attn.append(ReleasedAttention(after, cfg))
            before = after
        self.resize = resize

    def forward(self, x, y=None):
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x, y)
        return self.resize(x)


@torch.no_grad()
def merge_doubling(resize):
    """A nearest doubling and the 3×3 convolution behind it as one transposed convolution.

    To repeat each value 2×2 times is a transposed convolution with ones, of stride 2. A
    convolution behind it convolves its kernel with these ones: 4×4 weights, of which four
    reach a pixel in place of nine. Layers without a doubling stay as they are.
    """
    if not any(isinstance(layer, nn.Upsample) for layer in resize):
        return resize
    layer = resize[1]
    kernel = layer.weight.flip(2, 3).transpose(0, 1)    # as transposed convolutions have it
    shifted = [F.pad(kernel, (x, 1 - x, y, 1 - y)) for x in (0, 1) for y in (0, 1)]
    merged = nn.ConvTranspose2d(layer.in_channels, layer.out_channels, 4, 2, 1)
    merged.weight.copy_(sum(shifted))
    merged.bias.copy_(layer.bias)
    return merged


def released_middle(channels, cfg):
    """Residual block, attention, residual block."""
    return nn.ModuleDict({"block_1": Residual(channels, channels, cfg.groups),
                          "attn_1": ReleasedAttention(channels, cfg),
                          "block_2": Residual(channels, channels, cfg.groups)})


class ReleasedEncoder(nn.Module):
    """(B,3,H,W) → two maps of the last width, which ask, and (B,C,h,w); stride 32."""

    def __init__(self, cfg):
        super().__init__()
        before, last = cfg.widths[0], len(cfg.widths) - 1
        self.conv_in = convolution(3, before)
        self.down = nn.ModuleList()
        for index, width in enumerate(cfg.widths):
            half = [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, 2)]
            resize = nn.Sequential(*half if index < last else [])
            self.down.append(ReleasedLevel(before, width, 2, index == last, resize, cfg))
            before = width
        self.mid = released_middle(before, cfg)
        self.norm_out = normalisation(before, cfg.groups)
        self.conv_out = convolution(before, cfg.code_channels)

    def forward(self, image):
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
        first = self.mid["block_1"](x)
        second = self.mid["block_2"](self.mid["attn_1"](first))
        return first, second, self.conv_out(F.silu(self.norm_out(second)))


class ReleasedDecoder(nn.Module):
    """(B,C,h,w), and the two maps that ask (stage 1: None) → (B,3,32h,32w)."""

    def __init__(self, cfg):
        super().__init__()
        widths, last = cfg.widths, len(cfg.widths) - 1
        self.conv_in = convolution(cfg.code_channels, widths[last])
        self.mid = released_middle(widths[last], cfg)
        self.up = nn.ModuleList()
        for index, width in enumerate(widths):
            before = widths[min(index + 1, last)]
            twice = [nn.Upsample(scale_factor=2), convolution(width, width)]
            resize = nn.Sequential(*twice if index > 0 else [])
            self.up.append(ReleasedLevel(before, width, 3, index == last, resize, cfg))
        self.norm_out = normalisation(widths[0], cfg.groups)
        self.conv_out = convolution(widths[0], 3)

    def forward(self, x, first, second):
        x = self.mid["block_1"](self.conv_in(x))
        x = self.mid["block_2"](self.mid["attn_1"](x, second))
        for level in reversed(self.up):
            x = level(x, first)
        return self.conv_out(F.silu(self.norm_out(x))).float()


class ReleasedRestoreFormer(RestoreFormer):
    """The network of RestoreFormer.ckpt (stage 2) and of its dictionary (stage 1)."""
    exact = ("encoder", "quant_conv")

    def __init__(self, cfg=RELEASED, stage=2):
        nn.Module.__init__(self)
        self.stage = stage
        self.blocks = []                                 # none of the paper's Attention
        self.encoder = ReleasedEncoder(cfg)
        self.decoder = ReleasedDecoder(cfg)
        self.dictionary = Dictionary(cfg.codes, cfg.code_channels)
        self.quant_conv = nn.Conv2d(cfg.code_channels, cfg.code_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.code_channels, cfg.code_channels, 1)

    def forward(self, image):
        with exact_encoding(self.encoder):
            first, second, x = self.encoder(image)
            features = self.quant_conv(x)
        priors, _ = self.dictionary(features)
        if self.stage == 1:
            first, second = None, None
        return self.decoder(self.post_quant_conv(priors), first, second)


BLOCK = r"(?:vqvae\.)?(.+\.block[._]\d)\."
ATTENTION = r"(?:vqvae\.)?(.+\.attn[._]\d)\."
RELEASED_NAMES = [                           # (official name, name here); None: of a loss
    (r"(?:vqvae\.)?loss\..+", None),
    (r"(?:vqvae\.)?quantize\.embedding\.weight", "dictionary.codes"),
    (r"(?:vqvae\.)?(.+)\.(?:down|up)sample\.conv\.(.+)", r"\1.resize.1.\2"),
    (BLOCK + r"norm1\.(.+)", r"\1.body.0.\2"),
    (BLOCK + r"conv1\.(.+)", r"\1.body.2.\2"),
    (BLOCK + r"norm2\.(.+)", r"\1.body.3.\2"),
    (BLOCK + r"conv2\.(.+)", r"\1.body.5.\2"),
    (BLOCK + r"nin_shortcut\.(.+)", r"\1.shortcut.\2"),
    (ATTENTION + r"q\.(.+)", r"\1.multi_head.query.\2"),
    (ATTENTION + r"k\.(.+)", r"\1.multi_head.key.\2"),
    (ATTENTION + r"v\.(.+)", r"\1.multi_head.value.\2"),
    (r"(?:vqvae\.)?(.+)", r"\1"),
]


def load_official(source):
    """RestoreFormer.ckpt, a file, its address or its state dict → the network, frozen."""
    # Lightning names a class of its own among its settings; an empty one stands for it.
    torch.serialization.add_safe_globals([type("ModelCheckpoint", (), {
        "__module__": "pytorch_lightning.callbacks.model_checkpoint"})])
    return common.load_named(ReleasedRestoreFormer(), source, RELEASED_NAMES,
                             "RestoreFormer's weights")


if __name__ == "__main__":
    common.run_script(main)
