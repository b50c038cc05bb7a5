"""Score the rankings of a retriever or of a run file: `rlkit eval --collection NAME --retriever NAME`.

Every judged query of the split counts; a query without results scores 0. The result has the format of all
evaluations, so `rlkit eval --compare` can test two retrievers query by query.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.files import read_run
from rlkit.retrieval.documents import EngineError
from rlkit.retrieval.measures import Evaluator, descending_scores
from rlkit.retrieval.queries import judged_queries, open_collection
from rlkit.retrieval.retrievers import excluded_ids, open_retriever, retrieve

MEASURES = ("ndcg@10", "recall@100", "rr@10")
RUN_PREFIX = "run:"  # precedes the path of a run file


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
    """Rank the queries of a split and score the rankings.

    Args:
        collection: Name of the collection (`rlkit.retrieval.queries.open_collection`).
        retriever: Name of the retriever (`rlkit.retrieval.retrievers`), or "run:FILE" for rankings in TREC
            run format.
        split: Split of the queries.
        n: Maximum number of queries; None evaluates all.
        seed: Random seed of the order from which the first `n` queries are taken.
        measures: Names of measures (`rlkit.retrieval.measures.Evaluator`). The first one is the main metric.
        depth: Maximum number of documents in a ranking.
        folds: Number of cross-validation folds; None uses the collection's own splits.
        fold: Index of the fold to use as the test split.
        run_file: File to write the rankings to, in TREC run format.

    Returns:
        A dict with `queries` (texts by id), `rankings` (document ids by query) and `scores` (values by query
        and measure).

    Raises:
        UserError: A name is unknown, or the retriever fails.
    """
    opened = open_collection(collection, folds, fold)
    queries = {query.id: query.text for query in judged_queries(opened, split, n, seed)}
    if not queries:
        raise UserError(f"{opened.name} has no query with a relevant document in {split!r}")
    evaluate = _evaluator(opened, split, measures)  # rejects a misspelled measure before an index is built
    rankings = rank(opened, retriever, queries, depth)
    if run_file is not None:
        write_trec_run(run_file, rankings, retriever)
    return {
        "queries": queries,
        "rankings": rankings,
        "scores": {name: evaluate(name, rankings.get(name, ())) for name in queries},
    }


def score_rankings(
    collection: Collection,
    split: str,
    rankings: Mapping[str, Sequence[str]],
    measures: Sequence[str] = MEASURES,
) -> dict[str, dict[str, float]]:
    """Return the value of each measure for each query's ranking; raises UserError for an unknown measure."""
    evaluate = _evaluator(collection, split, measures)
    return {name: evaluate(name, ranking) for name, ranking in rankings.items()}


def rank(
    collection: Collection, retriever: str, queries: Mapping[str, str], depth: int
) -> dict[str, list[str]]:
    """Return rankings of judged document ids by query, from a retriever or from a run file.

    Raises:
        UserError: The retriever or the file cannot be opened, or a search fails.
    """
    if retriever.startswith(RUN_PREFIX):
        # Run files may rank passages and contain excluded documents, as the engines do.
        run = read_run(Path(retriever.removeprefix(RUN_PREFIX)).expanduser())
        return {name: _judged_ranking(collection, name, run.get(name, ()))[:depth] for name in queries}
    try:
        return retrieve(open_retriever(retriever, collection), collection, queries, depth)
    except EngineError as error:
        raise UserError(f"the search failed: {error}") from error


def _judged_ranking(collection: Collection, query: str, ranking: Sequence[str]) -> list[str]:
    """Map passages to judged documents (MaxP), and drop the excluded documents."""
    excluded = excluded_ids(collection, query)
    documents = dict.fromkeys(collection.judged_id(name) for name in ranking)
    return [name for name in documents if name not in excluded]


def _evaluator(
    collection: Collection, split: str, measures: Sequence[str]
) -> Callable[[str, Sequence[str]], dict[str, float]]:
    """Return a function that scores a query's ranking.

    nDCG uses the graded judgments; the other measures use the collection's binary ones if it has any (CRUMB).
    """
    judged = collection.judged(split)
    # A query without binary judgments keeps its graded ones.
    binary = {**judged, **collection.binary.get(split, {})}
    try:
        ndcg_evaluator = Evaluator(judged, [m for m in measures if m.startswith("ndcg")])
        binary_evaluator = Evaluator(
            binary,
            [m for m in measures if not m.startswith("ndcg")],
            min_grade=1 if collection.binary else max(collection.min_grades.values(), default=1),
        )
    except ValueError as error:
        raise UserError(str(error)) from None

    def evaluate(query: str, ranking: Sequence[str]) -> dict[str, float]:
        values = ndcg_evaluator(query, ranking) | binary_evaluator(query, ranking)
        return {name: values[name] for name in measures}

    return evaluate


def write_trec_run(path: Path, rankings: Mapping[str, Sequence[str]], tag: str) -> None:
    """Write rankings in TREC run format, `qid Q0 docid rank score tag`, with strictly decreasing scores.

    Raises:
        UserError: An id contains white space, or the file cannot be written.
    """
    tag = "_".join(tag.split())
    lines = []
    for query, ranking in rankings.items():
        for rank_, (document, score) in enumerate(descending_scores(ranking).items(), 1):
            if len(query.split()) != 1 or len(document.split()) != 1:
                raise UserError(
                    f"cannot write query {query!r} with document {document!r} to a TREC run: ids must not "
                    "be empty or contain white space"
                )
            lines.append(f"{query} Q0 {document} {rank_} {score:g} {tag}\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
