"""evaluate.py as its user meets it: what it writes, what it leaves out, and that it measures the models that were trained."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import plots
import train_images
from data import load_images
from metrics import evaluate_images
from small_runs import CPU, IMAGES, assert_equal_arrays, edit_arrays, main, noise_pictures
from studies.packs import pack
from training import EVALUATION, seed_of
from vsm import features
from vsm.cli import UserError
from vsm.fid import mmd_nulls, reference_set
from vsm.figures.axes import label_ticks
from vsm.figures.style import new_figure
from vsm.flags import image_defaults
from vsm.image_table import Measured, published, references_of, settings_notes
from vsm.loading import load_vae
from vsm.names import group_by_seed, in_order, settings_of, usual_flags
from vsm.runs import load_arrays, load_config

QUICK = ["--images", "20", "--iw-samples", "8", "--device", "cpu"]


pytestmark = pytest.mark.usefixtures("cache")


def train(out, *argv):
    main(train_images, *IMAGES, "--net", "conv", "--width", 8, "--dim-z", 4, "--samples", 2, "--inner-steps", 1, "--epochs", 8,
         "--eval-every", 4, "--lr", 3e-3, "--init-sd", 0.1, "--out", out, *argv)
    return out


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """Two seeds of KLD-F; and copies of the first one that diverged, never ended, lost half its checkpoint."""
    root = tmp_path_factory.mktemp("runs")
    runs = SimpleNamespace(a=train(root / "a", "--data-root", digits), b=train(root / "b", "--data-root", digits, "--seed", 1))
    for name in ("diverged", "half", "damaged"):
        setattr(runs, name, shutil.copytree(runs.a, root / name))
    config = load_config(runs.a)
    config["flags"]["seed"] = 2
    (runs.diverged / "config.json").write_text(json.dumps(config))
    edit_arrays(runs.diverged / "metrics.npz", config=config, status="diverged@7")
    edit_arrays(runs.half / "metrics.npz", config=config, status=None)
    (runs.damaged / "checkpoint.pt").write_bytes((runs.a / "checkpoint.pt").read_bytes()[:5000])
    return runs


def run_evaluate(out, *argv, **options):
    main(evaluate, *QUICK, *argv, "--out", out, **options)


def test_table_and_figures_over_seeds_and_figures_redrawn_from_the_arrays_alone(runs, tmp_path, capsys):
    run_evaluate(tmp_path / "out", runs.a, runs.b, runs.diverged, pictures=True)
    printed = capsys.readouterr().out
    each, table = [load_arrays(run / "eval.npz") for run in (runs.a, runs.b)], load_arrays(tmp_path / "out" / "table.npz")
    last = [load_arrays(run / "metrics.npz")["negative_elbo"][-1] for run in (runs.a, runs.b)]
    assert table["objectives"].tolist() == ["KLD-F"] and table["n"].tolist() == [2] and table["diverged"].tolist() == [1]
    assert table["negative_elbo_mean"][0] == pytest.approx(np.mean(last))
    assert table["negative_elbo_ci95"][0] == pytest.approx(12.7062 * abs(last[0] - last[1]) / 2, rel=1e-5)  # t(0.975; 1)
    assert table["fid_mean"][0] == pytest.approx(np.mean([arrays["fid"] for arrays in each]))
    assert (table["paper_fid"][0], table["paper_kid_x1000"][0]) == (5.22, 60.8)
    network, text = each[0]["config"]["evaluation"]["features"], (tmp_path / "out" / "table.md").read_text()
    assert text in printed and "2 (+1 diverged)" in text and "floor: 60 training images" in text and "N = 60" in text
    assert network["hash"] in text and f"{network['accuracy']:.4f}" in text and "standard deviation of" in text
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "table.md", "table.npz", "trajectories.png", "posterior_sd.png", "samples.png", "aggregate_posterior.png"}
    assert not (runs.diverged / "eval.npz").exists()
    for figure, drawn in (("trajectories", (runs.a, runs.b, runs.diverged)), ("aggregate_posterior", (runs.a, runs.b))):
        main(plots, figure, *drawn, "--save", tmp_path / f"{figure}.png")
        assert (tmp_path / f"{figure}.png").read_bytes() == (tmp_path / "out" / f"{figure}.png").read_bytes()


def test_eval_npz_holds_what_the_readme_says_and_the_bound_tightens(runs, digits, tmp_path):
    run_evaluate(tmp_path, runs.a)
    arrays = load_arrays(runs.a / "eval.npz")
    for name in ("fid", "fid_infinite", "kid", "kid_subset_sd", "kid_full", "fid_floor", "fid_infinite_floor", "kid_floor",
                 "kid_full_floor", "latent_mmd_null_sd"):
        assert arrays[name].shape == () and np.isfinite(arrays[name]), name
    assert arrays["iw_samples"].tolist() == [1, 3, 8] and (np.diff(arrays["negative_iw_bound"]) < 0).all()
    assert arrays["negative_iw_bound"][0] == pytest.approx(load_arrays(runs.a / "metrics.npz")["negative_elbo"][-1], rel=0.2)
    vae, generator = load_vae(runs.a), torch.Generator().manual_seed(seed_of(0, EVALUATION))
    mmd_nulls(vae, 60, generator)  # draws first
    again = evaluate.importance_bounds(vae, load_images("mnist", digits).test[:20], 0.1, 8, generator)
    assert all(np.array_equal(arrays[name], again[name]) for name in again)


def test_an_evaluation_is_used_again_until_its_settings_change(runs, tmp_path, capsys):
    run_evaluate(tmp_path, runs.a)
    before = (runs.a / "eval.npz").read_bytes()
    capsys.readouterr()
    run_evaluate(tmp_path, runs.a)
    assert "evaluated before" in capsys.readouterr().out
    run_evaluate(tmp_path, runs.a, "--overwrite")
    assert "evaluated before" not in capsys.readouterr().out and (runs.a / "eval.npz").read_bytes() == before
    run_evaluate(tmp_path, runs.a, "--iw-samples", "3")
    assert load_arrays(runs.a / "eval.npz")["iw_samples"].tolist() == [1, 3]
    capsys.readouterr()
    main(evaluate, runs.a, "--device", "cpu", "--out", tmp_path)  # what no flag says stays as it was
    assert "evaluated before" in capsys.readouterr().out
    run_evaluate(tmp_path, runs.a, "--iw-samples", "3", "--sampler", "gaussian")
    assert "fid_gaussian" in load_arrays(runs.a / "eval.npz")
    config = load_arrays(runs.a / "eval.npz")["config"]
    config["evaluation"]["checkpoint"] = "that of fewer epochs"
    edit_arrays(runs.a / "eval.npz", config=config)
    main(evaluate, runs.a, "--device", "cpu", "--out", tmp_path)  # after the run was continued
    arrays = load_arrays(runs.a / "eval.npz")
    assert arrays["iw_samples"].tolist() == [1, 3] and "fid_gaussian" in arrays


def test_missing_begun_and_damaged_runs_are_named_and_skipped(runs, tmp_path, capsys, fails):
    begun = shutil.copytree(runs.half, tmp_path / "begun")
    (begun / "checkpoint.pt").unlink()
    bad = tmp_path / "nowhere", begun, runs.damaged, tmp_path / "none.npz"
    run_evaluate(tmp_path / "out", *bad, runs.a)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    for path, words in zip(bad, ("not a run folder", "has not ended, and has no checkpoint", "is damaged", "does not exist")):
        (line,) = [error for error in errors if f"skipped {path}:" in error]
        assert words in line
    assert load_arrays(tmp_path / "out" / "table.npz")["n"].tolist() == [1]
    assert "none of these runs" in fails(evaluate, begun, "--out", tmp_path / "none") and not (tmp_path / "none").exists()


def test_a_run_whose_checkpoint_is_gone_keeps_its_evaluation(runs, tmp_path, capsys):
    run_evaluate(tmp_path / "out", runs.a)
    published = shutil.copytree(runs.a, tmp_path / "published")
    (published / "checkpoint.pt").unlink()
    bare = shutil.copytree(published, tmp_path / "bare")
    (bare / "eval.npz").unlink()
    run_evaluate(tmp_path / "out", published, bare)
    printed = capsys.readouterr()
    assert "its checkpoint is gone" in printed.out and "it has no checkpoint.pt" in printed.err
    assert load_arrays(tmp_path / "out" / "table.npz")["n"].tolist() == [1]


def test_every_logarithmic_axis_has_numbers(tmp_path):
    figure, axes = new_figure(1, 3)
    for ax, top in zip(axes.flat, (800, 8, 7e6)):
        ax.plot([1, 2], [0.3 * top, 0.8 * top])
        ax.set_yscale("log")
        label_ticks(ax)
        figure.canvas.draw()
        low, high = ax.get_ylim()
        assert sum(bool(label.get_text()) and low <= label.get_position()[1] <= high for label in ax.get_yticklabels()) >= 2


def test_the_reference_is_of_the_runs_images_and_the_weights_that_are_given(runs, digits, tmp_path, fails, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "reference_set", lambda *words: asked.append(words))  # not one, which ends the evaluation
    weights = tmp_path / "weights.pth"
    weights.write_text("")
    fails(evaluate, runs.a, "--inception-weights", weights, "--device", "cpu", "--out", tmp_path / "out")
    assert asked == [("mnist", str(digits), 0, str(weights), CPU)]


def test_lenet_is_the_same_each_time_and_its_features_are_of_order_one(digits, monkeypatch, tmp_path, capsys):
    first = features.features_of("mnist", str(digits), CPU)
    monkeypatch.setenv("VSM_CACHE", str(tmp_path))
    torch.set_num_threads(2)
    second = features.features_of("mnist", str(digits), CPU)
    assert {*capsys.readouterr().err.splitlines()} == {"training the LeNet-5 of FID on mnist, once"}  # no bar in a log file
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert first.description == second.description
    images = load_images("mnist", digits).train
    assert first(images).shape == (300, 84) and first(images).square().mean().item() == pytest.approx(1, rel=1e-4)
    assert torch.allclose(first(images), first(images, block=7), atol=1e-5)


def test_weights_that_are_not_inceptions_are_named(tmp_path, capsys):
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
    noise_pictures(tmp_path / "pictures", 40)
    run = train(tmp_path / "run", "--data", f"folder:{tmp_path / 'pictures'}", "--batch", "10", "--epochs", "1")
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    with pytest.raises(UserError):
        run_evaluate(tmp_path / "out", run, "--inception-weights", tmp_path / "weights.pth")
    assert "weights.pth does not hold Inception's weights" in capsys.readouterr().err


def test_groups_differ_in_their_seed_alone():
    def config(label, **flags):
        defaults = {"data": "mnist", "net": "conv", "learn": label, "infer": "kld", "inner_steps": 5, "out": label,
                    "estimator": "plugin"}
        return {"label": label, "flags": defaults | flags}

    configs = [config("F", seed=0), config("F", seed=1, out="x"), config("S", seed=0),
               config("F", seed=0, data="fashion", inner_steps=2), config("F", seed=0, net="mlp", inner_steps=3)]
    folders = [Path(f"run{i}") for i in range(7)]
    assert group_by_seed(folders, configs) == [("F", "", [0, 1]), ("S", "", [2]), ("F", "", [3]), ("F", "", [4])]
    configs.append(config("F", seed=0, inner_steps=1, one_pass=True))
    assert group_by_seed(folders, configs) == [("F", "inner-steps 5", [0, 1]), ("S", "inner-steps 5", [2]), ("F", "", [3]),
                                               ("F", "", [4]), ("F", "inner-steps 1, one-pass", [5])]
    assert [settings for _, settings, _ in group_by_seed(folders, configs, leave_out_usual=True)] == [
        "", "", "", "", "inner-steps 1, one-pass"]
    estimators = [config("B", seed=0, samples=N, infer_samples=1, estimator=name) for name, N in (("unbiased", 5), ("plugin", 2))]
    assert group_by_seed(folders, estimators) == [("B unbiased", "N = 5", [0]), ("B", "N = 2", [1])]
    with pytest.raises(UserError, match="run5 and run6 are the same experiment with the same seed 0"):
        group_by_seed(folders, [*configs, configs[-1]])


def test_a_cache_that_cannot_be_written_costs_no_number(runs, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(runs.a, tmp_path / "run")
    run_evaluate(tmp_path / "out", run)
    before = load_arrays(run / "eval.npz")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VSM_CACHE", str(tmp_path / "file" / "cache"))
    reference_set.cache_clear()
    run_evaluate(tmp_path / "out", run, "--overwrite")
    reference_set.cache_clear()
    after = load_arrays(run / "eval.npz")
    assert "the result is not cached" in capsys.readouterr().err
    assert_equal_arrays(before, after)


def test_a_damaged_evaluation_is_made_again_or_named(runs, tmp_path, capsys):
    run = shutil.copytree(runs.a, tmp_path / "run", ignore=shutil.ignore_patterns("eval.npz"))
    run_evaluate(tmp_path / "out", run)
    before = (run / "eval.npz").read_bytes()
    (run / "eval.npz").write_bytes(before[:len(before) // 2])
    run_evaluate(tmp_path / "out", run)
    assert (run / "eval.npz").read_bytes() == before
    (run / "eval.npz").write_bytes(before[:len(before) // 2])
    (run / "checkpoint.pt").unlink()
    run_evaluate(tmp_path / "out", run, runs.b)
    assert f"skipped {run}: {run}/eval.npz is damaged" in capsys.readouterr().err


def test_all_numbers_of_an_unfinished_run_are_of_its_checkpoint_and_it_is_labelled(runs, tmp_path):
    """The last row of its metrics.npz is of epoch 4, its checkpoint of epoch 8, where the finished run ended."""
    half = shutil.copytree(runs.half, tmp_path / "half")
    arrays = load_arrays(half / "metrics.npz")
    config = arrays.pop("config")
    kept = {name: value[:2] for name, value in arrays.items() if value.shape[:1] == arrays["epoch"].shape}
    assert kept["epoch"].tolist() == [0, 4]
    edit_arrays(half / "metrics.npz", **kept)
    run_evaluate(tmp_path / "out", runs.a, half)
    assert load_arrays(half / "eval.npz")["status"] == "unfinished@8" and "status" not in load_arrays(half / "metrics.npz")
    table = load_arrays(tmp_path / "out" / "table.npz")
    assert table["objectives"].tolist() == ["KLD-F", "KLD-F unfinished@8"] and table["n"].tolist() == [1, 1]
    for name in ("negative_elbo", "reconstruction_mse", "latent_mmd", "posterior_fd", "active_second_moment"):
        assert table[f"{name}_mean"][0] == load_arrays(runs.a / "metrics.npz")[name][-1]
    last = evaluate_images(load_vae(half), load_images("mnist", config["flags"]["data_root"]).test, 0.1,
                           seed=seed_of(load_config(half)["flags"]["seed"], EVALUATION))
    assert table["negative_elbo_mean"][1] == last["negative_elbo"].item() != kept["negative_elbo"][-1]
    assert table["active_second_moment_mean"][1] == last["active_second_moment"].item()
    assert np.isnan(table["paper_fid"][1]) and table["paper_fid"][0] == 5.22
    assert "KLD-F unfinished@8" in (tmp_path / "out" / "table.md").read_text()
    edit_arrays(half / "metrics.npz", status=np.array("ok"))  # it resumes, and has nothing left to train
    run_evaluate(tmp_path / "out", half)
    assert load_arrays(half / "eval.npz")["status"] == "ok"


def test_a_floor_for_each_set_of_test_images_and_the_papers_numbers_for_its_models_alone():
    runs = [SimpleNamespace(config={"flags": {"dim_z": n, "latent": "gaussian"}}) for n in (2, 2, 12)]
    settings = {"data": "mnist", "test_images": 60}
    members = [Measured(run, "ok", {}, {"config": {"evaluation": settings | {"digest": digest}}, "latent_mmd_null_sd": sd,
                                        "fid_floor": floor})
               for run, digest, floor, sd in zip(runs, "aba", (1.0, 2.0, 1.0), (0.5, 1.5, 2.5))]
    found = references_of(members)
    assert [reference["floor"]["fid_floor"] for reference in found] == [1, 2]
    assert [reference["null_sd"] for reference in found] == [{"2 gaussian latents": [0.5], "12 gaussian latents": [2.5]},
                                                             {"2 gaussian latents": [1.5]}]
    flags, others = {"data": "mnist", "net": "conv", "latent": "gaussian"}, ({"latent": "bernoulli"}, {"net": "mlp"})
    fids = [published({"label": "KLD-F", "flags": flags | more})["paper_fid"] for more in ({}, *others)]
    assert fids[0] == 5.22 and np.isnan(fids[1:]).all()


def test_settings_leave_out_what_most_runs_have_and_a_note_names_it():
    def configs(*changes):
        return [{"flags": image_defaults() | change} for change in changes]

    usual = {"infer_samples": 1, "one_pass": True, "out": "x", "seed": 3}
    runs = configs(usual, usual | {"lr": 0.5}, usual | {"infer_samples": 5, "one_pass": False})
    assert settings_of(runs, ("infer_samples", "one_pass", "lr"), usual_flags(runs)) == [
        "", "lr 0.5", "infer-samples 5, without one-pass"]
    assert settings_of(runs, ("one_pass",)) == ["one-pass", "one-pass", ""]
    assert settings_notes(runs) == [
        "mnist conv: where its settings name no other value, a run has --infer-samples 1 --one-pass, and otherwise defaults"]
    assert settings_of(runs[1:], ("lr",), usual_flags(runs[1:])) == ["lr 0.5", "lr 0.0001"]  # of two values neither is usual
    assert settings_notes(configs({"samples": 2, "infer_samples": 2}))[0].endswith("has --samples 2, and otherwise defaults")
    notes = settings_notes(configs({}, {"net": "mlp", "width": 400}))
    assert [note.split(":")[0] for note in notes] == ["mnist conv", "mnist mlp"]
    assert settings_notes(configs({}, {"epochs": 7}))[0].endswith("a run has defaults")
    assert settings_notes(configs({"samples": 2, "infer_samples": 2}), ("samples",))[0].endswith("a run has defaults")


def test_widths_are_in_the_order_of_numbers_and_the_usual_settings_come_first():
    settings = ["width 16", "width 8, lr 0.001", "", "lr 0.001", "lr 2e-05", "width 8"]
    assert sorted(settings, key=in_order) == ["", "lr 2e-05", "lr 0.001", "width 8", "width 8, lr 0.001", "width 16"]


def test_a_pack_gives_the_same_table_without_folders(runs, tmp_path):
    run_evaluate(tmp_path / "folders", runs.a, runs.b, runs.diverged, runs.half)
    pack([runs.a, runs.b, runs.diverged, runs.half], tmp_path / "pack.npz")
    run_evaluate(tmp_path / "packed", tmp_path / "pack.npz")
    text = [(tmp_path / name / "table.md").read_text() for name in ("folders", "packed")]
    assert text[0] == text[1] and "unfinished@8" in text[0] and "(+1 diverged)" in text[0]


@pytest.mark.parametrize("name, content", [
    *(("checkpoint.pt", content) for content in ({}, {"trainer": None}, {"trainer": {"tensors": {}}},
                                                 {"trainer": {"tensors": {"vae.log_gamma": 1}}})),
    *(("config.json", content) for content in ({"flags": {}}, {"flags": {"width": "wide"}}, {"flags": {"nonesuch": 1}},
                                               {"data": None}, {"label": None}, {"script": "train_synthetic"})),
    ("metrics.npz", {}), ("metrics.npz", {"status": "ok"})])
def test_whatever_is_wrong_with_one_run_the_others_are_evaluated(runs, tmp_path, capsys, name, content):
    bad = shutil.copytree(runs.b, tmp_path / "bad")
    (bad / "eval.npz").unlink(missing_ok=True)
    if name == "checkpoint.pt":
        torch.save(content, bad / name)
    elif name == "config.json":
        (bad / name).write_text(json.dumps({**load_config(bad), **content}))
    else:
        np.savez(bad / name, **content)
    run_evaluate(tmp_path / "out", bad, runs.a)
    message = capsys.readouterr().err
    if content != {"flags": {}}:  # a folder without flags is of the defaults, whose model is another
        assert message.count("skipped") == 1, message
    assert f"skipped {bad}: " in message and "Traceback" not in message
    assert load_arrays(tmp_path / "out" / "table.npz")["n"].tolist() == [1]
