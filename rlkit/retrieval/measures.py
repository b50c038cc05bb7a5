"""Measures of rankings by trec_eval (through pytrec_eval): nDCG, reciprocal rank, recall, precision, AP.

Linear gain, log2 discount. A ranking is document ids, best first; `qrels` has the grades of one query, and
what is not in it is not relevant. Two traps of other code are closed: a query without a ranking scores 0 and
is not left out of a mean, and the order of a ranking is never decided by ids, since scores are written
strictly decreasing. `rlkit.rewards.retrieval` has the same measures of a single ranking, for rewards.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice

_NAME = re.compile(r"(ndcg|recall|precision|rr|ap)(?:@([1-9][0-9]*))?")
_TREC_EVAL = {"ndcg": "ndcg", "recall": "recall", "precision": "P", "ap": "map", "rr": "recip_rank"}
_WITHOUT_CUT = ("ndcg", "ap", "rr")


class Evaluator:
    """Scores rankings of the queries of one collection.

    Args:
        qrels: grades of documents by query; from 1 on they are relevant, also for gain.
        measures: "ndcg@10", "recall@100", "precision@5", "rr@10", "ap"; without "@" the whole ranking.
        min_grade: least grade that counts as relevant for the measures other than nDCG (TREC DL: 2).
        excluded: ids of each query that are taken out of a ranking before it is scored (BRIGHT).
        drop_query_id: take out a document with the id of its query (BEIR's ArguAna and Quora).

    Raises:
        ValueError: an unknown measure.
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
        self._cuts = {name: int(name[3:]) for name in measures if name.startswith("rr@")}
        # What stands below every cut changes nothing, and takes time.
        cuts = [name.partition("@")[2] for name in measures]
        self._depth = max(map(int, cuts), default=0) if all(cuts) else None
        # Without a relevant document a query is 0 by every measure, of whatever the library makes of it.
        self._known = {query for query, grades in qrels.items() if any(g > 0 for g in grades.values())}
        kept = {query: dict(qrels[query]) for query in self._known}
        self._evaluator = pytrec_eval.RelevanceEvaluator(kept, set(self.names.values()), min_grade)

    def __call__(self, query_id: str, ranking: Iterable[str]) -> dict[str, float]:
        """Every measure of one ranking, in [0, 1]; documents that repeat count where they stand first."""
        out = self.excluded.get(query_id, ())
        if self.drop_query_id:
            out = {*out, query_id}
        run = write_run(ranking, out, self._depth)
        if not run or query_id not in self._known:
            return dict.fromkeys(self.names, 0.0)
        found = self._evaluator.evaluate({query_id: run})[query_id]
        scores = {name: found[trec.replace(".", "_")] for name, trec in self.names.items()}
        for name, cut in self._cuts.items():
            if scores[name] * cut < 1 - 1e-9:
                scores[name] = 0.0
        return scores


def _trec_name(name: str) -> str:
    match = _NAME.fullmatch(name)
    if match is None or (match[2] is None and match[1] not in _WITHOUT_CUT):
        raise ValueError(
            f"there is no measure {name!r}: take ndcg@10, recall@9, precision@5, rr@10 or ap, with any number"
        )
    kind, cut = match.groups()
    if kind == "rr" or cut is None:
        return _TREC_EVAL[kind]
    return f"{_TREC_EVAL[kind]}{'_cut' if kind in ('ndcg', 'ap') else ''}.{cut}"


def write_run(
    ranking: Iterable[str], excluded: Collection[str] = (), depth: int | None = None
) -> dict[str, float]:
    """Strictly decreasing scores of a ranking's documents, without repeats and without what is excluded.

    trec_eval ignores ranks: it sorts by score, and equal scores by id, descending. Only the first `depth` are
    kept; None keeps all.
    """
    kept = (document for document in dict.fromkeys(ranking) if document not in excluded)
    found = list(islice(kept, depth))
    return dict(zip(found, map(float, range(len(found), 0, -1)), strict=True))
