"""A run directory: `config.yaml`, `metrics.jsonl`, `rollouts/`, `checkpoint-N/`, `evaluation/`, `model/`.

Rollouts are written by a thread of their own, so that training does not wait for the disk.
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
WAITING = 4  # steps of rollouts in memory: a disk that is slower than the training holds it up


class RunDirectory:
    """Where one run keeps everything; only the main process writes to it.

    As a context manager it writes the rollouts that wait however the training ends.
    """

    def __init__(self, path: Path, stage: str):
        """Name the folder; `stage` ("sft", "train" or "rank") is in every line of the metrics."""
        self.path = path
        self.stage = stage
        self.started = time.monotonic()
        # One thread, so that steps are written in their order. Python joins it before the process exits.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._waiting: deque[Future[None]] = deque()
        self._lock: IO[str] | None = None
        self._last_saved: tuple[int, list[Mapping[str, Any]]] = (0, [])  # a step and its rollouts so far

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
        while self._waiting:  # what ended the training is the error to raise; this one is only logged
            failure = self._waiting.popleft().exception()
            if failure is not None:
                logger.error("%s", failure)

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Check that a run may use the folder; nothing is created or deleted.

        Raises:
            UserError: it holds something already, and neither `resume` nor `overwrite` is given; it is not a
                run directory; or it cannot be made.
        """
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        if self.is_used() and not resume:
            if not overwrite:
                raise UserError(
                    f"the run directory {self.path} exists: resume it with --resume, delete it with "
                    "--overwrite, or choose another --output_dir"
                )
            # --overwrite with a mistyped path must not delete somebody's home.
            if not (self.path / "config.yaml").is_file():
                raise UserError(
                    f"{self.path} is not a run directory (it has no config.yaml): it is not deleted"
                )
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not parent.is_dir():
            raise UserError(f"the run directory {self.path} cannot be made: {parent} is a file")
        if not os.access(parent, os.W_OK):
            raise UserError(f"the run directory {self.path} cannot be made: {parent} is not writable")

    def prepare(self, *, resume: bool, overwrite: bool) -> None:
        """Check that a run may use the folder, and keep others from writing to one that exists.

        Nothing is created or deleted but the lock of a folder that is there: the model and the tasks of the
        run are not loaded yet.

        Raises:
            UserError: what `check` raises, or another process writes to the folder.
        """
        self.check(resume=resume, overwrite=overwrite)
        if self.path.is_dir():
            self._hold()

    def open(self, *, resume: bool, overwrite: bool) -> None:
        """Create the folder, emptied if `overwrite`, and keep others from writing to it until `close`.

        Raises:
            UserError: what `prepare` raises.
        """
        self.prepare(resume=resume, overwrite=overwrite)
        self._hold()
        try:
            if overwrite:
                self._delete()
            for folder in ("rollouts", "evaluation"):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        logger.debug("run directory %s: %s", "resumed" if resume else "opened", self.path)

    def is_used(self) -> bool:
        """Return whether the folder holds a file of any kind."""
        return any(file.is_file() and file.name != LOCK for file in self.path.rglob("*"))

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"cannot write to the run directory {self.path}: {error.strerror or error}")

    def _delete(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()

    def _hold(self) -> None:
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("a+")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            # The system lets go of it when this process ends, however it does; forks of it do not hold it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise UserError(f"{holder} still writes to {self.path}: wait until it ends, or stop it") from None
        except OSError:  # a file system without locks
            pass
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock

    def close(self) -> None:
        """Let others write to the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def rewind(self, step: int) -> None:
        """Take back what this stage wrote after a step: a resumed run leaves what a whole one would."""
        logger.debug("run directory rewound to step %s: %s", step, self.path)
        self.flush()
        self._last_saved = (0, [])
        rollouts = self.path / "rollouts"
        written = list(rollouts.glob("step-*.parquet")) if self.stage == "train" else []
        for path in [*written, *(self.path / "evaluation").glob("step-*.json")]:
            if int(path.stem.split("-")[1]) > step:
                path.unlink()
        for path in rollouts.glob("*.partial"):  # of a run that was killed while it wrote
            path.unlink()
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        lines = [line for line in map(_read_line, path.read_text().splitlines()) if line is not None]
        kept = [line for line in lines if line["stage"] != self.stage or line["step"] <= step]
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept))
        seconds = [line["seconds"] for line in kept if line["stage"] == self.stage]
        self.started = time.monotonic() - max(seconds, default=0.0)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line of metrics; numbers that JSON cannot say (NaN, infinity) become null."""
        line = {"step": step, "stage": self.stage, "seconds": round(time.monotonic() - self.started, 2)}
        line |= {key: _plain(value) for key, value in metrics.items()}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def save_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Have rollouts written to the Parquet file of their step, atomically.

        Returns before they are on the disk (see `flush`), so the rows must not change any more. A step with
        several generations is saved several times: rows are added to those of the same step.

        Raises:
            UserError: rollouts handed over before could not be written.
        """
        try:
            while self._waiting and (self._waiting[0].done() or len(self._waiting) >= WAITING):
                self._waiting.popleft().result()
        finally:  # these rows are not lost with the earlier ones
            rows = [*(self._last_saved[1] if self._last_saved[0] == step else []), *rows]
            self._last_saved = step, rows
            self._waiting.append(self._writer.submit(self._write_rollouts, step, rows))

    def flush(self) -> None:
        """Return when all rollouts handed over are on the disk; raises what `save_rollouts` does."""
        while self._waiting:
            self._waiting.popleft().result()

    def _write_rollouts(self, step: int, rows: list[Mapping[str, Any]]) -> None:
        from rlkit.runs.record import record_frame  # imports pandas, which `check` does not need

        path = self.path / "rollouts" / f"step-{step:06d}.parquet"
        partial = path.with_suffix(".partial")
        try:
            record_frame(rows).to_parquet(partial)
            replace(partial, path)
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise UserError(f"the rollouts of step {step} are lost: cannot write {path}: {reason}") from error


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Turn a failed write, such as on a full disk, into a UserError of one line.

    Args:
        folder: the run directory, whose earlier checkpoints can be resumed.
    """
    try:
        yield
    except Exception as error:
        reason = None if author_frames(error) else _write_error(error)
        if reason is None:
            raise
        raise UserError(
            f"cannot write {reason}; earlier checkpoints in {folder} are kept: make room, then resume with "
            "--resume"
        ) from error


def _write_error(error: Exception) -> str | None:
    """Return which file could not be written and why, or None for an error of another kind."""
    if isinstance(error, OSError):
        file = f"{error.filename}: " if error.filename else "a file: "
        return f"{file}{error.strerror}" if error.errno in DISK_ERRORS else None
    text = one_line(error)
    if found := re.search(r"I/O error: (.+) \(os error \d+\)", text):  # safetensors
        return f"a checkpoint: {found[1]}"
    if isinstance(error, RuntimeError) and re.search(r"unexpected pos \d|file write failed", text):  # torch
        return "a checkpoint: it is cut short, as on a full disk"
    return None


def _read_line(text: str) -> dict[str, Any] | None:
    try:
        return json.loads(text)
    except json.JSONDecodeError:  # the last one, of a run that was killed while it wrote
        return None


def _plain(value: SupportsFloat | str | None) -> float | str | None:
    if isinstance(value, bool | int | str) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None
