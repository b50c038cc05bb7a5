"""Load cross-encoders of sentence-transformers and score pairs of a query and a document with them.

A cross-encoder reads both strings together, so its scores are better than the similarity of two vectors. It
needs a forward pass for each pair, so it can only rerank what another retriever has found.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlkit.encoding import encodable
from rlkit.errors import UserError, check_choice, first_line
from rlkit.logs import hide_weight_bars
from rlkit.models.bundled import encoder_path
from rlkit.retrieval.encoders import ENCODER_DTYPES

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder
    from torch import Tensor

MIN_DOCUMENT_SHARE = 0.25  # of the token limit; only a query that needs more than the others is truncated
HEAD = "ForSequenceClassification"


def load_cross_encoder(
    name: str,
    *,
    new_head: bool = False,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    max_seq_length: int | None = None,
) -> CrossEncoder:
    """Load a cross-encoder that gives a pair one score, by hub name, folder or `bundled:all-minilm-l6-v2`.

    Args:
        name: Name or path of the model.
        new_head: Whether a model without a head for scores gets one with random weights, to be trained.
        dtype: Dtype of the weights, as for `rlkit.retrieval.encoders.load_encoder`.
        revision: Branch, tag or commit on the hub; None for the main branch.
        trust_remote_code: Whether to run Python code that comes with the model.
        attn_implementation: Attention implementation of transformers; None for its default.
        max_seq_length: Maximum number of tokens of a pair; None for the model's own limit.

    Raises:
        UserError: sentence-transformers is not installed, the model cannot be loaded, it has another number
            of scores, or no head and `new_head` is false.
    """
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        raise UserError(
            "cross-encoders need sentence-transformers: pip install sentence-transformers"
        ) from None
    check_choice("dtype", dtype, ENCODER_DTYPES)
    hide_weight_bars()
    path = os.path.expanduser(encoder_path(name))
    if os.path.isdir(path):
        if revision not in (None, "main"):
            raise UserError(f"revision {revision!r} is one of the hub, but {name!r} is a folder; remove it")
        revision = None
    model_kwargs: dict[str, Any] = {"dtype": dtype}
    if attn_implementation:
        model_kwargs["attn_implementation"] = attn_implementation
    try:
        has_head = _has_head(path, revision, trust_remote_code)
        if not has_head and not new_head:
            raise UserError(
                f"{name!r} has no head for scores, so it would rank at random; train one with "
                "`rlkit rank --cross_encoder true`, or choose a cross-encoder"
            )
        model = CrossEncoder(
            path,
            num_labels=None if has_head else 1,
            revision=revision,
            trust_remote_code=trust_remote_code,
            model_kwargs=model_kwargs,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"the cross-encoder {name!r} cannot be loaded: {first_line(error)}") from error
    if model.num_labels != 1:
        raise UserError(
            f"{name!r} is a classifier with {model.num_labels} labels; a cross-encoder for ranking has 1"
        )
    if max_seq_length is not None:
        limit = model.max_seq_length
        if limit is not None and max_seq_length > limit:
            raise UserError(f"max_seq_length must be at most {limit} for {name!r}, not {max_seq_length}")
        model.max_seq_length = max_seq_length
    return model


def _has_head(path: str, revision: str | None, trust_remote_code: bool) -> bool:
    """Return whether a checkpoint was saved with a head for scores, or generates an answer to score."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    # A language model answers yes or no, and the difference of the two logits is the score.
    return any(name.endswith((HEAD, "ForCausalLM")) for name in config.architectures or [])


def pair_scores(model: CrossEncoder, pairs: Sequence[tuple[str, str]], batch_size: int) -> Tensor:
    """Return the logits of pairs of a query and a document, float32 of shape (pairs,), with a gradient.

    Of a pair that is too long, the document is truncated; the query only if it needs more than
    1 - `MIN_DOCUMENT_SHARE` of the tokens itself.

    Args:
        model: Cross-encoder with one score.
        pairs: Queries and documents, at least one pair.
        batch_size: Number of pairs per forward pass.
    """
    import torch

    # Pairs of similar length in one batch need less padding.
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    cut_queries: dict[str, str] = {}
    scores = []
    for start in range(0, len(order), batch_size):
        batch = []
        for i in order[start : start + batch_size]:
            query, document = pairs[i]
            if query not in cut_queries:
                cut_queries[query] = _first_tokens(model, encodable(query))
            batch.append([cut_queries[query], encodable(document)])
        features = model.preprocess(batch, processing_kwargs={"text": {"truncation": "only_second"}})
        features = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in features.items()}
        scores.append(model(features)["scores"].float().flatten())
    return torch.cat(scores)[torch.tensor(order).argsort().to(model.device)]


def _first_tokens(model: CrossEncoder, query: str) -> str:
    """Return a query, truncated if it leaves fewer than `MIN_DOCUMENT_SHARE` of the tokens to a document."""
    tokenizer, limit = model.tokenizer, model.max_seq_length
    if limit is None:
        return query
    budget = int((1 - MIN_DOCUMENT_SHARE) * limit) - tokenizer.num_special_tokens_to_add(pair=True)
    # A token has at least one character, so most queries need not be tokenized to be measured.
    if len(query) <= budget:
        return query
    tokens = tokenizer(
        query, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True
    )
    offsets = tokens["offset_mapping"]
    return query if len(offsets) <= budget else query[: offsets[max(budget, 1) - 1][1]]
