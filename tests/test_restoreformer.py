"""RestoreFormer: equations against independent forms, variants, both stages, released names."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import restoreformer as rf

TINY = replace(rf.TINY, size=64, codes=12, code_channels=8, heads=2, widths=(4, 6, 8, 8), blocks=(1,) * 4,
               groups=1, discriminator_width=4, batch=2, validate_every=1000,
               dictionary_steps=4, steps=4, restart_every=2)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def recogniser():
    torch.manual_seed(1)
    return common.Recogniser((6, 8, 10, 12)).folded()


def network(stage=2, variant="full", **changes):
    """A network whose codes are spread as wide as its features, so that several are met."""
    cfg = replace(TINY, variant=variant, **rf.VARIANTS[variant], **changes)
    torch.manual_seed(2)
    net = rf.build(cfg, stage, recogniser() if cfg.recognition else None)
    with torch.no_grad():
        net.dictionary.codes.copy_(random(*net.dictionary.codes.shape, seed=4))
    return net


def attended(block, z, p, added):
    """Eq. (1)-(4), (5), (6) up to the feed-forward, by loops over heads and positions; and the maps."""
    _, channels, height, width = z.shape
    z, p, added = (x[0].flatten(1).T.detach().numpy().astype(np.float64) for x in (z, p, added))
    weights = [(m.weight.detach().numpy().astype(np.float64), m.bias.detach().numpy())
               for m in (block.query, block.key, block.value)]
    q, k, v = (x @ w.T + b for x, (w, b) in zip((z, p, p), weights))
    each, total, maps = channels // block.heads, np.zeros_like(z), np.zeros((block.heads, len(z), len(z)))
    for head in range(block.heads):
        part = slice(head * each, (head + 1) * each)
        for i in range(len(z)):
            scores = np.array([q[i, part] @ k[j, part] for j in range(len(z))]) / math.sqrt(each)
            maps[head, i] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            total[i, part] = sum(maps[head, i, j] * v[j, part] for j in range(len(z)))
    x = total + added
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + block.norm.eps)
    x = x * block.norm.weight.detach().numpy() + block.norm.bias.detach().numpy()
    return torch.tensor(x.T.reshape(1, channels, height, width)).float(), torch.tensor(maps).float()


@pytest.mark.parametrize("kind", ["mhsa", "mhca", "mhca-d"])
def test_attention_is_the_loop_over_heads_and_positions(kind):
    torch.manual_seed(3)
    block = rf.MHSA(8, 2) if kind == "mhsa" else rf.MHCA(8, 2, "degraded" if kind == "mhca-d" else "prior")
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    z, p = random(1, 8, 2, 3, seed=1), random(1, 8, 2, 3, seed=2)
    asking, added = (p, p) if kind == "mhsa" else (z, z if kind == "mhca-d" else p)
    expected, maps = attended(block, asking, p, added)
    first, _, second = block.feed_forward
    expected = F.conv2d(expected, first.weight, first.bias, padding=1)
    expected = F.conv2d(torch.where(expected > 0, expected, 0.2 * expected), second.weight, second.bias,
                        padding=1)
    torch.testing.assert_close(block(z, p), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block.attention(z, p)[0], maps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.attention(z, p).sum(-1), torch.ones(1, 2, 6))


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
                distances = [(z[b, :, i, j] - code).square().sum().item() for code in dictionary.codes]
                assert nearest[b, i, j] == distances.index(min(distances))
                assert torch.equal(priors[b, :, i, j], dictionary.codes[nearest[b, i, j]])
    assert nearest[0, 0, 0] == 1


def test_the_decoders_gradient_passes_the_dictionary_unchanged_and_leaves_the_codes_alone():
    net, image = network(stage=1), random(1, 3, 64, 64)
    features, priors, fused = net.latents(image)
    torch.testing.assert_close(fused, priors)
    seen = random(*fused.shape, seed=7)
    (at_features,) = torch.autograd.grad((fused * seen).sum(), features, retain_graph=True)
    assert torch.equal(at_features, seen)
    (fused * seen).sum().backward()
    assert net.dictionary.codes.grad is None
    assert next(net.encoder.parameters()).grad.abs().sum() > 0


def test_two_cross_attentions_ask_with_the_degraded_features_and_the_second_reads_the_first():
    net, image = network(), random(1, 3, 64, 64)
    z, p, _ = net.latents(image)
    first, second = net.fusion
    torch.testing.assert_close(net(image), net.decoder(second(z, first(z, p))))
    assert [m.shape for m in net.attention_maps(image)] == [(1, 2, 64, 64)] * 2


def test_losses_are_their_sums_by_hand():
    a, b = random(2, 3, 2, 2, seed=1), random(2, 3, 2, 2, seed=2)
    x, y = a.double().numpy(), b.double().numpy()
    close = pytest.approx
    assert rf.pixel_loss(a, b).item() == close(np.abs(x - y).mean(), rel=1e-5)
    square = ((x - y) ** 2).mean()
    assert rf.perceptual_loss([a, 2 * a], [b, 2 * b]).item() == close(5 * square, rel=1e-5)
    for loss in (rf.code_loss, rf.codebook_loss, rf.commitment_loss):
        assert loss(a, b).item() == close(square, rel=1e-5)
    real, fake = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(-y))
    expected = -np.log(real).mean() - np.log(1 - fake).mean()
    assert rf.discriminator_loss(a, b).item() == close(expected, rel=1e-5)
    assert rf.adversarial_loss(b).item() == close(-np.log(fake).mean(), rel=1e-5)
    grams = [np.array([[[(f[n, i] * f[n, j]).sum() / 12 for j in range(3)] for i in range(3)]
                       for n in range(2)]) for f in (x, y)]
    assert np.allclose(rf.gram(a).numpy(), grams[0], atol=1e-6)
    style = ((grams[0] - grams[1]) ** 2).sum((1, 2)).mean()
    assert rf.style_loss([a, a], [b, b]).item() == close(2 * style, rel=1e-5)
    identity = ((x[:, :, 0, 0] - y[:, :, 0, 0]) ** 2).sum(1).mean()
    assert rf.identity_loss(a[:, :, 0, 0], b[:, :, 0, 0]).item() == close(identity, rel=1e-5)


@pytest.mark.parametrize(("loss", "moved"), [(rf.codebook_loss, "codes"), (rf.commitment_loss, "features"),
                                             (rf.code_loss, "features")])
def test_each_dictionary_loss_moves_one_side_only(loss, moved):
    parts = {"features": random(1, 2, 2, 2).requires_grad_(),
             "codes": random(1, 2, 2, 2, seed=1).requires_grad_()}
    loss(*parts.values()).backward()
    assert {name for name, part in parts.items() if part.grad is not None} == {moved}


def test_regions_lie_where_the_landmarks_say():
    boxes = common.component_boxes(common.MEAN_LANDMARKS[None] * 256 / 512, 256)
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    crops = rf.crop_regions(torch.stack([x, y, x])[None], boxes)
    assert {name: crop.shape[-1] for name, crop in crops.items()} == {
        "left_eye": 40, "right_eye": 40, "mouth": 60}
    places = {"left_eye": slice(36, 42), "right_eye": slice(42, 48), "mouth": slice(48, 68)}
    for name, points in places.items():
        corners, seen = common.MEAN_LANDMARKS[points] * 256 / 512, crops[name][0, :2]
        assert (seen.amin((1, 2)) < corners.amin(0) + 2).all()            # the box's edge is at the points
        assert (corners.amax(0) - 2 < seen.amax((1, 2))).all()
        box = boxes[0, list(common.COMPONENTS).index(name)]
        torch.testing.assert_close(seen.mean((1, 2)), (box[:2] + box[2:]) / 2 - 0.5, rtol=0, atol=0.1)
        assert abs(seen[0].mean() - corners[:, 0].mean()) < 3


def test_paper_preset_has_the_papers_numbers():
    p = rf.PAPER
    assert (p.size, p.codes, p.code_channels, p.batch, p.variant) == (512, 1024, 256, 16, "full")
    assert (p.weight_perceptual, p.weight_code, p.weight_component, p.weight_style) == (1, 0.25, 1, 2000)
    assert (p.weight_adversarial, p.weight_identity) == (0.8, 1.5)
    assert (p.weight_codebook, p.weight_commitment) == (1, 0.25)
    assert (p.dictionary_steps, p.steps) == (800_000, 60_000)
    rates = [p.rate(1, step) for step in (1, 600_000, 600_001, 800_000)]
    assert rates == pytest.approx([7e-5, 7e-5, 7e-6, 7e-6])
    assert [p.rate(2, step) for step in (1, 60_000)] == pytest.approx([7e-6, 7e-6])
    d = rf.degradation_of(p)
    assert d == common.DEGRADATIONS["restoreformer"] and d.mode == "bilinear"
    assert [tuple(r)[:2] for r in (d.blur, d.scale, d.noise, d.quality)] == [
        (0.2, 10), (1, 8), (0, 20), (60, 100)]


def test_the_papers_network_has_12_residual_blocks_and_5_changes_of_size_on_each_side():
    with torch.device("meta"):
        net = rf.build(rf.PAPER)
        assert net.encoder(torch.empty(1, 3, 512, 512)).shape == (1, 256, 16, 16)
        assert net.decoder(torch.empty(1, 256, 16, 16)).shape == (1, 3, 512, 512)

    def count(part, kind):
        return sum(isinstance(m, kind) for m in part.modules())
    assert (count(net.encoder, rf.Residual), count(net.encoder, nn.AvgPool2d)) == (12, 5)
    assert (count(net.decoder, rf.Residual), count(net.decoder, nn.Upsample)) == (12, 5)
    assert net.dictionary.codes.shape == (1024, 256)


def test_variants_are_the_rows_of_table_4():
    rows = {name: (net.sources, [(type(b).__name__, getattr(b, "residual", None)) for b in net.fusion])
            for name in rf.VARIANTS for net in [network(variant=name)]}
    mhca, self_attention = [("MHCA", "prior")] * 2, [("MHSA", "prior")] * 2
    assert rows == {
        "full": ("both", mhca), "recognition-dictionary": ("both", mhca), "exp1": ("degraded", []),
        "exp2": ("degraded", self_attention), "exp3": ("prior", self_attention),
        "exp4": ("both", [("SFT", None)] * 2), "exp5": ("both", [("MHCA", "degraded")] * 2)}
    assert not any(p.requires_grad for p in network(variant="recognition-dictionary").encoder.parameters())


@pytest.mark.parametrize("variant", rf.VARIANTS)
def test_only_exp1_and_exp2_have_no_use_for_the_codes(variant):
    net, image = network(variant=variant), random(1, 3, 64, 64)
    with torch.no_grad():
        before = net(image)
        net.dictionary.codes.copy_(random(12, 8, seed=9))
        assert torch.equal(before, net(image)) == (variant in ("exp1", "exp2"))
    assert (len(net.attention_maps(image)) == 0) == (variant in ("exp1", "exp4"))


@pytest.mark.parametrize("variant", ["full", "exp3", "exp4", "exp5"])
def test_only_exp3_sees_the_image_through_its_codes_alone(variant):
    net, z = network(variant=variant), random(1, 8, 8, 8)
    outputs = []
    for scale in (1.0, 1.0 + 1e-3):
        net.encoder.forward = lambda image, scale=scale: z * scale
        outputs.append((net.matched(None), net(None)))
    (first, a), (second, b) = outputs
    assert torch.equal(first, second)
    difference = (a - b).abs().max()           # x + (p − x) is p up to rounding
    assert difference < 1e-5 if variant == "exp3" else difference > 3e-5


def test_unused_codes_become_features_of_the_batch_each_time_the_same():
    made = []
    for _ in range(2):
        dictionary, usage = network(stage=1).dictionary, torch.zeros(12)
        with torch.no_grad():
            dictionary.codes[3:] = 1e3
        old, features = dictionary.codes.detach().clone(), random(2, 8, 4, 4)
        met = torch.bincount(dictionary(features)[1].flatten(), minlength=12) > 0
        rf.restart_codes(dictionary, features, usage, 1, replace(TINY, dictionary_steps=100), 1)
        made.append(dictionary.codes.detach().clone())
        assert torch.equal(made[-1][met], old[met]) and met[:3].any() and not met[3:].any()
        points = features.permute(0, 2, 3, 1).flatten(0, 2)
        assert all((points == code).all(1).any() for code in made[-1][~met])
    assert torch.equal(*made)


def test_batches_are_a_function_of_seed_stage_rank_and_step(face_folder):
    faces = common.FaceFolder(face_folder, 64)

    def batch(stage=2, rank=0, step=1, seed=0):
        return rf.Batches(faces, list(range(20)), replace(TINY, seed=seed), stage, rank)[step]
    base = batch()
    assert all(torch.equal(a, b) for a, b in zip(base, batch()))
    assert all(not torch.equal(base[1], batch(**change)[1])
               for change in ({"stage": 1}, {"rank": 1}, {"step": 2}, {"seed": 1}))
    assert not torch.equal(base[0], base[1]) and torch.equal(*batch(stage=1)[:2])


def run(out, folder, cfg, patch, **changes):
    patch.setattr(rf, "load_encoders", lambda *_: (recogniser(), recogniser()))
    patch.setattr(rf, "finish", lambda *_: None)
    rf.train(cfg, SimpleNamespace(**{
        "data": str(folder), "out": str(out), "device": "cpu", "landmarks": None, "vggface": None,
        "lpips": None, "aligned": False, "resume": False, "checkpoint": out / "checkpoint.pt",
        "workers": 0, "preset": None, "stage": None, "fid": None} | changes))
    return [torch.load(out / name, weights_only=True) if (out / name).is_file() else None
            for name in ("dictionary.pt", "checkpoint.pt")]


def log_d(score):
    return torch.log(torch.sigmoid(score)).mean()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_lowers_the_sum_of_equation_18_or_13(stage, face_folder, tmp_path, monkeypatch):
    """The terms by hand, against the log, and their gradient, against what Adam was given."""
    monkeypatch.setattr(common, "precision", lambda kind: torch.float32)        # the same on any processor
    cfg = replace(TINY, dictionary_steps=1, steps=1, restart_every=0, clip=math.inf, weight_perceptual=0.7,
                  weight_adversarial=0.2, weight_codebook=1.1, weight_commitment=0.6, weight_component=0.3,
                  weight_style=5.0, weight_identity=0.9, weight_code=0.4)
    states = run(tmp_path, face_folder, cfg, monkeypatch)
    faces = common.FaceFolder(face_folder, 64)
    shown, target, boxes = rf.Batches(faces, common.split_identities(faces)[0], cfg, stage)[0]
    torch.manual_seed(cfg.seed)
    net, judges, other = rf.build(cfg, stage), rf.Discriminators(cfg, stage), recogniser()
    if stage == 2:
        net.load_state_dict(states[0]["net"], strict=False)
        net.dictionary.requires_grad_(False)
    restored, z, p = net(shown, latents=True)
    fake = judges(restored, boxes)
    hand = {"pixel": (restored - target).abs().mean(),
            "perceptual": 0.7 * sum((a - b).square().mean() for a, b in zip(
                other.features(restored), other.features(target))),
            "adversarial": -0.2 * log_d(fake["image"][0])}
    if stage == 1:
        hand |= {"codebook": 1.1 * (z.detach() - p).square().mean(),
                 "commitment": 0.6 * (z - p.detach()).square().mean()}
    else:
        real, regions = judges(target, boxes), ("left_eye", "right_eye", "mouth")
        grams = [[torch.einsum("bihw,bjhw->bij", f, f) / f[0].numel() for f in judged[name][1]]
                 for judged in (fake, real) for name in regions]
        hand |= {"component": -0.3 * sum(log_d(fake[name][0]) for name in regions),
                 "style": 5 * sum((a - b).square().sum((1, 2)).mean() for ours, theirs in zip(
                     grams[:3], grams[3:]) for a, b in zip(ours, theirs)),
                 "identity": 0.9 * (other(restored) - other(target)).square().sum(1).mean(),
                 "code": 0.4 * (z - p.detach()).square().mean()}
    learned = [weight for weight in net.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(sum(hand.values()), learned)
    judged = judges(torch.cat([target, restored.detach()]), torch.cat([boxes, boxes]))
    hand["discriminator"] = -sum(log_d(scores[:2]) + log_d(-scores[2:]) for scores, _ in judged.values())
    state = states[stage - 1]
    for name, value in hand.items():
        assert state["rows"][0][name] == pytest.approx(value.item(), rel=1e-3, abs=1e-6), name
    assert set(hand) <= set(state["rows"][0])
    gradient, given = (torch.cat([part.flatten() for part in parts]) for parts in (gradients, [
        state["optimizer"]["state"][n]["exp_avg"] / (1 - cfg.betas[0]) for n in range(len(learned))]))
    torch.testing.assert_close(given, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_sft_scales_and_shifts_the_priors_by_what_the_features_say():
    sft, z, p = rf.SFT(4), random(1, 4, 5, 5), random(1, 4, 5, 5, seed=1)
    alpha, beta = (layers[2](F.leaky_relu(layers[0](z), 0.2)) for layers in (sft.scale, sft.shift))
    torch.testing.assert_close(sft(z, p), p + alpha * p + beta)
    assert alpha.std() > 0.01 and beta.std() > 0.01


def test_the_blur_of_equation_19_is_the_configs_and_the_rest_the_papers():
    papers = common.DEGRADATIONS["restoreformer"]
    assert rf.degradation_of(rf.PAPER) == papers and papers.blur.high == 10
    narrow = rf.degradation_of(replace(rf.PAPER, blur=3.0))
    assert narrow.blur.high == 3 and replace(narrow, blur=papers.blur) == papers


def test_a_run_broken_in_both_stages_resumes_to_the_same_bits_and_the_codes_stand_still_in_stage_2(
        face_folder, tmp_path, monkeypatch):
    cfg, real, broken = replace(TINY, validate_every=2), common.save_checkpoint, []
    first, whole = run(tmp_path / "whole", face_folder, cfg, monkeypatch)

    def breaking(path, state):
        real(path, state)
        if state["step"] == 2 and state["stage"] not in broken:
            broken.append(state["stage"])
            raise KeyboardInterrupt
    monkeypatch.setattr(common, "save_checkpoint", breaking)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", face_folder, cfg, monkeypatch, resume=resume)
    _, resumed = run(tmp_path / "broken", face_folder, cfg, monkeypatch, resume=True)
    assert broken == [1, 2]
    for part in ("net", "discriminators"):
        assert all(torch.equal(a, resumed[part][name]) for name, a in whole[part].items())
    assert torch.equal(first["net"]["dictionary.codes"], whole["net"]["dictionary.codes"])
    assert not torch.equal(first["net"]["encoder.0.weight"], whole["net"]["encoder.0.weight"])


def test_stage_2_starts_from_stage_1(face_folder, tmp_path, monkeypatch):
    first, _ = run(tmp_path, face_folder, TINY, monkeypatch, stage=1)
    net = rf.build(TINY)
    rf.start_from_dictionary(net, tmp_path / "dictionary.pt", TINY, torch.device("cpu"))
    assert {n.split(".")[0] for n in first["net"]} == {"encoder", "dictionary", "decoder"}
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in first["net"].items())


def official():
    """The names and shapes of the published checkpoint, from its structure."""
    out = {}

    def layer(name, after, before=None, kernel=1):
        out[f"{name}.weight"] = (after,) if before is None else (after, before, kernel, kernel)
        out[f"{name}.bias"] = (after,)

    def residual(name, before, after):
        layer(f"{name}.norm1", before), layer(f"{name}.conv1", after, before, 3)
        layer(f"{name}.norm2", after), layer(f"{name}.conv2", after, after, 3)
        if before != after:
            layer(f"{name}.nin_shortcut", after, before)

    def attention(name):
        layer(f"{name}.norm1", 512), layer(f"{name}.norm2", 512)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", 512, 512)
    widths = [64, 128, 128, 256, 256, 512]
    layer("encoder.conv_in", 64, 3, 3), layer("decoder.conv_in", 512, 256, 3)
    for side, way, blocks in (("encoder", "down", 2), ("decoder", "up", 3)):
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)] if way == "down" else widths[min(i + 1, 5)]
            for b in range(blocks):
                residual(f"{side}.{way}.{i}.block.{b}", width if b else before, width)
                if i == 5:
                    attention(f"{side}.{way}.5.attn.{b}")
            if i != (5 if way == "down" else 0):
                layer(f"{side}.{way}.{i}.{way}sample.conv", width, width, 3)
        residual(f"{side}.mid.block_1", 512, 512), attention(f"{side}.mid.attn_1")
        residual(f"{side}.mid.block_2", 512, 512)
    layer("encoder.norm_out", 512), layer("encoder.conv_out", 256, 512, 3)
    layer("decoder.norm_out", 64), layer("decoder.conv_out", 3, 64, 3)
    layer("quant_conv", 256, 256), layer("post_quant_conv", 256, 256)
    return out | {"quantize.embedding.weight": (1024, 256)}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("prefix", ["", "vqvae."])
def test_official_names_and_shapes_map_one_to_one(stage, prefix):
    with torch.device("meta"):
        own = {name: tuple(value.shape) for name, value in rf.build(rf.RELEASED, stage).state_dict().items()}
    assert len(own) == 405
    assert own == {rf.released_name(prefix + name): shape for name, shape in official().items()}
    assert rf.released_name("loss.discriminator.weight") is None


def test_the_released_attention_is_the_plain_loop_and_without_y_ignores_the_second_norm():
    torch.manual_seed(5)
    block, x, y = rf.ReleasedAttention(8, 2, 4, True), random(1, 8, 2, 2), random(1, 8, 2, 2, seed=1)
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0.2, 0.7)
    for asking in (y, None):
        h = F.group_norm(x, 4, block.norm.weight, block.norm.bias, 1e-6)
        second = F.group_norm(y, 4, block.norm_query.weight, block.norm_query.bias, 1e-6)
        source = h if asking is None else second
        q, k, v = (m(s).flatten(2)[0] for m, s in ((block.query, source), (block.key, h), (block.value, h)))
        read = torch.zeros(8, 4)
        for c in range(8):
            part = slice(c // 4 * 4, c // 4 * 4 + 4)
            for i in range(4):
                read[c, i] = torch.stack([q[part, i] @ k[part, j] / 2 for j in range(4)]).softmax(0) @ v[c]
        expected = x + block.project(read.view(1, 8, 2, 2))
        torch.testing.assert_close(block(x, asking), expected, rtol=1e-4, atol=1e-4)


# Restoring: the forms that are faster

@pytest.mark.parametrize("size", [(3, 5), (1, 1)])
def test_a_merged_doubling_is_the_doubling_and_its_convolution_at_the_border_too(size):
    layer = nn.Conv2d(4, 6, 3, padding=1)
    x = random(2, 4, *size)
    with torch.no_grad():
        expected = layer(F.interpolate(x, scale_factor=2, mode="nearest"))
        torch.testing.assert_close(rf.merge_doubling(layer)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("precision", ["float32", "auto", "bfloat16"])
def test_a_network_made_ready_to_restore_paints_the_same(precision, released):
    cfg = replace(TINY, released=released)
    torch.manual_seed(5)
    net = rf.build(cfg).eval()
    with torch.no_grad():
        net.dictionary.codes.mul_(cfg.codes)
    degraded = random(2, 3, 64, 64).clamp(-1, 1)
    expected = rf.restore(net, degraded, precision="float32" if precision == "float32" else "auto")
    features = rf.for_restoration(net, torch.device("cpu"), precision)
    restored = rf.restore(features, degraded, precision=precision)
    if precision == "float32":
        torch.testing.assert_close(restored, expected, rtol=1e-4, atol=1e-4)
    elif precision == "auto":
        assert common.psnr(restored, expected).min() > 35
    assert restored.shape == expected.shape and restored.isfinite().all() and not net.training
    exact = released and precision != "bfloat16"
    with common.autocast("cpu", precision):
        low = torch.is_autocast_enabled("cpu")
    kinds = {module.weight.dtype for module in net.encoder.modules() if isinstance(module, nn.Conv2d)}
    assert kinds == {torch.bfloat16 if low and not exact else torch.float32}
