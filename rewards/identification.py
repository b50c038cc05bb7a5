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


def graded(completion: str, relevant: Sequence[str], ideal: Sequence[float]) -> float:
    """Return the grade of the document that the model names, divided by the highest one, in [0, 1].

    Args:
        completion: Completion of the model.
        relevant: Identifiers of the relevant documents, highest grade first.
        ideal: Their grades, which are positive.
    """
    identifier = read_identifier(completion)
    return ideal[list(relevant).index(identifier)] / ideal[0] if identifier in relevant else 0.0
