"""Keys of TRL and transformers that `rlkit rank` does not use: setting one is an error, so none is ignored.

`tests/rlkit/arguments/test_rank_keys.py` asserts that each field of TRL's ModelConfig and transformers'
TrainingArguments is either in `UNUSED` or known to have an effect.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlkit.arguments.unused_keys import UNUSED_BY_ANY_RUN, UnusedKeys, check_unused_keys, is_true
from rlkit.errors import UserError

_NO_QUANTIZATION = "set dtype to bfloat16 for less memory"
_NO_SHARDING = "all processes hold the entire encoder"
# Keys that must keep their default, and the remedy or the reason.
UNUSED: UnusedKeys = {
    # ModelConfig
    "load_in_8bit": (False, _NO_QUANTIZATION),
    "load_in_4bit": (False, _NO_QUANTIZATION),
    "bnb_4bit_quant_type": ("nf4", _NO_QUANTIZATION),
    "bnb_4bit_quant_storage": (None, _NO_QUANTIZATION),
    "use_bnb_nested_quant": (False, _NO_QUANTIZATION),
    "lora_target_parameters": (None, "set lora_target_modules instead"),
    "lora_task_type": ("CAUSAL_LM", "the adapter of an encoder has one task type"),
    # TrainingArguments
    **UNUSED_BY_ANY_RUN,
    "label_smoothing_factor": (0.0, "the objectives have no labels to smooth"),
    "neftune_noise_alpha": (None, "noise is only added to causal language models"),
    "use_liger_kernel": (False, "its kernels are for causal language models"),
    "liger_kernel_config": (None, "its kernels are for causal language models"),
    "use_cache": (False, "an encoder generates nothing"),
    "torch_compile": (False, "the scorer reads strings, which cannot be compiled"),
    "torch_compile_backend": (None, "the scorer reads strings, which cannot be compiled"),
    "torch_compile_mode": (None, "the scorer reads strings, which cannot be compiled"),
    "include_num_input_tokens_seen": ("no", "batches contain strings, not tokens"),
    "train_sampling_strategy": (("random", "sequential"), "set random or sequential"),
    "length_column_name": ("length", "queries are not grouped by length"),
    "label_names": (None, "the grades are the labels"),
    "bf16_full_eval": (False, "evaluations use dtype"),
    "fp16_full_eval": (False, "evaluations use dtype"),
    "fsdp": (None, _NO_SHARDING),
    "fsdp_config": (None, _NO_SHARDING),
    "deepspeed": (None, _NO_SHARDING),
    "parallelism_config": (None, _NO_SHARDING),
}


def check_rank_keys(keys: Mapping[str, object]) -> None:
    """Raise UserError for the first key that `rlkit rank` would ignore.

    Args:
        keys: Keys that the user has set, with values that are valid for their types; a number or a boolean
            may be a string.
    """
    check_unused_keys(UNUSED, keys, "rank")
    uses_lora, uses_adapter = is_true(keys.get("use_peft")), _is_positive(keys.get("adapter_rank"))
    if uses_lora and uses_adapter:
        raise UserError(
            "adapter_rank freezes the encoder, in which use_peft trains LoRA adapters; set only one"
        )
    if is_true(keys.get("gradient_checkpointing")) and uses_adapter:
        raise UserError("gradient_checkpointing has no effect on a frozen encoder; set adapter_rank to 0")
    if is_true(keys.get("fp16")) and keys.get("dtype") == "float16":
        raise UserError("fp16 needs weights in float32, whose gradients it scales; remove dtype float16")


def _is_positive(value: object) -> bool:
    return value is not None and float(str(value)) > 0
