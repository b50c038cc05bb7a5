"""Retrieval and ranking: collections with judged queries, and the tasks that are made of them."""

from envs.ranking.intent import IntentEnvironment
from envs.ranking.navigate import NavigateEnvironment
from envs.ranking.query import QueryEnvironment
from envs.ranking.rerank import RerankEnvironment

__all__ = ["IntentEnvironment", "NavigateEnvironment", "QueryEnvironment", "RerankEnvironment"]
