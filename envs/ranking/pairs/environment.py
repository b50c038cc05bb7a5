"""`pairs-v1`: train a ranker on a file of pairs, and test it on the queries of a collection.

    rlkit rank configs/ranking/pairs.yaml --environment_args.pairs pairs.jsonl

Its training tasks are the rows of the file (`rlkit.envs.ranking.pairs.rows`). All other tasks, and the
rewards, are those of rerank-v3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlkit.environment import Candidates
from rlkit.envs.ranking.pairs.rows import PairRow, read_rows
from rlkit.envs.ranking.rerank import DEFAULT_COLLECTION, RerankEnvironment
from rlkit.errors import UserError
from rlkit.retrieval.queries import task_id

if TYPE_CHECKING:
    import datasets


class PairsEnvironment(RerankEnvironment):
    """Environment for training on given pairs, triples and lists.

    Args:
        pairs: File of rows, which `scripts/make_pairs.py` writes.
        collection: Collection of the held-out queries. Training needs none.
        retriever, candidates, document_words, folds, fold, drop_query_id: As in `rerank-v3`, for the held-out
            queries.

    Raises:
        UserError: An argument is invalid.
    """

    id = "pairs-v1"

    def __init__(
        self,
        *,
        pairs: str | None = None,
        collection: str | None = None,
        retriever: str = "bm25",
        candidates: int = 20,
        document_words: int = 60,
        folds: int | None = None,
        fold: int = 0,
        drop_query_id: bool | None = None,
    ):
        if not isinstance(pairs, str | None):
            raise UserError(f"pairs must be the path of a file, not {pairs!r:.60}")
        super().__init__(
            collection=collection or DEFAULT_COLLECTION,
            retriever=retriever,
            candidates=candidates,
            document_words=document_words,
            folds=folds,
            fold=fold,
            drop_query_id=drop_query_id,
        )
        self.pairs, self.has_collection = pairs, collection is not None

    @cached_property
    def rows(self) -> list[PairRow]:
        """Rows of the file, read on first use: an evaluation does not need them."""
        if self.pairs is None:
            raise UserError("pairs-v1 needs a file of pairs to train on: set environment_args.pairs")
        return read_rows(self.pairs)

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Return the first `n` rows of the file, shuffled by the seed, or the held-out tasks of rerank-v3.

        Columns: those of rerank-v3, `possible_answers` and `passages_are_queries`. In training rows,
        `candidates` are the ids of the passages' documents.

        Raises:
            UserError: The file is missing or invalid, the split is unknown, or the retriever fails.
        """
        import datasets

        if split != "train" and not self.has_collection:
            raise UserError(
                "pairs-v1 has no held-out queries: set environment_args.collection, or evaluation_tasks to 0"
            )
        if split != "train":
            return super().tasks(split, n, seed)
        # Sorting by a hash keeps the order of two rows when the file gains or loses others.
        rows = sorted(self.rows, key=lambda row: hashlib.sha256(f"{seed} {row.id}".encode()).digest())
        return datasets.Dataset.from_list([self._row_task(row) for row in rows[:n]])

    def _row_task(self, row: PairRow) -> dict[str, Any]:
        prompt = self._prompt(row.query, row.passages)
        candidates = row.passage_documents
        if not candidates and row.document:
            candidates = (row.document,) * len(row.passages)
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "task_id": task_id("pairs", row.id, prompt),
            "query_id": row.id,
            "query": row.query,
            "candidates": list(candidates),
            "passages": list(row.passages),
            "grades": list(row.targets),
            "ideal": sorted((target for target in row.targets if target > 0), reverse=True),
            "relevant": [],
            "excluded": [],
            "possible_answers": list(row.answers) or ([row.document] if row.document else []),
            "passages_are_queries": row.passages_are_queries,
        }

    def documents(self) -> Iterator[tuple[str, str]] | None:
        """Return all documents of the collection, or None if there is no collection."""
        return super().documents() if self.has_collection else None

    def candidate_documents(self, task: Mapping[str, Any]) -> Candidates:
        """Return the passages with their targets, or the candidates of a held-out query with their grades."""
        return replace(
            super().candidate_documents(task),
            possible_answers=task.get("possible_answers", ()),
            passages_are_queries=task.get("passages_are_queries", False),
        )
