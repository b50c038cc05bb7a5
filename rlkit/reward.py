"""The reward interface: what a reward function looks like and how it is called.

A reward is a plain function of one rollout. Its parameters name the columns it reads::

    def total_variation(completion: str, truth: list[float], tolerance: float = 0.01) -> float | None:
        ...

It returns a number, or None if it does not apply to the rollout. Any failure (an exception, NaN, a value that
is not a number, a timeout, a worker that crashed) marks the rollout *invalid*, with a reason. Invalid is not
a score of 0: the trainer excludes the rollout from the loss.

Three other kinds of reward are recognized by their signature or methods:

- `def f(group)` scores all rollouts of one task together. It receives the rows of the group and returns one
  value per row. Any other column it names is taken from the first row, since the rows share their task.
- `def f(completions, ...)` or `def f(completion_ids, **kwargs)` is a TRL reward function. It works unchanged
  and is called with a batch of one.
- An object with `__call__`, `state_dict` and `load_state_dict` is a stateful reward. It runs in the trainer's
  process, where its state is saved, so it **cannot be killed** when it is slow. It may also define
  `observe(rollouts)`: after each training batch is scored, the trainer passes it the valid rollouts of all
  ranks, each once, as a list of dicts with `task_id`, `length` and `correct`. In that case `__call__` must
  not change the state. Then every batch is scored with the state from before it, all ranks agree, and
  evaluations, which never call `observe`, leave the state unchanged.

All other rewards run in worker processes, which are killed on timeout (`rlkit.scoring.runner`). A reward of
any kind may be `async def`.

A row is a mapping with the columns of the dataset and these:

- `prompt`: chat messages, or a string.
- `completion`: text that the model wrote; several assistant turns are joined with newlines.
- `turns`: all messages after the prompt.
- `environment_tokens`: number of tokens after the prompt that the environment wrote.
- `completion_ids`: token ids of the completion. Only training and evaluation set it and the next three.
- `truncated`: whether a limit (tokens, turns or the model's context) ended the rollout.
- `max_length`: the run's `max_completion_length`, in tokens.
- `stopped`: whether a stop string ended the completion, which then has no EOS token in `completion_ids`.
- `length`: number of tokens of the completion without its EOS token; set if `completion_ids` is.
- `correct`: value of the environment's metric on this rollout, usually 0 or 1. Rewards that read it, and
  rewards of groups, run after the metric. If the metric is None, they do not apply.

An invalid row is removed from its group. Arguments that a config passes to a reward (`reward_args`) take
precedence over columns of the same name. This module does not import torch.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

Reward = Callable[..., Any]
Row = Mapping[str, Any]

# TRL passes these to a reward function in addition to the columns.
TRL_EXTRAS = ("trainer_state", "log_extra", "log_metric")
TRL_ARGUMENTS = ("prompts", "completions", "completion_ids", *TRL_EXTRAS)


class RewardCall:
    """A reward with its inspected signature. Calling it scores the rows of one group, or a single row.

    Attributes:
        reward: The reward function or object.
        per_group: Whether one call scores all rows of a group.
        trl: Whether it is a TRL reward function.
        reads_correct: Whether it reads the column `correct`.
        required: Columns without a default value.
        columns: All columns that it can read, or None if it accepts any.
    """

    def __init__(self, reward: Reward):
        # The signature of a partial still lists the arguments that it fixes; columns must not replace them.
        bound = bound_arguments(reward)
        parameters = [p for p in inspect.signature(reward).parameters.values() if p.name not in bound]
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.reward = reward
        self.trl = is_trl(names, takes_any)
        self.per_group = "group" in names and not self.trl
        self.reads_correct = "correct" in names
        self._takes_any = takes_any
        self._bound = bound
        self._names = set(names)
        computed: set[str] = set()  # parameters that are not columns: this class fills them in
        if self.per_group:
            computed = {"group"}
        elif self.trl:
            computed = set(TRL_ARGUMENTS)
        columns = self._names - computed
        self.required = [p.name for p in parameters if p.name in columns and p.default is p.empty]
        if self.trl:
            columns |= {"prompt", "completion", "completion_ids"}
        self.columns = None if takes_any or self.per_group else columns

    def __call__(self, rows: Sequence[Row]) -> list[float | None]:
        """Score the rows of one group, or a single row (a list of one).

        Returns:
            One value per row; None where the reward does not apply.

        Raises:
            ValueError: The reward returned NaN, infinity, or the wrong number of values.
            TypeError: The reward returned a value that is not a number.
            Exception: Any exception of the reward itself.
        """
        arguments = self._trl_arguments(rows) if self.trl else self._arguments(rows)
        result = self.reward(**arguments)
        if inspect.isawaitable(result):
            result = event_loop().run_until_complete(result)
        if not (self.trl or self.per_group):
            return [as_number(result)]
        values = [as_number(value) for value in result]
        if len(values) != len(rows):
            raise ValueError(f"returned {len(values)} values for {len(rows)} rollouts")
        return values

    def _arguments(self, rows: Sequence[Row]) -> dict[str, Any]:
        row = {**rows[0], "completion": completion_text(rows[0]["completion"])}
        if self.per_group:
            row["group"] = [{**r, "completion": completion_text(r["completion"])} for r in rows]
        return {key: value for key, value in row.items() if self._reads(key)}

    def _trl_arguments(self, rows: Sequence[Row]) -> dict[str, Any]:
        columns = {key for key in rows[0] if key not in ("prompt", "completion")}
        arguments: dict[str, Any] = {key: [row[key] for row in rows] for key in columns}
        arguments["prompts"] = [row.get("prompt") for row in rows]
        arguments["completions"] = [trl_completion(row) for row in rows]
        arguments |= {"trainer_state": None, "log_extra": ignore, "log_metric": ignore}
        return {key: value for key, value in arguments.items() if self._reads(key)}

    def _reads(self, column: str) -> bool:
        return column in self._names or (self._takes_any and column not in self._bound)


def bound_arguments(reward: Reward) -> set[str]:
    """Return the names of the arguments that a `functools.partial` fixes; columns must not replace them."""
    names: set[str] = set()
    while isinstance(reward, functools.partial):
        names |= reward.keywords.keys()
        reward = reward.func
    return names


def is_trl(names: Sequence[str], takes_any: bool) -> bool:
    """Return whether the parameters are those of a TRL reward function.

    Such a function either has a parameter `completions` or, like TRL's own overlong punishment, has
    `completion_ids` and `**kwargs` but no `completion`.

    Args:
        names: Names of the parameters that can be passed by keyword.
        takes_any: Whether the function takes `**kwargs`.
    """
    ids_only = "completion_ids" in names and "completion" not in names
    return "completions" in names or (ids_only and takes_any)


def call_reward(reward: Reward, row: Row) -> float | None:
    """Score one row with a reward of any kind. A reward of groups receives a group of one.

    Raises:
        ValueError, TypeError: The value is not a finite number. A bool counts as a number.
        Exception: Any exception of the reward itself.
    """
    return RewardCall(reward)([row])[0]


def conversation_row(task: Row, turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Build the reward row of a scripted conversation: the task's columns, `turns` and `completion`.

    It has no token columns, since no model wrote it.
    """
    return {**task, "turns": list(turns), "completion": completion_text(turns)}


def single_turn_row(task: Row, completion: str) -> dict[str, Any]:
    """Build the reward row of a single-turn completion."""
    return conversation_row(task, [{"role": "assistant", "content": completion}])


def as_trl_reward(reward: Reward, name: str) -> Callable[..., list[float | None]]:
    """Convert a reward of any kind to a TRL reward function called `name`.

    Exceptions of the reward propagate, as TRL expects. A group is a run of adjacent rows with the same
    `task_id`, or with the same prompt if there is no such column. With several processes TRL can split a
    group, so the batch size of each process must be a multiple of the group size.
    """
    call = RewardCall(reward)

    def trl_reward(
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[Any] | None = None,
        **columns: list[Any],
    ) -> list[float | None]:
        data = {key: value for key, value in columns.items() if key not in TRL_EXTRAS}
        data |= {"prompt": prompts, "completion": completions}
        if completion_ids is not None:
            data["completion_ids"] = completion_ids
        rows = [{key: data[key][i] for key in data} for i in range(len(completions))]
        groups = split_groups(rows) if call.per_group else [[row] for row in rows]
        return [value for group in groups for value in call(group)]

    # A TRL function is passed through; the partial only gives it the name that TRL logs it under.
    function = functools.partial(reward) if call.trl else trl_reward
    function.__name__ = name  # type: ignore[union-attr]
    return function


def split_groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Split rows into runs of adjacent rows that belong to the same task, as TRL orders them."""
    return [list(group) for _, group in groupby(rows, lambda row: row.get("task_id", row["prompt"]))]


def as_number(value: Any) -> float | None:
    """Return the value of a reward as a float, or None. NumPy and torch scalars count as numbers.

    Raises:
        TypeError: The value is not a number.
        ValueError: The value is NaN or infinite.
    """
    if getattr(value, "ndim", None) == 0:  # duck typing, since torch must not be imported here
        value = value.item()
    if value is None:
        return None
    if not isinstance(value, numbers.Real):
        raise TypeError(f"returned {value!r:.80}, which is not a number")
    if not math.isfinite(value):
        raise ValueError(f"returned {value}")
    return float(value)


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return a completion as a string: the assistant's messages, joined with newlines."""
    if isinstance(completion, str):
        return completion
    return "\n".join(m["content"] or "" for m in completion if m.get("role", "assistant") == "assistant")


def trl_completion(row: Row) -> str | list[dict[str, Any]]:
    """Return the completion in TRL's format: messages if the prompt is messages, else a string."""
    completion, prompt = row["completion"], row.get("prompt")
    if isinstance(completion, str) and isinstance(prompt, Sequence) and not isinstance(prompt, str):
        return [{"role": "assistant", "content": completion}]
    return completion


def completion_length(row: Row) -> int:
    """Return the number of tokens of a completion without its EOS token."""
    # A completion cut off by a token limit has no EOS token, and neither has one that a stop string ended.
    # A rollout that ran out of turns is truncated, too, although it may end with EOS; then EOS is counted.
    has_eos = not (row.get("truncated", False) or row.get("stopped", False))
    return max(len(row["completion_ids"]) - has_eos, 0)


def ignore(*args: object, **kwargs: object) -> None:
    """Replace TRL's `log_extra` and `log_metric`, since a worker process has no trainer to log to."""


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of async rewards.

    All calls share it, because an HTTP client that a reward keeps is bound to the loop that created it.
    """
    return asyncio.new_event_loop()
