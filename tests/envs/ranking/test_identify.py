"""identify-v1: tasks of judged queries and of pairs, the oracle, and ids that cannot be answers."""

from dataclasses import replace

import pytest

from rlkit.check import check_environment
from rlkit.envs.ranking.pairs.rows import PairRow, write_rows
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.retrieval.engines.identify import identify_prompt
from tests.envs.ranking.folders import write_beir

DOCUMENTS = {"sendfile.2": "Copy data.", "splice.2": "Move data to a pipe.", "read.2": "Read a file."}
QUERIES = {f"q{i}": f"query number {i}" for i in range(6)}
QRELS = {
    "train": {"q0": {"sendfile.2": 1, "splice.2": 2}, "q1": {"read.2": 1}, "q2": {"missing": 1}},
    "test": {"q3": {"read.2": 1, "splice.2": 0}, "q4": {"missing": 1}, "q5": {"sendfile.2": 1}},
}
PAIRS = [
    PairRow("s0", "Copy data.", ("Copy data.",), (1.0,), document="sendfile.2"),
    PairRow(
        *("s1", "Move data.", ("no", "a pipe", "data"), (0.0, 2.0, 3.0)),
        passage_documents=("read.2", "sendfile.2", "splice.2"),
        answers=("splice.2", "read.2"),
    ),
]


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return write_beir(tmp_path_factory.mktemp("identify") / "man", DOCUMENTS, QUERIES, QRELS)


@pytest.fixture
def pairs(tmp_path):
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    return str(tmp_path / "pairs.jsonl")


def by_query(environment, split):
    return {task["query_id"]: task for task in environment.tasks(split)}


def test_environment_passes_all_checks():
    environment = load_environment("identify-v1", collection="generated:300:0")
    assert [check for check in check_environment(environment) if not check.passed] == []


def test_environment_with_pairs_passes_all_checks(collection, pairs):
    environment = load_environment("identify-v1", collection=collection, pairs=pairs)
    assert [check for check in check_environment(environment) if not check.passed] == []


def test_task_has_the_relevant_documents_of_the_corpus_best_first(collection):
    tasks = by_query(load_environment("identify-v1", collection=collection), "train")
    assert set(tasks) == {"q0", "q1"}  # the document of q2 is missing from the corpus
    task = tasks["q0"]
    assert task["prompt"] == identify_prompt("query number 0")
    assert task["prompt"][0]["content"] == (
        "Which document answers this query? Write only its identifier.\n\nQuery: query number 0"
    )
    assert task["relevant"] == ["splice.2", "sendfile.2"]


def test_held_out_query_without_a_possible_answer_is_kept_and_scores_0(collection):
    environment = load_environment("identify-v1", collection=collection)
    task = by_query(environment, "test")["q4"]
    assert environment.answer(task) is None
    assert environment.score(task, "missing") == {"hit": 0}


def test_document_with_the_id_of_the_query_is_no_answer_if_it_is_dropped(tmp_path):
    folder = write_beir(tmp_path / "own", DOCUMENTS, {"read.2": "Read."}, {"test": {"read.2": {"read.2": 1}}})
    for drop, expected in ((False, "read.2"), (True, None)):
        environment = load_environment("identify-v1", collection=folder, drop_query_id=drop)
        assert environment.answer(environment.tasks("test")[0]) == expected


def test_pairs_are_training_tasks_only(collection, pairs):
    environment = load_environment("identify-v1", collection=collection, pairs=pairs)
    tasks = by_query(environment, "train")
    assert set(tasks) == {"q0", "q1", "s0", "s1"}
    assert (tasks["s0"]["query"], tasks["s0"]["relevant"]) == ("Copy data.", ["sendfile.2"])
    # The document of the passage with the highest target, and then the answers.
    assert tasks["s1"]["relevant"] == ["splice.2", "read.2"]
    assert set(by_query(environment, "test")) == {"q3", "q4", "q5"}


def test_collection_without_training_queries_trains_on_pairs(tmp_path, pairs):
    folder = write_beir(tmp_path / "man", DOCUMENTS, QUERIES, {"test": QRELS["test"]})
    environment = load_environment("identify-v1", collection=folder, pairs=pairs)
    assert set(by_query(environment, "train")) == {"s0", "s1"}
    with pytest.raises(UserError, match="has no split 'train'"):
        load_environment("identify-v1", collection=folder).tasks("train")


def test_task_depends_on_split_seed_and_index_only(collection, pairs):
    environment = load_environment("identify-v1", collection=collection, pairs=pairs)
    all_tasks = list(environment.tasks("train", seed=3))
    for n in range(1, 5):
        assert list(environment.tasks("train", n, seed=3)) == all_tasks[:n]
    orders = {tuple(task["query_id"] for task in environment.tasks("train", seed=seed)) for seed in range(8)}
    assert len(orders) > 1


def test_unknown_document_of_a_pair_is_named(collection, tmp_path):
    write_rows(tmp_path / "pairs.jsonl", [PairRow("s", "Write.", ("Write.",), (1.0,), document="write.2")])
    environment = load_environment("identify-v1", collection=collection, pairs=str(tmp_path / "pairs.jsonl"))
    with pytest.raises(
        UserError, match=r"pairs.jsonl: the pair 's' is answered by 'write.2', which is not a document"
    ):
        environment.tasks("train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PairRow("s", "Write.", ("Write.",), (0.0,), document="read.2"), "has no target above 0"),
        (PairRow("s", "Write.", ("Write.",), (1.0,)), "does not say which document answers it"),
    ],
)
def test_pair_without_an_answer_is_an_error(collection, tmp_path, row, message):
    write_rows(tmp_path / "pairs.jsonl", [row])
    environment = load_environment("identify-v1", collection=collection, pairs=str(tmp_path / "pairs.jsonl"))
    with pytest.raises(UserError, match=f"pairs.jsonl: the pair 's' {message}"):
        environment.tasks("train")


def test_passage_that_a_teacher_gives_a_low_score_is_no_answer(collection, tmp_path):
    scores = PairRow("s", "Copy.", ("a", "b"), (0.98, 0.001), passage_documents=("sendfile.2", "read.2"))
    write_rows(tmp_path / "pairs.jsonl", [scores])
    environment = load_environment("identify-v1", collection=collection, pairs=str(tmp_path / "pairs.jsonl"))
    task = by_query(environment, "train")["s"]
    assert environment.score(task, "sendfile.2")["hit"] == 1 and environment.score(task, "read.2")["hit"] == 0


def test_hit_uses_the_binary_judgments_and_the_minimum_grade(collection):
    environment = load_environment("identify-v1", collection=collection)
    qrels = {"test": {"q3": {"read.2": 1, "splice.2": 3}}}
    environment.collection = replace(environment.collection, qrels=qrels, min_grades={"hit": 2})
    assert by_query(environment, "test")["q3"]["relevant"] == ["splice.2"]
    environment.collection = replace(environment.collection, binary={"test": {"q3": {"read.2": 1}}})
    assert by_query(environment, "test")["q3"]["relevant"] == ["read.2"]


def test_passages_that_are_queries_are_refused(collection, tmp_path):
    write_rows(tmp_path / "pairs.jsonl", [PairRow("s", "A.", ("q",), (1.0,), passages_are_queries=True)])
    with pytest.raises(UserError, match="documents as queries and queries as passages"):
        load_environment("identify-v1", collection=collection, pairs=str(tmp_path / "pairs.jsonl"))


def test_training_queries_without_any_possible_answer_are_an_error(tmp_path):
    qrels = {"train": {"q0": {"missing": 1}}, "test": {"q1": {"read.2": 1}}}
    folder = write_beir(tmp_path / "man", DOCUMENTS, QUERIES, qrels)
    with pytest.raises(UserError, match="none of the relevant documents of its training queries"):
        load_environment("identify-v1", collection=folder).tasks("train")


@pytest.mark.parametrize("name", [" read.2", "read.2 ", "read\n2"])
def test_id_that_a_model_cannot_write_is_refused(tmp_path, name):
    folder = write_beir(tmp_path / "man", DOCUMENTS | {name: "A."}, QUERIES, QRELS)
    with pytest.raises(UserError, match="an id must be one line without white space around it"):
        load_environment("identify-v1", collection=folder).tasks("train")
