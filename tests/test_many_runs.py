"""Several runs by one command: the same bits as alone, in processes and in lockstep, and what a failure or a signal leaves."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import train_images
from small_runs import ROOT
from vsm.cli import UserError
from vsm.many_runs import Counted, combinations, in_lockstep, names_of, shares
from vsm.runs import load_arrays

SMALL = ["--data", "mnist", "--net", "mlp", "--width", "4", "--dim-z", "2", "--samples", "1", "--inner-steps", "1", "--batch",
         "50", "--eval-every", "1", "--device", "cpu"]


def equal(one, other):
    one, other = (load_arrays(folder / "metrics.npz") for folder in (one, other))
    keys = one.keys() - {"config", "seconds", "peak_memory"}
    return keys <= other.keys() and all(np.array_equal(one[key], other[key], equal_nan=one[key].dtype.kind == "f")
                                        for key in keys)


@pytest.fixture
def alone(digits, tmp_path, monkeypatch):
    """Trains one run in this process into tmp_path/alone, and returns the folder."""
    monkeypatch.setattr(train_images, "draw_run", lambda run: None)

    def train(*argv):
        train_images.main(train_images.parse_args([*SMALL, "--data-root", str(digits), "--out", str(tmp_path / "alone"), *argv]))
        return tmp_path / "alone"

    return train


def script(digits, folder, *argv):
    return subprocess.Popen([sys.executable, str(ROOT / "train_images.py"), *SMALL, "--data-root", str(digits), *argv],
                            cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_combinations_of_values_the_first_flag_slowest():
    parser = train_images.image_parser()
    assert combinations(["--learn", "elbo", "fd", "--no-graph", "--seed", "3", "4"], parser) == [
        ["--learn", learn, "--no-graph", "--seed", seed] for learn in ("elbo", "fd") for seed in "34"]
    assert combinations([], parser) == [[]]


def test_names_are_what_differs():
    assert names_of(["runs/mnist-elbo-lr1-seed0", "runs/mnist-fd-lr1-seed1"]) == {
        "runs/mnist-elbo-lr1-seed0": "elbo-seed0", "runs/mnist-fd-lr1-seed1": "fd-seed1"}
    done = [0, 1]
    Counted(done, 10, 6).update()  # of a run that goes on after six updates of ten
    assert shares({"a": "seed0"}, {"a": done}) == "seed0 70%"


def test_two_runs_in_one_folder_are_refused(fails):
    with pytest.raises(SystemExit):
        train_images.parse_runs(["--seed", "1", "1"])
    with pytest.raises(SystemExit):
        train_images.parse_runs(["--seed", "1", "2", "--out", "x"])


def test_processes_give_the_bits_of_runs_alone_and_a_failure_leaves_the_others_alone(digits, tmp_path, alone):
    other = tmp_path / "runs" / "images" / "mnist-mlp-kld-elbo-samples1-width4-dim-z2-inner-steps1-batch50-eval-every1-seed1"
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"script": "train_images", "flags": {"learn": "bao"}}')
    process = script(digits, tmp_path, "--learn", "elbo", "fd", "--seed", "0", "1", "--epochs", "2", "--jobs", "2")
    out, error = process.communicate(timeout=200)
    assert process.returncode == 2 and "4 runs: 3 ok" in out and out.count("cannot arrive") == 1
    assert "1 of 4 runs failed: elbo-seed1: " in error and "was made with other flags" in error
    assert equal(alone("--learn", "elbo", "--epochs", "2"), other.with_name(other.name.replace("seed1", "seed0")))


def test_lockstep_gives_the_bits_of_runs_alone(digits, tmp_path, alone):
    runs = [train_images.parse_args([*SMALL, "--data-root", str(digits), "--learn", learn, "--epochs", "2", "--out",
                                     str(tmp_path / learn)]) for learn in ("swersky", "nothing", "elbo") if learn != "nothing"]
    arguments = {args.out: (args, train_images.load(args), torch.device("cpu")) for args in runs}

    def begin(args, *rest, **options):
        if args.learn == "elbo":
            raise ValueError("this one fails")
        yield from train_images.begin(args, *rest, **options)

    with pytest.raises(UserError, match="1 of 2 runs failed: elbo: ValueError: this one fails"):
        in_lockstep(arguments, begin, torch.device("cpu"))
    assert equal(alone("--learn", "swersky", "--epochs", "2"), tmp_path / "swersky")


@pytest.mark.slow
def test_a_signal_stops_all_with_checkpoints_and_the_command_goes_on(digits, tmp_path, alone):
    command = ["--seed", "0", "1", "--epochs", "40", "--jobs", "2"]
    process = script(digits, tmp_path, *command)
    folder = tmp_path / "runs" / "images"
    while len(list(folder.glob("*/checkpoint.pt"))) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "resumes" in error
    process = script(digits, tmp_path, *command)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and "2 runs: 2 ok" in out
    assert equal(alone("--epochs", "40"), next(folder.glob("*seed0")))
