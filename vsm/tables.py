"""Tables in Markdown, and the text of a number, of a mean beside its error, and of an undefined value."""

import math

import numpy as np

INTERVAL = "± is half the 95 % interval over n seeds, by Student's t"
FAILURES = ("diverged", "exploded")  # a status is ok, one of these with the step, as in diverged@400, or unfinished@<epoch>


def markdown_table(header, rows, align=None):
    """The lines of a Markdown table, joined: header [C] and rows [R, C] of anything that str() takes; None is an empty cell.

    A column is as wide as its longest cell, and left out where no row says anything in it. align: a letter per column, l or r
    (default: all l).
    """
    def column(title, letter, *cells):
        texts = ["" if cell is None else str(cell).replace("|", "\\|") for cell in (title, *cells)]
        width = max(3, *map(len, texts))
        rule = "-" * width if letter == "l" else "-" * (width - 1) + ":"
        return [text.ljust(width) if letter == "l" else text.rjust(width) for text in (texts[0], rule, *texts[1:])]

    columns = [column(title, letter, *cells) for title, letter, *cells in zip(header, align or "l" * len(header), *rows)
               if any(cell not in (None, "", "-") for cell in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns))


def failed(status):
    """Whether the status of a run says that it has no trained model."""
    return status.partition("@")[0] in FAILURES


def count_failures(statuses):
    """{"diverged": how many of the statuses of runs say so, "exploded": ...}."""
    return {word: sum(status.startswith(f"{word}@") for status in statuses) for word in FAILURES}


def failures_text(counts):
    """Those counts as in "2 diverged, 1 exploded"; "" without any."""
    return ", ".join(f"{counts[word]} {word}" for word in FAILURES if counts[word])


def number_text(value, form):
    """`value` in the format `form`; "-" where it is not finite."""
    return f"{value:{form}}" if math.isfinite(value) else "-"


def with_error(mean, error, form, error_form=None):
    """mean ± error, each in its format; the mean alone where the error is not finite, "-" where the mean is not."""
    if not (math.isfinite(mean) and math.isfinite(error)):
        return number_text(mean, form)
    return f"{mean:{form}} ± {error:{error_form or form}}"


def mean_and_error_text(mean, error=math.nan):
    """mean ± error to two digits of the error; the mean alone where the error is NaN, "-" where the mean is NaN."""
    if not error > 0 or abs(mean) > 1e6:
        return with_error(mean, error, ".4g", ".2g")
    return with_error(mean, error, f".{max(0, 1 - math.floor(math.log10(error)))}f")


def interval(values):
    """Mean and half-width of the 95 % interval, by Student's t, of the finite values among `values` [n].

    The half-width is NaN for fewer than two of them, and the mean for none.
    """
    from scipy.stats import t as student  # slow to import
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return (values.mean() if len(values) else math.nan), math.nan
    return values.mean(), student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5


def mean_and_error(values):
    """Mean, standard error and median of the finite values over the first axis.

    The error is NaN where fewer than two values are finite; the mean and the median are NaN where none is.
    """
    values = np.ma.masked_invalid(np.asarray(values, float))
    count = values.count(0)
    error = values.std(0, ddof=1) / np.sqrt(np.maximum(count, 1)) if len(values) > 1 else np.ma.zeros(values.shape[1:])
    error = np.where(count > 1, np.ma.filled(error, 0), np.nan)
    return np.ma.filled(values.mean(0), np.nan), error, np.ma.filled(np.ma.median(values, 0), np.nan)
