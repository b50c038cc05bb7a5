"""Read a dataset of problems and answers, from a file or the Hugging Face Hub, and validate every row."""

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
from rlkit.rewards.boxed import equivalent, last_box, read_integer, why_unreadable

PROBLEM_COLUMNS = ("problem", "question", "prompt", "input")
ANSWER_COLUMNS = ("answer", "final_answer", "expected_answer", "solution")
BAD_ROWS = ("error", "drop")

NUM_EXAMPLES = 3  # of answers that cannot be compared, in a message

_FINAL_MARKER = "####"  # GSM8K: the final answer follows it
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K: annotations such as <<48/2=24>>
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """A valid row of a dataset.

    Attributes:
        text: Statement of the problem.
        answer: Final answer.
        solution: Worked solution that ends in the boxed answer, or "".
        extra: Values of the columns in `extra_columns`.
        dataset: Path or name of the dataset.
        row: Number of the row, from 1.
    """

    text: str
    answer: str
    solution: str
    extra: Mapping[str, str]
    dataset: str
    row: int

    @property
    def location(self) -> str:
        """Dataset and row, for error messages."""
        return f"{self.dataset}, row {self.row}"

    @property
    def task_id(self) -> str:
        """Hash of the problem and its answer, see `content_id`."""
        return content_id(self.text, self.answer)


def content_id(text: str, answer: str) -> str:
    """Return the id of a problem: a hash that is stable across runs and row orders."""
    # JSON rather than concatenation, which would give ("1 + 1", "12") and ("1 + 11", "2") the same id.
    return hashlib.sha256(json.dumps([text, answer]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Source:
    """A dataset and how to read it: the arguments of `MathEnvironment` about datasets."""

    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    problem_column: str | None = None
    answer_column: str | None = None
    extra_columns: Sequence[str] = ()
    bad_rows: str = "error"

    def problems(self) -> list[Problem]:
        """Return the valid rows without duplicates, in the order of the dataset.

        Raises:
            UserError: The dataset cannot be read or lacks a column. Unless `bad_rows` is "drop": a row has no
                problem or no answer, or two rows have the same problem but different answers.
        """
        rows = read_rows(self.dataset, self.config, self.split, self.revision)
        # Rows of a JSONL file may have different keys.
        columns = list(dict.fromkeys(str(key) for row in rows[:100] for key in row))
        problem_column = find_column(
            self.dataset, columns, "problem_column", self.problem_column, PROBLEM_COLUMNS
        )
        answer_column = find_column(
            self.dataset, columns, "answer_column", self.answer_column, ANSWER_COLUMNS
        )
        for name in self.extra_columns:
            find_column(self.dataset, columns, "breakdown_columns", name, ())
        return self._deduplicate(self._valid_rows(rows, problem_column, answer_column))

    def _valid_rows(
        self, rows: Iterable[Mapping[str, Any]], problem_column: str, answer_column: str
    ) -> Iterator[Problem]:
        for number, row in enumerate(rows, 1):
            location = f"{self.dataset}, row {number}"
            text, cell = cell_to_str(row.get(problem_column)), cell_to_str(row.get(answer_column))
            answer = final_answer(cell)
            if not text:
                self.reject_row(f"{location}: column {problem_column!r} has no problem")
                continue
            if not answer:
                self.reject_row(f"{location}: column {answer_column!r} has no answer ({cell[:60]!r})")
                continue
            extra = {name: cell_to_str(row.get(name)) for name in self.extra_columns}
            yield Problem(text, answer, worked_solution(cell, answer), extra, self.dataset, number)

    def _deduplicate(self, problems: Iterable[Problem]) -> list[Problem]:
        """Keep the first row of each problem, and none of a problem whose answers contradict each other."""
        first_rows: dict[str, Problem] = {}
        conflicting = set()
        for problem in problems:
            key = " ".join(problem.text.split())
            first = first_rows.setdefault(key, problem)
            if first.answer != problem.answer and not equivalent(problem.answer, first.answer):
                answers = f"{problem.answer[:60]!r}, not {first.answer[:60]!r}"
                self.reject_row(
                    f"{problem.location}: same problem as row {first.row} but a different answer, {answers}"
                )
                conflicting.add(key)
        return [problem for key, problem in first_rows.items() if key not in conflicting]

    def comparable(self, problems: Sequence[Problem], comparison: str) -> list[Problem]:
        """Return the problems whose answers completions can be compared with.

        Raises:
            UserError: Some cannot, unless `bad_rows` is "drop". Training on such a problem would give every
                completion the reward 0.
        """
        reasons = {problem.row: why_incomparable(problem.answer, comparison) for problem in problems}
        rejected = [problem for problem in problems if reasons[problem.row] is not None]
        if rejected:
            examples = "; ".join(
                f"row {problem.row}, {problem.answer[:60]!r} ({reasons[problem.row]})"
                for problem in rejected[:NUM_EXAMPLES]
            )
            self.reject_row(
                f"{self.dataset}: {len(rejected)} of {len(problems)} answers cannot be compared: {examples}"
            )
        return [problem for problem in problems if reasons[problem.row] is None]

    def reject_row(self, message: str) -> None:
        """Raise `UserError` about an unusable row, or log a warning if `bad_rows` is "drop"."""
        if self.bad_rows == "error":
            raise UserError(f"{message}; set bad_rows to 'drop' to skip such rows")
        _log.warning("dropped: %s", message)


def final_answer(text: str) -> str:
    r"""Return the answer in a cell: after the last `####`, in the last `\boxed{}`, or the entire cell."""
    if _FINAL_MARKER in text:
        return text.rpartition(_FINAL_MARKER)[2].strip()
    if "\\boxed" in text:
        return last_box(text) or ""
    # Some datasets write answers in math mode, as $x^2$.
    return text.strip().removeprefix("$").removesuffix("$").strip()


def worked_solution(text: str, answer: str) -> str:
    """Return the worked solution in a cell, ending in the boxed answer, or "" if the cell has none."""
    if _FINAL_MARKER in text:
        steps = _CALCULATOR.sub("", text.rpartition(_FINAL_MARKER)[0]).strip()
        return f"{steps}\n\\boxed{{{answer}}}" if steps else ""
    return text.strip() if "\\boxed" in text else ""


def cell_to_str(value: object) -> str:
    """Return a string or number as a stripped string, and "" for any other value (None, NaN, lists)."""
    if isinstance(value, bool) or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).strip() if isinstance(value, str | int | float) else ""


def find_column(
    dataset: str, columns: Sequence[str], argument: str, name: str | None, candidates: Sequence[str]
) -> str:
    """Return the given column, or the first candidate that the dataset has.

    Raises:
        UserError: The dataset does not have that column, or none of the candidates.
    """
    if name is not None:
        if name not in columns:
            raise UserError(f"{dataset} has no column {name!r} ({argument}); it has {', '.join(columns)}")
        return name
    for column in candidates:
        if column in columns:
            return column
    raise UserError(f"{dataset}: set {argument} to one of its columns: {', '.join(columns) or 'none'}")


def shuffled(problems: Iterable[Problem], seed: int) -> list[Problem]:
    """Return the problems shuffled by the seed; the result does not depend on the order of the rows."""
    return sorted(problems, key=lambda p: hashlib.sha256(f"{seed} {p.task_id}".encode()).digest())


def why_incomparable(answer: str, comparison: str) -> str | None:
    r"""Return why completions cannot be compared with an answer, or None if they can."""
    # An answer with unbalanced braces would not survive the box.
    if last_box(f"\\boxed{{{answer}}}") != answer:
        return r"its braces are not balanced, or it contains \boxed"
    if comparison == "integer":
        return None if read_integer(answer) is not None else "not an integer"
    return why_unreadable(answer)
