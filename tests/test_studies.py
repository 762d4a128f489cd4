"""The studies: their tables, the gradient's signal-to-noise ratio and the scale of the latents of trained models, and spectra."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import load_images
from small_runs import edit_arrays, main
from studies import gradient_snr, latent_scale, spectrum
from studies.gradient_snr import differentiable_decoder, gradient_moments
from studies.latent_scale import measure_latent_scale
from studies.tables import (
    before_the_last_quarter,
    final,
    interval,
    latent_scale_of,
    mixture_of,
    network_notes,
    study_table,
    table_of_2d_runs,
    table_of_image_runs,
)
from test_evaluate import train
from training import EVALUATION, seed_of
from vsm.cli import UserError
from vsm.linear import linear_vae, set_posterior
from vsm.loading import load_vae
from vsm.names import settings_of
from vsm.runs import load_arrays, load_config, save_arrays
from vsm.stored_runs import StoredRun, measured_by, open_runs


def plane(label="KLD-ELBO", learn="elbo", nll=(1.0, 2.0, 3.0), samples=5, **more):
    flags = {"data": "ring", "learn": learn, "infer": "kld", "estimator": "plugin", "samples": samples, "init_sd": 0.1}
    nll = np.array(nll)
    return {"config": {"label": label, "flags": flags | more, "script": "train_synthetic"}, "nll": nll, "nll_excess": nll - 0.5,
            "excess_curve": np.stack([nll + 4, nll + 3, nll + 2, nll + 0.25, nll]), "nll_curve": np.zeros((5, 3)),
            "posterior_sd": np.tile([[0.1, 0.2], [0.1, 1.0], [1.0, 1.0]], (5, 1, 1)),
            "negative_elbo": np.stack([nll, nll + 0.125]), "fisher_divergence": np.full(3, 7.0),
            "variance_ratio": np.full(3, 0.5), "second_moment": np.array([[1.0, 2.0], [3.0, 9.0], [9.0, 9.0]])}


def cells(table, row):
    """The cells of a row of a table; row -2 is its header."""
    return [cell.strip() for cell in table.splitlines()[2 + row].strip("|").split("|")]


def row_of(table, row):
    return dict(zip(cells(table, -2), cells(table, row)))


def test_the_interval_is_students_over_the_finite_values():
    mean, half = interval([1.0, 2.0, 3.0, np.nan])
    assert mean == 2 and half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert interval([1.0, np.inf])[0] == 1 and np.isnan(interval([1.0])[1]) and np.isnan(interval([])[0])


def test_a_row_of_the_2d_table():
    row = cells(table_of_2d_runs([plane(), plane("KLD-B", "bao", nll=(1.5, 2.5, 3.5))]), 1)
    assert row == ["ring", "KLD-B, N = 5", "3", "2.000 ± 2.484", "2.000", "0.500 ± 0.000", "-0.250", "1, 1", "0.500 ± 0.000",
                   "2.00 ± 2.48", "0.125 ± 0.000", "7"]


def test_a_run_is_compared_with_the_elbo_of_the_same_seeds_settings_and_samples():
    runs = [plane(), plane(nll=(2.0, 3.0, 4.0), samples=1), plane("KLD-B", "bao", nll=(3.0, 4.0, 5.0), samples=1),
            plane("KLD-B", "bao", nll=(3.5, 4.5, 5.5)), plane(nll=(4.0, 5.0, 6.0), init_sd=0.4),
            plane("KLD-S", "swersky", nll=(6.0, 7.0, 8.5), init_sd=0.4)]
    assert settings_of([run["config"] for run in runs], ("init_sd",)) == ["init-sd 0.1"] * 4 + ["init-sd 0.4"] * 2
    assert settings_of([image(0, 1.0, lr_half_life=half)["config"] for half in (None, 2.0)], ("lr_half_life",)) == [
        "", "lr-half-life 2"]
    found = {row[1]: row[5] for row in (cells(table_of_2d_runs(runs), i) for i in range(6))}
    assert found["KLD-B, N = 1, init-sd 0.1"] == "1.000 ± 0.000" and found["KLD-B, N = 5, init-sd 0.1"] == "2.500 ± 0.000"
    assert found["KLD-S, N = 5, init-sd 0.4"].startswith("2.167 ±")
    assert found["KLD-ELBO, N = 5, init-sd 0.4"] == ""


def test_differences_are_of_members_of_the_same_seed_and_data():
    runs = [plane(nll=(1.0, 2.0), seed=0), plane(nll=(3.0, 5.0), seed=2), plane(nll=(50.0, 60.0), seed=0, noise=0.5),
            plane("KLD-B", "bao", nll=(2.5, 3.5, 6.0), seed=1)]
    found = {row[1]: row[5] for row in (cells(table_of_2d_runs(runs), i) for i in range(4))}
    assert found["KLD-B, N = 5"].startswith("0.667 ±") and set(found.values()) == {"", found["KLD-B, N = 5"]}


def test_a_run_with_bilevel_steps_is_compared_with_the_elbo_without_them():
    model = {"hidden": 100, "batch": 100, "inner_steps": 5}
    runs = [plane(**model, bilevel_steps=0), plane("KLD-S", "swersky", nll=(2.0, 3.0, 4.0), **model, bilevel_steps=20),
            plane(nll=(0.0, 0.0, 0.0), **model | {"hidden": 30}, bilevel_steps=20)]
    found = {row[1]: row[5] for row in (cells(table_of_2d_runs(runs), i) for i in range(3))}
    assert found["KLD-S, N = 5, hidden 100, bilevel-steps 20"] == "1.000 ± 0.000" and list(found.values()).count("") == 2


def test_runs_from_before_a_flag_was_there_are_in_one_table_with_those_that_have_it():
    table = table_of_2d_runs([plane(gamma="learned"), plane("KLD-S", "swersky")])
    assert {cells(table, i)[1].split(",")[0] for i in range(2)} == {"KLD-ELBO", "KLD-S"}


def test_diverged_members_and_unmeasured_values_leave_no_nan():
    old = plane(nll=(1.0, np.nan, 3.0))
    for key in ("variance_ratio", "second_moment", "fisher_divergence", "nll_excess", "excess_curve", "nll_curve"):
        del old[key]
    table = table_of_2d_runs([plane(nll=(1.0, np.nan, 3.0)), old | {"config": plane("KLD-S", "swersky")["config"]}])
    assert "nan" not in table and cells(table, 0)[2] == "2" and cells(table, 1)[8:10] == ["-", "-"]


def image(seed, fid, label="KLD-ELBO", learn="elbo", samples=5, **more):
    flags = {"data": "mnist", "learn": learn, "infer": "kld", "estimator": "plugin", "samples": samples, "seed": seed,
             "net": "conv", "norm": "batch", "init_sd": 0.1, "epochs": 5}
    keys = ("fid", "fid_aggregate", "fid_reconstruction", "negative_elbo", "reconstruction_mse", "latent_mmd", "posterior_fd")
    arrays = {key: np.array([9.0, 9.0, 9.0, 2 * fid, fid]) for key in keys}
    return {"config": {"label": label, "flags": flags | more}, **arrays, "epoch": np.arange(5), "second_moment": np.ones((5, 4)),
            "status": np.array("ok"), "run": f"run{seed}"}


def test_every_column_of_the_image_table_is_of_its_own_array():
    run, titles = image(0, 10.0, "KLD-F", "fd"), {
        "fid": "FID", "fid_aggregate": "FID, aggregate posterior", "fid_reconstruction": "FID, reconstructions",
        "second_moment": "E z^2", "training_moment": "E z^2, training images", "predicted_moment": "its end by equation (6)",
        "negative_elbo": "negative ELBO", "latent_mmd": "latent MMD^2", "posterior_fd": "posterior FD"}
    measured = StoredRun("run", None, {"latent_scale": {"second_moment": 34.0, "predicted_moment": 35.0}}.get, ["latent_scale"])
    run |= {key: np.append(np.full(4, 9.0), 30 + i) for i, key in enumerate(titles)} | latent_scale_of(measured)
    row = row_of(table_of_image_runs([run | {"reconstruction_mse": np.full(5, 0.25)}]), 0)
    assert [float(row[title]) for title in titles.values()] == list(range(30, 39)) and row["MSE x 100"] == "25.00"


def test_ratios_of_image_runs_are_of_the_same_seed():
    swersky = [image(1, 60.0, "KLD-S", "swersky"), image(0, 20.0, "KLD-S", "swersky")]
    row = row_of(table_of_image_runs([image(0, 10.0), image(1, 20.0), *swersky]), 1)
    assert (row["data"], row["net"], row["objectives"], row["n"]) == ("mnist", "conv", "KLD-S", "2") and "settings" not in row
    assert row["FID / KLD-ELBO's"].startswith("2.50 ±") and row["change in the last quarter"] == "-50 %"
    with pytest.raises(UserError, match="run0 and run0 are the same experiment with the same seed 0"):
        table_of_image_runs([image(0, 10.0), image(0, 10.0)])


def test_the_fid_by_a_mixture_has_ratios_of_its_own():
    runs = [image(seed, 10.0, label, learn, one_pass=True) | {"fid_mixture": np.array(value)} for seed, label, learn, value in (
        (0, "KLD-ELBO", "elbo", 2.0), (1, "KLD-ELBO", "elbo", 4.0), (0, "KLD-S", "swersky", 3.0), (1, "KLD-S", "swersky", 6.0))]
    table = table_of_image_runs([*runs, image(0, 8.0, one_pass=False)])
    elbo, swersky, two_passes = (row_of(table, i) for i in range(3))
    assert swersky["the same / KLD-ELBO's"] == "1.50 ± 0.00" and swersky["FID / KLD-ELBO's"] == "1.00 ± 0.00"
    assert elbo["FID, mixture"].startswith("3.00 ±") and two_passes["FID, mixture"] == "-"
    assert (swersky["settings"], two_passes["settings"]) == ("", "without one-pass")


def test_the_fids_of_an_evaluation_are_those_at_the_end():
    evaluation = {"fid_mixture": 5.0, "fid": 9.0, "fid_aggregate": 4.0, "fid_reconstruction": 3.0, "config": {"evaluation": {}}}

    def measured(**curves):
        return curves | mixture_of(SimpleNamespace(has=lambda part: True, arrays=lambda part="metrics": {
            "metrics": curves, "eval": evaluation}[part]))

    curve = {"fid": np.array([8.0, 7.0]), "fid_aggregate": np.array([2.0, 1.0])}
    assert [final(measured(**curve), key) for key in ("fid", "fid_aggregate", "fid_mixture")] == [9, 1, 5]
    assert final(curve, "fid") == 7
    run = image(0, 10.0)
    for key in ("fid", "fid_aggregate", "fid_reconstruction"):  # a run without --fid-every
        del run[key]
    row = row_of(table_of_image_runs([run | measured()]), 0)
    assert [row[key] for key in ("FID", "FID, aggregate posterior", "FID, reconstructions", "FID, mixture")] == [
        "9.00", "4.00", "3.00", "5.00"]
    assert row["its change in the last quarter"] == "-10.0"


def test_fids_that_were_measured_otherwise_are_refused_or_noted():
    runs = [image(seed, 10.0) | {"measured_by": measured_by({"fits": fits})} for seed, fits in ((0, 1), (1, 5))]
    with pytest.raises(UserError, match="run0 and run1 were evaluated with other fits; evaluate.py"):
        table_of_image_runs(runs)
    runs = [image(0, 10.0), image(1, 10.0) | {"fid_features": np.array("LeNet-5 on mnist ab")}, image(2, 10.0, data="fashion")]
    (note,) = network_notes(runs)
    assert note == ("FID on mnist is by a network that was not recorded (runs: 1) and by LeNet-5 on mnist ab (runs: 1), so rows "
                    "may differ by it.")


def test_a_cell_of_fewer_values_than_the_row_has_runs_says_so():
    runs = [image(seed, 10.0) | {"predicted_moment": np.array(1.0 if seed else np.nan)} for seed in (0, 1, 2)]
    row = row_of(table_of_image_runs(runs), 0)
    assert row["n"] == "3" and row["its end by equation (6)"] == "1.00 ± 0.00 (n = 2)" and "n =" not in row["FID"]


def test_the_change_at_the_end_is_of_a_quarter_of_training_or_one_evaluation():
    ends = [float(before_the_last_quarter(np.arange(n + 1.0))) for n in (1, 2, 3, 4, 8, 9)]
    assert np.isnan(ends[0]) and ends[1:] == [1, 2, 3, 6, 7]


def test_what_was_measured_before_training_went_on_is_refused():
    parts = {"metrics": {"status": "ok"}, "eval": {"config": {"flags": {"epochs": 1}}, "status": "ok"}, "latent_scale": {},
             "gradient_snr": {"config": {"flags": {"epochs": 3}}, "status": "unfinished@2"}}
    run = StoredRun("run", lambda: {"flags": {"epochs": 3}}, parts.get, list(parts))
    for part in ("eval", "gradient_snr"):
        with pytest.raises(UserError, match=f"run was trained further after its {part}.npz was measured; measure it again"):
            run.arrays(part)
    assert run.arrays("latent_scale") == {} and run.arrays() == {"status": "ok"}


def test_image_runs_are_grouped_and_compared_within_their_setting_and_samples():
    runs = [image(0, 10.0), image(0, 20.0, norm="none"), image(0, 60.0, "KLD-B", "bao", norm="none"),
            image(0, 40.0, samples=1, norm="none"), image(0, 60.0, "KLD-B", "bao", samples=1, norm="none"),
            image(0, 7.0, "KLD-B", "bao", net="mlp", init_sd=1.0)]
    rows = [row_of(table_of_image_runs(runs), i) for i in range(6)]
    found = {(row["net"], row["objectives"], row["settings"]): row["FID / KLD-ELBO's"] for row in rows}
    assert found["conv", "KLD-B, N = 5", ""] == "3.00" and found["conv", "KLD-B, N = 1", ""] == "1.50"
    assert found["mlp", "KLD-B, N = 5", ""] == "-" and found["conv", "KLD-ELBO, N = 5", "norm batch"] == ""


def test_image_runs_without_fid_have_the_change_of_the_negative_elbo():
    pairs = ("KLD-ELBO", "elbo"), ("KLD-S", "swersky")
    celeba = [image(seed, 10.0 + seed, label, learn) for label, learn in pairs for seed in (0, 1)]
    for arrays in celeba:
        for key in ("fid", "fid_aggregate", "fid_reconstruction"):
            del arrays[key]
    table = table_of_image_runs(celeba)
    assert "nan" not in table and "FID" not in table.replace("posterior FD", "")
    assert row_of(table, 1)["its change in the last quarter"] == "-10.5"
    mixed = table_of_image_runs([*celeba, image(0, 10.0, data="fashion")])
    assert "nan" not in mixed and [row_of(mixed, i)["FID"] for i in range(3)] == ["10.00", "-", "-"]


@pytest.mark.parametrize("fid", [True, False])
def test_a_failed_image_run_is_counted_and_in_no_mean(fid):
    runs = [image(0, 10.0), image(1, 12.0), image(1, 90.0, "KLD-B", "bao"), image(0, 30.0, "KLD-B", "bao"),
            image(0, 80.0, "KLD-S", "swersky"), image(1, 24.0, "KLD-F", "fd")]
    for lost in (runs[1], runs[2], runs[4]):
        lost["status"] = np.array("diverged@7")
    runs[4]["status"] = np.array("exploded@9")
    for run in runs if not fid else []:
        del run["fid"]
    table = table_of_image_runs(runs)
    elbo, F, swersky, bao = (row_of(table, i) for i in range(4))
    assert [row["n"] for row in (elbo, swersky, bao)] == ["1 (+1 diverged)", "0 (+1 exploded)", "1 (+1 diverged)"]
    assert [row["negative ELBO"] for row in (elbo, swersky, bao)] == ["10.0", "-", "30.0"] and "nan" not in table
    if fid:
        assert [row["FID / KLD-ELBO's"] for row in (bao, F, swersky, elbo)] == ["3.00", "-", "-", ""]


def test_the_change_of_a_run_with_few_evaluations_is_unknown():
    runs = [image(0, 10.0), image(0, 20.0, "KLD-S", "swersky")]
    runs[0].update({key: value[-2:] for key, value in runs[0].items() if key not in ("config", "status")})
    assert [row_of(table_of_image_runs(runs), i)["change in the last quarter"] for i in range(2)] == ["-", "-50 %"]


def test_the_change_is_between_epochs_at_which_fid_was_due():
    run = image(0, 10.0) | {"fid": np.array([40.0, np.nan, 20.0, np.nan, 10.0])}
    assert row_of(table_of_image_runs([run]), 0)["change in the last quarter"] == "-50 %"


def test_a_run_that_has_not_ended_is_named(tmp_path):
    config = {"script": "train_synthetic", "flags": {"data": "ring"}}
    save_arrays(tmp_path / "ring" / "metrics.npz", config, nll_curve=np.zeros((2, 3)))
    (tmp_path / "ring" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="ring has not ended"):
        study_table(open_runs([tmp_path / "ring"]))


SCALES = [("elbo", "plugin", 0), ("swersky", "plugin", 0.8), ("swersky", "unbiased", 1), ("bao", "plugin", 0.2),
          ("bao", "unbiased", 0)]


@pytest.mark.parametrize("learn, estimator, excess", SCALES)
def test_the_scale_of_a_linear_vae_is_that_of_the_contraction(learn, estimator, excess):
    W = torch.linalg.qr(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))[0] * torch.tensor([0.8, 0.4])
    vae = linear_vae(W, gamma := 0.05, (1, 4, 4))
    set_posterior(vae)
    active = (W.square().sum(0) / (W.square().sum(0) + gamma)).mean().item()  # trace(Cov_q g) / gamma and div_x E_q g, over Dz
    images = torch.randint(0, 256, (200, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    flags = {"learn": learn, "infer": "kld", "estimator": estimator, "samples": 5, "batch": 50, "noise": 0.1, "seed": 0}
    measured = measure_latent_scale(vae, images, flags)
    assert abs(measured["predicted_moment"] - 1 - excess * active) <= 4 * measured["predicted_moment_se"] <= 0.1
    assert measured["divergence_slope"] == pytest.approx(2 * active, abs=4 * measured["divergence_slope_se"])
    assert math.isnan(measure_latent_scale(vae, images, flags | {"infer": "fd"})["predicted_moment"])


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained") / "a", "--data-root", digits)


@pytest.fixture
def half(trained, tmp_path):
    edit_arrays(shutil.copytree(trained, tmp_path / "half") / "metrics.npz", status=None)
    return tmp_path / "half"


def test_gradient_snr(trained, half, monkeypatch, tmp_path, fails):
    monkeypatch.setattr("studies.gradient_snr.SAMPLES", (1, 2))
    assert "at least 2" in fails(gradient_snr, trained, "--draws", "1")
    measured, measure = [], gradient_snr.measure_gradient_snr
    monkeypatch.setattr(gradient_snr, "measure_gradient_snr", lambda *args: (measured.append(args[3]), measure(*args))[1])
    main(gradient_snr, trained, "--draws", 2, "--device", "cpu")
    arrays = load_arrays(trained / "gradient_snr.npz")
    names = ["ELBO", "F", "S plugin", "S unbiased", "B plugin", "B unbiased", "B released", "DSM plugin", "DSM unbiased", "FAE"]
    assert arrays["objectives"].tolist() == names and arrays["samples"].tolist() == [1, 2]
    assert [name for name, snr in zip(names, arrays["snr"]) if np.isnan(snr[0])] == ["S unbiased", "B unbiased", "DSM unbiased"]
    assert np.isfinite(arrays["snr"][:, 1:]).all() and (trained / "gradient_snr.png").exists()
    main(gradient_snr, half, "--draws", 3, "--device", "cpu")
    assert measured == [2, 3]
    unfinished = load_arrays(half / "gradient_snr.npz")
    assert unfinished["status"] == "unfinished@8" and unfinished["config"]["evaluation"] == {"draws": 3}
    assert np.isfinite(unfinished["snr_se"][:, 1:]).all() and (unfinished["snr_se"][:, 1:] > 0).all()


def test_latent_scale(trained, half, capsys, monkeypatch):
    monkeypatch.setattr("studies.latent_scale.MINIBATCHES", 3)
    main(latent_scale, trained, half, "--device", "cpu")
    out = capsys.readouterr().out
    for run in (trained, half):
        arrays = load_arrays(run / "latent_scale.npz")
        assert f"the mean E z^2 is {arrays['second_moment']:.3g}; where" in out and arrays["second_moment"] > 0
        assert arrays["variance_slope"] == pytest.approx(0, abs=1e-2)  # batch norm: the decoder does not feel the scale
    assert arrays["config"]["evaluation"] == {"minibatches": 3, "samples": 16} and arrays["status"] == "unfinished@8"


def test_the_gradients_mode_couples_data_and_leaves_the_model_as_it_was(trained, digits, monkeypatch):
    vae, images = load_vae(trained), load_images("mnist", digits).train
    before, found = {name: value.clone() for name, value in vae.state_dict().items()}, {}
    for mode in ("eval", "train"):
        flags, generator = load_config(trained)["flags"], torch.Generator().manual_seed(0)
        found[mode] = gradient_moments(differentiable_decoder(vae, mode), images, flags, "fd", "plugin", 2, 3, generator).mean
    assert not torch.allclose(found["eval"], found["train"], rtol=0.01)
    monkeypatch.setattr(gradient_snr, "SAMPLES", (2,))  # the published ratios are those of evaluation mode
    norms = gradient_snr.measure_gradient_snr(vae, images, flags, 3)["gradient_norm"]
    generator = torch.Generator().manual_seed(seed_of(flags["seed"], EVALUATION, 1, 2))
    signal = gradient_moments(differentiable_decoder(vae, "eval"), images, flags, "fd", "plugin", 2, 3, generator).signal[0]
    assert norms[1, 0] == pytest.approx(signal.sqrt().item(), rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())


def test_the_spectra_of_images(tmp_path, capsys, digits, monkeypatch):
    monkeypatch.setattr(spectrum, "EXPECTED_UPDATES", 250)
    monkeypatch.setattr(spectrum, "OBJECTIVES", (("swersky", "plugin"), ("dsm", "unbiased")))
    monkeypatch.setattr(spectrum, "NOISE", 1.0)
    argv = ["mnist", "--data-root", digits, "--limit", 100, "--latents", 4, "--iterations", 30, "--batch", 8, "--out",
            tmp_path / "run"]
    main(spectrum, *argv)
    arrays = load_arrays(tmp_path / "run" / "metrics.npz")
    assert arrays["status"] == "ok"
    assert arrays["learnt"].shape == arrays["expected"].shape == arrays["second_moment"].shape == (7, 4)
    pixels = load_images("mnist", digits).train[:100].flatten(1) / 255
    eigenvalues = torch.linalg.eigvalsh(pixels.T.cov(correction=0).double()).flip(0)[:4].numpy()
    assert arrays["eigenvalues"][:4] == pytest.approx(eigenvalues, rel=1e-4)
    variances = (eigenvalues + arrays["noise"][:, None] ** 2) / arrays["kappa"][:, None]
    assert np.abs(arrays["expected"] / np.maximum(variances, arrays["gamma"]) - 1).max() < 0.02
    assert (tmp_path / "run" / "spectrum.png").exists() and "largest error" in capsys.readouterr().out
    main(spectrum, *argv)
    assert "finished before" in capsys.readouterr().out


def test_the_second_moment_counts_the_noise_in_the_data_of_dsm(monkeypatch):
    monkeypatch.setattr(spectrum, "trained_weights", lambda pixels, start, *_: start)
    C, W, args = 2 * torch.eye(2).double(), torch.eye(2)[:, :1].double(), SimpleNamespace(gamma=1.0, latents=1)
    for objective, variance in (("swersky", 2), ("dsm", 2 + spectrum.NOISE**2)):  # q(z|x) = N(x_1 / 2, 1 / 2)
        row = spectrum.train_one_model(None, C, W, args, objective, "plugin", 5)
        assert row["second_moment"] == pytest.approx(variance / 4 + 1 / 2) and row["learnt"] == pytest.approx(2)


def test_a_diverged_spectrum_says_so(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(spectrum, "EXPECTED_UPDATES", 1)
    monkeypatch.setattr(spectrum, "OBJECTIVES", (("fd", "plugin"),))
    main(spectrum, "mnist", "--data-root", digits, "--latents", 2, "--iterations", 9, "--batch", 8, "--lr", 1e30,
         "--out", tmp_path / "run")
    assert load_arrays(tmp_path / "run" / "metrics.npz")["status"] == "diverged@9"
