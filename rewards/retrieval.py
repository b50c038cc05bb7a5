"""Rewards and metrics of one ranking: nDCG, reciprocal rank, recall, precision, average precision.

They are trec_eval's: linear gain, log2 discount. A ranking is document ids, best first; `qrels` has the
grades of one query, and what is not in it is not relevant. A query without a ranking scores 0.
`rlkit.retrieval.measures` has the same measures by trec_eval itself, for evaluations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

_NAME = re.compile(r"(ndcg|recall|precision|rr|ap)(?:@([1-9][0-9]*))?")
_WITHOUT_CUT = ("ndcg", "ap", "rr")


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
    """One measure of one ranking, in [0, 1]; 0 where nothing is relevant.

    Args:
        name: "ndcg@10", "recall@100", "precision@5", "rr@10", "ap"; nDCG, RR and AP also without "@".
        ranking: document ids, best first; those that repeat count where they stand first.
        qrels: grades; below 1 is never relevant.
        min_grade: least grade that counts as relevant for the measures other than nDCG.

    Raises:
        ValueError: an unknown measure.
    """
    match = _NAME.fullmatch(name)
    if match is None or (match[2] is None and match[1] not in _WITHOUT_CUT):
        raise ValueError(
            f"there is no measure {name!r}: take ndcg@10, recall@9, precision@5, rr@10 or ap, with any number"
        )
    kind, cut = match[1], None if match[2] is None else int(match[2])
    ranked = list(islice(dict.fromkeys(ranking), cut))
    if kind == "ndcg":
        return ndcg(ranked, qrels, cut or max(len(qrels), len(ranked), 1))
    relevant = {document for document, grade in qrels.items() if grade >= max(min_grade, 1)}
    ranks = [rank for rank, document in enumerate(ranked, 1) if document in relevant]
    if not ranks:
        return 0.0
    if kind == "rr":
        return 1 / ranks[0]
    if kind == "precision" and cut is not None:
        return len(ranks) / cut
    if kind == "recall":
        return len(ranks) / len(relevant)
    return sum(found / rank for found, rank in enumerate(ranks, 1)) / len(relevant)


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
