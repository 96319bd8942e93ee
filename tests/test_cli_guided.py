"""The command lines of gfrnet.py and asffnet.py, by subprocess: runs, references, resuming, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import ROOT, SERVER, SETTINGS, flat, free_port, snapshot

import common

SCRIPTS = {    # picture of its own, a variant, another one's name, what trains it in a moment
    "gfrnet": SimpleNamespace(picture="flow.png", variant="no-guide", config="warp_steps=4, width=4"),
    "asffnet": SimpleNamespace(picture="attention.png", variant="no-adain", config="channels=16, width=4")}
TRAIN = ["--size", 64, "--batch", 2, "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(script, *arguments, cwd=folder) → status, stdout, stderr: forked, as in test_cli."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True, cwd=ROOT, env=SETTINGS)
    texts = {name: tmp_path_factory.mktemp("texts") / name for name in ("stdout", "stderr")}

    def run(script, *arguments, cwd):
        job = {"argv": [str(ROOT / f"{script}.py"), *map(str, arguments)], "cwd": str(cwd),
               **{name: str(path) for name, path in texts.items()}}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return SimpleNamespace(status=status, **{name: path.read_text() for name, path in texts.items()})

    yield run
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="module", params=SCRIPTS)
def trained(request, run, face_folder, tmp_path_factory):
    """A folder in which a short training ran, its script, and what it printed."""
    cwd = tmp_path_factory.mktemp(request.param)
    done = run(request.param, "--train", "--data", face_folder, "--steps", 6, *TRAIN, cwd=cwd)
    assert done.status == 0, done.stderr
    return SimpleNamespace(script=request.param, cwd=cwd, run=cwd / "runs" / request.param,
                           stdout=done.stdout, about=SCRIPTS[request.param])


@pytest.fixture
def album(face_folder, tmp_path):
    """photo.png and, in a folder beside it, three other pictures of the same person; all with landmarks."""
    folder = tmp_path / "album"
    folder.mkdir()
    pictures = sorted((face_folder / "person_03").glob("*.png"))
    for place, picture in zip((tmp_path / "photo.png", *(folder / f"{k}.png" for k in range(3))), pictures):
        place.write_bytes(picture.read_bytes())
        place.with_name(f"{place.name}.txt").write_bytes(picture.with_name(f"{picture.name}.txt").read_bytes())
    return folder


def restore(run, trained, *arguments, cwd):
    return run(trained.script, "--restore", cwd / "photo.png", *arguments, "--checkpoint",
               trained.run / "checkpoint.pt", "--device", "cpu", cwd=cwd)


def test_a_training_writes_everything_and_says_so(trained):
    names = {"config.json", "log.csv", "samples.png", "curves.png", "checkpoint.pt", "result.json",
             trained.about.picture}
    assert {file.name for file in trained.run.iterdir()} == names
    for name in names:
        assert name in trained.stdout
    for name in ("samples.png", trained.about.picture):
        assert np.asarray(Image.open(trained.run / name).convert("L")).std() > 5
    result = json.loads((trained.run / "result.json").read_text())
    assert {key: result[key] for key in ("script", "variant", "preset", "size", "steps")} == {
        "script": trained.script, "variant": "full", "preset": "tiny", "size": 64, "steps": 6}
    for task in result["test"].values():
        gain = task["paired_psnr_gain"]
        assert gain["mean"] == pytest.approx(task["restored"]["psnr"] - task["input"]["psnr"], abs=1e-3)
        assert gain["ci95"][0] <= gain["mean"] <= gain["ci95"][1]


def test_evaluate_repeats_the_numbers_of_the_training(trained, run, face_folder):
    path = trained.run / "result.json"
    before = json.loads(path.read_text())["test"]
    done = run(trained.script, "--evaluate", "--data", face_folder, "--device", "cpu", cwd=trained.cwd)
    assert done.status == 0, done.stderr
    after = json.loads(path.read_text())["test"]
    for task in ("x4", "x8"):
        for name in ("input", "restored"):
            assert after[task][name] == pytest.approx(before[task][name], rel=1e-4)


def test_a_variant_has_its_own_folder_and_help_lists_it(trained, run, face_folder, tmp_path):
    variant = trained.about.variant
    done = run(trained.script, "--train", "--data", face_folder, "--steps", 1, "--variant", variant, *TRAIN,
               cwd=tmp_path)
    assert done.status == 0, done.stderr
    folder = tmp_path / "runs" / f"{trained.script}-{variant}"
    assert json.loads((folder / "config.json").read_text())["variant"] == variant
    text = run(trained.script, "--help", cwd=tmp_path).stdout
    assert variant in text and "--reference" in text and "paper" in text
    if variant == "no-guide":                                               # which needs no reference either
        (tmp_path / "photo.png").write_bytes((face_folder / "person_03" / "shot_0.png").read_bytes())
        done = run(trained.script, "--restore", "photo.png", "--aligned", "--variant", variant, cwd=tmp_path)
        assert done.status == 0 and (tmp_path / "restored" / "photo.png").is_file(), done.stderr


def test_restore_with_a_reference_says_which_picture_guides(trained, run, album, tmp_path):
    done = restore(run, trained, "--reference", album, "--check", cwd=tmp_path)
    assert done.status == 0, done.stderr
    assert re.search(r"guided? ?b?y?:? .*album/[012]\.png", done.stdout)
    small = torch.nn.functional.interpolate(common.read_image(tmp_path / "restored" / "photo.png")[None],
                                            (64, 64), mode="area")[0]
    assert (small - common.read_image(tmp_path / "photo.png")).abs().mean() < 0.2
    assert (tmp_path / "restored" / "photo_check.png").is_file()
    before = snapshot(tmp_path / "restored")
    again = restore(run, trained, "--reference", album / "1.png", cwd=tmp_path)
    assert again.status == 0 and snapshot(tmp_path / "restored") == before and "1 skipped" in again.stdout
    again = restore(run, trained, "--reference", album / "1.png", "--overwrite", cwd=tmp_path)
    assert again.status == 0 and "album/1.png" in again.stdout and "1 restored" in again.stdout


def test_a_bad_picture_among_the_references_is_named_and_left_out(trained, run, album, tmp_path):
    (album / "0.png").write_text("no picture")
    done = restore(run, trained, "--reference", album, cwd=tmp_path)
    assert done.status == 0 and len(done.stderr.splitlines()) == 1
    assert re.match("left out: .*0.png", done.stderr)


def test_gfrnet_takes_the_most_frontal_reference(run, trained, face_folder, tmp_path):
    if trained.script != "gfrnet":
        pytest.skip("asffnet chooses by the photo")
    import gfrnet
    folder = face_folder / "person_05"
    files = sorted(folder.glob("*.png"))
    scores = [gfrnet.guide_score(common.read_landmarks(f"{file}.txt")[None]).item() for file in files]
    (tmp_path / "photo.png").write_bytes(files[0].read_bytes())
    (tmp_path / "photo.png.txt").write_text((folder / "shot_0.png.txt").read_text())
    done = restore(run, trained, "--reference", folder, cwd=tmp_path)
    assert f"guide: {files[int(np.argmin(scores))]}" in done.stdout, done.stderr


def bad_input(trained, work, album):
    """What goes wrong: arguments, and words of the message."""
    ready = ["--restore", work / "photo.png", "--checkpoint", work / "checkpoint.pt"]
    (work / "flat").mkdir()
    (work / "bare").mkdir()
    for k in range(4):
        (work / "flat" / f"{k}.png").write_bytes((album / "0.png").read_bytes())
        (work / "flat" / f"{k}.png.txt").write_bytes((album / "0.png.txt").read_bytes())
    (work / "bare" / "0.png").write_bytes((album / "0.png").read_bytes())
    state = common.load_weights(work / "checkpoint.pt")
    torch.save(state | {"script": "dfdnet"}, work / "other.pt")
    (work / "half.pt").write_bytes((work / "checkpoint.pt").read_bytes()[:20_000])
    odd = "96" if trained.script == "gfrnet" else "70"
    return [
        (ready, "--reference: a"), ([*ready, "--reference", work / "nobody"], "nobody.*no such file"),
        ([*ready, "--reference", work / "runs"], "runs.*no such file or folder"),
        ([*ready, "--reference", work / "bare"], "bare.*landmarks are unknown"),
        (["--restore", work / "nobody.png", "--checkpoint", work / "checkpoint.pt", "--reference", album],
         "nobody.png.*no such file"),
        (["--train", "--data", work / "flat", *TRAIN], "no person has two pictures"),
        (["--train", "--data", work / "nowhere"], "nowhere.*no such folder"),
        ([*ready[:2], "--reference", album, "--checkpoint", work / "none.pt"], "none.pt.*no such check"),
        ([*ready[:2], "--reference", album, "--checkpoint", work / "other.pt"], "other.pt.*dfdnet"),
        ([*ready[:2], "--reference", album, "--checkpoint", work / "half.pt"], "half.pt.*damaged"),
        ([*ready, "--reference", album, "--preset", "paper"], "preset tiny.*paper"),
        (["--train", "--resume", "--variant", trained.about.variant, "--out", work], "--variant full"),
        (["--train", "--resume", "--batch", 3, "--out", work], "--batch cannot change"),
        (["--train", "--size", odd], f"--size {odd}"), (["--train", "--size", 32], "at least 64"),
        (["--train", "--steps", 0], "--steps"), (["--train", "--variant", "k17"], "k17"),
        (["--restore", work / "photo.png", "--train"], "not allowed"), ([], "--train")]


def test_bad_input_ends_with_one_line_status_2_and_nothing_lost(trained, run, album, tmp_path):
    for name in ("checkpoint.pt", "result.json"):
        (tmp_path / name).write_bytes((trained.run / name).read_bytes())
    cases = bad_input(trained, tmp_path, album)
    before = snapshot(tmp_path)
    for arguments, expected in cases:
        done = run(trained.script, *arguments, cwd=tmp_path)
        assert done.status == 2, (arguments, done)
        *warnings, line = done.stderr.splitlines()
        assert all(warning.startswith("left out: ") for warning in warnings), done.stderr
        assert line.startswith(f"{trained.script}.py: ") and re.search(expected, line), (arguments, line)
        after = snapshot(tmp_path)
        assert {name: after.get(name) for name in before} == before


def test_asffnet_wants_landmarks_of_aligned_crops_too_and_no_ablation_of_the_released_network(
        trained, run, album, tmp_path):
    if trained.script != "asffnet":
        pytest.skip("gfrnet restores without landmarks")
    (tmp_path / "photo.png.txt").unlink()
    done = restore(run, trained, "--reference", album, "--aligned", cwd=tmp_path)
    assert done.status == 2 and re.search("photo.png: its landmarks are unknown", done.stderr)
    assert "--aligned" not in done.stderr                                   # which was given, and is no help
    done = run("asffnet", "--train", "--preset", "released", "--variant", "no-mls", cwd=tmp_path)
    assert done.status == 2 and len(done.stderr.splitlines()) == 1 and "--variant" in done.stderr


SHORT = """
import sys, common, {script} as script
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
data, out = sys.argv[1], Path(sys.argv[2])
cfg = replace(script.TINY, size=64, steps=12, batch=2, validate_every=4, {config})
script.train(cfg, SimpleNamespace(data=data, out=out, checkpoint=out / "checkpoint.pt", resume=False,
                                  device="cpu", workers=0, landmarks=None, aligned=False, vggface=None))
"""


def test_a_killed_and_resumed_run_equals_an_unbroken_one_bit_for_bit(trained, run, face_folder, tmp_path):
    """SHORT checkpoints every 4 steps, which no option of the command line can ask for."""
    code = SHORT.format(script=trained.script, config=trained.about.config)

    def short(name):
        return subprocess.Popen([sys.executable, "-c", code, str(face_folder), str(tmp_path / name)],
                                cwd=tmp_path, env=SETTINGS, stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE, text=True)

    killed, checkpoint = short("killed"), tmp_path / "killed" / "checkpoint.pt"
    until = time.monotonic() + 120
    while not checkpoint.is_file():
        assert killed.poll() is None and time.monotonic() < until, killed.stderr.read()
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert common.load_weights(checkpoint)["step"] in (4, 8)
    unbroken = short("unbroken")
    assert unbroken.communicate(timeout=200) and unbroken.returncode == 0
    done = run(trained.script, "--train", "--resume", "--data", face_folder, "--out", tmp_path / "killed",
               "--device", "cpu", cwd=tmp_path)
    assert done.status == 0, done.stderr
    one, two = (dict(flat(common.load_weights(tmp_path / name / "checkpoint.pt")))
                for name in ("killed", "unbroken"))
    assert one["/step"] == two["/step"] == 12 and one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]) if torch.is_tensor(value) else value == two[key], key


def test_torchrun_trains_on_two_processes_and_only_the_first_one_writes(trained, face_folder, tmp_path):
    """Four steps, for WarpNet's own ones, the end-to-end ones and one of the landmark weights."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
               str(free_port()), str(ROOT / f"{trained.script}.py"), "--train", "--data", str(face_folder),
               "--steps", "4", *map(str, TRAIN), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=SETTINGS, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 4: validation") == 1 and done.stdout.count("result.json") == 1
    state = common.load_weights(tmp_path / "checkpoint.pt")
    assert state["step"] == 4 and not [name for name in state["net"] if name.startswith("module.")]
