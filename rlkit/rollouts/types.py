"""The types that engines and the rollout loop exchange: sampling settings, requests, samples and rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Sampling:
    """Sampling settings: how tokens are drawn, and what ends a turn.

    Attributes:
        eos_token_ids: Ids of the tokens that end a turn.
        stop: Strings that end a turn. The sample keeps the tokens that contain them.
        temperature: Softmax temperature; 0 is greedy.
        top_p: Probability mass of nucleus sampling; 1 turns it off.
        top_k: Number of most probable tokens to sample from; 0 is all of them.
        min_p: Minimum probability of a token, relative to the most probable one. None turns it off.
        repetition_penalty: Penalty on tokens that occur earlier; 1 turns it off.
        key: Random seed of the transformers engine, which combines it with `Request.global_index`. None uses
            torch's global generator. vLLM ignores it, so its samples depend on which requests are batched
            together: a seed per request would halve its throughput.
        extra: Additional sampling settings of the engine, under the engine's own names.
    """

    eos_token_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    key: tuple[int, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A request to sample one turn.

    Attributes:
        local_index: Index of the rollout in this process's batch.
        global_index: Index of the rollout in the batch of all processes.
        ids: Token ids of the rollout so far, the prompt included.
        limit: Maximum number of tokens to sample, at least 1.
        start: Number of tokens sampled in earlier turns of this rollout.
    """

    local_index: int
    global_index: int
    ids: Sequence[int]
    limit: int
    start: int


@dataclass(frozen=True)
class Sample:
    """One sampled turn.

    Attributes:
        ids: Sampled token ids, including the EOS token or the stop string.
        log_probs: Log-probability of each token, or None if the engine does not return them.
        finish_reason: "eos", "stop" for a stop string, or "length" if the limit was reached.
    """

    ids: list[int]
    log_probs: list[float] | None
    finish_reason: Literal["eos", "stop", "length"]


class Engine(Protocol):
    """An inference engine that samples turns."""

    @property
    def context(self) -> int | None:
        """Maximum number of tokens of a rollout, the prompt included, or None for no limit."""

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Submit requests. A rollout has at most one outstanding request."""

    def collect(self, *, wait: bool) -> list[tuple[int, Sample]]:
        """Return the samples that have finished since the last call, each with its request's `local_index`.

        With `wait`, block until there is at least one, unless no request is outstanding.
        """


@dataclass
class Rollout:
    """A prompt and everything after it: the model's turns and the environment's replies.

    Attributes:
        prompt_ids: Token ids of the prompt.
        ids: Token ids after the prompt, from the model and from the environment.
        mask: 1 for each token of `ids` that the model sampled, 0 for each that the environment wrote.
        log_probs: Sampling log-probability of each token of `ids`, 0 for the environment's tokens. None if
            the engine does not return log-probabilities.
        turns: Chat messages after the prompt; the model's have the role "assistant". `tokens` is the number
            of tokens of a message, including those that the chat template puts around a reply. The items of
            a reply's `record` are merged into its message.
        truncated: Whether a limit cut the rollout off.
        stopped: Whether a stop string ended the rollout. Its last token is then an EOS token that the model
            did not sample.
        invalid: Reason why the environment or the engine failed, or None.
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
        """Token ids that the model sampled."""
        return [token for token, is_sampled in zip(self.ids, self.mask, strict=True) if is_sampled]

    @property
    def text(self) -> str:
        """Text of the model's turns, joined with newlines, without the environment's replies."""
        return "\n".join(turn["content"] for turn in self.turns if turn["role"] == "assistant")

    @classmethod
    def single(cls, text: str, ids: list[int], truncated: bool) -> Rollout:
        """Build a single-turn rollout from a completion that was sampled elsewhere, without its prompt."""
        turns = [{"role": "assistant", "content": text, "tokens": len(ids)}]
        return cls([], ids, [1] * len(ids), turns=turns, truncated=truncated)

    def columns(self) -> dict[str, Any]:
        """Return the columns that rewards can read, in addition to the task's columns.

        `completion` and `completion_ids` contain the model's turns only, so that the environment's text
        never counts as the answer.
        """
        return {
            "completion": self.text,
            "completion_ids": self.sampled_ids,
            "turns": self.turns,
            "truncated": self.truncated,
            "stopped": self.stopped,
            "invalid": self.invalid,
            "environment_tokens": len(self.ids) - sum(self.mask),
        }
