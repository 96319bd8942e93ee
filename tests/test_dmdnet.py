"""DMDNet: every equation against an independent form, whose references a face reads, the four stages."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import gap, paste_by_loop, random
from conftest import some_encoder as encoder
from torch import nn

import common
import dmdnet

TINY = replace(dmdnet.TINY, size=64, width=8, items=6, references=3, renewed=2, sides=(8, 8, 6, 10),
               stages=(0.3, 0.15, 0.15), discriminator_width=4, batch=2, validate_every=1000)


def some_landmarks(count, size=64, seed=3):
    """The mean face, stretched, moved, every point a little: (count,68,2)."""
    points = common.mean_landmarks(size) * (1 + 0.06 * random(count, 1, 2, seed=seed))
    points = points + 0.03 * size * random(count, 1, 2, seed=seed + 100)
    return points + 0.008 * size * random(count, 68, 2, seed=seed + 200)


def some_images(count, size=64, seed=6):
    """Smooth random pictures in [-1,1]: (count,3,size,size)."""
    return F.interpolate(random(count, 3, 12, 12, seed=seed), size, mode="bicubic").clamp(-1, 1)


def some_faces(count, seed=6):
    """images (count,3,64,64), boxes (count,4,4)"""
    return some_images(count, seed=seed), common.component_boxes(some_landmarks(count, seed=seed), 64)


def references_of(counts, seed=8):
    """references (M,3,64,64), their boxes and owner (M,) of faces with so many references each"""
    owner = torch.tensor([face for face, count in enumerate(counts) for _ in range(count)], dtype=torch.long)
    return *some_faces(len(owner), seed), owner


def randomised(module):
    """All that is learned random: some start at zero or near it, which would hide what depends on them."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(1.2 * torch.randn(parameter.shape, generator=draw) * spread)
    return module


def network(**changes):
    torch.manual_seed(2)
    net = randomised(dmdnet.DMDNet(replace(TINY, **changes))).eval()
    draw = torch.Generator().manual_seed(7)
    for kind in (net.generic_keys, net.generic_values):
        for items in kind.values():
            items.data = torch.randn(items.shape, generator=draw)
    return net


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


# Config, Table 3


@pytest.mark.parametrize(("variant", "shares", "lengths"), [
    ("full", (0.3, 0.2, 0.1), [3, 2, 1, 4]), ("no-forward", None, [2, 0, 1, 7]),
    ("no-backward", None, [2, 1, 0, 7]), ("only-backward", None, [0, 0, 5, 5]),
    ("only-specific", (0.3, 0.2, 0.1), [0, 0, 0, 10])])
def test_stages_follow_one_another_and_variants_leave_theirs_out(variant, shares, lengths):
    cfg = replace(TINY, steps=10, **dmdnet.VARIANTS[variant])
    cfg = replace(cfg, stages=shares or cfg.stages)
    stages = [dmdnet.stage_of(step, cfg) for step in range(1, 11)]
    assert [stages.count(stage) for stage in range(4)] == lengths and stages == sorted(stages)


def test_more_steps_only_prolong_the_last_stage_of_a_run():
    begun = replace(TINY, steps=10, stage_ends=dmdnet.stage_ends(replace(TINY, steps=10)))
    longer = replace(begun, steps=40)
    for step in range(1, 41):
        assert dmdnet.stage_of(step, longer) == (dmdnet.stage_of(step, begun) if step <= 10 else 3)


def test_components_are_40_40_25_and_55_features_wide_and_halve_from_scale_to_scale():
    assert dmdnet.PAPER.component_sizes == [[40, 40, 25, 55], [20, 20, 12, 27], [10, 10, 6, 13]]
    assert dmdnet.RELEASED.component_sizes[2] == [10, 10, 13]


def test_the_figures_of_table_3_are_those_of_its_text():
    gains = {name: row["x8_psnr"] - dmdnet.PAPER_FIGURES["only-generic"]["x8_psnr"]
             for name, row in dmdnet.PAPER_FIGURES.items()}
    assert round(gains["full"], 2) == 0.34  # Section 4.3: "0.34 dB in x8"
    assert min(gains, key=gains.get) == "items-0" and max(gains, key=gains.get) == "items-256"


@pytest.mark.parametrize("variant", dmdnet.VARIANTS)
@torch.no_grad()
def test_every_variant_restores_and_differs_as_the_table_says(variant):
    net = network(**{**dmdnet.VARIANTS[variant], **({"items": 9} if variant == "items-256" else {})})
    (images, boxes), cfg, full = some_faces(2), net.cfg, network()
    restored = net(images, boxes, *(references_of((2, 2)) if cfg.references else ()))
    assert restored.shape == images.shape and restored.isfinite().all()
    assert not torch.equal(restored, images)
    assert set(net.readings) == {f"scale{s}" for s in {
        "1-transform": (3,), "2-transform": (2, 3), "items-0": ()}.get(variant, (1, 2, 3))}
    double = 2 if variant == "items-0" else 1  # "we increase the channels of the whole framework to 2 times"
    for plain, layer in zip(full.extract.modules(), net.extract.modules(), strict=True):
        if isinstance(layer, nn.Conv2d):
            assert layer.out_channels == double * plain.out_channels
    for read in (read for readings in net.readings.values() for read in readings.values()):
        assert set(read) == {"generic", "specific", "identity"} - {
            "only-specific": {"generic", "identity"}, "only-generic": {"specific", "identity"},
            "no-transform": {"identity"}}.get(variant, set())
        dictionaries = [read[name] for name in ("generic", "specific") if name in read]
        if variant == "no-transform":  # one item of both dictionaries
            ordered = torch.cat(dictionaries, 1).sort(1).values
            torch.testing.assert_close(ordered, torch.eye(10)[9:].expand(2, 10))
        else:
            for weights in dictionaries:
                torch.testing.assert_close(weights.sum(1), torch.ones(2))


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


@torch.no_grad()
def test_the_generic_memory_renews_at_places_and_else_updates_with_gammas_in_0_1():
    torch.manual_seed(3)
    memory, (images, boxes), seen = dmdnet.GenericMemory(TINY), some_faces(2), []
    for k, logit in enumerate(memory.logits.values()):
        logit.copy_(3 * random(2, seed=k))
    old, fresh = network().generic_dictionary(), memory.extract(images, boxes)
    places = torch.tensor([5, 2])
    assert same(memory(old, images, boxes, places), dmdnet.renew_items(old, fresh, places))
    gammas = {name: 1 / (1 + torch.exp(-logit)) for name, logit in memory.logits.items()}
    assert set(gammas) == {f"scale{s}_{name}" for s in (1, 2, 3) for name in common.COMPONENTS}
    close(memory(old, images, boxes), forward_by_loop(old, fresh, gammas))
    memory.extract.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.autocast("cpu", torch.bfloat16):
        updated = memory(old, images, boxes)
    close(updated, forward_by_loop(old, seen.pop(), gammas))  # in float32 all the same


# Eq. (6)


@torch.no_grad()
def test_a_specific_dictionary_has_an_item_a_reference_and_another_one_changes_no_other():
    net, (images, boxes) = network(), some_faces(4)
    three, four = (net.extract_specific(images[:n], boxes[:n]) for n in (3, 4))
    for name, items in net.generic_dictionary().items():
        for kind, item in enumerate(items):
            assert three[name][kind].shape == (3, *item.shape[1:])
            torch.testing.assert_close(four[name][kind][:3], three[name][kind], rtol=1e-4, atol=1e-5)
            assert (four[name][kind][3] - three[name][kind][0]).abs().max() > 1e-2


def two_convolutions(layers, x, dilations=(1, 1)):
    """Two 3×3 convolutions with zero padding, leaky ReLU of slope 0.2 between."""
    x = F.conv2d(x, layers[0].weight, layers[0].bias, padding=dilations[0], dilation=dilations[0])
    x = torch.where(x > 0, x, 0.2 * x)
    return F.conv2d(x, layers[2].weight, layers[2].bias, padding=dilations[1], dilation=dilations[1])


@torch.no_grad()
def test_keys_and_values_are_two_convolutions_each_of_the_same_component():
    extractor, (images, boxes) = network().extract_specific, some_faces(2)
    maps, dictionary = extractor.features(images), extractor(images, boxes)
    assert [tuple(x.shape) for x in maps] == [(2, 8, 32, 32), (2, 16, 16, 16), (2, 32, 8, 8)]
    for scale in (1, 2, 3):
        parts = dmdnet.crop_components(maps[scale - 1], boxes, 2**scale, TINY.component_sizes[scale - 1])
        for component, part in zip(common.COMPONENTS, parts, strict=True):
            name = f"scale{scale}_{component}"
            for layers, made in zip((extractor.keys, extractor.values), dictionary[name], strict=True):
                torch.testing.assert_close(made, two_convolutions(layers[name], part), rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("allowed", [None, MASK, MASK & False])
def test_reading_is_equation_7_item_by_item(allowed):
    query, (keys, values) = random(3, 2, 3, 3, seed=9), some_dictionary(5)["scale1_nose"]
    result = dmdnet.read_dictionary(query, keys, values, 2.5, allowed)
    for a, b in zip(result, read_by_loop(query, keys, values, 2.5, allowed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    if allowed is not None:
        assert not result[0][~allowed.any(1)].any() and not result[1][~allowed].any()


def test_without_transform_the_one_best_value_is_read_and_queries_and_keys_still_learn():
    query, (keys, values) = random(3, 2, 3, 3, seed=9), some_dictionary(5)["scale1_nose"]
    allowed = MASK | torch.tensor([[0], [1], [0]], dtype=torch.bool)
    query.requires_grad_(), keys.requires_grad_()
    reading, weights = dmdnet.read_best(query, keys, values, 2.5, allowed)
    expected = read_by_loop(query.detach(), keys.detach(), values, 2.5, allowed, hard=True)
    torch.testing.assert_close((reading.detach(), weights.detach()), expected, rtol=1e-5, atol=1e-6)
    hard = torch.autograd.grad(reading.square().sum(), (query, keys))
    soft = dmdnet.attention(query, keys, 2.5, allowed)  # what the best value sends to the softmax
    pull = 2 * reading.detach().flatten(1) @ values.flatten(1).T
    for a, b in zip(hard, torch.autograd.grad((soft * pull).sum(), (query, keys)), strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_reading_survives_scores_of_any_size_and_empty_dictionaries():
    query, (keys, values) = 1e4 * random(3, 2, 3, 3, seed=9), some_dictionary(5)["scale1_nose"]
    read, weights = dmdnet.read_dictionary(query, keys, values, 1.0, MASK)
    assert read.isfinite().all() and weights.sum(1).tolist() == pytest.approx([1, 0, 1])
    read, weights = dmdnet.read_dictionary(query, keys[:0], values[:0], 1.0, MASK[:, :0])
    assert read.shape == (3, 8, 3, 3) and not read.any() and weights.shape == (3, 0)


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


@pytest.mark.parametrize("bounded", [True, False])
@torch.no_grad()
def test_the_confidence_score_adds_the_reading_by_equation_9(bounded):
    block = randomised(dmdnet.ConfidenceScore(8, bounded))
    part, reading = 3 * random(2, 8, 4, 4), 3 * random(2, 8, 4, 4, seed=1)
    score = two_convolutions(block.score, reading - part)
    score = 1 / (1 + torch.exp(-score)) if bounded else score
    torch.testing.assert_close(block(part, reading), part + reading * score, rtol=1e-4, atol=1e-4)
    assert torch.equal(block(part, 0 * reading), part)  # nothing read, nothing changed


def resized(image, height, width):
    """Bilinear resampling (…,h,w) → (…,height,width): sources at (i + ½) h / height − ½, clamped."""
    matrices = []
    for before, after in ((image.shape[-2], height), (image.shape[-1], width)):
        place = ((torch.arange(after) + 0.5) * before / after - 0.5).clamp(0, before - 1)
        matrices.append((1 - (place[:, None] - torch.arange(before)).abs()).clamp(min=0))
    return matrices[0] @ image @ matrices[1].T


@torch.no_grad()
def test_a_decoder_stage_modulates_by_equation_10_with_scale_and_shift_from_the_skip():
    block = randomised(dmdnet.SFTStage(8, 6))
    x, skip = random(2, 8, 5, 5), random(2, 8, 5, 5, seed=1)
    decoder = two_convolutions(block.reduce, x)
    decoder = torch.where(decoder > 0, decoder, 0.2 * decoder)
    modulated = two_convolutions(block.scale, skip) * decoder + two_convolutions(block.shift, skip)
    expected = two_convolutions(block.widen, resized(modulated, 10, 10))
    torch.testing.assert_close(block(x, skip), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spectral", [False, True])
@torch.no_grad()
def test_blocks_begin_as_their_docstrings_say(spectral):
    """Around a constant; close to it only without spectral norm, which undoes small weights."""
    torch.manual_seed(0)
    part, other, third = (random(4, 16, 8, 8, seed=k) for k in range(3))
    blocks = [dmdnet.Residual(16), dmdnet.SFTStage(16, 16), dmdnet.IdentityScore(16, not spectral),
              dmdnet.ConfidenceScore(16, not spectral)]
    for block in blocks if spectral else ():
        dmdnet.normalise(block)
    residual, stage, identity, confidence = (block.eval() for block in blocks)
    scores = {"residual": residual(part) - part, "scale": stage.scale(part) - 1,
              "identity": identity(part, other, third)[1] - 0.5,
              "confidence": confidence.score(other - part) + (0 if spectral else 2)}
    for name, score in scores.items():
        assert score.mean().abs() < 0.1, name
        assert score.std() < (1 if spectral else 0.2), name
    assert scores["residual"].std() > 0.2 if spectral else scores["residual"].std() < 0.2


# The dictionary transform module and the network: Eq. (1), (5), Figure 2


def test_a_dictionary_transform_is_figure_2_step_by_step():
    """Two faces, of which only the second has references."""
    net, (_, boxes) = network(), some_faces(2)
    block, features, sizes = net.transforms["scale2"], random(2, 16, 16, 16), TINY.component_sizes[1]
    generic, own = net.generic_dictionary(), {
        f"scale2_{name}": (random(3, 4, n, n, seed=n), random(3, 16, n, n, seed=n + 9))
        for name, n in zip(common.COMPONENTS, sizes, strict=True)}
    allowed, changes = torch.tensor([[False] * 3, [True, False, True]]), []
    with torch.no_grad():
        enriched, readings = block(features, boxes, generic, own, allowed)
        parts = dmdnet.crop_components(features, boxes, 4, sizes)
        for name, part in zip(common.COMPONENTS, parts, strict=True):
            query = two_convolutions(block.query[name], part)
            read = read_by_loop(query, *generic[f"scale2_{name}"], 8)[0]
            specific = read_by_loop(query, *own[f"scale2_{name}"], 8, allowed)[0]
            read[1] = block.identity[name](part, specific, read)[0][1]
            score = torch.sigmoid(two_convolutions(block.confidence[name].score, read - part))
            changes.append(score * read)
            assert readings[name]["specific"].shape == (2, 3) and readings[name]["generic"].shape == (2, 6)
    expected = features + paste_by_loop(changes, boxes, 4, 16, 16)[0]
    torch.testing.assert_close(enriched, expected, rtol=1e-3, atol=1e-3)
    assert (enriched - features).abs().max() > 0.1


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
        alone = net(images[one], boxes[one], references[mine], reference_boxes[mine])
        torch.testing.assert_close(together[one], alone, rtol=1e-3, atol=1e-4)
        assert ((together[one] - plain[one]).abs().max() > 1e-2) == (count > 0)


@torch.no_grad()
def test_references_and_their_dictionary_give_the_same_picture():
    net, (images, boxes), marks = network(), some_faces(2), some_landmarks(6, seed=8)
    references, reference_boxes, owner = references_of((3, 3))
    expected = net(images, boxes, references, reference_boxes, owner)
    stored = dmdnet.specific_dictionary(net, references, marks, batch=2, precision="float32")
    restored = net.read_and_paint(images, boxes, stored, owner)
    torch.testing.assert_close(restored, expected, rtol=1e-3, atol=1e-4)
    shared = {name: tuple(x[:3] for x in parts) for name, parts in stored.items()}  # one person's, of all
    both = net.read_and_paint(images, boxes, shared)
    torch.testing.assert_close(both[0], expected[0], rtol=1e-3, atol=1e-4)
    assert (both[1] - expected[1]).abs().max() > 1e-2


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
        for component, expected in block.forward(features, *others)[1].items():
            assert set(expected) == {"generic", "specific", "identity"}
            assert all(torch.equal(readings[component][kind], value) for kind, value in expected.items())


@torch.no_grad()
def test_without_references_the_network_is_one_that_was_never_given_any():
    net, (images, boxes) = network(), some_faces(2)
    never = dmdnet.DMDNet(replace(TINY, **dmdnet.VARIANTS["only-generic"])).eval()
    never.load_state_dict({k: v for k, v in net.state_dict().items() if k in never.state_dict()})
    none, empty = references_of(()), {name: tuple(x[:0] for x in parts)
                                      for name, parts in net.generic_dictionary().items()}
    expected = never(images, boxes)
    assert torch.equal(net(images, boxes), expected) and torch.equal(net(images, boxes, *none), expected)
    torch.testing.assert_close(net.read_and_paint(images, boxes, empty), expected)


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
def test_the_network_begins_at_the_input_where_it_is_residual_and_is_bounded_where_not():
    images, boxes = some_faces(1)
    assert torch.equal(dmdnet.DMDNet(TINY)(images, boxes), images)
    bounded = network(residual=False)(images, boxes)
    assert bounded.abs().max() <= 1 and not torch.allclose(bounded, images)


# Data


class Album:
    """People with `counts` pictures: red is the person, green the picture; or smooth random pictures."""

    fingerprint = "album"

    def __init__(self, counts, size=32, smooth=False):
        self.identity = torch.cat([torch.full((count,), i) for i, count in enumerate(counts)])
        self.names = [f"person {i}" for i in range(len(counts))]
        self.size, self.smooth, self.opened = size, smooth, []

    def __getitem__(self, i):
        self.opened.append(i)
        image = torch.zeros(3, self.size, self.size)
        image[0], image[1] = self.identity[i] / 20, i / 40
        if self.smooth:
            image = some_images(1, self.size, seed=i)[0]
        return common.Face(image, some_landmarks(1, self.size, seed=i)[0], int(self.identity[i]))

    def damaged(self, i):
        return False

    def others(self, i):
        return [k for k, who in enumerate(self.identity) if who == self.identity[i] and k != i]


def numbers(images):
    """Person and picture of each image (N,3,H,W) of an Album."""
    return [(round(red * 20), round(green * 40)) for red, green, _ in images.mean((-2, -1)).tolist()]


def pictures(images):
    return {which for _, which in numbers(images)}


ALBUM = replace(TINY, size=32, steps=20, jitter=0.0, batch=4)  # stages of 6, 3, 3 and 8 steps


def test_references_are_other_pictures_of_the_same_person_from_none_to_all_that_are_allowed():
    faces, indices = Album([4, 3, 1, 5, 2]), list(range(15))
    batches, counts = dmdnet.Batches(faces, indices, ALBUM), set()
    for step in range(6, 20):
        batch = batches[step]
        people, found = numbers(batch["target"]), numbers(batch["references"])
        for (who, which), owner in zip(found, batch["owner"].tolist(), strict=True):
            assert who == people[owner][0] == faces.identity[which] and which != people[owner][1]
        for face, (_, picture) in enumerate(people):
            mine = [which for (_, which), o in zip(found, batch["owner"], strict=True) if o == face]
            assert len(set(mine)) == len(mine) <= min(3, len(faces.others(picture)))
            counts.add(len(mine))
    assert counts == {0, 1, 2, 3}


def test_no_face_reads_itself_while_faces_are_written_and_no_picture_is_opened_for_nothing():
    faces = Album([4, 3, 1, 5])
    batches, written, restored = dmdnet.Batches(faces, list(range(13)), ALBUM), set(), set()
    for step in range(9):
        faces.opened.clear()
        batch = batches[step]
        used = pictures(batch["target"]) | pictures(batch["sharp"]) | pictures(batch["references"])
        assert set(faces.opened) == used
        written |= pictures(batch["sharp"])
        restored |= pictures(batch["target"])
    assert written and restored and not written & restored
    assert not set(batches.generic) & restored
    later = set().union(*(pictures(batches[step]["target"]) for step in range(9, 20)))
    assert later & written and later & restored  # afterwards all are restored


def test_the_first_stage_has_no_references_and_renews_every_item_in_turn():
    faces, renewed = Album([4, 3, 1, 5]), []
    batches = dmdnet.Batches(faces, list(range(12)), replace(ALBUM, items=5))
    for step in range(6):
        batch = batches[step]
        assert len(batch["references"]) == len(batch["owner"]) == 0
        places = batch["places"].tolist()
        expected, marks = common.stack_faces(faces, [batches.generic[y] for y in places])
        assert torch.equal(batch["sharp"], expected)
        assert torch.equal(batch["sharp_boxes"], common.component_boxes(marks, 32))
        renewed += places
    assert renewed == [y % 5 for y in range(12)]
    few = dmdnet.Batches(faces, list(range(12)), replace(ALBUM, items=3, renewed=8))
    assert few[0]["places"].tolist() == [0, 1, 2]
    assert "places" not in batches[7] and not {"sharp", "places"} & set(batches[10])


def test_boxes_of_a_batch_follow_its_faces_through_augmentation():
    faces, cfg = Album([4, 3, 5]), replace(ALBUM, shift=0.0)
    for step in (0, 10):
        batch = dmdnet.Batches(faces, range(12), cfg)[step]
        for (_, which), box in zip(numbers(batch["target"]), batch["boxes"], strict=True):
            plain = common.component_boxes(faces[which].landmarks[None], 32)[0]
            mirrored = plain[[1, 0, 2, 3]][:, [2, 1, 0, 3]]
            mirrored[:, ::2] = 32 - mirrored[:, ::2]
            assert min((box - plain).abs().max(), (box - mirrored).abs().max()) < 1.01


def test_generic_pictures_are_of_different_people_first_and_repeat_only_when_all_are_used():
    faces, order = Album([4, 3, 1, 5]), [5, 3, 12, 7, 0, 4, 9, 1]
    chosen = dmdnet.choose_generic(faces, order, 11)
    assert chosen == [5, 3, 12, 7, 4, 0, 9, 1, 5, 3, 12]
    assert dmdnet.choose_generic(faces, order, 3) == chosen[:3]


# Restoration


def test_check_shows_the_reference_that_each_component_reads_most():
    """By the weights of each face alone; beside it what the generic memory makes of it."""
    net, degraded, landmarks = network(), some_images(2), some_landmarks(2)
    sharp, points = some_images(3, seed=2), some_landmarks(3, seed=8)
    exactly = {"precision": "float32"}
    specific = dmdnet.specific_dictionary(net, sharp, points, **exactly)
    shown = dmdnet.readings_of(net, degraded, landmarks, specific, common.to_uint8(sharp), **exactly)
    generic = dmdnet.restore(net, degraded, landmarks, **exactly)
    torch.testing.assert_close(shown.pop("generic memory"), generic, atol=1e-5, rtol=1e-5)
    assert list(shown) == ["for the left eye", "for the right eye", "for the nose", "for the mouth"]
    for face in (0, 1):
        one = slice(face, face + 1)
        dmdnet.restore(net, degraded[one], landmarks[one], specific, **exactly)
        readings = net.readings[f"scale{min(net.cfg.scales)}"]
        for read, pictures in zip(readings.values(), shown.values(), strict=True):
            expected = sharp[read["specific"][0].argmax()].clamp(-1, 1)
            torch.testing.assert_close(pictures[face], expected, atol=0.01, rtol=0)


def test_restore_gives_every_face_its_own_references_whatever_the_batch():
    net, degraded, landmarks = network().train(), some_images(5), some_landmarks(5)
    sharp, points, owner = some_images(6, seed=2), some_landmarks(6, seed=8), torch.tensor([4, 2, 0, 2, 4, 2])
    exactly = {"precision": "float32"}
    specific = dmdnet.specific_dictionary(net, sharp, points, **exactly)
    restored = dmdnet.restore(net, degraded, landmarks, specific, owner, batch=2, **exactly)
    assert net.training and restored.shape == degraded.shape and restored.abs().max() <= 1
    for face in range(5):
        one, mine = slice(face, face + 1), owner == face
        own = {name: tuple(x[mine] for x in parts) for name, parts in specific.items()}
        alone = dmdnet.restore(net, degraded[one], landmarks[one], own if mine.any() else None, **exactly)
        torch.testing.assert_close(restored[one], alone, rtol=1e-3, atol=1e-4)
    without = dmdnet.restore(net, degraded, landmarks, **exactly)
    changed = (without - restored).abs().flatten(1).amax(1) > 1e-3
    assert changed.tolist() == [True, False, True, False, True]


def test_held_out_faces_have_references_of_their_own():
    net, faces, indices = network(), Album([4, 3, 1, 5], 64), [0, 7, 5, 9]
    (batch,) = dmdnet.restored_batches(net, faces, indices, TINY, 4, precision="float32")
    owner, found = batch["owner"], numbers(batch["references"])
    assert numbers(batch["target"]) == [(int(faces.identity[i]), i) for i in indices]
    assert torch.bincount(owner, minlength=4).tolist() == [3, 0, 2, 3]
    for (who, which), face in zip(found, owner.tolist(), strict=True):
        assert which in faces.others(indices[face]) and who == faces.identity[which]
    marks = torch.stack([faces[i].landmarks for i in (*indices, *(which for _, which in found))])
    specific = dmdnet.specific_dictionary(net, batch["references"], marks[4:], precision="float32")
    expected = dmdnet.restore(net, batch["degraded"], marks[:4], specific, owner, precision="float32")
    assert torch.equal(batch["restored"], expected)
    (again,) = dmdnet.restored_batches(net, faces, indices, TINY, 4, precision="float32")
    assert all(torch.equal(again[name], batch[name]) for name in again)


def person(net, folder, state, **options):
    args = SimpleNamespace(state=state, device=torch.device("cpu"), precision="float32", landmarks=None,
                           aligned=True, reference=None, dictionary=None, save_dictionary=None)
    for name, value in options.items():
        setattr(args, name, str(folder / value))
    return dmdnet.person_of(net, args)


def test_a_stored_dictionary_comes_back_for_the_network_that_made_it_and_no_other(tmp_path):
    """The network is known by its run and step: folding the weights on another device changes nothing."""
    for k, image in enumerate(some_images(3)):
        common.write_image(tmp_path / "album" / f"{k}.png", image)
    net, run = dmdnet.for_restoration(network(), "cpu", "float32"), {"run_id": "one", "step": 7}
    assert person(net, tmp_path, run) == (None, None)
    made, faces = person(net, tmp_path, run, reference="album", save_dictionary="person.pt")
    assert len(made["scale1_nose"][0]) == 3
    torch.testing.assert_close(faces / 127.5 - 1, some_images(3).clamp(-1, 1), atol=0.01, rtol=0)
    for weight in net.extract_specific.parameters():
        weight *= 1 + 1e-7
    again, stored = person(net, tmp_path, dict(run), dictionary="person.pt")
    assert same(again, made) and torch.equal(stored, faces)
    torch.save({"script": "dmdnet", "net": {}}, tmp_path / "checkpoint.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for file, state in (("person.pt", run | {"run_id": "two"}), ("person.pt", run | {"step": 9}),
                        ("person.pt", None), ("checkpoint.pt", run), ("list.pt", run)):
        with pytest.raises(common.InputError, match="not a dictionary that this network made"):
            person(net, tmp_path, state, dictionary=file)
    with pytest.raises(common.InputError, match="no specific dictionary"):
        person(network(variant="only-generic", references=0), tmp_path, run, reference="album")


# Training: the stages, Eq. (4), (18)


def arguments(out, *options):
    parser = common.arguments(dmdnet.__doc__, dmdnet.PRESETS, dmdnet.VARIANTS)
    common.add_fid(parser)
    return common.parse(parser, ["--train", "--out", str(out), "--device", "cpu", "--precision", "float32",
                                 *options], "dmdnet")


def cheaply(patch):
    """Six people, a random network for the recogniser, and nothing measured or drawn."""
    faces = Album([4, 3, 2, 5, 3, 3], 64, smooth=True)
    patch.setattr(common, "load_faces", lambda *_: faces)
    patch.setattr(common, "split_identities", lambda _: (list(range(14)), [14, 15, 16], [17, 18, 19]))
    patch.setattr(common, "load_encoder", lambda *_: encoder())
    patch.setattr(common, "_write_log", lambda *_: None)
    patch.setattr(common, "report", lambda *_: None)
    patch.setattr(dmdnet, "evaluate", lambda *_: {})
    patch.setattr(dmdnet, "samples", lambda *_: {})
    return faces


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
def watched(tmp_path_factory):
    """Ten steps of train(), 3, 2, 2 and 3 a stage, with copies of all networks before each.

    The weights of the losses are such that no term is small."""
    out, live, calls, patch = tmp_path_factory.mktemp("watched"), {}, [], pytest.MonkeyPatch()
    cfg = replace(TINY, steps=10, stages=(0.3, 0.2, 0.2), batch=3, residual=False, clip=None, cooldown=0.3,
                  learning_rate=2e-4, dictionary_rate=3e-4, weight_pixel=2000.0, weight_perceptual=300.0,
                  weight_style=5e3, weight_adversarial=(2000.0, 3000.0, 4000.0))

    class Net(dmdnet.DMDNet):
        def forward(self, *batch):
            self.readings = {}
            copies = {name: copy.deepcopy(live[name]) for name in ("memory", "judges")}
            calls.append(SimpleNamespace(net=copy.deepcopy(self), batch=batch[:5], given=batch[5], **copies))
            return super().forward(*batch)

    def keeping(name, kind):
        def make(*args):
            live[name] = kind(*args)
            return live[name]
        return make

    WatchedAdam.made = []
    faces = cheaply(patch)
    patch.setattr(dmdnet, "validate", lambda *_: {"validation": 5.0, "validation_psnr": 20.0})
    patch.setattr(torch.optim, "Adam", WatchedAdam)
    patch.setattr(dmdnet, "DMDNet", keeping("net", Net))
    patch.setattr(dmdnet, "GenericMemory", keeping("memory", dmdnet.GenericMemory))
    patch.setattr(dmdnet, "Discriminators", keeping("judges", dmdnet.Discriminators))
    dmdnet.train(cfg, arguments(out))
    patch.undo()
    data = dmdnet.Batches(faces, list(range(14)), cfg)
    for call in calls:
        call.net.__class__ = dmdnet.DMDNet
    adam, adam_d = WatchedAdam.made
    return SimpleNamespace(cfg=cfg, calls=calls, faces=faces, data=data, adam=adam, adam_d=adam_d, **live)


def extracted(memory, images, boxes):
    with torch.no_grad():
        return memory.extract(images, boxes)


def detached(dictionary):
    return {name: tuple(x.detach().clone() for x in parts) for name, parts in dictionary.items()}


def test_training_sees_its_batches_and_stages_in_order(watched):
    assert [dmdnet.stage_of(step, watched.cfg) for step in range(1, 11)] == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    for step, call in enumerate(watched.calls):
        batch = watched.data[step]
        expected = (batch[name] for name in ("degraded", "boxes", "references", "reference_boxes", "owner"))
        for given, part in zip(call.batch, expected, strict=True):
            assert torch.equal(given, part)
        assert (call.given is None) == (step >= 5)


def test_both_optimisers_run_at_the_rate_of_the_config_and_cool_down_together(watched):
    rates = [watched.cfg.rate(step) for step in range(1, 11)]
    assert rates[:7] == [2e-4] * 7 and rates[7:] == pytest.approx([2e-4, 2e-4 * 2 / 3, 2e-4 / 3])
    for adam in (watched.adam, watched.adam_d):
        assert [seen[0].rate for seen in adam.seen] == pytest.approx(rates)
        first, second = (adam.seen[step][0].values for step in (0, 1))
        moved = max((b - a).abs().max() for a, b in zip(first, second, strict=True))
        assert moved.item() == pytest.approx(2e-4, rel=0.05)  # a first step of Adam is ± the rate


def test_the_dictionary_is_filled_by_f_gen_at_the_beginning_of_the_first_two_stages(watched):
    images, landmarks = common.stack_faces(watched.faces, watched.data.generic)
    boxes = common.component_boxes(landmarks, 64)
    for step in (0, 3):
        call = watched.calls[step]
        close(call.net.generic_dictionary(), extracted(call.memory, images, boxes), rtol=1e-4, atol=1e-5)
    stale, filled = (extracted(watched.calls[2].memory, images, boxes),
                     watched.calls[3].net.generic_dictionary())
    assert not any(torch.allclose(stale[name][1], filled[name][1], atol=1e-4) for name in stale)


def test_the_first_stage_renews_items_by_equation_2_and_the_second_writes_faces_by_equation_3(watched):
    for step in (0, 1, 3, 4):
        call, batch = watched.calls[step], watched.data[step]
        fresh = extracted(call.memory, batch["sharp"], batch["sharp_boxes"])
        expected = detached(call.net.generic_dictionary())
        if step < 2:
            for name, parts in expected.items():
                for part, new in zip(parts, fresh[name], strict=True):
                    part[[2 * step, 2 * step + 1]] = new
        else:
            gammas = {name: torch.sigmoid(logit.detach()) for name, logit in call.memory.logits.items()}
            expected = forward_by_loop(expected, fresh, gammas)
        close(detached(call.given), expected, rtol=1e-3, atol=1e-4)
        close(detached(watched.calls[step + 1].net.generic_dictionary()), expected, rtol=1e-3, atol=1e-4)


def test_f_spe_begins_as_f_gen_at_the_end_of_the_first_stage(watched):
    def equal(step):
        ours, theirs = (x.state_dict() for x in (watched.calls[step].net.extract_specific,
                                                 watched.calls[step].memory.extract))
        return all(torch.equal(ours[name], theirs[name]) for name in theirs)

    assert [equal(step) for step in (0, 2, 3, 4, 6)] == [False, False, True, False, False]


def test_items_are_learned_in_the_third_stage_only_by_adam_with_a_rate_of_their_own(watched):
    """Eq. (4), with Adam for plain descent: β1 = ½, β2 = 0.999, η = dictionary_rate."""
    groups = [seen[1] for seen in watched.adam.seen]
    assert all((gradient is None) == (step not in (5, 6))
               for step, group in enumerate(groups) for gradient in group.gradients)
    for k, start in enumerate(groups[5].values):
        value = start.double()
        first = second = torch.zeros_like(value)
        for t in (1, 2):
            gradient = groups[4 + t].gradients[k].double()
            first, second = (first + gradient) / 2, 0.999 * second + 0.001 * gradient**2
            value = value - 3e-4 * (first / (1 - 0.5**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
            torch.testing.assert_close(groups[5 + t].values[k].double(), value, rtol=1e-5, atol=1e-6)
        assert (value - start).abs().max() > 1e-4
        assert torch.equal(groups[7].values[k], groups[9].values[k])  # as it stays


def test_items_begin_their_stage_at_their_whole_rate_and_losses_are_compared_within_one(watched):
    """What the rate was multiplied by before their stage is none of theirs."""
    cfg, said = watched.cfg, []
    net, optimizer = network(), torch.optim.Adam([{"params": [torch.zeros(1)]}, {"params": []}])
    optimizer.param_groups[1]["params"] = list(net.generic_keys.values())
    net.cfg = cfg
    run = SimpleNamespace(factor=0.25, say=said.append, forget_best=lambda: said.append("forgotten"))
    for step, lines in ((6, ["step 6: backward update", "forgotten"]), (7, [])):
        said.clear()
        assert dmdnet.begin_stage(step, run, net, None, None, optimizer) == 2 and said == lines
        common.set_rate(cfg.rate(step) * run.factor, optimizer)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.25 * cfg.learning_rate, cfg.dictionary_rate])


def gradients_of(watched, step):
    """Every learned tensor's gradient at a step, by its name."""
    names = {id(p): f"{owner}.{name}" for owner in ("net", "memory")
             for name, p in getattr(watched, owner).named_parameters()}
    return {names[id(p)]: gradient
            for group, seen in zip(watched.adam.param_groups, watched.adam.seen[step], strict=True)
            for p, gradient in zip(group["params"], seen.gradients, strict=True)}


def test_each_stage_teaches_what_it_should_and_nothing_else(watched):
    reached = [set() for _ in range(4)]
    for step in range(10):
        found = gradients_of(watched, step)
        reached[dmdnet.stage_of(step + 1, watched.cfg)] |= {
            name for name, gradient in found.items() if gradient is not None and gradient.any()}
    f_gen = {name for name in found if name.startswith("memory.extract.")}
    gammas = {name for name in found if name.startswith("memory.logits.")}
    items = {name for name in found if name.startswith("net.generic_")}
    specific = {name for name in found if ".extract_specific." in name or ".identity." in name}
    others = set(found) - f_gen - gammas - items
    assert len(gammas) == 12 and len(items) == 24 and specific < others
    expected = [(others - specific) | f_gen, others | f_gen | gammas, others | items, others]
    assert all(found <= allowed for found, allowed in zip(reached, expected))
    missing = set().union(*(allowed - found for found, allowed in zip(reached, expected)))
    # Keys have no gradient where a face reads one reference, or one alone counts.
    assert all(".extract_specific.keys." in name for name in missing) and len(missing) < 20


@pytest.mark.parametrize("step", [0, 3, 5, 7])  # the first of each stage
def test_a_step_of_each_stage_follows_the_gradient_of_equation_18(watched, step):
    """Against losses written out from the paper, on copies."""
    cfg, call, psi, batch = watched.cfg, watched.calls[step], encoder(), watched.data[step]
    target, generic = batch["target"], None
    if step < 5:
        generic = call.memory(call.net.generic_dictionary(), batch["sharp"], batch["sharp_boxes"],
                              batch.get("places"))
    restored = call.net(*call.batch, generic)
    maps = list(zip(psi.features(restored), psi.features(target), strict=True))
    grams = [[torch.einsum("bchw,bdhw->bcd", x, x) / x[0].numel() for x in pair]
             for pair in maps]
    terms = [2000 * (restored - target).square().sum() / (3 * 3 * 64 * 64),
             300 * sum((a - b).square().mean() for a, b in maps),
             5e3 * sum((a - b).square().sum((1, 2)).mean() for a, b in grams),
             *(-weight * score.mean() for weight, score in zip(cfg.weight_adversarial, call.judges(restored),
                                                               strict=True))]
    found = {name: g for name, g in gradients_of(watched, step).items() if g is not None and g.any()}
    own = {f"{owner}.{name}": p for owner in ("net", "memory")
           for name, p in getattr(call, owner).named_parameters()}
    own = [own[name] for name in found]
    gradients = [torch.autograd.grad(term, own, retain_graph=True) for term in terms]
    total = [sum(many) for many in zip(*gradients, strict=True)]
    assert gap(found.values(), total) < 0.003
    for term in gradients:  # a missing term would be noticed
        assert gap([a - b for a, b in zip(total, term, strict=True)], total) > 0.01
    call.judges.requires_grad_(True)
    real, fake = call.judges(target), call.judges(restored.detach())
    hinge = -sum((r - 1).clamp(max=0).mean() + (-1 - f).clamp(max=0).mean()
                 for r, f in zip(real, fake, strict=True))
    expected = torch.autograd.grad(hinge, list(call.judges.parameters()))
    assert gap(watched.adam_d.seen[step][0].gradients, expected) < 0.003


def test_mistaken_references_are_those_of_somebody_else_for_the_same_degraded_faces():
    faces, net = common.RenderedFaces(64, identities=4, per_identity=3), dmdnet.DMDNet(TINY)
    some = [0, 1, 5, 8]
    right, = dmdnet.restored_batches(net, faces, some, TINY, 4)
    wrong, = dmdnet.restored_batches(net, faces, some, TINY, 4, mistaken=True)
    assert torch.equal(right["degraded"], wrong["degraded"]) and len(wrong["references"]) == 8
    for batch, of_the_person in ((right, True), (wrong, False)):
        for face, reference in zip(batch["owner"], batch["references"], strict=True):
            shown, = (k for k in range(12) if torch.equal(faces[k].image, reference))
            assert (faces.identity[shown] == faces.identity[some[face]]) == of_the_person


# The released network, whose numbers and names test_official.py checks


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


def test_a_released_component_is_at_least_one_feature():
    small = torch.tensor([[[9.0, 9, 14, 14]]])  # as of a face seen from far
    assert dmdnet.cut_components(random(1, 3, 8, 8), small, 8, (4,))[0].shape == (1, 3, 4, 4)


RELEASED = replace(dmdnet.RELEASED, width=8, size=64, items=5, references=3, sides=(12, 12, 8, 16),
                   spectral=False)


@torch.no_grad()
def test_the_released_network_takes_references_in_blocks_and_leaves_the_nose():
    torch.manual_seed(4)
    net, (images, boxes) = randomised(dmdnet.ReleasedDMDNet(RELEASED)).eval(), some_faces(2)
    references, reference_boxes, _ = references_of((2, 2))
    boxes, reference_boxes = (torch.cat([(x[..., :2] - 8).clamp(min=0), (x[..., 2:] + 8).clamp(max=64)], 2)
                              for x in (boxes, reference_boxes))
    blocks = references.view(2, 2, 3, 64, 64), reference_boxes.view(2, 2, 4, 4)
    together = net(images, boxes, *blocks)
    assert together.abs().max() <= 1 and set(net.readings["scale1"]) == {"left_eye", "right_eye", "mouth"}
    for k in range(2):
        alone = net(images[k:k + 1], boxes[k:k + 1], *(x[k:k + 1] for x in blocks))
        torch.testing.assert_close(together[k:k + 1], alone, rtol=1e-2, atol=1e-3)
    assert (net(images, boxes) - together).abs().max() > 1e-2
    moved = boxes.clone()
    moved[:, 2] += 5
    assert torch.equal(net(images, moved, *blocks), together)
