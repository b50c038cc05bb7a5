"""Load a model and its tokenizer from the Hub, a folder or `bundled:smollm2-135m`, and save them."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from peft import PeftModel, get_peft_model
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_peft_config, get_quantization_config

from rlkit.errors import UserError, first_line, nearest, one_line
from rlkit.logs import hide_weight_bars
from rlkit.models.adapters import check_mergeable
from rlkit.models.generation_config import fix_generation_config, generation_options
from rlkit.models.names import MODEL_FILES, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer

logger = logging.getLogger(__name__)

DTYPES = ("auto", "bfloat16", "float16", "float32")
UNTIE = "choose other lora_target_modules, or train it in full with lora_modules_to_save, which unties it"


class Saveable(Protocol):
    """A model, an encoder or a tokenizer that `save_pretrained` writes to a folder."""

    def save_pretrained(self, folder: str, /) -> object:
        """Save the weights or the vocabulary, with the config."""


def check_is_model(name: str | None) -> None:
    """Raise UserError if a run cannot train the model because its folder has only a LoRA adapter.

    transformers would load the base model and freeze the adapter. vLLM servers and the reference model of the
    KL divergence would start from the base model without it.
    """
    adapter = Path(resolve(name)) / MODEL_FILES[1]
    if adapter.is_file():
        raise UserError(
            f"model_name_or_path must be a model, but {name!r} is a LoRA adapter: merge it with "
            f"`rlkit export {name} -o FOLDER`, and set the key to that folder"
        )


def load_model(
    config: ModelConfig, *, trust_remote_code: bool = False
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the model and the tokenizer of a config.

    Weights are loaded from safetensors only, because pickled ones can run code.

    Args:
        config: Model arguments of the run.
        trust_remote_code: Whether to run Python code that comes with the model.

    Raises:
        UserError: The model does not exist, has no safetensors, or the dtype or the adapter is invalid.
    """
    hide_weight_bars()
    name = resolve(config.model_name_or_path)
    dtype = config.dtype or "auto"
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    quantization = get_quantization_config(config)
    options = {
        "revision": config.model_revision,
        "attn_implementation": config.attn_implementation,
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "quantization_config": quantization,
    }
    options = {key: value for key, value in options.items() if value is not None}
    with loading(repr(config.model_name_or_path), Path(name)):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=config.model_revision, padding_side="left", trust_remote_code=trust_remote_code
        )
        # Checked before the weights are read. ZeRO-3 would shard this model, too.
        if config.use_peft and not is_deepspeed_zero3_enabled():
            shape = AutoConfig.from_pretrained(
                name, revision=config.model_revision, trust_remote_code=trust_remote_code
            )
            without_weights(shape, config, trust_remote_code=trust_remote_code)
        options |= generation_options(name, config.model_revision)
        model = AutoModelForCausalLM.from_pretrained(
            name, use_safetensors=True, trust_remote_code=trust_remote_code, **options
        )
    fix_generation_config(model)
    model.config.return_dict = True  # trainers read the fields of outputs by name
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


@contextmanager
def loading(description: str, folder: Path | None = None) -> Iterator[None]:
    """Convert an exception that a damaged or unsupported model raises to a UserError of one line.

    Args:
        description: What is loaded, for the message, e.g. its name in quotes.
        folder: Folder of the files, if it is known, to name one that is not JSON.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # also KeyError, ZeroDivisionError, SafetensorError, ...
        # The errors of a device, such as out of memory, do not come from the model's files.
        if isinstance(error, RuntimeError) and type(error) not in (RuntimeError, NotImplementedError):
            raise
        logger.debug("cannot load %s", description, exc_info=True)
        reason = first_line(error)
        if reason.endswith(":"):
            reason = one_line(error)[:300]
        if "ignore_mismatched_sizes" in reason:
            reason = "its weights have other shapes than config.json says"
        if not isinstance(error, OSError | ValueError | TypeError | ImportError | RuntimeError):
            reason = f"{type(error).__name__}: {reason}"
        if folder is not None and _is_json_error(error):
            reason = _invalid_json(folder) or reason
        raise UserError(f"cannot load {description}: {reason}") from error


def _is_json_error(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, json.JSONDecodeError):
        error = error.__cause__ or error.__context__
    return error is not None


def _invalid_json(folder: Path) -> str | None:
    """Return the first JSON file of a folder that cannot be parsed, and why, or None."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            return f"{path.name} is not valid JSON: {first_line(error)}"
    return None


def without_weights(
    shape: PreTrainedConfig, config: ModelConfig, *, trust_remote_code: bool = False
) -> PreTrainedModel | PeftModel:
    """Return a model on the meta device, with the adapter of the config if it has one.

    Args:
        shape: Config of the model, from transformers.
        config: Model arguments of the run, which configure the adapter.
        trust_remote_code: Whether to run Python code that comes with the model.

    Raises:
        UserError: The adapter does not fit the model, or cannot be merged into its weights.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, trust_remote_code=trust_remote_code)
        check_adapter_names(model, config)
        try:
            adapter = get_peft_config(config)
            if adapter is None:
                return model
            model = get_peft_model(model, adapter)
        except (ValueError, TypeError, NotImplementedError) as error:
            reason = first_line(error)
            if "lora_dropout" in reason:  # TRL's default is 0.05
                reason += "; set lora_dropout: 0"
            raise UserError(f"invalid adapter (use_peft and lora_* keys): {reason}") from error
    check_mergeable(model, UNTIE)
    return model


def check_adapter_names(model: torch.nn.Module, config: ModelConfig) -> None:
    """Raise UserError if an adapter names a module or parameter that the model lacks, which PEFT ignores."""
    if not config.use_peft:
        return
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    for key, available in (("lora_modules_to_save", modules), ("lora_target_parameters", parameters)):
        for name in getattr(config, key) or ():
            if not any(full.endswith(name) for full in available):  # PEFT's own rule
                # `modules` end in a name, `parameters` in the name of a module and of a weight.
                length = 1 if key == "lora_modules_to_save" else 2
                ends = {".".join(full.split(".")[-length:]) for full in available}
                raise UserError(f"{key}: the model has no {name!r}{nearest(name, ends)}")


def save_model(model: Saveable, tokenizer: Saveable | None, folder: Path) -> None:
    """Save a model as safetensors, with a LoRA adapter merged into the weights.

    Args:
        model: Model or encoder to save.
        tokenizer: Tokenizer to save, or None for an encoder, which saves its own.
        folder: Folder to save to.
    """
    if isinstance(model, PeftModel):
        # Merged in a copy: training may continue with the separate adapter.
        model = copy.deepcopy(model, _weights_on_cpu(model)).merge_and_unload()
    model.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def _weights_on_cpu(model: PeftModel) -> dict[int, object]:
    """Return a memo for `copy.deepcopy` that makes it copy the weights to the CPU.

    A second copy on the GPU, next to the optimizer's state, may not fit: the run would fail after its last
    step. Quantized weights are copied on their device, because merging them may need its kernels.
    """
    memo: dict[int, object] = {}
    if getattr(model.get_base_model(), "is_quantized", False):
        return memo
    for parameter in model.parameters():
        copied = parameter.detach().to("cpu", copy=True)
        memo[id(parameter)] = torch.nn.Parameter(copied, parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    return memo


def save_gathered(trainer: Trainer, folder: Path) -> None:
    """Save a model that is sharded over processes; all processes must call this, and the main one writes."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_deepspeed_zero3_enabled():
        weights = _gather_zero3(model)
    else:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        # `from_config` would shard the new model, too. FSDP2 has replaced the class of `base` by a subclass,
        # so the original class is the first base class without FSDPModule.
        model_class: Any = next(cls for cls in type(base).__mro__ if not issubclass(cls, FSDPModule))
        unsharded = get_peft_model(model_class(base.config), model.peft_config["default"])
        for name, parameter in unsharded.named_parameters():
            # Not with `assign=True` below, which would untie tied weights.
            parameter.data = parameter.data.to(weights[name].dtype)
        unsharded.load_state_dict(weights)
        save_model(unsharded, trainer.processing_class, folder)
        return
    # Tied weights are gathered once per name, but safetensors must contain them only once.
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    weights = {name: value for name, value in weights.items() if name not in tied}
    model.save_pretrained(folder, state_dict=weights)
    trainer.processing_class.save_pretrained(folder)  # type: ignore[union-attr]


def _gather_zero3(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of a model that ZeRO-3 shards, on the CPU of the main process; {} on the others.

    accelerate's `get_state_dict` does the same, unless `stage3_gather_16bit_weights_on_model_save` is false:
    then it raises an error, after the last step.
    """
    import deepspeed

    is_main = deepspeed.comm.get_rank() == 0
    state = dict(model.state_dict()) if is_main else {}  # with empty tensors for parameters
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if is_main:
                state[name] = parameter.detach().to("cpu", copy=True)
    return state
