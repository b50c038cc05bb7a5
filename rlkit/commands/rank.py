"""`rlkit rank`: train an encoder to rank the candidate documents of a query."""

from __future__ import annotations

from collections.abc import Sequence

from rlkit.arguments.help import print_help
from rlkit.runs.launch import check_start, launch_or_prepare, split

SUMMARY = "Train an encoder to rank the candidate documents of a query."


def main(argv: Sequence[str]) -> int:
    """Train an encoder and return the exit code."""
    if print_help("rank", SUMMARY, argv):
        return 0
    options, argv = split(argv)
    check_start("rank", argv)  # fails within a second, before importing torch or launching processes
    launch_or_prepare("rank", options, argv)
    from rlkit.arguments.parse import parse_rank
    from rlkit.training.ranking.rank import rank

    rank(parse_rank(argv))
    return 0
