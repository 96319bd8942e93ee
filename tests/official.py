"""Weights with the official names and shapes, and pictures, all out of formulas.

`official.json` lists the tensors of the four official files. `weights` and `dictionary`
fill them, `inputs` makes pictures with boxes and landmarks: always the same numbers.
"""
import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch

import common

OFFICIAL = json.loads(Path(__file__).with_name("official.json").read_text())
PARTS = ("left_eye", "right_eye", "nose", "mouth")


def tensors(script):
    """The official {name: shape}. A line: kind of layer, name, its weight's shape."""
    names = {}
    for line in OFFICIAL[script]["layers"]:
        kind, name, *sizes = line.split()
        shape = tuple(map(int, sizes))
        if kind == "tensor":
            names[name] = shape
            continue
        if not kind.endswith("-"):                                   # "-": without bias
            names[f"{name}.bias"] = shape[:1]
        if kind.startswith("spectral"):
            names[f"{name}.weight_orig"] = shape
            names[f"{name}.weight_u"] = shape[:1]
            names[f"{name}.weight_v"] = (int(np.prod(shape[1:])),)
        else:
            names[f"{name}.weight"] = shape
    return names


def noise(name, shape, spread):
    """Even noise of mean 0 and this standard deviation: the bits of the place, mixed."""
    bits = np.arange(np.prod(shape), dtype=np.uint32) * np.uint32(0x9E3779B1)
    bits += np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits ^= bits >> np.uint32(shift)
        bits *= np.uint32(factor)
    values = (bits >> np.uint32(8)).astype(np.float32)
    values -= 2**23 - 0.5
    values *= spread * 3**0.5 / 2**23
    return torch.from_numpy(values.reshape(shape))


# Factors that keep what the layers make near 1, and the pictures inside [-1,1].
GAINS = {
    "dfdnet": {r"^[a-z]{2}_\d": 0.3, r"ScaleModel1\.2": 0.7, r"^up4\.4": 0.3},
    "asffnet": {r"MaskModel\.2": 0.2, r"stem|Model\d|\.conv\d": 0.6, r"^UpModel\.9": 0.2},
    "dmdnet": {r"Res\.2|MSDilate": 0.5, r"^E_.q\.conv": 0.7, r"Scale": 0.7, r"Shift": 0.8,
               r"mem_key": 0.1, r"^up4\.4": 0.3},
    "restoreformer": {r"conv2|proj_out": 0.5, r"decoder\.conv_out": 0.3}}


def weights(script):
    """An official state dict.

    Of a layer with spectral norm uᵀWv is not 1, and u and v are no singular vectors:
    what divides by anything else is noticed. What nothing uses is a zero, repeated.
    """
    state = {}
    for name, shape in tensors(script).items():
        gain = 1.0
        for pattern, factor in GAINS[script].items():
            gain *= factor if re.search(pattern, name) else 1.0
        spread = gain * (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else None
        if script == "dfdnet" and unused(name):
            state[name] = torch.zeros(1).expand(shape)
        elif name.startswith("VggExtract.features."):    # the same tensor by another name
            state[name] = state["VggExtract.model.features." + name.split(".", 3)[3]]
        elif name.startswith("VggExtract.RGB"):
            state[name] = 0.45 + noise(name, shape, 0.05) - 0.2 * name.endswith("std")
        elif re.search(r"^up\d\.conv1\.0\.weight", name) and script == "dfdnet":
            blur = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
            state[name] = blur + noise(name, shape, 0.01)
        elif name.endswith("weight_orig"):
            weight = noise(name, shape, 1.5 * spread)
            u = noise(name + "u", shape[:1], 1.0)
            v = weight.flatten(1).T @ u
            state[name] = weight
            state[name.replace("_orig", "_u")] = 1.5 * u / v.norm()
            state[name.replace("_orig", "_v")] = v / v.norm()
        elif name.endswith((".weight_u", ".weight_v")):
            continue
        elif "mem_" in name or "embedding" in name:
            state[name] = noise(name, shape, gain)
        elif len(shape) == 1:                                # biases, group normalisation
            state[name] = noise(name, shape, 0.05) + float(name.endswith("weight"))
        else:
            state[name] = noise(name, shape, spread)
    return state


def unused(name):
    """A tensor of DFDNet's file that does not change any output."""
    return (name.endswith("weight_flip")
            or name.startswith(("to_rgb", "VggExtract.model.classifier")))


def dictionary(entries=4):
    """DFDNet's files, {name: array (entries, channels·side²)}."""
    files = {}
    scales = ((256, 128, 40, 25, 55), (128, 256, 20, 12, 27),
              (64, 512, 10, 6, 13), (32, 512, 5, 3, 6))
    for scale, channels, eye, nose, mouth in scales:
        for part, side in zip(PARTS, (eye, eye, nose, mouth)):
            shape = (entries, channels * side**2)
            files[f"{part}_{scale}_center.npy"] = noise(part, shape, 1.0).numpy()
    return files


def picture(name, size):
    """(1,3,size,size) in [-1,1]: slow waves and a little noise."""
    y = (torch.arange(size) / size).view(1, -1, 1)
    x = (torch.arange(size) / size).view(1, 1, -1)
    phase = noise(name, (3, 4, 1, 1), 2.0)
    waves = sum(torch.cos(phase[:, k] + (5 + 7 * k) * (x * (k % 3 - 1) + y * (k % 2)))
                for k in range(4))
    return (0.22 * waves + noise(name, (3, size, size), 0.03))[None]


def boxes(size, shift=0):
    """(1,4,4): left eye, right eye, nose, mouth as x1, y1, x2, y2 in pixels."""
    corners = [[55, 90, 115, 151], [139, 88, 204, 147],
               [95, 110, 160, 170], [80, 150, 175, 216]]
    return (torch.tensor([corners], dtype=torch.float32) + shift) * (size / 256)


def inputs(script, size):
    """What a released network is called with, {case: tensors}."""
    degraded = picture("degraded", size)
    if script == "restoreformer":
        return {"": [degraded]}
    if script == "asffnet":
        face = common.mean_landmarks(size)[None]
        own = face + noise("a", face.shape, 1.0)
        theirs = face * 0.9 + 8 + noise("b", face.shape, 1.0)
        return {"": [degraded, picture("guide", size), own, theirs]}
    if script == "dfdnet":
        return {"": [degraded, boxes(size)]}
    references = torch.stack([picture(name, size) for name in ("first", "second")], 1)
    theirs = torch.stack([boxes(size, 3), boxes(size, -5)], 1)
    return {"generic": [degraded, boxes(size)],
            "specific": [degraded, boxes(size), references, theirs]}
