import shutil

import pytest

from rlkit.arguments.keys import OBJECTIVES as RANK_OBJECTIVES
from rlkit.report.run import read_run
from rlkit.report.summary import OBJECTIVES, duration, evaluation_rows, facts, headline, p_value


def test_headline_compares_before_and_after(make_run):
    text = headline(read_run(make_run(tasks=300)))
    assert text["figure"].startswith("correct ") and " → " in text["figure"]
    assert text["sentence"].startswith("GRPO raised the mean correct of Qwen/Qwen2.5-0.5B-Instruct from ")
    assert "on 300 held-out test tasks of causal-v1" in text["sentence"]
    assert "paired permutation test, p < 0.001" in text["sentence"]


def test_headline_claims_no_more_than_the_test_allows(make_run):
    assert "did not measurably change" in headline(read_run(make_run(gain=0.0)))["sentence"]


def test_headline_of_a_run_with_one_evaluation_or_none(make_run):
    one = headline(read_run(make_run("one", evaluations=("after",))))
    assert "GRPO: Qwen/Qwen2.5-0.5B-Instruct on causal-v1: mean correct " in one["sentence"]
    assert one["figure"].startswith("correct ") and one["figure"].endswith("%")
    none = headline(read_run(make_run("none", evaluations=())))
    assert none["figure"] == "" and "no held-out evaluation" in none["sentence"]


def test_evaluations_that_do_not_pair_are_noted(make_run):
    path = make_run()
    file = path / "evaluation" / "before.json"
    file.write_text(file.read_text().replace('"num_nodes": 10', '"num_nodes": 5'))
    run = read_run(path)
    assert "GRPO changed the mean correct of" in headline(run)["sentence"]
    assert "differ in environment_args" in run.notes[-1]


def test_headline_compares_evaluations_by_one_metric(make_run):
    """The last evaluation decides: one by another metric is not what the model had before."""
    path = make_run(evaluations=("after",), metric="ndcg")
    other = make_run("other", evaluations=("before",))
    shutil.copy(other / "evaluation" / "before.json", path / "evaluation")
    run = read_run(path)
    assert run.metric == "correct"
    text = headline(run)
    assert text["figure"].startswith("ndcg ") and "→" not in text["figure"]
    assert [row["metric"] for row in evaluation_rows([run])] == ["correct", "ndcg"]


@pytest.mark.parametrize("objective", RANK_OBJECTIVES)
def test_headline_of_rank_run_names_its_objective(make_run, objective):
    run = read_run(make_run(tasks=300, metric="ndcg", objective=objective))
    sentence = headline(run)["sentence"]
    assert sentence.startswith(f"{OBJECTIVES[objective]} raised the mean ndcg of ")
    assert ("algorithm", OBJECTIVES[objective]) in facts(run)
    assert ("steps", "40") in facts(run)


def test_facts_and_evaluation_rows(make_run):
    run = read_run(make_run(steps=40))
    assert dict(facts(run))["time"] == "21 min 20 s"
    assert ("num nodes", "10") in facts(run)
    assert [(row["name"], row["decoding"]) for row in evaluation_rows([run])] == [
        ("before", "greedy"),
        ("after", "greedy"),
    ]


def test_numbers_in_words():
    assert duration(7323) == "2 h 02 min" and duration(float("nan")) is None
    assert (p_value(0.0002), p_value(0.0312)) == ("p < 0.001", "p = 0.031")
