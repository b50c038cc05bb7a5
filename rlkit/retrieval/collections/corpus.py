"""Corpora from which an index is built: files, folders of files, and generated worlds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

from rlkit.errors import UserError
from rlkit.retrieval.collections.world import World
from rlkit.retrieval.documents import Document, split_contents
from rlkit.retrieval.store import TABLE
from rlkit.retrieval.tables import (
    SUFFIXES,
    content_digest,
    file_type,
    files_digest,
    get_value,
    is_table,
    iterate_rows,
    open_text,
)

# In rows of MS MARCO v2, `pid` names the passage and `docid` the document that it is from.
IDS = ("_id", "id", "pid", "passage_id", "docid", "doc_id", "document_id")
TEXTS = ("text", "contents", "content", "body", "passage", "passage_text")
# Other columns, such as embeddings, are not loaded.
COLUMNS = (*IDS, "title", *TEXTS)
TEXT_FILES = (".txt", ".md")  # each is one document
DESCRIPTIONS = ("readme", "license", "licence", "citation", "notice", "changelog")  # of a folder with tables
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*")
_FENCE = re.compile(r" {0,3}(```|~~~)")


def corpus_source(corpus: str) -> list[Any] | None:
    """Return the path of a corpus and a hash of its content, which show whether it has changed.

    The hash of a folder includes the names of its files. A generated world never changes; its source is None.

    Raises:
        UserError: The corpus does not exist or has no files.
    """
    if parse_world(corpus) is not None:
        return None
    files = _corpus_files(corpus)
    root = Path(corpus).expanduser()
    if files == [root] or (len(files) == 1 and files == _beir_files(root)):
        return file_source(files[0])
    return [str(root.resolve()), len(files), files_digest(root, files)]


def file_source(path: Path) -> list[Any]:
    """Return the path of a file and a hash of its content."""
    return [str(path.resolve()), content_digest(path)]


def read_corpus(corpus: str) -> Iterator[Document]:
    """Read documents from a file or a folder, or generate them.

    Rows are read one at a time, except those of a .json file. A row without an id has its number in the
    corpus as its id, from 1. `contents` in the form of Search-R1's Wikipedia, `"Title"`, newline, text, are
    split into title and text.

    Args:
        corpus: One of these, where each file may also be compressed with gzip (`.gz`):

            - a .jsonl, .parquet or .csv file with columns `text` (or another of `TEXTS`), and optionally
              `title` and `_id` (or another of `IDS`);
            - a .tsv file with such a header, or with two columns, id and text, and no header (MS MARCO);
            - a .json file: a list of such rows, or an object that maps ids to strings or rows;
            - a .txt or .md file, which is one document;
            - a folder with `corpus.jsonl` (BEIR), with several tables, or with .txt and .md files at any
              depth, whose relative paths are the ids;
            - `world:SIZE:SEED`.

    Raises:
        UserError: The corpus does not exist or is empty, a row is truncated or has no text, a file is not
            UTF-8, or an id repeats. The message names the file and the line.
    """
    if (world := parse_world(corpus)) is not None:
        yield from world.passages()
        return
    root, files = Path(corpus).expanduser(), _corpus_files(corpus)
    ids = IdSet()
    number = 0
    for file in files:
        for location, document in _file_documents(file, root):
            number += 1
            name = document.id or str(number)
            if not ids.add(name):
                reason = "" if document.id else ", which is the number of a row without an id,"
                raise UserError(f"{location}: the id {name!r}{reason} is a duplicate; make the ids unique")
            yield document if document.id else replace(document, id=name)
    if not number:
        raise UserError(f"{root} has no documents")


class IdSet:
    """Set of document ids. It stores integers as bits: 21 million take 3 MB instead of 2 GB."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._others: set[str] = set()

    def add(self, name: str) -> bool:
        """Add an id and return whether it is new."""
        if not re.fullmatch(r"0|[1-9][0-9]{0,8}", name):
            is_new = name not in self._others
            self._others.add(name)
            return is_new
        byte, bit = divmod(int(name), 8)
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 1 - len(self._bits)))
        is_new = not self._bits[byte] >> bit & 1
        self._bits[byte] |= 1 << bit
        return is_new


def layout_files(folder: Path, stem: str) -> list[Path]:
    """Return the files with the "corpus" or the "queries" of a folder in BEIR's layout, or an empty list.

    They are STEM.jsonl, STEM.jsonl.gz or STEM.parquet, or tables in a folder STEM (the Hub's layout).
    """
    for name in (f"{stem}.jsonl", f"{stem}.jsonl.gz", f"{stem}.parquet"):
        if (folder / name).is_file():
            return [folder / name]
    files = sorted((folder / stem).glob("*"))
    return [path for path in files if is_table(path) and path.is_file() and not path.name.startswith(".")]


def _beir_files(folder: Path) -> list[Path]:
    """Return the corpus files of a folder in BEIR's layout, or an empty list if it has another layout."""
    # The queries of such a folder must not be read as documents if its corpus is missing.
    if layout_files(folder, "queries"):
        return layout_files(folder, "corpus") or [folder / "corpus.jsonl"]
    return [path for path in layout_files(folder, "corpus")[:1] if path.parent == folder]


def _corpus_files(corpus: str) -> list[Path]:
    """Return the files of a corpus, sorted by path; raises UserError if there are none."""
    path = Path(corpus).expanduser()
    files = [path]
    if path.is_dir():
        files = _beir_files(path) or _folder_files(path)
    types = f"{', '.join(SUFFIXES + TEXT_FILES)}, or one of them with .gz"
    if not files:
        raise UserError(f"there is no corpus in {path}: it has no files of the types {types}")
    if not files[0].is_file():
        raise UserError(f"there is no corpus {files[0]}; give a file, a folder of files, or world:SIZE:SEED")
    if path.is_file() and not is_table(path) and file_type(path) not in TEXT_FILES:
        raise UserError(f"{path} has the unsupported file type {path.suffix!r}; use one of {types}")
    return files


def _folder_files(folder: Path) -> list[Path]:
    """Return the tables below a folder, or else its text files, sorted by path."""
    if (folder / TABLE).exists():
        raise UserError(f"{folder} is an index, not a corpus: use it as `engine`")
    tables, texts = [], []
    for parent, folders, names in os.walk(folder):
        # Hidden files belong to tools such as git. An index may be in the folder from which it was built.
        folders[:] = [name for name in folders if not name.startswith(".")]
        if TABLE in names:
            folders.clear()
            continue
        for path in [Path(parent, name) for name in names if not name.startswith(".")]:
            if is_table(path):
                tables.append(path)
            elif file_type(path) in TEXT_FILES:
                texts.append(path)
    if not tables:
        return sorted(texts)
    texts = [path for path in texts if not path.name.lower().startswith(DESCRIPTIONS)]
    if texts:
        raise UserError(
            f"{folder} has both tables ({min(tables).name}) and text files ({min(texts).name}): "
            "index one of the two, in a folder of its own"
        )
    compressed = {path for path in tables if path.with_name(f"{path.name}.gz") in tables}
    if compressed:
        raise UserError(f"{min(compressed)} is also there with .gz: remove one of the two files")
    return sorted(tables)


def _file_documents(file: Path, root: Path) -> Iterator[tuple[str, Document]]:
    """Yield the location and the document of each row, or of a text file. A row without an id has id ""."""
    if is_table(file):
        for location, row in iterate_rows(file, COLUMNS, headerless=("id", "text"), keyed="text"):
            yield location, _to_document(row, location)
        return
    with open_text(file, "\n") as lines:
        text = lines.read()
    name = file.name if file == root else file.relative_to(root).as_posix()
    kind = file_type(file)
    title, text = _split_heading(text) if kind == ".md" else ("", text)
    stem = file.name[: file.name.lower().rindex(kind)]
    document = Document(name, title or stem, text)
    _check_characters(document, str(file))
    yield str(file), document


def _split_heading(text: str) -> tuple[str, str]:
    """Return the first heading of a Markdown file and its text; without a heading, "" and the text.

    A heading before any other text is removed from the text, because the title is indexed with it.
    """
    lines = text.split("\n")
    in_code = False
    for i, line in enumerate(lines):
        if _FENCE.match(line):
            in_code = not in_code
        heading = None if in_code else _HEADING.fullmatch(line.rstrip("\r"))
        if heading and heading[1]:
            is_first = not "".join(lines[:i]).strip()
            return heading[1], "\n".join(lines[i + 1 :]).lstrip("\r\n") if is_first else text
    return "", text


def parse_world(corpus: str) -> World | None:
    """Return the world that `world:SIZE:SEED` names, or None for any other corpus.

    Raises:
        UserError: The size or the seed is missing or not an integer.
    """
    if not corpus.startswith("world:"):
        return None
    try:
        size, seed = map(int, corpus.split(":")[1:])
    except ValueError:
        raise UserError(
            f"{corpus!r} is not a world: write world:SIZE:SEED, for example world:10000:0"
        ) from None
    return World(seed=seed, size=size)


def _to_document(row: Mapping[str, Any], location: str) -> Document:
    """Validate a row of a corpus and convert it to a document, with the id "" if the row has none."""
    title, text, contents = (get_value(row, (name,)) for name in ("title", "text", "contents"))
    if text is None and isinstance(contents, str):
        quoted_title, text = split_contents(contents)
        title = quoted_title or title
    if text is None:
        text = get_value(row, TEXTS[2:])
    if not isinstance(text, str):
        names = ", ".join(repr(str(name)[:40]) for name in list(row)[:20])
        raise UserError(
            f"{location}: the row needs a string in the column {TEXTS[0]} (or {', '.join(TEXTS[1:])}), which "
            f"may be empty; it has the columns {names or 'none'}"
        )
    if not isinstance(title, str | None):
        raise UserError(f"{location}: the title must be a string")
    document = Document(_row_id(row, location), title or "", text)
    _check_characters(document, location)
    return document


def _row_id(row: Mapping[str, Any], location: str) -> str:
    """Return the id of a row, or "" if it has none."""
    name = get_value(row, IDS)
    # pandas stores integers as floats if some are missing, and then NaN for those.
    if isinstance(name, float) and (isnan(name) or name.is_integer()):
        name = None if isnan(name) else int(name)
    # In Python, True is an int.
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise UserError(f"{location}: the id must be a string or an integer, not {str(name)[:60]!r}")
    return "" if name is None else str(name)


def _check_characters(document: Document, location: str) -> None:
    """Raise UserError for a lone surrogate, which the UTF-8 of Arrow cannot encode; JSON can contain it."""
    try:
        f"{document.id}{document.title}{document.text}".encode()
    except UnicodeEncodeError:
        raise UserError(f"{location}: the row has a lone surrogate; was it cut inside a character?") from None
