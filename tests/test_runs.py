"""A run's folder as its user meets it: runs continue, resume and are redone, and nothing that was there is lost."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_images
import train_synthetic
import vsm.runs
from vsm.cli import UserError, command_line
from vsm.runs import LONGEST_NAME, load_arrays, load_checkpoint

ROOT = Path(__file__).parent.parent
SMALL = ["--seeds", "2", "--batch", "20", "--hidden", "6", "--inner-steps", "2", "--steps-per-epoch", "4", "--eval-every",
         "2", "--test-size", "30", "--importance-samples", "100", "--device", "cpu"]
IMAGES = ["--data", "mnist", "--net", "mlp", "--width", "4", "--dim-z", "3", "--samples", "1", "--batch", "50", "--inner-steps",
          "2", "--eval-every", "2", "--lr", "1e-3", "--device", "cpu"]
TIMES = ("seconds", "peak_memory")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than these runs do."""
    for name in ("synthetic_samples", "draw_run"):
        monkeypatch.setattr(f"plots.{name}", lambda *_: None)


def train(out, *argv, epochs=2):
    train_synthetic.main(train_synthetic.parse_args([*SMALL, "--epochs", str(epochs), "--out", str(out), *map(str, argv)]))
    return load_arrays(out / "metrics.npz")


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def assert_equal_runs(first, second):
    arrays = [load_arrays(run / "metrics.npz") for run in (first, second)]
    saved = [load_checkpoint(run / "checkpoint.pt")["trainer"] for run in (first, second)]
    assert arrays[0].keys() == arrays[1].keys()
    for name in arrays[0].keys() - {*TIMES, "config"}:
        assert np.array_equal(arrays[0][name], arrays[1][name], equal_nan=arrays[0][name].dtype.kind == "f"), name
    assert saved[0]["step"] == saved[1]["step"]
    assert all(torch.equal(*states) for states in zip(saved[0]["generators"], saved[1]["generators"]))
    assert all(torch.equal(saved[0]["tensors"][name], saved[1]["tensors"][name]) for name in saved[0]["tensors"])


def stop_after(monkeypatch, steps, action):
    """The update after so many calls action() first."""
    run_step, calls = train_synthetic.EnsembleTrainer.run_step, []

    def counted(self):
        calls.append(1)
        if len(calls) == steps + 1:
            action()
        run_step(self)

    monkeypatch.setattr(train_synthetic.EnsembleTrainer, "run_step", counted)


def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)


def half_a_run(out, monkeypatch):
    """A run that SIGTERM stopped in its third epoch, after its second of three evaluations."""
    argv = [*SMALL, "--epochs", "4", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr("training.LOOK_SECONDS", 0)
        stop_after(patch, 10, interrupt)
        with pytest.raises(SystemExit) as ended:
            command_line(lambda: train_synthetic.parse_args(argv), train_synthetic.main)
    assert ended.value.code == 143


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


def test_a_stopped_run_resumes_with_a_line_for_each_evaluation(tmp_path, monkeypatch, capsys):
    half_a_run(tmp_path / "run", monkeypatch)
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["trainer"]["step"] in (10, 11)
    assert "status" not in load_arrays(tmp_path / "run" / "metrics.npz")
    train(tmp_path / "run", epochs=4)
    train(tmp_path / "whole", epochs=4)
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")
    lines = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "0", "2", "4"]


def test_half_a_run_is_not_cut_short(tmp_path, monkeypatch, fails):
    half_a_run(tmp_path / "run", monkeypatch)
    assert "--epochs of at least 3" in fails(train_synthetic, *SMALL, "--epochs", 1, "--out", tmp_path / "run")


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


def forked(action, fatal=None):
    """The exit code of action() in a child process, which SIGKILL ends at its write number `fatal`."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        die_at_write(fatal)
        action()
        code = 0
    finally:
        os._exit(code)


def die_at_write(fatal):
    """SIGKILL to this process at its change number `fatal` of the disk, before an even one and after an odd one."""
    calls = []

    def counted(write):
        def call(*args, **options):
            calls.append(1)
            if len(calls) == fatal and fatal % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                write(*args, **options)
            finally:
                if len(calls) == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
        return call

    for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


def bare_run(out, value, overwrite=False):
    """All that a run writes, without any training."""
    with vsm.runs.Run(out, "train_synthetic", {"value": value}, torch.device("cpu"), overwrite) as run:
        if not run.status:
            run.load_checkpoint()
            run.save_metrics(value=np.array(value))
            run.save_checkpoint({"value": value})
            run.save_metrics(value=np.array(value), status="ok")


def values_in(folder):
    files = [place / "metrics.npz" for place in (folder, folder / ".replaced")]
    return {int(load_arrays(file)["value"]) for file in files if file.exists()}


@pytest.fixture
def no_git(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_a_run_survives_a_kill_inside_any_write(tmp_path, no_git):
    for fatal in range(1, 100):
        out = tmp_path / str(fatal)
        code = forked(lambda: bare_run(out, 1), fatal)
        assert forked(lambda: bare_run(out, 1)) == 0 and vsm.runs.status_of(out) == "ok"
        assert {file.name for file in out.iterdir()} == {".lock", "config.json", "metrics.npz", "checkpoint.pt"}
        if code == 0:
            break
    assert code == 0 and fatal > 8


@pytest.mark.parametrize("seconds", [[2, 12], pytest.param(range(1, 100), marks=pytest.mark.slow)], ids=["some", "all"])
def test_an_overwrite_survives_two_kills_inside_any_writes(tmp_path, no_git, seconds):
    """Either the old run or the new one has its arrays at any time, and the same command succeeds in the end."""
    bare_run(tmp_path / "old", 1)
    for first in range(1, 100):
        for second in seconds:
            out, codes = shutil.copytree(tmp_path / "old", tmp_path / f"{first}-{second}"), []
            for fatal in (first, second):
                codes.append(forked(lambda: bare_run(out, 2, overwrite=True), fatal))
                assert values_in(out), (first, second)
            assert forked(lambda: bare_run(out, 2, overwrite=True)) == 0 and values_in(out) == {2}
            assert not (out / ".replaced").exists() and not list(out.glob(".*.tmp"))
            if codes[1] == 0:
                break
        if codes[0] == 0:
            break
    assert first > 12


# -------------------------------------------------------------------------------------------- folders that are not this run's


def test_a_run_of_another_script_is_refused(digits, tmp_path, fails):
    train(tmp_path / "run")
    before = contents(tmp_path / "run")
    argv = [*IMAGES, "--data-root", digits, "--epochs", 1, "--out", tmp_path / "run"]
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


# -------------------------------------------------------------------------------------------------------- names and flags


def test_names_are_short_and_differ():
    def name(script, *argv):
        return script.parse_args([*map(str, argv)]).out.rpartition("/")[2]

    path = "folder:/a/long/path/" + "deeper/" * 30 + "my pictures"
    assert len(name(train_images, "--data", path)) < 60 and "deeper" not in name(train_images, "--data", path)
    many = ["--samples", 17, "--infer-samples", 19, "--noise", 0.12345, "--width", 123, "--norm", "group", "--dim-z", 77,
            "--init-sd", 0.3, "--inner-steps", 9, "--batch", 333, "--lr", 0.000123, "--lr-half-life", 12.5, "--eval-every", 3]
    names = [name(train_images, *many, "--limit", limit, "--seed", seed) for limit in (1000, 1001) for seed in (0, 2**62)]
    assert len({*names}) == 4 and max(map(len, names)) <= LONGEST_NAME
    assert names[1].endswith(f"seed{2**62}") and names[0].endswith("seed0")


@pytest.mark.parametrize("argv", [["--inner-lr", "1e300"], ["--batch", "4611686018427387904"], ["--seeds", "0"], ["--lr", "nan"]])
def test_impossible_numbers_get_one_sentence(tmp_path, fails, argv):
    assert f"argument {argv[0]}: {argv[1]} is not" in fails(train_synthetic, *argv, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_traceback_on_request(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VSM_TRACEBACK", "1")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        command_line(lambda: train_synthetic.parse_args([*SMALL, "--out", str(tmp_path / "file" / "run")]), train_synthetic.main)
    text = capsys.readouterr().err
    assert ended.value.code == 2 and text.startswith("Traceback") and "error: cannot write" in text.splitlines()[-1]


def test_tensorboard_gets_scalars_and_samples_or_says_how_it_is_installed(digits, tmp_path, fails, monkeypatch):
    events = []

    class SummaryWriter:
        def __init__(self, folder):
            folder.mkdir(parents=True)
            self.add_scalar = self.add_images = lambda name, value, *step: events.append((name, *step))
            self.close = lambda: events.append("closed")

    argv = [*IMAGES, "--data-root", str(digits), "--epochs", "2", "--tensorboard", "--out", str(tmp_path / "run")]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install tensorboard" in fails(train_images, *argv) and not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    for _ in range(2):  # the second finds a finished run and writes nothing
        train_images.main(train_images.parse_args(argv))
    assert {("negative_elbo", 0), ("negative_elbo", 2), ("samples",)} <= {*events} and events.count("closed") == 1


# -------------------------------------------------------------------------------------------------- processes and signals


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def test_a_reader_that_has_left_gets_no_traceback(tmp_path):
    command = f"{sys.executable} {ROOT}/train_synthetic.py {' '.join(SMALL)} --dry-run | head -0; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout in ("141\n", "0\n") and not done.stderr


SERVER = """
import json, os, sys
import torch, train_images, train_synthetic
from vsm.cli import command_line

torch.set_num_threads(1)
for line in sys.stdin:
    name, argv = json.loads(line)
    if pid := os.fork():
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    else:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        script = sys.modules[name]
        command_line(lambda: script.parse_args(argv), script.main)
        sys.exit()
"""  # a process that has imported everything, and forks one more for each line that it reads


@contextlib.contextmanager
def processes(redirection):
    """run(script, argv, wait, number) -> the exit code of a process that gets the signal `number` once wait() returns."""
    command = ["bash", "-c", f'exec "$@" {redirection}', "-", sys.executable, "-c", SERVER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes) as server:
        def run(script, argv, wait=None, number=None):
            server.stdin.write(json.dumps([script, [*map(str, argv)]]) + "\n")
            server.stdin.flush()
            pid = int(server.stdout.readline())
            if wait:
                wait()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            return int(server.stdout.readline())

        yield run


def test_signals_end_a_process_with_their_code_and_it_resumes(digits, tmp_path):
    """Also without a stderr, as after 2>&-."""
    def trains():
        begun = time.monotonic()
        while not (out / "checkpoint.pt").exists() and time.monotonic() < begun + 60:
            time.sleep(0.01)

    images, outs = [*IMAGES, "--data-root", str(digits)], {}
    signals = {signal.SIGINT: (train_synthetic, SMALL), signal.SIGTERM: (train_synthetic, SMALL),
               signal.SIGKILL: (train_images, images)}
    with processes("2>&-") as run:
        for number, (script, argv) in signals.items():
            outs[number] = out = tmp_path / number.name
            code = run(script.__name__, [*argv, "--epochs", 1000, "--out", out], trains, number)
            assert code == (-number if number == signal.SIGKILL else 128 + number)
    for number, (script, argv) in signals.items():
        last = len(load_arrays(outs[number] / "metrics.npz")["epoch"]) * 2 + 2
        for folder in (tmp_path / f"{number.name} whole", outs[number]):
            script.main(script.parse_args([*argv, "--epochs", str(last), "--out", str(folder)]))
        assert last < 1000
        assert_equal_runs(tmp_path / f"{number.name} whole", outs[number])


def test_ctrl_c_during_the_imports_is_one_sentence():
    command = [sys.executable, "-X", "importtime", str(ROOT / "train_images.py"), "--help"]  # which reports each import on stderr
    with subprocess.Popen(command, env=environment(), text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as process:
        while (line := process.stderr.readline()) and not line.endswith(" vsm.quiet\n"):
            pass
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        text = process.stderr.read()
    assert process.returncode == -signal.SIGINT and "Traceback" not in text and "interrupted\n" in text


def test_a_log_gets_a_line_a_minute_with_the_time_to_go(monkeypatch, capsys):
    monkeypatch.setattr(vsm.cli, "time", SimpleNamespace(monotonic=iter(range(10_000)).__next__))
    with vsm.cli.progress(1000) as bar:
        bar.mininterval = 0  # a display per update, which takes a second or more by this clock
        for _ in range(1000):
            bar.update()
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line]
    assert 5 < len(lines) < 20 and "\r" not in text
    assert all("/1000" in line and "to go" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_images", "train_synthetic"])
def test_help_costs_little_more_than_importing_torch(script):
    def seconds(*command):
        times = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, env=environment())
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return sorted(times)[1]

    assert seconds(str(ROOT / f"{script}.py"), "--help") < 1.3 * seconds("-c", "import torch")


@pytest.mark.slow
@pytest.mark.parametrize("script, argv", [("train_synthetic", SMALL), ("train_images", IMAGES)])
def test_a_hundred_kills_change_no_bit(digits, tmp_path, script, argv):
    argv = [*argv, "--epochs", 9, *(["--data-root", digits] if script == "train_images" else [])]
    rng, kills, turn = random.Random(0), Counter(), 0
    with processes("2>/dev/null") as run:
        assert run(script, [*argv, "--out", tmp_path / "first"]) == 0
        begun = time.monotonic()
        assert run(script, [*argv, "--out", tmp_path / "whole"]) == 0
        duration = time.monotonic() - begun
        while kills.total() < 100:
            turn, code = turn + 1, None
            while code != 0:
                number, seconds = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]), rng.uniform(0, 1.2 * duration)
                code = run(script, [*argv, "--out", tmp_path / str(turn)], partial(time.sleep, seconds), number)
                assert code in (0, -number, 128 + number)
                kills[code] += code != 0
            assert_equal_runs(tmp_path / "whole", tmp_path / str(turn))
            assert not list((tmp_path / str(turn)).glob(".*.tmp"))
    print(f"{script}: exit codes {dict(kills)} in {turn} runs, each of {duration:.2f} s undisturbed")
