"""Agreement of an environment's exact solver with published answers: `rlkit check --items`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.environment import Environment
from rlkit.errors import InvalidItemError, UserError


@dataclass(frozen=True)
class Agreement:
    """Result of comparing a solver with published items.

    Attributes:
        agreement: Share of items on which the solver agrees.
        agree: Number of items on which the solver agrees.
        total: Number of items.
        failed: Items that the solver rejected, as `{"line": int, "reason": str}`; they count as disagreement.
    """

    agreement: float
    agree: int
    total: int
    failed: list[dict[str, Any]]

    def __str__(self) -> str:
        """Format the result for the terminal."""
        lines = [f"{self.agree} of {self.total} answers agree ({self.agreement:.1%})"]
        return "\n".join([*lines, *(f"line {item['line']}: {item['reason']}" for item in self.failed)])


def solver_agreement(environment: Environment, path: str) -> Agreement:
    """Solve the items of a JSONL file with `environment.check_item` and count how many answers agree.

    Raises:
        UserError: If the environment has no solver, the file is missing, empty or not JSONL, or an item is
            malformed.
    """
    if type(environment).check_item is Environment.check_item:
        raise UserError(f"{environment.id} has no solver to compare with published items")
    agree, total, failed = 0, 0, []
    for line, item in read_items(path):
        total += 1
        try:
            agree += environment.check_item(item)
        except InvalidItemError as error:
            raise UserError(f"{path}:{line}: {error}") from error
        except UserError as error:
            failed.append({"line": line, "reason": str(error)})
    if not total:
        raise UserError(f"{path} has no items")
    return Agreement(agree / total, agree, total, failed)


def read_items(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the line number and object of each line of a JSONL file that is not blank.

    Raises:
        UserError: The file cannot be read, or a line is not a JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:  # too many digits, or too deeply nested
            raise UserError(f"{path}:{number}: not valid JSON: {error}") from error
        if not isinstance(item, Mapping):
            raise UserError(f"{path}:{number}: not a JSON object")
        yield number, item
