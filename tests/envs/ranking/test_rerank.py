"""rerank-v2: candidates, the oracle, the original order, and agreement with trec_eval."""

import numpy as np
import pytest

from rlkit.check import check_environment
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.rewards.reranking import read_permutation
from rlkit.rewards.retrieval import measure


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        environment = load_environment("rerank-v2", collection="generated:300:0", candidates=12)
        environment.tasks("test", 1)  # builds the index while the cache is a temporary folder
        yield environment


def test_environment_passes_all_checks(environment):
    assert [check for check in check_environment(environment, n=32) if not check.passed] == []


def original_order(task):
    return " > ".join(f"[{i + 1}]" for i in range(len(task["candidates"])))


def score(environment, task, completion):
    return environment.score(task, completion)["ndcg"]


def test_oracle_beats_the_original_order_and_no_ranking_scores_0(environment):
    tasks = list(environment.tasks("test"))
    oracle = np.mean([score(environment, task, environment.answer(task)) for task in tasks])
    original = np.mean([score(environment, task, original_order(task)) for task in tasks])
    assert original < oracle - 0.1
    assert all(score(environment, task, "I don't know.") == 0 for task in tasks)
    train = list(environment.tasks("train", 100))
    assert all(score(environment, task, environment.answer(task)) == pytest.approx(1) for task in train)


def test_ndcg_agrees_with_trec_eval_over_all_judgments(environment):
    tasks = [task for task in environment.tasks("test") if len(task["candidates"]) >= 9]
    assert len(tasks) > 50
    for task in tasks:
        grades = environment.collection.judged("test")[task["query_id"]]
        completion = " > ".join(f"[{i}]" for i in (5, 3, 9))
        ranking = [task["candidates"][i] for i in read_permutation(completion, len(task["candidates"]))]
        expected = measure("ndcg@10", ranking, grades)
        assert score(environment, task, completion) == pytest.approx(expected, abs=1e-6)


def test_training_candidates_include_the_best_documents_at_random_positions(environment):
    """The candidates have the ten best documents, and a position does not reveal that one was added."""
    plain = load_environment("rerank-v2", collection="generated:300:0", candidates=12, add_relevant=False)
    positions = []
    for task, plain_task in zip(environment.tasks("train"), plain.tasks("train"), strict=True):
        assert len(task["candidates"]) <= 12
        best = sorted(task["grades"], reverse=True)[:10]
        assert best[: len(task["ideal"])] == task["ideal"][:10]
        added = [i for i, name in enumerate(task["candidates"]) if name not in plain_task["candidates"]]
        positions += [i / (len(task["candidates"]) - 1) for i in added]
    assert len(positions) > 500 and 0.4 < np.mean(positions) < 0.6


def test_held_out_candidates_are_the_retrieved_ones(environment):
    plain = load_environment("rerank-v2", collection="generated:300:0", candidates=12, add_relevant=False)
    for split in ("dev", "test"):
        assert list(environment.tasks(split)) == list(plain.tasks(split))


def test_prompt_truncates_long_passages(environment):
    short = load_environment("rerank-v2", collection="generated:300:0", document_words=5)
    task = short.tasks("test", 1)[0]
    assert all(line.count(" ") <= 6 for line in task["prompt"][0]["content"].split("\n") if line[:1] == "[")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": 1}, "from 2 to 1000"),
        ({"collection": "nothing"}, "no collection 'nothing'"),
        ({"folds": 1}, "folds must be from 2 to 900"),
        ({"folds": 5, "fold": 5}, "folds=5 with fold=5 is out of range"),
    ],
)
def test_invalid_arguments_are_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        load_environment("rerank-v2", **{"collection": "generated:300:0"} | arguments)
