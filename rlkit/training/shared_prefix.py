"""Log-probabilities of completions that share prompts, with each prompt computed once.

GRPO scores G completions of each prompt. TRL runs prompt and completion through the model for each of them,
so it computes every prompt G times. Here every distinct prompt and every completion is part of one long row
without padding, which goes through the model in a single forward pass. Only attention distinguishes them: a
prompt attends to itself, a completion to its prompt and to itself. The result is the same up to the order of
floating-point sums. Since it is a single forward pass without a KV cache, it works with DDP, FSDP, DeepSpeed,
LoRA and gradient checkpointing.
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

# Arguments with which models change attention in ways that `attend` does not implement.
UNSUPPORTED_ARGUMENTS = ("sliding_window", "softcap", "s_aux", "position_bias")


class Layout(NamedTuple):
    """Layout of the tokens of the long row: U prompts without their last token, then B completions.

    Attributes:
        prompts: Indices of the prompts' tokens in a flattened (U, P) table that is padded on the right.
        completions: Indices in a flattened (B, T) table of the tokens that predict the completions: the
            prompt's last token, then the completion without its last token.
        prompt_of: Index of each completion's prompt, (B,).
        shape: Sizes (U, P, B, T) of the two tables.
        mask: Mask (B, 1, T, P+T) of the prompt and completion tokens that each completion token attends to,
            or None to compute attention of prompt and completion together, causally, without a mask.
    """

    prompts: torch.Tensor
    completions: torch.Tensor
    prompt_of: torch.Tensor
    shape: tuple[int, int, int, int]
    mask: torch.Tensor | None


def supports_shared_prefix(model: PreTrainedModel) -> str | None:
    """Return None if a model's prompts can be shared, else the reason why not.

    Every layer must use full attention through the interface "sdpa", which `add_shared_prefix` replaces.
    """
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa" or not getattr(model, "_supports_attention_backend", False):
        return f"its attention is not sdpa but {config._attn_implementation}"
    # A recurrent state runs along the row, so a completion would continue from the end of the previous one.
    if getattr(model, "_is_stateful", False):
        return "it has recurrent layers"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return "it has layers that do not attend to the whole prompt"
    return None


def add_shared_prefix() -> None:
    """Make the attention "sdpa" accept a `Layout`; calls without one behave as before."""
    registered = AttentionInterface()["sdpa"]
    if registered is not _sdpa:  # a second trainer in this process must not wrap the wrapper
        _original["sdpa"] = registered
        AttentionInterface.register("sdpa", _sdpa)


# The attention that `_sdpa` has replaced: transformers', or on a CPU that of `rlkit.models.cpu`.
_original: dict[str, Callable[..., Any]] = {"sdpa": sdpa_attention_forward}


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    # transformers passes extra arguments of the model's forward on to attention, so `layout` arrives here.
    layout = kwargs.pop("layout", None)
    if layout is None:
        return _original["sdpa"](module, query, key, value, attention_mask, **kwargs)
    for name in UNSUPPORTED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"shared_prefix does not support {name}; set shared_prefix: false")
    options = {"scale": kwargs.get("scaling"), "dropout_p": kwargs.get("dropout", 0.0)}
    return attend(query, key, value, layout, **options), None


def completion_log_probs(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the log-probabilities and entropies of the last `completion_length` tokens (T) of each row.

    Args:
        model: Causal LM with TRL's fused head (`trl.trainer.utils.add_fused_lm_head`) that
            `supports_shared_prefix`.
        input_ids: Token ids (B, P+T), prompts padded on the left, completions on the right.
        attention_mask: Mask (B, P+T), 0 for padding and for tokens that are not scored.
        completion_length: Width T of the completions.

    Returns:
        Log-probabilities (B, T) and entropies (B, T), 0 for masked tokens. The entropies are None if the head
        does not compute them.
    """
    start = input_ids.size(1) - completion_length
    # Adjacent rows with equal prompts, padding included, share one, as the completions of a group do. Not
    # torch.unique: on a GPU, one thread would compare all tokens of two rows, one after the other.
    prompts = torch.stack([input_ids[:, :start], attention_mask[:, :start]])
    is_new = torch.ones_like(input_ids[:, 0], dtype=torch.bool)
    is_new[1:] = (prompts[:, 1:] != prompts[:, :-1]).any(2).any(0)
    prompt_of = is_new.cumsum(0) - 1
    ids, mask = prompts[:, is_new]
    # The last prompt token predicts the first completion token. It moves from the prompt to the front of each
    # completion, so that all log-probabilities are read from the completions' part of the row.
    ids, mask = ids[:, :-1], mask[:, :-1].bool()
    scored = attention_mask[:, start:].bool()
    row = torch.cat([ids[mask], input_ids[:, start - 1 : -1][scored]])
    # The position ids of a completion continue from its prompt's, wherever in the row the completion is.
    positions = [position_ids(mask)[mask], position_ids(attention_mask)[:, start - 1 : -1][scored]]
    # The head skips tokens with the label -100. For a small model it is the largest matrix product.
    labels = torch.cat([torch.full_like(ids[mask], -100), input_ids[:, start:][scored]])
    layout = make_layout(mask, scored, prompt_of)
    output = model(
        input_ids=row[None],
        attention_mask=row.new_ones(1, 1, 1, 1),  # transformers builds no (N, N) mask if it gets a 4D one
        position_ids=torch.cat(positions)[None],
        shift_labels=labels[None],
        layout=layout,
        fused_lm_head=True,
    )
    first = len(layout.prompts)
    zeros = torch.zeros_like(scored, dtype=output.log_probs.dtype)
    log_probs = zeros.masked_scatter(scored, output.log_probs[0, first:])
    if output.entropy is None:
        return log_probs, None
    return log_probs, zeros.masked_scatter(scored, output.entropy[0, first:])


def make_layout(mask: torch.Tensor, scored: torch.Tensor, prompt_of: torch.Tensor) -> Layout:
    """Return the layout of prompts and completions in the long row.

    Args:
        mask: Mask (U, P) of the prompts' tokens, padded on the left.
        scored: Mask (B, T) of the completions' tokens, padded on the right.
        prompt_of: Index of each completion's prompt, (B,).
    """
    device, (U, _), (B, T) = mask.device, mask.shape, scored.shape
    lengths = mask.sum(1)
    P = int(lengths.max()) if lengths.numel() else 0
    # The (U, P) table is padded on the right: a prompt token then attends to no padding, because attention is
    # causal, and needs no mask.
    prompt_tokens = torch.arange(P, device=device) < lengths[:, None]
    layout = Layout(_indices(prompt_tokens), _indices(scored), prompt_of, (U, P, B, T), None)
    # Causal attention without a mask costs half of attention with one, but computes the prompt's rows again
    # for each completion. That pays if the prompt is shorter than the completion, and is correct if no prompt
    # is padded. For short rows a CPU has a faster kernel (`rlkit.models.attention`).
    has_short_rows = device.type == "cpu" and P + T <= MATMUL_KEYS
    if T > P and bool(prompt_tokens.all()) and not has_short_rows:
        return layout
    to_prompt = prompt_tokens[prompt_of, None, :].expand(-1, T, -1)
    to_completion = torch.ones(T, T, dtype=torch.bool, device=device).tril().expand(B, -1, -1)
    return layout._replace(mask=torch.cat([to_prompt, to_completion], dim=2).unsqueeze(1))


def _indices(table: torch.Tensor) -> torch.Tensor:
    return table.flatten().nonzero().squeeze(1)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, **options: float | None
) -> torch.Tensor:
    """Compute attention of the long row.

    Args:
        query: Queries (1, H, N, D) of the N tokens of the row.
        key: Keys (1, K, N, D), K key heads for H query heads.
        value: Values (1, K, N, D).
        layout: Layout of the row.
        options: Arguments `scale` and `dropout_p` of `rlkit.models.attention.grouped_attention`.

    Returns:
        Tensor (1, N, H, D), the order of dimensions that transformers expects.
    """
    U, P, B, T = layout.shape
    first = len(layout.prompts)
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        # Attention would cast them, too, but only after they have been copied. Norms leave them in float32.
        query, key, value = (x.to(torch.get_autocast_dtype(device_type)) for x in (query, key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, D)
    k_c, v_c = (_pad(x[first:], layout.completions, B, T) for x in (k, v))
    parts = []
    if P:
        q_p, k_p, v_p = (_pad(x[:first], layout.prompts, U, P) for x in (q, k, v))
        out = grouped_attention(q_p, k_p, v_p, None, **options)  # type: ignore[arg-type]
        parts.append(_unpad(out, layout.prompts))
        # Each completion attends to the keys and values of its prompt, then to its own.
        k_c = torch.cat([k_p.index_select(0, layout.prompt_of), k_c], dim=2)
        v_c = torch.cat([v_p.index_select(0, layout.prompt_of), v_c], dim=2)
    q_c = _pad(q[first:], layout.completions, B, T)
    if layout.mask is None and P:
        q_c = torch.cat([q_p.index_select(0, layout.prompt_of), q_c], dim=2)
    out = grouped_attention(q_c, k_c, v_c, layout.mask, **options)  # type: ignore[arg-type]
    return torch.cat([*parts, _unpad(out[:, :, -T:], layout.completions)])[None]


def _pad(x: torch.Tensor, indices: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """Scatter tokens (n, H, D) to their indices in a table (rows, H, width, D), 0 elsewhere."""
    if len(x) < rows * width:
        x = x.new_zeros(rows * width, *x.shape[1:]).index_copy(0, indices, x)
    return x.reshape(rows, width, *x.shape[1:]).transpose(1, 2)


def _unpad(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Gather the tokens (n, H, D) at their indices from a table (rows, H, width, D)."""
    x = x.transpose(1, 2).flatten(0, 1)
    return x if len(x) == len(indices) else x.index_select(0, indices)
