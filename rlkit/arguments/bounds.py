"""The valid values of config keys: a table of ranges and a table of choices.

They are checked before torch is imported, a model is loaded or a run directory is touched. TRL and
transformers check only some of them, a few after hours of training. A key without an entry accepts any value
of its type. `tests/rlkit/arguments/test_bounds.py` asserts that every numeric key is in `RANGES` or
`UNBOUNDED`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.arguments.generation import check_generation_kwargs
from rlkit.arguments.keys import ADAPTER_SIDES, ALGORITHMS, DEMONSTRATIONS, MAPPINGS, OBJECTIVES
from rlkit.arguments.late_checks import check_late_keys
from rlkit.arguments.presets import ESTIMATORS, UTILITIES
from rlkit.arguments.rank_keys import check_rank_keys
from rlkit.arguments.schema import enum_values
from rlkit.arguments.train_keys import UNUSED
from rlkit.arguments.unused_keys import FALSE, TRUE, check_unused_keys
from rlkit.environment import SPLITS
from rlkit.errors import UserError, check_choice, first_line, one_line


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers. `open_low` and `open_high` exclude the endpoint."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        if math.isinf(self.low):
            return "a finite number"
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if math.isinf(self.high):
            return low
        return f"{low} and {'below' if self.open_high else 'at most'} {self.high:,.12g}"


ANY = Range()
COUNT = Range(low=1)
NOT_NEGATIVE = Range(low=0)
POSITIVE = Range(low=0, open_low=True)
SHARE = Range(0, 1)
SHARE_NOT_ZERO = Range(0, 1, open_low=True)
SHARE_BELOW_ONE = Range(0, 1, open_high=True)
PORT = Range(1, 65535)
SEED = Range(0, 2**32 - 1)  # NumPy's
WORKERS = Range(0, 1024)
SECONDS = Range(0, 1e8, open_low=True)  # Python's timers overflow at 9e9
MAX_INTEGER = 2**31 - 1  # larger ones overflow in a library, which fails late
MAX_FLOAT = 3e38  # of float32


def _ranges(values: Range, *keys: str) -> dict[str, Range]:
    return dict.fromkeys(keys, values)


RANGES: dict[str, Range] = {
    # rlkit's own keys.
    **_ranges(COUNT, "num_tasks", "evaluation_batch_size", "reward_error_patience"),
    "reward_workers": Range(1, WORKERS.high),
    **_ranges(COUNT, "max_turns", "max_turn_tokens", "max_reply_tokens"),
    **_ranges(COUNT, "dynamic_sampling_attempts", "group_minimum", "cutoff", "rankings"),
    **_ranges(NOT_NEGATIVE, "evaluation_tasks", "evaluation_steps", "adapter_rank", "listwise"),
    "infonce_weight": NOT_NEGATIVE,
    "first_stage_documents": NOT_NEGATIVE,
    "max_seq_length": COUNT,
    "reward_retries": NOT_NEGATIVE,
    **_ranges(SECONDS, "reward_time_limit", "reply_time_limit", "vllm_server_timeout"),
    **_ranges(SHARE, "reward_error_budget"),
    # Batches.
    **_ranges(COUNT, "per_device_train_batch_size", "per_device_eval_batch_size"),
    **_ranges(COUNT, "gradient_accumulation_steps", "generation_batch_size", "steps_per_generation"),
    **_ranges(COUNT, "num_generations", "num_generations_eval", "num_iterations"),
    **_ranges(COUNT, "max_completion_length", "max_length", "pad_to_multiple_of"),
    # Optimization. A learning rate of 0 is valid: a test run that does everything but change the weights.
    **_ranges(NOT_NEGATIVE, "learning_rate", "weight_decay", "max_grad_norm"),
    "adam_epsilon": Range(1e-30),  # with less, a weight without a gradient becomes NaN in float32
    **_ranges(NOT_NEGATIVE, "warmup_steps", "neftune_noise_alpha"),
    **_ranges(SHARE_BELOW_ONE, "adam_beta1", "adam_beta2", "label_smoothing_factor"),
    "num_train_epochs": POSITIVE,
    **_ranges(SEED, "seed", "data_seed"),
    "torch_empty_cache_steps": COUNT,
    # Policy gradient loss.
    **_ranges(NOT_NEGATIVE, "beta", "epsilon", "epsilon_high", "entropy_coef", "router_aux_loss_coef"),
    **_ranges(NOT_NEGATIVE, "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
    **_ranges(NOT_NEGATIVE, "vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"),
    **_ranges(POSITIVE, "delta", "sapo_temperature_neg", "sapo_temperature_pos", "off_policy_mask_threshold"),
    **_ranges(SHARE, "ref_model_mixup_alpha", "top_entropy_quantile"),
    "ref_model_sync_steps": COUNT,
    # Sampling.
    "temperature": Range(1e-9),  # logits that are divided by less overflow
    "repetition_penalty": POSITIVE,
    "top_p": SHARE_NOT_ZERO,
    "min_p": SHARE,
    "top_k": Range(low=-1),  # 0 and -1 keep all tokens
    **_ranges(COUNT, "max_tool_calling_iterations", "num_completions_to_print"),
    # vLLM.
    **_ranges(PORT, "vllm_server_port", "vllm_group_port"),
    "vllm_gpu_memory_utilization": SHARE_NOT_ZERO,
    **_ranges(COUNT, "vllm_max_model_length", "vllm_tensor_parallel_size"),
    **_ranges(POSITIVE, "vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap"),
    "vllm_importance_sampling_clip_min": NOT_NEGATIVE,
    # LoRA.
    **_ranges(COUNT, "lora_r", "lora_alpha"),
    "lora_dropout": SHARE_BELOW_ONE,
    # Logging, checkpoints, data loading, processes. Steps below 1 are a fraction of the run.
    **_ranges(NOT_NEGATIVE, "logging_steps", "eval_steps"),  # 0 is valid with the strategy "no"
    "save_steps": POSITIVE,
    "save_total_limit": NOT_NEGATIVE,  # 0 keeps all
    **_ranges(COUNT, "eval_accumulation_steps", "dataset_num_proc"),
    "eval_delay": NOT_NEGATIVE,
    "dataloader_num_workers": WORKERS,
    **_ranges(COUNT, "dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout"),
}
# Numeric keys without a range, and the reason.
UNBOUNDED = {
    "local_rank": "set by launchers; -1 is one process",
    "max_steps": "-1 trains for num_train_epochs; 0 is rejected in `check_value`",
}

REPORT_TO = (
    "all", "none", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow",
    "mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb",
)  # fmt: skip
# Choices of rlkit's keys, and of keys that TRL, transformers or PEFT check only after loading the model.
CHOICES: dict[str, tuple[str, ...]] = {
    "adapter_side": ADAPTER_SIDES,
    "algorithm": ALGORITHMS,
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "estimator": ESTIMATORS,
    "evaluation_split": SPLITS,
    "objective": OBJECTIVES,
    "similarity": ("cosine", "dot"),
    "utility": UTILITIES,
    "importance_sampling_level": ("token", "sequence"),
    "lora_task_type": ("CAUSAL_LM",),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "report_to": REPORT_TO,
    "scale_rewards": ("group", "batch", "none"),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "vllm_mode": ("server", "colocate"),
    "vllm_model_impl": ("vllm", "transformers"),
}
# Enumerations of transformers: source file and class, from which the values are parsed.
ENUMERATIONS = {
    "hub_strategy": ("trainer_utils.py", "HubStrategy"),
    "logging_strategy": ("trainer_utils.py", "IntervalStrategy"),
    "lr_scheduler_type": ("trainer_utils.py", "SchedulerType"),
    "optim": ("training_args.py", "OptimizerNames"),
    "save_strategy": ("trainer_utils.py", "SaveStrategy"),
}
LOSS_TYPES = {
    "train": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "sft": ("nll", "dft", "chunked_nll"),
}
# Keys of transformers that rlkit does not use, and the keys to set instead.
REPLACEMENTS = {
    "eval_on_start": "evaluation_tasks",
    "eval_strategy": "evaluation_tasks and evaluation_steps",
    "resume_from_checkpoint": "resume",
}
# Keys whose value is a mapping or the path of a JSON file.
JSON_FILES = ("accelerator_config", "deepspeed", "fsdp_config")


def check_values(command: str, keys: Mapping[str, object], types: Mapping[str, str]) -> None:
    """Raise UserError for the first key with an invalid value.

    Args:
        command: "train", "sft" or "rank".
        keys: Values from YAML or the command line; a number may be a string.
        types: Type annotation of each key (`rlkit.arguments.schema.all_keys`).
    """
    for key, value in keys.items():
        check_value(key, value, types[key])
        if key in REPLACEMENTS and str(value).lower() not in (*FALSE, "none"):
            raise UserError(f"{key} is not supported by rlkit; set {REPLACEMENTS[key]} instead")
        choices = _choices(command, key, value)
        if choices is not None:
            for item in value if isinstance(value, list) else [value]:
                if item is not None:
                    check_choice(key, str(item), choices)
    if command == "train" and keys.get("generation_kwargs"):
        _check_generation(keys)
    values = {key: value for key, value in keys.items() if value is not None}
    if command == "rank":
        check_rank_keys(values)
    else:
        check_unused_keys(UNUSED[command], values, command)
    check_late_keys(keys)


def _check_generation(keys: Mapping[str, object]) -> None:
    """Raise UserError if `generation_kwargs` does not fit the other keys, whose values are valid."""
    value = keys["generation_kwargs"]
    settings = json.loads(value) if isinstance(value, str) else value
    assert isinstance(settings, Mapping)

    limits = [keys.get("max_completion_length"), keys.get("max_turn_tokens")]
    max_turns = keys.get("max_turns")
    check_generation_kwargs(
        settings,
        use_vllm=str(keys.get("use_vllm")).lower() in TRUE,
        continuous_batching=str(keys.get("use_transformers_continuous_batching")).lower() in TRUE,
        max_tokens=min((int(str(limit)) for limit in limits if limit is not None), default=None),
        max_turns=None if max_turns is None else int(str(max_turns)),
    )


def _choices(command: str, key: str, value: object) -> tuple[str, ...] | None:
    """Return the valid strings of a key, or None if it accepts any."""
    if key == "loss_type":
        return LOSS_TYPES.get(command)
    if key in ENUMERATIONS:
        return enum_values("transformers", *ENUMERATIONS[key])
    if key == "demonstrations" and not str(value).startswith("best:"):
        return DEMONSTRATIONS
    return CHOICES.get(key)


def holds_mapping(key: str, annotation: str) -> bool:
    """Return whether the value of a key is a mapping or, as a string, JSON or the path of a JSON file."""
    return key in MAPPINGS or any(kind.strip().startswith("dict") for kind in annotation.split("|"))


def check_value(key: str, value: object, annotation: str) -> None:  # noqa: PLR0912
    """Raise UserError if a value is invalid for its key.

    Args:
        key: Name of the key.
        value: Value from YAML or the command line; a number may be a string.
        annotation: Type annotation of the key as a string, e.g. `int | None`.
    """
    kinds = [kind.strip() for kind in annotation.split("|")]
    if value is None:
        # TRL declares num_generations optional but fails on None.
        if "None" not in kinds or key == "num_generations":
            raise UserError(f"{key} must not be null; set a value or remove the key")
    elif key in RANGES and not (isinstance(value, str) and "str" in kinds and not is_number(value)):
        check_number(key, value, RANGES[key], is_integer="int" in kinds)
    elif key == "max_steps":
        check_number(key, value, Range(low=-1), is_integer=True)
        if int(str(value)) == 0:
            raise UserError("max_steps must not be 0; set -1 to train for num_train_epochs")
    elif "list[float]" in kinds:
        for number in value if isinstance(value, list) else [value]:
            check_number(key, number, ANY)
    elif "bool" in kinds and not {"str", "dict"} & set(kinds):
        if str(value).lower() not in TRUE + FALSE:
            raise UserError(f"{key} must be true or false, not {value!r:.60}")
    elif set(kinds) <= {"str", "None"} and key not in MAPPINGS:
        if isinstance(value, list | dict):
            raise UserError(f"{key} must be a string, not {value!r:.60}")
    elif holds_mapping(key, annotation):
        if isinstance(value, str):
            _check_mapping(key, value)
        elif not isinstance(value, dict):
            raise UserError(f"{key} must be a mapping, not {value!r:.60}")


def check_evaluation(options: Mapping[str, Any]) -> None:
    """Raise UserError for the first option of an evaluation with an invalid value.

    Args:
        options: Options of `rlkit.evaluation.model.evaluate_model` by name.
    """
    for key in ("seed", "max_completion_length", "evaluation_batch_size"):
        check_number(key, options[key], RANGES[key], is_integer=True)
    for key in ("evaluation_tasks", "samples"):
        if options[key] is not None:
            check_number(key, options[key], COUNT, is_integer=True)
    check_number("top_p", options["top_p"], RANGES["top_p"])
    for key in ("dtype", "evaluation_split"):
        check_choice(key, options[key], CHOICES[key])
    check_number("temperature", options["temperature"], NOT_NEGATIVE)  # 0 is greedy decoding
    if options["samples"] > 1 and options["temperature"] == 0:
        raise UserError(
            f"with temperature 0, all {options['samples']} samples of a task would be identical; set "
            "temperature, e.g. to 1"
        )


def check_number(key: str, value: object, allowed: Range, *, is_integer: bool = False) -> None:
    """Raise UserError unless a value is a number, or a string with a number, within a range."""
    kind = "an integer" if is_integer else "a number"
    try:
        if isinstance(value, bool):
            raise ValueError
        number = int(str(value)) if is_integer else float(str(value))
    except ValueError:
        raise UserError(f"{key} must be {kind}, not {value!r:.60}") from None
    shown = f"{str(value).strip():.60}"  # int and float accept whitespace, also line breaks
    if number not in allowed:
        raise UserError(f"{key} must be {allowed}, not {shown}")
    maximum = MAX_INTEGER if is_integer else MAX_FLOAT
    if math.isinf(allowed.high) and number > maximum:
        raise UserError(f"{key} must be at most {maximum:,}, not {shown}")


def is_number(text: str) -> bool:
    """Return whether a string can be parsed as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_mapping(key: str, text: str) -> None:
    """Raise UserError unless a string is a JSON object or, for keys in `JSON_FILES`, the path of one."""
    source = key
    if key in JSON_FILES and not text.lstrip().startswith("{"):
        path = Path(text)
        source = f"{key}: {path}"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"{key}: cannot read {str(path)!r}: {reason}") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number with thousands of digits
        raise UserError(f"{source} is not valid JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{source} must be a mapping, not {text!r:.60}")
