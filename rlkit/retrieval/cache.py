"""Cache of search indexes and document trees, built once and shared by all processes of a machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock

from rlkit.files import atomic_write, cache_directory
from rlkit.retrieval.collections.base import Collection
from rlkit.words import are_plain_words

# Hashing an entire corpus would cost a pass over millions of documents. The first ones are enough to
# distinguish collections that share a name.
NUM_HASHED_DOCUMENTS = 100
WORDS_VERSION = 2  # of `rlkit.words.keywords`; in version 1, they were the matches of `\w+` in all languages


@contextmanager
def locked_cache_path(name: str) -> Iterator[Path]:
    """Yield the cache path of this name under a file lock, so that one process builds while others wait."""
    path = cache_directory() / "search" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield path


def collection_digest(collection: Collection, *settings: object, by_words: bool = False) -> str:
    """Return 16 hexadecimal digits that identify a collection and the settings it is processed with.

    If it is processed by its words, the version of their definition counts where it matters.
    """
    first = "".join(f"{document}" for document in islice(collection.documents(), NUM_HASHED_DOCUMENTS))
    if by_words and not are_plain_words(first):
        settings += (f"words {WORDS_VERSION}",)
    key = " ".join(map(str, (collection.name, collection.source, first, *settings)))
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    atomic_write(path, json.dumps(content, indent=1))
