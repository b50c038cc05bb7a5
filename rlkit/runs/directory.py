"""The run directory: `config.yaml`, `metrics.jsonl`, `rollouts/`, `checkpoint-N/`, `evaluation/`, `model/`.

A background thread writes the rollouts, so that training does not wait for the disk.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
import shutil
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, SupportsFloat

from rlkit.errors import UserError, first_line, one_line
from rlkit.files import atomic_write, replace
from rlkit.registry import author_frames

logger = logging.getLogger(__name__)

LOCK = ".lock"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
MAX_PENDING_WRITES = 4  # bounds the rollouts in memory: training waits for a disk that is slower than it


class RunDirectory:
    """The folder with all files of a run. Only the main process writes to it.

    It is a context manager: on exit, pending rollouts are written no matter how training ended.

    Args:
        path: Path of the folder; nothing is created yet.
        stage: "sft", "train" or "rank"; written to every line of the metrics.
    """

    def __init__(self, path: Path, stage: str):
        self.path = path
        self.stage = stage
        self.start_time = time.monotonic()
        # A single thread keeps the order of steps. Python joins it before the process exits.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._pending: deque[Future[None]] = deque()
        self._lock: IO[str] | None = None
        self._last_saved: tuple[int, list[Mapping[str, Any]]] = (0, [])  # last step and its rollouts so far

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.flush()
            return
        # A failed write is only logged, because the exception that ended training must propagate.
        while self._pending:
            failure = self._pending.popleft().exception()
            if failure is not None:
                logger.error("%s", failure)

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Check that a run may use the folder. Nothing is created or deleted.

        Args:
            resume: Whether to resume the run in the folder.
            overwrite: Whether to delete the run in the folder.

        Raises:
            UserError: The folder contains files and neither argument is set, it is to be deleted but is not a
                run directory, or it cannot be created.
        """
        if resume and overwrite:
            raise UserError("set --resume or --overwrite, not both")
        if self.is_used() and not resume:
            if not overwrite:
                raise UserError(
                    f"the run directory {self.path} exists: resume it with --resume, delete it with "
                    "--overwrite, or choose another --output_dir"
                )
            # --overwrite with a mistyped path must not delete somebody's home directory.
            if not (self.path / "config.yaml").is_file():
                raise UserError(
                    f"refusing to delete {self.path}: it is not a run directory (it has no config.yaml)"
                )
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not parent.is_dir():
            raise UserError(f"cannot create the run directory {self.path}: {parent} is a file")
        if not os.access(parent, os.W_OK):
            raise UserError(f"cannot create the run directory {self.path}: {parent} is not writable")

    def prepare(self, *, resume: bool, overwrite: bool) -> None:
        """Check that a run may use the folder, and lock it if it exists.

        Called before the model and the tasks are loaded, so apart from the lock file nothing is created or
        deleted: loading may still fail. Arguments are those of `check`.

        Raises:
            UserError: `check` rejects the folder, or another process is writing to it.
        """
        self.check(resume=resume, overwrite=overwrite)
        if self.path.is_dir():
            self._acquire_lock()

    def open(self, *, resume: bool, overwrite: bool) -> None:
        """Create the folder, or empty it if `overwrite`, and lock it until `close`.

        Arguments and errors are those of `prepare`.
        """
        self.prepare(resume=resume, overwrite=overwrite)
        self._acquire_lock()
        try:
            if overwrite:
                self._delete_contents()
            for folder in ("rollouts", "evaluation"):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        logger.debug("run directory %s: %s", "resumed" if resume else "opened", self.path)

    def is_used(self) -> bool:
        """Return whether the folder contains any file except the lock."""
        return any(file.is_file() and file.name != LOCK for file in self.path.rglob("*"))

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"cannot write to the run directory {self.path}: {error.strerror or error}")

    def _delete_contents(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()

    def _acquire_lock(self) -> None:
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("a+")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            # A POSIX record lock is released when this process ends for whatever reason, and forked children
            # do not inherit it. An flock lock would outlive the process in its children.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise UserError(f"{holder} is writing to {self.path}: wait until it ends, or stop it") from None
        except OSError:  # the file system does not support locks
            pass
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def rewind(self, step: int) -> None:
        """Delete the metrics, rollouts and evaluations that this stage wrote after a step.

        A resumed run rewinds to its checkpoint, so that it ends with the same files as an uninterrupted run.
        The clock continues from the last remaining line of the metrics.
        """
        logger.debug("run directory rewound to step %s: %s", step, self.path)
        self.flush()
        self._last_saved = (0, [])
        rollouts = self.path / "rollouts"
        files = list((self.path / "evaluation").glob("step-*.json"))
        if self.stage == "train":
            files += rollouts.glob("step-*.parquet")
        for path in files:
            if int(path.stem.split("-")[1]) > step:
                path.unlink()
        for path in rollouts.glob("*.partial"):  # from a run that was killed during a write
            path.unlink()
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        lines = [line for line in map(_parse_line, path.read_text().splitlines()) if line is not None]
        lines = [line for line in lines if line["stage"] != self.stage or line["step"] <= step]
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines))
        seconds = [line["seconds"] for line in lines if line["stage"] == self.stage]
        self.start_time = time.monotonic() - max(seconds, default=0.0)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line of metrics. NaN and infinity, which JSON cannot represent, become null."""
        line = {"step": step, "stage": self.stage, "seconds": round(time.monotonic() - self.start_time, 2)}
        line |= {key: _to_json(value) for key, value in metrics.items()}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def save_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rollouts to the Parquet file of their step, atomically and in the background.

        The method may return before the file is on disk (see `flush`), so the caller must not change the rows
        afterwards. If a step generates several times, later rows are appended to those of the same step.

        Args:
            step: Optimizer step that the rollouts are for.
            rows: One record per rollout (`rlkit.runs.record`).

        Raises:
            UserError: An earlier write failed. These rows are still queued.
        """
        try:
            while self._pending and (self._pending[0].done() or len(self._pending) >= MAX_PENDING_WRITES):
                self._pending.popleft().result()
        finally:
            earlier = self._last_saved[1] if self._last_saved[0] == step else []
            rows = [*earlier, *rows]
            self._last_saved = step, rows
            self._pending.append(self._writer.submit(self._write_rollouts, step, rows))

    def flush(self) -> None:
        """Wait until all saved rollouts are on disk; raises UserError if a write failed."""
        while self._pending:
            self._pending.popleft().result()

    def _write_rollouts(self, step: int, rows: list[Mapping[str, Any]]) -> None:
        from rlkit.runs.record import record_frame  # imports pandas, which `check` does not need

        path = self.path / "rollouts" / f"step-{step:06d}.parquet"
        partial = path.with_suffix(".partial")
        try:
            record_frame(rows).to_parquet(partial)
            replace(partial, path)
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise UserError(f"cannot write the rollouts of step {step} to {path}: {reason}") from error


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Convert a failed write, as on a full disk, to a one-line UserError.

    Args:
        folder: Run directory, which the message names because its checkpoints are kept.
    """
    try:
        yield
    except Exception as error:
        reason = None if author_frames(error) else _write_error(error)
        if reason is None:
            raise
        raise UserError(
            f"cannot write {reason}; earlier checkpoints in {folder} are kept: free disk space, then resume "
            "with --resume"
        ) from error


def _write_error(error: Exception) -> str | None:
    """Return which file could not be written and why, or None if the error is not a failed write."""
    if isinstance(error, OSError):
        if error.errno not in DISK_ERRORS:
            return None
        return f"{error.filename or 'a file'}: {error.strerror}"
    message = one_line(error)
    # safetensors and torch.save report a full disk with exceptions that are not OSErrors.
    if match := re.search(r"I/O error: (.+) \(os error \d+\)", message):
        return f"a checkpoint: {match[1]}"
    if isinstance(error, RuntimeError) and re.search(r"unexpected pos \d|file write failed", message):
        return "a checkpoint: the file is truncated, probably because the disk is full"
    return None


def _parse_line(line: str) -> dict[str, Any] | None:
    """Parse a line of the metrics, or return None if the run was killed while writing it."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _to_json(value: SupportsFloat | str | None) -> float | str | None:
    if isinstance(value, bool | int | str) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None
