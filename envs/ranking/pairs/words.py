"""PROP: two sets of words for a document, the likelier one first, as training rows that need no labels.

The words of both sets are drawn from the document's language model with Dirichlet smoothing (arXiv
2010.10137)::

    p(w | d) = (tf(w, d) + mu P_C(w)) / (|d| + mu),   P_C(w) = df(w) / sum of df,   mu = mean |d|

The set with the higher sum of ln p(w | d) is the better query for the document. A row has the document as its
`query`, and the two sets as `passages` with targets 1 and 0.

The definitions are those of the official code, with bm25s' longer list of English stop words. The code also
skips 80% of the documents with fewer than 100 word pieces; here, all are used.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from rlkit.envs.ranking.pairs.rows import PairRow
from rlkit.errors import UserError, check_integer
from rlkit.retrieval.documents import Document, passage_text

MIN_COUNT = 10  # occurrences in the corpus; fewer say little about a word's document frequency
VOCABULARY_SIZE = 500  # words that a set of one document is drawn from
NUM_ADDED = 100  # words beyond twice the document's own, if those are more than `VOCABULARY_SIZE`
SUBSAMPLING = 1e-4  # threshold of word2vec's subsampling of frequent words, as a share of all words
MEAN_LENGTH = 3  # of the Poisson distribution of the number of words of a set
MAX_DRAWS = 10  # of one row, until the two sets have different scores

_WORD = re.compile(r"[a-zA-Z]+")
# The Poisson distribution without 0; above 20 words, the probability is below 1e-10.
LENGTHS = range(1, 21)
LENGTH_WEIGHTS = [MEAN_LENGTH**length / math.factorial(length) for length in LENGTHS]


@dataclass(frozen=True)
class CorpusStatistics:
    """Statistics of the words of all documents.

    Attributes:
        background: P_C(w), by word in alphabetical order, of the words that are frequent enough.
        kept_shares: Share of a word's draws that word2vec's subsampling keeps, of the same words.
        mean_length: Mean number of words of a document, mu.
    """

    background: Mapping[str, float]
    kept_shares: Mapping[str, float]
    mean_length: float


def prop(
    documents: Sequence[Document], *, per_document: int = 4, seed: int = 0, min_count: int = MIN_COUNT
) -> Iterator[PairRow]:
    """Yield up to `per_document` pairs of word sets for each document.

    A pair whose sets are equally likely is drawn again. A document has no rows if none of its words is
    frequent enough, and fewer if its sets are equally likely `MAX_DRAWS` times in a row.

    Args:
        documents: Documents of the corpus.
        per_document: Number of pairs per document.
        seed: Random seed.
        min_count: Number of occurrences in the corpus from which a word can be in a set. 10 is the paper's.
            Corpora of a few dozen documents need a lower one.

    Raises:
        UserError: An argument is invalid, or no word occurs `min_count` times.
    """
    check_integer("per_document", per_document, 1)
    check_integer("min_count", min_count, 1)
    statistics = corpus_statistics(documents, min_count)
    for document in documents:
        rng = random.Random(f"{seed} prop {document.id} vocabulary")
        log_probs = _sampling_log_probs(document, statistics, rng)
        weights = [math.exp(value) * statistics.kept_shares[word] for word, value in log_probs.items()]
        draw = partial(_draw, list(log_probs), weights)
        if log_probs:
            yield from word_set_rows("prop", document, draw, log_probs, per_document=per_document, seed=seed)


def content_words(text: str) -> list[str]:
    """Return the runs of ASCII letters of a string, lowercased, without English stop words."""
    from bm25s.stopwords import STOPWORDS_EN_PLUS

    stop_words = set(STOPWORDS_EN_PLUS)
    return [word for word in _WORD.findall(text.lower()) if word not in stop_words]


def corpus_statistics(documents: Iterable[Document], min_count: int = MIN_COUNT) -> CorpusStatistics:
    """Return the statistics of the words of all documents; see `prop`.

    Raises:
        UserError: No word occurs `min_count` times.
    """
    counts: Counter[str] = Counter()
    document_frequencies: Counter[str] = Counter()
    num_documents = 0
    for document in documents:
        words = content_words(passage_text(document))
        counts.update(words)
        document_frequencies.update(set(words))
        num_documents += 1
    frequent = sorted(word for word, count in counts.items() if count >= min_count)
    if not frequent:
        raise UserError(
            f"no English word occurs {min_count} times in {num_documents} documents; set a lower min_count "
            "(--min_count)"
        )
    num_words, total = counts.total(), document_frequencies.total()
    return CorpusStatistics(
        {word: document_frequencies[word] / total for word in frequent},
        {word: kept_share(counts[word] / num_words) for word in frequent},
        num_words / num_documents,
    )


def kept_share(frequency: float) -> float:
    """Return the share of a word's draws that word2vec keeps: min(1, sqrt(t / f) + t / f).

    Args:
        frequency: Share f of the word among all words of the corpus.
    """
    ratio = SUBSAMPLING / frequency
    return min(1.0, math.sqrt(ratio) + ratio)


def likelihood(count: int, length: int, background: float, mean_length: float) -> float:
    """Return p(w | d) of a word that occurs `count` times among a document's `length` words."""
    return (count + mean_length * background) / (length + mean_length)


def _sampling_log_probs(
    document: Document, statistics: CorpusStatistics, rng: random.Random
) -> dict[str, float]:
    """Return ln p(w | d) of the words to draw from: the document's own, and a sample of others from P_C.

    Absent words have nearly the same probability in every document, so a sample of them suffices.
    """
    background = statistics.background
    counts = Counter(content_words(passage_text(document)))
    words = sorted(word for word in counts if word in background)
    if not words:
        return {}
    num_added = VOCABULARY_SIZE - len(words)
    if num_added <= 0:
        num_added = len(words) + NUM_ADDED
    words += rng.choices(list(background), list(background.values()), k=num_added)
    length, mean_length = counts.total(), statistics.mean_length
    probs = {word: likelihood(counts[word], length, background[word], mean_length) for word in words}
    return {word: math.log(prob) for word, prob in probs.items()}


def _draw(words: Sequence[str], weights: Sequence[float], rng: random.Random, length: int) -> list[str]:
    """Return `length` words drawn with replacement. Subsampling is a factor of the weights."""
    return rng.choices(words, weights, k=length)


def word_set_rows(
    source: str,
    document: Document,
    draw: Callable[[random.Random, int], Sequence[str]],
    scores: Mapping[str, float],
    *,
    per_document: int,
    seed: int,
) -> Iterator[PairRow]:
    """Yield pairs of word sets of one document, the set with the higher sum of scores first.

    Both sets of a pair have the same number of words.

    Args:
        source: Name of the generator.
        document: Document that the words belong to.
        draw: Function of a random number generator and a number of words that draws a set.
        scores: Score of each word.
        per_document: Number of pairs.
        seed: Random seed. A row depends on it, the source, the document's id and the number of the row.
    """
    text = passage_text(document)
    for number in range(per_document):
        rng = random.Random(f"{seed} {source} {document.id} {number}")
        for _ in range(MAX_DRAWS):
            (length,) = rng.choices(LENGTHS, LENGTH_WEIGHTS)
            first, second = draw(rng, length), draw(rng, length)
            # fsum is exact: the sums of the same words in another order are a tie.
            difference = math.fsum(scores[word] for word in first) - math.fsum(
                scores[word] for word in second
            )
            if difference:
                better, worse = (first, second) if difference > 0 else (second, first)
                sets, row_id = (" ".join(better), " ".join(worse)), f"{source}/{document.id}/{number}"
                yield PairRow(row_id, text, sets, (1.0, 0.0), source, document.id, passages_are_queries=True)
                break
