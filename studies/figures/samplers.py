"""FID with z from the prior and from a fitted mixture, an objective a curve."""

import numpy as np

from vsm.cli import UserError
from vsm.figures.axes import round_ticks
from vsm.figures.style import handles_of, legend_below, line_key, line_style, new_figure, save_figure, seeds_key
from vsm.names import NOT_IDENTITY, pair_name, pair_order, refuse_twins
from vsm.stored_runs import measured_by, open_runs
from vsm.tables import failed

SAMPLERS = {"fid": "$z$ from the prior", "fid_mixture": "$z$ from a fitted mixture of Gaussians"}
MARKERS = {"fixed": "o", "stationary": "D", "learned": "^"}
AXES = {"log_gamma": r"$\log\,\gamma$", "kl": "rate: KL(q || prior) (nats)", "width": "width of the networks"}
FREE = (*NOT_IDENTITY, "seed", "learn", "infer", "estimator")  # flags in which the runs of every figure may differ


def fid_by_sampler(runs, save):
    """FID with z from the prior (left) and from a fitted mixture (right), against log gamma and the rate KL(q || prior).

    Where widths vary, it is against the width alone, on logarithmic axes. A line joins the runs of one objective at fixed gammas;
    other marks have gamma stationary or learnt. A point is the mean over seeds, a bar goes from the smallest to the largest. Runs
    that failed are left out. Raises UserError for runs that differ in more than objective, seed, and gamma or width.
    """
    points = [point_of(run) for run in open_runs(runs) if not failed(str(run.finished()["status"]))]
    if not points:
        raise UserError("all of these runs failed, so there is nothing to draw")
    widths = sorted({point["width"] for point in points})
    by, rows = ("width", ["width"]) if len(widths) > 1 else ("init_sd", ["log_gamma", "kl"])
    free = (*FREE, "width") if by == "width" else (*FREE, "gamma", "init_sd")
    keys = {key for point in points for key in point["flags"]} - {*free}
    alike = {str([measured_by(point["evaluation"]), *(point["flags"].get(key) for key in sorted(keys))]) for point in points}
    if len(alike) != 1:
        raise UserError("fid_by_sampler compares runs, evaluated alike, that differ in objective, seed, gamma or width alone; "
                        "choose them by --only")
    paths = {}
    for point in sorted(points, key=lambda point: (pair_order(point["flags"]), point["flags"]["gamma"] != "fixed")):
        paths.setdefault((point["name"], point["flags"]["gamma"]), []).append(point)
    figure, axes = new_figure(len(rows), 2, size=(3.6, 2.7), sharey="col", sharex="row")
    for row, x in zip(axes, rows):
        for ax, (y, law) in zip(row, SAMPLERS.items()):
            for (name, path), members in paths.items():
                draw_path(ax, name, path, members, x, y, by)
            ax.set(xlabel=AXES[x], title=law, **({"xscale": "log", "yscale": "log"} if by == "width" else {"ylim": (0, None)}))
            if by == "width":
                round_ticks(ax.yaxis)
                ax.set_xticks(widths, widths)
                ax.xaxis.set_minor_formatter("")
        row[0].set_ylabel(f"FID ({points[0]['evaluation']['features']['name']})")
    marks = {f"gamma {path}": line_key(marker=marker, color="0.4", linestyle="-" if path == "fixed" else "")
             for path, marker in MARKERS.items() if any(path == other for _, other in paths)}
    bars = seeds_key() if any(point["flags"]["seed"] != points[0]["flags"]["seed"] for point in points) else {}
    legend_below(figure, handles_of(axes) | (marks if by == "init_sd" else {}) | bars)
    save_figure(figure, save)


def point_of(run):
    """The last metrics of a run with those of its evaluation. Raises UserError for a run without one."""
    curves, flags, found = run.finished(), run.config["flags"], run.arrays("eval") if run.has("eval") else {}
    if "fid_mixture" not in found:
        raise UserError(f"{run.name} has no FID by a mixture; evaluate.py --sampler mixture measures it")
    return {"name": pair_name(run.config), "run": run.name, "flags": flags, "width": flags["width"],
            "evaluation": found["config"]["evaluation"], "log_gamma": curves["log_gamma"][-1], "kl": curves["kl"][-1],
            **{key: found[key] for key in SAMPLERS}}


def draw_path(ax, name, path, members, x, y, by):
    """Draw the runs of one objective and path of gamma: a point for those with the same value of the flag `by`."""
    values = sorted({point["flags"][by] for point in members})
    seeds = [[point for point in members if point["flags"][by] == value] for value in values]
    for each in seeds:
        refuse_twins([(point["run"], [point["flags"]["seed"]]) for point in each])
    middle = np.array([[np.mean([point[key] for point in each]) for each in seeds] for key in (x, y)])
    ends = [[end([point[y] for point in each]) for each in seeds] for end in (min, max)]
    style = line_style(members[0]["flags"]) | ({} if path == "fixed" or by == "width" else {"linestyle": ""})
    label = None if name in ax.get_legend_handles_labels()[1] else name
    ax.errorbar(*middle, np.abs(np.array(ends) - middle[1]), marker=MARKERS[path], ms=5, elinewidth=0.8,
                mfc=None if path == "fixed" else "white", label=label, **style)
