"""How many updates a second several image runs do in one process, in lockstep, against one run alone.

    python -m benchmarks.lockstep --sizes 1 2 4 8 16 --precision tf32 bf16 --networks eager compiled grouped --save lockstep.md

Four ways to compute the networks: `eager` is that of train_images.py; `compiled` passes both through torch.compile, inside the
captured update on a GPU; `contiguous` keeps the channels first; `grouped` trains all runs as one ConvNet, a group of channels for
each run. The last three are choices of this benchmark alone until a GPU has measured them.
"""

import time
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.benchmark import pairs
from models import NETS, build_vae
from training import ImageTrainer
from vsm.cli import Parser, command_line, positive, positive_float
from vsm.device import pick_device, set_precision, synchronise
from vsm.flags import refuse_one_pass
from vsm.many_runs import stream_of
from vsm.runs import write_atomic
from vsm.tables import markdown_table


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("--sizes", nargs="+", type=positive, default=[1, 2, 4, 8], help="numbers of runs at once")
    flag("--pair", choices=pairs(), default="KLD-F", help="pair of objectives")
    flag("--net", choices=NETS, default="conv", help="networks")
    flag("--width", type=positive, default=64, help="their width")
    flag("--precision", nargs="+", choices=("float32", "tf32", "bf16"), default=["float32"], help="arithmetic of the networks")
    flag("--networks", nargs="+", choices=("eager", "compiled", "contiguous", "grouped"), default=["eager"],
         help="how they are computed")
    flag("--samples", type=positive, default=5, help="posterior samples, N")
    flag("--inner-steps", type=positive, default=5, help="encoder updates per decoder update, K")
    flag("--one-pass", action="store_true", help="one forward pass for encoder and decoder; goes with --inner-steps 1")
    flag("--batch", type=positive, default=100, help="images per minibatch of 1 x 32 x 32 pixels")
    flag("--seconds", type=positive_float, default=5, help="time for each number in the table")
    flag("--device", default="auto", help="auto | cpu | cuda | cuda:1 ...")
    flag("--save", required=True, metavar="FILE.md", help="the table to write")
    args = parser.parse_args(argv)
    if "grouped" in args.networks and args.net != "conv":
        parser.error("--networks grouped goes with --net conv, which has convolutions only")
    if args.one_pass:
        learn, infer = pairs()[args.pair]
        refuse_one_pass(parser, SimpleNamespace(learn=learn, infer=infer, latent="gaussian", inner_steps=args.inner_steps,
                                                samples=args.samples, infer_samples=args.samples))
    return args


def main(args):
    device, rows = pick_device(args.device), []
    images = torch.randint(256, (10 * args.batch, 1, 32, 32), dtype=torch.uint8).to(device)
    for precision in args.precision:
        for networks in args.networks:
            set_precision(precision, device)
            rates = measured_rates(args, images, precision, networks)
            rows += [[precision, networks, size, f"{rate:.1f}", f"{1000 / rate:.3f}", f"{rate / rates[0]:.2f}"]
                     for size, rate in zip(args.sizes, rates)]
    heads = ["precision", "networks", "runs at once", "updates a second in all", "ms an update", f"over {args.sizes[0]} at once"]
    write_atomic(Path(args.save), (markdown_table(heads, rows) + "\n").encode())
    print(Path(args.save).read_text())


def measured_rates(args, images, precision, networks):
    """Updates a second of all runs together, for each number of runs."""
    if networks == "grouped":
        return [runs * updates_a_second([run(args, images, precision, networks, 0, runs)], args) for runs in args.sizes]
    trained = [run(args, images, precision, networks, seed) for seed in range(max(args.sizes))]
    return [updates_a_second(trained[:runs], args) for runs in args.sizes]


def run(args, images, precision, networks, seed, groups=1):
    """A trainer and its stream; of `groups` runs in one, with as many channels, latents and gradients as they have together."""
    learn, infer = pairs()[args.pair]
    torch.manual_seed(seed)
    images = images.repeat(1, groups, 1, 1)
    vae = build_vae(args.net, images.shape[1:], 100 * groups, args.width * groups, bf16=precision == "bf16", init_sd=1.0)
    if groups > 1:
        group_convolutions(vae, groups)
    trainer = ImageTrainer(vae.to(images.device), images, learn=learn, infer=infer, estimator="plugin", samples=args.samples,
                           noise=0.1, inner_steps=args.inner_steps, batch=args.batch, lr=1e-4, seed=seed, one_pass=args.one_pass)
    if networks == "compiled":
        vae.encoder.compile()
        vae.decoder.compile()
    if networks == "contiguous":
        vae.to(memory_format=torch.contiguous_format)
    return trainer, stream_of(images.device)


def group_convolutions(model, groups):
    """Replace every convolution by one that connects channels within `groups` groups only."""
    for module in [*model.modules()]:
        for name, conv in module.named_children():
            if isinstance(conv, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
                setattr(module, name, type(conv)(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
                                                 groups=groups, bias=conv.bias is not None))


def updates_a_second(runs, args):
    """Updates of all runs together, an update each in turn, after a warm-up that captures or compiles."""
    def turn():
        for _ in range(args.inner_steps):
            for trainer, stream in runs:
                with stream():
                    trainer.run_step()
        synchronise(runs[0][0].device)

    turn()
    started, turns = time.monotonic(), 0
    while not turns or time.monotonic() - started < args.seconds:
        turn()
        turns += 1
    return turns * args.inner_steps * len(runs) / (time.monotonic() - started)


if __name__ == "__main__":
    command_line(parse_args, main)
