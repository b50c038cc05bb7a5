"""Indexes are written whole or not at all, by hand or by the script, and open as what they are."""

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


def command(*arguments):
    return [sys.executable, "-m", "rlkit", "index", *map(str, arguments)]


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )


def found(engine, text):
    (result,) = engine.search([Query(text)], 3)
    return [document.id for document in result.documents]


def test_the_script_builds_and_says_what_is_wrong(tmp_path):
    corpus, out = write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "deep" / "index"
    built = run(corpus, "--out", out, "--k1", "1.2")
    assert built.returncode == 0, built.stderr
    assert f"3 documents: {out}" in built.stdout
    engine = open_index(out)
    assert isinstance(engine, BM25) and found(engine, "berta") == ["berta"]
    assert json.loads((out / "index.json").read_text())["settings"] == {"k1": 1.2, "b": 0.4}

    for arguments, said in [
        ((corpus, "--out", out), "exists: choose another folder"),
        ((tmp_path / "none.jsonl", "--out", tmp_path / "new"), "there is no corpus"),
        ((corpus, "--out", tmp_path / "new", "--model", "m"), "model is no setting of bm25"),
    ]:
        wrong = run(*arguments)
        assert wrong.returncode == 2
        assert wrong.stderr.count("\n") == 1 and said in wrong.stderr
    assert not (tmp_path / "new").exists()


def test_an_index_is_replaced_only_when_that_is_allowed(tmp_path):
    out = build_index(DOCUMENTS, tmp_path / "index")
    with pytest.raises(UserError, match="allow it to be replaced"):
        build_index(DOCUMENTS[:1], out)
    with pytest.raises(UserError, match="no documents"):
        build_index([], out, overwrite=True)
    assert len(open_index(out).documents) == 3  # a build that fails leaves the old one
    build_index(DOCUMENTS[:1], out, overwrite=True)
    assert len(open_index(out).documents) == 1
    assert os.listdir(tmp_path) == ["index"]


def test_what_is_no_index_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("work")
    for name in ("mine", "file"):
        with pytest.raises(UserError, match="exists and is no index"):
            build_index(DOCUMENTS, tmp_path / name, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert found(open_index(build_index(DOCUMENTS, tmp_path / "empty")), "anna") == ["anna"]


class KilledError(Exception):
    """Raised by a progress where a signal would end the process."""


def test_documents_of_a_killed_build_are_kept(tmp_path):
    def killed(items, name, total):
        if name == "words":
            raise KilledError
        return items

    source = ["corpus.jsonl", 10, 20]
    with pytest.raises(KilledError):
        build_index(DOCUMENTS, tmp_path / "index", source=source, progress=killed)
    assert not (tmp_path / "index").exists()
    with pytest.raises(UserError, match="is not finished"):
        open_index(tmp_path / "index.partial")
    out = build_index(iter(()), tmp_path / "index", source=source)  # documents are not read again
    assert found(open_index(out), "clara") == ["clara"]

    with pytest.raises(KilledError):
        build_index(DOCUMENTS, tmp_path / "other", source=source, progress=killed)
    out = build_index(DOCUMENTS[:2], tmp_path / "other", source=["corpus.jsonl", 11, 21])
    assert len(open_index(out).documents) == 2  # the corpus changed

    with pytest.raises(KilledError):
        build_index(DOCUMENTS, tmp_path / "third", source=source, progress=killed)
    table = tmp_path / "third.partial" / "documents.arrow"
    table.write_bytes(table.read_bytes()[:-9])
    out = build_index(DOCUMENTS, tmp_path / "third", source=source)  # damaged: read again
    assert len(open_index(out).documents) == 3


def test_a_build_killed_by_a_signal_leaves_nothing_that_opens(tmp_path):
    many = [Document(str(i), "", f"word{i} " * 20) for i in range(20_000)]
    corpus, out = write_corpus(tmp_path / "corpus.jsonl", many), tmp_path / "index"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command(corpus, "--out", out), env=environment, cwd=ROOT) as process:
        while not (tmp_path / "index.partial").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    with pytest.raises(UserError, match="is no index"):
        open_index(out)
    built = run(corpus, "--out", out)
    assert built.returncode == 0, built.stderr
    assert found(open_index(out), "word19999") == ["19999"]


def test_two_builds_of_one_index_do_not_mix(tmp_path):
    def meanwhile():
        yield DOCUMENTS[0]
        with pytest.raises(UserError, match="is being built by another process"):
            build_index(DOCUMENTS[1:], tmp_path / "index")
        yield DOCUMENTS[1]

    assert len(open_index(build_index(meanwhile(), tmp_path / "index")).documents) == 2


def test_an_index_can_be_moved(tmp_path):
    build_index(DOCUMENTS, tmp_path / "index").rename(tmp_path / "moved")
    assert found(open_index(tmp_path / "moved"), "anna") == ["anna"]


def test_folders_that_cannot_be_opened(tmp_path):
    for path in (tmp_path, tmp_path / "none", Path(__file__)):
        with pytest.raises(UserError, match=r"is no index: build one with `rlkit index`"):
            open_index(path)
    out = build_index(DOCUMENTS, tmp_path / "index")
    header = json.loads((out / "index.json").read_text())
    for change, said in [
        ({"format": 2}, "has format 2, this rlkit reads 1"),
        ({"engine": "bm26"}, "there is no engine 'bm26'.*bm25"),
    ]:
        (out / "index.json").write_text(json.dumps({**header, **change}))
        with pytest.raises(UserError, match=said):
            open_index(out)


def test_wrong_arguments(tmp_path):
    with pytest.raises(UserError, match="there is no engine 'bm52'"):
        build_index(DOCUMENTS, tmp_path / "index", "bm52")
    with pytest.raises(UserError, match=r"k2 is no setting of bm25.*k1"):
        build_index(DOCUMENTS, tmp_path / "index", k2=1.0)
    assert os.listdir(tmp_path) == []


def test_a_missing_package_is_named(tmp_path):
    out = build_index(DOCUMENTS, tmp_path / "index")
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
