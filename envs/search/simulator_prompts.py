"""What a language model is asked when it plays a search engine: in our words, after ZeroSearch.

Its code is Alibaba-NLP/ZeroSearch, `llm_agent/generation.py`. A tuned simulator is told the question and its
answer for noise too, as in the release, and the number of documents is what is asked for, not always five.
"""

from __future__ import annotations

from rlkit.retrieval.documents import Query

STYLES = ("tuned", "prompted")
_KINDS = {
    "useful": "hold what is needed to answer it",
    "noisy": "are about related things and are of no use for it",
}
_TUNED = (
    "You are a search engine. Write {k} {label} {documents} for the query, of about {words} words each: they "
    "{kind}.{known}\nQuery: {query}\n{Label} output:"
)
_PROMPTED = (
    "You are a search engine. For a query you write {k} {documents} of about {words} words each, in English, "
    "that {kind}, and nothing else.\n\nAn example.\nQuery: opening of the Tarvik lighthouse\n{Label} "
    "output:\n{example}\n\nNow the query of a user.{known}\nQuery: {query}\n{Label} output:"
)
# A lighthouse that does not exist. The useful ones tell its year, the others do not.
_EXAMPLES = {
    "useful": (
        "The Tarvik lighthouse was opened in 1897, after two years of work on cliffs north of the harbour.",
        "Ships have found Tarvik at night since 1897, when the light on the northern cliffs was first lit.",
        "A plate beside the door of the Tarvik lighthouse says that the mayor opened it in June 1897.",
        "The harbour of Tarvik grew after 1897, the year in which its lighthouse began its service.",
        "Of the five lights on that coast the one at Tarvik, from 1897, is the second oldest.",
    ),
    "noisy": (
        "The Tarvik lighthouse stands on the cliffs north of the harbour and is painted white and red.",
        "Visitors climb 212 steps to the gallery of the lighthouse, from where they see the islands.",
        "Lighthouses on rocky coasts were often built of granite that was cut on the spot.",
        "The keeper of Tarvik lived in a small house beside the tower, with a garden behind a wall.",
        "The ferry to Tarvik leaves twice a day and passes below the lighthouse.",
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
