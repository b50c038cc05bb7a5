"""Speed of causal-v1: exact inference compared with pgmpy, task generation, and scoring.

    python benchmarks/causal_inference.py     # about a minute on one core

The ratios compare the same questions in the same run. The result goes to
`benchmarks/results/causal_inference.json`.
"""

import json
import logging
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.envs.causal import CausalEnvironment
from rlkit.envs.causal.inference import infer
from rlkit.envs.causal.model import LEVELS, CausalModel, CausalQuery
from rlkit.envs.causal.problem import from_json

RESULT = Path(__file__).parent / "results" / "causal_inference.json"
TASKS = 8000
QUERIES = 400
REPEATS = 3


def best_of(function: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Return the minimum CPU seconds of several calls."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


class PgmpyQuestion:
    """Question for pgmpy's VariableElimination with its default order; the network is built in advance."""

    def __init__(self, model: CausalModel, query: CausalQuery):
        self.network = pgmpy_network(model)
        node, value = query.intervened or query.observed
        self.intervened = [model.names[node]] if query.intervened else []
        self.evidence, self.target = {model.names[node]: value}, model.names[query.target]
        self.engine = self.prepare()

    def prepare(self) -> Any:
        """Set up the engine, after an intervention has cut the graph."""
        from pgmpy.inference import VariableElimination

        return VariableElimination(self.network.do(self.intervened) if self.intervened else self.network)

    def ask(self) -> np.ndarray:
        """Run the query on the engine that has been set up."""
        return self.engine.query([self.target], self.evidence, show_progress=False).values

    def prepare_and_ask(self) -> np.ndarray:
        """Go from the network to the answer, as `infer` does."""
        self.engine = self.prepare()
        return self.ask()


def pgmpy_network(model: CausalModel) -> Any:
    from pgmpy.factors.discrete import TabularCPD
    from pgmpy.models import DiscreteBayesianNetwork

    network = DiscreteBayesianNetwork()
    network.add_nodes_from(model.names)
    for node, parents in enumerate(model.parents):
        network.add_edges_from((model.names[p], model.names[node]) for p in parents)
        columns = model.tables[node].reshape(-1, model.cards[node]).T
        names, cards = [model.names[p] for p in parents], [model.cards[p] for p in parents]
        network.add_cpds(TabularCPD(model.names[node], model.cards[node], columns, names, cards))
    return network


def compare(level: str) -> dict[str, float]:
    """Time the same questions with rlkit and with pgmpy.

    `ratio` covers the way from a model to the answer on both sides. `ratio_engine_ready` gives pgmpy the cut
    graph and the engine for free.
    """
    problems = [from_json(task["problem"]) for task in CausalEnvironment(level=level).tasks("test", QUERIES)]
    # pgmpy rejects questions about the observed or intervened variable itself.
    problems = [(m, q) for m, q in problems if q.target != (q.intervened or q.observed)[0]]
    questions = [PgmpyQuestion(model, query) for model, query in problems]
    differences = []
    for question, (model, query) in zip(questions, problems, strict=True):
        differences.append(float(np.abs(question.ask() - infer(model, query)).max()))
    rlkit_time = best_of(lambda: [infer(model, query) for model, query in problems])
    pgmpy_time = best_of(lambda: [question.prepare_and_ask() for question in questions])
    ready_time = best_of(lambda: [question.ask() for question in questions])
    return {
        "queries": len(problems),
        "ratio": round(pgmpy_time / rlkit_time, 1),
        "ratio_engine_ready": round(ready_time / rlkit_time, 1),
        "rlkit_microseconds": round(1e6 * rlkit_time / len(problems), 1),
        "pgmpy_microseconds": round(1e6 * pgmpy_time / len(problems), 1),
        "pgmpy_engine_ready_microseconds": round(1e6 * ready_time / len(problems), 1),
        "largest_difference": max(differences),
    }


def score_rate(style: str) -> dict[str, float]:
    """Return scored worked solutions per second, with one reward and with the three default rewards."""
    environment = CausalEnvironment(level="association", prompt_style=style)
    tasks = list(environment.tasks("dev", 500))
    pairs = [(environment.solution(task), task["truth"]) for task in tasks]
    rewards = environment.rewards

    def score_distribution() -> None:
        for completion, truth in pairs:
            rewards["distribution"](completion, truth)

    def score_defaults() -> None:
        for completion, truth in pairs:
            rewards["parsed"](completion)
            rewards["right_length"](completion, truth)
            rewards["distribution"](completion, truth)

    return {
        "mean_characters": round(float(np.mean([len(completion) for completion, _ in pairs]))),
        "distribution_per_second": round(len(pairs) / best_of(score_distribution)),
        "default_rewards_per_second": round(len(pairs) / best_of(score_defaults)),
    }


def main() -> None:
    logging.getLogger("pgmpy").setLevel(logging.ERROR)
    CausalEnvironment().tasks("dev", 10)  # warm up: the first call imports datasets
    result = {
        "against_pgmpy": {level: compare(level) for level in ("association", "intervention")},
        "seconds_for_8000_tasks": {
            level: round(best_of(lambda: CausalEnvironment(level=level).tasks("train", TASKS), 1), 2)  # noqa: B023
            for level in LEVELS
        },
        "scoring": {style: score_rate(style) for style in ("official", "short")},
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("numpy", "pgmpy", "datasets")},
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(RESULT.read_text(), end="")


if __name__ == "__main__":
    main()
