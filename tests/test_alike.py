"""What several scripts do alike, each in code of its own: one test for all of them."""
import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import OVERLAPPING, SHARED, TINY, paste_by_loop, random, some_encoder, uniform
from torch import nn

import common


@pytest.mark.parametrize("name", ["gfrnet", "asffnet", "dfdnet", "dmdnet"])
def test_the_rate_is_constant_and_falls_to_zero_in_the_last_steps(name):
    script = importlib.import_module(name)
    cfg = replace(script.TINY, steps=10, cooldown=0.5, learning_rate=1e-3)
    rates = [cfg.rate(step) for step in range(1, 11)]
    assert rates == pytest.approx([1e-3] * 6 + [8e-4, 6e-4, 4e-4, 2e-4])
    assert script.PAPER.rate(1) == script.PAPER.rate(script.PAPER.steps) == 2e-4


# RoIAlign and its reverse

@pytest.mark.parametrize("name", ["dfdnet", "dmdnet"])
def test_crop_of_a_linear_ramp_is_the_ramp_at_the_bin_centres(name):
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(26.0), indexing="ij")
    features = torch.stack([torch.stack([3 * x + y + 10 * n, 2 - y]) for n in range(2)])
    boxes = torch.tensor([[[10.0, 20, 31, 44], [50, 9, 71, 30], [33.5, 40, 60, 67], [20, 60, 90, 75]],
                          [[14.0, 25, 35, 40], [52, 14, 70, 36], [40.5, 44, 66, 61], [24, 66, 84, 85]]])
    parts = importlib.import_module(name).crop_components(features, boxes, 4, (5, 3, 4, 7))
    for part, size, box in zip(parts, (5, 3, 4, 7), boxes.unbind(1), strict=True):
        assert part.shape == (2, 2, size, size)
        for n in range(2):
            x1, y1, x2, y2 = (box[n] / 4).tolist()
            at = (torch.arange(size) + 0.5) / size
            across, down = x1 + at * (x2 - x1) - 0.5, y1 + at * (y2 - y1) - 0.5  # pixel i spans i … i + 1
            torch.testing.assert_close(part[n, 0], 3 * across + down[:, None] + 10 * n, rtol=0, atol=1e-3)
            torch.testing.assert_close(part[n, 1], 2 - down[:, None].expand(size, size), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["dfdnet", "dmdnet"])
def test_paste_equals_bilinear_sampling_pixel_by_pixel_with_means_in_overlaps(name):
    boxes = OVERLAPPING.clone()
    boxes[1, 3] = torch.tensor([-3, 3.5, 9.2, 40])                        # over two edges
    parts = [random(2, 3, size, size, seed=size) for size in (5, 4, 3, 6)]
    pasted = importlib.import_module(name).paste_components(parts, boxes, 2, (16, 18))
    expected, inside = paste_by_loop(parts, boxes, 2, 16, 18)
    torch.testing.assert_close(pasted, expected, rtol=1e-4, atol=1e-5)
    assert not pasted.movedim(1, 3)[~inside].any()


# Losses and discriminators

def by_loop(restored, target, ours, theirs):
    """The pixel term, the perceptual one of each map, the style term: means over a batch, in float64."""
    pixel = ((restored.double() - target.double()) ** 2).mean().item()
    perceptual, style = [], 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.double().numpy(), b.double().numpy()
        perceptual.append(((a - b) ** 2).sum() / a.size)
        for n, c, d in np.ndindex(len(a), a.shape[1], a.shape[1]):
            change = (a[n, c] * a[n, d]).sum() - (b[n, c] * b[n, d]).sum()
            style += (change / a[n].size) ** 2 / len(a)
    return pixel, perceptual, style


@pytest.mark.parametrize("name, sides", [("asffnet", (8,)), ("dfdnet", (8, 4, 2, 1)), ("dmdnet", (8, 4, 2))])
def test_every_loss_is_the_papers(name, sides):
    """ASFFNet's Eq. (10) to (16), DFDNet's (7) to (9), DMDNet's (11) to (17). sides: of the score maps."""
    script = importlib.import_module(name)
    restored, target = random(2, 3, 3, 5, 4)
    shapes = [(3, 4, 8, 6), (3, 6, 4, 3), (3, 8, 2, 2), (3, 5, 1, 2)]
    ours, theirs = ([random(*shape, seed=seed) for shape in shapes] for seed in (0, 1))
    real, fake = ([2 * random(3, 1, s, s, seed=seed + s) + 0.5 for s in sides] for seed in (0, 20))
    pixel, perceptual, style = by_loop(restored, target, ours, theirs)
    hinge = -sum(np.minimum(0, r.numpy() - 1).mean() + np.minimum(0, -1 - f.numpy()).mean()
                 for r, f in zip(real, fake, strict=True))
    weights = (4.0, 2.0, 1.0, 0.5)[:len(sides)]
    adversarial = -sum(w * f.numpy().mean() for w, f in zip(weights, fake, strict=True))
    each = (0.5, 1.0, 2.0, 4.0) if name == "dfdnet" else 3.0              # λ of the perceptual term
    if name == "asffnet":                                                  # one discriminator, one λ
        (real,), (fake,), (weights,) = real, fake, weights

    cfg = replace(script.PAPER, weight_pixel=2.0, weight_perceptual=each)
    losses = script.reconstruction_losses(restored, target, ours, theirs, cfg)
    assert losses.keys() == {"pixel", "perceptual"}
    assert losses["pixel"].item() == pytest.approx(2 * pixel, rel=1e-5)
    assert losses["perceptual"].item() == pytest.approx(np.sum(np.multiply(each, perceptual)), rel=1e-5)
    assert script.discriminator_loss(real, fake).item() == pytest.approx(hinge, rel=1e-5)
    if name == "dfdnet":
        assert script.adversarial_loss(fake, weights).item() == pytest.approx(adversarial, rel=1e-5)
        return
    cfg = replace(script.PAPER, weight_style=5.0, weight_adversarial=weights)
    with torch.autocast("cpu", torch.bfloat16):                            # it keeps its precision
        losses = script.photo_realistic_losses(ours, theirs, fake, cfg)
    assert losses.keys() == {"style", "adversarial"}
    assert losses["style"].item() == pytest.approx(5 * style, rel=1e-4)
    assert losses["adversarial"].item() == pytest.approx(adversarial, rel=1e-5)


@pytest.mark.parametrize("name, kind, layers", [
    ("asffnet", "Discriminator", 4), ("dfdnet", "Discriminators", 16), ("dmdnet", "Discriminators", 12),
    ("restoreformer", "Discriminator", 4)])
@torch.no_grad()
def test_every_discriminator_convolution_has_spectral_norm_one(name, kind, layers):
    torch.manual_seed(0)
    judge = getattr(importlib.import_module(name), kind)(4)
    for _ in range(60):                                                    # power iteration
        judge(uniform(1, 3, 64, 64))
    convolutions = [layer for layer in judge.eval().modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == layers
    for layer in convolutions:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name, reduced", [("dfdnet", (1, 2, 4, 8)), ("dmdnet", (1, 2, 4))])
def test_every_discriminator_sees_the_image_reduced_in_its_own_way(name, reduced):
    judges, image = importlib.import_module(name).Discriminators(4).eval(), uniform(2, 3, 64, 64)
    for judge, scores, r in zip(judges, judges(image), reduced, strict=True):
        small = image.view(2, 3, 64 // r, r, 64 // r, r).mean((3, 5))
        torch.testing.assert_close(scores, judge(small))


# Training

@pytest.mark.parametrize("name, changes", [*((name, {}) for name in TINY), ("gfrnet", {"stranger": True})],
                         ids=[*TINY, "gfrnet-stranger"])
def test_batches_follow_from_seed_step_and_place_so_two_processes_see_what_one_would(
        name, changes, face_folder, monkeypatch):
    """In each stage of DMDNet and RestoreFormer; of the others however many steps there are."""
    script, faces = importlib.import_module(name), common.FaceFolder(face_folder, 64)
    cfg = replace(script.TINY, **eval(f"dict({SHARED}, {TINY[name]})"), **changes)
    longer = {} if name in ("dmdnet", "restoreformer") else {"steps": 9999}

    def batch(step, **more):
        parts = script.Batches(faces, list(range(30)), replace(cfg, **more))[step]
        if isinstance(parts, dict):                  # DMDNet's: less what all processes write, and owners
            parts = [parts[k] for k in ("degraded", "target", "boxes", "references", "reference_boxes")]
        return parts

    for step in (1, 2, 3, 5):
        whole = batch(step, batch=4)
        torch.rand(7)
        for other in (batch(step - 1, batch=4), batch(step, batch=4, seed=1)):
            assert not torch.equal(whole[0], other[0])
        halves = []
        for rank in range(2):
            monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
            halves.append(batch(step, **longer))
        monkeypatch.undo()
        for expected, parts in zip(whole, zip(*halves, strict=True), strict=True):
            assert torch.equal(torch.cat(parts), expected)


LEARNING = {
    "gfrnet": {"width": 8, "discriminator_width": 4, "warp_share": 0.15, "steps": 120},
    "asffnet": {"channels": 16, "width": 4, "discriminator_width": 4, "exemplars": 3, "training_exemplars": 3,
                "rank_every": 9, "batch": 4, "steps": 45, "learning_rate": 4e-3, "weight_perceptual": 0.1,
                "weight_style": 0.0, "weight_adversarial": 0.0},
    "dfdnet": {"entries": 16, "width": 8, "discriminator_width": 4, "batch": 8, "steps": 60},
    "dmdnet": {"width": 8, "items": 6, "references": 3, "renewed": 2, "sides": (8, 8, 6, 10), "batch": 4,
               "stages": (0.3, 0.15, 0.15), "discriminator_width": 4, "steps": 80, "learning_rate": 4e-3,
               "weight_perceptual": 0.1, "weight_style": 0.0, "weight_adversarial": (0.0, 0.0, 0.0)}}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNING)
def test_a_short_training_improves_held_out_faces(name, face_folder, tmp_path, monkeypatch):
    """Seven people of 24 are held out, for an interval narrower than that of the usual two."""
    def split(faces):
        parts = range(16), range(16, 17), range(17, 24)
        return [[i for i, who in enumerate(faces.identity.tolist()) if who in part] for part in parts]

    script = importlib.import_module(name)
    cfg = replace(script.TINY, size=64, validate_every=1000, validated=4, **LEARNING[name])
    monkeypatch.setitem(script.PRESETS, "tiny", cfg)
    monkeypatch.setattr(common, "split_identities", split)
    monkeypatch.setattr(common, "load_encoder", lambda *_: some_encoder())
    monkeypatch.setattr(common, "metrics", lambda *_: {"psnr": common.psnr})
    monkeypatch.setattr(common, "TASKS", {"x6": 6, "x8": 8} if name == "dfdnet" else {"x4": 4, "x8": 8})
    script.main(["--train", "--device", "cpu", "--precision", "float32", "--data", str(face_folder),
                 "--out", str(tmp_path)])
    for task in json.loads((tmp_path / "result.json").read_text())["test"].values():
        assert task["faces"] == (28 if name == "gfrnet" else 35)            # less those that guide
        assert task["paired_psnr_gain"]["ci95"][0] > 0
        if name == "dmdnet":
            other = task["without_references"]["psnr"], task["stranger"]["psnr"]
            assert len({task["restored"]["psnr"], *other}) == 3
