"""A lower bound for the time of a training step: the convolutions and matrix products that its updates cannot do without."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from objectives import INFER, LEARN


def has_floor(learn, infer):
    """Whether the entries of both objectives list the passes that they need."""
    return LEARN[learn].passes is not None and INFER[infer].passes is not None


class Floor:
    """The convolutions and matrix products of an ImageTrainer's updates alone, with the same shapes and memory formats."""

    def __init__(self, trainer, precision):
        x = trainer.images[:trainer.batch].float() / 255
        with torch.no_grad():
            encoder = record_layers(trainer.vae.encoder, partial(trainer.vae.encode, x), precision)
            z = torch.randn(trainer.samples, trainer.batch, trainer.vae.dim_z, device=x.device)
            decoder = record_layers(trainer.vae.decoder, partial(trainer.vae.decode, z), precision)
        self.encoder, self.decoder, self.samples = encoder, decoder, trainer.samples
        self.learn, self.infer, self.inner_steps, self.step = trainer.learn, trainer.infer, trainer.inner_steps, 0
        self.graphs = {}
        if trainer.device.type == "cuda":
            self.graphs = {moves: captured(partial(self.update, moves)) for moves in (False, True)}

    def run_step(self):
        self.step += 1
        with_decoder = self.step % self.inner_steps == 0
        if self.graphs:
            self.graphs[with_decoder].replay()
        else:
            self.update(with_decoder)

    @torch.no_grad()
    def update(self, with_decoder):
        for layer, name, times in self.passes(with_decoder):
            for _ in range(times):
                layer[name]()

    def passes(self, with_decoder):
        """Yields (layer, name of a pass, number of times) for every pass of one update."""
        moving = [INFER[self.infer]] + ([LEARN[self.learn]] if with_decoder and not LEARN[self.learn].joint else [])
        for entry in moving:
            for layers, (forward, inputs, weights, first) in zip((self.encoder, self.decoder), entry.passes(self.samples)):
                for i, layer in enumerate(layers):
                    yield from ((layer, "forward", forward), (layer, "input", inputs if i else first), (layer, "weight", weights))

    @property
    def flops(self):
        """Floating-point operations per step, on average."""
        without, with_decoder = (sum(layer["flops"] * times for layer, _, times in self.passes(kind)) for kind in (False, True))
        return ((self.inner_steps - 1) * without + with_decoder) / self.inner_steps


def record_layers(network, run, precision):
    """The layer_passes of every convolution and linear layer of `network`, in the order in which run() calls them."""
    layers = []

    def hook(module, inputs, output):
        tensors = inputs[0], module.weight, output
        layers.append(layer_passes(module, *(t.bfloat16() if precision == "bf16" else t for t in tensors)))

    kinds = nn.Conv2d, nn.ConvTranspose2d, nn.Linear
    handles = [module.register_forward_hook(hook) for module in network.modules() if isinstance(module, kinds)]
    run()
    for handle in handles:
        handle.remove()
    return layers


def layer_passes(module, x, weight, y):
    """Functions for the forward pass of a layer y = f(x) and its gradients by input and weight, and the operations of each."""
    transposed = isinstance(module, nn.ConvTranspose2d)
    positions = x if transposed else y  # the side on which every position meets the whole kernel
    flops = {"flops": 2 * weight.numel() * positions.numel() // positions.shape[1]}  # of each of the three passes
    if isinstance(module, nn.Linear):
        return flops | {"forward": lambda: F.linear(x, weight), "input": lambda: y @ weight, "weight": lambda: y.T @ x}
    shape = (module.stride, module.padding, module.dilation, transposed, module.output_padding, module.groups)
    backward = partial(torch.ops.aten.convolution_backward, y, x, weight, None, *shape)
    return flops | {"forward": lambda: torch.ops.aten.convolution(x, weight, None, *shape),
                    "input": lambda: backward([True, False, False]), "weight": lambda: backward([False, True, False])}


def captured(function):
    """function(), which draws no random numbers and changes no state, as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph
