"""Questions that are answered by searching (`search-v2`): engines, a generated world, the environment."""

from rlkit.envs.search.environment import SearchEnvironment

__all__ = ["SearchEnvironment"]
