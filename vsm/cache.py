"""Arrays that are made once and kept, and digests that tell one array from another."""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from vsm.cli import UserError
from vsm.runs import load_arrays, save_arrays, write_atomic


def cache_folder():
    """The folder for what is made once and can be made again: $VSM_CACHE, or ./cache."""
    return Path(os.environ.get("VSM_CACHE", "cache"))


def digest(*arrays):
    """The first 12 hexadecimal digits of the SHA-256 of the bytes of arrays or tensors."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array.cpu() if isinstance(array, torch.Tensor) else array))
    return sha.hexdigest()[:12]


def load_or_make(path, make, settings=None):
    """The arrays at `path`, made with these settings, as a dict, or else those that make() returns, which are written there.

    Where writing fails, stderr says so.
    """
    settings = settings or {}
    with contextlib.suppress(UserError):
        arrays = load_arrays(path)
        if arrays.pop("config") == settings:
            return arrays
    arrays = {key: np.asarray(value) for key, value in make().items()}
    try:
        save_arrays(path, settings, **arrays)
    except UserError as error:
        print(f"the result is not cached and will be computed again next time: {error}", file=sys.stderr)
    return arrays


def cached(path, recipe, shape, rows):
    """The uint8 array of this recipe and shape at `path`, memory-mapped, and its `digest`.

    Where it is not there, it is made from the arrays of rows(). The file is written whole or not at all; one process writes it,
    the others wait. Raises UserError where that fails.
    """
    if found := read_cache(path, recipe, shape):
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if found := read_cache(path, recipe, shape):
                return found
            print(f"making {path}; this happens once", file=sys.stderr)
            content = write_cache(path, recipe, shape, rows())
            return np.load(path, mmap_mode="r"), content
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}); set VSM_CACHE to a folder with room") from error


def read_cache(path, recipe, shape):
    """The cached array and its digest, or None where the array is absent, of another recipe, or damaged."""
    try:
        kept = json.loads(path.with_suffix(".json").read_text())  # first, because it is written last
        images = np.load(path, mmap_mode="r")
        content = kept.pop("digest")
    except Exception:  # the readers raise almost anything, depending on the damage; a damaged cache is made again
        return None
    whole = images.shape == shape and images.dtype == np.uint8 and images.flags.c_contiguous
    return (images, content) if kept == recipe and whole else None


def write_cache(path, recipe, shape, rows):
    """Write the arrays `rows` as one uint8 array to `path`, and then its recipe and digest beside it. Returns the digest."""
    path.with_suffix(".json").unlink(missing_ok=True)
    temporary, sha = path.with_suffix(".tmp"), hashlib.sha256()
    try:
        with open(temporary, "wb") as file:  # not memory-mapped: a full disk would then be a SIGBUS
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for row in rows:
                file.write(content := row.tobytes())
                sha.update(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    content = sha.hexdigest()[:12]
    write_atomic(path.with_suffix(".json"), json.dumps({**recipe, "digest": content}, indent=1).encode())
    return content
