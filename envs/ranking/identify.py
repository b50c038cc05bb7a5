"""`identify-v1`: write the identifier of a document that answers a query (generative retrieval).

    Which document answers this query? Write only its identifier.

    Query: I need to translate a menu

The answer is an id of the collection, such as `translator`. The model does not see the documents: it learns
which of them answers which query from training queries, and from generated ones such as the sentences of each
document. The retriever `docid:MODEL` ranks documents with such a model (`rlkit.retrieval.engines.identify`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlkit.environment import Environment
from rlkit.envs.ranking.pairs.rows import Row, read_rows
from rlkit.errors import UserError
from rlkit.retrieval.engines.identify import documents_by_identifier, identify_prompt
from rlkit.retrieval.queries import JudgedQuery, judged_queries, open_collection, task_id
from rlkit.retrieval.retrievers import excluded_ids
from rlkit.rewards import identification

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


class IdentifyEnvironment(Environment):
    """Environment for generative retrieval.

    Args:
        collection: Collection with judged queries; see `rlkit.retrieval.collections.base`.
        folds: Number of cross-validation folds of the queries, for collections without training queries.
        fold: Index of the fold that is the test split.
        drop_query_id: Whether the document whose id equals the query's is never an answer; None follows the
            benchmark (true for BEIR's ArguAna and Quora).
        pairs: Path of a file of training pairs (`rlkit.envs.ranking.pairs.rows`), whose queries are training
            tasks in addition to those of the collection. A collection without training queries needs it.

    Raises:
        UserError: An argument is invalid.
    """

    id = "identify-v1"
    metric = "hit"
    rewards: Mapping[str, Any] = {"hit": identification.hit, "graded": identification.graded}
    reward_weights: Mapping[str, float] = {"hit": 1.0, "graded": 0.0}

    def __init__(
        self,
        *,
        collection: str = "generated:2000:0",
        folds: int | None = None,
        fold: int = 0,
        drop_query_id: bool | None = None,
        pairs: str | None = None,
    ):
        self.collection = open_collection(collection, folds, fold, drop_query_id)
        self.pairs = [] if pairs is None else read_rows(pairs)
        if self.pairs and self.pairs[0].passages_are_queries:
            raise UserError(
                f"the passages of {pairs} are queries, and their query is a document: write pairs whose "
                "query is answered by the passages"
            )

    @cached_property
    def identifiers(self) -> frozenset[str]:
        """Ids of all documents."""
        return frozenset(documents_by_identifier(self.collection))

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Return the first `n` queries of a split, those of the pairs among the training queries.

        Training queries whose relevant documents are all missing from the corpus or excluded are left out.
        Held-out ones are kept and score 0.

        Columns: `prompt`, `task_id`, `query_id`, `query`, `relevant` and `ideal` (ids and grades of the
        relevant documents, highest grade first).

        Raises:
            UserError: The split is unknown, a pair has no document of the collection, or no query is left.
        """
        import datasets

        is_train = split == "train"
        rows = []
        # With pairs, the collection needs no training queries.
        if not (is_train and self.pairs) or split in self.collection.qrels:
            rows += [self._judged_row(query) for query in judged_queries(self.collection, split, None, seed)]
        if is_train:
            rows += [self._pair_row(pair) for pair in self.pairs]
            num_queries = len(rows)
            rows = [row for row in rows if row["relevant"]]
            if num_left_out := num_queries - len(rows):
                if not rows:
                    raise UserError(
                        f"{self.collection.name} has none of the documents that answer its training queries, "
                        "or excludes them: check the corpus and qrels/train.tsv"
                    )
                logger.warning(
                    "%d of %d training queries have no relevant document in the corpus and are left out",
                    num_left_out,
                    num_queries,
                )
        # The same order as that of judged queries in other environments, and pairs among them.
        rows.sort(key=lambda row: hashlib.sha256(f"{seed} {row['query_id']}".encode()).digest())
        return datasets.Dataset.from_list(rows[:n])

    def _judged_row(self, query: JudgedQuery) -> dict[str, Any]:
        excluded = excluded_ids(self.collection, query.id)
        possible = [name for name in query.relevant if name in self.identifiers and name not in excluded]
        return self._row(query.id, query.text, {name: query.grades[name] for name in possible}, "judged")

    def _pair_row(self, pair: Row) -> dict[str, Any]:
        """Return the task of a pair, whose relevant documents are those of its passages and its answers."""
        grades: dict[str, float] = {}
        names = pair.passage_documents or (pair.document,) * len(pair.passages)
        for name, target in zip(map(self.collection.judged_id, names), pair.targets, strict=True):
            if target > 0:
                grades[name] = max(target, grades.get(name, 0.0))
        highest = max(grades.values(), default=1.0)
        for name in map(self.collection.judged_id, pair.answers):
            grades.setdefault(name, highest)
        for name in grades:
            if name not in self.identifiers:
                raise UserError(
                    f"{self.collection.name} has no document {name!r:.60}, which answers the pair "
                    f"{pair.id!r:.60}: generate the pairs from this collection"
                )
        return self._row(pair.id, pair.query, dict(sorted(grades.items(), key=lambda item: -item[1])), "pair")

    def _row(self, query_id: str, query: str, grades: Mapping[str, float], source: str) -> dict[str, Any]:
        prompt = identify_prompt(query)
        return {
            "prompt": prompt,
            "task_id": task_id(self.collection.name, source, query_id, prompt[0]["content"]),
            "query_id": query_id,
            "query": query,
            "relevant": list(grades),
            "ideal": [float(grade) for grade in grades.values()],
        }

    def answer(self, task: Mapping[str, Any]) -> str | None:
        """Return the identifier of the best document, or None if the collection has no relevant one."""
        return task["relevant"][0] if task["relevant"] else None
