"""`rlkit report RUN [RUN ...]`: write the HTML page of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlkit.arguments.command_line import CommandParser, output_file


def main(argv: Sequence[str]) -> int:
    """Write the page, print its path, and return the exit code."""
    parser = CommandParser(
        prog="rlkit report", description="Write an HTML page about a run, or about several side by side."
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run directory, such as runs/causal"
    )
    parser.add_argument(
        "-o", "--out", type=output_file, metavar="FILE", help="default: report.html in the run directory"
    )
    options = parser.parse_args(argv)
    from rlkit.report.build import build_report

    print(build_report(options.runs, options.out))
    return 0
