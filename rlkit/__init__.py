"""rlkit: post-train language models with rewards that can be checked."""

from rlkit.environment import Environment, Reply, Turn, load_environment

__version__ = "0.1.0"
__all__ = ["Environment", "Reply", "Turn", "load_environment"]
