"""How many updates a second several image runs do in one process, in lockstep, against one run alone.

    python -m benchmarks.lockstep --sizes 1 2 4 8 16 --precision tf32 bf16 --networks eager compiled --save runs/lockstep.md

`compiled` passes both networks through torch.compile, inside the captured update on a GPU. It is a choice of this benchmark alone
until it has been measured.
"""

import vsm.quiet  # noqa: F401  # isort: skip
import time
from pathlib import Path

import torch

from benchmarks.benchmark import pairs
from models import NETS, build_vae
from training import ImageTrainer
from vsm.cli import Parser, command_line, positive, positive_float
from vsm.device import pick_device, set_precision, synchronise
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
    flag("--networks", nargs="+", choices=("eager", "compiled"), default=["eager"], help="whether torch.compile compiles them")
    flag("--samples", type=positive, default=5, help="posterior samples, N")
    flag("--inner-steps", type=positive, default=5, help="encoder updates per decoder update, K")
    flag("--one-pass", action="store_true", help="one forward pass for encoder and decoder; goes with --inner-steps 1")
    flag("--batch", type=positive, default=100, help="images per minibatch of 1 x 32 x 32 pixels")
    flag("--seconds", type=positive_float, default=5, help="time for each number in the table")
    flag("--device", default="auto", help="auto | cpu | cuda | cuda:1 ...")
    flag("--save", required=True, metavar="FILE.md", help="the table to write")
    return parser.parse_args(argv)


def main(args):
    device, rows = pick_device(args.device), []
    images = torch.randint(256, (10 * args.batch, 1, 32, 32), dtype=torch.uint8).to(device)
    for precision in args.precision:
        for networks in args.networks:
            set_precision(precision, device)
            runs = [run(args, images, precision, networks, seed) for seed in range(max(args.sizes))]
            rates = [updates_a_second(runs[:size], args, device) for size in args.sizes]
            rows += [[precision, networks, size, f"{rate:.1f}", f"{1000 / rate:.3f}", f"{rate / rates[0]:.2f}"]
                     for size, rate in zip(args.sizes, rates)]
            del runs
    heads = ["precision", "networks", "runs at once", "updates a second in all", "ms an update", f"over {args.sizes[0]} at once"]
    write_atomic(Path(args.save), (markdown_table(heads, rows) + "\n").encode())
    print(Path(args.save).read_text())


def run(args, images, precision, networks, seed):
    """A trainer and its stream."""
    learn, infer = pairs()[args.pair]
    torch.manual_seed(seed)
    vae = build_vae(args.net, images.shape[1:], 100, args.width, bf16=precision == "bf16", init_sd=1.0).to(images.device)
    trainer = ImageTrainer(vae, images, learn=learn, infer=infer, estimator="plugin", samples=args.samples, noise=0.1,
                           inner_steps=args.inner_steps, batch=args.batch, lr=1e-4, seed=seed, one_pass=args.one_pass)
    if networks == "compiled":
        vae.encoder.compile()
        vae.decoder.compile()
    return trainer, stream_of(images.device)


def updates_a_second(runs, args, device):
    """Updates of all runs together, an update each in turn, after a warm-up that captures or compiles."""
    def turn():
        for _ in range(args.inner_steps):
            for trainer, stream in runs:
                with stream():
                    trainer.run_step()
        synchronise(device)

    turn()
    started, turns = time.monotonic(), 0
    while not turns or time.monotonic() - started < args.seconds:
        turn()
        turns += 1
    return turns * args.inner_steps * len(runs) / (time.monotonic() - started)


if __name__ == "__main__":
    command_line(parse_args, main)
