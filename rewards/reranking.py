"""Rewards for a permutation that a model writes, such as `[3] > [1] > [2]`.

The last such chain counts, outside of thoughts (`rlkit.rewards.thinking`). If there is no chain, an answer
counts that is nothing but a list of known identifiers in one of these forms, with or without a code fence:

- `[3], [1], [2]`, with commas, spaces or line breaks in between; also a single `[3]`
- `[3, 1, 2]`, a JSON list of integers
- `3 > 1 > 2`
- one number per line, at least two

Numbers in any other text are not read: they may be years, quantities or scores of the passages. Identifiers
start at 1. A repeated identifier counts at its first position, an unknown one in a chain is skipped, and
missing candidates follow in their original order. A completion without any known identifier contains no
ranking, and all rewards are 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlkit.rewards.retrieval import ndcg_of_gains
from rlkit.rewards.thinking import after_thinking

_CHAIN = re.compile(r"\[\s*\d+\s*\](?:\s*>+\s*\[\s*\d+\s*\])+")
_BRACKETED = re.compile(r"(?:\[\s*+\d++\s*+\][\s,]*+)+")
_NUMBER = re.compile(r"\d+")
_FENCE = re.compile(r"```\w*\n(.*)\n```", re.DOTALL)


def read_permutation(completion: str, n: int) -> list[int] | None:
    """Parse a ranking of `n` candidates to a permutation of 0, ..., n - 1; None if there is no ranking."""
    ranked = list(
        dict.fromkeys(number - 1 for number in _read_identifiers(completion, n) if 1 <= number <= n)
    )
    if not ranked:
        return None
    return [*ranked, *(i for i in range(n) if i not in set(ranked))]


def _read_identifiers(completion: str, n: int) -> list[int]:
    """Return the numbers of the ranking in a completion, as they are written; [] if there is no ranking."""
    text = after_thinking(completion).strip()
    if chains := _CHAIN.findall(text):
        return _numbers(_NUMBER.findall(chains[-1]))
    numbers = _numbers(_listed_numbers(text))
    # Years and quantities are also written as lists. A single number that is no identifier gives them away.
    return numbers if all(1 <= number <= n for number in numbers) else []


def _listed_numbers(text: str) -> list[str]:
    """Return the numbers of a string that is nothing but a list of identifiers; [] for any other string."""
    if fence := _FENCE.fullmatch(text):
        text = fence[1].strip()
    if _BRACKETED.fullmatch(text):
        return _NUMBER.findall(text)
    if text.startswith("[") and text.endswith("]"):
        parts = text[1:-1].split(",")
    elif ">" in text:
        parts = text.split(">")
    else:
        parts = [line for line in text.splitlines() if line.strip()]
        if len(parts) < 2:  # a bare number may be the answer to another question
            return []
    parts = [part.strip() for part in parts]
    return parts if all(_NUMBER.fullmatch(part) for part in parts) else []


def _numbers(texts: Sequence[str]) -> list[int]:
    """Return the numbers as integers; 0, which is no identifier, for those with very many digits."""
    return [int(text) if len(text) < 10 else 0 for text in texts]


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
    n = len(grades)
    return float(n > 0 and sorted(_read_identifiers(completion, n)) == list(range(1, n + 1)))
