"""Fixtures of several files. Every test is small, so that one thread is faster than two, and repeatable."""

import numpy as np
import pytest
import torch

import linear_models
import sketches
from small_runs import DRAWINGS, RUNS, train, train_on, write_idx
from vsm.cli import command_line

torch.set_num_threads(1)
sketches.Figure.savefig = sketches.sketch


@pytest.fixture(autouse=True)
def draw_in_slow_tests(request, monkeypatch):
    """Slow tests draw real pixels, as processes of their own do; the others sketch."""
    if "slow" in request.keywords:
        monkeypatch.setattr(sketches.Figure, "savefig", sketches.DRAW)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A data root with 300 + 60 blobs in MNIST's files: enough to train on, made in no time. For reading only."""
    root, rng, arrays = tmp_path_factory.mktemp("data"), np.random.default_rng(0), {}
    rows, columns = np.mgrid[:28, :28]
    for part, n in (("train", 300), ("t10k", 60)):
        labels = rng.integers(0, 10, n).astype(np.uint8)
        centre = 6 + 1.6 * labels[:, None, None] + rng.normal(0, 1, (n, 1, 1))
        images = 255 * np.exp(-((rows - centre) ** 2 + (columns - 14) ** 2) / 30)
        arrays |= {f"{part}-images-idx3-ubyte": images.astype(np.uint8), f"{part}-labels-idx1-ubyte": labels}
    write_idx(root, arrays)
    return root


@pytest.fixture(scope="session")
def folders(digits, tmp_path_factory):
    """Small runs of several kinds, by name. For reading only."""
    root = tmp_path_factory.mktemp("runs")
    for name, argv in RUNS.items():
        train_on(digits, root / name, "--epochs", 2, *argv)
    train(root / "plane", "--seeds", 3, "--init-sd", 0.3, epochs=1)
    return root


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def cache(cache_folder):
    """$VSM_CACHE is a folder that all tests share, so that the network behind FID is trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VSM_CACHE", str(cache_folder))
        yield


@pytest.fixture
def linear():
    return linear_models.example()


@pytest.fixture
def no_pictures(monkeypatch):
    """Training scripts draw nothing: their pictures take longer than the small runs of the tests."""
    for drawing in DRAWINGS:
        monkeypatch.setattr(drawing, lambda *_: None)


@pytest.fixture
def fails(capsys):
    """fails(script, *argv) runs a command line in this process, expects exit code 2 and returns the one line on stderr."""
    def run(script, *argv):
        with pytest.raises(SystemExit) as error:
            command_line(lambda: script.parse_args([str(word) for word in argv]), script.main)
        message = capsys.readouterr().err
        assert error.value.code == 2 and not {"Traceback", "usage:"} & {*message.split()}
        assert message.strip().splitlines()[-1].count("error: ") == 1
        return message.strip().splitlines()[-1]
    return run
