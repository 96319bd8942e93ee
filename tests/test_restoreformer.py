"""RestoreFormer: every equation against an independent form, both stages, released names."""
import functools
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random, refused
from torch import nn

import common
import restoreformer as rf

SMALL = replace(rf.TINY, size=64, codes=12, code_channels=8, heads=2, widths=(4, 6, 8, 8),
                blocks=(1,) * 4, groups=1, discriminator_width=4, batch=2, validate_every=1000,
                steps=8, dictionary_share=0.5, restart_every=2, validated=4, tested=4)


def recogniser(widths=(6, 8, 10, 12), seed=1):
    """Untrained, with weights that let differences between faces through."""
    torch.manual_seed(seed)
    net = common.Recogniser(widths)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return net.folded()


def small(variant, **changes):
    return replace(SMALL, variant=variant, **rf.VARIANTS[variant], **changes)


def network(stage=2, variant="full", **changes):
    """A network whose codes are spread as wide as its features, so that several are met."""
    cfg = small(variant, **changes)
    torch.manual_seed(2)
    net = rf.RestoreFormer(cfg, stage, recogniser() if cfg.recognition else None)
    with torch.no_grad():
        net.dictionary.codes.copy_(random(*net.dictionary.codes.shape, seed=4))
    return net


def scrambled(module, scale=0.5):
    torch.manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, scale)
    return module


# ------------------------------------------------------------------------ Eq. (1) to (6)

def read_by_loops(block, asking, answering):
    """Eq. (1)-(3), (5) position by position in double: Z_mh (N,C), and the maps."""
    asking, answering = (x[0].flatten(1).T.detach().numpy().astype(np.float64)
                         for x in (asking, answering))

    def project(layer, x):
        weight = layer.weight.detach().numpy().astype(np.float64)[:, :, 0, 0]
        return x @ weight.T + layer.bias.detach().numpy()

    query = project(block.query, asking)
    key = project(block.key, answering)
    value = project(block.value, answering)
    count, channels = query.shape
    each = channels // block.heads
    read = np.zeros_like(query)
    maps = np.zeros((block.heads, count, count))
    for head in range(block.heads):
        part = slice(head * each, (head + 1) * each)
        for i in range(count):
            scores = [query[i, part] @ key[j, part] / math.sqrt(each) for j in range(count)]
            maps[head, i] = np.exp(scores) / np.exp(scores).sum()
            read[i, part] = sum(maps[head, i, j] * value[j, part] for j in range(count))
    return read, torch.tensor(maps).float()


def test_the_heads_read_what_loops_over_positions_read():
    block = scrambled(rf.MultiHead(8, 2))
    z, p = random(1, 8, 2, 3, seed=1), random(1, 8, 2, 3, seed=2)
    expected, maps = read_by_loops(block, z, p)
    expected = torch.tensor(expected.T.reshape(1, 8, 2, 3)).float()
    torch.testing.assert_close(block(z, p), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block.maps(z, p)[0], maps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mhsa", "mhca", "mhca-d"])
def test_attention_adds_normalises_and_feeds_forward(kind):
    """Eq. (4), (6) and row exp5, each with its own answer and its own residual."""
    block = scrambled(rf.Attention(8, 2))
    z, p = random(1, 8, 2, 3, seed=1), random(1, 8, 2, 3, seed=2)
    asking, answering, added = {"mhsa": (p, p, p), "mhca": (z, p, p), "mhca-d": (z, p, z)}[kind]
    read, _ = read_by_loops(block.multi_head, asking, answering)
    x = read + added[0].flatten(1).T.numpy()
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + block.norm.eps)
    x = x * block.norm.weight.detach().numpy() + block.norm.bias.detach().numpy()
    x = torch.tensor(x.T.reshape(1, 8, 2, 3)).float()
    first, _, second = block.feed_forward
    x = F.conv2d(x, first.weight, first.bias, padding=1)
    x = F.conv2d(torch.where(x > 0, x, 0.2 * x), second.weight, second.bias, padding=1)
    torch.testing.assert_close(block(asking, answering, added), x, rtol=1e-4, atol=1e-4)


def test_the_feed_forward_begins_near_the_identity():
    torch.manual_seed(0)
    x = random(2, 32, 8, 8)
    y = rf.Attention(32, 4).feed_forward(x)
    assert F.cosine_similarity(x.flatten(), y.flatten(), 0) > 0.9
    assert 0.8 < y.norm() / x.norm() < 1.3


# ------------------------------------------------------------- Eq. (7), (8), (14), Table 4

def test_the_nearest_code_is_the_first_of_the_smallest_distances():
    dictionary, z = rf.Dictionary(6, 4), random(2, 4, 3, 2)
    with torch.no_grad():
        dictionary.codes.copy_(random(6, 4, seed=5))
        dictionary.codes[4] = dictionary.codes[1]
        z[0, :, 0, 0] = dictionary.codes[1]                 # a tie of codes 1 and 4
    priors, nearest = dictionary(z)
    for b in range(2):
        for i in range(3):
            for j in range(2):
                distances = [(z[b, :, i, j] - d).square().sum().item() for d in dictionary.codes]
                assert nearest[b, i, j] == distances.index(min(distances))
                assert torch.equal(priors[b, :, i, j], dictionary.codes[nearest[b, i, j]])
    assert nearest[0, 0, 0] == 1


def test_codes_are_chosen_in_float32_under_autocast():
    dictionary = rf.Dictionary(256, 8)
    with torch.no_grad():
        dictionary.codes.copy_(random(256, 8, seed=5) * 0.01 + 1)      # nearly as near
    z = random(2, 8, 8, 8) * 0.01 + 1
    _, expected = dictionary(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dictionary(z)[1], expected)


def test_the_gradient_at_the_priors_is_copied_and_reaches_no_code():
    net, image = network(stage=1), random(1, 3, 64, 64)
    features, priors, _ = net.encode(image)
    fused = net.fuse(features, priors)
    torch.testing.assert_close(fused, priors)
    seen = random(*fused.shape, seed=7)
    (at_features,) = torch.autograd.grad((fused * seen).sum(), features, retain_graph=True)
    assert torch.equal(at_features, seen)
    (fused * seen).sum().backward()
    assert net.dictionary.codes.grad is None
    assert next(net.encoder.parameters()).grad.abs().sum() > 0


def rows_by_hand(net, z, p):
    """Table 4: what each variant gives its decoder."""
    one, two = net.blocks if len(net.blocks) else (None, None)
    return {
        "full": lambda: two(z, one(z, p, p), one(z, p, p)),
        "exp1": lambda: z,
        "exp2": lambda: two(*[one(z, z, z)] * 3),
        "exp3": lambda: two(*[one(p, p, p)] * 3),
        "exp4": lambda: two(z, one(z, p)),
        "exp5": lambda: two(z, one(z, p, z), z)}


@pytest.mark.parametrize("variant", ["full", "exp1", "exp2", "exp3", "exp4", "exp5"])
def test_each_row_of_table_4_fuses_its_own_way(variant):
    net = network(variant=variant)
    scrambled(net.blocks, 0.3)
    features, priors, _ = net.encode(random(2, 3, 64, 64))
    assert (features - priors).abs().max() > 0.1
    expected = rows_by_hand(net, features, priors)[variant]()
    torch.testing.assert_close(net.fuse(features, priors), expected, rtol=1e-4, atol=1e-4)


def test_stage_1_paints_from_the_priors_alone():
    net, image = network(stage=1), random(1, 3, 64, 64)
    assert len(net.blocks) == 0
    torch.testing.assert_close(net(image), net.decoder(net.encode(image).priors))


# --------------------------------------------------------------------- Encoders, decoder

def test_the_papers_network_has_12_residual_blocks_and_5_changes_of_size_on_each_side():
    with torch.device("meta"):
        net = rf.RestoreFormer(rf.PAPER)
        assert net.encoder(torch.empty(1, 3, 512, 512)).shape == (1, 256, 16, 16)
        assert net.decoder(torch.empty(1, 256, 16, 16)).shape == (1, 3, 512, 512)

    def count(part, kind):
        return sum(isinstance(module, kind) for module in part.modules())
    assert count(net.encoder, rf.Residual) == count(net.decoder, rf.Residual) == 12
    assert count(net.encoder, nn.AvgPool2d) == count(net.decoder, nn.Upsample) == 5
    assert net.dictionary.codes.shape == (1024, 256)


@pytest.mark.parametrize("after", [6, 10])
def test_a_residual_block_is_two_normalised_convolutions_and_a_shortcut(after):
    block, x = scrambled(rf.Residual(6, after, 2)), random(2, 6, 5, 4)
    y = x
    for norm, layer in ((block.body[0], block.body[2]), (block.body[3], block.body[5])):
        groups = y.unflatten(1, (2, -1)).flatten(2)
        mean, variance = groups.mean(2), groups.var(2, unbiased=False)
        y = (groups - mean[..., None]) / (variance[..., None] + 1e-6).sqrt()
        y = y.view(2, -1, 5, 4) * norm.weight[:, None, None] + norm.bias[:, None, None]
        y = F.conv2d(y * torch.sigmoid(y), layer.weight, layer.bias, padding=1)
    if after != 6:
        x = torch.einsum("oi,bihw->bohw", block.shortcut.weight[:, :, 0, 0], x)
        x = x + block.shortcut.bias[:, None, None]
    torch.testing.assert_close(block(random(2, 6, 5, 4)), x + y, rtol=1e-4, atol=1e-4)


def test_sft_scales_and_shifts_the_priors_by_what_the_features_say():
    sft, z, p = rf.SFT(4), random(1, 4, 5, 5), random(1, 4, 5, 5, seed=1)
    alpha, beta = (layers[2](F.leaky_relu(layers[0](z), 0.2)) for layers in (sft.scale, sft.shift))
    torch.testing.assert_close(sft(z, p), p + alpha * p + beta)
    assert alpha.std() > 0.01 and beta.std() > 0.01


def test_the_recognition_encoder_is_frozen_and_normalises_each_position():
    other = recogniser()
    encoder = rf.RecognitionEncoder(other, replace(SMALL, code_channels=12))
    image = random(1, 3, 64, 64)
    z = encoder(image)
    assert z.shape == (1, 12, 8, 8) and not any(p.requires_grad for p in encoder.parameters())
    # An orthogonal matrix of 10 channels in 12 keeps lengths: 10 numbers of variance 1.
    lengths = z.square().sum(1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 9.0), rtol=0.03, atol=0)
    x = other.features(image)[2]
    assert F.cosine_similarity(z[0, :, 1, 1], encoder.project.weight[:, :, 0, 0] @ (
        x[0, :, 1, 1] - x[0, :, 1, 1].mean()), 0) > 0.9999


@pytest.mark.parametrize("variant", ["full", "recognition-dictionary"])
def test_while_restoring_the_codes_are_float32s_at_every_precision_but_bfloat16(variant):
    net, image = network(variant=variant), random(1, 3, 64, 64)
    with torch.no_grad():
        expected = net.eval().encode(image)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = net.encode(image)
            assert torch.is_autocast_enabled("cpu")
            rounded = net.train().encode(image)
    assert torch.equal(mixed.features, expected.features)
    assert torch.equal(mixed.codes, expected.codes)
    assert not torch.equal(rounded.features, expected.features)        # training is faster so


# ------------------------------------------------------------------ Eq. (9) to (18): losses

def judgement(seed, count=2):
    """Scores and two maps of features."""
    return rf.Judgement(random(count, 1, 3, 3, seed=seed),
                        [random(count, 3, 2, 2, seed=seed + 1),
                         random(count, 2, 3, 3, seed=seed + 2)])


def judgements(seed):
    return {name: judgement(seed + 10 * i) for i, name in enumerate(("image", *rf.REGIONS))}


def log_d(scores):
    return math.log(1 / (1 + math.exp(-scores)))


def test_pixel_perceptual_and_code_losses_are_means_over_elements():
    a, b = random(2, 3, 2, 2, seed=1), random(2, 3, 2, 2, seed=2)
    x, y = a.double().numpy(), b.double().numpy()
    square = ((x - y) ** 2).sum() / x.size
    assert rf.pixel_loss(a, b).item() == pytest.approx(np.abs(x - y).sum() / x.size, rel=1e-5)
    assert rf.perceptual_loss([a, 2 * a[:1]], [b, 2 * b[:1]]).item() == pytest.approx(
        square + 4 * ((x - y)[0] ** 2).mean(), rel=1e-5)
    for loss in (rf.code_loss, rf.codebook_loss, rf.commitment_loss):
        assert loss(a, b).item() == pytest.approx(square, rel=1e-5)


@pytest.mark.parametrize(("loss", "moved"), [
    (rf.codebook_loss, "codes"), (rf.commitment_loss, "features"), (rf.code_loss, "features")])
def test_each_dictionary_loss_moves_one_side_only(loss, moved):
    parts = {"features": random(1, 2, 2, 2).requires_grad_(),
             "codes": random(1, 2, 2, 2, seed=1).requires_grad_()}
    loss(*parts.values()).backward()
    assert {name for name, part in parts.items() if part.grad is not None} == {moved}
    here, other = parts[moved], parts["codes" if moved == "features" else "features"]
    torch.testing.assert_close(here.grad, 2 * (here - other).detach() / here.numel())


def test_a_step_of_equation_15_moves_each_code_to_the_mean_of_its_features():
    dictionary = rf.Dictionary(6, 2)
    with torch.no_grad():
        dictionary.codes.copy_(2 * random(6, 2, seed=3))
        dictionary.codes[5] = 99.0
    points = random(1, 2, 8, 8)
    priors, chosen = dictionary(points)
    rf.codebook_loss(points, priors).backward()
    flat, chosen = points[0].flatten(1).T, chosen.flatten()
    for m in range(6):
        members = flat[chosen == m]
        if len(members) == 0:
            assert dictionary.codes.grad[m].abs().sum() == 0
        else:
            step = dictionary.codes.grad[m] * points.numel() / 2 / len(members)
            torch.testing.assert_close(dictionary.codes[m] - step, members.mean(0))


def test_the_discriminators_loss_is_minus_what_it_maximises():
    real, fake = random(2, 1, 3, 3, seed=1), random(2, 1, 3, 3, seed=2)
    gain = (sum(log_d(s) for s in real.flatten().tolist()) / 18
            + sum(log_d(-s) for s in fake.flatten().tolist()) / 18)
    assert rf.discriminator_loss(real, fake).item() == pytest.approx(-gain, rel=1e-5)
    generator = -sum(log_d(s) for s in fake.flatten().tolist()) / 18
    assert rf.adversarial_loss(fake).item() == pytest.approx(generator, rel=1e-5)


def test_component_and_style_losses_sum_the_regions_and_leave_the_picture_out():
    fake, real = judgements(0), judgements(500)
    names = ("left_eye", "right_eye", "mouth")
    component = -sum(sum(log_d(s) for s in fake[name].scores.flatten().tolist()) / 18
                     for name in names)
    assert rf.component_loss(fake).item() == pytest.approx(component, rel=1e-5)
    style = 0.0
    for name in names:
        for ours, theirs in zip(fake[name].features, real[name].features):
            for n in range(2):
                count = ours[n].numel()
                for i in range(ours.shape[1]):
                    for j in range(ours.shape[1]):
                        gap = ((ours[n, i] * ours[n, j]).sum()
                               - (theirs[n, i] * theirs[n, j]).sum()) / count
                        style += gap.item() ** 2 / 2                       # a mean over 2 faces
    assert rf.style_loss(fake, real).item() == pytest.approx(style, rel=1e-4)


def test_identity_loss_is_the_squared_norm_and_for_directions_2_minus_2_cosines():
    a, b = random(3, 5, seed=1), random(3, 5, seed=2)
    assert rf.identity_loss(a, b).item() == pytest.approx(
        ((a - b).double().numpy() ** 2).sum() / 3, rel=1e-5)
    a, b = (rf.identity_of(lambda image: image, x) for x in (a, b))
    cosine = sum(float(x @ y) for x, y in zip(a, b)) / 3
    assert rf.identity_loss(a, b).item() == pytest.approx(2 - 2 * cosine, rel=1e-4)


WEIGHTS = dict(weight_perceptual=0.7, weight_adversarial=0.2, weight_codebook=1.1,
               weight_commitment=0.6, weight_component=0.3, weight_style=5.0,
               weight_identity=0.9, weight_code=0.4)


@pytest.mark.parametrize(("variant", "drawn"), [("exp1", False), ("exp2", False), ("exp3", True)])
def test_equation_10_is_left_out_where_no_code_is_used(variant, drawn):
    picture = random(1, 3, 64, 64)
    latents = rf.Latents(random(1, 8, 4, 4), random(1, 8, 4, 4, seed=1), None)
    judged = {name: judgement(0, 1) for name in judgements(0)}
    losses = rf.restoration_losses(small(variant), picture, picture, latents, judged, judged,
                                   recogniser(), recogniser())
    assert ("code" in losses) == drawn


# -------------------------------------------------------------------------- Discriminators

def test_regions_lie_where_the_landmarks_say():
    boxes = common.component_boxes(common.mean_landmarks(256)[None], 256)
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    crops = rf.crop_regions(torch.stack([x, y, x])[None], boxes)
    assert {name: crop.shape[-1] for name, crop in crops.items()} == {
        "left_eye": 40, "right_eye": 40, "mouth": 60}
    places = {"left_eye": slice(36, 42), "right_eye": slice(42, 48), "mouth": slice(48, 68)}
    for name, points in places.items():
        corners, seen = common.mean_landmarks(256)[points], crops[name][0, :2]
        assert (seen.amin((1, 2)) < corners.amin(0) + 2).all()      # the box ends at the points
        assert (corners.amax(0) - 2 < seen.amax((1, 2))).all()
        assert abs(seen[0].mean() - corners[:, 0].mean()) < 3


def test_each_face_is_cropped_by_its_own_boxes():
    boxes = common.component_boxes(common.mean_landmarks(128)[None], 128)
    boxes = torch.cat([boxes, boxes + 7])
    image = random(2, 3, 128, 128)
    together = rf.crop_regions(image, boxes)
    for name, crop in together.items():
        alone = torch.cat([rf.crop_regions(image[i:i + 1], boxes[i:i + 1])[name] for i in (0, 1)])
        torch.testing.assert_close(crop, alone)


def test_stage_1_judges_the_picture_alone_and_every_region_has_its_own_judge():
    torch.manual_seed(0)
    image = random(1, 3, 64, 64)
    boxes = common.component_boxes(common.mean_landmarks(64)[None], 64)
    assert list(rf.Discriminators(SMALL, 1)(image, boxes)) == ["image"]
    judges = rf.Discriminators(SMALL, 2).eval()
    judged, crops = judges(image, boxes), rf.crop_regions(image, boxes)
    assert list(judged) == ["image", "left_eye", "right_eye", "mouth"]
    for name, crop in crops.items():
        assert torch.equal(judged[name].scores, judges[name](crop).scores)
    assert torch.equal(judged["image"].scores, judges["image"](image).scores)


# ---------------------------------------------------------------------------------- Config

def test_the_papers_rates():
    assert (rf.PAPER.dictionary_steps, rf.PAPER.steps) == (800_000, 860_000)
    steps = 1, 600_000, 600_001, 800_000, 800_001, 860_000
    expected = [7e-5, 7e-5, 7e-6, 7e-6, 7e-6, 7e-6]
    assert [rf.PAPER.rate(step) for step in steps] == pytest.approx(expected)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stages_rate_is_constant_and_then_falls_to_0(stage):
    cfg = replace(rf.TINY, steps=2500, dictionary_share=0.4, cooldown=0.4)
    first, count = (1, 1000) if stage == 1 else (1001, 1500)
    rates = [cfg.rate(step) for step in range(first, first + count)]
    kept = int(0.6 * count)
    assert rates[:kept] == [cfg.dictionary_rate if stage == 1 else cfg.learning_rate] * kept
    falls = [a - b for a, b in zip(rates[kept:], rates[kept + 1:])]
    assert falls == pytest.approx([rates[0] / (count - kept)] * (count - kept - 1), rel=1e-6)
    assert 0 < rates[-1] < rates[0] / 300


def test_the_stages_share_all_steps():
    for steps in (2, 3, 10, 1680):
        cfg = replace(rf.TINY, steps=steps)
        stages = [cfg.stage(step) for step in range(1, steps + 1)]
        assert stages == [1] * cfg.dictionary_steps + [2] * (steps - cfg.dictionary_steps)
        assert set(stages) == {1, 2}


# -------------------------------------------------------------------------------- Released

def released(stage=2):
    cfg = replace(SMALL, groups=2, widths=(4, 6, 8))
    torch.manual_seed(5)
    net = rf.ReleasedRestoreFormer(cfg, stage).eval()
    with torch.no_grad():
        net.dictionary.codes.mul_(cfg.codes)
    return net


def test_the_released_attention_is_the_plain_loop_and_without_y_ignores_the_second_norm():
    block = rf.ReleasedAttention(8, replace(SMALL, groups=4))
    x, y = random(1, 8, 2, 2), random(1, 8, 2, 2, seed=1)
    torch.manual_seed(5)
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0.2, 0.7)
    answering = F.group_norm(x, 4, block.norm1.weight, block.norm1.bias, 1e-6)
    other = F.group_norm(y, 4, block.norm2.weight, block.norm2.bias, 1e-6)
    for given, asking in ((y, other), (None, answering)):
        read, _ = read_by_loops(block.multi_head, asking, answering)
        read = torch.tensor(read.T.reshape(1, 8, 2, 2)).float()
        expected = x + block.proj_out(read)
        torch.testing.assert_close(block(x, given), expected, rtol=1e-4, atol=1e-4)


def test_the_released_decoder_asks_with_the_later_map_in_the_middle_and_the_earlier_after():
    net, asked = released(), []
    for module in (net.decoder.mid["attn_1"], *net.decoder.up[-1].attn):
        module.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[1]))
    first, second, _ = net.encoder(random(1, 3, 32, 32))
    net(random(1, 3, 32, 32))
    assert torch.equal(asked[0], second) and len(asked) == 4
    assert all(torch.equal(y, first) for y in asked[1:])
    alone = released(stage=1)
    alone.decoder.mid["attn_1"].register_forward_pre_hook(lambda _, inputs: asked.append(inputs[1]))
    alone(random(1, 3, 32, 32))
    assert asked[-1] is None


# ------------------------------------------------------------------------------------ Data

@pytest.fixture(scope="module")
def faces(face_folder):
    return common.FaceFolder(face_folder, 64)


def batch(faces, step, **changes):
    cfg = replace(SMALL, steps=8, dictionary_share=0.5, **changes)
    return rf.Batches(faces, list(range(20)), cfg)[step]


def test_stage_1_sees_sharp_faces_and_stage_2_degraded_ones(faces):
    for step in range(8):
        degraded, target, _ = batch(faces, step)
        assert torch.equal(degraded, target) == (step < 4)


def test_identity_in_place_of_arcface_and_arcface_from_its_file(faces, monkeypatch):
    args = SimpleNamespace(arcface=None, state=None, device=torch.device("cpu"))
    made = recogniser()
    monkeypatch.setattr(common, "recogniser", lambda faces, device: made)
    assert rf.load_recogniser(SMALL, args, faces) is made
    with pytest.raises(common.InputError, match=r"--arcface FILE: .*https://"):
        rf.load_recogniser(rf.PAPER, args, faces)
    args.state = {"frozen": {"recogniser": common.pack(made)}}
    again = rf.load_recogniser(rf.PAPER, args, faces)
    image = random(1, 3, 64, 64)
    torch.testing.assert_close(again(image), made(image))


@pytest.mark.slow
def test_equation_12_by_arcface_is_a_squared_norm_with_a_gradient_to_the_picture(faces):
    torch.manual_seed(0)
    weights = common.ArcFace().state_dict()
    for name, value in weights.items():
        if name.endswith("running_var"):
            value.fill_(0.5)
    args = SimpleNamespace(arcface={f"module.{name}": value for name, value in weights.items()},
                           state=None, device=torch.device("cpu"))
    eta = rf.load_recogniser(rf.PAPER, args, faces)
    assert isinstance(eta, common.ArcFace) and not any(p.requires_grad for p in eta.parameters())
    restored, target = random(2, 3, 64, 64).requires_grad_(), random(2, 3, 64, 64, seed=1)
    loss = rf.identity_loss(rf.identity_of(eta, restored), rf.identity_of(eta, target))
    ours, theirs = eta(restored), eta(target)
    cosine = (ours * theirs).sum(1) / ours.norm(dim=1) / theirs.norm(dim=1)
    assert loss.item() == pytest.approx((2 - 2 * cosine).mean().item(), rel=1e-4)
    loss.backward()
    assert restored.grad.abs().sum() > 0
    assert restored.grad[0].isfinite().all() and restored.grad[1].abs().max() > 0


# --------------------------------------------------------------------- Codes out of use

def test_usage_is_a_running_mean_of_shares():
    usage, expected = rf.Usage(4), [0.0] * 4
    for codes in ([0, 0, 1, 3], [1, 1, 1, 1], [2, 0, 2, 0]):
        usage.update(torch.tensor(codes).view(1, 2, 2))
        expected = [0.9 * old + 0.1 * codes.count(m) / 4 for m, old in enumerate(expected)]
        assert usage.share.tolist() == pytest.approx(expected)


def test_unused_codes_become_features_and_used_ones_stay():
    made = []
    for _ in range(2):
        dictionary, usage = network(stage=1).dictionary, rf.Usage(12)
        with torch.no_grad():
            dictionary.codes[3:] = 1e3
        old, features = dictionary.codes.detach().clone(), random(2, 8, 4, 4)
        _, codes = dictionary(features)
        usage.update(codes)
        met = torch.bincount(codes.flatten(), minlength=12) > 0
        rf.restart_codes(dictionary, usage, features, common.seeded(0, 1))
        made.append(dictionary.codes.detach().clone())
        assert torch.equal(made[-1][met], old[met]) and met[:3].any() and not met[3:].any()
        points = features.permute(0, 2, 3, 1).flatten(0, 2)
        assert all((points == code).all(1).any() for code in made[-1][~met])
        assert len(made[-1].unique(dim=0)) == 12
        assert (usage.share[~met] == 1 / 12).all()
    assert torch.equal(*made)


def test_restarts_end_when_four_fifths_of_stage_1_are_done():
    cfg = replace(rf.TINY, steps=200, dictionary_share=0.5, restart_every=20)
    assert [step for step in range(1, 201) if cfg.restarts(step)] == [1, 21, 41, 61]
    assert not any(rf.PAPER.restarts(step) for step in (1, 20, 800_000))


# -------------------------------------------------------------------------------- Training

def run(patch, folder, data, *options, **changes):
    """--train a network of SMALL with changes, small ones for the frozen → {file: checkpoint}."""
    table = {"x4": {"faces": 1, "input": {"psnr": 0.0}, "restored": {"psnr": 0.0},
                    "paired_psnr_gain": {"mean": 0.0, "ci95": [0.0, 0.0]}, "indices": [], "each": {}}}
    patch.setattr(common, "load_encoder", lambda *_: recogniser())
    patch.setattr(common, "recogniser", lambda *_, **__: recogniser())
    patch.setattr(common, "_write_log", lambda *_: None)
    patch.setattr(rf, "evaluate", lambda *_: table)
    patch.setitem(rf.PRESETS, "tiny", replace(SMALL, **changes))
    command = ["--train", "--out", folder, "--device", "cpu", "--precision", "float32"]
    if "--resume" not in options:
        command += ["--data", data]
    assert rf.main([str(option) for option in (*command, *options)]) == 0
    return {file.name: torch.load(file, weights_only=True) for file in folder.glob("*.pt")}


@pytest.fixture
def train(face_folder, tmp_path, monkeypatch):
    """train(*options, **changes of SMALL), into tmp_path/run."""
    return functools.partial(run, monkeypatch, tmp_path / "run", face_folder)


@pytest.fixture(scope="module")
def whole(face_folder, tmp_path_factory):
    """An unbroken run: its folder, and {file: checkpoint}. Read only."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        return folder, run(patch, folder, face_folder, validate_every=2)


def same(first, second, *parts):
    return all(torch.equal(value, second[part][name])
               for part in parts for name, value in first[part].items())


def test_a_step_of_each_stage_follows_the_gradient_of_its_sum(train, faces):
    """One step each: terms against the log, gradients against what Adam was given."""
    states = train(steps=2, validate_every=1, restart_every=0, clip=None, **WEIGHTS)
    cfg = rf.Config(**states["checkpoint.pt"]["config"])
    other = recogniser()
    people = common.split_identities(faces)[0]
    for stage, file in ((1, "dictionary.pt"), (2, "checkpoint.pt")):
        state = states[file]
        torch.manual_seed(cfg.seed)
        net, judges = rf.RestoreFormer(cfg, stage), rf.Discriminators(cfg, stage)
        if stage == 2:
            net.load_state_dict(states["dictionary.pt"]["net"], strict=False)
            net.dictionary.requires_grad_(False)
        shown, target, boxes = rf.Batches(faces, people, cfg)[stage - 1]
        features = net.encoder(shown)
        priors = net.dictionary(features)[0]
        restored = net.decoder(net.fuse(features, priors))
        fake = judges(restored, boxes)
        hand = {
            "pixel": (restored - target).abs().mean(),
            "perceptual": 0.7 * sum((a - b).square().mean() for a, b in zip(
                other.features(restored), other.features(target))),
            "adversarial": -0.2 * F.logsigmoid(fake["image"].scores).mean()}
        if stage == 1:
            hand["codebook"] = 1.1 * (features.detach() - priors).square().mean()
            hand["commitment"] = 0.6 * (features - priors.detach()).square().mean()
        else:
            real = judges(target, boxes)
            hand["code"] = 0.4 * (features - priors.detach()).square().mean()
            hand["identity"] = 0.9 * (other(restored) - other(target)).square().sum(1).mean()
            hand["component"], hand["style"] = torch.zeros(()), torch.zeros(())
            for name in ("left_eye", "right_eye", "mouth"):
                hand["component"] = hand["component"] - 0.3 * F.logsigmoid(fake[name].scores).mean()
                for a, b in zip(fake[name].features, real[name].features):
                    grams = [torch.einsum("bihw,bjhw->bij", f, f) / f[0].numel()
                             for f in (a, b)]
                    gap = (grams[0] - grams[1]).square().sum((1, 2)).mean()
                    hand["style"] = hand["style"] + 5 * gap
        codes = net.dictionary.codes
        learned = [weight for weight in net.parameters()
                   if weight.requires_grad and weight is not codes]
        learned += [codes] if stage == 1 else []
        gradients = torch.autograd.grad(sum(hand.values()), learned)
        real, fake = judges(target, boxes), judges(restored.detach(), boxes)
        hand["discriminator"] = -sum(
            F.logsigmoid(real[name].scores).mean() + F.logsigmoid(-fake[name].scores).mean()
            for name in real)
        judging = list(judges.parameters())
        judged = torch.autograd.grad(hand["discriminator"], judging)

        row = state["rows"][stage - 1]
        assert set(hand) <= set(row) and row["step"] == stage and state["stage"] == stage
        for name, value in hand.items():
            assert row[name] == pytest.approx(value.item(), rel=1e-3, abs=1e-6), name
        for part, expected in (("optimizer", gradients), ("optimizer_d", judged)):
            given = [state[part]["state"][n]["exp_avg"].flatten() / (1 - cfg.betas[0])
                     for n in range(len(expected))]
            expected = torch.cat([gradient.flatten() for gradient in expected])
            torch.testing.assert_close(torch.cat(given), expected, rtol=1e-3,
                                       atol=1e-4 * expected.abs().max().item())
            assert state[part]["param_groups"][0]["lr"] == pytest.approx(cfg.rate(stage))
        if stage == 1:
            of_codes = state["optimizer"]["param_groups"][1]["lr"]
            assert of_codes == pytest.approx(cfg.codes_times * cfg.rate(1)) and cfg.codes_times > 1


def test_a_gradient_is_no_longer_than_clip(train):
    state = train(steps=2, validate_every=1, clip=1e-3)["checkpoint.pt"]
    given = [part["exp_avg"].flatten() / (1 - SMALL.betas[0])
             for part in state["optimizer"]["state"].values()]
    assert torch.cat(given).norm().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--resume",), ("--stage", 2)])
def test_stage_1_alone_and_then_stage_2_are_the_whole(train, whole, options, tmp_path):
    """checkpoint.pt of stage 1 is resumed; or stage 2 goes on from dictionary.pt alone."""
    first = train("--stage", 1, validate_every=2)
    assert first["checkpoint.pt"]["stage"] == 1 and first["checkpoint.pt"]["step"] == 4
    (tmp_path / "run" / ("dictionary.pt" if "--resume" in options else "checkpoint.pt")).unlink()
    states = train(*options, validate_every=2)
    for file in ("dictionary.pt", "checkpoint.pt"):
        assert same(whole[1][file], states[file], "net", "discriminators")
    assert [row["step"] for row in states["checkpoint.pt"]["rows"]] == [2, 4, 6, 8]


def test_the_codes_stand_still_in_stage_2_and_all_else_learns(whole):
    first, second = (whole[1][file]["net"] for file in ("dictionary.pt", "checkpoint.pt"))
    still = [name for name, value in first.items() if torch.equal(value, second[name])]
    assert still == ["dictionary.codes"]


def test_codes_out_of_use_restart_in_stage_1(train):
    state = train("--stage", 1, steps=2, cooldown=0.0, codes_times=1.0)["dictionary.pt"]
    cfg = rf.Config(**state["config"])
    torch.manual_seed(cfg.seed)
    old = rf.RestoreFormer(cfg, 1).dictionary.codes
    moved = ((state["net"]["dictionary.codes"] - old).norm(dim=1) > 0.01).sum()
    assert 0 < moved < 12 and (state["usage"]["share"] == 1 / 12).sum() == moved


@pytest.mark.parametrize(("options", "message"), [
    (("--resume", "--stage", 1), "not of stage 1"),
    (("--resume", "--steps", 4), "--steps 4: must be more than stage 1's 4"),
    (("--stage", 2, "--checkpoint", "none/checkpoint.pt"), "missing.*--train --stage 1"),
    (("--stage", 2, "--variant", "recognition-dictionary"), "part .net. of the checkpoint"),
    (("--steps", 1), "--steps 1: must be more")])
def test_stages_that_do_not_fit_are_refused_in_a_line(train, whole, tmp_path, options, message):
    shutil.copytree(whole[0], tmp_path / "run")
    with refused(message):
        train(*options)


def test_a_doubling_merges_with_the_convolution_behind_it():
    torch.manual_seed(3)
    layers = torch.nn.Sequential(torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(5, 4, 3, padding=1))
    x = torch.randn(2, 5, 6, 7)
    torch.testing.assert_close(rf.merge_doubling(layers)(x), layers(x), atol=1e-5, rtol=0)
    same = torch.nn.Sequential(torch.nn.Conv2d(5, 4, 3))
    assert rf.merge_doubling(same) is same


def test_stage_1_restores_nothing(whole, tmp_path):
    checkpoint = whole[0] / "dictionary.pt"
    with pytest.raises(common.InputError, match="holds stage 1.*--train --resume"):
        rf.main(["--restore", str(tmp_path), "--checkpoint", str(checkpoint)])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["exp1", "exp4", "recognition-dictionary"])
def test_a_variant_trains_and_is_loaded_again(variant, train, tmp_path):
    state = train("--variant", variant, steps=2)["checkpoint.pt"]
    args = SimpleNamespace(state=state, device="cpu", checkpoint=tmp_path, degradation=None)
    net, cfg = rf.load_network(args)
    assert cfg.variant == variant and cfg.fusion == rf.VARIANTS[variant].get("fusion", "mhca")
    assert same({"net": net.state_dict()}, state, "net")


# ------------------------------------------------------------------- Validation, restoration

def test_validation_is_equation_9_and_counts_the_codes(faces):
    net, encoder = network(stage=1), recogniser()
    chosen = [1, 7, 30]
    found = rf.validate(net, encoder, faces, chosen, SMALL, 1)
    images = common.stack_faces(faces, chosen)[0]
    with torch.no_grad():
        painted = net.eval()(images).clamp(-1, 1)
        pixels = (painted - images).abs().mean()
        phi = [(a - b).square().mean() for a, b in zip(encoder.features(painted),
                                                       encoder.features(images))]
        codes = net.encode(images).codes.flatten().tolist()
    expected = pixels + SMALL.weight_perceptual * sum(phi)
    assert found["validation"] == pytest.approx(expected.item(), rel=1e-2)
    shares = [codes.count(m) / len(codes) for m in set(codes)]
    entropy = -sum(share * math.log(share) for share in shares)
    assert found["perplexity"] == pytest.approx(math.exp(entropy), rel=0.02)
    assert found["used"] == pytest.approx(len(shares) / 12)
    assert found["validation_psnr"] == pytest.approx(
        common.psnr(painted, images).mean().item(), abs=0.1)


def test_with_a_file_of_arcface_identity_is_measured_by_it(faces, monkeypatch):
    eta = recogniser((4, 4, 4, 4), seed=8)
    monkeypatch.setattr(common, "ArcFace", lambda file: {"arcface.pth": eta}[file])
    monkeypatch.setattr(common, "metrics", lambda *_: {"psnr": common.psnr, "identity": None})
    monkeypatch.setattr(common, "judge", lambda *_: eta)
    args = SimpleNamespace(arcface="arcface.pth", fid=None, device="cpu", precision="float32")
    net = network().eval()
    table = rf.evaluate(net, faces, [3, 40], SMALL, args)
    assert list(table) == ["x4", "x8", "random"]
    (batch,) = rf.restored_batches(net, faces, [3, 40], SMALL, 8, precision="float32")
    for column, name in (("input", "degraded"), ("restored", "restored")):
        with torch.no_grad():
            cosine = F.cosine_similarity(eta(batch[name]), eta(batch["target"]))
        angle = cosine.arccos().rad2deg().mean().item()
        assert table["x8"][column]["identity"] == pytest.approx(angle, rel=1e-3)


def test_feature_distance_is_that_of_unit_features_place_by_place():
    judge = recogniser((4, 4, 4, 4), seed=8)
    image, target = random(2, 3, 64, 64), random(2, 3, 64, 64, seed=1)
    expected = []
    for k in range(2):
        total = 0.0
        pairs = zip(judge.features(image[k:k + 1]), judge.features(target[k:k + 1]))
        for one, two in pairs:
            for x, y in zip(one[0].flatten(1).T, two[0].flatten(1).T):
                x, y = x / x.norm().clamp(min=1e-12), y / y.norm().clamp(min=1e-12)
                total += (x - y).square().sum().item() / one[0, 0].numel() / 4
        expected.append(total)
    torch.testing.assert_close(rf.feature_distance(judge, image, target),
                               torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("made", [network, released])
@pytest.mark.parametrize("precision", ["float32", "auto", "bfloat16"])
def test_a_network_made_ready_to_restore_paints_the_same(precision, made):
    net = made()
    degraded = random(2, 3, 64, 64).clamp(-1, 1)
    expected = rf.restore(net, degraded, precision="float32")
    ready = rf.for_restoration(net, torch.device("cpu"), precision)
    restored = rf.restore(ready, degraded, precision=precision)
    if precision == "float32":
        torch.testing.assert_close(restored, expected, rtol=1e-4, atol=1e-4)
    elif precision == "auto":
        assert common.psnr(restored, expected).min() > 35
    assert restored.shape == expected.shape and restored.isfinite().all() and not net.training
    kinds = {module.weight.dtype for module in net.encoder.modules()
             if isinstance(module, nn.Conv2d)}
    with common.autocast("cpu", precision):
        mixed = torch.is_autocast_enabled("cpu")
    assert kinds == {torch.bfloat16 if mixed and precision == "bfloat16" else torch.float32}


def test_attention_pictures_show_what_the_left_eye_reads(faces):
    net = network(code_channels=8)
    images, landmarks = common.stack_faces(faces, [0, 9])
    pictures = rf.attention_pictures(net, images, landmarks)
    assert list(pictures) == ["attention 1", "attention 2"]
    with torch.no_grad():
        latents = net.eval().encode(images)
        maps = net.blocks[0].multi_head.maps(latents.features, latents.priors).mean(1)
    for face in (0, 1):
        x, y = (landmarks[face, 36:42].mean(0) + 0.5) / 8         # 8×8 features of 8 pixels
        read = maps[face, int(y) * 8 + int(x)].view(8, 8)
        shown = pictures["attention 1"][face, 0, 4::8, 4::8]
        torch.testing.assert_close((shown + 1) / 2, read / read.max(), rtol=0.05, atol=0.05)
    assert rf.attention_pictures(network(variant="exp1"), images, landmarks) == {}


@pytest.mark.slow
def test_a_short_training_learns_to_paint_people_it_has_never_seen(face_folder, tmp_path):
    """Stage 1 repaints them. Stage 2 paints degraded ones better than stage 1, where it began."""
    faces = common.FaceFolder(face_folder, 64)
    _, validation, test = common.split_identities(faces)
    held = validation + test
    cfg = replace(rf.TINY, size=64, codes=128, code_channels=32, widths=(16, 32, 48),
                  blocks=(0, 1, 1), discriminator_width=8, steps=180, dictionary_share=0.4,
                  validate_every=90, learning_rate=3e-4, validated=4, restart_every=10,
                  weight_perceptual=0.02, weight_identity=0.02)
    args = SimpleNamespace(
        device=torch.device("cpu"), precision="auto", state=None, train=True, begin=0.0,
        folder=tmp_path, checkpoint=tmp_path / "checkpoint.pt", workers=0)
    first, _ = rf.train_stage(1, cfg, args, faces, recogniser(), recogniser())
    args.state = common.load_checkpoint(args.checkpoint, "restoreformer")
    second, _ = rf.train_stage(2, cfg, args, faces, recogniser(), recogniser())

    (sharp,) = rf.restored_batches(first, faces, held, cfg, None, stage=1)
    (before,) = rf.restored_batches(first, faces, held, cfg, 4)
    (after,) = rf.restored_batches(second, faces, held, cfg, 4)
    target = sharp["target"]
    assert common.psnr(sharp["restored"], target).mean() > 19
    gain = common.psnr(after["restored"], target) - common.psnr(before["restored"], target)
    assert gain.mean() > 2 * gain.std() / len(held) ** 0.5
