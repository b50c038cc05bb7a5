"""What a model that is sharded over processes needs to be sampled from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def whole_weights(model: torch.nn.Module, accelerator: Any) -> Iterator[None]:
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
