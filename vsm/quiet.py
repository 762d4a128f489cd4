"""Imported before all else by every script: Ctrl-C during the imports, which take seconds, ends in one sentence too."""

import sys


def report(kind, error, trace):
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif sys.stderr is not None:
        print("interrupted", file=sys.stderr)


sys.excepthook = report  # Python itself then ends by the signal, which a shell sees as exit code 130
