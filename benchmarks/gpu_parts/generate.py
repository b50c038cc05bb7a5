"""Sampling with rlkit's transformers engine and with transformers' `generate`, alternately."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from fixed_prompts import random_letters

from gpu_parts.common import Cases, Machine, make_tokenizer, ratio, without_cudnn
from rlkit.rollouts import Request, Sampling
from rlkit.rollouts.local.engine import TransformersEngine

NUM_ROLLOUTS = 64


def cases(machine: Machine) -> Cases:
    """Return a case with 64 prompts, and one with 8 prompts that are sampled 8 times each."""
    return {
        f"{NUM_ROLLOUTS} rollouts of {num_prompts} prompts": partial(measure, machine, num_prompts)
        for num_prompts in (64, 8)
    }


def measure(machine: Machine, num_prompts: int) -> dict[str, Any]:
    """Compare the seconds of 64 completions, all of the same length."""
    prompt, completion = machine.size((256, 512), (16, 8))
    model = machine.model("qwen3-0.6b", torch.bfloat16).eval()
    tokenizer = make_tokenizer(model.config.vocab_size)
    prompts = tokenizer(random_letters(num_prompts, prompt))["input_ids"]
    # Rollouts of a prompt are next to each other, as in training.
    rows = [ids for ids in prompts for _ in range(NUM_ROLLOUTS // num_prompts)]
    ids = torch.tensor(rows, device=machine.device)
    engine = TransformersEngine(model, tokenizer)
    sampling = Sampling((tokenizer.eos_token_id,), key=(0, 0), extra={"min_new_tokens": completion})

    def with_engine() -> None:
        requests = [Request(i, i, row, completion, 0) for i, row in enumerate(rows)]
        engine.submit(requests, sampling)
        samples = engine.collect(wait=True)
        assert sum(len(sample.ids) for _, sample in samples) == NUM_ROLLOUTS * completion

    def with_transformers() -> None:
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                min_new_tokens=completion,
                max_new_tokens=completion,
            )
        assert output.shape == (NUM_ROLLOUTS, prompt + completion)

    def with_engine_without_cudnn() -> None:
        with without_cudnn():
            with_engine()

    # The first call counts, too: cuDNN's attention builds a plan for each new number of keys, and a training
    # step has to build them again if its prompts have other lengths than the last step's.
    sides = {
        "transformers": with_transformers,
        "rlkit": with_engine,
        "rlkit_without_cudnn": with_engine_without_cudnn,
    }
    first = {name: round(machine.seconds(side), 3) for name, side in sides.items()}
    # A call takes 10 to 20 seconds on a GPU.
    repeats = min(machine.repeats, 2)
    measured = machine.alternate(sides, repeats, warm_up=False)
    for name, side in measured.items():
        side["first_call_s"] = first[name]
    for side in measured.values():
        side["tokens_per_s"] = round(NUM_ROLLOUTS * completion / side["median_s"])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "repeats": repeats,
        **measured,
        "ratio": ratio(measured, "transformers", "rlkit"),
    }
