"""The parameters of a model with its adapter merged, without changing the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor

# gather(parameters) makes parameters complete that are sharded over processes, as a context manager.
Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[object]]


def merged_parameters(model: PeftModel, gather: Gather) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of the base model, with their names there and the active adapter merged.

    PEFT merges in place and subtracts the adapter afterwards, which leaves a rounding error in the weights
    each time, in bfloat16 a large one. Here one layer at a time merges into a copy of its weights,
    so that the model keeps its weights to the bit, also if the caller stops early.

    Args:
        model: Model with one active adapter.
        gather: Makes the parameters of one layer complete that ZeRO-3 shards; those of FSDP2 are gathered
            without it. All processes must iterate.

    Yields:
        Names and tensors. Merged tensors are copies, others are those of the model. Tied weights are yielded
        once.
    """
    yield from _parameters(model.get_base_model(), "", gather, set())


def _parameters(
    module: nn.Module, prefix: str, gather: Gather, seen: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of a module and its children; `seen` has the ids of those yielded before."""
    if isinstance(module, BaseTunerLayer):
        yield from _merged_layer(module, prefix, gather, seen)
        return
    if isinstance(module, ModulesToSaveWrapper) and module.active_adapters:
        module = module.modules_to_save[module.active_adapters[0]]
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            with gather([parameter]):
                yield prefix + name, _full(parameter)
    for name, child in module.named_children():
        yield from _parameters(child, f"{prefix}{name}.", gather, seen)


def _merged_layer(
    layer: Any, prefix: str, gather: Gather, seen: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of the layer that an adapter layer wraps, merged."""
    base = layer.get_base_layer()
    # Of several parameters of one module, each adapter wraps the next.
    adapters = [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]
    owners = [
        (owner, name, parameter)
        for owner in layer.modules()
        for name, parameter in owner.named_parameters(recurse=False)
    ]
    with gather([parameter for _, _, parameter in owners]):
        for owner, name, parameter in owners:
            # Of the adapter, too: PEFT cannot merge shards of FSDP2, with DoRA silently.
            copied = nn.Parameter(_full(parameter).clone(), requires_grad=False)
            owner.register_parameter(name, copied)
        try:
            for adapter in adapters:
                adapter.merge()
            merged = {name: parameter.data for name, parameter in base.named_parameters()}
        finally:
            for adapter in adapters:
                adapter.merged_adapters.clear()
            for owner, name, parameter in owners:
                owner.register_parameter(name, parameter)
    for name, parameter in base.named_parameters():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield prefix + name, merged[name]


def _full(parameter: nn.Parameter) -> torch.Tensor:
    """Return the tensor of a parameter, complete if FSDP2 shards it."""
    return parameter.full_tensor().detach() if isinstance(parameter, DTensor) else parameter.data
