"""The small runs of both training scripts that several files of tests use, and what makes two of them equal."""

import os
from pathlib import Path

import torch

import train_synthetic
from vsm.runs import load_arrays, load_checkpoint

ROOT = Path(__file__).parent.parent
SMALL = ["--seeds", "2", "--batch", "20", "--hidden", "6", "--inner-steps", "2", "--steps-per-epoch", "4", "--eval-every",
         "2", "--test-size", "30", "--importance-samples", "100", "--device", "cpu"]
IMAGES = ["--data", "mnist", "--net", "mlp", "--width", "4", "--dim-z", "3", "--samples", "1", "--batch", "50", "--inner-steps",
          "2", "--eval-every", "2", "--lr", "1e-3", "--device", "cpu"]
TIMES = ("seconds", "peak_memory")


def train(out, *argv, epochs=2):
    """A small 2-D run in this process; returns its arrays."""
    train_synthetic.main(train_synthetic.parse_args([*SMALL, "--epochs", str(epochs), "--out", str(out), *map(str, argv)]))
    return load_arrays(out / "metrics.npz")


def contents(folder):
    """The bytes of every file of a folder, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def environment():
    """The variables of a child process: one thread, as in pytest's own process."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def assert_equal_runs(first, second):
    """Two run folders hold the same arrays and the same state of training, bit by bit; only times and memory may differ."""
    arrays = [load_arrays(run / "metrics.npz") for run in (first, second)]
    saved = [load_checkpoint(run / "checkpoint.pt")["trainer"] for run in (first, second)]
    assert arrays[0].keys() == arrays[1].keys()
    for name in arrays[0].keys() - {*TIMES, "config"}:
        assert arrays[0][name].dtype == arrays[1][name].dtype and arrays[0][name].shape == arrays[1][name].shape, name
        assert arrays[0][name].tobytes() == arrays[1][name].tobytes(), name
    assert saved[0]["step"] == saved[1]["step"]
    assert saved[0]["tensors"].keys() == saved[1]["tensors"].keys()
    assert all(torch.equal(*states) for states in zip(saved[0]["generators"], saved[1]["generators"], strict=True))
    assert all(torch.equal(saved[0]["tensors"][name], saved[1]["tensors"][name]) for name in saved[0]["tensors"])
