"""Keys of TRL and transformers that `rlkit rank` does not use: setting one is an error, so none is ignored.

`tests/rlkit/arguments/test_rank_keys.py` asserts that each field of TRL's ModelConfig and transformers'
TrainingArguments is either in `UNUSED` or known to have an effect.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlkit.errors import UserError

TRUE = ("yes", "true", "t", "y", "1")
FALSE = ("no", "false", "f", "n", "0")
_NO_QUANTIZATION = "set dtype to bfloat16 for less memory"
_NO_TRAINER_EVALUATION = "set evaluation_tasks and evaluation_steps instead"
_NO_SHARDING = "all processes hold the entire encoder"
NO_BEST_CHECKPOINT = (
    "save_strategy must be steps, epoch or no, not best: rlkit's evaluations do not select checkpoints"
)
# Keys that must keep their default, and the remedy or the reason.
UNUSED: dict[str, tuple[object, str]] = {
    # ModelConfig
    "load_in_8bit": (False, _NO_QUANTIZATION),
    "load_in_4bit": (False, _NO_QUANTIZATION),
    "bnb_4bit_quant_type": ("nf4", _NO_QUANTIZATION),
    "bnb_4bit_quant_storage": (None, _NO_QUANTIZATION),
    "use_bnb_nested_quant": (False, _NO_QUANTIZATION),
    "lora_target_parameters": (None, "set lora_target_modules instead"),
    "lora_task_type": ("CAUSAL_LM", "the adapter of an encoder has one task type"),
    # TrainingArguments
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
    "eval_steps": (None, _NO_TRAINER_EVALUATION),
    "eval_delay": (0, _NO_TRAINER_EVALUATION),
    "per_device_eval_batch_size": (8, "set evaluation_batch_size instead"),
    "prediction_loss_only": (False, _NO_TRAINER_EVALUATION),
    "eval_use_gather_object": (False, _NO_TRAINER_EVALUATION),
    "eval_accumulation_steps": (None, _NO_TRAINER_EVALUATION),
    "include_for_metrics": ([], _NO_TRAINER_EVALUATION),
    "batch_eval_metrics": (False, _NO_TRAINER_EVALUATION),
    "load_best_model_at_end": (False, _NO_TRAINER_EVALUATION),
    "metric_for_best_model": (None, _NO_TRAINER_EVALUATION),
    "greater_is_better": (None, _NO_TRAINER_EVALUATION),
    "do_eval": (False, _NO_TRAINER_EVALUATION),
    "do_predict": (False, _NO_TRAINER_EVALUATION),
    "enable_jit_checkpoint": (False, "rlkit always writes a checkpoint when it is preempted"),
    "fsdp": (None, _NO_SHARDING),
    "fsdp_config": (None, _NO_SHARDING),
    "deepspeed": (None, _NO_SHARDING),
    "parallelism_config": (None, _NO_SHARDING),
}
# Keys without an effect unless use_peft is true, and their defaults.
LORA: dict[str, object] = {
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": None,
    "lora_modules_to_save": None,
    "use_rslora": False,
    "use_dora": False,
}


def check_rank_keys(keys: Mapping[str, object]) -> None:
    """Raise UserError for the first key that `rlkit rank` would ignore.

    Args:
        keys: Keys that the user has set, with values that are valid for their types; a number or a boolean
            may be a string.
    """
    for key, value in keys.items():
        if key in UNUSED and not is_default(value, UNUSED[key][0]):
            raise UserError(f"{key} is not supported by `rlkit rank`: {UNUSED[key][1]}")
    if keys.get("save_strategy") == "best":
        raise UserError(NO_BEST_CHECKPOINT)
    uses_lora, uses_adapter = is_true(keys.get("use_peft")), _is_positive(keys.get("adapter_rank"))
    for key, value in keys.items():
        if key in LORA and not uses_lora and not is_default(value, LORA[key]):
            raise UserError(f"{key} has no effect without LoRA; set use_peft to true or remove {key}")
    if uses_lora and uses_adapter:
        raise UserError(
            "adapter_rank freezes the encoder, in which use_peft trains LoRA adapters; set only one"
        )
    if is_true(keys.get("gradient_checkpointing")) and uses_adapter:
        raise UserError("gradient_checkpointing has no effect on a frozen encoder; set adapter_rank to 0")
    if is_true(keys.get("fp16")) and keys.get("dtype") == "float16":
        raise UserError("fp16 needs weights in float32, whose gradients it scales; remove dtype float16")


def is_true(value: object) -> bool:
    """Return whether the value of a boolean key, which may be a string, is true."""
    return str(value).lower() in TRUE


def _is_positive(value: object) -> bool:
    return value is not None and float(str(value)) > 0


def is_default(value: object, default: object) -> bool:
    """Return whether a value, which may be a string, is the default or one of several harmless values."""
    if isinstance(default, tuple):
        return str(value) in default
    if isinstance(default, bool):
        return str(value).lower() in (TRUE if default else FALSE)
    if default is None or default == []:
        return str(value).lower() in ("", "none", "null", "[]", "{}", *FALSE)
    if isinstance(default, int | float):
        return float(str(value)) == default
    return str(value) == default
