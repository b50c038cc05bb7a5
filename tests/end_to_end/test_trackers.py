"""A resumed run logs to the W&B run of its first start, and its own ids take precedence."""

import os
from functools import partial

import pytest

from rlkit.runs.trackers import continued_wandb_run
from tests.end_to_end.killing import KILLED, Run
from tests.end_to_end.test_full_disk import KEYS_BY_STAGE

SETTINGS = ("WANDB_RUN_ID", "WANDB_RESUME")


@pytest.fixture
def settings(monkeypatch):
    """Return a function that returns W&B's settings in the environment, which are unset at first."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return lambda: [os.environ.get(name) for name in SETTINGS]


def test_wandb_run_is_continued_from_the_run_directory(tmp_path, settings):
    with continued_wandb_run(tmp_path, ["wandb"]):
        name, resume = settings()
    assert len(name) == 16 and resume == "allow" and settings() == [None, None]
    with pytest.raises(KeyError), continued_wandb_run(tmp_path, ["tensorboard", "wandb"]):
        assert settings() == [name, "allow"]
        raise KeyError
    assert settings() == [None, None]


def test_wandb_run_of_the_user_takes_precedence(tmp_path, settings, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    with continued_wandb_run(tmp_path, ["wandb"]):
        assert settings() == ["mine", None]
    monkeypatch.delenv("WANDB_RUN_ID")
    monkeypatch.setenv("WANDB_RESUME", "never")
    with continued_wandb_run(tmp_path, ["wandb"]):
        assert settings()[1] == "never"
    assert settings() == [None, "never"]


def test_no_wandb_id_without_wandb(tmp_path, settings):
    with continued_wandb_run(tmp_path, ["tensorboard"]):
        assert settings() == [None, None]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_killed_run_resumes_its_wandb_run(tmp_path, models, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    keys = KEYS_BY_STAGE["train"] | {"model_name_or_path": models["train"], "report_to": "wandb"}
    run = Run(tmp_path, "run", "train", keys)
    assert run(partial(run.operations.kill_before, 1, "checkpoint-2/optimizer.pt")) == KILLED
    assert run(lambda: None) == 0, run.log.read_text()[-3000:]
    (name,) = {path.stem for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    assert name == f"run-{(run.path / 'wandb_id').read_text()}"
