import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest

from rlkit.envs.ranking.pairs.rows import PairRow, read_rows, write_rows
from rlkit.errors import UserError
from tests.envs.ranking.folders import write_beir
from tests.quick import ROOT

SCRIPT = ROOT / "scripts" / "filter_pairs.py"
TEXTS = {"d1": "red fox", "d2": "blue fox", "d3": "green tree"}


def pair(query, document, **fields):
    return PairRow(f"{query}/{document}", query, (TEXTS[document],), (1.0,), "test", document, **fields)


ROWS = [pair("fox red", "d1"), pair("fox", "d2"), pair("tree", "d3"), pair("tree", "d1"), pair("FOX", "d2")]


@pytest.fixture
def collection(monkeypatch, tmp_path):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    return write_beir(tmp_path / "small", TEXTS, {"q": "fox"}, {"test": {"q": {"d1": 1}}})


@pytest.fixture
def filter_rows(monkeypatch, collection, tmp_path):
    """Function that runs the script in this process and returns the queries and documents it writes."""
    spec = importlib.util.spec_from_file_location("filter_pairs", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(rows, *options):
        write_rows(tmp_path / "in.jsonl", rows)
        out = tmp_path / "out.jsonl"
        out.unlink(missing_ok=True)
        arguments = [collection, str(tmp_path / "in.jsonl"), *options, "-o", str(out)]
        monkeypatch.setattr(sys, "argv", ["filter_pairs.py", *arguments])
        assert script.main() == 0
        return [(row.query, row.document) for row in read_rows(out)]

    return run


def test_script_writes_the_rows_that_pass_the_round_trip(collection, tmp_path):
    write_rows(tmp_path / "in.jsonl", ROWS)
    out = tmp_path / "out.jsonl"
    command = [sys.executable, SCRIPT, collection, tmp_path / "in.jsonl", "--round_trip", "bm25", "-o", out]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert [row.id for row in read_rows(out)] == ["fox red/d1", "tree/d3"]
    assert process.stdout.splitlines() == [
        "duplicates: 5 -> 4 rows, 80.0%",
        "round_trip: 4 -> 2 rows, 50.0%",
        f"2 rows, 2 distinct queries; on average, the document has 50.0% of a query's word trigrams: {out}",
    ]


def test_filters_are_combined_in_a_fixed_order(filter_rows, capsys):
    options = ("--round_trip", "bm25", "--top", "2", "--max_words", "1", "--unique_queries")
    # Without its other row, "tree" for d3 would be unique: ambiguous queries are dropped first.
    assert filter_rows(ROWS, *options) == [("fox", "d2")]
    names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert names == ["duplicates", "unique_queries", "max_words", "round_trip"]


def test_filters_by_words_and_copies(filter_rows):
    assert filter_rows(ROWS, "--min_words", "2") == [("fox red", "d1")]
    assert filter_rows(ROWS, "--max_copied", "0.5") == [("fox red", "d1"), ("tree", "d1")]
    assert len(filter_rows(ROWS, "--max_copied", "1")) == 4


def test_filters_by_teacher(filter_rows):
    targets = [(0.9, 0.5), (0.4, 0.6), (0.1, 0.0)]
    rows = [
        PairRow(f"{i}", f"query {i}", ("p", "q"), pair_targets, "", "d1", ("d1", "d2"))
        for i, pair_targets in enumerate(targets)
    ]
    assert [query for query, _ in filter_rows(rows, "--teacher_first")] == ["query 0", "query 2"]
    assert [query for query, _ in filter_rows(rows, "--min_percentile", "50")] == ["query 0", "query 1"]
    assert [query for query, _ in filter_rows(rows, "--min_percentile", "50", "--teacher_first")] == [
        "query 0"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "there is no filter: set --round_trip"),
        (("--top", "2", "--teacher_first"), "--top has no effect without --round_trip"),
        (("--round_trip", "bm25", "--top", "0"), "--top must be an integer of at least 1, not 0"),
        (("--max_copied", "1.5"), "--max_copied must be from 0 to 1, not 1.5"),
        (("--min_percentile", "nan"), "--min_percentile must be from 0 to 100, not nan"),
        (("--min_words", "3", "--max_words", "2"), "--max_words must be at least --min_words, 3, not 2"),
        (("--min_words", "9"), "min_words removed the last 4 rows"),
        (("--round_trip", "bm52"), "there is no retriever 'bm52'"),
    ],
)
def test_invalid_options_and_empty_results_are_errors(filter_rows, options, message):
    with pytest.raises(UserError, match=message):
        filter_rows(ROWS, *options)


def test_sets_of_words_and_rows_without_a_document_are_refused(filter_rows):
    with pytest.raises(UserError, match="has sets of words as passages"):
        filter_rows([pair("red", "d1", passages_are_queries=True)], "--max_words", "3")
    with pytest.raises(UserError, match="row 'r' has no document"):
        filter_rows([PairRow("r", "red", ("red fox",), (1.0,))], "--round_trip", "bm25")


def test_rows_of_another_collection_are_refused(filter_rows):
    row = PairRow("r", "red", ("red fox",), (1.0,), "", "d9")
    for fields in ({"document": "d9"}, {"document": "", "answers": ("d1", "d9")}):
        with pytest.raises(UserError, match="lacks 1 of the documents that the rows name, such as 'd9'"):
            filter_rows([replace(row, **fields)], "--max_copied", "0.5")


def test_lists_that_name_no_document_have_no_copied_share(filter_rows, capsys):
    row = PairRow("r", "red fox", ("a", "b"), (0.0, 1.0))
    assert filter_rows([row], "--max_words", "2") == [("red fox", "")]
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 rows, 1 distinct queries: ")


def test_output_is_never_overwritten(collection, monkeypatch, tmp_path):
    path = tmp_path / "in.jsonl"
    write_rows(path, ROWS)
    result = subprocess.run(
        [sys.executable, SCRIPT, collection, path, "--max_words", "1", "-o", path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert f"{path} already exists: delete it, or use another -o" in result.stderr
    assert read_rows(path) == ROWS
