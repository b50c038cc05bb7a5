"""How often a simulated search is noisy, over the training (ZeroSearch, arXiv 2505.04588).

A policy that only ever finds what it needs learns to trust everything; so the probability of noise rises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlkit.errors import UserError, nearest

SCHEDULES = ("exponential", "linear", "constant", "performance")


class Curriculum:
    """The probability of noise of each step.

    Args:
        schedule: "exponential" and "linear" go from `start` to `end` over the steps; "constant" stays at
            `start`; "performance" rises by `rise` whenever the mean score of the last `window` samplings has
            reached `target`, and never falls.
        start, end: probabilities, in [0, 1]. The last step of a training is one before `end` is reached.
        base: of the exponential: with 4, a third of the way is gone after half of the steps; 1 is linear.
        target: a mean of the environment's metric.
        rise: of the probability.
        window: samplings; their scores are forgotten at each rise.

    Attributes:
        value: the probability now.

    Raises:
        UserError: arguments that do not fit.
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
            raise UserError(f"noise: there is no schedule {schedule!r}{nearest(schedule, SCHEDULES)}")
        if not (0 <= start <= 1 and 0 <= end <= 1):
            raise UserError(f"noise: start and end are probabilities, not {start} and {end}")
        if base <= 0:
            raise UserError(f"noise: base is {base}, it must be positive")
        if schedule == "performance" and (start > end or rise <= 0 or window < 1):
            raise UserError("noise: a performance schedule rises: start <= end, rise > 0, window >= 1")
        self.schedule, self.start, self.end, self.base = schedule, start, end, base
        self.target, self.rise, self.window = target, rise, window
        self.value = start
        self.scores: list[float] = []

    def advance(self, step: int, steps: int, score: float | None) -> None:
        """Move on to `step` of `steps`; `score` is the mean metric of the sampling that is over."""
        if self.schedule == "performance":
            self._observe(score)
        elif self.schedule != "constant":
            self.value = self.start + self._fraction(min(step / steps, 1.0)) * (self.end - self.start)

    def _fraction(self, progress: float) -> float:
        if self.schedule == "linear" or abs(self.base - 1) < 1e-9:  # 0/0, whose limit is linear
            return progress
        return (self.base**progress - 1) / (self.base - 1)

    def _observe(self, score: float | None) -> None:
        if score is None:
            return
        self.scores = [*self.scores, score][-self.window :]
        if len(self.scores) == self.window and sum(self.scores) >= self.target * self.window:
            self.value = min(self.value + self.rise, self.end)
            self.scores = []

    def state_dict(self) -> dict[str, Any]:
        """The probability now and the scores since the last rise."""
        return {"value": self.value, "scores": list(self.scores)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.value, self.scores = state["value"], list(state["scores"])
