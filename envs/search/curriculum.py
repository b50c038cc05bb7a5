"""Noise schedule of a simulated search engine over training (ZeroSearch, arXiv 2505.04588).

A policy whose searches are always helpful learns to trust every document, so the probability of noise rises
during training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlkit.errors import UserError, nearest

SCHEDULES = ("exponential", "linear", "constant", "performance")


class Curriculum:
    """Schedule of the probability that a simulated search returns noise.

    Args:
        schedule: "exponential" and "linear" go from `start`, which they leave in the first sampling step, to
            `end` in the last one. "constant" stays at `start`. "performance" rises by `rise` whenever the
            mean score of the last `window` sampling steps reaches `target`, and never falls.
        start, end: Probabilities in [0, 1].
        base: Base of the exponential. With 4, the schedule has covered a third of the way to `end` after half
            of the steps; 1 is linear.
        target: Mean of the environment's metric that triggers a rise.
        rise: Increase of the probability at each rise.
        window: Number of sampling steps to average. Each rise clears the window.

    Attributes:
        value: Current probability of noise.

    Raises:
        UserError: An argument is invalid.
    """

    def __init__(
        self,
        schedule: str = "exponential",
        *,
        start: float = 0.0,
        end: float = 0.5,
        base: float = 4.0,
        target: float = 0.5,
        rise: float = 0.05,
        window: int = 5,
    ):
        if schedule not in SCHEDULES:
            raise UserError(f"noise: unknown schedule {schedule!r}{nearest(schedule, SCHEDULES)}")
        if not (0 <= start <= 1 and 0 <= end <= 1):
            raise UserError(f"noise: start and end must be probabilities in [0, 1], not {start} and {end}")
        if base <= 0:
            raise UserError(f"noise: base must be positive, not {base}")
        if schedule == "performance" and (start > end or rise <= 0 or window < 1):
            raise UserError(
                "noise: the performance schedule requires start <= end, rise > 0 and window >= 1, got"
                f" start {start}, end {end}, rise {rise}, window {window}"
            )
        self.schedule, self.start, self.end, self.base = schedule, start, end, base
        self.target, self.rise, self.window = target, rise, window
        self.value = start
        self.scores: list[float] = []

    def advance(self, step: int, steps: int, score: float | None) -> None:
        """Set the probability for sampling step `step` of `steps`.

        Args:
            step: Number of the next sampling step, from 1.
            steps: Total number of sampling steps.
            score: Mean metric of the sampling step that has just ended; None if it has no score.
        """
        if self.schedule == "performance":
            self._record(score)
        elif self.schedule != "constant":
            difference = self.end - self.start
            # Without rounding errors at the end.
            self.value = self.end if step >= steps else self.start + self._fraction(step / steps) * difference

    def _fraction(self, progress: float) -> float:
        # The formula is 0/0 at base 1; its limit is linear.
        if self.schedule == "linear" or abs(self.base - 1) < 1e-9:
            return progress
        return (self.base**progress - 1) / (self.base - 1)

    def _record(self, score: float | None) -> None:
        if score is None:
            return
        self.scores = [*self.scores, score][-self.window :]
        if len(self.scores) == self.window and sum(self.scores) >= self.target * self.window:
            self.value = min(self.value + self.rise, self.end)
            self.scores = []

    def state_dict(self) -> dict[str, Any]:
        """Return the current probability and the scores since the last rise."""
        return {"value": self.value, "scores": list(self.scores)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the probability and the scores."""
        self.value, self.scores = state["value"], list(state["scores"])
