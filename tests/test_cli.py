"""The scripts' command lines, by subprocess: a run and its files, restoring, resuming, all bad input."""

import csv
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
TRAIN = ["--train", "--size", 64, "--batch", 2, "--device", "cpu"]

# Of each script: what only its runs write; what --restore wants as --reference, of the folder `album`; a
# variant that trains fast, what this changes in Config, and another one; a size that the networks cannot
# have; changes of Config with which a few steps are cheap and still reach every part of the training.
SCRIPTS = {
    "dfdnet": SimpleNamespace(
        files={"dictionary.pt", "dictionary.png"}, reference=None, variant="k16",
        changes={"entries": 16}, other="0dft", options=["no-cadain", "no-confidence", "k512"],
        size=(70, "multiple of 16"), short="entries=8"),
    "gfrnet": SimpleNamespace(
        files={"flow.png"}, reference="4.png", variant="no-guide", changes={"guided": False},
        other="random-guide", options=["no-flow-loss", "no-warp-2x", "--reference"],
        size=(96, "power of two"), short="warp_steps=2, width=4"),
    "asffnet": SimpleNamespace(
        files={"attention.png"}, reference=".", variant="1-asff", changes={"blocks": 1},
        other="no-mls", options=["exemplars-10", "no-adain", "--reference"], size=(70, "multiple of 16"),
        short="channels=16, width=4"),
    "dmdnet": SimpleNamespace(
        files={"readings.png"}, reference=".", variant="only-specific", changes={"items": 0},
        other="1-transform", options=["items-256", "no-transform", "--reference", "--save-dictionary"],
        size=(70, "multiple of 16"), short="items=8, width=8, stages=(0.34, 0.25, 0.25)"),
    "restoreformer": SimpleNamespace(
        files={"dictionary.pt", "reconstructions.png", "attention.png"}, reference=None, variant="exp4",
        changes={"fusion": "sft"}, other="exp1", options=["exp5", "recognition-dictionary", "--stage"],
        size=(70, "multiple of 16"), short="codes=16, widths=(8, 8, 16, 16), dictionary_steps=8")}
GUIDED = [name for name, about in SCRIPTS.items() if about.reference]


def only(*scripts):
    """For these scripts only: the rest is the same code, in common.py."""
    return pytest.mark.parametrize("trained", scripts, indirect=True)


# Importing torch takes longer than most commands do. One process imports it and forks a child for every
# command, which runs the script as a program of its own: own arguments, folder, output and exit status. It
# ends by os._exit, as tearing the copied interpreter down takes a second more.
SERVER = """
import json, os, runpy, sys, traceback
import matplotlib.pyplot, torch, torchvision, common
while line := sys.stdin.readline():
    job = json.loads(line)
    if (child := os.fork()) == 0:
        for number, name in enumerate((os.devnull, job["stdout"], job["stderr"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(job["cwd"])
        sys.argv = job["argv"]
        status = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(script, *arguments, cwd=folder) → status, stdout, stderr. script: a name or a path."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, env=SETTINGS, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    texts = {name: tmp_path_factory.mktemp("texts") / name for name in ("stdout", "stderr")}

    def run(script, *arguments, cwd):
        job = {"argv": program(script, *arguments), "cwd": str(cwd),
               **{name: str(path) for name, path in texts.items()}}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return SimpleNamespace(status=status, **{name: path.read_text() for name, path in texts.items()})

    yield run
    server.stdin.close()
    server.wait()


def program(script, *arguments):
    return [str(ROOT / f"{script}.py") if script in SCRIPTS else str(script), *map(str, arguments)]


def start(script, *arguments, cwd):
    """The script as a process of its own."""
    return subprocess.Popen([sys.executable, *program(script, *arguments)], cwd=cwd, env=SETTINGS,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def snapshot(folder):
    """Every file of a folder with its bytes and its time."""
    return {str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
            for file in sorted(Path(folder).rglob("*")) if file.is_file()}


def copy_pictures(pictures, folder):
    """Pictures with their sidecar landmarks → 0.png, 1.png … in a new folder."""
    folder.mkdir()
    for number, picture in enumerate(pictures):
        shutil.copy(picture, folder / f"{number}.png")
        shutil.copy(f"{picture}.txt", folder / f"{number}.png.txt")
    return folder


@pytest.fixture(scope="module")
def album(face_folder, tmp_path_factory):
    """Five pictures of a person, with landmarks; read only."""
    return copy_pictures(sorted((face_folder / "person_03").glob("*.png")),
                         tmp_path_factory.mktemp("work") / "album")


@pytest.fixture(scope="module")
def train(run, face_folder, album, tmp_path_factory):
    """train(script, variant) → a folder in which a short training ran, once, and what it printed."""

    @functools.cache
    def train(script, variant="full"):
        cwd, about = tmp_path_factory.mktemp(script), SCRIPTS[script]
        name, steps = (script, 6) if variant == "full" else (f"{script}-{variant}", 1)
        done = run(script, *TRAIN, "--data", face_folder, "--steps", steps, "--variant", variant,
                   cwd=cwd)
        assert done.status == 0, done.stderr
        reference = ["--reference", album / about.reference] if about.reference else []
        return SimpleNamespace(script=script, about=about, cwd=cwd, run=cwd / "runs" / name,
                               reference=reference, stdout=done.stdout, stderr=done.stderr)

    return train


@pytest.fixture(params=SCRIPTS)
def trained(request, train):
    """A trained script; each script in turn."""
    return train(request.param)


@pytest.fixture
def photos(face_folder, tmp_path):
    """Three pictures with sidecar landmarks, in a folder of their own."""
    return copy_pictures(sorted((face_folder / "person_03").glob("*.png"))[:3], tmp_path / "photos")


def restore(run, trained, photo, *arguments, cwd):
    """`--restore photo`, with the script's reference where the arguments have none."""
    reference = [] if "--reference" in arguments else trained.reference
    return run(trained.script, "--restore", photo, *arguments, *reference, "--checkpoint",
               trained.run / "checkpoint.pt", "--device", "cpu", cwd=cwd)


def assert_refused(done, script, expected):
    """Status 2 and one line on stderr, behind those of what was left out."""
    assert done.status == 2, done
    *warnings, line = done.stderr.splitlines()
    assert all(warning.startswith("left out: ") for warning in warnings), done.stderr
    assert line.startswith(f"{script}.py: ") and re.search(expected, line), done.stderr


# A run and its folder


def test_a_training_writes_everything_into_its_folder(trained):
    names = {"config.json", "log.csv", "samples.png", "curves.png", "checkpoint.pt", "result.json",
             *trained.about.files}
    assert {file.name for file in trained.run.iterdir()} == names          # nor temporary files
    config = json.loads((trained.run / "config.json").read_text())
    assert {key: config[key] for key in ("preset", "variant", "size", "steps", "batch", "seed")} == {
        "preset": "tiny", "variant": "full", "size": 64, "steps": 6, "batch": 2, "seed": 0}
    rows = list(csv.DictReader((trained.run / "log.csv").open()))
    assert rows[-1]["step"] == "6" and float(rows[-1]["validation"]) > 0
    for name in names:
        assert name in trained.stdout
        if name.endswith(".png"):
            assert np.asarray(Image.open(trained.run / name).convert("L")).std() > 5


def check_result(trained):
    result = json.loads((trained.run / "result.json").read_text())
    assert {key: result[key] for key in ("script", "variant", "preset", "size", "steps")} == {
        "script": trained.script, "variant": "full", "preset": "tiny", "size": 64, "steps": 6}
    assert Path(result["data"]).is_dir() and result["seconds"] >= 0
    assert set(result["test"]) == {"x4", "x8"}
    for task in result["test"].values():
        assert task["faces"] == 10
        for name in ("input", "restored"):
            values = task[name]
            assert 5 < values["psnr"] < 60 and 0 < values["ssim"] < 1 and 0 < values["identity"] < 180
        gain = task["paired_psnr_gain"]
        assert gain["ci95"][0] <= gain["mean"] <= gain["ci95"][1]
        assert gain["mean"] == pytest.approx(task["restored"]["psnr"] - task["input"]["psnr"], abs=1e-3)
    assert result["test"]["x4"]["input"]["psnr"] > result["test"]["x8"]["input"]["psnr"]
    return result["test"]


def test_result_json_has_the_agreed_keys(trained):
    check_result(trained)


def test_output_away_from_a_terminal_has_no_control_codes_and_names_the_figures(trained):
    for text in (trained.stdout, trained.stderr):
        assert "\r" not in text and "\x1b" not in text
    for word in ("step 6", "PSNR", "x4", "x8"):
        assert word in trained.stdout
    assert "Traceback" not in trained.stderr


def test_evaluate_repeats_the_numbers_of_the_training(trained, run, face_folder):
    before = check_result(trained)
    (trained.run / "result.json").unlink()
    done = run(trained.script, "--evaluate", "--data", face_folder, "--device", "cpu", cwd=trained.cwd)
    assert done.status == 0, done.stderr
    after = check_result(trained)
    for task in ("x4", "x8"):
        for name in ("input", "restored"):
            assert after[task][name] == pytest.approx(before[task][name], rel=1e-4)
    assert "x4" in done.stdout and "\x1b" not in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_variant_has_its_own_folder(script, train):
    about = SCRIPTS[script]
    trained = train(script, about.variant)
    assert [folder.name for folder in (trained.cwd / "runs").iterdir()] == [f"{script}-{about.variant}"]
    config = json.loads((trained.run / "config.json").read_text())
    assert {key: config[key] for key in ("variant", *about.changes)} == {
        "variant": about.variant, **about.changes}
    assert json.loads((trained.run / "result.json").read_text())["variant"] == about.variant


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_the_variants_and_presets(script, run, tmp_path):
    about, done = SCRIPTS[script], run(script, "--help", cwd=tmp_path)
    assert done.status == 0
    for word in (about.variant, about.other, *about.options, "tiny", "paper", "--restore", "--resume",
                 "--landmarks", "--workers"):
        assert word in done.stdout
    assert ("--reference" in done.stdout) == (script in GUIDED)


# Restoring


def test_restore_writes_a_photo_with_sidecar_landmarks(trained, run, photos, tmp_path):
    done = restore(run, trained, photos / "0.png", cwd=tmp_path)
    assert done.status == 0, done.stderr
    restored = common.read_image(tmp_path / "restored" / "0.png")
    photo, *others = (common.read_image(photos / f"{number}.png") for number in range(3))
    assert restored.shape[1] == restored.shape[2] >= 64
    small = torch.nn.functional.interpolate(restored[None], (64, 64), mode="area")[0]
    off = [(small - picture).abs().mean() for picture in (photo, *others)]
    assert off[0] < 0.3 and off[0] == min(off)                        # this picture, not another or nothing
    assert [file.name for file in (tmp_path / "restored").iterdir()] == ["0.png"]


@only("dfdnet")
def test_restore_takes_landmarks_from_a_parallel_folder(trained, run, photos, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    (photos / "0.png.txt").rename(marks / "0.png.txt")
    done = restore(run, trained, photos / "0.png", "--landmarks", marks, "--out", "there", cwd=tmp_path)
    assert done.status == 0, done.stderr
    assert (tmp_path / "there" / "0.png").is_file()


@only("dfdnet")
def test_restore_of_an_aligned_crop_of_another_size(trained, run, photos, tmp_path):
    wide = tmp_path / "wide.jpg"
    Image.open(photos / "1.png").resize((150, 110)).save(wide)
    done = restore(run, trained, wide, "--aligned", "--check", cwd=tmp_path)
    assert done.status == 0, done.stderr
    restored = common.read_image(tmp_path / "restored" / "wide.png")
    assert restored.shape == (3, 110, 150)
    original = common.read_image(wide)
    assert (restored - original).abs().mean() < 0.2
    assert (restored - original)[:, :, :18].abs().max() < 0.02  # beside it: the picture itself
    assert common.read_image(tmp_path / "restored" / "wide_check.png").shape[1] == 64


@only("dfdnet", "gfrnet")
def test_restore_of_a_square_aligned_crop_has_the_size_of_the_network(trained, run, photos, tmp_path):
    square = tmp_path / "square.png"
    Image.open(photos / "1.png").resize((96, 96)).save(square)
    done = restore(run, trained, square, "--aligned", cwd=tmp_path)
    assert done.status == 0, done.stderr
    assert common.read_image(tmp_path / "restored" / "square.png").shape == (3, 64, 64)


def test_check_draws_the_landmarks_and_boxes(trained, run, photos, tmp_path):
    done = restore(run, trained, photos / "0.png", "--check", cwd=tmp_path)
    assert done.status == 0, done.stderr
    drawn = common.read_image(tmp_path / "restored" / "0_check.png")
    lime, yellow = torch.tensor([-1.0, 1, -1]), torch.tensor([1.0, 1, -1])
    for colour in (lime, yellow):
        assert ((drawn - colour[:, None, None]).abs().amax(0) < 0.1).sum() > 10


def test_a_folder_with_a_bad_file_restores_the_others_and_says_so(trained, run, photos, tmp_path):
    (photos / "1.png").write_text("this is no picture")
    done = restore(run, trained, photos, cwd=tmp_path)
    assert done.status == 1
    assert sorted(file.name for file in (tmp_path / "restored").iterdir()) == ["0.png", "2.png"]
    assert len(done.stderr.splitlines()) == 1 and "1.png" in done.stderr
    assert "2 restored" in done.stdout and "1 failed" in done.stdout


def test_results_that_exist_are_skipped_unless_overwritten(trained, run, photos, tmp_path):
    """The first of three is there; then all are; then all are restored again."""
    out = tmp_path / "restored"
    out.mkdir()
    (out / "0.png").write_text("mine")
    states = [snapshot(out)]
    for options, restored in (([], 2), ([], 0), (["--overwrite"], 3)):
        done = restore(run, trained, photos, *options, cwd=tmp_path)
        assert done.status == 0 and f"{restored} restored, {3 - restored} skipped" in done.stdout, done
        states.append(snapshot(out))
    first, second, third, last = states
    assert second["0.png"] == first["0.png"] and second == third
    assert all(last[name][1] > third[name][1] for name in ("0.png", "1.png", "2.png"))
    assert last["1.png"][0] == third["1.png"][0]  # the same input gives the same picture
    assert common.read_image(out / "0.png").shape[0] == 3


# The sharp pictures that guide


@only("gfrnet", "asffnet")
def test_a_guided_restoration_wants_a_reference(trained, run, photos, tmp_path):
    done = run(trained.script, "--restore", photos / "0.png", "--checkpoint",
               trained.run / "checkpoint.pt", "--device", "cpu", cwd=tmp_path)
    assert_refused(done, trained.script, "--reference")
    assert not (tmp_path / "restored").exists()


def test_gfrnet_without_guide_wants_no_reference(train, run, photos, tmp_path):
    trained = train("gfrnet", "no-guide")
    done = run("gfrnet", "--restore", photos / "0.png", "--checkpoint", trained.run / "checkpoint.pt",
               "--device", "cpu", cwd=tmp_path)
    assert done.status == 0, done.stderr
    assert (tmp_path / "restored" / "0.png").is_file() and "guide:" not in done.stdout


@only(*GUIDED)
def test_a_reference_is_one_picture_or_a_folder_and_the_result_depends_on_it(trained, run, album, photos,
                                                                             tmp_path):
    pictures = []
    for number in (3, 4):
        done = restore(run, trained, photos / "0.png", "--reference", album / f"{number}.png",
                       "--overwrite", cwd=tmp_path)
        assert done.status == 0 and f"{number}.png" in done.stdout, done.stderr
        pictures.append(common.read_image(tmp_path / "restored" / "0.png"))
    assert not torch.equal(*pictures)
    done = restore(run, trained, photos / "0.png", "--reference", album, "--overwrite", cwd=tmp_path)
    assert done.status == 0 and re.search(r"guide.*album/\d.png", done.stdout), done.stderr


@only(*GUIDED)
def test_a_bad_file_among_the_references_is_named_and_left_out(trained, run, album, photos, tmp_path):
    folder = copy_pictures([album / "3.png", album / "4.png"], tmp_path / "references")
    (folder / "0.png").write_text("this is no picture")
    done = restore(run, trained, photos / "0.png", "--reference", folder, cwd=tmp_path)
    assert done.status == 0 and (tmp_path / "restored" / "0.png").is_file()
    line, = done.stderr.splitlines()
    assert re.match("left out: .*references/0.png", line) and "references/1.png" in done.stdout


@only("gfrnet")
def test_gfrnet_takes_the_most_frontal_reference_and_says_which(trained, run, album, photos, tmp_path):
    """Average landmarks, nose and eyes moved: 1.png is frontal but has closed eyes, 2.png almost."""
    folder = copy_pictures([album / "3.png"] * 4, tmp_path / "references")
    for number, (shift, closed) in enumerate(((5, False), (0, True), (1, False), (-3, False))):
        landmarks = common.mean_landmarks(64)
        landmarks[30, 0] += shift
        if closed:
            landmarks[36:48, 1] = landmarks[36, 1]
        common.write_landmarks(folder / f"{number}.png.txt", landmarks)
    done = restore(run, trained, photos / "0.png", "--reference", folder, cwd=tmp_path)
    assert done.status == 0, done.stderr
    assert f"guide: {folder / '2.png'}" in done.stdout.splitlines()


@only("asffnet")
def test_asffnet_chooses_for_every_photo_and_says_which(trained, run, album, photos, tmp_path):
    """The references hold the photos themselves, whose landmarks are nearest, under other names."""
    folder = copy_pictures([album / f"{number}.png" for number in (3, 1, 4, 0)], tmp_path / "references")
    (photos / "2.png").unlink()
    done = restore(run, trained, photos, "--reference", folder, cwd=tmp_path)
    assert done.status == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "guided" in line] == [
        f"{photos / '0.png'}: guided by {folder / '3.png'}",
        f"{photos / '1.png'}: guided by {folder / '1.png'}"]


@only("dmdnet")
def test_a_stored_dictionary_restores_as_its_pictures_do(trained, run, album, photos, tmp_path):
    checkpoint = ["--checkpoint", trained.run / "checkpoint.pt", "--device", "cpu"]
    done = run("dmdnet", "--save-dictionary", "person.pt", "--reference", album, *checkpoint, cwd=tmp_path)
    assert done.status == 0 and "person.pt: 5 references" in done.stdout, done.stderr
    pictures = {}
    for name, options in {"album": ["--reference", album], "stored": ["--dictionary", "person.pt"],
                          "none": []}.items():
        done = run("dmdnet", "--restore", photos / "0.png", "--out", name, *options, *checkpoint,
                   cwd=tmp_path)
        assert done.status == 0, done.stderr
        pictures[name] = (tmp_path / name / "0.png").read_bytes()
    assert pictures["stored"] == pictures["album"] != pictures["none"]


@only("dmdnet")
def test_a_stored_dictionary_fits_no_other_network(trained, train, run, album, photos, tmp_path):
    other = train("dmdnet", "only-specific")
    run("dmdnet", "--save-dictionary", "person.pt", "--reference", album, "--device", "cpu",
        "--checkpoint", other.run / "checkpoint.pt", cwd=tmp_path)
    done = run("dmdnet", "--restore", photos / "0.png", "--dictionary", "person.pt", "--device", "cpu",
               "--checkpoint", trained.run / "checkpoint.pt", cwd=tmp_path)
    assert_refused(done, "dmdnet", "person.pt.*another network")


@pytest.mark.skipif(importlib.util.find_spec("face_alignment") is not None, reason="it would find them")
@only("asffnet")
def test_asffnet_wants_landmarks_of_aligned_crops_too(trained, run, photos, tmp_path):
    (photos / "0.png.txt").unlink()
    done = restore(run, trained, photos / "0.png", "--aligned", cwd=tmp_path)
    assert_refused(done, "asffnet", "photos/0.png: its landmarks are unknown")
    assert len(done.stderr.splitlines()) == 1 and "--aligned" not in done.stderr  # given, and no help


# Resuming

SHORT = """
import sys, common, {script} as script
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
data, out = sys.argv[1], Path(sys.argv[2])
cfg = replace(script.TINY, size=64, steps=12, batch=2, validate_every=4, {short})
script.train(cfg, SimpleNamespace(data=data, out=out, checkpoint=out / "checkpoint.pt", resume=False,
                                  device="cpu", workers=0, landmarks=None, aligned=False, vggface=None,
                                  stage=None, lpips=None, fid=None, precision="auto"))
"""


def flat(state, name=""):
    """The leaves of a nested checkpoint with their path."""
    if isinstance(state, (dict, list, tuple)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from flat(value, f"{name}/{key}")
    else:
        yield name, state


def test_a_killed_and_resumed_run_equals_an_unbroken_one_to_the_bit(trained, run, face_folder, tmp_path):
    """SHORT checkpoints every 4 steps, which no option of the command line can ask for."""
    short = tmp_path / "short.py"
    short.write_text(SHORT.format(script=trained.script, short=trained.about.short))
    killed, checkpoint = (start(short, face_folder, tmp_path / "killed", cwd=tmp_path),
                          tmp_path / "killed" / "checkpoint.pt")
    until = time.monotonic() + 120
    while not checkpoint.is_file():
        assert killed.poll() is None and time.monotonic() < until, killed.stderr.read()
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert common.load_weights(checkpoint)["step"] in (4, 8)
    done = run(short, face_folder, tmp_path / "unbroken", cwd=tmp_path)
    assert done.status == 0, done.stderr
    done = run(trained.script, "--train", "--resume", "--data", face_folder, "--device", "cpu",
               "--out", tmp_path / "killed", cwd=tmp_path)
    assert done.status == 0, done.stderr
    one, two = (dict(flat(common.load_weights(tmp_path / name / "checkpoint.pt")))
                for name in ("killed", "unbroken"))
    assert one["/step"] == two["/step"] == 12 and one.keys() == two.keys()
    for part in ("net", "optimizer", "optimizer_d", "rows"):
        assert any(key.startswith(f"/{part}/") for key in one), part
    for key, value in one.items():
        assert torch.equal(value, two[key]) if torch.is_tensor(value) else value == two[key], key


def copy_run(trained, folder):
    """What --resume and --restore need of a run."""
    for name in ("checkpoint.pt", "dictionary.pt", "result.json"):
        if (trained.run / name).is_file():
            shutil.copy(trained.run / name, folder)


def test_resume_with_more_steps_goes_on_and_refuses_another_batch(trained, run, face_folder, tmp_path):
    copy_run(trained, tmp_path)
    resume = ["--train", "--resume", "--data", face_folder, "--out", tmp_path, "--device", "cpu"]
    done = run(trained.script, *resume, "--batch", 4, cwd=tmp_path)
    assert_refused(done, trained.script, "--batch cannot change")
    done = run(trained.script, *resume, "--steps", 8, cwd=tmp_path)
    assert done.status == 0, done.stderr
    state = common.load_weights(tmp_path / "checkpoint.pt")
    assert state["step"] == 8 and [row["step"] for row in state["rows"]] == [6, 8]


# Several processes


def test_torchrun_trains_on_two_processes_and_only_the_first_one_writes(trained, face_folder, tmp_path):
    """Four steps: GFRNet's WarpNet alone and both networks, and ASFFNet's landmark weights once."""
    copy_run(trained, tmp_path)  # DFDNet's dictionary saves building it
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
               str(free_port()), *program(trained.script, *TRAIN, "--data", face_folder, "--steps", 4,
                                          "--out", tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=SETTINGS, text=True, capture_output=True,
                          timeout=240)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("^step 4: validation", done.stdout, re.M)) == done.stdout.count("result.json") == 1
    state = common.load_weights(tmp_path / "checkpoint.pt")
    assert state["step"] == 4 and not [name for name in state["net"] if name.startswith("module.")]
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 4


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Bad input: each case is a function of the prepared folder: the arguments and words of the message


def image(size=(64, 64)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8))


MARKS = [f"{20 + i % 8 * 3} {20 + i // 8 * 3}" for i in range(68)]


def photo(work, landmarks=MARKS, size=(64, 64)):
    image(size).save(work / "face.png")
    if landmarks is not None:
        (work / "face.png.txt").write_text("\n".join(landmarks))
    return ["--restore", work / "face.png"]


def missing_data_folder(work):
    return ["--train", "--data", work / "nowhere"], "nowhere.*no such folder"


def empty_data_folder(work):
    (work / "empty").mkdir()
    return ["--train", "--data", work / "empty"], "empty.*no pictures"


def too_many_bad_pictures(work):
    (work / "data").mkdir()
    for number in range(4):
        (work / "data" / f"{number}.png").write_text("no picture")
    return ["--train", "--data", work / "data", "--aligned"], "of 4 pictures cannot be used"


def too_few_identities(work):
    (work / "data").mkdir()
    image().save(work / "data" / "0.png")
    return ["--train", "--data", work / "data", "--aligned", "--size", 64], "1 identities are too few"


def flat_data_folder(work):
    (work / "data").mkdir()
    for number in range(5):
        image().save(work / "data" / f"{number}.png")
    return [*TRAIN, "--data", work / "data", "--aligned"], "several pictures"


def one_picture_a_person(work):
    for number in range(5):
        (work / "data" / f"person_{number}").mkdir(parents=True)
        image().save(work / "data" / f"person_{number}" / "0.png")
    return [*TRAIN, "--data", work / "data", "--aligned"], "several pictures"


def missing_picture(work):
    return ["--restore", work / "nobody.png"], "nobody.png.*no such file"


def missing_reference(work):
    return [*photo(work), "--reference", work / "nobody.png"], "nobody.png.*no such file"


def reference_folder_without_pictures(work):
    (work / "empty").mkdir()
    return [*photo(work), "--reference", work / "empty"], "empty.*no pictures"


def reference_that_is_no_picture(work):
    (work / "sharp.png").write_text("no picture")
    return [*photo(work), "--reference", work / "sharp.png"], "sharp.png.*not a readable"


def references_of_which_none_is_a_picture(work):
    (work / "sharp").mkdir()
    for number in range(2):
        (work / "sharp" / f"{number}.png").write_text("no picture")
    return [*photo(work), "--reference", work / "sharp"], "sharp: none of its 2 pictures"


def reference_without_landmarks(work):
    image().save(work / "sharp.png")
    return [*photo(work), "--reference", work / "sharp.png"], "sharp.png.*landmarks"


def text_named_jpg(work):
    (work / "face.jpg").write_text("Dear diary,")
    return ["--restore", work / "face.jpg", "--aligned"], "face.jpg.*not a readable picture"


def truncated_image(work):
    image().save(work / "whole.jpg")
    (work / "face.jpg").write_bytes((work / "whole.jpg").read_bytes()[:1500])
    return ["--restore", work / "face.jpg", "--aligned"], "face.jpg.*not a readable picture"


def tiny_image(work):
    return [*photo(work, None, (1, 1)), "--aligned"], "face.png.*too small"


def huge_image(work):
    Image.new("1", (20_000, 10_000)).save(work / "face.png")
    return ["--restore", work / "face.png", "--aligned"], "face.png.*megapixels"


def too_few_landmarks(work):
    return photo(work, MARKS[:67]), "face.png.txt.*67 landmarks"


def two_faces_and_a_bit(work):
    return photo(work, MARKS * 2 + MARKS[:1]), "face.png.txt.*137 landmarks"


def landmarks_that_are_nan(work):
    return photo(work, [*MARKS[:40], "nan 20", *MARKS[41:]]), "face.png.txt.*finite"


def landmarks_that_are_infinite(work):
    return photo(work, [*MARKS[:40], "inf 20", *MARKS[41:]]), "face.png.txt.*finite"


def landmarks_that_are_words(work):
    return photo(work, ["nose left"] * 68), "face.png.txt.*not a landmark file"


def landmarks_outside(work):
    return photo(work, [f"{500 + i} {500 + i % 9}" for i in range(68)]), "face.png.txt.*outside"


def landmarks_in_one_place(work):
    return photo(work, ["30 30"] * 68), "face.png"


def no_landmarks(work):
    return photo(work, None), "face.png.*--aligned"


def missing_checkpoint(work):
    return [*photo(work), "--checkpoint", work / "none.pt"], "none.pt.*no such checkpoint"


def checkpoint_of_another_method(work):
    state = common.load_weights(work / "checkpoint.pt") | {"script": "othernet"}
    torch.save(state, work / "other.pt")
    return [*photo(work), "--checkpoint", work / "other.pt"], "other.pt.*othernet"


def resumed_checkpoint_of_another_method(work):
    checkpoint_of_another_method(work)
    return ["--train", "--resume", "--checkpoint", work / "other.pt"], "other.pt.*othernet"


def plain_weights_as_checkpoint(work):
    torch.save(common.load_weights(work / "checkpoint.pt")["net"], work / "other.pt")
    return [*photo(work), "--checkpoint", work / "other.pt"], "other.pt.*not a checkpoint"


def checkpoint_of_another_preset(work):
    return [*photo(work), "--preset", "paper"], "checkpoint.pt.*preset tiny.*paper"


def truncated_checkpoint(work):
    (work / "half.pt").write_bytes((work / "checkpoint.pt").read_bytes()[:20_000])
    return [*photo(work), "--checkpoint", work / "half.pt"], "half.pt.*damaged"


def resumed_truncated_checkpoint(work):
    (work / "half.pt").write_bytes((work / "checkpoint.pt").read_bytes()[:20_000])
    return ["--train", "--resume", "--out", work, "--checkpoint", work / "half.pt"], "half.pt.*damaged"


def two_sources_of_references(work):
    return [*photo(work), "--reference", work, "--dictionary", work / "person.pt"], "not both"


def dictionary_to_be_saved_of_nobody(work):
    return ["--save-dictionary", work / "person.pt", "--checkpoint", work / "checkpoint.pt"], "--reference"


def dictionary_that_is_a_checkpoint(work):
    return [*photo(work), "--dictionary", work / "checkpoint.pt"], "checkpoint.pt.*not a person's"


def alone(work):
    """The checkpoint in a folder without dictionary."""
    (work / "alone").mkdir()
    shutil.copy(work / "checkpoint.pt", work / "alone")
    return [*photo(work), "--checkpoint", work / "alone" / "checkpoint.pt"]


def missing_dictionary(work):
    return alone(work), "dictionary.pt.*missing"


def truncated_dictionary(work):
    arguments = alone(work)
    (work / "alone" / "dictionary.pt").write_bytes((work / "dictionary.pt").read_bytes()[:5000])
    return arguments, "dictionary.pt.*damaged"


def out_folder_below_a_file(work):
    (work / "file").write_text("in the way")
    return [*photo(work), "--out", work / "file" / "below"], "file/below.*cannot be written"


def train_folder_below_a_file(work):
    (work / "file").write_text("in the way")
    return ["--train", "--out", work / "file" / "below"], "file/below.*cannot be written"


def cuda_without_one(work):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    return ["--train", "--device", "cuda"], "--device cuda"


# --benchmark and --precision

@pytest.mark.parametrize("script", ["dfdnet", "gfrnet", "restoreformer"])
def test_benchmark_times_a_network_of_fresh_or_of_trained_weights(script, train, run, tmp_path):
    chosen = ["--size", 64, "--precision", "float32", "--device", "cpu", "--batch", 2]
    trained = ["--checkpoint", train(script).run / "checkpoint.pt", "--device", "cpu"]
    for arguments, images in ((chosen, 2), (trained, 1)):
        done = run(script, "--benchmark", *arguments, cwd=tmp_path)
        assert done.status == 0, done.stderr
        assert re.search(rf"images/s \(.* s for {images}\), peak memory .* GB, .* TFLOP/s", done.stdout)
        assert len(done.stdout.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["dfdnet", "gfrnet", "restoreformer"])
@pytest.mark.parametrize("arguments, expected", [
    (["--train", "--precision", "bfloat16"], "--precision and --train"),
    (["--evaluate", "--precision", "half"], "--precision.*half"),
    (["--benchmark", "--evaluate"], "--evaluate"),
    (["--benchmark", "--size", "70"], "70"),
    (["--benchmark", "--checkpoint", "x.pt"], "x.pt.*no such checkpoint"),
    (["--benchmark", "--checkpoint", "x.pt", "--size", "64"], "--size and --checkpoint")])
def test_benchmark_and_precision_refuse_what_does_not_fit(script, arguments, expected, run, tmp_path):
    assert_refused(run(script, *arguments, cwd=tmp_path), script, expected)
    assert not list(tmp_path.iterdir())


def options(*words, expected):
    return lambda work: (list(words), expected)


def named(*functions):
    return {function.__name__: function for function in functions}


EVERYWHERE = named(
    missing_data_folder, text_named_jpg, too_few_landmarks, missing_checkpoint,
    checkpoint_of_another_method, resumed_checkpoint_of_another_method, checkpoint_of_another_preset,
    train_folder_below_a_file) | {
    "unknown_variant": options("--train", "--variant", "k17", expected="k17"),
    "unknown_preset": options("--train", "--preset", "huge", expected="huge"),
    "unknown_option": options("--train", "--colour", "red", expected="--colour"),
    "no_action": options(expected="--train"),
    "two_actions": options("--train", "--evaluate", expected="--evaluate"),
    "small_size": options("--train", "--size", 32, expected="32.*at least 64"),
    "zero_size": options("--train", "--size", 0, expected="--size"),
    "size_that_is_no_number": options("--train", "--size", "big", expected="--size.*big"),
    "zero_steps": options("--train", "--steps", 0, expected="--steps"),
    "negative_batch": options("--train", "--batch", -1, expected="--batch"),
    "negative_workers": options("--train", "--data", "nowhere", "--workers", -1, expected="--workers"),
    "negative_seed": options("--train", "--data", "nowhere", "--seed", -3, expected="--seed")}
OF_COMMON = named(
    empty_data_folder, too_many_bad_pictures, too_few_identities, missing_picture, truncated_image,
    tiny_image, huge_image, two_faces_and_a_bit, landmarks_that_are_nan, landmarks_that_are_infinite,
    landmarks_that_are_words, landmarks_outside, landmarks_in_one_place, no_landmarks,
    plain_weights_as_checkpoint, truncated_checkpoint, resumed_truncated_checkpoint,
    out_folder_below_a_file, cuda_without_one) | {
    "unknown_device": options("--train", "--device", "abacus", expected="abacus")}
OF_GUIDES = named(
    missing_reference, reference_folder_without_pictures, reference_that_is_no_picture,
    references_of_which_none_is_a_picture, reference_without_landmarks)
WANTED = named(flat_data_folder, one_picture_a_person)
BAD_INPUT = {
    "dfdnet": {**EVERYWHERE, **OF_COMMON, **named(missing_dictionary, truncated_dictionary)},
    "gfrnet": {**EVERYWHERE, **OF_GUIDES, **WANTED},
    "dmdnet": {**EVERYWHERE, **OF_GUIDES, **named(
        two_sources_of_references, dictionary_to_be_saved_of_nobody, dictionary_that_is_a_checkpoint)},
    "restoreformer": EVERYWHERE | {"stage_three": options("--train", "--stage", 3, expected="--stage")},
    "asffnet": {**EVERYWHERE, **OF_GUIDES, **WANTED}}
for name, cases in BAD_INPUT.items():
    number, rule = SCRIPTS[name].size
    if name != "gfrnet":                                                   # whose authors released none
        cases["ablation_of_the_released_network"] = options(
            "--train", "--preset", "released", "--variant", SCRIPTS[name].other, expected="--variant: the")
    cases["odd_size"] = options("--train", "--size", number, expected=f"{number}.*{rule}")
    cases["resumed_checkpoint_of_another_variant"] = options(
        "--train", "--resume", "--out", ".", "--variant", SCRIPTS[name].other,
        expected=f"checkpoint.pt.*variant full.*{SCRIPTS[name].other}")


@pytest.mark.parametrize("trained, case", [(name, case) for name in SCRIPTS for case in BAD_INPUT[name]],
                         indirect=["trained"])
def test_bad_input_ends_with_one_line_status_2_and_nothing_lost(trained, case, run, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    copy_run(trained, work)
    (work / "restored").mkdir()
    (work / "restored" / "old.png").write_text("kept")
    arguments, expected = BAD_INPUT[trained.script][case](work)
    if "--restore" in arguments and "--checkpoint" not in arguments:
        arguments += ["--checkpoint", work / "checkpoint.pt"]
    if "--restore" in arguments and not {"--reference", "--dictionary"} & set(map(str, arguments)):
        arguments += trained.reference
    before = snapshot(work)
    done = run(trained.script, *arguments, cwd=work)
    assert_refused(done, trained.script, expected)
    after = snapshot(work)
    assert {name: after.get(name) for name in before} == before


@only("dfdnet")
def test_a_checkpoint_that_holds_code_is_refused_and_never_run(trained, run, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    image().save(tmp_path / "face.png")
    state = common.load_weights(trained.run / "checkpoint.pt")
    torch.save(state | {"rows": Attack()}, tmp_path / "evil.pt")
    restoring = ["--restore", tmp_path / "face.png", "--aligned"]
    for action in (restoring, ["--evaluate"], ["--train", "--resume"]):
        done = run(trained.script, *action, "--checkpoint", tmp_path / "evil.pt", cwd=tmp_path)
        assert_refused(done, trained.script, "evil.pt")
        assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


def test_the_script_as_a_process_ends_like_that_too(tmp_path):
    process = start("dfdnet", "--train", "--data", tmp_path / "nowhere", cwd=tmp_path)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and len(stderr.splitlines()) == 1 and "nowhere" in stderr
