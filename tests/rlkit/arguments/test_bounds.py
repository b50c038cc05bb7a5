"""One table of ranges and one of choices; every numeric key is in it, and a value outside it is one line."""

import importlib
import json
import math
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from rlkit.arguments import bounds
from rlkit.arguments.bounds import CHOICES, LOSS_TYPES, RANGES, UNBOUNDED, Range, check_values
from rlkit.arguments.schema import INSTALLED, all_keys
from rlkit.errors import UserError

KINDS = ("int", "float")
KEYS = {key: kind for command in INSTALLED for key, kind in all_keys(command).items()}


def is_numeric(annotation):
    return any(kind.strip() in KINDS for kind in annotation.split("|"))


def refusal(command="train", **keys):
    with pytest.raises(UserError) as caught:
        check_values(command, keys, KEYS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_numeric_key_has_a_range_or_a_reason():
    numeric = {key for key, annotation in KEYS.items() if is_numeric(annotation)}
    assert numeric - set(RANGES) == set(UNBOUNDED)


def test_the_table_has_only_keys_that_exist():
    assert set(RANGES) | set(UNBOUNDED) | set(CHOICES) | set(bounds.PACKAGES) <= set(KEYS)


@pytest.mark.parametrize("command", INSTALLED)
def test_defaults_are_in_range(command):
    from rlkit.arguments.parse import trl_parser

    defaults = {a.dest: a.default for a in trl_parser(command)._actions if a.dest in all_keys(command)}
    known = {key: value for key, value in defaults.items() if value is not None}
    known = {key: getattr(value, "value", value) for key, value in known.items() if key != "max_steps"}
    check_values(command, known, all_keys(command))


@given(st.sampled_from(sorted(RANGES)), st.floats() | st.integers().map(float))
def test_a_number_is_refused_exactly_when_it_is_out_of_range(key, number):
    whole = "int" in [kind.strip() for kind in KEYS[key].split("|")]
    if whole and math.isfinite(number):
        number = int(number)
    allowed = RANGES[key]
    inside = math.isfinite(number) and allowed.low <= number <= allowed.high
    inside = inside and not (allowed.open_low and number == allowed.low)
    inside = inside and not (allowed.open_high and number == allowed.high)
    for value in (number, str(number)):  # as YAML and as a command line have it
        if inside:
            check_values("train", {key: value}, KEYS)
        else:
            assert refusal(**{key: value}).startswith(key)


@given(st.sampled_from(sorted(RANGES)), st.sampled_from(["x", "", True, "1e", [1], "0x1"]))
def test_what_is_no_number_is_refused(key, value):
    if "str" in KEYS[key]:
        return
    assert refusal(**{key: value}).startswith(key)


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
        {"num_iterations": 10**400, "learning_rate": "1e999"},
        {"guards": True},
        {"environment_args": 3},
        {"environment_args": ["a"]},
        {"generation_kwargs": 1},
    ],
    ids=str,
)
def test_values_that_used_to_be_found_late_or_never(keys):
    assert list(keys)[-1] in refusal(**keys)


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
def test_unknown_choices_name_the_nearest(key, value, nearest):
    assert nearest in refusal(**{key: value})


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("eval_strategy", "steps", "evaluation_steps"),
        ("eval_on_start", True, "evaluation_tasks"),
        ("resume_from_checkpoint", "runs/a/checkpoint-4", "resume"),
    ],
)
def test_keys_that_rlkit_does_not_use_name_those_it_does(key, value, instead):
    assert f"set {instead}" in refusal(**{key: value}).replace("evaluation_tasks and ", "")
    check_values("train", {"eval_strategy": "no", "eval_on_start": False}, KEYS)


def test_choices_in_either_spelling_pass():
    check_values("train", {"report_to": ["wandb", "tensorboard"], "save_total_limit": 0}, KEYS)
    check_values("sft", {"loss_type": "nll"}, KEYS)


@pytest.mark.parametrize("value", ["perhaps", 2, [True]])
def test_a_switch_is_true_or_false(value):
    assert "use_peft must be true or false" in refusal(use_peft=value)


def test_mappings_are_json_or_the_name_of_a_file_of_it(tmp_path):
    path = tmp_path / "zero.json"
    assert "cannot read" in refusal(deepspeed=str(path))
    path.write_text("zero: 3")
    assert str(path) in refusal(deepspeed=str(path))
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    check_values("train", {"deepspeed": str(path), "generation_kwargs": '{"min_p": 0.1}'}, KEYS)
    assert "generation_kwargs is not JSON" in refusal(generation_kwargs="min_p")
    assert "guards must be a mapping" in refusal(guards="[1]")


def test_what_needs_a_package_says_so(monkeypatch):
    monkeypatch.setattr(bounds.importlib.util, "find_spec", lambda name: None)
    assert "pip install liger-kernel" in refusal(use_liger_kernel=True)
    check_values("train", {"use_liger_kernel": False}, KEYS)


def test_ranges_read_as_sentences():
    assert str(Range(1)) == "at least 1"
    assert str(Range(0, open_low=True)) == "above 0"
    assert str(Range(0, 1)) == "at least 0 and at most 1"
    assert str(Range(0, 1, open_high=True)) == "at least 0 and below 1"
    assert str(bounds.SEED).endswith("4,294,967,295")


def test_the_enumerations_in_the_source_are_those_that_are_imported():
    for file, name in bounds.ENUMERATIONS.values():
        module = importlib.import_module(f"transformers.{file.removesuffix('.py')}")
        assert bounds.enum_values("transformers", file, name) == tuple(
            one.value for one in getattr(module, name)
        )


def test_the_choices_are_those_of_the_installed_libraries():
    assert set(CHOICES["report_to"]) == {"all", "none", *INTEGRATION_TO_CALLBACK}
    trl = Path(transformers.__file__).parents[1] / "trl" / "trainer"
    text = (trl / "grpo_config.py").read_text() + (trl / "grpo_trainer.py").read_text()
    late = ("importance_sampling_level", "multi_objective_aggregation", "vllm_mode", "vllm_model_impl")
    late += ("vllm_importance_sampling_mode",)
    for value in (*LOSS_TYPES["train"], *(value for key in late for value in CHOICES[key])):
        assert f'"{value}"' in text or f"'{value}'" in text, value
    sft = (trl / "sft_config.py").read_text()
    assert all(f'"{value}"' in sft for value in LOSS_TYPES["sft"])
