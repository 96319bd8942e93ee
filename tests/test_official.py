"""The authors' weights: every official name and shape, the official numbers, and files that do not fit.

`official.json` lists the tensors of the four official files, and what the official networks make of the
weights and pictures that `weights` and `picture` below compute. Those values were written by the networks
here, after the same networks, filled with other weights, had been found to equal the official code's output
to 1e-4 in float32.
"""

import http.server
import json
import re
import sys
import threading
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import asffnet
import common
import dfdnet
import dmdnet
import gfrnet
import restoreformer
from common import InputError

OFFICIAL = json.loads(Path(__file__).with_name("official.json").read_text())
SCRIPTS = {"asffnet": asffnet, "dfdnet": dfdnet, "dmdnet": dmdnet, "restoreformer": restoreformer}
TENSORS = {"asffnet": 599, "dfdnet": 386, "dmdnet": 1014, "restoreformer": 405}


def tensors(script):
    """The official {name: shape}. A line is a kind of layer, its name, the shape of its weight."""
    names = {}
    for line in OFFICIAL[script]["layers"]:
        kind, name, *sizes = line.split()
        shape = tuple(map(int, sizes))
        if kind == "tensor":
            names[name] = shape
            continue
        if not kind.endswith("-"):                                       # "-": without bias
            names[f"{name}.bias"] = shape[:1]
        if kind.startswith("spectral"):
            names |= {f"{name}.weight_orig": shape, f"{name}.weight_u": shape[:1],
                      f"{name}.weight_v": (int(np.prod(shape[1:])),)}
        else:
            names[f"{name}.weight"] = shape
    return names


# --------------------------------------------------------------------------- Weights out of whole numbers

def noise(name, shape, spread):
    """Evenly spread numbers of mean 0 and this standard deviation, by mixing the bits of the place."""
    bits = np.arange(np.prod(shape), dtype=np.uint32) * np.uint32(0x9E3779B1)
    bits += np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits ^= bits >> np.uint32(shift)
        bits *= np.uint32(factor)
    values = (bits >> np.uint32(8)).astype(np.float32)
    values -= 2**23 - 0.5
    values *= spread * 3**0.5 / 2**23
    return torch.from_numpy(values.reshape(shape))


GAINS = {                    # factors that keep what the layers make near 1, and the pictures inside [-1,1]
    "dfdnet": {r"^[a-z]{2}_\d": 0.3, r"ScaleModel1\.2": 0.7, r"^up4\.4": 0.3},
    "asffnet": {r"MaskModel\.2": 0.2, r"stem|Model\d|\.conv\d": 0.6, r"^UpModel\.9": 0.2},
    "dmdnet": {r"Res\.2|MSDilate": 0.5, r"^E_.q\.conv": 0.7, r"Scale": 0.7, r"Shift": 0.8, r"mem_key": 0.1,
               r"^up4\.4": 0.3},
    "restoreformer": {r"conv2|proj_out": 0.5, r"decoder\.conv_out": 0.3}}


def weights(script):
    """An official state dict. Of a layer with spectral norm uᵀWv is not 1, and u and v are no singular
    vectors: what divides by anything else is noticed. What nothing uses is a zero, repeated."""
    state = {}
    for name, shape in tensors(script).items():
        gain = np.prod([factor for pattern, factor in GAINS[script].items() if re.search(pattern, name)])
        spread = gain * (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else None
        if script == "dfdnet" and unused(name):
            state[name] = torch.zeros(1).expand(shape)
        elif name.startswith("VggExtract.features."):                    # the same tensor by another name
            state[name] = state["VggExtract.model.features." + name.split(".", 3)[3]]
        elif name.startswith("VggExtract.RGB"):
            state[name] = 0.45 + noise(name, shape, 0.05) - 0.2 * name.endswith("std")
        elif re.search(r"^up\d\.conv1\.0\.weight", name) and script == "dfdnet":
            state[name] = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16 + noise(name, shape, 0.01)
        elif name.endswith("weight_orig"):
            weight = state[name] = noise(name, shape, 1.5 * spread)
            u, v = noise(name + "u", shape[:1], 1.0), weight.flatten(1).T @ noise(name + "u", shape[:1], 1.0)
            state[name[:-4] + "u"], state[name[:-4] + "v"] = 1.5 * u / v.norm(), v / v.norm()
        elif name.endswith((".weight_u", ".weight_v")):
            continue
        elif "mem_" in name or "embedding" in name:
            state[name] = noise(name, shape, gain)
        elif len(shape) == 1:                                            # biases, group normalisation
            state[name] = noise(name, shape, 0.05) + float(name.endswith("weight"))
        else:
            state[name] = noise(name, shape, spread)
    return state


def unused(name):
    return name.endswith("weight_flip") or name.startswith(("to_rgb", "VggExtract.model.classifier"))


def dictionary(entries=4):
    """DFDNet's files, {name: array}."""
    return {f"{part}_{side}_center.npy": noise(part, (entries, channels * n * n), 1.0).numpy()
            for side, channels, *sizes in ((256, 128, 40, 25, 55), (128, 256, 20, 12, 27),
                                           (64, 512, 10, 6, 13), (32, 512, 5, 3, 6))
            for part, n in zip(common.COMPONENTS, (sizes[0], *sizes))}


def picture(name, size):
    """(1,3,size,size) in [-1,1]: slow waves and a little noise."""
    y, x = (torch.arange(size) / size).view(1, -1, 1), (torch.arange(size) / size).view(1, 1, -1)
    phase = noise(name, (3, 4, 1, 1), 2.0)
    waves = sum(torch.cos(phase[:, k] + (5 + 7 * k) * (x * (k % 3 - 1) + y * (k % 2))) for k in range(4))
    return (0.22 * waves + noise(name, (3, size, size), 0.03))[None]


def boxes(size, shift=0):
    corners = [[55, 90, 115, 151], [139, 88, 204, 147], [95, 110, 160, 170], [80, 150, 175, 216]]
    return (torch.tensor([corners], dtype=torch.float32) + shift) * (size / 256)


@torch.inference_mode()
def outputs(script, net, device="cpu", precision="float32", batch=1):
    """What the network makes of the pictures, {case: (batch,3,size,size)}: below 512, for speed."""
    def call(*inputs):
        with common.autocast(device, precision):
            return net(*(x.expand(batch, *x.shape[1:]).to(device) for x in inputs)).float().cpu()

    if script == "restoreformer":
        return {"": call(picture("degraded", 128))}
    if script == "asffnet":
        face = common.mean_landmarks(128)[None]
        return {"": call(picture("degraded", 128), picture("guide", 128), face + noise("a", face.shape, 1.0),
                         face * 0.9 + 8 + noise("b", face.shape, 1.0))}
    degraded = picture("degraded", 256)
    if script == "dfdnet":
        return {"": call(degraded, boxes(256))}
    references = torch.stack([picture(name, 256) for name in ("first", "second")], 1)
    theirs = torch.stack([boxes(256, 3), boxes(256, -5)], 1)
    return {"generic": call(degraded, boxes(256)),
            "specific": call(degraded, boxes(256), references, theirs)}


def made_ready(script, net, device, precision):
    """The network as --restore uses it."""
    if script in ("dfdnet", "dmdnet", "restoreformer"):
        return SCRIPTS[script].for_restoration(net, torch.device(device), precision)
    return common.for_inference(net, torch.device(device), precision)


def at_some_places(image):
    """(1,3,h,w) → the values of 24 pixels, of all channels."""
    places = torch.arange(24) * 7919 % image[0, 0].numel()
    return image.flatten(2)[0, :, places].flatten()


def load(script, state, **options):
    if script == "dfdnet":
        options.setdefault("dictionary", dictionary())
    return SCRIPTS[script].load_official(state, **options)


# --------------------------------------------------------------------------------------- Numbers and names

@pytest.fixture(scope="module")
def state(request):
    return weights(request.param)


every_script = pytest.mark.parametrize("script, state", [(name, name) for name in SCRIPTS],
                                       indirect=["state"], scope="module")


@every_script
def test_the_official_numbers_come_out_of_the_official_tensors(script, state):
    assert {name: tuple(value.shape) for name, value in state.items()} == tensors(script)
    assert len(state) == TENSORS[script]
    net = load(script, state)
    whole = [net, net.encoder] if script == "dfdnet" else [net]
    assert not any(part.training or any(p.requires_grad for p in part.parameters()) for part in whole)
    assert not any(".parametrizations." in name for name in net.state_dict())
    results = outputs(script, net)
    assert set(results) == set(OFFICIAL[script]["values"])
    for case, result in results.items():
        expected = torch.tensor(OFFICIAL[script]["values"][case])
        assert expected.numel() == 72 and expected.std() > 0.1
        torch.testing.assert_close(at_some_places(result), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("script, state", [("asffnet", "asffnet"), ("dmdnet", "dmdnet")],
                         indirect=["state"], scope="module")
def test_a_network_made_ready_to_restore_paints_the_same(script, state, precision):
    net = load(script, state)
    expected = outputs(script, net)
    for case, restored in outputs(script, made_ready(script, net, "cpu", precision),
                                  precision=precision).items():
        if precision == "float32":
            torch.testing.assert_close(restored, expected[case], atol=2e-5, rtol=0)
        assert common.psnr(restored, expected[case]) > 40


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "auto"])
@every_script
def test_a_gpu_paints_what_the_processor_paints_a_face_or_a_batch_at_a_time(script, state, precision,
                                                                            monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected = outputs(script, load(script, state))
    net = made_ready(script, load(script, state).to("cuda"), "cuda", precision)
    for batch in (1, 16):
        for case, restored in outputs(script, net, "cuda", precision, batch).items():
            assert restored.shape == (batch, *expected[case].shape[1:])
            if precision == "float32":
                torch.testing.assert_close(restored, expected[case].expand_as(restored), atol=1e-3, rtol=0)
            assert common.psnr(restored, expected[case].expand_as(restored)).min() > 40


@pytest.mark.cuda
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gpu_is_timed(script, capsys):
    assert SCRIPTS[script].main(["--benchmark", "--device", "cuda", "--preset", "released"]) == 0
    assert re.search(r"images/s .* peak memory \d+\.\d+ GB", capsys.readouterr().out)


@every_script
def test_what_does_not_fit_is_named_once_and_counted(script, state):
    first, second = [name for name in state if not (script == "dfdnet" and unused(name))
                     and "VggExtract.features" not in name and "model" not in name][:2]
    changed = {name: value for name, value in state.items() if name != first}
    changed |= {second: state[second].flatten()[:3], "net.0.weight": torch.zeros(2)}
    with pytest.raises(InputError) as caught:
        load(script, changed)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("the state dict: not ")
    assert f"({second} is 3, not " in message and "and 2 more)" in message


# ------------------------------------------------------------------- What load_named and read_published do

def small(spectral=False):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(2, 2, bias=False))
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(net[0])) if spectral else net


SMALL = {"conv.weight": torch.ones(4, 3, 1, 1), "conv.bias": torch.arange(4.0), "line": torch.eye(2),
         "old": torch.zeros(9)}


def small_name(name):
    return {"conv.weight": "0.weight", "conv.bias": "0.bias", "line": "1.weight", "again": "1.weight",
            "old": None}[name]


def filled(state):
    net = common.load_named(small(), state, small_name, "the small net")
    return all(torch.equal(net.state_dict()[small_name(name)], value)
               for name, value in SMALL.items() if name != "old") and not net.training


@pytest.mark.parametrize("wrap", [
    lambda state: state, lambda state: {f"module.{name}": value for name, value in state.items()},
    lambda state: {"state_dict": state, "epoch": 3}, lambda state: {"params": state},
    lambda state: state | {"again": torch.eye(2)}])
def test_official_wrappings_are_taken_off(wrap, tmp_path):
    torch.save(wrap(SMALL), tmp_path / "weights.pth")
    assert filled(wrap(SMALL)) and filled(tmp_path / "weights.pth") and filled(str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("change, expected", [
    ({"conv.bias": None}, r"^the state dict: not the small net \(0.bias is missing\)"),
    ({"more": torch.ones(1)}, r"\(more belongs to no layer\)"),
    ({"line": torch.ones(2, 3)}, r"\(line is 2×3, not 2×2\)"),
    ({"line": torch.tensor(1.0)}, r"\(line is a number, not 2×2\)"),
    ({"line": None, "a": torch.ones(1), "b": torch.ones(1)}, "a belongs to no layer, and 2 more"),
    ({"again": torch.zeros(2, 2)}, "again is there twice"), ({"more": 3}, "holds no named tensors")])
def test_load_named_takes_every_tensor_once(change, expected):
    state = {name: value for name, value in (SMALL | change).items() if value is not None}
    with pytest.raises(InputError, match=expected) as caught:
        filled(state)
    assert "\n" not in str(caught.value)


def test_load_named_divides_by_the_stored_norm_and_leaves_the_plain_weight():
    state = {"0.bias": torch.zeros(4), "0.parametrizations.weight.original": torch.full((4, 3, 1, 1), 6.0),
             "0.parametrizations.weight.0._u": torch.tensor([1.0, 0, 0, 0]),
             "0.parametrizations.weight.0._v": torch.tensor([0.5, 0, 0])}                # uᵀWv = 3
    net = common.load_named(small(spectral=True), state, lambda name: name, "it")
    assert torch.equal(net[0].weight, torch.full((4, 3, 1, 1), 2.0))
    assert sorted(net.state_dict()) == ["0.bias", "0.weight"]


@pytest.mark.parametrize("content, expected", [
    (None, "no such file"), (b"<!doctype html><html>", "damaged, or not a checkpoint"), (b"", "damaged"),
    ([1, 2], "holds no named tensors"), ({}, "holds no named tensors"),
    ({"net": {"a": torch.ones(1)}}, "holds no named tensors"), (small(), "holds code")])
def test_a_file_that_is_no_checkpoint_is_refused_in_a_line(content, expected, tmp_path):
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(InputError, match=f"^{file}: .*{expected}.*give the file") as caught:
        common.read_published(file)
    assert "\n" not in str(caught.value)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder, the address that serves it, and what was asked."""
    folder, asked = tmp_path / "site", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_):
            asked.append(self.path)

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
    yield types.SimpleNamespace(folder=folder, url=f"http://127.0.0.1:{web.server_port}", asked=asked)
    web.shutdown()
    web.server_close()


def kept():
    return sorted(file.name for file in (common.CACHE / "weights").iterdir())


def test_weights_of_an_address_are_fetched_once_and_kept(site):
    for name in ("a", "b"):
        (site.folder / name).mkdir()
        torch.save(SMALL | {"old": torch.zeros(1 + len(name))}, site.folder / name / "net G.pth")
    for _ in range(2):
        assert filled(f"{site.url}/a/net%20G.pth?download=1")
    assert len(site.asked) == 1 and len(kept()) == 1 and kept()[0].endswith("-net_G.pth")
    assert filled(f"{site.url}/b/net%20G.pth") and len(kept()) == 2           # the same name, another file


@pytest.mark.parametrize("content", [b"<!doctype html><title>Sign in</title>", b"", b"PK\3\4 half of it"])
def test_a_wrong_file_of_an_address_is_refused_and_not_kept(site, content):
    (site.folder / "weights.pth").write_bytes(content)
    url = f"{site.url}/weights.pth"
    with pytest.raises(InputError, match=f"^{url}: damaged, or not.*not kept.*a page") as caught:
        filled(url)
    assert "\n" not in str(caught.value) and kept() == []
    torch.save(SMALL, site.folder / "weights.pth")
    assert filled(url)                                            # the right one is fetched, now it is there


def test_an_address_that_is_not_there_is_a_line(site):
    with pytest.raises(InputError, match="404") as caught:
        filled(f"{site.url}/none.pth")
    assert "\n" not in str(caught.value) and len(site.asked) == 2            # the error, and its log line


# ------------------------------------------------------------------------------------- DFDNet's dictionary

def test_dfdnet_wants_all_files_of_its_dictionary(tmp_path):
    for name in list(dictionary(1))[1:]:
        np.save(tmp_path / name, np.zeros((1, 1)))
    for there in (tmp_path, {name: None for name in list(dictionary(1))[1:]}, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="(1|16) of the 16 files .* the first left_eye_256_center.npy"):
            dfdnet.load_official({}, there)


@pytest.mark.parametrize("array, expected", [
    (np.array([{}, None], object), "not an array"), (np.zeros((2, 13)), "2×13 numbers, not K×12800"),
    (np.zeros((0, 12800)), "0×12800"), (np.zeros(12800), "12800 numbers"), (b"not npy", "not an array")])
def test_dfdnet_refuses_what_is_no_dictionary(array, expected, tmp_path):
    file = tmp_path / "left_eye_32_center.npy"
    if isinstance(array, bytes):
        file.write_bytes(array)
    else:
        np.save(file, array)
    with pytest.raises(InputError, match=f"^{file}: {expected}") as caught:
        dfdnet.official_entries(tmp_path, "left_eye", 4, 512, 5)
    assert "\n" not in str(caught.value)


def test_dfdnet_reads_its_dictionary_row_by_row_and_runs_no_code(tmp_path):
    values = np.arange(2 * 512 * 9, dtype=np.float64).reshape(2, -1)
    np.save(tmp_path / "nose_32_center.npy", values)
    for source in (tmp_path, {"nose_32_center.npy": values}):
        entries = dfdnet.official_entries(source, "nose", 4, 512, 3)
        assert entries.shape == (2, 512, 3, 3) and entries.dtype == torch.float32
        assert entries[1, 7, 2, 1] == values[1, 7 * 9 + 2 * 3 + 1]


def test_dfdnet_takes_a_vgg_of_its_own_file_where_the_weights_have_none(tmp_path):
    state = weights("dfdnet")
    prefix = "VggExtract.model."
    torch.save({name.removeprefix(prefix): value for name, value in state.items()
                if name.startswith(prefix)}, tmp_path / "vgg19.pth")
    own = {name: value for name, value in state.items() if not name.startswith("VggExtract")}
    net = load("dfdnet", own, vgg=tmp_path / "vgg19.pth")
    assert torch.equal(net.encoder.blocks[1][1].weight, state[f"{prefix}features.7.weight"])
    torch.testing.assert_close(net.encoder.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    aliases = own | {name: value for name, value in state.items()
                     if name.startswith(("VggExtract.features", "VggExtract.RGB"))}
    assert torch.equal(load("dfdnet", aliases).encoder.mean, state["VggExtract.RGB_mean"])
    with pytest.raises(InputError, match=r"encoder.* is missing, and 33 more"):
        load("dfdnet", own)


# -------------------------------------------------------------------------------------------- Command line

def test_restoreformer_restores_a_crop_with_the_official_file(tmp_path, monkeypatch, capsys):
    """The file as Lightning writes it: a prefix, the losses' networks, a class of Lightning's as a key."""
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    module = types.ModuleType(callback.__module__)
    module.ModelCheckpoint = callback
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", callback.__module__):
        monkeypatch.setitem(sys.modules, name, module)              # Lightning is there while it is written
    state = weights("restoreformer")
    torch.save({"state_dict": {f"vqvae.{name}": value for name, value in state.items()}
                | {"loss.discriminator.0.weight": torch.zeros(2)}, "epoch": 1,
                "callbacks": {callback: {"best": torch.zeros(1)}}}, tmp_path / "RestoreFormer.ckpt")
    monkeypatch.undo()
    crop = picture("crop", 512)[0]
    common.write_image(tmp_path / "crop.png", crop)
    arguments = ["--restore", tmp_path / "crop.png", "--aligned", "--device", "cpu",
                 "--out", tmp_path / "out", "--weights", tmp_path / "RestoreFormer.ckpt"]
    assert restoreformer.main(list(map(str, arguments))) == 0
    assert "1 restored" in capsys.readouterr().out
    expected = restoreformer.restore(restoreformer.load_official(state),
                                     common.read_image(tmp_path / "crop.png")[None])[0]
    written = common.read_image(tmp_path / "out" / "crop.png")
    assert written.shape == (3, 512, 512) and written.std() > 0.08
    assert common.psnr(written[None], expected[None]) > 45   # merged doublings round anew in bfloat16


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("option", [
    ["--train"], ["--evaluate"], ["--preset", "tiny"], ["--checkpoint", "checkpoint.pt"], ["--size", "256"]])
def test_the_authors_network_is_only_for_restoring(script, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    action = [] if option[0] in ("--train", "--evaluate") else ["--restore", "crop.png"]
    with pytest.raises(InputError, match=f"--weights and {option[0]} do not go together"):
        SCRIPTS[script].main([*action, *option, "--weights", "weights.pth"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, options, expected", [
    ("dfdnet", ["--weights", "w.pth"], "--weights wants --official-dictionary"),
    ("dfdnet", ["--official-dictionary", "d"], "belong to --weights"),
    ("dfdnet", ["--vgg", "vgg19.pth"], "belong to --weights"),
    ("dfdnet", ["--weights", "w.pth", "--official-dictionary", "none"], "none: 16 of the 16 files"),
    ("asffnet", ["--weights", "w.pth"], "w.pth: no such file; give the file that the authors released"),
    ("restoreformer", ["--weights", "w.pth", "--stage", "1"], "--weights and --stage"),
    ("gfrnet", ["--weights", "w.pth"], "GFRNet's authors released none .* --checkpoint")])
def test_weights_that_cannot_be_used_end_in_a_line(script, options, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=expected) as caught:
        (SCRIPTS | {"gfrnet": gfrnet})[script].main(["--restore", "crop.png", "--aligned", *options])
    assert "\n" not in str(caught.value)
