"""Every script imports this first: Ctrl-C during the other imports, which take seconds, then prints no traceback, and Matplotlib
draws without a display whatever backend the environment names, which may be one that only a notebook has.
"""

import os
import sys

os.environ["MPLBACKEND"] = "agg"


def report(kind, error, trace):
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif sys.stderr is not None:
        print("interrupted", file=sys.stderr)


sys.excepthook = report  # Python then ends by the signal, so a shell sees exit code 130
