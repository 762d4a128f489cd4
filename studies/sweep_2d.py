"""The points of a sweep of 2-D runs: what the figures `synthetic` and `study` draw."""

from functools import cache

import numpy as np
import torch

from vsm.cli import UserError
from vsm.distributions_2d import DISTRIBUTIONS, distribution
from vsm.names import NOT_IDENTITY, pair_name, pair_order, refuse_twins
from vsm.stored_runs import open_runs
from vsm.tables import mean_and_error

SWEEP_AXES = ("data", "learn", "infer", "estimator", "samples", "infer_samples", "inner_steps", "inner_lr", "bilevel_steps",
              "seed", "seeds", *NOT_IDENTITY)  # flags in which the runs of one figure may differ


def name_order(point):
    """Sort key of points: in the order of their pairs, then by name."""
    return *pair_order(point["flags"]), point["name"]


def sweep_points(runs):
    """A list of dicts, one for each data set, J, name and K, over the members of all runs that share these.

    nll and divergence: (mean, standard error, median) over the members. members: the values behind them. truth: the values of the
    data's law at the same test points. diverged: a flag for each member. Raises UserError for runs of one data set that differ in
    more than SWEEP_AXES, or that share a seed.
    """
    opened = open_runs(runs)
    loaded = [run.finished() for run in opened]
    first = {}
    for flags in (arrays["config"]["flags"] for arrays in loaded):
        reference = first.setdefault(flags["data"], flags)
        if differ := sorted(key for key in reference if key not in SWEEP_AXES and flags.get(key) != reference[key]):
            raise UserError(f"the runs of {flags['data']} differ in {', '.join(differ)}; "
                            "draw runs that differ in nothing but the objective, data, K, J and seeds")
    groups = {}
    for run, arrays in zip(opened, loaded):
        flags = arrays["config"]["flags"]
        key = flags["data"], flags["bilevel_steps"], pair_name(arrays["config"]), flags["inner_steps"]
        groups.setdefault(key, []).append((run.name, range(flags["seed"], flags["seed"] + flags["seeds"]), arrays))
    points = []
    for (data, J, name, K), members in groups.items():
        refuse_twins([(run, seeds) for run, seeds, _ in members])
        points.append({"data": data, "J": J, "name": name, "K": K, **sweep_point([arrays for *_, arrays in members])})
    return points


def sweep_point(group):
    """The statistics of one point from the arrays of its runs."""
    def of_members(key):
        return np.concatenate([arrays[key] for arrays in group])

    divergence = "fisher_divergence" if "fisher_divergence" in group[0] else "sm_loss"
    members = {"nll": of_members("nll"), "divergence": of_members(divergence)}
    if all("variance_ratio" in arrays for arrays in group):
        members["variance_ratio"] = of_members("variance_ratio")
    nll, loss = truth_of(group[0])
    return {
        "flags": group[0]["config"]["flags"],
        "members": members,
        "diverged": of_members("diverged_at") >= 0,
        "truth": {"nll": nll, "divergence": loss if divergence == "sm_loss" else 0.0},
        "divergence_name": {"fisher_divergence": "Fisher divergence", "sm_loss": "score-matching loss"}[divergence],
        **{key: tuple(map(float, mean_and_error(values))) for key, values in members.items()},
    }


def truth_of(arrays):
    """NLL and score-matching loss of the data's law at the run's test points; if these are missing, its entropy and NaN."""
    if "test_data" in arrays:
        flags = arrays["config"]["flags"]
        return law_at(flags["data"], flags.get("noise", 0), arrays["test_data"].tobytes())
    return float(arrays.get("data_entropy", np.nan)), np.nan


@cache
def law_at(name, noise, points):
    """Mean NLL (nats) and score-matching loss of a law with noise over float32 points [n, 2], given as bytes; NaN if unknown."""
    law = distribution(name, noise) if name in DISTRIBUTIONS else None
    if law is None or law.log_prob is None:
        return np.nan, np.nan
    points = torch.tensor(np.frombuffer(points, np.float32).reshape(-1, 2)).double()
    return -law.log_prob(points).mean().item(), law.score_matching_loss(points).mean().item()
