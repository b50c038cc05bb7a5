"""Probability questions about structural causal models, with exact answers (`causal-v1`)."""

from rlkit.envs.causal.environment import CausalEnvironment

__all__ = ["CausalEnvironment"]
