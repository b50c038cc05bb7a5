"""Toy environments, which tests load from this file: repeat a letter, and broken and multi-turn variants."""

import os
import signal

import datasets

from rlkit.environment import Environment, Reply


def correct(completion: str, letter: str) -> float:
    return float(completion.strip() == letter * 3)


def share(completion: str, letter: str) -> float:
    return completion.count(letter) / max(len(completion), 1)


def variety(completion: str) -> float:
    """Return a value that differs between the answers of even a random model."""
    return len(set(completion)) + completion.count("e") / 10


def broken(completion: str) -> float:
    raise ValueError("the judge is down")


def needs_a_column(completion: str, wisdom: str) -> float:
    return float(wisdom in completion)


class Letters(Environment):
    """Say a letter three times."""

    id = "letters-v1"
    metric = "correct"
    rewards = {"correct": correct, "share": share, "broken": broken, "needs_a_column": needs_a_column}  # noqa: RUF012
    reward_weights = {"share": 1.0}  # noqa: RUF012
    breakdown = ("vowel",)

    def __init__(self, *, length: int = 1):
        self.length = length

    def tasks(self, split, n=None, seed=0):
        letters = [chr(97 + i % 26) for i in range(n or 26)]
        return datasets.Dataset.from_list([self.task(letter, i) for i, letter in enumerate(letters)])

    def task(self, letter, i):
        text = "Say " + letter * self.length + "!" * (i % 3)
        return {
            "prompt": [{"role": "user", "content": text}],
            "task_id": f"{i}-{letter}",
            "letter": letter,
            "vowel": letter in "aeiou",
        }

    def answer(self, task):
        return task["letter"] * 3


class NoPrompt(Letters):
    def tasks(self, split, n=None, seed=0):
        return super().tasks(split, n, seed).remove_columns("prompt")


class NoTask(Letters):
    def tasks(self, split, n=None, seed=0):
        return super().tasks(split, 2, seed).select([])


class Talk(Letters):
    """Multi-turn: the reply to each "e" that the model writes is the letter, until the model writes it."""

    id = "talk-v1"
    metric = "share"
    rewards = {"share": share, "variety": variety}  # noqa: RUF012
    reward_weights = {"variety": 1.0}  # noqa: RUF012
    max_turns = 3
    stop = ("e",)

    def respond(self, turns):
        replies = []
        for turn in turns:
            letter = turn.task["letter"]
            is_done = letter in turn.messages[-1]["content"]
            replies.append(Reply(done=True) if is_done else Reply(f"[{letter}]</e>"))
        return replies


class Scripted(Talk):
    """Multi-turn with a reference script, except for the letter "e"."""

    metric = "correct"
    rewards = {"correct": lambda completion, letter: float(completion.endswith(letter * 3))}  # noqa: RUF012
    reward_weights = {"correct": 1.0}  # noqa: RUF012

    def script(self, task):
        return None if task["letter"] == "e" else ["one", task["letter"] * 3]


def even(completion: str) -> float:
    return float(len(set(completion)) % 2 == 0)


def even_until_killed(completion: str) -> float:
    """Kill the trainer, which is this worker's parent, at call number KILL_AT."""
    CALLS.append(completion)
    if len(CALLS) == int(os.environ.get("KILL_AT", "-1")):
        os.kill(os.getppid(), signal.SIGKILL)
    return even(completion)


CALLS: list[str] = []


class Even(Letters):
    """An environment that a random model sometimes solves, with tasks of one and two hops."""

    id = "even-v1"
    metric = "even"
    rewards = {"even": even_until_killed, "variety": variety}  # noqa: RUF012
    reward_weights = {"even": 1.0}  # noqa: RUF012

    def task(self, letter, i):
        return super().task(letter, i) | {"hops": 1 + i % 2}


class Rising(Even):
    """A stateful environment: a level that rises with the steps and the scores."""

    def __init__(self):
        super().__init__()
        self.level = 0.0
        self.progress = []

    def advance(self, step, steps, score):
        self.progress.append((step, steps, score))
        before, self.level = self.level, self.level + step / steps + (score or 0.0)
        return {"level": before}

    def state_dict(self):
        return {"level": self.level}

    def load_state_dict(self, state):
        self.level = state["level"]


def constant(completion: str, value: float) -> float:
    return value


class Constant(Letters):
    """An environment in which every answer has the score that its argument sets."""

    id = "constant-v1"
    metric = "constant"
    rewards = {"constant": constant}  # noqa: RUF012
    reward_weights = {"constant": 1.0}  # noqa: RUF012

    def __init__(self, *, value: float = 0.0):
        super().__init__()
        self.value = value

    def task(self, letter, i):
        return super().task(letter, i) | {"value": self.value}


def vowels(completion: str) -> float:
    return sum(character in "aeiou" for character in completion) / max(len(completion), 1)


class Vowels(Letters):
    """The fraction of vowels is the reward, whatever the task: a tiny model learns it in seconds."""

    id = "vowels-v1"
    metric = "vowels"
    rewards = {"vowels": vowels}  # noqa: RUF012
    reward_weights = {"vowels": 1.0}  # noqa: RUF012


def odd(completion: str) -> float:
    return float(len(set(completion)) % 2)


odd.in_process = True


class Odd(Letters):
    """An environment that a random model sometimes solves, and whose rewards need no worker process."""

    id = "odd-v1"
    metric = "odd"
    rewards = {"odd": odd}  # noqa: RUF012
    reward_weights = {"odd": 1.0}  # noqa: RUF012
