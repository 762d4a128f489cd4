"""The figure of audit.py: the loss of one objective, and where its training ends."""

import numpy as np

from vsm.figures.axes import round_ticks
from vsm.figures.style import color_of, new_figure, save_figure
from vsm.stored_runs import open_runs


def audit(runs, save):
    """Four panels: terms of the loss; kappa against N by alpha; the learnt spectrum; NLL of the short 2-D run above the truth."""
    arrays = open_runs(runs)[0].arrays()
    flags = arrays["config"]["flags"]
    color = color_of({"learn": flags["objective"]})
    figure, axes = new_figure(1, 4 if "spectrum_learnt" in arrays else 2, size=(3.5, 2.8))
    composition, contraction, *trained = axes[0]

    used = np.abs(arrays["weight"]) > 1e-6
    composition.barh(arrays["term"][used], arrays["weight"][used], color=color)
    composition.axvline(0, color="0.7", lw=0.8)
    composition.set(title=f"{flags['objective']} ({flags['estimator']}): the loss", xlabel="weight of each term")
    if arrays["composition_residual"] > 1e-6:
        composition.set_title("not a combination of these terms")

    at = np.arange(len(arrays["samples"]))
    for alpha, row, dash in zip(arrays["alpha"], arrays["kappa"], (":", "-", "--")):
        contraction.plot(at, row, dash, marker="o", ms=4, color=color, label=rf"$\alpha = {alpha:g}$")
    contraction.axhline(1, color="0.7", lw=3, zorder=0, label="of the ELBO")
    contraction.set(title="contraction $\\kappa$: the model gets $1 / \\kappa$;\n$\\alpha$: variance of q / exact",
                   xlabel="posterior samples $N$")
    contraction.set_xticks(at, arrays["samples"])
    contraction.legend(fontsize=7.5)

    if trained:
        spectrum, short = trained
        component = np.arange(1, len(arrays["spectrum_data"]) + 1)
        spectrum.plot(component, arrays["spectrum_data"], color="0.8", lw=5, label="data (PCA)")
        spectrum.plot(component, arrays["spectrum_learnt"], "o", ms=4, color=color, label="linear VAE")
        spectrum.set(title=f"variance learnt from {flags['data']}", xlabel="principal component",
                     ylabel="pixel value$^2$", yscale="log")
        round_ticks(spectrum.yaxis)
        spectrum.legend()
        names = [key.removeprefix("excess_") for key in arrays if key.startswith("excess_")]
        for i, name in enumerate(names):
            values = arrays[f"excess_{name}"]
            short.plot(np.full(len(values), i), values, "o", color=color_of({"learn": name}), alpha=0.7, clip_on=False)
        short.set(title=f"NLL above the truth, {flags['law']},\n{flags['updates']} updates, not converged", ylabel="nats",
                  xlim=(-0.6, len(names) - 0.4))
        short.set_xticks(range(len(names)), names)
        short.margins(y=0.15)
        short.set_ylim(min(0, short.get_ylim()[0]), None)
    save_figure(figure, save)
