"""Ranges and choices of config keys: the tables are complete, and an invalid value is a one-line error."""

import importlib
import json
import math
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from rlkit.arguments import bounds, late_checks
from rlkit.arguments.bounds import CHOICES, LOSS_TYPES, RANGES, UNBOUNDED, Range, check_values
from rlkit.arguments.schema import INSTALLED, all_keys
from rlkit.errors import UserError

KINDS = ("int", "float")
KEYS = {key: kind for command in INSTALLED for key, kind in all_keys(command).items()}


def is_numeric(annotation):
    return any(kind.strip() in KINDS for kind in annotation.split("|"))


def error_of(command="train", **keys):
    with pytest.raises(UserError) as caught:
        check_values(command, keys, KEYS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_numeric_key_is_in_ranges_or_unbounded():
    numeric = {key for key, annotation in KEYS.items() if is_numeric(annotation)}
    assert numeric - set(RANGES) == set(UNBOUNDED)


def test_tables_contain_only_existing_keys():
    assert set(RANGES) | set(UNBOUNDED) | set(CHOICES) <= set(KEYS)


@pytest.mark.parametrize("command", INSTALLED)
def test_default_values_are_valid(command):
    from rlkit.arguments.parse import trl_parser

    # Reversed, because TRL's parser also has an option `--no_KEY` after each key that is true by default.
    actions = [a for a in reversed(trl_parser(command)._actions) if a.dest in all_keys(command)]
    defaults = {a.dest: a.default for a in actions}
    values = {key: getattr(value, "value", value) for key, value in defaults.items() if value is not None}
    check_values(command, values, all_keys(command))


@given(st.sampled_from(sorted(RANGES)), st.floats() | st.integers().map(float))
def test_check_values_rejects_exactly_the_numbers_out_of_range(key, number):
    is_integer = "int" in [kind.strip() for kind in KEYS[key].split("|")]
    if is_integer and math.isfinite(number):
        number = int(number)
    allowed = RANGES[key]
    is_inside = math.isfinite(number) and allowed.low <= number <= allowed.high
    is_inside = is_inside and not (allowed.open_low and number == allowed.low)
    is_inside = is_inside and not (allowed.open_high and number == allowed.high)
    if math.isinf(allowed.high):
        is_inside = is_inside and number <= (bounds.MAX_INTEGER if is_integer else bounds.MAX_FLOAT)
    for value in (number, str(number)):  # from YAML and from the command line
        if is_inside:
            bounds.check_value(key, value, KEYS[key])
        else:
            assert error_of(**{key: value}).startswith(key)


@given(st.sampled_from(sorted(RANGES)), st.sampled_from(["x", "", True, "1e", [1], "0x1"]))
def test_check_values_rejects_values_that_are_not_numbers(key, value):
    if "str" in KEYS[key]:
        return
    assert error_of(**{key: value}).startswith(key)


@pytest.mark.parametrize(
    "keys",
    [
        {"learning_rate": -1},
        {"learning_rate": "nan"},
        {"per_device_train_batch_size": 0},
        {"temperature": 0},
        {"temperature": -1},
        {"max_completion_length": 0},
        {"seed": -1},
        {"gradient_accumulation_steps": 0},
        {"steps_per_generation": 0},
        {"num_iterations": 0},
        {"beta": -0.1},
        {"epsilon": -1},
        {"weight_decay": -1},
        {"max_grad_norm": -1},
        {"top_p": 2},
        {"evaluation_steps": -1},
        {"evaluation_batch_size": 0},
        {"reward_weights": [1, "inf"]},
        {"max_steps": 0},
        {"max_steps": -2},
        {"max_steps": 1.5},
        {"seed": None},
        {"num_generations": None},
        {"num_iterations": 10**400},
        {"num_iterations": "9" * 5000},
        {"max_steps": 2**31},
        {"learning_rate": "1e999"},
        {"epsilon": 1e300},
        {"reward_time_limit": 1e300},
        {"temperature": 1e-300},
        {"guards": True},
        {"environment_args": 3},
        {"environment_args": ["a"]},
        {"generation_kwargs": 1},
    ],
    ids=str,
)
def test_check_values_rejects_what_trl_accepts(keys):
    assert list(keys)[-1] in error_of(**keys)


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("vllm_importance_sampling_mode", "x", "token_mask"),
        ("vllm_mode", "colocat", "colocate"),
        ("report_to", "wandbb", "wandb"),
        ("report_to", ["none", "tensorbord"], "tensorboard"),
        ("scale_rewards", "groups", "group"),
        ("loss_type", "nll", "dapo"),
        ("estimator", "loop", "loo"),
        ("evaluation_split", "tset", "test"),
        ("dtype", "bfloat", "bfloat16"),
        ("optim", "adamw_torc", "adamw_torch"),
        ("lr_scheduler_type", "cosin", "cosine"),
        ("save_strategy", "step", "steps"),
    ],
)
def test_check_values_names_the_nearest_choice(key, value, nearest):
    assert nearest in error_of(**{key: value})


@pytest.mark.parametrize(
    ("key", "value", "replacement"),
    [
        ("eval_strategy", "steps", "evaluation_steps"),
        ("eval_on_start", True, "evaluation_tasks"),
        ("resume_from_checkpoint", "runs/a/checkpoint-4", "resume"),
    ],
)
def test_check_values_names_the_replacement_of_unsupported_keys(key, value, replacement):
    assert f"set {replacement}" in error_of(**{key: value}).replace("evaluation_tasks and ", "")
    check_values("train", {"eval_strategy": "no", "eval_on_start": False}, KEYS)


def test_check_values_accepts_lists_and_command_specific_choices():
    check_values("train", {"report_to": ["wandb", "tensorboard"], "save_total_limit": 0}, KEYS)
    check_values("sft", {"loss_type": "nll"}, KEYS)


@pytest.mark.parametrize("value", ["perhaps", 2, [True]])
def test_check_values_rejects_bools_that_are_not_true_or_false(value):
    assert "use_peft must be true or false" in error_of(use_peft=value)


def test_check_values_accepts_json_and_json_files_for_mappings(tmp_path):
    path = tmp_path / "zero.json"
    assert "cannot read" in error_of(deepspeed=str(path))
    path.write_text("zero: 3")
    assert str(path) in error_of(deepspeed=str(path))
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}))
    check_values("train", {"deepspeed": str(path), "generation_kwargs": '{"min_new_tokens": 2}'}, KEYS)
    assert "generation_kwargs is not valid JSON" in error_of(generation_kwargs="min_p")
    assert "guards must be a mapping" in error_of(guards="[1]")


def test_check_values_names_the_missing_package(monkeypatch):
    monkeypatch.setattr(late_checks.importlib.util, "find_spec", lambda name: None)
    assert "pip install liger-kernel" in error_of("sft", use_liger_kernel=True)
    check_values("train", {"use_liger_kernel": False}, KEYS)


def test_range_is_formatted_in_words():
    assert str(Range(1)) == "at least 1"
    assert str(Range(0, open_low=True)) == "above 0"
    assert str(Range(0, 1)) == "at least 0 and at most 1"
    assert str(Range(0, 1, open_high=True)) == "at least 0 and below 1"
    assert str(bounds.SEED).endswith("4,294,967,295")


def test_enum_values_parsed_from_source_equal_the_imported_ones():
    for file, name in bounds.ENUMERATIONS.values():
        module = importlib.import_module(f"transformers.{file.removesuffix('.py')}")
        assert bounds.enum_values("transformers", file, name) == tuple(
            member.value for member in getattr(module, name)
        )


def test_choices_match_the_installed_libraries():
    assert set(CHOICES["report_to"]) == {"all", "none", *INTEGRATION_TO_CALLBACK}
    trl = Path(transformers.__file__).parents[1] / "trl" / "trainer"
    source = (trl / "grpo_config.py").read_text() + (trl / "grpo_trainer.py").read_text()
    keys = ("importance_sampling_level", "multi_objective_aggregation", "vllm_mode", "vllm_model_impl")
    keys += ("vllm_importance_sampling_mode",)
    values = [*LOSS_TYPES["train"], *(value for key in keys for value in CHOICES[key])]
    for value in values:
        assert f'"{value}"' in source or f"'{value}'" in source, value
    sft = (trl / "sft_config.py").read_text()
    assert all(f'"{value}"' in sft for value in LOSS_TYPES["sft"])
