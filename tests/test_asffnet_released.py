"""ASFFNet512, the network of the published weights: names, warp, mask and choice against plain loops."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import asffnet

SMALL = replace(asffnet.RELEASED, size=64, channels=16)


def official_names():
    """The 599 names of the official checkpoint, by the rule it was written with."""
    def normed(layer, bias=True):
        return [f"{layer}.{end}" for end in (["bias"] * bias + ["weight_orig", "weight_u", "weight_v"])]

    def fusion(name, last):
        gate = normed(f"{name}.MaskModel.2", False) if last else [f"{name}.MaskModel.2.weight"]
        return [*normed(f"{name}.MaskModel.0", False), *gate,
                *(x for part in ("MaskConcat", "DegradedConcat", "RefConcat")
                  for x in normed(f"{name}.{part}.0")),
                *(x for part in ("DegradedModel", "RefModel") for k in (0, 2)
                  for x in normed(f"{name}.{part}.{k}"))]

    names = fusion("sff_branch.4", True)
    for block in range(4):
        for k in range(2):
            names += fusion(f"sff_branch.{block}.sff{k}", False)
            names += [x for layer in (0, 2) for x in normed(f"sff_branch.{block}.conv{k}.{layer}")]
    layers = [f"MSDilate.conv{k}.0" for k in (1, 2, 3, 4)] + [f"MSDilate.convi.{k}" for k in (0, 2)]
    layers += [f"UpModel.{k}" for k in (1, 4, 9)]
    layers += [f"UpModel.{k}.Model{m}.{n}" for k in (3, 6, 8) for m in (0, 1) for n in (0, 2)]
    for model in ("LQ_Model", "Ref_Model"):
        layers += [f"{model}.conv{k}.0" for k in (1, 2, 3, 4)]
        layers += [f"{model}.stem{s}_{k}.stem.{n}" for s in (1, 2, 3) for k in (1, 2) for n in (0, 2)]
    layers += [f"Component_CModel.model.{k}" for k in (0, 3, 6)]
    layers += [f"Component_CModel.model.{k}.Model.{n}" for k in (2, 5) for n in (0, 2)]
    names += [x for layer in layers for x in normed(layer)]
    return names + [f"Mask_CModel.model.{k}.weight" for k in (0, 2, 4, 6, 8)]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return asffnet.build(SMALL).eval()


def landmarks(count, size, seed=0):
    """Random faces: 68 points over the middle of a size×size picture, (count,68,2)."""
    return torch.from_numpy(np.random.default_rng(seed).uniform(0.1, 0.9, (count, 68, 2)) * size).float()


def test_every_official_name_has_one_tensor_here_and_every_tensor_a_name(net):
    names = official_names()
    assert len(names) == len(set(names)) == 599
    assert sorted(map(asffnet.released_name, names)) == sorted(net.state_dict())


def test_official_tensors_have_the_shape_of_those_they_are_mapped_to():
    """A layer or two of every part, with the widths of the published network."""
    with torch.device("meta"):
        state = asffnet.ReleasedASFFNet(asffnet.RELEASED).state_dict()
    for name, shape in {
        "sff_branch.0.sff1.MaskModel.0.weight_orig": (128, 192, 3, 3),
        "sff_branch.3.sff0.DegradedConcat.0.weight_orig": (64, 128, 1, 1),
        "sff_branch.2.conv1.0.weight_orig": (128, 128, 5, 5), "sff_branch.2.conv1.2.bias": (128,),
        "sff_branch.4.MaskModel.2.weight_v": (1152,), "MSDilate.conv4.0.weight_orig": (64, 128, 3, 3),
        "MSDilate.convi.0.weight_orig": (128, 256, 3, 3), "UpModel.4.weight_orig": (64, 128, 3, 3),
        "UpModel.6.Model1.2.weight_orig": (64, 64, 3, 3), "UpModel.9.bias": (3,),
        "LQ_Model.conv3.0.weight_orig": (256, 128, 3, 3), "Ref_Model.conv4.0.weight_orig": (128, 256, 3, 3),
        "Ref_Model.stem2_1.stem.0.weight_orig": (128, 128, 3, 3),
        "Mask_CModel.model.0.weight": (16, 1, 9, 9), "Mask_CModel.model.4.weight": (64, 32, 5, 5),
        "Component_CModel.model.3.weight_orig": (128, 128, 1, 1),
    }.items():
        assert state[asffnet.released_name(name)].shape == shape, name
    sizes = [value.numel() for name, value in state.items() if not re.search(r"\._[uv]$", name)]
    assert 23.5e6 < sum(sizes) < 23.7e6


def test_the_mask_equals_drawing_point_by_point():
    points = landmarks(3, 64, seed=1)
    points[0, 20:24] = torch.tensor([[1.5, 30.0], [2.9, 40], [30, 2.5], [61.5, 20]])
    points[0, 24:28] = torch.tensor([[62.0, 20.0], [20, 62], [3, 3], [-4, 80]])
    points[1, 30] = torch.tensor([25.0, 31.0])                              # whole: six pixels wide
    expected = np.zeros((3, 1, 64, 64), np.float32)
    for mask, face in zip(expected, points.numpy()):
        for x, y in face[17:]:
            if 1 < x < 62 and 1 < y < 62:
                top, left = int(np.floor(y)) - 3, int(np.floor(x)) - 3
                if top >= 0 and left >= 0:                                   # else an empty slice
                    mask[0, top:int(np.ceil(y)) + 3, left:int(np.ceil(x)) + 3] = 1
    assert torch.equal(asffnet.released_mask(points, 64), torch.from_numpy(expected))


def test_the_warp_equals_the_fit_position_by_position():
    size, stride = 8, 4
    goal, source = landmarks(2, 32, seed=2), landmarks(2, 32, seed=3) * 0.2 + landmarks(2, 32, seed=2) * 0.8
    features = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    result = asffnet.released_warp(features, source, goal, stride)
    for b in range(2):
        p, q = (x[b, 17:].double().numpy() / stride for x in (goal, source))
        for row in range(size):
            for column in range(size):
                v = np.array([column, row], float)
                w = 1 / (((p - v) ** 2).sum(1) + 2e-8)
                ps, qs = (w[:, None] * p).sum(0) / w.sum(), (w[:, None] * q).sum(0) / w.sum()
                P, Q = ((w[:, None] * (p - ps)).T @ (x - s) for x, s in ((p, ps), (q, qs)))
                t = (v - qs) @ np.linalg.inv(Q) @ P + ps
                t = np.where((t < 0) | (t > size - 1), 0, t) - 0.5           # half a feature off
                expected = torch.zeros(3)
                for y in range(size):
                    for x in range(size):
                        weight = max(0, 1 - abs(t[0] - x)) * max(0, 1 - abs(t[1] - y))
                        expected += weight * features[b, :, y, x]
                torch.testing.assert_close(result[b, :, row, column], expected, atol=1e-4, rtol=1e-4)


def test_the_distance_equals_two_least_squares_fits():
    goal = landmarks(2, 512, seed=4)
    candidates = torch.stack([landmarks(2, 512, seed=k) for k in (5, 6, 7)], 1)
    result = asffnet.released_distance(goal, candidates)
    for b in range(2):
        for k in range(3):
            total = 0
            for share, group in ((1.01, [*range(17, 27), *range(36, 48)]), (1.49, [*range(48, 68)])):
                design = np.c_[candidates[b, k, group].double().numpy(), np.ones(len(group))]
                y = goal[b, group].double().numpy()
                total += share * np.linalg.norm(design @ np.linalg.lstsq(design, y, rcond=None)[0] - y)
            assert result[b, k].item() == pytest.approx(total, rel=1e-8)


def test_a_picture_does_not_depend_on_the_others_of_its_batch_and_every_weight_learns(net):
    draw = torch.Generator().manual_seed(1)
    degraded, guide = (torch.rand(2, 3, 64, 64, generator=draw) * 2 - 1 for _ in range(2))
    marks, guide_marks = landmarks(2, 64, seed=8), landmarks(2, 64, seed=9)
    both = net(degraded, guide, marks, guide_marks)
    assert both.shape == (2, 3, 64, 64) and both.abs().max() <= 1
    for b in range(2):
        one = slice(b, b + 1)
        torch.testing.assert_close(net(degraded[one], guide[one], marks[one], guide_marks[one]), both[one],
                                   atol=1e-5, rtol=1e-4)
    assert len(net.attention) == 5
    both.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in net.parameters())
    net.zero_grad()
