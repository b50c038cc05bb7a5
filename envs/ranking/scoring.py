"""Scorers of how well documents fit a description: BM25, or the similarity of an encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from rlkit.retrieval.encoders import encode, is_dot_product, load_encoder
from rlkit.retrieval.engines.bm25 import terms

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Scorer = Callable[[str, Sequence[str]], Sequence[float]]  # (description, texts) -> one score per text


def open_scorer(name: str) -> Scorer:
    """Return the scorer "bm25" or "dense:MODEL"; raises UserError if the model cannot be loaded."""
    if name == "bm25":
        return bm25_scores
    return partial(encoder_scores, load_encoder(name.removeprefix("dense:")))


def bm25_scores(description: str, texts: Sequence[str]) -> Sequence[float]:
    """Return BM25 scores with the texts as the corpus; 0 if there is no word in common.

    Document frequencies come from these texts alone, so words that are rare among them have the most weight.
    """
    import bm25s

    description_terms, *text_terms = terms([description, *texts])
    vocabulary: dict[str, int] = {}
    ids = [[vocabulary.setdefault(term, len(vocabulary)) for term in doc_terms] for doc_terms in text_terms]
    query_ids = [vocabulary[term] for term in description_terms if term in vocabulary]
    if not query_ids:
        return [0.0] * len(texts)
    index = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    index.index((ids, vocabulary), create_empty_token=False, show_progress=False)
    return index.get_scores_from_ids(query_ids).tolist()


def encoder_scores(encoder: SentenceTransformer, description: str, texts: Sequence[str]) -> Sequence[float]:
    """Return the similarity of each text to the description, which is encoded as a query.

    It is the dot product for encoders that are trained for it, and otherwise the cosine.
    """
    normalize = not is_dot_product(encoder)
    query = encode(encoder.encode_query, [description], None, normalize)
    return np.ravel(encode(encoder.encode_document, list(texts), None, normalize) @ query.T).tolist()
