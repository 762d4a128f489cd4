"""docs/extending.md does what it says: an objective, a network and a 2-D law of one's own, and the adapter for a foreign VAE."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import audit
import plots
import train_images
import train_synthetic
from benchmarks import benchmark
from models import NETS, build_vae
from objectives import INFER, LEARN, Objective
from training import ImageTrainer
from vsm.cli import command_line
from vsm.distributions_2d import DISTRIBUTIONS
from vsm.runs import load_arrays

BLOCKS = re.findall(r"^```python\n(.*?)^```", (Path(__file__).parent.parent / "docs" / "extending.md").read_text(), re.M | re.S)


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


SMALL = ["--seeds", 2, "--batch", 20, "--hidden", 6, "--inner-steps", 1, "--epochs", 1, "--steps-per-epoch", 3, "--test-size", 20,
         "--importance-samples", 100, "--device", "cpu"]


def test_a_new_law_and_objective_train_and_plot(mine, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(train_synthetic, "synthetic_samples", lambda runs, save: drawn.append(save))
    argv = ["--data", "stripe", "--learn", "fd2", *SMALL, "--out", tmp_path / "run"]
    assert "KLD-F2 on stripe" in mine(train_synthetic, *argv) and drawn
    arrays = load_arrays(tmp_path / "run" / "metrics.npz")
    assert arrays["config"]["label"] == "KLD-F2" and str(arrays["status"]) == "ok" and "nll_excess" not in arrays
    mine(plots, "training_curves", tmp_path / "run", "--save", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_a_new_network_trains(mine, digits, tmp_path, no_pictures):
    out = tmp_path / "run"
    mine(train_images, "--net", "linear", "--learn", "fd2", "--data-root", digits, "--dim-z", 3, "--samples", 1,
         "--inner-steps", 1, "--limit", 100, "--test-limit", 20, "--epochs", 1, "--eval-every", 1, "--device", "cpu",
         "--out", out)
    arrays = load_arrays(out / "metrics.npz")
    assert str(arrays["status"]) == "ok" and arrays["config"]["flags"]["net"] == "linear"


@pytest.mark.slow
def test_a_new_objective_is_audited_and_benchmarked(mine, tmp_path):
    report = mine(audit, "fd2", "--no-training", "--out", tmp_path / "audit")
    assert "composition: 1.5 E 1/2 |a|^2 -0.5 1/2 |E a|^2 +1 lap" in report and "less 0.5 times half" in report
    assert "KLD-F2" in mine(benchmark, "--quick", "--pairs", "KLD-F2", "--device", "cpu", "--out", tmp_path / "benchmark")


def test_an_unknown_name_is_an_error(fails):
    assert re.search("invalid choice: .fd3.*VSM_IMPORT", fails(train_synthetic, "--learn", "fd3"))
    assert re.search("invalid choice: .fd3.*VSM_IMPORT", fails(audit, "fd3"))


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

    before = loss()
    phi = torch.optim.Adam(vae.encoder.parameters(), 0.02)
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
    trainer = ImageTrainer(build_vae("mlp", (1, 2, 2), 2, width=3), images, learn="watching", infer="kld", estimator="plugin",
                           samples=1, inner_steps=1, noise=0.3, batch=4, lr=1e-3, seed=0)
    trainer.run_step()
    (x, t), = seen
    clean = images[trainer.order].float() / 255
    torch.testing.assert_close(t, (clean - x).flatten(1) / 0.3**2, rtol=1e-4, atol=1e-4)
