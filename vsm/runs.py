"""Run folders: flags, lock, checkpoint and arrays of a run.

    runs/<family>/<name>/config.json      every flag, versions, commit, device, data recipe
                         metrics.npz      plain arrays, `config` as a JSON string, `status`: ok | diverged@N | exploded@N
                         checkpoint.pt    the state from which the same command resumes
                         log.csv          a line per evaluation
                         *.png            drawn from metrics.npz alone

The same command again resumes an unfinished run, skips a finished one, and refuses a folder made with other flags.
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

from vsm.cli import Stopped, UserError
from vsm.names import BUDGET, NOT_IDENTITY


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
    moved = {"data": "folder"} if str(flags.get("data")).startswith("folder:") else {}
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

    The flag `epochs` is a budget: a finished run with fewer epochs continues. overwrite=True moves the old run aside, removes it
    when the new run writes its first arrays, and restores it if the new run fails earlier.
    Raises UserError if another process holds the folder, other flags or another script made it, or it cannot be written.
    """

    def __init__(self, path, script, flags, device, overwrite=False, tensorboard=False, **extra):
        self.path, self.aside = Path(path), Path(path) / ".replaced"
        self.overwrite, self.status = overwrite, None
        kept = {key: value for key, value in flags.items() if key not in ("overwrite", "dry_run", "tensorboard")}
        self.config = {"script": script, "flags": kept, **environment(device), **extra}
        self._open_board = tensorboard_writer() if tensorboard else None

    def __enter__(self):
        files = self._files()
        if files and not any((place / "config.json").exists() for place in (self.path, self.aside)):
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
            if self._open_board and not self.status:
                self._board = self._open_board(self.path / "tensorboard")
        except BaseException:
            self._restore()
            self._lock.close()
            raise
        return self

    def __exit__(self, kind, *_):
        if self._board:
            self._board.close()
        if kind not in (None, Stopped) and self.aside.exists() and not (self.path / "metrics.npz").exists():
            (self.path / "config.json").unlink(missing_ok=True)
            self._restore()
        elif kind is UserError and self._config_before:  # such as for fewer epochs than it has
            with contextlib.suppress(UserError):
                write_atomic(self.path / "config.json", self._config_before)
        self._lock.close()

    _board = _config_before = None

    def _files(self):
        """The files of the folder, without the lock, the run moved aside and the remains of a killed write."""
        ours = (".lock", self.aside.name)
        try:
            return [file for file in self.path.iterdir() if file.name not in ours and file.suffix != ".tmp"] \
                if self.path.exists() else []
        except OSError as error:
            raise UserError(f"cannot read the output folder {self.path}: {os.strerror(error.errno)}") from error

    def _claim(self):
        """Take the folder over, or move its run aside, and write config.json unless the run has finished."""
        for left in self.path.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        if not (self.path / "config.json").exists():
            self._restore()  # undo an --overwrite that was killed before the new run began
        files = self._files()
        if files:
            old = load_config(self.path)
            if self.overwrite:
                if old["script"] != self.config["script"]:
                    raise UserError(f"{self.path} is a run of {old['script']}.py, "
                                    f"which --overwrite of {self.config['script']}.py does not remove")
                self._move_aside(files)
            else:
                self._take_over(old)
                if self.status:
                    return
                self._config_before = (self.path / "config.json").read_bytes()
        write_atomic(self.path / "config.json", json.dumps(self.config, indent=1).encode())

    def _take_over(self, old):
        """Set the status of a run that has ended. If it continues with a larger budget, delete its pictures instead."""
        self._refuse_other_flags(old)
        status = status_of(self.path)
        if status is None:
            return
        epochs, has = self.config["flags"].get("epochs"), None
        if epochs and status == "ok":
            has = int(load_arrays(self.path / "metrics.npz")["epoch"][-1])
            if has < epochs:
                for picture in self.path.glob("*.png"):
                    picture.unlink()
                return
        self.status = status
        more = f", and has {has} epochs already" if has and has > epochs else ""
        longer = ", more --epochs continue it" if has else ""
        print(f"{self.path}: finished before ({status}){more}; --overwrite redoes it{longer}")

    def _move_aside(self, files):
        """Move the old run into `aside`, config.json first. `_restore` moves it back last and so completes a killed move."""
        files = sorted(files, key=lambda file: file.name != "config.json")
        if (self.aside / "config.json").exists() and not (self.path / "metrics.npz").exists():
            for file in files:  # an --overwrite was killed before its first arrays; keep the run aside, not its remains
                shutil.rmtree(file) if file.is_dir() else file.unlink()
            return
        if self.aside.exists():
            shutil.rmtree(self.aside)
        self.aside.mkdir()
        for file in files:
            os.replace(file, self.aside / file.name)

    def _restore(self):
        """Undo `_move_aside` if the new run has no config.json."""
        if (self.aside / "config.json").exists() and not (self.path / "config.json").exists():
            with contextlib.suppress(OSError):
                for file in sorted(self.aside.iterdir(), key=lambda file: file.name == "config.json"):
                    os.replace(file, self.path / file.name)
                self.aside.rmdir()

    def _refuse_other_flags(self, old):
        mine, theirs = (identity_of(config) for config in (json.loads(json.dumps(self.config)), old))
        differ = [f"{key} was {theirs.get(key)!r}, is now {mine.get(key)!r}" for key in sorted(mine.keys() | theirs.keys())
                  if mine.get(key) != theirs.get(key)]
        if differ:
            raise UserError(f"{self.path} was made with other flags ({'; '.join(differ)}); "
                            "choose another --out, or --overwrite to redo it")
        refuse_other_images(self.path, old, self.config.get("data"))

    def identity(self):
        """The script and the flags that a checkpoint must agree with, as a JSON string."""
        return json.dumps(identity_of(self.config), sort_keys=True)

    def save_checkpoint(self, state):
        """Write `state`, a dict of tensors, containers and plain Python values, so that it loads with weights_only=True."""
        buffer = io.BytesIO()
        torch.save(state | {"identity": self.identity()}, buffer)
        self._write("checkpoint.pt", buffer.getbuffer())

    def load_checkpoint(self, device="cpu"):
        """The last checkpoint, or None. Raises UserError for a damaged file or other flags, and keeps the file."""
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return None
        state = load_checkpoint(path, device)
        if not isinstance(state, dict) or "identity" not in state:
            raise UserError(f"{path} is not a checkpoint of this script and is kept as it is; move it away")
        if state.pop("identity") != self.identity():
            raise UserError(f"{path} is of a run with other flags or another seed and is kept as it is; move it away")
        return state

    def save_metrics(self, **arrays):
        """Write `metrics.npz`. A `status` among the arrays marks the run as finished."""
        self._write("metrics.npz", packed(self.config, arrays))
        if self.aside.exists():
            shutil.rmtree(self.aside, ignore_errors=True)

    def log(self, history, members=()):
        """Write log.csv from {name: a list of tensors, one per evaluation}, and its last line to TensorBoard if that is on.

        A line per evaluation holds the scalars, and for metrics of the shape `members` the mean over the finite ones.
        """
        columns = {name: [value.double()[value.isfinite()].mean().item() for value in values]
                   for name, values in history.items() if values[0].shape in ((), members)}
        lines = [",".join(columns), *(",".join(f"{value:.9g}" for value in row) for row in zip(*columns.values()))]
        self._write("log.csv", ("\n".join(lines) + "\n").encode())
        if self._board:
            for name, values in columns.items():
                self._board.add_scalar(name, values[-1], int(columns["epoch"][-1]))

    def show(self, name, images):
        """Write images, uint8 [n, C, H, W], to TensorBoard if --tensorboard is given."""
        if self._board:
            self._board.add_images(name, images)

    def _write(self, name, data):
        if not (self.path / "config.json").exists():
            raise UserError(f"{self.path} has been removed or emptied while the run went on; nothing more is written there")
        write_atomic(self.path / name, data)


def tensorboard_writer():
    """The class that writes TensorBoard events. Raises UserError if tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter


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
                        "move it away or use --overwrite to start the run again") from error
