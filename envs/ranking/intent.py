"""`intent-v5`: describe the intent of a searcher from relevant and irrelevant documents (Q2ID).

The model sees a query with a few relevant and irrelevant snippets and writes a description of the intent. To
score the description, a scorer ranks the documents of the prompt, and up to the same number of documents that
the model has not seen, by how well they fit it. The reward is the average precision of the relevant documents
minus a price for copying from the snippets, in their order or in any other.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlkit.environment import Environment, Reply, Turn
from rlkit.envs.ranking.prompts import prompt_line
from rlkit.envs.ranking.scoring import Scorer, open_scorer
from rlkit.errors import UserError, check_integer
from rlkit.retrieval.documents import (
    Document,
    EngineError,
    Query,
    SearchEngine,
    full_text,
    passage_text,
)
from rlkit.retrieval.engines.bm25 import terms
from rlkit.retrieval.queries import JudgedQuery, documents_by_id, judged_queries, open_collection, task_id
from rlkit.retrieval.retrievers import excluded_ids, open_retriever, search_depth, top_documents
from rlkit.rewards import intent
from rlkit.rewards.tags import tag_contents
from rlkit.rewards.thinking import after_thinking
from rlkit.words import keywords

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_PROMPT = (
    "Someone searched for: {query}\n\nThese documents are what they were looking for:\n{relevant}\n\n"
    "These documents are not:\n{irrelevant}\n\nIn one or two sentences and in your own words, describe what "
    "they were looking for, so that relevant documents can be told from irrelevant ones. Write the "
    "description between <intent> and </intent>."
)
DEPTH = 100  # number of the query's results that irrelevant documents are taken from


class IntentEnvironment(Environment):
    """Environment for describing the intent behind a query.

    Args:
        collection: Collection with judged queries; see `rlkit.retrieval.collections.base`.
        retriever: Retriever that finds irrelevant documents for the query; see `rlkit.retrieval.retrievers`.
        shown: Maximum number of relevant and of irrelevant snippets in the prompt. Up to the same number of
            additional documents of each kind is ranked.
        document_words: Maximum number of words of a snippet; a longer one is truncated.
        scorer: Scorer that ranks documents by the description: "bm25", or "dense:MODEL" with any
            sentence-transformers model.
        folds, fold: Cross-validation folds; see `RerankEnvironment`.
        drop_query_id: Whether the document with the id of the query is left out; None follows the benchmark.

    Raises:
        UserError: An argument is invalid.
    """

    id = "intent-v5"
    metric = "separation"
    max_turns = 2  # not 1: `respond` must see the model's turn to rank by it, and then ends the rollout
    rewards: Mapping[str, Any] = {
        "separation": intent.separation,
        "own_words": intent.own_words,
        "copied": intent.copied,
    }
    reward_weights: Mapping[str, float] = {"own_words": 1.0, "copied": 0.0}

    def __init__(
        self,
        *,
        collection: str = "generated:2000:0",
        retriever: str = "bm25",
        shown: int = 3,
        document_words: int = 60,
        scorer: str = "bm25",
        folds: int | None = None,
        fold: int = 0,
        drop_query_id: bool | None = None,
    ):
        check_integer("shown", shown, 1, 20)
        check_integer("document_words", document_words, 1)
        if scorer != "bm25" and not re.fullmatch("dense:.+", scorer):
            raise UserError(f"there is no scorer {scorer!r}; use bm25 or dense:MODEL")
        self.collection = open_collection(collection, folds, fold, drop_query_id)
        self.retriever, self.shown, self.document_words = retriever, shown, document_words
        self.scorer = scorer

    @cached_property
    def engine(self) -> SearchEngine:
        """Search engine that finds irrelevant documents."""
        return open_retriever(self.retriever, self.collection)

    @cached_property
    def document_scorer(self) -> Scorer:
        """Function that scores how well documents fit a description."""
        return open_scorer(self.scorer)

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Return the first `n` queries of a split for which there are relevant and irrelevant documents.

        Relevant documents are those with the highest grade that are in the collection and not excluded.
        Irrelevant ones are found by the retriever. Queries without either are left out.

        Columns: `prompt`, `task_id`, `split`, `query_id`, `query`, `snippets` (those in the prompt), `pool`
        (ids of the documents to rank, irrelevant ones first), `texts` (of the pool), `relevant` (ids),
        `distinctive_terms` (of the relevant snippets; see `rlkit.rewards.intent.copied`).

        Raises:
            UserError: The split is unknown, or the retriever fails.
        """
        import datasets

        queries = judged_queries(self.collection, split, None, seed)
        rows: list[dict[str, Any]] = []
        num_read = batch_size = 0
        while num_read < len(queries) and (n is None or len(rows) < n):
            # Batches double, because each one reads the entire collection.
            batch_size = len(queries) if n is None else max(2 * batch_size, n)
            batch = queries[num_read : num_read + batch_size]
            num_read += len(batch)
            irrelevant, relevant = self._irrelevant_documents(batch), self._relevant_documents(batch)
            rows += [
                self._row(split, query, relevant[query.id], irrelevant[query.id])
                for query in batch
                if relevant[query.id] and irrelevant[query.id]
            ]
        if len(rows) < num_read:
            logger.warning(
                "%d of %d %s queries are left out: %s finds no irrelevant document for them, or no relevant "
                "document is in the collection",
                num_read - len(rows),
                num_read,
                split,
                self.retriever,
            )
        return datasets.Dataset.from_list(rows[:n])

    def _relevant_documents(self, queries: Sequence[JudgedQuery]) -> dict[str, list[Document]]:
        """Return the documents with the highest grade, by query; those for the prompt come first."""
        ids: dict[str, list[str]] = {}
        for query in queries:
            excluded = excluded_ids(self.collection, query.id)
            ids[query.id] = [name for name in query.relevant if name not in excluded]
        documents = documents_by_id(self.collection, (name for names in ids.values() for name in names))
        relevant = {}
        for query in queries:
            names = [name for name in ids[query.id] if name in documents]
            highest = max((query.grades[name] for name in names), default=0)
            best = [name for name in names if query.grades[name] == highest]
            best.sort(key=lambda name: task_id(query.id, name))
            relevant[query.id] = [documents[name] for name in best[: 2 * self.shown]]
        return relevant

    def _irrelevant_documents(self, queries: Sequence[JudgedQuery]) -> dict[str, list[Document]]:
        """Return retrieved documents without a grade above 0, by query; those for the prompt come first."""
        depth = search_depth(self.collection, DEPTH)
        try:
            results = self.engine.search([Query(query.text) for query in queries], depth)
        except EngineError as error:
            raise UserError(f"the search failed: {error}") from error
        irrelevant = {}
        for query, result in zip(queries, results, strict=True):
            if result.error is not None:
                raise UserError(f"the search failed: {result.error}")
            hits = top_documents(self.collection, query.id, result, DEPTH)
            hits = [document for document in hits if query.grades.get(document.id, 0) <= 0][: 2 * self.shown]
            # Shuffle by a hash, so that the documents in the prompt are not simply the top results.
            hits.sort(key=lambda document: task_id(query.id, document.id))
            irrelevant[query.id] = hits
        return irrelevant

    def _row(
        self,
        split: str,
        query: JudgedQuery,
        relevant: Sequence[Document],
        irrelevant: Sequence[Document],
    ) -> dict[str, Any]:
        relevant_snippets, irrelevant_snippets = self._snippets(relevant), self._snippets(irrelevant)
        prompt = _PROMPT.format(
            query=prompt_line(query.text),
            relevant="\n".join(f"- {snippet}" for snippet in relevant_snippets),
            irrelevant="\n".join(f"- {snippet}" for snippet in irrelevant_snippets),
        )
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "task_id": task_id(self.collection.name, query.id, prompt),
            "split": split,
            "query_id": query.id,
            "query": query.text,
            "snippets": relevant_snippets + irrelevant_snippets,
            "pool": [document.id for document in (*irrelevant, *relevant)],
            "texts": [full_text(document) for document in (*irrelevant, *relevant)],
            "relevant": [document.id for document in relevant],
            "distinctive_terms": _distinctive_terms(relevant_snippets, [query.text, *irrelevant_snippets]),
        }

    def _snippets(self, documents: Sequence[Document]) -> list[str]:
        """Return truncated snippets of the first half of the documents, at least one and at most `shown`."""
        num_shown = min(self.shown, (len(documents) + 1) // 2)
        texts = map(passage_text, documents[:num_shown])
        return [prompt_line(text, self.document_words) for text in texts]

    def respond(self, turns: Sequence[Turn]) -> Sequence[Reply]:
        """Rank each task's pool by the description in the turn; every turn ends its rollout."""
        return [self._reply(turn.task, parse_intent(turn.messages[-1]["content"])) for turn in turns]

    def _reply(self, task: Mapping[str, Any], description: str | None) -> Reply:
        if description is None:
            return Reply(done=True)
        scores = self.document_scorer(description, task["texts"])
        # The sort is stable and irrelevant documents come first in the pool, so ties count against the
        # description: one that separates nothing gets 0.
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        record = {
            "intent": description,
            "terms": next(terms([description])),
            "ranking": [task["pool"][i] for i in order],
        }
        return Reply(done=True, record=record)

    def answer(self, task: Mapping[str, Any]) -> str | None:
        """Return None: the reward needs the ranking that `respond` computes."""
        return None

    def script(self, task: Mapping[str, Any]) -> Sequence[str] | None:
        """Return a turn of words that occur only in relevant documents, if it earns the full reward.

        The words are few: the first one is in as many relevant documents as possible, the next one in as many
        of the others as possible, until every document has one.
        """
        num_irrelevant = len(task["pool"]) - len(task["relevant"])
        irrelevant_terms = _distinct_terms(task["texts"][:num_irrelevant])
        documents_of: dict[str, set[int]] = {}
        for i, text in enumerate(task["texts"][num_irrelevant:]):
            for word in keywords(text):
                word_terms = _distinct_terms([word])
                if word_terms and not word_terms & irrelevant_terms:
                    documents_of.setdefault(word, set()).add(i)
        words: list[str] = []
        uncovered = set(range(len(task["relevant"])))
        while uncovered and documents_of:
            word = max(sorted(documents_of), key=lambda word: len(documents_of[word] & uncovered))
            covered = documents_of.pop(word) & uncovered
            if not covered:
                return None
            words.append(word)
            uncovered -= covered
        turn = f"<intent>{' '.join(words)}</intent>"
        messages = [{"role": "assistant", **self._reply(task, parse_intent(turn)).record}]
        columns = (task[name] for name in ("relevant", "pool", "snippets", "distinctive_terms"))
        return [turn] if intent.own_words(messages, *columns) == 1 else None


def parse_intent(completion: str) -> str | None:
    """Return the last description in a completion, or None if it has none."""
    descriptions = tag_contents(after_thinking(completion), "intent")
    if not descriptions:
        return None
    return " ".join(descriptions[-1].split()) or None


def _distinctive_terms(texts: Sequence[str], other_texts: Sequence[str]) -> list[str]:
    """Return the sorted terms of `texts` that do not occur in `other_texts`."""
    return sorted(_distinct_terms(texts) - _distinct_terms(other_texts))


def _distinct_terms(texts: Sequence[str]) -> set[str]:
    return {term for text_terms in terms(texts) for term in text_terms}
