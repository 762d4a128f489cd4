"""Runs of toy_inference.py: documented arrays, figures, signals and checkpoints, flags. Their parts: test_toys.py."""

import os
import re
import signal

import numpy as np
import pytest
import torch

import plots
import toy_inference as toy
from small_runs import CPU, ROOT, main, stop_after
from vsm import loop
from vsm.cli import Stopped, UserError, command_line
from vsm.figures import toys as figures
from vsm.runs import Run, load_arrays
from vsm.stored_runs import StoredRun
from vsm.toys.descent import Descent
from vsm.toys.mixtures import Mixtures


def parsed(*argv):
    return toy.parse_args([str(word) for word in argv])


def run(out, *argv):
    toy.main(parsed("--out", out, *argv))
    return load_arrays(out / "metrics.npz")


def fit(out, *argv):
    args = parsed("--out", out, *argv)
    with Run(args.out, "toy_inference", vars(args), CPU) as folder:
        return toy.EXPERIMENTS[toy.experiment_of(args)](args, CPU, folder)


SHORT = "--grid 2 --extent 1 --iterations 2500 --lr 1e-3 --frames 6 --likelihoods sym --objectives fd".split()
MIXTURE = ("--family", "mixture", "--iterations", 150, "--lr", "1e-2", "--repeats", 2, "--components", 3)


def documented(heading, **sizes):
    """{key: shape} of the table under a heading of docs/files.md; a shape stands behind the keys that share it."""
    page = (ROOT / "docs" / "files.md").read_text().split(f"#### {heading}\n")[1].split("\n#")[0]
    cells = re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE)
    shapes = {key: shape for cell in cells for keys, shape in re.findall(r"((?:`\w+`(?:, )?)+) \[(.*?)\]", cell)
              for key in re.findall(r"\w+", keys)}
    return {key: tuple(sizes.get(axis, None) or int(axis) for axis in shape.split(", ") if axis) for key, shape in shapes.items()}


def shapes_of(arrays):
    return {key: value.shape for key, value in arrays.items() if key not in ("config", "status")}


def test_a_run_leaves_its_documented_arrays_and_figures(tmp_path, capsys):
    out = tmp_path / "new" / "run"
    argv = ("--grid", 2, "--iterations", 40, "--frames", 6, "--likelihoods", "sym", "--objectives", "kld", "fd-weighted")
    arrays = run(out, *argv)
    assert capsys.readouterr().out.splitlines()[0] == f"gaussian on cpu; writes {out}"
    keys = documented("Gaussian and Laplace", L=1, I=2, P=2, K=4, G=201, F=len(arrays["iteration"]))
    assert keys.pop("location_gradient") == (3, 2, 1, 4) and shapes_of(arrays) == keys
    assert arrays["iteration"][[0, -1]].tolist() == [0, 40] and 20 in arrays["iteration"]
    assert np.array_equal(arrays["trajectory"][0, 0, :, 0, 1, 1], arrays["starts"].astype(np.float16))
    assert np.array_equal(arrays["trajectory"][-1, 0], arrays["location"].astype(np.float16))
    assert (out / "toy_basins.png").exists()
    main(plots, "toy_trajectories", out, "--save", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (out / "toy_trajectories.png").read_bytes()


def test_laplace_mixtures_and_gradients_leave_their_documented_arrays(tmp_path):
    laplace = fit(tmp_path / "laplace", "--family", "laplace", "--grid", 1, "--iterations", 3, "--likelihoods", "soft")
    documented_laplace = documented("Gaussian and Laplace", L=1, I=3, P=2, K=1, F=4, G=201)
    assert laplace["location_gradient"].shape == documented_laplace["location_gradient"]
    arrays = run(tmp_path / "mixture", *MIXTURE)
    assert shapes_of(arrays) == documented("Mixtures", L=2, R=2, C=3, G=201)
    assert np.allclose(arrays["weight"].sum(-1), 1) and (arrays["kl"] > 0).all()
    assert (arrays["fd"] < fit(tmp_path / "untrained", *MIXTURE[:2], "--iterations", 1, *MIXTURE[6:])["fd"]).all()
    arrays = run(tmp_path / "gradients", "--gradients")
    assert shapes_of(arrays) == documented("Gradients between two Gaussians", M=41, S=41)
    assert (tmp_path / "mixture" / "toy_mixtures.png").exists() and (tmp_path / "gradients" / "toy_gradients.png").exists()


def ends_of_four_starts():
    """Arrays for the figures of every start: one start ends on either side, one is caught, one diverged."""
    runs = np.zeros((1, 1, 2, 4), bool)
    arrays = {"config": {"flags": {"likelihoods": ["sym"], "objectives": ["fd"], "grid": 2, "extent": 1.0}},
              "location": np.zeros((2, 1, 1, 2, 4)), "caught": runs.copy(), "diverged": runs.copy(),
              "axis": np.linspace(-2, 2, 5), "log_posterior": -np.arange(25.0).reshape(1, 5, 5) / 5}
    arrays["location"][:] = [1, -1, 0, np.nan]
    arrays["caught"][..., 2] = arrays["diverged"][..., 3] = True
    return arrays


def draw_basins(arrays):
    figures.toy_basins([StoredRun("starts", lambda: arrays["config"], lambda part: arrays, ["metrics"])], None)


def test_trajectories_of_a_dense_grid_are_of_some_starts_and_their_counts_of_all(monkeypatch):
    drawn, arrays, shape = [], ends_of_four_starts(), (1, 1, 2, 144)
    arrays |= {"starts": np.zeros((2, 144)), "trajectory": np.zeros((3, 2, 2, *shape)), "location": np.zeros((2, *shape)),
               "caught": np.ones(shape, bool), "diverged": np.zeros(shape, bool)}
    arrays["config"]["flags"]["grid"] = 12
    monkeypatch.setattr(figures, "save_figure", lambda figure, save: drawn.append(figure))
    figures.toy_trajectories([StoredRun("starts", lambda: arrays["config"], lambda part: arrays, ["metrics"])], None)
    panel = drawn[0].axes[0]
    assert panel.get_title("left") == "144 of 144 caught" and len(panel.lines) == 36  # every second of 12 by 12


def test_basins_colour_every_start_by_its_end(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, save: drawn.append(figure))
    draw_basins(ends_of_four_starts())
    panel = drawn[0].axes[0]
    assert panel.images[0].get_array().T.flatten().tolist() == [0, 1, 2, 3]  # right, left, caught, diverged
    assert panel.get_title("left") == "1 of 4 caught, 1 diverged" and panel.get_title().strip() == figures.OBJECTIVE_TITLES["fd"]


@pytest.mark.parametrize("argv, kind, number", [(SHORT, Descent, signal.SIGTERM), (MIXTURE, Mixtures, signal.SIGINT)])
def test_a_signal_saves_a_checkpoint_from_which_the_run_goes_on_bit_by_bit(tmp_path, monkeypatch, capsys, argv, kind, number):
    whole = fit(tmp_path / "whole", *argv)
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        stop_after(patch, kind, 0, lambda: os.kill(os.getpid(), number))
        fit(tmp_path / "half", *argv)
    assert stopped.value.number == number
    half = fit(tmp_path / "half", *argv)
    assert f"resumes at iteration {'1,000' if kind is Descent else 100} of" in capsys.readouterr().out
    for name in whole:
        assert np.array_equal(whole[name], half[name], equal_nan=name not in ("status",)), name


def test_a_killed_run_goes_on_from_the_last_checkpoint_and_its_exit_code_is_that_of_the_signal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(loop, "LOOK_SECONDS", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, Descent, 2)
        fit(tmp_path / "half", *SHORT)
    stop_after(monkeypatch, Descent, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        command_line(lambda: parsed("--out", tmp_path / "half", *SHORT), toy.main)
    out, err = capsys.readouterr()
    assert ended.value.code == 143 and "stopped by SIGTERM" in err and "resumes at iteration 2,000 of" in out


@pytest.fixture
def half_run(tmp_path, monkeypatch):
    """Flags and checkpoint of a run that a signal stopped after its first block."""
    argv = ("--out", tmp_path / "run", *SHORT)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, Descent, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
        toy.main(parsed(*argv))
    return argv, tmp_path / "run" / "checkpoint.pt"


def test_a_checkpoint_of_another_form_is_refused_in_one_sentence_and_kept(half_run, fails):
    argv, path = half_run
    whole = torch.load(path, weights_only=True)
    good = whole["trainer"]
    assert good["step"] == 1000

    def refuses(saved, words):
        torch.save({**whole, "trainer": saved}, path)
        before = path.read_bytes()
        with Run(path.parent, "toy_inference", vars(parsed(*argv)), CPU) as folder, pytest.raises(UserError, match=words):
            loop.resume(folder, descent, 2500, 1)
        assert path.read_bytes() == before

    descent = Descent(parsed(*argv), CPU)
    start, tensors, params = descent.params.clone(), good["tensors"], good["tensors"]["params"]
    for wrong in ({**tensors, "params": params[:, :1]}, {**tensors, "more": params},
                  {key: value for key, value in tensors.items() if key != "moment1"}):
        refuses({**good, "tensors": wrong}, "not of what these flags train")
    assert torch.equal(descent.params, start) and descent.step == 0
    refuses({**good, "step": 2501}, "more than 2500 iterations")
    assert "already" in fails(toy, *argv)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("argv, kind", [(SHORT, Descent), (MIXTURE, Mixtures)])
def test_checkpoints_move_between_cpu_and_gpu(argv, kind):
    args = parsed(*argv)
    first, second, third = kind(args, CPU), kind(args, torch.device("cuda")), kind(args, CPU)
    for before, after in ((first, second), (second, third)):
        before.run_step()
        after.load(before.save())
        assert after.step == before.step
        for name, tensor in after.state().items():
            assert torch.equal(tensor.cpu(), before.state()[name].cpu()), name
        after.run_step()


def ended(kind, *argv):
    trained = kind(parsed(*argv), CPU)
    while trained.step < trained.args.iterations:
        trained.run_step()
    return trained.params if kind is Descent else trained.mean.detach()


@pytest.mark.parametrize("kind, usual, changes", [
    (Descent, "--grid 2 --extent 1 --iterations 20", ["--iterations 21", "--extent 1.5", "--family laplace", "--lr 1e-3",
                                                      "--objectives kld fd fd-repar"]),
    (Mixtures, "--family mixture --iterations 3", ["--iterations 4", "--components 3", "--repeats 2", "--lr 1e-2"])])
def test_flags_change_what_they_name(kind, usual, changes):
    base = ended(kind, *usual.split())
    assert torch.equal(ended(kind, *usual.split()), base)
    for change in (*changes, "--seed 1", "--samples 2", "--x 1.5", "--likelihoods relu bias"):
        assert not torch.equal(ended(kind, *usual.split(), *change.split()), base), change


def test_the_target_of_the_gradients_is_that_of_its_flag(monkeypatch):
    asked = []
    monkeypatch.setattr(toy, "gradients_on_a_grid", lambda sd: asked.append(sd) or {})
    toy.gradients_between_gaussians(parsed("--gradients", "--target-sd", 2), CPU, None)
    assert asked == [2.0]


def test_refuses_a_folder_made_with_other_flags(fails, tmp_path):
    argv = ("--gradients", "--out", tmp_path / "run")
    fit(tmp_path / "run", "--gradients")
    assert "target_sd was 0.5, is now 2.0" in fails(toy, *argv, "--target-sd", 2)


@pytest.mark.slow
def test_figure_2_in_short(tmp_path):
    arrays = run(tmp_path / "run", "--iterations", 150_000)
    caught = arrays["caught"].sum(-1)  # [L, I, P]
    assert (caught[0, 0] > 0).all() and caught[0, 0, 1] >= caught[0, 0, 0] and not caught[0, 1:].any() and not caught[1].any()
    assert (np.median(arrays["distance"][1, 0], -1) > 0.5).all() and (np.median(arrays["distance"][1, 1:], -1) < 0.1).all()
