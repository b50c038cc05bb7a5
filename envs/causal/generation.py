"""Generate the tasks of a split: a graph, a question, its exact answer, and the dataset row of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from rlkit.envs.causal.difficulty import measure_difficulty
from rlkit.envs.causal.graphs import GraphConfig, graph_stream, random_stream
from rlkit.envs.causal.inference import infer
from rlkit.envs.causal.model import CausalModel, CausalQuery, hundredths
from rlkit.envs.causal.problem import to_json
from rlkit.envs.causal.prompts import PROMPT_WRITERS, QUESTION_WRITERS
from rlkit.envs.causal.queries import draw_model, draw_query, kind_of
from rlkit.errors import UserError

INT64_MAX = 2**63 - 1
MAX_DRAWS_PER_KIND = 20  # draws of conditions until a target has the drawn kind
MAX_SKIPPED_GRAPHS = 1000  # graphs without a question of the kinds; then it is assumed that none has one


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
    num_rows = num_skipped = 0
    for number, (parents, structure) in enumerate(graph_stream(config.graph, split, seed)):
        if num_rows == n:
            return
        # A stream per graph and per question: task i does not depend on n or on the tasks before it.
        rng = random_stream(1, split, seed, number)
        model = draw_model(parents, config.cardinality, config.concentration, rng)
        printed = model.printed(config.decimals)
        graph = _Graph(config, printed, printed if config.truth_from == "printed" else model, structure)
        if not graph.has_question(random_stream(3, split, seed, number)):
            num_skipped += 1
            if num_skipped == MAX_SKIPPED_GRAPHS and not num_rows:
                raise UserError(f"no graph has a question of the kinds {', '.join(config.kinds or ())}")
            continue
        for question in range(min(questions_per_graph, n - num_rows)):
            yield graph.draw_task(random_stream(2, split, seed, number, question))
            num_rows += 1


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

    def has_question(self, rng: np.random.Generator) -> bool:
        """Return whether there is a question of the kinds of the config."""
        return self.config.kinds is None or self._draw_query_of_kinds(rng) is not None

    def _draw_query(self, rng: np.random.Generator) -> CausalQuery:
        if self.config.kinds is None:
            return draw_query(self.model, _draw_name(self.config.levels, rng), rng)
        while (query := self._draw_query_of_kinds(rng)) is None:
            pass  # `has_question` has found one
        return query

    def _draw_query_of_kinds(self, rng: np.random.Generator) -> CausalQuery | None:
        """Draw a level and a kind, then a query; of another kind if the graph has no such query."""
        assert self.config.kinds is not None
        level, weights = _draw_name(self.config.levels, rng), dict(self.config.kinds)
        while any(weights.values()):
            kind = _draw_name(weights, rng)
            for _ in range(MAX_DRAWS_PER_KIND):
                query = draw_query(self.model, level, rng)
                # Choose among all targets: in a large graph, a random one is rarely of the kind `given`.
                targets = [replace(query, target=target) for target in range(len(self.model))]
                targets = [each for each in targets if kind_of(self.model, each) == kind]
                if targets:
                    return targets[int(rng.integers(len(targets)))]
            del weights[kind]
        return None

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


def _draw_name(weights: Mapping[str, float], rng: np.random.Generator) -> str:
    probabilities = np.array(list(weights.values()))
    return str(rng.choice(list(weights), p=probabilities / probabilities.sum()))


def _task_id(prompt: list[dict[str, str]], truth: list[float]) -> str:
    content = json.dumps([prompt, truth], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
