"""Measure the speed of training against a plain step of the same mathematics.

The tables of docs/machines.md, on a GPU (on a CPU, only its part with --net conv ends within minutes):
    python -m benchmarks.benchmark --image 1x32 3x64 --precision float32 tf32 bf16
Seconds on a CPU, to see that it runs:
    python -m benchmarks.benchmark --net conv --width 8 --batch 20 --pairs KLD-F --repeats 2

The modes that are compared run in turns: in each of `--repeats` turns every mode is timed once. A ratio is the median over the
turns, with the smallest and the largest. The mode `reference` is the step as one writes it down (benchmarks/reference_step.py).
`eager` is the step of train_images.py, and `captured` the same as a CUDA graph.
"""

import math
import time
from functools import partial
from itertools import product

import numpy as np
import torch

from benchmarks.reference_step import INFERENCE, OBJECTIVES, ReferenceStep
from models import build_vae
from objectives import INFER, LEARN, label
from training import ImageTrainer
from vsm.cli import Parser, add_output, command_line, positive
from vsm.device import keep_freed_memory, pick_device, set_precision, synchronise
from vsm.names import run_name
from vsm.runs import Run
from vsm.tables import markdown_table

HEADER = ["network", "pair", "batch", "mode", "precision", "ms a step", "images/s", "times as fast as the reference"]


def pairs():
    """{label: (learn, infer)} of every pair of --learn and --infer that can train, added entries included."""
    return {label(learn, infer): (learn, infer) for infer in INFER for learn in LEARN
            if INFER[infer].joint == LEARN[learn].joint and (learn == infer or not LEARN[learn].joint)}


def seconds_per_call(function, calls, device):
    """Wall-clock seconds of a call of function(), the mean over `calls` calls."""
    synchronise(device)
    began = time.perf_counter()
    for _ in range(calls):
        function()
    synchronise(device)
    return (time.perf_counter() - began) / calls


def time_in_turns(makers, calls, repeats, device):
    """Time several modes in turns: {key: seconds per step [repeats]}.

    makers: {key: () -> an object with run_step()}, a key being (mode, precision).
    """
    steppers, times = {}, {key: [] for key in makers}
    for key, make in makers.items():
        prepare_process(*key, device)
        steppers[key] = make()
        seconds_per_call(steppers[key].run_step, calls, device)
    for _ in range(repeats):
        for key, stepper in steppers.items():
            prepare_process(*key, device)
            times[key].append(seconds_per_call(stepper.run_step, calls, device))
    return {key: np.array(seconds) for key, seconds in times.items()}


def prepare_process(mode, precision, device):
    """Set precision and malloc as train_images.py does; the reference step keeps the default malloc."""
    set_precision(precision, device)
    keep_freed_memory(mode != "reference")


def training_rows(args, device, image, net, pair):
    """Yields the rows of one pair, one for each mode and precision."""
    channels, side = map(int, image.split("x"))
    learn, infer = pairs()[pair]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.inner_steps * args.batch, channels, side, side), dtype=torch.uint8, generator=generator)
    resident_images = images.to(device)
    options = {"learn": learn, "infer": infer, "samples": args.samples, "inner_steps": args.inner_steps, "noise": 0.1,
               "batch": args.batch, "lr": 1e-4}

    def vae(precision="float32"):
        torch.manual_seed(0)
        return build_vae(net, images.shape[1:], args.dim_z, args.width, bf16=precision == "bf16").to(device)

    def trainer(precision, graph):
        return ImageTrainer(vae(precision), resident_images, estimator="plugin", seed=0, graph=graph, **options)

    names = {"image": image, "net": net, "pair": pair, "batch": args.batch}
    cycles = 20 if device.type == "cuda" else 1
    for precision in args.precision:  # one at a time, so that the CUDA graphs of one are freed before the next makes its own
        makers = {}
        if precision == args.precision[0] and learn in OBJECTIVES and (infer in INFERENCE or infer == learn):
            makers["reference", "float32"] = lambda: ReferenceStep(vae(), images, device, **options)
        makers["eager", precision] = partial(trainer, precision, graph=False)
        if device.type == "cuda":
            makers["captured", precision] = partial(trainer, precision, graph=True)
        for (mode, own), times in time_in_turns(makers, cycles * args.inner_steps, args.repeats, device).items():
            yield {**names, "mode": mode, "precision": own, "seconds": times}


def table_row(row, rows):
    """The cells of one row: its names, its time, and its speed against that of the row that it is compared with."""
    rival = {key: row[key] for key in ("image", "net", "pair")} | {"mode": "reference", "precision": "float32"}
    seconds = next((other["seconds"] for other in rows if rival.items() <= other.items()), math.nan)
    step, speed = np.median(row["seconds"]), seconds / row["seconds"]
    text = f"{np.median(speed):.2f} [{np.min(speed):.2f}, {np.max(speed):.2f}]" if np.isfinite(speed).all() else "-"
    return [f"{row['net']} {row['image']}", row["pair"], row["batch"], row["mode"], row["precision"],
            f"{1e3 * step:.4g}", f"{row['batch'] / step:.4g}", text]


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("--pairs", nargs="+", choices=pairs(), default=list(pairs()), metavar="PAIR",
         help="pairs of objectives, named as in the paper")
    flag("--precision", nargs="+", choices=("float32", "tf32", "bf16"), default=["float32"],
         help="precisions of the arithmetic; tf32 needs a GPU")
    flag("--repeats", type=positive, default=5, help="turns; each times every mode once")
    flag("--samples", type=positive, default=5, help="posterior samples per image, N")
    flag("--net", nargs="+", choices=("conv", "resnet"), default=["conv", "resnet"], help="networks")
    flag("--image", nargs="+", choices=("1x32", "3x64"), default=["1x32"], help="channels and side of the images")
    flag("--width", type=positive, default=None, help="base channels (default: 64)")
    flag("--dim-z", type=positive, default=100, help="latent dimensions")
    flag("--inner-steps", type=positive, default=5, help="encoder updates per decoder update, K")
    flag("--batch", type=positive, default=100, help="images per minibatch")
    add_output(flag, "runs/benchmark")
    args = parser.parse_args(argv)
    args.out = args.out or f"runs/benchmark/{run_name(args, ('net', 'image', 'precision'), vars(parser.parse_args([])))}"
    return args


def main(args):
    device = pick_device(args.device)
    for precision in args.precision:
        set_precision(precision, device)  # here, so that a precision that the device lacks ends the script before it measures
    with Run(args.out, "benchmark", vars(args), device, args.overwrite) as run:
        if not run.status:
            cases = product(args.image, args.net, args.pairs)
            rows = [row for case in cases for row in training_rows(args, device, *case)]
            print(markdown_table(HEADER, [table_row(row, rows) for row in rows]))
            run.save_metrics(**{name: np.array([row[name] for row in rows]) for name in rows[0]}, status="ok")


if __name__ == "__main__":
    command_line(parse_args, main)
