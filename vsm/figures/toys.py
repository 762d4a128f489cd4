"""Figures of the toy posteriors (Figures 2 and 5, appendix A.5)."""

from colorsys import hsv_to_rgb
from itertools import product

import numpy as np

from vsm.figures.style import BLUE, ORANGE, RED, area_key, handles_of, legend_below, line_key, new_figure, save_figure
from vsm.stored_runs import open_runs

OBJECTIVE_TITLES = {"fd-repar": "FD, reparametrised", "fd": "FD, $z$ held fixed", "kld": "KLD, reparametrised",
                    "fd-weighted": "FD weighted, $z$ held fixed"}
OPTIMISER_TITLES = {"sgd": "SGD", "adam": "Adam"}
SIDES, CAUGHT, LOST = ("#3b6fb6", "#8fc1e3"), ORANGE, "0.6"  # ends where z1 + z2 > 0, < 0; in low density; diverged
LOW_DENSITY = "caught: 99 % of the mass is denser"
POSTERIOR = "exact posterior, down to 8 nats"  # in grey


def posterior_panels(flags):
    """A figure with a row per likelihood and optimiser and a column per objective, and its axes {(l, i, p): ax}."""
    rows = list(product(enumerate(flags["likelihoods"]), enumerate(OPTIMISER_TITLES.values())))
    figure, axes = new_figure(len(rows), len(flags["objectives"]), size=(2.2, 2.25), sharex=True, sharey=True)
    panels = {}
    for row, ((l, likelihood), (p, optimiser)) in zip(axes, rows):
        row[0].set_ylabel(f"{likelihood}, {optimiser}\n$z_2$")
        for i, ax in enumerate(row):
            panels[l, i, p] = ax
    for ax, name in zip(axes[0], flags["objectives"]):
        ax.set_title(f"{OBJECTIVE_TITLES.get(name, name)}\n", fontsize=10)  # the second line is for note_counts
    for ax in axes[-1]:
        ax.set_xlabel("$z_1$")
    return figure, panels


def filled_contours(ax, arrays, l):
    """Draw the exact posterior's log density, down to 8 nats below its mode."""
    log_posterior = arrays["log_posterior"][l].astype(float)
    levels = log_posterior.max() - np.array([8, 6, 4.5, 3.2, 2, 1, 0.4, 0])
    ax.contourf(arrays["axis"], arrays["axis"], log_posterior.T, levels, cmap="Greys", vmin=levels[0], vmax=levels[-1] + 8)


def note_counts(ax, caught, diverged):
    """Write above a panel how many starts were caught and how many diverged."""
    counts = f"{caught.sum()} of {len(caught)} caught" + (f", {diverged.sum()} diverged" if diverged.any() else "")
    ax.set_title(counts, loc="left", fontsize=7.5)


def toy_trajectories(runs, save):
    """Figure 2: the way of q's location from every start over the exact posterior, coloured by the direction of the start.

    At most 10 by 10 starts are drawn, every m-th of a denser grid; the counts are of all starts.
    """
    arrays = open_runs(runs)[0].arrays()
    flags = arrays["config"]["flags"]
    extent, side = 1.12 * flags["extent"], flags["grid"]
    every = -(-side // 10)
    some = slice((side - 1) % every // 2, None, every)
    drawn = np.arange(side**2).reshape(side, side)[some, some].ravel()
    starts, trajectory = arrays["starts"][:, drawn], arrays["trajectory"][:, 0][..., drawn].astype(float)  # [F, 2, L, I, P, K]
    colors = [hsv_to_rgb(hue, 0.8, 0.75) for hue in np.arctan2(starts[1], starts[0]) / (2 * np.pi) % 1]
    figure, panels = posterior_panels(flags)
    for (l, i, p), ax in panels.items():
        filled_contours(ax, arrays, l)
        way, caught, diverged = trajectory[:, :, l, i, p], arrays["caught"][l, i, p, drawn], arrays["diverged"][l, i, p, drawn]
        for k, color in enumerate(colors):
            ax.plot(*way[:, :, k].T, color=color, lw=0.8, alpha=0.9)
        ax.scatter(*starts, c=colors, s=6, zorder=3)
        ax.scatter(*starts[:, caught], s=22, facecolors="none", edgecolors=CAUGHT, linewidths=1.4, zorder=4)
        ends = arrays["location"][:, l, i, p, drawn]
        ax.scatter(*ends[:, ~caught & ~diverged], c="black", s=9, zorder=5)
        ax.scatter(*ends[:, caught], c=CAUGHT, marker="X", s=32, edgecolors="black", linewidths=0.5, zorder=6)
        ax.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
        note_counts(ax, arrays["caught"][l, i, p], arrays["diverged"][l, i, p])
    start = "a start and the way from it" if every == 1 else f"a start and its way (every {every}th)"
    handles = {start: line_key(color=colors[0], marker="o", ms=3, lw=0.8),
               "where $q$'s mean ends": line_key(color="black", marker="o", ms=3, ls=""),
               LOW_DENSITY: line_key(color=CAUGHT, marker="X", ms=6, mec="black", mew=0.5, ls=""),
               "the start of a caught one": line_key(color=CAUGHT, marker="o", ms=5, mfc="none", mew=1.4, ls=""),
               POSTERIOR: area_key("0.75")}
    legend_below(figure, handles, columns=2)
    save_figure(figure, save)


def toy_basins(runs, save):
    """One cell per start, coloured by where q's location ends, and contours of the exact posterior."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patheffects import withStroke
    arrays = open_runs(runs)[0].arrays()
    flags = arrays["config"]["flags"]
    side, extent = flags["grid"], flags["extent"]
    half = extent / max(side - 1, 1)  # half the width of a cell
    cmap = ListedColormap([*SIDES, CAUGHT, LOST])
    figure, panels = posterior_panels(flags)
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
    names = "ends where $z_1 + z_2 > 0$", "ends where $z_1 + z_2 < 0$", LOW_DENSITY, "diverged"
    handles = dict(zip(names, map(area_key, cmap.colors)))
    legend_below(figure, handles | {"exact posterior at 1, 3, 6 nats": line_key(color="white", lw=1)}, columns=2)
    figure.legends[0].get_lines()[0].set_path_effects([withStroke(linewidth=3, foreground="0.4")])
    save_figure(figure, save)


def toy_mixtures(runs, save):
    """Figure 5: every fitted mixture over the exact posterior, one or more rows per likelihood."""
    arrays = open_runs(runs)[0].arrays()
    flags = arrays["config"]["flags"]
    likelihoods, repeats = flags["likelihoods"], arrays["kl"].shape[1]
    columns = min(repeats, 5)
    rows = -(-repeats // columns)
    figure, axes = new_figure(rows * len(likelihoods), columns, size=(max(1.9, 3.8 / columns), 1.95), sharex=True, sharey=True)
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
            ax.contour(arrays["axis"], arrays["axis"], log_q.T, log_q.max() - np.array([4.5, 2, 0.4]), colors=BLUE,
                       linewidths=1, linestyles="solid")
            ax.scatter(*arrays["mean"][:, l, r], s=120 * arrays["weight"][l, r], c=RED, alpha=0.6, linewidths=0, zorder=3)
            ax.set_title(f"KL {arrays['kl'][l, r]:.2f}, right {100 * arrays['right_mass'][l, r]:.0f} %")
        axes[l * rows, 0].set_ylabel(f"{likelihood}\nexact: right {100 * arrays['exact_right_mass'][l]:.0f} %\n$z_2$")
    for ax in axes[-1]:
        ax.set_xlabel("$z_1$")
    handles = {"mixture, 0.4, 2 and 4.5 nats below its mode": line_key(color=BLUE, lw=1),
               "means of its components, area: weight": line_key(color=RED, marker="o", alpha=0.6, mew=0, ls=""),
               POSTERIOR: area_key("0.75"), "KL: of the mixture from the posterior, nats": line_key(ls=""),
               "right: mass where $z_1 + z_2 > 0$": line_key(ls="")}
    legend_below(figure, handles, columns=2)
    save_figure(figure, save)


def toy_gradients(runs, save):
    """A.5.1: descent between two Gaussians by KLD, FD and FD with z held fixed; right: gradients over those of KLD."""
    arrays = open_runs(runs)[0].arrays()
    target_sd = arrays["config"]["flags"]["target_sd"]
    mean, sd, gradient = arrays["mean"], arrays["sd"], arrays["gradient"]
    figure, axes = new_figure(1, 4, size=(2.7, 2.7))
    titles = "descent by KLD", "descent by FD", "descent by FD, $z$ held fixed (biased)"
    colors = "black", RED, BLUE
    for ax, title, color, (d_mean, d_sd) in zip(axes[0], titles, colors, gradient):
        down = -d_mean.T, -(d_sd / (sd * np.log(2))).T  # in the figure's coordinates
        ax.streamplot(mean, np.log2(sd), *down, color=color, linewidth=0.8, arrowsize=0.8, density=0.9)
        ax.plot(0, np.log2(target_sd), "*", color="gold", mec="black", ms=10, zorder=3)
        ax.set(xlabel="mean of $q$", title=title, xlim=(mean[0], mean[-1]), ylim=(np.log2(sd[0]), np.log2(sd[-1])))
    axes[0, 0].set_ylabel(r"$\log_2$ sd of $q$")
    right = axes[0, 3]
    for title, color, field in zip(("FD", "biased FD"), colors[1:], gradient[1:]):
        for by, name, dash in ((0, "mean", "-"), (1, "sd", "--")):
            ratio = np.divide(field[by, -1], gradient[0, by, -1], where=gradient[0, by, -1] != 0, out=np.full_like(sd, np.nan))
            known = np.isfinite(ratio)  # both gradients may be zero
            right.plot(sd[known], ratio[known], dash, color=color, label=f"{title}: by {name}")
    right.axhline(1, color="0.8", lw=1, zorder=0)
    right.axvline(target_sd, color="0.8", lw=1, zorder=0)
    right.set_xscale("log", base=2)
    right.set(xlabel="sd of $q$ (grey: that of $p$)", title="gradient / KLD's gradient", yscale="log")
    star = line_key(color="gold", marker="*", mec="black", ms=10, ls="")
    legend_below(figure, {f"$p = N(0, {target_sd:g}^2)$": star} | handles_of(right))
    save_figure(figure, save)
