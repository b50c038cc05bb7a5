"""Load a collection by its name."""

from __future__ import annotations

from pathlib import Path

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.files import load_beir, load_t2ranking
from rlkit.retrieval.collections.generated import generate
from rlkit.retrieval.collections.hub import load_bright, load_crumb
from rlkit.retrieval.collections.irds import load_irds


def load_collection(name: str) -> Collection:
    """Load a collection by its name.

    Raises:
        UserError: there is none of that name, or a file of it is wrong; it names file and line.
    """
    if name.startswith("generated:"):
        return generate(*_numbers(name))
    if name.startswith(("bright:", "crumb:")):
        kind, _, words = name.partition(":")
        return (load_bright if kind == "bright" else load_crumb)(words)
    if name.startswith("ir_datasets:"):
        return load_irds(name.removeprefix("ir_datasets:"))
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"there is no collection {name!r}: give a folder, generated:SIZE:SEED, ir_datasets:NAME, "
            "bright:SUBSET or crumb:TASK"
        )
    return load_t2ranking(folder) if (folder / "collection.tsv").exists() else load_beir(folder)


def _numbers(name: str) -> tuple[int, int]:
    try:
        size, seed = map(int, name.split(":")[1:])
    except ValueError:
        raise UserError(f"{name!r}: write generated:SIZE:SEED, for example generated:2000:0") from None
    return size, seed
