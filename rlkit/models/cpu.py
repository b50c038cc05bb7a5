"""Training on a CPU: three settings that together make a step several times as fast, at equal results."""

import ctypes
import os
import sys

from transformers import AttentionInterface

from rlkit.models.attention import cpu_attention
from rlkit.models.patches import score_only_completions

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def tune_for_cpu() -> None:
    """Keep memory in the process, skip what is not scored in TRL's head, attend without copying keys."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where installed, would wonder aloud
    _keep_memory()
    score_only_completions()
    AttentionInterface.register("sdpa", cpu_attention)


def _keep_memory() -> None:
    # By default glibc returns every large tensor to the kernel when it is freed and faults its pages in again
    # for the next one, which costs more than the arithmetic. The peak does not change.
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 256 << 20)):
            libc.mallopt(parameter, value)
