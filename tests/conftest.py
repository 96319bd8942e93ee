"""Shared by all tests: a cache of their own, faces, the scripts' command lines, markers."""
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

import pytest  # noqa: E402
import torch  # noqa: E402

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


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


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
    """run(script, *arguments, cwd=folder) → status, stdout, stderr of the script with TINY; on the CPU.

    changes: Python that runs first, see driver.py. With processes=2, as under torchrun: lists of all three.
    """
    server = subprocess.Popen([sys.executable, DRIVER], cwd=ROOT, env=SETTINGS, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    texts = tmp_path_factory.mktemp("texts")

    def run(script, *arguments, cwd, changes="", processes=1, seconds=120):
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
        done = [SimpleNamespace(status=status, stdout=Path(out).read_text(), stderr=Path(err).read_text())
                for status, (out, err) in zip(statuses, output, strict=True)]
        return done if processes > 1 else done[0]

    yield run
    server.stdin.close()
    server.wait()
