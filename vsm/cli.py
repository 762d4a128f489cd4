"""The command line of the scripts: types of flags, progress, signals, and one-line messages for errors."""

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from tqdm import tqdm


class UserError(Exception):
    """An error that the user can correct. The script prints its text, one sentence, to stderr and exits with code 2."""


class Stopped(Exception):
    """A signal asked the program to stop, and its state is on disk. The exit code is 128 + the signal's number, as in shells."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


class Stop:
    """The signal that `stopping` caught: its number is `requested`, or None."""

    def __init__(self):
        self.requested, self.raises = None, False

    @contextlib.contextmanager
    def at_once(self):
        """A context, for work that can be done again, which a signal leaves by Stopped without waiting for its end."""
        try:
            self.raises = True
            if self.requested:
                raise Stopped(self.requested)
            yield
        finally:
            self.raises = False


@contextlib.contextmanager
def stopping():
    """A context in which SIGINT (Ctrl-C), SIGTERM (preemption) and SIGHUP (a closed terminal) do not interrupt but set a Stop.

    The loop inside looks at `requested`, writes its checkpoint and raises Stopped. A second signal interrupts as usual.
    """
    stop, before = Stop(), {}

    def request(number, frame):
        stop.requested = number
        signal.signal(number, before[number])
        with contextlib.suppress(AttributeError, OSError, ValueError):  # no print, because a signal may come inside another
            os.write(sys.stderr.fileno(), b"\nstops after writing a checkpoint; a second signal stops at once\n")
        if stop.raises:
            raise Stopped(number)

    if threading.current_thread() is threading.main_thread():  # Python allows no handlers in other threads
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            numbers.append(signal.SIGHUP)
        before.update({number: signal.getsignal(number) for number in numbers})
        for number in before:
            signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def while_slow(message, seconds=5):
    """A context that prints the message on stderr once it has lasted so many seconds."""
    def say():
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(message, file=sys.stderr)

    timer = threading.Timer(seconds, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def progress(total, initial=0, unit="step"):
    """A tqdm bar on a terminal. In a log file it is a line after five seconds and then one a minute."""
    kind = tqdm if sys.stderr.isatty() else LogLines
    return kind(total=total, initial=initial, unit=unit, smoothing=0.05, dynamic_ncols=True)


class LogLines(tqdm):
    """tqdm that prints lines instead of a bar."""

    def __init__(self, **options):
        self.next_line = time.monotonic() + 5
        super().__init__(**options, mininterval=1, ascii=True, file=io.StringIO(),  # whose end of line is no line of the log
                         bar_format="{n_fmt}/{total_fmt} [{elapsed}, {remaining} to go, {rate_fmt}]{postfix}")

    def display(self, msg=None, pos=None):
        if time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + 60
            with contextlib.suppress(OSError, ValueError):
                print(msg or str(self), file=sys.stderr, flush=True)


def command_line(parse_args, main):
    """Run a script: `main(parse_args())`. Any error ends in one sentence on stderr, after a traceback if $VSM_TRACEBACK is set.

    $VSM_IMPORT names modules to import first, which can register objectives, laws, networks or data.
    Exit codes: 2 for an error, 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP, 141 for a closed pipe.
    """
    os.environ["MPLBACKEND"] = "agg"  # no display, whatever backend is named there; Matplotlib is imported later, to draw
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as by 2>&-
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows ? for other characters
    try:
        for module in filter(None, os.environ.get("VSM_IMPORT", "").split(",")):
            import_named(module)
        main(parse_args())
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has ended, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except Stopped as stopped:
        name = signal.Signals(stopped.number).name
        command = "the same command without --overwrite" if "--overwrite" in sys.argv else "the same command"
        end(f"stopped by {name}; {command} resumes from the checkpoint just written", 128 + stopped.number)
    except KeyboardInterrupt:
        end("interrupted; the same command begins again, from the last checkpoint where there is one", 130)
    except Exception as error:
        if os.environ.get("VSM_TRACEBACK"):
            traceback.print_exc()
        end(f"{Path(sys.argv[0]).name}: error: {sentence(error)}", 2)


def import_named(module):
    """Import a module of the user's. Raises UserError where Python does not find it."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # one that it imports itself
            raise
        raise UserError(f"VSM_IMPORT names {module}, which Python does not find; set PYTHONPATH to its folder") from error


def end(message, code):
    """Exit with a message on stderr, if that is still open."""
    with contextlib.suppress(OSError, ValueError):
        print(message, file=sys.stderr)
    sys.exit(code)


def sentence(error):
    """An exception as one sentence for the user."""
    import torch
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    on_a_cpu = type(error) is RuntimeError and "can't allocate memory" in text
    if on_a_cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "out of memory; use smaller minibatches, networks, or numbers of samples or images"
    return f"{type(error).__name__}: {text[:300]} (set VSM_TRACEBACK=1 in the environment to see the traceback)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose --help shows the script's docstring and the defaults."""

    def __init__(self, **options):
        super().__init__(formatter_class=Formatter, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")

    def _check_value(self, action, value):
        if isinstance(action.choices, dict) and value not in action.choices:  # a table to which users add entries
            raise argparse.ArgumentError(action, f"invalid choice: {value!r} (choose from {', '.join(action.choices)}); names of "
                                                 "your own are those of the modules in $VSM_IMPORT")
        super()._check_value(action, value)


def add_output(flag, folder, device="auto", note=""):
    """The flags that say where a run computes and what it leaves, under `folder`; note: words on its default device."""
    flag("--device", default=device, help=f"auto | cpu | cuda | cuda:1 ...{note}")
    flag("--out", type=os.path.expanduser, help=f"the run's folder (default: a name made of the flags, under {folder})")
    flag("--overwrite", action="store_true", help="replace a run that exists in the folder")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with the script's docstring as it is written, and with defaults other than None and False."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def whole_number(low, bits=31):
    """An argparse type for whole numbers from `low` to 2^bits - 1."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= int(text) < 2**bits:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of {low} or more, below 2^{bits}")

    return parse


def real_number(accepts, name):
    """An argparse type for finite numbers that float32 can hold and for which accepts(value) holds; `name` describes them."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = float(text)
            if accepts(value) and value < 3.4e38 and not 0 < value < 1e-37:
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {name} that a float32 can hold")

    return parse


count, positive, seed_number = whole_number(0), whole_number(1), whole_number(0, bits=63)
nonnegative = real_number(lambda value: value >= 0, "a number of 0 or more")
positive_float = real_number(lambda value: value > 0, "a number above 0")
