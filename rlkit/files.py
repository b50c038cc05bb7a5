"""Files that survive a power failure, and the folder for caches."""

from __future__ import annotations

import os
from pathlib import Path


def atomic_write(path: Path, text: str) -> None:
    """Write a text file atomically and durably; create its folder if there is none.

    A reader sees the old file or the new one, never a part of it, also after a power failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Named for the process, because two of them may write the same file. Nothing ever reads a `.partial`.
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
    """Flush a file, or the entries of a folder, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_directory() -> Path:
    """Return where rlkit keeps caches: `$RLKIT_CACHE`, or `rlkit` in the user's cache folder."""
    if "RLKIT_CACHE" in os.environ:
        return Path(os.environ["RLKIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlkit"
