"""A run never writes over another by accident."""

import json
import math

import pandas as pd
import pytest

from rlkit.errors import UserError
from rlkit.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run", "train")
    run.open(resume=False, overwrite=False)
    return run


@pytest.fixture
def used(run):
    (run.path / "config.yaml").write_text("a: 1\n")
    (run.path / "rollouts" / "old.parquet").touch()
    return run


def test_a_run_that_exists_is_not_touched(used):
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        used.open(resume=False, overwrite=False)
    assert (used.path / "rollouts" / "old.parquet").exists()


def test_empty_folders_are_no_run(run):
    run.open(resume=False, overwrite=False)
    assert (run.path / "rollouts").is_dir() and (run.path / "evaluation").is_dir()


def test_resume_keeps_and_overwrite_deletes(used):
    used.open(resume=True, overwrite=False)
    assert (used.path / "rollouts" / "old.parquet").exists()
    used.open(resume=False, overwrite=True)
    assert not (used.path / "config.yaml").exists()
    assert list((used.path / "rollouts").iterdir()) == []


def test_resume_and_overwrite_exclude_each_other(used):
    with pytest.raises(UserError, match="exclude"):
        used.open(resume=True, overwrite=True)


def test_overwrite_deletes_nothing_but_runs(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not a run directory"):
        RunDirectory(tmp_path, "train").open(resume=False, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_rewinding_takes_back_what_came_after(run):
    for step in (1, 2, 3):
        run.log(step, {"reward": step})
        run.save_rollouts(step, [{"a": step}])
        (run.path / "evaluation" / f"step-{step}.json").touch()
    (run.path / "rollouts" / "step-000004.partial").touch()
    other = RunDirectory(run.path, "sft")
    other.log(7, {"loss": 1.0})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    run.rewind(2)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("train", 1), ("train", 2), ("sft", 7)]
    assert sorted(p.name for p in (run.path / "rollouts").iterdir()) == [
        f"step-00000{i}.parquet" for i in (1, 2)
    ]
    assert sorted(p.name for p in (run.path / "evaluation").iterdir()) == ["step-1.json", "step-2.json"]


def test_the_clock_goes_on(run):
    run.started -= 100.0
    run.log(1, {"reward": 1})
    again = RunDirectory(run.path, "train")
    again.rewind(1)
    again.log(2, {"reward": 2})
    seconds = [json.loads(line)["seconds"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert 100 <= seconds[0] <= seconds[1] < 200


def test_metrics_are_lines_of_valid_json(run):
    run.log(1, {"loss": math.nan, "reward": 0.5, "lr": math.inf, "note": "x", "none": None, "done": True})
    run.log(2, {"reward": pd.Series([1.0])[0]})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (run.path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in text)
    assert first | {"seconds": 0} == {
        **{"step": 1, "stage": "train", "seconds": 0, "loss": None, "reward": 0.5, "lr": None},
        **{"note": "x", "none": None, "done": True},
    }
    assert (second["step"], second["reward"]) == (2, 1.0)


def test_rollouts_replace_those_of_the_same_step(run):
    run.save_rollouts(3, [{"a": 1}, {"a": 2}])
    run.save_rollouts(3, [{"a": 5}])
    files = list((run.path / "rollouts").iterdir())
    assert [file.name for file in files] == ["step-000003.parquet"]
    assert pd.read_parquet(files[0])["a"].tolist() == [5]
