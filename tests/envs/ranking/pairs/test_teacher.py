import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.envs.ranking.pairs.rows import PairRow
from rlkit.envs.ranking.pairs.teacher import (
    candidate_ids,
    candidate_lists,
    normalize_scores,
    score_lists,
    teacher_ranks,
    with_targets,
)
from rlkit.errors import UserError
from rlkit.retrieval.cross_encoders import load_cross_encoder, pair_scores
from rlkit.retrieval.queries import open_collection
from tests.envs.ranking.folders import write_beir
from tests.tiny_encoders import save_tiny_transformer

IDS = [f"d{i}" for i in range(8)]
LISTS = [
    PairRow("l1", "q", ("a", "b"), (1.0, 0.0), "title", "a", ("a", "b")),
    PairRow("l2", "q", ("a", "b"), (0.0, 1.0), "title", "b", ("a", "b")),
    PairRow("l3", "q", ("a", "b"), (1.0, 0.0), "title", "a", ("a", "b")),
]
SCORES = [np.array([2.0, 1.0]), np.array([0.0, -1.0]), np.array([-5.0, -6.0])]


def test_targets_are_scaled_between_percentiles_of_all_scores():
    targets = normalize_scores(SCORES)
    np.testing.assert_allclose(np.round(targets[:2], 4), [[1, 0.8797], [0.7532, 0.6266]])
    assert targets[2].tolist() == [pytest.approx((-5 + 5.95) / 7.9), 0.0]
    assert [row.targets for row in with_targets(LISTS, targets)][:2] == [
        (1.0, 0.879747),
        (0.753165, 0.626582),
    ]


def test_equal_scores_have_no_targets():
    with pytest.raises(UserError, match=r"nearly all passages alike \(3\): is it trained"):
        normalize_scores([np.array([3.0, 3.0])])


def test_rank_of_the_source_counts_ties_against_it():
    assert teacher_ranks(LISTS, [*SCORES[:2], np.array([4.0, 4.0])]) == [1, 2, 2]


@given(
    st.lists(st.permutations(IDS).map(lambda ids: ids[:5]), min_size=1, max_size=3),
    st.sampled_from(IDS),
    st.integers(2, 9),
)
def test_candidates_are_distinct_and_contain_the_source(rankings, document, length):
    names = candidate_ids(rankings, document, length)
    assert document in names and len(set(names)) == len(names) <= length


def test_candidates_are_the_first_ones_and_the_source():
    assert candidate_ids([["a", "b", "c"], ["b", "c", "a"]], "c", 2) == ["b", "c"]
    assert candidate_ids([["a", "b", "c"], ["b", "c", "a"]], "a", 2) == ["b", "a"]
    assert candidate_ids([["a"]], "x", 5) == ["a", "x"]


@pytest.fixture
def collection(tmp_path):
    """Collection of documents about colors and drinks."""
    documents = {"w": "red wine", "r": "red river", "c": "green castle", "b": "blue horse"}
    return open_collection(
        write_beir(tmp_path / "c", documents, {"q": "red"}, {"test": {"q": {"w": 1}}}), None, 0
    )


def test_lists_are_scored_by_the_teacher(collection, tmp_path):
    rows = [PairRow("title/w/0", "red", ("red wine",), (1.0,), "title", "w"),
            PairRow("title/c/0", "red river", ("green castle",), (1.0,), "title", "c")]  # fmt: skip
    lists = candidate_lists(rows, collection, ["bm25"], length=2)
    assert [sorted(row.passage_documents) for row in lists] == [["r", "w"], ["c", "r"]]
    for row in lists:
        assert row.targets == tuple(float(name == row.document) for name in row.passage_documents)
    assert lists[1].passages[lists[1].passage_documents.index("c")] == "green castle"
    teacher = load_cross_encoder(save_tiny_transformer(tmp_path / "teacher"), new_head=True).eval()
    scores = score_lists(lists, teacher)
    expected = pair_scores(teacher, [("red river", passage) for passage in lists[1].passages], 2)
    np.testing.assert_allclose(scores[1], expected.detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize("document", ["", "x"])
def test_rows_without_a_document_of_the_collection_are_refused(collection, document):
    row = PairRow("title/x/0", "red", ("red wine",), (1.0,), "title", document)
    with pytest.raises(UserError, match=f"needs a document of .*, not '{document}'"):
        candidate_lists([row], collection, ["bm25"])
