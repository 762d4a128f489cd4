"""The numbers behind the figures of finished runs of one script, as a Markdown table.

    python -m studies.tables runs/synthetic/* --save runs/study.md

A row has final values, means over seeds with their intervals, comparisons with the ELBO paired by seed (differences of NLL,
ratios of FID), and what tells whether training has converged.
"""

import math
from collections import Counter
from pathlib import Path

import numpy as np

from vsm.cli import Parser, UserError, command_line
from vsm.fid import FIDS
from vsm.image_table import settings_notes
from vsm.names import (
    in_order,
    objectives_name,
    pair_name,
    pair_order,
    refuse_twins,
    settings_in_panels,
    settings_of,
    short_name,
)
from vsm.runs import write_atomic
from vsm.stored_runs import add_run_flags, chosen_runs, measured_by, refuse_other_scripts
from vsm.tables import INTERVAL, count_failures, failures_text, interval, markdown_table, mean_and_error, number_text, with_error

IN_NAME = ("learn", "infer", "estimator", "samples")  # flags that the name of a row shows
NOTE = f"{INTERVAL}. The last quarter of training is a quarter of its evaluations, at least one."
COLLAPSED = 0.9  # a latent whose posterior SD is above this, on average over the data, is not in use


def study_table(runs):
    """The Markdown table of finished runs of one script, 2-D or image runs, with notes below it."""
    loaded = [run.finished() | latent_scale_of(run) | mixture_of(run) | {"run": run.name} for run in runs]
    if loaded[0]["config"]["script"] == "train_synthetic":
        return f"{table_of_2d_runs(loaded)}\n\n{NOTE}\n"
    configs = [arrays["config"] for arrays in loaded]
    named = ("samples",) if names_samples(configs) else ()
    notes = [NOTE, *(f"{note}." for note in settings_notes(configs, named)), *network_notes(loaded)]
    return "\n\n".join([table_of_image_runs(loaded), *notes]) + "\n"


def names_samples(configs):
    """Whether the rows of image runs name N: whether it varies."""
    return len({config["flags"]["samples"] for config in configs}) > 1


def latent_scale_of(run):
    """What studies/latent_scale.py measured of a run, under names of their own; nothing where it did not."""
    names = {"second_moment": "training_moment", "predicted_moment": "predicted_moment"}
    return {mine: run.arrays("latent_scale")[key] for key, mine in names.items()} if run.has("latent_scale") else {}


def mixture_of(run):
    """FID by a fitted mixture, where evaluate.py has measured it, and by the prior at the end, of the same number of draws.

    A run without --fid-every has the other FIDs of evaluate.py in place of its curves.
    """
    evaluation, curves = run.arrays("eval") if run.has("eval") else {}, run.arrays()
    if "fid_mixture" not in evaluation:
        return {}
    return {"fid_mixture": evaluation["fid_mixture"], "fid_end": evaluation["fid"],
            "measured_by": measured_by(evaluation["config"]["evaluation"]),
            **{key: np.atleast_1d(evaluation[key]) for key in FIDS if key not in curves}}


def network_notes(loaded):
    """A sentence for each data set of image runs whose FIDs are by several networks, or by some not recorded."""
    counts = {}
    for arrays in loaded:
        if "fid" in arrays:
            networks = counts.setdefault(arrays["config"]["flags"]["data"], Counter())
            networks[str(arrays.get("fid_features", "a network that was not recorded"))] += 1
    return [f"FID on {data} is by " + " and by ".join(f"{network} (runs: {count})" for network, count in networks.items()) +
            ", so rows may differ by it." for data, networks in counts.items() if len(networks) > 1]


def interval_text(values, digits=3, n=None):
    """The mean ± half the 95 % interval, in `digits` decimals, with the number of finite values where it is not `n`."""
    count = np.isfinite(np.asarray(values, float)).sum()
    return with_error(*interval(values), f".{digits}f") + (f" (n = {count})" if n and 0 < count != n else "")


def row_name(arrays, settings):
    """The name of a row: "KLD-B unbiased, N = 5", with the settings that vary."""
    return ", ".join(filter(None, (pair_name(arrays["config"], one_sample=True), settings)))


def table_of_2d_runs(loaded):
    """A row for each data set and pair: NLL above that of the data's law in nats, and what tells whether training converged.

    Differences from KLD-ELBO are between members of the same seed, model and data, with the same N, K, J, steps and epochs where
    KLD-ELBO has them.
    """
    rows = []
    of_model = ("init_sd", "gamma", "hidden", "batch", "noise", "test_size")
    of_training, unnamed = ("inner_steps", "bilevel_steps", "epochs", "infer_samples", "lr"), ("lr_half_life", "inner_lr")
    for data in dict.fromkeys(arrays["config"]["flags"]["data"] for arrays in loaded):
        mine = [arrays for arrays in loaded if arrays["config"]["flags"]["data"] == data]
        configs = [arrays["config"] for arrays in mine]
        group = sorted(zip(mine, settings_of(configs, of_model + of_training), settings_of(configs, of_model)),
                       key=lambda run: (in_order(run[1]), pair_order(run[0]["config"]["flags"]), row_name(*run[:2])))
        for arrays, settings, model in group:
            elbos = [run for run, _, other in group if run["config"]["label"] == "KLD-ELBO" and other == model]
            flags, theirs = arrays["config"]["flags"], {}
            for elbo in sorted(elbos, key=lambda elbo: [elbo["config"]["flags"].get(key) == flags.get(key)
                                                        for key in ("samples", *of_training, *unnamed)]):
                theirs |= by_seed(elbo)  # of the members of one seed, that of the run most like this one
            less = [nll - theirs.get(seed, math.nan) for seed, nll in by_seed(arrays).items()]
            unknown = np.full_like(arrays["nll"], math.nan)  # the law's density, or what older versions did not measure
            excess, curve = arrays.get("nll_excess", unknown), arrays.get("excess_curve", arrays.get("nll_curve", unknown[None]))
            sd = arrays["posterior_sd"][-1]
            unused, moment = (sd > COLLAPSED).sum(-1), arrays.get("second_moment", np.full_like(sd, math.nan))
            rows.append({
                "data": data, "pair": row_name(arrays, settings), "n": np.isfinite(arrays["nll"]).sum(),
                "NLL above the truth": interval_text(excess), "median": number_text(mean_and_error(excess)[2], ".3f"),
                "less KLD-ELBO's (paired)": "" if arrays["config"]["label"] == "KLD-ELBO" or not theirs else interval_text(less),
                "change in the last quarter": number_text(mean_and_error(curve[-1] - before_the_last_quarter(curve))[0], "+.3f"),
                "members with 1, 2 unused latents": f"{(unused == 1).sum()}, {(unused == 2).sum()}",
                "variance / data's": interval_text(arrays.get("variance_ratio", unknown)),
                "E z^2, latents in use": interval_text(moment[sd <= COLLAPSED], 2),
                "KL from q to the posterior": interval_text(arrays["negative_elbo"][-1] - arrays["nll"]),
                "Fisher divergence": number_text(mean_and_error(arrays.get("fisher_divergence", unknown))[0], ".3g")})
    return table_of(rows, names=2)


def by_seed(arrays):
    """The NLL of each member of a 2-D run by its seed."""
    first = arrays["config"]["flags"].get("seed", 0)
    return {first + i: nll for i, nll in enumerate(arrays["nll"])}


def table_of_image_runs(loaded):
    """A row for each pair and setting: final metrics over seeds, and how they changed in the last quarter of training.

    Runs with --fid-every have FIDs, FID's change in %, and FID over KLD-ELBO's: of two runs of the same seed and setting, with
    the same N where KLD-ELBO has it. Runs that evaluate.py has measured with a fitted mixture have FIDs and ratios by that too.
    Where no run has --fid-every, the change is that of the negative ELBO, in nats. A failed run is in no mean. Raises UserError
    where two runs of a row share a seed, and where FIDs of one data set were measured with other settings of evaluate.py.
    """
    refuse_unlike_measurements(loaded)
    groups, elbos, measured = {}, {}, {key for arrays in loaded for key in arrays}
    changing = "fid" if any(len(arrays.get("fid", ())) > 1 for arrays in loaded) else "negative_elbo"
    several_n = names_samples([arrays["config"] for arrays in loaded])
    texts = settings_in_panels([arrays["config"] for arrays in loaded], IN_NAME, leave_out_usual=True)
    for settings, arrays in zip(texts, loaded):
        flags, config = arrays["config"]["flags"], arrays["config"]
        setting = flags["data"], flags["net"], settings
        name = pair_name(config, one_sample=True) if several_n else objectives_name(config)
        groups.setdefault((*setting, name), []).append(arrays)
        if config["label"] == "KLD-ELBO" and arrays["status"] == "ok":
            elbos.setdefault((*setting, flags["seed"]), {})[flags["samples"]] = arrays

    def order(group):
        (data, net, settings, name), members = group
        return data, net, in_order(settings), pair_order(members[0]["config"]["flags"]), name

    rows = []
    for (data, net, settings, name), runs in sorted(groups.items(), key=order):
        refuse_twins([(arrays["run"], [arrays["config"]["flags"]["seed"]]) for arrays in runs])
        failures = failures_text(count_failures([str(arrays["status"]) for arrays in runs]))
        members = [arrays for arrays in runs if arrays["status"] == "ok"]
        theirs = None
        if runs[0]["config"]["label"] != "KLD-ELBO":
            theirs = [elbo_of(arrays, elbos.get((data, net, settings, arrays["config"]["flags"]["seed"]), {}))
                      for arrays in members]
        rows.append({"data": short_name(data), "net": net, "objectives": name, "settings": settings,
                     "n": f"{len(members)}{f' (+{failures})' if failures else ''}",
                     **image_columns(members, theirs, measured, changing)})
    return table_of(rows, names=4)


def elbo_of(arrays, elbos):
    """Of the runs of KLD-ELBO {N: arrays}, that with this run's N, or else any; {} without one."""
    return elbos.get(arrays["config"]["flags"]["samples"], next(iter(elbos.values()), {}))


def image_columns(members, elbos, measured, changing):
    """{title: text} of runs that differ in their seed alone, from the metrics that any run of the table has `measured`.

    elbos: the run of KLD-ELBO that each is compared with; None for KLD-ELBO itself. changing: the metric whose change is shown.
    """
    def over_seeds(key, digits, factor=1):
        return interval_text([factor * final(arrays, key) for arrays in members], digits, len(members))

    def over_elbo(key):
        ratios = [final(mine, key) / final(theirs, key) for mine, theirs in zip(members, elbos or [])]
        return "" if elbos is None else interval_text(ratios, 2, len(members))

    def changes(key, change):
        curves = [arrays[key][np.isfinite(arrays[key])] for arrays in members if key in arrays]  # FID is not always due
        return interval([change(before_the_last_quarter(curve), curve[-1]) for curve in curves if len(curve)])[0]

    columns = {}
    if "fid" in measured:
        columns = {"FID": over_seeds("fid", 2), "FID, aggregate posterior": over_seeds("fid_aggregate", 2),
                   "FID, reconstructions": over_seeds("fid_reconstruction", 2), "FID / KLD-ELBO's": over_elbo("fid")}
    if changing == "fid":
        change = changes("fid", lambda before, end: 100 * (end / before - 1))
        columns["change in the last quarter"] = number_text(change, "+.0f") + (" %" if np.isfinite(change) else "")
    if "fid_mixture" in measured:
        columns |= {"FID, mixture": over_seeds("fid_mixture", 2), "the same / KLD-ELBO's": over_elbo("fid_mixture")}
    columns["E z^2"] = over_seeds("second_moment", 2)
    if "predicted_moment" in measured:
        columns |= {"E z^2, training images": over_seeds("training_moment", 2),
                    "its end by equation (6)": over_seeds("predicted_moment", 2)}
    columns["negative ELBO"] = over_seeds("negative_elbo", 1)
    if changing == "negative_elbo":
        change = changes("negative_elbo", lambda before, end: end - before)
        columns["its change in the last quarter"] = number_text(change, "+.1f")
    return columns | {"MSE x 100": over_seeds("reconstruction_mse", 2, 100), "latent MMD^2": over_seeds("latent_mmd", 1),
                      "posterior FD": over_seeds("posterior_fd", 0)}


def refuse_unlike_measurements(loaded):
    first = {}
    for arrays in loaded:
        if "measured_by" in arrays:
            other = first.setdefault(arrays["config"]["flags"]["data"], arrays)
            if differ := [key for key, value in arrays["measured_by"].items() if value != other["measured_by"][key]]:
                raise UserError(f"{other['run']} and {arrays['run']} were evaluated with other {' and '.join(differ)}; "
                                "evaluate.py with the same flags makes them alike")


def table_of(rows, names):
    """The Markdown table of rows {title: cell}, whose first columns are names."""
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows], "l" * names + "r" * (len(rows[0]) - names))


def final(arrays, key):
    """The value at the end of training, a mean over latents where there is one of each; NaN where it was not measured.

    FID is the one of evaluate.py where it has measured FID by a mixture too.
    """
    values = arrays.get(f"{key}_end", arrays.get(key, math.nan))
    return float(np.mean(np.atleast_1d(values)[-1]))


def before_the_last_quarter(curve):
    """The values a quarter of the evaluations before the last, at least one; NaN where training had only begun there."""
    evaluations = len(curve) - 1
    return curve[-1 - max(1, evaluations // 4)] if evaluations > 1 else np.full_like(curve[-1], math.nan)


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add_run_flags(parser)
    parser.add_argument("--save", required=True, metavar="FILE.md", help="the table to write")
    args = parser.parse_args(argv)
    if Path(args.save).suffix != ".md":
        parser.error(f"--save {args.save} must end in .md")
    return args


def main(args):
    runs = chosen_runs(args)
    refuse_other_scripts("this table", runs, ["train_synthetic", "train_images"])
    write_atomic(Path(args.save), study_table(runs).encode())
    print(args.save)


if __name__ == "__main__":
    command_line(parse_args, main)
