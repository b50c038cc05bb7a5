"""Texts that are kept on the disk under a key, for all processes of a machine."""

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


class DiskCache:
    """A table of texts in a folder.

    A file that is damaged is put aside with a warning and begun anew: a cache holds nothing that cannot be
    had again. For the same reason a disk that is full, or a file that stays locked, ends no run: there is one
    warning, and the texts are had again.

    Attributes:
        hits, misses: keys that were asked for, found and not found, in this process.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.hits = self.misses = 0
        self._told = False
        self.path = folder / "cache.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._create()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, or not allowed
                raise UserError(f"cannot open the cache {self.path}: {error}") from error
            aside = self.path.with_suffix(".damaged")
            logger.warning("%s is damaged and begun anew; it is kept as %s", self.path, aside)
            self.path.replace(aside)
            self._create()
        except OSError as error:
            raise UserError(f"cannot make the cache {folder}: {error.strerror}") from error

    def _connect(self) -> sqlite3.Connection:
        # For each call: a connection belongs to one thread, and rollouts are answered in many.
        return sqlite3.connect(self.path, timeout=60)

    def _create(self) -> None:
        # One process at a time: SQLite's timeout does not cover the switch to WAL, which fails at once with
        # "database is locked" while another process makes it.
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(folder, fcntl.LOCK_EX)
            with closing(self._connect()) as connection, connection:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("CREATE TABLE IF NOT EXISTS texts (key TEXT PRIMARY KEY, text TEXT)")
        finally:
            os.close(folder)

    def get(self, keys: Iterable[str]) -> dict[str, str]:
        """Those of the keys that are there, with their texts."""
        keys = list(keys)
        found: dict[str, str] = {}
        try:
            with closing(self._connect()) as connection:
                for key in keys:
                    found |= connection.execute("SELECT key, text FROM texts WHERE key = ?", (key,))
        except sqlite3.Error as error:
            self._tell(error)
        self.hits += len(found)
        self.misses += len(keys) - len(found)
        return found

    def put(self, texts: Mapping[str, str]) -> None:
        """Keep texts; those that are there already stay as they are."""
        if not texts:
            return
        try:
            with closing(self._connect()) as connection, connection:
                connection.executemany("INSERT OR IGNORE INTO texts VALUES (?, ?)", list(texts.items()))
        except sqlite3.Error as error:
            self._tell(error)

    def _tell(self, error: sqlite3.Error) -> None:
        if not self._told:
            logger.warning("going on without the cache %s: %s", self.path, error)
        self._told = True
