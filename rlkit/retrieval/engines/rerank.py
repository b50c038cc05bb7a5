"""Retrieve, then rerank: the first results of a search engine, in the order of a cross-encoder's scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlkit.retrieval.cross_encoders import pair_scores
from rlkit.retrieval.documents import EngineError, Query, Result, SearchEngine, check_k, passage_text

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

BATCH_SIZE = 64  # pairs per forward pass


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

        Raises:
            EngineError: The first stage cannot answer any query, or the model returns NaN.
        """
        check_k(k)
        results = self.engine.search(queries, max(k, self.depth))
        return [self._rerank(query, result, k) for query, result in zip(queries, results, strict=True)]

    def _rerank(self, query: Query, result: Result, k: int) -> Result:
        import torch

        documents = result.documents[: self.depth]
        if result.error is not None or not documents:
            return result
        with torch.no_grad():
            pairs = [(query.text, passage_text(document)) for document in documents]
            scores = pair_scores(self.model, pairs, BATCH_SIZE).cpu().numpy()
        if not np.isfinite(scores).all():
            raise EngineError("the cross-encoder returned NaN or infinite scores")
        order = np.argsort(-scores, kind="stable")  # ties keep the order of the first stage
        lower_documents = result.documents[self.depth : max(k, self.depth)]
        lower_scores = scores.min() - np.arange(1, len(lower_documents) + 1)
        ranked = (*(documents[i] for i in order), *lower_documents)
        return Result(ranked[:k], tuple(np.concatenate([scores[order], lower_scores]).tolist())[:k])
