"""`query-v4`: write queries with which a retriever finds relevant documents.

The model writes one or more queries, and a fixed retriever runs them. Their rankings are merged, and the
reward is the nDCG@10 of the merged ranking. The same environment covers query rewriting, tool retrieval and
reasoning before the query, with different prompts and collections (docs/environments/query.md). With
`adaptive`, the model decides whether to change the query: it writes `/embed` to keep it, or `/augment` and
words to append (the actions of M-Solomon).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any

from rlkit.environment import Environment, HeldOutMeans, Reply, Turn
from rlkit.envs.ranking.prompts import prompt_line
from rlkit.errors import UserError, check_choice, check_integer
from rlkit.retrieval.documents import EngineError, Query, Result, SearchEngine
from rlkit.retrieval.engines.hybrid import fuse
from rlkit.retrieval.measures import canonical_measure, parse_measure
from rlkit.retrieval.queries import JudgedQuery, judged_queries, open_collection, task_id
from rlkit.retrieval.retrievers import (
    excluded_ids,
    open_retriever,
    search_depth,
    top_documents,
    warn_about_empty,
)
from rlkit.rewards import querying
from rlkit.rewards.tags import tag_contents
from rlkit.rewards.thinking import after_thinking

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

COMBINE_METHODS = ("interleave", "fuse")
_PROMPTS = {
    "rewrite": "Write {queries} that would retrieve the documents that answer the request below.",
    "tools": "Write {queries} that describe the tools needed to fulfill the request below.",
    "reason": (
        "First work out what the request below is really asking, and think step by step about what "
        "information would help to answer it. Then write {queries} that cover what a helpful document would "
        "say."
    ),
}
PROMPT_STYLES = tuple(_PROMPTS)
_QUERY_FORMAT = " Put each query between <query> and </query>.\n\nRequest: {query}"
_ADAPTIVE = (
    "The query below will be sent to a search engine. If it works well as it is, write only /embed. If "
    "additional words would help the engine find the right documents, write /augment followed by those "
    "words.\n\nQuery: {query}"
)
_AUGMENT = re.compile(r"/augment\b(.*)", re.DOTALL)


class QueryEnvironment(Environment):
    """Environment for writing queries.

    Args:
        collection: Collection with judged queries; see `rlkit.retrieval.collections.base`.
        retriever: Retriever that runs the queries; see `rlkit.retrieval.retrievers`.
        measure: Measure that is the reward, in any spelling of `rlkit.retrieval.measures.canonical_measure`.
        depth: Number of documents to retrieve for each query, and length of the merged ranking.
        max_queries: Maximum number of queries to run; the others are ignored.
        combine: Method that merges rankings: "interleave" takes from each in turn and skips repeats; "fuse"
            is reciprocal rank fusion.
        prompt_style: Style of the prompt: "rewrite", "tools" or "reason".
        adaptive: Whether the model can keep the query unchanged.
        require_tag: Whether an answer without a <query> tag has no query. If false, its first line that is
            not empty is the query, so that a model that has not learned the format can be a baseline.
        folds, fold: Cross-validation folds; see `RerankEnvironment`.
        drop_query_id: Whether the document with the id of the query is left out; None follows the benchmark.

    Raises:
        UserError: An argument is invalid.
    """

    id = "query-v4"
    metric = "retrieval"
    max_turns = 2  # not 1: `respond` must see the model's turn to run its queries, and then ends the rollout

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
        require_tag: bool = True,
        folds: int | None = None,
        fold: int = 0,
        drop_query_id: bool | None = None,
    ):
        check_choice("combine", combine, COMBINE_METHODS)
        check_choice("prompt_style", prompt_style, PROMPT_STYLES)
        check_integer("depth", depth, 1, 1000)
        check_integer("max_queries", max_queries, 1, 20)
        if not isinstance(require_tag, bool):
            raise UserError(f"require_tag must be true or false, not {require_tag!r}")
        if adaptive and not require_tag:
            raise UserError("adaptive answers have no tags: remove require_tag")
        try:
            self.measure = canonical_measure(measure)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.collection = open_collection(collection, folds, fold, drop_query_id)
        self.retriever, self.depth = retriever, depth
        self.max_queries, self.combine = max_queries, combine
        self.prompt_style, self.adaptive, self.require_tag = prompt_style, adaptive, require_tag
        self.rewards: Mapping[str, Any] = {
            "retrieval": partial(querying.retrieval, measure=self.measure),
            "gain": partial(querying.gain, measure=self.measure),
            "priced": partial(querying.priced, measure=self.measure),
            "augmented": querying.augmented,
        }
        if adaptive:
            self.reward_weights = {"priced": 1.0, "retrieval": 0.0, "gain": 0.0, "augmented": 0.0}
        else:
            self.reward_weights = {"retrieval": 1.0, "gain": 0.0}

    @cached_property
    def engine(self) -> SearchEngine:
        """Search engine that runs the queries."""
        return open_retriever(self.retriever, self.collection)

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Return the first `n` queries of a split.

        Training queries without a document that is relevant for the measure are left out.

        Columns: `prompt`, `task_id`, `split`, `query_id`, `query`, `judged` and `grades` (ids and grades of
        the documents that are relevant for the measure), `original` (ids that the unchanged query retrieves).

        Raises:
            UserError: The split is unknown, or the retriever fails.
        """
        import datasets

        queries = judged_queries(self.collection, split, None, seed)
        if split == "train":
            num_judged = len(queries)
            queries = [query for query in queries if self._relevant(split, query)]
            if len(queries) < num_judged:
                logger.warning(
                    "%d of %d training queries have no document that is relevant for %s and are left out",
                    num_judged - len(queries),
                    num_judged,
                    self.measure,
                )
        queries = queries[:n]
        results = self._search([query.text for query in queries])
        rows = []
        for query, result in zip(queries, results, strict=True):
            if result.error is not None:
                raise UserError(f"the search failed: {result.error}")
            rows.append(self._row(split, query, self._merged_ranking(query.id, [result])))
        warn_about_empty(sum(not row["original"] for row in rows), len(rows), self.retriever)
        return datasets.Dataset.from_list(rows)

    def _relevant(self, split: str, query: JudgedQuery) -> dict[str, int]:
        """Return the grades of the documents that count as relevant for the measure, as in `rlkit eval`.

        nDCG uses all grades above 0. For the other measures, the name can have a minimum grade, as in
        "rr(rel=2)@10". Otherwise the collection may have binary judgments or a minimum grade.
        """
        measure, grades = parse_measure(self.measure), query.grades
        min_grade = measure.min_grade or 1
        if measure.kind != "ndcg" and measure.min_grade is None:
            if binary := self.collection.binary.get(split):
                grades = binary.get(query.id, grades)
            else:
                min_grade = self.collection.min_grade(measure.kind)
        return {name: grade for name, grade in grades.items() if grade >= min_grade}

    def _row(self, split: str, query: JudgedQuery, original: Sequence[str]) -> dict[str, Any]:
        relevant = self._relevant(split, query)
        text = self._prompt(prompt_line(query.text))
        return {
            "prompt": [{"role": "user", "content": text}],
            "task_id": task_id(self.collection.name, query.id, text),
            "split": split,
            "query_id": query.id,
            "query": query.text,
            "judged": list(relevant),
            "grades": list(relevant.values()),
            "original": list(original),
        }

    def _prompt(self, query: str) -> str:
        if self.adaptive:
            return _ADAPTIVE.format(query=query)
        queries = "a search query" if self.max_queries == 1 else f"up to {self.max_queries} search queries"
        return _PROMPTS[self.prompt_style].format(queries=queries) + _QUERY_FORMAT.format(query=query)

    def respond(self, turns: Sequence[Turn]) -> Sequence[Reply]:
        """Run the queries of all turns at once; every turn ends its rollout."""
        parsed = [self.parse_queries(turn.messages[-1]["content"], turn.task["query"]) for turn in turns]
        # One search for the queries of all turns, because engines are faster on batches. The results keep the
        # order of the queries, so each turn takes its share from the iterator.
        results = iter(self._search([text for queries in parsed for text in queries or ()]))
        replies = []
        for turn, queries in zip(turns, parsed, strict=True):
            turn_results = list(islice(results, len(queries or ())))
            errors = [result.error for result in turn_results if result.error is not None]
            if errors:
                replies.append(Reply(invalid=f"the search failed: {errors[0]}"))
            elif not queries:  # no ranking, so the rewards are 0
                replies.append(Reply(done=True))
            else:
                augmented = queries != [turn.task["query"]]
                ranking = self._merged_ranking(turn.task["query_id"], turn_results)
                replies.append(Reply(done=True, record={"ranking": ranking, "augmented": augmented}))
        return replies

    def parse_queries(self, completion: str, query: str) -> list[str] | None:
        """Return the queries of a completion, or None if it has none.

        Args:
            completion: Completion of the model.
            query: The task's own query, which `/embed` keeps and `/augment` extends.
        """
        text = after_thinking(completion)
        if self.adaptive:
            if (augment := _AUGMENT.search(text)) and augment[1].strip():
                return [f"{query} {' '.join(augment[1].split())}"]
            return [query] if text.strip() == "/embed" else None
        contents = tag_contents(text, "query")
        if not contents and not self.require_tag:
            contents = [line for line in text.splitlines() if line.strip()][:1]
        queries = [" ".join(content.split()) for content in contents]
        return [text for text in dict.fromkeys(queries) if text][: self.max_queries] or None

    def _search(self, texts: Sequence[str]) -> Sequence[Result]:
        if not texts:
            return []
        queries = [Query(text) for text in texts]
        try:
            return self.engine.search(queries, search_depth(self.collection, self.depth))
        except EngineError as error:
            return [Result(error=str(error)) for _ in texts]

    def _merged_ranking(self, query_id: str, results: Iterable[Result]) -> list[str]:
        rankings = []
        for result in results:
            documents = top_documents(self.collection, query_id, result, self.depth)
            rankings.append([document.id for document in documents])
        merged = interleave(rankings) if self.combine == "interleave" else list(fuse(rankings))
        return merged[: self.depth]

    @classmethod
    def report_panels(cls, runs: Sequence[HeldOutMeans]) -> Sequence[Mapping[str, Any]]:
        """Return a plot of the metric against the fraction of changed queries; each change has a price."""
        return frontier(runs, cls.metric)

    def answer(self, task: Mapping[str, Any]) -> str | None:
        """Return None: the reward needs the ranking that `respond` computes."""
        return None

    def script(self, task: Mapping[str, Any]) -> Sequence[str] | None:
        """Return a turn with relevant documents as queries, if it earns the full reward.

        None with `adaptive`: `/augment` only extends the task's query, and each change has a price.
        """
        if self.adaptive:
            return None
        best = sorted(zip(task["judged"], task["grades"], strict=True), key=lambda pair: -pair[1])
        excluded = excluded_ids(self.collection, task["query_id"])
        names = [name for name, _ in best if name in self._document_texts and name not in excluded]
        texts = [self._document_texts[name] for name in names[: self.max_queries]]
        turn = "\n".join(f"<query>{text}</query>" for text in texts)
        queries = self.parse_queries(turn, task["query"]) or []
        ranking = self._merged_ranking(task["query_id"], self._search(queries))
        reward = querying.retrieval(
            [{"role": "assistant", "ranking": ranking}], task["judged"], task["grades"], self.measure
        )
        return [turn] if reward > 1 - 1e-9 else None

    @cached_property
    def _document_texts(self) -> dict[str, str]:
        """Text of every document by judged id. Only `script` needs them, on small collections."""
        texts: dict[str, str] = {}
        for document in self.collection.documents():
            # "<" could close the tag of the query.
            text = f"{document.title} {document.text}".replace("<", " ")
            texts.setdefault(self.collection.judged_id(document.id), text)
        return texts


def interleave(rankings: Sequence[Sequence[str]]) -> list[str]:
    """Merge rankings rank by rank: the first of each, then the second of each; a repeat is skipped."""
    ranks = zip_longest(*rankings)
    return list(dict.fromkeys(name for rank in ranks for name in rank if name is not None))


def frontier(runs: Sequence[HeldOutMeans], metric: str) -> list[dict[str, Any]]:
    """Return a plot of the metric against the fraction of changed queries, with a point per evaluation.

    The first point of a run, "never", is the metric of the unchanged queries: the metric minus the `gain`.
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
            "note": "Held-out tasks. Up and to the left is better: a higher metric with fewer changes.",
            "traces": traces,
            "layout": {
                "xaxis": {
                    "title": "share of augmented queries",
                    "range": [-0.05, 1.05],
                    "tickformat": "~%",
                },
                "yaxis": {"title": f"mean {metric}"},
                "showlegend": len(runs) > 1,
            },
        }
    ]
