"""Collections read from files, and the errors that name file and line of a malformed row."""

import json

import pytest

from rlkit.errors import UserError
from rlkit.retrieval.collections.files import read_qrels, read_run
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import Document

HEADER = "query-id\tcorpus-id\tscore\n"


def write_beir(folder, **changes):
    """Write a small collection in BEIR's layout and return its folder; None omits a file."""
    files = {
        "corpus.jsonl": jsonl({"_id": "d1", "title": "One", "text": "first"}, {"_id": 2, "text": "second"}),
        "queries.jsonl": jsonl({"_id": "q1", "text": "a question"}, {"_id": "q2", "text": "another"}),
        "qrels/test.tsv": f"{HEADER}q1\td1\t2\nq1\t2\t0\n",
        "qrels/train.tsv": f"{HEADER}q2\t2\t1\n",
    }
    (folder / "qrels").mkdir(parents=True)
    for name, text in (files | changes).items():
        if text is not None:
            (folder / name).write_text(text)
    return str(folder)


def jsonl(*values):
    return "".join(f"{json.dumps(value)}\n" for value in values)


def test_load_collection_reads_beir_folder(tmp_path):
    collection = load_collection(write_beir(tmp_path / "set"))
    assert list(collection.documents()) == [Document("d1", "One", "first"), Document("2", "", "second")]
    # The documents can be read more than once.
    assert list(collection.documents()) == list(collection.documents())
    assert collection.queries == {"q1": "a question", "q2": "another"}
    assert collection.judged("test") == {"q1": {"d1": 2, "2": 0}}
    assert collection.judged("train") == {"q2": {"2": 1}}
    assert not collection.drop_query_id and collection.min_grades == {}
    with pytest.raises(UserError, match=r"no split 'dev'.*test, train.*folds"):
        collection.judged("dev")


ERRORS = [
    ("corpus.jsonl", '{"_id": "d1", "te', r"corpus\.jsonl:1: the line is not valid JSON"),
    (
        "corpus.jsonl",
        jsonl({"_id": "d1", "text": "a"}, {"_id": "d1", "text": "b"}),
        r"corpus\.jsonl:2: .*duplicate",
    ),
    (
        "corpus.jsonl",
        jsonl({"_id": "d1", "text": "a"}),
        r"t\w+\.tsv:\d: the judged document '2' is not in set \(1 missing",
    ),
    ("corpus.jsonl", None, r"there is no corpus .*corpus\.jsonl"),
    ("queries.jsonl", None, r"there is no file .*queries\.jsonl"),
    ("queries.jsonl", jsonl({"_id": "q1", "text": "a"}) * 2, r"queries\.jsonl:2: the id 'q1' is a duplicate"),
    ("queries.jsonl", jsonl({"_id": "q1"}), r"queries\.jsonl:1: a query needs"),
    (
        "queries.jsonl",
        jsonl({"_id": "q1", "text": "a"}),
        r"train judge 'q2', which is not one of the queries",
    ),
    (
        "qrels/test.tsv",
        "q1\td1\t2\n",
        r"test\.tsv:1: the first line must be the tab-separated header query",
    ),
    ("qrels/test.tsv", "", r"test\.tsv:1: the first line must be the tab-separated header"),
    ("qrels/test.tsv", f"{HEADER}q1\td1\n", r"test\.tsv:2: 2 fields, expected 3; is it truncated"),
    ("qrels/test.tsv", f"{HEADER}q1\td1\thigh\n", r"test\.tsv:2: the grade 'high' is not a number"),
    ("qrels/test.tsv", f"{HEADER}q1\td1\t0.5\n", r"test\.tsv:2: the grade '0.5' is not an integer"),
    ("qrels/test.tsv", f"{HEADER}q1\td1\t1\nq1\td1\t0\n", r"test\.tsv:3: the id 'd1' is a duplicate"),
    ("qrels/test.tsv", f"{HEADER}q1\td9\t1\n", r"test\.tsv:2: the judged document 'd9' is not in set"),
]


@pytest.mark.parametrize(("name", "text", "message"), ERRORS)
def test_load_collection_names_file_and_line_of_error(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        load_collection(write_beir(tmp_path / "set", **{name: text}))


def test_load_collection_rejects_folder_without_qrels(tmp_path):
    folder = write_beir(tmp_path / "set", **{"qrels/test.tsv": None, "qrels/train.tsv": None})
    with pytest.raises(UserError, match=r"qrels has no train\.tsv"):
        load_collection(folder)


def test_load_collection_reads_t2ranking_folder(tmp_path):
    (tmp_path / "collection.tsv").write_text('pid\ttext\n0\t一个 "段落\n1\tb\n')
    (tmp_path / "queries.train.tsv").write_text("qid\ttext\n7\t问题\n")
    (tmp_path / "queries.dev.tsv").write_text("qid\ttext\n8\tq\n")
    (tmp_path / "qrels.train.tsv").write_text("qid - pid rel\n7 0 0 3\n7 0 1 0\n")
    (tmp_path / "qrels.retrieval.dev.tsv").write_text("qid\tpid\n8\t1\n")
    collection = load_collection(str(tmp_path))
    assert next(collection.documents()) == Document("0", "", '一个 "段落')
    assert collection.judged("train") == {"7": {"0": 3, "1": 0}}
    assert collection.judged("dev") == {"8": {"1": 1}}


def test_read_qrels_and_read_run_parse_trec_files(tmp_path):
    path = tmp_path / "file"
    path.write_text("1 0 a 2\n\n1 0\tb  0\n2 Q0 a 1\n")
    assert read_qrels(path) == {"1": {"a": 2, "b": 0}, "2": {"a": 1}}
    path.write_text("1 0 a\n")
    with pytest.raises(UserError, match="file:1: 3 fields, expected 'qid 0 docid grade'"):
        read_qrels(path)
    path.write_text("q Q0 b 1 2.0 x\nq Q0 a 2 7.5 x\nq Q0 c 3 2.0 x\n")
    # As in trec_eval, the rank column is ignored and ties are sorted by id, descending.
    assert read_run(path) == {"q": ["a", "c", "b"]}
    path.write_text("q Q0 b 1 high x\n")
    with pytest.raises(UserError, match="file:1: the score"):
        read_run(path)


@pytest.mark.parametrize("name", ["nothing", "generated:200", "generated:x:0", "generated:100:0"])
def test_load_collection_rejects_unknown_name(name):
    with pytest.raises(UserError, match=r"generated"):
        load_collection(name)
