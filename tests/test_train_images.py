"""The image script as its user meets it: runs resume bit by bit, every flag matters, mistakes are answered in one sentence."""

import math
import resource
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_images
from data import load_images
from models import build_vae
from small_runs import CPU, IMAGES, assert_equal_runs, train_on, weights_of
from training import EVALUATION, seed_of
from vsm import loop
from vsm.runs import Run, load_arrays, load_config

CONV = ["--net", "conv", "--samples", "2", "--epochs", "2", "--eval-every", "1"]


def train(digits, out, *argv, **options):
    return train_on(digits, out, *CONV, *argv, **options)


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    train(digits, out := tmp_path_factory.mktemp("finished") / "run")
    return out


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_a_run_leaves_its_documented_files_and_arrays(digits, tmp_path):
    arrays = train(digits, tmp_path / "run", pictures=True)
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        ".lock", "config.json", "checkpoint.pt", "metrics.npz", "log.csv", "training_curves.png", "samples.png",
        "reconstructions.png", "interpolations.png", "posterior_sd.png"}
    assert arrays["status"] == "ok" and arrays["epoch"].tolist() == [0, 1, 2]
    assert arrays["negative_elbo"][-1] < arrays["negative_elbo"][0]
    assert arrays["posterior_sd"].shape == arrays["kl_per_dim"].shape == (3, 3)
    assert arrays["samples"].shape == (64, 1, 32, 32) and arrays["samples"].dtype == np.uint8
    assert np.allclose(arrays["negative_elbo"], arrays["reconstruction"] + arrays["kl"])
    assert np.isnan(arrays["learn_loss"][0]) and np.isfinite(arrays["learn_loss"][1:]).all()
    config = load_config(tmp_path / "run")
    assert config["flags"]["width"] == 4 and config["label"] == "KLD-F" and config["data"]["counts"] == {"train": 300, "test": 60}


def test_same_seed_equal_other_seed_different_and_evaluation_changes_nothing(digits, finished, tmp_path):
    for name, argv in {"again": [], "other": ["--seed", 1], "rarely": ["--eval-every", 2]}.items():
        train(digits, tmp_path / name, *argv)
    assert_equal_runs(finished, tmp_path / "again")
    weights, other, rarely = (weights_of(run) for run in (finished, tmp_path / "other", tmp_path / "rarely"))
    assert not any(torch.equal(weights[name], other[name]) for name in weights if name.endswith("weight"))
    assert all(torch.equal(weights[name], rarely[name]) for name in weights if name != "sums")
    assert not np.array_equal(*(load_arrays(run / "metrics.npz")["samples"] for run in (finished, tmp_path / "other")))


@pytest.mark.parametrize("epoch, due", [(3, False), (4, True)])
def test_an_evaluation_has_the_noise_and_the_seed_of_its_run(monkeypatch, epoch, due):
    monkeypatch.setattr(train_images, "evaluate_images", lambda vae, images, noise, seed=0: {"row": (noise, seed)})
    monkeypatch.setattr(train_images, "fids", lambda vae, reference, noise, generator: {
        "fid": (noise, generator.initial_seed(), reference)})
    args, trainer = SimpleNamespace(seed=4, noise=0.3, fid_every=2), SimpleNamespace(vae=None, step=3 * epoch, steps_per_epoch=3)
    row = train_images.measure(trainer, args, torch.zeros(1), "reference")
    assert row["row"] == (0.3, seed_of(4, EVALUATION))
    assert row["fid"] == (0.3, seed_of(4, EVALUATION), "reference") if due else row["fid"].isnan()


def test_interpolations_go_from_an_input_to_the_one_eight_further_on(digits):
    torch.manual_seed(0)
    vae = build_vae("mlp", (1, 32, 32), 3, width=8)
    for p in vae.parameters():
        p.data *= 4  # reconstructions that differ
    shown = train_images.pictures(vae, load_images("mnist", digits).test, 0.1, 0)
    ends = shown["interpolations"][:, [0, -1]].swapaxes(0, 1).reshape(16, 1, 32, 32).astype(float)
    np.testing.assert_allclose(ends, shown["reconstructions"][:16], atol=1)
    assert np.ptp(ends, axis=0).max() > 20


def test_divergence_is_a_result(digits, tmp_path, capsys):
    arrays = train(digits, tmp_path / "run", "--learn", "elbo", "--lr", 1e3, pictures=True)
    assert str(arrays["status"]).startswith("diverged@") and 0 <= int(str(arrays["status"]).split("@")[1]) < 12
    assert (tmp_path / "run" / "training_curves.png").exists()
    train(digits, tmp_path / "run", "--learn", "elbo", "--lr", 1e3)
    assert "finished before (diverged@" in capsys.readouterr().out


def test_an_exploded_run_ends_with_a_status_of_its_own(digits, tmp_path, capsys, monkeypatch):
    """Losses stay finite, but the KL is that of no useful code. The rows are those of the evaluations before."""
    monkeypatch.setattr(loop, "EXPLODED_KL", -1.0)
    arrays = train(digits, tmp_path / "run", "--learn", "elbo")
    assert str(arrays["status"]) == "exploded@6" and arrays["epoch"].tolist() == [0] and "samples" not in arrays
    train(digits, tmp_path / "run", "--learn", "elbo")
    assert "finished before (exploded@" in capsys.readouterr().out
    monkeypatch.setattr(loop, "EXPLODED_KL", math.inf)
    evaluate_images = train_images.evaluate_images
    for key in ("kl", "negative_elbo"):
        monkeypatch.setattr(train_images, "evaluate_images",
                            lambda *args, key=key, **options: evaluate_images(*args, **options) | {key: torch.tensor(math.nan)})
        assert str(train(digits, tmp_path / key, "--learn", "elbo")["status"]) == "exploded@6"


@pytest.mark.parametrize("words, reach", [
    ("", "0.006"), ("--lr 1", ""), ("--lr 1 --lr-half-life 1", "4.5"), ("--lr 1 --inner-steps 3", "4"), ("--lr 1 --batch 60", ""),
    ("--lr 1 --learn fae --inner-steps 99", ""), ("--gamma stationary", ""), ("--gamma fixed", ""),
    ("--init-sd 0.1 --lr 0.1", "")])
def test_a_run_says_where_log_gamma_cannot_arrive(digits, words, reach):
    """300 images, two epochs: six updates of the decoder by default. "" means that nothing is said."""
    args = train_images.parse_args([*IMAGES, *CONV, "--data-root", str(digits), *words.split()])
    note = train_images.reach_note(args, train_images.load(args))
    assert f"log gamma moves by about {reach}," in note if reach else note is None


def flip(data):
    """The bytes with one bit changed in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]


@pytest.mark.parametrize("name, damage, words", [
    *(("checkpoint.pt", lambda data, keep=keep: data[:keep], "checkpoint.pt is damaged") for keep in (0, 100, 5000)),
    ("checkpoint.pt", flip, "checksum"), ("metrics.npz", lambda data: data[:80] + bytes(40) + data[120:], "is damaged"),
    ("metrics.npz", lambda data: b"", "is damaged"), ("config.json", lambda data: b"[]", "not a run folder"),
    ("config.json", lambda data: b'{"flags": null}', "not a run folder")])
def test_a_damaged_file_is_named_and_kept(digits, run, fails, name, damage, words):
    if name == "checkpoint.pt":
        (run / "metrics.npz").unlink()  # a finished run needs no checkpoint
    content = damage((run / name).read_bytes())
    (run / name).write_bytes(content)
    message = fails(train_images, *IMAGES, *CONV, "--data-root", digits, "--out", run)
    assert words in message and str(run) in message and (run / name).read_bytes() == content
    assert "move it away" in message or "not a run folder" in message


def test_what_the_machine_refuses_is_said(digits, tmp_path, fails):
    argv = [train_images, *IMAGES, *CONV, "--data-root", digits, "--out"]
    assert "out of memory" in fails(*argv, tmp_path / "run", "--dim-z", 2_000_000_000)
    (tmp_path / "file").write_text("")
    assert "cannot write to the output folder" in fails(*argv, tmp_path / "file" / "run")
    with Run(tmp_path / "other", "train_images", {}, CPU):
        assert "another process is at work" in fails(*argv, tmp_path / "other")


def test_a_disk_that_fills_loses_nothing(digits, finished, tmp_path, fails):
    config, limits = (finished / "config.json").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(config) + 4000, limits[1]))  # no larger file can be written
    try:
        message = fails(train_images, *IMAGES, *CONV, "--data-root", digits, "--out", tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in message and "kept" in message and not list((tmp_path / "new").glob("*.tmp"))
    train(digits, tmp_path / "new")
    assert_equal_runs(finished, tmp_path / "new")
