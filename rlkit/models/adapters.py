"""Check that merging a LoRA adapter gives a model that computes the same as the model with the adapter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from rlkit.errors import UserError


def check_mergeable(model: nn.Module, remedy: str) -> None:
    """Raise UserError if an adapter is on a weight that another module uses, too, such as tied embeddings.

    While the model is trained, the adapter changes the output of its module only. Merged into the weight, it
    would change the other modules as well, so the saved model would not be the trained one.

    Args:
        model: Model with LoRA adapters; its weights may be on the meta device.
        remedy: What to set instead, for the message.
    """
    paths: dict[int, list[str]] = defaultdict(list)  # of the modules with each weight
    for path, weight in weights_by_module(model):
        paths[_storage_id(weight)].append(_base_path(path))
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        for weight in _adapted_weights(layer):
            sharing = [name for name in paths[_storage_id(weight)] if name != _base_path(path)]
            if sharing:
                raise UserError(
                    f"LoRA must not adapt {_base_path(path)}, which shares its weight with "
                    f"{', '.join(sharing)}: the saved model would not be the trained one; {remedy}"
                )


def weights_by_module(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each weight once for every module that has it, with the path of the module.

    When the adapter is merged, an untied copy replaces a module that is trained in full (with
    `lora_modules_to_save`), so the weights of the original module do not count.
    """
    replaced = [
        f"{path}.original_module."
        for path, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    ]
    for path, module in model.named_modules(remove_duplicate=False):
        if not f"{path}.".startswith(tuple(replaced)):
            for weight in module.parameters(recurse=False):
                yield path, weight


def _adapted_weights(layer: BaseTunerLayer) -> list[nn.Parameter]:
    """Return the weights that merging the adapter of a layer changes; LoRA leaves biases unchanged."""
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        return [base.get_parameter(layer.parameter_name)]
    return [weight for name, weight in base.named_parameters(recurse=False) if "bias" not in name]


def _storage_id(weight: torch.Tensor) -> int:
    """Return a number that weights in the same memory share. Meta and sharded weights have no memory."""
    return id(weight) if weight.is_meta else weight.data_ptr() or id(weight)


def is_adapter_weight(path: str) -> bool:
    """Return whether the module with this path holds LoRA weights, which merging removes."""
    return ".lora_" in path


def _base_path(path: str) -> str:
    """Return the path of a module in the model without adapters."""
    path = path.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    return path.replace(".base_layer", "")
