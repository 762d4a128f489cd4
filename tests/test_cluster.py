"""The recipes of docs/machines.md: the batch script by itself with a stand-in for Slurm, and (slow) each recipe for real."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "cluster"
PATIENCE = 600  # seconds: a busy machine may be slow
NEEDS = {"xargs": ["xargs"], "ssh": ["parallel", "ssh", "sshd"], "slurm": ["slurmctld", "slurmd", "munged", "sbatch"]}


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
@pytest.mark.parametrize("recipe", NEEDS)
def test_disturbed_runs_equal_undisturbed_ones(recipe):
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if missing := [program for program in NEEDS[recipe] if not shutil.which(program, path=path)]:
        pytest.skip(f"needs {', '.join(missing)}")
    command = [sys.executable, FOLDER / "check.py", recipe, "--runs", "6"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{recipe}: 6 runs")
