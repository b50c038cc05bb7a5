"""Tasks of a split, one after the other: a graph, a question, its exact answer, and the row for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import numpy as np

from rlkit.envs.causal.difficulty import difficulty
from rlkit.envs.causal.graphs import GraphLaw, graph_stream, random_stream
from rlkit.envs.causal.inference import infer
from rlkit.envs.causal.model import CausalModel, CausalQuery, hundredths
from rlkit.envs.causal.problem import to_json
from rlkit.envs.causal.prompts import PROMPTS, QUESTION_TEXTS
from rlkit.envs.causal.queries import draw_model, draw_query

INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class TaskLaw:
    """What tasks are drawn: the arguments of `CausalEnvironment`, checked."""

    graph: GraphLaw
    levels: Mapping[str, float]  # level: probability
    cardinality: int
    concentration: float
    truth_from: str
    prompt_style: str


def generate(
    law: TaskLaw, split: str, seed: int, n: int, questions_per_graph: int
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the first `n` tasks. Row i depends on the law, the split, the seed and i alone."""
    graphs = graph_stream(law.graph, split, seed)
    for number, (parents, structure) in enumerate(islice(graphs, -(-n // questions_per_graph))):
        model = draw_model(parents, law.cardinality, law.concentration, random_stream(1, split, seed, number))
        printed = model.printed()
        graph = _Graph(law, printed, printed if law.truth_from == "printed" else model, structure)
        for question in range(min(questions_per_graph, n - number * questions_per_graph)):
            yield graph.task(random_stream(2, split, seed, number, question))


class _Graph:
    """A graph with its tables, of which questions are asked."""

    def __init__(self, law: TaskLaw, printed: CausalModel, model: CausalModel, structure: str):
        self.law, self.printed, self.model, self.structure = law, printed, model, structure
        # Questions about one graph are compared with the same few simpler questions.
        self.hundredths = cache(self._hundredths)

    def _hundredths(self, query: CausalQuery) -> tuple[int, ...]:
        return tuple(hundredths(infer(self.model, query)))

    def task(self, rng: np.random.Generator) -> dict[str, Any]:
        """Draw a question and return its row."""
        level = str(rng.choice(list(self.law.levels), p=list(self.law.levels.values())))
        query = draw_query(self.model, level, rng)
        prompt = PROMPTS[self.law.prompt_style](self.printed, query)
        truth = [h / 100 for h in self.hundredths(query)]
        differs = self._differs(query)
        hardness = difficulty(self.model, query)
        return {
            "prompt": prompt,
            "task_id": _task_id(prompt, truth),
            "truth": truth,
            "level": level,
            "relevant_size": hardness.relevant_size,
            "is_core": all(differs),
            "is_semicore": any(differs),
            "sums": min(hardness.sums, INT64_MAX),
            "products": min(hardness.products, INT64_MAX),
            "graph_id": self.structure[:16],
            "question": QUESTION_TEXTS[self.law.prompt_style](self.printed, query),
            "problem": to_json(self.model, query),
        }

    def _differs(self, query: CausalQuery) -> list[bool]:
        """For each simpler question, with a condition left out: whether the rounded answer differs."""
        simpler = {
            CausalQuery(query.target, observed, intervened)
            for observed in {query.observed, None}
            for intervened in {query.intervened, None}
        }
        answer = self.hundredths(query)
        return [self.hundredths(other) != answer for other in simpler - {query}]


def _task_id(prompt: list[dict[str, str]], truth: list[float]) -> str:
    content = json.dumps([prompt, truth], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
