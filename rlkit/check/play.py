"""Play an environment of several turns with texts and no model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlkit.environment import Environment, Reply, Turn
from rlkit.reward import conversation_row

Task = Mapping[str, Any]


def play(environment: Environment, tasks: Sequence[Task], scripts: Sequence[Sequence[str]]) -> list[Task]:
    """Let the environment answer scripted turns; return what rewards read of each conversation.

    It ends where the environment says so, where the script ends, or after `max_turns` turns.

    Raises:
        RuntimeError: the environment failed.
    """
    said: list[list[dict[str, Any]]] = [[] for _ in tasks]
    going = list(range(len(tasks)))
    for n in range(environment.max_turns):
        going = [i for i in going if n < len(scripts[i])]
        if not going:
            break
        for i in going:
            said[i].append({"role": "assistant", "content": scripts[i][n]})
        turns = [Turn(tasks[i], [*tasks[i]["prompt"], *said[i]]) for i in going]
        going = [
            i for i, reply in zip(going, environment.respond(turns), strict=True) if _goes_on(reply, said[i])
        ]
    return [conversation_row(task, turns) for task, turns in zip(tasks, said, strict=True)]


def _goes_on(reply: Reply, said: list[dict[str, Any]]) -> bool:
    if reply.invalid is not None:
        raise RuntimeError(f"the environment failed: {reply.invalid}")
    if reply.done:
        said[-1] |= reply.record
    else:
        said.append({**reply.record, "role": reply.role, "content": reply.text or ""})
    return not reply.done


def most_frequent_answer(environment: Environment, tasks: Sequence[Task]) -> str:
    """The right answer that most of the tasks share."""
    return Counter(environment.answer(task) or "" for task in tasks).most_common(1)[0][0]
