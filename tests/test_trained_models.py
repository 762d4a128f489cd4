"""What studies measure of trained models: the gradient's signal-to-noise ratio, and the scale of the latents."""

import math
import shutil

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from data import load_images
from studies import gradient_snr, latent_scale
from studies.gradient_snr import differentiable_decoder, gradient_moments
from studies.latent_scale import measure_latent_scale
from test_evaluate import train
from vsm.figures import images as figures
from vsm.linear import linear_vae, set_posterior
from vsm.loading import load_vae
from vsm.runs import load_arrays, load_config, save_arrays
from vsm.stored_runs import StoredRun

SCALES = [("elbo", "plugin", 0), ("swersky", "plugin", 0.8), ("swersky", "unbiased", 1), ("bao", "plugin", 0.2),
          ("bao", "unbiased", 0)]


@pytest.mark.parametrize("learn, estimator, excess", SCALES)
def test_the_scale_of_a_linear_vae_is_that_of_the_contraction(learn, estimator, excess):
    W = torch.linalg.qr(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))[0] * torch.tensor([0.8, 0.4])
    vae = linear_vae(W, gamma := 0.05, (1, 4, 4))
    set_posterior(vae)
    active = (W.square().sum(0) / (W.square().sum(0) + gamma)).mean().item()  # trace(Cov_q g) / gamma and div_x E_q g, over Dz
    images = torch.randint(0, 256, (200, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    flags = {"learn": learn, "infer": "kld", "estimator": estimator, "samples": 5, "batch": 50, "noise": 0.1, "seed": 0}
    measured = measure_latent_scale(vae, images, flags)
    error = measured["predicted_moment_se"]
    assert abs(measured["predicted_moment"] - 1 - excess * active) <= 4 * error <= 0.1
    assert measured["divergence_slope"] == pytest.approx(2 * active, abs=4 * measured["divergence_slope_se"])
    assert math.isnan(measure_latent_scale(vae, images, flags | {"infer": "fd"})["predicted_moment"])


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained") / "a", "--data-root", digits)


@pytest.fixture
def half(trained, tmp_path):
    """The run as it was before it ended."""
    arrays = load_arrays(shutil.copytree(trained, tmp_path / "half") / "metrics.npz")
    del arrays["status"]
    save_arrays(tmp_path / "half" / "metrics.npz", arrays.pop("config"), **arrays)
    return tmp_path / "half"


def run_study(study, *argv):
    study.main(study.parse_args([*map(str, argv), "--device", "cpu"]))


def test_gradient_snr(trained, half, monkeypatch, tmp_path, fails):
    monkeypatch.setattr("studies.gradient_snr.SAMPLES", (1, 2))
    assert "at least 2" in fails(gradient_snr, trained, "--draws", "1")
    measured, measure = [], gradient_snr.measure_gradient_snr
    monkeypatch.setattr(gradient_snr, "measure_gradient_snr", lambda *args: (measured.append(args[3:5]), measure(*args))[1])
    run_study(gradient_snr, trained, "--draws", 2)
    arrays = load_arrays(trained / "gradient_snr.npz")
    names = ["ELBO", "F", "S plugin", "S unbiased", "B plugin", "B unbiased", "B released", "DSM plugin", "DSM unbiased", "FAE"]
    assert arrays["objectives"].tolist() == names and arrays["samples"].tolist() == [1, 2]
    assert [name for name, snr in zip(names, arrays["snr"]) if np.isnan(snr[0])] == ["S unbiased", "B unbiased", "DSM unbiased"]
    assert np.isfinite(arrays["snr"][:, 1:]).all() and (trained / "gradient_snr.png").exists()
    run_study(gradient_snr, half, "--draws", 3, "--mode", "train")
    assert measured == [(2, "eval"), (3, "train")]
    by_training = load_arrays(half / "gradient_snr_train.npz")
    assert by_training["status"] == "unfinished@8" and by_training["config"]["evaluation"] == {"draws": 3, "mode": "train"}
    assert np.isfinite(by_training["snr_se"][:, 1:]).all() and (by_training["snr_se"][:, 1:] > 0).all()
    assert not (half / "gradient_snr.npz").exists()
    parts = {"gradient_snr": arrays, "gradient_snr_train": by_training}  # a run with both has a row for each
    figures.gradient_snr([StoredRun("both", lambda: arrays["config"], parts.get, parts)], tmp_path / "both.png")
    assert len(imread(tmp_path / "both.png")) > 1.5 * len(imread(trained / "gradient_snr.png"))


def test_latent_scale(trained, half, capsys, monkeypatch):
    monkeypatch.setattr("studies.latent_scale.MINIBATCHES", 3)
    run_study(latent_scale, trained, half)
    out = capsys.readouterr().out
    for run in (trained, half):
        arrays = load_arrays(run / "latent_scale.npz")
        assert f"the mean E z^2 is {arrays['second_moment']:.3g}; where" in out and arrays["second_moment"] > 0
        assert arrays["variance_slope"] == pytest.approx(0, abs=1e-2)  # batch norm: the decoder does not feel the scale
    assert arrays["config"]["evaluation"] == {"minibatches": 3, "samples": 16} and arrays["status"] == "unfinished@8"


def test_the_gradients_mode_couples_data_and_leaves_the_model_as_it_was(trained, digits):
    vae, images = load_vae(trained), load_images("mnist", digits).train
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    found = {}
    for mode in ("eval", "train"):
        flags, generator = load_config(trained)["flags"], torch.Generator().manual_seed(0)
        found[mode] = gradient_moments(differentiable_decoder(vae, mode), images, flags, "fd", "plugin", 2, 3, generator).mean
    assert not torch.allclose(found["eval"], found["train"], rtol=0.01)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())


@pytest.mark.slow
def test_gradient_moments_are_unbiased_and_posterior_samples_lower_the_variance(trained, digits):
    config, vae = load_config(trained), load_vae(trained)
    vae.decoder.requires_grad_(True)
    vae.log_gamma.requires_grad_(True)
    images = load_images("mnist", digits).train

    def moments(samples, seed, draws=150):
        flags, generator = config["flags"] | {"batch": 5}, torch.Generator().manual_seed(seed)
        return gradient_moments(vae, images, flags, "fd", "plugin", samples, draws, generator)

    (mean1, signal1, variance1, error1), (mean2, signal2, variance2, _) = moments(1, 0), moments(1, 1)
    product = (mean1[:-1] * mean2[:-1]).sum()  # independent: its mean is ||E g||^2
    assert abs(product - (signal1[0] + signal2[0]) / 2) < 4 * (2 * signal1[0] * variance1[0] / 150
                                                               + variance1[0]**2 / 150**2).sqrt()
    assert variance1[0] == pytest.approx(variance2[0].item(), rel=0.5)
    assert moments(10, 2).variance[0] < variance1[0]
    ratios = torch.stack([found.signal / found.variance for found in (moments(1, seed, 20) for seed in range(3, 15))])
    # The jackknife's error is roughly that of repetitions.
    assert (moments(1, 3, 20).snr_se / ratios.std(0)).log2().abs().max() < 1.2
    assert (error1 < moments(1, 3, 20).snr_se).all()
