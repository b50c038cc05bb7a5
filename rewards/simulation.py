"""Documents that a language model writes as a search engine: reading them, and rewards for writing them.

A document of search results, as a policy sees it, is `Doc 1: text` or `Doc 1(Title: "T") text`. The rewards
accept only this form, because it is what a simulator is trained to write. `split_documents` reads what any
model may write instead: a simulated search must not fail because of a bullet or of bold type.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from rlkit.rewards.qa import span
from rlkit.rewards.search import without_headings
from rlkit.rewards.thinking import after_thinking

# Possessive quantifiers: with plain ones, many spaces or empty lines take quadratic or cubic time. Only
# groups have plain ones: until Python 3.11.5, a possessive group that fails halfway keeps what it matched.
_START = re.compile(r"^[^\S\n]*+Doc(?:ument)?\s*+\d++\s*+(?=[:(])", re.MULTILINE)
_TITLED = re.compile(
    r'\(Title:\s*+(?:"(?P<quoted>[^"\n]*+)"\s*+\)|(?P<bare>[^)\n]*+)\s*+\))\s*+(?P<text>.*)', re.DOTALL
)

# What `split_documents` reads. Marks of Markdown and brackets may surround a heading: `### **[Doc 1]**`.
_BULLETS = r"[\s>#*_+•`\-–—]*+"
_NUMBER = r"(?P<number>\d{1,3}+)(?!\d)(?:\s*+(?:/|of\b)\s*+\d++)?(?P<bracket>[)\]}>】]?+)[*_]*+[^\S\n]*+"
# What ends a heading: a sign, the end of the line, or a title in brackets.
_SIGN = r"[.．。)）、—](?!\d)|(?<=\s)[|\-–](?!\d)|$|(?=[(\[]\s*+Title\b)"
_NAMED = re.compile(
    rf"(?P<marks>{_BULLETS}(?:\d{{1,3}}[.)]\s++[*_]*+)?[(\[{{【<]?+)"
    r"(?:(?:useful|noisy|search)\s++|web\s*+)?"
    r"(?P<name>doc|result|passage|source|snippet|article|page|text)(?:ument)?s?+"
    rf"[\s#№(\[]*+(?:no\.?+\s*+)?{_NUMBER}(?P<sign>[:：(]|{_SIGN})?",
    re.IGNORECASE,
)
# A number alone must not be part of the text: of a score such as 1:0, or of 1.5 million.
_NUMBERED = re.compile(
    rf"(?P<marks>{_BULLETS}[(\[{{【<]?+){_NUMBER}(?P<sign>[:：](?!\d)|{_SIGN})?", re.IGNORECASE
)
_MONTH = re.compile(r"\s*+(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)[a-z]*+\b", re.IGNORECASE)
# The words with which the prompt ends; models repeat them, also on the line of the first document.
_ECHO = re.compile(r"[\s#*_>]*+(?:useful|noisy)\s++output\s*+[*_]*+[:：][*_]*+", re.IGNORECASE)
_INTRODUCTION = re.compile(r"\W*+(?:sure|certainly|of course|okay|ok|here (?:are|is))\b", re.IGNORECASE)
_RULE_OR_FENCE = re.compile(r"\s*+(?:(?:```|~~~)[^\s`]*+|(?:[-*_=]\s?+){3,})\s*+")
_BULLET = re.compile(r"\s*+[-*+•–]\s++")
# A title without quotes may itself contain one pair of brackets: `(Title: Paris (Texas))`.
_TITLE = re.compile(
    r"\s*+[(\[]\s*+Title\s*+[:：]\s*+"
    r'(?:["“](?P<quoted>[^"“”\n]*+)["”]\s*+[)\]]'
    r"|(?P<nested>(?:[^()\[\]\n]++|[(\[][^()\[\]\n]*+[)\]])*)[)\]]|(?P<bare>[^)\]\n]*+)[)\]])",
    re.IGNORECASE,
)


class _Heading(NamedTuple):
    """The heading of a document: the index of its line, its number, and what follows it on the line."""

    line: int
    number: int
    text: str


def split_documents(text: str) -> list[tuple[str, str]]:
    """Return (title, body) of each document in the output of any model; a missing title is "".

    A document begins at a line with a heading: `Doc 1:`, `**Document 1**`, `### Result 1`, or the numbers of
    a list, `1.`, `2.`, … or `[1]`, `[2]`, …. The numbers of a list count only if they begin the output or
    follow an introduction, and have no gap, so that a year does not begin a document. What precedes the first
    heading is an introduction. Output without headings is one document per paragraph, or per line if it has
    only one paragraph.

    Documents in a thought (`rlkit.rewards.thinking`), code fences and horizontal rules do not count. A title
    without a body becomes the body: in Search-R1's form, all of a line without a title is in that place.
    """
    visible = after_thinking(text).replace("\r\n", "\n").strip()
    visible = _without(_ECHO, visible)
    lines = [line for line in visible.split("\n") if not _RULE_OR_FENCE.fullmatch(line)]
    headings = _named_headings(lines) or _numbered_headings(lines)
    if headings:
        ends = [heading.line for heading in headings[1:]] + [len(lines)]
        parts = [
            "\n".join([heading.text, *lines[heading.line + 1 : end]])
            for heading, end in zip(headings, ends, strict=True)
        ]
    else:
        parts = _paragraphs(lines)
    return [document for document in map(_title_and_body, parts) if document[1]]


def _named_headings(lines: Sequence[str]) -> list[_Heading]:
    """Return the headings that name a document, such as `Doc 1:`; if there are none, `Result 1:` etc."""
    matches = [(i, match) for i, line in enumerate(lines) if (match := _NAMED.match(line))]
    headings: list[_Heading] = []
    for i, match in matches:
        # `Doc 1 text` counts only in sequence: it may be a sentence about a document.
        if match["name"].lower() == "doc" and (_is_marked(match) or _is_next(match, headings)):
            headings.append(_heading(i, lines[i], match))
    if headings:
        return headings
    names: set[str] = set()
    for i, match in matches:
        if _is_marked(match) and _is_next(match, headings) and names <= {match["name"].lower()}:
            names.add(match["name"].lower())
            headings.append(_heading(i, lines[i], match))
    return headings if _may_begin(lines, headings) else []


def _numbered_headings(lines: Sequence[str]) -> list[_Heading]:
    """Return the headings that are the numbers of one list, `1.`, `2.`, …, without a gap."""
    headings: list[_Heading] = []
    style: tuple[str, ...] | None = None
    max_indent = 0
    for i, line in enumerate(lines):
        match = _NUMBERED.match(line)
        if match is None or not _is_marked(match) or not _is_next(match, headings):
            continue
        # A list within a document is indented, or its numbers have another style.
        line_style = (match["marks"].strip(), match["bracket"], match["sign"] or "")
        indent = len(line) - len(line.lstrip())
        if style is None:
            style, max_indent = line_style, indent
        if line_style == style and indent <= max_indent:
            headings.append(_heading(i, line, match))
    is_date = len(headings) == 1 and _MONTH.match(headings[0].text) is not None  # "1. May 1821"
    return headings if _may_begin(lines, headings) and not is_date else []


def _is_marked(match: re.Match[str]) -> bool:
    """Return whether a sign or a bracket separates the number from the text."""
    return match["sign"] is not None or bool(match["bracket"])


def _is_next(match: re.Match[str], headings: Sequence[_Heading]) -> bool:
    number = int(match["number"])
    return number == headings[-1].number + 1 if headings else number <= 1


def _may_begin(lines: Sequence[str], headings: Sequence[_Heading]) -> bool:
    """Return whether only an introduction precedes the first heading: else it is part of a document."""
    if not headings:
        return False
    introduction = [line for line in lines[: headings[0].line] if line.strip()]
    is_title = len(introduction) == 1 and len(headings) > 1
    return not introduction or is_title or _is_introduction(introduction[-1])


def _is_introduction(line: str) -> bool:
    return line.rstrip(" *_").endswith((":", "：")) or _INTRODUCTION.match(line) is not None


def _heading(i: int, line: str, match: re.Match[str]) -> _Heading:
    text = line[match.end() - (match["sign"] == "(") :]  # an opening bracket belongs to the title
    # Emphasis may end behind the sign or behind a title: `**Doc 1:** text`, `**Doc 1: Paris**`.
    marks = match["marks"].rstrip("([{【<")
    emphasis = marks[len(marks.rstrip("*_")) :]
    if emphasis and match[0].count(emphasis) % 2:
        text = text.replace(emphasis, "", 1)
    return _Heading(i, int(match["number"]), text)


def _paragraphs(lines: Sequence[str]) -> list[str]:
    """Return the paragraphs of output without headings, or its lines if it has only one paragraph."""
    text = "\n".join(line.rstrip() for line in lines).strip()
    first, _, others = text.partition("\n")
    if others and _is_introduction(first):
        text = others.strip()
    paragraphs = re.split(r"\n\n++", text)
    if len(paragraphs) == 1:
        paragraphs = text.split("\n")
    return [_without(_BULLET, paragraph) for paragraph in paragraphs]


def _without(prefix: re.Pattern[str], text: str) -> str:
    match = prefix.match(text)
    return text if match is None else text[match.end() :]


def _title_and_body(part: str) -> tuple[str, str]:
    title = ""
    if match := _TITLE.match(part):
        title = (match["quoted"] or match["nested"] or match["bare"] or "").strip(' "')
        part = part[match.end() :]
    body = " ".join(part.split()).removesuffix("```").lstrip(":： ").rstrip()
    return (title, body) if body else ("", title)


def requested_documents(completion: str) -> list[tuple[str, str]]:
    """Return (title, body) of each document that has exactly the form of search results, and a body.

    Documents in a thought (`rlkit.rewards.thinking`) do not count.
    """
    documents = [_split_title(part) for part in _START.split(after_thinking(completion))[1:]]
    return [(title, body) for title, body in documents if body]


def _split_title(part: str) -> tuple[str, str]:
    titled = _TITLED.match(part)
    if titled is None:
        return "", " ".join(part.removeprefix(":").split())
    return (titled["quoted"] or titled["bare"] or "").strip(), " ".join(titled["text"].split())


def holds_answer(text: str, answers: Sequence[str]) -> bool:
    """Return whether documents contain an accepted answer as whole words."""
    text_span = span(without_headings(text))
    return any(span(answer) in text_span for answer in answers)


def form(completion: str, asked: int) -> float:
    """Return 1 if the completion is exactly `asked` documents with only a thought before them, else 0."""
    starts_with_document = _START.match(after_thinking(completion).lstrip()) is not None
    return float(starts_with_document and len(requested_documents(completion)) == asked)


def obeys(completion: str, answers: Sequence[str], asked: int, holds: bool) -> float:
    """Return 1 if the form is right and an answer occurs if and only if the real documents have one, else 0.

    Useful documents of a first hop need not contain the answer, and noisy ones may. So the real documents
    decide, not the label.

    Args:
        completion: Completion of the model.
        answers: Accepted answers to the question.
        asked: Number of documents that the prompt requests.
        holds: Whether the real engine's documents contain an accepted answer.
    """
    if form(completion, asked) == 0:
        return 0.0
    texts = (f"{title} {text}" for title, text in requested_documents(completion))
    return float(any(holds_answer(text, answers) for text in texts) == holds)
