"""Algorithm presets: what each one sets and rejects, and that explicit keys override its defaults."""

import pytest

from rlkit.arguments.parse import parse_train
from rlkit.arguments.presets import PRESETS, warnings_for
from rlkit.errors import UserError


def parse(algorithm, *argv):
    group = ["--group_by", "hops"] if algorithm == "hrpo" and "--group_by" not in argv else []
    base = ["--algorithm", algorithm, "--use_cpu", "true", "--bf16", "false", "--output_dir", "runs/x"]
    return parse_train([*base, *group, *argv])


@pytest.mark.parametrize("algorithm", PRESETS)
def test_preset_sets_its_keys(algorithm):
    run = parse(algorithm)
    for key, value in PRESETS[algorithm].keys.items():
        holder = run.trainer_args if hasattr(run.trainer_args, key) else run.args
        assert getattr(holder, key) == value, key


@pytest.mark.parametrize("algorithm", PRESETS)
def test_resolved_config_of_each_preset_parses_to_itself(algorithm, tmp_path):
    import yaml

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(parse(algorithm, "--learning_rate", "3e-5").resolved()))
    reparsed = parse_train(["--config", str(path)])
    assert reparsed.resolved() == parse(algorithm, "--learning_rate", "3e-5").resolved()
    assert reparsed.args.algorithm == algorithm and reparsed.trainer_args.learning_rate == 3e-5


def test_command_line_overrides_the_preset():
    run = parse("dapo", "--epsilon_high", "0.4", "--dynamic_sampling", "false")
    assert run.trainer_args.epsilon_high == 0.4 and not run.args.dynamic_sampling


def test_file_overrides_the_preset(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("algorithm: hapo\nbeta: 0.0\nuse_cpu: true\nbf16: false\n")
    run = parse_train(["--config", str(path)])
    assert run.trainer_args.beta == 0.0 and run.trainer_args.loss_type == "grpo"


def test_algorithm_on_the_command_line_overrides_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("algorithm: hapo\nuse_cpu: true\nbf16: false\n")
    for argv in (["--algorithm", "cispo"], ["--algorithm=cispo"]):
        assert parse_train(["--config", str(path), *argv]).trainer_args.loss_type == "cispo"


@pytest.mark.parametrize(
    ("algorithm", "argv", "message"),
    [
        ("dr_grpo", ["--scale_rewards", "group"], "dr_grpo requires scale_rewards: none, not group"),
        ("dapo", ["--loss_type", "grpo"], "dapo requires loss_type: dapo"),
        ("gspo", ["--importance_sampling_level", "token"], "requires importance_sampling_level: sequence"),
        ("gspo", ["--loss_type", "dapo"], "requires loss_type: grpo"),
        ("cispo", ["--loss_type", "dapo"], "requires loss_type: cispo"),
        ("rloo", ["--scale_rewards", "group"], "requires scale_rewards: none"),
        ("rloo", ["--num_iterations", "2"], "requires num_iterations: 1"),
        ("rloo", ["--steps_per_generation", "2"], "rloo is on-policy"),
        ("rloo", ["--steps_per_generation", "3", "--gradient_accumulation_steps", "4"], "rloo is on-policy"),
        ("rloo", ["--mask_truncated_completions", "true"], "remove mask_truncated_completions"),
        ("reinforce_pp", ["--dynamic_sampling", "true"], "cannot be normalized over the batch"),
        ("dr_grpo", ["--multi_objective_aggregation", "normalize_then_sum"], "its own baseline"),
        ("dapo", ["--dynamic_sampling_attempts", "0"], "at least 1, not 0"),
        ("grpo", ["--sync_ref_model", "true"], "requires beta above 0"),
        ("grpo", ["--sync_ref_model", "true", "--beta", "0.1", "--use_peft", "true"], "no LoRA"),
        ("reinforce_pp", ["--scale_rewards", "group"], "requires scale_rewards: batch"),
        ("hrpo", ["--dynamic_sampling", "true"], "hrpo samples one"),
        ("hrpo", ["--scale_rewards", "batch"], "group or none"),
        ("hrpo", ["--multi_objective_aggregation", "normalize_then_sum"], "its own baseline"),
        ("grpo", ["--group_by", "hops"], "group_by requires algorithm hrpo"),
        ("grpo", ["--num_generations", "1"], "at least 2"),
        ("grpo", ["--epsilon_high", "0.1"], "epsilon_high 0.1 must not be below epsilon 0.2"),
        ("grpo", ["--loss_type", "dappo"], "unknown loss_type 'dappo'.*dapo"),
        ("grpo", ["--scale_rewards", "groups"], "unknown scale_rewards 'groups'.*group"),
        ("gpro", [], "unknown algorithm 'gpro'.*mean"),
    ],
)
def test_check_preset_rejects_contradictions(algorithm, argv, message):
    with pytest.raises(UserError, match=message):
        parse(algorithm, *argv)


def test_check_preset_requires_group_by_for_hrpo():
    with pytest.raises(UserError, match="hrpo requires group_by"):
        parse_train(["--algorithm", "hrpo", "--use_cpu", "true", "--bf16", "false"])


def test_warnings_for_two_generations_with_group_scaling():
    keys = {"num_generations": 2, "scale_rewards": "group", "loss_type": "grpo"}
    assert "0.71" in warnings_for(keys)[0]
    assert not warnings_for(keys | {"scale_rewards": "none"})
    assert not warnings_for(keys | {"num_generations": 4})


def test_warnings_for_cispo_without_epsilon_high():
    keys = {"num_generations": 8, "scale_rewards": "group", "loss_type": "cispo", "epsilon_high": None}
    assert "epsilon_high: 5.0" in warnings_for(keys)[0]
    assert not warnings_for(keys | {"epsilon_high": 5.0})


def test_warnings_for_keys_that_change_the_sampling_distribution():
    keys = {"num_generations": 4, "scale_rewards": "group", "loss_type": "grpo"}
    wide = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    assert not warnings_for(keys | wide)
    assert "top_p and min_p" in warnings_for(keys | wide | {"top_p": 0.9, "min_p": 0.1})[0]
