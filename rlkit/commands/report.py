"""`rlkit report RUN [RUN ...]`: write the HTML report of one run, or a comparison of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlkit.arguments.command_line import CommandParser, output_file


def main(argv: Sequence[str]) -> int:
    """Write the report, print its path, and return the exit code."""
    parser = CommandParser(
        prog="rlkit report", description="Write the HTML report of one run, or a comparison of several."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, e.g. runs/causal")
    parser.add_argument(
        "-o",
        "--out",
        type=output_file,
        metavar="FILE.html",
        help="output file (default: report.html in RUN, or next to the first RUN if there are several)",
    )
    options = parser.parse_args(argv)
    from rlkit.report.build import build_report

    print(build_report(options.runs, options.out))
    return 0
