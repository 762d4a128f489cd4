"""docs/extending.md does what it says: an objective, a network and a 2-D law of one's own, and the adapter for a stranger's VAE."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from objectives import INFER, LEARN
from vsm.runs import load_arrays

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "extending.md").read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """The page's objective, network and law in one module, mine.py, and a function that runs a script with it."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text("\n\n".join(BLOCKS[:3]))

    def run(script, *argv):
        environment = os.environ | {"PYTHONPATH": str(folder), "VSM_IMPORT": "mine", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, ROOT / script, *map(str, argv)], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder = folder
    return run


SMALL = ["--seeds", 2, "--batch", 20, "--hidden", 6, "--inner-steps", 1, "--epochs", 1, "--steps-per-epoch", 3, "--test-size", 20,
         "--importance-samples", 100]


def test_a_new_law_and_objective_train_and_plot(mine):
    out = mine.folder / "synthetic"
    assert "KLD-F2 on stripe" in mine("train_synthetic.py", "--data", "stripe", "--learn", "fd2", *SMALL, "--out", out)
    arrays = load_arrays(out / "metrics.npz")
    assert arrays["config"]["label"] == "KLD-F2" and str(arrays["status"]) == "ok" and "nll_excess" not in arrays
    mine("plots.py", "learning_curves", out, "--save", mine.folder / "curves.png")
    assert (mine.folder / "curves.png").exists()


def test_a_new_network_trains(mine, digits):
    out = mine.folder / "images"
    mine("train_images.py", "--net", "linear", "--learn", "fd2", "--data-root", digits, "--dim-z", 3, "--samples", 1, "--inner-steps", 1,
         "--limit", 100, "--test-limit", 20, "--epochs", 1, "--eval-every", 1, "--out", out)
    assert (out / "training_curves.png").exists() and load_arrays(out / "metrics.npz")["config"]["flags"]["net"] == "linear"


@pytest.mark.slow
def test_a_new_objective_is_audited_and_benchmarked(mine):
    report = mine("audit.py", "fd2", "--no-training", "--out", mine.folder / "audit")
    assert "composition: 1.5 E 1/2 |a|^2 -0.5 1/2 |E a|^2 +1 lap" in report and "less 0.5 times half" in report
    assert "KLD-F2" in mine("benchmark.py", "--quick", "--pairs", "KLD-F2", "--device", "cpu", "--out", mine.folder / "benchmark")


def test_an_unknown_name_is_an_error(fails):
    import train_synthetic
    assert "invalid choice: 'fd3'" in fails(train_synthetic, "--learn", "fd3")


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
        assert entry(vae, x, q, q.rsample((3,))).shape == (50,)
