"""Every objective against closed forms on a linear VAE, the propositions, finite differences, and the estimators' laws."""

import contextlib
import itertools
import math

import pytest
import torch
from matplotlib.colors import is_color_like
from scipy.optimize import minimize_scalar
from torch import nn

from linear_models import DZ, D, affine_vae, closed_forms, objectives_of
from models import VAE, build_ensemble, build_vae
from objectives import INFER, LEARN, label, latent_score_gap, likelihood_score, mean_product, posterior_score


def draw(vae, x, n, seed=1):
    torch.manual_seed(seed)
    q = vae.encode(x)
    return q, q.sample((n,))


def estimates(entry, vae, x, n, count, **options):
    """`count` independent estimates [count, B] of an objective, each from n samples: by as many copies of the data [B, D]."""
    copies = x.detach().repeat(count, 1)
    return entry(vae, copies, *draw(vae, copies, n), **options).view(count, -1)


def assert_within(samples, exact, errors=4.0):
    """Independent estimates [R, B] agree with `exact` [B] within so many standard errors, which are small themselves."""
    mean, error = samples.mean(0), samples.std(0) / math.sqrt(len(samples))
    assert ((mean - exact).abs() <= errors * error + 1e-12).all(), (mean, exact, error)
    assert (error < 0.05 * (1 + exact.abs())).all(), error


@pytest.mark.parametrize("name", ["elbo", "fd", "swersky", "bao", "fae"])
def test_learning_objectives_equal_their_closed_forms(linear, name):
    vae, x = linear.vae.requires_grad_(False), linear.x
    options = {"estimator": "unbiased"} if name in ("swersky", "bao") else {}  # plugin is biased by tr Var(a) / 2N: another test
    n = 20 if name in ("bao", "fae") else 200
    assert_within(estimates(LEARN[name], vae, x, n, 400, **options), objectives_of(closed_forms(linear))[name])


def test_posterior_fisher_divergence_equals_its_closed_form(linear):
    vae, x = linear.vae.requires_grad_(False), linear.x
    assert_within(estimates(INFER["fd"], vae, x, 200, 400), closed_forms(linear)["half_c2"])


@pytest.mark.slow
@pytest.mark.parametrize("name, factor", [("swersky", -1 / 2), ("bao", 1 / 2)])
def test_plugin_bias_is_the_variance_of_the_mean(linear, name, factor):
    vae, W, _, _, _, std, gamma, x = linear
    n, variance = 2, torch.trace(W @ std.square().diag() @ W.T) / gamma**2
    losses = estimates(LEARN[name], vae, x, n, 4000).detach()
    assert_within(losses, objectives_of(closed_forms(linear))[name] + factor * variance / n)


def exact_posterior(W, b, gamma):
    """The linear VAE whose q is p(z|x); diagonal because W has orthogonal columns."""
    precision = torch.eye(W.shape[1]) + W.T @ W / gamma
    A = precision.inverse() @ W.T / gamma
    return affine_vae(W, b, A, -A @ b, precision.inverse().diagonal().sqrt(), gamma)


def test_fisher_identity_with_the_exact_posterior():
    g = torch.Generator().manual_seed(0)
    W = torch.linalg.qr(torch.randn(D, DZ, generator=g).double())[0] * torch.tensor([0.5, 1.0, 2.0])
    b, gamma, x = torch.randn(D, generator=g).double(), 0.5, torch.randn(3, D, generator=g).double()
    vae, P = exact_posterior(W, b, gamma).requires_grad_(False), (W @ W.T + gamma * torch.eye(D)).inverse()
    score = -(x - b) @ P
    score_matching = score.square().sum(-1) / 2 - torch.trace(P)
    variance = torch.trace(W @ vae.encode(x).base_dist.scale[0].square().diag() @ W.T) / gamma**2

    q, z = draw(vae, x, 100_000)
    assert torch.allclose(likelihood_score(vae, x, q, z)[0].mean(0), score, atol=0.02)
    assert latent_score_gap(vae, x, q, z).abs().max() < 1e-10  # the posterior FD is zero sample by sample
    for name, exact in (("swersky", score_matching), ("bao", score_matching), ("fd", score_matching - variance / 2)):
        options = {} if name == "fd" else {"estimator": "unbiased"}
        assert_within(estimates(LEARN[name], vae, x, 20, 500, **options), exact)


def test_fae_is_the_joint_fisher_divergence_up_to_the_data_score(linear):
    """E_data fae + 1/2 E||grad log pd||^2 = 1/2 tr[(Pp - Pq) Sq (Pp - Pq)], all joints zero-mean Gaussians."""
    _, W, _, A, _, std, gamma, _ = linear
    root = torch.randn(D, D, generator=torch.Generator().manual_seed(3)).double() * 0.5 + torch.eye(D)
    S, Sx, zero = std.square().diag(), root @ root.T, torch.zeros(1).double()
    vae = affine_vae(W, zero.expand(D), A, zero.expand(DZ), std, gamma).requires_grad_(False)
    Pp = torch.cat([torch.cat([torch.eye(D) / gamma, -W / gamma], 1),
                    torch.cat([-W.T / gamma, torch.eye(DZ) + W.T @ W / gamma], 1)])
    Sq = torch.cat([torch.cat([Sx, Sx @ A.T], 1), torch.cat([A @ Sx, A @ Sx @ A.T + S], 1)])
    gap = Pp - Sq.inverse()
    joint = torch.trace(gap @ Sq @ gap) / 2 - torch.trace(Sx.inverse()) / 2
    torch.manual_seed(0)
    x = torch.randn(300 * 500, D).double() @ root.T
    assert_within(LEARN["fae"](vae, x, *draw(vae, x, 2)).view(300, 500).mean(1, keepdim=True), joint)


@pytest.mark.parametrize("name", ["elbo", "fd", "swersky", "bao"])
def test_propositions_optimal_gamma_and_autoencoding_loss(name):
    """Props. 3.1, 4.1, 4.2 on an MLP: the minimum over gamma of the Monte Carlo loss is the autoencoding loss."""
    torch.manual_seed(0)
    vae = build_vae("mlp", (2,), 2, width=20, std="softplus").double().requires_grad_(False)
    x, n = torch.randn(300, 2).double(), 400
    x.requires_grad_()
    q, z = draw(vae, x, n)
    g = vae.decode(z)
    mean, V = g.mean(0), g.var(0).sum(-1)
    r = (x - mean).square().sum(-1) - V / n  # unbiased for ||x - E g||^2

    def loss(log_gamma):
        vae.log_gamma.fill_(log_gamma)
        options = {"estimator": "unbiased"} if name in ("swersky", "bao") else {}
        return LEARN[name](vae, x, q, z, **options).mean().item()
    found = minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-6})
    r, V, gamma = r.mean().item(), V.mean().item(), math.exp(found.x)
    if name == "elbo":
        assert gamma == pytest.approx((r + V) / 2, rel=1e-3)
        assert found.fun - vae.kl(q).sum(-1).mean().item() == pytest.approx(math.log(2 * math.pi * (r + V) / 2) + 1, rel=1e-3)
        return
    numerator, second_moment = 2, r + V * (2 if name == "swersky" else 1)
    if name == "bao":
        jacobian = torch.func.vmap(torch.func.jacrev(lambda v, u: vae.decoder(_reparametrise(vae, v, u)), 0), (0, 0))
        u = (z - q.base_dist.loc) / q.base_dist.scale
        divergence = torch.stack([jacobian(x.detach(), u[i].detach()).diagonal(dim1=1, dim2=2).sum(-1) for i in range(n)])
        numerator, second_moment = 2 - divergence.mean().item(), r
    tolerance = 0.03 if name == "bao" else 1e-3  # bao's E[a.b] and E div are two Monte Carlo estimates of one number
    assert gamma == pytest.approx(second_moment / numerator, rel=tolerance)
    assert found.fun == pytest.approx(-(numerator**2) / (2 * second_moment), rel=2 * tolerance)


def _reparametrise(vae, x, u):
    mean, std = vae.encoder(x[None]).chunk(2, -1)
    return mean[0] + vae.positive(std[0]) * u


ENTRIES = {f"{kind} {name}": entry for kind, table in (("learn", LEARN), ("infer", INFER)) for name, entry in table.items()}
every_entry = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


def options_of(entry):
    """Each way in which an entry can be called with three samples."""
    return [{"estimator": estimator} for estimator in entry.estimators] if entry.takes("estimator") else [{}]


def smooth_vae():
    """An MLP with tanh in place of ReLU, so that finite differences are exact."""
    torch.manual_seed(0)
    vae = build_vae("mlp", (D,), DZ, width=8).double()
    for layer in vae.modules():
        for child, module in layer.named_children():
            if isinstance(module, nn.ReLU):
                setattr(layer, child, nn.Tanh())
    return vae, torch.randn(6, D).double().requires_grad_(), torch.randn(3, 6, DZ).double()


@contextlib.contextmanager
def held_constants(monkeypatch, kept):
    """What is detached at the first call is kept, and later calls get what was kept: a constant, as detach() promises."""
    position, replay, detach = itertools.count(), bool(kept), torch.Tensor.detach

    def held(tensor):
        if not replay:
            kept.append(detach(tensor).clone())
        return kept[next(position)].clone()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "detach", held)
        yield


@every_entry
@pytest.mark.parametrize("half", ["theta", "phi"])
def test_gradients_agree_with_finite_differences(entry, half, monkeypatch):
    """d loss / d theta and d loss / d phi at fixed z, along a random direction; what an objective detaches is held fixed."""
    for options in options_of(entry):
        vae, x, z = smooth_vae()
        params = list(vae.encoder.parameters()) if half == "phi" else [*vae.decoder.parameters(), vae.log_gamma]
        directions, kept = [torch.randn_like(p) for p in params], []

        def loss():
            q = vae.encode(x)
            with held_constants(monkeypatch, kept):
                return entry(vae, x, q, z, t=torch.ones_like(x), **options).sum()

        gradients = torch.autograd.grad(loss(), params, allow_unused=True)
        expected = sum((g * d).sum().item() for g, d in zip(gradients, directions) if g is not None)
        step, values = 1e-5, []
        for sign in (1, -1):
            for p, d in zip(params, directions):
                p.data += sign * step * d
            values.append(loss().item())
            for p, d in zip(params, directions):
                p.data -= sign * step * d
        assert expected == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)  # 0 where phi enters through z
        assert half == "phi" or expected


@every_entry
def test_one_number_per_datum_which_does_not_see_the_other_data(entry):
    """The released estimator of vectors averages over the minibatch; it alone couples the data."""
    torch.manual_seed(0)
    for net, shape, width in (("mlp", (D,), 8), ("conv", (1, 32, 32), 4)):
        vae = build_vae(net, shape, DZ, width=width, norm="none")
        x, z = torch.rand(4, *shape), torch.randn(3, 4, DZ)
        other = torch.cat([x[:1], torch.rand(3, *shape)])
        for options in options_of(entry):
            first, second = (entry(vae, data, vae.encode(data), z, t=-data.flatten(1), **options) for data in (x, other))
            assert first.shape == (4,) and first.isfinite().all()
            coupled = options == {"estimator": "released"} and len(shape) == 1
            assert (first[0].item() == pytest.approx(second[0].item(), rel=1e-5)) != coupled
            assert first[1].item() != pytest.approx(second[1].item(), rel=1e-5)


@every_entry
def test_needs_b_says_whether_the_encoder_is_differentiated_by_x(entry, monkeypatch):
    """Without a gradient of x the score of q has to encode once more."""
    vae, x, z = smooth_vae()
    q, encode, calls = vae.encode(x.detach()), vae.encode, []
    monkeypatch.setattr(vae, "encode", lambda x: (calls.append(1), encode(x))[1])
    loss = entry(vae, x.detach(), q, z, t=torch.ones_like(x))
    assert bool(calls) == entry.needs_b
    assert torch.allclose(loss, entry(vae, x, encode(x), z, t=torch.ones_like(x)))


@every_entry
def test_an_entry_describes_itself(entry):
    assert entry.letter and is_color_like(entry.color)
    assert not entry.joint or entry in LEARN.values() and entry in INFER.values()
    vae, x, z = smooth_vae()
    for options in options_of(entry):
        for N in (1, 2, 3):
            if alias := entry.alias(N, options.get("estimator", "plugin")):
                (same,) = [other for other in LEARN.values() if other.letter == alias]
                assert torch.allclose(entry(vae, x, vae.encode(x), z[:N], **options), same(vae, x, vae.encode(x), z[:N]))


def test_names_are_the_papers_and_tell_the_pairs_apart():
    some = ("fd", "kld"), ("elbo", "kld"), ("bao", "fd"), ("fae", "fae")
    assert [label(*pair) for pair in some] == ["KLD-F", "KLD-ELBO", "FD-B", "FAE"]
    ways = (1,), (2,), (1, "unbiased"), (1, "released"), ()
    assert [label("swersky", "kld", *way) for way in ways] == ["KLD-S=F", *["KLD-S"] * 4]
    pairs = [(learn, infer) for learn in LEARN for infer in INFER if (LEARN[learn].joint, learn) == (INFER[infer].joint, infer)
             or not (LEARN[learn].joint or INFER[infer].joint)]
    assert len({label(*pair) for pair in pairs}) == len(pairs)
    for table in (LEARN, INFER):
        assert len({entry.letter for entry in table.values()}) == len(table)


@pytest.mark.parametrize("repar", [False, True])
def test_posterior_fd_gradient_with_and_without_reparametrisation(linear, repar):
    """1/2 E||c||^2 on the linear VAE: the reparametrised phi-gradient is the closed form's; without, S in E_q is held fixed."""
    vae, W, b, _, _, _, gamma, x = linear
    vae.requires_grad_(False)
    vae.encoder.requires_grad_(True)
    q = vae.encode(x)
    torch.manual_seed(0)
    z = vae.sample(q, vae.noise(q, 200_000))
    found = torch.autograd.grad(INFER["fd"](vae, x, q, z if repar else z.detach()).mean(), vae.encoder.log_std)[0]

    log_std = vae.encoder.log_std.detach().clone().requires_grad_()
    S, fixed = (2 * log_std).exp().diag(), (2 * log_std).exp().detach().diag()
    mean = vae.encoder(x)[:, :DZ].detach()
    M = -S.inverse() + torch.eye(DZ) + W.T @ W / gamma
    gap = mean - (x - mean @ W.T - b) @ W / gamma
    exact = (torch.trace(M @ (S if repar else fixed) @ M.T) + gap.square().sum(-1).mean()) / 2
    assert torch.allclose(found, torch.autograd.grad(exact, log_std)[0], rtol=0.02, atol=0.02)


def test_batch_norm_couples_the_scores_in_training_mode():
    torch.manual_seed(0)
    vae = build_vae("conv", (1, 32, 32), 4, width=4, norm="batch")
    x, z = torch.rand(4, 1, 32, 32), torch.randn(2, 4, 4)
    other = torch.cat([x[:1], torch.rand(3, 1, 32, 32)])
    values = [INFER["fd"](vae, data, vae.encode(data), z)[0].item() for data in (x, other)]
    assert values[0] != pytest.approx(values[1], rel=1e-3)
    vae.eval()
    values = [INFER["fd"](vae, data, vae.encode(data), z)[0].item() for data in (x, other)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_released_product_on_images_pairs_every_a_with_every_b():
    a, b = torch.randn(2, 3, 4, 5, dtype=torch.float64)  # [N, B, D] each
    assert torch.allclose(mean_product(a, b, "released"), sum((a_n * b_m).sum(-1) for a_n in a for b_m in b) / 3)


@pytest.mark.slow
def test_released_estimator_on_images_has_the_same_mean_and_more_variance(linear):
    """On images mean_n a_n.b_n becomes abar . sum_n b_n. Images of one row, so that the closed forms hold."""
    vae, x, n = linear.vae.requires_grad_(False), linear.x, 4
    image_vae = VAE(nn.Sequential(nn.Flatten(), vae.encoder), nn.Sequential(vae.decoder, nn.Unflatten(-1, (1, 1, D))), DZ)
    image_vae.log_gamma = vae.log_gamma
    image_vae.double().requires_grad_(False)
    images = x.view(-1, 1, 1, D)
    plugin, released = (torch.stack([LEARN["bao"](image_vae, images, *draw(image_vae, images, n, seed), estimator=estimator)
                                     for seed in range(1500)]) for estimator in ("plugin", "released"))
    difference = released - plugin
    assert (difference.mean(0).abs() < 4 * difference.std(0) / math.sqrt(1500)).all()
    assert released.var(0).mean() > 2 * plugin.var(0).mean()


def test_released_estimator_on_vectors_averages_over_the_minibatch(linear):
    vae, x = linear.vae, linear.x
    q, z = draw(vae, x, 1)
    a = likelihood_score(vae, x, q, z)[0]
    over_batch = a[0].mean(0).square().sum() / 2
    for name, rest in (("swersky", a[0].square().sum(-1) - D / 0.5 - over_batch),
                       ("bao", over_batch + (a[0] * posterior_score(vae, x, q, z)[0]).sum(-1) - D / 0.5)):
        assert torch.allclose(LEARN[name](vae, x, q, z, estimator="released"), rest)


def test_released_estimator_averages_over_each_members_minibatch():
    ensemble, x, z = build_ensemble(2, 2, 16, [0, 1]), torch.randn(2, 6, 2), torch.randn(1, 2, 6, 2)
    q = ensemble.encode(x)
    a, lap = likelihood_score(ensemble, x, q, z)
    expected = a[0].square().sum(-1) + lap - a[0].mean(1).square().sum(-1, keepdim=True) / 2
    torch.testing.assert_close(LEARN["swersky"](ensemble, x, q, z, estimator="released"), expected)


def test_an_ensemble_member_equals_the_model_alone():
    seeds, x = [3, 1, 4], torch.randn(3, 6, 2)
    ensemble, z = build_ensemble(2, 2, 16, seeds), torch.randn(2, 3, 6, 2)
    for i, seed in enumerate(seeds):
        alone = build_ensemble(2, 2, 16, [seed])
        for objective in ENTRIES.values():
            together = objective(ensemble, x, ensemble.encode(x), z, t=-x)
            assert together.shape == (3, 6)
            expected = objective(alone, x[i:i + 1], alone.encode(x[i:i + 1]), z[:, i:i + 1], t=-x[i:i + 1])[0]
            assert torch.allclose(together[i], expected, rtol=1e-4)


def test_frozen_networks_cost_no_double_backward():
    vae = build_vae("mlp", (2,), 2, width=8)
    x, z = torch.randn(4, 2).requires_grad_(), torch.randn(3, 4, 2)
    assert posterior_score(vae, x, vae.encode(x), z).requires_grad
    vae.encoder.requires_grad_(False)
    assert not posterior_score(vae, x, vae.encode(x), z).requires_grad
    vae.decoder.requires_grad_(False)
    vae.log_gamma.requires_grad_(False)
    assert not latent_score_gap(vae, x.detach(), vae.encode(x.detach()), z).requires_grad


def test_unbiased_needs_two_samples_and_the_released_code_has_no_denoising():
    vae, x = build_vae("mlp", (2,), 2, width=8), torch.randn(4, 2)
    with pytest.raises(ValueError, match="at least 2"):
        LEARN["swersky"](vae, x, vae.encode(x), torch.randn(1, 4, 2), estimator="unbiased")
    with pytest.raises(ValueError, match="released no estimator of denoising"):
        LEARN["dsm"](vae, x, vae.encode(x), torch.randn(2, 4, 2), t=x, estimator="released")


@pytest.mark.parametrize("loss", [LEARN["fae"], INFER["fd"]])
def test_gamma_has_its_gradient_with_a_frozen_decoder(loss):
    """Also through c, whose part grad_z log p(x|z) is divided by gamma."""
    def gradient(frozen):
        torch.manual_seed(0)
        vae = build_vae("mlp", (5,), 3, width=8).double()
        vae.decoder.requires_grad_(not frozen)
        x = torch.randn(4, 5, dtype=torch.float64).requires_grad_()
        q = vae.encode(x)
        return torch.autograd.grad(loss(vae, x, q, q.sample((2,))).mean(), vae.log_gamma)[0]
    assert torch.equal(gradient(frozen=True), gradient(frozen=False))
