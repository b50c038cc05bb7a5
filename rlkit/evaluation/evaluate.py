"""Evaluation of a model: sample rollouts for the tasks of a split, score them, and average over tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, Protocol

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import track

from rlkit.environment import Environment
from rlkit.errors import UserError
from rlkit.evaluation.result import Evaluation
from rlkit.evaluation.splits import load_tasks
from rlkit.evaluation.statistics import Interval, accuracy_interval, avg_at_k, pass_at_k
from rlkit.reward import FINISHED, Row, TrainerState
from rlkit.rollouts import Rollout
from rlkit.runs.record import RolloutRecord, rollout_records
from rlkit.scoring import Scores

Task = dict[str, Any]
# generate(tasks, samples) returns a group of `samples` rollouts for each task.
Generate = Callable[[list[Task], int], Sequence[Sequence[Rollout]]]


class Scorer(Protocol):
    """Runner of rewards, such as `rlkit.scoring.RewardRunner`."""

    @property
    def names(self) -> list[str]:
        """Names of the rewards."""

    def __call__(self, rows: Sequence[Row], group_size: int, trainer_state: TrainerState, /) -> Scores:
        """Score rows, in which the `group_size` rows of one task are adjacent."""


def evaluate(
    generate: Generate,
    environment: Environment,
    runner: Scorer,
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
    trainer_state: TrainerState = FINISHED,
) -> Evaluation:
    """Sample and score `samples` rollouts for each of `n` tasks of a split.

    An invalid rollout is counted, and is in no mean. A task without a valid rollout is not in the accuracy.

    Args:
        generate: Function that samples rollouts.
        environment: Environment that the tasks and the metric come from.
        runner: Runner of the environment's rewards.
        split: Split of the tasks.
        n: Number of tasks; None for the environment's own number.
        seed: Seed of the tasks.
        fold: Task ids of a fold by split (`rlkit.evaluation.splits.read_fold`); None for all tasks.
        samples: Number of rollouts per task.
        name, model, environment_args, temperature: Facts about the evaluation, recorded in the result.
        batch_size: Number of tasks per call of `generate`.
        max_length: Maximum number of completion tokens, as a column that rewards can read.
        trainer_state: Progress of training, for rewards that change with it.

    Raises:
        UserError: If there are no tasks, or the runner does not run the environment's metric.
    """
    reward_names = runner.names
    if environment.metric not in reward_names:
        raise UserError(
            f"the metric {environment.metric!r} of {environment.id} is not among the rewards that run: "
            f"{', '.join(reward_names)}"
        )
    tasks: list[Task] = list(load_tasks(environment, split, n, seed, fold))
    records: list[RolloutRecord] = []
    # On stderr, because stdout may be JSON for another program; on the first process only.
    console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    description = "evaluating" if name == "evaluation" else f"evaluating {name}"  # "evaluation": the default
    for start in track(range(0, len(tasks), batch_size), description=description, console=console):
        rows = list(_rollout_rows(generate, tasks[start : start + batch_size], samples))
        if max_length is not None:
            rows = [row | {"max_length": max_length} for row in rows]
        records += rollout_records(environment, rows, reward_names, runner(rows, samples, trainer_state))
    frame = _to_frame(records, environment.breakdown, reward_names)
    task_scores = _scores_by_task(frame)
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
        accuracy=_task_accuracy(frame),
        pass_at=_mean_at_k(task_scores, samples, _pass_at_k),
        avg_at=_mean_at_k(task_scores, samples, avg_at_k),
        rewards={reward: float(frame[f"rewards/{reward}"].mean()) for reward in reward_names},
        length=float(frame["length"].mean()),
        truncated=float(frame["truncated"].mean()),
        invalid=int(frame["invalid"].notna().sum()),
        breakdown=_breakdown(frame, environment.breakdown),
        scores=task_scores,
        completions=records,
    )


def _rollout_rows(generate: Generate, tasks: list[Task], samples: int) -> Iterator[Task]:
    """Yield one row per rollout: the task's columns and the rollout's, which rewards read."""
    for task, group in zip(tasks, generate(tasks, samples), strict=True):
        for rollout in group:
            yield task | rollout.columns()


def _to_frame(
    records: Sequence[RolloutRecord], breakdown: Sequence[str], reward_names: Sequence[str]
) -> pd.DataFrame:
    """Return one row per rollout with the columns of the statistics; an invalid rollout's scores are NaN."""
    reward_columns = [f"rewards/{reward}" for reward in reward_names]
    columns = ("task_id", "invalid", "truncated", "length", "score", *breakdown, *reward_columns)
    frame = pd.DataFrame({name: [record.get(name) for record in records] for name in columns})
    numeric = ["score", *reward_columns]
    frame[numeric] = frame[numeric].astype(float)
    return frame


def _scores_by_task(frame: pd.DataFrame) -> dict[str, list[float]]:
    """Return the valid scores of each task's samples; a task without any keeps an empty list."""
    groups = frame.groupby("task_id", sort=False)["score"]
    return {str(task): scores.dropna().tolist() for task, scores in groups}


def _task_accuracy(frame: pd.DataFrame) -> Interval:
    """Return the mean over tasks of a task's mean score."""
    return accuracy_interval(frame.groupby("task_id")["score"].mean().dropna())


def _pass_at_k(scores: list[float], k: int) -> float:
    """Return the pass@k estimate of one task; a sample passes with the full score."""
    return pass_at_k(len(scores), sum(score >= 1.0 for score in scores), k)


def _mean_at_k(
    task_scores: Mapping[str, list[float]], samples: int, statistic: Callable[[list[float], int], float]
) -> dict[int, float]:
    """Return the mean of a statistic for k = 1, 2, 4, … up to `samples`, over tasks with k valid samples.

    A task has `samples` scores, or a multiple if the split contains it more than once.
    """
    if samples == 1:
        return {}
    means: dict[int, float] = {}
    for k in (2**i for i in range(samples.bit_length())):
        values = [statistic(scores, k) for scores in task_scores.values() if len(scores) >= k]
        means[k] = float(np.mean(values)) if values else np.nan
    return means


def _breakdown(frame: pd.DataFrame, columns: Sequence[str]) -> dict[str, dict[str, Interval]]:
    """Return the accuracy for each value of each column, sorted by value."""
    return {
        column: {str(value): _task_accuracy(group) for value, group in frame.groupby(column)}
        for column in columns
    }
