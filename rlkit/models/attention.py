"""Attention with fewer key and value heads than query heads, by the fastest way the device has."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import dropout, scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

MATMUL_KEYS = 1024  # above it the probabilities, which are kept for the backward pass, outweigh the rest


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attend from query (B, H, T, D) to key and value (B, K, S, D), H a multiple of K; result (B, H, T, D).

    `mask` is boolean, (B, 1, T, S), with something to attend to in each row; None is causal, with T = S.
    """
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    if query.device.type == "cpu" and query.size(2) == 1:
        return _fold(query, key, value, mask, scale=scale, dropout_p=dropout_p)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.size(2) <= MATMUL_KEYS:
        return _by_matmul(query, key, value, mask, scale=scale, dropout_p=dropout_p)
    key, value = (repeat_kv(x, query.size(1) // key.size(1)) for x in (key, value))
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout_p
    )


def _by_matmul(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float | None,
    dropout_p: float,
) -> torch.Tensor:
    # torch's CPU kernel does not use the processor's bfloat16 instructions; two matrix products do.
    (B, H, T, D), (_, K, S, _) = query.shape, key.shape
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool).tril()
    # Not infinity: the rows of padding may have nothing to attend to, and must not become NaN.
    bias = query.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)
    query = (query * (D**-0.5 if scale is None else scale)).reshape(B, K, H // K * T, D)
    scores = (query @ key.transpose(2, 3)).view(B, H, T, S) + bias
    weights = dropout(scores.softmax(-1), dropout_p)
    return (weights.view(B, K, -1, S) @ value).view(B, H, T, D)


def _fold(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float | None,
    dropout_p: float,
) -> torch.Tensor:
    # To repeat keys and values for every query head of a group is a copy of the whole cache for each token.
    # Here the heads of a group stand after one another as further queries of one head, the same sum.
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
    """What models call for the attention 'sdpa' on a CPU; the result is (B, T, H, D)."""
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout}
    plain = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.size(1) == 1)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal  # an encoder's is not
    if not plain or not causal or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is None and query.size(2) != key.size(2):
        if query.size(2) > 1:
            return sdpa_attention_forward(module, query, key, value, None, dropout=dropout, scaling=scaling)
        attention_mask = query.new_ones(query.size(0), 1, 1, key.size(2), dtype=torch.bool)
    output = grouped_attention(query, key, value, attention_mask, **options)
    return output.transpose(1, 2).contiguous(), None
