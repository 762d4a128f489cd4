"""The parts that all figures share: the canvas, colours and dashes, axes, legends, and saving.

Matplotlib, which takes as long to import as half of the rest of a script, is imported inside functions here, when something is
drawn. Figure modules take from it only what an Axes has.
"""

import io
import math
import textwrap
from pathlib import Path

import numpy as np

from objectives import LEARN
from vsm.names import letter_of
from vsm.runs import write_atomic
from vsm.tables import count_failures, failures_text

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"  # Okabe and Ito's
DASHES = {"kld": "-", "fd": "--", "fd-weighted": ":", "fd-repar": "-."}  # of lines, by the inference objective; others are solid

def color_of(flags):
    """The colour that the learning objective of a run has in every figure; grey for an unknown one."""
    return letter_color(letter_of(flags))


def letter_color(letter):
    return next((entry.color for entry in LEARN.values() if entry.letter == letter), "tab:gray")


def dash_of(flags):
    return DASHES.get(flags.get("infer"), "-")


def line_style(flags):
    return {"color": color_of(flags), "linestyle": dash_of(flags)}


def new_figure(rows=1, columns=1, size=(3.2, 2.6), **options):
    """A figure on its own Agg canvas (no display, no global state) and its axes [rows, columns]; size: inches of one panel."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcdefaults()  # a user's matplotlibrc could ask for LaTeX, or change what is published
    matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 9, "legend.frameon": False})
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure, save):
    """Write the figure in the format of the file's ending, a PNG without alpha. Raises UserError where it cannot be written."""
    from PIL import Image
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=Path(save).suffix[1:])
    if Path(save).suffix == ".png":
        opaque = Image.open(picture).convert("RGB")  # an eighth smaller, with the same pixels
        opaque.save(picture := io.BytesIO(), "PNG", dpi=(150, 150), optimize=True)
    write_atomic(Path(save), picture.getvalue())


def label_ticks(ax):
    """Label no minor tick of y; tick a logarithmic axis as a linear one where fewer than two powers of ten lie in its limits."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter
    ax.yaxis.set_minor_formatter("")
    low, high = ax.get_ylim()
    if sum(low <= tick <= high for tick in ax.get_yticks()) < 2:
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_formatter(ScalarFormatter())


def whole_ticks(axis, most):
    """Tick an axis at whole numbers, at `most` intervals or fewer."""
    from matplotlib.ticker import MaxNLocator
    axis.set_major_locator(MaxNLocator(most, integer=True))


def round_ticks(axis):
    """Tick a logarithmic axis at 1, 2 and 5 times powers of ten, as plain numbers."""
    from matplotlib.ticker import LogLocator, ScalarFormatter
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter("")


def linear_around_zero(ax, linear):
    """Scale the y axis by its limits: log if all lie above `linear`, symlog if one is beyond ten times it, otherwise linear."""
    low, high = ax.get_ylim()
    if low > linear:
        ax.set_yscale("log")
        return
    ax.set_yscale("symlog", linthresh=linear)
    first, last = math.log10(linear), math.log10(max(-low, high))
    if last <= first + 1:
        ax.set_yscale("linear")
        return
    step = math.ceil((last - first) / 3)
    powers = 10.0 ** np.arange(first + (step if step > 1 else 0), last + 1e-9, step)
    ax.set_yticks([tick for tick in (*-powers[::-1], 0, *powers) if low <= tick <= high])


def line_key(**style):
    """A line without points, for a legend."""
    from matplotlib.lines import Line2D
    return Line2D([], [], **style)


def area_key(color):
    """A filled rectangle, for a legend."""
    from matplotlib.patches import Patch
    return Patch(color=color)


def legend(figure, axes, columns=5, **more):
    """Add one legend below all axes, with each name once, and `more` {name: handle}; the figure grows by its height."""
    named = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())} | more
    legend_below(figure, list(named.values()), list(named), columns)


def wrapped(text, inches, fontsize):
    """The text in lines of at most so many inches, to within the differences of its letters' widths."""
    return textwrap.fill(text, max(12, int(72 * inches / (0.55 * fontsize))), break_long_words=False)


def legend_below(figure, handles, labels, columns=5):
    """Add a legend below all axes, in as many columns as fit; the figure grows by its height."""
    labels = [wrapped(label, figure.get_figwidth() - 0.7, 9) for label in labels]
    entry = 0.08 * max(map(len, labels), default=1) + 0.5  # inches: the letters, and the handle
    columns = max(1, min(len(labels), columns, int(figure.get_size_inches()[0] / entry)))
    lines = sum(1 + label.count("\n") for label in labels)
    figure.set_figheight(figure.get_figheight() + 0.18 * -(-lines // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def seeds_of(members):
    """The text "seed 0" or "3 seeds (1 diverged)" for the arrays of runs that differ only in their seed."""
    return (f"{len(members)} seeds" if len(members) > 1 else f"seed {members[0]['config']['flags']['seed']}") + fate_of(members)


def fate_of(members):
    """The text " (1 diverged)", or the status of a single run that is not ok; otherwise nothing."""
    statuses = [str(arrays.get("status", "unfinished")) for arrays in members]
    if len(members) == 1:
        return "".join(f" ({status})" for status in statuses if status != "ok")
    failures = failures_text(count_failures(statuses))
    return f" ({failures})" if failures else ""
