"""Scores of retrievers and run files: they agree with trec_eval, and every judged query counts."""

from pathlib import Path

import ir_measures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.files import read_run
from rlkit.retrieval.documents import Document
from rlkit.retrieval.evaluate import evaluate_retriever, write_trec_run

MEASURES = {
    "ndcg@10": ir_measures.nDCG @ 10,
    "recall@100": ir_measures.R @ 100,
    "rr": ir_measures.RR,
    "ap": ir_measures.AP,
    "precision@5": ir_measures.P @ 5,
}
DOCUMENTS = "abcdefgh"
# Grades or scores by document. Few values give many ties, and a run may lack some of the queries.
NUMBERS = st.dictionaries(st.sampled_from(DOCUMENTS), st.integers(0, 3), min_size=1)
RUNS = st.dictionaries(st.sampled_from(["q1", "q2", "q3"]), NUMBERS)


def collection_of(qrels, **fields):
    """Return a small collection with the given judgments."""
    documents = [Document(d, "", d) for d in DOCUMENTS]
    return Collection("small", lambda: iter(documents), {q: q for q in qrels}, {"test": qrels}, **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def write_run(path: Path, run) -> str:
    """Write a TREC run file with these scores, and return its name as a retriever."""
    lines = (f"{q} Q0 {d} 0 {score} tag\n" for q, scores in run.items() for d, score in scores.items())
    path.write_text("".join(lines))
    return f"run:{path}"


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["q1", "q2", "q3"]), NUMBERS, min_size=1), RUNS)
def test_scores_agree_with_trec_eval_on_ties_and_missing_queries(folder, qrels, run):
    judged = {q: grades for q, grades in qrels.items() if any(grades.values())}
    if not judged or not qrels.keys() & run.keys():
        return
    retriever = write_run(folder / "some.run", run)
    result = evaluate_retriever(collection_of(qrels), retriever, measures=list(MEASURES))
    scores = result["scores"]
    assert set(scores) == set(qrels)
    for query in qrels.keys() - judged.keys():
        assert scores[query] == dict.fromkeys(MEASURES, 0)
    expected = {
        (m.query_id, str(m.measure)): m.value
        for m in ir_measures.iter_calc(MEASURES.values(), judged, {q: s for q, s in run.items() if s})
    }
    for query in judged:
        for name, measure in MEASURES.items():
            assert scores[query][name] == pytest.approx(expected.get((query, str(measure)), 0.0), abs=1e-6)


def test_query_without_ranking_scores_0(folder):
    collection = collection_of({"q1": {"a": 1}, "q2": {"b": 1}})
    result = evaluate_retriever(collection, write_run(folder / "one.run", {"q1": {"a": 1}}))
    assert {query: scores["ndcg@10"] for query, scores in result["scores"].items()} == {"q1": 1.0, "q2": 0.0}


def test_excluded_documents_are_removed_from_run(folder):
    collection = collection_of({"q1": {"a": 1}}, excluded={"q1": frozenset("x")})
    result = evaluate_retriever(collection, write_run(folder / "a", {"q1": {"x": 3, "a": 2}}))
    assert result["rankings"]["q1"] == ["a"]


def test_passages_of_run_are_mapped_to_documents(folder):
    collection = collection_of({"q1": {"a": 1}}, document_of=lambda name: name[0])
    run = {"q1": {"b1": 4, "a1": 3, "b2": 2, "a2": 1}}
    result = evaluate_retriever(collection, write_run(folder / "b", run))
    assert result["rankings"]["q1"] == ["b", "a"] and result["scores"]["q1"]["rr@10"] == 0.5


def test_binary_judgments_score_measures_other_than_ndcg(folder):
    collection = collection_of({"q1": {"a": 1, "b": 2}}, binary={"test": {"q1": {"a": 0, "b": 1}}})
    result = evaluate_retriever(collection, write_run(folder / "c", {"q1": {"a": 4, "b": 3}}))
    assert result["scores"]["q1"]["rr@10"] == 0.5 and 0.5 < result["scores"]["q1"]["ndcg@10"] < 1


def test_min_grade_applies_to_reciprocal_rank(folder):
    collection = collection_of({"q1": {"a": 1, "b": 2}}, min_grades={"rr": 2})  # as in TREC DL
    result = evaluate_retriever(collection, write_run(folder / "d", {"q1": {"a": 4, "b": 3}}))
    assert result["scores"]["q1"]["rr@10"] == 0.5


def test_write_trec_run_round_trips(tmp_path):
    rankings = {"q1": ["b", "a", "c"], "q2": []}
    # A run file separates its fields by white space, so the tag must not contain any.
    write_trec_run(tmp_path / "new" / "a.run", rankings, "dense:some model")
    lines = (tmp_path / "new" / "a.run").read_text().splitlines()
    assert lines[0] == "q1 Q0 b 1 3 dense:some_model" and len(lines) == 3
    assert read_run(tmp_path / "new" / "a.run") == {"q1": ["b", "a", "c"]}
    with pytest.raises(UserError, match="white space"):
        write_trec_run(tmp_path / "b.run", {"q": ["a b"]}, "x")
    with pytest.raises(UserError, match="cannot write"):
        write_trec_run(tmp_path, rankings, "x")


@pytest.mark.parametrize(
    ("retriever", "options", "message"),
    [
        ("bm26", {}, "no retriever 'bm26'"),
        ("bm25", {"measures": ["mrrr@10"]}, "no measure 'mrrr@10'.*mean 'rr@10'"),
        ("bm25", {"split": "train"}, "no split 'train'"),
        ("run:/nowhere", {}, "no file /nowhere"),
    ],
)
def test_evaluate_retriever_rejects_unknown_names(retriever, options, message):
    with pytest.raises(UserError, match=message):
        evaluate_retriever(collection_of({"q1": {"a": 1}}), retriever, **options)
