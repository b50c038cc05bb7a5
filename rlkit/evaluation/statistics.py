"""Statistics of an evaluation. The task is the unit: samples of one task are not independent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over `n` tasks and its 95 % confidence interval. NaN where `n` is too small to say."""

    mean: float
    low: float
    high: float
    n: int


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate the chance that one of `k` samples is right, from `n` samples of which `c` are right.

    The unbiased estimator 1 - C(n-c, k) / C(n, k) of Chen et al. 2021 (arXiv:2107.03374, equation 1).

    Raises:
        ValueError: not 0 <= c <= n or not 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    # A product, because the binomial coefficients themselves overflow.
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def avg_at_k(scores: Sequence[float], k: int) -> float:
    """Mean of the first `k` scores of a task: what a run of `k` samples would have reported.

    Its expectation is the same for every `k`; only the noise shrinks.

    Raises:
        ValueError: not 1 <= k <= len(scores).
    """
    if not 1 <= k <= len(scores):
        raise ValueError(f"avg@k needs 1 <= k <= {len(scores)} scores, got k={k}")
    return float(np.mean(scores[:k]))


def accuracy_interval(task_means: ArrayLike) -> Interval:
    """Mean and 95 % interval of per-task accuracies in [0, 1], shape (tasks,).

    Wilson's score interval where every task is all right or all wrong (greedy decoding with a binary metric),
    Student's t over tasks otherwise, cut to [0, 1].
    """
    x = np.asarray(task_means, dtype=float)
    if len(x) and np.isin(x, (0.0, 1.0)).all():
        wilson = stats.binomtest(int(x.sum()), len(x)).proportion_ci(CONFIDENCE, method="wilson")
        return Interval(float(x.mean()), float(wilson.low), float(wilson.high), len(x))
    return mean_interval(x, bounds=(0.0, 1.0))


def mean_interval(values: ArrayLike, bounds: tuple[float, float]) -> Interval:
    """Mean and 95 % Student's t interval of independent values in `bounds`, shape (n,)."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return Interval(float(x.mean()) if len(x) else np.nan, np.nan, np.nan, len(x))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * stats.sem(x)
    low, high = np.clip((x.mean() - half, x.mean() + half), *bounds)
    return Interval(float(x.mean()), float(low), float(high), len(x))


def paired_permutation_test(a: ArrayLike, b: ArrayLike, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p value that the per-task scores `a` and `b`, both (tasks,), have the same mean.

    Flips the signs of the differences: all flips where the non-zero differences have no more than `resamples`
    of them, else `resamples` random ones with p = (count + 1) / (resamples + 1), so that p is never 0.

    Raises:
        ValueError: different shapes, no task, or a score that is not finite.
    """
    differences = paired_differences(a, b)
    differences = differences[differences != 0]  # flipping a zero changes nothing, and costs a factor of two
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


def paired_differences(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Return b - a, (tasks,). Raises ValueError: different shapes, no task, or a score that is not finite."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise ValueError(f"paired scores are two vectors of the same length, got {x.shape} and {y.shape}")
    if not np.isfinite(x).all() or not np.isfinite(y).all():
        raise ValueError("a paired score is not finite: leave invalid tasks out first")
    return y - x


def kendall_tau(a: ArrayLike, b: ArrayLike) -> tuple[float, float]:
    """Kendall's tau-b of the scores of the same systems on two sets of tasks, and its two-sided p value.

    Raises:
        ValueError: different shapes, fewer than two systems, or a score that is not finite.
    """
    differences = paired_differences(a, b)
    if len(differences) < 2:
        raise ValueError("Kendall's tau needs at least two systems")
    found = stats.kendalltau(a, b)
    return float(found.statistic), float(found.pvalue)
