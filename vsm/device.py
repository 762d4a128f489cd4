"""The device that a script computes on, and the precision of its arithmetic."""

import ctypes
import resource
import sys
from contextlib import contextmanager

import torch

from objectives import LEARN
from vsm.cli import UserError


def pick_device(name):
    """The device of this name, ready for use; `auto` is a GPU if there is one, else the CPU.

    A GPU with an index becomes the current one. On a CPU, denormals are flushed to zero and freed memory is kept. Raises
    UserError for a device that does not exist.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name.startswith("cuda") and not gpus:
        raise UserError(f"--device {name} is not available: PyTorch finds no CUDA GPU here; use --device cpu or auto")
    if name not in (names := ("cpu", "cuda", *(f"cuda:{i}" for i in range(gpus)))):
        raise UserError(f"--device {name} is not one of auto, {', '.join(names)}")
    device = torch.device(name)
    if device.index is not None:
        torch.cuda.set_device(device)  # CUDA graphs are captured on the current GPU
    if device.type == "cpu":
        torch.set_flush_denormal(True)
        keep_freed_memory()
    return device


def keep_freed_memory(keep=True):
    """Make malloc keep freed memory (keep=True) or return it to the system (False). It has an effect with glibc only.

    By default malloc returns large tensors to the system, and the next tensor costs a page fault for each 4 kB, at every training
    step on images.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, bytes: a larger block gets a mapping of its own
        mallopt(-4, 0 if keep else 2**16)  # M_MMAP_MAX, the number of such mappings
        mallopt(-1, -1 if keep else 2**26)  # M_TRIM_THRESHOLD, free bytes at the heap's end that are returned; -1: never


def set_precision(precision, device):
    """Switch TF32 on or off. float32 excludes TF32, because scores divide by gamma and would divide its error too.

    Raises UserError for tf32 without a GPU.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 needs a CUDA GPU; use float32 or bf16 here")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True


def to_channels_last(model, learn, infer):
    """Lay out the weights of convolutions channels last where that trains faster with these objectives, and return the model.

    A double backward through the networks, mostly that of batch norm, is slower so. The order of a convolution's sums depends on
    the layout, so whoever wants the bits of training must call this too.
    """
    if learn in LEARN and LEARN[learn].joint or infer == "fd-repar":
        return model

    def crashes(m):  # PyTorch 2.14 corrupts the heap in the backward pass of these on a CPU
        return isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels < 8

    on_cpu = next(model.parameters()).device.type == "cpu"
    return model if on_cpu and any(map(crashes, model.modules())) else model.to(memory_format=torch.channels_last)


@contextmanager
def evaluating(vae):
    """A context with eval mode, no gradients and deterministic float32 kernels, also of a model trained in bf16 or TF32.

    All is restored at the end.
    """
    training, flags, bf16 = vae.training, [p.requires_grad for p in vae.parameters()], getattr(vae, "bf16", False)
    vae.bf16 = False
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    vae.eval().requires_grad_(False)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False), torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        vae.bf16 = bf16
        vae.train(training)
        for p, flag in zip(vae.parameters(), flags):
            p.requires_grad_(flag)


def peak_memory(device):
    """Peak memory in bytes: of PyTorch's allocator on a GPU, of the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def synchronise(device):
    """Wait for a GPU, so that a clock measures its work and not the launches."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
