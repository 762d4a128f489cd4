"""A run's folder as its user meets it: runs continue, resume and are redone, and nothing that was there is lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_images
import train_synthetic
import vsm.runs
from models import build_vae
from small_runs import IMAGES, ROOT, SMALL, assert_equal_runs, contents, environment, train
from training import ImageTrainer
from vsm.cli import Stopped, UserError, command_line, while_slow
from vsm.runs import load_arrays, load_checkpoint, save_arrays, status_of

pytestmark = pytest.mark.usefixtures("no_pictures")


def stop_after(monkeypatch, steps, action):
    """The update after the first `steps` of them calls action() before it begins."""
    run_step, calls = train_synthetic.EnsembleTrainer.run_step, []

    def counted(self):
        calls.append(1)
        if len(calls) == steps + 1:
            action()
        run_step(self)

    monkeypatch.setattr(train_synthetic.EnsembleTrainer, "run_step", counted)


def half_a_run(out, monkeypatch, number=signal.SIGTERM, updates=10):
    """A run of 16 updates that a signal stopped in the update after so many; by default in its third epoch of four."""
    argv = [*SMALL, "--epochs", "4", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr("vsm.loop.LOOK_SECONDS", 0)
        stop_after(patch, updates, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as ended:
            command_line(lambda: train_synthetic.parse_args(argv), train_synthetic.main)
    assert ended.value.code == 128 + number


# ------------------------------------------------------------------------------------------------------------ the budget


@pytest.mark.parametrize("budgets, epochs", [((2, 4), [0, 2, 4]), ((3, 5), [0, 2, 4, 5]), ((1, 3, 4), [0, 2, 4])])
def test_a_run_that_goes_on_equals_the_longer_run(tmp_path, budgets, epochs):
    for budget in budgets:
        train(tmp_path / "continued", epochs=budget)
    whole = train(tmp_path / "whole", epochs=budgets[-1])
    assert whole["epoch"].tolist() == epochs
    assert_equal_runs(tmp_path / "continued", tmp_path / "whole")
    assert load_arrays(tmp_path / "continued" / "metrics.npz")["config"]["flags"]["epochs"] == budgets[-1]
    lines = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("continued", "whole")]
    assert len(lines[0]) == len(lines[1]) == 1 + len(epochs) and lines[0][0] == lines[1][0]


def test_an_image_run_that_goes_on_equals_the_longer_run(digits, tmp_path):
    for name, budget in (("continued", 1), ("continued", 3), ("whole", 3)):
        argv = [*IMAGES, "--data-root", str(digits), "--epochs", str(budget), "--out", str(tmp_path / name)]
        train_images.main(train_images.parse_args(argv))
    assert_equal_runs(tmp_path / "continued", tmp_path / "whole")


def test_fewer_epochs_say_so_and_change_nothing(tmp_path, capsys):
    train(tmp_path / "run", epochs=3)
    before, argv = contents(tmp_path / "run"), [*SMALL, "--epochs", "2", "--out", str(tmp_path / "run")]
    capsys.readouterr()
    command_line(lambda: train_synthetic.parse_args(argv), train_synthetic.main)  # does not exit
    assert "finished before (ok), and has 3 epochs already" in capsys.readouterr().out
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("number, updates", [(signal.SIGTERM, 10), (signal.SIGINT, 10), (signal.SIGTERM, 15)])
def test_a_stopped_run_resumes_with_a_line_for_each_evaluation(tmp_path, monkeypatch, capsys, number, updates):
    """The third run is stopped in its last update."""
    half_a_run(tmp_path / "run", monkeypatch, number, updates)
    assert f"stopped by {number.name}" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["trainer"]["step"] == updates + 1
    assert "status" not in load_arrays(tmp_path / "run" / "metrics.npz")
    train(tmp_path / "run", epochs=4)
    train(tmp_path / "whole", epochs=4)
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")
    lines = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "0", "2", "4"]


def test_half_a_run_is_not_cut_short(tmp_path, monkeypatch, fails):
    half_a_run(tmp_path / "run", monkeypatch)
    before = contents(tmp_path / "run")
    message = fails(train_synthetic, *SMALL, "--epochs", 1, "--out", tmp_path / "run")
    assert "has more than 1 epochs already; continue it with --epochs of at least 3" in message
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("script", [train_synthetic, train_images])
def test_a_run_that_lacks_its_last_evaluation_alone_needs_no_further_epoch(digits, tmp_path, fails, script):
    argv = [*SMALL] if script is train_synthetic else [*IMAGES, "--data-root", str(digits)]
    argv += ["--out", str(tmp_path / "run"), "--epochs"]
    script.main(script.parse_args([*argv, "2"]))
    arrays = load_arrays(tmp_path / "run" / "metrics.npz")
    del arrays["status"]
    save_arrays(tmp_path / "run" / "metrics.npz", arrays.pop("config"), **arrays)
    assert "continue it with --epochs of at least 2" in fails(script, *argv, "1")
    script.main(script.parse_args([*argv, "2"]))
    assert status_of(tmp_path / "run") == "ok"


# --------------------------------------------------------------------------------------------------------- --overwrite


def test_overwrite_keeps_the_old_run_until_the_new_one_has_written(tmp_path, fails, monkeypatch):
    train(tmp_path / "run")
    before, write = contents(tmp_path / "run"), vsm.runs.write_atomic

    def full(path, data):
        if path.name == "metrics.npz":
            raise UserError("the disk is full")
        write(path, data)

    again = [*SMALL, "--epochs", 2, "--lr", "0.01", "--overwrite", "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(vsm.runs, "write_atomic", full)
        assert "the disk is full" in fails(train_synthetic, *again)
    assert contents(tmp_path / "run") == before and not (tmp_path / "run" / ".replaced").exists()
    assert train(tmp_path / "run", "--lr", 0.01, "--overwrite")["config"]["flags"]["lr"] == 0.01
    assert not (tmp_path / "run" / ".replaced").exists()


def test_an_overwrite_that_was_killed_before_it_began_is_undone(tmp_path, capsys):
    train(tmp_path / "run")
    before = contents(tmp_path / "run")
    (tmp_path / "run" / ".replaced").mkdir()
    for name in before.keys() - {".lock"}:
        os.replace(tmp_path / "run" / name, tmp_path / "run" / ".replaced" / name)
    capsys.readouterr()
    train(tmp_path / "run")
    assert "finished before" in capsys.readouterr().out and not (tmp_path / "run" / ".replaced").exists()
    assert contents(tmp_path / "run").keys() == before.keys()


# -------------------------------------------------------------------------------------------- folders that are not this run's


def test_a_run_of_another_script_or_of_other_data_is_refused(digits, tmp_path, fails):
    train(tmp_path / "run")
    before = contents(tmp_path / "run")
    argv = [*IMAGES, "--data-root", digits, "--epochs", 1, "--out", tmp_path / "run"]
    assert "data was 'mixture', is now 'spiral'" in fails(train_synthetic, *SMALL, "--data", "spiral", "--out", tmp_path / "run")
    assert "script was 'train_synthetic', is now 'train_images'" in fails(train_images, *argv)
    assert "is a run of train_synthetic.py" in fails(train_images, *argv, "--overwrite")
    assert contents(tmp_path / "run") == before


def test_a_folder_that_is_removed_meanwhile_ends_the_run_and_stays_away(tmp_path, fails, monkeypatch):
    stop_after(monkeypatch, 6, lambda: shutil.rmtree(tmp_path / "run"))
    assert "has been removed or emptied" in fails(train_synthetic, *SMALL, "--epochs", 2, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_foreign_folder_and_its_lock_are_not_touched(tmp_path, fails):
    (tmp_path / ".lock").write_text("another program's")
    (tmp_path / "thesis.tex").write_text("all of it")
    os.utime(tmp_path / ".lock", (0, 0))
    for argv in ([], ["--overwrite"]):
        assert "is not a run folder" in fails(train_synthetic, *SMALL, "--out", tmp_path, *argv)
    assert contents(tmp_path) == {".lock": b"another program's", "thesis.tex": b"all of it"}
    assert (tmp_path / ".lock").stat().st_mtime == 0


@pytest.mark.parametrize("argv", [[], ["--overwrite"]])
def test_the_root_folder_gets_nothing(fails, argv):
    before = {*Path("/").iterdir()}
    assert "is not a run folder" in fails(train_synthetic, *SMALL, "--out", "/", *argv)
    assert {*Path("/").iterdir()} == before


def test_what_a_killed_write_left_is_removed(tmp_path):
    train(tmp_path / "run")
    for name in (".checkpoint.pt.123.tmp", ".metrics.npz.9.tmp"):
        (tmp_path / "run" / name).write_text("half")
    train(tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_finished_run_on_a_read_only_disk_is_finished(tmp_path, capsys):
    train(tmp_path / "run")
    before = contents(tmp_path / "run")
    capsys.readouterr()
    (tmp_path / "run").chmod(0o555)
    try:
        train(tmp_path / "run")
        train(tmp_path / "run", epochs=1)
    finally:
        (tmp_path / "run").chmod(0o755)
    assert capsys.readouterr().out.count("finished before (ok)") == 2
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("saved", ["another seed", {}, None, [1, 2], {"trainer": {}, "history": {}, "seconds": 1.0}])
def test_a_checkpoint_of_something_else_is_refused_and_kept(tmp_path, fails, monkeypatch, saved):
    half_a_run(tmp_path / "run", monkeypatch)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    if saved == "another seed":
        train(tmp_path / "other", "--seed", 5)
        shutil.copy(tmp_path / "other" / "checkpoint.pt", checkpoint)
    else:
        torch.save(saved, checkpoint)
    before = checkpoint.read_bytes()
    message = fails(train_synthetic, *SMALL, "--epochs", 4, "--out", tmp_path / "run")
    assert "is kept as it is" in message and ("another seed" in message) == (saved == "another seed")
    assert checkpoint.read_bytes() == before


# ------------------------------------------------------------------------------------------------------- what happened to my run


def interrupted_evaluation(monkeypatch, number, at):
    """The evaluation number `at` of the next 2-D run, counted from 1, gets a signal when it begins. Returns the calls to it."""
    measure, calls = train_synthetic.measure, []

    def signalled(*args):
        calls.append("begun")
        if len(calls) == at:
            os.kill(os.getpid(), number)
        row = measure(*args)
        calls[-1] = "ended"
        return row

    monkeypatch.setattr(train_synthetic, "measure", signalled)
    return calls


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_an_evaluation_at_once_and_the_run_resumes_from_it(tmp_path, monkeypatch, capfd, number, at):
    argv = [*SMALL, "--epochs", "4", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)  # whatever started the tests ignores
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        calls = interrupted_evaluation(patch, number, at)
        command_line(lambda: train_synthetic.parse_args(argv), train_synthetic.main)
    assert ended.value.code == 128 + number and calls[-1] == "begun"
    assert "resumes from the checkpoint just written" in capfd.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["trainer"]["step"] == 8 * (at - 1)
    train(tmp_path / "run", epochs=4)
    assert f"resumes at epoch {2 * (at - 1)} of 4" in capfd.readouterr().out
    train(tmp_path / "whole", epochs=4)
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


def test_a_stopped_overwrite_resumes_without_the_flag(tmp_path, monkeypatch):
    train(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        interrupted_evaluation(patch, signal.SIGTERM, 1)
        train(tmp_path / "run", "--lr", 0.01, "--overwrite")
    assert train(tmp_path / "run", "--lr", 0.01)["config"]["flags"]["lr"] == 0.01
    assert not (tmp_path / "run" / ".replaced").exists()


def test_the_last_row_of_a_run_killed_after_an_evaluation_off_the_grid_is_right(tmp_path, monkeypatch):
    """Killed between the row of epoch 3, which evaluations every 2 epochs do not have, and the end; then continued."""
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_synthetic, "evaluate", killed)
        train(tmp_path / "run", epochs=3)
    assert train(tmp_path / "run", epochs=3)["epoch"].tolist() == [0, 2, 3]
    train(tmp_path / "three", epochs=3)
    assert_equal_runs(tmp_path / "run", tmp_path / "three")
    train(tmp_path / "run", epochs=5)
    train(tmp_path / "five", epochs=5)
    assert_equal_runs(tmp_path / "run", tmp_path / "five")


def test_a_finished_run_says_that_more_epochs_continue_it(tmp_path, capsys):
    train(tmp_path / "run")
    train(tmp_path / "run")
    assert "finished before (ok); --overwrite redoes it, more --epochs continue it" in capsys.readouterr().out
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    torch.save(saved | {"seconds": 1000.0}, tmp_path / "run" / "checkpoint.pt")
    assert train(tmp_path / "run", epochs=4)["seconds"][-1] > 1000  # those of the first half count
    assert f"{tmp_path}/run: resumes at epoch 2 of 4" in capsys.readouterr().out


def test_too_few_minibatches_for_a_decoder_update_are_refused(digits, tmp_path, fails):
    argv = [*IMAGES, "--data-root", digits, "--epochs", 1, "--out", tmp_path / "run", "--inner-steps"]
    assert "6 minibatches in all are fewer than the 7 of one decoder update" in fails(train_images, *argv, 7)
    assert not (tmp_path / "run").exists()


def test_progress_shows_no_loss_that_is_not_there_yet():
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    trainer = ImageTrainer(build_vae("mlp", (1, 2, 2), 2, width=3), images, learn="fd", infer="kld", estimator="plugin",
                           samples=1, inner_steps=2, noise=0.1, batch=4, lr=1e-3, seed=0)
    assert not {"infer", "learn"} & trainer.progress(1.0).keys()
    trainer.run_step()
    assert "infer" in trainer.progress(1.0) and "learn" not in trainer.progress(1.0)


def test_a_slow_evaluation_is_announced_and_a_fast_one_is_not(capsys):
    for seconds, words in ((0, "evaluating 7 images"), (30, "")):
        with while_slow("evaluating 7 images", seconds):
            time.sleep(0.2)
        assert words in capsys.readouterr().err


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = train_images.parse_args(["--out=~/x", "--data-root=~/data"])
    assert (args.out, args.data_root) == ("/home/me/x", "/home/me/data")


def test_neither_the_backend_nor_the_matplotlibrc_of_the_user_matters(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    hostile = environment() | {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MATPLOTLIBRC": str(tmp_path)}
    ended = subprocess.run([sys.executable, ROOT / "train_synthetic.py", *SMALL, "--epochs", "1", "--out", tmp_path / "run"],
                           env=hostile, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "samples.png").exists()
