"""The update captured in a CUDA graph against the eager one. Without a GPU the first test runs alone, on stand-ins."""

import io
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import train_images
import train_synthetic
from models import build_vae
from small_runs import image_trainer, main, run_steps
from vsm.cuda_graphs import Graphs, capture
from vsm.device import set_precision
from vsm.distributions_2d import DISTRIBUTIONS
from vsm.runs import load_arrays

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PAIRS = [("fd", "kld"), ("bao", "fd"), ("swersky", "fd-repar"), ("fae", "fae")]


def trainer(learn, infer, graph, net="conv", seed=0, bf16=False, device="cuda", **options):
    """7 minibatches an epoch, the decoder on every third: 20 steps capture both kinds of update and cross two epochs."""
    torch.manual_seed(seed)
    vae = build_vae(net, (1, 32, 32), 10, width=16, bf16=bf16).to(device)
    images = torch.randint(0, 256, (142, 1, 32, 32), dtype=torch.uint8).to(device)
    flags = {"samples": 3, "inner_steps": 3, "batch": 20, "lr": 1e-4} | options
    return image_trainer(vae, images, learn=learn, infer=infer, seed=seed, graph=graph, **flags)


def run(trainer, steps=20):
    return run_steps(trainer, steps)


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


@pytest.fixture(autouse=True)
def exact():
    """Float32 and the same algorithms in both modes, so that what is left is rounding."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def assert_close_states(first, second, **tolerance):
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def assert_same(first, second):
    """Equal noise, order and clock; losses and weights to rounding (Adam may turn it into a step of the learning rate or two)."""
    assert torch.equal(first.generator.get_state(), second.generator.get_state())
    states = first.state(), second.state()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        if name in ("order", "cursor", "clock", "diverged_at") or name.endswith((".step", "num_batches_tracked")):
            assert torch.equal(tensor, states[1][name]), name
    weights = {name: tensor for name, tensor in states[0].items() if name.startswith("vae.")}
    assert_close_states(weights, states[1], rtol=1e-3, atol=3e-4)
    torch.testing.assert_close(first.sums, second.sums, rtol=1e-3, atol=1e-3)


def stand_in_stream(device=None):
    return SimpleNamespace(device=device, wait_stream=lambda other: None)


def test_what_capture_does_besides_cuda(monkeypatch):
    """With a stand-in that records without running and replays by running, capture's own bookkeeping must be exact."""
    captured, eager = (trainer("bao", "kld", graph, device="cpu") for graph in (True, False))

    graphs = []

    class Graph:
        def __init__(self):
            graphs.append(self)

        def register_generator_state(self, generator):
            """Only versions of PyTorch before 2.14 ask for it."""

        def replay(self):
            captured.update(self.with_decoder)

    @contextmanager
    def record(graph, pool, stream):
        update = captured.update
        monkeypatch.setattr(captured, "update", lambda with_decoder: setattr(graph, "with_decoder", with_decoder))
        yield
        monkeypatch.setattr(captured, "update", update)

    stand_ins = {"Stream": stand_in_stream, "current_stream": stand_in_stream, "stream": nullcontext, "CUDAGraph": Graph,
                 "graph": record, "graph_pool_handle": lambda: (0, 0)}
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    captured.graphs = Graphs(captured.device)
    run(captured), run(eager)
    assert len(captured.graphs.graphs) == len(graphs) == 2
    assert torch.equal(captured.generator.get_state(), eager.generator.get_state())
    for name, tensor in captured.state().items():
        assert torch.equal(tensor, eager.state()[name]), name


@needs_gpu
@pytest.mark.parametrize("net", ["conv", "resnet"])
@pytest.mark.parametrize("learn, infer", PAIRS)
def test_captured_equals_eager(learn, infer, net):
    captured, eager = (run(trainer(learn, infer, graph, net)) for graph in (True, False))
    assert len(captured.graphs.graphs) == 2 and not eager.graphs
    assert_same(captured, eager)


@needs_gpu
@pytest.mark.parametrize("learn", ["elbo", "bao"])
def test_stationary_gamma_captured_equals_eager(learn):
    captured, eager = (run(trainer(learn, "kld", graph, gamma="stationary")) for graph in (True, False))
    assert_same(captured, eager)
    torch.testing.assert_close(captured.stationary.means, eager.stationary.means, rtol=1e-3, atol=0)


@needs_gpu
def test_capture_itself_changes_nothing():
    captured = trainer("fd", "kld", graph=True)
    captured.begin_epoch(0)
    before, generator_state = {name: t.clone() for name, t in captured.state().items()}, captured.generator.get_state()
    graphs = captured.graphs
    for with_decoder in (False, True):
        capture(partial(captured.update, with_decoder), captured.state(), [captured.generator], graphs.stream, graphs.pool)
    assert torch.equal(captured.generator.get_state(), generator_state)
    for name, tensor in captured.state().items():
        assert torch.equal(tensor, before[name]), name


@needs_gpu
@pytest.mark.parametrize("first, then", [(True, False), (False, True)])
def test_a_checkpoint_from_one_mode_resumes_in_the_other(first, then):
    whole, half = (run(trainer("bao", "kld", graph=first), steps) for steps in (20, 11))
    resumed = trainer("bao", "kld", graph=then, seed=0)
    resumed.load(through_a_file(half.save()))
    assert_same(run(resumed, 9), whole)


@needs_gpu
def test_loading_keeps_captured_graphs_valid():
    captured = run(trainer("fd", "kld", graph=True), 6)
    saved = through_a_file(captured.save())
    once = {name: tensor.clone() for name, tensor in run(captured, 5).state().items()}
    captured.load(saved)
    assert_close_states(run(captured, 5).state(), once, rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("precision, drift", [("tf32", 0.01), ("bf16", 0.05)])
def test_lower_precision_drifts_little(precision, drift):
    """The mean losses of 20 steps; learn_loss is divided by gamma^2, so a gamma that drifted would show."""
    losses = []
    for name in ("float32", precision):
        set_precision(name, torch.device("cuda"))
        losses.append(run(trainer("fd", "kld", graph=True, bf16=name == "bf16")).averages())
    set_precision("float32", torch.device("cuda"))
    for name in ("infer_loss", "learn_loss"):
        assert abs(losses[1][name] / losses[0][name] - 1) < drift, name


@needs_gpu
def test_runs_with_and_without_graphs_agree(digits, tmp_path):
    flags = ["--data", "mnist", "--data-root", digits, "--width", "8", "--dim-z", "5", "--batch", "50", "--epochs", "3",
             "--inner-steps", "2", "--eval-every", "1", "--device", "cuda"]
    for name, extra in (("captured", []), ("eager", ["--no-graph"])):
        main(train_images, *flags, "--out", tmp_path / name, *extra)
    captured, eager = (load_arrays(tmp_path / name / "metrics.npz") for name in ("captured", "eager"))
    assert str(captured["status"]) == str(eager["status"]) == "ok"
    for name in ("negative_elbo", "reconstruction_mse", "log_gamma"):
        torch.testing.assert_close(torch.tensor(captured[name]), torch.tensor(eager[name]), rtol=2e-2, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("data", DISTRIBUTIONS)
def test_a_captured_ensemble_equals_an_eager_one(data):
    ensembles = []
    for mode in ([], ["--no-graph"]):
        argv = f"--data {data} --learn bao --samples 2 --seeds 3 --batch 50 --hidden 8 --inner-steps 2 --bilevel-steps 1".split()
        args = train_synthetic.parse_args([*argv, "--device", "cuda", *mode])
        ensembles.append(run(train_synthetic.EnsembleTrainer(args, torch.device("cuda"))))
    captured, eager = (ensemble.state() for ensemble in ensembles)
    assert captured.keys() == eager.keys() and torch.equal(captured["clock"], eager["clock"])
    assert_close_states(captured, eager, rtol=1e-3, atol=3e-4)
