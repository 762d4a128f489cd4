"""Figures of image runs: curves against epochs, and what evaluate.py and studies/gradient_snr.py measured."""

import numpy as np

from vsm.figures.axes import label_ticks, limit_robustly, set_scale, whole_ticks
from vsm.figures.groups import band_key, fate_of, grouped, markers_of, named_groups, seeds_of
from vsm.figures.style import (
    handles_of,
    legend_below,
    letter_color,
    line_style,
    new_figure,
    new_panels,
    save_figure,
    seeds_key,
    wrapped,
)
from vsm.tables import mean_and_error

CURVES = {  # metric: axis title, scale
    "negative_elbo": ("negative ELBO (nats)", "linear"),
    "reconstruction": ("reconstruction, $-E_q\\log p(x|z)$ (nats)", "linear"),
    "kl": ("KL(q || prior) (nats)", "linear"),
    "reconstruction_mse": ("reconstruction MSE", "log"),
    "latent_mmd": ("latent MMD$^2$, cubic", "symlog"),
    "posterior_fd": ("posterior FD", "log"),
    "fid": ("FID", "log"),
    "fid_aggregate": ("FID, $z$ from the aggregate posterior", "log"),
    "active_second_moment": ("$E z^2$ of latents in use", "linear"),
    "log_gamma": (r"$\log\,\gamma$", "linear"),
    "active_units": ("active latents", "linear"),
    "infer_loss": ("encoder's training loss", "symlog"),
    "learn_loss": ("decoder's training loss", "symlog"),
    "infer_grad_norm": ("encoder's gradient norm", "log"),
    "learn_grad_norm": ("decoder's gradient norm", "log"),
}
LINEAR = {"latent_mmd": 100, "infer_loss": 100, "learn_loss": 100}  # a symlog axis is linear up to this value


def training_curves(runs, save):
    """Test metrics, training losses and gradient norms against epochs, a line per pair of objectives, a band over seeds.

    Lines show the last three quarters of training. Those that end far beyond most are named in the panel.
    """
    groups = named_groups(grouped(runs))
    names = [name for name in CURVES if any(measured(groups, name))]
    columns = min((4, 5), key=lambda columns: (-len(names) % columns, columns))  # the fewest empty panels
    figure, axes = new_panels(len(names), columns, size=(2.9, 2.3))
    for ax, name in zip(axes.flat, names):
        draw_curves(ax, groups, name, markers_of([groups]))
    legend_below(figure, handles_of(axes) | band_key([groups]))
    save_figure(figure, save)


def trajectories(runs, save):
    """The paper's four test metrics against epochs, a row per data set and network, a band over seeds (Figures 4, 8).

    Lines show the last three quarters of training. Those that end far beyond most are named in the panel.
    """
    panels = grouped(runs)
    names = ("negative_elbo", "reconstruction_mse", "latent_mmd", "posterior_fd")
    figure, axes = rows_of_curves(panels, names, size=(2.9, 2.3))
    for ax in axes.flat:
        ax.set_visible(ax.has_data())  # Bernoulli latents have no posterior FD
    legend_below(figure, handles_of(axes) | band_key(panels.values()))
    save_figure(figure, save)


def fid_curves(runs, save):
    """FID by two laws of z, and E z^2 of the latents in use, against epochs, a band over seeds.

    A row is a data set and a network; where norm, initial standard deviation of p(x|z) or epochs vary, it has one value of each.
    z comes from the prior, or from a Gaussian with the mean and variance of the aggregate posterior. The prior's E z^2 is 1, in
    grey.
    """
    panels = grouped(runs, split=("norm", "init_sd", "gamma", "epochs"))
    if not any(measured(groups, "fid") for groups in panels.values()):
        raise KeyError("fid")
    figure, axes = rows_of_curves(panels, ("fid", "fid_aggregate", "active_second_moment"), size=(3.4, 2.8))
    for ax in axes[:, -1]:
        ax.axhline(1, color="0.8", lw=4, zorder=0, label="the prior's $E z^2$")
        ax.set_ylim(min(0.95, ax.get_ylim()[0]))
    legend_below(figure, handles_of(axes) | band_key(panels.values()))
    save_figure(figure, save)


def rows_of_curves(panels, names, size):
    """A figure and its axes: a row per data set and network, a column per metric."""
    figure, axes = new_figure(len(panels), len(names), size)
    markers = markers_of(panels.values())
    for row, (title, groups) in zip(axes, panels.items()):
        for ax, name in zip(row, names):
            draw_curves(ax, groups, name, markers)
        row[0].set_ylabel("\n".join(wrapped(line, size[1], 11) for line in title.split("\n")), fontweight="bold")
    return figure, axes


def measured(groups, key):
    """The groups, with `epoch` and `key` only at the epochs where `key` was measured; runs without any are left out."""
    def known(arrays):
        keep = np.isfinite(arrays[key])
        return arrays | {"epoch": arrays["epoch"][keep], key: arrays[key][keep]}

    found = [(name, [known(arrays) for arrays in members if key in arrays]) for name, members in groups]
    found = [(name, [arrays for arrays in members if len(arrays[key])]) for name, members in found]
    return [(name, members) for name, members in found if members]


def draw_curves(ax, groups, name, markers):
    """Draw one metric against epochs, in the last three quarters of training."""
    title, scale = CURVES[name]
    if name.startswith("fid"):  # not measured at every evaluation
        groups = measured(groups, name)
        networks = {str(arrays["fid_features"]).rpartition(" ")[0] for _, members in groups for arrays in members
                    if "fid_features" in arrays}
        title = title.replace("FID", f"FID ({', '.join(sorted(networks))})") if networks else title
    lines = draw_lines(ax, groups, "epoch", name, markers)
    ax.set(xlabel="epoch", title=wrapped(title, 2.7, 9))
    whole_ticks(ax.xaxis, 5)
    if name == "active_units":
        ax.set_ylim(0, 1.05 * max([1, *(np.nanmax(values) for values in lines.values())]))
        whole_ticks(ax.yaxis, 5)
    else:
        limit_robustly(ax, lines, scale, LINEAR.get(name, 1))
    set_scale(ax, scale, LINEAR.get(name, 1))


def draw_lines(ax, groups, x, y, markers):
    """Draw the mean of each group's seeds, up to the last epoch of any, in a band of a standard error. Returns {name: means}.

    A line begins after the first quarter of the evaluations, or after the first one, whose values lie far from all others.
    """
    lines = {}
    for name, members in groups:
        members = [arrays for arrays in members if y in arrays]
        if not members:
            continue
        longest = max((arrays[x] for arrays in members), key=len)
        values = np.full((len(members), len(longest)), np.nan)
        for row, arrays in zip(values, members):
            row[:len(arrays[y])] = arrays[y]
        start = min(max(1, len(longest) // 4), len(longest) - 1)
        mean, error, _ = mean_and_error(values[:, start:])
        error = np.nan_to_num(error)  # no band where one seed is left
        style = line_style(members[0]["config"]["flags"])
        ax.plot(longest[start:], mean, marker=markers[name], markersize=4, label=name + fate_of(members), **style)
        if len(members) > 1:
            ax.fill_between(longest[start:], mean - error, mean + error, color=style["color"], alpha=0.2, linewidth=0)
        lines[name] = mean
    return lines


SNR_PANELS = {
    "snr": r"$\|E\,g\|^2$ / tr Var$(g)$, decoder weights",
    "snr_log_gamma": r"the same of $\log\,\gamma$",
    "cosine_to_elbo": "cosine of $E\\,g$ with the negative ELBO's",
}
ESTIMATOR_DASHES = {"plugin": "-", "unbiased": "--", "released": ":"}


def gradient_snr(runs, save):
    """Signal-to-noise ratio of the decoder's gradient against N by learning objective, two rows per group of seeds.

    The first row has the plug-in estimators, the second the others beside the ELBO. Bars go from the smallest to the largest of
    several seeds; for one seed they are one standard error over draws, if stored. Negative estimates have no logarithm and are
    left out.
    """
    groups = named_groups(grouped(runs, "gradient_snr"))
    rows = []
    for group, members in groups:
        names = [str(name) for name in dict.fromkeys(name for arrays in members for name in arrays["objectives"])]
        others = [name for name in names if name.endswith(("unbiased", "released"))]
        rows += [(group, members, shown) for shown in ([name for name in names if name not in others], ["ELBO", *others])]
    figure, axes = new_figure(len(rows), len(SNR_PANELS), size=(3, 2.3))
    for row, (group, members, shown) in zip(axes, rows):
        for ax, (key, title) in zip(row, SNR_PANELS.items()):
            samples = members[0]["samples"]
            for k, name in enumerate(shown):
                draw_snr(ax, members, key, name, (k + 0.5) / len(shown) - 0.5)
            ax.set(xlabel="posterior samples $N$", title=title, yscale="linear" if key == "cosine_to_elbo" else "log")
            ax.set_xticks(range(len(samples)), samples)
            label_ticks(ax)
        row[0].set_ylabel(f"at the model of\n{group}, {seeds_of(members)}")
    several = any(len(members) > 1 for _, members in groups)
    legend_below(figure, handles_of(axes) | (seeds_key() if several else {}))
    save_figure(figure, save)


def draw_snr(ax, members, key, name, shift):
    """Draw the values of the objective `name` at evenly spaced N, moved sideways so that bars do not overlap."""
    letter, estimator = (*name.split(), "plugin")[:2]
    members = [arrays for arrays in members if name in arrays["objectives"]]  # older runs have fewer objectives
    rows = [list(arrays["objectives"]).index(name) for arrays in members]
    values = np.stack([arrays[key][row] for arrays, row in zip(members, rows)])
    mean = values.mean(0)
    if len(members) > 1:
        error = np.stack([mean - values.min(0), values.max(0) - mean])
    else:
        error = members[0].get(f"{key}_se", np.full_like(members[0][key], np.nan))[rows[0]]
    x = np.arange(len(mean)) + 0.5 * shift
    ax.errorbar(x, mean, error, marker=".", capsize=1.5, elinewidth=0.8, lw=1, color=letter_color(letter),
                linestyle=ESTIMATOR_DASHES.get(estimator, "-"), label=name)
