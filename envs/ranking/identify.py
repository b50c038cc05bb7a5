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
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlkit.environment import Environment
from rlkit.envs.ranking.pairs.rows import PairRow, read_rows
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
    rewards: Mapping[str, Any] = {"hit": identification.hit}
    reward_weights: Mapping[str, float] = {"hit": 1.0}

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
        self.pairs_file = pairs
        self.pairs = [] if pairs is None else read_rows(pairs)
        if self.pairs and self.pairs[0].passages_are_queries:
            raise UserError(
                f"the rows of {pairs} have documents as queries and queries as passages (PROP): use pairs "
                "whose passages answer the query"
            )

    @cached_property
    def identifiers(self) -> frozenset[str]:
        """Ids of all documents."""
        return frozenset(documents_by_identifier(self.collection))

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Return the first `n` queries of a split, those of the pairs among the training queries.

        Training queries whose relevant documents are all missing from the corpus or excluded are left out.
        Held-out ones are kept and score 0.

        Columns: `prompt`, `task_id`, `query_id`, `query` and `relevant` (ids of the relevant documents,
        highest grade first).

        Raises:
            UserError: The split is unknown, a pair has no document of the collection, or no query is left.
        """
        import datasets

        is_train = split == "train"
        rows = []
        # With pairs, the collection needs no training queries.
        if not (is_train and self.pairs) or split in self.collection.qrels:
            queries = judged_queries(self.collection, split, None, seed)
            rows += [self._judged_row(query, split) for query in queries]
        if is_train:
            rows += [self._pair_row(pair) for pair in self.pairs]
            num_queries = len(rows)
            rows = [row for row in rows if row["relevant"]]
            if num_left_out := num_queries - len(rows):
                if not rows:
                    raise UserError(
                        f"{self.collection.name} has none of the relevant documents of its training queries, "
                        "or excludes them: check the corpus and the training judgments"
                    )
                logger.warning(
                    "%d of %d training queries have no relevant document in the corpus and are left out",
                    num_left_out,
                    num_queries,
                )
        # The same order as that of judged queries in other environments, and pairs among them.
        rows.sort(key=lambda row: hashlib.sha256(f"{seed} {row['query_id']}".encode()).digest())
        return datasets.Dataset.from_list(rows[:n])

    def _judged_row(self, query: JudgedQuery, split: str) -> dict[str, Any]:
        """Return the task of a judged query, whose relevant documents are those of the measure hit@1."""
        excluded = excluded_ids(self.collection, query.id)
        binary = self.collection.binary.get(split, {}).get(query.id)
        grades, min_grade = (
            (query.grades, self.collection.min_grade("hit")) if binary is None else (binary, 1)
        )
        ranked = sorted(grades, key=lambda name: (-grades[name], name))
        relevant = [
            name
            for name in ranked
            if grades[name] >= min_grade and name in self.identifiers and name not in excluded
        ]
        return self._row(query.id, query.text, relevant, "judged")

    def _pair_row(self, pair: PairRow) -> dict[str, Any]:
        """Return the task of a pair: its answers, and the documents of the passages with the highest target.

        The other passages may be negatives to which a teacher gives a score above 0.
        """
        documents = pair.passage_documents or (pair.document,) * len(pair.passages)
        highest = max(pair.targets)
        best = [
            name
            for name, target in zip(documents, pair.targets, strict=True)
            if target == highest and target > 0
        ]
        relevant = list(dict.fromkeys(map(self.collection.judged_id, (*best, *pair.answers))))
        if not relevant:
            raise UserError(f"{self.pairs_file}: the pair {pair.id!r:.60} has no target above 0; remove it")
        for name in relevant:
            if not name:
                raise UserError(
                    f"{self.pairs_file}: the pair {pair.id!r:.60} does not say which document answers it: "
                    "set its field document"
                )
            if name not in self.identifiers:
                raise UserError(
                    f"{self.pairs_file}: the pair {pair.id!r:.60} is answered by {name!r:.60}, which is not "
                    f"a document of {self.collection.name}: generate the pairs from this collection"
                )
        return self._row(pair.id, pair.query, relevant, "pair")

    def _row(self, query_id: str, query: str, relevant: Sequence[str], source: str) -> dict[str, Any]:
        prompt = identify_prompt(query)
        return {
            "prompt": prompt,
            "task_id": task_id(self.collection.name, source, query_id, prompt[0]["content"]),
            "query_id": query_id,
            "query": query,
            "relevant": list(relevant),
        }

    def answer(self, task: Mapping[str, Any]) -> str | None:
        """Return the identifier of the best document, or None if the collection has no relevant one."""
        return task["relevant"][0] if task["relevant"] else None
