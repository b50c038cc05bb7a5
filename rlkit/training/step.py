"""The RL step, from tasks to the batch that the loss reads. It reads from top to bottom.

TRL's data loader hands each process `B` rows; a task is repeated `num_generations` times, which makes a
group. `sample` answers them, judges the answers, and compares the answers of a group with one another. What
else is worth reading: `rlkit.rollouts.loop` carries an answer through its environment,
`rlkit.scoring.runner` runs rewards that may fail, `rlkit.training.advantages` has the baselines that are not
GRPO's, and `rlkit.training.grpo` connects all this with TRL, whose loss reads the batch.

Shapes: `B` rollouts of this process and `N` of all processes, `R` rewards, `P` prompt and `T` completion
tokens. A rollout is invalid where its answer could not be judged; its rewards are NaN, never 0.
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
from rlkit.runs.record import RolloutRecord, rollout_record
from rlkit.training.advantages import ALIKE, difficulty_weight, solve_rate, spread
from rlkit.training.batches import Batch

if TYPE_CHECKING:
    from trl import GRPOConfig

    from rlkit.scoring.batch import Scores
    from rlkit.training.grpo import GRPOTrainer

Task = dict[str, Any]  # a row of the dataset
Metrics = dict[str, float]


@dataclass
class JudgedRollouts:
    """What the rewards say about the rollouts of a sampling step.

    Attributes:
        rewards: (N, R), NaN where a reward does not apply or the rollout is invalid.
        totals: (N,) weighted sums of the rewards, NaN where there is nothing to sum.
        groups: (N,) the group of each rollout: rollouts are compared with those of the same group.
        invalid: (B,) whether a rollout of this process could not be judged.
        records: What is saved of each rollout of this process, (B,); after dynamic sampling also of the
            extra ones.
        error_rates: share of the N rollouts on which each reward failed, by metric name.
    """

    rewards: torch.Tensor
    totals: torch.Tensor
    groups: list[Hashable]
    invalid: torch.Tensor
    records: list[RolloutRecord]
    error_rates: Metrics


@dataclass
class SampledBatch:
    """A batch to learn from, the rewards and records of its rollouts, and what is logged."""

    batch: Batch
    judged: JudgedRollouts
    metrics: Metrics


def training_batch(trainer: GRPOTrainer, tasks: Sequence[Task]) -> Batch:
    """Sample the batch that the loss reads; save its rollouts, log it and tell the environment.

    Rollouts are saved before they are learned from, so that those of a step that fails can be read.
    """
    sampled = sample(trainer, tasks)
    if trainer.model.training:
        if trainer.dynamic_sampling is not None:
            sampled = trainer.dynamic_sampling(sampled, tasks)
        step = trainer.state.global_step + 1  # TRL counts the steps that are done
        rows = gather_object([record | {"step": step} for record in sampled.judged.records])
        if trainer.run is not None and trainer.accelerator.is_main_process:
            trainer.run.save_rollouts(step, rows)
        sampled.metrics |= advance_environment(trainer, sampled.judged)
    trainer.log_sampling(sampled)
    batch = sampled.batch
    # What the token-level losses divide by. Masked tokens do not count, or invalid rollouts would shrink the
    # gradient of the others.
    batch["num_items_in_batch"] = trainer.accelerator.gather(sampled_tokens(batch).sum()).sum()
    return batch


def sample(trainer: GRPOTrainer, tasks: Sequence[Task]) -> SampledBatch:
    """Answer this process's tasks, judge the answers and compare them: one batch for the loss."""
    args = trainer.args
    trainer.generation += 1  # counts samplings, so that each draws random numbers of its own
    rollouts = roll_out(trainer, tasks)
    judged = judge(trainer, tasks, rollouts)
    metrics = rollout_metrics(trainer, rollouts) | reward_metrics(trainer, judged)
    if trainer.model.training:
        tokens = sum(len(rollout.prompt_ids) + sum(rollout.mask) for rollout in rollouts)
        trainer.state.num_input_tokens_seen += sum(gather_object([tokens]))

    batch = collate(
        rollouts,
        pad_token_id=trainer.pad_token_id,
        device=trainer.accelerator.device,
        # Without environment tokens the loss needs no second mask.
        environment_mask=trainer.loop.limits.turns > 1 or bool(trainer.environment.stop),
        log_probs=trainer.use_vllm,
        multiple_of=args.pad_to_multiple_of,
    )
    mask_untrainable(batch, rollouts, judged.invalid, truncated=args.mask_truncated_completions)
    batch |= frozen_log_probs(trainer, batch)
    if trainer.corrects_sampler:
        batch["importance_sampling_ratio"] = importance_ratio(batch, args)
        # |log p of the trainer - log p of the sampler|, (B, T), NaN also where vLLM could not score a token.
        gap = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]).abs()
        gap = gap.masked_fill(sampled_tokens(batch) == 0, torch.nan)
        metrics |= sampler_metrics(trainer, batch, gap)
        for record, mean in zip(judged.records, gap.nanmean(1).nan_to_num(0.0).tolist(), strict=True):
            record["log_prob_gap"] = mean

    rewards = judged.totals
    if trainer.kl_in_reward and args.beta:
        kl = trainer.accelerator.gather(kl_divergence(trainer, batch))  # (N,)
        rewards = rewards - args.beta * kl
        metrics["kl"] = kl.mean().item()
    rank, B = trainer.accelerator.process_index, len(rollouts)
    batch["advantages"] = compute_advantages(trainer, judged, rewards)[rank * B : (rank + 1) * B]
    for record, advantage in zip(judged.records, batch["advantages"].tolist(), strict=True):
        record["advantage"] = advantage
    return SampledBatch(batch, judged, metrics)


# --- 1. Roll out -------------------------------------------------------------------------------------------


def roll_out(trainer: GRPOTrainer, tasks: Sequence[Task]) -> list[Rollout]:
    """Answer tasks through the environment, with the current weights: `B` rollouts."""
    prompts = [task["prompt"] for task in tasks]
    prompt_ids = tokenize(trainer.tokenizer, prompts, **trainer.loop.template)
    with trainer.clock("generation"):
        if trainer.samples_with_trl:
            return trainer.roll_out_with_trl(prompt_ids)
        with trainer.engine() as engine:
            # Random numbers depend on a rollout's place among all, not on how processes share the rollouts.
            first = trainer.accelerator.process_index * len(tasks)
            return trainer.loop(engine, sampling_settings(trainer), tasks, prompt_ids, first)


def sampling_settings(trainer: GRPOTrainer) -> Sampling:
    """Return the sampling settings of training; `key` makes each call draw different random numbers."""
    args = trainer.args
    engine_settings = dict(args.generation_kwargs or {})
    if trainer.use_vllm and args.vllm_structured_outputs_regex:
        engine_settings["structured_outputs"] = {"regex": args.vllm_structured_outputs_regex}
    return Sampling(
        ends=tuple(trainer.eos_token_ids),
        stop=tuple(trainer.environment.stop),
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=max(args.top_k, 0),  # vLLM's -1 and transformers' 0 both mean all tokens
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        key=(args.seed, trainer.generation),
        further=engine_settings,
    )


# --- 2. Judge ----------------------------------------------------------------------------------------------


def judge(trainer: GRPOTrainer, tasks: Sequence[Task], rollouts: Sequence[Rollout]) -> JudgedRollouts:
    """Run the rewards on the rollouts of this process and gather what they say on all processes.

    Raises:
        RewardError: on all processes, when rewards have failed more often than the error budget allows.
    """
    accelerator, runner = trainer.accelerator, trainer.runner
    limit = {"max_length": trainer.args.max_completion_length}
    rows = [task | rollout.columns() | limit for task, rollout in zip(tasks, rollouts, strict=True)]
    with trainer.clock("rewards"):
        # TRL may share a group out to several processes; then no reward looks at groups (`_check_settings`).
        whole_groups = len(rows) % trainer.group_size == 0
        scores = runner(rows, trainer.group_size if whole_groups else 1)

    rewards = torch.tensor(scores.values, dtype=torch.float32, device=accelerator.device)  # (B, R)
    totals = weighted_totals(rewards, trainer.reward_weights.to(rewards))  # (B,)
    rewards[totals.isnan()] = torch.nan

    records = []
    for row, values, invalid, total in zip(
        rows, scores.values.tolist(), scores.invalid, totals.tolist(), strict=True
    ):
        by_name = dict(zip(runner.names, values, strict=True))
        records.append(rollout_record(trainer.environment, row, by_name, invalid=invalid, reward=total))
    if trainer.model.training and any(hasattr(reward, "observe") for reward in runner.rewards.values()):
        # Rewards with memory see the rollouts of all processes, so that they stay the same everywhere.
        runner.observe(
            gather_object(
                [
                    {"task_id": row["task_id"], "length": record["length"], "correct": record["score"]}
                    for row, record in zip(rows, records, strict=True)
                    if record["score"] is not None
                ]
            )
        )

    error_rates = spend_error_budget(trainer, scores, rows)
    rewards, totals = accelerator.gather(rewards), accelerator.gather(totals)
    groups: list[Hashable] = [i // trainer.group_size for i in range(len(totals))]
    if trainer.group_by is not None:
        groups = gather_object([task[trainer.group_by] for task in tasks])
    invalid_rows = torch.tensor([reason is not None for reason in scores.invalid])
    return JudgedRollouts(rewards, totals, groups, invalid_rows, records, error_rates)


def weighted_totals(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted sums of rewards (B, R), (B,): NaN where no reward with a weight applies.

    The sum of nothing is not 0, which the group would be compared with. A metric of weight 0 is only logged:
    it does not make a rollout count.
    """
    nothing_applies = rewards[:, weights != 0].isnan().all(1)
    return (rewards * weights).nansum(1).masked_fill(nothing_applies, torch.nan)


def spend_error_budget(trainer: GRPOTrainer, scores: Scores, rows: Sequence[Mapping[str, Any]]) -> Metrics:
    """Return the error rates over all processes; stop the run, on all of them, when the budget is spent."""
    names = trainer.runner.names
    invalid = sum(reason is not None for reason in scores.invalid)
    counts = [len(rows), invalid, *(scores.error_counts.get(name, 0) for name in names)]
    total, invalid, *errors = trainer.accelerator.reduce(
        torch.tensor(counts, dtype=torch.float32, device=trainer.accelerator.device)
    ).tolist()
    row = None if scores.first_row is None else rows[scores.first_row]
    trainer.budget.update(invalid / total, scores.first_traceback, row)
    return {f"rewards/{name}/error_rate": count / total for name, count in zip(names, errors, strict=True)}


# --- 3. Tensors --------------------------------------------------------------------------------------------


def collate(
    rollouts: Sequence[Rollout],
    *,
    pad_token_id: int,
    device: torch.device | str = "cpu",
    environment_mask: bool = True,
    log_probs: bool = False,
    multiple_of: int | None = None,
) -> Batch:
    """Pad rollouts to tensors, prompts on the left and completions on the right.

    Args:
        rollouts: `B` of them.
        pad_token_id: fills up the token ids.
        device: where the tensors go.
        environment_mask: add `tool_mask`, 0 for the tokens that the environment wrote.
        log_probs: add `sampling_per_token_logps`, the sampler's log-probabilities.
        multiple_of: round the widths `P` and `T` up to a multiple.

    Returns:
        `prompt_ids` and `prompt_mask` (B, P), all others (B, T), under the names that TRL's loss reads.
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
        # A prompt that left no room was never sampled from: it has no log-probabilities, and is invalid.
        rows = [torch.tensor(rollout.log_probs or [0.0] * len(rollout.ids)) for rollout in rollouts]
        batch["sampling_per_token_logps"] = pad(rows, 0.0, "right")
    return batch


def mask_untrainable(
    batch: Batch, rollouts: Sequence[Rollout], invalid: torch.Tensor, *, truncated: bool
) -> None:
    """Take rollouts out of the loss: those that could not be judged, and, with `truncated`, those cut off.

    An advantage of 0 is not enough: the tokens would still count in the KL term, in the entropy bonus and in
    the number of tokens that the loss is divided by. This runs before any forward pass: a masked token is
    then neither attended to nor scored, here and in the loss alike, and its importance ratio is exp(0 - 0),
    not exp(0 - log p), which overflows.
    """
    untrainable = invalid.clone()  # (B,)
    if truncated:
        # By the loop, not by the last token as TRL has it: a limit of turns may cut after an EOS token.
        untrainable |= torch.tensor([rollout.truncated for rollout in rollouts])
    trainable = (~untrainable).to(batch["completion_mask"].device)
    batch["completion_mask"] = batch["completion_mask"] * trainable.unsqueeze(1)


def sampled_tokens(batch: Batch) -> torch.Tensor:
    """Return 1 for the tokens that are learned from, (B, T): sampled by the model and not masked."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


# --- 4. Log-probabilities that the loss does not differentiate ---------------------------------------------


def frozen_log_probs(trainer: GRPOTrainer, batch: Batch) -> Batch:
    """Score the completions (B, T) with the policy that sampled them and with the reference, where needed."""
    args = trainer.args
    log_probs = {}
    with trainer.frozen():
        # Where each optimizer step learns from a generation of its own, the policy that sampled is the one
        # that is learned from: the ratio is 1, and TRL takes the loss's own log-probabilities.
        batches_per_generation = args.steps_per_generation * args.num_iterations
        outlives_step = args.gradient_accumulation_steps % batches_per_generation != 0
        if outlives_step or trainer.corrects_sampler:
            log_probs["old_per_token_logps"] = trainer.token_log_probs(trainer.model, batch)
        if args.beta:
            with trainer.reference_model() as reference:
                log_probs["ref_per_token_logps"] = trainer.token_log_probs(reference, batch)
    return log_probs


def kl_divergence(trainer: GRPOTrainer, batch: Batch) -> torch.Tensor:
    """Estimate KL(policy || reference) of each rollout in nats, (B,): the sum of log ratios of its tokens."""
    policy = batch.get("old_per_token_logps")
    if policy is None:
        with trainer.frozen():
            policy = trainer.token_log_probs(trainer.model, batch)
    return ((policy - batch["ref_per_token_logps"]) * sampled_tokens(batch)).sum(1)


def importance_ratio(batch: Batch, args: GRPOConfig) -> torch.Tensor:
    """Return the trainer's probability of what was sampled over the sampler's, clipped.

    vLLM's kernels round differently from the trainer's; the loss is multiplied by this ratio to correct it.

    Args:
        batch: with `old_per_token_logps` and `sampling_per_token_logps`, (B, T).
        args: `vllm_importance_sampling_mode` is "token_…" or "sequence_…", a ratio for each token or for
            each rollout, and "…_truncate" or "…_mask": outside of `vllm_importance_sampling_clip_min` and
            `_max` it is set to the limit or to 0.

    Returns:
        (B, T), or (B, 1) for a rollout as a whole.
    """
    level, _, cut = args.vllm_importance_sampling_mode.partition("_")
    log_ratio = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]) * sampled_tokens(batch)
    log_ratio = log_ratio.nan_to_num(nan=0.0)  # NaN: vLLM could not score the token. It is not corrected.
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True)
    ratio = log_ratio.exp()
    low, high = importance_limits(args)
    if cut == "truncate":
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def importance_limits(args: GRPOConfig) -> tuple[float, float]:
    """The smallest and largest importance ratio."""
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    return -math.inf if low is None else low, math.inf if high is None else high


# --- 5. Advantages -----------------------------------------------------------------------------------------


def compute_advantages(trainer: GRPOTrainer, judged: JudgedRollouts, rewards: torch.Tensor) -> torch.Tensor:
    """How much better than its group each rollout did: (N,), 0 where a rollout could not be judged.

    Args:
        trainer: Its settings choose the baseline.
        judged: The rewards one by one, and the groups.
        rewards: (N,) the totals, less the KL penalty where it is part of the reward.
    """
    args = trainer.args
    if trainer.advantages is not None:  # RLOO, HRPO: see `rlkit.training.advantages`
        values = trainer.advantages(rewards, judged.groups)
    elif args.multi_objective_aggregation == "normalize_then_sum":
        # Each reward is normalized in its group before they are weighted, so that one of large scale does not
        # drown the others. The sum is normalized over the batch.
        columns = [group_advantages(column, trainer.group_size, "group") for column in judged.rewards.T]
        total = (torch.stack(columns, 1) * trainer.reward_weights.to(rewards)).sum(1)
        total = total.masked_fill(judged.rewards.isnan().all(1), torch.nan)
        values = group_advantages(total, len(total), "batch")
    else:
        values = group_advantages(rewards, trainer.group_size, args.scale_rewards)
    if trainer.difficulty_weighting:
        metric = judged.rewards[:, trainer.runner.names.index(trainer.environment.metric)]
        values = values * difficulty_weight(values, solve_rate(metric, judged.groups))
    return values


def group_advantages(rewards: torch.Tensor, group_size: int, scale: str) -> torch.Tensor:
    """GRPO (arXiv 2402.03300): the reward minus the mean of its group, over the standard deviation.

    Args:
        rewards: (N,), the members of a group next to each other; NaN is left out and has advantage 0.
        group_size: rollouts of a group.
        scale: whose standard deviation (n - 1) divides: "group", "batch", or "none" (Dr. GRPO).
    """
    grouped = rewards.view(-1, group_size)
    centered = grouped - grouped.nanmean(1, keepdim=True)
    if scale != "none":
        # 1e-4 as in TRL: where all rewards of a group are equal the advantages are 0, not 0 / 0.
        centered = centered / (nan_std(grouped if scale == "group" else rewards.view(1, -1)) + 1e-4)
    return centered.flatten().nan_to_num(0.0)


def nan_std(x: torch.Tensor) -> torch.Tensor:
    """Sample standard deviation (n - 1) of each row of (G, n) without NaN, (G, 1); NaN below two values."""
    count = (~x.isnan()).sum(1, keepdim=True)
    squares = (x - x.nanmean(1, keepdim=True)).square().nansum(1, keepdim=True)
    return (squares / (count - 1)).masked_fill(count < 2, torch.nan).sqrt()


# --- 6. Metrics, under TRL's names wherever TRL has one ----------------------------------------------------


def rollout_metrics(trainer: GRPOTrainer, rollouts: Sequence[Rollout]) -> Metrics:
    """Lengths of the rollouts of all processes, in tokens that the model sampled."""
    gather, device = trainer.accelerator.gather, trainer.accelerator.device
    # TRL's "terminated" looks at the last token alone, and counts padding as EOS.
    eos_and_pad = {*trainer.eos_token_ids, trainer.pad_token_id}
    table = [[sum(r.mask), r.truncated, r.ids[-1] in eos_and_pad] for r in rollouts]
    lengths, truncated, terminated = gather(torch.tensor(table, dtype=torch.float32, device=device)).T
    metrics = {"completions/clipped_ratio": truncated.mean().item()}
    finished = lengths[terminated > 0] if terminated.any() else torch.zeros(1)
    for name, values in (("length", lengths), ("terminated_length", finished)):
        metrics[f"completions/mean_{name}"] = values.mean().item()
        metrics[f"completions/min_{name}"] = values.min().item()
        metrics[f"completions/max_{name}"] = values.max().item()
    return metrics


def reward_metrics(trainer: GRPOTrainer, judged: JudgedRollouts) -> Metrics:
    """Means and standard deviations of the rewards over the rollouts that they apply to."""
    metrics = dict(judged.error_rates)
    for name, column in zip(trainer.runner.names, judged.rewards.T, strict=True):
        metrics[f"rewards/{name}/mean"] = column.nanmean().item()
        metrics[f"rewards/{name}/std"] = nan_std(column[None]).item()
    metrics["reward"] = judged.totals.nanmean().item()
    metrics["reward_std"] = nan_std(judged.totals[None]).item()
    # The share of groups whose valid rewards differ by less than 1e-6: nothing is learned from them. Not by
    # a standard deviation of 0: in float32, that of eight rewards 0.2 is 1.6e-8.
    alike = spread(judged.totals, judged.groups) < ALIKE
    metrics["frac_reward_zero_std"] = alike.float().mean().item()
    return metrics


def sampler_metrics(trainer: GRPOTrainer, batch: Batch, gap: torch.Tensor) -> Metrics:
    """How far the sampler's probabilities are from the trainer's, over the tokens that are learned from."""
    gather, mode = trainer.accelerator.gather, trainer.args.vllm_importance_sampling_mode
    ratio, mask = batch["importance_sampling_ratio"], sampled_tokens(batch) > 0
    # A rollout is cut where the importance correction has set a ratio to a limit, or to 0.
    low, high = importance_limits(trainer.args)
    cut = (ratio >= high) | (ratio <= low)
    if mode.endswith("_mask"):
        cut |= ratio == 0
    cut = (cut & mask).any(1)  # (B,)
    ratios = ratio.flatten() if mode.startswith("sequence") else ratio[mask]
    gaps = gap[~gap.isnan()]
    # A process whose rollouts are all masked still takes part in the collectives.
    ratios, gaps = (x if len(x) else x.new_zeros(1) for x in (ratios, gaps))
    return {
        "sampling/sampling_logp_difference/mean": gather(gaps.mean()).mean().item(),
        "sampling/sampling_logp_difference/max": gather(gaps.max()).max().item(),
        "sampling/importance_sampling_ratio/min": gather(ratios.min()).min().item(),
        "sampling/importance_sampling_ratio/mean": gather(ratios.mean()).mean().item(),
        "sampling/importance_sampling_ratio/max": gather(ratios.max()).max().item(),
        "sampling/cut": gather(cut.float()).mean().item(),
    }


def advance_environment(trainer: GRPOTrainer, judged: JudgedRollouts) -> Metrics:
    """Tell an environment that adapts to the training how the sampling went; return what it logs."""
    environment, args = trainer.environment, trainer.args
    if type(environment).advance is Environment.advance:
        return {}
    batches_per_generation = args.steps_per_generation * args.num_iterations
    step = (trainer.micro_batches + batches_per_generation) // args.gradient_accumulation_steps
    score = judged.rewards[:, trainer.runner.names.index(environment.metric)].nanmean().item()
    logged = environment.advance(step, trainer.state.max_steps, None if math.isnan(score) else score)
    return {f"environment/{name}": float(value) for name, value in logged.items()}
