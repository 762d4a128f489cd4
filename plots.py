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

from runs import NOT_IDENTITY, command_line, load_arrays

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


def load_runs(runs):
    """The arrays of each run, and for each a label: the objective, then the flags in which these runs differ."""
    loaded = [load_arrays(Path(run) / "metrics.npz") for run in runs]
    flags = [arrays["config"]["flags"] for arrays in loaded]
    differ = [key for key in flags[0] if key not in (*NOT_IDENTITY, "learn", "infer") and len({str(f.get(key)) for f in flags}) > 1]
    labels = []
    for arrays, own in zip(loaded, flags):
        status = str(arrays.get("status", "unfinished"))
        labels.append(", ".join([arrays["config"]["label"], *(f"{key.replace('_', '-')} {own.get(key)}" for key in differ),
                                 *([status] if status != "ok" else [])]))
    return loaded, labels


def training_curves(runs, save):
    """Test metrics and the decoder's training loss against epochs, one line per run; the ELBO from the first trained epoch on."""
    loaded, labels = load_runs(runs)
    names = [name for name in CURVES if any(name in arrays for arrays in loaded)]
    figure, axes = new_figure(-(-len(names) // 4), 4, size=(2.9, 2.3))
    for ax, name in zip(axes.flat, names):
        for arrays, label in zip(loaded, labels):
            if name in arrays:
                trained = arrays["epoch"] > (0 if name == "negative_elbo" else -1)
                ax.plot(arrays["epoch"][trained], arrays[name][trained], marker=".", label=label,
                        **line_style(arrays["config"]["label"]))
        ax.set(xlabel="epoch", title=CURVES[name][0])
        ax.set_yscale(CURVES[name][1], **({"linthresh": 100} if CURVES[name][1] == "symlog" else {}))
        ax.yaxis.set_minor_formatter(NullFormatter())
    for ax in axes.flat[len(names):]:
        ax.set_axis_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(runs), 4))
    save_figure(figure, save)


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
    loaded, labels = load_runs(runs)
    columns = min(len(runs), 4)
    figure, axes = new_figure(-(-len(runs) // columns), columns, size=(3.2, 3.4))
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, arrays, label in zip(axes.flat, loaded, labels):
        ax.imshow(make(arrays), vmin=0, vmax=255, cmap="gray", interpolation="nearest")
        ax.set_title(label)
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
    loaded, labels = load_runs(runs)
    figure, axes = new_figure()
    for arrays, label in zip(loaded, labels):
        sd = arrays["posterior_sd"][-1]
        axes[0, 0].hist(np.clip(sd, 0, 1.2), bins=np.linspace(0, 1.2, 49), histtype="step", label=label,
                        **line_style(arrays["config"]["label"]))
    axes[0, 0].set(xlabel="posterior SD (clipped at 1.2)", ylabel="latent dimensions")
    axes[0, 0].legend()
    save_figure(figure, save)


# ------------------------------------------------------------------------------------------------------------- 2-D runs


def synthetic_samples(runs, save):
    """Samples of every run's median member over the data, one panel per run."""
    loaded = [load_arrays(Path(run) / "metrics.npz") for run in runs]
    columns = min(len(runs), 5)
    figure, axes = new_figure(-(-len(runs) // columns), columns, size=(2.4, 2.5))
    for ax, arrays in zip(axes.flat, loaded):
        nll = arrays["nll"]
        member = np.argsort(nll)[np.isfinite(nll).sum() // 2]
        ax.plot(*arrays["test_data"].T, ".", ms=1.5)
        ax.plot(*arrays["model_samples"][member].T, ".", ms=1.5)
    save_figure(figure, save)


def draw_run(run):
    """The PNGs of one finished image run, those that are not there yet. A diverged run has no pictures to show."""
    arrays = load_arrays(Path(run) / "metrics.npz")
    for name in ("training_curves", "samples", "reconstructions", "posterior_sd"):
        save = Path(run) / f"{name}.png"
        if not save.exists() and (name in FIGURES) and (name == "training_curves" or arrays.get(name) is not None):
            FIGURES[name]([run], save)


FIGURES = {figure.__name__: figure for figure in (training_curves, samples, reconstructions, posterior_sd, synthetic_samples)}


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
