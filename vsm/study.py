"""The tables of the convergence study: final values, paired differences from the ELBO, and whether training has converged."""

import math

import numpy as np
from scipy.stats import t as student

from vsm.figures.style import pair_order
from vsm.tables import markdown_table, mean_and_error, number_text, with_error

COLLAPSED = 0.9  # a latent whose posterior SD is above this, on average over the data, is not in use


def study_table(runs):
    """The Markdown table of finished runs of one script, 2-D or image runs. Intervals are 95 %, by Student's t over seeds."""
    loaded = [run.finished() | latent_scale_of(run) for run in runs]
    table = table_of_2d_runs(loaded) if loaded[0]["config"]["script"] == "train_synthetic" else table_of_image_runs(loaded)
    return table + "\n"


def latent_scale_of(run):
    """What evaluate.py --latent-scale measured of a run, under names of their own; nothing where it did not."""
    names = {"second_moment": "training_moment", "predicted_moment": "predicted_moment"}
    return {mine: run.arrays("latent_scale")[key] for key, mine in names.items()} if run.has("latent_scale") else {}


def interval(values):
    """Mean and half-width of the 95 % interval of the finite values among `values` [n]; NaN for what is undefined."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return (values.mean() if len(values) else math.nan), math.nan
    return values.mean(), student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5


def interval_text(values, digits=3):
    """The mean ± half the 95 % interval, in `digits` decimals."""
    return with_error(*interval(values), f".{digits}f")


def settings_of(loaded, keys):
    """For each run, those of the flags `keys` that vary among the runs, as in "conv, norm none, init sd 0.4"."""
    flags = [arrays["config"]["flags"] for arrays in loaded]
    vary = [key for key in keys if len({run.get(key) for run in flags}) > 1]

    def text(key, value):
        if key in ("data", "net"):
            return value
        return f"{key.replace('_', ' ')} {value if isinstance(value, str) else f'{value:g}'}"

    return [", ".join(text(key, run[key]) for key in vary if key in run) for run in flags]


def pair_and_samples(arrays, settings=""):
    """The name of a row: "KLD-B unbiased, N = 5"."""
    flags = arrays["config"]["flags"]
    estimator = "" if flags["estimator"] == "plugin" else f" {flags['estimator']}"
    return ", ".join(filter(None, (f"{arrays['config']['label']}{estimator}", f"N = {flags['samples']}", settings)))


def table_of_2d_runs(loaded):
    """A row for each data set and pair: NLL above that of the data's law in nats, and what tells whether training converged.

    Differences from KLD-ELBO are between members of the same seed and model, with the same N where KLD-ELBO has it.
    """
    lines = []
    models = settings_of(loaded, ("init_sd", "hidden", "batch"))
    named = list(zip(loaded, settings_of(loaded, ("init_sd", "hidden", "batch", "inner_steps", "bilevel_steps")), models))
    for data in dict.fromkeys(arrays["config"]["flags"]["data"] for arrays in loaded):
        group = sorted((run for run in named if run[0]["config"]["flags"]["data"] == data),
                       key=lambda run: (run[1], pair_order(run[0]["config"]["flags"]), pair_and_samples(*run[:2])))
        for arrays, settings, model in group:
            samples = arrays["config"]["flags"]["samples"]
            elbos = {run["config"]["flags"]["samples"]: run for run, _, other in group
                     if run["config"]["label"] == "KLD-ELBO" and other == model}
            elbo = elbos.get(samples, next(iter(elbos.values()), None))
            unknown = np.full_like(arrays["nll"], math.nan)  # the law's density, or what older versions did not measure
            excess, curve = arrays.get("nll_excess", unknown), arrays.get("excess_curve", arrays["nll_curve"])
            quarter, sd = len(curve) - 1 - (len(curve) - 1) // 4, arrays["posterior_sd"][-1]
            unused, moment = (sd > COLLAPSED).sum(-1), arrays.get("second_moment", np.full_like(sd, math.nan))
            lines.append([
                data, pair_and_samples(arrays, settings), np.isfinite(arrays["nll"]).sum(), interval_text(excess),
                number_text(mean_and_error(excess)[2], ".3f"),
                "" if elbo is None or arrays is elbo else interval_text(arrays["nll"] - elbo["nll"]),
                number_text(mean_and_error(curve[-1] - curve[quarter])[0], "+.3f"),
                f"{(unused == 1).sum()}, {(unused == 2).sum()}", interval_text(arrays.get("variance_ratio", unknown)),
                interval_text(moment[sd <= COLLAPSED], 2),
                interval_text(arrays["negative_elbo"][-1] - arrays["nll"]),
                number_text(mean_and_error(arrays.get("fisher_divergence", unknown))[0], ".3g")])
    header = ["data", "pair", "n", "NLL above the truth", "median", "less KLD-ELBO's (paired)", "change in the last quarter",
              "members with 1, 2 unused latents", "variance / data's", "E z^2, latents in use",
              "KL from q to the posterior", "Fisher divergence"]
    return markdown_table(header, lines, "llrrrrrrrrrr")


def table_of_image_runs(loaded):
    """A row for each pair and setting: final metrics over seeds, FID over KLD-ELBO's, FID's change in the last quarter.

    A ratio is of two runs of the same seed and setting, with the same N where KLD-ELBO has it.
    """
    groups, elbos = {}, {}
    for arrays, settings in zip(loaded, settings_of(loaded, ("data", "net", "norm", "init_sd", "epochs"))):
        flags = arrays["config"]["flags"]
        groups.setdefault((settings, *pair_order(flags), pair_and_samples(arrays, settings)), []).append(arrays)
        if arrays["config"]["label"] == "KLD-ELBO":
            elbos.setdefault((settings, flags["seed"]), {})[flags["samples"]] = arrays["fid"][-1]

    def ratio(arrays, settings):
        flags = arrays["config"]["flags"]
        found = elbos.get((settings, flags["seed"]), {})
        return arrays["fid"][-1] / found.get(flags["samples"], next(iter(found.values()), math.nan))

    scale = {"training_moment": "E z^2, training images", "predicted_moment": "its end by equation (6)"}
    scale = scale if any("predicted_moment" in arrays for arrays in loaded) else {}
    lines = []
    for (settings, *_, name), members in sorted(groups.items()):
        quarter = -1 - (len(members[0]["fid"]) - 1) // 4
        change = 100 * np.mean([arrays["fid"][-1] / arrays["fid"][quarter] - 1 for arrays in members])
        is_elbo = members[0]["config"]["label"] == "KLD-ELBO"
        lines.append([
            name, len(members),
            *(interval_text([arrays[key][-1] for arrays in members], 2)
              for key in ("fid", "fid_aggregate", "fid_reconstruction")),
            "" if is_elbo else interval_text([ratio(arrays, settings) for arrays in members], 2),
            number_text(change, "+.0f") + (" %" if np.isfinite(change) else ""),
            interval_text([arrays["second_moment"][-1].mean() for arrays in members], 2),
            *(interval_text([arrays.get(key, math.nan) for arrays in members], 2) for key in scale),
            interval_text([arrays["negative_elbo"][-1] for arrays in members], 1),
            interval_text([100 * arrays["reconstruction_mse"][-1] for arrays in members], 2),
            interval_text([arrays["latent_mmd"][-1] for arrays in members], 1),
            interval_text([arrays["posterior_fd"][-1] for arrays in members], 0)])
    header = ["pair", "n", "FID", "FID, aggregate posterior", "FID, reconstructions", "FID / KLD-ELBO's",
              "change in the last quarter", "E z^2", *scale.values(), "negative ELBO", "MSE x 100", "latent MMD^2",
              "posterior FD"]
    return markdown_table(header, lines, "l" + "r" * (len(header) - 1))
