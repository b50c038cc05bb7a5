"""rlkit: post-train language models with verifiable rewards.

The names in `__all__` are the public interface for scripts and notebooks. Each one is imported on first use
(PEP 562), so `import rlkit` loads neither torch nor datasets.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from rlkit.api import TrainResult, train
    from rlkit.environment import Environment, Reply, Turn
    from rlkit.errors import UserError
    from rlkit.evaluation.model import evaluate_model as evaluate
    from rlkit.registry import load_environment
    from rlkit.rollouts.types import Rollout

__version__ = "0.1.0"
__all__ = [
    "Environment",
    "Reply",
    "Rollout",
    "TrainResult",
    "Turn",
    "UserError",
    "evaluate",
    "load_environment",
    "train",
]

_OBJECTS = {
    "Environment": ("rlkit.environment", "Environment"),
    "Reply": ("rlkit.environment", "Reply"),
    "Rollout": ("rlkit.rollouts.types", "Rollout"),
    "TrainResult": ("rlkit.api", "TrainResult"),
    "Turn": ("rlkit.environment", "Turn"),
    "UserError": ("rlkit.errors", "UserError"),
    "evaluate": ("rlkit.evaluation.model", "evaluate_model"),
    "load_environment": ("rlkit.registry", "load_environment"),
    "train": ("rlkit.api", "train"),
}


def __getattr__(name: str) -> object:
    if name not in _OBJECTS:
        raise AttributeError(f"module 'rlkit' has no attribute {name!r}")
    module, attribute = _OBJECTS[name]
    return getattr(_import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
