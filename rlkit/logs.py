"""Logging to stderr for the command line: levels, and the rank when there are several processes.

Modules log with `logging.getLogger(__name__)`. A program that imports rlkit decides itself where that goes;
only the commands call `configure_logging`.
"""

from __future__ import annotations

import logging
import os
import sys

from rlkit.errors import UserError

LEVEL_VARIABLE = "RLKIT_LOG_LEVEL"
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class _StderrHandler(logging.StreamHandler):
    """Writes to the current `sys.stderr`, which pytest and `contextlib.redirect_stderr` replace."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


_handler = _StderrHandler()


def configure_logging() -> None:
    """Log to stderr as `rlkit: message`, or as `rlkit [rank 1]: message` with several processes.

    `RLKIT_LOG_LEVEL` sets the level of every rank. Without it, rank 0 logs from `info` and other ranks from
    `warning`. Calling this again reads the environment again and adds no second handler.

    Raises:
        UserError: `RLKIT_LOG_LEVEL` is not a level.
    """
    rank = os.environ.get("RANK", "0")
    is_distributed = int(os.environ.get("WORLD_SIZE") or 1) > 1
    prefix = f"rlkit [rank {rank}]" if is_distributed else "rlkit"
    level_name = os.environ.get(LEVEL_VARIABLE, "").lower()
    if not level_name:
        level_name = "warning" if is_distributed and rank != "0" else "info"
    if level_name not in LEVELS:
        *names, last = LEVELS
        choices = f"{', '.join(names)} or {last}"
        raise UserError(f"{LEVEL_VARIABLE} must be {choices}, not {os.environ[LEVEL_VARIABLE]!r}")
    _handler.setFormatter(logging.Formatter(f"{prefix}: %(message)s"))
    logger = logging.getLogger("rlkit")
    logger.setLevel(LEVELS[level_name])
    logger.addHandler(_handler)  # no-op if already added
    # wandb, vLLM and others may give the root logger a handler, which would print each message a second time.
    logger.propagate = False


def reset_logging() -> None:
    """Undo `configure_logging`, so that a command called from Python leaves the caller's logging alone."""
    logger = logging.getLogger("rlkit")
    logger.removeHandler(_handler)
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
