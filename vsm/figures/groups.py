"""Groups of image runs that differ in their seed: by panel, with their names, markers, and the texts that tell of their seeds."""

import itertools

from vsm.figures.style import area_key
from vsm.names import group_by_seed, in_order, pair_order, settings_of, short_name
from vsm.stored_runs import open_runs
from vsm.tables import count_failures, failures_text

MARKERS = {"plugin": ".v^Do<>d", "unbiased": "xP*+X123", "released": "sph8H|_4"}  # of an estimator's lines, one after another


def grouped(runs, part="metrics", split=()):
    """{data set and network: [(name, arrays of the runs that differ only in their seed)]}, names in the order of LEARN and INFER.

    With `split`, names of flags, runs that differ in these flags are apart too, and the values are in the title's second line.
    """
    loaded, panels = [(run.name, run.arrays(part)) for run in open_runs(runs)], {}
    for run, settings in zip(loaded, settings_of([arrays["config"] for _, arrays in loaded], split)):
        flags = run[1]["config"]["flags"]
        title = f"{short_name(flags['data'])}, {flags['net']}" + (f"\n{settings}" if settings else "")
        panels.setdefault(title, []).append(run)

    def groups_of(mine):
        found = group_by_seed([name for name, _ in mine], [arrays["config"] for _, arrays in mine])
        groups = [(name, settings, [mine[i][1] for i in members]) for name, settings, members in found]
        groups.sort(key=lambda group: (pair_order(group[2][0]["config"]["flags"]), in_order(group[1])))
        return [(", ".join(filter(None, (name, settings))), members) for name, settings, members in groups]

    return {title: groups_of(panels[title]) for title in sorted(panels, key=in_order)}


def named_groups(panels):
    """[(name, members)] over all panels; where there are several panels, a name begins with its panel's title."""
    return [(f"{title}, {name}" if len(panels) > 1 else name, members)
            for title, groups in panels.items() for name, members in groups]


def markers_of(panels):
    """{name: marker} of the groups in all panels: by estimator, and by order among the names of one pair and estimator."""
    markers, twins = {}, {}
    for name, members in itertools.chain(*panels):
        estimator = members[0]["config"]["flags"].get("estimator", "plugin")
        same = twins.setdefault((members[0]["config"]["label"], estimator), [])
        if name not in same:
            markers[name] = MARKERS[estimator][len(same) % 8]
            same.append(name)
    return markers


def band_key(panels):
    """{what bands are, and how many seeds they are of: handle} for a legend; empty where no group has several seeds."""
    counts = sorted({len(members) for _, members in itertools.chain(*panels)})
    if counts[-1] == 1:
        return {}
    several = [count for count in counts if count > 1]
    seeds = f"{several[0]} to {several[-1]}" if len(several) > 1 else several[0]
    return {f"± one standard error{', where' if counts[0] == 1 else ','} {seeds} seeds": area_key("0.85")}


def seeds_of(members):
    """The text "seed 0" or "3 seeds (1 diverged)" for the arrays of runs that differ only in their seed."""
    return (f"{len(members)} seeds" if len(members) > 1 else f"seed {members[0]['config']['flags']['seed']}") + fate_of(members)


def fate_of(members):
    """The text " (1 diverged)", or the status of a single run that is not ok; otherwise nothing."""
    statuses = [str(arrays.get("status", "unfinished")) for arrays in members]
    if len(members) == 1:
        return "".join(f" ({status})" for status in statuses if status != "ok")
    failures = failures_text(count_failures(statuses))
    return f" ({failures})" if failures else ""
