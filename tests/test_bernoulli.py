"""Bernoulli latents: the closed forms by enumeration of all z, the relaxation, and the command line."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import train_images
from metrics import iw_log_likelihood
from models import VAE
from objectives import LEARN, elbo, fd, latent_score_gap, posterior_score
from training import latent_noise, phi_loss
from vsm.runs import load_arrays

B, D, DZ = 5, 4, 3
ALL_Z = torch.tensor(list(itertools.product((0.0, 1.0), repeat=DZ)), dtype=torch.float64)[:, None].expand(-1, B, -1)  # [8, B, Dz]


@pytest.fixture
def vae():
    torch.manual_seed(0)
    encoder, decoder = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, DZ)), nn.Linear(DZ, D)
    return VAE(encoder, decoder, DZ, latent="bernoulli", init_sd=0.7).double()


@pytest.fixture
def x():
    return torch.randn(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_kl_is_the_enumerated_one_and_smooth_for_certain_posteriors(vae, x):
    q = vae.encode(x)
    enumerated = (q.log_prob(ALL_Z).exp() * (q.log_prob(ALL_Z) - vae.prior.log_prob(ALL_Z))).sum(0)
    assert torch.allclose(vae.kl(q).sum(-1), enumerated)
    logits = torch.tensor([[-200.0, 0.0, 200.0]], dtype=torch.float64, requires_grad=True)
    kl = vae.kl(torch.distributions.Independent(torch.distributions.Bernoulli(logits=logits), 1))
    assert torch.allclose(kl, torch.tensor([[np.log(2), 0, np.log(2)]]))
    assert torch.autograd.grad(kl.sum(), logits)[0].isfinite().all()


def test_hard_draws_have_the_posterior_mean_and_soft_ones_reach_them_as_the_temperature_falls(vae, x):
    q = vae.encode(x)
    noise = vae.noise(q, 20_000, torch.Generator().manual_seed(0))
    hard = vae.sample(q, noise, relaxed=False)
    assert set(hard.unique().tolist()) == {0.0, 1.0} and not hard.requires_grad
    assert torch.allclose(hard.mean(0), q.mean, atol=4 * 0.5 / 20_000**0.5)
    gaps = []
    for vae.temperature in (1.0, 0.1, 0.001):
        soft = vae.sample(q, noise)
        assert torch.autograd.grad(soft.sum(), q.base_dist.logits, retain_graph=True)[0].ne(0).all()
        gaps.append((soft - hard).abs().mean().item())
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-3


def test_elbo_bounds_the_exact_likelihood_and_the_importance_weighted_bound_reaches_it(vae, x):
    q = vae.encode(x)
    log_lik = torch.distributions.Normal(vae.decode(ALL_Z), vae.log_gamma.exp().sqrt()).log_prob(x).sum(-1)
    exact = (log_lik + vae.prior.log_prob(ALL_Z)).logsumexp(0)
    negative_elbo = sum(q.log_prob(z).exp() * elbo(vae, x, q, z[None]) for z in ALL_Z)
    assert (negative_elbo >= -exact).all()
    generator = torch.Generator().manual_seed(0)
    for proposal in ("prior", "posterior"):
        assert torch.allclose(iw_log_likelihood(vae, x, 20_000, proposal, generator), exact, atol=0.05)


def test_the_posterior_score_has_mean_zero_and_is_the_encoders_gradient(vae, x):
    q = vae.encode(x)
    b = posterior_score(vae, x, q, ALL_Z)
    assert torch.allclose((q.log_prob(ALL_Z).exp()[..., None] * b).sum(0), torch.zeros(B, D, dtype=torch.float64), atol=1e-12)
    shift = 1e-6 * torch.eye(D, dtype=torch.float64)[0]
    difference = (vae.encode(x + shift).log_prob(ALL_Z) - vae.encode(x - shift).log_prob(ALL_Z)) / 2e-6
    assert torch.allclose(b[..., 0], difference, atol=1e-6)


def test_the_posterior_fisher_divergence_is_refused(vae, x):
    q = vae.encode(x)
    with pytest.raises(ValueError, match="continuous latents"):
        latent_score_gap(vae, x, q, ALL_Z)
    assert fd(vae, x, q, ALL_Z).shape == (B,)


@pytest.mark.parametrize("learn", [name for name, entry in LEARN.items() if not entry.joint])
def test_every_learning_objective_trains_binary_latents(digits, tmp_path, monkeypatch, learn):
    if learn != "fd":  # one run draws its pictures
        monkeypatch.setattr("train_images.draw_run", lambda run: None)
    run = tmp_path / "run"
    args = train_images.parse_args([
        "--data", "mnist", "--data-root", str(digits), "--latent", "bernoulli", "--temperature", "0.4", "--learn", learn,
        "--width", "4", "--dim-z", "6", "--samples", "2", "--inner-steps", "1", "--batch", "50", "--epochs", "2",
        "--eval-every", "1", "--lr", "1e-3", "--device", "cpu", "--out", str(run)])
    train_images.main(args)
    arrays = load_arrays(run / "metrics.npz")
    assert arrays["status"] == "ok"
    assert arrays["posterior_mean"].shape == (3, 6)
    assert arrays["posterior_mean_histogram"].shape == (3, 40) and np.allclose(arrays["posterior_mean_histogram"].sum(1), 1)
    assert "posterior_sd" not in arrays and "posterior_fd" not in arrays
    assert (run / "posterior_mean.png").exists() == (learn == "fd") and not (run / "posterior_sd.png").exists()


def test_the_runs_name_and_the_refused_pairs(fails):
    args = train_images.parse_args(["--latent", "bernoulli", "--temperature", "0.3"])
    assert args.out == "runs/images/mnist-conv-kld-fd-latentbernoulli-temperature0.3-seed0"
    for argv in (["--infer", "fd"], ["--infer", "fd-repar"], ["--learn", "fae"]):
        assert "--latent bernoulli goes with --infer kld" in fails(train_images, "--latent", "bernoulli", *argv)
    assert "--latent bernoulli only" in fails(train_images, "--temperature", "0.3")


def test_two_bits_of_data_take_some_latents_and_leave_the_others_at_one_half():
    torch.manual_seed(0)
    encoder, decoder = (nn.Sequential(nn.Linear(n_in, 32), nn.ReLU(), nn.Linear(32, n_out)) for n_in, n_out in ((D, 8), (8, D)))
    vae = VAE(encoder, decoder, 8, latent="bernoulli", init_sd=0.3)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(vae.parameters(), 1e-2)
    for _ in range(600):
        bits = torch.randint(2, (100, 2), generator=generator).float()
        x = bits.repeat(1, 2) + 0.1 * torch.randn(100, D, generator=generator)
        optimiser.zero_grad()
        phi_loss(vae, x, "kld", latent_noise(vae, x, 1, generator)).mean().backward()
        optimiser.step()
    distance = (vae.encode(x).mean - 0.5).abs().amax(0)  # over the data, per latent
    assert (distance > 0.4).sum() >= 2 and (distance < 0.1).sum() >= 3
