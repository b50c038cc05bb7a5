"""Where the seconds of a step go: `time/…` in the metrics, of this rank.

On a GPU work is queued and the clock shows where it was waited for; sampling and logging wait in every step.
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

# In the order of a step. "scores" are the log-probabilities of the old policy and the reference.
PARTS = ("sync", "generation", "rewards", "scores", "forward_backward", "optimizer")


class StepClock(TrainerCallback):
    """Adds up the seconds of an optimizer step's parts; it is one of the trainer's callbacks.

    Args:
        metrics: the trainer's lists of values since the last log, by name.
    """

    def __init__(self, metrics: dict[str, list[float]]):
        self.metrics = metrics
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = 0.0  # seconds that parts within the running one have taken
        self._started = 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count what is done inside as a part of the step, without what an inner part counts."""
        started, outer, self._inner = time.perf_counter(), self._inner, 0.0
        try:
            yield
        finally:
            taken = time.perf_counter() - started
            self.seconds[part] += taken - self._inner
            self._inner = outer + taken

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start timing the optimizer, the last part."""
        self._started = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Stop timing it, and give the trainer the step's seconds to log."""
        self.seconds["optimizer"] += time.perf_counter() - self._started
        for part in PARTS:
            if part in self.seconds:
                self.metrics[f"time/{part}"].append(self.seconds[part])
        self.seconds.clear()
