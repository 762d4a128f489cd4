"""Every figure, drawn from `.npz` files alone: python plots.py FIGURE RUN... --save out.png

Scripts call the same functions at their end, so a figure can be redrawn at any time without a model or a GPU.
A figure is a function figure(runs, save): a list of run folders in, a PNG out.
"""

import argparse
import io
import math
from itertools import cycle, product
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from objectives import LEARN
from vsm.cli import UserError, command_line
from vsm.runs import NOT_IDENTITY, group_by_seed, load_arrays, load_config, load_finished, refuse_twins, write_atomic

# One colour per learning objective in every figure.
COLORS = {entry.letter: entry.color for entry in LEARN.values()}

matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 9, "legend.frameon": False})


def line_style(label):
    """Colour and dash of a pair named as in the paper: KLD-F, FD-S, FAE."""
    return {"color": COLORS.get(label.split("-")[-1].split("=")[-1], "tab:gray"), "linestyle": "--" if label.startswith("FD") else "-"}


def new_figure(rows=1, columns=1, size=(3.2, 2.6), **options):
    """A figure on its own Agg canvas (no display, no global state) and its axes [rows, columns]."""
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure, save):
    """Raises UserError where the file cannot be written."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=Path(save).suffix[1:])
    write_atomic(Path(save), picture.getvalue())


def label_ticks(ax):
    """A logarithmic y axis with fewer than two powers of ten in its limits is ticked as a linear one."""
    low, high = ax.get_ylim()
    if sum(low <= tick <= high for tick in ax.get_yticks()) < 2:
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_formatter(ScalarFormatter())


# ------------------------------------------------------------------------------------------------------------ image runs

CURVES = {  # metric: axis label, scale
    "negative_elbo": ("negative ELBO (nats)", "symlog"),
    "reconstruction_mse": ("reconstruction MSE", "log"),
    "latent_mmd": ("latent MMD$^2$, cubic", "symlog"),
    "posterior_fd": ("posterior FD", "log"),
    "log_gamma": (r"$\log\,\gamma$", "linear"),
    "active_units": ("active latents", "linear"),
    "learn_loss": ("decoder's training loss", "symlog"),
    "learn_grad_norm": ("its gradient norm", "log"),
}


LINEAR = {"negative_elbo": 1000, "negative_iw_bound": 1000, "latent_mmd": 100, "learn_loss": 100}  # up to here a symlog axis is linear


def training_curves(runs, save):
    """Test metrics and the decoder's training loss against epochs, one line per pair of objectives, a band over seeds."""
    panels = grouped(runs)
    groups = [(f"{title}, {name}" if len(panels) > 1 else name, members)
              for title, groups in panels.items() for name, members in groups]
    names = [name for name in CURVES if any(name in members[0] for _, members in groups)]
    figure, axes = new_figure(-(-len(names) // 4), 4, size=(2.9, 2.3))
    for ax, name in zip(axes.flat, names):
        draw_curves(ax, groups, name)
    for ax in axes.flat[len(names):]:
        ax.set_axis_off()
    legend(figure, axes)
    save_figure(figure, save)


def trajectories(runs, save):
    """The paper's four test metrics against epochs, a row per data set and network, a band over seeds (Figures 4, 8)."""
    names = ("negative_elbo", "reconstruction_mse", "latent_mmd", "posterior_fd")
    panels = grouped(runs)
    figure, axes = new_figure(len(panels), 4, size=(2.9, 2.3))
    for row, (title, groups) in zip(axes, panels.items()):
        for ax, name in zip(row, names):
            draw_curves(ax, groups, name)
            ax.set_visible(ax.has_data())  # Bernoulli latents have no posterior FD
        row[0].set_ylabel(title, fontweight="bold")
    legend(figure, axes)
    save_figure(figure, save)


def draw_curves(ax, groups, name):
    """A test metric against epochs; the ELBO from the first trained epoch on."""
    title, scale = CURVES[name]
    draw_lines(ax, groups, "epoch", name, start=1 if name == "negative_elbo" else 0)
    ax.set(xlabel="epoch", title=title)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if scale == "symlog":
        linear_around_zero(ax, LINEAR[name])
    else:
        ax.set_yscale(scale)
    ax.yaxis.set_minor_formatter(NullFormatter())
    label_ticks(ax)


def linear_around_zero(ax, linear):
    """A symlog axis with few ticks where the data go beyond ten times `linear`, else a linear one."""
    ax.set_yscale("symlog", linthresh=linear)
    ax.autoscale(axis="y")  # by the margins of this scale
    low, high = ax.get_ylim()
    first, last = math.log10(linear), math.log10(max(-low, high))
    if last <= first + 1:
        ax.set_yscale("linear")
        return
    step = math.ceil((last - first) / 3)
    powers = 10.0 ** np.arange(first + (step if step > 1 else 0), last + 1e-9, step)
    ax.set_yticks([tick for tick in (*-powers[::-1], 0, *powers) if low <= tick <= high])


def grouped(runs, file="metrics.npz"):
    """{data set and network: [(name, the arrays of runs that differ in their seed alone)]}"""
    loaded, panels = [load_arrays(Path(run) / file) for run in runs], {}
    for name, members in group_by_seed(runs, [arrays["config"] for arrays in loaded]):
        flags = loaded[members[0]]["config"]["flags"]
        panels.setdefault(f"{flags['data']}, {flags['net']}", []).append((name, [loaded[i] for i in members]))
    return panels


def draw_lines(ax, groups, x, y, start=0):
    """A line per group, the mean over its seeds (as far as any got), in a band of one standard error to either side."""
    labels = [members[0]["config"]["label"] for _, members in groups]
    for k, (name, members) in enumerate(groups):
        if y not in members[0]:
            continue
        longest = max((arrays[x] for arrays in members), key=len)
        values = np.full((len(members), len(longest)), np.nan)
        for row, arrays in zip(values, members):
            row[:len(arrays[y])] = arrays[y]
        values, longest = np.ma.masked_invalid(values[:, start:]), longest[start:]
        style, marker = line_style(labels[k]), ".xsv^"[labels[:k].count(labels[k]) % 5]
        ax.plot(longest, values.mean(0), marker=marker, markersize=4, label=f"{name}, {seeds_of(members)}", **style)
        if len(members) > 1:
            error = values.std(0, ddof=1) / np.sqrt(values.count(0))
            ax.fill_between(longest, values.mean(0) - error, values.mean(0) + error, color=style["color"], alpha=0.2, linewidth=0)


def seeds_of(members):
    """"seed 0", or "3 seeds", and how many diverged."""
    statuses = [str(arrays.get("status", "unfinished")) for arrays in members]
    if len(members) == 1:
        return f"seed {members[0]['config']['flags']['seed']}" + "".join(f" ({status})" for status in statuses if status != "ok")
    diverged = sum(status.startswith("diverged") for status in statuses)
    return f"{len(members)} seeds" + (f" ({diverged} diverged)" if diverged else "")


def legend(figure, axes, columns=5):
    """One legend below all axes, each name once; the figure grows by its height."""
    named = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    fit = figure.get_size_inches()[0] / (0.08 * max(map(len, named), default=1) + 0.5)  # inches of a letter, of a handle
    columns = max(1, min(len(named), columns, int(fit)))
    figure.set_figheight(figure.get_figheight() + 0.18 * -(-len(named) // columns))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns)


def samples(runs, save):
    """Images decoded from the prior, one grid per run."""
    grids(runs, save, lambda arrays: tile(arrays["samples"], 8))


def reconstructions(runs, save):
    """Noisy test inputs (rows one and three, ...) above their reconstructions, one grid per run."""
    def pairs(arrays):
        rows = [tile(arrays[name][i:i + 8], 8) for i in range(0, 32, 8) for name in ("inputs", "reconstructions")]
        return np.concatenate(rows)

    grids(runs, save, pairs)


def grids(runs, save, make):
    panels = grouped(runs)
    named = [((f"{panel}\n" if len(panels) > 1 else "") + f"{name}, {seeds_of([arrays])}", arrays)
             for panel, groups in panels.items() for name, members in groups for arrays in members]
    rows = -(-len(named) // 4)
    figure, axes = new_figure(rows, -(-len(named) // rows), size=(3.2, 3.4))
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, (title, arrays) in zip(axes.flat, named):
        ax.imshow(make(arrays), vmin=0, vmax=255, cmap="gray", interpolation="nearest")
        ax.set_title(title)
    save_figure(figure, save)


def tile(images, columns):
    """uint8 [n, C, H, W] to one picture [rows H, columns W(, 3)]; rows that are not full stay black."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    page = np.zeros((rows * columns, channels, height, width), np.uint8)
    page[:n] = images
    page = page.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    return page.reshape(rows * height, columns * width, channels).squeeze(-1 if channels == 1 else ())


def posterior_sd(runs, save):
    """Histogram over the latent dimensions of the posterior's standard deviation, averaged over the test images (Figures 9, 10)."""
    def draw(ax, arrays, **style):
        ax.hist(np.clip(arrays["posterior_sd"][-1], 0, 1.2), bins=np.linspace(0, 1.2, 41), histtype="stepfilled", alpha=0.5, **style)

    histograms(runs, save, draw, "posterior SD (clipped at 1.2)", "latent dimensions")


def posterior_mean(runs, save):
    """Histograms of the posterior's mean of Bernoulli latents, 1/2 where a latent says nothing of an image (Figure 11).

    Filled: over images and latents. Line: over latents, each averaged over the images, where a latent in use may be at 1/2 as well.
    """
    def draw(ax, arrays, **style):
        share, averaged = arrays["posterior_mean_histogram"][-1], arrays["posterior_mean"][-1]
        edges = np.linspace(0, 1, len(share) + 1)
        ax.stairs(share, edges, fill=True, alpha=0.4, label="each image and latent", **style)
        ax.stairs(np.histogram(averaged, edges)[0] / len(averaged), edges, linestyle=":", label="each latent, mean over images", **style)

    histograms(runs, save, draw, "posterior mean", "share")


def histograms(runs, save, draw, xlabel, ylabel):
    """A panel per group, its seeds on top of each other."""
    panels = grouped(runs)
    figure, axes = new_figure(len(panels), max(map(len, panels.values())), size=(2.4, 2.2), sharex=True, sharey="row")
    for row, (title, groups) in zip(axes, panels.items()):
        for ax, (name, members) in zip(row, groups):
            for arrays in members:
                draw(ax, arrays, color=line_style(arrays["config"]["label"])["color"])
            ax.set_title(f"{name}, {seeds_of(members)}")
            ax.set_xlabel(xlabel)
        row[0].set_ylabel(f"{title}\n{ylabel}" if len(panels) > 1 else ylabel)
        for ax in row[len(groups):]:
            ax.set_axis_off()
    if axes[0, 0].get_legend_handles_labels()[0]:
        legend(figure, axes, columns=1)
    save_figure(figure, save)


def importance_bound(runs, save):
    """The importance-weighted bound on the negative log-likelihood against its number of samples from q(z|x)."""
    figure, axes = curves(runs, "iw_samples", "negative_iw_bound", xlabel="samples $K$", ylabel="negative bound (nats)", xscale="log")
    for ax in axes.flat:
        linear_around_zero(ax, LINEAR["negative_iw_bound"])
        label_ticks(ax)
    legend(figure, axes)
    save_figure(figure, save)


def denoising(runs, save):
    """Error of the reconstruction of a noisy image against the clean one, by the noise's standard deviation."""
    figure, axes = curves(runs, "noise_levels", "denoising_mse", xlabel="noise SD", ylabel="MSE to the clean image")
    for ax in axes.flat:
        sd = np.linspace(*ax.get_xlim(), 200)
        ax.plot(sd, sd**2, ":", color="gray", label="noisy image itself", scaley=False)
    legend(figure, axes)
    save_figure(figure, save)


def curves(runs, x, y, **options):
    """A figure with a panel per data set and network: the curve `y` of eval.npz against `x`."""
    panels = grouped(runs, "eval.npz")
    figure, axes = new_figure(1, len(panels), size=(4.4, 2.6))
    for ax, (title, groups) in zip(axes.flat, panels.items()):
        draw_lines(ax, groups, x, y)
        ax.set(title=title, **options)
    return figure, axes


SNR_PANELS = {
    "snr": r"$\|E\,g\|^2$ / tr Var$(g)$, decoder weights",
    "snr_log_gamma": r"the same of $\log\,\gamma$",
    "cosine_to_elbo": "cosine of $E\\,g$ with the negative ELBO's",
}
ESTIMATOR_DASHES = {"plugin": "-", "unbiased": "--", "released": ":"}


def gradient_snr(runs, save):
    """Signal-to-noise ratio of the decoder's gradient by learning objective and estimator against N, a row per trained model."""
    loaded = [load_arrays(Path(run) / "gradient_snr.npz") for run in runs]
    figure, axes = new_figure(len(runs), len(SNR_PANELS), size=(3, 2.6))
    for row, arrays in zip(axes, loaded):
        for ax, (key, title) in zip(row, SNR_PANELS.items()):
            for name, values in zip(arrays["objectives"], arrays[key]):
                objective, estimator = (*str(name).split(), "plugin")[:2]
                ax.plot(arrays["samples"], values, marker=".", color=COLORS[objective], linestyle=ESTIMATOR_DASHES[estimator],
                        label=str(name))
            ax.set(xlabel="posterior samples $N$", title=title, xscale="log", xticks=arrays["samples"], xticklabels=arrays["samples"],
                   yscale="linear" if key == "cosine_to_elbo" else "log")
            ax.set_xticks([], minor=True)
        row[0].set_ylabel(f"at the model of\n{arrays['config']['label']}, {seeds_of([arrays])}")
    legend(figure, axes)
    save_figure(figure, save)


def draw_run(run):
    """The PNGs of one finished image run, those that are not there yet. A diverged run has but its curves to show."""
    arrays = load_finished(run)
    pictures = ("samples", "reconstructions", "posterior_sd", "posterior_mean") if str(arrays["status"]) == "ok" else ()
    for name in ("training_curves", *pictures):
        save = Path(run) / f"{name}.png"
        if not save.exists() and (name == "training_curves" or name in arrays):
            FIGURES[name]([run], save)


# -------------------------------------------------------------------------------------------------------------- 2-D runs


SWEEP_AXES = ("data", "learn", "infer", "estimator", "samples", "inner_steps", "inner_lr", "bilevel_steps", "seed", "seeds", *NOT_IDENTITY)


def synthetic_samples(runs, save):
    """Samples of the member with the median NLL of every run (colour) over the test data (grey), one panel per run."""
    loaded = list(map(load_finished, runs))
    columns = min(len(runs), 5)
    figure, axes = new_figure(-(-len(runs) // columns), columns, size=(2.3, 2.7))
    for ax in axes.flat[len(runs):]:
        ax.set_axis_off()
    for ax, arrays in zip(axes.flat, loaded):
        data, nll, flags = arrays["test_data"], arrays["nll"], arrays["config"]["flags"]
        alive = np.isfinite(nll).sum()
        ax.scatter(*data.T, s=3, c="0.75", lw=0)
        if alive:
            member = np.argsort(nll)[(alive - 1) // 2]
            color = COLORS[objective_of(objective_name(arrays))]
            ax.scatter(*arrays["model_samples"][member].T, s=3, color=color, alpha=0.4, lw=0)
        result = f"NLL {np.nanmedian(nll):.2f}" if alive else "diverged"
        ax.set_title(f"{objective_name(arrays)}\nK = {flags['inner_steps']}, J = {flags['bilevel_steps']}: {result}", fontsize=8)
        low, high = np.quantile(data, [0.002, 0.998], axis=0)
        margin = 0.3 * (high - low).max()
        ax.set(xlim=(low[0] - margin, high[0] + margin), ylim=(low[1] - margin, high[1] + margin), aspect="equal")
        ax.tick_params(labelsize=7)
    save_figure(figure, save)


def objective_name(arrays):
    """The pair as the paper names it, and what the paper does not vary: KLD-B released, N = 5."""
    flags = arrays["config"]["flags"]
    return (arrays["config"]["label"] + (f" {flags['estimator']}" if flags["estimator"] != "plugin" else "")
            + (f", N = {flags['samples']}" if flags["samples"] > 1 else ""))


def synthetic(runs, save):
    """NLL and Fisher divergence against K, a line per objective, two rows per data set with a panel per J (or, for one J, a column; Figures 3, 6, 7).

    Mean +- s.e. over the members that did not diverge; the legend counts the others. NLL is shown above the data's entropy; where that, or
    the data's score, is not known, NLL and score-matching loss are shown above the lowest mean. Linear near zero, logarithmic beyond.
    Filled: KLD inference, open: FD inference. Circles: several posterior samples, triangles, dash-dotted: one; crosses, dashed: the released
    estimator; diamonds: another encoder step. Runs at the same point of the sweep are pooled. Beside the PNG a
    Markdown file has every number. Raises UserError for runs that differ elsewhere.
    """
    points = sweep_points(runs)
    datas, steps, inner = (sorted({point[key] for point in points}) for key in ("data", "J", "K"))
    names = sorted({point["name"] for point in points}, key=lambda name: (list(COLORS).index(objective_of(name)), name))
    if len(steps) > 1:
        figure, axes = new_figure(2 * len(datas), len(steps), size=(3.2, 2.2), sharex=True, sharey="row")
        rows = axes
    else:
        figure, axes = new_figure(2, len(datas), size=(max(2.5, 6.4 / len(datas)), 2.4), sharex=True)
        rows = axes.T.reshape(-1, 1)
    for row, (data, metric) in zip(rows, product(datas, ("nll", "divergence"))):
        here = [point for point in points if point["data"] == data]
        least, width, title = vertical_axis(here, metric)
        lowest, highest = (bound([0, *(point[metric][0] - least for point in here)]) for bound in (np.nanmin, np.nanmax))
        ticks = [10.0**k for k in range(math.ceil(math.log10(width)), 12) if 10.0**k < 2 * highest]
        for ax, J in zip(row, steps):
            for i, name in enumerate(names):
                line = sorted((point["K"], *point[metric][:2]) for point in here if (point["J"], point["name"]) == (J, name))
                if line:
                    K, mean, error = np.array(line).T
                    ax.errorbar(K * 1.02 ** (i - len(names) / 2), mean - least, error, capsize=2, **sweep_style(name))
            if metric == "nll":
                ax.set_title(f"{data}, J = {J}")
            ax.axhline(0, color="0.8", lw=0.8, zorder=0)
            ax.set_yscale("asinh", linear_width=width)
            ax.set(xscale="log", xticks=inner, xticklabels=inner, yticks=[0, *ticks], yticklabels=["0", *(f"{tick:g}" for tick in ticks)])
            ax.set_ylim(min(-0.5 * width, 1.2 * lowest), 2 * highest)
            ax.minorticks_off()
        row[0].set_ylabel(title)
    figure.supxlabel("encoder updates per decoder update, K", fontsize=10)
    for name in names:
        ended = np.concatenate([point["diverged"] for point in points if point["name"] == name])
        axes[0, 0].plot([], [], **sweep_style(name), label=f"{name} ({ended.sum()} of {len(ended)} diverged)" if ended.any() else name)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=max(3, axes.shape[1]), fontsize=7)
    save_figure(figure, save)
    write_atomic(Path(save).with_suffix(".md"), f"{sweep_table(points, names, inner)}\n".encode())


def vertical_axis(points, metric):
    """Of one data set: what counts as zero, the width of the linear part around it, and the axis' title."""
    means = [point[metric][0] for point in points if np.isfinite(point[metric][0])] or [0.0]
    if metric == "nll":
        known = points[0]["entropy"] is not None
        least, title = float(points[0]["entropy"]) if known else min(means), f"NLL above the {'entropy' if known else 'lowest'}\n(nats)"
    else:
        known = points[0]["divergence_name"] == "Fisher divergence"
        least, title = (0, "Fisher divergence") if known else (min(means), "score-matching loss\nabove the lowest")
    return least, max(1e-3, 0.3 * (np.median(means) - least)), title


def sweep_table(points, names, inner):
    """The numbers behind `synthetic`, two Markdown tables: a row per data set, J and objective, a column per K."""
    legend = ("Mean ± standard error / median over the members that did not diverge; d: members that diverged, c: members whose posterior "
              "collapsed (sd above 0.9 at the end in both latents), h: half collapsed (in one of the two). The data's entropy is the least NLL.")
    tables = [legend]
    for metric in ("nll", "divergence"):
        title = "NLL (nats)" if metric == "nll" else "Fisher divergence, or score-matching loss where the data's score is not known"
        tables.append(f"{title}\n\n| data | J | objective | " + " | ".join(f"K = {K}" for K in inner) + " |\n|" + "---|" * (3 + len(inner)))
        found = {(point["data"], point["J"], point["name"], point["K"]): point for point in points}
        for data, J, name in sorted({key[:3] for key in found}, key=lambda key: (*key[:2], names.index(key[2]))):
            cells = [sweep_cell(found.get((data, J, name, K)), metric) for K in inner]
            tables[-1] += f"\n| {data} | {J} | {name} | " + " | ".join(cells) + " |"
    return "\n\n".join(tables)


def sweep_cell(point, metric):
    if point is None:
        return ""
    mean, error, median = point[metric]
    ends = [f"{sum(point[fate])} {fate[0]}" for fate in ("diverged", "collapsed", "half_collapsed") if any(point[fate])]
    return f"{mean:.4g} ± {error:.2g} / {median:.4g}" + (f" ({', '.join(ends)})" if ends else "")


def sweep_points(runs):
    """One dict per data, J, name and K, with (mean, standard error, median) of each metric over the members of all runs there."""
    loaded = list(map(load_finished, runs))
    fixed = [{key: value for key, value in arrays["config"]["flags"].items() if key not in SWEEP_AXES} for arrays in loaded]
    differ = sorted(key for key in fixed[0] if any(flags.get(key) != fixed[0][key] for flags in fixed))
    if differ:
        raise UserError(f"the runs differ in {', '.join(differ)}; draw runs that differ in nothing but the objective, data, K, J and seeds")
    groups = {}
    for run, arrays in zip(runs, loaded):
        flags = arrays["config"]["flags"]
        group = groups.setdefault((flags["data"], flags["bilevel_steps"], objective_name(arrays), flags["inner_steps"]), [])
        group.append((run, range(flags["seed"], flags["seed"] + flags["seeds"]), arrays))
    points = []
    for (data, J, name, K), members in groups.items():
        refuse_twins([(run, seeds) for run, seeds, _ in members])
        group = [arrays for *_, arrays in members]
        unused = np.concatenate([arrays["posterior_sd"][-1] > 0.9 for arrays in group])  # [members, 2]
        divergence = "fisher_divergence" if "fisher_divergence" in group[0] else "sm_loss"
        points.append({"data": data, "J": J, "name": name, "K": K, "entropy": group[0].get("data_entropy"),
                       "diverged": np.concatenate([arrays["diverged_at"] >= 0 for arrays in group]),
                       "collapsed": unused.all(-1), "half_collapsed": unused.any(-1) & ~unused.all(-1),
                       "nll": mean_and_error(np.concatenate([arrays["nll"] for arrays in group])),
                       "divergence": mean_and_error(np.concatenate([arrays[divergence] for arrays in group])),
                       "divergence_name": {"fisher_divergence": "Fisher divergence", "sm_loss": "score-matching loss"}[divergence]})
    return points


def mean_and_error(values):
    """Mean, standard error and median of the finite values; NaN where there are none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return np.nan, 0, np.nan
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0, np.median(values)


def objective_of(name):
    return name.replace(",", " ").split()[0].split("-")[-1]


SWEEP_STYLES = {  # marker and line by what a name holds, the first that fits; the last is one posterior sample
    "step": ("D", "-"), "released": ("X", "--"), "unbiased": ("v", ":"), "N = ": ("o", "-"), "": ("^", "-.")}


def sweep_style(name):
    marker, dash = next(style for part, style in SWEEP_STYLES.items() if part in name)
    return {"color": COLORS[objective_of(name)], "linestyle": dash, "marker": marker,
            "markerfacecolor": "white" if name.startswith("FD-") else None, "ms": 5, "lw": 1.2}


# --------------------------------------------------------------------------------------------- parameter recovery (Figure 1)


def param_recovery(runs, save):
    """Figure 1: recovered w against w*, several alpha; p and q at the minima of JKLD and JFD, ellipses at 1, 2 and 3 sd."""
    arrays = load_arrays(Path(runs[0]) / "metrics.npz")
    flags, rule = arrays["config"]["flags"], list(arrays["rule"])
    figure, axes = new_figure(1, 3, size=(3.2, 2.9))
    left, *joints = axes[0]
    w_star, jkld, jfd = arrays["w_star"], arrays["w"][rule.index("JKLD")], arrays["w"][rule.index("JFD")]
    left.plot(w_star, jkld.T, color=COLORS["ELBO"], lw=3, alpha=0.35, label=["JKLD, every $\\alpha$"] + [None] * (len(jkld) - 1))
    for alpha, w, dash in zip(arrays["alpha"], jfd, cycle(("-", ":", "--", "-."))):
        left.plot(w_star, w, color=COLORS["FAE"], linestyle=dash, label=rf"JFD, $\alpha = {alpha:g}$")
    if "sampled_w" in arrays:
        sampled = arrays["sampled_w"][[rule.index("JKLD"), rule.index("JFD")]].reshape(-1, len(arrays["checked_w_star"]))
        left.plot(arrays["checked_w_star"], sampled.T, "o", color="tab:blue", ms=3.5, mfc="white",
                  label=["from samples"] + [None] * (len(sampled) - 1))
    left.set(xlabel="true $w^*$", ylabel="recovered $w$", title=rf"recovery, $\gamma = {flags['gamma']:g}$")
    left.legend(loc="upper left", fontsize=8)
    for ax, name, w, phi, kld, fd in zip(joints, ("JKLD", "JFD"), *(arrays[f"example_{key}"] for key in ("w", "phi", "jkld", "jfd"))):
        gamma, v = flags["gamma"], flags["gamma"] + flags["w_star"] ** 2
        p = np.array([[gamma + w**2, w], [w, 1]])
        q = np.array([[v, phi * v], [phi * v, phi**2 * v + flags["alpha"] * gamma / (gamma + w**2)]])
        ellipses(ax, p, color="0.3", label="$p_w(x, z)$")
        ellipses(ax, q, color="tab:purple", linestyle="--", label=r"$q_\phi(x, z)$")
        ax.set(xlabel="$x$", ylabel="$z$", title=f"minimum of {name}: $w = {w:.3f}$\n(JKLD {kld:.2f}, JFD {fd:.2f})")
    joints[0].legend(loc="upper left")
    joints[0].text(0.98, 0.02, rf"$w^* = {flags['w_star']:g}$, $\alpha = {flags['alpha']:g}$", transform=joints[0].transAxes, ha="right")
    joints[1].sharex(joints[0])
    joints[1].sharey(joints[0])
    save_figure(figure, save)


def ellipses(ax, covariance, label, **style):
    """A zero-mean Gaussian's contours at 1, 2 and 3 sd."""
    angle = np.linspace(0, 2 * np.pi, 200)
    x, z = np.linalg.cholesky(covariance) @ (np.cos(angle), np.sin(angle))
    for sd in (1, 2, 3):
        ax.plot(sd * x, sd * z, lw=1.2, label=label if sd == 1 else None, **style)


def recovery_rules(runs, save):
    """Recovered w against alpha at one w*, for every learning objective: q held fixed, and q following w."""
    arrays = load_arrays(Path(runs[0]) / "metrics.npz")
    rule, w_star = list(arrays["rule"]), arrays["config"]["flags"]["w_star"]
    figure, axes = new_figure(1, 2, size=(3.6, 2.9), sharey=True)
    panels = {"held": "$q$ held fixed while $w$ moves (Algorithm 1)", "following": "$q$ follows $w$ (bi-level)"}
    for ax, (how, title) in zip(axes[0], panels.items()):
        ax.axhline(w_star, color="0.8", lw=4)
        for name in ("ELBO", "F", "S", "B", "FAE"):
            key = "JFD" if name == "FAE" else "JKLD" if f"{how} {name}" not in rule else f"{how} {name}"
            same = (how, name) in (("held", "F"), ("following", "B"))  # the same curve as ELBO's, so dashed over it
            ax.plot(arrays["sweep_alpha"], arrays["sweep_w"][rule.index(key)], color=COLORS[name], lw=1.6,
                    linestyle="--" if same else "-", label=name)
        ax.set_xscale("log", base=2)
        ax.set(xlabel=r"$\alpha$: variance of $q$ / exact", title=title, ylim=(-0.1, 3 * w_star))
    axes[0, 0].set_ylabel("recovered $w$")
    axes[0, 0].text(arrays["sweep_alpha"][-1], w_star, "$w^*$", va="bottom", ha="right", color="0.5")
    axes[0, 1].legend()
    save_figure(figure, save)


# ---------------------------------------------------------------------------------------- toy posteriors (Figures 2 and 5)

OBJECTIVE_TITLES = {"fd-repar": "FD, repar", "fd": "FD, no repar", "kld": "KLD, repar"}
OPTIMISER_TITLES = {"sgd": "SGD", "adam": "Adam"}
GOOD, CAUGHT, LOST = ("#3b6fb6", "#8fc1e3"), "tab:orange", "0.6"  # ends at a best fit (by sign), in low density, nowhere


def posterior_panels(arrays, size=(2.2, 2.2)):
    """A row per likelihood and optimiser, a column per objective, all over the exact posterior: the figure, and its axes by (l, i, p)."""
    likelihoods, objectives = arrays["config"]["flags"]["likelihoods"], list(OBJECTIVE_TITLES.values())
    rows = list(product(enumerate(likelihoods), enumerate(OPTIMISER_TITLES.values())))
    figure, axes = new_figure(len(rows), len(objectives), size=size, sharex=True, sharey=True)
    panels = {}
    for row, ((l, likelihood), (p, optimiser)) in zip(axes, rows):
        row[0].set_ylabel(f"{likelihood}, {optimiser}\n$z_2$")
        for i, ax in enumerate(row):
            panels[l, i, p] = ax
    for ax, title in zip(axes[0], objectives):
        ax.set_title(f"{title}\n", fontsize=10)  # the second line is for note_counts
    for ax in axes[-1]:
        ax.set_xlabel("$z_1$")
    return figure, panels


def filled_contours(ax, arrays, l):
    """The exact posterior's log density, down to 8 nats below its mode."""
    log_posterior = arrays["log_posterior"][l].astype(float)
    levels = log_posterior.max() - np.array([8, 6, 4.5, 3.2, 2, 1, 0.4, 0])
    ax.contourf(arrays["axis"], arrays["axis"], log_posterior.T, levels, cmap="Greys", vmin=levels[0], vmax=levels[-1] + 8)


def toy_trajectories(runs, save):
    """Figure 2: the way of q's location from every start over the exact posterior, coloured by the direction of the start.

    Black dots are ends; an orange cross is an end in low density, and orange rings are the starts that it caught. Of a dense grid
    of starts every m-th is drawn, at most 10 by 10; the counts are of all.
    """
    arrays = load_arrays(Path(runs[0]) / "metrics.npz")
    extent, side = 1.12 * arrays["config"]["flags"]["extent"], arrays["config"]["flags"]["grid"]
    every = -(-side // 10)
    some = slice((side - 1) % every // 2, None, every)
    drawn = np.arange(side**2).reshape(side, side)[some, some].ravel()
    starts, trajectory = arrays["starts"][:, drawn], arrays["trajectory"][:, 0][..., drawn].astype(float)  # [2, K], [F, 2, L, I, P, K]
    hue = np.arctan2(starts[1], starts[0]) / (2 * np.pi) % 1
    colors = hsv_to_rgb(np.stack((hue, np.full_like(hue, 0.8), np.full_like(hue, 0.75)), -1))
    figure, panels = posterior_panels(arrays)
    for (l, i, p), ax in panels.items():
        filled_contours(ax, arrays, l)
        way, caught, diverged = trajectory[:, :, l, i, p], arrays["caught"][l, i, p, drawn], arrays["diverged"][l, i, p, drawn]
        for k, color in enumerate(colors):
            ax.plot(*way[:, :, k].T, color=color, lw=0.8, alpha=0.9)
        ax.scatter(*starts, c=colors, s=6, zorder=3)
        ax.scatter(*starts[:, caught], s=22, facecolors="none", edgecolors=CAUGHT, linewidths=1.4, zorder=4)
        ends = arrays["location"][:, l, i, p, drawn]
        ax.scatter(*ends[:, ~caught & ~diverged], c="black", s=9, zorder=5)
        ax.scatter(*ends[:, caught], c=CAUGHT, marker="X", s=45, edgecolors="black", linewidths=0.5, zorder=6)
        ax.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
        note_counts(ax, arrays["caught"][l, i, p], arrays["diverged"][l, i, p])
    save_figure(figure, save)


def note_counts(ax, caught, diverged):
    counts = [f"{caught.sum()} of {len(caught)} caught"] * bool(caught.any()) + [f"{diverged.sum()} diverged"] * bool(diverged.any())
    ax.set_title(", ".join(counts), loc="left", fontsize=7.5)


def toy_basins(runs, save):
    """Which start ends where: one cell per start, coloured by its end, over contours of the exact posterior."""
    arrays = load_arrays(Path(runs[0]) / "metrics.npz")
    flags = arrays["config"]["flags"]
    side, extent = flags["grid"], flags["extent"]
    half = extent / max(side - 1, 1)  # of a cell
    cmap = ListedColormap([*GOOD, CAUGHT, LOST])
    figure, panels = posterior_panels(arrays)
    for (l, i, p), ax in panels.items():
        caught, diverged = arrays["caught"][l, i, p], arrays["diverged"][l, i, p]
        negative = arrays["location"][:, l, i, p].sum(0) < 0
        kind = np.where(diverged, 3, np.where(caught, 2, negative)).reshape(side, side)
        ax.imshow(kind.T, origin="lower", extent=2 * (-extent - half, extent + half), cmap=cmap, vmin=-0.5, vmax=3.5,
                  interpolation="nearest")
        log_posterior = arrays["log_posterior"][l].astype(float)
        ax.contour(arrays["axis"], arrays["axis"], log_posterior.T, log_posterior.max() - np.array([6, 3, 1]), colors="white",
                   linewidths=0.8, linestyles="solid")
        ax.set(xlim=(-extent - half, extent + half), ylim=(-extent - half, extent + half))
        note_counts(ax, caught, diverged)
    names = "ends where $z_1 + z_2 > 0$", "where $z_1 + z_2 < 0$", "caught in low density", "diverged"
    figure.legend([Patch(color=color) for color in cmap.colors], names, loc="outside lower center", ncols=4)
    save_figure(figure, save)


def toy_mixtures(runs, save):
    """Figure 5: every fitted mixture (lines, with its components' means) over the exact posterior; right, the mass of z1 + z2 > 0."""
    arrays = load_arrays(Path(runs[0]) / "metrics.npz")
    likelihoods, repeats = arrays["config"]["flags"]["likelihoods"], arrays["kl"].shape[1]
    columns = min(repeats, 5)
    rows = -(-repeats // columns)
    figure, axes = new_figure(rows * len(likelihoods), columns, size=(1.9, 1.95), sharex=True, sharey=True)
    for ax in axes.flat:
        ax.set_axis_off()
    for l, likelihood in enumerate(likelihoods):
        for r, ax in zip(range(repeats), axes[l * rows:(l + 1) * rows].flat):
            ax.set_axis_on()
            filled_contours(ax, arrays, l)
            ax.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), aspect="equal")
            if not np.isfinite(arrays["kl"][l, r]):
                ax.set_title("diverged, or off the grid")
                continue
            log_q = arrays["log_q"][l, r].astype(float)
            ax.contour(arrays["axis"], arrays["axis"], log_q.T, log_q.max() - np.array([4.5, 2, 0.4]), colors="tab:blue", linewidths=1,
                       linestyles="solid")
            ax.scatter(*arrays["mean"][:, l, r], s=120 * arrays["weight"][l, r], c="tab:red", alpha=0.6, linewidths=0, zorder=3)
            ax.set_title(f"KL {arrays['kl'][l, r]:.2f}, right {100 * arrays['right_mass'][l, r]:.0f} %")
        axes[l * rows, 0].set_ylabel(f"{likelihood}\nexact: right {100 * arrays['exact_right_mass'][l]:.0f} %\n$z_2$")
    for ax in axes[-1]:
        ax.set_xlabel("$z_1$")
    save_figure(figure, save)


def toy_gradients(runs, save):
    """A.5.1: descent by KLD, FD and FD with z held fixed between two Gaussians; right, the FD gradients as multiples of KLD's."""
    arrays = load_arrays(Path(runs[0]) / "metrics.npz")
    target_sd = arrays["config"]["flags"]["target_sd"]
    mean, sd, gradient = arrays["mean"], arrays["sd"], arrays["gradient"]  # [M], [S], [3, 2, M, S]
    figure, axes = new_figure(1, 4, size=(2.7, 2.7))
    titles, colors = ("KLD", "FD", "FD, $z$ held fixed (biased)"), ("black", "tab:red", "tab:blue")
    for ax, title, color, (d_mean, d_sd) in zip(axes[0], titles, colors, gradient):
        ax.streamplot(mean, np.log2(sd), -d_mean.T, -(d_sd / (sd * np.log(2))).T, color=color, linewidth=0.8, arrowsize=0.8, density=0.9)
        ax.plot(0, np.log2(target_sd), "*", color="gold", mec="black", ms=10, zorder=3)
        ax.set(xlabel="mean of $q$", title=title, xlim=(mean[0], mean[-1]), ylim=(np.log2(sd[0]), np.log2(sd[-1])))
    axes[0, 0].set_ylabel(r"$\log_2$ sd of $q$")
    right = axes[0, 3]
    for title, color, field in zip(("FD", "biased"), colors[1:], gradient[1:]):
        for by, name, dash in ((0, "mean", "-"), (1, "sd", "--")):
            ratio = np.divide(field[by, -1], gradient[0, by, -1], where=gradient[0, by, -1] != 0, out=np.full_like(sd, np.nan))
            known = np.isfinite(ratio)  # not where both are zero
            right.plot(sd[known], ratio[known], dash, color=color, label=f"{title}, by {name}")
    right.axhline(1, color="0.8", lw=1, zorder=0)
    right.axvline(target_sd, color="0.8", lw=1, zorder=0)
    right.set_xscale("log", base=2)
    right.set(xlabel="sd of $q$", title="gradient / KLD's gradient", yscale="log")
    right.legend(loc="lower left", fontsize=7)
    save_figure(figure, save)


# ------------------------------------------------------------------------------------------------------------- benchmark

MODES = {"plain": {"color": "0.6", "label": "plain, float32"}, "eager": {"color": "tab:blue", "label": "eager"},
         "captured": {"color": "tab:orange", "label": "captured"}}
FLOOR = {"color": "black", "linestyle": ":", "label": "convolutions alone"}


def benchmark(runs, save):
    """Images per second of every pair with the smallest and largest of the turns, beside what its convolutions alone allow."""
    arrays = load_arrays(Path(runs[0]) / "metrics.npz")
    images, batches = (select(arrays, part=part) for part in ("images", "batch"))
    panels = sorted({(image, net, precision) for image, net, precision, mode in zip(images["image"], images["net"], images["precision"], images["mode"]) if mode == "floor"})
    of_batches = np.unique(batches["precision"][batches["mode"] == "floor"])
    others = [rows for part in ("sweep", "ensemble", "toy", "importance") if len((rows := select(arrays, part=part))["size"])]
    figure, axes = new_figure(len(panels) + len(of_batches) + len(others), 1, size=(7.2, 2.6))
    for ax, (image, net, precision) in zip(axes[:, 0], panels):
        rate_bars(ax, beside_plain(select(images, image=image, net=net), precision))
        ax.set_title(f"{net}, {image.replace('x', ' x ')} x {image.split('x')[1]} pixels, {precision}, {arrays['config']['device']}")
    for ax, precision in zip(axes[len(panels):, 0], of_batches):
        for mode, style in (MODES | {"floor": FLOOR}).items():
            rows = select(beside_plain(batches, precision), mode=mode)
            if len(rows["size"]):
                ax.plot(rows["size"], 1e3 / np.median(rates(rows), 1), marker=".", **style)
        ax.set(xlabel="images per minibatch", ylabel="ms per image", xscale="log", ylim=(0, None),
               title=f"{batches['pair'][0]}, {batches['net'][0]}, {precision}")
        ax.set_xticks(sizes := np.unique(batches["size"]), sizes)
        ax.minorticks_off()
    for ax, rows in zip(axes[len(axes) - len(others):, 0], others):
        for mode in np.unique(rows["mode"]):
            line = select(rows, mode=mode)
            ax.plot(line["size"], 1e3 * np.median(line["seconds"], 1), marker=".", label=mode)
        unit = {"sweep": "runs at once", "ensemble": "members", "toy": "runs", "importance": "samples"}[rows["part"][0]]
        ax.set(xlabel=unit, ylabel="ms", xscale="log", yscale="log", title=rows["part"][0])
        ax.set_xticks(sizes := np.unique(rows["size"]), sizes)
        ax.minorticks_off()
        label_ticks(ax)
        ax.legend()
    if axes[0, 0].get_legend() is None:
        axes[0, 0].legend(loc="upper right", ncols=4)
    save_figure(figure, save)


def rate_bars(ax, rows):
    """A group of bars per pair, a bar per mode, a line where the floor lies."""
    pairs, modes = list(dict.fromkeys(rows["pair"])), [mode for mode in MODES if mode in rows["mode"]]
    at, width = np.arange(len(pairs)), 0.8 / len(modes)
    for i, mode in enumerate(modes):
        rate = rates(select(rows, mode=mode))
        ax.bar(at + (i - (len(modes) - 1) / 2) * width, np.median(rate, 1), width, **MODES[mode], ecolor="black", capsize=1.5,
               yerr=abs(np.stack([rate.min(1), rate.max(1)]) - np.median(rate, 1)), error_kw={"linewidth": 0.7})
    floor = np.median(rates(select(rows, mode="floor")), 1)
    ax.hlines(floor, at - 0.42, at + 0.42, **FLOOR)
    ax.set(ylabel="images/s", ylim=(0, 1.25 * floor.max()))
    ax.set_xticks(at, pairs, rotation=35, ha="right", rotation_mode="anchor")


def beside_plain(rows, precision):
    """The rows of one precision and those of plain, which is float32 alone."""
    keep = (rows["precision"] == precision) | (rows["mode"] == "plain")
    return {name: column[keep] for name, column in rows.items()}


def rates(rows):
    return rows["size"][:, None] / rows["seconds"]


def select(arrays, **values):
    """The rows of a table (arrays of one length each, by name) where every named column has the given value."""
    keep = np.logical_and.reduce([arrays[name] == value for name, value in values.items()])
    return {name: arrays[name][keep] for name in ("part", "image", "net", "pair", "size", "mode", "precision", "seconds")}


DRAWN_FROM = {  # the script that makes the runs: its figures
    "train_images": (training_curves, trajectories, samples, reconstructions, posterior_sd, posterior_mean, importance_bound, denoising,
                     gradient_snr),
    "train_synthetic": (synthetic, synthetic_samples),
    "param_recovery": (param_recovery, recovery_rules),
    "toy_inference": (toy_trajectories, toy_basins, toy_mixtures, toy_gradients),
    "benchmark": (benchmark,),
}
FIGURES = {figure.__name__: figure for figures in DRAWN_FROM.values() for figure in figures}
OF_MANY_RUNS = ("train_images", "train_synthetic")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--save", default=None, help="the .png, .pdf or .svg to write (default: FIGURE.png in the first run's folder)")
    args = parser.parse_args(argv)
    if args.save and Path(args.save).suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--save {args.save} must end in .png, .pdf or .svg")
    return args


def main(args):
    script = next(script for script, figures in DRAWN_FROM.items() if FIGURES[args.figure] in figures)
    for run in args.runs:
        if (made_by := load_config(run)["script"]) != script:
            raise UserError(f"{run} is a run of {made_by}.py; {args.figure} draws those of {script}.py")
    if script not in OF_MANY_RUNS and len(args.runs) > 1:
        raise UserError(f"{args.figure} draws one run, not {len(args.runs)}")
    save = args.save or Path(args.runs[0]) / f"{args.figure}.png"
    try:
        FIGURES[args.figure](args.runs, save)
    except KeyError as error:
        raise UserError(f"{args.figure} cannot be drawn: one of these runs has no {error}; has it ended, and is it of this kind?") from error
    print(save)


if __name__ == "__main__":
    command_line(parse_args, main)
