"""`rlkit.train` and `rlkit.evaluate`: the commands as functions that return results."""

import logging

import pandas as pd
import pytest
import yaml

import rlkit
from tests.quick import QUICK, QUICK_GRPO


@pytest.fixture
def config(tmp_path, tiny_folder, monkeypatch):
    """Return a quick config in an empty working directory."""
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
    assert not logging.getLogger("rlkit").handlers, "the caller's logging must not change"
    with pytest.raises(rlkit.UserError, match="exists"):
        rlkit.train(config, max_steps=3)

    evaluation = rlkit.evaluate(
        result.directory / "model",
        QUICK["environment"],
        environment_args={"length": 2},
        evaluation_tasks=4,
        max_completion_length=6,
    )
    assert evaluation.scores == result.after.scores and evaluation.metric == "even"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        ({"learning_rate": -1}, "learning_rate must be at least 0"),
        ({"environment_args": "x"}, "environment_args is not valid JSON"),
    ],
    ids=str,
)
def test_train_raises_one_line_errors_for_invalid_keys(config, keys, expected):
    with pytest.raises(rlkit.UserError) as caught:
        rlkit.train(config, **keys)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_train_overwrites_a_run_with_the_model_of_another(config, tmp_path):
    first = rlkit.train(config, max_steps=1, evaluation_tasks=0)
    second = rlkit.train(
        config, model_name_or_path=first.directory / "model", output_dir=tmp_path / "second", max_steps=1
    )
    assert second.directory == tmp_path / "second" and second.after is not None
    third = rlkit.train(config, model_name_or_path=tmp_path / "second" / "model", overwrite=True, max_steps=1)
    saved = yaml.safe_load((third.directory / "config.yaml").read_text())
    assert saved["model_name_or_path"] == str(tmp_path / "second" / "model")


def test_train_without_config_names_the_missing_key(tmp_path):
    with pytest.raises(rlkit.UserError, match="no environment given"):
        rlkit.train()
    with pytest.raises(rlkit.UserError, match="no run directory given"):
        rlkit.train(environment="causal-v1", model_name_or_path="m")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"evaluation_tasks": 0}, "evaluation_tasks must be at least 1"),
        ({"samples": 4}, "set temperature, e.g. to 1"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"environment_args": {"lenght": 1}}, "'length'"),
    ],
    ids=str,
)
def test_evaluate_raises_one_line_errors_for_invalid_options(options, expected):
    with pytest.raises(rlkit.UserError, match=expected):
        rlkit.evaluate("none", QUICK["environment"], **options)
