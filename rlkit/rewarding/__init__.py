"""Running rewards: load them by name, call them on rollouts, and keep their failures apart from their scores.

A reward is a plain function of one rollout that names the columns it reads::

    def total_variation(completion: str, truth: list[float], tolerance: float = 0.01) -> float | None:
        ...

It returns a number, or None where it does not apply. Whatever else happens (an exception, a NaN, a text, more
seconds than allowed, a dead process) makes the rollout *invalid with a reason*, which is not a score of 0: a
trainer leaves such a rollout out of the loss. Three more shapes are known by their parameters:

- `def f(group)` judges all answers to one task together: it gets the rows of the group and returns one value
  a row. Other columns it names come from the first row, since the rows of a group share their task.
- `def f(completions, ...)` or `def f(completion_ids, **kwargs)` is a TRL reward function and works unchanged,
  called with a batch of one.
- an object with `__call__`, `state_dict` and `load_state_dict` has memory. It runs in the trainer's own
  process, because that is where its state is saved: it can fail, but **cannot be killed** when it is slow.
  It may also define `observe(rollouts)`: after a training batch is scored the trainer shows it the valid
  rollouts of all ranks, each once, as a list of dicts with `task_id`, `length` and `correct`. Then
  `__call__` must not change the state, so that a batch is judged by what was known before it, ranks agree,
  and an evaluation, which never calls `observe`, leaves no trace.

All others run in worker processes that are killed when they outrun their time (`runner.py`). Any of them may
be `async def`.

A row is a mapping of the data set's columns and of

- `prompt` and `completion` (the text; of several turns what the model wrote, joined by line ends);
- `turns`, all messages after the prompt, and `environment_tokens`, those that the model did not write;
- `completion_ids`, `truncated` (whether the limit cut it off) and `max_length` (that limit, in tokens), from
  a trainer or an evaluation;
- `stopped`: a stop string ended it, so that there is no end token among `completion_ids`;
- `length`: the tokens of the completion, its end token not counted, where there are `completion_ids`;
- `correct`: the value of the environment's metric on this rollout, mostly 0 or 1. Rewards that name it, and
  rewards of a group, run after the metric. Where the metric is None they do not apply either.

A row that has become invalid is left out of its group. Arguments that a config gives a reward are fixed: no
column replaces them. Nothing here imports torch.
"""

from rlkit.rewarding.batch import Scores, completion_length
from rlkit.rewarding.budget import ErrorBudget
from rlkit.rewarding.calls import as_trl_reward, call_reward, conversation_row, single_turn
from rlkit.rewarding.load import REWARDS, check_columns, load_rewards
from rlkit.rewarding.runner import RewardRunner

__all__ = [
    "REWARDS",
    "ErrorBudget",
    "RewardRunner",
    "Scores",
    "as_trl_reward",
    "call_reward",
    "check_columns",
    "completion_length",
    "conversation_row",
    "load_rewards",
    "single_turn",
]
