"""Write collections in BEIR's layout, for scripts that make one from other data."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlkit.errors import UserError, check_integer
from rlkit.files import atomic_folder, atomic_write
from rlkit.retrieval.collections.base import Collection, Qrels
from rlkit.retrieval.documents import Document

SPLITS = ("train", "dev", "test")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a scratch folder, which becomes `path` if the block succeeds.

    Raises:
        UserError: The path exists.
    """
    if path.exists():
        raise UserError(f"{path} exists; delete it or write to another folder")
    with atomic_folder(path) as folder:
        yield folder


def write_beir(
    folder: Path, documents: Iterable[Document], queries: Mapping[str, str], qrels: Mapping[str, Qrels]
) -> None:
    """Write corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv in a folder.

    Args:
        folder: Folder to write to.
        documents: Documents.
        queries: Query texts by id.
        qrels: Grades by split, query and document.
    """
    corpus = ({"_id": document.id, "title": document.title, "text": document.text} for document in documents)
    atomic_write(folder / "corpus.jsonl", _jsonl(corpus))
    atomic_write(
        folder / "queries.jsonl", _jsonl({"_id": name, "text": text} for name, text in queries.items())
    )
    for split, judged in qrels.items():
        lines = ["query-id\tcorpus-id\tscore\n"]
        for query, grades in judged.items():
            lines += [f"{query}\t{document}\t{grade}\n" for document, grade in grades.items()]
        atomic_write(folder / "qrels" / f"{split}.tsv", "".join(lines))


def check_fits_beir(collection: Collection) -> None:
    """Raise UserError if BEIR's layout cannot hold how a collection is judged."""
    properties = {
        "passages that are judged by document": collection.document_of is not None,
        "separate binary judgments": bool(collection.binary),
        "excluded documents": bool(collection.excluded),
        "minimum relevant grades": bool(collection.min_grades),
        "documents to drop for the id of their query": collection.drop_query_id,
    }
    unsupported = [name for name, is_used in properties.items() if is_used]
    if unsupported:
        raise UserError(
            f"{collection.name} has {' and '.join(unsupported)}, which BEIR's layout cannot hold; use "
            "another collection"
        )


def split_of(group: str) -> str:
    """Return the split of a group of documents: train for 60% of all names, dev for 15%, test for 25%.

    It depends on a hash of the name alone, so adding groups leaves existing splits unchanged.
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
    if max_documents is not None:
        check_integer("documents", max_documents, 1)
        if max_documents < len(documents):
            sample = set(random.Random(0).sample(sorted(documents), max_documents))
            documents = {name: text for name, text in documents.items() if name in sample}
    texts: dict[str, str] = {}
    qrels: dict[str, Qrels] = {split: {} for split in SPLITS}
    for query, document_ids in queries.items():
        relevant = [document_id for document_id in dict.fromkeys(document_ids) if document_id in documents]
        query_splits = {splits[document_id] for document_id in relevant}
        if len(query_splits) != 1:
            continue
        (split,) = query_splits
        query_id = f"q{len(texts)}"
        texts[query_id] = query
        qrels[split][query_id] = dict.fromkeys(relevant, 1)
    num_queries = {split: len(judged) for split, judged in qrels.items()}
    if not all(num_queries.values()):
        counts = ", ".join(f"{number} {split}" for split, number in num_queries.items())
        raise UserError(f"each split needs queries, but there are {counts}; use more documents")
    with new_folder(folder) as scratch:
        write_beir(scratch, (Document(name, "", text) for name, text in documents.items()), texts, qrels)
    return num_queries


def _jsonl(rows: Iterable[Mapping[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
