"""`navigate-v2`: find documents by going down a tree of clusters (LATTICE, arXiv 2510.13217).

Each turn shows the children of the most promising nodes; the model scores them from 0 to 100, and the search
goes on best first over the whole tree (`rlkit.envs.ranking.beam`). It ends at `stop`, when nothing is left to
open, or after `turns` turns. The reward is the nDCG@10 of the documents that were scored, less a price for
turns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlkit.environment import Environment, Reply, Turn
from rlkit.envs.ranking.beam import Beam, Slate
from rlkit.envs.ranking.tree import Tree, open_tree
from rlkit.errors import UserError
from rlkit.retrieval.queries import judged_queries, open_collection, task_id
from rlkit.rewards import navigation

if TYPE_CHECKING:
    import datasets

K = 10  # ranks that count
_PROMPT = (
    "A document collection is organized as a tree of sections. Find the documents that answer the query. "
    "Score each section or document you are shown from 0 (certainly not useful) to 100 (certainly useful), "
    "one per line:\n[1] 80\n[2] 0\nThe {width} best sections are opened next. You have at most {turns} "
    "turns. When you have found enough, write stop on a separate line after the scores.\n\n"
    "Query: {query}\n\n{shown}"
)
_SCORE = re.compile(r"\[(\d{1,4})\]\s*[:=]?\s*(\d{1,3})(?![\d.])")
_STOP = re.compile(r"^\s*stop\.?\s*$", re.IGNORECASE | re.MULTILINE)


class NavigateEnvironment(Environment):
    """Going down a tree.

    Args:
        collection: see `rlkit.retrieval.collections.base`.
        embedder: vectors to make the clusters of: "words", or "dense:MODEL" with any model of
            sentence-transformers.
        branching: children of a node, about.
        summaries: what is shown of a section: "words" and titles of its documents, or a model that writes it.
        document_words: a longer document is cut.
        width: nodes that are opened at a time (the beam).
        turns: of the model, at most.
        alpha: share of a node's own score in its path relevance.
        anchors: documents seen before that are scored again in a slate, to calibrate; 0: no calibration.
        folds, fold: see `RerankEnvironment`.

    Raises:
        UserError: arguments that do not fit.
    """

    id = "navigate-v2"
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
    ):
        if not (2 <= branching <= 100 and 1 <= width <= 20 and turns >= 1 and document_words >= 1):
            raise UserError(
                "branching must be from 2 to 100, width from 1 to 20, turns and document_words at least 1, "
                f"not {branching}, {width}, {turns} and {document_words}"
            )
        if not 0 < alpha <= 1 or not 0 <= anchors <= 100:
            raise UserError(
                f"alpha must be above 0 and at most 1 and anchors from 0 to 100, not {alpha} and {anchors}"
            )
        self.collection = open_collection(collection, folds, fold)
        self.embedder, self.branching, self.summaries = embedder, branching, summaries
        self.document_words, self.width, self.turns = document_words, width, turns
        self.alpha, self.anchors = alpha, anchors
        self.max_turns = turns + 1  # the environment sees the last one and ends the rollout

    @cached_property
    def tree(self) -> Tree:
        """What is searched."""
        return open_tree(self.collection, self.embedder, self.branching, self.document_words, self.summaries)

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Make the first `n` queries of a split.

        Columns: `prompt`, `task_id`, `split`, `query_id`, `query`, `judged` and `grades` (documents above 0),
        `fewest` (turns that one who knows needs, at most `turns`).

        Raises:
            UserError: no such split, or a tree that cannot be built.
        """
        import datasets

        rows = []
        for one in judged_queries(self.collection, split, n, seed):
            relevant = {name: grade for name, grade in one.grades.items() if grade > 0}
            first = _show(self.tree, Beam(self.tree).open([0]))
            text = _PROMPT.format(query=one.text, width=self.width, turns=self.turns, shown=first)
            row: dict[str, Any] = {
                "prompt": [{"role": "user", "content": text}],
                "task_id": task_id(self.collection.name, one.id, text),
                "split": split,
                "query_id": one.id,
                "query": one.text,
                "judged": list(relevant),
                "grades": list(relevant.values()),
            }
            row["fewest"] = len(self._known(row))
            rows.append(row)
        return datasets.Dataset.from_list(rows)

    def respond(self, turns: Sequence[Turn]) -> Sequence[Reply]:
        """Take in the scores and show what is opened next."""
        return [self._reply(turn.task, turn.messages) for turn in turns]

    def _reply(self, task: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> Reply:
        beam, slates = Beam(self.tree, self.alpha), Beam(self.tree).open([0])
        said = [message for message in messages if message["role"] == "assistant"]
        shown = [message["slates"] for message in messages if "slates" in message]
        for i, message in enumerate(said):
            if i:
                slates = [Slate(one["node"], *map(tuple, one["shown"])) for one in shown[i - 1]]
            scores = read(message["content"], [len(slate.shown) for slate in slates])
            if scores is not None:
                beam.see(slates, scores)
        ranking = self._ranking(beam)
        nodes = beam.next(self.width)
        if scores is None or len(said) >= self.turns or not nodes or _STOP.search(_own(said[-1]["content"])):
            return Reply(done=True, record={"ranking": ranking})
        slates = beam.open(nodes, self.anchors, task["task_id"])
        record = [{"node": one.node, "shown": [list(one.items), list(one.anchors)]} for one in slates]
        return Reply(_show(self.tree, slates), record={"ranking": ranking, "slates": record})

    def _ranking(self, beam: Beam) -> list[str]:
        if self.anchors and beam.slates:
            return beam.ranking(beam.calibrated())
        return beam.ranking()

    def answer(self, task: Mapping[str, Any]) -> str | None:
        """None: it takes several turns."""
        return None

    def script(self, task: Mapping[str, Any]) -> Sequence[str] | None:
        """Opens the sections with the documents that an ideal ranking needs, where the turns suffice."""
        turns = self._known(task)
        said = [{"role": "user", "content": ""}]
        for turn in turns:
            said.append({"role": "assistant", "content": turn})
            reply = self._reply(task, said)
            said.append({"role": "user", "content": reply.text or "", **reply.record})
        marks = navigation.found(said, task["judged"], task["grades"])
        return turns if reply.done and marks > 1 - 1e-9 else None

    def _known(self, task: Mapping[str, Any]) -> list[str]:
        """What one who knows the judgments writes turn by turn."""
        grades = dict(zip(task["judged"], task["grades"], strict=True))
        needed = self._needed(grades)
        wanted = {node for name in needed for node in self.tree.above(self.tree.leaf_of[name])}
        highest = max(grades.values())
        beam, slates = Beam(self.tree, self.alpha), Beam(self.tree).open([0])
        turns: list[str] = []
        while slates:
            marks = [
                [
                    round(100 * grades.get(self.tree.documents[n], 0) / highest) if self.tree.documents[n]
                    else 100 * (n in wanted)
                    for n in slate.shown
                ]
                for slate in slates
            ]  # fmt: skip
            beam.see(slates, [[mark / 100 for mark in one] for one in marks])
            flat = [mark for one in marks for mark in one]
            turns.append("\n".join(f"[{i}] {mark}" for i, mark in enumerate(flat, 1)))
            if len(turns) == self.turns:
                break
            slates = beam.open(beam.next(self.width), self.anchors, task.get("task_id"))
        return turns

    def _needed(self, grades: Mapping[str, int]) -> list[str]:
        """Documents of an ideal ranking; of equal ones those that are in sections with others."""
        leaves = self.tree.leaf_of
        there = [name for name in grades if name in leaves]
        section = {name: self.tree.parents[leaves[name]] for name in there}
        needed: list[str] = []
        for grade in sorted(set(grades.values()), reverse=True):
            same = [name for name in there if grades[name] == grade]
            crowd: dict[int, int] = {}
            for name in same:
                crowd[section[name]] = crowd.get(section[name], 0) + 1
            opened = {section[name] for name in needed}
            same.sort(key=lambda name: (section[name] not in opened, -crowd[section[name]], section[name]))
            needed += same[: K - len(needed)]
        return needed


def _show(tree: Tree, slates: Sequence[Slate]) -> str:
    """What is to be scored, with numbers."""
    lines, number = [], 0
    for slate in slates:
        for item in slate.shown:
            number += 1
            kind = "document" if tree.documents[item] else "section"
            lines.append(f"[{number}] {kind}: {tree.texts[item]}")
        lines.append("")
    return "\n".join(lines[:-1])


def _own(text: str) -> str:
    return text.rpartition("</think>")[2]


def read(text: str, sizes: Sequence[int]) -> list[list[float]] | None:
    """The scores of a turn in [0, 1], by slate; what is not scored has 0. None where there is none at all.

    A number that repeats counts where it stands first; one above 100 is none.
    """
    found: dict[int, float] = {}
    for number, score in _SCORE.findall(_own(text)):
        if int(score) <= 100 and 1 <= int(number) <= sum(sizes):
            found.setdefault(int(number), int(score) / 100)
    if not found:
        return None
    scores, start = [], 1
    for size in sizes:
        scores.append([found.get(number, 0.0) for number in range(start, start + size)])
        start += size
    return scores
