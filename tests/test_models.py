"""The networks and draws of models.py against what their docstrings say; Bernoulli latents by enumeration of all z."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from metrics import iw_log_likelihood
from models import NORMS, VAE, StackedMLP, UpBlock, build_ensemble, build_vae
from objectives import LEARN, elbo, fd, latent_score_gap, posterior_score
from small_runs import train_on
from training import latent_noise, phi_loss
from vsm.device import evaluating


def test_stacked_mlps_are_plain_ones():
    stacked = StackedMLP([3, 40, 50, 2], [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    v = torch.randn(4, 2, 5, 3)
    for bias in stacked.biases:
        bias.data.normal_()
    for i in range(2):
        h = v[:, i]
        for layer, (weight, bias) in enumerate(zip(stacked.weights, stacked.biases)):
            h = (h.clamp(min=0) if layer else h) @ weight[i] + bias[i, :, 0]
        torch.testing.assert_close(stacked(v)[:, i], h)
    assert stacked.weights[1].std().item() == pytest.approx(0.1, rel=0.05)


def test_models_start_as_documented():
    assert build_vae("mlp", (3,), 2, width=4, init_sd=0.5).log_gamma.exp().item() == pytest.approx(0.25)
    ensemble = build_ensemble(2, 2, 4, [0, 1, 2], init_sd=0.3)
    assert ensemble.log_gamma.exp().tolist() == pytest.approx([0.09] * 3)
    zero = torch.zeros(3, 1, 4)
    assert ensemble.posterior(zero).stddev.unique().item() == pytest.approx(math.log(2))
    assert build_vae("mlp", (3,), 2, width=4).posterior(zero).stddev.unique().item() == 1


@pytest.mark.parametrize("net, side", [("mlp", 32), ("conv", 32), ("conv", 64), ("resnet", 32), ("resnet", 64)])
@pytest.mark.parametrize("latent", ["gaussian", "bernoulli"])
def test_shapes_and_range_of_every_network(net, side, latent):
    vae = build_vae(net, (3, side, side), 5, width=2, latent=latent)
    q = vae.encode(torch.rand(2, 3, side, side))
    assert q.batch_shape == (2,) and q.event_shape == (5,)
    images = vae.decode(100 * torch.randn(4, 2, 5))
    assert images.shape == (4, 2, 3, side, side) and images.min() >= 0 and images.max() <= 1


def norms(network):
    return [type(module).__name__ for module in network.modules() if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm))]


def test_where_the_norms_stand():
    for norm, name in (("batch", "BatchNorm2d"), ("group", "GroupNorm")):
        for net, counts in (("conv", (2, 3)), ("resnet", (20, 19))):
            vae = build_vae(net, (1, 32, 32), 2, width=2, norm=norm)
            assert (norms(vae.encoder), norms(vae.decoder)) == tuple([name] * count for count in counts)
    assert [NORMS["group"](channels).num_groups for channels in (2, 48, 64)] == [2, 16, 32]


def test_the_resnet_halves_the_side_at_the_stem_and_at_three_of_its_stages():
    assert build_vae("resnet", (1, 32, 32), 2, width=2).encoder[:-3](torch.rand(2, 1, 32, 32)).shape == (2, 16, 2, 2)
    for up, side in ((False, 4), (True, 8)):
        h = UpBlock(4, 4, NORMS["batch"], up)(torch.randn(3, 4, 4, 4))
        assert h.shape == (3, 4, side, side) and h.min() == 0


def test_bf16_is_of_the_networks_alone():
    vae, x = build_vae("mlp", (3,), 2, width=4, bf16=True), torch.randn(5, 3)
    assert vae.encode(x).mean.dtype == vae.decode(torch.randn(1, 5, 2)).dtype == torch.float32
    assert not torch.equal(vae.encode(x).mean, vae.encoder(x)[:, :2])


def test_logistic_noise_is_the_logit_of_a_uniform_number(monkeypatch):
    vae = build_vae("mlp", (3,), 2, width=4, latent="bernoulli", temperature=0.3)
    q = vae.posterior(torch.full((1, 2), 0.2))
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, 0.01))
    assert vae.noise(q, 1).unique().item() == pytest.approx(math.log(0.01 / 0.99), rel=1e-5)
    for given, hard in ((-0.25, 0), (-0.15, 1)):
        assert vae.sample(q, torch.full((1, 1, 2), given), relaxed=False).unique().item() == hard
        soft = 1 / (1 + math.exp(-(0.2 + given) / 0.3))
        assert vae.sample(q, torch.full((1, 1, 2), given)).unique().item() == pytest.approx(soft, rel=1e-5)


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
    assert torch.allclose(vae.kl(q).sum(-1), (q.log_prob(ALL_Z).exp() * (q.log_prob(ALL_Z) - vae.prior.log_prob(ALL_Z))).sum(0))
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
    assert (sum(q.log_prob(z).exp() * elbo(vae, x, q, z[None]) for z in ALL_Z) >= -exact).all()
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
def test_every_learning_objective_trains_binary_latents(digits, tmp_path, learn):
    arrays = train_on(digits, tmp_path / "run", "--latent", "bernoulli", "--temperature", 0.4, "--learn", learn, "--dim-z", 6,
                      "--samples", 2, "--inner-steps", 1, "--epochs", 2, "--eval-every", 1, pictures=learn == "fd")
    assert arrays["status"] == "ok" and arrays["posterior_mean"].shape == (3, 6)
    assert arrays["posterior_mean_histogram"].shape == (3, 40) and np.allclose(arrays["posterior_mean_histogram"].sum(1), 1)
    assert "posterior_sd" not in arrays and "posterior_fd" not in arrays
    drawn = {file.name for file in (tmp_path / "run").glob("posterior*.png")}
    assert drawn == ({"posterior_mean.png"} if learn == "fd" else set())


@pytest.mark.slow
def test_two_bits_of_data_take_some_latents_and_leave_the_others_at_one_half():
    torch.manual_seed(0)
    encoder, decoder = (nn.Sequential(nn.Linear(n_in, 32), nn.ReLU(), nn.Linear(32, n_out)) for n_in, n_out in ((D, 8), (8, D)))
    vae, generator = VAE(encoder, decoder, 8, latent="bernoulli", init_sd=0.3), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(vae.parameters(), 1e-2)
    for _ in range(600):
        x = torch.randint(2, (100, 2), generator=generator).float().repeat(1, 2) + 0.1 * torch.randn(100, D, generator=generator)
        optimiser.zero_grad()
        phi_loss(vae, x, "kld", latent_noise(vae, x, 1, generator)).mean().backward()
        optimiser.step()
    distance = (vae.encode(x).mean - 0.5).abs().amax(0)  # over the data, per latent
    assert (distance > 0.4).sum() >= 2 and (distance < 0.1).sum() >= 3


def test_a_model_that_trains_in_bf16_is_evaluated_in_float32():
    vae = build_vae("mlp", (1, 8, 8), 3, width=8, bf16=True)
    z = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    with evaluating(vae):
        inside = vae.decode(z)
    outside = vae.decode(z)
    vae.bf16 = False
    assert torch.equal(inside, vae.decode(z)) and not torch.equal(inside, outside)
