"""Load sentence-transformers encoders and embed text with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlkit.encoding import encodable
from rlkit.errors import UserError, first_line
from rlkit.logs import hide_weight_bars
from rlkit.models.bundled import encoder_path
from rlkit.retrieval.documents import EngineError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_encoder(name: str) -> SentenceTransformer:
    """Load an encoder by hub name, folder, or `bundled:all-minilm-l6-v2`.

    Raises:
        UserError: sentence-transformers is not installed, or the encoder cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError("encoders need sentence-transformers: pip install sentence-transformers") from None
    # transformers draws a progress bar for the weights of each model that it loads.
    hide_weight_bars()
    path = encoder_path(name)
    try:
        return SentenceTransformer(path)
    except (OSError, ValueError) as error:
        raise UserError(f"the encoder {name!r} cannot be loaded: {first_line(error)}") from error


def is_dot_product(encoder: SentenceTransformer) -> bool:
    """Return whether the encoder's own similarity is the dot product of vectors that have any length."""
    return encoder.similarity_fn_name == "dot"


def encode(method: Callable, texts: Sequence[str], prefix: str | None, normalize: bool = True) -> np.ndarray:
    """Embed strings as vectors, float32 of shape (texts, dimensions).

    Args:
        method: The encoder's bound method `encode_query` or `encode_document`.
        texts: Strings to embed, at least one.
        prefix: Prefix of each string; None uses the prompt in the encoder's own settings.
        normalize: Whether to scale the vectors to length 1, so that an inner product is a cosine. False for
            encoders with `is_dot_product`.

    Raises:
        EngineError: The encoder returned NaN or infinite values.
    """
    # Tokenizers raise on lone surrogates, which a policy can generate.
    texts = [encodable(text) for text in texts]
    vectors = method(texts, prompt=prefix, normalize_embeddings=normalize, show_progress_bar=False)
    if not np.isfinite(vectors).all():
        raise EngineError("the encoder returned NaN or infinite values")
    return np.asarray(vectors, np.float32)
