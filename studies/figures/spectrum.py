"""The figure of studies/spectrum.py: spectra of linear VAEs on images, predicted and trained."""

import numpy as np

from objectives import LEARN
from vsm.figures.axes import round_ticks, whole_ticks
from vsm.figures.style import line_key, new_figure, save_figure
from vsm.linear import kappa, second_moment
from vsm.stored_runs import open_runs

MARKERS = {"elbo": "s", "fd": "o", "swersky": "v", "bao": "D", "dsm": "P"}
HIDDEN = (("swersky", "unbiased"), ("dsm", "plugin"))  # from the first panel, where they would lie on S and on plug-in B
TEN = 10  # means are over so many of the largest directions
ACTIVE = 1.05  # a latent is active if its direction has more than this times gamma of variance


def spectrum(runs, save):
    """Linear VAEs on images: the variance that each objective gives its model, predicted (lines) and trained (markers).

    Four panels: variances by principal component; learnt over true against N; E z^2 against kappa; active latents against kappa.
    """
    arrays = open_runs(runs)[0].arrays()
    figure, axes = new_figure(2, 2, size=(4.4, 3.3))
    draw_variances(axes[0, 0], arrays)
    draw_ratios(axes[0, 1], arrays)
    draw_second_moments(axes[1, 0], arrays)
    draw_active(axes[1, 1], arrays)
    save_figure(figure, save)


def marker_style(objective, estimator):
    """Colour and marker of an objective; filled for plug-in, open for unbiased."""
    color = LEARN[objective].color
    filling = "white" if estimator == "unbiased" else color
    return {"color": color, "marker": MARKERS[objective], "ms": 5, "mfc": filling, "linestyle": "none"}


def models_of(arrays):
    """A list of (row, objective, estimator, N), one for every model."""
    columns = (arrays[name].tolist() for name in ("objective", "estimator", "samples"))
    return [(m, *model) for m, model in enumerate(zip(*columns))]


def draw_variances(ax, arrays, N=5):
    """Draw the variances by principal component, of the data and learnt with N samples."""
    K, v, gamma = arrays["learnt"].shape[1], arrays["eigenvalues"], arrays["gamma"]
    component = np.arange(1, K + 1)
    ax.plot(component, v[:K], color="0.85", lw=6, solid_capstyle="round", label="data (PCA)")
    ax.axhline(gamma, color="0.4", lw=0.8, linestyle=":")
    ax.text(1, gamma * 0.95, r"$\gamma$: what a pruned latent leaves", va="top", color="0.4", fontsize=8)
    shown_here = [row for row in models_of(arrays) if row[3] == N and row[1:3] not in HIDDEN]
    for offset, (m, objective, estimator, _) in enumerate(shown_here):
        style = marker_style(objective, estimator)
        ax.plot(component, np.maximum(v[:K] / arrays["kappa"][m], gamma), color=style["color"], lw=1)
        shown = slice(offset % 3, None, 3)  # only every third component, so that equal spectra do not hide each other
        entry = LEARN[objective]
        name = entry.letter + (f", {estimator.replace('plugin', 'plug-in')}" if entry.takes("estimator") else "")
        ax.plot(component[shown], arrays["learnt"][m][shown], label=name, **{**style, "ms": 4})
    ax.set_yscale("log")
    round_ticks(ax.yaxis)
    ax.set(xlabel="principal component", ylabel="variance", ylim=(0.7 * v[:K].min(), 1.3 * v[0]),
           title=f"variance learnt in each direction of {arrays['config']['flags']['data']}, $N = {N}$")
    ax.legend(fontsize=8, title="lines: predicted, markers: trained", title_fontsize=8)


def draw_ratios(ax, arrays):
    """Draw the learnt share of the data's variance against N."""
    samples = sorted(set(arrays["samples"].tolist()))
    noise = arrays.get("noise", np.zeros(len(arrays["kappa"])))  # runs without noisy data may not have it
    v = arrays["eigenvalues"] + noise[:, None] ** 2  # [M, D]
    ratio = (arrays["learnt"] / v[:, :arrays["learnt"].shape[1]])[:, :TEN].mean(1)
    for objective, estimator in dict.fromkeys(row[1:3] for row in models_of(arrays)):
        rows = [row[0] for row in models_of(arrays) if row[1:3] == (objective, estimator)]
        style = marker_style(objective, estimator)
        N = np.geomspace(arrays["samples"][rows].min(), samples[-1], 50)
        ax.plot(N, [1 / kappa(objective, estimator, n) for n in N], color=style["color"], lw=1,
                linestyle="--" if estimator == "unbiased" else "-")
        ax.plot(arrays["samples"][rows], ratio[rows], **style)
    ax.text(1.13, 0.955, "S with $N = 1$ is F", fontsize=8, color="0.3")
    ax.text(2.25, 2 / 3, "S and B cross at $N = 2$", fontsize=8, color="0.3", va="center")
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.set(xlabel="posterior samples $N$", xticks=samples, xticklabels=samples, ylim=(0.45, 1.12), ylabel="learnt / data's",
           title=f"share of the data's variance, mean of the {TEN} largest")
    lines = [line_key(color="0.4", lw=1), line_key(color="0.4", marker="o", ls="none"),
             line_key(color="0.4", marker="o", mfc="white", ls="none")]
    ax.legend(lines, ["predicted, $1/\\kappa$", "trained", "trained, unbiased"], fontsize=8, loc="center right",
              bbox_to_anchor=(1, 0.45))


def draw_second_moments(ax, arrays):
    """Draw E z^2 of the aggregate posterior against kappa."""
    v, gamma = arrays["eigenvalues"][:TEN], arrays["gamma"]
    k = np.linspace(0.95, 2.05, 100)
    ax.axhline(1, color="0.85", lw=4)
    ax.text(2.05, 0.985, "the prior's", va="top", ha="right", color="0.5", fontsize=8)
    ax.plot(k, k, color="0.6", lw=0.8, linestyle=":", label=r"$E\,z^2 = \kappa$, the limit of small $\gamma$")
    ax.plot(k, second_moment(k[:, None], 1.0, gamma, v).mean(1), color="0.3", lw=1, label="predicted")
    for m, objective, estimator, _ in models_of(arrays):
        ax.plot(arrays["kappa"][m], arrays["second_moment"][m, :TEN].mean(), **marker_style(objective, estimator))
    ax.set(xlabel=r"contraction $\kappa$", ylabel=r"$E\,z^2$",
           title=f"$E\\,z^2$ of the aggregate posterior, mean of the {TEN} largest")
    ax.legend(fontsize=8, loc="upper left")


def draw_active(ax, arrays):
    """Draw the number of active latents against kappa."""
    v, gamma, K = arrays["eigenvalues"], arrays["gamma"], arrays["learnt"].shape[1]
    k = np.linspace(0.95, 2.05, 1000)
    ax.plot(k, np.minimum((v > ACTIVE * gamma * k[:, None]).sum(1), K), color="0.3", lw=1, label="predicted")
    for m, objective, estimator, _ in models_of(arrays):
        ax.plot(arrays["kappa"][m], (arrays["learnt"][m] > ACTIVE * gamma).sum(), **marker_style(objective, estimator))
    whole_ticks(ax.yaxis, 6)
    ax.set(xlabel=r"contraction $\kappa$", ylabel=f"active latents of {K}",
           title=rf"latents not pruned: variance above {ACTIVE}$\,\gamma$")
    ax.legend(fontsize=8, loc="upper right")
