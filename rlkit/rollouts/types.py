"""What engines take and give, and what a rollout is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and what ends a turn besides its limit.

    Attributes:
        ends: token ids that end a turn.
        stop: strings that end a turn; the tokens they stand in are kept.
        temperature: 0 is greedy.
        key: with a rollout's place it decides the random numbers of transformers; None: torch's generator.
            With vLLM they depend on what is sampled side by side: a seed for each turn halves its speed.
        further: what else the engine knows, under its own names.
    """

    ends: tuple[int, ...]
    stop: tuple[str, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    key: tuple[int, ...] | None = None
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One turn to sample.

    Attributes:
        row: the rollout, by its place in this process's batch.
        place: the rollout, by its place among those of all processes.
        ids: everything so far, prompt first.
        limit: most tokens, at least 1.
        start: tokens of this rollout sampled before.
    """

    row: int
    place: int
    ids: Sequence[int]
    limit: int
    start: int


@dataclass(frozen=True)
class Sample:
    """One sampled turn: its tokens with the one that ended it, their log-probabilities, and why it ended."""

    ids: list[int]
    log_probs: list[float] | None
    finish: Literal["end", "stop", "length"]


class Engine(Protocol):
    """Samples turns."""

    @property
    def context(self) -> int | None:
        """Maximum number of tokens of a rollout with its prompt, None for no limit."""

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Take requests; a row has one at a time."""

    def collect(self, *, wait: bool) -> list[tuple[int, Sample]]:
        """Return the rows that have finished since; with `wait` at least one, if any was submitted."""


@dataclass
class Rollout:
    """One rollout: a prompt, and everything after it.

    Attributes:
        prompt_ids: token ids.
        ids: the tokens after the prompt, the model's and the environment's.
        mask: for each of them 1 where the model sampled it, 0 where the environment wrote it.
        log_probs: the sampler's log-probability of each, 0 for the environment's; None where it gives none.
        turns: chat messages after the prompt: the model's are from "assistant". `tokens` is their number,
            with those of the chat template around a reply; a reply's `record` stands beside it.
        truncated: it was cut off by a limit.
        stopped: a stop string ended it; its last token, an end token, is not the model's.
        invalid: why the environment or the sampler failed, or None.
    """

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    log_probs: list[float] | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)
    truncated: bool = False
    stopped: bool = False
    invalid: str | None = None

    @property
    def sampled_ids(self) -> list[int]:
        """The tokens that the model sampled."""
        return [token for token, own in zip(self.ids, self.mask, strict=True) if own]

    @property
    def text(self) -> str:
        """What the model wrote, its turns joined by line ends; nothing that the environment wrote."""
        return "\n".join(turn["content"] for turn in self.turns if turn["role"] == "assistant")

    @classmethod
    def single(cls, text: str, ids: list[int], truncated: bool) -> Rollout:
        """A rollout of one turn that something else has sampled."""
        turns = [{"role": "assistant", "content": text, "tokens": len(ids)}]
        return cls([], ids, [1] * len(ids), turns=turns, truncated=truncated)

    def columns(self) -> dict[str, Any]:
        """What rewards may read of it besides the task's columns. The environment's words are no answer."""
        return {
            "completion": self.text,
            "completion_ids": self.sampled_ids,
            "turns": self.turns,
            "truncated": self.truncated,
            "stopped": self.stopped,
            "invalid": self.invalid,
            "environment_tokens": len(self.ids) - sum(self.mask),
        }
