"""Generate the tasks of a split: a graph, a question, its exact answer, and the dataset row of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import numpy as np

from rlkit.envs.causal.difficulty import measure_difficulty
from rlkit.envs.causal.graphs import GraphConfig, graph_stream, random_stream
from rlkit.envs.causal.inference import infer
from rlkit.envs.causal.model import CausalModel, CausalQuery, hundredths
from rlkit.envs.causal.problem import to_json
from rlkit.envs.causal.prompts import PROMPT_WRITERS, QUESTION_WRITERS
from rlkit.envs.causal.queries import draw_model, draw_query, kind_of

INT64_MAX = 2**63 - 1
MAX_DRAWS = 100  # of a query of a certain kind


@dataclass(frozen=True)
class TaskConfig:
    """Distribution of tasks: the validated arguments of `CausalEnvironment`."""

    graph: GraphConfig
    levels: Mapping[str, float]  # level -> probability
    cardinality: int
    concentration: float
    decimals: int
    truth_from: str
    prompt_style: str
    kinds: Mapping[str, float] | None  # kind of question -> probability; None for that of random queries


def generate(
    config: TaskConfig, split: str, seed: int, n: int, questions_per_graph: int
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the first `n` tasks. Row i depends on the config, the split, the seed and i alone."""
    num_graphs = -(-n // questions_per_graph)  # rounded up
    graphs = graph_stream(config.graph, split, seed)
    for number, (parents, structure) in enumerate(islice(graphs, num_graphs)):
        # A stream per graph and per question: task i does not depend on n or on the tasks before it.
        rng = random_stream(1, split, seed, number)
        model = draw_model(parents, config.cardinality, config.concentration, rng)
        printed = model.printed(config.decimals)
        graph = _Graph(config, printed, printed if config.truth_from == "printed" else model, structure)
        for question in range(min(questions_per_graph, n - number * questions_per_graph)):
            yield graph.draw_task(random_stream(2, split, seed, number, question))


class _Graph:
    """A graph with its tables, about which questions are drawn."""

    def __init__(self, config: TaskConfig, printed: CausalModel, model: CausalModel, structure: str):
        self.config, self.printed, self.model, self.structure = config, printed, model, structure
        # Questions about one graph are compared with the same few simpler questions. The cache is per graph
        # because one on the class would keep every graph alive.
        self.hundredths = cache(self._hundredths)

    def _hundredths(self, query: CausalQuery) -> tuple[int, ...]:
        return tuple(hundredths(infer(self.model, query)))

    def draw_task(self, rng: np.random.Generator) -> dict[str, Any]:
        """Draw a question and return its row."""
        query = self._draw_query(rng)
        prompt = PROMPT_WRITERS[self.config.prompt_style](self.printed, query, self.config.decimals)
        truth = [h / 100 for h in self.hundredths(query)]
        differs = self._differs(query)
        difficulty = measure_difficulty(self.model, query)
        return {
            "prompt": prompt,
            "task_id": _task_id(prompt, truth),
            "truth": truth,
            "level": query.level,
            "kind": kind_of(self.model, query),
            "relevant_size": difficulty.relevant_size,
            "is_core": all(differs),
            "is_semicore": any(differs),
            # Arrow stores 64-bit integers; the cost of a large graph may exceed them.
            "sums": min(difficulty.sums, INT64_MAX),
            "products": min(difficulty.products, INT64_MAX),
            "graph_id": self.structure[:16],
            "question": QUESTION_WRITERS[self.config.prompt_style](self.printed, query),
            "problem": to_json(self.model, query),
        }

    def _draw_query(self, rng: np.random.Generator) -> CausalQuery:
        """Draw a query, of a kind that is drawn first if the config has probabilities of kinds."""
        level = _draw(self.config.levels, rng)
        if self.config.kinds is None:
            return draw_query(self.model, level, rng)
        kind = _draw(self.config.kinds, rng)
        for _ in range(MAX_DRAWS):
            query = draw_query(self.model, level, rng)
            if kind_of(self.model, query) == kind:
                break
        return query  # of another kind if this graph has no such question

    def _differs(self, query: CausalQuery) -> list[bool]:
        """Return for each simpler question (a condition removed) whether the rounded answer changes."""
        variants = {
            CausalQuery(query.target, observed, intervened)
            for observed in {query.observed, None}
            for intervened in {query.intervened, None}
        }
        # Only the rounded answers are compared, because a model sees and writes two decimals.
        answer = self.hundredths(query)
        return [self.hundredths(simpler) != answer for simpler in variants - {query}]


def _draw(probabilities: Mapping[str, float], rng: np.random.Generator) -> str:
    return str(rng.choice(list(probabilities), p=list(probabilities.values())))


def _task_id(prompt: list[dict[str, str]], truth: list[float]) -> str:
    content = json.dumps([prompt, truth], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
