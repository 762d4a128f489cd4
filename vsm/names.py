"""What runs are called, in folders, tables and figures, and which flags make a run what it is.

A run is described by its config, {"flags": {...}, "label": "KLD-F", ...}, as config.json holds it. The label of a pair of
objectives is `objectives.label`.
"""

import hashlib
import json
import os
import re
from pathlib import Path

from objectives import INFER, LEARN
from vsm.cli import UserError

# Flags that say where and how to compute, not what. They may change between two calls on one folder.
NOT_IDENTITY = ("out", "overwrite", "device", "data_root", "no_graph", "compile", "jobs")
BUDGET = "epochs"  # the flag in which a run may differ from the one that it continues
LONGEST_NAME = 200  # characters of a run's name; file systems allow 255


def run_name(args, axes, defaults):
    """The name of a run's folder: the values of the flags `axes`, then every other flag that differs from its default.

    Runs with different flags never share a name. A name of more than LONGEST_NAME characters is cut and ends in a digest of all
    of it.
    """
    def text(key, value):
        if key == "data" and isinstance(value, str):
            return short_name(value)
        return "+".join(map(str, value)) if isinstance(value, list) else str(value)

    extra = [flag_text(key, value if value is True else text(key, value), "") for key, value in vars(args).items()
             if key not in (*axes, *NOT_IDENTITY, BUDGET) and value != defaults[key]]
    seed = [f"seed{args.seed}"] if "seed" in axes else []
    name = "-".join([text(key, getattr(args, key)) for key in axes if key != "seed"] + extra + seed)
    name = name.replace("/", "_").replace(":", "_")
    if len(name) <= LONGEST_NAME:
        return name
    end = "-".join([hashlib.sha256(name.removesuffix("".join(seed)).encode()).hexdigest()[:8], *seed])
    return f"{name[:LONGEST_NAME - len(end) - 1]}-{end}"


def flag_name(key):
    return key.replace("_", "-")


def flag_text(key, value, between=" "):
    """A flag and its value, "inner-steps 1"; of a flag without a value its name alone."""
    return flag_name(key) + ("" if value is True else f"{between}{value}")


def short_name(data_flag):
    """A data set's name for run folders and titles: folder:/long/path/faces becomes folder-faces-ab12cd, other names stay.

    The six hexadecimal digits come from a hash of the path, so that two folders of the same name differ.
    """
    if not data_flag.startswith("folder:"):
        return data_flag
    path = data_flag.removeprefix("folder:")
    last = re.sub(r"[^\w.]+", "_", Path(path).name)[:40].strip("._")
    return "-".join(["folder", *filter(None, [last]), hashlib.sha256(os.fsencode(path)).hexdigest()[:6]])


def letter_of(flags):
    """The letter of a run's learning objective: F for an S that equals F. An unknown name stands for itself."""
    entry = LEARN.get(flags["learn"])
    if entry is None:
        return flags["learn"]
    return entry.alias(flags.get("samples"), flags.get("estimator", "plugin")) or entry.letter


def pair_order(flags):
    """Sort key of flags: learning objectives in the order of LEARN, then inference in that of INFER, unknown ones last."""

    def position(name, names):
        return names.index(name) if name in names else len(names)

    letters = list(dict.fromkeys(entry.letter for entry in LEARN.values()))
    return position(letter_of(flags), letters), position(flags["infer"], list(INFER))


def objectives_name(config):
    """The pair of objectives with its estimator, where that is not plugin: "KLD-B unbiased"."""
    estimator = config["flags"]["estimator"]
    return config["label"] + (f" {estimator}" if estimator != "plugin" else "")


def pair_name(config, one_sample=False):
    """The pair of objectives with its estimator and N: "KLD-B unbiased, N = 5".

    N = 1 is left out, unless `one_sample`.
    """
    samples = config["flags"]["samples"]
    return objectives_name(config) + (f", N = {samples}" if one_sample or samples > 1 else "")


def usual_flags(configs):
    """{flag: the value that more than half of these runs have}, of flags that make a run what it is."""
    values = {}
    for config in configs:
        for key, value in config["flags"].items():
            if key not in (*NOT_IDENTITY, "seed"):
                values.setdefault(key, []).append(value)
    common = {key: max(found, key=found.count) for key, found in values.items()}
    return {key: value for key, value in common.items() if values[key].count(value) > len(configs) / 2}


def settings_of(configs, keys, usual=None):
    """For each config, those of the flags `keys` that vary among them, as in "conv, N = 5, init-sd 0.4".

    The values of `usual` {flag: value} are left out. Without one, a switch is named where it is on.
    """
    flags, usual = [config["flags"] for config in configs], usual or {}
    vary = [key for key in keys if len({run.get(key) for run in flags}) > 1]

    def text(key, value):
        if key in ("data", "net"):
            return value
        if key == "samples":
            return f"N = {value}"
        if value is None or value is False:
            return f"without {flag_name(key)}" if key in usual else ""
        return flag_text(key, f"{value:g}" if isinstance(value, float) else value)

    return [", ".join(filter(None, (text(key, run[key]) for key in vary if key in run and (key, run[key]) not in usual.items())))
            for run in flags]


def in_order(settings):
    """Sort key of such a text, by which width 8 comes before width 16 and the usual settings, which have no text, come first."""
    return [float(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", settings))]


def panels_of(configs):
    """{(data, network): the indices of its image runs}."""
    panels = {}
    for i, config in enumerate(configs):
        panels.setdefault((config["flags"]["data"], config["flags"]["net"]), []).append(i)
    return panels


def settings_in_panels(configs, named, leave_out_usual=False):
    """For each image run the text of `settings_of` among the runs of its data and network, without the flags `named` elsewhere.

    With leave_out_usual, it is without the values of `usual_flags` there.
    """
    texts = {}
    for members in panels_of(configs).values():
        mine = [configs[i] for i in members]
        keys = dict.fromkeys(key for config in mine for key in config["flags"])  # older runs lack some
        keys = [key for key in keys if key not in (*NOT_IDENTITY, *named, "seed")]
        texts |= zip(members, settings_of(mine, keys, usual_flags(mine) if leave_out_usual else None))
    return [texts[i] for i in range(len(configs))]


def group_by_seed(runs, configs, leave_out_usual=False):
    """Group runs that differ in their seed alone: a list of (name, settings, indices into `runs` and their `configs`).

    The name is that of the objectives and their estimator, "KLD-B unbiased". The settings are the flags in which the group
    differs from others of the same data and network, "N = 5, width 8", if asked without those of `usual_flags` there. Raises
    UserError if a group has a seed twice, which would make its spread too small.
    """
    groups, settings = {}, settings_in_panels(configs, ("learn", "infer", "estimator"), leave_out_usual)
    for i, config in enumerate(configs):
        flags = {key: value for key, value in config["flags"].items() if key not in (*NOT_IDENTITY, "seed")}
        groups.setdefault(json.dumps([config["label"], flags], sort_keys=True), []).append(i)
    for members in groups.values():
        refuse_twins([(runs[i], [configs[i]["flags"]["seed"]]) for i in members])
    return [(objectives_name(configs[members[0]]), settings[members[0]], members) for members in groups.values()]


def refuse_twins(runs):
    """Raises UserError if two `runs` of one experiment, each given as (folder, seeds), share a seed."""
    first = {}
    for run, seeds in runs:
        for seed in seeds:
            if seed in first:
                raise UserError(f"{first[seed]} and {run} are the same experiment with the same seed {seed}; "
                                "leave one of them out")
            first[seed] = run
