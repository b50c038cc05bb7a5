"""Prompts for a model that writes a query for a document, and how its reply is read.

    Write a search query that the document below answers, phrased the way someone who has not read the
    document would phrase it. Write only the query, on one line.

    Document: Search for flights between two airports. …
    Query: what does it cost to fly to Lisbon in May

    Document: Translate text between languages. …
    Query:

With examples of the task's own queries, this is Promptagator's few-shot prompt (arXiv 2209.11755). The
environment write-v1 trains a model on the same prompts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlkit.envs.ranking.prompts import prompt_line
from rlkit.rewards.thinking import after_thinking

INSTRUCTION = (
    "Write a search query that the document below answers, phrased the way someone who has not read the "
    "document would phrase it. Write only the query, on one line."
)
MAX_DOCUMENT_WORDS = 60  # of a document in a prompt
MAX_QUERY_WORDS = 25  # of a query; a longer one is an answer or a summary
# A label needs its colon: "query planner settings" is a query. Models put labels in bold type, too.
_LABELS = re.compile(
    r"^(?:(?:(?:search )?query|question|claim|title|keywords?|passage(?: that does not answer it)?)"
    r"\s*:[\s*_]*"
    r"|(?:[-*•]|\d{1,2}[.)])\s+)+",
    re.IGNORECASE,
)
# People say that they are sorry, or that they can't do something, in queries, too.
_CANNOT = r"(?:i (?:cannot|can['’]?t|am (?:unable|not able) to|won['’]?t)|i['’]m (?:unable|not able) to)"
_REFUSAL = re.compile(
    rf"(?:(?:i['’]m|i am|my)?\s*(?:sorry|apologies)|i apologi[sz]e)\s*[,.]?\s*(?:but\s+)?{_CANNOT}\b"
    rf"|{_CANNOT} (?:assist|fulfill|comply|help with (?:that|this))\b"
    r"|as an? (?:ai (?:language model|assistant|model)|(?:large )?language model)\b",
    re.IGNORECASE,
)
_MARKS = "\"'`“”‘’«»*_ \t"  # quotes and the marks of bold type


def writing_prompt(
    document: str,
    examples: Sequence[tuple[str, str]] = (),
    *,
    instruction: str = INSTRUCTION,
    max_words: int = MAX_DOCUMENT_WORDS,
) -> list[dict[str, str]]:
    """Return the chat messages that ask a model for one query.

    Args:
        document: Text of the document.
        examples: Documents with a query for each, shown before the document.
        instruction: Task of the model; it should say what kind of query to write, and to write nothing else.
        max_words: Maximum number of words of a document; a longer one is truncated.
    """
    blocks = [
        f"Document: {prompt_line(text, max_words)}\nQuery: {prompt_line(query, MAX_QUERY_WORDS)}"
        for text, query in examples
    ]
    blocks.append(f"Document: {prompt_line(document, max_words)}\nQuery:")
    return [{"role": "user", "content": "\n\n".join([instruction, *blocks])}]


def read_query(reply: str) -> str:
    """Return the query in a model's reply: its first line, without labels, list numbers and quotes.

    An introduction such as "Here is a query:" is skipped if another line follows. The query is empty if the
    reply, apart from a thought, has no words.
    """
    lines = [_without_labels(line) for line in after_thinking(reply).splitlines()]
    lines = [line for line in lines if any(character.isalnum() for character in line)]
    if len(lines) > 1 and lines[0].endswith(":"):
        del lines[0]
    return lines[0] if lines else ""


def is_refusal(reply: str) -> bool:
    """Return whether a reply, apart from a thought, starts with a refusal to write."""
    return _REFUSAL.match(after_thinking(reply).strip(_MARKS + "\n")) is not None


def read_passage(reply: str) -> str:
    """Return the passage in a model's reply on one line, without a thought and labels; "" without words."""
    passage = " ".join(_LABELS.sub("", after_thinking(reply).strip(_MARKS + "\n")).split())
    return passage if any(character.isalnum() for character in passage) else ""


def _without_labels(line: str) -> str:
    return " ".join(_LABELS.sub("", line.strip(_MARKS)).strip(_MARKS).split())
