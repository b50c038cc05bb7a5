"""The record format of saved rollouts, which training and evaluations share.

Training writes the records of a step to `rollouts/step-N.parquet`; an evaluation stores them in the
`completions` of `evaluation/NAME.json`. `rollout_record` builds a record, `RolloutFiles` reads those of
training, and `Evaluation.load` reads those of an evaluation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypedDict

import pandas as pd
import pyarrow
import pyarrow.parquet as pq
from pyarrow import ArrowException

from rlkit.environment import Environment
from rlkit.errors import UserError, first_line
from rlkit.reward import Row, completion_length

if TYPE_CHECKING:
    from rlkit.scoring import Scores

NUMBERS = ("score", "reward", "advantage", "log_prob_gap")  # columns of a record that may be None


class RolloutRecord(TypedDict, total=False):
    """A saved rollout.

    In addition to these fields it has `rewards/NAME` for each reward, the breakdown columns of its task, and
    `extra/NAME` for what rewards have logged with `log_extra`.
    """

    task_id: str
    prompt: str  # as formatted by `prompt_text`
    completion: str  # text that the model wrote; several turns are joined with newlines
    turns: Sequence[Mapping[str, Any]]  # all messages after the prompt
    answer: str | None  # the environment's reference answer
    score: float | None  # the environment's metric; None if it does not apply or the rollout is invalid
    reward: float | None  # weighted sum of the rewards; None in evaluations, which use no weights
    invalid: str | None  # why the rollout could not be scored, or None
    length: int  # number of tokens the model wrote, without EOS; rewards read it as `length`
    environment_tokens: int  # number of tokens the environment wrote
    truncated: bool  # whether a limit (tokens, turns, context) ended the rollout
    step: int  # training only: optimizer step that the rollout is for
    advantage: float  # training only
    kept: bool  # training with dynamic sampling: whether the rollout is in the batch
    log_prob_gap: float  # training with vLLM: mean |sampler - trainer| log-probability, nats per token


def rollout_record(
    environment: Environment,
    row: Row,
    rewards: Mapping[str, float],
    *,
    invalid: str | None,
    reward: float = math.nan,
    logged: Mapping[str, str | None] = MappingProxyType({}),
) -> RolloutRecord:
    """Build the record of one rollout.

    Args:
        environment: Environment of the task; provides the answer, the metric's name and breakdown columns.
        row: Columns of the task and the rollout, as rewards read them.
        rewards: Reward values by name; NaN where a reward does not apply.
        invalid: Reason why the rollout could not be scored, or None.
        reward: Weighted sum of the rewards; NaN if there is none.
        logged: What rewards have logged about the rollout with `log_extra`, by column.
    """
    # An invalid rollout has no values, even from rewards that ran before another one failed.
    if invalid is not None:
        rewards, reward = dict.fromkeys(rewards, math.nan), math.nan
    record: dict[str, Any] = {
        "task_id": None if row.get("task_id") is None else str(row["task_id"]),
        "prompt": prompt_text(row["prompt"]),
        "completion": row["completion"],
        "turns": row["turns"],
        "answer": environment.answer(row),
        "score": nan_to_none(rewards.get(environment.metric, math.nan)),
        "reward": nan_to_none(reward),
        "invalid": invalid,
        "length": completion_length(row),
        "environment_tokens": row["environment_tokens"],
        "truncated": row["truncated"],
    }
    record |= {column: row[column] for column in environment.breakdown}
    record |= {f"rewards/{name}": nan_to_none(value) for name, value in rewards.items()}
    record |= {f"extra/{column}": value for column, value in logged.items()}
    return record  # type: ignore[return-value]


def rollout_records(
    environment: Environment,
    rows: Sequence[Row],
    names: Sequence[str],
    scores: Scores,
    totals: Sequence[float] | None = None,
) -> list[RolloutRecord]:
    """Build the records of scored rollouts.

    Args:
        environment: Environment of the tasks.
        rows: Columns of the tasks and the rollouts, `B` rows.
        names: Names of the rewards, in the order of the columns of `scores.values`.
        scores: Scores of the rows.
        totals: Weighted sums of the rewards, or None in evaluations, which use no weights.
    """
    return [
        rollout_record(
            environment,
            row,
            dict(zip(names, values, strict=True)),
            invalid=scores.invalid[i],
            reward=math.nan if totals is None else totals[i],
            logged=scores.logged(i),
        )
        for i, (row, values) in enumerate(zip(rows, scores.values.tolist(), strict=True))
    ]


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """Format a prompt for display: the content of a single message, or several messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"[{message['role']}] {message['content']}" for message in prompt)


def nan_to_none(value: float) -> float | None:
    """Return None for NaN; both mean "no value", but JSON can represent only None."""
    return None if math.isnan(value) else value


def record_frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Convert records to a data frame with float64 for all number columns.

    pandas would give a column that contains only None no numeric type, for example if a reward applied to
    none of the rollouts. Then the files of a run could not be read as one table.
    """
    frame = pd.DataFrame(list(records))
    for name in frame:
        if name in NUMBERS or str(name).startswith("rewards/"):
            frame[name] = frame[name].astype("float64")
    return frame


class RolloutFiles:
    """Reader of the rollouts of a run, which may still be training.

    Args:
        run: Run directory.

    Attributes:
        files: Path of the Parquet file by step.

    Raises:
        UserError: The folder is not a run directory, or it has no rollouts yet.
    """

    def __init__(self, run: Path):
        self.run = run
        self.reload()

    def reload(self) -> None:
        """Update the list of files; raises UserError if there are none."""
        folder = self.run / "rollouts"
        if not (folder.is_dir() or (self.run / "config.yaml").is_file()):
            raise UserError(f"{self.run} is not a run directory (it has no config.yaml and no rollouts/)")
        files = {}
        for path in sorted(folder.glob("*.parquet")):
            if match := re.fullmatch(r"step-(\d+)", path.stem):
                files[int(match[1])] = path
        if not files:
            raise UserError(f"{self.run} has no rollouts yet; rlkit train writes them at every step")
        self.files = files

    def version(self, step: int) -> int:
        """Return a number that changes when the file of a step changes: its modification time."""
        try:
            return self.files[step].stat().st_mtime_ns
        except OSError as error:  # a run that was resumed from an earlier step has deleted it
            raise _unreadable(self.files[step], error) from error

    def columns(self, step: int) -> list[str]:
        """Return the column names of a step's file; raises UserError if it cannot be read."""
        try:
            return pq.read_schema(self.files[step]).names
        except (OSError, ValueError, ArrowException) as error:
            raise _unreadable(self.files[step], error) from error

    def read(self, step: int, columns: Collection[str] | None = None) -> list[dict[str, Any]]:
        """Return the records of a step, with None instead of NaN.

        Args:
            step: A step in `files`.
            columns: Columns to read, or None for all. Names that do not exist are ignored.

        Raises:
            UserError: The file cannot be read.
        """
        rows = self._table(step, columns).to_pylist()
        return [{name: _without_nan(value) for name, value in row.items()} for row in rows]

    def frame(self, step: int) -> pd.DataFrame:
        """Return the records of a step as a data frame; raises UserError if the file cannot be read."""
        return self._table(step, None).to_pandas()

    def _table(self, step: int, columns: Collection[str] | None) -> pyarrow.Table:
        names = [name for name in self.columns(step) if columns is None or name in columns]
        try:
            return pq.read_table(self.files[step], columns=names)
        except (OSError, ValueError, ArrowException) as error:
            raise _unreadable(self.files[step], error) from error


def _without_nan(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return UserError(f"cannot read {path}: {reason}")
