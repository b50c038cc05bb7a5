"""All patches of third-party libraries, each with the reason why no argument of the library is enough.

`tests/rlkit/models/test_patches.py` fails and names the patch if a library moves what is patched here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import trl.kernels.chunked_logprob
import trl.trainer.utils
from accelerate import DistributedType, PartialState

# Tokens and vocabulary entries of the tiles in which TRL's fused head computes logits: TRL's own size, and
# the size that `use_small_logits_tiles` sets, which was as fast as larger ones on two cores.
GPU_LOGITS_TILE = (
    trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE,
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE,
)
CPU_LOGITS_TILE = (1024, 8192)


@contextmanager
def replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Replace an attribute of a module inside a `with` block."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextmanager
def replaced_vllm_generation(make: Callable[..., Any]) -> Iterator[None]:
    """Inside the block, TRL's GRPOTrainer calls `make(**settings)` instead of its `VLLMGeneration`.

    The trainer creates that object in the middle of its constructor and has no argument for the class.
    """
    from trl.trainer import grpo_trainer

    with replaced(grpo_trainer, "VLLMGeneration", make):
        yield


@contextmanager
def vllm_settings(**settings: Any) -> Iterator[None]:
    """Inside the block, TRL passes extra arguments to `vllm.LLM`.

    TRL has no arguments for the dtype and for eager mode. Without a float32 dtype vLLM's log-probabilities
    differ from those of a float32 trainer; without eager mode vLLM takes minutes to start on a CPU.
    """
    from trl.generation import vllm_generation

    with replaced(vllm_generation, "LLM", partial(vllm_generation.LLM, **settings)):
        yield


@contextmanager
def gguf_bar_hidden() -> Iterator[None]:
    """Inside the block, transformers shows no progress bar for loading a GGUF file.

    The bar is made with tqdm directly, so `transformers.utils.logging` cannot turn it off. `TQDM_DISABLE`
    could, but would hide the progress bars of downloads, too.
    """
    from transformers import modeling_gguf_pytorch_utils as gguf

    with replaced(gguf, "tqdm", partial(gguf.tqdm, disable=True)):
        yield


def score_only_completions() -> None:
    """Make TRL's fused head skip tokens without a label on a CPU, too.

    It skips them only if it can use Triton, and otherwise computes the logits of the prompts for nothing.
    `_use_triton` decides nothing else in that module of TRL.
    """
    trl.trainer.utils._use_triton = lambda device: True


def use_small_logits_tiles() -> None:
    """Make TRL's fused head compute logits in tiles of `CPU_LOGITS_TILE`.

    TRL's tiles have the size for one kernel of a GPU. On a CPU, TRL holds about ten float32 copies of a tile:
    5 GiB, several times the activations of a small model.
    """
    trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE = CPU_LOGITS_TILE[0]
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = CPU_LOGITS_TILE[1]


def shard_on_cpu() -> None:
    """Make accelerate use FSDP on a CPU if its config says so, instead of falling back to DDP.

    This is for trying out a launch without GPUs. DeepSpeed works on a CPU without a patch.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
