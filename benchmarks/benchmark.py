"""Measure the speed of training against a plain step of the same mathematics.

The tables of docs/machines.md, on a GPU (on a CPU, only its part with --net conv ends within minutes):
    python -m benchmarks.benchmark --image 1x32 3x64 --precision float32 tf32 bf16
Ten seconds on a CPU:
    python -m benchmarks.benchmark --quick

The modes that are compared run in turns: in each of `--repeats` turns every mode is timed once. A ratio is the median over the
turns, with the smallest and the largest. The mode `reference` is the step as one writes it down (benchmarks/reference_step.py).
`eager` is the step of train_images.py, and `captured` the same as a CUDA graph.
"""

import vsm.quiet  # noqa: F401  # isort: skip
import math
import os
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import torch

import toy_inference
import train_synthetic
from benchmarks import figure
from benchmarks.reference_step import ReferenceStep, has_reference
from benchmarks.timing import time_in_turns
from benchmarks.toy_loop import compare_with_loop
from metrics import iw_log_likelihood
from models import build_ensemble, build_vae
from objectives import INFER, LEARN, label
from training import ImageTrainer
from vsm.cli import Parser, command_line, positive
from vsm.cuda_graphs import cpp_compiler
from vsm.device import pick_device, set_precision
from vsm.names import flag_name
from vsm.runs import Run
from vsm.tables import markdown_table, number_text


def pairs():
    """{label: (learn, infer)} of every pair of --learn and --infer that can train, added entries included."""
    return {label(learn, infer): (learn, infer) for infer in INFER for learn in LEARN
            if INFER[infer].joint == LEARN[learn].joint and (learn == infer or not LEARN[learn].joint)}


TABLE1 = ("KLD-ELBO", "KLD-F", "FD-F", "KLD-S", "FD-S", "KLD-B", "FD-B")
RUN_STEPS = {"1x32": 600_000, "3x64": 1_627_000}  # 1000 epochs of MNIST or Fashion-MNIST, of CelebA, at batch 100
TABLE1_RUNS = {"1x32": 2, "3x64": 1}  # data sets of this shape


def timed_rows(names, makers, calls, args, device):
    """Yields a row for each (mode, precision) of `makers`, see time_in_turns; `names` says what is timed."""
    for (mode, precision), (times, memory) in time_in_turns(makers, calls, args.repeats, device).items():
        yield {**names, "mode": mode, "precision": precision, "seconds": times, "peak_memory": memory}


def training_rows(args, device, part, image, net, pair, batch):
    """Yields the rows of one pair, one for each mode and precision."""
    channels, side = map(int, image.split("x"))
    learn, infer = pairs()[pair]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.inner_steps * batch, channels, side, side), dtype=torch.uint8, generator=generator)
    resident_images = images.to(device)
    options = {"learn": learn, "infer": infer, "samples": args.samples, "inner_steps": args.inner_steps, "noise": 0.1,
               "batch": batch, "lr": 1e-4}

    def vae(precision="float32"):
        torch.manual_seed(0)
        return build_vae(net, images.shape[1:], args.dim_z, args.width, bf16=precision == "bf16").to(device)

    def trainer(precision, graph):
        return ImageTrainer(vae(precision), resident_images, estimator="plugin", seed=0, graph=graph, **options)

    names = {"part": part, "image": image, "net": net, "pair": pair, "size": batch}
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
        yield from training_rows(args, device, "images", image, net, pair, args.batch)


def batch_part(args, device):
    """Time per image against batch size."""
    for batch in args.batches:
        yield from training_rows(args, device, "batch", args.image[0], args.net[0], "KLD-F", batch)


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
        yield from timed_rows(small_model("ensemble", "KLD-F", members), makers, 20, args, device)


def toy_part(args, device):
    """Toy inference: all runs in one tensor against one run after another; seconds of one iteration of all runs."""
    steps, grid = ("2", "2") if args.quick else ("50", "4")
    toy = toy_inference.parse_args(["--iterations", steps, "--grid", grid, "--frames", "2"])
    times = {"loop": [], "together": []}
    for _ in range(args.repeats):
        descent = toy_inference.Descent(toy, device)
        while descent.step < toy.iterations:
            descent.run_step(descent.noise())
        runs = descent.params[0, 0].numel()
        times["together"].append(runs / descent.rate)
        times["loop"].append(runs / compare_with_loop(toy, toy.iterations, device)[0])
    for mode, values in times.items():
        measured = {"mode": mode, "precision": "float64", "seconds": np.array(values), "peak_memory": math.nan}
        yield small_model("toy", "all", runs) | measured


def importance_part(args, device):
    """Time and memory of the importance-sampled likelihood of 500 points under ten 2-D VAEs, against the number of samples."""
    vae = build_ensemble(2, 2, 30, range(10)).to(device)
    x = torch.randn(10, 500, 2, generator=torch.Generator().manual_seed(0)).to(device)
    for samples in args.importance_samples:
        evaluation = SimpleNamespace(run_step=partial(iw_log_likelihood, vae, x, samples))
        makers = {("streamed", "float32"): lambda evaluation=evaluation: evaluation}
        yield from timed_rows(small_model("importance", "KLD-F", samples), makers, 1, args, device)


def small_model(part, pair, size):
    """The names of what is timed of 2-D and toy models."""
    return {"part": part, "image": "2", "net": "mlp", "pair": pair, "size": size}


PARTS = {"images": images_part, "batch": batch_part, "ensemble": ensemble_part, "toy": toy_part, "importance": importance_part}


def print_report(rows, hours):
    """Print the table of all rows, and the time that the paper's Table 1 would take."""
    header = ["part", "network", "pair", "size", "mode", "precision", "ms a step", "size/s",
              "times as fast as the reference (the loop)", "peak MiB"]
    print(markdown_table(header, [table_row(row, rows) for row in rows]))
    for (mode, precision), duration in hours.items():
        print(f"\nTable 1, {mode}, {precision}: {duration:.1f} hours for one seed of its {len(TABLE1)} columns of ConvNets, "
              f"1000 epochs on MNIST, Fashion-MNIST and CelebA, one run after the other")


def table_row(row, rows):
    """The cells of one row: its names, its time, and its speed against that of the row that it is compared with."""
    mode, precision = ("reference", "float32") if row["part"] in ("images", "batch") else ("loop", row["precision"])
    rival = {key: row[key] for key in ("part", "image", "net", "pair", "size")} | {"mode": mode, "precision": precision}
    seconds = next((other["seconds"] for other in rows if rival.items() <= other.items()), math.nan)
    step, speed = np.median(row["seconds"]), seconds / row["seconds"]
    return [row["part"], f"{row['net']} {row['image']}", row["pair"], row["size"], row["mode"], row["precision"],
            f"{1e3 * step:.4g}", f"{row['size'] / step:.4g}", median_and_range(speed),
            number_text(row["peak_memory"] / 2**20, ".0f")]


def median_and_range(values, form=".2f"):
    """The text "median [smallest, largest]"; "-" where a value is not finite."""
    if not np.isfinite(values).all():
        return "-"
    return f"{np.median(values):{form}} [{np.min(values):{form}}, {np.max(values):{form}}]"


def table1_hours(rows):
    """{(mode, precision): hours} of Table 1's runs, where each of its pairs and image shapes was measured at batch 100."""
    rates = {}
    for row in rows:
        if (row["part"], row["net"], row["size"]) == ("images", "conv", 100) and row["pair"] in TABLE1:
            rates.setdefault((row["mode"], row["precision"]), {})[row["image"], row["pair"]] = np.median(row["seconds"])
    return {key: sum(TABLE1_RUNS[image] * RUN_STEPS[image] * s for (image, _), s in found.items()) / 3600
            for key, found in rates.items() if len(found) == len(RUN_STEPS) * len(TABLE1)}


def recipe_of_the_paper(args):
    return (args.width or 64, args.dim_z, args.samples, args.inner_steps) == (64, 100, 5, 5)


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    flag = parser.add_argument_group("experiment").add_argument
    flag("--part", choices=(*PARTS, "all"), default="images", help="what is timed: images: every pair; batch: KLD-F against "
         "the size of the minibatch; ensemble: 2-D VAEs against a loop over seeds; toy: toy inference against a loop over runs; "
         "importance: time and memory of importance sampling against the number of samples")
    flag("--pairs", nargs="+", choices=pairs(), default=list(pairs()), metavar="PAIR",
         help="pairs of objectives of --part images, named as in the paper")
    flag("--precision", nargs="+", choices=("float32", "tf32", "bf16"), default=["float32"],
         help="precisions of the arithmetic; tf32 needs a GPU")
    flag("--repeats", type=positive, default=5, help="turns; each times every mode once")
    flag("--samples", type=positive, default=5, help="posterior samples per image, N")
    flag("--batches", nargs="+", type=positive, default=[10, 30, 100, 300], help="minibatch sizes of --part batch")
    flag("--members", nargs="+", type=positive, default=[1, 3, 10, 30], help="ensemble sizes of --part ensemble")
    flag("--importance-samples", nargs="+", type=positive, default=[1000, 3000, 10_000, 30_000],
         help="numbers of samples of --part importance")
    flag("--quick", action="store_true", help="other defaults: a tiny model, three pairs and two turns; "
         "it shows that the script runs, not how fast")
    flag = parser.add_argument_group("model").add_argument
    flag("--net", nargs="+", choices=("conv", "resnet"), default=["conv", "resnet"],
         help="networks; --part batch takes the first")
    flag("--image", nargs="+", choices=RUN_STEPS, default=["1x32"], help="channels and side of the images")
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
        parser.set_defaults(net=["conv"], width=8, dim_z=10, samples=2, inner_steps=2, batch=20, batches=[10, 20], repeats=2,
                            members=[3], importance_samples=[100, 200], pairs=["KLD-F", "FD-B", "FAE"])
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
            print_report(rows, table1_hours(rows) if recipe_of_the_paper(args) else {})
            run.save_metrics(**{name: np.array([row[name] for row in rows]) for name in rows[0]}, status="ok")
        if not (run.path / "benchmark.png").exists():
            figure.benchmark([run.path], run.path / "benchmark.png")


if __name__ == "__main__":
    command_line(parse_args, main)
