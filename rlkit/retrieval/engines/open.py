"""Engines by name: over the passages of a generated world, or an index folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rlkit.errors import UserError, check_arguments
from rlkit.retrieval.cache import cached
from rlkit.retrieval.collections.world import World
from rlkit.retrieval.documents import SearchEngine
from rlkit.retrieval.engines.index import build_index, open_index
from rlkit.retrieval.engines.remote import Remote


def open_engine(name: str, world: World | None, arguments: Mapping[str, Any]) -> SearchEngine:
    """Open "bm25" over a world, the folder of an index, or the URL of a server.

    A world's index is made on first use.

    Args:
        name: which.
        world: where the questions come from; None: a data set. An index must be of this world.
        arguments: keywords of `Remote`.

    Raises:
        UserError: no such engine, it cannot be opened, or it has other passages.
    """
    if name.startswith(("http://", "https://")):
        check_arguments(Remote, arguments)
        return Remote(name, **arguments)
    if arguments:
        raise UserError(f"engine_args are of a server or of a simulated engine; {name} takes none")
    if name == "bm25" and world is not None:
        return open_index(world_index(world, name))
    return _open_folder(name, world)


def _open_folder(name: str, world: World | None) -> SearchEngine:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no engine {name!r}: take bm25, the folder of an index, or a server's URL")
    engine: Any = open_index(folder)
    if world is not None and engine.documents[0] != world.passage(0):
        made = f"rlkit index world:{world.size}:{world.seed}"
        raise UserError(f"{name} is no index of this world's passages: {made} makes one")
    return engine


def world_index(world: World, engine: str) -> Path:
    """The index of a world's passages in the cache; the first process that asks builds it, others wait."""
    # An index that an older version of the world left there is another one's: the passages name it.
    first = "".join(f"{passage}" for passage in islice(world.passages(), 100))
    digest = hashlib.sha256(first.encode()).hexdigest()[:12]
    with cached(f"world-{world.seed}-{world.size}-{digest}-{engine}") as folder:
        if not folder.exists():
            build_index(world.passages(), folder, engine)
        return folder
