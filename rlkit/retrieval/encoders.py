"""Encoders of sentence-transformers: load one, and embed texts with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlkit.errors import UserError, first_line
from rlkit.logs import hide_weight_bars
from rlkit.models.bundled import encoder_path
from rlkit.retrieval.documents import EngineError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_encoder(name: str) -> SentenceTransformer:
    """Load an encoder by hub name, folder, or `bundled:all-minilm-l6-v2`.

    Raises:
        UserError: sentence-transformers is not installed, or there is no such encoder.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError("encoders need sentence-transformers: pip install sentence-transformers") from None
    hide_weight_bars()
    path = encoder_path(name)
    try:
        return SentenceTransformer(path)
    except (OSError, ValueError) as error:
        raise UserError(f"the encoder {name!r} cannot be loaded: {first_line(error)}") from error


def encode(method: Callable, texts: Sequence[str], prefix: str | None) -> np.ndarray:
    """Unit vectors of texts, (texts, dimensions) float32.

    Args:
        method: `encode_query` or `encode_document` of an encoder.
        texts: one or more.
        prefix: what stands before each text; None is what the encoder's own settings say.

    Raises:
        EngineError: the encoder gives values that are not finite.
    """
    texts = [text.encode("utf-8", "replace").decode() for text in texts]  # tokenizers refuse half characters
    vectors = method(texts, prompt=prefix, normalize_embeddings=True, show_progress_bar=False)
    if not np.isfinite(vectors).all():
        raise EngineError("the encoder gave values that are not finite")
    return np.asarray(vectors, np.float32)
