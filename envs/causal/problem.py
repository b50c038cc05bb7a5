"""A model and its query as one line of JSON, so that a task's row says everything about its question."""

from __future__ import annotations

import json

import numpy as np

from rlkit.envs.causal.model import CausalModel, CausalQuery


def to_json(model: CausalModel, query: CausalQuery) -> str:
    """Write the model and the query; nodes are in topological order and named by their position.

    Keys: `names`, `parents` (lists of positions), `tables` (nested lists, an axis for each parent and one for
    the node), `target`, `observed` and `intervened` (position and value, or null).
    """
    problem = {
        "names": model.names,
        "parents": model.parents,
        "tables": [table.tolist() for table in model.tables],
        "target": query.target,
        "observed": query.observed,
        "intervened": query.intervened,
    }
    return json.dumps(problem, separators=(",", ":"))


def from_json(text: str) -> tuple[CausalModel, CausalQuery]:
    """Read what `to_json` wrote."""
    problem = json.loads(text)
    model = CausalModel(
        tuple(problem["names"]),
        tuple(tuple(above) for above in problem["parents"]),
        tuple(np.array(table) for table in problem["tables"]),
    )
    observed, intervened = (
        tuple(pair) if pair else None for pair in (problem["observed"], problem["intervened"])
    )
    return model, CausalQuery(problem["target"], observed, intervened)
