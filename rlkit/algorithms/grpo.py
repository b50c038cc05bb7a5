"""GRPO on TRL's trainer: rewards that may fail, prompts computed once, rollouts kept.

The seams of TRL that this stands on, each with a test: `_generate_single_turn`, `_calculate_rewards`,
`_generate_and_score_completions` and `_get_per_token_logps_and_entropies`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import trl
from accelerate.utils import gather_object
from trl.models import unwrap_model_for_generation

from rlkit.algorithms.shared_prefix import completion_log_probs
from rlkit.environment import Environment
from rlkit.errors import UserError
from rlkit.rewarding import ErrorBudget, RewardRunner, as_trl_reward
from rlkit.rewarding.calls import RewardCall
from rlkit.rollouts.generate import generate
from rlkit.run_directory import RunDirectory


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's GRPOTrainer with rlkit's rewards.

    Args:
        environment: its metric is logged, and its breakdown columns stand in the saved rollouts.
        runner: runs the rewards; their weights are `args.reward_weights`.
        budget: stops the run when too many rollouts cannot be judged.
        run: where rollouts are saved.
        shared_prefix: compute each prompt once in the loss where that is possible.
    """

    args: Any  # TRL declares less than it sets
    model: Any
    num_generations: Any
    num_generations_eval: Any

    def __init__(
        self,
        *args: Any,
        environment: Environment,
        runner: RewardRunner,
        budget: ErrorBudget,
        run: RunDirectory,
        shared_prefix: bool = True,
        **kwargs: Any,
    ):
        self.environment = environment
        self.runner = runner
        self.budget = budget
        self.run = run
        kwargs["reward_funcs"] = [as_trl_reward(reward, name) for name, reward in runner.rewards.items()]
        super().__init__(*args, **kwargs)
        self.sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.shared_prefix = shared_prefix and self.accelerator.num_processes == 1 and not self.sharded
        self._check_groups()
        self._rows: list[dict[str, Any]] = []
        self._saved: tuple[int, list[dict[str, Any]]] = (0, [])
        self._invalid = torch.zeros(0, dtype=torch.bool)

    def _check_groups(self) -> None:
        rows = self.args.per_device_train_batch_size * self.args.steps_per_generation
        per_group = [name for name, reward in self.runner.rewards.items() if RewardCall(reward).per_group]
        if per_group and rows % self.num_generations:
            raise UserError(
                f"the reward {per_group[0]!r} judges whole groups, but a process gets {rows} rollouts at a "
                f"time: make that a multiple of num_generations ({self.num_generations})"
            )

    def _generate_single_turn(
        self,
        prompt_ids: Any,
        images: Any,
        multimodal_fields: Any,
        num_generations: Any,
        has_tool_images: Any = False,
    ) -> tuple[list[list[int]], Any]:
        elsewhere = self.use_vllm or self.use_transformers_continuous_batching or self.is_fsdp_enabled
        if elsewhere or images is not None:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
            ) as model,
            self.accelerator.autocast(),
        ):
            return generate(model, prompt_ids, self.generation_config, self.accelerator.device), None

    def _calculate_rewards(
        self, inputs: list[dict], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        """Judge the local rollouts; return the rewards (B, R) of all ranks, an invalid one's are NaN."""
        rows = [
            row | {"completion": _text(completion), "completion_ids": ids, "truncated": self._truncated(ids)}
            for row, completion, ids in zip(inputs, completions, completion_ids_list, strict=True)
        ]
        size = self.num_generations if self.model.training else self.num_generations_eval
        # Where TRL deals a group out to several processes no reward looks at groups (`_check_groups`).
        scores = self.runner(rows, 1 if len(rows) % size else size)
        self._invalid = torch.tensor([reason is not None for reason in scores.invalid])
        self._rows = [
            self._record(row, values, reason)
            for row, values, reason in zip(rows, scores.values.tolist(), scores.invalid, strict=True)
        ]
        self._spend_budget(scores, rows)
        rewards = torch.tensor(scores.values, dtype=torch.float32, device=self.accelerator.device)
        # A metric that is only logged does not make a rollout count that no weighted reward applies to.
        counted = self.reward_weights.to(rewards.device) != 0
        rewards[rewards[:, counted].isnan().all(1)] = torch.nan
        self._rewards = self.accelerator.gather(rewards)
        return self._rewards

    def _truncated(self, ids: list[int]) -> bool:
        return not ids or ids[-1] not in self.eos_token_ids

    def _record(self, row: Mapping[str, Any], values: list[float], reason: str | None) -> dict[str, Any]:
        """One saved rollout."""
        record = {
            "task_id": row.get("task_id"),
            "prompt": _text(row["prompt"]),
            "completion": row["completion"],
            "answer": self.environment.answer(row),
            "length": len(row["completion_ids"]),
            "truncated": row["truncated"],
            "invalid": reason,
        }
        record |= {column: row[column] for column in self.environment.breakdown}
        return record | {f"rewards/{n}": v for n, v in zip(self.reward_func_names, values, strict=True)}

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

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        # TRL gives an invalid rollout advantage 0; with its tokens masked it has no part in the KL term, the
        # entropy bonus or the number of tokens either.
        masked = self._invalid.to(output["completion_mask"].device)
        output["completion_mask"] = output["completion_mask"] * (~masked).unsqueeze(1)
        loss_mask = output["completion_mask"] * output.get("tool_mask", 1)
        output["num_items_in_batch"] = self.accelerator.gather(loss_mask.sum()).sum()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["frac_reward_zero_std"][-1] = self._frac_reward_zero_std(mode)
        if mode == "train":
            self._save_rollouts(output["advantages"].tolist())
        return output

    def _frac_reward_zero_std(self, mode: str) -> float:
        """Share of groups whose valid rewards are all alike: nothing is learned from them.

        TRL compares a float32 standard deviation with 0; of eight rewards 0.2 it is 1.6e-8, and not counted.
        """
        size = self.num_generations if mode == "train" else self.num_generations_eval
        rewards = (self._rewards * self.reward_weights.to(self._rewards)).nansum(1).view(-1, size)
        invalid = self._rewards.isnan().all(1).view(-1, size)
        highest = rewards.masked_fill(invalid, -torch.inf).amax(1)
        lowest = rewards.masked_fill(invalid, torch.inf).amin(1)
        return (highest - lowest < 1e-6).float().mean().item()

    def _save_rollouts(self, advantages: list[float]) -> None:
        # The step that these rollouts are for; TRL counts from 0.
        step = self.state.global_step + 1
        weights = self.reward_weights.tolist()
        for record, advantage in zip(self._rows, advantages, strict=True):
            values = [record[f"rewards/{name}"] for name in self.reward_func_names]
            reward = sum(w * v for w, v in zip(weights, values, strict=True) if not math.isnan(v))
            record |= {"step": step, "reward": None if record["invalid"] else reward, "advantage": advantage}
        rows = gather_object(self._rows)
        # With more accumulation than steps a generation, a step has several generations.
        self._saved = step, (self._saved[1] if self._saved[0] == step else []) + rows
        if self.accelerator.is_main_process:
            self.run.save_rollouts(*self._saved)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        plain = not any(v is not None and v is not False for k, v in kwargs.items() if k != "compute_entropy")
        if self.shared_prefix and plain and not self.args.gradient_checkpointing:
            size = batch_size or len(input_ids)
            batches = zip(input_ids.split(size), attention_mask.split(size), strict=True)
            with self.accelerator.autocast():
                outputs = [completion_log_probs(model, *batch, logits_to_keep) for batch in batches]
            if None not in outputs:
                entropy = torch.cat([o.entropy for o in outputs]) if kwargs.get("compute_entropy") else None
                return torch.cat([o.log_probs for o in outputs]), entropy, None
            warnings.warn("this model's cache cannot be repeated: shared_prefix is off", stacklevel=2)
            self.shared_prefix = False
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs
        )


def _text(messages: Any) -> str:
    """The text of chat messages, or of a plain string."""
    if isinstance(messages, str):
        return messages
    return "\n".join(str(message["content"]) for message in messages)
