"""Export to W&B: the code of W&B's agents turns the file into a command line that rlkit parses."""

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


def agent_command(content, values):
    """Return the command that a W&B agent runs for one choice of values."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    arguments = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    command = []
    for word in create_sweep_command(list(content["command"])):
        command += arguments["args"] if word == "${args}" else [word]
    return command


def test_agent_runs_a_command_that_rlkit_parses(write, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    path = write(keys=KEYS, search="random", trials=5, seeds=[0, 1])
    assert main([str(path), "--launcher", "wandb"]) == 0
    file = load_sweep(path).folder / "wandb.yaml"
    assert f"wandb sweep {file}" in capsys.readouterr().out
    content = yaml.safe_load(file.read_text())
    assert content["method"] == "random" and content["run_cap"] == 10
    assert content["metric"] == {"name": "evaluation/even", "goal": "maximize"}
    assert content["parameters"]["seed"] == {"values": [0, 1]}
    values = {
        "learning_rate": 1e-4,
        "environment_args.length": 2,
        "shuffle_dataset": False,
        "num_generations": 4,
    }
    command = agent_command(content, values | {"seed": 1})
    assert command[:3] == ["${env}", "rlkit", "train"]
    run = parse_train(command[3:])
    assert run.trainer_args.learning_rate == 1e-4 and run.trainer_args.seed == 1
    assert run.trainer_args.shuffle_dataset is False
    assert run.args.mapping("environment_args") == {"length": 2}
    assert run.trainer_args.report_to == ["wandb"] and run.trainer_args.output_dir.endswith("wandb-abc")


def test_as_wandb_translates_ranges_to_distributions(write):
    content = as_wandb(load_sweep(write(keys=KEYS, search="optuna", trials=5)), "even")
    parameters = content["parameters"]
    assert content["method"] == "bayes"
    assert parameters["learning_rate"]["distribution"] == "log_uniform_values"
    assert parameters["num_generations"] == {"distribution": "q_uniform", "q": 2, "min": 2, "max": 4}
    grid = as_wandb(load_sweep(write(keys={"num_generations": KEYS["num_generations"]})), "even")
    assert grid["parameters"]["num_generations"] == {"values": [2, 4]} and "run_cap" not in grid


def test_as_wandb_rejects_what_agents_cannot_run(write):
    with pytest.raises(UserError, match="cannot pass lists"):
        as_wandb(load_sweep(write(keys={"lora_target_modules": [["q"], ["v"]]})), "even")
    with pytest.raises(UserError, match=r"evaluation/even: remove objective \(variety\)"):
        as_wandb(load_sweep(write(keys=KEYS, objective="variety", search="random", trials=1)), "even")


def test_as_wandb_accepts_the_metric_as_objective(write):
    content = as_wandb(load_sweep(write(keys=KEYS, objective="even", search="random", trials=1)), "even")
    assert content["metric"]["name"] == "evaluation/even"
