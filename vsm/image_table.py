"""The table of image runs: means and standard errors over seeds beside the paper's numbers (Tables 1 and 2)."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vsm.loading import FLAGS
from vsm.packs import StoredRun
from vsm.runs import NOT_IDENTITY, flag_name, group_by_seed, save_arrays, write_atomic
from vsm.tables import markdown_table, mean_and_error_text

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())
COLUMNS = {"fid": "FID", "kid_x1000": "KID x1000", "fid_aggregate": "FID, aggregate", "fid_reconstruction": "FID, posterior",
           "negative_elbo": "-ELBO", "negative_iw_bound": "-IW bound", "reconstruction_mse": "MSE", "latent_mmd": "MMD^2",
           "posterior_fd": "posterior FD", "active_second_moment": "E z^2"}
AXES = ("data", "net", "infer", "learn", "seed")  # named by the table's other columns
NOTES = """- mean ± standard error over the runs, which differ in their seed; a diverged run is in no mean
- lower is better, but for E z^2, which is of the active latents under the aggregate posterior and 1 under the prior
- FID, aggregate: z from a Gaussian with the mean and diagonal variance of the aggregate posterior in place of the prior
- FID, posterior: one posterior sample of each test image, decoded""".splitlines()


class Measured(NamedTuple):
    """A run for the table: its arrays, its `status` (ok, diverged@<step>, unfinished@<epoch>), and what evaluate.py measured.

    The config of `run` has every flag; the label of an unfinished run says so. last: the last values of its curves. evaluation:
    the arrays of eval.npz, {} of a diverged run.
    """
    run: StoredRun
    status: str
    last: dict
    evaluation: dict

    @property
    def diverged(self):
        return self.status.startswith("diverged@")

    def numbers(self):
        """{column: value}, nan where it was not measured."""
        measured = self.last | {key: value for key, value in self.evaluation.items() if key.startswith("fid")}
        measured |= {"kid_x1000": 1000 * self.evaluation.get("kid", np.nan),
                     "negative_iw_bound": self.evaluation["negative_iw_bound"][-1]}
        return {key: float(measured.get(key, np.nan)) for key in COLUMNS}


def by_data_and_pair(measured):
    """Sort key: by data set and network, and within them as in the paper's tables."""
    flags, label = measured.run.config["flags"], measured.run.config["label"]
    return flags["data"], flags["net"], [*PAPER["objectives"], label].index(label), flags["seed"]


def write_table(measured, out):
    """table.md, also printed, and table.npz in the folder `out`, from a list of Measured."""
    configs = [each.run.config for each in measured]
    groups = group_by_seed([each.run for each in measured], configs)
    rows = [row_of(name, [measured[i] for i in members]) for name, members in groups]
    references = references_of(measured)
    save_arrays(out / "table.npz", {"runs": [each.run.name for each in measured], "paper": PAPER["source"]},
                **{key: np.array([row[key] for row in rows]) for key in rows[0]})
    text = "\n".join([table_of(rows, references), "", *NOTES, budget_note(configs), *map(reference_note, references),
                      f"- paper: {PAPER['source']}"])
    write_atomic(out / "table.md", f"{text}\n".encode())
    print(f"\n{text}\n\n{out}/table.md")


def row_of(name, members):
    """The row of a group of seeds: {column of table.npz: value}."""
    config, ok = members[0].run.config, [each.numbers() for each in members if not each.diverged]
    row = {"data": config["flags"]["data"], "net": config["flags"]["net"], "objectives": name, "n": len(ok),
           "diverged": len(members) - len(ok), **published(config)}
    for key in COLUMNS:
        values = np.array([numbers[key] for numbers in ok], float)
        row[f"{key}_mean"] = values.mean() if len(values) else np.nan
        row[f"{key}_se"] = values.std(ddof=1) / len(values)**0.5 if len(values) > 1 else np.nan
    return row


def published(config):
    """The paper's FID and KID x1000 for this data, network and pair, or nan."""
    flags, objectives = config["flags"], PAPER["objectives"]
    table = PAPER.get(f"{flags['data']} {flags['net']}")
    known = table and config["label"] in objectives and flags["latent"] == "gaussian"
    return {f"paper_{key}": table[key][objectives.index(config["label"])] if known else np.nan for key in ("fid", "kid_x1000")}


def references_of(measured):
    """For each set of test images a dict: what the numbers were made with (`about`), the floor, the MMD's null sd by latent
    space."""
    references = {}
    for each in measured:
        if each.evaluation:
            about, flags = each.evaluation["config"]["evaluation"], each.run.config["flags"]
            key = about["data"], about["test_images"], about.get("digest")
            floor = {name: value for name, value in each.evaluation.items() if name.endswith("_floor")}
            reference = references.setdefault(key, {"about": about, "floor": floor, "null_sd": {}})
            reference["null_sd"][f"{flags['dim_z']} {flags['latent']} latents"] = each.evaluation["latent_mmd_null_sd"]
    return list(references.values())


def table_of(rows, references):
    """The Markdown table: a row per group of seeds, then for each set of test images the floor, which is what training images
    get."""
    header = ["data", "net", "objectives", "runs"]
    for key, title in COLUMNS.items():
        header += [title, "paper"] if f"paper_{key}" in rows[0] else [title]
    lines = []
    for row in rows:
        diverged = f" (+{row['diverged']} diverged)" if row["diverged"] else ""
        line = [row["data"], row["net"], row["objectives"], f"{row['n']}{diverged}"]
        for key in COLUMNS:
            line.append(mean_and_error_text(row[f"{key}_mean"], row[f"{key}_se"]))
            if f"paper_{key}" in row:
                line.append(mean_and_error_text(row[f"paper_{key}"]))
        lines.append(line)
    for reference in references:
        if floor := reference["floor"]:
            about = reference["about"]
            line = [about["data"], "", f"floor: {about['test_images']} training images", "",
                    mean_and_error_text(floor["fid_floor"]), "", mean_and_error_text(1000 * floor["kid_floor"])]
            lines.append(line + [""] * (len(header) - len(line)))
    return markdown_table(header, lines, "llll" + "r" * (len(header) - 4))


def budget_note(configs):
    """The flags that all runs share and that are not the default."""
    defaults, flags = FLAGS["train_images"], [config["flags"] for config in configs]
    shared = [key for key in flags[0] if key not in (*NOT_IDENTITY, *AXES) and all(each[key] == flags[0][key] for each in flags)]
    budget = " ".join(f"--{flag_name(key)} {flags[0][key]}" for key in shared
                      if flags[0][key] != (flags[0]["samples"] if key == "infer_samples" else defaults[key]))
    return f"- budget of all runs: {budget or 'the defaults, which are those of the paper'}"


def reference_note(reference):
    """What the numbers against one set of test images mean and were made with."""
    about = reference["about"]
    n, network = about["test_images"], about.get("features")
    null = ", ".join(f"{sd:.2g} ({latents})" for latents, sd in reference["null_sd"].items())
    note = (f"- {about['data']}: MMD^2 is 0 for equal laws, with a standard deviation of {null}; "
            f"-IW bound: {about['iw_samples']} samples from q, first {min(n, about['images'])} test images; "
            "-ELBO and -IW bound in nats per noisy image, MSE per pixel of the clean one")
    if not network:
        return note
    accuracy = f", test accuracy {network['accuracy']:.4f}" if network["accuracy"] else ""
    return (f"- {about['data']}: FID and KID of N = {n} decoder means of prior draws against the {n} clean test images; "
            f"KID over 100 subsets of {min(n, 1000)}; features: {network['name']}{accuracy}, weights {network['hash']}\n{note}")
