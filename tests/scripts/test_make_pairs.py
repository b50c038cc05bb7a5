import contextlib
import io
import runpy
import subprocess
import sys
from unittest import mock

import pytest

from rlkit.commands.run import run_command
from rlkit.envs.ranking.pairs.graded import graded
from rlkit.envs.ranking.pairs.pages import Page, Section, write_pages
from rlkit.envs.ranking.pairs.rows import read_rows
from tests.envs.ranking.folders import write_beir

BODY = "The first sentence is here. The second sentence is there. A third sentence is everywhere."


MAIN = runpy.run_path("scripts/make_pairs.py")["main"]


def make_pairs(*arguments):
    """Run the script in this process, and return its exit code and output."""
    argv = ["make_pairs.py", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as error,
    ):
        code = run_command(MAIN)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), error.getvalue())


@pytest.fixture
def collection(tmp_path):
    """Collection of two linked pages, each of which one query is about."""
    folder = tmp_path / "collection"
    queries = {"q1": "the first page", "q2": "the second page"}
    qrels = {"train": {"q1": {"a": 2, "b": 0}}, "test": {"q2": {"b": 1}}}
    write_beir(folder, {"a": ("A", BODY), "b": ("B", BODY)}, queries, qrels)
    notes = Section("NOTES", ("Another passage of the page follows. It has two sentences.",))
    sections = (Section("DESCRIPTION", (BODY,)), notes)
    write_pages(folder, [Page("a", "A", sections, ("b",)), Page("b", "B", sections, ("a",))])
    return folder


def test_rows_of_several_sources_are_written_to_one_file(collection, tmp_path):
    out = tmp_path / "pairs.jsonl"
    result = make_pairs(
        collection, "--source", "ict", "bfs", "wlp", "judged", "--per_document", "2", "-o", out
    )
    assert result.returncode == 0, result.stderr
    rows = read_rows(out)
    numbers = {
        source: sum(row.source == source for row in rows) for source in ("ict", "bfs", "wlp", "judged")
    }
    assert numbers == {"ict": 4, "bfs": 4, "wlp": 4, "judged": 1}
    (judged,) = (row for row in rows if row.source == "judged")
    assert judged.query == "the first page" and judged.passages == (f"A: {BODY}",)
    assert judged.targets == (2.0,) and judged.document == "a" and judged.answers == ("a",)
    assert "bfs: 4 rows" in result.stdout and f"13 rows: {out}" in result.stdout


def test_documents_of_the_test_split_are_left_out(collection, tmp_path):
    out = tmp_path / "pairs.jsonl"
    result = make_pairs(collection, "--source", "ict", "--without_test_documents", "-o", out)
    assert result.returncode == 0, result.stderr
    assert {row.document for row in read_rows(out)} == {"a"}
    (collection / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq2\ta\t1\n")
    out = tmp_path / "judged.jsonl"
    result = make_pairs(collection, "--source", "ict", "judged", "--without_test_documents", "-o", out)
    assert "judged: no rows" in result.stdout and {row.document for row in read_rows(out)} == {"b"}
    (collection / "qrels" / "test.tsv").unlink()
    out = tmp_path / "without_split.jsonl"
    result = make_pairs(collection, "--source", "ict", "--without_test_documents", "-o", out)
    assert result.returncode == 2 and "has no test split: remove --without_test_documents" in result.stderr


def test_structure_is_read_if_the_collection_is_named_by_its_judgments(collection, tmp_path):
    out = tmp_path / "pairs.jsonl"
    result = make_pairs(collection / "qrels" / "test.tsv", "--source", "wlp", "-o", out)
    assert result.returncode == 0 and "wlp: 6 rows" in result.stdout, result.stderr


def test_documents_that_are_test_queries_are_left_out(tmp_path):
    documents = {name: f"{name} begins. {BODY}" for name in ("a", "b", "c")}
    qrels = {"test": {"a": {"b": 1}}}
    folder = write_beir(tmp_path / "arguana", documents, {"a": documents["a"]}, qrels)
    out = tmp_path / "pairs.jsonl"
    result = make_pairs(folder, "--source", "ict", "--without_test_documents", "-o", out)
    assert result.returncode == 0, result.stderr
    assert {row.document for row in read_rows(out)} == {"c"}


def test_word_sets_have_a_file_of_their_own(collection, tmp_path):
    out = tmp_path / "pairs.jsonl"
    result = make_pairs(collection, "--source", "prop", "--min_count", "1", "--per_document", "3", "-o", out)
    assert result.returncode == 0, result.stderr
    rows = read_rows(out)
    assert len(rows) == 6 and all(row.passages_are_queries for row in rows)
    result = make_pairs(collection, "--source", "prop", "ict", "-o", tmp_path / "both.jsonl")
    assert result.returncode == 2 and "need a file of their own" in result.stderr


def test_graded_rows_of_a_generated_collection(tmp_path):
    out = tmp_path / "pairs.jsonl"
    result = make_pairs("generated:200:3", "--source", "graded", "--seed", "5", "-o", out)
    assert result.returncode == 0, result.stderr
    assert "graded: 600 rows" in result.stdout and "600 documents" in result.stdout
    assert read_rows(out) == list(graded("generated:200:3", 5))


def test_graded_needs_a_generated_collection(collection, tmp_path):
    result = make_pairs(collection, "--source", "graded", "-o", tmp_path / "pairs.jsonl")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "needs a collection generated:SIZE:SEED" in result.stderr
    assert "scripts/write_pairs.py" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--source", "ict", "--per_document", "0"],
            "--per_document must be an integer of at least 1, not 0",
        ),
        (["--source", "bprop", "--temperature", "0"], "--temperature must be above 0, not 0.0"),
        (["--source", "bsf"], "unknown --source 'bsf' (choices: bfs"),
        ([], "--source"),
    ],
)
def test_invalid_options_are_one_line(collection, tmp_path, arguments, message):
    result = make_pairs(collection, *arguments, "-o", tmp_path / "pairs.jsonl")
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_collection_without_rows_is_an_error(tmp_path):
    documents = {"a": ("", "Too short."), "b": ("", "Short.")}
    folder = write_beir(tmp_path / "c", documents, {"q": "query"}, {"test": {"q": {"a": 1}}})
    result = make_pairs(folder, "--source", "ict", "-o", tmp_path / "pairs.jsonl")
    assert result.returncode == 2 and "gives no rows for ict" in result.stderr
