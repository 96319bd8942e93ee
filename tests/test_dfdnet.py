"""DFDNet: every equation against an independent form, what each loss reaches, learning by a gain."""

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
from torch.nn.utils import parametrize

import common
import dfdnet

PARTS = ("left_eye", "right_eye", "nose", "mouth")
TINY = replace(dfdnet.TINY, size=64, entries=6, width=8, discriminator_width=4, batch=2)
WIDTHS = (6, 8, 10, 12)


def some_landmarks(count, size=64, seed=3):
    """Faces of a simple layout, each moved and stretched a little: (count,68,2)."""
    generator, points = torch.Generator().manual_seed(seed), torch.zeros(68, 2)
    groups = {
        (0, 17): (0.5, 0.6, 0.4),
        (17, 22): (0.37, 0.37, 0.09),
        (22, 27): (0.63, 0.37, 0.09),
        (27, 36): (0.5, 0.57, 0.08),
        (36, 42): (0.37, 0.46, 0.07),
        (42, 48): (0.63, 0.46, 0.07),
        (48, 68): (0.5, 0.76, 0.11),
    }
    for (first, end), (x, y, radius) in groups.items():
        turn = torch.linspace(0, 2 * math.pi, end - first + 1)[:-1]
        points[first:end] = torch.stack([x + radius * turn.cos(), y + radius * turn.sin()], 1)
    stretch = 1 + 0.1 * torch.randn(count, 1, 2, generator=generator)
    return (points * stretch + 0.04 * torch.randn(count, 1, 2, generator=generator)) * size


def encoder():
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


def random_dictionary(cfg, widths=WIDTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"scale{s}": {
            part: torch.rand(cfg.entries, widths[s - 1], size, size, generator=generator)
            for part, size in zip(PARTS, cfg.part_sizes[s - 1], strict=True)
        }
        for s in (1, 2, 3, 4)
    }


def network(dictionary_seed=0, **changes):
    cfg = replace(TINY, **changes)
    torch.manual_seed(2)
    net = dfdnet.DFDNet(cfg, encoder())
    torch.nn.init.normal_(net.paint[-1].weight, std=0.1)  # at zero it hides all before it
    net.set_dictionary(random_dictionary(cfg, seed=dictionary_seed))
    return net.eval()


def some_boxes(count, size=64):
    return common.component_boxes(some_landmarks(count, size), size)


def ramp(count, height, width):
    """Two channels, linear in the pixel's place: 3x + y + 10 n, and 2 − y, for sample n."""
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    return torch.stack([torch.stack([3 * x + y + 10 * n, 2 - y]) for n in range(count)])


# Config


def test_paper_preset_has_the_papers_numbers():
    paper = dfdnet.PAPER
    assert (paper.preset, paper.size, paper.entries, paper.dictionary_images) == ("paper", 256, 256, 10_000)
    assert paper.weight_pixel == 100
    assert paper.weight_perceptual == (0.5, 1, 2, 4)
    assert paper.weight_adversarial == (4, 2, 1, 1)
    assert paper.learning_rate == 2e-4 and paper.betas == (0.5, 0.999)
    assert paper.cadain and paper.confidence and tuple(paper.dft_scales) == (1, 2, 3, 4)
    assert not paper.residual and not paper.released
    assert paper.degradation == "dfdnet" and paper.encoder == "vgg"


def test_variants_are_the_rows_of_tables_2_and_3():
    assert set(dfdnet.VARIANTS) == set(
        "full k16 k64 k128 k256 k512 0dft 2dft no-cadain no-confidence".split()
    )
    full = asdict(dfdnet.PAPER)
    changes = {
        name: {k: v for k, v in asdict(replace(dfdnet.PAPER, **change)).items() if v != full[k]}
        for name, change in dfdnet.VARIANTS.items()
    }
    assert changes == {
        "full": {},
        "k16": {"entries": 16},
        "k64": {"entries": 64},
        "k128": {"entries": 128},
        "k256": {},
        "k512": {"entries": 512},
        "0dft": {"dft_scales": ()},
        "2dft": {"dft_scales": (3, 4)},
        "no-cadain": {"cadain": False},
        "no-confidence": {"confidence": False},
    }


@pytest.mark.parametrize(("preset", "least"), [(dfdnet.PAPER, 1), (TINY, 4)])
@pytest.mark.parametrize("size", [256, 128, 64])
def test_part_sizes_are_40_40_25_55_at_256_and_halve_from_scale_to_scale(size, preset, least):
    for scale, sizes in enumerate(replace(preset, size=size).part_sizes):
        for side, paper in zip(sizes, (40, 40, 25, 55), strict=True):
            exact = paper * size / 256 / 2**scale
            assert isinstance(side, int)
            assert side == least if exact < least else abs(side - exact) < 1
    assert dfdnet.PAPER.part_sizes[3] == [5, 5, 3, 6]


# Eq. (1)


def clusters_apart(counts, seed=0, spread=1.0):
    """Points around well separated corners, `counts[k]` of them around corner k → points, corner of each."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.cat([torch.full((count,), k) for k, count in enumerate(counts)])
    corners = torch.randn(len(counts), 12, generator=generator) * 100 + 20
    return corners[label] + spread * torch.randn(len(label), 12, generator=generator), label


def test_kmeans_recovers_separated_clusters_of_unequal_sizes():
    points, label = clusters_apart([100, 40, 7, 3, 1])
    centres, cluster, distance = dfdnet.kmeans(points, 5, common.seeded(0))
    assert centres.shape == (5, 12) and centres.dtype == torch.float32
    for k in range(5):
        members = label == k
        assert len(cluster[members].unique()) == 1  # one cluster a corner …
        torch.testing.assert_close(
            centres[cluster[members][0]], points[members].mean(0), rtol=1e-4, atol=1e-3
        )
    assert len(cluster.unique()) == 5  # … and no corner shares one
    torch.testing.assert_close(distance, (points - centres[cluster]).square().sum(1), rtol=1e-2, atol=0.2)


def test_kmeans_seeds_are_points_far_from_each_other():
    points, label = clusters_apart([300, 1, 1, 1, 1, 1], spread=0.1)
    for seed in range(4):
        seeds = dfdnet.kmeans(points, 6, common.seeded(seed), rounds=0)[0]
        found = (seeds[:, None] - points).abs().sum(2).argmin(1)
        assert torch.equal(seeds, points[found])
        assert sorted(label[found].tolist()) == [
            0,
            1,
            2,
            3,
            4,
            5,
        ]  # uniform draws would all fall into the first


def lloyd(points, centres, rounds):
    points, centres = points.double().numpy(), centres.double().numpy().copy()
    for _ in range(rounds):
        cluster = ((points[:, None] - centres) ** 2).sum(2).argmin(1)
        for k in range(len(centres)):
            if (cluster == k).any():
                centres[k] = points[cluster == k].mean(0)
    return ((points[:, None] - centres) ** 2).sum(2).min(1).sum()


@pytest.mark.parametrize("rounds", [1, 4, 60])
def test_kmeans_is_no_worse_than_plain_lloyd_from_the_same_seeds(rounds):
    points = torch.randn(300, 6, generator=torch.Generator().manual_seed(4))
    seeds = dfdnet.kmeans(points, 12, common.seeded(7), rounds=0)[0]
    centres, cluster, distance = dfdnet.kmeans(points, 12, common.seeded(7), rounds=rounds)
    exact = (points[:, None] - centres).square().sum(2).min(1)
    torch.testing.assert_close(distance, exact.values, rtol=1e-3, atol=1e-4)
    assert torch.equal(cluster, exact.indices)
    assert exact.values.sum() <= lloyd(points, seeds, rounds) * (1 + 1e-4)
    if rounds == 60:  # long converged
        means = torch.stack([points[cluster == k].mean(0) for k in range(12)])
        torch.testing.assert_close(centres, means, rtol=1e-4, atol=1e-5)


def test_kmeans_reseeds_empty_clusters_at_the_worst_served_points(monkeypatch):
    points = torch.cat([torch.zeros(40, 4), torch.eye(4)[:3] * torch.tensor([50.0, 70, 90])[:, None]])
    start = next(s for s in range(9) if torch.randint(43, (), generator=common.seeded(s)) < 40)
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: torch.tensor([0]))  # all seeds alike
    centres, _, distance = dfdnet.kmeans(points, 4, common.seeded(start))
    assert sorted(centres.sum(1).tolist()) == [0, 50, 70, 90]
    assert distance.abs().max() == 0


def test_kmeans_of_duplicates_gives_real_points_and_no_nan():
    values = torch.tensor([[5.0, 1], [7, 2], [9, 3]])
    centres, cluster, distance = dfdnet.kmeans(values.repeat(10, 1), 5, common.seeded(0))
    assert distance.abs().max() < 1e-3 and torch.equal(centres[cluster], values.repeat(10, 1))
    assert all((values == centre).all(1).any() for centre in centres)


def test_kmeans_does_not_depend_on_its_chunks(monkeypatch):
    points, _ = clusters_apart([20, 20, 5, 9])
    whole = dfdnet.kmeans(points, 7, common.seeded(1))
    split, calls = torch.Tensor.split, []

    def small(tensor, size, dim=0):
        calls.append(size)
        return split(tensor, min(size, 5), dim)

    monkeypatch.setattr(torch.Tensor, "split", small)
    chunked = dfdnet.kmeans(points, 7, common.seeded(1))
    assert calls and calls[0] >= 54
    torch.testing.assert_close(chunked[0], whole[0])
    assert torch.equal(chunked[1], whole[1])


def test_kmeans_refuses_more_clusters_than_points():
    assert len(dfdnet.kmeans(torch.randn(4, 2), 4, common.seeded(0))[0]) == 4
    with pytest.raises(common.InputError, match="3 faces.*4 clusters"):
        dfdnet.kmeans(torch.randn(3, 2), 4, common.seeded(0))


class FewFaces:
    """Random pictures with landmarks, as a data set."""

    fingerprint, identity = "few", torch.arange(5)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = F.interpolate(torch.rand(1, 3, 12, 12, generator=generator) * 2 - 1, 64, mode="bicubic")[0]
        return common.Face(image, some_landmarks(1, seed=index)[0], index)

    def __len__(self):
        return 5


def test_build_dictionary_holds_the_cropped_features_of_every_scale_and_part(monkeypatch):
    """With as many clusters as faces, the centres are the parts themselves."""
    monkeypatch.setattr(common, "precision", lambda kind: torch.float32)
    faces, net, cfg = FewFaces(), encoder(), replace(TINY, entries=5)
    dictionary, picture = dfdnet.build_dictionary(cfg, net, faces, list(range(5)), torch.device("cpu"), True)
    assert picture.ndim == 3 and picture.isfinite().all()
    images, landmarks = common.stack_faces(faces, range(5))
    boxes = common.component_boxes(landmarks, 64)
    with torch.no_grad():
        maps = net.features(images)
    assert set(dictionary) == {"scale1", "scale2", "scale3", "scale4"}
    for scale in range(4):
        parts = dictionary[f"scale{scale + 1}"]
        assert tuple(parts) == PARTS
        crops = dfdnet.crop_components(maps[scale], boxes, 2 ** (scale + 1), cfg.part_sizes[scale])
        for entries, crop, side in zip(parts.values(), crops, cfg.part_sizes[scale], strict=True):
            assert entries.shape == (5, WIDTHS[scale], side, side)
            gaps = (entries.float()[:, None] - crop).square().flatten(2).mean(2).sqrt()
            apart = (crop[:, None] - crop).square().flatten(2).mean(2).sqrt() + torch.eye(5) * 9
            assert sorted(gaps.argmin(1).tolist()) == [0, 1, 2, 3, 4]
            assert gaps.min(1).values.max() < 0.02 * apart.min()  # kept as float16


def test_build_dictionary_of_copies_of_one_face_still_works():
    class Copies(FewFaces):
        def __getitem__(self, index):
            return super().__getitem__(0)

    cfg = replace(TINY, entries=3)
    dictionary, _ = dfdnet.build_dictionary(
        cfg, encoder(), Copies(), list(range(5)), torch.device("cpu"), True
    )
    assert all(entries.isfinite().all() for scale in dictionary.values() for entries in scale.values())


def test_build_dictionary_takes_at_most_the_named_number_of_faces():
    with pytest.raises(common.InputError, match="3 faces"):
        dfdnet.build_dictionary(
            replace(TINY, entries=5, dictionary_images=3),
            encoder(),
            FewFaces(),
            list(range(5)),
            torch.device("cpu"),
            True,
        )


# RoIAlign and its reverse


def test_crop_of_a_linear_ramp_is_the_ramp_at_the_bin_centres():
    stride, sizes = 4, (5, 3, 4, 7)
    boxes = torch.tensor(
        [
            [[10.0, 20, 31, 44], [50, 9, 71, 30], [33.5, 40, 60, 67], [20, 60, 90, 75]],
            [[14.0, 25, 35, 40], [52, 14, 70, 36], [40.5, 44, 66, 61], [24, 66, 84, 85]],
        ]
    )
    parts = dfdnet.crop_components(ramp(2, 24, 26), boxes, stride, sizes)
    for part, size, box in zip(parts, sizes, boxes.unbind(1), strict=True):
        assert part.shape == (2, 2, size, size)
        for n in range(2):
            x1, y1, x2, y2 = (box[n] / stride).tolist()
            for i in range(size):
                for j in range(size):
                    x = x1 + (j + 0.5) * (x2 - x1) / size - 0.5  # edges → index: pixel i spans i … i + 1
                    y = y1 + (i + 0.5) * (y2 - y1) / size - 0.5
                    assert part[n, 0, i, j].item() == pytest.approx(3 * x + y + 10 * n, abs=1e-3)
                    assert part[n, 1, i, j].item() == pytest.approx(2 - y, abs=1e-3)


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
                    found.append(
                        (1 - a) * (1 - b) * part[n, :, i, j]
                        + (1 - a) * b * part[n, :, i, j + 1]
                        + a * (1 - b) * part[n, :, i + 1, j]
                        + a * b * part[n, :, i + 1, j + 1]
                    )
                if found:
                    result[n, :, y, x] = sum(found) / len(found)
    return result


def test_paste_equals_bilinear_sampling_pixel_by_pixel_with_means_in_overlaps():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 3, size, size, generator=generator) for size in (5, 4, 3, 6)]
    boxes = torch.tensor(
        [
            [[1.3, 4.1, 14.7, 17.2], [11.2, 6.3, 25, 21], [9.1, 12.3, 20, 29.9], [0, 20.5, 22.2, 32]],
            [[5.3, 1.1, 20.2, 12.8], [15.2, 8.3, 31, 24], [2.1, 2.3, 30, 10.9], [3, 3.5, 9.2, 32]],
        ]
    )
    pasted = dfdnet.paste_components(parts, boxes, 2, (16, 18))
    torch.testing.assert_close(pasted, paste_by_loop(parts, boxes, 2, 16, 18), rtol=1e-4, atol=1e-5)


def test_paste_undoes_crop_inside_the_boxes_and_leaves_zero_outside():
    sizes, features = (4, 4, 5, 6), ramp(1, 20, 20)
    corners = [(1, 2), (12, 2), (7, 7), (6, 13)]
    boxes = torch.tensor(
        [[[x, y, x + size, y + size] for (x, y), size in zip(corners, sizes, strict=True)]]
    ).float()
    pasted = dfdnet.paste_components(
        dfdnet.crop_components(features, boxes * 8, 8, sizes), boxes * 8, 8, (20, 20)
    )
    inside = torch.zeros(20, 20, dtype=torch.bool)
    for (x, y), size in zip(corners, sizes, strict=True):
        inside[y : y + size, x : x + size] = True
    torch.testing.assert_close(pasted[..., inside], features[..., inside], rtol=1e-4, atol=1e-3)
    assert pasted[..., ~inside].abs().max() == 0


# Eq. (3) and (4)


def literal_match(part, entries, cadain):
    """Eq. (3) for all K entries, then Eq. (4), in float64: part (C,h,w), entries (K,C,h,w) → scores (K,)."""
    part, entries, scores = part.double().numpy(), entries.double().numpy(), []
    for entry in entries:
        styled = entry.copy()
        for c in range(len(part)) if cadain else ():
            styled[c] = (
                part[c].std(ddof=1) * (entry[c] - entry[c].mean()) / entry[c].std(ddof=1) + part[c].mean()
            )
        scores.append((part * styled).sum())
    return np.array(scores)


def styled_data(samples=24, entries=40):
    """Parts and entries whose channels differ in mean and deviation: a slip in either picks others."""
    generator = torch.Generator().manual_seed(11)

    def draw(count):
        mean, spread = (torch.randn(count, 7, 1, 1, generator=generator) for _ in range(2))
        return torch.randn(count, 7, 5, 5, generator=generator) * (1.2 * spread).exp() + 8 * mean

    return draw(samples), draw(entries)


@pytest.mark.parametrize("cadain", [True, False])
def test_match_features_picks_what_renorming_every_entry_picks(cadain):
    parts, entries = styled_data()
    stored = dfdnet.normalise_entries(entries) if cadain else entries
    chosen = dfdnet.match_features(parts, stored, cadain).tolist()
    assert chosen == [literal_match(part, entries, cadain).argmax() for part in parts]
    other = [literal_match(part, entries, not cadain).argmax() for part in parts]
    assert (
        sum(a != b for a, b in zip(chosen, other, strict=True)) > len(parts) / 2
    )  # the data tells the forms apart


def test_match_features_keeps_the_ranking_under_a_large_common_offset():
    parts, entries = styled_data()
    parts = parts + 1000
    chosen = dfdnet.match_features(parts, dfdnet.normalise_entries(entries)).tolist()
    assert chosen == [literal_match(part, entries, True).argmax() for part in parts]


def test_restyle_gives_an_entry_the_mean_and_deviation_of_the_input():
    parts, entries = styled_data(6, 6)
    styled = dfdnet.restyle(dfdnet.normalise_entries(entries), parts)
    torch.testing.assert_close(styled.mean((2, 3)), parts.mean((2, 3)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(styled.std((2, 3)), parts.std((2, 3)), rtol=1e-2, atol=1e-3)
    for a, b in zip(
        styled.flatten(2).flatten(0, 1), entries.flatten(2).flatten(0, 1), strict=True
    ):  # its structure stays
        assert np.corrcoef(a.numpy(), b.numpy())[0, 1] > 0.999


def test_a_flat_entry_or_input_gives_no_nan():
    flat = torch.full((2, 3, 4, 4), 5.0)
    entries = dfdnet.normalise_entries(torch.cat([flat, torch.randn(2, 3, 4, 4)]))
    assert entries.isfinite().all()
    assert dfdnet.restyle(entries[:2], flat).isfinite().all()
    assert dfdnet.match_features(flat, entries).shape == (2,)


# Eq. (5), the DFT block and Eq. (6)


def test_confidence_score_is_equation_5():
    block = dfdnet.ConfidenceScore(5).eval()
    part, matched = torch.randn(2, 2, 5, 6, 6, generator=torch.Generator().manual_seed(1))
    seen = []
    block.score.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    enriched = block(part, matched)
    ((residual, score),) = seen
    torch.testing.assert_close(residual, matched - part)
    torch.testing.assert_close(enriched, part + matched * score)
    assert score.shape == part.shape and score.std() > 1e-3


def aligned_case():
    """Boxes on whole feature pixels and linear features, which RoIAlign leaves as they are."""
    sizes, stride = (5, 5, 4, 6), 2
    corners = [(1, 1), (12, 2), (7, 8), (5, 13)]
    boxes = (
        torch.tensor(
            [[[x, y, x + size, y + size] for (x, y), size in zip(corners, sizes, strict=True)]]
        ).float()
        * stride
    )
    generator = torch.Generator().manual_seed(8)
    dictionary = {
        name: torch.randn(6, 2, size, size, generator=generator) * 3 + 1
        for name, size in zip(PARTS, sizes, strict=True)
    }
    return sizes, stride, corners, boxes, ramp(1, 20, 20) / 20, dictionary


@pytest.mark.parametrize("cadain", [True, False])
@pytest.mark.parametrize("confidence", [True, False])
def test_dft_block_swaps_in_the_literally_matched_entry_and_touches_nothing_else(cadain, confidence):
    sizes, stride, corners, boxes, features, dictionary = aligned_case()
    block = dfdnet.DFTBlock(2, sizes, stride, replace(TINY, cadain=cadain, confidence=confidence)).eval()
    block.set_dictionary(dictionary)
    with torch.no_grad():
        result = block(features, boxes)
        expected = features.clone()
        for index, ((x, y), size, name) in enumerate(zip(corners, sizes, PARTS, strict=True)):
            place = (0, slice(None), slice(y, y + size), slice(x, x + size))
            part = features[place]
            entry = dictionary[name][literal_match(part, dictionary[name], cadain).argmax()]
            if cadain:
                mean, spread = entry.mean((1, 2), keepdim=True), entry.std((1, 2), keepdim=True)
                entry = part.std((1, 2), keepdim=True) * (entry - mean) / spread + part.mean(
                    (1, 2), keepdim=True
                )
            if confidence:
                entry = part + entry * block.confidence[index].score((entry - part)[None])[0]
            expected[place] = entry
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    assert (expected != features).any(1).sum() == sum(size * size for size in sizes)


def test_dft_block_leaves_features_outside_the_boxes_exactly_alone():
    cfg, boxes = TINY, some_boxes(3)
    block = randomised(dfdnet.DFTBlock(6, cfg.part_sizes[0], 1, cfg), 0.5)
    block.set_dictionary(random_dictionary(cfg)["scale1"])
    features = torch.rand(3, 6, 64, 64, generator=torch.Generator().manual_seed(2))
    changed = (block(features, boxes) != features).any(1)
    centre, inside = torch.arange(64) + 0.5, torch.zeros(3, 64, 64, dtype=torch.bool)
    for x1, y1, x2, y2 in boxes.permute(1, 2, 0):
        across = (centre > x1[:, None]) & (centre < x2[:, None])
        inside |= ((centre > y1[:, None]) & (centre < y2[:, None]))[:, :, None] & across[:, None]
    assert torch.equal(changed, inside)


def test_sft_stage_scales_and_shifts_as_equation_6():
    stage = dfdnet.SFTStage(6, 4).eval()
    seen = {}
    for name in ("reduce", "scale", "shift", "widen"):
        hook = lambda module, inputs, output, name=name: seen.update({name: (inputs[0], output)})  # noqa: E731
        getattr(stage, name).register_forward_hook(hook)
    x, skip = torch.randn(2, 2, 6, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result = stage(x, skip)
    assert seen["reduce"][0] is x and seen["scale"][0] is skip and seen["shift"][0] is skip
    decoder, alpha, beta = F.leaky_relu(seen["reduce"][1], 0.2), seen["scale"][1], seen["shift"][1]
    assert decoder.shape == alpha.shape == beta.shape == (2, 4, 8, 8)
    modulated = alpha * decoder + beta
    assert result.shape == (2, 4, 16, 16)
    modulated = F.interpolate(modulated, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(seen["widen"][0], modulated)
    torch.testing.assert_close(result, F.leaky_relu(seen["widen"][1], 0.2))


# Eq. (2)


def test_a_batch_is_restored_as_its_faces_one_by_one():
    net, boxes = network(), some_boxes(4)
    degraded = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(6)) * 2 - 1
    with torch.no_grad():
        batch = net(degraded, boxes)
        singles = torch.cat([net(degraded[i : i + 1], boxes[i : i + 1]) for i in range(4)])
    assert batch.shape == degraded.shape and batch.dtype == torch.float32
    torch.testing.assert_close(batch, singles, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scales", [(1, 2, 3, 4), (3, 4), ()])
def test_dictionaries_and_boxes_matter_at_the_dft_scales_alone(scales):
    degraded = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(6)) * 2 - 1
    net, boxes = network(dft_scales=scales), some_boxes(2)
    assert set(net.blocks) == {f"scale{s}" for s in scales}
    with torch.no_grad():
        before, moved = net(degraded, boxes[:1]), net(degraded, boxes[1:])
        assert torch.equal(before, moved) == (not scales)
        for scale in (1, 2, 3, 4):
            dictionary = random_dictionary(net.cfg)
            dictionary[f"scale{scale}"] = random_dictionary(net.cfg, seed=9)[f"scale{scale}"]
            net.set_dictionary(dictionary)
            assert torch.equal(before, net(degraded, boxes[:1])) == (scale not in scales)


def test_encoder_and_dictionaries_stay_out_of_parameters_and_state():
    net = network()
    state = net.state_dict()
    assert {id(p) for p in net.parameters()}.isdisjoint(id(p) for p in net.encoder.parameters())
    assert not any(p.requires_grad for p in net.encoder.parameters())
    assert not [name for name in state if "encoder" in name or any(name.endswith(part) for part in PARTS)]
    stored = sum(value.numel() for name, value in state.items() if not name.endswith(("._u", "._v")))
    assert stored == sum(p.numel() for p in net.parameters())


def test_without_residual_the_output_is_bounded_and_with_it_training_starts_at_the_input():
    degraded, boxes = torch.rand(1, 3, 64, 64) * 2 - 1, some_boxes(1)
    with torch.no_grad():
        bounded = randomised(network(residual=False), 0.4)(degraded, boxes)
        fresh = dfdnet.DFDNet(replace(TINY, residual=True), encoder())
        gap = (fresh(degraded, boxes) - degraded).flatten(2)
    assert 0.5 < bounded.abs().max() <= 1
    assert gap.std(2).max() < 1e-6


# Discriminators and Eq. (7) to (9)


def test_discriminators_see_the_image_reduced_1_2_4_8_times():
    nets, image = dfdnet.Discriminators(4), torch.rand(2, 3, 64, 64)
    seen = []
    for net in nets:
        net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert len(nets(image)) == len(seen) == 4
    for r, reduced in zip((1, 2, 4, 8), seen, strict=True):
        blocks = image.numpy().reshape(2, 3, 64 // r, r, 64 // r, r).mean((3, 5))
        np.testing.assert_allclose(reduced.numpy(), blocks, atol=1e-5)


def test_every_discriminator_convolution_has_spectral_norm_one():
    nets = randomised(dfdnet.Discriminators(4), 3.0)
    for _ in range(60):  # power iteration
        nets(torch.rand(1, 3, 64, 64))
    layers = [module for module in nets.modules() if isinstance(module, nn.Conv2d)]
    assert len(layers) >= 12
    for layer in layers:
        assert parametrize.is_parametrized(layer, "weight")
        assert torch.linalg.svdvals(layer.weight.flatten(1).detach())[0].item() == pytest.approx(1, abs=0.02)


def test_pixel_loss_is_the_mean_square_error():
    a, b = torch.randn(2, 2, 3, 5, 4)
    assert dfdnet.pixel_loss(a, b).item() == pytest.approx(((a.numpy() - b.numpy()) ** 2).mean(), rel=1e-5)


def test_perceptual_loss_is_the_second_term_of_equation_7():
    generator, weights = torch.Generator().manual_seed(0), (0.5, 1.0, 2.0, 4.0)
    shapes = [(3, 4, 8, 6), (3, 6, 4, 3), (3, 8, 2, 2), (3, 5, 1, 2)]
    ours, theirs = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    expected = 0.0
    for n in range(3):
        for weight, a, b in zip(weights, ours, theirs, strict=True):
            channels, height, width = a.shape[1:]
            expected += weight / (channels * height * width) * ((a[n].numpy() - b[n].numpy()) ** 2).sum() / 3
    assert dfdnet.perceptual_loss(ours, theirs, weights).item() == pytest.approx(expected, rel=1e-5)


def scores(seed):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(2, 1, side, side, generator=generator) + 0.5 for side in (8, 4, 2, 1)]


def test_discriminator_loss_is_the_negative_of_equation_8():
    real, fake = scores(0), scores(1)
    paper = sum(
        np.minimum(0, r.numpy() - 1).mean() + np.minimum(0, -1 - f.numpy()).mean()
        for r, f in zip(real, fake, strict=True)
    )
    assert dfdnet.discriminator_loss(real, fake).item() == pytest.approx(-paper, rel=1e-5)
    good, bad = [torch.full((1, 1, 2, 2), 1.5)] * 4, [torch.full((1, 1, 2, 2), -1.5)] * 4
    assert dfdnet.discriminator_loss(good, bad).item() == 0  # real above 1, fake below −1
    assert dfdnet.discriminator_loss(bad, good).item() == pytest.approx(4 * 5)


def test_adversarial_loss_is_equation_9_with_a_weight_for_each_scale():
    fake, weights = scores(2), (4.0, 2.0, 1.0, 0.5)
    expected = -sum(weight * f.numpy().mean() for weight, f in zip(weights, fake, strict=True))
    assert dfdnet.adversarial_loss(fake, weights).item() == pytest.approx(expected, rel=1e-5)


# Data


def test_batches_are_a_pure_function_of_seed_rank_and_step():
    faces, indices = FewFaces(), [0, 1, 2, 4]
    batches = dfdnet.Batches(faces, indices, TINY)
    degraded, target, boxes = batches[3]
    assert degraded.shape == target.shape == (2, 3, 64, 64) and boxes.shape == (2, 4, 4)
    torch.rand(7)
    again = dfdnet.Batches(faces, indices, replace(TINY, steps=9999))
    again[5], batches[0]
    assert all(torch.equal(a, b) for a, b in zip(batches[3], again[3], strict=True))
    others = [
        batches[4],
        dfdnet.Batches(faces, indices, replace(TINY, seed=1))[3],
        dfdnet.Batches(faces, indices, TINY, rank=1)[3],
    ]
    assert not any(torch.equal(degraded, other[0]) for other in others)


def test_batches_hold_only_the_faces_they_may_with_their_own_boxes_and_a_degraded_input():
    faces, indices = FewFaces(), [1, 3]
    pictures = [faces[i] for i in indices]
    seen = set()
    for step in range(8):
        degraded, target, boxes = dfdnet.Batches(faces, indices, TINY)[step]
        for low, image, box in zip(degraded, target, boxes, strict=True):
            (number,) = (i for i, face in enumerate(pictures) if torch.equal(face.image, image))
            seen.add(number)
            torch.testing.assert_close(box, common.component_boxes(pictures[number].landmarks[None], 64)[0])
            assert 1e-3 < (low - image).abs().mean() < 0.6
    assert seen == {0, 1}


# Training: Eq. (10), the schedule, learning


def arguments(folder, out, **changes):
    return SimpleNamespace(
        **{
            "data": str(folder),
            "out": str(out),
            "device": "cpu",
            "landmarks": None,
            "vggface": None,
            "aligned": False,
            "resume": False,
            "checkpoint": out / "checkpoint.pt",
            "workers": 0,
            "precision": "auto",
            "preset": None,
        }
        | changes
    )


class WatchedAdam(torch.optim.Adam):
    """Keeps what every step sees: its gradients, and whether the other optimiser's parameters have any."""

    made = []

    def __init__(self, parameters, *args, **kwargs):
        super().__init__(list(parameters), *args, **kwargs)
        self.seen = []
        self.made.append(self)

    def step(self, closure=None):
        gradients = [
            [p.grad if p.grad is None else p.grad.clone() for p in adam.param_groups[0]["params"]]
            for adam in self.made
        ]
        self.seen.append((gradients, [p.detach().clone() for p in self.param_groups[0]["params"]]))
        return super().step(closure)


@pytest.fixture(scope="module")
def watched(face_folder, tmp_path_factory):
    """Two steps of train() in float32: modules as they were before, and all gradients.

    The adversarial weights are 20 times the paper's, so that no term is small."""
    out, copies, patch = tmp_path_factory.mktemp("watched"), {}, pytest.MonkeyPatch()
    cfg = replace(
        TINY,
        steps=2,
        validate_every=2,
        residual=False,
        learning_rate=2e-4,
        clip=float("inf"),
        cooldown=0,
        weight_perceptual=dfdnet.PAPER.weight_perceptual,
        weight_adversarial=(80, 40, 20, 20),
        betas=dfdnet.PAPER.betas,
        batch=8,
    )

    class Net(dfdnet.DFDNet):
        def forward(self, degraded, boxes):
            if "net" not in copies:
                copies.update(
                    net=copy.deepcopy(self),
                    discriminators=copy.deepcopy(copies["live"]),
                    batch=(degraded, boxes),
                    trained=self,
                )
            return super().forward(degraded, boxes)

    class Nets(dfdnet.Discriminators):
        def __init__(self, *args):
            super().__init__(*args)
            copies["live"] = self

    WatchedAdam.made = []
    patch.setattr(torch.optim, "Adam", WatchedAdam)
    patch.setattr(dfdnet, "DFDNet", Net)
    patch.setattr(common, "precision", lambda kind: torch.float32)
    patch.setattr(dfdnet, "Discriminators", Nets)
    dfdnet.train(cfg, arguments(face_folder, out))
    patch.undo()
    return SimpleNamespace(cfg=cfg, out=out, folder=face_folder, adams=WatchedAdam.made, **copies)


def test_the_generator_step_reaches_all_of_the_generator_and_nothing_else(watched):
    generator, discriminators = watched.adams
    own, others = generator.seen[0][0]
    names = [name for name, _ in watched.trained.named_parameters()]
    missed = [name for name, g in zip(names, own, strict=True) if g is None or not g.any()]
    # At 64 pixels a nose may lie between the pixel centres of scale 4: nothing of it is pasted then.
    assert [name for name in missed if not name.startswith("blocks.scale4.confidence.2.")] == []
    assert all(g is None for g in others)
    assert all(p.grad is None for p in watched.trained.encoder.parameters())
    assert {id(p) for p in generator.param_groups[0]["params"]} == {
        id(p) for p in watched.trained.parameters()
    }
    assert {id(p) for p in discriminators.param_groups[0]["params"]} == {
        id(p) for p in watched.live.parameters()
    }


def test_the_discriminator_step_reaches_all_discriminators_and_not_the_generator(watched):
    generator, discriminators = watched.adams
    before, after = generator.seen[0][0][0], discriminators.seen[0][0][0]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # what its own step left there
    reached = [
        g.abs().sum() for g in discriminators.seen[0][0][1] if g.ndim > 1
    ]  # the last bias meets +1 and −1
    assert len(reached) >= 12 and all(reached)


def test_the_first_step_follows_the_gradient_of_equation_10(watched):
    """The gradients of train() against losses written out from the paper, on copies of the networks."""
    cfg, net, judges = watched.cfg, watched.net, watched.discriminators
    degraded, boxes = watched.batch
    faces = common.FaceFolder(watched.folder, 64)
    low, target, _ = dfdnet.Batches(faces, common.split_identities(faces)[0], cfg)[0]
    torch.testing.assert_close(low, degraded.contiguous())

    def gap(gradients, expected):
        a, b = (torch.cat([g.flatten().double() for g in many]) for many in (gradients, expected))
        return ((a - b).norm() / b.norm()).item()

    restored = net(degraded, boxes)
    perceptual = sum(
        weight * (a - b).square().mean()
        for weight, a, b in zip(
            (0.5, 1, 2, 4), net.encoder.features(restored), net.encoder.features(target), strict=True
        )
    )
    adversarial = -sum(
        weight * score.mean() for weight, score in zip((80, 40, 20, 20), judges(restored), strict=True)
    )
    terms = [100 * (restored - target).square().mean(), perceptual, adversarial]
    gradients = [torch.autograd.grad(term, list(net.parameters()), retain_graph=True) for term in terms]
    total = [sum(many) for many in zip(*gradients, strict=True)]
    assert gap(watched.adams[0].seen[0][0][0], total) < 0.003
    for term in gradients:  # a missing term would be noticed
        assert gap([a - b for a, b in zip(total, term, strict=True)], total) > 0.02
    hinge = -sum(
        (score[:8] - 1).clamp(max=0).mean() + (-1 - score[8:]).clamp(max=0).mean()
        for score in judges(torch.cat([target, restored.detach()]))
    )
    expected = torch.autograd.grad(hinge, list(judges.parameters()))
    assert gap(watched.adams[1].seen[0][0][1], expected) < 0.003


def test_adam_runs_with_the_rates_and_betas_of_the_config(watched):
    for adam in watched.adams:
        assert (adam.defaults["lr"], adam.defaults["betas"]) == (2e-4, (0.5, 0.999))
        assert not adam.defaults["weight_decay"]
        moved = [(b - a).abs().max() for a, b in zip(adam.seen[0][1], adam.seen[1][1], strict=True)]
        assert max(moved).item() == pytest.approx(2e-4, rel=0.05)  # a first step of Adam is ± the rate


def test_load_network_folds_spectral_norm_and_changes_no_output(watched):
    net, cfg = dfdnet.load_network(arguments(watched.folder, watched.out), torch.device("cpu"))
    assert cfg == watched.cfg
    assert not any(parametrize.is_parametrized(module) for module in net.modules())
    degraded, boxes = watched.batch
    with torch.no_grad():
        torch.testing.assert_close(
            net(degraded, boxes), watched.trained.eval()(degraded, boxes), rtol=1e-4, atol=1e-5
        )


def test_load_network_refuses_another_preset(watched):
    with pytest.raises(common.InputError, match="preset tiny"):
        dfdnet.load_network(arguments(watched.folder, watched.out, preset="paper"), torch.device("cpu"))


def test_the_rate_halves_when_the_validation_loss_stops_falling(face_folder, tmp_path, monkeypatch):
    losses = iter([5.0, 4.0] + [4.0] * 6)
    monkeypatch.setattr(dfdnet, "validate", lambda *_: (next(losses), 20.0))
    monkeypatch.setattr(dfdnet, "finish", lambda *_: None)
    WatchedAdam.made = []
    monkeypatch.setattr(torch.optim, "Adam", WatchedAdam)
    cfg = replace(TINY, steps=8, validate_every=1, patience=2, batch=1)
    dfdnet.train(cfg, arguments(face_folder, tmp_path))
    rates = [
        row["rate"] / cfg.learning_rate for row in common.load_weights(tmp_path / "checkpoint.pt")["rows"]
    ]
    cooled = 0.3 * 8  # the last steps, in which the rate falls to 0
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1 / 2, 2 / cooled / 2, 1 / cooled / 2])
    assert [adam.param_groups[0]["lr"] for adam in WatchedAdam.made] == [cfg.learning_rate / 4] * 2


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    face_folder, tmp_path, monkeypatch
):
    real, calls = dfdnet.pixel_loss, []

    def spoiled(restored, target):
        calls.append(1)
        return real(restored, target) * (math.nan if torch.is_grad_enabled() and len(calls) > 3 else 1)

    monkeypatch.setattr(dfdnet, "pixel_loss", spoiled)
    monkeypatch.setattr(dfdnet, "finish", lambda *_: None)
    cfg = replace(TINY, steps=12, validate_every=1)
    with pytest.raises(common.InputError, match="pixel.*not finite"):
        dfdnet.train(cfg, arguments(face_folder, tmp_path))
    state = common.load_weights(tmp_path / "checkpoint.pt")
    assert all(value.isfinite().all() for value in state["net"].values() if value.is_floating_point())


def test_a_short_training_improves_held_out_faces(face_folder, tmp_path, monkeypatch):
    """Seven people of 24 are held out, for an interval narrower than that of the usual two."""

    def split(faces, seed=0):
        return [
            [i for i, who in enumerate(faces.identity.tolist()) if who in people]
            for people in (range(16), range(16, 17), range(17, 24))
        ]

    monkeypatch.setattr(common, "split_identities", split)
    cfg = replace(
        dfdnet.TINY,
        size=64,
        entries=16,
        batch=8,
        steps=50,
        validate_every=50,
        learning_rate=5e-4,
        discriminator_width=8,
    )
    dfdnet.train(cfg, arguments(face_folder, tmp_path))
    task = json.loads((tmp_path / "result.json").read_text())["test"]["x4"]
    assert task["faces"] == 35
    assert task["paired_psnr_gain"]["ci95"][0] > 0
    assert task["restored"]["psnr"] > task["input"]["psnr"]


# The released network


def official_names():
    """The names in the official checkpoint, from its published structure: 386 of them."""
    spectral = ("bias", "weight_orig", "weight_u", "weight_v")
    names = [f"{part}_{width}.{i}.{kind}" for part in ("le", "re", "no", "mo")
             for width in (256, 128, 64, 32) for i in (0, 2) for kind in spectral]
    numbers = (0, 2, 5, 7), (10, 12, 14, 16), (19, 21, 23, 25), (28, 30, 32, 34)
    names += ["VggExtract.RGB_mean", "VggExtract.RGB_std"]
    names += [f"VggExtract.{path}.{n}.{kind}" for group, ns in enumerate(numbers) for n in ns
              for path in ("model.features", f"features.{group}") for kind in ("weight", "bias")]
    names += [f"VggExtract.model.classifier.{n}.{kind}" for n in (0, 3, 6) for kind in ("weight", "bias")]
    dilated = [f"MSDilate.conv{branch}.{i}" for branch in (1, 2, 3, 4) for i in (0, 2)] + ["MSDilate.convi"]
    stages = [f"up{n}.{layer}" for n in range(4) for layer in (
        "conv1.1", "convup.1", "ScaleModel1.0", "ScaleModel1.2", "ShiftModel1.0", "ShiftModel1.2")]
    to_rgb = [f"to_rgb{n}.{i}" for n in range(4) for i in (0, 2)]
    names += [f"{layer}.{kind}" for layer in (*dilated, *stages, "up4.0", *to_rgb) for kind in spectral]
    names += [f"up{n}.conv1.0.{kind}" for n in range(4) for kind in ("weight", "weight_flip")]
    plain = [f"up4.{block}.Model.{i}" for block in (2, 3) for i in (0, 2)] + ["up4.4"]
    return names + [f"{layer}.{kind}" for layer in plain for kind in ("weight", "bias")]


def test_every_tensor_of_the_released_network_has_one_official_name():
    with torch.device("meta"):
        encoder = common.VGG(last_relu=False)
        net = dfdnet.DFDNet(replace(dfdnet.RELEASED, entries=1), encoder)
    assert len(official_names()) == len(set(official_names())) == 386
    mapped = [target for name in official_names() if (target := dfdnet.released_name(name))]
    expected = [("net", name) for name in net.state_dict()]
    expected += [("encoder", name) for name in encoder.state_dict()]
    assert sorted(mapped) == sorted(expected)
    parameters = sum(p.numel() for p in net.parameters())
    assert 93.0e6 < parameters < 93.4e6          # 96.4 million, less the 3.2 million that are never used


def test_the_released_block_renorms_every_entry_and_pastes_in_order():
    sizes, generator = (3, 3, 2, 4), torch.Generator().manual_seed(5)
    block = dfdnet.ReleasedDFTBlock(6, sizes, 2, replace(dfdnet.RELEASED, entries=5)).eval()
    dictionary = {name: torch.randn(5, 6, size, size, generator=generator) + 3
                  for name, size in zip(dfdnet.PARTS, sizes, strict=True)}
    block.set_dictionary(dictionary)
    features = torch.randn(2, 6, 16, 16, generator=generator)
    boxes = torch.tensor([[[2, 3, 13.9, 12], [15, 4, 27, 15], [11, 9, 19, 18], [8, 18, 24, 31]],
                          [[1, 1, 12, 13], [10, 2, 25, 15], [9, 8, 18, 18], [7, 17, 23, 30]]])
    expected = features.clone()
    with torch.no_grad():
        for n in range(2):
            for index, name in enumerate(dfdnet.PARTS):
                x1, y1, x2, y2 = (int(v) // 2 for v in boxes[n, index].tolist())
                part = features[n, :, y1:y2, x1:x2]
                query = F.interpolate(part[None], (sizes[index],) * 2, mode="bilinear")[0]

                def moments(x):
                    return x.mean((1, 2), keepdim=True), (x.var((1, 2), keepdim=True) + 1e-5).sqrt()

                styled = [(e - moments(e)[0]) / moments(e)[1] * moments(query)[1] + moments(query)[0]
                          for e in dictionary[name]]
                best = max(range(5), key=lambda k: (styled[k].double() * query.double()).sum())
                matched = F.interpolate(styled[best][None], part.shape[1:], mode="nearest")[0]
                score = block.confidence[index].score((matched - part)[None])[0]
                expected[n, :, y1:y2, x1:x2] = part + matched * score
        torch.testing.assert_close(block(features, boxes), expected, rtol=1e-4, atol=1e-4)


def test_the_released_stage_blurs_rectifies_twice_and_bounds_the_shift():
    stage = dfdnet.ReleasedSFTStage(6, 4).eval()
    x, skip = torch.randn(2, 2, 6, 8, 8, generator=torch.Generator().manual_seed(1))
    kernel = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    padded = F.pad(x, (1, 1, 1, 1))
    blurred = sum(kernel[i, j] * padded[..., i:i + 8, j:j + 8] for i in range(3) for j in range(3))
    with torch.no_grad():
        reduced = stage.reduce(blurred)
        reduced = torch.where(reduced < 0, 0.04 * reduced, reduced)
        modulated = stage.scale(skip) * reduced + torch.sigmoid(stage.shift(skip))
        raised = F.interpolate(modulated, scale_factor=2, mode="bilinear")
        torch.testing.assert_close(stage(x, skip), F.leaky_relu(stage.widen(raised), 0.2))


def test_the_released_encoder_keeps_its_last_map_before_the_relu():
    encoder = common.VGG((1, 1, 1, 1, 1), last_relu=False)
    with torch.no_grad():
        maps = encoder.features(torch.rand(1, 3, 32, 32) * 2 - 1)
    assert [tuple(m.shape[1:]) for m in maps] == [(128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    assert all((m >= 0).all() for m in maps[:3]) and (maps[3] < 0).any()


# Restoring: the forms that are faster


def test_entries_in_half_precision_are_matched_as_in_float32():
    parts, entries = styled_data(48, 200)
    stored = dfdnet.normalise_entries(entries)
    expected = dfdnet.match_features(parts, stored.bfloat16().float())
    assert torch.equal(dfdnet.match_features(parts, stored.bfloat16()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dfdnet.match_features(parts, stored.bfloat16()), expected)
        chosen = dfdnet.match_features(parts, stored)
        assert torch.equal(chosen, dfdnet.match_features(parts.float(), stored))
    assert (expected == dfdnet.match_features(parts, stored)).float().mean() > 0.9
    assert dfdnet.match_features(parts, stored[:3].bfloat16()).max() <= 2     # fewer than the eight best


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("cadain", [True, False])
def test_a_network_made_ready_to_restore_paints_the_same(precision, cadain):
    net, cpu = network(cadain=cadain), torch.device("cpu")
    degraded = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    landmarks = common.mean_landmarks(64).expand(2, -1, -1)
    expected = dfdnet.restore(net, degraded, landmarks, precision="float32")
    net = dfdnet.for_restoration(net, cpu, precision)
    restored = dfdnet.restore(net, degraded, landmarks, precision=precision)
    if precision == "float32":
        torch.testing.assert_close(restored, expected, rtol=1e-4, atol=1e-4)
    assert common.psnr(restored, expected).min() > 35
    low = precision == "bfloat16"
    assert net.context.fuse.weight.dtype == (torch.bfloat16 if low else torch.float32)
    assert net.blocks["scale1"].nose.dtype == (torch.bfloat16 if low and cadain else torch.float32)
    assert net.blocks["scale1"].nose.is_contiguous()        # as matching reads it, whatever the rest is


def test_official_entries_are_kept_in_the_type_that_is_asked_for():
    block = dfdnet.ReleasedDFTBlock(6, (3, 3, 2, 4), 2, replace(dfdnet.RELEASED, entries=1))
    entries = torch.randn(20, 6, 2, 2, generator=torch.Generator().manual_seed(5))
    block.set_entries("nose", entries, torch.bfloat16)
    assert torch.equal(block.entries(2), dfdnet.normalise_entries(entries).bfloat16())
