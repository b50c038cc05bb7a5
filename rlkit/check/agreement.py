"""How far an environment's exact solver agrees with published answers: `rlkit check --items`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.environment import Environment
from rlkit.errors import InvalidItemError, UserError


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
    """Let `environment.check_item` solve the items of a JSONL file, and count how many agree.

    Raises:
        UserError: the environment has no solver; the file is missing, empty, not JSONL, or a line is no item.
    """
    if type(environment).check_item is Environment.check_item:
        raise UserError(f"{environment.id} has no solver to compare with the items of a file")
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
    """Yield the line number and the object of each line that is not blank; raises UserError."""
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
        if not isinstance(item, Mapping):
            raise UserError(f"{path}:{number}: not a JSON object")
        yield number, item
