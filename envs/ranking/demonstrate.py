"""`demonstrate-v1`: answer a question after demonstrations that a retriever has found for it.

    user       Answer each question. Write only the answer.

               What was Apple's stock price at the end of May?
    assistant  FinanceTool
    user       I need a polished and concise resume

A demonstration is a turn of the chat. The demonstrations are training queries with the id of their relevant
document, and the answer of a task is such an id, too. Evaluations with different retrievers compare the
retrievers; `rlkit sft` and `rlkit train` with one are meta-training with retrieved demonstrations (arXiv
2307.00119). `rlkit.envs.ranking.pairs.demonstrations` makes training rows for a retriever.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlkit.environment import Environment
from rlkit.envs.ranking.pairs.rows import query_key
from rlkit.envs.ranking.prompts import prompt_line
from rlkit.errors import UserError, check_integer
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.documents import Document, EngineError, Query, SearchEngine, search_ids
from rlkit.retrieval.queries import judged_queries, open_collection, task_id
from rlkit.retrieval.retrievers import open_retriever, warn_about_empty
from rlkit.rewards import identification

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

RANDOM = "random"  # name of the retriever that draws demonstrations
MAX_WORDS = 60  # of the question of a demonstration; a longer one is truncated
INSTRUCTION = "Answer each question. Write only the answer."


@dataclass(frozen=True)
class Example:
    """A question with its answers, best first.

    Attributes:
        id: Id of the query.
        question: Text of the query.
        answers: Ids of its relevant documents; a demonstration shows the first one.
    """

    id: str
    question: str
    answers: tuple[str, ...]

    @property
    def text(self) -> str:
        """The question and the answer on separate lines, as retrievers index a demonstration."""
        return f"{' '.join(self.question.split())}\n{self.answers[0]}"


def demonstration_prompt(question: str, demonstrations: Sequence[Example]) -> list[dict[str, str]]:
    """Return the chat messages that ask a question after demonstrations, in their order."""
    messages = []
    for example in demonstrations:
        messages.append({"role": "user", "content": prompt_line(example.question, MAX_WORDS)})
        messages.append({"role": "assistant", "content": example.answers[0]})
    messages.append({"role": "user", "content": prompt_line(question)})
    messages[0]["content"] = f"{INSTRUCTION}\n\n{messages[0]['content']}"
    return messages


class DemonstrateEnvironment(Environment):
    """Environment for answers after retrieved demonstrations.

    Args:
        collection: Collection with judged queries; see `rlkit.retrieval.collections.base`. Its training
            queries are the demonstrations. Of the documents, only the ids are used.
        retriever: Name of a retriever (`rlkit.retrieval.retrievers`) that finds the demonstrations, or
            "random".
        demonstrations: Number of demonstrations in the prompt; 0 for none.
        folds: Number of cross-validation folds of the queries, for collections without training queries.
        fold: Index of the fold that is the test split.

    Raises:
        UserError: An argument is invalid.
    """

    id = "demonstrate-v1"
    metric = "hit"
    rewards: Mapping[str, Any] = {"hit": identification.hit}
    reward_weights: Mapping[str, float] = {"hit": 1.0}

    def __init__(
        self,
        *,
        collection: str = "generated:2000:0",
        retriever: str = "bm25",
        demonstrations: int = 3,
        folds: int | None = None,
        fold: int = 0,
    ):
        check_integer("demonstrations", demonstrations, 0, 100)
        self.collection = open_collection(collection, folds, fold)
        self.retriever, self.demonstrations = retriever, demonstrations

    @cached_property
    def examples(self) -> dict[str, Example]:
        """Training queries by id, without held-out questions, and each question once.

        Raises:
            UserError: There is no such query, or an answer is not one line.
        """
        held_out = {
            query_key(self.collection.queries[name])
            for split, judged in self.collection.qrels.items()
            if split != "train"
            for name in judged
        }
        by_question: dict[str, Example] = {}
        num_held_out = 0
        for example in self._read_split("train", 0):
            key = query_key(example.question)
            num_held_out += key in held_out
            if key not in held_out:
                # The queries are in the order of a hash of their ids, so the choice is that of the hash.
                by_question.setdefault(key, example)
        if num_held_out:
            logger.warning(
                "%d training queries of %s are also held-out queries; they are left out",
                num_held_out,
                self.collection.name,
            )
        if not by_question:
            raise UserError(f"{self.collection.name} has no training queries for demonstrations; set folds")
        return {example.id: example for example in by_question.values()}

    @cached_property
    def engine(self) -> SearchEngine:
        """Search engine over the demonstrations."""
        documents = [Document(example.id, "", example.text) for example in self.examples.values()]
        name = f"demonstrations of {self.collection.name}"
        bank = Collection(name, lambda: iter(documents), queries={}, qrels={})
        return open_retriever(self.retriever, bank)

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Return the first `n` questions of a split with their demonstrations.

        A question is never among its own demonstrations, and a held-out one is never a demonstration. The
        seed also draws random demonstrations.

        Columns: `prompt`, `task_id`, `query_id`, `query`, `relevant` (ids of the relevant documents, best
        first) and `demonstrations` (ids of their queries, best last).

        Raises:
            UserError: The split is unknown, or the retriever fails.
        """
        import datasets

        questions = self.questions(split, seed)[:n]
        rankings = self.find(questions, self.demonstrations, seed)
        rows = []
        for question, ranking in zip(questions, rankings, strict=True):
            # The best demonstration is next to the question.
            demonstrations = ranking[::-1]
            rows.append(
                {
                    "prompt": demonstration_prompt(question.question, demonstrations),
                    # Without the prompt, so that evaluations with several retrievers have the same tasks.
                    "task_id": task_id(self.collection.name, question.id, question.question),
                    "query_id": question.id,
                    "query": question.question,
                    "relevant": list(question.answers),
                    "demonstrations": [example.id for example in demonstrations],
                }
            )
        return datasets.Dataset.from_list(rows)

    def questions(self, split: str, seed: int = 0) -> list[Example]:
        """Return the questions of a split in the order of the seed, each training question once."""
        questions = self._read_split(split, seed)
        if split == "train":
            return [question for question in questions if question.id in self.examples]
        return questions

    def find(self, questions: Sequence[Example], k: int, seed: int = 0) -> list[list[Example]]:
        """Return up to `k` demonstrations of each question, best first, without the question itself.

        Args:
            questions: Questions.
            k: Number of demonstrations.
            seed: Random seed of the retriever "random".

        Raises:
            UserError: The search failed.
        """
        if k == 0:
            return [[] for _ in questions]
        if self.retriever == RANDOM:
            return [self.draw(question, k, seed) for question in questions]
        try:
            # One more, because a training question finds itself.
            results = search_ids(self.engine, [Query(question.question) for question in questions], k + 1)
        except EngineError as error:
            raise UserError(f"the search for demonstrations failed: {error}") from error
        rankings = []
        for question, result in zip(questions, results, strict=True):
            if result.error is not None:
                raise UserError(f"the search for demonstrations failed: {result.error}")
            if unknown := [name for name in result.ids if name not in self.examples]:
                raise UserError(
                    f"{self.retriever} finds {unknown[0]!r:.60}, which is no training query of "
                    f"{self.collection.name}: its documents must be the training queries, under their ids"
                )
            examples = [self.examples[name] for name in result.ids]
            rankings.append([example for example in examples if not same_question(example, question)][:k])
        warn_about_empty(sum(not ranking for ranking in rankings), len(rankings), self.retriever)
        return rankings

    def draw(self, question: Example, k: int, seed: int) -> list[Example]:
        """Return `k` random demonstrations of a question, ordered by a hash.

        The hash is of the seed, the question and the demonstration, so adding a training query changes at
        most one of them.
        """

        def order(example: Example) -> bytes:
            return hashlib.sha256(f"{seed} {question.id} {example.id}".encode()).digest()

        examples = [example for example in self.examples.values() if not same_question(example, question)]
        return sorted(examples, key=order)[:k]

    def answer(self, task: Mapping[str, Any]) -> str:
        """Return the best answer."""
        return task["relevant"][0]

    def _read_split(self, split: str, seed: int) -> list[Example]:
        """Return the questions of a split in the order of the seed."""
        questions = []
        for query in judged_queries(self.collection, split, None, seed):
            for name in query.relevant:
                if len(name.splitlines()) != 1 or name != name.strip():
                    raise UserError(
                        f"{self.collection.name}: the ids of the documents are the answers, so an id must be "
                        f"one line without white space around it, not {name!r:.60}; rename it in the qrels"
                    )
            questions.append(Example(query.id, query.text, tuple(query.relevant)))
        return questions


def same_question(example: Example, question: Example) -> bool:
    """Return whether a demonstration has the id or the text of a question."""
    return example.id == question.id or query_key(example.question) == query_key(question.question)
