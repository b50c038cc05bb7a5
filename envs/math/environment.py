r"""`math-v1`: problems whose answer stands in `\boxed{}`, of our own or from any data set.

Without a data set the problems are sums and the like, which a tiny model can learn. In the short style::

    What is 9 + 15 + 4? Answer in \boxed{}.

and a worked solution::

    9 + 15 = 24
    24 + 4 = 28
    \boxed{28}

With one (`dataset="problems.jsonl"` or a name on the hub) a row needs a problem and an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from rlkit.environment import SPLITS, Environment
from rlkit.envs.math.arguments import check_choices, check_fractions, check_number, check_range
from rlkit.envs.math.arithmetic import (
    KINDS,
    OPERATIONS,
    SOLUTION_STYLES,
    ArithmeticLaw,
    make_problem,
    solve,
    split_of,
)
from rlkit.envs.math.data import BAD_ROWS, Problem, Source, content_id, ordered, readable
from rlkit.envs.math.prompts import BUDGETS, STYLES, draw_budget, write_prompt
from rlkit.errors import UserError, check_choice
from rlkit.rewards import boxed

if TYPE_CHECKING:
    import datasets

SIZES = {"train": 8000, "dev": 1000, "test": 1000}
RESERVED = ("prompt", "task_id", "answer", "problem", "solution", "budget")


class MathEnvironment(Environment):
    r"""Problems with an answer in \boxed{}: arithmetic of our own, or any data set.

    Args:
        dataset: None for arithmetic; a file (.jsonl, .json, .parquet, .csv); or a name on the hub.
        dataset_config, dataset_split, revision: of a data set on the hub.
        problem_column, answer_column: None takes the first that is there of `PROBLEM_COLUMNS` and
            `ANSWER_COLUMNS` in `rlkit.envs.math.data`. An answer may also be a solution with a box, or end in
            GSM8K's `#### 42`.
        breakdown_columns: columns to keep, by which evaluations are broken down.
        bad_rows: "error" stops at a row that cannot be used, "drop" leaves it out with a line in the log.
        fractions: shares of train, dev and test; the hash of a problem's text decides.
        terms: how many numbers a calculation has, or the least and the most.
        max_number: numbers are from 1 to this.
        operations: signs drawn from "+", "-" and "*".
        kind: "expression", "story", or a list of both.
        solution_style: of the worked solutions: "steps", "verbose" (two to three times as long), or "mixed".
        prompt_style: "standard" (a system prompt) or "short" (one sentence after the problem).
        system_prompt: instead of the style's own; "" is none.
        budget: the least and most tokens; the prompt then names a number in between, column `budget`.
        budget_kind: "exact" ("Think for n tokens.") or "max" ("Think for maximum n tokens.").
        comparison: "math", "integer" (see `rlkit.rewards.boxed`), or None: "math" with a data set, else
            "integer".

    Raises:
        UserError: arguments that do not fit together.
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
        self.law = ArithmeticLaw(
            terms=check_range("terms", terms, 2, 20),
            max_number=check_number("max_number", max_number, 1, 10**6),
            operations=check_choices("operations", operations, OPERATIONS),
            kinds=kinds,
        )
        if "story" in kinds and "*" in self.law.operations:
            raise UserError("a story cannot tell products: leave '*' out of operations, or kind 'story'")
        extra = [breakdown_columns] if isinstance(breakdown_columns, str) else list(breakdown_columns)
        if taken := [name for name in extra if name in RESERVED]:
            raise UserError(f"breakdown_columns cannot have {taken[0]!r}: it is a column of every task")
        if not dataset and any([dataset_config, revision, problem_column, answer_column, extra]):
            raise UserError("columns, dataset_config and revision belong to a data set: give dataset, too")
        columns = (problem_column, answer_column, tuple(extra))
        self.source = (
            Source(dataset, dataset_config, dataset_split, revision, *columns, bad_rows) if dataset else None
        )
        self.breakdown = tuple(extra) if dataset else ("kind", "terms")
        self.rewards = {
            "correct": partial(boxed.correct, comparison=self.comparison),
            "format": boxed.box_format,
        }
        self.reward_weights = {"correct": 1.0}

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        r"""Make the first `n` tasks: by default all of a data set's split, or 8,000, 1,000 and 1,000.

        Columns: `prompt`, `task_id` (hash of problem and answer), `answer`, `problem`, `solution` (a worked
        one or ""), `budget` where the prompt names one, and those of `breakdown`.

        Raises:
            UserError: an unknown split, rows that cannot be used, or fewer than `n` tasks in the split.
        """
        import datasets

        check_choice("split", split, SPLITS)
        if n is not None:
            check_number("n", n, 1, 10**9)
        if self.source:
            rows = list(islice(self._from_data(split, seed), n))
        else:
            rows = [self._own(split, seed, i) for i in range(n or SIZES[split])]
        if len(rows) < (n or 1):
            source = self.source.dataset if self.source else ""
            raise UserError(f"split {split!r} of {source} has {len(rows)} problems, not {n or 1}")
        return datasets.Dataset.from_list(rows)

    def answer(self, task: Mapping[str, Any]) -> str:
        """The right answer in a box."""
        return f"\\boxed{{{task['answer']}}}"

    def solution(self, task: Mapping[str, Any]) -> str | None:
        """A worked solution; None where the data set's answers are bare."""
        return task["solution"] or None

    def _own(self, split: str, seed: int, i: int) -> dict[str, Any]:
        calculation, kind, problem = make_problem(self.law, split, seed, i)
        extra = {"kind": kind, "terms": len(calculation.numbers)}
        solution = solve(calculation, self.solution_style)
        return self._row(problem, str(calculation.value()), solution, extra)

    def _from_data(self, split: str, seed: int) -> Iterator[dict[str, Any]]:
        """The split's rows in the order of the seed. Whether an answer can be read shows on the way."""
        for problem in ordered(self._splits[split], seed):
            if readable(problem.answer, self.comparison):
                yield self._row(problem.text, problem.answer, problem.solution, problem.extra)
            elif self.source:
                self.source.bad(f"{problem.where}: the answer {problem.answer[:60]!r} cannot be compared")

    @cached_property
    def _splits(self) -> dict[str, list[Problem]]:
        splits: dict[str, list[Problem]] = {split: [] for split in SPLITS}
        for problem in self.source.problems() if self.source else []:
            splits[split_of(" ".join(problem.text.split()), self.fractions)].append(problem)
        return splits

    def _row(self, problem: str, answer: str, solution: str, extra: Mapping[str, Any]) -> dict[str, Any]:
        task_id = content_id(problem, answer)
        row: dict[str, Any] = {"task_id": task_id, "answer": answer, "problem": problem, "solution": solution}
        sentence = ""
        if self.budget:
            row["budget"] = draw_budget(task_id, *self.budget)
            sentence = BUDGETS[self.budget_kind].format(row["budget"])
        prompt = write_prompt(problem, self.prompt_style, self.system_prompt, sentence)
        return {"prompt": prompt, **row, **extra}
