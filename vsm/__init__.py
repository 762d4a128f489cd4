"""Code that the scripts share, beside models.py, objectives.py, metrics.py, data.py and training.py.

    cli, flags        command lines, progress, signals, errors
    runs, names       run folders, the arrays in them, what they are called; stored_runs reads them and packs of them
    loading           the trained model of a run folder
    fid, features     FID and KID, and the networks behind them
    distributions_2d, importance, linear    2-D distributions, importance sampling of p(x), theory of linear VAEs
    toys, figures     the toy posteriors; the figures by family

Each of the others says what it does in its first line.
"""

import importlib.util
import sys
from pathlib import Path


def refuse_shadows():
    """End the program with one sentence where Python finds a stranger's data.py, say, before ours."""
    for name in ("data", "metrics", "models", "objectives", "training"):
        ours, found = Path(__file__).resolve().parent.parent / f"{name}.py", importlib.util.find_spec(name)
        if found and found.origin and Path(found.origin).resolve() != ours:
            print(f"error: Python finds {found.origin} instead of {ours}, which vsm needs; "
                  "rename the first, or start Python in another folder", file=sys.stderr)
            sys.exit(2)


refuse_shadows()
