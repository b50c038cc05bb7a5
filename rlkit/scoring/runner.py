"""Scoring batches of rollouts with rewards that may fail, hang or crash."""

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
from rlkit.scoring.batch import ScoreBatch, Scores, WorkUnit
from rlkit.scoring.worker import Failure, Worker, WorkerReply, attempt, describe_failure


class RewardRunner:
    """Scores batches of rollouts, with a time limit per row that is enforced by killing the worker.

    Stateless rewards run in worker processes. A worker that exceeds the limit or crashes is replaced, and
    only the row it was scoring becomes invalid (for a group reward, the group). Use the runner as a context
    manager, so that no worker process outlives it.

    Rewards run in three stages: rewards of one row, rewards that read `correct`, rewards of a group. A row
    that becomes invalid is not scored further and is removed from its group. So is a row to which the metric
    does not apply, if there is a metric.

    Args:
        rewards: Rewards by name, in the order of the columns of `Scores.values`.
        time_limit: Seconds for the rewards of one row in one stage. A group has this times its size.
        num_workers: Number of worker processes.
        metric: Name of the reward whose value becomes the column `correct`, or None.

    Attributes:
        names: Names of the rewards, in the order of the columns of `Scores.values`.
        stateful: Stateful rewards by name, for checkpoints.

    Raises:
        UserError: The time limit or the number of workers is not positive, a reward cannot be pickled, or the
            metric is missing or reads `correct` itself.
        RewardError: A worker could not load the rewards.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        time_limit: float = 10.0,
        num_workers: int = 1,
        *,
        metric: str | None = None,
    ):
        if not 0 < time_limit < math.inf:
            raise UserError(f"the time limit of rewards must be positive and finite, not {time_limit} s")
        if num_workers < 1:
            raise UserError(f"rewards need at least 1 worker, not {num_workers}")
        self.rewards = dict(rewards)
        self.names = list(rewards)
        self.time_limit = time_limit
        self.metric = metric
        self._calls = {name: RewardCall(reward) for name, reward in rewards.items()}
        self._check_metric()
        self.stateful = {name: reward for name, reward in rewards.items() if is_stateful(reward)}
        self._check_observers()
        remote = {name: reward for name, reward in rewards.items() if name not in self.stateful}
        payload = _pickle_rewards(remote)
        self._workers = [Worker(payload) for _ in range(num_workers)] if remote else []
        try:
            for worker in self._workers:
                worker.start()
        except BaseException:
            self.close()
            raise

    def __call__(self, rows: Sequence[Row], group_size: int) -> Scores:
        """Score `B` rows, in which the `group_size` rows of one task are adjacent.

        Raises:
            ValueError: `B` is not a multiple of `group_size`.
        """
        if len(rows) % group_size:
            raise ValueError(f"{len(rows)} rows cannot be divided into groups of {group_size}")
        batch = ScoreBatch(rows, self.names)
        groups = [range(i, i + group_size) for i in range(0, len(rows), group_size)]
        dependent = [name for name in self.names if self._runs_after_metric(name)]
        self._run_rewards([name for name in self.names if name not in dependent], groups, batch)
        if self.metric is not None:
            batch.add_correct(self.metric)
        self._run_rewards(dependent, groups, batch)
        return batch.scores()

    def observe(self, rollouts: Sequence[Row]) -> None:
        """Pass training rollouts to the rewards that define `observe` (see `rlkit.reward`).

        Args:
            rollouts: `task_id`, `length` and `correct` of the valid rollouts of all ranks, each once.
        """
        for reward in self.stateful.values():
            if hasattr(reward, "observe"):
                reward.observe(rollouts)

    def close(self) -> None:
        """Kill the worker processes and all processes that their rewards have started."""
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> "RewardRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_metric(self) -> None:
        if self.metric is not None:
            if self.metric not in self._calls:
                raise UserError(
                    f"the metric {self.metric!r} is not one of the rewards{nearest(self.metric, self.names)}"
                )
            if self._calls[self.metric].reads_correct:
                raise UserError(f"the metric {self.metric!r} must not read 'correct', which is its own value")
            return
        for name, call in self._calls.items():
            if "correct" in call.required:
                raise UserError(f"reward {name!r} reads 'correct', but there is no metric")

    def _check_observers(self) -> None:
        for name, reward in self.rewards.items():
            if hasattr(reward, "observe") and name not in self.stateful:
                raise UserError(
                    f"reward {name!r} defines observe, so it must define state_dict and load_state_dict, too"
                )

    def _runs_after_metric(self, name: str) -> bool:
        call = self._calls[name]
        return name != self.metric and (call.per_group or call.reads_correct)

    def _run_rewards(self, names: Sequence[str], groups: Sequence[Sequence[int]], batch: ScoreBatch) -> None:
        """Run these rewards: first those of one row, then those of a group."""
        singles = [[i] for i in range(len(batch.rows))]
        for row_sets, per_group in ((singles, False), (groups, True)):
            stage = [name for name in names if self._calls[name].per_group == per_group]
            stateless = [name for name in stage if name not in self.stateful]
            if stateless:
                # Computed for each stage, since rows may have become invalid in the one before.
                units = [
                    WorkUnit(stateless, indices, self.time_limit * len(indices))
                    for indices in batch.pending_rows(row_sets)
                ]
                self._run_in_workers(units, batch)
            for name in stage:
                if name in self.stateful:
                    for indices in batch.pending_rows(row_sets):
                        reply = attempt(self._calls[name], [batch.rows[i] for i in indices])
                        batch.record(name, indices, reply)

    def _run_in_workers(self, units: Sequence[WorkUnit], batch: ScoreBatch) -> None:
        waiting, idle = deque(units), list(self._workers)
        busy: dict[Connection, tuple[Worker, WorkUnit]] = {}
        try:
            while waiting or busy:
                while waiting and idle:
                    self._assign(waiting.popleft(), idle, busy, batch)
                self._collect(idle, busy, batch)
        except BaseException:
            # Mainly for Ctrl-C: the late reply of a busy worker would be read as one of the next batch.
            self.close()
            raise

    def _assign(
        self,
        unit: WorkUnit,
        idle: list[Worker],
        busy: dict[Connection, tuple[Worker, WorkUnit]],
        batch: ScoreBatch,
    ) -> None:
        columns = [self._calls[name].columns for name in unit.names]
        rows = [_select_columns(batch.rows[i], columns) for i in unit.indices]
        try:
            payload = pickle.dumps((unit.names, rows, unit.time_limit))
        except Exception as error:  # pickling a column's value may raise anything
            batch.record(unit.name, unit.indices, describe_failure(error))
            return
        worker = idle.pop()
        worker.start()
        unit.deadline = time.monotonic() + unit.time_limit
        busy[worker.connection] = worker, unit
        with suppress(OSError):  # the worker has just died, which reading its reply will report
            worker.connection.send_bytes(payload)

    def _collect(
        self, idle: list[Worker], busy: dict[Connection, tuple[Worker, WorkUnit]], batch: ScoreBatch
    ) -> None:
        """Wait for the next replies or the next deadline, and free the workers whose unit has ended."""
        if not busy:
            return
        timeout = min(unit.deadline for _, unit in busy.values()) - time.monotonic()
        ready = wait(list(busy), max(0.0, timeout))
        for connection in list(busy):
            worker, unit = busy[connection]
            has_ended = False
            if connection in ready:
                has_ended = _receive(worker, unit, batch)
            elif time.monotonic() >= unit.deadline:
                worker.stop()
                batch.fail(unit, f"timed out after {unit.time_limit:g} s")
                has_ended = True
            if has_ended:
                del busy[connection]
                idle.append(worker)


def is_stateful(reward: Reward) -> bool:
    """Return whether a reward is stateful, and so runs in the trainer's process."""
    return hasattr(reward, "state_dict") and hasattr(reward, "load_state_dict")


def _receive(worker: Worker, unit: WorkUnit, batch: ScoreBatch) -> bool:
    """Record one reply of a worker; return whether its unit has ended."""
    try:
        reply: WorkerReply = worker.receive()
    except (EOFError, OSError):
        reason = worker.exit_reason()
        worker.stop()
        batch.fail(unit, reason)
        return True
    batch.record(unit.name, unit.indices, reply)
    unit.num_finished += 1
    return isinstance(reply, Failure) or unit.num_finished == len(unit.names)


def _select_columns(row: Row, columns: Sequence[set[str] | None]) -> dict[str, Any]:
    """Select the columns that the rewards read, so that nothing else is pickled.

    Args:
        row: Row of a rollout.
        columns: Columns that each reward reads, or None if it reads any.
    """
    selected = {"completion"}
    for names in columns:
        if names is None:
            return dict(row)
        selected |= names
    return {key: value for key, value in row.items() if key in selected}


def _pickle_rewards(rewards: Mapping[str, Reward]) -> bytes:
    """Pickle rewards; those from files (see `rlkit.registry`) by value, since workers cannot import them."""
    for name, module in list(sys.modules.items()):
        if name.startswith("rlkit_file_"):
            cloudpickle.register_pickle_by_value(module)
    for name, reward in rewards.items():
        try:
            cloudpickle.dumps(reward)
        except Exception as error:
            raise UserError(f"reward {name!r} cannot be pickled for a worker process: {error}") from error
    return cloudpickle.dumps(dict(rewards))
