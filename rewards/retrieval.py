"""Rewards and metrics of a ranking: nDCG, reciprocal rank, recall, precision, average precision.

They are trec_eval's (by pytrec_eval): linear gain, log2 discount. A ranking is document ids, best first;
`qrels` has the grades of one query, and what is not in it is not relevant. Three things go wrong in other
code and cannot here: a query without a ranking scores 0 and is not left out of a mean; the order of a ranking
is never decided by ids, since scores are written strictly decreasing; exponential gain takes any id, no perl.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

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


def ndcg(ranking: Iterable[str], qrels: Mapping[str, int], k: int = 10, gain: str = "linear") -> float:
    """nDCG at k of one ranking, in [0, 1]; 0 where nothing is relevant.

    Args:
        ranking: document ids, best first; those that repeat count where they stand first.
        qrels: grades; below 1 is not relevant.
        k: the first documents, which count.
        gain: "linear", trec_eval's; or "exponential", 2 ** grade - 1.

    Raises:
        ValueError: another gain, or a k below 1.
    """
    if gain not in ("linear", "exponential") or k < 1:
        raise ValueError(f"gain is {gain!r} and k is {k}: take linear or exponential, and k from 1")
    gains = {d: g if gain == "linear" else 2**g - 1 for d, g in qrels.items() if g > 0}
    found = [gains.get(document, 0) for document in islice(dict.fromkeys(ranking), k)]
    return ndcg_of_gains(found, list(gains.values()), k)


def ndcg_of_gains(gains: Sequence[float], ideal: Iterable[float], k: int = 10) -> float:
    """nDCG at k of documents by their gains, best first, in [0, 1]; 0 where nothing is relevant.

    Args:
        gains: of the ranked documents; those below 0 count as 0.
        ideal: of all that could be ranked, in any order.
        k: the first ones, which count.
    """
    best = _discounted(sorted((gain for gain in ideal if gain > 0), reverse=True)[:k])
    return _discounted(gains[:k]) / best if best else 0.0


def _discounted(gains: Sequence[float]) -> float:
    return sum(max(gain, 0) / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


def measure(name: str, ranking: Iterable[str], qrels: Mapping[str, int], min_grade: int = 1) -> float:
    """One measure of one ranking, by `Evaluator`, which is faster for many queries.

    Raises:
        ValueError: an unknown measure.
    """
    return Evaluator({"query": qrels}, [name], min_grade=min_grade)("query", ranking)[name]


class Page(NamedTuple):
    """What one query of a search session gave: the documents shown, in order, and those that were read."""

    shown: Sequence[str]
    clicked: Collection[str]


def num(
    pages: Sequence[Page],
    grades: Mapping[str, int] | None = None,
    *,
    read: Mapping[str, float] | None = None,
    usual_read: float = 1000.0,
    snippet: float = 200.0,
    reform_cost: float = 200.0,
    patience: float = 132_000.0,
) -> float:
    """How soon a whole search session found what is relevant, against an ideal session, in [0, 1].

    The user reads along a trail, in characters: snippets down to the last click (all, where nothing is
    clicked), the text of each document at its first click, and `reform_cost` for each further query. A
    document's gain counts where its text ends, less by `position / patience` (U-measure)::

        NUM = U(session) / U(ideal),    U = sum of gain * max(0, 1 - position / patience)

    The ideal session has one query and shows what is relevant first, in the order with the highest sum. 0 if
    nothing is relevant. Our formula: that of NUM (arXiv 2401.12445), whose idea this is, could not be read.

    Args:
        pages: one for each query, in order.
        grades: relevance, which is the gain; None: 1 for what was clicked anywhere in the session.
        read: characters of a document that are read; `usual_read` where it says nothing.
        usual_read, snippet: characters.
        reform_cost: characters that writing another query costs.
        patience: characters after which nothing counts.

    Raises:
        ValueError: lengths that are not positive.
    """
    lengths = dict(read or {})
    if min(usual_read, snippet, patience, *lengths.values()) <= 0 or reform_cost < 0:
        raise ValueError("usual_read, snippet, patience and read must be positive, reform_cost not negative")
    if grades is None:
        grades = {document: 1 for page in pages for document in page.clicked}
    gains = {document: grade for document, grade in grades.items() if grade > 0}

    def length(document: str) -> float:
        return lengths.get(document, usual_read)

    def value(position: float) -> float:
        return max(0.0, 1 - position / patience)

    found, position, seen = 0.0, 0.0, set()
    for i, page in enumerate(pages):
        position += reform_cost if i else 0.0
        last = max((rank for rank, d in enumerate(page.shown) if d in page.clicked), default=len(page.shown))
        for document in page.shown[: last + 1]:
            position += snippet
            if document in page.clicked and document not in seen:
                seen.add(document)
                position += length(document)
                found += gains.get(document, 0) * value(position)
    ideal, position = 0.0, 0.0
    # Most gain for the characters first: no other order has a higher sum (Smith's rule).
    for document in sorted(gains, key=lambda d: gains[d] / (snippet + length(d)), reverse=True):
        position += snippet + length(document)
        ideal += gains[document] * value(position)
    return min(found / ideal, 1.0) if ideal else 0.0
