"""What README and the pages recommend runs: the example on a few pictures, and (slow) the script for a GPU at tiny sizes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import train_images
from examples import own_pictures
from small_runs import ROOT, environment
from vsm.stored_runs import open_runs

STAGES = {"mnist": 5, "mnist_fd": 3, "gamma_fixed": 12, "gamma_stationary": 4, "celeba": 5, "fashion": 5, "resnet": 5,
          "resnet_fd": 3}


def noise_pictures(folder, count):
    random = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def test_the_example_goes_from_a_folder_of_pictures_to_samples_and_log_p(tmp_path, capsys):
    noise_pictures(tmp_path / "pictures", 30)
    own_pictures.main(own_pictures.parse_args([f"folder:{tmp_path / 'pictures'}", "--updates", "4", "--width", "2",
                                               "--components", "2", "--out", str(tmp_path / "run")]))
    assert "log p(x) of the new pictures, at least: " in capsys.readouterr().out
    assert Image.open(tmp_path / "run" / "own_pictures.png").width > 500


def test_the_recipe_that_compares_objectives_gives_a_table_by_a_fitted_law(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "images.md").read_text()
    train, measure = re.search(r"Compare two objectives.*?```bash\n(.*?)\n(.*?)\n```", page, re.S).groups()
    monkeypatch.chdir(tmp_path)
    noise_pictures(tmp_path / "my_pictures", 40)
    train_images.main_of_runs(train_images.parse_runs(
        [*shlex.split(train)[2:], "--width", "2", "--dim-z", "2", "--samples", "2", "--batch", "18", "--epochs", "1"]))
    run, = Path("runs/images").glob("*-fd-*seed0")
    flags = [*shlex.split(measure)[3:], "--images", "2", "--iw-samples", "2", "--components", "2"]
    evaluate.main(evaluate.parse_args([str(run), *flags]))
    assert "KLD-F" in (table := capsys.readouterr().out) and "| mixture |" in table


@pytest.mark.slow
def test_the_script_for_a_gpu_rehearses_every_stage_on_a_cpu(tmp_path):
    done = subprocess.run(["bash", ROOT / "benchmarks" / "gpu.sh", "3000", tmp_path, tmp_path / "out"], capture_output=True,
                          text=True, check=False,
                          env=environment() | {"REHEARSE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stdout + done.stderr
    for stage, count in STAGES.items():
        assert len(open_runs([tmp_path / "out" / f"{stage}.npz"])) == count, stage
    assert "updates a second" in (tmp_path / "out" / "lockstep_eager.md").read_text()
