"""Evaluations on held-out tasks before, during and after training, on all processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from accelerate.utils import gather_object

from rlkit.reward import Row, TrainerState
from rlkit.rollouts.types import Rollout
from rlkit.scoring import RewardRunner, Scores
from rlkit.training.processes import on_every_process, on_main_process

if TYPE_CHECKING:
    import transformers
    from accelerate import Accelerator
    from torch import nn

    from rlkit.runs.directory import RunDirectory

# answer(tasks, samples) returns `samples` rollouts for each task.
Answer = Callable[[Sequence[dict[str, Any]], int], Sequence[list[Rollout]]]


class Check(Protocol):
    """An evaluation before and after training, besides that of the environment's metric."""

    def run(self, trainer: transformers.Trainer, directory: RunDirectory, name: str, *, resume: bool) -> None:
        """Evaluate the current weights and save the result. All processes take part.

        Args:
            trainer: Trainer of the run.
            directory: Run directory to save to.
            name: "before" or "after".
            resume: Whether the run is resumed, so that the result "before" may exist.
        """

    def summary(self, directory: RunDirectory, metric_change: float) -> list[str]:
        """Return lines for the summary of the run, and log a warning if something is wrong.

        Args:
            directory: Run directory with both results.
            metric_change: Mean of the environment's metric after training minus that before.
        """


def shard_and_gather(
    accelerator: Accelerator, tasks: Sequence[dict[str, Any]], samples: int, answer: Answer
) -> list[list[Rollout]]:
    """Answer a shard of the tasks on each process, and return all rollouts on all processes.

    Returns:
        `samples` rollouts for each task, in the order of the tasks.
    """
    shard = list(enumerate(tasks))[accelerator.process_index :: accelerator.num_processes]
    # Called with an empty shard, too: gathering the weights of a sharded model takes all processes.
    rollouts = on_every_process(lambda: answer([task for _, task in shard], samples))
    indexed = [(index, of_task) for (index, _), of_task in zip(shard, rollouts, strict=True)]
    return [of_task for _, of_task in sorted(gather_object(indexed), key=lambda pair: pair[0])]


class MainProcessRunner:
    """Runner of rewards that scores on the main process and returns its scores on all processes.

    All processes hold the rollouts of all. If each scored them, the processes would disagree on the result of
    a judge that samples, and so on whether a guard stops the run.

    Args:
        accelerator: Accelerator of the trainer.
        runner: Runner to call.
    """

    def __init__(self, accelerator: Accelerator, runner: RewardRunner):
        self.accelerator, self.runner = accelerator, runner

    @property
    def names(self) -> list[str]:
        """Names of the rewards."""
        return self.runner.names

    def __call__(self, rows: Sequence[Row], group_size: int, trainer_state: TrainerState) -> Scores:
        """Return the scores of rows that all processes have. Arguments are those of `RewardRunner`."""
        return on_main_process(self.accelerator, lambda: self.runner(rows, group_size, trainer_state))


@contextmanager
def evaluating(trainer: transformers.Trainer) -> Iterator[None]:
    """Put the model of a trainer into evaluation mode, and restore its mode afterwards."""
    model: nn.Module = trainer.model  # type: ignore[assignment]
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
