"""Read the rows of a data set, cells as they are written: from a file, or from the hub."""

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
    """The rows of a file, or of a split of a data set on the hub (with its `config` and `revision`).

    Raises:
        UserError: there is no such file or data set, or it is not a table.
    """
    path = Path(dataset).expanduser()
    if path.suffix in SUFFIXES:
        return read_file(path)
    return read_hub(dataset, config, split, revision)


def read_file(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a file; where a row may hold whole articles, `columns` says what is kept of it.

    Raises:
        UserError: there is no such file, or it is not a table.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        rows = _READERS[path.suffix](path, columns)
    except (ValueError, OSError, csv.Error) as error:  # pyarrow's errors are among them
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is not a list of objects")
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
    """The rows of a split on the hub, `columns` as of a file; raises UserError where there is none."""
    rows = open_hub(dataset, config, split, revision)
    return rows.select_columns(_kept(rows.column_names, columns)).to_list()


def open_hub(dataset: str, config: str | None, split: str, revision: str | None = None) -> datasets.Dataset:
    """A split on the hub, read as it is gone through; raises UserError where there is none."""
    import datasets

    try:
        return datasets.load_dataset(dataset, config, split=split, revision=revision)
    except Exception as error:  # the hub client raises many kinds; to the user they are one
        raise _unknown(dataset, error) from error


def hub_splits(dataset: str, config: str | None) -> list[str]:
    """The splits of a data set on the hub; raises UserError where there is none."""
    import datasets

    try:
        return datasets.get_dataset_split_names(dataset, config)
    except Exception as error:
        raise _unknown(dataset, error) from error


def _unknown(dataset: str, error: Exception) -> UserError:
    kinds = ", ".join(SUFFIXES)
    return UserError(f"cannot load the data set {dataset!r} (or a file in {kinds}): {first_line(error)}")


def _kept(names: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    """Those of the names that are wanted; all where none is, so that an error can tell of them."""
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
            rows.append({n: row[n] for n in _kept(list(row), columns)} if isinstance(row, dict) else row)
    return rows


def _read_json(path: Path, columns: Sequence[str] | None) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_csv(path: Path, columns: Sequence[str] | None) -> list[Any]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def _read_parquet(path: Path, columns: Sequence[str] | None) -> list[Any]:
    import pyarrow.parquet

    names = pyarrow.parquet.read_schema(path).names
    return pyarrow.parquet.read_table(path, columns=_kept(names, columns)).to_pylist()


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
