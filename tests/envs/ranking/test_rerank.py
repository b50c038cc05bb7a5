"""rerank-v1: its candidates, the oracle, the one who makes no effort, and agreement with trec_eval."""

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
        made = load_environment("rerank-v1", collection="generated:300:0", candidates=12)
        made.tasks("test", 1)
        yield made


def test_it_is_sound(environment):
    assert [check for check in check_environment(environment, n=32) if not check.passed] == []


def given_order(task):
    return " > ".join(f"[{i + 1}]" for i in range(len(task["candidates"])))


def score(environment, task, completion):
    return environment.score(task, completion)["ndcg"]


def test_the_oracle_the_idle_one_and_the_silent_one(environment):
    tasks = list(environment.tasks("test"))
    oracle = np.mean([score(environment, task, environment.answer(task)) for task in tasks])
    idle = np.mean([score(environment, task, given_order(task)) for task in tasks])
    assert idle < oracle - 0.1
    assert all(score(environment, task, "I don't know.") == 0 for task in tasks)
    train = list(environment.tasks("train", 100))
    assert all(score(environment, task, environment.answer(task)) == pytest.approx(1) for task in train)


def test_the_score_is_that_of_trec_eval_against_all_judgments(environment):
    tasks = [task for task in environment.tasks("test") if len(task["candidates"]) >= 9]
    assert len(tasks) > 50
    for task in tasks:
        grades = environment.collection.judged("test")[task["query_id"]]
        text = " > ".join(f"[{i}]" for i in (5, 3, 9))
        ranking = [task["candidates"][i] for i in read_permutation(text, len(task["candidates"]))]
        assert score(environment, task, text) == pytest.approx(measure("ndcg@10", ranking, grades), abs=1e-6)


def test_training_candidates_have_the_best_documents_anywhere(environment):
    """As many as fit in ten ranks; their places do not tell which were added."""
    plain = load_environment("rerank-v1", collection="generated:300:0", candidates=12, add_relevant=False)
    places = []
    for task, found in zip(environment.tasks("train"), plain.tasks("train"), strict=True):
        assert len(task["candidates"]) <= 12
        best = sorted(task["grades"], reverse=True)[:10]
        assert best[: len(task["ideal"])] == task["ideal"][:10]
        added = [i for i, name in enumerate(task["candidates"]) if name not in found["candidates"]]
        places += [i / (len(task["candidates"]) - 1) for i in added]
    assert len(places) > 500 and 0.4 < np.mean(places) < 0.6


def test_held_out_candidates_are_those_that_were_found(environment):
    plain = load_environment("rerank-v1", collection="generated:300:0", candidates=12, add_relevant=False)
    for split in ("dev", "test"):
        assert list(environment.tasks(split)) == list(plain.tasks(split))


def test_long_passages_are_cut(environment):
    short = load_environment("rerank-v1", collection="generated:300:0", document_words=5)
    task = short.tasks("test", 1)[0]
    assert all(line.count(" ") <= 6 for line in task["prompt"][0]["content"].split("\n") if line[:1] == "[")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": 1}, "from 2 to 1000"),
        ({"collection": "nothing"}, "no collection 'nothing'"),
        ({"folds": 1}, "take 2 to 900 folds"),
        ({"folds": 5, "fold": 5}, "fold 5 of 5"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(UserError, match=message):
        load_environment("rerank-v1", **{"collection": "generated:300:0"} | arguments)
