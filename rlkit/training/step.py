"""The GRPO step: from tasks to the batch that the loss reads. It reads from top to bottom.

TRL's data loader hands each process `B` rows. Over all processes, every task occurs `num_generations` times
in a row; the rollouts of one task are a group. Each stage of a step has a section of this file:

1. Roll out: sample an answer to each task, with the environment's replies in between.
2. Judge: compute the rewards.
3. Collate: pad the rollouts to tensors, and mask those that must not be trained on.
4. Log-probabilities: compute those that need no gradient.
5. Compare: turn the rewards of each group into advantages.

TRL calls `training_batch` and then computes the loss. `rlkit.training.grpo` connects this file with TRL's
trainer, `rlkit.rollouts.loop` runs a rollout through its environment, `rlkit.scoring.runner` runs rewards
that may fail, and `rlkit.training.advantages` has the baselines of RLOO and HRPO.

Shapes, used as suffixes of names: `B` rollouts of this process, `N` rollouts of all processes, `R` rewards,
`P` prompt tokens, `T` completion tokens. A rollout is *invalid* if it could not be judged: the environment or
a reward failed. Its rewards are NaN rather than 0, because a 0 would lower the baseline of its group.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence

from rlkit.environment import Environment
from rlkit.rollouts.tokenize import tokenize
from rlkit.rollouts.types import Rollout, Sampling
from rlkit.runs.record import RolloutRecord, rollout_records
from rlkit.training.advantages import difficulty_weight, nan_std, solve_rate
from rlkit.training.batches import Batch
from rlkit.training.metrics import (
    Metrics,
    progress,
    reward_call_metrics,
    reward_metrics,
    rollout_metrics,
)
from rlkit.training.processes import on_every_process

if TYPE_CHECKING:
    from trl import GRPOConfig

    from rlkit.scoring.batch import Scores
    from rlkit.training.grpo import GRPOTrainer

Task = dict[str, Any]  # a row of the dataset


@dataclass
class JudgedRollouts:
    """Rewards of the rollouts of one sampling step.

    Attributes:
        rewards_NR: Rewards, (N, R). NaN if the reward does not apply or the total is NaN.
        totals_N: Weighted sums of the rewards, (N,). NaN if invalid, or if no reward with a weight applies.
        groups_N: Group of each rollout.
        invalid_B: Whether each rollout of this process is invalid, (B,).
        records: Rows to save, one per rollout of this process, including dynamic sampling's extra rollouts.
        metrics: Error rates and latencies of the rewards, and what they logged, over all processes.
    """

    rewards_NR: torch.Tensor
    totals_N: torch.Tensor
    groups_N: list[Hashable]
    invalid_B: torch.Tensor
    records: list[RolloutRecord]
    metrics: Metrics


@dataclass
class SampledBatch:
    """The result of one sampling step: the batch to train on, its rewards and records, and its metrics."""

    batch: Batch
    judged: JudgedRollouts
    metrics: Metrics


def training_batch(trainer: GRPOTrainer, tasks: Sequence[Task]) -> Batch:
    """Return the batch for the loss. In training, also save its rollouts and advance the environment."""
    if trainer.model.training and trainer.sampling_progress[0] == 1:
        advance_environment(trainer, None)
    sampled = sample(trainer, tasks)
    if trainer.model.training:  # TRL's own evaluations call this, too
        if trainer.dynamic_sampling is not None:
            sampled = trainer.dynamic_sampling(sampled, tasks)
        # Saved before the optimizer step, so that the rollouts of a step that crashes can be inspected.
        step = trainer.state.global_step + 1  # global_step counts completed steps
        records = gather_object([record | {"step": step} for record in sampled.judged.records])
        trainer.rollout_counts.add(records, step)
        if trainer.run_dir is not None and trainer.accelerator.is_main_process:
            trainer.run_dir.save_rollouts(step, records)
        sampled.metrics |= advance_environment(trainer, sampled.judged)
    trainer.log_sampling(sampled)
    batch = sampled.batch
    # The denominator of the token-level losses (DAPO). Counting masked tokens, too, would shrink the gradient
    # of all other rollouts whenever one is invalid.
    batch["num_items_in_batch"] = trainer.accelerator.gather(loss_mask(batch).sum()).sum()
    return batch


def sample(trainer: GRPOTrainer, tasks: Sequence[Task]) -> SampledBatch:
    """Roll out this process's tasks, judge the rollouts and compute the batch for the loss."""
    args = trainer.args
    trainer.sampling_step += 1  # part of the random seed: no two calls draw the same random numbers
    rollouts = roll_out(trainer, tasks)
    judged = judge(trainer, tasks, rollouts)
    metrics = judged.metrics | rollout_metrics(trainer, rollouts) | reward_metrics(trainer, judged)
    if trainer.model.training:
        num_tokens = sum(len(rollout.prompt_ids) + sum(rollout.mask) for rollout in rollouts)
        trainer.state.num_input_tokens_seen += sum(gather_object([num_tokens]))

    batch = collate(
        rollouts,
        pad_token_id=trainer.pad_token_id,
        device=trainer.accelerator.device,
        # The mask of environment tokens would be all ones for a single turn. A stop string needs it even
        # then: the EOS token appended after it was not sampled by the model.
        environment_mask=trainer.loop.limits.max_turns > 1 or bool(trainer.environment.stop),
        log_probs=trainer.use_vllm,
        multiple_of=args.pad_to_multiple_of,
    )
    mask_untrainable(batch, rollouts, judged.invalid_B, mask_truncated=args.mask_truncated_completions)
    batch |= frozen_log_probs(trainer, batch)
    if trainer.corrects_sampler:
        batch["importance_sampling_ratio"] = importance_ratio(batch, args)
        # |log p of the trainer - log p of vLLM|, NaN for masked tokens and those that vLLM did not score.
        gap_BT = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]).abs()
        gap_BT = gap_BT.masked_fill(loss_mask(batch) == 0, torch.nan)
        metrics |= sampler_metrics(trainer, batch, gap_BT)
        for record, mean in zip(judged.records, gap_BT.nanmean(1).nan_to_num(0.0).tolist(), strict=True):
            record["log_prob_gap"] = mean

    rewards_N = judged.totals_N
    if trainer.kl_in_reward and args.beta:  # RLOO penalizes the reward, GRPO the loss
        kl_N = trainer.accelerator.gather(kl_divergence(trainer, batch))
        rewards_N = rewards_N - args.beta * kl_N
        metrics["kl"] = kl_N.mean().item()
    # Every process computes the advantages of all N rollouts, because a group may span processes, and keeps
    # its own B. `gather` concatenates by rank.
    advantages_N = compute_advantages(trainer, judged, rewards_N)
    rank, B = trainer.accelerator.process_index, len(rollouts)
    batch["advantages"] = advantages_N[rank * B : (rank + 1) * B]
    for record, advantage in zip(judged.records, batch["advantages"].tolist(), strict=True):
        record["advantage"] = advantage
    return SampledBatch(batch, judged, metrics)


# --- 1. Roll out -------------------------------------------------------------------------------------------


def roll_out(trainer: GRPOTrainer, tasks: Sequence[Task]) -> list[Rollout]:
    """Sample one rollout for each of this process's `B` tasks with the current weights."""
    prompt_ids = tokenize(trainer.tokenizer, [task["prompt"] for task in tasks], **trainer.loop.template)
    with trainer.clock("generation"):
        if trainer.samples_with_trl:
            return trainer.roll_out_with_trl(prompt_ids)
        with trainer.engine() as engine:
            # The index among all N rollouts seeds each one: samples don't depend on the number of processes.
            first_index = trainer.accelerator.process_index * len(tasks)
            return trainer.loop(engine, sampling_settings(trainer), tasks, prompt_ids, first_index)


def sampling_settings(trainer: GRPOTrainer) -> Sampling:
    """Return the sampling settings of the current sampling step."""
    args = trainer.args
    engine_settings = dict(args.generation_kwargs or {})
    if trainer.use_vllm and args.vllm_structured_outputs_regex:
        engine_settings["structured_outputs"] = {"regex": args.vllm_structured_outputs_regex}
    return Sampling(
        eos_token_ids=tuple(trainer.eos_token_ids),
        stop=tuple(trainer.environment.stop),
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=max(args.top_k, 0),  # vLLM's -1 and transformers' 0 both mean all tokens
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        key=(args.seed, trainer.sampling_step),
        extra=engine_settings,
    )


# --- 2. Judge ----------------------------------------------------------------------------------------------


def judge(trainer: GRPOTrainer, tasks: Sequence[Task], rollouts: Sequence[Rollout]) -> JudgedRollouts:
    """Compute the rewards of this process's rollouts, and gather those of all processes."""
    accelerator, runner = trainer.accelerator, trainer.runner
    limit = {"max_length": trainer.args.max_completion_length}  # length rewards read it
    rows = [task | rollout.columns() | limit for task, rollout in zip(tasks, rollouts, strict=True)]
    with trainer.clock("rewards"):
        # TRL may split a group over processes. `rlkit.training.settings` rejects that if a reward
        # compares the rollouts of a group; all other rewards can judge each rollout alone.
        has_whole_groups = len(rows) % trainer.group_size == 0
        group_size = trainer.group_size if has_whole_groups else 1
        scores = on_every_process(lambda: runner(rows, group_size, progress(trainer)))

    rewards_BR = torch.tensor(scores.values, dtype=torch.float32, device=accelerator.device)
    totals_B = weighted_totals(rewards_BR, trainer.reward_weights.to(rewards_BR))
    # A rollout that no weighted reward applies to is not trained on; drop its metric from the means, too.
    rewards_BR[totals_B.isnan()] = torch.nan

    records = rollout_records(trainer.environment, rows, runner.names, scores, totals_B.tolist())
    if trainer.model.training and any(hasattr(reward, "observe") for reward in runner.rewards.values()):
        # Stateful rewards (HAPO's length history) see the rollouts of all processes, to stay in sync.
        observations = [
            {"task_id": row["task_id"], "length": record["length"], "correct": record["score"]}
            for row, record in zip(rows, records, strict=True)
            if record["score"] is not None
        ]
        runner.observe(gather_object(observations))

    metrics = reward_call_metrics(runner.names, scores) | spend_error_budget(trainer, scores, rows)
    rewards_NR, totals_N = accelerator.gather(rewards_BR), accelerator.gather(totals_B)
    groups_N: list[Hashable] = [i // trainer.group_size for i in range(len(totals_N))]
    if trainer.group_by is not None:  # HRPO groups by a column of the tasks, such as the number of hops
        groups_N = gather_object([task[trainer.group_by] for task in tasks])
    invalid_B = torch.tensor([reason is not None for reason in scores.invalid])
    return JudgedRollouts(rewards_NR, totals_N, groups_N, invalid_B, records, metrics)


def weighted_totals(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted sums (B,) of rewards (B, R), ignoring NaN.

    A sum is NaN, not 0, if no reward of nonzero weight applies: nothing says how good that rollout is.
    """
    is_unrewarded = rewards[:, weights != 0].isnan().all(1)
    return (rewards * weights).nansum(1).masked_fill(is_unrewarded, torch.nan)


def spend_error_budget(trainer: GRPOTrainer, scores: Scores, rows: Sequence[Mapping[str, Any]]) -> Metrics:
    """Return the error rates over all processes; raise RewardError if the budget is spent.

    All processes raise together: if one raised alone, the others would hang in the next collective.
    """
    names = trainer.runner.names
    num_invalid = sum(reason is not None for reason in scores.invalid)
    counts = [len(rows), num_invalid, *(scores.error_counts.get(name, 0) for name in names)]
    total, all_invalid, *errors = trainer.accelerator.reduce(
        torch.tensor(counts, dtype=torch.float32, device=trainer.accelerator.device)
    ).tolist()
    row = None if scores.first_row is None else rows[scores.first_row]
    trainer.budget.update(all_invalid / total, scores.first_traceback, row)
    rates = {f"rewards/{name}/error_rate": count / total for name, count in zip(names, errors, strict=True)}
    return {"completions/invalid_ratio": all_invalid / total, **rates}


# --- 3. Collate --------------------------------------------------------------------------------------------


def collate(
    rollouts: Sequence[Rollout],
    *,
    pad_token_id: int,
    device: torch.device | str = "cpu",
    environment_mask: bool = True,
    log_probs: bool = False,
    multiple_of: int | None = None,
) -> Batch:
    """Pad `B` rollouts to tensors, prompts on the left and completions on the right.

    The tensors are named as TRL's loss reads them. `prompt_*` are (B, P), all others (B, T). A completion
    includes the environment's replies.

    Args:
        pad_token_id: Token id that pads `prompt_ids` and `completion_ids`.
        device: Device of the tensors.
        environment_mask: Whether to add `tool_mask`, which is 0 for tokens that the environment wrote.
        log_probs: Whether to add `sampling_per_token_logps`, the sampler's log-probabilities.
        multiple_of: Number to a multiple of which the widths `P` and `T` are padded, or None.
    """

    def pad(rows: Sequence[torch.Tensor], value: float, side: str) -> torch.Tensor:
        table = pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)
        if multiple_of:
            missing = -table.size(1) % multiple_of
            sides = (missing, 0) if side == "left" else (0, missing)
            table = torch.nn.functional.pad(table, sides, value=value)
        return table.to(device)

    prompts = [torch.tensor(rollout.prompt_ids) for rollout in rollouts]
    completions = [torch.tensor(rollout.ids) for rollout in rollouts]
    batch = {
        "prompt_ids": pad(prompts, pad_token_id, "left"),
        "prompt_mask": pad([torch.ones_like(ids) for ids in prompts], 0, "left"),
        "completion_ids": pad(completions, pad_token_id, "right"),
        "completion_mask": pad([torch.ones_like(ids) for ids in completions], 0, "right"),
    }
    if environment_mask:
        batch["tool_mask"] = pad([torch.tensor(rollout.mask) for rollout in rollouts], 1, "right")
    if log_probs:
        # An overlong prompt was never sent to the sampler: its rollout is invalid, without log-probabilities.
        rows = [torch.tensor(rollout.log_probs or [0.0] * len(rollout.ids)) for rollout in rollouts]
        batch["sampling_per_token_logps"] = pad(rows, 0.0, "right")
    return batch


def mask_untrainable(
    batch: Batch, rollouts: Sequence[Rollout], invalid: torch.Tensor, *, mask_truncated: bool
) -> None:
    """Set `completion_mask` to 0 for invalid rollouts and, if `mask_truncated`, for truncated ones.

    An advantage of 0 is not enough: the tokens would still count in the KL term, in the entropy bonus and in
    the number of tokens that the loss is divided by. Call this before any forward pass. Then old policy and
    loss both give a masked token the log-probability 0, and its importance ratio is exp(0 - 0). If only the
    loss masked it, the ratio would be exp(0 - log p), which overflows.
    """
    untrainable_B = invalid.clone()
    if mask_truncated:
        # TRL tests whether the last token is EOS. It misses limits that end a rollout after a complete turn.
        untrainable_B |= torch.tensor([rollout.truncated for rollout in rollouts])
    trainable_B = (~untrainable_B).to(batch["completion_mask"].device)
    batch["completion_mask"] = batch["completion_mask"] * trainable_B.unsqueeze(1)


def loss_mask(batch: Batch) -> torch.Tensor:
    """Return the mask (B, T) of the tokens in the loss: sampled by the model, and not masked out."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


# --- 4. Log-probabilities without gradient -----------------------------------------------------------------


def frozen_log_probs(trainer: GRPOTrainer, batch: Batch) -> Batch:
    """Return the log-probabilities (B, T) that the loss needs as constants, each only if it is needed.

    `old_per_token_logps` are those of the policy that sampled, for the importance ratio of the loss;
    `ref_per_token_logps` are those of the reference model, for the KL term.
    """
    args = trainer.args
    log_probs = {}
    with trainer.no_grad():
        # If each batch is used for a single optimizer step, the old policy is the current one. The ratio is
        # then 1, and TRL's loss takes its own log-probabilities, detached, which saves this forward pass.
        micro_batches_per_generation = args.steps_per_generation * args.num_iterations
        is_reused = args.gradient_accumulation_steps % micro_batches_per_generation != 0
        if is_reused or trainer.corrects_sampler:
            log_probs["old_per_token_logps"] = trainer.token_log_probs(trainer.model, batch)
        if args.beta:
            with trainer.reference_model() as reference:
                log_probs["ref_per_token_logps"] = trainer.token_log_probs(reference, batch)
    return log_probs


def kl_divergence(trainer: GRPOTrainer, batch: Batch) -> torch.Tensor:
    """Estimate KL(policy || reference) of each rollout, (B,), in nats: the sum of log p - log p_ref (k1)."""
    policy_BT = batch.get("old_per_token_logps")
    if policy_BT is None:
        with trainer.no_grad():
            policy_BT = trainer.token_log_probs(trainer.model, batch)
    return ((policy_BT - batch["ref_per_token_logps"]) * loss_mask(batch)).sum(1)


def importance_ratio(batch: Batch, args: GRPOConfig) -> torch.Tensor:
    """Return p(trainer) / p(vLLM) of each sampled token (B, T) or, in the sequence modes, rollout (B, 1).

    vLLM's kernels round differently from the trainer's, so the rollouts come from a slightly different
    policy. The loss multiplies each token by this ratio to correct for it. A ratio beyond
    `vllm_importance_sampling_clip_min` or `_max` becomes that limit ("…_truncate") or 0 ("…_mask").
    """
    level, _, action = args.vllm_importance_sampling_mode.partition("_")
    log_ratio = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]) * loss_mask(batch)
    log_ratio = log_ratio.nan_to_num(nan=0.0)  # NaN: vLLM did not score the token, which gets the ratio 1
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True)
    ratio = log_ratio.exp()
    low, high = importance_limits(args)
    if action == "truncate":
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def importance_limits(args: GRPOConfig) -> tuple[float, float]:
    """Return the minimum and maximum importance ratio, infinite where the config sets none."""
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    return -math.inf if low is None else low, math.inf if high is None else high


# --- 5. Compare: advantages --------------------------------------------------------------------------------


def compute_advantages(trainer: GRPOTrainer, judged: JudgedRollouts, rewards: torch.Tensor) -> torch.Tensor:
    """Return the advantage of each rollout relative to its group, (N,); 0 for invalid rollouts.

    `rewards` are the totals, (N,), minus the KL penalty if that is part of the reward.
    """
    args = trainer.args
    if trainer.advantages is not None:  # RLOO or HRPO, see `rlkit.training.advantages`
        advantages_N = trainer.advantages(rewards, judged.groups_N)
    elif args.multi_objective_aggregation == "normalize_then_sum":
        # Each reward is normalized within its group before the weighted sum. Otherwise a reward on a large
        # scale drowns out the others. The sum is then normalized over the batch.
        columns = [group_advantages(column, trainer.group_size, "group") for column in judged.rewards_NR.T]
        total_N = (torch.stack(columns, 1) * trainer.reward_weights.to(rewards)).sum(1)
        total_N = total_N.masked_fill(judged.rewards_NR.isnan().all(1), torch.nan)
        advantages_N = group_advantages(total_N, len(total_N), "batch")
    else:
        advantages_N = group_advantages(rewards, trainer.group_size, args.scale_rewards)
    if trainer.difficulty_weighting:
        metric_N = judged.rewards_NR[:, trainer.runner.names.index(trainer.environment.metric)]
        advantages_N = advantages_N * difficulty_weight(advantages_N, solve_rate(metric_N, judged.groups_N))
    return advantages_N


def group_advantages(rewards: torch.Tensor, group_size: int, scale: str) -> torch.Tensor:
    """Return GRPO's advantages (arXiv 2402.03300): (reward - mean of the group) / standard deviation.

    Args:
        rewards: Rewards (N,); those of a group are adjacent. NaN is ignored and gets the advantage 0.
        group_size: Number of rollouts of a group.
        scale: Scope of the standard deviation (n - 1) to divide by: "group", "batch" or "none" (Dr. GRPO).
    """
    grouped = rewards.view(-1, group_size)
    centered = grouped - grouped.nanmean(1, keepdim=True)
    if scale != "none":
        deviation = nan_std(grouped if scale == "group" else rewards.view(1, -1))
        # 1e-4, as in TRL: if all rewards of a group are equal, its advantages are 0 and not 0 / 0.
        centered = centered / (deviation + 1e-4)
    return centered.flatten().nan_to_num(0.0)


# --- 6. Metrics, under TRL's names where TRL has them ------------------------------------------------------


def sampler_metrics(trainer: GRPOTrainer, batch: Batch, gap_BT: torch.Tensor) -> Metrics:
    """Return how far vLLM's log-probabilities are from the trainer's; `gap_BT` is NaN outside of the loss."""
    gather, mode = trainer.accelerator.gather, trainer.args.vllm_importance_sampling_mode
    ratio, mask_BT = batch["importance_sampling_ratio"], loss_mask(batch) > 0
    # The rollouts that the correction has truncated or masked in at least one token.
    low, high = importance_limits(trainer.args)
    is_cut = (ratio >= high) | (ratio <= low)
    if mode.endswith("_mask"):
        is_cut |= ratio == 0
    is_cut_B = (is_cut & mask_BT).any(1)
    ratios = ratio.flatten() if mode.startswith("sequence") else ratio[mask_BT]
    gaps = gap_BT[~gap_BT.isnan()]
    # A process whose rollouts are all masked must still take part in the collectives.
    ratios, gaps = (x if len(x) else x.new_zeros(1) for x in (ratios, gaps))
    return {
        "sampling/sampling_logp_difference/mean": gather(gaps.mean()).mean().item(),
        "sampling/sampling_logp_difference/max": gather(gaps.max()).max().item(),
        "sampling/importance_sampling_ratio/min": gather(ratios.min()).min().item(),
        "sampling/importance_sampling_ratio/mean": gather(ratios.mean()).mean().item(),
        "sampling/importance_sampling_ratio/max": gather(ratios.max()).max().item(),
        "sampling/cut": gather(is_cut_B.float()).mean().item(),
    }


def advance_environment(trainer: GRPOTrainer, judged: JudgedRollouts | None) -> Metrics:
    """Report progress to an environment that adapts to training, such as a curriculum; return its metrics.

    `judged` are the rollouts just sampled, or None before the first sampling step of a run.
    """
    environment = trainer.environment
    if type(environment).advance is Environment.advance:  # it does not adapt
        return {}
    step, steps = trainer.sampling_progress
    if judged is None:
        environment.advance(step, steps, None)
        return {}
    score = judged.rewards_NR[:, trainer.runner.names.index(environment.metric)].nanmean().item()
    logged = environment.advance(step + 1, steps, None if math.isnan(score) else score)
    return {f"environment/{name}": float(value) for name, value in logged.items()}
