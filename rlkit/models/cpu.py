"""Settings that make training on a CPU several times faster without changing its results."""

import ctypes
import logging
import os
import platform
import sys

import torch
from transformers import AttentionInterface

from rlkit.models.attention import cpu_attention
from rlkit.models.patches import score_only_completions

logger = logging.getLogger(__name__)

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def tune_for_cpu() -> None:
    """Keep freed memory, compute logits of completions only, and use CPU attention kernels."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # silences DeepSpeed's warning that there is no GPU
    _keep_memory()
    score_only_completions()
    AttentionInterface.register("sdpa", cpu_attention)


def warn_if_bfloat16_is_slow(remedy: str) -> None:
    """Log a warning if this CPU emulates bfloat16 arithmetic.

    Args:
        remedy: Option that selects float32 instead.
    """
    # Without AVX-512, a batched matrix product in bfloat16 takes up to a hundred times as long as in float32.
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    if is_x86 and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        logger.warning("bfloat16 is many times slower than float32 on this CPU (no AVX-512): set %s", remedy)


def _keep_memory() -> None:
    # By default glibc returns the memory of a large tensor to the kernel when it is freed. The page faults of
    # the next one cost more than the arithmetic. The peak memory does not change.
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has no mallopt
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 256 << 20)):
            libc.mallopt(parameter, value)
