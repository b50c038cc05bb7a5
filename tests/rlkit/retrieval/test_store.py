"""Collections on disk and the corpora they are read from: nothing is lost, nothing cut short gets in."""

import csv
import json

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


def write(path, rows):
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
def test_documents_come_back_by_row_and_in_order(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("collection")
    write_documents(folder, documents, None)
    collection = DocumentStore(folder)
    assert len(collection) == len(documents)
    assert list(collection) == documents
    assert [collection[row] for row in range(len(documents))] == documents


def test_rows_of_every_batch_are_found_and_rows_outside_are_not(tmp_path):
    rows = 2 * BATCH + 3
    write_documents(tmp_path, (Document(str(i), "", f"text {i}") for i in range(rows)), None)
    collection = DocumentStore(tmp_path)
    for row in (0, BATCH - 1, BATCH, 2 * BATCH, rows - 1):
        assert collection[row] == Document(str(row), "", f"text {row}")
    for row in (-1, -BATCH, rows):
        with pytest.raises(IndexError):
            collection[row]


def test_the_fingerprint_tells_documents_apart(tmp_path):
    def fingerprint(*documents):
        write_documents(tmp_path, documents, None)
        return DocumentStore(tmp_path).fingerprint

    first = fingerprint(Document("1", "ab", "c"), Document("2", "", ""))
    assert first == fingerprint(Document("1", "ab", "c"), Document("2", "", ""))
    others = {
        fingerprint(Document("1", "a", "bc"), Document("2", "", "")),
        fingerprint(Document("2", "", ""), Document("1", "ab", "c")),
        fingerprint(Document("1", "ab", "c")),
    }
    assert len(others) == 3 and first not in others


def test_documents_are_refused_when_there_are_none_or_ids_repeat(tmp_path):
    with pytest.raises(UserError, match="no documents"):
        write_documents(tmp_path, [], None)
    with pytest.raises(UserError, match="1 of 3 documents have the id of another"):
        write_documents(tmp_path, [Document(name, "", "x") for name in "aba"], None)
    with pytest.raises(UserError, match="is no index"):
        read_header(tmp_path)  # what was refused is not left as a collection


def test_documents_that_are_cut_off_leave_no_collection(tmp_path):
    def cut_off():
        yield Document("1", "", "new")
        raise KeyboardInterrupt

    write_documents(tmp_path, [Document("1", "", "old")], ["corpus"])
    with pytest.raises(KeyboardInterrupt):
        write_documents(tmp_path, cut_off(), ["corpus"])
    with pytest.raises(UserError, match="is no index"):
        DocumentStore(tmp_path)


def test_a_damaged_folder_is_told(tmp_path):
    write_documents(tmp_path, [Document("1", "", "x" * 1000)], None)
    table, header = tmp_path / "documents.arrow", tmp_path / "index.json"
    whole, said = table.read_bytes(), header.read_text()
    table.write_bytes(whole[:500])
    with pytest.raises(UserError, match=r"documents\.arrow is missing or damaged"):
        DocumentStore(tmp_path)
    table.write_bytes(whole)
    header.write_text(said.replace('"documents": 1', '"documents": 2'))
    with pytest.raises(UserError, match=r"documents\.arrow is missing or damaged"):
        DocumentStore(tmp_path)
    header.write_text(said[:40])
    with pytest.raises(UserError, match=r"index\.json is missing or damaged"):
        DocumentStore(tmp_path)


@pytest.mark.parametrize("name", ["corpus.jsonl", "c.PARQUET", "c.csv"])
def test_every_kind_of_file_is_read(tmp_path, name):
    path = tmp_path / name
    corpus = write(path.with_suffix(path.suffix.lower()), ROWS)
    (tmp_path / corpus).rename(path)
    assert list(read_corpus(str(path))) == DOCUMENTS


def test_a_beir_folder_is_read(tmp_path):
    write(tmp_path / "corpus.jsonl", ROWS)
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
def test_wikipedia_rows_of_search_r1_are_taken_apart(tmp_path, contents, title, text):
    corpus = write(tmp_path / "wiki.jsonl", [{"id": 0, "contents": contents}])
    assert list(read_corpus(corpus)) == [Document("0", title, text)]


@pytest.mark.parametrize(
    "content, said",
    [
        (b'{"_id": "1", "text": "a"}\n\n{"_id": "2", "te', r"bad\.jsonl:3: .*cut short"),
        (b'{"_id": "1", "text": "a"}\n{"_id": "1", "text": "b"}\n', r"bad\.jsonl:2: the id '1' repeats"),
        (b'{"_id": 1, "text": "a"}\n{"_id": "1", "text": "b"}\n', r"bad\.jsonl:2: the id '1' repeats"),
        (b'{"_id": "1", "title": "a"}\n', r"bad\.jsonl:1: the row needs a text"),
        (b'{"_id": "1", "text": null}\n', r"bad\.jsonl:1: the row needs a text"),
        (b'{"_id": "1", "text": 3}\n', r"bad\.jsonl:1: the row needs a text"),
        (b'{"text": "a"}\n', r"bad\.jsonl:1: the row needs an _id"),
        (b'{"_id": true, "text": "a"}\n', r"bad\.jsonl:1: the row needs an _id"),
        (b'{"_id": "", "text": "a"}\n', r"bad\.jsonl:1: the row needs an _id"),
        (b'{"_id": "1", "text": "a", "title": 1}\n', r"bad\.jsonl:1: the title must be a text"),
        (b'["1", "a"]\n', r"bad\.jsonl:1: the line must be an object"),
        (b'{"_id": "1", "text": "caf\xe9"}\n', r"bad\.jsonl:1: .*cut short"),
        (b'{"_id": "1", "text": "\\ud83d"}\n', r"bad\.jsonl:1: half of a surrogate pair"),
        (b"[" * 100_000, r"bad\.jsonl:1: .*cut short"),
        (b"\n\n", r"bad\.jsonl has no documents"),
        (b"", r"bad\.jsonl has no documents"),
    ],
)
def test_a_bad_line_of_json_is_named(tmp_path, content, said):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said):
        list(read_corpus(str(tmp_path / "bad.jsonl")))


@pytest.mark.parametrize(
    "content, said",
    [
        (b"_id,title,text\n1,a,b\n2,c\n", r"bad\.csv:3: .*2 fields where the header has 3"),
        (b"_id,title,text\n1,a,b,c\n", r"bad\.csv:2: .*4 fields"),
        (b'_id,title,text\n1,a,"cut', r"bad\.csv:2: .*cut short"),
        (b"_id,title\n1,a\n", r"bad\.csv:2: the row needs a text"),
        (b"_id,text\n1,a\n\n1,b\n", r"bad\.csv:4: the id '1' repeats"),
        (b"_id,text\n1,\xff\n", r"bad\.csv:.*cut short"),
        (b"_id,text\n", r"bad\.csv has no documents"),
        (b"", r"bad\.csv has no documents"),
    ],
)
def test_a_bad_row_of_csv_is_named(tmp_path, content, said):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(UserError, match=said):
        list(read_corpus(str(tmp_path / "bad.csv")))


def test_bad_parquet_is_named(tmp_path):
    corpus = write(tmp_path / "bad.parquet", [{"id": "1", "text": "a"}, {"id": "2", "text": None}])
    with pytest.raises(UserError, match=r"bad\.parquet: row 2: the row needs a text"):
        list(read_corpus(corpus))
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "bad.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"bad\.parquet: cannot be read.*cut short"):
        list(read_corpus(corpus))


def test_a_corpus_that_is_not_there_is_told(tmp_path):
    for corpus, said in [
        (tmp_path, "there is no corpus"),
        (tmp_path / "none.jsonl", "there is no corpus"),
        ("world:many:0", "is no world"),
        ("world:100", "is no world"),
    ]:
        with pytest.raises(UserError, match=said):
            list(read_corpus(str(corpus)))
    (tmp_path / "corpus.txt").write_text("text")
    with pytest.raises(UserError, match=r"of a kind that is not read: give one of \.jsonl, \.parquet, \.csv"):
        corpus_source(str(tmp_path / "corpus.txt"))


def test_a_generated_world_is_a_corpus():
    documents = list(read_corpus("world:100:3"))
    passages = list(World(seed=3, size=100).passages())
    assert [(d.id, d.title, d.text) for d in documents] == [(p.id, p.title, p.text) for p in passages]
    assert len(documents) == 100


def test_a_corpus_that_changed_has_another_source(tmp_path):
    corpus = write(tmp_path / "c.jsonl", ROWS)
    before = corpus_source(corpus)
    assert before == corpus_source(corpus) == json.loads(json.dumps(before))
    write(tmp_path / "c.jsonl", ROWS[:2])
    assert corpus_source(corpus) != before


def test_the_text_of_a_document_has_its_title():
    assert full_text(Document("1", "Title", "text")) == "Title\ntext"
    assert full_text(Document("1", "", "text")) == "text"
