"""The figure of bi-level training: kappa against J in theory, and 2-D runs that differ in J."""

import numpy as np

from studies.tables import COLLAPSED
from vsm.cli import UserError
from vsm.figures.axes import round_ticks
from vsm.figures.style import color_of, handles_of, legend_below, line_key, new_figure, save_figure
from vsm.figures.synthetic import refuse_other_settings
from vsm.linear import KAPPA_KNOWN, bilevel_end
from vsm.names import pair_name, pair_order
from vsm.stored_runs import open_runs
from vsm.tables import mean_and_error

STEPS = np.unique(np.geomspace(1, 1000, 60).round())  # of the curves
V, GAMMA, LR = 1.0, 0.025, 0.01  # the example of docs/theory.md: variance of the data, gamma, step of the encoder


def bilevel(runs, save):
    """Bi-level training against the number J of kept encoder steps: theory, and E z^2 and NLL of 2-D runs of one data set.

    Left: kappa_J of the example of docs/theory.md (its v, gamma and step, not those of the runs), for the objectives of the runs;
    `released` and FD inference have none. Middle: E z^2 of each latent in use, close to kappa on a linear VAE where v is far
    above kappa gamma. Right: NLL above the true law's. Dots are latents and members; lines join their means. Of runs that differ
    in K those with the least are drawn, and of runs that differ in length those of the length that most of them have.
    """
    loaded = [run.finished() for run in open_runs(runs)]
    ordered = sorted(((arrays["config"]["flags"], arrays) for arrays in loaded), key=lambda run: pair_order(run[0]))
    fewest, lengths = min(flags["inner_steps"] for flags, _ in ordered), [flags["epochs"] for flags, _ in ordered]
    length, objectives = max(sorted(set(lengths)), key=lengths.count), {}
    for flags, arrays in ordered:
        if (flags["inner_steps"], flags["epochs"]) == (fewest, length):
            objectives.setdefault(pair_name(arrays["config"]), []).append((flags["bilevel_steps"], arrays))
    shown = [(name, J, arrays) for name, group in objectives.items() for J, arrays in group]
    refuse_other_settings([arrays["config"]["flags"] for *_, arrays in shown])
    if len({arrays["config"]["flags"]["data"] for *_, arrays in shown}) > 1:
        raise UserError("bilevel draws runs of one data set; choose them by --only")
    drawn = {J for group in objectives.values() for J, _ in group}
    figure, axes = new_figure(1, 3, size=(3.0, 2.6))
    for name, group in objectives.items():
        steps, group = zip(*sorted(group, key=lambda run: run[0]))
        flags = group[0]["config"]["flags"]
        style = {"color": color_of(flags), "linestyle": "--" if flags["estimator"] == "unbiased" else "-"}
        if flags["learn"] in KAPPA_KNOWN and flags["infer"] == "kld" and flags["estimator"] != "released":
            ends = [bilevel_end(flags["learn"], flags["estimator"], flags["samples"], J, LR, V, GAMMA) for J in (0, *STEPS)]
            axes[0, 0].plot((0, *STEPS), ends, **style)
        in_use = [arrays["second_moment"][arrays["posterior_sd"][-1] <= COLLAPSED] for arrays in group]
        for ax, values in zip(axes[0, 1:], (in_use, [arrays["nll_excess"] for arrays in group])):
            for J, members in zip(steps, values):
                ax.plot(np.full(len(members), J), members, "o", ms=2.5, alpha=0.5, mew=0, color=style["color"])
            ax.plot(steps, [mean_and_error(members)[0] for members in values], marker="_", ms=9, label=name, **style)
    for ax, title in zip(axes[0], ("linear VAE, theory: $\\kappa$", "$E z^2$ of latents in use", "NLL above the truth (nats)")):
        ax.set_xscale("symlog", linthresh=1)
        ax.set_yscale("log")
        round_ticks(ax.yaxis)
        ax.xaxis.set_major_formatter(ax.yaxis.get_major_formatter())
        ax.xaxis.set_minor_formatter("")
        ax.set(xlabel="kept encoder steps, $J$", title=title, xlim=(-0.3, 1.3 * max(STEPS if ax is axes[0, 0] else (1, *drawn))))
    for ax in axes[0, 1:]:
        ax.set_xticks(sorted(drawn))
    handles = {f"{label}, mean": handle for label, handle in handles_of(axes[0, 1]).items()}
    legend_below(figure, handles | {"a latent, or a seed": line_key(color="0.3", marker="o", ms=2.5, ls="")}, columns=6)
    save_figure(figure, save)
