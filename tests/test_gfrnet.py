"""GFRNet: every equation against an independent form, guides on posed heads."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import WatchedAdam, gap, random, randomised, some_encoder, uniform
from torch import nn

import common
import gfrnet

TINY = replace(gfrnet.TINY, size=64, width=4, discriminator_width=4, batch=2)


def in_pixels(flow, size):
    """Coordinates, ±1 being the image's edges → pixels, 0 being the centre of the first."""
    return (flow + 1) * size / 2 - 0.5


def in_range(pixels, size):
    return (2 * pixels + 1) / size - 1


# Config


def test_warp_net_is_trained_alone_for_the_papers_epochs():
    paper = gfrnet.PAPER
    alone = round(paper.warp_share * paper.steps)  # 5 epochs of 20,273 pairs, then 100
    assert (alone, paper.steps - alone) == (5 * 20_273, 100 * 20_273)


# Eq. (2): warping


def equation_2(image, flow):
    """The sum of Eq. (2), pixel by pixel in float64: arrays (C,H,W), and (2,H,W) in [-1,1]."""
    channels, height, width = image.shape
    result = np.zeros((channels, *flow.shape[1:]))
    for i in range(flow.shape[1]):
        for j in range(flow.shape[2]):
            x, y = in_pixels(flow[0, i, j], width), in_pixels(flow[1, i, j], height)
            for h in (math.floor(y), math.floor(y) + 1):
                for w in (math.floor(x), math.floor(x) + 1):
                    if 0 <= h < height and 0 <= w < width:
                        weight = max(0, 1 - abs(y - h)) * max(0, 1 - abs(x - w))
                        result[:, i, j] += image[:, h, w] * weight
    return result


def test_warp_is_equation_2():
    """Coordinates up to a quarter beyond the edge, where the neighbours that are missing count as 0."""
    image, flow = random(2, 3, 8, 8, seed=1), 1.25 * uniform(2, 2, 8, 8, seed=2)
    warped = gfrnet.warp(image, flow)
    for n in range(2):
        expected = equation_2(image[n].double().numpy(), flow[n].double().numpy())
        np.testing.assert_allclose(warped[n].numpy(), expected, atol=2e-5)
    assert (flow.abs() > 1).any()
    torch.testing.assert_close(gfrnet.warp(image, gfrnet.identity_flow(8).expand(2, -1, -1, -1)), image)


@pytest.mark.parametrize("wanted", ["flow", "image"])
def test_gradients_of_warp_are_the_finite_differences_of_equation_2(wanted):
    image, flow = random(1, 2, 6, 6, seed=3), 1.1 * uniform(1, 2, 6, 6, seed=4)
    pixels = in_pixels(flow, 6)  # kept off the kinks of Eq. (2), which has none but the pixel centres
    flow = in_range(pixels.floor() + 0.1 + 0.8 * (pixels - pixels.floor()), 6)
    weight = random(1, 2, 6, 6, seed=5)
    inputs = {"image": image.requires_grad_(), "flow": flow.requires_grad_()}
    (gfrnet.warp(image, flow) * weight).sum().backward()

    def value(place, change):
        arrays = {name: x.detach()[0].double().numpy().copy() for name, x in inputs.items()}
        arrays[wanted][place] += change
        return (equation_2(arrays["image"], arrays["flow"]) * weight[0].double().numpy()).sum()

    gradient, step = inputs[wanted].grad[0], 1e-4
    assert gradient.abs().max() > 0.1
    for place in np.ndindex(2, 6, 6):
        difference = (value(place, step) - value(place, -step)) / (2 * step)
        assert gradient[place].item() == pytest.approx(difference, rel=1e-3, abs=1e-3), place


# Eq. (1) and (3): the networks


def layers(net):
    kinds = nn.Conv2d, nn.ConvTranspose2d, (nn.BatchNorm2d, nn.InstanceNorm2d)
    return [[m for m in net.modules() if isinstance(m, kind)] for kind in kinds]


def by_hand(net, x, skips, per_image=False):
    """Figure 3, layer by layer: convolution, normalisation by the batch's own statistics, ReLU."""
    down, up, norms = layers(net)
    norms, maps, levels = iter(norms), [], len(down)

    def normalised(x):
        norm, dims = next(norms), (2, 3) if per_image else (0, 2, 3)
        mean, var = x.mean(dims, keepdim=True), x.var(dims, correction=0, keepdim=True)
        x = (x - mean) / torch.sqrt(var + 1e-5)
        return x * norm.weight[:, None, None] + norm.bias[:, None, None]

    for level, conv in enumerate(down):
        x = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
        if level not in (0, levels - 1):
            x = normalised(x)
        x = torch.where(x > 0, x, 0.2 * x)
        maps.append(x)
    assert x.shape[2:] == (1, 1)
    for level, conv in enumerate(up):
        if skips and level:
            x = torch.cat([x, maps[levels - 1 - level]], 1)
        x = F.conv_transpose2d(x, conv.weight, conv.bias, stride=2, padding=1)
        if level < levels - 1:
            x = normalised(x).clamp(min=0)
    assert next(norms, None) is None  # no layer has a norm that the paper's has not
    return x


@pytest.mark.parametrize("batch", [1, 3])
def test_warp_net_is_equation_1_layer_by_layer(batch):
    net = randomised(gfrnet.WarpNet(replace(TINY, batch=batch)), 0.3).train()
    degraded, guide = uniform(2, batch, 3, 64, 64)
    raw = by_hand(net, torch.cat([degraded, guide], 1), skips=False)
    start = torch.atanh(gfrnet.identity_flow(64))
    flow = net(degraded, guide)
    assert flow.shape == (batch, 2, 64, 64) and flow.abs().max() <= 1
    torch.testing.assert_close(flow, torch.tanh(start + raw), rtol=1e-4, atol=1e-4)
    assert (flow - gfrnet.identity_flow(64)).abs().mean() > 0.02


@pytest.mark.parametrize("residual", [False, True])
def test_rec_net_is_equation_3_layer_by_layer(residual):
    net = randomised(gfrnet.RecNet(replace(TINY, residual=residual)), 0.2).train()
    degraded, warped = uniform(2, 2, 3, 64, 64)
    raw = by_hand(net, torch.cat([degraded, warped], 1), skips=True)
    expected = degraded + raw if residual else torch.tanh(raw)
    torch.testing.assert_close(net(degraded, warped), expected, rtol=1e-4, atol=1e-4)


def test_at_batch_1_every_image_is_normalised_by_itself_also_when_it_restores():
    net = randomised(gfrnet.RecNet(replace(TINY, batch=1, residual=False)), 0.2)
    degraded, warped = uniform(2, 3, 3, 64, 64)
    together = net.train()(degraded, warped)
    raw = by_hand(net, torch.cat([degraded, warped], 1), skips=True, per_image=True)
    torch.testing.assert_close(together, torch.tanh(raw), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.eval()(degraded, warped), together)
    for n in range(3):
        torch.testing.assert_close(net(degraded[n : n + 1], warped[n : n + 1]), together[n : n + 1])


def test_widths_are_those_of_pix2pix_and_full_has_nearly_twice_the_parameters_of_no_warp():
    def network(name):
        with torch.device("meta"):
            return gfrnet.GFRNet(replace(gfrnet.PAPER, **gfrnet.VARIANTS[name]))

    numbers = {name: sum(p.numel() for p in network(name).parameters()) for name in gfrnet.VARIANTS}
    assert 1.6 < numbers["full"] / numbers["no-warp"] < 2 and 1.6 < numbers["full"] / numbers["no-guide"] < 2
    for name in ("no-warp", "no-guide"):  # twice the channels: four times the weights
        assert numbers[f"{name}-2x"] / numbers[name] == pytest.approx(4, rel=0.01)
    for part, out in ((network("full").warp_net, 2), (network("full").rec_net, 3)):
        down, up, _ = layers(part)
        assert [c.out_channels for c in down] == [64, 128, 256, 512, 512, 512, 512, 512]
        assert [c.out_channels for c in up] == [512, 512, 512, 512, 256, 128, 64, out]


def test_flow_starts_at_the_identity_and_all_of_warp_net_learns():
    torch.manual_seed(0)
    net = gfrnet.WarpNet(TINY)
    degraded, guide = uniform(2, 2, 3, 64, 64)
    gap = (net(degraded, guide) - gfrnet.identity_flow(64)).abs().max() * 32
    assert gap < 0.01  # pixels
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    for _ in range(2):  # what lies before a layer of zeros is reached one step later
        optimizer.zero_grad()
        gfrnet.landmark_loss(net(degraded, guide), *marks(2, 2)).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_network_warps_the_guide_by_its_flow_and_restores_from_both():
    net = randomised(gfrnet.GFRNet(TINY), 0.2)
    degraded, guide = uniform(2, 2, 3, 64, 64)
    restored, warped, flow = net(degraded, guide)
    torch.testing.assert_close(flow, net.warp_net(degraded, guide))
    torch.testing.assert_close(net(degraded, guide, flow_only=True), flow)
    expected = equation_2(guide[1].double().numpy(), flow[1].detach().double().numpy())
    np.testing.assert_allclose(warped[1].detach().numpy(), expected, atol=1e-4)
    torch.testing.assert_close(restored, net.rec_net(degraded, warped))
    restored.square().mean().backward()  # a loss on the restoration alone also moves the flow
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_variants_without_warp_net_or_guide():
    degraded, guide = uniform(2, 2, 3, 64, 64)

    def network(name):
        return randomised(gfrnet.GFRNet(replace(TINY, **gfrnet.VARIANTS[name])), 0.1).eval()

    for name in ("no-warp", "no-warp-2x"):
        net = network(name)
        restored, warped, flow = net(degraded, guide)
        assert flow is None and torch.equal(warped, guide)
        torch.testing.assert_close(restored, net.rec_net(degraded, guide))
        assert (net(degraded, -guide)[0] - restored).abs().max() > 1e-3
    for name in ("no-guide", "no-guide-2x"):
        net = network(name)
        restored, warped, flow = net(degraded, guide)
        assert warped is None and flow is None
        assert torch.equal(net(degraded, -guide)[0], restored) and layers(net)[0][0].in_channels == 3


# Discriminators


def test_a_logit_sees_a_patch_of_70_x_70_pixels_of_all_three_images():
    judge = randomised(gfrnet.Discriminator(2), 0.3).eval()
    images = [x.requires_grad_() for x in uniform(3, 1, 3, 128, 128).unbind()]
    logits = judge(*images)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 6, 6].backward()
    for image in images:
        seen = image.grad[0].abs().sum(0) > 0
        rows, columns = seen.any(1).nonzero()[:, 0], seen.any(0).nonzero()[:, 0]
        assert rows[-1] - rows[0] == columns[-1] - columns[0] == 69


def marks(count, sets=1, size=64, seed=3):
    """Random landmarks well inside the image: (count,68,2), or `sets` of them."""
    points = size * (0.5 + 0.3 * uniform(sets, count, 68, 2, seed=seed))
    return points[0] if sets == 1 else points.unbind()


def test_landmark_box_is_the_smallest_around_all_landmarks_cut_at_the_edges():
    size, points = 64, marks(3)
    points[1] = points[1] * 2 - 30  # beyond the edges
    points[2, 5] = torch.tensor([3.0, 60.0])
    for box, face in zip(gfrnet.landmark_box(points, size).tolist(), points.tolist(), strict=True):
        x, y = zip(*face, strict=True)
        edges = min(x), min(y), max(x) + 1, max(y) + 1  # a pixel spans i … i + 1
        assert box == pytest.approx([min(max(edge, 0), size) for edge in edges], abs=1e-4)
    for shift in (-200.0, 63.0, 200.0):  # off the edge it still has an inside
        box = gfrnet.landmark_box(torch.zeros(1, 68, 2) + shift, 64)[0]
        assert box.min() >= 0 and box.max() <= 64 and (box[2:] - box[:2]).min() >= 1


def test_crop_local_of_a_linear_ramp_is_the_ramp_at_the_bin_centres():
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    image = torch.stack([torch.stack([3 * x + y, 2 - y + 7 * n]) for n in range(2)])
    boxes = torch.tensor([[4.0, 6, 28, 37], [10.5, 3, 33, 20.25]])
    crops = gfrnet.crop_local(image, boxes, 12)
    centre = (torch.arange(12) + 0.5) / 12
    for n, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        u = (x1 + centre * (x2 - x1) - 0.5).expand(12, 12)  # edges → index
        v = (y1 + centre * (y2 - y1) - 0.5)[:, None].expand(12, 12)
        torch.testing.assert_close(crops[n], torch.stack([3 * u + v, 2 - v + 7 * n]), rtol=0, atol=1e-3)


def test_the_local_discriminator_sees_only_the_box_and_the_global_one_all():
    judges = randomised(gfrnet.Discriminators(4), 0.3)
    images = list(uniform(3, 2, 3, 64, 64))
    boxes = torch.tensor([[16.0, 20, 40, 52], [8, 12, 50, 60]])
    outside = torch.ones(2, 1, 64, 64)
    outside[0, :, 19:53, 15:41] = outside[1, :, 11:61, 7:51] = 0
    with torch.no_grad():
        whole, local = judges(*images, boxes)
        torch.testing.assert_close(judges.whole(*images), whole)
        torch.testing.assert_close(judges.local(*[gfrnet.crop_local(x, boxes, 32) for x in images]), local)
        for k in range(3):
            inputs = images.copy()
            inputs[k] = inputs[k] + outside
            changed = judges(*inputs, boxes)
            torch.testing.assert_close(changed[1], local)
            assert (changed[0] - whole).abs().max() > 1e-2
            inputs[k] = inputs[k] + (1 - outside) * uniform(2, 3, 64, 64, seed=9)
            assert (judges(*inputs, boxes)[1] - local).abs().max() > 1e-2


# Eq. (5) and (6): reconstruction


def test_perceptual_loss_is_equation_5():
    a, b = random(2, 3, 5, 4, 6)
    expected = 0
    for n in range(3):
        square = 0.0
        for c, h, w in np.ndindex(5, 4, 6):
            square += (a[n, c, h, w].item() - b[n, c, h, w].item()) ** 2
        expected += square / (5 * 4 * 6) / 3
    assert gfrnet.perceptual_loss(a, b).item() == pytest.approx(expected, rel=1e-5)


def test_reconstruction_loss_is_equation_6_of_the_map_at_an_eighth_of_the_size():
    encoder, cfg = some_encoder(), replace(TINY, weight_pixel=3.0, weight_perceptual=0.7)
    restored, target = uniform(2, 2, 3, 64, 64)
    a, b = (encoder.features(x)[2] for x in (restored, target))
    assert a.shape == (2, 10, 8, 8)
    terms = gfrnet.reconstruction_losses(restored.requires_grad_(), target, encoder, cfg)
    expected = 3 * (restored - target).square().mean() + 0.7 * (a - b).square().mean()
    torch.testing.assert_close(sum(terms.values()), expected)
    found = torch.autograd.grad(terms["perceptual"], restored)[0]
    assert found.abs().max() > 0  # through the frozen encoder


# Eq. (7) and (8): adversarial


def logit_maps(seed):
    return [3 * random(2, 1, 6, 6, seed=seed), 3 * random(2, 1, 2, 2, seed=seed + 1)]


def probability(logits):
    return 1 / (1 + np.exp(-logits.double().numpy()))


@pytest.mark.parametrize("label", [0.9, 1.0])
def test_discriminator_loss_is_equations_7_and_8_with_smoothed_labels_of_true_pictures(label):
    real, fake = logit_maps(0), logit_maps(10)
    expected = 0
    for r, f in zip(real, fake, strict=True):
        p, q = probability(r), probability(f)
        expected -= np.mean(label * np.log(p) + (1 - label) * np.log(1 - p))
        expected -= np.mean(np.log(1 - q))  # no smoothing: fakes are 0, not 0.1
    assert gfrnet.discriminator_loss(real, fake, label).item() == pytest.approx(expected, rel=1e-5)


def test_adversarial_loss_is_equation_8_for_the_generator():
    fake, weights = logit_maps(20), (1.0, 0.5)
    expected = -sum(w * np.log(probability(f)).mean() for w, f in zip(weights, fake, strict=True))
    assert gfrnet.adversarial_loss(fake, weights).item() == pytest.approx(expected, rel=1e-5)


def test_adversarial_loss_still_has_a_gradient_when_the_discriminator_wins():
    lost = torch.full((1, 1, 1, 1), -40.0, requires_grad=True)
    gfrnet.adversarial_loss([lost, lost.detach()], (1.0, 0.5)).backward()
    assert lost.grad.item() == pytest.approx(-1, abs=1e-5)  # log(1 − D) would have none


# Eq. (9): landmarks


def read_bilinearly(plane, x, y):
    """plane (H,W) at pixel x, y, held at the edges."""
    height, width = plane.shape
    x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
    j, i = min(int(x), width - 2), min(int(y), height - 2)
    a, b = y - i, x - j
    top = (1 - b) * plane[i, j] + b * plane[i, j + 1]
    return (1 - a) * top + a * ((1 - b) * plane[i + 1, j] + b * plane[i + 1, j + 1])


def equation_9(flow, landmarks, guide_landmarks):
    """Eq. (9) in loops over (2,H,W), (68,2), (68,2): numpy, float64."""
    size, total = flow.shape[-1], 0.0
    for (x, y), (gx, gy) in zip(landmarks, guide_landmarks, strict=True):
        total += (read_bilinearly(flow[0], x, y) - in_range(gx, size)) ** 2
        total += (read_bilinearly(flow[1], x, y) - in_range(gy, size)) ** 2
    return total


@pytest.mark.parametrize("beyond", [False, True])
def test_landmark_loss_is_equation_9_and_reads_the_edge_beyond_it(beyond):
    flow, (points, guide_points) = uniform(3, 2, 16, 16, seed=1).double(), marks(3, 2, size=16)
    if beyond:
        points = points * 3 - 16
        assert points.min() < 0 and points.max() > 16
    arrays = [x.double().numpy() for x in (flow, points, guide_points)]
    expected = np.mean([equation_9(*(x[n] for x in arrays)) for n in range(3)])
    assert gfrnet.landmark_loss(flow, points, guide_points).item() == pytest.approx(expected, rel=1e-5)


def test_landmark_error_is_the_mean_distance_in_pixels():
    flow, (points, guide_points) = uniform(2, 2, 16, 16, seed=1), marks(2, 2, size=16)
    errors = gfrnet.landmark_error(flow, points, guide_points)
    for n in range(2):
        plane, distances = in_pixels(flow[n].double().numpy(), 16), []
        for (x, y), (gx, gy) in zip(points[n].tolist(), guide_points[n].tolist(), strict=True):
            read = [read_bilinearly(plane[axis], x, y) for axis in (0, 1)]
            distances.append(math.hypot(read[0] - gx, read[1] - gy))
        assert errors[n].item() == pytest.approx(np.mean(distances), rel=1e-4)


# Eq. (10) and (11): smoothness


def test_tv_loss_is_equation_10():
    flow, expected = uniform(3, 2, 6, 6), 0.0
    for n, c, i, j in np.ndindex(3, 2, 6, 6):
        here = flow[n, c, i, j].item()
        if j < 5:
            expected += (flow[n, c, i, j + 1].item() - here) ** 2
        if i < 5:
            expected += (flow[n, c, i + 1, j].item() - here) ** 2
    assert gfrnet.tv_loss(flow).item() == pytest.approx(expected / 3, rel=1e-5)
    for size in (16, 64):  # 8 at any size, but for the last row and column
        found = gfrnet.tv_loss(gfrnet.identity_flow(size)).item()
        assert found == pytest.approx(8 * (size - 1) / size, rel=1e-4)


def test_flow_loss_is_the_weighted_sum_of_equation_11():
    flow, (points, guide_points) = uniform(2, 2, 16, 16), marks(2, 2, size=16)
    terms = gfrnet.flow_loss(flow, points, guide_points, replace(TINY, weight_tv=0.25))
    expected = 10 * gfrnet.landmark_loss(flow, points, guide_points) + 0.25 * gfrnet.tv_loss(flow)
    torch.testing.assert_close(sum(terms.values()), expected)


# Guides: frontal, eyes open, another picture of the same person


def posed_head(yaw=0.0, roll=0.0, opening=(0.4, 0.4)):
    """The 68 points of a simple head in three dimensions, turned, seen from far away: (68,2)."""
    points = np.zeros((68, 3))
    around = np.linspace(-math.pi / 2, math.pi / 2, 17)
    points[:17] = np.stack([np.sin(around), 1.3 * np.cos(around), 0.3 * np.cos(around) - 0.3], 1)
    points[17:22] = [[x, -0.55, 0.3] for x in np.linspace(-0.75, -0.2, 5)]
    points[22:27] = points[17:22][::-1] * [-1, 1, 1]
    points[27:31] = [[0, -0.3, 0.4], [0, -0.1, 0.5], [0, 0.1, 0.65], [0, 0.3, 0.8]]
    points[31:36] = [[x, 0.4, 0.55] for x in np.linspace(-0.2, 0.2, 5)]
    for first, centre, height in ((36, -0.45, opening[0]), (42, 0.45, opening[1])):
        x = np.array([-0.2, -0.08, 0.08, 0.2, 0.08, -0.08]) + centre
        y = np.array([0, -1, -1, 0, 1, 1]) * 0.2 * height - 0.3
        points[first : first + 6] = np.stack([x, y, np.full(6, 0.3)], 1)
    for k in range(20):
        turn = 2 * math.pi * (k - 48) / 20
        points[48 + k] = [0.35 * math.cos(turn), 0.8 + 0.15 * math.sin(turn), 0.4]
    c, s = math.cos(yaw), math.sin(yaw)
    flat = (points @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]).T)[:, :2]
    c, s = math.cos(roll), math.sin(roll)
    return torch.from_numpy(flat @ np.array([[c, -s], [s, c]]).T).float()


def test_guide_score_is_0_for_a_frontal_face_and_grows_as_it_turns():
    turns = [math.radians(degrees) for degrees in range(0, 45, 5)]
    for sign in (-1, 1):
        scores = gfrnet.guide_score(torch.stack([posed_head(sign * turn) for turn in turns]))
        assert scores.shape == (9,) and scores[0].abs() < 1e-6
        assert (scores.diff() > 0.01).all() and scores[-1] < 1
        rolled = [posed_head(sign * turn, math.radians(35)) * 20 + 50 for turn in turns]
        torch.testing.assert_close(gfrnet.guide_score(torch.stack(rolled)), scores, rtol=0, atol=1e-3)
    for opening in ((0.4, 0.05), (0.05, 0.4), (0.4, 0.0)):  # a closed eye costs more than any turn
        assert gfrnet.guide_score(posed_head(opening=opening)[None]) >= 1


class Heads:
    """A data set of posed heads: a list of (identity, yaw, opening)."""

    fingerprint, size = "heads", 64

    def __init__(self, heads):
        self.heads, self.identity = heads, torch.tensor([head[0] for head in heads])
        self.names = [str(who) for who in range(10)]

    def __len__(self):
        return len(self.heads)

    def landmarks(self, i):
        _, yaw, opening = self.heads[i]
        return posed_head(yaw, opening=(opening, opening)) * 20 + 31.5

    def damaged(self, i):
        return False

    def others(self, i):
        return [j for j in range(len(self)) if j != i and self.heads[j][0] == self.heads[i][0]]

    def __getitem__(self, i):
        image = F.interpolate(uniform(1, 3, 9, 9, seed=i), 64, mode="bicubic")[0].clamp(-1, 1)
        return common.Face(image, self.landmarks(i), int(self.identity[i]))


HEADS = [(4, 0.5, 0.4), (4, 0.1, 0.4), (7, 0.0, 0.0), (4, 0.0, 0.01), (7, 0.2, 0.4), (2, 0.0, 0.4)]
HEADS += [(7, -0.1, 0.4), (4, -0.2, 0.4), (9, 0.3, 0.02), (9, 0.1, 0.02)]


def test_the_guide_is_the_most_frontal_picture_with_open_eyes_and_no_target():
    """The eyes of pictures 2, 3, 8, 9 are closed; 5 is the only picture of person 2."""
    guides = gfrnet.choose_guides(Heads(HEADS), list(range(10)))
    assert guides == {0: 1, 3: 1, 7: 1, 2: 6, 4: 6, 8: 9}


def test_only_the_named_pictures_get_guides():
    heads = Heads(HEADS)
    assert gfrnet.choose_guides(heads, [6, 2, 5, 0]) == {2: 6, 0: 1}
    with pytest.raises(common.InputError, match="two pictures"):
        gfrnet.choose_guides(heads, [5])


def test_strangers_are_drawn_at_random_from_the_guides_of_other_people():
    heads = Heads(HEADS)
    guides = gfrnet.choose_guides(heads, list(range(10)))
    drawn = [gfrnet.draw_stranger(heads, guides, 0, common.seeded(k)) for k in range(60)]
    assert set(drawn) == {6, 9} and 15 < drawn.count(6) < 45
    alone = {0: 1, 3: 1}  # only person 4 is left: anybody else will do
    drawn = {gfrnet.draw_stranger(heads, alone, 0, common.seeded(k)) for k in range(99)}
    assert drawn == {2, 4, 5, 6, 8, 9}


# Data


@pytest.fixture(scope="module")
def rendered(face_folder):
    faces = common.FaceFolder(face_folder, 64)
    faces.images = torch.stack([face.image for face in faces])
    return faces


def shown(faces, image):
    """Which pictures of the data set this is, mirrored or not: [(number, mirrored)]."""
    gaps = torch.stack([(faces.images - x).abs().amax((1, 2, 3)) for x in (image, image.flip(2))])
    return [(i, bool(flip)) for flip, i in torch.nonzero(gaps < 1e-3).tolist()]


def test_batches_hold_targets_with_their_guides_flipped_together(rendered, monkeypatch):
    seen = []

    def degrade(target, degradation, generator=None, scale=None):
        seen.append((degradation, scale))
        return target * 0.5

    monkeypatch.setattr(common, "degrade", degrade)
    guides = gfrnet.choose_guides(rendered, range(10, 30))
    batches = gfrnet.Batches(rendered, range(10, 30), replace(TINY, batch=8, shift=0.0))
    used, flips = set(), []
    for step in range(3):
        degraded, *batch = batches[step]
        assert torch.equal(degraded, batch[0] * 0.5)
        for target, guide, landmarks, guide_landmarks in zip(*batch, strict=True):
            [(i, flip)] = shown(rendered, target)
            assert shown(rendered, guide) == [(guides[i], flip)]
            for j, points in ((i, landmarks), (guides[i], guide_landmarks)):
                chin = points[8] if not flip else torch.stack([63 - points[8, 0], points[8, 1]])
                torch.testing.assert_close(chin, rendered[j].landmarks[8], rtol=0, atol=1e-3)
            used.add(i)
            flips.append(flip)
    assert set(seen) == {(common.DEGRADATIONS["gfrnet"], None)}  # Eq. (4)
    assert 6 <= sum(flips) <= 18 and len(used) > 8
    assert used <= set(range(10, 30)) - set(guides.values())  # no guide is a target


def test_random_guides_of_batches_are_other_people_drawn_anew(rendered):
    """The ablation with a guide of a different identity, Ours(R)."""
    cfg = replace(TINY, batch=6, shift=0.0, stranger=True)
    batches = gfrnet.Batches(rendered, list(range(20)), cfg)
    pairs = set()
    for step in range(5):
        _, targets, guides, *_ = batches[step]
        for target, guide in zip(targets, guides, strict=True):
            who, stranger = (rendered[shown(rendered, x)[0][0]].identity for x in (target, guide))
            assert who != stranger
            pairs.add((who, stranger))
    assert len(pairs) > 6  # of 12: nobody has one stranger for good


# Restoration and measuring


def test_restore_is_the_network_in_evaluation_mode_for_any_batch_size(float32):
    net = randomised(gfrnet.GFRNet(TINY), 0.05).train()
    degraded, guides = uniform(2, 5, 3, 64, 64)
    outputs = [gfrnet.restore(net, degraded, guides, batch) for batch in (2, 8)]
    assert net.training
    with torch.no_grad():
        expected = net.eval()(degraded, guides)
    for few, many, x in zip(*outputs, expected, strict=True):
        torch.testing.assert_close(few, x.clamp(-1, 1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(many, x.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    without = gfrnet.restore(gfrnet.GFRNet(replace(TINY, guided=False, warped=False)), degraded, guides)
    assert without[0].shape == degraded.shape and without[1] is None and without[2] is None


def test_the_decoder_starts_as_bilinear_doublings_of_random_mixtures():
    torch.manual_seed(0)
    body = gfrnet.EncoderDecoder(6, 3, 4, TINY, skips=True)
    layers = [module for module in body.up.modules() if isinstance(module, nn.ConvTranspose2d)]
    assert len(layers) == 6                                               # from 1×1 to 64×64
    for layer in layers:
        x = torch.randn(2, layer.in_channels, 7, 7)
        mix = layer.weight[:, :, 1, 1].T / 0.75**2                        # of the kernel's middle
        mixed = torch.einsum("oc,bchw->bohw", mix, x)
        expected = F.interpolate(mixed, scale_factor=2, mode="bilinear", align_corners=False)
        bias = 0 if layer.bias is None else layer.bias[:, None, None]
        gap = (layer(x) - bias - expected)[:, :, 2:-2, 2:-2]              # the border is padded otherwise
        assert gap.abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
        assert mix.square().mean().item() == pytest.approx(2 / layer.in_channels, rel=0.7)


def test_validation_is_equation_6_on_pictures_degraded_alike_every_time(rendered, float32):
    cfg = replace(TINY, weight_perceptual=0.7)
    indices = list(gfrnet.choose_guides(rendered, range(25)))
    net, encoder = randomised(gfrnet.GFRNet(TINY), 0.05), some_encoder()
    found = gfrnet.validate(net, encoder, rendered, indices, cfg)
    torch.rand(3)
    assert found == gfrnet.validate(net, encoder, rendered, indices, cfg)
    batches = list(gfrnet.restored_batches(net, rendered, indices, cfg, None))
    every = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    assert len(every["target"]) == 20 and len(batches) == 2  # of five people, less their guides
    for n, (i, j) in enumerate(gfrnet.choose_guides(rendered, indices).items()):
        for name, number in (("target", i), ("guide", j)):
            assert torch.equal(every[name][n], rendered[number].image)
        for name, number in (("landmarks", i), ("guide_landmarks", j)):
            assert torch.equal(every[name][n], rendered[number].landmarks)
    with torch.no_grad():
        restored, _, flow = net.eval()(every["degraded"], every["guide"])
        restored = restored.clamp(-1, 1)
        a, b = (encoder.features(x)[2] for x in (restored, every["target"]))
    square = (restored - every["target"]).square()
    quality = 10 * torch.log10(4 / square.mean((1, 2, 3)))  # dB, for a range of 2
    expected = {
        "validation": 100 * square.mean() + 0.7 * (a - b).square().mean(),
        "validation_psnr": quality.mean(),
        "landmark_error": gfrnet.landmark_error(flow, every["landmarks"], every["guide_landmarks"]).mean(),
    }
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-3)


def test_a_guided_network_is_also_measured_with_the_guides_of_strangers(rendered, float32, monkeypatch):
    """ "Robust to the misuse of identity": the same network, the same faces, somebody else's guide."""
    monkeypatch.setattr(common, "metrics", lambda faces, args: {"psnr": common.psnr})
    monkeypatch.setattr(common, "TASKS", {"x4": 4})
    args = SimpleNamespace(precision="float32")
    net, indices = randomised(gfrnet.GFRNet(TINY), 0.05), list(range(25))
    found = gfrnet.evaluate(net, rendered, indices, TINY, args)["x4"]
    for name, stranger in (("restored", False), ("stranger", True)):
        cfg = replace(TINY, stranger=stranger)
        batches = list(gfrnet.restored_batches(net, rendered, indices, cfg, 4))
        quality = torch.cat([common.psnr(batch["restored"], batch["target"]) for batch in batches])
        assert found[name]["psnr"] == pytest.approx(quality.mean().item(), rel=1e-5)
        for batch in batches:
            people = [[rendered[shown(rendered, image)[0][0]].identity for image in batch[name]]
                      for name in ("target", "guide")]
            assert all((a != b) == stranger for a, b in zip(*people, strict=True))
    assert found["stranger"]["psnr"] != found["restored"]["psnr"]
    for changes in ({"guided": False, "warped": False}, {"stranger": True}):
        cfg = replace(TINY, **changes)
        assert "stranger" not in gfrnet.evaluate(gfrnet.GFRNet(cfg), rendered, indices, cfg, args)["x4"]


# Training: Eq. (12), the schedule, learning


def train(patch, cfg, folder, out, *argv):
    patch.setitem(gfrnet.PRESETS, "tiny", cfg)
    paths = ["--data", str(folder), "--out", str(out)]
    gfrnet.main(["--train", "--device", "cpu", "--precision", "float32", *paths, *argv])
    return common.load_weights(out / "checkpoint.pt")


def watch(patch, cfg, folder, out):
    """Train `cfg`; copies of both networks before every step, all batches, all gradients."""
    watched = SimpleNamespace(nets=[], judges=[], inputs=[], encoder=some_encoder())

    class Net(gfrnet.GFRNet):
        def __init__(self, *args):
            super().__init__(*args)
            watched.trained = self

        def forward(self, degraded, guide, **options):
            if self.training:
                watched.nets.append(copy.deepcopy(self))
                watched.judges.append(copy.deepcopy(watched.live))
                watched.inputs.append((degraded.contiguous(), guide.contiguous()))
            return super().forward(degraded, guide, **options)

    class Judges(gfrnet.Discriminators):
        def __init__(self, *args):
            super().__init__(*args)
            watched.live = self

    patch.setattr(gfrnet, "GFRNet", Net)
    patch.setattr(gfrnet, "Discriminators", Judges)
    watched.state = train(patch, cfg, folder, out)
    watched.adams = WatchedAdam.made
    faces = common.FaceFolder(folder, cfg.size)
    watched.batches = gfrnet.Batches(faces, common.split_identities(faces)[0], cfg)
    return watched


def gradient(loss, parameters):
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def landmark_term(flow, landmarks, guide_landmarks):
    """Eq. (9) for a batch, by weights of every pixel instead of a sampler."""
    size = flow.shape[-1]
    pixels = torch.arange(size)
    x, y = ((1 - (landmarks[..., k, None] - pixels).abs()).clamp(min=0) for k in (0, 1))
    read = torch.einsum("bchw,bkh,bkw->bkc", flow, y, x)
    return (read - in_range(guide_landmarks, size)).square().sum() / len(flow)


def variation_term(flow):
    across, down = flow[..., 1:] - flow[..., :-1], flow[..., 1:, :] - flow[..., :-1, :]
    return (across.square().sum() + down.square().sum()) / len(flow)


def equation_12(watched, step):
    """The terms at `step` written out from the paper, on copies → net, judges, terms, judges' loss."""
    net, judges = watched.nets[step], watched.judges[step].requires_grad_(True)
    degraded, target, guide, landmarks, guide_landmarks = watched.batches[step]
    torch.testing.assert_close(watched.inputs[step][0], degraded)
    restored, _, flow = net(degraded, guide)
    features = [watched.encoder.features(x)[2] for x in (restored, target)]
    boxes = gfrnet.landmark_box(landmarks, 64)

    def views(image):
        stack = torch.cat([degraded, guide, image], 1)
        local = torch.cat([gfrnet.crop_local(stack[n : n + 1], boxes[n : n + 1], 32) for n in range(4)])
        return judges.whole(degraded, guide, image), judges.local(*local.split(3, 1))

    whole, local = (torch.sigmoid(logits.double()) for logits in views(restored))
    terms = {
        "pixel": 100 * ((restored - target) ** 2).mean(),
        "perceptual": 5 * ((features[0] - features[1]) ** 2).mean(),
        "global": -40 * whole.log().mean(),
        "local": -25 * local.log().mean(),
        "landmark": 10 * landmark_term(flow, landmarks, guide_landmarks),
        "tv": variation_term(flow),
    }
    judged = 0
    for true, false in zip(views(target), views(restored.detach()), strict=True):
        p, q = torch.sigmoid(true.double()), torch.sigmoid(false.double())
        judged = judged - (0.9 * p.log() + 0.1 * (1 - p).log()).mean() - (1 - q).log().mean()
    return net, judges, terms, judged


def test_every_step_follows_the_gradient_of_its_objective(quick, face_folder, tmp_path):
    """Step 1 trains WarpNet alone, 2 and 3 everything; the weights are such that no term is small."""
    cfg = replace(TINY, batch=4, steps=3, warp_share=1 / 3, validate_every=3, residual=False)
    cfg = replace(cfg, learning_rate=2e-4, cooldown=0, weight_perceptual=5.0, weight_tv=1.0)
    cfg = replace(cfg, weight_adversarial=(40.0, 25.0))
    watched = watch(quick, cfg, face_folder, tmp_path)
    generator, discriminators = watched.adams
    assert len(generator.seen) == 3 and len(discriminators.seen) == 2  # the judges wait for pictures

    own, others = generator.seen[0]
    net = watched.nets[0]
    degraded, _, guide, landmarks, guide_landmarks = watched.batches[0]
    flow = net(degraded, guide)[2]
    loss = 10 * landmark_term(flow, landmarks, guide_landmarks) + variation_term(flow)  # Eq. (11)
    expected = gradient(loss, list(net.parameters()))
    own = [torch.zeros_like(p) if g is None else g for g, p in zip(own, expected, strict=True)]
    assert gap(own, expected) < 0.003 and all(g is None for g in others)

    for step in (1, 2):
        net, judges, terms, judged = equation_12(watched, step)
        gradients = {name: gradient(term, list(net.parameters())) for name, term in terms.items()}
        total = [sum(many) for many in zip(*gradients.values(), strict=True)]
        own, _ = generator.seen[step]
        assert gap(own, total) < 0.003
        for name, term in gradients.items():  # a missing term would be noticed
            lacking = [a - b for a, b in zip(total, term, strict=True)]
            assert gap(lacking, total) > 0.01, name
        _, seen = discriminators.seen[step - 1]
        assert gap(seen, gradient(judged, list(judges.parameters()))) < 0.003
    assert not any(g.any() for g in generator.seen[1][1] if g is not None)  # nothing for the judges


@pytest.mark.slow
def test_variants_train_end_to_end_for_as_many_steps_as_full_without_the_terms_they_lack(
    quick, face_folder, tmp_path
):
    cfg = replace(TINY, steps=5, warp_share=0.6, validate_every=1)
    for name in gfrnet.VARIANTS:
        rows = train(quick, cfg, face_folder, tmp_path / name, "--variant", name)["rows"]
        aligned = name in ("full", "random-guide")
        assert len(rows) == (5 if aligned else 2), name
        for row in rows[-2:]:
            assert {"pixel", "perceptual", "adversarial", "discriminator"} <= set(row)
        assert all(({"landmark", "tv"} <= set(row)) == aligned for row in rows)
        assert len(WatchedAdam.made[-1].seen) == 2  # the discriminators'


def test_the_rates_are_a_tenth_and_a_hundredth_once_validation_stops_falling(quick, face_folder, tmp_path):
    """Of the rate of the step, until the loss is no longer falling; WarpNet's own steps do not count."""
    losses = iter([1.0, 2.0, 3.0, 5.0, 4.0, 4.5, 4.6, 3.9, 3.8, 4.4, 4.5, 4.6])
    quick.setattr(gfrnet, "validate", lambda *_: {"validation": next(losses)})
    cfg = replace(TINY, steps=12, warp_share=0.25, validate_every=1, patience=1, cooldown=0.5)
    train(quick, cfg, face_folder, tmp_path)
    generator, discriminators = WatchedAdam.made
    factors = [1] * 7 + [0.1] * 4 + [0.01]
    assert generator.rates == pytest.approx([cfg.rate(step) * x for step, x in enumerate(factors, 1)])
    assert discriminators.rates == pytest.approx(generator.rates[3:])


@pytest.mark.slow
def test_warp_net_learns_to_align_guides_by_the_flow_loss(rendered):
    """Landmarks of the same eight pairs come closer; the flow stays smooth and inside the picture."""
    torch.manual_seed(0)
    cfg = replace(gfrnet.TINY, size=64, width=8)
    degraded, _, guide, landmarks, guide_landmarks = gfrnet.Batches(rendered, list(range(50)), cfg)[0]
    net = gfrnet.GFRNet(cfg)
    optimizer = torch.optim.Adam(net.warp_net.parameters(), 2e-3, cfg.betas)
    errors = []
    for _ in range(60):
        flow = net(degraded, guide, flow_only=True)
        errors.append(gfrnet.landmark_error(flow, landmarks, guide_landmarks).mean().item())
        optimizer.zero_grad()
        sum(gfrnet.flow_loss(flow, landmarks, guide_landmarks, cfg).values()).backward()
        optimizer.step()
    assert errors[0] > 2  # pixels
    assert errors[-1] < 0.4 * errors[0]
    assert gfrnet.tv_loss(flow) < 16  # the identity has 8
