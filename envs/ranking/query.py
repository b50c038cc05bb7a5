"""`query-v2`: write the queries with which a retriever finds what is relevant.

The model writes one or several queries, a fixed retriever runs them, their lists become one, and the reward
is its nDCG@10, or what it gains over the task's own query. Tool retrieval, query rewriting and reasoning
before the query differ in their prompts and collections (docs/environments/query.md). With `adaptive` the
model may leave the query as it is: `/embed`, or `/augment` and words that are added (M-Solomon's actions).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any

from rlkit.environment import Environment, HeldOutMeans, Reply, Turn
from rlkit.errors import UserError, check_choice
from rlkit.retrieval.documents import EngineError, Query, Result, SearchEngine
from rlkit.retrieval.measures import Evaluator
from rlkit.retrieval.queries import Judged, judged_queries, open_collection, task_id
from rlkit.retrieval.retrievers import how_many, open_retriever, ranked
from rlkit.rewards import querying

if TYPE_CHECKING:
    import datasets

K = 60  # of reciprocal-rank fusion
COMBINE = ("interleave", "fuse")
_PROMPTS = {
    "rewrite": "Write {queries} that would retrieve the documents that answer the request below.",
    "tools": "Write {queries} that describe the tools needed to fulfill the request below.",
    "reason": (
        "First work out what the request below is really asking, and think step by step about what "
        "information would help to answer it. Then write {queries} that cover what a helpful document would "
        "say."
    ),
}
STYLES = tuple(_PROMPTS)
_FORM = " Put each query between <query> and </query>.\n\nRequest: {query}"
_ADAPTIVE = (
    "The query below will be sent to a search engine. If it works well as it is, write only /embed. If "
    "additional words would help the engine find the right documents, write /augment followed by those "
    "words.\n\nQuery: {query}"
)
_QUERY = re.compile(r"<query>(.*?)</query>", re.DOTALL)
_AUGMENT = re.compile(r"/augment\b(.*)", re.DOTALL)


class QueryEnvironment(Environment):
    """Writing queries.

    Args:
        collection: see `rlkit.retrieval.collections.base`.
        retriever: what runs the queries: see `rlkit.retrieval.retrievers`.
        measure: what is rewarded: see `rlkit.retrieval.measures.Evaluator`.
        depth: documents that are found for a query, and that are ranked.
        max_queries: further ones are not run.
        combine: how lists become one: "interleave", in turns without repeats, or "fuse", by reciprocal rank.
        prompt_style: "rewrite", "tools" or "reason".
        adaptive: whether the model decides to change the query at all.
        folds, fold: see `RerankEnvironment`.

    Raises:
        UserError: arguments that do not fit.
    """

    id = "query-v2"
    metric = "retrieval"
    max_turns = 2  # the environment sees the first one and ends the rollout

    def __init__(
        self,
        *,
        collection: str = "generated:2000:0",
        retriever: str = "bm25",
        measure: str = "ndcg@10",
        depth: int = 100,
        max_queries: int = 3,
        combine: str = "interleave",
        prompt_style: str = "rewrite",
        adaptive: bool = False,
        folds: int | None = None,
        fold: int = 0,
    ):
        check_choice("combine", combine, COMBINE)
        check_choice("prompt_style", prompt_style, STYLES)
        if not (1 <= depth <= 1000 and 1 <= max_queries <= 20):
            raise UserError(
                f"depth must be from 1 to 1000 and max_queries from 1 to 20, not {depth} and {max_queries}"
            )
        try:
            Evaluator({}, [measure])
        except ValueError as error:
            raise UserError(str(error)) from None
        self.collection = open_collection(collection, folds, fold)
        self.retriever, self.measure, self.depth = retriever, measure, depth
        self.max_queries, self.combine = max_queries, combine
        self.prompt_style, self.adaptive = prompt_style, adaptive
        measured: dict[str, Any] = {
            "retrieval": querying.retrieval,
            "gain": querying.gain,
            "priced": querying.priced,
        }
        self.rewards: Mapping[str, Any] = {
            **{name: partial(reward, measure=measure) for name, reward in measured.items()},
            "augmented": querying.augmented,
        }
        paid = "priced" if adaptive else "retrieval"
        logged = ("retrieval", "gain", "augmented") if adaptive else ("gain",)
        self.reward_weights = {paid: 1.0, **dict.fromkeys(logged, 0.0)}

    @cached_property
    def engine(self) -> SearchEngine:
        """What runs the queries."""
        return open_retriever(self.retriever, self.collection)

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Make the first `n` queries of a split.

        Columns: `prompt`, `task_id`, `split`, `query_id`, `query`, `judged` and `grades` (documents above 0),
        `original` (what the query finds as it is).

        Raises:
            UserError: no such split, or a retriever that fails.
        """
        import datasets

        asked = judged_queries(self.collection, split, n, seed)
        found = self._search([one.text for one in asked])
        rows = []
        for one, result in zip(asked, found, strict=True):
            if result.error is not None:
                raise UserError(f"the search failed: {result.error}")
            rows.append(self._row(split, one, self._ids(one.id, [result])))
        return datasets.Dataset.from_list(rows)

    def _row(self, split: str, one: Judged, original: Sequence[str]) -> dict[str, Any]:
        relevant = {name: grade for name, grade in one.grades.items() if grade > 0}
        text = self._prompt(one.text)
        return {
            "prompt": [{"role": "user", "content": text}],
            "task_id": task_id(self.collection.name, one.id, text),
            "split": split,
            "query_id": one.id,
            "query": one.text,
            "judged": list(relevant),
            "grades": list(relevant.values()),
            "original": list(original),
        }

    def _prompt(self, query: str) -> str:
        if self.adaptive:
            return _ADAPTIVE.format(query=query)
        queries = "a search query" if self.max_queries == 1 else f"up to {self.max_queries} search queries"
        return _PROMPTS[self.prompt_style].format(queries=queries) + _FORM.format(query=query)

    def respond(self, turns: Sequence[Turn]) -> Sequence[Reply]:
        """Run the queries of all turns at once; every turn ends its rollout."""
        written = [self.read(turn.messages[-1]["content"], turn.task["query"]) for turn in turns]
        results = iter(self._search([text for queries in written for text in queries or ()]))
        replies = []
        for turn, queries in zip(turns, written, strict=True):
            lists = list(islice(results, len(queries or ())))
            failed = [one.error for one in lists if one.error is not None]
            if failed:
                replies.append(Reply(invalid=f"the search failed: {failed[0]}"))
            elif not queries:  # nothing was asked: the rewards are 0
                replies.append(Reply(done=True))
            else:
                own = queries == [turn.task["query"]]
                ranking = self._ids(turn.task["query_id"], lists)
                replies.append(Reply(done=True, record={"ranking": ranking, "augmented": not own}))
        return replies

    def read(self, text: str, query: str) -> list[str] | None:
        """The queries that a turn asks for; None where it has none."""
        text = text.rpartition("</think>")[2]
        if self.adaptive:
            if (words := _AUGMENT.search(text)) and words[1].strip():
                return [f"{query} {' '.join(words[1].split())}"]
            return [query] if text.strip() == "/embed" else None
        found = [" ".join(one.split()) for one in _QUERY.findall(text)]
        return [one for one in dict.fromkeys(found) if one][: self.max_queries] or None

    def _search(self, texts: Sequence[str]) -> Sequence[Result]:
        queries = [Query(text) for text in texts]
        try:
            return self.engine.search(queries, how_many(self.collection, self.depth)) if texts else []
        except EngineError as error:
            return [Result(error=str(error)) for _ in texts]

    def _ids(self, query: str, results: Iterable[Result]) -> list[str]:
        lists = [[d.id for d in ranked(self.collection, query, one, self.depth)] for one in results]
        return (interleave if self.combine == "interleave" else fuse)(lists)[: self.depth]

    @classmethod
    def report_panels(cls, runs: Sequence[HeldOutMeans]) -> Sequence[Mapping[str, Any]]:
        """The metric against the share of queries that were changed, which has a price."""
        return frontier(runs, cls.metric)

    def answer(self, task: Mapping[str, Any]) -> str | None:
        """None: what is right is known only to the retriever."""
        return None

    def script(self, task: Mapping[str, Any]) -> Sequence[str] | None:
        """The texts of relevant documents as queries, where that finds all that the measure asks for.

        Only without `adaptive`: one who knows the documents copies them.
        """
        if self.adaptive:
            return None
        best = sorted(zip(task["judged"], task["grades"], strict=True), key=lambda pair: -pair[1])
        texts = [self._texts[name] for name, _ in best[: self.max_queries]]
        turn = "\n".join(f"<query>{text}</query>" for text in texts)
        ranking = self._ids(task["query_id"], self._search(self.read(turn, task["query"]) or []))
        scored = querying.retrieval(
            [{"role": "assistant", "ranking": ranking}], task["judged"], task["grades"], self.measure
        )
        return [turn] if scored > 1 - 1e-9 else None

    @cached_property
    def _texts(self) -> dict[str, str]:
        """All documents, for scripts alone: collections with scripts are small."""
        found: dict[str, str] = {}
        for one in self.collection.documents():
            found.setdefault(self.collection.judged_id(one.id), f"{one.title} {one.text}".replace("<", " "))
        return found


def interleave(lists: Sequence[Sequence[str]]) -> list[str]:
    """The first of each list, then the second ones, and so on; a document counts where it comes first."""
    ranks = zip_longest(*lists)
    return list(dict.fromkeys(name for rank in ranks for name in rank if name is not None))


def fuse(lists: Sequence[Sequence[str]]) -> list[str]:
    """By the sum of 1 / (60 + rank) over the lists, highest first; equal ones as they are met."""
    scores: dict[str, float] = {}
    for names in lists:
        for rank, name in enumerate(names, 1):
            scores[name] = scores.get(name, 0.0) + 1 / (K + rank)
    return sorted(scores, key=scores.__getitem__, reverse=True)


def frontier(runs: Sequence[HeldOutMeans], metric: str) -> list[dict[str, Any]]:
    """A plot of the metric against how often the query was changed, a point for each evaluation.

    The first point of a run, "never", is what the task's own queries find: the metric less the `gain`.
    """
    traces = []
    for run in runs:
        points = [
            (rewards["augmented"], run.metric[name], name)
            for name, rewards in run.rewards.items()
            if "augmented" in rewards
        ]
        if not points:
            continue
        _, mean, first = points[0]
        if "gain" in run.rewards[first]:
            points.insert(0, (0.0, mean - run.rewards[first]["gain"], "never"))
        rates, means, names = zip(*points, strict=True)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers+text",
                "x": list(rates),
                "y": list(means),
                "text": list(names),
                "textposition": "top center",
                "name": run.run,
                "line": {"color": run.color, "width": 1, "dash": "dot"},
                "marker": {"size": 10, "color": run.color},
            }
        )
    if not traces:
        return []
    return [
        {
            "title": f"{metric} against the share of augmented queries",
            "note": "Held-out tasks. Up and to the left is better: more for fewer.",
            "traces": traces,
            "layout": {
                "xaxis": {
                    "title": "share of answers that are augmented",
                    "range": [-0.05, 1.05],
                    "tickformat": "~%",
                },
                "yaxis": {"title": f"mean {metric}"},
                "showlegend": len(runs) > 1,
            },
        }
    ]
