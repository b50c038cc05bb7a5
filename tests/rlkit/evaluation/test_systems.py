"""Tables of several systems: means, best, and paired tests with Holm's correction."""

import numpy as np
import pytest

from rlkit.errors import UserError
from rlkit.evaluation import Evaluation, compare
from rlkit.evaluation.rankings import as_evaluation, file_stems
from rlkit.evaluation.statistics import holm_correction
from rlkit.evaluation.systems import compare_systems, system_names

QUERIES = [str(i) for i in range(30)]


def evaluation(model, scores, **arguments) -> Evaluation:
    """Return an evaluation of a retriever; `scores` has a value per query for each measure."""
    result = {
        "queries": dict.fromkeys(QUERIES, "text"),
        "rankings": {},
        "scores": {
            query: {name: float(values[i]) for name, values in scores.items()}
            for i, query in enumerate(QUERIES)
        },
    }
    return as_evaluation(result, name=model, model=model, arguments=arguments, split="test", seed=0)


@pytest.fixture
def systems():
    rng = np.random.default_rng(0)
    base = rng.random(30) * 0.5
    return [
        evaluation("bm25", {"ndcg@10": base, "rr@10": base}),
        evaluation("same", {"ndcg@10": base, "rr@10": base, "only here": base}),
        evaluation("better", {"ndcg@10": base + 0.3, "rr@10": base + 0.01 * rng.standard_normal(30)}),
    ]


def test_compare_systems_tests_every_system_and_measure_against_the_first(systems):
    result = compare_systems(systems, ["bm25", "same", "better"])
    assert result["baseline"] == "bm25" and result["n"] == {"ndcg@10": 30, "rr@10": 30}
    assert [system["name"] for system in result["systems"]] == ["bm25", "same", "better"]
    assert result["systems"][2]["means"]["ndcg@10"] == pytest.approx(systems[2].rewards["ndcg@10"])
    pairs = [(test["system"], test["reward"]) for test in result["tests"]]
    assert pairs == [(s, r) for s in ("same", "better") for r in ("ndcg@10", "rr@10")]
    for test in result["tests"]:
        other = next(system for system in systems if system.model == test["system"])
        expected = compare(systems[0], other, test["reward"])
        assert {key: test[key] for key in expected} == expected
    p_values = [test["p"] for test in result["tests"]]
    assert [test["corrected_p"] for test in result["tests"]] == holm_correction(p_values)
    assert p_values[:2] == [1, 1] and result["tests"][2]["corrected_p"] < 0.01


def test_compare_systems_by_one_reward_has_fewer_tests_to_correct_for(systems):
    result = compare_systems(systems, ["a", "b", "c"], "rr@10")
    assert list(result["n"]) == ["rr@10"] and len(result["tests"]) == 2


def test_compare_systems_uses_the_tasks_that_all_have(systems):
    short = Evaluation(**{**vars(systems[1]), "scores": {q: systems[1].scores[q] for q in QUERIES[:7]}})
    result = compare_systems([systems[0], short, systems[2]], ["a", "b", "c"])
    assert result["n"] == {"ndcg@10": 7, "rr@10": 30}
    expected = np.mean([systems[0].scores[query][0] for query in QUERIES[:7]])
    assert result["systems"][0]["means"]["ndcg@10"] == pytest.approx(expected)


def test_compare_systems_rejects_what_cannot_be_compared(systems):
    with pytest.raises(UserError, match="bm25 is given 2 times"):
        compare_systems([systems[0], systems[0]], ["bm25", "bm25"])
    other = evaluation("x", {"ndcg@10": np.zeros(30)}, collection="other")
    with pytest.raises(UserError, match="differ in environment_args"):
        compare_systems([*systems, other], ["a", "b", "c", "d"])
    with pytest.raises(UserError, match="no reward 'ndgc'"):
        compare_systems(systems, ["a", "b", "c"], "ndgc")
    empty = Evaluation(**{**vars(systems[1]), "scores": {}, "completions": []})
    with pytest.raises(UserError, match="no task in common"):
        compare_systems([systems[0], empty], ["a", "b"])


def test_system_names_are_models_or_paths_if_models_repeat(systems):
    assert system_names(systems, ["1.json", "2.json", "3.json"]) == ["bm25", "same", "better"]
    assert system_names([systems[0], systems[0]], ["x/a.json", "y/a.json"]) == ["x/a.json", "y/a.json"]


def test_file_stems_are_distinct_file_names():
    retrievers = [
        "bm25", "dense:runs/a/model", "run:x/a.run", "run:y/A.run", "run:y/a-2.run", "http://host:80/retrieve",
        "dense:" + "x" * 300, "rerank:bm25|runs/c@100", "???", "bm25:中文",
    ]  # fmt: skip
    stems = file_stems(retrievers)
    assert stems[:5] == ["bm25", "dense-runs-a-model", "a", "A-2", "a-2-2"]
    assert stems[-2:] == ["retriever", "bm25-中文"]
    assert len({stem.lower() for stem in stems}) == len(stems)
    assert all(len(stem.encode()) < 200 and "/" not in stem for stem in stems)
