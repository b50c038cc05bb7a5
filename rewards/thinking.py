"""The part of a completion that is not private thought, which all verifiers read an answer from."""

from __future__ import annotations


def after_thinking(completion: str) -> str:
    r"""Return what follows the last `</think>`, up to a `<think>` that is never closed.

    - `<think> maybe \boxed{42}`, truncated in its thought, has no answer.
    - `\boxed{7} <think> hm`, truncated while it checks an answer, has the answer 7.
    - In `maybe \boxed{42} </think> \boxed{7}` the prompt opened the thought; the answer is 7.
    - A completion without these tags is returned unchanged.

    Runs in time linear in the length.
    """
    return completion.rpartition("</think>")[2].partition("<think>")[0]
