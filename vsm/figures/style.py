"""The parts that all figures share: the canvas, colours and dashes, legends, and saving.

Matplotlib, which takes as long to import as half of the rest of a script, is imported inside functions here and in axes.py, when
something is drawn. Figure modules take from it only what an Axes has.
"""

import io
import textwrap
from pathlib import Path

import numpy as np

from objectives import LEARN
from vsm.names import letter_of
from vsm.runs import write_atomic

BLUE, ORANGE, RED, PURPLE = "#0072B2", "#E69F00", "#D55E00", "#CC79A7"  # of Okabe and Ito
DASHES = {"kld": "-", "fd": "--", "fd-weighted": ":", "fd-repar": "-."}  # of lines, by the inference objective; others are solid


def color_of(flags):
    """The colour that the learning objective of a run has in every figure; grey for an unknown one."""
    return letter_color(letter_of(flags))


def letter_color(letter):
    return next((entry.color for entry in LEARN.values() if entry.letter == letter), "tab:gray")


def line_style(flags):
    return {"color": color_of(flags), "linestyle": DASHES.get(flags.get("infer"), "-")}


def dot_style(flags):
    """Points without a line, which are open where inference is not KLD."""
    solid = line_style(flags)["linestyle"] == "-"
    return {"color": color_of(flags), "linestyle": "", "mfc": None if solid else "white"}


def new_figure(rows=1, columns=1, size=(3.2, 2.6), **options):
    """A figure on its own Agg canvas (no display, no global state) and its axes [rows, columns]; size: inches of one panel."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcdefaults()  # a user's matplotlibrc could ask for LaTeX, or change what is published
    matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 9, "legend.frameon": False, "axes.formatter.useoffset": False})
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def new_panels(count, columns, size):
    """A figure with `count` axes in rows of `columns`; those left over in the last row are invisible."""
    figure, axes = new_figure(-(-count // columns), columns, size)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
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


def line_key(**style):
    """A line without points, for a legend."""
    from matplotlib.lines import Line2D
    return Line2D([], [], **style)


def seeds_key():
    """{label: handle} of bars over seeds, for a legend."""
    return {"bar: smallest to largest seed": line_key(color="0.4", marker="|", ms=10, ls="")}


def area_key(color):
    """A filled rectangle, for a legend."""
    from matplotlib.patches import Patch
    return Patch(color=color)


def wrapped(text, inches, fontsize):
    """The text in lines of at most so many inches, to within the differences of its letters' widths."""
    return textwrap.fill(text, max(12, int(72 * inches / (0.55 * fontsize))), break_long_words=False, break_on_hyphens=False)


def handles_of(axes):
    """{label: handle} of what is drawn in the axes, each label once."""
    return {label: handle for ax in np.ravel(axes) for handle, label in zip(*ax.get_legend_handles_labels())}


def legend_below(figure, handles, columns=5):
    """Add a legend of {label: handle} below all axes, in as many columns as fit; the figure grows by its height."""
    labels = [wrapped(label, figure.get_figwidth() - 0.7, 9) for label in handles]
    entry = 0.08 * max(map(len, labels), default=1) + 0.5  # inches: the letters, and the handle
    columns = max(1, min(len(labels), columns, int(figure.get_size_inches()[0] / entry)))
    lines = sum(1 + label.count("\n") for label in labels)
    figure.set_figheight(figure.get_figheight() + 0.18 * -(-lines // columns))
    figure.legend(list(handles.values()), labels, loc="outside lower center", ncols=columns)
