"""BM25 with bm25s: exact, sparse, memory-mapped, and fast enough on one core.

The score of a document d with |d| terms is a sum over the terms t of the query (Lucene's variant)::

    idf(t) * tf(t, d) / (tf(t, d) + k1 * (1 - b + b * |d| / mean |d|))
    idf(t) = ln(1 + (N - n(t) + 1/2) / (n(t) + 1/2))

where N is the number of documents and n(t) the number of those with t. Terms are the keywords of
`rlkit.words`: words, or bigrams of characters in scripts without spaces. Single letters and the stop words of
the index's language are removed, and a stemmer of that language reduces the others. The language "none" has
neither, and keeps single letters.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.errors import UserError, nearest
from rlkit.retrieval.documents import Query, Ranking, Result, check_k, full_text
from rlkit.retrieval.store import DocumentStore, Progress, damaged_index, read_header
from rlkit.words import keywords

logger = logging.getLogger(__name__)

FOLDER = "bm25"
ENGLISH, NO_LANGUAGE = "english", "none"
# Other names of the languages of Snowball's stemmers.
LANGUAGE_CODES = {
    **{"ar": "arabic", "hy": "armenian", "eu": "basque", "ca": "catalan", "cs": "czech", "da": "danish"},
    **{"nl": "dutch", "en": "english", "eo": "esperanto", "et": "estonian", "fi": "finnish", "fr": "french"},
    **{"de": "german", "el": "greek", "hi": "hindi", "hu": "hungarian", "id": "indonesian", "ga": "irish"},
    **{"it": "italian", "lt": "lithuanian", "ne": "nepali", "no": "norwegian", "nb": "norwegian"},
    **{"fa": "persian", "pl": "polish", "pt": "portuguese", "ro": "romanian", "ru": "russian"},
    **{"sr": "serbian", "st": "sesotho", "es": "spanish", "sv": "swedish", "ta": "tamil", "tr": "turkish"},
    **{"yi": "yiddish"},
}
# Names of bm25s' stop words that differ from that of the stemmer.
STOP_WORDS = {"english": "EN", "porter": "EN", "dutch_porter": "DUTCH"}
NUM_THREADS = min(8, os.cpu_count() or 1)
GROUP_SIZE = 128  # documents of a group in `best_rows`
SMALLEST_SCORE = np.finfo(np.float32).tiny
# With fewer documents, Python takes more time than NumPy, and threads would only wait for the GIL. The scores
# of a term in many documents are added as a dense vector, several times faster than one by one. The vectors
# are kept in memory, for which those of larger indexes are too long.
LARGE_INDEX = 1_000_000
MIN_DENSE_SHARE = 1 / 16
MAX_DENSE_BYTES = 256_000_000


def resolve_language(name: str) -> str:
    """Return the name of a stemmer by name or ISO 639 code, or "none"; raises UserError if there is none."""
    import Stemmer

    language = LANGUAGE_CODES.get(name.lower(), name.lower())
    languages = [*Stemmer.algorithms(), NO_LANGUAGE]
    if language not in languages:
        raise UserError(
            f"BM25 has no stemmer for the language {name!r}{nearest(language, languages)}; use "
            f"{NO_LANGUAGE!r} for a language without one"
        )
    return language


def terms(texts: Iterable[str], language: str = ENGLISH) -> Iterator[list[str]]:
    """Yield the list of terms of each string in a language (`resolve_language`)."""
    import Stemmer

    if language == NO_LANGUAGE:
        yield from map(keywords, texts)
        return
    stop_words = _stop_words(language)
    stemmer = Stemmer.Stemmer(language)  # created per call, since a stemmer is not thread-safe
    for text in texts:
        yield stemmer.stemWords([word for word in keywords(text, 2) if word not in stop_words])


@cache
def _stop_words(language: str) -> frozenset[str]:
    """Return bm25s' stop words of a language; empty if it has none."""
    from bm25s import stopwords

    name = f"STOPWORDS_{STOP_WORDS.get(language, language.upper())}"
    # In the form of the terms. Those that consist of several words, such as elisions, are not terms.
    forms = (keywords(word) for word in getattr(stopwords, name, ()))
    return frozenset(form[0] for form in forms if len(form) == 1)


def build(
    folder: Path, progress: Progress, k1: float = 0.9, b: float = 0.4, language: str = ENGLISH
) -> dict[str, Any]:
    """Index the documents of a folder and return the settings.

    Args:
        folder: Folder with documents (`rlkit.retrieval.store.write_documents`).
        progress: Progress bar.
        k1: Saturation of repeated terms, at least 0.
        b: Length normalization, from 0 (none) to 1.
        language: Language of the stemmer and of the stop words, by name or ISO 639 code. "none" uses neither,
            and indexes single letters, too.

    Raises:
        UserError: `k1` or `b` is out of range, there is no such language, or no document has a term.
    """
    import bm25s

    if not (0 <= k1 < np.inf and 0 <= b <= 1):
        raise UserError(f"k1={k1} or b={b} is out of range: k1 must be 0 or more, b from 0 to 1")
    language = resolve_language(language)
    if language != NO_LANGUAGE and not _stop_words(language):
        logger.info("bm25s has no stop words of the language %s: all words are indexed", language)
    store = DocumentStore(folder)
    vocabulary: dict[str, int] = {}
    texts = (full_text(document) for document in progress(store, "words", len(store)))
    term_ids = []
    for document_terms in terms(texts, language):
        term_ids.append([vocabulary.setdefault(term, len(vocabulary)) for term in document_terms])
    if not vocabulary:
        required = "a word of at least two characters that is not a stop word"
        if language == NO_LANGUAGE:
            required = "a letter or a digit"
        raise UserError(f"no document contains a term that BM25 can index: {required}")
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    # By default, bm25s adds an empty term to the vocabulary.
    index.index((term_ids, vocabulary), create_empty_token=False, show_progress=False)
    index.save(folder / FOLDER, show_progress=False)
    return {"k1": k1, "b": b, "language": language}


class BM25:
    """BM25 over an index folder.

    Documents without any term of the query are never returned, so a result may have fewer than k documents.
    Documents with equal scores keep the order of the index.

    Attributes:
        documents: The indexed documents.
        language: Language of the terms.
        chunk_size: Number of queries that a server passes to `search` at once. A query takes as long alone as
            with others, so chunks may be small, and short requests need not wait for long ones.

    Args:
        folder: Folder made by `rlkit.retrieval.engines.index.build_index`.
        k1: Value that the index must have been built with; None accepts any.
        b: Value that the index must have been built with; None accepts any.

    Raises:
        UserError: The folder is not a BM25 index, or was built with another `k1` or `b`.
    """

    chunk_size = 16

    def __init__(self, folder: str | Path, k1: float | None = None, b: float | None = None):
        import bm25s

        folder = Path(folder)
        settings = read_header(folder).get("settings", {})
        for name, required in (("k1", k1), ("b", b)):
            actual = settings.get(name)
            if required is not None and required != actual:
                raise UserError(
                    f"{folder} has {name}={actual}, not {required}: rebuild it with {name}={required}"
                )
        # Indexes of older versions of rlkit are all English.
        self.language: str = settings.get("language", ENGLISH)
        self.documents = DocumentStore(folder)
        try:
            self._index = bm25s.BM25.load(folder / FOLDER, mmap=True, show_progress=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged_index(folder, FOLDER) from error
        # Documents and scores of different builds would silently return wrong documents.
        if self._index.scores["num_docs"] != len(self.documents):
            raise damaged_index(folder, FOLDER)
        # Views of the base class: slicing a memmap is slow.
        arrays = {name: np.asarray(self._index.scores[name]) for name in ("indptr", "indices", "data")}
        self._starts, self._rows, self._term_scores = arrays["indptr"], arrays["indices"], arrays["data"]
        max_vectors = MAX_DENSE_BYTES // (4 * len(self.documents))
        self._dense_scores = lru_cache(max_vectors)(self._compute_dense_scores)

    def search(self, queries: Sequence[Query], k: int) -> list[Result]:
        """Return at most `k` documents for each query, in the order of the queries."""
        return [self.documents.result(*hits) for hits in self._search_rows(queries, k)]

    def search_ids(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """Return the ids and the scores that `search` finds, without reading the documents."""
        return [self.documents.ranking(*hits) for hits in self._search_rows(queries, k)]

    def _search_rows(self, queries: Sequence[Query], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the rows and the scores of the best documents of each query."""
        check_k(k)
        query_terms = list(terms((query.text for query in queries), self.language))
        # The threads of a server search in parallel already: a chunk of theirs needs no threads of its own.
        if len(query_terms) <= self.chunk_size or len(self.documents) < LARGE_INDEX:
            return [self._search_terms(query, k) for query in query_terms]
        with ThreadPoolExecutor(NUM_THREADS) as pool:  # NumPy releases the GIL while it adds and selects
            return list(pool.map(self._search_terms, query_terms, repeat(k)))

    def _search_terms(self, query_terms: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        term_ids = self._index.get_tokens_ids(query_terms)
        if not term_ids:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        scores = self._scores(term_ids)
        rows = best_rows(scores, k)
        return rows, scores[rows]

    def _scores(self, term_ids: list[int]) -> np.ndarray:
        """Return the score of every document, equal to those of `bm25s.BM25.get_scores_from_ids`."""
        num_documents = len(self.documents)
        min_dense = MIN_DENSE_SHARE * num_documents if num_documents < LARGE_INDEX else np.inf
        scores = np.zeros(num_documents, np.float32)
        for term_id in term_ids:
            rows, term_scores = self._postings(term_id)
            if len(rows) < min_dense:
                np.add.at(scores, rows, term_scores)
            else:
                scores += self._dense_scores(term_id)
        return scores

    def _postings(self, term_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of the documents that contain a term, and its score in each of them."""
        postings = slice(self._starts[term_id], self._starts[term_id + 1])
        return self._rows[postings], self._term_scores[postings]

    def _compute_dense_scores(self, term_id: int) -> np.ndarray:
        rows, term_scores = self._postings(term_id)
        scores = np.zeros(len(self.documents), np.float32)
        scores[rows] = term_scores
        return scores


def best_rows(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the rows of the `k` highest scores above 0, best first, ties in order of the rows."""
    # Scores have many ties, with which np.partition over all documents takes longer than the scoring. The
    # k-th highest maximum of groups of documents is a lower bound of the k-th score, and few groups reach it.
    num_groups = max(len(scores) // GROUP_SIZE, 4 * k)
    group_size = len(scores) // num_groups
    if group_size < 2:
        rows = np.flatnonzero(scores)
        return rows[np.argsort(-scores[rows], kind="stable")][:k]
    # A group is a column: NumPy computes the maxima of all columns with vector instructions.
    num_grouped = num_groups * group_size
    grid = scores[:num_grouped].reshape(group_size, num_groups)
    maxima = grid.max(axis=0)
    bound = max(np.sort(maxima)[-k], SMALLEST_SCORE)
    groups = np.flatnonzero(maxima > bound)  # fewer than k
    grid_rows, grid_columns = np.nonzero(grid[:, groups] > bound)
    ungrouped = num_grouped + np.flatnonzero(scores[num_grouped:] > bound)
    rows = np.concatenate([grid_rows * num_groups + groups[grid_columns], ungrouped])
    # The ties at the bound are often many, and the first ones are enough.
    start, stop = 0, num_groups
    while len(rows) < k and start < len(scores):
        ties = start + np.flatnonzero(scores[start:stop] == bound)
        rows = np.concatenate([rows, ties[: k - len(rows)]])
        start, stop = stop, 4 * stop
    if len(rows) > 2 * k:
        # With a large k, the bound is low. To sort values is much faster than to sort positions stably.
        row_scores = scores[rows]
        kth_score = np.sort(row_scores)[-k]
        above, ties = rows[row_scores > kth_score], rows[row_scores == kth_score]
        rows = np.concatenate([above, ties[: k - len(above)]])
    return rows[np.argsort(-scores[rows], kind="stable")][:k]
