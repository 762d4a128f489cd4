"""Wall-clock time and memory of what the benchmark compares, in turns."""

import ctypes
import math
import re
import time
from pathlib import Path

import numpy as np
import torch

from vsm.device import keep_freed_memory, set_precision


def seconds(function, calls, device):
    """Wall-clock seconds per call."""
    synchronise(device)
    began = time.perf_counter()
    for _ in range(calls):
        function()
    synchronise(device)
    return (time.perf_counter() - began) / calls


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(makers, calls, repeats, device):
    """Time contenders in turns: {key: (seconds per step [repeats], bytes)}.

    makers: {key: () -> an object with run_step()}, a key being (mode, precision).
    bytes: the most that making it and its first steps held at once.
    """
    contenders, memory, times = {}, {}, {key: [] for key in makers}
    for key, make in makers.items():
        def first_steps(key=key, make=make):
            contenders[key] = make()
            seconds(contenders[key].run_step, calls, device)

        prepare(*key, device)
        memory[key] = peak_memory_of(first_steps, device)
    for _ in range(repeats):
        for key, contender in contenders.items():
            prepare(*key, device)
            times[key].append(seconds(contender.run_step, calls, device))
    return {key: (np.array(times[key]), memory[key]) for key in makers}


def prepare(mode, precision, device):
    """The process as train_images.py sets it up, but for the plain step, which has malloc as it comes."""
    set_precision(precision, device)
    keep_freed_memory(mode != "plain")


def peak_memory_of(function, device):
    """Bytes by which function() raises the memory in use at its peak, NaN where the system does not tell.

    On a GPU it is torch.cuda.max_memory_reserved, which counts the pools of idle graphs; on Linux the resident set.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        function()
        return torch.cuda.max_memory_reserved(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of VmRSS
        before = resident("VmRSS")
    except (OSError, AttributeError):
        function()
        return math.nan
    function()
    return resident("VmHWM") - before


def resident(field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def matrix_rate(device, precision):
    """Floating-point operations per second of a large matrix product, [5] timings."""
    set_precision(precision, device)
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    times = [seconds(lambda: a @ b, 10, device) for _ in range(6)][1:]
    return 2 * n**3 / np.array(times)
