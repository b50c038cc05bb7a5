"""`rlkit rank`: train an encoder to rank the documents of a query."""

from __future__ import annotations

from collections.abc import Sequence

from rlkit.runs.launch import launch_or_prepare, split


def main(argv: Sequence[str]) -> int:
    """Train as the keys say and return the exit code."""
    options, argv = split(argv)
    launch_or_prepare("rank", options, argv)
    from rlkit.arguments.parse import parse_rank

    run = parse_rank(argv)  # a mistake in the keys is found before the trainer is imported
    from rlkit.training.ranking.rank import rank

    rank(run)
    return 0
