"""The part of a completion that is not private thought, which all verifiers read an answer from.

A thought is text between `<think>` and `</think>`, between the marks that other models use instead
(`_MARKS`), or a message of gpt-oss's analysis channel.
"""

from __future__ import annotations

import re

# Marks that open and close a thought, of models that do not use <think>: Gemma 4, Mistral, Seed-OSS, Kimi.
_MARKS = {
    "<think>": re.compile(
        r"<\|channel>thought\b|<think(?:ing)?>|\[THINK\]|<seed:think>|◁think▷", re.IGNORECASE
    ),
    "</think>": re.compile(r"<channel\|>|</think(?:ing)?>|\[/THINK\]|</seed:think>|◁/think▷", re.IGNORECASE),
}
_ANALYSIS = "<|channel|>analysis<|message|>"
# Of gpt-oss: a message of the analysis channel, up to its end or to the next message.
_ANALYSIS_MESSAGE = re.compile(
    r"<\|channel\|>analysis<\|message\|>.*?(?:<\|end\|>|(?=<\|start\|>)|(?=<\|channel\|>)|\Z)", re.DOTALL
)
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
# The header of a message in the final channel, which may name a format: `final <|constrain|>json`.
_FINAL = re.compile(r"<\|channel\|>final\b[^<]*+(?:<\|constrain\|>[^<]*+)?<\|message\|>")


def after_thinking(completion: str) -> str:
    r"""Return what follows the last `</think>`, up to a `<think>` that is never closed.

    - `<think> maybe \boxed{42}`, truncated in its thought, has no answer.
    - `\boxed{7} <think> hm`, truncated while it checks an answer, has the answer 7.
    - In `maybe \boxed{42} </think> \boxed{7}` the prompt opened the thought; the answer is 7.
    - Of a completion with an analysis channel (gpt-oss), only the last message of the final channel counts.
    - A completion without these tags is returned unchanged.

    Runs in time linear in the length.
    """
    completion = _with_think_tags(completion)
    if _ANALYSIS in completion:
        # A later turn may be truncated in its analysis.
        _, *final_messages = _FINAL.split(_ANALYSIS_MESSAGE.sub("", completion))
        completion = final_messages[-1] if final_messages else ""
    return completion.rpartition("</think>")[2].partition("<think>")[0]


def outside_thoughts(turn: str) -> str:
    """Return a turn without its thoughts: all text outside of them, not only what follows the last one.

    A `</think>` without an opening tag ends a thought that the prompt has opened. A thought that is never
    closed extends to the end of the turn. Runs in time linear in the length.
    """
    turn = _ANALYSIS_MESSAGE.sub("", _with_think_tags(turn))
    before, closing, rest = turn.partition("</think>")
    if closing and "<think>" not in before:
        turn = rest
    return _THOUGHT.sub("", turn)


def _with_think_tags(text: str) -> str:
    """Return text in which `<think>` and `</think>` replace the marks of thoughts of all models."""
    for tag, mark in _MARKS.items():
        text = mark.sub(tag, text)
    return text
