"""Log-probabilities of completions that share prompts, with each prompt computed once.

GRPO scores G completions of one prompt. TRL runs prompt and completion through the model for each of them.
Here every distinct prompt and every completion stands once in one long row without padding, which goes
through the model in a single forward; only attention knows about groups: a prompt attends to itself, a
completion to its prompt and to itself. The result is the same up to floating-point order. Since it is one
forward without a cache, it works under DDP, FSDP and DeepSpeed, with LoRA and with gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlkit.models.attention import MATMUL_KEYS, grouped_attention
from rlkit.rollouts.local.generate import position_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What changes attention in ways that are not known here, by the names under which models pass it.
UNKNOWN_TO_ATTENTION = ("sliding_window", "softcap", "s_aux", "position_bias")


class Layout(NamedTuple):
    """Where the tokens of one long row belong: first U prompts without their last token, then B completions.

    Attributes:
        prompts: Flat indices into a (U, P) table, padded on the right, of the prompts' tokens in order.
        completions: Flat indices into a (B, T) table of what predicts each completion token: the prompt's
            last token, then the completion up to its last but one.
        prompt_of: (B,) the prompt of each completion.
        mask: (B, 1, T, P+T) what a completion attends to.
        causal: Whether to attend from prompt and completion together, without a mask.
    """

    prompts: torch.Tensor
    completions: torch.Tensor
    prompt_of: torch.Tensor
    mask: torch.Tensor
    causal: bool


def supports_shared_prefix(model: PreTrainedModel) -> str | None:
    """Return why a model's prompts cannot be shared, or None: attention must be plain and replaceable."""
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa" or not getattr(model, "_supports_attention_backend", False):
        return f"its attention is not sdpa but {config._attn_implementation}"
    # A recurrent state runs through the row: a completion would continue where the one before it ended.
    if getattr(model, "_is_stateful", False):
        return "it has recurrent layers"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return "it has layers that do not attend to the whole prompt"
    return None


def add_shared_prefix() -> None:
    """Let models with the attention 'sdpa' understand a `Layout`; without one nothing changes."""
    before = AttentionInterface()["sdpa"]
    if before is not _sdpa:  # called once for each trainer, it must not wrap itself
        _plain["sdpa"] = before
        AttentionInterface.register("sdpa", _sdpa)


# The attention that was registered before, as on a CPU `rlkit.models.cpu` does.
_plain: dict[str, Callable[..., Any]] = {"sdpa": sdpa_attention_forward}


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    # transformers hands keywords of the model's forward down to its attention, this one too.
    layout = kwargs.pop("layout", None)
    if layout is None:
        return _plain["sdpa"](module, query, key, value, attention_mask, **kwargs)
    for name in UNKNOWN_TO_ATTENTION:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attention with {name} and a shared prefix: set shared_prefix: false")
    options = {"scale": kwargs.get("scaling"), "dropout_p": kwargs.get("dropout", 0.0)}
    return attend(query, key, value, layout, **options), None


def completion_log_probs(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Score the last `completion_length` tokens (T) of each row.

    Args:
        model: A causal LM with TRL's fused head (`trl.trainer.utils.add_fused_lm_head`), which
            `supports_shared_prefix`.
        input_ids: (B, P+T), prompts padded on the left, completions on the right.
        attention_mask: (B, P+T).
        completion_length: Width T of the completions.

    Returns:
        Log-probabilities and, where the head gives them, entropies: (B, T), 0 where a token is masked.
    """
    start = input_ids.size(1) - completion_length
    # Rows whose prompts are equal, padding included, share one: the completions of a group do.
    prompts = torch.stack([input_ids[:, :start], attention_mask[:, :start]])
    (ids, mask), prompt_of = torch.unique(prompts, dim=1, return_inverse=True)
    # The last prompt token predicts the first completion token. It is repeated in front of each completion,
    # where the log-probability of that token is read off.
    ids, mask = ids[:, :-1], mask[:, :-1].bool()
    scored = attention_mask[:, start:].bool()
    row = torch.cat([ids[mask], input_ids[:, start - 1 : -1][scored]])
    # Positions continue from the prompt in each completion, wherever in the row it comes.
    positions = [position_ids(mask)[mask], position_ids(attention_mask)[:, start - 1 : -1][scored]]
    # -100 keeps the head, the largest matrix product of a small model, off the prompts.
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
    """Lay out prompts and completions.

    Args:
        mask: (U, P) the prompts' tokens, padded on the left.
        scored: (B, T) the completions' tokens, padded on the right.
        prompt_of: (B,) the prompt of each completion.
    """
    device, (_, T) = mask.device, scored.shape
    lengths = mask.sum(1)
    P = int(lengths.max()) if lengths.numel() else 0
    # On the right, so that causal attention among the prompts' tokens needs no mask for the padding.
    prompt_tokens = torch.arange(P, device=device) < lengths[:, None]
    prefix = prompt_tokens[prompt_of, None, :].expand(-1, T, -1)
    own = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    attends = torch.cat([prefix, own.expand(len(scored), -1, -1)], dim=2).unsqueeze(1)
    # Without a mask attention costs half. That pays where the prompt, computed again with each completion,
    # is the shorter part, and is right where no prompt is padded. A CPU has a faster way for short rows.
    short = device.type == "cpu" and P + T <= MATMUL_KEYS
    causal = T > P > 0 and bool(prompt_tokens.all()) and not short
    return Layout(_indices(prompt_tokens), _indices(scored), prompt_of, attends, causal)


def _indices(table: torch.Tensor) -> torch.Tensor:
    return table.flatten().nonzero().squeeze(1)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, **options: float | None
) -> torch.Tensor:
    """Attention of one long row.

    Args:
        query: (1, H, N, D).
        key: (1, K, N, D).
        value: (1, K, N, D).
        layout: Where the N tokens belong.
        options: `scale` and `dropout_p` of `rlkit.models.attention.grouped_attention`.

    Returns:
        (1, N, H, D), as transformers wants it.
    """
    B, _, T, S = layout.mask.shape
    first, P = len(layout.prompts), S - T
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, D)
    k_c, v_c = (_pad(x[first:], layout.completions, B, T) for x in (k, v))
    parts = []
    if P:
        U = int(layout.prompt_of.max()) + 1
        q_p, k_p, v_p = (_pad(x[:first], layout.prompts, U, P) for x in (q, k, v))
        out = grouped_attention(q_p, k_p, v_p, None, **options)  # type: ignore[arg-type]
        parts.append(_unpad(out, layout.prompts))
        # Each completion gets the keys and values of its prompt in front of its own.
        k_c = torch.cat([k_p.index_select(0, layout.prompt_of), k_c], dim=2)
        v_c = torch.cat([v_p.index_select(0, layout.prompt_of), v_c], dim=2)
    q_c = _pad(q[first:], layout.completions, B, T)
    if layout.causal:
        q_c = torch.cat([q_p.index_select(0, layout.prompt_of), q_c], dim=2)
    out = grouped_attention(q_c, k_c, v_c, None if layout.causal else layout.mask, **options)  # type: ignore[arg-type]
    return torch.cat([*parts, _unpad(out[:, :, -T:], layout.completions)])[None]


def _pad(x: torch.Tensor, indices: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """Bring tokens (n, H, D) to their places in a table: (rows, H, width, D), 0 elsewhere."""
    if len(x) < rows * width:
        x = x.new_zeros(rows * width, *x.shape[1:]).index_copy(0, indices, x)
    return x.reshape(rows, width, *x.shape[1:]).transpose(1, 2)


def _unpad(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Take the tokens (n, H, D) out of a table (rows, H, width, D)."""
    x = x.transpose(1, 2).flatten(0, 1)
    return x if len(x) == len(indices) else x.index_select(0, indices)
