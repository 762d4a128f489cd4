"""Figures of 2-D runs: learning curves and samples."""

import numpy as np

from vsm.cli import UserError
from vsm.figures.axes import limit_robustly, set_scale, whole_ticks
from vsm.figures.style import color_of, legend_below, line_key, line_style, new_panels, save_figure
from vsm.names import NOT_IDENTITY, letter_of, pair_name, pair_order
from vsm.stored_runs import open_runs, samples_of_member, shown_member

MARKERS = {"step": "D", "released": "X", "unbiased": "v", "N = ": "o", "": "^"}  # by the first of these parts in a pair's name


def marker_of(name):
    return next(marker for part, marker in MARKERS.items() if part in name)


HISTORY = {  # metric: axis title, scale
    "excess_curve": ("NLL above the data law's (nats)", "symlog"),
    "nll_curve": ("NLL (nats)", "linear"),
    "negative_elbo": ("negative ELBO (nats)", "linear"),
    "posterior_fd": ("posterior FD", "log"),
    "log_gamma": (r"$\log\,\gamma$", "linear"),
    "posterior_sd": ("posterior SD, both latents", "linear"),
    "infer_loss": ("encoder's training loss", "symlog"),
    "learn_loss": ("decoder's training loss", "symlog"),
}
AXES = ("data", "learn", "infer", "estimator", "samples", "infer_samples", "inner_steps", "inner_lr", "bilevel_steps",
        "seed", "seeds", *NOT_IDENTITY)  # flags in which the runs of one figure may differ
FEW = ("excess_curve", "nll_curve", "negative_elbo", "log_gamma", "posterior_sd")  # drawn where there are several data sets


def training_curves(runs, save):
    """The quantities that 2-D runs record in training, against decoder updates: members (thin) and their mean (thick, markers).

    One data set has a panel per quantity; several have a row each, of fewer quantities. Runs far beyond most are left outside.
    """
    loaded = sorted((run.arrays() for run in open_runs(runs)), key=lambda arrays: pair_order(arrays["config"]["flags"]))
    refuse_other_settings([arrays["config"]["flags"] for arrays in loaded], ("epochs", "steps_per_epoch"))
    datas = {}
    for arrays in loaded:
        datas.setdefault(arrays["config"]["flags"]["data"], []).append(arrays)
    names = [name for name in (HISTORY if len(datas) == 1 else FEW) if any(name in arrays for arrays in loaded)]
    if "excess_curve" in names:
        names.remove("nll_curve")
    panels = [(data, name) for data in sorted(datas) for name in names]
    figure, axes = new_panels(len(panels), min(4, len(names)), size=(2.9, 2.3))
    for ax, (data, name) in zip(axes.flat, panels):
        draw_history(ax, datas[data], name)
        if len(datas) > 1 and name == names[0]:
            ax.set_ylabel(data, fontweight="bold")
    styles = {curve_name(arrays): line_style(arrays["config"]["flags"]) for arrays in loaded}
    handles = {name: line_key(lw=1.8, marker=marker_of(name), ms=4, **style) for name, style in styles.items()}
    legend_below(figure, handles, columns=4)
    save_figure(figure, save)


def refuse_other_settings(flags, free=()):
    """Raises UserError if the flags of two runs of one data set differ in more than AXES and those of `free`."""
    first = {}
    for mine in flags:
        reference = first.setdefault(mine["data"], mine)
        if differ := sorted(key for key in reference if key not in (*AXES, *free) and mine.get(key) != reference[key]):
            raise UserError(f"the runs of {mine['data']} differ in {', '.join(differ)}; "
                            "draw runs that differ in nothing but the objective, data, N, K, J and seeds")


def curve_name(arrays):
    flags = arrays["config"]["flags"]
    bilevel = f", J = {flags['bilevel_steps']}" if flags["bilevel_steps"] else ""
    return f"{pair_name(arrays['config'])}, K = {flags['inner_steps']}{bilevel}"


def draw_history(ax, loaded, name):
    """Draw one quantity of several runs; the last two thirds of training set the limits."""
    title, scale = HISTORY[name]
    late = {}
    for arrays in loaded:
        if name not in arrays:
            continue
        flags, (first, *_) = arrays["config"]["flags"], arrays[name].shape
        updates = arrays["epoch"] * flags["steps_per_epoch"]
        values = arrays[name].reshape(first, -1)  # [T, S], posterior_sd [T, 2 S]
        ax.plot(updates, values, lw=0.6, alpha=0.4, **line_style(flags))
        if name != "posterior_sd":
            every = max(1, len(updates) // 5)
            ax.plot(updates, np.ma.masked_invalid(values).mean(1), lw=1.8, marker=marker_of(curve_name(arrays)), ms=4,
                    markevery=every, **line_style(flags))
        late.setdefault(curve_name(arrays), []).append(values[len(values) // 3:].ravel())
    if name == "posterior_sd":
        largest = [np.nanmax(part) for parts in late.values() for part in parts if np.isfinite(part).any()]
        ax.set_ylim(0, 1.05 * max([1, *largest]))
    else:
        limit_robustly(ax, {name: np.concatenate(parts) for name, parts in late.items()}, scale, 1)
    set_scale(ax, scale, 0.1 if name == "excess_curve" else 10)
    ax.set(title=title, xlabel="decoder updates", xlim=(0, None))
    whole_ticks(ax.xaxis, 4)


def synthetic_samples(runs, save):
    """Samples of the member with the median NLL (colour) over the test data (grey), one panel per run."""
    loaded = sorted((run.finished() for run in open_runs(runs)),
                    key=lambda arrays: (arrays["config"]["flags"]["data"], pair_order(arrays["config"]["flags"])))
    datas = [arrays["config"]["flags"]["data"] for arrays in loaded]
    counts = {datas.count(data) for data in datas}  # data sets with equally many runs have a row each
    figure, axes = new_panels(len(loaded), min(5, *(counts if len(counts) == 1 else [len(loaded)])), size=(2.3, 2.4))
    for ax, arrays in zip(axes.flat, loaded):
        data, nll, flags = arrays["test_data"], arrays["nll"], arrays["config"]["flags"]
        member = shown_member(nll)
        ax.scatter(*data.T, s=3, c="0.75", lw=0)
        if member is not None:
            ax.scatter(*samples_of_member(arrays, member).T, s=3, color=color_of(flags), alpha=0.4, lw=0)
        result = f"NLL {np.nanmedian(nll):.2f}" if np.isfinite(nll).any() else "diverged"
        steps = f"K = {flags['inner_steps']}, J = {flags['bilevel_steps']}"
        ax.set_title(f"{flags['data']}, {pair_name(arrays['config'])}\n{steps}: {result}", fontsize=8)
        low, high = np.quantile(data, [0.002, 0.998], axis=0)
        margin = 0.3 * (high - low).max()
        ax.set(xlim=(low[0] - margin, high[0] + margin), ylim=(low[1] - margin, high[1] + margin), aspect="equal")
        ax.tick_params(labelsize=7)
    colors = {"test data": "0.75"} | {f"samples, {letter_of(arrays['config']['flags'])}": color_of(arrays["config"]["flags"])
                                      for arrays in loaded}
    legend_below(figure, {name: line_key(color=color, marker="o", ms=4, ls="") for name, color in colors.items()})
    save_figure(figure, save)
