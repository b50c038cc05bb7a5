"""Evaluate a model: sample answers to the tasks of a split, score them, and average over tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import track

from rlkit.environment import Environment
from rlkit.errors import UserError
from rlkit.evaluation.result import Evaluation
from rlkit.evaluation.splits import load_tasks
from rlkit.evaluation.statistics import Interval, accuracy_interval, avg_at_k, pass_at_k
from rlkit.rollouts import Rollout
from rlkit.runs.record import RolloutRecord, rollout_record
from rlkit.scoring import RewardRunner

Task = dict[str, Any]
# generate(tasks, samples) rolls out B tasks `samples` times each.
Generate = Callable[[list[Task], int], Sequence[Sequence[Rollout]]]


def evaluate(
    generate: Generate,
    environment: Environment,
    runner: RewardRunner,
    *,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    fold: Mapping[str, Set[str]] | None = None,
    samples: int = 1,
    name: str,
    model: str,
    environment_args: Mapping[str, Any],
    temperature: float,
    batch_size: int = 256,
    max_length: int | None = None,
) -> Evaluation:
    """Answer `n` tasks of a split with `samples` completions each, `batch_size` tasks at a time.

    `fold` has the task ids of a fold by split (`rlkit.evaluation.splits.read_fold`); None: all tasks.

    `name`, `model`, `environment_args` and `temperature` are only recorded. `max_length`, the limit of a
    completion in tokens, becomes a column that rewards can read. An invalid rollout is counted and left out
    of every mean; a task with no valid rollout is left out of the accuracy.

    Raises:
        UserError: no task, or the runner does not know the environment's metric.
    """
    rewards = runner.names
    if environment.metric not in rewards:
        raise UserError(f"{environment.id} reports the reward {environment.metric!r}, which is not run")
    tasks: list[Task] = list(load_tasks(environment, split, n, seed, fold))
    records: list[RolloutRecord] = []
    # On stderr, as what is printed may be JSON for a program, and by one process of several.
    console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    description = "evaluating" if name == "evaluation" else f"evaluating {name}"  # the name by default
    for start in track(range(0, len(tasks), batch_size), description=description, console=console):
        rows = list(answer(generate, tasks[start : start + batch_size], samples))
        if max_length is not None:
            rows = [row | {"max_length": max_length} for row in rows]
        scores = runner(rows, samples)
        for row, values, invalid in zip(rows, scores.values.tolist(), scores.invalid, strict=True):
            named = dict(zip(rewards, values, strict=True))
            records.append(rollout_record(environment, row, named, invalid=invalid))
    frame = rollout_frame(records, environment.breakdown, rewards)
    task_scores = scores_by_task(frame)
    return Evaluation(
        name=name,
        model=model,
        environment=environment.id,
        environment_args=environment_args,
        split=split,
        seed=seed,
        temperature=temperature,
        samples=samples,
        metric=environment.metric,
        accuracy=task_accuracy(frame),
        pass_at=mean_at_k(task_scores, samples, lambda s, k: pass_at_k(len(s), sum(x >= 1.0 for x in s), k)),
        avg_at=mean_at_k(task_scores, samples, avg_at_k),
        rewards={reward: float(frame[f"rewards/{reward}"].mean()) for reward in rewards},
        length=float(frame["length"].mean()),
        truncated=float(frame["truncated"].mean()),
        invalid=int(frame["invalid"].notna().sum()),
        breakdown=breakdown(frame, environment.breakdown),
        scores=task_scores,
        completions=records,
    )


def answer(generate: Generate, tasks: list[Task], samples: int) -> Iterator[Task]:
    """Yield one row per rollout: the task's columns and what rewards may read of it."""
    for task, group in zip(tasks, generate(tasks, samples), strict=True):
        for rollout in group:
            yield task | rollout.columns()


def rollout_frame(
    records: Sequence[RolloutRecord], breakdown: Sequence[str], rewards: Sequence[str]
) -> pd.DataFrame:
    """One line per rollout with what the statistics need; rewards and score of an invalid one are NaN."""
    columns = [f"rewards/{reward}" for reward in rewards]
    wanted = ("task_id", "invalid", "truncated", "length", "score", *breakdown, *columns)
    frame = pd.DataFrame({name: [record.get(name) for record in records] for name in wanted})
    numbers = ["score", *columns]
    frame[numbers] = frame[numbers].astype(float)
    return frame


def scores_by_task(frame: pd.DataFrame) -> dict[str, list[float]]:
    """Valid scores of each task's samples; a task that has none keeps an empty list."""
    groups = frame.groupby("task_id", sort=False)["score"]
    return {str(task): scores.dropna().tolist() for task, scores in groups}


def task_accuracy(frame: pd.DataFrame) -> Interval:
    """Mean over tasks of the mean score of a task."""
    return accuracy_interval(frame.groupby("task_id")["score"].mean().dropna())


def mean_at_k(
    task_scores: Mapping[str, list[float]], samples: int, statistic: Callable[[list[float], int], float]
) -> dict[int, float]:
    """Mean of a statistic over the tasks with k valid samples or more, for k = 1, 2, 4, … up to `samples`.

    A task has `samples` scores, or a multiple of that where the split holds it more than once.
    """
    if samples == 1:
        return {}
    at: dict[int, float] = {}
    for k in (2**i for i in range(samples.bit_length())):
        enough = [statistic(scores, k) for scores in task_scores.values() if len(scores) >= k]
        at[k] = float(np.mean(enough)) if enough else np.nan
    return at


def breakdown(frame: pd.DataFrame, columns: Sequence[str]) -> dict[str, dict[str, Interval]]:
    """Accuracy for each value of each column, in the values' own order."""
    return {
        column: {str(value): task_accuracy(part) for value, part in frame.groupby(column)}
        for column in columns
    }
