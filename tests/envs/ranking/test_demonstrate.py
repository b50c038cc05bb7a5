"""demonstrate-v1: no question among its own demonstrations, no held-out one, and a fixed order."""

import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlkit.check import check_environment
from rlkit.envs.ranking.demonstrate import DemonstrateEnvironment
from rlkit.envs.ranking.pairs.rows import query_key
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.retrieval.collections.base import Collection
from tests.envs.ranking.folders import write_beir

TOOLS = {"WeatherTool": "Weather.", "TripTool": "Trips.", "NewsTool": "News."}
QUERIES = {
    "w1": "Will it rain in Paris tomorrow?",
    "w2": "Will it rain in Rome tomorrow?",
    "w3": "will it  rain in PARIS tomorrow?",  # the same question as w1
    "t1": "Book a hotel in Paris for tomorrow",
    "n1": "What is the news in Rome?",
    "n2": "What is the news in Oslo?",  # also a test question
    "x1": "Will it rain in Oslo tomorrow?",
    "x2": "what is the news in Oslo?",
}
QRELS = {
    "train": {
        "w1": {"WeatherTool": 1},
        "w2": {"WeatherTool": 1},
        "w3": {"WeatherTool": 1},
        "t1": {"NewsTool": 1, "TripTool": 2},
        "n1": {"NewsTool": 1},
        "n2": {"NewsTool": 1},
    },
    "test": {"x1": {"WeatherTool": 1}, "x2": {"NewsTool": 1}},
}


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return write_beir(tmp_path_factory.mktemp("demonstrate") / "tools", TOOLS, QUERIES, QRELS)


def by_query(environment, split, **options):
    return {task["query_id"]: task for task in environment.tasks(split, **options)}


@pytest.mark.parametrize(("retriever", "demonstrations"), [("bm25", 3), ("random", 2), ("bm25", 0)])
def test_environment_passes_all_checks(collection, retriever, demonstrations):
    environment = load_environment(
        "demonstrate-v1", collection=collection, retriever=retriever, demonstrations=demonstrations
    )
    assert [check for check in check_environment(environment) if not check.passed] == []


def test_prompt_has_the_best_demonstration_last_with_its_best_answer(collection):
    environment = load_environment("demonstrate-v1", collection=collection, demonstrations=3)
    task = by_query(environment, "test")["x1"]
    assert task["demonstrations"][-1] in {"w1", "w2", "w3"}
    assert task["demonstrations"][0] == "t1"
    messages = task["prompt"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3 + ["user"]
    assert messages[0]["content"] == (
        "Answer each question. Write only the answer.\n\nBook a hotel in Paris for tomorrow"
    )
    assert messages[1]["content"] == "TripTool"
    assert messages[-1]["content"] == "Will it rain in Oslo tomorrow?"
    assert environment.answer(task) == "WeatherTool"
    assert environment.score(task, " WeatherTool\n") == {"hit": 1}
    assert environment.score(task, "WeatherTool, TripTool") == {"hit": 0}


def test_prompt_without_demonstrations_has_the_question_only(collection):
    environment = load_environment("demonstrate-v1", collection=collection, demonstrations=0)
    (message,) = by_query(environment, "test")["x1"]["prompt"]
    assert message["content"] == (
        "Answer each question. Write only the answer.\n\nWill it rain in Oslo tomorrow?"
    )


def test_held_out_questions_are_not_in_the_bank(collection, caplog):
    environment = load_environment("demonstrate-v1", collection=collection)
    with caplog.at_level(logging.WARNING):
        assert set(environment.examples) - {"w1", "w3"} == {"w2", "t1", "n1"}
    assert "1 training queries" in caplog.text
    assert len({"w1", "w3"} & set(environment.examples)) == 1  # the same question once
    assert set(by_query(environment, "train")) == set(environment.examples)


def test_retrievers_share_the_task_ids(collection):
    ids = [
        list(
            load_environment("demonstrate-v1", collection=collection, retriever=name).tasks("test")["task_id"]
        )
        for name in ("bm25", "random")
    ]
    assert ids[0] == ids[1]


def test_random_demonstrations_depend_on_seed_and_not_on_other_queries(collection):
    environment = load_environment(
        "demonstrate-v1", collection=collection, retriever="random", demonstrations=2
    )
    draws = {tuple(by_query(environment, "test", seed=seed)["x1"]["demonstrations"]) for seed in range(8)}
    assert len(draws) > 1
    question = environment.questions("test")[0]
    drawn = environment.draw(question, 4, 0)
    removed = drawn.pop(2)
    del environment.examples[removed.id]
    assert environment.draw(question, 3, 0) == drawn


def test_task_depends_on_split_seed_and_index_only(collection):
    environment = load_environment("demonstrate-v1", collection=collection, retriever="random")
    tasks = list(environment.tasks("train", seed=3))
    for n in range(1, len(tasks)):
        assert list(environment.tasks("train", n, seed=3)) == tasks[:n]


def environment_of(queries, splits, retriever):
    """Return the environment of a collection in memory, whose answers are a and b."""
    qrels = {"train": {}, "test": {}}
    for i, split in enumerate(splits):
        qrels[split][f"q{i}"] = {"ab"[i % 2]: 1}
    names = {f"q{i}": query for i, query in enumerate(queries)}
    environment = DemonstrateEnvironment(retriever=retriever, demonstrations=3)
    environment.collection = Collection("memory", lambda: iter(()), names, qrels)
    return environment


QUESTIONS = st.lists(st.sampled_from([a + b for a in ("rain", "Rain", "news ") for b in ("", " x", " y")]))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    train=QUESTIONS,
    test=QUESTIONS.filter(bool),
    retriever=st.sampled_from(["random", "bm25"]),
    seed=st.integers(0, 3),
)
def test_no_demonstration_is_the_question_or_a_held_out_one(train, test, retriever, seed):
    splits = ["train"] * (len(train) + 1) + ["test"] * len(test)
    environment = environment_of([*train, "a hotel", *test], splits, retriever)
    held_out = {query_key(query) for query in test}
    for split in ("train", "test"):
        for task in environment.tasks(split, seed=seed):
            keys = {query_key(environment.collection.queries[name]) for name in task["demonstrations"]}
            assert len(keys) == len(task["demonstrations"])
            assert not keys & (held_out | {query_key(task["query"])})


def test_answer_of_several_lines_is_rejected():
    environment = environment_of(["one", "two"], ["train", "test"], "random")
    environment.collection.qrels["train"]["q0"] = {"two\nlines": 1}
    with pytest.raises(UserError, match="an id must be one line without white space around it"):
        environment.tasks("test")


def test_collection_without_training_queries_is_rejected(tmp_path):
    folder = write_beir(tmp_path / "tools", TOOLS, QUERIES, {"test": QRELS["test"]})
    with pytest.raises(UserError, match="has no split 'train'"):
        load_environment("demonstrate-v1", collection=folder).tasks("test")


def test_retriever_over_other_documents_is_rejected(collection):
    environment = load_environment("demonstrate-v1", collection=collection)
    other = load_environment("demonstrate-v1", collection="generated:300:0")
    environment.engine = other.engine
    environment.collection.queries["x1"] = other.questions("train")[0].question
    with pytest.raises(UserError, match="which is no training query of"):
        environment.tasks("test")
