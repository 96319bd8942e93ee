"""Photographs: faces found, restored in batches, pasted back; folders; what can go wrong on the way."""
import errno
import importlib.util
import math
import os
import signal
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
from common import InputError

DETECTOR = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("dlib", "face_recognition_models")),
    reason="needs dlib and face_recognition_models")


def scene(faces, size, angles=(0, 20, -30), height=400, width=900):
    """Faces of `size` pixels, each turned by its angle, in a row on a smooth ground → photo, landmarks."""
    noise = torch.rand(1, 3, 4, 8, generator=common.seeded(3)) - 0.5
    photo = F.interpolate(noise, (height, width), mode="bicubic")[0]
    points = []
    for k, (face, angle) in enumerate(zip(faces, angles)):
        scale = size / face.image.shape[-1]
        turn = math.radians(angle)
        part = scale * torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        middle = torch.tensor([(face.image.shape[-1] - 1) / 2] * 2)
        place = torch.tensor([width * (k + 0.5) / len(angles), height / 2])
        matrix = torch.cat([part, (place - part @ middle)[:, None]], 1)
        cover = common.warp_affine(torch.ones_like(face.image[:1]), matrix, height, width)
        photo = photo + cover * (common.warp_affine(face.image, matrix, height, width, "border") - photo)
        points.append(common.transform_points(face.landmarks, matrix))
    return photo, torch.stack(points)


@pytest.fixture(scope="module")
def faces():
    people = common.RenderedFaces(128, identities=12, per_identity=1, seed=11)
    return [people[i] for i in range(12)]


def options(source, out, **more):
    """What parse() makes of a command line that restores."""
    values = {"restore": source, "out": Path(out), "landmarks": None, "aligned": False, "overwrite": False,
              "check": False, "workers": 0, "device": torch.device("cpu")}
    return SimpleNamespace(**values | more)


class Brighter:
    """A restoration that is easy to see; it keeps how many faces it got at a time, of which files."""

    def __init__(self):
        self.counts = []
        self.files = []

    def __call__(self, crops, landmarks, files):
        assert len(crops) == len(landmarks) == len(files)
        self.counts.append(len(crops))
        self.files += files
        return (crops + 0.2).clamp(-1, 1), {"seen": crops.flip(3)}


# ---------------------------------------------------------------------------------- Faces are found

@DETECTOR
@pytest.mark.parametrize("size, angles", [(128, (0, 20, -30)), (72, (0, 10, -15)), (300, (15, 0, -20))])
def test_three_faces_of_one_picture_are_found_small_and_turned(faces, size, angles):
    """Their landmarks are off by less than a fifth of the distance between the eyes."""
    for first in (0, 3, 6):
        photo, points = scene(faces[first:first + 3], size, angles)
        found = common.detect_landmarks(photo)
        assert len(found) == 3
        found = found[found.mean(1)[:, 0].argsort()]
        eyes = (points[:, 36:42].mean(1) - points[:, 42:48].mean(1)).norm(dim=1)
        error = (found - points).norm(dim=2).mean(1) / eyes
        assert (error < 0.3).all() and error.mean() < 0.2, error


@DETECTOR
def test_the_largest_face_comes_first_and_no_face_is_an_error(faces):
    photo, points = scene(faces[:1], 130, angles=(0,))
    second, other = scene(faces[3:4], 220, angles=(0,))
    found = common.detect_landmarks(torch.cat([photo, second], 2))
    extent = (found.amax(1) - found.amin(1)).prod(1)
    assert len(found) == 2 and extent[0] > 1.5 * extent[1]
    assert found[0].mean(0)[0] > 900 > found[1].mean(0)[0]
    with pytest.raises(common._NoFaceError, match="wall.png: no face found.*wall.png.txt"):
        common.detect_landmarks(torch.zeros(3, 200, 200), name="wall.png")


@DETECTOR
def test_a_photo_without_landmarks_is_restored_where_its_faces_are(faces, tmp_path):
    """What was found lies beside the result; corrected there, it is what --landmarks takes."""
    photo, points = scene(faces[:3], 160)
    common.write_image(tmp_path / "group.png", photo)
    out = tmp_path / "restored"
    assert common.restore_files(options(tmp_path / "group.png", out), 64, Brighter()) == 0
    result = common.read_image(out / "group.png")
    shape = photo.shape[1:]
    change = F.interpolate((result - F.interpolate(photo[None], result.shape[1:])[0])[None], shape)[0].mean(0)
    inside = torch.zeros(shape, dtype=torch.bool)
    for face in points:
        x, y = face[27:].mean(0).round().long()
        assert change[y - 15:y + 15, x - 15:x + 15].mean().abs() < 0.25
        inside[y - 150:y + 150, x - 150:x + 150] = True
    assert change[~inside].abs().max() < 0.02

    found = common.read_landmarks(out / "group.png.txt", shape, several=True)
    assert len(found) == 3
    common.write_landmarks(out / "group.png.txt", found[:1])          # by hand: one face only
    seen = Brighter()
    common.restore_files(options(tmp_path / "group.png", out, landmarks=out, overwrite=True), 64, seen)
    assert seen.counts == [1]


@DETECTOR
def test_the_faces_of_a_folder_are_looked_for_once_and_the_largest_kept(faces, tmp_path, monkeypatch):
    for number in range(6):
        common.write_image(tmp_path / "data" / f"person_{number}" / "0.png", faces[number].image)
    calls = []
    detect = common.detect_landmarks
    monkeypatch.setattr(common, "detect_landmarks", lambda *a: calls.append(a) or detect(*a))
    first = common.FaceFolder(tmp_path / "data", 128)
    assert len(calls) == 6
    again = common.FaceFolder(tmp_path / "data", 128)
    assert len(calls) == 6 and again.fingerprint == first.fingerprint
    for one, other, face in zip(first, again, faces):
        assert torch.equal(one.landmarks, other.landmarks)
        assert (one.landmarks - face.landmarks).norm(dim=1).mean() < 10
    file = tmp_path / "data" / "person_0" / "0.png"
    os.utime(file, (1, 1))                                            # another file of that name
    common.FaceFolder(tmp_path / "data", 128)
    assert len(calls) == 7


def test_a_picture_without_a_face_is_not_searched_twice(faces, tmp_path, monkeypatch):
    searched = []

    def nobody(image, device, name, aligned=False):
        searched.append(name)
        raise common._NoFaceError(f"{name}: no face found")
    monkeypatch.setattr(common, "detect_landmarks", nobody)
    common.write_image(tmp_path / "data" / "a.png", torch.zeros(3, 32, 32))
    for _ in range(2):
        with pytest.raises(InputError, match="a.png: no face found"):
            common.FaceFolder(tmp_path / "data", 32)
    assert len(searched) == 1


# -------------------------------------------------------------------------------- Cut out and pasted

@pytest.mark.parametrize("shrink", [1.5, 1.9, 2.6])
def test_a_shrunk_crop_has_no_aliases(shrink):
    """Stripes finer than its pixels vanish, by whatever factor it shrinks; wide ones stay."""
    side = 240
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    size = round(side / shrink)
    matrix = torch.tensor([[1 / shrink, 0, 0], [0, 1 / shrink, 0]])
    fine = torch.sin(2 * math.pi * x / (1.25 * shrink))[None]
    wide = torch.sin(2 * math.pi * x / (16 * shrink))[None]
    inner = slice(8, size - 8)

    def energy(image):
        return common.warp_affine(image, matrix, size, size, "border")[:, inner, inner].square().mean().item()

    assert energy(fine) < 0.02 * 0.5                       # bilinear sampling alone: ten times as much
    assert energy(wide) > 0.8 * 0.5


def test_pasting_takes_the_colours_of_the_photo_over_the_seam():
    """A crop in another light comes back in the photo's; a crop that fits stays as it is."""
    photo = torch.linspace(-0.5, 0.5, 200).expand(3, 150, 200).clone()
    matrix = torch.tensor([[0.8, 0.1, -20.0], [-0.1, 0.8, -10.0]])
    crop = common.warp_affine(photo, matrix, 64, 64, "border")
    middle = torch.tensor([0.3, 0.1, -0.2])[:, None, None]             # a cast over all of it
    pasted = common.paste_face(photo, crop + middle, matrix)
    assert (pasted - photo).abs().max() < 0.03
    detail = torch.zeros_like(crop)
    detail[:, 28:36, 28:36] = 0.4                                      # inside it may be what it wants
    pasted = common.paste_face(photo, crop + middle + detail, matrix)
    inverse = common.invert_matrix(matrix)
    place = common.transform_points(torch.tensor([[32.0, 32.0]]), inverse)[0].round().long()
    change = (pasted - photo)[:, place[1], place[0]]
    torch.testing.assert_close(change, torch.full((3,), 0.4), atol=0.03, rtol=0)


@pytest.mark.parametrize("shift", [(-60, 0), (0, -45), (70, 60), (500, 0)])
def test_a_face_at_the_border_or_beside_it_leaves_a_whole_picture(shift):
    """Only its part inside is changed; far outside nothing is."""
    photo = torch.zeros(3, 120, 140)
    matrix = torch.tensor([[0.6, 0.0, -10.0], [0.0, 0.6, -5.0]])
    matrix[:, 2] -= 0.6 * torch.tensor(shift)
    bump = torch.zeros(3, 64, 64)
    bump[:, 20:44, 20:44] = 0.5
    pasted = common.paste_face(photo, bump, matrix)
    assert pasted.shape == photo.shape and pasted.isfinite().all()
    places = torch.stack(torch.meshgrid(torch.arange(140), torch.arange(120), indexing="xy"), -1).float()
    inside = common.transform_points(places, matrix)
    middle = ((inside > 22) & (inside < 41)).all(-1)
    assert (pasted[:, middle] > 0.4).all()
    assert pasted[:, ((inside < -1) | (inside > 64)).any(-1)].abs().max() == 0


# ------------------------------------------------------------------------------------------- Folders

@pytest.fixture
def album(faces, tmp_path):
    """Seven pictures with landmarks beside them, in a folder and two folders in it."""
    root = tmp_path / "photos"
    places = ["a.png", "b.png", "one/a.png", "one/deep/a.jpg", "one/deep/a.png", "two/c.png", "two/d.png"]
    for face, place in zip(faces, places):
        file = root / place
        common.write_image(file, F.interpolate(face.image[None], (48, 48))[0])
        common.write_landmarks(file.with_name(f"{file.name}.txt"), face.landmarks * 48 / 128)
    return root


WRITTEN = {"a.png", "b.png", "one/a.png", "one/deep/a.jpg.png", "one/deep/a.png.png", "two/c.png",
           "two/d.png"}


def pictures(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.png")}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_keeps_its_shape_and_is_restored_in_batches(album, tmp_path, workers, capsys):
    restoration = Brighter()
    assert common.restore_files(options(album, tmp_path / "out", workers=workers), 32, restoration) == 0
    assert set(pictures(tmp_path / "out")) == WRITTEN
    assert restoration.counts == [7] and [file.name for file in restoration.files][:2] == ["a.png", "b.png"]
    assert "7 restored, 0 skipped" in capsys.readouterr().out
    for file in restoration.files:                                    # one by one it is the same
        common.restore_files(options(file, tmp_path / "single" / file.parent.name), 32, Brighter())
    one = common.read_image(tmp_path / "single" / "two" / "d.png")
    torch.testing.assert_close(one, common.read_image(tmp_path / "out" / "two" / "d.png"), atol=0.01, rtol=0)


def test_references_are_those_of_the_folder_alone_not_of_other_folders_in_it(album):
    """Folders in it may be of other people."""
    _, _, used = common.read_references(album, 32, options(album, album))
    assert [file.name for file in used] == ["a.png", "b.png"]


def test_results_inside_the_folder_are_not_restored_again(album, capsys):
    for skipped in (0, 7):
        assert common.restore_files(options(album, album / "restored"), 32, Brighter()) == 0
        assert f"{7 - skipped} restored, {skipped} skipped" in capsys.readouterr().out
    assert set(pictures(album / "restored")) == WRITTEN


def test_broken_files_are_named_in_the_end_and_the_rest_goes_on_where_it_was(album, tmp_path, capsys):
    whole = (album / "b.png").read_bytes()
    (album / "b.png").write_bytes(whole[:300])
    (album / "two" / "c.png.txt").write_text("no landmarks")
    out = tmp_path / "out"

    def stops(crops, landmarks, files):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        common.restore_files(options(album, out), 32, stops)
    assert common.restore_files(options(album, out), 32, Brighter()) == 2
    done = capsys.readouterr()
    assert "b.png: not a readable picture" in done.err and "c.png.txt: not a landmark file" in done.err
    assert "5 restored, 0 skipped" in done.out and "2 failed" in done.out
    assert set(pictures(out)) == WRITTEN - {"b.png", "two/c.png"}
    (album / "b.png").write_bytes(whole)
    seen = Brighter()
    assert common.restore_files(options(album, out), 32, seen) == 1 and seen.counts == [1]


def test_photos_wait_for_a_batch_but_not_for_more_pixels_than_fit(album, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "_PIXELS_AT_ONCE", 2 * 48 * 48)
    seen = Brighter()
    common.restore_files(options(album, tmp_path / "out"), 32, seen)
    assert sum(seen.counts) == 7 and max(seen.counts) == 3
    monkeypatch.setattr(common, "_RESTORED_AT_ONCE", 2)
    seen = Brighter()
    common.restore_files(options(album, tmp_path / "out", overwrite=True), 32, seen)
    assert seen.counts == [2, 2, 2, 1]


def test_check_shows_what_the_method_leaned_on(album, tmp_path):
    common.restore_files(options(album / "a.png", tmp_path / "out", check=True), 32, Brighter())
    sheet = common.read_image(tmp_path / "out" / "a_check.png")
    assert sheet.shape[2] > 3 * 32                                    # input | seen | restored
    common.restore_files(options(album / "a.png", tmp_path / "plain", check=True), 32,
                         lambda crops, landmarks, files: (crops, {}))
    assert common.read_image(tmp_path / "plain" / "a_check.png").shape[2] < sheet.shape[2]


def test_detected_landmarks_are_written_and_given_ones_are_not(album, tmp_path, monkeypatch):
    points = common.read_landmarks(album / "b.png.txt")
    (album / "b.png.txt").unlink()
    monkeypatch.setattr(common, "_landmark_detector",
                        lambda device: lambda pixels: [points.numpy(), points.numpy() * 0.5 + 3])
    common.restore_files(options(album, tmp_path / "out"), 32, Brighter())
    assert [file.name for file in (tmp_path / "out").rglob("*.txt")] == ["b.png.txt"]
    found = common.read_landmarks(tmp_path / "out" / "b.png.txt", several=True)
    torch.testing.assert_close(found, torch.stack([points, points * 0.5 + 3]), atol=1e-3, rtol=0)
    nested = common._find_landmarks(album / "one" / "deep" / "x.png", tmp_path / "out")
    assert nested is None
    common.write_landmarks(tmp_path / "out" / "one" / "deep" / "x.png.txt", points)
    nested = common._find_landmarks(album / "one" / "deep" / "x.png", tmp_path / "out")
    assert nested == tmp_path / "out" / "one" / "deep" / "x.png.txt"


# ------------------------------------------------------------------------------------ What goes wrong

@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_script_out_of_memory_ends_with_one_line(error, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dfdnet.py"])

    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        common.run_script(main)
    assert end.value.code == 2
    assert capsys.readouterr().err == "dfdnet.py: not enough memory; use a smaller --batch or --size\n"
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.slow
def test_a_full_disk_ends_a_training_in_a_line_and_leaves_the_last_checkpoint(people, run, tmp_path):
    """The first checkpoint fits the disk. The second does not: no file may have more bytes than the first."""
    planted = """
import os, resource, signal
save = common.Run.save
def full(run, step, *a):
    if step > 2:
        run.parts["ballast"] = torch.zeros(1_000_000)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = os.path.getsize(run.args.checkpoint)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    save(run, step, *a)
common.Run.save = full
"""
    done = run("dfdnet", "--train", "--data", people, "--out", "run", cwd=tmp_path, changes=planted, status=2)
    line, = done.stderr.splitlines()
    assert line.startswith("dfdnet.py: ") and "checkpoint.pt: cannot be written (File too large)" in line
    assert common.load_weights(tmp_path / "run" / "checkpoint.pt")["step"] == 2
    assert not [file.name for file in (tmp_path / "run").iterdir() if file.name.startswith(".")]


def test_a_full_disk_ends_a_folder_in_a_line_and_leaves_whole_pictures(album, tmp_path, monkeypatch):
    write = common.write_image

    def full(path, image):
        if path.name == "c.png":
            raise InputError(f"{path}: cannot be written ({os.strerror(errno.ENOSPC)}); choose another --out")
        write(path, image)
    monkeypatch.setattr(common, "write_image", full)
    with pytest.raises(InputError, match="c.png: cannot be written"):
        common.restore_files(options(album, tmp_path / "out"), 32, Brighter())
    assert set(pictures(tmp_path / "out")) >= WRITTEN - {"two/c.png", "two/d.png"}


@pytest.mark.slow
def test_sigterm_in_the_middle_of_writing_leaves_the_last_checkpoint_and_nothing_half_written(
        people, run, tmp_path):
    planted = """
import os, signal
save = torch.save
def stopped(state, file):
    if state.get("step") == 4:
        file.write(b"half")
        os.kill(os.getpid(), signal.SIGTERM)
    save(state, file)
torch.save = stopped
"""
    done = run("dfdnet", "--train", "--data", people, "--out", "run", cwd=tmp_path, changes=planted,
               status=143)
    assert "Traceback" not in done.stderr
    assert not [file.name for file in (tmp_path / "run").iterdir() if file.name.startswith(".")]
    assert common.load_weights(tmp_path / "run" / "checkpoint.pt")["step"] == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_sigterm_while_python_clears_an_object_away_stops_the_script_at_its_next_step(monkeypatch):
    """Python drops an exception that is raised there."""
    monkeypatch.setattr(common.Progress, "stop", None)
    steps = []

    def main():
        module = torch.nn.Identity()
        gone = weakref.ref(module, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        del module
        assert gone() is None                     # still running: the exception was dropped
        progress = common.Progress("training", 3)
        for step in range(1, 4):
            steps.append(step)
            progress.update(step)
    try:
        with pytest.raises(SystemExit) as end:
            common.run_script(main)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert end.value.code == 143 and steps == [1]


def test_a_second_training_in_a_folder_is_refused_and_leaves_it_as_it_is(people, run, tmp_path):
    with common._alone_in(tmp_path / "run"):
        done = run("dfdnet", "--train", "--data", people, "--out", "run", cwd=tmp_path, status=2)
        assert not (tmp_path / "run").exists()
        line, = done.stderr.splitlines()
        assert "another process trains in it" in line
    with common._alone_in(tmp_path / "run"):                              # free again
        pass


def test_two_processes_may_restore_into_one_folder(album, tmp_path):
    """Each writes whole files under names of its own; the second finds what the first left."""
    out = tmp_path / "out"
    inner = Brighter()

    def outer(crops, landmarks, files):
        common.restore_files(options(album, out), 32, inner)          # as if another process came first
        return Brighter()(crops, landmarks, files)
    assert common.restore_files(options(album, out), 32, outer) == 0
    assert set(pictures(out)) == WRITTEN and inner.counts == [7]
    for name in WRITTEN:
        assert np.isfinite(common.read_image(out / name).numpy()).all()
