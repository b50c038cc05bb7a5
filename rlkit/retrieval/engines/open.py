"""Open search engines by name: BM25 over a generated world, an index folder, or a server."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rlkit.errors import UserError, check_arguments
from rlkit.retrieval.cache import NUM_HASHED_DOCUMENTS, locked_cache_path
from rlkit.retrieval.collections.world import World
from rlkit.retrieval.documents import SearchEngine
from rlkit.retrieval.engines.index import build_index, open_index
from rlkit.retrieval.engines.remote import Remote


def open_engine(name: str, world: World | None, arguments: Mapping[str, Any], topk: int = 1) -> SearchEngine:
    """Open a search engine. The index of a world is built on first use and cached. A server must be up.

    Args:
        name: "bm25" (with a world), an index folder, or the URL of a server.
        world: World that the questions are about, or None if they come from a dataset. An index folder must
            have the passages of this world.
        arguments: Keyword arguments of `Remote`.
        topk: Number of documents of later searches, which the server must allow.

    Raises:
        UserError: The engine does not exist or cannot be opened, or its passages are not the world's.
        UnavailableError: The server does not answer.
    """
    if name.startswith(("http://", "https://")):
        check_arguments(Remote, arguments)
        remote = Remote(name, **arguments)
        remote.probe(topk)  # a server that is down is noticed before a model is loaded
        return remote
    if arguments:
        raise UserError(f"engine_args are for a server or a simulated engine; {name} takes none")
    if name == "bm25" and world is not None:
        return open_index(cached_world_index(world, name))
    return _open_folder(name, world)


def _open_folder(name: str, world: World | None) -> SearchEngine:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no engine {name!r}; use bm25, an index folder, or the URL of a server")
    engine: Any = open_index(folder)
    if world is not None and engine.documents[0] != world.passage(0):
        corpus = f"world:{world.size}:{world.seed}"
        raise UserError(
            f"{name} is not an index of this world's passages: build one with `rlkit index {corpus}`"
        )
    return engine


def cached_world_index(world: World, engine: str) -> Path:
    """Return the cached index folder of a world; the first process builds it while others wait."""
    # The passages are in the key: an older version of rlkit may have cached other ones for the same world.
    first = "".join(f"{passage}" for passage in islice(world.passages(), NUM_HASHED_DOCUMENTS))
    digest = hashlib.sha256(first.encode()).hexdigest()[:12]
    with locked_cache_path(f"world-{world.seed}-{world.size}-{digest}-{engine}") as folder:
        if not folder.exists():
            build_index(world.passages(), folder, engine)
        return folder
