"""A worker process that runs rewards, and the trainer's handle on it.

The trainer sends calls of rewards, pickled (`Call`); the worker replies to each with a `Reply`. Calls and
replies carry the call's id: if a reward forks or a late reply arrives, it cannot be taken for another one.

There are two kinds of workers. One runs a single call at a time; if it hangs or crashes, the trainer knows
which call is to blame. The other runs async rewards, many calls at a time in one event loop. It notes in
shared memory which call holds the event loop, for the same purpose.

The worker is a new interpreter, not a `multiprocessing` child, which would import the trainer's main module
and with it torch at every restart. It leads its own process group. So a kill also reaches the processes that
a reward has started, and Ctrl-C does not reach the worker: the trainer decides when it stops. POSIX only.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Coroutine, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from rlkit.errors import RewardError, first_line
from rlkit.reward import RewardCall, RewardLog, Row, TrainerState, Value
from rlkit.scoring.limits import START_TIMEOUT
from rlkit.scoring.retries import backoff_delays, is_transient

ORPHAN_GRACE = 5.0  # seconds past the time limit after which a worker without a trainer ends itself
ID_BYTES = 8  # of the call id in shared memory


@dataclass
class Failure:
    """The failure of a reward: a one-line reason and the traceback."""

    reason: str
    traceback: str = ""


@dataclass
class Call:
    """A call of a reward on some rows.

    Attributes:
        id: Id that the reply repeats; at least 1.
        name: Name of the reward.
        rows: Rows to score.
        trainer_state: Progress of training.
        time_limit: Seconds after which the trainer kills the worker; an async call is cancelled before that.
        num_retries: Number of retries after transient failures, within the time limit.
    """

    id: int
    name: str
    rows: Sequence[Row]
    trainer_state: TrainerState
    time_limit: float
    num_retries: int


@dataclass
class Reply:
    """The result of a call: one value or failure per row, what the reward logged, and the seconds it took."""

    id: int
    values: Sequence[float | Failure | None]
    log: RewardLog
    seconds: float
    timed_out: bool = False


class Worker:
    """The trainer's handle on a worker process: starts it, reads its replies, kills it.

    Args:
        rewards: Dict of rewards by name, pickled with cloudpickle.
        concurrent: Whether it runs async rewards, many calls at a time.

    Attributes:
        warm: Names of the rewards of which a call has ended since the process started.
    """

    def __init__(self, rewards: bytes, *, concurrent: bool = False):
        self._rewards = rewards
        self.concurrent = concurrent
        self.warm: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._memory: mmap.mmap | None = None
        self._sender: ThreadPoolExecutor | None = None
        self.connection: Connection

    def start(self) -> None:
        """Start the process unless it is running, and wait until it has loaded the rewards.

        Raises:
            RewardError: It could not load the rewards.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()  # clean up a process that ended between two batches
        trainer_end, worker_end = socket.socketpair()
        with worker_end, tempfile.TemporaryFile() as shared:
            self._memory = share_memory(shared.fileno())
            descriptors = [worker_end.fileno(), shared.fileno()]
            arguments = ", ".join(map(str, [*descriptors, self.concurrent]))
            # The worker imports every module from the same place as the trainer.
            code = (
                f"import sys; sys.path[:] = {sys.path!r}\n"
                f"from rlkit.scoring.worker import serve; serve({arguments})"
            )
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,  # a reward must not read the trainer's terminal
                pass_fds=descriptors,
                start_new_session=True,
            )
        self.connection = Connection(trainer_end.detach())
        self._sender = ThreadPoolExecutor(1) if self.concurrent else None
        try:
            self.connection.send_bytes(self._rewards)
            problem = self.receive() if self.connection.poll(START_TIMEOUT) else "timed out"
        except (EOFError, OSError):
            problem = self.exit_reason()
        if problem is not None:
            self.stop()
            raise RewardError(f"a reward worker failed to start: {problem}")

    def send(self, call: bytes) -> None:
        """Send a pickled `Call`. If the worker has died, the next `receive` reports it."""
        if self._sender is not None:
            # In a thread: a reward that blocks the event loop would block the trainer, too, which could not
            # enforce the time limit.
            self._sender.submit(self.connection.send_bytes, call)
            return
        with suppress(OSError):
            self.connection.send_bytes(call)

    def receive(self) -> Any:
        """Return the next reply.

        Raises:
            EOFError, OSError: The process has ended.
        """
        return pickle.loads(self.connection.recv_bytes())

    def running_call(self) -> int:
        """Return the id of the call that holds the event loop of a concurrent worker, or 0."""
        assert self._memory is not None
        return int.from_bytes(self._memory[:ID_BYTES])

    def exit_reason(self) -> str:
        """Return how the process ended, such as "worker died (SIGSEGV)"."""
        assert self._process is not None
        try:
            status = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:  # it is alive, but a reward has closed the connection
            return "worker closed its connection"
        cause = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return f"worker died ({cause})"

    def stop(self) -> None:
        """Kill the process and all processes that its rewards have started."""
        if self._process is None:
            return
        # The group outlives its leader as long as there are children. Without any, it no longer exists.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._sender is not None:
            self._sender.shutdown(cancel_futures=True)
        self.connection.close()
        self._process = None
        self.warm.clear()


def share_memory(descriptor: int) -> mmap.mmap:
    """Map a file of `ID_BYTES` bytes, through which the worker tells the trainer which call is running."""
    os.truncate(descriptor, ID_BYTES)
    return mmap.mmap(descriptor, ID_BYTES)


# --- In the worker process ----------------------------------------------------------------------------------


def serve(socket_descriptor: int, memory_descriptor: int, concurrent: bool) -> None:
    """Run the worker process until the trainer closes the connection."""
    # Processes that a reward starts must not inherit the connection and keep it open.
    os.set_inheritable(socket_descriptor, False)
    os.set_inheritable(memory_descriptor, False)
    connection = Connection(socket_descriptor)
    try:
        rewards = cloudpickle.loads(connection.recv_bytes())
        calls = {name: RewardCall(reward) for name, reward in rewards.items()}
    except BaseException:
        connection.send_bytes(pickle.dumps(traceback.format_exc()))
        return
    connection.send_bytes(pickle.dumps(None))
    if concurrent:
        asyncio.run(ConcurrentServer(connection, calls, share_memory(memory_descriptor)).run())
    else:
        serve_one_by_one(connection, calls)


def serve_one_by_one(connection: Connection, rewards: Mapping[str, RewardCall]) -> None:
    """Make one call at a time. No event loop is running, so that a reward may use `asyncio.run`."""
    pid = os.getpid()
    while True:
        try:
            call: Call = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        set_orphan_timer(call.time_limit + ORPHAN_GRACE)
        reply = attempt(
            rewards[call.name], call, BaseException
        )  # a reward's sys.exit must not end the worker
        if os.getpid() != pid:  # the reward has forked, and this is the child
            os._exit(0)
        connection.send_bytes(pickle.dumps(reply))
        set_orphan_timer(0)


class ConcurrentServer:
    """Makes many calls of async rewards at a time."""

    def __init__(self, connection: Connection, rewards: Mapping[str, RewardCall], memory: mmap.mmap):
        self.connection = connection
        self.rewards = rewards
        self.memory = memory
        # The end of the time limit of each running call. The tasks are its keys because asyncio itself keeps
        # only weak references to them.
        self.deadlines: dict[asyncio.Task[None], float] = {}
        self.lock = asyncio.Lock()

    async def run(self) -> None:
        """Receive calls and reply to them until the trainer closes the connection."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self.connection.fileno(), self._receive)
        await loop.create_future()  # forever

    def _receive(self) -> None:
        try:
            call: Call = pickle.loads(self.connection.recv_bytes())
        except EOFError:
            os._exit(0)  # the trainer has ended, and nobody reads the replies of calls that are running
        task = asyncio.get_running_loop().create_task(TrackedCall(self._answer(call), call.id, self.memory))
        self.deadlines[task] = time.monotonic() + call.time_limit
        self._set_timer()
        task.add_done_callback(self._finish)

    async def _answer(self, call: Call) -> None:
        payload = pickle.dumps(await attempt_async(self.rewards[call.name], call))
        async with self.lock:
            # In a thread: if the trainer is sending, too, both would wait for the other one to read.
            await asyncio.to_thread(self.connection.send_bytes, payload)

    def _finish(self, task: asyncio.Task[None]) -> None:
        del self.deadlines[task]
        self._set_timer()

    def _set_timer(self) -> None:
        deadline = max(self.deadlines.values(), default=None)
        set_orphan_timer(0 if deadline is None else deadline - time.monotonic() + ORPHAN_GRACE)


class TrackedCall(Coroutine[Any, Any, None]):
    """A coroutine that writes the id of its call to shared memory while it holds the event loop."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], call_id: int, memory: mmap.mmap):
        self.coroutine = coroutine
        self.id = call_id.to_bytes(ID_BYTES)
        self.memory = memory
        self.pid = os.getpid()

    def send(self, value: Any) -> Any:
        """Run the coroutine up to its next `await`."""
        with self._holding_the_loop():
            return self.coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an exception, such as that of a cancellation, in the coroutine."""
        with self._holding_the_loop():
            return self.coroutine.throw(*error)

    def close(self) -> None:
        """Close the coroutine."""
        self.coroutine.close()

    def __await__(self) -> Generator[Any, Any, None]:
        return self.coroutine.__await__()

    @contextmanager
    def _holding_the_loop(self) -> Iterator[None]:
        self.memory[:ID_BYTES] = self.id
        try:
            yield
        finally:
            if os.getpid() != self.pid:  # the reward has forked, and this is the child
                os._exit(0)
            self.memory[:ID_BYTES] = bytes(ID_BYTES)


def set_orphan_timer(seconds: float) -> None:
    """End this process after some seconds; 0 turns that off.

    If the trainer is killed while a reward hangs, only this timer ends the worker: SIGALRM kills it.
    """
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0))


# --- Making a call, in a worker or in the trainer's process -------------------------------------------------


def attempt(
    reward: RewardCall,
    call: Call,
    caught: type[BaseException] = Exception,
    fatal: tuple[type[BaseException], ...] = (),
) -> Reply:
    """Make a call, with retries.

    Exceptions of type `caught` that the reward raises become failures, except for those of a type in `fatal`.
    """
    started = time.monotonic()
    delays = backoff_delays(call.num_retries)
    while True:
        log = RewardLog(len(call.rows))  # a failed attempt logs nothing
        try:
            values = reward(call.rows, call.trainer_state, log)
            break
        except fatal:
            raise
        except caught as error:
            delay = retry_delay(error, delays, started + call.time_limit)
            if delay is None:
                return failed_reply(call, describe_failure(error), started)
            time.sleep(delay)
    return make_reply(call, values, log, started)


async def attempt_async(reward: RewardCall, call: Call) -> Reply:
    """Make a call of an async reward, with retries; it is cancelled when its time limit is over."""
    started = time.monotonic()
    delays = backoff_delays(call.num_retries)
    try:
        async with asyncio.timeout(call.time_limit):
            while True:
                log = RewardLog(len(call.rows))  # a failed attempt logs nothing
                try:
                    values = await reward.score(call.rows, call.trainer_state, log)
                    break
                except Exception as error:  # not a cancellation
                    delay = retry_delay(error, delays, started + call.time_limit)
                    if delay is None:
                        return failed_reply(call, describe_failure(error), started)
                    await asyncio.sleep(delay)
    except TimeoutError:  # of the limit: those of the reward are caught above
        return failed_reply(call, timeout_failure(call.time_limit), started, timed_out=True)
    except BaseException as error:
        return failed_reply(call, describe_failure(error), started)
    return make_reply(call, values, log, started)


def retry_delay(error: BaseException, delays: Iterator[float], deadline: float) -> float | None:
    """Return the seconds to wait before a retry, or None if there is none."""
    delay = next(delays, None) if is_transient(error) else None
    # Without time for a retry, the error says more than "timed out" would.
    return None if delay is None or time.monotonic() + delay >= deadline else delay


def make_reply(call: Call, values: Sequence[Value], log: RewardLog, started: float) -> Reply:
    """Return the reply to a call that returned, maybe with exceptions in place of some values."""
    checked = [describe_failure(value) if isinstance(value, Exception) else value for value in values]
    return Reply(call.id, checked, log, time.monotonic() - started)


def failed_reply(call: Call, failure: Failure, started: float, *, timed_out: bool = False) -> Reply:
    """Return the reply to a call that failed on all of its rows."""
    num_rows = len(call.rows)
    return Reply(call.id, [failure] * num_rows, RewardLog(num_rows), time.monotonic() - started, timed_out)


def describe_failure(error: BaseException) -> Failure:
    """Convert an exception to a `Failure`: its type and the first line of its message, and the traceback."""
    reason = f"{type(error).__name__}: {first_line(str(error))}".rstrip(": ")
    return Failure(reason, "".join(traceback.format_exception(error)))


def timeout_failure(seconds: float) -> Failure:
    """Return the failure of a call that exceeded its time limit."""
    return Failure(f"timed out after {seconds:g} s")
