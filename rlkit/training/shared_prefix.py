"""Log-probabilities of completions that share prompts, with each prompt computed once.

GRPO scores G completions of one prompt. TRL runs prompt and completion through the model for each of them.
Here every distinct prompt and every completion stands once in one long row without padding, which goes
through the model in a single forward; only attention knows about groups: a prompt attends to itself, a
completion to its prompt and to itself. The result is the same up to floating-point order. Since it is one
forward without a cache, it works under DDP, FSDP and DeepSpeed, with LoRA and with gradient checkpointing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlkit.models.attention import MATMUL_KEYS, grouped_attention
from rlkit.rollouts.local.generate import position_ids

# What changes attention in ways that are not known here, by the names under which models pass it.
UNKNOWN_TO_ATTENTION = ("sliding_window", "softcap", "s_aux", "position_bias")


class Layout(NamedTuple):
    """Where the tokens of one long row belong: first U prompts without their last token, then B completions.

    Attributes:
        prompts: places in a (U, P) table, padded on the right, of the prompts' tokens in order.
        completions: places in a (B, T) table of what predicts each completion token: the prompt's last token,
            then the completion up to its last but one.
        prompt_of: (B,) the prompt of each completion.
        mask: (B, 1, T, P+T) what a completion attends to.
        causal: attend from prompt and completion together, without a mask, which costs half of what a mask
            costs where completions are the longer part. All prompts have the same length.
    """

    prompts: torch.Tensor
    completions: torch.Tensor
    prompt_of: torch.Tensor
    mask: torch.Tensor
    causal: bool


def supports_shared_prefix(model: Any) -> str | None:
    """Return why a model's prompts cannot be shared, or None: attention must be plain and replaceable."""
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa" or not getattr(model, "_supports_attention_backend", False):
        return f"its attention is not sdpa but {config._attn_implementation}"
    if getattr(model, "_is_stateful", False):
        return "it has recurrent layers"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return "it has layers that do not attend to the whole prompt"
    return None


def add_shared_prefix() -> None:
    """Let models with the attention 'sdpa' understand a `Layout`; without one nothing changes."""
    before = AttentionInterface()["sdpa"]
    if before is not _sdpa:
        _plain["sdpa"] = before
        AttentionInterface.register("sdpa", _sdpa)


_plain = {"sdpa": sdpa_attention_forward}


def _sdpa(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    layout = kwargs.pop("layout", None)
    if layout is None:
        return _plain["sdpa"](module, query, key, value, attention_mask, **kwargs)
    for name in UNKNOWN_TO_ATTENTION:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attention with {name} and a shared prefix: set shared_prefix: false")
    options = {"scale": kwargs.get("scaling"), "dropout_p": kwargs.get("dropout", 0.0)}
    return attend(query, key, value, layout, **options), None


def completion_log_probs(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Score the last `completion_length` tokens (T) of each row.

    Args:
        model: a causal LM with TRL's fused head (`trl.trainer.utils.add_fused_lm_head`), which
            `supports_shared_prefix`.
        input_ids: (B, P+T), prompts padded on the left, completions on the right.
        attention_mask: (B, P+T).

    Returns:
        Log-probabilities and, where the head gives them, entropies: (B, T), 0 where a token is masked.
    """
    start = input_ids.size(1) - completion_length
    prompts = torch.stack([input_ids[:, :start], attention_mask[:, :start]])
    (ids, mask), prompt_of = torch.unique(prompts, dim=1, return_inverse=True)
    ids, mask = ids[:, :-1], mask[:, :-1].bool()
    scored = attention_mask[:, start:].bool()
    row = torch.cat([ids[mask], input_ids[:, start - 1 : -1][scored]])
    positions = [position_ids(mask)[mask], position_ids(attention_mask)[:, start - 1 : -1][scored]]
    labels = torch.cat([torch.full_like(ids[mask], -100), input_ids[:, start:][scored]])
    output = model(
        input_ids=row[None],
        attention_mask=row.new_ones(1, 1, 1, 1),  # four dimensions: taken as it is, no mask is made from it
        position_ids=torch.cat(positions)[None],
        shift_labels=labels[None],
        layout=make_layout(mask, scored, prompt_of),
        fused_lm_head=True,
    )
    first = len(row) - int(scored.sum())
    zeros = torch.zeros_like(scored, dtype=output.log_probs.dtype)
    log_probs = zeros.masked_scatter(scored, output.log_probs[0, first:])
    if output.entropy is None:
        return log_probs, None
    return log_probs, zeros.masked_scatter(scored, output.entropy[0, first:])


def make_layout(mask: torch.Tensor, scored: torch.Tensor, prompt_of: torch.Tensor) -> Layout:
    """Lay out prompts (`mask`, (U, P), padded on the left) and completions (`scored`, (B, T))."""
    device, (_, T) = mask.device, scored.shape
    lengths = mask.sum(1)
    P = int(lengths.max()) if lengths.numel() else 0
    right = torch.arange(P, device=device) < lengths[:, None]
    own = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    prefix = right[prompt_of, None, :].expand(-1, T, -1)
    attends = torch.cat([prefix, own.expand(len(scored), -1, -1)], dim=2).unsqueeze(1)
    prompts, completions = (table.flatten().nonzero().squeeze(1) for table in (right, scored))
    short = device.type == "cpu" and P + T <= MATMUL_KEYS
    return Layout(prompts, completions, prompt_of, attends, T > P > 0 and bool(right.all()) and not short)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    **options: Any,
) -> torch.Tensor:
    """Attention of one long row: query (1, H, N, D), key and value (1, K, N, D), result (1, N, H, D)."""
    B, _, T, S = layout.mask.shape
    first, P = len(layout.prompts), S - T
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, D)
    k_c, v_c = (_pad(x[first:], layout.completions, B, T) for x in (k, v))
    parts = []
    if P:
        U = int(layout.prompt_of.max()) + 1
        q_p, k_p, v_p = (_pad(x[:first], layout.prompts, U, P) for x in (q, k, v))
        # Padding is on the right, where causal attention does not see it.
        out = grouped_attention(q_p, k_p, v_p, None, **options)
        parts.append(_unpad(out, layout.prompts))
        k_c, v_c = (
            torch.cat([p.index_select(0, layout.prompt_of), c], dim=2) for p, c in ((k_p, k_c), (v_p, v_c))
        )
    q_c = _pad(q[first:], layout.completions, B, T)
    if layout.causal:
        q_c = torch.cat([q_p.index_select(0, layout.prompt_of), q_c], dim=2)
    out = grouped_attention(q_c, k_c, v_c, None if layout.causal else layout.mask, **options)
    out = out[:, :, -T:]
    return torch.cat([*parts, _unpad(out, layout.completions)])[None]


def _pad(x: torch.Tensor, places: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """Bring tokens (n, H, D) to their places in a table: (rows, H, width, D), 0 elsewhere."""
    if len(x) < rows * width:
        x = x.new_zeros(rows * width, *x.shape[1:]).index_copy(0, places, x)
    return x.reshape(rows, width, *x.shape[1:]).transpose(1, 2)


def _unpad(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Take the tokens (n, H, D) out of a table (rows, H, width, D)."""
    x = x.transpose(1, 2).flatten(0, 1)
    return x if len(x) == len(places) else x.index_select(0, places)
