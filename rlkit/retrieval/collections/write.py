"""Write collections in BEIR's layout, for scripts that make one from other data."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rlkit.errors import UserError, check_integer
from rlkit.files import atomic_write

SPLITS = ("train", "dev", "test")


def split_of(group: str) -> str:
    """Return the split of a group of documents: train for 60% of all names, dev for 15%, test for 25%.

    It depends on a hash of the name alone, so that further groups change the split of none.
    """
    percent = zlib.crc32(group.encode()) % 100
    if percent < 60:
        return "train"
    return "dev" if percent < 75 else "test"


def write_collection(
    folder: Path,
    documents: Mapping[str, str],
    queries: Mapping[str, Sequence[str]],
    splits: Mapping[str, str],
    max_documents: int | None = None,
) -> dict[str, int]:
    """Write a collection and return its number of queries by split.

    A query whose documents are in several splits is left out: one of them would be an answer in training, and
    another one in the test. All documents are in the corpus, whatever their split.

    Args:
        folder: Folder to write to, which must not exist.
        documents: Text of each document by id.
        queries: Ids of the relevant documents by query.
        splits: Split of each document by id.
        max_documents: Maximum number of documents; with more, a random sample of them is written.

    Raises:
        UserError: The folder exists, or a split has no queries.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; delete it or write to another folder")
    if max_documents is not None:
        check_integer("documents", max_documents, 1)
        if max_documents < len(documents):
            sample = set(random.Random(0).sample(sorted(documents), max_documents))
            documents = {name: text for name, text in documents.items() if name in sample}
    query_rows: list[dict[str, str]] = []
    judgments: dict[str, list[str]] = {split: [] for split in SPLITS}
    num_queries = dict.fromkeys(SPLITS, 0)
    for query, document_ids in queries.items():
        relevant = [document_id for document_id in dict.fromkeys(document_ids) if document_id in documents]
        query_splits = {splits[document_id] for document_id in relevant}
        if len(query_splits) != 1:
            continue
        (split,) = query_splits
        query_id = f"q{len(query_rows)}"
        query_rows.append({"_id": query_id, "text": query})
        judgments[split] += [f"{query_id}\t{document_id}\t1\n" for document_id in relevant]
        num_queries[split] += 1
    if not all(num_queries.values()):
        counts = ", ".join(f"{number} {split}" for split, number in num_queries.items())
        raise UserError(f"each split needs queries, but there are {counts}; use more documents")
    rows = ({"_id": document_id, "text": text} for document_id, text in documents.items())
    atomic_write(folder / "corpus.jsonl", _jsonl(rows))
    atomic_write(folder / "queries.jsonl", _jsonl(query_rows))
    for split, lines in judgments.items():
        atomic_write(folder / "qrels" / f"{split}.tsv", "query-id\tcorpus-id\tscore\n" + "".join(lines))
    return num_queries


def _jsonl(rows: Iterable[Mapping[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
