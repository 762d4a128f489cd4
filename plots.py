"""Every figure, drawn from `.npz` files alone: python plots.py FIGURE RUN... --save out.png

Scripts call the same functions at their end, so a figure can be redrawn at any time without a model or a GPU.
A figure is a function figure(runs, save): a list of run folders in, a PNG out.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from runs import UserError, command_line, load_arrays

# One colour per objective in every figure: hue for the learning objective, dashes for FD inference.
COLORS = {"ELBO": "black", "F": "tab:blue", "S": "tab:orange", "B": "tab:green", "FAE": "tab:red"}

STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "legend.frameon": False, "savefig.dpi": 150}


def line_style(label):
    """Colour and dash of a pair named as in the paper: KLD-F, FD-S, FAE."""
    return {"color": COLORS[label.split("-")[-1]], "linestyle": "--" if label.startswith("FD-") else "-"}


def new_figure(rows=1, columns=1, size=(3.2, 2.6), **options):
    """A figure on its own Agg canvas (no display, no global state) and its axes [rows, columns]."""
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure, save):
    Path(save).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(save, dpi=150)


FIGURES = {}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--save", default=None, help="the PNG to write (default: FIGURE.png in the first run's folder)")
    return parser.parse_args(argv)


def main(args):
    save = args.save or Path(args.runs[0]) / f"{args.figure}.png"
    FIGURES[args.figure](args.runs, save)
    print(save)


if __name__ == "__main__":
    command_line(parse_args, main)
