"""Turning prompts into rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Completion:
    """One sampled answer: its text, its token ids, and whether the token limit cut it off."""

    text: str
    ids: Sequence[int]
    truncated: bool
