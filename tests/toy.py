"""A toy environment, loaded from its file: repeat a letter. Also broken variants of it."""

import os
import signal

import datasets

from rlkit.environment import Environment, Reply


def correct(completion: str, letter: str) -> float:
    return float(completion.strip() == letter * 3)


def share(completion: str, letter: str) -> float:
    return completion.count(letter) / max(len(completion), 1)


def variety(completion: str) -> float:
    """Differs from answer to answer even of a random model."""
    return len(set(completion)) + completion.count("e") / 10


def broken(completion: str) -> float:
    raise ValueError("the judge is ill")


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
    """Several turns: each "e" of the model gets the letter as a reply, until it writes the letter itself."""

    id = "talk-v1"
    metric = "share"
    rewards = {"share": share, "variety": variety}  # noqa: RUF012
    reward_weights = {"variety": 1.0}  # noqa: RUF012
    max_turns = 3
    stop = ("e",)

    def respond(self, turns):
        said = [turn.messages[-1]["content"] for turn in turns]
        return [
            Reply(done=True) if turn.task["letter"] in text else Reply(f"[{turn.task['letter']}]</e>")
            for turn, text in zip(turns, said, strict=True)
        ]


class Scripted(Talk):
    """What one who knows would write, for all letters but "e"."""

    metric = "correct"
    rewards = {"correct": lambda completion, letter: float(completion.endswith(letter * 3))}  # noqa: RUF012
    reward_weights = {"correct": 1.0}  # noqa: RUF012

    def script(self, task):
        return None if task["letter"] == "e" else ["one", task["letter"] * 3]


def even(completion: str) -> float:
    return float(len(set(completion)) % 2 == 0)


def even_until_killed(completion: str) -> float:
    """Kills the trainer, this worker's parent, at the call that KILL_AT says."""
    CALLS.append(completion)
    if len(CALLS) == int(os.environ.get("KILL_AT", "-1")):
        os.kill(os.getppid(), signal.SIGKILL)
    return even(completion)


CALLS: list[str] = []


class Even(Letters):
    """Right answers that a random model gives now and then, and tasks of several hops."""

    id = "even-v1"
    metric = "even"
    rewards = {"even": even_until_killed, "variety": variety}  # noqa: RUF012
    reward_weights = {"even": 1.0}  # noqa: RUF012

    def task(self, letter, i):
        return super().task(letter, i) | {"hops": 1 + i % 2}


class Rising(Even):
    """Remembers its training: a level that rises with the steps and the scores."""

    def __init__(self):
        super().__init__()
        self.level = 0.0
        self.told = []

    def advance(self, step, steps, score):
        self.told.append((step, steps, score))
        before, self.level = self.level, self.level + step / steps + score
        return {"level": before}

    def state_dict(self):
        return {"level": self.level}

    def load_state_dict(self, state):
        self.level = state["level"]


def given_value(completion: str, value: float) -> float:
    return value


class Given(Letters):
    """Every answer is worth what the environment's arguments say."""

    id = "given-v1"
    metric = "given"
    rewards = {"given": given_value}  # noqa: RUF012
    reward_weights = {"given": 1.0}  # noqa: RUF012

    def __init__(self, *, value: float = 0.0):
        super().__init__()
        self.value = value

    def task(self, letter, i):
        return super().task(letter, i) | {"value": self.value}


def vowels(completion: str) -> float:
    return sum(character in "aeiou" for character in completion) / max(len(completion), 1)


class Vowels(Letters):
    """The more vowels the better, whatever the task: a tiny model learns it in seconds."""

    id = "vowels-v1"
    metric = "vowels"
    rewards = {"vowels": vowels}  # noqa: RUF012
    reward_weights = {"vowels": 1.0}  # noqa: RUF012
