"""Indexes and trees that are built once and kept, for all processes of a machine."""

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

FIRST = 100  # documents that tell collections of one name apart


@contextmanager
def cached(name: str) -> Iterator[Path]:
    """Yield the path of that name in the cache, locked: the first process builds it, the others wait."""
    path = cache_directory() / "search" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield path


def collection_digest(collection: Collection, *settings: object) -> str:
    """Return 16 hexadecimal digits that change with a collection and with how it is processed."""
    first = "".join(f"{document}" for document in islice(collection.documents(), FIRST))
    key = " ".join(map(str, (collection.name, collection.source, first, *settings)))
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    atomic_write(path, json.dumps(content, indent=1))
