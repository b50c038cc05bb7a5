"""`rerank-v1`: put the first results of a retriever in a better order.

The model sees a query and numbered candidates and prints a permutation, `[3] > [1] > [2]`; the reward is its
nDCG@10 (RankGPT's form, as in BRIGHT and E2Rank). Thinking before it costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlkit.environment import Candidates, Environment
from rlkit.errors import UserError
from rlkit.retrieval.documents import Document, EngineError, Query, SearchEngine
from rlkit.retrieval.queries import Judged, cut, documents_of, judged_queries, open_collection, task_id
from rlkit.retrieval.retrievers import how_many, open_retriever, ranked
from rlkit.rewards import reranking

if TYPE_CHECKING:
    import datasets

K = 10  # ranks that count
_PROMPT = (
    "Sort the passages below by how well they answer the query, the best first. Write all of their numbers "
    "in this form and nothing after it: [2] > [1] > [3]\n\nQuery: {query}\n\n{passages}\n\nQuery: {query}"
)


class RerankEnvironment(Environment):
    """Sorting candidates.

    Args:
        collection: see `rlkit.retrieval.collections.base`.
        retriever: what finds the candidates: see `rlkit.retrieval.retrievers`.
        candidates: how many of them.
        document_words: a longer candidate is cut.
        folds, fold: deal the queries of a collection without training queries to so many folds; `fold` is
            the test.
        add_relevant: put the best judged documents among the training candidates where the retriever has not
            found them, as Neural PG-RANK does. Held-out queries always have what was found.

    Raises:
        UserError: arguments that do not fit.
    """

    id = "rerank-v1"
    metric = "ndcg"
    rewards: Mapping[str, Any] = {"ndcg": reranking.ndcg, "whole_list": reranking.whole_list}
    reward_weights: Mapping[str, float] = {"ndcg": 1.0, "whole_list": 0.0}

    def __init__(
        self,
        *,
        collection: str = "generated:2000:0",
        retriever: str = "bm25",
        candidates: int = 20,
        document_words: int = 60,
        folds: int | None = None,
        fold: int = 0,
        add_relevant: bool = True,
    ):
        if not 2 <= candidates <= 1000 or document_words < 1:
            raise UserError(
                f"candidates must be from 2 to 1000 and document_words at least 1, not {candidates} and "
                f"{document_words}"
            )
        self.collection = open_collection(collection, folds, fold)
        self.retriever, self.candidates, self.document_words = retriever, candidates, document_words
        self.add_relevant = add_relevant

    @cached_property
    def engine(self) -> SearchEngine:
        """What finds the candidates."""
        return open_retriever(self.retriever, self.collection)

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Make the first `n` queries of a split, with their candidates.

        Columns: `prompt`, `task_id`, `query_id`, `query`, `candidates` (ids), `passages` (title and text),
        `grades` (of the candidates), `ideal` (grades of all relevant documents, highest first).

        Raises:
            UserError: no such split, or a retriever that fails.
        """
        import datasets

        asked = judged_queries(self.collection, split, n, seed)
        added = self.add_relevant and split == "train"
        needed = documents_of(
            self.collection, (name for one in asked for name in _best(one)) if added else ()
        )
        queries = [Query(one.text) for one in asked]
        try:
            results = self.engine.search(queries, how_many(self.collection, self.candidates))
        except EngineError as error:
            raise UserError(f"the search failed: {error}") from error
        rows = []
        for one, result in zip(asked, results, strict=True):
            if result.error is not None:
                raise UserError(f"the search failed: {result.error}")
            found = ranked(self.collection, one.id, result, self.candidates)
            rows.append(self._row(one, self._choose(one, found, needed)))
        return datasets.Dataset.from_list(rows)

    def _choose(
        self, one: Judged, found: Sequence[Document], needed: Mapping[str, Document]
    ) -> list[Document]:
        """The candidates in the order in which they were found, with the added ones anywhere between them."""
        there = {document.id for document in found}
        added = [needed[name] for name in _best(one) if name in needed and name not in there]
        added = added[: self.candidates]
        best = set(_best(one)) if needed else set()
        drop = max(len(found) + len(added) - self.candidates, 0)
        worst = sorted(range(len(found)), key=lambda i: (found[i].id in best, -i))[:drop]  # from the end
        kept = [document for i, document in enumerate(found) if i not in worst]
        for document in added:  # always at the end, its place would give it away
            kept.insert(int(task_id(one.id, document.id), 16) % (len(kept) + 1), document)
        return kept

    def _row(self, one: Judged, candidates: Sequence[Document]) -> dict[str, Any]:
        passages = [f"{document.title}: {document.text}".removeprefix(": ") for document in candidates]
        lines = (f"[{i}] {cut(passage, self.document_words)}" for i, passage in enumerate(passages, 1))
        prompt = _PROMPT.format(query=one.text, passages="\n".join(lines))
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "task_id": task_id(self.collection.name, one.id, prompt),
            "query_id": one.id,
            "query": one.text,
            "candidates": [document.id for document in candidates],
            "passages": passages,
            "grades": [max(one.grades.get(document.id, 0), 0) for document in candidates],
            "ideal": one.ideal,
        }

    def candidate_documents(self, task: Mapping[str, Any]) -> Candidates:
        """The candidates with their grades."""
        return Candidates(task["query"], task["passages"], task["grades"], task["ideal"])

    def answer(self, task: Mapping[str, Any]) -> str:
        """The candidates by grade, equal ones as given: right where all of the best are among them."""
        order = sorted(range(len(task["grades"])), key=lambda i: -task["grades"][i])
        return " > ".join(f"[{i + 1}]" for i in order)


def _best(one: Judged) -> list[str]:
    """Ids of the documents that an ideal ranking begins with."""
    relevant = [name for name, grade in one.grades.items() if grade > 0]
    return sorted(relevant, key=lambda name: (-one.grades[name], name))[:K]
