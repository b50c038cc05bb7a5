"""The corpora that a collection is made from: files, folders in BEIR's layout, generated worlds."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlkit.errors import UserError, first_line
from rlkit.retrieval.collections.world import World
from rlkit.retrieval.documents import Document, split_contents


def corpus_source(corpus: str) -> list[Any] | None:
    """What tells whether a corpus file has changed: its path, bytes and time. None for a generated world."""
    if corpus.startswith("world:"):
        return None
    path = _corpus_file(corpus)
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def read_corpus(corpus: str) -> Iterator[Document]:
    """Read documents from a file or a folder, or generate them.

    Args:
        corpus: a .jsonl, .parquet or .csv file with columns `_id` or `id`, `text` or `contents`, and if it
            has one `title`; a folder with such a `corpus.jsonl` (BEIR); or `world:SIZE:SEED`. `contents` as
            in Search-R1's Wikipedia, `"Title"`, line end, text, is taken apart.

    Raises:
        UserError: the corpus is empty or not there, a row is cut short or lacks a column, or an id repeats;
            it names the file and the line.
    """
    if (world := read_world(corpus)) is not None:
        yield from world.passages()
        return
    path = _corpus_file(corpus)
    ids: set[str] = set()
    for where, row in READERS[path.suffix.lower()](path):
        document = _to_document(row, where)
        if document.id in ids:
            raise UserError(f"{where}: the id {document.id!r} repeats; make the ids differ")
        ids.add(document.id)
        yield document
    if not ids:
        raise UserError(f"{path} has no documents")


def _corpus_file(corpus: str) -> Path:
    path = Path(corpus)
    if path.is_dir():
        path = path / "corpus.jsonl"
    if not path.is_file():
        raise UserError(
            f"there is no corpus {path}: give a file, a folder with corpus.jsonl, or world:SIZE:SEED"
        )
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path} is of a kind that is not read: give one of {', '.join(READERS)}")
    return path


def read_world(corpus: str) -> World | None:
    """The world that `world:SIZE:SEED` names; None for any other corpus.

    Raises:
        UserError: a world without size and seed.
    """
    if not corpus.startswith("world:"):
        return None
    try:
        size, seed = map(int, corpus.split(":")[1:])
    except ValueError:
        raise UserError(f"{corpus!r} is no world: write world:SIZE:SEED, for example world:10000:0") from None
    return World(seed=seed, size=size)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}:{number}: no whole line of JSON ({error}); is it cut short?"
                ) from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: the line must be an object with _id, title and text")
            yield f"{path}:{number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of more than 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            columns = next(reader, [])
            for row in reader:
                if row and len(row) != len(columns):
                    raise csv.Error(f"{len(row)} fields where the header has {len(columns)}")
                if row:
                    yield f"{path}:{reader.line_num}", dict(zip(columns, row, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{reader.line_num}: no whole row ({error}); is it cut short?") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        reason = first_line(error)
        raise UserError(f"{path}: cannot be read after row {number} ({reason}); is it cut short?") from None


READERS = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}


def _to_document(row: Mapping[str, Any], where: str) -> Document:
    """Check one row of a corpus."""
    name = row.get("_id", row.get("id"))
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise UserError(f"{where}: the row needs an _id (or id): a text or a whole number")
    title, text = row.get("title"), row.get("text")
    if text is None and isinstance(row.get("contents"), str):
        found, text = split_contents(row["contents"])
        title = found or title
    if not isinstance(text, str):
        raise UserError(f"{where}: the row needs a text (column text or contents); it may be empty")
    if not isinstance(title, str | None):
        raise UserError(f"{where}: the title must be a text")
    document = Document(str(name), title or "", text)
    try:
        f"{name}{title}{text}".encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: half of a surrogate pair; was the row cut within a character?") from None
    return document
