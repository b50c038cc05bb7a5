"""Key-value cache of strings on disk, shared by all processes of a machine."""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path

from rlkit.errors import UserError

logger = logging.getLogger(__name__)

# For a lock on the file, in which rollouts wait for their documents. Recomputing a value is no slower.
MAX_WAIT_SECONDS = 5.0


class DiskCache:
    """Key-value store of strings in an SQLite file.

    Cached values can always be recomputed, so a problem with the cache never stops a run. A damaged file is
    renamed with a warning and replaced by an empty one. On a full disk or a file that stays locked, one
    warning is logged and the values are recomputed.

    Args:
        folder: Folder of the file.

    Attributes:
        hits: Number of keys that this process looked up and found.
        misses: Number of keys that this process looked up and did not find.

    Raises:
        UserError: The folder is not writable.
    """

    def __init__(self, folder: Path):
        self.hits = self.misses = 0
        self._warned = False
        self.path = folder / "cache.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._create()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, or without permission
                raise UserError(f"cannot open the cache {self.path}: {error}") from error
            backup = self.path.with_suffix(".damaged")
            logger.warning(
                "the cache %s is damaged: renaming it to %s and creating an empty one", self.path, backup
            )
            self.path.replace(backup)
            self._create()
        except OSError as error:
            raise UserError(f"cannot create the cache {folder}: {error.strerror}") from error

    def _connect(self, timeout: float) -> sqlite3.Connection:
        # Each call connects: a connection belongs to one thread, and rollouts are answered in several.
        return sqlite3.connect(self.path, timeout=timeout)

    def _create(self) -> None:
        # One process at a time: SQLite's timeout does not cover the switch to WAL, which fails at once with
        # "database is locked" while another process makes it.
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(folder, fcntl.LOCK_EX)
            with closing(self._connect(60.0)) as connection, connection:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("CREATE TABLE IF NOT EXISTS texts (key TEXT PRIMARY KEY, text TEXT)")
        finally:
            os.close(folder)

    def get(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the cached values of those keys that have one."""
        keys = list(keys)
        values: dict[str, str] = {}
        try:
            with closing(self._connect(MAX_WAIT_SECONDS)) as connection:
                for key in keys:
                    row = connection.execute(
                        "SELECT text FROM texts WHERE key = ?", (_to_sql(key),)
                    ).fetchone()
                    if row is not None:
                        values[key] = _from_sql(row[0])
        except sqlite3.Error as error:
            self._warn_once(error)
        self.hits += len(values)
        self.misses += len(keys) - len(values)
        return values

    def put(self, values: Mapping[str, str]) -> None:
        """Store values by key. A key that already has a value keeps it."""
        if not values:
            return
        try:
            with closing(self._connect(MAX_WAIT_SECONDS)) as connection, connection:
                # If two processes compute the same key, the first value stays: reads are repeatable.
                rows = [(_to_sql(key), _to_sql(value)) for key, value in values.items()]
                connection.executemany("INSERT OR IGNORE INTO texts VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            self._warn_once(error)

    def _warn_once(self, error: sqlite3.Error) -> None:
        if not self._warned:
            logger.warning("continuing without the cache %s: %s", self.path, error)
        self._warned = True


def _to_sql(text: str) -> str | bytes:
    """Return a string as SQLite can store it: as bytes if it has lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def _from_sql(value: str | bytes) -> str:
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else value
