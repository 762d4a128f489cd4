"""Figures of the toy posteriors (Figures 2 and 5, A.5.1)."""

from itertools import product

import numpy as np
from matplotlib.colors import ListedColormap, hsv_to_rgb
from matplotlib.patches import Patch

from vsm.figures.style import new_figure, save_figure
from vsm.packs import open_runs

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
    arrays = open_runs(runs)[0].arrays()
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
    arrays = open_runs(runs)[0].arrays()
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
    arrays = open_runs(runs)[0].arrays()
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
    arrays = open_runs(runs)[0].arrays()
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
