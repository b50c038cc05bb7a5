"""Atomic, durable file writes and the cache folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def atomic_write(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically and durably. Its folder is created if necessary.

    A reader sees either the old or the new content, even after a power failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name contains the process id because two processes may write the same file at the same time.
    # Nothing reads a `.partial` file, so one that a killed process left behind does no harm.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with errors_with_path(path):
            partial.write_text(text, encoding="utf-8")
        replace(partial, path)
    finally:
        with suppress(OSError):  # a file system that has become read-only
            partial.unlink(missing_ok=True)


@contextmanager
def errors_with_path(path: Path) -> Iterator[None]:
    """Add a path to an OSError that has none: `write` and `close` do not say which file is too large."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder, which replaces `folder` durably if the block succeeds.

    At any moment `folder` is complete or does not exist. A scratch folder that a killed process left behind
    is deleted by the next call.
    """
    partial, old = (folder.with_name(f"{folder.name}.{kind}") for kind in ("partial", "old.partial"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        if folder.exists():
            # The old folder is moved first: one that is half deleted must not look complete.
            folder.rename(old)
        partial.rename(folder)
        sync(folder.parent)
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def replace(partial: Path, path: Path) -> None:
    """Replace `path` with `partial`, atomically and durably."""
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or the entries of a folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_directory() -> Path:
    """Return the folder of rlkit's caches: `$RLKIT_CACHE`, else `rlkit` in the user's cache folder."""
    if "RLKIT_CACHE" in os.environ:
        return Path(os.environ["RLKIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlkit"
