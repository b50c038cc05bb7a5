"""Keys of TRL and transformers that `rlkit train` and `rlkit sft` do not use: none is silently ignored.

Setting a key of `UNUSED` is an error. A key that needs another one (`REQUIREMENTS`) is reported by a warning,
so that a config with `vllm_*` keys can be tried with `--use_vllm false`. docs/trl_features.md lists all keys
of TRL's GRPOConfig; `tests/rlkit/arguments/test_train_keys.py` asserts that each key is decided on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from rlkit.arguments.unused_keys import EVALUATION, UNUSED_BY_ANY_RUN, UnusedKeys

_ORDER = "set shuffle_dataset: false for tasks in their order"
# Keys that rlkit's GRPOTrainer does not use, also when it is built in Python: the default, which is the only
# valid value, and the remedy or the reason.
UNUSED_BY_TRAINER: UnusedKeys = {
    "auto_find_batch_size": (False, "a smaller batch would split groups; set per_device_train_batch_size"),
    "cache_implementation": (None, "rlkit's engine has its own cache; set use_vllm: true for another engine"),
    "include_num_input_tokens_seen": (("no", "False", "false"), "num_tokens is always logged"),
    "label_names": (None, "tasks have no labels"),
    "label_smoothing_factor": (0.0, "the policy gradient loss has no labels to smooth"),
    "length_column_name": ("length", _ORDER),
    "liger_kernel_config": (None, "TRL has deprecated it, and it is not tested with the shared prefix"),
    "log_multimodal": (True, "rollouts have no images"),
    "max_tool_calling_iterations": (None, "set max_turns: tools are replies of an environment"),
    "neftune_noise_alpha": (None, "noise in the embeddings would change the importance ratio"),
    "remove_unused_columns": (False, "rewards and environments read the columns of the tasks"),
    "train_sampling_strategy": (("random",), _ORDER),
    "use_liger_kernel": (False, "TRL has deprecated it, and it is not tested with the shared prefix"),
}
# Keys that `rlkit train` and `rlkit sft` do not use, because rlkit loads the model and evaluates itself.
UNUSED_BY_RUN: UnusedKeys = {
    **UNUSED_BY_ANY_RUN,
    "bf16_full_eval": (False, "evaluations use the dtype of training"),
    "fp16_full_eval": (False, "evaluations use the dtype of training"),
    "model_init_kwargs": (None, "set dtype, attn_implementation or model_revision, or edit config.json"),
    "parallelism_config": (None, "set fsdp_config or deepspeed, or --accelerate"),
    "use_cache": (False, "rlkit manages the cache of its engines"),
}
UNUSED: dict[str, UnusedKeys] = {
    "train": UNUSED_BY_TRAINER
    | UNUSED_BY_RUN
    | {
        "log_completions_hub_repo": (None, "the folder rollouts/ has all completions; upload that"),
        "num_generations_eval": (None, "evaluations answer greedily, once per task; use `rlkit eval`"),
        "use_transformers_paged": (False, "set use_transformers_continuous_batching instead"),
        "vllm_group_port": (51216, "rlkit connects to servers through free ports"),
        "vllm_tensor_parallel_size": (1, "start `rlkit serve MODEL --tensor_parallel_size N` instead"),
        "vllm_importance_sampling_cap": (None, "set vllm_importance_sampling_clip_max instead"),
    },
    "sft": UNUSED_BY_RUN
    | {
        "dataset_text_field": ("text", "demonstrations have the columns prompt and completion"),
        "eval_packing": (None, EVALUATION),
    },
}

CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
Keys = Mapping[str, Any]
# What keys of `rlkit train` need to have an effect: a description, a test of all keys, and the keys.
REQUIREMENTS: tuple[tuple[str, Callable[[Keys], object], tuple[str, ...]], ...] = (
    (
        "use_vllm: true",
        lambda keys: keys["use_vllm"],
        (
            "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex",
            "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
            "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_importance_sampling_mode",
            "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "weights_dir",
        ),
    ),
    (
        "vllm_mode: server",
        lambda keys: not keys["use_vllm"] or keys["vllm_mode"] == "server",
        (
            "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
            "weights_dir",
        ),
    ),
    (
        "vllm_mode: colocate",
        lambda keys: not keys["use_vllm"] or keys["vllm_mode"] == "colocate",
        (
            "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_enable_sleep_mode",
            "vllm_model_impl",
        ),
    ),
    (
        "vllm_importance_sampling_correction: true",
        lambda keys: not keys["use_vllm"] or keys["vllm_importance_sampling_correction"],
        (
            "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max",
            "vllm_importance_sampling_clip_min",
        ),
    ),
    (
        f"loss_type {', '.join(CLIPPED_LOSSES)}",
        lambda keys: keys["loss_type"] in CLIPPED_LOSSES,
        ("delta",),
    ),
    (
        f"loss_type {', '.join(CLIPPED_LOSSES)}, or cispo without epsilon_high",
        lambda keys: (
            keys["loss_type"] in CLIPPED_LOSSES
            or (keys["loss_type"] == "cispo" and keys["epsilon_high"] is None)
        ),
        ("epsilon",),
    ),
    (
        f"loss_type {', '.join(CLIPPED_LOSSES)} or cispo",
        lambda keys: keys["loss_type"] in (*CLIPPED_LOSSES, "cispo"),
        ("epsilon_high",),
    ),
    (
        "loss_type: sapo",
        lambda keys: keys["loss_type"] == "sapo",
        ("sapo_temperature_neg", "sapo_temperature_pos"),
    ),
    (
        "loss_type: vespo",
        lambda keys: keys["loss_type"] == "vespo",
        ("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"),
    ),
    (
        "a KL term in the loss (beta above 0, and not algorithm rloo)",
        lambda keys: keys["beta"] and keys["algorithm"] != "rloo",
        ("use_bias_correction_kl",),
    ),
    (
        "sync_ref_model: true",
        lambda keys: keys["sync_ref_model"],
        ("ref_model_mixup_alpha", "ref_model_sync_steps"),
    ),
    (
        "use_adaptive_entropy: true",
        lambda keys: keys["use_adaptive_entropy"],
        ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
    ),
    (
        "multi_objective_aggregation: sum_then_normalize",
        lambda keys: keys["multi_objective_aggregation"] == "sum_then_normalize",
        ("scale_rewards",),
    ),
    ("log_completions: true", lambda keys: keys["log_completions"], ("num_completions_to_print",)),
    (
        "log_completions: true and report_to wandb or trackio",
        lambda keys: keys["log_completions"] and {"wandb", "trackio"} & set(keys["report_to"]),
        ("log_unique_prompts",),
    ),
    (
        "use_transformers_continuous_batching: true",
        lambda keys: keys["use_transformers_continuous_batching"],
        ("transformers_continuous_batching_config",),
    ),
    (
        "gradient_checkpointing: true",
        lambda keys: keys["gradient_checkpointing"],
        ("gradient_checkpointing_kwargs",),
    ),
    ("dynamic_sampling: true", lambda keys: keys["dynamic_sampling"], ("dynamic_sampling_attempts",)),
    ("algorithm: hrpo", lambda keys: keys["algorithm"] == "hrpo", ("group_minimum",)),
    (
        "evaluation_tasks above 0",
        lambda keys: keys["evaluation_tasks"],
        ("evaluation_steps", "evaluation_split", "evaluation_batch_size"),
    ),
)  # fmt: skip


def keys_without_effect(changed: Collection[str], keys: Keys) -> list[str]:
    """Return one sentence for each requirement that is not met, naming the keys that therefore do nothing.

    Args:
        changed: Keys that the user has set to another value than their default.
        keys: All keys of a run of `rlkit train` with their values.
    """
    sentences = []
    for requirement, is_met, names in REQUIREMENTS:
        unused = [name for name in names if name in changed]
        if unused and not is_met(keys):
            verb = "has" if len(unused) == 1 else "have"
            sentences.append(f"{' and '.join(unused)} {verb} no effect without {requirement}")
    return sentences
