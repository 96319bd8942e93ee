"""The command line of dfdnet.py, by subprocess: a run and its files, restoring, resuming, all bad input."""

import csv
import json
import os
import re
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
SCRIPT = ROOT / "dfdnet.py"
SETTINGS = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}

# Importing torch takes longer than most commands do. One process imports it and then forks a child for every
# command, which runs the script as a program of its own: own arguments, folder, output and exit status.
SERVER = """
import json, os, runpy, sys
import matplotlib.pyplot, torch, torchvision, common
while line := sys.stdin.readline():
    job = json.loads(line)
    if (child := os.fork()) == 0:
        for number, name in enumerate((os.devnull, job["stdout"], job["stderr"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(job["cwd"])
        sys.argv = job["argv"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def dfdnet(tmp_path_factory):
    """dfdnet(*arguments, cwd=folder) runs the script → status, stdout, stderr."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=SETTINGS,
    )
    texts = tmp_path_factory.mktemp("texts")

    def run(*arguments, cwd):
        job = {
            "argv": [str(SCRIPT), *map(str, arguments)],
            "cwd": str(cwd),
            "stdout": str(texts / "stdout"),
            "stderr": str(texts / "stderr"),
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return SimpleNamespace(
            status=status, **{name: (texts / name).read_text() for name in ("stdout", "stderr")}
        )

    yield run
    server.stdin.close()
    server.wait()


def start(*arguments, cwd, **options):
    """The script as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        cwd=cwd,
        env=SETTINGS,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def snapshot(folder):
    """Every file of a folder with its bytes and its time."""
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in sorted(Path(folder).rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def trained(face_folder, tmp_path_factory):
    """A folder in which a short training ran, and what it printed."""
    cwd = tmp_path_factory.mktemp("work")
    process = start(
        "--train", "--data", face_folder, "--size", 64, "--steps", 6, "--batch", 2,
        "--device", "cpu", cwd=cwd,
    )
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    return SimpleNamespace(cwd=cwd, run=cwd / "runs" / "dfdnet", stdout=stdout, stderr=stderr)


@pytest.fixture
def photos(face_folder, tmp_path):
    """Three pictures with sidecar landmarks, in a folder of their own."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, picture in enumerate(sorted(face_folder.glob("*/*.png"))[:3]):
        (folder / f"{number}.png").write_bytes(picture.read_bytes())
        (folder / f"{number}.png.txt").write_bytes(picture.with_name(f"{picture.name}.txt").read_bytes())
    return folder


def restore(dfdnet, trained, *arguments, cwd):
    return dfdnet(
        "--restore", *arguments, "--checkpoint", trained.run / "checkpoint.pt", "--device", "cpu", cwd=cwd
    )


# A run and its folder


def test_a_training_writes_everything_into_its_folder(trained):
    names = {
        "config.json",
        "log.csv",
        "samples.png",
        "curves.png",
        "checkpoint.pt",
        "dictionary.pt",
        "result.json",
    }
    assert names <= {file.name for file in trained.run.iterdir()}
    assert not [file for file in trained.run.iterdir() if file.name.startswith(".")]  # temporary files
    config = json.loads((trained.run / "config.json").read_text())
    assert [config[k] for k in ("preset", "variant", "size", "steps", "batch", "seed")] == [
        "tiny",
        "full",
        64,
        6,
        2,
        0,
    ]
    rows = list(csv.DictReader((trained.run / "log.csv").open()))
    assert rows[-1]["step"] == "6" and float(rows[-1]["validation"]) > 0
    for name in ("samples.png", "curves.png"):
        assert np.asarray(Image.open(trained.run / name).convert("L")).std() > 5


def check_result(result, cwd):
    assert {k: result[k] for k in ("script", "variant", "preset", "size", "steps")} == {
        "script": "dfdnet",
        "variant": "full",
        "preset": "tiny",
        "size": 64,
        "steps": 6,
    }
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


def test_result_json_has_the_agreed_keys(trained):
    check_result(json.loads((trained.run / "result.json").read_text()), trained.cwd)


def test_output_away_from_a_terminal_has_no_control_codes_and_names_what_was_written(trained):
    for text in (trained.stdout, trained.stderr):
        assert "\r" not in text and "\x1b" not in text
    for word in ("step 6", "PSNR", "x4", "x8", "checkpoint.pt", "result.json"):
        assert word in trained.stdout
    assert "Traceback" not in trained.stderr


def test_evaluate_repeats_the_numbers_of_the_training(trained, dfdnet, face_folder):
    path = trained.run / "result.json"
    before = json.loads(path.read_text())
    path.unlink()
    done = dfdnet("--evaluate", "--data", face_folder, "--device", "cpu", cwd=trained.cwd)
    assert done.status == 0, done.stderr
    after = json.loads(path.read_text())
    check_result(after, trained.cwd)
    for task in ("x4", "x8"):
        for name in ("input", "restored"):
            assert after["test"][task][name] == pytest.approx(before["test"][task][name], rel=1e-4)
    assert "x4" in done.stdout and "\x1b" not in done.stdout


def test_a_variant_has_its_own_folder(dfdnet, face_folder, tmp_path):
    done = dfdnet(
        "--train",
        "--data",
        face_folder,
        "--size",
        64,
        "--steps",
        1,
        "--batch",
        1,
        "--variant",
        "k16",
        "--device",
        "cpu",
        cwd=tmp_path,
    )
    assert done.status == 0, done.stderr
    config = json.loads((tmp_path / "runs" / "dfdnet-k16" / "config.json").read_text())
    assert (config["variant"], config["entries"]) == ("k16", 16)


def test_help_lists_the_variants_and_presets(dfdnet, tmp_path):
    done = dfdnet("--help", cwd=tmp_path)
    assert done.status == 0
    for word in (
        "no-cadain",
        "no-confidence",
        "0dft",
        "k512",
        "paper",
        "--restore",
        "--resume",
        "--landmarks",
        "--workers",
    ):
        assert word in done.stdout


# Restoring


def test_restore_writes_a_photo_with_sidecar_landmarks(trained, dfdnet, photos, tmp_path):
    done = restore(dfdnet, trained, photos / "0.png", cwd=tmp_path)
    assert done.status == 0, done.stderr
    restored = common.read_image(tmp_path / "restored" / "0.png")
    photo = common.read_image(photos / "0.png")
    assert restored.shape[1] == restored.shape[2] >= 64
    small = torch.nn.functional.interpolate(restored[None], (64, 64), mode="area")[0]
    assert (small - photo).abs().mean() < 0.2  # the same person, not another or nothing
    assert [file.name for file in (tmp_path / "restored").iterdir()] == ["0.png"]


def test_restore_takes_landmarks_from_a_parallel_folder(trained, dfdnet, photos, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    (photos / "0.png.txt").rename(marks / "0.png.txt")
    done = restore(dfdnet, trained, photos / "0.png", "--landmarks", marks, "--out", "there", cwd=tmp_path)
    assert done.status == 0, done.stderr
    assert (tmp_path / "there" / "0.png").is_file()


def test_restore_of_an_aligned_crop_of_another_size(trained, dfdnet, photos, tmp_path):
    wide = tmp_path / "wide.jpg"
    Image.open(photos / "1.png").resize((150, 110)).save(wide)
    done = restore(dfdnet, trained, wide, "--aligned", "--check", cwd=tmp_path)
    assert done.status == 0, done.stderr
    restored = common.read_image(tmp_path / "restored" / "wide.png")
    assert restored.shape == (3, 110, 150)
    original = common.read_image(wide)
    assert (restored - original).abs().mean() < 0.2
    assert (restored - original)[:, :, :18].abs().max() < 0.02  # outside the middle it is the picture itself
    assert common.read_image(tmp_path / "restored" / "wide_check.png").shape[1] == 64


def test_restore_of_a_square_aligned_crop_has_the_size_of_the_network(trained, dfdnet, photos, tmp_path):
    square = tmp_path / "square.png"
    Image.open(photos / "1.png").resize((96, 96)).save(square)
    done = restore(dfdnet, trained, square, "--aligned", cwd=tmp_path)
    assert done.status == 0, done.stderr
    assert common.read_image(tmp_path / "restored" / "square.png").shape == (3, 64, 64)


def test_check_draws_the_landmarks_and_boxes(trained, dfdnet, photos, tmp_path):
    done = restore(dfdnet, trained, photos / "0.png", "--check", cwd=tmp_path)
    assert done.status == 0, done.stderr
    drawn = common.read_image(tmp_path / "restored" / "0_check.png")
    lime, yellow = torch.tensor([-1.0, 1, -1]), torch.tensor([1.0, 1, -1])
    for colour in (lime, yellow):
        assert ((drawn - colour[:, None, None]).abs().amax(0) < 0.1).sum() > 10


def test_a_folder_with_a_bad_file_restores_the_others_and_says_so(trained, dfdnet, photos, tmp_path):
    (photos / "1.png").write_text("this is no picture")
    done = restore(dfdnet, trained, photos, cwd=tmp_path)
    assert done.status == 1
    assert sorted(file.name for file in (tmp_path / "restored").iterdir()) == ["0.png", "2.png"]
    assert len(done.stderr.splitlines()) == 1 and "1.png" in done.stderr
    assert "2 restored" in done.stdout and "1 failed" in done.stdout


def test_results_that_exist_are_skipped_unless_overwritten(trained, dfdnet, photos, tmp_path):
    out = tmp_path / "restored"
    out.mkdir()
    (out / "0.png").write_text("mine")
    done = restore(dfdnet, trained, photos, cwd=tmp_path)
    assert done.status == 0 and (out / "0.png").read_text() == "mine"
    assert "2 restored" in done.stdout and "1 skipped" in done.stdout
    before = snapshot(out)
    done = restore(dfdnet, trained, photos, cwd=tmp_path)
    assert done.status == 0 and snapshot(out) == before and "3 skipped" in done.stdout
    done = restore(dfdnet, trained, photos, "--overwrite", cwd=tmp_path)
    assert done.status == 0 and "3 restored" in done.stdout
    assert common.read_image(out / "0.png").shape[0] == 3
    assert snapshot(out)["1.png"][0] == before["1.png"][0]  # the same input gives the same picture


# Resuming

SHORT = """
import sys, common, dfdnet
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
data, out, resume = sys.argv[1], Path(sys.argv[2]), len(sys.argv) > 3
cfg = replace(dfdnet.TINY, size=64, entries=8, steps=12, batch=2, validate_every=4)
dfdnet.train(cfg, SimpleNamespace(data=data, out=out, checkpoint=out / "checkpoint.pt", resume=resume,
                                  device="cpu", workers=0, landmarks=None, aligned=False, vggface=None))
"""


def flat(state, name=""):
    """The leaves of a nested checkpoint with their path."""
    if isinstance(state, (dict, list, tuple)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from flat(value, f"{name}/{key}")
    else:
        yield name, state


def test_a_killed_and_resumed_run_equals_an_unbroken_one_bit_for_bit(dfdnet, face_folder, tmp_path):
    """SHORT checkpoints every 4 steps, which no option of the command line can ask for."""

    def short(name, **options):
        return subprocess.Popen(
            [sys.executable, "-c", SHORT, str(face_folder), str(tmp_path / name)],
            cwd=tmp_path,
            env=SETTINGS,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    killed, checkpoint = short("killed"), tmp_path / "killed" / "checkpoint.pt"
    until = time.monotonic() + 120
    while not checkpoint.is_file():
        assert killed.poll() is None and time.monotonic() < until, killed.stderr.read()
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert common.load_weights(checkpoint)["step"] in (4, 8)
    unbroken = short("unbroken")
    assert unbroken.communicate(timeout=200) and unbroken.returncode == 0
    done = dfdnet(
        "--train",
        "--resume",
        "--data",
        face_folder,
        "--out",
        tmp_path / "killed",
        "--device",
        "cpu",
        cwd=tmp_path,
    )
    assert done.status == 0, done.stderr
    one, two = (
        dict(flat(common.load_weights(tmp_path / name / "checkpoint.pt"))) for name in ("killed", "unbroken")
    )
    assert one["/step"] == two["/step"] == 12 and one.keys() == two.keys()
    assert any(key.startswith("/net/") for key in one)
    for key, value in one.items():
        assert torch.equal(value, two[key]) if torch.is_tensor(value) else value == two[key], key


def test_resume_with_more_steps_goes_on_and_refuses_another_batch(trained, dfdnet, face_folder, tmp_path):
    for name in ("checkpoint.pt", "dictionary.pt"):
        (tmp_path / name).write_bytes((trained.run / name).read_bytes())
    done = dfdnet(
        "--train",
        "--resume",
        "--data",
        face_folder,
        "--out",
        tmp_path,
        "--batch",
        4,
        "--device",
        "cpu",
        cwd=tmp_path,
    )
    assert done.status == 2 and "batch" in done.stderr and len(done.stderr.splitlines()) == 1
    done = dfdnet(
        "--train",
        "--resume",
        "--data",
        face_folder,
        "--out",
        tmp_path,
        "--steps",
        8,
        "--device",
        "cpu",
        cwd=tmp_path,
    )
    assert done.status == 0, done.stderr
    state = common.load_weights(tmp_path / "checkpoint.pt")
    assert state["step"] == 8 and [row["step"] for row in state["rows"]] == [6, 8]


# Several processes


def test_torchrun_trains_on_two_processes_and_only_the_first_one_writes(trained, face_folder, tmp_path):
    (tmp_path / "dictionary.pt").write_bytes(
        (trained.run / "dictionary.pt").read_bytes()
    )  # saves building it
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        str(SCRIPT),
        "--train",
        "--data",
        str(face_folder),
        "--size",
        "64",
        "--steps",
        "2",
        "--batch",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=SETTINGS, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2: validation") == 1 and done.stdout.count("result.json") == 1
    state = common.load_weights(tmp_path / "checkpoint.pt")
    assert state["step"] == 2 and not [name for name in state["net"] if name.startswith("module.")]
    assert (tmp_path / "result.json").is_file()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Bad input: each case is a function of the prepared folder: the arguments and words of the message


def image(size=(64, 64)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8))


def photo(work, name="face.png", landmarks=None, size=(64, 64)):
    image(size).save(work / name)
    if landmarks is not None:
        (work / f"{name}.txt").write_text("\n".join(landmarks))
    return ["--restore", work / name]


MARKS = [f"{20 + i % 8 * 3} {20 + i // 8 * 3}" for i in range(68)]


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


def missing_picture(work):
    return ["--restore", work / "nobody.png"], "nobody.png.*no such file"


def text_named_jpg(work):
    (work / "face.jpg").write_text("Dear diary,")
    return ["--restore", work / "face.jpg", "--aligned"], "face.jpg.*not a readable picture"


def truncated_image(work):
    image().save(work / "whole.jpg")
    (work / "face.jpg").write_bytes((work / "whole.jpg").read_bytes()[:1500])
    return ["--restore", work / "face.jpg", "--aligned"], "face.jpg.*not a readable picture"


def tiny_image(work):
    return [*photo(work, size=(1, 1)), "--aligned"], "face.png.*too small"


def huge_image(work):
    Image.new("1", (20_000, 10_000)).save(work / "face.png")
    return ["--restore", work / "face.png", "--aligned"], "face.png.*megapixels"


def too_few_landmarks(work):
    return photo(work, landmarks=MARKS[:67]), "face.png.txt.*67 landmarks"


def two_faces_and_a_bit(work):
    return photo(work, landmarks=MARKS * 2 + MARKS[:1]), "face.png.txt.*137 landmarks"


def landmarks_that_are_nan(work):
    return photo(work, landmarks=[*MARKS[:40], "nan 20", *MARKS[41:]]), "face.png.txt.*finite"


def landmarks_that_are_infinite(work):
    return photo(work, landmarks=[*MARKS[:40], "inf 20", *MARKS[41:]]), "face.png.txt.*finite"


def landmarks_that_are_words(work):
    return photo(work, landmarks=["nose left"] * 68), "face.png.txt.*not a landmark file"


def landmarks_outside(work):
    return photo(work, landmarks=[f"{500 + i} {500 + i % 9}" for i in range(68)]), "face.png.txt.*outside"


def landmarks_in_one_place(work):
    return photo(work, landmarks=["30 30"] * 68), "face.png"


def no_landmarks(work):
    return photo(work), "face.png.*--aligned"


def missing_checkpoint(work):
    return [*photo(work, landmarks=MARKS), "--checkpoint", work / "none.pt"], "none.pt.*no such checkpoint"


def checkpoint_of_another_method(work):
    state = common.load_weights(work / "checkpoint.pt") | {"script": "gfrnet"}
    torch.save(state, work / "other.pt")
    return [*photo(work, landmarks=MARKS), "--checkpoint", work / "other.pt"], "other.pt.*gfrnet"


def plain_weights_as_checkpoint(work):
    torch.save(common.load_weights(work / "checkpoint.pt")["net"], work / "other.pt")
    return [*photo(work, landmarks=MARKS), "--checkpoint", work / "other.pt"], "other.pt.*not a checkpoint"


def checkpoint_of_another_preset(work):
    return [*photo(work, landmarks=MARKS), "--preset", "paper"], "checkpoint.pt.*preset tiny.*paper"


def resumed_checkpoint_of_another_variant(work):
    return ["--train", "--resume", "--variant", "0dft", "--out", work], "checkpoint.pt.*variant full.*0dft"


def truncated_checkpoint(work):
    (work / "half.pt").write_bytes((work / "checkpoint.pt").read_bytes()[:20_000])
    return [*photo(work, landmarks=MARKS), "--checkpoint", work / "half.pt"], "half.pt.*damaged"


def resumed_truncated_checkpoint(work):
    (work / "half.pt").write_bytes((work / "checkpoint.pt").read_bytes()[:20_000])
    return ["--train", "--resume", "--out", work, "--checkpoint", work / "half.pt"], "half.pt.*damaged"


def missing_dictionary(work):
    (work / "alone").mkdir()
    (work / "alone" / "checkpoint.pt").write_bytes((work / "checkpoint.pt").read_bytes())
    return [
        *photo(work, landmarks=MARKS),
        "--checkpoint",
        work / "alone" / "checkpoint.pt",
    ], "dictionary.pt.*missing"


def truncated_dictionary(work):
    (work / "alone").mkdir()
    (work / "alone" / "checkpoint.pt").write_bytes((work / "checkpoint.pt").read_bytes())
    (work / "alone" / "dictionary.pt").write_bytes((work / "dictionary.pt").read_bytes()[:5000])
    return [
        *photo(work, landmarks=MARKS),
        "--checkpoint",
        work / "alone" / "checkpoint.pt",
    ], "dictionary.pt.*damaged"


def out_folder_below_a_file(work):
    (work / "file").write_text("in the way")
    return [*photo(work, landmarks=MARKS), "--out", work / "file" / "below"], "file/below.*cannot be written"


def train_folder_below_a_file(work):
    (work / "file").write_text("in the way")
    return ["--train", "--out", work / "file" / "below"], "file/below.*cannot be written"


def cuda_without_one(work):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    return ["--train", "--device", "cuda"], "--device cuda"


def options(*words, expected):
    return lambda work: (list(words), expected)


BAD_INPUT = {
    function.__name__: function
    for function in (
        missing_data_folder,
        empty_data_folder,
        too_many_bad_pictures,
        too_few_identities,
        missing_picture,
        text_named_jpg,
        truncated_image,
        tiny_image,
        huge_image,
        too_few_landmarks,
        two_faces_and_a_bit,
        landmarks_that_are_nan,
        landmarks_that_are_infinite,
        landmarks_that_are_words,
        landmarks_outside,
        landmarks_in_one_place,
        no_landmarks,
        missing_checkpoint,
        checkpoint_of_another_method,
        plain_weights_as_checkpoint,
        checkpoint_of_another_preset,
        resumed_checkpoint_of_another_variant,
        truncated_checkpoint,
        resumed_truncated_checkpoint,
        missing_dictionary,
        truncated_dictionary,
        out_folder_below_a_file,
        train_folder_below_a_file,
        cuda_without_one,
    )
} | {
    "unknown_device": options("--train", "--device", "abacus", expected="abacus"),
    "unknown_variant": options("--train", "--variant", "k17", expected="k17"),
    "unknown_preset": options("--train", "--preset", "huge", expected="huge"),
    "unknown_option": options("--train", "--colour", "red", expected="--colour"),
    "no_action": options(expected="--train"),
    "two_actions": options("--train", "--evaluate", expected="--evaluate"),
    "zero_size": options("--train", "--size", "0", expected="--size"),
    "negative_size": options("--train", "--size", "-64", expected="--size"),
    "odd_size": options("--train", "--size", "70", expected="70.*multiple of 16"),
    "small_size": options("--train", "--size", "32", expected="32.*at least 64"),
    "zero_steps": options("--train", "--steps", "0", expected="--steps"),
    "negative_batch": options("--train", "--batch", "-1", expected="--batch"),
    "zero_batch": options("--train", "--batch", "0", expected="--batch"),
    "size_that_is_no_number": options("--train", "--size", "big", expected="--size.*big"),
    "negative_workers": options("--train", "--data", "nowhere", "--workers", "-1", expected="--workers"),
    "negative_seed": options("--train", "--data", "nowhere", "--seed", "-3", expected="--seed"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_with_one_line_status_2_and_nothing_lost(case, trained, dfdnet, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    for name in ("checkpoint.pt", "dictionary.pt", "result.json"):
        (work / name).write_bytes((trained.run / name).read_bytes())
    (work / "restored").mkdir()
    (work / "restored" / "old.png").write_text("kept")
    arguments, expected = BAD_INPUT[case](work)
    if "--restore" in arguments and "--checkpoint" not in arguments:
        arguments += ["--checkpoint", work / "checkpoint.pt"]
    before = snapshot(work)
    done = dfdnet(*arguments, cwd=work)
    assert done.status == 2, done
    *warnings, line = done.stderr.splitlines()
    assert all(warning.startswith("left out: ") for warning in warnings), done.stderr
    assert line.startswith("dfdnet.py: ") and re.search(expected, line), done.stderr
    after = snapshot(work)
    assert {name: after.get(name) for name in before} == before


def test_a_checkpoint_that_holds_code_is_refused_and_never_run(trained, dfdnet, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    image().save(tmp_path / "face.png")
    torch.save(common.load_weights(trained.run / "checkpoint.pt") | {"rows": Attack()}, tmp_path / "evil.pt")
    for action in (
        ["--restore", tmp_path / "face.png", "--aligned"],
        ["--evaluate"],
        ["--train", "--resume"],
    ):
        done = dfdnet(*action, "--checkpoint", tmp_path / "evil.pt", cwd=tmp_path)
        assert done.status == 2 and len(done.stderr.splitlines()) == 1 and "evil.pt" in done.stderr
        assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


def test_the_script_as_a_process_ends_like_that_too(tmp_path):
    process = start("--train", "--data", tmp_path / "nowhere", cwd=tmp_path)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and len(stderr.splitlines()) == 1 and "nowhere" in stderr
