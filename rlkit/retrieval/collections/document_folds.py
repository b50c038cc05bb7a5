"""Cross-validation folds by document: test queries ask for documents that no training query asks for."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Qrels, merge_splits


def split_by_document(
    qrels: Mapping[str, Qrels], num_folds: int, fold: int, *, seed: int = 0, seen_dev: float = 0.0
) -> dict[str, Qrels]:
    """Return the judgments of all queries with new splits, which are made by relevant document.

    The documents that are relevant to some query are divided into folds. Fold `fold` becomes "test", the next
    one "dev", all others "train", and a query goes to the split of its relevant documents. Queries whose
    relevant documents are in several splits, or that have none, are left out.

    Only relevant documents count: a training query keeps its judgments of non-relevant documents, which may
    be relevant to a test query.

    Args:
        qrels: Grades by split, query and document. The splits are merged.
        num_folds: Number of folds, at least 2. With two folds there is no "dev".
        fold: Index of the test fold.
        seed: Seed of the division into folds.
        seen_dev: Share of the training queries that becomes "dev" instead of the next fold. Each of their
            relevant documents is also relevant to a remaining training query.

    Raises:
        UserError: An argument is out of range, or a split has no queries.
    """
    merged = merge_splits(qrels)
    relevant = {
        query: [name for name, grade in grades.items() if grade > 0] for query, grades in merged.items()
    }
    documents = _hash_order({name for names in relevant.values() for name in names}, seed)
    if not 2 <= num_folds <= len(documents):
        raise UserError(
            f"folds must be an integer from 2 to {len(documents)} (the number of relevant documents), not "
            f"{num_folds}"
        )
    if not 0 <= fold < num_folds:
        raise UserError(f"fold must be an integer from 0 to {num_folds - 1}, not {fold}")
    if not 0 <= seen_dev < 1:
        raise UserError(f"seen_dev must be at least 0 and below 1, not {seen_dev}")
    split_of_fold = {fold: "test"}
    if num_folds > 2 and not seen_dev:
        split_of_fold[(fold + 1) % num_folds] = "dev"
    split_of_document = {name: split_of_fold.get(i % num_folds, "train") for i, name in enumerate(documents)}
    queries: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for query, names in relevant.items():
        splits = {split_of_document[name] for name in names}
        if len(splits) == 1:
            queries[splits.pop()].append(query)
    if seen_dev:
        queries["dev"] = _sample_of_seen(queries["train"], relevant, seen_dev, seed)
        moved = set(queries["dev"])
        queries["train"] = [query for query in queries["train"] if query not in moved]
    elif num_folds == 2:
        del queries["dev"]
    if empty := [split for split, names in queries.items() if not names]:
        raise UserError(f"no query is left for {' and '.join(empty)}; choose other folds, or another seed")
    return {split: {query: merged[query] for query in names} for split, names in queries.items()}


def _sample_of_seen(
    queries: Iterable[str], relevant: Mapping[str, Iterable[str]], share: float, seed: int
) -> list[str]:
    """Return a share of the queries. Each of their relevant documents is also one of a remaining query."""
    order = _hash_order(queries, seed)
    num_queries = Counter(name for query in order for name in relevant[query])  # of each document
    sample: list[str] = []
    for query in order:
        if len(sample) >= share * len(order):
            break
        if all(num_queries[name] > 1 for name in relevant[query]):
            num_queries.subtract(relevant[query])
            sample.append(query)
    return sample


def _hash_order(names: Iterable[str], seed: int) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
