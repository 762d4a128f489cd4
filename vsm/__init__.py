"""Code that the scripts share, beside models.py, objectives.py, metrics.py, data.py and training.py.

Each module says in its first line what it does.
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
