"""When failing rewards should stop a run."""

from collections.abc import Mapping
from typing import Any

from rlkit.errors import RewardError, UserError

ROW_CHARACTERS = 200  # of each column shown in the message


class ErrorBudget:
    """Stops a run whose rewards fail on more than `limit` of a batch, `patience` batches running.

    A batch within the limit forgives the ones before it. A limit of 1.0 never stops a run.
    """

    def __init__(self, limit: float = 0.2, patience: int = 3):
        if not 0 <= limit <= 1 or patience < 1:
            raise UserError(
                f"reward errors: limit {limit} must be within 0 and 1, patience {patience} at least 1"
            )
        self.limit = limit
        self.patience = patience
        self._batches = 0
        self._failure = ""

    def update(
        self, error_rate: float, traceback: str | None = None, row: Mapping[str, Any] | None = None
    ) -> None:
        """Count one batch.

        Args:
            error_rate: share of invalid rollouts, gathered over ranks so that all ranks stop together.
            traceback: the batch's first one, and
            row: the row it came from; None where this rank saw no failure.

        Raises:
            RewardError: the budget is spent. The message has the first traceback and its row.
        """
        if error_rate <= self.limit:
            self._batches, self._failure = 0, ""
            return
        self._batches += 1
        if not self._failure and traceback:
            self._failure = f"\nThe first failure:\n{traceback.rstrip()}\n{_shorten(row or {})}"
        if self._batches >= self.patience:
            raise RewardError(
                f"rewards failed on {error_rate:.0%} of a batch, and on more than {self.limit:.0%} of "
                f"{self._batches} batches running.{self._failure or ' None of it on this rank.'}"
            )

    def state_dict(self) -> dict[str, Any]:
        """The batches above the limit so far, and the first failure among them."""
        return {"batches": self._batches, "failure": self._failure}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from there."""
        self._batches, self._failure = state["batches"], state["failure"]


def _shorten(row: Mapping[str, Any]) -> str:
    lines = []
    for column, value in row.items():
        text = repr(value)
        lines.append(f"  {column}: {text if len(text) <= ROW_CHARACTERS else text[:ROW_CHARACTERS] + '...'}")
    return "\n".join(lines)
