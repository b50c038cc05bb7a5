"""`rerank-v3`: rerank the first results of a retriever.

The model sees a query and numbered candidates and writes a permutation, `[3] > [1] > [2]`, in the format of
RankGPT, BRIGHT and E2Rank. The reward is its nDCG@10. Thinking before the permutation costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlkit.environment import Candidates, Environment
from rlkit.envs.ranking.prompts import prompt_line
from rlkit.errors import UserError, check_integer
from rlkit.retrieval.documents import Document, EngineError, Query, SearchEngine, passage_text
from rlkit.retrieval.queries import JudgedQuery, documents_by_id, judged_queries, open_collection, task_id
from rlkit.retrieval.retrievers import (
    excluded_ids,
    open_retriever,
    search_depth,
    top_documents,
    warn_about_empty,
)
from rlkit.rewards import reranking

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

DEFAULT_COLLECTION = "generated:2000:0"
K = 10  # cutoff of the reward's nDCG
_PROMPT = (
    "Sort the passages below by how well they answer the query, the best first. Write all of their numbers "
    "in this form and nothing after it: [2] > [1] > [3]\n\nQuery: {query}\n\n{passages}\n\nQuery: {query}"
)


class RerankEnvironment(Environment):
    """Environment for reranking candidates.

    Args:
        collection: Collection with judged queries; see `rlkit.retrieval.collections.base`.
        retriever: Retriever that finds the candidates; see `rlkit.retrieval.retrievers`.
        candidates: Maximum number of candidates of a query.
        document_words: Maximum number of words of a candidate in the prompt; a longer one is truncated.
        folds: Number of cross-validation folds of the queries, for collections without training queries.
        fold: Index of the fold that is the test split.
        add_relevant: Whether to add the best judged documents that the retriever missed to the candidates of
            training queries, as Neural PG-RANK does. Held-out queries keep the retriever's candidates.
        drop_query_id: Whether the document whose id equals the query's is never a candidate; None follows the
            benchmark (true for BEIR's ArguAna and Quora).

    Raises:
        UserError: An argument is invalid.
    """

    id = "rerank-v3"
    metric = "ndcg"
    rewards: Mapping[str, Any] = {"ndcg": reranking.ndcg, "whole_list": reranking.whole_list}
    reward_weights: Mapping[str, float] = {"ndcg": 1.0, "whole_list": 0.0}

    def __init__(
        self,
        *,
        collection: str = DEFAULT_COLLECTION,
        retriever: str = "bm25",
        candidates: int = 20,
        document_words: int = 60,
        folds: int | None = None,
        fold: int = 0,
        add_relevant: bool = True,
        drop_query_id: bool | None = None,
    ):
        check_integer("candidates", candidates, 2, 1000)
        check_integer("document_words", document_words, 1)
        self.collection = open_collection(collection, folds, fold, drop_query_id)
        self.retriever, self.candidates, self.document_words = retriever, candidates, document_words
        self.add_relevant = add_relevant

    @cached_property
    def engine(self) -> SearchEngine:
        """Search engine that finds the candidates."""
        return open_retriever(self.retriever, self.collection)

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Return the first `n` queries of a split with their candidates.

        Training queries with fewer than two candidates are left out, because there is nothing to rank.
        Held-out queries are all kept: without candidates, every ranking scores 0.

        Columns: `prompt`, `task_id`, `query_id`, `query`, `candidates` (ids), `passages` (title and text),
        `grades` (of the candidates), `ideal` and `relevant` (grades and ids of all relevant documents,
        highest grade first), `excluded` (ids that are never candidates).

        Raises:
            UserError: The split is unknown, the retriever fails, or it finds nothing to rank.
        """
        import datasets

        queries = judged_queries(self.collection, split, None, seed)
        rows: list[dict[str, Any]] = []
        num_read = num_empty = batch_size = 0
        while num_read < len(queries) and (n is None or len(rows) < n):
            # Batches double, because adding documents reads the entire collection once per batch.
            batch_size = len(queries) if n is None else max(2 * batch_size, n)
            batch = queries[num_read : num_read + batch_size]
            num_read += len(batch)
            for query, hits, candidates in self._find_candidates(batch, split):
                num_empty += not hits
                if len(candidates) > 1 or split != "train":
                    rows.append(self._row(query, candidates))
        warn_about_empty(num_empty, num_read, self.retriever)
        if num_left_out := num_read - len(rows):
            if not rows:
                raise UserError(
                    f"{self.retriever} finds fewer than two candidates for each of the {num_read} training "
                    f"queries of {self.collection.name}; set another retriever"
                )
            logger.warning(
                "%d of %d training queries have fewer than two candidates and are left out",
                num_left_out,
                num_read,
            )
        return datasets.Dataset.from_list(rows[:n])

    def _find_candidates(
        self, queries: Sequence[JudgedQuery], split: str
    ) -> Iterator[tuple[JudgedQuery, list[Document], list[Document]]]:
        """Yield each query with the documents that the retriever finds, and with its candidates."""
        ids_to_add: list[str] = []
        if self.add_relevant and split == "train":
            ids_to_add = [document_id for query in queries for document_id in self._best_ids(query)]
        addable = documents_by_id(self.collection, ids_to_add)
        depth = search_depth(self.collection, self.candidates)
        try:
            results = self.engine.search([Query(query.text) for query in queries], depth)
        except EngineError as error:
            raise UserError(f"the search failed: {error}") from error
        for query, result in zip(queries, results, strict=True):
            if result.error is not None:
                raise UserError(f"the search failed: {result.error}")
            hits = top_documents(self.collection, query.id, result, self.candidates)
            yield query, hits, self._choose_candidates(query, hits, addable)

    def _best_ids(self, query: JudgedQuery) -> list[str]:
        """Return the ids of the first K documents of an ideal ranking, without excluded ones."""
        excluded = excluded_ids(self.collection, query.id)
        return [name for name in query.relevant if name not in excluded][:K]

    def _choose_candidates(
        self, query: JudgedQuery, hits: Sequence[Document], addable: Mapping[str, Document]
    ) -> list[Document]:
        """Return the hits in their order, with the best judged documents in `addable` at random positions."""
        hit_ids = {document.id for document in hits}
        best_ids = self._best_ids(query) if addable else []
        added = [addable[name] for name in best_ids if name in addable and name not in hit_ids]
        added = added[: self.candidates]
        num_dropped = max(len(hits) + len(added) - self.candidates, 0)
        # Drop from the end, and the best judged documents last.
        drop_order = sorted(range(len(hits)), key=lambda i: (hits[i].id in best_ids, -i))
        dropped = drop_order[:num_dropped]
        candidates = [document for i, document in enumerate(hits) if i not in dropped]
        for document in added:
            # A fixed position would reveal the added documents. The hash makes it reproducible.
            position = int(task_id(query.id, document.id), 16) % (len(candidates) + 1)
            candidates.insert(position, document)
        return candidates

    def _row(self, query: JudgedQuery, candidates: Sequence[Document]) -> dict[str, Any]:
        passages = [passage_text(document) for document in candidates]
        prompt = self._prompt(query.text, passages)
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "task_id": task_id(self.collection.name, query.id, prompt),
            "query_id": query.id,
            "query": query.text,
            "candidates": [document.id for document in candidates],
            "passages": passages,
            "grades": [max(query.grades.get(document.id, 0), 0) for document in candidates],
            "ideal": query.ideal,
            "relevant": query.relevant,
            "excluded": sorted(excluded_ids(self.collection, query.id)),
        }

    def _prompt(self, query: str, passages: Sequence[str]) -> str:
        lines = (
            f"[{i}] {prompt_line(passage, self.document_words)}" for i, passage in enumerate(passages, 1)
        )
        return _PROMPT.format(query=prompt_line(query), passages="\n".join(lines))

    def candidate_documents(self, task: Mapping[str, Any]) -> Candidates:
        """Return the candidates with their grades and ids."""
        return Candidates(
            task["query"],
            task["passages"],
            task["grades"],
            task["ideal"],
            ids=task["candidates"],
            relevant=task["relevant"],
            excluded=task["excluded"],
        )

    def documents(self) -> Iterator[tuple[str, str]] | None:
        """Return all documents of the collection, as (judged id, passage).

        If the collection ranks passages, each passage has the id of its document.
        """
        documents = self.collection.documents()
        return ((self.collection.judged_id(document.id), passage_text(document)) for document in documents)

    def answer(self, task: Mapping[str, Any]) -> str:
        """Return the candidates sorted by grade; ties keep their order.

        The answer earns the full reward only if the candidates include the documents of an ideal ranking.
        """
        order = sorted(range(len(task["grades"])), key=lambda i: -task["grades"][i])
        return " > ".join(f"[{i + 1}]" for i in order)
