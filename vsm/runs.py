"""Run folders: flags, lock, checkpoint and arrays of a run. docs/files.md lists their files.

The same command again resumes an unfinished run, skips a finished one, and refuses a folder made with other flags.
"""

import contextlib
import errno
import fcntl
import hashlib
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
from vsm.names import BUDGET, NOT_IDENTITY

WRITTEN = (".config.json", ".checkpoint.pt", ".metrics.npz", ".log.csv")  # beginnings of the temporary files of a Run


def write_atomic(path, data):
    """Write bytes to `path` whole or not at all, by a temporary file, fsync and rename. Makes the folder if it is missing.

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
    """Write an `.npz` of plain arrays with `config` as a JSON string among them. Raises UserError where the disk refuses."""
    write_atomic(Path(path), packed(config, arrays))


def packed(config, arrays):
    """The bytes of the `.npz` that `save_arrays` writes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, config=json.dumps(config), **arrays)
    return buffer.getvalue()


def load_arrays(path):
    """The arrays of an `.npz` as a dict, with `config` parsed. Raises UserError for a missing or damaged file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        arrays["config"] = json.loads(str(arrays["config"])) if "config" in arrays else {}
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist; is {Path(path).parent} a finished run?") from None
    except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); move it away and run the command that made it again") from error
    return arrays


def load_config(folder):
    """`config.json` of a run folder as a dict. Raises UserError if it is missing, damaged or not that of a run."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not a run folder: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove {folder} or choose another folder") from error
    if not (isinstance(config, dict) and "script" in config and isinstance(config.get("flags"), dict)):
        raise UserError(f"{folder} is not a run folder: its config.json is not that of a run")
    return config


def status_of(folder):
    """`ok`, `diverged@<step>`, `exploded@<step>`, or None for a run that has not ended."""
    path = Path(folder) / "metrics.npz"
    return str(load_arrays(path).get("status", "")) or None if path.exists() else None


def checkpoint_hash(folder):
    """What tells the checkpoint of a run from others: the first 12 hexadecimal digits of its file's SHA-256."""
    return hashlib.sha256((Path(folder) / "checkpoint.pt").read_bytes()).hexdigest()[:12]


def environment(device):
    """Versions, commit and device: what the numbers may depend on, beside the flags."""
    git = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
                         check=False, capture_output=True, text=True) if shutil.which("git") else None
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "commit": git.stdout.strip() if git and git.returncode == 0 else "unknown", "device": f"{device.type} ({name})"}


def identity_of(config):
    """The script and the flags that make a run what it is. Pictures may move: of folder:PATH only the content counts."""
    flags = {key: value for key, value in config["flags"].items() if key not in (*NOT_IDENTITY, BUDGET)}
    moved = {"data": "folder"} if str(flags.get("data")).startswith("folder:") and config.get("data") else {}
    return {"script": config["script"], **flags, **moved}


def refuse_other_images(run, config, recipe):
    """Raises UserError where the digest of images, in their `recipe`, is not that of the images that `run` was trained on."""
    before, now = ((data or {}).get("digest") for data in (config.get("data"), recipe))
    if None not in (before, now) and before != now:
        raise UserError(f"the images are not those that {run} was trained on (their digest was {before}, is now {now}); "
                        "put back what was changed, renamed, added or taken away, or train on the new images in another --out")


class Run:
    """A run folder, locked during the context. If the process dies, the lock is gone.

        with Run(path, script="train_images", flags=vars(args), device=device, overwrite=args.overwrite) as run:
            if run.status:            # the run has finished before
                return
            state = run.load_checkpoint(device)     # None at the first call

    The flag `epochs` is a budget: a finished run with fewer epochs continues. The first write of a run takes the folder over: it
    replaces config.json, and with overwrite=True it removes the old run, which a new run that fails earlier leaves as it was.
    Raises UserError if another process holds the folder, other flags or another script made it, or it cannot be written.
    """

    def __init__(self, path, script, flags, device, overwrite=False, **extra):
        self.path, self.overwrite, self.status = Path(path), overwrite, None
        self._owned, self._outdated = False, []  # whether it has written; files of the old run, which go when it does
        self._continues = False  # whether it has a larger budget than the finished run that is there
        kept = {key: value for key, value in flags.items() if key != "overwrite"}
        self.config = {"script": script, "flags": kept, **environment(device), **extra}

    def __enter__(self):
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; choose another --out")
        if self._files() and not (self.path / "config.json").exists():
            raise UserError(f"{self.path} holds files but no config.json, so it is not a run folder; choose another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is at work in {self.path}; wait for it or choose another --out") from None
        except OSError as error:
            raise UserError(f"cannot write to the output folder {self.path}, or lock it ({os.strerror(error.errno)}); choose "
                            "another --out") from error
        try:
            self._claim()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_):
        self._lock.close()

    def _files(self):
        """The files of the folder, without the lock and the remains of a killed write."""
        found = self.path.iterdir() if self.path.exists() else []
        return [file for file in found if file.name != ".lock" and file.suffix != ".tmp"]

    def _claim(self):
        """Begin a new folder by its config.json, or see what is to become of the run that is there."""
        for left in self.path.glob(".*.tmp"):
            if left.name.startswith(WRITTEN) or ".png." in left.name:  # evaluate.py may be writing others
                left.unlink(missing_ok=True)
        if not (files := self._files()):
            self._take_over()
            return
        old = load_config(self.path)
        if old["script"] != self.config["script"]:
            raise UserError(f"{self.path} is a run of {old['script']}.py; choose another --out")
        if self.overwrite:
            self._outdated = files
        else:
            self._go_on(old)

    def _go_on(self, old):
        """Set the status of a run that has ended. If it continues with a larger budget, delete its pictures instead."""
        self._refuse_other_flags(old)
        status, epochs = status_of(self.path), self.config["flags"].get("epochs")
        has = int(load_arrays(self.path / "metrics.npz")["epoch"][-1]) if epochs and status == "ok" else None
        if has and has < epochs:
            self._continues = True
            for picture in self.path.glob("*.png"):
                picture.unlink()
        elif status:
            self.status = status
            more = f", and has {has} epochs already" if has and has > epochs else ""
            longer = ", more --epochs continue it" if has else ""
            print(f"{self.path}: finished before ({status}){more}; --overwrite redoes it{longer}")

    def _take_over(self, written=None):
        """Remove the old run under --overwrite, but for the file just `written`, and replace config.json, which comes last."""
        for file in self._outdated:
            if file.is_dir():
                shutil.rmtree(file)
            elif file.name not in ("config.json", written):
                file.unlink()
        write_atomic(self.path / "config.json", json.dumps(self.config, indent=1).encode())
        self._owned, self._outdated = True, []

    def _refuse_other_flags(self, old):
        if differ := self._differences(identity_of(old)):
            raise UserError(f"{self.path} was made with other flags ({'; '.join(differ)}); "
                            "choose another --out, or --overwrite to redo it")
        refuse_other_images(self.path, old, self.config.get("data"))

    def _differences(self, theirs):
        """A text for each flag in which another identity differs from this run's. A flag that one lacks is None."""
        mine = json.loads(self.identity())
        return [f"{key} was {theirs.get(key)!r}, is now {mine.get(key)!r}" for key in sorted(mine.keys() | theirs.keys())
                if mine.get(key) != theirs.get(key)]

    def identity(self):
        """The script and the flags that a checkpoint must agree with, as a JSON string."""
        return json.dumps(identity_of(self.config), sort_keys=True)

    def save_checkpoint(self, state):
        """Write `state`, a dict of tensors, containers and plain Python values, so that it loads with weights_only=True."""
        buffer = io.BytesIO()
        torch.save(state | {"identity": self.identity()}, buffer)
        self.write("checkpoint.pt", buffer.getbuffer())

    def load_checkpoint(self, device="cpu"):
        """The last checkpoint, or None. Raises UserError for a damaged file or other flags, and keeps the file."""
        path = self.path / "checkpoint.pt"
        if self._outdated or not path.exists():
            return None
        state = load_checkpoint(path, device)
        if not isinstance(state, dict) or "identity" not in state:
            raise UserError(f"{path} is not a checkpoint of this script and is kept as it is; move it away")
        if self._differences(json.loads(state.pop("identity"))):
            raise UserError(f"{path} is of a run with other flags or another seed and is kept as it is; move it away")
        return state

    def save_metrics(self, **arrays):
        """Write `metrics.npz`. A `status` among the arrays marks the run as finished."""
        self.write("metrics.npz", packed(self.config, arrays))

    def log(self, history, members=()):
        """Write log.csv from {name: a list of tensors, one per evaluation}.

        A line per evaluation holds the scalars, and for metrics of the shape `members` the mean over the finite ones.
        """
        columns = {name: [value.double()[value.isfinite()].mean().item() for value in values]
                   for name, values in history.items() if values[0].shape in ((), members)}
        lines = [",".join(columns), *(",".join(f"{value:.9g}" for value in row) for row in zip(*columns.values()))]
        self.write("log.csv", ("\n".join(lines) + "\n").encode())

    def write(self, name, data):
        """Write bytes to a file of the run, whole or not at all. The first write takes the folder over."""
        if not (self.path / "config.json").exists():
            raise UserError(f"{self.path} has been removed or emptied while the run went on; nothing more is written there")
        if self._continues:  # from here on the arrays are not those of a run that has ended
            self._continues, arrays = False, load_arrays(self.path / "metrics.npz")
            arrays.pop("status")
            write_atomic(self.path / "metrics.npz", packed(arrays.pop("config"), arrays))
        write_atomic(self.path / name, data)
        if not self._owned:
            self._take_over(name)


def load_checkpoint(path, device="cpu"):
    """The content of a checkpoint, loaded with weights_only=True. Raises UserError for a missing or damaged file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not check the checksums
                raise ValueError(f"checksum of {damaged}")
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError or others, depending on the damage
        reason = f"{type(error).__name__} {error}".splitlines()[0][:80]
        raise UserError(f"the checkpoint {path} is damaged ({reason}) and is kept as it is; "
                        "move it away, and the command of the run begins it again") from error
