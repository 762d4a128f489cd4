"""Figure 1: the closed forms are the divergences, the minima are the minima, and objectives.py finds the same."""

import math

import numpy as np
import pytest
import torch

import param_recovery
from models import EnsembleVAE
from objectives import LEARN
from param_recovery import CHECKED, RULES, MismatchedEncoder, Scale, joint_fd, joint_kld, minimise, posterior_variance, recover
from small_runs import CPU, main
from vsm.linear import kappa, matched_noise
from vsm.runs import load_arrays

POINTS = [(0.7, 0.2, 0.5, 1.3, 1.1), (1.5, 0.6, 2.0, 0.7, 0.4), (0.0, -0.3, 0.9, 1.0, 2.0)]  # w, phi, alpha, gamma, w*


def joints(w, phi, alpha, gamma, w_star):
    """Covariances of p(x, z) and q(x, z)."""
    v = gamma + w_star**2
    return (np.array([[gamma + w**2, w], [w, 1]]),
            np.array([[v, phi * v], [phi * v, phi**2 * v + posterior_variance(w, alpha, gamma)]]))


@pytest.mark.parametrize("point", POINTS)
def test_closed_forms_are_the_divergences_between_two_gaussians(point):
    p, q = joints(*point)
    gap = np.linalg.inv(p) - np.linalg.inv(q)
    assert joint_fd(*point) == pytest.approx(np.trace(gap @ q @ gap) / 2, rel=1e-10)
    kl = (np.trace(np.linalg.solve(p, q)) - 2 + np.log(np.linalg.det(p) / np.linalg.det(q))) / 2
    assert joint_kld(*point) == pytest.approx(kl, rel=1e-10)


def test_the_recovered_w_are_those_of_the_design():
    expected = {0.5: [0.000, 0.503, 0.821, 1.040, 1.352], 2.0: [0.000, 0.483, 0.756, 0.970, 1.296], 1.0: [0.5, 1, 1.5, 2, 3]}
    for alpha, w in expected.items():
        assert np.abs(recover("JFD", alpha, 1.0, CHECKED)[0] - w).max() < 6e-4
        assert np.abs(recover("JKLD", alpha, 1.0, CHECKED)[0] - CHECKED).max() < 1e-6


def test_joint_fd_collapses_below_a_threshold():
    # the second derivative of the profile at w = 0 vanishes where 3 v^2 - 3 v - 2 = 0, for alpha = 1/2, gamma = 1, v = 1 + w*^2
    threshold = math.sqrt((3 + math.sqrt(33)) / 6 - 1)
    below, above = recover("JFD", 0.5, 1.0, np.array([threshold - 0.003, threshold + 0.003]))[0]
    assert below < 1e-3 and above > 0.03


def test_no_point_of_a_dense_grid_is_lower_than_the_minimum():
    w, phi = np.meshgrid(np.linspace(0, 6, 601), np.linspace(-2, 2, 401))
    for alpha, gamma, w_star in ((0.5, 1.0, 0.5), (0.5, 1.0, 1.5), (4.0, 0.3, 1.0), (1.0, 2.0, 3.0)):
        found = joint_fd(*recover("JFD", alpha, gamma, w_star), alpha, gamma, w_star)
        assert found <= joint_fd(w, phi, alpha, gamma, w_star).min() + 1e-12


def test_minimise_finds_the_lower_of_two_minima_and_the_one_at_zero():
    def wells(depth_at_zero):
        return lambda w, phi: (np.minimum((w - 3) ** 2, w**2 - depth_at_zero) + (phi - w) ** 2)
    assert minimise(wells(-0.1)) == (pytest.approx(3), pytest.approx(3)) and minimise(wells(0.1)) == (0, 0)


def exact_vae(how, w, phi, alpha, gamma, w_star, N=1):
    """A model at (w, phi) with noise whose covariance is exactly I in x and the N samples: exact for losses quadratic in them."""
    decoder = Scale(1).double()
    encoder = MismatchedEncoder(how, decoder, alpha, gamma).double()
    decoder.w.data.fill_(w)
    encoder.phi.data.fill_(phi)
    vae = EnsembleVAE(encoder, decoder, 1, 1).double()
    vae.log_gamma.requires_grad_(False).fill_(math.log(gamma))
    noise = matched_noise(64, 1 + N)
    x = math.sqrt(gamma + w_star**2) * noise[None, :, :1].requires_grad_()
    q = vae.encode(x)
    return vae, x, q, vae.sample(q, noise[:, 1:].T[:, None, :, None])


@pytest.mark.parametrize("objective, divergence", [("elbo", joint_kld), ("fae", joint_fd)])
def test_expected_elbo_and_fae_are_the_joint_divergences_up_to_a_constant(objective, divergence):
    points = [(*point, 1.3, 1.1) for point in ((0.7, 0.2, 0.5), (1.5, 0.6, 2.0), (0.1, -0.3, 0.9))]
    constants = [LEARN[objective](*exact_vae("joint", *point)).mean().item() - divergence(*point) for point in points]
    assert np.ptp(constants) < 1e-6  # gamma passes through float32


@pytest.mark.parametrize("rule", [rule for rule, (how, *_) in RULES.items() if how != "joint"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.7])
def test_held_and_following_rules_are_stationary_and_increase_beyond(rule, alpha):
    how, objective, estimator, N = RULES[rule]
    N = N or 2 * (estimator == "unbiased") or 1
    options = {"estimator": estimator} if estimator else {}
    w, phi = (float(value) for value in recover(rule, alpha, 1.3, 2.5))
    slopes = []
    for shift in (0.0, 0.05):
        at = (w + shift, phi if how == "held" else 0.0, alpha, 1.3, 2.5)
        if how == "held":  # the q of the fixed point, the decoder moved
            vae, x, q, z = exact_vae(how, w, *at[1:], N)
            vae.decoder.w.data.fill_(at[0])
            z = z.detach()
        else:
            vae, x, q, z = exact_vae(how, *at, N)
        slopes.append(torch.autograd.grad(LEARN[objective](vae, x, q, z, **options).mean(), vae.decoder.w)[0].item())
    assert abs(slopes[0]) < 1e-6 and slopes[1] > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["held S", "JFD", "JKLD", "following B", "held S, N = 2", "held B, N = 1"])
def test_samples_and_adam_reach_the_closed_forms(rule):
    args = param_recovery.parse_args(["--stochastic", "--iterations", "2400", "--batch", "200", "--lr", "0.1", "--gamma", "0.5"])
    alpha, w_star = np.array([0.5, 2.0, 0.5]), np.array([1.5, 1.5, 0.5])
    w, phi = param_recovery.recover_from_samples(rule, alpha, w_star, args, CPU)
    exact_w, exact_phi = recover(rule, alpha, 0.5, w_star)
    assert np.abs(np.abs(w) - exact_w).max() < 0.06 and np.abs(phi * np.sign(w) - exact_phi).max() < 0.06


def test_the_script_writes_its_keys_and_figures_and_does_not_run_twice(tmp_path, capsys):
    out = tmp_path / "a" / "b"
    argv = ["--out", out, "--points", 5, "--stochastic", "--iterations", 3, "--batch", 10]
    main(param_recovery, *argv)
    arrays = load_arrays(out / "metrics.npz")
    assert arrays["status"] == "ok" and arrays["w"].shape == arrays["phi"].shape == (len(RULES), 3, 5)
    assert arrays["sampled_w"].shape == arrays["checked_w"].shape == (len(RULES), 3, 5)
    assert arrays["sweep_w"].shape == (len(RULES), len(arrays["sweep_alpha"]))
    assert {"param_recovery.png", "recovery_rules.png"} <= {file.name for file in out.iterdir()}
    capsys.readouterr()
    main(param_recovery, *argv)
    assert "finished before" in capsys.readouterr().out


def test_flags_change_what_they_name():
    def from_samples(*argv):
        args = param_recovery.parse_args(["--stochastic", "--iterations", "2", "--batch", "10", *argv])
        return param_recovery.stochastic(args, CPU)["sampled_w"]
    sampled = from_samples()
    assert np.array_equal(from_samples(), sampled)
    for argv in (["--seed", "1"], ["--lr", "0.1"], ["--samples", "3"], ["--batch", "11"], ["--gamma", "2"]):
        assert not np.array_equal(from_samples(*argv), sampled)
    of_its_own = list(RULES).index("held S, N = 2")  # --samples is the N of the rules that name none
    assert np.array_equal(from_samples("--samples", "3")[of_its_own], sampled[of_its_own])


def test_a_diverged_run_says_so(tmp_path):
    main(param_recovery, "--points", 2, "--stochastic", "--iterations", 3, "--batch", 10, "--lr", 1e30, "--out", tmp_path / "run")
    assert load_arrays(tmp_path / "run" / "metrics.npz")["status"] == "diverged@3"


@pytest.mark.parametrize("gamma", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("alpha", [1e-3, 0.5, 1.0, 1e3])
def test_the_search_finds_the_lowest_w_of_a_dense_profile_in_all_that_the_flags_allow(gamma, alpha):
    w = np.concatenate(([0.0], np.geomspace(1e-6, 1e4, 50_001)))
    for w_star in (0.01, 0.6, 3.0, 100.0):
        v, s2 = gamma + w_star**2, posterior_variance(w, alpha, gamma)  # phi by the derivative of joint_fd
        phi = (w / gamma * (v / gamma - 1) + w / gamma + v * w / gamma * (1 + w**2 / gamma)) / (
            v * (w / gamma) ** 2 + 1 / s2 + v * (1 + w**2 / gamma) ** 2)
        lowest, tolerance = w[joint_fd(w, phi, alpha, gamma, w_star).argmin()], 1e-3 * max(w_star, math.sqrt(gamma))
        assert abs(recover("JFD", alpha, gamma, w_star)[0] - lowest) < tolerance, w_star
        assert abs(recover("JKLD", alpha, gamma, w_star)[0] - w_star) < tolerance, w_star


@pytest.mark.parametrize("name, objective", [("S", "swersky"), ("B", "bao")])
def test_plug_in_rules_learn_the_variance_over_kappa_and_meet_the_exact_ones(name, objective):
    for N in (1, 2, 5, 20):
        w, _ = recover(f"held {name}, N = {N}", 0.5, 1.0, 3.0)
        assert 1 + w**2 == pytest.approx(10 / kappa(objective, "plugin", N, 0.5))
    assert np.allclose(recover("held S, N = 1", 0.5, 1.0, CHECKED), recover("held F", 0.5, 1.0, CHECKED))
    assert np.allclose(recover("held S, N = 2", 1.0, 1.0, CHECKED), recover("held B, N = 2", 1.0, 1.0, CHECKED))
