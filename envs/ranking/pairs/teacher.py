"""Lists of candidates with the scores of a teacher as targets, for `rlkit rank --objective distillation`.

The candidates of a query are those of several retrievers, fused by reciprocal rank, and the document that the
query is written for. A cross-encoder scores them (listwise distillation, arXiv 2502.19712).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rlkit.envs.ranking.pairs.rows import PairRow
from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.cross_encoders import pair_scores
from rlkit.retrieval.documents import EngineError, passage_text
from rlkit.retrieval.engines.hybrid import fuse
from rlkit.retrieval.queries import documents_by_id
from rlkit.retrieval.retrievers import excluded_by_text, open_retriever, retrieve

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

PERCENTILES = (1, 99)  # of all scores, which become 0 and 1
BATCH_SIZE = 64  # pairs per forward pass
BLOCK = 16  # lists whose pairs are sorted by length together


def candidate_lists(
    rows: Sequence[PairRow],
    collection: Collection,
    retrievers: Sequence[str],
    *,
    depth: int = 100,
    length: int = 20,
) -> list[PairRow]:
    """Return the rows with the candidates of their queries as passages; targets are 1 for the source, else 0.

    Args:
        rows: Rows with a source document.
        collection: Collection of the documents.
        retrievers: Names of retrievers (`rlkit.retrieval.retrievers`), whose rankings are fused.
        depth: Number of documents of each ranking.
        length: Maximum number of candidates of a query.

    Raises:
        UserError: A row has no source document, or it is not in the collection, or a search fails.
    """
    if collection.document_of is not None:
        raise UserError(f"{collection.name} judges documents, not passages: a list needs passages with an id")
    queries = {row.id: row.query for row in rows}
    rankings: dict[str, list[list[str]]] = {row.id: [] for row in rows}
    for name in retrievers:
        try:
            ranked = retrieve(open_retriever(name, collection), collection, queries, depth)
        except EngineError as error:
            raise UserError(f"{name}: the search failed: {error}") from error
        for row_id, ranking in ranked.items():
            rankings[row_id].append(ranking)
    excluded = excluded_by_text(collection, queries.values())
    candidates = {}
    for row in rows:
        removed = excluded.get(row.query, frozenset())
        of_row = [[name for name in ranking if name not in removed] for ranking in rankings[row.id]]
        candidates[row.id] = candidate_ids(of_row, row.document, length)
    documents = documents_by_id(collection, (name for names in candidates.values() for name in names))
    # Documents without text cannot be scored.
    usable = {name for name, document in documents.items() if passage_text(document).strip()}
    lists = []
    for row in rows:
        if row.document not in usable:
            raise UserError(
                f"the row {row.id!r} needs a document of {collection.name} with text, not {row.document!r}: "
                "are the pairs from this collection?"
            )
        names = tuple(name for name in candidates[row.id] if name in usable)
        lists.append(
            replace(
                row,
                passages=tuple(passage_text(documents[name]) for name in names),
                targets=tuple(float(name == row.document) for name in names),
                passage_documents=names,
            )
        )
    return lists


def candidate_ids(rankings: Iterable[Sequence[str]], document: str, length: int) -> list[str]:
    """Return the first `length` documents of the fused rankings, the last one replaced by a missing source.

    Args:
        rankings: Document ids of each retriever, best first.
        document: Id of the source document.
        length: Maximum number of ids.
    """
    names = list(fuse(rankings))
    if document in names[:length]:
        return names[:length]
    return [*names[: length - 1], document]


def score_lists(lists: Sequence[PairRow], teacher: CrossEncoder) -> list[np.ndarray]:
    """Return the teacher's scores of the passages of each list.

    Raises:
        UserError: A score is not finite.
    """
    import torch

    teacher.eval()
    scores: list[np.ndarray] = []
    for start in range(0, len(lists), BLOCK):
        block = lists[start : start + BLOCK]
        pairs = [(row.query, passage) for row in block for passage in row.passages]
        with torch.no_grad():
            block_scores = pair_scores(teacher, pairs, BATCH_SIZE).cpu().numpy()
        scores += np.split(block_scores, np.cumsum([len(row.passages) for row in block])[:-1])
    if not all(np.isfinite(list_scores).all() for list_scores in scores):
        raise UserError("the teacher returned NaN or infinite scores")
    return scores


def normalize_scores(scores: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Map the 1st percentile of all scores to 0 and the 99th to 1, and clip.

    Outliers thus do not determine the scale. It is the same for all lists, so that a list without a good
    passage has low targets.

    Args:
        scores: Scores of each list.

    Raises:
        UserError: The percentiles are equal.
    """
    low, high = np.percentile(np.concatenate(scores), PERCENTILES)
    if low == high:
        raise UserError(f"the teacher scores nearly all passages alike ({low:g}): is it trained?")
    return [np.clip((list_scores - low) / (high - low), 0, 1) for list_scores in scores]


def with_targets(lists: Sequence[PairRow], targets: Sequence[np.ndarray]) -> list[PairRow]:
    """Return the lists with other targets, rounded to 6 digits."""
    return [
        replace(row, targets=tuple(np.round(row_targets.astype(float), 6).tolist()))
        for row, row_targets in zip(lists, targets, strict=True)
    ]


def teacher_ranks(lists: Sequence[PairRow], scores: Sequence[np.ndarray]) -> list[int]:
    """Return the teacher's rank of each list's source document, from 1. Ties count against it.

    Args:
        lists: Lists that contain their source document.
        scores: Scores of the passages of each list.
    """
    ranks = []
    for row, list_scores in zip(lists, scores, strict=True):
        source_score = list_scores[row.passage_documents.index(row.document)]
        ranks.append(int((list_scores >= source_score).sum()))
    return ranks
