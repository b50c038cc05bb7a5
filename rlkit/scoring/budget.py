"""The error budget: how many reward failures stop a run."""

from collections.abc import Mapping
from typing import Any

from rlkit.errors import RewardError, UserError

MAX_CHARACTERS = 200  # of each column in the error message


class ErrorBudget:
    """Stops a run when more than `limit` of a batch is invalid, for `patience` consecutive batches.

    A batch within the limit resets the count.

    Args:
        limit: Maximum fraction of invalid rollouts in a batch. 1.0 never stops a run.
        patience: Number of consecutive batches above the limit after which the run stops.
    """

    def __init__(self, limit: float = 0.2, patience: int = 3):
        if not 0 <= limit <= 1:
            raise UserError(f"reward_error_budget must be between 0 and 1, not {limit}")
        if patience < 1:
            raise UserError(f"reward_error_patience must be at least 1, not {patience}")
        self.limit = limit
        self.patience = patience
        self._num_batches = 0  # consecutive batches above the limit
        self._failure = ""

    def update(
        self, error_rate: float, traceback: str | None = None, row: Mapping[str, Any] | None = None
    ) -> None:
        """Count one batch.

        Args:
            error_rate: Fraction of invalid rollouts, reduced over all ranks so that they stop together.
            traceback: First traceback of the batch, or None if no reward failed on this rank.
            row: Row that raised it, or None.

        Raises:
            RewardError: The budget is exhausted. The message contains the first traceback and its row.
        """
        if error_rate <= self.limit:
            self._num_batches, self._failure = 0, ""
            return
        self._num_batches += 1
        if not self._failure and traceback:  # only the first, so that the message stays readable
            self._failure = f"\nFirst failure:\n{traceback.rstrip()}\n{_format_row(row or {})}"
        if self._num_batches >= self.patience:
            raise RewardError(
                f"{error_rate:.0%} of the rollouts of a batch are invalid, and more than {self.limit:.0%} in "
                f"each of {self._num_batches} consecutive batches."
                f"{self._failure or ' No failure occurred on this rank.'}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the number of consecutive batches above the limit, and the first failure among them."""
        return {"batches": self._num_batches, "failure": self._failure}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`."""
        self._num_batches, self._failure = state["batches"], state["failure"]


def _format_row(row: Mapping[str, Any]) -> str:
    lines = []
    for column, value in row.items():
        text = repr(value)
        if len(text) > MAX_CHARACTERS:
            text = text[:MAX_CHARACTERS] + "..."
        lines.append(f"  {column}: {text}")
    return "\n".join(lines)
