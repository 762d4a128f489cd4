"""The table of image runs: means and their intervals over seeds beside the paper's numbers (Tables 1 and 2)."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models import NETS
from vsm.fid import ending_of
from vsm.flags import image_defaults
from vsm.names import flag_text, group_by_seed, in_order, panels_of, short_name, usual_flags
from vsm.runs import save_arrays, write_atomic
from vsm.samplers import SAMPLERS
from vsm.stored_runs import StoredRun
from vsm.tables import INTERVAL, count_failures, failed, failures_text, interval, markdown_table, mean_and_error_text

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())
COLUMNS = {"fid": "FID", "fid_infinite": "FID, infinite n", "kid_x1000": "KID x1000", "fid_aggregate": "FID, aggregate",
           "fid_reconstruction": "FID, posterior", "negative_elbo": "-ELBO", "negative_iw_bound": "-IW bound",
           "reconstruction_mse": "MSE", "latent_mmd": "MMD^2", "posterior_fd": "posterior FD", "active_second_moment": "E z^2"}
QUALITY = {"fid": "FID", "fid_infinite": "FID, infinite n", "kid_x1000": "KID x1000",  # the columns of the table of samplers
           **{key: key for key in ("precision", "recall", "density", "coverage", "nearest")}}
NAMES = ("data", "net", "objectives", "settings")  # the columns that say what a row is
AXES = ("data", "net", "infer", "learn", "estimator", "seed")  # flags that other columns than the settings show
NOTES = f"""- {INTERVAL}; a run that diverged or exploded is in no mean
- lower is better, except for E z^2, which is that of the active latents under the aggregate posterior; it is 1 under the prior
- FID and KID are those of the features in the row; values of other features are not comparable
- FID, infinite n: extrapolated from all and from half of the images, which removes most of the bias of few images
- FID, aggregate: z from a Gaussian with the mean and diagonal variance of the aggregate posterior in place of the prior
- FID, posterior: one posterior sample of each test image, decoded""".splitlines()
KEYS = tuple(dict.fromkeys([*COLUMNS, *(f"{key}{ending_of(name)}" for name in SAMPLERS for key in QUALITY)]))  # of table.npz


class Measured(NamedTuple):
    """A run as the table needs it.

    run: its config has every flag, and the label of an unfinished run says so. status: ok, diverged@<step>, exploded@<step> or
    unfinished@<epoch>. last: the last values of its curves. evaluation: the arrays of eval.npz, {} for a failed run.
    """
    run: StoredRun
    status: str
    last: dict
    evaluation: dict

    @property
    def failed(self):
        return failed(self.status)

    @property
    def features(self):
        """The name and the hash of the network behind FID and KID; None without one."""
        network = self.evaluation["config"]["evaluation"].get("features") if self.evaluation else None
        return network and (network["name"], network["hash"])

    def numbers(self):
        """{column: value} with NaN for what was not measured."""
        evaluation = self.evaluation
        measured = self.last | evaluation | {"negative_iw_bound": evaluation["negative_iw_bound"][-1]}
        measured |= {key.replace("kid", "kid_x1000"): 1000 * value for key, value in evaluation.items() if key.startswith("kid")}
        return {key: float(measured.get(key, np.nan)) for key in KEYS}


def by_data_and_pair(measured):
    """Sort key: by data set and network, and within them as in the paper's tables."""
    flags, label = measured.run.config["flags"], measured.run.config["label"]
    return flags["data"], flags["net"], [*PAPER["objectives"], label].index(label), flags["seed"]


def write_table(measured, out):
    """Write table.md and table.npz to the folder `out`, from a list of Measured, and print the table."""
    configs = [each.run.config for each in measured]
    groups = group_by_seed([each.run for each in measured], configs, leave_out_usual=True)
    names = {config["flags"]["data"] for config in configs}
    mixed = {data for data in names if len(bounds_of(each for each in measured if each.run.config["flags"]["data"] == data)) > 1}
    rows = [row_of(name, settings, [measured[i] for i in members], mixed) for name, settings, members in groups]
    rows.sort(key=lambda row: (row["data"], row["net"], in_order(row["settings"])))  # of one setting, in the order of `measured`
    references = references_of(measured)
    save_arrays(out / "table.npz", {"runs": [each.run.name for each in measured], "paper": PAPER["source"]},
                **{key: np.array([row[key] for row in rows]) for key in rows[0]})
    notes = [*NOTES, *(f"- {note}" for note in settings_notes(configs)), *map(reference_note, references)]
    text = "\n".join([table_of(rows, references), "", *samplers_table(rows, references), *notes, f"- paper: {PAPER['source']}"])
    write_atomic(out / "table.md", f"{text}\n".encode())
    print(f"\n{text}\n\n{out}/table.md")


def bounds_of(measured):
    """The importance-weighted bounds that the runs have: a set of (posterior samples, images)."""
    settings = [each.evaluation["config"]["evaluation"] for each in measured if each.evaluation]
    return {(each.get("iw_samples"), each.get("images")) for each in settings}


def row_of(name, settings, members, mixed_bounds=()):
    """The row of a group of seeds: {column of table.npz: value}. What was measured in different ways is NaN.

    mixed_bounds: the data sets of the table whose importance-weighted bounds were measured in several ways.
    """
    config, ok = members[0].run.config, [each.numbers() for each in members if not each.failed]
    features = sorted({each.features for each in members} - {None})
    evaluations = [each.evaluation["config"]["evaluation"] for each in members if each.evaluation]
    mixtures = {(each["components"], each.get("fits", 1)) for each in evaluations if "components" in each}
    row = {"data": config["flags"]["data"], "net": config["flags"]["net"], "objectives": name, "settings": settings, "n": len(ok),
           **dict(zip(("components", "fits"), max(mixtures, default=(0, 1)))),
           **count_failures([each.status for each in members]),
           "features": ", ".join(network for network, _ in features), **published(config)}
    for key in KEYS:
        values = np.array([numbers[key] for numbers in ok], float)
        if len(features) > 1 and key.startswith(("fid", "kid", "precision", "recall", "density", "coverage")) or \
                len(mixtures) > 1 and key.endswith(ending_of("mixture")) or \
                key == "negative_iw_bound" and row["data"] in mixed_bounds:
            values[:] = np.nan
        row[f"{key}_mean"], row[f"{key}_ci95"] = interval(values) if np.isfinite(values).all() else (np.nan, np.nan)
    return row


def published(config):
    """The paper's FID and KID x1000 for this data, network and pair; NaN where it has none."""
    flags, objectives = config["flags"], PAPER["objectives"]
    table = PAPER.get(f"{flags['data']} {flags['net']}")
    known = table and config["label"] in objectives and flags["latent"] == "gaussian"
    return {f"paper_{key}": table[key][objectives.index(config["label"])] if known else np.nan for key in ("fid", "kid_x1000")}


def references_of(measured):
    """A dict for each set of test images and network of features: its settings, the floor, and MMD's null sds by latent space.

    It has the numbers of draws and the bounds, as of `bounds_of`, that its runs have.
    """
    references = {}
    for each in measured:
        if each.evaluation:
            settings, flags = each.evaluation["config"]["evaluation"], each.run.config["flags"]
            key = *(settings.get(name) for name in ("data", "test_images", "digest")), each.features
            floor = {name: value for name, value in each.evaluation.items() if name.endswith("_floor")}
            reference = references.setdefault(
                key, {"settings": settings, "floor": floor, "null_sd": {}, "draws": set(), "bounds": set()})
            reference["draws"].add(settings.get("draws", 1))
            reference["bounds"] |= bounds_of([each])
            latents = f"{flags['dim_z']} {flags['latent']} latents"
            reference["null_sd"].setdefault(latents, []).append(float(each.evaluation["latent_mmd_null_sd"]))
    return list(references.values())


def table_of(rows, references):
    """The Markdown table: a row per group of seeds, then the floor of each set of test images.

    The floor is the FID and KID of as many training images.
    """
    header = [*NAMES, "n", "features"]
    for key, title in COLUMNS.items():
        header += [title, "paper"] if f"paper_{key}" in rows[0] else [title]
    lines = []
    for row in rows:
        others = f" (+{failures})" if (failures := failures_text(row)) else ""
        line = [*(row[name] for name in NAMES), f"{row['n']}{others}", row["features"]]
        for key in COLUMNS:
            line.append(mean_and_error_text(row[f"{key}_mean"], row[f"{key}_ci95"]))
            if f"paper_{key}" in row:
                line.append(mean_and_error_text(row[f"paper_{key}"]))
        lines.append(line)
    for reference in references:
        if floor := reference["floor"]:
            settings = reference["settings"]
            cells = {"data": settings["data"], "objectives": f"floor: {settings['test_images']} training images",
                     "features": settings["features"]["name"], COLUMNS["fid"]: mean_and_error_text(floor["fid_floor"]),
                     COLUMNS["fid_infinite"]: mean_and_error_text(floor.get("fid_infinite_floor", np.nan)),
                     COLUMNS["kid_x1000"]: mean_and_error_text(1000 * floor["kid_floor"])}
            lines.append([cells.get(title, "") for title in header])
    return markdown_table(header, lines, "llllll" + "r" * (len(header) - 6))


def samplers_table(rows, references):
    """The lines of the table of samplers: a row per group of seeds and sampler, and the floors; none for older evaluations."""
    lines = []
    for row, name in ((row, name) for row in rows for name in SAMPLERS):
        cells = [(row[f"{key}{ending_of(name)}_mean"], row[f"{key}{ending_of(name)}_ci95"]) for key in QUALITY]
        if np.isfinite([mean for mean, _ in cells[3:]]).any():  # one that older evaluations lack
            best = f", best of {row['fits']} fits" if row["fits"] > 1 else ""
            law = f"mixture of {row['components']}{best}" if name == "mixture" else name
            lines.append([*(row[name] for name in NAMES), law, *(mean_and_error_text(*cell) for cell in cells)])
    if not lines:
        return []
    for floor, data in ((reference["floor"], reference["settings"]["data"]) for reference in references):
        if "precision_floor" in floor:
            values = {**floor, "kid_x1000_floor": 1000 * floor["kid_floor"]}
            cells = [mean_and_error_text(values.get(f"{key}_floor", np.nan)) for key in QUALITY]
            lines.append([data, "", "", "", "training images", *cells])
    return [markdown_table([*NAMES, "z from", *QUALITY.values()], lines, "lllll" + "r" * len(QUALITY)), "",
            "- precision, recall, density, coverage: higher is better, with 5 neighbours among the features of FID",
            "- nearest: median distance, in pixels, to the nearest training image, over that of test images; copies have 0"]


def settings_notes(configs, named_elsewhere=()):
    """For each data set and network, a sentence on the values of flags that its settings leave out and that are no defaults.

    Flags that the rows name elsewhere are not in it.
    """
    notes = []
    for (data, net), members in panels_of(configs).items():
        usual = usual_flags([configs[i] for i in members])
        defaults = image_defaults(net if net in NETS else "conv", usual.get("samples"))
        named = " ".join(f"--{flag_text(key, value)}" for key, value in usual.items()
                         if key not in (*AXES, *named_elsewhere) and value != defaults.get(key))
        notes.append(f"{short_name(data)} {net}: where its settings name no other value, a run has "
                     + (f"{named}, and otherwise defaults" if named else "defaults"))
    return notes


def reference_note(reference):
    """A note on the numbers against one set of test images: their units, their null and the feature network."""
    settings = reference["settings"]
    n, network = settings["test_images"], settings.get("features")
    null = ", ".join(f"{np.mean(sds):.2g} ({latents})" for latents, sds in reference["null_sd"].items())
    bounds = " or ".join(f"{samples} samples from q, first {min(n, images)} test images"
                         for samples, images in sorted(reference["bounds"]))
    if len(reference["bounds"]) > 1:
        bounds += ", which do not compare, so none is shown (evaluate.py --images and --iw-samples makes them alike)"
    note = (f"- {settings['data']}: MMD^2 is 0 for equal laws, with a standard deviation of {null}; -IW bound: {bounds}; "
            "-ELBO and -IW bound in nats per noisy image, MSE per pixel of the clean one")
    if not network:
        return note
    accuracy = f", test accuracy {network['accuracy']:.4f}" if network["accuracy"] else ""
    draws = " or ".join(map(str, sorted(reference["draws"])))
    means = "" if draws == "1" else f", by the prior and by fitted samplers means over {draws} draws"
    return (f"- {settings['data']}: FID and KID of N = {n} decoder means of prior draws against the {n} clean test images{means}"
            f"; KID over 100 subsets of {min(n, 1000)}; features: {network['name']}{accuracy}, weights {network['hash']}\n{note}")
