"""Load folders in BEIR's layout, and in that of its copies on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from rlkit.encoding import encodable
from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection, canonical_split, check_judgments, drops_query_id
from rlkit.retrieval.collections.corpus import corpus_source, layout_files, read_corpus
from rlkit.retrieval.collections.files import read_qrels
from rlkit.retrieval.tables import get_value, iterate_rows

# File types of judgments, in the order of preference if a split has several.
QRELS_TYPES = (".tsv", ".txt", ".jsonl", ".csv", ".parquet")
_SHARD = re.compile(r"-\d+-of-\d+$")


def load_beir(folder: Path, qrels_file: Path | None = None) -> Collection:
    """Load a folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv.

    The files may be compressed with gzip, or be Parquet files, or folders of them. The judgments may also be
    in a folder next to this one with `-qrels` after its name, as on the Hub.

    Args:
        folder: Folder of the collection.
        qrels_file: One file of judgments to use as the test split; None loads all of them.

    Raises:
        UserError: A file is missing or invalid, or the judgments do not belong to the documents.
    """
    name = folder_name(folder)
    query_files = layout_files(folder, "queries")
    if not query_files:
        raise UserError(
            f"there is no file {folder / 'queries.jsonl'}; a folder needs the files of BEIR (corpus.jsonl, "
            "queries.jsonl, qrels/test.tsv) or of T2Ranking (collection.tsv, queries.dev.tsv, qrels.dev.tsv)"
        )
    queries = read_queries(query_files)
    notes: list[str] = []
    if qrels_file is None:
        files, notes = _find_qrels(folder)
    else:
        files = {"test": [qrels_file]}
        name = f"{name}/{_split_suffix(qrels_file)[0]}"
    qrels = {split: read_qrels(*paths) for split, paths in files.items()}
    documents = partial(read_corpus, str(folder))
    # This reads the corpus once, so that a malformed row is reported now and not during training.
    ids = (document.id for document in documents())
    qrels, missing = check_judgments(name, qrels, queries, ids)
    return Collection(
        name,
        documents,
        queries,
        qrels,
        drop_query_id=drops_query_id(folder_name(folder)),
        source=corpus_source(str(folder)),
        notes=[*notes, *missing],
    )


def folder_name(folder: Path) -> str:
    """Return the name of a dataset's folder, also of a snapshot in the cache of huggingface_hub."""
    path = Path(os.path.abspath(folder.expanduser()))  # `resolve` would follow symbolic links
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rpartition("--")[2]
    return path.name


def read_queries(paths: Iterable[Path]) -> dict[str, str]:
    """Return query texts by id from rows with `_id` (or `id`) and `text`.

    Raises:
        UserError: A row is invalid, or two queries have the same id and different texts.
    """
    queries: dict[str, str] = {}
    for path in paths:
        for location, row in iterate_rows(path):
            name, text = get_value(row, ("_id", "id", "query-id", "qid")), get_value(row, ("text", "query"))
            if isinstance(name, bool) or not isinstance(name, str | int) or not isinstance(text, str):
                raise UserError(f"{location}: a query needs an _id (string or integer) and a string in text")
            if encodable([str(name), text]) != [str(name), text]:
                raise UserError(f"{location}: the row has a lone surrogate; was it cut inside a character?")
            add_query(queries, str(name), text, location)
    return queries


def add_query(queries: dict[str, str], name: str, text: str, location: str) -> None:
    """Add a query; raises UserError if its id has another text already."""
    if queries.setdefault(name, text) != text:
        raise UserError(f"{location}: the id {name!r} is a duplicate with another text; make the ids unique")


def _find_qrels(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the files of judgments by split, and sentences on how they were chosen."""
    path = Path(os.path.abspath(folder))
    # The Hub stores the configuration "qrels" in a folder of this name, and the default one in `data`.
    folders = [path / "qrels", path / "data", path.with_name(f"{path.name}-qrels")]
    stems = next(filter(None, map(_qrels_files, folders)), {})
    if not stems:
        raise UserError(f"{folder / 'qrels'} has no train.tsv, dev.tsv or test.tsv")
    files: dict[str, list[Path]] = {}
    notes = []
    for stem, types in stems.items():
        split = canonical_split(stem)
        kind, *unread = sorted(types, key=QRELS_TYPES.index)
        # With both dev.tsv and validation.tsv, the second one keeps its own name.
        files[stem if split in stems or split in files else split] = types[kind]
        for other in unread:
            notes.append(f"{types[other][0].name} is not read, because there is also {types[kind][0].name}")
    if len(files) == 1 and files.keys().isdisjoint(("train", "dev", "test")):
        paths = next(iter(files.values()))
        notes.append(f"{paths[0].name}, its only file of judgments, is used as the test split")
        files = {"test": paths}
    return files, notes


def _qrels_files(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Return the files of judgments in a folder by their name without suffix, and by file type."""
    stems: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(folder.glob("*")):
        stem, suffix = _split_suffix(path)
        if suffix in QRELS_TYPES and path.is_file() and not path.name.startswith("."):
            stems.setdefault(stem, {}).setdefault(suffix, []).append(path)
    return stems


def _split_suffix(path: Path) -> tuple[str, str]:
    """Return the name of a file without its suffix, `.gz` and the number of its shard, and the suffix."""
    name = re.sub(r"\.gz$", "", path.name, flags=re.IGNORECASE)
    suffix = Path(name).suffix.lower()
    return _SHARD.sub("", name[: len(name) - len(suffix)]), suffix


def find_folder(qrels_file: Path) -> Path | None:
    """Return the folder in BEIR's layout that a file of judgments belongs to, or None."""
    path = Path(os.path.abspath(qrels_file))
    sibling = path.parent.with_name(path.parent.name.removesuffix("-qrels"))
    return next((parent for parent in (path.parent.parent, sibling) if layout_files(parent, "corpus")), None)
