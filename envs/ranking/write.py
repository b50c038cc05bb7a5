"""`write-v1`: write a query for a document, to train a retriever on.

    Write a search query that the document below answers, phrased the way someone who has not read the
    document would phrase it. Write only the query, on one line.

    Document: Search for flights between two airports. …
    Query:

A fixed retriever runs the query. The reward is the reciprocal rank of the document, unless the query copies
more from the document than people's queries do, or does not have their form (`rlkit.rewards.writing`). With
`encoder`, `learning_value` also measures how much the query improves that encoder on people's queries.

`scripts/write_pairs.py` writes training pairs with the trained model.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlkit.environment import Environment, Reply, Turn
from rlkit.envs.ranking.pairs.writing import INSTRUCTION, MAX_DOCUMENT_WORDS, read_query, writing_prompt
from rlkit.envs.ranking.query_statistics import QueryStatistics
from rlkit.errors import UserError, check_integer
from rlkit.retrieval.documents import EngineError, Query, Ranking, SearchEngine, passage_text, search_ids
from rlkit.retrieval.encoders import encode, is_dot_product, load_encoder
from rlkit.retrieval.learning_value import learning_values
from rlkit.retrieval.queries import judged_queries, open_collection, task_id
from rlkit.retrieval.retrievers import open_retriever, search_depth
from rlkit.rewards import writing

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

MAX_STATISTICS_PAIRS = 2000  # pairs from which the statistics of people's queries are computed
NUM_VALUE_PAIRS = 64  # people's queries for which the learning value of a query is computed


class JudgedPair(NamedTuple):
    """A query of a person, and a document that answers it."""

    query_id: str
    query: str
    document_id: str


class WriteEnvironment(Environment):
    """Environment for writing queries for documents.

    Args:
        collection: Collection with training queries; see `rlkit.retrieval.collections.base`.
        retriever: Retriever that runs the queries; see `rlkit.retrieval.retrievers`. A lexical one rewards
            copying more than a dense one.
        depth: Number of documents to retrieve; below this rank, the reward is 0.
        encoder: Encoder to be trained on the queries, for `learning_value`; None computes none. All documents
            are embedded and held in memory.
        examples: Number of training queries with their documents in the prompt.
        instruction: First part of the prompt, which says what kind of query to write.
        document_words: Maximum number of words of a document in the prompt; a longer one is truncated.
        folds, fold: Cross-validation folds; see `RerankEnvironment`.

    Raises:
        UserError: An argument is invalid, or the collection has no training queries.
    """

    id = "write-v1"
    metric = "own_words"
    max_turns = 2  # not 1: `respond` must see the model's turn to run its query, and then ends the rollout
    rewards: Mapping[str, Any] = {
        "own_words": writing.own_words,
        "round_trip": writing.round_trip,
        "copied": writing.copied,
        "natural_form": writing.natural_form,
        "learning_value": writing.learning_value,
    }

    def __init__(
        self,
        *,
        collection: str = "generated:2000:0",
        retriever: str = "dense:bundled:all-minilm-l6-v2",
        depth: int = 100,
        encoder: str | None = None,
        examples: int = 0,
        instruction: str = INSTRUCTION,
        document_words: int = MAX_DOCUMENT_WORDS,
        folds: int | None = None,
        fold: int = 0,
    ):
        check_integer("depth", depth, 1, 1000)
        check_integer("examples", examples, 0, 20)
        check_integer("document_words", document_words, 1)
        if not isinstance(instruction, str) or not instruction.strip():
            raise UserError(f"instruction must be a non-empty string, not {instruction!r:.60}")
        self.collection = open_collection(collection, folds, fold)
        if "train" not in self.collection.qrels:
            raise UserError(
                f"{self.collection.name} has no training queries, with which the written ones are compared: "
                "set folds to split its queries"
            )
        self.retriever, self.depth, self.encoder = retriever, depth, encoder
        self.examples, self.instruction, self.document_words = examples, instruction, document_words
        self.reward_weights: Mapping[str, float] = {"own_words": 1.0, "round_trip": 0.0, "copied": 0.0}
        if encoder is not None:
            self.reward_weights = {**self.reward_weights, "learning_value": 0.0}

    @cached_property
    def engine(self) -> SearchEngine:
        """Search engine that runs the queries."""
        return open_retriever(self.retriever, self.collection)

    @cached_property
    def document_texts(self) -> dict[str, str]:
        """Text of each document by judged id; that of its first passage if passages are ranked."""
        texts: dict[str, str] = {}
        for document in self.collection.documents():
            texts.setdefault(self.collection.judged_id(document.id), passage_text(document))
        return texts

    @cached_property
    def training_pairs(self) -> list[JudgedPair]:
        """Training queries with each of their documents, in a random order."""
        return self._judged_pairs("train", 0)

    @cached_property
    def _training_queries(self) -> dict[str, set[str]]:
        """Ids of the training queries of each document."""
        queries: dict[str, set[str]] = {}
        for pair in self.training_pairs:
            queries.setdefault(pair.document_id, set()).add(pair.query_id)
        return queries

    @cached_property
    def query_statistics(self) -> QueryStatistics:
        """Statistics of the training queries, with which written ones are compared."""
        pairs = [
            (pair.query, self.document_texts[pair.document_id])
            for pair in self.training_pairs[:MAX_STATISTICS_PAIRS]
        ]
        if not pairs:
            raise UserError(f"{self.collection.name} has no relevant document of its training queries")
        return QueryStatistics.of(pairs, self.document_texts.values())

    @cached_property
    def learning_value(self) -> LearningValue:
        """Learning value of queries for the encoder."""
        assert self.encoder is not None
        return LearningValue(self.encoder, self.document_texts, self.training_pairs[:NUM_VALUE_PAIRS])

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Return the first `n` pairs of a query of a split and a document that answers it.

        The model sees the document. Documents with several queries are several tasks, so that documents are
        as frequent as people ask for them.

        Columns: `prompt`, `task_id`, `query_id`, `query` (of a person, which no reward reads), `document_id`
        and `limits` (of the measures of a query).

        Raises:
            UserError: The split is unknown, or the retriever or the encoder cannot be opened.
        """
        import datasets

        # Building an index and embedding all documents may take longer than a reply of `respond` may.
        self.engine  # noqa: B018  # cached
        if self.encoder is not None:
            self.learning_value  # noqa: B018  # cached
        rows = [self._row(pair) for pair in self._judged_pairs(split, seed)[:n]]
        return datasets.Dataset.from_list(rows)

    def _judged_pairs(self, split: str, seed: int) -> list[JudgedPair]:
        pairs = [
            JudgedPair(query.id, query.text, name)
            for query in judged_queries(self.collection, split, None, seed)
            for name in query.relevant
            if name in self.document_texts
        ]
        # The pairs of a query must not be in a row: a batch would have them all.
        return sorted(pairs, key=lambda pair: _hash(str(seed), pair.query_id, pair.document_id))

    def _row(self, pair: JudgedPair) -> dict[str, Any]:
        prompt = self.prompt(pair.document_id)
        return {
            "prompt": prompt,
            "task_id": task_id(self.collection.name, pair.query_id, pair.document_id, prompt[0]["content"]),
            "query_id": pair.query_id,
            "query": pair.query,
            "document_id": pair.document_id,
            "limits": dict(self.query_statistics.limits),
        }

    def prompt(self, document_id: str) -> list[dict[str, str]]:
        """Return the prompt for a document. Its examples are about other documents."""
        # A query may have several documents. One that also asks for this document would give away the example
        # that `rlkit sft` trains on.
        excluded_queries = self._training_queries.get(document_id, set())
        examples: dict[str, str] = {}  # one query per document
        for pair in self.training_pairs:
            if len(examples) == self.examples:
                break
            if pair.query_id not in excluded_queries:
                examples.setdefault(pair.document_id, pair.query)
        return writing_prompt(
            self.document_texts[document_id],
            [(self.document_texts[name], query) for name, query in examples.items()],
            instruction=self.instruction,
            max_words=self.document_words,
        )

    def respond(self, turns: Sequence[Turn]) -> Sequence[Reply]:
        """Run the queries of all turns at once; every turn ends its rollout."""
        queries = [read_query(turn.messages[-1]["content"]) for turn in turns]
        indices = [i for i, query in enumerate(queries) if query]
        rankings = dict(zip(indices, self._search([queries[i] for i in indices]), strict=True))
        names = [turn.task["document_id"] for turn in turns]
        values: dict[int, float] = {}
        if self.encoder is not None and indices:
            mean_values = self.learning_value([queries[i] for i in indices], [names[i] for i in indices])
            values = dict(zip(indices, mean_values, strict=True))
        replies = []
        for i, (query, name) in enumerate(zip(queries, names, strict=True)):
            if i not in rankings:  # no query, so the rewards are 0
                replies.append(Reply(done=True))
            elif rankings[i].error is not None:
                replies.append(Reply(invalid=f"the search failed: {rankings[i].error}"))
            else:
                ids = list(dict.fromkeys(map(self.collection.judged_id, rankings[i].ids)))[: self.depth]
                record = {
                    "query": query,
                    "rank": ids.index(name) + 1 if name in ids else 0,
                    "measures": self.query_statistics.measure(query, self.document_texts[name]),
                }
                if i in values:
                    record["value"] = values[i]
                replies.append(Reply(done=True, record=record))
        return replies

    def _search(self, queries: Sequence[str]) -> Sequence[Ranking]:
        if not queries:
            return []
        depth = search_depth(self.collection, self.depth)
        try:
            return search_ids(self.engine, [Query(query) for query in queries], depth)
        except EngineError as error:
            return [Ranking(error=str(error)) for _ in queries]

    def answer(self, task: Mapping[str, Any]) -> str | None:
        """Return None: the reward needs the ranking that `respond` computes."""
        return None

    def example(self, task: Mapping[str, Any]) -> str | None:
        """Return the query of a person, which need not retrieve the document at rank 1."""
        return task["query"]


class LearningValue:
    """Learning values of queries (`rlkit.retrieval.learning_value`), averaged over people's queries.

    The unit is the root mean square of the values of people's queries for one another.

    Args:
        encoder: Name of the encoder that is to be trained.
        documents: Text of every document by id.
        pairs: People's queries with their documents, at least two.

    Raises:
        UserError: The encoder cannot be loaded or has another similarity than the cosine, or there are fewer
            than two pairs.
    """

    def __init__(self, encoder: str, documents: Mapping[str, str], pairs: Sequence[JudgedPair]):
        self.encoder = load_encoder(encoder)
        if is_dot_product(self.encoder) or self.encoder.similarity_fn_name != "cosine":
            raise UserError(f"encoder must be one that compares by cosine, which {encoder!r} does not")
        if len(pairs) < 2:
            raise UserError("learning_value needs at least two training queries")
        self.rows = {name: row for row, name in enumerate(documents)}
        self.documents = encode(self.encoder.encode_document, list(documents.values()), None)
        self.queries = encode(self.encoder.encode_query, [pair.query for pair in pairs], None)
        self.targets = np.array([self.rows[pair.document_id] for pair in pairs])
        values = learning_values(self.queries, self.targets, self.documents, self.queries, self.targets)
        between = values[~np.eye(len(pairs), dtype=bool)]
        self.unit = float(np.sqrt(np.mean(between**2))) or 1.0

    def __call__(self, queries: Sequence[str], document_ids: Sequence[str]) -> list[float]:
        """Return the mean value of each query, with the id of its document."""
        vectors = encode(self.encoder.encode_query, queries, None)
        targets = np.array([self.rows[name] for name in document_ids])
        values = learning_values(vectors, targets, self.documents, self.queries, self.targets)
        return (values.mean(1) / self.unit).tolist()


def _hash(*parts: str) -> bytes:
    return hashlib.sha256("\x1f".join(parts).encode()).digest()
