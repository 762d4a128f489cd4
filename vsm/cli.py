"""How a script reads its flags and reports a user's mistake."""

import argparse
import contextlib
import math
import sys
from pathlib import Path

import torch


class UserError(Exception):
    """A mistake or a lack that the user can mend. Its text is the one sentence that stderr gets; exit code 2."""


def command_line(parse_args, main):
    """Run a script: `main(parse_args())`; user errors, full disks and Ctrl-C end in one sentence, never a traceback."""
    try:
        main(parse_args())
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):
            raise
        print(f"{Path(sys.argv[0]).name}: error: out of memory; a smaller --batch, --samples, --width or --hidden needs less", file=sys.stderr)
        sys.exit(2)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(kind, low, exclusive, name):
    def parse(text):
        with contextlib.suppress(ValueError):
            value, high = kind(text), 2**63 if kind is int else math.inf
            if low < value < high if exclusive else low <= value < high:  # also refuses nan
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {name}")

    return parse


count = number(int, 0, False, "a whole number of 0 or more, below 2^63")
positive = number(int, 0, True, "a whole number of 1 or more, below 2^63")
nonnegative = number(float, 0, False, "a number of 0 or more")
positive_float = number(float, 0, True, "a number above 0")
