"""Ways to compute attention with a shared prefix.

- SDPA is what rlkit does (`rlkit.training.shared_prefix.attend`): prompts and completions are padded to
  tables, and a mask says which prompt tokens a completion attends to. PyTorch may choose cuDNN's kernel,
  which builds a plan for each new shape, so SDPA is measured without it, too.
- FlexAttention leaves the tokens in the long row. It gets the rule as a function of two positions and skips
  blocks that the rule excludes entirely.
- Varlen attention is flash attention without padding and without a mask. It gets each prompt as a sequence,
  and each completion as a sequence whose keys begin with a copy of its prompt's keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from trl.trainer.utils import add_fused_lm_head

from gpu_parts.common import Cases, Machine, without_cudnn
from gpu_parts.trainers import random_batch
from rlkit.models.patches import replaced
from rlkit.training import shared_prefix
from rlkit.training.shared_prefix import Layout

MODEL = "qwen3-0.6b"
# Prompt lengths, completion lengths, rollouts per prompt: the real sizes, and tiny ones.
SHAPES: dict[str, tuple[tuple[list[int], list[int], int], tuple[list[int], list[int], int]]] = {
    "1k/256/8": (([1024], [256] * 8, 8), ([24], [8] * 4, 4)),
    "4k/256/8": (([4096], [256] * 8, 8), ([40], [8] * 4, 4)),
    "256/4k/8": (([256], [4096] * 8, 8), ([8], [24] * 4, 4)),
    # Completions that differ in length, as sampled ones do: padding and the mask have a price then.
    "mixed": (([700, 1024], [*range(256, 2304, 256)] * 2, 8), ([12, 24], [3, 9, 20, 1] * 2, 4)),
}
ERROR_TOLERANCE = 0.02  # of bfloat16 against float32, relative to the norm

# attention(query, key, value, layout, scale=...) computes what `shared_prefix.attend` does.
Attention = Callable[..., torch.Tensor]


def cases(machine: Machine) -> Cases:
    """Return a case per shape for attention alone, and one for the model's forward and backward pass."""
    measures = {"attention": attention_alone, "model": whole_model}
    return {
        f"{shape}, {name}": partial(measure, machine, *machine.size(*SHAPES[shape]))
        for name, measure in measures.items()
        for shape in SHAPES
    }


def attention_alone(
    machine: Machine, prompts: Sequence[int], completions: Sequence[int], group: int
) -> dict[str, Any]:
    """Measure forward and backward of one layer's attention; check both against float32."""
    config = machine.config(MODEL)
    batch = random_batch(machine, prompts, completions, group)
    layout = layout_of(batch, group)
    num_tokens = len(layout.prompts) + len(layout.completions)
    generator = torch.Generator().manual_seed(0)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    inputs = [
        torch.randn(1, h, num_tokens, config.head_dim, generator=generator).to(machine.device) for h in heads
    ]
    weights = torch.randn(1, num_tokens, heads[0], config.head_dim, generator=generator).to(machine.device)

    def outputs(attention: Attention, dtype: torch.dtype, has_gradient: bool) -> list[torch.Tensor]:
        """Return the output of attention, and the gradients of its inputs."""
        leaves = [x.to(dtype, copy=True).requires_grad_(has_gradient) for x in inputs]
        out = attention(*leaves, layout)
        if not has_gradient:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(dtype))]

    expected = outputs(shared_prefix.attend, torch.float32, True)
    result: dict[str, Any] = {"prompts": prompts, "completions": completions, "rollouts_per_prompt": group}
    sides = {}
    for name, attention in IMPLEMENTATIONS.items():
        # FlexAttention has no backward pass on a CPU.
        has_gradient = not (machine.on_cpu and name == "flex")
        run = partial(outputs, attention, torch.bfloat16, has_gradient)
        try:
            first_s = machine.seconds(run)  # with compilation
            errors = [
                ((x.float() - y).norm() / y.norm()).item() for x, y in zip(run(), expected, strict=False)
            ]
        except Exception as failure:  # one implementation must not hide the others
            result[name] = {"error": f"{type(failure).__name__}: {failure}"[:300]}
            continue
        if not max(errors) < ERROR_TOLERANCE:
            result[name] = {"error": f"output or gradients differ from float32 by {errors} of their norms"}
            continue
        sides[name] = run
        result[name] = {"first_call_s": round(first_s, 3), "error_to_float32": round(max(errors), 5)}
    return with_fastest(result, machine.alternate(sides))


def whole_model(
    machine: Machine, prompts: Sequence[int], completions: Sequence[int], group: int
) -> dict[str, Any]:
    """Measure forward and backward of the log-probabilities of a model in bfloat16, mask included."""
    model = machine.model(MODEL, torch.bfloat16).train()
    # TRL's default, without which the longest shape hardly fits on a card.
    model.gradient_checkpointing_enable({"use_reentrant": False})
    add_fused_lm_head(model, outputs=("entropy",))
    shared_prefix.add_shared_prefix()
    batch = random_batch(machine, prompts, completions, group)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    result: dict[str, Any] = {"prompts": prompts, "completions": completions, "rollouts_per_prompt": group}
    sides = {}
    for name, attention in IMPLEMENTATIONS.items():
        if machine.on_cpu and name == "flex":
            continue

        def run(attention: Attention = attention) -> None:
            with replaced(shared_prefix, "attend", attention):
                width = batch["completion_ids"].size(1)
                log_probs, _ = shared_prefix.completion_log_probs(model, ids, mask, width)
                (log_probs * batch["advantages"][:, None]).mean().backward()
            model.zero_grad()

        try:
            first_s = machine.seconds(run)
        except Exception as failure:
            result[name] = {"error": f"{type(failure).__name__}: {failure}"[:300]}
            machine.free()
            continue
        sides[name] = run
        result[name] = {"first_call_s": round(first_s, 3)}
    return with_fastest(result, machine.alternate(sides))


def with_fastest(result: dict[str, Any], measured: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Add the measurements to the result, each with its speedup over SDPA, and name the fastest."""
    for name, values in measured.items():
        result[name] |= values
    seconds = {name: values["median_s"] for name, values in measured.items()}
    if "sdpa" in seconds:
        for name, value in seconds.items():
            result[name]["speedup_over_sdpa"] = round(seconds["sdpa"] / value, 3)
    if seconds:
        result["fastest"] = min(seconds, key=lambda name: seconds[name])
    return result


def layout_of(batch: dict[str, Any], group: int) -> Layout:
    """Return the layout of the long row of a batch, as `completion_log_probs` makes it."""
    prompt_of = torch.arange(len(batch["prompt_mask"]), device=batch["prompt_mask"].device) // group
    # The last token of a prompt is part of its completions.
    mask = batch["prompt_mask"][::group, :-1].bool()
    return shared_prefix.make_layout(mask, batch["completion_mask"].bool(), prompt_of)


def segments(layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each of the N tokens of the row its segment, and the segment of its prompt.

    Segments 0 to U - 1 are the prompts, the following ones the completions.
    """
    U, P, _, T = layout.shape
    prompts, completions = layout.prompts // max(P, 1), layout.completions // T
    return torch.cat([prompts, U + completions]), torch.cat([prompts, layout.prompt_of[completions]])


def sdpa_without_cudnn(*args: Any, **options: Any) -> torch.Tensor:
    """Compute `shared_prefix.attend` without cuDNN's kernel."""
    with without_cudnn():
        return _attend(*args, **options)


_attend = shared_prefix.attend  # `whole_model` replaces the attribute


# --- FlexAttention -----------------------------------------------------------------------------------------


def flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, **options: Any
) -> torch.Tensor:
    """Compute `shared_prefix.attend` with FlexAttention."""
    mask = _once_per_layout(_block_mask, layout)
    attention = flex_attention if query.device.type == "cpu" else _compiled_flex_attention()
    out = attention(query, key, value, block_mask=mask, scale=options.get("scale"), enable_gqa=True)
    return out.transpose(1, 2)


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention)


def _block_mask(layout: Layout) -> Any:
    segment, prompt = segments(layout)

    def may_attend(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        # A prompt comes before its completions in the row, so attention is causal in all cases.
        return (key <= query) & ((segment[key] == segment[query]) | (segment[key] == prompt[query]))

    return create_block_mask(may_attend, None, None, len(segment), len(segment), device=segment.device)


# --- Varlen attention --------------------------------------------------------------------------------------


def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, **options: Any
) -> torch.Tensor:
    """Compute `shared_prefix.attend` with one call of variable-length flash attention."""
    keys, query_ends, key_ends, longest = _once_per_layout(_sequences, layout)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, D)
    out = _varlen_attention(
        q,
        k.index_select(0, keys),
        v.index_select(0, keys),
        query_ends,
        key_ends,
        longest,
        options.get("scale"),
    )
    return out[None]


def _sequences(layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Return the keys of all sequences as indices of tokens, where sequences end, and the longest lengths."""
    U, _, B, _ = layout.shape
    segment, _ = segments(layout)
    lengths = torch.bincount(segment, minlength=U + B).tolist()
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    rows = torch.arange(starts[-1], device=segment.device).split(lengths)
    keys = list(rows[:U])
    for completion, prompt in zip(rows[U:], layout.prompt_of.tolist(), strict=True):
        keys.append(torch.cat([rows[prompt], completion]))
    query_ends = torch.tensor(starts, dtype=torch.int32, device=segment.device)
    key_lengths = torch.tensor([0, *map(len, keys)], device=segment.device)
    key_ends = key_lengths.cumsum(0).to(torch.int32)
    return torch.cat(keys), query_ends, key_ends, (max(lengths), int(key_lengths.max()))


def _varlen_attention(  # noqa: PLR0917
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    longest: tuple[int, int],
    scale: float | None,
) -> torch.Tensor:
    """Compute causal attention of sequences whose last query attends to all of their keys."""
    if query.device.type == "cpu":  # no flash attention: the definition, sequence by sequence
        outputs = []
        ends = zip(query_ends.tolist(), key_ends.tolist(), strict=True)
        query_start, key_start = next(ends)
        for query_end, key_end in ends:
            q, k, v = (
                x.transpose(0, 1)
                for x in (
                    query[query_start:query_end], key[key_start:key_end], value[key_start:key_end]
                )
            )  # fmt: skip
            mask = q.new_ones(q.size(1), k.size(1), dtype=torch.bool).tril(k.size(1) - q.size(1))
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
            outputs.append(out.transpose(0, 1))
            query_start, key_start = query_end, key_end
        return torch.cat(outputs)
    from torch.nn.attention.varlen import varlen_attn

    # The kernel supports fewer key heads than query heads in PyTorch 2.11, too; since 2.12 one has to say so.
    options = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(
        query, key, value, query_ends, key_ends, *longest, window_size=(-1, 0), scale=scale, **options
    )


_cached: dict[str, tuple[Layout, Any]] = {}


def _once_per_layout(make: Callable[[Layout], Any], layout: Layout) -> Any:
    """Return `make(layout)`, made by the first layer of a forward pass and used by the others."""
    if make.__name__ not in _cached or _cached[make.__name__][0] is not layout:
        _cached[make.__name__] = (layout, make(layout))
    return _cached[make.__name__][1]


IMPLEMENTATIONS: dict[str, Attention] = {
    "sdpa": shared_prefix.attend,
    "sdpa_without_cudnn": sdpa_without_cudnn,
    "flex": flex,
    "varlen": varlen,
}
