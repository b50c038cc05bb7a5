"""Pages: documents with sections, passages and links, from which pairs are generated without labels.

The folder of a collection may have a file `pages.jsonl` with the structure of its documents:

    {"id": "sendfile.2", "title": "sendfile(2)", "links": ["splice.2"],
     "sections": [{"title": "DESCRIPTION", "passages": ["sendfile() copies data between …"]}]}

Other collections have documents without structure: a page has one section, the text, which is split into
passages.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlkit.encoding import encodable
from rlkit.errors import UserError
from rlkit.files import atomic_write
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.tables import iterate_rows
from rlkit.words import words

logger = logging.getLogger(__name__)

FILE = "pages.jsonl"
MAX_WORDS = 100  # of a passage, as in DPR's Wikipedia passages

# The end of a sentence, but not of an abbreviation: "e.g. this", "cf. that", "J. Doe".
_SENTENCE_END = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\bcf)(?<!\bvs)(?<!\betc)(?<!\b[A-Z])[.!?][\"')\]]*(?= [^a-z ])|[。！？]+"
)


@dataclass(frozen=True)
class Section:
    """A section of a page: a title, which may be empty, and passages."""

    title: str
    passages: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """A document with its structure.

    Attributes:
        id: Id of the document.
        title: Title, which precedes each passage in a pair; may be empty.
        sections: Sections in their order. If there are several, the first one is the summary of the page.
        links: Ids of the pages that this page links to.
    """

    id: str
    title: str
    sections: tuple[Section, ...]
    links: tuple[str, ...] = ()

    @property
    def passages(self) -> list[str]:
        """The passages of all sections, in order."""
        return [passage for section in self.sections for passage in section.passages]


def sentences(text: str) -> list[str]:
    """Return the sentences of a string, with white space normalized."""
    text = " ".join(text.split())
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    parts = [text[start:end].strip() for start, end in pairwise([0, *ends, len(text)])]
    return [part for part in parts if part]


def split_passages(paragraphs: Iterable[str], max_words: int = MAX_WORDS) -> tuple[str, ...]:
    """Return passages of whole sentences, each at most `max_words` words unless one sentence is longer.

    In scripts without spaces, characters count as words (`rlkit.words`).
    """
    passages: list[str] = []
    current: list[str] = []
    num_words = 0
    for paragraph in paragraphs:
        for sentence in sentences(paragraph):
            length = len(words(sentence))
            if current and num_words + length > max_words:
                passages.append(" ".join(current))
                current, num_words = [], 0
            current.append(sentence)
            num_words += length
    if current:
        passages.append(" ".join(current))
    return tuple(passages)


def read_pages(collection: Collection, folder: Path) -> list[Page]:
    """Return the pages of a collection, from `pages.jsonl` in its folder or from its documents.

    Raises:
        UserError: A row of `pages.jsonl` is invalid, or its document is not in the collection.
    """
    path = folder / FILE
    if not path.is_file():
        return _plain_pages(collection)
    ids = {document.id for document in collection.documents()}
    pages: dict[str, Page] = {}
    for location, values in iterate_rows(path):
        page = _page(values, location)
        if page.id not in ids:
            raise UserError(f"{location}: the corpus has no document {page.id!r}; rebuild the collection")
        if page.id in pages:
            raise UserError(f"{location}: the page {page.id!r} is a duplicate; remove one of the two")
        pages[page.id] = page
    if num_missing := len(ids) - len(pages):
        logger.warning("%d of %d documents are not in %s and give no pairs", num_missing, len(ids), path)
    return list(pages.values())


def write_pages(folder: Path, pages: Iterable[Page]) -> None:
    """Write `pages.jsonl` in the folder of a collection."""
    lines = [json.dumps(asdict(page), ensure_ascii=False) + "\n" for page in pages]
    atomic_write(folder / FILE, "".join(lines))


def _plain_pages(collection: Collection) -> list[Page]:
    """Return documents as pages of one section. The passages of one judged document are one page."""
    titles: dict[str, str] = {}
    passages: dict[str, tuple[str, ...]] = {}
    for document in collection.documents():
        name = collection.judged_id(document.id)
        titles.setdefault(name, document.title.strip())
        paragraphs = re.split(r"\n\s*\n", document.text)
        passages[name] = passages.get(name, ()) + split_passages(paragraphs)
    return [Page(name, title, (Section("", passages[name]),)) for name, title in titles.items()]


def _page(values: dict[str, Any], location: str) -> Page:
    text = json.dumps(values, ensure_ascii=False)
    if encodable(text) != text:
        raise UserError(f"{location}: the page has a lone surrogate; was it cut inside a character?")
    try:
        sections = tuple(
            Section(_string(section["title"]), tuple(map(_string, section["passages"])))
            for section in values["sections"]
        )
        links = tuple(map(_string, values["links"]))
        return Page(_string(values["id"]), _string(values["title"]), sections, links)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{location}: a page needs an id, a title, sections with a title and passages, and links: {error}"
        ) from None


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is not a string")
    return value


def linking_pages(pages: Sequence[Page]) -> dict[str, list[Page]]:
    """Return the pages that link to each page, sorted by id. A page does not link to itself."""
    linking: dict[str, list[Page]] = {page.id: [] for page in pages}
    for page in sorted(pages, key=lambda page: page.id):
        for link in dict.fromkeys(page.links):
            if link != page.id and link in linking:
                linking[link].append(page)
    return linking


def iterate_sentences(passages: Iterable[str], min_words: int) -> Iterator[tuple[str, str]]:
    """Yield each distinct sentence of at least `min_words` words, with the first passage that has it."""
    yielded: set[str] = set()
    for passage in passages:
        for sentence in sentences(passage):
            if sentence not in yielded and len(words(sentence)) >= min_words:
                yielded.add(sentence)
                yield sentence, passage
