"""Iterate over the rows of JSONL, JSON, CSV, TSV and Parquet files, which may be compressed with gzip.

Text is UTF-8, with or without a byte order mark. Every error names the file and the line or row.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from rlkit.errors import UserError, first_line

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
# Keys of a JSON object that holds its rows in a list, e.g. SQuAD's "data".
ROW_KEYS = ("data", "rows", "questions", "documents", "examples", "items")


_log = logging.getLogger(__name__)

csv.field_size_limit(2**31 - 1)  # the default raises on fields of more than 128 KiB


class Row(NamedTuple):
    """A row of a file, and where it is: `FILE:LINE`, or `FILE, row NUMBER`."""

    location: str
    values: dict[str, Any]


def files_digest(root: Path, files: Iterable[Path]) -> str:
    """Return a hash of the names below `root` and the contents of files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(repr((str(file.relative_to(root)), content_digest(file))).encode())
    return digest.hexdigest()


def content_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content.

    Its size and time are not enough: unpacking another version of an archive may leave both as they were.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or first_line(error)}") from None


def file_type(path: Path) -> str:
    """Return the suffix of a file in lowercase, without a final `.gz`: ".jsonl" of `part-0.jsonl.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def is_table(path: Path) -> bool:
    """Return whether the name of a file says that it has rows."""
    return file_type(path) in SUFFIXES


@lru_cache(maxsize=10_000)
def canonical(name: str) -> str:
    """Return the form in which column names are compared: "Golden_Answers" becomes "goldenanswers"."""
    return "".join(character for character in name.lower() if character not in "_- ")


def get_value(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    """Return the value of the first of these columns that is not None, or None.

    A column with exactly this name is preferred to one that differs in case or underscores.
    """
    for name in names:
        if row.get(name) is not None:
            return row[name]
    values: dict[str, Any] = {}
    for name, value in row.items():
        if value is not None:
            values.setdefault(canonical(name), value)
    return next((values[canonical(name)] for name in names if canonical(name) in values), None)


@lru_cache(maxsize=1000)  # one call per row
def select_names(columns: tuple[str, ...] | None, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that are among the columns, or all if none is, so that an error can list them."""
    if columns is None:
        return names
    wanted = {canonical(column) for column in columns}
    return tuple(name for name in names if canonical(name) in wanted) or names


def iterate_rows(
    path: Path,
    columns: tuple[str, ...] | None = None,
    headerless: Sequence[str] | None = None,
    keyed: str | None = None,
) -> Iterator[Row]:
    """Yield the rows of a file one at a time; only a .json file is loaded as a whole.

    Args:
        path: Path of the file.
        columns: Columns to keep, which saves memory if rows hold entire articles. None keeps all.
        headerless: Columns of a TSV file whose first line has none of `columns`, but as many fields as
            these. None requires a header.
        keyed: Column for the values of a JSON object that maps ids to strings; the id is in `_id`. None
            rejects such an object.

    Raises:
        UserError: The file does not exist, has an unknown type or is not UTF-8, or a row is truncated.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    kind = file_type(path)
    if kind == ".parquet":
        if path.suffix.lower() == ".gz":
            raise UserError(f"{path}: decompress it with gunzip; Parquet has a compression of its own")
        yield from _parquet_rows(path, columns)
        return
    if kind == ".jsonl":
        rows = _jsonl_rows(path)
    elif kind == ".json":
        rows = _json_rows(path, keyed)
    elif kind == ".csv":
        rows = _csv_rows(path)
    elif kind == ".tsv":
        rows = _tsv_rows(path, columns, headerless)
    else:
        suffixes = ", ".join(SUFFIXES)
        raise UserError(f"{path} has the unsupported file type {path.suffix!r}; use one of {suffixes}")
    for location, values in rows:
        yield Row(location, {name: values[name] for name in select_names(columns, tuple(values))})


@contextmanager
def open_text(path: Path, newline: str) -> Iterator[IO[str]]:
    r"""Open a UTF-8 file, which may be compressed with gzip.

    Args:
        path: Path of the file.
        newline: What ends a line, as for `open`: "\n", or "" for all line endings. None is translated.

    Raises:
        UserError: The file cannot be read, is not UTF-8, or its gzip data are damaged.
    """
    is_gzip = False
    try:
        with path.open("rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"  # its magic number: names are not reliable
        with (gzip.open if is_gzip else open)(path, "rt", encoding="utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeDecodeError:
        line = _undecodable_line(path, is_gzip)
        raise UserError(
            f"{path}:{line}: the file is not UTF-8: convert it, for example with"
            " `iconv -f WINDOWS-1252 -t UTF-8`"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = first_line(error)
        raise UserError(
            f"{path}: the gzip data are truncated or damaged ({reason}): copy the file again"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or first_line(error)}") from None


def _undecodable_line(path: Path, is_gzip: bool) -> int:
    """Return the number of the first line that is not UTF-8. The decoder reads ahead and does not know it."""
    number = 0
    with (gzip.open if is_gzip else open)(path, "rb") as file:
        try:
            for line in file:
                number += 1
                line.decode()
        except (UnicodeDecodeError, EOFError, zlib.error, OSError):  # the gzip data may be damaged, too
            pass
    return max(number, 1)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with open_text(path, "\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}:{number}: the line is not valid JSON ({error}); is it truncated?"
                ) from None
            if not isinstance(values, dict):
                raise UserError(f"{path}:{number}: the line must be a JSON object")
            yield Row(f"{path}:{number}", values)


def _json_rows(path: Path, keyed: str | None) -> Iterator[Row]:
    with open_text(path, "\n") as file:
        content = file.read()
    if not content.strip():
        return
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):  # one object per line, as many a .json file on the Hub
            yield from _jsonl_rows(path)
            return
        raise UserError(f"{path} is not valid JSON ({error}); is it truncated?") from None
    rows = _find_rows(value, keyed)
    if rows is None or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} must contain a list of JSON objects, directly or in {', '.join(ROW_KEYS)}")
    for number, row in enumerate(rows, 1):
        yield Row(f"{path}, row {number}", row)


def _find_rows(value: Any, keyed: str | None) -> list[Any] | None:
    """Return the rows in the content of a JSON file, or None if it has none."""
    if isinstance(value, dict):
        lists = {name: rows for name, rows in value.items() if isinstance(rows, list)}
        value = get_value(lists, ROW_KEYS) if lists else _keyed_rows(value, keyed)
    if not isinstance(value, list):
        return None
    rows: list[Any] = []
    for row in value:
        # SQuAD's own files nest questions in the paragraphs of articles.
        paragraphs = row.get("paragraphs") if isinstance(row, dict) else None
        if not isinstance(paragraphs, list):
            paragraphs = []
        questions = [paragraph["qas"] for paragraph in paragraphs if _has_questions(paragraph)]
        rows += chain.from_iterable(questions) if questions else [row]
    return rows


def _has_questions(paragraph: Any) -> bool:
    return isinstance(paragraph, dict) and isinstance(paragraph.get("qas"), list)


def _keyed_rows(values: dict[str, Any], keyed: str | None) -> list[Any] | None:
    """Return the rows of an object that maps ids to strings or rows, or None if it does not."""
    if keyed is None:
        return None
    if keyed in values:  # the file is a single row
        return [values]
    if all(isinstance(value, str) for value in values.values()):
        return [{"_id": name, keyed: value} for name, value in values.items()]
    if all(isinstance(value, dict) for value in values.values()):
        return [{**value, "_id": name} for name, value in values.items()]
    return None


def _csv_rows(path: Path, dialect: str = "excel") -> Iterator[Row]:
    with open_text(path, "") as file:
        # Without `strict`, an unclosed quote is accepted.
        reader = csv.reader(file, dialect, strict=True)
        try:
            columns = next(reader, [])
            for fields in reader:
                if fields:
                    yield _table_row(f"{path}:{reader.line_num}", columns, fields)
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: invalid row ({error}); is it truncated?") from None


def _table_row(location: str, columns: Sequence[str], fields: Sequence[str]) -> Row:
    if len(fields) != len(columns):
        counts = f"{len(fields)} fields, but the header has {len(columns)}"
        raise UserError(f"{location}: invalid row ({counts}); is it truncated?")
    return Row(location, dict(zip(columns, fields, strict=True)))


def _tsv_rows(path: Path, columns: tuple[str, ...] | None, headerless: Sequence[str] | None) -> Iterator[Row]:
    with open_text(path, "\n") as file:
        first = next(file, "")
    names = _parse_quoted(first) or _split_line(first)
    has_names = columns is None or not {*map(canonical, columns)}.isdisjoint(map(canonical, names))
    is_headerless = headerless is not None and len(names) == len(headerless) and not has_names
    if headerless is not None and is_headerless:
        _log.warning("%s has no header; its columns are read as %s", path, ", ".join(headerless))
        names = list(headerless)
        problem = None
    else:
        problem = _quoting_problem(path, len(names))
        if problem is None:  # quoted as in CSV (DPR, pandas)
            yield from _csv_rows(path, "excel-tab")
            return
    with open_text(path, "\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip(" \r\n") or (number == 1 and not is_headerless):
                continue
            # In MS MARCO's and T2Ranking's files, quotes are ordinary characters.
            fields = _split_line(line)
            if len(fields) != len(names):
                counts = f"{len(fields)} fields, but the header has {len(names)}"
                reason = f"; as a file with quoted fields: {problem}" if problem else ""
                raise UserError(f"{path}:{number}: invalid row ({counts}{reason}); is it truncated?")
            yield _table_row(f"{path}:{number}", names, fields)


def _quoting_problem(path: Path, num_fields: int) -> str | None:
    """Return why a TSV file does not have fields that are quoted as in CSV, or None if it does."""
    with open_text(path, "") as file:
        reader = csv.reader(file, "excel-tab", strict=True)
        try:
            for fields in reader:
                if len(fields) not in (0, num_fields):
                    return f"line {reader.line_num} has {len(fields)} fields"
        except csv.Error as error:
            return f"line {reader.line_num}: {error}"
    return None


def _split_line(line: str) -> list[str]:
    return line.rstrip("\r\n").split("\t")


def _parse_quoted(record: str) -> list[str] | None:
    """Return the fields of a tab-separated record, or None if its quotes are not balanced."""
    if '"' not in record:
        return _split_line(record)
    try:
        return next(csv.reader(StringIO(record, newline=""), "excel-tab", strict=True))
    except csv.Error:
        return None


def _parquet_rows(path: Path, columns: tuple[str, ...] | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = list(select_names(columns, tuple(file.schema_arrow.names)))
        for batch in file.iter_batches(columns=names):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", values)
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: a string that is not UTF-8
        reason = first_line(error)
        raise UserError(f"{path}: cannot be read after row {number} ({reason}); is it truncated?") from None
