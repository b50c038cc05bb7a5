"""Rewards and metrics of one ranking: nDCG, RR, AP, recall, precision, hit rate, R-precision.

The definitions are trec_eval's: linear gain, log2 discount. A ranking is a sequence of document ids, best
first. `qrels` has the grades of one query; a document without a grade is not relevant. A query without a
ranking scores 0. For evaluations, `rlkit.retrieval.measures` computes the same measures by trec_eval itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

_NAME = re.compile(r"(ndcg|rr|ap|recall|precision|hit|rprec)(?:\(rel=([1-9][0-9]*)\))?(?:@([1-9][0-9]*))?")

_MAX_EXPONENT = 1000  # of an exponential gain that a float can represent


def ndcg(ranking: Iterable[str], qrels: Mapping[str, int], k: int = 10, gain: str = "linear") -> float:
    """Return the nDCG at k of one ranking, in [0, 1]; 0 if no document is relevant.

    Args:
        ranking: Document ids, best first; a repeated id counts at its first position.
        qrels: Grade of each judged document; a grade below 1 means not relevant.
        k: Number of ranks that count.
        gain: "linear", as in trec_eval, or "exponential", 2 ** grade - 1.

    Raises:
        ValueError: The gain is unknown, or k is below 1.
    """
    if gain not in ("linear", "exponential"):
        raise ValueError(f"there is no gain {gain!r}; use linear or exponential")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    gains: dict[str, float] = {document: grade for document, grade in qrels.items() if grade > 0}
    if gain == "exponential":
        largest = max(gains.values(), default=0)
        # 2 ** grade takes memory in proportion to the grade. Dividing all gains by the largest one changes no
        # nDCG, and next to a large gain the - 1 is below the precision of a float.
        for document, grade in gains.items():
            is_large = largest > _MAX_EXPONENT
            gains[document] = 2.0 ** max(grade - largest, -1074) if is_large else 2**grade - 1
    ranked_gains = [gains.get(document, 0) for document in islice(dict.fromkeys(ranking), k)]
    return ndcg_of_gains(ranked_gains, list(gains.values()), k)


def ndcg_of_gains(gains: Sequence[float], ideal: Iterable[float], k: int = 10) -> float:
    """Return the nDCG at k from the gains of a ranking, in [0, 1]; 0 if no document is relevant.

    Args:
        gains: Gains of the ranked documents, best rank first; a negative gain counts as 0.
        ideal: Gains of all documents that could be ranked, in any order.
        k: Number of ranks that count.
    """
    ideal_gains = sorted((gain for gain in ideal if gain > 0), reverse=True)[:k]
    if not ideal_gains:
        return 0.0
    return _dcg(gains[:k], ideal_gains[0]) / _dcg(ideal_gains, ideal_gains[0])


def _dcg(gains: Sequence[float], largest: float) -> float:
    """Return the DCG of gains that are divided by the largest one, because the sum of grades may overflow."""
    return sum(max(gain, 0) / largest / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


def measure(name: str, ranking: Iterable[str], qrels: Mapping[str, int], min_grade: int = 1) -> float:
    """Return a measure of one ranking, in [0, 1]; 0 if no document is relevant.

    Args:
        name: "ndcg@10", "recall@100", "precision@5", "hit@10", "rr@10", "ap" or "rprec"; nDCG, RR and AP need
            no cutoff. "rr(rel=2)@10" sets the minimum grade of a relevant document.
        ranking: Document ids, best first; a repeated id counts at its first position.
        qrels: Grade of each judged document; a grade below 1 means not relevant.
        min_grade: Minimum grade of a relevant document, for measures other than nDCG whose name has none.

    Raises:
        ValueError: The measure is unknown.
    """
    kind, level, cutoff = _parse_name(name)
    ranked = list(islice(dict.fromkeys(ranking), cutoff))
    if kind == "ndcg":
        # Without a cutoff all ranks count, also those that only the ideal ranking has.
        return ndcg(ranked, qrels, cutoff or max(len(qrels), len(ranked), 1))
    minimum = level or max(min_grade, 1)
    relevant = {document for document, grade in qrels.items() if grade >= minimum}
    if kind == "rprec":
        ranked = ranked[: len(relevant)]
    ranks = [rank for rank, document in enumerate(ranked, 1) if document in relevant]
    if not ranks:
        return 0.0
    if kind == "hit":
        return 1.0
    if kind == "rr":
        return 1 / ranks[0]
    if kind == "precision" and cutoff is not None:
        return len(ranks) / cutoff
    if kind in ("recall", "rprec"):
        return len(ranks) / len(relevant)
    return sum(num_hits / rank for num_hits, rank in enumerate(ranks, 1)) / len(relevant)


def _parse_name(name: str) -> tuple[str, int | None, int | None]:
    """Return the kind, the minimum grade and the cutoff of a measure; raises ValueError."""
    match = _NAME.fullmatch(name)
    kind, level, cutoff = match.groups() if match else ("", None, None)
    is_incomplete = kind in ("recall", "precision", "hit") and not cutoff
    is_meaningless = (kind == "rprec" and cutoff) or (kind == "ndcg" and level)
    if match is None or is_incomplete or is_meaningless:
        raise ValueError(
            f"there is no measure {name!r}; use ndcg@10, rr@10, ap, recall@100, precision@5, hit@10 or "
            "rprec, with any cutoff, or with a minimum relevant grade, such as rr(rel=2)@10"
        )
    return kind, int(level) if level else None, int(cutoff) if cutoff else None


class Page(NamedTuple):
    """Results of one query of a search session: the documents shown, in order, and those clicked."""

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
    """Return the U-measure of a search session, normalized by that of an ideal session, in [0, 1].

    The user reads along a trail that is measured in characters: snippets down to the last click (all snippets
    if there is no click), the text of each document at its first click, and `reform_cost` for each query
    after the first. A document's gain counts at the position where its text ends, with a linear discount::

        NUM = U(session) / U(ideal),    U = sum of gain * max(0, 1 - position / patience)

    The ideal session has one query and shows only relevant documents, in the order with the highest sum. The
    result is 0 if no document is relevant. The idea is NUM's (arXiv 2401.12445), but the formula is ours,
    because we could not obtain the paper's.

    Args:
        pages: Results of each query, in order.
        grades: Grade of each document, which is its gain; None means 1 for each clicked document.
        read: Number of characters that the user reads of each document.
        usual_read: Number of characters read of a document that is not in `read`.
        snippet: Number of characters of a snippet.
        reform_cost: Cost of writing another query, in characters.
        patience: Position, in characters, from which gains count nothing.

    Raises:
        ValueError: A length is not positive, or `reform_cost` is negative.
    """
    lengths = dict(read or {})
    if min(usual_read, snippet, patience, *lengths.values()) <= 0 or reform_cost < 0:
        raise ValueError(
            f"usual_read ({usual_read}), snippet ({snippet}), patience ({patience}) and the values of read "
            f"must be positive, and reform_cost ({reform_cost}) must not be negative"
        )
    if grades is None:
        grades = {document: 1 for page in pages for document in page.clicked}
    gains = {document: grade for document, grade in grades.items() if grade > 0}

    def length(document: str) -> float:
        return lengths.get(document, usual_read)

    def discount(position: float) -> float:
        return max(0.0, 1 - position / patience)

    utility, position = 0.0, 0.0
    already_read: set[str] = set()
    for i, page in enumerate(pages):
        position += reform_cost if i else 0.0
        last_click = max(
            (rank for rank, document in enumerate(page.shown) if document in page.clicked),
            default=len(page.shown),
        )
        for document in page.shown[: last_click + 1]:
            position += snippet
            if document in page.clicked and document not in already_read:
                already_read.add(document)
                position += length(document)
                utility += gains.get(document, 0) * discount(position)
    ideal_utility, position = 0.0, 0.0
    # Highest gain per character first: no other order has a higher sum (Smith's rule).
    for document in sorted(gains, key=lambda d: gains[d] / (snippet + length(d)), reverse=True):
        position += snippet + length(document)
        ideal_utility += gains[document] * discount(position)
    return min(utility / ideal_utility, 1.0) if ideal_utility else 0.0
