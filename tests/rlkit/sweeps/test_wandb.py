"""The file for W&B's sweeps: its agents' own code makes our command line of it, which runs as it is."""

import pytest
import yaml

from rlkit.arguments.parse import parse_train
from rlkit.commands.sweep import main
from rlkit.errors import UserError
from rlkit.sweeps.spec import load_sweep
from rlkit.sweeps.wandb import as_wandb

KEYS = {
    "learning_rate": {"low": 1.0e-6, "high": 1.0e-3, "log": True},
    "environment_args.length": [1, 2],
    "shuffle_dataset": [True, False],
    "num_generations": {"low": 2, "high": 4, "step": 2},
}


def command_of(text, values):
    """What W&B's agent runs for one choice of values."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    given = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    words = []
    for word in create_sweep_command(list(text["command"])):
        words += given["args"] if word == "${args}" else [word]
    return words


def test_the_agents_command_is_ours(write, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    path = write(keys=KEYS, search="random", trials=5, seeds=[0, 1])
    assert main([str(path), "--launcher", "wandb"]) == 0
    file = load_sweep(path).folder / "wandb.yaml"
    assert f"wandb sweep {file}" in capsys.readouterr().out
    text = yaml.safe_load(file.read_text())
    assert text["method"] == "random" and text["run_cap"] == 10
    assert text["metric"] == {"name": "evaluation/even", "goal": "maximize"}
    assert text["parameters"]["seed"] == {"values": [0, 1]}
    values = {
        "learning_rate": 1e-4,
        "environment_args.length": 2,
        "shuffle_dataset": False,
        "num_generations": 4,
    }
    words = command_of(text, values | {"seed": 1})
    assert words[:3] == ["${env}", "rlkit", "train"]
    run = parse_train(words[3:])
    assert (run.trainer_args.learning_rate, run.trainer_args.seed, run.trainer_args.shuffle_dataset) == (
        1e-4,
        1,
        False,
    )
    assert run.args.mapping("environment_args") == {"length": 2}
    assert run.trainer_args.report_to == ["wandb"] and run.trainer_args.output_dir.endswith("wandb-abc")


def test_distributions(write):
    found = as_wandb(load_sweep(write(keys=KEYS, search="optuna", trials=5)), "even")
    assert found["method"] == "bayes"
    assert found["parameters"]["learning_rate"]["distribution"] == "log_uniform_values"
    assert found["parameters"]["num_generations"] == {"distribution": "q_uniform", "q": 2, "min": 2, "max": 4}
    grid = as_wandb(load_sweep(write(keys={"num_generations": KEYS["num_generations"]})), "even")
    assert grid["parameters"]["num_generations"] == {"values": [2, 4]} and "run_cap" not in grid


def test_what_it_cannot_say(write):
    with pytest.raises(UserError, match="cannot pass lists"):
        as_wandb(load_sweep(write(keys={"lora_target_modules": [["q"], ["v"]]})), "even")
    with pytest.raises(UserError, match="evaluation/even: leave out objective"):
        as_wandb(load_sweep(write(keys=KEYS, objective="variety", search="random", trials=1)), "even")


def test_objective_may_be_the_metric_by_name(write):
    text = as_wandb(load_sweep(write(keys=KEYS, objective="even", search="random", trials=1)), "even")
    assert text["metric"]["name"] == "evaluation/even"
