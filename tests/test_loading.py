"""load_vae: the model that was trained, in eval mode, from a run folder alone."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_images
import train_synthetic
from data import load_images
from metrics import evaluate_images, iw_log_likelihood
from training import EVALUATION, seed_of
from vsm import evaluation_2d
from vsm.cli import UserError
from vsm.distributions_2d import DISTRIBUTIONS
from vsm.loading import epochs_trained, export, load_vae, place_of_images
from vsm.runs import NOT_IDENTITY, load_arrays, load_checkpoint, load_config
from vsm.stored_runs import open_runs

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "results"
DATA = Path(os.environ.get("VSM_DATA", ROOT / ".." / "shared" / "data"))
IMAGE = ["--width", "4", "--dim-z", "3", "--samples", "2", "--batch", "50", "--epochs", "2", "--inner-steps", "2",
         "--eval-every", "1", "--lr", "1e-3", "--device", "cpu"]
PLANE = ["--seeds", "3", "--batch", "20", "--epochs", "1", "--steps-per-epoch", "5", "--test-size", "50",
         "--importance-samples", "100", "--hidden", "6", "--init-sd", "0.3", "--device", "cpu"]


@pytest.fixture(scope="module")
def folders(digits, tmp_path_factory):
    """Small runs of several kinds, by name."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_images, "draw_run", lambda run: None)
        for name, argv in {"conv": [], "mlp": ["--net", "mlp"], "resnet": ["--net", "resnet", "--norm", "group", "--infer", "fd"],
                           "bernoulli": ["--net", "mlp", "--latent", "bernoulli"],
                           "fae": ["--net", "mlp", "--learn", "fae"]}.items():
            train_images.main(train_images.parse_args([*IMAGE, "--data-root", str(digits), "--out", str(root / name), *argv]))
    train_synthetic.main(train_synthetic.parse_args([*PLANE, "--out", str(root / "plane")]))
    return root


@pytest.mark.parametrize("name", ["conv", "mlp", "resnet", "bernoulli", "fae"])
def test_an_image_run_reproduces_its_last_metrics(folders, digits, name):
    vae, recorded = load_vae(folders / name), load_arrays(folders / name / "metrics.npz")
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    again = evaluate_images(vae, load_images("mnist", digits).test, 0.1, seed=seed_of(0, EVALUATION))
    for key in ("negative_elbo", "reconstruction_mse", "kl_per_dim", "second_moment"):
        np.testing.assert_allclose(again[key], recorded[key][-1], rtol=1e-5, err_msg=key)
    assert epochs_trained(folders / name) == 2


def recorded(name, pack):
    """The flags of a published model and the metrics of the same run in a pack."""
    flags = load_config(PUBLISHED / "models" / name)["flags"]
    (found,) = [run for run in open_runs([PUBLISHED / pack])
                if all(run.config["flags"][key] == value for key, value in flags.items() if key not in NOT_IDENTITY)]
    return flags, found.arrays()


def test_the_published_2d_models_reproduce_their_recorded_metrics():
    vae, (flags, arrays) = load_vae(PUBLISHED / "models" / "mixture-bao"), recorded("mixture-bao", "study2d.npz")
    test = DISTRIBUTIONS[flags["data"]].sample(flags["test_size"], evaluation_2d.evaluation_generator("cpu"))
    again = evaluation_2d.measure(SimpleNamespace(vae=vae), test, 100)
    for key in ("negative_elbo", "posterior_sd", "log_gamma"):
        np.testing.assert_allclose(again[key], arrays[key][-1], rtol=1e-5, err_msg=key)


@pytest.mark.skipif(not (DATA / "MNIST").exists(), reason=f"no MNIST in {DATA}; $VSM_DATA may name another folder")
def test_the_published_image_model_reproduces_its_recorded_metrics():
    vae, (flags, arrays) = load_vae(PUBLISHED / "models" / "mnist-mlp-elbo"), recorded("mnist-mlp-elbo", "study_mnist.npz")
    test = load_images("mnist", DATA, 0, flags["test_limit"]).test
    again = evaluate_images(vae, test, flags["noise"], seed=seed_of(flags["seed"], EVALUATION))
    for key in ("negative_elbo", "reconstruction_mse", "second_moment"):
        np.testing.assert_allclose(again[key], arrays[key][-1], rtol=1e-4, err_msg=key)


def test_an_exported_model_is_the_same_and_replaces_nothing(folders, digits, tmp_path):
    export(folders / "conv", tmp_path / "copy")
    z = torch.randn(4, 3)
    assert torch.equal(load_vae(tmp_path / "copy").decode(z), load_vae(folders / "conv").decode(z))
    config = load_config(tmp_path / "copy")
    assert place_of_images("", config, SimpleNamespace(data="folder:/nowhere", data_root=None)) == ("mnist", str(digits))
    config["data"]["counts"]["train"] += 49  # which make no further minibatch
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    assert epochs_trained(tmp_path / "copy") == 2
    with pytest.raises(UserError, match="exists and is kept"):
        export(folders / "mlp", tmp_path / "copy")


@pytest.mark.parametrize("name", ["conv", "mlp", "resnet"])
def test_a_model_loaded_twice_decodes_the_same_in_any_batch(folders, name):
    first, second = load_vae(folders / name), load_vae(folders / name)
    z = torch.randn(4, 3)
    whole, halves = first.decode(z), torch.cat([second.decode(z[:2]), second.decode(z[2:])])
    assert torch.equal(whole, second.decode(z))
    torch.testing.assert_close(whole, halves, rtol=1e-5, atol=1e-6)


def test_a_member_of_a_2d_run_is_that_of_the_ensemble(folders):
    ensemble, x, z = load_vae(folders / "plane"), torch.randn(7, 2), torch.randn(5, 7, 2)
    together, images = ensemble.encode(x.expand(3, 7, 2)), ensemble.decode(z[:, None].expand(5, 3, 7, 2))
    saved = load_checkpoint(folders / "plane" / "checkpoint.pt")["trainer"]["tensors"]
    assert torch.equal(ensemble.log_gamma, saved["vae.log_gamma"])
    for member in range(3):
        vae = load_vae(folders / "plane", member=member)
        q = vae.encode(x)
        torch.testing.assert_close(q.mean, together.mean[member])
        torch.testing.assert_close(q.stddev, together.stddev[member])
        torch.testing.assert_close(vae.decode(z), images[:, member])
        assert vae.log_gamma == ensemble.log_gamma[member] and vae.log_gamma.shape == ()
        assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    for member in (3, -1):
        with pytest.raises(UserError, match="there is no member"):
            load_vae(folders / "plane", member=member)


def test_the_documented_lines_run(folders):
    for vae, event in ((load_vae(folders / "conv"), (1, 32, 32)), (load_vae(folders / "plane", member=0), (2,))):
        x = vae.decode(vae.prior.sample((8,)))
        q = vae.encode(x)
        assert x.shape == vae.decode(q.mean).shape == (8, *event)
        assert iw_log_likelihood(vae, x, 20, "posterior").shape == (8,)


def edited(folder, to, edit):
    shutil.copytree(folder, to)
    config = load_config(to)
    edit(config)
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("edit, words", [
    (lambda config: config["flags"].update(depth=3, gain=2), "this version does not know its --depth, --gain"),
    (lambda config: config["flags"].update(dim_z="many"), "--dim-z is 'many'"),
    (lambda config: config["flags"].update(dim_z=True), "--dim-z is True"),
    (lambda config: config["flags"].pop("norm"), "--norm is None"),
    (lambda config: config["flags"].update(net="transformer"), "'transformer' is none of mlp, .*VSM_IMPORT"),
    (lambda config: config["flags"].update(dim_z=5), "does not hold the model of its config.json"),
    (lambda config: config.update(script="toy_inference"), "toy_inference.py, which trains no VAE"),
    (lambda config: config.pop("data"), "its images have the size None")])
def test_what_does_not_fit_is_named(folders, tmp_path, edit, words):
    with pytest.raises(UserError, match=words):
        load_vae(edited(folders / "conv", tmp_path / "run", edit))


@pytest.mark.parametrize("content, words", [
    (None, "does not exist"), ({}, "is not a checkpoint of a trainer"), ({"trainer": None}, "is not a checkpoint of a trainer"),
    ({"trainer": {"tensors": {"vae.log_gamma": 1.0}}}, "it holds no tensors"),
    ({"trainer": {"tensors": {}}}, "does not hold the model")])
def test_a_checkpoint_of_another_form_is_named(folders, tmp_path, content, words):
    run = shutil.copytree(folders / "mlp", tmp_path / "run")
    (run / "checkpoint.pt").unlink()
    if content is not None:
        torch.save(content, run / "checkpoint.pt")
    with pytest.raises(UserError, match=words):
        load_vae(run)


def test_another_checkpoint_of_the_folder_and_a_member_of_an_image_run(folders, tmp_path):
    run = shutil.copytree(folders / "mlp", tmp_path / "run")
    (run / "checkpoint.pt").rename(run / "epoch2.pt")
    z = torch.randn(3, 3)
    assert torch.equal(load_vae(run, checkpoint="epoch2.pt").decode(z), load_vae(folders / "mlp").decode(z))
    with pytest.raises(UserError, match="leave out member 0"):
        load_vae(folders / "mlp", member=0)
    with pytest.raises(UserError, match="is not a run folder"):
        load_vae(tmp_path)
