"""Serialize a model and a query to one line of JSON, so that a dataset row fully describes its question."""

from __future__ import annotations

import json

import numpy as np

from rlkit.envs.causal.model import CausalModel, CausalQuery


def to_json(model: CausalModel, query: CausalQuery) -> str:
    """Serialize a model, whose nodes must be in topological order, and a query; nodes are given by index.

    Keys: `names`, `parents` (lists of indices), `tables` (nested lists with one axis per parent and one for
    the node), `target` (index), `observed` and `intervened` ([index, value] or null).
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
    """Restore the model and the query from the output of `to_json`."""
    problem = json.loads(text)
    model = CausalModel(
        tuple(problem["names"]),
        tuple(tuple(node_parents) for node_parents in problem["parents"]),
        tuple(np.array(table) for table in problem["tables"]),
    )
    observed, intervened = (
        tuple(pair) if pair else None for pair in (problem["observed"], problem["intervened"])
    )
    return model, CausalQuery(problem["target"], observed, intervened)
