"""The recipes of docs/machines.md: the batch script by itself with a stand-in for Slurm, and (slow) that with xargs."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from small_runs import ROOT, SMALL, assert_equal_runs, environment, train
from vsm.runs import load_arrays

FOLDER = Path(__file__).parent / "cluster"
PATIENCE = 600  # seconds: a busy machine may be slow


def start(tmp_path, *lines, task=1, file="commands.txt"):
    """The batch script as task `task` of an array over `lines`, in commands.txt; `scontrol` writes its words to calls.txt."""
    (tmp_path / "commands.txt").write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho $* >>calls.txt\n")
    (tmp_path / "scontrol").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "7"}
    return subprocess.Popen(["bash", FOLDER / "array.sbatch", *filter(None, [file])], cwd=tmp_path, env=environment)


def wait_for(path):
    begun = time.monotonic()
    while not path.exists():
        assert time.monotonic() < begun + PATIENCE, f"{path} did not appear"
        time.sleep(0.05)


def test_a_task_runs_its_line_and_ends_with_its_exit_code(tmp_path):
    assert start(tmp_path, "exit 3", "echo 'one; two' >line.txt; exit 2", task=2).wait(PATIENCE) == 2
    assert (tmp_path / "line.txt").read_text() == "one; two\n"
    assert start(tmp_path, "true\r", "echo one >line.txt\r", task=2).wait(PATIENCE) == 0  # line ends of Windows
    assert (tmp_path / "line.txt").read_text() == "one\n"
    assert not (tmp_path / "calls.txt").exists()


@pytest.mark.parametrize(("file", "task"), [("commands.txt", 0), ("commands.txt", 3), ("commands.txt", 2), ("comands.txt", 1),
                                            (None, 1)])
def test_a_task_without_a_command_fails_with_a_sentence(tmp_path, capfd, file, task):
    assert start(tmp_path, "true\r", "\r", task=task, file=file).wait(PATIENCE) == 2
    assert f"{file or 'no file'} has no command in line {task}" in capfd.readouterr().err


PYTHON = "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); " \
         "pathlib.Path('ready').touch(); time.sleep(600)"


@pytest.mark.parametrize("line, code, calls", [
    *((f'{word}{sys.executable} -c "{PYTHON}"', 143, "requeue 7\n") for word in ("", "true && ")),
    ("trap 'exit 0' TERM; touch ready; while :; do sleep 0.1; done", 0, None)], ids=["replaced", "parent", "ended"])
def test_near_the_time_limit_the_command_gets_sigterm_and_the_task_is_requeued_unless_it_ends(tmp_path, line, code, calls):
    """Bash becomes a single command, and is the parent of the last of two."""
    process = start(tmp_path, line)
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE) == code
    assert (tmp_path / "calls.txt").exists() == bool(calls) and (not calls or (tmp_path / "calls.txt").read_text() == calls)


@pytest.mark.slow
def test_a_killed_run_of_the_recipe_with_xargs_resumes_and_ends_with_the_same_bits(tmp_path):
    """The line of docs/machines.md ends with 125 where a command is killed, and finishes the runs when it is started again."""
    flags = [*SMALL, "--steps-per-epoch", "100", "--eval-every", "1", "--epochs", "12"]
    folders = {place: [tmp_path / place / str(seed) for seed in range(3)] for place in ("alone", "killed")}
    for folder in folders["alone"]:
        train(folder, *flags, "--seed", folder.name, epochs=12)
    lines = [shlex.join([sys.executable, str(ROOT / "train_synthetic.py"), *flags, "--seed", folder.name, "--out", str(folder)])
             for folder in folders["killed"]]
    first, recipe = folders["killed"][0], ["xargs", "-d", "\n", "-n", "1", "-P", "2", "sh", "-c"]
    (tmp_path / "commands.txt").write_text("\n".join(lines))
    with open(tmp_path / "commands.txt") as commands:
        process = subprocess.Popen(recipe, stdin=commands, env=environment())
    wait_for(first / "log.csv")
    subprocess.run(["pkill", "-KILL", "-f", str(first)], check=True)
    assert process.wait(PATIENCE) == 125 and "status" not in load_arrays(first / "metrics.npz")
    rows = load_arrays(first / "metrics.npz")["seconds"]
    with open(tmp_path / "commands.txt") as commands:
        subprocess.run(recipe, stdin=commands, env=environment(), check=True)
    assert load_arrays(first / "metrics.npz")["seconds"][:len(rows)].tolist() == rows.tolist()  # it has resumed
    for one, other in zip(*folders.values()):
        assert_equal_runs(one, other)
