"""All patches of third-party libraries, each with the reason why no argument of the library does it.

`tests/rlkit/models/test_patches.py` fails with a sentence when a library moves what is patched here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import trl.trainer.utils
from accelerate import DistributedType, PartialState


@contextmanager
def replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Replace a name of a module for the duration of a `with` block."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextmanager
def replaced_vllm_generation(make: Callable[..., Any]) -> Iterator[None]:
    """While a GRPOTrainer is constructed, it takes `make(**settings)` for TRL's `VLLMGeneration`.

    The trainer creates it in the middle of its constructor and has no argument for the class.
    """
    from trl.trainer import grpo_trainer

    with replaced(grpo_trainer, "VLLMGeneration", make):
        yield


@contextmanager
def vllm_settings(**settings: Any) -> Iterator[None]:
    """While TRL starts vLLM, it passes these further arguments to `vllm.LLM`.

    TRL has no keys for the dtype and for eager mode, without which vLLM neither agrees with a float32 trainer
    nor starts on a CPU in less than minutes.
    """
    from trl.generation import vllm_generation

    with replaced(vllm_generation, "LLM", partial(vllm_generation.LLM, **settings)):
        yield


@contextmanager
def gguf_bar_hidden() -> Iterator[None]:
    """While a GGUF file is loaded, transformers draws no bar.

    This bar is tqdm's, not the one that `transformers.utils.logging` can turn off, and its only switch,
    `TQDM_DISABLE`, would hide the bars of downloads, too.
    """
    from transformers import modeling_gguf_pytorch_utils as gguf

    with replaced(gguf, "tqdm", partial(gguf.tqdm, disable=True)):
        yield


def score_only_completions() -> None:
    """Let TRL's fused head skip the positions without a label on a CPU, too.

    It drops them only where Triton runs; elsewhere it projects the whole prompt on the vocabulary. In that
    module of TRL `_use_triton` decides nothing else.
    """
    trl.trainer.utils._use_triton = lambda device: True


def shard_on_cpu() -> None:
    """Let accelerate shard with FSDP on a CPU, as its config says; it would fall back to DDP.

    It is for trying a launch before the GPUs are there. DeepSpeed needs no help.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
