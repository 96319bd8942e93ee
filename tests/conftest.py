"""Shared by all tests: a cache folder of their own, a folder of rendered faces, and the `cuda` marker."""
import os
import shutil
import tempfile

# Before `common` is imported, which reads it: no test may read or change the user's cache.
CACHE = os.environ["FACE_RESTORATION_CACHE"] = tempfile.mkdtemp(prefix="face-restoration-tests-")

import pytest  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(os.cpu_count() or 1, 4))))


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
