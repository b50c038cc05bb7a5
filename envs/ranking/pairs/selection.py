"""Select the documents of a collection that training rows are written for, and examples of its queries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.documents import passage_text
from rlkit.retrieval.queries import documents_by_id, judged_queries


class QueryExample(NamedTuple):
    """A document and a training query that it answers, as a prompt shows them.

    Attributes:
        document: Id of the document.
        text: Title and text of the document.
        query: Text of the query.
    """

    document: str
    text: str
    query: str


def test_documents(collection: Collection) -> frozenset[str]:
    """Return the ids of the documents that are judged in the test split, or are its queries."""
    if "test" not in collection.qrels:
        raise UserError(f"{collection.name} has no test split: remove --without_test_documents")
    judged = collection.qrels["test"]
    names = {name for grades in judged.values() for name in grades}
    return frozenset(names | judged.keys() if collection.drop_query_id else names)


def sample_ids(ids: Iterable[str], n: int | None, seed: int) -> set[str]:
    """Return `n` of the ids, or all if n is None or there are fewer, whatever their order.

    A larger `n` adds ids to those of a smaller one.
    """
    return set(sorted(ids, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())[:n])


def choose_examples(collection: Collection, num_examples: int, seed: int) -> list[QueryExample]:
    """Return random training queries, each with its best judged document. No document repeats.

    Args:
        collection: Collection with training judgments.
        num_examples: Number of examples.
        seed: Random seed. More examples of the same seed begin with the same ones.

    Raises:
        UserError: The collection has no training judgments, or too few.
    """
    if not num_examples:
        return []
    if "train" not in collection.qrels:
        raise UserError(
            f"{collection.name} has no training judgments to take examples from: set --examples 0"
        )
    queries = judged_queries(collection, "train", None, seed)
    documents = documents_by_id(collection, (query.relevant[0] for query in queries))
    examples: dict[str, QueryExample] = {}
    for query in queries:
        name = query.relevant[0]
        if name in documents and len(examples) < num_examples:
            examples.setdefault(name, QueryExample(name, passage_text(documents[name]), query.text))
    if len(examples) < num_examples:
        raise UserError(
            f"{collection.name} has {len(examples)} documents with a training query: set --examples to "
            f"{len(examples)} or fewer"
        )
    return list(examples.values())
