"""Run a command and convert its exceptions to one-line messages and exit codes."""

from __future__ import annotations

import errno
import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable

from rlkit.errors import PREEMPTED, GuardError, Preempted, RewardError, UserError, one_line
from rlkit.logs import configure_logging, reset_logging
from rlkit.registry import author_frames

logger = logging.getLogger(__name__)

# Errors of a path that only the user can fix, wherever they occur.
UNUSABLE_PATHS = (
    errno.EACCES,
    errno.EROFS,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.ENOSPC,
    errno.EDQUOT,
)


def run_command(command: Callable[[], int], *, can_resume: bool = False) -> int:
    """Run a command and return its exit code: 0 success, 1 failure, 2 usage error, 75 preempted.

    A usage error prints one line to stderr. An exception in a user's environment or reward prints only the
    traceback frames of that code and also exits with 2. Any other exception is a bug and keeps its traceback.
    Ctrl-C exits with 130.

    Args:
        command: Function that runs the command.
        can_resume: Whether the command writes checkpoints and has the option --resume.
    """
    try:
        configure_logging()
        return command()
    except UserError as error:
        _print_error(f"{error}")
        return 2
    except RewardError as error:
        _print_error(f"{error}\nFix the cause, then resume from the last checkpoint with --resume.")
        return 1
    except GuardError as error:
        _print_error(f"{error}\nThe checkpoints are kept: resume with --resume.")
        return 1
    except Preempted as reason:
        if os.environ.get("RANK", "0") == "0":
            _print_error(f"{reason}; resume with --resume")
        return PREEMPTED
    except KeyboardInterrupt:
        _print_error("stopped; resume from the last checkpoint with --resume" if can_resume else "stopped")
        return 130
    except Exception as error:
        frames = author_frames(error)
        if not frames:
            if isinstance(error, OSError) and error.errno in UNUSABLE_PATHS:
                _print_error(f"cannot use the path {str(error.filename)!r:.120}: {error.strerror}")
                return 2
            raise
        logger.debug("full traceback:", exc_info=True)
        shown = [] if isinstance(error, SyntaxError) else traceback.format_list(frames)
        print("".join([*shown, *traceback.format_exception_only(error)]), file=sys.stderr, end="")
        location = f"{frames[-1].filename}, line {frames[-1].lineno}"
        _print_error(f"{location}: {type(error).__name__}: {one_line(error)}")
        return 2
    finally:
        _leave_process_group()
        reset_logging()


def _print_error(message: str) -> None:
    # Printed, not logged: this line explains the exit code, so it must appear at every RLKIT_LOG_LEVEL, and
    # sweeps search the output of their runs for it (`rlkit.sweeps.point`).
    print(f"rlkit: {message}", file=sys.stderr, flush=True)


def _leave_process_group() -> None:
    # A process that exits inside a process group is aborted, which loses its exit code. Trainers contain
    # reference cycles; one that is not garbage-collected keeps the threads of the group alive.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()
