"""The table of `generation_kwargs`: it covers the installed libraries, and rejections say what to do."""

import importlib.util
import inspect
import subprocess
import sys

import pytest

from rlkit.arguments.bounds import check_values
from rlkit.arguments.generation import (
    LOWER_LIMITS,
    NAMES,
    REASONS,
    REPLACEMENTS,
    check_generation_kwargs,
)
from rlkit.arguments.parse import parse_train
from rlkit.arguments.presets import warnings_for
from rlkit.arguments.schema import all_keys, class_fields
from rlkit.errors import UserError

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def error_of(settings, **keys):
    with pytest.raises(UserError) as caught:
        check_generation_kwargs(settings, **({"use_vllm": False} | keys))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_classified(names, source):
    missing = sorted(name for name in names if not name.startswith("_") and name not in NAMES)
    assert not missing, (
        f"{source} has new settings: {', '.join(missing)}. Find out what each changes and add it to "
        "REPLACEMENTS or _REJECTED in rlkit/arguments/generation.py"
    )


# Coverage of the installed libraries


def test_table_covers_generation_config_of_transformers():
    from transformers import GenerationConfig

    assert_classified(vars(GenerationConfig()), "transformers.GenerationConfig")


@needs_vllm
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("sampling_params.py", "SamplingParams"),
        ("entrypoints/openai/completion/protocol.py", "CompletionRequest"),
    ],
)
def test_table_covers_settings_of_vllm(file, name):
    fields = class_fields("vllm", file, name)
    assert {"min_tokens", "temperature"} <= set(fields)
    assert_classified(fields, f"vLLM's {name}")


def test_coverage_error_says_which_name_to_classify():
    with pytest.raises(AssertionError, match=r"new settings: xyz\. .* add it to REPLACEMENTS"):
        assert_classified(["top_k", "xyz", "_internal"], "a library")


def test_each_name_is_in_one_class():
    assert len(set(NAMES)) == len(REPLACEMENTS) + len(REASONS) + len(LOWER_LIMITS)


# Rejections


@pytest.mark.parametrize(("use_vllm", "accepted"), [(False, "min_new_tokens"), (True, "min_tokens")])
def test_each_engine_accepts_one_name_of_the_table(use_vllm, accepted):
    check_generation_kwargs({accepted: 3}, use_vllm=use_vllm)
    for name in set(NAMES) - {accepted}:
        message = error_of({name: 3}, use_vllm=use_vllm)
        assert message.startswith(f"generation_kwargs must not contain `{name}`")
        assert "; use " in message or message.endswith("; remove it")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 3}, "generation_kwargs must not contain `max_length`; use `max_completion_length`"),
        ({"temperature": 0.1}, "must not contain `temperature`; use the key `temperature`"),
        ({"top_k": 1}, "use the key `top_k`"),
        ({"seed": 1}, "use the key `seed`"),
        ({"stop": ["x"]}, "use the attribute `stop` of the environment"),
        ({"num_return_sequences": 2}, "use `num_generations`"),
        ({"structured_outputs": {"regex": "a"}}, "use `vllm_structured_outputs_regex`"),
        ({"do_sample": False}, "another distribution than the loss assumes"),
        ({"suppress_tokens": [2]}, "another distribution than the loss assumes"),
        ({"logit_bias": {"2": 1}}, "the model at `temperature`; remove it"),
        ({"eos_token_id": 50}, "completions would end where the loss expects no end"),
        ({"num_beams": 2}, "beam search"),
        ({"use_cache": False}, "the engine's cache"),
        ({"return_dict_in_generate": True}, "rlkit reads token ids and log-probabilities"),
        ({"prompt_logprobs": 1}, "rlkit reads token ids and log-probabilities"),
        ({"pad_token_id": 0}, "rlkit sets the prompts"),
        ({"transformers_version": "5"}, "no effect"),
        ({"min_length": 3}, "must not contain `min_length` with use_vllm: false; use `min_new_tokens`"),
        ({"min_new_tokens": 3, "top_k": 1}, "use the key `top_k`"),
        ({"foo": 1}, "GenerationConfig, not 'foo' (choices: min_new_tokens)"),
        ({"tempratur": 1}, "not 'tempratur' (did you mean 'temperature'?)"),
        ({"min_new_token": 1}, "(did you mean 'min_new_tokens'?)"),
    ],
    ids=str,
)
def test_rejection_says_why_and_what_to_do(settings, message):
    assert message in error_of(settings)


def test_names_of_another_engine_are_rejected():
    assert "use_vllm: true; use `min_tokens`" in error_of({"min_new_tokens": 3}, use_vllm=True)
    assert "use_vllm: false; use `min_new_tokens`" in error_of({"min_tokens": 3})
    assert "vLLM's SamplingParams, not 'foo' (choices: min_tokens)" in error_of({"foo": 3}, use_vllm=True)


@pytest.mark.parametrize("value", [-1, 9, 1.5, "x", None, True])
def test_minimum_length_must_be_an_integer_up_to_the_maximum(value):
    for use_vllm, name in ((False, "min_new_tokens"), (True, "min_tokens")):
        message = error_of({name: value}, use_vllm=use_vllm, max_tokens=8)
        assert message == f"generation_kwargs.{name} must be an integer from 0 to 8, not {value!r}"
    check_generation_kwargs({"min_new_tokens": 8}, use_vllm=False, max_tokens=8)


def test_minimum_length_is_rejected_where_the_engine_ignores_it_or_fails():
    assert "continuous batching" in error_of({"min_new_tokens": 3}, continuous_batching=True)
    assert "several turns" in error_of({"min_tokens": 3}, use_vllm=True, max_turns=2)
    check_generation_kwargs({"min_new_tokens": 3}, use_vllm=False, max_turns=2)
    check_generation_kwargs({"min_tokens": 3}, use_vllm=True, max_turns=1, continuous_batching=True)


# Keys of a run


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"generation_kwargs": '{"foo": 1}'}, "not 'foo'"),
        ({"generation_kwargs": {"min_tokens": 1}, "use_vllm": "false"}, "use `min_new_tokens`"),
        ({"generation_kwargs": {"min_new_tokens": 1}, "use_vllm": "True"}, "use `min_tokens`"),
        ({"generation_kwargs": {"min_new_tokens": 9}, "max_completion_length": "8"}, "from 0 to 8"),
        (
            {"generation_kwargs": {"min_new_tokens": 9}, "max_completion_length": 9, "max_turn_tokens": 4},
            "from 0 to 4",
        ),
        (
            {"generation_kwargs": {"min_tokens": 1}, "use_vllm": True, "max_turns": "3"},
            "several turns",
        ),
        (
            {"generation_kwargs": {"min_new_tokens": 1}, "use_transformers_continuous_batching": "yes"},
            "continuous batching",
        ),
    ],
    ids=str,
)
def test_check_values_checks_generation_kwargs_against_the_engine(keys, message):
    with pytest.raises(UserError, match=message):
        check_values("train", keys, all_keys("train"))


def test_only_train_has_generation_kwargs():
    from rlkit.evaluation.model import evaluate_model

    assert "generation_kwargs" in all_keys("train")
    assert "generation_kwargs" not in all_keys("sft") | all_keys("rank")
    assert "generation_kwargs" not in inspect.signature(evaluate_model).parameters


def test_parse_train_accepts_a_minimum_length_and_warns_about_it():
    argv = ["--use_cpu", "true", "--bf16", "false", "--generation_kwargs.min_new_tokens", "2"]
    run = parse_train(argv)
    assert run.trainer_args.generation_kwargs == {"min_new_tokens": 2}
    (warning,) = warnings_for(run.keys())
    assert "generation_kwargs.min_new_tokens suppresses EOS tokens" in warning


def test_check_imports_neither_torch_nor_an_engine():
    code = (
        "import sys; from rlkit.arguments.command_line import read_keys\n"
        "try: read_keys('train', ['--generation_kwargs.top_k', '1'])\n"
        "except Exception as error: print(error)\n"
        "print({'torch', 'transformers', 'trl', 'vllm'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == [
        "generation_kwargs must not contain `top_k`; use the key `top_k`",
        "set()",
    ]
