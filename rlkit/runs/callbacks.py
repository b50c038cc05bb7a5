"""Trainer callbacks of a run: metrics, progress bar and evaluation during training."""

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

SECONDS_BETWEEN_LINES = 30  # if the output is not a terminal


class MetricsCallback(TrainerCallback):
    """Append the trainer's logs to `metrics.jsonl`."""

    def __init__(self, run_dir: RunDirectory):
        self.run_dir = run_dir

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Append one line, on the main process only."""
        if state.is_world_process_zero and logs:
            self.run_dir.log(state.global_step, logs)


class ProgressCallback(TrainerCallback):
    """Show a progress bar with the main metrics and the ETA, or plain lines if there is no terminal.

    Args:
        columns: Metrics to show. Maps the label of each to its name in the logs.
    """

    def __init__(self, columns: dict[str, str]):
        self.columns = columns
        self.progress: Progress | None = None
        self.last_line_time = 0.0
        self.start_time = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start the bar on the main process."""
        self.start_time = time.monotonic()
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
        """Update the bar, or print a line if the last one is old enough."""
        if self.progress is None or not logs:
            return
        values = [
            f"{label} {logs[key]:.3g}" for label, key in self.columns.items() if logs.get(key) is not None
        ]
        if not values:
            return
        numbers = "  ".join(values)
        if self.progress.console.is_terminal:
            self.progress.update(self.task, completed=state.global_step, numbers=numbers)
            return
        is_due = time.monotonic() - self.last_line_time > SECONDS_BETWEEN_LINES
        if is_due or state.global_step == state.max_steps:
            self.last_line_time = time.monotonic()
            print(
                f"step {state.global_step}/{state.max_steps}  {numbers}  ETA {self._eta(state)}", flush=True
            )

    def _eta(self, state: TrainerState) -> str:
        """Return the estimated remaining time as minutes:seconds."""
        # Only steps of this process count: a resumed run starts at `first_step`.
        num_steps = max(state.global_step - self.first_step, 1)
        seconds_per_step = (time.monotonic() - self.start_time) / num_steps
        remaining = seconds_per_step * (state.max_steps - state.global_step)
        return f"{int(remaining // 60)}:{int(remaining % 60):02d}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Stop the bar; it stays visible."""
        if self.progress is not None:
            self.progress.stop()


class Finished(Exception):  # noqa: N818
    """The resumed checkpoint is from the last step, so there is nothing left to train."""


class FinishedCallback(TrainerCallback):
    """End a resumed run whose checkpoint is from the last step; transformers would train one more step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Raise `Finished` if the last step was already reached."""
        if state.global_step >= state.max_steps:
            raise Finished


class EvaluateCallback(TrainerCallback):
    """Call `evaluate("step-N")` every `steps` steps, on all ranks.

    A preempted run postpones an evaluation that is due until it is resumed.

    Args:
        evaluate: Function that runs an evaluation, given its name.
        steps: Number of optimizer steps between evaluations.
        evaluated: Function that returns whether the evaluation of a name exists already. Only the main
            process's result counts, since the files may not be visible to other ranks.
    """

    def __init__(self, evaluate: Callable[[str], None], steps: int, evaluated: Callable[[str], bool]):
        self.evaluate = evaluate
        self.steps = steps
        self.evaluated = evaluated

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Run the evaluation that the run postponed when it was preempted, if any."""
        # Evaluating takes all ranks, so they must agree on whether the file exists.
        if state.global_step and not gather_object([self.evaluated(f"step-{state.global_step}")])[0]:
            self.on_step_end(args, state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Evaluate if it is due. The last step is left to the evaluation `after`."""
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        if state.global_step % self.steps == 0 and not is_last:
            self.evaluate(f"step-{state.global_step}")
