"""What a training script does with its command line, its streams and its names, beside training."""

import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

import train_images
import train_synthetic
import vsm.cli
from small_runs import IMAGES, ROOT, SMALL, environment
from vsm.cli import command_line
from vsm.names import LONGEST_NAME

pytestmark = pytest.mark.usefixtures("no_pictures")


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


def test_a_reader_that_has_left_gets_no_traceback():
    code = "from vsm.cli import command_line; command_line(lambda: 'text', print)"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 141 and not done.stderr


def test_imports_and_a_command_line_take_little():
    """Evaluation does without the script that trained; drawing and image files have packages that are imported at their use."""
    code = ("import sys, data, evaluate, benchmarks.benchmark, plots; plots.parse_args(['samples', 'x']); "
            "print([name for name in ('train_images', 'torchvision', 'matplotlib', 'PIL', 'scipy') if name in sys.modules])")
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment(), text=True) == "[]\n"


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
