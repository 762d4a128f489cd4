"""FID against gamma and against the rate, an objective a curve."""

import numpy as np

from vsm.cli import UserError
from vsm.figures.style import handles_of, legend_below, line_key, line_style, new_figure, save_figure
from vsm.names import pair_order
from vsm.stored_runs import open_runs

SAMPLERS = {"fid": "$z$ from the prior", "fid_mixture": "$z$ from a fitted mixture of Gaussians"}
MARKERS = {"fixed": "o", "stationary": "D", "learned": "^"}


def fid_against_gamma(runs, save):
    """FID with z from the prior and from a fitted mixture, against log gamma (above) and the rate KL(q || prior) (below).

    A line joins the runs of one objective at fixed gammas; other marks have gamma stationary or learnt. A point is the mean over
    seeds, a bar goes from the smallest to the largest. Raises UserError for runs that differ in data or network.
    """
    points = points_of(open_runs(runs))
    figure, axes = new_figure(2, 2, size=(3.6, 2.7), sharey="col", sharex="row")
    for row, x, title in zip(axes, ("log_gamma", "kl"), (r"$\log\,\gamma$", "rate: KL(q || prior) (nats)")):
        for ax, (y, law) in zip(row, SAMPLERS.items()):
            for (label, path), members in points.items():
                draw_path(ax, label, path, members, x, y)
            ax.set(xlabel=title, title=law)
            ax.set_ylim(bottom=0)
        row[0].set_ylabel(f"FID ({features_of(points)})")
    marks = {f"gamma {path}": line_key(marker=marker, color="0.4", linestyle="-" if path == "fixed" else "")
             for path, marker in MARKERS.items() if any(path == other for _, other in points)}
    legend_below(figure, handles_of(axes) | marks)
    save_figure(figure, save)


def points_of(runs):
    """{(label, path of gamma): runs that have ended, each its last metrics with those of its evaluation}."""
    points = {}
    if len({tuple(run.config["flags"][key] for key in ("data", "net", "width", "norm")) for run in runs}) > 1:
        raise UserError("fid_against_gamma compares runs of one data set and network; choose them by --only")
    for run in sorted(runs, key=lambda run: pair_order(run.config["flags"])):
        curves, flags = run.finished(), run.config["flags"]
        last = {key: values[-1] for key, values in curves.items() if key in ("log_gamma", "kl")}
        point = {**run.arrays("eval"), **last, "fid_features": curves["fid_features"], "flags": flags}
        points.setdefault((run.config["label"], flags["gamma"]), []).append(point)
    return points


def features_of(points):
    return ", ".join(sorted({str(point["fid_features"]).rpartition(" ")[0] for members in points.values() for point in members}))


def draw_path(ax, label, path, members, x, y):
    """Draw the runs of one objective and path of gamma: a point for those that differ in their seed alone."""
    starts = sorted({point["flags"]["init_sd"] for point in members})
    seeds = [[point for point in members if point["flags"]["init_sd"] == start] for start in starts]
    middle = np.array([[np.mean([point[key] for point in each]) for each in seeds] for key in (x, y)])
    ends = [[end([point[y] for point in each]) for each in seeds] for end in (min, max)]
    style = line_style(members[0]["flags"]) if path == "fixed" else line_style(members[0]["flags"]) | {"linestyle": ""}
    ax.errorbar(*middle, np.abs(np.array(ends) - middle[1]), marker=MARKERS[path], ms=5, elinewidth=0.8,
                mfc=None if path == "fixed" else "white", label=label if path == "fixed" else None, **style)
