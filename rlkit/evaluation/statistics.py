"""Statistics of an evaluation. The unit is the task, because samples of one task are not independent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """Mean over `n` tasks with its 95% confidence interval; values for which `n` is too small are NaN."""

    mean: float
    low: float
    high: float
    n: int


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate the probability that at least one of `k` samples is correct, if `c` of `n` samples are.

    This is the unbiased estimator 1 - C(n-c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374, equation 1).

    Raises:
        ValueError: If not 0 <= c <= n or not 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    # As a product, because the binomial coefficients themselves would overflow.
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def avg_at_k(scores: Sequence[float], k: int) -> float:
    """Return the mean of the first `k` scores of a task, which is what `k` samples would have reported.

    Its expectation is the same for every `k`; only the noise shrinks.

    Raises:
        ValueError: If not 1 <= k <= len(scores).
    """
    if not 1 <= k <= len(scores):
        raise ValueError(f"avg@k needs 1 <= k <= {len(scores)} scores, got k={k}")
    return float(np.mean(scores[:k]))


def accuracy_interval(task_means: ArrayLike) -> Interval:
    """Return the mean and 95% interval of per-task accuracies in [0, 1], shape (tasks,).

    The interval is Wilson's score interval if every accuracy is 0 or 1, as with greedy decoding and a binary
    metric. Otherwise it is Student's t interval over tasks, clipped to [0, 1].
    """
    x = np.asarray(task_means, dtype=float)
    if len(x) and np.isin(x, (0.0, 1.0)).all():
        wilson = stats.binomtest(int(x.sum()), len(x)).proportion_ci(CONFIDENCE, method="wilson")
        return Interval(float(x.mean()), float(wilson.low), float(wilson.high), len(x))
    return mean_interval(x, bounds=(0.0, 1.0))


def mean_interval(values: ArrayLike, bounds: tuple[float, float]) -> Interval:
    """Return the mean and 95% Student's t interval of independent values in `bounds`, shape (n,)."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return Interval(float(x.mean()) if len(x) else np.nan, np.nan, np.nan, len(x))
    half_width = stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * stats.sem(x)
    low, high = np.clip((x.mean() - half_width, x.mean() + half_width), *bounds)
    return Interval(float(x.mean()), float(low), float(high), len(x))


def paired_permutation_test(a: ArrayLike, b: ArrayLike, resamples: int = 10_000, seed: int = 0) -> float:
    """Return the two-sided p value for the hypothesis that paired per-task scores have the same mean.

    The test flips the signs of the differences. It enumerates all sign flips of the non-zero differences if
    there are at most `resamples`. Otherwise it draws `resamples` random ones and returns
    p = (count + 1) / (resamples + 1), which is never 0.

    Args:
        a: Scores of the first system, shape (tasks,).
        b: Scores of the second system on the same tasks, shape (tasks,).
        resamples: Maximum number of sign flips.
        seed: Seed of the random sign flips.

    Raises:
        ValueError: If the shapes differ, there are no tasks, or a score is not finite.
    """
    differences = paired_differences(a, b)
    differences = differences[differences != 0]  # flipping a zero changes nothing but doubles the flips
    if len(differences) < 2:
        return 1.0
    result = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=resamples,
        batch=1000,
        rng=seed,
    )
    return float(result.pvalue)


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for the number of tests by Holm's step-down method (Holm 1979).

    If all tests whose corrected p is at most alpha are rejected, the probability of any false rejection is at
    most alpha, whether or not the tests are independent.

    Args:
        p_values: p values of the tests; the result has the same order.

    Raises:
        ValueError: If a p value is not in [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p values must be in [0, 1], got {list(p_values)}")
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for i, test in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[test]))
        corrected[test] = largest
    return corrected


def paired_differences(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Return b - a, shape (tasks,).

    Raises:
        ValueError: If the shapes differ, there are no tasks, or a score is not finite.
    """
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise ValueError(
            f"paired scores must be two non-empty vectors of the same length, got {x.shape} and {y.shape}"
        )
    if not np.isfinite(x).all() or not np.isfinite(y).all():
        raise ValueError("paired scores must be finite: remove invalid tasks first")
    return y - x


def kendall_tau(a: ArrayLike, b: ArrayLike) -> tuple[float, float]:
    """Return Kendall's tau-b of the scores of the same systems on two sets of tasks, and its p value.

    Raises:
        ValueError: If the shapes differ, there are fewer than two systems, or a score is not finite.
    """
    differences = paired_differences(a, b)  # checks shapes and values
    if len(differences) < 2:
        raise ValueError(f"Kendall's tau needs at least two systems, got {len(differences)}")
    result = stats.kendalltau(a, b)
    return float(result.statistic), float(result.pvalue)
