"""The saved rollouts of a run: read a step at a time, filtered, ordered and searched. No terminal here.

A rollout is a dictionary of what its file has, with `step` and `rollout`, its place in that step from 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

RolloutRow = dict[str, Any]
LISTED = ("task_id", "reward", "advantage", "length", "truncated", "invalid", "log_prob_gap")
TEXTS = ("prompt", "turns", "completion")
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"


@dataclass(frozen=True)
class Filters:
    """Which rollouts to show; what a rollout does not have is in no range.

    Attributes:
        text: stands in the prompt or in a turn, in any case of letters.
        reward: lowest and highest.
        length: fewest and most tokens.
        truncated: None for all.
        invalid: None for all, True for those that are, False for those that are not, or the reason.
    """

    text: str = ""
    reward: tuple[float, float] | None = None
    length: tuple[float, float] | None = None
    truncated: bool | None = None
    invalid: bool | str | None = None

    def keep(self, row: Mapping[str, Any]) -> bool:
        """Whether to show a rollout."""
        return (
            _inside(row.get("reward"), self.reward)
            and _inside(row.get("length"), self.length)
            and self.truncated in (None, bool(row.get("truncated")))
            and self.invalid in (None, row.get("invalid"), row.get("invalid") is not None)
            and (not self.text or any(self.text.casefold() in text.casefold() for text in texts(row)))
        )


def _inside(value: float | None, limits: tuple[float, float] | None) -> bool:
    return limits is None or (value is not None and limits[0] <= value <= limits[1])


def texts(row: Mapping[str, Any]) -> list[str]:
    """What can be searched: the prompt, and each turn or, in older files, the completion."""
    turns = row.get("turns")
    said = [turn.get("content") for turn in turns] if turns else [row.get("completion")]
    return [str(text) for text in (row.get("prompt"), *said) if text is not None]


def parse_range(text: str) -> tuple[float, float] | None:
    """Read `0.5`, `0.2..0.8`, `..0.5` or `0.5..`; nothing is None. Raises ValueError for anything else."""
    text = text.strip()
    if not text:
        return None
    if re.fullmatch(NUMBER, text, re.IGNORECASE):
        return float(text), float(text)
    match = re.fullmatch(rf"({NUMBER})?\s*\.\.\s*({NUMBER})?", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no range such as 0.2..0.8")
    return float(match[1] or -math.inf), float(match[2] or math.inf)


def ordered(rows: Iterable[RolloutRow], column: str, descending: bool) -> list[RolloutRow]:
    """Sort by a column; rollouts that have no value come last either way, and equal ones stay in order."""
    rows = list(rows)
    having = [row for row in rows if row.get(column) is not None]
    # Places in a step, of several steps, are those in the run.
    having.sort(key=place if column == "rollout" else itemgetter(column), reverse=descending)
    return having + [row for row in rows if row.get(column) is None]


def place(row: RolloutRow) -> tuple[int, int]:
    """Step and place in it, which name a rollout of a run."""
    return row["step"], row["rollout"]


def reasons(rows: Iterable[RolloutRow]) -> list[str]:
    """The reasons for which rollouts are invalid, the most frequent first."""
    counts: dict[str, int] = {}
    for row in rows:
        if row.get("invalid") is not None:
            counts[row["invalid"]] = counts.get(row["invalid"], 0) + 1
    return sorted(counts, key=lambda reason: -counts[reason])


class RolloutSource(Protocol):
    """Reads saved rollouts; `rlkit.runs.record.RolloutFiles` does."""

    run: Path

    @property
    def files(self) -> Mapping[int, Path]:
        """The file of each step."""

    def reload(self) -> None:
        """List the files again; raises UserError when there are none."""

    def version(self, step: int) -> int:
        """Return a number that changes when the file of a step does."""

    def columns(self, step: int) -> Sequence[str]:
        """Return the columns of a step's file."""

    def read(self, step: int, columns: Collection[str] | None = None) -> list[dict[str, Any]]:
        """Return the records of a step, or some of their columns."""


class Rollouts:
    """The rollouts of a run, which may still train; what was read is kept until the file changes.

    Args:
        source: reads them.
    """

    def __init__(self, source: RolloutSource):
        self.source = source
        self.run = source.run
        self._means: dict[int, tuple[int, RolloutRow]] = {}
        self._step: tuple[int, int, list[RolloutRow]] | None = None

    @property
    def files(self) -> Mapping[int, Path]:
        """The file of each step."""
        return self.source.files

    def reload(self) -> None:
        """Look again which files there are; raises UserError when there are none."""
        self.source.reload()

    def step(self, step: int) -> list[RolloutRow]:
        """All rollouts of a step with all they have; raises UserError when the file cannot be read."""
        version = self.source.version(step)
        if self._step is None or self._step[:2] != (step, version):
            self._step = step, version, self._read(step)
        return self._step[2]

    def find(self, step: int, filters: Filters) -> list[RolloutRow]:
        """The rollouts of a step that the filters keep, with what a list shows of them."""
        rows = self._read(step, (*LISTED, *(TEXTS if filters.text else ())))
        return [{k: v for k, v in row.items() if k not in TEXTS} for row in rows if filters.keep(row)]

    def rewards(self, step: int) -> list[str]:
        """The columns of a step's file that are rewards."""
        return [name for name in self.source.columns(step) if _is_reward(name)]

    def means(self, step: int) -> RolloutRow:
        """How many rollouts a step has, and the means of their rewards, lengths and flags."""
        version = self.source.version(step)
        if self._means.get(step, (None,))[0] != version:
            names = [*filter(_is_reward, self.source.columns(step)), "length", "truncated"]
            rows = self._read(step, (*names, "invalid"))
            means: RolloutRow = {"rollouts": len(rows)}
            for name in names:
                values = [row[name] for row in rows if row.get(name) is not None]
                if values:
                    means[name] = sum(values) / len(values)
            if rows:
                means["invalid"] = sum(row.get("invalid") is not None for row in rows) / len(rows)
            self._means[step] = version, means
        return self._means[step][1]

    def _read(self, step: int, columns: Collection[str] | None = None) -> list[RolloutRow]:
        if columns is not None and "turns" in columns and "turns" in self.source.columns(step):
            columns = [name for name in columns if name != "completion"]  # it is the assistant's turns
        rows = self.source.read(step, columns)
        return [{**row, "step": step, "rollout": number} for number, row in enumerate(rows, start=1)]


def _is_reward(column: str) -> bool:
    return column == "reward" or column.startswith("rewards/")
