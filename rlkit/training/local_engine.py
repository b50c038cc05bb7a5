"""A trainer's model, sharded or not, as an engine that samples with transformers."""

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
    """An engine over a trainer's model with the current weights.

    Args:
        trainer: All processes enter together: sharded weights are gathered.
        tokenizer: The model's.
        batch_size: Turns at a time; None: all.
        unwrapping: Further arguments of `trl.models.unwrap_model_for_generation`.
    """
    with (
        whole_weights(trainer.model_wrapped, trainer.accelerator),
        unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator, **unwrapping) as model,
        trainer.accelerator.autocast(),
    ):
        yield TransformersEngine(model, tokenizer, batch_size=batch_size)


@contextmanager
def whole_weights(model: torch.nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Gather the weights of a model under FSDP2 once, so that each process can sample at its own pace.

    Otherwise every forward gathers each layer, and processes whose answers differ in length would wait for
    each other forever. A whole copy of the weights must fit, as under ZeRO-3 (`ds3_gather_for_generation`).
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
        again = bool(accelerator.state.fsdp_plugin.reshard_after_forward)
        for shard in shards:
            shard.reshard()
            shard.set_reshard_after_forward(again and shard is not model, recurse=False)
