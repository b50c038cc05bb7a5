"""Prompts for a language model that simulates a search engine, after ZeroSearch but in our wording.

The original prompts are in Alibaba-NLP/ZeroSearch, `llm_agent/generation.py`. As there, the prompt of a tuned
simulator contains the question and its answer even when it asks for noise. Unlike there, it asks for k
documents, not always for five.
"""

from __future__ import annotations

from rlkit.retrieval.documents import Query

STYLES = ("tuned", "prompted")
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
        query=query.text,
        example=example,
    )


def _context(query: Query) -> str:
    """Return the sentences about the user's question and its answer, or "" if the question is unknown."""
    if not query.question:
        return ""
    answer = f" Its answer is: {query.answers[0]}" if query.answers else ""
    return f"\nThe user's question is: {query.question}{answer}"
