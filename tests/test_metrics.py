"""The wiring of the metrics: every term against its closed form on a linear VAE, and each array of a row against its
definition."""

import math

import pytest
import torch
from torch import nn

import evaluate
import train_synthetic
from metrics import evaluate_images, latent_mmd, negative_elbo, objective_terms, posterior_fd, reconstruction_mse
from models import VAE, build_vae
from objectives import INFER, LEARN
from studies.gradient_snr import squared_norms, unbiased_moments
from vsm import evaluation_2d
from vsm.features import LeNet5

D, DZ, GAMMA = 4, 3, 0.5


class LinearEncoder(nn.Module):
    def __init__(self, A, c, std):
        super().__init__()
        self.A, self.c, self.log_std = A, c, std.log()

    def forward(self, x):
        mean = x @ self.A.T + self.c
        return torch.cat([mean, self.log_std.expand_as(mean)], -1)


@pytest.fixture
def linear():
    """A linear VAE with its matrices, and data x [5, D]."""
    g = torch.Generator().manual_seed(0)
    W, A = torch.randn(D, DZ, generator=g).double() * 0.6, torch.randn(DZ, D, generator=g).double() * 0.4
    b, c = torch.randn(D, generator=g).double() * 0.3, torch.randn(DZ, generator=g).double() * 0.3
    std, x = torch.tensor([0.4, 0.7, 1.1]).double(), torch.randn(5, D, generator=g).double()
    decoder = nn.Linear(DZ, D).double()
    decoder.weight.data, decoder.bias.data = W, b
    vae = VAE(LinearEncoder(A, c, std), decoder, DZ).double().requires_grad_(False)
    vae.log_gamma.data = torch.tensor(math.log(GAMMA), dtype=torch.float64)
    return vae, W, b, A, c, std, x


def closed_forms(linear):
    _, W, b, A, c, std, x = linear
    mean = x @ A.T + c
    r, S = x - mean @ W.T - b, std.square().diag()
    r2, V, M = r.square().sum(-1), torch.trace(W @ S @ W.T), -S.inverse() + torch.eye(DZ) + W.T @ W / GAMMA
    return {
        "reconstruction": D / 2 * math.log(2 * math.pi * GAMMA) + (r2 + V) / (2 * GAMMA),
        "kl": (std.square().sum() + mean.square().sum(-1) - DZ - 2 * std.log().sum()) / 2, "half_a2": (r2 + V) / (2 * GAMMA**2),
        "half_abar2": r2 / (2 * GAMMA**2), "a_dot_b": (torch.trace(W @ A) / GAMMA).expand(5),
        "half_b2": (torch.trace(A.T @ S.inverse() @ A) / 2).expand(5),
        "half_c2": (torch.trace(M @ S @ M.T) + (mean - r @ W / GAMMA).square().sum(-1)) / 2,
        "laplacian": torch.full((5,), -D / GAMMA, dtype=torch.float64)}


def test_every_term_equals_its_closed_form(linear):
    vae, x, n = linear[0], linear[-1], 20_000
    q, z = posterior_draws(vae, x, n)
    terms, exact = objective_terms(vae, x, q, z), closed_forms(linear)
    assert terms.keys() == exact.keys()
    for name, value in exact.items():
        torch.testing.assert_close(terms[name], value, rtol=0.05, atol=0.05, msg=lambda message, name=name: f"{name}: {message}")


def test_the_objectives_are_the_sums_of_the_terms(linear):
    vae, x = linear[0], linear[-1].requires_grad_()
    q, z = posterior_draws(vae, x, 7)
    t = objective_terms(vae, x, q, z)
    sums = {"elbo": t["reconstruction"] + t["kl"], "fd": t["half_a2"] + t["laplacian"],
            "swersky": 2 * t["half_a2"] + t["laplacian"] - t["half_abar2"],
            "bao": t["half_abar2"] + t["a_dot_b"] + t["laplacian"],
            "fae": t["half_c2"] + t["half_b2"] + t["half_a2"] + t["laplacian"]}
    for name, value in sums.items():
        torch.testing.assert_close(LEARN[name](vae, x, q, z), value)
    torch.testing.assert_close(INFER["fd"](vae, x, q, z), t["half_c2"])


def posterior_draws(vae, x, n):
    q = vae.encode(x)
    return q, vae.sample(q, vae.noise(q, n, torch.Generator().manual_seed(1))).detach()


def test_metrics_of_a_model_are_the_means_that_they_say(linear):
    vae, x, exact = linear[0], linear[-1], closed_forms(linear)
    elbo = negative_elbo(vae, x, 50_000, torch.Generator().manual_seed(1))
    torch.testing.assert_close(elbo, exact["reconstruction"] + exact["kl"], rtol=0.02, atol=0.02)
    torch.testing.assert_close(posterior_fd(vae, x, 50_000, torch.Generator().manual_seed(1)), exact["half_c2"], rtol=0.03,
                               atol=0.03)


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
    row = evaluate_images(vae, images, 0.3, samples=2, seed=5, block=150)
    clean = images.float() / 255
    x = clean + 0.3 * torch.randn(clean.shape, generator=generator)
    with torch.no_grad():
        q = vae.encode(x)
        z = vae.sample(q, vae.noise(q, 2, generator))
        prior = vae.sample(vae.prior, vae.noise(vae.prior, 150, generator))
        g = vae.decode(q.mean)
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
    active = (q.mean.double().var(0) > 0.01).nonzero().flatten()
    assert row["active_units"] == len(active)


def test_block_sizes_and_repetition_change_nothing_but_the_draws(vae, images):
    first, again = evaluate_images(vae, images, 0.0, seed=1), evaluate_images(vae, images, 0.0, seed=1)
    assert all(torch.equal(first[name], again[name]) or first[name].isnan().all() for name in first)
    torch.testing.assert_close(evaluate_images(vae, images, 0.0, seed=1, block=7)["reconstruction_mse"],
                               first["reconstruction_mse"])


def test_reconstruction_mse_takes_the_target_it_is_given(vae, images):
    x = images.float() / 255
    with torch.no_grad():
        g = vae.decode(vae.encode(x).mean)
    torch.testing.assert_close(reconstruction_mse(vae, x), (x - g).square().mean((1, 2, 3)).double(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(reconstruction_mse(vae, x, 0 * x), g.square().mean((1, 2, 3)).double(), rtol=1e-5, atol=1e-8)


def test_denoising_is_against_the_clean_image_and_bounds_are_means(vae, images):
    found = evaluate.data_metrics(vae, images[:10], 0.1, 5, torch.Generator().manual_seed(0))
    assert found["iw_samples"].tolist() == [1, 3, 5] and (found["denoising_mse"] > 0).all()
    clean = images[:10].float() / 255
    e = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for level, error in zip(found["noise_levels"], found["denoising_mse"]):
        assert error == pytest.approx(reconstruction_mse(vae, clean + level * e, clean).mean().item(), rel=1e-6)
    elbo = negative_elbo(vae, clean + 0.1 * e, 200, torch.Generator().manual_seed(1)).mean()
    assert found["negative_iw_bound"][0] == pytest.approx(elbo.item(), rel=0.05)


def test_the_2d_fisher_divergence_has_the_factor_one_half():
    """evaluate() of an ensemble whose decoder is constant: p(x) = N(b, gamma I), so its score is known."""
    args = train_synthetic.parse_args(["--seeds", "2", "--hidden", "4", "--batch", "10", "--init-sd", "0.7", "--device", "cpu"])
    trainer = train_synthetic.EnsembleTrainer(args, torch.device("cpu"))
    with torch.no_grad():
        trainer.vae.decoder.weights[-1].zero_()
        trainer.vae.decoder.biases[-1].copy_(torch.tensor([0.3, -0.2])[:, None].expand(2, 2, 1))
    test = trainer.law.sample(200, torch.Generator().manual_seed(0))
    result, x = evaluation_2d.evaluate(trainer, test, 50), test.double()
    score, gamma = -(x - torch.tensor([0.3, -0.2]).double()) / 0.49, 0.49
    gap = (trainer.law.score(x) - score).square().sum(-1) / 2
    assert result["fisher_divergence"] == pytest.approx([gap.mean().item()] * 2, rel=1e-5)
    loss = score.square().sum(-1) / 2 - 2 / gamma
    assert result["sm_loss"] == pytest.approx([loss.mean().item()] * 2, rel=1e-5)
    nll = math.log(2 * math.pi * gamma) + score.square().sum(-1) * gamma / 2
    assert result["nll"] == pytest.approx([nll.mean().item()] * 2, rel=1e-5)
    assert result["nll_excess"] == pytest.approx([(nll + trainer.law.log_prob(x)).mean().item()] * 2, rel=1e-4)


def test_a_unit_is_active_by_its_variance(images):
    """Posterior means with sds 0.05, 0.09, 0.11 and 1: the last two have a variance above 0.01."""
    torch.manual_seed(0)
    vae = build_vae("mlp", (1, 32, 32), 4, width=16)
    with torch.no_grad():
        sds = torch.cat([torch.tensor([0.05, 0.09, 0.11, 1]), torch.ones(4)])
        layer = vae.encoder[-1][-1]
        layer.weight *= (sds / vae.encoder(images.float() / 255).std(0))[:, None]
    assert evaluate_images(vae, images, 0.0)["active_units"] == 2


def test_the_signal_of_two_gradients_is_their_product():
    g = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).double()
    signal, variance = unbiased_moments(g.sum(0), squared_norms(g[0]) + squared_norms(g[1]), 2)
    torch.testing.assert_close(signal, torch.stack([g[0, :-1] @ g[1, :-1], g[0, -1] * g[1, -1]]))
    torch.testing.assert_close(variance, torch.stack([g[:, :-1].var(0).sum(), g[:, -1].var()]))


def test_lenets_input_lies_between_0_and_1_and_rescaling_changes_no_class_score():
    network, images = LeNet5(), torch.full((2, 1, 32, 32), 255, dtype=torch.uint8)
    images[1, :, :16] = 0
    with torch.no_grad():
        before = network.head(network(images))
        network.rescale(images)
        torch.testing.assert_close(network.head(network(images)), before)
        assert network(images).square().mean() == pytest.approx(1, rel=1e-5)
    network.body = nn.Identity()
    assert network(images).unique().tolist() == [0, 1] and network(images).shape == (2, 1, 28, 28)
