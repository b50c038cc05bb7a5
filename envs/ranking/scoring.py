"""How well a few given texts fit a description: by their words (BM25), or by an encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from rlkit.retrieval.encoders import encode, load_encoder
from rlkit.retrieval.engines.bm25 import terms

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Fit = Callable[[str, Sequence[str]], Sequence[float]]


def open_scorer(name: str) -> Fit:
    """What scores texts for a description: "bm25", or "dense:MODEL"; raises UserError for no such model."""
    if name == "bm25":
        return by_words
    return partial(by_encoder, load_encoder(name.removeprefix("dense:")))


def by_words(description: str, texts: Sequence[str]) -> Sequence[float]:
    """BM25 over these texts alone: what is rare among them tells most. 0 where they share no word."""
    import bm25s

    asked, *found = terms([description, *texts])
    vocabulary: dict[str, int] = {}
    ids = [[vocabulary.setdefault(term, len(vocabulary)) for term in one] for one in found]
    known = [vocabulary[term] for term in asked if term in vocabulary]
    if not known:
        return [0.0] * len(texts)
    index = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    index.index((ids, vocabulary), create_empty_token=False, show_progress=False)
    return index.get_scores_from_ids(known).tolist()


def by_encoder(encoder: SentenceTransformer, description: str, texts: Sequence[str]) -> Sequence[float]:
    """Cosines of the description, as a query, and the texts."""
    query = encode(encoder.encode_query, [description], None)
    return np.ravel(encode(encoder.encode_document, list(texts), None) @ query.T).tolist()
