"""DFDNet: every equation against an independent form, what each loss reaches."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import OVERLAPPING, WatchedAdam, gap, paste_by_loop, random, randomised, some_encoder, uniform
from torch import nn

import common
import dfdnet

NAMES = ("left_eye", "right_eye", "nose", "mouth")
TINY = replace(dfdnet.TINY, size=64, entries=6, width=8, discriminator_width=4, batch=2, validated=2)
WIDTHS = (6, 8, 10, 12)


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


# Config


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


# Data


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


# The released network


def test_entries_are_kept_in_the_type_that_is_asked_for():
    block = dfdnet.ReleasedDFTBlock(6, (3, 3, 2, 4), 2, replace(dfdnet.RELEASED, entries=1))
    entries = random(20, 6, 2, 2, seed=5)
    block.set_entries("nose", entries, torch.bfloat16)
    assert torch.equal(block.entries(2), dfdnet.normalise_entries(entries).bfloat16())
