"""Answer tasks with an engine: what evaluation and demonstrations need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlkit.environment import Environment
from rlkit.rollouts.loop import Loop, RolloutLimits
from rlkit.rollouts.tokenize import tokenize
from rlkit.rollouts.types import Engine, Rollout, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RolloutSampler:
    """Answers each task several times.

    Args:
        loop: carries the answers through the environment.
        sampling: how the engine samples; temperature 0 is greedy.
    """

    def __init__(self, loop: Loop, sampling: Sampling):
        self.loop = loop
        self.sampling = sampling

    def __call__(
        self, engine: Engine, tasks: Sequence[Mapping[str, Any]], samples: int
    ) -> list[list[Rollout]]:
        """Answer each task `samples` times."""
        if not tasks:
            return []
        ids = tokenize(self.loop.tokenizer, [task["prompt"] for task in tasks], **self.loop.template)
        rows = [i for i in range(len(tasks)) for _ in range(samples)]
        rollouts = self.loop(engine, self.sampling, [tasks[i] for i in rows], [ids[i] for i in rows])
        return [rollouts[i : i + samples] for i in range(0, len(rows), samples)]


def open_sampler(
    environment: Environment,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Sequence[int],
    limits: RolloutLimits,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    template: Mapping[str, Any] | None = None,
) -> RolloutSampler:
    """Build a `RolloutSampler` of an environment's tasks.

    Args:
        environment: answers the turns.
        tokenizer: the model's.
        eos_token_ids: see `rlkit.rollouts.tokenize.eos_token_ids`.
        limits: what a rollout may take.
        temperature: 0 is greedy.
        top_p: nucleus sampling.
        template: further arguments of the chat template.
    """
    loop = Loop(environment, tokenizer, limits, eos_token_ids, template)
    stop = tuple(environment.stop)
    return RolloutSampler(loop, Sampling(tuple(eos_token_ids), stop, temperature=temperature, top_p=top_p))
