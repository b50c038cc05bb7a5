"""Retrieve, then rerank: the first results of a search engine, in the order of a cross-encoder's scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rlkit.retrieval.cross_encoders import pair_scores
from rlkit.retrieval.documents import Query, Result, SearchEngine, check_k, passage_text

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

BATCH_SIZE = 64  # pairs per forward pass
BLOCK = 16  # queries whose pairs are sorted by length together, so that batches are full and little is padded


class Reranker:
    """Rerank the first documents of an engine; those below keep their order.

    The scores of documents that are not reranked continue below the lowest score of the cross-encoder in
    steps of 1, so that the scores of a result decrease.

    Args:
        engine: First stage.
        model: Cross-encoder (`rlkit.retrieval.cross_encoders.load_cross_encoder`).
        depth: Number of documents to rerank.
    """

    def __init__(self, engine: SearchEngine, model: CrossEncoder, depth: int):
        self.engine, self.model, self.depth = engine, model.eval(), depth

    def search(self, queries: Sequence[Query], k: int) -> list[Result]:
        """Return at most `k` documents per query. `depth` documents are reranked, even if `k` is smaller.

        If the first stage fails for a query, or its scores are not finite, the result has an error.

        Raises:
            EngineError: The first stage cannot answer any query.
        """
        check_k(k)
        results = self.engine.search(queries, max(k, self.depth))
        reranked: list[Result] = []
        for start in range(0, len(results), BLOCK):
            reranked += self._rerank(queries[start : start + BLOCK], results[start : start + BLOCK], k)
        return reranked

    def _rerank(self, queries: Sequence[Query], results: Sequence[Result], k: int) -> list[Result]:
        import torch

        candidates = [
            () if result.error is not None else result.documents[: self.depth] for result in results
        ]
        pairs = [
            (query.text, passage_text(document))
            for query, documents in zip(queries, candidates, strict=True)
            for document in documents
        ]
        if not pairs:
            return list(results)
        with torch.no_grad():
            all_scores = pair_scores(self.model, pairs, BATCH_SIZE).cpu().numpy()
        ends = np.cumsum([len(documents) for documents in candidates])
        scores_by_query = np.split(all_scores, ends[:-1])
        return [_reorder(result, scores, k) for result, scores in zip(results, scores_by_query, strict=True)]


def _reorder(result: Result, scores: np.ndarray, k: int) -> Result:
    """Return the first `k` documents of a result whose first documents have new scores."""
    if not len(scores):
        return result
    if not np.isfinite(scores).all():
        return Result(error="the cross-encoder returned NaN or infinite scores")
    order = np.argsort(-scores, kind="stable")  # ties keep the order of the first stage
    lower_documents = result.documents[len(scores) : k]
    lower_scores = scores.min() - np.arange(1, len(lower_documents) + 1)
    documents = (*(result.documents[i] for i in order), *lower_documents)[:k]
    return replace(result, documents=documents, scores=(*scores[order].tolist(), *lower_scores.tolist())[:k])
