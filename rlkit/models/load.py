"""Load a model and its tokenizer from a hub name, a folder, or `bundled:smollm2-135m`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from peft import PeftModel, get_peft_model
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_peft_config, get_quantization_config

from rlkit.errors import UserError, first_line
from rlkit.logs import hide_weight_bars
from rlkit.models.bundled import PREFIX, bundled_path

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer

MODEL_FILES = ("config.json", "adapter_config.json")  # of a model, and of an adapter alone
DTYPES = ("auto", "bfloat16", "float16", "float32")


class Saveable(Protocol):
    """A model, an encoder or a tokenizer that `save_pretrained` writes to a folder."""

    def save_pretrained(self, folder: str, /) -> object:
        """Write the weights or the vocabulary, with the configuration."""


def resolve(name: str | None) -> str:
    """Return what transformers can load; raises UserError when nothing is named or a path does not exist."""
    if not name:
        raise UserError("no model given: set the key 'model_name_or_path', e.g. bundled:smollm2-135m")
    if name.startswith(PREFIX):
        return str(bundled_path(name))
    if name.startswith((".", "/", "~", "runs/")) and not Path(name).expanduser().is_dir():
        raise UserError(f"there is no model folder {name!r}")
    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / file).is_file() for file in MODEL_FILES):
        raise UserError(f"cannot load {name!r}: the folder has no {' or '.join(MODEL_FILES)}")
    return str(folder) if name.startswith("~") else name


def load_model(
    config: ModelConfig, *, trust_remote_code: bool = False
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the model and tokenizer that the keys of a config name.

    Weights are read from safetensors only, code from a hub runs only when asked for.

    Raises:
        UserError: no such model, no weights that are safe to read, a dtype that does not exist, or an
            adapter that does not fit.
    """
    hide_weight_bars()
    name = resolve(config.model_name_or_path)
    dtype = config.dtype or "auto"
    if dtype not in DTYPES:
        raise UserError(f"there is no dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    quantization = get_quantization_config(config)
    options = {
        "revision": config.model_revision,
        "attn_implementation": config.attn_implementation,
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "quantization_config": quantization,
    }
    options = {key: value for key, value in options.items() if value is not None}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=config.model_revision, padding_side="left", trust_remote_code=trust_remote_code
        )
        model = AutoModelForCausalLM.from_pretrained(
            name, use_safetensors=True, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, ImportError) as error:  # not found, not a model, not allowed, not installed
        raise UserError(f"cannot load {config.model_name_or_path!r}: {first_line(error)}") from error
    # Does the adapter fit? Asked before a run directory is made; ZeRO-3 would shard this model as well.
    if config.use_peft and not is_deepspeed_zero3_enabled():
        without_weights(model.config, config, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def without_weights(
    shape: PreTrainedConfig, config: ModelConfig, *, trust_remote_code: bool = False
) -> PreTrainedModel | PeftModel:
    """A model on the meta device, of transformers' config `shape`, with the adapter that the keys ask for.

    Raises:
        UserError: the adapter does not fit the model.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, trust_remote_code=trust_remote_code)
        try:
            adapter = get_peft_config(config)
            return model if adapter is None else get_peft_model(model, adapter)
        except ValueError as error:
            raise UserError(f"no such adapter (use_peft and lora_ keys): {first_line(error)}") from error


def save_model(model: Saveable, tokenizer: Saveable | None, folder: Path) -> None:
    """Save a plain model, with LoRA adapters merged into a copy of the weights, as safetensors.

    An encoder saves its tokenizer itself, and `tokenizer` is None.
    """
    if isinstance(model, PeftModel):
        # A copy: the model that is being trained keeps its adapter apart.
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def save_gathered(trainer: Trainer, folder: Path) -> None:
    """`save_model` for a model that is sharded over processes; all of them take part, the main one writes."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        # Not from_config, which would shard it again, and not the class that FSDP2 has put in front.
        kind: Any = next(one for one in type(base).__mro__ if not issubclass(one, FSDPModule))
        whole = get_peft_model(kind(base.config), model.peft_config["default"])
        whole.load_state_dict(weights)
        save_model(whole, trainer.processing_class, folder)
        return
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    weights = {name: value for name, value in weights.items() if name not in tied}
    model.save_pretrained(folder, state_dict=weights)
    trainer.processing_class.save_pretrained(folder)  # type: ignore[union-attr]
