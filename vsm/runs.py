"""A run is a folder: its flags, its lock, its checkpoint, its arrays.

    runs/<family>/<name>/config.json      every flag, versions, commit, device, data recipe
                         metrics.npz      plain arrays, `config` as a JSON string, `status`: ok | diverged@<step>
                         checkpoint.pt    what the next call of the same command resumes from
                         *.png            drawn from metrics.npz alone

The same command again resumes a half run, skips a finished one, and refuses a folder made with other flags.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import platform
import shutil
import subprocess
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from vsm.cli import UserError

# Flags that say where and how to compute, not what: they may change between two calls on one folder.
NOT_IDENTITY = ("out", "overwrite", "dry_run", "device", "data_root", "no_graph", "compile")


def run_name(args, axes, defaults):
    """The folder's name: the sweep's axes, then every other flag that differs from its default, so that sweeps never collide."""
    def text(value):
        return "+".join(map(str, value)) if isinstance(value, list) else str(value)

    extra = [f"{flag_name(key)}{text(value)}" for key, value in vars(args).items()
             if key not in axes and key not in NOT_IDENTITY and value != defaults[key]]
    return "-".join([text(getattr(args, key)) for key in axes if key != "seed"] + extra
                    + ([f"seed{args.seed}"] if "seed" in axes else [])).replace("/", "_").replace(":", "_")


def write_atomic(path, data):
    """Write bytes to `path` whole or not at all: a temporary name, fsync, rename. Its folder is made where there is none.

    Raises UserError where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {os.strerror(error.errno or errno.EIO)}; what was there before is kept") from error


def save_arrays(path, config, **arrays):
    """Write an `.npz` of plain arrays with `config` beside them as a JSON string."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, config=json.dumps(config), **arrays)
    write_atomic(Path(path), buffer.getvalue())


def load_arrays(path):
    """The arrays of an `.npz` as a dict; `config` parsed. Raises UserError for a missing or damaged file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        arrays["config"] = json.loads(str(arrays["config"])) if "config" in arrays else {}
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist; is {Path(path).parent} a finished run?") from None
    except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); run the command of its folder again with --overwrite") from error
    return arrays


def load_finished(folder):
    """`metrics.npz` of a run that has ended. Raises UserError for one that is missing, half or damaged."""
    arrays = load_arrays(Path(folder) / "metrics.npz")
    if "status" not in arrays:
        raise UserError(f"{folder} has not ended; the command that began it resumes it")
    return arrays


def load_config(folder):
    """`config.json` of a run folder. Raises UserError for a folder that is none, or whose config.json is damaged or not of a run."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not a run folder: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove {folder}, or leave it alone and choose another") from error
    if not (isinstance(config, dict) and "script" in config and isinstance(config.get("flags"), dict)):
        raise UserError(f"{folder} is not a run folder: its config.json is not that of a run")
    return config


def status_of(folder):
    """`ok`, `diverged@<step>`, or None for a run that has not ended."""
    path = Path(folder) / "metrics.npz"
    return str(load_arrays(path).get("status", "")) or None if path.exists() else None


def flag_name(key):
    return key.replace("_", "-")


def group_by_seed(runs, configs):
    """Runs that differ in their seed alone: a list of names and indices into `runs` and their `configs`.

    The name is that of the objectives, with the flags in which it differs from others of the same data and network:
    "KLD-F" or "KLD-F inner-steps=1". Raises UserError for one seed twice: its copies would pass for a spread.
    """
    identity = [{key: value for key, value in config["flags"].items() if key not in (*NOT_IDENTITY, "seed")} for config in configs]
    groups = {}
    for i, flags in enumerate(identity):
        groups.setdefault(json.dumps([configs[i]["label"], flags], sort_keys=True), []).append(i)
    named = []
    for members in groups.values():
        refuse_twins([(runs[i], [configs[i]["flags"]["seed"]]) for i in members])
        mine = identity[members[0]]
        rivals = [flags for flags in identity if (flags.get("data"), flags.get("net")) == (mine.get("data"), mine.get("net"))]
        differ = [key for key in mine if key not in ("learn", "infer") and any(flags.get(key) != mine[key] for flags in rivals)]
        named.append((" ".join([configs[members[0]]["label"], *(f"{flag_name(key)}={mine[key]}" for key in differ)]), members))
    return named


def refuse_twins(runs):
    """Raises UserError where two of the `runs` of one experiment, (folder, seeds) each, share a seed."""
    first = {}
    for run, seeds in runs:
        for seed in seeds:
            if seed in first:
                raise UserError(f"{first[seed]} and {run} are the same experiment with the same seed {seed}; leave one of them out")
            first[seed] = run


def environment(device):
    """What the numbers may depend on beside the flags."""
    git = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
                         check=False, capture_output=True, text=True) if shutil.which("git") else None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "commit": git.stdout.strip() if git and git.returncode == 0 else "unknown", "device": f"{device.type} ({gpu})"}


class Run:
    """A run folder, locked while the context lasts; the lock dies with the process that holds it.

        with Run(path, script="train_images", flags=vars(args), device=device, overwrite=args.overwrite) as run:
            if run.status:            # finished before: nothing to do
                return
            state = run.load_checkpoint(device)     # None at the first call

    Raises UserError: another process holds the folder, other flags made it, or it cannot be written.
    """

    def __init__(self, path, script, flags, device, overwrite=False, **extra):
        self.path = Path(path)
        self.overwrite = overwrite
        self.config = {"script": script, "flags": {k: v for k, v in flags.items() if k not in ("overwrite", "dry_run")},
                       **environment(device), **extra}
        self.status = None

    def __enter__(self):
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise UserError(f"cannot write to the output folder {self.path}: {os.strerror(error.errno)}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(f"another process is at work in {self.path}; wait for it or choose another --out") from None
        try:
            self._claim()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_):
        self._lock.close()

    def _claim(self):
        files = [file for file in self.path.iterdir() if file.name != ".lock" and file.suffix != ".tmp"]
        if files and not (self.path / "config.json").exists():
            raise UserError(f"{self.path} holds files but no config.json, so it is not a run folder; choose another --out")
        old = load_config(self.path) if files else None  # never clears a folder that is not a run's
        if self.overwrite:
            for file in files:
                if file.is_file():
                    file.unlink()
        elif files:
            self._refuse_other_flags(old)
            self.status = status_of(self.path)
            if self.status:
                print(f"{self.path}: finished before ({self.status}); --overwrite redoes it")
                return
        write_atomic(self.path / "config.json", json.dumps(self.config, indent=1).encode())

    def _refuse_other_flags(self, old):
        mine, theirs = (dict(config["flags"], script=config["script"], data=config.get("data")) for config in (json.loads(json.dumps(self.config)), old))
        differ = [f"{key} was {theirs.get(key)!r}, is now {mine.get(key)!r}" for key in sorted(mine.keys() | theirs.keys())
                  if key not in NOT_IDENTITY and mine.get(key) != theirs.get(key)]
        if differ:
            raise UserError(f"{self.path} was made with other flags ({'; '.join(differ)}); "
                            "choose another --out, or --overwrite to redo it")

    def save_checkpoint(self, state):
        """`state` holds tensors, containers and plain Python only, so that it loads with weights_only=True."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self.path / "checkpoint.pt", buffer.getbuffer())

    def load_checkpoint(self, device="cpu"):
        """The last checkpoint, or None. Raises UserError for a damaged one, which is kept."""
        path = self.path / "checkpoint.pt"
        return load_checkpoint(path, device) if path.exists() else None

    def log(self, row, first):
        """Append the scalars of one evaluation to log.csv."""

    def save_metrics(self, **arrays):
        """`metrics.npz`; with a `status` among the arrays the run counts as finished."""
        save_arrays(self.path / "metrics.npz", self.config, **arrays)


def load_checkpoint(path, device="cpu"):
    """Tensors and plain Python of a checkpoint (`weights_only=True`). Raises UserError for a damaged or foreign file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load compares no checksum
                raise ValueError(f"checksum of {damaged}")
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError, ... by how the file is damaged
        reason = f"{type(error).__name__} {error}".splitlines()[0][:80]
        raise UserError(f"the checkpoint {path} is damaged ({reason}) and is kept as it is; "
                        "move it away or use --overwrite to start the run again") from error
