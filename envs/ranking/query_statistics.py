"""Statistics of people's queries: length, frequent words, and overlap with their documents.

A query that a model writes is compared with them by the rewards of `rlkit.rewards.writing`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlkit.rewards.writing import COPIED, shares_copied
from rlkit.words import words

FORM_QUANTILE = 0.95  # share of people's queries that are within each limit of their form
COPY_QUANTILE = 0.75  # share of people's queries that are within each limit of copying
FREQUENT_SHARE = 0.05  # share of the queries that have a word, from which it is frequent
RARE_SHARE = 0.25  # share of a document's distinct words that are its rarest


@dataclass(frozen=True)
class QueryStatistics:
    """QueryStatistics of the people whose queries a collection has.

    Attributes:
        document_counts: Number of documents that have a word.
        frequent_words: Words that many queries have, such as "how" and "the".
        limits: Limit of each measure, which most queries are within. The number of words has two.
    """

    document_counts: Mapping[str, int]
    frequent_words: frozenset[str]
    limits: Mapping[str, float]

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, str]], documents: Iterable[str]) -> QueryStatistics:
        """Return the statistics of queries.

        Args:
            pairs: Queries, at least one, each with the text of a document that answers it.
            documents: Texts of all documents.
        """
        document_counts = Counter(word for document in documents for word in set(words(document)))
        num_queries = Counter(word for query, _ in pairs for word in set(words(query)))
        frequent_words = frozenset(
            word for word, number in num_queries.items() if number >= max(FREQUENT_SHARE * len(pairs), 2)
        )
        unlimited = cls(document_counts, frequent_words, {})
        measures = [unlimited.measure(query, document) for query, document in pairs]
        values = {name: [measure[name] for measure in measures] for name in measures[0]}
        limits = {
            "min_words": np.quantile(values["words"], 1 - FORM_QUANTILE, method="lower"),
            "max_words": np.quantile(values["words"], FORM_QUANTILE, method="higher"),
            "min_frequent_words": np.quantile(values["frequent_words"], 1 - FORM_QUANTILE, method="lower"),
        }
        for name in COPIED:
            limits[name] = np.quantile(values[name], COPY_QUANTILE, method="higher")
        return cls(document_counts, frequent_words, {name: float(limit) for name, limit in limits.items()})

    def measure(self, query: str, document: str) -> dict[str, float]:
        """Return the measures of a query for a document: its number of words, and shares of its words."""
        query_words, document_words = words(query), words(document)
        num_frequent = sum(word in self.frequent_words for word in query_words)
        rarest = sorted(set(document_words), key=lambda word: (self.document_counts.get(word, 0), word))
        rare_words = rarest[: round(RARE_SHARE * len(rarest))]
        return {
            "words": float(len(query_words)),
            "frequent_words": num_frequent / len(query_words) if query_words else 0.0,
            **shares_copied(query_words, document_words, rare_words, self.frequent_words),
        }
