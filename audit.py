"""Audit a learning objective: is its gradient right, and where does its training end? It takes seconds.

NAME is an objective that objectives.py has, or one that you have just added to it (docs/extending.md). No data are needed:
    python audit.py swersky
    python audit.py bao --estimator unbiased

The audit prints its findings, each behind its verdict: `ok`, `note` (true of some right objectives) or `WRONG`. It writes
metrics.npz and audit.md to a folder under runs/audit. The exit code is 1 if a finding is WRONG.
"""

import os

import numpy as np
import torch

from objectives import ESTIMATORS, LEARN
from studies import auditing
from vsm.cli import Parser, command_line, count
from vsm.device import pick_device
from vsm.runs import Run
from vsm.tables import markdown_table


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("objective", choices=LEARN, metavar="NAME", help=f"a name of objectives.LEARN: {', '.join(LEARN)}")
    flag = parser.add_argument_group("experiment").add_argument
    flag("--estimator", choices=ESTIMATORS, default="plugin", help="how the objective estimates squared expectations under q")
    flag("--seed", type=count, default=0, help="of the random models")
    flag = parser.add_argument_group("output").add_argument
    flag("--out", type=os.path.expanduser, help="the report's folder, whose audit is replaced (default: "
         "runs/audit/NAME-ESTIMATOR)")
    args = parser.parse_args(argv)
    if args.estimator not in (LEARN[args.objective].estimators if LEARN[args.objective].takes("estimator") else ("plugin",)):
        parser.error(f"{args.objective} has no estimator {args.estimator}")
    args.out = args.out or f"runs/audit/{args.objective}-{args.estimator}"
    return args


def main(args):
    device = pick_device("cpu")
    with Run(args.out, "audit", vars(args), device, overwrite=True) as run:  # it takes seconds
        options = {"estimator": args.estimator} if LEARN[args.objective].takes("estimator") else {}
        findings, arrays = [], {}
        if LEARN[args.objective].joint:
            print(f"{args.objective} trains encoder and decoder by one loss; the audit is of the decoder's part, q held fixed")
        for check in auditing.CHECKS:
            found, measured = check(args.objective, options, args.seed)
            for finding in found:
                print(f"{finding.verdict:5}  {finding.title}: {finding.text}", flush=True)
            findings, arrays = findings + found, arrays | measured
        page = f"# Audit of `{args.objective}`, estimator {args.estimator}\n\n"
        page += markdown_table(["check", "verdict", "finding"], findings) + "\n"
        run.write("audit.md", page.encode())
        run.save_metrics(**{name: np.asarray(value) for name, value in arrays.items()}, status="ok",
                         verdict=np.array([finding.verdict for finding in findings]),
                         finding=np.array([finding.text for finding in findings]))
    if wrong := [finding for finding in findings if finding.verdict == "WRONG"]:
        raise SystemExit(f"{args.objective}: {len(wrong)} of {len(findings)} findings are wrong; see {args.out}/audit.md")


if __name__ == "__main__":
    torch.set_num_threads(1)
    command_line(parse_args, main)
