"""Wall-clock time and memory of the modes that the benchmark compares, measured in turns."""

import ctypes
import math
import re
import time
from pathlib import Path

import numpy as np
import torch

from vsm.device import keep_freed_memory, set_precision, synchronise


def seconds_per_call(function, calls, device):
    """Wall-clock seconds of a call of function(), the mean over `calls` calls."""
    synchronise(device)
    began = time.perf_counter()
    for _ in range(calls):
        function()
    synchronise(device)
    return (time.perf_counter() - began) / calls


def time_in_turns(makers, calls, repeats, device):
    """Time several modes in turns: {key: (seconds per step [repeats], bytes)}.

    makers: {key: () -> an object with run_step()}, a key being (mode, precision).
    bytes: the most memory that making the object and its first steps held at once.
    """
    steppers, memory, times = {}, {}, {key: [] for key in makers}
    for key, make in makers.items():
        def first_steps(key=key, make=make):
            steppers[key] = make()
            seconds_per_call(steppers[key].run_step, calls, device)

        prepare_process(*key, device)
        memory[key] = peak_memory_of(first_steps, device)
    for _ in range(repeats):
        for key, stepper in steppers.items():
            prepare_process(*key, device)
            times[key].append(seconds_per_call(stepper.run_step, calls, device))
    return {key: (np.array(times[key]), memory[key]) for key in makers}


def prepare_process(mode, precision, device):
    """Set precision and malloc as train_images.py does; the reference step keeps the default malloc."""
    set_precision(precision, device)
    keep_freed_memory(mode != "reference")


def peak_memory_of(function, device):
    """Bytes by which function() raises the memory in use at its peak; NaN where the system does not tell.

    On a GPU the memory is torch.cuda.max_memory_reserved, which counts the pools of idle graphs; on Linux it is the resident set.
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
        before = resident_bytes("VmRSS")
    except (OSError, AttributeError):
        function()
        return math.nan
    function()
    return resident_bytes("VmHWM") - before


def resident_bytes(field):
    """A field of /proc/self/status, in bytes: VmRSS, the resident set now, or VmHWM, its peak."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
