"""Time the parts of an optimizer step, logged as `time/…`.

The seconds are those of the main process. GPU work is asynchronous, so a part is charged for the work that it
waits for, which an earlier part may have queued. Sampling and logging synchronize in every step.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

# In the order of a step. "scores" is the sampling step without generation and rewards: mainly the
# log-probabilities of the old policy and of the reference model.
PARTS = ("sync", "generation", "rewards", "scores", "forward_backward", "optimizer")


class StepClock(TrainerCallback):
    """Trainer callback that measures the seconds of each part of an optimizer step.

    Call it to time a part: ``with clock("generation"): …``. Parts can be nested; the seconds of an inner part
    are not counted in the outer one.

    Args:
        metrics: Values since the last log by name; the trainer logs their means.
    """

    def __init__(self, metrics: dict[str, list[float]]):
        self.metrics = metrics
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner_seconds = 0.0  # seconds of the parts nested in the current one
        self._optimizer_start = 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time the block as a part of the step, without the parts nested in it."""
        start, outer_inner_seconds = time.perf_counter(), self._inner_seconds
        self._inner_seconds = 0.0
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[part] += elapsed - self._inner_seconds
            # For the enclosing part, this one is an inner part as a whole.
            self._inner_seconds = outer_inner_seconds + elapsed

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start timing the optimizer, the last part of a step."""
        self._optimizer_start = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Stop timing the optimizer, and add the seconds of the step to the trainer's metrics."""
        self.seconds["optimizer"] += time.perf_counter() - self._optimizer_start
        for part in PARTS:
            if part in self.seconds:
                self.metrics[f"time/{part}"].append(self.seconds[part])
        self.seconds.clear()
