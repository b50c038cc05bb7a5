"""How far an environment's exact solver agrees with published answers: `rlkit check --items`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.environment import Environment
from rlkit.errors import UserError


@dataclass(frozen=True)
class Agreement:
    """The outcome: `agree` of `total` items, as a share, and the items that the solver rejected.

    `failed` has `{"line": int, "reason": str}` for each of them; they count as disagreeing.
    """

    agreement: float
    agree: int
    total: int
    failed: list[dict[str, Any]]

    def __str__(self) -> str:
        """Return lines for a person."""
        lines = [f"{self.agree} of {self.total} answers agree ({self.agreement:.1%})"]
        return "\n".join([*lines, *(f"line {item['line']}: {item['reason']}" for item in self.failed)])


def solver_agreement(environment: Environment, path: str) -> Agreement:
    """Answer the items of a JSONL file with `environment.solve_prompt` and compare with their `ground_truth`.

    Two distributions agree when their total variation distance, rounded to two decimals, is at most 0.01.

    Raises:
        UserError: the environment has no solver; the file is missing, empty, not JSONL, or lacks a field.
    """
    solve = getattr(environment, "solve_prompt", None)
    if solve is None:
        raise UserError(f"{environment.id} has no solver to compare with the items of a file")
    agree, total, failed = 0, 0, []
    for line, prompt, truth in read_items(path):
        total += 1
        try:
            agree += agrees(solve(prompt), truth)
        except UserError as error:
            failed.append({"line": line, "reason": str(error)})
    if not total:
        raise UserError(f"{path} has no items")
    return Agreement(agree / total, agree, total, failed)


def agrees(answer: Sequence[float], truth: Sequence[float]) -> bool:
    """Compare two distributions in whole hundredths: floats would decide a distance of 0.01 arbitrarily."""
    if len(answer) != len(truth):
        return False
    return sum(abs(round(100 * p) - round(100 * q)) for p, q in zip(answer, truth, strict=True)) <= 2


def read_items(path: str) -> Iterator[tuple[int, Any, list[float]]]:
    """Yield the line number, prompt (a text or chat messages) and truth of each item."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON: {error}") from error
        yield number, *read_item(item, f"{path}:{number}")


def read_item(item: Any, where: str) -> tuple[Any, list[float]]:
    """Return prompt and truth of an item; the RLCausal release keeps the truth inside `reward_model`."""
    if not isinstance(item, Mapping):
        raise UserError(f"{where}: not a JSON object")
    fields = {**(item.get("reward_model") or {}), **item}
    for name in ("prompt", "ground_truth"):
        if name not in fields:
            raise UserError(f"{where}: there is no field {name!r}")
    prompt, truth = fields["prompt"], fields["ground_truth"]
    if not isinstance(prompt, str) and not is_chat(prompt):
        raise UserError(f"{where}: prompt is neither a text nor a list of chat messages")
    if not isinstance(truth, list) or not truth or not all(map(is_probability, truth)):
        raise UserError(f"{where}: ground_truth is not a list of probabilities")
    return prompt, truth


def is_probability(value: Any) -> bool:
    """Tell a number from 0 to 1."""
    return isinstance(value, int | float) and 0 <= value <= 1


def is_chat(prompt: Any) -> bool:
    """Tell a list of messages, each with a text as content."""
    return isinstance(prompt, list) and all(
        isinstance(message, Mapping) and isinstance(message.get("content"), str) for message in prompt
    )
