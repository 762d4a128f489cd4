"""The figure of benchmark.py."""

from itertools import cycle

import numpy as np

from vsm.figures.axes import label_ticks
from vsm.figures.style import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, new_figure, save_figure
from vsm.stored_runs import open_runs

MODES = {"reference": {"color": "0.6", "label": "reference step, float32"}, "eager": {"color": BLUE, "label": "eager"},
         "captured": {"color": ORANGE, "label": "captured"}}
UNITS = {"ensemble": "members", "toy": "runs", "importance": "samples"}  # of the sizes in the other parts


def benchmark(runs, save):
    """Images per second of every pair and mode, and a black bar from the slowest to the fastest turn.

    Panels of the other parts, where they were measured, show times against sizes.
    """
    arrays = open_runs(runs)[0].arrays()
    images, batches = (select(arrays, part=part) for part in ("images", "batch"))
    eager = select(images, mode="eager")
    panels = sorted(set(zip(eager["image"], eager["net"], eager["precision"])))
    of_batches = np.unique(batches["precision"][batches["mode"] == "eager"])
    others = [rows for part in UNITS if len((rows := select(arrays, part=part))["size"])]
    figure, axes = new_figure(len(panels) + len(of_batches) + len(others), 1, size=(7.2, 2.6))
    for ax, (image, net, precision) in zip(axes[:, 0], panels):
        rate_bars(ax, beside_reference(select(images, image=image, net=net), precision))
        channels, side = image.split("x")
        ax.set_title(f"{net}, {channels} x {side} x {side} pixels, {precision}, {arrays['config']['device']}")
    for ax, precision in zip(axes[len(panels) :, 0], of_batches):
        for mode, style in MODES.items():
            rows = select(beside_reference(batches, precision), mode=mode)
            if len(rows["size"]):
                ax.plot(rows["size"], 1e3 / np.median(rates(rows), 1), marker=".", **style)
        ax.set(xlabel="images per minibatch", ylabel="ms per image", xscale="log", ylim=(0, None),
               title=f"{batches['pair'][0]}, {batches['net'][0]}, {precision}")
        ax.set_xticks(sizes := np.unique(batches["size"]), sizes)
        ax.minorticks_off()
    names = sorted({str(mode) for rows in others for mode in rows["mode"]} - MODES.keys())  # a mode has one colour in every panel
    colors = cycle([GREEN, RED, PURPLE, SKY, "black"])
    styles = MODES | {name: {"color": color, "label": name} for name, color in zip(names, colors)}
    for ax, rows in zip(axes[len(axes) - len(others) :, 0], others):
        for mode in np.unique(rows["mode"]):
            line = select(rows, mode=mode)
            ax.plot(line["size"], 1e3 * np.median(line["seconds"], 1), marker=".", **styles[mode])
        ax.set(xlabel=UNITS[rows["part"][0]], ylabel="ms", xscale="log", yscale="log", title=rows["part"][0])
        ax.set_xticks(sizes := np.unique(rows["size"]), sizes)
        ax.minorticks_off()
        label_ticks(ax)
        ax.legend()
    if axes[0, 0].get_legend() is None:
        axes[0, 0].legend(loc="upper right", ncols=4)
    save_figure(figure, save)


def rate_bars(ax, rows):
    """A group of bars per pair with a bar per mode."""
    pairs, modes = list(dict.fromkeys(rows["pair"])), [mode for mode in MODES if mode in rows["mode"]]
    at, width = np.arange(len(pairs)), 0.8 / len(modes)
    for i, mode in enumerate(modes):
        measured = select(rows, mode=mode)
        rate, places = rates(measured), np.array([pairs.index(pair) for pair in measured["pair"]])
        median = np.median(rate, 1)
        ax.bar(at[places] + (i - (len(modes) - 1) / 2) * width, median, width, **MODES[mode], ecolor="black", capsize=1.5,
               yerr=abs(np.stack([rate.min(1), rate.max(1)]) - median), error_kw={"linewidth": 0.7})
    ax.set(ylabel="images/s", ylim=(0, 1.25 * rates(rows).max()))
    ax.set_xticks(at, pairs, rotation=35, ha="right", rotation_mode="anchor")


def beside_reference(rows, precision):
    """The rows of one precision and those of the mode reference, which has float32 only."""
    keep = (rows["precision"] == precision) | (rows["mode"] == "reference")
    return {name: column[keep] for name, column in rows.items()}


def rates(rows):
    """Images per second [rows, turns]."""
    return rows["size"][:, None] / rows["seconds"]


def select(arrays, **values):
    """The rows in which every named column has the given value, from a table of columns of one length."""
    keep = np.logical_and.reduce([arrays[name] == value for name, value in values.items()])
    return {name: arrays[name][keep] for name in ("part", "image", "net", "pair", "size", "mode", "precision", "seconds")}
