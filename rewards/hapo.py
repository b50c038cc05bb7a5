"""HAPO: be shorter than the shortest right answer found so far (arXiv 2505.11225).

For every task the reward remembers h, the length of its shortest right answer (`history="min"`) or the mean
length of all of them ("mean"). With x = L / h and the shape "cosine"::

    f = cos(min(x pi/2, pi))          1 for nothing, 0 at h, -1 from 2h on
    right: max(f, floor)      wrong: min(f, 0)      no history: 0

With the shape "linear", the ablation of the paper's code (HCY123902/HAPO, `utils.py`), a right answer gets
1 - x up to h, 0 up to 1.1h and 1.1 - x beyond, at least `floor`; a wrong one 0 up to 1.1h, then 1.1 - x, at
least -1.

It is **added** to the reward for being right, both with weight 1: `rewards: [correct, hapo]`. A wrong answer
no longer than h is never punished, and while weight * floor > -1 every right answer beats every wrong one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any

SHAPES = ("cosine", "linear")
HISTORIES = ("min", "mean")
SLACK = 1.1  # of the shape "linear": so much longer than h costs nothing


class HistoryLength:
    """A reward with memory; `task_id` names a task for as long as a run lasts.

    Judging does not change the history: the rollouts of a batch are judged by what was known before it, and
    `observe` adds them after. So ranks agree, and the first batch that solves a task gets 0 for it.

    The history holds `capacity` tasks; beyond that the one that has longest not been solved is forgotten. A
    task takes about 120 bytes ("min") or 175 ("mean"), which `tests/rewards/test_hapo.py` measures.
    """

    def __init__(
        self,
        weight: float = 1.0,
        floor: float = -0.7,
        shape: str = "cosine",
        history: str = "min",
        capacity: int = 1_000_000,
    ):
        """Check the options.

        Args:
            weight: of the whole, in [0, 1]; the paper's w.
            floor: the least for a right answer, before the weight, in [-1, 0); the paper's c.
            shape: "cosine" or "linear".
            history: "min", or "mean" over all right answers ever seen.
            capacity: tasks remembered.

        Raises:
            ValueError: an option outside these.
        """
        if not 0 <= weight <= 1:
            raise ValueError(f"the weight is {weight}: it must be within 0 and 1")
        if not -1 <= floor < 0:
            raise ValueError(f"the floor is {floor}: it must be at least -1 and below 0")
        if shape not in SHAPES:
            raise ValueError(f"there is no shape {shape!r}: choose from {', '.join(SHAPES)}")
        if history not in HISTORIES:
            raise ValueError(f"there is no history {history!r}: choose from {', '.join(HISTORIES)}")
        if capacity < 1:
            raise ValueError(f"the capacity is {capacity}: it must be at least 1")
        self.weight = weight
        self.floor = floor
        self.shape = shape
        self.history = history
        self.capacity = capacity
        # By task, the one solved last at the end: the shortest length, or sum and number for the mean.
        self._lengths: dict[int, int] = {}
        self._counts: dict[int, int] = {}

    def __call__(self, task_id: str, length: int, correct: float) -> float:
        """Judge one rollout by the history of its task."""
        h = self.reference(task_id)
        if h is None:
            return 0.0
        ratio = length / h if h else (math.inf if length else 1.0)
        right = correct >= 1.0
        if self.shape == "cosine":
            value = math.cos(min(math.pi / 2 * ratio, math.pi))
        elif ratio <= SLACK:
            value = max(1 - ratio, 0.0)
        else:
            value = max(SLACK - ratio, -1.0)
        return self.weight * (max(value, self.floor) if right else min(value, 0.0))

    def reference(self, task_id: str) -> float | None:
        """Return h of a task in tokens, or None where it has not been solved."""
        key = task_key(task_id)
        if key not in self._lengths:
            return None
        return self._lengths[key] / self._counts.get(key, 1)

    def observe(self, rollouts: Iterable[Mapping[str, Any]]) -> None:
        """Learn from the right ones of rollouts with `task_id`, `length` and `correct`, each given once."""
        for rollout in rollouts:
            if rollout["correct"] >= 1.0:
                self._add(task_key(rollout["task_id"]), int(rollout["length"]))
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Return the history as plain lists."""
        keys = list(self._lengths)
        state: dict[str, Any] = {
            "history": self.history,
            "tasks": keys,
            "lengths": list(self._lengths.values()),
        }
        if self.history == "mean":
            state["counts"] = [self._counts[key] for key in keys]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved history.

        Raises:
            ValueError: it is one of the other kind.
        """
        if state["history"] != self.history:
            raise ValueError(f"the saved history is {state['history']!r}, but this run's is {self.history!r}")
        tasks: Sequence[int] = state["tasks"]
        self._lengths = dict(zip(tasks, state["lengths"], strict=True))
        self._counts = dict(zip(tasks, state["counts"], strict=True)) if self.history == "mean" else {}
        self._forget()

    def _add(self, key: int, length: int) -> None:
        known = self._lengths.pop(key, None)  # taken out and put in again: now it is the last
        if self.history == "mean":
            self._lengths[key] = length + (known or 0)
            self._counts[key] = self._counts.get(key, 0) + 1
        else:
            self._lengths[key] = length if known is None else min(known, length)

    def _forget(self) -> None:
        for key in list(islice(self._lengths, max(len(self._lengths) - self.capacity, 0))):
            del self._lengths[key]
            self._counts.pop(key, None)


def task_key(task_id: str) -> int:
    """64 bits of a hash of the id, the same in every process, so that long ids take no memory."""
    return int.from_bytes(blake2b(str(task_id).encode(), digest_size=8).digest(), "little")
