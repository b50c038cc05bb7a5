"""Distribution of reward calls over worker processes, with time limits and a bound on concurrent calls."""

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import wait

from rlkit.reward import RewardCall, Row, TrainerState
from rlkit.scoring.batch import ScoreBatch
from rlkit.scoring.limits import TimeLimits
from rlkit.scoring.worker import (
    Call,
    Failure,
    Reply,
    Worker,
    describe_failure,
    failed_reply,
    pack_call,
    timeout_failure,
)

logger = logging.getLogger(__name__)

# Seconds after its time limit at which a worker is killed because of an async call. Before that, the worker
# cancels the call itself, unless a reward blocks the event loop.
CANCEL_GRACE = 1.0


@dataclass(eq=False)
class WorkUnit:
    """A call of a reward on a row, a group or a batch.

    Attributes:
        name: Name of the reward.
        indices: Indices of the rows in the batch.
        is_first: Whether it may be the reward's first call in its worker.
        started: Value of `time.monotonic` when it was sent.
        time_limit: Seconds of its call.
        deadline: Value of `time.monotonic` at which the worker is killed.
        has_lost_worker: Whether it ran in a worker that died, and no call could be blamed.
    """

    name: str
    indices: Sequence[int]
    is_first: bool = False
    started: float = 0.0
    time_limit: float = 0.0
    deadline: float = 0.0
    has_lost_worker: bool = False


class Dispatcher:
    """Runs work units on worker processes.

    Async rewards share one worker, which makes many calls at a time; the calls of other rewards are
    distributed over `num_workers` workers, one at a time each. A worker that exceeds the limit or dies is
    replaced. The unit that is to blame fails; units that ran beside it in the same worker run again.

    Args:
        rewards: Rewards by name.
        payloads: Pickled rewards for the workers of async rewards (True) and of all others (False). Without
            rewards of a kind, there is no worker for it.
        num_workers: Number of worker processes for rewards that are not async.
        limits: Time limits.
        max_concurrent: Maximum number of concurrent calls by reward.
        num_retries: Number of retries after a transient failure.

    Raises:
        RewardError: A worker could not load the rewards.
    """

    def __init__(
        self,
        rewards: Mapping[str, RewardCall],
        payloads: Mapping[bool, bytes],
        *,
        num_workers: int,
        limits: TimeLimits,
        max_concurrent: Mapping[str, int],
        num_retries: int,
    ):
        self._rewards = rewards
        self._limits = limits
        self._max_concurrent = max_concurrent
        self._num_retries = num_retries
        self._ids = count(1)
        self._slow_first_calls: set[str] = set()  # rewards whose slow first call has been reported
        self._workers = [
            Worker(payload, concurrent=is_async)
            for is_async, payload in payloads.items()
            for _ in range(1 if is_async else num_workers)
        ]
        # The units that each worker is running, by the id of their call.
        self._running: dict[Worker, dict[int, WorkUnit]] = {worker: {} for worker in self._workers}
        try:
            for worker in self._workers:
                worker.start()
        except BaseException:
            self.close()
            raise

    def run(self, units: Sequence[WorkUnit], batch: ScoreBatch, trainer_state: TrainerState) -> None:
        """Run units and record their scores in the batch."""
        queues: dict[str, deque[WorkUnit]] = {unit.name: deque() for unit in units}
        for unit in units:
            queues[unit.name].append(unit)
        try:
            while any(queues.values()) or any(self._running.values()):
                self._assign(queues, batch, trainer_state)
                if any(self._running.values()):
                    self._collect(queues, batch)
        except BaseException:
            # Mainly for Ctrl-C: the units of this batch must not keep running.
            self.close()
            raise

    def close(self) -> None:
        """Kill the worker processes, and the processes in their groups that rewards have started."""
        for worker in self._workers:
            worker.stop()
            self._running[worker].clear()

    def _assign(
        self, queues: Mapping[str, deque[WorkUnit]], batch: ScoreBatch, trainer_state: TrainerState
    ) -> None:
        """Send units to workers as long as the limits of concurrent calls permit."""
        num_running = Counter(unit.name for units in self._running.values() for unit in units.values())
        for name, queue in queues.items():
            while queue and num_running[name] < self._max_concurrent[name]:
                worker = self._free_worker(name)
                if worker is None:
                    break
                unit = queue.popleft()
                # Another reward may have failed on the row in the meantime.
                if any(batch.is_pending(i) for i in unit.indices):
                    num_running[name] += self._send(unit, worker, batch, trainer_state)

    def _free_worker(self, name: str) -> Worker | None:
        for worker, units in self._running.items():
            if worker.concurrent == self._rewards[name].is_async and (worker.concurrent or not units):
                return worker
        return None

    def _send(self, unit: WorkUnit, worker: Worker, batch: ScoreBatch, trainer_state: TrainerState) -> bool:
        """Send a unit to a worker; return False if its rows cannot be pickled, which makes them invalid."""
        worker.start()
        unit.is_first = unit.name not in worker.warm
        unit.time_limit = self._limits.limit(unit.name, len(unit.indices), is_first=unit.is_first)
        columns = self._rewards[unit.name].columns
        rows = [_select_columns(batch.rows[i], columns) for i in unit.indices]
        call = Call(next(self._ids), unit.name, rows, trainer_state, unit.time_limit, self._num_retries)
        unit.started = time.monotonic()
        try:
            payload = pack_call(call)
        except Exception as error:  # pickling a column's value may raise anything
            self._fail(unit, describe_failure(error), batch)
            return False
        unit.deadline = unit.started + unit.time_limit + (CANCEL_GRACE if worker.concurrent else 0.0)
        self._running[worker][call.id] = unit
        worker.send(payload)
        return True

    def _collect(self, queues: Mapping[str, deque[WorkUnit]], batch: ScoreBatch) -> None:
        """Wait for the next reply or deadline; record replies, and kill workers that exceed a limit."""
        busy = {worker.connection: worker for worker, units in self._running.items() if units}
        now = time.monotonic()
        events = [self._next_event(unit) for units in self._running.values() for unit in units.values()]
        ready = wait(list(busy), max(0.0, min(events) - now))
        for connection, worker in busy.items():
            if connection in ready:
                self._receive(worker, queues, batch)
            elif overdue := self._overdue(worker):
                self._kill(worker, overdue, queues, batch)
        self._report_slow_first_calls()

    def _kill(
        self,
        worker: Worker,
        overdue: Sequence[WorkUnit],
        queues: Mapping[str, deque[WorkUnit]],
        batch: ScoreBatch,
    ) -> None:
        """Kill a worker with units that exceed their limit.

        If a call within its own limit blocks the event loop, such as a first call that imports something, the
        overdue calls wait for it.
        """
        call_id, seconds = worker.holder()
        is_blocked = call_id != 0 and seconds >= CANCEL_GRACE
        holder = self._running[worker].get(call_id)
        if is_blocked and holder is not None and holder not in overdue:
            for unit in overdue:
                unit.deadline = time.monotonic() + CANCEL_GRACE
            return
        # Blame the call that blocks the event loop, not the calls that it holds up. If the loop is not
        # blocked, the overdue calls have ignored their cancellation.
        culprits = self._culprits(worker, call_id) if is_blocked else overdue
        for unit in culprits:
            if unit.is_first and unit.name not in worker.warm:
                self._limits.record_timeout_of_first(unit.name, unit.time_limit)
            self._fail(unit, timeout_failure(unit.time_limit), batch)
        self._replace(worker, culprits, queues)

    def _receive(self, worker: Worker, queues: Mapping[str, deque[WorkUnit]], batch: ScoreBatch) -> None:
        """Record a reply of a worker, or its death."""
        running = self._running[worker]
        try:
            reply: Reply = worker.receive()
        except (EOFError, OSError):
            culprits = self._culprits(worker, worker.holder()[0])
            reason = worker.exit_reason()
            for unit in culprits:
                self._fail(unit, Failure(reason), batch)
            self._replace(worker, culprits, queues)
            return
        if reply.id not in running:  # a late reply: it belongs to no running call
            return
        unit = running.pop(reply.id)
        batch.record(unit.name, unit.indices, reply)
        if unit.name not in worker.warm:
            worker.warm.add(unit.name)
            if reply.timed_out:
                self._limits.record_timeout_of_first(unit.name, unit.time_limit)
            else:
                self._limits.record_first(unit.name, reply.seconds)

    def _overdue(self, worker: Worker) -> list[WorkUnit]:
        now = time.monotonic()
        return [unit for unit in self._running[worker].values() if now >= unit.deadline]

    def _culprits(self, worker: Worker, call_id: int) -> Sequence[WorkUnit]:
        """Return the units to blame for a worker that has died or is blocked.

        Args:
            worker: The worker.
            call_id: Id of the call that holds its event loop, or 0. It may have ended, if it has started a
                background task. Without a unit of this id, for example if memory ran out or a thread crashed,
                the units that ran in the worker get a second chance.
        """
        running = self._running[worker]
        if call_id in running:
            return [running[call_id]]
        if len(running) == 1:
            return list(running.values())
        culprits = [unit for unit in running.values() if unit.has_lost_worker]
        for unit in running.values():
            unit.has_lost_worker = True
        return culprits

    def _fail(self, unit: WorkUnit, failure: Failure, batch: ScoreBatch) -> None:
        # The id is of no use here: there is no reply of a worker.
        reply = failed_reply(0, len(unit.indices), failure, unit.started)
        batch.record(unit.name, unit.indices, reply)

    def _replace(
        self, worker: Worker, failed: Sequence[WorkUnit], queues: Mapping[str, deque[WorkUnit]]
    ) -> None:
        """Kill a worker and requeue its units that have not failed. `_send` restarts it."""
        worker.stop()
        for unit in self._running[worker].values():
            if unit not in failed:
                queues[unit.name].append(unit)
        self._running[worker].clear()

    def _next_event(self, unit: WorkUnit) -> float:
        """Return when to act on a unit without a reply: at its deadline, or to report a slow first call."""
        if unit.is_first and unit.name not in self._slow_first_calls:
            return min(unit.deadline, unit.started + self._limits.seconds[unit.name] * len(unit.indices))
        return unit.deadline

    def _report_slow_first_calls(self) -> None:
        now = time.monotonic()
        for units in self._running.values():
            for unit in units.values():
                if (
                    unit.is_first
                    and unit.name not in self._slow_first_calls
                    and now >= self._next_event(unit)
                ):
                    self._slow_first_calls.add(unit.name)
                    logger.warning(
                        "the first call of reward %r takes more than %g s; its limit is %g s, since it may "
                        "import a library or load a file",
                        unit.name,
                        now - unit.started,
                        unit.deadline - unit.started,
                    )


def _select_columns(row: Row, columns: set[str] | None) -> dict[str, object]:
    """Select the columns that a reward reads (None: any), so that nothing else is pickled."""
    if columns is None:
        return dict(row)
    return {key: value for key, value in row.items() if key in columns or key == "completion"}
