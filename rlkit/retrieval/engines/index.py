"""Build index folders atomically, and open them with the engine that their `index.json` names."""

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
from rlkit.retrieval.store import HEADER, DocumentStore, Progress, no_progress, read_header, write_documents


class EngineSpec(NamedTuple):
    """How to import and configure an engine that searches an index.

    Attributes:
        module: Module in `rlkit.retrieval.engines`.
        class_name: Class of the engine in that module.
        settings: Names of the settings of an index.
        requirements: Top-level modules of the packages that it needs.
        packages: Those packages, as arguments of `pip install`.
    """

    module: str
    class_name: str
    settings: tuple[str, ...]
    requirements: tuple[str, ...]
    packages: str


ENGINES = {
    "bm25": EngineSpec("bm25", "BM25", ("k1", "b", "language"), ("bm25s", "Stemmer"), "bm25s PyStemmer"),
    "dense": EngineSpec(
        "dense",
        "Dense",
        (
            *("model", "query_prefix", "passage_prefix", "similarity", "approximate", "recall"),
            *("augment", "alpha", "train_queries", "train_epochs"),
        ),
        ("sentence_transformers", "faiss"),
        "sentence-transformers faiss-cpu",
    ),
}


def open_index(path: str | Path, **options: str) -> SearchEngine:
    """Open an index folder.

    Args:
        path: Folder of the index.
        **options: Keyword arguments of its engine.

    Raises:
        UserError: The folder is not a complete, undamaged index of a known format, or a package is missing.
    """
    folder = Path(path)
    header = read_header(folder)
    if "engine" not in header:
        raise UserError(f"the index {folder} is incomplete: run the same `rlkit index` command to resume it")
    spec = _engine_spec(header["engine"])
    return getattr(_import(spec), spec.class_name)(folder, **options)


def build_index(
    documents: Iterable[Document],
    out: str | Path,
    engine: str = "bm25",
    *,
    overwrite: bool = False,
    source: list[Any] | None = None,
    progress: Progress = no_progress,
    **settings: str | float | bool,
) -> Path:
    """Build the index of documents in a folder and return its path.

    The index is built in `OUT.partial` and renamed when it is complete, so `out` never holds half an index.
    After an interrupted build the next one resumes: it keeps the documents if `source` is the same, and
    the embeddings if documents and settings are.

    Args:
        documents: Documents with unique ids. They are not read if an interrupted build has stored them.
        out: Folder of the index.
        engine: "bm25" or "dense".
        overwrite: Whether to replace an existing index.
        source: Identity of the documents (`rlkit.retrieval.collections.corpus.corpus_source`); None never
            resumes.
        progress: Progress bar.
        **settings: Settings of the engine, see `build` in its module.

    Raises:
        UserError: An argument is invalid, the documents cannot be indexed, a package is missing, or another
            process is building the same index.
    """
    spec, out = _engine_spec(engine), Path(out).resolve()
    for name in settings.keys() - set(spec.settings):
        raise UserError(f"{name} is not a setting of {engine}{nearest(name, spec.settings)}")
    _check_out(out, overwrite)
    build = _import(spec).build
    with _partial_folder(out) as partial:
        _check_out(out, overwrite)  # another process may have finished it before this one took the lock
        if source is None or not _has_documents(partial, source):
            write_documents(partial, progress(documents, "documents", None), source)
        used_settings = build(partial, progress, **settings)
        # An interrupted build of another engine may have left its files.
        for name in ENGINES.keys() - {engine}:
            shutil.rmtree(partial / name, ignore_errors=True)
        header = {**read_header(partial), "engine": engine, "settings": used_settings}
        write_json(partial / HEADER, header)
        _replace_folder(partial, out)
    return out


def _engine_spec(engine: str) -> EngineSpec:
    if engine not in ENGINES:
        raise UserError(f"there is no engine {engine!r}{nearest(str(engine), ENGINES)}")
    return ENGINES[engine]


def _import(spec: EngineSpec) -> ModuleType:
    """Import the module of an engine; raises UserError if a package that it needs is not installed."""
    # Checked first, because a failing import may be deep inside another package.
    if missing := [name for name in spec.requirements if find_spec(name) is None]:
        raise UserError(f"{missing[0]} is not installed: pip install {spec.packages}")
    return import_module(f"rlkit.retrieval.engines.{spec.module}")


def _check_out(out: Path, overwrite: bool) -> None:
    """Raise UserError if the folder must not be replaced: never delete anything but an index."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / HEADER).exists():
        raise UserError(f"{out} exists and is not an index: choose another folder")
    if not overwrite:
        raise UserError(f"{out} exists: choose another folder, or replace the index with --overwrite")


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """Create and lock the folder `OUT.partial`; raises UserError if another process has locked it."""
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            # The kernel releases the lock when the process dies, so a killed build leaves no stale lock.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out} is being built by another process: wait for it to finish") from None
        yield partial
    finally:
        os.close(lock)


def _has_documents(partial: Path, source: list[Any]) -> bool:
    """Return whether an interrupted build has stored all documents of this source."""
    try:
        DocumentStore(partial)
        return read_header(partial)["source"] == source
    except (UserError, KeyError):
        return False


def _replace_folder(partial: Path, out: Path) -> None:
    # A rename cannot replace a folder that has files, so the old index moves aside first.
    old = out.with_name(f"{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
