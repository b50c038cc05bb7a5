"""`simulator-v3`: write the documents that a search engine would find, useful or noisy ones as requested.

The prompt of a task is the one that `engine: simulated` of search-v3 sends (ZeroSearch, arXiv 2505.04588),
and the reference answer is the documents of a real engine. `rlkit sft` on these tasks trains a simulator, and
`rlkit eval` evaluates one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.environment import SPLITS, Environment
from rlkit.envs.search.simulator_prompts import write_prompt
from rlkit.envs.simulator.examples import Example, read_examples, world_example
from rlkit.errors import check_choice, check_integer
from rlkit.retrieval.collections.world import World
from rlkit.retrieval.documents import Query
from rlkit.rewards import simulation

if TYPE_CHECKING:
    import datasets

SIZES = {"train": 2000, "dev": 200, "test": 200}
HELD_OUT_FRACTION = 0.1  # of a file's questions, for each of dev and test


class SimulatorEnvironment(Environment):
    """Environment for simulating a search engine.

    Args:
        data: JSONL file written by scripts/build_simulator_data.py; None generates a world and searches it
            with BM25.
        words: Approximate number of words of a document, as stated in the prompt.
        topk: Number of documents per query of the generated world.
        world_size: Number of passages of the generated world.

    Raises:
        UserError: An argument is invalid.
    """

    id = "simulator-v3"
    metric = "obeys"
    rewards: Mapping[str, Any] = {"obeys": simulation.obeys, "form": simulation.form}
    reward_weights: Mapping[str, float] = {"obeys": 1.0, "form": 0.0}
    breakdown = ("label",)

    def __init__(self, *, data: str | None = None, words: int = 30, topk: int = 3, world_size: int = 2000):
        check_integer("topk", topk, 1, 20)
        check_integer("words", words, 1)
        self.data, self.words, self.topk = data, words, topk
        self.world = World(0, world_size)

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Return the first `n` tasks of a split.

        Columns: `prompt`, `task_id`, `documents` (those of the real engine), `answers`, `label`, `asked`
        (number of requested documents), `holds` (whether the real documents contain an accepted answer).

        Raises:
            UserError: The split is unknown, or the data cannot be read.
        """
        import datasets

        check_choice("split", split, SPLITS)
        return datasets.Dataset.from_list([self._row(example) for example in self._examples(split, n, seed)])

    def _examples(self, split: str, n: int | None, seed: int) -> list[Example]:
        if self.data is not None:
            examples = read_examples(Path(self.data).expanduser())
            return [example for example in examples if split_of(example.question) == split][:n]
        from rlkit.retrieval.engines.open import open_engine

        engine = open_engine("bm25", self.world, {})
        examples = []
        for i in range(SIZES[split] if n is None else n):
            question = self.world.question(split, i, hops=(1, 2), unanswerable=0.0, seed=seed)
            examples.append(world_example(question, engine, i, self.topk))
        return examples

    def _row(self, example: Example) -> dict[str, Any]:
        num_documents = len(simulation.requested_documents(example.documents))
        query = Query(example.query, example.question, tuple(example.answers))
        prompt = write_prompt(query, example.label, num_documents, style="tuned", num_words=self.words)
        # The documents are part of the id, because rows of a file may differ only in them.
        content = "\x1f".join([prompt, example.documents])
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "task_id": hashlib.sha256(content.encode()).hexdigest()[:16],
            "documents": example.documents,
            "answers": example.answers,
            "label": example.label,
            "asked": num_documents,
            "holds": simulation.holds_answer(example.documents, example.answers),
        }

    def answer(self, task: Mapping[str, Any]) -> str:
        """Return the documents of the real engine."""
        return task["documents"]


def split_of(question: str) -> str:
    """Return the split of a file's question, which depends only on the question itself.

    So all rows of a question are in one split, and more rows do not move a question to another split.
    """
    fraction = int(hashlib.sha256(question.encode()).hexdigest()[:8], 16) / 16**8
    if fraction < HELD_OUT_FRACTION:
        return "test"
    return "dev" if fraction < 2 * HELD_OUT_FRACTION else "train"
