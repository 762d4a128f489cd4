"""Compiled updates equal eager ones. Captured updates have tests/test_capture.py and tests/test_cuda.py."""

import pytest
import torch

import train_synthetic
from train_synthetic import EnsembleTrainer
from vsm.cli import UserError
from vsm.cuda_graphs import cpp_compiler, refuse_to_compile

CPU = torch.device("cpu")
SMALL = ["--seeds", "2", "--batch", "10", "--hidden", "4", "--inner-steps", "2", "--steps-per-epoch", "2", "--device", "cpu"]


def ensemble(*argv):
    return EnsembleTrainer(train_synthetic.parse_args([*SMALL, *map(str, argv)]), CPU)


PAIRS = [["--learn", "fd", "--lr-half-life", 1], ["--learn", "bao", "--samples", 2, "--infer", "fd", "--bilevel-steps", 1]]


def assert_compiled_equals_eager(argv):
    eager, fused = ensemble(*argv), ensemble(*argv, "--compile")
    for _ in range(5):
        eager.run_step()
        fused.run_step()
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


def test_to_compile_without_a_compiler_is_one_sentence(tmp_path, fails, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "needs a C++ compiler" in fails(train_synthetic, *SMALL, "--compile", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_compiling_for_a_gpu_is_refused():
    with pytest.raises(UserError, match="--compile works on a CPU only"):
        refuse_to_compile(torch.device("cuda"))


def test_a_step_size_that_compiling_would_freeze_is_refused(fails):
    argv = ["--compile", "--bilevel-steps", 1, "--lr-half-life", 1]
    assert "--compile with --bilevel-steps fixes the step size" in fails(train_synthetic, *SMALL, *argv)
