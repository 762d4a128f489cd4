"""The device that a script computes on, and the precision of its arithmetic."""

import ctypes
import resource
import sys
from contextlib import contextmanager

import torch

from vsm.cli import UserError


def pick_device(name):
    """`auto` is the GPU where there is one. The device is made ready: a GPU becomes the current one, a CPU keeps memory and flushes denormals.

    Raises UserError for a device that is not there.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name.startswith("cuda") and not gpus:
        raise UserError(f"--device {name}: PyTorch finds no CUDA GPU here; use --device cpu or auto")
    if name not in (names := ("cpu", "cuda", *(f"cuda:{i}" for i in range(gpus)))):
        raise UserError(f"--device {name}: not one of auto, {', '.join(names)}")
    device = torch.device(name)
    if device.index is not None:
        torch.cuda.set_device(device)  # CUDA graphs are captured on the current GPU
    if device.type == "cpu":
        torch.set_flush_denormal(True)
        keep_freed_memory()
    return device


def keep_freed_memory(keep=True):
    """Whether malloc keeps what is freed (glibc; elsewhere nothing changes). By itself it hands large tensors back to the system and
    pays a page fault for each 4 kB of the next one, at every training step of images. False: the limits it comes to by itself.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, bytes: what is larger has a mapping of its own ...
        mallopt(-4, 0 if keep else 2**16)  # ... of which there may be M_MMAP_MAX
        mallopt(-1, -1 if keep else 2**26)  # M_TRIM_THRESHOLD, bytes free at the heap's end; -1: never trimmed


def set_precision(precision, device):
    """float32 means no TF32: scores divide by gamma, and TF32's error would be divided with them."""
    if precision == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 is a mode of CUDA GPUs; use float32 or bf16 here")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True


@contextmanager
def evaluating(vae):
    """Eval mode, no parameter gradients, deterministic float32 kernels without TF32; everything restored at the end."""
    training, flags = vae.training, [p.requires_grad for p in vae.parameters()]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    vae.eval().requires_grad_(False)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False), torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        vae.train(training)
        for p, flag in zip(vae.parameters(), flags):
            p.requires_grad_(flag)


def peak_memory(device):
    """Bytes: the allocator's peak on a GPU, the process's peak resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
