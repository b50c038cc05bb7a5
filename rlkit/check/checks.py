"""Checks of an environment that need no model.

An environment is sound when its right answers get full marks, wrong ones get none, and its tasks are the same
whenever they are made again. What is asked of it is the table `CHECKS`; each entry is a function that returns
what is wrong, or None.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isclose

import cloudpickle

from rlkit.check.play import Task, most_frequent_answer, play
from rlkit.environment import SPLITS, Environment
from rlkit.reward import Reward, call_reward, single_turn
from rlkit.scoring import check_columns, load_rewards

ROLES = ("system", "user", "assistant", "tool")
GARBAGE = "]] qwertz {{ \u2603 lorem ipsum"
TOLERANCE = 1e-6  # of a sum of rewards


@dataclass(frozen=True)
class Check:
    """The outcome of one check; `detail` says what is wrong, and on which task."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Subject:
    """The environment under check, and which tasks of it are looked at."""

    environment: Environment
    n: int
    seed: int
    split: str

    @cached_property
    def tasks(self) -> list[Task]:
        """The tasks, made once."""
        return self.make(self.split, self.n, self.seed)

    def make(self, split: str, n: int, seed: int) -> list[Task]:
        """Make tasks anew."""
        return list(self.environment.tasks(split, n, seed))

    @cached_property
    def defaults(self) -> tuple[dict[str, Reward], list[float]]:
        """The default rewards and their weights."""
        return load_rewards(None, self.environment)

    def total(self, task: Task, completion: str) -> tuple[float, float]:
        """Return the weighted sum of the default rewards that apply, and the sum of their weights."""
        return self.total_of(single_turn(task, completion))

    def total_of(self, row: Task) -> tuple[float, float]:
        """The same of a conversation."""
        rewards, weights = self.defaults
        values = [call_reward(reward, row) for reward in rewards.values()]
        applying = [
            (value, weight) for value, weight in zip(values, weights, strict=True) if value is not None
        ]
        return sum(v * w for v, w in applying), sum(w for _, w in applying)

    def accuracy(self, task: Task, completion: str) -> float | None:
        """Return the environment's metric."""
        reward = self.environment.rewards[self.environment.metric]
        return call_reward(reward, single_turn(task, completion))


def check_environment(
    environment: Environment, n: int = 32, seed: int = 0, split: str = "train"
) -> list[Check]:
    """Check an environment on `n` tasks of a split; an exception that it raises fails the check it is in."""
    subject = Subject(environment, n, seed, split)
    return [run_check(name, check, subject) for name, check in CHECKS.items()]


def run_check(name: str, check: Callable[[Subject], str | None], subject: Subject) -> Check:
    """Run one check."""
    try:
        problem = check(subject)
    except Exception as error:  # whatever the environment raises is the finding
        problem = f"{type(error).__name__}: {error}"
    return Check(name, problem is None, problem or "")


def on_each_task(find: Callable[[Subject, Task], str | None]) -> Callable[[Subject], str | None]:
    """Make a check of a function of one task: the first task with a problem fails it."""

    def check(subject: Subject) -> str | None:
        for index, task in enumerate(subject.tasks):
            where = f"task {index} ({str(task.get('task_id'))[:80]})"
            try:
                problem = find(subject, task)
            except Exception as error:  # as in `run_check`, with the task
                problem = f"{type(error).__name__}: {error}"
            if problem:
                return f"{where}: {problem}"
        return None

    return check


def check_rewards(subject: Subject) -> str | None:
    """Default rewards are known and weighted; the metric is one of the rewards."""
    environment = subject.environment
    load_rewards(None, environment)
    if environment.metric not in environment.rewards:
        return f"the metric {environment.metric!r} is not among the rewards {sorted(environment.rewards)}"
    return None


def check_has_columns(subject: Subject) -> str | None:
    """The tasks have the columns that their readers need."""
    columns = set(subject.environment.tasks(subject.split, 1, subject.seed).column_names)
    missing = [name for name in ("prompt", "task_id", *subject.environment.breakdown) if name not in columns]
    if missing:
        return f"there is no column {', '.join(map(repr, missing))} among {sorted(columns)}"
    check_columns(subject.defaults[0], columns)
    return None


def check_count(subject: Subject) -> str | None:
    """As many tasks as were asked for."""
    return (
        None if len(subject.tasks) == subject.n else f"asked for {subject.n} tasks, got {len(subject.tasks)}"
    )


def check_prompt(subject: Subject, task: Task) -> str | None:
    """The prompt is a chat that ends with the user's message, and the id a text."""
    if not isinstance(task["task_id"], str) or not task["task_id"]:
        return f"task_id is {task['task_id']!r}, not a text"
    prompt = task["prompt"]
    if not isinstance(prompt, list) or not prompt:
        return "prompt is not a list of messages"
    for message in prompt:
        content = message.get("content")
        if message.get("role") not in ROLES or not isinstance(content, str) or not content.strip():
            return f"not a chat message: {str(message)[:100]}"
    return None if prompt[-1]["role"] == "user" else f"the last message is the {prompt[-1]['role']}'s"


def check_answer(subject: Subject, task: Task) -> str | None:
    """The right answer gets full marks; where there is none, there are scripts."""
    answer = subject.environment.answer(task)
    if answer is None:
        scripted = type(subject.environment).script is not Environment.script
        return None if scripted else "there is neither an answer nor a script"
    return full_marks(subject, task, answer)


def check_solution(subject: Subject, task: Task) -> str | None:
    """A worked solution, where there is one, gets full marks."""
    solution = subject.environment.solution(task)
    return None if solution is None else full_marks(subject, task, solution)


def full_marks(subject: Subject, task: Task, completion: str) -> str | None:
    """Say what is missing from full marks: the metric is 1 and the rewards sum to their weights."""
    metric, (total, full) = subject.accuracy(task, completion), subject.total(task, completion)
    if metric == 1 and isclose(total, full, abs_tol=TOLERANCE):
        return None
    return f"{completion[-100:]!r} has {subject.environment.metric} {metric} and reward {total:g} of {full:g}"


def check_script(subject: Subject) -> str | None:
    """Who plays the scripts that the environment has, in all its turns, gets full marks; half have one."""
    environment = subject.environment
    scripts = [environment.script(task) for task in subject.tasks]
    known = [
        (task, script) for task, script in zip(subject.tasks, scripts, strict=True) if script is not None
    ]
    if environment.max_turns == 1 or type(environment).script is Environment.script:
        return None
    if len(known) < subject.n / 2:
        return f"{subject.n - len(known)} of {subject.n} tasks have no script"
    for row in play(environment, *map(list, zip(*known, strict=True))):
        (total, full), metric = (
            subject.total_of(row),
            call_reward(environment.rewards[environment.metric], row),
        )
        if metric != 1 or not isclose(total, full, abs_tol=TOLERANCE):
            return f"task {row['task_id']}: {environment.metric} {metric} and reward {total:g} of {full:g}"
    return None


def check_guess(subject: Subject) -> str | None:
    """Where there are several turns, answering at once what is right most often is rarely right."""
    environment = subject.environment
    if environment.max_turns == 1:
        return None
    guess = most_frequent_answer(environment, subject.tasks)
    rows = play(environment, subject.tasks, [[guess]] * subject.n)
    reward = environment.rewards[environment.metric]
    right = sum((call_reward(reward, row) or 0.0) >= 1.0 for row in rows)
    return None if right <= subject.n / 4 else f"{guess[-60:]!r} is right on {right} of {subject.n} tasks"


def check_empty(subject: Subject, task: Task) -> str | None:
    """An empty answer gets nothing."""
    metric, (total, _) = subject.accuracy(task, ""), subject.total(task, "")
    if metric == 0 and isclose(total, 0, abs_tol=TOLERANCE):
        return None
    return f"the empty answer has {subject.environment.metric} {metric} and reward {total:g}"


def check_garbage(subject: Subject, task: Task) -> str | None:
    """Garbage is not right; it may still be paid, say for its length."""
    metric = subject.accuracy(task, GARBAGE)
    return None if metric == 0 else f"{GARBAGE!r} has {subject.environment.metric} {metric}"


def check_pickling(subject: Subject) -> str | None:
    """Rewards survive the way to a worker process."""
    task = subject.tasks[0]
    row = single_turn(task, subject.environment.answer(task) or "")
    for name, reward in subject.environment.rewards.items():
        copy = cloudpickle.loads(cloudpickle.dumps(reward))
        if call_reward(copy, row) != call_reward(reward, row):
            return f"a pickled copy of the reward {name!r} scores {task['task_id']} differently"
    return None


def check_same_seed(subject: Subject) -> str | None:
    """The same seed gives the same tasks."""
    again = subject.make(subject.split, subject.n, subject.seed)
    return first_difference(subject.tasks, again)


def check_other_seed(subject: Subject) -> str | None:
    """Another seed gives other tasks."""
    other = subject.make(subject.split, subject.n, subject.seed + 1)
    same = [task["task_id"] for task in subject.tasks] == [task["task_id"] for task in other]
    return f"seeds {subject.seed} and {subject.seed + 1} give the same tasks" if same else None


def check_prefix(subject: Subject) -> str | None:
    """Task i does not depend on how many are asked for."""
    few = subject.make(subject.split, 8, subject.seed)
    return first_difference(few, subject.make(subject.split, 16, subject.seed)[:8])


def first_difference(tasks: Sequence[Task], others: Sequence[Task]) -> str | None:
    """Say which is the first task that differs."""
    if len(tasks) != len(others):
        return f"{len(tasks)} tasks became {len(others)}"
    for index, (task, other) in enumerate(zip(tasks, others, strict=True)):
        if task != other:
            changed = [key for key in task if task[key] != other.get(key)]
            return f"task {index} ({task['task_id']}) differs in {', '.join(changed)}"
    return None


def check_ids(subject: Subject) -> str | None:
    """An id names one task of one split; a task that is drawn twice has the same row twice."""
    seen: dict[str, tuple[str, Task]] = {}
    for split in SPLITS:
        for task in subject.make(split, subject.n, subject.seed):
            first_split, first = seen.setdefault(task["task_id"], (split, task))
            if first_split != split:
                return f"{task['task_id']} is in {first_split} and in {split}"
            if difference := first_difference([first], [task]):
                return f"{task['task_id']} names two tasks of {split}: {difference}"
    return None


CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "rewards and weights are well formed": check_rewards,
    "tasks have the columns they need": check_has_columns,
    "there are as many tasks as asked for": check_count,
    "prompts are chats, ids are texts": on_each_task(check_prompt),
    "the right answer gets full marks": on_each_task(check_answer),
    "the worked solution gets full marks": on_each_task(check_solution),
    "scripts of several turns get full marks": check_script,
    "what is right most often is rarely right": check_guess,
    "an empty answer gets nothing": on_each_task(check_empty),
    "garbage is not right": on_each_task(check_garbage),
    "rewards can be pickled": check_pickling,
    "the same seed gives the same tasks": check_same_seed,
    "another seed gives other tasks": check_other_seed,
    "the first 8 of 16 tasks are the 8": check_prefix,
    "an id names one task, in one split": check_ids,
}
