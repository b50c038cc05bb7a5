"""`rlkit eval --collection NAME --retriever NAME`: how good the rankings of a retriever or a run file are.

Every judged query of the split counts, with 0 where nothing was found for it. The result has the form of all
evaluations, so `rlkit eval --compare` tests two of them, query by query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.files import read_run
from rlkit.retrieval.documents import EngineError
from rlkit.retrieval.measures import Evaluator, write_run
from rlkit.retrieval.queries import judged_queries, open_collection
from rlkit.retrieval.retrievers import left_out, open_retriever, retrieve

MEASURES = ("ndcg@10", "recall@100", "rr@10")
RUN = "run:"  # before the path of a run file


def evaluate_retriever(
    collection: str,
    retriever: str,
    *,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    measures: Sequence[str] = MEASURES,
    depth: int = 1000,
    folds: int | None = None,
    fold: int = 0,
    run_file: Path | None = None,
) -> dict[str, Any]:
    """Score the rankings of the queries of a split.

    Args:
        collection, folds, fold: see `rlkit.retrieval.queries.open_collection`.
        retriever: see `rlkit.retrieval.retrievers`, or "run:FILE", rankings in TREC's form.
        split, n, seed: which queries; n None: all of them.
        measures: see `rlkit.retrieval.measures.Evaluator`; the first one is the metric.
        depth: documents of a ranking.
        run_file: where to write the rankings in TREC's form.

    Returns `queries` (texts by id), `rankings` and `scores` (a dict of measures for each query).

    Raises:
        UserError: a name that does not exist, or a retriever that fails.
    """
    opened = open_collection(collection, folds, fold)
    asked = {one.id: one for one in judged_queries(opened, split, n, seed)}
    if not asked:
        raise UserError(f"{opened.name} has no query with a relevant document in {split!r}")
    evaluate = _evaluator(opened, split, measures)  # a wrong name is said before an index is built
    queries = {name: one.text for name, one in asked.items()}
    rankings = rank(opened, retriever, queries, depth)
    if run_file is not None:
        write_trec(run_file, rankings, retriever)
    return {
        "queries": queries,
        "rankings": rankings,
        "scores": {name: evaluate(name, rankings.get(name, ())) for name in queries},
    }


def score(
    collection: Collection,
    split: str,
    rankings: Mapping[str, Sequence[str]],
    measures: Sequence[str] = MEASURES,
) -> dict[str, dict[str, float]]:
    """Every measure of every ranking, by query; raises UserError for an unknown measure."""
    evaluate = _evaluator(collection, split, measures)
    return {name: evaluate(name, ranking) for name, ranking in rankings.items()}


def rank(
    collection: Collection, retriever: str, queries: Mapping[str, str], depth: int
) -> dict[str, list[str]]:
    """Rankings by query, of a retriever or of a file; raises UserError."""
    if retriever.startswith(RUN):
        read = read_run(Path(retriever.removeprefix(RUN)).expanduser())
        out = {name: left_out(collection, name) for name in queries}
        return {
            name: _judged(collection, (d for d in read.get(name, ())), out[name])[:depth] for name in queries
        }
    try:
        return retrieve(open_retriever(retriever, collection), collection, queries, depth)
    except EngineError as error:
        raise UserError(f"the search failed: {error}") from error


def _judged(collection: Collection, names: Iterable[str], out: frozenset[str]) -> list[str]:
    found = dict.fromkeys(collection.judged_id(name) for name in names)
    return [name for name in found if name not in out]


def _evaluator(
    collection: Collection, split: str, measures: Sequence[str]
) -> Callable[[str, Sequence[str]], dict[str, float]]:
    """Measures of a query, those but nDCG by the collection's binary judgments where it has some."""
    judged = collection.judged(split)
    binary = {**judged, **collection.binary.get(split, {})}
    try:
        graded = Evaluator(judged, [m for m in measures if m.startswith("ndcg")])
        other = Evaluator(
            binary,
            [m for m in measures if not m.startswith("ndcg")],
            min_grade=1 if collection.binary else collection.min_grade,
        )
    except ValueError as error:
        raise UserError(str(error)) from None

    def evaluate(query: str, ranking: Sequence[str]) -> dict[str, float]:
        found = graded(query, ranking) | other(query, ranking)
        return {name: found[name] for name in measures}

    return evaluate


def write_trec(path: Path, rankings: Mapping[str, Sequence[str]], tag: str) -> None:
    """Write rankings in TREC's form: `qid Q0 docid rank score tag`, scores strictly decreasing.

    Raises:
        UserError: an id has white space in it, or the file cannot be written.
    """
    lines = []
    for query, ranking in rankings.items():
        for rank_, (document, score) in enumerate(write_run(ranking).items(), 1):
            if len(query.split()) != 1 or len(document.split()) != 1:
                raise UserError(
                    f"the ids {query!r} and {document!r} cannot stand in a run: it has white space"
                )
            lines.append(f"{query} Q0 {document} {rank_} {score:g} {'_'.join(tag.split())}\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
