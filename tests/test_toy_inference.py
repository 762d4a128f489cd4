"""Toy posteriors: gradients by hand are autograd's, numbers are what they are named, the runs resume bit by bit."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, Laplace, MixtureSameFamily, Normal, kl_divergence

import plots
import toy_inference as toy
from vsm.runs import load_arrays

CPU = torch.device("cpu")
ALL = ["sym", "soft", "relu", "bias"]


def parsed(*argv):
    return toy.parse_args([str(word) for word in argv])


def run(out, *argv):
    toy.main(parsed("--out", out, *argv))
    return load_arrays(out / "metrics.npz")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- posteriors


def test_score_is_the_gradient_of_the_log_joint():
    posterior = toy.Posterior(ALL, 2.0, CPU)
    z = randn(2, 4, 50).requires_grad_()
    (expected,) = torch.autograd.grad(posterior.log_joint(z).sum(), z)
    assert torch.allclose(posterior.score(z), expected, atol=1e-12)


def test_evidence_and_mass_on_the_grid():
    posterior = toy.Posterior(ALL, 2.0, CPU)
    grid = toy.Grid(posterior, CPU)
    t = torch.linspace(-8, 8, 20001, dtype=torch.float64)  # p(x) = int N(z1; 0, 1) N(x; 0, h(z1)^2 + sd^2) dz1
    for l, name in enumerate(ALL):
        h, sd = toy.LIKELIHOODS[name]
        density = Normal(0, 1).log_prob(t).exp() * Normal(0, (h(t)[0] ** 2 + sd**2).sqrt()).log_prob(torch.tensor(2.0)).exp()
        assert grid.log_evidence[l].item() == pytest.approx(math.log(torch.trapezoid(density, t)), abs=1e-5)
    levels = grid.log_posterior.flatten(1).max(1, keepdim=True).values - torch.tensor([-1.0, 1.0, 100.0], dtype=torch.float64)
    mass = grid.mass_above(levels)
    inside = (grid.log_posterior.exp() * (grid.log_posterior > levels[:, 1, None, None])).sum((1, 2)) * grid.cell
    assert torch.allclose(mass[:, 1], inside, atol=1e-12)
    assert (mass[:, 0] == 0).all() and torch.allclose(mass[:, 2], torch.ones(4, dtype=torch.float64), atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- gradients


def test_all_runs_together_equal_a_plain_loop_of_autograd_over_objectives_infer():
    args = parsed("--likelihoods", *ALL, "--grid", 2, "--extent", 1.3, "--samples", 3, "--lr", 1e-3, "--compare-loop", 12)
    arrays = toy.compare_with_loop(args, CPU)
    assert arrays["loop_difference"] < 1e-6  # log_gamma of the VAE starts in float32
    assert arrays["loop_rate"] > 0


def test_laplace_gradients_are_those_of_autograd():
    family, posterior = toy.FAMILIES["laplace"], toy.Posterior(ALL, 2.0, CPU)
    params, e = randn(2, 2, 4, 3, 2, 5) / 2, randn(2, 1, 7, 1, 1, 5, seed=1)
    ours = toy.gradients(params, e, family.score(e), family, posterior)
    for i, name in enumerate(toy.OBJECTIVES):
        location, log_scale = (value[:, :, None, i].clone().requires_grad_() for value in params)
        z = location + log_scale.exp() * e.squeeze(3)
        held = z.detach() if name == "fd" else z
        if name == "kld":
            x_given_z = posterior.log_joint(z) - Normal(0.0, 1.0).log_prob(z).sum(0)
            second_moment = location**2 + 2 * (2 * log_scale).exp()  # KL(Laplace || N(0, 1)) by its entropy and second moment
            loss = (-log_scale + second_moment / 2).sum(0) - x_given_z
        else:
            score_q = -(held - location).sign() / log_scale.exp()
            loss = ((score_q - posterior.score(held)) ** 2).sum(0) / 2
        expected = torch.autograd.grad(loss.sum(1).sum(), (location, log_scale), allow_unused=True, materialize_grads=True)
        for got, want in zip(ours[:, :, :, :, i].sum(3), expected):
            assert torch.allclose(got, want.squeeze(2), rtol=1e-9, atol=1e-9), name


def test_the_biased_gradient_of_a_laplaces_location_is_zero_and_the_unbiased_one_finite_differences():
    descent = toy.Descent(parsed("--family", "laplace", "--grid", 3, "--iterations", 1), CPU)
    biased, unbiased, differences = toy.location_gradients(descent, toy.Grid(descent.posterior, CPU))
    assert (biased == 0).all()
    assert unbiased.abs().max() > 1
    assert torch.allclose(unbiased, differences, rtol=1e-6, atol=1e-5)


def test_gradients_between_two_gaussians():
    mean, sd = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)[:, None], torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
    closed, automatic = (gradient(mean, sd, 0.4, 0.7) for gradient in (toy.closed_gradients, toy.autograd_gradients))
    for name in ("kld", "fd", "biased"):
        for got, want in zip(closed[name], automatic[name]):
            assert torch.allclose(got.expand(3, 3), want, rtol=1e-8, atol=1e-8), name
    kld, biased = closed["kld"], closed["biased"]  # the biased gradient is KLD's up to factors of q's sd (A.5.1)
    assert torch.allclose(biased[0], kld[0] / sd**2) and torch.allclose(biased[1], kld[1] * 2 / sd**2)


# ---------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("family, law", [("gaussian", Normal), ("laplace", Laplace)])
def test_kl_and_fd_are_those_of_a_sum_over_the_grid(family, law):
    posterior = toy.Posterior(["sym", "soft"], 2.0, CPU)
    grid = toy.Grid(posterior, CPU)
    location, scale = torch.tensor([0.3125, 0.5125], dtype=torch.float64), torch.tensor([0.25, 0.3], dtype=torch.float64)
    params = torch.stack((location, scale.log())).view(2, 2, 1, 1, 1, 1).expand(2, 2, 2, 1, 1, 1)
    kl, fd = toy.kl_and_fd(params, toy.FAMILIES[family], posterior, grid)
    z = grid.z.clone().requires_grad_()
    log_q = law(location.view(2, 1, 1), scale.view(2, 1, 1)).log_prob(z).sum(0)
    (score_q,) = torch.autograd.grad(log_q.sum(), z)
    q = log_q.detach().exp() * grid.cell
    gap = score_q[:, None] - posterior.score(grid.z[:, None].expand(-1, 2, -1, -1))
    tolerance = {"gaussian": 1e-5, "laplace": 2e-2}[family]  # the grid does not resolve a Laplace's kink
    assert torch.allclose(kl.flatten(), (q * (log_q.detach() - grid.log_posterior)).sum((1, 2)), rtol=tolerance)
    assert torch.allclose(fd.flatten(), (q * (gap**2).sum(0) / 2).sum((1, 2)), rtol=tolerance)


def test_best_fits_are_the_symmetric_pair_of_sym_and_no_neighbour_is_better():
    family, posterior = toy.FAMILIES["gaussian"], toy.Posterior(["sym"], 2.0, CPU)
    grid = toy.Grid(posterior, CPU)
    best, kl = toy.best_fits(family, posterior, grid)
    location = best[0, :, 0]
    assert torch.allclose(location.abs(), torch.tensor(1.2748, dtype=torch.float64), atol=1e-3)
    assert torch.allclose(location[0], location[1], atol=1e-3) and location.min() < 0 < location.max()
    params = torch.stack((best[0, :, 0, 0], best[1, :, 0, 0].log()))
    neighbours = params[..., None] + 0.02 * randn(2, 2, 20)
    assert (toy.kl_and_fd(neighbours[:, :, None, None, None], family, posterior, grid)[0] >= kl[0, 0] - 1e-9).all()


def test_reparametrised_fd_stays_at_the_origin_of_sym_and_the_others_leave_it(tmp_path):
    arrays = run(tmp_path / "run", "--likelihoods", "sym", "--grid", 1, "--extent", 0.05, "--lr", "5e-4", "--iterations", 6000)
    end = {name: {key: arrays[key][0, i, 0, 0] for key in ("caught", "excess_kl", "distance")} for i, name in enumerate(toy.OBJECTIVES)}
    assert [end[name]["caught"] for name in toy.OBJECTIVES] == [True, False, False]
    assert np.abs(arrays["location"][:, 0, 0, 0, 0]).max() < 0.2
    assert end["fd-repar"]["excess_kl"] > 4 and -1e-9 < end["kld"]["excess_kl"] < 0.2
    assert end["fd-repar"]["distance"] > 1 and end["kld"]["distance"] < 0.3


# --------------------------------------------------------------------------------------------------------------- mixtures


def test_mixture_density_and_score():
    logits, mean, log_sd, z = randn(3, 4), randn(2, 3, 4, seed=1), randn(2, 3, 4, seed=2) / 3, randn(2, 3, 6, seed=3).requires_grad_()
    law = MixtureSameFamily(Categorical(logits=logits), Independent(Normal(mean.movedim(0, -1), log_sd.exp().movedim(0, -1)), 1))
    expected = law.log_prob(z.permute(2, 1, 0)).T
    assert torch.allclose(toy.log_components(z, logits, mean, log_sd).logsumexp(-2), expected)
    (score,) = torch.autograd.grad(expected.sum(), z)
    assert torch.allclose(toy.mixture_score(z, logits, mean, log_sd), score)


def test_mixture_numbers_of_a_mixture_that_is_one_gaussian():
    posterior = toy.Posterior(["soft"], 2.0, CPU)
    grid = toy.Grid(posterior, CPU)
    location, log_sd = torch.tensor([0.2, 0.6], dtype=torch.float64), torch.tensor([0.0, -0.2], dtype=torch.float64)
    fit = [torch.zeros(1, 1, 3, dtype=torch.float64)] + [value.view(2, 1, 1, 1).expand(2, 1, 1, 3) for value in (location, log_sd)]
    arrays = toy.judge_mixtures(fit, posterior, grid)
    params = torch.stack((location, log_sd)).view(2, 2, 1, 1, 1, 1)
    kl, fd = toy.kl_and_fd(params, toy.FAMILIES["gaussian"], posterior, grid)
    assert arrays["kl"].item() == pytest.approx(kl.item(), abs=1e-4)
    assert arrays["fd"].item() == pytest.approx(fd.item(), abs=1e-3)
    right = Normal(0.8, (1 + math.exp(-0.4)) ** 0.5).cdf(torch.tensor(0.0))
    assert arrays["right_mass"].item() == pytest.approx(1 - right.item(), abs=0.01)
    p, q = (Categorical(probs=torch.tensor([mass, 1 - mass])) for mass in (arrays["exact_right_mass"].item(), arrays["right_mass"].item()))
    assert arrays["kl_between_sides"].item() == pytest.approx(kl_divergence(q, p).item(), abs=1e-5)


def test_mixture_run(tmp_path):
    arrays = run(tmp_path / "run", "--family", "mixture", "--iterations", 150, "--lr", "1e-2", "--repeats", 2, "--components", 3)
    assert arrays["status"] == "ok" and arrays["weight"].shape == (2, 2, 3) and arrays["mean"].shape == arrays["sd"].shape == (2, 2, 2, 3)
    assert np.allclose(arrays["weight"].sum(-1), 1) and (arrays["kl"] > 0).all()
    untrained = toy.fit_mixtures(parsed("--family", "mixture", "--iterations", 1, "--repeats", 2, "--components", 3), CPU, None)
    assert (arrays["fd"] < untrained["fd"]).all()
    assert (tmp_path / "run" / "toy_mixtures.png").exists()


# ------------------------------------------------------------------------------------------------------- the command line


SHORT = ("--grid", 2, "--iterations", 2500, "--lr", "1e-3", "--frames", 6)


def test_a_run_leaves_its_documented_arrays_and_figures(tmp_path, capsys):
    out = tmp_path / "new" / "run"
    arrays = run(out, *SHORT, "--compare-loop", 2)
    runs = (2, 3, 2, 4)  # likelihoods, objectives, optimisers, starts
    for name in ("kl", "fd", "excess_kl", "distance", "nearest", "mass_above", "diverged", "caught", "moved"):
        assert arrays[name].shape == runs, name
    assert arrays["location"].shape == arrays["log_scale"].shape == (2, *runs)
    assert arrays["trajectory"].shape == (len(arrays["iteration"]), 2, 2, *runs)
    assert arrays["iteration"][[0, -1]].tolist() == [0, 2500] and 1250 in arrays["iteration"]
    assert np.array_equal(arrays["trajectory"][0, 0, :, 1, 2, 1], arrays["starts"].astype(np.float16))
    assert np.allclose(arrays["trajectory"][-1, 0], arrays["location"], atol=2e-3, equal_nan=True)
    for name in ("toy_trajectories", "toy_basins"):
        assert (out / f"{name}.png").exists()
        plots.main(plots.parse_args([name, str(out), "--save", str(tmp_path / "again.png")]))
        assert (tmp_path / "again.png").read_bytes() == (out / f"{name}.png").read_bytes()
    capsys.readouterr()
    run(out, *SHORT, "--compare-loop", 2)
    assert "finished before" in capsys.readouterr().out


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, monkeypatch, capsys):
    whole = run(tmp_path / "whole", *SHORT)
    monkeypatch.setattr(toy, "CHECKPOINT_SECONDS", 0)
    advance = toy.Descent.advance

    def interrupted(descent, noise):
        advance(descent, noise)
        if descent.step == 2000:
            raise KeyboardInterrupt

    monkeypatch.setattr(toy.Descent, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "half", *SHORT)
    monkeypatch.setattr(toy.Descent, "advance", advance)
    half = run(tmp_path / "half", *SHORT)
    assert "resumed at iteration 1000" in capsys.readouterr().out
    for name in whole.keys() - {"rate", "config"}:
        assert np.array_equal(whole[name], half[name], equal_nan=whole[name].dtype.kind == "f"), name


def test_flags_change_what_they_name():
    def ended(*argv):
        descent = toy.Descent(parsed("--grid", 2, "--extent", 1, "--iterations", 20, *argv), CPU)
        while descent.step < descent.args.iterations:
            descent.advance(descent.noise())
        return descent.params

    base = ended()
    assert torch.equal(ended(), base)
    for argv in (["--seed", 1], ["--lr", "1e-3"], ["--samples", 2], ["--iterations", 21], ["--extent", 1.5], ["--x", 1.5],
                 ["--family", "laplace"], ["--likelihoods", "relu", "bias"]):
        assert not torch.equal(ended(*argv), base), argv


def test_a_diverged_start_is_a_result(tmp_path, capsys):
    arrays = run(tmp_path / "run", "--grid", 2, "--iterations", 50, "--lr", 1)
    assert arrays["diverged"][0, 0, 0].all() and not arrays["diverged"][:, :, 1].any()
    assert arrays["status"] == "ok" and not (arrays["caught"] & arrays["diverged"]).any()
    assert "4 diverged" in capsys.readouterr().out


def test_gradients_run(tmp_path):
    arrays = run(tmp_path / "run", "--gradients")
    assert arrays["gradient"].shape == (3, 2, len(arrays["mean"]), len(arrays["sd"]))
    assert arrays["autograd_error"] < 1e-8
    assert (tmp_path / "run" / "toy_gradients.png").exists()


def test_refuses_a_folder_made_with_other_flags(fails, tmp_path):
    argv = ("--gradients", "--out", tmp_path / "run")
    toy.main(parsed(*argv))
    assert "target_sd was 0.5, is now 2.0" in fails(toy, *argv, "--target-sd", 2)


@pytest.mark.parametrize("argv", [["--likelihoods", "cubic"], ["--likelihoods", "sym", "sym"], ["--lr", "0"], ["--x", "nan"], ["--x", "11"],
                                  ["--grid", "0"], ["--family", "cauchy"], ["--device", "cuda:9"], ["--seed", "-1"],
                                  ["--family", "laplace", "--compare-loop", "5"], ["--iterations", "1e6"], ["--components", "3"],
                                  ["--target-sd", "2"], ["--gradients", "--seed", "1"], ["--gradients", "--family", "mixture"],
                                  ["--family", "mixture", "--grid", "3"], ["--gradients", "--target-sd", "1e-200"], ["--seed", str(2**63)]])
def test_bad_input_is_one_sentence(fails, argv, tmp_path):
    fails(toy, *argv, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_mixtures_that_leave_the_grid_are_no_perfect_fit(tmp_path, capsys):
    posterior = toy.Posterior(["soft"], 2.0, CPU)
    mean = torch.tensor([0.0, 4.9, 50.0]).view(1, 1, 3, 1).repeat(2, 1, 1, 1)  # on the grid [-5, 5]^2, half off it, beyond it
    arrays = toy.judge_mixtures([torch.zeros(1, 3, 1), mean, torch.full_like(mean, -1.5)], posterior, toy.Grid(posterior, CPU))
    for name in ("kl", "kl_within_sides", "right_mass", "fd"):
        assert arrays[name].isfinite().tolist() == [[True, False, False]], name
    arrays = run(tmp_path / "diverged", "--family", "mixture", "--lr", 100, "--repeats", 1, "--iterations", 50)
    assert "0 runs (1 more diverged or left the grid)" in capsys.readouterr().out
    assert str(arrays["status"]) == "diverged@50" and (tmp_path / "diverged" / "toy_mixtures.png").exists()


def test_a_mixture_on_one_side_has_all_its_numbers():
    posterior = toy.Posterior(["sym"], 2.0, CPU)
    mean = torch.tensor([1.3, -1.3], dtype=torch.float64).view(1, 1, 2, 1).repeat(2, 1, 1, 1)
    arrays = toy.judge_mixtures([torch.zeros(1, 2, 1, dtype=torch.float64), mean, torch.full_like(mean, -3)], posterior, toy.Grid(posterior, CPU))
    assert arrays["right_mass"].flatten().tolist() == pytest.approx([1, 0])
    assert arrays["kl_between_sides"].flatten().tolist() == pytest.approx([math.log(2)] * 2, abs=1e-4)


def test_a_mixture_that_diverges_leaves_the_others_as_they_are(monkeypatch, capsys):
    args = parsed("--family", "mixture", "--repeats", 3, "--iterations", 30, "--lr", "1e-2", "--components", 4)
    whole, normal_noise, calls = toy.fit_mixtures(args, CPU, None), toy.normal_noise, []

    def poisoned(*of):
        calls.append(of)
        noise = normal_noise(*of)
        if len(calls) == 1:
            noise[..., 1, :] = math.nan  # the first means of one mixture
        return noise

    monkeypatch.setattr(toy, "normal_noise", poisoned)
    capsys.readouterr()
    arrays = toy.fit_mixtures(args, CPU, None)
    assert "2 runs (1 more diverged or left the grid), mean +- sd of kl" in (out := capsys.readouterr().out) and "nan" not in out
    assert arrays["status"] == "ok" and np.isnan(arrays["kl"][:, 1]).all()
    for name in ("kl", "fd", "right_mass"):
        assert np.array_equal(arrays[name][:, [0, 2]], whole[name][:, [0, 2]]), name


def test_one_mixture_has_no_spread(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy.fit_mixtures(parsed("--family", "mixture", "--repeats", 1, "--iterations", 2), CPU, None)
    out = capsys.readouterr().out
    assert "sym: 1 run, kl " in out and "+-" not in out and "nan" not in out


def test_a_run_that_diverged_in_one_version_alone_is_no_agreement(monkeypatch):
    args = parsed("--grid", 1, "--likelihoods", "sym", "--compare-loop", 3)
    assert toy.compare_with_loop(args, CPU)["loop_difference"] < 1e-6
    for value in (math.nan, math.inf):
        monkeypatch.setattr(toy, "plain_run", lambda *_, value=value: torch.full((4,), value))
        assert toy.compare_with_loop(args, CPU)["loop_difference"] == np.inf
    monkeypatch.setattr(toy.Descent, "update", lambda descent, _: setattr(descent, "step", descent.step + 1) or descent.params.fill_(math.nan))
    assert toy.compare_with_loop(args, CPU)["loop_difference"] == 0  # inf here, nan there: lost in both


@pytest.mark.parametrize("argv", [[], ["--family", "mixture"], ["--gradients"]])
def test_dry_run_writes_nothing(tmp_path, capsys, argv):
    toy.main(parsed(*argv, "--dry-run", "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert "would write" in capsys.readouterr().out


def test_default_folders_name_what_differs():
    folders = [parsed(*argv).out for argv in ([], ["--family", "mixture"], ["--gradients"], ["--likelihoods", "relu", "--lr", "1e-3"])]
    assert folders == ["runs/toy/gaussian-sym+soft-seed0", "runs/toy/mixture-sym+soft-seed0", "runs/toy/gradients-sd0.5",
                       "runs/toy/gaussian-relu-lr0.001-seed0"]


@pytest.mark.slow
def test_figure_2_in_short(tmp_path):
    arrays = run(tmp_path / "run", "--iterations", 150_000)
    caught = arrays["caught"].sum(-1)  # [L, I, P]
    assert (caught[0, 0] > 0).all() and caught[0, 0, 1] >= caught[0, 0, 0]
    assert not caught[0, 1:].any() and not caught[1].any()
    assert (np.median(arrays["distance"][1, 0], -1) > 0.5).all() and (np.median(arrays["distance"][1, 1:], -1) < 0.1).all()
