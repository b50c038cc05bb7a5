"""Metrics of a sampling step, under TRL's names where TRL has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from rlkit.reward import TrainerState
from rlkit.rollouts.types import Rollout
from rlkit.training.advantages import EQUAL_REWARDS, nan_std, reward_range

if TYPE_CHECKING:
    import transformers

    from rlkit.scoring import Scores
    from rlkit.training.grpo import GRPOTrainer
    from rlkit.training.step import JudgedRollouts

Metrics = dict[str, float]


def progress(trainer: transformers.Trainer) -> TrainerState:
    """Return the progress of training, for rewards that change with it."""
    state, args = trainer.state, trainer.args
    # Before training begins, transformers has not computed the number of steps.
    max_steps = state.max_steps or max(args.max_steps, 1)
    return TrainerState(state.global_step, max_steps, state.epoch or 0.0, state.num_train_epochs)


def rollout_metrics(trainer: GRPOTrainer, rollouts: Sequence[Rollout]) -> Metrics:
    """Return statistics of the lengths of all N rollouts, in tokens that the model sampled."""
    gather, device = trainer.accelerator.gather, trainer.accelerator.device
    # TRL calls a rollout terminated if its last token is EOS or padding, which is often the same token.
    eos_and_pad = {*trainer.eos_token_ids, trainer.pad_token_id}
    table = [[sum(r.mask), r.truncated, r.ids[-1] in eos_and_pad] for r in rollouts]
    lengths, truncated, terminated = gather(torch.tensor(table, dtype=torch.float32, device=device)).T
    metrics = {"completions/clipped_ratio": truncated.mean().item()}
    terminated_lengths = lengths[terminated > 0] if terminated.any() else torch.zeros(1)
    for name, values in (("length", lengths), ("terminated_length", terminated_lengths)):
        metrics[f"completions/mean_{name}"] = values.mean().item()
        metrics[f"completions/min_{name}"] = values.min().item()
        metrics[f"completions/max_{name}"] = values.max().item()
    return metrics


def reward_metrics(trainer: GRPOTrainer, judged: JudgedRollouts) -> Metrics:
    """Return the mean and standard deviation of each reward over the rollouts that it applies to."""
    metrics: Metrics = {}
    for name, column_N in zip(trainer.runner.names, judged.rewards_NR.T, strict=True):
        metrics[f"rewards/{name}/mean"] = column_N.nanmean().item()
        metrics[f"rewards/{name}/std"] = nan_std(column_N[None]).item()
    metrics["reward"] = judged.totals_N.nanmean().item()
    metrics["reward_std"] = nan_std(judged.totals_N[None]).item()
    # The fraction of groups without a learning signal, because their rewards are equal. Testing for a
    # standard deviation of 0 would miss some: in float32, that of eight rewards of 0.2 is 1.6e-8.
    is_equal = reward_range(judged.totals_N, judged.groups_N) < EQUAL_REWARDS
    metrics["frac_reward_zero_std"] = is_equal.float().mean().item()
    return metrics


def reward_call_metrics(names: Sequence[str], scores: Scores) -> Metrics:
    """Return the latencies of the rewards in seconds, and the means of what rewards logged.

    All processes take part; those without calls of a reward contribute nothing.
    """
    metrics: Metrics = {}
    latencies: dict[str, list[float]] = defaultdict(list)
    logged: dict[str, list[float]] = defaultdict(list)
    for process_latencies, process_logged in gather_object([(scores.latencies, scores.metrics)]):
        for name, seconds in process_latencies.items():
            latencies[name] += seconds
        for name, values in process_logged.items():
            logged[name] += values
    for name in names:
        if latencies[name]:
            metrics[f"rewards/{name}/latency"] = sum(latencies[name]) / len(latencies[name])
            metrics[f"rewards/{name}/latency_max"] = max(latencies[name])
    return metrics | {name: sum(values) / len(values) for name, values in logged.items()}
