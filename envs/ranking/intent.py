"""`intent-v2`: say what a searcher wants, from what was relevant to the query and what was not (Q2ID).

The model sees a query with a few relevant and irrelevant snippets and writes a description. It is judged by
the documents that it tells apart: those that were shown, and as many that were not, are ranked by how well
they fit it, and the reward is the average precision of the relevant ones, less what was copied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlkit.environment import Environment, Reply, Turn
from rlkit.envs.ranking.scoring import Fit, open_scorer
from rlkit.errors import UserError
from rlkit.retrieval.documents import Document, EngineError, Query, SearchEngine, full_text
from rlkit.retrieval.queries import Judged, cut, documents_of, judged_queries, open_collection, task_id
from rlkit.retrieval.retrievers import how_many, open_retriever, ranked
from rlkit.rewards import intent

if TYPE_CHECKING:
    import datasets

_PROMPT = (
    "Someone searched for: {query}\n\nThese documents are what they were looking for:\n{relevant}\n\n"
    "These documents are not:\n{irrelevant}\n\nIn one or two sentences and in your own words, describe what "
    "they were looking for, so that relevant documents can be told from irrelevant ones. Write the "
    "description between <intent> and </intent>."
)
_INTENT = re.compile(r"<intent>(.*?)</intent>", re.DOTALL)
_WORD = re.compile(r"\w+")
DEPTH = 100  # results of the query among which irrelevant ones are looked for


class IntentEnvironment(Environment):
    """Describing an intent.

    Args:
        collection: see `rlkit.retrieval.collections.base`.
        retriever: what finds irrelevant documents for the query: see `rlkit.retrieval.retrievers`.
        shown: relevant and irrelevant snippets in the prompt, so many each; as many further ones are ranked,
            where there are any.
        document_words: a longer snippet is cut.
        scorer: what ranks documents by the description: "bm25", or "dense:MODEL" with any model of
            sentence-transformers.
        folds, fold: see `RerankEnvironment`.

    Raises:
        UserError: arguments that do not fit.
    """

    id = "intent-v2"
    metric = "separation"
    max_turns = 2  # the environment sees the first one and ends the rollout
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
    ):
        if not 1 <= shown <= 20 or document_words < 1:
            raise UserError(
                f"shown must be from 1 to 20 and document_words at least 1, not {shown} and {document_words}"
            )
        if scorer != "bm25" and not re.fullmatch("dense:.+", scorer):
            raise UserError(f"there is no scorer {scorer!r}: take bm25 or dense:MODEL")
        self.collection = open_collection(collection, folds, fold)
        self.retriever, self.shown, self.document_words = retriever, shown, document_words
        self.scorer = scorer

    @cached_property
    def engine(self) -> SearchEngine:
        """What finds irrelevant documents."""
        return open_retriever(self.retriever, self.collection)

    @cached_property
    def fit(self) -> Fit:
        """What tells how well texts fit a description."""
        return open_scorer(self.scorer)

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Make the first `n` queries of a split that find something irrelevant.

        Columns: `prompt`, `task_id`, `split`, `query_id`, `query`, `snippets` (that were shown), `pool` (ids
        of what is ranked, what is irrelevant first), `texts` (of the pool), `relevant` (ids).

        Raises:
            UserError: no such split, or a retriever that fails.
        """
        import datasets

        asked = judged_queries(self.collection, split, None, seed)
        rows: list[dict[str, Any]] = []
        while asked and (n is None or len(rows) < n):
            block, asked = asked[:n], asked[n:] if n else []
            found = self._irrelevant(block)
            texts = documents_of(self.collection, (name for one in block for name in self._relevant(one)))
            chosen = ((one, [texts[name] for name in self._relevant(one)]) for one in block)
            rows += [self._row(split, one, good, found[one.id]) for one, good in chosen if found[one.id]]
        return datasets.Dataset.from_list(rows[:n])

    def _relevant(self, one: Judged) -> list[str]:
        """Ids of documents of the highest grade, those to show first."""
        best = [name for name, grade in one.grades.items() if grade == one.ideal[0]]
        return sorted(best, key=lambda name: task_id(one.id, name))[: 2 * self.shown]

    def _irrelevant(self, asked: Sequence[Judged]) -> dict[str, list[Document]]:
        """Documents that the query finds and that nobody judged relevant, those to show first."""
        queries = [Query(one.text) for one in asked]
        try:
            results = self.engine.search(queries, how_many(self.collection, DEPTH))
        except EngineError as error:
            raise UserError(f"the search failed: {error}") from error
        found = {}
        for one, result in zip(asked, results, strict=True):
            if result.error is not None:
                raise UserError(f"the search failed: {result.error}")
            first = ranked(self.collection, one.id, result, DEPTH)
            first = [document for document in first if one.grades.get(document.id, 0) <= 0][: 2 * self.shown]
            found[one.id] = sorted(first, key=lambda document: task_id(one.id, document.id))
        return found

    def _row(
        self, split: str, one: Judged, good: Sequence[Document], bad: Sequence[Document]
    ) -> dict[str, Any]:
        shown = [self._shown(documents) for documents in (good, bad)]
        lines = ["\n".join(f"- {snippet}" for snippet in snippets) for snippets in shown]
        prompt = _PROMPT.format(query=one.text, relevant=lines[0], irrelevant=lines[1])
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "task_id": task_id(self.collection.name, one.id, prompt),
            "split": split,
            "query_id": one.id,
            "query": one.text,
            "snippets": shown[0] + shown[1],
            "pool": [document.id for document in (*bad, *good)],
            "texts": [full_text(document) for document in (*bad, *good)],
            "relevant": [document.id for document in good],
        }

    def _shown(self, documents: Sequence[Document]) -> list[str]:
        """The first half, cut; at least one."""
        first = documents[: min(self.shown, (len(documents) + 1) // 2)]
        texts = (f"{document.title}: {document.text}".removeprefix(": ") for document in first)
        return [cut(text, self.document_words) for text in texts]

    def respond(self, turns: Sequence[Turn]) -> Sequence[Reply]:
        """Rank the pools by the descriptions; every turn ends its rollout."""
        return [self._reply(turn.task, read(turn.messages[-1]["content"])) for turn in turns]

    def _reply(self, task: Mapping[str, Any], text: str | None) -> Reply:
        if text is None:
            return Reply(done=True)
        scores = self.fit(text, task["texts"])
        # Irrelevant ones come first in the pool: a description that tells nothing apart gains nothing.
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        return Reply(done=True, record={"intent": text, "ranking": [task["pool"][i] for i in order]})

    def answer(self, task: Mapping[str, Any]) -> str | None:
        """None: what is right is known only to what ranks."""
        return None

    def script(self, task: Mapping[str, Any]) -> Sequence[str] | None:
        """All words that only relevant documents have, where they tell them apart."""
        bad = len(task["pool"]) - len(task["relevant"])
        known = {word for text in task["texts"][:bad] for word in _WORD.findall(text.lower())}
        words = {word for text in task["texts"][bad:] for word in _WORD.findall(text.lower())} - known
        turn = f"<intent>{' '.join(sorted(words))}</intent>"
        said = [{"role": "assistant", **self._reply(task, read(turn)).record}]
        marks = intent.own_words(said, task["relevant"], task["pool"], task["snippets"])
        return [turn] if marks == 1 else None


def read(text: str) -> str | None:
    """The description of a turn, None where it has none."""
    found = _INTENT.findall(text.rpartition("</think>")[2])
    return (" ".join(found[-1].split()) or None) if found else None
