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
  up, down     move in the list; tab goes from list to list
  n, p         next and previous step
  j, k         next and previous rollout
  enter, esc   go to the rollouts of a step; read a rollout on the whole screen, and back
  /            search the text of prompts and turns, in any case of letters
  a            look in all steps, or in this one again
  f            filters: reward and length (0.5, 0.2..0.8, ..100, 500..), truncated, invalid by its reason
  c            clear the search and the filters
  s, S         sort by the next column, and the other way round; or click on a column's head
  r            read the folder again, while the run trains
  q            quit
"""


def main(argv: Sequence[str]) -> int:
    """Show the rollouts and return the exit code."""
    options = build_parser().parse_args(argv)
    files = RolloutFiles(options.run)
    if options.step is not None and options.step not in files.files:
        first, last = min(files.files), max(files.files)
        raise UserError(
            f"{options.run} has no rollouts of step {options.step}: they are of {first} to {last}"
        )
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("rlkit view needs a terminal; rlkit report writes a page")
    from rlkit.view.app import Viewer
    from rlkit.view.data import Rollouts

    viewer = Viewer(Rollouts(files), options.step)
    viewer.run()
    return viewer.return_code or 0


def build_parser() -> CommandParser:
    """Build the parser of the command."""
    parser = CommandParser(
        prog="rlkit view",
        description="Browse the rollouts of a run in the terminal: by step, sorted, filtered, searched.",
        epilog=KEYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, e.g. runs/smollm2")
    parser.add_argument("--step", type=int, help="the step to begin with (default: the last)")
    return parser
