"""Questions that are answered by searching (`search-v1`): engines, a generated world, the environment."""

from rlkit.envs.search.environment import SearchEnvironment

__all__ = ["SearchEnvironment"]
