"""The authors' weights: every official name and shape, the official numbers, and files that do not fit.

`official.json` lists the tensors of the four official files, and what the official networks make of the
weights and pictures that official.py computes. Those values were written by the networks here, after the
same networks, filled with other weights, had been found to equal the official code's output to 1e-4 in
float32.
"""

import functools
import http.server
import sys
import threading
import types

import numpy as np
import pytest
import torch
from conftest import refused
from official import OFFICIAL, dictionary, inputs, picture, tensors, unused, weights
from torch import nn

import asffnet
import common
import dfdnet
import dmdnet
import gfrnet
import restoreformer
from common import InputError

SCRIPTS = {"asffnet": asffnet, "dfdnet": dfdnet, "dmdnet": dmdnet, "restoreformer": restoreformer}
TENSORS = {"asffnet": 599, "dfdnet": 386, "dmdnet": 1014, "restoreformer": 405}


@torch.inference_mode()
def outputs(script, net, device="cpu", precision="float32", batch=1):
    """What the network makes of the pictures, {case: (batch,3,size,size)}: below 512, for speed."""
    size = 128 if script in ("restoreformer", "asffnet") else 256
    results = {}
    for case, given in inputs(script, size).items():
        given = [x.expand(batch, *x.shape[1:]).to(device) for x in given]
        with common.autocast(device, precision):
            results[case] = net(*given).float().cpu()
    return results


def made_ready(script, net, device, precision):
    """The network as --restore uses it."""
    ready = getattr(SCRIPTS[script], "for_restoration", common.for_inference)
    return ready(net, torch.device(device), precision)


def at_some_places(image):
    """(1,3,h,w) → the values of 24 pixels, of all channels."""
    places = torch.arange(24) * 7919 % image[0, 0].numel()
    return image.flatten(2)[0, :, places].flatten()


def load(script, state, **options):
    if script == "dfdnet":
        options.setdefault("dictionary", dictionary())
    return SCRIPTS[script].load_official(state, **options)


# Numbers and names


@functools.lru_cache(1)
def state_of(script):
    return weights(script)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_official_numbers_come_out_of_the_official_tensors_and_what_does_not_fit_is_named(script):
    """Also once the network is made ready to restore, in float32 and then in bfloat16."""
    state = state_of(script)
    assert {name: tuple(value.shape) for name, value in state.items()} == tensors(script)
    assert len(state) == TENSORS[script]
    net = load(script, state)
    for part in [net, net.encoder] if script == "dfdnet" else [net]:
        assert not part.training and not any(p.requires_grad for p in part.parameters())
    assert not any(".parametrizations." in name for name in net.state_dict())
    results = outputs(script, net)
    assert set(results) == set(OFFICIAL[script]["values"])
    for case, result in results.items():
        expected = torch.tensor(OFFICIAL[script]["values"][case])
        assert expected.numel() == 72 and expected.std() > 0.1
        torch.testing.assert_close(at_some_places(result), expected, atol=1e-4, rtol=0)

    # In bfloat16 RestoreFormer chooses other codes, so there its picture is another one.
    for precision in ("float32",) if script == "restoreformer" else ("float32", "bfloat16"):
        net = made_ready(script, net, "cpu", precision)
        for case, restored in outputs(script, net, precision=precision).items():
            if precision == "float32":
                torch.testing.assert_close(restored, results[case], atol=2e-5, rtol=0)
            assert common.psnr(restored, results[case]) > 40

    used = [name for name in state if not (script == "dfdnet" and unused(name))]
    first, second = [name for name in used if not name.startswith("VggExtract")][:2]
    changed = {name: value for name, value in state.items() if name != first}
    changed[second] = state[second].flatten()[:3]
    changed["net.0.weight"] = torch.zeros(2)
    with refused("^the state dict: not .*'s weights .* and 2 more") as error:
        load(script, changed)
    assert f"({second} is 3, not " in str(error.value)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "auto"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gpu_paints_what_the_processor_paints_a_face_or_a_batch_at_a_time(script, precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected = outputs(script, load(script, state_of(script)))
    net = made_ready(script, load(script, state_of(script)).to("cuda"), "cuda", precision)
    for batch in (1, 16):
        for case, restored in outputs(script, net, "cuda", precision, batch).items():
            assert restored.shape == (batch, *expected[case].shape[1:])
            if precision == "float32":
                torch.testing.assert_close(restored, expected[case].expand_as(restored), atol=1e-3, rtol=0)
            assert common.psnr(restored, expected[case].expand_as(restored)).min() > 40


# What load_named and read_published do


SMALL = {"conv.weight": torch.ones(4, 3, 1, 1), "conv.bias": torch.arange(4.0), "line": torch.eye(2),
         "old": torch.zeros(9)}
SMALL_NAMES = [(r"conv\.(.+)", r"0.\1"), ("line|again", "1.weight"), ("old", None)]


def filled(source):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(2, 2, bias=False)).train()
    net = common.load_named(net, source, SMALL_NAMES, "the small net")
    tensors = net.state_dict()
    same = [torch.equal(tensors[here], SMALL[there]) for here, there in
            (("0.weight", "conv.weight"), ("0.bias", "conv.bias"), ("1.weight", "line"))]
    return all(same) and not net.training and not any(p.requires_grad for p in net.parameters())


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
    with refused(expected):
        filled(state)


@pytest.mark.parametrize("content, expected", [
    (None, "no such file"), (b"<!doctype html><html>", "damaged, or not a checkpoint"), (b"", "damaged"),
    (nn.Linear(1, 1), "holds code"), (torch.ones(3), "holds no named tensors"),
    ({"net": {"a": torch.ones(1)}}, "holds no named tensors"), ({}, "holds no named tensors")])
def test_a_file_that_is_no_checkpoint_is_refused_in_a_line(content, expected, tmp_path):
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with refused(f"^{file}: .*{expected}.*give the file .*the small net"):
        filled(file)


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
    monkeypatch.setattr(common, "_CACHE", tmp_path / "cache")
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
    yield types.SimpleNamespace(folder=folder, url=f"http://127.0.0.1:{web.server_port}", asked=asked)
    web.shutdown()
    web.server_close()


def kept():
    return sorted(file.name for file in (common._CACHE / "weights").iterdir())


def test_weights_of_an_address_are_fetched_once_and_kept(site):
    for name in ("a", "b"):
        (site.folder / name).mkdir()
        torch.save(SMALL | {"old": torch.zeros(1 + len(name))}, site.folder / name / "net G.pth")
    for _ in range(2):
        assert filled(f"{site.url}/a/net%20G.pth?download=1")
    assert len(site.asked) == 1 and len(kept()) == 1 and kept()[0].endswith("-net_G.pth")
    assert filled(f"{site.url}/b/net%20G.pth") and len(kept()) == 2  # the same name, another file


@pytest.mark.parametrize("content", [b"<!doctype html><title>Sign in</title>", b"", b"PK\3\4 half of it"])
def test_a_wrong_file_of_an_address_is_refused_and_not_kept(site, content):
    (site.folder / "weights.pth").write_bytes(content)
    url = f"{site.url}/weights.pth"
    with refused(f"^{url}: damaged, or not.*not kept.*a page"):
        filled(url)
    assert kept() == []
    torch.save(SMALL, site.folder / "weights.pth")
    assert filled(url)  # the right one is fetched, now it is there


# DFDNet's dictionary


def test_dfdnet_wants_all_files_of_its_dictionary(tmp_path):
    names = list(dictionary(1))
    for name in names[1:]:
        np.save(tmp_path / name, np.zeros((1, 1)))
    for there in (tmp_path, {name: None for name in names[1:]}, tmp_path / "nowhere"):
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
    with refused(f"^{file}: {expected}"):
        dfdnet.official_entries(tmp_path, file.name, 512, 5)


def test_dfdnet_reads_its_dictionary_row_by_row(tmp_path):
    values = np.arange(2 * 512 * 9, dtype=np.float64).reshape(2, -1)
    np.save(tmp_path / "nose_32_center.npy", values)
    for source in (tmp_path, {"nose_32_center.npy": values}):
        entries = dfdnet.official_entries(source, "nose_32_center.npy", 512, 3)
        assert entries.shape == (2, 512, 3, 3) and entries.dtype == torch.float32
        assert entries[1, 7, 2, 1] == values[1, 7 * 9 + 2 * 3 + 1]


@pytest.mark.slow
def test_dfdnet_takes_its_vgg_under_either_of_its_names(tmp_path):
    state = state_of("dfdnet")
    own = {name: value for name, value in state.items() if not name.startswith("VggExtract")}
    few = dictionary(1)
    aliases = own | {name: value for name, value in state.items()
                     if name.startswith(("VggExtract.features", "VggExtract.RGB"))}
    net = load("dfdnet", aliases, dictionary=few)
    assert torch.equal(net.encoder.blocks[1][1].weight,
                       state["VggExtract.model.features.7.weight"])
    assert torch.equal(net.encoder.mean, state["VggExtract.RGB_mean"])
    with pytest.raises(InputError, match=r"encoder.* is missing, and 33 more"):
        load("dfdnet", own, dictionary=few)


# Command line


@pytest.mark.slow
def test_restoreformer_restores_a_crop_with_the_official_file(tmp_path, monkeypatch, capsys):
    """The file as Lightning writes it: a prefix, the losses' networks, a class of Lightning's as a key."""
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    module = types.ModuleType(callback.__module__)
    module.ModelCheckpoint = callback
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", callback.__module__):
        monkeypatch.setitem(sys.modules, name, module)  # Lightning is there while it is written
    state = state_of("restoreformer")
    named = {f"vqvae.{name}": value for name, value in state.items()}
    torch.save({"state_dict": named | {"loss.discriminator.0.weight": torch.zeros(2)}, "epoch": 1,
                "callbacks": {callback: {"best": torch.zeros(1)}}}, tmp_path / "RestoreFormer.ckpt")
    monkeypatch.undo()
    restore, restored = restoreformer.restore, []

    def spied(*args, **options):
        restored.append(restore(*args, **options))
        return restored[-1]

    monkeypatch.setattr(restoreformer, "restore", spied)
    common.write_image(tmp_path / "crop.png", picture("crop", 512)[0])
    arguments = ["--restore", tmp_path / "crop.png", "--aligned", "--device", "cpu",
                 "--out", tmp_path / "out", "--weights", tmp_path / "RestoreFormer.ckpt"]
    assert restoreformer.main(list(map(str, arguments))) == 0
    assert "1 restored" in capsys.readouterr().out
    written = common.read_image(tmp_path / "out" / "crop.png")
    assert written.shape == (3, 512, 512) and written.std() > 0.08
    assert common.psnr(written[None], restored[0]) > 45  # 8 bits


@pytest.mark.parametrize("option", [
    ["--train"], ["--preset", "tiny"], ["--checkpoint", "checkpoint.pt"], ["--size", "256"]])
def test_the_authors_network_is_not_for_training(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    action = [] if option[0] == "--train" else ["--restore", "crop.png"]
    for script in SCRIPTS.values():
        with pytest.raises(InputError, match=f"--weights and {option[0]} do not go together"):
            script.main([*action, *option, "--weights", "weights.pth"])
    assert not list(tmp_path.iterdir())


RESTORE = ["--restore", "crop.png", "--aligned"]


@pytest.mark.parametrize("script, command, expected", [
    (dfdnet, [*RESTORE, "--weights", "w.pth"], "--weights wants --official-dictionary"),
    (dfdnet, [*RESTORE, "--weights", "w.pth", "--official-dictionary", "d"], "d: 16 of the 16 files"),
    (dfdnet, ["--train", "--official-dictionary", "d"], "belongs to --weights"),
    (asffnet, [*RESTORE, "--weights", "w.pth"], "w.pth: no such file; give the file that the authors rel"),
    (restoreformer, [*RESTORE, "--weights", "w.pth", "--stage", "1"], "--stage"),
    (gfrnet, [*RESTORE, "--weights", "w.pth"], "GFRNet's authors released none .* --checkpoint")])
def test_weights_that_cannot_be_used_end_in_a_line(script, command, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused(expected):
        script.main(command)
