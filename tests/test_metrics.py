"""Every term against its closed form on a linear VAE, arrays of a row by their definitions, importance sampling, the 2-D laws."""

import math
import subprocess
import sys

import pytest
import torch
from torch.distributions import MultivariateNormal

import evaluate
import metrics
from linear_models import affine_vae, closed_forms, objectives_of
from metrics import evaluate_images, importance, latent_mmd, negative_elbo, objective_terms, precision_recall, reconstruction_mse
from models import build_ensemble, build_vae
from objectives import INFER, LEARN
from small_runs import ROOT
from vsm.distributions_2d import DISTRIBUTIONS, Distribution2D, distribution
from vsm.features import LeNet5


def test_every_term_equals_its_closed_form(linear):
    vae, x = linear.vae, linear.x
    q, z = posterior_draws(vae, x, 20_000)
    terms, exact = objective_terms(vae, x, q, z), closed_forms(linear)
    assert terms.keys() == exact.keys()
    for name, value in exact.items():
        torch.testing.assert_close(terms[name], value, rtol=0.05, atol=0.05, msg=lambda message, name=name: f"{name}: {message}")


def test_the_objectives_are_the_sums_of_the_terms(linear):
    vae, x = linear.vae, linear.x.requires_grad_()
    q, z = posterior_draws(vae, x, 7)
    t = objective_terms(vae, x, q, z)
    for name, value in objectives_of(t).items():
        torch.testing.assert_close(LEARN[name](vae, x, q, z), value)
    torch.testing.assert_close(INFER["fd"](vae, x, q, z), t["half_c2"])


def posterior_draws(vae, x, n):
    q = vae.encode(x)
    return q, vae.sample(q, vae.noise(q, n, torch.Generator().manual_seed(1))).detach()


def test_metrics_of_a_model_are_the_means_that_they_say(linear):
    vae, x, exact = linear.vae, linear.x, closed_forms(linear)
    elbo = negative_elbo(vae, x, 50_000, torch.Generator().manual_seed(1))
    torch.testing.assert_close(elbo, exact["reconstruction"] + exact["kl"], rtol=0.02, atol=0.02)
    divergence = metrics.posterior_fd(vae, x, 50_000, torch.Generator().manual_seed(1))
    torch.testing.assert_close(divergence, exact["half_c2"], rtol=0.03, atol=0.03)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (30, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return build_vae("mlp", (1, 32, 32), 4, width=16)


def test_a_row_of_metrics_by_its_definitions(vae, images):
    """The same draws in the same order: noise of the images, noise of z, then the prior's."""
    images, generator = images.repeat(5, 1, 1, 1), torch.Generator().manual_seed(5)
    row, clean = evaluate_images(vae, images, 0.3, samples=2, seed=5, block=150), images.float() / 255
    x = clean + 0.3 * torch.randn(clean.shape, generator=generator)
    with torch.no_grad():
        q = vae.encode(x)
        z = vae.sample(q, vae.noise(q, 2, generator))
        prior, g = vae.sample(vae.prior, vae.noise(vae.prior, 150, generator)), vae.decode(q.mean)
    assert row["reconstruction_mse"] == pytest.approx((clean - g).square().mean().item(), rel=1e-5)  # to the clean image
    assert row["reconstruction_mse"] != pytest.approx((x - g).square().mean().item(), rel=0.05)
    assert row["latent_mmd"] == pytest.approx(latent_mmd(z[0], prior).item())  # of samples, not of posterior means
    assert row["latent_mmd_scaled"] == pytest.approx(latent_mmd(z[0], prior, scaled=True).item())
    c = INFER["fd"](vae, x, q, z).detach().double()
    assert row["posterior_fd"] == pytest.approx(c.mean().item())
    assert row["posterior_fd_median"] == pytest.approx(c.median().item())
    assert row["negative_elbo"] == pytest.approx(LEARN["elbo"](vae, x, q, z).double().mean().item())
    torch.testing.assert_close(row["kl_per_dim"], vae.kl(q).double().mean(0))
    torch.testing.assert_close(row["posterior_sd"], q.stddev.double().mean(0))
    torch.testing.assert_close(row["second_moment"], (q.mean**2 + q.variance).double().mean(0))
    assert row["log_gamma"] == vae.log_gamma.double() and row["kl"] == pytest.approx(row["kl_per_dim"].sum().item())
    assert row["active_units"] == len((q.mean.double().var(0) > 0.01).nonzero().flatten())


def test_reconstruction_mse_takes_the_target_it_is_given(vae, images):
    x = images.float() / 255
    with torch.no_grad():
        g = vae.decode(vae.encode(x).mean)
    torch.testing.assert_close(reconstruction_mse(vae, x), (x - g).square().mean((1, 2, 3)).double(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(reconstruction_mse(vae, x, 0 * x), g.square().mean((1, 2, 3)).double(), rtol=1e-5, atol=1e-8)


def test_importance_bounds_are_means_over_noisy_images(vae, images):
    found = evaluate.importance_bounds(vae, images[:10], 0.1, 5, torch.Generator().manual_seed(0))
    assert found["iw_samples"].tolist() == [1, 3, 5]
    clean = images[:10].float() / 255
    e = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    elbo = negative_elbo(vae, clean + 0.1 * e, 200, torch.Generator().manual_seed(1)).mean()
    assert found["negative_iw_bound"][0] == pytest.approx(elbo.item(), rel=0.05)


def test_a_unit_is_active_by_its_variance(images):
    """Posterior means with sds 0.05, 0.09, 0.11 and 1: the last two have a variance above 0.01."""
    torch.manual_seed(0)
    vae = build_vae("mlp", (1, 32, 32), 4, width=16)
    with torch.no_grad():
        sds, layer = torch.cat([torch.tensor([0.05, 0.09, 0.11, 1]), torch.ones(4)]), vae.encoder[-1][-1]
        layer.weight *= (sds / vae.encoder(images.float() / 255).std(0))[:, None]
    assert evaluate_images(vae, images, 0.0)["active_units"] == 2


def test_rescaling_a_lenet_changes_no_class_score():
    network, images = LeNet5(), torch.full((2, 1, 32, 32), 255, dtype=torch.uint8)
    images[1, :, :16] = 0
    with torch.no_grad():
        before = network.head(network(images))
        network.rescale(images)
        torch.testing.assert_close(network.head(network(images)), before)
        assert network(images).square().mean() == pytest.approx(1, rel=1e-5)


def linear_vae(gamma=0.3, inflate=1.0):
    """g(z) = W z + b with orthogonal columns, so that the exact posterior factorises; q is that posterior with a larger std."""
    W = torch.tensor([[0.8, -0.3], [0.6, 0.4], [0.0, 1.2]], dtype=torch.float64)
    b = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    W[:, 1] -= W[:, 0] * (W[:, 0] @ W[:, 1]) / (W[:, 0] @ W[:, 0])
    precision = 1 + W.square().sum(0) / gamma
    A = W.T / gamma / precision[:, None]
    vae = affine_vae(W.clone(), b.clone(), A, -A @ b, inflate * precision.rsqrt(), gamma)
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
    assert torch.equal(metrics.iw_log_likelihood(vae, x, samples, proposal, generator), result.log_likelihood)
    assert torch.equal(result.score_matching_loss, result.score.square().sum(-1) / 2 + result.laplacian)


def test_with_the_exact_posterior_one_sample_is_exact():
    vae, marginal = linear_vae()
    x = marginal.sample((7,))
    for samples in (1, 13):
        result = importance(vae, x, samples, "posterior", chunk=5)
        assert torch.allclose(result.log_likelihood, marginal.log_prob(x), atol=1e-10)
        assert torch.allclose(result.ess, torch.tensor(float(samples), dtype=torch.float64))


def test_every_sample_counts_once_and_the_derivatives_are_those_of_the_estimate():
    """Prior samples z_n fixed, log mean_n p(x|z_n) is a function of x: its derivatives by autograd are score and Laplacian."""
    vae = build_vae("mlp", (2,), 2, width=16, init_sd=0.3).double()
    x, block = torch.randn(5, 2).double().requires_grad_(), torch.randn(103, 2).double()
    g, gamma = vae.decode(block).detach(), vae.log_gamma.exp().detach()
    log_p = (-(x[:, None] - g).square().sum(-1) / (2 * gamma)).logsumexp(1) - math.log(103) - (2 * math.pi * gamma).log()
    (score,) = torch.autograd.grad(log_p.sum(), x, create_graph=True)
    laplacian = sum(torch.autograd.grad(score[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    for chunk in (103, 10, 1):
        sizes = []  # of blocks: differently chunked runs meet the same samples
        vae.noise = lambda q, n, generator=None, sizes=sizes: (sizes.append(n), block[sum(sizes) - n:sum(sizes)])[1]
        result = importance(vae, x.detach(), 103, chunk=chunk)
        assert (sum(sizes), max(sizes)) == (103, chunk)
        weights = (-(x[:, None] - g).square().sum(-1) / (2 * gamma)).softmax(1)
        for mine, theirs in zip(result, (log_p, score, laplacian, 1 / weights.square().sum(1)), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)


def test_a_distant_datum_neither_underflows_nor_loses_its_score():
    vae, _marginal = linear_vae(gamma=1e-4)
    result = importance(vae, torch.full((1, 3), 30.0, dtype=torch.float64), 1000, generator=torch.Generator().manual_seed(0))
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
    assert int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout) < 1e9


def grid(half=4.0, n=1601):
    line = torch.linspace(-half, half, n, dtype=torch.float64)
    return torch.cartesian_prod(line, line), (line[1] - line[0]) ** 2


@pytest.mark.parametrize("name", ["mixture", "banana", "ring"])
def test_densities_integrate_to_one_and_match_their_samples(name):
    law, (x, cell) = DISTRIBUTIONS[name], grid()
    log_p = law.log_prob(x)
    p = log_p.exp() * cell
    entropy = -(p * log_p.nan_to_num()).sum()
    assert abs(p.sum() - 1) < 2e-4 and (name != "mixture" or abs(entropy - 0.3116) < 1e-3)
    sample = law.sample(200_000, torch.Generator().manual_seed(0)).double()
    surprise = -law.log_prob(sample)
    assert abs(surprise.mean() - entropy) < 1e-3 + 4 * surprise.std() / len(sample) ** 0.5
    assert torch.allclose(sample.T.cov(), (x * p[:, None]).T @ x - torch.outer(p @ x, p @ x), atol=5e-3)
    assert torch.allclose(law.score(sample).mean(0), torch.zeros(2, dtype=torch.float64), atol=0.1)  # E grad log p = 0
    assert_derivatives(law, sample[:20], 1e-2)


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
    assert_derivatives(law, x, 1e-3 / sd)


def assert_derivatives(law, x, atol):
    """The score and the score matching loss are those of log p by finite differences."""
    score = law.score(x)
    loss = (score**2).sum(-1) / 2
    for i, step in enumerate(torch.eye(2, dtype=torch.float64)):
        up, down = law.log_prob(x + 1e-5 * step), law.log_prob(x - 1e-5 * step)
        torch.testing.assert_close(score[:, i], (up - down) / 2e-5, rtol=1e-4, atol=1e-4)
        loss += (law.log_prob(x + 1e-4 * step) - 2 * law.log_prob(x) + law.log_prob(x - 1e-4 * step)) / 1e-8
    torch.testing.assert_close(law.score_matching_loss(x), loss, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_densities_with_noise_are_those_of_their_samples(name):
    """p(x) is the mean of N(x; x0, sd^2 I) over clean points x0."""
    sd, generator = 0.15, torch.Generator().manual_seed(0)
    law = distribution(name, sd)
    x, clean = law.sample(12, generator).double(), DISTRIBUTIONS[name].sample(400_000, generator).double()
    kernel = torch.exp(-torch.cdist(x, clean) ** 2 / (2 * sd**2)) / (2 * math.pi * sd**2)
    mean, error = kernel.mean(1), kernel.std(1) / len(clean) ** 0.5
    assert ((law.log_prob(x).exp() - mean).abs() < 4 * error).all()
    pull = (kernel[..., None] * (clean - x[:, None])).mean(1) / sd**2 / mean[:, None]  # grad log p(x) = E[x0 - x | x] / sd^2
    torch.testing.assert_close(law.score(x), pull, rtol=0.05, atol=0.1)
    assert_derivatives(law, x, 1e-2)


def test_known_values_of_the_laws():
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


def test_balls_reach_to_the_nearest_other_row():
    """Points on a line: real 0, 1, 3 and 7 have balls of 1, 1, 2 and 4 for k = 1, and fake 2.5, 0.5 and 20 of 2, 2 and 17.5."""
    real, fake = (torch.tensor(points)[:, None].double() for points in ([0.0, 1, 3, 7], [2.5, 0.5, 20]))
    found = {key: value.item() for key, value in precision_recall(real, fake, k=1).items()}
    # 2.5 is in the ball of 3, 0.5 in those of 0 and 1, 20 in none; all real points are in a fake ball: 7 in that of 20
    assert found == pytest.approx({"precision": 2 / 3, "recall": 1.0, "density": 1.0, "coverage": 3 / 4})
