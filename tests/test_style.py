"""The limits that pyproject.toml states hold without ruff too, and the mistakes of mutants.py are still about the source."""

import tomllib

import pytest

from mutants import MUTANTS, TESTS
from small_runs import ROOT

LINES = 450  # of a module
FOLDERS = [ROOT / name for name in ("docs", "results", "tests", "vsm")]
FILES = sorted([*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in folder.rglob("*.py"))])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_line_and_no_module_is_too_long(file):
    limits = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert "E" in limits["lint"]["select"]  # with E501, the length of a line
    lines = file.read_text().splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > limits["line-length"]] == []
    assert len(lines) <= LINES


def test_every_mutant_replaces_a_text_that_its_file_has_once():
    assert [(file, old) for file, old, new in MUTANTS if (ROOT / file).read_text().count(old) != 1 or file not in TESTS] == []
