"""The tables of the convergence study: final values, paired differences from the ELBO, and whether training has converged."""

import math

import numpy as np
from scipy.stats import t as student

from vsm.figures.style import pair_order
from vsm.tables import markdown_table

COLLAPSED = 0.9  # a latent whose posterior SD is above this, on average over the data, is not in use


def study_table(runs):
    """Markdown of finished runs of one script, 2-D or image. Intervals are 95 %, by Student's t over seeds."""
    loaded = [run.arrays() for run in runs]
    rows = two_dimensional(loaded) if loaded[0]["config"]["script"] == "train_synthetic" else images(loaded)
    return rows + "\n"


def interval(values):
    """Mean and half-width of the 95 % interval of `values` [n], those that are not finite left out."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return (values.mean() if len(values) else math.nan), math.nan
    return values.mean(), student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5


def shown(values, digits=3):
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if math.isfinite(half) else f"{mean:.{digits}f}"


def name_of(arrays):
    flags = arrays["config"]["flags"]
    estimator = "" if flags["estimator"] == "plugin" else f" {flags['estimator']}"
    return f"{arrays['config']['label']}{estimator}, N = {flags['samples']}"


def two_dimensional(loaded):
    """Negative log-likelihood above the true law's, nats; its difference from KLD-ELBO's with the same seeds; its change in the last quarter."""
    lines = []
    for data in dict.fromkeys(arrays["config"]["flags"]["data"] for arrays in loaded):
        group = sorted((arrays for arrays in loaded if arrays["config"]["flags"]["data"] == data),
                       key=lambda arrays: (pair_order(arrays["config"]["flags"]), name_of(arrays)))
        (elbo,) = [arrays for arrays in group if arrays["config"]["label"] == "KLD-ELBO"] or [None]
        for arrays in group:
            excess, curve, sd = arrays["nll_excess"], arrays["excess_curve"], arrays["posterior_sd"][-1]
            quarter = len(curve) - 1 - (len(curve) - 1) // 4
            unused = (sd > COLLAPSED).sum(-1)
            difference = "" if elbo is None or arrays is elbo else shown(excess - elbo["nll_excess"])
            lines.append([data, name_of(arrays), np.isfinite(excess).sum(), shown(excess), f"{np.nanmedian(excess):.3f}", difference,
                          f"{np.nanmean(curve[-1] - curve[quarter]):+.3f}", f"{(unused == 1).sum()}, {(unused == 2).sum()}",
                          f"{np.nanmean(arrays['fisher_divergence']):.3g}"])
    return markdown_table(["data", "pair", "n", "NLL above the truth", "median", "less KLD-ELBO's (paired)", "change in the last quarter",
                           "members with 1, 2 unused latents", "Fisher divergence"], lines, "llrrrrrrr")


def images(loaded):
    """Final FIDs, E z^2 and negative ELBO over seeds; the ratio of FIDs to KLD-ELBO's of the same seed; the change in the last quarter."""
    groups = {}
    for arrays in sorted(loaded, key=lambda arrays: pair_order(arrays["config"]["flags"])):
        groups.setdefault(name_of(arrays), []).append(arrays)
    of_elbo = {arrays["config"]["flags"]["seed"]: arrays["fid"][-1] for name, members in groups.items() for arrays in members
               if arrays["config"]["label"] == "KLD-ELBO"}
    lines = []
    for name, members in groups.items():
        quarter = -1 - (len(members[0]["fid"]) - 1) // 4
        ratios = [arrays["fid"][-1] / of_elbo.get(arrays["config"]["flags"]["seed"], math.nan) for arrays in members]
        last = {key: shown([arrays[key][-1] for arrays in members], 2) for key in ("fid", "fid_aggregate", "fid_reconstruction")}
        lines.append([name, len(members), *last.values(), shown(ratios, 2) if name[:8] != "KLD-ELBO" else "",
                      f"{100 * np.mean([arrays['fid'][-1] / arrays['fid'][quarter] - 1 for arrays in members]):+.0f} %",
                      shown([arrays["second_moment"][-1].mean() for arrays in members], 2),
                      shown([arrays["negative_elbo"][-1] for arrays in members], 1), shown([100 * arrays["reconstruction_mse"][-1] for arrays in members], 2)])
    return markdown_table(["pair", "n", "FID", "FID, aggregate posterior", "FID, reconstructions", "FID / KLD-ELBO's", "change in the last quarter",
                           "E z^2", "negative ELBO", "MSE x 100"], lines, "lrrrrrrrrr")
