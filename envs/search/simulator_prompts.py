"""What a language model is asked when it plays a search engine: in our words, after ZeroSearch.

Its code is Alibaba-NLP/ZeroSearch, `llm_agent/generation.py`. A tuned simulator is told the question and its
answer for noise too, as in the release, and the number of documents is what is asked for, not always five.
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
# A lighthouse that does not exist. The useful ones tell its year, the others do not.
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


def write_prompt(query: Query, label: str, k: int, *, style: str, words: int) -> str:
    """The simulator's message.

    Args:
        query: with its question and answers, where they are known.
        label: "useful" or "noisy".
        k: documents.
        style: one of `STYLES`.
        words: about how long a document is asked to be.
    """
    # A prompted model that knows the answer puts it into its noise.
    known = "" if style == "prompted" and label == "noisy" else _known(query)
    template = _TUNED if style == "tuned" else _PROMPTED
    example = "\n".join(f"Doc {i}: {text}" for i, text in enumerate(_EXAMPLES[label][:k], 1))
    return template.format(
        k=k,
        documents="document" if k == 1 else "documents",
        label=label,
        Label=label.capitalize(),
        kind=_KINDS[label],
        known=known,
        words=words,
        query=query.text,
        example=example,
    )


def _known(query: Query) -> str:
    if not query.question:
        return ""
    answer = f" Its answer is: {query.answers[0]}" if query.answers else ""
    return f"\nThe user's question is: {query.question}{answer}"
