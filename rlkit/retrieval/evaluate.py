"""Score the rankings of retrievers or of run files: `rlkit eval --collection NAME --retriever NAME ...`.

Every judged query of the split counts, as with trec_eval's option -c: a query without results and a query
without relevant documents score 0. The result has the format of all evaluations, so that retrievers can be
tested query by query with `rlkit eval --compare`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlkit.errors import UserError
from rlkit.files import atomic_write
from rlkit.retrieval.collections.base import Collection, Qrels
from rlkit.retrieval.collections.files import read_qrels, read_run
from rlkit.retrieval.documents import EngineError
from rlkit.retrieval.measures import Evaluator, Measure, canonical_measure, descending_scores, parse_measure
from rlkit.retrieval.queries import judged_queries
from rlkit.retrieval.retrievers import has_own_documents, open_retriever, retrieve

MEASURES = ("ndcg@10", "recall@100", "rr@10")
RUN_PREFIX = "run:"  # precedes the path of a run file
MIN_OWN_ID_SHARE = 0.01  # of the rankings, from which first documents with the query's id are no coincidence


def open_qrels(
    path: Path, folds: int | None = None, fold: int = 0, drop_query_id: bool | None = None
) -> Collection:
    """Return a collection of judgments alone, for scoring run files. Without folds, its split is "test".

    Args:
        path: File of judgments (`rlkit.retrieval.collections.files.read_qrels`).
        folds: Number of cross-validation folds to split the queries into; None for none.
        fold: Index of the fold that is the test split.
        drop_query_id: Whether to remove the document whose id equals the query's from its ranking.

    Raises:
        UserError: The file cannot be read or is malformed, or a fold does not exist.
    """
    qrels = read_qrels(path)
    collection = Collection(
        path.name,
        lambda: iter(()),
        {query: query for query in qrels},  # the texts of the queries are unknown
        {"test": qrels},
        drop_query_id=bool(drop_query_id),
    )
    return collection if folds is None else collection.folds(folds, fold)


def canonical_retriever(name: str) -> str:
    """Return the name of a retriever, with the prefix "run:" if it is the path of a file but not "bm25"."""
    try:
        is_file = name != "bm25" and not name.startswith(RUN_PREFIX) and Path(name).expanduser().is_file()
    except OSError:  # a name that is too long for a path
        is_file = False
    return f"{RUN_PREFIX}{name}" if is_file else name


def canonical_measures(names: Iterable[str]) -> list[str]:
    """Return the canonical names of measures without repeats; a name may list several, separated by commas.

    Raises:
        UserError: A measure is unknown.
    """
    try:
        return list(dict.fromkeys(canonical_measure(part) for name in names for part in name.split(",")))
    except ValueError as error:
        raise UserError(str(error)) from None


def evaluate_retriever(
    collection: Collection,
    retriever: str,
    *,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    measures: Sequence[str] = MEASURES,
    depth: int = 1000,
    run_file: Path | None = None,
    suggest_drop_query_id: bool = True,
) -> dict[str, Any]:
    """Rank the queries of a split and score the rankings.

    Args:
        collection: Collection with the queries and judgments.
        retriever: Name of the retriever (`rlkit.retrieval.retrievers`), or "run:FILE" for rankings in TREC
            run format.
        split: Split of the queries.
        n: Maximum number of queries; None evaluates all.
        seed: Random seed of the order from which the first `n` queries are taken.
        measures: Names of measures (`rlkit.retrieval.measures`). The first one is the main metric.
        depth: Maximum number of documents in a ranking.
        run_file: File to write the rankings to, in TREC run format.
        suggest_drop_query_id: Whether to add a note if many rankings start with the document that has the id
            of the query.

    Returns:
        A dict with `queries` (texts by id), `rankings` (document ids by query), `scores` (values by query and
        canonical name of the measure), `notes` (sentences about this evaluation) and `counts` (numbers of
        queries and documents to which a rule applied).

    Raises:
        UserError: A name is unknown, the retriever fails, or a run file has none of the queries.
    """
    measures = canonical_measures(measures)
    judgments = _Judgments(collection, split, measures)
    judged = collection.judged(split)
    queries = {
        query.id: query.text for query in judged_queries(collection, split, n, seed, require_relevant=False)
    }
    num_without_relevant = sum(all(grade < 1 for grade in judged[query].values()) for query in queries)
    if num_without_relevant == len(queries):
        raise UserError(f"{collection.name} has no query with a relevant document in {split!r}")
    rankings, counts, notes = _rank(collection, retriever, queries, split, depth)
    if suggest_drop_query_id and not collection.drop_query_id:
        notes += _note_own_ids(judged, rankings)
    if run_file is not None:
        write_trec_run(run_file, rankings, retriever)
    for name in measures:
        cutoff = parse_measure(name).cutoff or 0
        if cutoff > depth:
            notes.append(
                f"{name} needs --depth {cutoff}; with --depth {depth}, its ranks from {depth + 1} are empty"
            )
    return {
        "queries": queries,
        "rankings": rankings,
        "scores": {query: judgments.score(query, rankings[query]) for query in queries},
        "notes": [*collection.notes, *judgments.notes(list(queries)), *notes],
        "counts": {"queries_without_relevant_document": num_without_relevant, **counts},
    }


def score_rankings(
    collection: Collection,
    split: str,
    rankings: Mapping[str, Sequence[str]],
    measures: Sequence[str] = MEASURES,
) -> dict[str, dict[str, float]]:
    """Return the value of each measure for each query's ranking; raises UserError for an unknown measure."""
    judgments = _Judgments(collection, split, canonical_measures(measures))
    return {query: judgments.score(query, ranking) for query, ranking in rankings.items()}


def _rank(
    collection: Collection, retriever: str, queries: Mapping[str, str], split: str, depth: int
) -> tuple[dict[str, list[str]], dict[str, int], list[str]]:
    """Rank judged documents for each query by a retriever or a run file, without excluded documents.

    Returns:
        Rankings of at most `depth` document ids by query, counts, and notes.

    Raises:
        UserError: The retriever or the file cannot be opened, a search fails, or the run has none of the
            queries.
    """
    notes: list[str] = []
    if retriever.startswith(RUN_PREFIX):
        path = Path(retriever.removeprefix(RUN_PREFIX)).expanduser()
        run = read_run(path)
        # Run files may rank passages and contain excluded documents, as the engines do.
        rankings = {
            query: list(dict.fromkeys(map(collection.judged_id, run.get(query, ())))) for query in queries
        }
        notes += _check_run(path, run, rankings, collection.judged(split))
    else:
        max_excluded = max(map(len, collection.excluded.values()), default=0)
        # Excluded documents are removed here and not by `retrieve`, so that they can be counted.
        everything = replace(collection, excluded={}, drop_query_id=False)
        try:
            engine = open_retriever(retriever, collection)
            k = depth + max_excluded + collection.drop_query_id
            rankings = retrieve(engine, everything, queries, k)
        except EngineError as error:
            raise UserError(f"the search failed: {error}") from error
        num_empty = sum(not ranking for ranking in rankings.values())
        if num_empty:
            notes.append(f"{num_empty} of {len(queries)} queries have no result and score 0")
        if has_own_documents(retriever):
            notes += _note_unjudged("retriever", rankings, collection.judged(split))
    rankings, counts = _remove_excluded(collection, rankings, depth)
    if collection.drop_query_id:
        notes.append(
            f"{counts['removed_query_ids']} documents with the id of their query were removed from the "
            "rankings, as in BEIR; --environment_args.drop_query_id false keeps them"
        )
    if counts["removed_excluded_documents"]:
        notes.append(
            f"{counts['removed_excluded_documents']} documents that the collection excludes for their query "
            "were removed from the rankings"
        )
    return rankings, counts, notes


def _check_run(
    path: Path, run: Mapping[str, Sequence[str]], rankings: Mapping[str, Sequence[str]], judged: Qrels
) -> list[str]:
    """Return notes about queries and documents that a run and the judgments do not have in common.

    Args:
        path: Run file, for messages.
        run: Rankings of the file by query.
        rankings: Rankings of the judged queries; empty for queries that the run does not have.
        judged: Grades by query and document.

    Raises:
        UserError: The run has none of the judged queries.
    """
    missing = [query for query in rankings if query not in run]
    if len(missing) == len(rankings):
        raise UserError(
            f"{path} has none of the {len(rankings)} judged queries: it has "
            f"{f'ids such as {next(iter(run))!r}' if run else 'no rankings'}, and the judged ids are such as "
            f"{missing[0]!r}; do the files belong together?"
        )
    notes = []
    if missing:
        notes.append(
            f"the run has no ranking for {len(missing)} of {len(rankings)} queries, for example "
            f"{missing[0]!r}; they score 0, as with trec_eval -c"
        )
    if unknown := [query for query in run if query not in judged]:
        notes.append(
            f"{len(unknown)} of {len(run)} queries of the run are not judged, for example {unknown[0]!r}; "
            "they are ignored"
        )
    notes += _note_unjudged("run", rankings, judged)
    return notes


def _note_unjudged(source: str, rankings: Mapping[str, Sequence[str]], judged: Qrels) -> list[str]:
    """Return a note if no ranked document is judged, although there are rankings."""
    query = next((query for query, ranking in rankings.items() if ranking), None)
    if query is None:
        return []
    if any(document in judged[query] for query, ranking in rankings.items() for document in ranking):
        return []
    return [
        f"no document of the {source} is judged: for query {query!r}, its ids are such as "
        f"{rankings[query][0]!r}, and the judged ids are such as {next(iter(judged[query]), 'none')!r}; do "
        f"the judgments and the {source} belong together?"
    ]


def _remove_excluded(
    collection: Collection, rankings: Mapping[str, Sequence[str]], depth: int
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Return the first `depth` documents of each ranking that are not excluded, and counts of the others."""
    num_own_ids = num_excluded = 0
    remaining: dict[str, list[str]] = {}
    for query, ranking in rankings.items():
        excluded = collection.excluded.get(query, frozenset())
        remaining[query] = []
        for document in ranking:
            if len(remaining[query]) == depth:
                break
            if collection.drop_query_id and document == query:
                num_own_ids += 1
            elif document in excluded:
                num_excluded += 1
            else:
                remaining[query].append(document)
    return remaining, {"removed_query_ids": num_own_ids, "removed_excluded_documents": num_excluded}


def _note_own_ids(judged: Qrels, rankings: Mapping[str, Sequence[str]]) -> list[str]:
    number = sum(
        ranking[:1] == [query] and judged[query].get(query, 0) < 1 for query, ranking in rankings.items()
    )
    if not number or number < MIN_OWN_ID_SHARE * len(rankings):
        return []
    return [
        f"the first document of {number} of {len(rankings)} rankings has the id of its query and is not "
        "judged relevant; if the queries are documents themselves, as in ArguAna, "
        "--environment_args.drop_query_id true removes them"
    ]


class _Judgments:
    """Judgments of a split, as each measure uses them.

    nDCG and measures whose name has a minimum grade use the graded judgments. The others use the collection's
    binary ones if it has any (CRUMB, T2Ranking), and otherwise its minimum grade for their kind.

    Args:
        collection: Collection with the judgments.
        split: Split of the queries.
        measures: Canonical names of measures.

    Raises:
        UserError: The collection does not have the split.
    """

    def __init__(self, collection: Collection, split: str, measures: Sequence[str]):
        self._graded = collection.judged(split)
        binary = collection.binary.get(split, {})
        # A query without binary judgments keeps its graded ones.
        self._binary = {**self._graded, **binary}
        # By name: the measure with its minimum grade, and whether it uses the binary judgments.
        self._measures: dict[str, tuple[Measure, bool]] = {}
        for name in measures:
            measure = parse_measure(name)
            if measure.kind == "ndcg" or measure.min_grade is not None:
                self._measures[name] = measure, False
            else:
                level = 1 if binary else collection.min_grade(measure.kind)
                self._measures[name] = measure._replace(min_grade=level), bool(binary)
        self._evaluators: dict[bool, Evaluator] = {}
        for is_binary, qrels in ((False, self._graded), (True, self._binary)):
            names = [measure.name for measure, binary_ in self._measures.values() if binary_ == is_binary]
            self._evaluators[is_binary] = Evaluator(qrels, names)

    def score(self, query: str, ranking: Sequence[str]) -> dict[str, float]:
        """Return the value of each measure for a query's ranking, by canonical name."""
        values = {is_binary: evaluate(query, ranking) for is_binary, evaluate in self._evaluators.items()}
        return {
            name: values[is_binary][measure.name] for name, (measure, is_binary) in self._measures.items()
        }

    def notes(self, queries: Sequence[str]) -> list[str]:
        """Return sentences about minimum grades above 1, and about queries without a relevant document."""
        notes = []
        by_level: dict[int, list[str]] = {}
        by_number: dict[int, list[str]] = {}
        for name, (measure, is_binary) in self._measures.items():
            level = measure.min_grade or 1
            if level > 1:
                by_level.setdefault(level, []).append(name)
            judged = self._binary if is_binary else self._graded
            number = sum(all(grade < level for grade in judged[query].values()) for query in queries)
            by_number.setdefault(number, []).append(name)
        for level, names in by_level.items():
            notes.append(f"{', '.join(names)}: grades of {level} and more count as relevant")
        for number, names in by_number.items():
            if number:
                measures = "" if len(by_number) == 1 else f" for {', '.join(names)}"
                notes.append(
                    f"{number} of {len(queries)} queries have no relevant document{measures} and score 0, as "
                    "with trec_eval -c"
                )
        return notes


def write_trec_run(path: Path, rankings: Mapping[str, Sequence[str]], tag: str) -> None:
    """Write rankings in TREC run format, `qid Q0 docid rank score tag`, with strictly decreasing scores.

    Raises:
        UserError: An id contains white space, or the file cannot be written.
    """
    tag = "_".join(tag.split())
    lines = []
    for query, ranking in rankings.items():
        for position, (document, score) in enumerate(descending_scores(ranking).items(), 1):
            if len(query.split()) != 1 or len(document.split()) != 1:
                raise UserError(
                    f"cannot write query {query!r} with document {document!r} to a TREC run: ids must not "
                    "be empty or contain white space"
                )
            lines.append(f"{query} Q0 {document} {position} {score:.0f} {tag}\n")
    try:
        atomic_write(path, "".join(lines))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
