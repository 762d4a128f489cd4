"""The image script as its user meets it: runs resume bit by bit, every flag matters, mistakes are answered in one sentence."""

import json
import math
import resource
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_images
import training
from data import load_images
from metrics import quantise
from objectives import INFER, LEARN, label
from training import EVALUATION, seed_of
from vsm import loop
from vsm.runs import load_arrays, load_checkpoint

pytestmark = pytest.mark.usefixtures("no_pictures")

SMALL = ["--data", "mnist", "--width", "4", "--dim-z", "3", "--samples", "2", "--batch", "50", "--epochs", "2",
         "--inner-steps", "2", "--eval-every", "1", "--lr", "1e-3", "--device", "cpu"]
TIMES = ("seconds", "peak_memory")  # the only arrays that may differ between two equal runs


def train(digits, out, *argv):
    train_images.main(train_images.parse_args([*SMALL, "--data-root", str(digits), "--out", str(out), *map(str, argv)]))
    return load_arrays(out / "metrics.npz")


def assert_equal_runs(first, second, equal=True):
    arrays = [load_arrays(run / "metrics.npz") for run in (first, second)]
    tensors = [load_checkpoint(run / "checkpoint.pt")["trainer"]["tensors"] for run in (first, second)]
    same_arrays = all(np.array_equal(arrays[0][name], arrays[1][name], equal_nan=arrays[0][name].dtype.kind == "f")
                      for name in arrays[0] if name not in (*TIMES, "config"))
    same_weights = all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert arrays[0].keys() == arrays[1].keys()
    assert (same_arrays, same_weights) == (equal, equal)


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """A finished run, without pictures. For reading only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_images, "draw_run", lambda run: None)
        out = tmp_path_factory.mktemp("finished") / "run"
        train(digits, out)
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_run_leaves_its_documented_files_and_arrays(digits, tmp_path, monkeypatch):
    monkeypatch.undo()  # this run draws its pictures
    arrays = train(digits, tmp_path / "run")
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        ".lock", "config.json", "checkpoint.pt", "metrics.npz", "log.csv", "training_curves.png", "samples.png",
        "reconstructions.png", "interpolations.png", "posterior_sd.png"}
    assert arrays["status"] == "ok"
    assert arrays["epoch"].tolist() == [0, 1, 2]
    assert arrays["negative_elbo"][-1] < arrays["negative_elbo"][0]
    assert arrays["posterior_sd"].shape == arrays["kl_per_dim"].shape == (3, 3)
    assert arrays["samples"].shape == (64, 1, 32, 32) and arrays["samples"].dtype == np.uint8
    assert np.allclose(arrays["negative_elbo"], arrays["reconstruction"] + arrays["kl"])
    assert np.isnan(arrays["learn_loss"][0]) and np.isfinite(arrays["learn_loss"][1:]).all()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["flags"]["width"] == 4 and config["label"] == "KLD-F" and config["data"]["counts"] == {"train": 300, "test": 60}


def test_same_seed_equal_other_seed_different_and_evaluation_changes_nothing(digits, finished, tmp_path):
    for name, argv in {"again": [], "other": ["--seed", 1], "rarely": ["--eval-every", 2]}.items():
        train(digits, tmp_path / name, *argv)
    assert_equal_runs(finished, tmp_path / "again")
    assert_equal_runs(finished, tmp_path / "other", equal=False)
    weights = [load_checkpoint(run / "checkpoint.pt")["trainer"]["tensors"] for run in (finished, tmp_path / "rarely")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0] if name != "sums")


@pytest.mark.parametrize("learn", ["bao", pytest.param("fae", marks=pytest.mark.slow)])
def test_resumed_equals_undisturbed_in_process(digits, tmp_path, monkeypatch, learn):
    """The run stops in the middle of an epoch, after a checkpoint at an arbitrary step."""
    monkeypatch.setattr(loop, "LOOK_SECONDS", 0)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)  # a checkpoint at every step
    train(digits, tmp_path / "whole", "--learn", learn)
    run_step, calls = training.ImageTrainer.run_step, []

    def stop_at_nine(trainer):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        run_step(trainer)

    monkeypatch.setattr(training.ImageTrainer, "run_step", stop_at_nine)
    with pytest.raises(KeyboardInterrupt):
        train(digits, tmp_path / "halved", "--learn", learn)
    assert "status" not in load_arrays(tmp_path / "halved" / "metrics.npz")
    train(digits, tmp_path / "halved", "--learn", learn)
    assert_equal_runs(tmp_path / "whole", tmp_path / "halved")


@pytest.mark.parametrize("epoch, due", [(3, False), (4, True)])
def test_an_evaluation_has_the_noise_and_the_seed_of_its_run(monkeypatch, epoch, due):
    monkeypatch.setattr(train_images, "evaluate_images", lambda vae, images, noise, seed=0: {"row": (noise, seed)})
    monkeypatch.setattr(train_images, "fids", lambda vae, reference, noise, generator: {
        "fid": (noise, generator.initial_seed(), reference)})
    args, trainer = SimpleNamespace(seed=4, noise=0.3, fid_every=2), SimpleNamespace(vae=None, step=3 * epoch, steps_per_epoch=3)
    row = train_images.measure(trainer, args, torch.zeros(1), "reference")
    assert row["row"] == (0.3, seed_of(4, EVALUATION))
    assert row["fid"] == (0.3, seed_of(4, EVALUATION), "reference") if due else row["fid"].isnan()


def test_the_inputs_that_a_run_keeps_have_its_noise(digits, tmp_path):
    arrays = train(digits, tmp_path / "run", "--noise", 0.4, "--seed", 2, "--epochs", 1)
    clean = load_images("mnist", digits).test
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed_of(2, EVALUATION)))
    np.testing.assert_array_equal(arrays["inputs"], quantise(clean / 255 + 0.4 * noise))
    ends = arrays["interpolations"][:, [0, -1]].swapaxes(0, 1).astype(float)  # from input i to input i + 8
    np.testing.assert_allclose(ends, arrays["reconstructions"][:16].reshape(ends.shape), atol=1)


def test_finished_runs_are_skipped_and_overwrite_redoes(digits, run, capsys):
    before = (run / "metrics.npz").stat().st_mtime_ns
    train(digits, run)
    assert "finished before (ok)" in capsys.readouterr().out
    assert (run / "metrics.npz").stat().st_mtime_ns == before
    train(digits, run, "--overwrite", "--epochs", 1)
    assert load_arrays(run / "metrics.npz")["epoch"].tolist() == [0, 1]


BEHAVIOUR = {  # a non-default value of each flag changes the weights of a two-epoch run
    "--limit": 200, "--learn": "elbo", "--infer": "fd", "--samples": 3, "--noise": 0.2, "--seed": 5, "--net": "mlp", "--width": 5,
    "--norm": "none", "--dim-z": 4, "--init-sd": 0.2, "--gamma": "fixed", "--inner-steps": 1, "--batch": 30, "--lr": 1e-2,
    "--epochs": 3, "--precision": "bf16"}


@pytest.mark.slow
def test_every_flag_changes_config_and_behaviour(digits, tmp_path):
    train(digits, tmp_path / "base")
    base, base_config = (load_checkpoint(tmp_path / "base" / "checkpoint.pt")["trainer"]["tensors"],
                         json.loads((tmp_path / "base" / "config.json").read_text())["flags"])
    for flag, value in BEHAVIOUR.items():
        out = tmp_path / flag.strip("-")
        train(digits, out, flag, value)
        tensors = load_checkpoint(out / "checkpoint.pt")["trainer"]["tensors"]
        same = tensors.keys() == base.keys() and all(torch.equal(tensors[name], base[name]) for name in base)
        assert not same, flag
        key = flag[2:].replace("-", "_")
        assert json.loads((out / "config.json").read_text())["flags"][key] == value != base_config[key]
    for estimator in ("unbiased", "released"):
        train(digits, tmp_path / estimator, "--learn", "bao", "--estimator", estimator)
    train(digits, tmp_path / "plugin", "--learn", "bao")
    losses = {name: load_arrays(tmp_path / name / "metrics.npz")["learn_loss"][-1] for name in ("plugin", "unbiased", "released")}
    assert len(set(losses.values())) == 3
    fewer = train(digits, tmp_path / "fewer", "--test-limit", 30)
    assert fewer["negative_elbo"][-1] != load_arrays(tmp_path / "base" / "metrics.npz")["negative_elbo"][-1]


def some_pairs():
    """Each entry of LEARN and of INFER in at least one pair; tests/test_wiring.py has all pairs."""
    learn, infer = ([name for name, entry in table.items() if not entry.joint] for table in (LEARN, INFER))
    return [(learn[i % len(learn)], infer[i % len(infer)]) for i in range(max(len(learn), len(infer)))] + \
        [(name, name) for name, entry in LEARN.items() if entry.joint]


@pytest.mark.parametrize("learn, infer", some_pairs())
def test_a_pair_trains_both_halves(digits, tmp_path, learn, infer):
    arrays = train(digits, tmp_path / "run", "--learn", learn, "--infer", infer, "--epochs", 1, "--test-limit", 10)
    assert arrays["status"] == "ok" and arrays["config"]["label"] == label(learn, infer, 2)
    for name in ("infer_loss", "learn_loss", "infer_grad_norm", "learn_grad_norm"):
        assert np.isfinite(arrays[name][1]) and (name.endswith("loss") or arrays[name][1] > 0), name
    assert arrays["log_gamma"][1] != arrays["log_gamma"][0] and (arrays["posterior_sd"][1] != arrays["posterior_sd"][0]).all()


def test_divergence_is_a_result(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()  # this run draws its pictures
    arrays = train(digits, tmp_path / "run", "--learn", "elbo", "--lr", 1e3)
    assert str(arrays["status"]).startswith("diverged@")
    assert 0 <= int(str(arrays["status"]).split("@")[1]) < 12
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
    monkeypatch.setattr(train_images, "evaluate_images", nan_kl(train_images.evaluate_images))
    assert str(train(digits, tmp_path / "nan", "--learn", "elbo")["status"]) == "exploded@6"


def nan_kl(evaluate_images):
    return lambda *args, **options: evaluate_images(*args, **options) | {"kl": torch.tensor(math.nan)}


@pytest.mark.parametrize("words, reach", [
    ("", "0.006"), ("--lr 1", ""), ("--lr 1 --lr-half-life 1", "4.5"), ("--lr 1 --inner-steps 3", "4"), ("--lr 1 --batch 60", ""),
    ("--lr 1 --learn fae --inner-steps 99", ""), ("--gamma stationary", ""), ("--gamma fixed", "")])
def test_a_run_says_where_log_gamma_cannot_arrive(digits, capsys, words, reach):
    """300 images, two epochs: six updates of the decoder by default. "" means that nothing is said."""
    train_images.main(train_images.parse_args([*SMALL, "--data-root", str(digits), *words.split(), "--dry-run"]))
    printed = capsys.readouterr().out
    assert f"log gamma moves by {reach} at most" in printed if reach else "log gamma" not in printed


def test_dry_run_writes_nothing(digits, tmp_path, capsys):
    train_images.main(train_images.parse_args([*SMALL, "--data-root", str(digits), "--out", str(tmp_path / "run"), "--dry-run"]))
    assert not (tmp_path / "run").exists()
    assert "12 encoder and 6 decoder updates" in capsys.readouterr().out


def test_default_folders_of_a_sweep_never_collide():
    names = {train_images.parse_args(argv.split()).out for argv in (
        "", "--seed 1", "--learn elbo", "--infer fd", "--samples 1", "--learn bao --estimator released", "--net resnet",
        "--norm group")}
    assert len(names) == 8
    assert "runs/images/mnist-conv-kld-fd-seed0" in names


@pytest.mark.parametrize("argv, words", [
    (["--data", "nothing"], "unknown data 'nothing'"),
    (["--data", "folder:/no/such/place"], "/no/such/place cannot be read (No such file or directory); name a folder"),
    (["--learn", "fae", "--infer", "kld"], "--learn fae goes with --infer fae"),
    (["--infer", "fae"], "--learn fae goes with --infer fae"),
    (["--learn", "swersky", "--estimator", "unbiased", "--samples", "1"], "at least 2"),
    (["--estimator", "released"], "applies to --learn swersky, bao, dsm only"),
    (["--samples", "0"], "0 is not a whole number of 1 or more"),
    (["--lr", "nan"], "nan is not a number above 0"),
    (["--batch", "301"], "more than the 300 training images"),
    (["--test-limit", "1"], "compare pairs of images"),
    (["--batch", "1e3"], "1e3 is not a whole number of 1 or more"),
    (["--precision", "tf32"], "GPU"),
    (["--learn", "sliced"], "invalid choice"),
    (["--one-pass", "--learn", "bao", "--inner-steps", "1"], "--one-pass goes with --infer kld"),
    (["--one-pass", "--inner-steps", "1", "--samples", "2", "--infer-samples", "1"], "--infer-samples equal to --samples"),
])
def test_bad_flags_get_one_sentence(digits, tmp_path, fails, argv, words):
    out = tmp_path / "run"
    assert words in fails(train_images, *SMALL, "--data-root", digits, "--out", out, *argv)
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(digits, fails):
    assert "finds no CUDA GPU" in fails(train_images, *SMALL, "--data-root", digits, "--device", "cuda")


def test_a_folder_of_another_run_is_refused_and_names_the_flags(digits, run, tmp_path, fails):
    before = (run / "metrics.npz").read_bytes()
    message = fails(train_images, *SMALL, "--data-root", digits, "--out", run, "--lr", "0.5", "--seed", "3")
    assert "lr was 0.001, is now 0.5" in message and "seed was 0, is now 3" in message
    assert (run / "metrics.npz").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    for config in (None, {"model_type": "another program's"}):
        if config:
            (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
        for argv in ([], ["--overwrite"]):
            assert "not a run folder" in fails(train_images, *SMALL, "--data-root", digits, "--out", tmp_path / "mine", *argv)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "all of it"


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_truncated_checkpoint_is_named_and_kept(digits, run, fails, keep):
    (run / "metrics.npz").unlink()
    checkpoint = run / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:keep])
    message = fails(train_images, *SMALL, "--data-root", digits, "--out", run)
    assert f"{checkpoint} is damaged" in message and "--overwrite" in message
    assert checkpoint.stat().st_size == keep


def test_a_flipped_bit_in_a_checkpoint_is_found(digits, run, fails):
    (run / "metrics.npz").unlink()
    checkpoint = run / "checkpoint.pt"
    whole = bytearray(checkpoint.read_bytes())
    whole[len(whole) // 2] ^= 1
    checkpoint.write_bytes(whole)
    assert "checksum" in fails(train_images, *SMALL, "--data-root", digits, "--out", run)


@pytest.mark.parametrize("name, damage", [("metrics.npz", lambda data: data[:80] + bytes(40) + data[120:]),
                                          ("metrics.npz", lambda data: b""),
                                          ("config.json", lambda data: b"[]"), ("config.json", lambda data: b'{"flags": null}')])
def test_damaged_files_of_a_finished_run_are_named(digits, run, fails, name, damage):
    (run / name).write_bytes(damage((run / name).read_bytes()))
    message = fails(train_images, *SMALL, "--data-root", digits, "--out", run)
    assert ("is damaged" if name == "metrics.npz" else "not a run folder") in message and str(run) in message


def test_too_large_for_the_memory(digits, tmp_path, fails):
    too_large = ["--dim-z", 2_000_000_000, "--out", tmp_path / "run"]
    assert "out of memory" in fails(train_images, *SMALL, "--data-root", digits, *too_large)


def test_a_second_process_on_one_folder_leaves(digits, tmp_path, fails):
    from vsm.runs import Run
    with Run(tmp_path / "run", "train_images", {}, torch.device("cpu")):
        assert "another process is at work" in fails(train_images, *SMALL, "--data-root", digits, "--out", tmp_path / "run")


def test_an_unwritable_output_folder(digits, tmp_path, fails):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    assert "cannot write to the output folder" in fails(train_images, *SMALL, "--data-root", digits, "--out", out)


def test_a_disk_that_fills_loses_nothing(digits, finished, tmp_path, fails):
    config = (finished / "config.json").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(config) + 4000, limits[1]))  # no larger file can be written
    try:
        message = fails(train_images, *SMALL, "--data-root", digits, "--out", tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in message and "kept" in message
    assert not list((tmp_path / "new").glob("*.tmp")) and not list((tmp_path / "new").glob(".*.tmp"))
    train(digits, tmp_path / "new")
    assert_equal_runs(finished, tmp_path / "new")
