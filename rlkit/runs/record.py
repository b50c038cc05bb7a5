"""One rollout as it is saved, by training and by evaluations alike.

Training writes the records of a step to `rollouts/step-N.parquet`, an evaluation keeps them in the
`completions` of `evaluation/NAME.json`. `rollout_record` makes them, `RolloutFiles` reads those of training,
`Evaluation.load` those of an evaluation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import pandas as pd
import pyarrow
import pyarrow.parquet as pq
from pyarrow import ArrowException

from rlkit.environment import Environment
from rlkit.errors import UserError, first_line
from rlkit.reward import Row, completion_length

NUMBERS = ("score", "reward", "advantage", "log_prob_gap")  # columns of a record that may be None


class RolloutRecord(TypedDict, total=False):
    """A saved rollout. It also has `rewards/NAME` for each reward and the breakdown columns of its task."""

    task_id: str
    prompt: str  # see `prompt_text`
    completion: str  # what the model wrote, its turns joined by line ends
    turns: Sequence[Mapping[str, Any]]  # all messages after the prompt
    answer: str | None  # the environment's own
    score: float | None  # the environment's metric; None where it does not apply or the rollout is invalid
    reward: float | None  # weighted sum of the rewards; None in an evaluation, which weighs nothing
    invalid: str | None  # why the rollout could not be judged
    length: int  # tokens the model wrote, EOS not counted: what rewards read as `length`
    environment_tokens: int  # tokens that the environment wrote
    truncated: bool
    step: int  # training: the optimizer step that these rollouts are for
    advantage: float
    kept: bool  # training with dynamic sampling: whether it is learned from
    log_prob_gap: float  # training with vLLM: mean |sampler - trainer|, nats per token


def rollout_record(
    environment: Environment,
    row: Row,
    rewards: Mapping[str, float],
    *,
    invalid: str | None,
    reward: float = math.nan,
) -> RolloutRecord:
    """Make the record of one rollout.

    Args:
        environment: gives the answer, the metric's name and the breakdown columns.
        row: what the rewards read: the task's columns and the rollout's.
        rewards: values by name; NaN where a reward does not apply.
        invalid: why the rollout could not be judged, or None.
        reward: weighted sum of the rewards; NaN where there is none.
    """
    if invalid is not None:  # nothing is known of it, whatever a reward said before another one failed
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
    return record  # type: ignore[return-value]


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """Write a prompt for people: a single message as it is, several with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"[{message['role']}] {message['content']}" for message in prompt)


def nan_to_none(value: float) -> float | None:
    """Return None for NaN, which means the same in a record."""
    return None if math.isnan(value) else value


def record_frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return records as a frame whose numbers are float64, also where a reward applied to none of them.

    A column of None alone would be of no type, and the files of a run could not be read as one table.
    """
    frame = pd.DataFrame(list(records))
    for name in frame:
        if name in NUMBERS or str(name).startswith("rewards/"):
            frame[name] = frame[name].astype("float64")
    return frame


class RolloutFiles:
    """The rollouts that a run has saved, one file for each step; the run may still be training.

    Attributes:
        files: the file of each step.

    Raises:
        UserError: the folder is not a run, or has no rollouts yet.
    """

    def __init__(self, run: Path):
        self.run = run
        self.reload()

    def reload(self) -> None:
        """List the files again; raises UserError when there are none."""
        folder = self.run / "rollouts"
        if not (folder.is_dir() or (self.run / "config.yaml").is_file()):
            raise UserError(f"{self.run} is not a run directory: no config.yaml or rollouts/ in it")
        names = ((re.fullmatch(r"step-(\d+)", path.stem), path) for path in sorted(folder.glob("*.parquet")))
        files = {int(match[1]): path for match, path in names if match}
        if not files:
            raise UserError(f"{self.run} has no rollouts yet: rlkit train writes some at every step")
        self.files = files

    def version(self, step: int) -> int:
        """Return a number that changes when the file of a step does."""
        try:
            return self.files[step].stat().st_mtime_ns
        except OSError as error:  # a resumed run has removed it
            raise _unreadable(self.files[step], error) from error

    def columns(self, step: int) -> list[str]:
        """Return the columns of a step's file."""
        try:
            return pq.read_schema(self.files[step]).names
        except (OSError, ValueError, ArrowException) as error:
            raise _unreadable(self.files[step], error) from error

    def read(self, step: int, columns: Collection[str] | None = None) -> list[dict[str, Any]]:
        """Return the records of a step, or some of their columns; NaN is read as None.

        Raises:
            UserError: the file cannot be read.
        """
        rows = self._table(step, columns).to_pylist()
        return [{name: _plain(value) for name, value in row.items()} for row in rows]

    def frame(self, step: int) -> pd.DataFrame:
        """Return the records of a step as a frame; raises what `read` does."""
        return self._table(step, None).to_pandas()

    def _table(self, step: int, columns: Collection[str] | None) -> pyarrow.Table:
        wanted = [name for name in self.columns(step) if columns is None or name in columns]
        try:
            return pq.read_table(self.files[step], columns=wanted)
        except (OSError, ValueError, ArrowException) as error:
            raise _unreadable(self.files[step], error) from error


def _plain(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return UserError(f"cannot read {path}: {reason}")
