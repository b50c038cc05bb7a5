"""Validation of environments and rewards without a model."""

from rlkit.check.agreement import Agreement, solver_agreement
from rlkit.check.checks import Check, check_environment
from rlkit.check.labels import LabelAgreement, label_agreement

__all__ = [
    "Agreement",
    "Check",
    "LabelAgreement",
    "check_environment",
    "label_agreement",
    "solver_agreement",
]
