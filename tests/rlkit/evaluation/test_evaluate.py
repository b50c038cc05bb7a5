from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
from datasets import Dataset

from rlkit.environment import Environment
from rlkit.errors import UserError
from rlkit.evaluation import Evaluation, compare, compare_by, evaluate
from rlkit.rollouts import Rollout
from rlkit.scoring import Scores


def correct(completion, total):
    return float(completion == str(total))


def short(completion):
    return 1.0 if len(completion) < 3 else None


class Addition(Environment):
    id = "addition-v1"
    metric = "correct"
    rewards: ClassVar = {"short": short, "correct": correct}
    reward_weights: ClassVar = {"correct": 1.0}
    breakdown = ("level",)

    def tasks(self, split, n=None, seed=0):
        rows = [
            {
                "task_id": f"{split}-{i}",
                "prompt": [{"role": "user", "content": f"{i} + 1?"}],
                "total": i + 1,
                "level": i % 2,
            }
            for i in range(n if n is not None else 4)
        ]
        return Dataset.from_list(rows)

    def answer(self, task):
        return str(task["total"])


@dataclass
class PlainRunner:
    """Reward runner in this process; the completion "crash" makes a rollout invalid."""

    names: list

    def __call__(self, rows, group_size, trainer_state):
        assert len(rows) % group_size == 0
        values = [[short(row["completion"]), correct(row["completion"], row["total"])] for row in rows]
        invalid = ["reward died" if row["completion"] == "crash" else None for row in rows]
        values = np.array(values, dtype=float)
        values[[reason is not None for reason in invalid]] = np.nan
        return Scores(values, invalid, {})


def run(answers, samples=1, n=4, **options):
    """Evaluate a model that samples the completions `answers[i]` for task i."""
    answers = iter(answers)

    def generate(tasks, samples):
        assert tasks[0]["prompt"][0]["role"] == "user"
        return [
            [Rollout.single(text, [0] * len(text), text == "long") for text in next(answers)] for _ in tasks
        ]

    options = {"name": "after", "model": "m", "environment_args": {}, "temperature": 0.0, **options}
    runner = PlainRunner(list(Addition.rewards))
    return evaluate(generate, Addition(), runner, n=n, samples=samples, **options)


def test_greedy_evaluation_counts_every_task():
    result = run([["1"], ["2"], ["long"], ["9"]], batch_size=3)
    assert (result.accuracy.mean, result.accuracy.n) == (0.5, 4)
    assert result.accuracy.low == pytest.approx(0.15, abs=0.01)
    assert result.rewards == {"short": 1.0, "correct": 0.5}
    assert (result.length, result.truncated, result.invalid) == (1.0, 0.25, 0)  # EOS is not counted
    assert result.scores == {"test-0": [1.0], "test-1": [1.0], "test-2": [0.0], "test-3": [0.0]}
    assert (result.pass_at, result.avg_at) == ({}, {})
    assert {value: (i.n, i.mean) for value, i in result.breakdown["level"].items()} == {
        "0": (2, 0.5),
        "1": (2, 0.5),
    }


def test_evaluation_excludes_invalid_rollouts_from_means():
    result = run([["1"], ["crash"], ["3"], ["9"]])
    assert (result.invalid, result.accuracy.n) == (1, 3)
    assert result.accuracy.mean == pytest.approx(2 / 3)
    assert result.scores["test-1"] == []
    assert result.breakdown["level"]["1"].n == 1
    assert result.completions[1]["invalid"] == "reward died"


def test_evaluation_reports_pass_at_k_and_avg_at_k():
    result = run([["1", "1", "9", "9"], ["2", "9", "crash", "crash"]], samples=4, n=2)
    assert result.accuracy.mean == 0.5
    assert result.pass_at == pytest.approx({1: 0.5, 2: (5 / 6 + 1) / 2, 4: 1.0})
    assert result.avg_at == {1: 1.0, 2: 0.75, 4: 0.5}


def test_completions_have_the_fields_of_the_report():
    completion = run([["1"]], n=1).completions[0]
    assert completion == {
        "task_id": "test-0",
        "prompt": "0 + 1?",
        "completion": "1",
        "turns": [{"role": "assistant", "content": "1", "tokens": 1}],
        "answer": "1",
        "score": 1.0,
        "reward": None,
        "invalid": None,
        "length": 0,
        "environment_tokens": 0,
        "truncated": False,
        "level": 0,
        "rewards/short": 1.0,
        "rewards/correct": 1.0,
    }


def test_save_and_load_round_trip(tmp_path):
    result = run([["1", "1"], ["crash", "crash"]], samples=2, n=2)
    path = tmp_path / "evaluation" / "after.json"
    result.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["after.json"]
    loaded = Evaluation.load(path)
    np.testing.assert_equal(loaded.breakdown, result.breakdown)
    assert loaded.accuracy == result.accuracy and loaded.pass_at == result.pass_at
    assert loaded.scores == result.scores
    assert loaded.completions[3]["score"] is None


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"name": 1}'])
def test_load_rejects_other_files(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json is not an evaluation"):
        Evaluation.load(tmp_path / "x.json")


def test_compare_pairs_scores_by_task():
    before = run([["9"], ["9"], ["9"], ["crash"]], name="before")
    after = run([["1"], ["2"], ["9"], ["4"]])
    result = compare(before, after)
    assert (result["n"], result["before"], result["difference"]) == (3, 0.0, pytest.approx(2 / 3))
    assert result["low"] < 2 / 3 < result["high"] <= 1
    assert result["p"] == 0.5  # 2 differences: 2 of 4 sign flips


def test_compare_by_compares_the_tasks_of_each_value_of_a_column():
    """Tasks of level 0 are those with an even number; their answers are odd."""
    n = 16
    right = [[str(i + 1)] for i in range(n)]
    before = run([["9"] if i % 2 == 0 and i != 8 else right[i] for i in range(n)], n=n, name="before")
    after = run([["crash"] if i == 0 else right[i] for i in range(n)], n=n)
    results = compare_by(before, after, "level")
    assert list(results) == ["0", "1"]
    assert (results["0"]["n"], results["0"]["before"], results["0"]["after"]) == (
        7,
        pytest.approx(1 / 7),
        1.0,
    )
    assert (results["1"]["n"], results["1"]["difference"], results["1"]["p"]) == (8, 0.0, 1.0)
    assert results["0"]["p"] == pytest.approx(2 / 2**6)
    assert results["0"]["corrected_p"] == pytest.approx(4 / 2**6)  # Holm: the smaller of two, times two
    assert compare_by(before, after, "size") == {}


def test_compare_by_sorts_numbers_and_omits_tasks_without_a_value():
    result = run([["1"], ["2"], ["3"], ["4"]])
    sizes = (10, 2, None, 10)
    completions = [c | {"size": size} for c, size in zip(result.completions, sizes, strict=True)]
    sized = replace(result, completions=completions)
    assert [(value, row["n"]) for value, row in compare_by(result, sized, "size").items()] == [
        ("2.0", 1),
        ("10.0", 2),
    ]


def test_compare_by_a_reward_other_than_the_metric():
    result = run([["1"], ["2"], ["crash"], ["4"]])
    before, after = (
        replace(
            result,
            completions=[c | {"rewards/steps": n} for c, n in zip(result.completions, steps, strict=True)],
        )
        for steps in ([9.0, 2.0, None, 1.0], [3.0, 2.0, 1.0, 1.0])
    )
    paired = compare(before, after, "steps")
    assert (paired["n"], paired["before"], paired["after"], paired["difference"]) == (3, 4.0, 2.0, -2.0)
    assert paired["low"] < -2  # a number of steps is not in [0, 1]
    assert compare(before, after, "correct") == compare(before, after)
    with pytest.raises(UserError, match=r"no reward 'shrot' \(did you mean 'short'"):
        compare(before, after, "shrot")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"environment": "x"}, "environment"),
        ({"environment_args": {"a": 1}}, "environment_args"),
        ({"metric": "short"}, "metric"),
        ({"scores": {"other": [1.0]}}, "no task in common"),
    ],
)
def test_compare_rejects_incomparable_evaluations(change, message):
    result = run([["1"]], n=1)
    with pytest.raises(UserError, match=message):
        compare(result, replace(result, **change))


def test_evaluate_rejects_missing_tasks_and_metric():
    with pytest.raises(UserError, match="no task"):
        run([], n=0)
    with pytest.raises(UserError, match="'correct'"):
        evaluate(
            None,
            Addition(),
            PlainRunner(["short"]),
            name="",
            model="",
            environment_args={},
            temperature=0,
        )
