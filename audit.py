"""Audit a learning objective: is its gradient right, where does it end, what does it cost? About a minute on a CPU.

An objective that objectives.py has, or that you have just added to it (docs/extending.md):
    python audit.py swersky
    python audit.py bao --estimator unbiased
Without data on disk and without training, in seconds:
    python audit.py swersky --no-training

The audit prints what it finds, ends each finding with `ok`, `note` or `WRONG`, and writes metrics.npz, audit.md and audit.png to a
folder under runs/audit. Exit code 1: something is wrong.
"""

import vsm.quiet  # noqa: F401  # isort: skip
import argparse

import numpy as np
import torch

import plots
from objectives import ESTIMATORS, LEARN
from vsm import auditing
from vsm.cli import Formatter, command_line, count, positive
from vsm.device import pick_device
from vsm.runs import Run, write_atomic


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("objective", choices=LEARN, metavar="NAME", help=f"a name of objectives.LEARN: {', '.join(LEARN)}")
    flag = parser.add_argument_group("experiment").add_argument
    flag("--estimator", choices=ESTIMATORS, default="plugin", help="how the objective estimates squared expectations under q")
    flag("--data", default="mnist", help="images of the linear VAE's spectrum; glyphs where they are missing")
    flag("--data-root", default="data", help="where the images are")
    flag("--law", default="mixture", help="2-D distribution of the short run")
    flag("--updates", type=positive, default=1500, help="decoder updates of the short run")
    flag("--seeds", type=positive, default=3, help="members of the short run")
    flag("--no-training", action="store_true", help="leave out the spectrum and the short 2-D run")
    flag("--seed", type=count, default=0, help="of the random models")
    flag = parser.add_argument_group("output").add_argument
    flag("--out", default=None, help="the report's folder (default: runs/audit/NAME-ESTIMATOR)")
    flag("--overwrite", action="store_true", help="audit again")
    args = parser.parse_args(argv)
    if args.estimator != "plugin" and not LEARN[args.objective].has_estimator:
        parser.error(f"{args.objective} has no estimator to choose")
    args.out = args.out or f"runs/audit/{args.objective}-{args.estimator}"
    return args


def main(args):
    device = pick_device("cpu")
    with Run(args.out, "audit", vars(args), device, args.overwrite) as run:
        if run.status:
            return
        options = {"estimator": args.estimator} if LEARN[args.objective].has_estimator else {}
        findings, arrays = [], {}
        if LEARN[args.objective].joint:
            print(f"{args.objective} trains both halves by one loss; the audit takes its decoder's part, with q held")
        if not args.no_training:
            report(auditing.spectrum(args.objective, options, args.data, args.data_root), findings, arrays)
        for step in (auditing.form, auditing.gradient, auditing.coupling, auditing.composition, auditing.target, auditing.contraction,
                     auditing.cost):
            report(step(args.objective, options, args.seed), findings, arrays)
        if not args.no_training:
            report(auditing.short_run(args), findings, arrays)
        write_atomic(run.path / "audit.md", auditing.page(args.objective, args.estimator, findings).encode())
        run.save_metrics(**{name: np.asarray(value) for name, value in arrays.items()}, status="ok",
                         verdict=np.array([finding.verdict for finding in findings]), finding=np.array([finding.text for finding in findings]))
        plots.FIGURES["audit"]([run.path], run.path / "audit.png")
    if wrong := [finding for finding in findings if finding.verdict == "WRONG"]:
        raise SystemExit(f"{args.objective}: {len(wrong)} of {len(findings)} findings are wrong; see {args.out}/audit.md")


def report(result, findings, arrays):
    found, more = result
    for finding in found:
        print(f"{finding.verdict:5}  {finding.title}: {finding.text}", flush=True)
    findings += found
    arrays |= more


if __name__ == "__main__":
    torch.set_num_threads(1)
    command_line(parse_args, main)
