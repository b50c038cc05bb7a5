"""Rollouts: inference engines that sample turns, and the loop that runs them through an environment.

An engine takes requests, one per assistant turn, and returns samples as they finish (`Engine`). The rollout
loop (`rlkit.rollouts.loop`) is the same for all engines, for training and evaluation, and for single-turn and
multi-turn environments. It works on token ids: sampled tokens are never decoded and then tokenized again.
"""

from rlkit.rollouts.types import Engine, Request, Rollout, Sample, Sampling

__all__ = ["Engine", "Request", "Rollout", "Sample", "Sampling"]
