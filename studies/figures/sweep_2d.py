"""Figures of sweeps of 2-D runs over K and J, and of the final values of the convergence study."""

import math

import numpy as np

from objectives import LEARN
from studies.sweep_2d import name_order, sweep_points
from vsm.figures.style import color_of, dash_of, letter_color, line_key, new_figure, save_figure
from vsm.figures.synthetic import MARKERS, marker_of
from vsm.linear import KAPPA_KNOWN, kappa
from vsm.names import letter_of
from vsm.tables import mean_and_error

METRICS = ("nll", "divergence")


def synthetic(runs, save):
    """NLL and Fisher divergence of a sweep: against K, or by objective where all runs have the same K (Figures 3, 6, 7).

    Against K: mean ± standard error over the members that did not diverge; a panel per J, two rows per data set. By objective:
    the members (dots), their mean (bar), two standard errors to either side (box), and the number that diverged (red). NLL is
    drawn less that of the data's law, as is the score-matching loss where a run has no Fisher divergence. Axes are linear near 0.
    """
    points = sweep_points(runs)
    if len({point["K"] for point in points}) > 1:
        sweep_figure(points, save)
    else:
        strip_figure(points, save)


def study(runs, save):
    """Final values by objective, a column of two panels per data set: seeds (dots), mean (bar), two standard errors (box).

    Above, NLL less that of the data's law. Below, the total variance of the model over that of the data, and in grey what the
    theory of linear VAEs predicts for it with an exact posterior, 1 / kappa. Runs without `variance_ratio` have no panel below.
    """
    points = sweep_points(runs)
    panels = panels_of(points)
    rows = 2 if all("variance_ratio" in point["members"] for point in points) else 1
    figure, axes = new_figure(rows, len(panels), size=(max(2.2, 0.22 * largest_panel(panels) + 0.8), 5.2 / rows), sharex="col")
    for column, (title, panel) in zip(axes.T, panels.items()):
        column[0].set_title(title)
        draw_strip(column[0], panel, "nll")
        for ax in column[1:]:
            draw_variance(ax, panel)
        sizes = {point["flags"]["samples"] for point in panel}
        suffix = f", N = {max(sizes)}" if len(sizes) == 1 else ""
        column[0].set_title(title + suffix)
        name_columns(column[-1], [point["name"].removesuffix(suffix) for point in panel])
    for ax, ylabel in zip(axes[:, 0], (axis_title(points[0], "nll"), "variance of the model\nover the data's")):
        ax.set_ylabel(ylabel)
    save_figure(figure, save)


def panels_of(points):
    """{title: points} by data set, J and K; the title names J and K where they vary."""
    panels = {}
    vary = {key: len({point[key] for point in points}) > 1 for key in ("J", "K")}
    for point in sorted(points, key=lambda point: (point["data"], point["J"], point["K"], name_order(point))):
        title = ", ".join([point["data"], *(f"{key} = {point[key]}" for key in vary if vary[key])])
        panels.setdefault(title, []).append(point)
    return panels


def largest_panel(panels):
    """The number of points in the panel with the most."""
    return max(map(len, panels.values()))


# --------------------------------------------------------------------------------------------------------- one K: strips


def strip_figure(points, save):
    """A column of two panels, NLL and divergence, per data set; a y title is not repeated."""
    panels = panels_of(points)
    figure, axes = new_figure(2, len(panels), size=(max(1.9, 0.2 * largest_panel(panels) + 0.7), 2.5), sharex="col")
    before = [None, None]
    for column, (title, panel) in zip(axes.T, panels.items()):
        column[0].set_title(title)
        for ax, metric in zip(column, METRICS):
            draw_strip(ax, panel, metric)
        column[0].tick_params(axis="x", labelbottom=False)
        titles = [axis_title(panel[0], metric) for metric in METRICS]
        for ax, ylabel, last in zip(column, titles, before):
            if ylabel != last:
                ax.set_ylabel(ylabel)
        before = titles
    save_figure(figure, save)


def draw_strip(ax, points, metric):
    """Draw a column per objective: members, mean, two standard errors, and the number of members that diverged."""
    _, width, values = values_above_origin(points, metric)
    for x, (point, members) in enumerate(zip(points, values)):
        draw_members(ax, x, members, point["flags"])
        if point["diverged"].any():
            ax.text(x, 0.99, f"{point['diverged'].sum()}", transform=ax.get_xaxis_transform(), ha="center", va="top",
                    fontsize=6.5, color="tab:red")
    excess_axis(ax, values, width)
    name_columns(ax, [point["name"] for point in points])


def draw_variance(ax, points):
    """Draw a column per objective: the model's variance over the data's, and 1 / kappa (grey) where the objective has a kappa."""
    for x, point in enumerate(points):
        flags = point["flags"]
        if flags["learn"] in KAPPA_KNOWN:
            share = 1 / kappa(flags["learn"], flags["estimator"], flags["samples"], batch=flags["batch"])
            ax.hlines(share, x - 0.45, x + 0.45, color="0.8", lw=6, zorder=0)
        draw_members(ax, x, point["members"]["variance_ratio"], flags)
    ax.set_ylim(0, None)


def draw_members(ax, x, members, flags):
    """Draw the values of one column: the members, and their mean with two standard errors to either side."""
    color = color_of(flags)
    ax.plot(x + np.linspace(-0.25, 0.25, len(members)), np.sort(members), "o", ms=2.5, alpha=0.7, mew=0.6, color=color,
            mfc="white" if dash_of(flags) != "-" else None)
    mean, error, _ = mean_and_error(members)
    if np.isfinite(mean):
        left, right, error = x - 0.35, x + 0.35, np.nan_to_num(error)  # no box around a single member
        ax.hlines(mean, left, right, color=color, lw=1.6)
        ax.fill_between([left, right], mean - 2 * error, mean + 2 * error, color=color, alpha=0.2, lw=0)


def name_columns(ax, names):
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7.5)
    ax.set_xlim(-0.7, len(names) - 0.3)


# ------------------------------------------------------------------------------------------------------ several K: lines


def sweep_figure(points, save):
    """A column of panels per J, and two rows, NLL and divergence, per data set."""
    datas, steps, inner = (sorted({point[key] for point in points}) for key in ("data", "J", "K"))
    figure, axes = new_figure(2 * len(datas), len(steps), size=(4.8, 2.3), sharex=True, sharey="row")
    for i, data in enumerate(datas):
        for row, metric in zip(axes[2 * i:2 * i + 2], METRICS):
            of_data = [point for point in points if point["data"] == data]
            origin, width, values = values_above_origin(of_data, metric, means=True)
            for ax, J in zip(row, steps):
                draw_sweep(ax, [point for point in of_data if point["J"] == J], metric, origin, inner)
                excess_axis(ax, values, width)
                ax.set_title(f"{data}, J = {J}" if metric == "nll" else "")
            row[0].set_ylabel(axis_title(of_data[0], metric))
    for ax in axes[-1]:
        ax.set_xlabel("encoder updates per decoder update, K")
    add_legends(figure, points)
    save_figure(figure, save)


def draw_sweep(ax, points, metric, origin, inner):
    """Draw a line per objective over evenly spaced K, each moved sideways so that no points lie on top of each other."""
    names = {point["name"]: point for point in sorted(points, key=name_order)}
    for k, (name, first) in enumerate(names.items()):
        line = sorted((inner.index(point["K"]), *point[metric][:2]) for point in points if point["name"] == name)
        x, mean, error = np.array(line).T
        error = np.nan_to_num(error)  # no bar at a single member
        style = {"color": color_of(first["flags"]), "linestyle": dash_of(first["flags"]), "marker": marker_of(name)}
        ax.errorbar(x + 0.84 * ((k + 0.5) / len(names) - 0.5), mean - origin, error, capsize=1.5, ms=4, lw=0.9, elinewidth=0.8,
                    **style)
    for edge in range(len(inner) - 1):
        ax.axvline(edge + 0.5, color="0.92", lw=0.8, zorder=0)
    ax.set_xticks(range(len(inner)), inner)
    ax.set_xlim(-0.55, len(inner) - 0.45)


def add_legends(figure, points):
    """Add three legends below the axes, one each for colour, line and marker."""
    letters = dict.fromkeys(letter_of(point["flags"]) for point in sorted(points, key=name_order))
    lines = {(dash_of(point["flags"]), inference_name(point["flags"])) for point in points}
    lines = sorted(lines, key=lambda line: (line[0] != "-", line))
    sizes = sorted({point["flags"]["samples"] for point in points if point["flags"]["samples"] > 1})
    drawn = {marker_of(point["name"]) for point in points}
    markers = [(marker, f"N = {', '.join(map(str, sizes))}" if title == "N = 5" else title)
               for marker, title in MARKERS.values() if marker in drawn]
    groups = {
        "colour: decoder's objective": [line_key(color=letter_color(letter), lw=3, label=letter) for letter in letters],
        "line: encoder's objective": [line_key(color="0.3", linestyle=dash, label=name) for dash, name in lines],
        "marker: samples, estimator": [line_key(color="0.3", linestyle="", marker=marker, label=title)
                                       for marker, title in markers],
    }
    figure.set_figheight(figure.get_figheight() + 0.6)
    for where, (title, handles) in zip(("left", "center", "right"), groups.items()):
        figure.legend(handles=handles, title=title, loc=f"outside lower {where}", ncols=3, fontsize=8, title_fontsize=8,
                      columnspacing=1.2)


def inference_name(flags):
    """The name of the encoder's objective in legends; FAE for one that trains both halves."""
    return "FAE" if LEARN.get(flags["learn"], LEARN["fd"]).joint else flags["infer"].upper()


# ------------------------------------------------------------------------------------------------------------- y axes


def values_above_origin(points, metric, means=False):
    """The value drawn as zero, the width of the linear part around it, and each point's members (or means) less that value.

    The origin is the value of the data's law, or the lowest mean where that is unknown.
    """
    finite = [point[metric][0] for point in points if np.isfinite(point[metric][0])] or [0.0]
    origin = points[0]["truth"][metric]
    if not np.isfinite(origin):
        origin = min(finite)
    width = max(1e-3, 0.3 * (np.median(finite) - origin))
    values = [np.atleast_1d(point[metric][0] if means else point["members"][metric]) - origin for point in points]
    return origin, width, values


def excess_axis(ax, values, width):
    """Make the y axis linear within `width` of zero and logarithmic beyond, or logarithmic where no value is near zero."""
    found = np.concatenate([value[np.isfinite(value)] for value in values] or [[]])
    low, high = found.min(initial=np.inf), max(found.max(initial=width), width)
    if np.isfinite(low) and low > 0.2 * np.median(found):
        ax.set_yscale("log")
        ax.set_ylim(low / 1.4, high * 1.4)
        ticks = round_numbers(low / 1.4, high * 1.4, (1, 2, 5))
        if len(ticks) < 3:
            ticks = round_numbers(low / 1.4, high * 1.4, (1, 1.5, 2, 3, 4, 6, 8))
        elif len(ticks) > 7:
            ticks = round_numbers(low / 1.4, high * 1.4, (1,))
    else:
        ax.axhline(0, color="0.8", lw=0.8, zorder=0)
        ax.set_yscale("asinh", linear_width=width)
        ax.set_ylim(min(-0.5 * width, 1.2 * low), 2 * high)
        ticks = [0, *round_numbers(width, 2 * high, (1,))]
        if len(ticks) < 3:
            ticks = [0, *round_numbers(width, 2 * high, (1, 2, 5))]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.yaxis.set_minor_formatter("")
    ax.tick_params(axis="y", which="minor", length=0)


def round_numbers(low, high, factors):
    """The numbers factor * 10^k in [low, high)."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [factor * 10.0**k for k in powers for factor in factors if low <= factor * 10.0**k < high]


def axis_title(point, metric):
    """The title of a y axis, with what was subtracted."""
    known = np.isfinite(point["truth"][metric])
    if metric == "nll":
        return f"NLL above the {'data law' if known else 'lowest mean'}'s\n(nats)".replace("mean's", "mean")
    if point["divergence_name"] == "Fisher divergence":
        return "Fisher divergence"
    return f"score-matching loss\nabove the {'law' if known else 'lowest mean'}'s".replace("mean's", "mean")
