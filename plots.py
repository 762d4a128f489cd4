"""Draw any figure from stored arrays: python plots.py FIGURE RUN... --save out.png

A RUN is a run folder or a pack of many runs (.npz), and the two may be mixed:
    python plots.py synthetic results/figure3.npz --save figure3.png
    python plots.py training_curves runs/images/RUN

The training scripts call the same functions when a run ends, so a figure can be redrawn at any time without a model or a GPU.
"""

from pathlib import Path

from studies.figures import samplers, spectrum, sweep_2d
from vsm.cli import Parser, UserError, command_line
from vsm.figures import images, latents, pictures, recovery, synthetic, toys
from vsm.stored_runs import add_run_flags, chosen_runs, refuse_other_scripts

FIGURES = {  # script that makes the runs: its figures, each a function figure(runs, save) of run folders, packs or opened runs
    "train_images": [
        images.training_curves, images.trajectories, images.fid_curves, images.gradient_snr,
        pictures.samples, pictures.reconstructions, pictures.interpolations, latents.posterior_sd,
        latents.posterior_mean, latents.aggregate_posterior, samplers.fid_by_sampler],
    "train_synthetic": [
        synthetic.training_curves, sweep_2d.synthetic, sweep_2d.study, synthetic.synthetic_samples, sweep_2d.bilevel],
    "param_recovery": [recovery.param_recovery, recovery.recovery_rules],
    "spectrum": [spectrum.spectrum],
    "toy_inference": [toys.toy_trajectories, toys.toy_basins, toys.toy_mixtures, toys.toy_gradients],
}
OF_MANY_RUNS = ("train_images", "train_synthetic")  # scripts whose figures draw several runs
NAMES = tuple(dict.fromkeys(figure.__name__ for figures in FIGURES.values() for figure in figures))


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("figure", choices=NAMES, metavar="FIGURE", help=" | ".join(NAMES))
    add_run_flags(parser)
    parser.add_argument("--save", help="the .png, .pdf or .svg to write (default: FIGURE.png in the first run's folder, or "
                        "PACK_FIGURE.png beside a pack)")
    args = parser.parse_args(argv)
    if args.save and Path(args.save).suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--save {args.save} must end in .png, .pdf or .svg")
    return args


def main(args):
    first, name = Path(args.runs[0]), f"{args.figure}.png"
    save = Path(args.save or (first.with_name(f"{first.stem}_{name}") if first.suffix == ".npz" else first / name))
    draw_figure(args.figure, chosen_runs(args), save)
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


if __name__ == "__main__":
    command_line(parse_args, main)
