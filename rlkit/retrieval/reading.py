"""Read the rows of a dataset as they are stored, from a file or from the Hugging Face Hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.errors import UserError, first_line

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def read_rows(dataset: str, config: str | None, split: str, revision: str | None) -> list[dict[str, Any]]:
    """Return the rows of a file, or of a split of a dataset on the Hub (with its `config` and `revision`).

    Raises:
        UserError: The file or dataset does not exist, or is not a table.
    """
    path = Path(dataset).expanduser()
    if path.suffix in SUFFIXES:
        return read_file(path)
    return read_hub(dataset, config, split, revision)


def read_file(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return the rows of a JSONL, JSON, Parquet or CSV file.

    Args:
        path: Path of the file.
        columns: Columns to keep, which saves memory if rows hold entire articles. None keeps all.

    Raises:
        UserError: The file does not exist, or is not a table.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        rows = _READERS[path.suffix](path, columns)
    except (ValueError, OSError, csv.Error) as error:  # pyarrow's errors derive from ValueError and OSError
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} must contain a list of JSON objects")
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def read_hub(
    dataset: str,
    config: str | None,
    split: str,
    revision: str | None = None,
    columns: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of a split on the Hub, with all columns or the given ones.

    Raises:
        UserError: The dataset or split does not exist.
    """
    rows = open_hub(dataset, config, split, revision)
    return rows.select_columns(_available(columns, rows.column_names)).to_list()


def open_hub(dataset: str, config: str | None, split: str, revision: str | None = None) -> datasets.Dataset:
    """Open a split on the Hub as a memory-mapped dataset.

    Raises:
        UserError: The dataset or split does not exist.
    """
    import datasets

    try:
        return datasets.load_dataset(dataset, config, split=split, revision=revision)
    except Exception as error:  # the Hub client raises many exception types
        raise _load_error(dataset, error) from error


def hub_splits(dataset: str, config: str | None) -> list[str]:
    """Return the names of a Hub dataset's splits.

    Raises:
        UserError: The dataset does not exist.
    """
    import datasets

    try:
        return datasets.get_dataset_split_names(dataset, config)
    except Exception as error:
        raise _load_error(dataset, error) from error


def _load_error(dataset: str, error: Exception) -> UserError:
    suffixes = ", ".join(SUFFIXES)
    return UserError(
        f"{dataset!r} is neither a file ({suffixes}) nor a dataset that can be loaded: {first_line(error)}"
    )


def _available(columns: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """Return the requested columns that exist, or all names if none does, so that an error can list them."""
    return [name for name in names if name in (columns or names)] or list(names)


def _read_jsonl(path: Path, columns: Sequence[str] | None) -> list[Any]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if isinstance(row, dict):
                row = {name: row[name] for name in _available(columns, list(row))}
            rows.append(row)
    return rows


def _read_json(path: Path, columns: Sequence[str] | None) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_csv(path: Path, columns: Sequence[str] | None) -> list[Any]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def _read_parquet(path: Path, columns: Sequence[str] | None) -> list[Any]:
    import pyarrow.parquet

    names = pyarrow.parquet.read_schema(path).names
    return pyarrow.parquet.read_table(path, columns=_available(columns, names)).to_pylist()


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
