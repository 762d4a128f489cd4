"""Figures and packs are made from small arrays that these tests make, without any training."""

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

import param_recovery
import plots
from sketches import contents_of
from small_runs import ROOT, edit_arrays, main
from studies import packs, tables
from studies.figures.samplers import fid_by_sampler
from studies.figures.sweep_2d import sweep_points
from studies.packs import pack
from vsm.figures import images, latents, pictures, recovery
from vsm.figures.axes import robust_limits
from vsm.figures.groups import grouped
from vsm.figures.run import draw_run
from vsm.figures.style import color_of
from vsm.names import letter_of
from vsm.runs import load_arrays, save_arrays
from vsm.stored_runs import HEAVY, open_runs, samples_of_member, shown_member
from vsm.tables import markdown_table, mean_and_error, with_error


def write_run(folder, script, flags, label, part="metrics", **arrays):
    config = {"script": script, "flags": flags, "label": label, "commit": "0", "torch": "2", "device": "cpu"}
    folder.mkdir(exist_ok=True, parents=True)
    save_arrays(folder / f"{part}.npz", config, **arrays)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def synthetic_run(folder, learn="bao", infer="kld", K=5, seed=0, finished=True, seeds=3, data="ring", epochs=3, **more):
    rng = np.random.default_rng(seed)
    flags = {"data": data, "learn": learn, "infer": infer, "estimator": "plugin", "samples": 5, "inner_steps": K, "seed": seed,
             "seeds": seeds, "bilevel_steps": 0, "epochs": epochs, "steps_per_epoch": 100, "hidden": 30} | more
    names = "log_gamma", "negative_elbo", "excess_curve", "nll_curve", "learn_loss"
    arrays = {"epoch": np.arange(4), "posterior_sd": rng.uniform(0.1, 0.5, (4, seeds, 2)).astype(np.float32)}
    arrays |= {key: rng.uniform(0.2, 1, (4, seeds)) for key in names}
    if finished:
        nll = rng.uniform(1, 2, seeds)
        nll[0] = np.nan
        arrays |= {
            "nll": nll, "nll_excess": nll - 0.5, "second_moment": rng.uniform(0.5, 2, (seeds, 2)),
            "fisher_divergence": rng.uniform(1, 2, seeds), "sm_loss": rng.uniform(1, 2, seeds), "status": np.array("ok"),
            "diverged_at": np.array([7] + [-1] * (seeds - 1)),
            "model_samples": rng.normal(size=(seeds, 50, 2)).astype(np.float32),
            "test_data": np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)}
    return write_run(folder, "train_synthetic", flags, f"{infer.upper()}-{'B' if learn == 'bao' else 'F'}", **arrays)


def image_run(folder, learn="fd", infer="kld", seed=0, finished=True, scale=1.0, **more):
    rng = np.random.default_rng(seed)
    flags = {"data": "glyphs", "net": "conv", "learn": learn, "infer": infer, "estimator": "plugin", "samples": 5, "seed": seed}
    flags |= more
    names = ("negative_elbo", "reconstruction", "kl", "reconstruction_mse", "latent_mmd", "posterior_fd", "log_gamma",
             "active_units", "infer_loss", "learn_loss", "infer_grad_norm", "learn_grad_norm")
    arrays = {"epoch": np.arange(5)} | {name: scale * rng.uniform(1, 2, 5) for name in names}
    arrays |= {"fid": np.array([np.nan, 9.0, np.nan, 8, 7]), "posterior_sd": rng.uniform(0.1, 1, (5, 6)),
               "second_moment": rng.uniform(0.5, 1, (5, 6)), "aggregate_histogram": np.full((5, 80), 1 / 80)}
    if finished:
        arrays |= {name: rng.integers(0, 255, (64, 1, 8, 8), np.uint8) for name in ("samples", "inputs", "reconstructions")}
        arrays |= {"interpolations": rng.integers(0, 255, (3, 8, 1, 8, 8), np.uint8), "status": np.array("ok")}
    evaluation = {"iw_samples": np.array([1, 10]), "negative_iw_bound": rng.normal(size=2)}
    write_run(folder, "train_images", flags, f"{infer.upper()}-F", "eval", status="ok", **evaluation)
    return write_run(folder, "train_images", flags, f"{infer.upper()}-F", **arrays)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {
        "2d": [synthetic_run(root / "b5"), synthetic_run(root / "b1", K=1), synthetic_run(root / "f5", "fd", "fd", seed=0)],
        "images": [image_run(root / "i0"), image_run(root / "i1", seed=1), image_run(root / "fd", infer="fd", scale=1e30)],
        "half": [synthetic_run(root / "half", finished=False)], "half image": [image_run(root / "half_image", finished=False)]}


def draw(figure, *argv):
    main(plots, figure, *argv)


def test_bilevel_draws_runs_of_one_length(tmp_path):
    long = synthetic_run(tmp_path / "a", seed=1, epochs=6)
    short = [synthetic_run(tmp_path / f"b{i}", learn, seed=2) for i, learn in enumerate(("bao", "fd"))]
    for name, drawn in (("all", [long, *short]), ("short", short)):
        draw("bilevel", *drawn, "--save", tmp_path / f"{name}.png")
    assert np.array_equal(imread(tmp_path / "all.png"), imread(tmp_path / "short.png"))


FIGURES_OF = {
    "2d": ("synthetic", "study", "bilevel", "training_curves", "synthetic_samples"),
    "images": ("training_curves", "trajectories", "fid_curves", "samples", "reconstructions",
               "interpolations", "posterior_sd", "aggregate_posterior")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FIGURES_OF)
def test_a_pack_draws_the_same_pixels_as_its_folders(runs, tmp_path, kind):
    packed = tmp_path / "all.npz"
    main(packs, *runs[kind], "--save", packed, "--keep", *HEAVY)
    for i, figure in enumerate(FIGURES_OF[kind]):
        draw(figure, packed, "--save", tmp_path / "a.png")
        if i % 4 == 0:
            draw(figure, *runs[kind], "--save", tmp_path / "b.png")
            assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes(), figure
    if kind == "2d":
        others = ("--only", "b1", "f5", "--without", "f*")
        draw("synthetic", packed, runs["2d"][0].parent / "b5", *others, "--save", tmp_path / "c.png")


def test_a_pack_keeps_every_value_and_heavy_arrays_on_request(runs, tmp_path, monkeypatch):
    main(packs, *runs["2d"], "--save", tmp_path / "small.npz")
    pack(runs["2d"], tmp_path / "large.npz", keep=["model_samples", "test_data"])
    pack([tmp_path / "large.npz"], tmp_path / "again.npz", keep=["model_samples", "test_data"])
    assert (tmp_path / "again.npz").stat().st_size == (tmp_path / "large.npz").stat().st_size
    for folder, small, large in zip(*map(open_runs, (runs["2d"], [tmp_path / "small.npz"], [tmp_path / "large.npz"]))):
        arrays, kept = folder.arrays(), large.arrays()
        assert small.config == folder.config and small.name.endswith(":" + Path(folder.name).name)
        assert {"model_samples", "test_data"} & small.arrays().keys() == set()
        for key, value in small.arrays().items():
            assert key == "config" or np.array_equal(value, arrays[key], equal_nan=value.dtype.kind == "f")
        member = shown_member(arrays["nll"])
        assert np.array_equal(samples_of_member(kept, member), arrays["model_samples"][member])
        with pytest.raises(KeyError):
            samples_of_member(kept, 0 if member else 1)
    assert not open_runs([tmp_path / "small.npz"])[0].has("eval")
    saved = []
    monkeypatch.setattr(plots, "draw_figure", lambda name, runs, save: saved.append(save))
    for drawn in (tmp_path / "small.npz", runs["2d"][0]):
        draw("study", drawn)
    assert saved == [tmp_path / "small_study.png", runs["2d"][0] / "study.png"]


def test_a_packed_run_has_its_own_arrays_alone(runs, tmp_path):
    both = [*runs["2d"][:1], *runs["half"], runs["images"][0]]
    pack(both, tmp_path / "both.npz", keep=HEAVY)
    for folder, packed in zip(*map(open_runs, (both, [tmp_path / "both.npz"]))):
        assert packed.arrays().keys() - {"model_samples_of"} == folder.arrays().keys()
        assert packed.has("eval") == folder.has("eval")


@pytest.mark.parametrize("kind", ["half", "half image"])
def test_curves_of_a_run_that_has_not_ended(runs, tmp_path, kind, fails):
    draw("training_curves", *runs[kind], "--save", tmp_path / "a.png")
    other = "synthetic" if kind == "half" else "samples"
    assert ("has not ended" if kind == "half" else "has no 'samples'") in fails(plots, other, *runs[kind])


def test_a_finished_run_replaces_pictures_that_are_older_than_its_arrays(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("vsm.figures.style.write_atomic", lambda save, _: (drawn.append(save.stem), save.write_text("")))
    run = image_run(tmp_path / "run", finished=False)
    (run / "training_curves.png").write_text("half of the curves")
    image_run(run)
    before = (run / "metrics.npz").stat().st_mtime_ns - 10**6
    os.utime(run / "training_curves.png", ns=(before, before))
    (run / "samples.png").write_text("drawn since")
    draw_run(run)
    assert drawn == ["training_curves", "reconstructions", "interpolations", "posterior_sd"]
    draw_run(run)
    assert len(drawn) == 4


def test_bad_input_gets_one_sentence(runs, tmp_path, fails):
    image, synthetic = runs["images"][0], runs["2d"][0]
    save, folder, whole = tmp_path / "a.png", synthetic_run(tmp_path / "folder"), tmp_path / "whole.npz"
    (tmp_path / "text.npz").write_text("text")
    pack([synthetic], whole)
    arrays = dict(np.load(whole))
    np.savez(tmp_path / "bad.npz", **arrays | {"index": arrays["index"] + 1})
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:2000])
    (folder / "metrics.npz").unlink()
    for fifo in (tmp_path / "fifo.npz", folder / "metrics.npz"):
        os.mkfifo(fifo)
    for run, words in ((image, "synthetic draws runs of train_synthetic.py"), (tmp_path / "no.npz", "does not exist"),
                       (tmp_path / "no", "not a run folder"), (synthetic / "config.json", "not a run folder"),
                       (synthetic / "metrics.npz", "is not a pack of runs"), (tmp_path / "text.npz", "is damaged"),
                       (tmp_path / "bad.npz", "is damaged"), (tmp_path / "cut.npz", "is damaged"),
                       (tmp_path / "fifo.npz", "not a regular file"), (folder, "not a regular file")):
        assert words in fails(plots, "synthetic", run, "--save", save)
    (folder / "metrics.npz").unlink()
    np.savez(folder / "metrics.npz", config="not JSON")
    assert "is damaged" in fails(plots, "synthetic", folder, "--save", save)
    assert "has no 'posterior_mean_histogram'" in fails(plots, "posterior_mean", image)
    assert "draw them separately" in fails(plots, "training_curves", image, synthetic, "--save", save)
    assert "cannot write" in fails(plots, "synthetic", synthetic, "--save", synthetic / "config.json" / "a.png")
    assert "must end in" in fails(plots, "synthetic", synthetic, "--save", tmp_path / "a.gif")
    assert "must end in .npz" in fails(packs, synthetic, "--save", save)
    assert "must end in .md" in fails(tables, synthetic, "--save", save)
    assert "leave no run" in fails(plots, "study", synthetic, "--only", "nothing")
    assert "named b5" in fails(packs, synthetic, synthetic_run(tmp_path / "b5"), "--save", tmp_path / "twins.npz")
    assert not save.exists()


def test_runs_of_another_setting_have_a_panel_of_their_own(tmp_path):
    runs = [image_run(tmp_path / "a", norm="batch")]
    runs += [image_run(tmp_path / f"b{seed}", norm="none", seed=seed) for seed in (0, 1)]
    panels = grouped(runs, split=("norm", "init_sd"))
    assert list(panels) == ["glyphs, conv\nnorm batch", "glyphs, conv\nnorm none"]
    assert [(name, len(members)) for name, members in panels["glyphs, conv\nnorm none"]] == [("KLD-F", 2)]
    draw("samples", *runs, "--save", tmp_path / "samples.png")


def gamma_run(folder, learn, gamma, init_sd, seed=0, width=16, status="ok", K=10):
    flags = {"data": "mnist", "net": "conv", "width": width, "norm": "batch", "learn": learn, "infer": "kld", "samples": 5,
             "estimator": "plugin", "gamma": gamma, "init_sd": init_sd, "seed": seed, "epochs": 3}
    evaluation = {"components": K, "features": {"name": "LeNet-5"}}
    found = {"status": "ok", "fid": 9.0 + seed, "fid_mixture": 1.0 + seed}
    write_run(folder, "train_images", flags, f"KLD-{learn}", log_gamma=np.array([0, -3.0]), kl=np.array([1, 40.0]), status=status)
    save_arrays(folder / "eval.npz", {"flags": flags, "evaluation": evaluation}, **found)
    return folder


@pytest.fixture
def axes_of(monkeypatch, tmp_path):
    """axes_of(figure, run, ...) draws stored runs, and returns the axes in place of a file."""
    def draw(figure, *runs):
        drawn = []
        with monkeypatch.context() as patch:
            patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
            figure(runs, tmp_path / "nothing.svg")
        return drawn[0].axes
    return draw


def test_the_ellipses_and_lines_of_the_recovery_are_those_of_its_arrays(axes_of, tmp_path):
    args = param_recovery.parse_args("--points 4 --gamma 0.5 --alpha 2 --w-star 0.7 --alphas 0.5 2".split())
    arrays = param_recovery.closed_forms(args)
    run = write_run(tmp_path / "run", "param_recovery", vars(args), "", **arrays)
    left, *joints = axes_of(recovery.param_recovery, run)
    for line, w in zip(left.lines, [row for rule in arrays["w"][:2] for row in rule], strict=True):  # JKLD, JFD by alpha
        assert np.array_equal(line.get_ydata(), w)
    for ax, w, phi in zip(joints, arrays["example_w"], arrays["example_phi"], strict=True):
        t, v = 0.5 + w**2, 0.5 + 0.7**2
        found = [(line.get_xdata().max(), line.get_ydata().max()) for line in ax.lines]  # of p, then q, at 1, 2 and 3 sd
        ends = np.array([(t**0.5, 1), (v**0.5, (phi**2 * v + 2 * 0.5 / t) ** 0.5)])
        np.testing.assert_allclose(found, [sd * end for end in ends for sd in (1, 2, 3)], rtol=1e-3)
    rules = dict(zip(arrays["rule"], arrays["sweep_w"]))
    for ax, how in zip(axes_of(recovery.recovery_rules, run), ("held", "held", "following"), strict=True):
        for line in ax.lines[1:]:
            name = f"{how} {line.get_label()}".replace("$", "")
            rule = {"held FAE": "JFD", "following FAE": "JFD", "following ELBO": "JKLD"}.get(name, name)
            assert np.array_equal(line.get_ydata(), rules[rule]), rule


def test_every_curve_of_the_gradients_noise_is_that_of_its_name(axes_of, tmp_path):
    names = ["ELBO", "F", "S plugin", "S unbiased", "B plugin", "B released"]
    keys = ("snr", "snr_log_gamma", "cosine_to_elbo")
    arrays = {key: np.random.default_rng(i).uniform(0.1, 1, (len(names), 3)) for i, key in enumerate(keys)}
    flags = {"data": "mnist", "net": "conv", "learn": "elbo", "infer": "kld", "estimator": "plugin", "samples": 5, "seed": 0}
    arrays |= {"objectives": names, "samples": [1, 2, 5]}
    run = write_run(tmp_path / "run", "train_images", flags, "KLD-ELBO", "gradient_snr", **arrays)
    axes = axes_of(images.gradient_snr, run)
    for ax, key, shown in zip(axes, 2 * keys, 3 * [["ELBO", "F", "S plugin", "B plugin"]] + 3 * [["ELBO", names[3], names[5]]]):
        assert [bars.get_label() for bars in ax.containers] == shown
        for bars in ax.containers:
            assert np.array_equal(bars.lines[0].get_ydata(), arrays[key][names.index(bars.get_label())]), key


def test_bars_of_the_gradients_noise_reach_from_the_smallest_to_the_largest_seed(axes_of, tmp_path):
    flags = {"data": "mnist", "net": "conv", "learn": "elbo", "infer": "kld", "estimator": "plugin", "samples": 5}
    values, keys = {0: 1.0, 1: 2.0, 2: 6.0}, ("snr", "snr_log_gamma", "cosine_to_elbo")
    runs = [write_run(tmp_path / f"{seed}", "train_images", flags | {"seed": seed}, "KLD-ELBO", "gradient_snr", samples=[1],
                      objectives=["ELBO"], **{key: np.full((1, 1), value) for key in keys}) for seed, value in values.items()]
    (bars,) = axes_of(images.gradient_snr, *runs)[0].containers
    assert bars.lines[0].get_ydata().tolist() == [3] and bars.lines[2][0].get_segments()[0][:, 1].tolist() == [1, 6]
    newer = write_run(tmp_path / "newer", "train_images", flags | {"seed": 3}, "KLD-ELBO", "gradient_snr", samples=[1],
                      objectives=["F", "ELBO"], **{key: np.array([[100.0], [3.0]]) for key in keys})
    ours = axes_of(images.gradient_snr, *runs, newer)[0].containers
    assert {bars.get_label(): bars.lines[0].get_ydata().tolist() for bars in ours} == {"ELBO": [3], "F": [100]}


def test_the_aggregate_posterior_is_a_density_and_its_moments_fall(axes_of, tmp_path):
    run = image_run(tmp_path / "run")
    left, right = axes_of(latents.aggregate_posterior, run)
    values, edges, _ = left.patches[0].get_data()
    assert values @ np.diff(edges) == pytest.approx(1) and edges[[0, -1]].tolist() == [-4, 4]
    assert right.lines[0].get_ydata().tolist() == sorted(load_arrays(run / "metrics.npz")["second_moment"][-1])[::-1]
    edit_arrays(run / "metrics.npz", aggregate_histogram=np.full((5, 80), np.nan))
    assert [text.get_text() for text in axes_of(latents.aggregate_posterior, run)[0].texts] == ["no latent is active"]


def test_pictures_stand_where_their_numbers_say(axes_of, tmp_path):
    """Rows of inputs above those of their reconstructions; a row of interpolations for each pair of images."""
    run = image_run(tmp_path / "run")
    arrays = load_arrays(run / "metrics.npz")
    tiles = {name: axes_of(getattr(pictures, name), run)[0].images[0].get_array().reshape(-1, 8, 8, 8).swapaxes(1, 2)
             for name in ("samples", "reconstructions", "interpolations")}
    assert np.array_equal(tiles["samples"].reshape(64, 8, 8), arrays["samples"][:, 0])
    both = np.stack([arrays[name][:32, 0].reshape(4, 8, 8, 8) for name in ("inputs", "reconstructions")], 1)
    assert np.array_equal(tiles["reconstructions"], both.reshape(8, 8, 8, 8))
    assert np.array_equal(tiles["interpolations"], arrays["interpolations"][:, :, 0])


def test_a_grid_of_few_images_has_the_names_of_its_rows_and_is_white_where_no_image_is(axes_of, tmp_path):
    few = {name: np.zeros((6, 1, 8, 8), np.uint8) for name in ("inputs", "reconstructions")}
    flags = {"data": "glyphs", "net": "conv", "learn": "fd", "infer": "kld", "estimator": "plugin", "samples": 5, "seed": 0}
    (ax,) = axes_of(pictures.reconstructions, write_run(tmp_path / "run", "train_images", flags, "KLD-F", status="ok", **few))
    page = ax.images[0].get_array()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["input", "output"] and page.shape == (16, 64)
    assert not page[:, :48].any() and (page[:, 48:] == 255).all()


@pytest.mark.parametrize("evaluations, first", [(1, 0), (2, 1), (5, 1), (13, 3)])
def test_curves_begin_after_the_first_quarter_of_training_and_not_with_its_first_values(axes_of, tmp_path, evaluations, first):
    run = image_run(tmp_path / "run")
    arrays = load_arrays(run / "metrics.npz")
    curve = {"epoch": np.arange(evaluations), "latent_mmd": np.linspace(9, 3, evaluations), "status": arrays["status"]}
    save_arrays(run / "metrics.npz", arrays["config"], **curve)
    (line,) = axes_of(images.training_curves, run)[0].lines
    assert line.get_xdata().tolist() == [*range(first, evaluations)]
    assert line.get_ydata() == pytest.approx(curve["latent_mmd"][first:])


def test_fid_by_sampler_is_against_gamma_or_width(axes_of, tmp_path, fails):
    paths = (("fixed", 0.2, 0), ("fixed", 0.2, 1), ("fixed", 0.4, 0), ("stationary", 1.0, 0))
    runs = [gamma_run(tmp_path / f"{learn}{i}", learn, *path) for learn in ("elbo", "swersky") for i, path in enumerate(paths)]
    draw("fid_by_sampler", *runs, "--save", tmp_path / "all.png")
    draw("fid_by_sampler", *runs[:2], "--save", tmp_path / "one.png")
    assert not np.array_equal(imread(tmp_path / "all.png")[:400], imread(tmp_path / "one.png")[:400])
    wider = gamma_run(tmp_path / "wider", "elbo", "fixed", 0.2, width=32)
    assert "choose them by --only" in fails(plots, "fid_by_sampler", *runs, wider, "--save", tmp_path / "x.png")
    lost = gamma_run(tmp_path / "lost", "bao", "fixed", 0.2, status="diverged@9")
    _, right = axes_of(fid_by_sampler, *runs[:2], wider, lost)
    (line,) = right.containers
    assert line.lines[0].get_xydata().tolist() == [[16, 1.5], [32, 1]] and right.get_xscale() == "log"
    for other in ({"K": 50}, {"status": "exploded@9"}):  # of another mixture; no run that ended well
        alone = gamma_run(tmp_path / "other", "elbo", "fixed", 0.2, width=8, **other)
        mixed, sentence = ([*runs[:2], alone], "choose them by --only") if "K" in other else ([alone], "all of these runs failed")
        assert sentence in fails(plots, "fid_by_sampler", *mixed)
    again = gamma_run(tmp_path / "again", "elbo", "fixed", 0.2)
    assert "the same experiment with the same seed" in fails(plots, "fid_by_sampler", runs[0], again)


def test_runs_of_further_seeds_are_one_point_of_a_sweep_and_other_settings_are_refused(runs, tmp_path, fails):
    (point,) = sweep_points([runs["2d"][0], synthetic_run(tmp_path / "further", seed=3)])
    assert len(point["members"]["nll"]) == 6  # seeds 0, 1, 2 and 3, 4, 5
    for more, figure, words in (({"infer_samples": 1}, "synthetic", "ring differ in infer_samples"),
                                ({"hidden": 31}, "training_curves", "ring differ in hidden"),
                                ({"hidden": 31}, "bilevel", "ring differ in hidden"),
                                ({"data": "spiral"}, "bilevel", "one data set")):
        other = synthetic_run(tmp_path / f"{figure}{more}", seed=6, **more)
        assert words in fails(plots, figure, runs["2d"][0], other, "--save", tmp_path / "x.png")


def test_limits_follow_most_values_and_not_one():
    near = {name: np.array([1.0, 1.1, 0.9, 1.05]) for name in "abc"}
    for scale in ("linear", "log"):
        low, high = robust_limits({**near, "far": np.array([1e34])}, scale)
        assert 0.8 < low < 0.9 and 1.1 < high < 1.2
    low, high = robust_limits({"none": np.array([np.nan])}, "linear")
    assert low < high


def test_colours_follow_the_flags_and_unknown_objectives_are_grey():
    flags = {"learn": "swersky", "samples": 1, "estimator": "plugin", "infer": "kld"}
    assert letter_of(flags) == "F" and letter_of(flags | {"samples": 5}) == "S" and color_of(flags) == "#0072B2"
    assert letter_of(flags | {"estimator": "released"}) == "S" and letter_of(flags | {"learn": "new"}) == "new"
    assert color_of(flags | {"learn": "new"}) == "tab:gray"


def test_tables_and_means():
    assert markdown_table(["a", "longer", "says nothing"], [[1, None, "-"], ["|x|", 2.5, ""]], "lrl") == (
        "| a     | longer |\n| ----- | -----: |\n| 1     |        |\n| \\|x\\| |    2.5 |")
    mean, error, median = mean_and_error(np.array([1.0, 2, 6, np.nan]))
    assert (mean, median) == (3, 2) and error == pytest.approx(np.std([1, 2, 6], ddof=1) / 3**0.5)
    assert shown_member(np.array([3.0, 1, np.nan, 2, 4])) == 3 and shown_member(np.array([np.nan])) is None
    every, packed = {"model_samples": np.arange(5, 8)}, {"model_samples": np.array([7]), "model_samples_of": np.array([2])}
    assert samples_of_member(every, 2) == samples_of_member(packed, 2) == 7
    assert with_error(1.2345, 0.0321, ".3g", ".1g") == "1.23 ± 0.03" and with_error(1.2345, np.nan, ".3g") == "1.23"
    assert np.isnan(mean_and_error(np.array([np.nan]))[0]) and np.isnan(mean_and_error(np.array([2.0]))[1])


def test_published_packs_open():
    for path in sorted((ROOT / "results").glob("*.npz")):
        runs = open_runs([path])
        assert runs and all(run.config["flags"] for run in runs) and path.name in (ROOT / "results" / "README.md").read_text()


def published_figures():
    """(file, arguments) of each row of results/README.md that plots.py or studies/tables.py makes."""
    rows = re.findall(r"\| \[(\S+\.(?:png|md))\]\(\1\) \|[^|]*\| `([^`]*)` \|", (ROOT / "results" / "README.md").read_text())
    return [(file, shlex.split(command.replace("results/", f"{ROOT}/results/"))) for file, command in rows]


def test_every_published_figure_has_its_command():
    found = dict(published_figures())
    others = {"README.md", "image_tables.md", "study_gamma.md", "study_width.md", "study_celeba_fid.md", "audit", "models"}
    files = {path.name for path in (ROOT / "results").iterdir()} - others - {"reproduce.sh"}
    assert {name for name in files if not name.endswith(".npz")} == found.keys()
    for file, command in found.items():
        (tables if file.endswith(".md") else plots).parse_args([*command, "--save", file])


@pytest.mark.parametrize("file, command", [row for row in published_figures() if row[0].endswith(".md")])
def test_published_tables_are_made_again(file, command, tmp_path):
    main(tables, *command, "--save", tmp_path / file)
    assert (tmp_path / file).read_text() == (ROOT / "results" / file).read_text()


FIGURES = [row for row in published_figures() if row[0].endswith(".png")]
OTHERS = [(f"{name} of {pack}", [name, f"{ROOT}/results/{pack}.npz", "--only", only]) for name, pack, only in (
    ("synthetic", "figure7", "mixture*"), ("trajectories", "images_mnist", "*"), ("training_curves", "images_fashion", "*"))]
SLOW = "figure3.png", "figure7.png", "study2d.png", "a53_laplace.png", "basins_sym.png"  # others are of the same functions
CONTENTS = ROOT / "tests" / "figures.json"


@pytest.mark.parametrize("file, command", [pytest.param(*row, marks=pytest.mark.slow if row[0] in SLOW else ())
                                           for row in FIGURES + OTHERS])
def test_published_figures_have_the_same_contents(file, command):
    """Where a figure is meant to change, `cd tests; PYTHONPATH=.. python test_plots.py` records the new contents."""
    words, numbers = zip(*drawn_contents(command))
    recorded = json.loads(CONTENTS.read_text())[file]
    assert [*words] == [word for word, _ in recorded]
    np.testing.assert_allclose(numbers, [number for _, number in recorded], rtol=1e-4)


def drawn_contents(command):
    """The contents of the figure that a command of plots.py draws."""
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(contents_of(figure)))
        patch.setattr("vsm.figures.style.write_atomic", lambda *_: None)
        main(plots, *command, "--save", "nothing.svg")
    return drawn[0]


@pytest.mark.slow
@pytest.mark.parametrize("file, command", FIGURES)
def test_published_figures_are_redrawn_to_the_pixel(file, command, tmp_path):
    main(plots, *command, "--save", tmp_path / file)
    assert np.array_equal(imread(tmp_path / file), imread(ROOT / "results" / file))


if __name__ == "__main__":
    lines = (f"{json.dumps(file)}: {json.dumps(drawn_contents(command))}" for file, command in FIGURES + OTHERS)
    CONTENTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
