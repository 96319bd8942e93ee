"""ASFFNet: every equation against an independent form, data, training, the released network."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import WatchedAdam, gap
from conftest import some_encoder as encoder
from torch import nn
from torch.nn.utils import parametrize

import asffnet
import common

TINY = replace(asffnet.TINY, size=64, width=4, channels=8, discriminator_width=4, batch=2,
               exemplars=3, training_exemplars=3, rank_every=1, validated=4, tested=4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_landmarks(count, size=64, seed=3):
    """Faces of a simple layout, every point moved a little: (count,68,2) float32."""
    points = torch.zeros(68, 2)
    draw = generator(seed)
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


def some_input(count=2, seed=6):
    """degraded, guide, landmarks, guide_landmarks"""
    degraded, guide = some_images(2 * count, seed=seed).chunk(2)
    landmarks, guide_landmarks = some_landmarks(2 * count, seed=seed).chunk(2)
    return degraded, guide, landmarks, guide_landmarks


def randomised(module):
    """Every weight random: some begin at zero or near it, which would hide what depends on them."""
    draw = generator(5)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.requires_grad and "parametrizations" not in name:
                spread = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.2
                weight.copy_(torch.randn(weight.shape, generator=draw) * spread)
    return module


def network(**changes):
    torch.manual_seed(2)
    cfg = replace(TINY, **changes)
    return randomised(asffnet.ASFFNet(cfg, None if cfg.train_guide else encoder())).eval()


# ----------------------------------------------------------------------------------- Config

def test_the_rows_of_table_1_train_the_same_network_and_differ_in_evaluation_alone():
    rows = [replace(asffnet.PAPER, **asffnet.VARIANTS[f"exemplars-{k}"]) for k in (1, 3, 5, 10)]
    assert [row.exemplars for row in rows] == [1, 3, 5, 10]
    assert len({replace(row, exemplars=0) for row in rows}) == 1
    faces = Album([4, 3, 5])
    batches = [asffnet.Batches(faces, range(12), replace(TINY, exemplars=k))[2] for k in (1, 3)]
    for one, three in zip(*batches, strict=True):
        assert torch.equal(one, three)
    assert batches[0][3].shape[1] == TINY.training_exemplars


# ---------------------------------------------------------------------------- Eq. (2) and (3)

def weighted_fit(source, goal, weights, similarity=False, least=None):
    """The best weighted affine map, or similarity, of points (68,2), by least squares: (2,3)."""
    source, goal = np.asarray(source, float), np.asarray(goal, float)
    root = np.sqrt(np.asarray(weights, float))
    x, y = source.T
    one, none = np.ones(68), np.zeros(68)
    if similarity:
        rows = np.concatenate([np.stack([x, -y, one, none], 1), np.stack([y, x, none, one], 1)])
        twice = np.concatenate([root, root])
        a, b, u, v = np.linalg.lstsq(rows * twice[:, None], goal.T.ravel() * twice, rcond=None)[0]
        return np.array([[a, -b, u], [b, a, v]])
    rows = np.stack([x, y, one], 1) * root[:, None]
    return np.linalg.lstsq(rows, goal * root[:, None], rcond=least)[0].T


def residuals(landmarks, exemplars, weights, least=None):
    """Squared distances (B,K,68) of Eq. (2) at the optimum, from numpy's least squares; singular
    values below `least` times the largest are taken as zero."""
    result = np.zeros(exemplars.shape[:3])
    for b in range(exemplars.shape[0]):
        for k in range(exemplars.shape[1]):
            matrix = weighted_fit(exemplars[b, k], landmarks[b], weights, least=least)
            moved = exemplars[b, k].double().numpy() @ matrix[:, :2].T + matrix[:, 2]
            result[b, k] = ((moved - landmarks[b].double().numpy()) ** 2).sum(1)
    return result


def three_people(size=256):
    landmarks = some_landmarks(3, size)
    exemplars = some_landmarks(12, size, seed=8).view(3, 4, 68, 2)
    weights = (0.8 * torch.randn(68, generator=generator(1), dtype=torch.float64)).exp()
    return landmarks, exemplars, weights


def test_fit_affine_is_the_closed_form_of_equation_3_and_the_least_squares_solution():
    landmarks, exemplars, weights = three_people()
    affine = asffnet.fit_affine(landmarks, exemplars, weights)
    assert affine.shape == (3, 4, 2, 3) and affine.dtype == torch.float64
    w = np.diag(weights.numpy())
    for b in range(3):
        for k in range(4):
            degraded = landmarks[b].double().numpy().T                    # 2×68, as in the paper
            guide = np.concatenate([exemplars[b, k].double().numpy().T, np.ones((1, 68))])
            closed = degraded @ w @ guide.T @ np.linalg.inv(guide @ w @ guide.T)
            np.testing.assert_allclose(affine[b, k], closed, rtol=1e-5, atol=1e-5)
            solved = weighted_fit(exemplars[b, k], landmarks[b], weights)
            np.testing.assert_allclose(affine[b, k], solved, rtol=1e-5, atol=1e-5)
            plain = weighted_fit(exemplars[b, k], landmarks[b], np.ones(68))
            assert np.abs(plain - solved).max() > 1e-3                    # the weights matter


def test_affine_distance_is_the_least_weighted_sum_of_squares():
    landmarks, exemplars, weights = three_people()
    distance = asffnet.affine_distance(landmarks, exemplars, weights)
    expected = residuals(landmarks, exemplars, weights) @ weights.numpy()
    np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-6)
    matrix = torch.tensor([[0.8, 0.3], [-0.5, 1.4]])
    copy = landmarks[:, None] @ matrix.T + torch.tensor([30.0, -12])       # nothing to move
    assert asffnet.affine_distance(landmarks, copy, weights).max() < 1e-6
    larger = asffnet.affine_distance(3 * landmarks, exemplars @ matrix.T - 5, weights)
    torch.testing.assert_close(larger, 9 * distance, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_distance_in_a_weight_is_that_landmarks_squared_residual():
    """A is optimal, so that its own change adds nothing (the envelope theorem)."""
    landmarks, exemplars, weights = three_people()
    expected = residuals(landmarks, exemplars, weights)
    weights.requires_grad_()
    distance = asffnet.affine_distance(landmarks, exemplars, weights)
    for b, k in ((0, 0), (1, 3), (2, 1)):
        gradient, = torch.autograd.grad(distance[b, k], weights, retain_graph=True)
        np.testing.assert_allclose(gradient.numpy(), expected[b, k], rtol=1e-4, atol=1e-5)


KINDS = ("coincident", "at the origin", "horizontal", "vertical", "slanted", "two places",
         "all but one coincide")


def degenerate(kind):
    """68 points that do not determine an affine map."""
    along = torch.linspace(0, 1, 68)[torch.randperm(68, generator=generator(2))]
    if kind in ("two places", "all but one coincide"):
        first = torch.arange(68)[:, None] < (20 if kind == "two places" else 67)
        return torch.where(first, torch.tensor([9.5, 13.5]), torch.tensor([44.3, 50.1]))
    return {
        "coincident": torch.tensor([20.25, 31.5]).repeat(68, 1),
        "at the origin": torch.zeros(68, 2),
        "horizontal": torch.stack([60 * along, torch.full((68,), 29.5)], 1),
        "vertical": torch.stack([torch.full((68,), 17.5), 3 + 60 * along], 1),
        "slanted": torch.stack([2 + 55 * along, 60 - 41 * along], 1),
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_exemplars_have_a_distance_and_a_gradient_without_nan(kind):
    landmarks, exemplars, weights = three_people(64)
    exemplars[:, 1] = degenerate(kind)
    # float32 points are nearly on a line: singular values of rounding are none.
    expected = residuals(landmarks, exemplars, weights, least=1e-5) @ weights.numpy()
    weights.requires_grad_()
    distance = asffnet.affine_distance(landmarks, exemplars, weights)
    np.testing.assert_allclose(distance.detach().numpy(), expected, rtol=1e-3)
    gradient, = torch.autograd.grad(distance.sum(), weights)
    assert gradient.isfinite().all()
    landmarks[0] = degenerate(kind)                                        # the degraded face's
    assert asffnet.affine_distance(landmarks, exemplars, weights).isfinite().all()


def test_select_takes_the_exemplar_of_the_least_distance_under_the_learned_weights():
    net = network()
    landmarks, exemplars = some_landmarks(12), some_landmarks(60, seed=8).view(12, 5, 68, 2)
    net.selection.log_weights.data = 2.5 * torch.randn(68, generator=generator(1))
    weights = net.selection.log_weights.double().exp()
    expected = (residuals(landmarks, exemplars, weights) @ weights.numpy()).argmin(1)
    assert net.select(landmarks, exemplars).tolist() == expected.tolist()
    plain = residuals(landmarks, exemplars, np.ones(68)).sum(2).argmin(1)
    assert (plain != expected).any()                                # the data tells them apart
    order = [3, 0, 4, 1, 2]                                         # wherever a picture stands
    assert [order[k] for k in net.select(landmarks, exemplars[:, order])] == expected.tolist()


def test_distances_are_those_of_a_256_pixel_image_and_the_weights_start_as_said():
    selection = asffnet.GuidanceSelection()
    start = [1.0] * 17 + [0.1] * 10 + [1.0] * 9 + [0.1] * 32    # jaw, brows, nose, eyes and mouth
    assert selection.log_weights.exp().tolist() == pytest.approx(start)
    landmarks, exemplars, _ = three_people(64)
    small = selection(landmarks, exemplars, 64)
    expected = residuals(4 * landmarks, 4 * exemplars, start) @ np.array(start)
    np.testing.assert_allclose(small.numpy(), expected, rtol=1e-5)
    selection.log_weights.data -= 40
    assert (selection(landmarks, exemplars, 64) > 0).all()                # weights stay positive


# ----------------------------------------------------------------------------------- Eq. (4)

def test_ranking_loss_is_equation_4_and_pulls_the_best_exemplar():
    values = [[0.2, 0.9, 1.7, 0.1], [5.0, 3.1, 3.3, 9.9]]
    best = [0, 1]
    expected = 0.0
    for b in range(2):
        for k in range(4):
            if k != best[b]:
                expected += max(0.0, 1 - (values[b][k] - values[b][best[b]])) / 2
    distances = torch.tensor(values).double().requires_grad_()
    loss = asffnet.ranking_loss(distances, torch.tensor(best))
    assert loss.ndim == 0 and loss.item() == pytest.approx(expected)
    gradient, = torch.autograd.grad(loss, distances)
    pull = torch.tensor([[2, -1, 0, -1], [0, 1, -1, 0]]).double() / 2
    torch.testing.assert_close(gradient, pull, rtol=0, atol=1e-6)
    assert asffnet.ranking_loss(torch.tensor([[0.0, 1.01, 7]]), torch.tensor([0])) == 0
    assert asffnet.ranking_loss(torch.tensor([[3.0]]), torch.tensor([0])) == 0    # no choice


class Copier(nn.Module):
    """In a network's place: it restores the guide."""

    cfg = TINY

    def __init__(self):
        super().__init__()
        self.selection = asffnet.GuidanceSelection().requires_grad_(True)

    def forward(self, degraded, guide, landmarks, guide_landmarks):
        assert degraded.shape == guide.shape and landmarks.shape == guide_landmarks.shape
        return guide


def test_one_step_on_the_landmark_weights_favours_the_exemplars_that_restore_best():
    net, target = Copier(), some_images(2)
    net.selection.log_weights.data.zero_()
    exemplars = target[:, None] + 0.2 * torch.randn(2, 4, 3, 64, 64, generator=generator(1))
    best = [2, 0]
    landmarks = some_landmarks(2)
    marks = landmarks[:, None].repeat(1, 4, 1, 1)
    spread = torch.tensor([[0.05, 0.03, 0.1, 0.2], [0.1, 0.04, 0.06, 0.03]])
    marks += torch.randn(marks.shape, generator=generator(4)) * spread[..., None, None]
    for b in range(2):
        exemplars[b, best[b]] = target[b] + 0.1
    before = net.selection(landmarks, marks, 64).detach()
    assert before.argmin(1).tolist() != best
    apart = residuals(4 * landmarks, 4 * marks, np.ones(68))
    loss, gradient = 0.0, np.zeros(68)
    for b in range(2):
        for k in range(4):
            gap = (before[b, k] - before[b, best[b]]).item()
            if k != best[b] and gap < 1:
                loss += (1 - gap) / 2
                gradient += (apart[b, best[b]] - apart[b, k]) / 2          # at weights of 1
    optimizer = torch.optim.SGD(net.selection.parameters(), 1.0)
    batch = torch.zeros(2, 3, 64, 64), target, landmarks, exemplars, marks
    args = SimpleNamespace(device=torch.device("cpu"), precision="float32")
    found = asffnet.rank_exemplars(net, net.selection, optimizer, batch, args)
    assert found.item() == pytest.approx(loss, rel=1e-5)
    moved = net.selection.log_weights.detach().numpy()
    np.testing.assert_allclose(moved, -gradient, rtol=1e-3, atol=1e-4)
    after = asffnet.ranking_loss(net.selection(landmarks, marks, 64), torch.tensor(best))
    assert after < found


# ----------------------------------------------------------------------------------- Eq. (5)

def places(size, stride):
    """x, y in pixels of all features, (n,n,2): i covers pixels stride·i … stride·i + stride − 1."""
    line = [np.mean(range(stride * i, stride * i + stride)) for i in range(size // stride)]
    return np.array([[(x, y) for x in line] for y in line])


def literal_mls(landmarks, guide, size, stride):
    """Eq. (5) as printed, a 3×3 inverse a position: landmarks, guide (68,2) → (n,n,2)."""
    degraded, guide = np.asarray(landmarks, float).T, np.asarray(guide, float).T
    tilde = np.concatenate([degraded, np.ones((1, 68))])
    result = places(size, stride)
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
            else:                                        # from p, which p̂ does not depend on
                p[:] = weighted_fit(landmarks - p, guide, 1 / distance, similarity)[:, 2]
    return result


@pytest.mark.parametrize("stride", [4, 1])
def test_moving_least_squares_is_the_solution_of_equation_5_at_every_position(stride):
    landmarks, guide = some_landmarks(2, 16), some_landmarks(2, 16, seed=9)
    moved = asffnet.moving_least_squares(landmarks, guide, 16, stride)
    assert moved.shape == (2, 16 // stride, 16 // stride, 2) and moved.dtype == torch.float64
    for n in range(2):
        expected = literal_mls(landmarks[n], guide[n], 16, stride)
        np.testing.assert_allclose(moved[n].numpy(), expected, rtol=0, atol=1e-7)
        solved = solved_mls(landmarks[n], guide[n], 16, stride)
        np.testing.assert_allclose(solved, expected, rtol=0, atol=1e-7)
    one_map = weighted_fit(landmarks[0], guide[0], np.ones(68))
    assert np.abs(places(16, stride) @ one_map[:, :2].T + one_map[:, 2] - moved[0].numpy()).max() > 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(asffnet.moving_least_squares(landmarks, guide, 16, stride), moved)


def test_the_weights_of_equation_5_are_inverse_squares_and_finite_on_a_landmark():
    offsets = torch.tensor([[[[3.0, 4], [0, 1], [2, 0]], [[0, 0], [1, 0], [0, 2]]]]).double()
    weights = asffnet.nearness(offsets)[..., 0]
    expected = torch.tensor([1 / 25, 1, 1 / 4]).double()
    torch.testing.assert_close(weights[0, 0], expected / expected.sum())
    assert weights.isfinite().all() and weights[0, 1, 0] > 1 - 1e-10


@pytest.mark.parametrize("gap", [0, 1e-9, 1e-6, 1e-3, 0.1])
def test_moving_least_squares_is_stable_as_a_feature_comes_close_to_a_landmark(gap):
    landmarks, guide = some_landmarks(1, 32).double(), some_landmarks(1, 32, seed=9).double()
    landmarks[0, 30] = torch.tensor([4 * 4 + 1.5 + 0.6 * gap, 4 * 3 + 1.5 - 0.8 * gap])
    moved = asffnet.moving_least_squares(landmarks, guide, 32, 4)[0, 3, 4].numpy()
    expected = solved_mls(landmarks[0], guide[0], 32, 4)[3, 4]
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-6)
    assert np.abs(moved - guide[0, 30].numpy()).max() < 4 * gap + 1e-6


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in KINDS[:2]])
def test_landmarks_on_a_line_are_moved_by_the_best_similarity(kind):
    landmarks, guide = degenerate(kind)[None], some_landmarks(1, seed=9)
    moved = asffnet.moving_least_squares(landmarks, guide, 64, 4)
    expected = solved_mls(landmarks[0], guide[0], 64, 4, similarity=True)
    np.testing.assert_allclose(moved[0].numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", [(20.25, 31.5), (17.5, 21.5), (-300.0, 900.0)])
def test_landmarks_in_one_place_are_moved_by_a_shift(place):
    landmarks, guide = torch.tensor(place).repeat(1, 68, 1), some_landmarks(1, seed=9)
    moved = asffnet.moving_least_squares(landmarks, guide, 64, 4)
    shift = guide[0].double().mean(0) - torch.tensor(place)              # all weights are equal
    torch.testing.assert_close(moved[0], torch.from_numpy(places(64, 4)) + shift, rtol=0, atol=1e-6)


def test_moving_least_squares_has_the_derivatives_of_finite_differences():
    landmarks = some_landmarks(1, 8).double().requires_grad_()
    guide = some_landmarks(1, 8, seed=9).double().requires_grad_()

    def function(a, b):
        return asffnet.moving_least_squares(a, b, 8, 4)

    assert torch.autograd.gradcheck(function, (landmarks, guide), eps=1e-6, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_landmarks_have_gradients_without_nan(kind):
    landmarks, guide = degenerate(kind)[None].double(), some_landmarks(1, seed=9).double()
    landmarks.requires_grad_(), guide.requires_grad_()
    moved = asffnet.moving_least_squares(landmarks, guide, 64, 4)
    weight = torch.randn(moved.shape, generator=generator(), dtype=torch.float64)
    gradients = torch.autograd.grad((moved * weight).sum(), (landmarks, guide))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


# ----------------------------------------------------------------------------------- Eq. (6)

def literal_warp(features, positions, stride):
    """Eq. (6) with the sum over all x', y': features (B,C,h,w), positions (B,h',w',2) in pixels."""
    height, width = features.shape[2:]
    x, y = ((positions - (stride - 1) / 2) / stride).unbind(-1)
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)         # outside, the border's value
    across = (1 - (x[..., None] - torch.arange(width)).abs()).clamp(min=0)
    down = (1 - (y[..., None] - torch.arange(height)).abs()).clamp(min=0)
    return torch.einsum("bchw,bijw,bijh->bcij", features, across, down)


@pytest.mark.parametrize("stride", [1, 4])
def test_warp_features_is_equation_6(stride):
    features = torch.randn(2, 3, 9, 12, generator=generator(), dtype=torch.float64)
    positions = torch.rand(2, 7, 8, 2, generator=generator(1), dtype=torch.float64) * 70 * stride / 4 - 9
    positions[0, 0, 0], positions[0, 0, 1] = torch.tensor([1e9, -1e9]), torch.tensor([4.0 * stride, 0])
    warped = asffnet.warp_features(features, positions, stride)
    assert warped.shape == (2, 3, 7, 8)
    expected = literal_warp(features, positions, stride)
    torch.testing.assert_close(warped.double(), expected, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------- Eq. (7)

def test_adain_gives_the_guide_the_mean_and_deviation_of_the_degraded_features():
    draw = generator(4)
    mean = torch.randn(2, 2, 5, 1, 1, generator=draw) * 4
    spread = torch.rand(2, 2, 5, 1, 1, generator=draw) * 3 + 0.5
    guide, features = torch.randn(2, 2, 5, 6, 7, generator=draw) * spread + mean
    styled = asffnet.adain(guide, features)
    for n in range(2):
        for c in range(5):
            g, f = guide[n, c].double().numpy(), features[n, c].double().numpy()
            expected = f.std() * (g - g.mean()) / g.std() + f.mean()
            np.testing.assert_allclose(styled[n, c].numpy(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(asffnet.adain(7 * guide - 3, features), styled, rtol=1e-3, atol=1e-3)


def test_adain_survives_flat_channels():
    guide, features = torch.randn(2, 2, 4, 8, 8, generator=generator(4))
    flat = torch.full_like(guide, 2.5).requires_grad_()
    result = asffnet.adain(flat, features)
    torch.testing.assert_close(result, features.mean((2, 3), keepdim=True).expand_as(result))
    dark = torch.zeros_like(guide).requires_grad_()
    total = (result.square() + asffnet.adain(guide, dark) ** 2).sum()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(total, (flat, dark)))


# ----------------------------------------------------------------------------------- Eq. (8)

def three_maps(channels=8, count=2):
    return torch.randn(3, count, channels, 6, 7, generator=generator(2)).unbind(0)


def test_asff_block_is_equation_8():
    block = randomised(asffnet.ASFFBlock(8, "asff")).eval()
    features, guide, marks = three_maps()
    with torch.no_grad():
        fused, mask = block(features, guide, marks)
        own, guided = block.refine(features), block.refine_guide(guide)
    assert (mask > 0).all() and (mask < 1).all() and mask.std() > 0.01
    assert (own - guided).abs().max() > 0.5
    torch.testing.assert_close(fused, (1 - mask) * own + mask * guided, rtol=1e-4, atol=1e-5)


def test_the_gate_sees_the_features_themselves_not_the_refined_ones():
    """F^m is made of F^d, F^g,w,a and F^l: F_d and F_g have no part in it."""
    block = randomised(asffnet.ASFFBlock(8, "asff")).eval()
    features, guide, marks = three_maps()
    with torch.no_grad():
        mask = block(features, guide, marks)[1]
        by_hand = block.gate(torch.cat([block.reduce_landmarks(marks), block.reduce(features),
                                        block.reduce_guide(guide)], 1))
        torch.testing.assert_close(mask, by_hand)
        for refine in (block.refine, block.refine_guide):
            for weight in refine.parameters():
                weight.add_(1.0)
        assert torch.equal(block(features, guide, marks)[1], mask)
        for which in range(3):
            maps = [features, guide, marks]
            maps[which] = maps[which] + 0.5
            assert (block(*maps)[1] - mask).abs().max() > 1e-3


def test_without_attention_both_sides_count_half_and_concatenation_has_no_mask():
    features, guide, _ = three_maps()
    half, both = (randomised(asffnet.ASFFBlock(8, fusion)).eval() for fusion in ("none", "concat"))
    with torch.no_grad():
        fused, mask = half(features, guide, None)
        expected = (half.refine(features) + half.refine_guide(guide)) / 2
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-5)
        assert (mask == 0.5).all()
        fused, mask = both(features, guide, None)
        assert mask is None and fused.shape == features.shape
        assert (both(features + 1, guide, None)[0] - fused).abs().max() > 1e-2
        assert (both(features, guide + 1, None)[0] - fused).abs().max() > 1e-2


# ----------------------------------------------------------------------------------- Eq. (9)

@pytest.mark.parametrize("cfg", [TINY, replace(asffnet.PAPER, width=4, channels=8)])
def test_reconstruction_is_two_pixel_shuffles_with_two_residual_blocks_after_each(cfg):
    net = randomised(asffnet.Reconstruction(cfg)).eval()
    order = [type(layer).__name__ for layer in net]
    wanted = [name for name in order if name in ("PixelShuffle", "Residual")]
    assert wanted == ["PixelShuffle", "Residual", "Residual"] * 2
    sizes = []
    for layer in net:
        if isinstance(layer, asffnet.Residual):
            layer.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[2]))
    with torch.no_grad():
        assert net(torch.randn(2, 8, 5, 6, generator=generator())).shape == (2, 3, 20, 24)
    assert sizes == [10, 10, 20, 20]


# ----------------------------------------------------------------------------------- Eq. (1)

BLOCKS = {"1-concat": 1, "no-attention-1": 1, "1-asff": 1, "2-asff": 2, "8-asff": 8}


@pytest.mark.parametrize("variant", [name for name in asffnet.VARIANTS if name not in asffnet.TABLE_1])
def test_every_variant_runs_and_learns_with_all_its_parameters(variant):
    net = network(variant=variant, **asffnet.VARIANTS[variant])
    restored = net(*some_input())
    assert restored.shape == (2, 3, 64, 64) and restored.dtype == torch.float32
    assert len(net.blocks) == BLOCKS.get(variant, 4)
    assert len(net.attention) == (0 if "concat" in variant else len(net.blocks))
    for mask in net.attention:
        assert mask.shape == (2, 8, 16, 16) and not mask.requires_grad
        assert (mask == 0.5).all() if "attention" in variant else mask.std() > 1e-3
    (restored - 0.3).square().sum().backward()
    frozen, unlearned = set(), set()
    for name, weight in net.named_parameters():
        if not weight.requires_grad:
            frozen.add(name)
        elif weight.grad is None or not weight.grad.abs().max() > 1e-6:
            unlearned.add(name)
    assert unlearned <= {"extract_guide.channels.bias"}              # AdaIN takes that away
    kept = {name for name in frozen if name.startswith("extract_guide.encoder")}
    assert frozen - kept == {"selection.log_weights"}
    assert bool(kept) == (variant == "untrained-guide-features")


def change(net, number):
    """The largest change of the restored image when one of the four inputs changes."""
    batch = list(some_input())
    with torch.no_grad():
        before = net(*batch)
        batch[number] = batch[number] + 5 if number == 3 else some_input(seed=11)[number]
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
        block.register_forward_hook(lambda module, inputs, output: calls.append((*inputs, *output)))
    degraded, guide, landmarks, _ = some_input()
    with torch.no_grad():
        net(degraded, guide, landmarks, landmarks + torch.tensor([8.0, -4]))
        plain = net.extract_guide(guide)
        own = net.extract(degraded)
        marks = net.extract_landmarks(common.landmark_mask(landmarks, 64))
    torch.testing.assert_close(calls[0][0], own)
    aligned = calls[0][1]
    torch.testing.assert_close(aligned[:, :, 1:, :-2], plain[:, :, :-1, 2:], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(aligned[:, :, 0, :-2], plain[:, :, 0, 2:], rtol=1e-3, atol=1e-4)
    for call in calls:
        assert torch.equal(call[1], aligned)
        torch.testing.assert_close(call[2], marks)
    assert torch.equal(calls[1][0], calls[0][3]) and torch.equal(calls[2][0], calls[1][3])
    assert all(torch.equal(mask, call[4]) for mask, call in zip(net.attention, calls, strict=True))


def test_the_guide_is_aligned_before_it_is_given_the_light_of_the_degraded_face():
    """Eq. (7) takes the statistics of the warped features: those are then the degraded face's."""
    net, seen = network(), []
    net.blocks[0].register_forward_hook(lambda module, inputs, output: seen.extend(inputs))
    with torch.no_grad():
        net(*some_input())
    features, guide_features = seen[:2]
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(guide_features, (2, 3)), statistic(features, (2, 3)),
                                   rtol=1e-3, atol=1e-3)


def test_untrained_guide_features_are_the_encoders_maps_at_a_quarter_of_the_size():
    net, guide = network(train_guide=False), some_images(2)
    expected = encoder().features(guide)[1]
    assert expected.shape[2:] == (16, 16)
    weight, bias = net.extract_guide.channels.weight, net.extract_guide.channels.bias
    mixed = torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], expected) + bias[:, None, None]
    torch.testing.assert_close(net.extract_guide(guide), mixed, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------- Data

class Album:
    """People with `counts` pictures: red is the person, green the picture, blue grows to the right."""

    def __init__(self, counts, size=32):
        self.identity = torch.cat([torch.full((count,), i) for i, count in enumerate(counts)])
        self.names = [str(i) for i in range(len(counts))]
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


def pictures(images):
    """The number of the Album's picture that each image (N,3,H,W) is."""
    return [round(green * 40) for green in images[:, 1].mean((1, 2)).tolist()]


def test_exemplars_are_other_pictures_of_the_person_and_all_different_while_there_are_enough():
    faces = Album([5, 2, 4])
    for i in (0, 3, 6, 9):
        others, seen = faces.others(i), set()
        for seed in range(8):
            longest = pictures(asffnet.load_group(faces, i, 10, common.seeded(seed))[0])[1:]
            assert set(longest) == set(others)
            assert longest == [longest[k % len(others)] for k in range(10)]     # the same round again
            for count in (1, 2, 3):
                images, landmarks = asffnet.load_group(faces, i, count, common.seeded(seed))
                assert pictures(images) == [i, *longest[:count]]
                assert torch.equal(landmarks[-1], faces[longest[count - 1]].landmarks)
            seen.add(longest[0])
        assert seen == set(others)                                        # drawn, not the first ones


def test_people_with_one_picture_are_left_out_and_nobody_else():
    faces = Album([3, 1, 2, 1])
    assert asffnet.with_others(faces, [6, 5, 3, 0, 1]) == [5, 0, 1]
    with pytest.raises(common.InputError, match="two pictures"):
        asffnet.Batches(faces, [3, 6], TINY)


def test_only_the_degraded_faces_landmarks_are_off_by_sigma_pixels_in_training():
    faces, cfg = Album([4, 3, 5]), replace(TINY, batch=8, landmark_noise=0.1)
    clean = asffnet.Batches(faces, range(12), replace(cfg, landmark_noise=0.0))[0]
    noisy = asffnet.Batches(faces, range(12), cfg)[0]
    for place in (0, 1, 3, 4):                                        # all but `landmarks`
        assert torch.equal(clean[place], noisy[place])
    error = noisy[2] - clean[2]
    assert error.std().item() == pytest.approx(0.1 * cfg.size, rel=0.1) and error.mean().abs() < 0.5


def test_evaluation_can_take_landmarks_that_are_off():
    faces, net = common.RenderedFaces(64, identities=4, per_identity=4), network()
    clean, = asffnet.restored_batches(net, faces, [0, 1, 5, 8], net.cfg, 4)
    noisy, = asffnet.restored_batches(net, faces, [0, 1, 5, 8], net.cfg, 4, noise=2.0)
    assert torch.equal(clean["degraded"], noisy["degraded"])
    error = noisy["landmarks"] - clean["landmarks"]
    assert error.std().item() == pytest.approx(2, rel=0.1)
    assert not torch.equal(clean["restored"], noisy["restored"])


def test_a_batch_degrades_the_target_alone_and_never_guides_a_face_by_itself():
    faces = Album([4, 3, 1, 5, 2])
    batches = asffnet.Batches(faces, range(11), replace(TINY, batch=6, jitter=0.0, shift=0.0,
                                                            landmark_noise=0.0))
    seen = set()
    for step in range(6):
        degraded, target, landmarks, exemplars, theirs = batches[step]
        assert 1e-3 < (degraded - target).abs().mean() < 0.6
        for n, i in enumerate(pictures(target)):
            seen.add(i)
            group = [(target[n], landmarks[n])] + list(zip(exemplars[n], theirs[n], strict=True))
            flipped = bool(target[n, 2, 0, 0] > 0)                        # and then all of them
            assert set(pictures(exemplars[n])) <= set(faces.others(i))
            for image, points in group:
                face = faces[pictures(image[None])[0]]
                torch.testing.assert_close(image.flip(2) if flipped else image, face.image,
                                           rtol=0, atol=1e-5)
                nose = face.landmarks[30].clone()                         # on the mirror's axis
                nose[0] = 31 - nose[0] if flipped else nose[0]
                torch.testing.assert_close(points[30], nose, rtol=0, atol=1e-4)
    assert len(seen) > 7 and 7 not in seen


# -------------------------------------------------------------------------------- Restoration

def restore_input(count=5, exemplars=4):
    """degraded, landmarks, exemplars, exemplar_landmarks"""
    sets = some_images(count * exemplars, seed=2).view(count, exemplars, 3, 64, 64)
    theirs = some_landmarks(count * exemplars, seed=8).view(count, exemplars, 68, 2)
    return some_images(count), some_landmarks(count), sets, theirs


def test_restore_guides_every_face_by_the_exemplar_of_least_distance():
    net, (degraded, landmarks, exemplars, marks) = network().train(), restore_input()
    net.selection.log_weights.data = torch.randn(68, generator=generator(1))
    weights = net.selection.log_weights.double().exp()
    inputs = degraded, landmarks, exemplars, marks
    restored, chosen = asffnet.restore(net, *inputs, batch=2, precision="float32")
    assert net.training and restored.dtype == torch.float32 and restored.abs().max() <= 1
    expected = (residuals(landmarks, marks, weights) @ weights.numpy()).argmin(1)
    assert chosen.tolist() == expected.tolist() and len(set(expected)) > 1
    net.eval()
    with torch.no_grad():
        for i, k in enumerate(chosen.tolist()):
            one = slice(i, i + 1)
            alone = net(degraded[one], exemplars[one, k], landmarks[one], marks[one, k]).clamp(-1, 1)
            torch.testing.assert_close(restored[one], alone, rtol=1e-4, atol=1e-4)


def test_one_set_of_exemplars_serves_all_faces():
    net, (degraded, landmarks, exemplars, marks) = network(), restore_input()
    restored, chosen = asffnet.restore(net, degraded, landmarks, exemplars[:1], marks[:1],
                                       precision="float32")
    sets, theirs = exemplars[:1].expand(5, -1, -1, -1, -1), marks[:1].expand(5, -1, -1, -1)
    expected = asffnet.restore(net, degraded, landmarks, sets, theirs, precision="float32")
    assert torch.equal(restored, expected[0]) and torch.equal(chosen, expected[1])


def test_features_of_an_album_are_made_once_and_only_of_pictures_that_are_chosen():
    net, (degraded, landmarks, exemplars, marks) = network(), restore_input()
    asked = []
    net.extract_guide.register_forward_hook(lambda module, inputs, output: asked.append(len(inputs[0])))
    known, exactly = {}, {"precision": "float32"}
    expected, chosen = asffnet.restore(net, degraded, landmarks, exemplars[:1], marks[:1], **exactly)
    asked.clear()
    for _ in range(2):
        restored, _ = asffnet.restore(net, degraded, landmarks, exemplars[:1], marks[:1], known=known,
                                      batch=2, **exactly)
        torch.testing.assert_close(restored, expected, rtol=1e-4, atol=1e-5)
    assert set(known) == set(chosen.tolist()) and asked == [1] * len(known)


@pytest.mark.parametrize("changes", [{}, {"fusion": "concat"}])
def test_check_shows_the_guide_as_it_was_aligned_and_where_it_is_trusted(changes):
    net, (degraded, landmarks, exemplars, marks) = network(**changes), restore_input()
    guides, theirs = exemplars[:, 1], marks[:, 1]
    shown = asffnet.guidance(net, degraded, landmarks, guides, theirs)
    assert torch.equal(shown["guide"], guides)
    aligned = [net.align(guides[i:i + 1], landmarks[i:i + 1], theirs[i:i + 1], 1) for i in range(5)]
    assert torch.equal(shown["aligned guide"], torch.cat(aligned))
    assert ("trusted" in shown) == (not changes)
    if not changes:
        with torch.no_grad():
            net(degraded, guides, landmarks, theirs)
        mask = net.attention[-1].mean(1, keepdim=True)
        seen = F.avg_pool2d(shown["trusted"][:, :1] / 2 + 0.5, degraded.shape[-1] // mask.shape[-1])
        torch.testing.assert_close(seen, mask, rtol=0, atol=0.02)


def test_held_out_faces_are_degraded_and_guided_alike_whatever_their_company_and_k():
    faces, net = common.RenderedFaces(64, identities=4, per_identity=4), network()
    batch, = asffnet.restored_batches(net, faces, [0, 1, 5, 8], net.cfg, 4)
    for place, i in enumerate((0, 1, 5, 8)):
        assert torch.equal(batch["target"][place], faces[i].image)
        guides = [torch.equal(batch["guide"][place], faces[k].image) for k in faces.others(i)]
        assert sum(guides) == 1
    seen = []
    for count in (1, 3):
        one = replace(net.cfg, exemplars=count)
        alone, = asffnet.restored_batches(net, faces, [5], one, 4)
        assert torch.equal(alone["target"][0], batch["target"][2])
        seen.append(alone["guide"])
    assert torch.equal(seen[1][0], batch["guide"][2])
    order = torch.randperm(3, generator=common.seeded(net.cfg.seed, 5, 5)).tolist()
    assert torch.equal(seen[0][0], faces[faces.others(5)[order[0]]].image)      # the first of three


def test_mistaken_exemplars_are_those_of_somebody_else_for_the_same_degraded_faces():
    faces, net, some = common.RenderedFaces(64, identities=4, per_identity=4), network(), [0, 1, 5, 8]
    right, = asffnet.restored_batches(net, faces, some, net.cfg, 4)
    wrong, = asffnet.restored_batches(net, faces, some, net.cfg, 4, mistaken=True)
    for name in ("degraded", "target", "landmarks"):
        assert torch.equal(right[name], wrong[name])
    for i, guide in zip(some, wrong["guide"], strict=True):
        shown, = (k for k in range(16) if torch.equal(faces[k].image, guide))
        assert faces.identity[shown] != faces.identity[i]


@pytest.mark.parametrize("mls", [True, False])
def test_the_picture_shows_the_guide_as_the_variant_uses_it(mls, monkeypatch):
    faces, net, shown = common.RenderedFaces(64, identities=4, per_identity=4), network(mls=mls), {}
    monkeypatch.setattr(common, "comparison_grid", lambda columns: shown.update(columns))
    asffnet.samples(net, faces, range(16), net.cfg)
    guide, aligned = shown["guide"], shown["aligned guide"]
    assert guide.shape == (6, 3, 64, 64)
    assert torch.equal(guide, aligned) != mls


# ----------------------------------------------------------------------------------- Training

def command_line(*words):
    parser = common.arguments(asffnet.__doc__, asffnet.PRESETS, asffnet.VARIANTS)
    words = [str(word) for word in words]
    return common.parse(parser, [*words, "--device", "cpu", "--precision", "float32"], "asffnet")


def train(cfg, folder, out, *words):
    asffnet.train(cfg, command_line("--train", "--data", folder, "--out", out, *words))


@pytest.fixture
def cheap(monkeypatch):
    """A recogniser that needs no training in the place of both."""
    monkeypatch.setattr(common, "recogniser", lambda faces, purpose="loss", device="cpu": encoder())


@pytest.fixture(scope="module")
def watched(face_folder, tmp_path_factory):
    """Three steps of train(): what each optimiser's steps see. No term of the loss is small."""
    out, patch, made = tmp_path_factory.mktemp("watched"), pytest.MonkeyPatch(), []
    cfg = replace(TINY, steps=3, validate_every=3, residual=False, learning_rate=2e-4, clip=None,
                  weights_times=1.5, cooldown=0.9, weight_pixel=2000.0, weight_perceptual=300.0,
                  weight_style=4e3, weight_adversarial=2000.0, batch=4)
    patch.setattr(common, "recogniser", lambda faces, purpose="loss", device="cpu": encoder())
    patch.setattr(WatchedAdam, "made", made)
    patch.setattr(torch.optim, "Adam", WatchedAdam)
    patch.setattr(asffnet, "evaluate", lambda *_: {})
    patch.setattr(common, "report", lambda *_: None)
    train(cfg, face_folder, out)
    patch.undo()
    faces = common.FaceFolder(face_folder, 64)
    batch = asffnet.Batches(faces, common.split_identities(faces)[0], cfg)[0]
    torch.manual_seed(cfg.seed)
    net, judge = asffnet.ASFFNet(cfg), asffnet.Discriminator(cfg.discriminator_width)
    return SimpleNamespace(cfg=cfg, out=out, folder=face_folder, made=made, batch=batch, net=net,
                           judge=judge)


@pytest.mark.slow
def test_the_first_step_follows_the_gradient_of_equation_17(watched):
    """The gradients of train() against losses written out from the paper, on networks made anew."""
    cfg, net, judge, psi = watched.cfg, watched.net, watched.judge, encoder()
    degraded, target, landmarks, exemplars, theirs = watched.batch
    start = net.selection.log_weights.exp().numpy()
    chosen = (residuals(4 * landmarks, 4 * theirs, start) @ start).argmin(1)
    guide = torch.stack([exemplars[b, k] for b, k in enumerate(chosen)])
    guide_landmarks = torch.stack([theirs[b, k] for b, k in enumerate(chosen)])
    restored = net(degraded, guide, landmarks, guide_landmarks)
    perceptual = style = 0
    for a, b in zip(psi.features(restored), psi.features(target), strict=True):
        perceptual = perceptual + (a - b).square().mean()
        change = torch.einsum("bchw,bdhw->bcd", a, a) - torch.einsum("bchw,bdhw->bcd", b, b)
        style = style + (change / a[0].numel()).square().sum() / len(a)
    terms = [cfg.weight_pixel * (restored - target).square().mean(),
             cfg.weight_perceptual * perceptual,
             cfg.weight_style * style,
             -cfg.weight_adversarial * judge(restored).mean()]
    learned = [weight for weight in net.parameters() if weight.requires_grad]
    gradients = [torch.autograd.grad(term, learned, retain_graph=True) for term in terms]
    total = [sum(many) for many in zip(*gradients, strict=True)]
    assert gap(watched.made[0].seen[0][0], total) < 0.003
    for term in gradients:                                       # a missing term would be noticed
        assert gap([a - b for a, b in zip(total, term, strict=True)], total) > 0.02
    real, fake = judge(target), judge(restored.detach())
    hinge = -((real - 1).clamp(max=0).mean() + (-1 - fake).clamp(max=0).mean())
    expected = torch.autograd.grad(hinge, list(judge.parameters()))
    assert gap(watched.made[1].seen[0][1], expected) < 0.003


@pytest.mark.slow
def test_one_rate_serves_all_optimisers_also_while_it_falls(watched):
    expected = [watched.cfg.rate(step) for step in (1, 2, 3)]
    assert expected[2] < expected[1] < expected[0]
    assert watched.made[0].rates == watched.made[1].rates == pytest.approx(expected)
    assert watched.made[2].rates == pytest.approx([1.5 * rate for rate in expected])


@pytest.mark.slow
def test_a_trained_network_comes_back_without_spectral_norm_and_answers_table_1(watched):
    checkpoint = watched.out / "checkpoint.pt"
    net, cfg = asffnet.load_network(command_line("--evaluate", "--checkpoint", checkpoint))
    assert cfg == watched.cfg
    assert not any(parametrize.is_parametrized(module) for module in net.modules())
    state = common.load_weights(checkpoint)["net"]
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert (net.selection.log_weights - watched.net.selection.log_weights).abs().max() > 1e-4
    words = "--evaluate", "--checkpoint", checkpoint, "--variant", "exemplars-1"
    assert asffnet.load_network(command_line(*words))[1] == replace(
        cfg, variant="exemplars-1", exemplars=1)


@pytest.mark.slow
def test_untrained_guide_features_stay_as_they_are_and_come_back_with_the_checkpoint(
        face_folder, tmp_path, cheap, monkeypatch):
    monkeypatch.setattr(asffnet, "evaluate", lambda *_: {})
    monkeypatch.setattr(common, "report", lambda *_: None)
    cfg = replace(TINY, steps=2, validate_every=2, train_guide=False)
    train(cfg, face_folder, tmp_path)
    monkeypatch.undo()                                   # the checkpoint brings its own encoder
    args = command_line("--evaluate", "--checkpoint", tmp_path / "checkpoint.pt")
    net, found = asffnet.load_network(args)
    assert found == cfg and net(*some_input()).isfinite().all()
    kept, first = net.extract_guide.encoder.state_dict(), encoder().state_dict()
    assert set(kept) == set(first) and all(torch.equal(kept[name], first[name]) for name in first)


# --------------------------------------------------------------------------- Released network

@pytest.fixture(scope="module")
def released():
    torch.manual_seed(0)
    return asffnet.ReleasedASFFNet(replace(asffnet.RELEASED, size=64, channels=16, width=8)).eval()


def random_landmarks(count, size, seed=0):
    """68 points over the middle of a size×size picture, (count,68,2)."""
    return torch.from_numpy(np.random.default_rng(seed).uniform(0.1, 0.9, (count, 68, 2)) * size).float()


def test_the_released_mask_equals_drawing_point_by_point():
    points = random_landmarks(3, 64, seed=1)
    points[0, 20:24] = torch.tensor([[1.5, 30.0], [2.9, 40], [30, 2.5], [61.5, 20]])
    points[0, 24:28] = torch.tensor([[62.0, 20.0], [20, 62], [3, 3], [-4, 80]])
    points[1, 30] = torch.tensor([25.0, 31.0])                             # whole: six pixels wide
    expected = np.zeros((3, 1, 64, 64), np.float32)
    for mask, face in zip(expected, points.numpy(), strict=True):
        for x, y in face[17:]:
            if 1 < x < 62 and 1 < y < 62:
                top, left = int(np.floor(y)) - 3, int(np.floor(x)) - 3
                if top >= 0 and left >= 0:                                 # else an empty slice
                    mask[0, top:int(np.ceil(y)) + 3, left:int(np.ceil(x)) + 3] = 1
    assert torch.equal(asffnet.released_mask(points, 64), torch.from_numpy(expected))


def test_the_released_distance_equals_two_least_squares_fits():
    goal = random_landmarks(2, 512, seed=4)
    candidates = torch.stack([random_landmarks(2, 512, seed=k) for k in (5, 6, 7)], 1)
    result = asffnet.released_distance(goal, candidates)
    for b in range(2):
        for k in range(3):
            total = 0
            for share, group in ((1.01, [*range(17, 27), *range(36, 48)]), (1.49, [*range(48, 68)])):
                design = np.c_[candidates[b, k, group].double().numpy(), np.ones(len(group))]
                y = goal[b, group].double().numpy()
                fit = np.linalg.lstsq(design, y, rcond=None)[0]
                total += share * np.linalg.norm(design @ fit - y)
            assert result[b, k].item() == pytest.approx(total, rel=1e-8)


def test_the_released_network_restores_each_face_alone_and_uses_every_weight(released):
    draw = generator(1)
    degraded, guide = torch.rand(2, 2, 3, 64, 64, generator=draw) * 2 - 1
    marks, guide_marks = random_landmarks(2, 64, seed=8), random_landmarks(2, 64, seed=9)
    both = released(degraded, guide, marks, guide_marks)
    assert both.shape == (2, 3, 64, 64) and both.abs().max() <= 1
    for b in range(2):
        one = slice(b, b + 1)
        alone = released(degraded[one], guide[one], marks[one], guide_marks[one])
        torch.testing.assert_close(alone, both[one], atol=1e-5, rtol=1e-4)
    both.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in released.parameters())
