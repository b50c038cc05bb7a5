"""A collection of documents on disk, and the corpora that one is made from.

`documents.arrow` holds the columns id, title and text; it is memory-mapped and read by row number, so that a
collection of any size opens at once and processes share its pages. `index.json` beside it says what it is::

    {"format": 1, "documents": 1400, "fingerprint": "5a…", "source": […], "engine": "bm25", "settings": {…}}
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.search.engines import Document
from rlkit.errors import UserError

if TYPE_CHECKING:
    from envs.search.world import World

FORMAT = 1
HEADER = "index.json"
TABLE = "documents.arrow"
BATCH = 4096  # rows of a record batch; all but the last are full, so that a row's batch is known

Progress = Callable[[Iterable, str, int | None], Iterable]


def silent(items: Iterable, name: str, total: int | None) -> Iterable:
    """Show no progress; what shows it takes and returns the same: `rich.progress.track`, for example."""
    return items


def full_text(document: Document) -> str:
    """Title and text, as the engines read them."""
    return f"{document.title}\n{document.text}" if document.title else document.text


def check_k(k: int) -> None:
    """Raise a `UserError` unless at least one document is asked for."""
    if k < 1:
        raise UserError(f"{k} documents were asked for: ask for at least 1")


class Collection:
    """The documents of a folder by row number, not held in memory.

    Raises:
        UserError: the folder has no documents that can be read.
    """

    def __init__(self, folder: str | Path):
        import pyarrow

        folder = Path(folder)
        header = read_header(folder)
        try:
            reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / TABLE)))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, pyarrow.ArrowException) as error:
            raise damaged(folder, TABLE) from error
        self._columns = [batch.columns for batch in batches]
        self._rows = sum(batch.num_rows for batch in batches)
        if self._rows != header["documents"]:
            raise damaged(folder, TABLE)
        self.fingerprint: str = header["fingerprint"]

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> Document:
        """One document; a negative row is an IndexError, never a document from the end."""
        if not 0 <= row < self._rows:
            raise IndexError(row)
        batch, i = divmod(int(row), BATCH)
        return Document(*(column[i].as_py() for column in self._columns[batch]))

    def __iter__(self) -> Iterator[Document]:
        for columns in self._columns:
            yield from map(Document, *(column.to_pylist() for column in columns))


def damaged(folder: Path, part: str) -> UserError:
    """The error of an index that has lost a part."""
    return UserError(f"{folder / part} is missing or damaged: build the index again (scripts/build_index.py)")


def read_header(folder: Path) -> dict[str, Any]:
    """Read `index.json`.

    Raises:
        UserError: there is none, it is broken or of another format.
    """
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        version, _, _ = header["format"], header["documents"], header["fingerprint"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is no index: build one with scripts/build_index.py") from None
    except (ValueError, TypeError, KeyError):
        raise damaged(folder, HEADER) from None
    if version != FORMAT:
        raise UserError(f"{folder} has format {version}, this rlkit reads {FORMAT}: build the index again")
    return header


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(partial, path)


def write_documents(folder: Path, documents: Iterable[Document], source: list[Any] | None) -> None:
    """Write the documents, then the header with their number, their fingerprint and where they are from.

    Raises:
        UserError: there are none, or ids repeat.
    """
    import pyarrow

    (folder / HEADER).unlink(missing_ok=True)
    schema = pyarrow.schema([(name, pyarrow.large_string()) for name in ("id", "title", "text")])
    remaining, digest, rows = iter(documents), hashlib.sha256(), 0
    with pyarrow.OSFile(str(folder / TABLE), "wb") as file, pyarrow.ipc.new_file(file, schema) as writer:
        while batch := [(d.id, d.title, d.text) for d in islice(remaining, BATCH)]:
            columns = [pyarrow.array(column, pyarrow.large_string()) for column in zip(*batch, strict=True)]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))
            digest.update("".join(f"{json.dumps(row)}\n" for row in batch).encode())
            rows += len(batch)
    if not rows:
        raise UserError("there are no documents to index")
    ids = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / TABLE))).read_all()["id"]
    if repeated := rows - len(ids.unique()):
        raise UserError(f"{repeated} of {rows} documents have the id of another one: make the ids differ")
    header = {"format": FORMAT, "documents": rows, "fingerprint": digest.hexdigest(), "source": source}
    write_json(folder / HEADER, header)


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
    from envs.search.world import World

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
        reason = str(error).splitlines()[0]
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


def split_contents(contents: str) -> tuple[str, str]:
    r"""Title and text of `"Title"\ntext`, Search-R1's form; contents of another form are all text."""
    first, line_end, rest = contents.partition("\n")
    if line_end and len(first) >= 2 and first[0] == first[-1] == '"':
        return first[1:-1], rest
    return "", contents
