"""Evaluation on held-out tasks: accuracy, pass@k, breakdowns, and the paired comparison of two models."""

from rlkit.evaluation.evaluate import evaluate
from rlkit.evaluation.result import Evaluation, compare
from rlkit.evaluation.statistics import (
    Interval,
    accuracy_interval,
    avg_at_k,
    paired_permutation_test,
    pass_at_k,
)

__all__ = [
    "Evaluation",
    "Interval",
    "accuracy_interval",
    "avg_at_k",
    "compare",
    "evaluate",
    "paired_permutation_test",
    "pass_at_k",
]
