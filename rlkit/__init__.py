"""rlkit: post-train language models with rewards that can be checked.

The names below are the public interface of a script or a notebook. They are imported on first use, so that
`import rlkit` loads neither torch nor datasets.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlkit.environment import Environment, Reply, Turn
    from rlkit.registry import load_environment
    from rlkit.rollouts.types import Rollout

__version__ = "0.1.0"
__all__ = ["Environment", "Reply", "Rollout", "Turn", "load_environment"]

_MODULES = {
    "Environment": "rlkit.environment",
    "Reply": "rlkit.environment",
    "Rollout": "rlkit.rollouts.types",
    "Turn": "rlkit.environment",
    "load_environment": "rlkit.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'rlkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
