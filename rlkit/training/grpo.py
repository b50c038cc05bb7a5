"""GRPO on TRL's trainer: rewards that may fail, prompts shared, rollouts kept, any baseline.

The seams of TRL that this stands on, each with a test: `_calculate_rewards`,
`_generate_and_score_completions`, `_prepare_inputs`, `_compute_loss`, `_get_train_sampler`,
`_get_per_token_logps_and_entropies`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import trl
from peft import PeftModel

from rlkit.environment import Environment
from rlkit.errors import UserError
from rlkit.reward import RewardCall, as_trl_reward
from rlkit.rollouts.loop import RolloutLimits
from rlkit.runs.directory import RunDirectory
from rlkit.scoring import ErrorBudget, RewardRunner
from rlkit.training.advantages import ALIKE, difficulty_weight, groups, spread
from rlkit.training.batches import shuffle_groups, split
from rlkit.training.dynamic_sampling import DynamicSampling
from rlkit.training.judging import Judging
from rlkit.training.resume import Checkpoints, InEpoch, Reference, Stateful, TrainerPosition
from rlkit.training.rolling_out import RollingOut, our_vllm, sampler_gap
from rlkit.training.shared_prefix import add_shared_prefix, completion_log_probs, supports_shared_prefix
from rlkit.training.timing import StepClock

# From the rewards of all ranks (N,), NaN where invalid, and the keys of their groups to advantages (N,).
Advantages = Callable[[torch.Tensor, Sequence[Hashable]], torch.Tensor]


class GRPOTrainer(RollingOut, Judging, Checkpoints, trl.GRPOTrainer):
    """TRL's GRPOTrainer with rlkit's rewards.

    Args:
        environment: its metric is logged, and its breakdown columns stand in the saved rollouts.
        runner: runs the rewards; their weights are `args.reward_weights`.
        budget: stops the run when too many rollouts cannot be judged.
        run: where rollouts are saved.
        limits: what a rollout may take; None: one turn of `args.max_completion_length` tokens.
        weights_dir: where weights lie on their way to vLLM servers on other machines.
        shared_prefix: compute each prompt once in the loss where that is possible.
        advantages: replaces TRL's own normalisation within the rollouts of a prompt.
        group_by: a column whose values are the groups; None groups the rollouts of a prompt.
        difficulty_weighting: weight advantages by the solve rate of their group.
        kl_in_reward: `args.beta` times the rollout's KL divergence is subtracted from its reward, not added
            to the loss.
        dynamic_sampling: attempts at replacing groups without spread; 0 turns it off.
    """

    args: Any  # TRL declares less than it sets
    model: Any
    num_generations: Any
    num_generations_eval: Any
    beta: Any
    max_completion_length: Any
    _buffered_inputs: Any

    def __init__(
        self,
        *args: Any,
        environment: Environment,
        runner: RewardRunner,
        budget: ErrorBudget,
        run: RunDirectory,
        limits: RolloutLimits | None = None,
        weights_dir: str | None = None,
        shared_prefix: bool = True,
        advantages: Advantages | None = None,
        group_by: str | None = None,
        difficulty_weighting: bool = False,
        kl_in_reward: bool = False,
        dynamic_sampling: int = 0,
        **kwargs: Any,
    ):
        self.environment = environment
        self.runner = runner
        self.budget = budget
        self.run = run
        self.advantages = advantages
        self.group_by = group_by
        self.difficulty_weighting = difficulty_weighting
        self.kl_in_reward = kl_in_reward
        kwargs["reward_funcs"] = [as_trl_reward(reward, name) for name, reward in runner.rewards.items()]
        with our_vllm(weights_dir):
            super().__init__(*args, **kwargs)
        self.clock = StepClock(self._metrics["train"])
        self._start_rolling_out(limits or RolloutLimits(self.args.max_completion_length))
        self.shared_prefix = shared_prefix and self._can_share_prefix()
        self.dynamic_sampling = DynamicSampling(self, dynamic_sampling) if dynamic_sampling else None
        self._check_groups()
        self._start_judging()
        self.add_callback(self.clock)

    @property
    def pad_token_id(self) -> int:
        """What prompts and completions are padded with."""
        return self._tokenizer.pad_token_id

    def _can_share_prefix(self) -> bool:
        model = self.accelerator.unwrap_model(self.model)
        reason = supports_shared_prefix(model.get_base_model() if isinstance(model, PeftModel) else model)
        if reason:
            warnings.warn(f"shared_prefix is off for this model: {reason}", stacklevel=3)
            return False
        add_shared_prefix()
        return True

    def _check_groups(self) -> None:
        if self.args.sync_ref_model and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise UserError("sync_ref_model: a sharded reference model cannot be kept in checkpoints yet")
        rows = self.args.per_device_train_batch_size * self.args.steps_per_generation
        per_group = [f"the reward {n!r}" for n, r in self.runner.rewards.items() if RewardCall(r).per_group]
        if per_group and self.num_generations == 1:
            raise UserError(
                f"{per_group[0]} compares the rollouts of a task, but there is one: num_generations"
            )
        per_group += ["dynamic_sampling"] * bool(self.dynamic_sampling)
        if per_group and rows % self.num_generations:
            raise UserError(
                f"{per_group[0]} judges whole groups, but a process gets {rows} rollouts at a "
                f"time: make that a multiple of num_generations ({self.num_generations})"
            )

    def stateful(self) -> dict[str, Stateful]:
        """What a checkpoint keeps besides what transformers saves."""
        parts: dict[str, Any] = {"progress": TrainerPosition(self), "budget": self.budget}
        parts |= {f"reward {name}": reward for name, reward in self.runner.stateful.items()}
        if hasattr(self.environment, "state_dict"):
            parts["environment"] = self.environment
        if self.dynamic_sampling:
            parts["dynamic_sampling"] = self.dynamic_sampling
        if self.args.sync_ref_model:
            parts["reference model"] = Reference(self.accelerator.unwrap_model(self.ref_model))
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "state_dict"):
                parts[type(callback).__name__] = callback
        return parts

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return InEpoch(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, with whole groups shuffled and not single rollouts, so that their prompt stays shared."""
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            with self.clock("scores"):
                batch = self._generate_and_score_completions(generation_batch)
            batch = shuffle_groups(batch, self.num_generations, (self.args.seed, self.generation))
            self._buffered_inputs = split(batch, steps)
        return self._buffered_inputs[self._step % steps]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """TRL's, timed."""
        with self.clock("forward_backward"):
            return super().training_step(model, inputs, num_items_in_batch)

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        output = self.sample(inputs)
        if self.dynamic_sampling and self.model.training:
            output = self.dynamic_sampling(output, inputs)
        if self.model.training:
            self._save_rollouts()
            self._advance()
        loss_mask = output["completion_mask"] * output.get("tool_mask", 1)
        return output | {"num_items_in_batch": self.accelerator.gather(loss_mask.sum()).sum()}

    def sample(self, inputs: list[dict]) -> dict[str, Any]:
        """Answer tasks, judge the answers, and compare them: TRL's batch, with rlkit's advantages."""
        self.generation += 1
        self._tasks = inputs
        output = super()._generate_and_score_completions(inputs)
        # TRL gives an invalid rollout advantage 0; with its tokens masked it has no part in the KL term, the
        # entropy bonus or the number of tokens either.
        masked = self._invalid.clone()
        # TRL takes for truncated what has no end token; a limit of turns may cut after one.
        truncated = torch.tensor([rollout.truncated for rollout in self._rollouts])
        if self.args.mask_truncated_completions:
            masked |= truncated
        masked = masked.to(output["completion_mask"].device)
        output["completion_mask"] = output["completion_mask"] * (~masked).unsqueeze(1)
        alike = spread(self._totals, self._keys) < ALIKE
        mode = "train" if self.model.training else "eval"
        share = self.accelerator.gather(truncated.float().to(masked.device)).mean().item()
        self._metrics[mode]["completions/clipped_ratio"][-1] = share
        # TRL compares a float32 standard deviation with 0; of eight rewards 0.2 it is 1.6e-8, not 0.
        self._metrics[mode]["frac_reward_zero_std"][-1] = alike.float().mean().item()
        rewards = self._totals - self._penalty(output) if self.kl_in_reward and self.beta else self._totals
        output["advantages"] = self._advantages(rewards, output["advantages"])
        self._add_to_records(output)
        return output

    def _add_to_records(self, output: Mapping[str, Any]) -> None:
        """What is known of rollouts only now: their advantages, and how far sampler and trainer are apart."""
        records = self.rollout_records
        for record, advantage in zip(records, output["advantages"].tolist(), strict=True):
            record["advantage"] = advantage
        if "importance_sampling_ratio" not in output:
            return
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        gaps, cut = sampler_gap(output, mask, self.args)
        for record, gap in zip(records, gaps.tolist(), strict=True):
            record["log_prob_gap"] = gap
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["sampling/cut"].append(self.accelerator.gather(cut.float()).mean().item())

    def _penalty(self, output: Mapping[str, Any]) -> torch.Tensor:
        """`beta` times the KL divergence from the reference of each rollout of all ranks, (N,), in nats."""
        ids, mask = (
            torch.cat([output[f"prompt_{k}"], output[f"completion_{k}"]], 1) for k in ("ids", "mask")
        )
        scored = output["completion_mask"] * output.get("tool_mask", 1)
        size, batch_size = scored.size(1), self.args.per_device_train_batch_size
        with torch.no_grad():
            scores = self._get_per_token_logps_and_entropies(self.model, ids, mask, size, batch_size)
        kl = self.accelerator.gather(((scores[0] - output["ref_per_token_logps"]) * scored).sum(1))
        self._metrics["train"]["kl"].append(kl.mean().item())
        return self.beta * kl

    def _advantages(self, rewards: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """The advantages of this rank's rollouts; `local` are TRL's."""
        mine = slice(first := self.accelerator.process_index * len(local), first + len(local))
        if self.advantages is not None:
            local = self.advantages(rewards, self._keys)[mine]
        if self.difficulty_weighting:
            local = local * difficulty_weight(local, self._solve_rate()[mine])
        return local

    def _solve_rate(self) -> torch.Tensor:
        """The share of correct rollouts among the valid ones of each rollout's group, (N,)."""
        metric = self._rewards[:, self.reward_func_names.index(self.environment.metric)]
        members = groups(metric, self._keys)
        rates = {key: (metric[rows] >= 1.0).float().mean() for key, rows in members.items() if len(rows)}
        return torch.stack([rates.get(key, metric.new_zeros(())) for key in self._keys])

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        if not self.kl_in_reward:
            return super()._compute_loss(model, inputs)
        beta, self.beta = self.beta, 0.0
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.beta = beta

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
        if self.shared_prefix and plain:
            size = batch_size or len(input_ids)
            batches = zip(input_ids.split(size), attention_mask.split(size), strict=True)
            with self.accelerator.autocast():
                outputs = [completion_log_probs(model, *batch, logits_to_keep) for batch in batches]
            entropies = None
            if kwargs.get("compute_entropy"):
                entropies = torch.cat([entropy for _, entropy in outputs if entropy is not None])
            return torch.cat([log_probs for log_probs, _ in outputs]), entropies, None
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs
        )
