"""The limits that pyproject.toml states hold without ruff too: the length of a line, and the length of a module."""

import tomllib

import pytest

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
