"""Sampling rollouts of tasks, as evaluation and demonstrations need it."""

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
    """Samples several rollouts of each task.

    Args:
        loop: Rollout loop of the environment.
        sampling: Sampling settings; temperature 0 is greedy.
    """

    def __init__(self, loop: Loop, sampling: Sampling):
        self.loop = loop
        self.sampling = sampling

    def __call__(
        self, engine: Engine, tasks: Sequence[Mapping[str, Any]], num_samples: int
    ) -> list[list[Rollout]]:
        """Return `num_samples` rollouts of each task, in the order of the tasks."""
        if not tasks:
            return []
        ids = tokenize(self.loop.tokenizer, [task["prompt"] for task in tasks], **self.loop.template)
        # The rows of one task have equal prompts, so that engines can share their prefill.
        rows = [i for i in range(len(tasks)) for _ in range(num_samples)]
        rollouts = self.loop(engine, self.sampling, [tasks[i] for i in rows], [ids[i] for i in rows])
        return [rollouts[i : i + num_samples] for i in range(0, len(rows), num_samples)]


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
    """Build a `RolloutSampler` for the tasks of an environment.

    Args:
        environment: Environment that replies to the turns.
        tokenizer: Tokenizer of the model.
        eos_token_ids: Ids of the tokens that end a turn; see `rlkit.rollouts.tokenize.eos_token_ids`.
        limits: Limits of each rollout.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Probability mass of nucleus sampling.
        template: Extra arguments of the chat template.
    """
    loop = Loop(environment, tokenizer, limits, eos_token_ids, template)
    stop = tuple(environment.stop)
    return RolloutSampler(loop, Sampling(tuple(eos_token_ids), stop, temperature=temperature, top_p=top_p))
