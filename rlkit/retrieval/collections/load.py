"""Load a collection by name."""

from __future__ import annotations

from pathlib import Path

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.beir import find_folder, load_beir
from rlkit.retrieval.collections.generated import generate
from rlkit.retrieval.collections.hub import load_bright, load_crumb
from rlkit.retrieval.collections.irds import load_irds
from rlkit.retrieval.collections.t2ranking import find_t2ranking, load_t2ranking


def load_collection(name: str) -> Collection:
    """Load a collection by name; `rlkit.retrieval.collections.base` lists the forms of a name.

    Raises:
        UserError: The collection does not exist, or one of its files is invalid; the message names file and
            line.
    """
    if name.startswith("generated:"):
        return generate(*parse_size_and_seed(name))
    if name.startswith("bright:"):
        return load_bright(name.removeprefix("bright:"))
    if name.startswith("crumb:"):
        return load_crumb(name.removeprefix("crumb:"))
    if name.startswith("ir_datasets:"):
        return load_irds(name.removeprefix("ir_datasets:"))
    path = Path(name).expanduser()
    if path.is_file():
        folder = find_folder(path)
        if folder is None:
            raise UserError(
                f"there is no corpus next to {path}; name a file in the qrels folder of a collection"
            )
        return load_beir(folder, path)
    if not path.is_dir():
        raise UserError(
            f"there is no collection {name!r}; give a folder, generated:SIZE:SEED, ir_datasets:NAME, "
            "bright:SUBSET or crumb:TASK"
        )
    # Only T2Ranking has a collection.tsv; BEIR has a corpus.jsonl.
    t2ranking = find_t2ranking(path)
    return load_beir(path) if t2ranking is None else load_t2ranking(t2ranking)


def parse_size_and_seed(name: str) -> tuple[int, int]:
    """Return the size and the seed in the name of a generated collection; raise UserError for other names."""
    try:
        size, seed = map(int, name.removeprefix("generated:").split(":"))
    except ValueError:
        raise UserError(
            f"{name!r} is not a generated collection: write generated:SIZE:SEED, for example generated:2000:0"
        ) from None
    return size, seed
