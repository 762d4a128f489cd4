"""A process that gets a signal at a chosen moment of its work. The tests of kills use it; pytest collects nothing here.

A moment lies before, inside or after a write to the disk, or before or after an update of the weights. Moments are counted from
1, so a kill does not depend on how fast the machine is.

A training script imports this module through $VSM_IMPORT, after its own imports, which take seconds. With $DIE_HERE set, the
module then reads orders from stdin, a line of JSON each. For each it forks a process that goes on as the script with the order's
flags, waits for it and prints its exit code.
"""

import atexit
import gc
import io
import itertools
import json
import os
import signal
import sys
import threading

import torch._dynamo  # noqa: F401  # Adam's first step imports it, which takes seconds: once here, and not in each process

import training
import vsm.runs


def arm(number, fatal, delay=0.0):
    """Send this process the signal `number` at its moment `fatal`, or `delay` seconds later, wherever the program then is.

    Returns the iterator that counts the moments.
    """
    moments = itertools.count(1)

    def moment():
        if next(moments) != fatal:
            return
        if delay:
            timer = threading.Timer(delay, os.kill, (os.getpid(), number))
            timer.daemon = True  # a process that ends earlier does not wait for it
            timer.start()
        else:
            os.kill(os.getpid(), number)

    def between_moments(change):
        def call(*args, **options):
            moment()
            try:
                return change(*args, **options)
            finally:
                moment()
        return call

    class WrittenInHalves(io.FileIO):
        def write(self, data):
            data = memoryview(data).cast("B")
            written = super().write(data[:len(data) // 2])
            moment()
            return written + super().write(data[len(data) // 2:])
    for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
        setattr(os, name, between_moments(getattr(os, name)))
    vsm.runs.open = WrittenInHalves
    training.TrainingState.advance = between_moments(training.TrainingState.advance)
    return moments


def obey(order):
    """Continue as the script with the order's flags. Its output goes to a file, which ends in the number of moments."""
    sys.argv[1:] = order["argv"]
    os.dup2(os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    if sys.stderr:
        os.dup2(1, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job of a shell ignores
    main = sys.modules["__main__"]
    main.draw_run = main.synthetic_samples = lambda *_: None  # drawing takes longer than these runs do
    moments = arm(order["number"], order["fatal"], order["delay"])
    atexit.register(lambda: print(f"\n{next(moments) - 1} moments"))


def serve():
    """Returns in the processes that go on as the script; the script itself ends here, at the end of stdin."""
    gc.freeze()  # so that no collection in a child copies the pages of all that is imported
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if not child:
            return obey(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


if "DIE_HERE" in os.environ:
    serve()
