"""The small runs of both training scripts that several files of tests use, and what makes two of them equal."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_images
import train_synthetic
from models import build_vae
from training import ImageTrainer
from vsm.runs import load_arrays, load_checkpoint, save_arrays

ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("VSM_DATA", ROOT / ".." / "shared" / "data"))
CPU = torch.device("cpu")
SMALL = ["--seeds", "2", "--batch", "20", "--hidden", "6", "--inner-steps", "2", "--steps-per-epoch", "4", "--eval-every",
         "2", "--test-size", "30", "--importance-samples", "100", "--device", "cpu"]
IMAGES = ["--data", "mnist", "--net", "mlp", "--width", "4", "--dim-z", "3", "--samples", "1", "--batch", "50", "--inner-steps",
          "2", "--eval-every", "2", "--lr", "1e-3", "--device", "cpu"]
RUNS = {"conv": ["--net", "conv"], "mlp": [], "resnet": ["--net", "resnet", "--norm", "group", "--infer", "fd"],
        "bernoulli": ["--latent", "bernoulli"], "fae": ["--learn", "fae"]}
DRAWINGS = ("train_synthetic.synthetic_samples", "train_images.draw_run", "evaluate.draw_figures")
TIMES = ("seconds", "peak_memory")  # the only arrays that may differ between two equal runs


def real(path):
    """Marks a test of real data that lie in the folder $VSM_DATA."""
    return pytest.mark.skipif(not (REAL / path).exists(), reason=f"no {path} in {REAL}; $VSM_DATA may name another folder")


def write_idx(root, arrays, compress=False):
    """Write arrays as idx files, by the names of MNIST's files, where an image script looks for them below its data root."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
        (folder / f"{name}{'.gz' * compress}").write_bytes(gzip.compress(content) if compress else content)


def noise_pictures(folder, count):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")


def main(script, *argv, pictures=False):
    """Run a script in this process. It trains and evaluates without pictures, which take longer than the small runs do."""
    with pytest.MonkeyPatch.context() as patch:
        for drawing in () if pictures else DRAWINGS:
            patch.setattr(drawing, lambda *_: None)
        script.main(script.parse_args([str(word) for word in argv]))


def train(out, *argv, epochs=2):
    """A small 2-D run in this process; returns its arrays."""
    main(train_synthetic, *SMALL, "--epochs", epochs, "--out", out, *argv)
    return load_arrays(out / "metrics.npz")


def train_on(root, out, *argv, **options):
    """A small run on the images of MNIST's files below `root`, in this process; returns its arrays."""
    main(train_images, *IMAGES, "--data-root", root, "--out", out, *argv, **options)
    return load_arrays(out / "metrics.npz")


def image_trainer(vae=None, images=None, **flags):
    """A trainer of a tiny model on four images, unless others are given."""
    if images is None:
        images = torch.randint(0, 256, (4, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    defaults = {"learn": "fd", "infer": "kld", "estimator": "plugin", "samples": 1, "inner_steps": 1, "noise": 0.1, "lr": 1e-3,
                "batch": 4, "seed": 0}
    return ImageTrainer(vae or build_vae("mlp", (1, 2, 2), 2, width=3), images, **defaults | flags)


def run_steps(trainer, steps):
    for _ in range(steps):
        trainer.run_step()
    return trainer


def stop_after(monkeypatch, owner, count, action=None, name="run_step"):
    """After `count` calls of owner.name, the next begins with action(): by default, KeyboardInterrupt.

    Returns "begun" or "ended" for each call.
    """
    function, calls = getattr(owner, name), []

    def counted(*args, **options):
        calls.append("begun")
        if len(calls) == count + 1:
            if action is None:
                raise KeyboardInterrupt
            action()
        result = function(*args, **options)
        calls[-1] = "ended"
        return result
    monkeypatch.setattr(owner, name, counted)
    return calls


def contents(folder):
    """The bytes of every file of a folder, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def environment():
    """The variables of a child process: one thread, as in pytest's own process."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def weights_of(run):
    return load_checkpoint(run / "checkpoint.pt")["trainer"]["tensors"]


def edit_arrays(path, **changes):
    """Change arrays of a file of a run; None takes one away. Returns the arrays as they were."""
    arrays = load_arrays(path)
    kept = {name: value for name, value in (arrays | changes).items() if value is not None}
    save_arrays(path, kept.pop("config"), **kept)
    return arrays


def assert_equal_arrays(first, second, names=None):
    """Two dictionaries of arrays are equal bit by bit; only times, memory and config may differ."""
    assert names or first.keys() == second.keys()
    for name in names or first.keys() - {*TIMES, "config"}:
        one, other = first[name], second[name]
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), name


def assert_equal_runs(first, second):
    """Two run folders hold the same arrays and the same state of training, bit by bit; only times and memory may differ."""
    assert_equal_arrays(*(load_arrays(run / "metrics.npz") for run in (first, second)))
    one, other = (load_checkpoint(run / "checkpoint.pt")["trainer"] for run in (first, second))
    assert one["step"] == other["step"] and one["tensors"].keys() == other["tensors"].keys()
    assert all(torch.equal(*states) for states in zip(one["generators"], other["generators"], strict=True))
    assert all(torch.equal(one["tensors"][name], other["tensors"][name]) for name in one["tensors"])
