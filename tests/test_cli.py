"""The scripts' command lines: runs and their files, measuring, restoring, resuming, several processes, and
all bad input. What only common.py decides is tested with DFDNet's script alone.
"""
import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DRIVER, KILLED, ROOT, SETTINGS, SHARED, TINY, free_port, refused
from PIL import Image
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import common

# What only a script's runs write, and a size that its network cannot have.
SCRIPTS = {
    "dfdnet": SimpleNamespace(files={"dictionary.pt", "dictionary.png"}, size=(72, "multiple of 16")),
    "gfrnet": SimpleNamespace(files={"flow.png"}, size=(96, "power of two")),
    "asffnet": SimpleNamespace(files={"attention.png"}, size=(72, "multiple of 16")),
    "dmdnet": SimpleNamespace(files={"readings.png"}, size=(72, "multiple of 16")),
    "restoreformer": SimpleNamespace(files={"dictionary.pt", "reconstructions.png", "attention.png"},
                                     size=(72, "multiple of 16"))}
GUIDED = ["gfrnet", "asffnet", "dmdnet"]
# Changes for `run`: no curves but the last ones; nothing drawn or measured at all; death while saving.
LAST_CURVES = """
write = common._write_log
common._write_log = lambda folder, rows: write(folder, rows) if rows[-1]["step"] in (1, 6) else None
"""
QUIET = """
script.evaluate = script.samples = script.reconstructions = lambda *a: None
common.report = common._write_log = lambda *a: None
common.write_image = lambda *a: None
"""
KILLED_WHILE_SAVING = """
import os, signal
save = torch.save
def half(state, file):
    save(state, file)
    if state.get("step") == 4:
        os.truncate(file.name, 5000)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
"""


def only(*scripts):
    """For these scripts only: the rest is the same code, in common.py."""
    return pytest.mark.parametrize("trained", scripts, indirect=True)


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


def copy_run(trained, folder):
    return Path(shutil.copytree(trained.folder, folder, dirs_exist_ok=True))


@pytest.fixture(scope="module")
def train(run, people, tmp_path_factory):
    """train(script, *arguments) → a folder in which a short training ran, once, and what it printed."""
    runs = {}

    def train(script, *arguments):
        if (script, *arguments) not in runs:
            cwd = tmp_path_factory.mktemp(script)
            done = run(script, "--train", "--data", people, *arguments, cwd=cwd, changes=LAST_CURVES)
            folder, = (cwd / "runs").iterdir()
            reference = ["--reference", people / "anna"] if script in GUIDED else []
            runs[script, *arguments] = SimpleNamespace(
                script=script, folder=folder, checkpoint=folder / "checkpoint.pt", reference=reference,
                stdout=done.stdout, stderr=done.stderr)
        return runs[script, *arguments]

    return train


@pytest.fixture(params=SCRIPTS)
def trained(request, train):
    """A trained script; each script in turn. Its folder is read only."""
    return train(request.param)


@pytest.fixture
def photos(people, tmp_path):
    """Three pictures of anna with sidecar landmarks, in a folder of their own."""
    return copy_pictures([people / "anna" / f"{number}.png" for number in range(3)], tmp_path / "photos")


def restore(run, trained, photo, *arguments, cwd, **more):
    """`--restore photo`, with the script's reference where the arguments have none."""
    reference = [] if "--reference" in arguments else trained.reference
    return run(trained.script, "--restore", photo, *arguments, *reference,
               "--checkpoint", trained.checkpoint, cwd=cwd, **more)


def assert_refused(done, script, expected):
    """One line on stderr, behind those of what was left out."""
    *warnings, line = done.stderr.splitlines()
    assert all(warning.startswith("left out: ") for warning in warnings), done.stderr
    assert line.startswith(f"{script}.py: ") and re.search(expected, line), done.stderr


def assert_main_refuses(script, arguments, expected):
    """main() as called by run_script ends in an InputError of one line, which becomes that line."""
    with refused(expected):
        importlib.import_module(script).main([str(argument) for argument in arguments])


def read_json(file):
    """Strict JSON: neither NaN nor Infinity."""
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")
    return json.loads(file.read_text(), parse_constant=refuse)


# A run and its folder

def test_a_training_writes_everything_into_its_folder(trained):
    names = {"config.json", "log.csv", "samples.png", "curves.png", "checkpoint.pt", "result.json",
             "faces.csv", *SCRIPTS[trained.script].files}
    assert {file.name for file in trained.folder.iterdir()} == names          # nor temporary files
    config = read_json(trained.folder / "config.json")
    assert {key: config[key] for key in ("preset", "variant", "size", "steps", "batch", "seed")} == {
        "preset": "tiny", "variant": "full", "size": 64, "steps": 6, "batch": 2, "seed": 0}
    rows = list(csv.DictReader((trained.folder / "log.csv").open()))
    assert rows[-1]["step"] == "6" and float(rows[-1]["validation"]) > 0 and float(rows[-1]["rate"]) > 0
    for name in names:
        assert name in trained.stdout
        if name.endswith(".png"):
            assert np.asarray(Image.open(trained.folder / name).convert("L")).std() > 5


def test_output_away_from_a_terminal_has_no_control_codes_and_names_the_figures(trained):
    for text in (trained.stdout, trained.stderr):
        assert "\r" not in text and "\x1b" not in text
    for word in ("step 6: validation", "psnr", "detail", "x4", "x8", "random", "PSNR gain"):
        assert word in trained.stdout
    assert trained.stderr == ""


def test_result_json_has_the_agreed_keys(trained, people):
    result = read_json(trained.folder / "result.json")
    about = {"script": trained.script, "variant": "full", "preset": "tiny", "data": str(people),
             "size": 64, "steps": 6}
    assert {key: result[key] for key in about} == about
    assert set(result) == {*about, "seconds", "test"} and result["seconds"] > 0
    assert list(result["test"]) == ["x4", "x8", "random"]
    for task in result["test"].values():
        assert 1 <= task["faces"] <= 3                                        # Config.tested
        for column in (task["input"], task["restored"]):
            assert list(column)[:4] == ["psnr", "ssim", "identity", "detail"]
            assert -30 < column["psnr"] < 60 and 0 <= column["identity"] <= 180 and column["detail"] > 0
        gain = task["paired_psnr_gain"]
        assert gain["ci95"][0] <= gain["mean"] <= gain["ci95"][1]
        assert gain["mean"] == pytest.approx(task["restored"]["psnr"] - task["input"]["psnr"], abs=1e-4)
    assert result["test"]["x4"]["input"]["psnr"] > result["test"]["x8"]["input"]["psnr"]


def test_faces_csv_holds_the_values_whose_means_stand_in_result_json(trained):
    result = read_json(trained.folder / "result.json")["test"]
    lines = list(csv.DictReader((trained.folder / "faces.csv").open()))
    for task, row in result.items():
        for column in ("input", "restored"):
            mine = [line for line in lines if (line["task"], line["column"]) == (task, column)]
            assert len({int(line["face"]) for line in mine}) == len(mine) == row["faces"]
            for metric, mean in row[column].items():
                assert np.mean([float(line[metric]) for line in mine]) == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_preset_and_variant_can_be_written_as_json(script):
    script = importlib.import_module(script)
    for preset in script.PRESETS.values():
        json.dumps(asdict(preset), allow_nan=False)
        for changes in script.VARIANTS.values():
            assert set(changes) <= set(asdict(preset))


@only("dfdnet")
@pytest.mark.parametrize("variant, changes", [
    ("no-confidence", {"confidence": False}), ("0dft", {"dft_scales": []})])
def test_a_variant_has_its_own_folder_and_restores(variant, changes, trained, train, run, photos, tmp_path):
    other = train("dfdnet", "--variant", variant, "--steps", "1")
    assert other.folder.name == f"dfdnet-{variant}" and trained.folder.name == "dfdnet"
    config, result = (read_json(other.folder / name) for name in ("config.json", "result.json"))
    assert config.items() >= {"variant": variant, **changes}.items()
    assert result["variant"] == variant and result["steps"] == 1
    restore(run, other, photos / "0.png", cwd=tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_the_options_presets_and_variants(script, run, tmp_path):
    done = run(script, "--help", cwd=tmp_path)
    words = set(re.findall(r"[\w-]+", done.stdout))
    assert words >= {"--train", "--evaluate", "--restore", "--resume", "--landmarks", "--workers", "tiny",
                     "paper", *importlib.import_module(script).VARIANTS}
    assert ("--reference" in words) == (script in GUIDED)


@pytest.mark.slow
@only("dfdnet")
def test_worker_processes_change_nothing(trained, run, people, tmp_path):
    run("dfdnet", "--train", "--data", people, "--workers", 1, "--out", "run", cwd=tmp_path, changes=QUIET)
    assert_same_state(tmp_path / "run" / "checkpoint.pt", trained.checkpoint)


@pytest.mark.slow
@only("dfdnet", "restoreformer")
def test_a_checkpoint_elsewhere_has_its_dictionary_beside_it(trained, run, people, photos, tmp_path):
    checkpoint = tmp_path / "kept" / "mine.pt"
    arguments = ["--data", people, "--out", "run", "--checkpoint", checkpoint]
    run(trained.script, "--train", *arguments, cwd=tmp_path, changes=QUIET)
    assert {file.name for file in checkpoint.parent.iterdir()} >= {"mine.pt", "dictionary.pt"}
    assert not list((tmp_path / "run").glob("*.pt"))
    run(trained.script, "--restore", photos / "0.png", "--checkpoint", checkpoint, cwd=tmp_path)
    assert (tmp_path / "restored" / "0.png").is_file()


# Measuring

@pytest.mark.slow
def test_evaluate_repeats_the_figures_of_the_training(trained, run, tmp_path):
    """Without --data: on the recorded folder. Seconds and steps are the run's. To the last digit, but for
    DFDNet, whose spectral norms are summed in another order when they are folded."""
    folder = copy_run(trained, tmp_path / "run")
    (folder / "result.json").unlink()
    done = run(trained.script, "--evaluate", "--out", folder, cwd=tmp_path)
    before, after = (dict(leaves(read_json(place / "result.json"))) for place in (trained.folder, folder))
    if trained.script == "dfdnet":
        after = {name: pytest.approx(value, rel=1e-4, abs=1e-4) if isinstance(value, float) else value
                 for name, value in after.items()}
    assert after == before
    assert "x4" in done.stdout and "\x1b" not in done.stdout


@pytest.mark.slow
def test_evaluate_on_other_data_measures_all_faces_of_people_not_trained_on(trained, run, people, tmp_path):
    """Two people of other names than the training's, one of the same; more faces than Config.tested."""
    folder = copy_run(trained, tmp_path / "run")
    for name, source in {"anna": "emil", "gina": "bert", "hans": "cleo"}.items():
        shutil.copytree(people / source, tmp_path / "others" / name)
    before = snapshot(folder)
    done = run(trained.script, "--evaluate", "--data", "others", "--out", folder, cwd=tmp_path)
    assert re.search("left out: 5 faces.*training", done.stderr), done.stderr
    after = snapshot(folder)
    assert {name: after[name] for name in before} == before
    assert {"result-others.json", "samples-others.png"} <= set(after) - set(before)
    result = read_json(folder / "result-others.json")
    assert result["data"] == "others" and result["steps"] == 6
    faces = 8 if trained.script == "gfrnet" else 10              # a picture that guides is not restored
    assert {task["faces"] for task in result["test"].values()} == {faces}
    assert set(common.TASKS) <= set(result["test"])


@only("gfrnet", "dfdnet")
def test_evaluate_under_another_degradation_leaves_the_runs_own_result(trained, run, people, tmp_path):
    """The files carry the degradation's name; what a face draws follows from its index alone, although
    GFRNet leaves out the faces that guide."""
    script, folder = trained.script, copy_run(trained, tmp_path / "run")
    before = snapshot(folder)
    run(script, "--evaluate", "--degradation", "dmdnet", "--out", folder, cwd=tmp_path)
    after = snapshot(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) >= {"result-dmdnet.json", "faces-dmdnet.csv", "samples-dmdnet.png"}
    own, other = (read_json(folder / name)["test"]["x4"]["input"]["psnr"]
                  for name in ("result.json", "result-dmdnet.json"))
    assert abs(own - other) > 0.05
    faces = common.FaceFolder(people, 64)
    lines = [line for line in csv.DictReader((folder / "faces-dmdnet.csv").open())
             if (line["task"], line["column"]) == ("x4", "input")]
    assert {int(line["face"]) for line in lines} <= set(common.split_identities(faces)[2])
    for line in lines:
        index = int(line["face"])
        target = faces[index].image[None]
        expected = common.degrade(target, common.DEGRADATIONS["dmdnet"], common.seeded(0, 4, 4, index), 4)
        assert float(line["psnr"]) == pytest.approx(common.psnr(expected, target).item(), abs=1e-3)


# Restoring

def test_restore_writes_a_photo_with_sidecar_landmarks_and_check_draws_them(trained, run, photos, tmp_path):
    restore(run, trained, photos / "0.png", "--check", cwd=tmp_path)
    assert {file.name for file in (tmp_path / "restored").iterdir()} == {"0.png", "0_check.png"}
    restored = common.read_image(tmp_path / "restored" / "0.png")
    photo = common.read_image(photos / "0.png")
    assert restored.shape[1] == restored.shape[2] >= 64
    small = nn.functional.interpolate(restored[None], (64, 64), mode="area")[0]
    if trained.script != "restoreformer":                    # whose six steps teach it no face
        assert (small - photo).abs().mean() < 0.3
    assert (small - photo).abs().max() > 0.01                                  # and restored
    drawn = common.read_image(tmp_path / "restored" / "0_check.png")
    columns = {"gfrnet": 4, "asffnet": 5, "dfdnet": 2, "dmdnet": 7, "restoreformer": 2}    # what it leaned on
    assert drawn.shape[2] == 1 + 65 * columns[trained.script]
    lime, yellow = torch.tensor([-1.0, 1, -1]), torch.tensor([1.0, 1, -1])
    for colour in (lime, yellow):
        assert ((drawn - colour[:, None, None]).abs().amax(0) < 0.1).sum() > 10


@only("dfdnet")
def test_restore_takes_landmarks_from_a_parallel_folder(trained, run, photos, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    (photos / "0.png.txt").rename(marks / "0.png.txt")
    restore(run, trained, photos / "0.png", "--landmarks", marks, "--out", "there", cwd=tmp_path)
    assert (tmp_path / "there" / "0.png").is_file()


@only("dfdnet")
def test_restore_of_aligned_crops(trained, run, photos, tmp_path):
    """A square one comes out at the network's size, of a wide one the middle is restored."""
    picture = Image.open(photos / "1.png")
    (tmp_path / "crops").mkdir()
    picture.resize((150, 110)).save(tmp_path / "crops" / "wide.jpg")
    picture.resize((96, 96)).save(tmp_path / "crops" / "square.png")
    restore(run, trained, tmp_path / "crops", "--aligned", cwd=tmp_path)
    assert common.read_image(tmp_path / "restored" / "square.png").shape == (3, 64, 64)
    restored = common.read_image(tmp_path / "restored" / "wide.png")
    original = common.read_image(tmp_path / "crops" / "wide.jpg")
    assert restored.shape == (3, 110, 150) and (restored - original).abs().mean() < 0.3
    assert (restored - original)[:, :, :18].abs().max() < 0.02  # beside it: the picture itself


@only("dfdnet")
def test_a_folder_with_a_bad_file_restores_the_others_and_says_so(trained, run, photos, tmp_path):
    (photos / "1.png").write_text("this is no picture")
    done = restore(run, trained, photos, cwd=tmp_path, status=1)
    assert sorted(file.name for file in (tmp_path / "restored").iterdir()) == ["0.png", "2.png"]
    assert len(done.stderr.splitlines()) == 1 and "1.png" in done.stderr
    assert "2 restored" in done.stdout and "1 failed" in done.stdout


@only("dfdnet")
def test_results_that_exist_are_skipped_unless_overwritten(trained, run, photos, tmp_path):
    """The first of three is there; then all are; then all are restored again."""
    out = tmp_path / "restored"
    out.mkdir()
    (out / "0.png").write_text("mine")
    states = [snapshot(out)]
    for options, restored in (([], 2), ([], 0), (["--overwrite"], 3)):
        done = restore(run, trained, photos, *options, cwd=tmp_path)
        assert f"{restored} restored, {3 - restored} skipped" in done.stdout, done
        states.append(snapshot(out))
    first, second, third, last = states
    assert second["0.png"] == first["0.png"] and second == third
    assert all(last[name][1] > third[name][1] for name in ("0.png", "1.png", "2.png"))
    assert last["1.png"][0] == third["1.png"][0]  # the same input gives the same picture
    assert common.read_image(out / "0.png").shape[0] == 3


@only("dfdnet")
def test_originals_are_never_overwritten(trained, run, photos, tmp_path):
    before = snapshot(photos)
    for source in (photos, photos / "0.png"):
        done = restore(run, trained, source, "--out", photos, "--overwrite", cwd=tmp_path, status=2)
        assert_refused(done, "dfdnet", "photos.*--out")
        assert snapshot(photos) == before


# The sharp pictures that guide

@only("gfrnet", "asffnet")
def test_a_guided_restoration_wants_a_reference(trained, run, photos, tmp_path):
    done = run(trained.script, "--restore", photos / "0.png", "--checkpoint", trained.checkpoint,
               cwd=tmp_path, status=2)
    assert_refused(done, trained.script, "--reference")
    assert not (tmp_path / "restored").exists()


def test_gfrnet_without_guide_wants_no_reference(train, run, photos, tmp_path):
    trained = train("gfrnet", "--variant", "no-guide", "--steps", "1")
    done = run("gfrnet", "--restore", photos / "0.png", "--checkpoint", trained.checkpoint, cwd=tmp_path)
    assert (tmp_path / "restored" / "0.png").is_file() and "guide:" not in done.stdout


@pytest.mark.slow
@only(*GUIDED)
def test_a_reference_is_one_picture_or_a_folder_and_a_bad_one_is_left_out(trained, run, people, photos,
                                                                          tmp_path):
    folder = copy_pictures([people / "anna" / "3.png", people / "anna" / "4.png"], tmp_path / "sharp")
    pictures = []
    for number in range(2):
        done = restore(run, trained, photos / "0.png", "--reference", folder / f"{number}.png",
                       "--overwrite", cwd=tmp_path)
        assert f"{number}.png" in done.stdout
        pictures.append(common.read_image(tmp_path / "restored" / "0.png"))
    assert not torch.equal(*pictures)                                # the result depends on it
    (folder / "0.png").write_text("this is no picture")
    done = restore(run, trained, photos / "0.png", "--reference", folder, "--overwrite", cwd=tmp_path)
    assert "sharp/1.png" in done.stdout
    line, = done.stderr.splitlines()
    assert re.match("left out: .*sharp/0.png", line)


@only("gfrnet")
def test_gfrnet_takes_the_most_frontal_reference_and_says_which(trained, run, people, photos, tmp_path):
    """Average landmarks, nose and eyes moved: 1.png is frontal but has closed eyes, 2.png almost."""
    folder = copy_pictures([people / "anna" / "3.png"] * 4, tmp_path / "references")
    for number, (shift, closed) in enumerate(((5, False), (0, True), (1, False), (-3, False))):
        landmarks = common.mean_landmarks(64)
        landmarks[30, 0] += shift
        if closed:
            landmarks[36:48, 1] = landmarks[36, 1]
        common.write_landmarks(folder / f"{number}.png.txt", landmarks)
    done = restore(run, trained, photos / "0.png", "--reference", folder, cwd=tmp_path)
    assert f"guide: {folder / '2.png'}" in done.stdout.splitlines()


@only("asffnet")
def test_asffnet_chooses_for_every_photo_and_says_which(trained, run, people, photos, tmp_path):
    """The references hold the photos themselves, whose landmarks are nearest, under other names."""
    folder = copy_pictures([people / "anna" / f"{number}.png" for number in (3, 1, 4, 0)],
                           tmp_path / "references")
    (photos / "2.png").unlink()
    done = restore(run, trained, photos, "--reference", folder, cwd=tmp_path)
    assert [line for line in done.stdout.splitlines() if "guided" in line] == [
        f"{photos / '0.png'}: guided by {folder / '3.png'}",
        f"{photos / '1.png'}: guided by {folder / '1.png'}"]


@pytest.mark.slow
@only("dmdnet")
def test_a_stored_dictionary_restores_as_its_pictures_do(trained, train, run, people, photos, tmp_path):
    checkpoint = ["--checkpoint", trained.checkpoint]
    album = ["--reference", people / "anna"]
    done = run("dmdnet", "--save-dictionary", "person.pt", *album, *checkpoint, cwd=tmp_path)
    assert "guided by 5 pictures" in done.stdout
    for name, options in {"album": album, "stored": ["--dictionary", "person.pt"], "none": []}.items():
        run("dmdnet", "--restore", photos / "0.png", "--out", name, *options, *checkpoint, cwd=tmp_path)
    album, stored, none = ((tmp_path / name / "0.png").read_bytes() for name in ("album", "stored", "none"))
    assert stored == album != none
    some, others = tmp_path / "some", tmp_path / "others"                 # the same album in two parts
    for number in range(5):
        for name in (f"{number}.png", f"{number}.png.txt"):
            part = some if number < 2 else others
            part.mkdir(exist_ok=True)
            shutil.copy(people / "anna" / name, part / name)
    run("dmdnet", "--save-dictionary", "two.pt", "--reference", some, *checkpoint, cwd=tmp_path)
    done = run("dmdnet", "--save-dictionary", "five.pt", "--dictionary", "two.pt", "--reference", others,
               *checkpoint, cwd=tmp_path)
    assert "five.pt: 5 references" in done.stdout
    grown, whole = (common.load_weights(tmp_path / name)["dictionary"] for name in ("five.pt", "person.pt"))
    for name in whole:
        torch.testing.assert_close(grown[name], whole[name], rtol=1e-5, atol=1e-5)
    other = train("dmdnet", "--variant", "only-specific", "--steps", "1")
    done = run("dmdnet", "--restore", photos / "0.png", "--dictionary", "person.pt", "--checkpoint",
               other.checkpoint, cwd=tmp_path, status=2)
    assert_refused(done, "dmdnet", "person.pt: not a dictionary that this network made")


@only("gfrnet", "asffnet")
def test_guided_methods_want_true_landmarks_of_aligned_crops_too(trained, run, people, photos, tmp_path):
    """Average ones would teach that nothing moves. The detector of the papers is hidden, if there is one."""
    hidden = "import sys; sys.modules['face_alignment'] = sys.modules['dlib'] = None"
    bare = tmp_path / "bare"
    shutil.copytree(people, bare, ignore=shutil.ignore_patterns("*.txt"))
    done = run(trained.script, "--train", "--data", bare, "--aligned", cwd=tmp_path, changes=hidden,
               status=2)
    assert_refused(done, trained.script, "bare/anna/0.png: its landmarks are unknown")
    if trained.script == "asffnet":
        (photos / "0.png.txt").unlink()
        done = restore(run, trained, photos / "0.png", "--aligned", cwd=tmp_path, changes=hidden, status=2)
        assert_refused(done, trained.script, "photos/0.png: its landmarks are unknown")
        assert "--aligned" not in done.stderr                      # which is given, and no help
    assert not (tmp_path / "runs").exists() and not (tmp_path / "restored").exists()


# Resuming

def leaves(state, name=""):
    """The leaves of a nested checkpoint with their path."""
    if isinstance(state, (dict, list, tuple)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from leaves(value, f"{name}/{key}")
    else:
        yield name, state


def assert_same_state(one, two, near=None):
    """Two checkpoints hold the same, but for what is of a process or of a place."""
    one, two = (dict(leaves(common.load_weights(path))) for path in (one, two))
    for name in ("/seconds", "/run_id", "/data/data", "/config/batch", "/config/dictionary_share"):
        one.pop(name, None), two.pop(name, None)
    assert one.keys() == two.keys() and any(name.startswith("/net/") for name in one)
    for name, value in one.items():
        if torch.is_tensor(value) and near:
            off = (value.double() - two[name].double()).abs().max()
            assert off <= near * value.abs().max().clamp(min=1), f"{name}: {off}"
        elif not near:
            assert torch.equal(value, two[name]) if torch.is_tensor(value) else value == two[name], name


@pytest.mark.slow
@pytest.mark.parametrize("script, death", [
    *((script, KILLED.format("step == 5")) for script in SCRIPTS),
    *((script, KILLED.format("step == 3")) for script in ("restoreformer", "dmdnet")),
    ("dfdnet", KILLED_WHILE_SAVING)],
    ids=[*SCRIPTS, "restoreformer-stage-1", "dmdnet-between-stages", "dfdnet-while-saving"])
def test_a_killed_and_resumed_run_equals_an_unbroken_one_to_the_bit(script, death, train, run, people,
                                                                    tmp_path):
    run(script, "--train", "--data", people, "--out", "run", cwd=tmp_path, changes=QUIET + death, status=-9)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    saved = common.load_weights(checkpoint)
    assert saved["step"] == (4 if death == KILLED.format("step == 5") else 2)
    run(script, "--train", "--resume", "--out", "run", cwd=tmp_path, changes=QUIET)
    assert_same_state(checkpoint, train(script).checkpoint)
    if script == "restoreformer":                                      # what stage 1 learned
        assert_same_state(checkpoint.with_name("dictionary.pt"), train(script).folder / "dictionary.pt")
    assert common.load_weights(checkpoint)["seconds"] > saved["seconds"]


@pytest.mark.slow
def test_resume_with_more_steps_goes_on_with_the_recorded_data_and_leaves_ended_stages_ended(
        trained, run, tmp_path):
    folder, script = copy_run(trained, tmp_path / "run"), importlib.import_module(trained.script)
    before = snapshot(folder)
    run(trained.script, "--train", "--resume", "--steps", 8, "--out", folder, cwd=tmp_path, changes=QUIET)
    begun, state = (common.load_weights(place / "checkpoint.pt") for place in (trained.folder, folder))
    assert [row["step"] for row in state["rows"]][-2:] == [6, 8] and state["step"] == 8
    assert read_json(folder / "config.json")["steps"] == 8
    for name in ("warp_steps", "stage"):                             # GFRNet's, RestoreFormer's
        assert state.get(name) == begun.get(name)
    for name in ("stage_ends", "dictionary_steps"):                  # DMDNet's, RestoreFormer's
        one, two = (getattr(script.Config(**each["config"]), name, None) for each in (begun, state))
        assert one == two
    assert snapshot(folder).get("dictionary.pt") == before.get("dictionary.pt")


@pytest.mark.slow
@only("dfdnet")
def test_resume_takes_the_same_faces_elsewhere_and_no_corrected_landmarks(trained, run, people, tmp_path):
    folder, faces = copy_run(trained, tmp_path / "run"), tmp_path / "faces"
    shutil.copytree(people, faces)
    resume = ["--train", "--resume", "--out", folder]
    run("dfdnet", *resume, "--steps", 8, "--data", faces, cwd=tmp_path, changes=QUIET)
    marks = faces / "anna" / "0.png.txt"
    points = common.read_landmarks(marks)
    common.write_landmarks(marks, points + 1)
    before = snapshot(folder)
    for command in (resume, [*resume, "--data", faces], ["--evaluate", "--out", folder]):
        done = run("dfdnet", *command, cwd=tmp_path, status=2)
        assert_refused(done, "dfdnet", "not the faces.*checkpoint.pt")
        assert snapshot(folder) == before


@only("dfdnet")
def test_a_run_stopped_by_ctrl_c_says_how_to_go_on(trained, run, people, tmp_path):
    interrupted = "def stop(*a): raise KeyboardInterrupt\ncommon.Run.log = stop"
    done = run("dfdnet", "--train", "--data", people, cwd=tmp_path, changes=interrupted, status=130)
    assert "--resume" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_checkpoint_without_one_of_its_parts_is_refused_in_a_line(trained, train, tmp_path, monkeypatch):
    """DFDNet's has what all checkpoints have."""
    monkeypatch.chdir(tmp_path)
    folder = copy_run(trained, tmp_path / "run")
    whole = common.load_weights(trained.checkpoint)
    before = snapshot(folder)
    parts = set(whole) - {"frozen" if trained.script == "dfdnet" else "warp_steps"}    # can do without it
    if trained.script != "dfdnet":
        parts -= set(common.load_weights(train("dfdnet").checkpoint))
    for part in parts:
        torch.save({name: value for name, value in whole.items() if name != part}, tmp_path / "part.pt")
        if (folder / "dictionary.pt").is_file():
            shutil.copy(folder / "dictionary.pt", tmp_path)
        expected = ".*" if part in ("script", "dictionary_key") else f'holds no part "{part}"'
        resume = ["--train", "--resume", "--checkpoint", "part.pt", "--out", folder, "--device", "cpu"]
        assert_main_refuses(trained.script, resume, expected)
        assert snapshot(folder) == before


# Several processes

# Adam divides a gradient by its size: where it is nearly 0 the order of a sum would decide on a whole step.
SMOOTH = "adam = torch.optim.Adam; torch.optim.Adam = lambda *a, **b: adam(*a, eps=1e-2, **b)\n"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["dfdnet", "asffnet", "dmdnet", "restoreformer"])
def test_two_processes_equal_one_of_twice_their_batch(script, run, people, tmp_path):
    """GFRNet's batch normalisation sees the pictures of its own process only. So do RestoreFormer's restarts,
    which the first process decides."""
    arguments = ["--train", "--data", people, "--steps", 4, "--precision", "float32", "--out"]
    changes = QUIET + SMOOTH + ("tiny(restart_every=0)" if script == "restoreformer" else "")
    run(script, *arguments, "one", "--batch", 4, cwd=tmp_path, changes=changes)
    first, second = run(script, *arguments, "two", cwd=tmp_path, changes=changes, processes=2)
    assert "step 4: validation" in first.stdout and second.stdout == ""
    assert_same_state(*(tmp_path / name / "checkpoint.pt" for name in ("one", "two")), near=1e-5)


@pytest.mark.slow
@only("dfdnet")
def test_a_loss_that_is_not_finite_in_one_process_stops_both(trained, run, people, tmp_path):
    """The last good checkpoint stays. Only the process that is second finds the loss."""
    planted = """
log = common.Run.log
def spoiled(run, step, losses):
    if step == 4 and common.rank() == 1:
        losses["pixel"] = losses["pixel"] * float("inf")
    log(run, step, losses)
common.Run.log = spoiled
"""
    first, second = run("dfdnet", "--train", "--data", people, "--out", "run", cwd=tmp_path,
                        changes=planted, processes=2, status=2, seconds=100)
    assert_refused(first, "dfdnet", "step 4: the pixel loss is not finite.*checkpoint.pt")
    assert second.stderr == ""
    assert common.load_weights(tmp_path / "run" / "checkpoint.pt")["step"] == 2


@pytest.mark.slow
@only("dfdnet")
def test_rates_stay_equal_where_validations_differ_between_processes(trained, run, people, tmp_path):
    """The first process sees losses that rise, the second one losses that fall."""
    planted = """
tiny(patience=0, validate_every=1)
losses = iter(range(1, 9))
script.validate = lambda *a: {"validation": (1 - 2 * common.rank()) * float(next(losses))}
rates = []
set_rate = common.set_rate
def note(rate, *optimizers):
    rates.append(rate)
    set_rate(rate, *optimizers)
common.set_rate = note
def report(run, *a):
    print(run.factor, rates)
common.report = report
script.evaluate = script.samples = lambda *a: None
"""
    first, second = run("dfdnet", "--train", "--data", people, cwd=tmp_path, changes=planted, processes=2)
    line = second.stdout.splitlines()[-1]
    assert line.startswith("0.03125 ") and line == first.stdout.splitlines()[-1]       # 0.5 to the power of 5


def test_process_0_may_take_hours_while_the_others_wait(monkeypatch):
    begun = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda kind, timeout: begun.update(kind=kind, hours=timeout.total_seconds() / 3600))
    common._start_processes(torch.device("cpu"))
    assert begun["kind"] == "gloo" and begun["hours"] >= 6


@pytest.mark.slow
@only("dfdnet")
def test_torchrun_trains_on_two_processes_and_only_the_first_one_writes(trained, people, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
               str(free_port()), DRIVER, "dfdnet", f"tiny({SHARED}, {TINY['dfdnet']})", "--train", "--data",
               people, "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=SETTINGS, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("^step 6: validation", done.stdout, re.M)) == 1
    state = common.load_weights(tmp_path / "runs" / "dfdnet" / "checkpoint.pt")
    assert state["step"] == 6 and not [name for name in state["net"] if name.startswith("module.")]
    assert read_json(tmp_path / "runs" / "dfdnet" / "result.json")["steps"] == 6


# Bad input: each case is a function of the prepared folder: the arguments and words of the message

MARKS = [f"{20 + i % 8 * 3} {20 + i // 8 * 3}" for i in range(68)]


def image(size=(64, 64)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8))


def folder_of(work, *names):
    """A folder `data` with these pictures."""
    for name in names:
        (work / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        image().save(work / "data" / name)
    return ["--train", "--data", work / "data", "--aligned"]


def photo(work, landmarks=MARKS, size=(64, 64)):
    image(size).save(work / "face.png")
    if landmarks is not None:
        (work / "face.png.txt").write_text("\n".join(landmarks))
    return ["--restore", work / "face.png"]


def written(name, content):
    """A case: this file is to be restored as an aligned crop."""
    def case(work):
        (work / name).write_bytes(content)
        return ["--restore", work / name, "--aligned"], f"{name}.*not a readable picture"
    return case


def marked(landmarks, expected):
    """A case: a photo with these landmarks."""
    return lambda work: (photo(work, landmarks), expected)


def options(*words, expected):
    """A case: these words."""
    return lambda work: (list(words), expected)


def flat_data_folder(work):
    arguments = folder_of(work, *(f"{number}.png" for number in range(8)))
    for number in range(8):
        (work / "data" / f"{number}.png.txt").write_text("\n".join(MARKS))
    return arguments, "several pictures"


def one_picture_a_person(work):
    arguments = folder_of(work, *(f"{number}/0.png" for number in range(8)))
    for number in range(8):
        (work / "data" / f"{number}" / "0.png.txt").write_text("\n".join(MARKS))
    return arguments, "several pictures"


def other_checkpoint(content, expected, resumed=False):
    """A case: other.pt is content(checkpoint)."""
    def case(work):
        torch.save(content(common.load_weights(work / "checkpoint.pt")), work / "other.pt")
        start = ["--train", "--resume"] if resumed else photo(work)
        return [*start, "--checkpoint", work / "other.pt"], f"other.pt.*{expected}"
    return case


def truncated_checkpoint(resumed=False):
    def case(work):
        (work / "half.pt").write_bytes((work / "checkpoint.pt").read_bytes()[:20_000])
        start = ["--train", "--resume"] if resumed else photo(work)
        return [*start, "--checkpoint", work / "half.pt"], "half.pt.*damaged"
    return case


def missing_checkpoint(work):
    return [*photo(work), "--checkpoint", work / "none.pt"], "none.pt.*no such checkpoint"


def checkpoint_of_another_preset(work):
    return [*photo(work), "--preset", "paper"], "checkpoint.pt.*preset tiny.*paper"


def dictionary(content, expected, resumed=False):
    """A case: the checkpoint beside such a dictionary.pt."""
    def case(work):
        (work / "alone").mkdir()
        shutil.copy(work / "checkpoint.pt", work / "alone")
        content(work / "dictionary.pt", work / "alone" / "dictionary.pt")
        start = ["--train", "--resume", "--out", work] if resumed else photo(work)
        return [*start, "--checkpoint", work / "alone" / "checkpoint.pt"], f"dictionary.pt.*{expected}"
    return case


def truncated(source, target):
    target.write_bytes(source.read_bytes()[:5000])


def of_another_run(source, target):
    torch.save(common.load_weights(source) | {"key": "another"}, target)


def out_folder_below_a_file(work):
    (work / "file").write_text("in the way")
    return [*photo(work), "--out", work / "file" / "below"], "file/below.*cannot be written"


def train_folder_below_a_file(work):
    (work / "file").write_text("in the way")
    return ["--train", "--data", work / "people", "--out", work / "file" / "below"], \
        "file/below.*cannot be written"


def cuda_without_one(work):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    return ["--train", "--device", "cuda"], "--device cuda"


def references(content, expected):
    """A case: --reference is a folder, filled by `content`; or a name in it."""
    def case(work):
        (work / "sharp").mkdir()
        name = content(work / "sharp")
        return [*photo(work), "--reference", work / "sharp" / (name or "")], expected
    return case


def no_picture(folder):
    (folder / "0.png").write_text("no picture")


def bare_picture(folder):
    image().save(folder / "0.png")
    return "0.png"


def resumed(*words, expected):
    """A case: --resume of the run in the prepared folder, with these words."""
    return options("--train", "--resume", "--out", ".", *words, expected=expected)


EVERYWHERE = {
    "resumed_with_other_faces": resumed("--data", "others", expected="not the faces.*checkpoint.pt"),
    "resumed_with_another_variant": resumed("--variant", "other", expected="variant"),
    "missing_data_folder": options("--train", "--data", "nowhere", expected="nowhere.*no such folder"),
    "missing_checkpoint": missing_checkpoint,
    "train_folder_below_a_file": train_folder_below_a_file}
OF_COMMON = {
    "resumed_with_other_landmarks": resumed("--landmarks", "people/anna", expected="not the faces"),
    "resumed_with_aligned_faces": resumed("--aligned", expected="not the faces"),
    "resumed_with_another_vggface": resumed("--vggface", "v.pth", expected="--vggface cannot change"),
    "resumed_with_other_dictionary_faces": resumed("--dictionary-data", "others",
                                                   expected="--dictionary-data cannot change"),
    "resumed_with_another_batch": resumed("--batch", "4", expected="--batch cannot change"),
    "resumed_with_another_seed": resumed("--seed", "4", expected="--seed cannot change"),
    "resumed_with_another_row": resumed("--variant", "k16", expected="checkpoint.pt.*variant full.*k16"),
    "resume_without_train": options("--evaluate", "--resume", expected="--resume belongs to --train"),
    "degradation_to_train_with": options("--train", "--degradation", "gfrnet",
                                         expected="belongs to --evaluate"),
    "degradation_to_restore_with": options("--restore", "x.png", "--degradation", "gfrnet",
                                           expected="belongs to --evaluate"),
    "all_rows_restored": options("--restore", "a.png", "--variant", "all", expected="all belongs to --train"),
    "all_rows_resumed": options("--train", "--variant", "all", "--resume", expected="all belongs to --train"),
    "seeds_of_one_row": options("--train", "--seeds", "3", expected="--seeds belongs to --variant all"),
    "evaluated_on_people_it_knows": options("--evaluate", "--out", ".", "--data", "known",
                                            expected="known: has no person"),
    "missing_picture": options("--restore", "nobody.png", expected="nobody.png.*no such file"),
    "text_named_jpg": written("face.jpg", b"Dear diary,"),
    "two_faces_and_a_bit": marked(MARKS * 2 + MARKS[:1], "face.png.txt.*137 landmarks"),
    "landmarks_that_are_words": marked(["nose left"] * 68, "face.png.txt.*not a landmark file"),
    "no_landmarks": marked(None, "face.png.*--aligned"),
    "checkpoint_of_another_method": other_checkpoint(
        lambda state: state | {"script": "othernet"}, "othernet"),
    "resumed_checkpoint_of_another_method": other_checkpoint(
        lambda state: state | {"script": "othernet"}, "othernet", resumed=True),
    "checkpoint_of_another_version": other_checkpoint(
        lambda state: state | {"config": {"colour": "red"}}, "another version"),
    "plain_weights_as_checkpoint": other_checkpoint(lambda state: state["net"], "not a checkpoint"),
    "checkpoint_of_another_preset": checkpoint_of_another_preset,
    "truncated_checkpoint": truncated_checkpoint(),
    "resumed_truncated_checkpoint": truncated_checkpoint(resumed=True),
    "missing_dictionary": dictionary(lambda source, target: None, "missing"),
    "truncated_dictionary": dictionary(truncated, "damaged"),
    "dictionary_of_another_run": dictionary(of_another_run, "not the dictionaries"),
    "resumed_with_another_dictionary": dictionary(of_another_run, "not the dictionaries", resumed=True),
    "out_folder_below_a_file": out_folder_below_a_file,
    "cuda_without_one": cuda_without_one,
    "unknown_device": options("--train", "--device", "abacus", expected="abacus"),
    "unknown_precision": options("--evaluate", "--precision", "half", expected="--precision.*half"),
    "unknown_preset": options("--train", "--preset", "huge", expected="huge"),
    "unknown_option": options("--train", "--colour", "red", expected="--colour"),
    "no_action": options(expected="--train"),
    "two_actions": options("--train", "--evaluate", expected="--evaluate"),
    "small_size": options("--train", "--size", "32", expected="32.*at least 64"),
    "zero_size": options("--train", "--size", "0", expected="--size"),
    "size_that_is_no_number": options("--train", "--size", "big", expected="--size.*big"),
    "zero_steps": options("--train", "--steps", "0", expected="--steps"),
    "negative_batch": options("--train", "--batch", "-1", expected="--batch"),
    "negative_workers": options("--train", "--workers", "-1", expected="--workers"),
    "negative_seed": options("--train", "--seed", "-3", expected="--seed")}
OF_REFERENCES = {
    "missing_reference": references(lambda folder: "nobody.png", "nobody.png.*no such file"),
    "references_without_pictures": references(lambda folder: None, "sharp.*no pictures"),
    "reference_that_is_no_picture": references(no_picture, "0.png.*not a readable"),
    "reference_without_landmarks": references(bare_picture, "0.png.*landmarks")}
BAD_INPUT = {
    "dfdnet": {**EVERYWHERE, **OF_COMMON},
    "gfrnet": {**EVERYWHERE, **OF_REFERENCES, "flat_data_folder": flat_data_folder,
               "one_picture_a_person": one_picture_a_person},
    "asffnet": {**EVERYWHERE, "missing_reference": OF_REFERENCES["missing_reference"]},
    "dmdnet": {**EVERYWHERE, "missing_reference": OF_REFERENCES["missing_reference"],
               "dictionary_of_nobody": options("--save-dictionary", "person.pt", "--checkpoint",
                                               "checkpoint.pt", expected="wants --reference"),
               "dictionary_that_is_a_checkpoint": lambda work: (
                   [*photo(work), "--dictionary", work / "checkpoint.pt"], "checkpoint.pt.*not a dict")},
    "restoreformer": {**EVERYWHERE,
                      "stage_three": options("--train", "--stage", "3", expected="--stage"),
                      "stage_of_no_training": options("--evaluate", "--out", ".", "--stage", "1",
                                                      expected="--stage")}}
for name, about in SCRIPTS.items():
    number, rule = about.size
    BAD_INPUT[name]["odd_size"] = options("--train", "--size", str(number), expected=f"{number}.*{rule}")


@pytest.mark.slow
@pytest.mark.parametrize("trained, case", [(name, case) for name in SCRIPTS for case in BAD_INPUT[name]],
                         indirect=["trained"])
def test_bad_input_ends_with_one_line_and_nothing_lost(trained, case, people, tmp_path, monkeypatch):
    work = copy_run(trained, tmp_path / "work")
    (work / "people").symlink_to(people)
    (work / "known" / "anna").mkdir(parents=True)
    (work / "others").mkdir()
    shutil.copy(people / "anna" / "0.png", work / "known" / "anna")
    shutil.copy(people / "anna" / "0.png.txt", work / "known" / "anna")
    for name in ("una", "emil", "anna"):                      # of the same names, but fewer
        (work / "others" / name).symlink_to(people / name)
    (work / "restored").mkdir()
    (work / "restored" / "old.png").write_text("kept")
    arguments, expected = BAD_INPUT[trained.script][case](work)
    if "--restore" in arguments and not {"--checkpoint", "--weights"} & set(arguments):
        arguments += ["--checkpoint", work / "checkpoint.pt"]
    if "--restore" in arguments and not {"--reference", "--dictionary"} & set(arguments):
        arguments += trained.reference
    if not {"--device", "--evaluate"} & set(arguments):
        arguments += ["--device", "cpu"]
    script = importlib.import_module(trained.script)
    changes = eval(f"dict({SHARED}, {TINY[trained.script]})")
    monkeypatch.setitem(script.PRESETS, "tiny", replace(script.PRESETS["tiny"], **changes))
    monkeypatch.chdir(work)
    before = snapshot(work)
    assert_main_refuses(trained.script, arguments, expected)
    after = snapshot(work)
    assert {name: after.get(name) for name in before} == before


@only("dfdnet")
def test_a_checkpoint_that_holds_code_is_refused_and_never_run(trained, run, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    image().save(tmp_path / "face.png")
    state = common.load_weights(trained.checkpoint)
    torch.save(state | {"rows": Attack()}, tmp_path / "evil.pt")
    restoring = ["--restore", tmp_path / "face.png", "--aligned"]
    for action in (restoring, ["--evaluate"], ["--train", "--resume"]):
        done = run("dfdnet", *action, "--checkpoint", tmp_path / "evil.pt", cwd=tmp_path, status=2)
        assert_refused(done, "dfdnet", "evil.pt")
        assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.slow
def test_the_script_as_a_process_ends_like_that_too(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "dfdnet.py", "--train", "--data", tmp_path / "nowhere"],
                          cwd=tmp_path, env=SETTINGS, text=True, capture_output=True, timeout=300)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nowhere" in done.stderr


# What a network does when it restores

def test_for_inference_of_a_network_in_training_mode_changes_nothing():
    """Folding in training mode would take one more step of the power iteration."""
    torch.manual_seed(0)
    net = nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 3)), nn.LeakyReLU(0.2), nn.BatchNorm2d(4))
    picture = torch.randn(2, 3, 8, 8)
    net(picture)
    with torch.no_grad():
        expected = net.eval()(picture)
    restored = common.for_inference(net.train(), "cpu", "float32")
    assert not [name for name, _ in restored.named_parameters() if "parametrizations" in name]
    torch.testing.assert_close(restored(picture), expected, rtol=0, atol=1e-6)
    with common.inference(restored.train(), "float32"):
        torch.testing.assert_close(restored(picture), expected, rtol=0, atol=1e-6)
    assert restored.training


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError(), MemoryError(), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you")])
def test_a_batch_is_halved_when_the_memory_is_full(error, capsys):
    asked = []

    def call(part):
        asked.append((part.start, part.stop))
        if part.stop - part.start > 3:
            raise error
        return torch.arange(10)[part], None

    numbers, nothing = common.in_batches(call, 10, 8)
    assert numbers.tolist() == list(range(10)) and nothing is None
    assert asked == [(0, 8), (0, 4), (0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    assert capsys.readouterr().err.splitlines()[-1] == "out of memory: going on with 2 faces at a time"

    def never(part):
        raise error
    with refused("not enough memory for one face.*--device cpu"):
        common.in_batches(never, 1, 1)
    error = RuntimeError("another")
    with pytest.raises(RuntimeError, match="another"):
        common.in_batches(never, 1, 1)
