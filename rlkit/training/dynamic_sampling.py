"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): train on groups that can teach something.

A group whose rewards are all alike has advantages of 0. Such groups are replaced by groups of freshly drawn
prompts until the batch is full or a number of attempts is used up; then the batch keeps some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import gather_object

from rlkit.errors import UserError
from rlkit.runs.record import RolloutRecord
from rlkit.training.advantages import ALIKE
from rlkit.training.batches import Batch, concatenate, take
from rlkit.training.step import Metrics, SampledBatch, Task, sample

if TYPE_CHECKING:
    from datasets import Dataset

    from rlkit.training.grpo import GRPOTrainer


@dataclass
class Group:
    """The rollouts of one task: their rows of the batch, and their records."""

    batch: Batch
    records: list[RolloutRecord]

    def can_teach(self) -> bool:
        """Whether the valid rewards differ."""
        rewards = [record["reward"] for record in self.records if record["reward"] is not None]
        return len(rewards) > 1 and max(rewards) - min(rewards) >= ALIKE


class DynamicSampling:
    """Tops up the batches of a trainer; all processes sample equally many groups in each attempt.

    Args:
        trainer: Samples the groups.
        attempts: Maximum number of top-ups of a batch.

    Attributes:
        extra_rollouts: Rollouts sampled beyond the batches' own so far, over all processes.
    """

    def __init__(self, trainer: GRPOTrainer, attempts: int):
        if not hasattr(trainer.train_dataset, "__len__"):
            raise UserError("dynamic_sampling draws tasks by number: the tasks must not be a stream")
        self.trainer = trainer
        self.attempts = attempts
        self.extra_rollouts = 0

    def __call__(self, sampled: SampledBatch, tasks: Sequence[Task]) -> SampledBatch:
        """Return a batch of the same number of groups, and the records of all that was sampled for it.

        The rewards and what is logged of them stay those of the batch's own tasks.
        """
        num_groups = len(tasks) // self.trainer.num_generations
        useful, useless = self._divide(sampled)
        attempts, num_sampled = 0, num_groups
        while attempts < self.attempts:
            # The process that lacks most decides: all sample as many, or a collective would hang.
            missing = max(gather_object([max(num_groups - len(useful), 0)]))
            if not missing:
                break
            extra = sample(self.trainer, self._draw_tasks(missing))
            more_useful, more_useless = self._divide(extra)
            useful, useless = useful + more_useful, useless + more_useless
            attempts, num_sampled = attempts + 1, num_sampled + missing

        groups = useful + useless  # where attempts did not suffice, groups without spread fill the batch up
        for group in groups[num_groups:]:
            for record in group.records:
                record["kept"] = False
        records = [record for group in groups for record in group.records]
        batch = concatenate([group.batch for group in groups[:num_groups]], self.trainer.pad_token_id)

        extra_rollouts = (num_sampled - num_groups) * self.trainer.num_generations
        counts = gather_object([(extra_rollouts, len(useful) / num_sampled, len(useful) < num_groups)])
        extra_of_all = sum(extra for extra, _, _ in counts)
        self.extra_rollouts += extra_of_all
        metrics: Metrics = {
            "dynamic_sampling/attempts": attempts,
            "dynamic_sampling/extra_rollouts": extra_of_all,
            "dynamic_sampling/total_extra_rollouts": self.extra_rollouts,
            "dynamic_sampling/groups_kept": sum(share for _, share, _ in counts) / len(counts),
            "dynamic_sampling/cap_reached": float(any(short for _, _, short in counts)),
        }
        return SampledBatch(batch, replace(sampled.judged, records=records), sampled.metrics | metrics)

    def state_dict(self) -> dict[str, Any]:
        """The number of extra rollouts so far."""
        return {"extra_rollouts": self.extra_rollouts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the number of extra rollouts."""
        self.extra_rollouts = state["extra_rollouts"]

    def _divide(self, sampled: SampledBatch) -> tuple[list[Group], list[Group]]:
        """Split a sampling of this process into groups with different rewards, and those without."""
        size = self.trainer.num_generations
        useful: list[Group] = []
        useless: list[Group] = []
        for first in range(0, len(sampled.judged.records), size):
            rows = range(first, first + size)
            records = [sampled.judged.records[i] for i in rows]
            for record in records:
                record["kept"] = True
            group = Group(take(sampled.batch, rows), records)
            (useful if group.can_teach() else useless).append(group)
        return useful, useless

    def _draw_tasks(self, num_groups: int) -> list[Task]:
        """Draw tasks for all processes by the seed and the number of the sampling; return this one's rows."""
        trainer = self.trainer
        data: Dataset = trainer.train_dataset
        processes, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        generator = np.random.default_rng([trainer.args.seed, trainer.generation, 1])
        total = num_groups * processes
        chosen = generator.choice(len(data), total, replace=total > len(data))
        own = chosen[rank * num_groups : (rank + 1) * num_groups]
        return [data[int(i)] for i in own for _ in range(trainer.num_generations)]
