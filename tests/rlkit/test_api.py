"""`rlkit.train` and `rlkit.evaluate` from a script: the commands, with results to look at."""

import logging

import pandas as pd
import pytest
import yaml

import rlkit
from tests.quick import QUICK, QUICK_GRPO


@pytest.fixture
def config(tmp_path, tiny_folder, monkeypatch):
    """A config of three steps in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    keys = QUICK_GRPO | {"model_name_or_path": tiny_folder}
    path = tmp_path / "quick.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def test_train_returns_directory_metrics_and_evaluations(config, tmp_path, capsys):
    result = rlkit.train(config, max_steps=3, environment_args={"length": 2}, learning_rate=1e-3)
    assert result.directory.resolve() == tmp_path / "runs" / "quick"
    assert (result.directory / "model" / "model.safetensors").is_file()
    assert isinstance(result.metrics, pd.DataFrame)
    assert result.metrics["reward"].dropna().size == 3 and result.metrics["step"].max() == 3
    assert list(result.evaluations) == ["before", "after"]
    assert result.before.metric == result.after.metric == "even"
    assert len(result.before.scores) == 4
    saved = yaml.safe_load((result.directory / "config.yaml").read_text())
    assert saved["environment_args"] == {"length": 2} and saved["max_steps"] == 3
    assert not logging.getLogger("rlkit").handlers, "the caller's logging is as it was"
    with pytest.raises(rlkit.UserError, match="exists"):
        rlkit.train(config, max_steps=3)

    again = rlkit.evaluate(
        result.directory / "model",
        QUICK["environment"],
        environment_args={"length": 2},
        evaluation_tasks=4,
        max_completion_length=6,
    )
    assert again.scores == result.after.scores and again.metric == "even"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        ({"learning_rate": -1}, "learning_rate must be at least 0"),
        ({"environment_args": "x"}, "environment_args is not JSON"),
    ],
    ids=str,
)
def test_wrong_keys_of_train_are_one_line(config, keys, expected):
    with pytest.raises(rlkit.UserError) as caught:
        rlkit.train(config, **keys)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_overwriting_with_the_model_of_another_run(config, tmp_path):
    result = rlkit.train(config, max_steps=1, evaluation_tasks=0)
    again = rlkit.train(
        config, model_name_or_path=result.directory / "model", output_dir=tmp_path / "again", max_steps=1
    )
    assert again.directory == tmp_path / "again" and again.after is not None
    once_more = rlkit.train(
        config, model_name_or_path=tmp_path / "again" / "model", overwrite=True, max_steps=1
    )
    saved = yaml.safe_load((once_more.directory / "config.yaml").read_text())
    assert saved["model_name_or_path"] == str(tmp_path / "again" / "model")


def test_train_without_a_config(tmp_path):
    with pytest.raises(rlkit.UserError, match="no environment given"):
        rlkit.train()
    with pytest.raises(rlkit.UserError, match="no run directory given"):
        rlkit.train(environment="causal-v1", model_name_or_path="m")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"evaluation_tasks": 0}, "evaluation_tasks must be at least 1"),
        ({"samples": 4}, "set temperature 1"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"environment_args": {"lenght": 1}}, "'length'"),
    ],
    ids=str,
)
def test_wrong_options_of_evaluate_are_one_line(options, expected):
    with pytest.raises(rlkit.UserError, match=expected):
        rlkit.evaluate("none", QUICK["environment"], **options)
