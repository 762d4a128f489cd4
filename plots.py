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
from pathlib import Path

from benchmarks.figure import benchmark
from studies.convergence import study_table
from studies.figures import audit, bilevel, spectrum, sweep_2d
from studies.packs import pack
from studies.sweep_2d import sweep_table
from vsm.cli import UserError, command_line
from vsm.figures import images, latents, pictures, recovery, synthetic, toys
from vsm.runs import write_atomic
from vsm.stored_runs import HEAVY, open_runs

FIGURES = {  # script that makes the runs: its figures, each a function figure(runs, save) of run folders, packs or opened runs
    "train_images": [
        images.training_curves, images.trajectories, images.fid_curves, images.final_values, images.rate_distortion,
        images.importance_bound, images.denoising, images.gradient_snr, pictures.samples, pictures.reconstructions,
        pictures.interpolations, latents.posterior_sd, latents.posterior_mean, latents.aggregate_posterior],
    "train_synthetic": [
        synthetic.training_curves, sweep_2d.synthetic, sweep_2d.study, synthetic.synthetic_samples, synthetic.density,
        bilevel.bilevel],
    "param_recovery": [recovery.param_recovery, recovery.recovery_rules, spectrum.spectrum],
    "toy_inference": [toys.toy_trajectories, toys.toy_basins, toys.toy_mixtures, toys.toy_gradients],
    "benchmark": [benchmark],
    "audit": [audit.audit],
}
OF_MANY_RUNS = ("train_images", "train_synthetic")  # scripts whose figures draw several runs
NAMES = tuple(dict.fromkeys(figure.__name__ for figures in FIGURES.values() for figure in figures))
OTHERS = ("pack", "sweep_table", "study_table")  # commands that write no figure
ENDINGS = {"pack": (".npz",), "sweep_table": (".md",), "study_table": (".md",)}


def draw_run(run):
    """Draw the PNGs of one finished image run that are missing, or older than its arrays. A diverged run has curves only."""
    (opened,) = open_runs([run])
    arrays = opened.finished()
    figures = [images.training_curves]
    if str(arrays["status"]) == "ok":
        figures += [pictures.samples, pictures.reconstructions, pictures.interpolations, latents.posterior_sd,
                    latents.posterior_mean]
    written = (Path(run) / "metrics.npz").stat().st_mtime_ns
    for figure in figures:
        name = figure.__name__
        save = Path(run) / f"{name}.png"
        current = save.exists() and save.stat().st_mtime_ns >= written
        if not current and (name == "training_curves" or name in arrays):
            figure([opened], save)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=(*NAMES, *OTHERS), metavar="FIGURE", help=" | ".join((*NAMES, *OTHERS)))
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
        write_atomic(save, sweep_table(runs).encode())
    elif args.figure == "study_table":
        refuse_other_scripts(args.figure, runs, ["train_synthetic", "train_images"])
        write_atomic(save, study_table(runs).encode())
    else:
        draw_figure(args.figure, runs, save)
    print(save)


def draw_figure(name, runs, save):
    """Draw a figure by its name. Raises UserError for runs that it cannot draw."""
    drawn = {script: figure for script, figures in FIGURES.items() for figure in figures if figure.__name__ == name}
    refuse_other_scripts(name, runs, drawn)
    script = runs[0].config["script"]
    if len(runs) > 1 and script not in OF_MANY_RUNS:
        raise UserError(f"{name} draws one run, not {len(runs)}")
    try:
        drawn[script](runs, save)
    except KeyError as error:
        raise UserError(f"{name} cannot be drawn: one of these runs has no {error}; "
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
