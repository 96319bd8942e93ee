"""DMDNet: blind face restoration with two memories, one of faces, one of this person.

Li, Zhang, Zhou, Zhang, Zuo: "Learning Dual Memory Dictionaries for Blind Face Restoration", TPAMI 2022.

A dictionary of keys and values for each of eyes, nose and mouth, at three scales: the keys are made to be
found by a degraded component, the values to restore it. The generic one is learned from many people. The
specific one is what a second extractor sees in sharp pictures of the same person, from none to 21. Both are
read by attention, mixed by an identity score, and added where a confidence score finds the input lacking.

Equation → name
    (1) DMDNet                (8) IdentityScore         (14) style_loss
    (2) renew_items           (9) ConfidenceScore       (15) discriminator_loss
    (3) forward_update       (10) SFTStage              (16) adversarial_loss
    (4) the step in train    (11) pixel_loss            (17) the sum in train
    (5) DMDNet               (12) perceptual_loss       (18) the sum in train
    (6) MemoryExtractor      (13) the sum in train      (19) common.degrade, "dmdnet"
    (7) read_dictionary

    python dmdnet.py --train                                     # rendered faces, minutes on two CPU cores
    python dmdnet.py --evaluate                                  # on people it has never seen
    python dmdnet.py --restore photo.jpg --reference album/      # your picture; --reference is optional

    python dmdnet.py --save-dictionary person.pt --reference album/    # a person's dictionary, made once
    python dmdnet.py --restore photo.jpg --dictionary person.pt

Open in the paper, chosen here: the layers (those of the released network where they fit). Extracting all Y
generic pictures at every step would cost many times the rest of it: in the first stage a few, in turn, are
extracted anew with gradient, the others keep their last keys and values. In the second stage the faces of
the step before are written, so that no face reads itself, each into the item with the nearest key. Stages
end after a share of the steps, and references come in after the first, when Θ_spe starts as a copy of Θ_gen.
What is pasted back is the change of a component, as the mean where boxes overlap.
TINY differs from the paper in size, and in what Config says beside it.
"""
import argparse
import hashlib
import math
import sys
import time
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

SCRIPT = "dmdnet"
PARTS = tuple(common.COMPONENTS)           # left eye, right eye, nose, mouth
STAGES = ("initialisation", "forward update", "backward update", "fine-tuning")        # Section 3.1


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

    encoder: str = "recogniser"              # Φ of Eq. (12) and (14); "vgg" is VGG-19, or VGG-Face
    items: int = 128                         # Y, of the generic dictionary
    references: int = 5                      # N, at most; 21 in the paper
    drawn: int = 3                           # N in training, at most: for speed; as many in the paper
    parts: tuple = PARTS                     # p, the components that have dictionaries
    part_sizes: tuple = (16, 16, 12, 20)     # sides of all four at scale 1, half at the next
    scales: tuple = (1, 2, 3)                # whose features dictionaries enrich; 1 is the finest
    transform: bool = True                   # Eq. (7); else the one best value of both dictionaries
    temperature: float = 64.0                # d of Eq. (7)
    stages: tuple = (0.12, 0.15, 0.15)       # shares of the steps of the first three of STAGES
    renewed: int = 4                         # generic pictures extracted a step of the first stage
    width: int = 16                          # channels at scale 1; 2 and 4 times as many at the next
    depth: int = 1                           # pairs and residual blocks a scale of the extractors
    paint_blocks: int = 0                    # residual blocks at full size
    spectral: bool = False                   # spectral norm on every convolution: slow to train
    bounded: bool = True                     # scores by a sigmoid; if not, spectral norm keeps them small
    residual: bool = True                    # added to I^d: a short training need not learn to copy
    released: bool = False                   # the network of the published weights, see the last chapter

    weight_pixel: float = 300.0              # λ_mse
    weight_perceptual: float = 2.0           # λ_perc; 1 in the paper, with another encoder
    weight_style: float = 1e-6               # λ_style; 0.1 in the paper
    weight_adversarial: tuple = (0.04, 0.01, 0.005)      # λ_a,r for r = 1, 2, 4; the paper's / 100
    discriminator_width: int = 16
    learning_rate: float = 1e-3              # 5 times the paper's: the network is small
    dictionary_rate: float = 1e-3            # η of Eq. (4); 2e-6 in the paper, for many more steps
    betas: tuple = (0.5, 0.999)              # β1, β2 of Adam
    clip: float = 1.0                        # longest gradient; the paper clips none
    cooldown: float = 0.3                    # last part of the steps: the rate falls to 0; none in the paper
    patience: int = 1                        # validations without a better loss before the rate is halved
    crop: float = 0.05                       # largest random change of scale and place, parts of the size
    jitter: float = 0.1                      # of brightness and contrast
    steps: int = 420
    batch: int = 4                           # faces a process and step
    validate_every: int = 50                 # steps; also when a checkpoint is written
    degradation: str = "dmdnet"              # Eq. (19)


TINY = Config()
PAPER = replace(TINY, preset="paper", size=512, encoder="vgg", references=21, drawn=21,
                part_sizes=(40, 40, 25, 55), renewed=8, width=64, depth=2, paint_blocks=2, spectral=True,
                bounded=False, residual=False, weight_perceptual=1.0, weight_style=0.1,
                weight_adversarial=(4.0, 1.0, 0.5), discriminator_width=64, learning_rate=2e-4,
                dictionary_rate=2e-6, clip=math.inf, cooldown=0, patience=0, crop=0, steps=400_000, batch=2,
                validate_every=5_000)
# The paper gives a batch of 8 on 4 GPUs, not steps.
RELEASED = replace(PAPER, preset="released", released=True, parts=("left_eye", "right_eye", "mouth"))
PRESETS = {"tiny": TINY, "paper": PAPER, "released": RELEASED}
VARIANTS = {                                 # Table 3; a stage of no steps leaves them to the last one
    "full": {}, "items-0": {"items": 0, "references": 0},
    **{f"items-{y}": {"items": y} for y in (32, 64, 256)},
    "only-backward": {"stages": (0, 0, 0.42)}, "no-forward": {"stages": (0.12, 0, 0.15)},
    "no-backward": {"stages": (0.12, 0.15, 0)}, "no-transform": {"transform": False},
    "1-transform": {"scales": (3,)}, "2-transform": {"scales": (2, 3)},
    "only-specific": {"items": 0}, "only-generic": {"references": 0}}


def stage_of(step, cfg):
    """The stage, 0 to 3, to which a step from 1 on belongs. Without items there is only the last."""
    ends, total = [], 0.0
    for share in cfg.stages if cfg.items else (0, 0, 0):
        total += share
        ends.append(math.ceil(total * cfg.steps - 1e-6))          # the first has a step, if a share at all
    return sum(step > end for end in ends)


# -----------------------------------------------------------------------------------------------------------
# 3. Network
# -----------------------------------------------------------------------------------------------------------

# A dictionary is {"scale1_left_eye": (keys (M,C/4,n,n), values (M,C,n,n)), …}: M = Y items in a generic one,
# an item a reference in a specific one. The references of a whole batch are items of one dictionary, and
# `owner` (M,) says to which face of the batch each belongs: faces with none, two or twenty need no padding.

def crop_components(features, boxes, stride, sizes):
    """RoIAlign: features (B,C,h,w) of `stride` pixels each, boxes (B,parts,4) → parts (B,C,size,size)."""
    sample = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None]
    features = features.float().contiguous()    # for RoIAlign: converted once, not once a component
    return [roi_align(features, torch.cat([sample, box], 1), size, 1 / stride, sampling_ratio=2,
                      aligned=True) for box, size in zip(boxes.unbind(1), sizes)]


def paste_components(parts, boxes, stride, shape):
    """Reverse RoIAlign: parts (B,C,size,size) resampled into their boxes, else 0; shape (h,w) → (B,C,h,w).

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


def convolution(before, after, stride=1, dilation=1):
    """3×3, zero-padded to the same size, with He's initialisation."""
    layer = nn.Conv2d(before, after, 3, stride, dilation, dilation)
    nn.init.kaiming_normal_(layer.weight, 0.2)
    nn.init.zeros_(layer.bias)
    return layer


def pair(before, middle, after=None, stride=1, dilations=(1, 1)):
    """Two convolutions, a LeakyReLU between: what all of the network is made of."""
    return nn.Sequential(convolution(before, middle, stride, dilations[0]), nn.LeakyReLU(0.2),
                         convolution(middle, after or middle, 1, dilations[1]))


def begin_at(layers, value):
    """A pair of convolutions whose output begins close to a constant."""
    with torch.no_grad():
        layers[-1].weight *= 0.1
        layers[-1].bias += value
    return layers


class Residual(nn.Module):
    """x + a pair of convolutions. It begins close to x."""

    def __init__(self, channels, dilations=(1, 1)):
        super().__init__()
        self.body = begin_at(pair(channels, channels, dilations=dilations), 0)

    def forward(self, x):
        return x + self.body(x)


def normalise(net, cfg):
    """Spectral norm on every convolution, with cfg.spectral."""
    for layer in [module for module in net.modules() if isinstance(module, nn.Conv2d) and cfg.spectral]:
        spectral_norm(layer)


class Extractor(nn.Module):
    """Features at scales 1, 2, 3: (B,3,H,W) → (B,C,H/2,W/2), (B,2C,H/4,W/4), (B,4C,H/8,W/8)."""

    def __init__(self, cfg):
        super().__init__()
        self.levels, before = nn.ModuleList(), 3
        for level, dilations in enumerate(((5, 3), (3, 1), (1, 1))):
            after, layers = cfg.width * 2**level, []
            for number in range(cfg.depth):
                layers += [pair(before, after, stride=1 if number else 2), Residual(after, dilations)]
                before = after
            self.levels.append(nn.Sequential(*layers))

    def forward(self, x):
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps


def part_sizes(cfg, scale):
    """Sides of the resampled components at a scale, of those that have dictionaries: half as many features
    a scale, at least 1."""
    return [max(cfg.part_sizes[PARTS.index(part)] >> scale - 1, 1) for part in cfg.parts]


def part_boxes(cfg, boxes):
    """Of the four boxes (B,4,4) those of the components that have dictionaries."""
    return boxes[:, [PARTS.index(part) for part in cfg.parts]]


class MemoryExtractor(nn.Module):
    """F_gen of Eq. (2) and F_spe of Eq. (6): sharp faces (M,3,H,W), boxes (M,4,4) → a dictionary whose
    items are the faces: keys (M,C/4,n,n) and values (M,C,n,n) of each component and scale."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.features = cfg, Extractor(cfg)
        widths = {f"scale{s}_{part}": cfg.width * 2**(s - 1) for s in cfg.scales for part in cfg.parts}
        self.keys = nn.ModuleDict({name: pair(width, width // 4) for name, width in widths.items()})
        self.values = nn.ModuleDict({name: pair(width, width) for name, width in widths.items()})

    def forward(self, images, boxes):
        crop = cut_components if self.cfg.released else crop_components
        dictionary, maps, boxes = {}, self.features(images), part_boxes(self.cfg, boxes)
        for scale in self.cfg.scales:
            parts = crop(maps[scale - 1], boxes, 2**scale, part_sizes(self.cfg, scale))
            for part, component in zip(self.cfg.parts, parts):
                name = f"scale{scale}_{part}"
                dictionary[name] = tuple(             # stored as they are read: flat
                    layers[name](component).float().contiguous() for layers in (self.keys, self.values))
        return dictionary


def renew_items(dictionary, fresh, places):
    """Eq. (2): {key_y, value_y} = F_gen(I_y^g; Θ_gen) for items y in `places`; others as they are."""
    return {name: tuple(old.index_copy(0, places, new) for old, new in zip(items, fresh[name]))
            for name, items in dictionary.items()}


def forward_update(dictionary, fresh, gammas):
    """Eq. (3): value* = γ_v value + (1−γ_v) value^gt and key* = γ_k key + (1−γ_k) key^gt.

    dictionary: Y items, fresh: {key^gt, value^gt} of some sharp faces, gammas: {name: (γ_k, γ_v)} in [0,1].
    Each face updates the item of the nearest key; where several meet in one, their mean does.
    """
    updated = {}
    for name, items in dictionary.items():
        keys, fresh_keys = items[0].flatten(1), fresh[name][0].flatten(1)
        nearest = torch.cdist(fresh_keys.detach(), keys).argmin(1)
        meets = F.one_hot(nearest, len(keys)).to(keys).T                               # (Y, faces)
        count = meets.sum(1)
        share = meets / count.clamp(min=1)[:, None]
        updated[name] = []
        for old, new, gamma in zip(items, fresh[name], gammas[name]):
            blend = gamma * old.flatten(1) + (1 - gamma) * (share @ new.flatten(1))
            updated[name].append(torch.where((count > 0)[:, None], blend, old.flatten(1)).view_as(old))
    return updated


class GenericMemory(nn.Module):
    """What the generic dictionary is made with in the first two stages, and no longer needed after: F_gen,
    and γ_k, γ_v of each component and scale, kept in [0,1] by a sigmoid."""

    def __init__(self, cfg):
        super().__init__()
        self.extract = MemoryExtractor(cfg)
        normalise(self, cfg)
        self.logits = nn.ParameterDict({name: torch.full((2,), 2.0) for name in self.extract.keys})

    def forward(self, dictionary, images, boxes, places=None):
        """The dictionary with items renewed (Eq. 2) at `places`, or updated by the faces (Eq. 3)."""
        fresh = self.extract(images, boxes)
        if places is not None:
            return renew_items(dictionary, fresh, places)
        with torch.autocast(images.device.type, enabled=False):
            return forward_update(dictionary, fresh,
                                  {name: logit.sigmoid() for name, logit in self.logits.items()})


def read_dictionary(query, keys, values, scale, allowed=None, transform=True):
    """Eq. (7): F̃ = softmax(Q Kᵀ / √d) V, one weight an item for the whole component.

    query (B,C/4,n,n), keys (M,C/4,n,n), values (M,C,n,n), scale √d: a number or (B,1), allowed (B,M): the
    items a face may read, all if None → F̃ (B,C,n,n), weights (B,M). A face that may read none gets zeros.
    Without `transform` the weights are 1 for the highest score and 0 for the rest.
    """
    score = query.flatten(1) @ keys.flatten(1).T / scale
    if allowed is not None:
        score = score.masked_fill(~allowed, torch.finfo(score.dtype).min)
    weights = score.softmax(1) if transform else F.one_hot(score.argmax(1), len(keys)).to(score)
    if allowed is not None:
        weights = weights * allowed
    return (weights @ values.flatten(1)).view(len(query), *values.shape[1:]), weights


class IdentityScore(nn.Module):
    """Eq. (8): F̃^d = M_Id F̃^s + (1 − M_Id) F̃^g, with M_Id from F^d, F̃^s and F̃^g. (B,C,n,n) each.

    M_Id has a number for each channel and position; it begins near 1/2.
    """

    def __init__(self, channels, bounded=True):
        super().__init__()
        third, self.bounded = channels // 3, bounded
        self.reduce = nn.ModuleList(pair(channels, third) for _ in range(3))
        self.score = begin_at(pair(3 * third, channels), 0.0 if bounded else 0.5)

    def forward(self, part, specific, generic):
        score = self.score(torch.cat([reduce(x) for reduce, x in zip(
            self.reduce, (part, specific, generic))], 1))
        score = score.sigmoid() if self.bounded else score
        return generic + score * (specific - generic), score


class ConfidenceScore(nn.Module):
    """Eq. (9): F̂^d = F^d + F̃^d · F_Con(F̃^d − F^d). (B,C,n,n) each.

    F_Con has a number for each channel and position; it begins small, by trusting the degraded face.
    """

    def __init__(self, channels, bounded=True):
        super().__init__()
        self.bounded = bounded
        self.score = begin_at(pair(channels, channels), -2.0 if bounded else 0.0)

    def forward(self, part, reading):
        score = self.score(reading - part)
        return part + reading * (score.sigmoid() if self.bounded else score)


class DictionaryTransform(nn.Module):
    """Figure 2, at one scale: RoIAlign, query, read both dictionaries, mix, confidence, paste."""

    def __init__(self, scale, cfg):
        super().__init__()
        channels = cfg.width * 2**(scale - 1)
        self.cfg, self.scale, self.stride, self.sizes = cfg, scale, 2**scale, part_sizes(cfg, scale)
        self.query = nn.ModuleDict({part: pair(channels, channels // 4) for part in cfg.parts})
        both = cfg.items and cfg.references and cfg.transform
        self.identity = nn.ModuleDict({part: IdentityScore(channels, cfg.bounded)
                                       for part in cfg.parts if both})
        self.confidence = nn.ModuleDict({part: ConfidenceScore(channels, cfg.bounded) for part in cfg.parts})

    def read(self, part, component, generic, specific, allowed):
        """F̃^d of one component (B,C,n,n), and what was read: the weights of each dictionary's items and the
        identity score, where there are."""
        query, cfg, name = self.query[part](component), self.cfg, f"scale{self.scale}_{part}"
        root = math.sqrt(cfg.temperature)
        if generic is None or specific is None:
            items, limits = (generic[name], None) if specific is None else (specific[name], allowed)
            reading, weights = read_dictionary(query, *items, root, limits, cfg.transform)
            return reading, {"generic" if specific is None else "specific": weights}
        if not cfg.transform:                    # row "w/o T": one item, the best of both dictionaries
            keys, values = (torch.cat(both) for both in zip(generic[name], specific[name]))
            everywhere = torch.ones(len(query), cfg.items, dtype=torch.bool, device=query.device)
            reading, weights = read_dictionary(query, keys, values, root,
                                               torch.cat([everywhere, allowed], 1), False)
            return reading, {"generic": weights[:, :cfg.items], "specific": weights[:, cfg.items:]}
        generic_read, generic_weights = read_dictionary(query, *generic[name], root)
        specific_read, specific_weights = read_dictionary(query, *specific[name], root, allowed)
        mixed, score = self.identity[part](component, specific_read, generic_read)
        known = allowed.any(1)[:, None, None, None]
        return torch.where(known, mixed, generic_read), {
            "generic": generic_weights, "specific": specific_weights, "identity": score}

    def forward(self, features, boxes, generic, specific, allowed):
        parts = crop_components(features, boxes, self.stride, self.sizes)
        changes, readings = [], {}
        for part, component in zip(self.cfg.parts, parts):       # a loop, as their sizes differ
            reading, readings[part] = self.read(part, component, generic, specific, allowed)
            changes.append(self.confidence[part](component, reading) - component)
        change = paste_components(changes, boxes, self.stride, features.shape[2:])
        return features + change.to(features.dtype, memory_format=torch.channels_last), readings


class MSDilate(nn.Module):
    """The decoder's start: four pairs of convolutions, dilations 4, 3, 2, 1, fused, added to the input."""

    def __init__(self, channels):
        super().__init__()
        self.branches = nn.ModuleList(pair(channels, channels, dilations=(d, d)) for d in (4, 3, 2, 1))
        self.fuse = convolution(4 * channels, channels)

    def forward(self, x):
        return x + self.fuse(torch.cat([branch(x) for branch in self.branches], 1))


class SFTStage(nn.Module):
    """A decoder stage with Eq. (10): F^out = α · F^decoder + β, α and β from the enriched features by two
    convolutions each. x, skip (B,before,h,w) → (B,after,2h,2w)."""

    def __init__(self, before, after):
        super().__init__()
        self.reduce, self.widen = pair(before, after), pair(after, after)
        self.scale, self.shift = begin_at(pair(before, after), 1), pair(before, after)

    def forward(self, x, skip):
        x = F.leaky_relu(self.reduce(x), 0.2, inplace=True)
        x = self.scale(skip) * x + self.shift(skip)
        return self.widen(F.interpolate(x, scale_factor=2, mode="bilinear"))


class DMDNet(nn.Module):
    """Eq. (1) and (5): Î^h = F(I^d | Dic^g, Dic^s; Θ).

    degraded (B,3,H,W) in [-1,1], boxes (B,4,4) → restored (B,3,H,W). References are given as images
    (B,N,3,H,W) with boxes (B,N,4,4), or as images (M,3,H,W) with boxes (M,4,4) and `owner` (M,), or as a
    `specific` dictionary, which all faces share unless `owner` says whose each item is. `generic` replaces
    the network's own generic dictionary. `readings` of the last call are kept for pictures.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.readings = cfg, {}
        scales = cfg.scales if cfg.items or cfg.references else ()
        cfg = cfg if scales else replace(cfg, width=2 * cfg.width)      # "items-0" is twice as wide: Table 3
        widths = [cfg.width * 2**level for level in range(3)]
        self.extract = Extractor(cfg)
        block = ReleasedTransform if cfg.released else DictionaryTransform
        self.transforms = nn.ModuleDict({f"scale{s}": block(s, cfg) for s in scales})
        self.extract_specific = MemoryExtractor(cfg) if cfg.references else None
        self.context = MSDilate(widths[2])
        outputs = (widths[1], widths[0], widths[0])
        self.stages = nn.ModuleList(SFTStage(a, b) for a, b in zip(reversed(widths), outputs))
        self.paint = nn.Sequential(convolution(widths[0], widths[0]), nn.LeakyReLU(0.2),
                                   *[Residual(widths[0]) for _ in range(cfg.paint_blocks)],
                                   convolution(widths[0], 3))
        if cfg.residual:
            nn.init.zeros_(self.paint[-1].weight)
        normalise(self, cfg)
        self.generic = nn.ParameterDict()         # Θ_Dic^g of Eq. (5): noise until the first stage fills it
        for scale in scales if cfg.items else ():
            for part, side in zip(cfg.parts, part_sizes(cfg, scale)):
                for kind, channels in (("key", widths[scale - 1] // 4), ("value", widths[scale - 1])):
                    self.generic[f"scale{scale}_{part}_{kind}"] = nn.Parameter(
                        torch.randn(cfg.items, channels, side, side), requires_grad=False)

    def generic_dictionary(self):
        """Dic^g, None without items."""
        return {name.removesuffix("_key"): (self.generic[name], self.generic[name[:-3] + "value"])
                for name in self.generic if name.endswith("_key")} or None

    @torch.no_grad()
    def set_generic_dictionary(self, dictionary):
        """Take over keys and values."""
        for name, items in dictionary.items():
            for kind, item in zip(("key", "value"), items):
                self.generic[f"{name}_{kind}"].copy_(item)

    def forward(self, degraded, boxes, references=None, reference_boxes=None, owner=None, specific=None,
                generic=None):
        if references is not None and references.ndim == 5:
            owner = torch.arange(len(references), device=references.device).repeat_interleave(
                references.shape[1])
            references, reference_boxes = references.flatten(0, 1), reference_boxes.flatten(0, 1)
        if references is not None and len(references):
            specific = self.extract_specific(references, reference_boxes)         # Eq. (6)
        generic = generic or self.generic_dictionary()
        allowed = None
        if specific is not None:
            count, face = len(next(iter(specific.values()))[0]), torch.arange(len(degraded))[:, None]
            allowed = (torch.ones(len(degraded), count, dtype=torch.bool, device=degraded.device)
                       if owner is None else owner == face.to(owner))
        features, boxes, self.readings = self.extract(degraded), part_boxes(self.cfg, boxes), {}
        x = self.context(features[2])
        for stage, scale in zip(self.stages, (3, 2, 1)):                          # from coarse to fine
            skip, name = features[scale - 1], f"scale{scale}"
            if name in self.transforms and (generic or specific):
                # Scores want float32, and bfloat16 would gain nothing on maps as small as these: it would
                # cast every item of a dictionary at every call.
                with torch.autocast(skip.device.type, enabled=False):
                    skip, self.readings[name] = self.transforms[name](
                        skip, boxes, generic, specific, allowed)
            x = stage(x, skip)
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
    """The three D_r, r = 1, 2, 4: image (B,3,H,W) → their three score maps."""

    def __init__(self, width):
        super().__init__(Discriminator(width) for _ in range(3))

    def forward(self, image):
        reduced = [image if level == 0 else F.avg_pool2d(image, 2**level) for level in range(3)]
        return [net(x) for net, x in zip(self, reduced)]


# -----------------------------------------------------------------------------------------------------------
# 4. Losses
# -----------------------------------------------------------------------------------------------------------

def pixel_loss(restored, target):
    """Eq. (11): ‖Î^h − I^gt‖² / (C H W), a mean over the batch."""
    return F.mse_loss(restored.float(), target.float())


def perceptual_loss(features, target_features):
    """Eq. (12): Σ_i ‖Φ_i(Î^h) − Φ_i(I^gt)‖² / (C_i H_i W_i) of four lists of maps, a mean over the batch."""
    return sum(F.mse_loss(a.float(), b.float()) for a, b in zip(features, target_features))


def style_loss(features, target_features):
    """Eq. (14): Σ_i ‖Φ_iᵀ Φ_i − Φ_i'ᵀ Φ_i'‖² / (C_i H_i W_i), a mean over the batch.

    Φ_i is taken as a matrix of H_i W_i rows, so that the Gram matrix has C_i × C_i entries. They are sums
    over all positions, as printed: the loss grows with the area and the fourth power of the features.
    """
    def gram(maps):
        with torch.autocast(maps.device.type, enabled=False):     # small differences of large sums follow
            flat = maps.float().flatten(2)
            return flat @ flat.transpose(1, 2)

    return sum((gram(a) - gram(b)).square().sum((1, 2)).mean() / a[0].numel()
               for a, b in zip(features, target_features))


def discriminator_loss(real, fake):
    """Eq. (15): −Σ_r E[min(0, D_r(I_↓r) − 1)] + E[min(0, −1 − D_r(Î_↓r))]. The paper's L_D is what D
    maximises; this is its negative, to be minimised. real, fake: lists of score maps."""
    return sum(F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean() for r, f in zip(real, fake))


def adversarial_loss(fake, weights):
    """Eq. (16): −Σ_r λ_a,r E[D_r(Î_↓r)], with λ_a,r inside the sum, as its index asks for."""
    return -sum(w * f.float().mean() for w, f in zip(weights, fake))


# -----------------------------------------------------------------------------------------------------------
# 5. Data
# -----------------------------------------------------------------------------------------------------------

def load_faces(cfg, args):
    """The faces of --data, or rendered ones."""
    if args.data is None:
        return common.RenderedFaces(cfg.size)
    return common.FaceFolder(args.data, cfg.size, args.landmarks, args.aligned)


def component_boxes(landmarks, cfg):
    """Boxes (B,4,4) around left eye, right eye, nose, mouth, of landmarks (B,68,2) in pixels."""
    return released_boxes(landmarks) if cfg.released else common.component_boxes(landmarks, cfg.size)


def with_references(faces, i, count, generator):
    """Picture i and up to `count` others of the person, at random → images (1+N,3,H,W), landmarks."""
    others = faces.others(i)
    if not others or not count:
        return common.stack_faces(faces, [i])
    order = torch.randperm(len(others), generator=generator)[:count].tolist()
    return common.stack_person(faces, [i, *(others[k] for k in order)])


def choose_generic(faces, indices, cfg):
    """The Y pictures of Eq. (2), at random; of different people as long as there are some, and some of them
    more than once where there are fewer than Y."""
    order = [indices[k] for k in torch.randperm(len(indices), generator=common.seeded(cfg.seed, 3)).tolist()]
    met, first, rest = set(), [], []
    for i in order:
        (rest if int(faces.identity[i]) in met else first).append(i)
        met.add(int(faces.identity[i]))
    chosen = first + rest
    return [chosen[y % len(chosen)] for y in range(cfg.items)]


class Batches(torch.utils.data.Dataset):
    """Training batch number `step`, from 0: a dict of degraded, target (B,3,H,W), boxes (B,4,4);
    references (M,3,H,W), reference_boxes and owner (M,), of 0 to cfg.drawn a face; and sharp faces for
    the generic dictionary with sharp_boxes and, in the first stage, their places in it. A pure function of
    (seed, rank, step), so that a resumed run sees what an unbroken one would have seen."""

    def __init__(self, faces, indices, cfg, rank=0):
        self.faces, self.indices, self.cfg, self.rank = faces, indices, cfg, rank
        self.generic = choose_generic(faces, indices, cfg) if cfg.items else []

    def __len__(self):
        return self.cfg.steps

    def sets(self, step, rank, references):
        """Of each face of a batch, itself and its references, augmented: a list of images, landmarks."""
        cfg, generator = self.cfg, common.seeded(self.cfg.seed, 1, rank, step)
        chosen = [self.indices[i] for i in torch.randint(len(self.indices), (cfg.batch,),
                                                         generator=generator).tolist()]
        counts = torch.randint(references + 1, (cfg.batch,), generator=generator).tolist()
        return [common.augment(*with_references(self.faces, i, count, generator), generator, cfg.crop,
                               cfg.jitter) for i, count in zip(chosen, counts)]

    def __getitem__(self, step):
        cfg, stage = self.cfg, stage_of(step + 1, self.cfg)
        sets = self.sets(step, self.rank, 0 if stage == 0 else min(cfg.drawn, cfg.references))
        target = torch.stack([images[0] for images, _ in sets])
        boxes = [component_boxes(landmarks, cfg) for _, landmarks in sets]
        owner = [face for face, box in enumerate(boxes) for _ in box[1:]]
        generator = common.seeded(cfg.seed, 2, self.rank, step)
        batch = {"degraded": common.degrade(target, common.DEGRADATIONS[cfg.degradation], generator),
                 "target": target, "boxes": torch.stack([box[0] for box in boxes]),
                 "references": torch.cat([images[1:] for images, _ in sets]),
                 "reference_boxes": torch.cat([box[1:] for box in boxes]),
                 "owner": torch.tensor(owner, dtype=torch.long)}
        if stage == 0:                     # the same on all processes, whose dictionaries must not part
            batch["places"] = (step * cfg.renewed + torch.arange(min(cfg.renewed, cfg.items))) % cfg.items
            sharp, landmarks = common.stack_faces(self.faces, [self.generic[y] for y in batch["places"]])
        elif stage == 1:
            before = self.sets(step - 1, 0, 0 if stage_of(step, cfg) == 0 else min(
                cfg.drawn, cfg.references))
            sharp, landmarks = (torch.stack([part[k][0] for part in before]) for k in (0, 1))
        if stage < 2:
            batch |= {"sharp": sharp, "sharp_boxes": component_boxes(landmarks, cfg)}
        return batch


def load_encoder(cfg, args, faces, device):
    """Φ of Eq. (12), frozen: the recogniser of these faces, or VGG-19."""
    encoder = common.load_vgg(args.vggface) if cfg.encoder == "vgg" else common.recogniser(faces)
    return encoder.to(device, memory_format=torch.channels_last)


# -----------------------------------------------------------------------------------------------------------
# 6. Training
# -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def fill_generic(net, memory, faces, data, cfg, device):
    """All items of the generic dictionary by the latest F_gen."""
    for start in range(0, cfg.items, 16):
        places = torch.arange(start, min(start + 16, cfg.items))
        images, landmarks = common.stack_faces(faces, [data.generic[y] for y in places])
        with common.autocast(device):
            net.set_generic_dictionary(memory(
                net.generic_dictionary(), images.to(device, memory_format=torch.channels_last),
                component_boxes(landmarks, cfg).to(device), places.to(device)))


def train(cfg, args):
    """Train on args.data, write the run into args.out; see Config for every number."""
    begin, device, out = time.monotonic(), common.choose_device(args.device), Path(args.out)
    with common.process_group() as (rank, world):
        if rank == 0:
            common.write_json(out / "config.json", asdict(cfg))
        faces = load_faces(cfg, args)
        train_indices, validation, test = common.split_identities(faces)
        data = Batches(faces, train_indices, cfg, rank)
        if rank == 0 and cfg.references and not any(faces.others(i) for i in train_indices):
            print("no person has two pictures: only the generic dictionary can be trained", file=sys.stderr)
        encoder = load_encoder(cfg, args, faces, device) if rank == 0 else None   # one process trains it,
        if torch.distributed.is_initialized():                                    # others find it cached
            torch.distributed.barrier()
        encoder = encoder or load_encoder(cfg, args, faces, device)
        torch.manual_seed(cfg.seed)
        net = common.channels_last(DMDNet(cfg), device)
        memory = (GenericMemory(cfg) if cfg.items else nn.Module()).to(device)
        discriminators = Discriminators(cfg.discriminator_width).to(
            device, memory_format=torch.channels_last)
        items = list(net.generic.parameters())
        learned = [weight for weight in (*net.parameters(), *memory.parameters()) if weight.requires_grad]
        optimizer = torch.optim.Adam([{"params": learned}, {"params": items, "lr": cfg.dictionary_rate}],
                                     cfg.learning_rate, cfg.betas, fused=True)
        optimizer_d = torch.optim.Adam(discriminators.parameters(), cfg.learning_rate, cfg.betas)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=cfg.patience)
        parts = {"net": net, "memory": memory, "discriminators": discriminators, "optimizer": optimizer,
                 "optimizer_d": optimizer_d, "schedule": schedule}
        start, rows = 0, []
        if args.resume:
            state = common.load_checkpoint(args.checkpoint, SCRIPT, device)
            start, rows = state["step"], state["rows"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
        forward, forward_m, forward_d = net, memory, discriminators
        if world > 1:
            forward_d = nn.parallel.DistributedDataParallel(discriminators, broadcast_buffers=False)
        batches = torch.utils.data.DataLoader(data, batch_size=None, sampler=range(start, cfg.steps),
                                              num_workers=args.workers, pin_memory=device.type == "cuda")
        progress = common.Progress(f"{SCRIPT} {cfg.variant}", cfg.steps, start, quiet=rank > 0)
        stage = None
        for step, batch in enumerate(batches, start + 1):
            if stage_of(step, cfg) != stage:                                    # Section 3.1
                before, stage = stage_of(step - 1, cfg) if step > 1 else None, stage_of(step, cfg)
                progress.line(f"step {step}: {STAGES[stage]}")
                if before != stage and 0 in (before, stage):
                    if before == 0 and net.extract_specific:                    # Θ_spe begins as Θ_gen
                        net.extract_specific.load_state_dict(memory.extract.state_dict())
                    fill_generic(net, memory, faces, data, cfg, device)
                for item in items:
                    item.requires_grad_(stage == 2)
                if world > 1:
                    forward, forward_m = (nn.parallel.DistributedDataParallel(
                        part, broadcast_buffers=False, find_unused_parameters=True)
                        if any(weight.requires_grad for weight in part.parameters()) else part
                        for part in (net, memory))
            batch = {name: part.to(device, non_blocking=True, **(
                {"memory_format": torch.channels_last} if part.ndim == 4 else {}))
                for name, part in batch.items()}
            target, generic = batch["target"], None
            with common.autocast(device):                                       # generator
                if stage < 2:
                    generic = forward_m(net.generic_dictionary(), batch["sharp"], batch["sharp_boxes"],
                                        batch.get("places"))                    # Eq. (2) or (3)
                restored = forward(batch["degraded"], batch["boxes"], batch["references"],
                                   batch["reference_boxes"], batch["owner"], generic=generic)
                with torch.no_grad():
                    target_features = encoder.features(target)
                features = encoder.features(restored)
                discriminators.requires_grad_(False)
                losses = {"pixel": cfg.weight_pixel * pixel_loss(restored, target),             # Eq. (13)
                          "perceptual": cfg.weight_perceptual * perceptual_loss(features, target_features),
                          "style": cfg.weight_style * style_loss(features, target_features),    # Eq. (17)
                          "adversarial": adversarial_loss(discriminators(restored), cfg.weight_adversarial)}
            optimizer.zero_grad(set_to_none=True)
            sum(losses.values()).backward()                                     # Eq. (18)
            nn.utils.clip_grad_norm_(learned, cfg.clip)
            left = min((cfg.steps - step + 1) / max(cfg.cooldown * cfg.steps, 1), 1)
            rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] *= left
            optimizer.step()                                                    # Eq. (4), in its stage
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate
            if generic is not None:
                net.set_generic_dictionary(generic)
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
                reconstruction, quality = validate(net, encoder, faces, common.spread(validation, 32), cfg,
                                                   device, stage)
                if not math.isfinite(reconstruction):
                    raise InputError(f"step {step}: the validation loss is not finite; the last good state "
                                     f"is in {args.checkpoint}")
                schedule.step(reconstruction)
                optimizer_d.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
                rows[-1] |= {"stage": stage, "validation": reconstruction, "validation_psnr": quality,
                             "rate": rates[0] * left}
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
def validate(net, encoder, faces, indices, cfg, device, stage):
    """Reconstruction loss (Eq. 13) and PSNR in dB on held-out faces, always degraded alike; with references
    but in the first stage, which has none."""
    totals, name = torch.zeros(2), 0 if stage == 0 else "restored"
    for batch in restored_batches(net, faces, indices, cfg, device, None, [0] if stage == 0 else []):
        restored, target = batch[name], batch["target"]
        with common.autocast(device):
            a, b = (encoder.features(x.to(device)) for x in (restored, target))
        loss = (cfg.weight_pixel * pixel_loss(restored, target)
                + cfg.weight_perceptual * perceptual_loss(a, b).cpu())
        totals += torch.stack([loss * len(target), common.psnr(restored, target).sum()])
    return (totals / len(indices)).tolist()


def finish(net, faces, test, cfg, args, device, seconds):
    """Measure on held-out people; write result.json, samples.png (at ×4) and readings.png; print the tables
    and what was written."""
    out, net = Path(args.out), net.eval()
    result = {"script": SCRIPT, "variant": cfg.variant, "preset": cfg.preset,
              "data": str(args.data or "rendered"), "size": cfg.size,
              "steps": cfg.steps, "seconds": round(seconds, 1),
              "test": evaluate(net, faces, common.spread(test, 128), cfg, device, args.precision)}
    common.write_json(out / "result.json", result)
    batch = next(restored_batches(net, faces, common.spread(test, 6), cfg, device, 4,
                                  precision=args.precision))
    columns = {"degraded": batch["degraded"]}
    if len(batch["references"]):
        columns["a reference"] = torch.stack([
            batch["references"][batch["owner"] == k][0] if (batch["owner"] == k).any()
            else torch.ones_like(target) for k, target in enumerate(batch["target"])])
        draw_readings(out / "readings.png", net, batch)
    common.write_image(out / "samples.png", common.comparison_grid(
        columns | {"restored": batch["restored"], "target": batch["target"]}))
    common.print_table(result["test"])
    print_references(result["test"])
    written = [name for name in ("checkpoint.pt", "config.json", "log.csv", "curves.png", "samples.png",
                                 "readings.png", "result.json") if (out / name).is_file()]
    print(f"\n{out}: {', '.join(written)}")


def print_references(table):
    """What each number of references restores: a row a task and number."""
    for task, row in table.items():
        for count, values in row.get("references", {}).items():
            print(f"{task}, {count:>2} references: " + ", ".join(
                f"{name} {value:.{digits}f}" for (name, value), digits in zip(values.items(), (2, 4, 1))))


def draw_readings(path, net, batch):
    """readings.png, a row a face: degraded, its references, each with the weights that eyes, nose and mouth
    give it at the finest scale (Eq. 7), and restored, with the mean identity score (Eq. 8) of each."""
    readings = net.readings.get(f"scale{min(net.cfg.scales)}", {})
    owner, count = batch["owner"], len(batch["target"])
    widest = max((owner == k).sum().item() for k in range(count))
    figure = matplotlib.figure.Figure(figsize=(1.7 * (2 + widest), 2.3 * count), layout="constrained")
    axes = figure.subplots(count, 2 + widest, squeeze=False)

    def show(axis, image, title):
        axis.imshow(common.to_uint8(image).permute(1, 2, 0).numpy())
        axis.set_title(title, fontsize=7)

    def each(values):
        return "\n".join(f"{part.replace('_', ' ')} {value:.2f}".replace("left eye", "eyes")
                         for part, value in values.items() if part != "right_eye")

    for face, row in enumerate(axes):
        show(row[0], batch["degraded"][face], "degraded")
        for axis, item in zip(row[1:], torch.nonzero(owner == face)[:, 0].tolist()):
            show(axis, batch["references"][item], each(
                {part: read["specific"][face, item] for part, read in readings.items()}))
        scores = {part: read["identity"][face].mean()
                  for part, read in readings.items() if "identity" in read}
        show(row[-1], batch["restored"][face], f"identity score:\n{each(scores)}" if scores else "restored")
        for axis in row:
            axis.axis("off")
    with common.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


# -----------------------------------------------------------------------------------------------------------
# 7. Restoration
# -----------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def specific_dictionary(net, references, landmarks, batch=8, precision="auto"):
    """Eq. (6): sharp faces of a person (N,3,size,size), landmarks (N,68,2) → their dictionary, on the
    network's device. Adding a reference adds an item, and needs no training."""
    if net.extract_specific is None:
        raise InputError(f"a network of --variant {net.cfg.variant} has no specific dictionary; restore "
                         "without references")
    device, chunks = next(net.parameters()).device, []
    boxes = component_boxes(landmarks, net.cfg)
    for start in range(0, len(references), batch):
        part = slice(start, start + batch)
        with common.autocast(device, precision):
            chunks.append(net.extract_specific(
                references[part].to(device, memory_format=torch.channels_last), boxes[part].to(device)))
    return {name: tuple(torch.cat(items) for items in zip(*(chunk[name] for chunk in chunks)))
            for name in chunks[0]}


@torch.inference_mode()
def restore(net, degraded, landmarks, specific=None, owner=None, batch=8, precision="auto"):
    """Restore faces: degraded (N,3,size,size) in [-1,1], landmarks (N,68,2), the specific dictionary of
    their person, or one of all their persons' references with the face `owner` (M,) of each → restored
    (N,3,size,size) in [-1,1], on the CPU. Out of GPU memory, the batch is halved; a line says so."""
    device, results, start = next(net.parameters()).device, [], 0
    boxes = component_boxes(landmarks, net.cfg)
    training = net.training
    net.eval()
    while start < len(degraded):
        part, items, owned = slice(start, start + batch), specific, None
        if owner is not None:
            mine = (owner >= start) & (owner < start + batch)
            owned = (owner[mine] - start).to(device)
            items = {name: (keys[mine], values[mine]) for name, (keys, values) in specific.items()}
        try:
            with common.autocast(device, precision):
                images = degraded[part].to(device, memory_format=torch.channels_last)
                restored = net(images, boxes[part].to(device), specific=items, owner=owned)
                results.append(restored.float().clamp(-1, 1).cpu())
            start += batch
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise InputError("not enough GPU memory for one face; use --device cpu or a smaller "
                                 "--size") from None
            batch //= 2
            print(f"out of GPU memory: going on with {batch} faces at a time", file=sys.stderr)
    net.train(training)
    return torch.cat(results)


def restored_batches(net, faces, indices, cfg, device, scale, counts=(), batch=16, precision="auto"):
    """Held-out faces in batches, by name: degraded, target, references (M,3,H,W) with their owner (M,),
    restored with all of these, and by each number in `counts` restored with so many of each face's. All by
    (seed, scale, place) alone."""
    for start in range(0, len(indices), batch):
        sets = [with_references(faces, i, cfg.references, common.seeded(cfg.seed, 5, i))
                for i in indices[start:start + batch]]
        target, landmarks = (torch.stack([x[k][0] for x in sets]) for k in (0, 1))
        references, points = (torch.cat([x[k][1:] for x in sets]) for k in (0, 1))
        owner = torch.tensor([face for face, x in enumerate(sets) for _ in x[0][1:]], dtype=torch.long)
        number = torch.tensor([k for x in sets for k in range(len(x[0]) - 1)], dtype=torch.long)
        generator = common.seeded(cfg.seed, 4, scale or 0, start)
        degraded = common.degrade(target, common.DEGRADATIONS[cfg.degradation], generator, scale)
        specific = (specific_dictionary(net, references, points, batch, precision) if len(references)
                    else None)
        results = {"degraded": degraded, "target": target, "references": references, "owner": owner}
        for count in (*counts, "restored"):
            taken = number < (len(number) if count == "restored" else count)
            items = {name: (keys[taken], values[taken]) for name, (keys, values) in (specific or {}).items()}
            results[count] = restore(net, degraded, landmarks, items if taken.any() else None,
                                     owner[taken] if taken.any() else None, batch, precision)
        yield results


def evaluate(net, faces, indices, cfg, device, precision="auto"):
    """The paper's ×4, ×8 on held-out faces → "test" of result.json: PSNR dB, SSIM, identity in degrees, of
    the input, of the face restored with all references, and with none or one of them."""
    judge = common.recogniser(faces, "metric")
    table, counts = {}, [count for count in (0, 1) if count < cfg.references]
    for scale in (4, 8):
        columns = {name: [] for name in ("degraded", "restored", *counts)}
        for batch in restored_batches(net, faces, indices, cfg, device, scale, counts,
                                      precision=precision):
            for name, column in columns.items():
                column.append(torch.stack([metric(batch[name], batch["target"]) for metric in (
                    common.psnr, common.ssim, lambda *pair: common.identity_distance(judge, *pair))]))
        values = {name: torch.cat(column, 1) for name, column in columns.items()}
        means = {name: dict(zip(("psnr", "ssim", "identity"), value.mean(1).tolist()))
                 for name, value in values.items()}
        table[f"x{scale}"] = {
            "faces": len(indices), "input": means["degraded"], "restored": means["restored"],
            "paired_psnr_gain": common.paired_gain(values["restored"][0], values["degraded"][0], cfg.seed)}
        if counts:
            table[f"x{scale}"]["references"] = {
                **{str(count): means[count] for count in counts}, str(cfg.references): means["restored"]}
    return table


def for_restoration(net, device, precision="auto"):
    """The network made ready to restore with, once; it cannot be trained any more: see common.for_inference.
    A stored dictionary is of the extractor's own weights, whatever the precision: those stay as they are,
    and so do those of the transforms, which work in float32."""
    return common.for_inference(net, device, precision, exact=("extract_specific", "transforms"))


def benchmark(net, cfg, args, device):
    """Time restore() on --batch faces of noise (what a picture shows does not change the speed) with the
    generic dictionary, then also with a person's stored one of eight references, and making that one."""
    count = args.batch or 1
    images = torch.rand(count + 8, 3, cfg.size, cfg.size, generator=common.seeded(args.seed or 0, 7)) * 2 - 1
    points = common.mean_landmarks(cfg.size).expand(count + 8, -1, -1)
    (degraded, references), (landmarks, theirs) = images.split((count, 8)), points.split((count, 8))

    def report(title, call, images):
        print(f"{title}: ", end="")
        common.benchmark(call, images, device, args.precision)

    report("generic dictionary", lambda: restore(
        net, degraded, landmarks, None, None, count, args.precision), count)
    if net.extract_specific is not None:
        specific = specific_dictionary(net, references, theirs, 8, args.precision)
        report("and a stored one of 8 references", lambda: restore(
            net, degraded, landmarks, specific, None, count, args.precision), count)
        report("making that of 8 references", lambda: specific_dictionary(
            net, references, theirs, 8, args.precision), 8)


def load_network(args, device):
    """The network of --checkpoint, and its Config. Spectral norm is folded in."""
    state = common.load_checkpoint(args.checkpoint, SCRIPT, device)
    cfg = Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in state["config"].items()})
    if args.preset and args.preset != cfg.preset:
        raise InputError(f"{args.checkpoint}: a checkpoint of --preset {cfg.preset}, not {args.preset}")
    net = common.channels_last(DMDNet(cfg), device)
    net.load_state_dict(state["net"])
    return common.fold(net.eval()), cfg


def extractor_hash(net):
    """A number for the weights of F_spe, which a stored dictionary fits and no others."""
    weights = net.extract_specific.state_dict().values()
    return hashlib.sha256(b"".join(w.float().cpu().numpy().tobytes() for w in weights)).hexdigest()


def save_dictionary(path, net, dictionary, names):
    """Store a person's specific dictionary, its pictures' names, and which network made it."""
    common.save_checkpoint(path, {"script": f"{SCRIPT} --save-dictionary", "network": extractor_hash(net),
                                  "names": [str(name) for name in names], "dictionary": {
                                      name: [item.cpu() for item in items]
                                      for name, items in dictionary.items()}})
    print(f"{path}: {len(names)} references")


def load_dictionary(path, net, device):
    """A person's dictionary, for the network that made it."""
    state = common.load_weights(path, device)
    if not isinstance(state, dict) or state.get("script") != f"{SCRIPT} --save-dictionary":
        raise InputError(f"{path}: not a person's dictionary; make one with --save-dictionary")
    if net.extract_specific is None or state["network"] != extractor_hash(net):
        raise InputError(f"{path}: made by another network; make it again with --save-dictionary and this "
                         "checkpoint")
    return {name: tuple(items) for name, items in state["dictionary"].items()}


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
    action.add_argument("--save-dictionary", metavar="FILE",
                        help="store the specific dictionary of the person of --reference")
    parser.add_argument("--reference", metavar="PATH",
                        help="for --restore: a folder of sharp pictures of the same person, or one")
    parser.add_argument("--dictionary", metavar="FILE",
                        help="for --restore: the same person's dictionary, stored by --save-dictionary")
    parser.add_argument("--data", metavar="DIR",
                        help="a folder of one folder per identity (default: rendered faces)")
    parser.add_argument("--preset", choices=PRESETS,
                        help="tiny (default): minutes on a CPU; paper: the paper's sizes and schedule")
    parser.add_argument("--variant", choices=VARIANTS, help="an ablation row of the paper's Table 3")
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
                        help="for --restore and --save-dictionary: the authors' DMDNet.pth, a file or its "
                             "address (https://…)")
    parser.add_argument("--vggface", metavar="FILE", help="VGG-Face weights, for --preset paper's losses")
    parser.add_argument("--landmarks", metavar="DIR",
                        help="a parallel folder of landmark files photo.jpg.txt")
    parser.add_argument("--aligned", action="store_true",
                        help="pictures are FFHQ-aligned crops; no landmarks needed")
    parser.add_argument("--overwrite", action="store_true", help="restore pictures again that have a result")
    parser.add_argument("--check", action="store_true",
                        help="also write the input with its landmarks and component boxes")
    args = parser.parse_args(argv)
    run = Path("runs") / (SCRIPT if args.variant in (None, "full") else f"{SCRIPT}-{args.variant}")
    training = args.train or args.evaluate
    if training:
        run = Path(args.out or run)
    args.out = args.out or (run if training else "restored")
    if args.weights is not None:
        for name in ("train", "evaluate", "checkpoint", "preset", "variant", "resume", "size"):
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
        torch.manual_seed(cfg.seed)
        net = DMDNet(cfg)
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
    options = {"aligned": args.aligned, "landmarks": args.landmarks, "device": device}
    specific = None
    if args.reference is not None and args.dictionary is not None:
        raise InputError("--reference or --dictionary, not both: the dictionary stands for its pictures")
    if args.dictionary is not None:
        specific = load_dictionary(args.dictionary, net, device)
    if args.reference is not None:
        references, points, names = common.read_references(args.reference, cfg.size, **options)
        specific = specific_dictionary(net, references, points, precision=args.precision)
        print(f"guided by {len(names)} pictures: {', '.join(map(str, names))}")
    if args.save_dictionary is not None:
        if args.reference is None:
            raise InputError("--save-dictionary wants --reference: a folder of sharp pictures of a person")
        save_dictionary(args.save_dictionary, net, specific, names)
        return 0
    failures = common.restore_files(
        args.restore, args.out, cfg.size,
        lambda crops, landmarks, file: restore(net, crops, landmarks, specific,
                                               precision=args.precision),
        overwrite=args.overwrite, check=args.check, **options)
    return 1 if failures else 0


# -----------------------------------------------------------------------------------------------------------
# 9. Released network
# -----------------------------------------------------------------------------------------------------------
# What the authors' published weights were trained as differs from the paper: the nose is left out, boxes are
# cut at whole features instead of RoIAlign, later components go over earlier ones, d of Eq. (7) is the
# number of items, and what is read is brought to the component's statistics by AdaIN before Eq. (9).

def released_boxes(landmarks):
    """component_boxes as the authors have them: brows belong to the eyes; (B,68,2) in pixels of a 512×512
    image → (B,4,4), whole pixels."""
    points, boxes = landmarks.clamp(8, 504), []
    eyes = [(points[:, slice(*eye)].mean(1), torch.cat([points[:, slice(*brow)], points[:, slice(*eye)]], 1))
            for eye, brow in (((36, 42), (17, 22)), ((42, 48), (22, 27)))]
    tops = [1.3 * (centre[:, 1] - group[..., 1].amin(1)) for centre, group in eyes]
    nose = points[:, 29:36].mean(1)
    half = 1.25 * torch.maximum(nose[:, 0] - points[:, 31, 0], points[:, 35, 0] - nose[:, 0])
    below = 1.1 * (points[:, 33, 1] - nose[:, 1])
    for centre, top, bottom in ((eyes[0][0], tops[0], tops[0] / 1.9), (eyes[1][0], tops[1], tops[1] / 1.9),
                                (nose, 2 * half - below, below)):
        half = (top + bottom) / 2
        boxes.append(torch.stack([centre[:, 0] - half + 1, centre[:, 1] - top + 1, centre[:, 0] + half,
                                  centre[:, 1] + bottom], 1))
    mouth = points[:, 48:]
    centre, half = mouth.mean(1), (mouth.amax(1) - mouth.amin(1)).amax(1, keepdim=True) / 2
    half = 1.1 * half.clamp(min=16)
    boxes.append(torch.cat([centre - half + 1, (centre + half).clamp(max=510)], 1))
    return torch.stack(boxes, 1).trunc()


def whole_corners(box, stride, side):
    """Boxes (B,4) in pixels → [x1, y1, x2, y2] in whole features of a side×side map, at least one each."""
    low = (box[:, :2].long() // stride).clamp(0, side - 1)
    high = torch.maximum((box[:, 2:].long() // stride).clamp(max=side), low + 1)
    return torch.cat([low, high], 1).tolist()


def cut_components(features, boxes, stride, sizes):
    """crop_components by slices at whole features and bilinear resampling; one sample and part at a time, as
    every box has its own size."""
    return [torch.cat([
        F.interpolate(features[k:k + 1, :, y1:y2, x1:x2].float(), (size, size), mode="bilinear")
        for k, (x1, y1, x2, y2) in enumerate(whole_corners(boxes[:, index], stride, features.shape[-1]))])
        for index, size in enumerate(sizes)]


def adain(reading, part):
    """(F̃ − μ(F̃)) / σ(F̃) · σ(F^d) + μ(F^d), over the positions of each channel; (B,C,n,n)."""
    (deviation, mean), (own_deviation, own_mean) = (
        ((x.var((2, 3), keepdim=True) + 1e-5).sqrt(), x.mean((2, 3), keepdim=True)) for x in (reading, part))
    return (reading - mean) / deviation * own_deviation + own_mean


class ReleasedTransform(DictionaryTransform):
    """DictionaryTransform with whole-feature boxes, √items in Eq. (7), and AdaIN."""

    def read(self, part, component, generic, specific, allowed):
        query, name = self.query[part](component), f"scale{self.scale}_{part}"
        reading, weights = read_dictionary(query, *generic[name], math.sqrt(self.cfg.items))
        read = {"generic": weights}
        if specific is not None:
            root = allowed.sum(1, keepdim=True).clamp(min=1).sqrt()
            own, read["specific"] = read_dictionary(query, *specific[name], root, allowed)
            mixed, read["identity"] = self.identity[part](component, own, reading)
            reading = torch.where(allowed.any(1)[:, None, None, None], mixed, reading)
        return adain(reading, component), read

    def forward(self, features, boxes, generic, specific, allowed):
        enriched, readings = features.clone(), {}
        parts = cut_components(features, boxes, self.stride, self.sizes)
        for index, (part, component) in enumerate(zip(self.cfg.parts, parts)):
            reading, readings[part] = self.read(part, component, generic, specific, allowed)
            changed = self.confidence[part](component, reading)
            corners = whole_corners(boxes[:, index], self.stride, features.shape[-1])
            for k, (x1, y1, x2, y2) in enumerate(corners):
                enriched[k:k + 1, :, y1:y2, x1:x2] = F.interpolate(
                    changed[k:k + 1], (y2 - y1, x2 - x1), mode="bilinear").to(enriched.dtype)
        return enriched, readings


def released_name(name):
    """A name in the official checkpoint → the name here, None if no output uses it."""
    path = name.split(".")
    path[-1] = {"weight_orig": "parametrizations.weight.original",
                "weight_u": "parametrizations.weight.0._u",
                "weight_v": "parametrizations.weight.0._v"}.get(path[-1], path[-1])
    head, *rest = path
    words = head.split("_")
    scale = {"256": "scale1", "128": "scale2", "64": "scale3"}
    part = {"LE": "left_eye", "RE": "right_eye", "MO": "mouth"}
    if words[0] in ("le", "re", "mo"):                                   # le_256_mem_key
        return f"generic.{scale[words[1]]}_{part[words[0].upper()]}_{words[3]}"
    if head in ("E_lq", "E_hq"):
        owner, block = ("extract" if head == "E_lq" else "extract_specific.features"), rest[0]
        if block.endswith("_Q"):                                         # LE_256_Q.Query.0
            words = block.split("_")
            return (None if head == "E_hq" else
                    ".".join(["transforms", scale[words[1]], "query", part[words[0]], *rest[2:]]))
        number, residual = int(block[-1]) - 1, block.startswith("res")   # conv1 res1 conv2 res2 | conv3 …
        return ".".join([owner, "levels", str(number // 2), str(number % 2 * 2 + residual),
                         *(["body", *rest[2:]] if residual else rest[1:])])
    if words[0] in part:
        owner = [scale[words[1]], part[words[0]]]
        if words[2] == "KV":
            return ".".join(["extract_specific", f"{rest[0].lower()}s", "_".join(owner), *rest[1:]])
        if words[2] == "Attention":
            return ".".join(["transforms", owner[0], "confidence", owner[1], "score", *rest])
        layer = {"conv1": "reduce.0", "conv2": "reduce.1", "conv3": "reduce.2", "convCat": "score"}[rest[0]]
        return ".".join(["transforms", owner[0], "identity", owner[1], layer, *rest[1:]])
    if head == "MSDilate":
        layer = "fuse" if rest[0] == "convi" else f"branches.{int(rest[0][-1]) - 1}"
        return ".".join(["context", layer, *rest[1:]])
    if head == "up4":
        return ".".join(["paint", *rest]).replace("Model", "body")
    layer = {"conv1": "reduce", "ScaleModel1": "scale", "ShiftModel1": "shift", "convup": "widen"}[rest[0]]
    rest = rest[1:] if layer != "widen" else [str(int(rest[1]) - 1), *rest[2:]]
    return ".".join(["stages", str(int(head[2]) - 1), layer, *rest])


def load_official(source):
    """DMDNet.pth as its authors released it, a file, its address or its state dict → the network, frozen:
    degraded (B,3,512,512) in [-1,1], boxes (B,4,4) (released_boxes), and, where there are any, references
    (B,N,3,512,512) and reference_boxes (B,N,4,4) → restored (B,3,512,512). InputError for what does not
    fit."""
    return common.load_named(DMDNet(RELEASED), source, released_name, "DMDNet's weights")


if __name__ == "__main__":
    common.run_script(main)
