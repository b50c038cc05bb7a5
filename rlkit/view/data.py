"""Saved rollouts of a run: reading by step, filtering, sorting and searching, without any terminal code.

A rollout is a dictionary of the columns of its file, plus `step` and `rollout`, its number in the step
(from 1).
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
LIST_COLUMNS = ("task_id", "reward", "advantage", "length", "truncated", "invalid", "log_prob_gap")
TEXT_COLUMNS = ("prompt", "turns", "completion")
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"


@dataclass(frozen=True)
class Filters:
    """Conditions that a rollout must meet to be shown; a missing value is outside every range.

    Attributes:
        text: Substring of the prompt or of a turn; case is ignored.
        reward: Minimum and maximum reward.
        length: Minimum and maximum number of tokens.
        truncated: Whether the rollout is truncated; None for either.
        invalid: Whether the rollout is invalid, or the reason why it is; None for either.
    """

    text: str = ""
    reward: tuple[float, float] | None = None
    length: tuple[float, float] | None = None
    truncated: bool | None = None
    invalid: bool | str | None = None

    def keep(self, row: Mapping[str, Any]) -> bool:
        """Return whether a rollout meets all conditions."""
        return (
            _in_range(row.get("reward"), self.reward)
            and _in_range(row.get("length"), self.length)
            and self.truncated in (None, bool(row.get("truncated")))
            and self.invalid in (None, row.get("invalid"), row.get("invalid") is not None)
            and (not self.text or any(self.text.casefold() in text.casefold() for text in searchable(row)))
        )


def _in_range(value: float | None, limits: tuple[float, float] | None) -> bool:
    return limits is None or (value is not None and limits[0] <= value <= limits[1])


def searchable(row: Mapping[str, Any]) -> list[str]:
    """Return the strings that a search covers: the prompt and each turn (in older files, the completion)."""
    turns = row.get("turns")
    contents = [turn.get("content") for turn in turns] if turns else [row.get("completion")]
    return [str(text) for text in (row.get("prompt"), *contents) if text is not None]


def parse_range(text: str) -> tuple[float, float] | None:
    """Parse `0.5`, `0.2..0.8`, `..0.5` or `0.5..` into (minimum, maximum); empty input gives None.

    Raises:
        ValueError: If the input is anything else.
    """
    text = text.strip()
    if not text:
        return None
    if re.fullmatch(NUMBER, text, re.IGNORECASE):
        return float(text), float(text)
    match = re.fullmatch(rf"({NUMBER})?\s*\.\.\s*({NUMBER})?", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a range such as 0.2..0.8")
    return float(match[1] or -math.inf), float(match[2] or math.inf)


def sort_rollouts(rows: Iterable[RolloutRow], column: str, descending: bool) -> list[RolloutRow]:
    """Sort rollouts stably by a column; those without a value come last in both directions."""
    rows = list(rows)
    with_value = [row for row in rows if row.get(column) is not None]
    # Numbers start again in each step, so rollouts of several steps are sorted by step first.
    with_value.sort(key=rollout_key if column == "rollout" else itemgetter(column), reverse=descending)
    return with_value + [row for row in rows if row.get(column) is None]


def rollout_key(row: RolloutRow) -> tuple[int, int]:
    """Return the step and number of a rollout, which identify it in a run."""
    return row["step"], row["rollout"]


def invalid_reasons(rows: Iterable[RolloutRow]) -> list[str]:
    """Return the reasons why rollouts are invalid, the most frequent first."""
    counts: dict[str, int] = {}
    for row in rows:
        if row.get("invalid") is not None:
            counts[row["invalid"]] = counts.get(row["invalid"], 0) + 1
    return sorted(counts, key=lambda reason: -counts[reason])


class RolloutSource(Protocol):
    """Reader of saved rollouts; `rlkit.runs.record.RolloutFiles` implements it."""

    run: Path

    @property
    def files(self) -> Mapping[int, Path]:
        """File of each step."""

    def reload(self) -> None:
        """List the files again; raises UserError if there are none."""

    def version(self, step: int) -> int:
        """Return a number that changes when the file of a step does."""

    def columns(self, step: int) -> Sequence[str]:
        """Return the columns of a step's file."""

    def read(self, step: int, columns: Collection[str] | None = None) -> list[dict[str, Any]]:
        """Return the records of a step, with all columns or the given ones."""


class Rollouts:
    """Rollouts of a run that may still be training; a step is cached until its file changes.

    Args:
        source: Reader of the run's files.
    """

    def __init__(self, source: RolloutSource):
        self.source = source
        self.run = source.run
        self._means: dict[int, tuple[int, RolloutRow]] = {}
        self._step: tuple[int, int, list[RolloutRow]] | None = None

    @property
    def files(self) -> Mapping[int, Path]:
        """File of each step."""
        return self.source.files

    def reload(self) -> None:
        """List the files again; raises UserError if there are none."""
        self.source.reload()

    def step(self, step: int) -> list[RolloutRow]:
        """Return all rollouts of a step with all columns; raises UserError if the file cannot be read."""
        version = self.source.version(step)
        if self._step is None or self._step[:2] != (step, version):
            self._step = step, version, self._read(step)
        return self._step[2]

    def find(self, step: int, filters: Filters) -> list[RolloutRow]:
        """Return the rollouts of a step that the filters keep, with the columns of the list alone.

        Prompts and turns are most of a file, so they are read only if they are searched.
        """
        rows = self._read(step, (*LIST_COLUMNS, *(TEXT_COLUMNS if filters.text else ())))
        return [{k: v for k, v in row.items() if k not in TEXT_COLUMNS} for row in rows if filters.keep(row)]

    def rewards(self, step: int) -> list[str]:
        """Return the columns of a step's file that are rewards."""
        return [name for name in self.source.columns(step) if _is_reward(name)]

    def means(self, step: int) -> RolloutRow:
        """Return the number of a step's rollouts and the means of their rewards, lengths and flags."""
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
            columns = [name for name in columns if name != "completion"]  # the turns contain it
        rows = self.source.read(step, columns)
        return [{**row, "step": step, "rollout": number} for number, row in enumerate(rows, start=1)]


def _is_reward(column: str) -> bool:
    return column == "reward" or column.startswith("rewards/")
