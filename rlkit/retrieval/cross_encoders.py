"""Load cross-encoders of sentence-transformers and score pairs of a query and a document with them.

A cross-encoder reads both strings together, so its scores are better than the similarity of two vectors. It
needs a forward pass for each pair, so it can only rerank what another retriever has found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.encoding import encodable
from rlkit.errors import UserError, check_choice, first_line
from rlkit.logs import hide_weight_bars
from rlkit.retrieval.encoders import (
    ENCODER_DTYPES,
    cast_modules,
    first_tokens,
    keep_positions,
    locate_model,
    num_positions,
    num_tokens,
)

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder
    from torch import Tensor

MIN_DOCUMENT_SHARE = 0.25  # of a pair's tokens; only a query that needs more than the others is truncated
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
    path, revision = locate_model(name, revision)
    model_kwargs: dict[str, Any] = {"dtype": dtype}
    if attn_implementation:
        model_kwargs["attn_implementation"] = attn_implementation
    try:
        has_head = _has_head(path, revision, trust_remote_code)
        if not has_head and not new_head:
            raise UserError(
                f"{name!r} has no trained classification head, so it would rank at random; use a "
                "cross-encoder, or train one with `rlkit rank --cross_encoder true`"
            )
        model = CrossEncoder(
            path,
            num_labels=None if has_head else 1,
            revision=revision,
            trust_remote_code=trust_remote_code,
            model_kwargs=model_kwargs,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # RuntimeError: shapes
        raise UserError(f"the cross-encoder {name!r} cannot be loaded: {first_line(error)}") from error
    if model.num_labels != 1:
        raise UserError(
            f"{name!r} is a classifier with {model.num_labels} labels; a cross-encoder for ranking has 1"
        )
    cast_modules(model, dtype)
    keep_positions(model)
    try:
        num_fixed = _num_fixed_tokens(model)
    except ValueError as error:  # a chat template without the roles of a pair
        raise UserError(f"the cross-encoder {name!r} cannot read a pair: {first_line(error)}") from error
    if max_seq_length is not None:
        _limit_tokens(model, name, max_seq_length, num_fixed)
    return model


def _limit_tokens(model: CrossEncoder, name: str, max_seq_length: int, num_fixed: int) -> None:
    """Set the token limit of pairs; raise UserError if the model cannot read as many, or no pair has room."""
    assert model.transformers_model is not None
    limit = num_positions(model.transformers_model)
    if limit is not None and max_seq_length > limit:
        raise UserError(
            f"max_seq_length must be at most {limit} for {name!r}, the number of its positions, "
            f"not {max_seq_length}"
        )
    if max_seq_length < num_fixed + 2:
        raise UserError(
            f"max_seq_length must be at least {num_fixed + 2} for {name!r}, which puts {num_fixed} tokens "
            f"around each pair, not {max_seq_length}"
        )
    model.max_seq_length = max_seq_length


def _has_head(path: str, revision: str | None, trust_remote_code: bool) -> bool:
    """Return whether a checkpoint has the weights of a head for scores, or generates an answer to score."""
    from sentence_transformers.util import load_file_path
    from transformers import AutoConfig

    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    settings = load_file_path(path, "config_sentence_transformers.json", revision=revision)
    saved = {} if settings is None else json.loads(Path(settings).read_text(encoding="utf-8"))
    is_cross_encoder = saved.get("model_type") == "CrossEncoder"
    if is_cross_encoder and load_file_path(path, "config.json", revision=revision) is None:
        return True  # all of it is in modules of its own
    architectures = AutoConfig.from_pretrained(path, **options).architectures or []
    if any(name.endswith(HEAD) for name in architectures):
        return _has_all_weights(path, options)
    # A language model answers yes or no, and the difference of the two logits is the score. An encoder of
    # sentence-transformers that was made of one has not learned to answer.
    is_language_model = settings is None and any(name.endswith("ForCausalLM") for name in architectures)
    return is_cross_encoder or is_language_model


def _has_all_weights(path: str, options: Mapping[str, Any]) -> bool:
    """Return whether the files of a classifier hold all its weights. Missing ones would be random."""
    from transformers import AutoModelForSequenceClassification

    # The weights of the meta device take neither time nor memory.
    _, info = AutoModelForSequenceClassification.from_pretrained(
        path, device_map="meta", ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    return not info["missing_keys"] and not info["mismatched_keys"]


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
    cutter, scores = _Cutter(model), []
    for start in range(0, len(order), batch_size):
        batch = [cutter.cut(*pairs[i]) for i in order[start : start + batch_size]]
        features = model.preprocess(batch, prompt=_prompt(model), processing_kwargs=cutter.processing_kwargs)
        features = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in features.items()}
        scores.append(model(features)["scores"].float().flatten())
    return torch.cat(scores)[torch.tensor(order).argsort().to(model.device)]


class _Cutter:
    """Truncation of the queries and documents of a cross-encoder's pairs."""

    def __init__(self, model: CrossEncoder):
        self.tokenizer, limit = model.tokenizer, model.max_seq_length
        self.num_tokens = None if limit is None else limit - _num_fixed_tokens(model)
        # The tokenizer cannot truncate a document inside a chat, so its text is cut.
        self.is_chat = model.supports("message")
        self.processing_kwargs = None if self.is_chat else {"text": {"truncation": "only_second"}}
        self.queries: dict[str, tuple[str, int | None]] = {}  # with the number of tokens left for a document

    def cut(self, query: str, document: str) -> list[str]:
        """Return a pair that fits, apart from a document that the tokenizer truncates."""
        if query not in self.queries:
            self.queries[query] = self._cut_query(encodable(query))
        query, num_left = self.queries[query]
        document = encodable(document)
        if self.is_chat and num_left is not None:
            document = first_tokens(self.tokenizer, document, num_left)
        return [query, document]

    def _cut_query(self, query: str) -> tuple[str, int | None]:
        if self.num_tokens is None:
            return query, None
        query = first_tokens(self.tokenizer, query, max(int((1 - MIN_DOCUMENT_SHARE) * self.num_tokens), 1))
        return query, self.num_tokens - num_tokens(self.tokenizer, query)


def _prompt(model: CrossEncoder) -> str | None:
    """Return the model's own prompt, such as the instruction of a language model."""
    return model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None


def _num_fixed_tokens(model: CrossEncoder) -> int:
    """Return the number of tokens of a pair that are neither the query's nor the document's."""
    return model.preprocess([["", ""]], prompt=_prompt(model))["input_ids"].shape[-1]
