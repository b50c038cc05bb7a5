"""Scores of retrievers and run files: they agree with trec_eval, and every judged query counts."""

from pathlib import Path

import ir_measures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.files import read_run
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import Document
from rlkit.retrieval.engines.index import build_index
from rlkit.retrieval.evaluate import canonical_retriever, evaluate_retriever, write_trec_run

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


def test_scores_that_are_equal_in_single_precision_are_ties_as_in_trec_eval(folder):
    """In trec_eval, 1.00000001 and 1 are one number, and the higher id is first."""
    run = {"q1": {"a": 1.00000001, "b": 1.0, "c": 1e300, "d": 1e40}}
    result = evaluate_retriever(collection_of({"q1": {"b": 1}}), write_run(folder / "ties", run))
    assert result["rankings"]["q1"] == ["d", "c", "b", "a"]
    [metric] = ir_measures.iter_calc([ir_measures.RR], {"q1": {"b": 1}}, run)
    assert metric.value == pytest.approx(result["scores"]["q1"]["rr@10"])


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


def test_minimum_grades_differ_by_kind_of_measure_and_are_reported(folder):
    collection = collection_of({"q1": {"a": 1, "b": 2}}, min_grades={"rr": 2, "precision": 2})
    measures = ["nDCG@10", "RR@10", "AP", "R@1", "P@1", "Rprec", "hit@1", "RR(rel=1)@10", "AP(rel=2)"]
    result = evaluate_retriever(
        collection, write_run(folder / "levels", {"q1": {"a": 4, "b": 3}}), measures=measures
    )
    scores = result["scores"]["q1"]
    assert scores.pop("ndcg@10") == pytest.approx(0.86, abs=0.01)
    assert scores == {
        "rr@10": 0.5, "ap": 1, "recall@1": 0.5, "precision@1": 0, "rprec": 0, "hit@1": 1, "rr(rel=1)@10": 1,
        "ap(rel=2)": 0.5,
    }  # fmt: skip
    [note] = result["notes"]
    assert note == "rr@10, precision@1, rprec, ap(rel=2): grades of 2 and more count as relevant"


def test_level_of_a_name_uses_the_grades_even_if_there_are_binary_judgments(folder):
    collection = collection_of({"q1": {"a": 1, "b": 3}}, binary={"test": {"q1": {"a": 0, "b": 1}}})
    run = write_run(folder / "level-and-binary", {"q1": {"a": 4, "b": 3}})
    measures = ["rr", "rr(rel=1)", "rr(rel=3)"]
    scores = evaluate_retriever(collection, run, measures=measures)["scores"]
    assert scores["q1"] == {"rr": 0.5, "rr(rel=1)": 1, "rr(rel=3)": 0.5}


def test_queries_without_relevant_documents_count_as_0_as_with_trec_eval_c(folder):
    """trec_eval -c and ir_measures average over all judged queries; one of these has nothing relevant."""
    qrels = {"1": {"a": 1, "b": 0}, "2": {"c": 1}, "3": {"a": 0, "b": -1}}
    scores = {"1": {"b": 2.0, "a": 1.0}, "2": {"c": 1.0}, "3": {"a": 1.0}}
    result = evaluate_retriever(
        collection_of(qrels), write_run(folder / "none", scores), measures=["map", "MRR@10"]
    )
    mean = sum(values["ap"] for values in result["scores"].values()) / len(result["scores"])
    assert mean == pytest.approx((0.5 + 1 + 0) / 3)
    judged = {query: grades for query, grades in qrels.items() if query != "3"}
    # pytrec_eval, which ir_measures calls, hangs on some queries without relevant documents.
    expected = ir_measures.calc_aggregate([ir_measures.AP], judged, scores)[ir_measures.AP] * 2 / 3
    assert mean == pytest.approx(expected)
    assert result["counts"]["queries_without_relevant_document"] == 1
    assert result["notes"] == ["1 of 3 queries have no relevant document and score 0, as with trec_eval -c"]
    with pytest.raises(UserError, match="no query with a relevant document"):
        evaluate_retriever(collection_of({"3": qrels["3"]}), "bm25")


def test_samples_and_folds_include_queries_without_relevant_documents(folder):
    qrels = {str(i): {"a": i % 2} for i in range(20)}
    run = write_run(folder / "sampled", {query: {"a": 1} for query in qrels})
    result = evaluate_retriever(collection_of(qrels), run, n=12)
    num_without = result["counts"]["queries_without_relevant_document"]
    assert len(result["scores"]) == 12 and 0 < num_without < 12
    assert num_without == sum(int(query) % 2 == 0 for query in result["scores"])
    fold = collection_of(qrels).folds(4, 1)
    assert len(evaluate_retriever(fold, run)["scores"]) == 5


def test_documents_with_the_id_of_their_query_are_dropped_counted_or_hinted_at(folder):
    qrels = {str(i): {"a": 1} for i in range(1, 4)}
    run = write_run(folder / "own", {query: {query: 3, "a": 2} for query in qrels})
    dropped = evaluate_retriever(collection_of(qrels, drop_query_id=True), run)
    assert dropped["counts"]["removed_query_ids"] == 3 and dropped["scores"]["1"]["rr@10"] == 1
    assert "3 documents with the id of their query were removed" in dropped["notes"][0]
    ranked = evaluate_retriever(collection_of(qrels), run)
    assert ranked["counts"]["removed_query_ids"] == 0 and ranked["scores"]["1"]["rr@10"] == 0.5
    assert "first document of 3 of 3 rankings has the id of its query" in ranked["notes"][0]
    assert evaluate_retriever(collection_of(qrels), run, suggest_drop_query_id=False)["notes"] == []
    # beir#187: queries and documents are numbered, and the document with the query's number is relevant.
    relevant = {str(i): {str(i): 1} for i in range(1, 4)}
    result = evaluate_retriever(collection_of(relevant), run)
    assert result["scores"]["2"]["rr@10"] == 1 and result["notes"] == []


def test_excluded_documents_are_counted_and_do_not_take_ranks(folder):
    collection = collection_of({"q1": {"a": 1}}, excluded={"q1": frozenset("xyz")})
    run = write_run(folder / "excluded", {"q1": {"x": 4, "y": 3, "a": 2, "b": 1}})
    result = evaluate_retriever(collection, run, measures=["P@1"], depth=2)
    assert result["rankings"]["q1"] == ["a", "b"] and result["scores"]["q1"]["precision@1"] == 1
    assert result["counts"]["removed_excluded_documents"] == 2
    assert "2 documents that the collection excludes" in result["notes"][0]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))


def test_retrievers_fill_their_depth_after_exclusions(cache):
    """BM25 finds all eight documents, of which two are excluded and one has the id of the query."""
    documents = [Document(d, "", f"word {d}") for d in DOCUMENTS]
    collection = Collection(
        "words",
        lambda: iter(documents),
        {"a": "word", "q": "word", "nothing": "unknown"},
        {"test": {"a": {"d": 1}, "q": {"d": 1}, "nothing": {"d": 1}}},
        excluded={"a": frozenset("bc")},
        drop_query_id=True,
        source=["words"],
    )
    result = evaluate_retriever(collection, "bm25", depth=5, measures=["recall@5"])
    assert {query: len(ranking) for query, ranking in result["rankings"].items()} == {
        "a": 5, "q": 5, "nothing": 0
    }  # fmt: skip
    assert not {"a", "b", "c"} & set(result["rankings"]["a"])
    assert result["counts"]["removed_query_ids"] == 1
    assert "1 of 3 queries have no result and score 0" in result["notes"]


def test_run_and_judgments_with_different_ids_are_reported(folder):
    """Cranfield's judgments number the queries by their order, while its query file has ids such as 002."""
    collection = collection_of({"1": {"a": 1}, "2": {"b": 1}, "3": {"a": 1}})
    with pytest.raises(UserError, match=r"none of the 3 judged queries: it has ids such as '001'.*such as '"):
        evaluate_retriever(collection, write_run(folder / "o", {"001": {"a": 1}, "002": {"b": 1}}))
    (folder / "empty").write_text("")
    with pytest.raises(UserError, match="it has no rankings"):
        evaluate_retriever(collection, f"run:{folder / 'empty'}")
    run = write_run(folder / "p", {"2": {"b": 1, "unjudged": 2}, "365": {"a": 1}})
    missing, unknown = evaluate_retriever(collection, run)["notes"]
    assert "no ranking for 2 of 3 queries" in missing and "score 0" in missing
    assert "1 of 2 queries of the run are not judged, for example '365'" in unknown
    [note] = evaluate_retriever(
        collection, write_run(folder / "d", {q: {"MED-1": 1} for q in collection.queries})
    )["notes"]
    assert "no document of the run is judged" in note and "'MED-1'" in note


def test_index_of_other_documents_is_reported(tmp_path):
    collection = load_collection("generated:200:0")
    others = [Document(f"MED-{i}", "", document.text) for i, document in enumerate(collection.documents())]
    index = str(build_index(others, tmp_path / "index"))
    note = evaluate_retriever(collection, index)["notes"][-1]
    assert "no document of the retriever is judged" in note and "such as 'MED-" in note
    assert not any("judged" in note for note in evaluate_retriever(collection, "bm25")["notes"])


def test_depth_below_a_cutoff_is_reported(folder):
    run = write_run(folder / "deep", {"q1": {"a": 1}})
    collection = collection_of({"q1": {"a": 1}})
    notes = evaluate_retriever(collection, run, measures=["R@100", "AP", "P@5"], depth=5)["notes"]
    assert notes == ["recall@100 needs --depth 100; with --depth 5, its ranks from 6 are empty"]


def test_notes_of_the_collection_are_part_of_the_result(folder):
    collection = collection_of({"q1": {"a": 1}}, notes=["2 documents are missing"])
    result = evaluate_retriever(collection, write_run(folder / "n", {"q1": {"a": 1}}))
    assert result["notes"] == ["2 documents are missing"]


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(st.sampled_from(DOCUMENTS), st.integers(-3, 10**18), min_size=1),
    st.lists(st.sampled_from(DOCUMENTS), unique=True, min_size=1),
)
def test_scores_of_any_grades_are_in_0_1_and_perfect_for_the_ideal_ranking(folder, grades, ranking):
    if max(grades.values()) < 1:
        return
    ideal = sorted((d for d in grades if grades[d] > 0), key=grades.__getitem__, reverse=True)
    measures = ["nDCG@10", "nDCG", "MAP", "R@10", "Rprec", "hit@1"]
    for order in (ranking, ideal):
        run = write_run(folder / "grades", {"q": {d: len(order) - i for i, d in enumerate(order)}})
        scores = evaluate_retriever(collection_of({"q": grades}), run, measures=measures)["scores"]["q"]
        assert all(0 <= value <= 1 + 1e-12 for value in scores.values())
    assert list(scores.values()) == pytest.approx([1] * len(measures))


def test_canonical_retriever_names_files_as_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.run").write_text("")
    assert canonical_retriever("a.run") == canonical_retriever("run:a.run") == "run:a.run"
    for name in ("bm25", "dense:a.run", str(tmp_path), "b.run", "dense:" + "x" * 5000):
        assert canonical_retriever(name) == name


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
        ("bm25", {"measures": ["RR(rel=0)@10"]}, "minimum relevant grade must be at least 1"),
    ],
)
def test_evaluate_retriever_rejects_unknown_names(retriever, options, message):
    with pytest.raises(UserError, match=message):
        evaluate_retriever(collection_of({"q1": {"a": 1}}), retriever, **options)
