"""Turning tasks into rollouts: engines that sample, and the loop that carries them through an environment.

An engine takes requests for one assistant turn each and gives samples back as they finish (`Engine`). The
loop (`rlkit.rollouts.loop`) is the same for all engines, for training and for evaluation, for one turn and
for several. Token in, token out: what was sampled is never tokenised again.
"""

from rlkit.rollouts.types import Engine, Request, Rollout, Sample, Sampling

__all__ = ["Engine", "Request", "Rollout", "Sample", "Sampling"]
