"""common.py against independent forms: loops, closed forms, Pillow, NumPy, published numbers."""
import contextlib
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import platform
import shutil
import struct
import sys
import threading
import time
import types
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFile, PngImagePlugin
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import common
from common import Degradation, InputError, Range

PUBLIC = """
    CACHE COMPONENTS DEGRADATIONS Degradation FFHQ_TEMPLATE FID Face FaceFolder IMAGE_SUFFIXES
    INNER_LIP InputError JAW LEFT_BROW LEFT_EYE LPIPS NOSE_BASE NOSE_BRIDGE OUTER_LIP Progress
    RIGHT_BROW RIGHT_EYE Range Recogniser RenderedFaces VGG align_face angular_margin_loss augment autocast
    benchmark blur channels_last choose_device comparison_grid component_boxes degrade detect_landmarks
    download
    draw_landmarks face_matrix find_landmarks five_points fold for_inference frechet_distance gaussian_matrix
    identity_distance invert_matrix jpeg landmark_heatmaps landmark_mask load_checkpoint
    load_named load_published load_vgg load_weights mean_landmarks mirror motion_kernels paired_gain
    paste_face precision print_table process_group psnr read_image read_landmarks read_published
    read_references recogniser
    replacing restore_files run_script save_checkpoint seeded show similarity split_identities spread
    ssim stack_faces stack_person to_uint8 transform_points verification_accuracy warp_affine write_image
    write_json write_landmarks write_log
""".split()


def test_public_names_change_only_by_decision():
    assert sorted(common.__all__) == PUBLIC
    assert all(hasattr(common, name) for name in PUBLIC)


def random_images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def levels(image):
    """[-1,1] → whole numbers 0 … 255."""
    return ((image + 1) * 127.5).round()


# ------------------------------------------------------------------------------------- 1. Images

RAMP = (np.arange(18 * 20) % 256).astype(np.uint8).reshape(18, 20)   # not square: axes that swap are noticed


def saved(folder, picture, name="picture.png", **options):
    picture.save(folder / name, **options)
    return common.read_image(folder / name)


def test_read_image_makes_greyscale_rgb(tmp_path):
    image = saved(tmp_path, Image.fromarray(RAMP))
    assert image.shape == (3, 18, 20) and image.dtype == torch.float32
    assert torch.equal(image, torch.from_numpy(np.stack([RAMP] * 3)).float() / 255 * 2 - 1)


def test_read_image_keeps_the_order_of_axes_and_channels(tmp_path):
    array = np.stack([RAMP, 255 - RAMP, RAMP // 2], -1)
    image = saved(tmp_path, Image.fromarray(array))
    torch.testing.assert_close(image, torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1)


def test_read_image_lays_transparency_over_white(tmp_path):
    colour, alpha = np.array([10, 60, 200]), RAMP[..., None].astype(float) / 255
    rgba = np.concatenate([np.broadcast_to(colour, (18, 20, 3)), RAMP[..., None]], 2).astype(np.uint8)
    expected = torch.from_numpy(colour * alpha + 255 * (1 - alpha)).permute(2, 0, 1)
    assert (levels(saved(tmp_path, Image.fromarray(rgba, "RGBA"))) - expected).abs().max() <= 1
    grey = np.stack([np.full_like(RAMP, 60), RAMP], -1)
    assert (levels(saved(tmp_path, Image.fromarray(grey, "LA"))) - expected[1]).abs().max() <= 1


def test_read_image_lays_a_transparent_palette_entry_over_white(tmp_path):
    picture = Image.fromarray((RAMP > 99).astype(np.uint8), "P")
    picture.putpalette([255, 0, 0, 0, 0, 255])
    image = levels(saved(tmp_path, picture, transparency=0))
    seen = torch.from_numpy(RAMP > 99)
    assert (image[:, ~seen] == 255).all()
    assert torch.equal(image[:, seen], torch.tensor([[0.0], [0], [255]]).expand(3, int(seen.sum())))


def test_read_image_keeps_16_bits(tmp_path):
    array = (np.arange(18 * 20).reshape(18, 20) * 181 + 7).astype(np.uint16)
    image = saved(tmp_path, Image.fromarray(array))
    torch.testing.assert_close(image[1], torch.from_numpy(array / 65535 * 2 - 1).float(), atol=1e-6, rtol=0)


def test_read_image_converts_cmyk(tmp_path):
    image = saved(tmp_path, Image.new("CMYK", (20, 18), (0, 255, 255, 0)), "picture.tif")
    assert torch.equal(image[:, 9, 9], torch.tensor([1.0, -1, -1]))


@pytest.mark.parametrize(
    "orientation, turn",
    [
        (1, lambda a: a),
        (3, lambda a: np.rot90(a, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (8, lambda a: np.rot90(a)),
        (2, np.fliplr),
        (5, np.transpose),
    ],
)
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
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


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
    ("huge.png", png_header(20000, 10000), "more than 89 megapixels"),
])
def test_read_image_says_in_one_line_what_is_wrong(tmp_path, name, content, message):
    if content is None:
        Image.new("RGB", (1, 1)).save(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        common.read_image(tmp_path / name)
    assert message in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_read_image_names_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(InputError, match="nobody.png: no such file"):
        common.read_image(tmp_path / "nobody.png")
    with pytest.raises(InputError, match="not a readable picture"):
        common.read_image(tmp_path)


def test_write_image_and_read_image_are_inverse_on_8_bits(tmp_path):
    image = torch.arange(256.0).view(1, 8, 32).repeat(1, 2, 1).expand(3, -1, -1) / 127.5 - 1
    common.write_image(tmp_path / "new" / "a.png", image)
    assert torch.equal(levels(common.read_image(tmp_path / "new" / "a.png")), levels(image))


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-9.0, -1, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 1, 3])
    assert common.to_uint8(values).tolist() == [0, 0, 1, 0, 255, 255]


def test_write_image_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    common.write_image(tmp_path / "a.png", random_images(3, 16, 16))
    before = (tmp_path / "a.png").read_bytes()

    def fail(self, path, **options):
        Path(path).write_bytes(b"half a pict")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(InputError, match="a.png: cannot be written .*No space"):
        common.write_image(tmp_path / "a.png", random_images(3, 16, 16, seed=1))
    assert (tmp_path / "a.png").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_comparison_grid_puts_samples_in_rows_and_entries_in_columns():
    values = [[-1.0, -0.5], [0.0, 0.5]]                               # [entry][sample]
    columns = {name: torch.tensor(v).view(2, 1, 1, 1).expand(2, 3, 40, 32) for name, v in zip("ab", values)}
    grid = common.comparison_grid(columns)
    rows = [[grid[0, -y, -x].item() for x in (50, 20)] for y in (60, 20)]
    np.testing.assert_allclose(rows, np.transpose(values), atol=0.01)


# ------------------------------------------------------------------------------------- 2. Degradation

def tenths(low, high):
    return {k / 10 for k in range(10 * low, 10 * high + 1)}


PAPERS = {       # blur, scale, noise, quality as the papers print the sets, low:step:high written out
    "gfrnet": ({0} | tenths(1, 3), tenths(1, 8), set(range(8)), {0} | set(range(10, 41)), False, "bicubic"),
    "asffnet": (tenths(1, 3), tenths(1, 8), set(range(16)), set(range(10, 61)), True, "bicubic"),
    "dfdnet": (tenths(1, 5), tenths(1, 8), set(range(16)), set(range(40, 81)), True, "bicubic"),
    "dmdnet": (tenths(1, 3), tenths(1, 10), set(range(16)), set(range(50, 101)), False, "bicubic"),
}


@pytest.mark.parametrize("paper", PAPERS)
def test_draws_reach_every_element_of_the_papers_sets_and_no_other(paper):
    model, (*sets, motion, mode) = common.DEGRADATIONS[paper], PAPERS[paper]
    for drawn_from, expected in zip((model.blur, model.scale, model.noise, model.quality), sets):
        drawn = drawn_from.draw(4000, common.seeded(1))
        assert drawn.shape == (4000,) and drawn.dtype == torch.float32
        assert {round(x, 4) for x in drawn.tolist()} == expected
        counts = drawn.unique(return_counts=True)[1] * len(expected) / 4000
        assert 0.4 < counts.min() and counts.max() < 1.8  # uniform: 0, "none", is one element of many
    assert (model.motion, model.mode) == (motion, mode)


def test_restoreformers_ranges_are_continuous():
    model = common.DEGRADATIONS["restoreformer"]
    assert set(common.DEGRADATIONS) == {*PAPERS, "restoreformer"}
    for drawn_from, (low, high) in zip((model.blur, model.scale, model.noise, model.quality),
                                       ((0.2, 10), (1, 8), (0, 20), (60, 100))):
        drawn = drawn_from.draw(4000, common.seeded(1))
        near = 0.01 * (high - low)
        assert low <= drawn.min() < low + near and high - near < drawn.max() <= high
        assert drawn.unique().numel() > 3900 and abs(drawn.mean() - (low + high) / 2) < 0.03 * (high - low)
    assert not model.motion and model.mode == "bilinear"


def mirrored(i, length):
    return -i if i < 0 else 2 * (length - 1) - i if i >= length else i


@pytest.mark.parametrize("sigma", [0.7, 2.3, 10])
def test_gaussian_matrix_is_a_convolution_with_a_mirrored_border(sigma):
    length, line = 37, np.random.default_rng(0).normal(size=37)
    weights = [math.exp(-k * k / (2 * sigma**2)) for k in range(-30, 31)]
    expected = [
        sum(w * line[mirrored(i + k, length)] for k, w in zip(range(-30, 31), weights)) / sum(weights)
        for i in range(length)
    ]
    blurred = common.gaussian_matrix(sigma, length) @ torch.from_numpy(line).float()
    np.testing.assert_allclose(blurred.numpy(), expected, atol=1e-5)
    assert torch.equal(common.gaussian_matrix(0, 5), torch.eye(5))


def test_blur_is_a_convolution_and_not_a_correlation():
    image, kernel = random_images(2, 34, 45), torch.zeros(61, 61)
    for i, j, weight in ((30, 30, 0.3), (25, 41, 0.4), (58, 3, 0.2), (0, 33, 0.1)):
        kernel[i, j] = weight
    expected = torch.zeros(2, 34, 45)
    for i, j in kernel.nonzero().tolist():
        for y in range(34):
            for x in range(45):
                expected[:, y, x] += (
                    kernel[i, j] * image[:, mirrored(y - i + 30, 34), mirrored(x - j + 30, 45)]
                )
    torch.testing.assert_close(common.blur(image, kernel), expected, atol=2e-6, rtol=0)


def resized(image, height, width, mode):
    """Pillow's anti-aliased resampling of (3,H,W): of float32 in floating point, of uint8 in 8 bits."""
    method = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[mode]
    return np.stack(
        [Image.fromarray(channel).resize((width, height), method) for channel in np.asarray(image)]
    )


def literal_degradation(image, kernel, factor, quality, mode):
    """((I ⊗ k) ↓s)_JPEG ↑s step by step at full size → levels 0 … 255."""
    kernel = kernel.flip(0, 1)[None, None].repeat(3, 1, 1, 1)         # conv2d correlates
    blurred = F.conv2d(F.pad(image[None], (30,) * 4, mode="reflect"), kernel, groups=3)[0]
    height, width = (round(length / factor) for length in image.shape[1:])
    small = np.rint((resized(blurred, height, width, mode) + 1) * 127.5).clip(0, 255).astype(np.uint8)
    if quality:
        buffer = io.BytesIO()
        Image.fromarray(small.transpose(1, 2, 0)).save(buffer, "JPEG", quality=quality)
        small = np.array(Image.open(buffer)).transpose(2, 0, 1)
    return torch.from_numpy(resized(small, *image.shape[1:], mode)).float()


def gaussian_kernel(sigma):
    line = torch.exp(-torch.arange(-30.0, 31) ** 2 / (2 * sigma**2))
    return torch.outer(line, line) / line.sum() ** 2


def fixed(sigma, factor, quality, mode="bicubic", noise=0.0, motion=False):
    return Degradation(*(Range(v, v) for v in (sigma, factor, noise, quality)), motion=motion, mode=mode)


def photos(count=2, height=72, width=90):
    """Smooth colourful pictures with some edges, (count,3,H,W)."""
    image = F.interpolate(random_images(count, 3, 9, 9), (height, width), mode="bicubic").clamp(-1, 1)
    image[:, :, 20:40, 30:60] *= -1
    return image


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    "sigma, factor, quality", [(1.7, 3.4, 0), (4.0, 1.0, 0), (1.0, 8.0, 0), (2.2, 2.5, 35), (1.5, 4, 90)]
)
def test_degrade_is_the_equation_step_by_step(mode, sigma, factor, quality):
    target = photos()
    degraded = levels(common.degrade(target, fixed(sigma, factor, quality, mode), common.seeded(0)))
    for image, result in zip(target, degraded):
        error = (literal_degradation(image, gaussian_kernel(sigma), factor, quality, mode) - result).abs()
        # A level that rounds the other way on the small picture shows in the large one, more so after JPEG.
        assert error.mean() < (0.1 if quality else 0.03) and error.max() <= (12 if quality else 2)


def test_degrade_without_any_degradation_returns_the_picture():
    target = levels(photos()) / 127.5 - 1
    torch.testing.assert_close(common.degrade(target, fixed(0, 1, 0)), target)


def test_degrade_shakes_half_of_the_pictures_with_one_of_32_kernels():
    image = photos(1, 40, 44)
    degraded = levels(
        common.degrade(image.expand(64, -1, -1, -1), fixed(1.3, 1, 0, motion=True), common.seeded(3))
    )
    kernels = [gaussian_kernel(1.3), *common.motion_kernels()]
    candidates = torch.stack([literal_degradation(image[0], kernel, 1, 0, "bicubic") for kernel in kernels])
    error = (degraded[:, None] - candidates).abs().amax((2, 3, 4))
    assert error.amin(1).max() <= 1
    which = error.argmin(1)
    assert 20 <= (which > 0).sum() <= 44 and which.unique().numel() > 12


def test_a_fixed_scale_fixes_only_the_scale():
    target = photos(6)
    drawn = Degradation(Range(1, 1), Range(1, 8, 0.1), Range(0, 0), Range(0, 0))
    assert torch.equal(
        common.degrade(target, drawn, common.seeded(0), scale=4), common.degrade(target, fixed(1, 4, 0))
    )
    drawn = Degradation(Range(1, 3, 0.1), Range(1, 8, 0.1), Range(0, 0), Range(0, 0))
    same = common.degrade(target[:1].expand(6, -1, -1, -1), drawn, common.seeded(0), scale=4)
    assert len({image.numpy().tobytes() for image in same}) > 3


@pytest.mark.parametrize("paper", common.DEGRADATIONS)
def test_degrade_repeats_for_a_seed_stays_in_range_and_in_8_bits(paper):
    target, model = photos(4), common.DEGRADATIONS[paper]
    one = common.degrade(target, model, common.seeded(5))
    torch.manual_seed(99)                                             # the global stream must not matter
    assert torch.equal(one, common.degrade(target, model, common.seeded(5)))
    assert not torch.equal(one, common.degrade(target, model, common.seeded(6)))
    assert one.shape == target.shape and one.dtype == torch.float32 and one.min() >= -1 and one.max() <= 1
    assert ((one + 1) * 127.5 - levels(one)).abs().max() < 1e-4
    assert (one - target).abs().mean() > 0.005


def correlation(x, y):
    return np.corrcoef(x.flatten(), y.flatten())[0, 1]


@pytest.mark.parametrize("strength", [3, 12])
def test_noise_has_its_strength_in_units_of_255(strength):
    grey = torch.zeros(4, 3, 96, 96)
    noise = levels(common.degrade(grey, fixed(0, 1, 0, noise=strength), common.seeded(1))) - 127.5
    expected = math.hypot(strength, 1 / math.sqrt(12))  # with the rounding to 8 bits
    assert abs(noise.std() - expected) < 0.015 * strength and abs(noise.mean()) < 0.1
    assert max(abs(correlation(noise[0, 0], noise[0, 1])), abs(correlation(noise[0], noise[1])),
               abs(correlation(noise[..., 1:], noise[..., :-1]))) < 0.03


def test_noise_is_added_to_the_small_picture():
    noise = common.degrade(torch.zeros(2, 3, 96, 96), fixed(0, 4, 0, noise=12), common.seeded(1))
    assert correlation(noise[..., 1:], noise[..., :-1]) > 0.8


def test_degrade_compresses_more_at_a_lower_quality():
    error = [(common.degrade(photos(), fixed(0, 1, q)) - photos()).square().mean() for q in (95, 60, 30, 10)]
    assert error == sorted(error) and error[0] > 0


def test_motion_kernels_are_32_different_centred_camera_shakes():
    kernels = common.motion_kernels()
    assert kernels.shape == (32, 61, 61) and kernels.min() >= 0
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(32), atol=1e-4, rtol=0)
    place = torch.arange(61.0) - 30
    assert (kernels.sum(1) @ place).abs().max() < 0.1 and (kernels.sum(2) @ place).abs().max() < 0.1
    distance = torch.cdist(kernels.flatten(1), kernels.flatten(1), p=1) + 2 * torch.eye(32)
    assert distance.min() > 0.3                                       # 2 is disjoint, 0 is equal
    for kernel in kernels:
        rows, columns = ((kernel.sum(axis) > 1e-6).nonzero() for axis in (1, 0))
        assert 4 < max(rows.max() - rows.min(), columns.max() - columns.min()) <= 27


@pytest.mark.cuda
def test_degrade_on_a_gpu_equals_the_cpu_without_noise():
    target = photos()
    on_gpu = common.degrade(target.cuda(), fixed(1.7, 3, 0), common.seeded(0))
    assert on_gpu.is_cuda
    assert (
        levels(on_gpu.cpu()) - levels(common.degrade(target, fixed(1.7, 3, 0), common.seeded(0)))
    ).abs().max() <= 1


# ------------------------------------------------------------------------------------- 3. Landmarks

def template_face(size=512, seed=0):
    """68 points (68,2) whose eye centres, nose tip and mouth corners lie on the FFHQ template of a crop."""
    five = torch.tensor(
        [[192.98, 239.95], [318.90, 240.19], [256.63, 314.02], [201.26, 371.41], [313.09, 371.15]]
    )
    points = 256 + 120 * random_images(68, 2, seed=seed)
    angle = torch.arange(6) * math.pi / 3
    ring = torch.stack([25 * angle.cos(), 9 * angle.sin()], 1)
    points[36:42], points[42:48] = five[0] + ring, five[1] + ring
    points[[30, 48, 54]] = five[2:]
    return (points + 0.5) * size / 512 - 0.5


def similar(points, scale, degrees, shift):
    turn = math.radians(degrees)
    matrix = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]) * scale
    return points @ matrix.T + torch.tensor(shift)


def test_landmarks_are_written_and_read(tmp_path):
    points = template_face(128)
    common.write_landmarks(tmp_path / "one.txt", points)
    lines = (tmp_path / "one.txt").read_text().splitlines()
    assert len(lines) == 68 and [len(line.split()) for line in lines] == [2] * 68
    torch.testing.assert_close(
        common.read_landmarks(tmp_path / "one.txt", (128, 128)), points, atol=6e-4, rtol=0
    )
    several = torch.stack([points, points + 3.25])
    common.write_landmarks(tmp_path / "two.txt", several)
    torch.testing.assert_close(
        common.read_landmarks(tmp_path / "two.txt", several=True), several, atol=6e-4, rtol=0
    )
    assert common.read_landmarks(tmp_path / "one.txt", several=True).shape == (1, 68, 2)


LINES = [f"{x:.3f} {y:.3f}" for x, y in template_face(128).tolist()]


@pytest.mark.parametrize(
    "lines, message",
    [
        (LINES[:67], "67 landmarks"),
        ([], "0 landmarks"),
        (LINES * 2, "136 landmarks"),
        (LINES + LINES[:1], "69 landmarks"),
        (LINES[:-1] + ["nan 4"], "not a finite number"),
        (LINES[:-1] + ["4 inf"], "not a finite number"),
        (LINES[:-1] + ["here there"], "not a landmark file"),
        (LINES[:-1] + ["1 2 3"], "not a landmark file"),
        (
            [f"{float(line.split()[0]) + 128} {line.split()[1]}" for line in LINES],
            "outside the 128×140 picture",
        ),
        (
            [f"{line.split()[0]} {float(line.split()[1]) - 128}" for line in LINES],
            "outside the 128×140 picture",
        ),
        (
            [f"{line.split()[0]} {float(line.split()[1]) + 90}" for line in LINES],
            "outside the 128×140 picture",
        ),
    ],
)
def test_wrong_landmarks_are_named(tmp_path, lines, message):
    (tmp_path / "face.txt").write_text("\n".join(lines))
    with pytest.raises(InputError, match=message) as error:
        common.read_landmarks(tmp_path / "face.txt", (140, 128))
    assert "face.txt" in str(error.value)


def test_landmarks_that_are_missing_binary_or_partly_outside(tmp_path):
    with pytest.raises(InputError, match="no such landmark file"):
        common.read_landmarks(tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="not a landmark file"):
        common.read_landmarks(tmp_path / "binary.txt")
    # Cut by the picture's corner: allowed.
    common.write_landmarks(tmp_path / "half.txt", template_face(128) - 50)
    assert common.read_landmarks(tmp_path / "half.txt", (128, 128)).min() < 0


def test_find_landmarks_looks_beside_the_picture_and_in_a_parallel_folder(tmp_path):
    picture = tmp_path / "anna" / "a.jpg"
    picture.parent.mkdir()
    assert common.find_landmarks(picture) is common.find_landmarks(picture, tmp_path / "marks") is None
    beside = ("anna/a.txt", "anna/a.jpg.txt")
    parallel = ("marks/anna/a.txt", "marks/anna/a.jpg.txt", "marks/a.jpg.txt")
    for place in beside + parallel:
        (tmp_path / place).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / place).touch()
        folder = tmp_path / "marks" if place.startswith("marks") else None
        assert common.find_landmarks(picture, folder) == tmp_path / place     # the more exact name wins


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


def test_invert_matrix_undoes_transform_points():
    matrix, points = torch.tensor([[0.8, -0.5, 30], [0.4, 1.1, -9]]), random_images(7, 2) * 99
    assert torch.allclose(
        common.transform_points(torch.tensor([2.0, 10]), matrix), torch.tensor([26.6, 2.8])
    )
    back = common.transform_points(common.transform_points(points, matrix), common.invert_matrix(matrix))
    torch.testing.assert_close(back, points, atol=1e-3, rtol=0)


def test_five_points_are_eye_centres_nose_tip_and_mouth_corners():
    points = random_images(2, 68, 2)
    expected = torch.stack(
        [points[:, 36:42].mean(1), points[:, 42:48].mean(1), points[:, 30], points[:, 48], points[:, 54]], 1
    )
    torch.testing.assert_close(common.five_points(points), expected)


def waves(x, y):
    """A smooth picture as a function of pixel positions: a shift by half a pixel changes it by up to 0.1."""
    return torch.stack([(x / 6 + y / 9).sin(), (x / 11 - y / 7).cos(), (y / 6).sin() * (x / 8).cos()])


def waves_photo(height, width, stretch=1.0):
    y, x = torch.meshgrid(torch.arange(height) / stretch, torch.arange(width) / stretch, indexing="ij")
    return waves(x, y)


@pytest.mark.parametrize("face, size, stretch", [(100, 128, 1), (170, 128, 1), (400, 64, 5), (460, 128, 4)])
def test_align_face_is_exact_to_a_fraction_of_a_pixel(face, size, stretch):
    photo = waves_photo(430, 540, stretch)
    landmarks = similar(template_face(face), 1, 12, [(540 - face) / 2 + 11.3, (430 - face) / 2 - 6.7])
    crop, local, matrix = common.align_face(photo, landmarks, size)
    torch.testing.assert_close(
        common.five_points(local), common.five_points(template_face(size)), atol=2e-3, rtol=0
    )
    torch.testing.assert_close(local, template_face(size), atol=2e-3, rtol=0)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    source = common.transform_points(torch.stack([x, y], -1).float(), common.invert_matrix(matrix))
    inside = ((source > 10) & (source < torch.tensor([530, 420]))).all(-1)
    error = (crop - waves(source[..., 0] / stretch, source[..., 1] / stretch))[:, inside]
    assert inside.float().mean() > 0.5
    assert error.square().mean().sqrt() < 0.02  # half a pixel of the crop off: 0.05 and more


@pytest.mark.parametrize("face, size, stretch", [(170, 256, 1), (150, 128, 1), (120, 512, 2), (330, 96, 8)])
def test_paste_face_undoes_align_face_and_leaves_the_rest_alone(face, size, stretch):
    photo = waves_photo(400, 420, stretch)
    landmarks = similar(template_face(face), 1, -9, [(420 - face) / 2, (400 - face) / 2])
    crop, _, matrix = common.align_face(photo, landmarks, size)
    pasted = common.paste_face(photo, crop, matrix)
    y, x = torch.meshgrid(torch.arange(400.0), torch.arange(420.0), indexing="ij")
    place = common.transform_points(torch.stack([x, y], -1), matrix) / (size - 1)
    middle = ((place > 0.15) & (place < 0.85)).all(-1)
    outside = ((place < -0.03) | (place > 1.03)).any(-1)
    error = (pasted - photo)[:, middle]
    assert error.square().mean().sqrt() < 0.012  # half a pixel off: 0.05 and more (less where stretched)
    assert torch.equal(pasted[:, outside], photo[:, outside])
    new = common.paste_face(photo, torch.full_like(crop, 5.0), matrix)
    torch.testing.assert_close(new[:, middle], torch.full_like(new[:, middle], 5.0), atol=1e-4, rtol=0)
    assert torch.equal(new[:, outside], photo[:, outside])
    rim = ((place > 0.0) & (place < 1.0)).all(-1) & ~((place > 0.08) & (place < 0.92)).all(-1)
    assert 1.2 < new[:, rim].mean() < 4                               # the border fades, no hard seam


def literal_boxes(landmarks, size):
    """The formula of component_boxes' docstring, number by number."""
    groups = (
        [*range(17, 22), *range(36, 42)],
        [*range(22, 27), *range(42, 48)],
        range(29, 36),
        range(48, 68),
    )
    boxes = []
    for points in landmarks.tolist():
        for group in groups:
            xs, ys = zip(*(points[k] for k in group))
            half = max(max(max(xs) - min(xs), max(ys) - min(ys)) / 2, size / 32)
            low = [min(max(sum(v) / len(v) - half + 1, 0), size - size / 32) for v in (xs, ys)]
            high = [max(min(sum(v) / len(v) + half, size), a + size / 32) for v, a in zip((xs, ys), low)]
            boxes.append(low + high)
    return torch.tensor(boxes).view(-1, 4, 4)


def test_component_boxes_follow_their_formula():
    landmarks = torch.stack(
        [template_face(128, seed=s) + 9 * s for s in range(5)] + [template_face(128) * 0.02 + 60]
    )
    torch.testing.assert_close(
        common.component_boxes(landmarks, 128), literal_boxes(landmarks, 128), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("size", [32, 128, 512])
def test_component_boxes_stay_inside_and_never_vanish(size):
    shifts = random_images(400, 1, 2, seed=2) * 2.5 * size
    spreads = torch.rand(400, 1, 1, generator=common.seeded(3)) ** 3
    landmarks = (template_face(size) - size / 2) * spreads + size / 2 + shifts  # off every edge and corner
    boxes = common.component_boxes(landmarks, size)
    assert boxes.shape == (400, 4, 4) and boxes.isfinite().all() and boxes.min() >= 0 and boxes.max() <= size
    assert (boxes[..., 2:] - boxes[..., :2]).min() >= size / 32 - 1e-3
    torch.testing.assert_close(boxes, literal_boxes(landmarks, size), atol=1e-3, rtol=1e-5)


def test_left_is_the_images_left():
    boxes = common.component_boxes(common.mean_landmarks(128)[None], 128)[0]
    left, right, nose, mouth = ((box[:2] + box[2:]) / 2 for box in boxes)
    assert left[0] < nose[0] < right[0] and left[1] < nose[1] < mouth[1] and abs(left[1] - right[1]) < 8


@pytest.mark.parametrize("size", [64, 128, 512])
def test_mean_landmarks_lie_near_the_ffhq_template(size):
    points = common.mean_landmarks(size)
    assert points.shape == (68, 2)
    template = common.five_points(template_face(size))
    assert (common.five_points(points) - template).norm(dim=1).max() < 0.04 * size


def test_landmark_heatmaps_equal_a_loop():
    points = torch.tensor([[[3.0, 7.0], [10.5, 2.25], [-4, 30]]]).repeat(1, 23, 1)[:, :68]
    maps = common.landmark_heatmaps(points, 16, sigma=1.5)
    assert maps.shape == (1, 68, 16, 16)
    for k in (0, 1, 2, 67):
        for y in range(16):
            for x in range(16):
                distance = (x - points[0, k, 0]) ** 2 + (y - points[0, k, 1]) ** 2
                assert abs(maps[0, k, y, x] - math.exp(-distance / 4.5)) < 1e-6
    assert maps[0, 0, 7, 3] == 1


def test_landmark_mask_equals_a_loop_and_leaves_the_jaw_out():
    points = template_face(32)[None]
    expected = torch.tensor(
        [
            [
                float(any((x - u) ** 2 + (y - v) ** 2 <= 2.5**2 for u, v in points[0, 17:].tolist()))
                for x in range(32)
            ]
            for y in range(32)
        ]
    )
    assert torch.equal(common.landmark_mask(points, 32, radius=2.5)[0, 0], expected)
    assert 0 < expected.mean() < 1
    assert (
        common.landmark_mask(torch.full((1, 68, 2), -99.0).index_fill(1, torch.arange(17), 9), 32).sum() == 0
    )


def test_draw_landmarks_marks_the_points_and_keeps_the_rest():
    image, points = torch.zeros(3, 128, 128), template_face(128)
    drawn = common.draw_landmarks(image, points)
    x, y = points[30].round().int().tolist()
    assert drawn.shape == image.shape and drawn[1, y, x] > 0.9 and drawn[0, y, x] < 0
    assert (drawn.abs() < 0.01).all(0).float().mean() > 0.5 and image.abs().max() == 0


def stub_detector(kinds, faces, asked):
    def detector(kind, device, flip_input):
        def find(picture):
            asked.append((kind, device, picture))
            return faces
        return types.SimpleNamespace(get_landmarks_from_image=find)
    return types.SimpleNamespace(LandmarksType=types.SimpleNamespace(**kinds), FaceAlignment=detector)


@pytest.mark.parametrize("name", ["TWO_D", "_2D"])
def test_detect_landmarks_speaks_to_both_versions_of_face_alignment(monkeypatch, name):
    faces, asked = [template_face(64).numpy(), template_face(64).numpy() + 5], []
    monkeypatch.setitem(
        sys.modules, "face_alignment", stub_detector({name: "flat", "_3D": "deep"}, faces, asked)
    )
    image = random_images(3, 40, 50)
    found = common.detect_landmarks(image, device=f"stub {name}")
    torch.testing.assert_close(found, torch.stack([template_face(64), template_face(64) + 5]))
    (kind, device, picture), = asked
    assert kind == "flat" and device == f"stub {name}" and picture.dtype == np.uint8
    assert np.array_equal(picture, levels(image).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("nobody", [None, []])
def test_detect_landmarks_says_when_there_is_no_face(monkeypatch, nobody):
    monkeypatch.setitem(sys.modules, "face_alignment", stub_detector({"TWO_D": 1}, nobody, []))
    with pytest.raises(InputError, match="a.jpg: no face found"):
        common.detect_landmarks(torch.zeros(3, 40, 40), device=f"stub {nobody}", name="a.jpg")


def test_detect_landmarks_without_the_detector_names_three_ways_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "face_alignment", None)          # import then fails
    with pytest.raises(InputError) as error:
        common.detect_landmarks(torch.zeros(3, 40, 40), device="stub missing", name="a.jpg")
    assert all(way in str(error.value) for way in ("a.jpg.txt", "--aligned", "pip install face-alignment"))


# ------------------------------------------------------------------------------------- 4. Faces

def small_faces(cache, identities=2, per_identity=2, seed=0):
    return common.RenderedFaces(64, identities, per_identity, seed, cache=cache)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    return small_faces(tmp_path_factory.mktemp("rendered"))


def equal_faces(one, two):
    return torch.equal(one.image, two.image) and torch.equal(one.landmarks, two.landmarks)


def test_rendered_faces_depend_on_seed_and_index_alone(rendered, tmp_path):
    more = small_faces(tmp_path, identities=3)
    assert all(equal_faces(rendered[i], more[i]) for i in range(4))
    other = small_faces(tmp_path, identities=1, seed=1)
    pictures = [rendered[0], rendered[1], rendered[2], more[4], other[0]]
    assert all((a.image - b.image).abs().mean() > 0.02 for k, a in enumerate(pictures) for b in pictures[:k])


def test_rendered_faces_are_faces(rendered):
    face = rendered[3]
    assert len(rendered) == 4 and rendered.identity.tolist() == [0, 0, 1, 1] and face.identity == 1
    assert face.image.shape == (3, 64, 64) and face.landmarks.shape == (68, 2)
    assert face.image.dtype == face.landmarks.dtype == torch.float32
    assert face.image.min() >= -1 and face.image.max() <= 1 and face.image.std() > 0.1
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


def test_rendered_faces_are_read_from_the_cache_and_rendered_again_when_it_is_damaged(
    rendered, tmp_path, monkeypatch
):
    first = small_faces(tmp_path)
    file, = (path for path in tmp_path.iterdir() if path.is_file())
    assert all(equal_faces(first[i], rendered[i]) for i in range(4))
    whole = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(common, "render_face", None)                    # a hit renders nothing
        second = small_faces(tmp_path)
    assert all(equal_faces(second[i], rendered[i]) for i in range(4))
    for damaged in (whole[:len(whole) // 2], b"", b"not an array"):
        file.unlink()
        file.write_bytes(damaged)
        again = small_faces(tmp_path)
        assert all(equal_faces(again[i], rendered[i]) for i in range(4))
        assert file.read_bytes() == whole


def test_rendered_faces_use_the_cache_folder_of_the_environment():
    assert str(common.CACHE) == os.environ["FACE_RESTORATION_CACHE"]
    before = set(common.CACHE.rglob("*"))
    common.RenderedFaces(64, identities=1, per_identity=1, seed=4)
    assert len(set(common.CACHE.rglob("*")) - before) == 1


def test_rendered_faces_without_a_writable_cache_are_kept_in_memory(rendered, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    faces = small_faces(tmp_path / "file" / "cache")
    assert equal_faces(faces[1], rendered[1]) and "memory" in capsys.readouterr().err


def render_at_once(cache, start):
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    start.wait(60)
    small_faces(cache)[0]


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


def test_others_are_the_other_pictures_of_the_person(face_folder):
    faces = common.RenderedFaces(64, identities=24, per_identity=5)
    assert faces.others(7) == [5, 6, 8, 9] and faces.others(0) == [1, 2, 3, 4]
    folder = common.FaceFolder(face_folder, 64)
    assert folder.others(119) == [115, 116, 117, 118]


def test_face_folder_reads_a_folder_per_identity(face_folder):
    faces = common.FaceFolder(face_folder, 64)
    rendered = common.RenderedFaces(64, identities=24, per_identity=5)
    assert len(faces) == 120 and torch.equal(faces.identity, rendered.identity)
    for i in (0, 61, 119):
        assert torch.equal(levels(faces[i].image), levels(rendered[i].image)) and faces[i].identity == i // 5
        torch.testing.assert_close(faces[i].landmarks, rendered[i].landmarks, atol=6e-4, rtol=0)


def test_face_folder_resizes_pictures_with_their_landmarks(face_folder):
    small, large = common.FaceFolder(face_folder, 32)[3], common.FaceFolder(face_folder, 64)[3]
    assert small.image.shape == (3, 32, 32)
    torch.testing.assert_close(small.landmarks, (large.landmarks + 0.5) / 2 - 0.5, atol=1e-4, rtol=0)
    averaged = F.avg_pool2d(large.image, 2)
    unshifted, shifted = ((small.image - other).abs().mean() for other in (averaged, averaged.roll(1, 2)))
    assert unshifted < 0.3 * shifted


def flat_folder(root, face_folder, count=4):
    root.mkdir(exist_ok=True)
    for i in range(count):
        source = face_folder / f"person_{i % 24:02d}" / f"shot_{i // 24}.png"
        shutil.copy(source, root / f"{i:03d}.png")
        shutil.copy(f"{source}.txt", root / f"{i:03d}.png.txt")
    return root


def test_face_folder_reads_a_flat_folder_of_many_modes_and_sizes(tmp_path, face_folder):
    root = flat_folder(tmp_path / "flat", face_folder)
    Image.open(root / "000.png").convert("L").save(root / "000.png")
    Image.open(root / "001.png").convert("RGBA").resize((128, 128)).save(root / "001.png")
    points = (common.read_landmarks(root / "001.png.txt") + 0.5) * 2 - 0.5
    common.write_landmarks(root / "001.png.txt", points)
    picture = Image.open(root / "002.png")
    wide = Image.new("RGB", (100, 70), "gray")
    wide.paste(picture, (30, 4))
    wide.save(root / "002.png")
    common.write_landmarks(
        root / "002.png.txt", common.read_landmarks(root / "002.png.txt") + torch.tensor([30, 4])
    )
    (root / "notes.md").write_text("not a picture, and not taken for one")
    faces = common.FaceFolder(root, 64)
    assert len(faces) == 4 and faces.identity.tolist() == [0, 1, 2, 3] and faces.others(1) == []
    assert all(face.image.shape == (3, 64, 64) for face in faces)
    assert torch.equal(faces[0].image[0], faces[0].image[1])
    torch.testing.assert_close(faces[1].landmarks, (points + 0.5) / 2 - 0.5, atol=1e-3, rtol=0)
    aligned = common.five_points(faces[2].landmarks)                  # not square: cut out by its landmarks
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


def test_face_folder_without_landmarks_or_pictures_says_so(tmp_path, face_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "face_alignment", None)
    for folder in ("empty", "bare"):
        (tmp_path / folder).mkdir()
    shutil.copy(face_folder / "person_00" / "shot_0.png", tmp_path / "bare")
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
    assert all(image.isfinite().all() for image in images)
    assert told.count("007.png") == 1 and told.count("020.png") == 1


def test_a_damaged_picture_is_never_replaced_by_another_person(tmp_path, face_folder):
    root = shutil.copytree(face_folder, tmp_path / "faces")
    person = root / "person_03"
    (person / "shot_4.png").unlink()
    (person / "shot_4.png.txt").rename(person / "shot_4.jpg.txt")
    (person / "shot_4.jpg").write_bytes(jpeg_bytes(64, 64)[:3000])    # its head is whole
    faces = common.FaceFolder(root, 64)
    # Its neighbour may be held out; a loss or a guide would take one person for the other.
    assert [face.identity for face in faces] == faces.identity.tolist()


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
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda picture: read.append(picture.filename))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda picture: read.append(picture.filename))
    assert len(common.FaceFolder(face_folder, 64)) == 120 and read == []  # 70,000 would take half an hour


def test_fingerprint_changes_with_the_pictures(tmp_path, face_folder):
    root = flat_folder(tmp_path / "flat", face_folder)
    one = common.FaceFolder(root, 64).fingerprint
    assert common.FaceFolder(root, 64).fingerprint == one != common.FaceFolder(root, 32).fingerprint
    (root / "000.png").unlink()
    assert common.FaceFolder(root, 64).fingerprint != one


def test_split_identities_shares_no_identity_and_repeats():
    faces = types.SimpleNamespace(identity=torch.arange(100).repeat_interleave(3).roll(7))
    parts = common.split_identities(faces, seed=2)
    assert sorted(sum(parts, [])) == list(range(300))
    people = [set(faces.identity[part].tolist()) for part in parts]
    assert [len(group) for group in people] == [88, 4, 8] and len(set.union(*people)) == 100
    assert common.split_identities(faces, seed=2) == parts != common.split_identities(faces, seed=3)
    few = types.SimpleNamespace(identity=torch.tensor([0, 1, 2]))
    assert all(len(part) == 1 for part in common.split_identities(few))
    with pytest.raises(InputError, match="2 identities are too few"):
        common.split_identities(types.SimpleNamespace(identity=torch.tensor([0, 1, 1])))


def test_stack_faces_and_spread(face_folder):
    faces = common.FaceFolder(face_folder, 64)
    images, landmarks = common.stack_faces(faces, [4, 2])
    assert torch.equal(images[0], faces[4].image) and torch.equal(landmarks[1], faces[2].landmarks)
    assert common.spread(list(range(10, 20)), 5) == [10, 12, 14, 16, 18]
    assert common.spread([3, 1], 5) == [3, 1]


# ------------------------------------------------------------------------------------- 5. Metrics

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


def exact_sample(mean, root, count=50):
    """Points (count,D) whose sample mean and covariance root·rootᵀ are exact."""
    x = torch.randn(count, len(mean), generator=common.seeded(0), dtype=torch.double)
    x = torch.linalg.qr(x - x.mean(0))[0] * math.sqrt(count - 1)
    return x @ torch.tensor(root, dtype=torch.double).T + torch.tensor(mean, dtype=torch.double)


def test_frechet_distance_equals_its_closed_forms():
    one, two = (
        exact_sample([1, 2, 3], [[2, 0, 0], [0, 1, 0], [0, 0, 5]]),
        exact_sample([1, 0, 4], np.diag([1, 3, 5]).tolist()),
    )
    assert abs(common.frechet_distance(one, two) - (4 + 1 + 1 + 4)) < 1e-6       # |μ1−μ2|² + Σ (σ1−σ2)²
    a, b = np.array([[2, 0], [1.5, 1]]), np.array([[1, 0], [-2, 0.5]])  # covariances that do not commute
    c1, c2 = a @ a.T, b @ b.T
    root = math.sqrt(np.trace(c1 @ c2) + 2 * math.sqrt(np.linalg.det(c1 @ c2)))  # of a 2×2 matrix
    distance = common.frechet_distance(
        exact_sample([0, 0], a.tolist()), exact_sample([3, 0], b.tolist(), 70)
    )
    assert abs(distance - (9 + np.trace(c1 + c2) - 2 * root)) < 1e-6


def test_frechet_distance_of_fewer_pictures_than_features():
    one = random_images(6, 40).double()
    assert abs(common.frechet_distance(one, one)) < 1e-4
    assert abs(common.frechet_distance(one, one + 0.5) - 40 * 0.25) < 1e-4


def test_lpips_and_fid_without_weights_name_their_source(tmp_path):
    for make, source in ((lambda path: common.LPIPS(path, path), "alexnet-owt-7be5be79.pth"),
                         (lambda path: common.FID(path), "pt_inception-2015-12-05-6726825d.pth")):
        for path in (None, tmp_path / "none.pth"):
            with pytest.raises(InputError, match=source):
                make(path)
        torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
        with pytest.raises(InputError, match="does not fit"):
            make(tmp_path / "other.pth")


@pytest.fixture(scope="module")
def lpips(tmp_path_factory):
    """LPIPS with random weights in the published files' layout, and the two state dicts."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(0)
    net = torchvision.models.alexnet(weights=None).features
    backbone = {f"features.{name}": value for name, value in net.state_dict().items()}
    backbone["classifier.6.bias"] = torch.zeros(1000)
    linear = {
        f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate((64, 192, 384, 256, 256))
    }
    torch.save(backbone, folder / "alexnet.pth")
    torch.save(linear, folder / "lin.pth")
    return common.LPIPS(folder / "alexnet.pth", folder / "lin.pth"), net, linear


def test_lpips_is_a_distance_and_equals_the_published_form(lpips):
    measure, net, linear = lpips
    one, two = random_images(2, 3, 64, 64), random_images(2, 3, 64, 64, seed=1)
    assert measure(one, one).abs().max() == 0
    torch.testing.assert_close(measure(one, two), measure(two, one))
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ([-.030, -.088, -.188], [.458, .448, .450]))
    for k in range(2):
        total = 0.0
        for layer, end in enumerate((2, 5, 8, 10, 12)):               # after each ReLU
            maps = [net[:end](((picture[k] - shift) / scale)[None])[0].detach() for picture in (one, two)]
            x, y = (m / m.norm(dim=0, keepdim=True).clamp(min=1e-10) for m in maps)
            weights = linear[f"lin{layer}.model.1.weight"].flatten()
            total += sum(w * ((p - q) ** 2).mean() for w, p, q in zip(weights, x, y))
        torch.testing.assert_close(measure(one, two)[k], total, rtol=1e-4, atol=1e-6)


def test_lpips_has_no_gradient_of_its_own_but_hands_on_its_inputs(lpips):
    x = random_images(1, 3, 64, 64).requires_grad_()
    lpips[0](x, random_images(1, 3, 64, 64, seed=1)).sum().backward()
    assert x.grad.abs().max() > 0 and not any(p.requires_grad for p in lpips[0].parameters())


def test_fid_pools_as_the_original_network_and_is_zero_for_a_set_with_itself(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = torchvision.models.inception_v3(
        weights=None, num_classes=1008, aux_logits=False, init_weights=False
    ).eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):  # features that do not fade on their way through 90 layers
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    fid, images = common.FID(tmp_path / "inception.pth"), random_images(2, 3, 40, 40)
    features = fid.features([images[:1], images[1:]])
    assert features.shape == (2, 2048) and features.std() > 0.01

    # The original averages over the pixels inside only, and its last block takes a maximum instead.
    pools = types.SimpleNamespace(**vars(F))
    pools.avg_pool2d = functools.partial(F.avg_pool2d, count_include_pad=False)
    last = types.SimpleNamespace(**{**vars(F), "avg_pool2d": F.max_pool2d})
    monkeypatch.setattr(torchvision.models.inception, "F", pools)
    net.fc = nn.Identity()
    net.Mixed_7c.register_forward_pre_hook(
        lambda *_: monkeypatch.setattr(torchvision.models.inception, "F", last)
    )
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
    assert abs(low - (mean - 1.96 * error)) < 0.2 * error and abs(high - (mean + 1.96 * error)) < 0.2 * error
    assert common.paired_gain(baseline + gains, baseline) == result
    json.dumps(result)


def test_angular_margin_loss_equals_a_loop():
    embedding, centres = F.normalize(random_images(5, 8), dim=1), random_images(3, 8, seed=1) * 4
    label, total = torch.tensor([0, 2, 1, 1, 0]), 0.0
    for vector, true in zip(embedding, label.tolist()):
        angles = [math.acos(vector @ centre / centre.norm()) for centre in centres]
        scores = [24 * math.cos(angle + 0.3 * (k == true)) for k, angle in enumerate(angles)]
        total += math.log(sum(math.exp(score) for score in scores)) - scores[true]
    loss = common.angular_margin_loss(embedding, centres, label, margin=0.3, scale=24.0)
    assert abs(loss.item() - total / 5) < 1e-4


def test_verification_accuracy_is_1_for_told_apart_people_and_a_half_by_chance():
    identity = torch.arange(40).repeat_interleave(5)
    people, noise = torch.eye(40, 64), torch.randn(200, 64, generator=common.seeded(1))
    assert common.verification_accuracy(people[identity], identity) == 1
    assert abs(common.verification_accuracy(F.normalize(noise, dim=1), identity) - 0.5) < 0.06
    between = common.verification_accuracy(F.normalize(people[identity] + 0.2 * noise, dim=1), identity)
    assert 0.7 < between < 0.99


def test_verification_accuracy_of_embeddings_with_a_wide_gap_is_1():
    identity = torch.arange(40).repeat_interleave(5)
    people, noise = torch.eye(40, 64), torch.randn(200, 64, generator=common.seeded(1))
    embeddings = F.normalize(people[identity] + 0.03 * noise, dim=1)
    same = identity[:, None] == identity
    assert (embeddings @ embeddings.T)[same].min() > 0.8 and (embeddings @ embeddings.T)[~same].max() < 0.4
    assert common.verification_accuracy(embeddings, identity) == 1


def trained_recogniser():
    """Random weights and uneven statistics, as after training."""
    torch.manual_seed(0)
    net = common.Recogniser((4, 8, 8, 16)).eval()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for values, low, high in ((module.running_mean, -0.5, 0.5), (module.running_var, 0.3, 2),
                                      (module.weight.data, 0.5, 2), (module.bias.data, -0.5, 0.5)):
                values.uniform_(low, high)
    return net


def test_a_folded_recogniser_is_the_same_function_without_normalisation_layers():
    net, faces = trained_recogniser(), random_images(3, 3, 64, 64)
    folded = net.folded()
    torch.testing.assert_close(folded(faces), net(faces), atol=1e-5, rtol=1e-4)
    for one, two in zip(folded.features(faces), net.features(faces)):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.stages.modules())
    assert not folded.training and not any(p.requires_grad for p in folded.parameters())
    assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules())  # the original keeps its own


def test_recogniser_gives_unit_vectors_at_any_size_and_four_scales():
    net = trained_recogniser()
    for size in (64, 128, 96):
        embedding = net(random_images(2, 3, size, size))
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))
    assert [tuple(m.shape) for m in net.features(random_images(1, 3, 96, 96))] == [
        (1, 4, 48, 48), (1, 8, 24, 24), (1, 8, 12, 12), (1, 16, 6, 6)]


def test_identity_distance_is_the_angle_in_degrees():
    net, faces = trained_recogniser().folded(), random_images(3, 3, 64, 64)
    assert common.identity_distance(net, faces, faces).max() < 0.1
    angles = torch.deg2rad(torch.tensor([0.0, 60, 135]))
    vectors = {
        0: torch.stack([torch.ones(3), torch.zeros(3)], 1),
        1: torch.stack([angles.cos(), angles.sin()], 1),
    }
    distance = common.identity_distance(
        lambda x: vectors[int(x[0, 0, 0, 0])], torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8)
    )
    torch.testing.assert_close(distance, torch.tensor([0.0, 60, 135]), atol=1e-3, rtol=0)


def test_recogniser_is_trained_once_repeatably_and_again_when_its_cache_is_damaged(
    face_folder, monkeypatch, tmp_path
):
    monkeypatch.setattr(common, "CACHE", tmp_path)
    faces = common.FaceFolder(face_folder, 64)
    first = common.recogniser(faces, epochs=1, quiet=True)
    file, = tmp_path.iterdir()
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
    assert other.widths != first.widths and len(list(tmp_path.iterdir())) == 2


def test_recogniser_of_pictures_without_identities_uses_rendered_faces_and_says_so(
        tmp_path, face_folder, monkeypatch, capsys):
    faces = common.FaceFolder(flat_folder(tmp_path / "flat", face_folder), 64)
    rendered = common.FaceFolder(face_folder, 64)
    monkeypatch.setattr(common, "CACHE", tmp_path)
    monkeypatch.setattr(common, "RenderedFaces", lambda *a, **k: rendered)
    common.recogniser(faces, epochs=1)
    assert "rendered faces" in capsys.readouterr().err
    assert any(rendered.fingerprint in file.name for file in tmp_path.iterdir())


@pytest.mark.parametrize("face", [True, False])
def test_vgg_takes_weights_of_any_naming_and_equals_torchvision(tmp_path, face):
    torch.manual_seed(0)
    net = (torchvision.models.vgg16 if face else torchvision.models.vgg19)(
        weights=None, init_weights=False
    ).features
    for layer in net:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    names = iter(range(99))
    parts = [(f"conv{next(names)}", layer) for layer in net if isinstance(layer, nn.Conv2d)]
    torch.save(
        {
            f"{name}.{kind}": getattr(layer, kind).data
            for name, layer in parts
            for kind in ("weight", "bias")
        },
        tmp_path / "net.pth",
    )
    vgg = common.load_vgg(tmp_path / "net.pth") if face else common.VGG()
    if not face:
        mine = [module for module in vgg.modules() if isinstance(module, nn.Conv2d)]
        for layer, (_, source) in zip(mine, parts):
            layer.load_state_dict(source.state_dict())
    image = random_images(1, 3, 32, 32)
    if face:  # Caffe's: BGR, 0 … 255, less the mean face
        x = (image + 1) * 127.5 - torch.tensor([129.1863, 104.7624, 93.5940]).view(3, 1, 1)
        x, ends = x[:, [2, 1, 0]], (9, 16, 23, 30)                    # relu2_2, relu3_3, relu4_3, relu5_3
    else:
        mean, deviation = (
            torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        x, ends = ((image + 1) / 2 - mean) / deviation, (9, 18, 27, 36)
    with torch.no_grad():
        for mine, end in zip(vgg.features(image), ends):
            torch.testing.assert_close(mine, net[:end](x), rtol=1e-3, atol=1e-5)


def test_vgg_refuses_other_weights(tmp_path):
    torch.save({"a.weight": torch.zeros(4, 3, 3, 3), "a.bias": torch.zeros(4)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="neither VGG-16 .* nor VGG-19"):
        common.load_vgg(tmp_path / "other.pth")


# ------------------------------------------------------------------------------------- 6. Download

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """Its address, and what was asked: /file honours Range, /whole does not, /broken hangs up half way."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            asked.append((self.path, wanted))
            start = int(wanted[6:-1]) if wanted and self.path != "/whole" else 0
            if self.path == "/none":
                return self.send_error(404)
            if start >= len(CONTENT):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            first = [path for path, _ in asked].count("/broken") == 1
            self.wfile.write(CONTENT[start:1_500_000 if first else None])

        def log_message(self, *_):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}", asked
    web.shutdown()
    web.server_close()


def test_download_fetches_verifies_and_does_not_fetch_again(server, tmp_path):
    url, asked = server
    path = tmp_path / "new" / "weights.pth"
    for _ in range(2):
        assert common.download(f"{url}/file", path, SHA256) == path and path.read_bytes() == CONTENT
    assert asked == [("/file", None)] and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("page, part", [("/file", 1000), ("/whole", 1000), ("/file", len(CONTENT))])
def test_download_goes_on_where_it_stopped(server, tmp_path, page, part):
    url, asked = server
    (tmp_path / "w.pth.part").write_bytes(CONTENT[:part])
    assert common.download(url + page, tmp_path / "w.pth", SHA256).read_bytes() == CONTENT
    assert asked == [(page, f"bytes={part}-")] and [file.name for file in tmp_path.iterdir()] == ["w.pth"]


def test_download_resumes_a_connection_that_breaks(server, tmp_path):
    url, asked = server
    assert common.download(f"{url}/broken", tmp_path / "w.pth", SHA256).read_bytes() == CONTENT
    (_, first), (_, second) = asked
    assert first is None and int(second.removeprefix("bytes=").removesuffix("-")) in range(1, len(CONTENT))


def test_download_refuses_what_is_not_the_expected_file(server, tmp_path):
    url, _ = server
    (tmp_path / "w.pth").write_bytes(b"an older file")
    with pytest.raises(InputError, match="sha256"):
        common.download(f"{url}/file", tmp_path / "w.pth", "0" * 64)
    assert [file.name for file in tmp_path.iterdir()] == ["w.pth"]
    assert (tmp_path / "w.pth").read_bytes() == b"an older file"
    with pytest.raises(InputError, match="404"):
        common.download(f"{url}/none", tmp_path / "x.pth", SHA256)
    assert not (tmp_path / "x.pth").exists()


class Site:
    """A server whose file and manners change: what each answer is, is taken from `manners`, the last of
    them for ever. A manner: version of the file, whether Range is honoured, how many bytes are sent before
    it hangs up, the Content-Length it states beyond the true one, seconds it waits, whether it has an ETag.
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
        self.url = f"http://127.0.0.1:{self.web.server_port}/weights.pth"
        threading.Thread(target=self.web.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    site = Site()
    yield site
    site.web.shutdown()
    site.web.server_close()


HALF = {"sent": 1_500_000}


def test_download_without_a_checksum_checks_the_length_and_does_not_fetch_again(site, tmp_path):
    for _ in range(2):
        assert common.download(site.url, tmp_path / "w.pth").read_bytes() == CONTENT
    assert site.asked == [None] and [file.name for file in tmp_path.iterdir()] == ["w.pth"]


@pytest.mark.parametrize("manners, begins_again", [
    ([HALF, {}], False), ([*[{"sent": 500_000}] * 5, {}], False),
    ([HALF, {"range": False}], True), ([HALF | {"tag": False}, {"tag": False}], True),
    ([HALF, {"version": 2}], True), ([HALF, {"version": 2, "careless": True}, {"version": 2}], True)],
    ids=["hangs up", "again and again", "no Range", "no version", "changed", "changed, careless"])
def test_download_goes_on_only_with_the_same_file(site, tmp_path, manners, begins_again):
    site.manners = manners
    changed = manners[-1].get("version") == 2
    expected = bytes(reversed(CONTENT)) if changed else CONTENT
    assert common.download(site.url, tmp_path / "w.pth").read_bytes() == expected
    assert [file.name for file in tmp_path.iterdir()] == ["w.pth"] and site.asked[0] is None
    if not begins_again:
        assert None not in site.asked[1:]


def test_download_goes_on_in_a_later_run(site, tmp_path):
    site.manners = [HALF, {"sent": 0}]
    with pytest.raises(InputError, match="run the command again"):
        common.download(site.url, tmp_path / "w.pth")
    assert not (tmp_path / "w.pth").exists()
    site.manners = [{}]
    assert common.download(site.url, tmp_path / "w.pth").read_bytes() == CONTENT
    assert int(site.asked[-1].removeprefix("bytes=").removesuffix("-")) > 1_000_000
    (tmp_path / "x.pth.part").write_bytes(b"of nobody knows what")
    assert common.download(site.url, tmp_path / "x.pth").read_bytes() == CONTENT and site.asked[-1] is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["w.pth", "x.pth"]


@pytest.mark.parametrize("range_", [True, False])
def test_download_refuses_a_body_shorter_than_announced(site, tmp_path, range_):
    site.manners = [{"more": 1000, "range": range_, "tag": range_}]
    with pytest.raises(InputError, match="run the command again") as caught:
        common.download(site.url, tmp_path / "w.pth")
    assert "\n" not in str(caught.value) and len(site.asked) in (3, 4) and not (tmp_path / "w.pth").exists()


def test_download_of_a_body_longer_than_announced_ends_at_that_length(site, tmp_path):
    """It cannot be told from a whole file but by a checksum, or by reading it."""
    site.manners = [{"more": -1000}]
    assert common.download(site.url, tmp_path / "w.pth").read_bytes() == CONTENT[:-1000]
    with pytest.raises(InputError, match="sha256"):
        common.download(site.url, tmp_path / "x.pth", SHA256)
    assert [file.name for file in tmp_path.iterdir()] == ["w.pth"]


def test_download_gives_up_on_a_server_that_falls_silent(site, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "TIMEOUT", (1, 0.2))
    site.manners = [{"sent": 1000, "wait": 1}, {"sent": 0, "wait": 1}]
    with pytest.raises(InputError, match="timed out"):
        common.download(site.url, tmp_path / "w.pth")
    assert 3 <= len(site.asked) <= 4


def test_download_needs_a_server(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for url in ("http://127.0.0.1:9/w.pth", "http://", "ftp://127.0.0.1/w.pth"):
        with pytest.raises(InputError) as caught:
            common.download(url, tmp_path / "w.pth")
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- 7. Runs

def test_seeded_streams_repeat_and_differ():
    def numbers(*key):
        return torch.randint(2**60, (4,), generator=common.seeded(*key)).tolist()
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 2), (2, 1, 0), (12, 3), (1, 23)]
    assert len({tuple(numbers(*key)) for key in keys}) == len(keys)
    assert numbers(3, 4) == numbers(3, 4)


def test_choose_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert common.choose_device("auto") == common.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="--device cuda: no CUDA GPU"):
        common.choose_device("cuda")
    with pytest.raises(InputError, match="--device tpu: unknown"):
        common.choose_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (
        common.choose_device("auto") == torch.device("cuda", 3) and common.choose_device("cpu").type == "cpu"
    )


def test_autocast_follows_precision():
    with common.autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == common.precision("cpu")
    assert common.precision("cpu") in (torch.float32, torch.bfloat16)


class WithEntries(nn.Module):
    """Two convolutions, the first under spectral norm, and what a dictionary keeps."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 3)), nn.LeakyReLU(0.2), nn.Conv2d(4, 2, 3))
        self.entries = nn.Parameter(torch.randn(5, 4, 3, 3))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_for_inference_changes_how_a_network_computes_not_what(kind):
    torch.manual_seed(1)
    net, x = WithEntries().eval(), torch.randn(2, 3, 9, 9)
    expected, before = net(x).detach(), x.clone()
    ready = common.for_inference(net, "cpu", kind, exact=("body.2",))
    with common.autocast("cpu", kind):
        torch.testing.assert_close(ready(x).float(), expected, **(
            {"rtol": 1e-5, "atol": 1e-6} if kind == "float32" else {"rtol": 0.03, "atol": 0.03}))
    assert torch.equal(x, before) and not any(weight.requires_grad for weight in ready.parameters())
    first, activation, last = ready.body
    assert type(first) is nn.Conv2d and activation.inplace and not parametrize.is_parametrized(first)
    assert (first.weight.dtype, last.weight.dtype) == (getattr(torch, kind), torch.float32)
    for layer in (first, last):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert ready.entries.is_contiguous() and ready.entries.dtype == torch.float32


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again():
    import resource                                                 # not on every system
    common.keep_freed_memory()
    faults = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2**26, dtype=torch.uint8).fill_(1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert faults[-1] < 100                                        # 64 MB paged in anew are 16,384 of 4 kB


def test_replacing_renames_in_the_end_and_removes_its_temporary_on_failure(tmp_path):
    path = tmp_path / "new" / "a.json"
    with common.replacing(path) as temporary:
        temporary.write_text("1")
        assert not path.exists() and temporary.suffix == ".json" and temporary.parent == path.parent
    for fault in (ValueError, KeyboardInterrupt):
        with pytest.raises(fault), common.replacing(path) as temporary:
            temporary.write_text("2")
            raise fault
    assert list(path.parent.iterdir()) == [path] and path.read_text() == "1"
    with pytest.raises(InputError, match="cannot be written"), common.replacing(path / "below" / "b.json"):
        raise AssertionError("a file is in the folder's place")


def test_write_json_writes_what_json_reads(tmp_path):
    common.write_json(tmp_path / "a.json", {"a": [1, 2.5], "ü": None})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": [1, 2.5], "ü": None}


def checkpoint(folder):
    state = {"script": "dfdnet", "net": {"w": torch.arange(5.0)}, "step": 7, "note": None}
    common.save_checkpoint(folder / "checkpoint.pt", state)
    return folder / "checkpoint.pt", state


def test_checkpoints_are_saved_and_loaded(tmp_path):
    path, state = checkpoint(tmp_path)
    loaded = common.load_checkpoint(path, "dfdnet")
    assert torch.equal(loaded["net"]["w"], state["net"]["w"]) and loaded["step"] == 7
    assert list(tmp_path.iterdir()) == [path]


class Bomb:
    """Unpickled without care, it makes a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_checkpoints_that_cannot_be_used_are_refused(tmp_path):
    path, _ = checkpoint(tmp_path)
    with pytest.raises(InputError, match="a checkpoint of dfdnet.py, not of gfrnet.py"):
        common.load_checkpoint(path, "gfrnet")
    with pytest.raises(InputError, match="no such checkpoint"):
        common.load_checkpoint(tmp_path / "none.pt", "dfdnet")
    whole = path.read_bytes()
    for damaged in (whole[:len(whole) // 2], whole[:10], b"", b"words"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged, or not a checkpoint"):
            common.load_checkpoint(path, "dfdnet")
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="not a checkpoint of this repository"):
        common.load_checkpoint(path, "dfdnet")


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_checkpoint_that_holds_code_is_refused_and_does_not_run(tmp_path, save):
    save({"script": "dfdnet", "net": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pt")
    with pytest.raises(InputError, match="bomb.pt"):
        common.load_checkpoint(tmp_path / "bomb.pt", "dfdnet")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()                                # the bomb is live


def test_progress_writes_plain_lines_where_there_is_no_terminal(capsys):
    progress = common.Progress("training", 100)
    progress.update(10, "loss 1")
    progress.line("validation 20 dB")
    progress.close("done")
    common.Progress("silent", 100, quiet=True).line("nothing")
    told = capsys.readouterr().out
    assert "\033" not in told and "\r" not in told and "validation 20 dB\n" in told and "silent" not in told
    assert "training: 100 steps" in told


def test_write_log_writes_a_table_and_curves(tmp_path):
    common.write_log(tmp_path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "psnr": 20.123456789}])
    assert (tmp_path / "log.csv").read_text().split() == ["step,loss,psnr", "1,2.0,", "2,1.5,20.123457"]
    assert common.read_image(tmp_path / "curves.png").std() > 0.05
    assert {file.name for file in tmp_path.iterdir()} == {"log.csv", "curves.png"}


def test_print_table_shows_each_task(capsys):
    values = {"psnr": 20.0, "ssim": 0.5, "identity": 30.0}
    common.print_table({"x4": {"faces": 12, "input": values, "restored": {**values, "psnr": 23.25},
                               "paired_psnr_gain": {"mean": 3.25, "ci95": [3.0, 3.5]}}})
    told = capsys.readouterr().out
    assert all(text in told for text in ("x4", "12", "23.25", "+3.25 dB", "[+3.00, +3.50]"))


def test_one_process_is_rank_0_of_1(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with common.process_group() as place:
        assert place == (0, 1)


def test_run_script_turns_bad_input_into_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/dfdnet.py"])

    def main(error):
        raise error
    for error, status, text in ((InputError("a.jpg: no such file"), 2, "dfdnet.py: a.jpg: no such file\n"),
                                (KeyboardInterrupt(), 130, "--resume")):
        with pytest.raises(SystemExit) as end:
            common.run_script(functools.partial(main, error))
        assert end.value.code == status and text in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        common.run_script(lambda: 0)
    assert end.value.code == 0


def keep(crops, landmarks, file):
    return crops


def write_photo(path, height=300, width=340, faces=((150, 30, 60),), stretch=2):
    """A picture of waves with landmark files that claim faces (size, left, top) in it."""
    common.write_image(path, waves_photo(height, width, stretch))
    points = torch.stack([template_face(face) + torch.tensor([left, top]) for face, left, top in faces])
    common.write_landmarks(path.with_name(path.name + ".txt"), points)
    return points


@pytest.mark.parametrize("side", [150, 64])
def test_restore_files_aligns_every_face_and_pastes_it_back(tmp_path, side):
    write_photo(tmp_path / "a.png", faces=((side, 30, 60), (side, 170, 90)))
    seen = []

    def restore(crops, landmarks, file):
        seen.append((crops.shape, landmarks, file.name))
        return crops
    assert common.restore_files(tmp_path / "a.png", tmp_path / "out", 128, restore) == 0
    (shape, landmarks, name), = seen
    assert shape == (2, 3, 128, 128) and name == "a.png"
    torch.testing.assert_close(landmarks, template_face(128).expand(2, -1, -1), atol=0.05, rtol=0)
    photo, result = common.read_image(tmp_path / "a.png"), common.read_image(tmp_path / "out" / "a.png")
    grown = max(128 / side, 1)                                        # small faces: the photo is enlarged
    assert result.shape == (3, round(300 * grown), round(340 * grown))
    expected = F.interpolate(photo[None], result.shape[1:], mode="bicubic", antialias=True)[0].clamp(-1, 1)
    assert (result - expected).square().mean().sqrt() < 0.01
    common.restore_files(tmp_path / "a.png", tmp_path / "ones", 128, lambda c, p, f: torch.ones_like(c))
    changed = (common.read_image(tmp_path / "ones" / "a.png") > 0.99).all(0)
    centres = [((left + side / 2) * grown, (top + side / 2) * grown) for left, top in ((30, 60), (170, 90))]
    assert all(changed[round(y), round(x)] for x, y in centres)
    assert not changed[:round(40 * grown)].all(1).any() and changed.float().mean() < 2 * (side / 300) ** 2


def test_restore_files_writes_an_aligned_crop_at_the_size_asked(tmp_path):
    common.write_image(tmp_path / "a.png", waves_photo(64, 64))
    shapes = []

    def restore(crops, landmarks, file):
        shapes.append(crops.shape)
        torch.testing.assert_close(landmarks[0], common.mean_landmarks(128), atol=1e-2, rtol=0)
        return crops
    common.restore_files(tmp_path / "a.png", tmp_path / "out", 128, restore, aligned=True)
    assert shapes == [(1, 3, 128, 128)]
    result = common.read_image(tmp_path / "out" / "a.png")
    y, x = torch.meshgrid(
        (torch.arange(128) + 0.5) / 2 - 0.5, (torch.arange(128) + 0.5) / 2 - 0.5, indexing="ij"
    )
    assert (result - waves(x, y))[:, 8:-8, 8:-8].square().mean().sqrt() < 0.02


def test_restore_files_skips_what_exists_and_names_what_fails(tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        write_photo(folder / name, 150, 170, ((120, 20, 20),))
    (folder / "c.jpg").write_text("text")
    assert common.restore_files(folder, out, 64, keep, check=True) == 1
    told = capsys.readouterr()
    assert "c.jpg" in told.err and "2 restored" in told.out and "1 failed" in told.out
    assert {file.name for file in out.iterdir()} == {"a.png", "a_check.png", "b.png", "b_check.png"}
    (out / "a.png").write_bytes(b"kept")
    common.restore_files(folder, out, 64, keep)
    assert (out / "a.png").read_bytes() == b"kept" and "2 skipped" in capsys.readouterr().out
    common.restore_files(folder, out, 64, keep, overwrite=True)
    assert (out / "a.png").read_bytes() != b"kept"


def test_restore_files_keeps_pictures_of_the_same_name_apart(tmp_path):
    for name in ("a.png", "a.jpg"):
        write_photo(tmp_path / name, 150, 170, ((120, 20, 20),))
    common.restore_files(tmp_path, tmp_path / "out", 64, keep)
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_restore_files_refuses_what_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        common.restore_files(tmp_path / "none", tmp_path / "out", 64, keep)
    with pytest.raises(InputError, match="no pictures"):
        common.restore_files(tmp_path, tmp_path / "out", 64, keep)
    (tmp_path / "a.jpg").write_text("text")
    with pytest.raises(InputError, match="a.jpg: not a readable picture"):
        common.restore_files(tmp_path / "a.jpg", tmp_path / "out", 64, keep, aligned=True)


def test_mean_landmarks_lie_on_the_template_and_grow_with_the_crop():
    points = common.five_points(common.mean_landmarks(512))
    assert (points - common.FFHQ_TEMPLATE).norm(dim=1).max() < 12
    assert torch.allclose((common.mean_landmarks(128) + 0.5) * 4, common.mean_landmarks(512) + 0.5)
    boxes = common.component_boxes(common.mean_landmarks(512)[None], 512)[0]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert centres[0, 0] < centres[2, 0] < centres[1, 0] and centres[3, 1] > centres[2, 1] > centres[0, 1]
