"""Draw any figure from stored arrays: python plots.py FIGURE RUN... --save out.png

A RUN is a run folder or a pack of many runs (.npz), and the two may be mixed:
    python plots.py synthetic results/figure3.npz --save figure3.png
    python plots.py training_curves runs/images/RUN
Write many runs into a pack:
    python plots.py pack runs/synthetic/* --save results/figure3.npz --keep test_data
Write the numbers behind the figures of a sweep, or of the convergence study, as a table:
    python plots.py sweep_table results/figure3.npz --save figure3.md
    python plots.py study_table results/study2d.npz --save study2d.md

The training scripts call the same functions when a run ends, so a figure can be redrawn at any time without a model or a GPU.
"""

import vsm.quiet  # noqa: F401  # isort: skip
import argparse
import fnmatch
import importlib
from pathlib import Path

from studies.packs import pack
from vsm.cli import UserError, command_line
from vsm.runs import write_atomic
from vsm.stored_runs import HEAVY, open_runs


class Figure:
    """A figure by its name; figure(runs, save) draws it from run folders, packs or opened runs to a PNG, PDF or SVG.

    The module that draws the figure is imported only then.

    modules: {script that makes the runs: module with a function of this name, or "module:function"}.
    many: whether it draws several runs.
    """

    def __init__(self, name, modules, many=True):
        self.name, self.modules, self.many = name, modules, many

    def __call__(self, runs, save):
        runs = open_runs(runs)
        module = next(iter(self.modules.values()))
        if len(self.modules) > 1:
            module = self.modules[runs[0].config["script"]]
        module, _, function = module.partition(":")
        return getattr(importlib.import_module(module), function or self.name)(runs, save)


def figures_of(script, module, *names, many=True):
    """The Figures of these names, of the runs of one script and in one module."""
    return [Figure(name, {script: module}, many) for name in names]


FIGURES = [
    Figure("training_curves", {"train_images": "vsm.figures.images",
                                "train_synthetic": "vsm.figures.synthetic:learning_curves"}),
    *figures_of("train_images", "vsm.figures.images", "trajectories", "fid_curves", "final_values", "rate_distortion"),
    *figures_of("train_images", "vsm.figures.images", "importance_bound", "denoising", "gradient_snr"),
    *figures_of("train_images", "vsm.figures.pictures", "samples", "reconstructions", "interpolations"),
    *figures_of("train_images", "vsm.figures.latents", "posterior_sd", "posterior_mean", "aggregate_posterior"),
    *figures_of("train_synthetic", "studies.figures.sweep_2d", "synthetic", "study"),
    *figures_of("train_synthetic", "vsm.figures.synthetic", "learning_curves", "synthetic_samples", "density"),
    *figures_of("train_synthetic", "studies.figures.bilevel", "bilevel"),
    *figures_of("param_recovery", "vsm.figures.recovery", "param_recovery", "recovery_rules", many=False),
    *figures_of("param_recovery", "studies.figures.spectrum", "spectrum", many=False),
    *figures_of("toy_inference", "vsm.figures.toys", "toy_trajectories", "toy_basins", "toy_mixtures", "toy_gradients",
                 many=False),
    *figures_of("benchmark", "benchmarks.figure", "benchmark", many=False),
    *figures_of("audit", "studies.figures.audit", "audit", many=False),
]
FIGURES = {figure.name: figure for figure in FIGURES}
OTHERS = ("pack", "sweep_table", "study_table")  # commands that write no figure
ENDINGS = {"pack": (".npz",), "sweep_table": (".md",), "study_table": (".md",)}


def __getattr__(name):
    if name in FIGURES:
        return FIGURES[name]
    raise AttributeError(f"module plots has no attribute {name}")


def draw_run(run):
    """Draw the PNGs of one finished image run that are missing, or older than its arrays. A diverged run has curves only."""
    (opened,) = open_runs([run])
    arrays = opened.finished()
    names = ["training_curves"]
    if str(arrays["status"]) == "ok":
        names += ["samples", "reconstructions", "interpolations", "posterior_sd", "posterior_mean"]
    written = (Path(run) / "metrics.npz").stat().st_mtime_ns
    for name in names:
        save = Path(run) / f"{name}.png"
        current = save.exists() and save.stat().st_mtime_ns >= written
        if not current and (name == "training_curves" or name in arrays):
            FIGURES[name]([opened], save)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=(*FIGURES, *OTHERS), metavar="FIGURE", help=" | ".join((*FIGURES, *OTHERS)))
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or packs of runs (.npz)")
    parser.add_argument("--save", default=None,
                        help="the .png, .pdf or .svg to write (default: FIGURE.png in the first run's folder); "
                             "pack writes an .npz, sweep_table and study_table an .md")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB",
                        help="use only the runs whose names match one of these patterns")
    parser.add_argument("--without", nargs="+", default=[], metavar="GLOB",
                        help="leave out the runs whose names match one of these patterns")
    parser.add_argument("--keep", nargs="+", default=[], choices=HEAVY, metavar="KEY",
                        help=f"pack: large arrays to keep, of {', '.join(HEAVY)}; "
                             "of model_samples it keeps the member that figures show, of density_grid the members that the run "
                             "stored: those with the median and with the least NLL")
    parser.add_argument("--keep-of", default="*", metavar="GLOB",
                        help="pack: keep the large arrays only in runs whose names match this pattern")
    parser.add_argument("--drop", nargs="+", default=[], metavar="KEY", help="pack: arrays to leave out")
    args = parser.parse_args(argv)
    endings = ENDINGS.get(args.figure, (".png", ".pdf", ".svg"))
    if args.save and Path(args.save).suffix not in endings:
        parser.error(f"--save {args.save} must end in {' or '.join(filter(None, (', '.join(endings[:-1]), endings[-1])))}")
    if args.save is None and args.figure in OTHERS:
        parser.error(f"{args.figure} needs --save")
    if args.figure != "pack" and (args.keep or args.drop or args.keep_of != "*"):
        parser.error("--keep, --keep-of and --drop go with pack only")
    return args


def main(args):
    def matches(run, globs):
        return any(fnmatch.fnmatch(run.short_name, glob) for glob in globs)

    runs = [run for run in open_runs(args.runs) if matches(run, args.only) and not matches(run, args.without)]
    if not runs:
        raise UserError("--only and --without leave no run")
    save = Path(args.save or default_save(args))
    if args.figure == "pack":
        pack(runs, save, args.keep, args.keep_of, args.drop)
    elif args.figure == "sweep_table":
        refuse_other_scripts(args.figure, runs, ["train_synthetic"])
        from studies.sweep_2d import sweep_table
        write_atomic(save, sweep_table(runs).encode())
    elif args.figure == "study_table":
        refuse_other_scripts(args.figure, runs, ["train_synthetic", "train_images"])
        from studies.convergence import study_table
        write_atomic(save, study_table(runs).encode())
    else:
        draw_figure(FIGURES[args.figure], runs, save)
    print(save)


def draw_figure(figure, runs, save):
    """Draw a Figure. Raises UserError for runs that it cannot draw."""
    refuse_other_scripts(figure.name, runs, figure.modules)
    if not figure.many and len(runs) > 1:
        raise UserError(f"{figure.name} draws one run, not {len(runs)}")
    try:
        figure(runs, save)
    except KeyError as error:
        raise UserError(f"{figure.name} cannot be drawn: one of these runs has no {error}; "
                        "has it ended, and is it of this kind?") from error


def refuse_other_scripts(name, runs, scripts):
    """Raises UserError for runs that another script made, or for runs of two scripts."""
    for run in runs:
        if (made_by := run.config["script"]) not in scripts:
            names = " or ".join(f"{script}.py" for script in scripts)
            raise UserError(f"{run} is a run of {made_by}.py; {name} draws runs of {names}")
        if made_by != runs[0].config["script"]:
            raise UserError(f"{run} is a run of {made_by}.py and {runs[0]} one of {runs[0].config['script']}.py; "
                            "draw them separately")


def default_save(args):
    """FIGURE.png in the first run's folder, or PACK_FIGURE.png beside a pack."""
    first = Path(args.runs[0])
    return first.with_name(f"{first.stem}_{args.figure}.png") if first.suffix == ".npz" else first / f"{args.figure}.png"


if __name__ == "__main__":
    command_line(parse_args, main)
