import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.envs.ranking.pairs.selection import choose_examples, sample_ids
from rlkit.errors import UserError
from rlkit.retrieval.queries import open_collection
from tests.envs.ranking.folders import write_beir

DOCUMENTS = {name: (name.upper(), f"about {name}") for name in "abcd"}
QUERIES = {"q1": "one", "q2": "two", "q3": "three", "q4": "four"}
TRAIN = {"q1": {"a": 1, "b": 2}, "q2": {"b": 1}, "q3": {"c": 1}}


@given(st.sets(st.text()), st.integers(0, 5), st.integers(0, 3), st.randoms())
def test_sample_does_not_depend_on_the_order_and_grows_with_n(ids, n, seed, rng):
    shuffled = sorted(ids)
    rng.shuffle(shuffled)
    sample = sample_ids(shuffled, n, seed)
    assert sample == sample_ids(ids, n, seed) and len(sample) == min(n, len(ids))
    assert sample <= sample_ids(ids, n + 1, seed) <= sample_ids(ids, None, seed) == ids


def test_examples_are_training_queries_with_their_best_documents(tmp_path):
    folder = write_beir(tmp_path / "c", DOCUMENTS, QUERIES, {"train": TRAIN, "test": {"q4": {"d": 1}}})
    collection = open_collection(folder, None, 0)
    examples = choose_examples(collection, 2, 0)
    assert {example.document for example in examples} == {"b", "c"}  # b is the best document of two queries
    by_document = {example.document: example for example in examples}
    assert by_document["c"].query == "three" and by_document["c"].text == "C: about c"
    assert by_document["b"].query in {"one", "two"}
    assert choose_examples(collection, 1, 0) == examples[:1]
    with pytest.raises(UserError, match="has 2 documents with a training query: set --examples to 2"):
        choose_examples(collection, 3, 0)


def test_examples_need_training_judgments(tmp_path):
    folder = write_beir(tmp_path / "c", DOCUMENTS, QUERIES, {"test": {"q4": {"d": 1}}})
    collection = open_collection(folder, None, 0)
    assert choose_examples(collection, 0, 0) == []
    with pytest.raises(UserError, match="no training judgments to take examples from: set --examples 0"):
        choose_examples(collection, 1, 0)
