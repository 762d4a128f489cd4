"""What makes training steps fast: `capture`, a CUDA graph, on a GPU and `compiled`, TorchInductor, on a CPU."""

import os
import shutil
import warnings

import torch
from torch.func import functional_call
from torch.torch_version import TorchVersion

from vsm.cli import UserError


class Graphs:
    """The CUDA graphs of a trainer's updates, one per kind: captured at their first call and replayed from then on.

    They share a stream and a memory pool, since only one of them runs at a time. `state` is every tensor that an update changes.
    """

    def __init__(self, device):
        self.stream, self.pool, self.graphs = torch.cuda.Stream(device), torch.cuda.graph_pool_handle(), {}

    def run(self, kind, update, state, generators=()):
        if kind not in self.graphs:
            self.graphs[kind] = capture(update, state, generators, self.stream, self.pool)
        self.graphs[kind].replay()


def capture(update, state, generators, stream, pool):
    """update() as a CUDA graph. The calls that warm it up are undone, so that a replayed run equals an eager one."""
    before, drawn = [tensor.clone() for tensor in state.values()], [generator.get_state() for generator in generators]
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*capturable=True.*")  # Adam's, of steps that are not captured
        for _ in range(3):
            update()
            for tensor, value in zip(state.values(), before):
                tensor.copy_(value)
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for generator, value in zip(generators, drawn):
        generator.set_state(value)
        if TorchVersion(torch.__version__) < "2.14":  # later versions find the generators by themselves
            graph.register_generator_state(generator)
    with torch.cuda.graph(graph, pool=pool, stream=stream):  # the warm-up's stream: library handles and workspaces are per stream
        update()
    return graph


class Method(torch.nn.Module):
    """function(module, *tensors) as a module of its own, so that functional_call can put other parameters in its place."""

    def __init__(self, function, module):
        super().__init__()
        self.function, self.module = function, module

    def forward(self, *tensors):
        return self.function(self.module, *tensors)


def compiled(function):
    """function(module, *tensors) -> tensors, with its derivatives by the module's parameters, as one compiled function on a CPU.

    It is traced at the first call, with the shapes of that call and the parameters that require a gradient then; TorchInductor
    keeps what it compiled on disk. Not for functions that change a buffer or draw random numbers.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # slow to import, and few runs compile

    code = None

    def call(module, *tensors):
        nonlocal code
        params = {name: p.detach() for name, p in module.named_parameters()}
        if code is None:
            moves = {name: p.requires_grad for name, p in module.named_parameters()}

            def pure(params, *tensors):
                leaves = {f"module.{name}": p.detach().requires_grad_(moves[name]) for name, p in params.items()}
                return functional_call(Method(function, module), leaves, tuple(tensor.detach() for tensor in tensors))

            code = torch._inductor.compile(make_fx(pure)(params, *tensors), [params, *tensors])
        with torch.no_grad():
            return code(params, *tensors)

    return call


def refuse_to_compile(device):
    """Raises UserError where `compiled` cannot work."""
    if device.type != "cpu":
        raise UserError("--compile is for a CPU; on a GPU the updates are captured in CUDA graphs")
    if not cpp_compiler():
        raise UserError("--compile needs a C++ compiler (g++ or clang++, or $CXX), and there is none")


def cpp_compiler():
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))
