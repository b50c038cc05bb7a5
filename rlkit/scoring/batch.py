"""A batch of rollouts while its rewards come in, and what is known of it in the end."""

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
    """What the rewards said about a batch of `B` rollouts.

    Attributes:
        values: (B, R) float64, a column a reward. NaN where a reward does not apply, and in the whole of an
            invalid row.
        invalid: (B,) why a row is invalid, such as "distribution: ValueError: empty", or None.
        error_counts: how many rows each reward made invalid. A row's later rewards are not run.
        first_traceback: the traceback of the first invalid row (for a killed reward, the reason).
        first_row: the index of that row.
    """

    values: NDArray[np.float64]
    invalid: list[str | None]
    error_counts: dict[str, int]
    first_traceback: str | None = None
    first_row: int | None = None


@dataclass
class Unit:
    """Work that fails together: rewards for one row, or for the rows of one group."""

    names: Sequence[str]
    indices: Sequence[int]
    limit: float  # seconds
    done: int = 0  # rewards that have replied
    deadline: float = 0.0

    @property
    def name(self) -> str:
        """The reward that is being run."""
        return self.names[self.done]


class ScoreBatch:
    """The scores of a batch while they come in.

    Attributes:
        rows: the rollouts, with their `length` where they have `completion_ids`.
    """

    def __init__(self, rows: Sequence[Row], names: Sequence[str]):
        self.rows = [
            {**row, "length": completion_length(row)} if "completion_ids" in row else {**row} for row in rows
        ]
        self._names = {name: column for column, name in enumerate(names)}
        self._values = np.full((len(rows), len(names)), np.nan)
        self._invalid: dict[int, tuple[str, str]] = {}  # row: reason and traceback
        self._errors: Counter[str] = Counter()
        for i, row in enumerate(rows):
            if row.get("invalid") is not None:  # the environment or the sampler failed
                self._invalid[i] = row["invalid"], row["invalid"]
        self._unknown: set[int] = set()  # rows whose correctness the metric does not tell

    def record(self, name: str, indices: Sequence[int], reply: WorkerReply) -> None:
        """Take the values of a reward for some rows, or its failure, which makes them invalid."""
        if isinstance(reply, Failure):
            self._errors[name] += len(indices)
            for i in indices:
                self._invalid.setdefault(i, (f"{name}: {reply.reason}", reply.traceback))
            return
        for i, value in zip(indices, reply, strict=True):
            self._values[i, self._names[name]] = np.nan if value is None else value

    def fail(self, unit: Unit, reason: str) -> None:
        """Make the rows of a unit invalid because of the reward that it is at."""
        self.record(unit.name, unit.indices, Failure(reason, f"{unit.name}: {reason}"))

    def add_correct(self, metric: str) -> None:
        """Give the rows the column `correct`; those to which the metric does not apply are judged no more."""
        for i, value in enumerate(self._values[:, self._names[metric]].tolist()):
            self.rows[i]["correct"] = None if math.isnan(value) else value
            if math.isnan(value):
                self._unknown.add(i)

    def judged(self, groups: Iterable[Sequence[int]]) -> list[list[int]]:
        """Return the rows of each group that are still to be judged, without the groups that have none."""
        left_out = self._unknown | self._invalid.keys()
        kept = ([i for i in group if i not in left_out] for group in groups)
        return [group for group in kept if group]

    def scores(self) -> Scores:
        """Return what is known in the end."""
        self._values[list(self._invalid)] = np.nan
        reasons = [self._invalid[i][0] if i in self._invalid else None for i in range(len(self.rows))]
        first = min(self._invalid, default=None)
        traceback = None if first is None else self._invalid[first][1]
        return Scores(self._values, reasons, dict(self._errors), traceback, first)
