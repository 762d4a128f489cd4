"""2-D ensembles: members equal their seeds alone, bi-level gradients equal finite differences, runs resume bit by bit."""

import copy
import gc
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import grad

import plots
import small_runs
import train_synthetic
from models import build_ensemble
from objectives import INFER, LEARN
from small_runs import CPU, edit_arrays, main, run_steps
from studies import tables
from studies.figures.sweep_2d import truth_of
from studies.tables import interval_text
from train_synthetic import EnsembleTrainer, bilevel_loss, kept_step, measure
from training import phi_loss, theta_loss
from vsm.cli import UserError
from vsm.distributions_2d import DISTRIBUTIONS, LEAST_NOISE, distribution
from vsm.runs import Run, load_arrays

SMALL = [*small_runs.SMALL, "--epochs", "2", "--eval-every", "1"]


def arguments(*argv):
    return train_synthetic.parse_args([*SMALL, *map(str, argv)])


def trainer(*argv, steps=0):
    return run_steps(EnsembleTrainer(arguments(*argv), CPU), steps)


def train(out, *argv, **options):
    main(train_synthetic, *SMALL, "--out", out, *argv, **options)
    return load_arrays(out / "metrics.npz")


def test_noise_is_in_the_data_and_in_the_truth_and_its_score_goes_to_the_objective(tmp_path, monkeypatch):
    made, seen, sd = trainer("--learn", "dsm", "--noise", 0.3, "--data", "banana"), [], 0.3
    monkeypatch.setattr(train_synthetic, "theta_loss", lambda vae, x, *_, t, **options: (
        seen.append((x, t)), theta_loss(vae, x, *_, t=t, **options))[1])
    made.run_step()
    (x, t), = seen
    assert torch.allclose(t, -(x - DISTRIBUTIONS["banana"].transform(made.data_noise[..., :2])) / sd**2, rtol=1e-4, atol=1e-4)
    counts = []
    monkeypatch.setattr(train_synthetic, "measure", lambda trainer, test, count, log_density: (
        counts.append(count), measure(trainer, test, count, log_density))[1])
    arrays = train(tmp_path / "run", "--learn", "dsm", "--noise", sd, "--data", "banana", "--test-size", 400)
    assert counts == 3 * [25]  # a quarter of --importance-samples
    points = torch.tensor(arrays["test_data"]).double()
    assert torch.allclose(points.var(0), torch.tensor([0.25, 0.135]).double() + sd**2, rtol=0.25)  # 2 (.25)^2 + .1^2 = .135
    truth = distribution("banana", sd).log_prob(points).mean().item()
    assert arrays["nll_excess"] == pytest.approx(arrays["nll"] + truth, abs=1e-6)
    assert "noise0.3" in arguments("--learn", "dsm", "--noise", sd).out


def test_one_members_nan_neither_stops_nor_touches_the_others():
    healthy, ill = trainer("--seeds", 3, steps=5), trainer("--seeds", 3, steps=2)
    ill.vae.log_gamma.data[1] = torch.nan
    run_steps(ill, 3)
    assert (ill.diverged_at < ill.clock).tolist() == [False, True, False] and ill.diverged_at[1] == 2
    for mine, theirs in zip(ill.vae.parameters(), healthy.vae.parameters()):
        assert torch.equal(mine[[0, 2]], theirs[[0, 2]])


def test_one_diverged_member_is_a_result_and_ends_nothing(tmp_path, monkeypatch):
    run_step = EnsembleTrainer.run_step

    def ill_at_three(self):
        if self.step == 3:
            self.vae.log_gamma.data[1] = torch.nan
        run_step(self)
    monkeypatch.setattr(EnsembleTrainer, "run_step", ill_at_three)
    arrays = train(tmp_path / "some", "--seeds", 3)
    assert arrays["status"] == "ok" and arrays["epoch"].tolist() == [0, 1, 2]
    assert "nan" not in (tmp_path / "some" / "log.csv").read_text().splitlines()[-1]  # means of the members that are alive
    assert arrays["diverged_at"].tolist() == [-1, 3, -1] and arrays["member_status"].tolist() == ["ok", "diverged@3", "ok"]
    for name in ("nll", "nll_se", "sm_loss", "fisher_divergence"):
        assert np.isfinite(arrays[name]).tolist() == [True, False, True], name


def test_divergence_is_a_result(tmp_path):
    arrays = train(tmp_path / "all", "--learn", "elbo", "--inner-lr", 1e6)
    assert str(arrays["status"]) == f"diverged@{arrays['diverged_at'].max()}"
    assert [str(status) for status in arrays["member_status"]] == [f"diverged@{step}" for step in arrays["diverged_at"]]
    assert np.isnan(arrays["nll"]).all()


def small_ensemble():
    torch.manual_seed(0)
    vae = build_ensemble(2, 2, 5, [0, 1]).double()
    for p in vae.parameters():
        p.data += 0.4 * torch.randn_like(p)
    vae.log_gamma.data.fill_(0.2)
    return vae, torch.randn(2, 6, 2).double(), torch.randn(3, 3, 2, 6, 2).double()  # x [S, B, 2], noise [J + 1, N, S, B, Dz]


def plainly(vae, x, noise, learn, infer, lr):
    """The learning loss after ordinary encoder steps: a number, and nothing kept."""
    vae = copy.deepcopy(vae)
    phi = list(vae.encoder.parameters())
    for eps in noise[:-1]:
        for p, gradient in zip(phi, grad(phi_loss(vae, x.clone(), infer, eps).mean(-1).sum(), phi)):
            p.data -= lr * gradient
    x = x.clone().requires_grad_()
    q = vae.encode(x)
    return LEARN[learn](vae, x, q, vae.sample(q, noise[-1])).mean(-1).sum().item()


@pytest.mark.parametrize("J", [1, 2])
@pytest.mark.parametrize("infer", INFER)
@pytest.mark.parametrize("learn", ["bao", "swersky", "elbo"])
def test_the_gradient_through_phi_equals_finite_differences_of_the_whole_procedure(learn, infer, J):
    vae, x, noise = small_ensemble()
    noise, lr, theta = noise[-J - 1:], 0.03, [*vae.decoder.parameters(), vae.log_gamma]
    phi = dict(vae.encoder.named_parameters())
    for eps in noise[:-1]:
        phi = kept_step(vae, phi, x, infer, eps, lr)
    loss = bilevel_loss(vae, phi, x, learn, noise[-1]).mean(-1).sum()
    assert abs(loss.item() - plainly(vae, x, noise, learn, infer, lr)) < 1e-9 * abs(loss.item())

    direction = [torch.randn_like(p) for p in theta]
    slope = sum((g * d).sum() for g, d in zip(grad(loss, theta), direction)).item()
    h, values = 1e-6, []
    for sign in (1, -1):
        moved = copy.deepcopy(vae)
        for p, d in zip([*moved.decoder.parameters(), moved.log_gamma], direction):
            p.data += sign * h * d
        values.append(plainly(moved, x, noise, learn, infer, lr))
    assert abs(slope - (values[0] - values[1]) / (2 * h)) < 1e-5 * abs(slope)


@pytest.mark.slow
def test_unrolling_keeps_no_graph_from_one_update_to_the_next():
    made, counts = trainer("--learn", "bao", "--infer", "fd", "--bilevel-steps", 3), []
    for _ in range(3):
        made.run_step()
        gc.collect()
        counts.append(sum(torch.is_tensor(thing) for thing in gc.get_objects()))
    assert counts[1] == counts[-1] and all(p.is_leaf and p.grad is None for p in made.phi)


def test_a_run_leaves_its_documented_files_and_arrays(tmp_path):
    arrays = train(tmp_path / "run", pictures=True)
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        ".lock", "config.json", "checkpoint.pt", "metrics.npz", "log.csv", "samples.png"}
    shapes = {name: value.shape for name, value in arrays.items() if name != "config"}
    members = ("nll", "nll_se", "nll_posterior", "nll_posterior_se", "sm_loss", "sm_loss_se", "fisher_divergence",
               "fisher_divergence_se", "nll_excess", "nll_excess_se", "sm_excess", "sm_excess_se", "diverged_at", "member_status")
    history = ("negative_elbo", "posterior_fd", "log_gamma", "infer_loss", "learn_loss", "nll_curve", "excess_curve")
    assert shapes == {**dict.fromkeys(members, (2,)), **dict.fromkeys(history, (3, 2)), "posterior_sd": (3, 2, 2), "ess": (2, 3),
                      "model_samples": (2, 1000, 2), "test_data": (30, 2), "epoch": (3,), "seconds": (3,),
                      "peak_memory": (3,), "status": (), "variance_ratio": (2,), "second_moment": (2, 2)}
    assert arrays["config"]["label"] == "KLD-F" and arrays["epoch"].tolist() == [0, 1, 2] and arrays["status"] == "ok"
    assert (arrays["nll_excess"] > 0).all() and (arrays["fisher_divergence"] > 0).all()
    assert (arrays["negative_elbo"][-1] > arrays["nll"] - 0.5).all()
    assert {"nll_excess", "nll_excess_se", "sm_excess", "sm_excess_se"} <= train(tmp_path / "sparse", "--data", "sparse").keys()


def test_the_moments_are_those_of_samples():
    vae, law = trainer("--seeds", "2", steps=30).vae, DISTRIBUTIONS["mixture"]
    x = law.sample(2000, torch.Generator().manual_seed(1)).expand(2, -1, -1)
    moments = train_synthetic.moments(vae, law, x)
    with torch.no_grad():
        q, z = vae.encode(x), torch.randn(2, 100_000, 2)
        samples = vae.decode(z) + (vae.log_gamma / 2).exp()[:, None, None] * torch.randn(2, 100_000, 2)
        latents = q.mean + q.stddev * torch.randn(50, *q.mean.shape)
    assert torch.allclose(moments["variance_ratio"], samples.var(1).sum(-1) / 0.58, rtol=0.03)  # of each coordinate: .5^2 + .2^2
    assert torch.allclose(moments["second_moment"], (latents**2).mean((0, 2)), rtol=0.03)
    log_density = law.log_prob(x[0].double())
    row = measure(SimpleNamespace(vae=vae), x[0], 10, log_density)
    assert torch.allclose(row["excess_curve"] - row["nll_curve"], log_density[:500].mean())  # both of the first 500 points


QUICK = ["--test-size", 10, "--importance-samples", 20]
@pytest.mark.slow
def test_figures_are_redrawn_from_the_arrays(tmp_path, fails):
    runs = []
    for words in ("--learn elbo", "--learn bao", "--learn bao --estimator released", "--bilevel-steps 1"):
        for K in (1, 2):
            runs.append(tmp_path / f"run{len(runs)}")
            train(runs[-1], *words.split(), "--inner-steps", K, *QUICK)
    for figure in ("synthetic", "synthetic_samples"):
        main(plots, figure, *runs, "--save", tmp_path / f"{figure}.png", pictures=True)
        assert (tmp_path / f"{figure}.png").stat().st_size > 10_000
    main(tables, *runs, "--save", tmp_path / "synthetic.md")
    rows = [line.split(" | ") for line in (tmp_path / "synthetic.md").read_text().splitlines()[2:]]
    nll = [load_arrays(run / "metrics.npz")["nll"] for run in runs]
    for K in (1, 2):  # the ELBO of the same K
        (row,) = [row for row in rows if row[1] == f"KLD-B released, N = 1, inner steps {K}, bilevel steps 0"]
        assert row[5] == interval_text(nll[3 + K] - nll[K - 1])
    train(tmp_path / "wider", "--hidden", 7, *QUICK)
    assert "the runs of mixture differ in hidden" in fails(plots, "synthetic", runs[0], tmp_path / "wider")


def test_sparse_is_what_the_design_says():
    u = torch.randn(7, 4)
    expected = (u[:, :2].sign() * u[:, :2] ** 2) @ torch.tensor([[0.1, 0.03], [-0.03, 0.1]]) + 0.01 * u[:, 2:]
    assert torch.allclose(DISTRIBUTIONS["sparse"].transform(u), expected)


@pytest.mark.parametrize("flags, words", [(["--seeds", 3], "with other flags"), (["--hidden", 7], "with other flags")])
def test_a_checkpoint_of_another_model_is_refused(tmp_path, fails, flags, words):
    mine, other = tmp_path / "mine", tmp_path / "other"
    train(mine)
    train(other, *flags)
    (mine / "metrics.npz").unlink()
    shutil.copy(other / "checkpoint.pt", mine)
    assert words in fails(train_synthetic, *SMALL, "--out", mine)
    saved = torch.load(mine / "checkpoint.pt", weights_only=True)
    saved["identity"] = Run(mine, "train_synthetic", vars(arguments("--out", mine)), CPU).identity()
    torch.save(saved, mine / "checkpoint.pt")
    assert "not of what these flags train" in fails(train_synthetic, *SMALL, "--out", mine)
    torch.save({"weight": torch.ones(3)}, mine / "checkpoint.pt")
    assert "is not a checkpoint of this script" in fails(train_synthetic, *SMALL, "--out", mine)


def test_members_are_told_apart_by_the_latents_they_use(tmp_path, fails):
    run = tmp_path / "run"
    sd = train(run)["posterior_sd"]
    sd[-1] = 0.1
    sd[-1, 0], sd[-1, 1, 0] = 0.95, 0.95
    edit_arrays(run / "metrics.npz", posterior_sd=sd)
    main(tables, run, "--save", run / "synthetic.md")
    assert " 1, 1 |" in (run / "synthetic.md").read_text()
    twin = shutil.copytree(run, tmp_path / "twin")
    assert f"{run} and {twin} are the same experiment with the same seed 0" in fails(plots, "synthetic", run, twin)


def test_the_truth_of_a_sweep_has_the_noise_of_its_data():
    points = distribution("mixture", 0.1).sample(500, torch.Generator().manual_seed(0)).float()
    for noise in (0, 0.1):
        config = {"flags": {"data": "mixture", "noise": noise}}
        assert truth_of({"config": config, "test_data": points.numpy()})[0] == pytest.approx(
            -distribution("mixture", noise).log_prob(points.double()).mean().item())


def test_noise_that_the_integrals_of_the_density_do_not_resolve_is_refused():
    x = distribution("banana").sample(200, torch.Generator().manual_seed(0))
    clean, noisy = (distribution("banana", sd).log_prob(x).mean().item() for sd in (0, LEAST_NOISE))
    assert noisy == pytest.approx(clean, abs=0.01)
    with pytest.raises(UserError, match="--noise 0.001 is too small"):
        distribution("banana", 0.001)
