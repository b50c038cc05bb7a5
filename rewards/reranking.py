"""Rewards for a permutation that a model prints, such as `[3] > [1] > [2]`.

The last such chain after any `</think>` counts; one identifier alone is a chain if nothing else is written.
Identifiers begin at 1. Those that repeat count where they stand first, unknown ones are passed over, and what
is missing follows in the given order. A text without any known identifier is no ranking: all rewards are 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlkit.rewards.retrieval import ndcg_of_gains

_CHAIN = re.compile(r"\[\s*\d+\s*\](?:\s*>+\s*\[\s*\d+\s*\])+")
_ALONE = re.compile(r"\[\s*\d+\s*\]")
_NUMBER = re.compile(r"\d{1,9}")


def read_permutation(completion: str, n: int) -> list[int] | None:
    """The order of `n` candidates, from 0, all of them; None where no ranking is written."""
    named = _named(completion, n)
    if not named:
        return None
    return [*named, *(i for i in range(n) if i not in set(named))]


def _named(completion: str, n: int) -> list[int]:
    text = completion.rpartition("</think>")[2].strip()
    chains = _CHAIN.findall(text) or ([text] if _ALONE.fullmatch(text) else [])
    if not chains:
        return []
    numbers = (int(number) - 1 for number in _NUMBER.findall(chains[-1]))
    return list(dict.fromkeys(number for number in numbers if 0 <= number < n))


def ndcg(completion: str, grades: Sequence[int], ideal: Sequence[int], k: int = 10) -> float:
    """nDCG at k of the printed ranking, linear gain, in [0, 1]; 0 where none is printed.

    Args:
        completion: what the model wrote.
        grades: of the candidates, in the given order.
        ideal: the grades of all documents that are relevant to the query, whether candidates or not.
        k: the first ones, which count.
    """
    order = read_permutation(completion, len(grades))
    return 0.0 if order is None else ndcg_of_gains([grades[i] for i in order], ideal, k)


def whole_list(completion: str, grades: Sequence[int]) -> float:
    """1 if the printed ranking names every candidate once and nothing else, else 0. A metric."""
    text = completion.rpartition("</think>")[2]
    chains = _CHAIN.findall(text) or _ALONE.findall(text)
    numbers = [int(number) for number in _NUMBER.findall(chains[-1])] if chains else []
    return float(sorted(numbers) == list(range(1, len(grades) + 1)))
