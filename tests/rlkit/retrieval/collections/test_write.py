"""Collections that scripts write are in BEIR's layout, and no query has answers in two splits."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.collections.write import check_fits_beir, split_of, write_collection

DOCUMENTS = {"a": "text of a", "b": "text of b\n\u2028 end", "c": "text of c", "d": "é"}
SPLITS = {"a": "train", "b": "dev", "c": "test", "d": "test"}
QUERIES = {"of a": ["a"], "of b": ["b"], "of c and d": ["d", "c", "d"], "of a and c": ["a", "c"]}


def test_written_collection_is_loaded_without_queries_of_two_splits(tmp_path):
    numbers = write_collection(tmp_path / "set", DOCUMENTS, QUERIES, SPLITS)
    assert numbers == {"train": 1, "dev": 1, "test": 1}
    collection = load_collection(str(tmp_path / "set"))
    assert {document.id: document.text for document in collection.documents()} == DOCUMENTS
    judged = {
        split: {collection.queries[query]: grades for query, grades in collection.judged(split).items()}
        for split in numbers
    }
    assert judged == {
        "train": {"of a": {"a": 1}},
        "dev": {"of b": {"b": 1}},
        "test": {"of c and d": {"c": 1, "d": 1}},
    }


def test_sample_of_the_documents_leaves_out_other_queries(tmp_path):
    documents = {f"d{i}": f"text {i}" for i in range(60)}
    splits = {name: ("train", "dev", "test")[i % 3] for i, name in enumerate(documents)}
    queries = {f"query {name}": [name] for name in documents}
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        assert sum(write_collection(folder, documents, queries, splits, 20).values()) == 20
    first, second = (load_collection(str(folder)) for folder in folders)
    assert list(first.documents()) == list(second.documents()) and first.qrels == second.qrels


def test_invalid_collections_are_errors(tmp_path):
    with pytest.raises(UserError, match="there are 1 train, 1 dev, 0 test; use more documents"):
        write_collection(tmp_path / "set", DOCUMENTS, {"of a": ["a"], "of b": ["b"]}, SPLITS)
    with pytest.raises(UserError, match="documents must be an integer of at least 1, not 0"):
        write_collection(tmp_path / "set", DOCUMENTS, QUERIES, SPLITS, 0)
    with pytest.raises(UserError, match="exists; delete it"):
        write_collection(tmp_path, DOCUMENTS, QUERIES, SPLITS)


def test_split_of_gives_sixty_fifteen_and_twenty_five_percent():
    counts = Counter(split_of(f"module{i}") for i in range(10_000))
    assert [counts[split] / 100 for split in ("train", "dev", "test")] == pytest.approx([60, 15, 25], abs=1)


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",))))
def test_split_of_is_the_same_at_each_call(name):
    assert split_of(name) == split_of(name) and split_of(name) in ("train", "dev", "test")


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({"document_of": str}, "passages that are judged by document"),
        ({"binary": {"test": {"q": {"a": 1}}}}, "separate binary judgments"),
        ({"excluded": {"q": frozenset("a")}}, "excluded documents"),
        ({"min_grades": {"rr": 2}, "drop_query_id": True}, "minimum relevant grades and documents to drop"),
    ],
)
def test_judgments_that_beir_cannot_hold_are_an_error(properties, message):
    collection = Collection("name", lambda: iter(()), {"q": "text"}, {"test": {"q": {"a": 1}}})
    check_fits_beir(collection)
    with pytest.raises(UserError, match=f"name has {message}.*, which BEIR's layout cannot hold"):
        check_fits_beir(replace(collection, **properties))
