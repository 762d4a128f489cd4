"""docs/theory.md: the contraction, by the objectives of objectives.py, the identities of inference, denoising score matching."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from models import VAE, build_vae
from objectives import INFER, LEARN, dot, dsm, likelihood_score, posterior_score
from train_synthetic import bilevel_loss, kept_step
from vsm import linear
from vsm.linear import expected_slope, kappa, linear_vae, matched_noise, measured_kappa, set_posterior

ROWS = [("elbo", None), ("fd", None), ("swersky", "plugin"), ("swersky", "unbiased"), ("swersky", "released"),
        ("bao", "plugin"), ("bao", "unbiased"), ("bao", "released"), ("dsm", "plugin"), ("dsm", "unbiased")]


def measure(objective, estimator, N, alpha, **options):
    options |= {"estimator": estimator} if estimator else {}
    return measured_kappa(objective, N, alpha, image=estimator == "released" and "batch" not in options, **options)


@pytest.mark.parametrize("objective, estimator", ROWS)
@pytest.mark.parametrize("alpha", [pytest.param(0.5, marks=pytest.mark.slow), 1.0, 2.0])
def test_measured_kappa_is_the_predicted_one(objective, estimator, alpha):
    for N in (1, 2, 5, 20):
        if (estimator, N) != ("unbiased", 1):
            assert measure(objective, estimator, N, alpha) == pytest.approx(kappa(objective, estimator, N, alpha), rel=1e-6), N


def test_kappa_does_not_depend_on_the_data_nor_on_gamma_unless_the_latent_is_pruned():
    """It is pruned where kappa is above v / gamma."""
    for v, gamma in ((2.5, 1.0), (400.0, 1.0), (0.3, 0.01), (1.81, 1.0)):
        assert measured_kappa("swersky", 5, 1.0, v, gamma) == pytest.approx(1.8)
        assert measured_kappa("bao", 5, 1.0, v, gamma) == pytest.approx(1.2)
    assert measured_kappa("swersky", 5, v=1.79) == math.inf
    assert measured_kappa(lambda vae, x, q, z: 3 * LEARN["fd"](vae, x, q, z), 2, 0.7) == pytest.approx(0.7)
    assert math.isnan(measured_kappa(lambda vae, x, q, z: math.nan * LEARN["fd"](vae, x, q, z), 2))


def test_the_released_estimator_on_vectors_contracts_by_the_size_of_the_minibatch():
    for objective, N, alpha, batch in (("bao", 1, 1.0, 4), ("bao", 5, 0.5, 3), ("swersky", 1, 1.0, 4), ("swersky", 5, 0.5, 3)):
        measured = measure(objective, "released", N, alpha, batch=batch)
        assert measured == pytest.approx(kappa(objective, "released", N, alpha, batch)), objective
    assert kappa("bao", "released", 1, 1.0, 1000) == 1001


def test_a_bias_is_told_from_an_estimator():
    assert linear.split_kappa("bao") == pytest.approx((1, 1, 0), abs=1e-6)
    assert linear.split_kappa("swersky", 0.5) == pytest.approx((1, -0.5, 0), abs=1e-6)
    assert linear.split_kappa("swersky", estimator="unbiased") == pytest.approx((2, 0, 0), abs=1e-6)


def test_fae_with_q_held_has_a_kappa_with_the_exact_posterior_alone():
    assert measured_kappa("fae", 2, 1.0) == pytest.approx(1) and measured_kappa("fae", 2, 0.5) == 0
    assert measured_kappa("fae", 2, 1.5, v=5.0) < 0.6 * measured_kappa("fae", 2, 1.5, v=25.0)
    with pytest.raises(ValueError, match="no constant contraction"):
        kappa("fae")


def expected_loss(vae, objective, estimator, C, N, alpha, held=False):
    """The exact mean of a loss over x ~ N(0, C) and q; it moves with the decoder and gamma, not with q and z. held: keep q."""
    if not held:
        set_posterior(vae, alpha)
    D, Dz = vae.decoder.weight.shape
    noise = matched_noise(2 * (D + N * Dz), D + N * Dz)
    x = (noise[:, :D] @ torch.linalg.cholesky(C).T).requires_grad_()
    q = vae.encode(x)
    z = vae.sample(q, noise[:, D:].unflatten(-1, (N, Dz)).transpose(0, 1)).detach()
    return LEARN[objective](vae, x, q, z, **({"estimator": estimator} if estimator else {})).mean()


MODELS = [("elbo", None, 1), ("fd", None, 2), ("swersky", "plugin", 3), ("swersky", "unbiased", 2), ("bao", "plugin", 3),
          ("bao", "unbiased", 2)]


@pytest.mark.parametrize("objective, estimator, N", MODELS)
def test_the_expected_gradient_is_that_of_fd_with_kappa_before_the_posterior_covariance(objective, estimator, N):
    gamma, alpha, generator = 0.3, 0.7, torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(4, 2, generator=generator, dtype=torch.float64))[0]
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    C, W = root @ root.T, Q * torch.tensor([1.3, 0.6], dtype=torch.float64)  # orthogonal columns: the exact posterior is diagonal
    vae = linear_vae(W.clone(), gamma)
    slope = torch.autograd.grad(expected_loss(vae, objective, estimator, C, N, alpha), vae.decoder.weight)[0]
    scale = gamma if objective == "elbo" else gamma**2
    assert torch.allclose(scale * slope, expected_slope(W, C, gamma, objective, estimator, N, alpha), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("objective, estimator, N", MODELS)
@pytest.mark.parametrize("v1", [1.2, 4.5, 5.5, 20.0])
def test_a_collapsed_model_with_learnt_gamma_is_stable_up_to_kappa_times_the_mean_variance(objective, estimator, N, v1):
    C = torch.tensor([v1, 1.0], dtype=torch.float64).diag()
    gamma, direction = (v1 + 1) / 2, torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    collapsed, near = linear_vae(torch.zeros(2, 2, dtype=torch.float64), gamma), linear_vae(1e-3 * direction, gamma)
    collapsed.log_gamma.requires_grad_(True)
    assert torch.autograd.grad(expected_loss(collapsed, objective, estimator, C, N, 1.0), collapsed.log_gamma)[0].abs() < 1e-12
    slope = torch.autograd.grad(expected_loss(near, objective, estimator, C, N, 1.0), near.decoder.weight)[0][0, 0]
    assert (slope > 0) == (v1 < kappa(objective, estimator, N) * gamma)  # a positive slope leads back to the collapsed model


@pytest.mark.parametrize("objective, estimator, N", MODELS)
def test_spectrum_second_moment_and_gamma_at_the_fixed_point(objective, estimator, N):
    v, gamma, alpha = torch.tensor([9.0, 5.0, 0.7, 0.2, 0.1], dtype=torch.float64), 0.5, 1.0
    Q = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    C, k = Q * v @ Q.T, kappa(objective, estimator, N, alpha)
    W = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for _ in range(2000):
        W = W - 0.3 * expected_slope(W, C, gamma, objective, estimator, N, alpha)
    assert torch.allclose(gamma + torch.linalg.svdvals(W).square(), (v[:4] / k).clamp(min=gamma), rtol=1e-5)
    # gamma learnt: sum of the variances left out over D - kappa K, for 2 latents in 5 dimensions
    gamma = (v[2:].sum() / (5 - 2 * k)).item()
    W = Q[:, :2] * (v[:2] / k - gamma).sqrt()
    vae = linear_vae(W.clone(), gamma)
    vae.log_gamma.requires_grad_(True)
    slopes = torch.autograd.grad(expected_loss(vae, objective, estimator, C, N, alpha), (vae.decoder.weight, vae.log_gamma))
    assert max(slope.abs().max() for slope in slopes) < 1e-9
    phi, s2 = vae.encoder.phi.detach(), (2 * vae.encoder.log_std.detach()).exp()
    assert np.allclose((phi @ C * phi).sum(1) + s2, linear.second_moment(k, alpha, gamma, v[:2].numpy()))


@pytest.mark.parametrize("objective, estimator, N", MODELS)
def test_a_decoder_that_is_refitted_to_a_narrow_posterior_moves_slowly(objective, estimator, N):
    v, gamma, distance = 4.0, 0.05, 1e-4
    fixed = math.sqrt(v / kappa(objective, estimator, N) - gamma)
    w, C = fixed * math.exp(distance), torch.full((1, 1), v, dtype=torch.float64)
    vae = linear_vae(torch.full((1, 1), w, dtype=torch.float64), gamma)
    set_posterior(vae)

    def slope(weight):  # linear in the weight, because q is held
        vae.decoder.weight.data.fill_(weight)
        return torch.autograd.grad(expected_loss(vae, objective, estimator, C, N, 1.0, held=True), vae.decoder.weight)[0].item()

    refitted, V = w - slope(w) / (slope(w + 1) - slope(w)), gamma / (gamma + fixed**2)
    share = 2 * V * (1 - V) * (v / (v - gamma) if objective == "bao" else 1)
    assert 1 - math.log(refitted / fixed) / distance == pytest.approx(share, rel=1e-3)


def bilevel_slope(objective, estimator, infer, w, v, gamma, N, steps, lr):
    """d E[loss] / dw of a one-dimensional linear VAE from the exact posterior on, through kept encoder steps."""
    noise = matched_noise(64, 1 + N)[..., None]
    x, noise = math.sqrt(v) * noise[:, 0], noise[:, 1:].transpose(0, 1)
    vae = linear_vae(torch.full((1, 1), w, dtype=torch.float64), gamma)
    set_posterior(vae)
    phi = dict(vae.encoder.named_parameters())
    for _ in range(steps):
        phi = kept_step(vae, phi, x, infer, noise[:1], lr)
    loss = bilevel_loss(vae, phi, x, objective, noise, estimator=estimator or "plugin").mean()
    return torch.autograd.grad(loss, vae.decoder.weight)[0].item()


@pytest.mark.parametrize("infer, lr", [("kld", 0.01), ("fd", 0.002)])
@pytest.mark.parametrize("objective, estimator, N", MODELS)
def test_bilevel_steps_change_kappa_as_in_equation_7(objective, estimator, N, infer, lr):
    v, gamma = 4.0, 0.2
    for w, steps in ((0.5, 1), (1.0, 1), (1.0, 5), (1.0, 20), (1.4, 5)):
        sigma = gamma + w * w
        V = gamma / sigma
        curvatures = (v / V, 2) if infer == "kld" else (v / V**2, 4 / V)  # of the encoder's loss in phi and in log s
        shares = [1 - (1 - lr * curvature) ** steps for curvature in curvatures]
        predicted = linear.bilevel_kappa(objective, estimator, N, *shares, V)
        factor = w / sigma * (1 if objective == "elbo" else (1 - shares[0] * (1 - 2 * V)) / gamma)
        measured = v / sigma + bilevel_slope(objective, estimator, infer, w, v, gamma, N, steps, lr) / factor
        assert measured == pytest.approx(predicted, rel=1e-6), (w, steps)


@pytest.mark.slow
def test_with_many_bilevel_steps_s_and_unbiased_b_are_exact_score_matching():
    for objective, estimator, N, end in (("swersky", "unbiased", 2, 1), ("swersky", "plugin", 5, 0.9), ("bao", "unbiased", 2, 1),
                                         ("bao", "plugin", 5, 1.1), ("fd", None, 5, 0.5)):
        assert abs(bilevel_slope(objective, estimator, "kld", math.sqrt(4.0 / end - 1), 4.0, 1.0, N, 200, 0.05)) < 1e-8, objective


def test_a_few_bilevel_steps_raise_kappa_and_many_lower_it():
    for objective, estimator, kappas in (("swersky", "plugin", (1.80, 2.12, 2.94, 4.11, 3.88, 2.61, 1.35, 0.91)),
                                         ("bao", "plugin", (1.20, 1.28, 1.61, 2.13, 1.85, 1.45, 1.16, 1.10)),
                                         ("fd", "plugin", (1.00, 1.35, 2.14, 3.19, 2.86, 1.86, 0.89, 0.51)),
                                         ("bao", "unbiased", (1.00,) * 8)):  # the table of docs/theory.md
        ends = [linear.bilevel_end(objective, estimator, 5, J, 0.01, 1.0, 0.025) for J in (0, 1, 5, 20, 50, 100, 200, 400)]
        assert ends == pytest.approx(kappas, abs=0.006), objective
    k, v, gamma, lr = linear.bilevel_end("swersky", "plugin", 5, 3, 0.01, v=2.0, gamma=0.1), 2.0, 0.1, 0.01
    shares = 1 - (1 - lr * v**2 / (gamma * k)) ** 3, 1 - (1 - 2 * lr) ** 3
    assert linear.bilevel_kappa("swersky", "plugin", 5, *shares, gamma * k / v) == pytest.approx(k, rel=2e-3)
    assert linear.bilevel_end("swersky", "plugin", 5, 0, 0.01, v=1.0, gamma=0.6) == pytest.approx(1 / 0.6)  # pruned
    assert math.isnan(linear.bilevel_end("fd", "plugin", 5, 400, 0.03, v=1.0, gamma=0.02))  # w grows without bound


def gaussian_posterior(scale, dims=3, data=12):
    generator = torch.Generator().manual_seed(0)
    mean, sd = (torch.rand(data, dims, generator=generator, dtype=torch.float64) + 0.2 for _ in range(2))
    return torch.cat((scale * mean, (scale * sd).log()), -1), (mean.square() + sd.square()).mean(0)


@pytest.mark.parametrize("net, norm, blind", [("conv", "batch", True), ("conv", "none", False), ("resnet", "batch", False)])
def test_batch_norm_makes_a_conv_decoder_blind_to_the_scale_of_the_latents(net, norm, blind):
    torch.manual_seed(0)
    vae, z = build_vae(net, (1, 32, 32), 3, width=4, norm=norm).double(), torch.randn(2, 12, 3, dtype=torch.float64)
    assert torch.allclose(vae.decode(2 * z), vae.decode(z), rtol=1e-3) == blind


def test_kld_inference_under_a_decoder_blind_to_scale_puts_the_mean_of_e_z2_at_one():
    torch.manual_seed(0)
    vae = build_vae("conv", (1, 32, 32), 3, width=4).double()
    vae.decoder[2].eps = 1e-12  # batch norm divides by the square root of the variance plus eps
    x, noise = torch.rand(12, 1, 32, 32, dtype=torch.float64), torch.randn(2, 12, 3, dtype=torch.float64)
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    outputs, second = gaussian_posterior(log_scale.exp())
    q = vae.posterior(outputs)
    loss = INFER["kld"](vae, x, q, vae.sample(q, noise)).mean()
    assert torch.autograd.grad(loss, log_scale)[0] == pytest.approx((second - 1).sum().item())  # it vanishes at a mean of 1


class Rescaled(nn.Module):
    """A decoder of scale * z."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder, self.scale = decoder, nn.Parameter(torch.ones(()))

    def forward(self, z):
        return self.decoder(self.scale * z)


def nonlinear_vae(gamma, D=3, Dz=2):
    torch.manual_seed(0)
    encoder, decoder = (nn.Sequential(nn.Linear(n, 6), nn.Tanh(), nn.Linear(6, m)) for n, m in ((D, 2 * Dz), (Dz, D)))
    vae = VAE(encoder, Rescaled(decoder), Dz).double()
    vae.log_gamma.requires_grad_(False).fill_(math.log(gamma))
    return vae, torch.randn(5, D, dtype=torch.float64)


def test_the_scale_of_q_changes_the_negative_elbo_by_reconstruction_and_second_moment():
    vae, x = nonlinear_vae(gamma := 0.5)
    noise, log_scale = torch.randn(4, 5, 2, dtype=torch.float64), torch.zeros((), dtype=torch.float64, requires_grad=True)
    q = vae.encode(x).base_dist
    scaled = vae.posterior(torch.cat((log_scale.exp() * q.loc, q.scale.log() + log_scale), -1))
    z = vae.sample(scaled, noise)
    slope = torch.autograd.grad(INFER["kld"](vae, x, scaled, z).mean(), log_scale, retain_graph=True)[0]
    r = (x - vae.decode(z)).square().sum(-1).mean() / (2 * gamma)
    assert torch.allclose(slope, torch.autograd.grad(r, log_scale)[0] + (q.loc.square() + q.scale.square() - 1).sum(-1).mean())


@pytest.mark.parametrize("learn", ["elbo", "fd", "swersky", "bao"])
def test_the_scale_of_the_decoders_input_changes_its_loss_as_in_equation_6(learn):
    vae, x = nonlinear_vae(gamma := 0.5)
    N, M = 3, 20_000
    x = x[:1].expand(M, -1).clone().requires_grad_()
    q = vae.encode(x)
    z = vae.sample(q, torch.randn(N, M, 2, dtype=torch.float64))
    loss, mean = LEARN[learn](vae, x, q, z.detach()), vae.decode(z.detach())
    r, T = (x.detach() - mean).square().sum(-1).mean(0) / (2 * gamma), mean.var(0).sum(-1)
    predicted = r if learn == "elbo" else r / gamma
    if learn == "swersky":
        predicted = predicted + (1 - 1 / N) * T / (2 * gamma**2)
    if learn == "bao":
        h = vae.decode(z).mean(0)  # the divergence of its mean over draws is that of E_q g
        divergence = sum(torch.autograd.grad(h[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(3))
        predicted = predicted - (1 - 1 / N) * T / (2 * gamma**2) + divergence / gamma
    slopes = []
    for value in (loss, predicted):  # at 20 groups of draws, for a standard error
        slopes.append(torch.stack([torch.autograd.grad(part.mean(), vae.decoder.scale, retain_graph=True)[0]
                                   for part in value.unflatten(0, (20, -1))]))
    difference = slopes[0] - slopes[1]
    if learn == "bao":
        error = (difference.std() / 20**0.5).item()
        assert abs(difference.mean().item()) < 4 * error and error < 0.05 * slopes[0].mean().abs().item()
    else:
        assert difference.abs().max() < 1e-10


def test_the_mean_square_of_b_is_that_of_equation_8():
    (vae, x), M = nonlinear_vae(0.5), 100_000
    many = x[:1].expand(M, -1).clone().requires_grad_()  # a datum of its own for every draw: one gradient has all b
    q = vae.encode(many)
    b = posterior_score(vae, many, q, vae.sample(q, torch.randn(1, M, 2, dtype=torch.float64)).detach())[0]
    q = vae.encode(x := x[:1].requires_grad_())
    outputs = torch.stack((q.base_dist.loc, q.base_dist.scale.log())).flatten()
    slopes = torch.stack([torch.autograd.grad(each, x, retain_graph=True)[0].square().sum() for each in outputs])
    predicted = (slopes[:2] / q.base_dist.scale.flatten() ** 2 + 2 * slopes[2:]).sum()
    squares = b.square().sum(-1)
    error = squares.std() / M**0.5
    assert error < 0.02 * predicted and (squares.mean() - predicted).abs() < 4 * error
    assert (b.mean(0).abs() < 4 * b.std(0) / M**0.5).all()


def test_fd_inference_is_preconditioned_kld_inference_on_a_nonlinear_decoder():
    # pairs z = m + s e, m - s e: s^2 FD = KLD for the mean; s^2 FD = 2 KLD for the log sd, within standard errors of M pairs
    torch.manual_seed(0)
    D, Dz, M = 4, 3, 50_000
    decoder = nn.Sequential(nn.Linear(Dz, 8), nn.Tanh(), nn.Linear(8, D)).double().requires_grad_(False)
    vae = VAE(nn.Identity(), decoder, Dz).double()
    vae.log_gamma.requires_grad_(False).fill_(math.log(0.4))
    x, h = torch.randn(D, dtype=torch.float64), torch.cat((torch.randn(Dz), torch.tensor([-0.7, 0.1, -0.3]))).double()
    e = torch.randn(M, Dz, dtype=torch.float64)
    gradients = {}
    for name in ("kld", "fd", "fd-weighted"):
        total = []
        for noise in (e, -e):
            outputs = h.expand(M, -1).clone().requires_grad_()  # a posterior of its own for every draw: a gradient for each
            q = vae.posterior(outputs)
            z = vae.sample(q, noise[None])
            loss = INFER[name](vae, x.expand(M, -1), q, z if name == "kld" else z.detach())
            total.append(torch.autograd.grad(loss.sum(), outputs)[0])
        gradients[name] = sum(total) / 2
    s2, factor = (2 * h[Dz:]).exp(), torch.cat((torch.ones(Dz), torch.full((Dz,), 2.0))).double()
    for scaled in (gradients["fd"] * torch.cat((s2, s2)), gradients["fd-weighted"]):
        difference = scaled - factor * gradients["kld"]
        assert (difference[:, :Dz].abs() < 1e-12).all()  # of the mean it holds pair by pair
        resolution = 4 * difference.std(0)[Dz:] / math.sqrt(M)
        assert (difference.mean(0)[Dz:].abs() < resolution).all()
        assert (resolution < 0.05 * (2 * gradients["kld"]).mean(0)[Dz:].abs()).all()  # the check tells a factor 2 from another


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
    assert ((losses.mean(0) - ((r / 0.5 + t).square() - t.square()).sum(-1) / 2).abs() < 4 * error).all() and (error < 0.3).all()

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
    assert (gaps.mean(0).abs() < 4 * error + 1e-12).all() and error.norm() < 0.2 * expected.norm()


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
    weight, x = torch.softmax(-(e**2).sum(-1) / 2, 0), (g.detach()[:, None] + math.sqrt(gamma) * e).flatten(0, 1)
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
