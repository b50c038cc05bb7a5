"""Validation of environments and rewards without a model."""

from rlkit.check.agreement import Agreement, solver_agreement
from rlkit.check.checks import Check, check_environment

__all__ = ["Agreement", "Check", "check_environment", "solver_agreement"]
