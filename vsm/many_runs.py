"""Many image runs by one command: all combinations of the values that its flags are given.

On a CPU every run is a process of its own, as many at once as `--jobs` says. On a GPU all runs are in this process and advance in
lockstep, an update each in turn, every one with a stream and CUDA graphs of its own, so that they overlap on the device. Either
way the images are loaded once, and a run has the folder, log, checkpoint and arrays that it would have alone.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import wait

import torch
from tqdm import tqdm

from vsm.cli import Stopped, UserError, progress, sentence, stopping
from vsm.runs import status_of

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED = 3  # exit code of a process that has written its checkpoint because it was asked to stop


def combinations(argv, parser):
    """Command lines of `parser`, each with one value a flag: all combinations of the values in `argv`, the first flag slowest."""
    several = argparse.ArgumentParser(prog=parser.prog, add_help=False)
    for action in parser._actions:
        if action.option_strings and action.dest != "help":
            kind = {"nargs": "+"} if action.nargs is None else {"action": "store_const", "const": []}
            several.add_argument(*action.option_strings, dest=action.dest, default=argparse.SUPPRESS, **kind)
    given, rest = several.parse_known_args(argv)
    words = [[[name]] if not values else [[name, value] for value in values]
             for name, values in ((f"--{key.replace('_', '-')}", values) for key, values in vars(given).items())]
    return [[*rest, *itertools.chain(*chosen)] for chosen in itertools.product(*words)]


@contextlib.contextmanager
def one_thread():
    """A context for what precedes `in_processes`: OpenMP's threads do not survive a fork, and a child waits for them forever."""
    tqdm.monitor_interval = 0  # no thread of a progress bar either
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_processes(runs, train, jobs):
    """Train each of `runs`, a dict {folder: arguments of train}, in a process of its own, `jobs` at once.

    train(*arguments, bar=...) trains one run. A run that fails leaves the others alone. Raises UserError that names the runs that
    failed, and Stopped after a signal, when every process has written its checkpoint.
    """
    context = multiprocessing.get_context("fork")  # the processes share the images that are loaded already
    threads = max(1, torch.get_num_threads() // min(jobs, len(runs)))
    waiting, active, errors, names = list(runs), {}, {}, names_of(runs)
    with stopping() as stop, progress(len(runs), unit="run") as bar, contextlib.ExitStack() as last:
        last.callback(lambda: tell(active, stop.requested or signal.SIGTERM))  # after an error, or two signals at once
        while active or (waiting and not stop.requested):
            while waiting and len(active) < jobs and not stop.requested:
                folder = waiting.pop(0)
                done, (ours, theirs) = context.Array("d", 2), context.Pipe(duplex=False)
                process = context.Process(target=in_a_process, args=(train, runs[folder], threads, done, theirs))
                with blocked_signals():  # the process takes them when the parent's handlers are no longer its own
                    process.start()
                theirs.close()
                active[folder] = process, done, ours
            wait([process.sentinel for process, *_ in active.values()], timeout=0.5)
            if stop.requested:
                tell(active, stop.requested)
            for folder in [folder for folder, (process, *_) in active.items() if process.exitcode is not None]:
                process, _, ours = active.pop(folder)
                if process.exitcode not in (0, STOPPED, -(stop.requested or 0)):
                    with contextlib.suppress(EOFError):
                        errors[folder] = ours.recv()
                    errors.setdefault(folder, f"its process ended with code {process.exitcode}")
                bar.update()
            bar.set_postfix_str(shares(names, {folder: done for folder, (_, done, _) in active.items()}))
        if stop.requested:
            report_stop(names, errors, waiting)
            raise Stopped(stop.requested)
    report(runs, errors)


@contextlib.contextmanager
def blocked_signals():
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def tell(active, number):
    """Pass a signal on, once: a second one would interrupt a run that is writing its checkpoint."""
    for process, *_ in active.values():
        if process.is_alive() and not getattr(process, "told", False):
            process.told = True
            os.kill(process.pid, number)


def in_a_process(train, arguments, threads, done, connection):
    """Train one run in a process that the terminal does not signal and that prints nothing. It ends here."""
    os.setsid()
    for number in SIGNALS:  # until `train` handles them: the parent's handler would only note them here
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    first = multiprocessing.parent_process().pid
    try:
        train(*arguments, bar=lambda total, initial: Counted(done, total, initial, first))
        code = 0
    except Stopped:
        code = STOPPED
    except BaseException as error:  # noqa: BLE001 (whatever the error is, the first process reports it)
        connection.send(told(error))
        code = 2
    os._exit(code)


def told(error):
    """An exception as one sentence; its traceback goes to the first process's stderr if $VSM_TRACEBACK is set."""
    if os.environ.get("VSM_TRACEBACK"):
        traceback.print_exc(file=sys.__stderr__)
    return sentence(error)


class Counted(tqdm):
    """A progress bar that is not shown: it writes the numbers of updates, done and in all, to shared memory.

    It stops this process, by a signal that leaves a checkpoint, when its `parent` is gone, for example by `kill -9`.
    """

    def __init__(self, done, total, initial, parent=None):
        super().__init__(total=total, initial=initial, disable=True)
        self.done, self.parent = done, parent
        done[:] = initial, total

    def update(self, n=1):
        self.done[0] += n
        if self.parent not in (None, os.getppid()):
            self.parent = None
            signal.raise_signal(signal.SIGTERM)


def in_lockstep(runs, begin, device):
    """Train `runs`, a dict {folder: arguments of begin}, in this process, an update each in turn.

    begin(*arguments, stop=..., bar=...) is a generator that trains one run and yields after every update. A run that fails leaves
    the others alone. Raises UserError that names the runs that failed, and Stopped after a signal, when every run has written its
    checkpoint.
    """
    errors, names, looked = {}, names_of(runs), time.monotonic()
    with stopping() as stop, progress(len(runs), unit="run") as bar:
        done = {folder: [0, 1] for folder in runs}
        active = {folder: (begin(*arguments, stop=stop, bar=lambda total, initial, of=done[folder]: Counted(of, total, initial)),
                           stream_of(device)) for folder, arguments in runs.items()}
        while active:
            for folder, (updates, stream) in list(active.items()):
                try:
                    with stream():
                        next(updates)
                    continue
                except (StopIteration, Stopped):
                    pass
                except Exception as error:  # noqa: BLE001 (whatever the error is, the other runs go on)
                    errors[folder] = told(error)
                del active[folder]
                bar.update()
            if time.monotonic() - looked > 1:
                looked = time.monotonic()
                bar.set_postfix_str(shares(names, {folder: done[folder] for folder in active}))
        if stop.requested:
            report_stop(names, errors)
            raise Stopped(stop.requested)
    report(runs, errors)


def stream_of(device):
    """A context manager factory: a CUDA stream of its own for each run, nothing elsewhere."""
    if device.type != "cuda":
        return contextlib.nullcontext
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return lambda: torch.cuda.stream(stream)


def names_of(folders):
    """{folder: a short name}: the parts of each folder's name, between hyphens, that not all folders have."""
    parts = {folder: folder.rstrip("/").rpartition("/")[2].split("-") for folder in folders}
    common = set.intersection(*map(set, parts.values()))
    return {folder: "-".join(part for part in mine if part not in common) or folder for folder, mine in parts.items()}


def shares(names, done):
    """The progress of the active runs for the bar; done {folder: (updates, updates in all)}."""
    return "  ".join(f"{names[folder]} {100 * now / max(total, 1):.0f}%" for folder, (now, total) in done.items())


def report_stop(names, errors, waiting=()):
    """Print which runs had failed before a signal, and which had not begun."""
    for folder, error in errors.items():
        print(f"{names[folder]} failed: {error}", file=sys.stderr)
    if waiting:
        print(f"not begun: {', '.join(names[folder] for folder in waiting)}; if --overwrite was to redo them, give it again for "
              "these alone", file=sys.stderr)


def report(runs, errors):
    """Print how many runs ended in which way. Raises UserError if some failed."""
    statuses = [status_of(folder) or "unfinished" for folder in runs if folder not in errors]
    kinds = {kind: sum(status.startswith(kind) for status in statuses) for kind in ("ok", "diverged", "exploded", "unfinished")}
    kinds = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    print(f"{len(runs)} runs: {kinds}, in {os.path.commonpath(list(map(os.path.dirname, runs))) or '.'}")
    if errors:
        raise UserError(f"{len(errors)} of {len(runs)} runs failed: "
                        + "; ".join(f"{names_of(runs)[folder]}: {error}" for folder, error in errors.items()))
