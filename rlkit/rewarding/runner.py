"""Score a batch of rollouts with rewards that may fail, hang or crash."""

import math
import pickle
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle
import numpy as np
from numpy.typing import NDArray

from rlkit.environment import Reward
from rlkit.errors import UserError
from rlkit.rewarding.calls import RewardCall, Row
from rlkit.rewarding.worker import Failure, Reply, Worker, attempt, describe


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


class RewardRunner:
    """Runs rewards on batches of rollouts, each row under a time limit that kills.

    Rewards without memory run in worker processes. A worker that outruns the limit or dies is replaced, and
    only the row it was judging (for a group reward, the group) is invalid. It is a context manager.
    """

    def __init__(self, rewards: Mapping[str, Reward], time_limit: float = 10.0, workers: int = 1):
        """Start the workers.

        Args:
            rewards: by name; the order is that of the columns of `Scores.values`.
            time_limit: seconds for all rewards of one row together; a group has this times its size.
            workers: processes among which rows are shared out.

        Raises:
            UserError: a reward that cannot be sent to a worker; a limit or number that is not positive.
            RewardError: a worker could not load the rewards.
        """
        if not 0 < time_limit < math.inf or workers < 1:
            raise UserError(f"rewards need a time limit and workers, not {time_limit} s and {workers}")
        self.rewards = dict(rewards)
        self.names = list(rewards)
        self.time_limit = time_limit
        self._calls = {name: RewardCall(reward) for name, reward in rewards.items()}
        stateful = [name for name, reward in rewards.items() if is_stateful(reward)]
        self._by_row = [n for n in rewards if n not in stateful and not self._calls[n].per_group]
        self._by_group = [n for n in rewards if n not in stateful and self._calls[n].per_group]
        self._stateful = stateful
        remote = {name: rewards[name] for name in (*self._by_row, *self._by_group)}
        payload = _pickle_rewards(remote)
        self._workers = [Worker(payload) for _ in range(workers)] if remote else []
        try:
            for worker in self._workers:
                worker.start()
        except BaseException:
            self.close()
            raise

    def __call__(self, rows: Sequence[Row], group_size: int) -> Scores:
        """Score `B` rows; the rows of one task are neighbours, `group_size` of them.

        Raises:
            ValueError: `B` is not a multiple of `group_size`.
        """
        if len(rows) % group_size:
            raise ValueError(f"{len(rows)} rows are not groups of {group_size}")
        batch = _Batch(rows, self.names)
        singles = [[i] for i in range(len(rows))]
        groups = [list(range(i, i + group_size)) for i in range(0, len(rows), group_size)]
        units = [Unit(self._by_row, i, self.time_limit) for i in singles if self._by_row]
        units += [Unit(self._by_group, i, self.time_limit * group_size) for i in groups if self._by_group]
        self._run(units, batch)
        for name in self._stateful:
            for indices in groups if self._calls[name].per_group else singles:
                batch.record(name, indices, attempt(self._calls[name], [rows[i] for i in indices]))
        return batch.scores()

    def close(self) -> None:
        """End the worker processes and whatever they have started."""
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> "RewardRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, units: Sequence[Unit], batch: "_Batch") -> None:
        waiting, idle = deque(units), list(self._workers)
        busy: dict[Connection, tuple[Worker, Unit]] = {}
        try:
            while waiting or busy:
                while waiting and idle:
                    self._assign(waiting.popleft(), idle, busy, batch)
                self._collect(idle, busy, batch)
        except BaseException:  # Ctrl-C above all: a worker in the middle of a row is no use to the next batch
            self.close()
            raise

    def _assign(
        self,
        unit: Unit,
        idle: list[Worker],
        busy: dict[Connection, tuple[Worker, Unit]],
        batch: "_Batch",
    ) -> None:
        columns = [self._calls[name].columns for name in unit.names]
        rows = [_select(batch.rows[i], columns) for i in unit.indices]
        try:
            work = pickle.dumps((unit.names, rows, unit.limit))
        except Exception as error:  # a column's own pickling may raise anything
            batch.record(unit.name, unit.indices, describe(error))
            return
        worker = idle.pop()
        worker.start()
        unit.deadline = time.monotonic() + unit.limit
        busy[worker.connection] = worker, unit
        with suppress(OSError):  # the worker has just died: reading its reply will say so
            worker.connection.send_bytes(work)

    def _collect(
        self, idle: list[Worker], busy: dict[Connection, tuple[Worker, Unit]], batch: "_Batch"
    ) -> None:
        """Wait for the next replies or the next deadline, and free the workers that are through."""
        if not busy:
            return
        patience = min(unit.deadline for _, unit in busy.values()) - time.monotonic()
        ready = wait(list(busy), max(0.0, patience))
        for connection in list(busy):
            worker, unit = busy[connection]
            if connection in ready:
                finished = _receive(worker, unit, batch)
            else:
                finished = time.monotonic() >= unit.deadline
                if finished:
                    worker.stop()
                    _fail(batch, unit, f"timed out after {unit.limit:g} s")
            if finished:
                del busy[connection]
                idle.append(worker)


class _Batch:
    """The scores of a batch while they come in."""

    def __init__(self, rows: Sequence[Row], names: Sequence[str]):
        self.rows = rows
        self._names = {name: column for column, name in enumerate(names)}
        self._values = np.full((len(rows), len(names)), np.nan)
        self._invalid: dict[int, tuple[str, str]] = {}  # row: reason and traceback
        self._errors: Counter[str] = Counter()

    def record(self, name: str, indices: Sequence[int], reply: Reply) -> None:
        if isinstance(reply, Failure):
            self._errors[name] += len(indices)
            for i in indices:
                self._invalid.setdefault(i, (f"{name}: {reply.reason}", reply.traceback))
            return
        for i, value in zip(indices, reply, strict=True):
            self._values[i, self._names[name]] = np.nan if value is None else value

    def scores(self) -> Scores:
        self._values[list(self._invalid)] = np.nan
        reasons = [self._invalid[i][0] if i in self._invalid else None for i in range(len(self.rows))]
        first = min(self._invalid, default=None)
        traceback = None if first is None else self._invalid[first][1]
        return Scores(self._values, reasons, dict(self._errors), traceback, first)


def is_stateful(reward: Reward) -> bool:
    """Say whether a reward has memory, and so belongs in the trainer's process."""
    return hasattr(reward, "state_dict") and hasattr(reward, "load_state_dict")


def _receive(worker: Worker, unit: Unit, batch: _Batch) -> bool:
    """Take one reply of a worker; return whether its unit is through."""
    try:
        reply: Reply = worker.receive()
    except (EOFError, OSError):
        reason = worker.death()
        worker.stop()
        _fail(batch, unit, reason)
        return True
    batch.record(unit.name, unit.indices, reply)
    unit.done += 1
    return isinstance(reply, Failure) or unit.done == len(unit.names)


def _fail(batch: _Batch, unit: Unit, reason: str) -> None:
    batch.record(unit.name, unit.indices, Failure(reason, f"{unit.name}: {reason}"))


def _select(row: Row, columns: Sequence[set[str] | None]) -> dict[str, Any]:
    """Keep what the rewards read, so that nothing else is pickled."""
    wanted = set().union(*(c for c in columns if c is not None))
    return {key: value for key, value in row.items() if None in columns or key in wanted | {"completion"}}


def _pickle_rewards(rewards: Mapping[str, Reward]) -> bytes:
    """Pickle rewards, those from files (see `rlkit.loading`) by value since no worker could import them."""
    for name, module in list(sys.modules.items()):
        if name.startswith("rlkit_file_"):
            cloudpickle.register_pickle_by_value(module)
    for name, reward in rewards.items():
        try:
            cloudpickle.dumps(reward)
        except Exception as error:
            raise UserError(f"the reward {name!r} cannot be sent to a worker process: {error}") from error
    return cloudpickle.dumps(dict(rewards))
