"""Read the rows of a dataset as they are stored, from a file or from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.errors import UserError, first_line
from rlkit.retrieval.tables import SUFFIXES, files_digest, is_table, iterate_rows, select_names

if TYPE_CHECKING:
    import datasets


def read_rows(dataset: str, config: str | None, split: str, revision: str | None) -> list[dict[str, Any]]:
    """Return the rows of a file, or of a split of a dataset on the Hub (with its `config` and `revision`).

    Raises:
        UserError: The file or dataset does not exist, or is not a table.
    """
    path = Path(dataset).expanduser()
    if is_table(path):
        return read_file(path)
    return read_hub(dataset, config, split, revision)


def read_file(path: Path, columns: tuple[str, ...] | None = None) -> list[dict[str, Any]]:
    """Return the rows of a JSONL, JSON, Parquet, CSV or TSV file, which may be compressed with gzip.

    Args:
        path: Path of the file.
        columns: Columns to keep, which saves memory if rows hold entire articles. None keeps all.

    Raises:
        UserError: The file does not exist, or is not a table.
    """
    rows = [row.values for row in iterate_rows(path, columns)]
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def read_hub(
    dataset: str,
    config: str | None,
    split: str,
    revision: str | None = None,
    columns: tuple[str, ...] | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of a split on the Hub, with all columns or the given ones.

    Raises:
        UserError: The dataset or split does not exist.
    """
    rows = open_hub(dataset, config, split, revision)
    return rows.select_columns(list(select_names(columns, tuple(rows.column_names)))).to_list()


def open_hub(dataset: str, config: str | None, split: str, revision: str | None = None) -> datasets.Dataset:
    """Open a split on the Hub as a memory-mapped dataset.

    Raises:
        UserError: The dataset or split does not exist.
    """
    import datasets

    arguments = {}
    if (folder := _local_folder(dataset)) is not None:
        # datasets caches a local folder by its path, and would return the rows of files that have changed.
        arguments["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE) / _folder_state(folder))
        dataset = str(folder)
    try:
        return datasets.load_dataset(dataset, config, split=split, revision=revision, **arguments)
    except Exception as error:  # the Hub client raises many exception types
        raise _load_error(dataset, error) from error


def hub_state(dataset: str, config: str | None, split: str) -> str:
    """Return a hash that changes with the files of a local folder, or with the revision on the Hub.

    Raises:
        UserError: The dataset or split does not exist.
    """
    folder = _local_folder(dataset)
    return _folder_state(folder) if folder else open_hub(dataset, config, split)._fingerprint


def _local_folder(dataset: str) -> Path | None:
    folder = Path(dataset).expanduser()
    return folder if folder.is_dir() else None


def _folder_state(folder: Path) -> str:
    paths = (
        path
        for path in folder.rglob("*")
        if not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    return files_digest(folder, sorted(path for path in paths if path.is_file()))[:16]


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
        f"{dataset!r} is neither a file ({suffixes}; also with .gz) nor a dataset that can be loaded: "
        f"{first_line(error)}"
    )
