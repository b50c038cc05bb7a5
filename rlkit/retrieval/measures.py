"""IR measures computed by trec_eval (through pytrec_eval): nDCG, reciprocal rank, recall, precision, AP.

nDCG uses linear gain and a log2 discount. A ranking is a list of document ids, best first. `qrels` holds the
grades of each query; a document without a grade is not relevant.

Two traps of other evaluation code are avoided. A query without a ranking scores 0, so it cannot drop out of a
mean. The order of a ranking never depends on document ids, because its scores strictly decrease.
`rlkit.rewards.retrieval` implements the same measures for one ranking, for use in rewards.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice

_NAME = re.compile(r"(ndcg|recall|precision|rr|ap)(?:@([1-9][0-9]*))?")
_TREC_EVAL = {"ndcg": "ndcg", "recall": "recall", "precision": "P", "ap": "map", "rr": "recip_rank"}
_CUTOFF_OPTIONAL = ("ndcg", "ap", "rr")


class Evaluator:
    """Score rankings of one collection's queries.

    Args:
        qrels: Grades by query and document. A grade of 1 or more is relevant and is also the gain.
        measures: Names such as "ndcg@10", "recall@100", "precision@5", "rr@10", "ap". Without "@", a measure
            uses the whole ranking.
        min_grade: Minimum grade that counts as relevant for measures other than nDCG (TREC DL: 2).
        excluded: Document ids to remove from each query's ranking before scoring (BRIGHT).
        drop_query_id: Whether to remove the document whose id equals the query's (BEIR's ArguAna and Quora).

    Raises:
        ValueError: A measure is unknown.
    """

    def __init__(
        self,
        qrels: Mapping[str, Mapping[str, int]],
        measures: Sequence[str] = ("ndcg@10",),
        *,
        min_grade: int = 1,
        excluded: Mapping[str, Collection[str]] | None = None,
        drop_query_id: bool = False,
    ):
        import pytrec_eval

        self.names = {name: _trec_name(name) for name in measures}
        self.excluded = excluded or {}
        self.drop_query_id = drop_query_id
        # trec_eval has no cutoff for the reciprocal rank; `__call__` applies it.
        self._rr_cutoffs = {name: int(name[3:]) for name in measures if name.startswith("rr@")}
        # Documents below the largest cutoff cannot change a score, and passing them on costs time.
        cutoffs = [name.partition("@")[2] for name in measures]
        self._depth = max(map(int, cutoffs), default=0) if all(cutoffs) else None
        # A query without relevant documents scores 0 here. pytrec_eval hangs on some of those queries.
        self._answerable = {query for query, grades in qrels.items() if any(g > 0 for g in grades.values())}
        judgments = {query: dict(qrels[query]) for query in self._answerable}
        self._evaluator = pytrec_eval.RelevanceEvaluator(judgments, set(self.names.values()), min_grade)

    def __call__(self, query_id: str, ranking: Iterable[str]) -> dict[str, float]:
        """Return every measure of one ranking, in [0, 1]. A repeated document counts at its first rank."""
        excluded = self.excluded.get(query_id, ())
        if self.drop_query_id:
            excluded = {*excluded, query_id}
        run = descending_scores(ranking, excluded, self._depth)
        if not run or query_id not in self._answerable:
            return dict.fromkeys(self.names, 0.0)
        values = self._evaluator.evaluate({query_id: run})[query_id]
        # pytrec_eval is configured with "ndcg_cut.10", but returns "ndcg_cut_10".
        scores = {name: values[trec.replace(".", "_")] for name, trec in self.names.items()}
        for name, cutoff in self._rr_cutoffs.items():
            # RR is 1 / rank, so RR * cutoff < 1 means rank > cutoff. The tolerance is for rounding.
            if scores[name] * cutoff < 1 - 1e-9:
                scores[name] = 0.0
        return scores


def _trec_name(name: str) -> str:
    """Translate "ndcg@10" to trec_eval's "ndcg_cut.10"."""
    match = _NAME.fullmatch(name)
    if match is None or (match[2] is None and match[1] not in _CUTOFF_OPTIONAL):
        raise ValueError(
            f"there is no measure {name!r}; use ndcg@10, recall@9, precision@5, rr@10 or ap, with any cutoff"
        )
    kind, cutoff = match.groups()
    if kind == "rr" or cutoff is None:
        return _TREC_EVAL[kind]
    return f"{_TREC_EVAL[kind]}{'_cut' if kind in ('ndcg', 'ap') else ''}.{cutoff}"


def descending_scores(
    ranking: Iterable[str], excluded: Collection[str] = (), depth: int | None = None
) -> dict[str, float]:
    """Return strictly decreasing scores of a ranking's first `depth` documents (None: of all).

    Duplicates and excluded documents are dropped first. trec_eval ignores ranks: it sorts by score and breaks
    ties by document id, descending. Decreasing scores make it use the order of the ranking.
    """
    candidates = (document for document in dict.fromkeys(ranking) if document not in excluded)
    documents = list(islice(candidates, depth))
    return dict(zip(documents, map(float, range(len(documents), 0, -1)), strict=True))
