"""`rlkit.train`: the command `rlkit train` as a function, for a script or a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.arguments.command_line import check_start
from rlkit.logs import configure_logging, reset_logging

if TYPE_CHECKING:
    import pandas as pd

    from rlkit.evaluation import Evaluation


@dataclass(frozen=True)
class TrainResult:
    """What a run left in its directory.

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
    """Train a language model as `rlkit train` does, in this process, and return what the run left.

        config = "configs/causal/smollm2.yaml"
        result = rlkit.train(config, model_name_or_path="bundled:smollm2-135m", max_steps=10)
        print(result.before.accuracy.mean, result.after.accuracy.mean)

    Args:
        config: a YAML file; `configs/...` that is not in the working directory comes with rlkit.
        keys: keys of rlkit, TRL, transformers or PEFT, above those of the file; mappings are dicts.

    Raises:
        UserError: bad input, in one line, before anything is loaded or deleted where that can be known.
        RewardError, GuardError: rewards fail too often, or the run cannot learn; its checkpoints are kept.
    """
    arguments = [] if config is None else ["--config", str(config)]
    with _logging():
        check_start("train", arguments, keys)
        from rlkit.arguments.parse import parse_train
        from rlkit.report.run import read_run
        from rlkit.runs.launch import use_one_gpu
        from rlkit.training.train import train as train_run

        use_one_gpu()
        run = parse_train(arguments, keys)
        train_run(run)
        directory = Path(str(run.trainer_args.output_dir))
        saved = read_run(directory)
        return TrainResult(directory, saved.metrics, saved.evaluations)


@contextmanager
def _logging() -> Iterator[None]:
    """Log as the commands do, and leave the caller's logging as it was."""
    configure_logging()
    try:
        yield
    finally:
        reset_logging()
