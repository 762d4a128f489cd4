"""Denoising score matching: its equality with B, its stationary points and its kappa, as docs/theory.md states them."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from models import VAE
from objectives import LEARN, dot, dsm, likelihood_score, posterior_score
from vsm.linear import kappa, linear_vae, measured_kappa, set_posterior


def test_the_loss_equals_its_closed_form_and_is_least_at_the_stationary_gamma():
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 5, 4, generator=generator).double()
    vae = linear_vae(torch.randn(4, 3, generator=generator).double() * 0.6, 0.5).requires_grad_(False)
    set_posterior(vae, alpha=1.4)
    q = vae.encode(x)
    r = x - vae.decode(q.mean[None])[0]
    z = q.sample((2, 4000))  # 4000 estimates with two samples each
    losses = torch.stack([dsm(vae, x, q, pair, t, "unbiased") for pair in z.unbind(1)])
    error = losses.std(0) / math.sqrt(len(losses))
    assert ((losses.mean(0) - ((r / 0.5 + t).square() - t.square()).sum(-1) / 2).abs() < 4 * error).all()
    assert (error < 0.3).all()

    rbar = x - vae.decode(z[:, 0]).mean(0)
    t = t - rbar  # so that there is a minimum

    def loss(log_gamma):
        vae.log_gamma.fill_(log_gamma)
        return dsm(vae, x, q, z[:, 0], t).sum().item()

    found = minimize_scalar(loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-9})
    assert math.exp(found.x) == pytest.approx(-(rbar.square().sum() / (rbar * t).sum()).item(), rel=1e-5)


@pytest.mark.parametrize("norm", [False, True])
def test_dsm_has_the_expected_gradient_of_bao(norm):
    """On noisy data, for a nonlinear decoder and any q; with batch norm for the joint q of a minibatch of 8 data."""
    torch.manual_seed(0)
    layers = [nn.Linear(2, 6), *[nn.BatchNorm1d(6)] * norm, nn.Tanh(), nn.Linear(6, 4)]
    vae = VAE(nn.Sequential(*layers), nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2)), 2, init_sd=0.6).double()
    vae.encoder.requires_grad_(False)
    theta, sd, gaps, norms = [*vae.decoder.parameters(), vae.log_gamma], 0.5, [], []
    for _ in range(300 if norm else 20):
        x0, e = torch.rand(8 if norm else 2000, 2).double(), torch.randn(8 if norm else 2000, 2).double()
        gradients = []
        for sign in (1, -1):  # noise of either sign, for less variance
            x = (x0 + sign * sd * e).requires_grad_()
            q = vae.encode(x)
            z = q.sample((2,)).detach()
            losses = dsm(vae, x, q, z, -sign * e / sd, "unbiased"), LEARN["bao"](vae, x, q, z, estimator="unbiased")
            gradients += [torch.cat([g.flatten() for g in torch.autograd.grad(loss.mean(), theta)]) for loss in losses]
        gaps.append((gradients[0] + gradients[2] - gradients[1] - gradients[3]) / 2)
        norms.append((gradients[1] + gradients[3]) / 2)
    gaps, expected = torch.stack(gaps), torch.stack(norms).mean(0)
    error = gaps.std(0) / math.sqrt(len(gaps))
    assert (gaps.mean(0).abs() < 4 * error + 1e-12).all()
    assert error.norm() < 0.2 * expected.norm()


def test_with_the_exact_posterior_the_truth_is_stationary_for_dsm_but_not_for_swersky():
    """For a nonlinear decoder: one latent, whose exact posterior is a sum over a grid, and data from the model itself.

    The model's noise is the data's: x0 = g(z), so sd^2 = gamma.
    """
    torch.manual_seed(0)
    grid = torch.linspace(-4, 4, 33).double()
    prior = torch.softmax(-grid**2 / 2, 0)
    decoder = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    gamma, g = 0.3, decoder(grid[:, None])
    e = torch.cartesian_prod(*[torch.linspace(-5, 5, 21).double()] * 2)
    weight = torch.softmax(-(e**2).sum(-1) / 2, 0)
    x = (g.detach()[:, None] + math.sqrt(gamma) * e).flatten(0, 1)
    mass = (prior[:, None] * weight).flatten()
    density = torch.softmax(prior.log() - torch.cdist(x, g.detach()) ** 2 / (2 * gamma), 1)  # p(z|x) [B, grid]
    a = (g - x[:, None]) / gamma  # [B, grid, D]
    abar, square = (density[..., None] * a).sum(1), (density * a.square().sum(-1)).sum(1)
    t = -(e / math.sqrt(gamma)).repeat(len(grid), 1)

    def gradient(loss):
        total = (mass * loss).sum()
        return torch.cat([part.flatten() for part in torch.autograd.grad(total, decoder.parameters(), retain_graph=True)]).norm()

    of_dsm, of_swersky = gradient((abar - t).square().sum(-1) / 2), gradient(square - abar.square().sum(-1) / 2)
    assert of_dsm < 0.01 * of_swersky


def test_the_released_estimator_is_refused():
    with pytest.raises(ValueError, match="released no estimator of denoising"):
        dsm(None, None, None, None, None, estimator="released")


def denoising(outer):
    """1/2 ||a - b - t||^2 per sample, or (outer) of the mean over samples."""
    def loss(vae, x, q, z, t):
        gap = likelihood_score(vae, x, q, z)[0] - posterior_score(vae, x, q, z) - t
        return dot(gap.mean(0), gap.mean(0)) / 2 if outer else dot(gap, gap).mean(0) / 2

    return loss


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_the_four_forms_of_denoising_score_matching(alpha):
    for N in (1, 2, 5):
        assert measured_kappa(denoising(outer=False), N, alpha) == pytest.approx(kappa("fd", N=N, alpha=alpha), rel=1e-9)
        assert measured_kappa(denoising(outer=True), N, alpha) == pytest.approx(1 + (alpha - 1) / N, rel=1e-9)
        assert measured_kappa(dsm, N, alpha) == pytest.approx(1 + alpha / N, rel=1e-9)
