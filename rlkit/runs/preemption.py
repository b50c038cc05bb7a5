"""A run that is told to leave its machine ends after its step, with a checkpoint.

Slurm and other schedulers send SIGTERM or a signal of one's choice some time before they kill: SIGTERM,
SIGUSR1 and SIGUSR2 are taken alike. The grace time must be longer than a step, and writing a checkpoint.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from accelerate.utils import gather_object
from transformers import TrainerCallback

from rlkit.errors import Preempted

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class PreemptionCallback(TrainerCallback):
    """Has a checkpoint written at the end of the step in which a signal came, and training stopped."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.training = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals: in training they are kept until the step is over, else `Preempted` is raised."""
        if threading.current_thread() is not threading.main_thread():  # which alone may take them
            yield
            return
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if not self.training:
            raise Preempted(f"stopped by {self.received} outside training")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """From now on steps are finished."""
        self.training = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Ask for a checkpoint and the end if a process was told to go; all ask alike."""
        received = [name for name in gather_object([self.received]) if name is not None]
        if received:
            self.received = received[0]
            # Logged here and not by the signal handler, which may have interrupted another write to stderr:
            # a second one inside it is a RuntimeError.
            if state.is_world_process_zero:
                step = state.global_step
                logger.warning("%s received: writing a checkpoint after step %s", self.received, step)
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Do not write the checkpoint of a preempted run twice.

        transformers also ends the epoch of a run that is stopped. With `save_strategy: epoch` it would write
        the last checkpoint again, and the grace period may be over before that is complete.
        """
        if self.received is not None:
            control.should_save = False

    def trained(self, state: TrainerState) -> None:
        """Training has ended: raise `Preempted` if it was cut short. Later signals raise it at once."""
        self.training = False
        if self.received is not None and state.global_step < state.max_steps:
            raise Preempted(f"stopped by {self.received} after step {state.global_step}, with a checkpoint")
