"""Build a collection of Linux man pages, with a one-line description of each page as its query.

    apt-get install mandoc manpages manpages-dev
    python scripts/build_man_collection.py -o runs/pairs/man

A document is the body of a page of the Debian packages manpages and manpages-dev, without the line
"sendfile - transfer data between file descriptors" that says what it is about. What follows the dash is the
query. Pages with the same description are all relevant to it. `pages.jsonl` has the sections and links from
which `make_pairs.py` generates pairs. mandoc renders the pages.
"""

import hashlib
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

from rlkit.arguments.command_line import CommandParser, folder_path
from rlkit.commands.run import run_command
from rlkit.envs.ranking.pairs.pages import Page, Section, split_passages, write_pages
from rlkit.errors import UserError
from rlkit.retrieval.collections.write import new_folder, write_beir
from rlkit.retrieval.documents import Document

PACKAGES = ("manpages", "manpages-dev")
# Sections that are the same on many pages, or are lists of names. SEE ALSO only gives links.
SKIPPED = {"NAME", "LIBRARY", "SYNOPSIS", "SEE ALSO", "COLOPHON", "ATTRIBUTES", "AUTHORS", "COPYRIGHT"}
MIN_WORDS = 20  # of a body; a shorter page only refers to another one
# Prototypes, programs, tables, and headings within a section.
SKIPPED_TAGS = {"pre", "table", "h2"}
BLOCK_TAGS = {"p", "dt", "dd", "li", "div", "br"}
LINK = re.compile(r"([\w.:+-]+)\s?\((\d\w*)\)")


class SectionParser(HTMLParser):
    """Parser of mandoc's HTML: a title and paragraphs for each section (`.SH`)."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[tuple[str, list[str]]] = []
        self._in_title = False
        self._num_skipped = 0  # depth of tags in `SKIPPED_TAGS`

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Start a section or a paragraph, or skip a tag."""
        if tag == "h1":
            self.sections.append(("", []))
            self._in_title = True
        elif tag in SKIPPED_TAGS:
            self._num_skipped += 1
        elif tag in BLOCK_TAGS and self.sections:
            self.sections[-1][1].append("")

    def handle_endtag(self, tag: str) -> None:
        """End a title, a paragraph or a skipped tag."""
        if tag == "h1":
            self._in_title = False
        elif tag in SKIPPED_TAGS:
            self._num_skipped -= 1
        elif tag in BLOCK_TAGS and self.sections:
            self.sections[-1][1].append("")

    def handle_data(self, data: str) -> None:
        """Add characters to the current title or paragraph."""
        if not self.sections or self._num_skipped:
            return
        title, paragraphs = self.sections[-1]
        if self._in_title:
            self.sections[-1] = (title + data, paragraphs)
        elif paragraphs:
            paragraphs[-1] += data


def main() -> int:
    """Write the collection and print its sizes."""
    parser = CommandParser(description="Build a collection of Linux man pages.")
    add = parser.add_argument
    add("--files", nargs="+", type=Path, metavar="FILE", help="man pages (default: those of the packages "
        f"{' and '.join(PACKAGES)})")  # fmt: skip
    add(
        "-o",
        "--out",
        type=folder_path,
        required=True,
        metavar="FOLDER",
        help="output folder of the collection",
    )
    options = parser.parse_args(sys.argv[1:])
    if shutil.which("mandoc") is None:
        raise UserError("mandoc is not installed: apt-get install mandoc")
    files = options.files or installed_files()
    with ThreadPoolExecutor() as executor:
        rendered = executor.map(render, files)
        pages = dict(read_page(path, html) for path, html in zip(files, rendered, strict=True))
    # A page without a description, or of a few words, such as "see write(2)", is skipped.
    described = {page: text for page, text in pages.items() if text and count_words(page) >= MIN_WORDS}
    if not described:
        raise UserError("no page has both a description and a body")
    write_collection(options.out, described)
    queries = set(described.values())
    print(f"{len(described):,} pages, {len(queries):,} queries: {options.out}")
    return 0


def installed_files() -> list[Path]:
    """Return the English man pages of the two packages, without aliases.

    Raises:
        UserError: The packages are not installed, or their pages were removed, as in many container images.
    """
    paths: list[Path] = []
    for package in PACKAGES:
        listing = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=False)
        paths += map(Path, listing.stdout.splitlines())
    # Aliases are symbolic links. As documents, they would be many duplicates of their page.
    files = [path for path in paths if "/man/man" in str(path) and path.is_file() and not path.is_symlink()]
    if not files:
        raise UserError(
            f"the man pages are not installed: apt-get install {' '.join(PACKAGES)} (in a container, first "
            "remove path-exclude=/usr/share/man from /etc/dpkg/dpkg.cfg.d)"
        )
    return sorted(files)


def render(path: Path) -> str:
    """Return a page as HTML; raises UserError if mandoc fails."""
    command = ["mandoc", "-T", "html", "-O", "fragment", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
    if not result.stdout:
        raise UserError(f"mandoc cannot render {path}: {result.stderr.strip()[:200]}")
    return result.stdout


def read_page(path: Path, html: str) -> tuple[Page, str]:
    """Return a page and its description, which is empty if the page has none.

    Args:
        path: Path of the page, such as "man2/sendfile.2.gz".
        html: The page as HTML.
    """
    parser = SectionParser()
    parser.feed(html)
    name, _, section = path.name.removesuffix(".gz").rpartition(".")
    sections: list[Section] = []
    links: list[str] = []
    description = ""
    for raw_title, paragraphs in parser.sections:
        title = " ".join(raw_title.split())
        lines = [" ".join(paragraph.split()) for paragraph in paragraphs]
        if title == "NAME":
            # A hyphen in a name has no spaces around it.
            description = re.split(r"\s[-\u2013\u2014\u2212]+\s", " ".join(lines), maxsplit=1)[-1].strip()
            if description == " ".join(lines).strip():
                description = ""
        if title == "SEE ALSO":
            links = [f"{link}.{number}" for link, number in LINK.findall(" ".join(lines))]
        if title not in SKIPPED and (passages := split_passages(lines)):
            sections.append(Section(title, passages))
    page = Page(f"{name}.{section}", f"{name}({section})", tuple(sections), tuple(dict.fromkeys(links)))
    return page, description


def count_words(page: Page) -> int:
    """Return the number of words of a page's body."""
    return sum(len(passage.split()) for passage in page.passages)


def write_collection(out: Path, descriptions: dict[Page, str]) -> None:
    """Write the collection in BEIR's layout, with `pages.jsonl`.

    Args:
        out: Folder of the collection.
        descriptions: Description of each page.
    """
    ids = {page.id for page in descriptions}
    pages = [
        Page(page.id, page.title, page.sections, tuple(link for link in page.links if link in ids))
        for page in descriptions
    ]
    relevant: dict[str, dict[str, int]] = {}
    for page, description in descriptions.items():
        relevant.setdefault(description, {})[page.id] = 1
    queries = {f"q{digest(query)[:12]}": query for query in relevant}
    # By the hash of the query, half of the queries are for training and half for the test.
    qrels: dict[str, dict[str, dict[str, int]]] = {"train": {}, "test": {}}
    for name, query in queries.items():
        split = "train" if int(digest(query)[-1], 16) < 8 else "test"
        qrels[split][name] = relevant[query]
    documents = (Document(page.id, page.title, "\n\n".join(page.passages)) for page in pages)
    with new_folder(out) as folder:
        write_beir(folder, documents, queries, qrels)
        write_pages(folder, pages)


def digest(text: str) -> str:
    """Return the SHA-256 of a string in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    raise SystemExit(run_command(main))
