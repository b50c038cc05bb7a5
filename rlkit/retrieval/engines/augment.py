"""Index-time fusion (xQG): the vector of a document moves toward those of queries for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlkit.errors import UserError
from rlkit.retrieval.store import DocumentStore
from rlkit.retrieval.tables import content_digest, get_value, iterate_rows

COLUMNS = ("query", "document", "passages_are_queries")  # of the file of queries
ALPHA = 0.01  # of the paper, which sums 35 queries per document


class Augmentation(NamedTuple):
    """The queries of an index's documents.

    Attributes:
        rows: Row of each query's document in the index, ascending, (Q,).
        queries: The queries, in alphabetical order for each document.
        num_duplicates: Number of rows of the file that repeat a query of the same document.
        digest: SHA-256 of the file's content.
    """

    rows: np.ndarray
    queries: list[str]
    num_duplicates: int
    digest: str

    def of_block(self, start: int, stop: int) -> tuple[list[str], np.ndarray]:
        """Return the queries of the rows from `start` to `stop`, and their rows relative to `start`."""
        first, last = np.searchsorted(self.rows, (start, stop))
        return self.queries[first:last], self.rows[first:last] - start

    def settings(self, alpha: float) -> dict[str, Any]:
        """Return what `index.json` says about the fusion."""
        return {
            "sha256": self.digest,
            "alpha": alpha,
            "queries": len(self.queries),
            "documents": len(np.unique(self.rows)),
            "duplicates": self.num_duplicates,
        }


def read_augmentation(path: str | Path, store: DocumentStore) -> Augmentation:
    """Read the queries of documents from the columns `query` and `document` (an id) of a table.

    Args:
        path: Path of a JSONL, JSON, CSV, TSV or Parquet file, such as a file of training pairs.
        store: Documents of the index.

    Raises:
        UserError: The file has no rows, a row is invalid, or its document is not in the index. The message
            names the file and the line.
    """
    path = Path(path).expanduser()
    digest = content_digest(path) if path.is_file() else ""  # iterate_rows raises if there is no file
    queries: dict[str, set[str]] = {}
    locations: dict[str, str] = {}
    num_rows = 0
    for location, values in iterate_rows(path, COLUMNS):
        query, document, is_reversed = (get_value(values, (name,)) for name in COLUMNS)
        if not isinstance(query, str) or not query.strip():
            raise UserError(f"{location}: query must be a non-empty string, not {query!r:.60}")
        if isinstance(document, bool) or not isinstance(document, str | int):
            raise UserError(f"{location}: document must be the id of a document, not {document!r:.60}")
        if str(is_reversed).lower() == "true":  # a string in CSV files
            raise UserError(
                f"{location}: query must not be a document: remove rows with passages_are_queries"
            )
        queries.setdefault(str(document), set()).add(query)
        locations.setdefault(str(document), location)
        num_rows += 1
    if not num_rows:
        raise UserError(f"{path} has no rows")
    row_of = {
        document: row for row, document in enumerate(store.ids(range(len(store)))) if document in queries
    }
    for document, location in locations.items():
        if document not in row_of:
            raise UserError(f"{location}: the document {document!r} is not in the corpus; remove the row")
    # Sorted, so that the order of the rows of the file does not matter.
    pairs = sorted((row, query) for document, row in row_of.items() for query in queries[document])
    rows = np.array([row for row, _ in pairs])
    return Augmentation(rows, [query for _, query in pairs], num_rows - len(pairs), digest)


def fuse(
    documents: np.ndarray, queries: np.ndarray, rows: np.ndarray, alpha: float, normalize: bool
) -> np.ndarray:
    """Return (1 - alpha) e_d + alpha * sum of e_q over the queries of each document d.

    A document without queries keeps its vector.

    Args:
        documents: Vectors e_d of the documents, (D, dimensions).
        queries: Vectors e_q of the queries, (Q, dimensions).
        rows: Row of each query's document in `documents`, (Q,).
        alpha: Weight of each query. With n queries, their sum weighs up to alpha * n.
        normalize: Whether to scale the fused vectors to length 1.
    """
    sums = np.zeros_like(documents)
    np.add.at(sums, rows, queries)
    changed = np.unique(rows)
    fused = (1 - alpha) * documents[changed] + alpha * sums[changed]
    if normalize:
        # The sum of opposite vectors is 0.
        fused /= np.maximum(np.linalg.norm(fused, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    result = documents.copy()
    result[changed] = fused
    return result
