"""Log-probabilities of completions that share prompts, with each prompt computed once.

GRPO scores G completions of each prompt. TRL runs prompt and completion through the model for each of them,
so it computes every prompt G times. Here every distinct prompt and every completion is part of one long row
without padding, which goes through the model in a single forward pass. Only attention distinguishes them: a
prompt attends to itself, a completion to its prompt and to itself. The result is the same up to the order of
floating-point sums. Since it is a single forward pass without a KV cache, it works with DDP, FSDP, DeepSpeed,
LoRA and gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlkit.errors import UserError
from rlkit.models.attention import MATMUL_KEYS, grouped_attention
from rlkit.rollouts.local.generate import position_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import MoeModelOutputWithPast

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
        rollouts: Indices in the row of the tokens of all rollouts, each with its prompt, or None if no
            auxiliary loss is computed from them.
    """

    prompts: torch.Tensor
    completions: torch.Tensor
    prompt_of: torch.Tensor
    shape: tuple[int, int, int, int]
    mask: torch.Tensor | None
    rollouts: torch.Tensor | None = None


def supports_shared_prefix(model: PreTrainedModel) -> str | None:
    """Return None if a model's config allows its prompts to be shared, else the reason why not.

    Every layer must use full attention through the interface "sdpa", which `add_shared_prefix` replaces.
    `rlkit.training.prefix_check` then compares numbers.
    """
    config = model.config.get_text_config()
    # A recurrent state runs along the row, so a completion would continue from the end of the previous one.
    if getattr(model, "_is_stateful", False):
        return "it has recurrent layers"
    if config._attn_implementation != "sdpa":
        remedy = "set attn_implementation: sdpa" if model._supports_sdpa else "this model has no sdpa"
        return (
            f"only sdpa shares prompts, and attn_implementation is {config._attn_implementation} ({remedy})"
        )
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use transformers' attention interface"
    partial_layers = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
    if partial_layers:
        return f"it has layers that do not attend to the whole prompt ({', '.join(partial_layers)})"
    if getattr(config, "sliding_window", None):
        window = config.sliding_window
        return f"it has layers that do not attend to the whole prompt (a sliding window of {window} tokens)"
    return None


def needs_last_token(model: PreTrainedModel) -> bool:
    """Return whether the row must contain the last token of each completion, which predicts nothing.

    Rotary embeddings of type "dynamic" and "longrope" depend on the largest position of a forward pass. It
    must be the same as without a shared prefix.
    """
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    kinds = {each.get("rope_type") for each in [parameters, *by_layer_type]}
    return bool(kinds & {"dynamic", "longrope"})


def add_shared_prefix() -> None:
    """Make the attention "sdpa" accept a `Layout`; calls without one behave as before."""
    registered = AttentionInterface()["sdpa"]
    if registered is not _sdpa:  # a second trainer in this process must not wrap the wrapper
        _original["sdpa"] = registered
        AttentionInterface.register("sdpa", _sdpa)


# The attention that `_sdpa` has replaced: transformers', or on a CPU that of `rlkit.models.cpu`.
_original: dict[str, Callable[..., Any]] = {"sdpa": sdpa_attention_forward}


class AttentionRecord(NamedTuple):
    """The modules that compute attention through the interface, in the order of their first call.

    Attributes:
        has_layout: Whether each module always got a layout.
        faults: What a module does that the shared prefix does not support.
    """

    has_layout: dict[torch.nn.Module, bool]
    faults: dict[torch.nn.Module, str]


# Whether a forward pass with a shared prefix is running. Gradient checkpointing recomputes parts of it later,
# with the same arguments, so the recomputation needs no check of its own.
_in_long_row: ContextVar[bool] = ContextVar("in_long_row", default=False)
# What `recorded_attention` yields, and whether that forward pass has a shared prefix.
_recorded: list[tuple[AttentionRecord, bool]] = []


@contextmanager
def recorded_attention(*, shared: bool) -> Iterator[AttentionRecord]:
    """Yield a record of the attention in the block, in which unsupported attention does not raise.

    An exception in the middle of a forward pass would leave a sharded model unusable.

    Args:
        shared: Whether the forward pass in the block has a shared prefix.
    """
    record = AttentionRecord({}, {})
    _recorded.append((record, shared))
    try:
        yield record
    finally:
        _recorded.pop()


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
    if _recorded:
        record, shared = _recorded[-1]
        record.has_layout[module] = layout is not None and record.has_layout.get(module, True)
        if shared and layout is None:
            attention_mask = None  # the long row has a mask only for the sake of transformers
    elif layout is None and _in_long_row.get():
        # The check before training did not reach this branch of the model's code.
        raise UserError(
            f"{type(module).__name__} computes attention without the layout of the shared row: set "
            "shared_prefix: false"
        )
    if layout is None:
        return _original["sdpa"](module, query, key, value, attention_mask, **kwargs)
    fault = _unsupported(module, attention_mask, kwargs)
    if key.size(2) != query.size(2):
        fault = "attends to other keys than those of the row, which a shared prefix does not support"
    if fault is not None:
        if not _recorded:
            raise NotImplementedError(f"{type(module).__name__} {fault}; set shared_prefix: false")
        _recorded[-1][0].faults.setdefault(module, fault)
    options = {"scale": kwargs.get("scaling"), "dropout_p": kwargs.get("dropout", 0.0)}
    return attend(query, key, value, layout, **options), None


def _unsupported(
    module: torch.nn.Module, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> str | None:
    """Return what attention does that `attend` does not implement, or None."""
    for name in UNSUPPORTED_ARGUMENTS:
        if kwargs.get(name) is not None:
            return f"uses {name}, which a shared prefix does not support"
    # Any mask but the long row's own contains a bias or a window that the model has added.
    if attention_mask is not None and attention_mask.shape[:-1] != (1, 1, 1):
        return "changes the attention mask, which a shared prefix replaces"
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    return None if is_causal else "attends in both directions"


def expand_router_logits(model: PreTrainedModel) -> None:
    """Make a mixture of experts compute its auxiliary loss from all rollouts, each with its prompt.

    TRL's fused head computes the loss from the router logits of the backbone's output.
    """
    model.base_model.register_forward_hook(_expand_router_logits, with_kwargs=True)


def _expand_router_logits(
    backbone: torch.nn.Module, args: object, kwargs: dict[str, Any], output: MoeModelOutputWithPast
) -> None:
    layout = kwargs.get("layout")
    if layout is not None and layout.rollouts is not None and output.router_logits is not None:
        expanded: Any = tuple(x.index_select(0, layout.rollouts) for x in output.router_logits)
        output.router_logits = expanded


class Scores(NamedTuple):
    """Scores of the completions in a batch.

    Attributes:
        log_probs: Log-probabilities (B, T), 0 for masked tokens.
        entropies: Entropies (B, T), 0 for masked tokens, or None if the head does not compute them.
        aux_loss: Load-balancing loss of a mixture of experts, or None.
    """

    log_probs: torch.Tensor
    entropies: torch.Tensor | None
    aux_loss: torch.Tensor | None = None


def completion_log_probs(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_length: int,
    *,
    with_last_token: bool = False,
    compute_aux_loss: bool = False,
    masks_short_rows: bool = True,
) -> Scores:
    """Return the scores of the last `completion_length` tokens (T) of each row.

    Args:
        model: Causal LM with TRL's fused head (`trl.trainer.utils.add_fused_lm_head`) that
            `supports_shared_prefix`.
        input_ids: Token ids (B, P+T), prompts padded on the left, completions on the right.
        attention_mask: Mask (B, P+T), 0 for padding and for tokens that are not scored.
        completion_length: Width T of the completions.
        with_last_token: Whether the last token of each completion, which predicts nothing, is computed, too
            (see `needs_last_token`).
        compute_aux_loss: Whether to compute the auxiliary loss, which needs `with_last_token` and
            `expand_router_logits`.
        masks_short_rows: Whether short rows have an attention mask on a CPU (see `make_layout`).
    """
    row = _make_row(input_ids, attention_mask, completion_length, with_last_token, masks_short_rows)
    layout = row.layout
    options: dict[str, bool] = {}
    num_keys = 1
    if compute_aux_loss:
        rollouts = _rollout_indices(row)
        layout = layout._replace(rollouts=rollouts)
        num_keys = len(rollouts)
        options["output_router_logits"] = True
    token = _in_long_row.set(True)
    try:
        output = model(
            input_ids=row.ids[None],
            # transformers builds no (N, N) mask if it gets a 4D one. TRL takes it for the padding mask of the
            # router logits, of which there are as many as tokens in all rollouts.
            attention_mask=row.ids.new_ones(1, 1, 1, num_keys),
            position_ids=row.positions[None],
            shift_labels=row.labels[None],
            layout=layout,
            fused_lm_head=True,
            **options,
        )
    finally:
        _in_long_row.reset(token)
    scored = attention_mask[:, -completion_length:].bool()
    log_probs = _to_table(output.log_probs, row, scored)
    entropies = None if output.entropy is None else _to_table(output.entropy, row, scored)
    return Scores(log_probs, entropies, output.aux_loss if compute_aux_loss else None)


class _Row(NamedTuple):
    """The long row of N tokens.

    Attributes:
        ids: Token ids (N,).
        positions: Position of each token in its rollout, (N,).
        labels: Token that each token predicts, (N,), or -100.
        layout: Layout of the row.
        prompt_mask: Mask (U, P) of the prompts' tokens, padded on the left.
        predicts: Which tokens of the completions' part predict a scored token, or None if all do.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    layout: Layout
    prompt_mask: torch.Tensor
    predicts: torch.Tensor | None


def _make_row(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_length: int,
    with_last_token: bool,
    masks_short_rows: bool,
) -> _Row:
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
    targets, is_input, predicts, end = input_ids[:, start:], scored, None, -1
    if with_last_token:
        targets = pad(targets.masked_fill(~scored, -100), (0, 1), value=-100)
        is_input = attention_mask[:, start - 1 :].bool()
        predicts = pad(scored, (0, 1))[is_input]
        end = input_ids.size(1)
    # The position ids of a completion continue from its prompt's, wherever in the row the completion is.
    positions = [position_ids(mask)[mask], position_ids(attention_mask)[:, start - 1 : end][is_input]]
    return _Row(
        ids=torch.cat([ids[mask], input_ids[:, start - 1 : end][is_input]]),
        positions=torch.cat(positions),
        # The head skips tokens with the label -100. For a small model it is the largest matrix product.
        labels=torch.cat([torch.full_like(ids[mask], -100), targets[is_input]]),
        layout=make_layout(mask, is_input, prompt_of, masks_short_rows=masks_short_rows),
        prompt_mask=mask,
        predicts=predicts,
    )


def _to_table(values: torch.Tensor, row: _Row, scored: torch.Tensor) -> torch.Tensor:
    """Return values (1, N) of the row's tokens as a table (B, T) of the scored tokens, 0 elsewhere."""
    values = values[0, len(row.layout.prompts) :]
    if row.predicts is not None:
        values = values[row.predicts]
    return torch.zeros_like(scored, dtype=values.dtype).masked_scatter(scored, values)


def _rollout_indices(row: _Row) -> torch.Tensor:
    """Return the indices in the row of all rollouts' tokens, those of a prompt once for each rollout."""
    mask, layout = row.prompt_mask, row.layout
    indices = (mask.flatten().cumsum(0) - 1).view_as(mask)
    prompts = indices[layout.prompt_of][mask[layout.prompt_of]]
    return torch.cat([prompts, torch.arange(len(layout.prompts), len(row.ids), device=mask.device)])


def make_layout(
    mask: torch.Tensor, scored: torch.Tensor, prompt_of: torch.Tensor, *, masks_short_rows: bool = True
) -> Layout:
    """Return the layout of prompts and completions in the long row.

    Args:
        mask: Mask (U, P) of the prompts' tokens, padded on the left.
        scored: Mask (B, T) of the completions' tokens, padded on the right.
        prompt_of: Index of each completion's prompt, (B,).
        masks_short_rows: Whether rows that are short enough for the faster kernel of a CPU have a mask.
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
    if T > P and bool(prompt_tokens.all()) and not (has_short_rows and masks_short_rows):
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
