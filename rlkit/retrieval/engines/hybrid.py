"""Reciprocal-rank fusion of several search engines."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from rlkit.errors import UserError
from rlkit.retrieval.documents import Query, Ranking, Result, SearchEngine, check_k, ranking_of, search_ids

RANK_CONSTANT = 60  # of the original paper
MIN_DEPTH = 100  # documents to retrieve from each engine, if k is smaller


class Hybrid:
    """Fuse the rankings of several engines by `fuse`. Documents with the same id are the same.

    Args:
        engines: Engines to fuse, at least one.
        k: Rank constant; the larger it is, the less the top ranks count.

    Raises:
        UserError: There are no engines, or `k` is negative.
    """

    def __init__(self, engines: Sequence[SearchEngine], k: int = RANK_CONSTANT):
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
        searched = [engine.search(queries, max(k, MIN_DEPTH)) for engine in self.engines]
        fused_results = []
        for results in zip(*searched, strict=True):
            ranking = self._fuse([ranking_of(result) for result in results], k)
            # Of the documents with the same id, the first engine's.
            documents = {d.id: d for result in reversed(results) for d in reversed(result.documents)}
            hits = tuple(documents[name] for name in ranking.ids)
            fused_results.append(Result(hits, ranking.scores, ranking.error))
        return fused_results

    def search_ids(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """Return the ids and the scores that `search` finds. Engines with an index do not read documents."""
        check_k(k)
        searched = [search_ids(engine, queries, max(k, MIN_DEPTH)) for engine in self.engines]
        return [self._fuse(rankings, k) for rankings in zip(*searched, strict=True)]

    def _fuse(self, rankings: Sequence[Ranking], k: int) -> Ranking:
        if errors := [ranking.error for ranking in rankings if ranking.error is not None]:
            return Ranking(error=errors[0])
        scores = fuse([ranking.ids for ranking in rankings], self.k)
        return Ranking(tuple(scores)[:k], tuple(scores.values())[:k])


def fuse(rankings: Iterable[Sequence[str]], k: int = RANK_CONSTANT) -> dict[str, float]:
    """Return the documents of several rankings by reciprocal-rank fusion, best first, with their scores.

    A document scores the sum of 1 / (k + rank) over the rankings, where ranks start at 1. Ties are in the
    order in which documents first occur, starting with the first ranking's best one (Cormack, Clarke and
    Büttcher, SIGIR 2009).

    Args:
        rankings: Document ids, best first. A document that a ranking repeats counts at its first rank.
        k: Rank constant; the larger it is, the less the top ranks count.
    """
    reciprocal_ranks: defaultdict[str, list[float]] = defaultdict(list)
    for ranking in rankings:
        for rank, name in enumerate(dict.fromkeys(ranking), 1):
            reciprocal_ranks[name].append(1 / (k + rank))
    # fsum rounds once, so that the sum does not depend on the order of the rankings and ties are exact.
    scores = {name: math.fsum(terms) for name, terms in reciprocal_ranks.items()}
    return dict(sorted(scores.items(), key=lambda item: item[1], reverse=True))
