"""Folders in BEIR's layout and the Hub's, with the gaps that the published datasets have."""

import gzip
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from rlkit.errors import UserError
from rlkit.retrieval import queries
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import Document
from rlkit.retrieval.queries import judged_queries, open_collection

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
    assert not collection.drop_query_id and collection.min_grades == {} and collection.notes == []
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
        jsonl({"_id": "doc1", "text": "a"}),
        r"set: none of the 2 judged documents is in the corpus: .*'2', the corpus such as 'doc1'",
    ),
    ("corpus.jsonl", None, r"there is no corpus .*corpus\.jsonl"),
    ("queries.jsonl", None, r"there is no file .*queries\.jsonl"),
    ("queries.jsonl", jsonl({"_id": "q1", "text": "a \ud800"}), r"queries\.jsonl:1: .*lone surrogate"),
    (
        "queries.jsonl",
        jsonl({"_id": "q1", "text": "a"}, {"_id": "q1", "text": "b"}),
        r"queries\.jsonl:2: the id 'q1' is a duplicate with another text",
    ),
    ("queries.jsonl", jsonl({"_id": "q1"}), r"queries\.jsonl:1: a query needs"),
    ("queries.jsonl", jsonl({"_id": True, "text": "a"}), r"queries\.jsonl:1: a query needs"),
    (
        "queries.jsonl",
        jsonl({"_id": "x1", "text": "a"}),
        r"none of the 2 judged queries is among its queries: .*'q1', the queries such as 'x1'",
    ),
    ("queries.jsonl", "", r"none of the 2 judged queries .*'q1', the queries are empty"),
    ("qrels/test.tsv", "", r"test\.tsv has no judgments"),
    ("qrels/test.tsv", f"{HEADER}q1\td1\n", r"test\.tsv:2: 2 fields, expected 3; is it truncated"),
    (
        "qrels/test.tsv",
        f"{HEADER}q1\td1\t1\nq1\td1\t0\n",
        r"test\.tsv:3: document 'd1' .* 1 in .*test\.tsv:2",
    ),
]


@pytest.mark.parametrize(("name", "text", "message"), ERRORS)
def test_load_collection_names_file_and_line_of_error(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message) as error:
        load_collection(write_beir(tmp_path / "set", **{name: text}))
    assert "\n" not in str(error.value)


def test_judged_documents_missing_from_corpus_stay_in_ideal_ranking(tmp_path):
    qrels = f"{HEADER}q1\td1\t1\nq1\tgone\t2\nq2\tlost\t0\n"
    collection = load_collection(write_beir(tmp_path / "set", **{"qrels/test.tsv": qrels}))
    assert collection.judged("test") == {"q1": {"d1": 1, "gone": 2}, "q2": {"lost": 0}}
    assert judged_queries(collection, "test", None, 0)[0].ideal == [2, 1]
    [note] = collection.notes
    assert "2 of 4 judged documents are not in the corpus" in note and "'gone'" in note
    assert "the relevant ones (1) count" in note


def test_judgments_of_unknown_queries_are_dropped(tmp_path):
    qrels = f"{HEADER}q1\td1\t1\nPLAIN-1\td1\t1\nPLAIN-1\tgone\t1\n"
    collection = load_collection(write_beir(tmp_path / "set", **{"qrels/test.tsv": qrels}))
    assert collection.judged("test") == {"q1": {"d1": 1}}
    [note] = collection.notes
    assert "1 of 3 judged queries have no text" in note and "'PLAIN-1'" in note


def test_split_whose_queries_are_all_unknown_is_left_out(tmp_path):
    changes = {"queries.jsonl": jsonl({"_id": "q1", "text": "a"}, {"_id": "q1", "text": "a"})}
    collection = load_collection(write_beir(tmp_path / "set", **changes))
    assert set(collection.qrels) == {"test"} and "'q2'" in collection.notes[0]


@pytest.mark.parametrize("name", ["validation.tsv", "valid.tsv", "val.tsv", "Dev.tsv", "dev.tsv.gz"])
def test_spellings_of_validation_split_are_dev(tmp_path, name):
    folder = write_beir(tmp_path / "set")
    text = f"{HEADER}q2\td1\t1\n".encode()
    (tmp_path / "set/qrels" / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert load_collection(folder).judged("dev") == {"q2": {"d1": 1}}


def test_dev_and_validation_are_kept_apart(tmp_path):
    changes = {"qrels/dev.tsv": f"{HEADER}q1\td1\t1\n", "qrels/validation.tsv": f"{HEADER}q2\td1\t1\n"}
    collection = load_collection(write_beir(tmp_path / "set", **changes))
    assert collection.judged("dev") == {"q1": {"d1": 1}}
    assert collection.judged("validation") == {"q2": {"d1": 1}}


def test_qrels_file_of_another_name_is_selected_by_its_path(tmp_path):
    judged = f"{HEADER}q1\td1\t1\n"
    changes = {"qrels/dl19.tsv": judged, "qrels/test-2020.tsv": f"{HEADER}q2\t2\t1\n", "qrels/test.tsv": None}
    folder = write_beir(tmp_path / "set", **changes)
    with pytest.raises(
        UserError, match=r"no split 'test'.*dl19.*test-2020.*train.* path of its file qrels/dl19"
    ):
        load_collection(folder).judged("test")
    collection = load_collection(f"{folder}/qrels/dl19.tsv")
    assert collection.qrels == {"test": {"q1": {"d1": 1}}} and collection.name == "set/dl19"
    with pytest.raises(UserError, match=r"there is no corpus next to .*other"):
        (tmp_path / "other.tsv").write_text(judged)
        load_collection(str(tmp_path / "other.tsv"))


def test_only_qrels_file_is_the_test_split(tmp_path):
    changes = {"qrels/dl19.tsv": f"{HEADER}q1\td1\t1\n", "qrels/test.tsv": None, "qrels/train.tsv": None}
    collection = load_collection(write_beir(tmp_path / "set", **changes))
    assert collection.judged("test") == {"q1": {"d1": 1}}
    assert collection.notes == ["dl19.tsv, its only file of judgments, is used as the test split"]


def test_load_collection_rejects_folder_without_qrels(tmp_path):
    folder = write_beir(tmp_path / "set", **{"qrels/test.tsv": None, "qrels/train.tsv": None})
    with pytest.raises(UserError, match=r"qrels has no train\.tsv"):
        load_collection(folder)


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("qrels", ["set/qrels", "set/data", "set-qrels"])
def test_load_collection_reads_parquet_folders_of_the_hub(tmp_path, qrels):
    folder = tmp_path / "set"
    write_parquet(folder / "corpus/corpus-00000-of-00002.parquet", [{"_id": 1, "title": "", "text": "a"}])
    write_parquet(folder / "corpus/corpus-00001-of-00002.parquet", [{"_id": 2, "title": None, "text": "b"}])
    write_parquet(folder / "queries/queries-00000-of-00001.parquet", [{"_id": 7, "text": "q"}])
    write_parquet(tmp_path / qrels / "test-00000-of-00002.parquet", [row(7, 1, 1)])
    write_parquet(tmp_path / qrels / "test-00001-of-00002.parquet", [row(7, 2, 0)])
    collection = load_collection(str(folder))
    assert list(collection.documents()) == [Document("1", "", "a"), Document("2", "", "b")]
    assert collection.queries == {"7": "q"} and collection.qrels == {"test": {"7": {"1": 1, "2": 0}}}
    assert collection.notes == []


def row(query, document, score):
    return {"query-id": query, "corpus-id": document, "score": score}


def test_load_collection_reads_compressed_jsonl_of_the_hub(tmp_path):
    """mteb's repositories have test.tsv and test.jsonl; BeIR's have .jsonl.gz and a second repository."""
    folder = write_beir(tmp_path / "set", **{"qrels/test.jsonl": jsonl(row("q1", "d1", 1))})
    assert load_collection(folder).notes == ["test.jsonl is not read, because there is also test.tsv"]
    expected = load_collection(folder).judged("test")
    for name in ("corpus.jsonl", "queries.jsonl"):
        path = tmp_path / "set" / name
        (tmp_path / "set" / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    (tmp_path / "set/qrels").rename(tmp_path / "set-qrels")
    collection = load_collection(folder)
    assert collection.judged("test") == expected and len(list(collection.documents())) == 2
    assert load_collection(str(tmp_path / "set-qrels/train.tsv")).judged("test") == {"q2": {"2": 1}}


@pytest.mark.parametrize(
    ("name", "drops"),
    [
        ("arguana", True),
        ("ArguAna", True),
        ("mteb/quora", True),
        ("datasets--mteb--arguana/snapshots/0a1b", True),
        ("arguana/scifact", False),
        ("webis-touche2020", False),
        ("my-quora-pairs", False),
    ],
)
def test_document_with_id_of_its_query_is_dropped_in_arguana_and_quora_only(tmp_path, name, drops):
    folder = write_beir(tmp_path / name)
    assert load_collection(folder).drop_query_id is drops
    collection = open_collection(folder, None, 0)
    assert (
        collection.drop_query_id is drops
        and any("drop_query_id" in note for note in collection.notes) is drops
    )
    for choice in (True, False):
        collection = open_collection(folder, 2, 0, drop_query_id=choice)
        assert collection.drop_query_id is choice and collection.notes == []


def test_open_collection_logs_notes_once(tmp_path, caplog):
    folder = write_beir(tmp_path / "with-gaps", **{"qrels/test.tsv": f"{HEADER}q1\td1\t1\nq1\tgone\t1\n"})
    with caplog.at_level(logging.WARNING, queries.__name__):
        open_collection(folder, None, 0)
        open_collection(folder, None, 0)
    [record] = caplog.records
    assert record.message.startswith("with-gaps: 1 of 3 judged documents are not in the corpus")


def test_judged_queries_include_those_without_relevant_documents_on_request(tmp_path):
    changes = {"qrels/test.tsv": f"{HEADER}q1\td1\t1\nq2\td1\t0\n", "qrels/train.tsv": None}
    collection = load_collection(write_beir(tmp_path / "set", **changes))
    assert [query.id for query in judged_queries(collection, "test", None, 0)] == ["q1"]
    judged = judged_queries(collection, "test", None, 0, require_relevant=False)
    assert {query.id: query.ideal for query in judged} == {"q1": [1], "q2": []}


def test_source_changes_with_the_documents(tmp_path):
    folder = write_beir(tmp_path / "set")
    source = load_collection(folder).source
    assert load_collection(folder).source == source
    (tmp_path / "set/corpus.jsonl").write_text(jsonl({"_id": "d1", "text": "new"}))
    assert load_collection(folder).source != source


def test_source_changes_with_a_parquet_file(tmp_path):
    folder = tmp_path / "set"
    paths = [folder / f"corpus/test-0000{i}-of-00002.parquet" for i in range(2)]
    for i, path in enumerate(paths):
        write_parquet(path, [{"_id": i, "text": "a"}])
    write_parquet(folder / "queries/test-00000-of-00001.parquet", [{"_id": 7, "text": "q"}])
    write_parquet(folder / "qrels/test-00000-of-00001.parquet", [row(7, 1, 1)])
    source = load_collection(str(folder)).source
    assert load_collection(str(folder)).source == source
    write_parquet(paths[1], [{"_id": 1, "text": "b"}])
    assert load_collection(str(folder)).source != source


@pytest.mark.parametrize("name", ["nothing", "generated:200", "generated:x:0", "generated:100:0"])
def test_load_collection_rejects_unknown_name(name):
    with pytest.raises(UserError, match=r"generated"):
        load_collection(name)
