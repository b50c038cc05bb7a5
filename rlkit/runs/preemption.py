"""Preemption: on a signal, write a checkpoint at the end of the current step and stop.

Slurm and other schedulers send SIGTERM or a configurable signal some time before they kill a job. SIGTERM,
SIGUSR1 and SIGUSR2 have the same effect. The grace period must be longer than one step plus the time to write
a checkpoint.
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
    """Write a checkpoint at the end of the step in which a signal is received, and stop training.

    Attributes:
        received: Name of the signal received, or None.
        is_training: Whether signals wait for the end of the step instead of raising `Preempted` at once.
        has_ended: Whether the run has ended, so that signals are ignored.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.is_training = False
        self.has_ended = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals within the block and restore the previous handlers afterwards.

        A signal during training takes effect at the end of the step; at any other time it raises `Preempted`.
        """
        if threading.current_thread() is not threading.main_thread():  # only it can set signal handlers
            yield
            return
        previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.has_ended:
            return
        self.received = signal.Signals(number).name
        if not self.is_training:
            raise Preempted(f"stopped by {self.received} outside training")

    def _is_any_preempted(self) -> bool:
        """Return whether any rank has received a signal; all ranks then have the name of one."""
        received = [name for name in gather_object([self.received]) if name is not None]
        self.received = received[0] if received else None
        return self.received is not None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """From now on, let the current step finish before stopping."""
        self.is_training = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Save a checkpoint and stop if any rank received a signal. All ranks decide the same."""
        if self._is_any_preempted():
            # Not logged in the signal handler: it may have interrupted another write to stderr, and a
            # reentrant write raises a RuntimeError.
            if state.is_world_process_zero:
                step = state.global_step
                logger.warning("%s received: writing a checkpoint after step %s", self.received, step)
            control.should_save = control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Stop after a checkpoint during which a signal was received; the grace period may end in a step."""
        if self._is_any_preempted():
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Prevent a second checkpoint of a preempted run.

        transformers also ends the epoch of a run that stops. With `save_strategy: epoch` it would overwrite
        the checkpoint just saved, and the grace period could end before the new one is complete.
        """
        if self.received is not None:
            control.should_save = False

    def finish_training(self, state: TrainerState) -> None:
        """Raise `Preempted` if training stopped before the last step. From now on signals raise at once."""
        if self.received is not None and state.global_step < state.max_steps:
            raise Preempted(f"stopped by {self.received} after step {state.global_step}, with a checkpoint")
        self.is_training = False

    def finish(self) -> None:
        """Ignore signals from now on. A scheduler may send several, while the process still exits."""
        self.has_ended = True
