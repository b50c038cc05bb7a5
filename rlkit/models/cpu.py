"""Settings that make training on a CPU several times faster without changing its results."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface, TrainerCallback

from rlkit.models.attention import cpu_attention
from rlkit.models.patches import score_only_completions, use_small_logits_tiles

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
# Resident memory, relative to that of a step without freed memory, from which freed memory is returned.
MAX_RESIDENT_RATIO = 1.25


def tune_for_cpu() -> None:
    """Keep freed memory, compute logits in small tiles and of completions only, use CPU attention kernels.

    A trainer also needs a `FreedMemoryCallback`, which bounds the freed memory.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # silences DeepSpeed's warning that there is no GPU
    _keep_memory()
    score_only_completions()
    use_small_logits_tiles()
    AttentionInterface.register("sdpa", cpu_attention)


def has_slow_bfloat16() -> bool:
    """Return whether this CPU emulates bfloat16 arithmetic.

    Without AVX-512, a batched matrix product in bfloat16 takes up to a hundred times as long as in float32.
    """
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return is_x86 and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def warn_if_bfloat16_is_slow(remedy: str) -> None:
    """Log a warning if this CPU emulates bfloat16 arithmetic.

    Args:
        remedy: Option that selects float32 instead.
    """
    if has_slow_bfloat16():
        logger.warning("bfloat16 is many times slower than float32 on this CPU (no AVX-512): set %s", remedy)


class FreedMemoryCallback(TrainerCallback):
    """Return freed memory to the kernel after a step if the process has much more than a step needs.

    `tune_for_cpu` keeps freed memory for the next tensors. Those of other sizes may not fit into it, so the
    resident memory would grow with every new length of prompts and completions.

    What a step needs is measured in steps that begin without freed memory: the first one, and each one after
    freed memory has been returned. A process that returns memory therefore has either kept too much, or its
    steps need 1.25 times the memory of all steps before.
    """

    def __init__(self) -> None:
        self.needed_bytes = 0
        self._began_without_freed = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Return the memory that loading the model and evaluating it have freed."""
        if _has_mallopt():
            ctypes.CDLL(None).malloc_trim(0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Return freed memory if the resident memory is 1.25 times what a step needs."""
        if not _has_mallopt():
            return
        num_bytes = resident_bytes()
        if self._began_without_freed:
            self.needed_bytes = max(self.needed_bytes, num_bytes)
        self._began_without_freed = num_bytes > MAX_RESIDENT_RATIO * self.needed_bytes
        if self._began_without_freed:
            ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """Return the resident memory of this process on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _has_mallopt() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")  # musl has none


def _keep_memory() -> None:
    # By default glibc returns the memory of a large tensor to the kernel when it is freed. The page faults of
    # the next one cost more than the arithmetic.
    if _has_mallopt():
        libc = ctypes.CDLL(None)
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20)):
            libc.mallopt(parameter, value)
