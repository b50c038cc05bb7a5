import numpy as np
import pandas as pd
import pytest

from rlkit.report.run import read_run
from rlkit.report.table import (
    MAX_CHARACTERS,
    rollout_table,
    sample_evenly,
    status,
    training_rollouts,
    truncate,
)


def frame(groups, per_group):
    steps = np.repeat(np.arange(groups), per_group)
    return pd.DataFrame({"step": steps, "task_id": [f"t{i % per_group}" for i in range(len(steps))]})


@pytest.mark.parametrize(
    "groups, per_group, limit", [(10, 50, 100), (10, 50, 105), (300, 4, 100), (3, 5, 99)]
)
def test_sample_evenly_takes_equally_many_rows_per_step(groups, per_group, limit):
    counts = sample_evenly(frame(groups, per_group), "step", limit).groupby("step").size()
    assert counts.sum() == min(limit, groups * per_group)
    assert counts.max() - counts.reindex(range(groups), fill_value=0).min() <= 1
    assert counts.index.max() > groups * 0.9 - 1  # the end of training is included


def test_sample_evenly_takes_the_same_tasks_of_each_group():
    sample = sample_evenly(frame(2, 500), "step", 20)
    assert set(sample[sample["step"] == 0]["task_id"]) == set(sample[sample["step"] == 1]["task_id"])


def test_rollout_table_has_training_and_evaluation_rows(make_run):
    table = rollout_table([read_run(make_run(steps=40, rollouts=4, tasks=60))])
    assert table["total"] == len(table["rows"]) == 40 * 4 + 2 * 60
    assert {row["source"] for row in table["rows"]} == {"before", "after", "training"}
    invalid = [row for row in table["rows"] if row["status"] == "invalid"]
    assert [(row["step"], row["reason"]) for row in invalid] == [(3, "reward timed out")]
    training = next(row for row in table["rows"] if row["source"] == "training")
    assert training["tags"] == "level association"
    assert sum(row["truncated"] for row in table["rows"]) == 1
    assert "format 1" in training["parts"] and "advantage" in training["parts"]


def test_rollout_table_splits_a_thousand_rows_among_runs(make_run):
    runs = [read_run(make_run(name, steps=100, rollouts=8, tasks=300)) for name in ("a", "b")]
    table = rollout_table(runs)
    assert (len(table["rows"]), table["total"]) == (1000, 2 * (800 + 600))
    for name in ("a", "b"):
        counts = pd.Series([row["source"] for row in table["rows"] if row["run"] == name]).value_counts()
        assert counts.to_dict() == {"training": 250, "before": 125, "after": 125}


def test_score_is_the_reward_without_a_metric(make_run):
    rows = rollout_table([read_run(make_run(steps=3, evaluations=()))])["rows"]
    assert all(row["score"] == row["reward"] for row in rows)


def test_status_of_scores():
    assert status(1.0, None) == "correct"
    assert status(0.4, None) == "wrong"
    assert status(None, None) == "unscored"
    assert status(None, "died") == "invalid"


def test_truncate_cuts_long_strings():
    assert truncate("x" * MAX_CHARACTERS) == "x" * MAX_CHARACTERS
    assert truncate("x" * (MAX_CHARACTERS + 1234)).endswith("[… 1,234 more characters]")
    assert truncate(None) == ""


def test_training_rollouts_without_a_score_use_the_metric(make_run):
    """Earlier versions saved no score; a run that a newer version resumed has it for some steps only."""
    run = read_run(make_run(steps=4))
    run.rollouts = run.rollouts.drop(columns="score", errors="ignore")
    scores = training_rollouts(run)["score"]
    assert scores.tolist() == run.rollouts[f"rewards/{run.metric}"].tolist()
    run.rollouts["score"] = scores.where(run.rollouts["step"] > 2)
    assert training_rollouts(run)["score"].tolist() == scores.tolist()
