"""Graded lists: four passages for each training query of a generated collection, with known grades.

    query  Abbey put up by railway engineers used today for a museum
    3      Tresopin: Tresopin is a chapel. A railway company paid for it … Today it holds a museum. …
    2      Deralon: This chapel is well known. Today it holds offices. A railway company paid for it …
    1      Lenozin: Lenozin is a tower. It was built by a railway company. Today it holds the town council. …
    0      Fozomos: This belfry is well known. … It was built by fishermen. Today it holds a hospital. …

SyCL (arXiv 2503.23239) has a language model write such lists for real queries. Here, the passages follow the
collection's templates, about buildings outside the collection, so the grades are exact
(`rlkit.retrieval.collections.generated.Buildings.graded_documents`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from rlkit.envs.ranking.pairs.rows import PairRow
from rlkit.errors import UserError
from rlkit.retrieval.collections.generated import QUERIES, Buildings
from rlkit.retrieval.collections.load import parse_size_and_seed
from rlkit.retrieval.documents import passage_text

GRADED = "graded"


def graded(collection: str, seed: int) -> Iterator[PairRow]:
    """Return an iterator over one row per training query, with four passages and targets 3, 2, 1 and 0.

    Args:
        collection: Name of a generated collection.
        seed: Random seed. A row depends on it and the query alone.

    Raises:
        UserError: The collection is not a generated one.
    """
    if not collection.startswith("generated:"):
        raise UserError(
            f"the source {GRADED} needs a collection generated:SIZE:SEED, not {collection!r}; for others, a "
            "model writes rows: scripts/write_pairs.py"
        )
    return _rows(Buildings(*parse_size_and_seed(collection)), seed)


def _rows(buildings: Buildings, seed: int) -> Iterator[PairRow]:
    for number in range(QUERIES["train"]):
        query, _ = buildings.query("train", number)
        documents = buildings.graded_documents(number, seed)
        best = max(documents)[1].id
        random.Random(f"{seed} {GRADED} {number}").shuffle(documents)
        yield PairRow(
            f"{GRADED}/train-{number}",
            query,
            tuple(passage_text(document) for _, document in documents),
            tuple(float(grade) for grade, _ in documents),
            GRADED,
            best,
            passage_documents=tuple(document.id for _, document in documents),
        )
