"""How a trainer judges its rollouts: rewards that may fail, an error budget, a record of every rollout."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object

from rlkit.environment import Environment
from rlkit.reward import completion_text
from rlkit.rollouts import Rollout
from rlkit.runs.directory import RunDirectory
from rlkit.runs.record import RolloutRecord, rollout_record
from rlkit.scoring import ErrorBudget, RewardRunner
from rlkit.training.timing import StepClock


class Judging:
    """The part of `rlkit.training.grpo.GRPOTrainer` that replaces TRL's rewards by rlkit's."""

    environment: Environment
    runner: RewardRunner
    budget: ErrorBudget
    run: RunDirectory
    group_by: str | None
    accelerator: Any
    args: Any
    model: Any
    num_generations: Any
    num_generations_eval: Any
    num_iterations: Any
    reward_func_names: Any
    reward_weights: Any
    eos_token_ids: Any
    rollout_func: Any
    clock: StepClock
    state: Any
    _step: Any
    _metrics: Any
    _rollouts: Sequence[Rollout]

    def _start_judging(self) -> None:
        self.rollout_records: list[RolloutRecord] = []  # of this rank's last sampling
        self._saved: tuple[int, list[RolloutRecord]] = (0, [])
        self._invalid = torch.zeros(0, dtype=torch.bool)
        self._rewards = torch.zeros(0)
        self._totals = torch.zeros(0)  # weighted sums of all ranks, NaN where nothing was judged
        self._keys: list[Hashable] = []

    def _calculate_rewards(
        self, inputs: list[dict], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        """Judge the local rollouts; return the rewards (B, R) of all ranks, an invalid one's are NaN."""
        if self.rollout_func is None:  # TRL has sampled
            texts = zip(completions, completion_ids_list, strict=True)
            self._rollouts = [
                Rollout.single(completion_text(text), ids, self._truncated(ids)) for text, ids in texts
            ]
        most = {"max_length": self.args.max_completion_length}
        rows = [row | rollout.columns() | most for row, rollout in zip(inputs, self._rollouts, strict=True)]
        size = self.num_generations if self.model.training else self.num_generations_eval
        # Where TRL deals a group out to several processes no reward looks at groups (`_check_groups`).
        with self.clock("rewards"):
            scores = self.runner(rows, 1 if len(rows) % size else size)
        self._invalid = torch.tensor([reason is not None for reason in scores.invalid])
        rewards = torch.tensor(scores.values, dtype=torch.float32, device=self.accelerator.device)
        weights = self.reward_weights.to(rewards)
        # A metric that is only logged does not make a rollout count that no weighted reward applies to.
        rewards[rewards[:, weights != 0].isnan().all(1)] = torch.nan
        totals = (rewards * weights).nansum(1).masked_fill(rewards.isnan().all(1), torch.nan)
        self.rollout_records = []
        for i, row in enumerate(rows):
            values = dict(zip(self.reward_func_names, scores.values[i].tolist(), strict=True))
            self.rollout_records.append(
                rollout_record(
                    self.environment, row, values, invalid=scores.invalid[i], reward=totals[i].item()
                )
            )
        self._spend_budget(scores, rows)
        self._rewards, self._totals = self.accelerator.gather(rewards), self.accelerator.gather(totals)
        self._keys = self._group_keys(inputs, size)
        if self.model.training and any(hasattr(r, "observe") for r in self.runner.rewards.values()):
            self._remember(rows)
        return self._rewards

    def _group_keys(self, inputs: list[dict], size: int) -> list[Hashable]:
        """The group of each rollout of all ranks."""
        if self.group_by is None:
            return [i // size for i in range(len(self._rewards))]
        return gather_object([row[self.group_by] for row in inputs])

    def _remember(self, rows: list[dict]) -> None:
        """Show the valid rollouts of all ranks, once each, to the rewards that remember."""
        seen = [
            {
                "task_id": row["task_id"],
                "length": record["length"],
                "correct": record["score"],
            }
            for row, record in zip(rows, self.rollout_records, strict=True)
            if record["score"] is not None
        ]
        self.runner.observe(gather_object(seen))

    def _advance(self) -> None:
        """Tell the environment how the sampling went, and log what it says of it."""
        if type(self.environment).advance is Environment.advance:
            return
        every = self.args.steps_per_generation * self.num_iterations  # micro-batches until the next one
        step = (self._step + every) // self.args.gradient_accumulation_steps
        score = self._rewards[:, self.reward_func_names.index(self.environment.metric)].nanmean().item()
        logged = self.environment.advance(step, self.state.max_steps, None if math.isnan(score) else score)
        for name, value in logged.items():
            self._metrics["train"][f"environment/{name}"].append(float(value))

    def _truncated(self, ids: list[int]) -> bool:
        return not ids or ids[-1] not in self.eos_token_ids

    def _spend_budget(self, scores: Any, rows: list[dict]) -> None:
        """Log the error rates of all ranks and stop, on all of them, when the budget is spent."""
        counts = [len(rows), sum(self._invalid.tolist())]
        counts += [scores.error_counts.get(name, 0) for name in self.reward_func_names]
        total, invalid, *errors = self.accelerator.reduce(
            torch.tensor(counts, dtype=torch.float32, device=self.accelerator.device)
        ).tolist()
        mode = "train" if self.model.training else "eval"
        for name, count in zip(self.reward_func_names, errors, strict=True):
            self._metrics[mode][f"rewards/{name}/error_rate"].append(count / total)
        row = None if scores.first_row is None else rows[scores.first_row]
        self.budget.update(invalid / total, scores.first_traceback, row)

    def _save_rollouts(self) -> None:
        # The step that these rollouts are for; TRL counts from 0.
        step = self.state.global_step + 1
        rows = gather_object([record | {"step": step} for record in self.rollout_records])
        # With more accumulation than steps a generation, a step has several generations.
        self._saved = step, (self._saved[1] if self._saved[0] == step else []) + rows
        if self.accelerator.is_main_process:
            self.run.save_rollouts(*self._saved)
