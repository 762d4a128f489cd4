"""A run's folder as its user meets it: runs continue, resume, are redone, lose nothing, and go side by side by one command."""

import fcntl
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import small_runs
import toy_inference
import train_images
import train_synthetic
import vsm.runs
from small_runs import IMAGES, SMALL, assert_equal_runs, contents, edit_arrays, main, run_steps, stop_after, train, train_on
from train_synthetic import EnsembleTrainer
from training import ImageTrainer
from vsm import flags, loop
from vsm.cli import Stopped, UserError, command_line, while_slow
from vsm.many_runs import Counted, combinations, in_lockstep, names_of, report_stop, shares
from vsm.names import run_name
from vsm.runs import load_arrays, load_checkpoint, status_of
from vsm.toys.descent import Descent

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(epochs) is the folder of an undisturbed 2-D run. For reading only."""
    @functools.cache
    def run(epochs):
        train(out := tmp_path_factory.mktemp("whole") / "run", epochs=epochs)
        return out
    return run


def half_a_run(out, monkeypatch, number=signal.SIGTERM, updates=10):
    """A run of 16 updates that a signal stopped in the update after so many; by default in its third epoch of four."""
    argv = [*SMALL, "--epochs", "4", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr("vsm.loop.LOOK_SECONDS", 0)
        stop_after(patch, EnsembleTrainer, updates, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as ended:
            command_line(lambda: train_synthetic.parse_args(argv), train_synthetic.main)
    assert ended.value.code == 128 + number


@pytest.mark.parametrize("budgets, epochs", [((2, 4), [0, 2, 4]), ((3, 5), [0, 2, 4, 5]), ((1, 3, 4), [0, 2, 4])])
def test_a_run_that_goes_on_equals_the_longer_run(tmp_path, whole, budgets, epochs):
    for budget in budgets:
        train(tmp_path / "continued", epochs=budget)
    runs = tmp_path / "continued", whole(budgets[-1])
    assert_equal_runs(*runs)
    arrays = load_arrays(runs[0] / "metrics.npz")
    assert arrays["epoch"].tolist() == epochs and arrays["config"]["flags"]["epochs"] == budgets[-1]
    lines = [(run / "log.csv").read_text().splitlines() for run in runs]
    assert len(lines[0]) == len(lines[1]) == 1 + len(epochs) and lines[0][0] == lines[1][0]


def test_an_image_run_that_goes_on_equals_the_longer_run(digits, tmp_path):
    for name, budget in (("continued", 1), ("continued", 3), ("whole", 3)):
        train_on(digits, tmp_path / name, "--epochs", budget)
    assert_equal_runs(tmp_path / "continued", tmp_path / "whole")


@pytest.mark.parametrize("argv", [[], ["--net", "conv", "--learn", "bao", "--samples", 2],
                                  pytest.param(["--net", "conv", "--learn", "fae"], marks=pytest.mark.slow)])
def test_a_run_killed_in_the_middle_of_an_epoch_equals_an_undisturbed_one(digits, tmp_path, monkeypatch, argv):
    """It has a checkpoint at every step, the last one before the update that the kill prevents. Without flags: a 2-D run."""
    def run(name):
        return train_on(digits, tmp_path / name, "--epochs", 2, *argv) if argv else train(tmp_path / name)
    monkeypatch.setattr(loop, "LOOK_SECONDS", 0)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    run("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, ImageTrainer if argv else EnsembleTrainer, 7)
        run("halved")
    assert load_checkpoint(tmp_path / "halved" / "checkpoint.pt")["trainer"]["step"] == 7
    assert "status" not in load_arrays(tmp_path / "halved" / "metrics.npz")
    run("halved")
    assert_equal_runs(tmp_path / "whole", tmp_path / "halved")


@pytest.mark.parametrize("number, updates", [(signal.SIGTERM, 10), (signal.SIGINT, 10), (signal.SIGTERM, 15)])
def test_a_stopped_run_resumes_with_a_line_for_each_evaluation(tmp_path, whole, monkeypatch, capsys, number, updates):
    """The third run is stopped in its last update."""
    half_a_run(tmp_path / "run", monkeypatch, number, updates)
    assert f"stopped by {number.name}" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["trainer"]["step"] == updates + 1
    assert "status" not in load_arrays(tmp_path / "run" / "metrics.npz")
    train(tmp_path / "run", epochs=4)
    assert_equal_runs(tmp_path / "run", whole(4))
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
    argv = [*(SMALL if script is train_synthetic else [*IMAGES, "--data-root", digits]), "--out", tmp_path / "run", "--epochs"]
    main(script, *argv, 2)
    edit_arrays(tmp_path / "run" / "metrics.npz", status=None)
    assert "continue it with --epochs of at least 2" in fails(script, *argv, "1")
    main(script, *argv, 2)
    assert status_of(tmp_path / "run") == "ok"


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
    assert contents(tmp_path / "run") == before
    (tmp_path / "run" / "eval.npz").write_text("of the old run")
    assert train(tmp_path / "run", "--lr", 0.01, "--overwrite")["config"]["flags"]["lr"] == 0.01
    assert contents(tmp_path / "run").keys() == before.keys()


def test_an_overwrite_that_is_killed_before_it_writes_leaves_the_old_run(tmp_path, monkeypatch):
    train(tmp_path / "run")
    before = contents(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, train_synthetic, 0, name="measure")
        train(tmp_path / "run", "--lr", 0.01, "--overwrite")
    assert contents(tmp_path / "run") == before


def test_every_file_that_the_new_run_writes_stays(tmp_path):
    for value in (1, 2):
        with vsm.runs.Run(tmp_path / "run", "audit", {"value": value}, small_runs.CPU, overwrite=True) as run:
            run.write("audit.md", f"{value}".encode())
            run.save_metrics(status="ok")
        (tmp_path / "run" / "old.png").write_text("")
    assert (tmp_path / "run" / "audit.md").read_text() == "2" and status_of(tmp_path / "run") == "ok"


def test_a_run_of_another_script_or_of_other_data_is_refused(digits, tmp_path, fails):
    train(tmp_path / "run")
    before = contents(tmp_path / "run")
    argv = [*IMAGES, "--data-root", digits, "--epochs", 1, "--out", tmp_path / "run"]
    message = fails(train_synthetic, *SMALL, "--data", "spiral", "--seed", 3, "--out", tmp_path / "run")
    assert "data was 'mixture', is now 'spiral'" in message and "seed was 0, is now 3" in message
    assert "is a run of train_synthetic.py; choose another --out" in fails(train_images, *argv)
    assert "is a run of train_synthetic.py" in fails(train_images, *argv, "--overwrite") and contents(tmp_path / "run") == before


def test_a_folder_that_is_removed_meanwhile_ends_the_run_and_stays_away(tmp_path, fails, monkeypatch):
    stop_after(monkeypatch, EnsembleTrainer, 6, lambda: shutil.rmtree(tmp_path / "run"))
    assert "has been removed or emptied" in fails(train_synthetic, *SMALL, "--epochs", 2, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_foreign_folder_its_lock_and_the_root_are_not_touched(tmp_path, fails):
    (tmp_path / "file").write_text("mine")
    assert "file is a file; choose another --out" in fails(train_synthetic, *SMALL, "--out", tmp_path / "file")
    (tmp_path / ".lock").write_text("another program's")
    (tmp_path / "thesis.tex").write_text("all of it")
    os.utime(tmp_path / ".lock", (0, 0))
    for config in (None, '{"model_type": "another program\'s"}'):
        if config:
            (tmp_path / "config.json").write_text(config)
        before = contents(tmp_path), {*Path("/").iterdir()}
        for out, argv in itertools.product((tmp_path, "/"), ([], ["--overwrite"])):
            assert "is not a run folder" in fails(train_synthetic, *SMALL, "--out", out, *argv)
        assert (contents(tmp_path), {*Path("/").iterdir()}) == before
    assert (tmp_path / ".lock").stat().st_mtime == 0


def test_what_a_killed_write_left_is_removed(tmp_path):
    train(tmp_path / "run")
    for name in (".checkpoint.pt.123.tmp", ".metrics.npz.9.tmp", ".curves.png.9.tmp", ".eval.npz.9.tmp"):
        (tmp_path / "run" / name).write_text("half")
    train(tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").glob(".*.tmp")] == [".eval.npz.9.tmp"]  # evaluate.py may be writing it


def test_a_finished_run_is_finished_with_fewer_epochs_too_and_on_a_read_only_disk(tmp_path, capsys):
    train(tmp_path / "run")
    before = contents(tmp_path / "run")
    capsys.readouterr()
    (tmp_path / "run").chmod(0o555)
    try:
        train(tmp_path / "run")
        train(tmp_path / "run", epochs=1)
    finally:
        (tmp_path / "run").chmod(0o755)
    printed = capsys.readouterr().out
    assert "finished before (ok); --overwrite redoes it, more --epochs continue it" in printed
    assert "finished before (ok), and has 2 epochs already" in printed and contents(tmp_path / "run") == before
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    torch.save(saved | {"seconds": 1000.0}, tmp_path / "run" / "checkpoint.pt")
    assert train(tmp_path / "run", epochs=4)["seconds"][-1] > 1000  # those of the first half count
    assert f"{tmp_path}/run: resumes at epoch 2 of 4" in capsys.readouterr().out


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


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_an_evaluation_at_once_and_the_run_resumes_from_it(tmp_path, whole, monkeypatch, capfd, number, at):
    argv = [*SMALL, "--epochs", "4", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)  # whatever started the tests ignores
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        calls = stop_after(patch, train_synthetic, at - 1, lambda: os.kill(os.getpid(), number), name="measure")
        command_line(lambda: train_synthetic.parse_args(argv), train_synthetic.main)
    assert ended.value.code == 128 + number and calls[-1] == "begun"
    assert "resumes from the checkpoint just written" in capfd.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["trainer"]["step"] == 8 * (at - 1)
    train(tmp_path / "run", epochs=4)
    assert f"resumes at epoch {2 * (at - 1)} of 4" in capfd.readouterr().out
    assert_equal_runs(tmp_path / "run", whole(4))


def test_a_stopped_overwrite_resumes_without_the_flag(tmp_path, monkeypatch):
    train(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, train_synthetic, 0, lambda: os.kill(os.getpid(), signal.SIGTERM), name="measure")
        train(tmp_path / "run", "--lr", 0.01, "--overwrite")
    assert train(tmp_path / "run", "--lr", 0.01)["config"]["flags"]["lr"] == 0.01


def test_the_last_row_of_a_run_killed_after_an_evaluation_off_the_grid_is_right(tmp_path, whole, monkeypatch):
    """Killed between the row of epoch 3, which evaluations every 2 epochs do not have, and the end; then continued."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, train_synthetic, 0, name="evaluate")
        train(tmp_path / "run", epochs=3)
    assert train(tmp_path / "run", epochs=3)["epoch"].tolist() == [0, 2, 3]
    assert_equal_runs(tmp_path / "run", whole(3))
    train(tmp_path / "run", epochs=5)
    assert_equal_runs(tmp_path / "run", whole(5))


@pytest.mark.parametrize("make", [
    small_runs.image_trainer, lambda: EnsembleTrainer(train_synthetic.parse_args(SMALL), small_runs.CPU),
    lambda: Descent(toy_inference.parse_args(["--grid", "2", "--iterations", "1100"]), small_runs.CPU)])
def test_a_checkpoint_from_another_kind_of_device_goes_on_with_new_noise_the_same_at_every_resume(make):
    """A GPU's generators have states of another size."""
    first, resumed = run_steps(make(), 1), [make(), make()]
    saved = first.save() | {"generators": [torch.zeros(16, dtype=torch.uint8) for _ in first.generators]}
    for trainer in resumed:
        trainer.load(saved)
        assert trainer.step == first.step
        torch.testing.assert_close(trainer.state(), first.state(), rtol=0, atol=0, equal_nan=True)
        streams = {bytes(generator.get_state().tolist()) for generator in (*trainer.generators, *make().generators)}
        assert len(streams) == 2 * len(first.generators)
        run_steps(trainer, 1)
    torch.testing.assert_close(*(trainer.state() for trainer in resumed), rtol=0, atol=0, equal_nan=True)


def test_progress_shows_no_loss_that_is_not_there_yet():
    trainer = small_runs.image_trainer(inner_steps=2)
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


SIDE = [*IMAGES, "--inner-steps", "1", "--eval-every", "1"]


def assert_equals_one_alone(digits, run, *argv):
    train_on(digits, run.parent / "alone", *SIDE[len(IMAGES):], *argv)
    assert_equal_runs(run.parent / "alone", run)


def script(digits, folder, *argv):
    return subprocess.Popen([sys.executable, str(small_runs.ROOT / "train_images.py"), *SIDE, "--data-root", str(digits), *argv],
                            cwd=folder, env=small_runs.environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_combinations_of_values_the_first_flag_slowest_and_names_of_what_differs():
    parser = train_images.image_parser()
    assert combinations(["--learn", "elbo", "fd", "--no-graph", "--seed", "3", "4"], parser) == [
        ["--learn", learn, "--no-graph", "--seed", seed] for learn in ("elbo", "fd") for seed in "34"]
    assert combinations([], parser) == [[]]
    assert names_of(["runs/mnist-elbo-lr1-seed0", "runs/mnist-fd-lr1-seed1"]) == {
        "runs/mnist-elbo-lr1-seed0": "elbo-seed0", "runs/mnist-fd-lr1-seed1": "fd-seed1"}
    done = [0, 1]
    Counted(done, 10, 6).update()  # of a run that goes on after six updates of ten
    assert shares({"a": "seed0"}, {"a": done}) == "seed0 70%"


WHERE_AND_HOW = {"out", "overwrite", "device", "data_root", "no_graph", "jobs", "epochs", "compile"}


@pytest.mark.parametrize("parser, defaults, axes", [
    (flags.image_parser, flags.image_defaults, flags.IMAGE_AXES),
    (flags.synthetic_parser, flags.synthetic_defaults, flags.SYNTHETIC_AXES)])
def test_a_run_of_another_value_of_a_flag_is_another_run(parser, defaults, axes):
    """It has another folder and another identity, whichever flag it is, but for those that say where and how to compute."""
    usual, same = defaults(), set()
    for key, value in usual.items():
        other = SimpleNamespace(**usual | {key: not value if isinstance(value, bool) else f"{value}x"})
        names = {run_name(run, axes, usual) for run in (SimpleNamespace(**usual), other)}
        identities = [vsm.runs.identity_of({"script": "x", "flags": vars(run)}) for run in (SimpleNamespace(**usual), other)]
        assert (len(names) == 2) == (identities[0] != identities[1]), key
        same |= {key} if len(names) == 1 else set()
    assert same == {*usual} & WHERE_AND_HOW


@pytest.mark.parametrize("argv, words", [("--seed 1 2 2", "seed2; give no value twice"), ("--seed 1 2 --out x", "would write x;"),
                                         ("--precision float32 tf32", "holds for a whole process")])
def test_runs_that_cannot_share_a_command_are_refused(argv, words, capsys):
    with pytest.raises(SystemExit):
        train_images.parse_runs(argv.split())
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [("--inner-steps 1 7 --epochs 1", "the 7 of one"), ("--batch 20 301", "301 is more")])
def test_every_run_of_a_sweep_needs_enough_images(digits, argv, words):
    with pytest.raises(UserError, match=words):
        train_images.main_of_runs(train_images.parse_runs([*IMAGES, "--data-root", str(digits), *argv.split()]))


def test_a_continued_run_that_is_stopped_has_not_ended(tmp_path, monkeypatch):
    train(tmp_path / "run", epochs=2)
    half_a_run(tmp_path / "run", monkeypatch, updates=2)
    arrays = load_arrays(tmp_path / "run" / "metrics.npz")
    assert "status" not in arrays and arrays["epoch"].tolist() == [0, 2]


def test_a_stopped_sweep_names_what_failed_and_what_had_not_begun(capsys):
    report_stop({"a": "seed0", "b": "seed1"}, {"a": "no disk"}, ["b"])
    failed, not_begun = capsys.readouterr().err.splitlines()
    assert failed == "seed0 failed: no disk" and not_begun.startswith("not begun: seed1; if --overwrite")
    report_stop({}, {})
    assert not capsys.readouterr().err


def test_a_sweep_makes_the_network_of_fid_once_before_its_processes_begin(digits, monkeypatch):
    seen = []
    monkeypatch.setattr(train_images, "features_of", lambda name, *_: seen.append(name))
    monkeypatch.setattr(train_images, "in_processes", lambda *_: seen.append("processes"))
    train_images.main_of_runs(train_images.parse_runs([*SIDE, "--data-root", str(digits), *"--fid-every 0 1 --seed 0 1".split()]))
    assert seen == ["mnist", "processes"]


def test_processes_give_the_bits_of_runs_alone_and_a_failure_leaves_the_others_alone(digits, tmp_path):
    one, other = (tmp_path / train_images.parse_args([*SIDE, "--learn", "elbo", "--seed", seed]).out for seed in "01")
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"script": "train_images", "flags": {"learn": "bao"}}')
    process = script(digits, tmp_path, "--learn", "elbo", "--seed", "0", "1", "2", "--epochs", "2", "--jobs", "2")
    out, error = process.communicate(timeout=200)
    assert process.returncode == 2 and "3 runs: 2 ok, in runs/images\n" in out and out.count("may not arrive") == 1
    assert "1 of 3 runs failed: seed1: " in error and "was made with other flags" in error
    assert_equals_one_alone(digits, one, "--learn", "elbo", "--epochs", 2)


def test_lockstep_gives_the_bits_of_runs_alone(digits, tmp_path, monkeypatch):
    argv = [*SIDE, "--data-root", str(digits), "--epochs", "2"]
    runs = [train_images.parse_args([*argv, "--learn", learn, "--out", str(tmp_path / learn)]) for learn in ("swersky", "elbo")]
    arguments = {args.out: (args, train_images.load(args), small_runs.CPU) for args in runs}

    def begin(args, *rest, **options):
        if args.learn == "elbo":
            raise ValueError("this one fails")
        yield from train_images.begin(args, *rest, **options)

    shown = []
    monkeypatch.setenv("VSM_TRACEBACK", "1")
    monkeypatch.setattr("traceback.print_exc", lambda file: shown.append(file))
    with pytest.raises(UserError, match="1 of 2 runs failed: elbo: ValueError: this one fails"):
        in_lockstep(arguments, begin, small_runs.CPU)
    assert shown == [sys.__stderr__]  # a child has no other stderr
    assert_equals_one_alone(digits, tmp_path / "swersky", "--learn", "swersky", "--epochs", 2)


def test_a_sweep_starts_no_threads_before_it_forks(digits, tmp_path):
    """Images that are made with several threads, as glyphs are at the first call, must not leave its children waiting."""
    (tmp_path / "parallel.py").write_text(
        "import torch, data\nload = data.DATA_SETS['mnist']\n"
        "data.DATA_SETS['mnist'] = lambda root: (torch.randn(400, 400, 50).exp().sum(), load(root))[1]\n")
    environment = small_runs.environment() | {"OMP_NUM_THREADS": "2", "VSM_IMPORT": "parallel", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, small_runs.ROOT / "train_images.py", *SIDE, "--data-root", digits, "--epochs", 1, "--seed", 0, 1]
    subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, timeout=300, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("numbers, code, message", [
    ([signal.SIGINT], 130, "resumes"), ([signal.SIGINT] * 2, 130, "interrupted"), ([signal.SIGKILL], -9, "")])
def test_a_signal_stops_all_with_checkpoints_and_the_command_goes_on(digits, tmp_path, numbers, code, message):
    """After SIGKILL, which ends the first process alone, and after two quick signals the others must not train on."""
    command = ["--seed", "0", "1", "--epochs", "40", "--jobs", "2"]
    process, folder = script(digits, tmp_path, *command), tmp_path / "runs" / "images"
    while len(list(folder.glob("*/checkpoint.pt"))) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.1)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code and message in error
    for path in folder.glob("*/.lock"):
        with open(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
    assert not any("status" in load_arrays(path) for path in folder.glob("*/metrics.npz"))
    process = script(digits, tmp_path, *command)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and "2 runs: 2 ok" in out
    assert_equals_one_alone(digits, next(folder.glob("*seed0")), "--epochs", 40)
