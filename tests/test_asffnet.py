"""ASFFNet: every equation against an independent form, choice of exemplars, variants, training."""

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

import asffnet
import common

TINY = replace(
    asffnet.TINY, size=64, width=4, channels=8, discriminator_width=4, batch=2, exemplars=3
)
WIDTHS = (6, 8, 10, 12)
CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_landmarks(count, size=64, seed=3):
    """Faces of a simple layout, every point moved a little: (count,68,2) float32."""
    points, draw = torch.zeros(68, 2), generator(seed)
    groups = {
        (0, 17): (0.5, 0.6, 0.35),
        (17, 22): (0.37, 0.37, 0.09),
        (22, 27): (0.63, 0.37, 0.09),
        (27, 36): (0.5, 0.57, 0.08),
        (36, 42): (0.37, 0.46, 0.07),
        (42, 48): (0.63, 0.46, 0.07),
        (48, 68): (0.5, 0.76, 0.11),
    }
    for (first, end), (x, y, radius) in groups.items():
        turn = torch.linspace(0, 2 * math.pi, end - first + 1)[:-1] + 3
        points[first:end] = torch.stack([x + radius * turn.cos(), y + radius * turn.sin()], 1)
    stretch = 1 + 0.1 * torch.randn(count, 1, 2, generator=draw)
    moved = points * stretch + 0.03 * torch.randn(count, 1, 2, generator=draw)
    return (moved + 0.012 * torch.randn(count, 68, 2, generator=draw)) * size


def some_images(count, size=64, seed=6):
    """Smooth random pictures in [-1,1]: (count,3,size,size)."""
    low = torch.rand(count, 3, 12, 12, generator=generator(seed)) * 2 - 1
    return F.interpolate(low, size, mode="bicubic").clamp(-1, 1)


def encoder():
    torch.manual_seed(1)
    net = common.Recogniser(WIDTHS).folded()
    for layer in net.stages.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # deep features as large as shallow ones
    return net


def randomised(module):
    """Every parameter random but those under spectral norm, which are: some start at zero or near it, which
    would hide what depends on them."""
    draw = generator(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and "parametrizations" not in name:
                spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * spread)
    return module


def network(**changes):
    torch.manual_seed(2)
    cfg = replace(TINY, **changes)
    return randomised(asffnet.ASFFNet(cfg, None if cfg.train_guide else encoder())).eval()


def some_input(count=2, seed=6):
    """degraded, guide, landmarks, guide_landmarks"""
    marks = some_landmarks(2 * count, seed=seed)
    return *some_images(2 * count, seed=seed).chunk(2), *marks.chunk(2)


# Config


def test_paper_preset_has_the_papers_numbers():
    paper = asffnet.PAPER
    assert (paper.preset, paper.size, paper.exemplars, paper.blocks) == ("paper", 256, 10, 4)
    assert (paper.weight_pixel, paper.weight_perceptual) == (300, 5)
    assert (paper.weight_style, paper.weight_adversarial) == (1, 2)
    assert (paper.learning_rate, paper.betas, paper.batch) == (2e-4, (0.5, 0.999), 8)
    assert (paper.fusion, paper.adain, paper.mls, paper.train_guide) == ("asff", True, True, True)
    assert paper.patience == 0  # halved as soon as the validation loss does not fall
    assert not paper.cooldown and paper.clip == math.inf and paper.rank_every == 1
    assert not paper.residual and not paper.released
    assert (paper.encoder, paper.degradation) == ("vgg", "asffnet")
    assert set(asffnet.PRESETS) == {"tiny", "paper", "released"}


def test_variants_are_the_rows_of_tables_1_and_2():
    full, changes = asdict(asffnet.PAPER), {}
    for name, change in asffnet.VARIANTS.items():
        row = asdict(replace(asffnet.PAPER, **change))
        changes[name] = {
            k: v for k, v in row.items() if v != full[k] and k not in ("per_identity", "identities")
        }
    assert changes == {
        "full": {},
        "exemplars-1": {"exemplars": 1},
        "exemplars-3": {"exemplars": 3},
        "exemplars-5": {"exemplars": 5},
        "exemplars-10": {},
        "1-concat": {"blocks": 1, "fusion": "concat"},
        "4-concat": {"fusion": "concat"},
        "no-attention-1": {"blocks": 1, "fusion": "none"},
        "no-attention-4": {"fusion": "none"},
        "1-asff": {"blocks": 1},
        "2-asff": {"blocks": 2},
        "8-asff": {"blocks": 8},
        "no-adain": {"adain": False},
        "no-mls": {"mls": False},
        "untrained-guide-features": {"train_guide": False},
    }


def test_the_rows_of_table_1_share_their_faces_and_have_enough_of_each_person():
    rows = [replace(asffnet.TINY, **asffnet.VARIANTS[f"exemplars-{k}"]) for k in (1, 3, 5, 10)]
    assert [row.exemplars for row in rows] == [1, 3, 5, 10]
    assert len({(row.identities, row.per_identity) for row in rows}) == 1
    assert rows[0].per_identity > 10  # ten exemplars and the picture itself
    assert asffnet.TINY.per_identity > asffnet.TINY.exemplars


# Eq. (2) and (3)


def weighted_fit(source, goal, weights, similarity=False, least=None):
    """The best weighted affine map, or similarity, of points (68,2), by least squares: (2,3)."""
    source, goal = np.asarray(source, float), np.asarray(goal, float)
    root, (x, y), one, none = np.sqrt(np.asarray(weights, float)), source.T, np.ones(68), np.zeros(68)
    if similarity:
        rows = np.concatenate([np.stack([x, -y, one, none], 1), np.stack([y, x, none, one], 1)])
        twice = np.concatenate([root, root])
        a, b, u, v = np.linalg.lstsq(rows * twice[:, None], goal.T.ravel() * twice, rcond=None)[0]
        matrix = np.array([[a, -b, u], [b, a, v]])
    else:
        rows = np.stack([x, y, one], 1) * root[:, None]
        matrix = np.linalg.lstsq(rows, goal * root[:, None], rcond=least)[0].T
    return matrix


def residuals(landmarks, exemplars, weights, least=None):
    """Squared distances (B,K,68) of Eq. (2) at the optimum, from numpy's least squares; singular values
    below `least` times the largest are taken as zero."""
    result = np.zeros(exemplars.shape[:3])
    for b in range(exemplars.shape[0]):
        for k in range(exemplars.shape[1]):
            matrix = weighted_fit(exemplars[b, k], landmarks[b], weights, least=least)
            moved = exemplars[b, k].double().numpy() @ matrix[:, :2].T + matrix[:, 2]
            result[b, k] = ((moved - landmarks[b].double().numpy()) ** 2).sum(1)
    return result


def three_people(size=256):
    landmarks, exemplars = some_landmarks(3, size), some_landmarks(12, size, seed=8).view(3, 4, 68, 2)
    weights = (0.8 * torch.randn(68, generator=generator(1), dtype=torch.float64)).exp()
    return landmarks, exemplars, weights


def test_fit_affine_is_the_weighted_least_squares_solution():
    landmarks, exemplars, weights = three_people()
    affine = asffnet.fit_affine(landmarks, exemplars, weights)
    assert affine.shape == (3, 4, 2, 3) and affine.dtype == torch.float64
    for b in range(3):
        for k in range(4):
            expected = weighted_fit(exemplars[b, k], landmarks[b], weights)
            np.testing.assert_allclose(affine[b, k].numpy(), expected, rtol=1e-5, atol=1e-5)
            plain = weighted_fit(exemplars[b, k], landmarks[b], np.ones(68))
            assert np.abs(plain - expected).max() > 1e-3  # the weights matter


def test_fit_affine_is_the_closed_form_of_equation_3():
    landmarks, exemplars, weights = three_people()
    affine = asffnet.fit_affine(landmarks, exemplars, weights).numpy()
    for b in range(3):
        for k in range(4):
            degraded = landmarks[b].double().numpy().T  # 2×68, as in the paper
            guide = np.concatenate([exemplars[b, k].double().numpy().T, np.ones((1, 68))])
            w = np.diag(weights.numpy())
            expected = degraded @ w @ guide.T @ np.linalg.inv(guide @ w @ guide.T)
            np.testing.assert_allclose(affine[b, k], expected, rtol=1e-5, atol=1e-5)


def test_affine_distance_is_the_least_weighted_sum_of_squares():
    landmarks, exemplars, weights = three_people()
    distance = asffnet.affine_distance(landmarks, exemplars, weights)
    expected = residuals(landmarks, exemplars, weights) @ weights.numpy()
    np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-6)
    affine = asffnet.fit_affine(landmarks, exemplars, weights)
    tilde = F.pad(exemplars.double(), (0, 1), value=1)
    for seed in range(20):  # no other map comes nearer
        other = affine + torch.randn(affine.shape, generator=generator(seed)).double() * 1e-2
        gap = tilde @ other.transpose(2, 3) - landmarks[:, None]
        assert ((gap.square().sum(3) * weights).sum(2) > distance).all()


def test_affine_distance_of_an_affine_copy_is_zero_and_landmarks_scaled_by_s_have_s_squared():
    landmarks, exemplars, weights = three_people()
    matrix = torch.tensor([[0.8, 0.3], [-0.5, 1.4]])
    copies = landmarks[:, None] @ matrix.T + torch.tensor([30.0, -12])
    distance = asffnet.affine_distance(landmarks, torch.cat([copies, exemplars], 1), weights)
    assert distance[:, 0].max() < 1e-6 < distance[:, 1:].min()
    scaled = asffnet.affine_distance(3 * landmarks, exemplars @ matrix.T.float() - 5, weights)
    torch.testing.assert_close(scaled, 9 * distance[:, 1:], rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_distance_in_a_weight_is_that_landmarks_squared_residual():
    """A is optimal, so that its own change adds nothing (the envelope theorem)."""
    landmarks, exemplars, weights = three_people()
    weights.requires_grad_()
    distance, expected = asffnet.affine_distance(landmarks, exemplars, weights), None
    expected = residuals(landmarks, exemplars, weights.detach())
    for b, k in ((0, 0), (1, 3), (2, 1)):
        (gradient,) = torch.autograd.grad(distance[b, k], weights, retain_graph=True)
        np.testing.assert_allclose(gradient.numpy(), expected[b, k], rtol=1e-4, atol=1e-5)


def degenerate(kind):
    """68 points that do not determine an affine map."""
    along = torch.linspace(0, 1, 68)[torch.randperm(68, generator=generator(2))]
    return {
        "coincident": torch.tensor([20.25, 31.5]).repeat(68, 1),
        "at the origin": torch.zeros(68, 2),
        "horizontal": torch.stack([60 * along, torch.full((68,), 29.5)], 1),
        "vertical": torch.stack([torch.full((68,), 17.5), 3 + 60 * along], 1),
        "slanted": torch.stack([2 + 55 * along, 60 - 41 * along], 1),
        "two places": torch.where(torch.arange(68)[:, None] < 20, torch.tensor([9.5, 13.5]),
                                  torch.tensor([44.3, 50.1])),
        "all but one coincide": torch.where(torch.arange(68)[:, None] < 67, torch.tensor([9.5, 13.5]),
                                            torch.tensor([44.3, 50.1])),
    }[kind]  # fmt: skip


KINDS = ("coincident", "at the origin", "horizontal", "vertical", "slanted", "two places",
         "all but one coincide")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_exemplars_have_a_distance_and_a_gradient_without_nan(kind):
    landmarks, exemplars, weights = three_people(64)
    exemplars[:, 1] = degenerate(kind)
    weights.requires_grad_()
    assert asffnet.fit_affine(landmarks, exemplars, weights).isfinite().all()
    distance = asffnet.affine_distance(landmarks, exemplars, weights)
    plain = weights.detach()  # float32 points are nearly on a line
    expected = residuals(landmarks, exemplars, plain, least=1e-5) @ plain.numpy()
    np.testing.assert_allclose(distance.detach().numpy(), expected, rtol=1e-3)
    (gradient,) = torch.autograd.grad(distance.sum(), weights)
    assert gradient.isfinite().all()
    landmarks[0] = degenerate(kind)  # the degraded face's
    assert asffnet.affine_distance(landmarks, exemplars, weights).isfinite().all()


def test_select_takes_the_exemplar_of_the_least_distance_under_the_learned_weights():
    net = network()
    landmarks, exemplars = some_landmarks(12), some_landmarks(60, seed=8).view(12, 5, 68, 2)
    net.selection.log_weights.data = 2.5 * torch.randn(68, generator=generator(1))
    weights = net.selection.log_weights.detach().double().exp()
    expected = (residuals(landmarks, exemplars, weights) @ weights.numpy()).argmin(1)
    assert net.select(landmarks, exemplars).tolist() == expected.tolist()
    plain = residuals(landmarks, exemplars, np.ones(68)).sum(2).argmin(1)
    assert (plain != expected).any()  # the data tells the weights apart
    order = [3, 0, 4, 1, 2]  # the same picture, wherever it stands
    assert [order[k] for k in net.select(landmarks, exemplars[:, order])] == expected.tolist()


def test_distances_are_those_of_a_256_pixel_image_and_the_weights_start_as_said_and_stay_positive():
    selection = asffnet.GuidanceSelection()
    start = [1.0] * 17 + [0.1] * 10 + [1.0] * 9 + [0.1] * 32  # jaw, brows, nose, eyes and mouth
    assert selection.log_weights.exp().tolist() == pytest.approx(start)
    selection.log_weights.data.zero_()
    landmarks, exemplars, _ = three_people(64)
    small = selection(landmarks, exemplars, 64)
    expected = residuals(4 * landmarks, 4 * exemplars, np.ones(68)).sum(2)
    np.testing.assert_allclose(small.detach().numpy(), expected, rtol=1e-5)
    torch.testing.assert_close(small, selection(4 * landmarks, 4 * exemplars, 256))
    selection.log_weights.data -= 40
    assert (selection(landmarks, exemplars, 64) > 0).all()


# Eq. (4)


def test_ranking_loss_is_equation_4():
    distances = torch.tensor([[0.2, 0.9, 1.7, 0.1], [5.0, 3.1, 3.3, 9.9], [4.0, 1.0, 1.0, 1.0]]).double()
    best = [0, 1, 0]
    expected = 0.0
    for b in range(3):
        for k in range(4):
            if k != best[b]:
                expected += max(0.0, 1 - (distances[b, k] - distances[b, best[b]]).item()) / 3
    loss = asffnet.ranking_loss(distances, torch.tensor(best))
    assert loss.ndim == 0 and loss.item() == pytest.approx(expected)


def test_ranking_loss_pulls_the_best_exemplar_and_pushes_those_within_the_margin():
    distances = torch.tensor([[0.2, 0.9, 1.7, 0.1], [5.0, 3.1, 3.3, 9.9]]).double().requires_grad_()
    loss = asffnet.ranking_loss(distances, torch.tensor([0, 1]))
    (gradient,) = torch.autograd.grad(loss, distances)
    expected = torch.tensor([[2, -1, 0, -1], [0, 1, -1, 0]]).double() / 2
    torch.testing.assert_close(gradient, expected)
    assert asffnet.ranking_loss(torch.tensor([[0.0, 1.01, 7]]), torch.tensor([0])) == 0
    assert asffnet.ranking_loss(torch.tensor([[3.0]]), torch.tensor([0])) == 0  # one exemplar: no choice


def test_the_gradient_of_equation_4_in_the_weights_is_a_difference_of_squared_residuals():
    landmarks, exemplars, weights = three_people(16)  # small faces: the margin of 1 is not far
    weights, best = weights.requires_grad_(), torch.tensor([2, 0, 3])
    distances = asffnet.affine_distance(landmarks, exemplars, weights)
    (gradient,) = torch.autograd.grad(asffnet.ranking_loss(distances, best), weights)
    apart = residuals(landmarks, exemplars, weights.detach())
    values, expected, active = apart @ weights.detach().numpy(), np.zeros(68), 0
    for b in range(3):
        for k in range(4):
            if k != best[b] and values[b, k] - values[b, best[b]] < 1:
                expected, active = expected + (apart[b, best[b]] - apart[b, k]) / 3, active + 1
    assert 0 < active < 9
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-4, atol=1e-7)


class Copier(nn.Module):
    """In a network's place: it restores the guide."""

    def __init__(self):
        super().__init__()
        self.selection = asffnet.GuidanceSelection()

    def forward(self, degraded, guide, landmarks, guide_landmarks):
        assert degraded.shape == guide.shape and landmarks.shape == guide_landmarks.shape
        return guide


def test_one_step_on_the_landmark_weights_favours_the_exemplar_that_restores_best():
    net, target = Copier(), some_images(1)
    net.selection.log_weights.data.zero_()
    exemplars = target[:, None] + 0.2 * torch.randn(1, 4, 3, 64, 64, generator=generator(1))
    exemplars[:, 2] = target + 0.1
    landmarks, marks = some_landmarks(1), some_landmarks(1)[:, None].repeat(1, 4, 1, 1)
    spread = torch.tensor([0.05, 0.03, 0.1, 0.2])[:, None, None]
    marks += torch.randn(marks.shape, generator=generator(4)) * spread
    before = net.selection(landmarks, marks, 64)
    assert before.argmin() != 2
    expected = residuals(4 * landmarks, 4 * marks, np.ones(68))[0]
    optimizer = torch.optim.SGD(net.selection.parameters(), 1.0)
    loss = asffnet.rank_exemplars(
        net, optimizer, 1, torch.zeros(1, 3, 64, 64), target, landmarks, exemplars, marks
    )
    gaps = before[0] - before[0, 2]
    assert loss.item() == pytest.approx(sum(max(0, 1 - gaps[k].item()) for k in (0, 1, 3)), rel=1e-5)
    gradient = sum(expected[2] - expected[k] for k in (0, 1, 3) if gaps[k] < 1)
    moved = net.selection.log_weights.detach().numpy()
    np.testing.assert_allclose(moved, -gradient, rtol=1e-3, atol=1e-4)
    assert asffnet.ranking_loss(net.selection(landmarks, marks, 64), torch.tensor([2])) < loss


# Eq. (5)


def places(size, stride):
    """x, y in pixels of all features, (n,n,2): i covers the pixels stride·i … stride·i + stride − 1."""
    line = [np.mean(range(stride * i, stride * i + stride)) for i in range(size // stride)]
    return np.array([[(x, y) for x in line] for y in line])


def literal_mls(landmarks, guide, size, stride):
    """Eq. (5) as printed, a 3×3 inverse a position: landmarks, guide (68,2) → (n,n,2)."""
    degraded, guide = np.asarray(landmarks, float).T, np.asarray(guide, float).T
    tilde, result = np.concatenate([degraded, np.ones((1, 68))]), places(size, stride)
    for row in result:
        for p in row:
            w = np.diag([1 / np.sum((p - degraded[:, m]) ** 2) for m in range(68)])
            m_p = guide @ w @ tilde.T @ np.linalg.inv(tilde @ w @ tilde.T)
            p[:] = m_p @ (p[0], p[1], 1)
    return result


def solved_mls(landmarks, guide, size, stride, similarity=False):
    """Eq. (5) by a least squares fit a position; on a landmark, its partner in the guide."""
    landmarks, guide = np.asarray(landmarks, float), np.asarray(guide, float)
    result = places(size, stride)
    for row in result:
        for p in row:
            distance = ((landmarks - p) ** 2).sum(1)
            if (distance == 0).any():
                p[:] = guide[distance == 0].mean(0)
            else:  # from p, which p̂ does not depend on
                p[:] = weighted_fit(landmarks - p, guide, 1 / distance, similarity)[:, 2]
    return result


@pytest.mark.parametrize("stride", [4, 1])
def test_moving_least_squares_is_the_solution_of_equation_5_at_every_position(stride):
    landmarks, guide = some_landmarks(3, 32), some_landmarks(3, 32, seed=9)
    moved = asffnet.moving_least_squares(landmarks, guide, 32, stride)
    assert moved.shape == (3, 32 // stride, 32 // stride, 2) and moved.dtype == torch.float64
    for n in range(3 if stride == 4 else 1):
        expected = literal_mls(landmarks[n], guide[n], 32, stride)
        np.testing.assert_allclose(moved[n].numpy(), expected, rtol=0, atol=1e-8)
        np.testing.assert_allclose(solved_mls(landmarks[n], guide[n], 32, stride), expected, atol=1e-8)
    one_map = weighted_fit(landmarks[0], guide[0], np.ones(68))
    assert np.abs(places(32, stride) @ one_map[:, :2].T + one_map[:, 2] - moved[0].numpy()).max() > 0.3


def test_moving_least_squares_of_an_affine_copy_is_that_affine_map_and_of_itself_nothing():
    landmarks = some_landmarks(2).double()
    matrix, shift = torch.tensor([[0.7, 0.4], [-0.3, 1.2]]).double(), torch.tensor([5.0, -9]).double()
    position = torch.from_numpy(places(64, 4)).expand(2, -1, -1, -1)
    moved = asffnet.moving_least_squares(landmarks, landmarks @ matrix.T + shift, 64, 4)
    torch.testing.assert_close(moved, position @ matrix.T + shift, rtol=0, atol=1e-9)
    same = asffnet.moving_least_squares(landmarks, landmarks, 64, 4)
    torch.testing.assert_close(same, position, rtol=0, atol=1e-9)


def test_moving_least_squares_is_not_disturbed_by_mixed_precision():
    landmarks, guide = some_landmarks(2, 32), some_landmarks(2, 32, seed=9)
    expected = asffnet.moving_least_squares(landmarks, guide, 32, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(asffnet.moving_least_squares(landmarks, guide, 32, 4), expected)


def test_a_feature_on_a_landmark_goes_to_that_landmark_of_the_guide():
    landmarks, guide = some_landmarks(2, 32), some_landmarks(2, 32, seed=9)
    on = {0: (2, 3), 30: (4, 4), 51: (0, 7)}  # landmark → row, column
    for m, (row, column) in on.items():
        landmarks[:, m] = torch.tensor([4 * column + 1.5, 4 * row + 1.5])
    moved = asffnet.moving_least_squares(landmarks, guide, 32, 4)
    for n in range(2):
        expected = solved_mls(landmarks[n], guide[n], 32, 4)
        np.testing.assert_allclose(moved[n].numpy(), expected, rtol=0, atol=1e-7)
        for m, (row, column) in on.items():
            torch.testing.assert_close(moved[n, row, column], guide[n, m].double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("gap", [1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1])
def test_moving_least_squares_is_stable_as_a_feature_comes_close_to_a_landmark(gap):
    landmarks, guide = some_landmarks(1, 32).double(), some_landmarks(1, 32, seed=9).double()
    landmarks[0, 30] = torch.tensor([4 * 4 + 1.5 + 0.6 * gap, 4 * 3 + 1.5 - 0.8 * gap])
    moved = asffnet.moving_least_squares(landmarks, guide, 32, 4)[0, 3, 4].numpy()
    expected = solved_mls(landmarks[0], guide[0], 32, 4)[3, 4]
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-6)
    assert np.abs(moved - guide[0, 30].numpy()).max() < 4 * gap + 1e-6


def test_two_landmarks_in_one_place_share_the_feature_that_lies_on_them():
    landmarks, guide = some_landmarks(1, 32), some_landmarks(1, 32, seed=9)
    landmarks[0, 60] = landmarks[0, 64] = torch.tensor([17.5, 21.5])
    moved = asffnet.moving_least_squares(landmarks, guide, 32, 4)
    torch.testing.assert_close(moved[0, 5, 4], guide[0, [60, 64]].mean(0).double(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(moved[0].numpy(), solved_mls(landmarks[0], guide[0], 32, 4), atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("coincident", "at the origin")])
def test_landmarks_on_a_line_are_moved_by_the_best_similarity(kind):
    landmarks, guide = degenerate(kind)[None], some_landmarks(1, seed=9)
    moved = asffnet.moving_least_squares(landmarks, guide, 64, 4)
    expected = solved_mls(landmarks[0], guide[0], 64, 4, similarity=True)
    np.testing.assert_allclose(moved[0].numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["horizontal", "slanted"])
def test_a_line_that_is_turned_and_scaled_turns_and_scales_the_plane(kind):
    landmarks = degenerate(kind)[None].double()
    turn = torch.tensor([[0.6, -0.9], [0.9, 0.6]]).double()
    guide = landmarks @ turn.T + torch.tensor([4.0, 7])
    moved = asffnet.moving_least_squares(landmarks, guide, 64, 4)
    expected = torch.from_numpy(places(64, 4)) @ turn.T + torch.tensor([4.0, 7])
    torch.testing.assert_close(moved[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("thickness", [0.1, 1e-2, 1e-3])
def test_landmarks_near_a_line_still_have_an_affine_map(thickness):
    landmarks = degenerate("horizontal")[None].double()
    landmarks[..., 1] += 60 * thickness * torch.rand(68, generator=generator(1))
    matrix = torch.tensor([[0.7, 0.4], [-0.3, 1.2]]).double()
    moved = asffnet.moving_least_squares(landmarks, landmarks @ matrix.T, 64, 4)
    expected = torch.from_numpy(places(64, 4)) @ matrix.T
    torch.testing.assert_close(moved[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("place", [(20.25, 31.5), (0.0, 0.0), (17.5, 21.5), (-300.0, 900.0)])
def test_landmarks_in_one_place_are_moved_by_a_shift(place):
    landmarks, guide = torch.tensor(place).repeat(1, 68, 1), some_landmarks(1, seed=9)
    moved = asffnet.moving_least_squares(landmarks, guide, 64, 4)
    shift = guide[0].double().mean(0) - torch.tensor(place)  # all weights are equal
    torch.testing.assert_close(moved[0], torch.from_numpy(places(64, 4)) + shift, rtol=0, atol=1e-6)


def test_a_degenerate_face_changes_nothing_for_the_others_of_its_batch():
    landmarks, guide = some_landmarks(4, 32), some_landmarks(4, 32, seed=9)
    expected = asffnet.moving_least_squares(landmarks, guide, 32, 4)
    landmarks[1], landmarks[2], guide[3] = degenerate("coincident"), degenerate("slanted"), 11.0
    moved = asffnet.moving_least_squares(landmarks, guide, 32, 4)
    assert torch.equal(moved[0], expected[0]) and moved.isfinite().all()
    torch.testing.assert_close(moved[3], torch.full_like(moved[3], 11), rtol=0, atol=1e-6)


def test_moving_least_squares_has_the_derivatives_of_finite_differences():
    landmarks = some_landmarks(1, 8).double().requires_grad_()
    guide = some_landmarks(1, 8, seed=9).double().requires_grad_()

    def function(a, b):
        return asffnet.moving_least_squares(a, b, 8, 4)

    assert torch.autograd.gradcheck(function, (landmarks, guide), eps=1e-6, atol=1e-6, fast_mode=True)
    # On a landmark p̂ depends on that landmark of the guide alone.
    with torch.no_grad():
        landmarks[0, 30] = torch.tensor([5.5, 1.5])
    moved = function(landmarks, guide)
    for axis in (0, 1):
        a, b = torch.autograd.grad(moved[0, 0, 1, axis], (landmarks, guide), retain_graph=True)
        expected = torch.zeros(1, 68, 2).double()
        expected[0, 30, axis] = 1
        torch.testing.assert_close(b, expected, rtol=0, atol=1e-6)
        assert a.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_landmarks_have_gradients_without_nan(kind):
    landmarks, guide = degenerate(kind)[None].double(), some_landmarks(1, seed=9).double()
    landmarks.requires_grad_(), guide.requires_grad_()
    moved = asffnet.moving_least_squares(landmarks, guide, 64, 4)
    weight = torch.randn(moved.shape, generator=generator(), dtype=torch.float64)
    gradients = torch.autograd.grad((moved * weight).sum(), (landmarks, guide))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


# Eq. (6)


def literal_warp(features, positions, stride):
    """Eq. (6) with the sum over all x', y': features (B,C,h,w), positions (B,h',w',2) in pixels."""
    height, width = features.shape[2:]
    x, y = ((positions - (stride - 1) / 2) / stride).unbind(-1)
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)  # outside, the border's value
    across = (1 - (x[..., None] - torch.arange(width)).abs()).clamp(min=0)
    down = (1 - (y[..., None] - torch.arange(height)).abs()).clamp(min=0)
    return torch.einsum("bchw,bijw,bijh->bcij", features, across, down)


@pytest.mark.parametrize("stride", [1, 4])
def test_warp_features_is_equation_6(stride):
    features = torch.randn(2, 3, 9, 12, generator=generator(), dtype=torch.float64)
    positions = torch.rand(2, 7, 8, 2, generator=generator(1), dtype=torch.float64) * 70 * stride / 4 - 9
    positions[0, 0, 0], positions[0, 0, 1] = torch.tensor([1e9, -1e9]), torch.tensor([4.0 * stride, 0])
    inside = torch.rand(2, 7, 8, 2, generator=generator(1)).double() * 7 * stride + stride
    for place in (positions, inside):
        warped = asffnet.warp_features(features, place, stride)
        assert warped.shape == (2, 3, 7, 8)
        expected = literal_warp(features, place, stride)
        torch.testing.assert_close(warped.double(), expected, rtol=0, atol=1e-5)


def test_features_stay_where_they_are_when_the_positions_are_their_own():
    features = torch.randn(2, 5, 16, 16, generator=generator())
    position = torch.from_numpy(places(64, 4)).expand(2, -1, -1, -1)
    torch.testing.assert_close(asffnet.warp_features(features, position, 4), features, rtol=0, atol=1e-5)
    right = asffnet.warp_features(features, position + torch.tensor([4.0, 0]), 4)  # from the right
    torch.testing.assert_close(right[..., :-1], features[..., 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(right[..., -1], features[..., -1], rtol=0, atol=1e-5)


def test_warp_features_is_differentiable_in_features_and_positions():
    features = torch.randn(1, 3, 8, 8, generator=generator()).double().requires_grad_()
    index = torch.randint(0, 7, (1, 5, 6, 2), generator=generator(1)).double()
    part = 0.1 + 0.8 * torch.rand(1, 5, 6, 2, generator=generator(2)).double()
    positions = ((index + part) * 4 + 1.5).requires_grad_()
    weight = torch.randn(1, 3, 5, 6, generator=generator(3)).double()
    given, expected = (
        torch.autograd.grad((warp(features, positions, 4) * weight).sum(), (features, positions))
        for warp in (asffnet.warp_features, literal_warp)
    )
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Eq. (7)


def test_adain_gives_the_guide_the_mean_and_deviation_of_the_degraded_features():
    draw = generator(4)
    mean = torch.randn(2, 2, 5, 1, 1, generator=draw) * 4
    spread = torch.rand(2, 2, 5, 1, 1, generator=draw) * 3 + 0.5
    guide, features = torch.randn(2, 2, 5, 6, 7, generator=draw) * spread + mean
    styled = asffnet.adain(guide, features)
    assert styled.shape == guide.shape
    for n in range(2):
        for c in range(5):
            g, f = (x[n, c].double().numpy() for x in (guide, features))
            expected = f.std() * (g - g.mean()) / g.std() + f.mean()
            np.testing.assert_allclose(styled[n, c].numpy(), expected, rtol=1e-3, atol=1e-3)


def test_adain_forgets_the_light_of_the_guide_and_survives_flat_channels():
    guide, features = torch.randn(2, 2, 4, 8, 8, generator=generator(4))
    styled = asffnet.adain(guide, features)
    torch.testing.assert_close(asffnet.adain(7 * guide - 3, features), styled, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(asffnet.adain(features, features), features, rtol=1e-4, atol=1e-5)
    flat = torch.full_like(guide, 2.5).requires_grad_()
    result = asffnet.adain(flat, features)
    torch.testing.assert_close(result, features.mean((2, 3), keepdim=True).expand_as(result))
    dark = torch.zeros_like(guide).requires_grad_()
    gradients = torch.autograd.grad(
        (result.square() + asffnet.adain(guide, dark) ** 2).sum(), (flat, dark)
    )
    assert all(gradient.isfinite().all() for gradient in gradients)


# Eq. (8)


def three_maps(channels=8, count=2):
    return torch.randn(3, count, channels, 6, 7, generator=generator(2)).unbind(0)


def test_asff_block_is_equation_8():
    block = randomised(asffnet.ASFFBlock(8, "asff")).eval()
    features, guide, marks = three_maps()
    with torch.no_grad():
        fused, mask = block(features, guide, marks)
        own, guided = block.refine(features), block.refine_guide(guide)
    assert fused.shape == mask.shape == features.shape
    assert (mask > 0).all() and (mask < 1).all() and mask.std() > 0.01
    assert (own - guided).abs().max() > 0.5
    torch.testing.assert_close(fused, (1 - mask) * own + mask * guided, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_mask_depends_on_the_degraded_face_the_guide_and_the_landmarks(which):
    block, maps = randomised(asffnet.ASFFBlock(8, "asff")).eval(), list(three_maps())
    with torch.no_grad():
        mask = block(*maps)[1]
        maps[which] = maps[which] + 0.5
        assert (block(*maps)[1] - mask).abs().max() > 1e-3


@pytest.mark.parametrize("closed", [True, False])
def test_a_closed_mask_leaves_the_degraded_features_and_an_open_one_the_guide(closed):
    block = randomised(asffnet.ASFFBlock(8, "asff")).eval()
    last = [layer for layer in block.gate if isinstance(layer, nn.Conv2d)][-1]
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, -60.0 if closed else 60.0)
    features, guide, marks = three_maps()
    with torch.no_grad():
        fused = block(features, guide, marks)[0]
        expected = block.refine(features) if closed else block.refine_guide(guide)
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-5)


def test_without_attention_both_sides_count_half():
    block = randomised(asffnet.ASFFBlock(8, "none")).eval()
    features, guide, marks = three_maps()
    with torch.no_grad():
        fused, mask = block(features, guide, marks)
        expected = (block.refine(features) + block.refine_guide(guide)) / 2
        torch.testing.assert_close(block(features, guide, None)[0], fused)
    assert (mask == 0.5).all()
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-5)


def test_concatenation_has_no_mask_and_uses_both_sides():
    block = randomised(asffnet.ASFFBlock(8, "concat")).eval()
    features, guide, _ = three_maps()
    with torch.no_grad():
        fused, mask = block(features, guide, None)
        assert mask is None and fused.shape == features.shape
        assert (block(features + 1, guide, None)[0] - fused).abs().max() > 1e-2
        assert (block(features, guide + 1, None)[0] - fused).abs().max() > 1e-2


@pytest.mark.parametrize("fusion", ["asff", "concat", "none"])
def test_every_parameter_of_a_block_learns(fusion):
    block = randomised(asffnet.ASFFBlock(8, fusion))
    block(*three_maps())[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in block.parameters())


# Eq. (9)


@pytest.mark.parametrize("cfg", [TINY, replace(asffnet.PAPER, width=4, channels=8)])
def test_reconstruction_is_two_pixel_shuffles_with_two_residual_blocks_after_each(cfg):
    net = randomised(asffnet.Reconstruction(cfg)).eval()
    order = [type(layer).__name__ for layer in net]
    shuffles = [i for i, name in enumerate(order) if name == "PixelShuffle"]
    blocks = [i for i, name in enumerate(order) if name == "Residual"]
    assert len(shuffles) == 2 and len(blocks) == 4
    assert shuffles[0] < blocks[0] < blocks[1] < shuffles[1] < blocks[2] < blocks[3]
    seen = []
    for block in blocks:
        net[block].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    features = torch.randn(2, 8, 5, 6, generator=generator())
    with torch.no_grad():
        image = net(features)
        last = net[-1].weight
        last.mul_(50)
        assert net(features).abs().max() > 1  # not bounded
    assert image.shape == (2, 3, 20, 24)
    assert [tuple(x.shape[2:]) for x, _ in seen[:4]] == [(10, 12)] * 2 + [(20, 24)] * 2


def test_a_residual_block_adds_to_its_input():
    block = randomised(asffnet.Residual(6, 3, 1)).eval()
    x = torch.randn(1, 6, 9, 9, generator=generator())
    with torch.no_grad():
        assert (block(x) - x).abs().max() > 1e-2
        layers = [layer for layer in block.modules() if isinstance(layer, nn.Conv2d)]
        for layer in layers:  # with convolutions of zero nothing else is left
            if parametrize.is_parametrized(layer):
                parametrize.remove_parametrizations(layer, "weight")
            layer.weight.zero_(), layer.bias.zero_()
        assert len(layers) == 2 and torch.equal(block(x), x)


# Eq. (1)

BLOCKS = {"1-concat": 1, "no-attention-1": 1, "1-asff": 1, "2-asff": 2, "8-asff": 8}


@pytest.mark.parametrize("variant", asffnet.VARIANTS)
def test_every_variant_builds_runs_and_learns_with_all_its_parameters(variant):
    net = network(variant=variant, **asffnet.VARIANTS[variant])
    restored = net(*some_input())
    assert restored.shape == (2, 3, 64, 64) and restored.dtype == torch.float32
    assert restored.isfinite().all()
    blocks = [module for module in net.modules() if isinstance(module, asffnet.ASFFBlock)]
    assert len(blocks) == len(net.attention) == BLOCKS.get(variant, 4)
    kind = "concat" if "concat" in variant else "none" if "attention" in variant else "asff"
    for mask in net.attention:
        assert (mask is None) == (kind == "concat")
        if mask is not None:
            assert mask.shape == (2, 8, 16, 16) and not mask.requires_grad
            assert (mask == 0.5).all() if kind == "none" else mask.std() > 1e-3
    ((restored - 0.3).square().sum()).backward()
    missed = {
        name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-6
    }
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    expected = {"selection.log_weights"} | frozen
    assert bool(frozen) == (variant == "untrained-guide-features")
    assert all(name.startswith("extract_guide.encoder") for name in frozen)
    assert missed - {"extract_guide.channels.bias"} == expected  # AdaIN takes that bias away


@pytest.mark.parametrize("strides", [(2, 2, 1), (1, 2, 2)])
@pytest.mark.parametrize("residual_blocks", [1, 2])
def test_features_are_a_quarter_of_the_image(strides, residual_blocks):
    cfg = replace(TINY, strides=strides, residual_blocks=residual_blocks)
    extract = asffnet.feature_extractor(cfg).eval()
    with torch.no_grad():
        assert extract(some_images(2)).shape == (2, 8, 16, 16)
    assert sum(isinstance(module, asffnet.Residual) for module in extract) == 3 * residual_blocks
    assert asffnet.landmark_features(8)(torch.zeros(2, 1, 64, 64)).shape == (2, 8, 16, 16)


def test_a_batch_is_restored_as_its_faces_one_by_one():
    net, batch = network(), some_input(3)
    with torch.no_grad():
        restored = net(*batch)
        singles = torch.cat([net(*(x[i : i + 1] for x in batch)) for i in range(3)])
        swapped = net(*(x.flip(0) for x in batch))
    torch.testing.assert_close(restored, singles, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(restored, swapped.flip(0), rtol=1e-4, atol=1e-5)


def change(net, number, amount=5.0):
    """The largest change of the restored image when one of the four inputs changes."""
    batch = list(some_input())
    with torch.no_grad():
        before = net(*batch)
        other = some_input(seed=11)[number]
        batch[number] = batch[number] + amount if number == 3 else other
        return (net(*batch) - before).abs().max().item()


@pytest.mark.parametrize("fusion", ["asff", "concat", "none"])
@pytest.mark.parametrize("mls", [True, False])
def test_landmarks_matter_where_the_variant_uses_them_and_the_guide_always(fusion, mls):
    net = network(fusion=fusion, mls=mls, blocks=1, residual=False)
    assert change(net, 0) > 1e-3 and change(net, 1) > 1e-3
    assert (change(net, 2) > 1e-4) == (mls or fusion == "asff")
    assert (change(net, 3) > 1e-4) == mls


@pytest.mark.parametrize("adain", [True, False])
def test_the_light_of_the_guide_matters_without_adain_alone(adain):
    net, batch = network(adain=adain), some_input()
    with torch.no_grad():
        before = net(*batch)
        net.extract_guide.register_forward_hook(lambda module, inputs, output: 5 * output - 2)
        gap = (net(*batch) - before).abs().max()
    assert (gap < 2e-3) == adain and (adain or gap > 2e-2)


def test_without_residual_the_output_is_bounded_and_with_it_training_starts_at_the_input():
    batch = some_input()
    with torch.no_grad():
        net = network(residual=False)
        net.reconstruct[-1].weight.mul_(9)
        bounded = net(*batch)
        fresh = asffnet.ASFFNet(replace(TINY, residual=True)).eval()
        gap = (fresh(*batch) - batch[0]).flatten(2)
    assert 0.5 < bounded.abs().max() <= 1
    assert gap.std(2).max() < 1e-6


def test_blocks_follow_each_other_and_all_see_the_aligned_guide_and_the_landmarks():
    """The guide is the degraded face moved by two features to the right and one up."""
    net, calls = network(adain=False, blocks=3), []
    for block in net.blocks:
        block.register_forward_hook(lambda module, inputs, output: calls.append((*inputs, output[0])))
    degraded, guide, landmarks, _ = some_input()
    with torch.no_grad():
        net(degraded, guide, landmarks, landmarks + torch.tensor([8.0, -4]))
        plain = net.extract_guide(guide)
        own = net.extract(degraded)
        marks = net.extract_landmarks(common.landmark_mask(landmarks, 64))
    assert len(calls) == 3
    torch.testing.assert_close(calls[0][0], own)
    aligned = calls[0][1]
    torch.testing.assert_close(aligned[:, :, 1:, :-2], plain[:, :, :-1, 2:], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(aligned[:, :, 0, :-2], plain[:, :, 0, 2:], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(call[1], aligned) for call in calls)
    for call in calls:
        torch.testing.assert_close(call[2], marks)
    assert torch.equal(calls[1][0], calls[0][3]) and torch.equal(calls[2][0], calls[1][3])


def test_the_attention_masks_are_those_of_the_last_call_and_of_equation_8():
    net = network()
    outputs = []
    for block in net.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output[1]))
    with torch.no_grad():
        net(*some_input(seed=1))
        outputs.clear()
        net(*some_input(seed=2))
    assert len(net.attention) == 4
    assert all(torch.equal(a, b) for a, b in zip(net.attention, outputs, strict=True))


def test_untrained_guide_features_are_the_encoders_maps_at_a_quarter_of_the_size():
    net, guide = network(train_guide=False), some_images(2)
    expected = encoder().features(guide)[1]
    assert expected.shape[2:] == (16, 16)
    weight, bias = net.extract_guide.channels.weight, net.extract_guide.channels.bias
    mixed = torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], expected) + bias[:, None, None]
    torch.testing.assert_close(net.extract_guide(guide), mixed, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in net.extract_guide.encoder.parameters())


@pytest.mark.parametrize("kind", ["coincident", "slanted"])
def test_a_network_survives_degenerate_landmarks(kind):
    net, (degraded, guide, landmarks, guide_landmarks) = network(), some_input()
    landmarks, guide_landmarks = landmarks.clone(), guide_landmarks.clone()
    landmarks[0], guide_landmarks[1] = degenerate(kind), degenerate(kind)
    restored = net(degraded, guide, landmarks, guide_landmarks)
    restored.sum().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert restored.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


# Eq. (10) to (15)


def test_pixel_loss_is_equation_10():
    a, b = torch.randn(2, 2, 3, 5, 4, generator=generator())
    expected = sum(((a[n] - b[n]).numpy() ** 2).sum() / (3 * 5 * 4) for n in range(2)) / 2
    assert asffnet.pixel_loss(a, b).item() == pytest.approx(expected, rel=1e-5)


def four_maps(seed):
    draw = generator(seed)
    shapes = [(3, 4, 8, 6), (3, 6, 4, 3), (3, 8, 2, 2), (3, 5, 1, 2)]
    return [torch.randn(shape, generator=draw) for shape in shapes]


def test_perceptual_loss_is_equation_11():
    expected, ours, theirs = 0.0, four_maps(0), four_maps(1)
    for n in range(3):
        for a, b in zip(ours, theirs, strict=True):
            channels, height, width = a.shape[1:]
            expected += ((a[n].numpy() - b[n].numpy()) ** 2).sum() / (channels * height * width) / 3
    assert asffnet.perceptual_loss(ours, theirs).item() == pytest.approx(expected, rel=1e-5)


def test_style_loss_is_equation_13():
    expected, ours, theirs = 0.0, four_maps(0), four_maps(1)
    for n in range(3):
        for a, b in zip(ours, theirs, strict=True):
            channels, height, width = a.shape[1:]
            gap = np.zeros((channels, channels))
            for c in range(channels):
                for d in range(channels):
                    for i in range(height):
                        for j in range(width):
                            gap[c, d] += (a[n, c, i, j] * a[n, d, i, j]).item()
                            gap[c, d] -= (b[n, c, i, j] * b[n, d, i, j]).item()
            expected += (gap**2).sum() / (channels * height * width) / 3
    assert asffnet.style_loss(ours, theirs).item() == pytest.approx(expected, rel=1e-4)


def test_style_loss_ignores_where_things_are_and_keeps_its_precision():
    ours = four_maps(0)
    shuffled = [a.flatten(2)[..., torch.randperm(a[0, 0].numel(), generator=generator(1))].view(a.shape)
                for a in ours]  # fmt: skip
    assert asffnet.style_loss(ours, shuffled).item() < 1e-6 < asffnet.perceptual_loss(ours, shuffled)
    half = [a.bfloat16() for a in ours], [a.bfloat16() for a in four_maps(1)]
    exact = asffnet.style_loss(*([a.float() for a in maps] for maps in half))
    with torch.autocast("cpu", torch.bfloat16):
        assert asffnet.style_loss(*half).item() == pytest.approx(exact.item(), rel=1e-5)


def test_discriminator_loss_is_the_negative_of_equation_14():
    real, fake = 2 * torch.randn(2, 3, 1, 8, 8, generator=generator()) + 0.5
    paper = np.minimum(0, real.numpy() - 1).mean() + np.minimum(0, -1 - fake.numpy()).mean()
    assert asffnet.discriminator_loss(real, fake).item() == pytest.approx(-paper, rel=1e-5)
    good, bad = torch.full((1, 1, 2, 2), 1.5), torch.full((1, 1, 2, 2), -1.5)
    assert asffnet.discriminator_loss(good, bad).item() == 0  # real above 1, fake below −1
    assert asffnet.discriminator_loss(bad, good).item() == pytest.approx(5)


def test_adversarial_loss_is_equation_15():
    fake = torch.randn(3, 1, 8, 8, generator=generator()).requires_grad_()
    loss = asffnet.adversarial_loss(fake)
    assert loss.item() == pytest.approx(-fake.detach().numpy().mean(), rel=1e-5)
    loss.backward()
    assert torch.allclose(fake.grad, torch.tensor(-1 / 192))


def test_every_discriminator_convolution_has_spectral_norm_one():
    net = asffnet.Discriminator(4)
    for _ in range(80):  # power iteration
        scores = net(some_images(1))
    assert scores.shape[:2] == (1, 1) and 2 <= scores.shape[2] == scores.shape[3] < 64
    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert len(layers) >= 3
    for layer in layers:
        assert parametrize.is_parametrized(layer, "weight")
        largest = torch.linalg.svdvals(layer.weight.flatten(1).detach())[0].item()
        assert largest == pytest.approx(1, abs=0.02)


# Data


class Album:
    """People with `counts` pictures: red is the person, green the picture, blue grows to the right."""

    fingerprint = "album"

    def __init__(self, counts, size=32):
        self.identity = torch.cat([torch.full((count,), i) for i, count in enumerate(counts)])
        self.size = size

    def __len__(self):
        return len(self.identity)

    def __getitem__(self, i):
        image = torch.empty(3, self.size, self.size)
        image[0], image[1] = self.identity[i] / 20, i / 40
        image[2] = torch.linspace(-0.8, 0.8, self.size)
        return common.Face(image, some_landmarks(1, self.size, seed=i)[0], int(self.identity[i]))

    def damaged(self, i):
        return False

    def others(self, i):
        same = torch.nonzero(self.identity == self.identity[i])[:, 0].tolist()
        return [k for k in same if k != i]


def numbers(images):
    """Person and picture of each image (…,3,H,W) of an Album."""
    return [
        (round(red * 20), round(green * 40))
        for red, green, _ in images.mean((-2, -1)).view(-1, 3).tolist()
    ]


def test_exemplars_are_other_pictures_of_the_same_person_and_all_different_while_there_are_enough():
    faces = Album([5, 1, 4, 2])
    for i in (0, 3, 6, 9, 10):
        others, seen = faces.others(i), set()
        for seed in range(12):
            for count in (1, 2, 3, 4, 10):
                chosen = asffnet.choose_exemplars(faces, i, count, common.seeded(seed))
                assert len(chosen) == count and set(chosen) <= set(others)
                assert len(set(chosen)) == min(count, len(others))
                period = chosen[: len(others)]  # fewer than asked for: the same round again
                assert chosen == [period[k % len(period)] for k in range(count)]
            seen.add(chosen[0])
        assert seen == set(others)  # drawn, not the first ones
    assert asffnet.choose_exemplars(faces, 0, 3, common.seeded(5)) == asffnet.choose_exemplars(
        faces, 0, 3, common.seeded(5)
    )


def test_exemplars_of_rendered_faces_are_of_the_same_identity():
    faces = common.RenderedFaces(64, identities=6, per_identity=3)
    for i in range(18):
        chosen = asffnet.choose_exemplars(faces, i, 2, common.seeded(i))
        assert sorted([*chosen, i]) == [3 * (i // 3) + k for k in range(3)]


def test_people_with_one_picture_are_left_out_and_nobody_else():
    faces = Album([3, 1, 2, 1])
    assert asffnet.with_others(faces, [6, 5, 3, 0, 1]) == [5, 0, 1]
    with pytest.raises(common.InputError, match="two pictures"):
        asffnet.with_others(faces, [3, 6])
    with pytest.raises(common.InputError, match="two pictures"):
        asffnet.Batches(faces, [3, 6], TINY)


def test_batches_are_a_pure_function_of_seed_rank_and_step():
    faces, indices = Album([4, 3, 1, 5]), list(range(12))
    batches = asffnet.Batches(faces, indices, TINY)
    batch = batches[3]
    shapes = [(2, 3, 32, 32), (2, 3, 32, 32), (2, 68, 2), (2, 3, 3, 32, 32), (2, 3, 68, 2)]
    assert [tuple(part.shape) for part in batch] == shapes
    torch.rand(7), np.random.rand(3)
    again = asffnet.Batches(faces, indices, replace(TINY, steps=9999))
    again[5], batches[0]
    for other in (batches[3], again[3]):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))
    others = [
        batches[4],
        asffnet.Batches(faces, indices, replace(TINY, seed=1))[3],
        asffnet.Batches(faces, indices, TINY, rank=1)[3],
    ]
    for other in others:
        assert not torch.equal(batch[0], other[0]) and not torch.equal(batch[3], other[3])


def test_exemplars_of_a_batch_are_never_the_picture_itself_nor_another_person():
    faces, indices = Album([4, 3, 1, 5, 2]), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    cfg = replace(TINY, batch=8, exemplars=4, jitter=0.0)
    batches, seen = asffnet.Batches(faces, indices, cfg), set()
    for step in range(12):
        degraded, target, _, exemplars, _ = batches[step]
        for (person, picture), others in zip(numbers(target), exemplars, strict=True):
            assert picture in indices and picture != 7 and person == faces.identity[picture]
            for who, which in numbers(others):
                assert who == person == faces.identity[which] and which != picture
            assert len({which for _, which in numbers(others)}) == min(4, len(faces.others(picture)))
            seen.add(picture)
        assert degraded.shape == target.shape and 1e-3 < (degraded - target).abs().mean() < 0.6
    assert seen == set(indices) - {7}


def test_exemplars_of_a_batch_are_not_degraded_and_lie_where_their_landmarks_say():
    cfg = replace(TINY, batch=4, jitter=0.0, crop=0.0)
    faces = Album([4, 3, 5])
    for step in range(4):
        batch = asffnet.Batches(faces, range(12), cfg)[step]
        for image, marks, others, theirs in zip(*batch[1:], strict=True):
            images, points = torch.cat([image[None], others]), torch.cat([marks[None], theirs])
            flipped = image[2, 0, 0] > 0  # the target, and then all of them
            for (_, which), face, part in zip(numbers(images), images, points, strict=True):
                original, place = faces[which][:2]
                if flipped:
                    original, place = original.flip(2), place.clone()
                    place[:, 0] = 31 - place[:, 0]
                    place = place[mirrored_order()]
                torch.testing.assert_close(face, original, rtol=0, atol=1e-5)
                torch.testing.assert_close(part, place, rtol=0, atol=1e-4)


def mirrored_order():
    """Which point of the 68 takes which place in a mirrored face, by parts of the scheme."""
    order = list(range(68))
    for pairs in (
        [(i, 16 - i) for i in range(8)],  # jaw
        [(17 + i, 26 - i) for i in range(5)],  # brows
        [(31, 35), (32, 34)],  # nostrils
        [(36, 45), (37, 44), (38, 43), (39, 42), (40, 47), (41, 46)],  # eyes
        [(48, 54), (49, 53), (50, 52), (59, 55), (58, 56)],  # outer lips
        [(60, 64), (61, 63), (67, 65)],  # inner lips
    ):
        for a, b in pairs:
            order[a], order[b] = b, a
    return order


def bilinear(image, points):
    """image (C,H,W) at points (N,2) → (C,N)."""
    x, y = points[:, 0].double(), points[:, 1].double()
    across = (1 - (x[:, None] - torch.arange(image.shape[2])).abs()).clamp(min=0)
    down = (1 - (y[:, None] - torch.arange(image.shape[1])).abs()).clamp(min=0)
    return torch.einsum("chw,nw,nh->cn", image.double(), across, down)


def ramps(count, size=48):
    """Pictures whose red is x and whose green is y, from −0.5 to 0.5, with landmarks in their middle."""
    line = torch.linspace(-0.5, 0.5, size)
    across, down = torch.meshgrid(line, line, indexing="xy")
    image = torch.stack([across, down, torch.zeros_like(across)])
    points = size * (0.3 + 0.4 * torch.rand(count, 68, 2, generator=generator(7)))
    return image.repeat(count, 1, 1, 1), points


def test_augmented_landmarks_stay_on_what_they_marked():
    images, landmarks = ramps(4)
    flips = 0
    for seed in range(24):
        moved, points = common.augment(images, landmarks, common.seeded(seed), 0.3, 0.0)
        assert moved.shape == images.shape and points.shape == landmarks.shape
        flipped = bool(moved[0, 0, 0, 0] > moved[0, 0, 0, -1])
        flips += flipped
        scales = set()
        for n in range(4):
            marked = landmarks[n, mirrored_order()] if flipped else landmarks[n]
            torch.testing.assert_close(
                bilinear(moved[n], points[n]), bilinear(images[n], marked), rtol=0, atol=1e-4
            )
            assert (moved[n, 0, 0, 0] > moved[n, 0, 0, -1]) == flipped  # all of them or none
            steps = moved[n, 0, 24].diff().abs()[1:-1]  # the crop leaves nothing outside
            torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-2, atol=1e-5)
            scale = (1 / 47 / steps[0]).item()
            assert 0.999 <= scale <= 1.301
            scales.add(round(scale, 4))
        assert len(scales) > 1  # drawn for each
    assert 5 <= flips <= 19


def test_brightness_and_contrast_change_by_at_most_the_jitter_and_for_each_picture_otherwise():
    images, landmarks = some_images(4, 32) * 0.5, some_landmarks(4, 32)
    slopes, shifts = [], []
    for seed in range(12):
        moved, points = common.augment(images, landmarks, common.seeded(seed), 0.0, 0.2)
        for n in range(4):
            both = [images[n], images[n].flip(2)]
            after = moved[n].flatten().double()
            fits = [np.polyfit(before.flatten().double(), after, 1, full=True) for before in both]
            (slope, _), error, *_ = min(fits, key=lambda fit: fit[1][0])
            assert error[0] < 1e-6
            slopes.append(slope), shifts.append((moved[n].mean() - images[n].mean()).item())
    assert max(abs(slope - 1) for slope in slopes) <= 0.2001 and max(map(abs, shifts)) <= 0.2001
    assert np.std(slopes) > 0.05 and np.std(shifts) > 0.05
    assert abs(np.corrcoef(slopes, shifts)[0, 1]) < 0.5
    bright = common.augment(images * 2, landmarks, common.seeded(1), 0.05, 0.9)[0]
    assert bright.abs().max() <= 1


def test_a_damaged_picture_is_not_replaced_by_the_picture_it_should_guide(tmp_path):
    for person, count in (("ann", 3), ("bob", 40)):
        for shot in range(count):
            file = tmp_path / person / f"{shot:02d}.png"
            common.write_image(file, some_images(1, 32, seed=shot + 1)[0])
            marks = some_landmarks(1, 32, seed=shot)[0]
            common.write_landmarks(file.with_name(file.name + ".txt"), marks)
    damaged = tmp_path / "ann" / "01.png"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    damaged.write_bytes(content)
    faces = common.FaceFolder(tmp_path, 32)
    assert [file.name for file in faces.files[:3]] == ["00.png", "01.png", "02.png"]
    cfg = replace(TINY, jitter=0.0, crop=0.0, batch=2, exemplars=2)
    for step in range(3):
        _, target, _, exemplars, _ = asffnet.Batches(faces, [0, 1, 2], cfg)[step]
        for image, others in zip(target, exemplars, strict=True):
            assert all((image - other).abs().mean() > 0.05 for other in others)


# Restoration


def restore_input(count=5, exemplars=4):
    """degraded, landmarks, exemplars, exemplar_landmarks"""
    return (
        some_images(count),
        some_landmarks(count),
        some_images(count * exemplars, seed=2).view(count, exemplars, 3, 64, 64),
        some_landmarks(count * exemplars, seed=8).view(count, exemplars, 68, 2),
    )


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(common, "precision", lambda kind: torch.float32)


def test_restore_guides_every_face_by_the_exemplar_of_least_distance(exact):
    net, (degraded, landmarks, exemplars, marks) = network().train(), restore_input()
    net.selection.log_weights.data = torch.randn(68, generator=generator(1))
    weights = net.selection.log_weights.detach().double().exp()
    restored, chosen = asffnet.restore(net, degraded, landmarks, exemplars, marks, batch=2)
    assert net.training and restored.shape == degraded.shape and restored.dtype == torch.float32
    assert restored.abs().max() <= 1
    assert chosen.tolist() == (residuals(landmarks, marks, weights) @ weights.numpy()).argmin(1).tolist()
    assert len(set(chosen.tolist())) > 1
    net.eval()
    with torch.no_grad():
        for i, k in enumerate(chosen.tolist()):
            one = slice(i, i + 1)
            alone = net(degraded[one], exemplars[one, k], landmarks[one], marks[one, k]).clamp(-1, 1)
            torch.testing.assert_close(restored[one], alone, rtol=1e-4, atol=1e-4)


def test_restore_halves_the_batch_when_the_memory_is_full(exact, capsys, monkeypatch):
    net, batch, sizes = network(), restore_input(), []
    expected = asffnet.restore(net, *batch)
    real = net.forward

    def forward(degraded, *rest):
        sizes.append(len(degraded))
        if len(degraded) > 1:
            raise torch.cuda.OutOfMemoryError("full")
        return real(degraded, *rest)

    monkeypatch.setattr(net, "forward", forward)
    restored, chosen = asffnet.restore(net, *batch, batch=4)
    assert sizes == [4, 2, 1, 1, 1, 1, 1] and torch.equal(chosen, expected[1])
    torch.testing.assert_close(restored, expected[0], rtol=1e-4, atol=1e-4)
    assert "2 faces at a time" in capsys.readouterr().err

    def full(*_):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(net, "forward", full)
    with pytest.raises(common.InputError, match="memory"):
        asffnet.restore(net, *batch)


def test_evaluate_compares_with_the_input_on_the_same_faces_whatever_their_company(exact, monkeypatch):
    monkeypatch.setattr(common, "recogniser", lambda faces, purpose="loss": encoder())
    faces, net = common.RenderedFaces(64, identities=6, per_identity=3), network()
    for parameter in net.reconstruct[-1].parameters():
        parameter.data.zero_()  # it returns the input
    table = asffnet.evaluate(net, faces, [0, 1, 5, 8], net.cfg, CPU)
    assert set(table) == {"x4", "x8"}
    for task in table.values():
        assert task["faces"] == 4
        assert task["input"] == pytest.approx(task["restored"], rel=1e-4, abs=0.1)
        assert abs(task["paired_psnr_gain"]["mean"]) < 1e-3
    assert table["x8"]["input"]["psnr"] < table["x4"]["input"]["psnr"]
    (batch,) = asffnet.restored_batches(net, faces, [0, 1, 5, 8], net.cfg, CPU, 4)
    (alone,) = asffnet.restored_batches(net, faces, [5], net.cfg, CPU, 4)
    assert torch.equal(batch["target"][2], alone["target"][0])
    assert torch.equal(batch["guide"][2], alone["guide"][0])
    for target, guide, i in zip(batch["target"], batch["guide"], (0, 1, 5, 8), strict=True):
        assert torch.equal(target, faces[i].image)
        assert any(torch.equal(guide, faces[k].image) for k in faces.others(i))


# Training: Eq. (12), (16), (17), the landmark weights, the schedule


def arguments(folder, out, **changes):
    return SimpleNamespace(
        **{
            "data": str(folder),
            "out": str(out),
            "device": "cpu",
            "precision": "auto",
            "landmarks": None,
            "vggface": None,
            "aligned": False,
            "resume": False,
            "checkpoint": out / "checkpoint.pt",
            "workers": 0,
            "preset": None,
        }
        | changes
    )


class WatchedAdam(torch.optim.Adam):
    """Keeps what every step sees: the gradients of all optimisers, its rate and its parameters."""

    made = []

    def __init__(self, parameters, *args, **kwargs):
        super().__init__(list(parameters), *args, **kwargs)
        self.seen, self.rates = [], []
        self.made.append(self)

    def step(self, closure=None):
        gradients = [
            [p.grad if p.grad is None else p.grad.clone() for p in adam.param_groups[0]["params"]]
            for adam in self.made
        ]
        self.seen.append((gradients, [p.detach().clone() for p in self.param_groups[0]["params"]]))
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


def cheaply(patch, files=True):
    """Random networks for trained recognisers, float32; without `files`, no file but the checkpoint."""
    patch.setattr(asffnet, "load_encoder", lambda cfg, args, faces, device: encoder())
    patch.setattr(common, "recogniser", lambda faces, purpose="loss": encoder())
    patch.setattr(common, "precision", lambda kind: torch.float32)
    if not files:
        patch.setattr(common, "write_log", lambda *_: None)
        patch.setattr(asffnet, "finish", lambda *_: None)


@pytest.fixture(scope="module")
def watched(face_folder, tmp_path_factory):
    """Two steps of train() in float32: modules as they were before, and all gradients.

    The weights of the losses are such that no term is small."""
    out, copies, patch = tmp_path_factory.mktemp("watched"), {}, pytest.MonkeyPatch()
    cfg = replace(
        TINY,
        steps=2,
        validate_every=2,
        residual=False,
        learning_rate=2e-4,
        weights_rate=3e-4,
        clip=float("inf"),
        cooldown=0,
        weight_pixel=2000.0,
        weight_perceptual=300.0,
        weight_style=0.4,
        weight_adversarial=2000.0,
        rank_every=1,
        batch=4,
    )

    class Net(asffnet.ASFFNet):
        def forward(self, *batch):
            if "net" not in copies:
                copies.update(net=copy.deepcopy(self), discriminator=copy.deepcopy(copies["live"]),
                              batch=batch, trained=self)  # fmt: skip
            return super().forward(*batch)

    class Judge(asffnet.Discriminator):
        def __init__(self, *args):
            super().__init__(*args)
            copies["live"] = self

    WatchedAdam.made = []
    cheaply(patch)
    patch.setattr(torch.optim, "Adam", WatchedAdam)
    patch.setattr(asffnet, "ASFFNet", Net)
    patch.setattr(asffnet, "Discriminator", Judge)
    asffnet.train(cfg, arguments(face_folder, out))
    patch.undo()
    return SimpleNamespace(cfg=cfg, out=out, folder=face_folder, adams=WatchedAdam.made, **copies)


def learned(net):
    """Parameters of the generator step: all but the landmark weights."""
    return {name: p for name, p in net.named_parameters() if "log_weights" not in name}


def gap(gradients, expected):
    a, b = (torch.cat([g.flatten().double() for g in many]) for many in (gradients, expected))
    return ((a - b).norm() / b.norm()).item()


def test_the_generator_step_reaches_all_of_the_network_but_the_landmark_weights(watched):
    own, judge, weights = watched.adams[0].seen[0][0]
    names = list(learned(watched.trained))
    assert {id(p) for p in watched.adams[0].param_groups[0]["params"]} == {
        id(p) for p in learned(watched.trained).values()
    }
    assert [name for name, g in zip(names, own, strict=True) if g is None or not g.any()] == []
    assert all(g is None for g in (*judge, *weights))


def test_the_discriminator_step_reaches_the_discriminator_and_not_the_generator(watched):
    before, after = watched.adams[0].seen[0][0][0], watched.adams[1].seen[0][0]
    assert all(torch.equal(a, b) for a, b in zip(before, after[0], strict=True))
    assert all(g.any() for g in after[1] if g.ndim > 1) and after[2] == [None]
    live = {id(p) for p in watched.live.parameters()}
    assert {id(p) for p in watched.adams[1].param_groups[0]["params"]} == live


def test_the_network_is_guided_by_the_selected_exemplar(watched):
    degraded, guide, landmarks, guide_landmarks = watched.batch
    faces = common.FaceFolder(watched.folder, 64)
    batch = asffnet.Batches(faces, common.split_identities(faces)[0], watched.cfg)[0]
    torch.testing.assert_close(degraded.contiguous(), batch[0])
    chosen = residuals(batch[2], batch[4], np.ones(68)).sum(2).argmin(1)
    for b, k in enumerate(chosen):
        assert torch.equal(guide[b], batch[3][b, k]) and torch.equal(guide_landmarks[b], batch[4][b, k])


def test_the_first_step_follows_the_gradient_of_equation_17(watched):
    """The gradients of train() against losses written out from the paper, on copies of the networks."""
    cfg, net, judge, psi = watched.cfg, watched.net, watched.discriminator, encoder()
    faces = common.FaceFolder(watched.folder, 64)
    target = asffnet.Batches(faces, common.split_identities(faces)[0], cfg)[0][1]
    restored = net(*watched.batch)
    maps = list(zip(psi.features(restored), psi.features(target), strict=True))
    perceptual = sum((a - b).square().mean() for a, b in maps)
    style = sum(
        (torch.einsum("bchw,bdhw->bcd", a, a) - torch.einsum("bchw,bdhw->bcd", b, b)).square().sum()
        / a.numel()
        for a, b in maps
    )
    pixel, adversarial = (restored - target).square().mean(), -judge(restored).mean()
    terms = [
        cfg.weight_pixel * pixel,
        cfg.weight_perceptual * perceptual,
        cfg.weight_style * style,
        cfg.weight_adversarial * adversarial,
    ]
    parameters = list(learned(net).values())
    gradients = [torch.autograd.grad(term, parameters, retain_graph=True) for term in terms]
    total = [sum(many) for many in zip(*gradients, strict=True)]
    assert gap(watched.adams[0].seen[0][0][0], total) < 0.003
    for term in gradients:  # a missing term would be noticed
        assert gap([a - b for a, b in zip(total, term, strict=True)], total) > 0.02
    scores = judge(torch.cat([target, restored.detach()]))
    hinge = -((scores[:4] - 1).clamp(max=0).mean() + (-1 - scores[4:]).clamp(max=0).mean())
    expected = torch.autograd.grad(hinge, list(judge.parameters()))
    assert gap(watched.adams[1].seen[0][0][1], expected) < 0.003


def test_the_landmark_weights_follow_equation_4_on_one_picture(watched):
    faces = common.FaceFolder(watched.folder, 64)
    batch = asffnet.Batches(faces, common.split_identities(faces)[0], watched.cfg)[0]
    start = asffnet.GuidanceSelection().log_weights.detach().exp().numpy()
    apart = residuals(4 * batch[2], 4 * batch[4], start) * start
    values, candidates = apart.sum(2), []
    for b in range(4):
        for best in range(3):
            active = [k for k in range(3) if k != best and values[b, k] - values[b, best] < 1]
            candidates.append(sum((apart[b, best] - apart[b, k] for k in active), np.zeros(68)))
    (gradient,) = watched.adams[2].seen[0][0][2]
    assert [id(p) for p in watched.adams[2].param_groups[0]["params"]] == [
        id(watched.trained.selection.log_weights)
    ]
    errors = [np.abs(gradient.numpy() - other).max() / np.abs(apart).max() for other in candidates]
    assert min(errors) < 1e-4
    assert len(watched.adams[2].seen) == 2


def test_adam_runs_with_the_rates_and_betas_of_the_config(watched):
    for adam, rate in zip(watched.adams, (2e-4, 2e-4, 3e-4), strict=True):
        assert adam.rates == [rate, rate] and adam.defaults["betas"] == (0.5, 0.999)
        assert not adam.defaults["weight_decay"]
    for adam in watched.adams[:2]:
        moved = [(b - a).abs().max() for a, b in zip(adam.seen[0][1], adam.seen[1][1], strict=True)]
        assert max(moved).item() == pytest.approx(2e-4, rel=0.05)  # a first step of Adam is ± the rate


def test_a_run_leaves_its_files_and_the_agreed_result(watched):
    names = "checkpoint.pt config.json log.csv curves.png samples.png attention.png result.json".split()
    assert all((watched.out / name).stat().st_size > 0 for name in names)
    result = json.loads((watched.out / "result.json").read_text())
    assert set(result) == {"script", "variant", "preset", "data", "size", "steps", "seconds", "test"}
    assert set(result["test"]) == {"x4", "x8"}
    for task in result["test"].values():
        assert set(task["input"]) == set(task["restored"]) == {"psnr", "ssim", "identity"}


def test_load_network_folds_spectral_norm_and_changes_no_output(watched):
    net, cfg = asffnet.load_network(arguments(watched.folder, watched.out), CPU)
    assert cfg == watched.cfg
    assert not any(parametrize.is_parametrized(module) for module in net.modules())
    with torch.no_grad():
        expected = watched.trained.eval()(*watched.batch)
        torch.testing.assert_close(net(*watched.batch), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(net.selection.log_weights, watched.trained.selection.log_weights)
    assert net.selection.log_weights.any()


def test_load_network_refuses_another_preset(watched):
    with pytest.raises(common.InputError, match="preset tiny"):
        asffnet.load_network(arguments(watched.folder, watched.out, preset="paper"), CPU)


def test_restore_on_the_command_line_names_the_picture_that_guides(watched, tmp_path, capsys, exact):
    person = sorted(watched.folder.iterdir())[2]
    album, photo = tmp_path / "album", person / "shot_3.png"
    album.mkdir()
    for file in person.glob("shot_*"):  # the picture itself lies in the album: at distance 0
        (album / file.name).write_bytes(file.read_bytes())
    common_part = ["--restore", photo, "--checkpoint", watched.out / "checkpoint.pt", "--device", "cpu"]
    words = [*common_part, "--reference", album, "--out", tmp_path / "out"]
    assert asffnet.main([str(word) for word in words]) == 0
    assert f"guided by {album / 'shot_3.png'}" in capsys.readouterr().out
    assert len(list((tmp_path / "out").rglob("*.png"))) == 1
    with pytest.raises(common.InputError, match="--reference"):
        asffnet.main([str(word) for word in common_part])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--train --size 72", "multiple of 16"),
        ("--train --size 48", "at least 64"),
        ("--train --preset released --variant 1-asff", "--variant"),
        ("--train --variant 3-asff", "3-asff"),
        ("--train --steps 0", "--steps"),
        ("--train --evaluate", "not allowed"),
        ("", "required"),
    ],
)
def test_words_that_make_no_sense_are_refused_in_a_sentence(words, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.InputError, match=expected):
        asffnet.main([*words.split(), "--device", "cpu"])
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_equals_an_unbroken_one(face_folder, tmp_path, monkeypatch):
    cheaply(monkeypatch, files=False)
    monkeypatch.setattr(asffnet, "validate", lambda *_: (5.0, 20.0))
    cfg = replace(TINY, steps=4, validate_every=2, cooldown=0, rank_every=1, patience=0, blocks=2)
    whole, broken = arguments(face_folder, tmp_path / "a"), arguments(face_folder, tmp_path / "b")
    asffnet.train(cfg, whole)
    asffnet.train(replace(cfg, steps=2), broken)
    broken.resume = True
    asffnet.train(cfg, broken)
    a, b = (common.load_weights(args.checkpoint) for args in (whole, broken))
    assert set(a) == set(b) and a["step"] == b["step"] == 4

    def flat(value, name=""):
        if isinstance(value, dict):
            return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}").items()}
        if isinstance(value, list | tuple):
            return flat(dict(enumerate(value)), name)
        return {name: value}

    a, b = flat(a), flat(b)
    assert set(a) == set(b)
    different = [
        name for name in a
        if not (torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name])
    ]  # fmt: skip
    assert different == []


def test_the_rate_halves_when_the_validation_loss_stops_falling_and_cools_down(
    face_folder, tmp_path, monkeypatch
):
    losses = iter([5.0, 4.0, 4.0, 4.0, 3.0, 3.5, 3.5, 3.5])
    cheaply(monkeypatch, files=False)
    monkeypatch.setattr(asffnet, "validate", lambda *_: (next(losses), 20.0))
    WatchedAdam.made = []
    monkeypatch.setattr(torch.optim, "Adam", WatchedAdam)
    cfg = replace(TINY, steps=8, validate_every=1, patience=0, batch=1, cooldown=0.5, rank_every=3)
    asffnet.train(cfg, arguments(face_folder, tmp_path))
    after = [1, 1, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 16, 1 / 32]
    rows = common.load_weights(tmp_path / "checkpoint.pt")["rows"]
    cooled = [1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]  # to 0 in the last half of the steps
    used = [a * b for a, b in zip([1, *after], cooled, strict=False)]
    assert [row["rate"] / cfg.learning_rate for row in rows] == pytest.approx(used)
    assert WatchedAdam.made[0].rates == pytest.approx([cfg.learning_rate * rate for rate in used])
    assert [len(adam.seen) for adam in WatchedAdam.made] == [8, 8, 2]
    assert WatchedAdam.made[2].rates == [cfg.weights_rate] * 2


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    face_folder, tmp_path, monkeypatch
):
    cheaply(monkeypatch, files=False)
    real, calls = asffnet.pixel_loss, []

    def spoiled(restored, target):
        calls.append(1)
        return real(restored, target) * (math.nan if torch.is_grad_enabled() and len(calls) > 3 else 1)

    monkeypatch.setattr(asffnet, "pixel_loss", spoiled)
    with pytest.raises(common.InputError, match="pixel.*not finite"):
        asffnet.train(replace(TINY, steps=12, validate_every=1), arguments(face_folder, tmp_path))
    state = common.load_weights(tmp_path / "checkpoint.pt")
    assert all(value.isfinite().all() for value in state["net"].values() if value.is_floating_point())


def test_untrained_guide_features_stay_as_they_are_and_come_back_with_the_checkpoint(
    face_folder, tmp_path, monkeypatch
):
    cheaply(monkeypatch, files=False)
    cfg = replace(TINY, steps=3, validate_every=3, cooldown=0, train_guide=False)
    args = arguments(face_folder, tmp_path)
    asffnet.train(cfg, args)
    monkeypatch.undo()  # the checkpoint brings its own encoder
    net, found = asffnet.load_network(args, CPU)
    assert found == cfg and net(*some_input()).isfinite().all()
    kept, first = net.extract_guide.encoder.state_dict(), encoder().state_dict()
    assert set(kept) == set(first) and all(torch.equal(kept[name], first[name]) for name in first)


def test_networks_without_masks_draw_none(tmp_path):
    net = network(fusion="concat")
    with torch.no_grad():
        net(*some_input())
    asffnet.draw_attention(tmp_path / "attention.png", net, {"target": torch.zeros(2, 3, 64, 64)})
    assert list(tmp_path.iterdir()) == []


def test_a_short_training_improves_held_out_faces(face_folder, tmp_path, monkeypatch):
    """Seven people of 24 are held out, for an interval narrower than that of the usual two."""

    def split(faces, seed=0):
        people = (range(16), range(16, 17), range(17, 24))
        return [[i for i, who in enumerate(faces.identity.tolist()) if who in part] for part in people]

    cheaply(monkeypatch)
    monkeypatch.setattr(common, "split_identities", split)
    monkeypatch.setattr(common, "write_log", lambda *_: None)
    monkeypatch.setattr(asffnet, "draw_attention", lambda *_: None)
    cfg = replace(TINY, channels=16, batch=4, steps=45, validate_every=45, learning_rate=4e-3)
    cfg = replace(cfg, weight_perceptual=0.1, weight_style=0.0, weight_adversarial=0.0)
    asffnet.train(cfg, arguments(face_folder, tmp_path))
    for task in json.loads((tmp_path / "result.json").read_text())["test"].values():
        assert task["faces"] == 35
        assert task["paired_psnr_gain"]["ci95"][0] > 0
        assert task["restored"]["psnr"] > task["input"]["psnr"]
