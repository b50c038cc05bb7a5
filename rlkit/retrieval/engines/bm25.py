"""BM25 by bm25s: exact, sparse, fast enough for one core, memory-mapped.

The score of a document d of |d| words for a query is the sum over the query's words (Lucene's variant)::

    idf(t) * tf(t, d) / (tf(t, d) + k1 * (1 - b + b * |d| / mean |d|))
    idf(t) = ln(1 + (N - n(t) + 1/2) / (n(t) + 1/2))

with words of two characters or more in lower case, without the stop words of bm25s, stemmed for English.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.errors import UserError
from rlkit.retrieval.documents import Query, Result, check_k, full_text
from rlkit.retrieval.store import DocumentStore, Progress, damaged, read_header

FOLDER = "bm25"
THREADS = min(8, os.cpu_count() or 1)
WORD = re.compile(r"\w\w+")


def terms(texts: Iterable[str]) -> Iterator[list[str]]:
    """The terms of each text."""
    import Stemmer
    from bm25s.stopwords import STOPWORDS_EN

    stemmer = Stemmer.Stemmer("english")  # one a call: a stemmer must not be shared by threads
    for text in texts:
        words = WORD.findall(unicodedata.normalize("NFKC", text).lower())
        yield stemmer.stemWords([word for word in words if word not in STOPWORDS_EN])


def build(folder: Path, progress: Progress, k1: float = 0.9, b: float = 0.4) -> dict[str, Any]:
    """Index the documents of a folder and return the settings.

    Raises:
        UserError: k1 or b is out of range, or no document has a word.
    """
    import bm25s

    if not (0 <= k1 < np.inf and 0 <= b <= 1):
        raise UserError(f"k1 is {k1} and b is {b}: k1 must be 0 or more, b from 0 to 1")
    collection = DocumentStore(folder)
    vocabulary: dict[str, int] = {}
    texts = (full_text(document) for document in progress(collection, "words", len(collection)))
    term_ids = [[vocabulary.setdefault(term, len(vocabulary)) for term in found] for found in terms(texts)]
    if not vocabulary:
        raise UserError("no document has a word to search for: BM25 needs words of two letters or more")
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    index.index((term_ids, vocabulary), create_empty_token=False, show_progress=False)
    index.save(folder / FOLDER, show_progress=False)
    return {"k1": k1, "b": b}


class BM25:
    """BM25 over an index folder.

    A document without any of the query's terms is never a result, so there may be fewer than k, or none.
    Equal scores are in the order of the documents.

    Args:
        folder: made by `rlkit.retrieval.engines.index.build_index`.
        k1, b: what the index must have been built with; None is anything.

    Raises:
        UserError: the folder is no such index, or has another k1 or b.
    """

    def __init__(self, folder: str | Path, k1: float | None = None, b: float | None = None):
        import bm25s

        folder = Path(folder)
        settings = read_header(folder).get("settings", {})
        for name, asked in (("k1", k1), ("b", b)):
            if asked not in (None, settings.get(name)):
                raise UserError(
                    f"{folder} has {name}={settings.get(name)}, not {asked}: build it with {name}={asked}"
                )
        self.documents = DocumentStore(folder)
        try:
            self._index = bm25s.BM25.load(folder / FOLDER, mmap=True, show_progress=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(folder, FOLDER) from error
        if self._index.scores["num_docs"] != len(self.documents):
            raise damaged(folder, FOLDER)

    def search(self, queries: Sequence[Query], k: int) -> list[Result]:
        """Return at most k documents for each query, in order."""
        check_k(k)
        asked = list(terms(query.text for query in queries))
        if len(asked) == 1:  # threads cost more than they bring
            return [self._result(asked[0], k)]
        with ThreadPoolExecutor(THREADS) as pool:  # numpy adds and selects outside the GIL
            return list(pool.map(self._result, asked, repeat(k)))

    def _result(self, query_terms: list[str], k: int) -> Result:
        term_ids = self._index.get_tokens_ids(query_terms)
        if not term_ids:
            return Result()
        scores = self._index.get_scores_from_ids(term_ids)
        rows = best_rows(scores, k)
        return Result(tuple(self.documents[row] for row in rows), tuple(scores[rows].tolist()))


def best_rows(scores: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k highest scores above 0, best first, equal scores by row."""
    least = np.partition(scores, -k)[-k] if k < len(scores) else 0.0
    rows = np.flatnonzero(scores >= least) if least > 0 else np.flatnonzero(scores)
    return rows[np.argsort(-scores[rows], kind="stable")][:k]
