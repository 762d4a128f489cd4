"""The numbers behind the figures of finished runs, as a Markdown table: means, intervals, whether training converged.

    python -m studies.tables runs/synthetic/* --save runs/study.md
"""

from pathlib import Path

from studies.convergence import study_table
from vsm.cli import Parser, command_line
from vsm.runs import write_atomic
from vsm.stored_runs import add_run_flags, chosen_runs, refuse_other_scripts


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add_run_flags(parser)
    parser.add_argument("--save", required=True, metavar="FILE.md", help="the table to write")
    args = parser.parse_args(argv)
    if Path(args.save).suffix != ".md":
        parser.error(f"--save {args.save} must end in .md")
    return args


def main(args):
    runs = chosen_runs(args)
    refuse_other_scripts("this table", runs, ["train_synthetic", "train_images"])
    write_atomic(Path(args.save), study_table(runs).encode())
    print(args.save)


if __name__ == "__main__":
    command_line(parse_args, main)
