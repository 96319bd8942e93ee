"""GFRNet: every equation against an independent form, guides on posed heads, learning by a gain."""

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

import common
import gfrnet

TINY = replace(gfrnet.TINY, size=64, width=4, discriminator_width=4, batch=2)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    """Uniform in [-1,1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def randomised(module, spread=0.1, seed=5):
    """Every parameter random: some start at zero, which would hide what depends on them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return module


def lively(kind, **changes):
    """A network whose output depends on all of its input: no zeros, statistics of a true batch."""
    torch.manual_seed(2)
    net = kind(replace(TINY, **changes))
    for module in net.modules():
        if isinstance(module, gfrnet.EncoderDecoder):
            nn.init.normal_(module.up[-1].weight, std=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(*uniform(2, 8, 3, 64, 64, seed=7))
    return net.eval()


def in_pixels(flow, size):
    """Coordinates, ±1 being the image's edges → pixels, 0 being the centre of the first."""
    return (flow + 1) * size / 2 - 0.5


def in_range(pixels, size):
    return (2 * pixels + 1) / size - 1


# Config


def test_paper_preset_has_the_papers_numbers():
    paper = gfrnet.PAPER
    assert (paper.preset, paper.variant, paper.size, paper.batch) == ("paper", "full", 256, 1)
    assert (paper.weight_pixel, paper.weight_perceptual) == (100, 0.001)
    assert tuple(paper.weight_adversarial) == (1, 0.5)
    assert (paper.weight_landmark, paper.weight_tv, paper.smooth) == (10, 1, 0.9)
    assert paper.learning_rate == 2e-4 and paper.betas[0] == 0.5
    epoch = 20_273  # pairs, and steps, as the batch is 1
    assert (paper.warp_steps, paper.validate_every) == (5 * epoch, epoch)
    assert paper.steps >= 100 * epoch
    assert (paper.width, paper.discriminator_width, paper.rec_width) == (64, 64, 1)
    assert paper.guided and paper.warped and not paper.stranger and not paper.residual
    assert paper.degradation == "gfrnet" and paper.encoder == "vgg"
    assert gfrnet.PRESETS == {"tiny": gfrnet.TINY, "paper": paper}
    assert (gfrnet.TINY.weight_pixel, gfrnet.TINY.weight_landmark, gfrnet.TINY.smooth) == (100, 10, 0.9)


def test_variants_are_the_rows_of_table_1():
    full = asdict(gfrnet.PAPER)
    changes = {
        name: {k: v for k, v in asdict(replace(gfrnet.PAPER, **change)).items() if v != full[k]}
        for name, change in gfrnet.VARIANTS.items()
    }
    assert changes == {
        "full": {},
        "no-flow-loss": {"weight_landmark": 0, "weight_tv": 0},
        "no-warp": {"warped": False},
        "no-warp-2x": {"warped": False, "rec_width": 2},
        "no-guide": {"guided": False, "warped": False},
        "no-guide-2x": {"guided": False, "warped": False, "rec_width": 2},
        "random-guide": {"stranger": True},
    }


@pytest.mark.parametrize("options", [[], ["--steps", "170"], ["--preset", "paper"]])
def test_variants_without_a_flow_loss_train_end_to_end_for_as_many_steps_as_full(options, monkeypatch):
    chosen = {}
    monkeypatch.setattr(gfrnet, "train", lambda cfg, args: chosen.update({cfg.variant: cfg}))
    for name in gfrnet.VARIANTS:
        gfrnet.main(["--train", "--variant", name, "--device", "cpu", *options])
    full = chosen["full"]
    assert full.warp_steps > 0 and chosen["random-guide"].steps == full.steps
    for name, cfg in chosen.items():
        assert cfg.steps - cfg.warp_steps == full.steps - full.warp_steps, name
        assert (cfg.warp_steps == 0) == (name not in ("full", "random-guide")), name


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


def test_identity_flow_is_the_coordinates_of_the_pixel_centres():
    for size in (2, 6, 64):
        flow = gfrnet.identity_flow(size)
        assert flow.shape == (1, 2, size, size) and flow.dtype == torch.float32
        for i in range(0, size, 3):
            for j in range(size):
                assert flow[0, 0, i, j].item() == pytest.approx((2 * j + 1) / size - 1, abs=1e-6)  # x
                assert flow[0, 1, i, j].item() == pytest.approx((2 * i + 1) / size - 1, abs=1e-6)  # y


@pytest.mark.parametrize("channels", [1, 3, 9])
def test_warp_is_equation_2(channels):
    """Coordinates up to a quarter beyond the edge, where the neighbours that are missing count as 0."""
    image, flow = random(3, channels, 8, 8, seed=1), 1.25 * uniform(3, 2, 8, 8, seed=2)
    warped = gfrnet.warp(image, flow)
    assert warped.shape == image.shape
    for n in range(3):
        expected = equation_2(image[n].double().numpy(), flow[n].double().numpy())
        np.testing.assert_allclose(warped[n].numpy(), expected, atol=2e-5)
    assert (flow.abs() > 1).any()


def test_warp_reads_whole_pixels_where_the_flow_points_at_their_centres():
    image, size = random(1, 2, 8, 8), 8
    identity = gfrnet.identity_flow(size)
    torch.testing.assert_close(gfrnet.warp(image, identity), image, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        gfrnet.warp(image, identity.flip(3)), image.flip(3), rtol=0, atol=1e-5
    )  # mirrored
    right, below = identity.clone(), identity.clone()
    right[:, 0] += 3 * 2 / size  # x first: read three pixels further to the right
    below[:, 1] += 2 * 2 / size
    torch.testing.assert_close(gfrnet.warp(image, right)[..., :5], image[..., 3:], rtol=0, atol=1e-5)
    assert gfrnet.warp(image, right)[..., 5:].abs().max() < 1e-4  # beyond the edge is 0
    torch.testing.assert_close(gfrnet.warp(image, below)[:, :, :6], image[:, :, 2:], rtol=0, atol=1e-5)


def test_half_of_a_pixel_on_the_edge_comes_from_the_zeros_beyond():
    flow = torch.full((1, 2, 4, 4), 0.25)  # between pixels
    flow[:, 0] = 1.0  # the outer edge itself, half way from the last centre to the first missing one
    warped = gfrnet.warp(torch.ones(1, 1, 4, 4), flow)
    torch.testing.assert_close(warped, torch.full((1, 1, 4, 4), 0.5))


@pytest.mark.parametrize("wanted", ["flow", "image"])
def test_gradients_of_warp_are_the_finite_differences_of_equation_2(wanted):
    image, flow = random(1, 2, 6, 6, seed=3), 1.1 * uniform(1, 2, 6, 6, seed=4)
    pixels = in_pixels(flow, 6)  # kept off the kinks of Eq. (2), which has none but the pixel centres
    flow = in_range(pixels.floor() + 0.1 + 0.8 * (pixels - pixels.floor()), 6)
    weight = random(1, 2, 6, 6, seed=5)
    image.requires_grad_(), flow.requires_grad_()
    (gfrnet.warp(image, flow) * weight).sum().backward()

    def value(name, place, change):
        inputs = {"image": image, "flow": flow}
        arrays = {k: v.detach()[0].double().numpy().copy() for k, v in inputs.items()}
        arrays[name][place] += change
        return (equation_2(arrays["image"], arrays["flow"]) * weight[0].double().numpy()).sum()

    gradient, step = {"image": image, "flow": flow}[wanted].grad[0], 1e-4
    assert gradient.abs().max() > 0.1
    for place in np.ndindex(2, 6, 6):
        difference = (value(wanted, place, step) - value(wanted, place, -step)) / (2 * step)
        assert gradient[place].item() == pytest.approx(difference, rel=1e-3, abs=1e-3), place


def test_warping_by_a_turn_moves_the_guides_marks_onto_the_targets():
    """Image, flow and landmarks agree on where a pixel is: the guide's dots land on the target's."""
    size, turn, scale = 64, math.radians(20), 0.9
    points = torch.tensor([[20.0, 25], [44, 22], [32, 36], [24, 47], [41, 45]])
    matrix = scale * torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    middle = torch.tensor([31.5, 31.5])

    def place(points):
        return (points - middle) @ matrix.T + middle + torch.tensor([2.0, -3.0])

    guide_points = place(points)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    pixels = torch.stack([x, y], -1).float()
    guide = torch.stack([torch.exp(-(pixels - p).square().sum(-1) / 8) for p in guide_points])[None]
    flow = in_range(place(pixels), size).permute(2, 0, 1)[None]
    warped = gfrnet.warp(guide, flow)[0]
    found = (warped[..., None] * pixels).sum((1, 2)) / warped.sum((1, 2))[:, None]
    torch.testing.assert_close(found, points, rtol=0, atol=0.05)
    marks, guide_marks = (torch.cat([p, p[:1].expand(63, 2)])[None] for p in (points, guide_points))
    assert gfrnet.landmark_loss(flow, marks, guide_marks).item() < 1e-8
    assert gfrnet.landmark_error(flow, marks, guide_marks).item() < 1e-3
    assert gfrnet.landmark_error(gfrnet.identity_flow(size), marks, guide_marks).item() > 2


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
    cfg = replace(TINY, batch=1, residual=False)
    net = randomised(gfrnet.RecNet(cfg), 0.2)
    degraded, warped = uniform(2, 3, 3, 64, 64)
    together = net.train()(degraded, warped)
    raw = by_hand(net, torch.cat([degraded, warped], 1), skips=True, per_image=True)
    torch.testing.assert_close(together, torch.tanh(raw), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.eval()(degraded, warped), together)
    for n in range(3):
        torch.testing.assert_close(net(degraded[n : n + 1], warped[n : n + 1]), together[n : n + 1])


@pytest.mark.parametrize("size", [64, 128, 256])
def test_layers_are_those_of_figure_3_with_the_widths_of_pix2pix(size):
    with torch.device("meta"):
        net = gfrnet.GFRNet(replace(gfrnet.PAPER, size=size))
    widths = [64, 128, 256, 512, 512, 512, 512, 512][: int(math.log2(size))]
    levels = len(widths)
    for part, out, skips in ((net.warp_net, 2, False), (net.rec_net, 3, True)):
        down, up, norms = layers(part)
        assert [(c.in_channels, c.out_channels) for c in down] == list(
            zip([6, *widths], widths, strict=False)
        )
        before = [widths[-1], *(w * (2 if skips else 1) for w in widths[-2::-1])]
        assert [(c.in_channels, c.out_channels) for c in up] == list(
            zip(before, [*widths[-2::-1], out], strict=True)
        )
        assert all((c.kernel_size, c.stride, c.padding) == ((4, 4), (2, 2), (1, 1)) for c in down + up)
        assert len(norms) == 2 * levels - 3  # not the first, the last, and the one of 1x1
    assert size != 256 or levels == 8


def test_full_has_nearly_twice_the_parameters_of_the_variants_without_warp_net():
    def parameters(name):
        with torch.device("meta"):
            net = gfrnet.GFRNet(replace(gfrnet.PAPER, **gfrnet.VARIANTS[name]))
        return sum(p.numel() for p in net.parameters())

    full = parameters("full")
    assert 1.6 < full / parameters("no-warp") < 2 and 1.6 < full / parameters("no-guide") < 2
    for name in ("no-warp", "no-guide"):  # twice the channels: four times the weights
        assert parameters(f"{name}-2x") / parameters(name) == pytest.approx(4, rel=0.01)
    assert parameters("random-guide") == parameters("no-flow-loss") == full


def dead_bottleneck(net):
    conv = layers(net)[0][-1]
    return conv.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))


def test_warp_net_has_no_skips_and_rec_net_has():
    """With the 1x1 map dead, WarpNet is blind; RecNet still sees its input past it."""
    first, second = uniform(2, 2, 3, 64, 64), uniform(2, 2, 3, 64, 64, seed=1)
    for kind, blind in ((gfrnet.WarpNet, True), (gfrnet.RecNet, False)):
        net = lively(kind, residual=False)
        assert not torch.allclose(net(*first), net(*second), atol=1e-3)
        handle = dead_bottleneck(net)
        assert torch.allclose(net(*first), net(*second), atol=1e-5) == blind
        handle.remove()


def test_flow_starts_near_the_identity_and_all_of_warp_net_learns():
    torch.manual_seed(0)
    net = gfrnet.WarpNet(TINY)
    degraded, guide = uniform(2, 2, 3, 64, 64)
    gap = (net(degraded, guide) - gfrnet.identity_flow(64)).abs().max() * 32
    assert gap < 0.5  # pixels
    torch.testing.assert_close(gfrnet.warp(guide, net(degraded, guide)), guide, rtol=0, atol=0.5)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    for _ in range(2):  # what lies before a layer of zeros is reached one step later
        optimizer.zero_grad()
        gfrnet.landmark_loss(net(degraded, guide), *marks(2, 2)).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_restoration_starts_at_its_input_where_it_is_residual():
    torch.manual_seed(0)
    degraded, guide = uniform(2, 2, 3, 64, 64)
    restored = gfrnet.RecNet(replace(TINY, residual=True))(degraded, guide)
    assert (restored - degraded).abs().max() < 0.2
    restored = gfrnet.RecNet(replace(TINY, residual=False))(3 * degraded, guide)
    assert restored.abs().max() <= 1


def test_the_signal_neither_dies_nor_explodes_on_its_way_through_a_new_network():
    torch.manual_seed(0)
    net, sizes = gfrnet.GFRNet(replace(TINY, width=16)), []
    for part in (net.warp_net, net.rec_net):
        for layer in layers(part)[0] + layers(part)[1][:-1]:
            layer.register_forward_hook(lambda module, inputs, output: sizes.append(output.std().item()))
    net(*uniform(2, 4, 3, 64, 64))
    assert len(sizes) == 22 and 0.05 < min(sizes) and max(sizes) < 20


def test_discriminators_start_normal_with_deviation_0_02():
    torch.manual_seed(0)
    for layer in layers(gfrnet.Discriminator(16))[0][:-1]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert abs(layer.weight.mean().item()) < 0.002


def test_network_warps_the_guide_by_its_flow_and_restores_from_both():
    net = lively(gfrnet.GFRNet)
    degraded, guide = uniform(2, 2, 3, 64, 64)
    with torch.no_grad():
        restored, warped, flow = net(degraded, guide)
        assert restored.shape == warped.shape == (2, 3, 64, 64) and flow.shape == (2, 2, 64, 64)
        torch.testing.assert_close(flow, net.warp_net(degraded, guide))
        torch.testing.assert_close(net(degraded, guide, flow_only=True), flow)
        expected = equation_2(guide[1].double().numpy(), flow[1].double().numpy())
        np.testing.assert_allclose(warped[1].numpy(), expected, atol=1e-4)
        torch.testing.assert_close(restored, net.rec_net(degraded, warped))
        for moved in (net(uniform(2, 3, 64, 64, seed=8), guide), net(degraded, guide.flip(0))):
            assert (moved[2] - flow).abs().max() > 1e-3  # the flow looks at both


def test_what_is_restored_does_not_depend_on_the_rest_of_the_batch():
    net = lively(gfrnet.GFRNet)
    degraded, guide = uniform(2, 3, 3, 64, 64)
    with torch.no_grad():
        for together, alone in zip(net(degraded, guide), net(degraded[1:2], guide[1:2]), strict=True):
            torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


def test_gradients_of_the_restored_image_reach_warp_net_through_equation_2():
    """End-to-end training: a loss on the restoration alone also moves the flow."""
    net = randomised(gfrnet.GFRNet(TINY), 0.1)
    net(*uniform(2, 2, 3, 64, 64))[0].square().mean().backward()
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
        torch.testing.assert_close(restored, net.rec_net(degraded, None))
        assert torch.equal(net(degraded, -guide)[0], restored) and layers(net)[0][0].in_channels == 3
    assert layers(network("no-warp-2x"))[0][0].out_channels == 2 * TINY.width


# Discriminators


def test_discriminator_has_the_layers_of_pix2pix():
    down, _, norms = layers(gfrnet.Discriminator(64))
    assert [(c.in_channels, c.out_channels) for c in down] == [
        (9, 64),
        (64, 128),
        (128, 256),
        (256, 512),
        (512, 1),
    ]
    assert [c.stride for c in down] == [(2, 2), (2, 2), (2, 2), (1, 1), (1, 1)]
    assert all(c.kernel_size == (4, 4) for c in down)
    assert [n.num_features for n in norms] == [128, 256, 512]


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


def test_discriminator_gives_logits_of_either_sign():
    judge = gfrnet.Discriminator(4)
    with torch.no_grad():
        judge.layers[-1].bias.fill_(-3)
        assert (judge(*uniform(3, 2, 3, 64, 64)) < 0).all()
        judge.layers[-1].bias.fill_(3)
        assert (judge(*uniform(3, 2, 3, 64, 64)) > 1).any()


def marks(count, sets=1, size=64, seed=3):
    """Random landmarks well inside the image: (count,68,2), or `sets` of them."""
    points = size * (0.5 + 0.3 * uniform(sets, count, 68, 2, seed=seed))
    return points[0] if sets == 1 else points.unbind()


def test_landmark_box_is_the_smallest_around_all_landmarks_cut_at_the_edges():
    size, points = 64, marks(3)
    points[1] = points[1] * 2 - 30  # beyond the edges
    points[2, 5] = torch.tensor([3.0, 60.0])
    boxes = gfrnet.landmark_box(points, size)
    assert boxes.shape == (3, 4)
    for box, face in zip(boxes.tolist(), points.tolist(), strict=True):
        x, y = zip(*face, strict=True)
        edges = min(x), min(y), max(x) + 1, max(y) + 1  # a pixel spans i … i + 1
        assert box == pytest.approx([min(max(edge, 0), size) for edge in edges], abs=1e-4)
    assert boxes[1].min() == 0 and boxes[1].max() == size


def test_landmark_box_of_a_face_off_the_edge_still_has_an_inside():
    for shift in (-200.0, 200.0, 63.0):
        box = gfrnet.landmark_box(torch.zeros(1, 68, 2) + shift, 64)[0]
        assert box.min() >= 0 and box.max() <= 64
        assert (box[2:] - box[:2]).min() >= 1


def test_crop_local_of_a_linear_ramp_is_the_ramp_at_the_bin_centres():
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    image = torch.stack([torch.stack([3 * x + y, 2 - y + 7 * n]) for n in range(2)])
    boxes = torch.tensor([[4.0, 6, 28, 37], [10.5, 3, 33, 20.25]])
    crops = gfrnet.crop_local(image, boxes, 12)
    assert crops.shape == (2, 2, 12, 12)
    for n, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        for i in range(12):
            for j in range(12):
                u = x1 + (j + 0.5) * (x2 - x1) / 12 - 0.5  # edges → index
                v = y1 + (i + 0.5) * (y2 - y1) / 12 - 0.5
                assert crops[n, 0, i, j].item() == pytest.approx(3 * u + v, abs=1e-3)
                assert crops[n, 1, i, j].item() == pytest.approx(2 - v + 7 * n, abs=1e-3)


def test_a_box_of_whole_pixels_is_cropped_unchanged():
    image = random(1, 3, 20, 20)
    crop = gfrnet.crop_local(image, torch.tensor([[2.0, 5, 10, 13]]), 4)
    torch.testing.assert_close(crop, F.avg_pool2d(image[..., 5:13, 2:10], 2), rtol=1e-5, atol=1e-5)


def test_the_local_discriminator_sees_only_the_box_and_the_global_one_all():
    judges = randomised(gfrnet.Discriminators(4), 0.3)
    degraded, guide, image = uniform(3, 2, 3, 64, 64)
    boxes = torch.tensor([[16.0, 20, 40, 52], [8, 12, 50, 60]])
    outside = torch.ones(2, 1, 64, 64)
    outside[0, :, 19:53, 15:41] = outside[1, :, 11:61, 7:51] = 0
    with torch.no_grad():
        whole, local = judges(degraded, guide, image, boxes)
        assert whole.shape == (2, 1, 6, 6) and local.shape == (2, 1, 2, 2)  # 64 pixels, and 32
        for k in range(3):
            inputs = [degraded, guide, image]
            inputs[k] = inputs[k] + outside
            changed = judges(*inputs, boxes)
            torch.testing.assert_close(changed[1], local)
            assert (changed[0] - whole).abs().max() > 1e-2
            inputs[k] = inputs[k] + (1 - outside) * uniform(2, 3, 64, 64, seed=9)
            assert (judges(*inputs, boxes)[1] - local).abs().max() > 1e-2
        crops = [gfrnet.crop_local(x, boxes, 32) for x in (degraded, guide, image)]
        own = [
            [p.numel() for p in part.parameters()]
            for part in judges.children()
            if isinstance(part, gfrnet.Discriminator)
        ]
        assert len(own) == 2 and own[0] == own[1]
        torch.testing.assert_close(judges.local(*crops), local)


# Eq. (5) and (6): reconstruction


def test_pixel_loss_is_the_squared_distance_of_equation_6_as_a_mean():
    restored, target = uniform(2, 2, 3, 8, 8)
    expected = sum(
        (a - b) ** 2 for a, b in zip(restored.flatten().tolist(), target.flatten().tolist(), strict=True)
    )
    assert gfrnet.pixel_loss(restored, target).item() == pytest.approx(
        expected / (2 * 3 * 8 * 8), rel=1e-5
    )
    assert gfrnet.pixel_loss(target, target) == 0


def test_pixel_loss_has_the_gradient_of_a_squared_distance():
    restored, target = (x.clone() for x in uniform(2, 2, 3, 8, 8))
    gfrnet.pixel_loss(restored.requires_grad_(), target).backward()
    torch.testing.assert_close(restored.grad, 2 * (restored.detach() - target) / restored.numel())


def test_perceptual_loss_is_equation_5():
    a, b = random(2, 3, 5, 4, 6)
    expected = 0
    for n in range(3):
        square = 0.0
        for c, h, w in np.ndindex(5, 4, 6):
            square += (a[n, c, h, w].item() - b[n, c, h, w].item()) ** 2
        expected += square / (5 * 4 * 6) / 3
    assert gfrnet.perceptual_loss(a, b).item() == pytest.approx(expected, rel=1e-5)
    assert gfrnet.perceptual_loss(a, a) == 0


def test_the_conv4_map_is_the_one_at_an_eighth_of_the_size():
    encoder = common.Recogniser((6, 8, 10, 12)).eval()
    image = uniform(2, 3, 64, 64)
    maps = encoder.features(image)
    assert gfrnet.conv4(encoder, image).shape == (2, 10, 8, 8)
    torch.testing.assert_close(gfrnet.conv4(encoder, image), maps[2])


# Eq. (7) and (8): adversarial


def logit_maps(seed):
    return [3 * random(2, 1, 6, 6, seed=seed), 3 * random(2, 1, 2, 2, seed=seed + 1)]


def probability(logits):
    return 1 / (1 + np.exp(-logits.double().numpy()))


def test_discriminator_loss_is_equations_7_and_8_with_labels_0_9_and_0():
    real, fake = logit_maps(0), logit_maps(10)
    expected = 0
    for r, f in zip(real, fake, strict=True):
        p, q = probability(r), probability(f)
        expected -= np.mean(0.9 * np.log(p) + 0.1 * np.log(1 - p))
        expected -= np.mean(np.log(1 - q))  # no smoothing: fakes are 0, not 0.1
    assert gfrnet.discriminator_loss(real, fake).item() == pytest.approx(expected, rel=1e-5)


def test_without_smoothing_the_discriminator_maximises_equation_7():
    real, fake = logit_maps(2), logit_maps(12)
    value = sum(
        np.log(probability(r)).mean() + np.log(1 - probability(f)).mean()
        for r, f in zip(real, fake, strict=True)
    )
    assert gfrnet.discriminator_loss(real, fake, 1.0).item() == pytest.approx(-value, rel=1e-5)


def test_the_best_discriminator_calls_true_pictures_true_with_probability_0_9():
    best = torch.full((1, 1, 2, 2), math.log(0.9 / 0.1), requires_grad=True)
    fake = torch.full((1, 1, 2, 2), -30.0, requires_grad=True)
    loss = gfrnet.discriminator_loss([best, best], [fake, fake])
    loss.backward()
    assert best.grad.abs().max() < 1e-6 and fake.grad.abs().max() < 1e-6
    assert loss.item() == pytest.approx(-2 * (0.9 * math.log(0.9) + 0.1 * math.log(0.1)), rel=1e-5)
    for shift in (-0.5, 0.5):
        assert gfrnet.discriminator_loss([best + shift] * 2, [fake] * 2) > loss


def test_discriminator_loss_adds_up_its_maps_and_stays_finite():
    real, fake = logit_maps(4), logit_maps(14)
    parts = [gfrnet.discriminator_loss([r], [f]) for r, f in zip(real, fake, strict=True)]
    torch.testing.assert_close(gfrnet.discriminator_loss(real, fake), sum(parts))
    huge = [torch.full((1, 1, 2, 2), 1e4)]
    assert gfrnet.discriminator_loss(huge, [-huge[0]]).isfinite()
    assert gfrnet.discriminator_loss([-huge[0]], huge).item() == pytest.approx(0.9e4 + 1e4)


def test_adversarial_loss_is_equation_8_for_the_generator():
    fake, weights = logit_maps(20), (1.0, 0.5)
    expected = -sum(w * np.log(probability(f)).mean() for w, f in zip(weights, fake, strict=True))
    assert gfrnet.adversarial_loss(fake, weights).item() == pytest.approx(expected, rel=1e-5)


def test_adversarial_loss_still_has_a_gradient_when_the_discriminator_wins():
    lost = torch.full((1, 1, 1, 1), -40.0, requires_grad=True)
    loss = gfrnet.adversarial_loss([lost, lost.detach()], (1.0, 0.5))
    loss.backward()
    assert lost.grad.item() == pytest.approx(-1, abs=1e-5)  # log(1 − D) would have none
    assert loss.item() == pytest.approx(60, rel=1e-5)


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


def test_landmark_loss_is_equation_9():
    flow, (points, guide_points) = uniform(3, 2, 16, 16, seed=1).double(), marks(3, 2, size=16)
    expected = np.mean(
        [equation_9(*(x[n].double().numpy() for x in (flow, points, guide_points))) for n in range(3)]
    )
    assert gfrnet.landmark_loss(flow, points, guide_points).item() == pytest.approx(expected, rel=1e-5)


def test_landmarks_beyond_the_edge_read_the_flow_at_the_edge():
    flow = uniform(1, 2, 8, 8, seed=1).double()
    points = marks(1, size=8) * 3 - 8
    assert points.min() < 0 and points.max() > 8
    expected = equation_9(*(x[0].double().numpy() for x in (flow, points, points)))
    assert gfrnet.landmark_loss(flow, points, points).item() == pytest.approx(expected, rel=1e-5)


def test_landmark_loss_of_the_identity_is_the_distance_of_the_landmarks():
    """All 68 points count, x and y alike, in [-1,1]; a guide like the target has no loss."""
    points = marks(2)
    identity = gfrnet.identity_flow(64).expand(2, -1, -1, -1)
    assert gfrnet.landmark_loss(identity, points, points).item() < 1e-9
    for axis in (0, 1):
        for index in (0, 17, 67):
            moved = points.clone()
            moved[0, index, axis] += 5
            expected = (5 * 2 / 64) ** 2 / 2  # one face of two
            assert gfrnet.landmark_loss(identity, points, moved).item() == pytest.approx(
                expected, rel=1e-3
            )


def test_landmark_loss_has_the_gradient_of_equation_9():
    flow, (points, guide_points) = uniform(1, 2, 8, 8, seed=1).double(), marks(1, 2, size=8)
    gfrnet.landmark_loss(flow.requires_grad_(), points, guide_points).backward()
    arrays = [x.detach()[0].double().numpy() for x in (flow, points, guide_points)]
    step = 1e-4
    for place in np.ndindex(2, 8, 8):
        values = []
        for change in (step, -step):
            moved = arrays[0].copy()
            moved[place] += change
            values.append(equation_9(moved, *arrays[1:]))
        difference = (values[0] - values[1]) / (2 * step)
        assert flow.grad[0][place].item() == pytest.approx(difference, rel=1e-3, abs=1e-3)


def test_landmark_error_is_the_mean_distance_in_pixels():
    flow, (points, guide_points) = uniform(2, 2, 16, 16, seed=1), marks(2, 2, size=16)
    errors = gfrnet.landmark_error(flow, points, guide_points)
    assert errors.shape == (2,)
    for n in range(2):
        plane, distances = in_pixels(flow[n].double().numpy(), 16), []
        for (x, y), (gx, gy) in zip(points[n].tolist(), guide_points[n].tolist(), strict=True):
            read = [read_bilinearly(plane[axis], x, y) for axis in (0, 1)]
            distances.append(math.hypot(read[0] - gx, read[1] - gy))
        assert errors[n].item() == pytest.approx(np.mean(distances), rel=1e-4)
    shifted = points + torch.tensor([3.0, 4.0])
    identity = gfrnet.identity_flow(16).expand(2, -1, -1, -1)
    torch.testing.assert_close(
        gfrnet.landmark_error(identity, points, shifted), torch.tensor([5.0, 5.0]), rtol=0, atol=1e-3
    )


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


def test_tv_loss_sees_each_direction_of_each_coordinate():
    line = torch.linspace(-1, 1, 9)
    for channel in (0, 1):
        for turned in (False, True):
            flow = torch.zeros(2, 2, 9, 9)
            flow[:, channel] = line[:, None] if turned else line
            assert gfrnet.tv_loss(flow).item() == pytest.approx(8 * 9 * 0.25**2)
    assert gfrnet.tv_loss(torch.full((1, 2, 9, 9), 0.7)) == 0


@pytest.mark.parametrize("size", [16, 64])
def test_tv_loss_of_the_identity_is_8_at_any_size_but_for_the_last_row_and_column(size):
    expected = 2 * size * (size - 1) * (2 / size) ** 2
    assert gfrnet.tv_loss(gfrnet.identity_flow(size)).item() == pytest.approx(expected, rel=1e-4)
    assert expected == pytest.approx(8, rel=1.01 / size)


def test_tv_loss_has_the_gradient_of_equation_10():
    flow = uniform(1, 2, 5, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(gfrnet.tv_loss, flow)


def test_flow_loss_is_the_weighted_sum_of_equation_11():
    flow, (points, guide_points) = uniform(2, 2, 16, 16), marks(2, 2, size=16)
    cfg = replace(TINY, weight_landmark=10.0, weight_tv=0.25)
    terms = gfrnet.flow_loss(flow, points, guide_points, cfg)
    expected = 10 * gfrnet.landmark_loss(flow, points, guide_points) + 0.25 * gfrnet.tv_loss(flow)
    torch.testing.assert_close(sum(terms.values()), expected)
    assert set(terms) == {"landmark", "tv"}


# Guides: frontal, eyes open, another picture of the same person


def posed_head(yaw=0.0, roll=0.0, opening=(0.4, 0.4)):
    """The 68 points of a simple head in three dimensions, turned, seen from far away: (68,2)."""
    points = np.zeros((68, 3))
    around = np.linspace(-math.pi / 2, math.pi / 2, 17)
    points[:17] = np.stack([np.sin(around), 1.3 * np.cos(around), 0.3 * np.cos(around) - 0.3], 1)
    points[17:22] = [[x, -0.55, 0.3] for x in np.linspace(-0.75, -0.2, 5)]
    points[22:27] = points[17:22][::-1] * [-1, 1, 1]
    points[27:31] = [
        [0, y, z] for y, z in zip((-0.3, -0.1, 0.1, 0.3), (0.4, 0.5, 0.65, 0.8), strict=True)
    ]
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


@pytest.mark.parametrize("opening", [(0.4, 0.05), (0.05, 0.4), (0.05, 0.05), (0.4, 0.0)])
def test_closed_eyes_cost_more_than_any_turn(opening):
    turned = gfrnet.guide_score(posed_head(math.radians(40))[None])
    closed = gfrnet.guide_score(posed_head(opening=opening)[None])
    assert closed >= 1 and closed > turned


def test_guide_score_does_not_depend_on_place_size_or_roll():
    for turn, opening in ((0.0, 0.4), (0.3, 0.4), (-0.5, 0.4), (0.2, 0.02)):
        head = posed_head(turn, opening=(opening, opening))
        expected = gfrnet.guide_score(head[None]).item()
        for other in (
            head * 100,
            head * 7 + torch.tensor([300.0, -40.0]),
            posed_head(turn, math.radians(35), (opening, opening)) * 20 + 50,
            posed_head(turn, -2.0, (opening, opening)) * 20 + 50,
        ):
            assert gfrnet.guide_score(other[None]).item() == pytest.approx(expected, abs=1e-3)
        mirrored = common.mirror(torch.zeros(1, 3, 64, 64), head[None] * 20 + 32)[1]
        assert gfrnet.guide_score(mirrored).item() == pytest.approx(expected, abs=1e-4)


class Heads:
    """A data set of posed heads: a list of (identity, yaw, opening)."""

    fingerprint, size = "heads", 64

    def __init__(self, heads):
        self.heads, self.identity = heads, torch.tensor([head[0] for head in heads])

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


def test_guides_are_the_most_frontal_other_picture_with_open_eyes():
    guides = gfrnet.choose_guides(Heads(HEADS), list(range(10)))
    assert guides == {
        0: 1,  # the most frontal of person 4 but for picture 3, whose eyes are closed
        1: 7,  # never itself: the next best
        3: 1,
        7: 1,
        2: 6,
        4: 6,
        6: 4,
        8: 9,  # both closed: the more frontal of them
        9: 8,
    }  # 5 is the only picture of person 2


def test_only_the_named_pictures_get_guides():
    heads = Heads(HEADS)
    assert gfrnet.choose_guides(heads, [5]) == {} and gfrnet.choose_guides(heads, []) == {}
    guides = gfrnet.choose_guides(heads, [6, 2, 5, 4, 0, 1])
    assert set(guides) == {0, 1, 2, 4, 6}
    assert all(heads.identity[i] == heads.identity[j] and i != j for i, j in guides.items())


def test_strangers_are_other_people_with_good_guides():
    heads = Heads(HEADS)
    strangers = gfrnet.choose_guides(heads, list(range(10)), True)
    assert set(strangers) == set(gfrnet.choose_guides(heads, list(range(10))))
    assert all(heads.identity[i] != heads.identity[j] for i, j in strangers.items())
    assert set(strangers.values()) <= {1, 6, 9}  # the best of their people


def test_a_stranger_is_never_the_same_person_even_where_one_person_is_left():
    heads = Heads(HEADS)
    guides = gfrnet.choose_guides(heads, [0, 1, 3, 7], True)
    assert all(heads.identity[i] != heads.identity[j] for i, j in guides.items())


class Rendered:
    """Eight rendered people × 6 pictures, with the pose that the renderer gave each of them."""

    fingerprint = "rendered-poses"

    def __init__(self, people=range(4, 12), shots=6, seed=1):
        self.faces, self.yaw, self.opening, turns, patch = [], [], [], [], pytest.MonkeyPatch()
        rotation, points = common.rotation, common.landmark_points
        patch.setattr(common, "rotation", lambda *angles: turns.append(angles) or rotation(*angles))
        patch.setattr(
            common,
            "landmark_points",
            lambda eye, opening: self.opening.append(opening) or points(eye, opening),
        )
        for who in people:
            for shot in range(shots):
                turns.clear()
                image, landmarks = common.render_face(64, seed, who, shot)
                image = torch.from_numpy(image).float() / 127.5 - 1
                self.faces.append(common.Face(image, torch.from_numpy(landmarks), who))
                self.yaw.append(math.degrees(abs(turns[0][0])))
        patch.undo()
        self.identity = torch.tensor([face.identity for face in self.faces])

    def __len__(self):
        return len(self.faces)

    def __getitem__(self, i):
        return self.faces[i]

    def landmarks(self, i):
        return self.faces[i].landmarks

    def damaged(self, i):
        return False

    def others(self, i):
        return [j for j in range(len(self)) if j != i and self.identity[j] == self.identity[i]]


@pytest.fixture(scope="module")
def rendered():
    return Rendered()


def test_guide_score_finds_closed_eyes_and_turned_heads_of_rendered_faces(rendered):
    scores = gfrnet.guide_score(torch.stack([rendered.landmarks(i) for i in range(len(rendered))]))
    closed = torch.tensor(rendered.opening) < 0.1
    assert 3 <= closed.sum() <= 12
    assert (scores[closed] >= 1).all() and (scores[~closed] < 1).all()
    yaw = torch.tensor(rendered.yaw)[~closed]
    assert np.corrcoef(scores[~closed].numpy(), yaw.numpy())[0, 1] > 0.9


def test_guides_of_rendered_faces_are_frontal_with_open_eyes_and_the_same_person(rendered):
    everything = list(range(len(rendered)))
    guides = gfrnet.choose_guides(rendered, everything)
    assert sorted(guides) == everything
    mean = sum(rendered.yaw) / len(rendered)
    for i, j in guides.items():
        assert rendered.identity[i] == rendered.identity[j] and i != j
        assert rendered.opening[j] > 0.1
        open_ = [k for k in rendered.others(i) if rendered.opening[k] > 0.1]
        assert rendered.yaw[j] < min(rendered.yaw[k] for k in open_) + 6  # degrees
    assert sum(rendered.yaw[j] for j in guides.values()) / len(guides) < mean / 2


# Data


def test_batches_are_a_pure_function_of_seed_rank_and_step(rendered):
    indices = list(range(0, 30))
    batches = gfrnet.Batches(rendered, indices, TINY)
    batch = batches[3]
    degraded, target, guide, landmarks, guide_landmarks = batch
    assert degraded.shape == target.shape == guide.shape == (2, 3, 64, 64)
    assert landmarks.shape == guide_landmarks.shape == (2, 68, 2)
    torch.rand(7)
    again = gfrnet.Batches(rendered, indices, replace(TINY, steps=9999))
    again[5], batches[0]
    for a, b, c in zip(batch, batches[3], again[3], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    others = [
        batches[4],
        gfrnet.Batches(rendered, indices, replace(TINY, seed=1))[3],
        gfrnet.Batches(rendered, indices, TINY, rank=1)[3],
    ]
    assert not any(torch.equal(degraded, other[0]) for other in others)
    assert len(again) == 9999


def placed(face, flip):
    """A face of the data set, or its mirror image: (3,H,W), (68,2)."""
    images, landmarks = face.image[None], face.landmarks[None]
    images, landmarks = common.mirror(images, landmarks) if flip else (images, landmarks)
    return images[0], landmarks[0]


def zoom(points, landmarks):
    """Scale and shift that bring points onto landmarks, by least squares, and the error left."""
    rows = torch.zeros(68, 2, 3)
    rows[..., 0], rows[:, 0, 1], rows[:, 1, 2] = points, 1, 1
    (scale, *shift), error, *_ = np.linalg.lstsq(
        rows.reshape(136, 3), landmarks.reshape(136), rcond=None
    )
    return scale, shift, math.sqrt(error[0] / 136)


@pytest.mark.parametrize("crop", [0.0, 0.1])
def test_batches_hold_targets_with_their_guides_flipped_together(crop, rendered, monkeypatch):
    """Every picture is a part of one of the data set or its mirror image, landmarks as well."""
    seen = []

    def degrade(target, degradation, generator=None, scale=None):
        seen.append((target, degradation, scale))
        return target * 0.5

    monkeypatch.setattr(common, "degrade", degrade)
    indices = list(range(6, 24))
    guides = gfrnet.choose_guides(rendered, indices)
    cfg = replace(TINY, batch=8, crop=crop)
    batches, counts, used, scales = gfrnet.Batches(rendered, indices, cfg), [0, 0], set(), []
    for step in range(4):
        degraded, *batch = batches[step]
        assert torch.equal(degraded, batch[0] * 0.5)
        drawn, degradation, scale = seen[-1]
        assert torch.equal(drawn, batch[0]) and scale is None
        assert degradation is common.DEGRADATIONS["gfrnet"]  # Eq. (4)
        for target, guide, landmarks, guide_landmarks in zip(*batch, strict=True):
            fits = {
                (i, flip): zoom(placed(rendered[i], flip)[1], landmarks)[2]
                for i in range(len(rendered))
                for flip in (False, True)
            }
            i, flip = min(fits, key=fits.get)
            counts[flip] += 1
            used.add(i)
            for image, marks, number in ((target, landmarks, i), (guide, guide_landmarks, guides[i])):
                picture, points = placed(rendered[number], flip)
                scale, (x, y), error = zoom(points, marks)
                assert error < 1e-3 and 0.999 < scale < 1.001 + crop
                matrix = torch.tensor([[scale, 0, x], [0, scale, y]], dtype=torch.float32)
                expected = common.warp_affine(picture, matrix, 64, 64, "border")
                assert (image - expected).abs().mean() < 1e-3
                scales.append(scale)
    assert min(counts) >= 8 and used <= set(indices) and len(used) > 10
    assert max(scales) - min(scales) >= 0.8 * crop


def test_batches_degrade_every_target(rendered):
    degraded, target, *_ = gfrnet.Batches(rendered, list(range(12)), replace(TINY, batch=6))[0]
    gaps = (degraded - target).abs().mean((1, 2, 3))
    assert (gaps > 1e-3).all() and (gaps < 0.6).all() and len(gaps.unique()) == 6
    assert degraded.abs().max() <= 1


def test_random_guides_of_batches_are_other_people(rendered):
    """The ablation with a guide of a different identity, Ours(R)."""
    cfg = replace(TINY, batch=4, crop=0.0)
    batches = gfrnet.Batches(rendered, list(range(12)), replace(cfg, stranger=True))
    own = gfrnet.Batches(rendered, list(range(12)), cfg)

    def who(image):
        (found,) = {
            face.identity
            for face in rendered.faces
            if min((x - image).abs().max() for x in (face.image, face.image.flip(2))) < 1e-3
        }
        return found

    for step in range(3):
        _, target, guide, *_ = batches[step]
        assert all(who(a) != who(b) for a, b in zip(target, guide, strict=True))
        _, target, guide, *_ = own[step]
        assert all(who(a) == who(b) for a, b in zip(target, guide, strict=True))


def test_batches_refuse_people_with_one_picture_each():
    with pytest.raises(common.InputError, match="two pictures"):
        gfrnet.Batches(Heads([(0, 0.0, 0.4), (1, 0.1, 0.4), (2, 0.1, 0.4)]), [0, 1, 2], TINY)


# Restoration and measuring


def small(module, seed=5):
    """Random weights with a weak last layer: outputs inside [-1,1], flows near the identity."""
    randomised(module, 0.1, seed)
    with torch.no_grad():
        for last in [
            m for m in module.modules() if isinstance(m, nn.ConvTranspose2d) and m.out_channels < 4
        ]:
            last.weight.mul_(0.1), last.bias.mul_(0.1)
    return module


def test_restore_is_the_network_in_evaluation_mode_for_any_batch_size(monkeypatch):
    monkeypatch.setattr(common, "precision", lambda kind: torch.float32)
    net = small(gfrnet.GFRNet(TINY)).train()
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


def some_encoder(widths=(6, 8, 10, 12)):
    torch.manual_seed(1)
    net = common.Recogniser(widths).folded()
    for layer in net.stages.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return net


def test_validation_is_equation_6_on_pictures_degraded_alike_every_time(rendered, monkeypatch):
    monkeypatch.setattr(common, "precision", lambda kind: torch.float32)
    cfg, net, encoder = (
        replace(TINY, weight_perceptual=0.7),
        small(gfrnet.GFRNet(TINY)).eval(),
        some_encoder(),
    )
    indices, cpu = list(range(0, 22)), torch.device("cpu")
    loss, quality, gap = gfrnet.validate(net, encoder, rendered, indices, cfg, cpu)
    torch.rand(3)
    assert [loss, quality, gap] == gfrnet.validate(net, encoder, rendered, indices, cfg, cpu)
    batches = list(gfrnet.restored_batches(net, rendered, indices, cfg, cpu, None))
    every = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    guides = gfrnet.choose_guides(rendered, indices)
    assert len(every["target"]) == 22
    for n, (i, j) in enumerate(guides.items()):
        assert torch.equal(every["target"][n], rendered[i].image)
        assert torch.equal(every["guide"][n], rendered[j].image)
        assert torch.equal(every["landmarks"][n], rendered[i].landmarks)
        assert torch.equal(every["guide_landmarks"][n], rendered[j].landmarks)
    with torch.no_grad():
        restored, _, flow = net(every["degraded"], every["guide"])
        restored = restored.clamp(-1, 1)
        a, b = (encoder.features(x)[2] for x in (restored, every["target"]))
    square = (restored - every["target"]).square()
    expected = 100 * square.mean() + 0.7 * (a - b).square().mean()
    assert loss == pytest.approx(expected.item(), rel=1e-3)
    noise = square.mean((1, 2, 3))  # PSNR in dB, for a range of 2
    assert quality == pytest.approx((10 * torch.log10(4 / noise)).mean().item(), rel=1e-4)
    errors = gfrnet.landmark_error(flow, every["landmarks"], every["guide_landmarks"])
    assert gap == pytest.approx(errors.mean().item(), rel=1e-3)


def test_evaluation_measures_at_4_and_8_and_compares_the_flow_with_none(rendered, monkeypatch):
    monkeypatch.setattr(common, "precision", lambda kind: torch.float32)
    judge = some_encoder()
    monkeypatch.setattr(common, "recogniser", lambda faces, purpose="loss": judge)
    indices, cpu = list(range(6, 14)), torch.device("cpu")
    for changes in ({}, {"warped": False}, {"warped": False, "guided": False}):
        cfg = replace(TINY, **changes)
        net = small(gfrnet.GFRNet(cfg)).eval()
        table = gfrnet.evaluate(net, rendered, indices, cfg, cpu)
        assert set(table) == {"x4", "x8"}
        for scale, row in zip((4, 8), table.values(), strict=True):
            (batch,) = gfrnet.restored_batches(net, rendered, indices, cfg, cpu, scale)
            assert row["faces"] == 8
            for name, column in (("input", "degraded"), ("restored", "restored")):
                noise = (batch[column] - batch["target"]).square().mean((1, 2, 3))
                expected = (10 * torch.log10(4 / noise)).mean().item()
                assert row[name]["psnr"] == pytest.approx(expected, rel=1e-4)
                assert 0 < row[name]["ssim"] < 1 and row[name]["identity"] > 0
            gain = row["restored"]["psnr"] - row["input"]["psnr"]
            assert row["paired_psnr_gain"]["mean"] == pytest.approx(gain, abs=1e-3)
            if not cfg.warped:
                assert "landmark_error" not in row
                continue
            distances = (batch["landmarks"] - batch["guide_landmarks"]).norm(dim=2).mean()
            assert row["landmark_error"]["guide"] == pytest.approx(distances.item(), rel=0.02)
            errors = gfrnet.landmark_error(batch["flow"], batch["landmarks"], batch["guide_landmarks"])
            assert row["landmark_error"]["warped"] == pytest.approx(errors.mean().item(), rel=1e-4)
            assert abs(errors.mean() - distances) > 0.01
        assert table["x8"]["input"]["psnr"] < table["x4"]["input"]["psnr"]


def test_held_out_people_with_one_picture_each_are_refused():
    heads = Heads([(0, 0.0, 0.4), (1, 0.1, 0.4)])
    net = gfrnet.GFRNet(TINY)
    with pytest.raises(common.InputError, match="two pictures"):
        next(gfrnet.restored_batches(net, heads, [0, 1], TINY, torch.device("cpu"), None))


# Training: Eq. (12), the schedule, learning


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
    """Keeps what every step sees: gradients of both optimisers' parameters, and its own parameters."""

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
        self.rates.append(self.param_groups[0]["lr"])
        self.seen.append((gradients, [p.detach().clone() for p in self.param_groups[0]["params"]]))
        return super().step(closure)


def watch(folder, out, cfg):
    """Train `cfg` in float32; copies of the modules before every step, all batches, all gradients."""
    watched, patch = (
        SimpleNamespace(cfg=cfg, out=out, nets=[], judges=[], inputs=[]),
        pytest.MonkeyPatch(),
    )
    watched.encoder = some_encoder()

    class Net(gfrnet.GFRNet):
        def __init__(self, *args):
            super().__init__(*args)
            watched.trained = self

        def forward(self, degraded, guide, **options):
            if self.training and self is watched.trained:
                watched.nets.append(copy.deepcopy(self))
                watched.judges.append(copy.deepcopy(watched.live))
                watched.inputs.append((degraded.contiguous(), guide.contiguous()))
            return super().forward(degraded, guide, **options)

    class Nets(gfrnet.Discriminators):
        def __init__(self, *args):
            super().__init__(*args)
            watched.live = self

    WatchedAdam.made = []
    patch.setattr(torch.optim, "Adam", WatchedAdam)
    patch.setattr(gfrnet, "GFRNet", Net)
    patch.setattr(gfrnet, "Discriminators", Nets)
    patch.setattr(gfrnet, "finish", lambda *_: None)
    patch.setattr(common, "write_log", lambda *_: None)  # which draws
    patch.setattr(common, "precision", lambda kind: torch.float32)
    patch.setattr(common, "recogniser", lambda faces, purpose="loss": watched.encoder)
    try:
        gfrnet.train(cfg, arguments(folder, out))
    finally:
        patch.undo()
    watched.adams = WatchedAdam.made
    faces = common.FaceFolder(folder, cfg.size)
    watched.batches = gfrnet.Batches(faces, common.split_identities(faces)[0], cfg)
    return watched


@pytest.fixture(scope="module")
def watched(face_folder, tmp_path_factory):
    """Step 1 trains WarpNet alone, 2 and 3 everything; the weights are such that no term is small."""
    cfg = replace(
        TINY,
        batch=4,
        steps=3,
        warp_steps=1,
        validate_every=3,
        residual=False,
        learning_rate=2e-4,
        cooldown=0,
        weight_pixel=100.0,
        weight_perceptual=5.0,
        weight_adversarial=(40.0, 25.0),
        weight_landmark=10.0,
        weight_tv=1.0,
    )
    return watch(face_folder, tmp_path_factory.mktemp("watched"), cfg)


def gap(gradients, expected):
    a, b = (torch.cat([g.flatten().double() for g in many]) for many in (gradients, expected))
    return ((a - b).norm() / b.norm()).item()


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


def test_the_first_steps_train_warp_net_alone_on_the_flow_loss(watched):
    generator, _ = watched.adams
    own, others = generator.seen[0][0]
    net = watched.nets[0]
    names = [name for name, _ in net.named_parameters()]
    for name, g in zip(names, own, strict=True):
        assert name.startswith("warp_net.") or g is None or not g.any(), name
    assert all(g is None for g in others)
    degraded, target, guide, landmarks, guide_landmarks = watched.batches[0]
    assert torch.equal(watched.inputs[0][0], degraded) and torch.equal(watched.inputs[0][1], guide)
    flow = net(degraded, guide)[2]
    loss = 10 * landmark_term(flow, landmarks, guide_landmarks) + variation_term(flow)
    mine = [
        (g, p) for g, p, name in zip(own, net.parameters(), names, strict=True) if "warp_net." in name
    ]
    expected = gradient(loss, [p for _, p in mine])
    assert gap([torch.zeros_like(p) if g is None else g for g, p in mine], expected) < 0.003
    before, after = generator.seen[0][1], generator.seen[1][1]
    for name, a, b in zip(names, before, after, strict=True):
        if name.startswith("rec_net."):
            assert torch.equal(a, b), name
    assert len(watched.adams[1].seen) == 2  # the discriminators wait for pictures


def equation_12(watched, step):
    """The terms at `step` written out from the paper, on copies → net, judges, terms, judges' loss."""
    net, judges = watched.nets[step], watched.judges[step]
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


def test_the_following_steps_follow_the_gradient_of_equation_12(watched):
    for step in (1, 2):
        net, _, terms, _ = equation_12(watched, step)
        gradients = {name: gradient(term, list(net.parameters())) for name, term in terms.items()}
        total = [sum(many) for many in zip(*gradients.values(), strict=True)]
        seen = watched.adams[0].seen[step][0][0]
        assert all(g is not None for g in seen)
        assert gap(seen, total) < 0.003
        for name, term in gradients.items():  # a missing term would be noticed
            lacking = [a - b for a, b in zip(total, term, strict=True)]
            assert gap(lacking, total) > 0.01, name


def test_the_discriminators_follow_the_gradient_of_equations_7_and_8(watched):
    for step in (1, 2):
        _, judges, _, judged = equation_12(watched, step)
        expected = gradient(judged, list(judges.parameters()))
        seen = watched.adams[1].seen[step - 1][0][1]
        assert gap(seen, expected) < 0.003
        assert all(g.abs().sum() > 0 for g in seen if g.ndim > 1)


def test_each_optimiser_moves_its_own_networks_only(watched):
    generator, discriminators = watched.adams
    assert {id(p) for p in generator.param_groups[0]["params"]} == {
        id(p) for p in watched.trained.parameters()
    }
    assert {id(p) for p in discriminators.param_groups[0]["params"]} == {
        id(p) for p in watched.live.parameters()
    }
    before, after = generator.seen[1][0][0], discriminators.seen[0][0][0]
    assert all(
        torch.equal(a, b) for a, b in zip(before, after, strict=True)
    )  # what its own step left there
    assert all(g is None or not g.any() for g in generator.seen[1][0][1])
    assert all(p.grad is None for p in watched.encoder.parameters())
    for adam in watched.adams:
        assert (adam.defaults["lr"], adam.defaults["betas"][0]) == (2e-4, 0.5)
        assert not adam.defaults["weight_decay"]


def test_a_checkpoint_loads_as_the_trained_network(watched):
    net, cfg = gfrnet.load_network(arguments("", watched.out), torch.device("cpu"))
    assert cfg == watched.cfg and not net.training
    degraded, guide = watched.inputs[0]
    with torch.no_grad():
        for a, b in zip(net(degraded, guide), watched.trained.eval()(degraded, guide), strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(common.InputError, match="preset tiny"):
        gfrnet.load_network(arguments("", watched.out, preset="paper"), torch.device("cpu"))
    state = common.load_weights(watched.out / "checkpoint.pt")
    (row,) = state["rows"]
    assert (state["script"], state["step"], row["step"]) == ("gfrnet", 3, 3)
    assert {
        "pixel",
        "perceptual",
        "adversarial",
        "landmark",
        "tv",
        "discriminator",
        "validation",
    } <= set(row)


def test_variants_train_without_the_terms_they_lack(face_folder, tmp_path):
    for name in ("no-flow-loss", "no-warp", "no-guide"):
        cfg = replace(TINY, steps=2, warp_steps=0, validate_every=1)
        watched = watch(face_folder, tmp_path / name, replace(cfg, **gfrnet.VARIANTS[name]))
        rows = common.load_weights(tmp_path / name / "checkpoint.pt")["rows"]
        assert len(rows) == 2 and all(
            {"pixel", "adversarial", "discriminator"} <= set(row) for row in rows
        )
        assert not any({"landmark", "tv"} & set(row) for row in rows)
        assert all(g is not None for g in watched.adams[0].seen[1][0][0])


@pytest.fixture
def quick(monkeypatch):
    """train() without what it draws, measures and learns beforehand."""
    monkeypatch.setattr(gfrnet, "finish", lambda *_: None)
    monkeypatch.setattr(common, "write_log", lambda *_: None)
    monkeypatch.setattr(common, "recogniser", lambda faces, purpose="loss": some_encoder())
    monkeypatch.setattr(common, "precision", lambda kind: torch.float32)
    WatchedAdam.made = []
    monkeypatch.setattr(torch.optim, "Adam", WatchedAdam)
    return monkeypatch


def test_the_rates_are_a_tenth_and_a_hundredth_once_validation_stops_falling(
    face_folder, tmp_path, quick
):
    """2e-4, 2e-5, 2e-6, each until the loss is no longer falling; WarpNet's own steps do not count."""
    losses = iter([1.0, 2.0, 3.0, 5.0, 4.0, 4.5, 3.9, 3.8, 4.4, 4.5, 4.6])
    quick.setattr(gfrnet, "validate", lambda *_: (next(losses), 20.0, 1.0))
    cfg = replace(
        TINY, steps=11, warp_steps=3, validate_every=1, patience=0, learning_rate=2e-4, cooldown=0
    )
    gfrnet.train(cfg, arguments(face_folder, tmp_path))
    rates = [row["rate"] for row in common.load_weights(tmp_path / "checkpoint.pt")["rows"]]
    assert rates == pytest.approx([2e-4] * 6 + [2e-5] * 3 + [2e-6] * 2)
    generator, discriminators = WatchedAdam.made
    assert generator.rates == pytest.approx([2e-4] * 6 + [2e-5] * 3 + [2e-6] * 2)
    assert discriminators.rates == pytest.approx(generator.rates[3:])


def test_the_rate_falls_to_0_in_the_last_part_of_the_steps(face_folder, tmp_path, quick):
    quick.setattr(gfrnet, "validate", lambda *_: (1.0, 20.0, 1.0))
    cfg = replace(TINY, steps=10, warp_steps=9, validate_every=10, learning_rate=1e-3, cooldown=0.5)
    gfrnet.train(cfg, arguments(face_folder, tmp_path))
    expected = [1e-3] * 6 + [8e-4, 6e-4, 4e-4, 2e-4]
    assert WatchedAdam.made[0].rates == pytest.approx(expected)


def test_a_run_in_two_parts_equals_an_unbroken_one_bit_for_bit(face_folder, tmp_path, quick):
    """The break is in the middle of WarpNet's own steps."""
    cfg = replace(TINY, steps=6, warp_steps=3, validate_every=2, cooldown=0)
    gfrnet.train(cfg, arguments(face_folder, tmp_path / "whole"))
    gfrnet.train(replace(cfg, steps=2), arguments(face_folder, tmp_path / "parts"))
    gfrnet.train(cfg, arguments(face_folder, tmp_path / "parts", resume=True))
    whole, parts = (
        common.load_weights(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts")
    )
    assert whole["rows"] == parts["rows"] and [row["step"] for row in whole["rows"]] == [2, 4, 6]
    for part in ("net", "discriminators"):
        assert whole[part].keys() == parts[part].keys()
        for name, value in whole[part].items():
            assert torch.equal(value, parts[part][name]), name


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    face_folder, tmp_path, quick
):
    real, calls = gfrnet.pixel_loss, []

    def spoiled(restored, target):
        calls.append(1)
        return real(restored, target) * (math.nan if torch.is_grad_enabled() and len(calls) > 3 else 1)

    quick.setattr(gfrnet, "pixel_loss", spoiled)
    cfg = replace(TINY, steps=12, warp_steps=0, validate_every=1)
    with pytest.raises(common.InputError, match="pixel.*not finite"):
        gfrnet.train(cfg, arguments(face_folder, tmp_path))
    state = common.load_weights(tmp_path / "checkpoint.pt")
    assert all(value.isfinite().all() for value in state["net"].values() if value.is_floating_point())


def split_for_learning(faces, seed=0):
    """Seven people of 24 are held out, for an interval narrower than that of the usual two."""
    return [
        [i for i, who in enumerate(faces.identity.tolist()) if who in people]
        for people in (range(16), range(16, 17), range(17, 24))
    ]


def test_warp_net_learns_to_align_guides_by_the_flow_loss(rendered):
    """Landmarks of the same eight pairs come closer; the flow stays smooth and inside the picture."""
    torch.manual_seed(0)
    cfg = replace(gfrnet.TINY, size=64, width=8)
    degraded, _, guide, landmarks, guide_landmarks = gfrnet.Batches(rendered, list(range(48)), cfg)[0]
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


def test_a_short_training_improves_held_out_faces(face_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "split_identities", split_for_learning)
    monkeypatch.setattr(common, "recogniser", lambda faces, purpose="loss": some_encoder())
    cfg = replace(gfrnet.TINY, size=64, width=8, discriminator_width=4, warp_steps=10, steps=70)
    gfrnet.train(replace(cfg, validate_every=70), arguments(face_folder, tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    for task in result["test"].values():
        assert task["faces"] == 35
        assert task["paired_psnr_gain"]["ci95"][0] > 0
        assert task["landmark_error"]["warped"] < task["landmark_error"]["guide"] + 0.5
    assert result["script"] == "gfrnet" and result["steps"] == 70
    assert common.read_image(tmp_path / "flow.png").shape[0] == 3
