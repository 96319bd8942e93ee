"""DMDNet: blind face restoration with two memories, one of faces, one of this person.

Li, Zhang, Zhou, Zhang, Zuo: "Learning Dual Memory Dictionaries for Blind Face
Restoration", TPAMI 2022.

For each of eyes, nose and mouth, at three scales, a dictionary holds keys, which a
damaged component can find, and values, which restore it. The generic one is learned from
many people. The specific one is what a second extractor sees in sharp pictures of the
same person, from none to 21. Both are read by attention and mixed by an identity score. A
confidence score decides how much of the reading is added.

Equation → name
    (1) DMDNet                (8) IdentityScore         (14) style_loss
    (2) renew_items           (9) ConfidenceScore       (15) discriminator_loss
    (3) forward_update       (10) SFTStage              (16) adversarial_loss
    (4) the step in train    (11) pixel_loss            (17) photo_realistic_losses
    (5) DMDNet               (12) perceptual_loss       (18) their sum in train
    (6) MemoryExtractor      (13) reconstruction_losses (19) common.degrade, "dmdnet"
    (7) read_dictionary

    python dmdnet.py --train                    # rendered faces, minutes on two CPU cores
    python dmdnet.py --evaluate                 # on people it has never seen
    python dmdnet.py --restore photo.jpg --reference album/      # --reference is optional
    python dmdnet.py --save-dictionary person.pt --reference album/
    python dmdnet.py --restore photo.jpg --dictionary person.pt  # made once, used again

Open in the paper, chosen here: the layers (those of the released network where they fit).
To extract all Y generic pictures at every step would cost many times as much as the rest
of the step. So the first stage extracts a few in turn, with gradient; the other items keep
their last keys and values. The second stage writes a few other sharp faces a step, each
into the item with the nearest key. A picture is either written or restored: no face reads
itself. Stages end after a share of the steps. References come in after the first, when
Θ_spe starts as a copy of Θ_gen. The change of a component is pasted back, the mean where
boxes overlap. The factor of Eq. (14) stands inside its norm. TINY differs from the paper
in size, and in what Config says beside it.
"""
import itertools
import math
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.figure
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.ops import roi_align

import common
from common import Claim, InputError

SCRIPT = "dmdnet"
COMPONENTS = tuple(common.COMPONENTS)      # left eye, right eye, nose, mouth
STAGES = ("initialisation", "forward update", "backward update", "fine-tuning")


# 2. Config ----------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """Every number of the method. The defaults are TINY."""
    preset: str = "tiny"
    variant: str = "full"
    size: int = 128                          # pixels, height = width
    people: int = 288                        # rendered ones, without --data
    seed: int = 0

    # Dictionaries
    items: int = 128                         # Y, of the generic dictionary
    references: int = 5                      # N, at most; 21 in the paper
    drawn: int = 3                           # N in training, at most; in the paper all
    components: tuple = COMPONENTS           # p, those that have dictionaries
    sides: tuple = (16, 16, 12, 20)          # of COMPONENTS, see component_sizes
    scales: tuple = (1, 2, 3)                # with dictionaries; 1 is the finest
    transform: bool = True                   # Eq. (7); else the best value of both
    temperature: float = 64.0                # d of Eq. (7)
    stages: tuple = (0.12, 0.15, 0.15)       # shares of `steps` of the first three STAGES
    stage_ends: tuple = ()                   # their last steps, fixed when a run begins
    renewed: int = 4                         # faces written a step, Eq. (2), (3)

    # Network
    width: int = 16                          # channels at scale 1, see widths
    depth: int = 1                           # pairs and residual blocks a scale
    paint_blocks: int = 0                    # residual blocks at full size
    spectral: bool = False                   # spectral norm everywhere: slow to train
    bounded: bool = True                     # scores of Eq. (8), (9) by a sigmoid
    residual: bool = True                    # added to I^d: no need to learn to copy
    discriminator_width: int = 16

    # Losses
    encoder: str = "recogniser"              # Φ of Eq. (12), (14); "vgg": VGG
    weight_pixel: float = 300.0              # λ_mse
    weight_perceptual: float = 2.0           # λ_perc; 1 in the paper: another Φ
    weight_style: float = 1.0                # λ_style; 0.1 in the paper
    weight_adversarial: tuple = (0.8, 0.2, 0.1)    # λ_a,r, r = 1, 2, 4; a 5th of the paper's

    # Training
    learning_rate: float = 1e-3              # 5 times the paper's: the network is small
    dictionary_rate: float = 1e-3            # η of Eq. (4); 2e-6 in the paper
    betas: tuple = (0.5, 0.999)              # β1, β2 of Adam
    clip: float | None = 1.0                 # longest gradient; the paper clips none
    cooldown: float = 0.3                    # last part of the steps: the rate falls to 0
    patience: int | None = None              # so many validations may be no better: after
    plateau: float = 0.5                     # one more the rate is multiplied by this
    shift: float = 0.02                      # largest change of place
    jitter: float = 0.1                      # and of brightness and contrast
    steps: int = 340
    batch: int = 8                           # faces a process and step
    validate_every: int = 50                 # steps; also when a checkpoint is written
    validated: int = 32                      # faces
    tested: int | None = 128                 # held-out faces measured in the end, at most
    degradation: str = "dmdnet"              # Eq. (19)

    @property
    def widths(self):
        """C of scales 1, 2, 3; twice as many without dictionaries: Table 3."""
        times = 1 if self.scales else 2
        return [times * self.width * 2**level for level in range(3)]

    @property
    def component_sizes(self):
        """(3 scales) × (components): side of the resampled features, half at the next."""
        sides = dict(zip(COMPONENTS, self.sides))
        sizes = []
        for level in range(3):
            sizes.append([max(sides[name] // 2**level, 1) for name in self.components])
        return sizes

    def rate(self, step):
        """The learning rate of a step from 1 on: constant, then falling to 0."""
        left = (self.steps - step + 1) / max(self.cooldown * self.steps, 1)
        return self.learning_rate * min(left, 1)


TINY = Config()
HOUR = replace(TINY, preset="hour", people=1500, steps=7_500, validate_every=500)
PAPER = replace(
    TINY, preset="paper", size=512, encoder="vgg", references=21, drawn=21,
    sides=(40, 40, 25, 55), renewed=8, width=64, depth=2, paint_blocks=2,
    spectral=True, bounded=False, residual=False, weight_perceptual=1.0, weight_style=0.1,
    weight_adversarial=(4.0, 1.0, 0.5), discriminator_width=64, learning_rate=2e-4,
    dictionary_rate=2e-6, clip=None, cooldown=0, patience=3, shift=0, steps=400_000,
    batch=2, validate_every=5_000, validated=200, tested=None)
# The paper gives a batch of 8 on 4 GPUs, and no number of steps.
PRESETS = {"tiny": TINY, "hour": HOUR, "paper": PAPER}
RELEASED = replace(PAPER, preset="released",
                   components=("left_eye", "right_eye", "mouth"))

VARIANTS = {                                 # the rows of Table 3
    "full": {},
    "items-0": {"items": 0, "references": 0, "scales": ()},
    "items-32": {"items": 32},
    "items-64": {"items": 64},
    "items-256": {"items": 256},
    "only-backward": {"stages": (0, 0, 0.42)},         # the items stay noise until then
    "no-forward": {"stages": (0.12, 0, 0.15)},
    "no-backward": {"stages": (0.12, 0.15, 0)},
    "no-transform": {"transform": False},
    "1-transform": {"scales": (3,)},
    "2-transform": {"scales": (2, 3)},
    "only-specific": {"items": 0},
    "only-generic": {"references": 0},
}
COLUMNS = ("x4_psnr", "x4_ssim", "x4_lpips", "x4_fid",
           "x8_psnr", "x8_ssim", "x8_lpips", "x8_fid")
PAPER_FIGURES = {variant: dict(zip(COLUMNS, row)) for variant, row in {      # Table 3
    "full": (28.97, 0.902, 0.166, 10.30, 27.37, 0.875, 0.194, 14.43),
    "items-0": (26.31, 0.832, 0.231, 21.26, 24.69, 0.797, 0.292, 32.44),
    "items-32": (28.63, 0.893, 0.180, 11.01, 26.65, 0.856, 0.206, 14.97),
    "items-64": (28.90, 0.900, 0.171, 10.92, 27.01, 0.869, 0.199, 14.63),
    "items-256": (28.98, 0.902, 0.165, 10.31, 27.39, 0.876, 0.193, 14.41),
    "only-backward": (27.67, 0.880, 0.201, 18.64, 26.25, 0.851, 0.240, 19.29),
    "no-forward": (28.60, 0.897, 0.173, 14.51, 27.02, 0.869, 0.201, 15.37),
    "no-backward": (28.36, 0.896, 0.174, 14.55, 26.63, 0.862, 0.205, 15.46),
    "no-transform": (28.24, 0.884, 0.176, 13.56, 26.81, 0.863, 0.237, 15.58),
    "1-transform": (28.83, 0.897, 0.173, 12.11, 27.09, 0.870, 0.213, 14.88),
    "2-transform": (28.90, 0.901, 0.171, 10.77, 27.12, 0.871, 0.200, 14.50),
    "only-specific": (28.43, 0.887, 0.180, 13.67, 26.83, 0.860, 0.234, 15.53),
    "only-generic": (28.91, 0.901, 0.169, 10.31, 27.03, 0.870, 0.201, 14.56),
}.items()}
CLAIMS = [                                   # of Table 3; "full" has 128 items
    Claim("items-32", "items-0"), Claim("items-64", "items-32"), Claim("full", "items-64"),
    Claim("full", "only-backward"), Claim("full", "no-forward"),
    Claim("full", "no-backward"), Claim("1-transform", "no-transform"),
    Claim("2-transform", "1-transform"), Claim("full", "2-transform"),
    Claim("full", "no-transform"), Claim("full", "only-specific"),
    Claim("full", "only-generic")]


def stage_ends(cfg):
    """Last steps of the first three stages. Without items there is only the fourth.

    A run keeps those that it began with: more --steps only prolong the last stage.
    """
    if cfg.stage_ends:
        return cfg.stage_ends
    shares = cfg.stages if cfg.items else (0, 0, 0)
    totals = (shares[0], shares[0] + shares[1], sum(shares))
    return tuple(math.ceil(total * cfg.steps - 1e-6) for total in totals)


def stage_of(step, cfg):
    """The stage, 0 to 3, to which a step from 1 on belongs."""
    return sum(step > end for end in stage_ends(cfg))


# 3. Network ---------------------------------------------------------------------------

# A dictionary is {"scale1_left_eye": (keys (M,C/4,n,n), values (M,C,n,n)), …}: M = Y items
# in the generic one, an item a reference in the specific one. The references of a whole
# batch are items of one dictionary; `owner` (M,) says to which face each belongs.

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


def convolution(before, after, stride=1, dilation=1):
    """3×3, zero-padded to the same size, with He's initialisation."""
    layer = nn.Conv2d(before, after, 3, stride, dilation, dilation)
    nn.init.kaiming_normal_(layer.weight, 0.2)
    nn.init.zeros_(layer.bias)
    return layer


def pair(before, after, stride=1, dilations=(1, 1)):
    """Two convolutions, a LeakyReLU between: what all of the network is made of."""
    return nn.Sequential(convolution(before, after, stride, dilations[0]),
                         nn.LeakyReLU(0.2),
                         convolution(after, after, 1, dilations[1]))


def begin_at(layers, value):
    """A pair of convolutions whose output begins around a constant.

    Small weights keep it close. Spectral norm makes them large again: under it only the
    mean is the constant.
    """
    with torch.no_grad():
        layers[-1].weight *= 0.1
        layers[-1].bias += value
    return layers


def normalise(net):
    """Spectral norm on every convolution."""
    for module in list(net.modules()):
        if isinstance(module, nn.Conv2d):
            spectral_norm(module)


class Residual(nn.Module):
    """x + a pair of convolutions. Without spectral norm it begins close to x."""

    def __init__(self, channels, dilations=(1, 1)):
        super().__init__()
        self.body = begin_at(pair(channels, channels, dilations=dilations), 0)

    def forward(self, x):
        return x + self.body(x)


class Extractor(nn.Module):
    """(B,3,H,W) → features at scales 1, 2, 3: (B,C,H/2,W/2), …, (B,4C,H/8,W/8)."""

    def __init__(self, cfg):
        super().__init__()
        self.levels = nn.ModuleList()
        before = 3
        for after, dilations in zip(cfg.widths, ((5, 3), (3, 1), (1, 1))):
            level = [pair(before, after, stride=2), Residual(after, dilations)]
            for _ in range(cfg.depth - 1):
                level += [pair(after, after), Residual(after, dilations)]
            self.levels.append(nn.Sequential(*level))
            before = after

    def forward(self, x):
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps


def part_boxes(cfg, boxes):
    """Of the four boxes (B,4,4) those of the components that have dictionaries."""
    return boxes[:, [COMPONENTS.index(name) for name in cfg.components]]


class MemoryExtractor(nn.Module):
    """F_gen of Eq. (2) and F_spe of Eq. (6): sharp faces → a dictionary, an item a face.

    images (M,3,H,W), boxes (M,4,4) → keys (M,C/4,n,n), values (M,C,n,n) of each component
    and scale.
    """
    crop = staticmethod(crop_components)

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.features = Extractor(cfg)
        self.keys = nn.ModuleDict()
        self.values = nn.ModuleDict()
        for scale in cfg.scales:
            width = cfg.widths[scale - 1]
            for component in cfg.components:
                self.keys[f"scale{scale}_{component}"] = pair(width, width // 4)
                self.values[f"scale{scale}_{component}"] = pair(width, width)

    def forward(self, images, boxes):
        maps = self.features(images)
        boxes = part_boxes(self.cfg, boxes)
        dictionary = {}
        for scale in self.cfg.scales:
            sizes = self.cfg.component_sizes[scale - 1]
            parts = self.crop(maps[scale - 1], boxes, 2**scale, sizes)
            for component, part in zip(self.cfg.components, parts):
                name = f"scale{scale}_{component}"
                keys, values = self.keys[name](part), self.values[name](part)
                # Contiguous, as they are read: as rows.
                dictionary[name] = keys.float().contiguous(), values.float().contiguous()
        return dictionary


def renew_items(dictionary, fresh, places):
    """Eq. (2): {key_y, value_y} = F_gen(I_y^g; Θ_gen) for the items y in `places`.

    fresh: the dictionary that F_gen made of these I_y^g. The other items stay.
    """
    renewed = {}
    for name, (keys, values) in dictionary.items():
        fresh_keys, fresh_values = fresh[name]
        renewed[name] = (keys.index_copy(0, places, fresh_keys),
                         values.index_copy(0, places, fresh_values))
    return renewed


def forward_update(dictionary, fresh, gammas):
    """Eq. (3): value* = γ_v value + (1−γ_v) value^gt, key* = γ_k key + (1−γ_k) key^gt.

    fresh: {key^gt, value^gt} of some sharp faces; gammas: {name: (γ_k, γ_v)} in [0,1].
    Each face updates the item of the nearest key; where several meet, their mean does.
    """
    updated = {}
    for name, (keys, values) in dictionary.items():
        fresh_keys, fresh_values = fresh[name]
        gamma_k, gamma_v = gammas[name]
        distances = torch.cdist(fresh_keys.detach().flatten(1), keys.flatten(1))
        writes = F.one_hot(distances.argmin(1), len(keys)).to(keys).T       # (Y, faces)
        updated[name] = (blend(keys, fresh_keys, writes, gamma_k),
                         blend(values, fresh_values, writes, gamma_v))
    return updated


def blend(items, fresh, writes, gamma):
    """γ item + (1−γ) mean of the fresh ones written into it; the other items stay."""
    count = writes.sum(1, keepdim=True)
    mean = writes @ fresh.flatten(1) / count.clamp(min=1)
    mixed = gamma * items.flatten(1) + (1 - gamma) * mean
    return torch.where(count > 0, mixed, items.flatten(1)).view_as(items)


class GenericMemory(nn.Module):
    """What makes the generic dictionary in the first two stages: F_gen, and γ_k, γ_v of
    each component and scale, kept in [0,1] by a sigmoid."""

    def __init__(self, cfg):
        super().__init__()
        self.extract = MemoryExtractor(cfg)
        if cfg.spectral:
            normalise(self)
        self.logits = nn.ParameterDict(
            {name: torch.full((2,), 2.0) for name in self.extract.keys})

    def forward(self, dictionary, images, boxes, places=None):
        """The dictionary with the items at `places` renewed, Eq. (2); without places with
        the faces written into it, Eq. (3)."""
        fresh = self.extract(images, boxes)
        if places is not None:
            return renew_items(dictionary, fresh, places)
        gammas = {name: logit.sigmoid() for name, logit in self.logits.items()}
        with torch.autocast(images.device.type, enabled=False):
            return forward_update(dictionary, fresh, gammas)


def attention(query, keys, root, allowed=None):
    """The softmax of Eq. (7), one weight an item for the whole component.

    query (B,C/4,n,n), keys (M,C/4,n,n), root √d: a number or (B,1), allowed (B,M): what a
    face may read, None: all → weights (B,M); zeros for a face that may read none.
    """
    scores = query.flatten(1) @ keys.flatten(1).T / root
    if allowed is None:
        return scores.softmax(1)
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~allowed, lowest).softmax(1) * allowed


def read_dictionary(query, keys, values, root, allowed=None):
    """Eq. (7): F̃ = softmax(Q Kᵀ / √d) V → F̃ (B,C,n,n), weights (B,M); see attention."""
    weights = attention(query, keys, root, allowed)
    reading = weights @ values.flatten(1)
    return reading.view(len(query), *values.shape[1:]), weights


def read_best(query, keys, values, root, allowed):
    """Row "w/o T" of Table 3: the one value with the highest score → F̃, weights 0 or 1.

    The choice has no gradient; backward it counts as the softmax (straight-through), so
    that queries and keys are learned.
    """
    weights = attention(query, keys, root, allowed)
    best = F.one_hot(weights.argmax(1), len(keys)).to(weights)
    weights = best + (weights - weights.detach())
    reading = weights @ values.flatten(1)
    return reading.view(len(query), *values.shape[1:]), weights


class IdentityScore(nn.Module):
    """Eq. (8): F̃^d = M_Id F̃^s + (1 − M_Id) F̃^g, with M_Id from F^d, F̃^s and F̃^g.

    All (B,C,n,n). M_Id begins around 1/2.
    """

    def __init__(self, channels, bounded=True):
        super().__init__()
        self.bounded = bounded
        third = channels // 3
        self.reduce = nn.ModuleList(pair(channels, third) for _ in range(3))
        self.score = begin_at(pair(3 * third, channels), 0.0 if bounded else 0.5)

    def forward(self, part, specific, generic):
        inputs = part, specific, generic
        reduced = [reduce(x) for reduce, x in zip(self.reduce, inputs)]
        score = self.score(torch.cat(reduced, 1))
        if self.bounded:
            score = score.sigmoid()
        return score * specific + (1 - score) * generic, score


class ConfidenceScore(nn.Module):
    """Eq. (9): F̂^d = F^d + F̃^d · F_Con(F̃^d − F^d). All (B,C,n,n).

    F_Con begins by trusting the degraded face: around 0, bounded around 0.12.
    """

    def __init__(self, channels, bounded=True):
        super().__init__()
        self.bounded = bounded
        self.score = begin_at(pair(channels, channels), -2.0 if bounded else 0.0)

    def forward(self, part, reading):
        score = self.score(reading - part)
        if self.bounded:
            score = score.sigmoid()
        return part + reading * score


class DictionaryTransform(nn.Module):
    """Figure 2 at one scale: crop, query, read dictionaries, mix, confidence, paste."""

    def __init__(self, scale, cfg):
        super().__init__()
        self.cfg = cfg
        self.scale = scale
        self.stride = 2**scale
        self.sizes = cfg.component_sizes[scale - 1]
        self.root = math.sqrt(cfg.temperature)
        channels = cfg.widths[scale - 1]
        self.query = nn.ModuleDict()
        self.identity = nn.ModuleDict()
        self.confidence = nn.ModuleDict()
        for component in cfg.components:
            self.query[component] = pair(channels, channels // 4)
            if cfg.items and cfg.references and cfg.transform:
                self.identity[component] = IdentityScore(channels, cfg.bounded)
            self.confidence[component] = ConfidenceScore(channels, cfg.bounded)

    def read(self, component, part, generic, specific, allowed):
        """F̃^d of one component, and what was read.

        part (B,C,n,n); generic, specific: (keys, values) or None; allowed (B,M): the
        specific items that a face may read → F̃^d (B,C,n,n), {"generic": weights (B,Y),
        "specific": weights (B,M), "identity": score (B,C,n,n)}, as far as there are any.
        """
        query = self.query[component](part)
        if not self.cfg.transform:
            return self.read_one_item(query, generic, specific, allowed)
        if specific is None:
            reading, weights = read_dictionary(query, *generic, self.root)
            return reading, {"generic": weights}
        own, own_weights = read_dictionary(query, *specific, self.root, allowed)
        if generic is None:
            return own, {"specific": own_weights}
        reading, weights = read_dictionary(query, *generic, self.root)
        mixed, score = self.identity[component](part, own, reading)
        known = allowed.any(1)[:, None, None, None]      # without references F̃^d is F̃^g
        return torch.where(known, mixed, reading), {
            "generic": weights, "specific": own_weights, "identity": score}

    def read_one_item(self, query, generic, specific, allowed):
        """What `read` gives in row "w/o T": the best item of both dictionaries."""
        keys, values = generic
        count = len(keys)
        readable = torch.ones(len(query), count, dtype=torch.bool, device=query.device)
        if specific is not None:
            keys = torch.cat([keys, specific[0]])
            values = torch.cat([values, specific[1]])
            readable = torch.cat([readable, allowed], 1)
        reading, weights = read_best(query, keys, values, self.root, readable)
        return reading, {"generic": weights[:, :count], "specific": weights[:, count:]}

    def forward(self, features, boxes, generic, specific, allowed):
        """features (B,C,h,w), boxes (B,parts,4), both dictionaries or None → enriched
        features, what was read of each component."""
        parts = crop_components(features, boxes, self.stride, self.sizes)
        changes = []
        readings = {}
        for component, part in zip(self.cfg.components, parts):    # their sizes differ
            name = f"scale{self.scale}_{component}"
            reading, readings[component] = self.read(
                component, part, generic and generic[name], specific and specific[name],
                allowed)
            changes.append(self.confidence[component](part, reading) - part)
        change = paste_components(changes, boxes, self.stride, features.shape[2:])
        change = change.to(features.dtype, memory_format=torch.channels_last)
        return features + change, readings


class MSDilate(nn.Module):
    """The decoder's start: four dilated pairs of convolutions, fused, plus the input."""

    def __init__(self, channels):
        super().__init__()
        self.branches = nn.ModuleList(
            pair(channels, channels, dilations=(d, d)) for d in (4, 3, 2, 1))
        self.fuse = convolution(4 * channels, channels)

    def forward(self, x):
        return x + self.fuse(torch.cat([branch(x) for branch in self.branches], 1))


class SFTStage(nn.Module):
    """A decoder stage with Eq. (10): F^out = α · F^decoder + β.

    α and β come from the enriched features by two convolutions each, and begin around 1
    and 0. x, skip (B,before,h,w) → (B,after,2h,2w).
    """

    def __init__(self, before, after):
        super().__init__()
        self.reduce = pair(before, after)
        self.scale = begin_at(pair(before, after), 1)
        self.shift = pair(before, after)
        self.widen = pair(after, after)

    def forward(self, x, skip):
        x = F.leaky_relu(self.reduce(x), 0.2, inplace=True)
        x = self.scale(skip) * x + self.shift(skip)
        return self.widen(F.interpolate(x, scale_factor=2, mode="bilinear"))


class DMDNet(nn.Module):
    """Eq. (1) and (5): Î^h = F(I^d | Dic^g, Dic^s; Θ).

    degraded (B,3,H,W) in [-1,1], boxes (B,4,4) → restored (B,3,H,W). references (M,3,H,W)
    with reference_boxes (M,4,4) are those of all faces; owner (M,) says whose each is,
    None: all faces read all. `generic` stands in for the network's own dictionary.
    """
    transform = DictionaryTransform
    memory = MemoryExtractor

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.readings = {}                             # of the last call, for pictures
        fine, middle, coarse = cfg.widths
        self.extract = Extractor(cfg)
        self.transforms = nn.ModuleDict(
            {f"scale{scale}": self.transform(scale, cfg) for scale in cfg.scales})
        self.extract_specific = self.memory(cfg) if cfg.references else None
        self.context = MSDilate(coarse)
        self.stages = nn.ModuleList(
            [SFTStage(coarse, middle), SFTStage(middle, fine), SFTStage(fine, fine)])
        blocks = [Residual(fine) for _ in range(cfg.paint_blocks)]
        self.paint = nn.Sequential(convolution(fine, fine), nn.LeakyReLU(0.2), *blocks,
                                   convolution(fine, 3))
        if cfg.residual:
            nn.init.zeros_(self.paint[-1].weight)
        if cfg.spectral:
            normalise(self)

        # Θ_Dic^g of Eq. (5): noise, until the first stage fills it.
        self.generic_keys = nn.ParameterDict()
        self.generic_values = nn.ParameterDict()
        for scale in cfg.scales if cfg.items else ():
            width = cfg.widths[scale - 1]
            for component, side in zip(cfg.components, cfg.component_sizes[scale - 1]):
                name = f"scale{scale}_{component}"
                self.generic_keys[name] = torch.randn(cfg.items, width // 4, side, side)
                self.generic_values[name] = torch.randn(cfg.items, width, side, side)

    def generic_dictionary(self):
        """Dic^g, None without items."""
        names = list(self.generic_keys)
        return {name: (self.generic_keys[name], self.generic_values[name])
                for name in names} or None

    @torch.no_grad()
    def set_generic_dictionary(self, dictionary):
        """Take over keys and values."""
        for name, (keys, values) in dictionary.items():
            self.generic_keys[name].copy_(keys)
            self.generic_values[name].copy_(values)

    def boxes(self, landmarks):
        """Boxes (B,4,4) in pixels around the COMPONENTS of landmarks (B,68,2)."""
        return common.component_boxes(landmarks, self.cfg.size)

    def forward(self, degraded, boxes, references=None, reference_boxes=None, owner=None,
                generic=None):
        specific = None
        if references is not None and len(references):
            specific = self.extract_specific(references, reference_boxes)       # Eq. (6)
        return self.read_and_paint(degraded, boxes, specific, owner, generic)

    def read_and_paint(self, degraded, boxes, specific=None, owner=None, generic=None):
        """forward, given the references' specific dictionary in place of the references."""
        generic = generic or self.generic_dictionary()
        allowed = specific and allowed_items(specific, owner, len(degraded))
        boxes = part_boxes(self.cfg, boxes)
        features = self.extract(degraded)
        self.readings = {}
        x = self.context(features[2])
        for stage, scale in zip(self.stages, (3, 2, 1)):         # from coarse to fine
            skip = features[scale - 1]
            name = f"scale{scale}"
            if name in self.transforms and (generic or specific):
                # Scores want float32; and bfloat16 would cast all items in every call.
                with torch.autocast(skip.device.type, enabled=False):
                    skip, self.readings[name] = self.transforms[name](
                        skip, boxes, generic, specific, allowed)
            x = stage(x, skip)
        image = self.paint(x).float()
        return degraded + image if self.cfg.residual else torch.tanh(image)


def allowed_items(specific, owner, faces):
    """(faces,M): True where an item is of the face's own person, all that it may read."""
    keys, _ = next(iter(specific.values()))
    if owner is None:
        return torch.ones(faces, len(keys), dtype=torch.bool, device=keys.device)
    return owner == torch.arange(faces, device=owner.device)[:, None]


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
    """The three D_r, r = 1, 2, 4: image (B,3,H,W) → their three score maps."""

    def __init__(self, width):
        super().__init__(Discriminator(width) for _ in range(3))

    def forward(self, image):
        return [net(F.avg_pool2d(image, r)) for net, r in zip(self, (1, 2, 4))]


# 4. Losses ----------------------------------------------------------------------------

def pixel_loss(restored, target):
    """Eq. (11): ‖Î^h − I^gt‖² / (C H W), a mean over the batch."""
    return F.mse_loss(restored.float(), target.float())


def perceptual_loss(features, target_features):
    """Eq. (12): Σ_i ‖Φ_i(Î^h) − Φ_i(I^gt)‖² / (C_i H_i W_i), a mean over the batch."""
    return sum(F.mse_loss(a.float(), b.float())
               for a, b in zip(features, target_features))


def reconstruction_losses(restored, target, features, target_features, cfg):
    """Eq. (13): the two terms of L_rec = λ_mse L_mse + λ_perc L_perc, by name."""
    perceptual = perceptual_loss(features, target_features)
    return {"pixel": cfg.weight_pixel * pixel_loss(restored, target),
            "perceptual": cfg.weight_perceptual * perceptual}


def gram_matrix(maps):
    """ΦᵀΦ / (C h w), Φ of h·w rows: (B,C,h,w) → (B,C,C), in float32."""
    with torch.autocast(maps.device.type, enabled=False):
        rows = maps.float().flatten(2)
        return rows @ rows.transpose(1, 2) / maps[0].numel()


def style_loss(features, target_features):
    """Eq. (14): Σ_i ‖Φ_iᵀ Φ_i − Φ_i'ᵀ Φ_i'‖², a mean over the batch.

    The printed factor 1 / (C_i H_i W_i) stands inside the norm, as in Johnson et al.
    (2016): see gram_matrix. Outside, the loss grows with the area and drowns all others.
    """
    loss = 0
    for a, b in zip(features, target_features):
        difference = (gram_matrix(a) - gram_matrix(b)).square().sum((1, 2))
        loss = loss + difference.mean()
    return loss


def discriminator_loss(real, fake):
    """Eq. (15): −Σ_r E[min(0, D_r(I_↓r) − 1)] + E[min(0, −1 − D_r(Î_↓r))].

    The paper's L_D is what D maximises; this is its negative. real, fake: score maps.
    """
    return sum(F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean()
               for r, f in zip(real, fake))


def adversarial_loss(fake, weights):
    """Eq. (16): −Σ_r λ_a,r E[D_r(Î_↓r)], λ_a,r inside the sum, as its index asks for."""
    return -sum(w * f.float().mean() for w, f in zip(weights, fake))


def photo_realistic_losses(features, target_features, fake, cfg):
    """Eq. (17): the two terms of L_real = λ_style L_style + L_G, by name."""
    return {"style": cfg.weight_style * style_loss(features, target_features),
            "adversarial": adversarial_loss(fake, cfg.weight_adversarial)}


# 5. Data ------------------------------------------------------------------------------

def with_references(faces, i, count, generator):
    """Picture i and up to `count` others of the person, at random → images (1+N,3,H,W),
    landmarks (1+N,68,2)."""
    others = faces.others(i)
    if not others or not count:
        return common.stack_faces(faces, [i])
    order = torch.randperm(len(others), generator=generator)[:count].tolist()
    return common.stack_person(faces, [i, *(others[k] for k in order)])


def choose_generic(faces, pictures, items):
    """The Y pictures of Eq. (2): one of each person, then a second of each, and so on; from
    the start again where there are fewer than Y."""
    people = {}
    for i in pictures:
        people.setdefault(int(faces.identity[i]), []).append(i)
    turns = itertools.zip_longest(*people.values())
    chosen = [i for turn in turns for i in turn if i is not None]
    return [chosen[y % len(chosen)] for y in range(items)]


class Batches(torch.utils.data.Dataset):
    """Training batch number `step`, from 0: a dict of tensors.

    degraded, target (B,3,H,W), boxes (B,4,4); references (M,3,H,W) of 0 to cfg.drawn a
    face, with reference_boxes and owner (M,); in the first two stages sharp faces for the
    generic dictionary with sharp_boxes, in the first their places in it.

    Every face draws from a random stream of its own, (seed, step, place in the whole batch):
    resuming, or more processes of smaller batches, changes nothing.
    """

    def __init__(self, faces, indices, cfg):
        self.faces = faces
        self.indices = indices
        self.cfg = cfg
        self.first = common.rank() * cfg.batch
        # In the first two stages one half of the pictures is written into the dictionary,
        # the other restored.
        order = torch.randperm(len(indices), generator=common.seeded(cfg.seed, 3))
        shuffled = [indices[k] for k in order.tolist()]
        half = (len(shuffled) + 1) // 2
        self.written = shuffled[:half]
        self.restored = shuffled[half:] or shuffled
        self.generic = choose_generic(faces, self.written, cfg.items)

    def sample(self, step, place):
        """One face: degraded (3,H,W); sharp with its references behind, (1+N,3,H,W), and
        boxes (1+N,4,4)."""
        cfg = self.cfg
        generator = common.seeded(cfg.seed, 1, step, place)
        stage = stage_of(step + 1, cfg)
        pictures = self.restored if stage < 2 else self.indices
        i = pictures[torch.randint(len(pictures), (), generator=generator).item()]
        most = min(cfg.drawn, cfg.references) if stage > 0 else 0
        count = torch.randint(most + 1, (), generator=generator).item()
        images, landmarks = with_references(self.faces, i, count, generator)
        images, landmarks = common.augment(images, landmarks, generator, cfg.shift,
                                           cfg.jitter)
        degradation = common.DEGRADATIONS[cfg.degradation]
        degraded = common.degrade(images[:1], degradation, generator)
        return degraded[0], images, common.component_boxes(landmarks, cfg.size)

    def faces_to_write(self, step):
        """The pictures that a step writes into the generic dictionary, and their items; in
        the second stage Eq. (3) finds the items: None. All processes write the same."""
        cfg = self.cfg
        if stage_of(step + 1, cfg) == 0:
            count = min(cfg.renewed, cfg.items)
            places = (step * cfg.renewed + torch.arange(count)) % cfg.items
            return [self.generic[y] for y in places], places
        generator = common.seeded(cfg.seed, 2, step)
        chosen = torch.randint(len(self.written), (cfg.renewed,), generator=generator)
        return [self.written[k] for k in chosen], None

    def __getitem__(self, step):
        samples = [self.sample(step, self.first + k) for k in range(self.cfg.batch)]
        degraded, images, boxes = zip(*samples)
        owner = [face for face, those in enumerate(images) for _ in those[1:]]
        batch = {"degraded": torch.stack(degraded),
                 "target": torch.stack([those[0] for those in images]),
                 "boxes": torch.stack([those[0] for those in boxes]),
                 "references": torch.cat([those[1:] for those in images]),
                 "reference_boxes": torch.cat([those[1:] for those in boxes]),
                 "owner": torch.tensor(owner, dtype=torch.long)}
        if stage_of(step + 1, self.cfg) < 2:
            pictures, places = self.faces_to_write(step)
            batch["sharp"], landmarks = common.stack_faces(self.faces, pictures)
            batch["sharp_boxes"] = common.component_boxes(landmarks, self.cfg.size)
            if places is not None:
                batch["places"] = places
        return batch


# 6. Training --------------------------------------------------------------------------

@torch.no_grad()
def fill_generic(net, memory, data, precision):
    """All items of the generic dictionary by the latest F_gen."""
    device = next(net.parameters()).device
    for places in torch.arange(net.cfg.items).split(16):
        pictures = [data.generic[y] for y in places]
        images, landmarks = common.stack_faces(data.faces, pictures)
        images = images.to(device, memory_format=torch.channels_last)
        boxes = net.boxes(landmarks).to(device)
        with common.autocast(device, precision):
            filled = memory(net.generic_dictionary(), images, boxes, places.to(device))
        net.set_generic_dictionary(filled)


def begin_stage(step, run, net, memory, data, optimizer):
    """The stage of a step, prepared where it begins: Section 3.1."""
    cfg = net.cfg
    stage = stage_of(step, cfg)
    items = optimizer.param_groups[1]
    for item in items["params"]:
        item.requires_grad_(stage == 2)
    before = stage_of(step - 1, cfg) if step > 1 else None
    if stage == before:
        return stage
    run.say(f"step {step}: {STAGES[stage]}")
    run.forget_best()                              # losses of two stages cannot be compared
    if before == 0 and net.extract_specific is not None:
        net.extract_specific.load_state_dict(memory.extract.state_dict())
    if 0 in (before, stage):
        fill_generic(net, memory, data, run.args.precision)
    if stage == 2:                                 # η is not reduced by plateaus before
        items["times"] = cfg.dictionary_rate / (cfg.learning_rate * run.factor)
    return stage


def parameter_groups(net, memory):
    """What Adam learns: Θ, Θ_gen and γ; and Θ_Dic^g, which has a rate of its own."""
    learned = [w for name, w in net.named_parameters() if "generic_" not in name]
    items = [*net.generic_keys.values(), *net.generic_values.values()]
    return [{"params": [*learned, *memory.parameters()]}, {"params": items}]


def train(cfg, args):
    """Train on args.data, write the run into args.folder; see Config for every number."""
    cfg = replace(cfg, stage_ends=stage_ends(cfg))
    faces = common.load_faces(args, cfg)
    people, validation, test = common.split_identities(faces)
    validation = common.spread(validation, cfg.validated)
    test = common.spread(test, cfg.tested)
    encoder = common.load_encoder(cfg.encoder, args, faces)
    data = Batches(faces, people, cfg)

    torch.manual_seed(cfg.seed)
    net = common.channels_last(DMDNet(cfg), args.device)
    memory = common.channels_last(GenericMemory(cfg), args.device)
    discriminators = Discriminators(cfg.discriminator_width)
    discriminators.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(parameter_groups(net, memory), betas=cfg.betas, fused=True)
    optimizer_d = torch.optim.Adam(discriminators.parameters(), betas=cfg.betas, fused=True)
    run = common.Run(SCRIPT, cfg, args, faces, {"encoder": encoder}, net=net, memory=memory,
                     discriminators=discriminators, optimizer=optimizer, optimizer_d=optimizer_d,
                     run_id=args.state["run_id"] if args.resume else uuid.uuid4().hex)
    forward, forward_m = common.parallel(net, memory, find_unused=True)
    forward_d, = common.parallel(discriminators)

    for step, batch in run.batches(data):
        stage = begin_stage(step, run, net, memory, data, optimizer)
        common.set_rate(cfg.rate(step) * run.factor, optimizer, optimizer_d)

        # Generator
        discriminators.requires_grad_(False)
        with common.autocast(args.device, args.precision):
            generic = None if stage > 1 else forward_m(                 # Eq. (2) or (3)
                net.generic_dictionary(), batch["sharp"], batch["sharp_boxes"],
                batch.get("places"))
            restored = forward(batch["degraded"], batch["boxes"], batch["references"],
                               batch["reference_boxes"], batch["owner"], generic)
            features = encoder.features(restored), encoder.features(batch["target"])
            losses = reconstruction_losses(restored, batch["target"], *features, cfg)
            losses |= photo_realistic_losses(*features, discriminators(restored), cfg)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()                                 # Eq. (18)
        if cfg.clip is not None:
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], cfg.clip)
        optimizer.step()                                        # on the items: Eq. (4)
        if generic is not None:
            net.set_generic_dictionary(generic)

        # Discriminators
        discriminators.requires_grad_(True)
        with common.autocast(args.device, args.precision):
            real = forward_d(batch["target"])
            fake = forward_d(restored.detach())
            losses["discriminator"] = discriminator_loss(real, fake)    # Eq. (15)
        optimizer_d.zero_grad(set_to_none=True)
        losses["discriminator"].backward()
        optimizer_d.step()

        run.log(step, losses)
        if run.due(step):
            run.save(step, validate(net, encoder, faces, validation, cfg, stage))

    common.report(run, evaluate(net, faces, test, cfg, args),
                  samples(net, faces, test, cfg, args.precision))


@torch.inference_mode()
def validate(net, encoder, faces, indices, cfg, stage):
    """Reconstruction loss, Eq. (13), and PSNR in dB on held-out faces, degraded alike;
    without references in the first stage."""
    device = next(net.parameters()).device
    cfg = cfg if stage > 0 else replace(cfg, references=0)
    loss, quality = 0.0, 0.0
    for batch in restored_batches(net, faces, indices, cfg, None):
        restored, target = batch["restored"].to(device), batch["target"].to(device)
        with common.autocast(device):
            features = encoder.features(restored), encoder.features(target)
            losses = reconstruction_losses(restored, target, *features, cfg)
        loss += sum(losses.values()).item() * len(target)
        quality += common.psnr(restored, target).sum().item()
    return {"validation": loss / len(indices), "validation_psnr": quality / len(indices)}


def samples(net, faces, indices, cfg, precision="auto"):
    """Pictures of six held-out faces, degraded ×4, and of what they read."""
    six = common.spread(indices, 6)
    batch = next(restored_batches(net, faces, six, cfg, 4, precision=precision))
    pictures = {}
    shown = {"degraded": batch["degraded"]}
    if len(batch["references"]):
        shown["a reference"] = torch.ones_like(batch["target"])        # white without any
        for face, reference in zip(batch["owner"].tolist(), batch["references"]):
            shown["a reference"][face] = reference
        pictures["readings.png"] = draw_readings(net, batch)
    shown |= {"restored": batch["restored"], "target": batch["target"]}
    pictures["samples.png"] = common.comparison_grid(shown)
    return pictures


def draw_readings(net, batch):
    """A row a face: degraded; its references, each with the weight that eyes, nose and
    mouth give it at the finest scale, Eq. (7); restored, with the mean of Eq. (8)."""
    readings = net.readings.get(f"scale{min(net.cfg.scales, default=0)}", {})
    owner, count = batch["owner"], len(batch["target"])
    widest = owner.bincount().max().item()
    figure = matplotlib.figure.Figure(figsize=(1.7 * (2 + widest), 2.3 * count),
                                      layout="constrained")
    axes = figure.subplots(count, 2 + widest, squeeze=False)

    def show(axis, image, values=None):
        axis.imshow(common.to_uint8(image).permute(1, 2, 0).numpy())
        lines = [f"{name.replace('_', ' ')} {value:.2f}"
                 for name, value in (values or {}).items()]
        axis.set_title("\n".join(lines), fontsize=7)

    for face, row in enumerate(axes):
        show(row[0], batch["degraded"][face])
        for axis, item in zip(row[1:], torch.nonzero(owner == face)[:, 0].tolist()):
            show(axis, batch["references"][item],
                 {name: read["specific"][face, item] for name, read in readings.items()})
        scores = {f"identity score, {name}": read["identity"][face].mean()
                  for name, read in readings.items() if "identity" in read}
        show(row[-1], batch["restored"][face], scores)
        for axis in row:
            axis.axis("off")
    return figure


# 7. Restoration -----------------------------------------------------------------------

def specific_dictionary(net, references, landmarks, batch=8, precision="auto"):
    """Eq. (6): sharp faces (N,3,size,size) of a person, landmarks (N,68,2) → the person's
    dictionary, on the network's device. Another picture is another item; nothing is
    trained."""
    if net.extract_specific is None:
        raise InputError(f"a network of --variant {net.cfg.variant} has no specific "
                         "dictionary; restore without references")
    boxes = net.boxes(landmarks)
    with common.inference(net, precision) as device:

        def some(part):
            images = references[part].to(device, memory_format=torch.channels_last)
            dictionary = net.extract_specific(images, boxes[part].to(device))
            return [tensor for items in dictionary.values() for tensor in items]

        tensors = iter(common.in_batches(some, len(references), batch))
        return {name: (next(tensors), next(tensors))
                for name in net.extract_specific.keys}


def restore(net, degraded, landmarks, specific=None, owner=None, batch=8,
            precision="auto"):
    """Restore faces: degraded (N,3,size,size) in [-1,1], landmarks (N,68,2) → the same
    shape in [-1,1], on the CPU. specific: the dictionary of their person, or of all their
    people, with the `owner` (M,) of each item."""
    boxes = net.boxes(landmarks)
    with common.inference(net, precision) as device:

        def some(part):
            images = degraded[part].to(device, memory_format=torch.channels_last)
            whose = None if owner is None else owner.to(device) - part.start
            restored = net.read_and_paint(images, boxes[part].to(device), specific, whose)
            return restored.float().clamp(-1, 1).cpu()

        return common.in_batches(some, len(degraded), batch)


def restored_batches(net, faces, indices, cfg, scale, batch=16, precision="auto",
                     mistaken=False):
    """Held-out faces in batches, {"faces" (their indices), "degraded", "restored",
    "target"} and their references (M,3,H,W) with owner (M,); `mistaken`: the references
    are somebody else's."""
    def people_of(some):
        return [with_references(faces, i, cfg.references, common.seeded(cfg.seed, 5, i))
                for i in some]

    for start in range(0, len(indices), batch):
        some = indices[start:start + batch]
        people = people_of(some)
        target = torch.stack([images[0] for images, _ in people])
        landmarks = torch.stack([points[0] for _, points in people])
        if mistaken:
            people = people_of(common.stranger(faces, indices, i) for i in some)
        owner = [face for face, (images, _) in enumerate(people) for _ in images[1:]]
        references = torch.cat([images[1:] for images, _ in people])
        owner = torch.tensor(owner, dtype=torch.long)
        specific = None
        if len(references):
            points = torch.cat([points[1:] for _, points in people])
            specific = specific_dictionary(net, references, points, batch, precision)
        degradation = common.DEGRADATIONS[cfg.degradation]
        degraded = common.degrade_each(target, degradation, scale, cfg.seed, some)
        restored = restore(net, degraded, landmarks, specific, owner, batch, precision)
        yield {"faces": torch.tensor(some), "degraded": degraded, "restored": restored,
               "target": target, "references": references, "owner": owner}


def evaluate(net, faces, indices, cfg, args):
    """The paper's ×4 and ×8 and random scales on held-out faces → "test" of result.json.

    Restored with all references of each face; in further columns with none, and with
    somebody else's.
    """
    metrics = common.metrics(faces, args)
    fid = common.load_fid(args)
    ways = {"restored": (cfg, False)}                              # Config, mistaken
    if cfg.references:
        ways["without_references"] = replace(cfg, references=0), False
        if len(faces.identity[indices].unique()) > 1:
            ways["stranger"] = cfg, True
    table = {}
    for task, scale in common.TASKS.items():
        batches = {way: restored_batches(net, faces, indices, one, scale,
                                         precision=args.precision, mistaken=mistaken)
                   for way, (one, mistaken) in ways.items()}
        table[task] = common.measure(batches, metrics, fid)
    return table


def for_restoration(net, device, precision="auto"):
    """The network made ready to restore with, for good: see common.for_inference.

    Θ_spe keeps its precision, so that a stored dictionary fits whatever --precision is;
    so do the transforms, which work in float32.
    """
    exact = "extract_specific", "transforms"
    return common.for_inference(net, device, precision, exact)


def load_network(args):
    """The network of the checkpoint, and its Config."""
    cfg = common.recorded_config(args, Config)
    net = DMDNet(cfg)
    common.load_part(net, args.state, "net")
    return net, cfg


def person_of(net, args):
    """The specific dictionary of the person of --dictionary, of --reference, or of both
    together, and the faces in it, uint8 (N,3,size,size); None, None without any.

    A stored one (--save-dictionary) fits the network that made it: a run at its step, or
    the authors'.
    """
    known, faces = None, None
    maker = "released"
    if args.state is not None:
        maker = f"{args.state['run_id']}, step {args.state['step']}"
    if args.dictionary is not None:
        advice = "make one with --save-dictionary and this network"
        state = common.load_weights(args.dictionary, args.device, advice)
        whole = isinstance(state, dict) and "faces" in state
        if not whole or state.get("maker") != maker:
            raise InputError(f"{args.dictionary}: not a dictionary that this network made; "
                             f"{advice}")
        known, faces = state["dictionary"], state["faces"].cpu()
    if args.reference is None:
        return known, faces
    size = net.cfg.size
    references, landmarks, files = common.read_references(args.reference, size, args)
    specific = specific_dictionary(net, references, landmarks, precision=args.precision)
    print(f"guided by {len(files)} pictures: {', '.join(map(str, files))}")
    new = common.to_uint8(references)
    if known is not None:
        specific = {name: tuple(torch.cat(both) for both in zip(known[name], items))
                    for name, items in specific.items()}
        new = torch.cat([faces, new])
    if args.save_dictionary is not None:
        stored = {"maker": maker, "dictionary": specific, "faces": new}
        common.save_checkpoint(Path(args.save_dictionary), stored)
        print(f"{args.save_dictionary}: {len(new)} references")
    return specific, new


def readings_of(net, degraded, landmarks, specific, faces, precision="auto"):
    """For --check: each face by the generic memory alone, and for each component the
    reference that it reads most, Eq. (7), at the finest scale."""
    shown = {"generic memory": restore(net, degraded, landmarks, precision=precision)}
    for face in range(len(degraded)):                   # net.readings are of one call alone
        one = slice(face, face + 1)
        restore(net, degraded[one], landmarks[one], specific, precision=precision)
        readings = net.readings.get(f"scale{min(net.cfg.scales, default=0)}", {})
        for component, read in readings.items():
            most = read["specific"][0].argmax().item()
            title = f"for the {component.replace('_', ' ')}"
            shown.setdefault(title, []).append(faces[most].float() / 127.5 - 1)
    return {title: pictures if torch.is_tensor(pictures) else torch.stack(pictures)
            for title, pictures in shown.items()}


# 8. Command line ----------------------------------------------------------------------

def main(argv=None):
    parser = common.arguments(__doc__, PRESETS, VARIANTS)
    common.add_fid(parser)
    parser.add_argument("--reference", metavar="PATH",
                        help="sharp pictures of the same person, a folder or one")
    parser.action.add_argument("--save-dictionary", metavar="FILE",
                               help="store the dictionary of the person of --reference")
    parser.add_argument("--dictionary", metavar="FILE",
                        help="the same person's dictionary, stored by --save-dictionary; "
                             "--reference adds to it")
    args = common.parse(parser, argv, SCRIPT)
    if args.save_dictionary and not args.reference:
        raise InputError("--save-dictionary wants --reference: pictures of a person")
    if args.train:
        for run in common.planned_runs(args, SCRIPT, PRESETS, VARIANTS, CLAIMS, PAPER_FIGURES):
            cfg = common.chosen_config(run, PRESETS, VARIANTS)
            common.check_size(cfg.size, 16)
            train(cfg, run)
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
    person, faces = person_of(net, args)
    if args.save_dictionary:
        return 0

    def restore_crops(crops, landmarks, files):
        restored = restore(net, crops, landmarks, person, precision=args.precision)
        if person is None or not args.check:
            return restored, {}
        return restored, readings_of(net, crops, landmarks, person, faces, args.precision)

    return 1 if common.restore_files(args, cfg.size, restore_crops) else 0


# 9. Released network ------------------------------------------------------------------
# What the authors' published weights were trained as differs from the paper: the nose is
# left out, boxes are cut at whole features instead of RoIAlign, later components go over
# earlier ones, d of Eq. (7) is the number of items, and what is read is brought to the
# component's statistics by AdaIN before Eq. (9).

def released_boxes(landmarks):
    """The authors' boxes: (B,68,2) in pixels of 512×512 → (B,4,4), whole pixels."""
    points = landmarks.clamp(8, 504)

    def box(centre, above, below):
        half = (above + below) / 2
        x, y = centre.unbind(1)
        return torch.stack([x - half + 1, y - above + 1, x + half, y + below], 1)

    def eye(those, brow):
        centre = those.mean(1)
        top = torch.cat([those, brow], 1)[..., 1].amin(1)
        above = 1.3 * (centre[:, 1] - top)
        return box(centre, above, above / 1.9)

    nose = points[:, 29:36].mean(1)
    left, right = nose[:, 0] - points[:, 31, 0], points[:, 35, 0] - nose[:, 0]
    width = 2.5 * torch.maximum(left, right)
    below = 1.1 * (points[:, 33, 1] - nose[:, 1])

    mouth = points[:, 48:]
    extent = (mouth.amax(1) - mouth.amin(1)).amax(1)
    half = 1.1 * (extent / 2).clamp(min=16)
    mouth_box = box(mouth.mean(1), half, half)
    mouth_box[:, 2:].clamp_(max=510)
    return torch.stack([eye(points[:, 36:42], points[:, 17:22]),
                        eye(points[:, 42:48], points[:, 22:27]),
                        box(nose, width - below, below), mouth_box], 1).trunc()


def whole_corners(box, stride, side):
    """Boxes (B,4) in pixels → [[x1, y1, x2, y2], …] in whole features, at least one."""
    low = (box[:, :2].long() // stride).clamp(0, side - 1)
    high = (box[:, 2:].long() // stride).clamp(max=side)
    return torch.cat([low, torch.maximum(high, low + 1)], 1).tolist()


def cut_components(features, boxes, stride, sizes):
    """crop_components at whole features: slices, resampled one by one."""
    parts = []
    for box, size in zip(boxes.unbind(1), sizes):
        cut = []
        corners = whole_corners(box, stride, features.shape[-1])
        for k, (x1, y1, x2, y2) in enumerate(corners):
            piece = features[k:k + 1, :, y1:y2, x1:x2].float()
            cut.append(F.interpolate(piece, (size, size), mode="bilinear"))
        parts.append(torch.cat(cut))
    return parts


def adain(reading, part):
    """(F̃ − μ(F̃)) / σ(F̃) · σ(F^d) + μ(F^d), each channel by itself; (B,C,n,n)."""
    variance, mean = torch.var_mean(reading, (2, 3), keepdim=True)
    own_variance, own_mean = torch.var_mean(part, (2, 3), keepdim=True)
    normalised = (reading - mean) / (variance + 1e-5).sqrt()
    return normalised * (own_variance + 1e-5).sqrt() + own_mean


class ReleasedExtractor(MemoryExtractor):
    crop = staticmethod(cut_components)


class ReleasedTransform(DictionaryTransform):
    """DictionaryTransform with whole-feature boxes, √items in Eq. (7), and AdaIN."""

    def read(self, component, part, generic, specific, allowed):
        query = self.query[component](part)
        reading, weights = read_dictionary(query, *generic, math.sqrt(self.cfg.items))
        read = {"generic": weights}
        if specific is not None:
            root = allowed.sum(1, keepdim=True).clamp(min=1).sqrt()
            own, read["specific"] = read_dictionary(query, *specific, root, allowed)
            mixed, read["identity"] = self.identity[component](part, own, reading)
            reading = torch.where(allowed.any(1)[:, None, None, None], mixed, reading)
        return adain(reading, part), read

    def forward(self, features, boxes, generic, specific, allowed):
        enriched = features.clone()
        readings = {}
        parts = cut_components(features, boxes, self.stride, self.sizes)
        for component, part, box in zip(self.cfg.components, parts, boxes.unbind(1)):
            name = f"scale{self.scale}_{component}"
            reading, readings[component] = self.read(
                component, part, generic[name], specific and specific[name], allowed)
            changed = self.confidence[component](part, reading)
            corners = whole_corners(box, self.stride, features.shape[-1])
            for k, (x1, y1, x2, y2) in enumerate(corners):
                size = y2 - y1, x2 - x1
                pasted = F.interpolate(changed[k:k + 1], size, mode="bilinear")
                enriched[k:k + 1, :, y1:y2, x1:x2] = pasted.to(enriched.dtype)
        return enriched, readings


class ReleasedDMDNet(DMDNet):
    """degraded (B,3,512,512) in [-1,1], boxes (B,4,4) of `boxes`; where there are any,
    references (B,N,3,512,512) and reference_boxes (B,N,4,4) → restored (B,3,512,512)."""
    transform = ReleasedTransform
    memory = ReleasedExtractor

    def boxes(self, landmarks):
        return released_boxes(landmarks)

    def forward(self, degraded, boxes, references=None, reference_boxes=None):
        if references is None:
            return super().forward(degraded, boxes)
        faces, count = references.shape[:2]
        owner = torch.arange(faces, device=references.device).repeat_interleave(count)
        return super().forward(degraded, boxes, references.flatten(0, 1),
                               reference_boxes.flatten(0, 1), owner)


def official_names():
    """[(names in DMDNet.pth, names here)], patterns as for common.renamed."""
    table = [
        (r"E_hq\..*_Q\..*", None),                       # F_spe's queries are not used
        (r"MSDilate\.convi\.(.*)", r"context.fuse.\1"),
        (r"up4\.(\d)\.Model\.(.*)", r"paint.\1.body.\2"),
        (r"up4\.(.*)", r"paint.\1"),
    ]
    for k in range(4):
        table.append((rf"MSDilate\.conv{k + 1}\.(.*)", rf"context.branches.{k}.\1"))
    for k in range(3):
        table += [
            (rf"up{k + 1}\.conv1\.(.*)", rf"stages.{k}.reduce.\1"),
            (rf"up{k + 1}\.ScaleModel1\.(.*)", rf"stages.{k}.scale.\1"),
            (rf"up{k + 1}\.ShiftModel1\.(.*)", rf"stages.{k}.shift.\1"),
            (rf"up{k + 1}\.convup\.1\.(.*)", rf"stages.{k}.widen.0.\1"),
            (rf"up{k + 1}\.convup\.3\.(.*)", rf"stages.{k}.widen.2.\1")]
    for theirs, ours in (("E_lq", "extract"), ("E_hq", "extract_specific.features")):
        for k in range(6):                               # two to a scale
            level, place = k // 2, k % 2 * 2
            table += [
                (rf"{theirs}\.conv{k + 1}\.(.*)", rf"{ours}.levels.{level}.{place}.\1"),
                (rf"{theirs}\.res{k + 1}\.Res\.(.*)",
                 rf"{ours}.levels.{level}.{place + 1}.body.\1")]
    for short, component in (("LE", "left_eye"), ("RE", "right_eye"), ("MO", "mouth")):
        for scale, pixels in ((1, 256), (2, 128), (3, 64)):
            theirs, ours = f"{short}_{pixels}", f"scale{scale}_{component}"
            block = f"transforms.scale{scale}"
            table += [
                (rf"{theirs.lower()}_mem_key", f"generic_keys.{ours}"),
                (rf"{theirs.lower()}_mem_value", f"generic_values.{ours}"),
                (rf"{theirs}_KV\.Key\.(.*)", rf"extract_specific.keys.{ours}.\1"),
                (rf"{theirs}_KV\.Value\.(.*)", rf"extract_specific.values.{ours}.\1"),
                (rf"E_lq\.{theirs}_Q\.Query\.(.*)", rf"{block}.query.{component}.\1"),
                (rf"{theirs}_Attention\.(.*)",
                 rf"{block}.confidence.{component}.score.\1"),
                (rf"{theirs}_Mask\.convCat\.(.*)",
                 rf"{block}.identity.{component}.score.\1")]
            for k in range(3):
                table.append((rf"{theirs}_Mask\.conv{k + 1}\.(.*)",
                              rf"{block}.identity.{component}.reduce.{k}.\1"))
    return table


def load_official(source):
    """DMDNet.pth as its authors released it, a file, its address or its state dict → the
    network, frozen. InputError for what does not fit."""
    return common.load_named(ReleasedDMDNet(RELEASED), source, official_names(),
                             "DMDNet's weights")


if __name__ == "__main__":
    common.run_script(main)
