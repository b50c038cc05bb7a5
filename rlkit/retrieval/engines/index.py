"""Build an index folder, whole or not at all, and open one by what its `index.json` says."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rlkit.errors import UserError, nearest
from rlkit.retrieval.cache import write_json
from rlkit.retrieval.documents import Document, SearchEngine
from rlkit.retrieval.store import HEADER, DocumentStore, Progress, read_header, silent, write_documents


class Kind(NamedTuple):
    """An engine that has an index: its module here, its class, its settings, and what it needs."""

    module: str
    engine: str
    settings: tuple[str, ...]
    modules: tuple[str, ...]
    packages: str


KINDS = {
    "bm25": Kind("bm25", "BM25", ("k1", "b"), ("bm25s", "Stemmer"), "bm25s PyStemmer"),
    "dense": Kind(
        "dense",
        "Dense",
        ("model", "query_prefix", "passage_prefix"),
        ("sentence_transformers", "faiss"),
        "sentence-transformers faiss-cpu",
    ),
}


def open_index(path: str | Path) -> SearchEngine:
    """Open an index folder.

    Raises:
        UserError: the folder is no index, unfinished, of another format or damaged, or a package is missing.
    """
    folder = Path(path)
    header = read_header(folder)
    if "engine" not in header:
        raise UserError(f"{folder} is not finished: run the same `rlkit index` again to continue it")
    kind = _kind(header["engine"])
    return getattr(_import(kind), kind.engine)(folder)


def build_index(
    documents: Iterable[Document],
    out: str | Path,
    engine: str = "bm25",
    *,
    overwrite: bool = False,
    source: list[Any] | None = None,
    progress: Progress = silent,
    **settings: str | float,
) -> Path:
    """Write the index folder of some documents and return its path.

    It is made in `OUT.partial` and renamed, so that `out` is whole. When a build was killed, the next one
    goes on with what is there: documents whose `source` is the same, and embeddings of the same documents.

    Args:
        documents: with ids that differ. They are not read where those of an interrupted build are kept.
        out: the folder.
        engine: "bm25" or "dense".
        overwrite: replace an index that is there.
        source: tells these documents from others (`rlkit.retrieval.collections.corpus.corpus_source`).
        progress: shows how far it is.
        settings: `k1` and `b` of BM25; `model`, `query_prefix` and `passage_prefix` of a dense index.

    Raises:
        UserError: arguments that do not fit, documents that cannot be indexed, a package that is missing, or
            another process that builds the same index.
    """
    kind, out = _kind(engine), Path(out).resolve()
    for name in settings.keys() - set(kind.settings):
        raise UserError(f"{name} is no setting of {engine}{nearest(name, kind.settings)}")
    _check_out(out, overwrite)
    builder = _import(kind).build
    with _partial_folder(out) as partial:
        _check_out(out, overwrite)  # another process may have made it since
        if source is None or not _has_documents(partial, source):
            write_documents(partial, progress(documents, "documents", None), source)
        used = builder(partial, progress, **settings)
        for other in KINDS.keys() - {engine}:
            shutil.rmtree(partial / other, ignore_errors=True)
        write_json(partial / HEADER, {**read_header(partial), "engine": engine, "settings": used})
        _put_in_place(partial, out)
    return out


def _kind(engine: str) -> Kind:
    if engine not in KINDS:
        raise UserError(f"there is no engine {engine!r}{nearest(str(engine), KINDS)}")
    return KINDS[engine]


def _import(kind: Kind) -> ModuleType:
    """The engine's module, when what it needs is installed."""
    if missing := [name for name in kind.modules if find_spec(name) is None]:
        raise UserError(f"{missing[0]} is not installed: pip install {kind.packages}")
    return import_module(f"rlkit.retrieval.engines.{kind.module}")


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / HEADER).exists():
        raise UserError(f"{out} exists and is no index: choose another folder")
    if not overwrite:
        raise UserError(f"{out} exists: choose another folder, or allow it to be replaced (--overwrite)")


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """The folder in which an index is made, locked against other processes."""
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out} is being built by another process: wait for it") from None
        yield partial
    finally:
        os.close(lock)


def _has_documents(partial: Path, source: list[Any]) -> bool:
    try:
        DocumentStore(partial)
        return read_header(partial)["source"] == source
    except (UserError, KeyError):
        return False


def _put_in_place(partial: Path, out: Path) -> None:
    old = out.with_name(f"{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
