"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): train on groups with different rewards.

A group whose rewards are all equal has advantages of 0 and no gradient. Such groups are replaced by groups of
newly drawn tasks. If the batch is not full after the maximum number of attempts, it is filled up with groups
of equal rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import gather_object

from rlkit.errors import UserError
from rlkit.runs.record import RolloutRecord
from rlkit.training.advantages import EQUAL_REWARDS
from rlkit.training.batches import Batch, concatenate, take
from rlkit.training.step import Metrics, SampledBatch, Task, sample

if TYPE_CHECKING:
    from datasets import Dataset

    from rlkit.training.grpo import GRPOTrainer


@dataclass
class Group:
    """The rollouts of one task: their rows of the batch and their records."""

    batch: Batch
    records: list[RolloutRecord]

    def has_signal(self) -> bool:
        """Return whether the valid rewards differ, so that the advantages are not 0."""
        rewards = [record["reward"] for record in self.records if record["reward"] is not None]
        return len(rewards) > 1 and max(rewards) - min(rewards) >= EQUAL_REWARDS


class DynamicSampling:
    """Replaces groups of equal rewards in the batches of a trainer.

    All processes sample the same number of groups in each attempt.

    Args:
        trainer: Trainer that samples the groups.
        max_attempts: Maximum number of attempts per batch.

    Attributes:
        extra_rollouts: Number of rollouts sampled so far in addition to the original batches, over all
            processes.

    Raises:
        UserError: The training data is a stream, from which tasks cannot be drawn by index.
    """

    def __init__(self, trainer: GRPOTrainer, max_attempts: int):
        if not hasattr(trainer.train_dataset, "__len__"):
            raise UserError(
                "dynamic_sampling draws tasks by index, which a streaming dataset does not support; "
                "load the dataset without streaming"
            )
        self.trainer = trainer
        self.max_attempts = max_attempts
        self.extra_rollouts = 0

    def __call__(self, sampled: SampledBatch, tasks: Sequence[Task]) -> SampledBatch:
        """Return a batch of the same number of groups, and the records of all rollouts sampled for it.

        Rewards and reward metrics stay those of the original tasks: the replacements are selected by their
        rewards, so their mean would be biased.
        """
        num_groups = len(tasks) // self.trainer.num_generations
        useful, useless = self._partition(sampled)
        attempts, num_sampled = 0, num_groups
        while attempts < self.max_attempts:
            # All processes sample the number that the neediest one lacks. With different numbers they would
            # take part in different collectives and hang.
            missing = max(gather_object([max(num_groups - len(useful), 0)]))
            if not missing:
                break
            extra = sample(self.trainer, self._draw_tasks(missing))
            extra_useful, extra_useless = self._partition(extra)
            useful += extra_useful
            useless += extra_useless
            attempts += 1
            num_sampled += missing

        groups = useful + useless  # useless groups come last: they only fill up the batch
        for group in groups[num_groups:]:
            for record in group.records:
                record["kept"] = False
        records = [record for group in groups for record in group.records]
        batch = concatenate([group.batch for group in groups[:num_groups]], self.trainer.pad_token_id)

        extra_rollouts = (num_sampled - num_groups) * self.trainer.num_generations
        counts = gather_object([(extra_rollouts, len(useful) / num_sampled, len(useful) < num_groups)])
        all_extra_rollouts = sum(extra for extra, _, _ in counts)
        self.extra_rollouts += all_extra_rollouts
        metrics: Metrics = {
            "dynamic_sampling/attempts": attempts,
            "dynamic_sampling/extra_rollouts": all_extra_rollouts,
            "dynamic_sampling/total_extra_rollouts": self.extra_rollouts,
            "dynamic_sampling/groups_kept": sum(fraction for _, fraction, _ in counts) / len(counts),
            "dynamic_sampling/cap_reached": float(any(is_short for _, _, is_short in counts)),
        }
        return SampledBatch(batch, replace(sampled.judged, records=records), sampled.metrics | metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of extra rollouts so far."""
        return {"extra_rollouts": self.extra_rollouts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the number of extra rollouts."""
        self.extra_rollouts = state["extra_rollouts"]

    def _partition(self, sampled: SampledBatch) -> tuple[list[Group], list[Group]]:
        """Split this process's batch into groups with different rewards and groups with equal rewards."""
        size = self.trainer.num_generations
        useful: list[Group] = []
        useless: list[Group] = []
        for first in range(0, len(sampled.judged.records), size):
            rows = range(first, first + size)
            records = [sampled.judged.records[i] for i in rows]
            for record in records:
                record["kept"] = True
            group = Group(take(sampled.batch, rows), records)
            (useful if group.has_signal() else useless).append(group)
        return useful, useless

    def _draw_tasks(self, num_groups: int) -> list[Task]:
        """Draw tasks for all processes and return this process's, each repeated `num_generations` times."""
        trainer = self.trainer
        dataset: Dataset = trainer.train_dataset
        rank = trainer.accelerator.process_index
        # The same seed on all processes, so that they draw the same tasks and take different ones of them.
        generator = np.random.default_rng([trainer.args.seed, trainer.sampling_step, 1])
        total = num_groups * trainer.accelerator.num_processes
        drawn = generator.choice(len(dataset), total, replace=total > len(dataset))
        indices = drawn[rank * num_groups : (rank + 1) * num_groups]
        return [dataset[int(i)] for i in indices for _ in range(trainer.num_generations)]
