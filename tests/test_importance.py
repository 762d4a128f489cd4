"""Importance sampling against a linear-Gaussian VAE, whose likelihood is known, and the 2-D laws against quadrature."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from metrics import importance, iw_log_likelihood
from models import VAE, build_ensemble, build_vae
from vsm.distributions_2d import DISTRIBUTIONS, Distribution2D, distribution

ROOT = Path(__file__).parent.parent


class Affine(nn.Module):
    """The encoder of a VAE whose posterior is N(A (x - b), diag std^2)."""

    def __init__(self, A, b, std):
        super().__init__()
        self.A, self.b, self.log_std = A, b, std.log()

    def forward(self, x):
        mean = (x - self.b) @ self.A.T
        return torch.cat([mean, self.log_std.expand_as(mean)], -1)


def linear_vae(gamma=0.3, inflate=1.0):
    """g(z) = W z + b with orthogonal columns, so that the exact posterior factorises; q is that posterior with a larger std."""
    W = torch.tensor([[0.8, -0.3], [0.6, 0.4], [0.0, 1.2]], dtype=torch.float64)
    b = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    W[:, 1] -= W[:, 0] * (W[:, 0] @ W[:, 1]) / (W[:, 0] @ W[:, 0])
    precision = 1 + W.square().sum(0) / gamma
    decoder = nn.Linear(2, 3).double()
    decoder.weight.data, decoder.bias.data = W.clone(), b.clone()
    vae = VAE(Affine(W.T / gamma / precision[:, None], b, inflate * precision.rsqrt()), decoder, 2).double()
    vae.log_gamma.data = torch.tensor(math.log(gamma), dtype=torch.float64)
    return vae, MultivariateNormal(b, W @ W.T + gamma * torch.eye(3, dtype=torch.float64))


def exact(marginal, x):
    """log p, its gradient and its Laplacian."""
    P = marginal.precision_matrix
    return marginal.log_prob(x), -(x - marginal.loc) @ P, -P.trace().expand(len(x))


@pytest.mark.parametrize("proposal, samples", [("prior", 20_011), ("posterior", 1_003)])
def test_linear_gaussian_within_its_own_standard_error(proposal, samples):
    torch.manual_seed(0)
    vae, marginal = linear_vae(inflate=1.3)
    x = marginal.sample((40,))
    result = importance(vae, x, samples, proposal, torch.Generator().manual_seed(0), chunk=200)  # 200 does not divide the samples
    log_p, score, laplacian = exact(marginal, x)
    error = (1 / result.ess - 1 / samples).sqrt()
    deviations = (result.log_likelihood - log_p) / error
    assert error.max() < 0.1 and result.log_likelihood.dtype == torch.float64
    assert deviations.abs().max() < 4.5 and (proposal == "prior" or 0.6 < deviations.std() < 1.5)
    assert (result.score - score).abs().max() < 12 * error.max()
    assert (result.laplacian - laplacian).abs().max() < 40 * error.max()
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(iw_log_likelihood(vae, x, samples, proposal, generator), result.log_likelihood)
    assert torch.equal(result.score_matching_loss, result.score.square().sum(-1) / 2 + result.laplacian)


def test_with_the_exact_posterior_one_sample_is_exact():
    vae, marginal = linear_vae()
    x = marginal.sample((7,))
    for samples in (1, 13):
        result = importance(vae, x, samples, "posterior", chunk=5)
        assert torch.allclose(result.log_likelihood, marginal.log_prob(x), atol=1e-10)
        assert torch.allclose(result.ess, torch.tensor(float(samples), dtype=torch.float64))


class Fixed:
    """vae.noise that hands out rows of one block, so that differently chunked runs meet the same samples."""

    def __init__(self, block):
        self.block, self.drawn, self.largest = block, 0, 0

    def __call__(self, q, n, generator=None):
        self.drawn, self.largest = self.drawn + n, max(self.largest, n)
        return self.block[self.drawn - n:self.drawn]


def test_every_sample_counts_once_and_the_derivatives_are_those_of_the_estimate():
    """Prior samples z_n fixed, log mean_n p(x|z_n) is a function of x: its derivatives by autograd are score and Laplacian."""
    vae = build_vae("mlp", (2,), 2, width=16, init_sd=0.3).double()
    x, block = torch.randn(5, 2).double().requires_grad_(), torch.randn(103, 2).double()
    g, gamma = vae.decode(block).detach(), vae.log_gamma.exp().detach()
    log_p = (-(x[:, None] - g).square().sum(-1) / (2 * gamma)).logsumexp(1) - math.log(103) - (2 * math.pi * gamma).log()
    (score,) = torch.autograd.grad(log_p.sum(), x, create_graph=True)
    laplacian = sum(torch.autograd.grad(score[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    for chunk in (103, 10, 1):
        vae.noise = Fixed(block)
        result = importance(vae, x.detach(), 103, chunk=chunk)
        assert (vae.noise.drawn, vae.noise.largest) == (103, chunk)
        weights = (-(x[:, None] - g).square().sum(-1) / (2 * gamma)).softmax(1)
        for mine, theirs in zip(result, (log_p, score, laplacian, 1 / weights.square().sum(1)), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)


def test_a_distant_datum_neither_underflows_nor_loses_its_score():
    vae, _marginal = linear_vae(gamma=1e-4)
    x = torch.full((1, 3), 30.0, dtype=torch.float64)
    result = importance(vae, x, 1000, generator=torch.Generator().manual_seed(0))
    assert result.log_likelihood.isfinite().all() and result.log_likelihood < -1e5
    assert result.score.norm() > 1e5 and result.ess.isfinite().all()


def test_members_of_an_ensemble_are_evaluated_as_if_alone():
    ensemble, x = build_ensemble(2, 2, 8, [5, 6]), torch.randn(9, 2)
    for proposal in ("prior", "posterior"):
        together = importance(ensemble, x.expand(2, 9, 2), 50, proposal, torch.Generator().manual_seed(0), chunk=20)
        assert together.log_likelihood.shape == together.ess.shape == (2, 9) and together.score.shape == (2, 9, 2)
        if proposal == "prior":
            alone = importance(build_ensemble(2, 2, 8, [6]), x[None], 50, proposal, torch.Generator().manual_seed(0), chunk=20)
            assert all(torch.allclose(a[1], b[0], rtol=1e-5) for a, b in zip(together, alone))


def test_images_and_an_unknown_proposal():
    vae, x = build_vae("conv", (1, 32, 32), 3, width=4), torch.rand(4, 1, 32, 32)
    result = importance(vae, x, 6, "posterior", chunk=4)
    assert result.log_likelihood.shape == (4,) and result.score.shape == (4, 1024) and result.score_matching_loss.isfinite().all()
    with pytest.raises(ValueError, match="prior or posterior, not 'q'"):
        importance(vae, x, 6, "q")


@pytest.mark.slow
def test_a_hundred_thousand_samples_of_five_thousand_data_stay_under_a_gigabyte():
    code = ("import resource, torch; from metrics import importance; from models import build_ensemble;"
            "importance(build_ensemble(2, 2, 30, [0, 1]), torch.randn(5000, 2).expand(2, 5000, 2), 100_003);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1e9


# ------------------------------------------------------------------------------------------------------------ 2-D laws


def grid(half=4.0, n=1601):
    line = torch.linspace(-half, half, n, dtype=torch.float64)
    return torch.cartesian_prod(line, line), (line[1] - line[0]) ** 2


@pytest.mark.parametrize("name", ["mixture", "banana", "ring"])
def test_densities_integrate_to_one_and_match_their_samples(name):
    law, (x, cell) = DISTRIBUTIONS[name], grid()
    log_p = law.log_prob(x)
    p = log_p.exp() * cell
    assert abs(p.sum() - 1) < 2e-4
    assert abs(-(p * log_p.nan_to_num()).sum() - law.entropy) < 1e-3
    sample = law.sample(200_000, torch.Generator().manual_seed(0)).double()
    surprise = -law.log_prob(sample)
    assert abs(surprise.mean() - law.entropy) < 4 * surprise.std() / len(sample) ** 0.5
    assert torch.allclose(sample.T.cov(), (x * p[:, None]).T @ x - torch.outer(p @ x, p @ x), atol=5e-3)
    assert torch.allclose(law.score(sample).mean(0), torch.zeros(2, dtype=torch.float64), atol=0.1)  # E grad log p = 0
    h, points = 1e-6, sample[:20]
    for i, step in enumerate(torch.eye(2, dtype=torch.float64) * h):
        slope = (law.log_prob(points + step) - law.log_prob(points - step)) / (2 * h)
        assert torch.allclose(law.score(points)[:, i], slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, sd", [("sparse", 0.01), ("spiral", 0.04)])
def test_integrated_densities_are_those_of_their_samples(name, sd):
    """p(x) is the mean of N(x; centre, sd^2 I) over the centres, which are the law without its last noise."""
    law, generator = DISTRIBUTIONS[name], torch.Generator().manual_seed(0)
    x = law.sample(12, generator).double()
    u = torch.randn(1_000_000, law.dim_noise, generator=generator, dtype=torch.float64)
    u[:, slice(2, None) if name == "sparse" else slice(None, 2)] = 0
    kernel = torch.exp(-((x[:, None] - law.transform(u)) ** 2).sum(-1) / (2 * sd**2)) / (2 * math.pi * sd**2)
    mean, error = kernel.mean(1), kernel.std(1) / len(u) ** 0.5
    assert ((law.log_prob(x).exp() - mean).abs() < 4 * error).all()
    score = law.score(x)
    for i, step in enumerate(1e-5 * torch.eye(2, dtype=torch.float64)):
        up, down = law.log_prob(x + step), law.log_prob(x - step)
        torch.testing.assert_close(score[:, i], (up - down) / 2e-5, rtol=1e-4, atol=1e-4)
    loss = (score**2).sum(-1) / 2
    for step in 1e-4 * torch.eye(2, dtype=torch.float64):
        loss += (law.log_prob(x + step) - 2 * law.log_prob(x) + law.log_prob(x - step)) / 1e-8
    torch.testing.assert_close(law.score_matching_loss(x), loss, rtol=1e-3, atol=1e-3 / sd)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_densities_with_noise_are_those_of_their_samples(name):
    """p(x) is the mean of N(x; x0, sd^2 I) over clean points x0."""
    sd, generator = 0.15, torch.Generator().manual_seed(0)
    law = distribution(name, sd)
    x = law.sample(12, generator).double()
    clean = DISTRIBUTIONS[name].sample(400_000, generator).double()
    kernel = torch.exp(-torch.cdist(x, clean) ** 2 / (2 * sd**2)) / (2 * math.pi * sd**2)
    mean, error = kernel.mean(1), kernel.std(1) / len(clean) ** 0.5
    assert ((law.log_prob(x).exp() - mean).abs() < 4 * error).all()
    pull = (kernel[..., None] * (clean - x[:, None])).mean(1) / sd**2 / mean[:, None]  # grad log p(x) = E[x0 - x | x] / sd^2
    torch.testing.assert_close(law.score(x), pull, rtol=0.05, atol=0.1)
    loss = (law.score(x) ** 2).sum(-1) / 2
    for step in 1e-4 * torch.eye(2, dtype=torch.float64):
        loss += (law.log_prob(x + step) - 2 * law.log_prob(x) + law.log_prob(x - step)) / 1e-8
    torch.testing.assert_close(law.score_matching_loss(x), loss, rtol=1e-3, atol=1e-2)


def test_known_values_of_the_laws():
    assert abs(DISTRIBUTIONS["mixture"].entropy - 0.3116) < 1e-4
    x = DISTRIBUTIONS["sparse"].sample(400_000, torch.Generator().manual_seed(0))
    A = torch.tensor([[1, 0.3], [-0.3, 1]]) / 10  # cov of sign(u) u^2 is E u^4 = 3
    assert torch.allclose(x.T.cov(), 3 * A.T @ A + 1e-4 * torch.eye(2), atol=1e-3)
    x = DISTRIBUTIONS["spiral"].sample(1000, torch.Generator().manual_seed(0))
    assert 0.9 < x.norm(dim=1).max() < 1.3
    class Unknown(Distribution2D):
        """A law without a density."""

    with pytest.raises(ValueError, match="density of unknown is not known"):
        Unknown().score(x)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, again, other = (DISTRIBUTIONS["ring"].sample(10, generator) for generator in generators)
    assert torch.equal(first, again) and not torch.equal(first, other)
