"""What the five method scripts share: images, degradation, landmarks, faces, metrics and the files of a run.

Nothing here knows any method; what differs between the papers (degradation ranges) is data. Chapters:

1. Images        read_image, write_image, comparison_grid, show
2. Degradation   Degradation, DEGRADATIONS, degrade: I^d = ((I ⊗ k) ↓s + n)_JPEG ↑s
3. Landmarks     68 points: reading, aligning, pasting back, component boxes, masks, heat-maps, detection
4. Faces         RenderedFaces (made in code, nothing to download), FaceFolder (yours), split_identities
5. Metrics       psnr, ssim, LPIPS, FID, Recogniser, recogniser, identity_distance, paired_gain
6. Download      download, checked and resumed; read_published, load_named: weights that authors released
7. Runs          device, precision, random streams, checkpoints, logs, progress, restoring files

Images are float32 tensors, RGB in [-1,1], (3,H,W) or (B,3,H,W). Landmarks are x,y in pixels; (0,0) is the
centre of the top-left pixel. Everything random takes a seed or a generator and repeats exactly.
"""
import contextlib
import copy
import csv
import ctypes
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import sys
import time
import urllib.parse
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import matplotlib.figure
import numpy as np
import requests
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.utils import parametrize

__all__ = [                   # the public names: few, and a test lists them, so that a rename is a decision
    "CACHE", "COMPONENTS", "DEGRADATIONS", "Degradation", "FFHQ_TEMPLATE", "FID", "Face", "FaceFolder",
    "IMAGE_SUFFIXES", "INNER_LIP", "InputError", "JAW", "LEFT_BROW", "LEFT_EYE", "LPIPS", "NOSE_BASE",
    "NOSE_BRIDGE", "OUTER_LIP", "Progress", "RIGHT_BROW", "RIGHT_EYE", "Range", "Recogniser",
    "RenderedFaces", "VGG", "align_face", "angular_margin_loss", "augment", "autocast", "benchmark", "blur",
    "channels_last", "choose_device", "comparison_grid", "component_boxes", "degrade", "detect_landmarks",
    "download", "draw_landmarks", "face_matrix", "find_landmarks", "five_points", "fold", "for_inference",
    "frechet_distance", "gaussian_matrix", "identity_distance", "invert_matrix", "jpeg",
    "landmark_heatmaps", "landmark_mask", "load_checkpoint", "load_named", "load_published", "load_vgg",
    "load_weights", "mean_landmarks", "mirror", "motion_kernels", "paired_gain", "paste_face", "precision",
    "print_table", "process_group", "psnr", "read_image", "read_landmarks", "read_published",
    "read_references", "recogniser", "replacing", "restore_files", "run_script", "save_checkpoint",
    "seeded", "show", "similarity", "split_identities", "spread", "ssim", "stack_faces", "stack_person",
    "to_uint8", "transform_points", "verification_accuracy", "warp_affine", "write_image", "write_json",
    "write_landmarks", "write_log"]

CACHE = Path(os.environ.get("FACE_RESTORATION_CACHE", "~/.cache/face-restoration")).expanduser()
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}


class InputError(Exception):
    """Something the user gave cannot be used: one line, what is wrong and what to do. Exit status 2."""


# -----------------------------------------------------------------------------------------------------------
# 1. Images
# -----------------------------------------------------------------------------------------------------------

def read_image(path):
    """Read any picture Pillow opens → (3,H,W) RGB in [-1,1].

    Greyscale and palette become RGB, transparency is laid over white, 16 bits keep their depth, CMYK is
    converted, the camera's EXIF rotation is applied. InputError for what is no picture, is damaged, tiny
    (under 16 pixels) or larger than Pillow's safety limit (89 megapixels).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                if min(file.size) < 16:
                    raise InputError(f"{path}: {file.width}×{file.height} pixels is too small; "
                                     "at least 16×16 is needed")
                file.load()
                picture = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise InputError(f"{path}: more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels; "
                         "shrink it or cut the face out first") from None
    except (OSError, SyntaxError, ValueError) as error:
        reason = str(error).split(" '")[0].split(" <")[0]
        raise InputError(f"{path}: not a readable picture ({reason}); replace or remove it") from None
    if picture.mode.startswith("I"):
        pixels = np.asarray(picture, np.float32)[..., None].repeat(3, 2) / 65535
    else:
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        pixels = np.asarray(picture.convert("RGB"), np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous() * 2 - 1


def write_image(path, image):
    """Write (3,H,W) in [-1,1] as 8 bits, rounded; the suffix names the format; renamed into place."""
    with replacing(path) as temporary:
        try:
            Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy()).save(temporary, quality=95)
        except ValueError:
            raise InputError(f"{path}: an unknown kind of picture; name it .png or .jpg") from None


def to_uint8(image):
    """[-1,1] → 0 … 255, rounded and clamped, uint8."""
    return ((image.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def comparison_grid(columns):
    """{title: (B,3,H,W)} → picture (3,H',W'): a row a sample, a titled column an entry. All in [-1,1]."""
    height, width = next(iter(columns.values())).shape[-2:]
    gap, head = max(width // 64, 1), max(height // 6, 16)
    strips = [torch.cat([F.pad(image.detach().float().cpu(), (0, gap, 0, gap), value=1)
                         for image in images], 1) for images in columns.values()]
    grid = F.pad(torch.cat(strips, 2), (gap, 0, head, 0), value=1)
    picture = Image.fromarray(to_uint8(grid).permute(1, 2, 0).numpy())
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=head * 0.62)
    for index, title in enumerate(columns):
        draw.text((gap + (index + 0.5) * (width + gap), head / 2), title, fill="black", font=font,
                  anchor="mm")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def show(pictures, titles=(), columns=None, width=1.4):
    """Draw pictures (3,H,W) in [-1,1], or maps (H,W) or (1,H,W) in colours, in rows, `width` inches each.

    A map's colours span its own range (blue low, yellow high). For notebooks: it appears below the cell.
    """
    from matplotlib import pyplot
    pictures = [torch.as_tensor(picture).detach().float().cpu() for picture in pictures]
    columns = min(columns or 8, len(pictures))
    lines, (height, wide) = math.ceil(len(pictures) / columns), pictures[0].shape[-2:]
    _, axes = pyplot.subplots(lines, columns, squeeze=False, layout="constrained", dpi=100, figsize=(
        width * columns, (width * height / wide + (0.25 if titles else 0)) * lines))
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture in zip(axes.flat, pictures):
        if len(picture) == 3 and picture.ndim == 3:
            axis.imshow(to_uint8(picture).permute(1, 2, 0).numpy())
        else:
            axis.imshow(picture.reshape(picture.shape[-2:]).numpy(), cmap="viridis")
    for axis, title in zip(axes.flat, titles):
        axis.set_title(title, fontsize=9)
    pyplot.show()


# -----------------------------------------------------------------------------------------------------------
# 2. Degradation
# -----------------------------------------------------------------------------------------------------------

class Range(NamedTuple):
    """low, low + step, … high (continuous where step is 0); `or_zero` adds one more element: 0, "none"."""
    low: float
    high: float
    step: float = 0.0
    or_zero: bool = False

    def draw(self, count, generator=None):
        """`count` independent uniform draws, float32 (count,)."""
        if not self.step:
            return self.low + (self.high - self.low) * torch.rand(count, generator=generator)
        elements = round((self.high - self.low) / self.step) + 1
        index = torch.randint(elements + self.or_zero, (count,), generator=generator)
        return torch.where(index == elements, 0.0, self.low + index * self.step)


@dataclass(frozen=True)
class Degradation:
    """The ranges of one paper's degradation model ((I ⊗ k) ↓s + n)_JPEG ↑s."""
    blur: Range               # ϱ, standard deviation of the Gaussian kernel, pixels of the target
    scale: Range              # s, down-sampling factor
    noise: Range              # σ, standard deviation of white noise on the small image, of 255
    quality: Range            # q, JPEG quality; 0 is no compression
    motion: bool = False      # half of the images get one of 32 camera-shake kernels in the Gaussian's place
    mode: str = "bicubic"     # resampling, down (anti-aliased) and up


DEGRADATIONS = {
    "gfrnet": Degradation(Range(1, 3, 0.1, or_zero=True), Range(1, 8, 0.1), Range(0, 7, 1),
                          Range(10, 40, 1, or_zero=True)),
    "asffnet": Degradation(Range(1, 3, 0.1), Range(1, 8, 0.1), Range(0, 15, 1), Range(10, 60, 1),
                           motion=True),
    "dfdnet": Degradation(Range(1, 5, 0.1), Range(1, 8, 0.1), Range(0, 15, 1), Range(40, 80, 1),
                          motion=True),
    "dmdnet": Degradation(Range(1, 3, 0.1), Range(1, 10, 0.1), Range(0, 15, 1), Range(50, 100, 1)),
    "restoreformer": Degradation(Range(0.2, 10), Range(1, 8), Range(0, 20), Range(60, 100), mode="bilinear"),
}
KERNEL_RADIUS = 30            # pixels: 3 ϱ of the widest Gaussian, so that no paper's kernel is cut off


def gaussian_matrix(sigma, length, device="cpu"):
    """Blur along one axis as a matrix (length,length): rows are Gaussians of `sigma` pixels and sum 1,
    mirrored at the ends."""
    if not sigma:
        return torch.eye(length, device=device)
    taps = torch.arange(-KERNEL_RADIUS, KERNEL_RADIUS + 1, device=device)
    line = torch.exp(-taps**2 / (2 * sigma**2))
    reached = (torch.arange(length, device=device)[:, None] + taps).abs()
    reached = (length - 1) - ((length - 1) - reached).abs()
    return torch.zeros(length, length, device=device).scatter_add_(
        1, reached, (line / line.sum()).expand(length, -1))


@functools.lru_cache
def motion_kernels(count=32, seed=0):
    """Camera-shake kernels after Boracchi & Foi (2012) → (count,61,61), each of sum 1, centred on its mass.

    A camera that is pulled back to rest while it trembles: its velocity keeps part of itself (inertia), is
    pulled to the origin (the hand's correction), is pushed at random (tremor), and is at times thrown about
    (a jerk). The time the shutter sees each pixel is the kernel. Trajectories span 5 to 25 pixels.
    """
    steps, generator = 400, torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def uniform(low, high):
        return low + (high - low) * torch.rand(count, 1, generator=generator)

    velocity = F.normalize(normal(count, 2), dim=1)
    tremor, pull, jerk, keep = (uniform(0.05, 0.35), uniform(0.0, 0.006), uniform(0.0, 0.01),
                                uniform(0.93, 1.0))
    position, path = torch.zeros(count, 2), []
    for _ in range(steps):
        jerked = (torch.rand(count, 1, generator=generator) < jerk) * 2.0
        velocity = (keep * velocity + tremor * normal(count, 2) - pull * position
                    + jerked * (normal(count, 2) - velocity))
        velocity = F.normalize(velocity, dim=1)
        position = position + velocity
        path.append(position)
    path = torch.stack(path, 1)
    span = (path.amax(1) - path.amin(1)).amax(1)[:, None, None]
    path = path * uniform(5, 25)[..., None] / span
    path = (path - path.mean(1, keepdim=True)).clamp(1 - KERNEL_RADIUS, KERNEL_RADIUS - 1) + KERNEL_RADIUS
    kernels, width = torch.zeros(count, (2 * KERNEL_RADIUS + 1) ** 2), 2 * KERNEL_RADIUS + 1
    corner, part = path.floor().long(), path.frac()
    for dx in (0, 1):
        for dy in (0, 1):
            weight = (part[..., 0] if dx else 1 - part[..., 0]) * (part[..., 1] if dy else 1 - part[..., 1])
            kernels.scatter_add_(1, (corner[..., 1] + dy) * width + corner[..., 0] + dx, weight / steps)
    return kernels.view(count, width, width)


def blur(image, kernel):
    """I ⊗ k: image (…,H,W) convolved with any kernel (61,61), mirrored at the border; in the frequency
    domain, where a wide kernel costs no more than a small one. H, W > 30."""
    height, width = image.shape[-2:]
    padded = F.pad(image, (KERNEL_RADIUS,) * 4, mode="reflect")
    shape = [math.ceil(length / 64) * 64 for length in padded.shape[-2:]]    # lengths a fast transform likes
    spectrum = torch.fft.rfft2(padded, s=shape) * torch.fft.rfft2(kernel, s=shape)
    start = 2 * KERNEL_RADIUS
    return torch.fft.irfft2(spectrum, s=shape)[..., start:start + height, start:start + width]


def jpeg(image, quality):
    """(3,H,W) uint8 → the same after JPEG compression at `quality` 1 … 100, on the CPU."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(buffer, "JPEG", quality=int(quality))
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


def degrade(target, degradation, generator=None, scale=None):
    """I^d = ((I ⊗ k) ↓s + n)_JPEG ↑s, every image with parameters of its own.

    target (B,3,H,W) in [-1,1] → the same shape, range and device, quantised to 8 bits. `generator` (on the
    CPU) repeats it. `scale` fixes s, as in papers' ×4 and ×8 tests; the rest is drawn. H, W > 30.

    Gaussian blur and down-sampling are linear and separable: together one small matrix an axis, the blur's
    with its rows down-sampled, far cheaper than blurring at full size. Motion blur takes the long way.
    """
    count, _, height, width = target.shape
    sigmas, scales = degradation.blur.draw(count, generator), degradation.scale.draw(count, generator)
    noises, qualities = degradation.noise.draw(count, generator), degradation.quality.draw(count, generator)
    shakes = torch.full((count,), -1)
    if degradation.motion:
        drawn = torch.randint(len(motion_kernels()), (count,), generator=generator)
        shakes = torch.where(torch.rand(count, generator=generator) < 0.5, drawn, shakes)
    if scale is not None:
        scales = torch.full((count,), float(scale))
    device, mode = target.device, degradation.mode
    stream = torch.Generator(device).manual_seed(torch.randint(2**62, (), generator=generator).item())
    parameters = zip(*(drawn.tolist() for drawn in (sigmas, shakes, scales, noises, qualities)))
    degraded = []
    for image, (sigma, shake, factor, noise, quality) in zip(target.float(), parameters):
        h, w = max(round(height / factor), 1), max(round(width / factor), 1)
        if shake >= 0:
            blurred = blur(image, motion_kernels()[shake].to(device))
            small = F.interpolate(blurred[None], (h, w), mode=mode, antialias=True)[0]
        else:
            rows, columns = (F.interpolate(gaussian_matrix(sigma, long, device)[None, None], (short, long),
                                           mode=mode, antialias=True)[0, 0]
                             for long, short in ((height, h), (width, w)))
            small = rows @ image @ columns.T
        small = to_uint8(small + noise / 127.5 * torch.randn(small.shape, device=device, generator=stream))
        if quality:
            small = jpeg(small, quality).to(device)
        degraded.append(F.interpolate(small[None], (height, width), mode=mode, antialias=True))
    return torch.cat(degraded).float() / 127.5 - 1


# -----------------------------------------------------------------------------------------------------------
# 3. Landmarks
# -----------------------------------------------------------------------------------------------------------
# The 68-point scheme. "Left" is the image's left, as in the papers' code.

JAW, LEFT_BROW, RIGHT_BROW, NOSE_BRIDGE, NOSE_BASE = (
    slice(0, 17), slice(17, 22), slice(22, 27), slice(27, 31), slice(31, 36))
LEFT_EYE, RIGHT_EYE, OUTER_LIP, INNER_LIP = slice(36, 42), slice(42, 48), slice(48, 60), slice(60, 68)
COMPONENTS = {                # name → the landmarks a component's box is drawn around
    "left_eye": [*range(17, 22), *range(36, 42)],
    "right_eye": [*range(22, 27), *range(42, 48)],
    "nose": [*range(29, 36)],
    "mouth": [*range(48, 68)],
}
FFHQ_TEMPLATE = torch.tensor(
    [[192.98, 239.95], [318.90, 240.19], [256.63, 314.02], [201.26, 371.41], [313.09, 371.15]])
# Eye centres, nose tip, mouth corners in a 512×512 crop, (5,2): alignment of FFHQ and the released networks.
MEAN_LANDMARKS = torch.tensor([  # of rendered faces aligned to FFHQ_TEMPLATE, made symmetric; pixels at 512
    [127, 247], [131, 309], [141, 353], [155, 382], [173, 407], [193, 432], [213, 449], [234, 462],
    [256, 466], [277, 462], [298, 449], [318, 432], [338, 407], [356, 382], [370, 353], [380, 309],
    [384, 247], [159, 201], [173, 194], [190, 192], [206, 194], [224, 201], [287, 201], [305, 194],
    [321, 192], [338, 194], [352, 201], [256, 236], [256, 263], [256, 291], [256, 321], [230, 333],
    [243, 336], [256, 341], [268, 336], [281, 333], [168, 237], [185, 231], [207, 232], [224, 242],
    [207, 248], [186, 246], [287, 242], [304, 232], [326, 231], [343, 237], [325, 246], [304, 248],
    [201, 369], [222, 358], [244, 353], [256, 356], [267, 353], [289, 358], [310, 369], [290, 390],
    [268, 400], [256, 402], [243, 400], [221, 390], [207, 370], [237, 370], [256, 371], [274, 370],
    [304, 370], [274, 381], [256, 383], [237, 381]], dtype=torch.float32)


MIRRORED = [*range(16, -1, -1), *range(26, 16, -1), 27, 28, 29, 30, *range(35, 30, -1),
            45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40, *range(54, 47, -1), *range(59, 54, -1),
            *range(64, 59, -1), 67, 66, 65]
# Where each of the 68 points is found in the mirrored face.


def mean_landmarks(size):
    """Where the landmarks of an average FFHQ-aligned crop lie, (68,2), to stand in for an aligned crop's."""
    return (MEAN_LANDMARKS + 0.5) * size / 512 - 0.5


def read_landmarks(path, size=None, several=False):
    """Read 68 lines `x y` (68 lines a face) → (68,2) float32, or (N,68,2) with `several`.

    `size` is the picture's (height, width): a face whose middle lies outside it is an error, as is a wrong
    count or a number that is none. InputError says which.
    """
    try:
        words = [line.replace(",", " ").split() for line in Path(path).read_text().splitlines()
                 if line.strip()]
        points = torch.tensor([[float(x), float(y)] for x, y in words])
    except FileNotFoundError:
        raise InputError(f"{path}: no such landmark file") from None
    except (ValueError, UnicodeDecodeError, OSError):
        raise InputError(f"{path}: not a landmark file; 68 lines of two numbers `x y` are needed") from None
    if len(points) == 0 or len(points) % 68 or (len(points) > 68 and not several):
        raise InputError(f"{path}: {len(points)} landmarks, 68 needed; correct the file, "
                         "or pass an aligned crop with --aligned")
    if not points.isfinite().all():
        raise InputError(f"{path}: a landmark is not a finite number; correct the file")
    faces = points.view(-1, 68, 2)
    if (five_points(faces).var(1).sum(1) < 1).any():
        raise InputError(f"{path}: all landmarks lie in one place; correct the file")
    if size is not None:
        middle, far = faces[:, 17:].mean(1), torch.tensor([size[1], size[0]])
        if ((middle < 0) | (middle > far - 1)).any() or ((faces < -far) | (faces > 2 * far)).any():
            raise InputError(f"{path}: landmarks lie outside the {size[1]}×{size[0]} picture; "
                             "correct the file")
    return faces if several else faces[0]


def write_landmarks(path, landmarks):
    """Write (68,2) or (N,68,2) as lines `x y` with three decimals, renamed into place."""
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{x:.3f} {y:.3f}\n" for x, y in landmarks.reshape(-1, 2).tolist()))


def find_landmarks(image_path, folder=None):
    """A photo's landmark file, photo.jpg.txt or photo.txt, beside it or in a parallel `folder`, or None."""
    image_path = Path(image_path)
    place = image_path.parent if folder is None else Path(folder)
    names = [place / f"{image_path.name}.txt", place / f"{image_path.stem}.txt"]
    if folder is not None:
        names += [place / image_path.parent.name / name.name for name in names]
    return next((name for name in names if name.is_file()), None)


def five_points(landmarks):
    """(…,68,2) → eye centres, nose tip, mouth corners (…,5,2), in FFHQ_TEMPLATE's order."""
    eyes = [landmarks[..., eye, :].mean(-2, keepdim=True) for eye in (LEFT_EYE, RIGHT_EYE)]
    return torch.cat([*eyes, landmarks[..., [30, 48, 54], :]], -2)


def similarity(source, target):
    """Least-squares rotation, scale and shift with target ≈ M · (x, y, 1) for points (N,2) → M (2,3)."""
    (sx, sy), (tx, ty) = (source - source.mean(0)).double().T, (target - target.mean(0)).double().T
    norm = (sx**2 + sy**2).sum()
    a, b = (sx * tx + sy * ty).sum() / norm, (sx * ty - sy * tx).sum() / norm
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
    """Draw image (C,H,W) on a height×width canvas, pixel p at M·p (pixel centres at integers); bilinear."""
    inverse = invert_matrix(matrix)
    shrink = max(int(torch.linalg.det(inverse[:, :2]).abs().sqrt().item()), 1)
    if shrink > 1:                       # bilinear sampling would skip pixels: average blocks of them first
        image = F.avg_pool2d(image[None], shrink, ceil_mode=True)[0]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    points = transform_points(torch.stack([x, y], -1).float(), inverse)
    points = (points - (shrink - 1) / 2) / shrink
    extent = torch.tensor([image.shape[2], image.shape[1]])
    grid = ((points + 0.5) / extent * 2 - 1).to(image.device)
    return F.grid_sample(image[None], grid[None], padding_mode=padding, align_corners=False)[0]


def face_matrix(landmarks, size):
    """M (2,3) that brings a face's landmarks (68,2) onto the FFHQ template in a size×size crop."""
    return similarity(five_points(landmarks), (FFHQ_TEMPLATE + 0.5) * size / 512 - 0.5)


def align_face(image, landmarks, size):
    """Cut the face (68,2) out of image (3,H,W) → crop (3,size,size), its landmarks (68,2), matrix (2,3)."""
    matrix = face_matrix(landmarks, size)
    return warp_affine(image, matrix, size, size, "border"), transform_points(landmarks, matrix), matrix


def paste_face(photo, crop, matrix, feather=0.1):
    """Put crop back where `matrix` (photo → crop) took it from; borders fade over `feather` of its width."""
    size = crop.shape[-1]
    ramp = ((torch.arange(size).minimum(torch.arange(size).flip(0)) + 0.5) / (feather * size)).clamp(max=1)
    ramp = ramp * ramp * (3 - 2 * ramp)
    layer = torch.cat([crop, (ramp[:, None] * ramp).to(crop)[None]])
    inverse = invert_matrix(matrix)
    alpha = warp_affine(layer[3:], inverse, *photo.shape[-2:])
    return photo + alpha * (warp_affine(layer[:3], inverse, *photo.shape[-2:], "border") - photo)


def component_boxes(landmarks, size):
    """Squares around left eye, right eye, nose, mouth: (B,68,2) → (B,4,4) x1,y1,x2,y2 in a size×size image.

    A box covers the pixels from x1 up to, not including, x2: its numbers are edges, pixel i spans i to i+1.
    For each component m = mean of its landmarks, h = half of their larger extent, at least size/32; box =
    (m−h+1, m+h). Clamped to the image, but never less than size/32 wide, even for a face off the edge.
    """
    boxes, least = [], size / 32
    for points in COMPONENTS.values():
        part = landmarks[:, points]
        half = ((part.amax(1) - part.amin(1)).amax(1, keepdim=True) / 2).clamp(min=least)
        low = (part.mean(1) - half + 1).clamp(0, size - least)
        high = torch.maximum((part.mean(1) + half).clamp(max=size), low + least)
        boxes.append(torch.cat([low, high], 1))
    return torch.stack(boxes, 1)


def mirror(images, landmarks):
    """Flip faces left to right: images (N,3,H,W), landmarks (N,68,2) → the same, the points in the order of
    the 68-point scheme again (what was the left eye is now the right one)."""
    flipped = landmarks[:, MIRRORED].clone()
    flipped[..., 0] = images.shape[-1] - 1 - flipped[..., 0]
    return images.flip(3), flipped


def augment(images, landmarks, generator, crop=0.05, jitter=0.0):
    """Random crop, flip, brightness and contrast of one person's pictures (N,3,H,W), landmarks (N,68,2).

    All are flipped or none; the rest is drawn for each: scale and place change by up to `crop` of the size,
    brightness and contrast by up to `jitter` (of a range of -1 to 1).
    """
    count, size = len(images), images.shape[-1]
    scale = 1 + crop * torch.rand(count, generator=generator)                 # a part of the picture is left
    corner = (scale - 1)[:, None] * size * torch.rand(count, 2, generator=generator)
    light, contrast = jitter * (2 * torch.rand(2, count, 1, 1, 1, generator=generator) - 1)
    flip = torch.rand((), generator=generator) < 0.5
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / scale
    matrix[:, :, 2] = (2 * corner / size + 1) / scale[:, None] - 1
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    landmarks = (landmarks + 0.5) * scale[:, None, None] - corner[:, None] - 0.5
    middle = images.mean((1, 2, 3), keepdim=True)
    images = ((images - middle) * (1 + contrast) + middle + light).clamp(-1, 1)
    return mirror(images, landmarks) if flip else (images, landmarks)


def landmark_mask(landmarks, size, radius=3.0):
    """Discs of `radius` pixels around landmarks 17-67 (not the jaw): (B,68,2) → (B,1,size,size), 0 or 1."""
    near = _squared_distances(landmarks[:, 17:], size).amin(1, keepdim=True) <= radius**2
    return near.float()


def landmark_heatmaps(landmarks, size, sigma=2.0):
    """A Gaussian of height 1 and `sigma` pixels at every landmark: (B,68,2) → (B,68,size,size)."""
    return torch.exp(-_squared_distances(landmarks, size) / (2 * sigma**2))


def _squared_distances(landmarks, size):
    pixels = torch.arange(size, device=landmarks.device)
    x, y = ((pixels - landmarks[..., axis, None]) ** 2 for axis in (0, 1))
    return x[:, :, None, :] + y[:, :, :, None]


def draw_landmarks(image, landmarks):
    """A copy of image (3,H,W) with the landmarks (68,2) and the four component boxes drawn on it."""
    picture = Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())
    draw, dot = ImageDraw.Draw(picture), max(picture.width / 256, 0.6)
    for x1, y1, x2, y2 in component_boxes(landmarks[None], picture.width)[0].tolist():
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline="yellow", width=max(round(dot), 1))
    for x, y in landmarks.tolist():
        draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill="lime")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


@functools.lru_cache
def _landmark_detector(device):
    import face_alignment
    kinds = face_alignment.LandmarksType
    kind = kinds.TWO_D if hasattr(kinds, "TWO_D") else kinds._2D    # renamed between face-alignment releases
    return face_alignment.FaceAlignment(kind, device=device, flip_input=False)


def detect_landmarks(image, device="cpu", name="this picture", aligned=False):
    """Landmarks of all faces in image (3,H,W) → (N,68,2), with the papers' detector if it is installed.
    `aligned` crops are asked for where being one is not enough."""
    try:
        detector = _landmark_detector(str(device))
    except ImportError:
        crop = "" if aligned else "or pass an aligned crop with --aligned, "
        raise InputError(f"{name}: its landmarks are unknown; give a file {name}.txt of 68 lines `x y`, "
                         f"{crop}or `pip install face-alignment`") from None
    found = detector.get_landmarks_from_image(to_uint8(image).permute(1, 2, 0).cpu().numpy())
    if found is None or len(found) == 0:
        raise InputError(f"{name}: no face found; give its landmarks in {name}.txt, "
                         "or an aligned crop with --aligned")
    return torch.from_numpy(np.stack(found)[..., :2]).float()


# -----------------------------------------------------------------------------------------------------------
# 4. Faces
# -----------------------------------------------------------------------------------------------------------
# Skull, face, ears, neck and shoulders are one surface: a grid over height and azimuth; the hair is another.
# A length of 1 is 100 pixels of a 512 x 512 picture; x to the right, y down, z towards the camera, the eyes
# at (+-0.63, 0). Features are placed by the canonical coordinates X (sideways) and T (down the profile) of a
# grid point; identity and expression only move the points.

FORMAT = 1                   # of the cached pictures: raise it whenever they change
ROWS, COLUMNS = 240, 216     # of the grid
LOW, HIGH = -3.05, 4.3       # T of the crown and of the lowest row

PROFILE = dict(     # the mean head: half width, front and back of a row, and how much higher its sides lie
    T=[-3.05, -.80, -.30, 0.00, 0.50, 1.00, 1.31, 1.65, 1.95, 2.15, 2.35, 2.70, 3.20, 3.60, 4.00, 4.30],
    y=[-3.05, -.80, -.30, 0.00, 0.50, 1.00, 1.31, 1.65, 1.95, 2.14, 2.26, 2.40, 2.75, 2.93, 3.15, 4.10],
    half=[1.42, 1.42, 1.42, 1.40, 1.37, 1.32, 1.29, 1.25, 1.19, 1.11, 1.02, 0.93, 0.92, 1.60, 2.80, 3.20],
    front=[1.60, 1.62, 1.72, 1.68, 1.66, 1.70, 1.72, 1.68, 1.64, 1.48, 1.15, 0.62, 0.50, 0.60, 0.75, 1.00],
    back=[-2.0, -2.0, -2.0, -2.0, -1.8, -1.6, -1.4, -1.3, -1.2, -1.15, -1.1, -1.05, -1.15, -1.2, -1.3, -1.3],
    lift=[0.00, 0.00, 0.00, 0.00, 0.00, 0.08, 0.20, 0.42, 0.68, 0.82, 0.82, 0.45, 0.10, 0.00, 0.00, 0.00])

# Gaussian bumps of the surface: place (+-cx, cy), widths (sx, sy), mean shift (dx outwards, dy, dz), spread
# over people. Nose: ridge, hump, tip, wings, nostrils, base, length; philtrum, lips, corners and size of the
# mouth, chin; sockets, eyeballs, eyes, brows; cheeks, folds, jaw, width, temples, forehead, lengths.
BUMPS = np.array([
    [.00, .33, .15, .34, 0, 0, .20, .15, 0, .07], [.00, .25, .10, .16, 0, 0, .04, 0, 0, .05],
    [.00, .70, .15, .13, 0, .05, .34, .25, .06, .09], [.21, .82, .08, .10, .03, .02, .17, .06, .02, .03],
    [.11, .93, .06, .04, 0, -.02, -.04, 0, 0, 0], [.00, .90, .05, .06, 0, .02, .12, 0, .02, .03],
    [.00, .60, .60, .50, 0, 0, 0, 0, .09, .05], [.00, 1.10, .04, .09, 0, 0, -.03, 0, 0, .01],
    [.00, 1.21, .26, .06, 0, 0, .08, 0, .03, .03], [.09, 1.17, .06, .04, 0, -.02, .02, 0, .02, .01],
    [.00, 1.43, .24, .07, 0, 0, .12, 0, .03, .04], [.00, 1.63, .30, .07, 0, 0, -.07, 0, 0, .03],
    [.58, 1.32, .09, .09, 0, 0, -.05, 0, .04, 0], [.00, 1.31, .45, .20, 0, 0, 0, .20, .06, .05],
    [.00, 1.92, .26, .16, 0, 0, .12, .20, .05, .08], [.00, 2.10, .40, .20, 0, .02, 0, .25, .10, .05],
    [.60, .02, .27, .17, 0, 0, -.18, 0, 0, .04], [.28, .05, .10, .14, 0, 0, -.12, 0, 0, .03],
    [.63, .00, .20, .12, 0, 0, .11, 0, 0, .02], [.63, .00, .32, .26, 0, 0, 0, .07, .05, 0],
    [.58, -.30, .36, .10, 0, 0, .05, 0, .05, .05], [.95, .52, .30, .22, .03, 0, .06, .07, .05, .06],
    [.95, 1.15, .35, .38, .02, 0, .02, .09, 0, .08], [.45, 1.02, .07, .22, 0, 0, -.02, 0, 0, .02],
    [1.30, 1.65, .60, .65, .03, 0, 0, .12, .05, 0], [1.35, .30, .60, .70, 0, 0, 0, .09, 0, 0],
    [1.30, -.60, .35, .40, -.04, 0, -.02, .07, 0, 0], [.00, -1.0, .70, .40, 0, 0, .05, .05, 0, .08],
    [.00, 2.40, 9.0, .60, 0, 0, 0, 0, .13, 0], [.00, -2.6, 9.0, 1.0, 0, 0, 0, 0, .14, 0]])

HEM_AT = [0, .3, .6, .9, 1.1, 1.3, 1.42, 1.55, 1.9, 2.1, 2.4, np.pi]     # |theta|
STYLES = dict(      # how far the hair stands off, and at which T it ends
    short=(.17, [-1.38, -1.40, -1.42, -1.15, -.75, -.05, 0.05, -.35, -.35, 0.55, 1.2, 1.3]),
    fringe=(.17, [-.60, -.57, -.55, -.45, -.20, 0.30, 0.50, 0.10, 0.00, 0.80, 1.5, 1.6]),
    side=(.26, [-1.2, -1.15, -1.1, -.95, -.60, 0.05, 0.20, -.25, -.35, 0.60, 1.3, 1.4]),
    curly=(.45, [-1.30, -1.30, -1.25, -1.1, -.65, 0.20, 0.40, 0.30, 0.30, 0.80, 1.4, 1.5]),
    back=(.15, [-1.55, -1.52, -1.45, -1.2, -.80, -.10, -.05, -.40, -.40, 0.55, 1.4, 1.6]),
    buzz=(.03, [-1.40, -1.42, -1.45, -1.15, -.80, -.15, -.10, -.40, -.40, 0.45, 1.1, 1.2]),
    receding=(.12, [-1.8, -1.95, -2.1, -1.7, -.90, -.15, 0.00, -.40, -.40, 0.50, 1.2, 1.3]),
    bald=(.0, [-1.40] * 12),
    long=(.22, [-1.65, -1.40, -1.15, -.20, 1.50, 3.20, 3.30, 3.30, 3.30, 3.30, 3.3, 3.3]),
    bob=(.22, [-.60, -.58, -.55, -.30, 1.20, 1.70, 1.75, 1.80, 1.80, 1.80, 1.8, 1.8]),
    wavy=(.34, [-1.55, -1.35, -1.15, -.30, 0.90, 2.30, 2.60, 2.60, 2.60, 2.60, 2.6, 2.6]))
HAIR = np.array([[.012, .009, .008], [.03, .018, .011], [.075, .04, .02], [.16, .085, .038],
                 [.40, .26, .12], [.20, .065, .022], [.28, .27, .26], [.55, .53, .50]])      # linear light
IRIS = np.array([[.04, .02, .01], [.1, .04, .02], [.16, .12, .04], [.1, .16, .09], [.1, .2, .33],
                 [.2, .25, .3]])
SKIN = np.array([[.74, .50, .40], [.60, .37, .26], [.36, .195, .115], [.115, .058, .038]])


class Face(NamedTuple):
    image: torch.Tensor        # (3,H,W) float32 in [-1,1]
    landmarks: torch.Tensor    # (68,2) float32, x,y in pixels; (0,0) is the centre of the top-left pixel
    identity: int


def smooth(a, b, x):
    """0 on a's side, 1 on b's, a cubic between."""
    s = ((x - a) / (b - a)).clamp(0, 1)
    return s * s * (3 - 2 * s)


def bell(x, width):
    return torch.exp(-0.5 * (x / width) ** 2)


def unit(v):
    """v (3,...) scaled to length 1."""
    return v * (v[0] * v[0] + v[1] * v[1] + v[2] * v[2]).clamp(min=1e-12).rsqrt()


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def column(*values):
    return tensor(*values)[:, None]


def normal(rng, spread=1.0):
    return spread * float(np.clip(rng.standard_normal(), -2.2, 2.2))


def noise(rng, rows, columns, height, width):
    """(height,width) smooth noise of about unit variance, the same at every resolution."""
    knots = torch.from_numpy(rng.standard_normal((1, 1, rows, columns), dtype=np.float32))
    dense = rows > height or columns > width
    return F.interpolate(knots, size=(height, width), mode="bilinear", antialias=dense)[0, 0]


def look(maps, uv):
    """Bilinear samples (C,...) of maps (C,h,w) at uv (2,...), both in [-1,1]."""
    grid = uv.flatten(1).T[None, None]
    return F.grid_sample(maps[None], grid, align_corners=True, padding_mode="border").view(-1, *uv.shape[1:])


def at(maps, X, T):
    """Samples (C,...) of maps over the head's grid at canonical points X, T (...)."""
    u = np.interp(X, head().X[0], np.linspace(-1, 1, COLUMNS))
    v = np.interp(T, head().T[:, 0], np.linspace(-1, 1, ROWS))
    return look(maps, torch.from_numpy(np.stack([u, v])).float())


def sideways(theta):
    """X of an azimuth: as seen from the front up to the silhouette, along the surface behind it."""
    side = abs(theta)
    return np.sign(theta) * np.where(side < np.pi / 2, 1.45 * np.sin(side), 1.45 * (1 + side - np.pi / 2))


def outward(points):
    """Unit normals (3,h,w) of a grid of points (3,h,w)."""
    down, right = torch.gradient(points, dim=(1, 2))
    return unit(torch.linalg.cross(right, down, dim=0))


@functools.lru_cache(maxsize=1)
def head():
    """What all heads share: canonical coordinates of the grid, the mean surface, the fields of the bumps."""
    def axis(low, high, n, density):      # n positions, closer together where the density is higher
        x = np.linspace(low, high, 4000)
        total = np.cumsum(density(x))
        return np.interp(np.linspace(total[0], total[-1], n), total, x)

    T = axis(LOW, HIGH, ROWS, lambda t: 1 + 1.2 * (abs(t - .75) < 1.5) + np.exp(-((t - .85) / .15) ** 2)
             + 24 * np.exp(-((t - 1.31) / .025) ** 2) + 3 * (t > 3.5))
    theta = axis(-np.pi, np.pi, COLUMNS,
                 lambda a: 1 + 2 * np.exp(-(a / .8) ** 2) + 3 * np.exp(-((abs(a) - 1.7) / .22) ** 2))
    fine, kernel, row = np.linspace(LOW, HIGH, 800), np.exp(-0.5 * (np.arange(-30, 31) / 9.0) ** 2), {}
    for name, values in PROFILE.items():      # the table, smoothed
        wide = np.pad(np.interp(fine, PROFILE["T"], values), 30, mode="reflect", reflect_type="odd")
        row[name] = np.interp(T, fine, np.convolve(wide, kernel / kernel.sum(), "valid"))[:, None]
    angle = ((-.8 - T) / 2.25).clip(0, 1)[:, None] * np.pi / 2      # the dome of the skull
    dome, cos, sin = np.cos(angle).clip(1e-4) ** .86, np.cos(theta), np.sin(theta)
    y = np.where(angle > 0, -.8 - 1.42 * np.sin(angle), row["y"] - row["lift"] * sin ** 2)
    z = -.1 + dome * np.where(cos > 0, (row["front"] + .1) * cos, (-.1 - row["back"]) * cos)
    mean = torch.from_numpy(np.stack([row["half"] * dome * sin, y, z])).float()
    X, T, theta = (torch.from_numpy(v).float() for v in (sideways(theta)[None], T[:, None], theta[None]))
    even, odd = [], []      # fields of the displacements dy, dz and dx
    for cx, cy, sx, sy in BUMPS[:, :4]:
        right, left = bell(X - cx, sx) * bell(T - cy, sy), bell(X + cx, sx) * bell(T - cy, sy)
        even.append(right if cx == 0 else right + left)
        odd.append(right * X * (sx < 5) if cx == 0 else right - left)
    flap = torch.exp(-((X.abs() - 1.68) / .17) ** 4 - ((T - .33) / .5) ** 4)
    ear = X.sign() * flap, X.sign() * bell(X.abs() - 1.62, .07) * bell(T - .36, .2)
    fields = torch.stack(odd), torch.stack(even), torch.stack(even)
    return SimpleNamespace(theta=theta, X=X, T=T, mean=mean, ear=ear, fields=fields)


@functools.lru_cache(maxsize=2)
def person(size, seed, identity):
    """All that an identity keeps: surface, skin texture, eyes, hair, glasses."""
    g, rng = head(), np.random.default_rng([seed, identity])
    who = SimpleNamespace(age=rng.random() ** 1.3, male=rng.random() < .55, dark=rng.random())
    likely = np.array([6, 2, 4, 2, 3, 2, 1 + 3 * who.age, 1.5 * who.age, .3, .1, .3] if who.male
                      else [1, 2, 2, 1.5, 1.5, .2, 0, 0, 5, 3, 4])
    who.style = rng.choice(list(STYLES), p=likely / likely.sum())
    likely = np.array([4, 4, 3, 2, 2.2, 1, 0, 0] if who.dark < .45 else [8, 3, .5, .1, 0, 0, 0, 0])
    likely[6:] += 15 * max(who.age - .70, 0)
    who.hair = column(*HAIR[rng.choice(8, p=likely / likely.sum())]) * np.exp(normal(rng, .2))
    skin = [np.interp(who.dark, [0, .4, .7, 1], np.log(channel)) + normal(rng, .05) for channel in SKIN.T]
    who.skin = column(*skin).exp()
    who.eye = SimpleNamespace(
        width=.30 + normal(rng, .018), up=.110 + normal(rng, .016), low=.080 + normal(rng, .012),
        tilt=normal(rng, .03) - .02, crease=.075 + normal(rng, .025), lash=1.1 - .4 * who.male,
        colour=column(*IRIS[rng.integers(2 if who.dark > .5 else 6)]) * np.exp(normal(rng, .15)),
        fibre=(1 + .35 * noise(rng, 6, 70, 32, 256) + .2 * noise(rng, 10, 20, 32, 256)).clamp(.3, 2)[None])
    who.teeth = column(.80, .74, .62) * rng.uniform(.75, 1)
    who.frame = rng.uniform([.34, .22, 2, .012, .01], [.42, .32, 5, .028, .07])      # of glasses
    who.glasses = rng.random() < .15

    move = BUMPS[:, 4:7] + .8 * np.clip(rng.standard_normal((len(BUMPS), 3)), -1.8, 1.8) * BUMPS[:, 7:10]
    move = torch.from_numpy(move).float()
    scalp = g.mean + torch.stack([torch.tensordot(move[:, k], g.fields[k], 1) for k in range(3)])
    scalp[0] *= 1 + normal(rng, .045)
    hidden = who.style in ("long", "bob", "wavy")      # the ears, by hair
    who.surface = scalp.clone()
    who.surface[0] += (.1 if hidden else 1) * (rng.uniform(.22, .45) * g.ear[0] - .16 * g.ear[1])
    who.surface[1:] += column(normal(rng, .08), -.15)[..., None] * g.ear[0].abs()
    who.curtain, who.strands, hem = grow_hair(rng, who, scalp, size)
    who.texture = paint_skin(rng, who, size, hem)
    return who


def grow_hair(rng, who, scalp, size):
    """The hair, from crown to hem: points (3,h,w), strands (cover, tone, relief), X and T of the hem."""
    h, w, (thick, hem), curls = 112, 176, STYLES[who.style], who.style in ("curly", "wavy")
    theta, v = torch.linspace(-np.pi, np.pi, w), torch.linspace(0, 1, h)[:, None]
    X = sideways(theta.numpy())
    hem = torch.from_numpy(np.interp(theta.abs(), HEM_AT, hem)).float() + normal(rng, .08)
    parted = rng.uniform(-.5, .5) * (who.style in ("side", "fringe", "long"))
    hem = hem + parted * bell(theta, .6) * torch.sin(2 * theta)
    hem = F.avg_pool1d(F.pad(hem[None, None], (2, 2), mode="circular"), 5, 1)[0, 0]
    T = LOW + .01 + v * (hem - LOW - .01)
    # It lies on the skull down to the ears, and hangs from there on.
    points, hang = at(scalp, *np.broadcast_arrays(X, T.clamp(max=.15))), (T - .15).clamp(min=0)
    clump = noise(rng, 10, 26, h, w) + curls * noise(rng, 30, 70, h, w) * .7
    taper = .4 if who.style in ("fringe", "bob") else smooth(.9, .1, hem) * .6 + .4
    thick = thick * rng.uniform(.7, 1.3) * (1 - smooth(.65, .98, v) * taper)
    thick = thick * (.55 + .45 * torch.cos(theta / 2) ** 2) * (1 + .16 * clump * smooth(.02, .25, v))
    out = unit(torch.stack([theta.sin() + 0 * T, -1.2 * smooth(-.4, -2.2, T), theta.cos() + 0 * T]))
    points = points + out * (thick + .015)
    points[0] *= 1 - .04 * smooth(0, 1.6, hang) * (1 + .8 * clump)
    points[1] += hang
    h, w = 2 * size, 3 * size
    relief = noise(rng, 14, 300, h, w) + .6 * noise(rng, 8, 110, h, w)
    if curls:
        relief = .4 * relief + .7 * noise(rng, 90, 200, h, w) + .5 * noise(rng, 45, 90, h, w)
    v = torch.linspace(0, 1, h)[:, None]
    cover = smooth(1, .92, v + .035 * relief.clamp(-1.5, 1.5) * smooth(.5, 1, v))
    tone = (1 + .28 * relief.clamp(-2, 2) + .12 * noise(rng, 5, 40, h, w)).clamp(min=.3)
    return points, torch.stack([cover, tone, relief]), (X, hem)


def paint_skin(rng, who, size, hem):
    """Texture (6,h,w) over the grid: colour (3), slopes of the relief along X and T, gloss."""
    h, w, dark, age = int(3.2 * size), 3 * size, who.dark, who.age
    T = F.interpolate(head().T[None, None], size=(h, 1), mode="bilinear", align_corners=True)[0, 0]
    X = F.interpolate(head().X[None, None], size=(1, w), mode="bilinear", align_corners=True)[0, 0]
    A = X.abs()
    colour, hair = who.skin[..., None].expand(3, h, w), who.hair[..., None]

    def spot(cx, cy, sx, sy):
        return bell(A - cx, sx) * bell(T - cy, sy)

    def paint(new, cover):
        nonlocal colour
        colour = torch.lerp(colour, new.expand(3, h, w), cover.expand(3, h, w))

    pore, blotch, broad = noise(rng, 340, 300, h, w), noise(rng, 40, 36, h, w), noise(rng, 12, 10, h, w)
    flush = rng.uniform(.10, .24) * (.5 * spot(.85, .75, .3, .25) + .6 * spot(0, .72, .16, .14)
                                     + .5 * spot(1.65, .3, .2, .4) + .3 * spot(0, 1.9, .3, .2) + .15 * broad)
    hollow = (.4 * spot(.27, .03, .07, .09) + .18 * spot(.62, -.17, .22, .05) + .5 * spot(.24, .95, .12, .03)
              + .25 * spot(0, 1.56, .22, .05) + .3 * spot(.6, 1.31, .05, .05) + .22 * spot(.32, .8, .04, .12)
              + (.1 + .25 * age) * spot(.55, .26, .22, .07) + .6 * spot(1.62, .4, .05, .15)
              + .35 * smooth(2, 2.6, T))
    colour = (colour * (1 - hollow.clamp(max=.9)) * (1 + .08 * pore + .06 * blotch + .05 * broad)
              * torch.stack([1 + .4 * flush, 1 - flush, 1 - .9 * flush]))
    relief = (.0012 * pore + .003 * blotch) * bell(A, 1.2)
    if dark < .5 and rng.random() < .35:      # freckles
        where = (spot(.6, .5, .5, .4) + spot(0, .3, .3, .4)).clamp(max=1)
        where = where * smooth(1.2, 2.2, noise(rng, 210, 190, h, w))
        paint(colour * column(.75, .62, .55)[..., None], where)
    for _ in range(rng.integers(2, 9)):       # moles
        x, t, r = rng.uniform(-1.3, 1.3), rng.uniform(-1.2, 2.1), rng.uniform(.012, .038)
        paint(.35 * colour, smooth(1.3, .7, ((X - x) ** 2 + (T - t) ** 2).sqrt() / r) * rng.uniform(.5, 1))
    warp = .03 * broad + .02 * blotch         # wrinkles: forehead, beside the mouth, under the eyes
    wrinkles = (.5 * age * smooth(.75, 1, torch.cos((T + warp + .05 * A * A) * 37)) * spot(0, -.85, .55, .22)
                + (.2 + .4 * age) * bell(A - .33 - .6 * (T - .85).clamp(0, .65) - .3 * warp, .022)
                * smooth(.75, .9, T) * smooth(1.5, 1.2, T)
                + (.1 + .3 * age) * bell(T - .22 - .25 * (A - .6) ** 2 + .3 * warp, .015) * bell(A - .6, .2))
    paint(.55 * colour, wrinkles)
    full, bow = 1 + normal(rng, .25), (1 - (A / .56) ** 2).clamp(min=0)
    edge = 1.31 - .15 * full * bow ** .7 - .03 * bell(A - .1, .06) + .02 * bell(A, .05)
    lips = smooth(-.02, .02, T - edge) * smooth(.58, .52, A)
    lips = lips * smooth(.03, -.02, T - 1.31 - .19 * full * bow ** .6)
    made_up, creases = not who.male and rng.random() < .5, noise(rng, 6, 420, h, w)
    tint = rng.uniform(*([[.6, .12, .18], [1, .4, .42]] if made_up else [[.8, .48, .5], [1, .7, .7]]))
    tint = who.skin * (1 - .35 * dark) * column(*tint)
    paint(tint[..., None] * (1 + .06 * creases) * (1 - hollow), lips)
    relief = (relief - .010 * wrinkles) * (1 - lips) + .002 * lips * creases
    gloss = .35 * (1 + lips) + .25 * spot(0, .6, .15, .3) + .2 * spot(0, -.9, .6, .3)
    # Brows: p along, q across, strands that lean outwards.
    p = (A - .28 - normal(rng, .03)) / .72
    arch = (.07 + normal(rng, .035)) * (1 - (p / .62 - 1) ** 2)
    q = (T + .34 + arch - normal(rng, .03) - normal(rng, .04) * p) / (
        (.06 + .012 * who.male + normal(rng, .017)) * (1.15 - .75 * p).clamp(min=.15))
    comb = torch.cos(2 * np.pi * (22 * p - 1.3 * (1 - p) * q + .35 * blotch + .12 * pore))
    brow = smooth(-.05, .10, p + .03 * comb) * smooth(1.05, .75, p) * smooth(1.4, .3, q.abs() + .25 * comb)
    whisker, stubble = hair.clamp(max=.25) * column(1, .86, .74)[..., None], noise(rng, 420, 360, h, w)
    paint(.7 * whisker, (brow * (.8 + .25 * comb) * rng.uniform(.6, 1)).clamp(0, .95))
    grown = rng.random() * who.male           # beard: from a shadow to a full one, or a moustache
    if grown > .3:
        moustache, shadow = spot(.22, 1.1, .22, .055), grown < .6
        where = (smooth(-.08, .10, T - 1.42 + .95 * smooth(.7, 1.45, A) + .07 * blotch) * smooth(2.7, 2.2, T)
                 * smooth(1.64, 1.52, A) * smooth(.25, .45, A + 3 * (T - 1.42).clamp(min=0)))
        goatee = 1.2 * moustache + (grown > .94) * spot(0, 1.85, .35, .3)
        where = (torch.maximum(where, moustache) if grown < .88 else goatee).clamp(0, 1) * (1 - lips)
        cover = where * (.22 + .15 * stubble if shadow else .72 + .35 * stubble)
        paint(whisker * (1 + .3 * stubble), cover.clamp(0, .97))
        relief, gloss = relief + .0015 * (1 + (not shadow)) * where * stubble, gloss * (1 - .7 * where)
    # The scalp is tinted below the hair, so that the hair line is soft; nostrils; clothes.
    line = torch.from_numpy(np.interp(X[0], *hem)).float().clamp(max=1.2)
    under = smooth(.10, -.12, T - line + .05 * stubble) * (.1 if who.style == "bald" else .85)
    paint(.8 * hair, under)
    paint(.1 * colour, smooth(1.2, .6, (((A - .115) / .065) ** 2 + ((T - .93) / .03) ** 2).sqrt()))
    cloth = smooth(-.02, .02, T - rng.uniform(-.1, .6) * bell(A, .35) - rng.uniform(2.75, 3.2))
    dye = column(*np.exp(rng.uniform(-3.5, -.5) + rng.uniform(-.4, .4, 3)))[..., None]
    paint(dye * (1 + .15 * pore + .1 * noise(rng, 20, 90, h, w)), cloth)
    slopes = []
    for axis, k in (1, X), (0, T):      # where rows crowd, the relief is no steeper than elsewhere
        rise, step = torch.gradient(relief, dim=axis)[0], torch.gradient(k, dim=axis)[0]
        slopes.append((rise / step.clamp(min=float(step.median()))).clamp(-2, 2))
    return torch.stack([*colour.clamp(.004, .95), *slopes, gloss * (1 - .8 * under) * (1 - cloth)])


def rotation(yaw, pitch, roll):
    (cy, cp, cr), (sy, sp, sr) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    turn = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]]) @ [[1, 0, 0], [0, cp, -sp], [0, sp, cp]]
    return torch.from_numpy(turn @ [[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]).float()


def rasterise(grid, side):
    """Draw a grid of projected points (3,h,w), x and y in pixels and z, into a side x side picture.

    It is refined until samples are closer than pixels, each is dropped into its pixel, and the nearest kept.
    Returns mask (side,side), where it is seen, and the grid position (2,N) in [-1,1] of their centres.
    """
    factor, empty = max(2, round(side / 86)), 1 << 62
    steps = [k / factor for k in range(factor)]
    dense = torch.stack([torch.lerp(grid[..., :-1], grid[..., 1:], f) for f in steps], -1).flatten(-2)
    dense = torch.stack([torch.lerp(dense[:, :-1], dense[:, 1:], f) for f in steps], 2).flatten(1, 2)
    (h, w), (x, y, z) = dense.shape[1:], dense.flatten(1)
    # A frame of one pixel around the picture collects what lies outside.
    cell = (y.round().clamp(-1, side) * (side + 2) + x.round().clamp(-1, side) + (side + 3)).long()
    # One integer a sample: the depth in its high word decides, the low word says which sample it was.
    key = torch.stack([torch.arange(h * w, dtype=torch.int32), ((20 - z) * 2e4).int()], 1).view(torch.int64)
    best = torch.full(((side + 2) ** 2,), empty).scatter_reduce_(0, cell, key[:, 0], "amin")
    best = best.view(side + 2, side + 2)
    up, down, left, right = best[:-2, 1:-1], best[2:, 1:-1], best[1:-1, :-2], best[1:-1, 2:]
    # Pixels missed where the surface is stretched take the nearest of their neighbours.
    crowded = torch.minimum(torch.maximum(up, down), torch.maximum(left, right)) < empty
    near = torch.minimum(torch.minimum(up, down), torch.minimum(left, right))
    best = best[1:-1, 1:-1]
    best = torch.where((best == empty) & crowded, near, best)
    mask = best < empty
    index = best[mask] & 0xffffffff
    i, j = index // w, index % w
    corner = i.clamp(max=h - 2) * w + j.clamp(max=w - 2)
    origin, right, below, here = (torch.stack([x.index_select(0, k), y.index_select(0, k)])
                                  for k in (corner, corner + 1, corner + w, index))
    a, b, d = right - origin, below - origin, mask.nonzero().T.flip(0) - here
    area = a[0] * b[1] - a[1] * b[0]
    area = torch.where(area.abs() < .02, 1e9, area)
    j = j + ((d[0] * b[1] - d[1] * b[0]) / area).clamp(-1, 1)
    i = i + ((a[0] * d[1] - a[1] * d[0]) / area).clamp(-1, 1)
    return mask, torch.stack([j * (2 / w) - 1, i * (2 / h) - 1])


def background(rng, size):
    """A place out of focus: (3,size,size), linear light."""
    m, kind, angle = 96, rng.integers(6), rng.uniform(0, 2 * np.pi)
    y, x = torch.linspace(0, 1, m)[:, None], torch.linspace(0, 1, m)[None]

    def paint():      # mostly greys, browns and blues
        warm = rng.normal(0, .28)
        colour = np.exp(rng.normal(-1.5, .9)) * column(warm, rng.normal(0, .06), -warm).exp()
        return colour[..., None].clamp(.004, .9)

    image = paint() * (1 + .7 * ((x - .5) * np.cos(angle) + (y - .5) * np.sin(angle)))
    image = image * (1 + .1 * noise(rng, 4, 4, m, m) + .03 * noise(rng, 32, 32, m, m))
    if kind == 1:      # foliage
        leaf = .5 * noise(rng, 4, 4, m, m) + .6 * noise(rng, 10, 10, m, m) + .4 * noise(rng, 28, 28, m, m)
        green = np.exp(rng.normal(-.3, .5)) * column(rng.uniform(.05, .16), .12, .04)[..., None]
        image = green * torch.exp(.7 * leaf) + .5 * smooth(.9, 2, leaf) * column(.5, .55, .4)[..., None]
    for _ in range(rng.integers(6, 18) if kind > 1 else 0):      # a room or a street: boxes; lights: discs
        cx, cy, w, h = rng.uniform([0, 0, .02, .05], [1, 1, .25, .7])
        colour, blur = paint(), .015 + .015 * kind
        if kind == 5:
            disc = smooth(blur / 4, -blur / 4, ((x - cx) ** 2 + (y - cy) ** 2).sqrt() - .25 * w)
            image = image + .9 * colour * disc
        else:
            box = smooth(w + blur, w - blur, (x - cx).abs()) * smooth(h + blur, h - blur, (y - cy).abs())
            image = image + .9 * box * (colour * (1 + .4 * (y - cy)) - image)
    return F.interpolate(image[None], size=(size, size), mode="bilinear")[0].clamp(.002, .9)


def lids(eye, opening, e):
    """T of the upper and of the lower lid at e, from the inner (-1) to the outer (1) corner of the eye."""
    bow, middle = (1 - e.abs() ** 2.2).clamp(min=0), eye.tilt * e + .015
    low = eye.low * bow ** .8
    return middle + .95 * max(0.0, 1 - opening) * low - opening * eye.up * bow * (1 - .12 * e), middle + low


def landmark_points(eye, opening):
    """Canonical X and T (2,68) of the landmarks, in iBUG's order."""
    theta = np.linspace(-1.52, 1.52, 17)
    jaw = np.interp(abs(theta), [0, .3, .6, .9, 1.2, 1.52], [2.17, 2.15, 2.08, 1.85, 1.25, .1])
    brow = np.array([[.32, -.36], [.50, -.42], [.68, -.45], [.86, -.43], [1.02, -.36]])
    nose = [[0, -.02], [0, .23], [0, .48], [0, .72], [-.24, .88], [-.12, .94], [0, .97],
            [.12, .94], [.24, .88]]
    e = torch.tensor([-1, -.4, .35, 1, .35, -.4])
    upper, lower = lids(eye, opening, e)
    right = torch.stack([.63 + eye.width * e, torch.where(torch.arange(6) < 4, upper, lower)], 1).numpy()
    lips = [[-.57, 1.31], [-.35, 1.20], [-.12, 1.135], [0, 1.16], [.12, 1.135], [.35, 1.20], [.57, 1.31],
            [.36, 1.44], [.14, 1.50], [0, 1.51], [-.14, 1.50], [-.36, 1.44], [-.5, 1.31], [-.2, 1.297],
            [0, 1.297], [.2, 1.297], [.5, 1.31], [.2, 1.323], [0, 1.323], [-.2, 1.323]]
    mirror = [-1, 1]
    return np.concatenate([np.stack([sideways(theta), jaw], 1), (brow * mirror)[::-1], brow, nose,
                           (right * mirror)[[3, 2, 1, 0, 5, 4]], right, lips]).T


def shade(albedo, facing, gloss, seen, light, wrap):
    """Colours (3,N) of points with normals `facing` under key light, as far as `seen`, fill and sky."""
    key, fill, sky = light
    colour, sheen = sky * (.75 - .35 * facing[1]) * (.55 + .45 * seen), 0
    for (direction, tint), reach in ((key, seen), (fill, 1)):
        colour = colour + tint * (((direction @ facing + wrap) / (1 + wrap)).clamp(min=0) * reach)
        sharp = (unit(direction + tensor(0, 0, 1)) @ facing).clamp(min=0).square().square().square().square()
        sheen = sheen + tint * (.1 * reach * gloss * (sharp + sharp.square().square()))
    return albedo * colour + sheen


def eyeballs(who, still, turn, gaze, light, x, inner, seen, e, below, above):
    """Colours (3,N) where rays meet the ball behind an opening; below, above: distances from the lids."""
    ray, centres = -turn[2], at(still, [-.63, .63], [0, 0]) - column(0, -.01, .225)
    offset = inner - centres[:, (x > 0).long()]
    along = ray @ offset
    root = (along ** 2 - (offset * offset).sum(0) + .06).clamp(min=0).sqrt()
    ball = unit(offset - (along + root) * ray[:, None])
    aim = unit(tensor(np.sin(gaze[0]), np.sin(gaze[1]), .97))
    off = ball - aim[:, None] * (aim @ ball)
    radius = (off * off).sum(0).sqrt() / .46
    polar = torch.stack([torch.atan2(off[1], off[0]) / np.pi, (2 * radius - 1).clamp(-1, 1)])
    ring = .55 + .6 * smooth(.3, .8, radius) - .8 * smooth(.8, 1, radius)
    iris = (1.6 * who.eye.colour * look(who.eye.fibre, polar) * ring).clamp(min=.004)
    white = column(.52, .48, .46) * (1 - .25 * smooth(.5, 1.05, e.abs()))
    colour = torch.lerp(iris, white, smooth(.93, 1.07, radius)) * smooth(.36, .44, radius).clamp(min=.02)
    world, (direction, tint) = turn @ ball, light[0]
    colour = shade(colour, unit(world + column(0, 0, .3)), 0, seen, light, .3)
    glint = unit(direction + tensor(0, 0, 1)) @ unit(world + .25 * (turn @ aim)[:, None])
    wet = .3 * bell(above - .01, .010)
    glint = .9 * smooth(.989, .996, glint) * smooth(.02, .05, below)
    return torch.lerp(colour * (.3 + .7 * smooth(0, .10, below)), 1.3 * who.skin, wet) + glint * tint


def mouth_inside(who, jaw, smile, inner, light, seen):
    """Colours (3,N) of what the open lips show at points (3,N) of the head: teeth before a dark cavity."""
    x, y = inner[0].abs(), inner[1] - at(who.surface, [0], [1.31])[1]
    tooth, (_, tint), sky = x / .155, light[0], light[2]
    upper = smooth(.085, .065, y + .012 * torch.cos(2 * np.pi * tooth)) * smooth(.50, .40, x)
    lower = smooth(.88 * jaw, .88 * jaw + .02, y) * smooth(.42, .32, x) * (jaw > .08)
    cavity = column(.042, .013, .011) * (.3 + 1.2 * smooth(0, .4, y))
    shape = (1 - 3 * x ** 2).clamp(min=.1) * (1 - .5 * bell(tooth - tooth.round(), .06)) * (.35 + .65 * seen)
    gape = min(1.0, (jaw + .12 * max(smile, 0)) / .05)
    teeth = .85 * who.teeth * shape * (sky + .6 * tint)
    return torch.lerp(cavity, teeth, gape * torch.maximum(upper, .8 * lower))


def glasses(who, colour, inner, x, t, eyes, turn):
    """Draw them over colours (3,N): where the pixels' rays cross a plane before the eyes."""
    wide, high, power, rim, tint = who.frame
    cross = inner + (eyes[2] + .30 - inner[2]) / turn[2, 2] * turn[2][:, None]
    u, v = (cross[0].abs() - eyes[0]).abs() / wide, (cross[1] - eyes[1] - .06).abs() / high
    far = ((u ** power + v ** power) ** (1 / power) - 1) * high
    bridge = (cross[0].abs() < eyes[0] - wide) & ((cross[1] - eyes[1] + .04).abs() < rim * 1.2)
    arm = (x.abs() > 1.0) & (x.abs() < 1.7) & ((t + .1).abs() < .03)
    metal = torch.maximum(smooth(rim + .01, rim - .005, far.abs()), (bridge | arm).float())
    return torch.lerp(colour * (1 - .08 * (far < 0)), torch.full_like(colour, tint), metal)


def shadows(key, points, casters, pivot):
    """How far the key light reaches points (3,h,w), past casters (3,N), softly, by comparing depths."""
    n, across = 72, unit(torch.linalg.cross(tensor(0, 1, 0), key))
    frame = torch.stack([across, torch.linalg.cross(key, across), key])
    rays = frame @ (casters - pivot)
    cell = ((rays[:2] / 3.4 + 1) * (n / 2)).long().clamp(0, n - 1)
    front = torch.full((n * n,), -9.0).scatter_reduce_(0, cell[1] * n + cell[0], rays[2], "amax")
    front, rays = front.view(1, n, n), (frame @ (points.flatten(1) - pivot)).view_as(points)
    place = rays[:2] / 3.4 * (1 + 1 / n)
    taps = torch.tensor([[-1, -1], [1, -1], [-1, 1], [1, 1], [0, 0]])[..., None, None] * (1.4 / n)
    seen = .25 + .15 * sum(smooth(.32, .12, look(front, place + tap)[0] - rays[2]) for tap in taps)
    return F.avg_pool2d(F.pad(seen[None, None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]


def render_face(size, seed, identity, shot):
    """A picture of a person, uint8 (3,size,size), and its landmarks, float32 (68,2), in pixels. Pure."""
    g, who, side = head(), person(size, seed, identity), 2 * size      # supersampled twice
    rng = np.random.default_rng([seed, identity, shot, 1])
    n, u = functools.partial(normal, rng), rng.uniform

    # Expression: all below the lips turns with the jaw; the step between the lips opens the mouth.
    X, T, A = g.X, g.T, g.X.abs()
    jaw, smile = max(0.0, u(-.7, .42)) * u(.2, 1), float(np.clip(.25 + n(.4), -.35, 1.1))
    grin = max(smile, 0)
    opening = .05 if u() < .06 else float(np.clip(1 - .12 * grin + n(.10), .5, 1.2))
    between, step = (1 - (A / .55) ** 2).clamp(min=0) ** .5, smooth(1.298, 1.322, T)
    drop = between * step + (1 - between) * smooth(.7, 2, T) * smooth(1.7, 1.1, A)
    drop = drop * smooth(3.4, 2.4, T) * smooth(1.7, .9, A)
    corner, cheek = bell(A - .56, .22) * bell(T - 1.31, .22), bell(A - .8, .25) * bell(T - .75, .25)
    lift = between * ((1 - step) * smooth(.85, 1.25, T) * (.09 * grin + .08 * jaw)
                      - step * smooth(1.7, 1.3, T) * .045 * grin)
    brows = n(.07) * bell(T + .35, .14) * bell(A - .6, .5)
    still = who.surface + torch.stack([X.sign() * (.09 * smile - .10 * jaw) * corner,
                                       jaw * drop - lift - smile * (.13 * corner + .06 * cheek) - brows,
                                       .07 * grin * cheek - .08 * smile * corner - .25 * jaw * drop])

    # Pose: the neck follows the head, the shoulders hardly. Camera: perspective, framed on eyes and mouth.
    yaw, pitch, roll = np.deg2rad(np.clip([15 * rng.normal(), n(7), n(5)], [-40, -20, -15], [40, 20, 15]))
    gaze = np.clip([n(.16) - .5 * yaw, n(.10) + .3 * pitch], -.4, .4)
    turn, body = rotation(yaw, pitch, roll), rotation(.35 * yaw + n(.1), .1 * pitch, .3 * roll)
    follow, pivot = smooth(3.6, 2.2, T).expand(ROWS, COLUMNS).flatten(), column(0, 1.2, -.4)
    rest = still.flatten(1) - pivot
    points = ((turn @ rest) * follow + (body @ rest) * (1 - follow) + pivot).view_as(still)
    curtain = (turn @ (who.curtain.flatten(1) - pivot) + pivot).view_as(who.curtain)
    distance, zoom = 17.0, 1560 * (1 + n(.05))
    anchor = at(points, [-.63, .63, -.5, .5], [0, 0, 1.35, 1.35]).mean(1)
    shift = tensor(256 + n(9), 304 + n(9)) - anchor[:2] * zoom / (distance - anchor[2])

    def project(p):      # (3,...) -> x, y in supersampled pixels, z
        x, y = (p[k] * zoom / (distance - p[2]) + shift[k] for k in range(2))
        return torch.stack([x * (side / 512) - .5, y * (side / 512) - .5, p[2]])

    # Light: key and fill (direction, colour), sky.
    azimuth, elevation, warm = u(-1.1, 1.1), u(-.05, .9), n(.08)
    level = np.cos(elevation)
    key = tensor(np.sin(azimuth) * level, -np.sin(elevation), np.cos(azimuth) * level)
    fill = unit(tensor(-np.sign(azimuth) * u(.4, 1.2), u(-.5, .2), u(.3, 1)))
    light = ((key, column(1 + warm, 1, 1 - warm) * u(.75, 1.1)),
             (fill, column(1 - warm, 1, 1 + warm) * u(.12, .4)), column(1, 1.02, 1.06) * u(.16, .32))
    haired = who.style != "bald"
    casters = [points.flatten(1), curtain.flatten(1)] if haired else [points.flatten(1)]
    seen = shadows(key, points[:, ::2, ::2], torch.cat(casters, 1), pivot)
    seen = F.interpolate(seen[None], size=(ROWS, COLUMNS), mode="bilinear")[0]
    image, nearest = background(rng, side) * u(.5, 1.1), torch.full((side, side), -9.0)

    # Skin, rasterised where it can face the camera.
    first, last = ((g.theta[0] + yaw).abs() < 1.85).nonzero()[[0, -1], 0].tolist()
    mask, uv = rasterise(project(points[:, :, first:last + 1]), side)
    uv[0] = ((uv[0] + 1) / 2 * (last - first) + first) * (2 / (COLUMNS - 1)) - 1
    maps = outward(points), points[2:], still, seen, X.expand(1, ROWS, -1), T.expand(1, -1, COLUMNS)
    facing, depth, inner, seen, x, t = look(torch.cat(maps), uv).split([3, 1, 3, 1, 1, 1])
    albedo, slopes, gloss = look(who.texture, uv).split([3, 2, 1])
    seen, x, t, a, down = seen[0], x[0], t[0], x[0].abs(), turn[:, 1:2].expand_as(facing)
    facing = unit(facing - slopes[0] * torch.linalg.cross(down, facing, dim=0) - slopes[1] * down)
    e = (a - .63) / who.eye.width
    upper, lower = lids(who.eye, opening, e)
    near = ((e.abs() < 1.25) & (t.abs() < .34)).float()
    fold = min(opening, 1) * bell(t - upper + who.eye.crease, .014) * smooth(1.15, .8, e.abs())
    rim = bell(t - lower - .012, .012) * smooth(1.1, .9, e.abs())
    albedo = albedo * (1 - near * (.45 * fold + .15 * rim))
    colour = shade(albedo, facing, gloss, seen, light, column(.40, .20, .15))
    k = ((near > 0) & (t > upper - .02) & (t < lower + .02) & (e.abs() < 1.03)).nonzero()[:, 0]
    below, above = (t - upper)[k], (lower - t)[k]
    ball = eyeballs(who, still, turn, gaze, light, x[k], inner[:, k], seen[k], e[k], below, above)
    colour[:, k] = torch.lerp(colour[:, k], ball, smooth(-.008, .008, below) * smooth(-.008, .008, above))
    lash = smooth(-.06, -.01, t - upper) * smooth(.02, 0, t - upper) * (.3 + .4 * e.clamp(0, 1))
    lash = (lash * (.6 + .4 * torch.sin(190 * a + 60 * (t - upper))) + .9 * bell(t - upper + .004, .012)
            + .25 * bell(t - lower - .006, .008))
    colour = colour * (1 - .88 * (near * who.eye.lash * smooth(1.12, .95, e.abs()) * lash).clamp(0, 1))
    hole = smooth(.010, .004, (t - 1.31).abs()) * smooth(.56, .50, a)
    k = hole.nonzero()[:, 0]
    teeth = mouth_inside(who, jaw, smile, inner[:, k], light, seen[k])
    colour[:, k] = torch.lerp(colour[:, k], teeth, hole[k])
    if who.glasses:
        colour = glasses(who, colour, inner, x, t, at(still, [.63], [0])[:, 0], turn)
    image[:, mask], nearest[mask] = colour, depth[0]

    if haired:
        ends, hanging = curtain.shape[2] - 1, who.style in ("long", "bob", "wavy")      # its back shows too
        facing = (torch.linspace(-np.pi, np.pi, ends + 1) + yaw).abs() < (4 if hanging else 1.9)
        first, last = facing.nonzero()[[0, -1], 0].tolist()
        curtain = curtain[:, :, first:last + 1]
        mask, uv = rasterise(project(curtain), side)
        along = unit(torch.gradient(curtain, dim=1)[0])
        facing, depth, along = look(torch.cat([outward(curtain), curtain[2:], along]), uv).split([3, 1, 3])
        uv[0] = ((uv[0] + 1) / 2 * (last - first) + first) * (2 / ends) - 1
        cover, tone, relief = look(who.strands, uv)
        front = (facing[2] > 0).float()
        facing = unit(facing * (2 * front - 1) + .25 * relief * column(1, 0, 0))
        colour = shade(who.hair * tone * (.3 + .7 * front), facing, 0, 1, light, .3)
        for direction, tint in light[:2]:      # strands shine across their direction
            sine = (1 - (unit(direction + tensor(0, 0, 1)) @ along + .06 * relief) ** 2).clamp(min=0)
            amount = (direction @ facing).clamp(min=0).sqrt() * front * tone
            colour = colour + tint * amount * (.035 * sine ** 30 + (.10 * who.hair + .01) * sine ** 7)
        image[:, mask] = torch.lerp(image[:, mask], colour, cover * (depth[0] > nearest[mask] - .06))

    # Box filter, exposure, white balance, tone curve.
    gain = 1.35 * np.exp(n(.12)) * column(1 + n(.04), 1, 1 + n(.04))
    image = F.avg_pool2d(image[None], 2)[0] * gain[..., None]
    image = (image * (1 + .12 * image) / (1 + .55 * image)).clamp(0, 1) ** (1 / 2.2)
    marks = project(at(points, *landmark_points(who.eye, opening)))[:2].T
    return (image * 255 + .5).to(torch.uint8).numpy(), ((marks + .5) / 2 - .5).numpy()


def render_person(size, seed, shots, identity):
    """All pictures of one person, uint8 (shots,3,size,size), and their landmarks, float32 (shots,68,2)."""
    faces = [render_face(size, seed, identity, shot) for shot in range(shots)]
    return np.stack([f[0] for f in faces]), np.stack([f[1] for f in faces])


class RenderedFaces(torch.utils.data.Dataset):
    """Rendered people: item i, a pure function of (seed, i), shows identity i // per_identity.

    They are rendered once, on all cores, and kept in the folder `cache` (default CACHE).
    """

    def __init__(self, size=128, identities=288, per_identity=6, seed=0, cache=None):
        self.size, self.per_identity = size, per_identity
        self.identity = torch.arange(identities).repeat_interleave(per_identity)
        self.record = np.dtype([("image", "u1", (3, size, size)), ("landmarks", "<f4", (68, 2))])
        self.fingerprint = f"rendered{FORMAT}-{size}-{identities}x{per_identity}-{seed}"
        path = Path(cache or CACHE) / f"{self.fingerprint}.npy"
        self.data = self.read(path)
        if self.data is None:
            self.data = self.write(path, self.render(seed, identities))

    def read(self, path):
        """The cached faces, or None if there are none or the file is damaged."""
        try:
            data = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, SyntaxError):
            return None
        return data if data.dtype == self.record and data.shape == (len(self),) else None

    def render(self, seed, identities):
        """All faces, an identity an item of work for every core."""
        if len(self) > 64:
            print(f"rendering {len(self)} faces at {self.size} px ...", file=sys.stderr)
        data = np.empty((identities, self.per_identity), self.record)
        nested = multiprocessing.current_process().daemon      # a worker may not start workers
        workers = 0 if nested else min(os.cpu_count() or 1, identities)
        loader = torch.utils.data.DataLoader(      # which gives each worker one thread
            range(identities), batch_size=None, num_workers=workers,
            collate_fn=functools.partial(render_person, self.size, seed, self.per_identity))
        for k, (images, landmarks) in enumerate(loader):
            data[k]["image"], data[k]["landmarks"] = images, landmarks
        return data.reshape(-1)

    def write(self, path, data):
        """Cache the faces by way of a temporary file, so that no process ever sees half of one."""
        try:
            with replacing(path) as temporary:
                np.save(temporary, data)
        except InputError as error:
            print(f"the rendered faces are kept in memory only: {error}", file=sys.stderr)
        return data

    def __len__(self):
        return len(self.identity)

    def __getitem__(self, i):
        image, landmarks = self.data[i]
        image = torch.from_numpy(np.array(image)).float() / 127.5 - 1
        return Face(image, torch.from_numpy(np.array(landmarks)), int(self.identity[i]))

    def landmarks(self, i):
        """Landmarks (68,2) of item i, without its picture."""
        return torch.from_numpy(np.array(self.data["landmarks"][i]))

    def damaged(self, i):
        """Whether item i is another picture than it should be: never."""
        return False

    def others(self, i):
        """The other pictures of the person on picture i."""
        first = i // self.per_identity * self.per_identity
        return [k for k in range(first, first + self.per_identity) if k != i]


class FaceFolder(torch.utils.data.Dataset):
    """Your pictures: a flat folder (each an identity) or a folder per identity. Items: `Face`s of size×size.

    Landmarks are `photo.jpg.txt` or `photo.txt` beside the picture or in the parallel folder `landmarks`;
    without any, `aligned` takes every picture for an FFHQ-aligned crop, else the detector is asked. Square
    pictures are used whole, others are aligned by their landmarks (with `aligned`, their middle is used).
    What cannot be read is named on stderr and left out; more than 5 % of it is an InputError.
    """

    def __init__(self, root, size=128, landmarks=None, aligned=False):
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; --data wants a folder of pictures "
                             "or of one folder per identity")
        if landmarks is not None and not Path(landmarks).is_dir():
            raise InputError(f"{landmarks}: no such folder of landmark files")
        found = sorted(file for file in (*root.glob("*"), *root.glob("*/*"))
                       if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."))
        if not found:
            raise InputError(f"{root}: no pictures in it; {', '.join(sorted(IMAGE_SUFFIXES))} are read")
        self.size, self.landmark_folder, self.aligned, self.total = size, landmarks, aligned, len(found)
        self.faults, self.files, self.points = {}, [], []
        for file in found:
            try:
                self.points.append(self._landmarks(file))
                self.files.append(file)
            except InputError as error:
                self._report(file, error)
        names = [file.parent.name if file.parent != root else f"./{file.name}" for file in self.files]
        numbers = {name: number for number, name in enumerate(sorted(set(names)))}
        self.identity = torch.tensor([numbers[name] for name in names])
        listing = "\n".join(f"{file.relative_to(root)} {file.stat().st_size}" for file in self.files)
        self.fingerprint = f"{root.name}-{size}-{hashlib.sha256(listing.encode()).hexdigest()[:16]}"
        self.keep = len(self.files) * 3 * size * size < 2**30      # small sets stay in memory once read
        self.kept = {}

    def _landmarks(self, file):
        """Landmarks (68,2) in the file's pixels, None for an aligned crop without; reads only its head."""
        path, ends = (find_landmarks(file, self.landmark_folder),
                      {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND"})
        with open(file, "rb") as data:        # a file that was cut off lacks its end: found without decoding
            data.seek(max(data.seek(0, os.SEEK_END) - 4096, 0))
            if ends.get(file.suffix.lower(), b"") not in data.read():
                read_image(file)
        try:
            with warnings.catch_warnings(), Image.open(file) as picture:
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                width, height = picture.size
                exif = picture.format != "PNG" or "exif" in picture.info    # without, a PNG would be decoded
                if exif and picture.getexif().get(0x0112, 1) >= 5:          # the camera lay on its side
                    width, height = height, width
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            read_image(file)                                       # says in a sentence what is wrong
            raise InputError(f"{file}: not a readable picture; replace or remove it") from None
        if path is not None:
            return read_landmarks(path, (height, width))
        return None if self.aligned else detect_landmarks(read_image(file), name=str(file))[0]

    def _report(self, file, error):
        self.faults[file] = str(error)
        if len(self.faults) > 0.05 * self.total:
            listed = "; ".join(list(self.faults.values())[:3])
            raise InputError(f"{len(self.faults)} of {self.total} pictures cannot be used (more than 5 %): "
                             f"{listed}")
        print(f"left out: {error}", file=sys.stderr)

    def _load(self, index):
        image, landmarks = read_image(self.files[index]), self.points[index]
        height, width = image.shape[1:]
        if height != width and landmarks is not None:
            image, landmarks, _ = align_face(image, landmarks, self.size)
            return to_uint8(image), landmarks
        side, left, top = (min(height, width), (width - min(height, width)) // 2,
                           (height - min(height, width)) // 2)
        image = image[:, top:top + side, left:left + side]
        if side != self.size:
            image = F.interpolate(image[None], (self.size, self.size), mode="bicubic", antialias=True)[0]
        if landmarks is None:
            return to_uint8(image), mean_landmarks(self.size)
        return to_uint8(image), (landmarks - torch.tensor([left, top]) + 0.5) * self.size / side - 0.5

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        if index in self.kept:
            image, landmarks = self.kept[index]
        else:
            try:
                image, landmarks = self._load(index)
            except InputError as error:
                if self.files[index] not in self.faults:
                    self._report(self.files[index], error)
                others = [i for i in self.others(index) if self.files[i] not in self.faults]
                if not others:
                    raise InputError(f"{error} (there is no other picture of this identity "
                                     "to take its place)") from None
                return self[others[0]]                           # the same person: no held-out face slips in
            if self.keep:
                self.kept[index] = image, landmarks
        return Face(image.float() / 127.5 - 1, landmarks, int(self.identity[index]))

    def landmarks(self, index):
        """Landmarks (68,2) of item `index`, in the pixels of its file, without reading the picture."""
        return mean_landmarks(self.size) if self.points[index] is None else self.points[index]

    def damaged(self, index):
        """Whether the picture, once read, was found damaged, and another of the person took its place."""
        return self.files[index] in self.faults

    def others(self, index):
        """Indices of the other pictures of the same identity."""
        return [i for i in torch.nonzero(self.identity == self.identity[index])[:, 0].tolist() if i != index]


def split_identities(faces, seed=0):
    """Indices (train, validation, test) of `faces`, no identity in two: about 88, 4, 8 % of identities."""
    names = faces.identity.unique()
    if len(names) < 3:
        raise InputError(f"{len(names)} identities are too few to train and to hold some out; "
                         "at least 3 are needed")
    names = names[torch.randperm(len(names), generator=seeded(seed, 0))]
    tests, validations = max(round(0.08 * len(names)), 1), max(round(0.04 * len(names)), 1)
    parts = names[tests + validations:], names[tests:tests + validations], names[:tests]
    return [torch.nonzero(torch.isin(faces.identity, part))[:, 0].tolist() for part in parts]


def stack_faces(faces, indices):
    """faces[i] for i in indices → images (B,3,H,W), landmarks (B,68,2)."""
    chosen = [faces[i] for i in indices]
    return torch.stack([face.image for face in chosen]), torch.stack([face.landmarks for face in chosen])


def stack_person(faces, indices):
    """stack_faces of a picture and, behind it, others of the same person that shall guide it: where one is
    damaged, another of the person takes its place, and what comes first never stands behind as well."""
    loaded, wanted = {}, max(len(set(indices)), 2)
    for i in dict.fromkeys([*indices, *faces.others(indices[0])]):
        face = faces[i]
        if not faces.damaged(i):
            loaded[i] = face
        if len(loaded) == wanted:
            break
    if len(loaded) < 2:
        raise InputError(f"person {int(faces.identity[indices[0]])} has no two readable pictures, one to "
                         "restore and one to guide; see the lines `left out` above, and remove the folder")
    first = indices[0] if indices[0] in loaded else next(iter(loaded))
    rest = [i for i in loaded if i != first]
    chosen = [first, *(i if i in rest else rest[k % len(rest)] for k, i in enumerate(indices[1:]))]
    return (torch.stack([loaded[i].image for i in chosen]),
            torch.stack([loaded[i].landmarks for i in chosen]))


def spread(indices, count):
    """At most `count` of the indices, evenly spaced: a bounded test set that still meets every identity."""
    return ([indices[i * len(indices) // count] for i in range(count)] if len(indices) > count
            else list(indices))


# -----------------------------------------------------------------------------------------------------------
# 5. Metrics
# -----------------------------------------------------------------------------------------------------------

def psnr(restored, target):
    """Peak signal-to-noise ratios in dB, (B,3,H,W) in [-1,1] → (B,). All pixels, all channels, peak 2."""
    return -10 * torch.log10((restored.float() - target.float()).square().mean((1, 2, 3)) / 4)


def ssim(restored, target):
    """Structural similarity of each image, (B,3,H,W) in [-1,1] → (B,). Wang et al. (2004): Gaussian window
    11×11, σ 1.5, K1 0.01, K2 0.03, on RGB, averaged over the channels and where the window fits."""
    taps = torch.exp(-(torch.arange(11, device=restored.device) - 5.0) ** 2 / (2 * 1.5**2))
    taps = (taps / taps.sum()).view(1, 1, 1, 11)
    x, y = (image.double().flatten(0, 1)[:, None] for image in (restored, target))

    def window(image):
        return F.conv2d(F.conv2d(image, taps.double()), taps.double().transpose(2, 3))

    mean_x, mean_y, c1, c2 = window(x), window(y), (0.01 * 2) ** 2, (0.03 * 2) ** 2
    var_x, var_y, cov = window(x * x) - mean_x**2, window(y * y) - mean_y**2, window(x * y) - mean_x * mean_y
    index = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)
             / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))
    return index.view(len(restored), -1).mean(1).float()


def paired_gain(restored, baseline, seed=0):
    """Mean of the per-face differences and its 95 % interval, by 2,000 bootstrap resamples of the faces."""
    difference = (restored - baseline).double().cpu()
    index = torch.randint(len(difference), (2000, len(difference)), generator=seeded(seed, 9))
    low, high = torch.quantile(difference[index].mean(1),
                               torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return {"mean": difference.mean().item(), "ci95": [low, high]}


def load_published(module, path, name, source, rename=None):
    """Fill `module` with published weights the user has downloaded; a missing file says where to get it."""
    if path is None or not Path(path).is_file():
        raise InputError(f"{name} needs its published weights{f' ({path} is missing)' if path else ''}: "
                         f"download {source}")
    state = load_weights(path)
    state = {rename(key) if rename else key: value for key, value in state.items()}
    own = module.state_dict()
    own = {key: value for key, value in own.items() if not key.endswith("num_batches_tracked")}
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    if wrong:
        raise InputError(f"{path}: not the weights of {name} ({wrong[0]} does not fit); download {source}")
    module.load_state_dict({key: state[key] for key in own}, strict=False)
    return module.eval().requires_grad_(False)


class LPIPS(nn.Module):
    """Learned perceptual distance, version 0.1 on AlexNet (Zhang et al. 2018), (B,3,H,W) in [-1,1] → (B,).

    `backbone` is torchvision's alexnet-owt-7be5be79.pth, `linear` the authors' weights/v0.1/alex.pth.
    """
    def __init__(self, backbone, linear):
        super().__init__()
        self.features = torchvision.models.alexnet(weights=None).features
        self.linear = nn.ParameterList([nn.Parameter(torch.zeros(1, c, 1, 1))
                                        for c in (64, 192, 384, 256, 256)])
        load_published(self.features, backbone, "LPIPS", "alexnet-owt-7be5be79.pth from "
                       "download.pytorch.org/models", lambda key: key.removeprefix("features."))
        load_published(self.linear, linear, "LPIPS", "weights/v0.1/alex.pth from github.com/richzhang/"
                       "PerceptualSimilarity", lambda key: key.removeprefix("lin").split(".")[0])
        self.eval().requires_grad_(False)

    def forward(self, restored, target):
        mean = torch.tensor([-0.030, -0.088, -0.188], device=restored.device).view(1, 3, 1, 1)
        deviation = torch.tensor([0.458, 0.448, 0.450], device=restored.device).view(1, 3, 1, 1)
        x, distance = (torch.cat([restored, target]) - mean) / deviation, 0
        taken = {1: 0, 4: 1, 7: 2, 9: 3, 11: 4}                     # AlexNet's five ReLUs
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in taken:
                one, two = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
                distance = distance + ((one - two).square() * self.linear[taken[index]]).sum(1).mean((1, 2))
        return distance


def frechet_distance(first, second):
    """Fréchet distance of Gaussians fit to features (N,D), (M,D): |μ1−μ2|² + tr(C1 + C2 − 2 (C1 C2)^½)."""
    (one, mean1), (two, mean2) = (((x.double() - x.double().mean(0)) / (len(x) - 1) ** 0.5,
                                   x.double().mean(0)) for x in (first, second))
    root = torch.linalg.svdvals(one @ two.T).sum()          # tr (C1 C2)^½ with C = AᵀA, without D×D matrices
    return ((mean1 - mean2).square().sum() + one.square().sum() + two.square().sum() - 2 * root).item()


class FID:
    """Fréchet Inception distance (Heusel et al. 2017) with the original weights ported to PyTorch
    (pt_inception-2015-12-05-6726825d.pth). `fid(images, references)`: iterables of (B,3,H,W) in [-1,1]."""

    def __init__(self, weights, device="cpu"):
        net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                              init_weights=False)
        load_published(net, weights, "FID",
                       "pt_inception-2015-12-05-6726825d.pth from github.com/mseitzer/pytorch-fid")
        for name, block in net.named_children():              # where the original differs from torchvision's
            if hasattr(block, "branch_pool") and isinstance(block.branch_pool, nn.Module):
                self._repair(block, F.max_pool2d if name == "Mixed_7c" else
                             functools.partial(F.avg_pool2d, count_include_pad=False))
        net.fc, self.net, self.device = nn.Identity(), net.to(device), device

    @staticmethod
    def _repair(block, pool):
        """Have a block's pooling branch pool otherwise: keep its input, hand the branch its pooled form."""
        kept = {}
        block.register_forward_pre_hook(lambda module, inputs: kept.update(x=inputs[0]))
        block.branch_pool.register_forward_pre_hook(
            lambda module, inputs: (pool(kept["x"], 3, stride=1, padding=1),))

    @torch.inference_mode()
    def features(self, batches):
        resized = (F.interpolate(b.to(self.device), (299, 299), mode="bilinear", align_corners=False)
                   for b in batches)
        return torch.cat([self.net(images).cpu() for images in resized])

    def __call__(self, images, references):
        return frechet_distance(self.features(images), self.features(references))


class Recogniser(nn.Module):
    """A small VGG-style face recognition network: four stages of two convolutions, then an embedding.

    forward: (B,3,H,W) in [-1,1] → unit vectors (B,128). features: → the four stages' maps, of H/2, H/4, H/8
    and H/16 and `widths` channels, after ReLU. It stands in for the papers' VGG-Face and ArcFace.
    """

    def __init__(self, widths=(32, 48, 64, 96), input_size=64):
        super().__init__()
        self.widths, self.input_size, self.accuracy = tuple(widths), input_size, None
        self.stages = nn.ModuleList()
        for before, width in zip((3, *widths), widths):
            self.stages.append(nn.Sequential(
                nn.Conv2d(before, width, 3, stride=2 if before == 3 else 1, padding=1),
                nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()))
        self.embed = nn.Sequential(nn.Dropout(0.2), nn.Linear(widths[-1] * (input_size // 16) ** 2, 128),
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
        if not self.training:                # a face and its mirror image are the same person: average both
            return F.normalize(self.embedded(x) + self.embedded(x.flip(3)), dim=1)
        return F.normalize(self.embedded(x), dim=1)

    def embedded(self, x):
        """The embedding before it is scaled to length 1."""
        return self.embed(self.features(x)[-1].flatten(1)).float()

    def folded(self):
        """The same function in evaluation mode with every BatchNorm folded into its convolution; frozen."""
        net = copy.deepcopy(self).eval()
        for stage in net.stages:
            for i in (0, 3):
                stage[i] = torch.nn.utils.fusion.fuse_conv_bn_eval(stage[i], stage[i + 1])
                stage[i + 1] = nn.Identity()
        return net.requires_grad_(False)


def angular_margin_loss(embedding, centres, label, margin=0.3, scale=24.0):
    """ArcFace (Deng et al. 2019): cross-entropy of scale · cos(θ + margin · [true class]); (B,D) unit
    vectors, (K,D)."""
    cosine = (embedding @ F.normalize(centres, dim=1).T).clamp(-1 + 1e-6, 1 - 1e-6)
    true = F.one_hot(label, len(centres)).bool()
    return F.cross_entropy(scale * torch.where(true, torch.cos(cosine.arccos() + margin), cosine), label)


def verification_accuracy(embeddings, identity, seed=0):
    """Share of right same/different answers on all same-identity pairs and as many others, in two folds of
    the identities: the threshold that is best on one fold is applied to the other."""
    one, two = torch.triu_indices(len(identity), len(identity), 1)
    same, cosine = identity[one] == identity[two], (embeddings[one] * embeddings[two]).sum(1)
    other = torch.nonzero(~same)[:, 0]
    other = other[torch.randperm(len(other), generator=seeded(seed, 1))[:int(same.sum())]]
    chosen = torch.cat([torch.nonzero(same)[:, 0], other])
    same, cosine, fold = same[chosen], cosine[chosen], (identity[one] % 2)[chosen] == 0
    right, count = 0, 0
    for part in (fold, ~fold):
        thresholds = torch.linspace(-1, 1, 401)
        accuracy = ((cosine[~part, None] > thresholds) == same[~part, None]).float().mean(0)
        threshold = thresholds[accuracy == accuracy.max()].mean()           # the middle of the best ones
        right += ((cosine[part] > threshold) == same[part]).sum().item()
        count += int(part.sum())
    return right / count


RECOGNISERS = {"loss": dict(widths=(32, 48, 64, 96), seed=0),
               "metric": dict(widths=(32, 48, 80, 112), seed=1)}


def recogniser(faces, purpose="loss", epochs=24, batch=64, quiet=False):
    """Train (or take from cache) a face recognition network on the training identities of `faces`; frozen.

    purpose "loss" serves losses and encoders; "metric", another seed and other widths, serves
    `identity_distance`, so that no method is measured with the network that trained it. `.accuracy` is its
    verification accuracy on held-out identities. Pictures without identities (a flat folder) cannot train
    one: rendered faces do, and a line says so.
    """
    if len(faces.identity.unique()) > len(faces) / 2:
        if not quiet:
            print("these pictures carry no identities: the recogniser is trained on rendered faces",
                  file=sys.stderr)
        faces = RenderedFaces()
    widths, seed = RECOGNISERS[purpose]["widths"], RECOGNISERS[purpose]["seed"]
    net = Recogniser(widths)
    path = CACHE / f"recogniser-2-{'-'.join(map(str, widths))}-{epochs}x{batch}-{faces.fingerprint}.pt"
    if path.is_file():
        with contextlib.suppress(InputError):                       # a damaged cache is trained anew
            state = load_weights(path)
            net.accuracy = state.pop("accuracy")
            net.load_state_dict(state)
            return net.folded()
    device = choose_device("auto")
    train, validation, test = split_identities(faces)
    images, identity = torch.stack([
        to_uint8(F.interpolate(faces[i].image[None], (64, 64), mode="bilinear", antialias=True)[0])
        for i in train]).to(device), faces.identity[train]
    label = torch.searchsorted(identity.unique(), identity).to(device)
    batch = min(batch, len(images))
    steps = epochs * len(images) // batch
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Recogniser(widths).to(device, memory_format=torch.channels_last)
        centres = nn.Parameter(torch.randn(len(identity.unique()), 128, device=device) * 0.1)
        optimizer = torch.optim.AdamW([*net.parameters(), centres], lr=3e-3, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        generator, progress = seeded(seed, 2), Progress(f"recogniser for {purpose}", steps, quiet=quiet)
        order = torch.cat([torch.randperm(len(images), generator=generator)
                           for _ in range(steps * batch // len(images) + 1)])
        for step in range(steps):
            index = order[step * batch:(step + 1) * batch].to(device)
            x = images[index].float() / 127.5 - 1
            low = [64, 64, 64, 48, 32, 20][int(torch.randint(6, (), generator=generator))]     # blurred too
            left, top = torch.randint(-3, 4, (2,), generator=generator).tolist()
            if low < 64:
                x = F.interpolate(F.interpolate(x, (low, low), mode="bilinear", antialias=True), (64, 64),
                                  mode="bilinear")
            x = torch.roll(x.flip(3) if step % 2 else x, (top, left), (2, 3))
            with autocast(device):
                embedding = net(x.contiguous(memory_format=torch.channels_last))
            loss = angular_margin_loss(embedding, centres, label[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                progress.update(step, f"loss {loss.item():.2f}")
    net = net.eval().cpu().to(memory_format=torch.contiguous_format)      # as a cached one: equal to the bit
    held = spread(validation + test, 400)
    with torch.inference_mode():
        embeddings = torch.cat([net(stack_faces(faces, held[i:i + 64])[0]) for i in range(0, len(held), 64)])
    net.accuracy = verification_accuracy(
        embeddings, torch.searchsorted(faces.identity[held].unique(), faces.identity[held]))
    progress.close(f"verification accuracy on {len(faces.identity[held].unique())} held-out identities "
                   f"{net.accuracy:.1%}")
    with contextlib.suppress(InputError):                    # a cache that cannot be written costs time only
        save_checkpoint(path, {**net.state_dict(), "accuracy": net.accuracy})
    return net.folded()


class VGG(nn.Module):
    """The convolutions of VGG-16 or -19; four maps: the last of blocks 2 to 5, at 1/2 … 1/16 of the size.

    After ReLU, the last one only with `last_relu`. Input RGB in [-1,1]; `face` turns it into VGG-Face's, BGR
    in 0 … 255 without the mean face colour, else it is ImageNet's.
    """
    widths = (128, 256, 512, 512)

    def __init__(self, per_block=(2, 2, 4, 4, 4), face=False, last_relu=True):
        super().__init__()
        self.arguments = {"per_block": tuple(per_block), "face": face, "last_relu": last_relu}
        mean, deviation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if not face else (
            (129.1863 / 255, 104.7624 / 255, 93.5940 / 255), (1 / 255,) * 3)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).view(1, 3, 1, 1))
        before, self.blocks = 3, nn.ModuleList()
        for count, width in zip(per_block, (64, 128, 256, 512, 512)):
            self.blocks.append(nn.ModuleList(
                nn.Conv2d(width if i else before, width, 3, padding=1) for i in range(count)))
            before = width
        self.eval().requires_grad_(False)

    def features(self, x):
        x, maps = ((x + 1) / 2 - self.mean) / self.deviation, []
        x = x.flip(1) if self.arguments["face"] else x
        for index, block in enumerate(self.blocks):
            x = F.max_pool2d(x, 2) if index else x
            for layer in block[:-1]:
                x = F.relu(layer(x), inplace=True)
            x = block[-1](x)
            x = F.relu(x, inplace=True) if index < 4 or self.arguments["last_relu"] else x
            maps.append(x)
        return maps[1:]


def load_vgg(file, last_relu=True):
    """VGG-Face from a state dict of any naming (its 3×3 kernels are taken in order), or, without a file,
    torchvision's VGG-19 trained on ImageNet, saying so."""
    if file is not None:
        state = load_weights(file)
    else:
        print("no --vggface file: torchvision's VGG-19 (ImageNet) is the encoder", file=sys.stderr)
        try:
            state = torchvision.models.vgg19(weights="IMAGENET1K_V1").state_dict()
        except OSError as error:
            raise InputError("VGG-19 could not be downloaded; put vgg19-dcbb9e9d.pth from "
                             f"download.pytorch.org/models into {torch.hub.get_dir()}/checkpoints, "
                             f"or name a --vggface file ({error})") from None
    names = [name for name, value in state.items() if torch.is_tensor(value) and value.ndim == 4]
    net = VGG((2, 2, 3, 3, 3) if len(names) == 13 else (2, 2, 4, 4, 4), face=file is not None,
              last_relu=last_relu)
    convolutions = [layer for block in net.blocks for layer in block]
    if [state[name].shape for name in names] != [layer.weight.shape for layer in convolutions]:
        raise InputError(f"{file}: neither VGG-16 (VGG-Face) nor VGG-19; "
                         "the state dict needs their 13 or 16 3×3 kernels")
    for layer, name in zip(convolutions, names):
        layer.load_state_dict({"weight": state[name], "bias": state[name.removesuffix("weight") + "bias"]})
    return net


def identity_distance(net, restored, target):
    """Angle in degrees between a recogniser's embeddings of each face pair, (B,3,H,W) in [-1,1] → (B,)."""
    cosine = (net(restored.float()) * net(target.float())).sum(1)
    return torch.rad2deg(cosine.clamp(-1, 1).arccos())


# -----------------------------------------------------------------------------------------------------------
# 6. Download
# -----------------------------------------------------------------------------------------------------------

TIMEOUT = 20, 60             # seconds to a connection, and between two pieces of the answer


def download(url, path, sha256=None, attempts=3):
    """Fetch url to path unless it is there; resume a broken transfer, check it, rename into place.

    It is checked by its sha256, or, without one, by the length the server announced. A part is then gone on
    with only where the server says that it is still the same file (ETag or Last-Modified). Gives up after
    `attempts` in a row that brought nothing new: InputError.
    """
    path = Path(path)
    if path.is_file() and sha256 in (None, file_sha256(path)):
        return path
    part, version = (path.with_name(path.name + end) for end in (".part", ".part.version"))
    failures, most = 0, part.stat().st_size if part.is_file() else 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _fetch(url, part, version, sha256 is not None)
            break
        except (requests.RequestException, OSError) as error:
            reply, size = getattr(error, "response", None), part.stat().st_size if part.is_file() else 0
            failures, most = 0 if size > most else failures + 1, max(most, size)
            final = reply is not None and 400 <= reply.status_code < 500
            if final or failures == attempts:
                raise InputError(f"{url}: {error}; run the command again "
                                 "to go on with the download") from None
    version.unlink(missing_ok=True)
    if sha256 is not None and file_sha256(part) != sha256:
        part.unlink()
        raise InputError(f"{url}: not the expected file (its sha256 differs); "
                         f"get it by hand and put it at {path}")
    os.replace(part, path)
    return path


def _fetch(url, part, version, checked):
    """One attempt to complete the file `part`; `version` holds what the server calls the version begun."""
    done = part.stat().st_size if part.is_file() else 0
    known = version.read_text() if version.is_file() else ""
    done = done if checked or known else 0                # of which version is it? nothing will tell
    headers = {"Accept-Encoding": "identity"}
    if done:
        headers |= {"Range": f"bytes={done}-"} | ({"If-Range": known} if known else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as reply:
        # "bytes 100-199/200", "bytes */200": what is sent, and the length of the whole
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", reply.headers.get("Content-Range", ""))
        if done and reply.status_code == 416 and (checked or (span and int(span[2]) == done)):
            return                                        # nothing is missing; a sha256 tells if too much is
        resumed = reply.status_code == 206
        tag = reply.headers.get("ETag", "")
        tag = reply.headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag
        strange = resumed and not checked and (tag != known or not span or span[1] != str(done))
        if strange or (done and reply.status_code == 416):
            part.unlink(missing_ok=True)
            raise OSError("the file has changed since its download began")
        reply.raise_for_status()
        length = reply.headers.get("Content-Length", "")
        total = int(length) + (done if resumed else 0) if length.isdecimal() else None
        if resumed and span:
            total = int(span[2])
        with open(part, "ab" if resumed else "wb") as file:
            version.write_text(tag)                       # now that a part of another version is gone
            for chunk in reply.iter_content(1 << 14):     # what a hang-up cuts short is lost: keep it small
                file.write(chunk)
        if total not in (None, part.stat().st_size) and "Content-Encoding" not in reply.headers:
            raise OSError(f"{part.stat().st_size} bytes came, {total} were announced")


def file_sha256(path):
    """The sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_published(source):
    """Weights as their authors released them, a file, an http(s) address or a state dict → {name: tensor}.

    A file of an address is kept in CACHE/weights, unless it cannot be read. Names lose the prefix "module."
    of DataParallel; of a file that holds more, the part "state_dict" or "params" is taken. InputError for
    what is no checkpoint, or holds something else.
    """
    state, file = source, source
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        name = Path(urllib.parse.unquote(urllib.parse.urlsplit(source).path)).name
        key = hashlib.sha256(source.encode()).hexdigest()[:8]      # two addresses may end in the same name
        file = CACHE / "weights" / f"{key}-{re.sub('[^0-9A-Za-z._-]', '_', name)}"
        if not file.is_file():
            print(f"fetching {source} → {file}", file=sys.stderr)
        download(source, file)
    try:
        if not isinstance(source, dict):
            state = load_weights(file, advice="give the file that the authors released")
        for key in ("state_dict", "params"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
        if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
            raise InputError(f"{'the state dict' if file is state else file}: holds no named tensors; "
                             "give the file that the authors released")
    except InputError as error:
        if file is source:
            raise
        file.unlink(missing_ok=True)
        raise InputError(f"{source}: {str(error).removeprefix(f'{file}: ')}; what it sent was not kept: "
                         "is it the address of a page, not of the file?") from None
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def load_named(network, source, rename, name, file=None):
    """Fill a network with published weights: rename(a name there) → the name here, None for what is unused.

    source: as for read_published. Every tensor of the network has to be there, once and in its shape, and
    none may be left over; else InputError with the first that does not fit, calling them `name`, and the
    source `file`. Returns the network, frozen, in eval mode, with spectral norm folded in.
    """
    state, own, found, wrong = read_published(source), network.state_dict(), {}, []
    for there, value in state.items():
        try:
            here = rename(there)
        except (KeyError, IndexError, ValueError):                 # the rule knows no such layer
            here = there
        if here is None:
            continue
        if here not in own:
            wrong.append(f"{there} belongs to no layer")
        elif value.shape != own[here].shape:
            wrong.append(f"{there} is {'×'.join(map(str, value.shape)) or 'a number'}, "
                         f"not {'×'.join(map(str, own[here].shape))}")
        elif here in found and not torch.equal(found[here], value):
            wrong.append(f"{there} is there twice, with other numbers")
        found[here] = value
    wrong += [f"{here} is missing" for here in own if here not in found]
    if wrong:
        file = file or ("the state dict" if isinstance(source, dict) else source)
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(f"{file}: not {name} ({wrong[0]}{more}); "
                         "give the file of this method that the authors released, whole and unchanged")
    network.load_state_dict(found)
    return fold(network.eval()).requires_grad_(False)


# -----------------------------------------------------------------------------------------------------------
# 7. Runs
# -----------------------------------------------------------------------------------------------------------

def seeded(*numbers):
    """A random stream of its own for every tuple of whole numbers ≥ 0, for example (seed, step, rank)."""
    state = np.random.SeedSequence((*numbers, len(numbers))).generate_state(1, np.uint64)[0]  # (7,) ≠ (7, 0)
    return torch.Generator().manual_seed(int(state >> 1))


def choose_device(name="auto"):
    """"auto", "cpu" or "cuda" → torch.device; a process under torchrun takes the GPU of its local rank."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {name}: unknown; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA GPU is visible to PyTorch here; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@functools.lru_cache
def precision(kind):
    """The type convolutions run in: bfloat16 where the processor multiplies it in hardware (it halves the
    time or better), else float32. `kind` is "cpu" or "cuda"."""
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float32
    with contextlib.suppress(OSError):
        if {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()):
            return torch.bfloat16
    return torch.float32


def autocast(device, kind="auto"):
    """Mixed precision: "auto" where the processor gains from it, "bfloat16" always, "float32" never."""
    device = torch.device(device).type
    if kind not in ("auto", "float32", "bfloat16"):
        raise InputError(f"--precision {kind}: unknown; choose auto, float32 or bfloat16")
    low = precision(device) == torch.bfloat16 if kind == "auto" else kind == "bfloat16"
    return torch.autocast(device, torch.bfloat16, enabled=low)


def fold(network):
    """For inference: every spectral norm computed once and folded into its weight. Returns the network."""
    for module in network.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    return network


def channels_last(network, device):
    """Move a network to `device`, the weights of its convolutions to channels_last. Its other tensors of
    four axes, such as the entries of a dictionary, stay as they are: what reads them reads them flat."""
    network.to(device)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.to(memory_format=torch.channels_last)
    return network


def keep_freed_memory():
    """Let memory that was freed stay with the process. The C library of most Linux systems gives every
    tensor above 32 MB back at once, and the next one is paged in anew: up to a quarter of the time of a
    512×512 face on a CPU. Called once what is large and short-lived, such as weights before they are cast,
    is gone. Does nothing on other systems."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(-4, 0)                                         # M_MMAP_MAX: from the heap instead
        library.mallopt(-1, 2**31 - 1)                                 # M_TRIM_THRESHOLD: which keeps 2 GB


def for_inference(network, device, kind="auto", exact=()):
    """Make a network ready to restore with: on `device`, frozen, spectral norm folded in, channels_last,
    activations overwriting their input (which has to be the output of a layer that nobody else reads), and
    where `autocast(device, kind)` is mixed, the weights of convolutions and linear layers cast once instead
    of in every call. Modules whose name begins with one in the tuple `exact` keep float32 weights."""
    network = channels_last(fold(network).eval().requires_grad_(False), device)
    kind_of_device = torch.device(device).type
    with autocast(device, kind):
        mixed = torch.is_autocast_enabled(kind_of_device)
        for name, module in network.named_modules():
            if isinstance(module, (nn.LeakyReLU, nn.ReLU, nn.SiLU)):
                module.inplace = True
            elif (mixed and isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
                  and not name.startswith(tuple(exact))):
                module.to(torch.get_autocast_dtype(kind_of_device))
    return network


def peak_memory(device, reset=False):
    """The most memory in use since the last reset, in GB: of the GPU, else of the whole process (where the
    system keeps no resettable figure, since its start)."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(OSError, ValueError, IndexError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    import resource                                                    # not on every system
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def median_time(call, device, runs):
    """The median seconds of `runs` calls."""
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds))


def benchmark(call, images, device, kind="auto", runs=7):
    """Time call(), which restores `images` faces on `device`, and print a line: images/s (the median of
    `runs` calls after two to warm up), peak memory, and the share of what a matrix product of 2048³ reaches
    here in the same precision. The work is that of convolutions and matrix products, two operations a
    multiply-add, counted by PyTorch. Returns the figures by name."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            call()
        keep_freed_memory()
        call()
        with autocast(device, kind):
            dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        factor = torch.randn(2048, 2048, device=device, dtype=dtype)
        torch.mm(factor, factor)
        ceiling = 2 * 2048 ** 3 / median_time(functools.partial(torch.mm, factor, factor), device, 5) / 1e12
        del factor
        peak_memory(device, reset=True)
        seconds = median_time(call, device, runs)
    work = counter.get_total_flops() / 1e12
    figures = {"seconds": seconds, "images_per_second": images / seconds, "memory_gb": peak_memory(device),
               "teraflop": work, "share": work / seconds / ceiling}
    print(f"{images / seconds:.2f} images/s ({seconds:.3f} s for {images}), peak memory "
          f"{figures['memory_gb']:.2f} GB, {work / seconds:.2f} of {ceiling:.2f} TFLOP/s "
          f"({figures['share']:.0%} of a matrix product's)")
    return figures


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary name beside `path`; flush, rename into place if all went well, else remove it."""
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


def write_json(path, value):
    """Write a dict as JSON, renamed into place."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def save_checkpoint(path, state):
    """torch.save, flushed and renamed into place: a crash leaves the checkpoint before it whole."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_weights(path, device="cpu", advice=None):
    """torch.load, tensors and plain values only; what is missing, damaged or holds code is an InputError,
    which ends with `advice`, else with where checkpoints come from."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        train = "no such checkpoint; train one first (--train) or name another with --checkpoint"
        raise InputError(f"{path}: {f'no such file; {advice}' if advice else train}") from None
    except Exception as error:              # torch raises half a dozen types for what is no checkpoint
        code = "Unsupported global" in str(error) or "Unsupported class" in str(error)
        reason = "holds code or objects, which are never run" if code else "damaged, or not a checkpoint"
        raise InputError(f"{path}: {reason}; {advice or 'use a checkpoint that --train wrote'}") from None


def load_checkpoint(path, script, device="cpu"):
    """A checkpoint written by `script`'s --train; one of another method is an InputError."""
    state = load_weights(path, device)
    if not isinstance(state, dict) or "script" not in state:
        raise InputError(f"{path}: not a checkpoint of this repository; "
                         f"use one that {script}.py --train wrote")
    if state["script"] != script:
        raise InputError(f"{path}: a checkpoint of {state['script']}.py, not of {script}.py")
    return state


class Progress:
    """A line updated in place on a terminal: step, steps/s, time left, a note. Elsewhere few plain lines."""

    def __init__(self, title, total, start=0, quiet=False):
        self.title, self.total, self.first, self.quiet = title, total, start, quiet
        self.begin, self.shown, self.terminal = time.monotonic(), 0.0, sys.stdout.isatty()

    def update(self, step, note=""):
        """Show step (0 … total); at most 5 times a second on a terminal, every 20 seconds elsewhere."""
        now = time.monotonic()
        if self.quiet or now - self.shown < (0.2 if self.terminal else 20):
            return
        self.shown, rate = now, max(step - self.first, 1e-9) / (now - self.begin + 1e-9)
        left = int((self.total - step) / rate) if step > self.first else 0
        text = (f"{self.title} {step}/{self.total}  {rate:.1f} it/s  "
                f"{left // 60}:{left % 60:02d} left  {note}")
        print(f"\r\033[K{text[:118]}" if self.terminal else text, end="" if self.terminal else "\n",
              flush=True)

    def line(self, text):
        """Print a line that stays."""
        if not self.quiet:
            print(f"\r\033[K{text}" if self.terminal else text, flush=True)

    def close(self, note=""):
        seconds = time.monotonic() - self.begin
        self.line(f"{self.title}: {self.total - self.first} steps in {seconds:.0f} s  {note}".rstrip())


def write_log(folder, rows):
    """log.csv and curves.png from a list of dicts: a column and a plot a name; missing values leave gaps."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(Path(folder) / "log.csv") as temporary, open(temporary, "w", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
                        for row in rows)
    names = [name for name in names if name != "step"]
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    width, height = 3.2 * columns, 2.3 * lines           # inches; margins by hand: a layout engine is slow
    figure = matplotlib.figure.Figure(figsize=(width, height))
    axes = figure.subplots(lines, columns, squeeze=False, gridspec_kw={
        "left": 0.6 / width, "right": 1 - 0.15 / width, "bottom": 0.3 / height, "top": 1 - 0.3 / height,
        "wspace": 0.32, "hspace": 0.36})
    for axis, name in zip(axes.flat, names):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        axis.plot(*zip(*points), linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.locator_params(nbins=4)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names):]:
        axis.remove()
    with replacing(Path(folder) / "curves.png") as temporary:
        figure.savefig(temporary, dpi=110)


def print_table(scales):
    """The "test" part of result.json as a table: a row a task, degraded input beside the restored face."""
    print(f"\n{'':6}{'faces':>6}  "
          + "".join(f"{name + ' in → out':>22}" for name in next(iter(scales.values()))["input"])
          + f"{'PSNR gain, 95 % interval':>30}")
    for task, row in scales.items():
        cells = "".join(f"{row['input'][name]:>11.{digits}f} →{row['restored'][name]:>9.{digits}f}"
                        for name, digits in zip(row["input"], (2, 4, 1, 4)))
        gain, (low, high) = row["paired_psnr_gain"]["mean"], row["paired_psnr_gain"]["ci95"]
        print(f"{task:6}{row['faces']:>6}  {cells}{gain:>+14.2f} dB [{low:+.2f}, {high:+.2f}]")


@contextlib.contextmanager
def process_group():
    """(rank, world): under torchrun a process group (NCCL on GPUs, gloo on CPUs), else (0, 1)."""
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    cuda = torch.cuda.is_available() and choose_device("auto").type == "cuda"
    if cuda:
        torch.cuda.set_device(choose_device("auto"))
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield torch.distributed.get_rank(), torch.distributed.get_world_size()
    finally:
        torch.distributed.destroy_process_group()


def restore_files(source, out, size, restore_crops, *, aligned=False, landmarks=None,
                  need_landmarks=False, overwrite=False, check=False, device="cpu"):
    """Restore a file, or every picture of a folder, into the folder `out` under the same name (as PNG).

    `restore_crops(crops (N,3,size,size), landmarks (N,68,2), file)` → (N,3,size,size) restores the faces of
    one picture. `aligned`: the picture is one face crop; a square one is written at size×size, of another
    its middle is restored in place. Otherwise every face is aligned, restored and pasted back, into a photo
    enlarged up to 4 times where the faces are smaller than `size`. An aligned crop without landmarks gets
    the average ones, with `need_landmarks` the detector's. `check` also writes the input with landmarks and
    boxes drawn. Existing results are skipped unless `overwrite`; a file that fails is named.
    Returns the number of failures.
    """
    files, out = _pictures(source, "--restore"), Path(out)
    keep_freed_memory()
    stems = [file.stem for file in files]
    failures, skipped = [], 0
    for file in files:
        name = file.stem if stems.count(file.stem) == 1 else file.name  # a.jpg and a.png both get a result
        target = out / f"{name}.png"
        if target.exists() and not overwrite:
            skipped += 1
            continue
        try:
            photo, matrices, points = _faces_of(file, size, aligned, landmarks, need_landmarks, device)
            crops = torch.stack([warp_affine(photo, matrix, size, size, "border") for matrix in matrices])
            local = torch.stack([transform_points(p, m) for p, m in zip(points, matrices)])
            restored = restore_crops(crops, local, file).float().cpu()
            if aligned and photo.shape[1] == photo.shape[2]:
                result = restored[0]
            else:
                result = photo
                for crop, matrix in zip(restored, matrices):
                    result = paste_face(result, crop, matrix)
            write_image(target, result)
            if check:
                write_image(out / f"{name}_check.png",
                            torch.cat([draw_landmarks(c, p) for c, p in zip(crops, local)], 2))
        except InputError as error:
            if len(files) == 1:
                raise
            failures.append(f"failed: {error}")
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{len(files) - len(failures) - skipped} restored, {skipped} skipped (already there), "
          f"{len(failures)} failed → {out}")
    return len(failures)


def read_references(source, size, *, aligned=False, landmarks=None, need_landmarks=False, device="cpu"):
    """Pictures of one person, a file or a folder, for the guided methods: the largest face of each.

    → images (N,3,size,size), their landmarks (N,68,2), the files. Options as for restore_files. In a
    folder, a file that fails is named on stderr and left out; if none is left, InputError.
    """
    images, points, used, files = [], [], [], _pictures(source, "--reference")
    for file in files:
        try:
            photo, matrices, faces = _faces_of(file, size, aligned, landmarks, need_landmarks, device)
        except InputError as error:
            if len(files) == 1:
                raise
            print(f"left out: {error}", file=sys.stderr)
            continue
        largest = min(range(len(matrices)), key=lambda i: torch.linalg.det(matrices[i][:, :2]).item())
        images.append(warp_affine(photo, matrices[largest], size, size, "border"))
        points.append(transform_points(faces[largest], matrices[largest]))
        used.append(file)
    if not used:
        raise InputError(f"{source}: none of its {len(files)} pictures can be used as a reference")
    return torch.stack(images), torch.stack(points), used


def _pictures(source, option):
    """The picture files a command line names: one, or those of a folder, sorted."""
    source = Path(source)
    if not source.exists():
        raise InputError(f"{source}: no such file or folder; "
                         f"{option} wants a picture or a folder of pictures")
    files = [source] if source.is_file() else sorted(
        file for file in source.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError(f"{source}: no pictures in it")
    return files


def _faces_of(file, size, aligned, landmarks, need_landmarks, device):
    """A picture's pixels (enlarged where its faces are small), crop matrices and landmarks of its faces."""
    photo, path = read_image(file), find_landmarks(file, landmarks)
    height, width = photo.shape[1:]
    if path is not None:
        points = read_landmarks(path, (height, width), several=True)
    elif aligned and not need_landmarks:
        points = None
    else:
        points = detect_landmarks(photo, device, file, aligned)
    if aligned:
        side, ratio = min(height, width), size / min(height, width)
        corner = torch.tensor([(width - side) / 2, (height - side) / 2])
        matrix = torch.cat([torch.eye(2) * ratio, ((0.5 - corner) * ratio - 0.5)[:, None]], 1)
        matrices = [matrix]
        points = (transform_points(mean_landmarks(size), invert_matrix(matrix))[None] if points is None
                  else points[:1])
    else:
        matrices = [face_matrix(face, size) for face in points]
    sharpest = max(torch.linalg.det(matrix[:, :2]).sqrt().item() for matrix in matrices)
    if sharpest > 1 and height * width * min(sharpest, 4) ** 2 < 50e6:
        factor = min(sharpest, 4)
        grown = round(height * factor), round(width * factor)
        photo = F.interpolate(photo[None], grown, mode="bicubic", antialias=True)[0].clamp(-1, 1)
        stretch = torch.tensor([grown[1] / width, grown[0] / height])
        points = (points + 0.5) * stretch - 0.5
        matrices = [torch.cat([m[:, :2] / stretch,
                               (m[:, 2] + m[:, :2] @ (0.5 / stretch - 0.5))[:, None]], 1) for m in matrices]
    return photo, matrices, points


def run_script(main):
    """Run a script's main(); an InputError becomes a line on stderr and exit status 2, Ctrl-C status 130."""
    try:
        sys.exit(main())
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
