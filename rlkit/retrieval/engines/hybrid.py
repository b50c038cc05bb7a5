"""Reciprocal-rank fusion of several search engines."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from rlkit.errors import UserError
from rlkit.retrieval.documents import Document, Query, Result, SearchEngine, check_k

MIN_DEPTH = 100  # documents to retrieve from each engine, if k is smaller


class Hybrid:
    """Fuse the rankings of several engines: a document scores the sum of 1 / (k + rank) over the engines.

    Ranks start at 1, and documents with the same id are the same. Ties are in the order in which documents
    first occur, starting with the first engine's best one (Cormack, Clarke and Büttcher, SIGIR 2009).

    Args:
        engines: Engines to fuse, at least one.
        k: Rank constant; the larger it is, the less the top ranks count.

    Raises:
        UserError: There are no engines, or `k` is negative.
    """

    def __init__(self, engines: Sequence[SearchEngine], k: int = 60):
        if not engines or k < 0:
            raise UserError(
                f"Hybrid needs at least one engine and a k of 0 or more, got {len(engines)} engines and k={k}"
            )
        self.engines = tuple(engines)
        self.k = k

    def search(self, queries: Sequence[Query], k: int) -> list[Result]:
        """Return at most `k` documents per query. If an engine fails for a query, the result has its error.

        Raises:
            EngineError: One of the engines cannot answer any query.
        """
        check_k(k)
        rankings = [engine.search(queries, max(k, MIN_DEPTH)) for engine in self.engines]
        return [self._fuse(results, k) for results in zip(*rankings, strict=True)]

    def _fuse(self, results: Sequence[Result], k: int) -> Result:
        if errors := [result.error for result in results if result.error is not None]:
            return Result(error=errors[0])
        documents: dict[str, Document] = {}
        reciprocal_ranks: defaultdict[str, list[float]] = defaultdict(list)
        for result in results:
            # A document that a ranking repeats counts at its first rank.
            ranking = {document.id: document for document in result.documents}
            for rank, (name, document) in enumerate(ranking.items(), 1):
                documents.setdefault(name, document)
                reciprocal_ranks[name].append(1 / (self.k + rank))
        # fsum rounds once, so that the sum does not depend on the order of the engines and ties are exact.
        scores = {name: math.fsum(terms) for name, terms in reciprocal_ranks.items()}
        best = sorted(scores, key=scores.__getitem__, reverse=True)[:k]
        return Result(tuple(documents[name] for name in best), tuple(scores[name] for name in best))
