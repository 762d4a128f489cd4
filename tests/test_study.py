"""The table of the study: what is compared with what, and how missing or diverged values are shown."""

import json

import numpy as np
import pytest

from studies.convergence import interval, study_table, table_of_2d_runs, table_of_image_runs
from vsm.cli import UserError
from vsm.names import settings_of
from vsm.runs import save_arrays
from vsm.stored_runs import open_runs


def plane(label="KLD-ELBO", learn="elbo", nll=(1.0, 2.0, 3.0), samples=5, **more):
    flags = {"data": "ring", "learn": learn, "infer": "kld", "estimator": "plugin", "samples": samples, "init_sd": 0.1}
    nll = np.array(nll)
    return {"config": {"label": label, "flags": flags | more, "script": "train_synthetic"}, "nll": nll, "nll_excess": nll - 0.5,
            "excess_curve": np.stack([nll + 4, nll + 3, nll + 2, nll + 0.25, nll]), "nll_curve": np.zeros((5, 3)),
            "posterior_sd": np.tile([[0.1, 0.2], [0.1, 1.0], [1.0, 1.0]], (5, 1, 1)),
            "negative_elbo": np.stack([nll, nll + 0.125]), "fisher_divergence": np.full(3, 7.0),
            "variance_ratio": np.full(3, 0.5), "second_moment": np.array([[1.0, 2.0], [3.0, 9.0], [9.0, 9.0]])}


def cells(table, row):
    return [cell.strip() for cell in table.splitlines()[2 + row].strip("|").split("|")]


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
            plane(nll=(4.0, 5.0, 6.0), init_sd=0.4), plane("KLD-S", "swersky", nll=(6.0, 7.0, 8.5), init_sd=0.4)]
    assert settings_of([run["config"] for run in runs], ("init_sd",)) == ["init sd 0.1"] * 3 + ["init sd 0.4"] * 2
    table = table_of_2d_runs(runs)
    found = {cells(table, i)[1]: cells(table, i)[5] for i in range(5)}
    assert found["KLD-B, N = 1, init sd 0.1"] == "1.000 ± 0.000" and found["KLD-S, N = 5, init sd 0.4"].startswith("2.167 ±")
    assert found["KLD-ELBO, N = 5, init sd 0.4"] == ""


def test_a_run_with_bilevel_steps_is_compared_with_the_elbo_without_them():
    model = {"hidden": 100, "batch": 100, "inner_steps": 5}
    runs = [plane(**model, bilevel_steps=0), plane("KLD-S", "swersky", nll=(2.0, 3.0, 4.0), **model, bilevel_steps=20),
            plane(nll=(0.0, 0.0, 0.0), **model | {"hidden": 30}, bilevel_steps=20)]
    found = {row[1]: row[5] for row in (cells(table_of_2d_runs(runs), i) for i in range(3))}
    assert found["KLD-S, N = 5, hidden 100, bilevel steps 20"] == "1.000 ± 0.000" and list(found.values()).count("") == 2


def test_diverged_members_and_unmeasured_values_leave_no_nan():
    old = plane(nll=(1.0, np.nan, 3.0))
    for key in ("variance_ratio", "second_moment", "fisher_divergence", "nll_excess", "excess_curve"):
        del old[key]
    table = table_of_2d_runs([plane(nll=(1.0, np.nan, 3.0)), old | {"config": plane("KLD-S", "swersky")["config"]}])
    assert "nan" not in table and cells(table, 0)[2] == "2" and cells(table, 1)[8:10] == ["-", "-"]


def image(seed, fid, label="KLD-ELBO", learn="elbo", samples=5, **more):
    flags = {"data": "mnist", "learn": learn, "infer": "kld", "estimator": "plugin", "samples": samples, "seed": seed,
             "net": "conv", "norm": "batch", "init_sd": 0.1, "epochs": 5}
    keys = ("fid", "fid_aggregate", "fid_reconstruction", "negative_elbo", "reconstruction_mse", "latent_mmd", "posterior_fd")
    arrays = {key: np.array([9.0, 9.0, 9.0, 2 * fid, fid]) for key in keys}
    return {"config": {"label": label, "flags": flags | more}, **arrays, "epoch": np.arange(5), "second_moment": np.ones((5, 4)),
            "status": np.array("ok")}


def test_ratios_of_image_runs_are_of_the_same_seed():
    swersky = [image(1, 60.0, "KLD-S", "swersky"), image(0, 20.0, "KLD-S", "swersky")]
    row = cells(table_of_image_runs([image(0, 10.0), image(1, 20.0), *swersky]), 1)
    assert row[:2] == ["KLD-S, N = 5", "2"] and row[5].startswith("2.50 ±") and row[6] == "-50 %"


def test_image_runs_are_grouped_and_compared_within_their_setting_and_samples():
    runs = [image(0, 10.0), image(0, 20.0, norm="none"), image(0, 60.0, "KLD-B", "bao", norm="none"),
            image(0, 40.0, samples=1, norm="none"), image(0, 60.0, "KLD-B", "bao", samples=1, norm="none"),
            image(0, 7.0, "KLD-B", "bao", net="mlp", init_sd=1.0)]
    found = {row[0]: row[5] for row in (cells(table_of_image_runs(runs), i) for i in range(6))}
    assert found["KLD-B, N = 5, conv, norm none, init sd 0.1"] == "3.00"
    assert found["KLD-B, N = 1, conv, norm none, init sd 0.1"] == "1.50"
    assert found["KLD-B, N = 5, mlp, norm batch, init sd 1"] == "-"
    assert found["KLD-ELBO, N = 5, conv, norm batch, init sd 0.1"] == ""


def test_image_runs_without_fid_have_the_change_of_the_negative_elbo():
    pairs = ("KLD-ELBO", "elbo"), ("KLD-S", "swersky")
    celeba = [image(seed, 10.0 + seed, label, learn) for label, learn in pairs for seed in (0, 1)]
    for arrays in celeba:
        for key in ("fid", "fid_aggregate", "fid_reconstruction"):
            del arrays[key]
    table = table_of_image_runs(celeba)
    assert "nan" not in table and "FID" not in table.replace("posterior FD", "")
    header = [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")]
    assert dict(zip(header, cells(table, 1)))["its change in the last quarter"] == "-10.5"
    mixed = table_of_image_runs([*celeba, image(0, 10.0, data="fashion")])
    assert "nan" not in mixed and [cells(mixed, i)[2] for i in range(3)] == ["10.00", "-", "-"]


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
    header = [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")]
    elbo, F, swersky, bao = (dict(zip(header, cells(table, i))) for i in range(4))
    assert [row["n"] for row in (elbo, swersky, bao)] == ["1 (+1 diverged)", "0 (+1 exploded)", "1 (+1 diverged)"]
    assert [row["negative ELBO"] for row in (elbo, swersky, bao)] == ["10.0", "-", "30.0"] and "nan" not in table
    if fid:
        assert [row["FID / KLD-ELBO's"] for row in (bao, F, swersky, elbo)] == ["3.00", "-", "-", ""]


def test_the_change_of_a_run_with_few_evaluations_is_unknown():
    runs = [image(0, 10.0), image(0, 20.0, "KLD-S", "swersky")]
    runs[0].update({key: value[-4:] for key, value in runs[0].items() if key not in ("config", "status")})
    assert [cells(table_of_image_runs(runs), i)[6] for i in range(2)] == ["-", "-50 %"]


def test_a_run_that_has_not_ended_is_named(tmp_path):
    config = {"script": "train_synthetic", "flags": {"data": "ring"}}
    (tmp_path / "ring").mkdir()
    (tmp_path / "ring" / "config.json").write_text(json.dumps(config))
    save_arrays(tmp_path / "ring" / "metrics.npz", config, nll_curve=np.zeros((2, 3)))
    with pytest.raises(UserError, match="ring has not ended"):
        study_table(open_runs([tmp_path / "ring"]))
