"""Evaluation of retrievers, and the agreement of two leaderboards."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.errors import UserError
from rlkit.evaluation.result import Evaluation, scores_of
from rlkit.evaluation.statistics import accuracy_interval, kendall_tau
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.evaluate import RUN_PREFIX, evaluate_retriever

MAX_RECORDED = 10  # documents per ranking that are saved in the result
MAX_STEM_LENGTH = 60  # characters; file systems allow 255 bytes


def evaluate_rankings(
    collection: Collection,
    retriever: str,
    *,
    name: str,
    arguments: Mapping[str, Any],
    split: str = "test",
    seed: int = 0,
    **options: Any,
) -> Evaluation:
    """Score a retriever on the judged queries of a collection.

    Args:
        collection: Collection with the queries and judgments.
        retriever: Name of the retriever, as for `rlkit.retrieval.evaluate.evaluate_retriever`.
        name: Name of the result.
        arguments: Name and options of the collection, recorded as `environment_args`.
        split: Split of the queries.
        seed: Seed of the queries.
        options: Other arguments of `evaluate_retriever`.

    Raises:
        UserError: If a name does not exist, or the retriever fails.
    """
    result = evaluate_retriever(collection, retriever, split=split, seed=seed, **options)
    return as_evaluation(result, name=name, model=retriever, arguments=arguments, split=split, seed=seed)


def as_evaluation(
    result: Mapping[str, Any], *, name: str, model: str, arguments: Mapping[str, Any], split: str, seed: int
) -> Evaluation:
    """Convert scored rankings to an `Evaluation`, so that they can be saved, compared and reported.

    Args:
        result: `queries` (query texts by id), `rankings` (document ids by query id) and `scores` (measures by
            query id, of which the first one is the metric); optionally `notes` and `counts`.
        name: Name of the evaluation.
        model: Name of the retriever.
        arguments: Collection and fold, recorded as `environment_args`.
        split: Split of the queries.
        seed: Seed of the queries.
    """
    all_scores = result["scores"]
    measures = list(next(iter(all_scores.values())))
    scores = {query_id: [values[measures[0]]] for query_id, values in all_scores.items()}
    means = {
        measure: float(np.mean([values[measure] for values in all_scores.values()])) for measure in measures
    }
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
                "task_id": query_id,
                "prompt": query,
                "completion": " ".join(result["rankings"].get(query_id, ())[:MAX_RECORDED]),
                "score": scores[query_id][0],
                **{f"rewards/{measure}": value for measure, value in all_scores[query_id].items()},
            }
            for query_id, query in result["queries"].items()
        ],
        notes=list(result.get("notes", ())),
        counts=dict(result.get("counts", {})),
    )


def file_stems(retrievers: Sequence[str]) -> list[str]:
    """Return a distinct file name without suffix for each retriever, such as "dense-runs-a-model"."""
    stems: list[str] = []
    used: set[str] = set()
    for retriever in retrievers:
        name = (
            Path(retriever.removeprefix(RUN_PREFIX)).stem if retriever.startswith(RUN_PREFIX) else retriever
        )
        # Words and digits of all scripts, and no longer than file systems allow.
        stem = re.sub(r"[^\w.]+", "-", name)[-MAX_STEM_LENGTH:].strip("-.") or "retriever"
        number = 1
        # Some file systems ignore case.
        while (candidate := stem if number == 1 else f"{stem}-{number}").lower() in used:
            number += 1
        used.add(candidate.lower())
        stems.append(candidate)
    return stems


def leaderboard_agreement(
    first: Sequence[Evaluation], second: Sequence[Evaluation], reward: str | None = None
) -> dict[str, Any]:
    """Return Kendall's tau between the orders of the same systems on two sets of tasks (TREC DL 2023).

    Args:
        first: Evaluations on the first set of tasks.
        second: Evaluations on the second set; systems are matched by `model`.
        reward: Name of the reward that orders the systems; None for the metric.

    Returns:
        `systems` (tuples of name and both means, best first), `tau` (tau-b) and its `p` value.

    Raises:
        UserError: If a leaderboard has a system twice, or the two have fewer than two systems in common.
    """
    first_means, second_means = _mean_scores(first, reward), _mean_scores(second, reward)
    common = [model for model in first_means if model in second_means]
    if len(common) < 2:
        raise UserError(f"Kendall's tau needs at least 2 systems in both leaderboards, not {len(common)}")
    a, b = ([means[model] for model in common] for means in (first_means, second_means))
    tau, p = kendall_tau(a, b)
    systems = sorted(zip(common, a, b, strict=True), key=lambda row: -row[1])
    return {"systems": systems, "tau": tau, "p": p}


def _mean_scores(evaluations: Sequence[Evaluation], reward: str | None) -> dict[str, float]:
    """Return the mean over tasks of each model's scores."""
    means: dict[str, float] = {}
    for evaluation in evaluations:
        if evaluation.model in means:
            raise UserError(f"{evaluation.model} is in a leaderboard twice")
        task_means = [np.mean(scores) for scores in scores_of(evaluation, reward).values() if scores]
        if not task_means or not np.isfinite(np.mean(task_means)):
            raise UserError(f"{evaluation.model} has no valid score")
        means[evaluation.model] = float(np.mean(task_means))
    return means
