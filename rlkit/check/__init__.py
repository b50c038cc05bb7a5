"""`rlkit check`: validate an environment with no model, or its exact solver on published items."""

from rlkit.check.agreement import Agreement, solver_agreement
from rlkit.check.checks import Check, check_environment
from rlkit.check.command import main

__all__ = ["Agreement", "Check", "check_environment", "main", "solver_agreement"]
