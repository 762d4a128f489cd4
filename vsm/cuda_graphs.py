"""Fast training steps: CUDA graphs on a GPU (`Graphs`, `capture`) and TorchInductor on a CPU (`compiled`)."""

import os
import shutil
import warnings

import torch
from torch.func import functional_call
from torch.torch_version import TorchVersion

from vsm.cli import UserError


class Graphs:
    """The CUDA graphs of a trainer's updates, one per kind of update, captured at its first call and replayed afterwards.

    They share a stream and a memory pool, because only one of them runs at a time.
    """

    def __init__(self, device):
        self.stream, self.pool, self.graphs = torch.cuda.Stream(device), torch.cuda.graph_pool_handle(), {}

    def run(self, kind, update, state, generators=()):
        """Replay the graph of this `kind`. state() has every tensor that update() changes, `generators` those it draws from."""
        if kind not in self.graphs:
            self.graphs[kind] = capture(update, state(), generators, self.stream, self.pool)
        self.graphs[kind].replay()


def capture(update, state, generators, stream, pool):
    """The CUDA graph of update(). The warm-up calls are undone, so that a replayed run equals an eager one."""
    before, drawn = [tensor.clone() for tensor in state.values()], [generator.get_state() for generator in generators]
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*capturable=True.*")  # Adam warns of steps outside a capture
        for _ in range(3):
            update()
            for tensor, value in zip(state.values(), before):
                tensor.copy_(value)
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for generator, value in zip(generators, drawn):
        generator.set_state(value)
        if TorchVersion(torch.__version__) < "2.14":  # later versions register the generators by themselves
            graph.register_generator_state(generator)
    with torch.cuda.graph(graph, pool=pool, stream=stream):  # the warm-up's stream: library handles and workspaces are per stream
        update()
    return graph


class Method(torch.nn.Module):
    """function(module, *tensors) as a module, so that functional_call can replace the parameters of `module`."""

    def __init__(self, function, module):
        super().__init__()
        self.function, self.module = function, module

    def forward(self, *tensors):
        return self.function(self.module, *tensors)


def compiled(function):
    """Compile function(module, *tensors) -> tensors for a CPU, together with the derivatives that it takes by autograd.

    The first call traces it, for the shapes of that call and the parameters that require a gradient at that time. TorchInductor
    caches the compiled code on disk. The function may not change a buffer or draw random numbers.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # here, because it is slow to import and few runs compile

    code = None

    def call(module, *tensors):
        nonlocal code
        params = {name: p.detach() for name, p in module.named_parameters()}
        if code is None:
            trained = {name: p.requires_grad for name, p in module.named_parameters()}

            def pure(params, *tensors):
                leaves = {f"module.{name}": p.detach().requires_grad_(trained[name]) for name, p in params.items()}
                return functional_call(Method(function, module), leaves, tuple(tensor.detach() for tensor in tensors))

            code = torch._inductor.compile(make_fx(pure)(params, *tensors), [params, *tensors])
        with torch.no_grad():
            return code(params, *tensors)

    return call


def refuse_to_compile(device):
    """Raises UserError where `compiled` cannot work."""
    if device.type != "cpu":
        raise UserError("--compile works on a CPU only; on a GPU the updates are captured in CUDA graphs")
    if not cpp_compiler():
        raise UserError("--compile needs a C++ compiler (g++ or clang++, or $CXX), which was not found")


def cpp_compiler():
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))
