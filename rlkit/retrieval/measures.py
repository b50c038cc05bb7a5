"""IR measures computed by trec_eval (through pytrec_eval): nDCG, RR, AP, recall, precision, hit rate, R-prec.

nDCG uses linear gain and a log2 discount. A ranking is a list of document ids, best first. `qrels` holds the
grades of each query; a document without a grade is not relevant.

Three traps of other evaluation code are avoided. A query without a ranking scores 0, so it cannot drop out of
a mean. The order of a ranking never depends on document ids, because its scores strictly decrease. A large
grade does not allocate memory in proportion to its value.
`rlkit.rewards.retrieval` implements the same measures for one ranking, for use in rewards.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pytrec_eval

# Names in trec_eval, ir_measures, BEIR, MTEB, sentence-transformers and papers, without "-" and "_".
_KINDS = {
    "ndcg": "ndcg",
    "rr": "rr",
    "mrr": "rr",
    "reciprank": "rr",
    "reciprocalrank": "rr",
    "ap": "ap",
    "map": "ap",
    "averageprecision": "ap",
    "recall": "recall",
    "r": "recall",
    "precision": "precision",
    "prec": "precision",
    "p": "precision",
    "hit": "hit",
    "hits": "hit",
    "hr": "hit",
    "hitrate": "hit",
    "success": "hit",
    "accuracy": "hit",
    "rprec": "rprec",
    "rprecision": "rprec",
}
_NAME = re.compile(
    r"([a-z](?:[a-z_-]*?[a-z])?)(\(rel=[0-9]{1,18}\))?(?:(?:@|_at_|(?:_cut)?[_.])([0-9]{1,18}))?"
)
_TREC_EVAL = {
    "ndcg": "ndcg",
    "rr": "recip_rank",
    "ap": "map",
    "recall": "recall",
    "precision": "P",
    "hit": "success",
    "rprec": "Rprec",
}
_CUTOFF_REQUIRED = ("recall", "precision", "hit")
_VALID_NAMES = (
    "use ndcg@10, rr@10, ap, recall@100, precision@5, hit@10 or rprec, with any cutoff, or with a minimum "
    "relevant grade, such as rr(rel=2)@10"
)
_MAX_CUTOFF = 10**9  # trec_eval silently changes cutoffs that do not fit in 64 bits
# trec_eval allocates an array with an entry for each grade up to the maximum.
_MAX_TREC_EVAL_GRADE = 1000


class Measure(NamedTuple):
    """A measure, as `parse_measure` reads it from its name.

    Attributes:
        kind: "ndcg", "rr", "ap", "recall", "precision", "hit" or "rprec".
        min_grade: Minimum relevant grade; None if the name has none. nDCG uses all grades.
        cutoff: Number of ranks that count; None for the whole ranking.
    """

    kind: str
    min_grade: int | None
    cutoff: int | None

    @property
    def name(self) -> str:
        """The canonical name, such as "rr(rel=2)@10"."""
        level = "" if self.min_grade is None else f"(rel={self.min_grade})"
        return f"{self.kind}{level}{'' if self.cutoff is None else f'@{self.cutoff}'}"


def parse_measure(name: str) -> Measure:
    """Parse the name of a measure in any of the usual spellings, such as "nDCG@10" or "recip_rank".

    Raises:
        ValueError: There is no such measure, its cutoff is missing, or a number is out of range.
    """
    match = _NAME.fullmatch("".join(name.lower().split()))
    kind = _KINDS.get(re.sub("[_-]", "", match[1])) if match else None
    if match is None or kind is None:
        raise ValueError(f"there is no measure {name!r}{_suggest(name)}; {_VALID_NAMES}")
    min_grade = int(match[2][5:-1]) if match[2] else None
    cutoff = int(match[3]) if match[3] else None
    reason = ""
    if cutoff is None and kind in _CUTOFF_REQUIRED:
        reason = "it needs a cutoff"
    elif cutoff is not None and kind == "rprec":
        reason = "R-precision has no cutoff"
    elif cutoff is not None and not 1 <= cutoff <= _MAX_CUTOFF:
        reason = f"the cutoff must be from 1 to {_MAX_CUTOFF}"
    elif min_grade is not None and kind == "ndcg":
        reason = "nDCG uses all grades and has no minimum"
    elif min_grade == 0:
        reason = "the minimum relevant grade must be at least 1"
    if reason:
        raise ValueError(f"there is no measure {name!r}: {reason}{_suggest(name)}")
    return Measure(kind, min_grade, cutoff)


def canonical_measure(name: str) -> str:
    """Return rlkit's spelling of a measure: "ndcg@10" for "nDCG@10", "rr@10" for "MRR@10", "ap" for "map".

    Raises:
        ValueError: There is no such measure; the message has the nearest valid name.
    """
    return parse_measure(name).name


def _suggest(name: str) -> str:
    """Return ` (did you mean 'ndcg@10'?)` if a valid name is similar, else an empty string."""
    level = re.search(r"rel\D{0,3}([0-9]{1,18})", name)
    without_level = name.replace(level[0], "") if level else name
    numbers = re.findall("[0-9]{1,18}", without_level)
    letters = re.sub("[^a-z]", "", re.split("_at_|[^a-z_-]", name.strip().lower())[0].removesuffix("_cut_"))
    close = difflib.get_close_matches(letters, _KINDS, n=1, cutoff=0.7)
    if not close:
        return ""
    kind = _KINDS[close[0]]
    min_grade = max(int(level[1]), 1) if level and kind != "ndcg" else None
    cutoff = min(max(int(numbers[-1]), 1), _MAX_CUTOFF) if numbers else None
    if kind == "rprec":
        cutoff = None
    elif kind in _CUTOFF_REQUIRED:
        cutoff = cutoff or 10
    return f" (did you mean {Measure(kind, min_grade, cutoff).name!r}?)"


class Evaluator:
    """Score rankings of one collection's queries.

    Args:
        qrels: Grades by query and document. A grade of 1 or more is relevant and is also the gain.
        measures: Names such as "ndcg@10", "recall@100", "precision@5", "rr@10", "ap", in any spelling that
            `canonical_measure` knows. Without a cutoff, a measure uses the whole ranking.
        min_grade: Minimum grade that counts as relevant, for measures other than nDCG whose name has none.

    Raises:
        ValueError: A measure is unknown.
    """

    def __init__(
        self,
        qrels: Mapping[str, Mapping[str, int]],
        measures: Sequence[str] = ("ndcg@10",),
        *,
        min_grade: int = 1,
    ):
        parsed = {measure.name: measure for measure in map(parse_measure, measures)}
        self.names = list(parsed)
        # Documents below the largest cutoff cannot change a score, and passing them on costs time.
        cutoffs = [measure.cutoff for measure in parsed.values()]
        self._depth = max((c for c in cutoffs if c is not None), default=0) if None not in cutoffs else None
        by_level: dict[int | None, list[Measure]] = defaultdict(list)
        for measure in parsed.values():
            level = None if measure.kind == "ndcg" else measure.min_grade or max(min_grade, 1)
            by_level[level].append(measure)
        self._scorers = [_Scorer(qrels, group, level) for level, group in by_level.items()]

    def __call__(self, query_id: str, ranking: Iterable[str]) -> dict[str, float]:
        """Return every measure of one ranking by canonical name, in [0, 1].

        A repeated document counts at its first rank.
        """
        run = descending_scores(ranking, self._depth)
        scores: dict[str, float] = {}
        for scorer in self._scorers:
            scores |= scorer.score(query_id, run)
        return {name: scores[name] for name in self.names}


class _Scorer:
    """Score rankings by measures that have one minimum relevant grade, or by nDCG.

    Args:
        qrels: Grades by query and document.
        measures: Measures to compute.
        min_grade: Minimum relevant grade; None if the measures are nDCG, whose gains are the grades.
    """

    def __init__(
        self, qrels: Mapping[str, Mapping[str, int]], measures: Sequence[Measure], min_grade: int | None
    ):
        import pytrec_eval

        self._measures = {measure: _trec_name(measure) for measure in measures}
        self._large_gains: dict[str, dict[str, int]] = {}
        # A query without relevant documents scores 0 here. pytrec_eval hangs on some of those queries.
        judgments: dict[str, dict[str, int]] = {}
        for query, grades in qrels.items():
            if min_grade is None:
                gains = {document: grade for document, grade in grades.items() if grade > 0}
            else:
                gains = {document: 1 for document, grade in grades.items() if grade >= min_grade}
            if gains and max(gains.values()) <= _MAX_TREC_EVAL_GRADE:
                judgments[query] = gains
            elif gains:
                self._large_gains[query] = gains
        self._relevant_queries = judgments.keys()
        self._evaluator: pytrec_eval.RelevanceEvaluator = pytrec_eval.RelevanceEvaluator(
            judgments, set(self._measures.values())
        )

    def score(self, query: str, run: Mapping[str, float]) -> dict[str, float]:
        """Return every measure by name, of a run with strictly decreasing scores."""
        if gains := self._large_gains.get(query):
            return {measure.name: _ndcg(list(run), gains, measure.cutoff) for measure in self._measures}
        if not run or query not in self._relevant_queries:
            return {measure.name: 0.0 for measure in self._measures}
        values = self._evaluator.evaluate({query: run})[query]
        scores = {}
        for measure, trec_name in self._measures.items():
            # pytrec_eval is configured with "ndcg_cut.10", but returns "ndcg_cut_10".
            score = values[trec_name.replace(".", "_")]
            # trec_eval has no cutoff for the reciprocal rank. RR is 1 / rank, so RR * cutoff < 1 means
            # rank > cutoff. The tolerance is for rounding.
            if measure.kind == "rr" and measure.cutoff is not None and score * measure.cutoff < 1 - 1e-9:
                score = 0.0
            scores[measure.name] = score
        return scores


def _ndcg(ranking: Sequence[str], gains: Mapping[str, int], cutoff: int | None) -> float:
    """Return trec_eval's nDCG of a ranking. Its memory does not depend on the values of the gains."""
    largest = max(gains.values())
    # The quotient of two integers is exact to one rounding, where the sum of the gains might overflow.
    ranked = [gains.get(document, 0) / largest for document in ranking[:cutoff]]
    ideal = [gain / largest for gain in sorted(gains.values(), reverse=True)[:cutoff]]
    dcg, ideal_dcg = (
        sum(gain / math.log2(rank + 1) for rank, gain in enumerate(values, 1)) for values in (ranked, ideal)
    )
    return dcg / ideal_dcg


def _trec_name(measure: Measure) -> str:
    """Return trec_eval's name of a measure: "ndcg_cut.10" for "ndcg@10"."""
    name = _TREC_EVAL[measure.kind]
    if measure.cutoff is None or measure.kind == "rr":
        return name
    return f"{name}{'_cut' if measure.kind in ('ndcg', 'ap') else ''}.{measure.cutoff}"


def descending_scores(ranking: Iterable[str], depth: int | None = None) -> dict[str, float]:
    """Return strictly decreasing scores of a ranking's first `depth` documents (None: of all).

    Duplicates are dropped first. trec_eval ignores ranks: it sorts by score and breaks
    ties by document id, descending. Decreasing scores make it use the order of the ranking.
    """
    documents = list(islice(dict.fromkeys(ranking), depth))
    return dict(zip(documents, map(float, range(len(documents), 0, -1)), strict=True))
