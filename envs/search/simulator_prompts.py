"""Prompts for a language model that simulates a search engine, after ZeroSearch but in our wording.

The original prompts are in Alibaba-NLP/ZeroSearch, `llm_agent/generation.py`. As there, the prompt of a tuned
simulator contains the question and its answer even when it asks for noise. Unlike there, it asks for k
documents, not always for five. A released simulator needs its own prompt, which a file of templates has
(`read_templates`).
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.errors import UserError, nearest, one_line
from rlkit.retrieval.documents import Query

STYLES = ("tuned", "prompted")
PLACEHOLDERS = ("query", "question", "answer", "answers", "k", "words", "label")
MAX_QUERY_CHARACTERS = 1000  # about the 256 tokens after which dense engines cut a query
_KINDS = {
    "useful": "contain the information needed to answer it",
    "noisy": "are on related topics but do not help to answer it",
}
_TUNED = (
    "You are a search engine. Write {k} {label} {documents} for the query, about {words} words each, that "
    "{kind}.{known}\nQuery: {query}\n{Label} output:"
)
_PROMPTED = (
    "You are a search engine. Given a query, write {k} {documents} in English, about {words} words each, "
    "that {kind}. Write nothing else.\n\nHere is an example.\nQuery: opening of the Tarvik lighthouse\n"
    "{Label} output:\n{example}\n\nNow write the output for this query.{known}\nQuery: {query}\n{Label} "
    "output:"
)
# About a fictional lighthouse: the useful documents give its year, the noisy ones do not.
_EXAMPLES = {
    "useful": (
        "The Tarvik lighthouse opened in 1897, after two years of work on the cliffs north of the harbor.",
        "Ships have been able to find Tarvik at night since 1897, when its light was first lit.",
        "A plaque beside the door of the Tarvik lighthouse says that the mayor opened it in June 1897.",
        "The harbor of Tarvik grew after 1897, the year its lighthouse went into service.",
        "Of the five lighthouses on that coast, the one at Tarvik, built in 1897, is the second oldest.",
    ),
    "noisy": (
        "The Tarvik lighthouse stands on the cliffs north of the harbor and is painted white and red.",
        "Visitors climb 212 steps to the gallery of the lighthouse, which overlooks the islands.",
        "Lighthouses on rocky coasts were often built of granite quarried nearby.",
        "The keeper of Tarvik lived in a small house beside the tower with a walled garden.",
        "The ferry to Tarvik runs twice a day and passes below the lighthouse.",
    ),
}


@dataclass(frozen=True)
class Templates:
    """Prompt of a simulator that was tuned on other words than ours.

    Attributes:
        useful, noisy: Template of the user message, for `str.format`, by the kind of the documents.
        system: System message; None sends none, and "" an empty one.
    """

    useful: str
    noisy: str
    system: str | None = None


def load_prompts(prompts: str) -> str | Templates:
    """Return one of `STYLES` as it is, or the templates of a YAML file.

    Raises:
        UserError: `prompts` is neither, or the file is invalid.
    """
    if prompts in STYLES:
        return prompts
    path = Path(str(prompts)).expanduser()
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        raise UserError(
            f"unknown prompts {prompts!r}{nearest(str(prompts), STYLES)}: use 'tuned', 'prompted' or the path"
            " of a YAML file of templates"
        )
    return read_templates(path)


def read_templates(path: Path) -> Templates:
    """Read the templates `useful` and `noisy`, and optionally `system`, from a YAML file.

    Raises:
        UserError: The file cannot be read, lacks a template, or has an unknown key or placeholder.
    """
    import yaml

    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the prompts {path}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must have the templates 'useful' and 'noisy', not {str(content)[:80]!r}")
    keys = ("useful", "noisy", "system")
    for key, value in content.items():
        if key not in keys:
            raise UserError(f"{path}: unknown key {key!r}{nearest(str(key), keys)}")
        if not isinstance(value, str):
            raise UserError(f"{path}: {key!r} must be a string, not {value!r}")
    for key in ("useful", "noisy"):
        if not content.get(key):
            raise UserError(f"{path}: the template {key!r} is missing or empty")
        _check_template(content[key], f"{path}: the template {key!r}")
    return Templates(**content)


def _check_template(template: str, name: str) -> None:
    """Raise UserError unless the placeholders of a template are in `PLACEHOLDERS`, and `query` is one."""
    hint = "write {{ and }} for braces that are text"
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise UserError(f"{name} is invalid: {error}; {hint}") from error
    for _, placeholder, specification, conversion in fields:
        if placeholder not in PLACEHOLDERS:
            suggestion = nearest(str(placeholder), PLACEHOLDERS)
            raise UserError(f"{name} has an unknown placeholder {{{placeholder}}}{suggestion}; {hint}")
        if specification or conversion:
            raise UserError(f"{name}: the placeholder {{{placeholder}}} must be the name alone; {hint}")
    if "query" not in [placeholder for _, placeholder, _, _ in fields]:
        raise UserError(f"{name} lacks the placeholder {{query}}")


def write_messages(
    query: Query, label: str, k: int, *, prompts: str | Templates, num_words: int
) -> list[dict[str, str]]:
    """Return the chat messages that ask a model to write the documents of a query.

    Args:
        query: Query, with its question and answers if known.
        label: "useful" or "noisy".
        k: Number of documents.
        prompts: One of `STYLES`, or templates.
        num_words: Approximate number of words of a document.
    """
    if isinstance(prompts, str):
        text = write_prompt(query, label, k, style=prompts, num_words=num_words)
        return [{"role": "user", "content": text}]
    template = prompts.useful if label == "useful" else prompts.noisy
    # `format` inserts values as they are: braces in a query are text.
    text = template.format(
        query=_one_line(query.text),
        question=query.question,
        answer=query.answers[0] if query.answers else "",
        answers=", ".join(query.answers),
        k=k,
        words=num_words,
        label=label,
    )
    system = [] if prompts.system is None else [{"role": "system", "content": prompts.system}]
    return [*system, {"role": "user", "content": text}]


def write_prompt(query: Query, label: str, k: int, *, style: str, num_words: int) -> str:
    """Return the user message that asks a model to write the documents of a query.

    Args:
        query: Query, with its question and answers if known.
        label: "useful" or "noisy".
        k: Number of documents.
        style: One of `STYLES`.
        num_words: Approximate number of words of a document.
    """
    # A prompted model would leak the answer into its noise, so it does not get the answer.
    context = "" if style == "prompted" and label == "noisy" else _context(query)
    template = _TUNED if style == "tuned" else _PROMPTED
    example = "\n".join(f"Doc {i}: {text}" for i, text in enumerate(_EXAMPLES[label][:k], 1))
    return template.format(
        k=k,
        documents="document" if k == 1 else "documents",
        label=label,
        Label=label.capitalize(),
        kind=_KINDS[label],
        known=context,
        words=num_words,
        query=_one_line(query.text),
        example=example,
    )


def _one_line(query: str) -> str:
    """Return a query on one line and of limited length, so that it cannot imitate the lines of the prompt."""
    return " ".join(query.split())[:MAX_QUERY_CHARACTERS]


def _context(query: Query) -> str:
    """Return the sentences about the user's question and its answer, or "" if the question is unknown."""
    if not query.question:
        return ""
    answer = f" Its answer is: {query.answers[0]}" if query.answers else ""
    return f"\nThe user's question is: {query.question}{answer}"
