"""The documentation cannot rot: its links resolve, its commands parse, its Python blocks run or compile."""

import importlib
import re
import shlex
import subprocess

import pytest

import param_recovery
from small_runs import ROOT, train, train_on

PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted((ROOT / "results").glob("reproduce*.sh"))
# Lines that begin with these are left out.
OTHERS = (r"git|pip|pytest|python3? -m (?!studies|benchmarks)|\.|source|export|sbatch|scontrol|parallel|xargs|apt|ssh|tail|"
          r"VSM_\w+=\S+ pytest")
# Commands are not run but printed, with their loops and variables expanded by a real shell.
PRELUDE = """set -f
python() { printf 'COMMAND'; printf '\\x1f%s' "$@"; printf '\\n'; }
cd() { :; }
"""


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(shell, folder):
    """The argument lists that `python` gets in a piece of shell, everything else left out. What it redirects goes to `folder`."""
    if "python " not in shell:
        return []
    lines = [line for line in shell.replace("\\\n", " ").splitlines() if not re.match(rf"\s*(?:[A-Z_]+=\S+ )*({OTHERS})\b", line)]
    done = subprocess.run(["bash", "-c", PRELUDE + "\n".join(lines)], cwd=folder, capture_output=True, text=True,
                          check=False, stdin=subprocess.DEVNULL)
    return [line.split("\x1f")[1:] for line in done.stdout.splitlines() if line.startswith("COMMAND\x1f")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = [re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                        for line in path.read_text().splitlines() if line.startswith("#")]
            assert anchor in headings, f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda page: page.name)
def test_commands_parse(page, capsys, tmp_path):
    for shell in blocks(page, "bash") + blocks(page, "sh") if page.suffix == ".md" else [page.read_text()]:
        assert subprocess.run(["bash", "-n"], input=shell, capture_output=True, text=True, check=False).returncode == 0, shell
        for script, *argv in commands(shell, tmp_path):
            written = [word for flag, word in zip(argv, argv[1:]) if flag in ("--save", "--out")]
            assert not [word for word in written if word.startswith("results/")], f"{page.name}: overwrites what is published"
            if script == "-m":
                script, *argv = f"{argv[0].replace('.', '/')}.py", *argv[1:]
            if not script.endswith(".py") or not (ROOT / script).exists():
                assert script == "-c" or script.startswith("-"), f"{page.name}: python {script}"
                continue
            try:
                module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
                getattr(module, "parse_runs", module.parse_args)(argv)
            except SystemExit as error:
                message = capsys.readouterr().err.strip().rpartition("\n")[2]
                assert error.code == 0, f"{page.name}: python {script} {shlex.join(argv)}: {message}"


def test_no_example_of_help_overwrites_what_is_published():
    sources = [*ROOT.glob("*.py"), *(file for name in ("vsm", "studies", "benchmarks") for file in (ROOT / name).rglob("*.py"))]
    assert [file.name for file in sources if re.search(r"--(save|out)[ =]results/", file.read_text())] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile(page):
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150 and len(text.split()) <= 1500


def test_every_array_of_a_run_is_documented(digits, tmp_path):
    """docs/files.md names every array and file of a run in the first cell of a table's row."""
    rows = re.findall(r"^\| (`[^|]*?) \|", (ROOT / "docs" / "files.md").read_text(), re.M)
    documented = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    runs = {"2d": train(tmp_path / "2d", epochs=1), "gaussian": train_on(digits, tmp_path / "gaussian", "--epochs", 1),
            "bernoulli": train_on(digits, tmp_path / "bernoulli", "--epochs", 1, "--latent", "bernoulli")}
    for name, arrays in runs.items():
        assert not arrays.keys() - documented, name
        assert not {file.name for file in (tmp_path / name).iterdir()} - documented, name
    assert not param_recovery.closed_forms(param_recovery.parse_args(["--points", "2"])).keys() - documented
