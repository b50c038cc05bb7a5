"""Retrieval and ranking: collections with judged queries, and the tasks that are made of them."""

from rlkit.envs.ranking.intent import IntentEnvironment
from rlkit.envs.ranking.navigate import NavigateEnvironment
from rlkit.envs.ranking.query import QueryEnvironment
from rlkit.envs.ranking.rerank import RerankEnvironment

__all__ = ["IntentEnvironment", "NavigateEnvironment", "QueryEnvironment", "RerankEnvironment"]
