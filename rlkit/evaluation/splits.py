"""Splits that separate interpolation from extrapolation to test tasks unlike the training tasks.

The methods are those of arXiv 2204.11447. Tasks are compared by the embeddings of their prompts, so the
splits work for every environment.

- `restrain` ("ReSTrain", for few test tasks) changes the training set. For interpolation it is the nearest
  training tasks of each test task. For extrapolation it is equally many training tasks, the farthest from all
  test tasks.
- `resttest` ("ReSTTest", for many test tasks) changes the test set. Training and test tasks are clustered
  together. For each cluster, the training tasks of all other clusters are the training set. Test tasks of the
  other clusters measure interpolation, and those of the cluster itself measure extrapolation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlkit.environment import Environment
from rlkit.errors import UserError, nearest

if TYPE_CHECKING:
    import datasets

METHODS = ("restrain", "resttest")
Vectors = NDArray[np.floating]


@dataclass(frozen=True)
class Fold:
    """Training and test tasks of a fold.

    Attributes:
        name: "interpolation" or "extrapolation", followed by "-I" for cluster I.
        train: Row numbers of the training tasks.
        test: Row numbers of the test tasks.
    """

    name: str
    train: NDArray[np.intp]
    test: NDArray[np.intp]


def split_tasks(
    train: Vectors, test: Vectors, method: str = "resttest", *, k: int = 5, size: int = 0, seed: int = 0
) -> list[Fold]:
    """Split training and test tasks by their embeddings.

    Args:
        train: Embeddings of the training tasks, one row each; compared by cosine similarity.
        test: Embeddings of the test tasks, one row each.
        method: "restrain" or "resttest".
        k: Number of clusters for resttest; number of nearest training tasks per test task for restrain.
        size: Maximum number of training tasks in each set of restrain; 0 for no maximum.
        seed: Seed of the clustering.

    Returns:
        Two folds for restrain. Two folds per cluster for resttest, none for a cluster without training or
        test tasks.

    Raises:
        ValueError: If the method is unknown, there are no tasks, or there are fewer training tasks than `k`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: use restrain or resttest")
    if not len(train) or not len(test) or not 1 <= k <= len(train):
        raise ValueError(f"cannot split {len(train)} training and {len(test)} test tasks with k = {k}")
    train, test = (_unit(x) for x in (train, test))
    return _restrain(train, test, k, size) if method == "restrain" else _resttest(train, test, k, seed)


def _unit(vectors: Vectors) -> Vectors:
    vectors = np.asarray(vectors, dtype=float)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _restrain(train: Vectors, test: Vectors, k: int, size: int) -> list[Fold]:
    similarity = test @ train.T  # (test tasks, training tasks)
    neighbors = np.argsort(-similarity, axis=1, kind="stable")
    # Rank by rank (all nearest, then all second nearest), so that `size` cuts all test tasks alike.
    order = list(dict.fromkeys(neighbors[:, :k].T.ravel().tolist()))
    near = np.array(order[: size or None], dtype=np.intp)
    not_near = np.setdiff1d(np.arange(len(train)), np.array(order, dtype=np.intp))
    # Farthest first: the distance of a training task is that to its most similar test task.
    far = not_near[np.argsort(similarity[:, not_near].max(0), kind="stable")][: len(near)]
    all_test = np.arange(len(test))
    return [
        Fold("interpolation", np.sort(near), all_test),
        Fold("extrapolation", np.sort(far), all_test),
    ]


def _resttest(train: Vectors, test: Vectors, k: int, seed: int) -> list[Fold]:
    from sklearn.cluster import KMeans

    labels = KMeans(k, n_init=10, random_state=seed).fit_predict(np.concatenate([train, test]))
    train_labels, test_labels = labels[: len(train)], labels[len(train) :]
    folds = []
    for cluster in range(k):
        train_rows = np.flatnonzero(train_labels != cluster)
        inside = np.flatnonzero(test_labels != cluster)
        outside = np.flatnonzero(test_labels == cluster)
        if len(train_rows) and len(inside) and len(outside):
            folds += [
                Fold(f"interpolation-{cluster}", train_rows, inside),
                Fold(f"extrapolation-{cluster}", train_rows, outside),
            ]
    return folds


def label_overlap(train: Iterable[Set[str]], test: Sequence[Set[str]]) -> float:
    """Return the share of test tasks that have at least one relevant document in common with a training task.

    Args:
        train: Ids of the relevant documents of each training task.
        test: Ids of the relevant documents of each test task.
    """
    train_labels = set().union(*train)
    return sum(bool(labels & train_labels) for labels in test) / len(test) if test else 0.0


def load_tasks(
    environment: Environment,
    split: str,
    n: int | None,
    seed: int,
    fold: Mapping[str, Set[str]] | None = None,
) -> datasets.Dataset:
    """Return the first `n` tasks of a split, or of a fold of the split.

    Args:
        environment: Environment that generates or loads the tasks.
        split: Split of the tasks.
        n: Number of tasks; None for the environment's own number.
        seed: Seed of the tasks.
        fold: Task ids by split, from `read_fold`; None for all tasks. A split that it lacks is not filtered.

    Raises:
        UserError: If there are no tasks, or they have no prompt or id.
    """
    # The first n tasks of a fold may be anywhere in the split, so filter before cutting.
    tasks = environment.tasks(split, n if fold is None else None, seed)
    if not hasattr(tasks, "column_names"):
        raise UserError(
            f"tasks() of {environment.id} must return a datasets.Dataset, not {type(tasks).__name__}"
        )
    for column in ("prompt", "task_id"):
        if column not in tasks.column_names and len(tasks):
            raise UserError(f"the tasks of {environment.id} have no column {column!r}")
    if fold is not None and split in fold:
        tasks = tasks.select([i for i, name in enumerate(tasks["task_id"]) if name in fold[split]])
    if not len(tasks):
        raise UserError(f"{environment.id} has no tasks in the split {split!r}")
    return tasks.select(range(len(tasks) if n is None else min(len(tasks), n)))


def read_fold(fold: str, environment: Environment) -> dict[str, set[str]]:
    """Return the task ids of a fold by split.

    Args:
        fold: "FILE:NAME", a file of `scripts/split_tasks.py` and the name of a fold in it.
        environment: Environment whose tasks were split.

    Raises:
        UserError: If the file or fold does not exist, or belongs to another environment.
    """
    path, _, name = fold.rpartition(":")
    if not path:
        raise UserError(f"fold must be FILE:NAME, not {fold!r}; create FILE with scripts/split_tasks.py")
    task_ids = None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        environment_id, folds = content["environment"], content["folds"]
        if name in folds:
            task_ids = {split: set(folds[name][split]) for split in ("train", "test")}
    except OSError as error:
        raise UserError(f"cannot read the file of fold {fold!r}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not contain folds: create the file with scripts/split_tasks.py"
        ) from error
    if environment_id != environment.id:
        raise UserError(f"{path} has folds of {environment_id}, not of {environment.id}")
    if task_ids is None:
        raise UserError(f"{path} has no fold {name!r}{nearest(name, folds)}; it has {', '.join(folds)}")
    return task_ids
