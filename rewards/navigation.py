"""Rewards of a search through a tree: what was found, and what it cost.

They read `turns`: the environment puts beside them `ranking`, the documents that the model has scored so far,
best first. Without one nothing was found: 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlkit.rewards.retrieval import ndcg

Turns = Sequence[Mapping[str, Any]]


def found(turns: Turns, judged: Sequence[str], grades: Sequence[int]) -> float:
    """nDCG@10 of what was found, in [0, 1].

    Args:
        turns: of which the last with a `ranking` counts.
        judged, grades: ids and grades of the documents that were judged.
    """
    ranking = next((turn["ranking"] for turn in reversed(turns) if turn.get("ranking") is not None), ())
    return ndcg(ranking, dict(zip(judged, grades, strict=True)))


def steps(turns: Turns) -> float:
    """Turns of the model. A metric."""
    return float(sum(turn["role"] == "assistant" for turn in turns))


def priced(
    turns: Turns, judged: Sequence[str], grades: Sequence[int], fewest: int, step_price: float = 0.02
) -> float:
    """What was found less a price for each turn beyond those that one who knows needs, not below 0.

    Raises:
        ValueError: a negative price.
    """
    if step_price < 0:
        raise ValueError(f"step_price must not be negative: it is {step_price}")
    return max(0.0, found(turns, judged, grades) - step_price * max(0.0, steps(turns) - fewest))
