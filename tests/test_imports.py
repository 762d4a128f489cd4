"""The form of the source: the length of lines and modules, who imports whom, and which text a mistake of mutants.py replaces."""

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter

import pytest

from mutants import MUTANTS, TESTS
from small_runs import ROOT, environment

LINES = 450  # of a module
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
SOURCES = sorted(file for place in ("", "docs/**/", "results/**/", "tests/**/", "vsm/**/") for file in ROOT.glob(f"{place}*.py"))
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
         for place in ("*.py", "vsm/**/*.py", "studies/**/*.py", "benchmarks/**/*.py") for path in ROOT.glob(place)}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_line_and_no_module_is_too_long(file):
    assert "E" in PROJECT["ruff"]["lint"]["select"]  # with E501, the length of a line
    lines = file.read_text().splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > PROJECT["ruff"]["line-length"]] == [] and len(lines) <= LINES


def test_every_mutant_replaces_a_text_that_its_file_has_once():
    mutants = [(file, old) for file, pairs in MUTANTS.items() for old, _ in pairs]
    assert [(file, old) for file, old in mutants if (ROOT / file).read_text().count(old) != 1 or file not in TESTS] == []


def imports():
    """{module: {module that it imports: names that it takes from it}} over the modules of this repository."""
    found = {}
    for module, path in FILES.items():
        mine = found.setdefault(module, {})
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                taken = [(alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                taken = [(f"{node.module}.{alias.name}", None) if f"{node.module}.{alias.name}" in FILES
                         else (node.module, alias.name) for alias in node.names]
            else:
                continue
            for other, name in taken:
                if other in FILES:
                    mine.setdefault(other, set()).add(name)
    return found


def test_what_trains_imports_nothing_that_publishes_or_benchmarks():
    folders, scripts = ("studies", "benchmarks"), ("plots", "audit")  # the two scripts publish too
    below = [(module, other) for module, others in imports().items() for other in others
             if module.split(".")[0] not in (*folders, *scripts) and other.split(".")[0] in (*folders, *scripts)]
    assert below == []


def test_no_module_imports_itself_by_way_of_others():
    list(TopologicalSorter(imports()).static_order())  # raises CycleError


def test_a_figure_module_is_imported_for_figures_alone():
    """Other modules take from it functions figure(runs, save) and draw_run(run) only; style.py is for figure modules."""
    for module, others in imports().items():
        for other, names in others.items():
            if ".figure" in other and ".figure" not in module:
                figures = {node.name for node in ast.parse(FILES[other].read_text()).body if isinstance(node, ast.FunctionDef)
                           and [arg.arg for arg in node.args.args] in (["runs", "save"], ["run"])}
                assert names <= figures | {None}, (module, other)


def test_the_project_table_lists_every_module():
    table, flat = PROJECT["setuptools"], sorted(module for module, path in FILES.items() if path.parent == ROOT)
    packages = sorted(module for module, path in FILES.items() if path.name == "__init__.py")
    assert (table["py-modules"], table["packages"]) == (flat, packages)


@pytest.mark.parametrize("stranger", ["models.py", "data/__init__.py"])
def test_a_strangers_module_of_the_same_name_gets_one_sentence_with_both_files(tmp_path, stranger):
    (tmp_path / stranger).parent.mkdir(exist_ok=True)
    (tmp_path / stranger).write_text("")
    command = [sys.executable, "-c", "from vsm.loading import load_vae"]
    done = subprocess.run(command, cwd=tmp_path, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"{tmp_path / stranger} instead of {ROOT}" in done.stderr
