"""`rlkit.train`: the `rlkit train` command as a function, for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.logs import logging_as_command
from rlkit.runs.launch import check_start

if TYPE_CHECKING:
    import pandas as pd

    from rlkit.evaluation import Evaluation


@dataclass(frozen=True)
class TrainResult:
    """The results of a training run.

    Attributes:
        directory: Run directory; the trained model is in `directory / "model"`.
        metrics: Data frame with one row per logged step and one column per metric, as in `metrics.jsonl`.
        evaluations: Held-out evaluations by name, in training order, such as "before" and "after"; empty
            if `evaluation_tasks` is 0.
    """

    directory: Path
    metrics: pd.DataFrame
    evaluations: Mapping[str, Evaluation]

    @property
    def before(self) -> Evaluation | None:
        """The evaluation before training, or None if there was none."""
        return self.evaluations.get("before")

    @property
    def after(self) -> Evaluation | None:
        """The evaluation after training, or None if there was none."""
        return self.evaluations.get("after")


def train(config: str | Path | None = None, **keys: Any) -> TrainResult:
    """Train a language model in this process, as `rlkit train` does, and return the results.

        result = rlkit.train("configs/causal/smollm2.yaml", max_steps=10)  # after its warm start
        print(result.before.accuracy.mean, result.after.accuracy.mean)

    Args:
        config: Path of a YAML file. A path `configs/...` that does not exist in the working directory is
            looked up in the configs that ship with rlkit.
        keys: Config keys of rlkit, TRL, transformers or PEFT. They override the file; a key that holds a
            mapping takes a dict.

    Raises:
        UserError: The input is invalid. Keys and paths are checked before anything is loaded or deleted.
        RewardError: Rewards failed on too many rollouts. The checkpoints are kept.
        GuardError: A guard stopped the run. The checkpoints are kept.
        Preempted: The process received a stop signal. The checkpoints are kept.
    """
    arguments = [] if config is None else ["--config", str(config)]
    with logging_as_command():
        check_start("train", arguments, keys)
        from rlkit.arguments.parse import parse_train
        from rlkit.report.run import read_run
        from rlkit.training.train import train as train_run

        run = parse_train(arguments, keys)
        # In a single process that sees several GPUs, Trainer would wrap the model in DataParallel.
        if run.trainer_args.n_gpu > 1:
            run.trainer_args._n_gpu = 1
        train_run(run)
        directory = Path(str(run.trainer_args.output_dir))
        saved = read_run(directory)
        return TrainResult(directory, saved.metrics, saved.evaluations)
