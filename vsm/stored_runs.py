"""One way to read run folders and packs, each of which holds many run folders in one `.npz` (studies/packs.py writes them).

    for run in open_runs(["results/figure3.npz", "runs/synthetic/c"]):
        run.name, run.config, run.arrays("metrics")["nll"], run.has("eval")

docs/files.md describes the arrays of a pack. Values are kept to the bit. A pack has no checkpoints, and large arrays (HEAVY)
only where they were asked for.
"""

import fnmatch
import json
from pathlib import Path

import numpy as np

from vsm.cli import UserError
from vsm.runs import load_arrays, load_config

PARTS = ("metrics", "eval", "gradient_snr", "latent_scale")
HEAVY = ("model_samples", "test_data", "samples", "inputs", "reconstructions", "interpolations")  # kept only on request
MEASURED_BY = ("components", "fits", "draws", "features", "digest", "test_images")


class StoredRun:
    """One run, in a folder or in a pack. Messages call it by its `name`."""

    def __init__(self, name, read_config, read_part, parts):
        self.name, self._read_config, self._read_part, self._parts = name, read_config, read_part, parts

    def __str__(self):
        return self.name

    @property
    def config(self):
        """Flags, label and versions. Raises UserError where there is no config.json of a run."""
        return self._read_config()

    @property
    def short_name(self):
        """The name of the run's folder, without the path of the folder or pack."""
        return self.name.rpartition(":")[2].rstrip("/").rpartition("/")[2]

    def has(self, part):
        return part in self._parts

    def arrays(self, part="metrics"):
        """The arrays of a part (a name in PARTS) and its `config`, a dict.

        Raises UserError where it is missing, and where the run went on after it was measured.
        """
        arrays = self._read_part(part)
        if part != "metrics" and self._went_on_after(arrays):
            raise UserError(f"{self.name} was trained further after its {part}.npz was measured; measure it again")
        return arrays

    def _went_on_after(self, arrays):
        at = arrays.get("config", {}).get("flags", {}).get("epochs")
        other_budget = at is not None and at != self.config["flags"]["epochs"]
        was_unfinished = str(arrays.get("status", "")).startswith("unfinished@")
        return other_budget or was_unfinished and "status" in self._read_part("metrics")

    def finished(self):
        """The arrays of metrics.npz of a run that has ended. Raises UserError for one that has not."""
        arrays = self.arrays()
        if "status" not in arrays:
            raise UserError(f"{self.name} has not ended; the command that began it resumes it")
        return arrays


def open_runs(paths):
    """A list of StoredRun from run folders, packs (all their runs) and StoredRuns. Raises UserError for anything else."""
    runs = []
    for path in paths:
        if isinstance(path, StoredRun):
            runs.append(path)
        elif Path(path).suffix == ".npz" and not Path(path).is_dir():
            runs += _open_pack(Path(path))
        else:
            runs.append(_open_folder(Path(path)))
    return runs


def add_run_flags(parser):
    """Give an argparse parser the flags that `chosen_runs` reads."""
    flag = parser.add_argument
    flag("runs", nargs="+", metavar="RUN", help="run folders, or packs of runs (.npz)")
    flag("--only", nargs="+", default=["*"], metavar="GLOB", help="use only the runs whose names match one of these patterns")
    flag("--without", nargs="+", default=[], metavar="GLOB", help="leave out the runs whose names match one of these patterns")


def chosen_runs(args):
    """The opened runs that these flags name, at least one. Raises UserError where there is none."""
    def matches(run, globs):
        return any(fnmatch.fnmatch(run.short_name, glob) for glob in globs)

    runs = [run for run in open_runs(args.runs) if matches(run, args.only) and not matches(run, args.without)]
    if not runs:
        raise UserError("--only and --without leave no run")
    return runs


def measured_by(evaluation):
    """The settings of evaluate.py, `evaluation` in the config of eval.npz, that FIDs to compare must share."""
    return {key: evaluation.get(key, 1) for key in MEASURED_BY}


def refuse_other_scripts(name, runs, scripts):
    """Raises UserError for runs that none of the `scripts` made, or that two of them made; `name` is the reader's."""
    for run in runs:
        if (made_by := run.config["script"]) not in scripts:
            names = " or ".join(f"{script}.py" for script in scripts)
            raise UserError(f"{run} is a run of {made_by}.py; {name} draws runs of {names}")
        if made_by != runs[0].config["script"]:
            raise UserError(f"{run} is a run of {made_by}.py and {runs[0]} one of {runs[0].config['script']}.py; "
                            "draw them separately")


def _regular(file):
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is not a regular file")
    return file


def _open_folder(folder):
    def read_config():
        _regular(folder / "config.json")
        return load_config(folder)

    return StoredRun(str(folder), read_config, lambda part: load_arrays(_regular(folder / f"{part}.npz")),
                     [part for part in PARTS if (folder / f"{part}.npz").exists()])


def _open_pack(path):
    if not _regular(path).exists():
        raise UserError(f"{path} does not exist")
    arrays = load_arrays(path)
    if not {"runs", "blocks", "index"} <= arrays.keys():
        raise UserError(f"{path} is not a pack of runs; name the folder of a run, or a pack that `python -m studies.packs` made")
    names, blocks, index = list(map(str, arrays["runs"])), list(map(str, arrays["blocks"])), arrays["index"]
    fits = (index.shape == (len(names), len(blocks)) and np.issubdtype(index.dtype, np.integer) and {*blocks} <= arrays.keys()
            and all(index[:, k].max(initial=-1) < len(arrays[block]) for k, block in enumerate(blocks))
            and index.min(initial=0) >= -1)
    if not fits:
        raise UserError(f"{path} is damaged (its index does not fit its blocks)")
    return [_packed_run(f"{path}:{name}", dict(zip(blocks, row)), arrays) for name, row in zip(names, index)]


def _packed_run(name, rows, arrays):
    found = {block: arrays[block][row] for block, row in rows.items() if row >= 0}
    parts = {part: {} for part in PARTS}
    for block, value in found.items():
        part, key, *_ = block.split(".")
        if part in parts:
            parts[part][key] = value

    def read_config():
        try:
            return json.loads(str(found["config.json"]))
        except (KeyError, ValueError) as error:
            raise UserError(f"{name} is damaged (its config.json is missing or is not JSON)") from error

    def read_part(part):
        if not parts[part]:
            raise UserError(f"{name} has no {part}.npz")
        config = json.loads(str(parts[part]["config"])) if "config" in parts[part] else read_config()
        return {**parts[part], "config": config}

    return StoredRun(name, read_config, read_part, [part for part in PARTS if parts[part]])


def shown_member(nll):
    """The member that figures show: the one with the median of the finite NLLs; None where all members diverged."""
    alive = np.isfinite(nll).sum()
    return int(np.argsort(nll)[(alive - 1) // 2]) if alive else None


def samples_of_member(arrays, member):
    """The model samples of one member; a pack has those of the member `model_samples_of` only. Raises KeyError for another."""
    kept = arrays.get("model_samples_of", np.arange(len(arrays["model_samples"])))
    if member not in kept:
        raise KeyError(f"model_samples of member {member}")
    return arrays["model_samples"][kept == member][0]
