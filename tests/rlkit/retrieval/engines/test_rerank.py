"""Reranking of another engine's results by a cross-encoder."""

import pytest

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.cross_encoders import load_cross_encoder, pair_scores
from rlkit.retrieval.documents import Document, Query, Result, passage_text
from rlkit.retrieval.engines.rerank import BLOCK, Reranker
from rlkit.retrieval.retrievers import open_retriever, parse_reranker, retrieve
from tests.rlkit.retrieval.test_cross_encoders import WORD_LIST, save_classifier

DOCUMENTS = [Document(str(i), "", f"{word} river") for i, word in enumerate(WORD_LIST[:10])]


class FixedEngine:
    """Return the documents in the same order, nothing for the query "nothing", and an error for "down"."""

    def search(self, queries, k):
        documents = tuple(DOCUMENTS[:k])
        results = {"down": Result(error="the server is down"), "nothing": Result()}
        scores = tuple(float(100 - i) for i in range(len(documents)))
        return [results.get(query.text, Result(documents, scores)) for query in queries]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_cross_encoder(save_classifier(tmp_path_factory.mktemp("ranker"), 1)).eval()


def test_first_documents_are_in_order_of_the_scores_and_the_others_follow(model):
    (result,) = Reranker(FixedEngine(), model, 4).search([Query("red wine")], 10)
    scores = pair_scores(model, [("red wine", passage_text(d)) for d in DOCUMENTS[:4]], 4).tolist()
    expected = [DOCUMENTS[i] for i in sorted(range(4), key=lambda i: -scores[i])]
    assert list(result.documents) == expected + DOCUMENTS[4:]
    assert result.scores[:4] == pytest.approx(sorted(scores, reverse=True))
    assert list(result.scores) == sorted(result.scores, reverse=True) and len(set(result.scores)) == 10


@pytest.mark.parametrize("k", [1, 3, 4, 7])
def test_smaller_k_returns_the_first_documents_of_a_larger_one(model, k):
    engine = Reranker(FixedEngine(), model, 4)
    (all_results,), (first,) = (engine.search([Query("red wine")], n) for n in (10, k))
    assert first.documents == all_results.documents[:k]
    assert first.scores == pytest.approx(all_results.scores[:k])


def test_error_of_one_query_stays_with_it(model):
    down, healthy = Reranker(FixedEngine(), model, 4).search([Query("down"), Query("wine")], 3)
    assert down.error == "the server is down" and not down.documents
    assert healthy.error is None and len(healthy.documents) == 3


def test_queries_of_a_block_are_scored_as_alone(model):
    """More queries than fit into one block, among them one without results and one that fails."""
    texts = [*WORD_LIST[: BLOCK - 2], "down", "nothing", *WORD_LIST[:3]]
    engine = Reranker(FixedEngine(), model, 4)
    for text, result in zip(texts, engine.search([Query(text) for text in texts], 6), strict=True):
        (alone,) = engine.search([Query(text)], 6)
        assert (result.documents, result.error) == (alone.documents, alone.error)
        assert result.scores == pytest.approx(alone.scores, abs=1e-5)


def test_scores_that_are_not_finite_are_an_error_of_the_query(tmp_path):
    model = load_cross_encoder(save_classifier(tmp_path / "model", 1))
    embeddings = model.transformers_model.get_input_embeddings().weight
    (token,) = model.tokenizer("bread", add_special_tokens=False)["input_ids"]
    embeddings.data[token] = float("nan")
    broken, healthy, empty = Reranker(FixedEngine(), model, 4).search(
        [Query("bread"), Query("stone"), Query("nothing")], 3
    )
    assert "NaN" in broken.error and not broken.documents
    assert healthy.error is None and len(healthy.documents) == 3
    assert empty == Result()


def small_collection(**fields):
    return Collection("small", lambda: iter(DOCUMENTS), {"q": "river"}, {"test": {"q": {"0": 1}}}, **fields)


def test_excluded_documents_and_passages_of_documents_are_reranked_as_of_any_retriever(tmp_path, monkeypatch):
    """The ranking of documents is that of their best passages (MaxP), without the excluded one."""
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    folder = save_classifier(tmp_path / "ranker", 1)
    model = load_cross_encoder(folder).eval()
    document_of = {str(i): f"document {i // 2}" for i in range(len(DOCUMENTS))}
    collection = small_collection(excluded={"q": frozenset({"document 1"})}, document_of=document_of.get)
    engine = open_retriever(f"rerank:bm25|{folder}@50", collection)
    ranking = retrieve(engine, collection, {"q": "river"}, 3)["q"]
    scores = pair_scores(model, [("river", passage_text(document)) for document in DOCUMENTS], 16).tolist()
    best = {}
    for i in sorted(range(len(DOCUMENTS)), key=lambda i: -scores[i]):
        best.setdefault(document_of[str(i)], scores[i])
    del best["document 1"]
    assert ranking == list(best)[:3]
    assert list(tmp_path.glob("cache/**/ranking-*-bm25"))


def test_model_is_checked_before_an_index_is_built(tmp_path, monkeypatch):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    for model in (save_classifier(tmp_path / "classifier", 2), str(tmp_path / "missing")):
        with pytest.raises(UserError, match=r"a classifier with 2 labels|cannot be loaded"):
            open_retriever(f"rerank:bm25|{model}", small_collection())
    assert not list(tmp_path.glob("cache/**/ranking-*-bm25"))


def test_parse_reranker_splits_names_with_colons_and_at_signs():
    assert parse_reranker("bm25|runs/cross/model@50") == ("bm25", "runs/cross/model", 50)
    assert parse_reranker("rerank:bm25|a@50|b@10") == ("rerank:bm25|a@50", "b", 10)
    assert parse_reranker("dense:a/b|c/d") == ("dense:a/b", "c/d", 100)
    assert parse_reranker("http://h:80/x|user@host/model") == ("http://h:80/x", "user@host/model", 100)


@pytest.mark.parametrize("text", ["", "bm25", "bm25|", "|model", "bm25|model@0", "bm25|@10"])
def test_parse_reranker_names_the_form(text):
    with pytest.raises(UserError, match=r"must be rerank:FIRST\|MODEL.*for example"):
        parse_reranker(text)
