"""Write many runs into one `.npz`, a pack, which vsm/stored_runs.py reads; docs/files.md describes its arrays.

    python -m studies.packs runs/synthetic/* --save runs/mine.npz --keep test_data
"""

import json
from pathlib import Path

import numpy as np

from vsm.cli import Parser, UserError, command_line
from vsm.runs import save_arrays
from vsm.stored_runs import HEAVY, PARTS, add_run_flags, chosen_runs, open_runs, shown_member


def pack(paths, save, keep=()):
    """Write runs into one pack.

    The large arrays of HEAVY are kept where `keep` lists them, model samples only those of the member that figures show.
    Raises UserError for two runs of the same name, and for one without metrics.
    """
    runs = open_runs(paths)
    names = [run.short_name for run in runs]
    if len({*names}) < len(names):
        twin = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two of these runs are named {twin}; rename a folder, or leave one out")
    if lost := [name for run, name in zip(runs, names) if not run.has("metrics")]:
        raise UserError(f"{lost[0]} has no metrics.npz")
    blocks, names_of, rows = {}, {}, []
    for run, name in zip(runs, names):
        rows.append({})
        for key, value in _record(run, keep).items():
            kind = key, value.shape, "U" if value.dtype.kind == "U" else value.dtype.str  # strings of any length share a block
            variant = sum(other[0] == key for other in names_of)
            block = names_of.setdefault(kind, f"{key}.{variant}" if variant else key)
            values = blocks.setdefault(block, {})
            rows[-1][block] = values.setdefault(value.tobytes(), (len(values), value))[0]
    index = np.array([[row.get(block, -1) for block in blocks] for row in rows], np.int32)
    stacked = {block: np.stack([value for _, value in values.values()]) for block, values in blocks.items()}
    save_arrays(Path(save), {"script": runs[0].config["script"]},
                runs=np.array(names), blocks=np.array(list(blocks)), index=index, **stacked)


def _record(run, keep):
    """{block: array} for one run."""
    record = {"config.json": np.array(json.dumps(run.config))}
    for part in filter(run.has, PARTS):
        arrays = run.arrays(part)
        config = arrays.pop("config")
        if config != run.config:
            record[f"{part}.config"] = np.array(json.dumps(config))
        member = shown_member(arrays["nll"]) if "nll" in arrays else None
        for key, value in arrays.items():
            heavy = part == "metrics" and key in HEAVY or key.startswith("samples_")  # `samples` of gradient_snr.npz are numbers
            if heavy and key not in keep or key == "model_samples" and member is None:
                continue
            if key == "model_samples" and "model_samples_of" not in arrays:
                record[f"{part}.model_samples_of"], value = np.array([member]), value[member:member + 1]
            record[f"{part}.{key}"] = value
    return record


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add_run_flags(parser)
    flag = parser.add_argument
    flag("--save", required=True, metavar="FILE.npz", help="the pack to write")
    flag("--keep", nargs="+", default=[], choices=HEAVY, metavar="KEY",
         help=f"large arrays to keep, of {', '.join(HEAVY)}; of model_samples the pack has the member that figures show")
    args = parser.parse_args(argv)
    if Path(args.save).suffix != ".npz":
        parser.error(f"--save {args.save} must end in .npz")
    return args


def main(args):
    pack(chosen_runs(args), args.save, args.keep)
    print(args.save)


if __name__ == "__main__":
    command_line(parse_args, main)
