import shutil

import pytest

from rlkit.arguments.keys import OBJECTIVES as RANK_OBJECTIVES
from rlkit.evaluation import Evaluation, accuracy_interval
from rlkit.report.run import read_run
from rlkit.report.summary import (
    OBJECTIVES,
    changes_by_column,
    evaluation_rows,
    facts,
    format_duration,
    format_p_value,
    headline,
)


def test_headline_compares_before_and_after(make_run):
    text = headline(read_run(make_run(tasks=300)))
    assert text["figure"].startswith("correct ") and " → " in text["figure"]
    assert text["sentence"].startswith("GRPO raised the mean correct of Qwen/Qwen2.5-0.5B-Instruct from ")
    assert "on 300 held-out test tasks of causal-v1" in text["sentence"]
    assert "paired permutation test, p < 0.001" in text["sentence"]
    assert "correct by level: training raised association (" in text["sentence"]


def test_headline_claims_no_more_than_the_test_allows(make_run):
    assert "did not measurably change" in headline(read_run(make_run(gain=0.0)))["sentence"]


def test_changes_by_column_groups_kinds_by_direction():
    def evaluation(name, solved):
        """Return an evaluation of 20 tasks of each kind, of which as many are solved as `solved` says."""
        tasks = [(f"{kind}-{i}", kind, float(i < n)) for kind, n in solved.items() for i in range(20)]
        accuracy = accuracy_interval([score for *_, score in tasks])
        return Evaluation(
            name=name, model="m", environment="e", environment_args={}, split="test", seed=0, temperature=0.0,
            samples=1, metric="correct", accuracy=accuracy, pass_at={}, avg_at={}, rewards={}, length=1.0,
            truncated=0.0, invalid=0,
            breakdown={"level": {"x": accuracy}, "kind": dict.fromkeys(solved, accuracy)},
            scores={task: [score] for task, _, score in tasks},
            completions=[{"task_id": task, "level": "x", "kind": kind} for task, kind, _ in tasks],
        )  # fmt: skip

    before = evaluation("before", {"row": 20, "sum": 2, "product": 3})
    after = evaluation("after", {"row": 10, "sum": 17, "product": 5})
    assert changes_by_column(before, after) == (
        "correct by kind: training raised sum (10% → 85%, n = 20); lowered row (100% → 50%, n = 20); "
        "did not measurably change product (15% → 25%, n = 20)."
    )
    alike = evaluation("before", {"row": 20}), evaluation("after", {"row": 20})
    assert changes_by_column(*alike) == ""
    many = evaluation("many", dict.fromkeys(map(str, range(9)), 3))
    assert changes_by_column(many, many) == ""


def test_headline_works_with_one_evaluation_or_none(make_run):
    single = headline(read_run(make_run("one", evaluations=("after",))))
    assert "GRPO: Qwen/Qwen2.5-0.5B-Instruct on causal-v1: mean correct " in single["sentence"]
    assert single["figure"].startswith("correct ") and single["figure"].endswith("%")
    empty = headline(read_run(make_run("none", evaluations=())))
    assert empty["figure"] == "" and "no held-out evaluation" in empty["sentence"]


def test_headline_notes_evaluations_that_cannot_be_compared(make_run):
    path = make_run()
    file = path / "evaluation" / "before.json"
    file.write_text(file.read_text().replace('"num_nodes": 10', '"num_nodes": 5'))
    run = read_run(path)
    assert "GRPO changed the mean correct of" in headline(run)["sentence"]
    assert "differ in environment_args" in run.notes[-1]


def test_headline_compares_evaluations_with_the_same_metric_only(make_run):
    """The last evaluation determines the metric; an earlier one by another metric does not count."""
    path = make_run(evaluations=("after",), metric="ndcg")
    other_run = make_run("other", evaluations=("before",))
    shutil.copy(other_run / "evaluation" / "before.json", path / "evaluation")
    run = read_run(path)
    assert run.metric == "correct"
    text = headline(run)
    assert text["figure"].startswith("ndcg ") and "→" not in text["figure"]
    assert [row["metric"] for row in evaluation_rows([run])] == ["correct", "ndcg"]


@pytest.mark.parametrize("objective", RANK_OBJECTIVES)
def test_headline_names_the_objective_of_a_rank_run(make_run, objective):
    run = read_run(make_run(tasks=300, metric="ndcg", objective=objective))
    sentence = headline(run)["sentence"]
    assert sentence.startswith(f"{OBJECTIVES[objective]} raised the mean ndcg of ")
    assert ("algorithm", OBJECTIVES[objective]) in facts(run)
    assert ("steps", "40") in facts(run)


def test_facts_write_mappings_and_lists_without_brackets(make_run):
    run = read_run(make_run())
    kinds = {"row": 1, "arithmetic": 3}
    run.config["environment_args"] = {"kinds": kinds, "hops": [1, 2], "noise": {}, "roots": None}
    values = dict(facts(run))
    assert [values[name] for name in ("kinds", "hops", "noise")] == ["row 1, arithmetic 3", "1, 2", "none"]
    assert "roots" not in values


def test_facts_and_evaluation_rows_of_a_run(make_run):
    run = read_run(make_run(steps=40))
    assert dict(facts(run))["time"] == "21 min 20 s"
    assert ("num nodes", "10") in facts(run)
    assert [(row["name"], row["decoding"]) for row in evaluation_rows([run])] == [
        ("before", "greedy"),
        ("after", "greedy"),
    ]


def test_format_duration_and_p_value():
    assert format_duration(7323) == "2 h 02 min" and format_duration(float("nan")) is None
    assert (format_p_value(0.0002), format_p_value(0.0312)) == ("p < 0.001", "p = 0.031")
