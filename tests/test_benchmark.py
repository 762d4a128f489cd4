"""The reference step is the same mathematics by more operations, and the script says what it measured."""

import platform
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import benchmark, lockstep
from benchmarks.benchmark import pairs
from benchmarks.reference_step import INFERENCE, ReferenceStep, reference_loss
from models import build_vae
from small_runs import CPU, ROOT, image_trainer, main, run_steps
from training import phi_loss, shared_losses, theta_loss
from vsm.runs import load_arrays

TINY = "--net conv --width 8 --dim-z 10 --samples 2 --inner-steps 2 --batch 20 --repeats 2 --device cpu".split()
OPTIONS = {"samples": 3, "inner_steps": 2, "noise": 0.1, "batch": 8, "lr": 1e-4}


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("name", ["infer kld", "infer fd", "infer fd-weighted", "infer fd-repar",
                                  "learn elbo", "learn fd", "learn swersky", "learn bao", "learn dsm", "fae"])
def test_the_reference_step_has_the_trainers_gradients(name, norm):
    torch.manual_seed(0)
    vae = build_vae("conv", (1, 32, 32), 4, width=4, norm=norm, init_sd=0.5).double()
    x, noise = torch.rand(6, 1, 32, 32, dtype=torch.float64), torch.randn(3, 6, 4, dtype=torch.float64)
    t = torch.randn_like(x)
    kind, _, objective = name.rpartition(" ")
    phi, theta = list(vae.encoder.parameters()), [*vae.decoder.parameters(), vae.log_gamma]
    moving = {"infer": phi, "learn": theta, "": phi + theta}[kind]
    ours = {"infer": lambda: phi_loss(vae, x, objective, noise),
            "learn": lambda: theta_loss(vae, x, objective, noise, t=t.flatten(1)),
            "": lambda: shared_losses(vae, x, "fae", "fae", noise)[0]}[kind]().mean()
    if kind == "infer":
        objective = INFERENCE[objective]
    reference = reference_loss(vae, x, noise, objective, reparametrised=name in ("infer kld", "infer fd-repar", "fae"), t=t)
    torch.testing.assert_close(reference, ours)
    for p, q, r in zip(moving, torch.autograd.grad(reference, moving), torch.autograd.grad(ours, moving)):
        torch.testing.assert_close(q, r, rtol=1e-6, atol=1e-8 * p.abs().max().item())


class CountFlops(TorchDispatchMode):
    """Counts what autograd.grad computes too, where PyTorch's FlopCounterMode, which hooks into modules, fails."""
    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops_of(function):
    with CountFlops() as count:
        function()
    return count.flops


@pytest.mark.parametrize("pair", pairs())
def test_the_trainer_computes_less_than_the_reference_step(pair):
    learn, infer = pairs()[pair]
    images = torch.randint(0, 256, (24, 1, 32, 32), dtype=torch.uint8)
    ours, theirs = (build_vae("conv", (1, 32, 32), 6, width=4) for _ in range(2))
    trainer = image_trainer(ours, images, learn=learn, infer=infer, **OPTIONS)
    reference = ReferenceStep(theirs, images, CPU, learn=learn, infer=infer, **OPTIONS)
    assert flops_of(lambda: run_steps(trainer, 2)) < flops_of(lambda: run_steps(reference, 2)) / 1.04


@pytest.fixture
def short(monkeypatch):
    """Two steps a turn."""
    time_in_turns = benchmark.time_in_turns
    monkeypatch.setattr(benchmark, "time_in_turns", lambda makers, calls, *rest: time_in_turns(makers, min(calls, 2), *rest))


def test_a_run_prints_its_ratios_and_leaves_its_arrays(tmp_path, capsys, short):
    flags = [*TINY, "--pairs", "KLD-F", "FD-B", "FAE", "--out", tmp_path / "run"]
    main(benchmark, *flags)
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| conv")]
    assert [cells[4].strip() for cells in table] == 3 * ["reference", "eager"] and all("[" in cells[8] for cells in table)
    arrays = load_arrays(tmp_path / "run" / "metrics.npz")
    rows = len(arrays["pair"])
    assert arrays["seconds"].shape == (rows, 2) and (arrays["seconds"] > 0).all()
    for name in ("image", "net", "batch", "mode", "precision"):
        assert len(arrays[name]) == rows, name
    assert set(arrays["pair"]) == {"KLD-F", "FD-B", "FAE"}
    main(benchmark, *flags)
    assert "finished before" in capsys.readouterr().out


PAGE_FAULTS = """
import resource, torch
from vsm.device import keep_freed_memory

def faults():
    for _ in range(8):  # until the heap has room
        torch.empty(2**24).fill_(0)  # 64 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.empty(2**24).fill_(0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory(False)
given_back = faults()
keep_freed_memory()
assert faults() < given_back / 10, given_back
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_kept_memory_costs_no_page_faults():
    """In a process of its own, because other tests leave holes in the heap that serve such a tensor."""
    subprocess.run([sys.executable, "-c", PAGE_FAULTS], cwd=ROOT, check=True)


def test_the_flags_choose_pairs_and_precision(tmp_path, short):
    main(benchmark, *TINY, "--pairs", "FD-S", "--precision", "bf16", "--out", tmp_path / "run")
    arrays = load_arrays(tmp_path / "run" / "metrics.npz")
    assert set(arrays["pair"]) == {"FD-S"} and set(arrays["precision"][arrays["mode"] == "eager"]) == {"bf16"}


def test_grouped_networks_have_the_parameters_of_all_runs_and_every_way_has_a_row(tmp_path):
    sizes, save = "--sizes 1 2 --width 4 --samples 1 --inner-steps 1 --batch 4 --seconds 0.01", tmp_path / "table.md"
    networks = "--device", "cpu", "--networks", "eager", "contiguous", "grouped", "--save", str(save)
    lockstep.main(args := lockstep.parse_args([*sizes.split(), *networks]))
    assert save.read_text().count("| float32 ") == 6
    images = torch.zeros(8, 1, 32, 32, dtype=torch.uint8)
    alone = lockstep.parse_args([*sizes.split(), "--one-pass", "--batch", "8", "--save", str(save)])
    trainer = lockstep.run(alone, images, "float32", "eager", 3)[0]
    assert (trainer.one_pass, trainer.batch, trainer.seed, trainer.samples) == (True, 8, 3, 1)
    one, three = (lockstep.run(args, images, "float32", "grouped", 0, groups)[0].vae for groups in (1, 3))
    for half in ("encoder", "decoder"):
        counts = [sum(p.numel() for p in getattr(vae, half).parameters()) for vae in (one, three)]
        assert counts[1] == 3 * counts[0]


def test_one_pass_of_a_pair_that_needs_b_is_refused(fails, tmp_path):
    argv = ("--one-pass", "--inner-steps", 1, "--pair", "KLD-B", "--save", tmp_path / "t.md")
    assert "goes with --infer kld" in fails(lockstep, *argv)
