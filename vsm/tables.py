"""One way to write a table in Markdown, and a mean beside its error."""

import math

import numpy as np


def markdown_table(header, rows, align=None):
    """The lines of a Markdown table, joined: header [C] and rows [R, C] of anything that str() takes; None is an empty cell.

    align: a letter per column, l, c or r (default: all l).
    """
    rules = {"l": "---", "c": ":---:", "r": "---:"}
    lines = [header, [rules[letter] for letter in align or "l" * len(header)], *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def mean_and_error_text(mean, error=math.nan):
    """mean ± error to two digits of the error; "-" where the mean is NaN."""
    if math.isnan(mean):
        return "-"
    if not error > 0 or abs(mean) > 1e6:
        return f"{mean:.4g}" + ("" if math.isnan(error) else f" ± {error:.2g}")
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def mean_and_error(values):
    """Mean, standard error (0 of a single value) and median over the first axis of the finite values; NaN where all are NaN."""
    values = np.ma.masked_invalid(np.asarray(values, float))
    count = values.count(0)
    error = values.std(0, ddof=1) / np.sqrt(np.maximum(count, 1)) if len(values) > 1 else np.ma.zeros(values.shape[1:])
    error = np.where(count > 1, np.ma.filled(error, 0), 0)
    return np.ma.filled(values.mean(0), np.nan), error, np.ma.filled(np.ma.median(values, 0), np.nan)
