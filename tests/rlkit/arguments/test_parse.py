"""Parsing one set of keys from YAML and the command line; every error is one line."""

import importlib.metadata
import json
import re

import pytest
import yaml

from rlkit.arguments.parse import parse_rank, parse_sft, parse_train, resolved_text
from rlkit.errors import UserError
from rlkit.training.session import make_environment
from tests.quick import ROOT

CONFIGS = sorted(
    path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name not in ("accelerate", "sweeps")
)
CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.fixture
def write(tmp_path):
    def write(**keys):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(CPU | keys))
        return str(path)

    return write


def error_of(parse, *arguments):
    """Return the message of the UserError that `parse` raises."""
    with pytest.raises(UserError) as caught:
        parse(list(arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_parse_train_lets_the_command_line_override_the_file(write):
    path = write(
        environment="causal-v1", learning_rate=1e-5, num_generations=4, per_device_train_batch_size=8
    )
    run = parse_train(["--config", path, "--learning_rate", "0.5", "--num_tasks", "7"])
    assert run.trainer_args.learning_rate == 0.5
    assert run.trainer_args.num_generations == 4
    assert run.args.num_tasks == 7
    assert run.args.environment == "causal-v1"


def test_parse_train_reads_a_leading_argument_as_config(write):
    assert parse_train([write(environment="causal-v1"), "--num_tasks", "7"]).args.environment == "causal-v1"


def test_parse_train_sets_parts_of_a_mapping(write):
    path = write(environment_args={"level": "association", "nodes": 3})
    argv = ["--environment_args.level", "intervention", "--environment_args.rate=1e-3"]
    run = parse_train(["--config", path, *argv, "--guards.length", "stop"])
    assert run.args.mapping("environment_args") == {"level": "intervention", "nodes": 3, "rate": 0.001}
    assert run.args.mapping("guards") == {"length": "stop"}
    assert run.resolved()["environment_args"] == run.args.mapping("environment_args")


def test_parse_train_rejects_invalid_parts(write):
    path = write(environment="causal-v1", environment_args={"level": 1})
    assert "did you mean 'environment_args'" in error_of(parse_train, path, "--environment_arg.level", "1")
    assert "needs a value" in error_of(parse_train, path, "--environment_args.level", "--num_tasks", "1")
    assert "not a mapping" in error_of(parse_train, path, "--environment_args.level.deep", "1")
    both = ["--environment_args.level", "1", "--environment_args", "{}"]
    assert "not both" in error_of(parse_train, path, *both)


def test_parse_passes_keys_to_their_dataclasses(write):
    run = parse_train(
        ["--config", write(model_name_or_path="m", lora_r=3, use_peft=True, rewards=["a", "b"])]
    )
    assert (run.model_args.model_name_or_path, run.model_args.lora_r, run.model_args.use_peft) == (
        "m",
        3,
        True,
    )
    assert run.args.rewards == ["a", "b"]
    assert (
        parse_sft(["--config", write(packing=True, demonstrations="solution")]).trainer_args.packing is True
    )


def test_output_dir_defaults_to_the_name_of_the_config(write):
    path = write()
    assert parse_train(["--config", path]).trainer_args.output_dir == "runs/recipe"
    assert parse_train(["--config", path, "--output_dir", "a"]).trainer_args.output_dir == "a"
    assert parse_train(["--config", write(output_dir="b")]).trainer_args.output_dir == "b"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("environment_args", {"level": "association", "num_nodes": 3}, None),
        ("generation_kwargs", {"min_new_tokens": 2}, None),
        ("reward_weights", [0.5, -1, 1e-3], [0.5, -1.0, 0.001]),
        ("reward_weights", [-1e-3, "-2e-7"], [-1e-3, -2e-7]),
        ("lora_target_modules", ["q_proj", "v_proj"], None),
        ("learning_rate", "1e-6", 1e-6),
        ("gradient_checkpointing", False, None),
        ("shared_prefix", False, None),
        ("max_completion_length", None, None),
    ],
)
def test_parse_train_converts_values_of_every_type(write, key, value, expected):
    run = parse_train(["--config", write(use_peft=True, **{key: value})])
    if key == "environment_args":
        parsed = run.args.mapping(key)
    else:
        args = next(args for args in (run.args, run.trainer_args, run.model_args) if hasattr(args, key))
        parsed = getattr(args, key)
    assert parsed == (value if expected is None else expected)


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["self_attn.q_proj"], ["self_attn.q_proj"]),
        ("layers.0.mlp.up_proj", ["layers.0.mlp.up_proj"]),
        (["q_proj"], ["q_proj"]),
        ("all-linear", "all-linear"),
        (".*q_proj", ".*q_proj"),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_single_lora_target_module_stays_a_list(write, target_modules, expected):
    run = parse_train(["--config", write(use_peft=True, lora_target_modules=target_modules)])
    assert run.model_args.lora_target_modules == expected


def test_parse_train_reads_a_mapping_on_the_command_line_as_json(write):
    run = parse_train(
        ["--config", write(environment_args={"a": 1}), "--environment_args", json.dumps({"b": 2})]
    )
    assert run.args.mapping("environment_args") == {"b": 2}


@pytest.mark.parametrize("parse", [parse_train, parse_sft])
def test_parse_names_the_nearest_key(write, parse):
    from_file = error_of(parse, "--config", write(learning_rat=1e-5))
    assert "'learning_rat'" in from_file and "'learning_rate'" in from_file and "recipe.yaml" in from_file
    from_line = error_of(parse, "--config", write(), "--enviroment", "causal-v1")
    assert "enviroment" in from_line and "'environment'" in from_line


def test_parse_train_rejects_abbreviated_keys(write):
    assert "num_task" in error_of(parse_train, "--config", write(), "--num_task", "3")


@pytest.mark.parametrize(
    ("keys", "fragments"),
    [
        ({"num_generations": "many"}, ["num_generations", "many"]),
        ({"num_generations": 3, "per_device_train_batch_size": 8}, ["num_generations", "divisible"]),
        ({"algorithm": "grpoo"}, ["grpoo", "grpo"]),
        ({"use_peft": "perhaps"}, ["use_peft"]),
        ({"lr_scheduler_type": "wavy"}, ["wavy"]),
        ({"eval_strategy": "steps", "eval_steps": 5}, ["evaluation_steps"]),
    ],
    ids=lambda value: next(iter(value)),
)
def test_parse_train_raises_one_line_errors(write, keys, fragments):
    line = error_of(parse_train, "--config", write(**keys))
    assert all(fragment in line for fragment in fragments), line


def test_parse_sft_names_the_nearest_demonstrations(write):
    assert "'solution'" in error_of(parse_sft, "--config", write(demonstrations="solutoin"))


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("- a\n- b\n", ["must contain a mapping"]),
        ("a: [1\nb: 2", ["not valid YAML", "line 2"]),
        ("", ["must contain a mapping"]),
    ],
)
def test_parse_train_rejects_a_file_that_is_not_a_config(tmp_path, text, fragments):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    line = error_of(parse_train, "--config", str(path))
    assert all(fragment in line for fragment in fragments), line


def test_parse_train_rejects_a_missing_file(tmp_path):
    assert "No such file" in error_of(parse_train, "--config", str(tmp_path / "none.yaml"))
    assert "needs a file" in error_of(parse_train, "--config")


@pytest.mark.parametrize("text", ["{broken", "[1, 2]", "3"])
def test_parse_train_rejects_environment_args_that_are_not_a_mapping(write, text):
    assert "environment_args" in error_of(parse_train, write(), "--environment_args", text)


@pytest.mark.parametrize(
    ("keys", "bf16"), [({}, False), ({"bf16": True, "use_cpu": True}, True), ({"use_cpu": True}, False)]
)
def test_parse_train_defaults_to_float32_without_a_gpu(tmp_path, monkeypatch, keys, bf16):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    path = tmp_path / "plain.yaml"
    path.write_text(yaml.safe_dump({"report_to": "none"} | keys))
    run = parse_train([str(path)])
    assert run.trainer_args.bf16 is bf16
    assert ("bf16" in run.explicit) is ("bf16" in keys)


def test_parse_train_rejects_repeated_keys(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("seed: 1\nenvironment_args:\n  level: 1\n  level: 2\n")
    assert "'level' is set twice, on lines 3 and 4" in error_of(parse_train, str(path))
    path.write_text("seed: 1\nlearning_rate: 1\nseed: 1\n")
    assert "'seed' is set twice, on lines 1 and 3" in error_of(parse_train, str(path))
    path.write_text(
        "base: &base {a: 1}\nguards:\n  <<: *base\n  a: 2\n"
    )  # overriding a merged key is allowed
    assert "unknown key 'base'" in error_of(parse_train, str(path))


def test_parse_train_accepts_overridden_merge_keys(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text(
        "environment_args:\n  a: &x {<<: &b {k: 1}, k: 2}\n  b: {<<: *x, k: 3}\n  c: {k: 4}\nseed: 3\n"
    )
    merged = {"a": {"k": 2}, "b": {"k": 3}, "c": {"k": 4}}
    assert parse_train([str(path)]).args.mapping("environment_args") == merged
    path.write_text("learning_rate: {{ lr }}\n")
    assert "not valid YAML" in error_of(parse_train, str(path))


@pytest.mark.parametrize("key", ["report_to", "optim_target_modules"])
def test_parse_train_keeps_lists_of_keys_that_also_accept_a_string(write, key):
    run = parse_train([write(**{key: ["wandb", "tensorboard"]})])
    assert getattr(run.trainer_args, key) == ["wandb", "tensorboard"]
    assert run.resolved()[key] == ["wandb", "tensorboard"]
    argv = [f"--{key}", "wandb", "tensorboard"]
    assert getattr(parse_train([write(), *argv]).trainer_args, key) == ["wandb", "tensorboard"]


@pytest.mark.parametrize("key", ["steps_per_generation", "generation_batch_size", "bf16", "save_total_limit"])
def test_parse_train_lets_trl_replace_null_with_its_default(write, key):
    assert parse_train([write(**{key: None})]).trainer_args.steps_per_generation is not None


def test_resolved_text_is_valid_yaml_for_parsed_objects(write):
    run = parse_train([write(), "--accelerator_config", '{"split_batches": false}'])
    assert yaml.safe_load(resolved_text(run))["accelerator_config"] == {"split_batches": False}


def test_make_environment_requires_the_key_environment(write):
    with pytest.raises(UserError, match="'environment'"):
        make_environment(parse_train(["--config", write()]).args)


def test_resolved_text_names_versions_of_a_checkout_that_is_not_installed(write, monkeypatch):
    version = importlib.metadata.version

    def only_installed(package):
        if package == "rlkit-llm":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", only_installed)
    text = resolved_text(parse_train([write()]))
    assert text.splitlines()[0].endswith(
        f"rlkit-llm (not installed), trl {version('trl')}, transformers {version('transformers')}, "
        f"torch {version('torch')}"
    )


def test_resolved_text_parses_to_the_same_run(write, tmp_path):
    path = write(
        environment="causal-v1",
        environment_args={"num_nodes": 3},
        rewards=["distribution"],
        reward_weights=[0.5],
        use_peft=True,
        lora_target_modules="all-linear",
        num_generations=4,
        overwrite=True,
    )
    argv = [
        "--learning_rate",
        "0.25",
        "--lr_scheduler_type",
        "constant",
        "--shuffle_dataset",
        "false",
        "--seed=7",
    ]
    run = parse_train(["--config", path, *argv])
    (tmp_path / "config.yaml").write_text(resolved_text(run))
    reparsed = parse_train(["--config", str(tmp_path / "config.yaml")])
    assert reparsed.resolved() == run.resolved()
    assert reparsed.args.environment_args == run.args.environment_args
    assert reparsed.trainer_args.lr_scheduler_type == run.trainer_args.lr_scheduler_type == "constant"
    assert reparsed.trainer_args.shuffle_dataset is run.trainer_args.shuffle_dataset is False
    assert reparsed.trainer_args.output_dir == run.trainer_args.output_dir == "runs/recipe"
    assert (reparsed.trainer_args.seed, reparsed.trainer_args.learning_rate) == (7, 0.25)
    assert reparsed.args.overwrite is False  # a key for a single start
    assert "trl" in (tmp_path / "config.yaml").read_text().splitlines()[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_configs_of_the_repository_parse(path):
    keys = yaml.safe_load(path.read_text())
    parse = parse_train if "algorithm" in keys else parse_rank if "objective" in keys else parse_sft
    run = parse(["--config", str(path), "--use_cpu", "true", "--bf16", "false"])
    assert run.args.environment == keys["environment"]
    try:
        assert make_environment(run.args).id == keys["environment"]
    except UserError as error:  # collections that users download, or that `make pairs` builds
        assert re.search("there is no collection '(data/|runs/pairs/man)", str(error))
