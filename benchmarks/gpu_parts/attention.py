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
from itertools import pairwise
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from trl.trainer.utils import add_fused_lm_head

from gpu_parts.common import Bench, Cases, without_cudnn
from gpu_parts.trainers import random_batch
from rlkit.models.patches import replaced
from rlkit.training import shared_prefix
from rlkit.training.shared_prefix import Layout

MODEL = "qwen3-0.6b"
# Prompt lengths, completion lengths, rollouts per prompt: the real sizes, and tiny ones.
BATCHES: dict[str, tuple[tuple[list[int], list[int], int], tuple[list[int], list[int], int]]] = {
    "1k/256/8": (([1024], [256] * 8, 8), ([24], [8] * 4, 4)),
    "4k/256/8": (([4096], [256] * 8, 8), ([40], [8] * 4, 4)),
    "256/4k/8": (([256], [4096] * 8, 8), ([8], [24] * 4, 4)),
    # Completions differ in length, as sampled ones do, so padding and masks cost time.
    "mixed": (([700, 1024], [*range(256, 2304, 256)] * 2, 8), ([12, 24], [3, 9, 20, 1] * 2, 4)),
}
CALLS = 10  # per measurement of attention alone, which takes a few milliseconds
# Maximum relative error ‖x − y‖ / ‖y‖ of bfloat16 output and gradients against float32.
ERROR_TOLERANCE = 0.02

# attention(query, key, value, layout, scale=...) computes what `shared_prefix.attend` does.
Attention = Callable[..., torch.Tensor]


def cases(bench: Bench) -> Cases:
    """Return a case per batch for attention alone, and one for the model's forward and backward pass."""
    # Each batch has a kernel of its own. With more than the limit, Dynamo would silently stop compiling.
    torch._dynamo.config.recompile_limit = 64
    measures = {"attention": attention_alone, "model": whole_model}
    return {
        f"{batch}, {name}": partial(measure, bench, *bench.size(*BATCHES[batch]))
        for name, measure in measures.items()
        for batch in BATCHES
    }


def attention_alone(
    bench: Bench, prompts: Sequence[int], completions: Sequence[int], group: int
) -> dict[str, Any]:
    """Measure one layer's forward and backward pass, and check output and gradients against float32.

    Masks and indices are made before: they are made once for all layers.
    """
    config = bench.config(MODEL)
    layout = layout_of(random_batch(bench, prompts, completions, group), group)
    num_tokens = len(layout.prompts) + len(layout.completions)
    generator = torch.Generator().manual_seed(0)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    inputs = [
        torch.randn(1, h, num_tokens, config.head_dim, generator=generator).to(bench.device) for h in heads
    ]
    gradient = torch.randn(1, num_tokens, heads[0], config.head_dim, generator=generator).to(bench.device)
    scale = config.head_dim**-0.5

    def forward_backward(
        attention: Attention, leaves: Sequence[torch.Tensor], gradient: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the output of attention, and the gradients of the leaves if they require them."""
        out = attention(*leaves, layout, scale=scale)
        if not out.requires_grad:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    expected = forward_backward(shared_prefix.attend, [x.clone().requires_grad_() for x in inputs], gradient)
    result = description(prompts, completions, group)
    sides = {}
    for name, attention in IMPLEMENTATIONS.items():
        # FlexAttention has no backward pass on a CPU.
        has_gradient = not (bench.on_cpu and name == "flex")
        leaves = [x.bfloat16().requires_grad_(has_gradient) for x in inputs]
        run = partial(forward_backward, attention, leaves, gradient.bfloat16())
        try:
            first_s = bench.seconds(run)  # with compilation
            errors = [
                ((x.float() - y).norm() / y.norm()).item() for x, y in zip(run(), expected, strict=False)
            ]
            if not max(errors) < ERROR_TOLERANCE:
                raise AssertionError(f"output and gradients differ from float32 by {errors}")
        except Exception as error:  # one implementation must not hide the others
            result[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            bench.free()
            continue
        sides[name] = run
        result[name] = {"first_call_s": round(first_s, 3), "error_to_float32": round(max(errors), 5)}
    add_measurements(result, bench.alternate(sides, calls=bench.size(CALLS, 1)))
    return result


def whole_model(
    bench: Bench, prompts: Sequence[int], completions: Sequence[int], group: int
) -> dict[str, Any]:
    """Measure forward and backward of the log-probabilities of a model in bfloat16, with its masks.

    All sides pay for the dense mask, which only SDPA needs.
    """
    model = bench.model(MODEL, torch.bfloat16).train()
    # TRL's default, without which the longest batch hardly fits on a card.
    model.gradient_checkpointing_enable({"use_reentrant": False})
    add_fused_lm_head(model, outputs=("entropy",))
    shared_prefix.add_shared_prefix()
    batch = random_batch(bench, prompts, completions, group)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    width = batch["completion_ids"].size(1)

    def forward_backward(attention: Attention) -> None:
        with replaced(shared_prefix, "attend", attention):
            log_probs = shared_prefix.completion_log_probs(model, ids, mask, width).log_probs
            (log_probs * batch["advantages"][:, None]).mean().backward()
        model.zero_grad()

    result = description(prompts, completions, group)
    sides = {}
    for name, attention in IMPLEMENTATIONS.items():
        if bench.on_cpu and name == "flex":
            continue
        run = partial(forward_backward, attention)
        try:
            run()
        except Exception as error:
            result[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            model.zero_grad()
            bench.free()
            continue
        sides[name] = run
        result[name] = {}
    add_measurements(result, bench.alternate(sides))
    return result


def description(prompts: Sequence[int], completions: Sequence[int], group: int) -> dict[str, Any]:
    """Return the sizes of a batch as the result records them."""
    return {"prompts": prompts, "completions": completions, "rollouts_per_prompt": group}


def add_measurements(result: dict[str, Any], measured: dict[str, dict[str, float]]) -> None:
    """Add the measurements to a result, each with its speedup over SDPA, and the name of the fastest."""
    _cached.clear()  # the masks of this batch must not count in the memory of the next
    seconds = {name: values["median_s"] for name, values in measured.items()}
    for name, values in measured.items():
        result[name] |= values
        if "sdpa" in seconds:
            result[name]["speedup_over_sdpa"] = round(seconds["sdpa"] / seconds[name], 3)
    if seconds:
        result["fastest"] = min(seconds, key=lambda name: seconds[name])


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
    # P is 0 if all prompts have a single token, which is part of their completions.
    prompts, completions = layout.prompts // max(P, 1), layout.completions // T
    return torch.cat([prompts, U + completions]), torch.cat([prompts, layout.prompt_of[completions]])


_attend = shared_prefix.attend  # `whole_model` replaces the attribute


def sdpa_without_cudnn(*args: Any, **options: Any) -> torch.Tensor:
    """Compute `shared_prefix.attend` without cuDNN's kernel."""
    with without_cudnn():
        return _attend(*args, **options)


# --- FlexAttention -----------------------------------------------------------------------------------------


def flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, **options: Any
) -> torch.Tensor:
    """Compute `shared_prefix.attend` with FlexAttention."""
    mask = _once_per_layout(_block_mask, layout)
    attention = flex_attention
    if query.device.type != "cpu":
        attention = _compiled(flex_attention)
    out = attention(query, key, value, block_mask=mask, scale=options.get("scale"), enable_gqa=True)
    return out.transpose(1, 2)


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    # Static shapes: the kernels must not depend on which batch is measured first.
    return torch.compile(function, dynamic=False)


def _block_mask(layout: Layout) -> Any:
    segment, prompt = segments(layout)

    def may_attend(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        # A prompt comes before its completions in the row, so attention is causal in all cases.
        return (key <= query) & ((segment[key] == segment[query]) | (segment[key] == prompt[query]))

    # Not compiled, it makes several masks of N x N booleans.
    make = create_block_mask if segment.device.type == "cpu" else _compiled(create_block_mask)
    return make(may_attend, None, None, len(segment), len(segment), device=segment.device)


# --- Varlen attention --------------------------------------------------------------------------------------


def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, **options: Any
) -> torch.Tensor:
    """Compute `shared_prefix.attend` with one call of variable-length flash attention."""
    keys, query_ends, key_ends, longest = _once_per_layout(_sequences, layout)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, D)
    k, v = (x.index_select(0, keys) for x in (k, v))
    out = _varlen_attention(q, k, v, query_ends, key_ends, longest, options.get("scale"))
    return out[None]


def _sequences(layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Return the keys of all sequences as indices of tokens, where sequences end, and the longest lengths."""
    U, _, B, _ = layout.shape
    segment, _ = segments(layout)
    lengths = torch.bincount(segment, minlength=U + B).tolist()
    rows = torch.arange(len(segment), device=segment.device).split(lengths)
    keys = list(rows[:U])
    for completion, prompt in zip(rows[U:], layout.prompt_of.tolist(), strict=True):
        keys.append(torch.cat([rows[prompt], completion]))
    key_lengths = [len(indices) for indices in keys]
    query_ends, key_ends = (
        torch.tensor([0, *sizes], device=segment.device).cumsum(0).to(torch.int32)
        for sizes in (lengths, key_lengths)
    )
    return torch.cat(keys), query_ends, key_ends, (max(lengths), max(key_lengths))


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
        for (q0, k0), (q1, k1) in pairwise(zip(query_ends.tolist(), key_ends.tolist(), strict=True)):
            q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
            mask = q.new_ones(q.size(1), k.size(1), dtype=torch.bool).tril(k.size(1) - q.size(1))
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
            outputs.append(out.transpose(0, 1))
        return torch.cat(outputs)
    from torch.nn.attention.varlen import varlen_attn

    # PyTorch 2.11 supports fewer key heads than query heads, too; newer versions require this argument.
    options = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(
        query, key, value, query_ends, key_ends, *longest, window_size=(-1, 0), scale=scale, **options
    )


# The last result of each function for a layout, which all layers of a forward pass share.
_cached: dict[Callable[[Layout], Any], tuple[Layout, Any]] = {}


def _once_per_layout(make: Callable[[Layout], Any], layout: Layout) -> Any:
    """Return `make(layout)`, made by the first layer of a forward pass and used by the others."""
    if make not in _cached or _cached[make][0] is not layout:
        _cached[make] = (layout, make(layout))
    return _cached[make][1]


IMPLEMENTATIONS: dict[str, Attention] = {
    "sdpa": shared_prefix.attend,
    "sdpa_without_cudnn": sdpa_without_cudnn,
    "flex": flex,
    "varlen": varlen,
}
