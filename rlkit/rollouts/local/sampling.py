"""Sampling that does not depend on how rollouts are spread over processes.

The token of each step is found from one random number by inverting the cumulative distribution. The numbers
of a rollout depend on the seed, the count of generations so far and its place among the rollouts of all
processes, so that two processes sample what one would with twice the batch, up to rounding in the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# What changes sampling in ways that are not known here; transformers' own sampling is used for them.
OTHERS = {
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "watermarking_config": None,
}


def draw(key: Sequence[int], rows: Sequence[int], length: int) -> torch.Tensor:
    """Random numbers in [0, 1) for rollouts, (B, length): row i's depend on `key` and `rows[i]` alone."""
    numbers = [np.random.default_rng([*key, row]).random(length) for row in rows]
    return torch.from_numpy(np.stack(numbers))


class Inverse(LogitsProcessor):
    """Chooses each token by `uniforms` (B, T) and leaves no choice to what follows."""

    def __init__(self, uniforms: torch.Tensor):
        self.uniforms = uniforms
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Raise the chosen token's score (B, V) to infinity."""
        cumulative = scores.float().softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        target = (self.uniforms[:, self.step : self.step + 1] * total).float()
        # Rounded up to the total, it would choose the last token, whatever that one's probability.
        target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(cumulative, target, right=True)
        self.step += 1
        return scores.scatter(1, token, torch.inf)


def knows(config: GenerationConfig) -> bool:
    """Whether all that the config says about sampling is known here."""
    return bool(config.do_sample) and all(getattr(config, k, v) in (None, v) for k, v in OTHERS.items())


def processors(config: GenerationConfig, uniforms: torch.Tensor) -> LogitsProcessorList:
    """What transformers does to scores when it samples, and then the choice by `uniforms`."""
    steps = LogitsProcessorList()
    if config.temperature not in (None, 1.0):
        steps.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        steps.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        steps.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        steps.append(MinPLogitsWarper(config.min_p))
    steps.append(Inverse(uniforms))
    return steps


def greedy(config: GenerationConfig) -> GenerationConfig:
    """The same config without sampling."""
    settings = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "min_p": None}
    return GenerationConfig(**(config.to_dict() | settings))
