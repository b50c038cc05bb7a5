"""Scripted conversations with a multi-turn environment, without a model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlkit.environment import Environment, Reply, Turn
from rlkit.reward import conversation_row

Task = Mapping[str, Any]


def play(environment: Environment, tasks: Sequence[Task], scripts: Sequence[Sequence[str]]) -> list[Task]:
    """Play scripted assistant turns against the environment.

    A conversation ends when the environment ends it, after the last turn of its script, or after `max_turns`
    turns.

    Args:
        environment: Environment that replies.
        tasks: Tasks, one per conversation.
        scripts: Assistant turns of each conversation.

    Returns:
        For each conversation, the row that rewards read.

    Raises:
        RuntimeError: If the environment reports a failure.
    """
    conversations: list[list[dict[str, Any]]] = [[] for _ in tasks]
    active = list(range(len(tasks)))
    for turn_number in range(environment.max_turns):
        active = [i for i in active if turn_number < len(scripts[i])]
        if not active:
            break
        for i in active:
            conversations[i].append({"role": "assistant", "content": scripts[i][turn_number]})
        turns = [Turn(tasks[i], [*tasks[i]["prompt"], *conversations[i]]) for i in active]
        replies = environment.respond(turns)
        for i, reply in zip(active, replies, strict=True):
            _append_reply(conversations[i], reply)
        active = [i for i, reply in zip(active, replies, strict=True) if not reply.done]
    return [conversation_row(task, turns) for task, turns in zip(tasks, conversations, strict=True)]


def _append_reply(conversation: list[dict[str, Any]], reply: Reply) -> None:
    if reply.invalid is not None:
        raise RuntimeError(f"the environment failed: {reply.invalid}")
    if reply.done:
        conversation[-1] |= reply.record
    else:
        conversation.append({**reply.record, "role": reply.role, "content": reply.text or ""})


def most_frequent_answer(environment: Environment, tasks: Sequence[Task]) -> str:
    """Return the most frequent reference answer of the tasks."""
    return Counter(environment.answer(task) or "" for task in tasks).most_common(1)[0][0]
