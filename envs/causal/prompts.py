"""Format questions as prompts, and answers as completions, in one of two styles.

`official` is the layout of RLCausal: a system message that asks for a thought process and an answer, and a
user message with the variables, the graph in DOT, the tables and the question. Layout and question wording
(with its misspelling, "intervented") are from the release; we wrote the other sentences. `short` has the same
content in far fewer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

from rlkit.envs.causal.model import CausalModel, CausalQuery

Messages = list[dict[str, str]]

SYSTEM = """\
You are skilled in causal inference with graphical models. You will be asked for a probability in a \
structural causal model.

Lay out your solution in two parts:
  THOUGHT PROCESS
  Every intermediate step of analysis, reasoning and computation.

  ANSWER
  Only the final answer to the query, as a list of numbers such as [0.1, 0.7, 0.2] or [0.1, 0.9]. Round it \
to two digits."""

SELECTORS = """\
Furthermore, every variable v is a deterministic function of its parents pa(v) and of independent exogenous \
selector variables. There is one selector for each possible joint assignment to pa(v), and its marginal \
distribution is p(v | pa(v)) for that assignment. Under a particular assignment to pa(v), v takes the value \
of the selector of that assignment."""

SHORT_SELECTORS = (
    "Each row's value is drawn beforehand, independently; a variable takes that of the row that applies."
)

QUESTIONS = {
    "association": "given it is observed that {o}={x}",
    "intervention": "given we intervented to set {j} to {c}",
    "counterfactual": "given we first observed {o} = {x} and then intervened to set {j} to {c}",
}
SHORT_QUESTIONS = {
    "association": "P({k}|{o}={x}) = ?",
    "intervention": "P({k}|do({j}={c})) = ?",
    "counterfactual": "Observed {o}={x}. Had we set {j}={c}, P({k}) = ?",
}


def official_prompt(model: CausalModel, query: CausalQuery, decimals: int = 2) -> Messages:
    """Return the chat messages in the RLCausal layout. `model` must have the rounded tables.

    The layout omits trailing zeros, so it does not need `decimals`.
    """
    # Domains and graph list the nodes by name, the tables in topological order.
    nodes = sorted(range(len(model)), key=lambda node: int(model.names[node][1:]))
    names = [model.names[node] for node in nodes]
    parts = [
        "Below is a structural causal model over discrete random variables. The variables are "
        f"{', '.join(names)}. They can take these values.",
        "\n".join(
            f"{model.names[node]} can take values in {list(range(model.cards[node]))}" for node in nodes
        ),
        "This is the causal directed acyclic graph (DAG):",
        _dot(model, names) + "\n",
        "These are the causal conditional probability tables (CPT) of the DAG:",
        *(f"CPTs for {name}:\n" + "\n".join(_rows(model, i)) for i, name in enumerate(model.names)),
    ]
    parts[-1] += "\n"  # the release has an extra blank line here and after the graph
    if query.level == "counterfactual":
        parts.append(SELECTORS)
    parts += [
        f"Here's your Question: {official_question(model, query)}",
        "----------",
        "Now start your solution process. Be precise.",
    ]
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n\n".join(parts)}]


def official_question(model: CausalModel, query: CausalQuery) -> str:
    """Return the question in the wording of the RLCausal release."""
    condition = QUESTIONS[query.level].format(**_placeholders(query, model.names))
    return f"What is the marginal distribution of {model.names[query.target]} {condition}?"


def _dot(model: CausalModel, names: Sequence[str]) -> str:
    rank = {name: i for i, name in enumerate(names)}
    edges = []
    for name, node_parents in zip(model.names, model.parents, strict=True):
        edges += [(model.names[p], name) for p in node_parents]
    edges.sort(key=lambda edge: (rank[edge[0]], rank[edge[1]]))
    lines = [f"{name};" for name in names] + [f"{a} -> {b};" for a, b in edges]
    return "\n".join(["strict digraph {", *lines, "}"])


def _rows(model: CausalModel, node: int) -> Iterator[str]:
    for assignment, row in table_rows(model, node):
        condition = ",".join(f"{model.names[p]}={x}" for p, x in assignment)
        event = f"{model.names[node]} | {condition}" if condition else model.names[node]
        yield f"P({event}) = {official_list(row)}"


def short_prompt(model: CausalModel, query: CausalQuery, decimals: int = 2) -> Messages:
    """Return one user message with table rows and question. `model` must have the rounded tables."""
    names = [short_name(name) for name in model.names]
    lines = []
    for node, name in enumerate(names):
        for assignment, row in table_rows(model, node):
            condition = ",".join(f"{names[p]}={x}" for p, x in assignment)
            event = f"{name}|{condition}" if condition else name
            lines.append(f"P({event})={short_list(row, decimals)}")
    if query.level == "counterfactual":
        lines.append(SHORT_SELECTORS)
    # The example has as many entries as the answer; with three or more values, zeros between the outer two.
    size = model.cards[query.target]
    example = [0.25, *[0.0] * (size - 2), 0.75] if size > 2 else [0.25, 0.75]
    lines += [short_question(model, query), f"Answer with a list such as {short_list(example)}."]
    return [{"role": "user", "content": "\n".join(lines)}]


def short_question(model: CausalModel, query: CausalQuery) -> str:
    """Return the question in mathematical notation, with `do` for interventions."""
    names = [short_name(name) for name in model.names]
    return SHORT_QUESTIONS[query.level].format(**_placeholders(query, names))


def short_name(name: str) -> str:
    """Shorten `v0` to `a` up to `v25` to `z`; return any other name unchanged."""
    index = int(name[1:])
    return chr(ord("a") + index) if index < 26 else name


def table_rows(model: CausalModel, node: int) -> Iterator[tuple[list[tuple[int, int]], list[float]]]:
    """Yield each row of a node's table, in lexicographic order: (parent, value) pairs and probabilities."""
    parents = model.parents[node]
    for values in product(*(range(model.cards[p]) for p in parents)):
        yield list(zip(parents, values, strict=True)), model.tables[node][values].tolist()


def _placeholders(query: CausalQuery, names: Sequence[str]) -> dict[str, str | int]:
    """Return the values that `QUESTIONS` and `SHORT_QUESTIONS` are formatted with."""
    values: dict[str, str | int] = {"k": names[query.target]}
    if query.observed:
        values |= {"o": names[query.observed[0]], "x": query.observed[1]}
    if query.intervened:
        values |= {"j": names[query.intervened[0]], "c": query.intervened[1]}
    return values


def official_list(numbers: Sequence[float]) -> str:
    """Format numbers with at most two decimals: `[0.3, 0.7]`."""
    return str([round(number, 2) for number in numbers])


def short_list(numbers: Sequence[float], decimals: int = 2) -> str:
    """Format numbers with a fixed number of decimals: `[0.30, 0.70]`."""
    return f"[{', '.join(f'{number:.{decimals}f}' for number in numbers)}]"


def official_answer(truth: Sequence[float]) -> str:
    """Return the answer section of the official layout."""
    return f"ANSWER\n{official_list(truth)}"


PROMPT_WRITERS: dict[str, Callable[[CausalModel, CausalQuery, int], Messages]] = {
    "official": official_prompt,
    "short": short_prompt,
}
QUESTION_WRITERS: dict[str, Callable[[CausalModel, CausalQuery], str]] = {
    "official": official_question,
    "short": short_question,
}
ANSWER_WRITERS: dict[str, Callable[[Sequence[float]], str]] = {
    "official": official_answer,
    "short": short_list,
}
