"""The documents of an index on disk.

`documents.arrow` holds the columns id, title and text; it is memory-mapped and read by row number, so that a
collection of any size opens at once and processes share its pages. `index.json` beside it says what it is::

    {"format": 1, "documents": 1400, "fingerprint": "5a…", "source": […], "engine": "bm25", "settings": {…}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rlkit.errors import UserError
from rlkit.retrieval.cache import write_json
from rlkit.retrieval.documents import Document

FORMAT = 1
HEADER = "index.json"
TABLE = "documents.arrow"
BATCH = 4096  # rows of a record batch; all but the last are full, so that a row's batch is known

Progress = Callable[[Iterable, str, int | None], Iterable]


def silent(items: Iterable, name: str, total: int | None) -> Iterable:
    """Show no progress; what shows it takes and returns the same: `rich.progress.track`, for example."""
    return items


class DocumentStore:
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
    return UserError(f"{folder / part} is missing or damaged: build the index again (`rlkit index`)")


def read_header(folder: Path) -> dict[str, Any]:
    """Read `index.json`.

    Raises:
        UserError: there is none, it is broken or of another format.
    """
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        version, _, _ = header["format"], header["documents"], header["fingerprint"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is no index: build one with `rlkit index`") from None
    except (ValueError, TypeError, KeyError):
        raise damaged(folder, HEADER) from None
    if version != FORMAT:
        raise UserError(f"{folder} has format {version}, this rlkit reads {FORMAT}: build the index again")
    return header


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
