"""The result of an evaluation: what it holds, its JSON file, and the paired comparison of two of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.errors import UserError, nearest
from rlkit.evaluation.statistics import Interval, mean_interval, paired_differences, paired_permutation_test
from rlkit.files import atomic_write


@dataclass(frozen=True)
class Evaluation:
    """One model on one split of one environment. `<run>/evaluation/<name>.json` has the same fields.

    Scores are values of the environment's metric. Invalid rollouts (a reward failed) are counted, and are in
    no mean. `breakdown[column][value]` is the accuracy on the tasks with that value; `scores[task_id]` holds
    the valid scores of a task's samples; `completions` are the rollouts, one dict each.
    """

    name: str
    model: str
    environment: str
    environment_args: Mapping[str, Any]
    split: str
    seed: int
    temperature: float
    samples: int
    metric: str
    accuracy: Interval
    pass_at: Mapping[int, float]
    avg_at: Mapping[int, float]
    rewards: Mapping[str, float]
    length: float  # mean tokens of a completion
    truncated: float  # share of completions
    invalid: int  # rollouts
    breakdown: Mapping[str, Mapping[str, Interval]]
    scores: Mapping[str, Sequence[float]]
    completions: Sequence[Mapping[str, Any]] = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Write JSON in one step: a reader sees the whole file or the old one. NaN is written as null."""
        text = json.dumps(without_nan(asdict(self)), indent=1, allow_nan=False, default=as_plain)
        atomic_write(Path(path), text)

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            UserError: the file is not an evaluation.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            data = {f.name: data[f.name] for f in fields(cls)}
            data["accuracy"] = as_interval(data["accuracy"])
            for key in ("pass_at", "avg_at"):
                data[key] = {int(k): as_number(value) for k, value in data[key].items()}
            for key in ("length", "truncated"):
                data[key] = as_number(data[key])
            data["rewards"] = {name: as_number(value) for name, value in data["rewards"].items()}
            data["breakdown"] = {
                column: {value: as_interval(interval) for value, interval in values.items()}
                for column, values in data["breakdown"].items()
            }
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not an evaluation: {type(error).__name__} {error}") from error
        return cls(**data)


def compare(before: Evaluation, after: Evaluation, reward: str | None = None) -> dict[str, float]:
    """Compare two evaluations on the tasks that both have valid scores for.

    Args:
        before, after: of the same tasks.
        reward: which reward; None: the metric.

    Returns `n` tasks, `before` and `after` (mean scores on these tasks), `difference` (after - before) with
    its 95 % interval `low` to `high`, and `p` of the two-sided paired permutation test.

    Raises:
        UserError: another environment, other arguments, another metric, no such reward, or no task in common.
    """
    for key in ("environment", "environment_args", "metric"):
        a, b = getattr(before, key), getattr(after, key)
        if a != b:
            raise UserError(f"{before.name} and {after.name} differ in {key}: {a} and {b}")
    first, second = (scores_of(evaluation, reward) for evaluation in (before, after))
    common = [task for task, scores in first.items() if scores and second.get(task)]
    if not common:
        raise UserError(f"{before.name} and {after.name} have no task in common")
    a = np.array([np.mean(first[task]) for task in common])
    b = np.array([np.mean(second[task]) for task in common])
    most = 1.0 if reward in (None, after.metric) else np.inf  # the metric is in [0, 1]
    interval = mean_interval(paired_differences(a, b), bounds=(-most, most))
    return {
        "n": interval.n,
        "before": float(a.mean()),
        "after": float(b.mean()),
        "difference": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "p": paired_permutation_test(a, b),
    }


def scores_of(evaluation: Evaluation, reward: str | None = None) -> Mapping[str, Sequence[float]]:
    """The valid scores of each task by one reward, None for the metric.

    Raises:
        UserError: no such reward.
    """
    if reward in (None, evaluation.metric):
        return evaluation.scores
    scores: dict[str, list[float]] = {}
    for completion in evaluation.completions:
        if f"rewards/{reward}" not in completion:
            raise UserError(
                f"{evaluation.name} has no reward {reward!r}{nearest(str(reward), evaluation.rewards)}"
            )
        value = completion[f"rewards/{reward}"]
        if value is not None and np.isfinite(value):
            scores.setdefault(completion["task_id"], []).append(value)
    return scores


def without_nan(value: object) -> Any:
    """Replace NaN and infinities by None, which JSON can hold, in nested dicts and lists."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def as_plain(value: object) -> object:
    """Turn numpy's arrays and scalars, which a task's columns may hold, into JSON's own types."""
    if isinstance(value, np.ndarray | np.generic):
        return without_nan(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def as_number(value: float | None) -> float:
    """Undo `without_nan`."""
    return np.nan if value is None else value


def as_interval(data: Mapping[str, Any]) -> Interval:
    """Undo `without_nan(asdict(interval))`."""
    return Interval(as_number(data["mean"]), as_number(data["low"]), as_number(data["high"]), data["n"])
