r"""Read a data set of problems and answers, from a file or the hub, and check every row of it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlkit.errors import UserError
from rlkit.retrieval.reading import read_rows
from rlkit.rewards.boxed import equivalent, is_readable, last_box, read_integer

PROBLEM_COLUMNS = ("problem", "question", "prompt", "input")
ANSWER_COLUMNS = ("answer", "final_answer", "expected_answer", "solution")
BAD_ROWS = ("error", "drop")

_FINAL = "####"  # GSM8K: the answer stands behind it
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K: annotations such as <<48/2=24>>
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """A row that was found good."""

    text: str
    answer: str
    solution: str  # a worked one that ends in the boxed answer, or ""
    extra: Mapping[str, str]
    dataset: str
    number: int  # of the row, from 1

    @property
    def where(self) -> str:
        """Data set and row."""
        return f"{self.dataset}, row {self.number}"

    @property
    def task_id(self) -> str:
        """A hash of the problem and its answer."""
        return content_id(self.text, self.answer)


def content_id(text: str, answer: str) -> str:
    """The durable id of a problem."""
    return hashlib.sha256(json.dumps([text, answer]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Source:
    """Where the rows are and how to read them: arguments of `MathEnvironment`."""

    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    problem_column: str | None = None
    answer_column: str | None = None
    extra_columns: Sequence[str] = ()
    bad_rows: str = "error"

    def problems(self) -> list[Problem]:
        """Every good row once, in the order of the data set.

        Raises:
            UserError: the data cannot be read or lack a column; or, unless `bad_rows` is "drop", a row has no
                problem or no answer, or two rows have one problem and different answers.
        """
        rows = read_rows(self.dataset, self.config, self.split, self.revision)
        columns = list(dict.fromkeys(str(key) for row in rows[:100] for key in row))
        problem = find_column(self.dataset, columns, "problem_column", self.problem_column, PROBLEM_COLUMNS)
        answer = find_column(self.dataset, columns, "answer_column", self.answer_column, ANSWER_COLUMNS)
        for name in self.extra_columns:
            find_column(self.dataset, columns, "breakdown_columns", name, ())
        return self._without_duplicates(self._good_rows(rows, problem, answer))

    def _good_rows(self, rows: Iterable[Mapping[str, Any]], problem: str, answer: str) -> Iterator[Problem]:
        for number, row in enumerate(rows, 1):
            where = f"{self.dataset}, row {number}"
            text, full = as_text(row.get(problem)), as_text(row.get(answer))
            short = final_answer(full)
            if not text:
                self.bad(f"{where}: there is no problem in column {problem!r}")
                continue
            if not short:
                self.bad(f"{where}: there is no answer in column {answer!r} ({full[:60]!r})")
                continue
            extra = {name: as_text(row.get(name)) for name in self.extra_columns}
            yield Problem(text, short, worked_solution(full, short), extra, self.dataset, number)

    def _without_duplicates(self, problems: Iterable[Problem]) -> list[Problem]:
        first: dict[str, Problem] = {}
        conflicting = set()
        for problem in problems:
            key = " ".join(problem.text.split())
            other = first.setdefault(key, problem)
            if other.answer != problem.answer and not equivalent(problem.answer, other.answer):
                answers = f"{problem.answer[:60]!r}, not {other.answer[:60]!r}"
                self.bad(f"{problem.where}: the problem of row {other.number} with another answer, {answers}")
                conflicting.add(key)
        return [problem for key, problem in first.items() if key not in conflicting]

    def bad(self, message: str) -> None:
        """Say that a row is bad: an error, or a line in the log when such rows are dropped."""
        if self.bad_rows == "error":
            raise UserError(f"{message}; bad_rows 'drop' leaves such rows out")
        _log.warning("left out: %s", message)


def final_answer(text: str) -> str:
    r"""The answer in a cell: what stands behind the last `####`, in the last `\boxed{}`, or all of it."""
    if _FINAL in text:
        return text.rpartition(_FINAL)[2].strip()
    if "\\boxed" in text:
        return last_box(text) or ""
    return text.strip().removeprefix("$").removesuffix("$").strip()


def worked_solution(text: str, answer: str) -> str:
    """The solution that an answer column holds, made to end in the boxed answer, or "" if it holds none."""
    if _FINAL in text:
        steps = _CALCULATOR.sub("", text.rpartition(_FINAL)[0]).strip()
        return f"{steps}\n\\boxed{{{answer}}}" if steps else ""
    return text.strip() if "\\boxed" in text else ""


def as_text(value: object) -> str:
    """A cell as text: numbers as they are written, "" for what is missing (NaN, too) or is neither."""
    if isinstance(value, bool) or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).strip() if isinstance(value, str | int | float) else ""


def find_column(
    dataset: str, columns: Sequence[str], argument: str, name: str | None, known: Sequence[str]
) -> str:
    """The column that was named, or the first of the known ones; or a `UserError` listing those there."""
    if name is not None:
        if name not in columns:
            raise UserError(f"{dataset} has no column {name!r} ({argument}); it has {', '.join(columns)}")
        return name
    for column in known:
        if column in columns:
            return column
    raise UserError(f"{dataset}: name the {argument}; its columns are {', '.join(columns) or 'none'}")


def ordered(problems: Iterable[Problem], seed: int) -> list[Problem]:
    """The problems in the order of a seed, which does not depend on the order of the rows."""
    return sorted(problems, key=lambda p: hashlib.sha256(f"{seed} {p.task_id}".encode()).digest())


def readable(answer: str, comparison: str) -> bool:
    r"""Whether completions can be compared with an answer: it survives `\boxed{}` and can be read."""
    if last_box(f"\\boxed{{{answer}}}") != answer:
        return False
    return read_integer(answer) is not None if comparison == "integer" else is_readable(answer)
