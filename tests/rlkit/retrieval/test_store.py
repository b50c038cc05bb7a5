"""The document store and the corpora it is built from: round trips, and errors for truncated input."""

import csv
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.errors import UserError
from rlkit.retrieval.collections.corpus import corpus_source, read_corpus
from rlkit.retrieval.collections.world import World
from rlkit.retrieval.documents import Document, full_text
from rlkit.retrieval.store import BATCH, DocumentStore, read_header, write_documents

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ROWS = [
    {"_id": "a", "title": 'Ähre, "quoted"', "text": "one\ntwo, three"},
    {"_id": "7", "title": "", "text": ""},
    {"_id": "ß 😀", "title": "東京", "text": "x" * 200_000},
]
DOCUMENTS = [Document(row["_id"], row["title"], row["text"]) for row in ROWS]


def write_corpus(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.builds(Document, texts, texts, texts), min_size=1, max_size=8, unique_by=lambda d: d.id))
def test_documents_round_trip_by_row_and_in_order(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("store")
    write_documents(folder, documents, None)
    store = DocumentStore(folder)
    assert len(store) == len(documents)
    assert list(store) == documents
    assert [store[row] for row in range(len(documents))] == documents


def test_rows_are_found_in_every_batch_and_not_outside(tmp_path):
    num_rows = 2 * BATCH + 3
    write_documents(tmp_path, (Document(str(i), "", f"text {i}") for i in range(num_rows)), None)
    store = DocumentStore(tmp_path)
    for row in (0, BATCH - 1, BATCH, 2 * BATCH, num_rows - 1):
        assert store[row] == Document(str(row), "", f"text {row}")
    rows = [2 * BATCH, 0, BATCH, 5, BATCH - 1, 5, num_rows - 1]
    assert store.ids(rows) == store.ids(np.array(rows)) == [store[row].id for row in rows]
    assert store.ids([]) == []
    for row in (-1, -BATCH, num_rows):
        with pytest.raises(IndexError):
            store[row]


def test_fingerprint_depends_on_documents_and_order(tmp_path):
    def fingerprint(*documents):
        write_documents(tmp_path, documents, None)
        return DocumentStore(tmp_path).fingerprint

    first = fingerprint(Document("1", "ab", "c"), Document("2", "", ""))
    assert first == fingerprint(Document("1", "ab", "c"), Document("2", "", ""))
    changed = {
        fingerprint(Document("1", "a", "bc"), Document("2", "", "")),
        fingerprint(Document("2", "", ""), Document("1", "ab", "c")),
        fingerprint(Document("1", "ab", "c")),
    }
    assert len(changed) == 3 and first not in changed


def test_write_documents_rejects_no_documents_and_duplicate_ids(tmp_path):
    with pytest.raises(UserError, match="no documents"):
        write_documents(tmp_path, [], None)
    with pytest.raises(UserError, match="1 of 3 documents have a duplicate id"):
        write_documents(tmp_path, [Document(name, "", "x") for name in "aba"], None)
    with pytest.raises(UserError, match="is not an index"):
        read_header(tmp_path)  # rejected documents leave no index


def test_interrupted_write_leaves_no_index(tmp_path):
    def interrupted_documents():
        yield Document("1", "", "new")
        raise KeyboardInterrupt

    write_documents(tmp_path, [Document("1", "", "old")], ["corpus"])
    with pytest.raises(KeyboardInterrupt):
        write_documents(tmp_path, interrupted_documents(), ["corpus"])
    with pytest.raises(UserError, match="is not an index"):
        DocumentStore(tmp_path)


def test_damaged_folder_raises_user_error(tmp_path):
    write_documents(tmp_path, [Document("1", "", "x" * 1000)], None)
    table, header = tmp_path / "documents.arrow", tmp_path / "index.json"
    table_bytes, header_text = table.read_bytes(), header.read_text()
    # A file that was only partly written.
    table.write_bytes(table_bytes[:500])
    with pytest.raises(UserError, match=r"documents\.arrow is missing or damaged"):
        DocumentStore(tmp_path)
    table.write_bytes(table_bytes)
    header.write_text(header_text.replace('"documents": 1', '"documents": 2'))
    with pytest.raises(UserError, match=r"documents\.arrow is missing or damaged"):
        DocumentStore(tmp_path)
    header.write_text(header_text[:40])
    with pytest.raises(UserError, match=r"index\.json is missing or damaged"):
        DocumentStore(tmp_path)


@pytest.mark.parametrize("name", ["corpus.jsonl", "c.PARQUET", "c.csv"])
def test_read_corpus_reads_every_file_type(tmp_path, name):
    path = tmp_path / name
    corpus = write_corpus(path.with_suffix(path.suffix.lower()), ROWS)
    (tmp_path / corpus).rename(path)
    assert list(read_corpus(str(path))) == DOCUMENTS


def test_read_corpus_reads_beir_folder(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", ROWS)
    assert list(read_corpus(str(tmp_path))) == DOCUMENTS


@pytest.mark.parametrize(
    "contents, title, text",
    [
        ('"Title"\nText\nmore', "Title", "Text\nmore"),
        ('"A "B" C"\n', 'A "B" C', ""),
        ('"Title"', "", '"Title"'),
        ("no quotes\ntext", "", "no quotes\ntext"),
        ('"\ntext', "", '"\ntext'),
        ("", "", ""),
    ],
)
def test_read_corpus_splits_contents_of_search_r1(tmp_path, contents, title, text):
    corpus = write_corpus(tmp_path / "wiki.jsonl", [{"id": 0, "contents": contents}])
    assert list(read_corpus(corpus)) == [Document("0", title, text)]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"_id": "1", "text": "a"}\n\n{"_id": "2", "te', r"bad\.jsonl:3: .*truncated"),
        (
            b'{"_id": "1", "text": "a"}\n{"_id": "1", "text": "b"}\n',
            r"bad\.jsonl:2: the id '1' is a dup",
        ),
        (b'{"_id": 1, "text": "a"}\n{"_id": "1", "text": "b"}\n', r"bad\.jsonl:2: the id '1' is a dup"),
        (b'{"_id": "1", "title": "a"}\n', r"bad\.jsonl:1: the row needs a string in the column text"),
        (b'{"_id": "1", "text": null}\n', r"bad\.jsonl:1: the row needs a string in the column text"),
        (b'{"_id": "1", "text": 3}\n', r"bad\.jsonl:1: the row needs a string in the column text"),
        (
            b'{"_id": true, "text": "a"}\n',
            r"bad\.jsonl:1: the id must be a string or an integer, not 'True'",
        ),
        (
            b'{"_id": [1], "text": "a"}\n',
            r"bad\.jsonl:1: the id must be a string or an integer, not '\[1\]'",
        ),
        (b'{"_id": "1", "text": "a", "title": 1}\n', r"bad\.jsonl:1: the title must be a string"),
        (b'["1", "a"]\n', r"bad\.jsonl:1: the line must be a JSON object"),
        (b'{"_id": "1", "text": "caf\xe9"}\n', r"bad\.jsonl:1: the file is not UTF-8: convert it"),
        (b'{"_id": "1", "text": "\\ud83d"}\n', r"bad\.jsonl:1: the row has a lone surrogate"),
        (b"[" * 100_000, r"bad\.jsonl:1: .*truncated"),
        (b"\n\n", r"bad\.jsonl has no documents"),
        (b"", r"bad\.jsonl has no documents"),
    ],
)
def test_read_corpus_names_bad_line_of_jsonl(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_corpus(str(tmp_path / "bad.jsonl")))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"_id,title,text\n1,a,b\n2,c\n", r"bad\.csv:3: .*2 fields, but the header has 3"),
        (b"_id,title,text\n1,a,b,c\n", r"bad\.csv:2: .*4 fields"),
        (b'_id,title,text\n1,a,"cut', r"bad\.csv:2: .*truncated"),
        (b"_id,title\n1,a\n", r"bad\.csv:2: the row needs a string in the column text"),
        (b"_id,text\n1,a\n\n1,b\n", r"bad\.csv:4: the id '1' is a duplicate"),
        (b"_id,text\n1,\xff\n", r"bad\.csv:2: the file is not UTF-8: convert it"),
        (b"_id,text\n", r"bad\.csv has no documents"),
        (b"", r"bad\.csv has no documents"),
    ],
)
def test_read_corpus_names_bad_row_of_csv(tmp_path, content, message):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_corpus(str(tmp_path / "bad.csv")))


def test_read_corpus_names_bad_row_of_parquet(tmp_path):
    corpus = write_corpus(tmp_path / "bad.parquet", [{"id": "1", "text": "a"}, {"id": "2", "text": None}])
    with pytest.raises(UserError, match=r"bad\.parquet, row 2: the row needs a string in the column text"):
        list(read_corpus(corpus))
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "bad.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"bad\.parquet: cannot be read.*truncated"):
        list(read_corpus(corpus))


def test_read_corpus_rejects_missing_or_unknown_corpus(tmp_path):
    for corpus, message in [
        (tmp_path, "there is no corpus"),
        (tmp_path / "none.jsonl", "there is no corpus"),
        ("world:many:0", "is not a world"),
        ("world:100", "is not a world"),
    ]:
        with pytest.raises(UserError, match=message):
            list(read_corpus(str(corpus)))
    (tmp_path / "corpus.pdf").write_text("text")
    with pytest.raises(UserError, match=r"unsupported file type '\.pdf'; use one of \.jsonl, \.json, "):
        corpus_source(str(tmp_path / "corpus.pdf"))


def test_read_corpus_generates_world():
    documents = list(read_corpus("world:100:3"))
    passages = list(World(seed=3, size=100).passages())
    assert [(d.id, d.title, d.text) for d in documents] == [(p.id, p.title, p.text) for p in passages]
    assert len(documents) == 100


def test_corpus_source_changes_with_file(tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", ROWS)
    before = corpus_source(corpus)
    # The source is stored in index.json, so it must survive JSON.
    assert before == corpus_source(corpus) == json.loads(json.dumps(before))
    write_corpus(tmp_path / "c.jsonl", ROWS[:2])
    assert corpus_source(corpus) != before


def test_corpus_source_depends_on_content_and_not_on_size_and_time(tmp_path):
    file, folder = tmp_path / "c.txt", tmp_path / "folder" / "c.txt"
    folder.parent.mkdir()
    sources = []
    for text, time in (("cat", 1), ("dog", 1), ("dog", 2)):
        for path in (file, folder):
            path.write_text(text)
            os.utime(path, (time, time))
        sources.append((corpus_source(str(file)), corpus_source(str(folder.parent))))
    assert sources[0][0] != sources[1][0] and sources[0][1] != sources[1][1]
    assert sources[1] == sources[2]


def test_full_text_includes_title():
    assert full_text(Document("1", "Title", "text")) == "Title\ntext"
    assert full_text(Document("1", "", "text")) == "text"
