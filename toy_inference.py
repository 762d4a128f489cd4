"""Fit q(z) to the posterior of a two-dimensional toy, from many starts at once, by the KL and Fisher divergences (KLD, FD).

The commands of Figures 2 and 5 and of the checks of appendix A.5, with their times:

    python toy_inference.py                                   # the paper's Figure 2: step 1e-4, one sample, 10^6 steps; 4 min
    python toy_inference.py --iterations 100000               # a quick look, 25 s: the same starts are caught, or diverge
    python toy_inference.py --grid 31 --iterations 100000 --frames 20       # basins of attraction: 961 starts, 2 min
    python toy_inference.py --objectives fd fd-weighted kld   # FD weighted by q's variance, beside FD and KLD
    python toy_inference.py --family mixture                  # Figure 5: ten mixtures of ten Gaussians, by FD with z held fixed
    python toy_inference.py --family laplace                  # A.5.3: the biased gradient never moves a Laplace's location
    python toy_inference.py --gradients                       # A.5.1: KLD, FD and biased FD gradients between two Gaussians

p(z) = N(0, I_2), p(x|z) = N(h(z1) z2, sd^2): sym h = z1, sd 1/2; soft h = log(1 + e^{10 z1}) / 10, relu h = max(z1, 0),
bias h = 2 z1 + 1, all three sd 1. q factorises, with a location and a log scale for each coordinate; the log scale (the log sd of
a Gaussian) starts from 0. "z held fixed" means that the gradient does not go through the samples of q. The package vsm/toys has
the parts: posteriors, gradients, descent, and the numbers at the end.
"""

from vsm.cli import Parser, add_output, command_line, positive, positive_float, seed_number
from vsm.device import pick_device
from vsm.figures import toys
from vsm.loop import train
from vsm.names import flag_name, run_name
from vsm.runs import Run
from vsm.toys.descent import Descent, location_gradients, print_ends, where_runs_ended
from vsm.toys.gradients import FAMILIES, GRADIENTS, gradients_on_a_grid
from vsm.toys.mixtures import Mixtures, how_well_mixtures_fit, print_mixtures
from vsm.toys.posteriors import LIKELIHOODS, Grid

OBJECTIVES = ["fd-repar", "fd", "kld"]  # those of the published figures


def fit_from_every_start(args, device, run):
    """Figure 2 and A.5.3: one Gaussian or Laplace q from every start, by every objective and optimiser."""
    descent = Descent(args, device)
    train(run, descent, args.iterations)
    grid = Grid(descent.posterior, device)
    arrays = {**descent.arrays(), **grid.picture(), **where_runs_ended(descent, grid)}
    if args.family == "laplace":
        arrays["location_gradient"] = location_gradients(descent, grid)
    print_ends(arrays, args)
    return {"status": descent.status, **to_numpy(arrays)}


def fit_mixtures(args, device, run):
    """Figure 5: mixtures of Gaussians by the Fisher divergence with z held fixed."""
    mixtures = Mixtures(args, device)
    train(run, mixtures, args.iterations)
    grid = Grid(mixtures.posterior, device)
    arrays = {**mixtures.arrays(), **grid.picture(), **how_well_mixtures_fit(mixtures.fit(), mixtures.posterior, grid)}
    print_mixtures(arrays, args)
    return {"status": "ok" if arrays["kl"].isfinite().any() else f"diverged@{args.iterations}", **to_numpy(arrays)}


def gradients_between_gaussians(args, device, run):
    """A.5.1: gradients of the KL and Fisher divergences between two univariate Gaussians."""
    return {"status": "ok", **to_numpy(gradients_on_a_grid(args.target_sd))}


def to_numpy(arrays):
    return {name: value.cpu().numpy() for name, value in arrays.items()}


# The experiments are functions from the flags to the arrays of metrics.npz.
EXPERIMENTS = {"gaussian": fit_from_every_start, "laplace": fit_from_every_start, "mixture": fit_mixtures,
               "gradients": gradients_between_gaussians}
FIGURES = {"gaussian": [toys.toy_trajectories, toys.toy_basins], "laplace": [toys.toy_trajectories],
           "mixture": [toys.toy_mixtures], "gradients": [toys.toy_gradients]}


def main(args):
    device, experiment = pick_device(args.device), experiment_of(args)
    print(f"{experiment} on {device}; writes {args.out}", flush=True)
    with Run(args.out, "toy_inference", vars(args), device, args.overwrite) as run:
        if not run.status:
            run.save_metrics(**EXPERIMENTS[experiment](args, device, run))
        for figure in FIGURES[experiment]:
            figure([run.path], run.path / f"{figure.__name__}.png")


FIT, START = ("gaussian", "laplace", "mixture"), ("gaussian", "laplace")
EXPERIMENTS_OF_FLAGS = {  # flags that only some experiments read, and these experiments
    **dict.fromkeys(("grid", "extent", "frames", "objectives"), START), **dict.fromkeys(("components", "repeats"), ("mixture",)),
    "target_sd": ("gradients",), **dict.fromkeys(("family", "likelihoods", "x", "seed", "lr", "samples", "iterations"), FIT)}
DEFAULTS = {"gaussian": {"lr": 1e-4, "samples": 1, "iterations": 1_000_000},
            "laplace": {"lr": 1e-4, "samples": 1, "iterations": 300_000},
            "mixture": {"lr": 1e-3, "samples": 10, "iterations": 5000}, "gradients": {}}


def experiment_of(args):
    return "gradients" if args.gradients else args.family


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("--family", choices=[*FAMILIES, "mixture"], default="gaussian", help="family of q")
    flag("--gradients", action="store_true", help="A.5.1: fit nothing, compare gradients between two univariate Gaussians")
    flag("--objectives", nargs="+", choices=GRADIENTS, default=OBJECTIVES, help="divergences to minimise (gaussian, laplace)")
    flag("--likelihoods", nargs="+", choices=LIKELIHOODS, default=["sym", "soft"], help="likelihoods p(x|z), as above")
    flag("--x", type=float, default=2.0, help="the observed x")
    flag("--target-sd", type=positive_float, default=0.5, help="sd of the target p, with --gradients")
    flag("--seed", type=seed_number, default=0, help="seed of the noise, and of a mixture's first means")
    flag("--grid", type=positive, default=6, help="starts per coordinate (gaussian, laplace)")
    flag("--extent", type=positive_float, default=2.5, help="starts lie in [-extent, extent]^2 (gaussian, laplace)")
    flag("--components", type=positive, default=10, help="Gaussians in a mixture")
    flag("--repeats", type=positive, default=10, help="number of mixtures, each from its own first means")
    flag("--lr", type=positive_float, help="step size (default: 1e-4; mixture 1e-3)")
    flag("--samples", type=positive, help="samples of q per step, N (default: 1; mixture 10)")
    flag("--iterations", type=positive, help="steps (default: 1000000; laplace 300000, mixture 5000)")
    flag("--frames", type=positive, default=200, help="points to keep of every trajectory, evenly spaced in log iterations")
    add_output(flag, "runs/toy", "cpu", " (a GPU pays for thousands of starts only)")
    args = parser.parse_args(argv)
    experiment = experiment_of(args)
    refuse_meaningless_flags(parser, args, experiment)
    for name, value in DEFAULTS[experiment].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    name = f"gradients-sd{args.target_sd:g}" if args.gradients else run_name(
        args, ("family", "likelihoods", "seed"), vars(parser.parse_args([])) | DEFAULTS[experiment])
    args.out = args.out or f"runs/toy/{name}"
    return args


def refuse_meaningless_flags(parser, args, experiment):
    """End with a usage error for values out of range, and for flags that the experiment does not read."""
    if not abs(args.x) <= 10:
        parser.error(f"--x {args.x} must lie between -10 and 10: for other x the posterior leaves the grid of the quadrature")
    for flag in ("likelihoods", "objectives"):
        if len(set(getattr(args, flag))) < len(getattr(args, flag)):
            parser.error(f"--{flag} names one twice")
    if not 0.01 <= args.target_sd <= 100:
        parser.error(f"--target-sd {args.target_sd:g} must lie between 0.01 and 100")
    for name, experiments in EXPERIMENTS_OF_FLAGS.items():
        if experiment not in experiments and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{flag_name(name)} has no meaning for {experiment}; it goes with {', '.join(experiments)}")


if __name__ == "__main__":
    command_line(parse_args, main)
