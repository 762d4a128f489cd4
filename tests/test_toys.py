"""The parts of the toys: posteriors, gradients against autograd, the numbers at the end, mixtures."""

import itertools
import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, Laplace, MixtureSameFamily, Normal, kl_divergence

import toy_inference as toy
from models import VAE
from small_runs import CPU, run_steps
from test_toy_inference import fit, parsed, run
from training import phi_loss
from vsm.toys.descent import OPTIMISERS, Descent, best_fits, kl_and_fd, location_gradients, noise_quadrature, wasserstein_distance
from vsm.toys.gradients import FAMILIES, GRADIENTS, closed_gradients, gradients, gradients_on_a_grid, normal_nodes
from vsm.toys.mixtures import Mixtures, how_well_mixtures_fit, log_components, mixture_score
from vsm.toys.posteriors import LIKELIHOODS, Grid, Posterior

ALL = ["sym", "soft", "relu", "bias"]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_score_is_the_gradient_of_the_log_joint():
    posterior, z = Posterior(ALL, 2.0, CPU), randn(2, 4, 50).requires_grad_()
    (expected,) = torch.autograd.grad(posterior.log_joint(z).sum(), z)
    assert torch.allclose(posterior.score(z), expected, atol=1e-12)


def test_evidence_and_mass_on_the_grid():
    grid = Grid(Posterior(ALL, 2.0, CPU), CPU)
    t = torch.linspace(-8, 8, 20001, dtype=torch.float64)  # p(x) = int N(z1; 0, 1) N(x; 0, h(z1)^2 + sd^2) dz1
    for l, name in enumerate(ALL):
        h, sd = LIKELIHOODS[name]
        density = Normal(0, 1).log_prob(t).exp() * Normal(0, (h(t)[0] ** 2 + sd**2).sqrt()).log_prob(torch.tensor(2.0)).exp()
        assert grid.log_evidence[l].item() == pytest.approx(math.log(torch.trapezoid(density, t)), abs=1e-5)
    levels = grid.log_posterior.flatten(1).max(1, keepdim=True).values - torch.tensor([-1.0, 1.0, 100.0], dtype=torch.float64)
    mass = grid.mass_above(levels)
    inside = (grid.log_posterior.exp() * (grid.log_posterior > levels[:, 1, None, None])).sum((1, 2)) * grid.cell
    assert torch.allclose(mass[:, 1], inside, atol=1e-12)
    assert (mass[:, 0] == 0).all() and torch.allclose(mass[:, 2], torch.ones(4, dtype=torch.float64), atol=1e-6)


class Product(nn.Module):
    """g(z) = h(z1) z2 as a decoder, [..., 2] -> [..., 1]."""

    def __init__(self, h):
        super().__init__()
        self.h = h

    def forward(self, z):
        return self.h(z[..., 0])[0][..., None] * z[..., 1:]


class Unamortised(nn.Module):
    """An encoder that ignores x: its parameters are q's mean and log sd, [4]."""

    def __init__(self, start):
        super().__init__()
        self.q = nn.Parameter(torch.cat((start, torch.zeros_like(start))))

    def forward(self, x):
        return self.q.expand(len(x), 4)


def run_alone(likelihood, objective, optimiser, start, noise, args):
    """Location and log scale [4] of one Gaussian q after a descent from the location `start` [2] with noise [steps, 2, N]."""
    h, sd = LIKELIHOODS[likelihood]
    encoder = Unamortised(start)
    vae = VAE(encoder, Product(h), 2, init_sd=sd).to(start)
    vae.log_gamma.requires_grad_(False)
    x = start.new_full((1, 1), args.x)
    descent = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimiser]([encoder.q], lr=args.lr)
    for e in noise:
        descent.zero_grad()
        phi_loss(vae, x, objective, e.T[:, None]).mean().backward()  # noise [N, 1, 2]
        descent.step()
    return encoder.q.detach()


def difference_from_a_plain_loop(*argv):
    """The largest difference of a parameter of all runs together from that of the same runs one after another."""
    args = parsed(*argv)
    together = Descent(args, CPU)
    noise = together.noise()
    together.run_step(noise)
    axes = (args.likelihoods, args.objectives, OPTIMISERS, together.starts.T)
    differences = []
    for (l, likelihood), (i, objective), (p, optimiser), (k, start) in itertools.product(*map(enumerate, axes)):
        alone = run_alone(likelihood, objective, optimiser, start, noise[:, :, 0, :, 0, 0, k], args)
        differences.append((alone - together.params[:, :, l, i, p, k].flatten()).abs().max())
    return max(differences)


def test_all_runs_together_equal_a_plain_loop_which_sees_a_gradient_of_another_objective(monkeypatch):
    """The loop is of autograd over objectives.INFER."""
    argv = ("--likelihoods", *ALL, "--objectives", *GRADIENTS, "--grid", 2, "--extent", 1.3, "--samples", 3, "--lr", 1e-3)
    assert difference_from_a_plain_loop(*argv, "--iterations", 5) < 1e-6  # log_gamma of the VAE starts in float32
    argv = ("--likelihoods", "sym", "--objectives", "fd-weighted", "--grid", 1, "--extent", 1.3, "--iterations", 2)
    monkeypatch.setitem(GRADIENTS, "fd-weighted", GRADIENTS["kld"])
    assert difference_from_a_plain_loop(*argv) > 1e-5


def test_laplace_gradients_are_those_of_autograd():
    family, posterior, names = FAMILIES["laplace"], Posterior(ALL, 2.0, CPU), list(GRADIENTS)
    params, e = randn(2, 2, 4, len(names), 2, 5) / 2, randn(2, 1, 7, 1, 1, 5, seed=1)
    ours = gradients(params, e, family.score(e), family, posterior, names)
    for i, name in enumerate(names):
        location, log_scale = (value[:, :, None, i].clone().requires_grad_() for value in params)
        z = location + log_scale.exp() * e.squeeze(3)
        held = z.detach() if name in ("fd", "fd-weighted") else z
        if name == "kld":
            x_given_z = posterior.log_joint(z) - Normal(0.0, 1.0).log_prob(z).sum(0)
            second_moment = location**2 + 2 * (2 * log_scale).exp()  # KL(Laplace || N(0, 1)) by its entropy and second moment
            loss = (-log_scale + second_moment / 2).sum(0) - x_given_z
        else:
            c = -(held - location).sign() / log_scale.exp() - posterior.score(held)
            loss = ((c * math.sqrt(2) * log_scale.exp().detach() if name == "fd-weighted" else c) ** 2).sum(0) / 2
        expected = torch.autograd.grad(loss.sum(1).sum(), (location, log_scale), allow_unused=True, materialize_grads=True)
        for got, want in zip(ours[:, :, :, :, i].sum(3), expected):
            assert torch.allclose(got, want.squeeze(2), rtol=1e-8, atol=1e-8), name  # torch's softplus is linear from 20 on


def test_weighted_fd_is_kld_on_average_for_the_location_and_twice_it_for_the_log_scale():
    family, posterior = FAMILIES["gaussian"], Posterior(["sym", "soft"], 2.0, CPU)
    params = (randn(2, 2, 2, 1, 1, 4) / 3).expand(-1, -1, -1, 2, -1, -1)
    e, weight = noise_quadrature(family, CPU)
    mean = (weight * gradients(params, e, family.score(e), family, posterior, ["fd-weighted", "kld"])).sum(3)
    weighted, kld = mean[:, :, :, 0], mean[:, :, :, 1]
    assert torch.allclose(weighted[0], kld[0], atol=1e-6) and torch.allclose(weighted[1], 2 * kld[1], atol=1e-6)
    assert kld.abs().min() > 1e-3


def test_the_objectives_flag_selects_and_orders():
    def ended(*names):
        argv = ["--grid", 2, "--extent", 1, "--iterations", 5, "--lr", "1e-4", "--objectives", *names]
        return dict(zip(names, run_steps(Descent(parsed(*argv), CPU), 1).params.unbind(3)))
    together = ended(*GRADIENTS)
    for names in (["kld"], ["fd-weighted", "fd-repar"]):
        for name, params in ended(*names).items():
            assert torch.allclose(params, together[name], rtol=1e-12), name
    assert not torch.allclose(together["fd"], together["fd-weighted"])


def test_the_biased_gradient_of_a_laplaces_location_is_zero_and_the_unbiased_one_finite_differences():
    descent = Descent(parsed("--family", "laplace", "--grid", 3, "--iterations", 1, "--likelihoods", "sym"), CPU)
    biased, unbiased, differences = location_gradients(descent, Grid(descent.posterior, CPU))
    assert (biased == 0).all() and unbiased.abs().max() > 1
    assert torch.allclose(unbiased, differences, rtol=1e-6, atol=1e-5)


def autograd_gradients(mean, sd, target_mean, target_sd):
    """The gradients of closed_gradients by autograd, with expectations under q by quadrature."""
    e, weight = map(torch.as_tensor, normal_nodes())

    def fisher(z):
        return (weight * ((mean[..., None] - z) / sd[..., None] ** 2 - (target_mean - z) / target_sd**2) ** 2).sum(-1) / 2

    mean, sd = (value.clone().requires_grad_() for value in torch.broadcast_tensors(mean, sd))
    z = mean[..., None] + sd[..., None] * e
    target_mean, target_sd = mean.new_tensor(target_mean), mean.new_tensor(target_sd)
    kl = kl_divergence(Normal(mean, sd), Normal(target_mean, target_sd))
    losses = {"kld": kl, "fd": fisher(z), "biased": fisher(z.detach())}
    return {name: torch.autograd.grad(loss.sum(), (mean, sd), retain_graph=True) for name, loss in losses.items()}


def test_gradients_between_two_gaussians():
    mean, sd = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)[:, None], torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
    closed, automatic = (gradient(mean, sd, 0.4, 0.7) for gradient in (closed_gradients, autograd_gradients))
    for name in ("kld", "fd", "biased"):
        for got, want in zip(closed[name], automatic[name]):
            assert torch.allclose(got.expand(3, 3), want, rtol=1e-8, atol=1e-8), name
    kld, biased = closed["kld"], closed["biased"]  # the biased gradient is KLD's up to factors of q's sd (A.5.1)
    assert torch.allclose(biased[0], kld[0] / sd**2) and torch.allclose(biased[1], kld[1] * 2 / sd**2)


@pytest.mark.parametrize("family, law", [("gaussian", Normal), ("laplace", Laplace)])
def test_kl_and_fd_are_those_of_a_sum_over_the_grid(family, law):
    posterior = Posterior(["sym", "soft"], 2.0, CPU)
    grid = Grid(posterior, CPU)
    location, scale = torch.tensor([0.3125, 0.5125], dtype=torch.float64), torch.tensor([0.25, 0.3], dtype=torch.float64)
    params = torch.stack((location, scale.log())).view(2, 2, 1, 1, 1, 1).expand(2, 2, 2, 1, 1, 1)
    kl, fd = kl_and_fd(params, FAMILIES[family], posterior, grid)
    z = grid.z.clone().requires_grad_()
    log_q = law(location.view(2, 1, 1), scale.view(2, 1, 1)).log_prob(z).sum(0)
    (score_q,) = torch.autograd.grad(log_q.sum(), z)
    q = log_q.detach().exp() * grid.cell
    gap = score_q[:, None] - posterior.score(grid.z[:, None].expand(-1, 2, -1, -1))
    tolerance = {"gaussian": 1e-5, "laplace": 2e-2}[family]  # the grid does not resolve a Laplace's kink
    assert torch.allclose(kl.flatten(), (q * (log_q.detach() - grid.log_posterior)).sum((1, 2)), rtol=tolerance)
    assert torch.allclose(fd.flatten(), (q * (gap**2).sum(0) / 2).sum((1, 2)), rtol=tolerance)


def test_best_fits_are_the_symmetric_pair_of_sym_and_no_neighbour_is_better():
    family, posterior = FAMILIES["gaussian"], Posterior(["sym"], 2.0, CPU)
    grid = Grid(posterior, CPU)
    best, kl = best_fits(family, posterior, grid)
    location = best[0, :, 0]
    assert torch.allclose(location.abs(), torch.tensor(1.2748, dtype=torch.float64), atol=1e-3)
    assert torch.allclose(location[0], location[1], atol=1e-3) and location.min() < 0 < location.max()
    neighbours = torch.stack((best[0, :, 0, 0], best[1, :, 0, 0].log()))[..., None] + 0.02 * randn(2, 2, 20)
    assert (kl_and_fd(neighbours[:, :, None, None, None], family, posterior, grid)[0] >= kl[0, 0] - 1e-9).all()


@pytest.mark.slow
def test_reparametrised_fd_stays_at_the_origin_of_sym_and_the_others_leave_it(tmp_path):
    arrays = fit(tmp_path / "run", "--likelihoods", "sym", "--grid", 1, "--extent", 0.05, "--lr", "1e-3", "--iterations", 3000)
    keys = "caught", "excess_kl", "distance"
    end = {name: {key: arrays[key][0, i, 0, 0] for key in keys} for i, name in enumerate(toy.OBJECTIVES)}
    assert [end[name]["caught"] for name in toy.OBJECTIVES] == [True, False, False]
    assert np.abs(arrays["location"][:, 0, 0, 0, 0]).max() < 0.2
    assert end["fd-repar"]["excess_kl"] > 4 and -1e-9 < end["kld"]["excess_kl"] < 0.2
    assert end["fd-repar"]["distance"] > 1 and end["kld"]["distance"] < 0.3
    half = arrays["trajectory"][arrays["iteration"].tolist().index(1500), 0]
    np.testing.assert_allclose(arrays["moved"], np.linalg.norm(arrays["location"] - half, axis=0), atol=5e-3)


@pytest.mark.parametrize("name, law", [("gaussian", Normal), ("laplace", Laplace)])
def test_the_distance_of_two_laws_is_that_of_their_quantiles(name, law):
    """W2^2 is the mean squared difference of quantiles, and adds up over the coordinates."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    one, other = randn(2, 2), randn(2, 2, seed=1)
    square = sum((law(*a).icdf(u) - law(*b).icdf(u)).square().mean()
                 for a, b in zip(torch.stack((one[0], one[1].exp())).T, torch.stack((other[0], other[1].exp())).T))
    fits = torch.stack((other[0], other[1].exp())).view(2, 2, 1, 1)
    found = wasserstein_distance(one.view(2, 2, 1, 1, 1, 1), fits, FAMILIES[name])
    assert found.item() == pytest.approx(square.sqrt().item(), rel=1e-3)


def cells_of(table):
    """The lines of a table without the spaces that fill its columns."""
    return [re.sub(" +", " ", line) for line in table.splitlines()]


def test_the_grid_of_gradients_has_its_target_at_one_place():
    usual, wide = gradients_on_a_grid(0.5), gradients_on_a_grid(50.0)
    assert torch.equal(usual["mean"], torch.linspace(-2, 2, 41, dtype=torch.float64))
    assert usual["sd"][[0, -1]].tolist() == [0.25, 4]
    assert torch.allclose(wide["sd"] / 50, usual["sd"] / 0.5) and torch.allclose(wide["mean"] / 50, usual["mean"] / 0.5)


def test_a_diverged_start_is_a_result(tmp_path, capsys):
    arrays = fit(tmp_path / "run", "--grid", 2, "--iterations", 50, "--lr", 1)
    assert arrays["diverged"][0, 0, 0].all() and not arrays["diverged"][:, :, 1].any()
    assert arrays["status"] == "ok" and not (arrays["caught"] & arrays["diverged"]).any()
    first = next(line for line in cells_of(capsys.readouterr().out) if line.startswith("| sym | fd-repar | sgd"))
    assert first == "| sym | fd-repar | sgd | 0 | 4 | - | - | - | - | - |"  # no start caught, four diverged, and no median


def test_a_run_of_which_nothing_is_left_says_from_which_frame_on():
    descent = Descent(parsed("--grid", 1, "--iterations", 8, "--frames", 4), CPU)
    descent.trajectory[2:] = math.nan
    assert descent.status == f"diverged@{descent.frames[2]}"
    descent.trajectory[:, 0, 0, 0, 0, 0, 0] = 0.0
    assert descent.status == "ok"


def test_mixture_density_and_score():
    logits, mean, log_sd = randn(3, 4), randn(2, 3, 4, seed=1), randn(2, 3, 4, seed=2) / 3
    z, sd = randn(2, 3, 6, seed=3).requires_grad_(), log_sd.exp()
    law = MixtureSameFamily(Categorical(logits=logits), Independent(Normal(mean.movedim(0, -1), sd.movedim(0, -1)), 1))
    expected = law.log_prob(z.permute(2, 1, 0)).T
    assert torch.allclose(log_components(z, logits, mean, log_sd).logsumexp(-2), expected)
    (score,) = torch.autograd.grad(expected.sum(), z)
    assert torch.allclose(mixture_score(z, logits, mean, log_sd), score)


def test_mixture_numbers_of_a_mixture_that_is_one_gaussian():
    posterior = Posterior(["soft"], 2.0, CPU)
    grid = Grid(posterior, CPU)
    location, log_sd = torch.tensor([0.2, 0.6], dtype=torch.float64), torch.tensor([0.0, -0.2], dtype=torch.float64)
    mean_and_log_sd = (value.view(2, 1, 1, 1).expand(2, 1, 1, 3) for value in (location, log_sd))
    arrays = how_well_mixtures_fit([torch.zeros(1, 1, 3, dtype=torch.float64), *mean_and_log_sd], posterior, grid)
    kl, fd = kl_and_fd(torch.stack((location, log_sd)).view(2, 2, 1, 1, 1, 1), FAMILIES["gaussian"], posterior, grid)
    assert arrays["kl"].item() == pytest.approx(kl.item(), abs=1e-4) and arrays["fd"].item() == pytest.approx(fd.item(), abs=1e-3)
    right = Normal(0.8, (1 + math.exp(-0.4)) ** 0.5).cdf(torch.tensor(0.0))
    assert arrays["right_mass"].item() == pytest.approx(1 - right.item(), abs=0.01)
    masses = arrays["exact_right_mass"].item(), arrays["right_mass"].item()
    p, q = (Categorical(probs=torch.tensor([mass, 1 - mass])) for mass in masses)
    assert arrays["kl_between_sides"].item() == pytest.approx(kl_divergence(q, p).item(), abs=1e-5)


def test_mixtures_that_leave_the_grid_are_no_perfect_fit(tmp_path, capsys):
    posterior = Posterior(["soft"], 2.0, CPU)
    mean = torch.tensor([0.0, 4.9, 50.0]).view(1, 1, 3, 1).repeat(2, 1, 1, 1)  # on the grid [-5, 5]^2, half off it, beyond it
    arrays = how_well_mixtures_fit([torch.zeros(1, 3, 1), mean, torch.full_like(mean, -1.5)], posterior, Grid(posterior, CPU))
    for name in ("kl", "kl_within_sides", "right_mass", "fd"):
        assert arrays[name].isfinite().tolist() == [[True, False, False]], name
    argv = ("--family", "mixture", "--lr", 100, "--repeats", 1, "--iterations", 50, "--likelihoods", "sym")
    arrays = run(tmp_path / "diverged", *argv)
    assert any(line.startswith("| sym | 0 | 1 |") for line in cells_of(capsys.readouterr().out))
    assert str(arrays["status"]) == "diverged@50" and (tmp_path / "diverged" / "toy_mixtures.png").exists()
    run(tmp_path / "diverged", *argv)
    assert "finished before" in capsys.readouterr().out


def test_a_mixture_on_one_side_has_all_its_numbers():
    posterior = Posterior(["sym"], 2.0, CPU)
    mean = torch.tensor([1.3, -1.3], dtype=torch.float64).view(1, 1, 2, 1).repeat(2, 1, 1, 1)
    one_component = [torch.zeros(1, 2, 1, dtype=torch.float64), mean, torch.full_like(mean, -3)]
    arrays = how_well_mixtures_fit(one_component, posterior, Grid(posterior, CPU))
    assert arrays["right_mass"].flatten().tolist() == pytest.approx([1, 0])
    assert arrays["kl_between_sides"].flatten().tolist() == pytest.approx([math.log(2)] * 2, abs=1e-4)


def test_a_mixture_that_diverges_leaves_the_others_as_they_are(tmp_path, monkeypatch, capsys):
    argv = ("--family", "mixture", "--repeats", 3, "--iterations", 30, "--lr", "1e-2", "--components", 4)
    whole, init = fit(tmp_path / "whole", *argv), Mixtures.__init__

    def poisoned(mixtures, *of):
        init(mixtures, *of)
        mixtures.mean.data[..., 1, :] = math.nan  # the first means of one mixture
    monkeypatch.setattr(Mixtures, "__init__", poisoned)
    capsys.readouterr()
    arrays = fit(tmp_path / "poisoned", *argv)
    out = capsys.readouterr().out
    assert any(line.startswith("| sym | 2 | 1 | ") for line in cells_of(out)) and "±" in out and "nan" not in out
    for line, mass in zip(cells_of(out)[-2:], arrays["exact_right_mass"], strict=True):
        assert line.endswith(f" | {mass:.3f} |")
    assert arrays["status"] == "ok" and np.isnan(arrays["kl"][:, 1]).all()
    for name in ("kl", "fd", "right_mass"):
        assert np.array_equal(arrays[name][:, [0, 2]], whole[name][:, [0, 2]]), name


def test_one_mixture_has_no_spread(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(tmp_path / "run", "--family", "mixture", "--repeats", 1, "--iterations", 2)
    out = capsys.readouterr().out
    assert any(line.startswith("| sym | 1 | 0 | ") for line in cells_of(out)) and "±" not in out and "nan" not in out
