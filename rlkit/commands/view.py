"""`rlkit view RUN`: browse the rollouts of a run in the terminal, while it trains or afterwards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlkit.arguments.command_line import CommandParser
from rlkit.errors import UserError
from rlkit.runs.record import RolloutFiles

KEYS = """\
keys:
  up, down     move in the list; tab switches between lists
  n, p         next and previous step
  j, k         next and previous rollout
  enter, esc   open the step or show the rollout full screen; go back
  /            search prompts and turns, ignoring case
  a            switch the search between all steps and this step
  f            filter by reward and length (0.5, 0.2..0.8, ..100, 500..),
               truncation and invalid reason
  c            clear search and filters
  s, S         sort by the next column; reverse the order (or click a header)
  r            reload the run directory, e.g. during training
  q            quit
"""


def main(argv: Sequence[str]) -> int:
    """Show the rollouts until the user quits and return the exit code."""
    options = build_parser().parse_args(argv)
    files = RolloutFiles(options.run)
    if options.step is not None and options.step not in files.files:
        first, last = min(files.files), max(files.files)
        raise UserError(
            f"{options.run} has no rollouts of step {options.step}; its steps range from {first} to {last}"
        )
    # Checked before Textual is imported: without a terminal it would fail with a traceback.
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("rlkit view requires a terminal; use rlkit report for an HTML page")
    from rlkit.view.app import Viewer
    from rlkit.view.data import Rollouts

    viewer = Viewer(Rollouts(files), options.step)
    viewer.run()
    return viewer.return_code or 0


def build_parser() -> CommandParser:
    """Build the parser of the command."""
    parser = CommandParser(
        prog="rlkit view",
        description="Browse the rollouts of a run in the terminal, with search, filters and sorting.",
        epilog=KEYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, e.g. runs/smollm2")
    parser.add_argument("--step", type=int, metavar="N", help="step to show first (default: the last)")
    return parser
