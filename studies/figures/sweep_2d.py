"""Figures of sweeps of 2-D runs over K and J, of the final values of the convergence study, and of bi-level training."""

import math
from functools import cache

import numpy as np
import torch

from studies.tables import COLLAPSED
from vsm.cli import UserError
from vsm.distributions_2d import DISTRIBUTIONS, distribution
from vsm.figures.axes import round_ticks
from vsm.figures.style import RED, area_key, dot_style, handles_of, legend_below, line_key, line_style, new_figure, save_figure
from vsm.figures.synthetic import marker_of, refuse_other_settings
from vsm.linear import KAPPA_KNOWN, bilevel_end, kappa
from vsm.names import letter_of, pair_name, pair_order, refuse_twins
from vsm.stored_runs import open_runs
from vsm.tables import mean_and_error

STEPS = np.unique(np.geomspace(1, 1000, 60).round())  # of the curves
V, GAMMA, LR = 1.0, 0.025, 0.01  # the example of docs/theory.md: variance of the data, gamma, step of the encoder
THEORY = {"color": "black", "lw": 1.5, "linestyle": (0, (1, 1))}


def synthetic(runs, save):
    """NLL and Fisher divergence of a sweep: against K, or by objective where all runs have the same K (Figures 3, 6, 7).

    Against K: the NLL alone, mean ± standard error over the members that did not diverge. By objective: both for the members
    (dots), their mean (bar), two standard errors to either side (box), and the number that diverged (red). NLL is drawn less that
    of the data's law, as is the score-matching loss where a run has no Fisher divergence. Axes are linear near 0.
    """
    points = sweep_points(runs)
    draw = sweep_figure if len({point["K"] for point in points}) > 1 else strip_figure
    save_figure(draw(points), save)


def study(runs, save):
    """Final values by objective, a column of two panels per data set: seeds (dots), mean (bar), two standard errors (box).

    Above, NLL less that of the data's law. Below, the total variance of the model over that of the data, and dotted what the
    theory of linear VAEs predicts for it with an exact posterior, 1 / kappa. Runs without `variance_ratio` have no panel below.
    """
    points = sweep_points(runs)
    panels = panels_of(points)
    rows = 2 if all("variance_ratio" in point["members"] for point in points) else 1
    width = max(2.2, 0.22 * max(map(len, panels.values())) + 0.8)
    figure, axes = new_figure(rows, len(panels), size=(width, 5.2 / rows), sharex="col")
    for column, (title, panel) in zip(axes.T, panels.items()):
        draw_strip(column[0], panel, "nll")
        for ax in column[1:]:
            draw_variance(ax, panel)
        sizes = {point["flags"]["samples"] for point in panel}
        suffix = f", N = {max(sizes)}" if len(sizes) == 1 else ""
        column[0].set_title(title + suffix)
        name_columns(column[-1], [point["name"].removesuffix(suffix) for point in panel])
    for ax, ylabel in zip(axes[:, 0], (axis_title(points[0], "nll"), "variance of the model\nover the data's")):
        ax.set_ylabel(ylabel)
    explain_strips(figure, points, theory=rows == 2)
    save_figure(figure, save)


def name_order(point):
    """Sort key of points: in the order of their pairs, then by name."""
    return *pair_order(point["flags"]), point["name"]


def sweep_points(runs):
    """A list of dicts, one for each data set, J, name and K, over the members of all runs that share these.

    nll and divergence: (mean, standard error, median) over the members. members: the values behind them. truth: the values of the
    data's law at the same test points. diverged: a flag for each member. Raises UserError for runs of one data set that differ in
    more than AXES, or that share a seed.
    """
    opened = open_runs(runs)
    loaded = [run.finished() for run in opened]
    refuse_other_settings([arrays["config"]["flags"] for arrays in loaded])
    groups = {}
    for run, arrays in zip(opened, loaded):
        flags = arrays["config"]["flags"]
        key = flags["data"], flags["bilevel_steps"], pair_name(arrays["config"]), flags["inner_steps"]
        groups.setdefault(key, []).append((run.name, range(flags["seed"], flags["seed"] + flags["seeds"]), arrays))
    points = []
    for (data, J, name, K), members in groups.items():
        refuse_twins([(run, seeds) for run, seeds, _ in members])
        settings = [[arrays["config"]["flags"].get(key) for key in ("infer_samples", "inner_lr")] for *_, arrays in members]
        if any(each != settings[0] for each in settings):
            raise UserError(f"the runs of {name} on {data} differ in infer_samples or inner_lr; draw those of one value")
        points.append({"data": data, "J": J, "name": name, "K": K, **sweep_point([arrays for *_, arrays in members])})
    return points


def sweep_point(group):
    """The statistics of one point from the arrays of its runs."""
    def of_members(key):
        return np.concatenate([arrays[key] for arrays in group])

    divergence = "fisher_divergence" if "fisher_divergence" in group[0] else "sm_loss"
    members = {"nll": of_members("nll"), "divergence": of_members(divergence)}
    if all("variance_ratio" in arrays for arrays in group):
        members["variance_ratio"] = of_members("variance_ratio")
    nll, loss = truth_of(group[0])
    return {
        "flags": group[0]["config"]["flags"],
        "members": members,
        "diverged": of_members("diverged_at") >= 0,
        "truth": {"nll": nll, "divergence": loss if divergence == "sm_loss" else 0.0},
        "divergence_name": {"fisher_divergence": "Fisher divergence", "sm_loss": "score-matching loss"}[divergence],
        **{key: tuple(map(float, mean_and_error(values))) for key, values in members.items()},
    }


def truth_of(arrays):
    """NLL and score-matching loss of the data's law at the run's test points, or NaN where its density is not known."""
    if "test_data" in arrays:
        flags = arrays["config"]["flags"]
        return law_at(flags["data"], flags.get("noise", 0), arrays["test_data"].tobytes())
    gaps = arrays["nll"] - arrays.get("nll_excess", np.nan), arrays.get("sm_loss", np.nan) - arrays.get("sm_excess", np.nan)
    return tuple(np.nanmedian(gap) if np.isfinite(gap).any() else np.nan for gap in gaps)  # all members have the same


@cache
def law_at(name, noise, points):
    """Mean NLL (nats) and score-matching loss of a law with noise over float32 points [n, 2], given as bytes; NaN if unknown."""
    law = distribution(name, noise) if name in DISTRIBUTIONS else None
    if law is None or law.log_prob is None:
        return np.nan, np.nan
    points = torch.tensor(np.frombuffer(points, np.float32).reshape(-1, 2)).double()
    return -law.log_prob(points).mean().item(), law.score_matching_loss(points).mean().item()


def panels_of(points):
    """{title: points} by data set, J and K; the title names J and K where they vary."""
    panels = {}
    vary = {key: len({point[key] for point in points}) > 1 for key in ("J", "K")}
    for point in sorted(points, key=lambda point: (point["data"], point["J"], point["K"], name_order(point))):
        title = ", ".join([point["data"], *(f"{key} = {point[key]}" for key in vary if vary[key])])
        panels.setdefault(title, []).append(point)
    return panels


def strip_figure(points):
    """A column of two panels, NLL and divergence, per data set; a y title is not repeated."""
    panels = panels_of(points)
    width = max(1.9, 0.2 * max(map(len, panels.values())) + 0.7)
    figure, axes = new_figure(2, len(panels), size=(width, 2.5), sharex="col")
    before = {}
    for column, (title, panel) in zip(axes.T, panels.items()):
        column[0].set_title(title)
        for ax, metric in zip(column, ("nll", "divergence")):
            draw_strip(ax, panel, metric)
            if (ylabel := axis_title(panel[0], metric)) != before.get(metric):
                ax.set_ylabel(ylabel)
            before[metric] = ylabel
        column[0].tick_params(axis="x", labelbottom=False)
    explain_strips(figure, points)
    return figure


def draw_strip(ax, points, metric):
    """Draw a column per objective: members, mean, two standard errors, and the number of members that diverged."""
    _, width, values = values_above_origin(points, metric)
    for x, (point, members) in enumerate(zip(points, values)):
        draw_members(ax, x, members, point["flags"])
        if point["diverged"].any():
            ax.text(x, 0.99, f"{point['diverged'].sum()}", transform=ax.get_xaxis_transform(), ha="center", va="top",
                    fontsize=6.5, color=RED)
    excess_axis(ax, values, width)
    name_columns(ax, [point["name"] for point in points])


def draw_variance(ax, points):
    """Draw a column per objective: the model's variance over the data's, and 1 / kappa (dotted) where it is known."""
    for x, point in enumerate(points):
        flags = point["flags"]
        if flags["learn"] in KAPPA_KNOWN:
            share = 1 / kappa(flags["learn"], flags["estimator"], flags["samples"], batch=flags["batch"])
            ax.hlines(share, x - 0.45, x + 0.45, zorder=3, **THEORY)
        draw_members(ax, x, point["members"]["variance_ratio"], flags)
    ax.set_ylim(0, None)


def draw_members(ax, x, members, flags):
    """Draw the values of one column: the members, and their mean with two standard errors to either side."""
    style = dot_style(flags)
    color, at = style["color"], x + np.linspace(-0.25, 0.25, len(members))
    ax.plot(at, np.sort(members), marker="o", ms=2.5, alpha=0.7, mew=0.6, **style)
    mean, error, _ = mean_and_error(members)
    if np.isfinite(mean):
        left, right, error = x - 0.35, x + 0.35, np.nan_to_num(error)  # no box around a single member
        ax.hlines(mean, left, right, color=color, lw=1.6)
        ax.fill_between([left, right], mean - 2 * error, mean + 2 * error, color=color, alpha=0.2, lw=0)


def name_columns(ax, names):
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7.5)
    ax.set_xlim(-0.7, len(names) - 0.3)


def explain_strips(figure, points, theory=False):
    """Say below the axes what the marks of a strip mean; the names below its columns say what the colours are."""
    keys = {"a seed": line_key(color="0.3", marker="o", ms=3, ls=""),
            "a seed, FD inference": line_key(color="0.3", marker="o", ms=3, mfc="white", ls=""),
            "mean over the seeds that did not diverge": line_key(color="0.3", lw=1.6),
            "two standard errors to either side": area_key("0.85")}
    if any(point["diverged"].any() for point in points):
        keys["number of seeds that diverged"] = line_key(color=RED, marker="$7$", ms=5, ls="")
    if theory:
        keys[r"theory: $1 / \kappa$"] = line_key(**THEORY)
    legend_below(figure, keys, columns=6)


def sweep_figure(points):
    """NLL against K: a row per data set and J, a column for ELBO and F and for each other objective."""
    rows, inner = sorted({(point["data"], point["J"]) for point in points}), sorted({point["K"] for point in points})
    columns = {}
    for point in sorted(points, key=name_order):
        letter = letter_of(point["flags"])
        columns.setdefault("ELBO, F" if letter in ("ELBO", "F") else letter, []).append(point)
    figure, axes = new_figure(len(rows), len(columns), size=(3.2, 2.1), sharex=True, sharey="row")
    for row, (data, J) in zip(axes, rows):
        origin, width, values = values_above_origin([point for point in points if point["data"] == data], "nll", means=True)
        for ax, (letters, drawn) in zip(row, columns.items()):
            draw_sweep(ax, [point for point in drawn if (point["data"], point["J"]) == (data, J)], origin, inner)
            excess_axis(ax, values, width)
            ax.set_title(f"{data}, J = {J}: {letters}")
        row[0].set_ylabel(axis_title(points[0], "nll"))
    for ax in axes[-1]:
        ax.set_xlabel("encoder updates per decoder update, K")
    legend_below(figure, handles_of(axes), columns=4)
    return figure


def draw_sweep(ax, points, origin, inner):
    """Draw a line per objective over evenly spaced K, each moved sideways so that no points lie on top of each other."""
    names = {point["name"]: point for point in points}
    for k, (name, first) in enumerate(names.items()):
        line = sorted((inner.index(point["K"]), *point["nll"][:2]) for point in points if point["name"] == name)
        x, mean, error = np.array(line).T
        error = np.nan_to_num(error)  # no bar at a single member
        ax.errorbar(x + 0.4 * ((k + 0.5) / len(names) - 0.5), mean - origin, error, capsize=1.5, ms=5, lw=0.9, elinewidth=0.8,
                    marker=marker_of(name), label=name, **line_style(first["flags"]))
    ax.set_xticks(range(len(inner)), inner)


def values_above_origin(points, metric, means=False):
    """The value drawn as zero, the width of the linear part around it, and each point's members (or means) less that value.

    The origin is the value of the data's law, or the lowest mean where that is unknown.
    """
    finite = [point[metric][0] for point in points if np.isfinite(point[metric][0])] or [0.0]
    truth = points[0]["truth"][metric]
    origin = truth if np.isfinite(truth) else min(finite)
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
        return "NLL above the " + ("data law's" if known else "lowest mean") + "\n(nats)"
    if point["divergence_name"] == "Fisher divergence":
        return "Fisher divergence"
    return "score-matching loss\nabove the " + ("law's" if known else "lowest mean")


def bilevel(runs, save):
    """Bi-level training against the number J of kept encoder steps: theory, and E z^2 and NLL of 2-D runs of one data set.

    Left: kappa_J of the example of docs/theory.md (its v, gamma and step, not those of the runs), for the objectives of the runs;
    `released` and FD inference have none. Middle: E z^2 of each latent in use, close to kappa on a linear VAE where v is far
    above kappa gamma. Right: NLL above the true law's. Dots are latents and members; lines join their means. Of runs that differ
    in K those with the least are drawn, and of runs that differ in length those of the length that most of them have.
    """
    loaded = [run.finished() for run in open_runs(runs)]
    ordered = sorted(((arrays["config"]["flags"], arrays) for arrays in loaded), key=lambda run: pair_order(run[0]))
    fewest, lengths = min(flags["inner_steps"] for flags, _ in ordered), [flags["epochs"] for flags, _ in ordered]
    length, objectives = max(sorted(set(lengths)), key=lengths.count), {}
    for flags, arrays in ordered:
        if (flags["inner_steps"], flags["epochs"]) == (fewest, length):
            objectives.setdefault(pair_name(arrays["config"]), []).append((flags["bilevel_steps"], arrays))
    shown = [(name, J, arrays) for name, group in objectives.items() for J, arrays in group]
    refuse_other_settings([arrays["config"]["flags"] for *_, arrays in shown])
    if len({arrays["config"]["flags"]["data"] for *_, arrays in shown}) > 1:
        raise UserError("bilevel draws runs of one data set; choose them by --only")
    drawn = {J for group in objectives.values() for J, _ in group}
    figure, axes = new_figure(1, 3, size=(3.0, 2.6))
    for name, group in objectives.items():
        steps, group = zip(*sorted(group, key=lambda run: run[0]))
        flags = group[0]["config"]["flags"]
        style = line_style(flags) | {"linestyle": "--" if flags["estimator"] == "unbiased" else "-"}
        if flags["learn"] in KAPPA_KNOWN and flags["infer"] == "kld" and flags["estimator"] != "released":
            ends = [bilevel_end(flags["learn"], flags["estimator"], flags["samples"], J, LR, V, GAMMA) for J in (0, *STEPS)]
            axes[0, 0].plot((0, *STEPS), ends, **style)
        in_use = [arrays["second_moment"][arrays["posterior_sd"][-1] <= COLLAPSED] for arrays in group]
        for ax, values in zip(axes[0, 1:], (in_use, [arrays["nll_excess"] for arrays in group])):
            for J, members in zip(steps, values):
                ax.plot(np.full(len(members), J), members, "o", ms=2.5, alpha=0.5, mew=0, color=style["color"])
            ax.plot(steps, [mean_and_error(members)[0] for members in values], marker="_", ms=9, label=name, **style)
    for ax, title in zip(axes[0], ("linear VAE, theory: $\\kappa$", "$E z^2$ of latents in use", "NLL above the truth (nats)")):
        ax.set_xscale("symlog", linthresh=1)
        ax.set_yscale("log")
        round_ticks(ax.yaxis)
        ax.xaxis.set_major_formatter(ax.yaxis.get_major_formatter())
        ax.xaxis.set_minor_formatter("")
        ax.set(xlabel="kept encoder steps, $J$", title=title, xlim=(-0.3, 1.3 * max(STEPS if ax is axes[0, 0] else (1, *drawn))))
    for ax in axes[0, 1:]:
        ax.set_xticks(sorted(drawn))
    handles = {f"{label}, mean": handle for label, handle in handles_of(axes[0, 1]).items()}
    legend_below(figure, handles | {"a latent, or a seed": line_key(color="0.3", marker="o", ms=2.5, ls="")}, columns=6)
    save_figure(figure, save)
