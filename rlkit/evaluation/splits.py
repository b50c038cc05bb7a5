"""Interpolation and extrapolation: how far are test tasks from those that were learned (arXiv 2204.11447).

Tasks are compared by the embeddings of their prompts, so the splits are for any environment.

- `restrain` ("ReSTrain", few test tasks): for each test task the training tasks that are most like it are
  the training set for interpolation; as many that are least like any test task are the one for extrapolation.
- `resttest` ("ReSTTest", many): all are clustered; of each cluster, the training tasks of the other clusters
  are learned, the test tasks of the others are interpolation, those of the cluster itself are extrapolation.
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
    """What to train on and what to test on, as row numbers.

    Attributes:
        name: "interpolation" or "extrapolation", with "-I" for cluster I.
        train, test: rows.
    """

    name: str
    train: NDArray[np.intp]
    test: NDArray[np.intp]


def split_queries(
    train: Vectors, test: Vectors, method: str = "resttest", *, k: int = 5, size: int = 0, seed: int = 0
) -> list[Fold]:
    """Split training and test tasks by their embeddings.

    Args:
        train, test: one row for each task; compared by cosine.
        method: "restrain" or "resttest".
        k: of resttest, clusters; of restrain, nearest training tasks of each test task.
        size: of restrain: training tasks of either set at most; 0: as many as the nearest ones are.
        seed: of the clusters.

    Returns two folds for restrain, two for each cluster for resttest; a cluster without training or test
    tasks has none.

    Raises:
        ValueError: no such method, no tasks, or more clusters than tasks.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}: take restrain or resttest")
    if not len(train) or not len(test) or not 1 <= k <= len(train):
        raise ValueError(f"{len(train)} training and {len(test)} test tasks cannot be split with k = {k}")
    train, test = (_unit(x) for x in (train, test))
    return _restrain(train, test, k, size) if method == "restrain" else _resttest(train, test, k, seed)


def _unit(vectors: Vectors) -> Vectors:
    vectors = np.asarray(vectors, dtype=float)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _restrain(train: Vectors, test: Vectors, k: int, size: int) -> list[Fold]:
    alike = test @ train.T
    nearest = np.argsort(-alike, axis=1, kind="stable")
    # Rank by rank, so that with a size every test task keeps its nearest ones first.
    order = list(dict.fromkeys(nearest[:, :k].T.ravel().tolist()))
    near = np.array(order[: size or None], dtype=np.intp)
    rest = np.setdiff1d(np.arange(len(train)), np.array(order, dtype=np.intp))
    far = rest[np.argsort(alike[:, rest].max(0), kind="stable")][: len(near)]
    everything = np.arange(len(test))
    return [
        Fold("interpolation", np.sort(near), everything),
        Fold("extrapolation", np.sort(far), everything),
    ]


def _resttest(train: Vectors, test: Vectors, k: int, seed: int) -> list[Fold]:
    from sklearn.cluster import KMeans

    labels = KMeans(k, n_init=10, random_state=seed).fit_predict(np.concatenate([train, test]))
    of_train, of_test = labels[: len(train)], labels[len(train) :]
    folds = []
    for i in range(k):
        learned = np.flatnonzero(of_train != i)
        inside, outside = np.flatnonzero(of_test != i), np.flatnonzero(of_test == i)
        if len(learned) and len(inside) and len(outside):
            folds += [
                Fold(f"interpolation-{i}", learned, inside),
                Fold(f"extrapolation-{i}", learned, outside),
            ]
    return folds


def label_overlap(train: Iterable[Set[str]], test: Sequence[Set[str]]) -> float:
    """The share of test tasks that share one relevant document or more with a training task."""
    known = set().union(*train)
    return sum(bool(labels & known) for labels in test) / len(test) if test else 0.0


def load_tasks(
    environment: Environment,
    split: str,
    n: int | None,
    seed: int,
    fold: Mapping[str, Set[str]] | None = None,
) -> datasets.Dataset:
    """Return the first `n` tasks of a split, of a fold alone where one is given.

    Args:
        environment: makes the tasks.
        split, n, seed: see `Environment.tasks`.
        fold: task ids by split, as `read_fold` returns them; None: all tasks.

    Raises:
        UserError: there are no tasks, or they lack a prompt or an id.
    """
    tasks = environment.tasks(split, n if fold is None else None, seed)
    for column in ("prompt", "task_id"):
        if column not in tasks.column_names and len(tasks):
            raise UserError(f"the tasks of {environment.id} have no column {column!r}")
    if fold is not None and split in fold:
        tasks = tasks.select([i for i, name in enumerate(tasks["task_id"]) if name in fold[split]])
    if not len(tasks):
        raise UserError(f"{environment.id} has no tasks in the split {split!r}")
    return tasks.select(range(min(len(tasks), len(tasks) if n is None else n)))


def read_fold(fold: str, environment: Environment) -> dict[str, set[str]]:
    """Return the task ids of a fold by split.

    Args:
        fold: "FILE:NAME", a file of `scripts/split_tasks.py` and the name of a fold.
        environment: that the fold was made of.

    Raises:
        UserError: no such file or fold, or a fold of another environment.
    """
    path, _, name = fold.rpartition(":")
    if not path:
        raise UserError(f"fold must be FILE:NAME, with a file of scripts/split_tasks.py, not {fold!r}")
    try:
        said = json.loads(Path(path).read_text(encoding="utf-8"))
        made_of, folds = said["environment"], said["folds"]
        parts = {split: set(folds[name][split]) for split in ("train", "test")} if name in folds else None
    except OSError as error:
        raise UserError(f"cannot read the fold {fold!r} (FILE:NAME): {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of folds: make one with scripts/split_tasks.py") from error
    if made_of != environment.id:
        raise UserError(f"{path} has folds of {made_of}, not of {environment.id}")
    if parts is None:
        raise UserError(f"{path} has no fold {name!r}{nearest(name, folds)}; it has {', '.join(folds)}")
    return parts
