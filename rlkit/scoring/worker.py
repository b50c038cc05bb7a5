"""A worker process that runs rewards, and the trainer's handle on it.

The trainer sends one work unit at a time, pickled: the names of rewards, the rows to score, and the time
limit in seconds. The worker sends one reply per reward, up to the first failure. So if it hangs or crashes,
the trainer knows which reward was running.

The worker is a new interpreter, not a `multiprocessing` child, which would import the trainer's main module
and with it torch at every restart. It leads its own process group. So a kill also reaches the processes that
a reward has started, and Ctrl-C does not reach the worker: the trainer decides when it stops. POSIX only.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from rlkit.errors import RewardError, first_line
from rlkit.reward import RewardCall, Row

START_TIMEOUT = 300.0  # seconds to start the process and import the rewards
ORPHAN_GRACE = 5.0  # seconds past the time limit after which a worker without a trainer ends itself


@dataclass
class Failure:
    """The failure of a reward: a one-line reason and the traceback."""

    reason: str
    traceback: str


WorkerReply = list[float | None] | Failure


class Worker:
    """The trainer's handle on a worker process: starts it, reads its replies, kills it.

    Args:
        rewards: Dict of rewards by name, pickled with cloudpickle.
    """

    def __init__(self, rewards: bytes):
        self._rewards = rewards
        self._process: subprocess.Popen[bytes] | None = None
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
        # The worker imports every module from the same place as the trainer.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from rlkit.scoring.worker import serve; serve({worker_end.fileno()})"
        )
        with worker_end:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,  # a reward must not read the trainer's terminal
                pass_fds=[worker_end.fileno()],
                start_new_session=True,
            )
        self.connection = Connection(trainer_end.detach())
        try:
            self.connection.send_bytes(self._rewards)
            problem = self.receive() if self.connection.poll(START_TIMEOUT) else "timed out"
        except (EOFError, OSError):
            problem = self.exit_reason()
        if problem is not None:
            self.stop()
            raise RewardError(f"a reward worker failed to start: {problem}")

    def receive(self) -> Any:
        """Return the next reply.

        Raises:
            EOFError, OSError: The process has ended.
        """
        return pickle.loads(self.connection.recv_bytes())

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
        self.connection.close()
        self._process = None


def serve(file_descriptor: int) -> None:
    """Run the worker process: load the rewards, then score rows until the trainer closes the connection."""
    # Processes that a reward starts must not inherit the connection and keep it open.
    os.set_inheritable(file_descriptor, False)
    connection = Connection(file_descriptor)
    try:
        rewards = cloudpickle.loads(connection.recv_bytes())
        calls = {name: RewardCall(reward) for name, reward in rewards.items()}
    except BaseException:
        connection.send_bytes(pickle.dumps(traceback.format_exc()))
        return
    connection.send_bytes(pickle.dumps(None))
    while True:
        try:
            names, rows, limit = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        # If the trainer is killed while a reward hangs, only this timer ends the process: SIGALRM kills it.
        signal.setitimer(signal.ITIMER_REAL, limit + ORPHAN_GRACE)
        for name in names:
            reply = attempt(calls[name], rows, BaseException)  # a reward's sys.exit must not end the worker
            connection.send_bytes(pickle.dumps(reply))
            if isinstance(reply, Failure):
                break
        signal.setitimer(signal.ITIMER_REAL, 0)


def attempt(call: RewardCall, rows: Sequence[Row], caught: type[BaseException] = Exception) -> WorkerReply:
    """Score rows; an exception of type `caught` that the reward raises becomes a `Failure`."""
    try:
        return call(rows)
    except caught as error:
        return describe_failure(error)


def describe_failure(error: BaseException) -> Failure:
    """Convert an exception to a `Failure`: its type and the first line of its message, and the traceback."""
    reason = f"{type(error).__name__}: {first_line(str(error))}".rstrip(": ")
    return Failure(reason, traceback.format_exc())
