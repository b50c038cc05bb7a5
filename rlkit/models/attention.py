"""Grouped-query attention with the fastest kernel for the device: SDPA, or matrix products on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import dropout, scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

# Maximum number of keys for `_attend_by_matmul`. With more, the probabilities, which are saved for the
# backward pass, take more memory than all other activations.
MATMUL_KEYS = 1024


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Compute attention with H query heads and K key and value heads, H a multiple of K.

    Args:
        query: Queries (B, H, T, D).
        key: Keys (B, K, S, D).
        value: Values (B, K, S, D).
        mask: Boolean mask (B, 1, T, S), True where a query attends to a key; each query must attend to at
            least one. None is causal attention, for which T = S.
        scale: Factor of the scores, or None for 1 / sqrt(D).
        dropout_p: Dropout probability of the attention weights.

    Returns:
        Tensor (B, H, T, D).
    """
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    if query.device.type == "cpu" and query.size(2) == 1:
        return _attend_folded(query, key, value, mask, scale=scale, dropout_p=dropout_p)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.size(2) <= MATMUL_KEYS:
        return _attend_by_matmul(query, key, value, mask, scale=scale, dropout_p=dropout_p)
    key, value = (repeat_kv(x, query.size(1) // key.size(1)) for x in (key, value))
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout_p
    )


def _attend_by_matmul(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float | None,
    dropout_p: float,
) -> torch.Tensor:
    # torch's SDPA kernel does not use a CPU's bfloat16 instructions, but its matrix products do.
    (B, H, T, D), (_, K, S, _) = query.shape, key.shape
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool).tril()
    # Not -inf, with which a padding row that attends to nothing would become NaN.
    bias = query.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)
    query = (query * (D**-0.5 if scale is None else scale)).reshape(B, K, H // K * T, D)
    scores = (query @ key.transpose(2, 3)).view(B, H, T, S) + bias
    weights = dropout(scores.softmax(-1), dropout_p)
    return (weights.view(B, K, -1, S) @ value).view(B, H, T, D)


def _attend_folded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float | None,
    dropout_p: float,
) -> torch.Tensor:
    # For a single query (T = 1), repeating keys and values for each query head of a group would copy the KV
    # cache for every sampled token. Instead, the query heads of a group become queries of one head.
    B, H, _, D = query.shape
    groups = H // key.size(1)
    if mask is not None:
        mask = mask.repeat(1, 1, groups, 1)
    folded = query.reshape(B, H // groups, groups, D)
    attended = scaled_dot_product_attention(
        folded, key, value, attn_mask=mask, scale=scale, dropout_p=dropout_p
    )
    return attended.reshape(B, H, 1, D)


def cpu_attention(  # noqa: PLR0917
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers' interface "sdpa" on a CPU; returns (B, T, H, D) and no weights.

    Calls that `grouped_attention` does not support go to transformers' own function.
    """
    has_simple_mask = attention_mask is None or (
        attention_mask.dtype == torch.bool and attention_mask.size(1) == 1
    )
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)  # False in encoders
    if not has_simple_mask or not is_causal or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is None and query.size(2) != key.size(2):
        # With a KV cache the keys outnumber the queries. A single query attends to all of them.
        if query.size(2) > 1:
            return sdpa_attention_forward(module, query, key, value, None, dropout=dropout, scaling=scaling)
        attention_mask = query.new_ones(query.size(0), 1, 1, key.size(2), dtype=torch.bool)
    output = grouped_attention(query, key, value, attention_mask, scale=scaling, dropout_p=dropout)
    return output.transpose(1, 2).contiguous(), None
