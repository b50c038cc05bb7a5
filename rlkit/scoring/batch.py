"""The scores of a batch of rollouts, and their collection while rewards run."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlkit.reward import Row, completion_length
from rlkit.scoring.worker import Failure, WorkerReply


@dataclass
class Scores:
    """Scores of a batch of `B` rollouts by `R` rewards.

    Attributes:
        values: (B, R) float64, one column per reward. NaN where a reward does not apply, and in the entire
            row of an invalid rollout.
        invalid: (B,) reason why a rollout is invalid, such as "distribution: ValueError: empty", or None.
        error_counts: Number of rows that each reward made invalid. After a failure, a row's remaining rewards
            do not run.
        first_traceback: Traceback of the first invalid row. For a reward that was killed, the reason.
        first_row: Index of that row.
    """

    values: NDArray[np.float64]
    invalid: list[str | None]
    error_counts: dict[str, int]
    first_traceback: str | None = None
    first_row: int | None = None


@dataclass
class WorkUnit:
    """Rows that one worker scores together: a single row, or a group. If a reward fails, all become invalid.

    Attributes:
        names: Names of the rewards to run.
        indices: Indices of the rows in the batch.
        time_limit: Seconds for all rewards together.
        num_finished: Number of rewards that have replied.
        deadline: Value of `time.monotonic` at which the worker is killed.
    """

    names: Sequence[str]
    indices: Sequence[int]
    time_limit: float
    num_finished: int = 0
    deadline: float = 0.0

    @property
    def name(self) -> str:
        """Name of the reward that is running."""
        return self.names[self.num_finished]


class ScoreBatch:
    """Collects the scores of a batch while rewards run.

    Attributes:
        rows: Rows of the rollouts. Those with `completion_ids` get the column `length`.
    """

    def __init__(self, rows: Sequence[Row], names: Sequence[str]):
        # Copies, since columns are added to them.
        self.rows = [
            {**row, "length": completion_length(row)} if "completion_ids" in row else {**row} for row in rows
        ]
        self._columns = {name: column for column, name in enumerate(names)}
        self._values = np.full((len(rows), len(names)), np.nan)
        self._invalid: dict[int, tuple[str, str]] = {}  # reason and traceback, by row
        self._errors: Counter[str] = Counter()
        for i, row in enumerate(rows):
            if row.get("invalid") is not None:  # the environment or the sampler failed
                self._invalid[i] = row["invalid"], row["invalid"]
        self._undecided: set[int] = set()  # rows to which the metric does not apply

    def record(self, name: str, indices: Sequence[int], reply: WorkerReply) -> None:
        """Store the values of a reward for some rows, or its failure, which makes them invalid."""
        if isinstance(reply, Failure):
            self._errors[name] += len(indices)
            for i in indices:  # the first failure of a row is the one that is reported
                self._invalid.setdefault(i, (f"{name}: {reply.reason}", reply.traceback))
            return
        for i, value in zip(indices, reply, strict=True):
            self._values[i, self._columns[name]] = np.nan if value is None else value

    def fail(self, unit: WorkUnit, reason: str) -> None:
        """Make the rows of a unit invalid; the reward that was running is to blame."""
        self.record(unit.name, unit.indices, Failure(reason, f"{unit.name}: {reason}"))

    def add_correct(self, metric: str) -> None:
        """Set the column `correct` to the metric. Rows to which it does not apply are not scored further."""
        for i, value in enumerate(self._values[:, self._columns[metric]].tolist()):
            self.rows[i]["correct"] = None if math.isnan(value) else value
            if math.isnan(value):
                self._undecided.add(i)

    def pending_rows(self, groups: Iterable[Sequence[int]]) -> list[list[int]]:
        """Return the rows of each group that can still be scored, without groups that have none."""
        excluded = self._undecided | self._invalid.keys()
        pending = ([i for i in group if i not in excluded] for group in groups)
        return [group for group in pending if group]

    def scores(self) -> Scores:
        """Return the final scores of the batch."""
        self._values[list(self._invalid)] = np.nan
        reasons = [self._invalid[i][0] if i in self._invalid else None for i in range(len(self.rows))]
        first_row = min(self._invalid, default=None)
        traceback = None if first_row is None else self._invalid[first_row][1]
        return Scores(self._values, reasons, dict(self._errors), traceback, first_row)
