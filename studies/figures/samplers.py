"""FID with z from the prior and from a fitted mixture, an objective a curve."""

import numpy as np

from vsm.cli import UserError
from vsm.figures.axes import round_ticks
from vsm.figures.style import handles_of, legend_below, line_key, line_style, new_figure, save_figure
from vsm.names import pair_order
from vsm.stored_runs import open_runs
from vsm.tables import failed

SAMPLERS = {"fid": "$z$ from the prior", "fid_mixture": "$z$ from a fitted mixture of Gaussians"}
MARKERS = {"fixed": "o", "stationary": "D", "learned": "^"}
AXES = {"log_gamma": r"$\log\,\gamma$", "kl": "rate: KL(q || prior) (nats)", "width": "width of the networks"}


def fid_by_sampler(runs, save):
    """FID with z from the prior (left) and from a fitted mixture (right), against log gamma and the rate KL(q || prior).

    Where widths vary, it is against the width alone, on logarithmic axes. A line joins the runs of one objective at fixed gammas;
    other marks have gamma stationary or learnt. A point is the mean over seeds, a bar goes from the smallest to the largest. Runs
    that diverged are left out. Raises UserError for runs that differ in more than objective, seed, and gamma or width.
    """
    points = points_of(open_runs(runs))
    flags = [point["flags"] for members in points.values() for point in members]
    features = sorted({str(point["fid_features"]).rpartition(" ")[0] for members in points.values() for point in members})
    widths = sorted({each["width"] for each in flags})
    alike = ["data", "net", "norm", "samples", "epochs", "lr", *(["gamma", "init_sd"] if len(widths) > 1 else [])]
    if len({tuple(each.get(key) for key in alike) for each in flags}) > 1:
        raise UserError("fid_by_sampler compares runs that differ in objective, seed, and gamma or width; choose them by --only")
    by, rows = ("width", ["width"]) if len(widths) > 1 else ("init_sd", ["log_gamma", "kl"])
    figure, axes = new_figure(len(rows), 2, size=(3.6, 2.7), sharey="col", sharex="row")
    for row, x in zip(axes, rows):
        for ax, (y, law) in zip(row, SAMPLERS.items()):
            for (label, path), members in points.items():
                draw_path(ax, label, path, members, x, y, by)
            ax.set(xlabel=AXES[x], title=law, **({"xscale": "log", "yscale": "log"} if by == "width" else {"ylim": (0, None)}))
            if by == "width":
                round_ticks(ax.yaxis)
                ax.set_xticks(widths, widths)
                ax.xaxis.set_minor_formatter("")
        row[0].set_ylabel(f"FID ({', '.join(features)})")
    marks = {f"gamma {path}": line_key(marker=marker, color="0.4", linestyle="-" if path == "fixed" else "")
             for path, marker in MARKERS.items() if any(path == other for _, other in points)}
    legend_below(figure, handles_of(axes) | (marks if by == "init_sd" else {}))
    save_figure(figure, save)


def points_of(runs):
    """{(label, path of gamma): runs that have ended without a failure, each its last metrics with those of its evaluation}."""
    points = {}
    for run in sorted(runs, key=lambda run: pair_order(run.config["flags"])):
        curves, flags = run.finished(), run.config["flags"]
        if not failed(str(curves["status"])):
            point = {**run.arrays("eval"), "log_gamma": curves["log_gamma"][-1], "kl": curves["kl"][-1], "width": flags["width"],
                     "fid_features": curves["fid_features"], "flags": flags}
            points.setdefault((run.config["label"], flags["gamma"]), []).append(point)
    return points


def draw_path(ax, label, path, members, x, y, by):
    """Draw the runs of one objective and path of gamma: a point for those with the same value of the flag `by`."""
    values = sorted({point["flags"][by] for point in members})
    seeds = [[point for point in members if point["flags"][by] == value] for value in values]
    middle = np.array([[np.mean([point[key] for point in each]) for each in seeds] for key in (x, y)])
    ends = [[end([point[y] for point in each]) for each in seeds] for end in (min, max)]
    style = line_style(members[0]["flags"]) if path == "fixed" else line_style(members[0]["flags"]) | {"linestyle": ""}
    ax.errorbar(*middle, np.abs(np.array(ends) - middle[1]), marker=MARKERS[path], ms=5, elinewidth=0.8,
                mfc=None if path == "fixed" else "white", label=label if path == "fixed" else None, **style)
