"""Corpora in the layouts of public collections and in folders of text files."""

import csv
import gzip
import json
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.commands.index import main
from rlkit.errors import UserError
from rlkit.retrieval.collections.corpus import IdSet, corpus_source, read_corpus
from rlkit.retrieval.documents import Document, Query
from rlkit.retrieval.engines.index import open_index


def documents(path):
    return [(document.id, document.title, document.text) for document in read_corpus(str(path))]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str | bytes):
        content = "".join(f"{json.dumps(row)}\n" for row in content)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        # DPR's psgs_w100.tsv
        (
            "psgs_w100.tsv",
            'id\ttext\ttitle\n1\t"Aaron ( or; ""Ahärôn"") is a prophet, ""brother"" of Moses"\tAaron\n'
            '2\tplain\t"The ""A"" Team"\n',
            [
                ("1", "Aaron", 'Aaron ( or; "Ahärôn") is a prophet, "brother" of Moses'),
                ("2", 'The "A" Team', "plain"),
            ],
        ),
        # MS MARCO's collection.tsv
        (
            "collection.tsv",
            '0\tThe presence of "communication" was\r\n1\t"Quoted" first, then "this\n2\t"all of it"\n',
            [
                ("0", "", 'The presence of "communication" was'),
                ("1", "", '"Quoted" first, then "this'),
                ("2", "", '"all of it"'),
            ],
        ),
        # T2Ranking's collection.tsv has a header, and quotes are ordinary characters.
        (
            "t2.tsv",
            'pid\ttext\n0\t"open\n1\tan "open\n2\t"a" b\n',
            [("0", "", '"open'), ("1", "", 'an "open'), ("2", "", '"a" b')],
        ),
        # pandas quotes tabs and line ends.
        (
            "a.tsv",
            'text\ttitle\tid\n"a\tb\n\nc"\tT\t7\nd\tU\t8\n',
            [("7", "T", "a\tb\n\nc"), ("8", "U", "d")],
        ),
        ("a.csv", '\ufeffTitle,Text\r\nT,"a, ""b""\r\nc"\r\n', [("1", "T", 'a, "b"\r\nc')]),
        # MS MARCO v2: several passages are from one document.
        (
            "v2.jsonl",
            '{"pid": "p0", "passage": "a", "spans": "(0,1)", "docid": "d"}\n'
            '{"pid": "p1", "passage": "b", "docid": "d"}\n',
            [("p0", "", "a"), ("p1", "", "b")],
        ),
        (
            "a.jsonl",
            '\ufeff{"text": "a"}\r\n\r\n{"body": "b", "docid": null}\r\n',
            [("1", "", "a"), ("2", "", "b")],
        ),
        ("a.json", '[{"doc_id": 4, "Content": "a", "title": null}]', [("4", "", "a")]),
        ("a.json", '{"x": "a", "y": ""}', [("x", "", "a"), ("y", "", "")]),
        (
            "a.json",
            '{"x": {"text": "a", "title": "T"}, "y": {"contents": "\\"U\\"\\nb"}}',
            [("x", "T", "a"), ("y", "U", "b")],
        ),
        ("a.json", '{"data": [{"id": "x", "passage_text": "a"}]}', [("x", "", "a")]),
        ("a.json", '{"id": "x", "text": "a"}\n{"id": "y", "text": "b"}\n', [("x", "", "a"), ("y", "", "b")]),
        ("a.txt", "# no heading\nb", [("a.txt", "a", "# no heading\nb")]),
        ("a.md", "\n# The *Title* #\n\nText\n## Next\n", [("a.md", "The *Title*", "Text\n## Next\n")]),
        ("a.md", "Intro\r\n\r\n## Title\r\nText", [("a.md", "Title", "Intro\r\n\r\n## Title\r\nText")]),
        ("a.md", "```\n# a comment\n```\n#no heading", [("a.md", "a", "```\n# a comment\n```\n#no heading")]),
    ],
)
def test_read_corpus_accepts_public_layouts(tmp_path, name, content, expected, suffix):
    path = write(tmp_path / f"{name}{suffix}", content)
    expected = [(id.replace(name, path.name), title, text) for id, title, text in expected]
    assert documents(path) == expected


def test_read_corpus_loads_only_the_columns_of_parquet_that_it_needs(tmp_path):
    rows = [
        {"Id": 1.0, "Text": "a", "vector": [0.0] * 4},
        {"Id": float("nan"), "Text": "b", "vector": [0.0] * 4},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.PARQUET")
    assert documents(tmp_path / "a.PARQUET") == [("1", "", "a"), ("2", "", "b")]


def test_folder_of_text_files_is_read_in_the_order_of_paths(tmp_path):
    write(tmp_path / "b.txt", "bees")
    write(tmp_path / "a/x.md", "# Ants\ncrawl")
    write(tmp_path / "a/y.TXT.gz".replace(".TXT.gz", ".txt.gz"), "yaks")
    for name in (".git/config.md", "a/.hidden.txt", "photo.jpg"):
        write(tmp_path / name, "hidden")
    assert documents(tmp_path) == [
        ("a/x.md", "Ants", "crawl"),
        ("a/y.txt.gz", "y", "yaks"),
        ("b.txt", "b", "bees"),
    ]


def test_folder_of_shards_numbers_its_rows_across_files(tmp_path):
    write(tmp_path / "part-1.jsonl", [{"text": "c"}])
    write(tmp_path / "part-0.jsonl.gz", [{"text": "a"}, {"text": "b"}])
    write(tmp_path / "more/x.csv", "text\nd\n")
    write(tmp_path / "README.md", "# About")
    assert documents(tmp_path) == [("1", "", "d"), ("2", "", "a"), ("3", "", "b"), ("4", "", "c")]


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_beir_folder_is_its_corpus_file(tmp_path, name):
    write(tmp_path / name, [{"_id": "d", "title": "T", "text": "a"}])
    write(tmp_path / "queries.jsonl", [{"_id": "q", "text": "not a document"}])
    write(tmp_path / "qrels/test.tsv", "query-id\tcorpus-id\tscore\nq\td\t1\n")
    assert documents(tmp_path) == [("d", "T", "a")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "there is no corpus in .*it has no files of the types"),
        ({"a.pdf": "x"}, "there is no corpus in"),
        ({"queries.jsonl": "{}"}, r"there is no corpus .*corpus\.jsonl"),
        ({"a.jsonl": '{"text": "a"}', "b.txt": "b"}, r"both tables \(a\.jsonl\) and text files \(b\.txt\)"),
        ({"a.csv": "text\na\n", "a.csv.gz": "text\na\n"}, r"a\.csv is also there with \.gz"),
        ({"documents.arrow": "", "index.json": "{}"}, "is an index, not a corpus"),
        ({"a.jsonl": '{"text": "a"}', "b.jsonl": '{"text": "b", "id": "1"}'}, r"b\.jsonl:1: the id '1' is "),
        (
            {"a.jsonl": '{"text": "a", "id": 2}\n{"text": "b"}'},
            r"a\.jsonl:2: the id '2', which is the number of a row without an id, is a duplicate",
        ),
        ({"a.csv": "name;inhalt\nx;y\n"}, r"a\.csv:2: .*in the column text .*has the columns 'name;inhalt'"),
        ({"a.tsv": "1\tT\ta\n2\tU\tb\n"}, r"a\.tsv:2: .*in the column text .*has the columns '1', 'T', 'a'"),
        ({"a.tsv": 'id\ttext\n1\t"open" a\n2\n'}, r"a\.tsv:3: .*1 fields, .* quoted fields: line 2: "),
        ({"a.tsv": "id\ttext\n1\n"}, r"a\.tsv:2: .*1 fields, but the header has 2"),
        ({"a.tsv": "7\ta b\n8\tc\td\n"}, r"a\.tsv:2: .*3 fields"),
        ({"a.json": '{"x": 1}'}, r"a\.json must contain a list of JSON objects"),
        ({"a.json": '[{"text": "a"'}, r"a\.json is not valid JSON .*truncated"),
        ({"a.md": b"caf\xe9"}, r"a\.md:1: the file is not UTF-8: convert it"),
        ({"a.txt": "x\n".encode("utf-16")}, r"a\.txt:1: the file is not UTF-8"),
        ({"a.jsonl": b'{"text": "a"}\n' * 9999 + b'{"text": "\xe9"}'}, r"a\.jsonl:10000: the file is"),
        ({"a.tsv": b"id\ttext\n1\ta\n2\t\xff\n"}, r"a\.tsv:3: the file is not UTF-8"),
    ],
)  # fmt: skip
def test_read_corpus_names_the_problem(tmp_path, files, message):
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as error:
        list(read_corpus(str(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.tsv.gz", "a.json.gz", "a.txt.gz"])
def test_truncated_gzip_is_an_error(tmp_path, name):
    rows = [f'{{"text": "{i}"}}' if "json" in name else f"{i}" for i in range(5000)]
    content = f"[{', '.join(rows)}]" if name == "a.json.gz" else "\n".join(rows)
    path = write(tmp_path / name, content if "json" in name else f"text\n{content}")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"the gzip data are truncated or damaged"):
        list(read_corpus(str(path)))


def test_damaged_gzip_with_another_encoding_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", b'{"text": "a"}\n{"text": "\xe9"}\n')
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:2: the file is not UTF-8"):
        list(read_corpus(str(path)))


def test_uncompressed_file_with_gz_in_its_name_is_read(tmp_path):
    (tmp_path / "a.jsonl.gz").write_text('{"text": "a"}')  # e.g. decompressed by a browser
    assert documents(tmp_path / "a.jsonl.gz") == [("1", "", "a")]


def test_rows_are_not_loaded_into_memory(tmp_path):
    row = json.dumps({"text": "x" * 1000}) + "\n"
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(row for _ in range(20_000))
    tracemalloc.start()
    count = sum(1 for _ in read_corpus(str(tmp_path / "a.jsonl.gz")))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000 and peak < 2_000_000  # bytes; the texts have 20 million


def test_corpus_source_of_a_folder_changes_with_its_files(tmp_path):
    write(tmp_path / "a.txt", "a")
    sources = [corpus_source(str(tmp_path))]
    write(tmp_path / "sub/b.txt", "b")
    sources.append(corpus_source(str(tmp_path)))
    write(tmp_path / "a.txt", "aa")
    sources.append(corpus_source(str(tmp_path)))
    (tmp_path / "a.txt").rename(tmp_path / "c.txt")
    sources.append(corpus_source(str(tmp_path)))
    assert len({json.dumps(source) for source in sources}) == 4
    write(tmp_path / "photo.jpg", "not read")
    assert corpus_source(str(tmp_path)) == json.loads(json.dumps(sources[-1]))


def test_index_command_builds_an_index_inside_its_corpus(tmp_path, capsys):
    write(tmp_path / "a.md", "# Velmora\nThe company makes lamps.")
    write(tmp_path / "b.txt", "Rivers flow.")
    for _ in range(2):
        assert main([str(tmp_path), "-o", str(tmp_path / "index"), "--overwrite"]) == 0
        assert "2 documents" in capsys.readouterr().out
    (result,) = open_index(tmp_path / "index").search([Query("who makes lamps")], 1)
    assert result.documents == (Document("a.md", "Velmora", "The company makes lamps."),)


@given(st.lists(st.one_of(st.integers(0, 2000).map(str), st.sampled_from(["007", "x", "1.0", "٣"]))))
def test_id_set_reports_new_ids(names):
    ids, seen = IdSet(), set()
    for name in names:
        assert ids.add(name) == (name not in seen)
        seen.add(name)


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=8)


@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6))
def test_quoted_tsv_and_csv_are_read_as_written(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("corpus")
    for suffix, dialect in ((".csv", "excel"), (".tsv", "excel-tab")):
        with (folder / f"a{suffix}").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, dialect, quoting=csv.QUOTE_ALL)
            writer.writerows([("title", "text"), *rows])
        assert documents(folder / f"a{suffix}") == [
            (str(i), title, text) for i, (title, text) in enumerate(rows, 1)
        ]


LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\t\0"), min_size=1)


@given(lines=st.lists(LINE.filter(lambda line: line.strip()), min_size=1, max_size=6))
def test_tsv_without_header_is_read_literally(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("corpus") / "a.tsv"
    path.write_text("".join(f"p{i}\t{line}\n" for i, line in enumerate(lines)), encoding="utf-8", newline="")
    assert documents(path) == [(f"p{i}", "", line) for i, line in enumerate(lines)]


@given(
    row=st.dictionaries(
        st.sampled_from(["_id", "Id", "text", "TEXT", "contents", "body", "title", "other"]),
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers())
        ),
    )
)
def test_any_row_is_a_document_or_a_user_error_of_one_line(tmp_path_factory, row):
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_text(json.dumps(row))
    try:
        ((name, title, text),) = documents(path)
    except UserError as error:
        assert "a.jsonl:1: " in str(error) and "\n" not in str(error)
    else:
        assert name and title in ("", *row.values()) and any(text in str(value) for value in row.values())
