"""Tag protocol of Search-R1 and ZeroSearch, by which a model searches and answers in plain text.

The model writes `<think>`, `<search>query</search>` and `<answer>text</answer>`. The environment returns
search results between `<information>` tags, which count for nothing if the model writes them. The format is
that of `search_r1/llm_agent/generation.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rlkit.encoding import encodable
from rlkit.retrieval.documents import Document
from rlkit.rewards.tags import tag_contents
from rlkit.words import truncate_words

STOP_STRINGS = ("</search>", "</answer>")
# A longer query is truncated. Encoders ignore what follows their first 256 or 512 tokens, and a policy that
# writes endlessly must still get its results, and its low reward, instead of an error of the engine.
MAX_QUERY_CHARACTERS = 2000
INVALID = (
    "\nMy last action was not valid. To search, I must put a query between search tags; to answer, I must "
    "put the answer between answer tags. Let me try again.\n"
)
# The "<" of a tag that would have an effect, also with spaces or in capitals. It is escaped in documents.
_TAG = re.compile(
    r"<(?=\s*+/?+\s*+(?:think|search|information|answer|tool_call|tool_response)\b)", re.IGNORECASE
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
    """What an assistant turn does: search with one or more queries, answer, or nothing valid."""

    kind: Literal["search", "answer", "invalid"]
    queries: tuple[str, ...] = ()


def write_prompt(question: str, style: str, *, may_refuse: bool = False, tools: bool = False) -> str:
    """Return the user message of a question, which gets a question mark if it has none.

    Args:
        question: Question to answer.
        style: One of `STYLES`.
        may_refuse: Whether to say what to answer if the answer cannot be found.
        tools: Whether the prompt describes a search function instead of search tags.
    """
    question = question.strip()
    refuse = "If you cannot find the answer, answer unknown. " if may_refuse else ""
    if not question.endswith(("?", "？", "؟")):  # also full-width and Arabic
        question += "?"
    template = (_TOOL_PROMPTS if tools else _PROMPTS)[style]
    return template.format(question=question, refuse=refuse)


def read_action(turn: str) -> Action:
    """Return the action of the first complete pair of tags; an empty query is invalid."""
    queries, answers = tag_contents(turn, "search"), tag_contents(turn, "answer")
    # If the first opening tag of a kind has no closing tag after it, no later one has.
    if answers and (not queries or turn.find("<answer>") < turn.find("<search>")):
        return Action("answer")
    query = clean_query(queries[0]) if queries else ""
    return Action("search", (query,)) if query else Action("invalid")


def clean_query(query: str) -> str:
    """Return a query as engines get it: one line of at most `MAX_QUERY_CHARACTERS`, without lone surrogates.

    It is one line because rewards count the lines of a message's `query`, and a simulator's prompt has one
    line for it.
    """
    return " ".join(encodable(query).split())[:MAX_QUERY_CHARACTERS].rstrip()


def write_results(documents: Sequence[Document], max_words: int, document_format: str = "search_r1") -> str:
    """Return the environment's message: documents between information tags, see `write_documents`.

    Tags in documents are escaped: retrieved text must not act as a search or an answer, or end the block.
    """
    return f"\n\n<information>{write_documents(documents, max_words, document_format)}</information>\n\n"


def write_documents(documents: Sequence[Document], max_words: int, document_format: str = "search_r1") -> str:
    """Return documents as a model sees them.

    Args:
        documents: Documents, best first.
        max_words: Maximum number of words of a document's text, and of its title. Documents are truncated one
            by one, so that the tag behind them is never lost.
        document_format: One of `DOCUMENT_FORMATS`.
    """
    write = _FORMATS[document_format]
    lines = (write(number, document, max_words) for number, document in enumerate(documents, 1))
    return _TAG.sub("&lt;", "".join(lines)).strip()


def results_text(message: str) -> str:
    """Return the content between the information tags of the environment's message."""
    return message.strip().removeprefix("<information>").removesuffix("</information>").strip()


def _search_r1_document(number: int, document: Document, max_words: int) -> str:
    """Return `Doc 1(Title: "T") text`, as Search-R1 formats the contents `"T"\\ntext` of a document.

    It takes the first line of the contents as the title, also of a document without a title. Text of one line
    is therefore all title.
    """
    text = document.text.strip()
    if document.title:
        title = f'"{truncate_words(" ".join(document.title.split()), max_words)}"'
    else:
        first_line, _, text = text.partition("\n")
        title = truncate_words(first_line, max_words)
    return f"Doc {number}(Title: {title}) {truncate_words(text, max_words)}\n"


def _zerosearch_document(number: int, document: Document, max_words: int) -> str:
    """Return `Doc 1: title text` on one line, as ZeroSearch shows documents of simulators and servers."""
    # ZeroSearch joins title and text without a space. One line: a second "Doc 2:" is always another document.
    text = " ".join(f"{document.title} {document.text}".split())
    return f"Doc {number}: {truncate_words(text, max_words)}\n"


_FORMATS: dict[str, Callable[[int, Document, int], str]] = {
    "search_r1": _search_r1_document,
    "zerosearch": _zerosearch_document,
}
DOCUMENT_FORMATS = tuple(_FORMATS)
