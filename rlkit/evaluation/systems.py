"""Several systems on the same tasks: their means, and paired tests of each one against the first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.errors import UserError
from rlkit.evaluation.result import Evaluation, check_comparable, difference_of, scores_of
from rlkit.evaluation.statistics import holm_correction


def compare_systems(
    evaluations: Sequence[Evaluation], names: Sequence[str], reward: str | None = None
) -> dict[str, Any]:
    """Compare systems, by each reward on the tasks for which all of them have valid scores.

    Args:
        evaluations: One evaluation of each system on the same tasks; the first one is the baseline.
        names: Name of each system, for messages and in the result.
        reward: Name of the reward to compare; None for all that the systems have in common, metric first.

    Returns:
        `baseline` (name of the first system), `n` (number of tasks by reward), `systems` (a dict with `name`,
        `model` and `means` by reward for each system) and `tests` (a dict for each reward and each system
        except the first, with `system`, `reward`, the entries of `rlkit.evaluation.compare`, and
        `corrected_p`, which is p after Holm's correction for the number of all tests).

    Raises:
        UserError: The evaluations cannot be compared, have no reward or no task in common, or a name repeats.
    """
    check_distinct(names)
    baseline = evaluations[0]
    for other in evaluations[1:]:
        check_comparable(baseline, other)
    means: dict[str, list[NDArray[np.float64]]] = {}  # by reward: for each system, the mean scores of tasks
    for name in _common_rewards(evaluations) if reward is None else [reward]:
        by_system = [scores_of(evaluation, name) for evaluation in evaluations]
        tasks = [task for task in by_system[0] if all(scores.get(task) for scores in by_system)]
        if tasks:
            means[name] = [np.array([np.mean(scores[task]) for task in tasks]) for scores in by_system]
    if not means:
        raise UserError(f"{', '.join(names)} have no task in common with a valid score")
    tests: list[dict[str, Any]] = []
    for i, system in enumerate(names[1:], 1):
        for name, arrays in means.items():
            difference = difference_of(arrays[0], arrays[i], is_bounded=name == baseline.metric)
            tests.append({"system": system, "reward": name, **difference})
    for test, corrected_p in zip(tests, holm_correction([test["p"] for test in tests]), strict=True):
        test["corrected_p"] = corrected_p
    systems = []
    for i, (system, evaluation) in enumerate(zip(names, evaluations, strict=True)):
        system_means = {name: float(arrays[i].mean()) for name, arrays in means.items()}
        systems.append({"name": system, "model": evaluation.model, "means": system_means})
    n = {name: len(arrays[0]) for name, arrays in means.items()}
    return {"baseline": names[0], "n": n, "systems": systems, "tests": tests}


def check_distinct(names: Sequence[str]) -> None:
    """Raise UserError if a system is named more than once."""
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{name} is given {count} times; give each system once")


def system_names(evaluations: Sequence[Evaluation], paths: Sequence[str]) -> list[str]:
    """Return a distinct name for each saved evaluation: its model, or its path if models repeat."""
    models = [evaluation.model for evaluation in evaluations]
    return models if len(set(models)) == len(models) else list(paths)


def _common_rewards(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return the metric and the other rewards that all evaluations have."""
    first = evaluations[0]
    common = [first.metric]
    for name in first.rewards:
        if name != first.metric and all(name in evaluation.rewards for evaluation in evaluations):
            common.append(name)
    return common
