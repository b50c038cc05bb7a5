"""Rewards for a search through a document tree: the quality of the ranking and the cost of the turns.

They read `turns`: the environment adds `ranking` to them, the ids of the documents that the model has scored
so far, best first. Turns without a ranking score 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlkit.rewards.retrieval import ndcg_of_gains

Turns = Sequence[Mapping[str, Any]]


def found(
    turns: Turns, judged: Sequence[str], grades: Sequence[int], ideal: Sequence[int] | None = None
) -> float:
    """Return the nDCG@10 of the final ranking, in [0, 1].

    Args:
        turns: Messages after the prompt; the last one with a `ranking` counts.
        judged, grades: Ids and grades of the judged documents that can be ranked.
        ideal: Grades of all judged documents, also those that cannot be ranked; None means `grades`.
    """
    ranking = next((turn["ranking"] for turn in reversed(turns) if turn.get("ranking") is not None), ())
    grade_of = dict(zip(judged, grades, strict=True))
    gains = [grade_of.get(document, 0) for document in dict.fromkeys(ranking)]
    return ndcg_of_gains(gains, grades if ideal is None else ideal)


def steps(turns: Turns) -> float:
    """Return the number of assistant turns. A metric."""
    return float(sum(turn["role"] == "assistant" for turn in turns))


def priced(
    turns: Turns,
    judged: Sequence[str],
    grades: Sequence[int],
    fewest: int,
    *,
    step_price: float = 0.02,
    ideal: Sequence[int] | None = None,
) -> float:
    """Return `found` minus `step_price` for each turn beyond the number that the oracle needs, at least 0.

    Args:
        turns, judged, grades, ideal: See `found`.
        fewest: Number of assistant turns that the oracle needs.
        step_price: Price of each additional turn.

    Raises:
        ValueError: The price is negative.
    """
    if step_price < 0:
        raise ValueError(f"step_price must not be negative, but it is {step_price}")
    return max(0.0, found(turns, judged, grades, ideal) - step_price * max(0.0, steps(turns) - fewest))
