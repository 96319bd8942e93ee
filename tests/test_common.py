"""common.py against independent forms: loops, closed forms, Pillow, NumPy, published numbers."""
import contextlib
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import struct
import sys
import threading
import time
import types
import zlib
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
import torch.nn.functional as F
import torchvision
from conftest import refused
from conftest import uniform as random_images
from PIL import Image, ImageFile, PngImagePlugin
from torch import nn

import common
from common import Degradation, InputError, Range


def levels(image):
    """[-1,1] → whole numbers 0 … 255."""
    return ((image + 1) * 127.5).round()


# ------------------------------------------------------------------------------- 1. Images

RAMP = (np.arange(18 * 20) % 256).astype(np.uint8).reshape(18, 20)     # not square


def saved(folder, picture, name="picture.png", **options):
    picture.save(folder / name, **options)
    return common.read_image(folder / name)


def test_read_image_keeps_axes_channels_and_greyscale(tmp_path):
    array = np.stack([RAMP, 255 - RAMP, RAMP // 2], -1)
    expected = torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(saved(tmp_path, Image.fromarray(array)), expected)
    grey = saved(tmp_path, Image.fromarray(RAMP))
    assert grey.dtype == torch.float32
    torch.testing.assert_close(grey, expected[:1].expand(3, -1, -1))


def test_read_image_lays_transparency_over_white(tmp_path):
    colour = np.array([10, 60, 200])
    alpha = RAMP[..., None].astype(float) / 255
    rgba = np.concatenate([np.broadcast_to(colour, (18, 20, 3)), RAMP[..., None]], 2)
    expected = torch.from_numpy(colour * alpha + 255 * (1 - alpha)).permute(2, 0, 1)
    read = saved(tmp_path, Image.fromarray(rgba.astype(np.uint8), "RGBA"))
    assert (levels(read) - expected).abs().max() <= 1
    grey = saved(tmp_path, Image.fromarray(np.stack([np.full_like(RAMP, 60), RAMP], -1), "LA"))
    assert (levels(grey) - expected[1]).abs().max() <= 1

    picture = Image.fromarray((RAMP > 99).astype(np.uint8), "P")
    picture.putpalette([255, 0, 0, 0, 0, 255])
    image = levels(saved(tmp_path, picture, transparency=0))
    seen = torch.from_numpy(RAMP > 99)
    assert (image[:, ~seen] == 255).all()
    assert (image[:, seen] == torch.tensor([[0.0], [0], [255]])).all()


def test_read_image_keeps_16_bits_and_converts_cmyk(tmp_path):
    array = (np.arange(18 * 20).reshape(18, 20) * 181 + 7).astype(np.uint16)
    expected = torch.from_numpy(array / 65535 * 2 - 1).float()
    read = saved(tmp_path, Image.fromarray(array))
    torch.testing.assert_close(read[1], expected, atol=1e-6, rtol=0)
    red = saved(tmp_path, Image.new("CMYK", (20, 18), (0, 255, 255, 0)), "picture.tif")
    assert torch.equal(red[:, 9, 9], torch.tensor([1.0, -1, -1]))


@pytest.mark.parametrize("orientation, turn", [
    (1, lambda a: a), (3, lambda a: np.rot90(a, 2)), (6, lambda a: np.rot90(a, -1)),
    (8, np.rot90), (2, np.fliplr), (5, np.transpose)])
def test_read_image_applies_the_cameras_rotation(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = saved(tmp_path, Image.fromarray(RAMP), exif=exif)
    assert np.array_equal(levels(image)[0].numpy(), turn(RAMP))


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b""))
            + chunk(b"IEND", b""))


def jpeg_bytes(width=64, height=48):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.mark.parametrize("name, content, message", [
    ("text.jpg", b"these are words, not pixels\n" * 9, "not a readable picture"),
    ("empty.png", b"", "not a readable picture"),
    ("truncated.jpg", jpeg_bytes()[:2000], "not a readable picture"),
    ("dot.png", None, "1×1 pixels is too small"),
    ("large.png", png_header(10000, 9000), "more than 89 megapixels"),
    ("huge.png", png_header(20000, 10000), "more than 89 megapixels")])
def test_read_image_says_in_one_line_what_is_wrong(tmp_path, name, content, message):
    if content is None:
        Image.new("RGB", (1, 1)).save(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with refused(f"{name}.*{message}"):
        common.read_image(tmp_path / name)
    with pytest.raises(InputError, match="nobody.png: no such file"):
        common.read_image(tmp_path / "nobody.png")
    with pytest.raises(InputError, match="not a readable picture"):
        common.read_image(tmp_path)


def test_write_image_is_the_inverse_of_read_image_on_8_bits(tmp_path):
    image = torch.arange(256.0).view(1, 8, 32).repeat(1, 2, 1).expand(3, -1, -1) / 127.5 - 1
    common.write_image(tmp_path / "new" / "a.png", image)
    assert torch.equal(levels(common.read_image(tmp_path / "new" / "a.png")), levels(image))
    with pytest.raises(InputError, match="an unknown kind of picture"):
        common.write_image(tmp_path / "a.nothing", image)
    values = torch.tensor([-9.0, -1, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 1, 3])
    assert common.to_uint8(values).tolist() == [0, 0, 1, 0, 255, 255]


def test_comparison_grid_puts_samples_in_rows_and_entries_in_columns():
    values = [[-1.0, -0.5], [0.0, 0.5]]                               # [entry][sample]
    columns = {name: torch.tensor(v).view(2, 1, 1, 1).expand(2, 3, 40, 32)
               for name, v in zip("ab", values)}
    grid = common.comparison_grid(columns)
    rows = [[grid[0, -y, -x].item() for x in (50, 20)] for y in (60, 20)]
    np.testing.assert_allclose(rows, np.transpose(values), atol=0.01)


# -------------------------------------------------------------------------- 2. Degradation

def tenths(low, high):
    return {k / 10 for k in range(10 * low, 10 * high + 1)}


PAPERS = {       # blur, scale, noise, quality: the papers' sets low:step:high written out
    "gfrnet": ({0} | tenths(1, 3), tenths(1, 8), set(range(8)), {0} | set(range(10, 41)), False),
    "asffnet": (tenths(1, 3), tenths(1, 8), set(range(16)), set(range(10, 61)), True),
    "dfdnet": (tenths(1, 5), tenths(1, 8), set(range(16)), set(range(40, 81)), True),
    "dmdnet": (tenths(1, 3), tenths(1, 10), set(range(16)), set(range(50, 101)), False),
}


@pytest.mark.parametrize("paper", PAPERS)
def test_draws_reach_every_element_of_the_papers_sets_and_no_other(paper):
    model = common.DEGRADATIONS[paper]
    *sets, motion = PAPERS[paper]
    for drawn_from, expected in zip((model.blur, model.scale, model.noise, model.quality), sets):
        drawn = drawn_from.draw(4000, common.seeded(1))
        assert drawn.shape == (4000,) and drawn.dtype == torch.float32
        assert {round(x, 4) for x in drawn.tolist()} == expected
        counts = drawn.unique(return_counts=True)[1] * len(expected) / 4000
        assert 0.4 < counts.min() and counts.max() < 1.8              # uniform, "none" included
    assert (model.motion, model.mode) == (motion, "bicubic")


def test_restoreformers_ranges_are_continuous():
    model = common.DEGRADATIONS["restoreformer"]
    assert set(common.DEGRADATIONS) == {*PAPERS, "restoreformer"}
    ranges = ((0.2, 10), (1, 8), (0, 20), (60, 100))
    for drawn_from, (low, high) in zip((model.blur, model.scale, model.noise, model.quality), ranges):
        drawn = drawn_from.draw(4000, common.seeded(1))
        near = 0.01 * (high - low)
        assert low <= drawn.min() < low + near and high - near < drawn.max() <= high
        assert drawn.unique().numel() > 3900
        assert abs(drawn.mean() - (low + high) / 2) < 0.03 * (high - low)
    assert not model.motion and model.mode == "bilinear"


def mirrored(i, length):
    return -i if i < 0 else 2 * (length - 1) - i if i >= length else i


@pytest.mark.parametrize("sigma", [0.7, 7.5])
def test_gaussian_matrix_is_a_convolution_with_a_mirrored_border(sigma):
    line = np.random.default_rng(0).normal(size=37)
    weights = [math.exp(-k * k / (2 * sigma**2)) for k in range(-30, 31)]
    expected = [sum(w * line[mirrored(i + k, 37)] for k, w in zip(range(-30, 31), weights))
                / sum(weights) for i in range(37)]
    blurred = common.gaussian_matrix(sigma, 37) @ torch.from_numpy(line).float()
    np.testing.assert_allclose(blurred.numpy(), expected, atol=1e-4)
    assert torch.equal(common.gaussian_matrix(0, 5), torch.eye(5))


def test_blur_is_a_convolution_and_not_a_correlation():
    image = random_images(2, 34, 45)
    kernel = torch.zeros(61, 61)
    for i, j, weight in ((30, 30, 0.3), (25, 41, 0.4), (58, 3, 0.2), (0, 33, 0.1)):
        kernel[i, j] = weight
    expected = torch.zeros(2, 34, 45)
    for i, j in kernel.nonzero().tolist():
        rows = [mirrored(y - i + 30, 34) for y in range(34)]
        columns = [mirrored(x - j + 30, 45) for x in range(45)]
        expected += kernel[i, j] * image[:, rows][:, :, columns]
    torch.testing.assert_close(common.blur(image, kernel), expected, atol=2e-6, rtol=0)


def resized(image, height, width, mode):
    """Pillow's anti-aliased resampling of (3,H,W), in floating point."""
    method = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[mode]
    return np.stack([Image.fromarray(channel).resize((width, height), method)
                     for channel in np.asarray(image, dtype=np.float32)])


def literal_degradation(image, kernel, factor, quality, mode):
    """((I ⊗ k) ↓s)_JPEG ↑s step by step at full size → levels 0 … 255."""
    kernel = kernel.flip(0, 1)[None, None].repeat(3, 1, 1, 1)         # conv2d correlates
    reach = kernel.shape[-1] // 2
    blurred = F.conv2d(F.pad(image[None], (reach,) * 4, mode="reflect"), kernel, groups=3)[0]
    height, width = (round(length / factor) for length in image.shape[1:])
    small = resized(blurred, height, width, mode)
    small = np.rint((small + 1) * 127.5).clip(0, 255).astype(np.uint8)
    if quality:
        buffer = io.BytesIO()
        Image.fromarray(small.transpose(1, 2, 0)).save(buffer, "JPEG", quality=quality)
        small = np.array(Image.open(buffer)).transpose(2, 0, 1)
    return torch.from_numpy(np.rint(resized(small, *image.shape[1:], mode)).clip(0, 255))


def gaussian_kernel(sigma):
    reach = math.ceil(4 * sigma)
    line = torch.exp(-torch.arange(-reach, reach + 1) ** 2 / (2 * sigma**2))
    return torch.outer(line, line) / line.sum() ** 2


def fixed(sigma, factor, quality, mode="bicubic", noise=0.0, motion=False):
    ranges = (Range(v, v) for v in (sigma, factor, noise, quality))
    return Degradation(*ranges, motion=motion, mode=mode)


def photos(count=2, height=72, width=90):
    """Smooth colourful pictures with some edges, (count,3,H,W)."""
    image = F.interpolate(random_images(count, 3, 9, 9), (height, width), mode="bicubic").clamp(-1, 1)
    image[:, :, 20:40, 30:60] *= -1
    return image


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("sigma, factor, quality", [
    (1.7, 3.4, 0), (4.0, 1.0, 0), (1.0, 8.0, 0), (2.2, 2.5, 35), (1.5, 4, 90)])
def test_degrade_is_the_equation_step_by_step(mode, sigma, factor, quality):
    target = photos()
    degraded = levels(common.degrade(target, fixed(sigma, factor, quality, mode), common.seeded(0)))
    for image, result in zip(target, degraded):
        literal = literal_degradation(image, gaussian_kernel(sigma), factor, quality, mode)
        error = (literal - result).abs()
        # A level that rounds the other way on the small picture shows in the large one.
        assert error.mean() < (0.1 if quality else 0.03) and error.max() <= (12 if quality else 2)


def test_degrade_without_any_degradation_returns_the_picture():
    target = levels(photos()) / 127.5 - 1
    torch.testing.assert_close(common.degrade(target, fixed(0, 1, 0)), target)


def test_degrade_shakes_half_of_the_pictures_with_one_of_32_kernels():
    image = photos(1, 40, 44)
    shaken = fixed(1.3, 1, 0, motion=True)
    degraded = levels(common.degrade(image.expand(64, -1, -1, -1), shaken, common.seeded(3)))
    kernels = [gaussian_kernel(1.3), *common.motion_kernels()]
    candidates = torch.stack([literal_degradation(image[0], kernel, 1, 0, "bicubic")
                              for kernel in kernels])
    error = (degraded[:, None] - candidates).abs().amax((2, 3, 4))
    assert error.amin(1).max() <= 1
    which = error.argmin(1)
    assert 20 <= (which > 0).sum() <= 44 and which.unique().numel() > 12


def test_a_fixed_scale_fixes_only_the_scale():
    drawn = Degradation(Range(1, 1), Range(1, 8, 0.1), Range(0, 0), Range(0, 0))
    at_4 = common.degrade(photos(6), drawn, common.seeded(0), scale=4)
    assert torch.equal(at_4, common.degrade(photos(6), fixed(1, 4, 0)))
    drawn = Degradation(Range(1, 3, 0.1), Range(1, 8, 0.1), Range(0, 0), Range(0, 0))
    same = common.degrade(photos(1).expand(6, -1, -1, -1), drawn, common.seeded(0), scale=4)
    assert len({image.numpy().tobytes() for image in same}) > 3


@pytest.mark.parametrize("paper", common.DEGRADATIONS)
def test_degrade_repeats_for_a_seed_stays_in_range_and_in_8_bits(paper):
    target = photos(4)
    model = common.DEGRADATIONS[paper]
    one = common.degrade(target, model, common.seeded(5))
    torch.manual_seed(99)                                     # the global stream must not matter
    assert torch.equal(one, common.degrade(target, model, common.seeded(5)))
    assert not torch.equal(one, common.degrade(target, model, common.seeded(6)))
    assert one.shape == target.shape and one.dtype == torch.float32
    assert one.min() >= -1 and one.max() <= 1
    assert ((one + 1) * 127.5 - levels(one)).abs().max() < 1e-4
    assert (one - target).abs().mean() > 0.005


def test_degrade_each_draws_for_a_face_by_its_index_whatever_stands_beside_it():
    model = common.DEGRADATIONS["dfdnet"]
    both = common.degrade_each(photos(2), model, 4, 0, [7, 3])
    assert torch.equal(both[1:], common.degrade_each(photos(2)[1:], model, 4, 0, [3]))
    same = common.degrade_each(photos(1).expand(2, -1, -1, -1), model, 4, 0, [7, 3])
    assert not torch.equal(same[0], same[1])
    assert not torch.equal(both, common.degrade_each(photos(2), model, 4, 1, [7, 3]))        # another seed


def correlation(x, y):
    return np.corrcoef(x.flatten(), y.flatten())[0, 1]


def test_noise_is_white_on_the_small_picture_in_units_of_255():
    grey = torch.zeros(4, 3, 96, 96)
    noise = levels(common.degrade(grey, fixed(0, 1, 0, noise=12), common.seeded(1))) - 127.5
    expected = math.hypot(12, 1 / math.sqrt(12))                      # with the rounding
    assert abs(noise.std() - expected) < 0.2 and abs(noise.mean()) < 0.1
    assert abs(correlation(noise[0, 0], noise[0, 1])) < 0.03
    assert abs(correlation(noise[0], noise[1])) < 0.03
    assert abs(correlation(noise[..., 1:], noise[..., :-1])) < 0.03
    small = common.degrade(grey[:2], fixed(0, 4, 0, noise=12), common.seeded(1))
    assert correlation(small[..., 1:], small[..., :-1]) > 0.8


def test_motion_kernels_are_32_different_centred_camera_shakes():
    kernels = common.motion_kernels()
    width = kernels.shape[1]
    assert kernels.shape == (32, width, width) and width % 2 and kernels.min() >= 0
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(32), atol=1e-4, rtol=0)
    place = torch.arange(width) - width // 2.0
    assert (kernels.sum(1) @ place).abs().max() < 0.1 and (kernels.sum(2) @ place).abs().max() < 0.1
    distance = torch.cdist(kernels.flatten(1), kernels.flatten(1), p=1) + 2 * torch.eye(32)
    assert distance.min() > 0.3                                       # 2 is disjoint, 0 is equal
    for kernel in kernels:
        rows, columns = ((kernel.sum(axis) > 1e-6).nonzero() for axis in (1, 0))
        assert 4 < max(rows.max() - rows.min(), columns.max() - columns.min()) <= 27


def second_moment(kernels):
    place = torch.arange(kernels.shape[1]) - kernels.shape[1] // 2.0
    return kernels.sum(1) @ place**2 + kernels.sum(2) @ place**2


def test_a_smaller_camera_shake_has_the_same_shape():
    whole, half = common.motion_kernels(), common.motion_kernels(zoom=0.5)
    # A point shared by four pixels spreads by at most 1/4 an axis.
    gap = second_moment(whole) / 4 - second_moment(half)
    assert (gap.abs() < 0.5).all() and second_moment(whole).max() > 40


@pytest.mark.parametrize("motion", [False, True])
def test_a_face_of_any_size_is_blurred_by_the_same_part_of_itself(motion):
    """Twice as large, blurred, and halved again it is the one blurred at half size."""
    large = F.interpolate(photos(8, 48, 48), scale_factor=2, mode="bilinear")
    small = F.interpolate(large, scale_factor=0.5, mode="bilinear", antialias=True)
    model = replace(fixed(4, 1, 0, motion=motion), size=96)
    one = common.degrade(small, model, common.seeded(2))
    two = common.degrade(large, model, common.seeded(2))
    two = F.interpolate(two, scale_factor=0.5, mode="bilinear", antialias=True)
    inside = (slice(None), slice(None), slice(6, -6), slice(6, -6))
    assert (one - two)[inside].abs().mean() < 0.01
    unscaled = common.degrade(small, replace(model, size=None), common.seeded(2))
    assert (unscaled - two)[inside].abs().mean() > 0.04


@pytest.mark.parametrize("height, width", [(16, 23), (40, 31)])
def test_resampling_up_equals_pillow(height, width):
    """On the GPU as on the CPU: two matrices, not an operator that only one of them has."""
    small = torch.randint(256, (3, height, width), generator=common.seeded(0)).to(torch.uint8)
    rows, columns = (common._resampling(n, 96, "bicubic", "cpu") for n in (height, width))
    ours = (rows @ small.float() @ columns.T).round().clamp(0, 255)
    literal = np.rint(resized(small, 96, 96, "bicubic")).clip(0, 255)
    assert (ours - torch.from_numpy(literal)).abs().max() <= 1


@pytest.mark.cuda
def test_degrade_on_a_gpu_equals_the_cpu_without_noise():
    model = fixed(1.7, 3, 0)
    on_gpu = common.degrade(photos().cuda(), model, common.seeded(0))
    on_cpu = common.degrade(photos(), model, common.seeded(0))
    assert on_gpu.is_cuda and (levels(on_gpu.cpu()) - levels(on_cpu)).abs().max() <= 1


# ---------------------------------------------------------------------------- 3. Landmarks

def template_face(size=512, seed=0):
    """68 points (68,2) whose eye centres, nose tip and mouth corners lie on FFHQ's template."""
    five = torch.tensor([[192.98, 239.95], [318.90, 240.19], [256.63, 314.02], [201.26, 371.41],
                         [313.09, 371.15]])
    points = 256 + 120 * random_images(68, 2, seed=seed)
    angle = torch.arange(6) * math.pi / 3
    ring = torch.stack([25 * angle.cos(), 9 * angle.sin()], 1)
    points[36:42] = five[0] + ring
    points[42:48] = five[1] + ring
    points[[30, 48, 54]] = five[2:]
    return (points + 0.5) * size / 512 - 0.5


def similar(points, scale, degrees, shift):
    turn = math.radians(degrees)
    matrix = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    return points @ (torch.tensor(matrix) * scale).T + torch.tensor(shift)


def test_landmarks_are_written_and_read(tmp_path):
    points = template_face(128)
    common.write_landmarks(tmp_path / "one.txt", points)
    lines = (tmp_path / "one.txt").read_text().splitlines()
    assert [len(line.split()) for line in lines] == [2] * 68
    read = common.read_landmarks(tmp_path / "one.txt", (128, 128))
    torch.testing.assert_close(read, points, atol=6e-4, rtol=0)
    several = torch.stack([points, points + 3.25])
    common.write_landmarks(tmp_path / "two.txt", several)
    read = common.read_landmarks(tmp_path / "two.txt", several=True)
    torch.testing.assert_close(read, several, atol=6e-4, rtol=0)
    assert common.read_landmarks(tmp_path / "one.txt", several=True).shape == (1, 68, 2)
    common.write_landmarks(tmp_path / "cut.txt", points - 50)         # by the picture's corner
    assert common.read_landmarks(tmp_path / "cut.txt", (128, 128)).min() < 0
    with pytest.raises(InputError, match="no such landmark file"):
        common.read_landmarks(tmp_path / "none.txt")


def moved(x=0, y=0):
    return [f"{u + x:.3f} {v + y:.3f}" for u, v in template_face(128).tolist()]


@pytest.mark.parametrize("lines, message", [
    (moved()[:67], "67 landmarks"), ([], "0 landmarks"), (moved() * 2, "136 landmarks"),
    (moved()[:-1] + ["nan 4"], "not a finite number"),
    (moved()[:-1] + ["4 inf"], "not a finite number"),
    (moved()[:-1] + ["here there"], "not a landmark file"), (["\xff\xfe"], "not a landmark file"),
    (moved()[:-1] + ["1 2 3"], "not a landmark file"), (["5 5"] * 68, "lie in one place"),
    (moved(x=128), "outside the 128×140 picture"), (moved(y=-128), "outside the 128×140 picture"),
    (moved(y=90), "outside the 128×140 picture")])
def test_wrong_landmarks_are_named(tmp_path, lines, message):
    (tmp_path / "face.txt").write_bytes("\n".join(lines).encode("latin-1"))
    with refused(f"face.txt: .*{message}"):
        common.read_landmarks(tmp_path / "face.txt", (140, 128))


def test_landmarks_lie_beside_the_picture_or_in_a_parallel_folder(tmp_path):
    picture = tmp_path / "anna" / "a.jpg"
    picture.parent.mkdir()
    assert common._find_landmarks(picture) is None
    assert common._find_landmarks(picture, tmp_path / "marks") is None
    places = ("anna/a.txt", "anna/a.jpg.txt", "marks/a.txt", "marks/a.jpg.txt", "marks/anna/a.txt",
              "marks/anna/a.jpg.txt")
    for place in places:
        (tmp_path / place).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / place).touch()
        folder = tmp_path / "marks" if place.startswith("marks") else None
        found = common._find_landmarks(picture, folder)
        assert found == tmp_path / place                              # the more exact name wins


def test_similarity_is_the_least_squares_solution():
    rng = np.random.default_rng(0)
    source = rng.uniform(0, 200, (9, 2))
    target = similar(torch.from_numpy(source).float(), 0.6, 25, [12.0, -7]).numpy()
    target = target + rng.normal(0, 3, (9, 2))
    x, y, one, zero = source[:, 0], source[:, 1], np.ones(9), np.zeros(9)
    equations = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    a, b, c, d = np.linalg.lstsq(equations, target.T.reshape(-1), rcond=None)[0]
    matrix = common.similarity(torch.from_numpy(source).float(), torch.from_numpy(target).float())
    np.testing.assert_allclose(matrix.numpy(), [[a, -b, c], [b, a, d]], rtol=1e-4, atol=1e-4)


def waves(x, y):
    """A smooth picture of pixel positions: a shift by half a pixel changes it by up to 0.1."""
    return torch.stack([(x / 6 + y / 9).sin(), (x / 11 - y / 7).cos(), (y / 6).sin() * (x / 8).cos()])


def positions(height, width):
    """x,y of every pixel, (height,width,2)."""
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return torch.stack([x, y], -1)


def waves_photo(height, width, stretch=1.0):
    return waves(*(positions(height, width) / stretch).unbind(-1))


@pytest.mark.parametrize("face, size, stretch", [(100, 128, 1), (170, 128, 1), (400, 64, 5), (460, 128, 4)])
def test_align_face_is_exact_to_a_fraction_of_a_pixel(face, size, stretch):
    photo = waves_photo(430, 540, stretch)
    landmarks = similar(template_face(face), 1, 12, [(540 - face) / 2 + 11.3, (430 - face) / 2 - 6.7])
    crop, local, matrix = common.align_face(photo, landmarks, size)
    torch.testing.assert_close(local, template_face(size), atol=2e-3, rtol=0)
    source = common.transform_points(positions(size, size), common.invert_matrix(matrix))
    inside = ((source > 10) & (source < torch.tensor([530, 420]))).all(-1)
    error = (crop - waves(*(source / stretch).unbind(-1)))[:, inside]
    assert inside.float().mean() > 0.5
    assert error.square().mean().sqrt() < 0.02               # half a pixel off: 0.05 and more


@pytest.mark.parametrize("face, size, stretch", [(170, 256, 1), (150, 128, 1), (120, 512, 2), (330, 96, 8)])
def test_paste_face_undoes_align_face_and_leaves_the_rest_alone(face, size, stretch):
    photo = waves_photo(400, 420, stretch)
    landmarks = similar(template_face(face), 1, -9, [(420 - face) / 2, (400 - face) / 2])
    crop, _, matrix = common.align_face(photo, landmarks, size)
    pasted = common.paste_face(photo, crop, matrix)
    place = common.transform_points(positions(400, 420), matrix) / (size - 1)
    middle = ((place > 0.15) & (place < 0.85)).all(-1)
    outside = ((place < -0.03) | (place > 1.03)).any(-1)
    error = (pasted - photo)[:, middle]
    assert error.square().mean().sqrt() < 0.012              # half a pixel off: 0.05 and more
    assert torch.equal(pasted[:, outside], photo[:, outside])
    def chequers(place):
        return torch.sin(8 * 2 * math.pi * place).prod(-1)              # whose mean is 0
    bumps = chequers(positions(size, size) / (size - 1))
    change = common.paste_face(photo, crop + bumps, matrix) - pasted
    expected = chequers(place)[middle].expand(3, -1)
    torch.testing.assert_close(change[:, middle], expected, atol=0.25, rtol=0)
    assert (change[:, middle] - expected).square().mean().sqrt() < 0.06
    assert torch.equal(change[:, outside], torch.zeros_like(change[:, outside]))
    inside = ((place > 0.0) & (place < 1.0)).all(-1)
    rim = inside & ~((place > 0.04) & (place < 0.96)).all(-1)
    assert 0.05 < change[:, rim].std() < 0.5 * change[:, middle].std()               # the border fades


def literal_boxes(landmarks, size):
    """The formula of component_boxes' docstring, number by number."""
    groups = ([*range(17, 22), *range(36, 42)], [*range(22, 27), *range(42, 48)], range(29, 36),
              range(48, 68))
    boxes = []
    for points in landmarks.tolist():
        for group in groups:
            xs, ys = zip(*(points[k] for k in group))
            half = max(max(max(xs) - min(xs), max(ys) - min(ys)) / 2, size / 32)
            low = [min(max(sum(v) / len(v) - half + 1, 0), size - size / 32) for v in (xs, ys)]
            high = [max(min(sum(v) / len(v) + half, size), a + size / 32) for v, a in zip((xs, ys), low)]
            boxes.append(low + high)
    return torch.tensor(boxes).view(-1, 4, 4)


@pytest.mark.parametrize("size", [32, 128, 512])
def test_component_boxes_follow_their_formula_stay_inside_and_never_vanish(size):
    shifts = random_images(400, 1, 2, seed=2) * 2.5 * size
    spreads = torch.rand(400, 1, 1, generator=common.seeded(3)) ** 3
    landmarks = (template_face(size) - size / 2) * spreads + size / 2 + shifts   # off every edge
    landmarks = torch.cat([landmarks, template_face(size)[None]])
    boxes = common.component_boxes(landmarks, size)
    assert boxes.isfinite().all() and boxes.min() >= 0 and boxes.max() <= size
    assert (boxes[..., 2:] - boxes[..., :2]).min() >= size / 32 - 1e-3
    torch.testing.assert_close(boxes, literal_boxes(landmarks, size), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("size", [64, 512])
def test_mean_landmarks_lie_near_the_template_and_left_is_the_images_left(size):
    points = common.mean_landmarks(size)
    distance = (common.five_points(points) - common.five_points(template_face(size))).norm(dim=1)
    assert points.shape == (68, 2) and distance.max() < 0.025 * size
    torch.testing.assert_close((points + 0.5) * 512 / size, common.mean_landmarks(512) + 0.5)
    boxes = common.component_boxes(points[None], size)[0]
    left, right, nose, mouth = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert left[0] < nose[0] < right[0] and left[1] < nose[1] < mouth[1]
    assert abs(left[1] - right[1]) < size / 16


def test_landmark_heatmaps_equal_a_loop():
    points = torch.tensor([[[3.0, 7.0], [10.5, 2.25], [-4, 30]]]).repeat(1, 23, 1)[:, :68]
    maps = common.landmark_heatmaps(points, 16, sigma=1.5)
    assert maps.shape == (1, 68, 16, 16) and maps[0, 0, 7, 3] == 1
    for k in (0, 1, 2, 67):
        for y in range(16):
            for x in range(16):
                distance = (x - points[0, k, 0]) ** 2 + (y - points[0, k, 1]) ** 2
                assert abs(maps[0, k, y, x] - math.exp(-distance / 4.5)) < 1e-6


def test_landmark_mask_equals_a_loop_and_leaves_the_jaw_out():
    points = template_face(32)[None]
    expected = torch.zeros(32, 32)
    for u, v in points[0, 17:].tolist():
        for y in range(32):
            for x in range(32):
                if (x - u) ** 2 + (y - v) ** 2 <= 2.5**2:
                    expected[y, x] = 1
    assert torch.equal(common.landmark_mask(points, 32, radius=2.5)[0, 0], expected)
    jaw = torch.full((1, 68, 2), -99.0).index_fill(1, torch.arange(17), 9)
    assert 0 < expected.mean() < 1 and common.landmark_mask(jaw, 32).sum() == 0


def test_draw_landmarks_marks_the_points_and_keeps_the_rest():
    image = torch.zeros(3, 128, 128)
    drawn = common.draw_landmarks(image, template_face(128))
    x, y = template_face(128)[30].round().int().tolist()
    assert drawn.shape == image.shape and drawn[1, y, x] > 0.9 and drawn[0, y, x] < 0
    assert (drawn.abs() < 0.01).all(0).float().mean() > 0.5 and image.abs().max() == 0


def detector_of(monkeypatch, faces, kinds=("TWO_D",)):
    """Puts a detector that finds `faces` in the place of face-alignment → what it was asked."""
    asked = []

    def detector(kind, device, flip_input):
        def find(picture):
            asked.append((kind, device, picture))
            return faces
        return types.SimpleNamespace(get_landmarks_from_image=find)
    module = types.SimpleNamespace(LandmarksType=types.SimpleNamespace(**{k: k for k in kinds}),
                                   FaceAlignment=detector)
    monkeypatch.setitem(sys.modules, "face_alignment", module)
    common._landmark_detector.cache_clear()
    return asked


@pytest.fixture(autouse=True)
def no_detector_stays():
    yield
    common._landmark_detector.cache_clear()


@pytest.mark.parametrize("name", ["TWO_D", "_2D"])
def test_detect_landmarks_speaks_to_both_versions_of_face_alignment(monkeypatch, name):
    faces = [template_face(64).numpy(), template_face(64).numpy() + 5]
    asked = detector_of(monkeypatch, faces, (name, "_3D"))
    image = random_images(3, 40, 50)
    found = common.detect_landmarks(image, torch.device("cpu"))
    torch.testing.assert_close(found, torch.stack([template_face(64), template_face(64) + 5]))
    (kind, device, picture), = asked
    assert (kind, device, picture.dtype) == (name, "cpu", np.uint8)
    assert np.array_equal(picture, levels(image).permute(1, 2, 0).numpy())


def test_detect_landmarks_without_the_detector_or_a_face_names_the_ways_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "face_alignment", None)          # import then fails
    monkeypatch.setitem(sys.modules, "dlib", None)
    ways = ("a.jpg.txt", "pip install face-alignment", "--aligned")
    for aligned in (False, True):
        with pytest.raises(InputError) as error:
            common.detect_landmarks(torch.zeros(3, 40, 40), name="a.jpg", aligned=aligned)
        assert [way in str(error.value) for way in ways] == [True, True, not aligned]
    for nobody in (None, []):
        detector_of(monkeypatch, nobody)
        with pytest.raises(InputError, match="a.jpg: no face found"):
            common.detect_landmarks(torch.zeros(3, 40, 40), name="a.jpg")


# ------------------------------------------------------------------------------ 4. Metrics

def measured_pictures():
    y, x = np.mgrid[:40, :48].astype(np.float64)
    one = np.stack([np.sin(x / 5 + c) * np.cos(y / 7 - c) * 0.8 for c in range(3)])
    two = np.clip(one * 0.9 + 0.15 * np.sin(x * y / 11 + np.arange(3)[:, None, None]) + 0.05, -1, 1)
    three = np.clip(one + 0.02 * np.cos(3 * x + 2 * y), -1, 1)
    return (torch.from_numpy(v).float()[None] for v in (one, two, three))


def test_psnr_and_ssim_equal_scikit_image():
    # structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=2)
    one, two, three = measured_pictures()
    restored, target = torch.cat([two, three]), one.expand(2, -1, -1, -1)
    np.testing.assert_allclose(common.psnr(restored, target), [24.0574166, 43.0050332], atol=1e-4)
    np.testing.assert_allclose(common.ssim(restored, target), [0.6227408, 0.9941536], atol=1e-5)
    torch.testing.assert_close(common.ssim(target, restored), common.ssim(restored, target))
    torch.testing.assert_close(common.ssim(target, target), torch.ones(2))


def test_detail_is_the_share_of_fine_energy():
    def energy(picture):
        padded = np.pad(picture, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        total = 0.0
        for c in range(3):
            for y in range(picture.shape[1]):
                for x in range(picture.shape[2]):
                    total += (picture[c, y, x] - padded[c, y:y + 5, x:x + 5].mean()) ** 2
        return total
    image, target = random_images(2, 3, 9, 11), random_images(2, 3, 9, 11, seed=1) * 0.3
    expected = [energy(a.double().numpy()) / energy(b.double().numpy()) for a, b in zip(image, target)]
    np.testing.assert_allclose(common.detail(image, target), expected, rtol=1e-4)
    torch.testing.assert_close(common.detail(target * 0.5 + 0.2, target), torch.full((2,), 0.25))
    assert common.detail(target, torch.zeros_like(target)).isfinite().all()


def test_identity_distance_is_the_angle_in_degrees_whatever_the_length():
    angles = torch.deg2rad(torch.tensor([0.0, 60, 135]))
    one = torch.stack([torch.ones(3), torch.zeros(3)], 1) * 7
    two = torch.stack([angles.cos(), angles.sin()], 1) * 0.3

    def net(x):
        return one if x[0, 0, 0, 0] == 0 else two
    distance = common.identity_distance(net, torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8))
    torch.testing.assert_close(distance, torch.tensor([0.0, 60, 135]), atol=1e-3, rtol=0)


def exact_sample(mean, root, count=50):
    """Points (count,D) whose sample mean and covariance root·rootᵀ are exact."""
    x = torch.randn(count, len(mean), generator=common.seeded(0), dtype=torch.double)
    x = torch.linalg.qr(x - x.mean(0))[0] * math.sqrt(count - 1)
    return x @ torch.tensor(root, dtype=torch.double).T + torch.tensor(mean, dtype=torch.double)


def test_frechet_distance_equals_its_closed_forms():
    one = exact_sample([1, 2, 3], np.diag([2, 1, 5]).tolist())
    two = exact_sample([1, 0, 4], np.diag([1, 3, 5]).tolist())
    expected = 4 + 1 + 1 + 4                                          # |μ1−μ2|² + Σ (σ1−σ2)²
    assert abs(common.frechet_distance(one, two) - expected) < 1e-6
    a, b = np.array([[2, 0], [1.5, 1]]), np.array([[1, 0], [-2, 0.5]])  # they do not commute
    c1, c2 = a @ a.T, b @ b.T
    root = math.sqrt(np.trace(c1 @ c2) + 2 * math.sqrt(np.linalg.det(c1 @ c2)))  # of a 2×2 matrix
    one, two = exact_sample([0, 0], a.tolist()), exact_sample([3, 0], b.tolist(), 70)
    assert abs(common.frechet_distance(one, two) - (9 + np.trace(c1 + c2) - 2 * root)) < 1e-6


def test_frechet_distance_of_fewer_pictures_than_features():
    one = random_images(6, 40).double()
    assert abs(common.frechet_distance(one, one)) < 1e-4
    assert abs(common.frechet_distance(one, one + 0.5) - 40 * 0.25) < 1e-4
    many = random_images(300, 40, seed=1).double()
    c1, c2 = (np.cov(x.numpy().T) for x in (one, many))
    values = np.linalg.eigvals(c1 @ c2).real.clip(0)
    expected = ((one.mean(0) - many.mean(0)) ** 2).sum() + np.trace(c1 + c2) - 2 * np.sqrt(values).sum()
    assert abs(common.frechet_distance(one, many) - expected) < 1e-4


def test_frechet_distance_of_many_pictures_needs_no_matrix_of_all_pairs(monkeypatch):
    shapes = []
    svdvals = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda x: shapes.append(x.shape) or svdvals(x))
    common.frechet_distance(random_images(500, 4), random_images(700, 4, seed=1))
    assert shapes == [(4, 4)]


ALEXNET = "alexnet-owt-7be5be79.pth"


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """Random weights in the published files' layout: AlexNet's and LPIPS's own."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(0)
    features = torchvision.models.alexnet(weights=None).features.state_dict()
    backbone = {f"features.{name}": value for name, value in features.items()}
    widths = (64, 192, 384, 256, 256)
    linear = {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate(widths)}
    torch.save(backbone | {"classifier.6.bias": torch.zeros(1000)}, folder / ALEXNET)
    torch.save(linear, folder / "alex.pth")
    return folder / ALEXNET, folder / "alex.pth", linear


def test_lpips_equals_the_published_form_and_hands_gradients_on(lpips_files):
    backbone, file, linear = lpips_files
    measure = common.LPIPS(file, backbone)
    one, two = random_images(2, 3, 64, 64).requires_grad_(), random_images(2, 3, 64, 64, seed=1)
    assert measure(one, one).abs().max() == 0
    torch.testing.assert_close(measure(one, two), measure(two, one))
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ([-.030, -.088, -.188], [.458, .448, .450]))
    net = torchvision.models.alexnet(weights=None).features
    net.load_state_dict(measure.features.state_dict())
    for k in range(2):
        total = 0.0
        for layer, end in enumerate((2, 5, 8, 10, 12)):               # after each ReLU
            maps = [net[:end](((picture[k] - shift) / scale)[None])[0].detach() for picture in (one, two)]
            x, y = (m / m.norm(dim=0, keepdim=True).clamp(min=1e-10) for m in maps)
            weights = linear[f"lin{layer}.model.1.weight"].flatten()
            total += sum(w * ((p - q) ** 2).mean() for w, p, q in zip(weights, x, y))
        torch.testing.assert_close(measure(one, two)[k], total, rtol=1e-4, atol=1e-6)
    measure(one, two).sum().backward()
    assert one.grad.abs().max() > 0 and not any(p.requires_grad for p in measure.parameters())


def test_lpips_takes_alexnet_from_torchvision_and_says_where_it_goes(lpips_files, tmp_path, monkeypatch):
    backbone, file, _ = lpips_files
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(requests, "get", refuse)
    place = tmp_path / "hub" / "checkpoints"
    with refused(f"or put {ALEXNET} into {place}"):
        common.LPIPS(file)
    place.mkdir(parents=True, exist_ok=True)
    shutil.copy(backbone, place / ALEXNET)
    one, two = random_images(1, 3, 64, 64), random_images(1, 3, 64, 64, seed=1)
    torch.testing.assert_close(common.LPIPS(file)(one, two), common.LPIPS(file, backbone)(one, two))


def refuse(*_, **__):
    raise requests.ConnectionError("no network here")


def test_lpips_and_fid_refuse_other_files_and_name_their_own(lpips_files, tmp_path):
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    for make, wanted in ((lambda file: common.LPIPS(file, lpips_files[0]), "weights/v0.1/alex.pth"),
                         (common.FID, "pt_inception-2015-12-05-6726825d.pth")):
        for file in ("none.pth", "other.pth"):
            with refused(f"{file}: .*{wanted}"):
                make(tmp_path / file)


@pytest.mark.slow
def test_fid_pools_as_the_original_network_and_is_zero_for_a_set_with_itself(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                          init_weights=False).eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):          # features that do not fade through 90 layers
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    state = {name: value for name, value in net.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "inception.pth")
    fid, images = common.FID(tmp_path / "inception.pth"), random_images(2, 3, 40, 40)
    features = fid.features([images[:1], images[1:]])
    assert features.shape == (2, 2048) and features.std() > 0.01

    # The original averages over the pixels inside only; its last block takes a maximum instead.
    pools = types.SimpleNamespace(**vars(F))
    pools.avg_pool2d = functools.partial(F.avg_pool2d, count_include_pad=False)
    last = types.SimpleNamespace(**{**vars(F), "avg_pool2d": F.max_pool2d})
    monkeypatch.setattr(torchvision.models.inception, "F", pools)
    net.fc = nn.Identity()
    net.Mixed_7c.register_forward_pre_hook(
        lambda *_: monkeypatch.setattr(torchvision.models.inception, "F", last))
    with torch.inference_mode():
        expected = net(F.interpolate(images, (299, 299), mode="bilinear", align_corners=False))
    assert (features - expected).norm() < 1e-4 * expected.norm()
    assert abs(fid([images], [images])) < 1e-3 * features.square().sum(1).mean()


def test_paired_gain_is_the_mean_with_its_95_percent_interval():
    baseline = 20 + random_images(200)
    gains = 0.5 + 2 * torch.randn(200, generator=common.seeded(1))
    result = common.paired_gain(baseline + gains, baseline)
    (low, high), mean, error = result["ci95"], gains.mean().item(), gains.std().item() / math.sqrt(200)
    assert abs(result["mean"] - mean) < 1e-5 and low < mean < high
    assert abs(low - (mean - 1.96 * error)) < 0.2 * error
    assert abs(high - (mean + 1.96 * error)) < 0.2 * error
    assert common.paired_gain(baseline + gains, baseline) == json.loads(json.dumps(result))


# ------------------------------------------------------------------- 5. Faces from folders

def flat_folder(root, face_folder, count=4):
    root.mkdir(exist_ok=True)
    for i in range(count):
        source = face_folder / f"person_{i % 24:02d}" / f"shot_{i // 24}.png"
        shutil.copy(source, root / f"{i:03d}.png")
        shutil.copy(f"{source}.txt", root / f"{i:03d}.png.txt")
    return root


def bare_folder(root, face_folder, count=4):
    """Pictures without landmark files."""
    for file in flat_folder(root, face_folder, count).glob("*.txt"):
        file.unlink()
    return root


def test_face_folder_reads_a_folder_a_person(face_folder):
    faces = common.FaceFolder(face_folder, 64)
    rendered = common.RenderedFaces(64, identities=24, per_identity=5)
    assert len(faces) == 120 and torch.equal(faces.identity, rendered.identity)
    assert faces.names == [f"person_{i:02d}" for i in range(24)]
    assert faces.others(119) == [115, 116, 117, 118] and faces.others(7) == rendered.others(7)
    for i in (0, 61, 119):
        assert torch.equal(levels(faces[i].image), levels(rendered[i].image))
        assert faces[i].identity == i // 5
        torch.testing.assert_close(faces[i].landmarks, rendered[i].landmarks, atol=6e-4, rtol=0)
        torch.testing.assert_close(faces.landmarks(i), faces[i].landmarks)


def test_face_folder_resizes_pictures_with_their_landmarks(face_folder):
    small, large = common.FaceFolder(face_folder, 32)[3], common.FaceFolder(face_folder, 64)[3]
    assert small.image.shape == (3, 32, 32)
    torch.testing.assert_close(small.landmarks, (large.landmarks + 0.5) / 2 - 0.5, atol=1e-4, rtol=0)
    averaged = F.avg_pool2d(large.image, 2)
    unshifted, shifted = ((small.image - other).abs().mean() for other in (averaged, averaged.roll(1, 2)))
    assert unshifted < 0.3 * shifted


def test_face_folder_reads_a_flat_folder_of_many_modes_and_sizes(tmp_path, face_folder):
    root = flat_folder(tmp_path / "flat", face_folder)
    Image.open(root / "000.png").convert("L").save(root / "000.png")
    Image.open(root / "001.png").convert("RGBA").resize((128, 128)).save(root / "001.png")
    points = (common.read_landmarks(root / "001.png.txt") + 0.5) * 2 - 0.5
    common.write_landmarks(root / "001.png.txt", points)
    wide = Image.new("RGB", (100, 70), "gray")
    wide.paste(Image.open(root / "002.png"), (30, 4))
    wide.save(root / "002.png")
    shifted = common.read_landmarks(root / "002.png.txt") + torch.tensor([30, 4])
    common.write_landmarks(root / "002.png.txt", shifted)
    (root / "notes.md").write_text("not a picture, and not taken for one")
    faces = common.FaceFolder(root, 64)
    assert faces.names == ["000.png", "001.png", "002.png", "003.png"]
    assert faces.identity.tolist() == [0, 1, 2, 3] and faces.others(1) == []
    assert all(face.image.shape == (3, 64, 64) for face in faces)
    assert torch.equal(faces[0].image[0], faces[0].image[1])
    torch.testing.assert_close(faces[1].landmarks, (points + 0.5) / 2 - 0.5, atol=1e-3, rtol=0)
    aligned = common.five_points(faces[2].landmarks)              # not square: cut out by its landmarks
    assert (aligned - common.five_points(template_face(64))).norm(dim=1).max() < 6


def test_face_folder_takes_landmarks_from_a_parallel_folder_or_aligned_crops(tmp_path, face_folder):
    marks = tmp_path / "marks"
    for file in face_folder.glob("person_0[01]/*"):
        place = (marks if file.suffix == ".txt" else tmp_path / "pictures") / file.parent.name / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    faces = common.FaceFolder(tmp_path / "pictures", 64, landmarks=marks)
    expected = common.read_landmarks(marks / "person_01" / "shot_2.png.txt")
    torch.testing.assert_close(faces[7].landmarks, expected, atol=1e-4, rtol=0)
    crops = common.FaceFolder(tmp_path / "pictures", 64, aligned=True)
    assert torch.equal(crops[7].image, faces[7].image)
    assert torch.equal(crops[7].landmarks, common.mean_landmarks(64))


def test_aligned_crops_do_not_get_average_landmarks_where_a_method_needs_their_own(
        tmp_path, face_folder, monkeypatch):
    root = bare_folder(tmp_path / "bare", face_folder)
    asked = detector_of(monkeypatch, [template_face(64).numpy()])
    assert len(common.FaceFolder(root, 64, aligned=True)) == 4 and asked == []
    faces = common.FaceFolder(root, 64, aligned=True, need_landmarks=True)
    torch.testing.assert_close(faces[2].landmarks, template_face(64), atol=1e-3, rtol=0)
    assert len(asked) == 4
    monkeypatch.setitem(sys.modules, "face_alignment", None)
    monkeypatch.setitem(sys.modules, "dlib", None)
    common._landmark_detector.cache_clear()
    root = bare_folder(tmp_path / "others", face_folder)
    with refused("pip install face-alignment") as error:
        common.FaceFolder(root, 64, aligned=True, need_landmarks=True)
    assert "--aligned" not in str(error.value)


def test_face_folder_without_landmarks_or_pictures_says_so(tmp_path, face_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "face_alignment", None)
    monkeypatch.setitem(sys.modules, "dlib", None)
    (tmp_path / "empty").mkdir()
    bare_folder(tmp_path / "bare", face_folder, 1)
    for root, message in (("none", "no such folder"), ("empty", "no pictures"), ("bare", "--aligned")):
        with pytest.raises(InputError, match=message):
            common.FaceFolder(tmp_path / root, 64)
    with pytest.raises(InputError, match="no such folder of landmark files"):
        common.FaceFolder(face_folder, 64, landmarks=tmp_path / "none")


def test_face_folder_names_and_skips_a_few_unreadable_files(tmp_path, face_folder, capsys):
    root = flat_folder(tmp_path / "flat", face_folder, 40)
    (root / "007.png").write_text("text, not pixels")
    (root / "020.png").write_bytes((root / "020.png").read_bytes()[:-2000])
    faces = common.FaceFolder(root, 64)
    images = [face.image for face in faces]
    told = capsys.readouterr().err
    assert 38 <= len(faces) <= 39 and len(images) == len(faces)
    assert told.count("007.png") == 1 and told.count("020.png") == 1


def test_a_damaged_picture_is_only_replaced_by_one_of_the_same_person(tmp_path, face_folder):
    root = shutil.copytree(face_folder, tmp_path / "faces")
    file = root / "person_03" / "shot_4.png"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255                    # its head and its end are whole
    file.write_bytes(data)
    faces = common.FaceFolder(root, 64)
    assert len(faces) == 120 and not faces.damaged(19)
    assert [face.identity for face in faces] == faces.identity.tolist()
    assert faces.damaged(19) and torch.equal(faces[19].image, faces[15].image)


def test_face_folder_with_more_than_5_percent_unreadable_is_an_error(tmp_path, face_folder):
    root = flat_folder(tmp_path / "flat", face_folder, 30)
    (root / "003.png").write_text("text")
    whole = (root / "004.png").read_bytes()
    (root / "004.png").write_bytes(whole[:-2000])
    with pytest.raises(InputError, match="2 of 30 .*5 %.*003.png.*004.png"):
        list(common.FaceFolder(root, 64))
    (root / "004.png").write_bytes(whole)
    common.write_landmarks(root / "004.png.txt", template_face(64)[:60])
    with pytest.raises(InputError, match="5 %.*60 landmarks"):
        common.FaceFolder(root, 64)


def test_face_folder_reads_only_the_heads_of_the_files_at_first(face_folder, monkeypatch):
    read = []
    for kind in (ImageFile.ImageFile, PngImagePlugin.PngImageFile):
        monkeypatch.setattr(kind, "load", lambda picture: read.append(picture.filename))
    assert len(common.FaceFolder(face_folder, 64)) == 120 and read == []


def test_fingerprint_is_of_names_sizes_landmarks_and_options_and_not_of_the_place(tmp_path, face_folder):
    root = flat_folder(tmp_path / "flat", face_folder)
    first = common.FaceFolder(root, 64).fingerprint
    copy = flat_folder(tmp_path / "elsewhere", face_folder)
    assert common.FaceFolder(copy, 64).fingerprint == first
    prints = [first, common.FaceFolder(root, 32).fingerprint,
              common.FaceFolder(root, 64, aligned=True).fingerprint,
              common.FaceFolder(root, 64, landmarks=root).fingerprint]
    points = common.read_landmarks(root / "001.png.txt")
    points[40, 0] += 0.001                                            # corrected by a hair
    common.write_landmarks(root / "001.png.txt", points)
    prints.append(common.FaceFolder(root, 64).fingerprint)
    (root / "000.png").rename(root / "more.png")
    (root / "000.png.txt").rename(root / "more.png.txt")
    prints.append(common.FaceFolder(root, 64).fingerprint)
    assert len(set(prints)) == len(prints)


def people(names, pictures=1):
    identity = torch.arange(len(names)).repeat_interleave(pictures)
    return types.SimpleNamespace(names=list(names), identity=identity)


def share(name):
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 16**16


def test_split_identities_follows_from_the_name():
    names = [f"name {i}" for i in range(200)]
    faces = people(names, pictures=3)
    order = torch.randperm(600, generator=common.seeded(1))
    faces.identity = faces.identity[order]
    parts = common.split_identities(faces)
    assert sorted(sum(parts, [])) == list(range(600)) and all(part == sorted(part) for part in parts)
    bounds = ((0.12, 1), (0.08, 0.12), (0, 0.08))                     # training, validation, test
    for part, (low, high) in zip(parts, bounds):
        expected = {number for number, name in enumerate(names) if low <= share(name) < high}
        assert expected and set(faces.identity[part].tolist()) == expected


def test_more_people_never_make_a_trained_person_a_test_person():
    rng = np.random.default_rng(0)
    pool = [f"person {i}" for i in range(3000)]
    held_out = [name for name in pool if share(name) < 0.12]
    for trial in range(60):
        names = list(rng.permutation(pool)[:40])
        if trial % 2:                              # many who are held out, in any order
            names = {*names[:12], *rng.permutation(held_out)[:12]}
            names = list(rng.permutation(sorted(names)))
        trained = set()
        for count in range(3, len(names) + 1):
            faces = people(names[:count])
            try:
                parts = common.split_identities(faces)
            except InputError:                     # all of them are held out by their names
                assert all(share(name) < 0.12 for name in faces.names)
                continue
            training, validation, test = ({names[i] for i in part} for part in parts)
            assert training and validation and test
            assert len(training) + len(validation) + len(test) == count
            assert training | validation | test == set(faces.names)
            trained |= training
            assert not trained & test


def test_split_identities_of_few_people():
    names = sorted((f"name {i}" for i in range(1000)), key=share)
    large = [name for name in names if share(name) > 0.12]
    parts = common.split_identities(people([large[5], large[0], large[9], large[2]]))
    assert parts == [[0, 2], [3], [1]]             # the smallest is test, the second validation
    small = [name for name in names if share(name) < 0.08]
    assert common.split_identities(people([large[0], *small[:3]])) == [[0], [2], [1, 3]]
    with pytest.raises(InputError, match="2 identities are too few"):
        common.split_identities(people("ab"))
    with pytest.raises(InputError, match="add people to train on"):
        common.split_identities(people(small[:3]))


def test_the_faces_measured_are_spread_over_those_that_a_method_can_restore():
    """Training takes them so; --evaluate has to take the same."""
    faces = people([f"person {number}" for number in range(200)])
    faces.fingerprint = "ours"
    args = types.SimpleNamespace(state={"data": {"fingerprint": "ours"}})
    test = common.split_identities(faces)[2]
    even = common.test_faces(faces, args, 5, lambda some: some[::2])
    assert len(test) > 10 and even == common.spread(test[::2], 5)


def test_a_stranger_is_always_the_same_and_never_the_person():
    faces = types.SimpleNamespace(identity=torch.tensor([7, 7, 8, 9, 9]))
    found = [common.stranger(faces, [0, 1, 2, 4], i) for i in range(5)]
    assert found == [common.stranger(faces, [0, 1, 2, 4], i) for i in range(5)]
    assert all(faces.identity[k] != faces.identity[i] and k != 3 for i, k in enumerate(found))
    assert common.stranger(faces, [0, 1], 0) is None


def test_stack_faces_and_spread(face_folder):
    faces = common.FaceFolder(face_folder, 64)
    images, landmarks = common.stack_faces(faces, [4, 2])
    assert torch.equal(images[0], faces[4].image) and torch.equal(landmarks[1], faces[2].landmarks)
    assert common.spread(list(range(10, 20)), 5) == [10, 12, 14, 16, 18]
    assert common.spread([3, 1], 5) == common.spread([3, 1], None) == [3, 1]


class Numbered:
    """Pictures of one person; picture i is all i, and some are damaged."""
    identity = torch.zeros(6, dtype=torch.long)
    names = ["Anna"]

    def __init__(self, damaged=()):
        self.broken = damaged

    def __getitem__(self, i):
        return common.Face(torch.full((3, 2, 2), float(i)), torch.full((68, 2), float(i)), 0)

    def others(self, i):
        return [k for k in range(6) if k != i]

    def damaged(self, i):
        return i in self.broken


@pytest.mark.parametrize("damaged, indices, expected", [
    ((), [2, 5, 1], [2, 5, 1]), ((5,), [2, 5, 1], [2, 1, 1]), ((2,), [2, 5, 1], [5, 1, 1]),
    ((1, 5), [2, 5, 1], [2, 0, 3]), ((), [2, 1, 1], [2, 1, 1])])
def test_stack_person_replaces_damaged_pictures_and_never_guides_a_face_by_itself(
        damaged, indices, expected):
    images, landmarks = common.stack_person(Numbered(damaged), indices)
    chosen = images[:, 0, 0, 0].int().tolist()
    assert chosen == landmarks[:, 0, 0].int().tolist() and len(chosen) == len(indices)
    assert chosen[0] not in chosen[1:] and not set(chosen) & set(damaged)
    assert chosen[0] == expected[0] and set(chosen) == set(expected)


def test_stack_person_needs_two_readable_pictures():
    with refused("Anna has no two readable pictures"):
        common.stack_person(Numbered(damaged=(0, 1, 2, 3, 5)), [4, 2])


def test_augment_moves_faces_by_whole_pixels_and_changes_none_of_them():
    images = random_images(3, 3, 64, 64)
    points = common.mean_landmarks(64).expand(3, -1, -1)
    offsets, flips = set(), set()
    for seed in range(12):
        changed, landmarks = common.augment(images, points, common.seeded(seed), shift=0.1)
        flipped = landmarks[0, 36, 0] > landmarks[0, 45, 0]
        flips.add(bool(landmarks[0, 0, 0] > landmarks[0, 16, 0]) != bool(flipped))
        for before, after, moved in zip(images, changed, landmarks):
            mirror, expected = False, points[0]
            x, y = (moved[[36, 45]].mean(0) - expected[[36, 45]].mean(0)).round().int().tolist()
            candidates = []
            for mirror in (False, True):
                face = before.flip(2) if mirror else before
                rows = (torch.arange(64) - y).clamp(0, 63)
                columns = (torch.arange(64) - x).clamp(0, 63)
                candidates.append(torch.equal(face[:, rows][:, :, columns], after))
            assert sum(candidates) == 1
            flips.add(candidates[1])
            offsets.add((x, y))
    assert flips == {False, True} and len(offsets) > 20
    assert max(abs(x) for x, _ in offsets) == 6 == max(abs(y) for _, y in offsets)


# ----------------------------------------------------------------- 6. Recognition networks

def test_angular_margin_loss_equals_a_loop():
    embedding, centres = F.normalize(random_images(5, 8), dim=1), random_images(3, 8, seed=1) * 4
    label, total = torch.tensor([0, 2, 1, 1, 0]), 0.0
    for vector, true in zip(embedding, label.tolist()):
        angles = [math.acos(vector @ centre / centre.norm()) for centre in centres]
        scores = [24 * math.cos(angle + 0.3 * (k == true)) for k, angle in enumerate(angles)]
        total += math.log(sum(math.exp(score) for score in scores)) - scores[true]
    loss = common.angular_margin_loss(embedding, centres, label, margin=0.3, scale=24.0)
    assert abs(loss.item() - total / 5) < 1e-4


@pytest.mark.parametrize("noise, low, high", [(None, 0.44, 0.56), (0.2, 0.7, 0.99), (0.03, 1, 1), (0, 1, 1)])
def test_verification_accuracy_is_1_for_people_told_apart_and_a_half_by_chance(noise, low, high):
    identity = torch.arange(40).repeat_interleave(5)
    random = torch.randn(200, 64, generator=common.seeded(1))
    embeddings = random if noise is None else torch.eye(40, 64)[identity] + noise * random
    assert low <= common._verification_accuracy(F.normalize(embeddings, dim=1), identity) <= high


def trained_recogniser():
    """Random weights and uneven statistics, as after training."""
    torch.manual_seed(0)
    net = common.Recogniser((4, 8, 8, 16)).eval()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.3, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.uniform_(-0.5, 0.5)
    return net


def test_a_folded_recogniser_is_the_same_function_without_normalisation_layers():
    net, faces = trained_recogniser(), random_images(3, 3, 64, 64)
    folded = net.folded()
    torch.testing.assert_close(folded(faces), net(faces), atol=1e-5, rtol=1e-4)
    for one, two in zip(folded.features(faces), net.features(faces)):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.stages.modules())
    assert not folded.training and not any(p.requires_grad for p in folded.parameters())
    assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules())   # its own are kept
    assert common.identity_distance(folded, faces, faces).max() < 0.1


def test_recogniser_gives_unit_vectors_at_any_size_and_four_scales():
    net = trained_recogniser()
    for size in (64, 96):
        torch.testing.assert_close(net(random_images(2, 3, size, size)).norm(dim=1), torch.ones(2))
    maps = net.features(random_images(1, 3, 96, 96))
    assert [tuple(m.shape) for m in maps] == [(1, 4, 48, 48), (1, 8, 24, 24), (1, 8, 12, 12), (1, 16, 6, 6)]


@pytest.mark.slow
def test_recogniser_is_trained_once_repeatably_and_again_when_its_cache_is_damaged(
        face_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "_CACHE", tmp_path / "cache")
    faces = common.FaceFolder(face_folder, 64)
    first = common.recogniser(faces, epochs=1, quiet=True)
    file, = common._CACHE.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(common, "angular_margin_loss", None)            # a hit trains nothing
        second = common.recogniser(faces, epochs=1, quiet=True)
    file.write_bytes(file.read_bytes()[:999])
    third = common.recogniser(faces, epochs=1, quiet=True)
    x = random_images(2, 3, 64, 64)
    assert torch.equal(first(x), second(x)) and torch.equal(first(x), third(x))
    assert 0 <= first.accuracy == second.accuracy <= 1
    assert not any(p.requires_grad for p in second.parameters())
    other = common.recogniser(faces, "metric", epochs=1, quiet=True)
    assert other.widths != first.widths and len(list(common._CACHE.iterdir())) == 2


@pytest.fixture
def no_training(monkeypatch, tmp_path):
    """A recogniser that is cached but not trained → the people that it would have learned."""
    seen = []

    def train(faces, purpose, device, epochs, batch, quiet):
        seen.append((faces, device))
        return common.Recogniser(common._RECOGNISERS[purpose]["widths"]).eval()
    monkeypatch.setattr(common, "_CACHE", tmp_path / "cache")
    monkeypatch.setattr(common, "_train_recogniser", train)
    return seen


def test_recogniser_learns_the_training_people_on_the_given_device(face_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "_CACHE", tmp_path / "cache")
    monkeypatch.setattr(common, "_choose_device", None)                # nobody else chooses one
    devices, labels = [], set()
    autocast, loss = common.autocast, common.angular_margin_loss
    monkeypatch.setattr(common, "autocast", lambda device, *a: devices.append(device) or autocast(device, *a))
    monkeypatch.setattr(common, "angular_margin_loss",
                        lambda x, centres, label: labels.update(label.tolist()) or loss(x, centres, label))
    faces = common.FaceFolder(face_folder, 64)
    common.recogniser(faces, device=torch.device("cpu"), epochs=1, batch=32, quiet=True)
    assert set(devices) == {torch.device("cpu")}
    assert labels == set(range(len(faces.identity[common.split_identities(faces)[0]].unique())))


def test_recognisers_of_other_landmarks_or_purposes_are_others(face_folder, no_training, tmp_path):
    root = shutil.copytree(face_folder, tmp_path / "faces")
    faces = common.FaceFolder(root, 64)
    common.recogniser(faces)
    common.recogniser(faces)
    assert len(no_training) == 1
    points = common.read_landmarks(root / "person_00" / "shot_0.png.txt")
    common.write_landmarks(root / "person_00" / "shot_0.png.txt", points.flip(0))
    common.recogniser(common.FaceFolder(root, 64))
    common.recogniser(faces, "metric")
    assert len(no_training) == 3


def test_the_first_process_trains_and_the_others_find_the_cache(face_folder, no_training, monkeypatch):
    kept = []

    @contextlib.contextmanager
    def first():
        yield                                      # here the others go on
        kept.extend(common._CACHE.iterdir())
    monkeypatch.setattr(common, "first", first)
    common.recogniser(common.FaceFolder(face_folder, 64))
    assert len(kept) == 1


def test_recogniser_of_pictures_without_identities_uses_rendered_faces_and_says_so(
        tmp_path, face_folder, no_training, monkeypatch, capsys):
    rendered = common.FaceFolder(face_folder, 64)
    monkeypatch.setattr(common, "RenderedFaces", lambda *a, **k: rendered)
    common.recogniser(common.FaceFolder(flat_folder(tmp_path / "flat", face_folder), 64))
    assert "rendered faces" in capsys.readouterr().err
    assert no_training[0][0] is rendered


def vgg_weights(name, rename=None, **more):
    """torchvision's layers, random, and their state dict, its kernels renamed by their number."""
    torch.manual_seed(0)
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs[name])
    state = {}
    for k, (place, layer) in enumerate((p, x) for p, x in enumerate(features) if isinstance(x, nn.Conv2d)):
        key = rename(k) if rename else f"features.{place}"
        state |= {f"{key}.weight": layer.weight.data, f"{key}.bias": layer.bias.data}
    return features, state | more


def by_block(per_block):
    """conv1_1, conv1_2, conv2_1 …"""
    names = [f"conv{b}_{k}" for b, count in enumerate(per_block, 1) for k in range(1, count + 1)]
    return names.__getitem__


VGG_FILES = {       # torchvision's configuration (D: VGG-16, E: VGG-19), names, more; is it of faces?
    "VGG-Face": ("D", by_block((2, 2, 3, 3, 3)), {}, True),
    "VGG-Face, any names": ("D", lambda k: f"layer{k}", {}, True),
    "VGG-Face, torchvision's names": ("D", None, {"classifier.6.bias": torch.zeros(2622)}, True),
    "torchvision's VGG-16": ("D", None, {"classifier.6.bias": torch.zeros(1000)}, False),
    "torchvision's VGG-19": ("E", None, {}, False),
    "a VGG-19 of faces": ("E", by_block((2, 2, 4, 4, 4)), {}, True)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", VGG_FILES)
def test_vgg_reads_what_its_weights_were_trained_on(tmp_path, kind):
    name, rename, more, face = VGG_FILES[kind]
    net, state = vgg_weights(name, rename, **more)
    torch.save(state, tmp_path / "net.pth")
    vgg = common._load_vgg(tmp_path / "net.pth")
    image = random_images(1, 3, 32, 32)
    if face:                                       # Caffe's: BGR, 0 … 255, less the mean face
        x = (image + 1) * 127.5 - torch.tensor([129.1863, 104.7624, 93.5940]).view(3, 1, 1)
        x = x[:, [2, 1, 0]]
    else:
        mean, deviation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        x = (image + 1) / 2 - torch.tensor(mean).view(3, 1, 1)
        x = x / torch.tensor(deviation).view(3, 1, 1)
    ends = (9, 16, 23, 30) if name == "D" else (9, 18, 27, 36)    # after relu2_2 … relu5_3 or 5_4
    with torch.no_grad():
        for mine, end in zip(vgg.features(image), ends):
            torch.testing.assert_close(mine, net[:end](x.clone()), rtol=1e-3, atol=1e-5)
        last = common._load_vgg(tmp_path / "net.pth", last_relu=False).features(image)[-1]
        torch.testing.assert_close(last, net[:ends[-1] - 1](x), rtol=1e-3, atol=1e-5)


def test_vgg_refuses_other_weights(tmp_path):
    strange = vgg_weights("E", lambda k: f"layer{k}")[1]          # whose input is it?
    headless = {name: value for name, value in vgg_weights("D")[1].items() if "bias" not in name}
    small = {"a.weight": torch.zeros(4, 3, 3, 3), "a.bias": torch.zeros(4)}
    for state in (strange, headless, small):
        torch.save(state, tmp_path / "other.pth")
        with refused("other.pth: neither VGG-Face nor torchvision's"):
            common._load_vgg(tmp_path / "other.pth")


def wavy_weights(net):
    """A state dict for `net` made of sines, the same everywhere, of sizes that keep signals alive."""
    state = {}
    for name, value in net.state_dict().items():
        numbers = np.sin(np.arange(value.numel()) * 0.7 + np.arange(value.numel()) ** 2 * 0.13
                         + zlib.crc32(name.encode()) % 1000).reshape(value.shape)
        if value.ndim > 1:
            numbers = numbers * math.sqrt(2 / math.prod(value.shape[1:]))
        elif name.endswith("running_var"):
            numbers = 1 + 0.3 * np.abs(numbers)
        elif name.endswith(("running_mean", "bias")):
            numbers = 0.2 * numbers
        elif "prelu" in name:
            numbers = np.full(value.shape, 0.25)
        else:
            numbers = 1 + 0.2 * numbers
        state[name] = torch.from_numpy(np.array(numbers)).to(value.dtype)
    return state


@pytest.fixture(scope="module")
def arcface_weights():
    return wavy_weights(common.ArcFace())


@pytest.mark.slow
def test_arcface_is_the_official_network(arcface_weights, tmp_path):
    torch.save({f"module.{name}": value for name, value in arcface_weights.items()}, tmp_path / "a.pth")
    net = common.ArcFace(tmp_path / "a.pth")
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    with torch.inference_mode():
        embedding = net.embed(positions(128, 128).prod(-1).mul(0.003).sin()[None, None])[0]
    # Made by the network that reproduces the authors' own with other weights.
    np.testing.assert_allclose(embedding[:6], ARCFACE_EMBEDDING, rtol=1e-3, atol=1e-4)
    assert embedding.shape == (512,) and abs(embedding.norm().item() - ARCFACE_NORM) < 1e-3 * ARCFACE_NORM


ARCFACE_EMBEDDING = [-0.071855, 1.277956, 1.445045, -0.270037, 0.670355, -0.514095]
ARCFACE_NORM = 16.198595


def test_arcface_reads_grey_faces_of_128_pixels(monkeypatch):
    net = common.ArcFace()
    net.embed = lambda grey: grey
    image = random_images(2, 3, 256, 256)
    grey = image[:, 0] * 0.2989 + image[:, 1] * 0.5870 + image[:, 2] * 0.1140
    halved = F.avg_pool2d(grey[:, None], 2)                # bilinear, corners not aligned, no filter
    torch.testing.assert_close(net(image), halved)


@pytest.mark.parametrize("net", [trained_recogniser().folded(), common.VGG((1, 1, 1, 1, 1), face=True)])
def test_a_packed_network_is_the_same_network_when_unpacked(net, tmp_path):
    torch.save(common.pack(net), tmp_path / "net.pt")
    again = common.unpack(torch.load(tmp_path / "net.pt", weights_only=True))
    image = random_images(1, 3, 64, 64)
    for one, two in zip(net.features(image), again.features(image)):
        assert torch.equal(one, two)
    assert type(again) is type(net) and again.widths == net.widths
    assert not again.training and not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("record", [None, {}, {"class": "Recogniser", "arguments": {}, "state": {}},
                                    {"class": "os.system", "arguments": {}, "state": {}}])
def test_a_damaged_packed_network_is_a_line(record):
    with refused("frozen network is missing or damaged"):
        common.unpack(record)


def test_load_encoder_takes_the_checkpoints_network_else_the_chosen_kind(
        face_folder, no_training, tmp_path, monkeypatch):
    def load(kind, state=None, file=None):
        args = types.SimpleNamespace(device=torch.device("cpu"), vggface=file, state=state)
        return common.load_encoder(kind, args, common.FaceFolder(face_folder, 64))
    assert type(load("recogniser")) is common.Recogniser and no_training[0][1] == torch.device("cpu")
    torch.save(vgg_weights("D")[1], tmp_path / "face.pth")
    vgg = load("vgg", file=tmp_path / "face.pth")
    assert vgg.arguments["face"] and vgg.widths == (128, 256, 512, 512)
    assert vgg.blocks[3][1].weight.is_contiguous(memory_format=torch.channels_last)
    kept = trained_recogniser().folded()
    state = {"frozen": {"encoder": common.pack(kept)}}
    monkeypatch.setattr(common, "_torchvision_weights", None)         # nothing is fetched
    x = random_images(1, 3, 64, 64)
    torch.testing.assert_close(load("vgg", state)(x), kept(x))
    with pytest.raises(InputError, match="missing"):
        load("vgg", {"net": {}})


# -------------------------------------------------------------------- 7. Published weights

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Site:
    """A server whose file and manners change: an answer takes the next of `manners`, the last for ever.

    A manner: version of the file, whether Range is honoured, how many bytes are sent before it hangs up,
    the Content-Length it states beyond the true one, seconds it waits, whether it has an ETag.
    """

    def __init__(self):
        self.manners, self.asked = [{}], []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                manner = site.manners[0] if len(site.manners) == 1 else site.manners.pop(0)
                content = bytes(reversed(CONTENT)) if manner.get("version", 1) == 2 else CONTENT
                tag, wanted = f'"{manner.get("version", 1)}"', self.headers.get("Range")
                site.asked.append(wanted)
                if self.path == "/none":
                    return self.send_error(404)
                fits = manner.get("careless") or self.headers.get("If-Range") in (None, tag)
                start = int(wanted[6:-1]) if wanted and fits and manner.get("range", True) else 0
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    return self.end_headers()
                self.send_response(206 if start else 200)
                stated = len(content) - start + manner.get("more", 0)
                self.send_header("Content-Length", str(stated))
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                if manner.get("tag", True):
                    self.send_header("ETag", tag)
                self.end_headers()
                self.wfile.write(content[start:][:manner.get("sent", len(content))])
                self.wfile.flush()
                time.sleep(manner.get("wait", 0))

            def log_message(self, *_):
                pass

            def handle(self):
                with contextlib.suppress(ConnectionError):              # the other side may hang up, too
                    super().handle()

        self.web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.home = f"http://127.0.0.1:{self.web.server_port}"
        self.url = f"{self.home}/weights.pth"
        threading.Thread(target=self.web.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    site = Site()
    yield site
    site.web.shutdown()
    site.web.server_close()


HALF = {"sent": 1_500_000}


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("checksum", [SHA256, None])
def test_download_fetches_once_checks_and_leaves_nothing_behind(site, tmp_path, checksum):
    path = tmp_path / "new" / "w.pth"
    for _ in range(2):
        assert common._download(site.url, path, checksum) == path and path.read_bytes() == CONTENT
    assert site.asked == [None] and names_in(path.parent) == ["w.pth"]


def test_download_reads_a_file_that_is_there_only_to_check_it(tmp_path, monkeypatch):
    (tmp_path / "w.pth").write_bytes(b"three gigabytes")
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert common._download("http://nowhere/", tmp_path / "w.pth").read_bytes() == b"three gigabytes"


@pytest.mark.parametrize("manner, part", [({}, 1000), ({"range": False}, 1000), ({}, len(CONTENT))])
def test_download_goes_on_with_a_part_that_a_checksum_vouches_for(site, tmp_path, manner, part):
    site.manners = [manner]
    (tmp_path / "w.pth.part").write_bytes(CONTENT[:part])
    assert common._download(site.url, tmp_path / "w.pth", SHA256).read_bytes() == CONTENT
    assert site.asked == [f"bytes={part}-"] and names_in(tmp_path) == ["w.pth"]


@pytest.mark.parametrize("manners, begins_again", [
    ([HALF, {}], False), ([*[{"sent": 500_000}] * 5, {}], False),
    ([HALF, {"range": False}], True), ([HALF | {"tag": False}, {"tag": False}], True),
    ([HALF, {"version": 2}], True), ([HALF, {"version": 2, "careless": True}, {"version": 2}], True)],
    ids=["hangs up", "again and again", "no Range", "no version", "changed", "changed, careless"])
def test_download_goes_on_only_with_the_same_file(site, tmp_path, manners, begins_again):
    site.manners = manners
    changed = manners[-1].get("version") == 2
    expected = bytes(reversed(CONTENT)) if changed else CONTENT
    assert common._download(site.url, tmp_path / "w.pth").read_bytes() == expected
    assert names_in(tmp_path) == ["w.pth"] and site.asked[0] is None
    if not begins_again:
        assert None not in site.asked[1:]


def test_download_goes_on_in_a_later_run(site, tmp_path):
    site.manners = [HALF, {"sent": 0}]
    with pytest.raises(InputError, match="run the command again"):
        common._download(site.url, tmp_path / "w.pth")
    assert names_in(tmp_path) == ["w.pth.part", "w.pth.part.version"]
    site.manners = [{}]
    assert common._download(site.url, tmp_path / "w.pth").read_bytes() == CONTENT
    assert int(site.asked[-1].removeprefix("bytes=").removesuffix("-")) > 1_000_000
    (tmp_path / "x.pth.part").write_bytes(b"of nobody knows what")
    assert common._download(site.url, tmp_path / "x.pth").read_bytes() == CONTENT
    assert site.asked[-1] is None and names_in(tmp_path) == ["w.pth", "x.pth"]


@pytest.mark.parametrize("begun", [0, 1_000_000])
def test_processes_that_download_at_once_never_write_to_one_file(site, tmp_path, begun):
    site.manners = [{"sent": 1_700_000, "wait": 0.1}, {"sent": 1_600_000, "wait": 0.1}, {}]
    if begun:
        (tmp_path / "w.pth.part").write_bytes(CONTENT[:begun])
        (tmp_path / "w.pth.part.version").write_text('"1"')
    results = []

    def fetch():
        results.append(common._download(site.url, tmp_path / "w.pth").read_bytes() == CONTENT)
    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [True] * 3 and names_in(tmp_path) == ["w.pth"]


def test_download_refuses_what_is_not_the_expected_file(site, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"an older file")
    with pytest.raises(InputError, match="sha256"):
        common._download(site.url, tmp_path / "w.pth", "0" * 64)
    assert names_in(tmp_path) == ["w.pth"] and (tmp_path / "w.pth").read_bytes() == b"an older file"
    with pytest.raises(InputError, match="404"):
        common._download(f"{site.home}/none", tmp_path / "x.pth", SHA256)
    assert names_in(tmp_path) == ["w.pth"]


@pytest.mark.parametrize("range_", [True, False])
def test_download_refuses_a_body_shorter_than_announced(site, tmp_path, range_):
    site.manners = [{"more": 1000, "range": range_, "tag": range_}]
    with refused("run the command again"):
        common._download(site.url, tmp_path / "w.pth")
    assert len(site.asked) in (3, 4) and not (tmp_path / "w.pth").exists()


def test_download_gives_up_on_a_server_that_falls_silent(site, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "_TIMEOUT", (1, 0.2))
    site.manners = [{"sent": 1000, "wait": 0.5}, {"sent": 0, "wait": 0.5}]
    with pytest.raises(InputError, match="timed out"):
        common._download(site.url, tmp_path / "w.pth")
    assert 3 <= len(site.asked) <= 4


def test_download_needs_a_server(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for url in ("http://127.0.0.1:9/w.pth", "http://", "ftp://127.0.0.1/w.pth"):
        with refused(f"^{url}: "):
            common._download(url, tmp_path / "w.pth")
        assert not names_in(tmp_path)


def test_renamed_takes_the_first_row_that_matches_the_whole_name():
    table = [(r"old|\w+\.x2", None), (r"(\w+)\.conv(\d)\.(.*)", r"\1.\2.\3"), (r"a\..*", "last")]
    state = {"a.conv2.weight": 1, "b.conv1.bias": 2, "old": 3, "older": 4, "a.x": 5, "b.x2": 6}
    expected = {"a.2.weight": 1, "b.1.bias": 2, "older": 4, "last": 5}
    assert common.renamed(state, table) == expected


def test_load_named_does_without_batchnorms_counts_and_folds_spectral_norm():
    """What else it does is tested beside the official weights."""
    norm = torch.nn.utils.parametrizations.spectral_norm
    net = nn.Sequential(norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4))
    state = {f"n.{name}": value + 0.5 for name, value in net[1].state_dict().items() if "num" not in name}
    state |= {"c.bias": torch.zeros(4), "c.weight_orig": torch.full((4, 3, 1, 1), 6.0),
              "c.weight_u": torch.tensor([1.0, 0, 0, 0]), "c.weight_v": torch.tensor([0.5, 0, 0])}
    table = [(r"n\.(.*)", r"1.\1"), (r"c\.(.*)", r"0.\1")]
    net = common.load_named(net, state, table, "it")
    assert torch.equal(net[0].weight, torch.full((4, 3, 1, 1), 2.0))              # 6 / uᵀWv
    assert torch.equal(net[1].running_var, torch.full((4,), 1.5)) and not net.training
    del state["n.running_var"]
    with refused("the state dict: not it .1.running_var is missing"):
        common.load_named(nn.Sequential(norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)), state, table, "it")


# ----------------------------------------------------------------------- 9. Rendered faces

def small_faces(cache, identities=2, per_identity=2, seed=0):
    return common.RenderedFaces(64, identities, per_identity, seed, cache=cache)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    return small_faces(tmp_path_factory.mktemp("rendered"))


def equal_faces(one, two):
    return torch.equal(one.image, two.image) and torch.equal(one.landmarks, two.landmarks)


@pytest.mark.slow
def test_rendered_faces_depend_on_seed_and_index_alone(rendered, tmp_path):
    more = small_faces(tmp_path, identities=3)
    assert all(equal_faces(rendered[i], more[i]) for i in range(4))
    other = small_faces(tmp_path, identities=1, seed=1)
    pictures = [rendered[0], rendered[1], rendered[2], more[4], other[0]]
    assert all((a.image - b.image).abs().mean() > 0.02
               for k, a in enumerate(pictures) for b in pictures[:k])


def test_rendered_faces_are_faces(rendered):
    face = rendered[3]
    assert len(rendered) == 4 and rendered.identity.tolist() == [0, 0, 1, 1] and face.identity == 1
    assert rendered.names == ["person 0-0", "person 0-1"] and not rendered.damaged(3)
    assert face.image.shape == (3, 64, 64) and face.landmarks.shape == (68, 2)
    assert face.image.dtype == face.landmarks.dtype == torch.float32
    assert face.image.min() >= -1 and face.image.max() <= 1 and face.image.std() > 0.1
    assert torch.equal(rendered.landmarks(3), face.landmarks) and rendered.others(3) == [2]
    with pytest.raises(IndexError):
        rendered[4]


def test_rendered_landmarks_lie_on_the_face(face_folder):
    faces = common.FaceFolder(face_folder, 64)
    landmarks = torch.stack([faces[i].landmarks for i in range(0, 120, 5)])
    inside = ((landmarks > -0.5) & (landmarks < 63.5)).all(-1)
    assert inside.float().mean() > 0.95
    five = common.five_points(landmarks).mean(0)
    assert (five - common.five_points(template_face(64))).norm(dim=1).max() < 5
    mouth = landmarks[:, 60:68]
    assert (mouth[:, 0, 0] < mouth[:, 4, 0]).all()
    assert (mouth[:, 2, 1] <= mouth[:, 6, 1] + 1).float().mean() > 0.9
    assert (landmarks[:, 8, 1] > landmarks[:, 57, 1]).all()           # the chin is below the lips


@pytest.mark.slow
def test_rendered_faces_are_read_from_the_cache_and_rendered_again_when_it_is_damaged(
        rendered, tmp_path, monkeypatch):
    first = small_faces(tmp_path)
    file, = (path for path in tmp_path.iterdir() if path.is_file())
    assert all(equal_faces(first[i], rendered[i]) for i in range(4))
    whole = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils.data, "DataLoader", None)           # a hit renders nothing
        second = small_faces(tmp_path)
    assert all(equal_faces(second[i], rendered[i]) for i in range(4))
    for damaged in (whole[:len(whole) // 2], b"", b"not an array"):
        file.unlink()
        file.write_bytes(damaged)
        again = small_faces(tmp_path)
        assert all(equal_faces(again[i], rendered[i]) for i in range(4))
        assert file.read_bytes() == whole


def test_rendered_faces_use_the_cache_folder_of_the_environment():
    assert str(common._CACHE) == os.environ["FACE_RESTORATION_CACHE"]
    before = set(common._CACHE.rglob("*"))
    common.RenderedFaces(64, identities=1, per_identity=1, seed=4)
    assert len(set(common._CACHE.rglob("*")) - before) == 1


def test_rendered_faces_without_a_writable_cache_are_kept_in_memory(rendered, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    faces = small_faces(tmp_path / "file" / "cache")
    assert equal_faces(faces[1], rendered[1]) and "memory" in capsys.readouterr().err


def render_at_once(cache, start):
    torch.set_num_threads(1)                       # OpenMP's threads do not survive a fork
    start.wait(60)
    small_faces(cache)[0]


@pytest.mark.slow
def test_two_processes_may_render_at_once(rendered, tmp_path):
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(2)
    processes = [fork.Process(target=render_at_once, args=(tmp_path, start)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1                         # and nothing temporary is left
    assert all(equal_faces(face, other) for face, other in zip(small_faces(tmp_path), rendered))


def test_public_names_are_listed_and_each_is_used_by_a_script_a_notebook_or_readme():
    root = Path(common.__file__).parent
    own = [name for name, value in vars(common).items()
           if not name.startswith("_") and not isinstance(value, types.ModuleType)
           and (getattr(value, "__module__", None) == "common" or name.isupper())]
    assert sorted(own) == sorted(common.__all__)
    files = [*root.glob("*.py"), *root.glob("notebooks/*.ipynb"), root / "README.md",
             root / "tests" / "benchmark.py"]
    text = "\n".join(file.read_text() for file in files if file.name != "common.py")
    text += (root / "common.py").read_text().split('"""')[1]
    unused = [name for name in common.__all__ if not re.search(rf"\b{name}\b", text)]
    assert unused == []
