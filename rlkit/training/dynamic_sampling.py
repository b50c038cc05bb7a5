"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): train on groups that can teach something.

A group whose rewards are all alike has advantages of 0. Such groups are replaced by groups of freshly drawn
prompts until the batch is full or a number of attempts is used up; then the batch keeps some of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from rlkit.errors import UserError
from rlkit.training.advantages import ALIKE
from rlkit.training.batches import Batch, concatenate, take

Sampled = tuple[Batch, list[dict[str, Any]]]  # a batch and the record of each of its rollouts


class DynamicSampling:
    """Tops up the batches of a trainer; all ranks sample equally many groups in each attempt.

    Args:
        trainer: a `rlkit.training.grpo.GRPOTrainer`.
        attempts: most top-ups of a batch.
    """

    def __init__(self, trainer: Any, attempts: int):
        if not hasattr(trainer.train_dataset, "__len__"):
            raise UserError("dynamic_sampling draws tasks by number: the tasks must not be a stream")
        self.trainer = trainer
        self.attempts = attempts
        self.extra_rollouts = 0  # in all, over all ranks

    def __call__(self, batch: Batch, inputs: list[dict[str, Any]]) -> Batch:
        """Return a batch of the same number of groups, and record what was sampled for it."""
        size = self.trainer.num_generations
        wanted = len(inputs) // size
        kept, alike = self._divide((batch, self.trainer.rollout_records))
        attempts, sampled = 0, wanted
        while attempts < self.attempts and (missing := self._most_missing(wanted - len(kept))):
            more = self._sample(missing)
            useful, useless = self._divide(more)
            kept, alike = kept + useful, alike + useless
            attempts, sampled = attempts + 1, sampled + missing
        self._log(attempts, sampled - wanted, len(kept) / sampled, len(kept) < wanted)
        chosen = (kept + alike)[:wanted]
        for _, records in kept[wanted:] + alike[max(0, wanted - len(kept)) :]:
            for record in records:
                record["kept"] = False
        self.trainer.rollout_records = [r for _, records in kept + alike for r in records]
        return concatenate([part for part, _ in chosen], self.trainer.pad_token_id)

    def state_dict(self) -> dict[str, Any]:
        """The rollouts sampled beyond the batches' own, so far."""
        return {"extra_rollouts": self.extra_rollouts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.extra_rollouts = state["extra_rollouts"]

    def _divide(self, sampled: Sampled) -> tuple[list[Sampled], list[Sampled]]:
        """The groups of this rank with different rewards, and those without."""
        batch, records = sampled
        size = self.trainer.num_generations
        different: list[Sampled] = []
        alike: list[Sampled] = []
        for first in range(0, len(records), size):
            rows = range(first, first + size)
            group = take(batch, rows), [records[i] | {"kept": True} for i in rows]
            rewards = [r["reward"] for r in group[1] if r["reward"] is not None]
            useful = len(rewards) > 1 and max(rewards) - min(rewards) >= ALIKE
            (different if useful else alike).append(group)
        return different, alike

    def _most_missing(self, missing: int) -> int:
        """The groups that the neediest rank lacks: all ranks sample as many, or a collective would hang."""
        return max(gather_object([max(missing, 0)]))

    def _sample(self, groups: int) -> Sampled:
        """Sample groups of tasks drawn at random; what is logged stays that of the batch's own tasks."""
        trainer = self.trainer
        metrics = trainer._metrics["train"]
        before = {name: len(values) for name, values in metrics.items()}
        tasks = self._draw_tasks(groups)
        batch = trainer.sample([task for task in tasks for _ in range(trainer.num_generations)])
        for name in list(metrics):
            del metrics[name][before.get(name, 0) :]
        return batch, trainer.rollout_records

    def _draw_tasks(self, groups: int) -> list[dict[str, Any]]:
        """This rank's share of tasks drawn for all ranks, by the seed and the count of samplings."""
        trainer, data = self.trainer, self.trainer.train_dataset
        ranks, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        generator = np.random.default_rng([trainer.args.seed, trainer.generation, 1])
        chosen = generator.choice(len(data), groups * ranks, replace=groups * ranks > len(data))
        return [data[int(i)] for i in chosen[rank * groups : (rank + 1) * groups]]

    def _log(self, attempts: int, extra_groups: int, kept: float, short: bool) -> None:
        trainer = self.trainer
        local = torch.tensor([extra_groups * trainer.num_generations, kept, float(short)])
        table = trainer.accelerator.gather(local.to(trainer.accelerator.device)[None]).cpu()
        extra = int(table[:, 0].sum())
        self.extra_rollouts += extra
        values = {
            "attempts": attempts,
            "extra_rollouts": extra,
            "total_extra_rollouts": self.extra_rollouts,
            "groups_kept": table[:, 1].mean().item(),
            "cap_reached": table[:, 2].max().item(),
        }
        for name, value in values.items():
            trainer._metrics["train"][f"dynamic_sampling/{name}"].append(value)
