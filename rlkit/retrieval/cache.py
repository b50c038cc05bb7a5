"""Cache of search indexes and document trees, built once and shared by all processes of a machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock

from rlkit.files import atomic_write, cache_directory
from rlkit.models.fingerprint import model_fingerprint
from rlkit.retrieval.collections.base import Collection
from rlkit.words import are_plain_words

# Of a collection with a `source`, which changes with the documents. To hash all of them would cost a pass
# over millions, and the first ones distinguish collections that share a name.
NUM_HASHED_DOCUMENTS = 100
WORDS_VERSION = 2  # of `rlkit.words.keywords`; in version 1, they were the matches of `\w+` in all languages


@contextmanager
def locked_cache_path(name: str) -> Iterator[Path]:
    """Yield the cache path of this name under a file lock, so that one process builds while others wait."""
    path = cache_directory() / "search" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield path


def collection_digest(
    collection: Collection, *settings: object, by_words: bool = False, models: Sequence[str] = ()
) -> str:
    """Return 16 hexadecimal digits that identify a collection and how it is processed.

    Args:
        collection: Collection, which is identified by all of its documents if it has no source.
        *settings: Settings of the processing.
        by_words: Whether it is processed by its words. The version of their definition counts where it
            matters.
        models: Names of the models that process it. They are identified by their files, because a model that
            is retrained in place keeps its name.

    Raises:
        UserError: A model does not exist.
    """
    settings += tuple(map(model_fingerprint, models))
    documents = iter(collection.documents())
    first = "".join(f"{document}" for document in islice(documents, NUM_HASHED_DOCUMENTS))
    if by_words and not are_plain_words(first):
        settings += (f"words {WORDS_VERSION}",)
    key = " ".join(map(str, (collection.name, collection.source, first, *settings)))
    digest = hashlib.sha256(key.encode())
    if collection.source is None:
        for document in documents:
            digest.update(f"{document}".encode())
    return digest.hexdigest()[:16]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    atomic_write(path, json.dumps(content, indent=1))
