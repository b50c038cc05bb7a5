"""`causal-v1`: probability questions about structural causal models (RLCausal, arXiv 2512.20760).

A task shows a random causal graph with its conditional probability tables and asks for the distribution of
one variable: given an observation (association), after an intervention, or after an intervention on a unit
that was observed first (counterfactual). In the short style::

    P(b)=[0.30, 0.70]
    P(a|b=0)=[0.65, 0.35]
    P(a|b=1)=[0.10, 0.90]
    P(a|do(b=1)) = ?
    Answer with a list such as [0.25, 0.75].

The correct answer is `[0.10, 0.90]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rlkit.environment import SPLITS, Environment, Reward, hashed_choice
from rlkit.envs.causal.foreign import Prompt, read_prompt
from rlkit.envs.causal.generation import TaskConfig, generate
from rlkit.envs.causal.graphs import GraphConfig
from rlkit.envs.causal.inference import infer
from rlkit.envs.causal.items import agrees, read_item
from rlkit.envs.causal.model import LEVELS, hundredths
from rlkit.envs.causal.problem import from_json
from rlkit.envs.causal.prompts import ANSWER_WRITERS, PROMPT_WRITERS, official_answer, short_name
from rlkit.envs.causal.queries import KINDS
from rlkit.envs.causal.solutions import SOLUTION_STYLES, deciding_facts, table_row, write_steps
from rlkit.errors import UserError, check_choice, check_integer
from rlkit.rewards import distribution as rewards

if TYPE_CHECKING:
    import datasets

# Sizes of the release: its first 8,000 training rows are 100 questions about each of 80 graphs.
SIZES = {"train": 8000, "dev": 2000, "test": 8000}
QUESTIONS_PER_GRAPH = {"train": 100, "dev": 10, "test": 40}
MAX_NODES = 200
MAX_TABLE_CELLS = 4096  # of a conditional probability table


class CausalEnvironment(Environment):
    """Association, intervention and counterfactual questions over random causal graphs.

    Args:
        level: Level ("association", "intervention" or "counterfactual"), list of levels with equal
            probability, or mapping from level to weight.
        num_nodes: Number of nodes of a graph.
        cardinality: Number of values of a variable.
        roots: Number of nodes without parents; None draws it from 1..num_nodes - 1.
        max_in_degree: Maximum number of parents of a node.
        decimals: Number of decimals of the tables in the prompt, 1 or 2.
        concentration: Parameter of the Dirichlet distribution of every table row. Values below 1 give more
            deterministic rows.
        kinds: Kind of question (`kind_of`), list of kinds with equal probability, or mapping from kind to
            weight. None draws target and condition uniformly. A kind that a graph lacks is replaced by the
            others; a graph without any of them is skipped.
        questions_per_graph: Number of consecutive questions about one graph; None means 100 in train, 10 in
            dev and 40 in test.
        truth_from: Tables that the answer is computed from: "printed", the rounded ones of the prompt, or
            "exact", those before rounding, as in the release.
        prompt_style: "official" (the layout of RLCausal) or "short".
        solution_style: Style of the worked solutions: "verbose" (every step), "steps" (shorter: target,
            parents and condition, then the arithmetic) or "mixed" ("steps" for a quarter of the tasks, else
            "verbose").
        tolerance: Total variation distance up to which the reward `distribution` is 1.
        strict: Whether the distance must be below the tolerance, as in the release's training reward.
        parser: "lenient" or "official", see `rlkit.rewards.distribution.parse_distribution`.
        which: Whether the "first" or the "last" answer of a completion counts; None is the parser's default.

    Raises:
        UserError: An argument is invalid, or no task can satisfy the arguments.
    """

    id = "causal-v1"
    metric = "correct"
    breakdown = ("kind", "level", "relevant_size")

    def __init__(
        self,
        *,
        level: str | Sequence[str] | Mapping[str, float] = "intervention",
        num_nodes: int = 10,
        cardinality: int = 2,
        roots: int | None = None,
        max_in_degree: int = 2,
        decimals: int = 2,
        concentration: float = 1.0,
        kinds: str | Sequence[str] | Mapping[str, float] | None = None,
        questions_per_graph: int | None = None,
        truth_from: str = "printed",
        prompt_style: str = "official",
        solution_style: str = "verbose",
        tolerance: float = 0.01,
        strict: bool = False,
        parser: str = "lenient",
        which: str | None = None,
    ):
        check_choice("truth_from", truth_from, ("printed", "exact"))
        check_choice("prompt_style", prompt_style, PROMPT_WRITERS)
        self.solution_style = check_choice("solution_style", solution_style, SOLUTION_STYLES)
        check_choice("parser", parser, rewards.PARSERS)
        if which is not None:
            check_choice("which", which, ("first", "last"))
        check_integer("decimals", decimals, 1, 2)
        if truth_from == "exact" and decimals == 1:
            raise UserError(
                "truth_from 'exact' requires decimals 2: tables with one decimal do not determine the answer"
            )
        if parser == "official" and prompt_style != "official":
            raise UserError(
                "parser 'official' parses only answers in the official layout: set prompt_style to 'official'"
            )
        if questions_per_graph is not None:
            check_integer("questions_per_graph", questions_per_graph, 1)
        _check_graph(num_nodes, cardinality, roots, max_in_degree)
        if not 0.01 <= concentration <= 1e6:
            raise UserError(f"concentration must be between 0.01 and 1e6, not {concentration}")
        if not 0 <= tolerance < 1:
            raise UserError(
                "tolerance, a total variation distance, must be at least 0 and below 1, such as 0.01, not "
                f"{tolerance}"
            )
        self.config = TaskConfig(
            graph=GraphConfig(num_nodes, roots, max_in_degree),
            levels=_probabilities("level", level, LEVELS),
            kinds=None if kinds is None else _probabilities("kinds", kinds, KINDS),
            decimals=decimals,
            cardinality=cardinality,
            concentration=concentration,
            truth_from=truth_from,
            prompt_style=prompt_style,
        )
        self.questions_per_graph = questions_per_graph
        self.rewards = _rewards(tolerance, strict, parser, which)
        self.reward_weights = {"parsed": 0.1, "right_length": 0.1, "distribution": 0.8}

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Return the first `n` tasks of a split, by default 8,000 (train, test) or 2,000 (dev).

        Columns: `prompt`, `task_id`, `truth` (the distribution, two decimals), `kind` (what answering
        requires, see `rlkit.envs.causal.queries.kind_of`), `level`, `relevant_size`
        (nodes of the relevant subgraph), `is_core` (removing any condition changes the answer),
        `is_semicore` (removing at least one condition does), `sums` and `products` (operations of min-fill
        elimination), `graph_id`, `question`, and `problem` (model and query as JSON, see
        `rlkit.envs.causal.problem.to_json`).

        Raises:
            UserError: The split is unknown or has no graph of this size.
        """
        import datasets

        check_choice("split", split, SPLITS)
        n = SIZES[split] if n is None else n
        check_integer("n", n, 1)
        check_integer("seed", seed, 0, 2**32 - 1)  # numpy splits larger seeds into two words
        questions_per_graph = self.questions_per_graph or QUESTIONS_PER_GRAPH[split]
        rows = list(generate(self.config, split, seed, n, questions_per_graph))
        return datasets.Dataset.from_list(rows)

    def answer(self, task: Mapping[str, Any]) -> str:
        """Return the correct answer: the list, in the official style preceded by `ANSWER`."""
        return ANSWER_WRITERS[self.config.prompt_style](task["truth"])

    def solution(self, task: Mapping[str, Any]) -> str | None:
        """Return a worked solution that ends in the answer, or None for most counterfactuals.

        With short prompts, if one table row is the answer, the solution ends with that row.
        """
        model, query = from_json(task["problem"])
        short, brief = self.config.prompt_style == "short", self.solution_style == "steps"
        if self.solution_style == "mixed":
            brief = hashed_choice(f"style {task['problem']}", 4) == 0
        names = [short_name(name) for name in model.names] if short else model.names
        lines = [deciding_facts(model, query, names)] if brief else []
        if short and (row := table_row(model, query, names)):
            return "\n".join([*lines, f"{row}={self.answer(task)}"])
        steps = write_steps(model, query, names, table_decimals=self.config.decimals if brief else None)
        if steps is None:
            return None
        lines += steps
        if short:
            return "\n".join([*lines, f"ANSWER {self.answer(task)}"])
        return "\n".join(["THOUGHT PROCESS", *lines, "", official_answer(task["truth"])])

    def solve_prompt(self, prompt: Prompt) -> list[float]:
        """Return the exact answer, rounded to two decimals, to a prompt in the official layout.

        The prompt may come from any source, for example a published item.

        Args:
            prompt: Chat messages, or their content as one string.

        Raises:
            UserError: The prompt cannot be parsed, contradicts itself, or is too large to solve.
        """
        return [h / 100 for h in hundredths(infer(*read_prompt(prompt)))]

    def check_item(self, item: Mapping[str, Any]) -> bool:
        """Return whether the exact answer agrees with a published item within 0.01 total variation."""
        prompt, truth = read_item(item)
        return agrees(self.solve_prompt(prompt), truth)


def _rewards(tolerance: float, strict: bool, parser: str, answer_rule: str | None) -> dict[str, Reward]:
    def bind(reward: Reward, **arguments: float) -> Reward:
        return partial(reward, parser=parser, which=answer_rule, **arguments)

    return {
        "parsed": bind(rewards.parsed),
        "right_length": bind(rewards.right_length),
        "distribution": bind(rewards.distribution, tolerance=tolerance, strict=strict),
        "correct": bind(rewards.distribution, tolerance=tolerance),
        "format": bind(rewards.answer_format),
        "total_variation": bind(rewards.total_variation),
    }


def _probabilities(
    name: str, value: str | Sequence[str] | Mapping[str, float], choices: Sequence[str]
) -> dict[str, float]:
    """Return the probability of each level or kind, from a name, a list of names or a mapping to weights.

    Args:
        name: Name of the argument, for messages.
        value: Value of the argument.
        choices: All levels or kinds.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence | Mapping):
        raise UserError(f"{name} must be a name, a list of names or a mapping to weights, not {value!r}")
    weights = dict(value) if isinstance(value, Mapping) else dict.fromkeys(value, 1.0)
    entry = name.removesuffix("s")
    for choice, weight in weights.items():
        check_choice(entry, choice, choices)
        if not (isinstance(weight, int | float) and 0 <= weight < float("inf")):
            raise UserError(
                f"the weight of {entry} {choice!r} must be a finite number of at least 0, not {weight!r}"
            )
    total = sum(weights.values())
    if total <= 0:
        raise UserError(f"no {entry} has a positive weight: choose from {', '.join(choices)}")
    # In a fixed order, so that the order in a config does not change the tasks.
    return {choice: weights[choice] / total for choice in choices if choice in weights}


def _check_graph(num_nodes: int, cardinality: int, roots: int | None, max_in_degree: int) -> None:
    check_integer("num_nodes", num_nodes, 2, MAX_NODES)
    check_integer("cardinality", cardinality, 2, 64)
    check_integer("max_in_degree", max_in_degree, 1)
    if max_in_degree >= num_nodes:
        raise UserError(
            f"max_in_degree is {max_in_degree}, but in a graph of {num_nodes} nodes a node has at most"
            f" {num_nodes - 1} parents: lower max_in_degree or raise num_nodes"
        )
    if roots is not None:
        check_integer("roots", roots, 1, num_nodes - 1)
    # A table has one axis per parent and one for the node.
    if cardinality ** (max_in_degree + 1) > MAX_TABLE_CELLS:
        raise UserError(
            f"the table of a node with {max_in_degree} parents and cardinality {cardinality} has more than"
            f" {MAX_TABLE_CELLS} cells: lower max_in_degree or cardinality"
        )
