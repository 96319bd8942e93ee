"""DFDNet: every equation against an independent form, what each loss reaches, learning by a gain."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import common
import dfdnet

NAMES = ("left_eye", "right_eye", "nose", "mouth")
TINY = replace(dfdnet.TINY, size=64, entries=6, width=8, discriminator_width=4, batch=2, validated=2)
WIDTHS = (6, 8, 10, 12)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    """Uniform in [-1,1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def some_landmarks(count, size=64, seed=3):
    """Average faces, each moved and stretched a little: (count,68,2)."""
    generator = torch.Generator().manual_seed(seed)
    stretch = 1 + 0.1 * torch.randn(count, 1, 2, generator=generator)
    shift = 0.04 * size * torch.randn(count, 1, 2, generator=generator)
    return (common.mean_landmarks(size) - size / 2) * stretch + size / 2 + shift


def some_boxes(count, size=64):
    return common.component_boxes(some_landmarks(count, size), size)


class SomeFaces:
    """Random pictures of 64×64 with landmarks, as a data set."""

    fingerprint = "some"

    def __init__(self, count=5):
        self.count = count

    def __getitem__(self, index):
        image = F.interpolate(uniform(1, 3, 12, 12, seed=index), 64, mode="bicubic")[0].clamp(-1, 1)
        return common.Face(image, some_landmarks(1, seed=index)[0], index)

    def __len__(self):
        return self.count


def some_encoder():
    torch.manual_seed(1)
    net = common.Recogniser(WIDTHS).folded()
    for layer in net.stages.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # deep features as large as shallow ones
    return net


def randomised(module, spread=0.1):
    """Every parameter random: some start at zero, which would hide what depends on them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return module


def random_dictionary(cfg, seed=0):
    dictionary = {}
    for s, width, sizes in zip((1, 2, 3, 4), WIDTHS, cfg.component_sizes):
        entries = [random(cfg.entries, width, n, n, seed=seed + 9 * s + n) for n in sizes]
        dictionary[f"scale{s}"] = dict(zip(NAMES, entries))
    return dictionary


def network(cfg=TINY, **changes):
    cfg = replace(cfg, **changes)
    torch.manual_seed(2)
    net = dfdnet.DFDNet(cfg, some_encoder())
    nn.init.normal_(net.paint[-1].weight, std=0.1)  # at zero it hides all before it
    net.set_dictionary(random_dictionary(cfg))
    return net.eval()


def ramp(count, height, width):
    """Two channels, linear in the pixel's place: 3x + y + 10 n, and 2 − y, for sample n."""
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    return torch.stack([torch.stack([3 * x + y + 10 * n, 2 - y]) for n in range(count)])


@pytest.fixture
def float32(monkeypatch):
    """Exact arithmetic, also where the processor gains from bfloat16."""
    kind = common.autocast
    monkeypatch.setattr(common, "autocast", lambda device, _="auto": kind(device, "float32"))


# Config


def test_the_rate_is_constant_and_falls_to_zero_in_the_last_steps():
    cfg = replace(TINY, steps=10, cooldown=0.5, learning_rate=1e-3)
    rates = [cfg.rate(step) for step in range(1, 11)]
    assert rates == pytest.approx([1e-3] * 6 + [8e-4, 6e-4, 4e-4, 2e-4])
    assert dfdnet.PAPER.rate(1) == dfdnet.PAPER.rate(dfdnet.PAPER.steps) == 2e-4
    assert dfdnet.PAPER_FIGURES.keys() == dfdnet.VARIANTS.keys()


@pytest.mark.parametrize("preset, least", [(dfdnet.PAPER, 2), (TINY, 4)])
@pytest.mark.parametrize("size", [256, 128, 64])
def test_component_sizes_are_40_40_25_55_at_256_and_halve_from_scale_to_scale(size, preset, least):
    for scale, sizes in enumerate(replace(preset, size=size).component_sizes):
        for side, paper in zip(sizes, (40, 40, 25, 55), strict=True):
            exact = paper * size / 256 / 2**scale
            assert isinstance(side, int)
            assert side == least if exact < least else abs(side - exact) < 1
    assert dfdnet.PAPER.component_sizes[3] == [5, 5, 3, 6]


def test_the_papers_preset_has_finite_gradients_at_128_pixels():
    """DFDNet128 of Table 1. A nose of one position would have no deviation for Eq. (3)."""
    net = network(dfdnet.PAPER, size=128, entries=3, width=8, paint_blocks=1).train()
    assert min(net.cfg.component_sizes[3]) == 2
    restored = net(uniform(1, 3, 128, 128), some_boxes(1, 128))
    dfdnet.pixel_loss(restored, uniform(1, 3, 128, 128, seed=1)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


# Eq. (1)


def clusters_apart(counts, spread=1.0):
    """Points around well separated corners, `counts[k]` of them around corner k → points, corner of each."""
    label = torch.cat([torch.full((count,), k) for k, count in enumerate(counts)])
    corners = random(len(counts), 12, seed=0) * 100 + 20
    return corners[label] + spread * random(len(label), 12, seed=1), label


def test_kmeans_seeds_are_points_far_from_each_other():
    points, label = clusters_apart([300, 1, 1, 1, 1, 1], spread=0.1)
    for seed in range(4):
        seeds = dfdnet.kmeans(points, 6, common.seeded(seed), rounds=0)[0]
        found = (seeds[:, None] - points).abs().sum(2).argmin(1)
        assert torch.equal(seeds, points[found])
        # Uniform draws would all fall into the first.
        assert sorted(label[found].tolist()) == [0, 1, 2, 3, 4, 5]


def lloyd(points, centres, rounds):
    points, centres = points.double().numpy(), centres.double().numpy().copy()
    for _ in range(rounds):
        cluster = ((points[:, None] - centres) ** 2).sum(2).argmin(1)
        for k in range(len(centres)):
            if (cluster == k).any():
                centres[k] = points[cluster == k].mean(0)
    return centres


@pytest.mark.parametrize("rounds", [1, 4, 60])
def test_kmeans_is_plain_lloyd_from_its_seeds_for_so_many_rounds(rounds):
    points = random(300, 6, seed=4)
    seeds = dfdnet.kmeans(points, 12, common.seeded(7), rounds=0)[0]
    centres, cluster, distance = dfdnet.kmeans(points, 12, common.seeded(7), rounds)
    np.testing.assert_allclose(centres, lloyd(points, seeds, rounds), rtol=1e-3, atol=1e-4)
    exact = (points[:, None] - centres).square().sum(2).min(1)
    torch.testing.assert_close(distance, exact.values, rtol=1e-3, atol=1e-4)
    assert torch.equal(cluster, exact.indices)


def test_kmeans_reseeds_empty_clusters_at_the_worst_served_points(monkeypatch):
    far = torch.eye(4)[:3] * torch.tensor([50.0, 70, 90])[:, None]
    points = torch.cat([torch.zeros(40, 4), far])
    start = next(s for s in range(9) if torch.randint(43, (), generator=common.seeded(s)) < 40)
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: torch.tensor([0]))  # all seeds alike
    centres, _, distance = dfdnet.kmeans(points, 4, common.seeded(start), 20)
    assert sorted(centres.sum(1).tolist()) == [0, 50, 70, 90]
    assert distance.abs().max() == 0


def test_kmeans_of_duplicates_gives_real_points_and_no_nan():
    values = torch.tensor([[5.0, 1], [7, 2], [9, 3]])
    centres, cluster, distance = dfdnet.kmeans(values.repeat(10, 1), 5, common.seeded(0), 20)
    assert distance.abs().max() < 1e-3 and torch.equal(centres[cluster], values.repeat(10, 1))
    assert all((values == centre).all(1).any() for centre in centres)


def test_kmeans_does_not_depend_on_its_chunks(monkeypatch):
    points, _ = clusters_apart([20, 20, 5, 9])
    whole = dfdnet.kmeans(points, 7, common.seeded(1), 20)
    split, calls = torch.Tensor.split, []

    def small(tensor, size, dim=0):
        calls.append(size)
        return split(tensor, min(size, 5), dim)

    monkeypatch.setattr(torch.Tensor, "split", small)
    chunked = dfdnet.kmeans(points, 7, common.seeded(1), 20)
    assert calls and calls[0] >= 54
    torch.testing.assert_close(chunked[0], whole[0])
    assert torch.equal(chunked[1], whole[1])


def test_kmeans_refuses_more_clusters_than_points():
    assert len(dfdnet.kmeans(random(4, 2), 4, common.seeded(0), 20)[0]) == 4
    with pytest.raises(common.InputError, match="3 faces.*4 clusters"):
        dfdnet.kmeans(random(3, 2), 4, common.seeded(0), 20)


def build(cfg, faces, indices):
    return dfdnet.build_dictionary(cfg, some_encoder(), faces, indices, quiet=True)


def test_build_dictionary_holds_the_cropped_features_of_every_scale_and_component(float32):
    """With as many clusters as faces, the centres are the components themselves."""
    faces, cfg = SomeFaces(), replace(TINY, entries=4)
    indices = [0, 1, 3, 4]
    dictionary = build(cfg, faces, indices)[0]
    images, landmarks = common.stack_faces(faces, indices)
    boxes = common.component_boxes(landmarks, 64)
    maps = some_encoder().features(images)
    assert set(dictionary) == {"scale1", "scale2", "scale3", "scale4"}
    for scale, sizes in enumerate(cfg.component_sizes):
        parts = dictionary[f"scale{scale + 1}"]
        assert tuple(parts) == NAMES
        crops = dfdnet.crop_components(maps[scale], boxes, 2 ** (scale + 1), sizes)
        for entries, crop, side in zip(parts.values(), crops, sizes):
            assert entries.shape == (4, WIDTHS[scale], side, side)
            gaps = (entries.float()[:, None] - crop).square().flatten(2).mean(2).sqrt()
            apart = (crop[:, None] - crop).square().flatten(2).mean(2).sqrt() + torch.eye(4) * 9
            assert sorted(gaps.argmin(1).tolist()) == [0, 1, 2, 3]
            assert gaps.min(1).values.max() < 0.02 * apart.min()  # kept as float16


def test_build_dictionary_runs_k_means_as_config_says_with_a_seed_for_each(monkeypatch):
    kmeans, calls = dfdnet.kmeans, []

    def spied(points, clusters, generator, rounds):
        calls.append((points.shape, clusters, generator.initial_seed(), rounds))
        return kmeans(points, clusters, generator, rounds)

    monkeypatch.setattr(dfdnet, "kmeans", spied)
    build(replace(TINY, entries=3, kmeans_rounds=7), SomeFaces(), range(5))
    shapes, clusters, seeds, rounds = zip(*calls)
    sides = TINY.component_sizes
    assert list(shapes) == [(5, WIDTHS[s] * n**2) for s in range(4) for n in sides[s]]
    assert set(clusters) == {3} and set(rounds) == {7}
    assert len(set(seeds)) == 16


def test_the_picture_of_the_dictionary_shows_the_largest_clusters_nearest_faces_first(monkeypatch):
    drawn = {}
    monkeypatch.setattr(common, "comparison_grid", drawn.update)
    faces, indices = SomeFaces(8), [1, 2, 4, 5, 7]
    members = {name: (torch.tensor([0, 0, 1, 0, 1]), torch.tensor([3.0, 1, 5, 2, 4])) for name in NAMES}
    dfdnet.draw_dictionary(TINY, faces, indices, members)
    assert list(drawn) == ["left eye", "right eye", "nose", "mouth"]
    images, landmarks = common.stack_faces(faces, [2, 5, 1])  # cluster 0: distances 1, 2, 3
    boxes = common.component_boxes(landmarks, 64)
    for number, rows in enumerate(drawn.values()):
        crops = dfdnet.crop_components(images, boxes, 1, [64] * 4)[number]
        assert rows.shape == (2, 3, 64, 5 * 64)
        torch.testing.assert_close(rows[0][..., : 3 * 64], torch.cat(list(crops), 2))


# RoIAlign and its reverse


def test_crop_of_a_linear_ramp_is_the_ramp_at_the_bin_centres():
    stride, sizes = 4, (5, 3, 4, 7)
    first = [[10.0, 20, 31, 44], [50, 9, 71, 30], [33.5, 40, 60, 67], [20, 60, 90, 75]]
    second = [[14.0, 25, 35, 40], [52, 14, 70, 36], [40.5, 44, 66, 61], [24, 66, 84, 85]]
    boxes = torch.tensor([first, second])
    parts = dfdnet.crop_components(ramp(2, 24, 26), boxes, stride, sizes)
    for part, size, box in zip(parts, sizes, boxes.unbind(1), strict=True):
        assert part.shape == (2, 2, size, size)
        for n, i, j in np.ndindex(2, size, size):
            x1, y1, x2, y2 = (box[n] / stride).tolist()
            x = x1 + (j + 0.5) * (x2 - x1) / size - 0.5  # edges → index: pixel i spans i … i + 1
            y = y1 + (i + 0.5) * (y2 - y1) / size - 0.5
            assert part[n, 0, i, j].item() == pytest.approx(3 * x + y + 10 * n, abs=1e-3)
            assert part[n, 1, i, j].item() == pytest.approx(2 - y, abs=1e-3)


def sample(part, u, v):
    """A bilinear sample of part (C,n,n) at u, v in [0,1] of its sides; its border goes on."""
    size = part.shape[-1]
    x = min(max(u * size - 0.5, 0), size - 1)
    y = min(max(v * size - 0.5, 0), size - 1)
    j, i = min(int(x), size - 2), min(int(y), size - 2)
    a, b = y - i, x - j
    upper = (1 - b) * part[:, i, j] + b * part[:, i, j + 1]
    lower = (1 - b) * part[:, i + 1, j] + b * part[:, i + 1, j + 1]
    return (1 - a) * upper + a * lower


def paste_by_loop(parts, boxes, stride, height, width):
    """Pixel by pixel the mean of the parts whose box holds its centre; and where there is one."""
    result = torch.zeros(len(boxes), parts[0].shape[1], height, width)
    inside = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for n, y, x in np.ndindex(len(boxes), height, width):
        found = []
        for part, box in zip(parts, boxes[n], strict=True):
            x1, y1, x2, y2 = (box / stride).tolist()
            if x1 < x + 0.5 < x2 and y1 < y + 0.5 < y2:
                found.append(sample(part[n], (x + 0.5 - x1) / (x2 - x1), (y + 0.5 - y1) / (y2 - y1)))
        if found:
            result[n, :, y, x] = sum(found) / len(found)
            inside[n, y, x] = True
    return result, inside


# Boxes that overlap and begin between the features.
OVERLAPPING = torch.tensor([
    [[1.3, 4.1, 14.7, 17.2], [11.2, 6.3, 25, 21], [9.1, 12.3, 20, 29.9], [0, 20.5, 22.2, 32]],
    [[5.3, 1.1, 20.2, 12.8], [15.2, 8.3, 31, 24], [2.1, 2.3, 30, 10.9], [3, 3.5, 9.2, 32]]])


def test_paste_equals_bilinear_sampling_pixel_by_pixel_with_means_in_overlaps():
    parts = [random(2, 3, size, size, seed=size) for size in (5, 4, 3, 6)]
    pasted = dfdnet.paste_components(parts, OVERLAPPING, 2, (16, 18))
    expected, inside = paste_by_loop(parts, OVERLAPPING, 2, 16, 18)
    torch.testing.assert_close(pasted, expected, rtol=1e-4, atol=1e-5)
    assert not pasted.movedim(1, 3)[~inside].any()


# Eq. (3) and (4)


def equation_3(entry, part):
    """RDic of one entry, channel by channel in float64: arrays (C,h,w)."""
    result = np.zeros_like(entry)
    for c in range(len(part)):
        structure = (entry[c] - entry[c].mean()) / entry[c].std(ddof=1)
        result[c] = part[c].std(ddof=1) * structure + part[c].mean()
    return result


def equation_4(part, entries, cadain):
    """The winner of Eq. (4) as itself, Eq. (3) for all K entries before it: number, entry."""
    part, entries = part.double().numpy(), entries.double().numpy()
    styled = [equation_3(entry, part) if cadain else entry for entry in entries]
    best = int(np.argmax([(part * entry).sum() for entry in styled]))
    return best, torch.from_numpy(styled[best]).float()


def styled_data(samples=16, entries=20):
    """Components and entries whose channels differ in mean and deviation: a slip in either picks others."""
    def draw(count, seed):
        spread = (1.2 * random(count, 7, 1, 1, seed=seed)).exp()
        return random(count, 7, 5, 5, seed=seed + 1) * spread + 8 * random(count, 7, 1, 1, seed=seed + 2)

    return draw(samples, 11), draw(entries, 21)


@pytest.mark.parametrize("cadain, offset", [(True, 0), (True, 1000), (False, 0)])
def test_match_features_picks_what_restyling_every_entry_picks(cadain, offset):
    parts, entries = styled_data()
    parts = parts + offset
    stored = dfdnet.normalise_entries(entries) if cadain else entries
    chosen = dfdnet.match_features(parts, stored, cadain).tolist()
    assert chosen == [equation_4(part, entries, cadain)[0] for part in parts]
    other = [equation_4(part, entries, not cadain)[0] for part in parts]
    assert np.not_equal(chosen, other).mean() > 0.5  # the data tells the forms apart


def test_restyle_is_equation_3():
    parts, entries = styled_data(6, 6)
    styled = dfdnet.restyle(dfdnet.normalise_entries(entries), parts)
    for one, entry, part in zip(styled, entries, parts):
        expected = equation_3(entry.double().numpy(), part.double().numpy())
        np.testing.assert_allclose(one, expected, rtol=1e-2, atol=1e-3)


def test_a_flat_entry_or_component_gives_no_nan():
    flat = torch.full((2, 3, 4, 4), 5.0)
    entries = dfdnet.normalise_entries(torch.cat([flat, random(2, 3, 4, 4)]))
    assert entries.isfinite().all()
    assert dfdnet.restyle(entries[:2], flat).isfinite().all()
    assert dfdnet.match_features(flat, entries).shape == (2,)


@pytest.mark.parametrize("cadain", [True, False])
def test_match_coarsely_picks_what_match_features_picks(cadain):
    """Entries much alike, so that the best by coarse scores is not always the best."""
    parts = random(48, 7, 5, 5, seed=1)
    entries = random(1, 7, 5, 5, seed=2) + 0.1 * random(200, 7, 5, 5, seed=3)
    stored = dfdnet.normalise_entries(entries) if cadain else entries
    low = stored.bfloat16()
    expected = dfdnet.match_features(parts, low.float(), cadain)
    assert torch.equal(dfdnet.match_coarsely(parts, low, cadain), expected)
    with torch.autocast("cpu", torch.bfloat16):  # has no say in the scores
        assert torch.equal(dfdnet.match_coarsely(parts, low, cadain), expected)
        assert torch.equal(dfdnet.match_features(parts, low.float(), cadain), expected)
    coarse = (dfdnet.matching_query(parts, cadain).bfloat16() @ low.flatten(1).T).argmax(1)
    assert not torch.equal(coarse, expected)
    assert (expected == dfdnet.match_features(parts, stored, cadain)).float().mean() > 0.9
    assert dfdnet.match_coarsely(parts, low[:3], cadain).max() <= 2  # fewer than the eight best


# Eq. (5), the DFT block


def test_confidence_score_is_equation_5():
    block = dfdnet.ConfidenceScore(5).eval()
    part, matched = random(2, 2, 5, 6, 6, seed=1)
    score = block.score(matched - part)
    assert score.shape == part.shape and score.std() > 1e-3
    torch.testing.assert_close(block(part, matched), part + matched * score)


@pytest.mark.parametrize("cadain", [True, False])
@pytest.mark.parametrize("confidence", [True, False])
def test_dft_block_pastes_what_the_equations_say_and_touches_nothing_else(cadain, confidence):
    """With confidence the change of Eq. (5); without, the matched entry itself."""
    sizes, stride = (5, 4, 3, 6), 2
    block = dfdnet.DFTBlock(3, sizes, stride, replace(TINY, cadain=cadain, confidence=confidence)).eval()
    dictionary = {name: 3 * random(6, 3, n, n, seed=n) + 1 for name, n in zip(NAMES, sizes)}
    for name, entries in dictionary.items():
        block.set_entries(name, entries)
    features = random(2, 3, 16, 18, seed=8)
    pieces = []
    with torch.no_grad():
        result = block(features, OVERLAPPING)
        parts = dfdnet.crop_components(features, OVERLAPPING, stride, sizes)
        for index, (part, entries) in enumerate(zip(parts, dictionary.values())):
            matched = torch.stack([equation_4(one, entries, cadain)[1] for one in part])
            change = matched * block.confidence[index].score(matched - part) if confidence else matched
            pieces.append(change)
    pasted, inside = paste_by_loop(pieces, OVERLAPPING, stride, 16, 18)
    expected = features + pasted if confidence else torch.where(inside[:, None], pasted, features)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal((result != features).any(1), inside)


# Eq. (2) and (6)


def test_sft_stage_scales_and_shifts_as_equation_6():
    stage = dfdnet.SFTStage(6, 4).eval()
    x, skip = random(2, 2, 6, 8, 8, seed=1)
    with torch.no_grad():
        decoder = F.leaky_relu(stage.reduce(x), 0.2)
        alpha, beta = stage.scale(skip), stage.shift(skip)
        assert decoder.shape == alpha.shape == beta.shape == (2, 4, 8, 8)
        modulated = F.interpolate(alpha * decoder + beta, scale_factor=2, mode="bilinear")
        torch.testing.assert_close(stage(x, skip), F.leaky_relu(stage.widen(modulated), 0.2))


def test_ms_dilate_sees_four_distances_and_adds_to_its_input():
    block = randomised(dfdnet.MSDilate(3), 1.0).eval()
    for branch, dilation in zip(block.branches, (4, 3, 2, 1), strict=True):
        x = random(1, 3, 33, 33).requires_grad_()
        branch(x)[..., 16, 16].sum().backward()
        rows = x.grad[0].abs().sum((0, 1)).nonzero()[:, 0].tolist()
        assert rows == [16 + k * dilation for k in (-2, -1, 0, 1, 2)]
    x = random(1, 3, 9, 9)
    fused = block.fuse(torch.cat([branch(x) for branch in block.branches], 1))
    torch.testing.assert_close(block(x), x + fused)


@pytest.mark.parametrize("scales", [(1, 2, 3, 4), (3, 4), ()])
def test_dictionaries_and_boxes_matter_at_the_dft_scales_alone(scales):
    net, boxes, degraded = network(dft_scales=scales), some_boxes(2), uniform(1, 3, 64, 64, seed=6)
    assert set(net.blocks) == {f"scale{s}" for s in scales}
    with torch.no_grad():
        before, moved = net(degraded, boxes[:1]), net(degraded, boxes[1:])
        assert torch.equal(before, moved) == (not scales)
        for scale in (1, 2, 3, 4):
            dictionary = random_dictionary(net.cfg)
            dictionary[f"scale{scale}"] = random_dictionary(net.cfg, seed=99)[f"scale{scale}"]
            net.set_dictionary(dictionary)
            assert torch.equal(before, net(degraded, boxes[:1])) == (scale not in scales)


def test_encoder_and_dictionaries_stay_out_of_parameters_and_state():
    net = network()
    state = net.state_dict()
    assert {id(p) for p in net.parameters()}.isdisjoint(id(p) for p in net.encoder.parameters())
    assert not any(p.requires_grad for p in net.encoder.parameters())
    assert not [name for name in state if "encoder" in name or name.endswith(NAMES)]


def test_without_residual_the_output_is_bounded_and_with_it_training_starts_at_the_input():
    degraded, boxes = uniform(1, 3, 64, 64), some_boxes(1)
    with torch.no_grad():
        bounded = randomised(network(residual=False), 0.4)(degraded, boxes)
        fresh = dfdnet.DFDNet(replace(TINY, residual=True), some_encoder())
        gap = (fresh(degraded, boxes) - degraded).flatten(2)
    assert 0.5 < bounded.abs().max() <= 1
    assert gap.std(2).max() < 1e-6


# Discriminators and Eq. (7) to (9)


def test_discriminators_see_the_image_reduced_1_2_4_8_times():
    nets, image, seen = dfdnet.Discriminators(4), uniform(2, 3, 64, 64), []
    for net in nets:
        net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert len(nets(image)) == len(seen) == 4
    for r, reduced in zip((1, 2, 4, 8), seen):
        blocks = image.numpy().reshape(2, 3, 64 // r, r, 64 // r, r).mean((3, 5))
        np.testing.assert_allclose(reduced.numpy(), blocks, atol=1e-5)


def test_every_discriminator_convolution_has_spectral_norm_one():
    nets = randomised(dfdnet.Discriminators(4), 3.0)
    for _ in range(60):  # power iteration
        nets(torch.rand(1, 3, 64, 64))
    layers = [module for module in nets.modules() if isinstance(module, nn.Conv2d)]
    assert len(layers) == 16
    for layer in layers:
        assert parametrize.is_parametrized(layer, "weight")
        assert torch.linalg.svdvals(layer.weight.flatten(1).detach())[0].item() == pytest.approx(1, abs=0.02)


def test_pixel_and_perceptual_loss_are_equation_7():
    a, b = random(2, 2, 3, 5, 4).numpy()
    loss = dfdnet.pixel_loss(torch.from_numpy(a), torch.from_numpy(b))
    assert loss.item() == pytest.approx(((a - b) ** 2).mean(), rel=1e-5)

    weights, expected = (0.5, 1.0, 2.0, 4.0), 0.0
    shapes = [(3, 4, 8, 6), (3, 6, 4, 3), (3, 8, 2, 2), (3, 5, 1, 2)]
    ours, theirs = ([random(*shape, seed=seed) for shape in shapes] for seed in (0, 1))
    for n in range(3):
        for weight, a, b in zip(weights, ours, theirs):
            channels, height, width = a.shape[1:]
            expected += weight / (channels * height * width) * ((a[n] - b[n]).numpy() ** 2).sum() / 3
    assert dfdnet.perceptual_loss(ours, theirs, weights).item() == pytest.approx(expected, rel=1e-5)


def scores(seed):
    return [2 * random(2, 1, side, side, seed=seed) + 0.5 for side in (8, 4, 2, 1)]


def test_discriminator_loss_is_the_negative_of_equation_8():
    real, fake = scores(0), scores(1)
    paper = 0.0
    for r, f in zip(real, fake):
        paper += np.minimum(0, r.numpy() - 1).mean() + np.minimum(0, -1 - f.numpy()).mean()
    assert dfdnet.discriminator_loss(real, fake).item() == pytest.approx(-paper, rel=1e-5)
    good, bad = [torch.full((1, 1, 2, 2), 1.5)] * 4, [torch.full((1, 1, 2, 2), -1.5)] * 4
    assert dfdnet.discriminator_loss(good, bad).item() == 0  # real above 1, fake below −1
    assert dfdnet.discriminator_loss(bad, good).item() == pytest.approx(4 * 5)


def test_adversarial_loss_is_equation_9_with_a_weight_for_each_scale():
    fake, weights = scores(2), (4.0, 2.0, 1.0, 0.5)
    expected = -sum(weight * f.numpy().mean() for weight, f in zip(weights, fake))
    assert dfdnet.adversarial_loss(fake, weights).item() == pytest.approx(expected, rel=1e-5)


# Data


def test_batches_follow_from_seed_step_and_place_so_two_processes_see_what_one_would(monkeypatch):
    faces, indices = SomeFaces(), [0, 1, 2, 4]
    whole = dfdnet.Batches(faces, indices, replace(TINY, batch=4))[3]
    torch.rand(7)
    first = dfdnet.Batches(faces, indices, replace(TINY, steps=9999))
    first[5]
    monkeypatch.setattr(common, "rank", lambda: 1)
    halves = zip(first[3], dfdnet.Batches(faces, indices, TINY)[3])
    for together, parts in zip(whole, halves, strict=True):
        assert torch.equal(together, torch.cat(parts))
    for other in (first[4], dfdnet.Batches(faces, indices, replace(TINY, seed=1))[3]):
        assert not torch.equal(whole[0][:2], other[0])


def test_batches_hold_only_the_faces_they_may_with_their_own_boxes_and_a_degraded_input():
    faces, seen = SomeFaces(), set()
    batches = dfdnet.Batches(faces, [1, 3], TINY)
    for step in range(8):
        for low, image, box in zip(*batches[step]):
            (number,) = (i for i in (1, 3) if torch.equal(faces[i].image, image))
            seen.add(number)
            torch.testing.assert_close(box, common.component_boxes(faces[number].landmarks[None], 64)[0])
            assert 1e-3 < (low - image).abs().mean() < 0.6
    assert seen == {1, 3}


# Restoration and measuring


def test_validation_is_equation_7_on_faces_degraded_alike_every_time(float32):
    net, faces, indices = network(), SomeFaces(18), list(range(18))
    found = dfdnet.validate(net, faces, indices, net.cfg)
    assert dfdnet.validate(net, faces, indices, net.cfg) == found
    batches = list(dfdnet.restored_batches(net, faces, indices, net.cfg, None))
    assert len(batches) == 2  # of 16 faces and of 2: a mean over faces, not over batches
    restored, target = (torch.cat([batch[name] for batch in batches]) for name in ("restored", "target"))
    assert torch.equal(target, common.stack_faces(faces, indices)[0])
    features = zip(net.cfg.weight_perceptual, *map(net.encoder.features, (restored, target)))
    loss = 100 * (restored - target).square().mean()
    loss = loss + sum(weight * (a - b).square().mean() for weight, a, b in features)
    psnr = 10 * torch.log10(4 / (restored - target).square().mean((1, 2, 3))).mean()
    assert found["validation"] == pytest.approx(loss.item(), rel=1e-4)
    assert found["validation_psnr"] == pytest.approx(psnr.item(), rel=1e-2)


def test_restored_batches_hold_the_networks_output_for_faces_degraded_by_the_scale(float32):
    net, faces = network(), SomeFaces()
    (batch,) = dfdnet.restored_batches(net, faces, [4, 2, 0], net.cfg, 8)
    landmarks = common.stack_faces(faces, [4, 2, 0])[1]
    with torch.no_grad():
        expected = net(batch["degraded"], common.component_boxes(landmarks, 64)).clamp(-1, 1)
    torch.testing.assert_close(batch["restored"], expected, rtol=1e-4, atol=1e-5)
    one_by_one = dfdnet.restore(net, batch["degraded"], landmarks, batch=1)
    torch.testing.assert_close(one_by_one, batch["restored"], rtol=1e-4, atol=1e-5)
    (milder,) = dfdnet.restored_batches(net, faces, [4, 2, 0], net.cfg, 4)
    errors = [(each["degraded"] - each["target"]).square().mean() for each in (milder, batch)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("cadain", [True, False])
def test_a_network_made_ready_to_restore_paints_the_same(precision, cadain):
    net, degraded, landmarks = network(cadain=cadain), uniform(2, 3, 64, 64, seed=3), some_landmarks(2)
    expected = dfdnet.restore(net, degraded, landmarks, precision="float32")
    net = dfdnet.for_restoration(net, torch.device("cpu"), precision)
    restored = dfdnet.restore(net, degraded, landmarks, precision=precision)
    if precision == "float32":
        torch.testing.assert_close(restored, expected, rtol=1e-4, atol=1e-4)
    assert common.psnr(restored, expected).min() > 35
    low = precision == "bfloat16"
    assert net.context.fuse.weight.dtype == (torch.bfloat16 if low else torch.float32)
    assert net.blocks["scale1"].nose.dtype == (torch.bfloat16 if low and cadain else torch.float32)


# Training: Eq. (10), the schedule, whose faces make the dictionaries


class WatchedAdam(torch.optim.Adam):
    """Keeps what every step sees: gradients of both optimisers' parameters, and its rate."""

    made = []

    def __init__(self, parameters, *args, **kwargs):
        super().__init__(list(parameters), *args, **kwargs)
        self.seen, self.rates = [], []
        self.made.append(self)

    def step(self, closure=None):
        gradients = []
        for adam in self.made:
            parameters = adam.param_groups[0]["params"]
            gradients.append([None if p.grad is None else p.grad.clone() for p in parameters])
        self.rates.append(self.param_groups[0]["lr"])
        self.seen.append(gradients)
        return super().step(closure)


@pytest.fixture
def quick(monkeypatch):
    """main() without what it draws, measures and learns beforehand."""
    monkeypatch.setattr(WatchedAdam, "made", [])
    monkeypatch.setattr(torch.optim, "Adam", WatchedAdam)
    monkeypatch.setattr(dfdnet, "evaluate", lambda *_: {})
    monkeypatch.setattr(dfdnet, "samples", lambda *_: {})
    monkeypatch.setattr(common, "report", lambda *_: None)
    monkeypatch.setattr(common, "_write_log", lambda *_: None)
    monkeypatch.setattr(common, "load_encoder", lambda *_: some_encoder())
    return monkeypatch


def train(patch, cfg, folder, out, *argv):
    patch.setitem(dfdnet.PRESETS, "tiny", cfg)
    command = ["--train", "--device", "cpu", "--precision", "float32", "--data", folder, "--out", out, *argv]
    dfdnet.main(list(map(str, command)))


def write_faces(folder, count):
    for index in range(count):
        face = SomeFaces()[index]
        common.write_image(folder / f"{index:02}.png", face.image)
        common.write_landmarks(folder / f"{index:02}.png.txt", face.landmarks)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 people, a random picture of each."""
    return write_faces(tmp_path_factory.mktemp("people"), 24)


def gap(gradients, expected):
    a, b = (torch.cat([g.flatten().double() for g in many]) for many in (gradients, expected))
    return ((a - b).norm() / b.norm()).item()


def test_the_first_step_follows_the_gradient_of_equation_10(quick, folder, tmp_path):
    """Gradients of train() against losses written out from the paper, on copies of the networks.

    The adversarial weights are 20 times the paper's, so that no term is small."""
    cfg = replace(TINY, steps=1, batch=8, residual=False, clip=None)
    cfg = replace(cfg, weight_perceptual=(0.5, 1.0, 2.0, 4.0), weight_adversarial=(80.0, 40.0, 20.0, 20.0))
    copies = {}

    class Net(dfdnet.DFDNet):
        def forward(self, degraded, boxes):
            if self.training:
                copies.update(trained=self, net=copy.deepcopy(self), inputs=(degraded.contiguous(), boxes))
                copies["judges"] = copy.deepcopy(copies["live"])
            return super().forward(degraded, boxes)

    class Judges(dfdnet.Discriminators):
        def __init__(self, *args):
            super().__init__(*args)
            copies["live"] = self

    quick.setattr(dfdnet, "DFDNet", Net)
    quick.setattr(dfdnet, "Discriminators", Judges)
    train(quick, cfg, folder, tmp_path)
    watched = SimpleNamespace(**copies)
    (of_generator, of_judges), (of_generator_then, judged) = (adam.seen[0] for adam in WatchedAdam.made)

    faces = common.FaceFolder(folder, 64)
    people = common.split_identities(faces)[0]
    degraded, target, boxes = dfdnet.Batches(faces, people, cfg)[0]
    assert torch.equal(degraded, watched.inputs[0]) and torch.equal(boxes, watched.inputs[1])

    # The generator: all of it, and nothing else.
    net, judges = watched.net, watched.judges
    restored = net(degraded, boxes)
    features = zip((0.5, 1, 2, 4), net.encoder.features(restored), net.encoder.features(target))
    votes = zip((80, 40, 20, 20), judges(restored))
    terms = [100 * (restored - target).square().mean(),
             sum(weight * (a - b).square().mean() for weight, a, b in features),
             -sum(weight * score.mean() for weight, score in votes)]
    gradients = [torch.autograd.grad(term, list(net.parameters()), retain_graph=True) for term in terms]
    total = [sum(many) for many in zip(*gradients, strict=True)]
    assert gap(of_generator, total) < 0.003
    for term in gradients:  # a missing term would be noticed
        assert gap([a - b for a, b in zip(total, term)], total) > 0.02
    names = [name for name, _ in watched.trained.named_parameters()]
    missed = [name for name, g in zip(names, of_generator) if not g.any()]
    # At 64 pixels a nose may lie between the pixel centres of scale 4: nothing of it is pasted then.
    assert [name for name in missed if not name.startswith("blocks.scale4.confidence.2.")] == []
    assert all(g is None for g in of_judges)
    assert all(p.grad is None for p in watched.trained.encoder.parameters())

    # The discriminators: all of them, and what the generator's own step left there is as it was.
    judges.requires_grad_(True)
    real, fake = judges(target), judges(restored.detach())
    hinge = 0
    for r, f in zip(real, fake):
        hinge = hinge - (r - 1).clamp(max=0).mean() - (-1 - f).clamp(max=0).mean()
    assert gap(judged, torch.autograd.grad(hinge, list(judges.parameters()))) < 0.003
    assert all(g.any() for g in judged if g.ndim > 1)  # the last bias meets +1 and −1
    assert all(torch.equal(a, b) for a, b in zip(of_generator, of_generator_then))


def test_every_step_has_its_rate_for_both_optimisers_and_a_gradient_of_bounded_length(
    quick, folder, tmp_path
):
    """One validation without a better loss is forgiven, a second one halves the rates."""
    losses = iter([5.0, 4.0, 4.0, 4.1, 3.0, 3.5, 3.5, 2.0])
    quick.setattr(dfdnet, "validate", lambda *_: {"validation": next(losses)})
    cfg = replace(TINY, steps=8, validate_every=1, batch=1, cooldown=0.5, patience=1)
    train(quick, replace(cfg, clip=1e-3), folder, tmp_path)
    factors = [1, 1, 1, 1, 1 / 2, 1 / 2, 1 / 2, 1 / 4]
    expected = [cfg.rate(step) * factor for step, factor in enumerate(factors, 1)]
    assert expected[-1] < expected[0] / 4
    for adam in WatchedAdam.made:
        assert adam.rates == pytest.approx(expected)
    for of_generator, _ in WatchedAdam.made[0].seen:
        length = torch.cat([g.flatten() for g in of_generator]).norm()
        assert length.item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(quick, folder, tmp_path):
    real = dfdnet.pixel_loss
    steps = []

    def spoiled(restored, target):
        steps.extend([1] if torch.is_grad_enabled() else [])  # not validation's
        return real(restored, target) * (math.nan if len(steps) > 2 else 1)

    quick.setattr(dfdnet, "pixel_loss", spoiled)
    cfg = replace(TINY, steps=6, validate_every=1)
    with pytest.raises(common.InputError, match="step 3: the pixel loss is not finite"):
        train(quick, cfg, folder, tmp_path)
    state = common.load_weights(tmp_path / "checkpoint.pt")
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["net"].values() if value.is_floating_point())


class Stop(Exception):
    """Ends a command once the dictionaries are made."""


def faces_read(patch, *command):
    """The faces, (first picture of the folder, index), that train() reads before its first step."""
    read, item = set(), common.FaceFolder.__getitem__

    def spied(faces, index):
        read.add((faces._files[0], index))
        return item(faces, index)

    def stop(*_, **__):
        raise Stop

    patch.setattr(common.FaceFolder, "__getitem__", spied)
    patch.setattr(common, "Run", stop)
    with pytest.raises(Stop):
        train(patch, *command)
    return read


@pytest.mark.parametrize("limit", [1000, 8])
def test_the_dictionary_is_made_of_trained_people_alone(quick, folder, tmp_path, limit):
    faces = common.FaceFolder(folder, 64)
    people, validation, test = common.split_identities(faces)
    assert validation and test and len(people) > 8
    cfg = replace(TINY, dictionary_images=limit)
    read = faces_read(quick, cfg, folder, tmp_path)
    chosen = people if limit == 1000 else [people[k * len(people) // 8] for k in range(8)]
    assert read == {(folder / "00.png", index) for index in chosen}
    stored = common.load_weights(tmp_path / "dictionary.pt")["dictionary"]
    for scale, parts in build(cfg, faces, chosen)[0].items():
        assert all(torch.equal(stored[scale][name], entries) for name, entries in parts.items())


def test_dictionary_data_makes_the_dictionary_instead_of_the_training_faces(quick, folder, tmp_path):
    """Of all people there: none of them is trained on or held out."""
    other = write_faces(tmp_path / "other", 9)
    read = faces_read(quick, TINY, folder, tmp_path / "run", "--dictionary-data", other)
    assert read == {(other / "00.png", index) for index in range(9)}


def test_a_dictionary_that_fits_is_used_again_and_one_that_does_not_is_made_anew(quick, folder, tmp_path):
    made = []

    def build(cfg, *_):
        made.append(cfg)
        return random_dictionary(cfg), {}

    quick.setattr(dfdnet, "build_dictionary", build)
    quick.setattr(dfdnet, "draw_dictionary", lambda *_: torch.zeros(3, 8, 8))
    cfg = TINY
    faces_read(quick, cfg, folder, tmp_path)
    faces_read(quick, replace(cfg, steps=2, batch=3), folder, tmp_path)
    assert len(made) == 1
    for change in ({"entries": 5}, {"dictionary_images": 7}, {"kmeans_rounds": 1}, {"seed": 1}):
        cfg = replace(cfg, **change)
        faces_read(quick, cfg, folder, tmp_path)
        assert made[-1] == cfg


def restored_by(checkpoint):
    args = SimpleNamespace(checkpoint=checkpoint, device=torch.device("cpu"), degradation=None)
    args.state = common.load_checkpoint(checkpoint, "dfdnet")
    net, cfg = dfdnet.load_network(args)
    return dfdnet.restore(net, uniform(2, 3, 64, 64, seed=4), some_landmarks(2), precision="float32"), cfg


@pytest.mark.slow
def test_the_dictionary_lies_beside_the_checkpoint_stays_on_resume_and_fits_no_other_run(
    quick, folder, tmp_path
):
    nets, load = [], dfdnet.DFDNet.set_dictionary

    def spied(net, dictionary):
        nets.append(net)
        load(net, dictionary)

    quick.setattr(dfdnet.DFDNet, "set_dictionary", spied)
    cfg, checkpoint, out = replace(TINY, steps=1), tmp_path / "kept" / "net.pt", tmp_path / "run"
    train(quick, cfg, folder, out, "--checkpoint", checkpoint)
    dictionary = checkpoint.with_name("dictionary.pt")
    assert dictionary.is_file() and not (out / "dictionary.pt").exists()
    restored, loaded = restored_by(checkpoint)
    assert loaded == cfg
    given = uniform(2, 3, 64, 64, seed=4), some_landmarks(2)
    torch.testing.assert_close(restored, dfdnet.restore(nets[0], *given, precision="float32"))

    before = dictionary.stat()
    train(quick, cfg, folder, out, "--checkpoint", checkpoint, "--resume", "--steps", 2)
    after = dictionary.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert common.load_checkpoint(checkpoint, "dfdnet")["step"] == 2

    of_another_run = common.load_weights(dictionary) | {"key": "another run's"}
    common.save_checkpoint(dictionary, of_another_run)
    again = "--checkpoint", checkpoint, "--resume", "--steps", 3
    for action in (lambda: restored_by(checkpoint), lambda: train(quick, cfg, folder, out, *again)):
        with pytest.raises(common.InputError, match="dictionary.pt: not the dictionaries") as error:
            action()
        assert "\n" not in str(error.value)
    dictionary.unlink()
    with pytest.raises(common.InputError, match="dictionary.pt: missing"):
        restored_by(checkpoint)


def split_for_learning(faces):
    """Seven people of 24 are held out, for an interval narrower than that of the usual two."""
    people = faces.identity.tolist()
    parts = range(16), range(16, 17), range(17, 24)
    return [[i for i, who in enumerate(people) if who in part] for part in parts]


@pytest.mark.slow
def test_a_short_training_improves_held_out_faces(face_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "split_identities", split_for_learning)
    monkeypatch.setattr(common, "load_encoder", lambda *_: some_encoder())
    monkeypatch.setattr(common, "metrics", lambda faces, args: {"psnr": common.psnr})
    monkeypatch.setattr(common, "TASKS", {"x6": 6, "x8": 8})
    cfg = replace(TINY, entries=16, batch=8, steps=60, validate_every=60)
    train(monkeypatch, cfg, face_folder, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    for task in result["test"].values():
        assert task["faces"] == 35
        assert task["paired_psnr_gain"]["ci95"][0] > 0


@pytest.mark.slow
def test_every_variant_trains_and_is_loaded_again(quick, folder, tmp_path):
    cfg = replace(TINY, steps=1, batch=1)
    for name in ("0dft", "2dft", "no-cadain", "no-confidence", "k16"):
        train(quick, cfg, folder, tmp_path / name, "--variant", name)
        assert restored_by(tmp_path / name / "checkpoint.pt")[0].isfinite().all()


# The released network


def test_the_released_block_restyles_every_entry_and_pastes_in_order():
    sizes = (3, 3, 2, 4)
    block = dfdnet.ReleasedDFTBlock(6, sizes, 2, replace(dfdnet.RELEASED, entries=5)).eval()
    dictionary = {name: random(5, 6, n, n, seed=i) + 3 for i, (name, n) in enumerate(zip(NAMES, sizes))}
    for name, entries in dictionary.items():
        block.set_entries(name, entries)
    features = random(2, 6, 16, 16, seed=5)
    boxes = torch.tensor([[[2, 3, 13.9, 12], [15, 4, 27, 15], [11, 9, 19, 18], [8, 18, 24, 31]],
                          [[1, 1, 12, 13], [10, 2, 25, 15], [9, 8, 18, 18], [7, 17, 23, 30]]])
    expected = features.clone()
    with torch.no_grad():
        for n, index in np.ndindex(2, 4):
            x1, y1, x2, y2 = (int(v) // 2 for v in boxes[n, index].tolist())
            part = features[n, :, y1:y2, x1:x2]
            query = F.interpolate(part[None], (sizes[index],) * 2, mode="bilinear")[0]
            matched = equation_4(query, dictionary[NAMES[index]], True)[1]
            matched = F.interpolate(matched[None], part.shape[1:], mode="nearest")[0]
            score = block.confidence[index].score((matched - part)[None])[0]
            expected[n, :, y1:y2, x1:x2] = part + matched * score
        torch.testing.assert_close(block(features, boxes), expected, rtol=1e-3, atol=1e-3)


def test_the_released_stage_blurs_rectifies_twice_and_bounds_the_shift():
    stage = dfdnet.ReleasedSFTStage(6, 4).eval()
    x, skip = random(2, 2, 6, 8, 8, seed=1)
    kernel = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    padded = F.pad(x, (1, 1, 1, 1))
    blurred = sum(kernel[i, j] * padded[..., i : i + 8, j : j + 8] for i, j in np.ndindex(3, 3))
    with torch.no_grad():
        reduced = stage.reduce(blurred)
        reduced = torch.where(reduced < 0, 0.04 * reduced, reduced)
        modulated = stage.scale(skip) * reduced + torch.sigmoid(stage.shift(skip))
        raised = F.interpolate(modulated, scale_factor=2, mode="bilinear")
        torch.testing.assert_close(stage(x, skip), F.leaky_relu(stage.widen(raised), 0.2))


def test_entries_are_kept_in_the_type_that_is_asked_for():
    block = dfdnet.ReleasedDFTBlock(6, (3, 3, 2, 4), 2, replace(dfdnet.RELEASED, entries=1))
    entries = random(20, 6, 2, 2, seed=5)
    block.set_entries("nose", entries, torch.bfloat16)
    assert torch.equal(block.entries(2), dfdnet.normalise_entries(entries).bfloat16())
