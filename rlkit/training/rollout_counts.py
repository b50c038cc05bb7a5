"""Count the rollouts that are not trained on, warn of them, and fail a run that has trained on none."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from rlkit.errors import RewardError, first_line

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from rlkit.runs.record import RolloutRecord

logger = logging.getLogger(__name__)


class RolloutCounts(TrainerCallback):
    """Counts of the rollouts of a run, over all processes.

    An invalid rollout (a reward or the environment failed) is masked. A rollout to which no reward with a
    weight applies, because each returned None, has the advantage 0.

    Args:
        warns: Whether this process logs warnings; all processes have the same counts.
    """

    def __init__(self, warns: bool = True) -> None:
        self.warns = warns
        self.num_rollouts = 0
        self.num_invalid = 0
        self.first_reason = ""
        self._invalid = EpisodeWarnings()
        self._unrewarded = EpisodeWarnings()

    def add(self, records: Sequence[RolloutRecord], step: int) -> None:
        """Count the rollouts of one sampling step, and warn if some of them are not trained on."""
        reasons = [record["invalid"] for record in records if record["invalid"] is not None]
        num_unrewarded = sum(record["invalid"] is None and record["reward"] is None for record in records)
        self.num_rollouts += len(records)
        self.num_invalid += len(reasons)
        if reasons and not self.first_reason:
            self.first_reason = first_line(reasons[0])
        if self._invalid.is_due(bool(reasons)) and self.warns:
            logger.warning(
                "step %s: %s of %s rollouts are invalid and not trained on, the first because: %s",
                step,
                len(reasons),
                len(records),
                first_line(reasons[0]),
            )
        if self._unrewarded.is_due(num_unrewarded > 0) and self.warns:
            logger.warning(
                "step %s: no reward applies to %s of %s rollouts: each reward with a weight returned None; "
                "their advantage is 0",
                step,
                num_unrewarded,
                len(records),
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Check a run that is resumed after its last step."""
        self._check(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Check a run that has reached its last step; warn if some of its rollouts were invalid."""
        self._check(state)
        if self.num_invalid and self.warns:
            logger.warning(
                "%s of the %s rollouts of this run (%.1f%%) were invalid and not trained on, the first "
                "because: %s",
                self.num_invalid,
                self.num_rollouts,
                100 * self.num_invalid / self.num_rollouts,
                self.first_reason,
            )

    def _check(self, state: TrainerState) -> None:
        """Raise RewardError if the run has ended and all its rollouts were invalid.

        `ErrorBudget` stops only runs that are longer than its patience.
        """
        has_ended = state.global_step >= state.max_steps
        if has_ended and self.num_rollouts and self.num_invalid == self.num_rollouts:
            raise RewardError(
                f"all {self.num_rollouts} rollouts of this run are invalid, so that it has trained on none; "
                f"the first because: {self.first_reason}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the reason of the first invalid rollout."""
        return {
            "rollouts": self.num_rollouts,
            "invalid": self.num_invalid,
            "first_reason": self.first_reason,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`."""
        self.num_rollouts, self.num_invalid = state["rollouts"], state["invalid"]
        self.first_reason = state["first_reason"]


class EpisodeWarnings:
    """Decides when to warn of a condition: at the start of its episodes 1, 2, 4, 8, ….

    An episode is a number of consecutive steps in which the condition holds.
    """

    def __init__(self) -> None:
        self.num_episodes = 0
        self.is_inside = False

    def is_due(self, holds: bool) -> bool:
        """Return whether to warn in this step, given whether the condition holds in it."""
        is_start = holds and not self.is_inside
        self.is_inside = holds
        if not is_start:
            return False
        self.num_episodes += 1
        return self.num_episodes & (self.num_episodes - 1) == 0
