"""Answers in words."""

from __future__ import annotations

import re

from rlkit.rewards.latex.nodes import Words
from rlkit.rewards.latex.tokens import FUNCTIONS, is_product

_TEXT_COMMAND = re.compile(
    r"\\(?:text(?:bf|rm|it|sf|tt|normal)?|m?box|hbox|math(?:rm|bf|it|sf)|boldsymbol|bm|operatorname)\s{0,4}\{([^{}]*)\}"
)


def read_words(text: str) -> Words | None:
    """Return an answer that is only words or the name of points (`AB`); None for the product `ab`."""
    text = without_text_commands(text)
    if not re.fullmatch(r"[^\W\d_][^\d_\\^${}()\[\]<>+*|=/:]*", text):
        return None
    words = normalize_words(text).split()
    if not words or len(text) > 200 or any(word in FUNCTIONS for word in words):
        return None
    if len(words) == 1:
        is_word = re.fullmatch(r"[^\W\d_]{3,}|[A-Z]{2}|[A-Z][a-z]|no", text.rstrip(".!"))
        return Words(words[0]) if is_word and not is_product(text) else None
    is_list = "," in text or any(word in ("and", "or") for word in words)
    has_letters = any(len(word) == 1 and word not in ("a", "i") for word in words)
    if (is_list and all(len(word) < 3 or word == "and" for word in words)) or has_letters:
        return None
    return Words(" ".join(words)) if any(len(word) > 2 for word in words) else None


def without_text_commands(text: str) -> str:
    r"""Return the text with `\text{...}` and commands for fonts replaced by their contents."""
    for _ in range(3):
        text = _TEXT_COMMAND.sub(r"\1", text)
    return re.sub(r"\\[,;:! ]|~", " ", text).strip()


def normalize_words(text: str) -> str:
    """Return words in lower case, without punctuation and repeated spaces."""
    return " ".join(re.sub(r"[^\w\s%/+-]|_", " ", text.replace("'", "")).casefold().split())
