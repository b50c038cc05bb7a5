"""How a model searches and answers in text: the tags of Search-R1 and ZeroSearch.

The model writes `<think>`, `<search>query</search>` and `<answer>text</answer>`; what a search finds comes
back between `<information>` tags, which are the environment's alone (`search_r1/llm_agent/generation.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlkit.retrieval.documents import Document

STOP = ("</search>", "</answer>")
INVALID = (
    "\nMy last action was not valid. To search, I must put a query between search tags; to answer, I must "
    "put the answer between answer tags. Let me try again.\n"
)
_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
_TAG = re.compile(
    r"<(?=\s*/?\s*(?:think|search|information|answer|tool_call|tool_response)\b)", re.IGNORECASE
)
_PROMPTS = {
    "search_r1": (
        "Answer the question at the end. Whenever you get new information, first reason about it inside "
        "<think> and </think>. If you find that you lack some knowledge, you can call a search engine by "
        "<search> query </search>, and the best results come back between <information> and </information>. "
        "You can search as many times as you want. When you need no more knowledge, give the answer inside "
        "<answer> and </answer> without further explanation, for example <answer> Beijing </answer>. "
        "{refuse}Question: {question}\n"
    ),
    "short": (
        "Write <search>query</search> to search, <answer>text</answer> to answer.\n"
        "{refuse}Question: {question}"
    ),
}
STYLES = tuple(_PROMPTS)
_TOOL_PROMPTS = {
    "search_r1": (
        "Answer the question at the end. Whenever you get new information, first reason about it inside "
        "<think> and </think>. If you find that you lack some knowledge, you can call the search function, "
        "which returns the best results. You can search as many times as you want. When you need no more "
        "knowledge, give the answer inside <answer> and </answer> without further explanation, for example "
        "<answer> Beijing </answer>. {refuse}Question: {question}\n"
    ),
    "short": (
        "Call the search function to search, write <answer>text</answer> to answer.\n"
        "{refuse}Question: {question}"
    ),
}


@dataclass(frozen=True)
class Action:
    """What a turn asks for: some queries, or the end with an answer."""

    kind: Literal["search", "answer", "invalid"]
    queries: tuple[str, ...] = ()


def write_prompt(question: str, style: str, *, may_refuse: bool = False, tools: bool = False) -> str:
    """The user's message; a question mark is added where there is none.

    With `may_refuse` it says what to answer where nothing answers the question; with `tools` it speaks of a
    function and not of tags.
    """
    question = question.strip()
    refuse = "If you cannot find the answer, answer unknown. " if may_refuse else ""
    return (_TOOL_PROMPTS if tools else _PROMPTS)[style].format(
        question=question if question.endswith("?") else f"{question}?", refuse=refuse
    )


def read_action(turn: str) -> Action:
    """The first complete pair of tags; an empty query asks for nothing and is invalid."""
    match = _ACTION.search(turn)
    if match is None or (match[1] == "search" and not match[2].strip()):
        return Action("invalid")
    return Action("search", (match[2].strip(),)) if match[1] == "search" else Action("answer")


def write_results(documents: Sequence[Document], most_words: int) -> str:
    """The environment's message: `Doc 1(Title: "T") text`, a line each, between information tags.

    A document's text is cut after `most_words` words, so that the closing tag is always there. Tags in it
    become plain text: what was retrieved must not look like an action or end the block.
    """
    return f"\n\n<information>{write_documents(documents, most_words)}</information>\n\n"


def write_documents(documents: Sequence[Document], most_words: int) -> str:
    """Documents as a model sees them, a line each."""
    lines = (_line(number, document, most_words) for number, document in enumerate(documents, 1))
    return "".join(lines).strip()


def results_text(message: str) -> str:
    """What stands between the tags of the environment's message."""
    return message.strip().removeprefix("<information>").removesuffix("</information>").strip()


def _line(number: int, document: Document, most_words: int) -> str:
    text = document.text.strip()
    text = _cut(text, most_words)
    title = f'"{_cut(document.title, most_words)}"' if document.title else text
    body = text if document.title else ""
    return _TAG.sub("&lt;", f"Doc {number}(Title: {title}) {body}\n")


def _cut(text: str, most_words: int) -> str:
    words = text.split()
    return text if len(words) <= most_words else " ".join([*words[:most_words], "…"])
