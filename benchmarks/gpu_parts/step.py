"""The GRPO step of rlkit and of TRL's trainer, alternately, in one process.

Both use gradient checkpointing, TRL's default, without which the long shapes do not fit on a card. The
weights of both are in memory, so compare `added_gib`, not `peak_gib`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from trl.models.utils import disable_gradient_checkpointing

from gpu_parts.common import Bench, Cases, gradient_error, speedup
from gpu_parts.trainers import MODELS, SteppedTrainer, random_batch

# Prompt tokens, completion tokens, rollouts per prompt: the real sizes, and tiny ones.
SHAPES = {
    "1k/256/8": ((1024, 256, 8), (24, 8, 4)),
    "4k/256/8": ((4096, 256, 8), (40, 8, 4)),
    "256/4k/8": ((256, 4096, 8), (8, 24, 4)),
    "256/1k/8": ((256, 1024, 8), (8, 24, 4)),
}
FORWARD_BACKWARD_SHAPES = ("1k/256/8", "4k/256/8", "256/4k/8")
WHOLE_STEPS = (
    ("0.6B full", "1k/256/8"),
    ("0.6B full", "4k/256/8"),
    ("4B LoRA", "1k/256/8"),
    ("4B LoRA", "4k/256/8"),
    ("4B LoRA", "256/1k/8"),  # sampling 4k tokens with an adapter takes both trainers too long
    ("0.6B full", "256/4k/8"),
)
TIMED_TOKENS = 32  # sampled by each side to estimate the time of a whole step
MAX_REPEATED_SECONDS = 60  # if a step of each side takes longer than this in total, it is measured once
# Both trainers compute the gradient of the same loss with bfloat16 autocast, in another order of sums.
GRADIENT_TOLERANCE = 0.1


def cases(bench: Bench) -> Cases:
    """Return the cases, whole steps last, and the longest of them last."""
    forward_backward_cases = {
        f"{model}, {shape}, forward and backward": partial(
            forward_backward, bench, model, bench.size(*SHAPES[shape])
        )
        for shape in FORWARD_BACKWARD_SHAPES
        for model in MODELS
    }
    whole_step_cases = {
        f"{model}, {shape}, whole step": partial(whole_step, bench, model, bench.size(*SHAPES[shape]))
        for model, shape in WHOLE_STEPS
    }
    return forward_backward_cases | whole_step_cases


@contextmanager
def both_sides(bench: Bench, model: str, shape: tuple[int, int, int]) -> Iterator[dict[str, SteppedTrainer]]:
    """Yield the trainers of TRL and rlkit, with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            side: SteppedTrainer(bench, side, model, shape, Path(folder) / side, gradient_checkpointing=True)
            for side in ("trl", "rlkit")
        }
        try:
            yield sides
        finally:
            for side in sides.values():
                side.close()


def forward_backward(bench: Bench, model: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Compare the loss and its gradient, on the same batch of random tokens."""
    prompt, completion, group = shape
    with both_sides(bench, model, shape) as sides:
        batch = random_batch(bench, [prompt], [completion] * group, group)
        for side in sides.values():
            side.forward_backward(batch)
        error = gradient_error(sides["rlkit"].model, sides["trl"].model)
        for side in sides.values():
            side.clear()
        if not error < GRADIENT_TOLERANCE:
            raise AssertionError(f"the gradients differ by {error:.2g} of their norm")
        measured = bench.alternate(
            {name: partial(forward_backward_and_clear, side, batch) for name, side in sides.items()}
        )
    return {
        "shape": shape,
        "gradient_error": round(error, 4),
        **with_rates(measured, shape),
        "speedup": speedup(measured, "trl", "rlkit"),
    }


def whole_step(bench: Bench, model: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Compare complete steps: sampling with transformers, rewards, loss, gradient and update."""
    prompt, completion, group = shape
    with both_sides(bench, model, shape) as sides:
        batch = random_batch(bench, [prompt], [completion] * group, group)
        expected = 0.0
        for side in sides.values():
            side.step(batch)
            generate(side, batch, 1)
            per_token = bench.seconds(partial(generate, side, batch, TIMED_TOKENS)) / TIMED_TOKENS
            expected += per_token * completion + bench.seconds(partial(side.step, batch))
        repeats = 1 if expected > MAX_REPEATED_SECONDS else min(bench.repeats, 2)
        bench.require_seconds(expected * repeats)
        measured = bench.alternate({name: side.step for name, side in sides.items()}, repeats, warm_up=False)
    return {
        "shape": shape,
        "repeats": repeats,
        **with_rates(measured, shape),
        "speedup": speedup(measured, "trl", "rlkit"),
    }


def forward_backward_and_clear(side: SteppedTrainer, batch: Any) -> None:
    """Compute the loss and its gradient, and clear it, so that each call begins with the same memory."""
    side.forward_backward(batch)
    side.clear()


def generate(side: SteppedTrainer, batch: Mapping[str, torch.Tensor], num_tokens: int) -> None:
    """Sample tokens after each prompt of a batch, with the trainer's model and autocast."""
    trainer = side.trainer
    with (
        torch.no_grad(),
        trainer.accelerator.autocast(),
        disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
    ):
        trainer.accelerator.unwrap_model(side.model).generate(
            input_ids=batch["prompt_ids"],
            attention_mask=batch["prompt_mask"],
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
        )


def with_rates(
    measured: Mapping[str, dict[str, float]], shape: tuple[int, int, int]
) -> dict[str, dict[str, float]]:
    """Return the measurements with tokens per second; each rollout counts its prompt, too."""
    prompt, completion, group = shape
    tokens = (prompt + completion) * group
    return {
        name: side | {"tokens_per_s": round(tokens / side["median_s"])} for name, side in measured.items()
    }
