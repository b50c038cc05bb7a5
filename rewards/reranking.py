"""Rewards for a permutation that a model writes, such as `[3] > [1] > [2]`.

The last such chain counts, outside of thoughts (`rlkit.rewards.thinking`). A single identifier is a chain if
the model writes nothing else. Identifiers start at 1. A repeated identifier counts at its first position, an
unknown one is skipped, and missing candidates follow in their original order. A completion without any known
identifier contains no ranking, and all rewards are 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlkit.rewards.retrieval import ndcg_of_gains
from rlkit.rewards.thinking import after_thinking

_CHAIN = re.compile(r"\[\s*\d+\s*\](?:\s*>+\s*\[\s*\d+\s*\])+")
_SINGLE = re.compile(r"\[\s*\d+\s*\]")
_NUMBER = re.compile(r"\d{1,9}")


def read_permutation(completion: str, n: int) -> list[int] | None:
    """Parse a ranking of `n` candidates to a permutation of 0, ..., n - 1; None if there is no ranking."""
    ranked = _ranked_candidates(completion, n)
    if not ranked:
        return None
    return [*ranked, *(i for i in range(n) if i not in set(ranked))]


def _ranked_candidates(completion: str, n: int) -> list[int]:
    text = after_thinking(completion).strip()
    chains = _CHAIN.findall(text)
    if not chains and _SINGLE.fullmatch(text):
        chains = [text]
    if not chains:
        return []
    numbers = (int(number) - 1 for number in _NUMBER.findall(chains[-1]))
    return list(dict.fromkeys(number for number in numbers if 0 <= number < n))


def ndcg(completion: str, grades: Sequence[int], ideal: Sequence[int], k: int = 10) -> float:
    """Return the nDCG at k of the model's ranking with linear gain, in [0, 1]; 0 without a ranking.

    Args:
        completion: Completion of the model.
        grades: Grades of the candidates, in their original order.
        ideal: Grades of all documents relevant to the query, whether they are candidates or not.
        k: Number of ranks that count.
    """
    order = read_permutation(completion, len(grades))
    if order is None:
        return 0.0
    return ndcg_of_gains([grades[i] for i in order], ideal, k)


def whole_list(completion: str, grades: Sequence[int]) -> float:
    """Return 1 if the ranking has every candidate exactly once and nothing else, else 0. A metric."""
    text = after_thinking(completion)
    chains = _CHAIN.findall(text) or _SINGLE.findall(text)
    numbers = [int(number) for number in _NUMBER.findall(chains[-1])] if chains else []
    return float(sorted(numbers) == list(range(1, len(grades) + 1)))
