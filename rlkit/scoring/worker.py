"""A worker process that runs rewards, and the trainer's handle on it.

The trainer sends calls of rewards, pickled (`Call`); the worker replies to each with a `Reply`. Calls and
replies carry the call's id, so that a late reply, or one from a forked child, is never mistaken for the reply
to another call.

There are two kinds of workers. One runs a single call at a time; if it hangs or crashes, the trainer knows
which call is to blame. The other runs async rewards, many calls at a time in one event loop. It notes in
shared memory which call holds the event loop and since when, for the same purpose.

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
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from rlkit.errors import RewardError, first_line
from rlkit.reward import RewardCall, RewardLog, Row, TrainerState, Value
from rlkit.scoring.limits import START_TIMEOUT
from rlkit.scoring.retries import backoff_delays, is_transient

MAX_REASON, MAX_TRACEBACK = 1000, 20_000  # characters of a failure; an exception may quote a rollout
ORPHAN_GRACE = 5.0  # seconds past the time limit after which a worker without a trainer ends itself
# The shared memory: id of the call that holds the event loop (0: none), and since when (`time.monotonic`).
HOLDER = struct.Struct("=qd")
# Precedes a pickled call, so that one that cannot be unpickled gets a reply: its id and number of rows.
HEADER = struct.Struct("=qq")


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
        self._socket: socket.socket
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
            shared.write(HOLDER.pack(0, 0.0))
            shared.flush()
            self._memory = share_memory(shared.fileno())
            descriptors = [worker_end.fileno(), shared.fileno()]
            arguments = ", ".join(map(str, [*descriptors, self.concurrent]))
            # The worker imports every module from the same place as the trainer.
            code = (
                f"import sys; sys.path[:] = {[str(path) for path in sys.path]!r}\n"
                f"from rlkit.scoring.worker import serve; serve({arguments})"
            )
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,  # a reward must not read the trainer's terminal
                pass_fds=descriptors,
                start_new_session=True,
            )
        self._socket = trainer_end
        self.connection = Connection(os.dup(trainer_end.fileno()))
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
        """Send a call of `pack_call`. If the worker has died, the next `receive` reports it."""
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

    def holder(self) -> tuple[int, float]:
        """Return the id of the call that holds the event loop (0: none), and for how many seconds."""
        assert self._memory is not None
        call_id, since = HOLDER.unpack(self._memory[:])
        return call_id, time.monotonic() - since

    def exit_reason(self) -> str:
        """Return how the process ended, such as "worker died (SIGSEGV)"."""
        assert self._process is not None
        try:
            status = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:  # it is alive, but a reward has closed the connection
            return "worker closed its connection"
        if status >= 0:
            return f"worker died (exit status {status})"
        try:
            return f"worker died ({signal.Signals(-status).name})"
        except ValueError:  # a real-time signal, which has no name
            return f"worker died (signal {-status})"

    def stop(self) -> None:
        """Kill the process and all processes that its rewards have started in its process group."""
        if self._process is None:
            return
        # The group outlives its leader as long as there are children. Without any, it no longer exists; on
        # macOS, killing a group of zombies is a PermissionError.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # A process in another group may hold the worker's end, so that a blocked send would never fail.
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self._sender is not None:
            self._sender.shutdown(cancel_futures=True)
        self.connection.close()
        self._process = None
        self.warm.clear()


def share_memory(descriptor: int) -> mmap.mmap:
    """Map the file through which a worker tells the trainer which call holds its event loop."""
    return mmap.mmap(descriptor, HOLDER.size)


def pack_call(call: Call) -> bytes:
    """Pickle a call for a worker."""
    return HEADER.pack(call.id, len(call.rows)) + pickle.dumps(call)


def unpack_call(message: bytes) -> Call | Reply:
    """Return the call of `pack_call`, or the reply that it cannot be unpickled in this process."""
    started = time.monotonic()
    try:
        return pickle.loads(message[HEADER.size :])
    except Exception as error:  # unpickling a column's value may raise anything
        call_id, num_rows = HEADER.unpack(message[: HEADER.size])
        return failed_reply(call_id, num_rows, describe_failure(error), started)


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
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(
                ConcurrentServer(connection, calls, share_memory(memory_descriptor)).run()
            )
        finally:
            os._exit(1)  # a reward has stopped the loop: the calls that are running must not be cancelled
    else:
        serve_one_by_one(connection, calls)


def serve_one_by_one(connection: Connection, rewards: Mapping[str, RewardCall]) -> None:
    """Make one call at a time. No event loop is running, so that a reward may use `asyncio.run`."""
    pid = os.getpid()
    while True:
        try:
            call = unpack_call(connection.recv_bytes())
        except EOFError:
            os._exit(0)  # a thread that a reward has started must not keep the process alive
        if isinstance(call, Reply):
            connection.send_bytes(pickle.dumps(call))
            continue
        set_orphan_timer(call.time_limit + ORPHAN_GRACE)
        # BaseException, because a reward's sys.exit must not end the worker.
        reply = attempt(rewards[call.name], call, BaseException)
        if os.getpid() != pid:  # the reward has forked, and this is the child
            os._exit(0)
        connection.send_bytes(pickle.dumps(reply))
        set_orphan_timer(0)


current_call: ContextVar[int] = ContextVar("current_call", default=0)  # id; tasks inherit it


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
        loop.set_task_factory(self._make_task)
        loop.add_reader(self.connection.fileno(), self._receive)
        await loop.create_future()  # forever

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coroutine: Any, context: Context | None = None, **options: Any
    ) -> asyncio.Task[Any]:
        """Create a task that is tracked as a part of the call that creates it."""
        call_id = current_call.get() if context is None else context.get(current_call, 0)
        tracked = TrackedCoroutine(coroutine, call_id, self.memory)
        return asyncio.Task(tracked, loop=loop, context=context, **options)

    def _receive(self) -> None:
        try:
            call = unpack_call(self.connection.recv_bytes())
        except EOFError:
            os._exit(0)  # the trainer has ended, and nobody reads the replies of calls that are running
        context = copy_context()
        context.run(current_call.set, call.id)
        task = asyncio.get_running_loop().create_task(self._answer(call), context=context)
        time_limit = 0.0 if isinstance(call, Reply) else call.time_limit
        self.deadlines[task] = time.monotonic() + time_limit
        self._set_timer()
        task.add_done_callback(self._finish)

    async def _answer(self, call: Call | Reply) -> None:
        reply = call if isinstance(call, Reply) else await attempt_async(self.rewards[call.name], call)
        payload = pickle.dumps(reply)
        async with self.lock:
            # In a thread: if the trainer is sending, too, both would wait for the other one to read.
            await asyncio.to_thread(self.connection.send_bytes, payload)

    def _finish(self, task: asyncio.Task[None]) -> None:
        del self.deadlines[task]
        self._set_timer()

    def _set_timer(self) -> None:
        deadline = max(self.deadlines.values(), default=None)
        set_orphan_timer(0 if deadline is None else deadline - time.monotonic() + ORPHAN_GRACE)


class TrackedCoroutine(Coroutine[Any, Any, Any]):
    """A coroutine that writes the id of its call to shared memory while it holds the event loop."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], call_id: int, memory: mmap.mmap):
        self.coroutine = coroutine
        self.call_id = call_id
        self.memory = memory
        self.pid = os.getpid()

    def send(self, value: Any) -> Any:
        """Run the coroutine up to its next `await`."""
        return self._step(self.coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        """Raise an exception, such as that of a cancellation, in the coroutine."""
        return self._step(self.coroutine.throw, *error)

    def close(self) -> None:
        """Close the coroutine."""
        self.coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self.coroutine.__await__()

    def _step(self, method: Callable[..., Any], *args: Any) -> Any:
        previous = self.memory[:]  # not always empty: a task may start within the step of another one
        self.memory[:] = HOLDER.pack(self.call_id, time.monotonic())
        try:
            return method(*args)
        except (SystemExit, KeyboardInterrupt):  # these would end the loop, too, but not say whose they are
            os._exit(1)
        finally:
            if os.getpid() != self.pid:  # the reward has forked, and this is the child
                os._exit(0)
            self.memory[:] = previous


def set_orphan_timer(seconds: float) -> None:
    """End this process after some seconds; 0 turns that off.

    If the trainer is killed while a reward hangs, only this timer ends the worker: SIGALRM kills it, unless
    the reward uses that signal itself.
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
                return failed_reply(call.id, len(call.rows), describe_failure(error), started)
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
                        return failed_reply(call.id, len(call.rows), describe_failure(error), started)
                    await asyncio.sleep(delay)
    except TimeoutError:  # of the limit: those of the reward are caught above
        return failed_reply(
            call.id, len(call.rows), timeout_failure(call.time_limit), started, timed_out=True
        )
    except BaseException as error:
        return failed_reply(call.id, len(call.rows), describe_failure(error), started)
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


def failed_reply(
    call_id: int, num_rows: int, failure: Failure, started: float, *, timed_out: bool = False
) -> Reply:
    """Return the reply to a call that failed on all of its rows."""
    return Reply(call_id, [failure] * num_rows, RewardLog(num_rows), time.monotonic() - started, timed_out)


def describe_failure(error: BaseException) -> Failure:
    """Convert an exception to a `Failure`: its type and the first line of its message, and the traceback."""
    try:
        message, trace = first_line(str(error)), "".join(traceback.format_exception(error))
    except Exception:  # the exception's own __str__ may raise anything
        message, trace = "", f"{type(error).__name__}, whose message cannot be formatted"
    reason = f"{type(error).__name__}: {message}"[:MAX_REASON].rstrip(": ")
    return Failure(reason, trace[-MAX_TRACEBACK:])


def timeout_failure(seconds: float) -> Failure:
    """Return the failure of a call that exceeded its time limit."""
    return Failure(f"timed out after {seconds:.3g} s")
