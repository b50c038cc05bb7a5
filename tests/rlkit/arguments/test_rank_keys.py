"""Every key of `rlkit rank` has an effect or is refused."""

import pytest

from rlkit.arguments.bounds import check_values
from rlkit.arguments.rank_keys import UNUSED
from rlkit.arguments.schema import all_keys, class_fields
from rlkit.arguments.unused_keys import LORA
from rlkit.errors import UserError

MODEL_KEYS = {"model_name_or_path", "model_revision", "dtype", "attn_implementation", "use_peft"} | set(LORA)
# Keys of TrainingArguments that transformers' Trainer and accelerate apply to any model.
TRAINER_KEYS = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2
adam_epsilon gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 gradient_checkpointing
gradient_checkpointing_kwargs torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps
logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to
run_name project trackio_space_id trackio_bucket_id trackio_static_space_id save_only_model save_strategy
save_steps save_on_each_node save_total_limit push_to_hub hub_token hub_private_repo
hub_model_id hub_strategy hub_always_push hub_revision ignore_data_skip
restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
debug skip_memory_metrics do_train local_rank
"""
# Refused for all commands (`bounds.REPLACEMENTS`), or true without any effect on a batch of strings.
OTHER_KEYS = {
    "eval_strategy",
    "eval_on_start",
    "resume_from_checkpoint",
    "average_tokens_across_devices",
}


def refuse(**keys):
    with pytest.raises(UserError) as caught:
        check_values("rank", keys, all_keys("rank"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_key_of_model_config_is_used_or_refused():
    fields = set(class_fields("trl", "trainer/model_config.py", "ModelConfig"))
    assert fields == MODEL_KEYS | (fields & set(UNUSED))


def test_every_key_of_training_arguments_is_used_or_refused():
    fields = set(class_fields("transformers", "training_args.py", "TrainingArguments"))
    assert fields == set(TRAINER_KEYS.split()) | OTHER_KEYS | (fields & set(UNUSED))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("load_in_8bit", True),
        ("load_in_4bit", "true"),
        ("bnb_4bit_quant_type", "fp4"),
        ("lora_target_parameters", ["experts"]),
        ("label_smoothing_factor", 0.1),
        ("neftune_noise_alpha", "5"),
        ("torch_compile", True),
        ("train_sampling_strategy", "group_by_length"),
        ("per_device_eval_batch_size", 16),
        ("fsdp", "full_shard"),
        ("deepspeed", {"zero_optimization": {"stage": 3}}),
        ("metric_for_best_model", "loss"),
    ],
)
def test_key_without_an_effect_is_refused(key, value):
    assert refuse(**{key: value}).startswith(f"{key} is not supported by `rlkit rank`")


@pytest.mark.parametrize("key", LORA)
def test_lora_key_needs_use_peft(key):
    value = {"lora_target_modules": ["query"], "lora_modules_to_save": ["pooler"]}.get(key)
    value = value or (True if key.startswith("use_") else 3 if key != "lora_dropout" else 0.3)
    assert f"{key} has no effect without LoRA" in refuse(**{key: value})
    check_values("rank", {key: value, "use_peft": "true"}, all_keys("rank"))


def test_keys_that_exclude_each_other_are_refused():
    assert "set only one" in refuse(use_peft=True, adapter_rank="8")
    assert "frozen encoder" in refuse(gradient_checkpointing=True, adapter_rank=8)
    assert "remove dtype float16" in refuse(fp16="true", dtype="float16")


def test_values_without_an_effect_are_accepted_if_they_are_the_default():
    keys = {"load_in_4bit": "no", "lora_r": 16, "fsdp": None, "torch_compile": False, "eval_delay": "0"}
    check_values("rank", keys | {"train_sampling_strategy": "sequential"}, all_keys("rank"))
