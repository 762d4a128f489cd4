"""Each run of the published packs has a command in results/reproduce.sh that parses to its flags."""

import fnmatch
import functools
import importlib
import json
import shlex
import subprocess

import pytest

from small_runs import ROOT
from vsm.names import NOT_IDENTITY
from vsm.stored_runs import open_runs

SCRIPT = ROOT / "results" / "reproduce.sh"
GONE = ("batches", "importance_samples", "part", "members", "quick", "threads")  # flags of older packs
UNPACKED = ("evaluations", "audits", "speed", "speed_gpu")  # parts with commands whose results are in no pack of their own


def identity(script, flags):
    """The script and the flags that make a run what it is, as something to compare."""
    mine = {key: value for key, value in flags.items() if key not in (*NOT_IDENTITY, *GONE, "module")}
    return script, json.dumps(mine, sort_keys=True)


@functools.cache
def defaults_of(script):
    return vars(importlib.import_module("benchmarks.benchmark" if script == "benchmark" else script).parse_args([]))


def stored_identity(run):
    """The identity of a stored run. A flag that it lacks has its default."""
    script, flags = run.config["script"], dict(run.config["flags"])
    defaults = {} if script == "spectrum" else defaults_of(script)  # studies/spectrum.py has no default for its data
    return identity(script, defaults | flags)


@pytest.fixture(scope="module")
def commands():
    """{part: {identity: flags}} of all that reproduce.sh prints."""
    usage = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, check=False).stderr
    parsed, found = {}, {}
    for part in usage.split()[2].split("|"):
        lines = subprocess.run(["bash", SCRIPT, part, "-n"], capture_output=True, text=True, check=True).stdout.splitlines()
        for line in lines:
            if line not in parsed:
                python, script, *argv = shlex.split(line)
                assert python == "python"
                module, *argv = argv if script == "-m" else [script.removesuffix(".py"), *argv]
                flags = vars(importlib.import_module(module).parse_args(argv)) | {"module": module}
                parsed[line] = identity(module.rpartition(".")[2], flags), flags
        found[part] = dict(parsed[line] for line in lines)
        assert len(found[part]) == len(lines), f"two commands of {part} make the same run"
    return found


@pytest.fixture(scope="module")
def runs():
    """[(pack, run, identity)] of every published run."""
    packs = sorted((ROOT / "results").glob("*.npz"))
    return [(path.stem, run, stored_identity(run)) for path in packs for run in open_runs([path])]


def test_every_published_run_has_its_command(commands, runs):
    made = {key for part in commands.values() for key in part}
    assert [str(run) for _, run, key in runs if key not in made] == []


def test_a_part_has_the_runs_of_its_pack_and_no_others(commands, runs):
    published = {key for *_, key in runs}
    for part, made in commands.items():
        own = {key for pack, *_, key in runs if pack == part}
        assert own <= made.keys(), part
        if part not in UNPACKED:
            assert made.keys() <= published, part
            assert not own or own == made.keys(), part


def test_stored_evaluations_have_their_command(commands, runs):
    """A command of the part `evaluations` reads the folder of each evaluated run, with the stored settings."""
    folders = {key: flags.get("out", "") for part in commands.values() for key, flags in part.items()}
    for _, run, key in runs:
        for part, module, names in (("eval", "evaluate", ("images", "iw_samples")),
                                    ("gradient_snr", "studies.gradient_snr", ("draws",)),
                                    ("latent_scale", "studies.latent_scale", ())):
            if not run.has(part):
                continue
            stored = run.arrays(part)["config"]["evaluation"]
            wanted = {"module": module} | {name: stored[name] for name in names}
            assert any(wanted.items() <= flags.items() and any(fnmatch.fnmatch(folders[key], glob) for glob in flags["runs"])
                       for flags in commands["evaluations"].values()), (str(run), part)


def test_the_page_has_a_line_and_the_number_of_runs_of_every_part(commands):
    page = (ROOT / "docs" / "reproducing.md").read_text()
    for part, made in commands.items():
        (line,) = [line for line in page.splitlines() if f"| `{part}` | {len(made)} |" in line]
        assert line.count("|") == 6, part
