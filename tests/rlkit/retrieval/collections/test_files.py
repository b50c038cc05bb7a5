"""Judgments and run files in all their published formats, and the errors that name file and line."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.errors import UserError
from rlkit.retrieval.collections.files import read_qrels, read_run

JUDGED = {"q1": {"d1": 2, "7": 0}, "q2": {"d1": 1}}

FORMATS = {
    "BEIR": "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\t7\t0\nq2\td1\t1\n",
    "underscores": "query_id\tcorpus_id\tscore\nq1\td1\t2\nq1\t7\t0\nq2\td1\t1\n",
    "capitals and doc_id": "Query_ID\tDoc_ID\tRelevance\nq1\td1\t2\nq1\t7\t0\nq2\td1\t1\n",
    "another order": "score\tcorpus-id\tquery-id\n2\td1\tq1\n0\t7\tq1\n1\td1\tq2\n",
    "T2Ranking": "qid\t-\tpid\trel\nq1\t0\td1\t2\nq1\t0\t7\t0\nq2\t0\td1\t1\n",
    "T2Ranking with spaces": "qid - pid rel\nq1 0 d1 2\nq1 0 7 0\nq2 0 d1 1\n",
    "no header": "q1\td1\t2\nq1\t7\t0\nq2\td1\t1\n",
    "TREC": "q1 0 d1 2\nq1 Q0 7 0\n\n  q2\t0   d1 1\n",
    "TREC with tabs": "q1\t0\td1\t2\nq1\t0\t7\t0\nq2\t0\td1\t1\n",
    "comments": "# one\n# two\nq1 0 d1 2 # three\n#\nq1 0 7 0\n  # four\nq2 0 d1 1\n",
    "repeats": "q1 0 d1 2\nq1 0 d1 2\nq1 0 7 0\nq2 0 d1 1\nq1 0 7 0.0\n",
    "BOM and CRLF": "\ufeffquery-id\tcorpus-id\tscore\r\nq1\td1\t2.0\r\nq1\t7\t0\r\nq2\td1\t1\r\n",
    "quoted": 'query-id\tcorpus-id\tscore\n"q1"\t"d1"\t2\nq1\t7\t0\nq2\td1\t1\n',
}


@pytest.mark.parametrize("text", FORMATS.values(), ids=FORMATS)
def test_read_qrels_reads_published_formats(tmp_path, text):
    (tmp_path / "test.tsv").write_text(text, newline="")
    assert read_qrels(tmp_path / "test.tsv") == JUDGED
    (tmp_path / "test.tsv.gz").write_bytes(gzip.compress(text.encode()))
    assert read_qrels(tmp_path / "test.tsv.gz") == JUDGED


ROWS = [
    {"query-id": "q1", "corpus-id": "d1", "score": 2},
    {"query-id": "q1", "corpus-id": "7", "score": 0},
    {"query-id": "q2", "corpus-id": "d1", "score": 1},
]


def test_read_qrels_reads_tables(tmp_path):
    lines = "".join(f"{json.dumps(row)}\n" for row in ROWS).replace('"7"', "7")  # an integer id
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert read_qrels(tmp_path / "test.jsonl.gz") == JUDGED
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "test.parquet")
    assert read_qrels(tmp_path / "test.parquet") == JUDGED
    (tmp_path / "test.csv").write_text("query_id,corpus_id,score\nq1,d1,2\nq1,7,0\nq2,d1,1\n")
    assert read_qrels(tmp_path / "test.csv") == JUDGED


def test_read_qrels_lists_relevant_documents_without_grades(tmp_path):
    (tmp_path / "qrels.retrieval.dev.tsv").write_text("qid\tpid\n7\t1\n7\t3\n")
    assert read_qrels(tmp_path / "qrels.retrieval.dev.tsv") == {"7": {"1": 1, "3": 1}}


def test_read_qrels_splits_at_ascii_white_space_only_and_keeps_hash_in_id(tmp_path):
    (tmp_path / "qrels").write_text("301 0 CR#93E-1860 1\n301 0 a\u00a0b 2\n")
    assert read_qrels(tmp_path / "qrels") == {"301": {"CR#93E-1860": 1, "a\u00a0b": 2}}


HEADER = "query-id\tcorpus-id\tscore\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 0 a\n", "file:1: 3 fields, expected 'qid 0 docid grade'.*truncated"),
        ("1 0 a 1\n1 0 b\n", "file:2: 3 fields, expected 4; is it truncated"),
        ("1 0 a 1\n1 0 b 1 junk\n", "file:2: 5 fields"),
        (f"{HEADER}q1\td1\n", "file:2: 2 fields, expected 3; is it truncated"),
        (f"{HEADER}q1\td1\thigh\n", "file:2: the grade 'high' is not a number"),
        (f"{HEADER}q1\td1\t0.5\n", "file:2: the grade '0.5' is not an integer"),
        (f"{HEADER}q1\td1\tnan\n", "file:2: the grade 'nan' is not a number"),
        (f"{HEADER}q1\td1\t1e999\n", "file:2: the grade '1e999' is not a number"),
        (f"{HEADER}q1\td1\t1_0\n", "file:2: the grade '1_0' is not a number"),
        (f"{HEADER}q1\td1\t9223372036854775808\n", "file:2: the grade must have at most 64 bits, not 922"),
        ("q 0 d -1e30\n", "file:1: the grade must have at most 64 bits, not -1e30"),
        ("q 0 d 9007199254740992\nq 0 d 9007199254740993\n", "the grade 9007199254740993 for query 'q', but"),
        (
            "q 0 d 1\nq 0 e 1\nq 0 d 2\n",
            "file:3: document 'd' has the grade 2 for query 'q', but 1 in .*file:1; remove",
        ),
        ("query\tdoc\tfoo\nq\td\t1\n", "file:1: the header has no column for the grade"),
        (
            "user\titem\tstars\nq\td\t1\n",
            "file:1: the grade 'stars' is not a number; if the line is a header",
        ),
        ("", "file has no judgments; is it truncated"),
        ("# only a comment\n", "file has no judgments"),
    ],
)
def test_read_qrels_names_file_and_line_of_error(tmp_path, text, message):
    (tmp_path / "file").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_qrels(tmp_path / "file")
    assert "\n" not in str(error.value)


def test_read_qrels_rejects_row_without_ids(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"query-id": "q", "score": 1}\n')
    with pytest.raises(UserError, match=r"test\.jsonl:1: a judgment needs the columns query-id"):
        read_qrels(tmp_path / "test.jsonl")
    (tmp_path / "test.jsonl").write_text('{"query-id": "q", "corpus-id": "d", "score": true}\n')
    with pytest.raises(UserError, match=r"test\.jsonl:1: the grade True is not a number"):
        read_qrels(tmp_path / "test.jsonl")


IDS = st.text("abcXYZ019-_:./#", min_size=1).filter(lambda name: not name.startswith("#"))


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(IDS, st.dictionaries(IDS, st.integers(-2, 4), min_size=1), min_size=1))
def test_read_qrels_inverts_writing_in_both_formats(tmp_path_factory, qrels):
    path = tmp_path_factory.mktemp("qrels") / "test.tsv"
    rows = [(query, document, grade) for query, judged in qrels.items() for document, grade in judged.items()]
    path.write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t{g}\n" for q, d, g in rows))
    assert read_qrels(path) == qrels
    path.write_text("".join(f"{q} 0 {d} {g}\n" for q, d, g in rows))
    assert read_qrels(path) == qrels


def test_read_run_sorts_by_score_and_ignores_the_rest(tmp_path):
    path = tmp_path / "file"
    path.write_text("q Q0 b 1 2.0 x\nq Q0 a 2 7.5 x\nq Q0 c 3 2.0 x\n")
    # As in trec_eval, the rank column is ignored and ties are sorted by id, descending.
    assert read_run(path) == {"q": ["a", "c", "b"]}
    # trec_eval ignores what follows the first word of the tag, blank lines and comments.
    path.write_text("\n# made by X\nq\tQ0\tb\t1\t2.0\tmy long tag\n \t\n q Q0 a 2 7.5 x # best\r\n# end\n")
    assert read_run(path) == {"q": ["a", "b"]}
    (tmp_path / "file.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read_run(tmp_path / "file.gz") == {"q": ["a", "b"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q Q0 b 1 high x\n", "file:1: the score 'high' is not a number"),
        ("q Q0 b 1 nan x\n", "file:1: the score 'nan' is not a number"),
        ("q Q0 b 1 2.5\n", "file:1: 5 fields, expected 'qid Q0 docid rank score tag'; is it truncated"),
        (
            "q Q0 b 1 2 x\nq Q0 c 1 1 x\nq Q0 b 3 1 x\n",
            "file:3: document 'b' repeats in the ranking of query",
        ),
    ],
)
def test_read_run_names_file_and_line_of_error(tmp_path, text, message):
    (tmp_path / "file").write_text(text)
    with pytest.raises(UserError, match=message):
        read_run(tmp_path / "file")


def test_read_run_and_read_qrels_reject_missing_file(tmp_path):
    for read in (read_run, read_qrels):
        with pytest.raises(UserError, match=r"there is no file .*missing"):
            read(tmp_path / "missing")
