"""Figures of parameter recovery (Figure 1)."""

from itertools import cycle

import numpy as np

from vsm.figures.style import COLORS, new_figure, save_figure
from vsm.packs import open_runs


def param_recovery(runs, save):
    """Figure 1: recovered w against w*, several alpha; p and q at the minima of JKLD and JFD, ellipses at 1, 2 and 3 sd."""
    arrays = open_runs(runs)[0].arrays()
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
    arrays = open_runs(runs)[0].arrays()
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
