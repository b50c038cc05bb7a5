"""Rewards for a description of search intent: how well it separates relevant from irrelevant documents.

The task is Q2ID's (arXiv 2008.10889), which compares the words of a description with a reference. Scoring an
intent by what it separates is our own idea.

The rewards read `turns`: the environment adds to the model's turn `ranking`, the ids of the pool's documents
by how well they fit the description, `intent`, the description itself, and `terms`, its words as BM25 sees
them, in order. A turn without them contains no description and scores 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlkit.rewards.querying import last_turn
from rlkit.rewards.retrieval import measure
from rlkit.words import bigrams_overlap, ngrams

Turns = Sequence[Mapping[str, Any]]
NGRAM_LENGTH = 4  # words: a shared sequence of this length is no coincidence
FREE_TERMS = 6  # distinctive terms of the relevant snippets that a description can use at no cost
EXCESS_TERMS = 4  # with this number of additional ones, a description counts as a full copy


def separation(turns: Turns, relevant: Sequence[str], pool: Sequence[str]) -> float:
    """Return the average precision of the ranking by the description, rescaled to [0, 1].

    The worst order has all relevant documents at the end, and its average precision is above 0. It is mapped
    to 0, so that a description that separates nothing earns nothing.

    Args:
        turns: Messages after the prompt; the model's last turn has the `ranking` of the pool.
        relevant: Ids of the relevant documents.
        pool: Ids of all ranked documents; at least one is not relevant.
    """
    qrels = dict.fromkeys(relevant, 1)
    # False sorts before True, so the relevant documents come last.
    worst = measure("ap", sorted(pool, key=qrels.__contains__), qrels)
    average_precision = measure("ap", last_turn(turns).get("ranking", ()), qrels)
    return max(0.0, (average_precision - worst) / (1 - worst))


def copied(turns: Turns, snippets: Sequence[str], distinctive_terms: Sequence[str]) -> float:
    """Return how much of the description is copied from the snippets, in [0, 1]. A metric.

    This is the larger of two values:

    * the fraction of the description's 4-grams (`rlkit.words.ngrams`) that occur in a snippet;
    * (n - `FREE_TERMS`) / `EXCESS_TERMS`, clipped to [0, 1], with n the number of the description's distinct
      terms that are distinctive. BM25 ignores the order of words, so a sorted or shuffled copy ranks as well
      as a literal one. This is a number and not a fraction, because words that occur in no document dilute a
      fraction and cost nothing. Of two overlapping bigrams in a script without spaces, one counts, so that a
      word of four characters counts as two terms.

    Args:
        turns: Messages after the prompt; the model's last turn has the `intent` and its `terms`.
        snippets: Snippets in the prompt.
        distinctive_terms: Terms of the relevant snippets that are neither in the query nor in an irrelevant
            snippet.
    """
    turn = last_turn(turns)
    num_copied = _num_copied_terms(turn.get("terms", ()), set(distinctive_terms))
    excess = (num_copied - FREE_TERMS) / EXCESS_TERMS
    return max(_copied_ngrams(turn.get("intent", ""), snippets), min(max(excess, 0.0), 1.0))


def own_words(
    turns: Turns,
    relevant: Sequence[str],
    pool: Sequence[str],
    snippets: Sequence[str],
    distinctive_terms: Sequence[str],
    *,
    copy_price: float = 1.0,
) -> float:
    """Return `separation` minus `copy_price` times `copied`, but at least 0.

    A description copied from the relevant snippets separates the pool almost perfectly, so copying must not
    pay.

    Raises:
        ValueError: The price is negative.
    """
    if copy_price < 0:
        raise ValueError(f"copy_price must not be negative, but it is {copy_price}")
    price = copy_price * copied(turns, snippets, distinctive_terms)
    return max(0.0, separation(turns, relevant, pool) - price)


def _copied_ngrams(description: str, snippets: Sequence[str]) -> float:
    """Return the fraction of the description's 4-grams that occur in a snippet."""
    description_ngrams = list(ngrams(description, NGRAM_LENGTH))
    if not description_ngrams:
        return 0.0
    snippet_ngrams = {ngram for snippet in snippets for ngram in ngrams(snippet, NGRAM_LENGTH)}
    return sum(ngram in snippet_ngrams for ngram in description_ngrams) / len(description_ngrams)


def _num_copied_terms(terms: Iterable[str], distinctive_terms: set[str]) -> int:
    """Return the number of different distinctive terms, without those that overlap the counted one before."""
    copied_terms: set[str] = set()
    num_copied = 0
    counted = ""  # the term before, if it was counted
    for term in terms:
        is_copied = term in distinctive_terms and term not in copied_terms
        if is_copied:
            copied_terms.add(term)
        # A term exempts only its first neighbor. Otherwise repeating it would make all that overlap it free.
        counted = term if is_copied and not bigrams_overlap(counted, term) else ""
        num_copied += bool(counted)
    return num_copied
