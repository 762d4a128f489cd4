"""Does a joint divergence recover the parameter that made the data, when q has the wrong variance? (Figure 1)

    python param_recovery.py                                               # the paper's figure, by closed forms: 4 s
    python param_recovery.py --stochastic                                  # the same minima also from samples, by Adam: 2 min
    python param_recovery.py --stochastic --iterations 200 --batch 100     # the same, not converged: 15 s
"""

import numpy as np
from tqdm import tqdm

from vsm import recovery
from vsm.cli import Parser, add_output, command_line, count, positive, positive_float
from vsm.device import pick_device
from vsm.figures import recovery as figures
from vsm.names import run_name
from vsm.recovery import RULES, joint_fd, joint_kld, recover, recover_from_samples
from vsm.runs import Run

SWEEP = 2.0 ** np.linspace(-3, 3, 241)  # alphas of the comparison of all rules
CHECKED = np.array([0.5, 1, 1.5, 2, 3])  # the w* of the printed table and of --stochastic


def closed_forms(args):
    """The arrays of metrics.npz by closed forms, for R rules, A alphas and W values of w*."""
    alpha, w_star = np.array(args.alphas), np.linspace(0, args.w_star_max, args.points)

    def recovered(prefix, alpha, w_star, rules=RULES):
        w, phi = zip(*(recover(rule, alpha, args.gamma, w_star) for rule in rules))
        return {f"{prefix}w": np.stack(w), f"{prefix}phi": np.stack(phi)}

    shown = recovered("example_", args.alpha, args.w_star, ("JKLD", "JFD"))
    for name, divergence in (("jkld", joint_kld), ("jfd", joint_fd)):
        shown[f"example_{name}"] = divergence(shown["example_w"], shown["example_phi"], args.alpha, args.gamma, args.w_star)
    return {"rule": np.array(list(RULES)), "alpha": alpha, "w_star": w_star, "sweep_alpha": SWEEP, "checked_w_star": CHECKED,
            **recovered("", alpha[:, None], w_star), **recovered("sweep_", SWEEP, args.w_star),
            **recovered("checked_", alpha[:, None], CHECKED), **shown}


def stochastic(args, device):
    """The counterparts of `checked_w` and `checked_phi` [R, A, 5] that are found from samples."""
    alpha, w_star = (values.ravel() for values in np.meshgrid(args.alphas, CHECKED, indexing="ij"))
    w, phi = np.stack([recover_from_samples(rule, alpha, w_star, args, device) for rule in tqdm(RULES, desc="rules")], axis=1)
    shape = len(RULES), len(args.alphas), len(CHECKED)
    return {"sampled_w": np.abs(w).reshape(shape), "sampled_phi": (phi * np.sign(w)).reshape(shape)}


def report_recovery(arrays):
    """Print a line for every rule and alpha: the recovered w for each CHECKED w*; and how far sampled minima are from these."""
    print("w recovered from w* =", *(f"{w:7.3f}" for w in CHECKED))
    for r, rule in enumerate(RULES):
        for a, alpha in enumerate(arrays["alpha"]):
            print(f"{rule:14} alpha {alpha:<5g}", *(f"{w:7.3f}" for w in arrays["checked_w"][r, a]))
    if "sampled_w" in arrays:
        error = np.abs(arrays["sampled_w"] - arrays["checked_w"]).max((1, 2))
        print("from samples, largest |w - closed form|:", ", ".join(f"{rule} {e:.3f}" for rule, e in zip(RULES, error)))


def parse_args(argv=None):
    parser = Parser(description=f"{__doc__}\n{recovery.__doc__}")
    flag = parser.add_argument_group("experiment").add_argument
    flag("--alphas", type=positive_float, nargs="+", default=[0.5, 1.0, 2.0],
         help="variances of q over that of the exact posterior")
    flag("--gamma", type=positive_float, default=1.0, help="variance of p(x|z), which is not learnt")
    flag("--w-star-max", type=positive_float, default=3.0, help="largest w* of the figure")
    flag("--points", type=positive, default=121, help="number of w*, evenly spaced from 0")
    flag("--alpha", type=positive_float, default=0.5, help="alpha of the contours")
    flag("--w-star", type=positive_float, default=1.5, help="w* of the contours and of the comparison of all rules")
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--stochastic", action="store_true", help="find every w also from samples, at w* = 0.5, 1, 1.5, 2, 3")
    flag("--iterations", type=positive, default=4000, help="Adam steps")
    flag("--lr", type=positive_float, default=0.2, help="Adam's step size, annealed to 0 by a cosine")
    flag("--batch", type=positive, default=500, help="data per step")
    flag("--samples", type=positive, default=4, help="posterior samples per datum, N, of the unbiased estimators, at least 2")
    flag("--seed", type=count, default=0, help="seed of the data and the posterior samples")
    flag = parser.add_argument_group("output").add_argument
    add_output(flag, "runs/param_recovery", "cpu", " (the models are so small that a CPU is as fast)")
    args = parser.parse_args(argv)
    of_stochastic = ("iterations", "lr", "batch", "samples", "seed")
    if not args.stochastic and any(getattr(args, key) != parser.get_default(key) for key in of_stochastic):
        parser.error("--iterations, --lr, --batch, --samples and --seed have a meaning with --stochastic only")
    check_ranges(parser, args)
    args.out = args.out or f"runs/param_recovery/{run_name(args, ('seed',), vars(parser.parse_args([])))}"
    return args


def check_ranges(parser, args):
    """End with a usage error for values that the closed forms or the search cannot take."""
    if args.samples < 2:
        parser.error("--samples must be at least 2: the unbiased estimators divide by N - 1")
    alphas = args.alpha, *args.alphas
    if max(args.w_star, args.w_star_max) > 100 or not 1e-4 <= args.gamma <= 1e4 or not all(1e-3 <= a <= 1e3 for a in alphas):
        parser.error("--w-star and --w-star-max go to 100, --gamma from 1e-4 to 1e4, --alpha and --alphas from 1e-3 to 1e3: "
                     "there the search finds w to a thousandth of the larger of w* and sqrt(gamma)")


def main(args):
    device = pick_device(args.device)
    with Run(args.out, "param_recovery", vars(args), device, args.overwrite) as run:
        if not run.status:
            arrays = closed_forms(args) | (stochastic(args, device) if args.stochastic else {})
            finite = not args.stochastic or np.isfinite([arrays["sampled_w"], arrays["sampled_phi"]]).all()
            run.save_metrics(**arrays, status="ok" if finite else f"diverged@{args.iterations}")
            report_recovery(arrays)
        for figure in (figures.param_recovery, figures.recovery_rules):
            figure([run.path], run.path / f"{figure.__name__}.png")


if __name__ == "__main__":
    command_line(parse_args, main)
