"""Checks of an environment that need no model.

An environment is sound if its reference answers earn the maximum reward, wrong answers earn none, and its
tasks are reproducible. The table `CHECKS` lists all checks; each one is a function that returns the problem,
or None, and raises `DoesNotApply` if the environment has nothing to check.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isclose

import cloudpickle

from rlkit.check.play import Task, most_frequent_answer, play
from rlkit.environment import SPLITS, Environment
from rlkit.errors import UnavailableError, UserError
from rlkit.reward import Reward, call_reward, single_turn_row
from rlkit.scoring import check_columns, load_rewards

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")
GARBAGE = "]] qwertz {{ \u2603 lorem ipsum"
TOLERANCE = 1e-6  # absolute, for a weighted sum of rewards
MIN_ORDERED = 4  # tasks; the order of fewer is often the same for several seeds
MIN_GUESSED = 8  # tasks; of fewer, a single one is a large share
MIN_ANSWERS = 5  # distinct answers; of fewer, the most frequent one is right for a quarter or more


class DoesNotApply(Exception):  # noqa: N818
    """A check can say nothing about an environment; the message is the reason."""


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: Name of the check, as a statement about the environment.
        passed: Whether the statement holds; also True if the check does not apply.
        detail: Problem of a failed check, with the task if it concerns one; or why a check does not apply.
        applies: Whether the check applies to the environment.
    """

    name: str
    passed: bool
    detail: str = ""
    applies: bool = True


@dataclass(frozen=True)
class Subject:
    """Environment under check, and the tasks that are inspected."""

    environment: Environment
    n: int
    seed: int
    split: str

    @cached_property
    def tasks(self) -> list[Task]:
        """Tasks of the split, cached."""
        return self.load(self.split, self.n, self.seed)

    def load(self, split: str, n: int, seed: int) -> list[Task]:
        """Return tasks from the environment, without a cache."""
        return list(self.environment.tasks(split, n, seed))

    @cached_property
    def defaults(self) -> tuple[dict[str, Reward], list[float]]:
        """Default rewards and their weights."""
        return load_rewards(None, self.environment)

    def reward_and_maximum(self, row: Task) -> tuple[float, float]:
        """Return the weighted sum of the default rewards for a row, and the maximum of that sum.

        A reward that does not apply to the row (None) counts in neither.
        """
        rewards, weights = self.defaults
        total = maximum = 0.0
        for reward, weight in zip(rewards.values(), weights, strict=True):
            value = call_reward(reward, row)
            if value is not None:
                total += value * weight
                maximum += weight
        return total, maximum

    def metric_value(self, row: Task) -> float | None:
        """Return the environment's metric for a row."""
        return call_reward(self.environment.rewards[self.environment.metric], row)


def check_environment(
    environment: Environment, n: int = 32, seed: int = 0, split: str = "train"
) -> list[Check]:
    """Run all checks on an environment.

    An exception that the environment raises fails the check in which it occurs, unless a server that the
    environment needs is down: then nothing can be said about the environment.

    Args:
        environment: Environment to check.
        n: Number of tasks to inspect.
        seed: Seed of the tasks.
        split: Split of the tasks.

    Raises:
        UserError: The tasks cannot be loaded because of a wrong argument, such as a file that does not exist,
            or because a server that the environment needs is down (`UnavailableError`).
    """
    subject = Subject(environment, n, seed, split)
    try:
        subject.tasks  # noqa: B018  # cached
    except UserError:
        raise
    except Exception:
        logger.debug("the tasks cannot be loaded", exc_info=True)  # a finding of the checks
    return [_run_check(name, check, subject) for name, check in CHECKS.items()]


def _run_check(name: str, check: Callable[[Subject], str | None], subject: Subject) -> Check:
    try:
        problem = check(subject)
    except UnavailableError:
        raise
    except DoesNotApply as reason:
        return Check(name, True, str(reason), applies=False)
    except Exception as error:  # user code: any exception is a finding
        problem = f"{type(error).__name__}: {error}"
    return Check(name, problem is None, problem or "")


def _on_each_task(check_task: Callable[[Subject, Task], str | None]) -> Callable[[Subject], str | None]:
    """Turn a check of one task into a check of all tasks, which fails at the first problem."""

    def check(subject: Subject) -> str | None:
        for index, task in enumerate(subject.tasks):
            try:
                problem = check_task(subject, task)
            except UnavailableError:
                raise
            except Exception as error:  # as in `_run_check`, but here the task is known
                problem = f"{type(error).__name__}: {error}"
            if problem:
                return f"task {index} ({str(task.get('task_id'))[:80]}): {problem}"
        return None

    return check


def _check_rewards(subject: Subject) -> str | None:
    load_rewards(None, subject.environment)  # raises for an unknown reward or metric and a wrong weight
    return None


def _check_has_columns(subject: Subject) -> str | None:
    columns = set(subject.environment.tasks(subject.split, 1, subject.seed).column_names)
    missing = [name for name in ("prompt", "task_id", *subject.environment.breakdown) if name not in columns]
    if missing:
        return f"there is no column {', '.join(map(repr, missing))} among {sorted(columns)}"
    check_columns(subject.defaults[0], columns)
    return None


def _check_count(subject: Subject) -> str | None:
    num_tasks = len(subject.tasks)
    if num_tasks == subject.n:
        return None
    if 0 < num_tasks < subject.n:
        # A finite split has all its tasks in any larger request.
        num_of_more = len(subject.load(subject.split, 2 * subject.n, subject.seed))
        if num_of_more == num_tasks:
            return None
        return f"requested {subject.n} tasks, got {num_tasks}; requested {2 * subject.n}, got {num_of_more}"
    return f"requested {subject.n} tasks, got {num_tasks}"


def _check_prompt(subject: Subject, task: Task) -> str | None:
    """The prompt is a chat that ends with a user message, and the task id is a string."""
    if not isinstance(task["task_id"], str) or not task["task_id"]:
        return f"task_id must be a non-empty string, got {task['task_id']!r}"
    prompt = task["prompt"]
    if not isinstance(prompt, list) or not prompt:
        return "prompt is not a list of messages"
    for message in prompt:
        content = message.get("content")
        if message.get("role") not in ROLES or not isinstance(content, str) or not content.strip():
            return f"not a chat message: {str(message)[:100]}"
    if prompt[-1]["role"] != "user":
        return f"the last message must be the user's, got role {prompt[-1]['role']!r}"
    return None


def _check_answer(subject: Subject, task: Task) -> str | None:
    answer = subject.environment.answer(task)
    if answer is None:
        # A task that no single completion solves needs a script or an example instead.
        has_scripts = type(subject.environment).script is not Environment.script
        has_example = subject.environment.example(task) is not None
        if has_scripts or has_example:
            return None
        return "the task has neither a reference answer, nor a script, nor an example"
    return _maximum_problem(subject, single_turn_row(task, answer))


def _check_solution(subject: Subject, task: Task) -> str | None:
    solution = subject.environment.solution(task)
    return None if solution is None else _maximum_problem(subject, single_turn_row(task, solution))


def _maximum_problem(subject: Subject, row: Task) -> str | None:
    """Return why a row does not earn the maximum: metric 1, and a reward that is the sum of the weights."""
    metric, (total, maximum) = subject.metric_value(row), subject.reward_and_maximum(row)
    if metric == 1 and isclose(total, maximum, abs_tol=TOLERANCE):
        return None
    name = subject.environment.metric
    return f"{row['completion'][-100:]!r} earns {name} {metric} and reward {total:g} of {maximum:g}"


def _check_script(subject: Subject) -> str | None:
    """In a multi-turn environment, at least half of the tasks have a script, and each earns the maximum.

    An environment without any script, such as one of questions from a dataset, needs none if its tasks have
    a reference answer and it does not set `requires_scripts`.
    """
    environment, num_tasks = subject.environment, len(subject.tasks)
    scripts = [environment.script(task) for task in subject.tasks]
    if environment.max_turns == 1 or type(environment).script is Environment.script:
        return None
    scripted = [
        (task, script) for task, script in zip(subject.tasks, scripts, strict=True) if script is not None
    ]
    if not scripted and not environment.requires_scripts:
        if any(environment.answer(task) is None for task in subject.tasks):
            return "there are tasks with neither a reference answer nor a script"
        raise DoesNotApply("no task has a script")
    if len(scripted) < num_tasks / 2:
        return f"{num_tasks - len(scripted)} of {num_tasks} tasks have no script"
    for row in play(environment, *map(list, zip(*scripted, strict=True))):
        if problem := _maximum_problem(subject, row):
            return f"task {row['task_id']}: {problem}"
    return None


def _check_examples(subject: Subject) -> str | None:
    """On average, a task's example earns more than another task's; it need not earn the maximum."""
    if type(subject.environment).example is Environment.example:
        return None
    examples = [(task, subject.environment.example(task)) for task in subject.tasks]
    pairs = [(task, [example]) for task, example in examples if example is not None]
    if len(pairs) < 2:
        raise DoesNotApply("there are fewer than two examples")
    tasks, scripts = map(list, zip(*pairs, strict=True))
    totals = []
    for shift in (0, 1):
        rows = play(subject.environment, tasks, scripts[shift:] + scripts[:shift])
        totals.append(sum(subject.reward_and_maximum(row)[0] for row in rows) / len(rows))
    if totals[0] > totals[1]:
        return None
    return f"examples earn {totals[0]:g} on average, and those of other tasks {totals[1]:g}"


def _check_guess(subject: Subject) -> str | None:
    """In a multi-turn environment, the most frequent answer, given in the first turn, is rarely correct.

    Otherwise the policy can learn to guess instead of using its turns. The share of a guess says nothing
    about a split of a few tasks, or about a small one with few distinct answers, such as yes and no.
    """
    environment, num_tasks = subject.environment, len(subject.tasks)
    if environment.max_turns == 1:
        return None
    if num_tasks < MIN_GUESSED:
        raise DoesNotApply(f"there are fewer than {MIN_GUESSED} tasks")
    num_answers = len({environment.answer(task) for task in subject.tasks})
    if num_tasks < subject.n and num_answers < MIN_ANSWERS:
        raise DoesNotApply(f"the {num_tasks} tasks have fewer than {MIN_ANSWERS} distinct answers")
    guess = most_frequent_answer(environment, subject.tasks)
    rows = play(environment, subject.tasks, [[guess]] * num_tasks)
    num_correct = sum((subject.metric_value(row) or 0.0) >= 1.0 for row in rows)
    if num_correct > num_tasks / 4:
        return f"{guess[-60:]!r} is correct for {num_correct} of {num_tasks} tasks"
    return None


def _check_empty(subject: Subject, task: Task) -> str | None:
    row = single_turn_row(task, "")
    metric, (total, _) = subject.metric_value(row), subject.reward_and_maximum(row)
    if metric == 0 and isclose(total, 0, abs_tol=TOLERANCE):
        return None
    return f"the empty answer earns {subject.environment.metric} {metric} and reward {total:g}"


def _check_garbage(subject: Subject, task: Task) -> str | None:
    """A garbage answer is not correct; it may earn other rewards, such as one for its length."""
    metric = subject.metric_value(single_turn_row(task, GARBAGE))
    return None if metric == 0 else f"{GARBAGE!r} earns {subject.environment.metric} {metric}"


def _check_pickling(subject: Subject) -> str | None:
    """Rewards survive cloudpickle, which carries them to the process that runs them."""
    if not subject.tasks:
        raise DoesNotApply("there are no tasks")
    task = subject.tasks[0]
    row = single_turn_row(task, subject.environment.answer(task) or "")
    for name, reward in subject.environment.rewards.items():
        copy = cloudpickle.loads(cloudpickle.dumps(reward))
        if call_reward(copy, row) != call_reward(reward, row):
            return f"a pickled copy of the reward {name!r} scores {task['task_id']} differently"
    return None


def _check_same_seed(subject: Subject) -> str | None:
    return _first_difference(subject.tasks, subject.load(subject.split, subject.n, subject.seed))


def _check_other_seed(subject: Subject) -> str | None:
    # If few tasks are requested, two seeds may draw the same ones.
    n = max(subject.n, MIN_GUESSED)
    ids = [task["task_id"] for task in subject.load(subject.split, n, subject.seed)]
    if len(ids) < MIN_ORDERED:
        raise DoesNotApply(f"there are fewer than {MIN_ORDERED} tasks, which may be in the same order")
    for seed in range(subject.seed + 1, subject.seed + 4):
        if ids != [task["task_id"] for task in subject.load(subject.split, n, seed)]:
            return None
    return f"seeds {subject.seed} and {subject.seed + 1} give the same tasks"


def _check_prefix(subject: Subject) -> str | None:
    eight, sixteen = (subject.load(subject.split, n, subject.seed) for n in (8, 16))
    return _first_difference(eight, sixteen[:8])


def _first_difference(expected: Sequence[Task], actual: Sequence[Task]) -> str | None:
    if len(expected) != len(actual):
        return f"{len(expected)} tasks became {len(actual)}"
    for index, (task, actual_task) in enumerate(zip(expected, actual, strict=True)):
        if task != actual_task:
            changed = [key for key in task if task[key] != actual_task.get(key)]
            return f"task {index} ({task['task_id']}) differs in {', '.join(changed)}"
    return None


def _check_ids(subject: Subject) -> str | None:
    """A task id occurs in one split, and tasks with the same id are equal (a task may be drawn twice)."""
    tasks_by_id: dict[str, tuple[str, Task]] = {}
    missing: dict[str, UserError] = {}
    for split in SPLITS:
        try:
            tasks = subject.load(split, subject.n, subject.seed)
        except UserError as error:  # a dataset may lack a split
            if split == subject.split:
                raise
            missing[split] = error
            continue
        for task in tasks:
            first_split, first_task = tasks_by_id.setdefault(task["task_id"], (split, task))
            if first_split != split:
                return f"{task['task_id']} is in {first_split} and in {split}"
            if difference := _first_difference([first_task], [task]):
                return f"{task['task_id']} names two tasks of {split}: {difference}"
    if len(missing) == len(SPLITS) - 1:
        problems = "; ".join(f"{split}: {error}" for split, error in missing.items())
        raise DoesNotApply(f"the other splits cannot be loaded ({problems})")
    return None


# `rlkit check` prints the keys.
CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "rewards and weights are valid": _check_rewards,
    "tasks have all required columns": _check_has_columns,
    "the number of tasks is as requested": _check_count,
    "prompts are chats and task ids are strings": _on_each_task(_check_prompt),
    "the reference answer earns the maximum reward": _on_each_task(_check_answer),
    "the worked solution earns the maximum reward": _on_each_task(_check_solution),
    "the reference script earns the maximum reward": _check_script,
    "examples earn more than those of other tasks": _check_examples,
    "the most frequent answer is rarely correct": _check_guess,
    "an empty answer earns nothing": _on_each_task(_check_empty),
    "a garbage answer is not correct": _on_each_task(_check_garbage),
    "rewards can be pickled": _check_pickling,
    "the same seed gives the same tasks": _check_same_seed,
    "another seed gives different tasks": _check_other_seed,
    "tasks do not depend on how many are requested": _check_prefix,
    "a task id names one task in one split": _check_ids,
}
