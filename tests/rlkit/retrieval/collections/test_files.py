"""Collections from files: what is read, and each fault with its file and line."""

import json

import pytest

from rlkit.errors import UserError
from rlkit.retrieval.collections.files import read_qrels, read_run
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import Document

HEADER = "query-id\tcorpus-id\tscore\n"


def beir(folder, **changes):
    """Write a small collection; None leaves a file out."""
    files = {
        "corpus.jsonl": rows({"_id": "d1", "title": "One", "text": "first"}, {"_id": 2, "text": "second"}),
        "queries.jsonl": rows({"_id": "q1", "text": "a question"}, {"_id": "q2", "text": "another"}),
        "qrels/test.tsv": f"{HEADER}q1\td1\t2\nq1\t2\t0\n",
        "qrels/train.tsv": f"{HEADER}q2\t2\t1\n",
    }
    (folder / "qrels").mkdir(parents=True)
    for name, text in (files | changes).items():
        if text is not None:
            (folder / name).write_text(text)
    return str(folder)


def rows(*values):
    return "".join(f"{json.dumps(value)}\n" for value in values)


def test_beir(tmp_path):
    found = load_collection(beir(tmp_path / "set"))
    assert list(found.documents()) == [Document("d1", "One", "first"), Document("2", "", "second")]
    assert list(found.documents()) == list(found.documents())
    assert found.queries == {"q1": "a question", "q2": "another"}
    assert found.judged("test") == {"q1": {"d1": 2, "2": 0}} and found.judged("train") == {"q2": {"2": 1}}
    assert found.drop_query_id and found.min_grade == 1
    with pytest.raises(UserError, match=r"no split 'dev'.*test, train.*folds"):
        found.judged("dev")


ONE = {"_id": "d1", "text": "a"}
FAULTS = [
    ("corpus.jsonl", '{"_id": "d1", "te', r"corpus\.jsonl:1: no whole line"),
    (
        "corpus.jsonl",
        rows({"_id": "d1", "text": "a"}, {"_id": "d1", "text": "b"}),
        r"corpus\.jsonl:2: .*repeats",
    ),
    (
        "corpus.jsonl",
        rows({"_id": "d1", "text": "a"}),
        r"t\w+\.tsv:\d: the document '2' is not in set \(1 such",
    ),
    ("corpus.jsonl", None, r"there is no corpus .*corpus\.jsonl"),
    ("queries.jsonl", None, r"there is no file .*queries\.jsonl"),
    ("queries.jsonl", rows({"_id": "q1", "text": "a"}) * 2, r"queries\.jsonl:2: 'q1' repeats"),
    ("queries.jsonl", rows({"_id": "q1"}), r"queries\.jsonl:1: a query needs"),
    ("queries.jsonl", rows({"_id": "q1", "text": "a"}), r"train judge 'q2', which is no query"),
    ("qrels/test.tsv", "q1\td1\t2\n", r"test\.tsv:1: the first line must be the header query-id"),
    ("qrels/test.tsv", "", r"test\.tsv:1: the first line must be the header"),
    ("qrels/test.tsv", f"{HEADER}q1\td1\n", r"test\.tsv:2: 2 fields, not 3; is it cut short"),
    ("qrels/test.tsv", f"{HEADER}q1\td1\thigh\n", r"test\.tsv:2: the grade 'high' is no number"),
    ("qrels/test.tsv", f"{HEADER}q1\td1\t0.5\n", r"test\.tsv:2: the grade '0.5' is no whole number"),
    ("qrels/test.tsv", f"{HEADER}q1\td1\t1\nq1\td1\t0\n", r"test\.tsv:3: 'd1' repeats"),
    ("qrels/test.tsv", f"{HEADER}q1\td9\t1\n", r"test\.tsv:2: the document 'd9' is not in set"),
]


@pytest.mark.parametrize(("name", "text", "message"), FAULTS)
def test_a_fault_is_said_with_its_place(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        load_collection(beir(tmp_path / "set", **{name: text}))


def test_no_qrels(tmp_path):
    folder = beir(tmp_path / "set", **{"qrels/test.tsv": None, "qrels/train.tsv": None})
    with pytest.raises(UserError, match=r"qrels has no train\.tsv"):
        load_collection(folder)


def test_t2ranking(tmp_path):
    (tmp_path / "collection.tsv").write_text('pid\ttext\n0\t一个 "段落\n1\tb\n')
    (tmp_path / "queries.train.tsv").write_text("qid\ttext\n7\t问题\n")
    (tmp_path / "queries.dev.tsv").write_text("qid\ttext\n8\tq\n")
    (tmp_path / "qrels.train.tsv").write_text("qid - pid rel\n7 0 0 3\n7 0 1 0\n")
    (tmp_path / "qrels.retrieval.dev.tsv").write_text("qid\tpid\n8\t1\n")
    found = load_collection(str(tmp_path))
    assert next(found.documents()) == Document("0", "", '一个 "段落')
    assert found.judged("train") == {"7": {"0": 3, "1": 0}} and found.judged("dev") == {"8": {"1": 1}}


def test_trec(tmp_path):
    path = tmp_path / "file"
    path.write_text("1 0 a 2\n\n1 0\tb  0\n2 Q0 a 1\n")
    assert read_qrels(path) == {"1": {"a": 2, "b": 0}, "2": {"a": 1}}
    path.write_text("1 0 a\n")
    with pytest.raises(UserError, match="file:1: 3 fields, not 'qid 0 docid grade'"):
        read_qrels(path)
    path.write_text("q Q0 b 1 2.0 x\nq Q0 a 2 7.5 x\nq Q0 c 3 2.0 x\n")
    assert read_run(path) == {
        "q": ["a", "c", "b"]
    }  # the rank column is ignored; equal scores by id, descending
    path.write_text("q Q0 b 1 high x\n")
    with pytest.raises(UserError, match="file:1: the score"):
        read_run(path)


@pytest.mark.parametrize("name", ["nothing", "generated:200", "generated:x:0", "generated:100:0"])
def test_a_collection_that_is_none(name):
    with pytest.raises(UserError, match=r"generated"):
        load_collection(name)
