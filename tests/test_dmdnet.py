"""DMDNet: every equation against an independent form, whose references a face reads, the four stages."""

import copy
import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import common
import dmdnet

TINY = replace(dmdnet.TINY, size=64, width=8, items=6, references=3, renewed=2, part_sizes=(8, 8, 6, 10),
               stages=(0.3, 0.15, 0.15), discriminator_width=4, batch=2, validate_every=1000)
CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def some_landmarks(count, size=64, seed=3):
    """The mean face, stretched, moved, every point a little: (count,68,2)."""
    points, draw = common.MEAN_LANDMARKS * size / 512, generator(seed)
    points = points * (1 + 0.06 * torch.randn(count, 1, 2, generator=draw))
    points = points + 0.03 * size * torch.randn(count, 1, 2, generator=draw)
    return points + 0.008 * size * torch.randn(count, 68, 2, generator=draw)


def some_images(count, size=64, seed=6):
    """Smooth random pictures in [-1,1]: (count,3,size,size)."""
    low = torch.rand(count, 3, 12, 12, generator=generator(seed)) * 2 - 1
    return F.interpolate(low, size, mode="bicubic").clamp(-1, 1)


def some_faces(count, seed=6):
    """images (count,3,64,64), boxes (count,4,4)"""
    return some_images(count, seed=seed), common.component_boxes(some_landmarks(count, seed=seed), 64)


def encoder():
    torch.manual_seed(1)
    net = common.Recogniser((6, 8, 10, 12)).folded()
    for layer in net.stages.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # deep features as large as shallow ones
    return net


def randomised(module):
    """All that is learned random: some start at zero or near it, which would hide what depends on them."""
    draw = generator(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
                parameter.copy_(1.2 * torch.randn(parameter.shape, generator=draw) * spread)
    return module


def network(**changes):
    torch.manual_seed(2)
    return randomised(dmdnet.DMDNet(replace(TINY, **changes))).eval()


def some_dictionary(items, seed=0, channels=8, side=3, names=("scale1_nose", "scale2_mouth")):
    return {name: (random(items, channels // 4, side, side, seed=seed + 10 * k),
                   random(items, channels, side, side, seed=seed + 10 * k + 5))
            for k, name in enumerate(names)}


def same(first, second):
    """Whether two dictionaries are equal to the bit."""
    return set(first) == set(second) and all(
        torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))


def close(first, second, **tolerance):
    assert set(first) == set(second)
    for name in first:
        for a, b in zip(first[name], second[name], strict=True):
            torch.testing.assert_close(a, b, **tolerance)


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(common, "precision", lambda kind: torch.float32)


# Config, Table 3


def test_paper_preset_has_the_papers_numbers():
    paper = dmdnet.PAPER
    assert (paper.preset, paper.size, paper.items, paper.references) == ("paper", 512, 128, 21)
    assert (paper.weight_pixel, paper.weight_perceptual, paper.weight_style) == (300, 1, 0.1)
    assert paper.weight_adversarial == (4, 1, 0.5) and paper.temperature == 64
    assert (paper.learning_rate, paper.dictionary_rate, paper.betas) == (2e-4, 2e-6, (0.5, 0.999))
    assert 4 * paper.batch == 8  # on the paper's four GPUs
    assert paper.parts == ("left_eye", "right_eye", "nose", "mouth") and paper.scales == (1, 2, 3)
    assert paper.transform and not paper.residual and not paper.released
    assert not paper.cooldown and paper.clip == math.inf and paper.patience == 0
    assert (paper.encoder, paper.degradation) == ("vgg", "dmdnet")
    assert set(dmdnet.PRESETS) == {"tiny", "paper", "released"}
    assert {k for k, v in asdict(dmdnet.RELEASED).items() if v != asdict(paper)[k]} == {
        "preset", "released", "parts"}


def test_variants_are_the_rows_of_table_3():
    full = asdict(dmdnet.PAPER)
    changes = {name: {k: v for k, v in asdict(replace(dmdnet.PAPER, **change)).items() if v != full[k]}
               for name, change in dmdnet.VARIANTS.items()}
    first, second, third = full["stages"]
    assert 0 < first < 1 and first + second + third < 1
    assert [share > 0 for share in changes.pop("only-backward")["stages"]] == [False, False, True]
    assert changes == {
        "full": {}, "items-0": {"items": 0, "references": 0}, "items-32": {"items": 32},
        "items-64": {"items": 64}, "items-256": {"items": 256},
        "no-forward": {"stages": (first, 0, third)}, "no-backward": {"stages": (first, second, 0)},
        "no-transform": {"transform": False}, "1-transform": {"scales": (3,)},
        "2-transform": {"scales": (2, 3)}, "only-specific": {"items": 0}, "only-generic": {"references": 0}}


@pytest.mark.parametrize(("variant", "shares", "lengths"), [
    ("full", (0.3, 0.15, 0.15), [210, 105, 105, 280]),
    ("only-generic", (0.3, 0.15, 0.15), [210, 105, 105, 280]),
    ("only-backward", (0, 0, 0.6), [0, 0, 420, 280]), ("no-forward", (0.3, 0, 0.15), [210, 0, 105, 385]),
    ("no-backward", (0.3, 0.15, 0), [210, 105, 0, 385]),
    ("only-specific", (0.3, 0.15, 0.15), [0, 0, 0, 700]), ("items-0", (0.3, 0.15, 0.15), [0, 0, 0, 700])])
def test_stages_follow_one_another_and_variants_leave_theirs_out(variant, shares, lengths):
    cfg = replace(dmdnet.TINY, steps=700, **dmdnet.VARIANTS[variant])
    assert [share > 0 for share in cfg.stages] == [share > 0 for share in shares]
    stages = [dmdnet.stage_of(step, replace(cfg, stages=shares)) for step in range(1, 701)]
    assert stages == [stage for stage in range(4) for _ in range(lengths[stage])]


def test_components_are_40_40_25_and_55_features_wide_and_halve_from_scale_to_scale():
    sizes = [dmdnet.part_sizes(dmdnet.PAPER, scale) for scale in (1, 2, 3)]
    assert sizes == [[40, 40, 25, 55], [20, 20, 12, 27], [10, 10, 6, 13]]
    assert [dmdnet.part_sizes(dmdnet.RELEASED, scale) for scale in (1, 2, 3)] == [
        [40, 40, 55], [20, 20, 27], [10, 10, 13]]
    assert dmdnet.part_sizes(replace(dmdnet.TINY, part_sizes=(3, 3, 2, 4)), 3) == [1, 1, 1, 1]


def test_the_degradation_has_the_ranges_of_equation_19():
    model = common.DEGRADATIONS[dmdnet.PAPER.degradation]
    for part, low, step, high in (("blur", 1, 0.1, 3), ("scale", 1, 0.1, 10), ("noise", 0, 1, 15),
                                  ("quality", 50, 1, 100)):
        drawn = getattr(model, part).draw(6000, generator())
        expected = low + step * np.arange(round((high - low) / step) + 1)
        np.testing.assert_allclose(np.unique(drawn.numpy()), expected, atol=1e-4)
    assert not model.motion


@pytest.mark.parametrize("variant", dmdnet.VARIANTS)
def test_every_variant_restores_and_differs_as_the_table_says(variant):
    net = network(**{**dmdnet.VARIANTS[variant], **({"items": 9} if variant == "items-256" else {})})
    (images, boxes), cfg, full = some_faces(2), net.cfg, network()
    references = [] if not cfg.references else [
        part.view(2, 2, *part.shape[1:]) for part in some_faces(4, seed=8)]
    with torch.no_grad():
        restored = net(images, boxes, *references)
    assert restored.shape == images.shape and restored.isfinite().all()
    assert not torch.equal(restored, images)
    assert set(net.readings) == set(net.transforms) == {
        f"scale{s}" for s in ({"1-transform": (3,), "2-transform": (2, 3), "items-0": ()}.get(
            variant, (1, 2, 3)))}
    assert (net.generic_dictionary() is None) == (variant in ("items-0", "only-specific"))
    assert (net.extract_specific is None) == (variant in ("items-0", "only-generic"))
    double = 2 if variant == "items-0" else 1  # "we increase the channels of the whole framework to 2 times"
    for plain, layer in zip(full.extract.modules(), net.extract.modules(), strict=True):
        if isinstance(layer, nn.Conv2d):
            assert layer.out_channels == double * plain.out_channels
    assert net.paint[-1].in_channels == double * full.paint[-1].in_channels
    for readings in net.readings.values():
        assert set(readings) == set(dmdnet.PARTS)
        for read in readings.values():
            assert set(read) == {"generic", "specific", "identity"} - {
                "only-specific": {"generic", "identity"}, "only-generic": {"specific", "identity"},
                "no-transform": {"identity"}}.get(variant, set())
            dictionaries = [read[name] for name in ("generic", "specific") if name in read]
            if variant == "no-transform":  # one item of both dictionaries
                assert torch.equal(torch.cat(dictionaries, 1).sort(1).values,
                                   torch.eye(10)[9:].expand(2, 10))
            else:
                for weights in dictionaries:
                    torch.testing.assert_close(weights.sum(1), torch.ones(2))
            if "generic" in read:
                assert read["generic"].shape == (2, cfg.items)


# Eq. (2), (3)


def test_renewed_items_are_those_of_equation_2_and_others_stay():
    old, fresh, places = some_dictionary(6), some_dictionary(2, seed=1), torch.tensor([4, 1])
    for parts in fresh.values():
        for part in parts:
            part.requires_grad_()
    result = dmdnet.renew_items(old, fresh, places)
    for name in old:
        for kind in (0, 1):
            for y in range(6):
                expected = {4: fresh[name][kind][0], 1: fresh[name][kind][1]}.get(y, old[name][kind][y])
                assert torch.equal(result[name][kind][y], expected)
            (gradient,) = torch.autograd.grad(result[name][kind].square().sum(), fresh[name][kind])
            torch.testing.assert_close(gradient, 2 * fresh[name][kind])
    assert same(old, some_dictionary(6))  # a new dictionary, the old one as it was


def forward_by_loop(dictionary, fresh, gammas):
    """Eq. (3), face by face: who is nearest to which key, then item by item."""
    result = {}
    for name, (keys, values) in dictionary.items():
        fresh_keys, fresh_values = fresh[name]
        writers = [[] for _ in keys]
        for face, key in enumerate(fresh_keys):
            distances = [((key - other) ** 2).sum().item() for other in keys]
            writers[int(np.argmin(distances))].append(face)
        gamma_k, gamma_v = gammas[name]
        result[name] = keys.clone(), values.clone()
        for y, faces in enumerate(writers):
            if faces:
                key, value = (sum(x[f] for f in faces) / len(faces) for x in (fresh_keys, fresh_values))
                result[name][0][y] = gamma_k * keys[y] + (1 - gamma_k) * key
                result[name][1][y] = gamma_v * values[y] + (1 - gamma_v) * value
    return result


def test_forward_update_is_equation_3_also_where_faces_meet_in_one_item():
    old, fresh = some_dictionary(5), some_dictionary(4, seed=2)
    for name, places in (("scale1_nose", (3, 0, 3, 3)), ("scale2_mouth", (1, 1, 4, 0))):
        for face, y in enumerate(places):
            fresh[name][0][face] = old[name][0][y] + 0.1 * fresh[name][0][face]
    gammas = {"scale1_nose": torch.tensor([0.2, 0.7]), "scale2_mouth": torch.tensor([0.9, 0.4])}
    result = dmdnet.forward_update(old, fresh, gammas)
    close(result, forward_by_loop(old, fresh, gammas))
    for name, written in (("scale1_nose", {0, 3}), ("scale2_mouth", {0, 1, 4})):
        for kind in (0, 1):
            moved = {y for y in range(5) if not torch.equal(result[name][kind][y], old[name][kind][y])}
            assert moved == written
    value = 0.7 * old["scale1_nose"][1][3] + 0.3 * fresh["scale1_nose"][1][[0, 2, 3]].mean(0)
    torch.testing.assert_close(result["scale1_nose"][1][3], value)


def test_forward_update_passes_gradient_to_the_gammas_and_to_the_faces():
    old, fresh = some_dictionary(5), some_dictionary(1, seed=2)
    gammas = {name: torch.tensor([0.3, 0.6], requires_grad=True) for name in old}
    for parts in fresh.values():
        for part in parts:
            part.requires_grad_()
    result = dmdnet.forward_update(old, fresh, gammas)
    for name in old:
        nearest = (old[name][0] - fresh[name][0]).square().flatten(1).sum(1).argmin()
        sums = [part.sum() for part in result[name]]
        (slopes,) = torch.autograd.grad(sum(sums), gammas[name], retain_graph=True)
        for kind in (0, 1):
            gap = (old[name][kind][nearest] - fresh[name][kind][0]).sum()
            assert slopes[kind].item() == pytest.approx(gap.item(), rel=1e-4)
            (gradient,) = torch.autograd.grad(sums[kind], fresh[name][kind])
            torch.testing.assert_close(gradient, torch.full_like(gradient, 1 - gammas[name][kind].item()))


def test_the_generic_memory_renews_at_places_and_else_updates_with_gammas_in_0_1():
    torch.manual_seed(3)
    memory, (images, boxes) = dmdnet.GenericMemory(TINY), some_faces(2)
    names = {f"scale{s}_{part}" for s in (1, 2, 3) for part in dmdnet.PARTS}
    assert set(memory.logits) == names
    draw, seen = generator(7), []
    with torch.no_grad():
        for logit in memory.logits.values():
            logit.copy_(3 * torch.randn(2, generator=draw))
        old, fresh = network().generic_dictionary(), memory.extract(images, boxes)
        places = torch.tensor([5, 2])
        assert same(memory(old, images, boxes, places), dmdnet.renew_items(old, fresh, places))
        gammas = {name: 1 / (1 + torch.exp(-logit)) for name, logit in memory.logits.items()}
        close(memory(old, images, boxes), forward_by_loop(old, fresh, gammas))
        memory.extract.register_forward_hook(lambda *call: seen.append(call[2]))
        with torch.autocast("cpu", torch.bfloat16):
            updated = memory(old, images, boxes)
        close(updated, forward_by_loop(old, seen.pop(), gammas))  # in float32 all the same
        for logit in memory.logits.values():
            logit.fill_(-40.0)  # γ = 0: the faces themselves
        updated = memory(old, images, boxes)
        for name in names:
            for kind in (0, 1):
                gaps = (updated[name][kind][:, None] - fresh[name][kind]).abs().flatten(2).amax(2)
                assert (gaps.amin(1) < 1e-5).any() or (
                    updated[name][kind] - fresh[name][kind].mean(0)).abs().flatten(1).amax(1).min() < 1e-5


# Eq. (6)


def test_a_specific_dictionary_has_an_item_a_reference_and_another_one_changes_no_other():
    net, (images, boxes) = network(), some_faces(4)
    with torch.no_grad():
        three, four = (net.extract_specific(images[:n], boxes[:n]) for n in (3, 4))
    assert set(three) == set(net.generic_dictionary())
    for scale, channels in ((1, 8), (2, 16), (3, 32)):
        for part, side in zip(dmdnet.PARTS, dmdnet.part_sizes(TINY, scale), strict=True):
            name = f"scale{scale}_{part}"
            assert three[name][0].shape == (3, channels // 4, side, side)
            assert three[name][1].shape == (3, channels, side, side)
            for kind in (0, 1):
                torch.testing.assert_close(four[name][kind][:3], three[name][kind], rtol=1e-4, atol=1e-5)
                assert four[name][kind].shape[1:] == net.generic_dictionary()[name][kind].shape[1:]
                assert (four[name][kind][3] - three[name][kind][0]).abs().max() > 1e-2


def two_convolutions(layers, x, dilations=(1, 1)):
    """Two 3×3 convolutions with zero padding, leaky ReLU of slope 0.2 between."""
    x = F.conv2d(x, layers[0].weight, layers[0].bias, padding=dilations[0], dilation=dilations[0])
    x = torch.where(x > 0, x, 0.2 * x)
    return F.conv2d(x, layers[2].weight, layers[2].bias, padding=dilations[1], dilation=dilations[1])


def test_keys_and_values_are_two_convolutions_each_of_the_same_component():
    net, (images, boxes) = network(), some_faces(2)
    with torch.no_grad():
        maps = net.extract_specific.features(images)
        dictionary = net.extract_specific(images, boxes)
        assert [tuple(x.shape) for x in maps] == [(2, 8, 32, 32), (2, 16, 16, 16), (2, 32, 8, 8)]
        for scale in (1, 2, 3):
            parts = dmdnet.crop_components(maps[scale - 1], boxes, 2**scale, dmdnet.part_sizes(TINY, scale))
            for name, part in zip(dmdnet.PARTS, parts, strict=True):
                name = f"scale{scale}_{name}"
                for net_part, made in zip((net.extract_specific.keys, net.extract_specific.values),
                                          dictionary[name], strict=True):
                    torch.testing.assert_close(made, two_convolutions(net_part[name], part),
                                               rtol=1e-4, atol=1e-5)


# Eq. (7)


def read_by_loop(query, keys, values, root, allowed=None, hard=False):
    query, keys, values = (x.double().numpy() for x in (query, keys, values))
    result, weights = np.zeros((len(query), *values.shape[1:])), np.zeros((len(query), len(keys)))
    for b in range(len(query)):
        items = [m for m in range(len(keys)) if allowed is None or allowed[b, m]]
        if not items:
            continue
        scores = np.array([(query[b] * keys[m]).sum() / root for m in items])
        share = (scores == scores.max()) * 1.0 if hard else np.exp(scores) / np.exp(scores).sum()
        for m, w in zip(items, share, strict=True):
            weights[b, m] = w
            result[b] += w * values[m]
    return torch.from_numpy(result).float(), torch.from_numpy(weights).float()


MASK = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize("allowed", [None, MASK, MASK & False])
def test_reading_is_equation_7_item_by_item(allowed, transform):
    query, (keys, values) = random(3, 2, 3, 3, seed=9), some_dictionary(5)["scale1_nose"]
    result = dmdnet.read_dictionary(query, keys, values, 2.5, allowed, transform)
    expected = read_by_loop(query, keys, values, 2.5, allowed, not transform)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    if allowed is not None:
        assert not result[0][~allowed.any(1)].any() and not result[1][~allowed].any()


def test_reading_survives_scores_of_any_size_and_empty_dictionaries():
    query, (keys, values) = 1e4 * random(3, 2, 3, 3, seed=9), some_dictionary(5)["scale1_nose"]
    read, weights = dmdnet.read_dictionary(query, keys, values, 1.0, MASK)
    assert read.isfinite().all() and weights.sum(1).tolist() == pytest.approx([1, 0, 1])
    read, weights = dmdnet.read_dictionary(query, keys[:0], values[:0], 1.0, MASK[:, :0])
    assert read.shape == (3, 8, 3, 3) and not read.any() and weights.shape == (3, 0)


def test_scores_are_divided_by_the_root_of_the_temperature_and_a_reading_has_a_root_a_face():
    query, (keys, values) = random(3, 2, 3, 3, seed=9), some_dictionary(5)["scale1_nose"]
    roots = torch.tensor([[1.0], [3], [8]])
    read, weights = dmdnet.read_dictionary(query, keys, values, roots)
    for b, root in enumerate((1, 3, 8)):
        expected = read_by_loop(query[b:b + 1], keys, values, root)
        torch.testing.assert_close(read[b:b + 1], expected[0], rtol=1e-4, atol=1e-6)
    assert dmdnet.PAPER.temperature == 64 and TINY.temperature == 64
    net, part = network(), random(2, 16, 4, 4, seed=1)
    block, items = net.transforms["scale2"], net.generic_dictionary()
    own = {name: tuple(x + 1 for x in parts) for name, parts in items.items()}
    with torch.no_grad():
        _, readings = block.read("left_eye", part, items, own, torch.ones(2, 6, dtype=torch.bool))
        query = two_convolutions(block.query["left_eye"], part)
    for name, dictionary in (("generic", items), ("specific", own)):
        expected = read_by_loop(query, *dictionary["scale2_left_eye"], 8.0)[1]
        torch.testing.assert_close(readings[name], expected, rtol=1e-3, atol=1e-5)
        assert expected.max() < 0.99  # no hard choice, which knows no temperature


# Eq. (8), (9), (10)


@pytest.mark.parametrize("bounded", [True, False])
def test_the_identity_score_mixes_both_readings_by_equation_8(bounded):
    block = randomised(dmdnet.IdentityScore(8, bounded))
    part, specific, generic = ((9 * random(2, 8, 4, 4, seed=k)).requires_grad_() for k in range(3))
    mixed, score = block(part, specific, generic)
    reduced = [two_convolutions(block.reduce[k], x) for k, x in enumerate((part, specific, generic))]
    expected = two_convolutions(block.score, torch.cat(reduced, 1))
    expected = 1 / (1 + torch.exp(-expected)) if bounded else expected
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-5)
    assert score.shape == (2, 8, 4, 4)  # one for each channel and position
    torch.testing.assert_close(mixed, expected * specific + (1 - expected) * generic, rtol=1e-4, atol=1e-4)
    assert (0 <= score).all() and (score <= 1).all() if bounded else score.min() < 0 < 1 < score.max()
    for gradient in torch.autograd.grad(score.sum(), (part, specific, generic)):
        assert gradient.abs().min() > 0
    torch.manual_seed(0)
    begin = dmdnet.IdentityScore(8, bounded)(*(random(2, 8, 4, 4, seed=k) for k in range(3)))[1]
    assert 0.1 < begin.min() and begin.max() < 0.9 and 0.4 < begin.mean() < 0.6


@pytest.mark.parametrize("bounded", [True, False])
def test_the_confidence_score_adds_the_reading_by_equation_9(bounded):
    block = randomised(dmdnet.ConfidenceScore(8, bounded))
    part, reading = 3 * random(2, 8, 4, 4), 3 * random(2, 8, 4, 4, seed=1)
    with torch.no_grad():
        score = two_convolutions(block.score, reading - part)
        score = 1 / (1 + torch.exp(-score)) if bounded else score
        torch.testing.assert_close(block(part, reading), part + reading * score, rtol=1e-4, atol=1e-4)
        assert torch.equal(block(part, 0 * reading), part)  # nothing read, nothing changed
        torch.manual_seed(0)
        begin = dmdnet.ConfidenceScore(8, bounded)
        change = begin(part / 3, reading / 3) - part / 3
    assert change.square().mean() < 0.05 * (part / 3).square().mean()  # trusting the degraded face


def resized(image, height, width):
    """Bilinear resampling (…,h,w) → (…,height,width): sources at (i + ½) h / height − ½, clamped."""
    matrices = []
    for before, after in ((image.shape[-2], height), (image.shape[-1], width)):
        place = ((torch.arange(after) + 0.5) * before / after - 0.5).clamp(0, before - 1)
        matrices.append((1 - (place[:, None] - torch.arange(before)).abs()).clamp(min=0))
    return matrices[0] @ image @ matrices[1].T


def test_a_decoder_stage_modulates_by_equation_10_with_scale_and_shift_from_the_skip():
    block = randomised(dmdnet.SFTStage(8, 6))
    x, skip = random(2, 8, 5, 5), random(2, 8, 5, 5, seed=1)
    with torch.no_grad():
        decoder = two_convolutions(block.reduce, x)
        decoder = torch.where(decoder > 0, decoder, 0.2 * decoder)
        modulated = two_convolutions(block.scale, skip) * decoder + two_convolutions(block.shift, skip)
        expected = two_convolutions(block.widen, resized(modulated, 10, 10))
        torch.testing.assert_close(block(x, skip), expected, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    begin = dmdnet.SFTStage(8, 6)
    scale = two_convolutions(begin.scale, skip)
    assert 0.8 < scale.mean() < 1.2 and (scale - 1).abs().max() < 1


# Eq. (11), (12), (14), (15), (16)


def four_maps(seed):
    return [random(3, 2 + k, 5 - k, 4, seed=10 * seed + k) for k in range(4)]


def test_pixel_loss_is_equation_11():
    a, b = random(3, 3, 4, 5), random(3, 3, 4, 5, seed=1)
    expected = sum((a[n, c, y, x] - b[n, c, y, x]).item() ** 2 / (3 * 4 * 5) for n in range(3)
                   for c in range(3) for y in range(4) for x in range(5)) / 3
    assert dmdnet.pixel_loss(a, b).item() == pytest.approx(expected, rel=1e-5)


def test_perceptual_loss_is_equation_12():
    ours, theirs = four_maps(0), four_maps(1)
    expected = sum(np.linalg.norm((a[n] - b[n]).flatten().numpy()) ** 2 / a[n].numel() / 3
                   for a, b in zip(ours, theirs, strict=True) for n in range(3))
    assert dmdnet.perceptual_loss(ours, theirs).item() == pytest.approx(expected, rel=1e-5)


def test_style_loss_is_equation_14():
    expected, ours, theirs = 0.0, four_maps(0), four_maps(1)
    for a, b in zip(ours, theirs, strict=True):
        for n in range(3):
            for c in range(a.shape[1]):
                for d in range(a.shape[1]):
                    gap = sum((x[n, c, i, j] * x[n, d, i, j]).item() * sign for x, sign in ((a, 1), (b, -1))
                              for i in range(a.shape[2]) for j in range(a.shape[3]))
                    expected += gap**2 / a[n].numel() / 3
    assert dmdnet.style_loss(ours, theirs).item() == pytest.approx(expected, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert dmdnet.style_loss(ours, theirs).item() == pytest.approx(expected, rel=1e-4)


def test_discriminator_loss_is_the_negative_of_equation_15():
    real, fake = ([2 * random(3, 1, s, s, seed=seed + s) + 0.5 for s in (8, 4, 2)] for seed in (0, 20))
    paper = sum(np.minimum(0, r.numpy() - 1).mean() + np.minimum(0, -1 - f.numpy()).mean()
                for r, f in zip(real, fake, strict=True))
    assert dmdnet.discriminator_loss(real, fake).item() == pytest.approx(-paper, rel=1e-5)
    good, bad = [torch.full((1, 1, 2, 2), 1.5)] * 3, [torch.full((1, 1, 2, 2), -1.5)] * 3
    assert dmdnet.discriminator_loss(good, bad).item() == 0  # real above 1, fake below −1
    assert dmdnet.discriminator_loss(bad, good).item() == pytest.approx(15)


def test_adversarial_loss_is_equation_16_with_a_weight_for_each_resolution():
    fake = [random(3, 1, s, s, seed=s).requires_grad_() for s in (8, 4, 2)]
    loss = dmdnet.adversarial_loss(fake, (4.0, 1.0, 0.5))
    means = [f.detach().numpy().mean() for f in fake]
    assert loss.item() == pytest.approx(-(4 * means[0] + means[1] + 0.5 * means[2]), rel=1e-5)
    for gradient, slope in zip(torch.autograd.grad(loss, fake), (4, 1, 0.5), strict=True):
        torch.testing.assert_close(gradient, torch.full_like(gradient, -slope / gradient.numel()))


def test_the_three_discriminators_see_the_image_reduced_1_2_and_4_times_under_spectral_norm():
    net, image = dmdnet.Discriminators(4).eval(), some_images(2)
    scores = net(image)
    assert len(scores) == 3
    for judge, score, r in zip(net, scores, (1, 2, 4), strict=True):
        small = image.view(2, 3, 64 // r, r, 64 // r, r).mean((3, 5))
        torch.testing.assert_close(score, judge(small))
        assert score.shape[:2] == (2, 1)
    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert len(layers) >= 9 and all(parametrize.is_parametrized(layer, "weight") for layer in layers)


# RoIAlign and its reverse


def test_crop_of_a_linear_ramp_is_the_ramp_at_the_bin_centres():
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(26.0), indexing="ij")
    features = torch.stack([torch.stack([3 * x + y + 10 * n, 2 - y]) for n in range(2)])
    boxes = torch.tensor([[[10.0, 20, 31, 44], [50, 9, 71, 30], [33.5, 40, 60, 67], [20, 60, 90, 75]],
                          [[14.0, 25, 35, 40], [52, 14, 70, 36], [40.5, 44, 66, 61], [24, 66, 84, 85]]])
    parts = dmdnet.crop_components(features, boxes, 4, (5, 3, 4, 7))
    for part, size, box in zip(parts, (5, 3, 4, 7), boxes.unbind(1), strict=True):
        assert part.shape == (2, 2, size, size)
        for n in range(2):
            x1, y1, x2, y2 = (box[n] / 4).tolist()
            at = (torch.arange(size) + 0.5) / size
            across, down = x1 + at * (x2 - x1) - 0.5, y1 + at * (y2 - y1) - 0.5  # pixel i spans i … i + 1
            torch.testing.assert_close(part[n, 0], 3 * across + down[:, None] + 10 * n, rtol=0, atol=1e-3)
            torch.testing.assert_close(part[n, 1], 2 - down[:, None].expand(size, size), rtol=0, atol=1e-3)


def paste_by_loop(parts, boxes, stride, height, width):
    """Pixel by pixel: bilinear samples of every part whose box holds the pixel's centre, and their mean."""
    result = torch.zeros(len(boxes), parts[0].shape[1], height, width)
    for n in range(len(boxes)):
        for y in range(height):
            for x in range(width):
                found = []
                for part, box in zip(parts, boxes[n], strict=True):
                    x1, y1, x2, y2 = (box / stride).tolist()
                    if not (x1 < x + 0.5 < x2 and y1 < y + 0.5 < y2):
                        continue
                    size = part.shape[-1]
                    u = min(max((x + 0.5 - x1) / (x2 - x1) * size - 0.5, 0), size - 1)
                    v = min(max((y + 0.5 - y1) / (y2 - y1) * size - 0.5, 0), size - 1)
                    i, j = min(int(v), size - 2), min(int(u), size - 2)
                    a, b = v - i, u - j
                    found.append((1 - a) * (1 - b) * part[n, :, i, j] + (1 - a) * b * part[n, :, i, j + 1]
                                 + a * (1 - b) * part[n, :, i + 1, j] + a * b * part[n, :, i + 1, j + 1])
                if found:
                    result[n, :, y, x] = sum(found) / len(found)
    return result


def test_paste_equals_bilinear_sampling_pixel_by_pixel_with_means_in_overlaps():
    parts = [random(2, 3, size, size, seed=size) for size in (5, 4, 3, 6)]
    boxes = torch.tensor(
        [[[1.3, 4.1, 14.7, 17.2], [11.2, 6.3, 25, 21], [9.1, 12.3, 20, 29.9], [0, 20.5, 22.2, 32]],
         [[5.3, 1.1, 20.2, 12.8], [15.2, 8.3, 31, 24], [2.1, 2.3, 30, 10.9], [3, 3.5, 9.2, 32]]])
    pasted = dmdnet.paste_components(parts, boxes, 2, (16, 18))
    torch.testing.assert_close(pasted, paste_by_loop(parts, boxes, 2, 16, 18), rtol=1e-4, atol=1e-5)


def test_paste_undoes_crop_inside_the_boxes_and_leaves_zero_outside():
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    features, sizes = torch.stack([3 * x + y, 2 - y])[None], (4, 4, 5, 6)
    corners, inside = ((1, 2), (12, 2), (7, 7), (6, 13)), torch.zeros(20, 20, dtype=torch.bool)
    boxes = torch.tensor([[[x, y, x + n, y + n] for (x, y), n in zip(corners, sizes, strict=True)]]).float()
    for (x1, y1), n in zip(corners, sizes, strict=True):
        inside[y1:y1 + n, x1:x1 + n] = True
    parts = dmdnet.crop_components(features, 8 * boxes, 8, sizes)
    pasted = dmdnet.paste_components(parts, 8 * boxes, 8, (20, 20))
    torch.testing.assert_close(pasted[..., inside], features[..., inside], rtol=1e-4, atol=1e-3)
    assert pasted[..., ~inside].abs().max() == 0


# The dictionary transform module and the network: Eq. (1), (5), Figure 2


def test_a_dictionary_transform_is_figure_2_step_by_step():
    """Two faces, of which only the second has references."""
    net, (_, boxes) = network(), some_faces(2)
    block, features, sizes = net.transforms["scale2"], random(2, 16, 16, 16), dmdnet.part_sizes(TINY, 2)
    generic, own = net.generic_dictionary(), {
        f"scale2_{part}": (random(3, 4, n, n, seed=n), random(3, 16, n, n, seed=n + 9))
        for part, n in zip(dmdnet.PARTS, sizes, strict=True)}
    allowed, changes = torch.tensor([[False] * 3, [True, False, True]]), []
    with torch.no_grad():
        enriched, readings = block(features, boxes, generic, own, allowed)
        parts = dmdnet.crop_components(features, boxes, 4, sizes)
        for name, part in zip(dmdnet.PARTS, parts, strict=True):
            query = two_convolutions(block.query[name], part)
            read = read_by_loop(query, *generic[f"scale2_{name}"], 8)[0]
            specific = read_by_loop(query, *own[f"scale2_{name}"], 8, allowed)[0]
            read[1] = block.identity[name](part, specific, read)[0][1]
            score = torch.sigmoid(two_convolutions(block.confidence[name].score, read - part))
            changes.append(score * read)
            assert readings[name]["specific"].shape == (2, 3) and readings[name]["generic"].shape == (2, 6)
    expected = features + paste_by_loop(changes, boxes, 4, 16, 16)
    torch.testing.assert_close(enriched, expected, rtol=1e-3, atol=1e-3)
    assert (enriched - features).abs().max() > 0.1


def references_of(counts, seed=8):
    """references (M,3,64,64), their boxes and owner (M,) of faces with so many references each"""
    owner = torch.tensor([face for face, count in enumerate(counts) for _ in range(count)], dtype=torch.long)
    return *some_faces(max(len(owner), 1), seed), owner


@pytest.mark.parametrize("changes", [{}, dmdnet.VARIANTS["no-transform"], {"items": 0}])
@torch.no_grad()
def test_faces_with_none_one_and_several_references_are_restored_as_each_alone(changes):
    net, (images, boxes), counts = network(**changes), some_faces(4), (0, 1, 3, 2)
    references, reference_boxes, owner = references_of(counts)
    mixed = torch.tensor([4, 0, 2, 5, 1, 3])  # not in the order of the faces
    together = net(images, boxes, references[mixed], reference_boxes[mixed], owner[mixed])
    plain = net(images, boxes)
    for face, count in enumerate(counts):
        one, mine = slice(face, face + 1), owner == face
        alone = net(images[one], boxes[one], *((references[mine][None], reference_boxes[mine][None])
                                               if count else ()))
        torch.testing.assert_close(together[one], alone, rtol=1e-3, atol=1e-4)
        assert ((together[one] - plain[one]).abs().max() > 1e-2) == (count > 0)


@torch.no_grad()
def test_references_as_a_block_as_a_list_and_as_a_stored_dictionary_give_the_same_picture(exact):
    net, (images, boxes) = network(), some_faces(2)
    references, reference_boxes, owner = references_of((3, 3))
    flat = net(images, boxes, references, reference_boxes, owner)
    block = net(images, boxes, references.view(2, 3, 3, 64, 64), reference_boxes.view(2, 3, 4, 4))
    assert torch.equal(flat, block)
    marks = some_landmarks(6, seed=8)
    torch.testing.assert_close(common.component_boxes(marks, 64), reference_boxes)
    stored = dmdnet.specific_dictionary(net, references, marks, batch=2)
    torch.testing.assert_close(net(images, boxes, specific=stored, owner=owner), flat, rtol=1e-3, atol=1e-4)
    shared = {name: tuple(x[:3] for x in parts) for name, parts in stored.items()}  # one person's, of all
    both = net(images, boxes, specific=shared)
    twice = references[:3].repeat(2, 1, 1, 1), reference_boxes[:3].repeat(2, 1, 1), owner
    torch.testing.assert_close(both, net(images, boxes, *twice), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(both[0], flat[0], rtol=1e-3, atol=1e-4)
    assert (both[1] - flat[1]).abs().max() > 1e-2


@torch.no_grad()
def test_dictionaries_are_read_in_float32_whatever_the_precision_around():
    net, (images, boxes), seen = network(), some_faces(2), []
    for block in net.transforms.values():
        block.register_forward_hook(lambda *call: seen.append(call))
    with torch.autocast("cpu", torch.bfloat16):
        net(images, boxes, *references_of((3, 2)))
    assert len(seen) == 3
    for block, (features, *others), (_, readings) in seen:
        assert features.dtype == torch.bfloat16
        for part, expected in block.forward(features, *others)[1].items():
            assert set(expected) == {"generic", "specific", "identity"}
            assert all(torch.equal(readings[part][kind], value) for kind, value in expected.items())


@torch.no_grad()
def test_the_order_of_references_does_not_matter():
    net, (images, boxes) = network(), some_faces(1)
    references, reference_boxes, _ = references_of((3,))
    order = [2, 0, 1]
    first = net(images, boxes, references[None], reference_boxes[None])
    other = net(images, boxes, references[order][None], reference_boxes[order][None])
    torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-4)
    fewer = net(images, boxes, references[None, :2], reference_boxes[None, :2])
    assert (fewer - first).abs().max() > 1e-3


@torch.no_grad()
def test_without_references_the_network_is_one_that_was_never_given_any():
    net, (images, boxes) = network(), some_faces(2)
    never = dmdnet.DMDNet(replace(TINY, **dmdnet.VARIANTS["only-generic"])).eval()
    never.load_state_dict({k: v for k, v in net.state_dict().items() if k in never.state_dict()})
    none = references_of(())
    expected = never(images, boxes)
    assert torch.equal(net(images, boxes), expected)
    assert torch.equal(net(images, boxes, none[0][:0], none[1][:0], none[2]), expected)
    empty = {name: tuple(x[:0] for x in parts) for name, parts in net.generic_dictionary().items()}
    torch.testing.assert_close(net(images, boxes, specific=empty), expected)
    assert all(set(read) == {"generic"} for read in never.readings["scale1"].values())


def test_no_face_reads_the_references_of_another():
    net, (images, boxes) = network(), some_faces(3)
    references, reference_boxes, owner = references_of((2, 0, 1))
    references.requires_grad_()
    restored = net(images, boxes, references, reference_boxes, owner)
    for face in range(3):
        (gradient,) = torch.autograd.grad(restored[face].sum(), references, retain_graph=True)
        assert (gradient.flatten(1).abs().amax(1) > 0).tolist() == (owner == face).tolist()
    for read in (part for scale in net.readings.values() for part in scale.values()):
        assert torch.equal(read["specific"] > 0, owner == torch.arange(3)[:, None])


@torch.no_grad()
def test_a_given_generic_dictionary_stands_in_for_the_networks_own():
    net, (images, boxes) = network(), some_faces(1)
    other = {name: tuple(x.flip(0) + 1 for x in parts) for name, parts in net.generic_dictionary().items()}
    before, given = net(images, boxes), net(images, boxes, generic=other)
    assert (given - before).abs().max() > 1e-2
    net.set_generic_dictionary(other)
    assert same(net.generic_dictionary(), other) and torch.equal(net(images, boxes), given)
    assert not any(item.requires_grad for item in net.generic.values())


@torch.no_grad()
def test_the_network_begins_at_the_input_where_it_is_residual_and_is_bounded_where_not():
    images, boxes = some_faces(1)
    assert torch.equal(dmdnet.DMDNet(TINY)(images, boxes), images)
    net = network(residual=False)
    bounded = net(images, boxes)
    assert bounded.abs().max() <= 1 and not torch.allclose(bounded, images)


# Data


class Album:
    """People with `counts` pictures: red is the person, green the picture, blue grows to the right."""

    def __init__(self, counts, size=32):
        self.identity = torch.cat([torch.full((count,), i) for i, count in enumerate(counts)])
        self.size = size

    def __getitem__(self, i):
        image = torch.empty(3, self.size, self.size)
        image[0], image[1] = self.identity[i] / 20, i / 40
        image[2] = torch.linspace(-0.8, 0.8, self.size)
        return common.Face(image, some_landmarks(1, self.size, seed=i)[0], int(self.identity[i]))

    def damaged(self, i):
        return False

    def others(self, i):
        return [k for k, who in enumerate(self.identity) if who == self.identity[i] and k != i]


def numbers(images):
    """Person and picture of each image (N,3,H,W) of an Album."""
    return [(round(red * 20), round(green * 40)) for red, green, _ in images.mean((-2, -1)).tolist()]


ALBUM = replace(TINY, size=32, steps=40, jitter=0.0, batch=6)  # stages of 12, 6, 6 and 16 steps


def test_batches_are_a_pure_function_of_seed_rank_and_step():
    faces, indices, cfg = Album([4, 3, 1, 5]), list(range(12)), replace(ALBUM, jitter=0.1)
    for step in (3, 14, 20, 30):  # one in each stage
        batch = dmdnet.Batches(faces, indices, cfg)[step]
        torch.rand(7), np.random.rand(3)
        other = dmdnet.Batches(faces, indices, cfg)
        other[step + 1], other[step]
        again = other[step]
        assert set(batch) == set(again) and all(torch.equal(batch[name], again[name]) for name in batch)
        for changed in (dmdnet.Batches(faces, indices, cfg)[step + 1],
                        dmdnet.Batches(faces, indices, replace(cfg, seed=1))[step],
                        dmdnet.Batches(faces, indices, cfg, rank=1)[step]):
            assert not torch.equal(batch["degraded"], changed["degraded"])
            assert not torch.equal(batch["target"], changed["target"])
        if step < 18:  # what is written into the dictionary is the same on all processes
            assert torch.equal(batch["sharp"], changed["sharp"])


def test_references_are_other_pictures_of_the_same_person_from_none_to_all_that_are_allowed():
    faces, indices = Album([4, 3, 1, 5, 2]), list(range(15))
    batches, counts, seen = dmdnet.Batches(faces, indices, ALBUM), set(), set()
    for step in range(12, 40):
        batch = batches[step]
        people = numbers(batch["target"])
        assert len(batch["references"]) == len(batch["reference_boxes"]) == len(batch["owner"])
        found = numbers(batch["references"])
        for (who, which), owner in zip(found, batch["owner"].tolist(), strict=True):
            assert who == people[owner][0] == faces.identity[which] and which != people[owner][1]
        for face, (_, picture) in enumerate(people):
            mine = [which for (_, which), o in zip(found, batch["owner"], strict=True) if o == face]
            assert len(set(mine)) == len(mine) <= min(3, len(faces.others(picture)))
            counts.add(len(mine)), seen.update((picture, which) for which in mine)
        assert 1e-3 < (batch["degraded"] - batch["target"]).abs().mean() < 0.6
    assert counts == {0, 1, 2, 3}
    assert len(seen) > 0.9 * sum(n * (n - 1) for n in (4, 3, 5, 2))


def test_the_first_stage_has_no_references_and_renews_every_item_in_turn():
    faces, indices = Album([4, 3, 1, 5]), list(range(12))
    batches = dmdnet.Batches(faces, indices, replace(ALBUM, items=5))
    renewed = []
    for step in range(12):
        batch = batches[step]
        assert len(batch["references"]) == len(batch["owner"]) == len(batch["reference_boxes"]) == 0
        places = batch["places"].tolist()
        assert len(set(places)) == len(places) == 2
        expected, marks = common.stack_faces(faces, [batches.generic[y] for y in places])
        assert torch.equal(batch["sharp"], expected)
        assert torch.equal(batch["sharp_boxes"], common.component_boxes(marks, 32))
        renewed += places
    assert renewed == [y % 5 for y in range(24)]
    one = dmdnet.Batches(faces, indices, replace(ALBUM, items=3, renewed=8))[0]["places"]
    assert one.tolist() == [0, 1, 2]
    assert not {"sharp", "places"} & set(batches[20]) and not {"sharp", "places"} & set(batches[30])


def test_the_second_stage_writes_the_targets_of_the_step_before():
    batches = dmdnet.Batches(Album([4, 3, 1, 5]), list(range(12)), ALBUM)
    for step in range(12, 18):  # the first of them after a step of the first stage
        batch, before = batches[step], batches[step - 1]
        assert torch.equal(batch["sharp"], before["target"]) and "places" not in batch
        assert torch.equal(batch["sharp_boxes"], before["boxes"])


def test_runs_of_a_few_steps_begin_with_a_batch_too():
    for steps in range(1, 12):
        cfg = replace(ALBUM, steps=steps, stages=(0.12, 0.15, 0.15))
        assert len(dmdnet.Batches(Album([4, 3]), list(range(7)), cfg)[0]["target"]) == cfg.batch


def test_boxes_of_a_batch_follow_its_faces_through_augmentation():
    faces, cfg, same_face = Album([4, 3, 5]), replace(ALBUM, crop=0.0), torch.zeros(4, 4)
    for step in (0, 20):
        batch = dmdnet.Batches(faces, range(12), cfg)[step]
        images, boxes = (torch.cat([batch[a], batch[b]]) for a, b in (
            ("target", "references"), ("boxes", "reference_boxes")))
        for (_, which), image, box in zip(numbers(images), images, boxes, strict=True):
            original = common.component_boxes(faces[which].landmarks[None], 32)[0]
            if image[2, 0, 0] > 0:  # flipped: left and right change places
                same_face[:, 0], same_face[:, 2] = 33 - original[:, 2], 33 - original[:, 0]
                same_face[:, 1::2] = original[:, 1::2]
                original = same_face[[1, 0, 2, 3]].clamp(0, 32)
            torch.testing.assert_close(box, original, rtol=0, atol=1.01)


def test_generic_pictures_are_of_different_people_first_and_repeat_only_when_all_are_used():
    faces, indices = Album([4, 3, 1, 5]), list(range(1, 13))
    for seed in range(5):
        cfg = replace(ALBUM, items=20, seed=seed)
        chosen = dmdnet.choose_generic(faces, indices, cfg)
        assert {int(faces.identity[i]) for i in chosen[:4]} == {0, 1, 2, 3}
        assert sorted(chosen[:12]) == indices and chosen[12:] == chosen[:8]
        assert dmdnet.choose_generic(faces, indices, replace(cfg, items=3)) == chosen[:3]
        assert dmdnet.choose_generic(faces, indices, cfg) == chosen
    assert len({tuple(dmdnet.choose_generic(faces, indices, replace(ALBUM, seed=s))) for s in range(5)}) > 1


# Restoration


def restore_input():
    """Five faces, degraded and landmarks, with references of 1, 0, 3, 0, 2 and their landmarks, owner."""
    owner = torch.tensor([4, 2, 0, 2, 4, 2])
    return some_images(5), some_landmarks(5), some_images(6, seed=2), some_landmarks(6, seed=8), owner


def test_restore_gives_every_face_its_own_references_whatever_the_batch(exact):
    net, (degraded, landmarks, sharp, points, owner) = network().train(), restore_input()
    specific = dmdnet.specific_dictionary(net, sharp, points)
    restored = dmdnet.restore(net, degraded, landmarks, specific, owner, batch=2)
    assert net.training and restored.shape == degraded.shape and restored.abs().max() <= 1
    for face in range(5):
        one, mine = slice(face, face + 1), owner == face
        own = {name: tuple(x[mine] for x in parts) for name, parts in specific.items()}
        alone = dmdnet.restore(net, degraded[one], landmarks[one], own if mine.any() else None)
        torch.testing.assert_close(restored[one], alone, rtol=1e-3, atol=1e-4)
    without = dmdnet.restore(net, degraded, landmarks)
    changed = (without - restored).abs().flatten(1).amax(1) > 1e-3
    assert changed.tolist() == [True, False, True, False, True]


def test_restore_halves_the_batch_when_the_memory_is_full(exact, capsys, monkeypatch):
    net, (degraded, landmarks, sharp, points, owner), sizes = network(), restore_input(), []
    specific = dmdnet.specific_dictionary(net, sharp, points)
    expected, real = dmdnet.restore(net, degraded, landmarks, specific, owner), net.forward

    def forward(images, *rest, **named):
        sizes.append(len(images))
        if len(images) > 1:
            raise torch.cuda.OutOfMemoryError("full")
        return real(images, *rest, **named)

    monkeypatch.setattr(net, "forward", forward)
    restored = dmdnet.restore(net, degraded, landmarks, specific, owner, batch=4)
    assert sizes == [4, 2, 1, 1, 1, 1, 1]
    torch.testing.assert_close(restored, expected, rtol=1e-3, atol=1e-4)
    assert "2 faces at a time" in capsys.readouterr().err

    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(net, "forward", full)
    with pytest.raises(common.InputError, match="memory"):
        dmdnet.restore(net, degraded, landmarks)


def test_held_out_faces_have_references_of_their_own_and_fewer_are_the_first_of_more(exact):
    net, faces, indices = network(), Album([4, 3, 1, 5], 64), [0, 7, 5, 9]
    (batch,) = dmdnet.restored_batches(net, faces, indices, TINY, CPU, 4, (0, 1, 2))
    owner, own = batch["owner"], [min(3, len(faces.others(i))) for i in indices]
    assert numbers(batch["target"]) == [(int(faces.identity[i]), i) for i in indices]
    assert torch.bincount(owner, minlength=4).tolist() == own == [3, 0, 2, 3]
    for (who, which), face in zip(numbers(batch["references"]), owner.tolist(), strict=True):
        assert which in faces.others(indices[face]) and who == faces.identity[which]
    landmarks = torch.stack([faces[i].landmarks for i in indices])
    points = torch.stack([faces[which].landmarks for _, which in numbers(batch["references"])])
    for name, most in ((0, 0), (1, 1), (2, 2), ("restored", 3)):
        for face in range(4):
            first = torch.nonzero(owner == face)[:most, 0]
            specific = dmdnet.specific_dictionary(net, batch["references"][first], points[first]) if len(
                first) else None
            alone = dmdnet.restore(net, batch["degraded"][face:face + 1], landmarks[face:face + 1], specific)
            torch.testing.assert_close(batch[name][face:face + 1], alone, rtol=1e-3, atol=1e-4)
    (again,) = dmdnet.restored_batches(net, faces, indices, TINY, CPU, 4)
    assert all(torch.equal(again[name], batch[name]) for name in again)


def test_a_stored_dictionary_comes_back_for_the_network_that_made_it_and_no_other(tmp_path, exact, capsys):
    net, path = network(), tmp_path / "person.pt"
    specific = dmdnet.specific_dictionary(net, some_images(3), some_landmarks(3))
    dmdnet.save_dictionary(path, net, specific, ["a.png", tmp_path / "b.png", "c.png"])
    assert "3 references" in capsys.readouterr().out
    for precision in ("float32", "bfloat16"):
        ready = dmdnet.for_restoration(network(), CPU, precision)
        assert same(dmdnet.load_dictionary(path, ready, CPU), specific)
    assert common.load_weights(path)["names"] == ["a.png", str(tmp_path / "b.png"), "c.png"]
    other = network()
    with torch.no_grad():
        next(other.extract_specific.values["scale1_nose"].parameters()).view(-1)[0] += 1e-3
    for refused in (other, network(**dmdnet.VARIANTS["only-generic"])):
        with pytest.raises(common.InputError, match="another network"):
            dmdnet.load_dictionary(path, refused, CPU)
    torch.save({"script": "dmdnet", "net": {}}, tmp_path / "checkpoint.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("checkpoint.pt", "list.pt"):
        with pytest.raises(common.InputError, match="not a person's dictionary"):
            dmdnet.load_dictionary(tmp_path / name, net, CPU)
    (tmp_path / "text.pt").write_text("no dictionary")
    with pytest.raises(common.InputError, match="text.pt"):
        dmdnet.load_dictionary(tmp_path / "text.pt", net, CPU)
    with pytest.raises(common.InputError, match="only-generic.*no specific dictionary"):
        dmdnet.specific_dictionary(network(variant="only-generic", references=0), some_images(1),
                                   some_landmarks(1))


# Training: the stages, Eq. (4), (13), (17), (18)


def arguments(folder, out, **changes):
    return SimpleNamespace(**{
        "data": str(folder), "out": str(out), "device": "cpu", "precision": "auto", "landmarks": None,
        "vggface": None, "aligned": False, "resume": False, "checkpoint": out / "checkpoint.pt",
        "workers": 0, "preset": None,
    } | changes)


def cheaply(patch, files=True):
    """Random networks for trained recognisers, float32; without `files`, no file but the checkpoint."""
    patch.setattr(dmdnet, "load_encoder", lambda cfg, args, faces, device: encoder())
    patch.setattr(common, "recogniser", lambda faces, purpose="loss": encoder())
    patch.setattr(common, "precision", lambda kind: torch.float32)
    if not files:
        patch.setattr(dmdnet, "validate", lambda *_: (5.0, 20.0))
        patch.setattr(common, "write_log", lambda *_: None)
        patch.setattr(dmdnet, "finish", lambda *_: None)


class WatchedAdam(torch.optim.Adam):
    """Keeps of every step, for each group of parameters: its rate, gradients and values before."""

    made = []

    def __init__(self, parameters, *args, **kwargs):
        super().__init__(parameters, *args, **kwargs)
        self.seen = []
        self.made.append(self)

    def step(self, closure=None):
        self.seen.append([SimpleNamespace(
            rate=group["lr"], values=[p.detach().clone() for p in group["params"]],
            gradients=[None if p.grad is None else p.grad.clone() for p in group["params"]])
            for group in self.param_groups])
        return super().step(closure)


@pytest.fixture(scope="module")
def watched(face_folder, tmp_path_factory):
    """Ten steps of train() in float32, 3, 2, 2 and 3 a stage, with copies of all networks before each.

    The weights of the losses are such that no term is small."""
    out, live, patch = tmp_path_factory.mktemp("watched"), {}, pytest.MonkeyPatch()
    cfg = replace(TINY, steps=10, stages=(0.3, 0.2, 0.2), batch=4, residual=False, clip=math.inf, cooldown=0,
                  learning_rate=2e-4, dictionary_rate=3e-4, weight_pixel=2000.0, weight_perceptual=300.0,
                  weight_style=0.4, weight_adversarial=(2000.0, 3000.0, 4000.0))
    calls = []

    class Net(dmdnet.DMDNet):
        def forward(self, *batch, generic=None):
            if live.get("watching"):
                self.readings = {}
                copies = {name: copy.deepcopy(live[name]) for name in ("memory", "judges")}
                given = generic and {name: [x.detach() for x in parts] for name, parts in generic.items()}
                calls.append(SimpleNamespace(net=copy.deepcopy(self), batch=batch, given=given, **copies))
            return super().forward(*batch, generic=generic)

    def keeping(name, kind):
        def make(*args):
            live[name] = kind(*args)
            return live[name]
        return make

    WatchedAdam.made = []
    cheaply(patch, files=False)
    patch.setattr(torch.optim, "Adam", WatchedAdam)
    patch.setattr(dmdnet, "DMDNet", keeping("net", Net))
    patch.setattr(dmdnet, "GenericMemory", keeping("memory", dmdnet.GenericMemory))
    patch.setattr(dmdnet, "Discriminators", keeping("judges", dmdnet.Discriminators))
    live["watching"] = True
    dmdnet.train(cfg, arguments(face_folder, out))
    live["watching"] = False
    patch.undo()
    faces = common.FaceFolder(face_folder, 64)
    data = dmdnet.Batches(faces, common.split_identities(faces)[0], cfg)
    adam, adam_d = WatchedAdam.made
    return SimpleNamespace(cfg=cfg, calls=calls, faces=faces, data=data, adam=adam, adam_d=adam_d, out=out,
                           folder=face_folder, **live)


def extracted(memory, images, boxes):
    with torch.no_grad():
        return memory.extract(images, boxes)


def detached(net):
    """A copy of its generic dictionary."""
    return {name: tuple(x.detach().clone() for x in parts)
            for name, parts in net.generic_dictionary().items()}


def test_training_sees_the_batches_and_stages_in_order(watched):
    assert [dmdnet.stage_of(step, watched.cfg) for step in range(1, 11)] == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    for step, call in enumerate(watched.calls):
        batch = watched.data[step]
        expected = (batch[name] for name in ("degraded", "boxes", "references", "reference_boxes", "owner"))
        for given, part in zip(call.batch, expected, strict=True):
            assert torch.equal(given, part)
        assert (call.given is None) == (step >= 5)
        assert (len(call.batch[2]) > 0) == (step >= 3)


def test_the_dictionary_is_filled_by_f_gen_at_the_beginning_of_the_first_two_stages(watched):
    images, landmarks = common.stack_faces(watched.faces, watched.data.generic)
    boxes = common.component_boxes(landmarks, 64)
    for step in (0, 3):
        call = watched.calls[step]
        close(call.net.generic_dictionary(), extracted(call.memory, images, boxes), rtol=1e-4, atol=1e-5)
    stale = extracted(watched.calls[2].memory, images, boxes)
    filled = watched.calls[3].net.generic_dictionary()
    assert not any(torch.allclose(stale[name][1], filled[name][1], atol=1e-4) for name in stale)


def test_the_first_stage_reads_renewed_items_and_keeps_them(watched):
    """Eq. (2), step by step: the items of the step by the F_gen of the step, others as they were."""
    for step in (0, 1):
        call, places = watched.calls[step], [2 * step, 2 * step + 1]
        images, landmarks = common.stack_faces(watched.faces, [watched.data.generic[y] for y in places])
        fresh = extracted(call.memory, images, common.component_boxes(landmarks, 64))
        expected = detached(call.net)
        for name, parts in expected.items():
            for part, new in zip(parts, fresh[name], strict=True):
                part[places] = new
        close({name: tuple(parts) for name, parts in call.given.items()}, expected, rtol=1e-4, atol=1e-5)
        close(detached(watched.calls[step + 1].net), expected, rtol=1e-4, atol=1e-5)


def test_the_second_stage_writes_the_faces_of_the_step_before_by_equation_3(watched):
    for step in (3, 4):
        call, before = watched.calls[step], watched.data[step - 1]
        fresh = extracted(call.memory, before["target"], before["boxes"])
        gammas = {name: torch.sigmoid(logit.detach()) for name, logit in call.memory.logits.items()}
        own = detached(call.net)
        expected = forward_by_loop(own, fresh, gammas)
        close({name: tuple(parts) for name, parts in call.given.items()}, expected, rtol=1e-3, atol=1e-4)
        close(detached(watched.calls[step + 1].net), expected, rtol=1e-3, atol=1e-4)
        assert not same(own, expected)


def test_f_spe_begins_as_f_gen_at_the_end_of_the_first_stage(watched):
    def equal(step):
        ours, theirs = (x.state_dict() for x in (watched.calls[step].net.extract_specific,
                                                 watched.calls[step].memory.extract))
        return all(torch.equal(ours[name], theirs[name]) for name in theirs)

    assert [equal(step) for step in (0, 2, 3, 4, 6)] == [False, False, True, False, False]


def test_items_are_learned_in_the_third_stage_only_by_adam_with_a_rate_of_their_own(watched):
    """Eq. (4), with Adam for plain descent: β1 = ½, β2 = 0.999, η = dictionary_rate."""
    for step, call in enumerate(watched.calls):
        assert {item.requires_grad for item in call.net.generic.values()} == {step in (5, 6)}
    names, groups = list(watched.net.generic), [seen[1] for seen in watched.adam.seen]
    assert all(group.rate == 3e-4 for group in groups) and len(groups) == 10
    assert all((gradient is None) == (step not in (5, 6))
               for step, group in enumerate(groups) for gradient in group.gradients)
    for k, name in enumerate(names):
        value = watched.calls[5].net.generic[name].detach().double()
        first = second = torch.zeros_like(value)
        for t in (1, 2):
            gradient = groups[4 + t].gradients[k].double()
            first, second = (first + gradient) / 2, 0.999 * second + 0.001 * gradient**2
            value = value - 3e-4 * (first / (1 - 0.5**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
            torch.testing.assert_close(watched.calls[5 + t].net.generic[name].double(), value,
                                       rtol=1e-5, atol=1e-6)
        assert (value - watched.calls[5].net.generic[name]).abs().max() > 1e-4
        assert torch.equal(watched.calls[7].net.generic[name], watched.net.generic[name])  # as it stays


def test_adam_runs_with_the_rates_and_betas_of_the_config(watched):
    for adam in (watched.adam, watched.adam_d):
        assert {seen[0].rate for seen in adam.seen} == {2e-4} and len(adam.seen) == 10
        assert adam.defaults["betas"] == (0.5, 0.999) and not adam.defaults["weight_decay"]
        first, second = (adam.seen[step][0].values for step in (0, 1))
        moved = [(b - a).abs().max() for a, b in zip(first, second, strict=True)]
        assert max(moved).item() == pytest.approx(2e-4, rel=0.05)  # a first step of Adam is ± the rate


def test_each_stage_teaches_what_it_should_and_nothing_else(watched):
    names = {id(p): f"{owner}.{name}" for owner in ("net", "memory")
             for name, p in getattr(watched, owner).named_parameters()}
    order = [[names.pop(id(p)) for p in group["params"]] for group in watched.adam.param_groups]
    assert not names and all(name.startswith("net.generic.") for name in order[1])
    reached = [set() for _ in range(4)]
    for step, groups in enumerate(watched.adam.seen, 1):
        for group, own in zip(groups, order, strict=True):
            reached[dmdnet.stage_of(step, watched.cfg)] |= {
                name for name, g in zip(own, group.gradients, strict=True) if g is not None and g.any()}
    everything = {name for group in order for name in group}
    f_gen = {name for name in everything if name.startswith("memory.extract.")}
    gammas = {name for name in everything if name.startswith("memory.logits.")}
    items = {name for name in everything if name.startswith("net.generic.")}
    specific = {name for name in everything if ".extract_specific." in name or ".identity." in name}
    network_ = everything - f_gen - gammas - items
    assert len(gammas) == 12 and len(items) == 24 and specific < network_
    assert reached[0] == (network_ - specific) | f_gen
    assert reached[1] == network_ | f_gen | gammas
    assert reached[2] == network_ | items
    assert reached[3] == network_
    judged = {id(p) for p in watched.adam_d.param_groups[0]["params"]}
    assert judged == {id(p) for p in watched.judges.parameters()}


def gap(gradients, expected):
    a, b = (torch.cat([g.flatten().double() for g in many]) for many in (gradients, expected))
    return ((a - b).norm() / b.norm()).item()


def test_a_step_follows_the_gradient_of_equation_18(watched):
    """The gradients of the third stage's first step against losses written out from the paper, on copies."""
    cfg, call, psi, batch = watched.cfg, watched.calls[5], encoder(), watched.data[5]
    target, restored = batch["target"], call.net(*call.batch)
    maps = list(zip(psi.features(restored), psi.features(target), strict=True))
    grams = [[torch.einsum("bchw,bdhw->bcd", x, x) for x in pair] for pair in maps]
    scores = call.judges(restored)
    terms = [2000 * (restored - target).square().sum() / (4 * 3 * 64 * 64),
             300 * sum((a - b).square().mean() for a, b in maps),
             0.4 * sum((a - b).square().sum() / x.numel()
                       for (a, b), (x, _) in zip(grams, maps, strict=True)),
             *(-weight * score.mean() for weight, score in zip(cfg.weight_adversarial, scores, strict=True))]
    own = [p for p in call.net.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(term, own, retain_graph=True) for term in terms]
    total = [sum(many) for many in zip(*gradients, strict=True)]
    live = [id(p) for p in watched.net.parameters()]
    seen = {id(p): g for adam, groups in ((watched.adam, watched.adam.seen[5]),)
            for group, kept in zip(adam.param_groups, groups, strict=True)
            for p, g in zip(group["params"], kept.gradients, strict=True)}
    assert len(own) == len(live)
    assert gap([seen[key] for key in live], total) < 0.003
    for term in gradients:  # a missing term would be noticed
        assert gap([a - b for a, b in zip(total, term, strict=True)], total) > 0.02
    scores = call.judges(torch.cat([target, restored.detach()]))
    hinge = -sum((x[:4] - 1).clamp(max=0).mean() + (-1 - x[4:]).clamp(max=0).mean() for x in scores)
    expected = torch.autograd.grad(hinge, list(call.judges.parameters()))
    assert gap(watched.adam_d.seen[5][0].gradients, expected) < 0.003


def test_load_network_gives_the_trained_one_and_refuses_another_preset(watched):
    args = arguments(watched.folder, watched.out)
    net, cfg = dmdnet.load_network(args, CPU)
    assert cfg == watched.cfg and not net.training
    with torch.no_grad():
        expected = watched.net.eval()(*watched.calls[-1].batch)
        torch.testing.assert_close(net(*watched.calls[-1].batch), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(common.InputError, match="preset tiny"):
        dmdnet.load_network(arguments(watched.folder, watched.out, preset="paper"), CPU)


def flat(value, name=""):
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}").items()}
    return {name: value}


def test_a_run_broken_between_two_stages_ends_as_an_unbroken_one(face_folder, tmp_path, monkeypatch):
    """With spectral norm, whose vectors F_spe takes over as well."""
    cheaply(monkeypatch, files=False)
    cfg = replace(TINY, steps=4, stages=(0.25, 0.25, 0.25), validate_every=1, cooldown=0, scales=(3,),
                  spectral=True, bounded=False, residual=False)
    whole, broken = arguments(face_folder, tmp_path / "a"), arguments(face_folder, tmp_path / "b")
    dmdnet.train(cfg, whole)
    for stop in (2, 3):  # broken before the first step of a stage has left a checkpoint
        calls = []

        def validate(*_):
            calls.append(1)
            if len(calls) == (stop if stop == 2 else 2):
                raise KeyboardInterrupt
            return 5.0, 20.0

        monkeypatch.setattr(dmdnet, "validate", validate)
        with pytest.raises(KeyboardInterrupt):
            dmdnet.train(cfg, broken)
        assert common.load_weights(broken.checkpoint)["step"] == stop - 1
        broken.resume = True
    monkeypatch.setattr(dmdnet, "validate", lambda *_: (5.0, 20.0))
    dmdnet.train(cfg, broken)
    a, b = (flat(common.load_weights(args.checkpoint)) for args in (whole, broken))
    assert set(a) == set(b) and a[".step"] == 4
    different = [name for name in a if not (
        torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name])]
    assert different == []


@pytest.mark.parametrize("variant",
                         ["only-backward", "no-forward", "no-backward", "only-specific", "items-0"])
def test_variants_without_a_stage_train(variant, face_folder, tmp_path, monkeypatch):
    """What is filled when: from noise, after the first stage, or never."""
    filled, real = [], dmdnet.fill_generic
    cheaply(monkeypatch, files=False)
    monkeypatch.setattr(dmdnet, "fill_generic", lambda *args: (filled.append(1), real(*args)))
    cfg = replace(TINY, steps=4, variant=variant, **dmdnet.VARIANTS[variant])
    dmdnet.train(replace(cfg, stages=tuple(0.25 if share else 0 for share in cfg.stages)),
                 arguments(face_folder, tmp_path))
    assert len(filled) == {"no-forward": 2, "no-backward": 2}.get(variant, 0)
    state = common.load_weights(tmp_path / "checkpoint.pt")
    assert all(x.isfinite().all() for x in state["net"].values()) and state["step"] == 4


def test_the_rate_halves_when_the_validation_loss_stops_falling_and_cools_down(
    face_folder, tmp_path, monkeypatch
):
    losses = iter([5.0, 4.0, 4.0, 4.0, 3.0, 3.5, 3.5, 3.5])
    cheaply(monkeypatch, files=False)
    monkeypatch.setattr(dmdnet, "validate", lambda *_: (next(losses), 20.0))
    monkeypatch.setattr(torch.optim, "Adam", WatchedAdam)
    WatchedAdam.made = []
    cfg = replace(TINY, steps=8, validate_every=1, patience=0, batch=1, cooldown=0.5, dictionary_rate=7e-5)
    dmdnet.train(cfg, arguments(face_folder, tmp_path))
    after = [1, 1, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 16, 1 / 32]
    rows = common.load_weights(tmp_path / "checkpoint.pt")["rows"]
    cooled = [1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]  # to 0 in the last half of the steps
    used = [a * b for a, b in zip([1, *after], cooled, strict=False)]
    assert [row["rate"] / cfg.learning_rate for row in rows] == pytest.approx(used)
    for group, rate in ((0, cfg.learning_rate), (1, 7e-5)):
        assert [seen[group].rate for seen in WatchedAdam.made[0].seen] == pytest.approx(
            [rate * part for part in used])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    face_folder, tmp_path, monkeypatch
):
    cheaply(monkeypatch, files=False)
    real, calls = dmdnet.pixel_loss, []

    def spoiled(restored, target):
        calls.append(1)
        return real(restored, target) * (math.nan if len(calls) > 3 else 1)

    monkeypatch.setattr(dmdnet, "pixel_loss", spoiled)
    with pytest.raises(common.InputError, match="pixel.*not finite"):
        dmdnet.train(replace(TINY, steps=12, validate_every=1), arguments(face_folder, tmp_path))
    state = common.load_weights(tmp_path / "checkpoint.pt")
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["net"].values())


def test_a_short_training_improves_held_out_faces(face_folder, tmp_path, monkeypatch):
    """Seven people of 24 are held out, for an interval narrower than that of the usual two."""

    def split(faces, seed=0):
        people = (range(16), range(16, 17), range(17, 24))
        return [[i for i, who in enumerate(faces.identity.tolist()) if who in part] for part in people]

    cheaply(monkeypatch)
    monkeypatch.setattr(common, "split_identities", split)
    monkeypatch.setattr(common, "write_log", lambda *_: None)
    cfg = replace(TINY, batch=4, steps=40, learning_rate=4e-3, weight_perceptual=0.1, weight_style=0.0,
                  weight_adversarial=(0.0, 0.0, 0.0))
    dmdnet.train(cfg, arguments(face_folder, tmp_path))
    for task in json.loads((tmp_path / "result.json").read_text())["test"].values():
        assert task["faces"] == 35 and set(task["references"]) == {"0", "1", "3"}
        assert task["paired_psnr_gain"]["ci95"][0] > 0
        assert task["restored"]["psnr"] > task["input"]["psnr"]
        assert task["restored"] == task["references"]["3"]
        assert len({values["psnr"] for values in task["references"].values()}) == 3
    names = "checkpoint.pt config.json samples.png readings.png result.json".split()
    assert all((tmp_path / name).stat().st_size > 0 for name in names)


# The released network


SCALES = {256: 64, 128: 128, 64: 256}  # features and channels of a scale


def official_shapes():
    """The names and shapes of the official checkpoint, by the rule it was written with."""
    shapes = {}

    def layer(name, before, after):
        shapes.update({f"{name}.bias": (after,), f"{name}.weight_orig": (after, before, 3, 3),
                       f"{name}.weight_u": (after,), f"{name}.weight_v": (9 * before,)})

    def two(name, before, after, last=None, ends=(0, 2)):
        layer(f"{name}.{ends[0]}", before, after), layer(f"{name}.{ends[1]}", after, last or after)

    sides = {"LE": (40, 20, 10), "RE": (40, 20, 10), "MO": (55, 27, 13)}
    for part, both in sides.items():
        for (scale, channels), side in zip(SCALES.items(), both, strict=True):
            for kind, width in (("key", channels // 4), ("value", channels)):
                shapes[f"{part.lower()}_{scale}_mem_{kind}"] = (128, width, side, side)
            for owner in ("E_lq", "E_hq"):
                two(f"{owner}.{part}_{scale}_Q.Query", channels, channels // 4)
            name, third = f"{part}_{scale}", channels // 3
            two(f"{name}_KV.Key", channels, channels // 4), two(f"{name}_KV.Value", channels, channels)
            two(f"{name}_Attention", channels, channels)
            for k in (1, 2, 3):
                two(f"{name}_Mask.conv{k}", channels, third)
            two(f"{name}_Mask.convCat", 3 * third, channels)
    for owner in ("E_lq", "E_hq"):
        widths = (3, 64, 64, 128, 128, 256, 256)
        for k, (before, after) in enumerate(zip(widths[:-1], widths[1:], strict=True), 1):
            two(f"{owner}.conv{k}", before, after), two(f"{owner}.res{k}.Res", after, after)
    for k in (1, 2, 3, 4):
        two(f"MSDilate.conv{k}", 256, 256)
    layer("MSDilate.convi", 1024, 256)
    for k, (before, after) in enumerate(((256, 128), (128, 64), (64, 64)), 1):
        for name in ("conv1", "ScaleModel1", "ShiftModel1"):
            two(f"up{k}.{name}", before, after)
        two(f"up{k}.convup", after, after, ends=(1, 3))
    layer("up4.0", 64, 64), two("up4.2.Model", 64, 64), two("up4.3.Model", 64, 64), layer("up4.4", 64, 3)
    return shapes


@pytest.fixture(scope="module")
def released_shell():
    """The network at full width, without numbers."""
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(parametrizations._SpectralNorm, "_power_method", lambda *_: None)
        return dmdnet.DMDNet(dmdnet.RELEASED)


def test_every_official_name_maps_to_one_tensor_of_its_shape_and_every_tensor_has_a_name(released_shell):
    shapes, state = official_shapes(), released_shell.state_dict()
    assert len(shapes) == 1014
    unused = [name for name in shapes if dmdnet.released_name(name) is None]
    assert len(unused) == 72 and all(name.startswith("E_hq.") and "_Q.Query." in name for name in unused)
    mapped = {name: dmdnet.released_name(name) for name in shapes if name not in unused}
    assert sorted(mapped.values()) == sorted(state)
    wrong = [name for name, here in mapped.items() if state[here].shape != shapes[name]]
    assert wrong == []
    learned = [math.prod(s) for name, s in shapes.items() if name.endswith(("bias", "orig"))]
    items = [math.prod(s) for name, s in shapes.items() if "mem" in name]
    assert round(sum(learned) / 1e6, 2) == 40.36 and round(sum(items) / 1e6, 2) == 110.17  # Section 4.7


@pytest.mark.parametrize(("official", "here"), [
    ("E_lq.conv1.0.bias", "extract.levels.0.0.0.bias"),
    ("E_lq.res2.Res.2.bias", "extract.levels.0.3.body.2.bias"),
    ("E_hq.conv6.2.bias", "extract_specific.features.levels.2.2.2.bias"),
    ("LE_128_KV.Key.0.bias", "extract_specific.keys.scale2_left_eye.0.bias"),
    ("MO_64_KV.Value.2.bias", "extract_specific.values.scale3_mouth.2.bias"),
    ("E_lq.RE_256_Q.Query.0.bias", "transforms.scale1.query.right_eye.0.bias"),
    ("RE_64_Attention.2.bias", "transforms.scale3.confidence.right_eye.score.2.bias"),
    ("MO_256_Mask.conv1.0.bias", "transforms.scale1.identity.mouth.reduce.0.0.bias"),  # of the component
    ("MO_256_Mask.conv2.0.bias", "transforms.scale1.identity.mouth.reduce.1.0.bias"),  # of the specific
    ("MO_256_Mask.conv3.0.bias", "transforms.scale1.identity.mouth.reduce.2.0.bias"),  # of the generic
    ("up1.ScaleModel1.0.bias", "stages.0.scale.0.bias"), ("up3.ShiftModel1.2.bias", "stages.2.shift.2.bias"),
    ("up2.convup.3.bias", "stages.1.widen.2.bias"), ("up4.3.Model.0.bias", "paint.3.body.0.bias"),
    ("re_64_mem_value", "generic.scale3_right_eye_value")])
def test_official_names_of_the_same_shape_are_not_mixed_up(official, here):
    assert dmdnet.released_name(official) == here


def test_the_released_convolutions_are_all_under_spectral_norm_with_the_official_dilations(released_shell):
    layers = {name: m for name, m in released_shell.named_modules() if isinstance(m, nn.Conv2d)}
    assert len(layers) == 249 - 18 and all(parametrize.is_parametrized(m, "weight") for m in layers.values())
    dilated = {f"E_{kind}.res{k}.Res.{end}": d for kind in ("lq", "hq") for k in range(1, 7)
               for end, d in zip((0, 2), ((5, 3), (3, 1), (1, 1))[(k - 1) // 2], strict=True)}
    dilated |= {f"MSDilate.conv{k}.{end}": 5 - k for k in range(1, 5) for end in (0, 2)}
    found = {dmdnet.released_name(f"{name}.bias").removesuffix(".bias"): d for name, d in dilated.items()}
    strided = {f"{e}.levels.{k}.0.0" for e in ("extract", "extract_specific.features") for k in range(3)}
    for name, layer in layers.items():
        assert layer.dilation == layer.padding == (found.get(name, 1),) * 2
        assert layer.stride == ((2, 2) if name in strided else (1, 1))
    assert isinstance(released_shell.transforms["scale1"], dmdnet.ReleasedTransform)


def boxes_by_hand(face):
    """The official boxes of one face, 68 pairs of numbers."""
    p = [[min(max(x, 8), 504) for x in point] for point in face]

    def mean(group, axis):
        return sum(p[i][axis] for i in group) / len(group)

    def box(group, top, bottom, half):
        x, y = mean(group, 0), mean(group, 1)
        return [int(x - half + 1), int(y - top + 1), int(x + half), int(y + bottom)]

    boxes = []
    for eye, brow in ((range(36, 42), range(17, 22)), (range(42, 48), range(22, 27))):
        top = 1.3 * (mean(eye, 1) - min(p[i][1] for i in [*eye, *brow]))
        boxes.append(box(eye, top, top / 1.9, (top + top / 1.9) / 2))
    nose = range(29, 36)
    half = 1.25 * max(mean(nose, 0) - p[31][0], p[35][0] - mean(nose, 0))
    bottom = 1.1 * (p[33][1] - mean(nose, 1))
    boxes.append(box(nose, 2 * half - bottom, bottom, half))
    mouth = range(48, 68)
    extents = [max(p[i][axis] for i in mouth) - min(p[i][axis] for i in mouth) for axis in (0, 1)]
    half = 1.1 * max(max(extents) / 2, 16)
    x1, y1, x2, y2 = box(mouth, half, half, half)
    return [*boxes, [x1, y1, int(min(mean(mouth, 0) + half, 510)), int(min(mean(mouth, 1) + half, 510))]]


def test_released_boxes_are_the_official_ones_also_at_the_border():
    faces = some_landmarks(12, 512)
    faces[3] += torch.tensor([0.0, 130])  # the mouth at the lower border
    faces[4] -= torch.tensor([150.0, 40])
    faces[5, 48:] = 256 + (faces[5, 48:] - 256) * 0.05  # a mouth smaller than 32 pixels
    faces = faces.double()
    boxes = dmdnet.released_boxes(faces)
    assert boxes.tolist() == [boxes_by_hand(face) for face in faces.tolist()]
    assert boxes[3, 3, 3] == 510
    assert (boxes[5, 3, 2:] - boxes[5, 3, :2]).tolist() == pytest.approx([35, 35], abs=1)


def test_released_components_are_whole_features_resized():
    features = random(2, 3, 16, 20)
    boxes = torch.tensor([[[9.0, 7, 30, 31], [0, 0, 63, 63], [41, 17, 79, 50]],
                          [[-3.0, 4, 20, 26], [13, 13, 25, 25], [50, 21, 77, 63]]])
    parts = dmdnet.cut_components(features, boxes, 4, (5, 3, 11))
    for index, (part, side) in enumerate(zip(parts, (5, 3, 11), strict=True)):
        for n in range(2):
            x1, y1, x2, y2 = (max(int(v) // 4, 0) for v in boxes[n, index].tolist())
            expected = resized(features[n, :, y1:y2, x1:x2], side, side)
            torch.testing.assert_close(part[n], expected, rtol=1e-4, atol=1e-5)


def test_released_components_may_be_smaller_than_a_feature():
    boxes = torch.tensor([[[9.0, 9, 14, 14], [8, 8, 30, 30], [8, 8, 30, 30]]])  # as of a face seen from far
    assert dmdnet.cut_components(random(1, 3, 8, 8), boxes, 8, (4, 4, 4))[0].shape == (1, 3, 4, 4)


def test_adain_gives_a_reading_the_mean_and_deviation_of_the_component():
    reading, part = 3 * random(2, 4, 5, 5) + 1, 0.5 * random(2, 4, 5, 5, seed=1) - 2
    result, a, b = dmdnet.adain(reading, part).numpy(), reading.double().numpy(), part.double().numpy()
    for n in range(2):
        for c in range(4):
            x, y = a[n, c], b[n, c]
            spread = np.sqrt((y.var(ddof=1) + 1e-5) / (x.var(ddof=1) + 1e-5))
            expected = (x - x.mean()) * spread + y.mean()
            np.testing.assert_allclose(result[n, c], expected, rtol=1e-4, atol=1e-5)
    assert dmdnet.adain(torch.ones(1, 1, 3, 3), part[:1, :1]).isfinite().all()


RELEASED = replace(dmdnet.RELEASED, width=8, size=64, items=5, references=3, part_sizes=(12, 12, 8, 16),
                   spectral=False)


def test_a_released_transform_equals_the_official_one_by_loops():
    """√items instead of √d, AdaIN before the confidence, later components over earlier ones, no nose."""
    torch.manual_seed(4)
    block = randomised(dmdnet.ReleasedTransform(2, RELEASED))
    features, sizes = random(2, 16, 16, 16), (6, 6, 8)
    boxes = torch.tensor([[[8.0, 8, 35, 31], [24, 12, 50, 40], [14, 26, 47, 60]],
                          [[9.0, 7, 30, 31], [31, 5, 63, 33], [10, 41, 52, 61]]])
    generic, own = ({f"scale2_{part}": (random(count, 4, n, n, seed=n + count),
                                        random(count, 16, n, n, seed=n + 9 + count))
                     for part, n in zip(RELEASED.parts, sizes, strict=True)} for count in (5, 3))
    allowed, expected = torch.tensor([[False] * 3, [True, False, True]]), features.clone()
    with torch.no_grad():
        enriched, _ = block(features, boxes, generic, own, allowed)
        plain, _ = block(features, boxes, generic, None, None)
        for index, (name, side) in enumerate(zip(RELEASED.parts, sizes, strict=True)):
            for n in range(2):
                x1, y1, x2, y2 = (int(v) // 4 for v in boxes[n, index].tolist())
                part = resized(features[n, :, y1:y2, x1:x2], side, side)[None]
                query = two_convolutions(block.query[name], part)
                read = read_by_loop(query, *generic[f"scale2_{name}"], math.sqrt(5))[0]
                if n:
                    specific = read_by_loop(query, *own[f"scale2_{name}"], math.sqrt(2), allowed[n:])[0]
                    thirds = [two_convolutions(block.identity[name].reduce[k], x)
                              for k, x in enumerate((part, specific, read))]
                    mask = two_convolutions(block.identity[name].score, torch.cat(thirds, 1))
                    read = mask * specific + (1 - mask) * read
                read = dmdnet.adain(read, part)
                fused = part + read * two_convolutions(block.confidence[name].score, read - part)
                expected[n, :, y1:y2, x1:x2] = resized(fused[0], y2 - y1, x2 - x1)
    torch.testing.assert_close(enriched, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(plain[0], expected[0], rtol=1e-3, atol=1e-3)
    assert (plain[1] - expected[1]).abs().max() > 1e-2


@torch.no_grad()
def test_the_released_network_restores_each_face_as_alone_and_leaves_the_nose():
    torch.manual_seed(4)
    net, (images, boxes), (references, reference_boxes, owner) = (
        randomised(dmdnet.DMDNet(RELEASED)).eval(), some_faces(3), references_of((0, 1, 2)))
    boxes, reference_boxes = (torch.cat([(x[..., :2] - 8).clamp(min=0), (x[..., 2:] + 8).clamp(max=64)], 2)
                              for x in (boxes, reference_boxes))
    together = net(images, boxes, references, reference_boxes, owner)
    assert together.abs().max() <= 1 and set(net.readings["scale1"]) == {"left_eye", "right_eye", "mouth"}
    for face, count in enumerate((0, 1, 2)):
        one, mine = slice(face, face + 1), owner == face
        alone = net(images[one], boxes[one], *((references[mine][None], reference_boxes[mine][None])
                                               if count else ()))
        torch.testing.assert_close(together[one], alone, rtol=1e-2, atol=1e-3)
    moved = boxes.clone()
    moved[:, 2] += 5
    assert torch.equal(net(images, moved, references, reference_boxes, owner), together)
