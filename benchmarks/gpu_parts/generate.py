"""Sampling with rlkit's transformers engine and with transformers' `generate`, alternately."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from fixed_prompts import random_letters

from gpu_parts.common import Bench, Cases, make_tokenizer, speedup, summary, without_cudnn
from rlkit.rollouts import Request, Sampling
from rlkit.rollouts.local.engine import TransformersEngine

NUM_ROLLOUTS = 64


def cases(bench: Bench) -> Cases:
    """Return a case with 64 prompts, and one with 8 prompts that are sampled 8 times each."""
    return {
        f"{NUM_ROLLOUTS} rollouts of {num_prompts} prompts": partial(measure, bench, num_prompts)
        for num_prompts in (64, 8)
    }


def measure(bench: Bench, num_prompts: int) -> dict[str, Any]:
    """Compare the seconds of 64 completions, all of the same length.

    Each call has prompts of another length, as training has: cuDNN's attention builds a plan for each new
    number of keys.
    """
    prompt, completion = bench.size((256, 512), (16, 8))
    model = bench.model("qwen3-0.6b", torch.bfloat16).eval()
    tokenizer = make_tokenizer(model.config.vocab_size)
    prompts = tokenizer(random_letters(num_prompts, prompt))["input_ids"]
    # Rollouts of a prompt are next to each other, as in training.
    rows = [ids for ids in prompts for _ in range(NUM_ROLLOUTS // num_prompts)]
    engine = TransformersEngine(model, tokenizer)
    sampling = Sampling((tokenizer.eos_token_id,), key=(0, 0), extra={"min_new_tokens": completion})

    def with_engine(rows: list[list[int]]) -> None:
        requests = [Request(i, i, row, completion, 0) for i, row in enumerate(rows)]
        engine.submit(requests, sampling)
        samples = engine.collect(wait=True)
        assert sum(len(sample.ids) for _, sample in samples) == NUM_ROLLOUTS * completion

    def with_engine_without_cudnn(rows: list[list[int]]) -> None:
        with without_cudnn():
            with_engine(rows)

    def with_transformers(rows: list[list[int]]) -> None:
        ids = torch.tensor(rows, device=bench.device)
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                min_new_tokens=completion,
                max_new_tokens=completion,
            )
        assert output.shape == (NUM_ROLLOUTS, ids.size(1) + completion)

    sides = {
        "transformers": with_transformers,
        "rlkit": with_engine,
        "rlkit_without_cudnn": with_engine_without_cudnn,
    }
    repeats = min(bench.repeats, 2)  # a call takes 10 to 20 seconds on a GPU
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):  # the first one is a warm-up
        for name, side in sides.items():
            seconds[name].append(bench.seconds(partial(side, [row[repeat:] for row in rows])))
    measured = {name: summary(values[1:]) for name, values in seconds.items()}
    for side in measured.values():
        side["tokens_per_s"] = round(NUM_ROLLOUTS * completion / side["median_s"])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "repeats": repeats,
        **measured,
        "speedup": speedup(measured, "transformers", "rlkit"),
    }
