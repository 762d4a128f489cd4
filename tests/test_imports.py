"""Purpose decides the folder of a module: read from the import statements, also those inside functions."""

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter

import pytest

from small_runs import ROOT, environment

FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
         for place in ("*.py", "vsm/**/*.py", "studies/**/*.py", "benchmarks/**/*.py") for path in ROOT.glob(place)}


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
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    flat = sorted(module for module, path in FILES.items() if path.parent == ROOT)
    packages = sorted(module for module, path in FILES.items() if path.name == "__init__.py")
    assert (table["py-modules"], table["packages"]) == (flat, packages)


@pytest.mark.parametrize("stranger", ["models.py", "data/__init__.py"])
def test_a_strangers_module_of_the_same_name_gets_one_sentence_with_both_files(tmp_path, stranger):
    (tmp_path / stranger).parent.mkdir(exist_ok=True)
    (tmp_path / stranger).write_text("")
    command = [sys.executable, "-c", "from vsm.loading import load_vae"]
    done = subprocess.run(command, cwd=tmp_path, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{tmp_path / stranger} instead of {ROOT}" in done.stderr
