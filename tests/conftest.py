"""Shared by all tests: a cache of their own, faces, the scripts' command lines, markers."""
import contextlib
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

# Before `common` is imported, which reads it: no test may read or change the user's cache.
CACHE = os.environ["FACE_RESTORATION_CACHE"] = tempfile.mkdtemp(prefix="face-restoration-tests-")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import common  # noqa: E402

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(os.cpu_count() or 1, 4))))

ROOT = Path(__file__).resolve().parent.parent
DRIVER = ROOT / "tests" / "driver.py"
SETTINGS = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}

# A Config of each script in which a few steps are cheap and reach every part of the training.
TINY = {
    "gfrnet": "width=4, discriminator_width=4, warp_share=0.4",
    "asffnet": "channels=16, width=4, discriminator_width=4, blocks=2, rank_every=2",
    "dfdnet": "entries=8, width=4, discriminator_width=4, kmeans_rounds=3",
    "dmdnet": "items=8, width=4, discriminator_width=4, stages=(0.25, 0.25, 0.25)",
    "restoreformer": "codes=16, code_channels=16, widths=(8, 8, 16), discriminator_width=4, restart_every=2"}
SHARED = "size=64, steps=6, batch=2, validate_every=2, validated=2, tested=3"

# For `run`: death where a step is logged.
KILLED = """
import os, signal
log = common.Run.log
def log_or_die(run, step, losses):
    if {}:
        os.kill(os.getpid(), signal.SIGKILL)
    log(run, step, losses)
common.Run.log = log_or_die
"""


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    """Uniform in [-1,1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def randomised(module, spread=0.1):
    """Every parameter random: some start at zero, which would hide what depends on them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return module


def some_encoder():
    """In the place of a trained recogniser: its deep features are as large as its shallow ones."""
    torch.manual_seed(1)
    net = common.Recogniser((6, 8, 10, 12)).folded()
    for layer in net.stages.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return net


def gap(gradients, expected):
    """The relative distance of two lists of gradients."""
    a, b = (torch.cat([g.flatten().double() for g in many]) for many in (gradients, expected))
    return ((a - b).norm() / b.norm()).item()


# Boxes that overlap and begin between the features.
OVERLAPPING = torch.tensor([
    [[1.3, 4.1, 14.7, 17.2], [11.2, 6.3, 25, 21], [9.1, 12.3, 20, 29.9], [0, 20.5, 22.2, 32]],
    [[5.3, 1.1, 20.2, 12.8], [15.2, 8.3, 31, 24], [2.1, 2.3, 30, 10.9], [3, 3.5, 9.2, 32]]])


def paste_by_loop(parts, boxes, stride, height, width):
    """Pixel by pixel the mean of bilinear samples of parts whose box holds its centre; and where."""
    result = torch.zeros(len(boxes), parts[0].shape[1], height, width)
    inside = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for n, y, x in np.ndindex(len(boxes), height, width):
        found = []
        for part, box in zip(parts, boxes[n], strict=True):
            x1, y1, x2, y2 = (box / stride).tolist()
            if x1 < x + 0.5 < x2 and y1 < y + 0.5 < y2:
                size = part.shape[-1]
                u = min(max((x + 0.5 - x1) / (x2 - x1) * size - 0.5, 0), size - 1)
                v = min(max((y + 0.5 - y1) / (y2 - y1) * size - 0.5, 0), size - 1)
                i, j = min(int(v), size - 2), min(int(u), size - 2)
                a, b = v - i, u - j
                found.append((1 - a) * (1 - b) * part[n, :, i, j] + (1 - a) * b * part[n, :, i, j + 1]
                             + a * (1 - b) * part[n, :, i + 1, j] + a * b * part[n, :, i + 1, j + 1])
        if found:
            result[n, :, y, x] = sum(found) / len(found)
            inside[n, y, x] = True
    return result, inside


@contextlib.contextmanager
def refused(expected):
    """What is inside ends in an InputError of one line."""
    with pytest.raises(common.InputError, match=expected) as error:
        yield error
    assert "\n" not in str(error.value)


@pytest.fixture
def float32(monkeypatch):
    """Exact arithmetic, also where the processor gains from bfloat16."""
    kind = common.autocast
    monkeypatch.setattr(common, "autocast", lambda device, _="auto": kind(device, "float32"))


class WatchedAdam(torch.optim.Adam):
    """Keeps what every step sees: its rate, and the gradients of all optimisers' parameters."""

    made = []

    def __init__(self, parameters, *args, **options):
        super().__init__(list(parameters), *args, **options)
        self.seen, self.rates = [], []
        self.made.append(self)

    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        self.seen.append([[None if p.grad is None else p.grad.clone() for p in adam.param_groups[0]["params"]]
                          for adam in self.made])
        return super().step(closure)


@pytest.fixture
def quick(request, monkeypatch):
    """main() of the test file's script without what it draws, measures and learns beforehand."""
    script = importlib.import_module(request.module.__name__.removeprefix("test_"))
    monkeypatch.setattr(WatchedAdam, "made", [])
    monkeypatch.setattr(torch.optim, "Adam", WatchedAdam)
    monkeypatch.setattr(script, "evaluate", lambda *_: {})
    monkeypatch.setattr(script, "samples", lambda *_: {})
    monkeypatch.setattr(common, "report", lambda *_: None)
    monkeypatch.setattr(common, "_write_log", lambda *_: None)
    monkeypatch.setattr(common, "load_encoder", lambda *_: some_encoder())
    return monkeypatch


@pytest.fixture(scope="session")
def people(tmp_path_factory):
    """Six rendered people × 5 pictures of 64×64 with landmarks, a folder each; read only.

    Their names make the first four training people, una a validation person, emil a test person. Trainings
    that may be of anybody are of them: the recognisers of their faces are trained once for all tests."""
    root = tmp_path_factory.mktemp("people")
    faces = common.RenderedFaces(64, identities=6, per_identity=5)
    for number, name in enumerate(("anna", "bert", "cleo", "dora", "una", "emil")):
        for shot in range(5):
            face = faces[5 * number + shot]
            common.write_image(root / name / f"{shot}.png", face.image)
            common.write_landmarks(root / name / f"{shot}.png.txt", face.landmarks)
    return root


@pytest.fixture(scope="session")
def face_folder(tmp_path_factory):
    """24 rendered people × 5 pictures of 64×64, a folder each: `shot_0.png`, `shot_0.png.txt`; read only."""
    root = tmp_path_factory.mktemp("faces")
    for index, face in enumerate(common.RenderedFaces(64, identities=24, per_identity=5)):
        file = root / f"person_{face.identity:02d}" / f"shot_{index % 5}.png"
        common.write_image(file, face.image)
        common.write_landmarks(file.with_name(file.name + ".txt"), face.landmarks)
    return root


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """run(script, *arguments, cwd=folder) → stdout, stderr of the script with TINY; on the CPU.

    It must end with `status`. changes: Python that runs first, see driver.py. With processes=2, as under
    torchrun: a list of both.
    """
    server = subprocess.Popen([sys.executable, DRIVER], cwd=ROOT, env=SETTINGS, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    texts = tmp_path_factory.mktemp("texts")

    def run(script, *arguments, cwd, changes="", processes=1, status=0, seconds=120):
        output = [[str(texts / f"{name}{number}") for name in ("stdout", "stderr")]
                  for number in range(processes)]
        arguments = [str(argument) for argument in arguments]
        if "--device" not in arguments:
            arguments += ["--device", "cpu"]
        job = {"script": script, "changes": f"tiny({SHARED}, {TINY[script]})\n{changes}", "cwd": str(cwd),
               "arguments": arguments, "processes": processes, "output": output, "seconds": seconds,
               "port": free_port() if processes > 1 else 0}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        statuses = json.loads(server.stdout.readline())
        done = [SimpleNamespace(stdout=Path(out).read_text(), stderr=Path(err).read_text())
                for out, err in output]
        assert statuses == [status] * processes, "\n".join(one.stderr for one in done)
        return done if processes > 1 else done[0]

    yield run
    server.stdin.close()
    server.wait()
