"""Question answering with a search engine (`search-v3`)."""

from rlkit.envs.search.environment import SearchEnvironment

__all__ = ["SearchEnvironment"]
