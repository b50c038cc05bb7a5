"""Index folders: built atomically by function or command, resumed, and opened with the right engine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlkit.errors import UserError
from rlkit.retrieval.documents import Document, Query
from rlkit.retrieval.engines.bm25 import BM25
from rlkit.retrieval.engines.index import build_index, open_index
from tests.quick import ROOT

DOCUMENTS = [Document(name, name.title(), f"text of {name}") for name in ("anna", "berta", "clara")]


def write_corpus(path, documents=DOCUMENTS):
    rows = [{"_id": d.id, "title": d.title, "text": d.text} for d in documents]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def index_command(*arguments):
    return [sys.executable, "-m", "rlkit", "index", *map(str, arguments)]


def run_index(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        index_command(*arguments), capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )


def search_ids(engine, text):
    (result,) = engine.search([Query(text)], 3)
    return [document.id for document in result.documents]


def test_command_builds_index_and_reports_errors(tmp_path):
    corpus, out = write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "deep" / "index"
    completed = run_index(corpus, "--out", out, "--k1", "1.2")
    assert completed.returncode == 0, completed.stderr
    assert f"3 documents: {out}" in completed.stdout
    engine = open_index(out)
    assert isinstance(engine, BM25) and search_ids(engine, "berta") == ["berta"]
    assert json.loads((out / "index.json").read_text())["settings"] == {
        "k1": 1.2,
        "b": 0.4,
        "language": "english",
    }

    for arguments, message in [
        ((corpus, "--out", out), "exists: choose another folder"),
        ((tmp_path / "none.jsonl", "--out", tmp_path / "new"), "there is no corpus"),
        ((corpus, "--out", tmp_path / "new", "--model", "m"), "model is not a setting of bm25"),
    ]:
        completed = run_index(*arguments)
        assert completed.returncode == 2
        assert completed.stderr.count("\n") == 1 and message in completed.stderr
    assert not (tmp_path / "new").exists()


def test_build_index_replaces_index_only_with_overwrite(tmp_path):
    out = build_index(DOCUMENTS, tmp_path / "index")
    with pytest.raises(UserError, match="replace the index with --overwrite"):
        build_index(DOCUMENTS[:1], out)
    with pytest.raises(UserError, match="no documents"):
        build_index([], out, overwrite=True)
    assert len(open_index(out).documents) == 3  # a failed build keeps the old index
    build_index(DOCUMENTS[:1], out, overwrite=True)
    assert len(open_index(out).documents) == 1
    assert os.listdir(tmp_path) == ["index"]


def test_build_index_never_replaces_other_files(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("work")
    for name in ("mine", "file"):
        with pytest.raises(UserError, match="exists and is not an index"):
            build_index(DOCUMENTS, tmp_path / name, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert search_ids(open_index(build_index(DOCUMENTS, tmp_path / "empty")), "anna") == ["anna"]


class InterruptedBuildError(Exception):
    """Raised by a progress bar to interrupt a build, as a signal would."""


def test_interrupted_build_keeps_documents(tmp_path):
    def interrupt(items, name, total):
        if name == "words":
            raise InterruptedBuildError
        return items

    source = ["corpus.jsonl", 10, 20]
    with pytest.raises(InterruptedBuildError):
        build_index(DOCUMENTS, tmp_path / "index", source=source, progress=interrupt)
    assert not (tmp_path / "index").exists()
    with pytest.raises(UserError, match="is incomplete"):
        open_index(tmp_path / "index.partial")
    out = build_index(iter(()), tmp_path / "index", source=source)  # documents are not read again
    assert search_ids(open_index(out), "clara") == ["clara"]

    with pytest.raises(InterruptedBuildError):
        build_index(DOCUMENTS, tmp_path / "changed", source=source, progress=interrupt)
    out = build_index(DOCUMENTS[:2], tmp_path / "changed", source=["corpus.jsonl", 11, 21])
    assert len(open_index(out).documents) == 2  # the source changed, so the stored documents are replaced

    with pytest.raises(InterruptedBuildError):
        build_index(DOCUMENTS, tmp_path / "damaged", source=source, progress=interrupt)
    table = tmp_path / "damaged.partial" / "documents.arrow"
    table.write_bytes(table.read_bytes()[:-9])
    out = build_index(DOCUMENTS, tmp_path / "damaged", source=source)  # read again, since they are damaged
    assert len(open_index(out).documents) == 3


def test_killed_build_leaves_no_index_and_resumes(tmp_path):
    documents = [Document(str(i), "", f"word{i} " * 20) for i in range(20_000)]
    corpus, out = write_corpus(tmp_path / "corpus.jsonl", documents), tmp_path / "index"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(index_command(corpus, "--out", out), env=environment, cwd=ROOT) as process:
        while not (tmp_path / "index.partial").exists():
            assert process.poll() is None
            time.sleep(0.01)
        # SIGKILL leaves no chance to clean up.
        process.send_signal(signal.SIGKILL)
    with pytest.raises(UserError, match="is not an index"):
        open_index(out)
    completed = run_index(corpus, "--out", out)
    assert completed.returncode == 0, completed.stderr
    assert search_ids(open_index(out), "word19999") == ["19999"]


def test_concurrent_build_of_same_index_raises(tmp_path):
    def build_concurrently():
        yield DOCUMENTS[0]
        with pytest.raises(UserError, match="is being built by another process"):
            build_index(DOCUMENTS[1:], tmp_path / "index")
        yield DOCUMENTS[1]

    assert len(open_index(build_index(build_concurrently(), tmp_path / "index")).documents) == 2


def test_index_folder_can_be_moved(tmp_path):
    build_index(DOCUMENTS, tmp_path / "index").rename(tmp_path / "moved")
    assert search_ids(open_index(tmp_path / "moved"), "anna") == ["anna"]


def test_open_index_rejects_invalid_folders(tmp_path):
    for path in (tmp_path, tmp_path / "none", Path(__file__)):
        with pytest.raises(UserError, match=r"is not an index: build one with `rlkit index`"):
            open_index(path)
    out = build_index(DOCUMENTS, tmp_path / "index")
    header = json.loads((out / "index.json").read_text())
    for change, message in [
        ({"format": 2}, "has index format 2, but this version of rlkit reads format 1"),
        ({"engine": "bm26"}, "there is no engine 'bm26'.*bm25"),
    ]:
        (out / "index.json").write_text(json.dumps({**header, **change}))
        with pytest.raises(UserError, match=message):
            open_index(out)


def test_build_index_rejects_unknown_engine_and_setting(tmp_path):
    with pytest.raises(UserError, match="there is no engine 'bm52'"):
        build_index(DOCUMENTS, tmp_path / "index", "bm52")
    with pytest.raises(UserError, match=r"k2 is not a setting of bm25.*k1"):
        build_index(DOCUMENTS, tmp_path / "index", k2=1.0)
    assert os.listdir(tmp_path) == []


def test_open_index_names_missing_package(tmp_path):
    out = build_index(DOCUMENTS, tmp_path / "index")
    # In another process: here, bm25s has been imported already.
    code = f"""
import sys
sys.modules["bm25s"] = None  # as if it were not installed
from rlkit.retrieval.engines.index import open_index
from rlkit.errors import UserError
try:
    open_index({str(out)!r})
except UserError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert "bm25s is not installed: pip install bm25s PyStemmer" in result.stdout, result.stderr
