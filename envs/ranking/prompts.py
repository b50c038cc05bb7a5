"""Strings from a collection, as prompts show them.

A prompt has one line per passage, in most environments with a number in brackets, and the query on a line
that begins with its name. Passages and queries must not be able to imitate these lines, so they are put on
one line each, and their own numbers in brackets become numbers in parentheses.
"""

from __future__ import annotations

from rlkit.retrieval.documents import without_markers
from rlkit.retrieval.queries import snippet


def prompt_line(text: str, max_words: int | None = None) -> str:
    """Return a string on one line, without markers such as "[3]".

    Args:
        text: A query, or the text of a document.
        max_words: Maximum number of words; a longer string is truncated. None keeps all words.
    """
    line = " ".join(text.split()) if max_words is None else snippet(text, max_words)
    return without_markers(line)
