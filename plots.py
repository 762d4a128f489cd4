"""Every figure, drawn from `.npz` files alone: python plots.py FIGURE RUN... --save out.png

Scripts call the same functions at their end, so a figure can be redrawn at any time without a model or a GPU.
A figure is a function figure(runs, save): a list of run folders in, a PNG out.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from runs import command_line, group_by_seed, load_arrays

# One colour per objective in every figure: hue for the learning objective, dashes for FD inference.
COLORS = {"ELBO": "black", "F": "tab:blue", "S": "tab:orange", "B": "tab:green", "FAE": "tab:red"}

matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 9, "legend.frameon": False})


def line_style(label):
    """Colour and dash of a pair named as in the paper: KLD-F, FD-S, FAE."""
    return {"color": COLORS[label.split("-")[-1]], "linestyle": "--" if label.startswith("FD-") else "-"}


def new_figure(rows=1, columns=1, size=(3.2, 2.6), **options):
    """A figure on its own Agg canvas (no display, no global state) and its axes [rows, columns]."""
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure, save):
    Path(save).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(save, dpi=150)


# ------------------------------------------------------------------------------------------------------------ image runs

CURVES = {  # metric: axis label, scale
    "negative_elbo": ("negative ELBO (nats)", "linear"),
    "reconstruction_mse": ("reconstruction MSE", "log"),
    "latent_mmd": ("latent MMD$^2$, cubic", "symlog"),
    "posterior_fd": ("posterior FD", "log"),
    "log_gamma": (r"$\log\,\gamma$", "linear"),
    "active_units": ("active latents", "linear"),
    "learn_loss": ("decoder's training loss", "symlog"),
    "learn_grad_norm": ("its gradient norm", "log"),
}


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
    ax.set_yscale(scale, **({"linthresh": 100} if scale == "symlog" else {}))
    if scale == "symlog":
        ax.yaxis.get_major_locator().set_params(numticks=5)
    ax.yaxis.set_minor_formatter(NullFormatter())


def grouped(runs, file="metrics.npz"):
    """{data set and network: [(name, the arrays of runs that differ in their seed alone)]}"""
    loaded, panels = [load_arrays(Path(run) / file) for run in runs], {}
    for name, members in group_by_seed([arrays["config"] for arrays in loaded]):
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


def legend(figure, axes, side="lower center", columns=5):
    """One legend outside all axes, each name once."""
    named = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(named.values(), named.keys(), loc=f"outside {side}", ncols=min(len(named), columns))


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
    named = [(f"{name}, {seeds_of([arrays])}", arrays)
             for groups in grouped(runs).values() for name, members in groups for arrays in members]
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
        ax.stairs(share, edges, fill=True, alpha=0.4, **style)
        ax.stairs(np.histogram(averaged, edges)[0] / len(averaged), edges, linestyle=":", **style)

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
    save_figure(figure, save)


def importance_bound(runs, save):
    """The importance-weighted bound on the negative log-likelihood against its number of samples from q(z|x)."""
    figure, axes = curves(runs, "iw_samples", "negative_iw_bound", xlabel="samples $K$", ylabel="negative bound (nats)", xscale="log")
    legend(figure, axes, "right center", columns=1)
    save_figure(figure, save)


def denoising(runs, save):
    """Error of the reconstruction of a noisy image against the clean one, by the noise's standard deviation."""
    figure, axes = curves(runs, "noise_levels", "denoising_mse", xlabel="noise SD", ylabel="MSE to the clean image")
    for ax in axes.flat:
        sd = np.linspace(*ax.get_xlim(), 200)
        ax.plot(sd, sd**2, ":", color="gray", label="noisy image itself", scaley=False)
    legend(figure, axes, "right center", columns=1)
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
            ax.minorticks_off()
        row[0].set_ylabel(f"at the model of\n{arrays['config']['label']}, {seeds_of([arrays])}")
    legend(figure, axes)
    save_figure(figure, save)


def draw_run(run):
    """The PNGs of one finished image run, those that are not there yet. A diverged run has no pictures to show."""
    arrays = load_arrays(Path(run) / "metrics.npz")
    for name in ("training_curves", "samples", "reconstructions", "posterior_sd", "posterior_mean"):
        save = Path(run) / f"{name}.png"
        if not save.exists() and (name == "training_curves" or name in arrays):
            FIGURES[name]([run], save)


FIGURES = {figure.__name__: figure for figure in (
    training_curves, trajectories, samples, reconstructions, posterior_sd, posterior_mean, importance_bound, denoising,
    gradient_snr)}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--save", default=None, help="the PNG to write (default: FIGURE.png in the first run's folder)")
    return parser.parse_args(argv)


def main(args):
    save = args.save or Path(args.runs[0]) / f"{args.figure}.png"
    FIGURES[args.figure](args.runs, save)
    print(save)


if __name__ == "__main__":
    command_line(parse_args, main)
