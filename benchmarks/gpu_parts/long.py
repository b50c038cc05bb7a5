"""Rows of 16,384 tokens with gradient checkpointing: loss, gradient and update, without sampling.

prime-rl publishes a similar measurement for one H100 (`benchmarks/results/BENCHMARKS.md` of its repository,
early 2026): one sequence of 16,384 tokens per row, FlashAttention 3, torch.compile, full recomputation, an
update after every two rows, and for LoRA up to four adapters. Only the case `1 rollout` has its shape. Its
page does not say whether its peak memory is that of tensors or what the allocator reserved.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_parts.common import GIB, Bench, Cases
from gpu_parts.trainers import MODELS, SteppedTrainer, random_batch

PRIME_RL = {
    "0.6B full": {"card": "NVIDIA H100 80GB HBM3", "tokens_per_s": 11_900, "peak_gib": 12.5},
    "4B LoRA": {"card": "NVIDIA H100 80GB HBM3", "tokens_per_s": 6_230, "peak_gib": 23.3},
}
# Prompt and completion lengths of a row: 16 rollouts of 544 to 1,504 tokens, or a single one. On a CPU, tiny.
ROWS = {
    "16 rollouts": (([256] * 16, list(range(288, 1312, 64))), ([6] * 4, [3, 9, 20, 8])),
    "1 rollout": (([512], [15_872]), ([8], [56])),
}


def cases(bench: Bench) -> Cases:
    """Return a case per model and kind of row."""
    return {
        f"{model}, {row}": partial(measure, bench, model, *bench.size(*ROWS[row]))
        for model in MODELS
        for row in ROWS
    }


def measure(bench: Bench, model: str, prompts: list[int], completions: list[int]) -> dict[str, Any]:
    """Measure steps on one row in which each rollout has a prompt of its own."""
    tokens = sum(prompts) + sum(completions)
    shape = (max(prompts), max(completions), max(len(prompts), 2))
    with tempfile.TemporaryDirectory() as folder:
        side = SteppedTrainer(bench, "rlkit", model, shape, Path(folder) / "run", gradient_checkpointing=True)
        batch = random_batch(bench, prompts, completions, group=1)
        try:
            measured = bench.alternate({"rlkit": partial(side.step, batch)})["rlkit"]
        finally:
            side.close()
    reserved = {} if bench.on_cpu else {"reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2)}
    return {
        "prompts": prompts,
        "completions": completions,
        "tokens": tokens,
        **measured,
        **reserved,
        "tokens_per_s": round(tokens / measured["median_s"]),
        "published_by_prime_rl": PRIME_RL[model],
    }
