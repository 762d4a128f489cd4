"""Measure the speed of training: against a plain step of the same mathematics, and against its convolutions alone.

All of the README's performance table (a GPU; on a CPU, --net conv is the part that ends within minutes):
    python benchmark.py --image 1x32 3x64 --precision float32 tf32 bf16
Ten seconds on a CPU:
    python benchmark.py --quick

What is compared runs in turns, one timing of each after the other, `--repeats` times over: a ratio is the median over the turns,
with its smallest and largest. Modes: `plain` is the step as one writes it down (class Plain), `eager` and `captured` (GPU) are
train_images.py's, `floor` the convolutions and matrix products of that step alone.
"""

import argparse
import ctypes
import math
import re
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import grad
from torch.distributions import Normal, kl_divergence
from torch.utils.data import DataLoader, TensorDataset

import plots
import toy_inference
import train_synthetic
from metrics import iw_log_likelihood
from models import build_ensemble, build_vae
from objectives import INFER, LEARN, label
from training import Trainer
from vsm.cli import Formatter, command_line, positive
from vsm.device import keep_freed_memory, pick_device, set_precision
from vsm.runs import Run, flag_name
from vsm.speed import cpp_compiler

PAIRS = {label(learn, infer): (learn, infer) for infer in INFER for learn in LEARN if (learn == "fae") == (infer == "fae")}
TABLE1 = ("KLD-ELBO", "KLD-F", "FD-F", "KLD-S", "FD-S", "KLD-B", "FD-B")
RUN_STEPS = {"1x32": 600_000, "3x64": 1_627_000}  # 1000 epochs of MNIST or Fashion-MNIST, of CelebA, at batch 100
TABLE1_RUNS = {"1x32": 2, "3x64": 1}  # data sets of this shape


# -------------------------------------------------------------------------------------------------------- the plain step


def plain_loss(vae, x, noise, objective, reparametrised):
    """The mean loss over x [B, C, H, W] by log densities and autograd alone; noise [N, B, Dz]. Every score keeps its graph.

    objective: elbo | fd | swersky | bao | posterior_fd | fae, as in objectives.py.
    """
    def encode(x):
        mean, log_std = vae.encoder(x).chunk(2, dim=-1)
        return Normal(mean, log_std.exp())

    x = x.detach().requires_grad_(objective == "bao")
    q, prior = encode(x), Normal(0.0, 1.0)
    z = q.loc + q.scale * noise
    z = z if reparametrised else z.detach().requires_grad_()
    xs = x.detach().expand(len(z), *x.shape).clone().requires_grad_()  # an x per posterior sample, for a_n
    log_likelihood = Normal(vae.decoder(z.flatten(0, 1)).view_as(xs), (vae.log_gamma / 2).exp()).log_prob(xs).flatten(2).sum(-1)
    if objective == "elbo":
        return (kl_divergence(q, prior).sum(-1) - log_likelihood.mean(0)).mean()

    def a():
        return grad(log_likelihood.sum(), xs, create_graph=True)[0].flatten(2)

    def b(x, q):
        return torch.stack([grad(q.log_prob(z_n).sum(), x, create_graph=True)[0] for z_n in z]).flatten(2)

    def c():
        return grad((q.log_prob(z) - prior.log_prob(z)).sum() - log_likelihood.sum(), z, create_graph=True)[0]

    if objective == "posterior_fd":
        return half_square(c())
    a, lap = a(), -x[0].numel() / vae.log_gamma.exp()
    if objective == "fd":
        return half_square(a) + lap
    if objective == "swersky":
        return 2 * half_square(a) + lap - half_square(a.mean(0))
    if objective == "bao":
        return half_square(a.mean(0)) + (a * b(x, q)).sum(-1).mean() + lap
    x = x.detach().requires_grad_()  # fae: b_n holds z fixed, so the x that it differentiates by is not the one that z came from
    return half_square(a) + half_square(b(x, encode(x))) + half_square(c()) + lap


def half_square(u):
    return (u**2).sum(-1).mean() / 2


class Plain:
    """Alg. 1 written down directly: a DataLoader, scores by autograd, gradients of all weights at every update, torch's default Adam."""

    def __init__(self, vae, images, device, *, learn, infer, samples, inner_steps, noise, batch, lr):
        self.vae, self.device, self.learn, self.infer = vae, device, learn, infer
        self.samples, self.inner_steps, self.noise, self.step = samples, inner_steps, noise, 0
        self.phi = torch.optim.Adam(vae.encoder.parameters(), lr)
        self.theta = torch.optim.Adam([*vae.decoder.parameters(), vae.log_gamma], lr)
        self.loader = DataLoader(TensorDataset(images), batch, shuffle=True, drop_last=True)
        self.batches = iter(())

    def run_step(self):
        self.step += 1
        x = self.minibatch().to(self.device).float() / 255
        x = x + self.noise * torch.randn_like(x)
        if self.learn == "fae":
            self.descend(x, "fae", True, self.phi, self.theta)
            return
        self.descend(x, "elbo" if self.infer == "kld" else "posterior_fd", self.infer != "fd", self.phi)
        if self.step % self.inner_steps == 0:
            self.descend(x, self.learn, False, self.theta)

    def minibatch(self):
        images = next(self.batches, None)
        if images is None:
            self.batches = iter(self.loader)
            images = next(self.batches)
        return images[0]

    def descend(self, x, objective, reparametrised, *optimisers):
        noise = torch.randn(self.samples, len(x), self.vae.dim_z, device=self.device)
        loss = plain_loss(self.vae, x, noise, objective, reparametrised)
        self.phi.zero_grad()
        self.theta.zero_grad()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()


# ------------------------------------------------------------------------------------------------------------- the floor

# Passes through the encoder (of B data) and the decoder (of N B samples) that an update cannot do without: forward, input gradient,
# weight gradient, and input gradient of the first layer, which a network needs only where x or z itself is differentiated.
# A double backward is a pass forward and one back; with weights that move, each input gradient has a weight gradient of its own.
UPDATE_ENCODER = (1, 1, 1, 0)
PASSES = {
    "infer kld": lambda N: (UPDATE_ENCODER, (1, 1, 0, 1)),
    "infer fd": lambda N: (UPDATE_ENCODER, (1, 1, 0, 1)),
    "infer fd-repar": lambda N: (UPDATE_ENCODER, (2, 2, 0, 2)),
    "infer fae": lambda N: ((1 + N, 1 + N, 1 + N, N), (2, 2, 2, 2)),
    "learn elbo": lambda N: ((1, 0, 0, 0), (1, 1, 1, 0)),
    "learn fd": lambda N: ((1, 0, 0, 0), (1, 1, 1, 0)),
    "learn swersky": lambda N: ((1, 0, 0, 0), (1, 1, 1, 0)),
    "learn bao": lambda N: ((1, N, 0, N), (1, 1, 1, 0)),
}


class Floor:
    """The convolutions and matrix products of the updates alone, with the shapes and memory formats that they meet there."""

    def __init__(self, trainer, precision):
        x = trainer.images[:trainer.batch].float() / 255
        with torch.no_grad():
            encoder = record_layers(trainer.vae.encoder, partial(trainer.vae.encode, x), precision)
            z = torch.randn(trainer.samples, trainer.batch, trainer.vae.dim_z, device=x.device)
            decoder = record_layers(trainer.vae.decoder, partial(trainer.vae.decode, z), precision)
        self.encoder, self.decoder, self.samples = encoder, decoder, trainer.samples
        self.learn, self.infer, self.inner_steps, self.step = trainer.learn, trainer.infer, trainer.inner_steps, 0
        self.graphs = {with_decoder: captured(partial(self.update, with_decoder)) for with_decoder in (False, True)} \
            if trainer.device.type == "cuda" else {}

    def run_step(self):
        self.step += 1
        with_decoder = self.step % self.inner_steps == 0
        self.graphs[with_decoder].replay() if self.graphs else self.update(with_decoder)

    @torch.no_grad()
    def update(self, with_decoder):
        for layer, name, times in self.passes(with_decoder):
            for _ in range(times):
                layer[name]()

    def passes(self, with_decoder):
        """(layer, pass, how often) of one update."""
        for kind in [f"infer {self.infer}"] + ([f"learn {self.learn}"] if with_decoder and self.learn != "fae" else []):
            for layers, (forward, inputs, weights, first) in zip((self.encoder, self.decoder), PASSES[kind](self.samples)):
                for i, layer in enumerate(layers):
                    yield from ((layer, "forward", forward), (layer, "input", inputs if i else first), (layer, "weight", weights))

    @property
    def flops(self):
        """Floating-point operations per step, on average."""
        without, with_decoder = (sum(layer["flops"] * times for layer, _, times in self.passes(kind)) for kind in (False, True))
        return ((self.inner_steps - 1) * without + with_decoder) / self.inner_steps


def record_layers(network, run, precision):
    """For every convolution and linear layer, in the order of run(): closures of its forward pass and of its two gradients."""
    layers = []

    def hook(module, inputs, output):
        layers.append(layer_passes(module, *(t.bfloat16() if precision == "bf16" else t for t in (inputs[0], module.weight, output))))

    handles = [m.register_forward_hook(hook) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    run()
    for handle in handles:
        handle.remove()
    return layers


def layer_passes(module, x, weight, y):
    transposed = isinstance(module, nn.ConvTranspose2d)
    few = x if transposed else y  # the side on which every position meets the whole kernel
    flops = {"flops": 2 * weight.numel() * few.numel() // few.shape[1]}  # of each of the three passes
    if isinstance(module, nn.Linear):
        return flops | {"forward": lambda: F.linear(x, weight), "input": lambda: y @ weight, "weight": lambda: y.T @ x}
    shape = (module.stride, module.padding, module.dilation, transposed, module.output_padding, module.groups)
    backward = partial(torch.ops.aten.convolution_backward, y, x, weight, None, *shape)
    return flops | {"forward": lambda: torch.ops.aten.convolution(x, weight, None, *shape),
                    "input": lambda: backward([True, False, False]), "weight": lambda: backward([False, True, False])}


def captured(function):
    """function() as a CUDA graph; it draws nothing and changes nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph


def matrix_rate(device, precision):
    """Floating-point operations per second of a large matrix product, [5] timings."""
    set_precision(precision, device)
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    times = [seconds(lambda: a @ b, 10, device) for _ in range(6)][1:]
    return 2 * n**3 / np.array(times)


# -------------------------------------------------------------------------------------------------------------- timing


def seconds(function, calls, device):
    """Wall-clock seconds per call."""
    synchronise(device)
    began = time.perf_counter()
    for _ in range(calls):
        function()
    synchronise(device)
    return (time.perf_counter() - began) / calls


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(makers, calls, repeats, device):
    """Time contenders in turns: {key: (seconds per step [repeats], bytes)} for makers {(mode, precision): () -> what has run_step()}.

    bytes: the most that making it and its first steps held at once.
    """
    contenders, memory, times = {}, {}, {key: [] for key in makers}
    for key, make in makers.items():
        def first_steps(key=key, make=make):
            contenders[key] = make()
            seconds(contenders[key].run_step, calls, device)

        prepare(*key, device)
        memory[key] = peak_memory_of(first_steps, device)
    for _ in range(repeats):
        for key, contender in contenders.items():
            prepare(*key, device)
            times[key].append(seconds(contender.run_step, calls, device))
    return {key: (np.array(times[key]), memory[key]) for key in makers}


def prepare(mode, precision, device):
    """The process as train_images.py sets it up, but for the plain step, which has malloc as it comes."""
    set_precision(precision, device)
    keep_freed_memory(mode != "plain")


def peak_memory_of(function, device):
    """Bytes by which function() raises the memory in use at its peak: allocated on a GPU, resident on Linux, elsewhere NaN."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of VmRSS
        before = resident("VmRSS")
    except (OSError, AttributeError):
        function()
        return math.nan
    function()
    return resident("VmHWM") - before


def resident(field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# --------------------------------------------------------------------------------------------------------------- parts


def model(args, device, image, net, precision="float32"):
    channels, side = map(int, image.split("x"))
    torch.manual_seed(0)
    return build_vae(net, (channels, side, side), args.dim_z, args.width, bf16=precision == "bf16").to(device)


def recipe(args, pair, batch):
    """What the plain step and the Trainer's are given alike."""
    learn, infer = PAIRS[pair]
    return {"learn": learn, "infer": infer, "samples": args.samples, "inner_steps": args.inner_steps, "noise": 0.1, "batch": batch, "lr": 1e-4}


def training_rows(args, device, part, image, net, pair, batch):
    """One pair in every mode and precision: a row each."""
    channels, side = map(int, image.split("x"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.inner_steps * batch, channels, side, side), dtype=torch.uint8, generator=generator)
    resident_images, common, vae = images.to(device), recipe(args, pair, batch), partial(model, args, device, image, net)

    def trainer(precision, graph):
        return Trainer(vae(precision), resident_images, estimator="plugin", seed=0, graph=graph, **common)

    makers = {("plain", "float32"): lambda: Plain(vae(), images, device, **common)}
    for precision in args.precision:
        makers["eager", precision] = partial(trainer, precision, graph=False)
        if device.type == "cuda":
            makers["captured", precision] = partial(trainer, precision, graph=True)
        makers["floor", precision] = lambda precision=precision: Floor(trainer(precision, graph=False), precision)
    flops = Floor(trainer("float32", graph=False), "float32").flops
    cycles = 20 if device.type == "cuda" else 1
    for (mode, precision), (times, memory) in measure(makers, cycles * args.inner_steps, args.repeats, device).items():
        yield {"part": part, "image": image, "net": net, "pair": pair, "size": batch, "mode": mode, "precision": precision,
               "seconds": times, "peak_memory": memory, "flops": flops}


def images_part(args, device):
    for image in args.image:
        for net in args.net:
            for pair in args.pairs:
                yield from training_rows(args, device, "images", image, net, pair, args.batch)


def batch_part(args, device):
    """Time per image against batch size."""
    for batch in args.batches:
        yield from training_rows(args, device, "batch", args.image[0], args.net[0], "KLD-F", batch)


def sweep_part(args, device):
    """Several image runs at once, as processes or (GPU) on streams of one process, against one after another: seconds per step of all."""
    calls = (20 if device.type == "cuda" else 1) * args.inner_steps
    threads = torch.get_num_threads()
    for runs in args.runs:
        alone, *processes = [start_process(args, device, calls, n) for n in [threads] + [max(1, threads // runs)] * runs]
        contenders = {"loop": partial(steps_of, [alone], runs), "processes": partial(steps_of, processes)}
        if device.type == "cuda":
            contenders["streams"] = streams(args, device, calls, runs)
        times = {mode: [] for mode in contenders}
        for _ in range(args.repeats):
            for mode, contender in contenders.items():
                times[mode].append(contender())
        for pipe in [alone, *processes]:
            pipe.send("stop")
        for mode, values in times.items():
            yield small_row("sweep", "KLD-F", runs, mode, np.array(values), math.nan, "float32") | {"image": args.image[0], "net": args.net[0]}


def sweep_trainer(args, device):
    channels, side = map(int, args.image[0].split("x"))
    images = torch.zeros(args.inner_steps * args.batch, channels, side, side, dtype=torch.uint8, device=device)
    return Trainer(model(args, device, args.image[0], args.net[0]), images, estimator="plugin", seed=0, **recipe(args, "KLD-F", args.batch))


def start_process(args, device, calls, threads):
    """The pipe of a new process that trains: to whatever it is sent but "stop" it answers with the seconds per step of `calls` steps."""
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=answer, args=(there, args, device, calls, threads), daemon=True).start()
    here.recv()  # it has made its first steps
    return here


def answer(pipe, args, device, calls, threads):
    pick_device(str(device))
    torch.set_num_threads(threads)
    trainer = sweep_trainer(args, device)
    pipe.send(seconds(trainer.run_step, calls, device))
    while pipe.recv() != "stop":
        pipe.send(seconds(trainer.run_step, calls, device))


def steps_of(pipes, times=1):
    """Seconds that the slowest takes per step when all train at once, `times` over."""
    for pipe in pipes:
        pipe.send("go")
    return times * max(pipe.recv() for pipe in pipes)


def streams(args, device, calls, runs):
    """() -> seconds per step of all, of several runs in this process, each on a stream of its own."""
    contenders = [(sweep_trainer(args, device), torch.cuda.Stream(device)) for _ in range(runs)]

    def step():
        for trainer, stream in contenders:
            with torch.cuda.stream(stream):
                trainer.run_step()

    synchronise(device)
    seconds(step, calls, device)
    return partial(seconds, step, calls, device)


def ensemble_part(args, device):
    """2-D VAEs: S seeds as one ensemble, eager and compiled, against one seed after another, seconds per decoder update of all."""
    for members in args.members:
        def trainer(seed, seeds, *more):
            flags = ["--seed", str(seed), "--seeds", str(seeds), *(["--batch", "100"] if args.quick else []), *more]
            return train_synthetic.EnsembleTrainer(train_synthetic.parse_args(flags), device)

        def loop(trainer=trainer, members=members):
            alone = [trainer(seed, 1) for seed in range(members)]
            return SimpleNamespace(run_step=lambda: [one.run_step() for one in alone])

        makers = {("loop", "float32"): loop, ("together", "float32"): partial(trainer, 0, members)}
        if device.type == "cpu" and cpp_compiler():
            makers["compiled", "float32"] = partial(trainer, 0, members, "--compile")
        for (mode, precision), (times, memory) in measure(makers, 20, args.repeats, device).items():
            yield small_row("ensemble", "KLD-F", members, mode, times, memory, precision)


def toy_part(args, device):
    """Toy inference: all starts, likelihoods, objectives and optimisers in one tensor against run after run, seconds per iteration of all."""
    steps, grid = ("2", "2") if args.quick else ("50", "4")
    toy = toy_inference.parse_args(["--iterations", steps, "--compare-loop", steps, "--grid", grid, "--frames", "2"])
    times = {"loop": [], "together": []}
    for _ in range(args.repeats):
        descent = toy_inference.Descent(toy, device)
        while descent.step < toy.iterations:
            descent.advance(descent.noise())
        runs = descent.params[0, 0].numel()
        times["together"].append(runs / descent.rate)
        times["loop"].append(runs / toy_inference.compare_with_loop(toy, device)["loop_rate"].item())
    for mode, values in times.items():
        yield small_row("toy", "all", runs, mode, np.array(values), math.nan, "float64")


def importance_part(args, device):
    """The importance-sampled likelihood of 500 points under ten 2-D VAEs: time and memory against the number of samples."""
    vae = build_ensemble(2, 2, 30, range(10)).to(device)
    x = torch.randn(10, 500, 2, generator=torch.Generator().manual_seed(0)).to(device)
    for samples in args.importance_samples:
        makers = {("streamed", "float32"): lambda samples=samples: SimpleNamespace(run_step=lambda: iw_log_likelihood(vae, x, samples))}
        for (mode, precision), (times, memory) in measure(makers, 1, args.repeats, device).items():
            yield small_row("importance", "KLD-F", samples, mode, times, memory, precision)


def small_row(part, pair, size, mode, times, memory, precision):
    return {"part": part, "image": "2", "net": "mlp", "pair": pair, "size": size, "mode": mode, "precision": precision,
            "seconds": times, "peak_memory": memory, "flops": math.nan}


PARTS = {"images": images_part, "batch": batch_part, "sweep": sweep_part, "ensemble": ensemble_part, "toy": toy_part, "importance": importance_part}


# --------------------------------------------------------------------------------------------------------------- report


def report(rows, rates, hours):
    """The Markdown table, and what it means for the paper's Table 1."""
    for precision, rate in rates.items():
        print(f"matrix product, {precision}: {spread(rate / 1e12, '.3g')} TFLOP/s")
    print("\n| part | network | pair | size | mode | precision | ms a step | size/s | times plain's (the loop's) speed | times the floor's time | "
          "of the matrix rate | peak MiB |\n" + "|---" * 12 + "|")
    for row in rows:
        plain = partner(rows, row, "plain", "float32") if row["part"] in ("images", "batch") else partner(rows, row, "loop", row["precision"])
        floor = partner(rows, row, "floor", row["precision"])
        share = row["flops"] / row["seconds"] / np.median(rates[row["precision"]]) if row["precision"] in rates else math.nan
        print(f"| {row['part']} | {row['net']} {row['image']} | {row['pair']} | {row['size']} | {row['mode']} | {row['precision']} | "
              f"{1e3 * np.median(row['seconds']):.4g} | {row['size'] / np.median(row['seconds']):.4g} | "
              f"{spread(plain / row['seconds'])} | {spread(row['seconds'] / floor)} | "
              f"{number(np.median(share), '.2f')} | {number(row['peak_memory'] / 2**20, '.0f')} |")
    for (mode, precision), duration in hours.items():
        print(f"\nTable 1, {mode}, {precision}: {duration:.1f} hours for one seed of its {len(TABLE1)} columns of ConvNets, "
              f"1000 epochs on MNIST, Fashion-MNIST and CelebA, one run after the other")


def partner(rows, row, mode, precision):
    """The seconds of the row that differs by mode and precision alone; NaN where none was measured."""
    same = ("part", "image", "net", "pair", "size")
    found = [other["seconds"] for other in rows if other["mode"] == mode and other["precision"] == precision
             and all(other[key] == row[key] for key in same)]
    return found[0] if found else math.nan


def number(value, form):
    return f"{value:{form}}" if np.isfinite(value) else "-"


def spread(values, form=".2f"):
    """Median [smallest, largest]."""
    if not np.isfinite(values).all():
        return "-"
    return f"{np.median(values):{form}} [{np.min(values):{form}}, {np.max(values):{form}}]"


def table1_hours(rows):
    """{(mode, precision): hours} where every network, pair and image shape of Table 1 was measured at batch 100."""
    rates = {}
    for row in rows:
        if (row["part"], row["net"], row["size"]) == ("images", "conv", 100) and row["pair"] in TABLE1 and row["mode"] != "floor":
            rates.setdefault((row["mode"], row["precision"]), {})[row["image"], row["pair"]] = np.median(row["seconds"])
    return {key: sum(TABLE1_RUNS[image] * RUN_STEPS[image] * s for (image, _), s in found.items()) / 3600
            for key, found in rates.items() if len(found) == len(RUN_STEPS) * len(TABLE1)}


def recipe_of_the_paper(args):
    return (args.width or 64, args.dim_z, args.samples, args.inner_steps) == (64, 100, 5, 5)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    flag = parser.add_argument_group("experiment").add_argument
    flag("--part", choices=(*PARTS, "all"), default="images", help="images: every pair; batch: KLD-F against the size of the minibatch; "
         "sweep: KLD-F runs at once against one after another; ensemble: 2-D VAEs against a loop over seeds; toy: toy inference against a loop over runs; importance: time and memory against samples")
    flag("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="PAIR", help="of --part images, named as in the paper")
    flag("--precision", nargs="+", choices=("float32", "tf32", "bf16"), default=["float32"], help="tf32 on a GPU only")
    flag("--repeats", type=positive, default=5, help="turns, each of one timing of everything that is compared")
    flag("--samples", type=positive, default=5, help="posterior samples per image, N")
    flag("--batches", nargs="+", type=positive, default=[10, 30, 100, 300], help="sizes of --part batch")
    flag("--runs", nargs="+", type=positive, default=[2], help="how many runs at once in --part sweep")
    flag("--members", nargs="+", type=positive, default=[1, 3, 10, 30], help="sizes of --part ensemble")
    flag("--importance-samples", nargs="+", type=positive, default=[1000, 3000, 10_000, 30_000], help="sizes of --part importance")
    flag("--quick", action="store_true", help="unless given: a tiny model, three pairs and two turns; does it run, not how fast")
    flag = parser.add_argument_group("model").add_argument
    flag("--net", nargs="+", choices=("conv", "resnet"), default=["conv", "resnet"], help="networks; --part batch takes the first")
    flag("--image", nargs="+", choices=RUN_STEPS, default=["1x32"], help="channels and side of the images")
    flag("--width", type=positive, default=None, help="base channels (default: 64)")
    flag("--dim-z", type=positive, default=100, help="latent dimensions")
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--inner-steps", type=positive, default=5, help="encoder updates per decoder update, K")
    flag("--batch", type=positive, default=100, help="images per minibatch of --part images")
    flag = parser.add_argument_group("output").add_argument
    flag("--device", default="auto", help="auto | cpu | cuda | cuda:1 ...")
    flag("--threads", type=positive, default=None, help="of the CPU (default: PyTorch's)")
    flag("--out", default=None, help="the run's folder (default: runs/benchmark/PART)")
    flag("--overwrite", action="store_true", help="measure again what was measured")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(net=["conv"], width=8, dim_z=10, samples=2, inner_steps=2, batch=20, batches=[10, 20], repeats=2, members=[3],
                            importance_samples=[100, 200], pairs=["KLD-F", "FD-B", "FAE"])
        args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, list) and len(set(value)) < len(value):
            parser.error(f"--{flag_name(name)} names one twice")
    args.out = args.out or f"runs/benchmark/{'quick' if args.quick else args.part}"
    return args


def main(args):
    device = pick_device(args.device)
    for precision in args.precision:
        set_precision(precision, device)  # a mistake in it should end the script now
    torch.set_num_threads(args.threads or torch.get_num_threads())
    with Run(args.out, "benchmark", vars(args), device, args.overwrite) as run:
        if not run.status:
            rates = {precision: matrix_rate(device, precision) for precision in dict.fromkeys(["float32", *args.precision])}
            rows = [row for part in (PARTS if args.part == "all" else [args.part]) for row in PARTS[part](args, device)]
            report(rows, rates, table1_hours(rows) if recipe_of_the_paper(args) else {})
            arrays = {name: np.array([row[name] for row in rows]) for name in rows[0]}
            run.save_metrics(**arrays, matrix_precision=np.array(list(rates)), matrix_rate=np.stack(list(rates.values())), status="ok")
        if not (run.path / "benchmark.png").exists():
            plots.benchmark([run.path], run.path / "benchmark.png")


if __name__ == "__main__":
    command_line(parse_args, main)
