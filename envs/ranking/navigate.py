"""`navigate-v4`: find documents by searching a tree of clusters from the root (LATTICE, arXiv 2510.13217).

Each turn shows the children of the most promising nodes. The model scores them from 0 to 100, and best-first
search over the entire tree (`rlkit.envs.ranking.beam`) selects the nodes to open next. The search ends when
the model writes `stop`, when there is no node to open, or after `turns` turns. The reward is the nDCG@10 of
the scored documents minus a price for additional turns.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlkit.environment import Environment, Reply, Turn
from rlkit.envs.ranking.beam import Beam, Slate
from rlkit.envs.ranking.prompts import prompt_line
from rlkit.envs.ranking.tree import Tree, open_tree
from rlkit.errors import UserError, check_integer
from rlkit.retrieval.queries import JudgedQuery, judged_queries, open_collection, task_id
from rlkit.retrieval.retrievers import excluded_ids
from rlkit.rewards import navigation
from rlkit.rewards.thinking import after_thinking

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

K = 10  # cutoff of the reward's nDCG
_PROMPT = (
    "A document collection is organized as a tree of sections. Find the documents that answer the query. "
    "Score each section or document you are shown from 0 (certainly not useful) to 100 (certainly useful), "
    "one per line:\n[1] 80\n[2] 0\nThe {width} best sections are opened next. You have at most {turns} "
    "turns. When you have found enough, write stop on a separate line after the scores.\n\n"
    "Query: {query}\n\n{shown}"
)
# "[1] 80", "[1]: 80" or "[1] = 80", but not a decimal number such as 0.5.
# Possessive quantifiers: `\s*[:=]?\s*` is quadratic on white space.
_SCORE = re.compile(r"\[(\d{1,4})\]\s*+[:=]?+\s*+(\d{1,3})(?![\d.])")


class NavigateEnvironment(Environment):
    """Environment for finding documents in a tree.

    Args:
        collection: Collection with judged queries; see `rlkit.retrieval.collections.base`.
        embedder: Vectors to cluster: "words" for tf-idf, or "dense:MODEL" with any sentence-transformers
            model.
        branching: Approximate number of children of a node.
        summaries: Description of a section: "words" for frequent words and titles of its documents, or the
            name of a model that writes it.
        document_words: Maximum number of words of a document; a longer one is truncated.
        width: Beam width: number of nodes that are opened in each turn.
        turns: Maximum number of assistant turns.
        alpha: Weight of a node's own score in its path relevance.
        anchors: Maximum number of already scored documents to score again in a slate, for calibration; 0
            disables calibration.
        folds, fold: Cross-validation folds; see `RerankEnvironment`.
        drop_query_id: Whether the document with the id of the query is left out; None follows the benchmark.

    Raises:
        UserError: An argument is invalid.
    """

    id = "navigate-v4"
    metric = "found"
    rewards: Mapping[str, Any] = {
        "found": navigation.found,
        "priced": navigation.priced,
        "steps": navigation.steps,
    }
    reward_weights: Mapping[str, float] = {"priced": 1.0, "found": 0.0, "steps": 0.0}

    def __init__(
        self,
        *,
        collection: str = "generated:2000:0",
        embedder: str = "words",
        branching: int = 10,
        summaries: str = "words",
        document_words: int = 30,
        width: int = 2,
        turns: int = 10,
        alpha: float = 0.5,
        anchors: int = 0,
        folds: int | None = None,
        fold: int = 0,
        drop_query_id: bool | None = None,
    ):
        check_integer("branching", branching, 2, 100)
        check_integer("width", width, 1, 20)
        check_integer("turns", turns, 1)
        check_integer("document_words", document_words, 1)
        check_integer("anchors", anchors, 0, 100)
        if not 0 < alpha <= 1:
            raise UserError(f"alpha must be above 0 and at most 1, not {alpha}")
        self.collection = open_collection(collection, folds, fold, drop_query_id)
        self.embedder, self.branching, self.summaries = embedder, branching, summaries
        self.document_words, self.width, self.turns = document_words, width, turns
        self.alpha, self.anchors = alpha, anchors
        self.max_turns = turns + 1  # `respond` must see the last turn too, to score it and end the rollout

    @cached_property
    def tree(self) -> Tree:
        """Tree to search, built on first use."""
        return open_tree(self.collection, self.embedder, self.branching, self.document_words, self.summaries)

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Return the first `n` queries of a split.

        Documents that are excluded for a query are not shown, and neither are sections without other
        documents. Training queries for which no relevant document is in the tree are left out.

        Columns: `prompt`, `task_id`, `split`, `query_id`, `query`, `judged` and `grades` (ids and grades of
        the relevant documents in the tree), `ideal` (grades of all relevant documents, highest first),
        `excluded` (ids of documents that are not shown), `fewest` (number of turns that the oracle needs, at
        most `turns`).

        Raises:
            UserError: The split is unknown, or the tree cannot be built.
        """
        import datasets

        rows: list[dict[str, Any]] = []
        num_left_out = 0
        for query in judged_queries(self.collection, split, None, seed):
            if n is not None and len(rows) >= n:
                break
            row = self._row(split, query)
            if split == "train" and not row["judged"]:
                num_left_out += 1
                continue
            row["fewest"] = len(self._oracle_turns(row))
            rows.append(row)
        if num_left_out:
            logger.warning(
                "%d of %d training queries have no relevant document in the tree and are left out",
                num_left_out,
                num_left_out + len(rows),
            )
        return datasets.Dataset.from_list(rows)

    def _row(self, split: str, query: JudgedQuery) -> dict[str, Any]:
        excluded = excluded_ids(self.collection, query.id)
        reachable = {
            name: grade
            for name, grade in query.grades.items()
            if grade > 0 and name in self.tree.leaf_of and name not in excluded
        }
        beam = self._beam({"excluded": excluded})
        text = _PROMPT.format(
            query=prompt_line(query.text),
            width=self.width,
            turns=self.turns,
            shown=_format_slates(self.tree, beam.open_nodes([0]), beam.hidden),
        )
        return {
            "prompt": [{"role": "user", "content": text}],
            "task_id": task_id(self.collection.name, query.id, text),
            "split": split,
            "query_id": query.id,
            "query": query.text,
            "judged": list(reachable),
            "grades": list(reachable.values()),
            "ideal": query.ideal,
            "excluded": sorted(excluded),
        }

    def _beam(self, task: Mapping[str, Any]) -> Beam:
        """Return the search of a task before its first turn."""
        return Beam(self.tree, self.alpha, self.tree.hidden_nodes(task.get("excluded", ())))

    def respond(self, turns: Sequence[Turn]) -> Sequence[Reply]:
        """Add the scores of each turn to its search, and show the nodes that are opened next."""
        return [self._reply(turn.task, turn.messages) for turn in turns]

    def _reply(self, task: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> Reply:
        # Environments keep no state between turns, so replay the search from the messages.
        beam = self._beam(task)
        slates = beam.open_nodes([0])
        assistant_turns = [message["content"] for message in messages if message["role"] == "assistant"]
        recorded_slates = [message["slates"] for message in messages if "slates" in message]
        for i, content in enumerate(assistant_turns):
            if i:
                slates = [
                    Slate(slate["node"], *map(tuple, slate["shown"])) for slate in recorded_slates[i - 1]
                ]
            scores = parse_scores(content, [len(slate.shown) for slate in slates])
            if scores is not None:
                beam.add_scores(slates, scores)
        ranking = self._ranking(beam)
        nodes = beam.next_nodes(self.width)
        stopped = says_stop(assistant_turns[-1])
        if scores is None or len(assistant_turns) >= self.turns or not nodes or stopped:
            return Reply(done=True, record={"ranking": ranking})
        slates = beam.open_nodes(nodes, self.anchors, task["task_id"])
        record = [{"node": slate.node, "shown": [list(slate.items), list(slate.anchors)]} for slate in slates]
        text = _format_slates(self.tree, slates, beam.hidden)
        return Reply(text, record={"ranking": ranking, "slates": record})

    def _ranking(self, beam: Beam) -> list[str]:
        if self.anchors and beam.slates:
            return beam.ranking(beam.calibrated())
        return beam.ranking()

    def answer(self, task: Mapping[str, Any]) -> str | None:
        """Return None: the search takes several turns, see `script`."""
        return None

    def script(self, task: Mapping[str, Any]) -> Sequence[str] | None:
        """Return the oracle's turns, or None if they do not complete an ideal ranking in `turns` turns."""
        turns = self._oracle_turns(task)
        messages = [{"role": "user", "content": ""}]
        for turn in turns:
            messages.append({"role": "assistant", "content": turn})
            reply = self._reply(task, messages)
            messages.append({"role": "user", "content": reply.text or "", **reply.record})
        ndcg = navigation.found(messages, task["judged"], task["grades"], task.get("ideal"))
        return turns if reply.done and ndcg > 1 - 1e-9 else None

    def _oracle_turns(self, task: Mapping[str, Any]) -> list[str]:
        """Return an oracle's turns. It scores documents by grade and opens only sections it needs."""
        grades = dict(zip(task["judged"], task["grades"], strict=True))
        # Evenly spaced, so that grades that differ by orders of magnitude have different scores above 0.
        levels = sorted(set(grades.values()))
        score_of_grade = {grade: round(100 * i / len(levels)) for i, grade in enumerate(levels, 1)}
        ancestors_of_ideal: set[int] = set()
        for name in self._ideal_documents(grades):
            ancestors_of_ideal.update(self.tree.ancestors(self.tree.leaf_of[name]))

        def oracle_score(node: int) -> int:
            if document := self.tree.documents[node]:
                return score_of_grade.get(grades.get(document, 0), 0)
            return 100 if node in ancestors_of_ideal else 0

        beam = self._beam(task)
        slates = beam.open_nodes([0])
        turns: list[str] = []
        while slates:
            scores = [[oracle_score(node) for node in slate.shown] for slate in slates]
            beam.add_scores(slates, [[score / 100 for score in slate_scores] for slate_scores in scores])
            flat_scores = [score for slate_scores in scores for score in slate_scores]
            turns.append("\n".join(f"[{i}] {score}" for i, score in enumerate(flat_scores, 1)))
            if len(turns) == self.turns:
                break
            slates = beam.open_nodes(beam.next_nodes(self.width), self.anchors, task.get("task_id"))
        return turns

    def _ideal_documents(self, grades: Mapping[str, int]) -> list[str]:
        """Return the first K documents of an ideal ranking that opens few sections.

        Of documents with the same grade, those in sections that must be opened anyway come first, then those
        in the sections with the most documents of this grade.
        """
        leaves = self.tree.leaf_of
        section = {name: self.tree.parents[leaves[name]] for name in grades if name in leaves}
        ideal: list[str] = []
        for grade in sorted(set(grades.values()), reverse=True):
            candidates = [name for name in section if grades[name] == grade]
            section_sizes = Counter(section[name] for name in candidates)
            opened = {section[name] for name in ideal}
            candidates.sort(
                key=lambda name: (section[name] not in opened, -section_sizes[section[name]], section[name])
            )
            ideal += candidates[: K - len(ideal)]
        return ideal


def _format_slates(tree: Tree, slates: Sequence[Slate], hidden: Set[int]) -> str:
    """Return the numbered lines of the nodes to score, with an empty line between slates."""
    lines, number = [], 0
    for slate in slates:
        for item in slate.shown:
            number += 1
            kind = "document" if tree.documents[item] else "section"
            lines.append(f"[{number}] {kind}: {prompt_line(tree.text(item, hidden))}")
        lines.append("")
    return "\n".join(lines[:-1])


def says_stop(text: str) -> bool:
    """Return whether a turn has the word "stop" on a line of its own, with or without a period."""
    lines = after_thinking(text).split("\n")
    return any(line.strip().lower() in ("stop", "stop.") for line in lines)


def parse_scores(text: str, slate_sizes: Sequence[int]) -> list[list[float]] | None:
    """Parse the scores of a turn, scaled to [0, 1], as one list per slate; None if the turn has no score.

    A node without a score gets 0. If a node is scored twice, the first score counts. Scores above 100 and
    unknown numbers are ignored.
    """
    score_of: dict[int, float] = {}
    for number, score in _SCORE.findall(after_thinking(text)):
        if int(score) <= 100 and 1 <= int(number) <= sum(slate_sizes):
            score_of.setdefault(int(number), int(score) / 100)
    if not score_of:
        return None
    scores, start = [], 1
    for size in slate_sizes:
        scores.append([score_of.get(number, 0.0) for number in range(start, start + size)])
        start += size
    return scores
