"""LoRA adapters in the transformers of an encoder or a cross-encoder, and a copy with the adapters merged."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

from peft import TaskType, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from trl import ModelConfig, get_peft_config

from rlkit.errors import UserError, first_line
from rlkit.models.adapters import check_mergeable

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound=nn.Module)


def add_lora(encoder: nn.Module, config: ModelConfig) -> None:
    """Freeze an encoder and add trainable LoRA adapters to its transformers.

    Args:
        encoder: Encoder to change in place.
        config: Model arguments of the run, with `use_peft` and the `lora_*` keys. The modules in
            `lora_modules_to_save` are trained themselves.

    Raises:
        UserError: The encoder has no transformer, or the adapter does not fit it.
    """
    models = _transformers(encoder)
    if not models:
        raise UserError("use_peft must be false: the encoder has no transformer to add LoRA adapters to")
    encoder.requires_grad_(False)
    names = config.lora_modules_to_save or []
    # Not dataclasses.replace: TRL's __post_init__ would turn a list of one module into a pattern.
    without_modules = copy.copy(config)
    without_modules.lora_modules_to_save = None
    lora_config = get_peft_config(without_modules)
    assert lora_config is not None
    lora_config.task_type = TaskType.FEATURE_EXTRACTION
    for model in models:
        try:
            inject_adapter_in_model(copy.deepcopy(lora_config), model)
        except ValueError as error:
            raise UserError(f"invalid adapter (use_peft and lora_* keys): {first_line(error)}") from error
    check_mergeable(encoder, "choose other lora_target_modules")
    for name in [names] if isinstance(names, str) else names:
        modules = [module for path, module in encoder.named_modules() if f".{path}".endswith(f".{name}")]
        if not modules:
            raise UserError(f"lora_modules_to_save: the encoder has no module {name!r}")
        for module in modules:
            module.requires_grad_(True)


def has_lora(encoder: nn.Module) -> bool:
    """Return whether `add_lora` has added adapters to an encoder."""
    return any(isinstance(module, BaseTunerLayer) for module in encoder.modules())


def merged(encoder: Model) -> Model:
    """Return a copy of an encoder with its adapters merged into the weights, a plain encoder."""
    copied = copy.deepcopy(encoder)
    for path, layer in list(copied.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent_path, _, name = path.rpartition(".")
            setattr(copied.get_submodule(parent_path), name, layer.get_base_layer())
    for model in _transformers(copied):
        del model.peft_config
    return copied


def enable_checkpointing(
    encoder: SentenceTransformer | CrossEncoder, checkpointing_kwargs: dict[str, Any] | None, **options: Any
) -> None:
    """Recompute the activations of an encoder's transformers in the backward pass, also next to LoRA.

    Raises:
        UserError: The encoder has no transformer, or one that does not support it, such as MPNet.
    """
    models = _transformers(encoder)
    if not models:
        raise UserError("gradient_checkpointing must be false: the encoder has no transformer layers")
    for model in models:
        if not model.supports_gradient_checkpointing:
            raise UserError(
                f"gradient_checkpointing must be false: {type(model).__name__} does not support it"
            )
        if has_lora(encoder):
            # Without a gradient of the embeddings, checkpointed layers over frozen ones have none.
            model.enable_input_require_grads()
    encoder.gradient_checkpointing_enable(checkpointing_kwargs, **options)


def _transformers(encoder: nn.Module) -> list[PreTrainedModel]:
    """Return the models of transformers in an encoder, each once."""
    from sentence_transformers.base.modules import Transformer

    models = [module.model for module in encoder.modules() if isinstance(module, Transformer)]
    return list({id(model): model for model in models}.values())
