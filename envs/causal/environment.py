"""`causal-v1`: probability questions over structural causal models (RLCausal, arXiv 2512.20760).

A task shows a random causal graph with its conditional probability tables and asks for the distribution of
one variable: given an observation (association), after an intervention, or after an intervention on the very
case in which something was observed before (counterfactual). In the short style::

    P(b)=[0.30, 0.70]
    P(a|b=0)=[0.65, 0.35]
    P(a|b=1)=[0.10, 0.90]
    P(a|do(b=1)) = ?
    Answer with a list such as [0.25, 0.75].

The right answer is `[0.10, 0.90]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rlkit.environment import SPLITS, Environment, Reward
from rlkit.envs.causal.foreign import Prompt, read_prompt
from rlkit.envs.causal.generation import TaskLaw, generate
from rlkit.envs.causal.graphs import GraphLaw
from rlkit.envs.causal.inference import infer
from rlkit.envs.causal.items import agrees, read_item
from rlkit.envs.causal.model import LEVELS, hundredths
from rlkit.envs.causal.problem import from_json
from rlkit.envs.causal.prompts import ANSWERS, PROMPTS, official_answer, short_name
from rlkit.envs.causal.solutions import table_row, work_out
from rlkit.errors import UserError, check_choice
from rlkit.rewards import distribution as rewards

if TYPE_CHECKING:
    import datasets

SIZES = {"train": 8000, "dev": 2000, "test": 8000}
QUESTIONS_PER_GRAPH = {"train": 100, "dev": 10, "test": 40}
MAX_NODES = 200
MAX_TABLE = 4096  # cells of the largest conditional probability table


class CausalEnvironment(Environment):
    """Association, intervention and counterfactual questions over random causal graphs.

    Args:
        level: a level ("association", "intervention", "counterfactual"), a list of levels in equal shares,
            or a mapping from level to weight.
        num_nodes: nodes a graph.
        cardinality: values a variable.
        roots: nodes without parents, or None to draw it from 1..num_nodes - 1.
        max_in_degree: most parents a node has.
        concentration: of the Dirichlet distribution of every table row; below 1 rows are more deterministic.
        questions_per_graph: in a row about the same graph; None is 100 in train, 10 in dev, 40 in test.
        truth_from: "printed", the tables of the prompt (which has two decimals), or "exact", the tables
            before rounding, as in the release.
        prompt_style: "official" (the layout of RLCausal) or "short".
        tolerance: of the reward `distribution`, on the total variation distance.
        strict: the distance must be below the tolerance, as in the release's training reward.
        parser: "lenient" or "official", see `rlkit.rewards.distribution.parse_distribution`.
        which: whether the "first" or the "last" answer counts; None is the parser's own rule.

    Raises:
        UserError: arguments that no task satisfies.
    """

    id = "causal-v1"
    metric = "correct"
    breakdown = ("level", "relevant_size")

    def __init__(
        self,
        *,
        level: str | Sequence[str] | Mapping[str, float] = "intervention",
        num_nodes: int = 10,
        cardinality: int = 2,
        roots: int | None = None,
        max_in_degree: int = 2,
        concentration: float = 1.0,
        questions_per_graph: int | None = None,
        truth_from: str = "printed",
        prompt_style: str = "official",
        tolerance: float = 0.01,
        strict: bool = False,
        parser: str = "lenient",
        which: str | None = None,
    ):
        check_choice("truth_from", truth_from, ("printed", "exact"))
        check_choice("prompt_style", prompt_style, PROMPTS)
        check_choice("parser", parser, rewards.PARSERS)
        if which is not None:
            check_choice("which", which, ("first", "last"))
        if parser == "official" and prompt_style != "official":
            raise UserError(
                "parser 'official' reads only answers in the official layout: use prompt_style 'official'"
            )
        if questions_per_graph is not None:
            _check_number("questions_per_graph", questions_per_graph, 1)
        _check_graph(num_nodes, cardinality, roots, max_in_degree)
        if not 0.01 <= concentration <= 1e6:
            raise UserError(f"concentration is {concentration}: it must be from 0.01 to 1e6")
        if not 0 <= tolerance < 1:
            raise UserError(f"tolerance is {tolerance}: a total variation distance is from 0 to 1; use 0.01")
        self.law = TaskLaw(
            graph=GraphLaw(num_nodes, roots, max_in_degree),
            levels=_shares(level),
            cardinality=cardinality,
            concentration=concentration,
            truth_from=truth_from,
            prompt_style=prompt_style,
        )
        self.questions_per_graph = questions_per_graph
        self.rewards = _rewards(tolerance, strict, parser, which)
        self.reward_weights = {"parsed": 0.1, "right_length": 0.1, "distribution": 0.8}

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Make the first `n` tasks of a split, by default 8,000 (train, test) or 2,000 (dev).

        Columns: `prompt`, `task_id`, `truth` (the distribution in two decimals), `level`, `relevant_size`
        (nodes of the relevant subgraph), `is_core` (the answer differs from those with a condition left out),
        `is_semicore` (from at least one of them), `sums` and `products` (of min-fill elimination),
        `graph_id`, `question`, and `problem` (all of it as JSON, see `rlkit.envs.causal.problem.to_json`).

        Raises:
            UserError: an unknown split, or no graph of this size in the split.
        """
        import datasets

        check_choice("split", split, SPLITS)
        n = SIZES[split] if n is None else n
        _check_number("n", n, 1)
        _check_number("seed", seed, 0, 2**32 - 1)
        rows = list(
            generate(self.law, split, seed, n, self.questions_per_graph or QUESTIONS_PER_GRAPH[split])
        )
        return datasets.Dataset.from_list(rows)

    def answer(self, task: Mapping[str, Any]) -> str:
        """The right answer: `ANSWER` and the list in the official style, only the list in the short one."""
        return ANSWERS[self.law.prompt_style](task["truth"])

    def solution(self, task: Mapping[str, Any]) -> str | None:
        """A worked solution that ends in the answer; None for most counterfactuals.

        In the short style a question that one table row answers is answered by quoting that row.
        """
        model, query = from_json(task["problem"])
        short = self.law.prompt_style == "short"
        names = [short_name(name) for name in model.names] if short else model.names
        if short and (row := table_row(model, query, names)):
            return f"{row}={self.answer(task)}"
        lines = work_out(model, query, names)
        if lines is None:
            return None
        steps = "\n".join(lines)
        if short:
            return f"{steps}\nANSWER {self.answer(task)}"
        return f"THOUGHT PROCESS\n{steps}\n\n{official_answer(task['truth'])}"

    def solve_prompt(self, prompt: Prompt) -> list[float]:
        """Answer a prompt in the official layout, whoever wrote it, in two decimals.

        Args:
            prompt: chat messages, or their text.

        Raises:
            UserError: the prompt cannot be read, contradicts itself, or is too large to solve.
        """
        return [h / 100 for h in hundredths(infer(*read_prompt(prompt)))]

    def check_item(self, item: Mapping[str, Any]) -> bool:
        """Whether the exact answer is a published item's, within 0.01 total variation."""
        prompt, truth = read_item(item)
        return agrees(self.solve_prompt(prompt), truth)


def _rewards(tolerance: float, strict: bool, parser: str, which: str | None) -> dict[str, Reward]:
    def bind(reward: Reward, **arguments: float) -> Reward:
        return partial(reward, parser=parser, which=which, **arguments)

    return {
        "parsed": bind(rewards.parsed),
        "right_length": bind(rewards.right_length),
        "distribution": bind(rewards.distribution, tolerance=tolerance, strict=strict),
        "correct": bind(rewards.distribution, tolerance=tolerance),
        "format": bind(rewards.answer_format),
        "total_variation": bind(rewards.total_variation),
    }


def _shares(level: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """The probability of each level."""
    if isinstance(level, str):
        level = [level]
    weights = dict(level) if isinstance(level, Mapping) else dict.fromkeys(level, 1.0)
    for name, weight in weights.items():
        check_choice("level", name, LEVELS)
        if not (isinstance(weight, int | float) and 0 <= weight < float("inf")):
            raise UserError(f"the weight of level {name!r} is {weight!r}: it must be a number of at least 0")
    total = sum(weights.values())
    if total <= 0:
        raise UserError(f"no level has a positive weight: choose from {', '.join(LEVELS)}")
    return {name: weights[name] / total for name in LEVELS if name in weights}


def _check_graph(num_nodes: int, cardinality: int, roots: int | None, max_in_degree: int) -> None:
    _check_number("num_nodes", num_nodes, 2, MAX_NODES)
    _check_number("cardinality", cardinality, 2, 64)
    _check_number("max_in_degree", max_in_degree, 1)
    if max_in_degree >= num_nodes:
        raise UserError(
            f"max_in_degree is {max_in_degree} but a node of {num_nodes} has at most {num_nodes - 1} parents:"
            " lower it or raise num_nodes"
        )
    if roots is not None:
        _check_number("roots", roots, 1, num_nodes - 1)
    if cardinality ** (max_in_degree + 1) > MAX_TABLE:
        raise UserError(
            f"a table of {max_in_degree} parents with {cardinality} values has more than {MAX_TABLE} cells:"
            " lower max_in_degree or cardinality"
        )


def _check_number(name: str, value: int, least: int, most: int | None = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{name} is {value!r}: it must be a whole number {limits}")
