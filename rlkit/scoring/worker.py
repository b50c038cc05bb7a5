"""A worker process that runs rewards, and the handle by which a trainer holds it.

The trainer sends one unit of work at a time, pickled: names of rewards, the rows to judge, the limit in
seconds. The worker answers with one reply for each reward, up to the first failure, so that when it falls
silent or dies the trainer knows in which reward that was.

The worker is a fresh interpreter, not a `multiprocessing` child: that would import the trainer's main module
again, and torch with it, at every restart. It leads a process group of its own, so that a kill also reaches
what a reward has started, and Ctrl-C does not reach it: the trainer decides what happens to it. POSIX only.
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

START_LIMIT = 300.0  # seconds to import what the rewards import
ORPHAN_GRACE = 5.0  # seconds beyond the limit after which a worker whose trainer is gone ends itself


@dataclass
class Failure:
    """Why a reward gave no value."""

    reason: str
    traceback: str


WorkerReply = list[float | None] | Failure


class Worker:
    """The trainer's end: starts the process, reads its replies, kills it."""

    def __init__(self, rewards: bytes):
        """`rewards`: a cloudpickled dict of rewards by name."""
        self._rewards = rewards
        self._process: subprocess.Popen[bytes] | None = None
        self.connection: Connection

    def start(self) -> None:
        """Start the process unless it runs, and wait until it has loaded the rewards.

        Raises:
            RewardError: it could not load them.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()  # what is left of a process that has ended between two batches
        ours, theirs = socket.socketpair()
        # The worker finds every module where the trainer does.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from rlkit.scoring.worker import serve; serve({theirs.fileno()})"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.connection = Connection(ours.detach())
        try:
            self.connection.send_bytes(self._rewards)
            problem = self.receive() if self.connection.poll(START_LIMIT) else "timed out"
        except (EOFError, OSError):
            problem = self.death()
        if problem is not None:
            self.stop()
            raise RewardError(f"a reward process did not start: {problem}")

    def receive(self) -> Any:
        """Return the next reply. Raises EOFError or OSError when the process is gone."""
        return pickle.loads(self.connection.recv_bytes())

    def death(self) -> str:
        """Say how the process ended."""
        assert self._process is not None
        try:
            status = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:  # it lives, but has closed the connection
            return "worker closed its connection"
        cause = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return f"worker died ({cause})"

    def stop(self) -> None:
        """Kill the process and what it has started."""
        if self._process is None:
            return
        # Its own children keep the group alive after the leader has ended; without any the group is gone.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.connection.close()
        self._process = None


def serve(file_descriptor: int) -> None:
    """Be the worker process: load the rewards, then judge rows until the trainer closes the connection."""
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
        # Should the trainer be killed while a reward hangs, the default action of this signal ends us.
        signal.setitimer(signal.ITIMER_REAL, limit + ORPHAN_GRACE)
        for name in names:
            reply = attempt(calls[name], rows, BaseException)  # sys.exit ends no worker
            connection.send_bytes(pickle.dumps(reply))
            if isinstance(reply, Failure):
                break
        signal.setitimer(signal.ITIMER_REAL, 0)


def attempt(call: RewardCall, rows: Sequence[Row], caught: type[BaseException] = Exception) -> WorkerReply:
    """Judge rows; an error that the reward raises, if it is a `caught`, becomes a `Failure`."""
    try:
        return call(rows)
    except caught as error:
        return describe(error)


def describe(error: BaseException) -> Failure:
    """Return the error as a `Failure`: the type and first line of the message, and the traceback."""
    reason = f"{type(error).__name__}: {first_line(str(error))}".rstrip(": ")
    return Failure(reason, traceback.format_exc())
