"""What README and the pages recommend runs: the example on a few pictures, and (slow) the script for a GPU at tiny sizes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples import own_pictures
from small_runs import ROOT, environment
from vsm.stored_runs import open_runs

STAGES = {"mnist": 5, "mnist_fd": 3, "gamma_fixed": 12, "gamma_stationary": 4, "celeba": 5, "fashion": 5, "resnet": 5,
          "resnet_fd": 3}


def test_the_example_goes_from_a_folder_of_pictures_to_samples_and_log_p(tmp_path, capsys):
    random = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(30):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    own_pictures.main(own_pictures.parse_args([f"folder:{tmp_path / 'pictures'}", "--updates", "4", "--width", "2",
                                               "--components", "2", "--out", str(tmp_path / "run")]))
    assert "log p(x) of the new pictures, at least: " in capsys.readouterr().out
    assert Image.open(tmp_path / "run" / "own_pictures.png").width > 500


@pytest.mark.slow
def test_the_script_for_a_gpu_rehearses_every_stage_on_a_cpu(tmp_path):
    done = subprocess.run(["bash", ROOT / "benchmarks" / "gpu.sh", "3000", tmp_path, tmp_path / "out"], capture_output=True,
                          text=True, check=False,
                          env=environment() | {"REHEARSE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stdout + done.stderr
    for stage, count in STAGES.items():
        assert len(open_runs([tmp_path / "out" / f"{stage}.npz"])) == count, stage
    assert "updates a second" in (tmp_path / "out" / "lockstep_eager.md").read_text()
