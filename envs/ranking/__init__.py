"""Retrieval and ranking environments, whose tasks come from collections with judged queries."""

from rlkit.envs.ranking.demonstrate import DemonstrateEnvironment
from rlkit.envs.ranking.identify import IdentifyEnvironment
from rlkit.envs.ranking.intent import IntentEnvironment
from rlkit.envs.ranking.navigate import NavigateEnvironment
from rlkit.envs.ranking.pairs.environment import PairsEnvironment
from rlkit.envs.ranking.query import QueryEnvironment
from rlkit.envs.ranking.rerank import RerankEnvironment
from rlkit.envs.ranking.write import WriteEnvironment

__all__ = [
    "DemonstrateEnvironment",
    "IdentifyEnvironment",
    "IntentEnvironment",
    "NavigateEnvironment",
    "PairsEnvironment",
    "QueryEnvironment",
    "RerankEnvironment",
    "WriteEnvironment",
]
