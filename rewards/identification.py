"""Rewards for the identifier of a document that a model writes in answer to a query.

The answer is the completion without thoughts (`rlkit.rewards.thinking`) and without white space around it. It
must equal an identifier: a list of identifiers, or an identifier with other text, is no answer and scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlkit.rewards.thinking import after_thinking


def read_identifier(completion: str) -> str:
    """Return the answer of a completion, which may be no document's identifier; "" if there is none."""
    return after_thinking(completion).strip()


def hit(completion: str, relevant: Sequence[str]) -> float:
    """Return 1 if the model writes the identifier of a relevant document, else 0."""
    return float(read_identifier(completion) in relevant)
