"""Question answering with a search engine (`search-v2`)."""

from rlkit.envs.search.environment import SearchEnvironment

__all__ = ["SearchEnvironment"]
