"""Change the vectors of documents by queries for them, when an index is built.

`fuse` moves the vector of a document toward those of its queries (xQG). `fit` trains the vectors of all
documents as the rows of a classifier of queries (DynamicRetriever, arXiv 2203.00537).
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlkit.errors import UserError
from rlkit.retrieval.store import DocumentStore, Progress, no_progress
from rlkit.retrieval.tables import content_digest, get_value, iterate_rows

COLUMNS = ("query", "document", "passages_are_queries")  # of the file of queries
ALPHA = 0.01  # of the paper, which sums 35 queries per document
FIT_STEPS, FIT_BATCH_SIZE, FIT_LEARNING_RATE = 100, 128, 1e-3
FIT_TEMPERATURE = 0.05  # of the cosine


class DocumentQueries(NamedTuple):
    """Queries for the documents of an index.

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

    def settings(self, **options: float) -> dict[str, Any]:
        """Return what `index.json` says about the queries and the options of their use."""
        return {
            "sha256": self.digest,
            **options,
            "queries": len(self.queries),
            "documents": len(np.unique(self.rows)),
            "duplicates": self.num_duplicates,
        }


def read_queries(path: str | Path, store: DocumentStore) -> DocumentQueries:
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
        if query is None or document is None:
            missing = "query" if query is None else "document"
            raise UserError(f"{location}: there is no {missing}; the columns must be query and document")
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
    return DocumentQueries(rows, [query for _, query in pairs], num_rows - len(pairs), digest)


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


def fit(
    documents: np.ndarray,
    queries: np.ndarray,
    written: DocumentQueries,
    normalize: bool,
    *,
    steps: int = FIT_STEPS,
    seed: int = 0,
    progress: Progress = no_progress,
) -> np.ndarray:
    """Return document vectors that are trained to be found by their queries, which stay as they are.

    The loss is the cross-entropy of softmax(W e_q / temperature) over all documents, the rows of W. Each
    query is trained toward one of its documents at a time, and its other documents are left out of the
    softmax. Documents without queries are only ever negatives, and move away from all queries.

    Args:
        documents: Initial vectors, (D, dimensions).
        queries: Vectors of the queries, (Q, dimensions).
        written: The queries themselves.
        normalize: Whether the vectors have length 1, also the returned ones. Otherwise the temperature is 1.
        steps: Number of steps of Adam, each of 128 queries.
        seed: Seed of the order of the queries.
        progress: Progress bar.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.functional import normalize as unit

    rows_of = defaultdict(list)
    for query, row in zip(written.queries, written.rows.tolist(), strict=True):
        rows_of[query].append(row)
    weights = torch.from_numpy(np.array(documents)).requires_grad_()
    optimizer = torch.optim.Adam([weights], FIT_LEARNING_RATE)
    query_vectors, targets = torch.from_numpy(queries), torch.from_numpy(written.rows)
    generator = torch.Generator().manual_seed(seed)
    for _ in progress(range(steps), "fit", steps):
        batch = torch.randint(len(targets), (FIT_BATCH_SIZE,), generator=generator)
        if normalize:
            scores = query_vectors[batch] @ unit(weights, dim=-1).T / FIT_TEMPERATURE
        else:
            scores = query_vectors[batch] @ weights.T
        is_other_answer = torch.zeros_like(scores, dtype=torch.bool)
        for i, query in enumerate(batch.tolist()):
            is_other_answer[i, rows_of[written.queries[query]]] = True
            is_other_answer[i, targets[query]] = False
        loss = cross_entropy(scores.masked_fill(is_other_answer, -torch.inf), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = weights.detach()
    return (unit(weights, dim=-1) if normalize else weights).numpy()
