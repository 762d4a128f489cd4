"""Compiled updates equal eager ones, fused Adam plain Adam. Captured updates: test_capture.py and test_cuda.py."""

import pytest
import torch

import small_runs
import train_synthetic
from models import build_vae
from small_runs import CPU, image_trainer, run_steps
from train_synthetic import EnsembleTrainer
from vsm.cli import UserError
from vsm.cuda_graphs import cpp_compiler, refuse_to_compile

SMALL = [*small_runs.SMALL, "--batch", "10", "--hidden", "4", "--steps-per-epoch", "2"]
LR = 1e-3


def ensemble(*argv):
    return EnsembleTrainer(train_synthetic.parse_args([*SMALL, *map(str, argv)]), CPU)


PAIRS = [["--learn", "fd", "--lr-half-life", 1], ["--learn", "bao", "--samples", 2, "--infer", "fd", "--bilevel-steps", 1]]


def assert_compiled_equals_eager(argv):
    eager, fused = run_steps(ensemble(*argv), 5), run_steps(ensemble(*argv, "--compile"), 5)
    for mine, theirs in zip(fused.vae.parameters(), eager.vae.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fused.sums, eager.sums, rtol=1e-4, atol=1e-4)
    return fused


@pytest.mark.parametrize("argv", PAIRS)
def test_what_is_compiled_computes_what_eager_updates_do(argv, monkeypatch):
    """Without TorchInductor. Each of the two losses is traced once and holds none of the tensors that later updates change."""
    graphs = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs: graphs.append(graph) or graph)
    fused = assert_compiled_equals_eager(argv)
    assert len(graphs) == 2
    held = {getattr(graph, node.target).data_ptr() for graph in graphs for node in graph.graph.nodes if node.op == "get_attr"}
    assert held.isdisjoint(tensor.data_ptr() for tensor in (*fused.vae.parameters(), fused.rate))


@pytest.mark.slow
@pytest.mark.skipif(not cpp_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("argv", PAIRS)
def test_compiled_updates_equal_eager_ones(argv):
    assert_compiled_equals_eager(argv)


def test_to_compile_without_a_compiler_or_for_a_gpu_is_one_sentence(tmp_path, fails, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "needs a C++ compiler" in fails(train_synthetic, *SMALL, "--compile", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="--compile works on a CPU only"):
        refuse_to_compile(torch.device("cuda"))


def assert_moves_as_plain_adam(trainer, params):
    """Fused Adam pairs parameters and gradients by their place in memory; plain Adam pairs them by index."""
    copies = [p.detach().clone() for p in params]
    plain = torch.optim.Adam(copies, LR, fused=False, foreach=False)
    for _ in range(5):
        trainer.run_step()
        for copy, p in zip(copies, params):
            copy.grad = p.grad.clone()
        plain.step()
    for copy, p in zip(copies, params):
        torch.testing.assert_close(p.detach(), copy, rtol=1e-5, atol=1e-3 * LR)


@pytest.mark.parametrize("net", ["conv", "resnet"])
def test_image_trainer_moves_as_plain_adam(net):
    torch.manual_seed(0)
    images, vae = torch.randint(0, 256, (40, 1, 32, 32), dtype=torch.uint8), build_vae(net, (1, 32, 32), 4, width=4)
    trainer = image_trainer(vae, images, learn="bao", samples=2, batch=20, lr=LR)
    assert_moves_as_plain_adam(trainer, trainer.phi.params + trainer.theta.params)


@pytest.mark.parametrize("bilevel", [0, 1])
def test_ensemble_moves_as_plain_adam(bilevel):
    trainer = ensemble("--seeds", 3, "--batch", 50, "--lr", LR, "--bilevel-steps", bilevel)
    assert_moves_as_plain_adam(trainer, trainer.theta)
