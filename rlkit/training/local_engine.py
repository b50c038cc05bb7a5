"""Sample from the model of a trainer, sharded or not, with the transformers engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from trl.models import unwrap_model_for_generation

from rlkit.rollouts.local.engine import TransformersEngine

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase, Trainer


@contextmanager
def transformers_engine(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, batch_size: int | None, **unwrapping: Any
) -> Iterator[TransformersEngine]:
    """Yield an engine that samples with the current weights.

    All processes must enter together, because sharded weights are gathered.

    Args:
        trainer: Trainer of the model.
        tokenizer: Tokenizer of the model.
        batch_size: Maximum number of turns sampled at a time, or None for no limit.
        unwrapping: Extra arguments of `trl.models.unwrap_model_for_generation`.
    """
    with (
        gathered_weights(trainer.model_wrapped, trainer.accelerator),
        unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator, **unwrapping) as model,
        trainer.accelerator.autocast(),
    ):
        yield TransformersEngine(model, tokenizer, batch_size=batch_size)


@contextmanager
def gathered_weights(model: torch.nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Gather the weights of an FSDP2 model on every process; does nothing for other models.

    Without this, every forward pass gathers each layer from all processes. Processes whose completions differ
    in length run different numbers of forward passes, so they would hang. A full copy of the weights must fit
    into a device's memory, as with ZeRO-3 (`ds3_gather_for_generation`).
    """
    if not accelerator.is_fsdp2:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for shard in shards:
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        yield
    finally:
        reshard_after_forward = bool(accelerator.state.fsdp_plugin.reshard_after_forward)
        for shard in shards:
            shard.reshard()
            # FSDP2 never reshards the root after the forward pass, whose weights the backward needs first.
            shard.set_reshard_after_forward(reshard_after_forward and shard is not model, recurse=False)
