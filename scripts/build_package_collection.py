"""Build a cross-lingual collection from the descriptions of Debian packages and their translations.

    apt-get update -o Acquire::Languages=en,de,fr,ja,ru,ko
    python scripts/build_package_collection.py --languages de fr ja ru ko -o data/packages
    rlkit eval --collection data/packages --retriever dense:bundled:multilingual-e5-small

The script downloads nothing: it reads the package lists that apt keeps in /var/lib/apt/lists, and apt keeps
translations only for the languages that it is told to.

A document is the long English description of a package. Its queries are the translations of the short
description, which is not part of the document: one query per language, with the id NAME/LANGUAGE. Packages
without a translation into all languages are left out, and of packages with the same description all but one.

The folder has BEIR's layout. augment/LANGUAGE.jsonl has the short descriptions as training pairs, English
ones in augment/en.jsonl: queries for `rlkit index --augment`, e.g. those of all languages but one.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rlkit.arguments.command_line import CommandParser, folder_path
from rlkit.commands.run import run_command
from rlkit.envs.ranking.pairs.rows import PairRow, write_rows
from rlkit.errors import UserError, check_integer, first_line
from rlkit.retrieval.collections.write import new_folder, write_beir
from rlkit.retrieval.documents import Document

LISTS = Path("/var/lib/apt/lists")
APT_HELPER = "/usr/lib/apt/apt-helper"  # reads lists in any compression
ENGLISH = "en"


class Description(NamedTuple):
    """A description of a package in one language.

    Attributes:
        package: Name of the package.
        short: Short description, a line.
        long: Long description, which may be empty.
    """

    package: str
    short: str
    long: str


def read_descriptions(lists: Path, language: str) -> dict[str, Description]:
    """Return the descriptions in a language by the MD5 hash of the English description.

    Of packages with the same description, the first in alphabetical order counts.

    Raises:
        UserError: There are no lists of this language, or they cannot be read.
    """
    name = f"*_i18n_Translation-{language}"
    files = sorted({*lists.glob(name), *lists.glob(f"{name}.*")})
    if not files:
        raise UserError(
            f"{lists} has no descriptions in the language {language!r}: run `apt-get update -o "
            f"Acquire::Languages={ENGLISH},{language}`, with all languages in that list"
        )
    descriptions: dict[str, Description] = {}
    for file in files:
        for fields in read_paragraphs(file):
            key, package = fields.get("Description-md5"), fields.get("Package")
            short, _, long = fields.get(f"Description-{language}", "").partition("\n")
            if key and package and short:
                previous = descriptions.get(key)
                if previous is None or package < previous.package:
                    descriptions[key] = Description(package, short, long)
    # apt-helper prints nothing, and exits with 0, if a compressed file is truncated.
    if not descriptions:
        raise UserError(
            f"{files[0]} has no descriptions: it may be damaged; remove it and repeat `apt-get update`"
        )
    return descriptions


def read_paragraphs(file: Path) -> Iterator[dict[str, str]]:
    """Yield the paragraphs of one of apt's lists as fields by name.

    Raises:
        UserError: apt is not installed, or the file cannot be read.
    """
    try:
        run = subprocess.run([APT_HELPER, "cat-file", str(file)], capture_output=True, check=False)
    except FileNotFoundError:
        raise UserError(f"there is no {APT_HELPER}: run the script on a machine with apt") from None
    if run.returncode:
        raise UserError(f"{file} cannot be read: {first_line(run.stderr.decode(errors='replace'))}")
    for paragraph in run.stdout.decode("utf-8", "replace").split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if line.startswith(" "):
                # " ." is an empty line in a long description.
                fields[name] = f"{fields.get(name, '')}\n{'' if line == ' .' else line[1:]}"
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        yield fields


def select_documents(
    descriptions: dict[str, dict[str, Description]], num_documents: int, seed: int
) -> dict[str, dict[str, Description]]:
    """Return the descriptions of sampled packages, by package and language.

    Args:
        descriptions: Descriptions by language and MD5 hash, English ones included.
        num_documents: Maximum number of packages.
        seed: Seed of the sample.

    Raises:
        UserError: No package has all languages.
    """
    keys = set.intersection(*(set(of_language) for of_language in descriptions.values()))
    packages: dict[str, dict[str, Description]] = {}
    for key in sorted(keys):
        english = descriptions[ENGLISH][key]
        # Another version of the package may have another description.
        if english.long.strip() and english.package not in packages:
            packages[english.package] = {language: descriptions[language][key] for language in descriptions}
    if not packages:
        raise UserError(f"no package has descriptions in all languages: {', '.join(descriptions)}")
    names = sorted(packages)
    if len(names) > num_documents:
        names = sorted(random.Random(seed).sample(names, num_documents))
    return {name: packages[name] for name in names}


def write_collection(out: Path, packages: dict[str, dict[str, Description]], languages: list[str]) -> None:
    """Write the collection, and the short descriptions of each language as pairs."""
    documents = [Document(name, "", of_package[ENGLISH].long) for name, of_package in packages.items()]
    queries = {
        f"{name}/{language}": of_package[language].short
        for name, of_package in packages.items()
        for language in languages
    }
    qrels = {f"{name}/{language}": {name: 1} for name in packages for language in languages}
    with new_folder(out) as folder:
        write_beir(folder, documents, queries, {"test": qrels})
        for language in (ENGLISH, *languages):
            source, rows = f"translation/{language}", []
            for name, of_package in packages.items():
                query, document = of_package[language].short, of_package[ENGLISH].long
                rows.append(PairRow(f"{source}/{name}", query, (document,), (1.0,), source, name))
            write_rows(folder / "augment" / f"{language}.jsonl", rows)


def main() -> int:
    """Write the collection and print its size."""
    parser = CommandParser(description="Build a collection from package descriptions and their translations.")
    add = parser.add_argument
    add("--languages", nargs="+", required=True, help="languages of the queries, such as de or pt_BR")
    add("-o", "--out", type=folder_path, required=True, metavar="FOLDER", help="folder of the collection")
    add("--documents", type=int, default=600, help="maximum number of documents (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the sample of documents (default: %(default)s)")
    add("--lists", type=Path, default=LISTS, metavar="FOLDER",
        help="folder of apt's package lists (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(sys.argv[1:])
    check_integer("--documents", options.documents, 1)
    languages = list(dict.fromkeys(options.languages))
    if ENGLISH in languages:
        raise UserError(f"--languages must not have {ENGLISH}, the language of the documents; remove it")
    descriptions = {
        language: read_descriptions(options.lists, language) for language in (ENGLISH, *languages)
    }
    packages = select_documents(descriptions, options.documents, options.seed)
    write_collection(options.out, packages, languages)
    print(f"{len(packages):,} documents, {len(packages) * len(languages):,} queries: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
