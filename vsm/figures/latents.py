"""Figures of the latents of image runs: posterior standard deviations, Bernoulli means, the aggregate posterior."""

import math

import numpy as np

from vsm.figures.axes import whole_ticks
from vsm.figures.groups import grouped, named_groups, seeds_of
from vsm.figures.style import (
    area_key,
    color_of,
    handles_of,
    legend_below,
    line_key,
    new_figure,
    new_panels,
    save_figure,
    wrapped,
)

LARGEST_SD = 1.2


def posterior_sd(runs, save):
    """Histogram over the latent dimensions of the posterior's standard deviation, averaged over the test images (Figures 9, 10).

    Bins cover the range of all runs; values above 1.2 are counted in the last bin.
    """
    def clipped(arrays):
        return np.clip(arrays["posterior_sd"][-1], 0, LARGEST_SD)

    groups = [members for _, members in named_groups(grouped(runs))]
    values = np.concatenate([clipped(arrays) for members in groups for arrays in members])
    edges = np.linspace(0.9 * values.min(), min(1.05 * values.max(), LARGEST_SD), 41)

    def draw_histogram(ax, arrays, **style):
        ax.hist(clipped(arrays), bins=edges, histtype="stepfilled", alpha=0.5, **style)

    xlabel = "posterior SD" + (" (clipped at 1.2)" if values.max() == LARGEST_SD else "")
    figure, axes = histograms(runs, draw_histogram, xlabel, "latent dimensions")
    for ax in axes.flat:
        whole_ticks(ax.yaxis, 5)
    if max(map(len, groups)) > 1:
        legend_below(figure, {"latents of one seed": area_key("0.6"), "where seeds overlap": area_key("0.35")})
    save_figure(figure, save)


def posterior_mean(runs, save):
    """Histograms of the posterior's mean of Bernoulli latents, which is 1/2 where a latent carries nothing (Figure 11).

    Filled: over images and latents. Line: over latents, each averaged over the images; a latent in use may also average to 1/2.
    """
    def draw_histograms(ax, arrays, **style):
        share, averaged = arrays["posterior_mean_histogram"][-1], arrays["posterior_mean"][-1]
        edges = np.linspace(0, 1, len(share) + 1)
        ax.stairs(share, edges, fill=True, alpha=0.4, label="each image and latent", **style)
        averaged_share = np.histogram(averaged, edges)[0] / len(averaged)
        ax.stairs(averaged_share, edges, linestyle=":", label="each latent, mean over images", **style)

    figure, axes = histograms(runs, draw_histograms, "posterior mean", "share")
    legend_below(figure, handles_of(axes), columns=1)
    save_figure(figure, save)


def aggregate_posterior(runs, save):
    """The aggregate posterior against the prior N(0, 1) at the end of training, two panels per group of seeds.

    Left: the histogram of posterior samples of the active latents over the test images, and the prior's density (dashed).
    Right: E z^2 of each latent, sorted; it is 1 (dashed) under the prior.
    """
    groups = named_groups(grouped(runs))
    columns = min(len(groups), 3)
    figure, axes = new_panels(2 * len(groups), 2 * columns, size=(2.2, 2.1))
    for (left, right), (name, members) in zip(axes.reshape(-1, 2), groups):
        for arrays in members:
            color, share = color_of(arrays["config"]["flags"]), arrays["aggregate_histogram"][-1]
            moment = np.sort(arrays["second_moment"][-1])[::-1]
            edges = np.linspace(-4, 4, len(share) + 1)
            left.stairs(share / np.diff(edges), edges, fill=True, alpha=0.4, color=color)
            right.plot(np.arange(1, len(moment) + 1), moment, ".-", ms=4, lw=0.8, color=color)
        if not any(np.nansum(arrays["aggregate_histogram"][-1]) for arrays in members):
            left.text(0.5, 0.7, "no latent is active", transform=left.transAxes, ha="center", fontsize=8)
        z = np.linspace(-4, 4, 200)
        left.plot(z, np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), "k--", lw=1)
        left.set(xlabel="$z$, active latents", ylabel="density", xlim=(-4, 4))
        left.set_title(wrapped(f"{name}, {seeds_of(members)}", 4, 9), loc="left")
        right.axhline(1, color="black", linestyle="--", lw=1)
        right.set(xlabel="latent, sorted", ylabel="$E\\,z^2$", ylim=(0, None))
    legend_below(figure, {"posterior samples of all test images": area_key("0.7"),
                          "under the prior N(0, 1)": line_key(color="black", linestyle="--", lw=1)})
    save_figure(figure, save)


def histograms(runs, draw, xlabel, ylabel, columns=4):
    """A figure and its axes, with a panel per group in which draw(ax, arrays, color=...) draws each seed.

    A row holds `columns` panels at most, of one data set and network.
    """
    panels = grouped(runs)
    columns = min(columns, max(map(len, panels.values())))
    rows = [(title, groups[i:i + columns]) for title, groups in panels.items() for i in range(0, len(groups), columns)]
    figure, axes = new_figure(len(rows), columns, size=(2.4, 2.2), sharex=True)
    for row, (title, groups) in zip(axes, rows):
        for ax, (name, members) in zip(row, groups):
            for arrays in members:
                draw(ax, arrays, color=color_of(arrays["config"]["flags"]))
            ax.set_title(wrapped(f"{name}, {seeds_of(members)}", 2.1, 9))
            ax.set_xlabel(xlabel)
        row[0].set_ylabel(f"{title}\n{ylabel}" if len(panels) > 1 else ylabel)
        for ax in row[len(groups):]:
            ax.set_axis_off()
    return figure, axes
