"""Corpora from which an index is built: files, folders in BEIR's layout, and generated worlds."""

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
    """Return the path, size and modification time of a corpus file, which show whether it has changed.

    A generated world never changes; its source is None.
    """
    if corpus.startswith("world:"):
        return None
    path = _corpus_file(corpus)
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def read_corpus(corpus: str) -> Iterator[Document]:
    """Read documents from a file or a folder, or generate them.

    Args:
        corpus: A .jsonl, .parquet or .csv file with columns `_id` or `id`, `text` or `contents`, and
            optionally `title`; a folder with such a `corpus.jsonl` (BEIR); or `world:SIZE:SEED`. `contents`
            in the form of Search-R1's Wikipedia, `"Title"`, newline, text, is split into title and text.

    Raises:
        UserError: The corpus does not exist or is empty, a row is truncated or lacks a column, or an id
            repeats. The message names the file and the line.
    """
    if (world := parse_world(corpus)) is not None:
        yield from world.passages()
        return
    path = _corpus_file(corpus)
    ids: set[str] = set()
    for location, row in READERS[path.suffix.lower()](path):
        document = _to_document(row, location)
        if document.id in ids:
            raise UserError(f"{location}: the id {document.id!r} is a duplicate; make the ids unique")
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
            f"there is no corpus {path}; give a file, a folder with corpus.jsonl, or world:SIZE:SEED"
        )
    if path.suffix.lower() not in READERS:
        raise UserError(
            f"{path} has the unsupported file type {path.suffix!r}; use one of {', '.join(READERS)}"
        )
    return path


def parse_world(corpus: str) -> World | None:
    """Return the world that `world:SIZE:SEED` names, or None for any other corpus.

    Raises:
        UserError: The size or the seed is missing or not an integer.
    """
    if not corpus.startswith("world:"):
        return None
    try:
        size, seed = map(int, corpus.split(":")[1:])
    except ValueError:
        raise UserError(
            f"{corpus!r} is not a world: write world:SIZE:SEED, for example world:10000:0"
        ) from None
    return World(seed=seed, size=size)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the location (`FILE:LINE`) and the content of each row."""
    # Bytes, which json.loads decodes: invalid UTF-8 is then reported with its line.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}:{number}: the line is not valid JSON ({error}); is it truncated?"
                ) from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: the line must be an object with _id, title and text")
            yield f"{path}:{number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default raises on fields of more than 128 KiB
    # utf-8-sig skips the byte order mark that Excel writes. Without `strict`, an unclosed quote is accepted.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            columns = next(reader, [])
            for row in reader:
                if row and len(row) != len(columns):
                    raise csv.Error(f"{len(row)} fields, but the header has {len(columns)}")
                if row:
                    yield f"{path}:{reader.line_num}", dict(zip(columns, row, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{reader.line_num}: invalid row ({error}); is it truncated?") from None


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
        raise UserError(f"{path}: cannot be read after row {number} ({reason}); is it truncated?") from None


READERS = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}


def _to_document(row: Mapping[str, Any], location: str) -> Document:
    """Validate a row of a corpus and convert it to a document."""
    name = row.get("_id", row.get("id"))
    # In Python, True is an int.
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise UserError(f"{location}: the row needs a string or an integer in the column _id (or id)")
    title, text = row.get("title"), row.get("text")
    if text is None and isinstance(row.get("contents"), str):
        quoted_title, text = split_contents(row["contents"])
        title = quoted_title or title
    if not isinstance(text, str):
        raise UserError(
            f"{location}: the row needs a string in the column text (or contents); it may be empty"
        )
    if not isinstance(title, str | None):
        raise UserError(f"{location}: the title must be a string")
    document = Document(str(name), title or "", text)
    # Arrow stores UTF-8, which cannot encode lone surrogates; JSON escapes can contain them.
    try:
        f"{name}{title}{text}".encode()
    except UnicodeEncodeError:
        raise UserError(f"{location}: the row has a lone surrogate; was it cut inside a character?") from None
    return document
