r"""`math-v1`: math problems with a final answer in `\boxed{}`, generated or from any dataset.

Without a dataset, the problems are generated arithmetic that a tiny model can learn. In the short style::

    What is 9 + 15 + 4? Answer in \boxed{}.

and a worked solution::

    9 + 15 = 24
    24 + 4 = 28
    \boxed{28}

With a dataset (`dataset="problems.jsonl"` or a name on the Hugging Face Hub), each row needs a problem and an
answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from rlkit.environment import SPLITS, Environment
from rlkit.envs.math.arguments import check_choices, check_fractions, check_integer, check_range
from rlkit.envs.math.arithmetic import (
    KINDS,
    OPERATIONS,
    SOLUTION_STYLES,
    ArithmeticConfig,
    make_problem,
    solve,
    split_of,
)
from rlkit.envs.math.data import BAD_ROWS, Problem, Source, content_id, shuffled
from rlkit.envs.math.prompts import BUDGETS, STYLES, draw_budget, write_prompt
from rlkit.errors import UserError, check_choice
from rlkit.rewards import boxed

if TYPE_CHECKING:
    import datasets

SIZES = {"train": 8000, "dev": 1000, "test": 1000}
# Columns that tasks already have, so that a dataset's column of that name cannot be kept.
RESERVED_COLUMNS = ("prompt", "task_id", "answer", "problem", "solution", "budget")


class MathEnvironment(Environment):
    r"""Math problems with a final answer in \boxed{}: generated arithmetic, or any dataset.

    Args:
        dataset: File (.jsonl, .json, .parquet, .csv) or name on the Hugging Face Hub. None generates
            arithmetic problems.
        dataset_config, dataset_split, revision: Config, split and revision of a dataset on the Hub.
        problem_column, answer_column: Columns of the dataset; None takes the first one it has of
            `PROBLEM_COLUMNS` or `ANSWER_COLUMNS` in `rlkit.envs.math.data`. The answer column may also have
            worked solutions that contain `\boxed{}` or end in `#### 42`, as in GSM8K.
        breakdown_columns: Columns to keep, by which evaluations are broken down.
        bad_rows: "error" raises at an unusable row; "drop" skips it with a warning.
        fractions: Fractions of train, dev and test. A hash of the problem determines its split.
        terms: Number of terms of a calculation, or its minimum and maximum.
        max_number: Maximum of the numbers, which start at 1.
        operations: Signs to draw from: "+", "-" and "*".
        kind: "expression", "story", or a list of both.
        solution_style: Style of the worked solutions: "steps", "verbose" (two to three times as long) or
            "mixed".
        prompt_style: "standard" (a system prompt) or "short" (one sentence after the problem).
        system_prompt: System prompt that replaces the one of the style; "" removes it.
        budget: Minimum and maximum token budget. The prompt then states a number in this range, which is also
            in the column `budget`.
        budget_kind: "exact" ("Think for n tokens.") or "max" ("Think for maximum n tokens.").
        comparison: "math" or "integer" (see `rlkit.rewards.boxed`); None means "math" with a dataset and
            "integer" without.

    Raises:
        UserError: An argument is invalid, or two arguments contradict each other.
    """

    id = "math-v1"
    metric = "correct"

    def __init__(
        self,
        *,
        dataset: str | None = None,
        dataset_config: str | None = None,
        dataset_split: str = "train",
        revision: str | None = None,
        problem_column: str | None = None,
        answer_column: str | None = None,
        breakdown_columns: Sequence[str] = (),
        bad_rows: str = "error",
        fractions: Sequence[float] = (0.8, 0.1, 0.1),
        terms: int | Sequence[int] = 3,
        max_number: int = 19,
        operations: Sequence[str] = ("+",),
        kind: str | Sequence[str] = "expression",
        solution_style: str = "steps",
        prompt_style: str = "standard",
        system_prompt: str | None = None,
        budget: Sequence[int] | None = None,
        budget_kind: str = "exact",
        comparison: str | None = None,
    ):
        kinds = check_choices("kind", kind, KINDS)
        self.solution_style = check_choice("solution_style", solution_style, SOLUTION_STYLES)
        self.prompt_style = check_choice("prompt_style", prompt_style, STYLES)
        self.system_prompt = system_prompt
        self.budget = None if budget is None else check_range("budget", budget, 1, 10**6)
        self.budget_kind = check_choice("budget_kind", budget_kind, tuple(BUDGETS))
        self.comparison = comparison or ("math" if dataset else "integer")
        check_choice("comparison", self.comparison, boxed.COMPARISONS)
        check_choice("bad_rows", bad_rows, BAD_ROWS)
        self.fractions = check_fractions(fractions)
        self.config = ArithmeticConfig(
            terms=check_range("terms", terms, 2, 20),
            max_number=check_integer("max_number", max_number, 1, 10**6),
            operations=check_choices("operations", operations, OPERATIONS),
            kinds=kinds,
        )
        if "story" in kinds and "*" in self.config.operations:
            raise UserError("kind 'story' does not support products: remove '*' from operations")
        if isinstance(breakdown_columns, str):
            breakdown_columns = [breakdown_columns]
        for name in breakdown_columns:
            if name in RESERVED_COLUMNS:
                raise UserError(f"breakdown_columns must not contain {name!r}: it is a column of every task")
        self.source: Source | None = None
        self.breakdown: tuple[str, ...] = ("kind", "terms")
        if dataset:
            self.breakdown = tuple(breakdown_columns)
            self.source = Source(
                dataset,
                dataset_config,
                dataset_split,
                revision,
                problem_column,
                answer_column,
                self.breakdown,
                bad_rows,
            )
        elif any([dataset_config, revision, problem_column, answer_column, breakdown_columns]):
            raise UserError(
                "dataset_config, revision, problem_column, answer_column and breakdown_columns require"
                " `dataset`"
            )
        self.rewards = {
            "correct": partial(boxed.correct, comparison=self.comparison),
            "format": boxed.box_format,
        }
        self.reward_weights = {"correct": 1.0}

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Return the first `n` tasks of a split.

        The default is the entire split of a dataset, or 8,000 (train) or 1,000 (dev, test) generated tasks.

        Columns: `prompt`, `task_id` (hash of problem and answer), `answer`, `problem`, `solution` (worked
        solution, or ""), `budget` if the prompt states one, and those of `breakdown`.

        Raises:
            UserError: The split is unknown or has fewer than `n` problems, or a row is unusable.
        """
        import datasets

        check_choice("split", split, SPLITS)
        if n is not None:
            check_integer("n", n, 1, 10**9)
        if self.source:
            problems = islice(shuffled(self._splits[split], seed), n)
            rows = [self._row(p.text, p.answer, p.solution, p.extra) for p in problems]
            if len(rows) < (n or 1):
                raise UserError(
                    f"split {split!r} of {self.source.dataset} has {len(rows)} problems, but n is {n or 1}"
                )
        else:
            rows = [self._arithmetic_row(split, seed, i) for i in range(n or SIZES[split])]
        return datasets.Dataset.from_list(rows)

    def answer(self, task: Mapping[str, Any]) -> str:
        """Return the correct answer in a box."""
        return f"\\boxed{{{task['answer']}}}"

    def solution(self, task: Mapping[str, Any]) -> str | None:
        """Return a worked solution, or None if the dataset has only final answers."""
        return task["solution"] or None

    def _arithmetic_row(self, split: str, seed: int, i: int) -> dict[str, Any]:
        calculation, kind, problem = make_problem(self.config, split, seed, i)
        extra = {"kind": kind, "terms": len(calculation.numbers)}
        solution = solve(calculation, self.solution_style)
        return self._row(problem, str(calculation.value()), solution, extra)

    @cached_property
    def _splits(self) -> dict[str, list[Problem]]:
        # By the text with normalized whitespace, as duplicates are detected: both copies get the same split.
        splits: dict[str, list[Problem]] = {split: [] for split in SPLITS}
        problems = self.source.comparable(self.source.problems(), self.comparison) if self.source else []
        for problem in problems:
            splits[split_of(" ".join(problem.text.split()), self.fractions)].append(problem)
        return splits

    def _row(self, problem: str, answer: str, solution: str, extra: Mapping[str, Any]) -> dict[str, Any]:
        task_id = content_id(problem, answer)
        row: dict[str, Any] = {"task_id": task_id, "answer": answer, "problem": problem, "solution": solution}
        budget_sentence = ""
        if self.budget:
            row["budget"] = draw_budget(task_id, *self.budget)
            budget_sentence = BUDGETS[self.budget_kind].format(row["budget"])
        prompt = write_prompt(problem, self.prompt_style, self.system_prompt, budget_sentence)
        return {"prompt": prompt, **row, **extra}
