"""Evaluation on held-out tasks: accuracy, pass@k, breakdowns, and the paired comparison of two models."""

from rlkit.evaluation.evaluate import evaluate
from rlkit.evaluation.result import Evaluation, compare, compare_by
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
    "compare_by",
    "evaluate",
    "paired_permutation_test",
    "pass_at_k",
]
