"""A cache of the judge's grades, in memory and in an SQLite file that processes and runs can share."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

from rlkit.errors import first_line

logger = logging.getLogger(__name__)

BUSY_SECONDS = 5.0  # to wait for another process that writes; the event loop waits, too


class GradeCache:
    """Scores by key, in memory and, if there is a path, in an SQLite file that processes can share.

    If the file cannot be read or written, that is logged, and responses are graded again instead.
    """

    def __init__(self, path: str | None):
        self.scores: dict[str, int] = {}
        self.path = path
        self._connection: sqlite3.Connection | None = None

    def get(self, key: str) -> int | None:
        """Return the score of a key, or None."""
        if key not in self.scores and self.path is not None:
            try:
                query = "SELECT score FROM scores WHERE key = ?"
                row = self._connect(self.path).execute(query, (key,)).fetchone()
            except (sqlite3.Error, OSError) as error:
                self._disable(error)
            else:
                if row is not None:
                    self.scores[key] = row[0]
        return self.scores.get(key)

    def add(self, key: str, score: int) -> None:
        """Store the score of a key."""
        self.scores[key] = score
        if self.path is not None:
            try:
                with self._connect(self.path) as connection:
                    connection.execute("INSERT OR REPLACE INTO scores VALUES (?, ?)", (key, score))
            except (sqlite3.Error, OSError) as error:
                self._disable(error)

    def _connect(self, path: str) -> sqlite3.Connection:
        if self._connection is None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False)
            connection.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score INTEGER)")
            self._connection = connection
        return self._connection

    def _disable(self, error: Exception) -> None:
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            logger.warning("the judge's cache %s is locked by another process", self.path)
            return
        logger.warning("the judge's cache %s is no longer used: %s", self.path, first_line(error))
        self.path = None
