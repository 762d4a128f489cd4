"""The axes of figures: limits that leave out values far from most others, scales and ticks."""

import math

import numpy as np

from vsm.figures.style import wrapped


def limit_robustly(ax, late, scale, linear=1):
    """Set robust limits of y around {name: values}; the panel lists the names of those that end outside."""
    low, high = robust_limits(late, scale, linear)
    ends = {name: values[-1] for name, values in late.items() if len(values) and np.isfinite(values[-1])}
    if len(late) < 3:  # none is far from most others
        low, high = min([low, *ends.values()]), max([high, *ends.values()])
    ax.set_ylim(low, high)
    note_beyond(ax, [name for name, end in ends.items() if not low <= end <= high])


def robust_limits(late, scale, linear=1):
    """Limits of an axis around {name: values} that leave out values far from most others.

    Distances are from the median, on the axis' scale. A value is far if it is beyond 7 median absolute deviations (on a
    logarithmic scale also beyond a factor of 3), and three times as far as the farthest value that is kept.
    """
    forward, back = {"linear": (lambda y: y, lambda y: y),
                     "log": (lambda y: np.log10(np.maximum(y, 1e-300)), lambda y: 10.0**y),
                     "symlog": (lambda y: np.arcsinh(y / linear), lambda y: np.sinh(y) * linear)}[scale]
    pool = [values[np.isfinite(values)] for values in late.values()]
    values = forward(np.concatenate(pool)) if pool else np.empty(0)
    if not len(values):
        return back(np.array([0.0, 1.0]))
    distance = np.abs(values - (middle := np.median(values)))
    floor = {"linear": 1e-3 * abs(middle) + 1e-12, "log": 0.5, "symlog": 1.1}[scale]
    reach = max(7 * np.median(distance), floor)
    for next_distance in np.sort(distance):
        if next_distance > reach:
            if next_distance > 3 * distance[distance <= reach].max():
                break
            reach = next_distance
    near = values[distance <= reach]
    margin = 0.08 * np.ptp(near) or 0.5
    return back(np.array([near.min() - margin, near.max() + 2 * margin]))  # room for a note


def note_beyond(ax, names):
    """Write the names that the limits leave outside into the panel's upper right corner; of long names the labels alone."""
    def note(names):
        text = "beyond: " + ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return wrapped(text, ax.figure.get_figwidth() / ax.get_gridspec().ncols - 0.6, 6.5)

    if names:
        text = note(names) if note(names).count("\n") < 3 else note(list(dict.fromkeys(name.split(",")[0] for name in names)))
        ax.text(0.98, 0.97, text, transform=ax.transAxes, ha="right", va="top", fontsize=6.5, color="0.35", zorder=9,
                bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1})


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
    axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def round_ticks(axis):
    """Tick a logarithmic axis at 1, 2 and 5 times powers of ten, as plain numbers."""
    from matplotlib.ticker import LogLocator, ScalarFormatter
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter("")


def set_scale(ax, scale, linear=1):
    """Scale and tick the y axis by its limits: "symlog" becomes log above `linear`, and linear below ten times that."""
    low, high = ax.get_ylim()
    if scale == "log" and low > 0 or scale == "symlog" and low > linear:
        ax.set_yscale("log")
    elif scale == "symlog" and max(-low, high) > 10 * linear:
        ax.set_yscale("symlog", linthresh=linear)
        first, last = math.log10(linear), math.log10(max(-low, high))
        step = math.ceil((last - first) / 3)
        powers = 10.0 ** np.arange(first + (step if step > 1 else 0), last + 1e-9, step)
        ax.set_yticks([tick for tick in (*-powers[::-1], 0, *powers) if low <= tick <= high])
    label_ticks(ax)
