"""Published items in the RLCausal format: a prompt and the distribution that answers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlkit.errors import InvalidItemError


def read_item(item: Mapping[str, Any]) -> tuple[Any, list[float]]:
    """Return the prompt (a string or chat messages) and the ground truth of an item.

    The RLCausal release stores the ground truth inside `reward_model`.

    Raises:
        InvalidItemError: A field is missing or has the wrong type.
    """
    fields = {**(item.get("reward_model") or {}), **item}
    for name in ("prompt", "ground_truth"):
        if name not in fields:
            raise InvalidItemError(f"there is no field {name!r}")
    prompt, truth = fields["prompt"], fields["ground_truth"]
    if not isinstance(prompt, str) and not is_chat(prompt):
        raise InvalidItemError("prompt must be a string or a list of chat messages")
    if not isinstance(truth, list) or not truth or not all(map(is_probability, truth)):
        raise InvalidItemError("ground_truth must be a list of probabilities")
    return prompt, truth


def agrees(answer: Sequence[float], truth: Sequence[float]) -> bool:
    """Return whether the total variation distance, rounded to two decimals, is at most 0.01.

    The comparison is in integer hundredths: with floats, rounding errors would decide a distance of 0.01.
    """
    if len(answer) != len(truth):
        return False
    return sum(abs(round(100 * p) - round(100 * q)) for p, q in zip(answer, truth, strict=True)) <= 2


def is_probability(value: object) -> bool:
    """Return whether a value is a number from 0 to 1."""
    return isinstance(value, int | float) and 0 <= value <= 1


def is_chat(prompt: object) -> bool:
    """Return whether a prompt is a list of messages that each have a string as content."""
    return isinstance(prompt, list) and all(
        isinstance(message, Mapping) and isinstance(message.get("content"), str) for message in prompt
    )
