"""Read the rows of a data set, cells as they are written: from a file, or from the hub."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from rlkit.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def read_rows(dataset: str, config: str | None, split: str, revision: str | None) -> list[dict[str, Any]]:
    """The rows of a file, or of a split of a data set on the hub (with its `config` and `revision`).

    Raises:
        UserError: there is no such file or data set, or it is not a table.
    """
    path = Path(dataset).expanduser()
    if path.suffix not in SUFFIXES:
        return _read_hub(dataset, config, split, revision)
    if not path.is_file():
        raise UserError(f"there is no file {dataset}")
    try:
        rows = _READERS[path.suffix](path)
    except (ValueError, OSError, csv.Error) as error:  # pyarrow's errors are among them
        raise UserError(f"{dataset} cannot be read: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{dataset} is not a list of objects")
    if not rows:
        raise UserError(f"{dataset} has no rows")
    return rows


def _read_hub(dataset: str, config: str | None, split: str, revision: str | None) -> list[dict[str, Any]]:
    import datasets

    try:
        data = datasets.load_dataset(dataset, config, split=split, revision=revision)
    except Exception as error:  # the hub client raises many kinds; to the user they are one
        reason = str(error).partition("\n")[0] or type(error).__name__
        kinds = ", ".join(SUFFIXES)
        raise UserError(f"cannot load the data set {dataset!r} (or a file in {kinds}): {reason}") from error
    return data.to_list()


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            rows.extend([json.loads(line)] if line.strip() else [])
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return rows


def _read_csv(path: Path) -> list[Any]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
