"""A run that is killed, anywhere and by any signal, loses nothing: the same command ends as if nothing had happened.

    pytest -m slow tests/test_kills.py -s     # a hundred kills of each training script, by SIGKILL, SIGTERM and SIGINT
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

import dying
import train_images
import vsm.runs
from small_runs import CPU, IMAGES, ROOT, SMALL, assert_equal_runs, environment, main
from vsm.cli import Stopped, UserError
from vsm.many_runs import in_processes
from vsm.runs import load_arrays, load_checkpoint


def forked(action, fatal=None):
    """The exit code of action() in a child process, which SIGKILL ends at its moment `fatal`."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        dying.arm(signal.SIGKILL, fatal)
        action()
        code = 0
    finally:
        os._exit(code)


def bare_run(out, value, overwrite=False):
    """Write all that a run writes, without any training."""
    with vsm.runs.Run(out, "train_synthetic", {"value": value}, CPU, overwrite) as run:
        if not run.status:
            run.load_checkpoint()
            run.save_metrics(value=np.array(value))
            run.save_checkpoint({"value": value})
            run.save_metrics(value=np.array(value), status="ok")


def test_an_unfinished_run_from_before_a_flag_was_there_goes_on(tmp_path, no_git):
    """A flag that a folder or a checkpoint lacks counts as None, its default; any other value is refused."""
    with vsm.runs.Run(tmp_path / "run", "train_synthetic", {"seed": 1}, CPU) as run:
        run.save_checkpoint({"value": 7})
    with vsm.runs.Run(tmp_path / "run", "train_synthetic", {"seed": 1, "newer": None}, CPU) as run:
        assert run.load_checkpoint() == {"value": 7}
        run.config["flags"]["newer"] = 3
        with pytest.raises(UserError, match="other flags or another seed"):
            run.load_checkpoint()


def stops_the_sweep_and_sleeps(seconds, bar):
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(seconds)


def test_a_signal_ends_a_process_that_does_not_train_yet():
    began = time.monotonic()
    with pytest.raises(Stopped):
        in_processes({"a": (20,), "b": (20,)}, stops_the_sweep_and_sleeps, jobs=1)
    assert time.monotonic() - began < 15


def values_in(folder):
    return {int(load_arrays(file)["value"]) for file in folder.glob("metrics.npz")}


@pytest.fixture
def no_git(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.slow
def test_a_run_survives_a_kill_inside_any_write(tmp_path, no_git):
    for fatal in range(1, 200):
        out = tmp_path / str(fatal)
        code = forked(lambda: bare_run(out, 1), fatal)
        assert forked(lambda: bare_run(out, 1)) == 0 and vsm.runs.status_of(out) == "ok"
        assert {file.name for file in out.iterdir()} == {".lock", "config.json", "metrics.npz", "checkpoint.pt"}
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 and fatal > 20


@pytest.mark.parametrize("firsts, seconds", [
    (range(1, 200, 10), [4, 30]), pytest.param(range(1, 200), range(1, 200), marks=pytest.mark.slow)], ids=["some", "all"])
def test_an_overwrite_survives_two_kills_inside_any_writes(tmp_path, no_git, firsts, seconds):
    """Either the old run or the new one has its arrays at any time, and the same command succeeds in the end."""
    bare_run(tmp_path / "old", 1)
    for first in firsts:
        for second in seconds:
            out, codes = shutil.copytree(tmp_path / "old", tmp_path / f"{first}-{second}"), []
            for fatal in (first, second):
                codes.append(forked(lambda: bare_run(out, 2, overwrite=True), fatal))
                assert values_in(out), (first, second)
            assert forked(lambda: bare_run(out, 2, overwrite=True)) == 0 and values_in(out) == {2}
            assert {file.name for file in out.iterdir()} == {".lock", "config.json", "metrics.npz", "checkpoint.pt"}
            if codes[1] == 0:
                break
        if codes[0] == 0:
            break
    assert codes[0] == 0 and first > 20


@contextlib.contextmanager
def processes(script, output, redirection=""):
    """run(argv, number, fatal, delay) -> the exit code of `python SCRIPT.py ARGV`, which gets the signal `number` at its moment.

    All of these processes are forks of one real `python SCRIPT.py`, made after its imports: see tests/dying.py. The file `output`
    holds what the last one prints.
    """
    hook = {"VSM_IMPORT": "dying", "PYTHONPATH": str(ROOT / "tests"), "DIE_HERE": "1"}
    command = ["bash", "-c", f'exec "$@" {redirection}', "-", sys.executable, ROOT / f"{script}.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment() | hook, **pipes) as process:
        def run(argv, number=0, fatal=0, delay=0.0):
            order = {"argv": [*map(str, argv)], "output": str(output), "number": number, "fatal": fatal, "delay": delay}
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield run


def moments_of(output):
    return int(output.read_text().split()[-2])


def test_a_signal_ends_a_process_with_its_code_and_the_run_resumes(digits, tmp_path):
    """The process has no stderr, as after 2>&- in a shell."""
    argv = [*IMAGES, "--data-root", str(digits), "--epochs", "4", "--out"]
    with processes("train_images", tmp_path / "output", "2>&-") as run:
        for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
            out = tmp_path / number.name
            assert run([*argv, out], number, 80) == code and "status" not in load_arrays(out / "metrics.npz")
            assert load_checkpoint(out / "checkpoint.pt")["trainer"]["step"] > 0
    for name in ("SIGTERM", "SIGKILL", "whole"):
        main(train_images, *argv, tmp_path / name)
    for name in ("SIGTERM", "SIGKILL"):
        assert_equal_runs(tmp_path / name, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("script, argv", [("train_synthetic", SMALL), ("train_images", IMAGES)])
def test_a_hundred_kills_change_no_bit(digits, tmp_path, script, argv):
    """Half of the kills come exactly at a moment of `dying`, the others up to a tenth of a second later."""
    argv = [*argv, "--epochs", 5, *(["--data-root", digits] if script == "train_images" else []), "--out"]
    plain = subprocess.run([sys.executable, ROOT / f"{script}.py", *map(str, argv), tmp_path / "whole"], env=environment(),
                           check=False, capture_output=True, text=True)
    assert plain.returncode == 0, plain.stderr
    rng, kills, turn, output = random.Random(0), Counter(), 0, tmp_path / "output"
    with processes(script, output) as run:
        assert run([*argv, tmp_path / "counted"]) == 0, output.read_text()
        assert_equal_runs(tmp_path / "whole", tmp_path / "counted")
        total = moments_of(output)
        while kills.total() < 100:
            turn, code = turn + 1, None
            out = tmp_path / str(turn)
            while code != 0:
                number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
                fatal, delay = rng.randint(1, total // 2), rng.choice([0, rng.uniform(0, 0.1)])
                code = run([*argv, out], number, fatal, delay)
                what = f"{number.name} at moment {fatal} and {delay:.3f} s, run {turn}, code {code}:\n{output.read_text()}"
                assert code in (0, -number, 128 + number), what
                assert delay or code or moments_of(output) < fatal, what  # no signal is lost
                if code:
                    kills[number.name, code] += 1
                    print(f"{script}, kill {kills.total()}: {what.splitlines()[0]}", flush=True)
            assert_equal_runs(tmp_path / "whole", out)
            assert {file.name for file in out.iterdir()} == {".lock", "config.json", "metrics.npz", "checkpoint.pt", "log.csv"}
    print(f"{script}: {turn} runs of {total} moments each; kills by signal and exit code: "
          + ", ".join(f"{name} {code}: {n}" for (name, code), n in sorted(kills.items())))
