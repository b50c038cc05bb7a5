"""What a run shows and writes while it trains: the progress bar and the lines of metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from accelerate.utils import gather_object
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from rlkit.runs.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

PLAIN_SECONDS = 30  # between lines where the output is not a terminal


class MetricsCallback(TrainerCallback):
    """Appends what the trainer logs to the run's metrics."""

    def __init__(self, run: RunDirectory):
        self.run = run

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Write one line, on the main process."""
        if state.is_world_process_zero and logs:
            self.run.log(state.global_step, logs)


class ProgressCallback(TrainerCallback):
    """A bar with the numbers people watch and the time that is left; plain lines without a terminal.

    Args:
        columns: what to show: a label, and the metric's name or a function of the logs.
    """

    def __init__(self, columns: dict[str, str]):
        self.columns = columns
        self.progress: Progress | None = None
        self.shown = 0.0
        self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start the bar."""
        self.started = time.monotonic()
        self.first_step = state.global_step
        if not state.is_world_process_zero:
            return
        self.progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self.task = self.progress.add_task(
            "train", total=state.max_steps, completed=state.global_step, numbers=""
        )
        if self.progress.console.is_terminal:
            self.progress.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Show the newest numbers."""
        if self.progress is None or not logs:
            return
        numbers = [
            f"{label} {logs[key]:.3g}" for label, key in self.columns.items() if logs.get(key) is not None
        ]
        if not numbers:
            return
        text = "  ".join(numbers)
        if self.progress.console.is_terminal:
            self.progress.update(self.task, completed=state.global_step, numbers=text)
        elif time.monotonic() - self.shown > PLAIN_SECONDS or state.global_step == state.max_steps:
            self.shown = time.monotonic()
            print(f"step {state.global_step}/{state.max_steps}  {text}  ETA {self._eta(state)}", flush=True)

    def _eta(self, state: TrainerState) -> str:
        done = state.global_step - self.first_step
        left = (time.monotonic() - self.started) / max(done, 1) * (state.max_steps - state.global_step)
        return f"{int(left // 60)}:{int(left % 60):02d}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Leave the bar as it stands."""
        if self.progress is not None:
            self.progress.stop()


class Finished(Exception):  # noqa: N818
    """A run has nothing left to do; its last checkpoint is loaded."""


class FinishedCallback(TrainerCallback):
    """Ends a resumed run that had reached its last step: transformers would make one step more."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Raise `Finished`."""
        if state.global_step >= state.max_steps:
            raise Finished


class EvaluateCallback(TrainerCallback):
    """Calls `evaluate("step-N")` every `steps` steps, on all ranks.

    A run that is about to leave its machine puts that off until it goes on.

    Args:
        evaluated: whether that was done already, by name.
    """

    def __init__(self, evaluate: Callable[[str], None], steps: int, evaluated: Callable[[str], bool]):
        self.evaluate = evaluate
        self.steps = steps
        self.evaluated = evaluated

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Make up for what was put off."""
        if state.global_step and not gather_object([self.evaluated(f"step-{state.global_step}")])[0]:
            self.on_step_end(args, state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Evaluate between steps; the last step is evaluated as `after`."""
        last = state.global_step >= state.max_steps or control.should_training_stop
        if state.global_step % self.steps == 0 and not last:
            self.evaluate(f"step-{state.global_step}")
