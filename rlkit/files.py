"""Atomic, durable file writes and the cache folder."""

from __future__ import annotations

import os
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
        partial.write_text(text, encoding="utf-8")
        replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
