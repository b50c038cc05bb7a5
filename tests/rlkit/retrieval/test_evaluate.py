"""Scores of retrievers and run files: trec_eval's, query by query, with nothing left out."""

from pathlib import Path

import ir_measures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.files import read_run
from rlkit.retrieval.documents import Document
from rlkit.retrieval.evaluate import evaluate_retriever, write_trec

MEASURES = {
    "ndcg@10": ir_measures.nDCG @ 10,
    "recall@100": ir_measures.R @ 100,
    "rr": ir_measures.RR,
    "ap": ir_measures.AP,
    "precision@5": ir_measures.P @ 5,
}
DOCUMENTS = "abcdefgh"
NUMBERS = st.dictionaries(st.sampled_from(DOCUMENTS), st.integers(0, 3), min_size=1)
RUNS = st.dictionaries(st.sampled_from(["q1", "q2", "q3"]), NUMBERS)  # few scores: many ties, queries missing


@pytest.fixture
def use(monkeypatch):
    """Let a collection be opened whatever name is asked for."""

    def use(qrels, **changes):
        made = Collection(
            "small",
            lambda: iter(Document(d, "", d) for d in DOCUMENTS),
            {q: q for q in qrels},
            {"test": qrels},
        )
        for name, value in changes.items():
            object.__setattr__(made, name, value)
        monkeypatch.setattr("rlkit.retrieval.evaluate.open_collection", lambda *arguments: made)

    return use


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def write(path: Path, run) -> str:
    lines = (f"{q} Q0 {d} 0 {score} tag\n" for q, scores in run.items() for d, score in scores.items())
    path.write_text("".join(lines))
    return f"run:{path}"


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["q1", "q2", "q3"]), NUMBERS, min_size=1), RUNS)
def test_it_agrees_with_trec_eval_on_runs_with_ties_and_gaps(folder, qrels, run):
    judged = {q: grades for q, grades in qrels.items() if any(grades.values())}
    if not judged:
        return
    with pytest.MonkeyPatch.context() as patch:
        made = Collection("small", lambda: iter(()), {q: q for q in qrels}, {"test": qrels})
        patch.setattr("rlkit.retrieval.evaluate.open_collection", lambda *arguments: made)
        found = evaluate_retriever("small", write(folder / "some.run", run), measures=list(MEASURES))
    scores = found["scores"]
    assert set(scores) == set(judged)
    theirs = {
        (m.query_id, str(m.measure)): m.value
        for m in ir_measures.iter_calc(MEASURES.values(), judged, {q: s for q, s in run.items() if s})
    }
    for query in judged:
        for name, measure in MEASURES.items():
            assert scores[query][name] == pytest.approx(theirs.get((query, str(measure)), 0.0), abs=1e-6)


def test_a_query_that_is_missing_counts_0(use, folder):
    use({"q1": {"a": 1}, "q2": {"b": 1}})
    found = evaluate_retriever("small", write(folder / "one.run", {"q1": {"a": 1}}))
    assert {query: one["ndcg@10"] for query, one in found["scores"].items()} == {"q1": 1.0, "q2": 0.0}


def test_excluded_documents_passages_and_binary_judgments(use, folder):
    use({"q1": {"a": 1}}, excluded={"q1": frozenset("x")})
    assert evaluate_retriever("small", write(folder / "a", {"q1": {"x": 3, "a": 2}}))["rankings"]["q1"] == [
        "a"
    ]
    use({"q1": {"a": 1}}, document_of=lambda name: name[0])
    found = evaluate_retriever("small", write(folder / "b", {"q1": {"b1": 4, "a1": 3, "b2": 2, "a2": 1}}))
    assert found["rankings"]["q1"] == ["b", "a"] and found["scores"]["q1"]["rr@10"] == 0.5
    use({"q1": {"a": 1, "b": 2}}, binary={"test": {"q1": {"a": 0, "b": 1}}})
    found = evaluate_retriever("small", write(folder / "c", {"q1": {"a": 4, "b": 3}}))
    assert found["scores"]["q1"]["rr@10"] == 0.5 and 0.5 < found["scores"]["q1"]["ndcg@10"] < 1
    use({"q1": {"a": 1, "b": 2}}, min_grade=2)  # as TREC DL's
    found = evaluate_retriever("small", write(folder / "d", {"q1": {"a": 4, "b": 3}}))
    assert found["scores"]["q1"]["rr@10"] == 0.5


def test_runs_are_written_so_that_they_read_the_same(tmp_path):
    rankings = {"q1": ["b", "a", "c"], "q2": []}
    write_trec(tmp_path / "new" / "a.run", rankings, "dense:some model")
    lines = (tmp_path / "new" / "a.run").read_text().splitlines()
    assert lines[0] == "q1 Q0 b 1 3 dense:some_model" and len(lines) == 3
    assert read_run(tmp_path / "new" / "a.run") == {"q1": ["b", "a", "c"]}
    with pytest.raises(UserError, match="white space"):
        write_trec(tmp_path / "b.run", {"q": ["a b"]}, "x")
    with pytest.raises(UserError, match="cannot write"):
        write_trec(tmp_path, rankings, "x")


@pytest.mark.parametrize(
    ("retriever", "options", "message"),
    [
        ("bm26", {}, "no retriever 'bm26'"),
        ("bm25", {"measures": ["mrr@10"]}, "no measure 'mrr@10'"),
        ("bm25", {"split": "train"}, "no split 'train'"),
        ("run:/nowhere", {}, "no file /nowhere"),
    ],
)
def test_bad_names(use, retriever, options, message):
    use({"q1": {"a": 1}})
    with pytest.raises(UserError, match=message):
        evaluate_retriever("small", retriever, **options)
