"""docs/extending.md does what it says: an objective, a network and a 2-D law of one's own, and the adapter for a foreign VAE."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import audit
import evaluate
import plots
import small_runs
import train_images
import train_synthetic
from benchmarks import benchmark
from examples import own_pictures
from models import NETS
from objectives import INFER, LEARN, Objective, posterior_score
from sketches import contents_in
from small_runs import IMAGES, ROOT, environment, image_trainer, main, noise_pictures
from studies import tables
from vsm.cli import command_line
from vsm.device import to_channels_last
from vsm.distributions_2d import DISTRIBUTIONS
from vsm.loading import vae_of
from vsm.runs import load_arrays
from vsm.stored_runs import open_runs

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "extending.md").read_text(), re.M | re.S)


@pytest.fixture
def mine(tmp_path, monkeypatch, capsys):
    """mine(script, *argv) runs a script with the page's objective, network and law, as VSM_IMPORT=mine does, and returns its
    output. tests/test_kills.py gives $VSM_IMPORT to real processes.
    """
    (tmp_path / "mine.py").write_text("\n\n".join(BLOCKS[:3]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("VSM_IMPORT", "mine")
    before = [dict(table) for table in (LEARN, INFER, NETS, DISTRIBUTIONS)]

    def run(script, *argv):
        capsys.readouterr()
        command_line(lambda: script.parse_args([*map(str, argv)]), script.main)
        return capsys.readouterr().out
    yield run
    for table, entries in zip((LEARN, INFER, NETS, DISTRIBUTIONS), before):
        table.clear()
        table.update(entries)
    sys.modules.pop("mine", None)


def test_a_new_law_and_objective_train_and_plot(mine, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(train_synthetic, "synthetic_samples", lambda runs, save: drawn.append(save))
    argv = [*small_runs.SMALL, "--epochs", 1, "--data", "stripe", "--learn", "fd2", "--out", tmp_path / "run"]
    assert "KLD-F2 on stripe" in mine(train_synthetic, *argv) and drawn
    arrays = load_arrays(tmp_path / "run" / "metrics.npz")
    assert arrays["config"]["label"] == "KLD-F2" and str(arrays["status"]) == "ok" and "nll_excess" not in arrays
    mine(plots, "training_curves", tmp_path / "run", "--save", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_a_new_network_trains(mine, digits, tmp_path, no_pictures):
    argv = [*IMAGES, "--epochs", 1, "--net", "linear", "--learn", "fd2", "--data-root", digits, "--out", tmp_path / "run"]
    mine(train_images, *argv)
    arrays = load_arrays(tmp_path / "run" / "metrics.npz")
    assert str(arrays["status"]) == "ok" and arrays["config"]["flags"]["net"] == "linear"


def test_a_joint_objective_and_one_of_the_encoder_get_what_they_declare(monkeypatch):
    seen = []

    def joint(vae, x, q, z, estimator, t):
        seen.append((estimator, t.shape))
        return LEARN["fae"](vae, x, q, z)

    entry = Objective(joint, "J", needs_b=True, joint=True)
    monkeypatch.setitem(LEARN, "joint", entry)
    monkeypatch.setitem(INFER, "joint", entry)
    image_trainer(learn="joint", infer="joint", estimator="unbiased", samples=2).run_step()
    words = ["--learn", "joint", "--estimator", "unbiased", "--samples", 2, "--noise", 0.1, "--inner-steps", 1]
    args = train_synthetic.parse_args([*map(str, [*small_runs.SMALL, *words])])
    train_synthetic.EnsembleTrainer(args, small_runs.CPU).run_step()
    assert seen == [("unbiased", (4, 4)), ("unbiased", (2, 20, 2)), ("unbiased", (2, 20, 2))]

    def with_b(vae, x, q, z):
        return INFER["kld"](vae, x, q, z) + 0 * posterior_score(vae, x, q, z).sum((0, 2))

    monkeypatch.setitem(INFER, "with_b", Objective(with_b, "W", needs_b=True))
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    image_trainer(vae_of({"net": "conv", "width": 2, "dim_z": 2, "norm": "batch", "latent": "gaussian", "temperature": 0.5,
                          "init_sd": 1.0, "precision": "float32"}, (1, 32, 32)), images, infer="with_b").run_step()
    assert to_channels_last(torch.nn.Linear(1, 1), "not known here", "kld")


@pytest.mark.slow
def test_a_new_objective_is_audited_and_benchmarked(mine, tmp_path):
    report = mine(audit, "fd2", "--out", tmp_path / "audit")
    assert "composition: 1.5 E 1/2 |a|^2 -0.5 1/2 |E a|^2 +1 lap" in report and "less 0.5 times half" in report
    tiny = "--net conv --width 4 --batch 4 --device cpu --pairs KLD-F2 --out".split()
    assert "KLD-F2" in mine(benchmark, *tiny, tmp_path / "benchmark")


def test_the_adapter_makes_a_strangers_vae_fit():
    code = [block for block in BLOCKS if "class Adapter" in block or "def step" in block]
    adapter = code[0][code[0].index("class Adapter"):]
    assert len(adapter.strip().splitlines()) <= 20 and sum(bool(line.strip()) for line in adapter.splitlines()) <= 16
    names = {}
    for block in code:
        exec(compile(block, "extending.md", "exec"), names)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.log_variance = nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x):
            return self.mean(x), self.log_variance(x)

    torch.manual_seed(0)
    vae, x = names["Adapter"](Encoder(), nn.Linear(2, 6)), torch.randn(50, 6)

    def loss():
        with torch.no_grad():
            q = vae.encode(x)
            return LEARN["elbo"](vae, x, q, vae.encode(x).sample((200,))).mean().item()

    before, phi = loss(), torch.optim.Adam(vae.encoder.parameters(), 0.02)
    theta = torch.optim.Adam([*vae.decoder.parameters(), vae.log_gamma], 0.02)
    for _ in range(60):
        names["step"](vae, x, phi, theta)
    assert loss() < before - 1
    x.requires_grad_()
    q = vae.encode(x)
    for entry in (*LEARN.values(), *INFER.values()):
        assert entry(vae, x, q, q.rsample((3,)), t=-x.detach()).shape == (50,)


def test_an_objective_that_declares_t_gets_the_score_of_the_datas_noise(monkeypatch):
    """In training on images, and nowhere else does an objective get what it does not declare."""
    seen = []

    def watching(vae, x, q, z, t):
        seen.append((x, t))
        return LEARN["fd"](vae, x, q, z)

    monkeypatch.setitem(LEARN, "watching", Objective(watching, "W"))
    images = torch.randint(0, 256, (4, 1, 2, 2), dtype=torch.uint8)
    trainer = image_trainer(images=images, learn="watching", noise=0.3)
    trainer.run_step()
    (x, t), = seen
    torch.testing.assert_close(t, (images[trainer.order].float() / 255 - x).flatten(1) / 0.3**2, rtol=1e-4, atol=1e-4)


def test_the_example_goes_from_a_folder_of_pictures_to_samples_and_log_p(tmp_path, capsys):
    noise_pictures(tmp_path / "pictures", 30)
    flags = ["--updates", 4, "--width", 2, "--components", 2, "--out", tmp_path / "run"]
    main(own_pictures, f"folder:{tmp_path / 'pictures'}", *flags)
    assert "log p(x) of the new pictures, at least: " in capsys.readouterr().out
    assert len(contents_in(tmp_path / "run" / "own_pictures.png")) == 4  # rows of pictures


@pytest.mark.slow
def test_the_recipe_that_compares_objectives_gives_a_table_by_a_fitted_law(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "images.md").read_text()
    train, measure, compare = re.search(r"Compare two objectives.*?```bash\n(.*?)\n(.*?)\n(.*?)\n```", page, re.S).groups()
    monkeypatch.chdir(tmp_path)
    noise_pictures(tmp_path / "my_pictures", 40)
    train_images.main_of_runs(train_images.parse_runs(
        [*shlex.split(train)[2:], "--width", "2", "--dim-z", "2", "--samples", "2", "--batch", "18", "--epochs", "1"]))
    run, = Path("runs/images").glob("*-fd-*seed0")
    main(evaluate, run, *shlex.split(measure)[3:], "--images", 2, "--iw-samples", 2, "--components", 2)
    assert "KLD-F" in (table := capsys.readouterr().out) and "| mixture of 2, best of 5 fits |" in table
    main(tables, run, *shlex.split(compare)[4:])
    assert "FID, mixture" in Path("runs/ratios.md").read_text()


STAGES = {"mnist": 4, "mnist_dsm": 1, "mnist_fd": 3, "gamma_fixed": 9, "gamma_fixed_dsm": 3, "gamma_stationary": 3, "celeba": 4,
          "celeba_dsm": 1, "fashion": 4, "resnet": 4, "resnet_fd": 3}


@pytest.mark.slow
def test_the_script_for_a_gpu_rehearses_every_stage_on_a_cpu(tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", ROOT / "benchmarks" / "gpu.sh", "3000", tmp_path, tmp_path / "out"], capture_output=True,
                          text=True, check=False, env=environment() | {"REHEARSE": "1", "PATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    for stage, count in STAGES.items():
        assert len(open_runs([tmp_path / "out" / f"{stage}.npz"])) == count, stage
    assert "updates a second" in (tmp_path / "out" / "lockstep_eager.md").read_text()
