"""Rewards for a query that a model writes for a document, to train a retriever on.

Whether a retriever finds the document again with the query is not enough: it finds the document best with
words copied from it, and such a query teaches nothing. So a query may copy no more than the queries of people
do, and must have their form. What is usual is measured on the training queries of the collection.

The rewards read `turns`: the environment adds to the model's turn the `query`; `rank`, the rank of the
document in the results of the query, 0 if it is not among them; `measures`, the numbers that are compared
with the task's `limits`; and `value`, the learning value. A turn without a query scores 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlkit.rewards.querying import last_turn
from rlkit.words import ngrams

Turns = Sequence[Mapping[str, Any]]
COPIED = ("copied_ngrams", "copied_words", "copied_rare_words")  # measures with a maximum below 1
NGRAM_LENGTH = 3  # words
MIN_EXCESS = 0.1  # of a full copy, so that one word does not cost everything where people copy nothing


def round_trip(turns: Turns) -> float:
    """Return 1 / rank of the document among the results of the query, 0 if it is not among them."""
    rank = last_turn(turns).get("rank", 0)
    return 1 / rank if rank else 0.0


def natural_form(turns: Turns, limits: Mapping[str, float]) -> float:
    """Return 1 if the query has the form of people's queries, else 0.

    Its number of words must be in their range, and at least their share of its words must be among the words
    that their queries often have: a list of key words is no request.

    Args:
        turns: Messages after the prompt; the model's last turn has the `measures`.
        limits: The limits `min_words`, `max_words` and `min_frequent_words`.
    """
    measures = last_turn(turns).get("measures")
    if not measures:
        return 0.0
    has_length = limits["min_words"] <= measures["words"] <= limits["max_words"]
    return float(has_length and measures["frequent_words"] >= limits["min_frequent_words"])


def copied(turns: Turns, limits: Mapping[str, float]) -> float:
    """Return how much more the query copies from the document than people's queries do, in [0, 1].

    The shares of the query's trigrams, words and rare words that are the document's have a limit each. The
    largest of these three counts, at most 1::

        (share - limit) / min(max(min(limit, 1 - limit), MIN_EXCESS), 1 - limit)

    A query is thus a full copy if it copies everything or, with a limit of at least `MIN_EXCESS`, twice the
    limit.

    Args:
        turns: Messages after the prompt; the model's last turn has the `measures`.
        limits: The limits of `COPIED`.
    """
    measures = last_turn(turns).get("measures") or {}
    excesses = [0.0]
    for name in COPIED:
        limit, excess = limits[name], measures.get(name, 0.0) - limits[name]
        if excess > 0:
            full = max(min(limit, 1 - limit), MIN_EXCESS)
            excesses.append(excess / min(full, 1 - limit))
    return min(max(excesses), 1.0)


def own_words(turns: Turns, limits: Mapping[str, float]) -> float:
    """Return `round_trip` times `natural_form`, times 1 minus `copied`, in [0, 1].

    Args:
        turns: Messages after the prompt.
        limits: The limits of all measures.
    """
    return round_trip(turns) * natural_form(turns, limits) * (1 - copied(turns, limits))


def learning_value(turns: Turns) -> float | None:
    """Return how much one step of training on the query improves the retriever on people's queries.

    The unit is the root mean square of the value of people's queries for one another. A single value is
    noisy: it is of use as a reward, which the policy gradient averages, and not as a filter. It is 0 without
    a query, and None for a query if the environment has no encoder to train.
    """
    turn = last_turn(turns)
    return turn.get("value") if turn.get("query") else 0.0


def shares_copied(
    query: Sequence[str], document: Iterable[str], rare_words: Iterable[str], frequent_words: Iterable[str]
) -> dict[str, float]:
    """Return the measures of `COPIED` for a query: shares of it that are the document's, in [0, 1].

    Words that many queries have do not count as copied, but they count in the length of the query.

    Args:
        query: Words of the query, in order.
        document: Words of the document, in order.
        rare_words: Words of the document that few documents have.
        frequent_words: Words that many queries have.
    """
    document, frequent_set = list(document), set(frequent_words)
    return {
        "copied_ngrams": _share(
            list(ngrams(" ".join(query), NGRAM_LENGTH)), set(ngrams(" ".join(document), NGRAM_LENGTH))
        ),
        "copied_words": _share(query, set(document) - frequent_set),
        "copied_rare_words": _share(query, set(rare_words) - frequent_set),
    }


def _share(items: Sequence[Any], members: set[Any]) -> float:
    return sum(item in members for item in items) / len(items) if items else 0.0
