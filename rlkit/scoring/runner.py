"""Score a batch of rollouts with rewards that may fail, hang or crash."""

import math
import pickle
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle

from rlkit.errors import UserError, nearest
from rlkit.reward import Reward, RewardCall, Row
from rlkit.scoring.batch import ScoreBatch, Scores, Unit
from rlkit.scoring.worker import Failure, Worker, WorkerReply, attempt, describe


class RewardRunner:
    """Runs rewards on batches of rollouts, each row under a time limit that kills.

    Rewards without memory run in worker processes. A worker that outruns the limit or dies is replaced, and
    only the row it was judging (for a group reward, the group) is invalid. It is a context manager.

    Rewards run in three turns: those of one row, those that read `correct`, those of a group. A row that has
    become invalid is judged no further and left out of its group; so is, where `correct` is read, one to
    which the metric does not apply.

    Attributes:
        rewards: by name; `names` are the columns of `Scores.values`.
        metric: the reward whose value is the column `correct`, or None.
        stateful: the rewards with memory, by name, for a checkpoint.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        time_limit: float = 10.0,
        workers: int = 1,
        *,
        metric: str | None = None,
    ):
        """Start the workers.

        Args:
            rewards: by name; the order is that of the columns of `Scores.values`.
            time_limit: seconds for the rewards of one row in one turn; a group has this times its size.
            workers: processes among which rows are shared out.
            metric: the reward whose value the others can read as `correct`.

        Raises:
            UserError: a reward that cannot be sent to a worker; a limit or number that is not positive; a
                metric that is not run or reads `correct` itself; a reward that needs it where there is none.
            RewardError: a worker could not load the rewards.
        """
        if not 0 < time_limit < math.inf or workers < 1:
            raise UserError(f"rewards need a time limit and workers, not {time_limit} s and {workers}")
        self.rewards = dict(rewards)
        self.names = list(rewards)
        self.time_limit = time_limit
        self.metric = metric
        self._calls = {name: RewardCall(reward) for name, reward in rewards.items()}
        self._check_metric()
        self.stateful = {name: reward for name, reward in rewards.items() if is_stateful(reward)}
        self._check_memory()
        remote = {name: reward for name, reward in rewards.items() if name not in self.stateful}
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
        batch = ScoreBatch(rows, self.names)
        groups = [range(i, i + group_size) for i in range(0, len(rows), group_size)]
        later = [name for name in self.names if self._waits_for_others(name)]
        self._judge([name for name in self.names if name not in later], groups, batch)
        if self.metric is not None:
            batch.add_correct(self.metric)
        self._judge(later, groups, batch)
        return batch.scores()

    def observe(self, rollouts: Sequence[Row]) -> None:
        """Show rollouts of training to the rewards that remember (`rlkit.reward`).

        Args:
            rollouts: `task_id`, `length` and `correct` of the valid ones, those of all ranks, each once.
        """
        for reward in self.stateful.values():
            if hasattr(reward, "observe"):
                reward.observe(rollouts)

    def close(self) -> None:
        """End the worker processes and whatever they have started."""
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> "RewardRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_metric(self) -> None:
        if self.metric is not None:
            if self.metric not in self._calls:
                raise UserError(f"the metric {self.metric!r} is not run{nearest(self.metric, self.names)}")
            if self._calls[self.metric].reads_correct:
                raise UserError(f"the metric {self.metric!r} cannot read 'correct', which is its own value")
            return
        for name, call in self._calls.items():
            if "correct" in call.required:
                raise UserError(f"the reward {name!r} reads 'correct', but no metric is run")

    def _check_memory(self) -> None:
        for name, reward in self.rewards.items():
            if hasattr(reward, "observe") and name not in self.stateful:
                raise UserError(f"the reward {name!r} has observe but no state_dict and load_state_dict")

    def _waits_for_others(self, name: str) -> bool:
        call = self._calls[name]
        return name != self.metric and (call.per_group or call.reads_correct)

    def _judge(self, names: Sequence[str], groups: Sequence[Sequence[int]], batch: ScoreBatch) -> None:
        """Run some rewards: those of one row, then those of a group."""
        singles = [[i] for i in range(len(batch.rows))]
        for parts, per_group in ((singles, False), (groups, True)):
            chosen = [name for name in names if self._calls[name].per_group == per_group]
            remote = [name for name in chosen if name not in self.stateful]
            if remote:
                units = [Unit(remote, part, self.time_limit * len(part)) for part in batch.judged(parts)]
                self._run(units, batch)
            for name in chosen:
                if name in self.stateful:
                    self._judge_here(name, batch.judged(parts), batch)

    def _judge_here(self, name: str, parts: Sequence[Sequence[int]], batch: ScoreBatch) -> None:
        for part in parts:
            batch.record(name, part, attempt(self._calls[name], [batch.rows[i] for i in part]))

    def _run(self, units: Sequence[Unit], batch: ScoreBatch) -> None:
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
        batch: ScoreBatch,
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
        self, idle: list[Worker], busy: dict[Connection, tuple[Worker, Unit]], batch: ScoreBatch
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
                    batch.fail(unit, f"timed out after {unit.limit:g} s")
            if finished:
                del busy[connection]
                idle.append(worker)


def is_stateful(reward: Reward) -> bool:
    """Say whether a reward has memory, and so belongs in the trainer's process."""
    return hasattr(reward, "state_dict") and hasattr(reward, "load_state_dict")


def _receive(worker: Worker, unit: Unit, batch: ScoreBatch) -> bool:
    """Take one reply of a worker; return whether its unit is through."""
    try:
        reply: WorkerReply = worker.receive()
    except (EOFError, OSError):
        reason = worker.death()
        worker.stop()
        batch.fail(unit, reason)
        return True
    batch.record(unit.name, unit.indices, reply)
    unit.done += 1
    return isinstance(reply, Failure) or unit.done == len(unit.names)


def _select(row: Row, columns: Sequence[set[str] | None]) -> dict[str, Any]:
    """Keep what the rewards read, so that nothing else is pickled."""
    wanted = set().union(*(c for c in columns if c is not None))
    return {key: value for key, value in row.items() if None in columns or key in wanted | {"completion"}}


def _pickle_rewards(rewards: Mapping[str, Reward]) -> bytes:
    """Pickle rewards, those from files (see `rlkit.registry`) by value since no worker could import them."""
    for name, module in list(sys.modules.items()):
        if name.startswith("rlkit_file_"):
            cloudpickle.register_pickle_by_value(module)
    for name, reward in rewards.items():
        try:
            cloudpickle.dumps(reward)
        except Exception as error:
            raise UserError(f"the reward {name!r} cannot be sent to a worker process: {error}") from error
    return cloudpickle.dumps(dict(rewards))
