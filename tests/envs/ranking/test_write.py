"""write-v1: its tasks, its prompts, and what copies of a document earn beside people's queries."""

import runpy

import numpy as np
import pytest

from rlkit.check import check_environment
from rlkit.check.play import play
from rlkit.environment import Turn
from rlkit.envs.ranking.query_statistics import QueryStatistics
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.rewards import writing
from tests.envs.ranking.folders import write_beir
from tests.quick import DATA

ENCODER = "bundled:all-minilm-l6-v2"
DOCUMENTS = {
    "flights": "Book cheap flights between any two airports, with prices and seats.",
    "menus": "Translate the menus of restaurants from photographs.",
    "taxes": "Compute income taxes for employees and companies.",
    "birds": "Identify birds by their songs, recorded with a phone.",
}
QUERIES = {
    "q0": "how do i get to rome for little money",
    "q1": "what can i eat in this restaurant",
    "q2": "how do i find out what i owe the state",
    "q3": "what is singing in my garden",
}
QRELS = {
    "train": {"q0": {"flights": 1}, "q1": {"menus": 2, "birds": 0}, "q2": {"taxes": 1, "missing": 1}},
    "test": {"q3": {"birds": 1}},
}


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return write_beir(tmp_path_factory.mktemp("write") / "tools", DOCUMENTS, QUERIES, QRELS)


def rewards_of(environment, tasks, queries):
    """Return the rewards of each query for the document of its task."""
    return [
        {name: reward_of(name, row, environment) for name in environment.rewards}
        for row in play(environment, tasks, [[query] for query in queries])
    ]


def reward_of(name, row, environment):
    from rlkit.reward import call_reward

    return call_reward(environment.rewards[name], row)


def test_environment_passes_all_checks():
    environment = load_environment("write-v1", collection="generated:300:0", retriever="bm25")
    assert [check for check in check_environment(environment) if not check.passed] == []


def test_tasks_are_judged_pairs_whose_document_exists(collection):
    environment = load_environment("write-v1", collection=collection, retriever="bm25")
    tasks = environment.tasks("train")
    assert {(task["query_id"], task["document_id"]) for task in tasks} == {
        ("q0", "flights"),
        ("q1", "menus"),
        ("q2", "taxes"),
    }
    assert environment.example(tasks[0]) == QUERIES[tasks[0]["query_id"]]
    assert DOCUMENTS[tasks[0]["document_id"]] in tasks[0]["prompt"][0]["content"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_examples_are_training_queries_for_other_documents(collection, split):
    environment = load_environment("write-v1", collection=collection, retriever="bm25", examples=2)
    for task in environment.tasks(split):
        (message,) = task["prompt"]
        *examples, last = message["content"].split("\n\n")[1:]
        assert len(examples) == 2 and last == f"Document: {DOCUMENTS[task['document_id']]}\nQuery:"
        for example in examples:
            document, query = example.removeprefix("Document: ").split("\nQuery: ")
            assert document != DOCUMENTS[task["document_id"]]
            (query_id,) = (name for name, text in QUERIES.items() if text == query)
            assert query_id in QRELS["train"]
            assert DOCUMENTS[max(QRELS["train"][query_id], key=QRELS["train"][query_id].get)] == document


def test_reply_without_a_query_ends_the_rollout_with_reward_0(collection):
    environment = load_environment("write-v1", collection=collection, encoder=ENCODER)
    (task, *_) = environment.tasks("train")
    (rewards,) = rewards_of(environment, [task], [" \n***\n"])
    assert set(rewards.values()) == {0.0}


def test_query_is_the_first_line_without_its_label(collection):
    environment = load_environment("write-v1", collection=collection, retriever="bm25")
    (task, *_) = environment.tasks("train")
    reply = '<think>hm</think>\nQuery: "cheap flights"\nThis is a query.'
    (reply,) = environment.respond([Turn(task, [{"role": "assistant", "content": reply}])])
    assert reply.done and reply.record["query"] == "cheap flights"


def test_document_that_is_not_retrieved_has_rank_0(collection):
    environment = load_environment("write-v1", collection=collection, retriever="bm25", depth=1)
    tasks = [task for task in environment.tasks("train") if task["document_id"] == "menus"]
    (rewards,) = rewards_of(environment, tasks, ["compute the taxes of employees please"])
    assert rewards["round_trip"] == rewards["own_words"] == 0


def test_learning_value_of_people_is_above_that_of_copies_and_of_wrong_documents(collection):
    environment = load_environment("write-v1", collection=collection, encoder=ENCODER)
    tasks = list(environment.tasks("train"))
    queries = [task["query"] for task in tasks]
    copies = [DOCUMENTS[task["document_id"]] for task in tasks]
    person, copy, wrong = (
        np.mean([rewards["learning_value"] for rewards in rewards_of(environment, tasks, written)])
        for written in (queries, copies, queries[1:] + queries[:1])
    )
    assert person > 2 * abs(copy) and person > 0 > wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"examples": 21}, "examples must be"),
        ({"instruction": " "}, "instruction must be a non-empty string"),
        ({"depth": 0}, "depth must be"),
    ],
)
def test_invalid_argument_is_one_clear_error(arguments, message):
    with pytest.raises(UserError, match=message):
        load_environment("write-v1", **arguments)


def test_collection_without_training_queries_is_refused(tmp_path):
    folder = write_beir(tmp_path / "c", DOCUMENTS, QUERIES, {"test": QRELS["test"]})
    with pytest.raises(UserError, match="has no training queries"):
        load_environment("write-v1", collection=folder)


@pytest.mark.skipif(not (DATA / "metatool").exists(), reason="needs ../shared/data/metatool")
@pytest.mark.parametrize("retriever", ["bm25", f"dense:{ENCODER}"])
def test_copies_earn_less_than_queries_of_people(retriever, monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    copies = runpy.run_path("benchmarks/query_copies.py")
    means = copies["mean_rewards"](str(DATA / "metatool"), retriever, None, 100)
    person = means.pop(copies["PERSON"])
    assert len(means) == 7
    for kind, rewards in means.items():
        assert rewards["own_words"] < person["own_words"] / 3, kind
    # The round trip alone rewards copies more than people's queries.
    assert person["round_trip"] < 0.75
    assert min(means[kind]["round_trip"] for kind in ("first 8 words", "5 rarest words")) > 0.9


def test_statistics_have_limits_that_most_queries_are_within():
    documents = [f"a document about subject{i} and more" for i in range(100)]
    pairs = [(f"where is the thing number {'x ' * (i % 5)}", documents[i]) for i in range(100)]
    statistics = QueryStatistics.of(pairs, documents)
    assert {"where", "is", "the", "thing", "number", "x"} == statistics.frequent_words
    assert statistics.limits["min_words"] == 5 and statistics.limits["max_words"] == 9
    assert statistics.limits["min_frequent_words"] == 1
    assert statistics.limits["copied_words"] == statistics.limits["copied_ngrams"] == 0
    measures = statistics.measure("where is subject3", documents[3])
    assert measures["copied_rare_words"] == measures["copied_words"] == pytest.approx(1 / 3)
    assert writing.COPIED == ("copied_ngrams", "copied_words", "copied_rare_words")
