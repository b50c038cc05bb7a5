"""`simulator-v2`: write what a search engine would find, useful or noise as asked.

A task's prompt is the one by which `engine: simulated` of search-v2 asks (ZeroSearch, arXiv 2505.04588), its
answer the documents of a real engine. `rlkit sft` on it makes a simulator, and its evaluations judge one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.environment import SPLITS, Environment
from rlkit.envs.search.simulator_prompts import write_prompt
from rlkit.envs.simulator.examples import Example, read_examples, world_example
from rlkit.errors import UserError, check_choice
from rlkit.retrieval.collections.world import World
from rlkit.retrieval.documents import Query
from rlkit.rewards import simulation

if TYPE_CHECKING:
    import datasets

SIZES = {"train": 2000, "dev": 200, "test": 200}
HELD_OUT = 0.1  # share of a file's questions that are dev, and that are test


class SimulatorEnvironment(Environment):
    """Playing a search engine.

    Args:
        data: a file of scripts/build_simulator_data.py; None: a generated world and BM25.
        words: about how long a document is asked to be; it stands in the prompt.
        topk: documents of a query of the world.
        world_size: passages of the world.

    Raises:
        UserError: arguments that do not fit.
    """

    id = "simulator-v2"
    metric = "obeys"
    rewards: Mapping[str, Any] = {"obeys": simulation.obeys, "form": simulation.form}
    reward_weights: Mapping[str, float] = {"obeys": 1.0, "form": 0.0}
    breakdown = ("label",)

    def __init__(self, *, data: str | None = None, words: int = 30, topk: int = 3, world_size: int = 2000):
        if not 1 <= topk <= 20 or words < 1:
            raise UserError(f"topk must be from 1 to 20 and words at least 1, not {topk} and {words}")
        self.data, self.words, self.topk = data, words, topk
        self.world = World(0, world_size)

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Make the first `n` tasks of a split.

        Columns: `prompt`, `task_id`, `documents` (those of the real engine), `answers`, `label`, `asked` (how
        many documents), `holds` (whether an accepted answer stands in them).

        Raises:
            UserError: an unknown split, or data that cannot be read.
        """
        import datasets

        check_choice("split", split, SPLITS)
        return datasets.Dataset.from_list([self._row(one) for one in self._examples(split, n, seed)])

    def _examples(self, split: str, n: int | None, seed: int) -> list[Example]:
        if self.data is not None:
            read = read_examples(Path(self.data).expanduser())
            return [one for one in read if split_of(one.question) == split][:n]
        from rlkit.retrieval.engines.open import open_engine

        engine = open_engine("bm25", self.world, {})
        rows = range(SIZES[split] if n is None else n)
        asked = (self.world.question(split, i, (1, 2), 0.0, seed) for i in rows)
        return [world_example(question, engine, i, self.topk) for i, question in enumerate(asked)]

    def _row(self, example: Example) -> dict[str, Any]:
        asked = len(simulation.split_documents(example.documents))
        query = Query(example.query, example.question, tuple(example.answers))
        prompt = write_prompt(query, example.label, asked, style="tuned", words=self.words)
        content = "\x1f".join([prompt, example.documents])
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "task_id": hashlib.sha256(content.encode()).hexdigest()[:16],
            "documents": example.documents,
            "answers": example.answers,
            "label": example.label,
            "asked": asked,
            "holds": simulation.holds_answer(example.documents, example.answers),
        }

    def answer(self, task: Mapping[str, Any]) -> str:
        """The documents of the real engine."""
        return task["documents"]


def split_of(question: str) -> str:
    """The split of a question of a file, whatever else stands there: no question is in two."""
    drawn = int(hashlib.sha256(question.encode()).hexdigest()[:8], 16) / 16**8
    return "test" if drawn < HELD_OUT else "dev" if drawn < 2 * HELD_OUT else "train"
