"""Rewards for queries that a model writes: how good is the ranking they retrieve?

They read `turns`: the environment adds to the model's turn `ranking`, the ids of the retrieved documents with
the best first, and `augmented`, whether the model changed the query. A turn without a ranking contains no
query and scores 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlkit.rewards.retrieval import measure as measure_of

Turns = Sequence[Mapping[str, Any]]


def retrieval(turns: Turns, judged: Sequence[str], grades: Sequence[int], measure: str = "ndcg@10") -> float:
    """Return a measure of the documents that the queries retrieved, in [0, 1].

    Args:
        turns: Messages after the prompt; the model's last turn has the `ranking`.
        judged, grades: Ids and grades of the judged documents.
        measure: Name of the measure; see `rlkit.rewards.retrieval.measure`.
    """
    ranking = last_turn(turns).get("ranking")
    if ranking is None:
        return 0.0
    return measure_of(measure, ranking, dict(zip(judged, grades, strict=True)))


def gain(
    turns: Turns,
    judged: Sequence[str],
    grades: Sequence[int],
    original: Sequence[str],
    measure: str = "ndcg@10",
) -> float:
    """Return `retrieval` minus the same measure of the unchanged query, in [-1, 1].

    Rewriting helps weak retrievers and may hurt strong ones (CRUMB, arXiv 2509.07253).

    Args:
        turns, judged, grades, measure: See `retrieval`.
        original: Ranking of the unchanged query: document ids, best first.
    """
    baseline = measure_of(measure, original, dict(zip(judged, grades, strict=True)))
    return retrieval(turns, judged, grades, measure) - baseline


def priced(
    turns: Turns,
    judged: Sequence[str],
    grades: Sequence[int],
    measure: str = "ndcg@10",
    price: float = 0.05,
) -> float:
    """Return `retrieval` minus `price` if the model changed the query; an unchanged query is free.

    Raises:
        ValueError: The price is negative.
    """
    if price < 0:
        raise ValueError(f"price must not be negative, but it is {price}")
    return retrieval(turns, judged, grades, measure) - price * augmented(turns)


def augmented(turns: Turns) -> float:
    """Return 1 if the model changed the query, else 0. A metric."""
    return float(bool(last_turn(turns).get("augmented")))


def last_turn(turns: Turns) -> Mapping[str, Any]:
    """Return the last assistant message, or an empty mapping if there is none."""
    return next((turn for turn in reversed(turns) if turn["role"] == "assistant"), {})
