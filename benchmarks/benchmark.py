"""Measure the speed of training against a plain step of the same mathematics.

The tables of docs/machines.md, on a GPU (on a CPU, only its part with --net conv ends within minutes):
    python -m benchmarks.benchmark --image 1x32 3x64 --precision float32 tf32 bf16
Ten seconds on a CPU:
    python -m benchmarks.benchmark --quick

The modes that are compared run in turns: in each of `--repeats` turns every mode is timed once. A ratio is the median over the
turns, with the smallest and the largest. The mode `reference` is the step as one writes it down (benchmarks/reference_step.py).
`eager` is the step of train_images.py, and `captured` the same as a CUDA graph.
"""

import math
import os
import time
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import torch

import train_synthetic
from benchmarks.reference_step import ReferenceStep, has_reference
from models import build_vae
from objectives import INFER, LEARN, label
from training import ImageTrainer
from vsm.cli import Parser, command_line, positive
from vsm.cuda_graphs import cpp_compiler
from vsm.device import keep_freed_memory, pick_device, set_precision, synchronise
from vsm.names import flag_name
from vsm.runs import Run
from vsm.tables import markdown_table


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


def timed_rows(names, makers, calls, args, device):
    """Yields a row for each (mode, precision) of `makers`, see time_in_turns; `names` says what is timed."""
    for (mode, precision), times in time_in_turns(makers, calls, args.repeats, device).items():
        yield {**names, "mode": mode, "precision": precision, "seconds": times}


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

    names = {"part": "images", "image": image, "net": net, "pair": pair, "size": args.batch}
    cycles = 20 if device.type == "cuda" else 1
    for precision in args.precision:  # one at a time, so that the CUDA graphs of one are freed before the next makes its own
        makers = {}
        if precision == args.precision[0] and has_reference(learn, infer):
            makers["reference", "float32"] = lambda: ReferenceStep(vae(), images, device, **options)
        makers["eager", precision] = partial(trainer, precision, graph=False)
        if device.type == "cuda":
            makers["captured", precision] = partial(trainer, precision, graph=True)
        yield from timed_rows(names, makers, cycles * args.inner_steps, args, device)


def images_part(args, device):
    for image, net, pair in product(args.image, args.net, args.pairs):
        yield from training_rows(args, device, image, net, pair)


def ensemble_part(args, device):
    """2-D VAEs: S seeds as one ensemble, eager and compiled, against one seed after another; seconds of one update of all S."""
    for members in args.members:
        def trainer(seed, seeds, *more):
            flags = ["--seed", str(seed), "--seeds", str(seeds), *(["--batch", "100"] if args.quick else []), *more]
            return train_synthetic.EnsembleTrainer(train_synthetic.parse_args(flags), device)

        def one_after_another(trainer=trainer, members=members):
            alone = [trainer(seed, 1) for seed in range(members)]
            return SimpleNamespace(run_step=lambda: [one.run_step() for one in alone])

        makers = {("loop", "float32"): one_after_another, ("together", "float32"): partial(trainer, 0, members)}
        if device.type == "cpu" and cpp_compiler():
            makers["compiled", "float32"] = partial(trainer, 0, members, "--compile")
        names = {"part": "ensemble", "image": "2", "net": "mlp", "pair": "KLD-F", "size": members}
        yield from timed_rows(names, makers, 20, args, device)


PARTS = {"images": images_part, "ensemble": ensemble_part}


def print_report(rows):
    """Print the table of all rows."""
    header = ["part", "network", "pair", "size", "mode", "precision", "ms a step", "size/s",
              "times as fast as the reference (the loop)"]
    print(markdown_table(header, [table_row(row, rows) for row in rows]))


def table_row(row, rows):
    """The cells of one row: its names, its time, and its speed against that of the row that it is compared with."""
    mode, precision = ("reference", "float32") if row["part"] == "images" else ("loop", row["precision"])
    rival = {key: row[key] for key in ("part", "image", "net", "pair", "size")} | {"mode": mode, "precision": precision}
    seconds = next((other["seconds"] for other in rows if rival.items() <= other.items()), math.nan)
    step, speed = np.median(row["seconds"]), seconds / row["seconds"]
    return [row["part"], f"{row['net']} {row['image']}", row["pair"], row["size"], row["mode"], row["precision"],
            f"{1e3 * step:.4g}", f"{row['size'] / step:.4g}", median_and_range(speed)]


def median_and_range(values, form=".2f"):
    """The text "median [smallest, largest]"; "-" where a value is not finite."""
    if not np.isfinite(values).all():
        return "-"
    return f"{np.median(values):{form}} [{np.min(values):{form}}, {np.max(values):{form}}]"


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    flag = parser.add_argument_group("experiment").add_argument
    flag("--part", choices=(*PARTS, "all"), default="images", help="what is timed: images: every pair; "
         "ensemble: 2-D VAEs against a loop over seeds")
    flag("--pairs", nargs="+", choices=pairs(), default=list(pairs()), metavar="PAIR",
         help="pairs of objectives of --part images, named as in the paper")
    flag("--precision", nargs="+", choices=("float32", "tf32", "bf16"), default=["float32"],
         help="precisions of the arithmetic; tf32 needs a GPU")
    flag("--repeats", type=positive, default=5, help="turns; each times every mode once")
    flag("--samples", type=positive, default=5, help="posterior samples per image, N")
    flag("--members", nargs="+", type=positive, default=[1, 3, 10, 30], help="ensemble sizes of --part ensemble")
    flag("--quick", action="store_true", help="other defaults: a tiny model, three pairs and two turns; "
         "it shows that the script runs, not how fast")
    flag = parser.add_argument_group("model").add_argument
    flag("--net", nargs="+", choices=("conv", "resnet"), default=["conv", "resnet"], help="networks")
    flag("--image", nargs="+", choices=("1x32", "3x64"), default=["1x32"], help="channels and side of the images")
    flag("--width", type=positive, default=None, help="base channels (default: 64)")
    flag("--dim-z", type=positive, default=100, help="latent dimensions")
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--inner-steps", type=positive, default=5, help="encoder updates per decoder update, K")
    flag("--batch", type=positive, default=100, help="images per minibatch of --part images")
    flag = parser.add_argument_group("output").add_argument
    flag("--device", default="auto", help="auto | cpu | cuda | cuda:1 ...")
    flag("--threads", type=positive, default=None, help="threads of the CPU (default: PyTorch's)")
    flag("--out", default=None, help="the run's folder (default: runs/benchmark/PART)")
    flag("--overwrite", action="store_true", help="measure again what was measured")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(net=["conv"], width=8, dim_z=10, samples=2, inner_steps=2, batch=20, repeats=2, members=[3],
                            pairs=["KLD-F", "FD-B", "FAE"])
        args = parser.parse_args(argv)
    if args.threads and args.threads > 4 * os.cpu_count():
        parser.error(f"--threads {args.threads} is more than four times the {os.cpu_count()} processors here")
    for name, value in vars(args).items():
        if isinstance(value, list) and len(set(value)) < len(value):
            parser.error(f"--{flag_name(name)} names one twice")
    args.out = args.out or f"runs/benchmark/{'quick' if args.quick else args.part}"
    return args


def main(args):
    device = pick_device(args.device)
    for precision in args.precision:
        set_precision(precision, device)  # here, so that a precision that the device lacks ends the script before it measures
    torch.set_num_threads(args.threads or torch.get_num_threads())
    with Run(args.out, "benchmark", vars(args), device, args.overwrite) as run:
        if not run.status:
            rows = [row for part in (PARTS if args.part == "all" else [args.part]) for row in PARTS[part](args, device)]
            print_report(rows)
            run.save_metrics(**{name: np.array([row[name] for row in rows]) for name in rows[0]}, status="ok")


if __name__ == "__main__":
    command_line(parse_args, main)
