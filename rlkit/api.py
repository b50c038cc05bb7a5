"""`rlkit.train`: the command `rlkit train` as a function, for a script or a notebook."""

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
    """The results of a run.

    Attributes:
        directory: the run directory; the trained model is in `directory / "model"`.
        metrics: one row per logged step, a column per metric, as in `metrics.jsonl`.
        evaluations: held-out evaluations by name in the order of training, such as "before" and "after";
            empty with `evaluation_tasks` 0.
    """

    directory: Path
    metrics: pd.DataFrame
    evaluations: Mapping[str, Evaluation]

    @property
    def before(self) -> Evaluation | None:
        """The evaluation before training."""
        return self.evaluations.get("before")

    @property
    def after(self) -> Evaluation | None:
        """The evaluation after training."""
        return self.evaluations.get("after")


def train(config: str | Path | None = None, **keys: Any) -> TrainResult:
    """Train a language model as `rlkit train` does, in this process, and return its results.

        config = "configs/causal/smollm2.yaml"
        result = rlkit.train(config, model_name_or_path="bundled:smollm2-135m", max_steps=10)
        print(result.before.accuracy.mean, result.after.accuracy.mean)

    Args:
        config: a YAML file; `configs/...` that is not in the working directory comes with rlkit.
        keys: keys of rlkit, TRL, transformers or PEFT, above those of the file; mappings are dicts.

    Raises:
        UserError: bad input, in one line, before anything is loaded or deleted where that can be known.
        RewardError, GuardError, Preempted (`rlkit.errors`): rewards fail too often, the run cannot learn, or
            the process was told to stop; its checkpoints are kept.
    """
    arguments = [] if config is None else ["--config", str(config)]
    with logging_as_command():
        check_start("train", arguments, keys)
        from rlkit.arguments.parse import parse_train
        from rlkit.report.run import read_run
        from rlkit.training.train import train as train_run

        run = parse_train(arguments, keys)
        if run.trainer_args.n_gpu > 1:  # of one process: Trainer would spread batches by DataParallel
            run.trainer_args._n_gpu = 1
        train_run(run)
        directory = Path(str(run.trainer_args.output_dir))
        saved = read_run(directory)
        return TrainResult(directory, saved.metrics, saved.evaluations)
