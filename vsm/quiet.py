"""Every script imports this first, so that Ctrl-C during the other imports, which take seconds, prints no traceback."""

import sys


def report(kind, error, trace):
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif sys.stderr is not None:
        print("interrupted", file=sys.stderr)


sys.excepthook = report  # Python then ends by the signal, so a shell sees exit code 130
