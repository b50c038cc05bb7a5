"""Shared code of the retrieval benchmarks: score systems query by query, and test their differences."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlkit.evaluation import paired_permutation_test
from rlkit.evaluation.statistics import holm_correction
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.evaluate import evaluate_retriever

Scores = Mapping[str, Mapping[str, float]]  # value of each measure, by query


def score(
    retriever: str, collection: str, measures: Sequence[str], split: str = "test", n: int | None = None
) -> Scores:
    """Return the value of each measure for each query of a split.

    Args:
        retriever: Name of the retriever (`rlkit.retrieval.retrievers`).
        collection: Name of the collection.
        measures: Names of measures, such as "rr@10".
        split: Split of the queries.
        n: Maximum number of queries; None for all.
    """
    loaded = load_collection(collection)
    return evaluate_retriever(loaded, retriever, split=split, n=n, measures=measures)["scores"]


def summarize(systems: Mapping[str, Sequence[Scores]], measures: Sequence[str]) -> dict:
    """Return the mean of each measure for each system, over all seeds and of each seed.

    Args:
        systems: Scores of each seed by system; a system without randomness has one.
        measures: Names of the measures.
    """
    rows = {}
    for system, by_seed in systems.items():
        means = {measure: [float(mean_of(scores, measure)) for scores in by_seed] for measure in measures}
        rows[system] = {
            measure: {
                "mean": round(sum(values) / len(values), 4),
                "seeds": [round(value, 4) for value in values],
            }
            for measure, values in means.items()
        }
    return rows


def mean_of(scores: Scores, measure: str) -> float:
    """Return the mean of a measure over the queries."""
    return sum(values[measure] for values in scores.values()) / len(scores)


def mean_by_document(scores: Scores, collection: str, split: str = "test") -> Scores:
    """Return the mean scores of the queries of each document.

    Queries for the same document resemble each other: they are not independent samples for a test.

    Args:
        scores: Value of each measure, by query.
        collection: Name of the collection.
        split: Split of the queries.
    """
    queries_by_document: dict[str, list[str]] = {}
    for query, grades in load_collection(collection).judged(split).items():
        if query in scores:
            queries_by_document.setdefault(min(grades), []).append(query)
    return {
        document: mean_values([scores[query] for query in queries])
        for document, queries in queries_by_document.items()
    }


def mean_values(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each measure over rows, at least one."""
    return {measure: sum(row[measure] for row in rows) / len(rows) for measure in rows[0]}


def compare_pairs(
    systems: Mapping[str, Sequence[Scores]], measure: str, pairs: Sequence[tuple[str, str]]
) -> dict:
    """Return the difference in a measure of each pair of systems, and its p value, corrected by Holm.

    A query's score is its mean over the seeds, because the seeds share the queries: they are not independent
    samples. So p says nothing about other seeds. The test is the paired permutation test over the queries.

    Args:
        systems: Scores of each seed by system.
        measure: Name of the measure.
        pairs: Pairs of a baseline and the system to compare with it.
    """
    means = {
        system: {
            query: sum(scores[query][measure] for scores in by_seed) / len(by_seed) for query in by_seed[0]
        }
        for system, by_seed in systems.items()
    }
    differences, p_values = [], []
    for baseline, system in pairs:
        queries = list(means[baseline])
        before, after = ([means[name][query] for query in queries] for name in (baseline, system))
        differences.append(round((sum(after) - sum(before)) / len(queries), 4))
        p_values.append(paired_permutation_test(before, after))
    corrected = holm_correction(p_values)
    return {
        f"{system} against {baseline}": {"difference": difference, "corrected_p": round(float(p), 5)}
        for (baseline, system), difference, p in zip(pairs, differences, corrected, strict=True)
    }


def save(result: dict, path: Path) -> None:
    """Write the result of a benchmark and print its means and tests."""
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1, ensure_ascii=False))
