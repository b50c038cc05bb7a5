"""Evaluations of retrievers, and how much two leaderboards agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlkit.errors import UserError
from rlkit.evaluation.result import Evaluation, scores_of
from rlkit.evaluation.statistics import accuracy_interval, kendall_tau
from rlkit.retrieval.evaluate import MEASURES, evaluate_retriever

SHOWN = 10  # documents of a ranking that are kept in the result


def evaluate_rankings(
    collection: str,
    retriever: str,
    *,
    name: str,
    split: str,
    seed: int,
    folds: Mapping[str, int],
    **options: Any,
) -> Evaluation:
    """Score a retriever on the judged queries of a collection.

    Args:
        collection, retriever, split, seed: see `rlkit.retrieval.evaluate.evaluate_retriever`.
        name: of the result.
        folds: `folds` and `fold` of the collection, where its queries are dealt to folds.
        options: further ones of `evaluate_retriever`.

    Raises:
        UserError: a name that does not exist, or a retriever that fails.
    """
    measures = list(dict.fromkeys(options.pop("measures", None) or MEASURES))
    found = evaluate_retriever(
        collection,
        retriever,
        split=split,
        seed=seed,
        measures=measures,
        folds=folds.get("folds"),
        fold=folds.get("fold", 0),
        **options,
    )
    arguments = {"collection": collection, **folds}
    return as_evaluation(found, name=name, model=retriever, arguments=arguments, split=split, seed=seed)


def as_evaluation(
    found: Mapping[str, Any], *, name: str, model: str, arguments: Mapping[str, Any], split: str, seed: int
) -> Evaluation:
    """Scored rankings in the form of all evaluations.

    Args:
        found: `queries` (texts by id), `rankings` and `scores` (a dict of measures for each query, of which
            the first is the metric).
        name, model, arguments, split, seed: are recorded.
    """
    measures = list(next(iter(found["scores"].values())))
    scores = {query: [values[measures[0]]] for query, values in found["scores"].items()}
    means = {key: float(np.mean([one[key] for one in found["scores"].values()])) for key in measures}
    return Evaluation(
        name=name,
        model=model,
        environment="collection",
        environment_args=arguments,
        split=split,
        seed=seed,
        temperature=0.0,
        samples=1,
        metric=measures[0],
        accuracy=accuracy_interval([score for (score,) in scores.values()]),
        pass_at={},
        avg_at={},
        rewards=means,
        length=0.0,
        truncated=0.0,
        invalid=0,
        breakdown={},
        scores=scores,
        completions=[
            {
                "task_id": query,
                "prompt": text,
                "completion": " ".join(found["rankings"].get(query, ())[:SHOWN]),
                "score": scores[query][0],
                **{f"rewards/{key}": value for key, value in found["scores"][query].items()},
            }
            for query, text in found["queries"].items()
        ],
    )


def agreement(
    first: Sequence[Evaluation], second: Sequence[Evaluation], reward: str | None = None
) -> dict[str, Any]:
    """Kendall's tau between the orders of the same systems on two sets of tasks (TREC DL 2023).

    Args:
        first, second: evaluations on one and on the other set; systems are matched by `model`.
        reward: by which systems are ordered; None: the metric.

    Returns `systems` (name, and both means), `tau` (tau-b) and `p`.

    Raises:
        UserError: a set has a system twice, or they have fewer than two in common.
    """
    means = [_means(evaluations, reward) for evaluations in (first, second)]
    common = [model for model in means[0] if model in means[1]]
    if len(common) < 2:
        raise UserError(f"the leaderboards have {len(common)} systems in common: Kendall's tau needs two")
    a, b = ([mean[model] for model in common] for mean in means)
    tau, p = kendall_tau(a, b)
    systems = sorted(zip(common, a, b, strict=True), key=lambda row: -row[1])
    return {"systems": systems, "tau": tau, "p": p}


def _means(evaluations: Sequence[Evaluation], reward: str | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in evaluations:
        if one.model in found:
            raise UserError(f"{one.model} is twice in a leaderboard")
        scores = [np.mean(scores) for scores in scores_of(one, reward).values() if scores]
        found[one.model] = float(np.mean(scores)) if scores else float("nan")
    if bad := [model for model, mean in found.items() if not np.isfinite(mean)]:
        raise UserError(f"{bad[0]} has no valid score")
    return found
