"""Fixtures of several files. Every test is small, so that one thread is faster than two, and repeatable."""

import struct

import numpy as np
import pytest
import torch

from vsm.cli import command_line

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A data root with 300 + 60 blobs in MNIST's files: enough to train on, made in no time. For reading only."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:28, :28]
    for name, n in (("train", 300), ("t10k", 60)):
        labels = rng.integers(0, 10, n).astype(np.uint8)
        centre = 6 + 1.6 * labels[:, None, None] + rng.normal(0, 1, (n, 1, 1))
        images = 255 * np.exp(-((rows - centre) ** 2 + (columns - 14) ** 2) / 30)
        header = struct.pack(">IIII", 2051, n, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.astype(np.uint8).tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())
    return root


@pytest.fixture
def no_pictures(monkeypatch):
    """Training scripts draw nothing: their pictures take longer than the small runs of the tests."""
    for drawing in ("train_synthetic.synthetic_samples", "train_images.draw_run"):
        monkeypatch.setattr(drawing, lambda *_: None)


@pytest.fixture
def fails(capsys):
    """fails(script, *argv) runs a command line in this process, expects exit code 2 and returns the one line on stderr."""
    def run(script, *argv):
        with pytest.raises(SystemExit) as error:
            command_line(lambda: script.parse_args([str(word) for word in argv]), script.main)
        message = capsys.readouterr().err
        assert error.value.code == 2
        assert "Traceback" not in message
        assert message.strip().splitlines()[-1].count("error: ") == 1
        return message.strip().splitlines()[-1]

    return run
