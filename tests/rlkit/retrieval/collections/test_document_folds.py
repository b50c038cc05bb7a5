"""Folds by document: what test queries ask for is unseen in training, and no query is lost or repeated."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import merge_splits
from rlkit.retrieval.collections.document_folds import split_by_document

# Each of 12 documents has two queries; "both" has two documents, and "none" no relevant one.
QRELS = {
    "train": {f"q{i}": {f"d{i % 12}": 1, f"d{(i + 1) % 12}": 0} for i in range(24)},
    "test": {"both": {"d0": 1, "d1": 2}, "none": {"d0": 0}},
}
names = st.sampled_from([f"d{i}" for i in range(8)])
judgments = st.dictionaries(
    st.integers(0, 40).map(str), st.dictionaries(names, st.integers(0, 2), min_size=1, max_size=3)
)


def relevant(judged):
    """Return the documents that are relevant to some query."""
    return {name for grades in judged.values() for name, grade in grades.items() if grade > 0}


def split(qrels, *arguments, **options):
    """Split, or skip the example if a split has no queries."""
    try:
        return split_by_document(qrels, *arguments, **options)
    except UserError:
        assume(False)


@given(judgments, st.integers(2, 4), st.integers(0, 3), st.integers(0, 3))
def test_test_queries_ask_for_no_document_of_other_splits(judged, num_folds, fold, seed):
    splits = split({"test": judged}, num_folds, fold % num_folds, seed=seed)
    documents = [relevant(queries) for queries in splits.values()]
    assert sum(map(len, documents)) == len(set().union(*documents))
    assert set(splits) == ({"train", "test"} if num_folds == 2 else {"train", "dev", "test"})
    for queries in splits.values():
        assert all(judged[query] == grades and relevant({query: grades}) for query, grades in queries.items())


@pytest.mark.parametrize("num_folds", [2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_folds_cover_each_query_of_one_document_once(num_folds, seed):
    splits = [split_by_document(QRELS, num_folds, fold, seed=seed) for fold in range(num_folds)]
    test_queries = [query for qrels in splits for query in qrels["test"]]
    assert len(test_queries) == len(set(test_queries))
    assert set(test_queries) - {"both"} == set(QRELS["train"])
    numbers = [len(relevant(qrels["test"])) for qrels in splits]
    assert sum(numbers) == 12 and max(numbers) - min(numbers) <= 1  # the folds are balanced
    assert all("none" not in merge_splits(qrels) for qrels in splits)


def test_split_depends_on_the_seed_but_not_on_the_order_of_the_judgments():
    reversed_qrels = {"test": dict(reversed(merge_splits(QRELS).items()))}
    assert split_by_document(QRELS, 3, 0) == split_by_document(reversed_qrels, 3, 0)
    assert split_by_document(QRELS, 3, 0) != split_by_document(QRELS, 3, 0, seed=1)


def test_judgments_of_non_relevant_documents_are_kept():
    splits = split_by_document(QRELS, 3, 0)
    assert merge_splits(splits)["q0"] == {"d0": 1, "d1": 0}


@given(judgments, st.integers(2, 4), st.floats(0.05, 0.9))
def test_seen_dev_asks_only_for_documents_of_remaining_training_queries(judged, num_folds, share):
    splits = split({"test": judged}, num_folds, 0, seen_dev=share)
    assert relevant(splits["dev"]) <= relevant(splits["train"])
    assert not relevant(splits["test"]) & relevant(splits["train"])
    num_queries = len(splits["dev"]) + len(splits["train"])
    assert len(splits["dev"]) < share * num_queries + 1


def test_seen_dev_is_a_share_of_the_training_queries():
    splits = split_by_document(QRELS, 3, 0, seen_dev=0.25)
    assert len(splits["dev"]) in (4, 5) and len(splits["dev"]) + len(splits["train"]) in (16, 17)


@pytest.mark.parametrize(
    ("num_folds", "fold", "seen_dev", "message"),
    [
        (1, 0, 0, "folds must be an integer from 2 to 12"),
        (13, 0, 0, "folds must be an integer from 2 to 12"),
        (3, 3, 0, "fold must be an integer from 0 to 2, not 3"),
        (3, -1, 0, "fold must be an integer from 0 to 2, not -1"),
        (3, 0, 1.0, "seen_dev must be at least 0 and below 1"),
    ],
)
def test_arguments_out_of_range_are_errors(num_folds, fold, seen_dev, message):
    with pytest.raises(UserError, match=message):
        split_by_document(QRELS, num_folds, fold, seen_dev=seen_dev)


def test_split_without_queries_is_an_error():
    with pytest.raises(UserError, match="no query is left for train and test"):
        split_by_document({"test": {"q": {"a": 1, "b": 1}}}, 2, 0)
