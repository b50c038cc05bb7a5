"""Rewards of a description of what a searcher wants, by how well it tells relevant texts from others.

The idea of judging an intent by what it separates is ours; the task is Q2ID's (arXiv 2008.10889), which
compares words with a reference. They read `turns`: the environment has put `ranking` beside the model's turn,
the judged documents by how well they fit the description, and `intent`, its text. A turn without has none: 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlkit.rewards.querying import last_turn
from rlkit.rewards.retrieval import measure

Turns = Sequence[Mapping[str, Any]]
N = 4  # words in a row that are no coincidence
_WORD = re.compile(r"\w+")


def separation(turns: Turns, relevant: Sequence[str], pool: Sequence[str]) -> float:
    """Average precision of the judged documents in the order of the description, in [0, 1].

    It is scaled so that 0 is the worst order, with all that is relevant at the end: what tells nothing apart
    has no share of the reward.

    Args:
        turns: the model's turn with its `ranking` of the pool.
        relevant: ids of those that are relevant.
        pool: ids of all, of which some are not relevant.
    """
    good = dict.fromkeys(relevant, 1)
    worst = measure("ap", sorted(pool, key=good.__contains__), good)
    found = measure("ap", last_turn(turns).get("ranking", ()), good)
    return max(0.0, (found - worst) / (1 - worst))


def copied(turns: Turns, snippets: Sequence[str]) -> float:
    """The share of the description's runs of four words that stand in a snippet, in [0, 1]. A metric."""
    written = list(_runs(last_turn(turns).get("intent", "")))
    known = {run for text in snippets for run in _runs(text)}
    return sum(run in known for run in written) / len(written) if written else 0.0


def own_words(
    turns: Turns,
    relevant: Sequence[str],
    pool: Sequence[str],
    snippets: Sequence[str],
    copy_price: float = 1.0,
) -> float:
    """The separation less a price for what is copied from the snippets, not below 0.

    Raises:
        ValueError: a negative price.
    """
    if copy_price < 0:
        raise ValueError(f"copy_price must not be negative: it is {copy_price}")
    return max(0.0, separation(turns, relevant, pool) - copy_price * copied(turns, snippets))


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return zip(*(words[i:] for i in range(N)), strict=False)
