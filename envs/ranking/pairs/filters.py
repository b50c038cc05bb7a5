"""Filters of training rows: which rows teach a retriever what their query asks for.

The round trip is Promptagator's filter (arXiv 2209.11755): a query is consistent with the document that it
was written for if a retriever finds the document with it. The filters by teacher are those of listwise
distillation from six types of queries (arXiv 2502.19712).

The retriever of a round trip must not be trained to convergence on the rows that it filters: it finds what it
has memorized, so nothing is dropped. BM25 prefers queries that copy rare words of their document.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence, Set

import numpy as np

from rlkit.envs.ranking.pairs.rows import PairRow, answer_ids, query_key
from rlkit.errors import UserError, check_integer
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.documents import EngineError, Query, Ranking, SearchEngine, search_ids
from rlkit.retrieval.retrievers import excluded_by_text, search_depth
from rlkit.words import ngrams, words

NGRAM_LENGTH = 3  # words
# Documents with the same text may have scores that differ by rounding, if they are in different batches.
ROUNDING = 1e-6


def check_collection(rows: Sequence[PairRow], collection: Collection) -> None:
    """Raise UserError if a collection lacks a document that answers a row's query."""
    missing: set[str] = set().union(*map(answer_ids, rows))
    missing -= {collection.judged_id(document.id) for document in collection.documents()}
    if missing:
        raise UserError(
            f"{collection.name} lacks {len(missing):,} of the documents that the rows name, such as "
            f"{min(missing)!r}: use the collection of the rows"
        )


def source_ranks(
    rows: Sequence[PairRow], collection: Collection, engine: SearchEngine, depth: int
) -> list[int | None]:
    """Return the rank of each row's document for its query, or None if it is above `depth`.

    A rank is 1 + the number of other documents with a score of at least the document's, so ties count against
    the row. One document more than `depth` is searched, and a document that ties with the last one of a full
    result has no rank, because more ties may follow. If passages are ranked, a document has the score of its
    best passage. The documents that the collection excludes for one of its queries are also excluded for rows
    with the same query.

    Args:
        rows: Rows with a `document`.
        collection: Collection with the documents.
        engine: Retriever over the collection. If it returns no scores, its order decides, without ties.
        depth: Maximum rank, K.

    Raises:
        UserError: `depth` is below 1, a row has no document, the collection does not have the document of a
            row, or the search fails.
    """
    check_integer("depth", depth, 1)
    for row in rows:
        if not row.document:
            raise UserError(f"row {row.id!r} has no document, whose rank the round trip needs")
    check_collection(rows, collection)
    queries = list(dict.fromkeys(row.query for row in rows))
    excluded_by_query = excluded_by_text(collection, queries)
    num_searched = search_depth(collection, depth + 1)
    try:
        rankings = search_ids(engine, [Query(query) for query in queries], num_searched)
    except EngineError as error:
        raise UserError(f"the search failed: {error}") from error
    ranks_by_query: dict[str, dict[str, int]] = {}
    for query, ranking in zip(queries, rankings, strict=True):
        if ranking.error is not None:
            raise UserError(f"the search for {query!r:.60} failed: {ranking.error}")
        excluded = excluded_by_query.get(query, frozenset())
        ranks_by_query[query] = _ranks(ranking, collection, excluded, len(ranking.ids) >= num_searched)
    ranks = (ranks_by_query[row.query].get(row.document) for row in rows)
    return [rank if rank is not None and rank <= depth else None for rank in ranks]


def _ranks(ranking: Ranking, collection: Collection, excluded: Set[str], is_full: bool) -> dict[str, int]:
    """Return the ranks of the documents of a result by judged id.

    Args:
        ranking: Result of a search.
        collection: Collection with the documents.
        excluded: Ids of documents that have no rank.
        is_full: Whether there may be more documents with the last score than the result has.
    """
    scores = ranking.scores or tuple(-float(position) for position in range(len(ranking.ids)))
    best: dict[str, float] = {}
    for name, score in zip(map(collection.judged_id, ranking.ids), scores, strict=True):
        if name not in excluded:
            best.setdefault(name, score)
    ranks = {}
    for name, score in best.items():
        threshold = score - ROUNDING * abs(score)
        if not is_full or scores[-1] < threshold:
            ranks[name] = sum(other >= threshold for other in best.values())  # itself is the 1
    return ranks


def without_duplicates(rows: Sequence[PairRow]) -> list[PairRow]:
    """Return the first row of each query (`query_key`) and document."""
    unique = {(query_key(row.query), _source(row)): row for row in reversed(rows)}
    return [row for row in rows if unique[query_key(row.query), _source(row)] is row]


def without_ambiguous_queries(rows: Sequence[PairRow]) -> list[PairRow]:
    """Return the rows whose query does not also occur for another document."""
    sources: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        sources[query_key(row.query)].add(_source(row))
    return [row for row in rows if len(sources[query_key(row.query)]) == 1]


def _source(row: PairRow) -> str:
    """Return what identifies a row's document; its first passage if no document is named."""
    return row.document or row.passages[0]


def source_passage(row: PairRow) -> int | None:
    """Return the index of the first passage from a row's document, or None if it has none.

    Raises:
        UserError: The row names no document and has several passages.
    """
    if not row.document and len(row.passages) > 1:
        raise UserError(f"row {row.id!r} does not say which passage its query is from: set its document")
    if not row.document or not row.passage_documents:
        return 0
    return row.passage_documents.index(row.document) if row.document in row.passage_documents else None


def is_teacher_first(row: PairRow) -> bool:
    """Return whether the passage from a row's document has a higher target than all others.

    Raises:
        UserError: The row names no document and has several passages.
    """
    index = source_passage(row)
    if index is None:
        return False
    return all(row.targets[index] > target for i, target in enumerate(row.targets) if i != index)


def reaches_percentile(targets: Sequence[Sequence[float]], percent: float) -> list[bool]:
    """Return whether the highest target of each list is at least a percentile of the targets of all lists.

    Args:
        targets: Targets of the passages of each row.
        percent: Percentage of all targets below the percentile, from 0 to 100, interpolated linearly.
    """
    if not targets:
        return []
    threshold = np.percentile(np.concatenate([np.asarray(of_row, float) for of_row in targets]), percent)
    return [max(of_row) >= threshold for of_row in targets]


def copied_share(row: PairRow) -> float:
    """Return the share of a query's word trigrams that are in the passage from the row's document.

    A query without trigrams, of one or two words, is copied if the passage has its words in sequence.

    Raises:
        UserError: The row has no passage from its document.
    """
    index = source_passage(row)
    if index is None:
        raise UserError(f"row {row.id!r} has no passage from its document {row.document!r}")
    passage = row.passages[index]
    trigrams = list(ngrams(row.query, NGRAM_LENGTH))
    if trigrams:
        passage_trigrams = set(ngrams(passage, NGRAM_LENGTH))
        return sum(trigram in passage_trigrams for trigram in trigrams) / len(trigrams)
    query_words, passage_words = words(row.query), words(passage)
    length = len(query_words)
    starts = range(len(passage_words) - length + 1)
    return float(length > 0 and any(passage_words[i : i + length] == query_words for i in starts))
