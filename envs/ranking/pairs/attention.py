"""B-PROP: sets of the words that an encoder attends to, as training rows that need no labels.

As in PROP (`rlkit.envs.ranking.pairs.words`), a row has a document as its `query` and two sets of its words
as `passages`, the more representative set first. The words of a set come from the encoder's attention (arXiv
2104.09791; the definitions are those of the official code)::

    a(w | d) = attention from [CLS] to w / (attention + 0.01), normalized over the words of d
    r(w)     = the same values, but normalized over the words of all documents
    c(w | d) = min(-a(w | d) log2 r(w), 100)
    p(w | d) = softmax of c / T, over the alphabetic words of d

The attention is that of the last layer, averaged over its heads, to the first word piece of a word, summed
over the occurrences of the word. The score of a set is the sum of c.

The values of c are small: with T = 1, as in the paper, p is all but uniform (`effective_support`). The code
also skips 80% of the documents with fewer than 200 word pieces; here, all are used.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from rlkit.encoding import encodable
from rlkit.envs.ranking.pairs.words import word_set_rows
from rlkit.errors import UserError, check_integer
from rlkit.retrieval.documents import Document, passage_text
from rlkit.retrieval.encoders import load_encoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from rlkit.envs.ranking.pairs.rows import PairRow

SATURATION = 0.01
MAX_CONTRAST = 100.0
MIN_WORDS = 10  # alphabetic words of a document; one with fewer has no rows


def bprop(
    documents: Sequence[Document],
    contrasts: Sequence[Mapping[str, float]],
    *,
    per_document: int = 4,
    seed: int = 0,
    temperature: float = 1.0,
) -> Iterator[PairRow]:
    """Yield up to `per_document` pairs of word sets for each document.

    A pair whose sets have equal scores is drawn again. The words of a set are distinct, unless the document
    has too few.

    Args:
        documents: Documents of the corpus.
        contrasts: Contrast of each word of each document, from `word_contrasts`.
        per_document: Number of pairs per document.
        seed: Random seed.
        temperature: Temperature T of the softmax; lower ones prefer the words with a high contrast.

    Raises:
        UserError: An argument is invalid.
    """
    check_integer("per_document", per_document, 1)
    _check_temperature(temperature)
    for document, values in zip(documents, contrasts, strict=True):
        if len(values) >= MIN_WORDS:
            draw = partial(_draw, values, temperature)
            yield from word_set_rows("bprop", document, draw, values, per_document=per_document, seed=seed)


def word_contrasts(documents: Sequence[Document], encoder: str) -> list[dict[str, float]]:
    """Return the contrast c(w | d) of each alphabetic word of each document.

    Args:
        documents: Documents of the corpus.
        encoder: Name or path of the encoder (`rlkit.retrieval.encoders.load_encoder`).

    Raises:
        UserError: The encoder cannot be loaded, or has no attention to its words.
    """
    model = load_encoder(encoder, attn_implementation="eager")
    if not model.tokenizer.is_fast:
        raise UserError(f"{encoder!r} has a slow tokenizer, which does not say where words are; use another")
    attentions = [saturate(word_attentions(model, passage_text(document))) for document in documents]
    background = background_distribution(attentions)
    return [contrast(of_document, background) for of_document in attentions]


def word_attentions(encoder: SentenceTransformer, text: str) -> dict[str, float]:
    """Return the attention from the first token of a string to each of its words, lowercased.

    Words are those of the tokenizer, including punctuation. What exceeds the encoder's limit is ignored.
    """
    import torch

    text = encodable(text)
    options = {"truncation": True, "max_length": encoder.max_seq_length, "return_tensors": "pt"}
    tokens = encoder.tokenizer(text, **options)
    transformer = encoder.transformers_model
    assert transformer is not None  # `load_encoder` refuses encoders without attention
    with torch.no_grad():
        output = transformer(**tokens.to(encoder.device), output_attentions=True)
    weights = output.attentions[-1][0, :, 0].mean(0).tolist()  # (heads, tokens) to (tokens,)
    words: defaultdict[str, float] = defaultdict(float)
    previous = None
    for index, weight in zip(tokens.word_ids(), weights, strict=True):
        if index is not None and index != previous:  # the first piece of a word
            span = tokens.word_to_chars(index)
            words[text[span.start : span.end].lower()] += weight
        previous = index
    return dict(words)


def saturate(attentions: Mapping[str, float]) -> dict[str, float]:
    """Return a / (a + 0.01) for each word, so that frequent words do not dominate."""
    return {word: attention / (attention + SATURATION) for word, attention in attentions.items()}


def background_distribution(attentions: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return r(w), the share of each word in the saturated attentions of all documents."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for of_document in attentions:
        for word, attention in of_document.items():
            values[word].append(attention)
    # fsum is exact, so the order of the documents changes nothing.
    sums = {word: math.fsum(of_word) for word, of_word in values.items()}
    total = math.fsum(sums.values())
    return {word: value / total for word, value in sums.items()}


def contrast(attentions: Mapping[str, float], background: Mapping[str, float]) -> dict[str, float]:
    """Return c(w | d) of the alphabetic words of one document, in alphabetical order.

    Args:
        attentions: Saturated attention to each word of the document.
        background: Share of each word in all documents, r(w).
    """
    total = math.fsum(attentions.values())
    return {
        word: min(-attention / total * math.log2(background[word]), MAX_CONTRAST)
        for word, attention in sorted(attentions.items())
        if word.isalpha() and attention > 0
    }


def word_probabilities(contrasts: Mapping[str, float], temperature: float) -> dict[str, float]:
    """Return the softmax of contrasts / temperature."""
    highest = max(contrasts.values())
    weights = {word: math.exp((value - highest) / temperature) for word, value in contrasts.items()}
    total = sum(weights.values())
    return {word: weight / total for word, weight in weights.items()}


def _draw(contrasts: Mapping[str, float], temperature: float, rng: random.Random, length: int) -> list[str]:
    """Return `length` words drawn without replacement, or with it if the document has no more words."""
    if length >= len(contrasts):
        probabilities = word_probabilities(contrasts, temperature)
        return rng.choices(list(probabilities), list(probabilities.values()), k=length)
    # The largest sums of a logit and Gumbel noise are a draw from the softmax without replacement.
    noisy = {word: value / temperature - math.log(rng.expovariate(1)) for word, value in contrasts.items()}
    return heapq.nlargest(length, noisy, key=noisy.__getitem__)


def effective_support(contrasts: Sequence[Mapping[str, float]], temperature: float = 1.0) -> float:
    """Return exp(entropy of p) / number of words, the mean over documents: 1 if p is uniform.

    Args:
        contrasts: Contrast of each word of each document, from `word_contrasts`. Documents with fewer than
            `MIN_WORDS` words do not count.
        temperature: Temperature T of the softmax.

    Raises:
        UserError: The temperature is not above 0, or no document has enough words.
    """
    _check_temperature(temperature)
    supports = []
    for values in contrasts:
        if len(values) >= MIN_WORDS:
            probabilities = word_probabilities(values, temperature).values()
            entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
            supports.append(math.exp(entropy) / len(values))
    if not supports:
        raise UserError(f"no document has {MIN_WORDS} alphabetic words")
    return sum(supports) / len(supports)


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature must be a number above 0, not {temperature}")
