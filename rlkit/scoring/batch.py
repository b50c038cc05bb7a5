"""The scores of a batch of rollouts, and their collection while rewards run."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rlkit.reward import Row, completion_length
from rlkit.scoring.worker import Failure, Reply


@dataclass
class Scores:
    """Scores of a batch of `B` rollouts by `R` rewards.

    Attributes:
        values: (B, R) float64, one column per reward. NaN where a reward does not apply, and in the entire
            row of an invalid rollout.
        invalid: (B,) reason why a rollout is invalid, such as "distribution: ValueError: empty", or None.
        error_counts: Number of rows on which each reward failed. Calls that have not started when a row fails
            are skipped.
        first_traceback: Traceback of the first invalid row. For a reward that was killed, the reason.
        first_row: Index of that row.
        latencies: Seconds of each call of each reward, by name.
        metrics: Values that rewards have logged with `log_metric`, by name.
        columns: Values that rewards have logged with `log_extra`, by column: (B,), None for rows without one.
    """

    values: NDArray[np.float64]
    invalid: list[str | None]
    error_counts: dict[str, int]
    first_traceback: str | None = None
    first_row: int | None = None
    latencies: Mapping[str, list[float]] = field(default_factory=dict)
    metrics: Mapping[str, list[float]] = field(default_factory=dict)
    columns: Mapping[str, list[str | None]] = field(default_factory=dict)

    def logged(self, i: int) -> dict[str, str | None]:
        """Return what rewards have logged with `log_extra` for a row, by column."""
        return {column: values[i] for column, values in self.columns.items()}


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
        self._column = {name: column for column, name in enumerate(names)}
        self._values = np.full((len(rows), len(names)), np.nan)
        # The failures of each invalid row, by the column of the reward; -1 if the rollout itself failed.
        self._failures: dict[int, dict[int, Failure]] = defaultdict(dict)
        self._errors: Counter[str] = Counter()
        self._undecided: set[int] = set()  # rows to which the metric does not apply
        self._latencies: dict[str, list[float]] = defaultdict(list)
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._logged: dict[str, list[str | None]] = {}
        for i, row in enumerate(rows):
            if row.get("invalid") is not None:  # the environment or the sampler failed
                self._failures[i][-1] = Failure(row["invalid"], row["invalid"])

    def record(self, name: str, indices: Sequence[int], reply: Reply) -> None:
        """Store the values of one call of a reward, and what it has logged; failures make rows invalid."""
        column = self._column[name]
        for i, value in zip(indices, reply.values, strict=True):
            if isinstance(value, Failure):
                self._errors[name] += 1
                reason = f"{name}: {value.reason}"
                self._failures[i][column] = Failure(reason, value.traceback or reason)
            elif value is not None:
                self._values[i, column] = value
        self._latencies[name].append(reply.seconds)
        for metric, number in reply.log.metrics:
            self._metrics[metric].append(number)
        for logged, strings in reply.log.columns.items():
            values = self._logged.setdefault(logged, [None] * len(self.rows))
            for i, string in zip(indices, strings, strict=True):
                values[i] = string

    def add_correct(self, metric: str) -> None:
        """Set the column `correct` to the metric. Rows to which it does not apply are not scored further."""
        for i, value in enumerate(self._values[:, self._column[metric]].tolist()):
            self.rows[i]["correct"] = None if math.isnan(value) else value
            if math.isnan(value):
                self._undecided.add(i)

    def is_pending(self, i: int) -> bool:
        """Return whether a row can still be scored."""
        return i not in self._failures and i not in self._undecided

    def pending_rows(self, groups: Iterable[Sequence[int]]) -> list[list[int]]:
        """Return the rows of each group that can still be scored, without groups that have none."""
        pending = ([i for i in group if self.is_pending(i)] for group in groups)
        return [group for group in pending if group]

    def scores(self) -> Scores:
        """Return the final scores of the batch."""
        # If several rewards failed on a row at the same time, report the one that comes first in the config.
        failures = {i: by_column[min(by_column)] for i, by_column in self._failures.items()}
        self._values[list(failures)] = np.nan
        first_row = min(failures, default=None)
        return Scores(
            self._values,
            [failures[i].reason if i in failures else None for i in range(len(self.rows))],
            dict(self._errors),
            None if first_row is None else failures[first_row].traceback,
            first_row,
            dict(self._latencies),
            dict(self._metrics),
            self._logged,
        )
