"""Sampling that does not depend on how rollouts are distributed over processes.

Each token is found by inverting the cumulative distribution at one uniform random number. The random numbers
of a rollout depend on the seed, the sampling step, and its index in the batch of all processes. So two
processes sample the same rollouts as one process with twice the batch, up to rounding in the model.
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

# Settings that `processors` does not implement, with the values that turn them off. If any of them is on,
# `generate` falls back to the sampling of transformers.
UNSUPPORTED = {
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "watermarking_config": None,
}


def draw(key: Sequence[int], rows: Sequence[int], length: int) -> torch.Tensor:
    """Draw random numbers in [0, 1) for B rollouts, (B, length), float64.

    Those of row i depend on `key` and `rows[i]` alone.
    """
    numbers = [np.random.default_rng([*key, row]).random(length) for row in rows]
    return torch.from_numpy(np.stack(numbers))


class InverseCDFSampler(LogitsProcessor):
    """Selects each token by inverting the cumulative distribution at the step's random number.

    It must come last. transformers then takes the argmax, which is the selected token.

    Args:
        uniforms: (B, T) random numbers in [0, 1), one per row and step.

    Attributes:
        is_finite: Whether all probabilities so far were finite. It stays on the device, so that sampling a
            token does not wait for it.
    """

    def __init__(self, uniforms: torch.Tensor):
        self.uniforms = uniforms
        self.is_finite = torch.ones((), dtype=torch.bool, device=uniforms.device)
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Set the score of the selected token to infinity in scores (B, V)."""
        # A CPU sums one token after the other, in double precision. A GPU sums in parallel. In float32, sums
        # in another order would leave an interval to tokens of probability 0.
        dtype = torch.float64 if scores.is_cuda else torch.float32
        cumulative = scores.float().softmax(-1).cumsum(-1, dtype=dtype)
        total = cumulative[:, -1:]
        target = (self.uniforms[:, self.step : self.step + 1] * total).to(dtype)
        # A target that rounds up to the total would select the last token, even one with probability 0.
        target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
        # `right=True` skips tokens of probability 0, whose interval is empty.
        token = torch.searchsorted(cumulative, target, right=True)
        self.is_finite &= total.isfinite().all()
        token.clamp_(max=scores.size(1) - 1)  # NaN would select a token that does not exist
        self.step += 1
        return scores.scatter(1, token, torch.inf)


def is_supported(config: GenerationConfig) -> bool:
    """Return whether the config samples, and uses no setting that `processors` does not implement."""
    if not config.do_sample:
        return False
    return all(getattr(config, name, off) in (None, off) for name, off in UNSUPPORTED.items())


def processors(config: GenerationConfig, uniforms: torch.Tensor) -> LogitsProcessorList:
    """Return transformers' logits processors for sampling, then the selection by `uniforms` (B, T)."""
    steps = LogitsProcessorList()
    if config.temperature not in (None, 1.0):
        steps.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        steps.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        steps.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        steps.append(MinPLogitsWarper(config.min_p))
    steps.append(InverseCDFSampler(uniforms))
    return steps


def greedy(config: GenerationConfig) -> GenerationConfig:
    """Return a copy of the config with sampling turned off."""
    settings = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "min_p": None}
    return GenerationConfig(**(config.to_dict() | settings))
