"""On-disk store of an index's documents.

`documents.arrow` has the columns id, title and text. It is memory-mapped and read by row number, so a
collection of any size opens at once and processes share its pages. `index.json` next to it describes it::

    {"format": 1, "documents": 1400, "fingerprint": "5a…", "source": […], "engine": "bm25", "settings": {…}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlkit.errors import UserError
from rlkit.retrieval.cache import write_json
from rlkit.retrieval.documents import Document, Ranking, Result

if TYPE_CHECKING:
    import pyarrow

FORMAT = 1
HEADER = "index.json"
TABLE = "documents.arrow"
BATCH = 4096  # rows of a record batch; all but the last one are full, so divmod finds the batch of a row

# (items, description, total) -> the same items: the signature of `rich.progress.track`.
Progress = Callable[[Iterable, str, int | None], Iterable]


def no_progress(items: Iterable, description: str, total: int | None) -> Iterable:
    """Return the items unchanged: a `Progress` that displays nothing."""
    return items


class DocumentStore:
    """Documents of an index folder by row number, read from a memory-mapped file.

    Raises:
        UserError: The folder has no documents, or they are damaged.
    """

    def __init__(self, folder: str | Path):
        import pyarrow

        folder = Path(folder)
        header = read_header(folder)
        try:
            reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / TABLE)))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, pyarrow.ArrowException) as error:
            raise damaged_index(folder, TABLE) from error
        self._num_rows = sum(batch.num_rows for batch in batches)
        if self._num_rows != header["documents"]:
            raise damaged_index(folder, TABLE)
        self._columns = [list(map(_Strings, batch.columns)) for batch in batches]
        self.fingerprint: str = header["fingerprint"]

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> Document:
        """Return the document of a row. A negative row raises IndexError: FAISS returns -1 for no hit."""
        if not 0 <= row < self._num_rows:
            raise IndexError(row)
        batch, i = divmod(int(row), BATCH)
        return Document(*(column[i] for column in self._columns[batch]))

    def result(self, rows: np.ndarray, scores: np.ndarray) -> Result:
        """Return the documents of these rows with their scores, both in the order of a ranking."""
        return Result(tuple(map(self.__getitem__, rows)), tuple(scores.tolist()))

    def ranking(self, rows: np.ndarray, scores: np.ndarray) -> Ranking:
        """Return the ids of these rows with their scores, without reading the documents."""
        return Ranking(tuple(self.ids(rows)), tuple(scores.tolist()))

    def __iter__(self) -> Iterator[Document]:
        return (self[row] for row in range(self._num_rows))

    def ids(self, rows: Iterable[int]) -> list[str]:
        """Return the ids of the documents of these rows, without reading their texts."""
        ids = []
        for row in map(int, rows):
            column, i = self._columns[row // BATCH][0], row % BATCH
            # Without a call of `_Strings.__getitem__`, which would take as long as the rest.
            ids.append(str(column.data[column.offsets[i] : column.offsets[i + 1]], "utf-8"))
        return ids


class _Strings:
    """Strings of an Arrow column by position, several times faster than Arrow's scalars.

    Unlike the columns' `take`, the time does not depend on how many batches the positions are spread over.
    """

    def __init__(self, column: pyarrow.LargeStringArray):
        _, offsets, data = column.buffers()
        self.offsets = memoryview(offsets).cast("q")[column.offset :]
        self.data = memoryview(data if data is not None else b"")  # None if all strings are empty

    def __getitem__(self, i: int) -> str:
        return str(self.data[self.offsets[i] : self.offsets[i + 1]], "utf-8")


def damaged_index(folder: Path, name: str) -> UserError:
    """Return the error for an index folder in which the file or folder `name` is missing or damaged."""
    return UserError(
        f"{folder / name} is missing or damaged: rebuild the index with `rlkit index --overwrite`"
    )


def read_header(folder: Path) -> dict[str, Any]:
    """Return the content of `index.json`.

    Raises:
        UserError: The file is missing or damaged, or has another format version.
    """
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        version, _, _ = header["format"], header["documents"], header["fingerprint"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not an index: build one with `rlkit index`") from None
    except (ValueError, TypeError, KeyError):
        raise damaged_index(folder, HEADER) from None
    if version != FORMAT:
        raise UserError(
            f"{folder} has index format {version}, but this version of rlkit reads format {FORMAT}: "
            "rebuild the index"
        )
    return header


def write_documents(folder: Path, documents: Iterable[Document], source: list[Any] | None) -> None:
    """Write the documents, then a header with their number, fingerprint and source.

    The header is removed first and written last, so an interrupted write leaves nothing that opens.

    Raises:
        UserError: There are no documents, or ids repeat.
    """
    import pyarrow

    (folder / HEADER).unlink(missing_ok=True)
    # The offsets of `large_string` have 64 bits; those of `string` would limit a batch to 2 GiB of text.
    schema = pyarrow.schema([(name, pyarrow.large_string()) for name in ("id", "title", "text")])
    remaining, digest, num_rows = iter(documents), hashlib.sha256(), 0
    with pyarrow.OSFile(str(folder / TABLE), "wb") as file, pyarrow.ipc.new_file(file, schema) as writer:
        while batch := [(d.id, d.title, d.text) for d in islice(remaining, BATCH)]:
            columns = [pyarrow.array(column, pyarrow.large_string()) for column in zip(*batch, strict=True)]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))
            digest.update("".join(f"{json.dumps(row)}\n" for row in batch).encode())
            num_rows += len(batch)
    if not num_rows:
        raise UserError("there are no documents to index")
    # Counted by Arrow in the file: a Python set of all ids would need several times their memory.
    ids = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / TABLE))).read_all()["id"]
    if duplicates := num_rows - len(ids.unique()):
        raise UserError(f"{duplicates} of {num_rows} documents have a duplicate id: make the ids unique")
    header = {"format": FORMAT, "documents": num_rows, "fingerprint": digest.hexdigest(), "source": source}
    write_json(folder / HEADER, header)
