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
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, SupportsFloat

from rlkit.errors import UserError, first_line, one_line
from rlkit.files import atomic_write, errors_with_path, replace, sync
from rlkit.registry import author_frames

logger = logging.getLogger(__name__)

LOCK = ".lock"
# A folder with this file was to be emptied by --overwrite, and the run was killed before that was done.
OVERWRITING = ".overwriting"
CONFIG = "config.yaml"
# Folders of results whose means are logged under the name of the folder, such as "evaluation/correct".
RESULTS = ("evaluation", "first_stage")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
WRONG_KIND = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR)  # a file in the place of a folder, or the reverse
DISK_ERRORS = (*FULL, *NOT_WRITABLE, *WRONG_KIND, errno.EIO, errno.ESTALE)
MAX_PENDING_WRITES = 4  # bounds the rollouts in memory: training waits for a disk that is slower than it


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Delete a new run directory if the block raises, unless it has files: trainers create it."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not existed:
            with suppress(OSError):
                folder.rmdir()
        raise


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
        self._lock: IO[bytes] | None = None
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
        """Check that a run may use the folder. A temporary file is created and deleted, and nothing else.

        Args:
            resume: Whether to resume the run in the folder.
            overwrite: Whether to delete the run in the folder.

        Raises:
            UserError: The folder contains files and neither argument is set, it is to be deleted but is not a
                run directory, or it cannot be created.
        """
        if resume and overwrite:
            raise UserError("set --resume or --overwrite, not both")
        try:
            self.path.exists()
        except OSError as error:  # for example, the name is too long
            reason = error.strerror or error
            raise UserError(f"output_dir cannot be a folder ({reason}): {str(self.path)!r:.60}") from error
        if self.is_used() and not resume:
            if not overwrite:
                raise UserError(
                    f"the run directory {self.path} exists: resume it with --resume, delete it with "
                    "--overwrite, or choose another --output_dir"
                )
            # --overwrite with a mistyped path must not delete somebody's home directory.
            if not any((self.path / name).is_file() for name in (CONFIG, OVERWRITING)):
                raise UserError(
                    f"refusing to delete {self.path}: it is not a run directory (it has no config.yaml)"
                )
        self.check_writable()

    def check_writable(self) -> None:
        """Raise UserError if the folder cannot be created or written to."""
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not parent.is_dir():
            raise UserError(f"cannot create the run directory {self.path}: {parent} is a file")
        try:
            # Permissions say too little: root may write to any folder, but not on a read-only file system.
            with tempfile.TemporaryFile(dir=parent) as file:
                file.write(b"x")
                file.flush()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"cannot create the run directory {self.path}: {parent} is not writable ({reason})"
            ) from error

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
            if overwrite or (self.path / OVERWRITING).exists():
                self._delete_contents()
            for folder in ("rollouts", "evaluation"):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            sync(self.path.absolute().parent)  # otherwise the entry of a new folder may be lost
        except OSError as error:
            raise self._unwritable(error) from error
        logger.debug("run directory %s: %s", "resumed" if resume else "opened", self.path)

    def is_used(self) -> bool:
        """Return whether the folder contains any file except those that a run killed at its start leaves."""
        return any(
            file.is_file() and file.name != LOCK and not file.match(f"{CONFIG}.*.partial")
            for file in self.path.rglob("*")
        )

    def save_config(self, text: str) -> None:
        """Write `config.yaml`; raise UserError if it cannot be written."""
        try:
            atomic_write(self.path / CONFIG, text)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        reason = f"{error.filename or self.path}: {error.strerror or error}; {_remedy(error.errno)}"
        return UserError(f"cannot write to the run directory: {reason}")

    def _delete_contents(self) -> None:
        # A run that is killed during the deletion leaves a part of the old run. It must be neither resumed
        # nor taken for a folder that is no run.
        (self.path / OVERWRITING).touch()
        sync(self.path)
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name not in (LOCK, OVERWRITING):
                entry.unlink()
        sync(self.path)
        (self.path / OVERWRITING).unlink()

    def _acquire_lock(self) -> None:
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Unbuffered: closing a file would try again to write what a full disk has rejected.
            lock = (self.path / LOCK).open("ab+", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            # A POSIX record lock is released when this process ends for whatever reason, and forked children
            # do not inherit it. An flock lock would outlive the process in its children.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            holder = lock.read().decode(errors="replace").strip() or "another process"
            lock.close()
            raise UserError(f"{holder} is writing to {self.path}: wait until it ends, or stop it") from None
        except OSError:  # the file system does not support locks
            pass
        self._lock = lock
        try:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def rewind(self, step: int, num_metrics: int | None = None) -> None:
        """Delete the metrics, rollouts and evaluations that this stage wrote after a checkpoint.

        A resumed run rewinds to its checkpoint, so that it ends with the same files as an uninterrupted run.
        The clock continues from the last remaining line of the metrics.

        Args:
            step: Step of the checkpoint, or 0 to start from the beginning.
            num_metrics: Number of lines of the metrics when the checkpoint was written. None keeps all lines
                up to the step.
        """
        logger.debug("run directory rewound to step %s: %s", step, self.path)
        self.flush()
        self._last_saved = (0, [])
        # Nothing reads these files of a run that was killed while it wrote them.
        for pattern in ("*.partial", "rollouts/*.partial", *(f"{folder}/*.partial" for folder in RESULTS)):
            for path in self.path.glob(pattern):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if self.stage == "train":
            for step_of_rollouts, path in _files_of_steps(self.path / "rollouts", ".parquet"):
                if step_of_rollouts > step:
                    path.unlink()
        lines = self._rewind_metrics(step, num_metrics)
        for folder in RESULTS:
            # A result whose means the killed run had not logged yet is computed again.
            logged = {line["step"] for line in lines if any(key.startswith(f"{folder}/") for key in line)}
            if num_metrics is None and step:  # a checkpoint without the number: assume that they were logged
                logged |= {0, step}
            (self.path / folder / "after.json").unlink(missing_ok=True)
            if 0 not in logged:
                (self.path / folder / "before.json").unlink(missing_ok=True)
            for step_of_result, path in _files_of_steps(self.path / folder, ".json"):
                if step_of_result > step or (step_of_result == step and step not in logged):
                    path.unlink()

    def _rewind_metrics(self, step: int, num_metrics: int | None) -> list[dict[str, Any]]:
        """Delete the lines of the metrics after a checkpoint, and return the remaining ones."""
        path = self.path / "metrics.jsonl"
        texts = path.read_text(errors="replace").splitlines()[:num_metrics] if path.exists() else []
        if len(texts) < (num_metrics or 0):
            logger.warning(
                "%s has %s of the %s lines that it had when the checkpoint was written: the report will lack "
                "the others",
                path,
                len(texts),
                num_metrics,
            )
        if not texts:
            return []
        lines = [line for line in map(_parse_line, texts) if line is not None]
        lines = [line for line in lines if line["stage"] != self.stage or line["step"] <= step]
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines))
        lines = [line for line in lines if line["stage"] == self.stage]
        self.start_time = time.monotonic() - max((line["seconds"] for line in lines), default=0.0)
        return lines

    def num_metrics(self) -> int:
        """Return the number of lines of `metrics.jsonl`."""
        path = self.path / "metrics.jsonl"
        return len(path.read_text(errors="replace").splitlines()) if path.exists() else 0

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line of metrics. NaN and infinity, which JSON cannot represent, become null."""
        line = {"step": step, "stage": self.stage, "seconds": round(time.monotonic() - self.start_time, 2)}
        line |= {key: _to_json(value) for key, value in metrics.items()}
        path = self.path / "metrics.jsonl"
        with errors_with_path(path), path.open("a") as file:
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
        """Wait until all saved rollouts and metrics are on disk; raises UserError if a write failed."""
        while self._pending:
            self._pending.popleft().result()
        if (self.path / "metrics.jsonl").exists():
            sync(self.path / "metrics.jsonl")

    def _write_rollouts(self, step: int, rows: list[Mapping[str, Any]]) -> None:
        from rlkit.runs.record import record_frame  # imports pandas, which `check` does not need

        path = self.path / "rollouts" / f"step-{step:06d}.parquet"
        partial = path.with_suffix(".partial")
        try:
            record_frame(rows).to_parquet(partial)
            replace(partial, path)
        except OSError as error:
            reason = error.strerror or first_line(error)
            message = f"cannot write the rollouts of step {step} to {path}: {reason}"
            raise UserError(f"{message}; {_remedy(error.errno)}, then resume with --resume") from error


def _files_of_steps(folder: Path, suffix: str) -> Iterator[tuple[int, Path]]:
    """Yield the files `step-N` in a folder with their steps, but none that somebody else has put there."""
    for path in list(folder.glob(f"step-*{suffix}")):
        if re.fullmatch("step-[0-9]+", path.stem):
            yield int(path.stem.removeprefix("step-")), path


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Convert a failed write, as on a full disk, to a one-line UserError.

    Args:
        folder: Run directory, which the message names because its checkpoints are kept.
    """
    try:
        yield
    except Exception as error:
        failure = None if author_frames(error) else write_error(error)
        if failure is None:
            raise
        reason, remedy = failure
        kept = f"earlier checkpoints in {folder} are kept"
        raise UserError(f"cannot write {reason}; {kept}: {remedy}, then resume with --resume") from error


def write_error(error: Exception) -> tuple[str, str] | None:
    """Return which file could not be written and why, and the remedy; None if that is not the error."""
    if isinstance(error, OSError):
        if error.errno not in DISK_ERRORS:
            return None
        return f"{error.filename or 'a file'}: {error.strerror}", _remedy(error.errno)
    message = one_line(error)
    # safetensors and torch.save report a full disk with exceptions that are not OSErrors.
    if match := re.search(r"I/O error: (.+) \(os error (\d+)\)", message):
        return f"a checkpoint: {match[1]}", _remedy(int(match[2]))
    if isinstance(error, RuntimeError):
        if re.search(r"unexpected pos \d|file write failed|iostream error", message):
            reason = "a checkpoint: the file is truncated, probably because the disk is full"
            return reason, _remedy(errno.ENOSPC)
        if match := re.search(r"open file failed with strerror: (.+)", message):
            numbers = (number for number in DISK_ERRORS if os.strerror(number) == match[1])
            return f"a checkpoint: {match[1]}", _remedy(next(numbers, None))
    return None


def _remedy(number: int | None) -> str:
    """Return what to do after a write has failed with an errno."""
    if number in FULL:
        return "free disk space"
    if number in NOT_WRITABLE:
        return "make the folder writable"
    if number in WRONG_KIND:
        return "move it out of the way"
    return "fix the disk"


def _parse_line(text: str) -> dict[str, Any] | None:
    """Parse a line of the metrics, or return None if the run was killed while writing it."""
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line if isinstance(line, dict) and {"step", "stage", "seconds"} <= line.keys() else None


def _to_json(value: SupportsFloat | str | None) -> float | str | None:
    if isinstance(value, bool | int | str) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None
