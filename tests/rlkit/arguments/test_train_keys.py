"""Every key of `rlkit train` and `rlkit sft` has an effect, is refused, or is reported to have none."""

import re

import pytest

from rlkit.arguments.bounds import REPLACEMENTS, check_values
from rlkit.arguments.schema import all_keys, class_fields
from rlkit.arguments.train_keys import REQUIREMENTS, UNUSED, keys_without_effect
from rlkit.arguments.unused_keys import LORA
from rlkit.errors import UserError
from tests.quick import ROOT

# Keys of TRL's GRPOConfig that have an effect; docs/trl_features.md names the test of each.
GRPO_KEYS = """
learning_rate trust_remote_code router_aux_loss_coef disable_dropout cast_lm_head_to_fp32 num_generations
max_completion_length ds3_gather_for_generation shuffle_dataset pad_to_multiple_of generation_batch_size
steps_per_generation temperature top_p top_k min_p generation_kwargs chat_template_kwargs repetition_penalty
use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url
vllm_server_host vllm_server_port vllm_server_timeout vllm_gpu_memory_utilization
vllm_max_model_length beta num_iterations epsilon delta epsilon_high
sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg
importance_sampling_level reward_weights multi_objective_aggregation scale_rewards loss_type
mask_truncated_completions sync_ref_model ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile
entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target
vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max
vllm_importance_sampling_clip_min off_policy_mask_threshold use_bias_correction_kl log_completions
num_completions_to_print log_unique_prompts use_transformers_continuous_batching
transformers_continuous_batching_config
"""
# Keys of TrainingArguments that transformers' Trainer and accelerate apply to any model.
TRAINER_KEYS = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2
adam_epsilon gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 gradient_checkpointing
gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
trackio_static_space_id save_only_model save_strategy save_steps save_on_each_node save_total_limit
push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision ignore_data_skip
restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
fsdp fsdp_config deepspeed debug skip_memory_metrics local_rank
"""
# Keys that may have any value because what they change does not exist here: TRL's losses already count the
# tokens of all processes, and `do_train` is read by transformers' example scripts only.
HARMLESS = {"average_tokens_across_devices", "do_train"}
SFT_TRAINER_KEYS = """
auto_find_batch_size include_num_input_tokens_seen label_names label_smoothing_factor length_column_name
liger_kernel_config neftune_noise_alpha remove_unused_columns train_sampling_strategy use_liger_kernel
"""
SFT_KEYS = """
learning_rate trust_remote_code router_aux_loss_coef chat_template_path dataset_kwargs dataset_num_proc
eos_token max_length truncation_mode shuffle_dataset packing packing_strategy padding_free pad_to_multiple_of
completion_only_loss assistant_only_loss loss_type activation_offloading pad_token
"""
CONDITIONAL = {name for _, _, names in REQUIREMENTS for name in names}


def refuse(command, **keys):
    with pytest.raises(UserError) as caught:
        check_values(command, keys, all_keys(command))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("command", "config", "used"),
    [
        ("train", ("trl", "trainer/grpo_config.py", "GRPOConfig"), GRPO_KEYS),
        ("train", ("transformers", "training_args.py", "TrainingArguments"), TRAINER_KEYS),
        ("sft", ("trl", "trainer/sft_config.py", "SFTConfig"), SFT_KEYS),
        ("sft", ("transformers", "training_args.py", "TrainingArguments"), TRAINER_KEYS + SFT_TRAINER_KEYS),
    ],
)
def test_every_key_is_used_or_refused(command, config, used):
    """If this fails after an update of TRL: test the new key, or refuse it in `train_keys.UNUSED`."""
    refused = set(UNUSED[command]) | set(REPLACEMENTS)
    decided = set(used.split()) | HARMLESS | refused
    fields = set(class_fields(*config))
    assert fields - decided == set()
    assert set(used.split()) - fields == set()
    assert set(used.split()) & refused == set()


@pytest.mark.parametrize("command", UNUSED)
def test_refused_keys_and_requirements_exist(command):
    assert set(UNUSED[command]) <= set(all_keys(command))
    assert set(all_keys("train")) >= CONDITIONAL


@pytest.mark.parametrize(
    ("command", "key", "value", "remedy"),
    [
        ("train", "cache_implementation", "static", "use_vllm: true"),
        ("train", "max_tool_calling_iterations", 3, "max_turns"),
        ("train", "neftune_noise_alpha", "5", "importance ratio"),
        ("train", "label_smoothing_factor", 0.1, "no labels"),
        ("train", "train_sampling_strategy", "sequential", "shuffle_dataset: false"),
        ("train", "remove_unused_columns", "true", "columns"),
        ("train", "num_generations_eval", 2, "`rlkit eval`"),
        ("train", "log_multimodal", False, "no images"),
        ("train", "use_transformers_paged", True, "use_transformers_continuous_batching"),
        ("train", "vllm_importance_sampling_cap", 2.0, "vllm_importance_sampling_clip_max"),
        ("train", "vllm_group_port", 4000, "free ports"),
        ("train", "vllm_tensor_parallel_size", "2", "rlkit serve"),
        ("train", "use_liger_kernel", "yes", "shared prefix"),
        ("train", "liger_kernel_config", {"rope": True}, "shared prefix"),
        ("train", "include_num_input_tokens_seen", "all", "num_tokens"),
        ("train", "auto_find_batch_size", True, "per_device_train_batch_size"),
        ("train", "model_init_kwargs", {"dtype": "bfloat16"}, "attn_implementation"),
        ("train", "per_device_eval_batch_size", 16, "evaluation_batch_size"),
        ("sft", "per_device_eval_batch_size", "16", "evaluation_batch_size"),
        ("sft", "eval_packing", True, "evaluation_tasks"),
        ("sft", "dataset_text_field", "body", "prompt and completion"),
        ("sft", "load_best_model_at_end", True, "checkpoints"),
        ("sft", "enable_jit_checkpoint", "true", "preempted"),
        ("sft", "fp16_full_eval", True, "dtype of training"),
    ],
)
def test_key_without_an_effect_is_refused_with_a_remedy(command, key, value, remedy):
    message = refuse(command, **{key: value})
    assert message.startswith(f"{key} is not supported by `rlkit {command}`: ") and remedy in message


@pytest.mark.parametrize("command", ["train", "sft", "rank"])
def test_best_checkpoints_and_checkpoints_of_transformers_on_preemption_are_refused(command):
    assert refuse(command, save_strategy="best").startswith("save_strategy must be steps, epoch or no")
    assert refuse(command, enable_jit_checkpoint=True).startswith("enable_jit_checkpoint is not supported")


@pytest.mark.parametrize("command", ["train", "sft"])
def test_lora_keys_need_use_peft(command):
    for key, default in LORA.items():
        value = {"lora_target_modules": ["q_proj"], "lora_modules_to_save": ["lm_head"]}.get(key, True)
        value = value if default in (None, False) else default / 2 if key == "lora_dropout" else default + 1
        assert f"{key} has no effect without LoRA" in refuse(command, **{key: value})
        check_values(command, {key: value, "use_peft": True}, all_keys(command))


def test_default_values_of_refused_keys_are_accepted():
    keys = {"log_multimodal": "true", "train_sampling_strategy": "random", "neftune_noise_alpha": None}
    keys |= {"per_device_eval_batch_size": "8", "eval_do_concat_batches": True, "use_cache": "no"}
    check_values("train", keys, all_keys("train"))


KEYS = {
    "use_vllm": False,
    "vllm_mode": "colocate",
    "vllm_importance_sampling_correction": True,
    "loss_type": "grpo",
    "epsilon_high": None,
    "beta": 0.0,
    "algorithm": "grpo",
    "sync_ref_model": False,
    "use_adaptive_entropy": False,
    "multi_objective_aggregation": "sum_then_normalize",
    "log_completions": False,
    "report_to": [],
    "use_transformers_continuous_batching": False,
    "gradient_checkpointing": True,
    "dynamic_sampling": False,
    "evaluation_tasks": 0,
}


@pytest.mark.parametrize(
    ("changed", "keys", "requirement"),
    [
        ({"vllm_gpu_memory_utilization"}, {}, "use_vllm: true"),
        ({"vllm_server_port"}, {"use_vllm": True}, "vllm_mode: server"),
        ({"vllm_model_impl"}, {"use_vllm": True, "vllm_mode": "server"}, "vllm_mode: colocate"),
        (
            {"vllm_importance_sampling_mode"},
            {"use_vllm": True, "vllm_importance_sampling_correction": False},
            "vllm_importance_sampling_correction: true",
        ),
        ({"delta"}, {"loss_type": "cispo"}, "loss_type grpo, bnpo, dr_grpo, dapo, luspo"),
        ({"epsilon"}, {"loss_type": "cispo", "epsilon_high": 5.0}, "cispo without epsilon_high"),
        ({"epsilon_high"}, {"loss_type": "vespo"}, "or cispo"),
        ({"sapo_temperature_neg"}, {}, "loss_type: sapo"),
        ({"vespo_k_pos"}, {"loss_type": "sapo"}, "loss_type: vespo"),
        ({"use_bias_correction_kl"}, {}, "not algorithm rloo)"),
        ({"use_bias_correction_kl"}, {"beta": 0.1, "algorithm": "rloo"}, "not algorithm rloo)"),
        ({"ref_model_mixup_alpha"}, {}, "sync_ref_model: true"),
        ({"entropy_target"}, {}, "use_adaptive_entropy: true"),
        (
            {"scale_rewards"},
            {"multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation: sum_then_normalize",
        ),
        ({"num_completions_to_print"}, {}, "log_completions: true"),
        ({"log_unique_prompts"}, {"log_completions": True}, "report_to wandb or trackio"),
        ({"transformers_continuous_batching_config"}, {}, "use_transformers_continuous_batching: true"),
        (
            {"gradient_checkpointing_kwargs"},
            {"gradient_checkpointing": False},
            "gradient_checkpointing: true",
        ),
        ({"dynamic_sampling_attempts"}, {}, "dynamic_sampling: true"),
        ({"group_minimum"}, {}, "algorithm: hrpo"),
        ({"evaluation_steps"}, {}, "evaluation_tasks above 0"),
    ],
)
def test_key_that_needs_another_one_is_reported(changed, keys, requirement):
    (sentence,) = keys_without_effect(changed, KEYS | keys)
    assert all(key in sentence for key in changed) and sentence.endswith(requirement)


def test_keys_whose_requirements_are_met_are_not_reported():
    met = {
        "use_vllm": True,
        "beta": 0.1,
        "sync_ref_model": True,
        "use_adaptive_entropy": True,
        "log_completions": True,
        "report_to": ["wandb"],
        "use_transformers_continuous_batching": True,
        "dynamic_sampling": True,
        "algorithm": "hrpo",
        "evaluation_tasks": 4,
    }
    by_value = {name for name in CONDITIONAL if name.startswith(("sapo", "vespo", "vllm_server"))}
    assert keys_without_effect(CONDITIONAL - by_value - {"weights_dir"}, KEYS | met) == []
    server = {"vllm_server_port", "vllm_server_timeout", "weights_dir"}
    assert keys_without_effect(server, KEYS | met | {"vllm_mode": "server"}) == []


def test_page_of_trl_features_names_every_key_of_grpo_config_once():
    """The keys are in the second column of the first table."""
    page = (ROOT / "docs" / "trl_features.md").read_text().partition("## Keys of transformers")[0]
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row[2])]
    fields = set(class_fields("trl", "trainer/grpo_config.py", "GRPOConfig"))
    assert {name: names.count(name) for name in fields if names.count(name) != 1} == {}
    refused = {name for row in rows if row[3].strip() == "refused" for name in re.findall(r"`(\w+)`", row[2])}
    assert refused & fields == set(UNUSED["train"]) & fields


def test_page_of_trl_features_names_tests_that_exist():
    page = (ROOT / "docs" / "trl_features.md").read_text()
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", page)
    assert names
    assert [name for name in names if f"def {name}(" not in tests] == []
