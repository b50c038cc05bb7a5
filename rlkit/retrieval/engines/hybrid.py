"""Several engines as one, by reciprocal-rank fusion."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from rlkit.errors import UserError
from rlkit.retrieval.documents import Document, Query, Result, SearchEngine, check_k

DEPTH = 100  # documents that each engine gives, where fewer are asked for


class Hybrid:
    """Fuses rankings: a document's score is the sum of 1 / (k + rank) over the engines that found it.

    Ranks begin at 1; documents are the same when their ids are. Equal scores are in the order in which the
    documents are met: the first engine's best first. (Cormack, Clarke and Büttcher, SIGIR 2009.)

    Args:
        engines: one or more.
        k: how little the first ranks stand out.

    Raises:
        UserError: no engine, or a negative k.
    """

    def __init__(self, engines: Sequence[SearchEngine], k: int = 60):
        if not engines or k < 0:
            raise UserError(
                f"{len(engines)} engines and k={k}: Hybrid needs an engine or more, and k from 0 on"
            )
        self.engines = tuple(engines)
        self.k = k

    def search(self, queries: Sequence[Query], k: int) -> list[Result]:
        """Return at most k documents for each query, in order; an engine's error is the result's.

        Raises:
            EngineError: one of the engines cannot answer.
        """
        check_k(k)
        found = [engine.search(queries, max(k, DEPTH)) for engine in self.engines]
        return [self._fuse(results, k) for results in zip(*found, strict=True)]

    def _fuse(self, results: Sequence[Result], k: int) -> Result:
        if errors := [result.error for result in results if result.error is not None]:
            return Result(error=errors[0])
        documents: dict[str, Document] = {}
        shares: defaultdict[str, list[float]] = defaultdict(list)
        for result in results:
            # A ranking that has a document twice counts its better rank.
            ranking = {document.id: document for document in result.documents}
            for rank, (name, document) in enumerate(ranking.items(), 1):
                documents.setdefault(name, document)
                shares[name].append(1 / (self.k + rank))
        # fsum: the sum must not depend on the order of the engines, or equal documents would not tie.
        scores = {name: math.fsum(parts) for name, parts in shares.items()}
        best = sorted(scores, key=scores.__getitem__, reverse=True)[:k]
        return Result(tuple(documents[name] for name in best), tuple(scores[name] for name in best))
