"""Figures of `param_recovery.py`: the recovered w (Figure 1), by every rule."""

from itertools import cycle

import numpy as np

from vsm.figures.style import BLUE, PURPLE, letter_color, new_figure, save_figure
from vsm.stored_runs import open_runs


def param_recovery(runs, save):
    """Figure 1: recovered w against w* for several alpha; p and q at the minima of JKLD and JFD, ellipses at 1, 2 and 3 sd."""
    arrays = open_runs(runs)[0].arrays()
    flags, rule = arrays["config"]["flags"], list(arrays["rule"])
    figure, axes = new_figure(1, 3, size=(3.2, 2.9))
    left, *joints = axes[0]
    w_star, jkld, jfd = arrays["w_star"], arrays["w"][rule.index("JKLD")], arrays["w"][rule.index("JFD")]
    left.plot(w_star, jkld.T, color=letter_color("ELBO"), lw=3, alpha=0.35,
              label=["JKLD, every $\\alpha$"] + [None] * (len(jkld) - 1))
    for alpha, w, dash in zip(arrays["alpha"], jfd, cycle(("-", ":", "--", "-."))):
        left.plot(w_star, w, color=letter_color("FAE"), linestyle=dash, label=rf"JFD, $\alpha = {alpha:g}$")
    if "sampled_w" in arrays:
        sampled = arrays["sampled_w"][[rule.index("JKLD"), rule.index("JFD")]].reshape(-1, len(arrays["checked_w_star"]))
        left.plot(arrays["checked_w_star"], sampled.T, "o", color=BLUE, ms=3.5, mfc="white",
                  label=["from samples"] + [None] * (len(sampled) - 1))
    left.set(xlabel="true $w^*$", ylabel="recovered $w$", title=rf"recovery, $\gamma = {flags['gamma']:g}$")
    left.legend(loc="upper left", fontsize=8)
    examples = (arrays[f"example_{key}"] for key in ("w", "phi", "jkld", "jfd"))
    for ax, name, w, phi, kld, fd in zip(joints, ("JKLD", "JFD"), *examples):
        gamma, v = flags["gamma"], flags["gamma"] + flags["w_star"] ** 2
        p = np.array([[gamma + w**2, w], [w, 1]])
        q = np.array([[v, phi * v], [phi * v, phi**2 * v + flags["alpha"] * gamma / (gamma + w**2)]])
        ellipses(ax, p, color="0.3", label="$p_w(x, z)$")
        ellipses(ax, q, color=PURPLE, linestyle="--", label=r"$q_\phi(x, z)$")
        ax.set(xlabel="$x$", ylabel="$z$", title=f"minimum of {name}: $w = {w:.3f}$\n(JKLD {kld:.2f}, JFD {fd:.2f})")
    joints[0].legend(loc="upper left")
    joints[0].text(0.98, 0.02, rf"$w^* = {flags['w_star']:g}$, $\alpha = {flags['alpha']:g}$", transform=joints[0].transAxes,
                   ha="right")
    joints[1].sharex(joints[0])
    joints[1].sharey(joints[0])
    save_figure(figure, save)


def ellipses(ax, covariance, label, **style):
    """Draw the contours of a zero-mean Gaussian at 1, 2 and 3 sd."""
    angle = np.linspace(0, 2 * np.pi, 200)
    x, z = np.linalg.cholesky(covariance) @ (np.cos(angle), np.sin(angle))
    for sd in (1, 2, 3):
        ax.plot(sd * x, sd * z, lw=1.2, label=label if sd == 1 else None, **style)


RULE_PANELS = {"held": "$q$ held fixed while $w$ moves (Algorithm 1)", "plug-in": "the same, plug-in S and B of $N$ samples",
               "following": "$q$ follows $w$ (bi-level)"}
DASHES_BY_SAMPLES = {1: ":", 2: "-.", 5: "--", 20: "-"}


def recovery_rules(runs, save):
    """Recovered w against alpha at one w* for every learning objective: q held fixed, the plug-in estimators, q following w."""
    arrays = open_runs(runs)[0].arrays()
    w_star, alpha = arrays["config"]["flags"]["w_star"], arrays["sweep_alpha"]
    recovered = dict(zip(arrays["rule"], arrays["sweep_w"]))
    panels = [how for how in RULE_PANELS if how != "plug-in" or "held S, N = 5" in recovered]
    figure, axes = new_figure(1, len(panels), size=(3.6, 2.9), sharey=True)
    for ax, how in zip(axes[0], panels):
        ax.axhline(w_star, color="0.8", lw=4)
        for name in () if how == "plug-in" else ("ELBO", "F", "S", "B", "FAE"):
            key = "JFD" if name == "FAE" else "JKLD" if f"{how} {name}" not in recovered else f"{how} {name}"
            same = (how, name) in (("held", "F"), ("following", "B"))  # it equals the ELBO's curve, so it is dashed over that one
            ax.plot(alpha, recovered[key], color=letter_color(name), lw=1.6, linestyle="--" if same else "-", label=name)
        for name, N in ((name, N) for name in "SB" for N in DASHES_BY_SAMPLES if how == "plug-in"):
            ax.plot(alpha, recovered[f"held {name}, N = {N}"], color=letter_color(name), lw=1.4, linestyle=DASHES_BY_SAMPLES[N],
                    label=f"{name}, $N = {N}$")
        ax.set_xscale("log", base=2)
        ax.set(xlabel=r"$\alpha$: variance of $q$ / exact", title=RULE_PANELS[how], ylim=(-0.1, 3 * w_star))
        ax.legend(fontsize=8, loc="upper right")
    axes[0, 0].set_ylabel("recovered $w$")
    axes[0, 0].text(alpha[-1], w_star, "$w^*$", va="bottom", ha="right", color="0.5")
    save_figure(figure, save)
