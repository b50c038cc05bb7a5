"""Result of an evaluation: its fields, its JSON file, and the paired comparison of two results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlkit.errors import UserError, nearest
from rlkit.evaluation.statistics import (
    Interval,
    holm_correction,
    mean_interval,
    paired_differences,
    paired_permutation_test,
)
from rlkit.files import atomic_write

OPTIONAL = ("notes", "counts")  # fields that older files do not have


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of one model on one split of one environment; `<run>/evaluation/<name>.json` has its fields.

    Scores are values of the environment's metric. Invalid rollouts, in which a reward failed, are counted and
    are in no mean.

    Attributes:
        accuracy: Mean score over the tasks.
        pass_at: pass@k by k.
        avg_at: avg@k by k.
        rewards: Mean of each reward.
        length: Mean number of tokens of a completion.
        truncated: Share of completions that are truncated.
        invalid: Number of invalid rollouts.
        breakdown: `breakdown[column][value]` is the accuracy on the tasks with this value.
        scores: Valid scores of each task's samples, by task id.
        completions: Rollouts, one dictionary each.
        notes: Sentences about how the data or the evaluation differs from what may be expected.
        counts: Numbers of queries and documents to which a rule of the evaluation applied, by name.
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
    length: float
    truncated: float
    invalid: int
    breakdown: Mapping[str, Mapping[str, Interval]]
    scores: Mapping[str, Sequence[float]]
    completions: Sequence[Mapping[str, Any]] = field(repr=False)
    notes: Sequence[str] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the evaluation as JSON, atomically; NaN is written as null."""
        text = json.dumps(without_nan(asdict(self)), indent=1, allow_nan=False, default=_numpy_to_json)
        atomic_write(Path(path), text)

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Load an evaluation that `save` has written.

        Raises:
            UserError: If the file cannot be read or is not an evaluation.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            data = {f.name: data[f.name] for f in fields(cls) if f.name in data or f.name not in OPTIONAL}
            data["accuracy"] = _to_interval(data["accuracy"])
            for key in ("pass_at", "avg_at"):
                data[key] = {int(k): _to_float(value) for k, value in data[key].items()}
            for key in ("length", "truncated"):
                data[key] = _to_float(data[key])
            data["rewards"] = {name: _to_float(value) for name, value in data["rewards"].items()}
            data["breakdown"] = {
                column: {value: _to_interval(interval) for value, interval in values.items()}
                for column, values in data["breakdown"].items()
            }
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not an evaluation: {type(error).__name__} {error}") from error
        return cls(**data)


def compare(before: Evaluation, after: Evaluation, reward: str | None = None) -> dict[str, float]:
    """Compare two evaluations on the tasks for which both have valid scores.

    Args:
        before: First evaluation.
        after: Second evaluation, on the same tasks.
        reward: Name of the reward to compare; None for the metric.

    Returns:
        The number of tasks `n`, the mean scores `before` and `after` on these tasks, the `difference`
        (after - before) with the bounds `low` and `high` of its 95% interval, and the `p` value of the
        two-sided paired permutation test.

    Raises:
        UserError: If the environments, their arguments or the metrics differ, there is no such reward, or the
            evaluations have no task in common.
    """
    pairs = _paired_scores(before, after, reward)
    a, b = np.array(list(pairs.values())).T
    return difference_of(a, b, is_bounded=reward in (None, after.metric))


def compare_by(
    before: Evaluation, after: Evaluation, column: str, reward: str | None = None
) -> dict[str, dict[str, float]]:
    """Compare two evaluations on the tasks of each value of a column, such as each kind of question.

    Args:
        before: First evaluation.
        after: Second evaluation, on the same tasks.
        column: Column of the breakdown.
        reward: Name of the reward to compare; None for the metric.

    Returns:
        The result of `compare` for each value, and `corrected_p`: p corrected for the number of values by
        Holm's method. Values without a task in common are omitted.

    Raises:
        UserError: If `compare` raises one.
    """
    results = {}
    for value, pairs in paired_scores_by(before, after, column, reward).items():
        a, b = np.array(pairs).T
        results[value] = difference_of(a, b, is_bounded=reward in (None, after.metric))
    corrected = holm_correction([result["p"] for result in results.values()])
    for result, p in zip(results.values(), corrected, strict=True):
        result["corrected_p"] = p
    return results


def paired_scores_by(
    before: Evaluation, after: Evaluation, column: str, reward: str | None = None
) -> dict[str, list[tuple[float, float]]]:
    """Return the mean scores (before, after) of each task, by the value of a column, sorted by value.

    Arguments and errors are those of `compare_by`. Tasks without a value are omitted.
    """
    values = {record["task_id"]: record.get(column) for record in after.completions}
    frame = pd.DataFrame(
        [(values.get(task), scores) for task, scores in _paired_scores(before, after, reward).items()],
        columns=["value", "scores"],
    )
    return {str(value): list(group["scores"]) for value, group in frame.groupby("value")}


def _paired_scores(
    before: Evaluation, after: Evaluation, reward: str | None
) -> dict[str, tuple[float, float]]:
    """Return the mean scores of each task for which both evaluations have valid ones."""
    check_comparable(before, after)
    first, second = (scores_of(evaluation, reward) for evaluation in (before, after))
    pairs = {
        task: (float(np.mean(scores)), float(np.mean(second[task])))
        for task, scores in first.items()
        if scores and second.get(task)
    }
    if not pairs:
        raise UserError(
            f"{before.name} and {after.name} cannot be compared: they have no task in common with a valid "
            "score"
        )
    return pairs


def check_comparable(before: Evaluation, after: Evaluation) -> None:
    """Raise UserError if two evaluations differ in their environment, its arguments or the metric."""
    for key in ("environment", "environment_args", "metric"):
        a, b = getattr(before, key), getattr(after, key)
        if a != b:
            raise UserError(
                f"{before.name} and {after.name} cannot be compared: they differ in {key} ({a} and {b})"
            )


def difference_of(a: NDArray[np.float64], b: NDArray[np.float64], is_bounded: bool) -> dict[str, float]:
    """Return the comparison of two systems by their scores on the same tasks; see `compare`.

    Args:
        a: Mean scores of the first system, shape (tasks,).
        b: Mean scores of the second system, shape (tasks,).
        is_bounded: Whether scores are in [0, 1], as those of the metric are.
    """
    max_difference = 1.0 if is_bounded else np.inf
    interval = mean_interval(paired_differences(a, b), bounds=(-max_difference, max_difference))
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
    """Return the valid scores of each task by one reward, or by the metric if `reward` is None.

    Raises:
        UserError: If there is no such reward.
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
    """Replace NaN and infinities by None, in nested dicts and lists, because JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _numpy_to_json(value: object) -> object:
    """Convert the numpy arrays and scalars that columns of a task may hold, as `default` of `json.dumps`."""
    if isinstance(value, np.ndarray | np.generic):
        return without_nan(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _to_float(value: float | None) -> float:
    """Return the number that `without_nan` was given, with NaN for None."""
    return np.nan if value is None else value


def _to_interval(data: Mapping[str, Any]) -> Interval:
    """Return the interval that was saved as `without_nan(asdict(interval))`."""
    return Interval(_to_float(data["mean"]), _to_float(data["low"]), _to_float(data["high"]), data["n"])
