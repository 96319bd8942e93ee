"""What the five scripts share: images, degradation, landmarks, metrics, faces, runs.

Nothing here knows any method; what differs between the papers (degradation ranges) is
data. Chapters:

1. Images             read_image, write_image, comparison_grid, show
2. Degradation        Degradation, DEGRADATIONS, degrade: I^d = ((I ⊗ k) ↓s + n)_JPEG ↑s
3. Landmarks          68 points: reading, aligning, pasting back, boxes, masks, detection
4. Metrics            psnr, ssim, detail, identity_distance, LPIPS, FID, paired_gain
5. Faces              FaceFolder (yours), split_identities, augment
6. Recognition        Recogniser, recogniser, VGG, ArcFace: features that losses compare
7. Published weights  read_published, load_named: weights that authors released
8. Runs               device, processes, checkpoints, command line, Run, measure, report
9. Rendered faces     RenderedFaces: people made in code, nothing to download

Images are float32 tensors, RGB in [-1,1], (3,H,W) or (B,3,H,W). Landmarks are x,y in
pixels; (0,0) is the centre of the top-left pixel. Everything random takes a seed or a
generator and repeats exactly.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import copy
import csv
import ctypes
import functools
import hashlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import urllib.parse
import uuid
import warnings
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

try:
    import fcntl
except ImportError:                # Windows
    fcntl = None

import matplotlib.figure
import numpy as np
import requests
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.utils import parametrize
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

__all__ = [       # what scripts, notebooks and README use; a rename is a decision
    "ArcFace", "COMPONENTS", "Claim", "DEGRADATIONS", "Degradation", "FFHQ_TEMPLATE", "FID",
    "Face", "FaceFolder", "INNER_LIP", "InputError", "JAW", "LEFT_EYE", "LPIPS",
    "NOSE_BASE", "NOSE_BRIDGE", "OUTER_LIP", "Progress", "RIGHT_EYE", "Range",
    "Recogniser", "RenderedFaces", "Run", "TASKS", "VGG", "add_fid", "align_face",
    "angular_margin_loss", "arguments", "augment", "autocast", "blur",
    "channels_last", "check_size", "chosen_config", "comparison_grid",
    "component_boxes", "degrade", "degrade_each", "detail", "detect_landmarks",
    "draw_landmarks", "face_matrix", "first", "five_points", "for_inference",
    "frechet_distance", "gaussian_matrix", "identity_distance", "in_batches",
    "inference", "invert_matrix", "jpeg", "judge", "keep_freed_memory",
    "landmark_heatmaps", "landmark_mask", "load_checkpoint", "load_encoder",
    "load_faces", "load_fid", "load_named", "load_part", "load_weights",
    "mean_landmarks", "measure", "metrics", "motion_kernels", "pack", "paired_gain",
    "parallel", "parse", "paste_face", "planned_runs", "psnr", "rank", "read_image",
    "read_landmarks", "read_published", "read_references", "recogniser",
    "recorded_config", "renamed", "report", "restore_files", "run_script",
    "save_checkpoint", "seeded", "set_rate", "show", "similarity", "split_identities",
    "spread", "ssim", "stack_faces", "stack_person", "stranger", "test_faces",
    "to_uint8", "transform_points", "unpack", "warp_affine", "world", "write_image",
    "write_landmarks"]

_CACHE = Path(os.environ.get("FACE_RESTORATION_CACHE", "~/.cache/face-restoration")).expanduser()
_PIXELS_SEARCHED = 8_000_000            # dlib gets a picture up to 3 times as large, up to this
_RESTORED_AT_ONCE = 16           # faces
_PIXELS_AT_ONCE = 20_000_000     # of the photos that wait for their faces
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif",
                   ".tiff", ".ppm", ".pgm", ".gif"}


class InputError(Exception):
    """Something the user gave cannot be used: one line, what is wrong and what to do.
    Exit status 2."""


class _NoFaceError(InputError):
    """The detector finds no face in a picture."""


# 1. Images ----------------------------------------------------------------------------

def read_image(path):
    """Read any picture Pillow opens → (3,H,W) RGB in [-1,1].

    Greyscale and palette become RGB. Transparency is laid over white. 16 bits keep their
    depth. CMYK is converted. The camera's EXIF rotation is applied. InputError for what
    is no picture, is damaged, under 16 pixels wide or above 89 megapixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                if min(file.size) < 16:
                    raise InputError(f"{path}: {file.width}×{file.height} pixels is too "
                                     "small; at least 16×16 is needed")
                file.load()
                picture = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS / 1e6
        raise InputError(f"{path}: more than {limit:.0f} megapixels; "
                         "shrink it or cut the face out first") from None
    except (OSError, SyntaxError, ValueError) as error:
        reason = str(error).split(" '")[0].split(" <")[0]
        raise InputError(f"{path}: not a readable picture ({reason}); "
                         "replace or remove it") from None

    if picture.mode.startswith("I"):
        grey = np.asarray(picture, np.float32) / 65535
        pixels = grey[..., None].repeat(3, 2)
    else:
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        pixels = np.asarray(picture.convert("RGB"), np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous() * 2 - 1


def write_image(path, image):
    """Write (3,H,W) in [-1,1] with 8 bits, rounded. The suffix names the format."""
    with _replacing(path) as temporary:
        try:
            to_pil_image(to_uint8(image)).save(temporary, quality=95)
        except ValueError:
            raise InputError(f"{path}: an unknown kind of picture; "
                             "name it .png or .jpg") from None


def to_uint8(image):
    """[-1,1] → 0 … 255, rounded and clamped, uint8."""
    levels = (image.detach().float() + 1) * 127.5
    return levels.round().clamp(0, 255).to(torch.uint8)


def comparison_grid(columns):
    """{title: (B,3,H,W)} → picture (3,H',W'): a row a sample, a column an entry."""
    height, width = next(iter(columns.values())).shape[-2:]
    gap = max(width // 64, 1)
    head = max(height // 6, 16)
    images = torch.stack([part.detach().float().cpu() for part in columns.values()], 1)
    grid = torchvision.utils.make_grid(images.flatten(0, 1), len(columns), gap, pad_value=1)
    picture = to_pil_image(to_uint8(F.pad(grid, (0, 0, head - gap, 0), value=1)))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=head * 0.62)
    for index, title in enumerate(columns):
        middle = gap + (index + 0.5) * (width + gap)
        draw.text((middle, head / 2), title, fill="black", font=font, anchor="mm")
    return pil_to_tensor(picture) / 127.5 - 1


def show(pictures, titles=(), columns=None, width=1.4):
    """Draw pictures below a notebook's cell, in rows, each `width` inches wide.

    A picture is (3,H,W) in [-1,1]. A map, (H,W) or (1,H,W), is drawn in colours that span
    its own range: blue is low, yellow is high.
    """
    from matplotlib import pyplot
    pictures = [torch.as_tensor(picture).detach().float().cpu() for picture in pictures]
    columns = min(columns or 8, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    high, wide = pictures[0].shape[-2:]
    height = width * high / wide + (0.25 if titles else 0)
    _, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows),
                              squeeze=False, layout="constrained", dpi=100)
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture in zip(axes.flat, pictures):
        if picture.ndim == 3 and len(picture) == 3:
            axis.imshow(to_uint8(picture).permute(1, 2, 0).numpy())
        else:
            axis.imshow(picture.reshape(picture.shape[-2:]).numpy(), cmap="viridis")
    for axis, title in zip(axes.flat, titles):
        axis.set_title(title, fontsize=9)
    pyplot.show()


# 2. Degradation -----------------------------------------------------------------------

class Range(NamedTuple):
    """low, low + step, … high; every number between where step is 0.

    `or_zero` adds one more element: 0, which stands for "none".
    """
    low: float
    high: float
    step: float = 0.0
    or_zero: bool = False

    def draw(self, count, generator=None):
        """`count` independent uniform draws, float32 (count,)."""
        if not self.step:
            share = torch.rand(count, generator=generator)
            return self.low + (self.high - self.low) * share
        elements = round((self.high - self.low) / self.step) + 1
        index = torch.randint(elements + self.or_zero, (count,), generator=generator)
        return torch.where(index == elements, 0.0, self.low + index * self.step)


@dataclass(frozen=True)
class Degradation:
    """The ranges of one paper's degradation model I^d = ((I ⊗ k) ↓s + n)_JPEG ↑s."""
    blur: Range               # ϱ, standard deviation of the Gaussian kernel, in pixels
    scale: Range              # s, down-sampling factor
    noise: Range              # σ, standard deviation of the noise, of 255
    quality: Range            # q, JPEG quality; 0 is no compression
    motion: bool = False      # half of the images get a camera shake, not a Gaussian
    mode: str = "bicubic"     # resampling, down (anti-aliased) and up
    size: int | None = None   # of the faces that pixels refer to; None: those at hand


DEGRADATIONS = {
    "gfrnet": Degradation(
        blur=Range(1, 3, 0.1, or_zero=True), scale=Range(1, 8, 0.1), noise=Range(0, 7, 1),
        quality=Range(10, 40, 1, or_zero=True), size=256),
    "asffnet": Degradation(
        blur=Range(1, 3, 0.1), scale=Range(1, 8, 0.1), noise=Range(0, 15, 1),
        quality=Range(10, 60, 1), motion=True, size=256),
    "dfdnet": Degradation(
        blur=Range(1, 5, 0.1), scale=Range(1, 8, 0.1), noise=Range(0, 15, 1),
        quality=Range(40, 80, 1), motion=True, size=256),
    "dmdnet": Degradation(
        blur=Range(1, 3, 0.1), scale=Range(1, 10, 0.1), noise=Range(0, 15, 1),
        quality=Range(50, 100, 1), size=512),
    "restoreformer": Degradation(
        blur=Range(0.2, 10), scale=Range(1, 8), noise=Range(0, 20),
        quality=Range(60, 100), mode="bilinear", size=512),
}


def gaussian_matrix(sigma, length, device="cpu"):
    """Blur along one axis as a matrix (length,length), sigma < length / 4.

    A row is a Gaussian of `sigma` pixels whose sum is 1, mirrored at the ends.
    """
    if not sigma:
        return torch.eye(length, device=device)
    radius = math.ceil(4 * sigma)
    taps = torch.arange(-radius, radius + 1, device=device)
    weights = torch.exp(-taps**2 / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(length, -1)
    reached = (torch.arange(length, device=device)[:, None] + taps).abs()
    reached = (length - 1) - ((length - 1) - reached).abs()
    return torch.zeros(length, length, device=device).scatter_add_(1, reached, weights)


@functools.lru_cache
def motion_kernels(count=32, seed=0, zoom=1.0):
    """Camera-shake kernels after Boracchi & Foi (2012) → (count,n,n), each of sum 1.

    The camera keeps part of its velocity (inertia), is pulled back to the origin (the
    hand's correction), is pushed at random (tremor), and at times is thrown about (a
    jerk). The time that the shutter sees a pixel is the kernel. A trajectory spans 5 to
    25 pixels, times `zoom`, and is centred on its mass.
    """
    steps = 400
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def uniform(low, high):
        return low + (high - low) * torch.rand(count, 1, generator=generator)

    velocity = F.normalize(normal(count, 2), dim=1)
    tremor = uniform(0.05, 0.35)
    pull = uniform(0.0, 0.006)
    jerk = uniform(0.0, 0.01)
    inertia = uniform(0.93, 1.0)
    position = torch.zeros(count, 2)
    path = []
    for _ in range(steps):
        jerked = (torch.rand(count, 1, generator=generator) < jerk) * 2.0
        velocity = (inertia * velocity + tremor * normal(count, 2) - pull * position
                    + jerked * (normal(count, 2) - velocity))
        velocity = F.normalize(velocity, dim=1)
        position = position + velocity
        path.append(position)
    path = torch.stack(path, 1)
    span = (path.amax(1) - path.amin(1)).amax(1)[:, None, None]
    path = path * uniform(5, 25)[..., None] / span
    path = zoom * (path - path.mean(1, keepdim=True))

    # A point between four pixels gives each its bilinear share.
    radius = math.ceil(path.abs().max()) + 1
    width = 2 * radius + 1
    kernels = torch.zeros(count, width * width)
    corner = path.floor().long() + radius
    part = path - path.floor()
    for dx in (0, 1):
        for dy in (0, 1):
            share_x = part[..., 0] if dx else 1 - part[..., 0]
            share_y = part[..., 1] if dy else 1 - part[..., 1]
            place = (corner[..., 1] + dy) * width + corner[..., 0] + dx
            kernels.scatter_add_(1, place, share_x * share_y / steps)
    return kernels.view(count, width, width)


def blur(image, kernel):
    """I ⊗ k: image (…,H,W), any kernel (n,n) of odd n < 2H, 2W, mirrored at the border.

    In the frequency domain a wide kernel costs no more than a small one.
    """
    height, width = image.shape[-2:]
    radius = len(kernel) // 2
    padded = F.pad(image, (radius,) * 4, mode="reflect")
    shape = [math.ceil(length / 32) * 32 for length in padded.shape[-2:]]   # fast lengths
    spectrum = torch.fft.rfft2(padded, s=shape) * torch.fft.rfft2(kernel, s=shape)
    start = 2 * radius
    blurred = torch.fft.irfft2(spectrum, s=shape)
    return blurred[..., start:start + height, start:start + width]


def jpeg(image, quality):
    """(3,H,W) uint8 → the same after JPEG at `quality` 1 … 100, on the CPU."""
    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, "JPEG", quality=int(quality))
    return pil_to_tensor(Image.open(buffer))


def degrade(target, degradation, generator=None, scale=None):
    """I^d = ((I ⊗ k) ↓s + n)_JPEG ↑s, every image with parameters of its own. H, W ≥ 32.

    target (B,3,H,W) in [-1,1] → the same shape, range and device, with 8 bits.
    `generator` (on the CPU) repeats it. `scale` fixes s, as the papers' ×4 and ×8 do.
    The paper's pixels are those of faces of its size: lengths are scaled by H / size.
    """
    count, _, height, width = target.shape
    device, mode = target.device, degradation.mode
    zoom = height / (degradation.size or height)
    sigmas = zoom * degradation.blur.draw(count, generator)
    scales = degradation.scale.draw(count, generator)
    noises = degradation.noise.draw(count, generator)
    qualities = degradation.quality.draw(count, generator)
    shakes = torch.full((count,), -1)
    if degradation.motion:
        kernels = motion_kernels(zoom=zoom).to(device)
        drawn = torch.randint(len(kernels), (count,), generator=generator)
        shaken = torch.rand(count, generator=generator) < 0.5
        shakes = torch.where(shaken, drawn, shakes)
    if scale is not None:
        scales = torch.full((count,), float(scale))
    seed = torch.randint(2**62, (), generator=generator).item()
    stream = torch.Generator(device).manual_seed(seed)

    degraded = []
    for k, image in enumerate(target.float()):
        factor = scales[k].item()
        h = max(round(height / factor), 1)
        w = max(round(width / factor), 1)
        if shakes[k] >= 0:
            image = blur(image, kernels[shakes[k]])
        # Blurring and resampling are linear and separable: one small matrix an axis.
        rows = _resampling(height, h, mode, device, sigmas[k].item() * (shakes[k] < 0))
        columns = _resampling(width, w, mode, device, sigmas[k].item() * (shakes[k] < 0))
        small = rows @ image @ columns.T
        noise = torch.randn(small.shape, device=device, generator=stream)
        small = to_uint8(small + noises[k].item() / 127.5 * noise)
        if qualities[k] > 0:
            small = jpeg(small, qualities[k].item()).to(device)
        rows = _resampling(h, height, mode, device)
        columns = _resampling(w, width, mode, device)
        degraded.append(rows @ small.float() @ columns.T)
    return torch.stack(degraded).round().clamp(0, 255) / 127.5 - 1


def degrade_each(target, degradation, scale, seed, indices):
    """`degrade` for a test: what a face draws follows from (seed, scale, its index)
    alone, so that all scripts measure the same inputs: (B,3,H,W) → the same."""
    return torch.cat([degrade(face[None], degradation, seeded(seed, 4, scale or 0, index), scale)
                      for face, index in zip(target, indices)])


def _resampling(before, after, mode, device, sigma=0.0):
    """Gaussian blur, then resampling, along one axis: a matrix (after,before)."""
    matrix = gaussian_matrix(sigma, before, device)[None, None]
    resampled = F.interpolate(matrix, (after, before), mode=mode, antialias=True)
    return resampled[0, 0]


# 3. Landmarks -------------------------------------------------------------------------
# The 68-point scheme; 17-26 are the brows. "Left" is the image's left.

JAW = slice(0, 17)
NOSE_BRIDGE = slice(27, 31)
NOSE_BASE = slice(31, 36)
LEFT_EYE = slice(36, 42)
RIGHT_EYE = slice(42, 48)
OUTER_LIP = slice(48, 60)
INNER_LIP = slice(60, 68)
COMPONENTS = {                # name → the landmarks a component's box is drawn around
    "left_eye": [*range(17, 22), *range(36, 42)],
    "right_eye": [*range(22, 27), *range(42, 48)],
    "nose": [*range(29, 36)],
    "mouth": [*range(48, 68)],
}

# Eye centres, nose tip, mouth corners in FFHQ's crop of 512×512, (5,2) in pixels.
FFHQ_TEMPLATE = torch.tensor(
    [[192.98, 239.95], [318.90, 240.19], [256.63, 314.02], [201.26, 371.41],
     [313.09, 371.15]])

# The mean of rendered faces aligned to FFHQ_TEMPLATE, made symmetric; pixels at 512.
_MEAN_LANDMARKS = torch.tensor([
    [127, 247], [131, 309], [141, 353], [155, 382], [173, 407], [193, 432], [213, 449],
    [234, 462], [256, 466], [277, 462], [298, 449], [318, 432], [338, 407], [356, 382],
    [370, 353], [380, 309], [384, 247], [159, 201], [173, 194], [190, 192], [206, 194],
    [224, 201], [287, 201], [305, 194], [321, 192], [338, 194], [352, 201], [256, 236],
    [256, 263], [256, 291], [256, 321], [230, 333], [243, 336], [256, 341], [268, 336],
    [281, 333], [168, 237], [185, 231], [207, 232], [224, 242], [207, 248], [186, 246],
    [287, 242], [304, 232], [326, 231], [343, 237], [325, 246], [304, 248], [201, 369],
    [222, 358], [244, 353], [256, 356], [267, 353], [289, 358], [310, 369], [290, 390],
    [268, 400], [256, 402], [243, 400], [221, 390], [207, 370], [237, 370], [256, 371],
    [274, 370], [304, 370], [274, 381], [256, 383], [237, 381]], dtype=torch.float32)

# Where each of the 68 points is found in the mirrored face.
_MIRRORED = [*range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1),
             45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40, *range(54, 47, -1),
             *range(59, 54, -1), *range(64, 59, -1), 67, 66, 65]


def mean_landmarks(size):
    """Landmarks (68,2) of an average FFHQ-aligned crop of size×size pixels."""
    return (_MEAN_LANDMARKS + 0.5) * size / 512 - 0.5


def read_landmarks(path, size=None, several=False):
    """Read 68 lines `x y` (68 lines a face) → (68,2), or (N,68,2) with `several`.

    `size` is the picture's (height, width). InputError for a wrong count, for what is no
    number, and for a face whose middle lies outside the picture.
    """
    try:
        lines = Path(path).read_text().splitlines()
        words = [line.replace(",", " ").split() for line in lines if line.strip()]
        points = torch.tensor([[float(x), float(y)] for x, y in words])
    except FileNotFoundError:
        raise InputError(f"{path}: no such landmark file") from None
    except (ValueError, UnicodeDecodeError, OSError):
        raise InputError(f"{path}: not a landmark file; "
                         "68 lines of two numbers `x y` are needed") from None
    if len(points) == 0 or len(points) % 68 or (len(points) > 68 and not several):
        raise InputError(f"{path}: {len(points)} landmarks, 68 needed; correct the file, "
                         "or pass an aligned crop with --aligned")
    if not points.isfinite().all():
        raise InputError(f"{path}: a landmark is not a finite number; correct the file")
    faces = points.view(-1, 68, 2)
    if (five_points(faces).var(1).sum(1) < 1).any():
        raise InputError(f"{path}: all landmarks lie in one place; correct the file")
    if size is not None:
        far = torch.tensor([size[1], size[0]])
        middle = faces[:, 17:].mean(1)
        outside = (middle < 0) | (middle > far - 1)
        distant = (faces < -far) | (faces > 2 * far)
        if outside.any() or distant.any():
            raise InputError(f"{path}: landmarks lie outside the {size[1]}×{size[0]} "
                             "picture; correct the file")
    return faces if several else faces[0]


def write_landmarks(path, landmarks):
    """Write (68,2) or (N,68,2) as lines `x y` with three decimals."""
    points = landmarks.reshape(-1, 2).tolist()
    with _replacing(path) as temporary:
        temporary.write_text("".join(f"{x:.3f} {y:.3f}\n" for x, y in points))


def _find_landmarks(picture, folder=None):
    """A photo's landmark file, photo.jpg.txt or photo.txt, or None.

    It lies beside the photo, or in a parallel `folder`, in the same folders there.
    """
    picture = Path(picture)
    names = [f"{picture.name}.txt", f"{picture.stem}.txt"]
    places = [picture.parent]
    if folder is not None:
        within = picture.absolute().parent.parts[1:]
        places = [Path(folder, *within[start:]) for start in range(len(within) + 1)]
    files = [place / name for place in places for name in names]
    return next((file for file in files if file.is_file()), None)


def five_points(landmarks):
    """(…,68,2) → eye centres, nose tip, mouth corners (…,5,2), as in FFHQ_TEMPLATE."""
    left = landmarks[..., LEFT_EYE, :].mean(-2, keepdim=True)
    right = landmarks[..., RIGHT_EYE, :].mean(-2, keepdim=True)
    return torch.cat([left, right, landmarks[..., [30, 48, 54], :]], -2)


def similarity(source, target):
    """Rotation, scale and shift M (2,3) with target ≈ M · (x, y, 1), least squares.

    source and target are points (N,2).
    """
    sx, sy = (source - source.mean(0)).double().T
    tx, ty = (target - target.mean(0)).double().T
    norm = (sx**2 + sy**2).sum()
    a = (sx * tx + sy * ty).sum() / norm
    b = (sx * ty - sy * tx).sum() / norm
    turn = torch.stack([a, -b, b, a]).view(2, 2)
    shift = target.double().mean(0) - turn @ source.double().mean(0)
    return torch.cat([turn, shift[:, None]], 1).float()


def transform_points(points, matrix):
    """Apply M (2,3) to points (…,2)."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def invert_matrix(matrix):
    """The inverse of a 2-D affine map (2,3)."""
    inverse = torch.linalg.inv(matrix[:, :2])
    return torch.cat([inverse, -inverse @ matrix[:, 2:]], 1)


def warp_affine(image, matrix, height, width, padding="zeros"):
    """Draw image (C,H,W) on a height×width canvas, its pixel p at M·p, bilinearly.

    Where M shrinks, the image is shrunk first, antialiased: bilinear sampling alone would
    skip pixels. `padding`: what lies outside the image, as in F.grid_sample.
    """
    inverse = invert_matrix(matrix)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    points = transform_points(torch.stack([x, y], -1).float(), inverse)
    extent = torch.tensor([image.shape[2], image.shape[1]])
    grid = ((points + 0.5) / extent * 2 - 1).to(image.device)      # of any resolution
    shrink = torch.linalg.det(inverse[:, :2]).abs().sqrt().item()
    if shrink > 1:
        sides = [max(round(side / shrink), 1) for side in image.shape[1:]]
        image = F.interpolate(image[None], sides, mode="bilinear", antialias=True)[0]
    return F.grid_sample(image[None], grid[None], padding_mode=padding,
                         align_corners=False)[0]


def face_matrix(landmarks, size):
    """M (2,3) that brings a face's landmarks (68,2) to the FFHQ template, size×size."""
    return similarity(five_points(landmarks), (FFHQ_TEMPLATE + 0.5) * size / 512 - 0.5)


def align_face(image, landmarks, size):
    """Cut a face (68,2) out of image (3,H,W).

    → crop (3,size,size), its landmarks (68,2), the matrix (2,3) from photo to crop.
    """
    matrix = face_matrix(landmarks, size)
    crop = warp_affine(image, matrix, size, size, "border")
    return crop, transform_points(landmarks, matrix), matrix


def paste_face(photo, crop, matrix, feather=0.1):
    """Put crop back where `matrix` (photo → crop) took it from.

    Its borders fade over `feather` of its width. There it is given the photo's colours:
    the difference, blurred, is added to the whole crop, so that no seam shows.
    """
    size = crop.shape[-1]
    place = torch.arange(size)
    ramp = (place.minimum(place.flip(0)) + 0.5) / (feather * size)
    ramp = ramp.clamp(max=1)
    ramp = ramp * ramp * (3 - 2 * ramp)
    cover = (ramp[:, None] * ramp).to(crop)

    border = cover * (1 - cover)
    blurring = gaussian_matrix(size / 6, size).to(crop)
    difference = border * (warp_affine(photo, matrix, size, size, "border") - crop)
    crop = crop + (blurring @ difference @ blurring.T) / (blurring @ border @ blurring.T)

    inverse = invert_matrix(matrix)
    corners = torch.tensor([[0.0, 0.0], [size, 0.0], [0.0, size], [size, size]]) - 0.5
    corners = transform_points(corners, inverse)
    extent = torch.tensor([photo.shape[2], photo.shape[1]])
    left, top = corners.amin(0).floor().long().clamp(min=0).minimum(extent - 1).tolist()
    right, bottom = (corners.amax(0).ceil().long() + 1).minimum(extent).tolist()
    right, bottom = max(right, left + 1), max(bottom, top + 1)  # at least a pixel of the photo
    inverse = inverse - torch.tensor([[0.0, 0.0, left], [0.0, 0.0, top]])
    alpha = warp_affine(cover[None], inverse, bottom - top, right - left)
    layer = warp_affine(crop, inverse, bottom - top, right - left, "border")
    result = photo.clone()
    result[:, top:bottom, left:right] += alpha * (layer - result[:, top:bottom, left:right])
    return result


def component_boxes(landmarks, size):
    """Squares around left eye, right eye, nose, mouth: (B,68,2) → (B,4,4) x1,y1,x2,y2.

    A box covers the pixels from x1 up to, not including, x2: pixel i spans i to i+1. With
    m the mean of the component's landmarks and h half of their larger extent, the box is
    (m−h+1, m+h), inside the size×size image. h and the width are at least size/32.
    """
    least = size / 32
    boxes = []
    for points in COMPONENTS.values():
        component = landmarks[:, points]
        extent = (component.amax(1) - component.amin(1)).amax(1, keepdim=True)
        half = (extent / 2).clamp(min=least)
        low = (component.mean(1) - half + 1).clamp(0, size - least)
        high = torch.maximum((component.mean(1) + half).clamp(max=size), low + least)
        boxes.append(torch.cat([low, high], 1))
    return torch.stack(boxes, 1)


def landmark_mask(landmarks, size, radius=3.0):
    """Discs of `radius` pixels around landmarks: (B,68,2) → (B,1,size,size), 0 or 1.

    The jaw, 0-16, is left out.
    """
    distance = _squared_distances(landmarks[:, JAW.stop:], size).amin(1, keepdim=True)
    return (distance <= radius**2).float()


def landmark_heatmaps(landmarks, size, sigma=2.0):
    """A Gaussian of height 1 around each landmark: (B,68,2) → (B,68,size,size)."""
    return torch.exp(-_squared_distances(landmarks, size) / (2 * sigma**2))


def _squared_distances(landmarks, size):
    """Of every pixel to every landmark: (B,N,2) → (B,N,size,size)."""
    pixels = torch.arange(size, device=landmarks.device)
    x = (pixels - landmarks[..., 0, None]) ** 2
    y = (pixels - landmarks[..., 1, None]) ** 2
    return x[:, :, None, :] + y[:, :, :, None]


def draw_landmarks(image, landmarks):
    """A copy of image (3,H,W) with landmarks (68,2) and component boxes drawn on it."""
    picture = to_pil_image(to_uint8(image))
    draw = ImageDraw.Draw(picture)
    dot = max(picture.width / 256, 0.6)
    for x1, y1, x2, y2 in component_boxes(landmarks[None], picture.width)[0].tolist():
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline="yellow",
                       width=max(round(dot), 1))
    for x, y in landmarks.tolist():
        draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill="lime")
    return pil_to_tensor(picture) / 127.5 - 1


@functools.lru_cache
def _landmark_detector(device):
    """find(pixels (H,W,3) uint8) → landmarks (68,2) of its faces, by face-alignment, else
    by dlib. ImportError if neither is installed."""
    with contextlib.suppress(ImportError):
        import face_alignment
        kinds = face_alignment.LandmarksType
        kind = kinds.TWO_D if hasattr(kinds, "TWO_D") else kinds._2D    # before version 1.4
        detector = face_alignment.FaceAlignment(kind, device=device, flip_input=False)
        return detector.get_landmarks_from_image

    import dlib
    models = importlib.util.find_spec("face_recognition_models")  # its __init__ wants setuptools
    if models is None:
        raise ImportError
    file = Path(models.origin).parent / "models" / "shape_predictor_68_face_landmarks.dat"
    search = dlib.get_frontal_face_detector()
    predict = dlib.shape_predictor(str(file))

    def find(pixels):
        # It knows faces from 80 pixels on. A picture is enlarged so that smaller ones grow to that.
        height, width, _ = pixels.shape
        enlarged = int(math.sqrt(_PIXELS_SEARCHED / (height * width)))
        factor = min(max(enlarged, 1), 3)
        if factor > 1:
            pixels = np.array(Image.fromarray(pixels).resize((factor * width, factor * height)))
        # not 0, its own threshold: faces are blurred here
        boxes, _, _ = search.run(pixels, 0, -0.15)
        marks = [predict(pixels, box).parts() for box in boxes]
        return [np.array([((point.x + 0.5) / factor - 0.5, (point.y + 0.5) / factor - 0.5)
                          for point in face], np.float32) for face in marks]
    return find


def _detecting(workers, device):
    """So many worker processes may detect: none where the detector is on a GPU."""
    on_gpu = torch.device(device).type == "cuda" and importlib.util.find_spec("face_alignment")
    return 0 if on_gpu else workers


def detect_landmarks(image, device="cpu", name="this picture", aligned=False):
    """Landmarks of all faces in image (3,H,W) → (N,68,2), the largest face first.

    By face-alignment, the papers' own detector, or by dlib, whichever is installed.
    InputError if none is, or if it finds no face. `aligned`: the image is an aligned crop
    already, so the message does not propose one.
    """
    crop = "" if aligned else "pass an aligned crop with --aligned, or "
    try:
        detector = _landmark_detector(str(device))
    except ImportError:
        raise InputError(
            f"{name}: its landmarks are unknown; {crop}give a file {name}.txt of 68 lines "
            "`x y`, or `pip install dlib-bin face_recognition_models`, or `pip install "
            "face-alignment`") from None
    found = detector(to_uint8(image).permute(1, 2, 0).cpu().numpy())
    if found is None or len(found) == 0:
        raise _NoFaceError(f"{name}: no face found; {crop}give its landmarks in {name}.txt")
    faces = torch.from_numpy(np.stack(found)[..., :2]).float()
    return faces[faces.var(1).sum(1).argsort(descending=True)]


# 4. Metrics ---------------------------------------------------------------------------

def psnr(restored, target):
    """Peak signal-to-noise ratio in dB, (B,3,H,W) in [-1,1] → (B,). The peak is 2."""
    error = (restored.float() - target.float()).square().mean((1, 2, 3))
    return -10 * torch.log10(error / 4)


def ssim(restored, target):
    """Structural similarity, (B,3,H,W) in [-1,1] → (B,). Wang et al. (2004).

    Gaussian window 11×11 of σ 1.5, K1 0.01, K2 0.03, on RGB; the mean over the channels
    and over the places where the window fits.
    """
    offset = torch.arange(11, device=restored.device) - 5.0
    taps = torch.exp(-offset**2 / (2 * 1.5**2)).double()
    taps = taps / taps.sum()

    def band(length):
        """The window along one axis as a matrix (length−10,length): much faster."""
        matrix = taps.new_zeros(length - 10, length + 1)
        matrix[:, :11] = taps
        return matrix.flatten()[:-(length - 10)].view(length - 10, length)

    rows = band(restored.shape[-2])
    columns = band(restored.shape[-1])

    def window(image):
        return rows @ image @ columns.T

    x = restored.double()
    y = target.double()
    c1 = (0.01 * 2) ** 2
    c2 = (0.03 * 2) ** 2
    mean_x = window(x)
    mean_y = window(y)
    var_x = window(x * x) - mean_x**2
    var_y = window(y * y) - mean_y**2
    covariance = window(x * y) - mean_x * mean_y
    index = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
             / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))
    return index.mean((1, 2, 3)).float()


def detail(image, target):
    """Fine detail as a share of the target's, (B,3,H,W) in [-1,1] → (B,).

    The mean square of a picture less its 5×5 mean, over that of the target. 1: as much as
    the target; below: blur; above: noise.
    """
    def energy(picture):
        picture = picture.float()
        mean = F.avg_pool2d(F.pad(picture, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
        return (picture - mean).square().mean((1, 2, 3))

    return energy(image) / energy(target).clamp(min=1e-12)


def identity_distance(net, restored, target):
    """Angle in degrees between a recognition network's embeddings, (B,3,H,W) → (B,)."""
    one = F.normalize(net(restored.float()).float(), dim=1)
    two = F.normalize(net(target.float()).float(), dim=1)
    cosine = (one * two).sum(1)
    return torch.rad2deg(cosine.clamp(-1, 1).arccos())


class LPIPS(nn.Module):
    """Learned perceptual distance, version 0.1 on AlexNet (Zhang et al. 2018).

    forward: two batches (B,3,H,W) in [-1,1] → (B,). `linear` is the authors' file
    weights/v0.1/alex.pth. AlexNet is torchvision's, or of `backbone`, a file.
    """
    def __init__(self, linear, backbone=None):
        super().__init__()
        if backbone is None:
            backbone = _torchvision_weights("AlexNet_Weights.IMAGENET1K_V1")
        self.features = load_named(
            torchvision.models.alexnet(weights=None).features, backbone,
            [(r"features\.(.*)", r"\1"), (r"classifier\..*", None)],
            "torchvision's AlexNet (alexnet-owt-7be5be79.pth)")
        widths = (64, 192, 384, 256, 256)
        self.linear = load_named(
            nn.ParameterList(torch.zeros(1, width, 1, 1) for width in widths), linear,
            [(r"lin(\d)\.model\.1\.weight", r"\1")],
            "LPIPS's weights/v0.1/alex.pth of github.com/richzhang/PerceptualSimilarity")
        self.eval().requires_grad_(False)

    def forward(self, restored, target):
        x = torchvision.transforms.functional.normalize(
            torch.cat([restored, target]), (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
        weights = iter(self.linear)
        distance = 0
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                one, two = unit.chunk(2)
                weighted = ((one - two).square() * next(weights)).sum(1)
                distance = distance + weighted.mean((1, 2))
        return distance


def frechet_distance(first, second):
    """|μ1−μ2|² + tr(C1 + C2 − 2 (C1 C2)^½) of Gaussians fit to features (N,D), (M,D)."""
    def fit(features):
        features = features.double()
        mean = features.mean(0)
        # C = RᵀR with R at most D×D, however many pictures there are.
        root = torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r").R
        return mean, root

    mean1, root1 = fit(first)
    mean2, root2 = fit(second)
    own = root1.square().sum() + root2.square().sum()                   # tr (C1 + C2)
    cross = torch.linalg.svdvals(root1 @ root2.T).sum()                 # tr (C1 C2)^½
    return ((mean1 - mean2).square().sum() + own - 2 * cross).item()


class FID:
    """Fréchet Inception distance (Heusel et al. 2017), with the original weights.

    `weights` is pt_inception-2015-12-05-6726825d.pth. fid(images, references) → a number;
    both are iterables of (B,3,H,W) in [-1,1].
    """
    def __init__(self, weights, device="cpu"):
        net = torchvision.models.inception_v3(weights=None, num_classes=1008,
                                              aux_logits=False, init_weights=False)
        load_named(net, weights, [], "FID's pt_inception-2015-12-05-6726825d.pth "
                                     "of github.com/mseitzer/pytorch-fid")
        # The original averages over pixels inside only; its last block takes a maximum.
        average = functools.partial(F.avg_pool2d, count_include_pad=False)
        for name, block in net.named_children():
            if isinstance(getattr(block, "branch_pool", None), nn.Module):
                pool = F.max_pool2d if name == "Mixed_7c" else average
                self._pool_otherwise(block, pool)
        net.fc = nn.Identity()
        self.net = net.to(device)
        self.device = device

    @staticmethod
    def _pool_otherwise(block, pool):
        """Keep the block's input; hand its pooling branch what `pool` makes of it."""
        kept = {}
        block.register_forward_pre_hook(lambda _, inputs: kept.update(x=inputs[0]))
        block.branch_pool.register_forward_pre_hook(
            lambda *_: pool(kept["x"], 3, stride=1, padding=1))

    @torch.inference_mode()
    def features(self, batches):
        """Iterable of (B,3,H,W) → (N,2048)."""
        rows = []
        for images in batches:
            images = F.interpolate(images.to(self.device), (299, 299), mode="bilinear",
                                   align_corners=False)
            rows.append(self.net(images).cpu())
        return torch.cat(rows)

    def __call__(self, images, references):
        return frechet_distance(self.features(images), self.features(references))


def paired_gain(restored, baseline, seed=0):
    """Mean difference a face and its 95 % interval, by 2,000 bootstrap resamples."""
    difference = (restored - baseline).double().cpu()
    faces = len(difference)
    index = torch.randint(faces, (2000, faces), generator=seeded(seed, 9))
    bounds = torch.tensor([0.025, 0.975], dtype=torch.double)
    interval = torch.quantile(difference[index].mean(1), bounds)
    return {"mean": difference.mean().item(), "ci95": interval.tolist()}


# 5. Faces from folders ----------------------------------------------------------------

class Face(NamedTuple):
    image: torch.Tensor        # (3,H,W) float32 in [-1,1]
    landmarks: torch.Tensor    # (68,2) float32, x,y in pixels
    identity: int


class FaceFolder(torch.utils.data.Dataset):
    """Your pictures: a folder a person, or a flat folder (each picture is a person).

    Items are `Face`s of size×size. Landmarks are photo.jpg.txt or photo.txt beside the
    picture, or in the parallel folder `landmarks`. For a picture without any the detector
    is asked, in `workers` processes, and its largest face is kept in the cache. With
    `aligned` it is an FFHQ-aligned crop instead and gets the average ones, unless
    `need_landmarks`. Square pictures are used whole, others are aligned by their
    landmarks; without landmarks their middle is used. What cannot be read is named on
    stderr and left out. More than 5 % of it is an InputError.

    identity: tensor of the people's numbers. names[number]: the person's name, that of
    the folder or file. fingerprint: changes with names, sizes, landmarks and options.
    """
    def __init__(self, root, size=128, landmarks=None, aligned=False,
                 need_landmarks=False, device="cpu", workers=0):
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; --data wants a folder of pictures "
                             "or of one folder per identity")
        if landmarks is not None and not Path(landmarks).is_dir():
            raise InputError(f"{landmarks}: no such folder of landmark files")
        found = sorted(file for file in (*root.glob("*"), *root.glob("*/*"))
                       if file.suffix.lower() in _IMAGE_SUFFIXES
                       and not file.name.startswith("."))
        if not found:
            raise InputError(f"{root}: no pictures in it; "
                             f"{', '.join(sorted(_IMAGE_SUFFIXES))} are read")
        self.size = size
        self._total = len(found)
        self._faults = {}                      # file → what is wrong with it
        self._files = []
        self._points = []                      # landmarks in the file's pixels, or None
        average = aligned and not need_landmarks
        if not average:
            _detect_ahead([file for file in found if _find_landmarks(file, landmarks) is None],
                          device, workers)
        for file in found:
            try:
                seen = _picture_size(file)
                path = _find_landmarks(file, landmarks)
                if path is not None:
                    points = read_landmarks(path, seen)
                else:
                    points = None if average else _detected(file, device, aligned)
                self._points.append(points)
                self._files.append(file)
            except InputError as error:
                self._report(file, error)

        owners = [file if file.parent == root else file.parent for file in self._files]
        people = sorted(set(owners))
        numbers = {person: number for number, person in enumerate(people)}
        self.names = [person.name for person in people]
        self.identity = torch.tensor([numbers[owner] for owner in owners])
        self._pictures = [[] for _ in people]
        for index, number in enumerate(self.identity.tolist()):
            self._pictures[number].append(index)

        options = f"aligned {aligned}, landmarks {landmarks is not None}"
        digest = hashlib.sha256(options.encode())
        for file, points in zip(self._files, self._points):
            name = file.relative_to(root).as_posix()
            digest.update(f"\n{name} {file.stat().st_size}\n".encode())
            digest.update(b"" if points is None else points.numpy().tobytes())
        self.fingerprint = f"folder-{size}-{digest.hexdigest()[:16]}"
        self._keep = len(self._files) * 3 * size * size < 2**30      # bytes, in memory
        self._kept = {}

    def _report(self, file, error):
        self._faults[file] = str(error)
        if len(self._faults) > 0.05 * self._total:
            listed = "; ".join(list(self._faults.values())[:3])
            raise InputError(f"{len(self._faults)} of {self._total} pictures cannot be "
                             f"used (more than 5 %): {listed}")
        print(f"left out: {error}", file=sys.stderr)

    def _load(self, index):
        """The picture, uint8 (3,size,size), and its landmarks (68,2) there."""
        image = read_image(self._files[index])
        landmarks = self._points[index]
        height, width = image.shape[1:]
        if height != width and landmarks is not None:
            image, landmarks, _ = align_face(image, landmarks, self.size)
            return to_uint8(image), landmarks
        side = min(height, width)
        left = (width - side) // 2
        top = (height - side) // 2
        image = image[:, top:top + side, left:left + side]
        if side != self.size:
            image = F.interpolate(image[None], (self.size, self.size), mode="bicubic",
                                  antialias=True)[0]
        if landmarks is None:
            return to_uint8(image), mean_landmarks(self.size)
        landmarks = landmarks - torch.tensor([left, top])
        return to_uint8(image), (landmarks + 0.5) * self.size / side - 0.5

    def __len__(self):
        return len(self._files)

    def __getitem__(self, index):
        if index in self._kept:
            image, landmarks = self._kept[index]
        else:
            try:
                image, landmarks = self._load(index)
            except InputError as error:
                if not self.damaged(index):
                    self._report(self._files[index], error)
                whole = [i for i in self.others(index) if not self.damaged(i)]
                if not whole:
                    raise InputError(f"{error} (there is no other picture of this "
                                     "identity to take its place)") from None
                return self[whole[0]]        # the same person: no held-out face slips in
            if self._keep:
                self._kept[index] = image, landmarks
        return Face(image.float() / 127.5 - 1, landmarks, int(self.identity[index]))

    def landmarks(self, index):
        """Landmarks (68,2) in the pixels of the file; the picture is not read."""
        points = self._points[index]
        return mean_landmarks(self.size) if points is None else points

    def damaged(self, index):
        """Whether the picture was found damaged, so that another took its place."""
        return self._files[index] in self._faults

    def others(self, index):
        """Indices of the other pictures of the same person."""
        return [i for i in self._pictures[self.identity[index]] if i != index]


def _detected(file, device, aligned=False):
    """Landmarks (68,2) of the largest face, from the cache or by the detector.

    A picture without a face is remembered, too, as an empty file.
    """
    state = file.stat()
    key = f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"
    kept = _CACHE / "landmarks" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.txt"
    if kept.is_file() and kept.stat().st_size > 0:
        return read_landmarks(kept)
    if kept.is_file():
        raise InputError(f"{file}: no face found; give its landmarks in {file}.txt, "
                         "or remove it")
    try:
        points = detect_landmarks(read_image(file), device, file, aligned)[0]
    except _NoFaceError:
        write_landmarks(kept, torch.empty(0, 68, 2))
        raise
    write_landmarks(kept, points)
    return points


def _try_to_detect(device, file):
    """Put the landmarks of a picture into the cache, if that can be done."""
    with contextlib.suppress(InputError, OSError):         # said when the picture's turn comes
        _detected(file, device)


def _detect_ahead(files, device, workers):
    """Detect the faces of a folder in several processes, once for all ranks."""
    if not files:
        return
    with first():
        if rank() == 0:
            progress = Progress("looking for faces", len(files), quiet=len(files) < 100)
            work = functools.partial(_try_to_detect, device)
            loader = torch.utils.data.DataLoader(files, batch_size=None, collate_fn=work,
                                                 num_workers=_detecting(workers, device))
            for number, _ in enumerate(loader, 1):
                progress.update(number)


def _picture_size(file):
    """(height, width) of a picture as it is seen, read from its head alone."""
    ends = {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND"}
    with open(file, "rb") as data:              # a file that was cut off lacks its end
        data.seek(max(data.seek(0, os.SEEK_END) - 4096, 0))
        if ends.get(file.suffix.lower(), b"") not in data.read():
            read_image(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as picture:
                width, height = picture.size
                # Asking a PNG without EXIF for its EXIF would decode it.
                exif = picture.format != "PNG" or "exif" in picture.info
                if exif and picture.getexif().get(0x0112, 1) >= 5:      # the camera lay
                    return width, height
                return height, width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombWarning,
            Image.DecompressionBombError):
        return tuple(read_image(file).shape[1:])      # says in a sentence what is wrong


def split_identities(faces):
    """Indices of the pictures for training, for validation and for testing.

    A person's name decides: hashed to a share of [0,1), it is test below 0.08, validation
    from there to 0.12, training above. More people never make a trained person a test
    person. Where no one is test the smallest share is; where no one is validation the
    second smallest is.
    """
    digests = [hashlib.sha256(name.encode()).digest() for name in faces.names]
    shares = [int.from_bytes(digest[:8], "big") / 2**64 for digest in digests]
    if len(shares) < 3:
        raise InputError(f"{len(shares)} identities are too few to train and to hold "
                         "some out; at least 3 are needed")
    order = sorted(range(len(shares)), key=shares.__getitem__)
    test = {number for number in order if shares[number] < 0.08} or {order[0]}
    validation = {number for number in order if 0.08 <= shares[number] < 0.12} - test
    validation = validation or {order[1]}
    test = test - validation
    people = set(order) - validation - test
    if not people:
        raise InputError(f"the names of all {len(order)} identities put them among those "
                         "held out; add people to train on")
    parts = people, validation, test
    identity = faces.identity.tolist()
    return [[i for i, number in enumerate(identity) if number in part] for part in parts]


def stack_faces(faces, indices):
    """faces[i] for i in indices → images (B,3,H,W), landmarks (B,68,2)."""
    chosen = [faces[i] for i in indices]
    images = torch.stack([face.image for face in chosen])
    return images, torch.stack([face.landmarks for face in chosen])


def stack_person(faces, indices):
    """stack_faces of a picture and, behind it, others of the person that shall guide it.

    Where one is damaged another of the person takes its place. The first never stands
    behind as well.
    """
    wanted = max(len(set(indices)), 2)
    whole = {}                                 # index → Face
    for i in dict.fromkeys([*indices, *faces.others(indices[0])]):
        face = faces[i]
        if not faces.damaged(i):
            whole[i] = face
        if len(whole) == wanted:
            break
    if len(whole) < 2:
        name = faces.names[faces.identity[indices[0]]]
        raise InputError(f"{name} has no two readable pictures, one to restore and one "
                         "to guide; see `left out` above, and remove the folder")
    first, *guides = whole                     # indices[0] is the first, if it is whole
    behind = [i if i in guides else guides[place % len(guides)]
              for place, i in enumerate(indices[1:])]
    return stack_faces(whole, [first, *behind])


def stranger(faces, indices, i):
    """One of the pictures of somebody else than the person on picture i, always the same;
    None where there is none."""
    others = [k for k in indices if faces.identity[k] != faces.identity[i]]
    return others[i % len(others)] if others else None


def spread(indices, limit):
    """At most `limit` of the indices, evenly spaced; None: all of them."""
    if limit is None or len(indices) <= limit:
        return list(indices)
    return [indices[k * len(indices) // limit] for k in range(limit)]


def augment(images, landmarks, generator, shift=0.02, jitter=0.0):
    """Random place, flip, brightness and contrast of one person's pictures (N,3,H,W).

    landmarks (N,68,2) follow. All are flipped or none; the rest is drawn for each. A
    face moves by up to `shift` of the size, brightness and contrast change by up to
    `jitter` (of a range of -1 to 1). It moves by whole pixels, the border repeated:
    interpolating would blur what a network shall learn to paint.
    """
    count = len(images)
    size = images.shape[-1]
    furthest = round(shift * size)
    offset = torch.randint(-furthest, furthest + 1, (2, count, 1), generator=generator)
    drawn = torch.rand(2, count, 1, 1, 1, generator=generator)
    light, contrast = jitter * (2 * drawn - 1)
    flip = torch.rand((), generator=generator) < 0.5

    columns, rows = (torch.arange(size) - offset).clamp(0, size - 1)
    images = images.take_along_dim(rows[:, None, :, None], 2)
    images = images.take_along_dim(columns[:, None, None, :], 3)
    landmarks = landmarks + offset.permute(1, 2, 0)

    if jitter:
        middle = images.mean((1, 2, 3), keepdim=True)
        images = ((images - middle) * (1 + contrast) + middle + light).clamp(-1, 1)
    if flip:
        images = images.flip(3)
        landmarks = landmarks[:, _MIRRORED]      # they follow the 68-point scheme again
        landmarks[..., 0] = size - 1 - landmarks[..., 0]
    return images, landmarks


# 6. Recognition networks --------------------------------------------------------------

class Recogniser(nn.Module):
    """A small VGG-style face recognition network, in place of VGG-Face and ArcFace.

    Four stages of two convolutions, then an embedding. forward: (B,3,H,W) in [-1,1] →
    unit vectors (B,128). features: → the four stages' maps after ReLU, of H/2, H/4, H/8
    and H/16 and `widths` channels.
    """
    def __init__(self, widths=(32, 48, 64, 96), input_size=64):
        super().__init__()
        self.arguments = {"widths": tuple(widths), "input_size": input_size}
        self.widths = tuple(widths)
        self.input_size = input_size
        self.accuracy = None
        self.stages = nn.ModuleList()
        before = 3
        for width in widths:
            stride = 2 if before == 3 else 1
            self.stages.append(nn.Sequential(
                nn.Conv2d(before, width, 3, stride=stride, padding=1),
                nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()))
            before = width
        cells = (input_size // 16) ** 2
        self.embed = nn.Sequential(nn.Dropout(0.2), nn.Linear(widths[-1] * cells, 128),
                                   nn.BatchNorm1d(128))

    def features(self, x):
        maps = []
        for stage in self.stages:
            x = stage(F.max_pool2d(x, 2) if maps else x)
            maps.append(x)
        return maps

    def forward(self, x):
        if x.shape[-1] != self.input_size:
            x = F.interpolate(x, (self.input_size,) * 2, mode="bilinear", antialias=True)
        embedding = self._embedding(x)
        if not self.training:           # a face and its mirror image are the same person
            embedding = embedding + self._embedding(x.flip(3))
        return F.normalize(embedding, dim=1)

    def _embedding(self, x):
        return self.embed(self.features(x)[-1].flatten(1)).float()

    def folded(self):
        """A frozen copy for inference; each BatchNorm is folded into its convolution."""
        net = copy.deepcopy(self).eval()
        for stage in net.stages:
            for i in (0, 3):
                stage[i] = torch.nn.utils.fusion.fuse_conv_bn_eval(stage[i], stage[i + 1])
                stage[i + 1] = nn.Identity()
        return net.requires_grad_(False)


def angular_margin_loss(embedding, centres, label, margin=0.3, scale=24.0):
    """Cross-entropy of scale · cos(θ + margin · [true class]) (ArcFace, Deng et al. 2019)

    embedding: unit vectors (B,D); centres (K,D); label (B,).
    """
    cosine = (embedding @ F.normalize(centres, dim=1).T).clamp(-1 + 1e-6, 1 - 1e-6)
    true = F.one_hot(label, len(centres)).bool()
    logits = torch.where(true, torch.cos(cosine.arccos() + margin), cosine)
    return F.cross_entropy(scale * logits, label)


def _verification_accuracy(embeddings, identity, seed=0):
    """Share of right answers to "the same person?", on all such pairs and as many others.

    Two folds of the people: the threshold that is best on one is applied to the other.
    """
    one, two = torch.triu_indices(len(identity), len(identity), 1)
    same = identity[one] == identity[two]
    cosine = (embeddings[one] * embeddings[two]).sum(1)
    other = torch.nonzero(~same)[:, 0]
    drawn = torch.randperm(len(other), generator=seeded(seed, 1))[:int(same.sum())]
    chosen = torch.cat([torch.nonzero(same)[:, 0], other[drawn]])
    same = same[chosen]
    cosine = cosine[chosen]
    even = (identity[one] % 2)[chosen] == 0
    thresholds = torch.linspace(-1, 1, 401)
    right = 0
    for fold in (even, ~even):
        answers = cosine[~fold, None] > thresholds
        accuracy = (answers == same[~fold, None]).float().mean(0)
        threshold = thresholds[accuracy == accuracy.max()].mean()     # middle of the best
        right += ((cosine[fold] > threshold) == same[fold]).sum().item()
    return right / len(same)


_RECOGNISERS = {"loss": {"widths": (32, 48, 64, 96), "seed": 0},
                "metric": {"widths": (32, 48, 80, 112), "seed": 1}}


def recogniser(faces, purpose="loss", device="cpu", epochs=24, batch=64, quiet=False):
    """A face recognition network for `faces`, from the cache or trained; on the CPU.

    It learns the training people of `faces`, on `device`, and is frozen. purpose "loss"
    serves losses and encoders. "metric", of another seed and other widths, serves
    `identity_distance`: no method is measured with the network that trained it.
    `.accuracy` is its verification accuracy on the other people. A flat folder has no
    people to learn from: rendered faces take its place, and a line says so.
    """
    if len(faces.names) > len(faces) / 2:
        if not quiet:
            print("these pictures carry no identities: "
                  "the recogniser is trained on rendered faces", file=sys.stderr)
        faces = RenderedFaces()
    path = _CACHE / f"recogniser-3-{purpose}-{epochs}x{batch}-{faces.fingerprint}.pt"
    net = Recogniser(_RECOGNISERS[purpose]["widths"])
    with first():
        try:
            cached = load_weights(path)
            net.load_state_dict(cached["net"])
            net.accuracy = cached["accuracy"]
        except (InputError, KeyError, TypeError, RuntimeError):      # there is none, or damaged
            net = _train_recogniser(faces, purpose, device, epochs, batch, quiet)
            with contextlib.suppress(InputError):        # without a cache it takes longer
                save_checkpoint(path, {"net": net.state_dict(), "accuracy": net.accuracy})
    return net.folded()


def _train_recogniser(faces, purpose, device, epochs, batch, quiet):
    widths = _RECOGNISERS[purpose]["widths"]
    seed = _RECOGNISERS[purpose]["seed"]
    people, validation, test = split_identities(faces)
    small = []
    for i in people:
        image = faces[i].image[None]
        image = F.interpolate(image, (64, 64), mode="bilinear", antialias=True)[0]
        small.append(to_uint8(image))
    images = torch.stack(small).to(device)
    centre, label = faces.identity[people].unique(return_inverse=True)
    label = label.to(device)
    batch = min(batch, len(images))
    steps = epochs * len(images) // batch
    generator = seeded(seed, 2)
    rounds = steps * batch // len(images) + 1
    order = torch.cat([torch.randperm(len(images), generator=generator)
                       for _ in range(rounds)])
    progress = Progress(f"recogniser for {purpose}", steps, quiet=quiet)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Recogniser(widths).to(device, memory_format=torch.channels_last)
        centres = nn.Parameter(torch.randn(len(centre), 128, device=device) * 0.1)
        optimizer = torch.optim.AdamW([*net.parameters(), centres], lr=3e-3,
                                      weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for step in range(steps):
            index = order[step * batch:(step + 1) * batch].to(device)
            x = images[index].float() / 127.5 - 1
            # It shall know blurred faces, too, and faces that lie a little off.
            low = [64, 64, 64, 48, 32, 20][int(torch.randint(6, (), generator=generator))]
            left, top = torch.randint(-3, 4, (2,), generator=generator).tolist()
            if low < 64:
                x = F.interpolate(x, (low, low), mode="bilinear", antialias=True)
                x = F.interpolate(x, (64, 64), mode="bilinear")
            if step % 2:
                x = x.flip(3)
            x = torch.roll(x, (top, left), (2, 3))
            with autocast(device):
                embedding = net(x.contiguous(memory_format=torch.channels_last))
            loss = angular_margin_loss(embedding, centres, label[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                progress.update(step, f"loss {loss.item():.2f}")
    # As one from the cache, equal to the bit.
    net = net.eval().cpu().to(memory_format=torch.contiguous_format)

    held = spread(validation + test, 400)
    with torch.inference_mode():
        embeddings = in_batches(lambda part: net(stack_faces(faces, held[part])[0]),
                                len(held), 64)
    others, identity = faces.identity[held].unique(return_inverse=True)
    net.accuracy = _verification_accuracy(embeddings, identity)
    progress.close(f"verification accuracy on {len(others)} held-out identities "
                   f"{net.accuracy:.1%}")
    return net


class VGG(nn.Module):
    """The convolutions of VGG-16 or -19, frozen. Input (B,3,H,W) RGB in [-1,1].

    features: → four maps, the last of blocks 2 to 5, at 1/2 … 1/16 of the size, after
    ReLU (the last one only with `last_relu`). `face`: the network reads VGG-Face's input,
    BGR in 0 … 255 less the mean face colour; else ImageNet's.
    """
    widths = (128, 256, 512, 512)

    def __init__(self, per_block=(2, 2, 4, 4, 4), face=False, last_relu=True):
        super().__init__()
        self.arguments = {"per_block": tuple(per_block), "face": face,
                          "last_relu": last_relu}
        mean = (0.485, 0.456, 0.406)
        deviation = (0.229, 0.224, 0.225)
        if face:
            mean = (129.1863 / 255, 104.7624 / 255, 93.5940 / 255)
            deviation = (1 / 255, 1 / 255, 1 / 255)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).view(1, 3, 1, 1))
        self.blocks = nn.ModuleList()
        before = 3
        for count, width in zip(per_block, (64, 128, 256, 512, 512)):
            block = nn.ModuleList()
            for _ in range(count):
                block.append(nn.Conv2d(before, width, 3, padding=1))
                before = width
            self.blocks.append(block)
        self.eval().requires_grad_(False)

    def features(self, x):
        x = ((x + 1) / 2 - self.mean) / self.deviation
        if self.arguments["face"]:
            x = x.flip(1)
        maps = []
        for index, block in enumerate(self.blocks):
            if index > 0:
                x = F.max_pool2d(x, 2)
            for layer in block[:-1]:
                x = F.relu(layer(x), inplace=True)
            x = block[-1](x)
            if index < 4 or self.arguments["last_relu"]:
                x = F.relu(x, inplace=True)
            maps.append(x)
        return maps[1:]


def _load_vgg(file=None, last_relu=True):
    """VGG-Face from a file; without one torchvision's VGG-19, trained on ImageNet.

    A file's 3×3 kernels are taken in their order. torchvision's own files are known by
    their names and get ImageNet's input, all others VGG-Face's.
    """
    if file is None:
        print("no --vggface file: torchvision's VGG-19 (ImageNet) is the encoder",
              file=sys.stderr)
        state = _torchvision_weights("VGG19_Weights.IMAGENET1K_V1")
    else:
        state = read_published(file, "VGG-Face's weights")
    kernels = [name for name, value in state.items() if value.ndim == 4]
    count = len(kernels)
    torchvisions = all(re.fullmatch(r"features\.\d+\.weight", name) for name in kernels)
    classes = len(state.get("classifier.6.bias", ()))
    imagenet = torchvisions and (count == 16 or classes == 1000)
    vgg_face = all(re.fullmatch(r"conv_?\d_\d\.weight", name) for name in kernels)
    per_block = (2, 2, 3, 3, 3) if count == 13 else (2, 2, 4, 4, 4)
    net = VGG(per_block, face=not imagenet, last_relu=last_relu)
    layers = [layer for block in net.blocks for layer in block]
    biases = [name.removesuffix("weight") + "bias" for name in kernels]
    known = count == 13 or imagenet or vgg_face
    known = known and all(name in state for name in biases)
    shapes = [state[name].shape for name in kernels]
    if not known or shapes != [layer.weight.shape for layer in layers]:
        raise InputError(f"{file}: neither VGG-Face nor torchvision's VGG-19; a file of "
                         "13 3×3 kernels, or of 16 under either one's names, is needed")
    for layer, name, bias in zip(layers, kernels, biases):
        layer.load_state_dict({"weight": state[name], "bias": state[bias]})
    return net


class _ArcFaceBlock(nn.Module):
    def __init__(self, before, width, stride):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, before, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(before)
        self.prelu = nn.PReLU()
        self.conv2 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Identity()
        if before != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.prelu(self.bn1(self.conv1(self.bn0(x))))
        y = self.bn2(self.conv2(y))
        return self.prelu(y + self.downsample(x))


class ArcFace(nn.Module):
    """ArcFace's ResNet-18 (Deng et al. 2019), as RestoreFormer's authors use it; frozen.

    forward: (B,3,H,W) RGB in [-1,1] → embedding (B,512), not normalised. `source` is
    their file arcface_resnet18.pth, or its state dict.
    """
    def __init__(self, source=None):
        super().__init__()
        self.arguments = {}
        self.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU()
        self.layer1 = self._layer(64, 64, 1)
        self.layer2 = self._layer(64, 128, 2)
        self.layer3 = self._layer(128, 256, 2)
        self.layer4 = self._layer(256, 512, 2)
        self.bn4 = nn.BatchNorm2d(512)
        self.fc5 = nn.Linear(512 * 8 * 8, 512)
        self.bn5 = nn.BatchNorm1d(512)
        if source is not None:
            load_named(self, source, [], "ArcFace's arcface_resnet18.pth")
        self.eval().requires_grad_(False)

    @staticmethod
    def _layer(before, width, stride):
        return nn.Sequential(_ArcFaceBlock(before, width, stride),
                             _ArcFaceBlock(width, width, 1))

    def forward(self, image):
        red, green, blue = image.split(1, dim=1)
        grey = 0.2989 * red + 0.5870 * green + 0.1140 * blue
        return self.embed(F.interpolate(grey, (128, 128), mode="bilinear"))

    def embed(self, grey):
        """(B,1,128,128) in [-1,1] → (B,512)."""
        x = F.max_pool2d(self.prelu(self.bn1(self.conv1(grey))), 2)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.bn5(self.fc5(self.bn4(x).flatten(1)))


def load_encoder(kind, args, faces):
    """The frozen network whose `features`, of `widths` channels, serve losses or encode.

    kind "recogniser": trained on `faces`; "vgg": --vggface, else torchvision's VGG-19.
    With a checkpoint (args.state) it is the one in there. On args.device.
    """
    if args.state is not None:
        net = unpack((args.state.get("frozen") or {}).get("encoder"))
    elif kind == "vgg":
        net = _load_vgg(args.vggface)
    else:
        net = recogniser(faces, device=args.device)
    return net.to(args.device, memory_format=torch.channels_last)


def pack(net):
    """A frozen network of this chapter as plain values, for a checkpoint."""
    return {"class": type(net).__name__, "arguments": net.arguments,
            "state": net.state_dict()}


def unpack(record):
    """The network that `pack` stored, frozen, in eval mode."""
    try:
        kind = {"Recogniser": Recogniser, "VGG": VGG, "ArcFace": ArcFace}[record["class"]]
        net = kind(**record["arguments"])
        if kind is Recogniser:
            net = net.folded()
        net.load_state_dict(record["state"])
    except (KeyError, TypeError, RuntimeError):
        raise InputError("the checkpoint's frozen network is missing or damaged; "
                         "use a checkpoint that --train wrote") from None
    return net.eval().requires_grad_(False)


# 7. Published weights -----------------------------------------------------------------

_TIMEOUT = 20, 60            # seconds to a connection, and between two pieces


def _download(url, path, sha256=None, attempts=3):
    """Fetch url to `path` unless it is there; a broken download is gone on with.

    It is checked by its sha256, else by the length that the server announces. Without a
    sha256 a part is gone on with only if the server says that it is still the same file
    (ETag or Last-Modified). InputError after `attempts` in a row that brought nothing
    new.
    """
    path = Path(path)
    if path.is_file() and (sha256 is None or sha256 == _sha256(path)):
        return path
    # Who goes on with a part first renames it: no two processes write to one.
    left = path.with_name(f"{path.name}.part")
    left_version = path.with_name(f"{path.name}.part.version")
    own = uuid.uuid4().hex[:8]
    part = path.with_name(f"{path.name}.{own}.part")
    version = path.with_name(f"{path.name}.{own}.part.version")
    with contextlib.suppress(OSError):
        os.replace(left, part)
        os.replace(left_version, version)
    try:
        _fetch_whole(url, part, version, sha256 is not None, attempts)
        if sha256 is not None and _sha256(part) != sha256:
            part.unlink()
            raise InputError(f"{url}: not the expected file (its sha256 differs); "
                             f"get it by hand and put it at {path}")
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            if part.is_file():                              # for whoever tries again
                os.replace(part, left)
                os.replace(version, left_version)
            version.unlink(missing_ok=True)
    return path


def _fetch_whole(url, part, version, checked, attempts):
    """Complete the file `part`, in as many connections as it takes."""
    failures = 0
    most = part.stat().st_size if part.is_file() else 0
    while True:
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            return _fetch(url, part, version, checked)
        except (requests.RequestException, OSError) as error:
            size = part.stat().st_size if part.is_file() else 0
            failures = 0 if size > most else failures + 1
            most = max(most, size)
            reply = getattr(error, "response", None)
            refused = reply is not None and 400 <= reply.status_code < 500
            if refused or failures == attempts:
                raise InputError(f"{url}: {error}; run the command again "
                                 "to go on with the download") from None


def _fetch(url, part, version, checked):
    """One attempt. `version` holds what the server calls the file that was begun."""
    done = part.stat().st_size if part.is_file() else 0
    known = version.read_text() if version.is_file() else ""
    if not checked and not known:
        done = 0                            # nothing will tell which file the part is of
    headers = {"Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
        if known:
            headers["If-Range"] = known
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as reply:
        # "bytes 100-199/200" or "bytes */200": what is sent, and the length of the whole.
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)",
                            reply.headers.get("Content-Range", ""))
        nothing_left = bool(done) and reply.status_code == 416
        if nothing_left and (checked or (span and int(span[2]) == done)):
            return
        resumed = reply.status_code == 206
        tag = reply.headers.get("ETag", "")
        if not tag or tag.startswith("W/"):    # a weak tag does not vouch for every byte
            tag = reply.headers.get("Last-Modified", "")
        fits = tag == known and span and span[1] == str(done)
        if nothing_left or (resumed and not checked and not fits):
            part.unlink(missing_ok=True)
            raise OSError("the file has changed since its download began")
        reply.raise_for_status()
        length = reply.headers.get("Content-Length", "")
        total = None
        if resumed and span:
            total = int(span[2])
        elif length.isdecimal():
            total = int(length) + (done if resumed else 0)
        with open(part, "ab" if resumed else "wb") as file:
            version.write_text(tag)
            for chunk in reply.iter_content(1 << 14):       # a hang-up loses one chunk
                file.write(chunk)
        size = part.stat().st_size
        if total not in (None, size) and "Content-Encoding" not in reply.headers:
            raise OSError(f"{size} bytes came, {total} were announced")


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _torchvision_weights(name):
    """torchvision's weights `name`, kept where torchvision keeps them."""
    url = torchvision.models.get_weight(name).url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    with first():
        try:
            _download(url, file)
        except InputError as error:
            raise InputError(f"{error}; or put {file.name} into {file.parent}") from None
    return read_published(file)


def read_published(source, name=None):
    """Weights as their authors released them → {name: tensor}, on the CPU.

    source: a file, an http(s) address or a state dict. The file of an address is kept in
    weights/ of the cache, unless it cannot be read. Names lose DataParallel's prefix "module.".
    Of a file that holds more, the part "state_dict" or "params" is taken. InputError for
    what is no checkpoint or holds something else; it says which file is wanted, `name`.
    """
    file = source
    address = isinstance(source, str) and source.startswith(("http://", "https://"))
    if address:
        last = Path(urllib.parse.unquote(urllib.parse.urlsplit(source).path)).name
        last = re.sub("[^0-9A-Za-z._-]", "_", last)
        key = hashlib.sha256(source.encode()).hexdigest()[:8]    # two may end in one name
        file = _CACHE / "weights" / f"{key}-{last}"
        if not file.is_file():
            print(f"fetching {source} → {file}", file=sys.stderr)
        _download(source, file)
    try:
        return _read_weights(file, name)
    except InputError as error:
        if not address:
            raise
        file.unlink(missing_ok=True)
        reason = str(error).removeprefix(f"{file}: ")
        raise InputError(f"{source}: {reason}; what it sent was not kept: "
                         "is it the address of a page, not of the file?") from None


def _read_weights(source, name):
    """The named tensors of a file or of a dict."""
    advice = "give the file that the authors released" + (f" ({name})" if name else "")
    state = source if isinstance(source, dict) else load_weights(source, advice=advice)
    for key in ("state_dict", "params"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    named = isinstance(state, dict) and all(map(torch.is_tensor, state.values()))
    if not named or not state:
        place = "the state dict" if isinstance(source, dict) else source
        raise InputError(f"{place}: holds no named tensors; {advice}")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def renamed(state, table):
    """A state dict with new names, by `table`: (pattern, replacement), tried in order.

    A pattern is a regular expression that has to match the whole name. Replacement None:
    this tensor is not used. A name that no row matches is kept. The names that spectral
    norm had in older PyTorch (weight_orig, weight_u, weight_v) become today's before.
    """
    result = {_new_name(name, table): value for name, value in state.items()}
    result.pop(None, None)                     # what is not used
    return result


_SPECTRAL_NAMES = {"weight_orig": "parametrizations.weight.original",
                   "weight_u": "parametrizations.weight.0._u",
                   "weight_v": "parametrizations.weight.0._v"}


def _new_name(name, table):
    layer, _, tensor = name.rpartition(".")
    if tensor in _SPECTRAL_NAMES:
        name = f"{layer}.{_SPECTRAL_NAMES[tensor]}"
    for pattern, replacement in table:
        match = re.fullmatch(pattern, name)
        if match:
            return None if replacement is None else match.expand(replacement)
    return name


def load_named(network, source, table, name):
    """Fill a network with published weights, renamed by `table` (see `renamed`).

    source: as for read_published. Every tensor of the network has to be there, in its
    shape, and none may be left over; else InputError with the first that does not fit,
    which calls the weights `name`. Returns the network, frozen, in eval mode, with
    spectral norm folded in.
    """
    own = network.state_dict()
    found = {}
    wrong = []
    for there, value in read_published(source, name).items():
        here = _new_name(there, table)
        if here is None:
            continue
        if here not in own:
            wrong.append(f"{there} belongs to no layer")
        elif value.shape != own[here].shape:
            wrong.append(f"{there} is {_shape(value)}, not {_shape(own[here])}")
        elif here in found and not torch.equal(found[here], value):
            wrong.append(f"{there} is there twice, with other numbers")
        found[here] = value
    # Older files do not count BatchNorm's batches; nothing here reads the count.
    wrong += [f"{here} is missing" for here in own
              if here not in found and not here.endswith("num_batches_tracked")]
    if wrong:
        file = "the state dict" if isinstance(source, dict) else source
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(f"{file}: not {name} ({wrong[0]}{more}); give the file of this "
                         "method that the authors released, whole and unchanged")
    network.load_state_dict(found)
    return _fold(network.eval()).requires_grad_(False)


def _shape(tensor):
    return "×".join(map(str, tensor.shape)) or "a number"


# 8. Runs and the command line ---------------------------------------------------------

def seeded(*numbers):
    """A random stream of its own for every tuple of whole numbers ≥ 0, for example
    (seed, step, place)."""
    sequence = np.random.SeedSequence((*numbers, len(numbers)))  # the length: (7,) is not (7, 0)
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


# Processor and precision

def _choose_device(name):
    """--device as a torch.device; a process under torchrun takes the GPU of its local rank."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA GPU is visible to PyTorch here; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@functools.lru_cache
def _fast_type(kind):
    """bfloat16 where a processor ("cpu" or "cuda") multiplies it in hardware, else
    float32."""
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float32
    with contextlib.suppress(OSError):
        if {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()):
            return torch.bfloat16
    return torch.float32


def autocast(device, kind="auto"):
    """Mixed precision: "auto" where the processor gains from it, "bfloat16" always,
    "float32" never."""
    device = torch.device(device).type
    low = _fast_type(device) == torch.bfloat16 if kind == "auto" else kind == "bfloat16"
    return torch.autocast(device, torch.bfloat16, enabled=low)


def _fold(network):
    """For inference: every spectral norm computed once and folded into its weight.
    Returns the network."""
    for module in network.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    return network


def channels_last(network, device):
    """Move a network to `device`, the weights of its convolutions to channels_last.

    Its other tensors of four axes, such as the entries of a dictionary, keep their
    order.
    """
    network.to(device)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.to(memory_format=torch.channels_last)
    return network


def for_inference(network, device, kind="auto", exact=()):
    """Make a network ready to restore with, for good. Returns it.

    It is frozen on `device`, spectral norms folded in, convolutions channels_last.
    Activations overwrite their input: it has to be the output of a layer that nobody
    else reads. Where `autocast(device, kind)` is mixed, weights are cast once, not in
    every call; modules whose name begins with one in the tuple `exact` keep float32.
    """
    network.eval()  # first: in training mode folding would take one more power iteration
    network = channels_last(_fold(network).requires_grad_(False), device)
    kind_of_device = torch.device(device).type
    with autocast(device, kind):
        mixed = torch.is_autocast_enabled(kind_of_device)
        for name, module in network.named_modules():
            if isinstance(module, (nn.LeakyReLU, nn.ReLU, nn.SiLU)):
                module.inplace = True
            layer = isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
            if mixed and layer and not name.startswith(tuple(exact)):
                module.to(torch.get_autocast_dtype(kind_of_device))
    return network


def keep_freed_memory():
    """Let memory that was freed stay with the process, on Linux.

    Else the C library gives every tensor above 32 MB back at once and the next one is
    paged in anew: up to a quarter of the time of a 512×512 face.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(-4, 0)  # M_MMAP_MAX: from the heap instead
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which keeps 2 GB


@contextlib.contextmanager
def inference(net, precision="auto"):
    """Evaluation mode, no gradients, mixed precision; yields the network's device.
    Afterwards all is as before."""
    device = next(net.parameters()).device
    training = net.training
    net.eval()
    try:
        with torch.inference_mode(), autocast(device, precision):
            yield device
    finally:
        net.train(training)


def in_batches(call, count, batch):
    """call(slice) for `count` faces, `batch` at a time → its results in one tensor.

    `call` may also give several tensors, or None for one that it does not make. Out of
    memory, the batch is halved, with a line that says so.
    """
    results = []
    start = 0
    while start < count:
        try:
            results.append(call(slice(start, start + batch)))
            start += batch
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            if batch == 1:
                raise InputError("not enough memory for one face; use --device cpu or a smaller "
                                 "--size") from None
            batch //= 2
            torch.cuda.empty_cache()
            print(f"out of memory: going on with {batch} faces at a time", file=sys.stderr)
    if torch.is_tensor(results[0]):
        return torch.cat(results)
    return [None if parts[0] is None else torch.cat(parts) for parts in zip(*results)]


def _out_of_memory(error):
    """Whether a GPU's memory, or the machine's, was too small: torch has no type for the
    second."""
    return (isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))
            or "can't allocate memory" in str(error))


# Several processes

def rank():
    """This process's number under torchrun, else 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world():
    """The number of processes under torchrun, else 1."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _start_processes(device):
    """Under torchrun a process group: NCCL on GPUs, gloo on CPUs."""
    if "WORLD_SIZE" not in os.environ or torch.distributed.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Process 0 makes dictionaries and recognisers while the others wait, longer than the usual ten minutes.
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                         timeout=timedelta(hours=12))


_going_first = False


@contextlib.contextmanager
def first():
    """Process 0 runs the body first and fills a cache; then the others run it and find
    what it made."""
    global _going_first
    if world() == 1 or _going_first:
        yield
        return
    if rank() > 0:
        torch.distributed.barrier()
    _going_first = True
    try:
        yield
    finally:
        _going_first = False
    if rank() == 0:
        torch.distributed.barrier()


def parallel(*networks, find_unused=False):
    """The networks, under torchrun each in DistributedDataParallel, which averages the
    gradients."""
    if world() == 1:
        return networks
    with warnings.catch_warnings():  # of a new name for broadcast_buffers, since PyTorch 2.14
        warnings.simplefilter("ignore", FutureWarning)
        return [nn.parallel.DistributedDataParallel(network, broadcast_buffers=False,
                                                    find_unused_parameters=find_unused)
                for network in networks]


def set_rate(rate, *optimizers):
    """The learning rate of the next step; a group with a number "times" takes so many
    times the rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("times", 1.0)


# Files

@contextlib.contextmanager
def _replacing(path):
    """Yield a temporary name beside `path`; flush, rename into place if all went well,
    else remove it."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); "
                         "choose another --out") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone_in(folder):
    """InputError if another process of this machine trains in this folder.

    The lock lies in the cache, so that a refused command leaves the folder as it is, and
    ends with its process. Windows has none."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    with contextlib.ExitStack() as stack:
        if fcntl is not None and rank() == 0:
            with contextlib.suppress(OSError):                 # no cache, no lock
                (_CACHE / "locks").mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(_CACHE / "locks" / name, "w"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise InputError(f"{folder}: another process trains in it; wait for it, "
                                     "or choose another --out") from None
        yield


def _check_writable(folder):
    """InputError if the folder cannot be made or written in; makes nothing yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{folder}: cannot be written ({existing} is no folder to write "
                         "in); choose another --out")


def _write_json(path, value):
    with _replacing(path) as temporary:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def save_checkpoint(path, state):
    """torch.save, flushed and renamed into place: a crash leaves the checkpoint before
    it whole."""
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:              # which hides the OSError of a full disk
            raise error.__context__ or error from None


def load_weights(path, device="cpu", advice=None):
    """torch.load, tensors and plain values only; what is missing, damaged or holds code
    is an InputError, which ends with `advice`, else with where checkpoints come
    from."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        train = "no such checkpoint; train one first (--train) or name another with --checkpoint"
        raise InputError(f"{path}: {f'no such file; {advice}' if advice else train}") from None
    except Exception as error:  # torch raises half a dozen types for what is no checkpoint
        code = "Unsupported global" in str(error) or "Unsupported class" in str(error)
        reason = "holds code or objects, which are never run" if code else "damaged, or not a checkpoint"
        raise InputError(f"{path}: {reason}; {advice or 'use a checkpoint that --train wrote'}") from None


class _Checkpoint(dict):
    """A checkpoint's parts; asking for one that it lacks is an InputError."""

    def __init__(self, parts, path):
        super().__init__(parts)
        self.path = path

    def __missing__(self, name):
        raise InputError(f"{self.path}: holds no part \"{name}\"; use a checkpoint that this version of the "
                         "script wrote")


def load_checkpoint(path, script):
    """A checkpoint that `script`'s --train wrote; one of another method, or an
    incomplete one, is refused."""
    state = load_weights(path)
    if not isinstance(state, dict) or "script" not in state:
        raise InputError(f"{path}: not a checkpoint of this repository; "
                         f"use one that {script}.py --train wrote")
    if state["script"] != script:
        raise InputError(f"{path}: a checkpoint of {state['script']}.py, not of {script}.py")
    return _Checkpoint(state, path)


def load_part(part, state, name):
    """Load part `name` of a checkpoint into a network or an optimiser."""
    try:
        part.load_state_dict(state[name])
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"part \"{name}\" of the checkpoint does not fit ({reason}); use one that this "
                         "version of the script wrote") from None


class Progress:
    """A line updated in place on a terminal: step, steps/s, time left, a note.
    Elsewhere few plain lines."""
    stop = None                    # what SIGTERM raised: Python may have dropped it

    def __init__(self, title, total, start=0, quiet=False):
        self.title = title
        self.total = total
        self.start = start
        self.quiet = quiet or rank() > 0
        self.begin = time.monotonic()
        self.shown = 0.0
        self.terminal = sys.stdout.isatty()

    def update(self, step, note=""):
        """Show step (0 … total); at most 5 times a second on a terminal, every 20
        seconds elsewhere."""
        if Progress.stop is not None:
            raise Progress.stop
        now = time.monotonic()
        if self.quiet or now - self.shown < (0.2 if self.terminal else 20):
            return
        self.shown = now
        rate = max(step - self.start, 1e-9) / (now - self.begin + 1e-9)
        left = int((self.total - step) / rate) if step > self.start else 0
        text = (f"{self.title} {step}/{self.total}  {rate:.1f} it/s  "
                f"{left // 60}:{left % 60:02d} left  {note}")
        if self.terminal:
            print(f"\r\033[K{text[:118]}", end="", flush=True)
        else:
            print(text, flush=True)

    def clear(self):
        """Make room for a line of somebody else's."""
        if self.terminal and not self.quiet:
            print("\r\033[K", end="", flush=True)

    def line(self, text):
        """Print a line that stays."""
        if not self.quiet:
            print(f"\r\033[K{text}" if self.terminal else text, flush=True)

    def close(self, note=""):
        seconds = time.monotonic() - self.begin
        self.line(f"{self.title}: {self.total - self.start} steps in {seconds:.0f} s  {note}".rstrip())


def _write_log(folder, rows):
    """log.csv and curves.png from a list of dicts: a column and a plot a name; missing
    values leave gaps."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    path = Path(folder) / "log.csv"
    with _replacing(path) as temporary, open(temporary, "w", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows({name: round(value, 6) if isinstance(value, float) else value
                         for name, value in row.items()} for row in rows)
    names.remove("step")
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    width, height = 3.2 * columns, 2.3 * lines  # inches; margins by hand: a layout engine is slow
    figure = matplotlib.figure.Figure(figsize=(width, height))
    axes = figure.subplots(lines, columns, squeeze=False, gridspec_kw={
        "left": 0.6 / width, "right": 1 - 0.15 / width, "bottom": 0.3 / height,
        "top": 1 - 0.3 / height, "wspace": 0.32, "hspace": 0.36})
    for axis, name in zip(axes.flat, names):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        axis.plot(*zip(*points), linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.locator_params(nbins=4)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names):]:
        axis.remove()
    with _replacing(Path(folder) / "curves.png") as temporary:
        figure.savefig(temporary, dpi=110)


# The command line

# What a run was trained on, as it was told: its faces, and the files of frozen networks and dictionaries.
_FACES = ("data", "landmarks", "aligned")
_FROZEN = ("vggface", "arcface", "dictionary_data")


def _whole_number(least):
    def read(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
        return int(text)
    return read


def arguments(doc, presets, variants):
    """A parser with the options that all scripts share. doc: the script's docstring.

    parser.action: the group of --train, --evaluate and --restore, one of which is given.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False)

    def refuse(message):
        raise InputError(f"{message}; --help lists the options")

    parser.error = refuse
    add = parser.add_argument
    action = parser.action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--train", action="store_true",
                        help="train, then measure on held-out people")
    action.add_argument("--evaluate", action="store_true",
                        help="measure a trained network: on held-out people, or on all faces "
                        "of another --data")
    action.add_argument("--restore", metavar="PATH", help="restore a picture, or all of a folder")
    add("--data", metavar="DIR",
        help="a folder of pictures, or of one folder per identity (default: rendered faces)")
    add("--landmarks", metavar="DIR", help="a parallel folder of landmark files photo.jpg.txt")
    add("--aligned", action="store_true", help="pictures are FFHQ-aligned crops")
    add("--preset", choices=presets,
        help="tiny (default): minutes on a CPU; hour: about an hour, or two; paper: the "
        "paper's sizes and schedule")
    add("--variant", choices=[*variants, "all"],
        help="a row of the paper's ablation tables; all: for --train, every row in turn, "
        "those finished left out, then the paper's table beside ours")
    add("--seeds", type=_whole_number(1), default=1,
        help="for --variant all: train every row with so many seeds (default 1)")
    add("--degradation", choices=DEGRADATIONS,
        help="for --evaluate: degrade as this paper does (default: as the script's own)")
    add("--resume", action="store_true", help="go on exactly where the last checkpoint stopped")
    add("--size", type=_whole_number(1), help="pixels, height = width")
    add("--steps", type=_whole_number(1), help="training steps")
    add("--batch", type=_whole_number(1), help="faces a process and step")
    add("--seed", type=_whole_number(0), help="fixes data, initialisation and order (default 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="auto is bfloat16 where the processor gains from it and the result stays the "
        "same to the eye")
    add("--workers", type=_whole_number(0), default=0,
        help="processes that read and degrade pictures, and look for faces")
    add("--out", metavar="DIR",
        help="the run's folder (default runs/SCRIPT); for --restore where pictures go "
        "(default restored)")
    add("--checkpoint", metavar="FILE", help="default: the run's own")
    add("--weights", metavar="FILE",
        help="the network that the authors published: a file or its address")
    add("--vggface", metavar="FILE", help="VGG-Face weights for --preset paper (default: VGG-19)")
    add("--lpips", metavar="FILE",
        help="published weights of LPIPS (alex.pth), which is then measured too")
    add("--overwrite", action="store_true", help="restore pictures again that have a result")
    add("--check", action="store_true", help="also write the input with its landmarks and boxes")
    return parser


def add_fid(parser):
    """The options --fid and --fid-reference, for papers that measure FID."""
    parser.add_argument("--fid", metavar="FILE",
                        help="published weights of FID, which is then measured too")
    parser.add_argument("--fid-reference", metavar="DIR",
                        help="pictures to compare with, as the paper does (default: the targets)")


def parse(parser, argv, script):
    """Read and check a command line → its options, with what follows from them.

    device: torch.device; folder: of the run; out: of restored pictures; checkpoint: a
    Path; state: the checkpoint, read once, where the command goes on from one or uses
    one; else None; prepared: another row's dictionary.pt is there (`planned_runs`).
    """
    args = parser.parse_args(argv)
    args.begin = time.monotonic()
    args.prepared = False
    if args.resume and not args.train:
        raise InputError("--resume belongs to --train")
    if args.degradation and (not args.evaluate or args.weights):
        raise InputError("--degradation belongs to --evaluate of a trained network")
    if args.variant == "all" and (not args.train or args.resume or args.checkpoint):
        raise InputError("--variant all belongs to --train, without --resume or --checkpoint: it goes on "
                         "by itself where it was cut off")
    if args.seeds > 1 and args.variant != "all":
        raise InputError("--seeds belongs to --variant all")
    if args.weights is not None:
        for name in ("train", "checkpoint", "preset", "variant", "size", "vggface"):
            if getattr(args, name):
                raise InputError(f"--weights and --{name} do not go together: --weights is the network that "
                                 "the authors published, to restore and evaluate with")
        if args.evaluate and args.data is None:
            raise InputError("--evaluate --weights wants --data: a folder of faces to measure")
    args.device = _choose_device(args.device)
    _start_processes(args.device)
    args.folder = Path("runs") / script
    if args.weights is not None or args.variant not in (None, "full", "all"):
        args.folder = Path("runs") / f"{script}-{args.variant or 'released'}"
    if args.restore is None and args.out is not None:
        args.folder = Path(args.out)
    args.out = Path(args.out or "restored")
    if args.train:
        _check_writable(args.folder)                 # now, not after minutes of preparation
    args.checkpoint = Path(args.checkpoint or args.folder / "checkpoint.pt")
    args.state = None
    if args.weights is None and (args.resume or not args.train):
        args.state = load_checkpoint(args.checkpoint, script)
        preset = args.state["config"].get("preset")
        if args.preset not in (None, preset):
            raise InputError(f"{args.checkpoint}: a checkpoint of --preset {preset}, not {args.preset}")
    for name in _FROZEN if args.resume else ():
        if getattr(args, name, None) not in (None, args.state["data"][name]):
            option = name.replace("_", "-")
            raise InputError(f"--resume goes on with the run as it began; --{option} cannot change")
    return args


def chosen_config(args, presets, variants):
    """The Config of preset, variant and options; on --resume the run's own, with more
    --steps if asked."""
    options = {name: getattr(args, name) for name in ("size", "steps", "batch", "seed")
               if getattr(args, name) is not None}
    if not args.resume:
        variant = args.variant or "full"
        return replace(presets[args.preset or "tiny"], variant=variant,
                       **variants[variant], **options)
    cfg = recorded_config(args, type(presets["tiny"]))
    if args.variant not in (None, cfg.variant):
        raise InputError(f"{args.checkpoint}: a checkpoint of --variant {cfg.variant}, not {args.variant}")
    for name, value in options.items():
        if name != "steps" and value != getattr(cfg, name):
            raise InputError(f"--resume goes on with the run as it began; --{name} cannot change")
    return replace(cfg, steps=options.get("steps", cfg.steps))


def recorded_config(args, kind):
    """The Config of the checkpoint; with --degradation of another one."""
    try:
        cfg = kind(**args.state["config"])
        return replace(cfg, degradation=args.degradation or cfg.degradation)
    except TypeError:
        raise InputError(f"{args.checkpoint}: of another version of this script; train it again") from None


def check_size(size, multiple, least=64):
    """InputError if a network cannot have this size."""
    if size % multiple or size < least:
        raise InputError(f"--size {size}: must be a multiple of {multiple}, at least {least}")


def load_faces(args, cfg, need_landmarks=False):
    """The faces of --data, or rendered ones, cfg.people of them; with a checkpoint,
    without --data, those it was trained on.

    --resume with other faces than those the run began with is an InputError.
    """
    chosen = {name: getattr(args, name) for name in _FACES}
    recorded = args.state is not None and (args.resume or args.data is None)
    if recorded:
        chosen = {name: value or args.state["data"][name] for name, value in chosen.items()}
    faces = _open_faces(chosen, cfg.size, cfg.people, need_landmarks, args.device, args.workers)
    if recorded and not _own_faces(faces, args):
        raise InputError(f"these are not the faces that {args.checkpoint} was trained on "
                         f"({args.state['data']['data'] or 'rendered'}; pictures, landmarks or "
                         "options differ); give those back, or train anew into another --out")
    return faces


def _open_faces(chosen, size, people, need_landmarks, device, workers=0):
    if chosen["data"] is None:
        return RenderedFaces(size, people)
    return FaceFolder(chosen["data"], size, chosen["landmarks"], chosen["aligned"],
                      need_landmarks, device, workers)


def _own_faces(faces, args):
    """Whether these are the faces of the checkpoint."""
    return args.state is not None and args.state["data"]["fingerprint"] == faces.fingerprint


def test_faces(faces, args, limit, usable=list):
    """What --evaluate measures: the run's test people, at most `limit` faces; of other
    --data all faces of people whose names the run was not trained on. `usable` keeps
    those of some indices that the method can restore."""
    if _own_faces(faces, args):
        return spread(usable(split_identities(faces)[2]), limit)
    trained = set() if args.state is None else set(args.state["data"]["people"])
    known = torch.tensor([name in trained for name in faces.names])
    indices = torch.nonzero(~known[faces.identity])[:, 0].tolist()
    if len(indices) < len(faces):
        print(f"left out: {len(faces) - len(indices)} faces of people whose names stand in "
              "the training set", file=sys.stderr)
    if not indices:
        raise InputError(f"{args.data}: has no person that the network was not trained on")
    return usable(indices)


# A run

class Run:
    """A run's folder: it reads and writes, and is told everything else.

    parts: networks and optimisers, saved and on --resume loaded; other values are saved
    as they are. frozen: networks that never change, {name: network}. Public: step (the
    last one done), rows (of log.csv), seconds (of all sessions, up to the last
    checkpoint), factor (of the learning rate: cfg.plateau to the power of how often
    validation stopped falling, at least 0.01).
    """

    def __init__(self, script, cfg, args, faces, frozen=None, steps=None, title="", **parts):
        self.script = script
        self.cfg = cfg
        self.args = args
        self.faces = faces
        self.frozen = {name: pack(network) for name, network in (frozen or {}).items()}
        self.steps = steps or cfg.steps
        self.title = f"{script} {title}{cfg.variant}"
        self.parts = parts
        state = args.state or {"step": 0, "rows": [], "factor": 1.0, "best": math.inf,
                               "waited": 0, "seconds": 0.0}
        self.step = state["step"]
        self.rows = list(state["rows"])
        self.factor = state["factor"]
        self.best = state["best"]
        self.waited = state["waited"]
        self.seconds = state["seconds"]
        self.earlier = state["seconds"]          # of the sessions before this one
        for name, part in parts.items():
            if args.state is not None and hasattr(part, "load_state_dict"):
                load_part(part, state, name)
        if args.train and rank() == 0:
            _write_json(args.folder / "config.json", asdict(cfg))

    def batches(self, dataset):
        """(step from 1 on, batch on the device) for all steps that are left."""
        device = self.args.device
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=None, sampler=range(self.step, self.steps),
            num_workers=self.args.workers,
            pin_memory=device.type == "cuda")
        self.progress = Progress(self.title, self.steps, self.step)
        for step, batch in enumerate(loader, self.step + 1):
            yield step, _to_device(batch, device)
        self.progress.close()

    def due(self, step):
        """Whether to validate and save now."""
        return step == self.steps or step % self.cfg.validate_every == 0

    def log(self, step, losses):
        """Every ten steps: note the losses, {name: tensor}; stop all processes at one
        that is not finite."""
        if step % 10 and not self.due(step):
            return                               # a GPU need not be waited for
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        wrong = (~values.isfinite()).float()
        if world() > 1:
            torch.distributed.all_reduce(wrong, torch.distributed.ReduceOp.MAX)
        self._stop_at([name for name, bad in zip(losses, wrong.tolist()) if bad], step)
        self.rows.append({"step": step, **dict(zip(losses, values.tolist()))})
        self.progress.update(step, "  ".join(f"{name} {value:.3f}" for name, value in
                                             zip(losses, values.tolist())))

    def _stop_at(self, names, step):
        """All processes come here with the same names; the first one speaks."""
        if names and rank() > 0:
            sys.exit(2)
        if names:
            raise InputError(f"step {step}: the {', '.join(names)} loss is not finite; the last good state "
                             f"is in {self.args.checkpoint}; try a lower learning rate")

    def say(self, text):
        """A line that stays."""
        self.progress.line(text)

    def forget_best(self):
        """Before validation losses of another kind."""
        self.best = math.inf
        self.waited = 0

    def save(self, step, validation):
        """Note what validation found, {"validation": loss, …}, and write checkpoint,
        log.csv, curves.png.

        With cfg.patience, more losses in a row than that which are no better multiply
        `factor` by cfg.plateau.
        """
        self.step = step
        self.seconds = self.earlier + time.monotonic() - self.args.begin
        if world() > 1:                                  # process 0's numbers, for all
            numbers = torch.tensor([*validation.values()], dtype=torch.float64,
                                   device=self.args.device)
            torch.distributed.broadcast(numbers, 0)
            validation = dict(zip(validation, numbers.tolist()))
        loss = validation["validation"]
        self._stop_at([] if math.isfinite(loss) else ["validation"], step)
        self.waited += 1
        if loss < self.best:
            self.best = loss
            self.waited = 0
        if self.cfg.patience is not None and self.waited > self.cfg.patience:
            self.factor = max(self.factor * self.cfg.plateau, 0.01)
            self.waited = 0
        optimizer = next(part for part in self.parts.values()
                         if isinstance(part, torch.optim.Optimizer))
        self.rows[-1] |= {**validation, "rate": optimizer.param_groups[0]["lr"]}
        self.say(f"step {step}: " + ", ".join(f"{name.replace('_', ' ')} {value:.3f}"
                                              for name, value in validation.items()))
        if rank() == 0:
            save_checkpoint(self.args.checkpoint, self._state())
            _write_log(self.args.folder, self.rows)

    def _state(self):
        people = split_identities(self.faces)[0]
        data = {name: getattr(self.args, name, None) for name in (*_FACES, *_FROZEN)}
        if self.args.state is not None:
            data = {name: value or self.args.state["data"][name] for name, value in data.items()}
        data["fingerprint"] = self.faces.fingerprint
        data["people"] = sorted({self.faces.names[number]
                                 for number in self.faces.identity[people].tolist()})
        parts = {name: part.state_dict() if hasattr(part, "state_dict") else part
                 for name, part in self.parts.items()}
        return {"script": self.script, "config": asdict(self.cfg), "data": data,
                "frozen": self.frozen, "step": self.step, "rows": self.rows,
                "seconds": self.seconds, "factor": self.factor,
                "best": self.best, "waited": self.waited, **parts}


def _to_device(batch, device):
    def move(tensor):
        order = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
        return tensor.to(device, non_blocking=True, memory_format=order)
    if isinstance(batch, dict):
        return {name: move(tensor) for name, tensor in batch.items()}
    return [move(tensor) for tensor in batch]


# Measuring

TASKS = {"x4": 4, "x8": 8, "random": None}           # the papers' two, and s drawn as in training


def judge(faces, args):
    """The recogniser that measures: it knows the people that the network was trained on,
    and none that the network is measured on."""
    known = faces
    if args.state is not None and not _own_faces(faces, args):
        people = args.state["config"]["people"]
        known = _open_faces(args.state["data"], faces.size, people, False, args.device)
    return recogniser(known, "metric", args.device).to(args.device)


def metrics(faces, args):
    """The measures of a restored face, {name: f(image, target) → (B,)}: PSNR in dB,
    SSIM, identity in degrees, detail, with --lpips also LPIPS. Images in [-1,1]."""
    network = judge(faces, args)
    device = args.device

    def identity(image, target):
        return identity_distance(network, image.to(device), target.to(device)).cpu()

    found = {"psnr": psnr, "ssim": ssim, "identity": identity, "detail": detail}
    if args.lpips is not None:
        lpips = LPIPS(args.lpips).to(device)
        found["lpips"] = lambda image, target: lpips(image.to(device), target.to(device)).cpu()
    return found


def load_fid(args):
    """The FID network of --fid with the features of --fid-reference, or None."""
    if args.fid is None:
        return None
    fid = FID(args.fid, args.device)
    fid.reference = None
    if args.fid_reference is not None:
        files = _pictures(args.fid_reference, "--fid-reference")
        fid.reference = fid.features(read_image(file)[None] for file in files)
    return fid


@torch.inference_mode()
def measure(ways, metrics, fid=None):
    """One task's table: means over all faces, the mean paired gain in PSNR with its 95 %
    interval; under "indices" and "each" which faces, and the values of every face.

    ways: {column: batches}, "restored" first; batches: dicts with "faces", their indices
    (B,), and "degraded", "restored", "target" (B,3,H,W). All restore the same degraded
    faces, the column "input".
    """
    columns = ["input", *ways]
    values = {name: {metric: [] for metric in metrics} for name in columns}
    seen = {name: [] for name in (*columns, "target")}
    indices = []
    for same in zip(*ways.values()):
        target = same[0]["target"]
        indices += same[0]["faces"].tolist()
        pictures = [same[0]["degraded"], *(batch["restored"] for batch in same)]
        for name, picture in zip(columns, pictures):
            for metric, function in metrics.items():
                values[name][metric].append(function(picture, target))
        if fid is not None:
            for name, picture in zip(seen, [*pictures, target]):
                seen[name].append(fid.features([picture]))
    values = {name: {metric: torch.cat(parts) for metric, parts in column.items()}
              for name, column in values.items()}
    table = {name: {metric: value.mean().item() for metric, value in column.items()}
             for name, column in values.items()}
    if fid is not None:
        reference = torch.cat(seen["target"]) if fid.reference is None else fid.reference
        for name in columns:
            table[name]["fid"] = frechet_distance(torch.cat(seen[name]), reference)
    before, after = list(values.values())[:2]
    return {"faces": len(after["psnr"]), **table,
            "paired_psnr_gain": paired_gain(after["psnr"], before["psnr"]), "indices": indices,
            "each": values}


def report(run, table, pictures):
    """The end of a run: write result.json, faces.csv and the pictures, {file name:
    (3,H,W) or a Figure}; print the table {task: measure(…)} and what the folder holds.
    Results on other --data carry that folder's name, those of --degradation its name."""
    if rank() > 0:
        return
    args = run.args
    other = args.data is not None and not args.train and not _own_faces(run.faces, args)
    data = args.data or (args.state or {"data": {"data": None}})["data"]["data"] or "rendered"
    end = f"-{Path(args.data).resolve().name}" if other else ""
    end += f"-{args.degradation}" if args.degradation else ""
    written = [args.folder / f"faces{end}.csv", args.folder / f"result{end}.json"]
    _write_faces(written[0], table)
    table = {task: {name: part for name, part in row.items() if name not in ("indices", "each")}
             for task, row in table.items()}
    _write_json(written[1], {
        "script": run.script, "variant": run.cfg.variant, "preset": run.cfg.preset,
        "data": str(data), "size": run.cfg.size, "steps": run.step,
        "seconds": round(run.seconds, 1), "test": table})
    for name, picture in pictures.items():
        path = args.folder / name
        path = path.with_stem(path.stem + end)
        written.append(path)
        if torch.is_tensor(picture):
            write_image(path, picture)
        else:
            with _replacing(path) as temporary:
                picture.savefig(temporary, dpi=90)
    _print_table(table)
    files = sorted(file.name for file in args.folder.iterdir() if not file.name.startswith("."))
    print(f"\n{args.folder}: {', '.join([path.name for path in written] if end else files)}")


def _write_faces(path, table):
    """faces.csv: a line a task, column and face, from {task: measure(…)}; `face` is the
    face's index in the data."""
    with _replacing(path) as temporary, open(temporary, "w", newline="") as file:
        lines = csv.writer(file)
        for task, row in table.items():
            for column, metrics in row["each"].items():
                if file.tell() == 0:
                    lines.writerow(["task", "column", "face", *metrics])
                for face, numbers in zip(row["indices"],
                                         torch.stack(list(metrics.values()), 1).tolist()):
                    lines.writerow([task, column, face, *(round(number, 5) for number in numbers)])


def _print_table(table):
    """A row a task, degraded input → restored face; below, what else was restored."""
    digits = {"psnr": 2, "ssim": 3, "identity": 1, "detail": 2}
    names = list(next(iter(table.values()))["input"])

    def cells(row, column):
        return [f"{row[column][name]:.{digits.get(name, 3)}f}" for name in names]

    heads = "".join(f"{name:>18}" for name in names)
    print(f"\n{'':8}{'faces':>6}{heads}   PSNR gain, 95 % interval")
    for task, row in table.items():
        pairs = zip(cells(row, "input"), cells(row, "restored"))
        line = "".join(f"{f'{before} → {after}':>18}" for before, after in pairs)
        gain = row["paired_psnr_gain"]
        low, high = gain["ci95"]
        print(f"{task:8}{row['faces']:>6}{line}   {gain['mean']:+.2f} dB "
              f"[{low:+.2f}, {high:+.2f}]")
    for task, row in table.items():
        for column in row:
            if column not in ("faces", "input", "restored", "paired_psnr_gain"):
                line = "".join(f"{cell:>18}" for cell in cells(row, column))
                print(f"{task:8}{'':6}{line}   {column}")


# The paper's ablation table

class Claim(NamedTuple):
    """What an ablation table says: a row is better than another by this metric, or, if
    `equal`, as good to a tenth of its unit."""
    better: str
    worse: str
    metric: str = "psnr"
    equal: bool = False


def planned_runs(args, script, presets, variants, claims, figures, prepared=None, tested=None):
    """The command lines that --train stands for: itself; with --variant all one for each
    row and seed that is not finished. Then the paper's table stands beside ours.

    claims: of Claim; figures: the paper's, {row: {column: value}}. Rows of equal numbers
    are one run. `prepared` names the number of Config that decides what dictionary.pt
    holds: it is made once for each. `tested` names one that training does not read: its
    rows come as --evaluate.
    """
    if args.variant != "all":
        with _alone_in(args.folder):
            yield args
        return
    first_seed = args.seed or 0
    folders = {variant: [] for variant in variants}
    runs, networks, dictionaries = {}, {}, {}
    for seed in range(first_seed, first_seed + args.seeds):
        for variant in variants:
            row = copy.copy(args)
            row.variant, row.seed, row.begin = variant, seed, time.monotonic()
            cfg = chosen_config(row, presets, variants)
            name = args.folder.name + ("" if variant == "full" else f"-{variant}")
            name += "" if seed == first_seed else f"-seed{seed}"
            numbers = replace(cfg, variant="full")
            folder = runs.setdefault(numbers, args.folder.with_name(name))
            folders[variant].append(folder)
            learned = replace(numbers, **{tested: None}) if tested else numbers
            network = networks.setdefault(learned, folder)
            dictionary = dictionaries.setdefault((seed, getattr(cfg, prepared or "seed")), folder)
            if folder.name != name or _is_finished(folder, cfg, args):
                continue
            row.folder, row.checkpoint = folder, network / "checkpoint.pt"
            if row.checkpoint.is_file():
                row.state = load_checkpoint(row.checkpoint, script)
                row.resume = folder == network
            if folder != network:
                row.train, row.evaluate = False, True
            elif dictionary != folder:
                with first():
                    _copy(dictionary / "dictionary.pt", folder / "dictionary.pt")
                row.prepared = not row.resume and (folder / "dictionary.pt").is_file()
            if rank() == 0:
                print(f"\n{variant}, seed {seed}: {folder}", flush=True)
            with _alone_in(folder):
                yield row
    if rank() == 0:
        _report_ablation(args, script, folders, claims, figures)


def _is_finished(folder, cfg, args):
    """Whether the folder holds this run's result; an InputError if it holds another's."""
    def read(name):
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    config, result = read("config.json"), read("result.json")
    wanted = json.loads(json.dumps(asdict(cfg))) | {"data": str(args.data or "rendered")}
    result.pop("steps", None)               # those that were done: a row may leave some out
    for name, value in [*config.items(), *result.items()]:
        if wanted.get(name, []) not in ([], value):                # a run fills in what is empty
            raise InputError(f"{folder}: holds a run of another {name} ({value}, not {wanted[name]}); give "
                             "this one another --out")
    return bool(result) and (folder / "faces.csv").is_file()


def _copy(source, target):
    """Copy a file that exists, for a target that does not."""
    if source.is_file() and not target.exists():
        with _replacing(target) as temporary:
            shutil.copyfile(source, temporary)


def _read_faces(folder, metric):
    """The restored faces' values at ×4 and ×8, a mean for each face: (N,)."""
    with open(folder / "faces.csv", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["column"] == "restored"]
    tasks = [[float(line[metric]) for line in lines if line["task"] == task]
             for task in ("x4", "x8")]
    return torch.tensor(tasks).mean(0)


def _judge_claim(claim, folders, figures):
    """A claim beside what was measured, over all faces of all seeds: the mean paired
    difference at ×4 and ×8, counted so that above 0 speaks for the claim."""
    sign = -1 if claim.metric in ("identity", "lpips", "features") else 1
    better, worse = (torch.cat([_read_faces(folder, claim.metric) for folder in folders[row]])
                     for row in (claim.better, claim.worse))
    gain = paired_gain(sign * better, sign * worse)
    low, high = gain["ci95"]
    verdict = "seen" if low > 0 else "reversed" if high < 0 else "not seen"
    if claim.equal:
        verdict = "seen" if low > -0.1 and high < 0.1 else "not seen"
    ours, theirs = figures.get(claim.better, {}), figures.get(claim.worse, {})
    ends = {"psnr": 1, "idd": -1}
    paper = [ends[column.split("_")[1]] * (ours[column] - theirs[column]) for column in ours
             if column in theirs and column.split("_")[1] in ends]
    return {**claim._asdict(), "paper": sum(paper) / len(paper) if paper else None,
            "difference": gain["mean"], "ci95": gain["ci95"], "verdict": verdict, "finding": ""}


def _report_ablation(args, script, folders, claims, figures):
    """Write ablation.json and ablation.png, print the table."""
    rows, about = {}, {}
    for variant, some in folders.items():
        results = [json.loads((folder / "result.json").read_text(encoding="utf-8"))
                   for folder in some]
        about = about or {"preset": results[0]["preset"], "steps": results[0]["steps"]}
        rows[variant] = {"paper": figures.get(variant, {})}
        for task in ("x4", "x8"):
            found = [result["test"][task]["restored"] for result in results]
            rows[variant][task] = {metric: sum(row[metric] for row in found) / len(found)
                                   for metric in found[0]}
    judged = [_judge_claim(claim, folders, figures) for claim in claims]
    _write_json(args.folder / "ablation.json", {
        "script": script, **about, "seeds": args.seeds, "rows": rows, "claims": judged})
    with _replacing(args.folder / "ablation.png") as temporary:
        _draw_ablation(judged).savefig(temporary, dpi=110)

    metrics = [name for name in ("psnr", "identity", "detail", "lpips")
               if name in rows["full"]["x4"]]
    cells = [(task, name) for task in ("x4", "x8") for name in metrics]
    print(f"\n{'':26}" + "".join(f"{f'{task} {name}':>14}" for task, name in cells))
    for variant, row in rows.items():
        print(f"{variant:26}" + "".join(f"{row[task][name]:14.2f}" for task, name in cells))
    print(f"\n{'':44}{'paper':>8}{'here':>8}   95 % interval")
    for claim in judged:
        relation = "=" if claim["equal"] else ">"
        paper = "" if claim["paper"] is None else f"{claim['paper']:+.2f}"
        low, high = claim["ci95"]
        name = f"{claim['better']} {relation} {claim['worse']}"
        print(f"{name:44}{paper:>8}{claim['difference']:+8.2f}   [{low:+.2f}, {high:+.2f}] "
              f"{claim['metric']}: {claim['verdict']}")
    seen = sum(claim["verdict"] == "seen" for claim in judged)
    print(f"\n{seen} of {len(judged)} claims are seen; {args.folder}: ablation.json, ablation.png")


def _draw_ablation(claims):
    """The claims of ablation.json as a figure: the paper's differences, and ours with
    their intervals, a panel a metric."""
    colours = {"seen": "tab:green", "not seen": "tab:gray", "reversed": "tab:red"}
    metrics = list(dict.fromkeys(claim["metric"] for claim in claims))
    figure = matplotlib.figure.Figure(figsize=(4 + 3 * len(metrics), 1.4 + 0.3 * len(claims)),
                                      layout="constrained")
    paper, *ours = figure.subplots(1, 1 + len(metrics), sharey=True)
    for place, claim in enumerate(claims):
        axis = ours[metrics.index(claim["metric"])]
        colour = colours[claim["verdict"]]
        axis.plot(claim["ci95"], [place, place], "-", color=colour)
        axis.plot(claim["difference"], place, "o", color=colour)
        if claim["paper"] is not None:
            paper.plot(claim["paper"], place, "o", color="black")
    for axis in (paper, *ours):
        axis.axvline(0, color="black", linewidth=0.8)
        axis.grid(axis="x", alpha=0.3)
    names = [f"{claim['better']} {'=' if claim['equal'] else '>'} {claim['worse']}"
             for claim in claims]
    paper.set_yticks(range(len(claims)), names)
    paper.invert_yaxis()
    paper.set_title("the paper", fontsize=10)
    for metric, axis in zip(metrics, ours):
        axis.set_title(f"here, {metric}", fontsize=10)
    figure.suptitle("by how much the first row is better: green is seen, grey is not, red is reversed",
                    fontsize=10)
    return figure


# Restoring files

def restore_files(args, size, restore_crops, need_landmarks=False):
    """Restore --restore, a picture or every picture of a folder and those in it, into
    --out under the same names (as PNG).

    `restore_crops(crops (N,3,size,size), landmarks (N,68,2), files)` restores faces, of
    which number i is of files[i], → the restored ones, and for --check {title: pictures}
    that show what they were made with. With --aligned a picture is one face crop: a
    square one is written at size×size, of another its middle is restored in place.
    Otherwise every face is aligned, restored and pasted back, into a photo enlarged up
    to 4 times where the faces are smaller than `size`. Landmarks that were detected are
    written as photo.jpg.txt beside the results: corrected by hand, they serve as
    `--landmarks`. An aligned crop without landmarks gets the average ones, with
    `need_landmarks` the detector's. Existing results are skipped without --overwrite; a
    file that fails is named. Returns the number of failures.
    """
    files = _pictures(args.restore, "--restore", args.out)
    source = Path(args.restore)
    results = _results(files, source if source.is_dir() else source.parent, args.out)
    originals = {file.resolve() for file in files}
    for result in results:
        if result.resolve() in originals:
            raise InputError(f"{result}: would overwrite an original; choose another --out")
    todo = [(file, result) for file, result in zip(files, results)
            if args.overwrite or not result.exists()]
    keep_freed_memory()
    about = SimpleNamespace(landmarks=args.landmarks, aligned=args.aligned, device=args.device)
    work = functools.partial(_read_photo, about, size, need_landmarks)
    photos = torch.utils.data.DataLoader(todo, batch_size=None, collate_fn=work,
                                         num_workers=_detecting(args.workers, args.device))
    progress = Progress("restoring", len(todo), quiet=len(files) == 1)
    failures = []
    waiting = []
    with concurrent.futures.ThreadPoolExecutor(1) as writer:
        writing = []
        for number, photo in enumerate(photos, 1):
            if isinstance(photo, str):
                if len(files) == 1:
                    raise InputError(photo)
                failures.append(f"failed: {photo}")
            else:
                waiting.append(photo)
            enough = sum(len(photo.crops) for photo in waiting) >= _RESTORED_AT_ONCE
            large = sum(photo.picture.numel() for photo in waiting) > 3 * _PIXELS_AT_ONCE
            if waiting and (enough or large or number == len(todo)):
                progress.clear()                            # restore_crops may print
                restored = _restore_waiting(waiting, restore_crops)
                for job in writing:
                    job.result()                            # raises what went wrong there
                writing = [writer.submit(_write_result, *one, args) for one in restored]
                waiting = []
            progress.update(number)
        for job in writing:
            job.result()
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{len(todo) - len(failures)} restored, {len(files) - len(todo)} skipped (already there), "
          f"{len(failures)} failed → {args.out}")
    return len(failures)


def _results(files, folder, out):
    """Where each file's result goes; a.jpg and a.png of one folder both get one."""
    names = [file.relative_to(folder).with_suffix("") for file in files]
    times = collections.Counter(names)
    return [out / (f"{name}.png" if times[name] == 1 else f"{file.relative_to(folder)}.png")
            for name, file in zip(names, files)]


class _Photo(NamedTuple):
    """What a worker makes of a picture file."""
    file: Path
    result: Path
    picture: torch.Tensor      # (3,H,W), enlarged where its faces are small
    matrices: torch.Tensor     # (N,2,3), photo → crop
    crops: torch.Tensor        # (N,3,size,size)
    landmarks: torch.Tensor    # (N,68,2) in the crops
    found: torch.Tensor        # (N,68,2) in the file's pixels, if they were detected; else None


def _read_photo(args, size, need_landmarks, job):
    """Read a picture and cut out its faces → a _Photo, or what is wrong."""
    file, result = job
    try:
        picture, matrices, points, found = _faces_of(file, size, args, need_landmarks)
    except InputError as error:
        return str(error)
    crops = [warp_affine(picture, matrix, size, size, "border") for matrix in matrices]
    landmarks = [transform_points(face, matrix) for face, matrix in zip(points, matrices)]
    return _Photo(file, result, picture, torch.stack(matrices), torch.stack(crops),
                  torch.stack(landmarks), found)


def _restore_waiting(photos, restore_crops):
    """Restore the faces of several photos in one call → (photo, its restored faces, what
    --check shows) of each."""
    crops = torch.cat([photo.crops for photo in photos])
    landmarks = torch.cat([photo.landmarks for photo in photos])
    counts = [len(photo.crops) for photo in photos]
    files = [photo.file for photo, count in zip(photos, counts) for _ in range(count)]
    restored, shown = restore_crops(crops, landmarks, files)
    restored = restored.float().cpu().split(counts)
    shown = {title: pictures.float().cpu().split(counts) for title, pictures in shown.items()}
    return [(photo, faces, {title: pictures[i] for title, pictures in shown.items()})
            for i, (photo, faces) in enumerate(zip(photos, restored))]


def _write_result(photo, restored, shown, args):
    """Paste the faces back and write; last the picture, as what it lacks is made again."""
    picture = photo.picture
    if args.aligned and picture.shape[1] == picture.shape[2]:
        picture = restored[0]
    else:
        for crop, matrix in zip(restored, photo.matrices):
            picture = paste_face(picture, crop, matrix)
    if photo.found is not None:
        write_landmarks(photo.result.with_name(f"{photo.file.name}.txt"), photo.found)
    if args.check:
        drawn = [draw_landmarks(crop, marks) for crop, marks in zip(photo.crops, photo.landmarks)]
        columns = {"input": torch.stack(drawn), **shown, "restored": restored}
        write_image(photo.result.with_name(f"{photo.result.stem}_check.png"),
                    comparison_grid(columns))
    write_image(photo.result, picture)


def read_references(source, size, args, need_landmarks=False):
    """Pictures of one person, a file or a folder, for the guided methods: the largest
    face of each.

    → images (N,3,size,size), their landmarks (N,68,2), the files. In a folder, a file
    that fails is named on stderr and left out; if none is left, InputError.
    """
    images, points, used = [], [], []
    files = _pictures(source, "--reference")
    for file in files:
        try:
            photo, matrices, faces, _ = _faces_of(file, size, args, need_landmarks)
        except InputError as error:
            if len(files) == 1:
                raise
            print(f"left out: {error}", file=sys.stderr)
            continue
        enlarged = [torch.linalg.det(matrix[:, :2]).item() for matrix in matrices]
        largest = enlarged.index(min(enlarged))  # the one to be enlarged least
        images.append(warp_affine(photo, matrices[largest], size, size, "border"))
        points.append(transform_points(faces[largest], matrices[largest]))
        used.append(file)
    if not used:
        raise InputError(f"{source}: none of its {len(files)} pictures can be used as a reference")
    return torch.stack(images), torch.stack(points), used


def _pictures(source, option, out=None):
    """The picture files a command line names: one, or those of a folder, sorted. With
    `out`, where results go, also those of the folders in it, but for `out` itself."""
    source = Path(source)
    if not source.exists():
        raise InputError(f"{source}: no such file or folder; "
                         f"{option} wants a picture or a folder of pictures")
    if source.is_file():
        return [source]
    found = source.glob("*") if out is None else source.rglob("*")
    files = sorted(file for file in found if file.suffix.lower() in _IMAGE_SUFFIXES
                   and not file.name.startswith("."))
    if out is not None and out.resolve() != source.resolve():
        results = out.resolve()
        files = [file for file in files if results not in file.resolve().parents]
    if not files:
        raise InputError(f"{source}: no pictures in it")
    return files


def _faces_of(file, size, args, need_landmarks):
    """A picture's pixels (enlarged where its faces are small), crop matrices and
    landmarks of its faces; and the landmarks in the file's pixels if they were detected,
    else None."""
    photo = read_image(file)
    path = _find_landmarks(file, args.landmarks)
    height, width = photo.shape[1:]
    found = None
    if path is not None:
        points = read_landmarks(path, (height, width), several=True)
    elif args.aligned and not need_landmarks:
        points = None
    else:
        points = found = detect_landmarks(photo, args.device, file, args.aligned)
    if args.aligned:
        matrices = [_middle_matrix(height, width, size)]
        if points is None:
            points = transform_points(mean_landmarks(size), invert_matrix(matrices[0]))[None]
        points = points[:1]
    else:
        matrices = [face_matrix(face, size) for face in points]
    return *_enlarged(photo, matrices, points), found


def _middle_matrix(height, width, size):
    """M (2,3) that brings the middle square of a picture onto a size×size crop."""
    side = min(height, width)
    corner = torch.tensor([(width - side) / 2, (height - side) / 2])
    ratio = size / side
    return torch.cat([torch.eye(2) * ratio, ((0.5 - corner) * ratio - 0.5)[:, None]], 1)


def _enlarged(photo, matrices, points):
    """Photo, matrices and landmarks for a photo up to 4 times larger, so that no face
    is shrunk again."""
    height, width = photo.shape[1:]
    factor = min(max(torch.linalg.det(matrix[:, :2]).sqrt().item() for matrix in matrices), 4)
    if factor <= 1 or height * width * factor**2 > 50e6:
        return photo, matrices, points
    grown = round(height * factor), round(width * factor)
    photo = F.interpolate(photo[None], grown, mode="bicubic", antialias=True)[0].clamp(-1, 1)
    stretch = torch.tensor([grown[1] / width, grown[0] / height])
    points = (points + 0.5) * stretch - 0.5
    matrices = [torch.cat([m[:, :2] / stretch,
                           (m[:, 2] + m[:, :2] @ (0.5 / stretch - 0.5))[:, None]], 1)
                for m in matrices]
    return photo, matrices, points


def run_script(main):
    """Run a script's main(). An InputError, or too little memory, becomes a line on
    stderr and exit status 2; Ctrl-C status 130, SIGTERM 143, after cleaning up.

    What is raised while Python clears away an object is lost; the next step raises it again.
    """
    def stop(number, frame):
        Progress.stop = SystemExit(128 + number)
        raise Progress.stop

    signal.signal(signal.SIGTERM, stop)
    name = Path(sys.argv[0]).name
    try:
        sys.exit(main())
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        print(f"{name}: not enough memory; use a smaller --batch or --size", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on (a training with --resume, from its last "
              "checkpoint)", file=sys.stderr)
        sys.exit(130)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# Nothing below is needed to understand a paper.
# 9. Rendered faces --------------------------------------------------------------------
# Skull, face, ears, neck and shoulders are one surface: a grid over height and azimuth.
# The hair is a second one. A length of 1 is 100 pixels of a 512 x 512 picture; x points
# to the right, y down, z to the camera; the eyes are at (+-0.63, 0). X (sideways) and T
# (down the profile) are the canonical coordinates of a grid point. Features are placed by
# them; identity and expression only move the points.

_FORMAT = 1                      # of the cached pictures: raise it whenever they change
_ROWS, _COLUMNS = 240, 216       # of the grid
_LOW, _HIGH = -3.05, 4.3         # T of the crown and of the lowest row

# The mean head, row by row: T, y, half width, z of the front, z of the back, and how much
# higher the row lies at the sides.
_PROFILE = np.array([
    [-3.05, -3.05, 1.42, 1.6, -2, 0], [-.8, -.8, 1.42, 1.62, -2, 0],
    [-.3, -.3, 1.42, 1.72, -2, 0], [0, 0, 1.4, 1.68, -2, 0],
    [.5, .5, 1.37, 1.66, -1.8, 0], [1, 1, 1.32, 1.7, -1.6, .08],
    [1.31, 1.31, 1.29, 1.72, -1.4, .2], [1.65, 1.65, 1.25, 1.68, -1.3, .42],
    [1.95, 1.95, 1.19, 1.64, -1.2, .68], [2.15, 2.14, 1.11, 1.48, -1.15, .82],
    [2.35, 2.26, 1.02, 1.15, -1.1, .82], [2.7, 2.4, .93, .62, -1.05, .45],
    [3.2, 2.75, .92, .5, -1.15, .1], [3.6, 2.93, 1.6, .6, -1.2, 0],
    [4, 3.15, 2.8, .75, -1.3, 0], [4.3, 4.1, 3.2, 1, -1.3, 0]])

# Gaussian bumps: X, T, width along X, width along T; mean shift along x (outwards), y, z;
# spread of the shift over people.
_BUMPS = np.array([
    [0, .33, .15, .34, 0, 0, .2, .15, 0, .07],              # nose: ridge
    [0, .25, .1, .16, 0, 0, .04, 0, 0, .05],                # hump
    [0, .7, .15, .13, 0, .05, .34, .25, .06, .09],          # tip
    [.21, .82, .08, .1, .03, .02, .17, .06, .02, .03],      # wings
    [.11, .93, .06, .04, 0, -.02, -.04, 0, 0, 0],           # nostrils
    [0, .9, .05, .06, 0, .02, .12, 0, .02, .03],            # base
    [0, .6, .6, .5, 0, 0, 0, 0, .09, .05],                  # length
    [0, 1.1, .04, .09, 0, 0, -.03, 0, 0, .01],              # mouth: philtrum
    [0, 1.21, .26, .06, 0, 0, .08, 0, .03, .03],            # upper lip
    [.09, 1.17, .06, .04, 0, -.02, .02, 0, .02, .01],       # its two peaks
    [0, 1.43, .24, .07, 0, 0, .12, 0, .03, .04],            # lower lip
    [0, 1.63, .3, .07, 0, 0, -.07, 0, 0, .03],              # groove below
    [.58, 1.32, .09, .09, 0, 0, -.05, 0, .04, 0],           # corners
    [0, 1.31, .45, .2, 0, 0, 0, .2, .06, .05],              # size
    [0, 1.92, .26, .16, 0, 0, .12, .2, .05, .08],           # chin: front
    [0, 2.1, .4, .2, 0, .02, 0, .25, .1, .05],              # lower edge
    [.6, .02, .27, .17, 0, 0, -.18, 0, 0, .04],             # eyes: sockets
    [.28, .05, .1, .14, 0, 0, -.12, 0, 0, .03],             # sockets beside the nose
    [.63, 0, .2, .12, 0, 0, .11, 0, 0, .02],                # eyeballs
    [.63, 0, .32, .26, 0, 0, 0, .07, .05, 0],               # distance and height
    [.58, -.3, .36, .1, 0, 0, .05, 0, .05, .05],            # brows
    [.95, .52, .3, .22, .03, 0, .06, .07, .05, .06],        # face: cheekbones
    [.95, 1.15, .35, .38, .02, 0, .02, .09, 0, .08],        # cheeks
    [.45, 1.02, .07, .22, 0, 0, -.02, 0, 0, .02],           # folds beside the mouth
    [1.3, 1.65, .6, .65, .03, 0, 0, .12, .05, 0],           # jaw
    [1.35, .3, .6, .7, 0, 0, 0, .09, 0, 0],                 # width
    [1.3, -.6, .35, .4, -.04, 0, -.02, .07, 0, 0],          # temples
    [0, -1, .7, .4, 0, 0, .05, .05, 0, .08],                # forehead
    [0, 2.4, 9, .6, 0, 0, 0, 0, .13, 0],                    # length of the chin's half
    [0, -2.6, 9, 1, 0, 0, 0, 0, .14, 0]])                   # height of the skull

# How far the hair stands off, and T of its hem at these azimuths from the front.
_HEM_AZIMUTH = [0, .3, .6, .9, 1.1, 1.3, 1.42, 1.55, 1.9, 2.1, 2.4, np.pi]
_HAIR_STYLES = dict(
    short=(.17, [-1.38, -1.4, -1.42, -1.15, -.75, -.05, .05, -.35, -.35, .55, 1.2, 1.3]),
    fringe=(.17, [-.6, -.57, -.55, -.45, -.2, .3, .5, .1, 0, .8, 1.5, 1.6]),
    side=(.26, [-1.2, -1.15, -1.1, -.95, -.6, .05, .2, -.25, -.35, .6, 1.3, 1.4]),
    curly=(.45, [-1.3, -1.3, -1.25, -1.1, -.65, .2, .4, .3, .3, .8, 1.4, 1.5]),
    back=(.15, [-1.55, -1.52, -1.45, -1.2, -.8, -.1, -.05, -.4, -.4, .55, 1.4, 1.6]),
    buzz=(.03, [-1.4, -1.42, -1.45, -1.15, -.8, -.15, -.1, -.4, -.4, .45, 1.1, 1.2]),
    receding=(.12, [-1.8, -1.95, -2.1, -1.7, -.9, -.15, 0, -.4, -.4, .5, 1.2, 1.3]),
    bald=(0, [-1.4] * 12),
    long=(.22, [-1.65, -1.4, -1.15, -.2, 1.5, 3.2, 3.3, 3.3, 3.3, 3.3, 3.3, 3.3]),
    bob=(.22, [-.6, -.58, -.55, -.3, 1.2, 1.7, 1.75, 1.8, 1.8, 1.8, 1.8, 1.8]),
    wavy=(.34, [-1.55, -1.35, -1.15, -.3, .9, 2.3, 2.6, 2.6, 2.6, 2.6, 2.6, 2.6]))

# Colours in linear light. Skin goes from light to dark.
_HAIR_COLOURS = np.array([
    [.012, .009, .008], [.03, .018, .011], [.075, .04, .02], [.16, .085, .038],
    [.4, .26, .12], [.2, .065, .022], [.28, .27, .26], [.55, .53, .5]])
_IRIS_COLOURS = np.array([
    [.04, .02, .01], [.1, .04, .02], [.16, .12, .04], [.1, .16, .09], [.1, .2, .33],
    [.2, .25, .3]])
_SKIN_COLOURS = np.array([
    [.74, .5, .4], [.6, .37, .26], [.36, .195, .115], [.115, .058, .038]])


def _ramp(a, b, x):
    """0 on a's side, 1 on b's, a cubic between."""
    s = ((x - a) / (b - a)).clamp(0, 1)
    return s * s * (3 - 2 * s)


def _bell(x, width):
    return torch.exp(-0.5 * (x / width) ** 2)


def _unit_vector(v):
    """v (3,...) scaled to length 1."""
    return v * (v[0] * v[0] + v[1] * v[1] + v[2] * v[2]).clamp(min=1e-12).rsqrt()


def _vector(*values):
    return torch.tensor(values, dtype=torch.float32)


def _column(*values):
    return _vector(*values)[:, None]


def _normal(rng, deviation=1.0):
    return deviation * float(np.clip(rng.standard_normal(), -2.2, 2.2))


def _noise(rng, rows, columns, height, width):
    """Smooth noise (height,width), variance about 1, the same at every resolution."""
    knots = rng.standard_normal((1, 1, rows, columns), dtype=np.float32)
    dense = rows > height or columns > width
    return F.interpolate(torch.from_numpy(knots), size=(height, width), mode="bilinear",
                         antialias=dense)[0, 0]


def _sample(maps, uv):
    """Bilinear samples (C,...) of maps (C,h,w) at uv (2,...), both in [-1,1]."""
    grid = uv.flatten(1).T[None, None]
    samples = F.grid_sample(maps[None], grid, align_corners=True, padding_mode="border")
    return samples.view(-1, *uv.shape[1:])


def _sample_grid(maps, X, T):
    """Samples (C,...) of maps over the head's grid at canonical points X, T (...)."""
    head = _mean_head()
    u = np.interp(X, head.X[0], np.linspace(-1, 1, _COLUMNS))
    v = np.interp(T, head.T[:, 0], np.linspace(-1, 1, _ROWS))
    return _sample(maps, torch.from_numpy(np.stack([u, v])).float())


def _canonical_x(theta):
    """X of an azimuth: as seen from the front; past the silhouette, along the surface."""
    side = abs(theta)
    X = np.where(side < np.pi / 2, 1.45 * np.sin(side), 1.45 * (1 + side - np.pi / 2))
    return np.sign(theta) * X


def _surface_normals(points):
    """Unit normals (3,h,w) of a grid of points (3,h,w)."""
    down, right = torch.gradient(points, dim=(1, 2))
    return _unit_vector(torch.linalg.cross(right, down, dim=0))


@functools.lru_cache(maxsize=1)
def _mean_head():
    """What all heads share: the grid, the mean surface, the fields of the bumps."""
    def spaced(low, high, count, density):     # closer together where it is higher
        x = np.linspace(low, high, 4000)
        total = np.cumsum(density(x))
        return np.interp(np.linspace(total[0], total[-1], count), total, x)

    def row_density(t):
        nose = np.exp(-((t - .85) / .15) ** 2)
        lips = np.exp(-((t - 1.31) / .025) ** 2)
        return 1 + 1.2 * (abs(t - .75) < 1.5) + nose + 24 * lips + 3 * (t > 3.5)

    def column_density(a):
        ears = np.exp(-((abs(a) - 1.7) / .22) ** 2)
        return 1 + 2 * np.exp(-(a / .8) ** 2) + 3 * ears

    def smoothed(values):                      # a column of the table, at every row
        fine = np.linspace(_LOW, _HIGH, 800)
        kernel = np.exp(-0.5 * (np.arange(-30, 31) / 9.0) ** 2)
        wide = np.interp(fine, _PROFILE[:, 0], values)
        wide = np.pad(wide, 30, mode="reflect", reflect_type="odd")
        wide = np.convolve(wide, kernel / kernel.sum(), "valid")
        return np.interp(T, fine, wide)[:, None]

    T = spaced(_LOW, _HIGH, _ROWS, row_density)
    theta = spaced(-np.pi, np.pi, _COLUMNS, column_density)
    height, half, front, back, lift = [smoothed(values) for values in _PROFILE.T[1:]]
    angle = ((-.8 - T) / 2.25).clip(0, 1)[:, None] * np.pi / 2
    dome = np.cos(angle).clip(1e-4) ** .86     # of the skull
    cos = np.cos(theta)
    sin = np.sin(theta)
    y = np.where(angle > 0, -.8 - 1.42 * np.sin(angle), height - lift * sin ** 2)
    z = -.1 + dome * np.where(cos > 0, (front + .1) * cos, (-.1 - back) * cos)
    mean = torch.from_numpy(np.stack([half * dome * sin, y, z])).float()
    X = torch.from_numpy(_canonical_x(theta)[None]).float()
    T = torch.from_numpy(T[:, None]).float()

    even = []                                  # fields of the shifts along y and z
    odd = []                                   # and along x
    for cx, cy, sx, sy in _BUMPS[:, :4]:
        right = _bell(X - cx, sx) * _bell(T - cy, sy)
        left = _bell(X + cx, sx) * _bell(T - cy, sy)
        even.append(right if cx == 0 else right + left)
        odd.append(right * X * (sx < 5) if cx == 0 else right - left)
    even = torch.stack(even)
    flap = X.sign() * torch.exp(-((X.abs() - 1.68) / .17) ** 4 - ((T - .33) / .5) ** 4)
    groove = X.sign() * _bell(X.abs() - 1.62, .07) * _bell(T - .36, .2)      # of the ears
    fields = torch.stack(odd), even, even
    theta = torch.from_numpy(theta[None]).float()
    return SimpleNamespace(X=X, T=T, theta=theta, mean=mean, fields=fields,
                           flap=flap, groove=groove)


@functools.lru_cache(maxsize=2)
def _person(size, seed, identity):
    """All that an identity keeps: surface, skin texture, eyes, hair, glasses."""
    def choose(count, weights):
        return rng.choice(count, p=weights / weights.sum())

    head = _mean_head()
    rng = np.random.default_rng([seed, identity])
    who = SimpleNamespace()
    who.age = rng.random() ** 1.3
    who.male = rng.random() < .55
    who.dark = rng.random()
    styles = [1, 2, 2, 1.5, 1.5, .2, 0, 0, 5, 3, 4]
    if who.male:
        styles = [6, 2, 4, 2, 3, 2, 1 + 3 * who.age, 1.5 * who.age, .3, .1, .3]
    who.style = choose(list(_HAIR_STYLES), np.array(styles))
    colours = [4, 4, 3, 2, 2.2, 1, 0, 0] if who.dark < .45 else [8, 3, .5, .1, 0, 0, 0, 0]
    grey = 15 * max(who.age - .70, 0)
    hair = _HAIR_COLOURS[choose(8, np.array(colours) + [0, 0, 0, 0, 0, 0, grey, grey])]
    who.hair = _column(*hair) * np.exp(_normal(rng, .2))
    skin = [np.interp(who.dark, [0, .4, .7, 1], np.log(channel)) + _normal(rng, .05)
            for channel in _SKIN_COLOURS.T]
    who.skin = _column(*skin).exp()

    who.eye = eye = SimpleNamespace()
    eye.width = .30 + _normal(rng, .018)
    eye.up = .110 + _normal(rng, .016)
    eye.low = .080 + _normal(rng, .012)
    eye.tilt = _normal(rng, .03) - .02
    eye.crease = .075 + _normal(rng, .025)
    eye.lash = 1.1 - .4 * who.male
    iris = _IRIS_COLOURS[rng.integers(2 if who.dark > .5 else 6)]
    eye.colour = _column(*iris) * np.exp(_normal(rng, .15))
    fibre = 1 + .35 * _noise(rng, 6, 70, 32, 256) + .2 * _noise(rng, 10, 20, 32, 256)
    eye.fibre = fibre.clamp(.3, 2)[None]
    who.teeth = _column(.80, .74, .62) * rng.uniform(.75, 1)
    who.frame = rng.uniform([.34, .22, 2, .012, .01], [.42, .32, 5, .028, .07])
    who.glasses = rng.random() < .15

    shift = np.clip(rng.standard_normal((len(_BUMPS), 3)), -1.8, 1.8)
    shift = torch.from_numpy(_BUMPS[:, 4:7] + .8 * shift * _BUMPS[:, 7:10]).float()
    shift = [torch.tensordot(shift[:, k], head.fields[k], 1) for k in range(3)]
    scalp = head.mean + torch.stack(shift)
    scalp[0] *= 1 + _normal(rng, .045)
    ears = .1 if who.style in ("long", "bob", "wavy") else 1      # below the hair
    who.surface = scalp.clone()
    who.surface[0] += ears * (rng.uniform(.22, .45) * head.flap - .16 * head.groove)
    who.surface[1:] += _column(_normal(rng, .08), -.15)[..., None] * head.flap.abs()
    who.curtain, who.strands, hem = _grow_hair(rng, who, scalp, size)
    who.texture = _paint_skin(rng, who, size, hem)
    return who


def _grow_hair(rng, who, scalp, size):
    """Points (3,h,w), strands (cover, tone, relief), X and T of the hem."""
    h, w = 112, 176
    thick, hem = _HAIR_STYLES[who.style]
    curls = who.style in ("curly", "wavy")
    theta = torch.linspace(-np.pi, np.pi, w)
    v = torch.linspace(0, 1, h)[:, None]
    X = _canonical_x(theta.numpy())
    hem = torch.from_numpy(np.interp(theta.abs(), _HEM_AZIMUTH, hem)).float()
    hem = hem + _normal(rng, .08)
    parted = rng.uniform(-.5, .5) * (who.style in ("side", "fringe", "long"))
    hem = hem + parted * _bell(theta, .6) * torch.sin(2 * theta)
    hem = F.avg_pool1d(F.pad(hem[None, None], (2, 2), mode="circular"), 5, 1)[0, 0]
    T = _LOW + .01 + v * (hem - _LOW - .01)
    # It lies on the skull down to the ears, and hangs from there on.
    points = _sample_grid(scalp, *np.broadcast_arrays(X, T.clamp(max=.15)))
    hang = (T - .15).clamp(min=0)
    clump = _noise(rng, 10, 26, h, w) + curls * _noise(rng, 30, 70, h, w) * .7
    taper = .4 if who.style in ("fringe", "bob") else _ramp(.9, .1, hem) * .6 + .4
    thick = thick * rng.uniform(.7, 1.3) * (1 - _ramp(.65, .98, v) * taper)
    thick = thick * (.55 + .45 * torch.cos(theta / 2) ** 2)
    thick = thick * (1 + .16 * clump * _ramp(.02, .25, v))
    up = -1.2 * _ramp(-.4, -2.2, T)
    out = _unit_vector(torch.stack([theta.sin() + 0 * T, up, theta.cos() + 0 * T]))
    points = points + out * (thick + .015)
    points[0] *= 1 - .04 * _ramp(0, 1.6, hang) * (1 + .8 * clump)
    points[1] += hang

    h, w = 2 * size, 3 * size
    relief = _noise(rng, 14, 300, h, w) + .6 * _noise(rng, 8, 110, h, w)
    if curls:
        relief = .4 * relief + .7 * _noise(rng, 90, 200, h, w)
        relief = relief + .5 * _noise(rng, 45, 90, h, w)
    v = torch.linspace(0, 1, h)[:, None]
    cover = _ramp(1, .92, v + .035 * relief.clamp(-1.5, 1.5) * _ramp(.5, 1, v))
    tone = (1 + .28 * relief.clamp(-2, 2) + .12 * _noise(rng, 5, 40, h, w)).clamp(min=.3)
    return points, torch.stack([cover, tone, relief]), (X, hem)


def _paint_skin(rng, who, size, hem):
    """Texture (6,h,w) of the grid: colour (3), slopes of the relief (2), gloss."""
    def spot(cx, cy, sx, sy):
        return _bell(A - cx, sx) * _bell(T - cy, sy)

    h, w = int(3.2 * size), 3 * size
    resize = functools.partial(F.interpolate, mode="bilinear", align_corners=True)
    T = resize(_mean_head().T[None, None], size=(h, 1))[0, 0]
    X = resize(_mean_head().X[None, None], size=(1, w))[0, 0]
    A = X.abs()
    dark = who.dark
    age = who.age
    hair = who.hair[..., None]
    pore = _noise(rng, 340, 300, h, w)
    blotch = _noise(rng, 40, 36, h, w)
    broad = _noise(rng, 12, 10, h, w)

    # Skin: red cheeks, nose, ears and chin, dark hollows.
    flush = rng.uniform(.10, .24) * (
        .5 * spot(.85, .75, .3, .25) + .6 * spot(0, .72, .16, .14)
        + .5 * spot(1.65, .3, .2, .4) + .3 * spot(0, 1.9, .3, .2) + .15 * broad)
    hollow = (
        .4 * spot(.27, .03, .07, .09) + .18 * spot(.62, -.17, .22, .05)
        + .5 * spot(.24, .95, .12, .03) + .25 * spot(0, 1.56, .22, .05)
        + .3 * spot(.6, 1.31, .05, .05) + .22 * spot(.32, .8, .04, .12)
        + (.1 + .25 * age) * spot(.55, .26, .22, .07) + .6 * spot(1.62, .4, .05, .15)
        + .35 * _ramp(2, 2.6, T))
    colour = who.skin[..., None] * (1 - hollow.clamp(max=.9))
    colour = colour * (1 + .08 * pore + .06 * blotch + .05 * broad)
    colour = colour * torch.stack([1 + .4 * flush, 1 - flush, 1 - .9 * flush])
    relief = (.0012 * pore + .003 * blotch) * _bell(A, 1.2)
    if dark < .5 and rng.random() < .35:
        freckles = (spot(.6, .5, .5, .4) + spot(0, .3, .3, .4)).clamp(max=1)
        freckles = freckles * _ramp(1.2, 2.2, _noise(rng, 210, 190, h, w))
        colour = torch.lerp(colour, colour * _column(.75, .62, .55)[..., None], freckles)
    for _ in range(rng.integers(2, 9)):
        x = rng.uniform(-1.3, 1.3)
        t = rng.uniform(-1.2, 2.1)
        radius = rng.uniform(.012, .038)
        mole = _ramp(1.3, .7, ((X - x) ** 2 + (T - t) ** 2).sqrt() / radius)
        colour = torch.lerp(colour, .35 * colour, mole * rng.uniform(.5, 1))

    # Wrinkles: on the forehead, beside the mouth, under the eyes.
    warp = .03 * broad + .02 * blotch
    forehead = torch.cos((T + warp + .05 * A * A) * 37)
    forehead = .5 * age * _ramp(.75, 1, forehead) * spot(0, -.85, .55, .22)
    fold_at = A - .33 - .6 * (T - .85).clamp(0, .65) - .3 * warp
    folds = (.2 + .4 * age) * _bell(fold_at, .022)
    folds = folds * _ramp(.75, .9, T) * _ramp(1.5, 1.2, T)
    bag = T - .22 - .25 * (A - .6) ** 2 + .3 * warp
    wrinkles = forehead + folds + (.1 + .3 * age) * _bell(bag, .015) * _bell(A - .6, .2)
    colour = torch.lerp(colour, .55 * colour, wrinkles)

    # Lips.
    full = 1 + _normal(rng, .25)
    bow = (1 - (A / .56) ** 2).clamp(min=0)
    edge = 1.31 - .15 * full * bow ** .7 - .03 * _bell(A - .1, .06) + .02 * _bell(A, .05)
    lips = _ramp(-.02, .02, T - edge) * _ramp(.58, .52, A)
    lips = lips * _ramp(.03, -.02, T - 1.31 - .19 * full * bow ** .6)
    made_up = not who.male and rng.random() < .5
    creases = _noise(rng, 6, 420, h, w)
    if made_up:
        tint = rng.uniform([.6, .12, .18], [1, .4, .42])
    else:
        tint = rng.uniform([.8, .48, .5], [1, .7, .7])
    tint = who.skin * (1 - .35 * dark) * _column(*tint)
    tint = tint[..., None] * (1 + .06 * creases) * (1 - hollow)
    colour = torch.lerp(colour, tint, lips)
    relief = (relief - .010 * wrinkles) * (1 - lips) + .002 * lips * creases
    gloss = .35 * (1 + lips) + .25 * spot(0, .6, .15, .3) + .2 * spot(0, -.9, .6, .3)

    # Brows: p along, q across, strands that lean outwards.
    p = (A - .28 - _normal(rng, .03)) / .72
    arch = (.07 + _normal(rng, .035)) * (1 - (p / .62 - 1) ** 2)
    q = T + .34 + arch - _normal(rng, .03) - _normal(rng, .04) * p
    width = .06 + .012 * who.male + _normal(rng, .017)
    q = q / (width * (1.15 - .75 * p).clamp(min=.15))
    comb = 22 * p - 1.3 * (1 - p) * q + .35 * blotch + .12 * pore
    comb = torch.cos(2 * np.pi * comb)
    brow = _ramp(-.05, .10, p + .03 * comb) * _ramp(1.05, .75, p)
    brow = brow * _ramp(1.4, .3, q.abs() + .25 * comb)
    whisker = hair.clamp(max=.25) * _column(1, .86, .74)[..., None]
    stubble = _noise(rng, 420, 360, h, w)
    brow = (brow * (.8 + .25 * comb) * rng.uniform(.6, 1)).clamp(0, .95)
    colour = torch.lerp(colour, .7 * whisker, brow)

    # Beard: none, a shadow, a full one, a moustache, a goatee.
    grown = rng.random() * who.male
    if grown > .3:
        shadow = grown < .6
        moustache = spot(.22, 1.1, .22, .055)
        beard = T - 1.42 + .95 * _ramp(.7, 1.45, A) + .07 * blotch
        beard = _ramp(-.08, .10, beard) * _ramp(2.7, 2.2, T) * _ramp(1.64, 1.52, A)
        beard = beard * _ramp(.25, .45, A + 3 * (T - 1.42).clamp(min=0))
        if grown < .88:
            beard = torch.maximum(beard, moustache)
        else:
            beard = 1.2 * moustache + (grown > .94) * spot(0, 1.85, .35, .3)
        beard = beard.clamp(0, 1) * (1 - lips)
        cover = beard * (.22 + .15 * stubble if shadow else .72 + .35 * stubble)
        colour = torch.lerp(colour, whisker * (1 + .3 * stubble), cover.clamp(0, .97))
        relief = relief + .0015 * (1 + (not shadow)) * beard * stubble
        gloss = gloss * (1 - .7 * beard)

    # The scalp is tinted below the hair: a soft hair line. Nostrils. Clothes.
    line = torch.from_numpy(np.interp(X[0], *hem)).float().clamp(max=1.2)
    under = _ramp(.10, -.12, T - line + .05 * stubble)
    under = under * (.1 if who.style == "bald" else .85)
    colour = torch.lerp(colour, .8 * hair, under)
    nostrils = (((A - .115) / .065) ** 2 + ((T - .93) / .03) ** 2).sqrt()
    colour = torch.lerp(colour, .1 * colour, _ramp(1.2, .6, nostrils))
    cloth = T - rng.uniform(-.1, .6) * _bell(A, .35) - rng.uniform(2.75, 3.2)
    cloth = _ramp(-.02, .02, cloth)
    dye = _column(*np.exp(rng.uniform(-3.5, -.5) + rng.uniform(-.4, .4, 3)))[..., None]
    dye = dye * (1 + .15 * pore + .1 * _noise(rng, 20, 90, h, w))
    colour = torch.lerp(colour, dye, cloth)

    def slope(axis, coordinate):      # where rows crowd, no steeper than elsewhere
        rise = torch.gradient(relief, dim=axis)[0]
        step = torch.gradient(coordinate, dim=axis)[0]
        return (rise / step.clamp(min=float(step.median()))).clamp(-2, 2)

    gloss = gloss * (1 - .8 * under) * (1 - cloth)
    return torch.stack([*colour.clamp(.004, .95), slope(1, X), slope(0, T), gloss])


def _rotation(yaw, pitch, roll):
    cy, cp, cr = np.cos([yaw, pitch, roll])
    sy, sp, sr = np.sin([yaw, pitch, roll])
    turn = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    turn = turn @ [[1, 0, 0], [0, cp, -sp], [0, sp, cp]]
    turn = turn @ [[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]
    return torch.from_numpy(turn).float()


def _rasterise(grid, side):
    """Draw a grid of projected points (3,h,w), x and y in pixels and z, into side x side.

    It is refined until samples are closer than pixels; each falls into its pixel, and the
    nearest is kept. Returns a mask (side,side), where the surface is seen, and the grid
    position (2,N) in [-1,1] of the centres of those pixels.
    """
    factor = max(2, round(side / 86))
    empty = 1 << 62
    steps = [k / factor for k in range(factor)]
    dense = [torch.lerp(grid[..., :-1], grid[..., 1:], f) for f in steps]
    dense = torch.stack(dense, -1).flatten(-2)
    dense = [torch.lerp(dense[:, :-1], dense[:, 1:], f) for f in steps]
    dense = torch.stack(dense, 2).flatten(1, 2)
    h, w = dense.shape[1:]
    x, y, z = dense.flatten(1)
    # A frame of one pixel around the picture collects what lies outside.
    row = y.round().clamp(-1, side) * (side + 2)
    cell = (row + x.round().clamp(-1, side) + (side + 3)).long()
    # One integer a sample: depth in the high word decides, the low word is its number.
    number = torch.arange(h * w, dtype=torch.int32)
    key = torch.stack([number, ((20 - z) * 2e4).int()], 1).view(torch.int64)
    best = torch.full(((side + 2) ** 2,), empty)
    best.scatter_reduce_(0, cell, key[:, 0], "amin")
    best = best.view(side + 2, side + 2)
    # Pixels missed where the surface is stretched take the nearest of their neighbours.
    up, down = best[:-2, 1:-1], best[2:, 1:-1]
    left, right = best[1:-1, :-2], best[1:-1, 2:]
    between = torch.minimum(torch.maximum(up, down), torch.maximum(left, right)) < empty
    nearest = torch.minimum(torch.minimum(up, down), torch.minimum(left, right))
    best = best[1:-1, 1:-1]
    best = torch.where((best == empty) & between, nearest, best)
    mask = best < empty

    # From a sample to its pixel's centre, by the cell of the grid it lies in.
    index = best[mask] & 0xffffffff
    i = index // w
    j = index % w
    corner = i.clamp(max=h - 2) * w + j.clamp(max=w - 2)
    places = [torch.stack([x.index_select(0, k), y.index_select(0, k)])
              for k in (corner, corner + 1, corner + w, index)]
    a = places[1] - places[0]
    b = places[2] - places[0]
    d = mask.nonzero().T.flip(0) - places[3]
    area = a[0] * b[1] - a[1] * b[0]
    area = torch.where(area.abs() < .02, 1e9, area)
    j = j + ((d[0] * b[1] - d[1] * b[0]) / area).clamp(-1, 1)
    i = i + ((a[0] * d[1] - a[1] * d[0]) / area).clamp(-1, 1)
    return mask, torch.stack([j * (2 / w) - 1, i * (2 / h) - 1])


def _background(rng, size):
    """A place out of focus: (3,size,size), linear light."""
    def random_colour():      # mostly greys, browns and blues
        warm = rng.normal(0, .28)
        level = np.exp(rng.normal(-1.5, .9))
        colour = level * _column(warm, rng.normal(0, .06), -warm).exp()
        return colour[..., None].clamp(.004, .9)

    m = 96
    kind = rng.integers(6)    # 1 foliage, 2 to 4 a room or a street, 5 lights
    angle = rng.uniform(0, 2 * np.pi)
    y = torch.linspace(0, 1, m)[:, None]
    x = torch.linspace(0, 1, m)[None]
    slope = (x - .5) * np.cos(angle) + (y - .5) * np.sin(angle)
    image = random_colour() * (1 + .7 * slope)
    image = image * (1 + .1 * _noise(rng, 4, 4, m, m) + .03 * _noise(rng, 32, 32, m, m))
    if kind == 1:
        leaf = .5 * _noise(rng, 4, 4, m, m) + .6 * _noise(rng, 10, 10, m, m)
        leaf = leaf + .4 * _noise(rng, 28, 28, m, m)
        green = np.exp(rng.normal(-.3, .5))
        green = green * _column(rng.uniform(.05, .16), .12, .04)[..., None]
        sky = .5 * _ramp(.9, 2, leaf) * _column(.5, .55, .4)[..., None]
        image = green * torch.exp(.7 * leaf) + sky
    for _ in range(rng.integers(6, 18) if kind > 1 else 0):
        cx, cy, w, h = rng.uniform([0, 0, .02, .05], [1, 1, .25, .7])
        colour = random_colour()
        soft = .015 + .015 * kind
        if kind == 5:
            radius = ((x - cx) ** 2 + (y - cy) ** 2).sqrt()
            image = image + .9 * colour * _ramp(soft / 4, -soft / 4, radius - .25 * w)
        else:
            box = _ramp(w + soft, w - soft, (x - cx).abs())
            box = box * _ramp(h + soft, h - soft, (y - cy).abs())
            image = image + .9 * box * (colour * (1 + .4 * (y - cy)) - image)
    image = F.interpolate(image[None], size=(size, size), mode="bilinear")[0]
    return image.clamp(.002, .9)


def _lids(eye, opening, e):
    """T of upper and lower lid at e, from the inner (-1) to the outer (1) corner."""
    bow = (1 - e.abs() ** 2.2).clamp(min=0)
    middle = eye.tilt * e + .015
    low = eye.low * bow ** .8
    upper = middle + .95 * max(0.0, 1 - opening) * low
    return upper - opening * eye.up * bow * (1 - .12 * e), middle + low


def _landmark_points(eye, opening):
    """Canonical X and T (2,68) of the landmarks, in iBUG's order."""
    theta = np.linspace(-1.52, 1.52, 17)
    jaw = [2.17, 2.15, 2.08, 1.85, 1.25, .1]
    jaw = np.interp(abs(theta), [0, .3, .6, .9, 1.2, 1.52], jaw)
    jaw = np.stack([_canonical_x(theta), jaw], 1)
    brow = np.array([[.32, -.36], [.50, -.42], [.68, -.45], [.86, -.43], [1.02, -.36]])
    nose = [[0, -.02], [0, .23], [0, .48], [0, .72],
            [-.24, .88], [-.12, .94], [0, .97], [.12, .94], [.24, .88]]
    e = torch.tensor([-1, -.4, .35, 1, .35, -.4])
    upper, lower = _lids(eye, opening, e)
    lid = torch.where(torch.arange(6) < 4, upper, lower)
    right = torch.stack([.63 + eye.width * e, lid], 1).numpy()
    lips = [[-.57, 1.31], [-.35, 1.2], [-.12, 1.135], [0, 1.16], [.12, 1.135], [.35, 1.2],
            [.57, 1.31], [.36, 1.44], [.14, 1.5], [0, 1.51], [-.14, 1.5], [-.36, 1.44],
            [-.5, 1.31], [-.2, 1.297], [0, 1.297], [.2, 1.297],
            [.5, 1.31], [.2, 1.323], [0, 1.323], [-.2, 1.323]]
    flip = [-1, 1]
    left = (right * flip)[[3, 2, 1, 0, 5, 4]]
    return np.concatenate([jaw, (brow * flip)[::-1], brow, nose, left, right, lips]).T


def _shade(albedo, facing, gloss, seen, light, wrap):
    """Colours (3,N) of points with normals `facing`; `seen` is how far key light gets."""
    key, fill, sky = light
    colour = sky * (.75 - .35 * facing[1]) * (.55 + .45 * seen)
    sheen = 0
    for (direction, tint), reach in ((key, seen), (fill, 1)):
        diffuse = ((direction @ facing + wrap) / (1 + wrap)).clamp(min=0)
        colour = colour + tint * (diffuse * reach)
        half_way = _unit_vector(direction + _vector(0, 0, 1))
        sharp = (half_way @ facing).clamp(min=0).square().square().square().square()
        sheen = sheen + tint * (.1 * reach * gloss * (sharp + sharp.square().square()))
    return albedo * colour + sheen


def _eyeballs(who, still, turn, gaze, light, x, inner, seen, e, below, above):
    """Colours (3,N) of the balls; below, above: distances from the upper, lower lid."""
    ray = -turn[2]
    centres = _sample_grid(still, [-.63, .63], [0, 0]) - _column(0, -.01, .225)
    offset = inner - centres[:, (x > 0).long()]
    along = ray @ offset
    root = (along ** 2 - (offset * offset).sum(0) + .06).clamp(min=0).sqrt()
    ball = _unit_vector(offset - (along + root) * ray[:, None])
    aim = _unit_vector(_vector(np.sin(gaze[0]), np.sin(gaze[1]), .97))
    off = ball - aim[:, None] * (aim @ ball)
    radius = (off * off).sum(0).sqrt() / .46
    polar = torch.atan2(off[1], off[0]) / np.pi
    polar = torch.stack([polar, (2 * radius - 1).clamp(-1, 1)])
    ring = .55 + .6 * _ramp(.3, .8, radius) - .8 * _ramp(.8, 1, radius)
    iris = (1.6 * who.eye.colour * _sample(who.eye.fibre, polar) * ring).clamp(min=.004)
    white = _column(.52, .48, .46) * (1 - .25 * _ramp(.5, 1.05, e.abs()))
    colour = torch.lerp(iris, white, _ramp(.93, 1.07, radius))
    colour = colour * _ramp(.36, .44, radius).clamp(min=.02)      # the pupil
    turned = turn @ ball
    facing = _unit_vector(turned + _column(0, 0, .3))
    colour = _shade(colour, facing, 0, seen, light, .3)
    direction, tint = light[0]
    half_way = _unit_vector(direction + _vector(0, 0, 1))
    glint = half_way @ _unit_vector(turned + .25 * (turn @ aim)[:, None])
    glint = .9 * _ramp(.989, .996, glint) * _ramp(.02, .05, below)
    wet = .3 * _bell(above - .01, .010)
    colour = colour * (.3 + .7 * _ramp(0, .10, below))
    return torch.lerp(colour, 1.3 * who.skin, wet) + glint * tint


def _mouth_inside(who, face, inner, light, seen):
    """Colours (3,N) behind the open lips at points (3,N): teeth before a dark cavity."""
    x = inner[0].abs()
    y = inner[1] - _sample_grid(who.surface, [0], [1.31])[1]
    tooth = x / .155
    upper = y + .012 * torch.cos(2 * np.pi * tooth)
    upper = _ramp(.085, .065, upper) * _ramp(.50, .40, x)
    lower = _ramp(.88 * face.jaw, .88 * face.jaw + .02, y) * _ramp(.42, .32, x)
    lower = lower * (face.jaw > .08)
    cavity = _column(.042, .013, .011) * (.3 + 1.2 * _ramp(0, .4, y))
    shape = (1 - 3 * x ** 2).clamp(min=.1) * (1 - .5 * _bell(tooth - tooth.round(), .06))
    shape = shape * (.35 + .65 * seen)
    gape = min(1.0, (face.jaw + .12 * face.grin) / .05)
    (_, tint), _, sky = light
    teeth = .85 * who.teeth * shape * (sky + .6 * tint)
    return torch.lerp(cavity, teeth, gape * torch.maximum(upper, .8 * lower))


def _put_on_glasses(who, colour, inner, x, t, eyes, turn):
    """Draw them over colours (3,N): where rays cross a plane before the eyes."""
    wide, high, power, rim, tint = who.frame
    cross = inner + (eyes[2] + .30 - inner[2]) / turn[2, 2] * turn[2][:, None]
    u = (cross[0].abs() - eyes[0]).abs() / wide
    v = (cross[1] - eyes[1] - .06).abs() / high
    far = ((u ** power + v ** power) ** (1 / power) - 1) * high
    bridge = cross[0].abs() < eyes[0] - wide
    bridge = bridge & ((cross[1] - eyes[1] + .04).abs() < rim * 1.2)
    arm = (x.abs() > 1.0) & (x.abs() < 1.7) & ((t + .1).abs() < .03)
    metal = _ramp(rim + .01, rim - .005, far.abs())
    metal = torch.maximum(metal, (bridge | arm).float())
    colour = colour * (1 - .08 * (far < 0))      # through the lens
    return torch.lerp(colour, torch.full_like(colour, tint), metal)


def _cast_shadows(key, points, casters, pivot):
    """How far light from `key` reaches points (3,h,w) past casters (3,N), by depths."""
    n = 72
    across = _unit_vector(torch.linalg.cross(_vector(0, 1, 0), key))
    frame = torch.stack([across, torch.linalg.cross(key, across), key])
    rays = frame @ (casters - pivot)
    cell = ((rays[:2] / 3.4 + 1) * (n / 2)).long().clamp(0, n - 1)
    depth = torch.full((n * n,), -9.0)
    depth.scatter_reduce_(0, cell[1] * n + cell[0], rays[2], "amax")
    depth = depth.view(1, n, n)
    rays = (frame @ (points.flatten(1) - pivot)).view_as(points)
    place = rays[:2] / 3.4 * (1 + 1 / n)
    taps = torch.tensor([[-1, -1], [1, -1], [-1, 1], [1, 1], [0, 0]])[..., None, None]
    free = [_ramp(.32, .12, _sample(depth, place + tap)[0] - rays[2])
            for tap in taps * (1.4 / n)]
    seen = (.25 + .15 * sum(free))[None, None]
    return F.avg_pool2d(F.pad(seen, (1, 1, 1, 1), mode="replicate"), 3, 1)[0]


def _pull_face(rng, who):
    """A random expression, and the surface (3,h,w) that it gives to a person's head."""
    head = _mean_head()
    X = head.X
    T = head.T
    A = X.abs()
    face = SimpleNamespace()
    face.jaw = max(0.0, rng.uniform(-.7, .42)) * rng.uniform(.2, 1)
    face.smile = float(np.clip(.25 + _normal(rng, .4), -.35, 1.1))
    face.grin = max(face.smile, 0)
    face.opening = .05                                        # of the lids
    if rng.uniform() >= .06:
        face.opening = float(np.clip(1 - .12 * face.grin + _normal(rng, .10), .5, 1.2))
    # All below the lips turns with the jaw; the step between the lips opens the mouth.
    between = (1 - (A / .55) ** 2).clamp(min=0) ** .5
    step = _ramp(1.298, 1.322, T)
    drop = between * step + (1 - between) * _ramp(.7, 2, T) * _ramp(1.7, 1.1, A)
    drop = drop * _ramp(3.4, 2.4, T) * _ramp(1.7, .9, A)
    corner = _bell(A - .56, .22) * _bell(T - 1.31, .22)
    cheek = _bell(A - .8, .25) * _bell(T - .75, .25)
    upper = (1 - step) * _ramp(.85, 1.25, T) * (.09 * face.grin + .08 * face.jaw)
    lift = between * (upper - step * _ramp(1.7, 1.3, T) * .045 * face.grin)
    brows = _normal(rng, .07) * _bell(T + .35, .14) * _bell(A - .6, .5)
    dx = X.sign() * (.09 * face.smile - .10 * face.jaw) * corner
    dy = face.jaw * drop - lift - face.smile * (.13 * corner + .06 * cheek) - brows
    dz = .07 * face.grin * cheek - .08 * face.smile * corner - .25 * face.jaw * drop
    return face, who.surface + torch.stack([dx, dy, dz])


def _random_light(rng):
    """Key and fill light, each (direction, colour), and the colour of the sky."""
    azimuth = rng.uniform(-1.1, 1.1)
    elevation = rng.uniform(-.05, .9)
    warm = _normal(rng, .08)
    level = np.cos(elevation)
    key = _vector(np.sin(azimuth) * level, -np.sin(elevation), np.cos(azimuth) * level)
    fill = -np.sign(azimuth) * rng.uniform(.4, 1.2)
    fill = _unit_vector(_vector(fill, rng.uniform(-.5, .2), rng.uniform(.3, 1)))
    key_tint = _column(1 + warm, 1, 1 - warm) * rng.uniform(.75, 1.1)
    fill_tint = _column(1 - warm, 1, 1 + warm) * rng.uniform(.12, .4)
    sky = _column(1, 1.02, 1.06) * rng.uniform(.16, .32)
    return (key, key_tint), (fill, fill_tint), sky


def _colour_skin(who, face, still, turn, gaze, light, maps, uv):
    """Colours (3,N), depths (N,) of skin, eyes, mouth and glasses at uv (2,N)."""
    facing, depth, inner, (seen, x, t) = _sample(maps, uv).split([3, 1, 3, 3])
    albedo, slopes, gloss = _sample(who.texture, uv).split([3, 2, 1])
    a = x.abs()
    down = turn[:, 1:2].expand_as(facing)
    across = torch.linalg.cross(down, facing, dim=0)
    facing = _unit_vector(facing - slopes[0] * across - slopes[1] * down)
    e = (a - .63) / who.eye.width
    upper, lower = _lids(who.eye, face.opening, e)
    near = ((e.abs() < 1.25) & (t.abs() < .34)).float()
    crease = _bell(t - upper + who.eye.crease, .014)
    crease = min(face.opening, 1) * crease * _ramp(1.15, .8, e.abs())
    rim = _bell(t - lower - .012, .012) * _ramp(1.1, .9, e.abs())
    albedo = albedo * (1 - near * (.45 * crease + .15 * rim))
    colour = _shade(albedo, facing, gloss, seen, light, _column(.40, .20, .15))

    k = (near > 0) & (t > upper - .02) & (t < lower + .02) & (e.abs() < 1.03)
    k = k.nonzero()[:, 0]
    below = (t - upper)[k]
    above = (lower - t)[k]
    ball = _eyeballs(who, still, turn, gaze, light, x[k], inner[:, k], seen[k], e[k],
                     below, above)
    ball_seen = _ramp(-.008, .008, below) * _ramp(-.008, .008, above)
    colour[:, k] = torch.lerp(colour[:, k], ball, ball_seen)
    lash = _ramp(-.06, -.01, t - upper) * _ramp(.02, 0, t - upper)
    lash = lash * (.3 + .4 * e.clamp(0, 1))
    lash = (lash * (.6 + .4 * torch.sin(190 * a + 60 * (t - upper)))
            + .9 * _bell(t - upper + .004, .012) + .25 * _bell(t - lower - .006, .008))
    lash = near * who.eye.lash * _ramp(1.12, .95, e.abs()) * lash
    colour = colour * (1 - .88 * lash.clamp(0, 1))

    hole = _ramp(.010, .004, (t - 1.31).abs()) * _ramp(.56, .50, a)
    k = hole.nonzero()[:, 0]
    teeth = _mouth_inside(who, face, inner[:, k], light, seen[k])
    colour[:, k] = torch.lerp(colour[:, k], teeth, hole[k])
    if who.glasses:
        eyes = _sample_grid(still, [.63], [0])[:, 0]
        colour = _put_on_glasses(who, colour, inner, x, t, eyes, turn)
    return colour, depth[0]


def _colour_hair(who, light, maps, uv, strands_uv):
    """Colours (3,N), depths (N,) and cover (N,) of the hair at uv (2,N)."""
    facing, depth, along = _sample(maps, uv).split([3, 1, 3])
    cover, tone, relief = _sample(who.strands, strands_uv)
    front = (facing[2] > 0).float()
    facing = _unit_vector(facing * (2 * front - 1) + .25 * relief * _column(1, 0, 0))
    colour = _shade(who.hair * tone * (.3 + .7 * front), facing, 0, 1, light, .3)
    for direction, tint in light[:2]:      # strands shine across their direction
        cosine = _unit_vector(direction + _vector(0, 0, 1)) @ along + .06 * relief
        sine = (1 - cosine ** 2).clamp(min=0)
        amount = (direction @ facing).clamp(min=0).sqrt() * front * tone
        shine = .035 * sine ** 30 + (.10 * who.hair + .01) * sine ** 7
        colour = colour + tint * amount * shine
    return colour, depth[0], cover


def _render_face(size, seed, identity, shot):
    """A picture, uint8 (3,size,size), and its landmarks, float32 (68,2), in pixels."""
    head = _mean_head()
    who = _person(size, seed, identity)
    rng = np.random.default_rng([seed, identity, shot, 1])
    side = 2 * size      # supersampled twice
    face, still = _pull_face(rng, who)

    # Pose: the neck follows the head, the shoulders hardly.
    angles = [15 * rng.normal(), _normal(rng, 7), _normal(rng, 5)]
    yaw, pitch, roll = np.deg2rad(np.clip(angles, [-40, -20, -15], [40, 20, 15]))
    gaze = [_normal(rng, .16) - .5 * yaw, _normal(rng, .10) + .3 * pitch]
    gaze = np.clip(gaze, -.4, .4)
    turn = _rotation(yaw, pitch, roll)
    body = _rotation(.35 * yaw + _normal(rng, .1), .1 * pitch, .3 * roll)
    follow = _ramp(3.6, 2.2, head.T).expand(_ROWS, _COLUMNS).flatten()
    pivot = _column(0, 1.2, -.4)
    rest = still.flatten(1) - pivot
    points = (turn @ rest) * follow + (body @ rest) * (1 - follow) + pivot
    points = points.view_as(still)
    curtain = (turn @ (who.curtain.flatten(1) - pivot) + pivot).view_as(who.curtain)

    # Camera: perspective, framed on eyes and mouth.
    distance = 17.0
    zoom = 1560 * (1 + _normal(rng, .05))
    anchor = _sample_grid(points, [-.63, .63, -.5, .5], [0, 0, 1.35, 1.35]).mean(1)
    shift = _vector(256 + _normal(rng, 9), 304 + _normal(rng, 9))
    shift = shift - anchor[:2] * zoom / (distance - anchor[2])

    def project(p):      # (3,...) -> x, y in supersampled pixels, z
        x = p[0] * zoom / (distance - p[2]) + shift[0]
        y = p[1] * zoom / (distance - p[2]) + shift[1]
        return torch.stack([x * (side / 512) - .5, y * (side / 512) - .5, p[2]])

    light = _random_light(rng)
    haired = who.style != "bald"
    casters = [points.flatten(1), curtain.flatten(1)] if haired else [points.flatten(1)]
    seen = _cast_shadows(light[0][0], points[:, ::2, ::2], torch.cat(casters, 1), pivot)
    seen = F.interpolate(seen[None], size=(_ROWS, _COLUMNS), mode="bilinear")[0]
    image = _background(rng, side) * rng.uniform(.5, 1.1)
    nearest = torch.full((side, side), -9.0)

    def columns_in_view(theta, limit):      # the part of a grid that can face the camera
        left, right = ((theta + yaw).abs() < limit).nonzero()[[0, -1], 0].tolist()
        return left, right - left

    def whole_grid(uv, left, span, last):   # uv of a part, as uv of the grid
        u = ((uv[0] + 1) / 2 * span + left) * (2 / last) - 1
        return torch.stack([u, uv[1]])

    left, span = columns_in_view(head.theta[0], 1.85)
    mask, uv = _rasterise(project(points[:, :, left:left + span + 1]), side)
    uv = whole_grid(uv, left, span, _COLUMNS - 1)
    maps = torch.cat([_surface_normals(points), points[2:], still, seen,
                      head.X.expand(1, _ROWS, -1), head.T.expand(1, -1, _COLUMNS)])
    image[:, mask], nearest[mask] = _colour_skin(
        who, face, still, turn, gaze, light, maps, uv)

    if haired:
        last = curtain.shape[2] - 1
        limit = 4 if who.style in ("long", "bob", "wavy") else 1.9      # 4: all of it
        left, span = columns_in_view(torch.linspace(-np.pi, np.pi, last + 1), limit)
        curtain = curtain[:, :, left:left + span + 1]
        mask, uv = _rasterise(project(curtain), side)
        along = _unit_vector(torch.gradient(curtain, dim=1)[0])
        maps = torch.cat([_surface_normals(curtain), curtain[2:], along])
        colour, depth, cover = _colour_hair(
            who, light, maps, uv, whole_grid(uv, left, span, last))
        cover = cover * (depth > nearest[mask] - .06)
        image[:, mask] = torch.lerp(image[:, mask], colour, cover)

    # Box filter, exposure, white balance, tone curve.
    gain = 1.35 * np.exp(_normal(rng, .12))
    gain = gain * _column(1 + _normal(rng, .04), 1, 1 + _normal(rng, .04))
    image = F.avg_pool2d(image[None], 2)[0] * gain[..., None]
    image = (image * (1 + .12 * image) / (1 + .55 * image)).clamp(0, 1) ** (1 / 2.2)
    marks = _sample_grid(points, *_landmark_points(who.eye, face.opening))
    marks = (project(marks)[:2].T + .5) / 2 - .5
    return (image * 255 + .5).to(torch.uint8).numpy(), marks.numpy()


def _render_person(size, seed, shots, identity):
    """[(picture, landmarks), …] of a person's shots."""
    return [_render_face(size, seed, identity, shot) for shot in range(shots)]


class RenderedFaces(torch.utils.data.Dataset):
    """Rendered people. Item i depends on (seed, i) alone: person i // per_identity.

    They are rendered once, on all cores, and kept in the folder `cache`.
    """

    def __init__(self, size=128, identities=288, per_identity=6, seed=0, cache=None):
        self.size = size
        self.per_identity = per_identity
        self.identity = torch.arange(identities).repeat_interleave(per_identity)
        self.names = [f"person {seed}-{number}" for number in range(identities)]
        self.record = np.dtype([("image", "u1", (3, size, size)),
                                ("landmarks", "<f4", (68, 2))])
        self.fingerprint = f"rendered{_FORMAT}-{size}-{identities}x{per_identity}-{seed}"
        path = Path(cache or _CACHE) / f"{self.fingerprint}.npy"
        with first():                          # the other processes read what it wrote
            self.data = self.read(path)
            if self.data is None:
                self.data = self.render(seed)
                self.write(path)

    def read(self, path):
        """The cached faces, or None if there are none or the file is damaged."""
        try:
            data = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, SyntaxError):
            return None
        return data if data.dtype == self.record and data.shape == (len(self),) else None

    def render(self, seed):
        """All faces, a person an item of work for every core."""
        if len(self) > 64:
            print(f"rendering {len(self)} faces at {self.size} px ...", file=sys.stderr)
        people = len(self.names)
        # A worker may not start workers. DataLoader gives each of its own one thread.
        nested = multiprocessing.current_process().daemon
        workers = 0 if nested else min(os.cpu_count() or 1, people)
        work = functools.partial(_render_person, self.size, seed, self.per_identity)
        loader = torch.utils.data.DataLoader(
            range(people), batch_size=None, num_workers=workers, collate_fn=work)
        faces = (face for person in loader for face in person)
        return np.fromiter(faces, self.record, len(self))

    def write(self, path):
        """Cache the faces. No process ever sees half a file: it is renamed when whole."""
        try:
            with _replacing(path) as temporary:
                np.save(temporary, self.data)
        except InputError as error:
            print(f"the rendered faces are kept in memory only: {error}", file=sys.stderr)

    def __len__(self):
        return len(self.identity)

    def __getitem__(self, i):
        image = torch.from_numpy(np.array(self.data["image"][i]))
        return Face(image.float() / 127.5 - 1, self.landmarks(i), int(self.identity[i]))

    def landmarks(self, i):
        """Landmarks (68,2) of item i, without its picture."""
        return torch.from_numpy(np.array(self.data["landmarks"][i]))

    def damaged(self, i):
        """Whether item i is another picture than it should be: never."""
        return False

    def others(self, i):
        """The other pictures of the person on picture i."""
        start = i // self.per_identity * self.per_identity
        return [k for k in range(start, start + self.per_identity) if k != i]
