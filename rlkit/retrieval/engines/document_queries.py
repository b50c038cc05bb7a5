"""Update document vectors with queries when an index is built.

`fuse` moves the vector of a document toward those of its queries (xQG). `train_vectors` trains the vectors as
the rows of a classifier of queries (DynamicRetriever, arXiv 2203.00537).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlkit.errors import UserError
from rlkit.retrieval.store import DocumentStore, Progress, no_progress
from rlkit.retrieval.tables import content_digest, get_value, iterate_rows

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = ("query", "document", "passages_are_queries")  # of the file of queries
ALPHA = 0.01  # of the paper, which sums 35 queries per document
# Hyperparameters of `train_vectors`, chosen on held-out training queries: three times the learning rate is
# better for MetaTool with judged queries, and worse for man pages with sentences.
EPOCHS, BATCH_SIZE, LEARNING_RATE, TEMPERATURE = 10, 128, 0.1, 0.05


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

    def settings(self, **options: object) -> dict[str, Any]:
        """Return what `index.json` says about the queries and the options they are used with."""
        return {
            "sha256": self.digest,
            **options,
            "queries": len(self.queries),
            "documents": len(np.unique(self.rows)),
            "duplicates": self.num_duplicates,
        }


def read_document_queries(path: str | Path, store: DocumentStore) -> DocumentQueries:
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
            raise UserError(f"{location}: there is no {missing}; each row needs query and document")
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


def train_vectors(
    documents: np.ndarray,
    query_vectors: np.ndarray,
    queries: DocumentQueries,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    progress: Progress = no_progress,
) -> tuple[np.ndarray, list[float]]:
    """Train document vectors to classify queries, with the query vectors frozen.

    The loss is the cross-entropy of softmax(cosine / 0.05) over all documents. If a query has several
    documents, one is the target and the others are masked out of the softmax. Documents without queries are
    only negatives; their vectors stay frozen, because they would move away from all queries.

    Args:
        documents: Initial unit vectors, (D, dimensions).
        query_vectors: Unit vectors of the queries, (Q, dimensions).
        queries: The queries and the rows of their documents.
        epochs: Number of passes over the queries.
        seed: Seed of the order of the queries.
        progress: Progress bar.

    Returns:
        The trained unit vectors, and the mean loss of each epoch.
    """
    import torch
    from torch.nn import functional

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows_by_query = defaultdict(list)
    for query, row in zip(queries.queries, queries.rows.tolist(), strict=True):
        rows_by_query[query].append(row)
    weights = torch.tensor(documents, device=device, requires_grad=True)
    inputs = torch.tensor(query_vectors, device=device)
    targets = torch.tensor(queries.rows, device=device)
    is_trained = torch.zeros(len(documents), 1, device=device)
    is_trained[targets] = 1
    weights.register_hook(lambda gradient: gradient * is_trained)
    # Adam would move a row by about the learning rate for any gradient, and so scatter the negatives, whose
    # gradients are tiny.
    optimizer = torch.optim.SGD([weights], LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in progress(range(epochs), "training", epochs):
        total = 0.0
        for batch in torch.randperm(len(targets), generator=generator).split(BATCH_SIZE):
            batch_targets = targets[batch.to(device)]
            scores = inputs[batch.to(device)] @ functional.normalize(weights, dim=-1).T / TEMPERATURE
            answers = [rows_by_query[queries.queries[i]] for i in batch.tolist()]
            scores = _mask_other_answers(scores, answers, batch_targets)
            # Not the mean, by which the queries of a short last batch would count more.
            loss = functional.cross_entropy(scores, batch_targets, reduction="sum") / BATCH_SIZE
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * BATCH_SIZE
        losses.append(total / len(targets))
    return functional.normalize(weights.detach(), dim=-1).cpu().numpy(), losses


def _mask_other_answers(scores: Tensor, answers: Sequence[Sequence[int]], targets: Tensor) -> Tensor:
    """Return the scores, (B, D), with -inf at the answers of each query that are not its target."""
    pairs = [
        (i, row)
        for i, (rows, target) in enumerate(zip(answers, targets.tolist(), strict=True))
        for row in rows
        if row != target
    ]
    if not pairs:
        return scores
    queries, rows = zip(*pairs, strict=True)
    mask = scores.new_zeros(scores.shape)
    mask[list(queries), list(rows)] = -float("inf")
    return scores + mask
