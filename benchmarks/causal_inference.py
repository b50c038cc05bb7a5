"""Measure causal-v1: exact inference against pgmpy, generation of tasks, and scoring of answers.

Run `python benchmarks/causal_inference.py`; it takes about a minute on one core and writes
`benchmarks/results/causal_inference.json`. The ratios compare the same questions in the same run.
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
    """The least CPU seconds of several calls."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


class PgmpyQuestion:
    """A question for pgmpy's VariableElimination with its default order. Its network is built beforehand."""

    def __init__(self, model: CausalModel, query: CausalQuery):
        self.network = pgmpy_network(model)
        node, value = query.intervened or query.observed
        self.intervened = [model.names[node]] if query.intervened else []
        self.evidence, self.target = {model.names[node]: value}, model.names[query.target]
        self.engine = self.prepare()

    def prepare(self) -> Any:
        """Cut the graph if the question says so, and set up the engine."""
        from pgmpy.inference import VariableElimination

        return VariableElimination(self.network.do(self.intervened) if self.intervened else self.network)

    def ask(self) -> np.ndarray:
        """The query alone, the engine being ready."""
        return self.engine.query([self.target], self.evidence, show_progress=False).values

    def prepare_and_ask(self) -> np.ndarray:
        """From the network to the answer, which is what `infer` does."""
        self.engine = self.prepare()
        return self.ask()


def pgmpy_network(model: CausalModel) -> Any:
    from pgmpy.factors.discrete import TabularCPD
    from pgmpy.models import DiscreteBayesianNetwork

    network = DiscreteBayesianNetwork()
    network.add_nodes_from(model.names)
    for node, above in enumerate(model.parents):
        network.add_edges_from((model.names[p], model.names[node]) for p in above)
        columns = model.tables[node].reshape(-1, model.cards[node]).T
        names, cards = [model.names[p] for p in above], [model.cards[p] for p in above]
        network.add_cpds(TabularCPD(model.names[node], model.cards[node], columns, names, cards))
    return network


def compare(level: str) -> dict[str, float]:
    """Time the same questions with both; those about the known variable are left out, pgmpy refuses them.

    `ratio` is from a model to the answer for both; `ratio_engine_ready` gives pgmpy the cut graph and the
    engine for free.
    """
    problems = [from_json(task["problem"]) for task in CausalEnvironment(level=level).tasks("test", QUERIES)]
    asked = [(m, q) for m, q in problems if q.target != (q.intervened or q.observed)[0]]
    theirs = [PgmpyQuestion(model, query) for model, query in asked]
    pairs = zip(theirs, asked, strict=True)
    difference = max(float(np.abs(question.ask() - infer(*ours)).max()) for question, ours in pairs)
    our_time = best_of(lambda: [infer(model, query) for model, query in asked])
    their_time = best_of(lambda: [question.prepare_and_ask() for question in theirs])
    ready_time = best_of(lambda: [question.ask() for question in theirs])
    return {
        "queries": len(asked),
        "ratio": round(their_time / our_time, 1),
        "ratio_engine_ready": round(ready_time / our_time, 1),
        "rlkit_microseconds": round(1e6 * our_time / len(asked), 1),
        "pgmpy_microseconds": round(1e6 * their_time / len(asked), 1),
        "pgmpy_engine_ready_microseconds": round(1e6 * ready_time / len(asked), 1),
        "largest_difference": difference,
    }


def score_rate(style: str) -> dict[str, float]:
    """Completions a second: one reward, and the three default rewards of a worked solution."""
    environment = CausalEnvironment(level="association", prompt_style=style)
    tasks = list(environment.tasks("dev", 500))
    pairs = [(environment.solution(task), task["truth"]) for task in tasks]
    rewards = environment.rewards

    def one() -> None:
        for completion, truth in pairs:
            rewards["distribution"](completion, truth)

    def three() -> None:
        for completion, truth in pairs:
            rewards["parsed"](completion)
            rewards["right_length"](completion, truth)
            rewards["distribution"](completion, truth)

    return {
        "mean_characters": round(float(np.mean([len(completion) for completion, _ in pairs]))),
        "distribution_per_second": round(len(pairs) / best_of(one)),
        "default_rewards_per_second": round(len(pairs) / best_of(three)),
    }


def main() -> None:
    logging.getLogger("pgmpy").setLevel(logging.ERROR)
    CausalEnvironment().tasks("dev", 10)  # imports
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
