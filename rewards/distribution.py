"""Rewards for an answer that is a probability distribution, such as `ANSWER [0.35, 0.65]`.

An answer is compared with the truth in whole hundredths: with N = sum |100 p - 100 q| over the rounded
entries, the total variation distance is D = N / 200. In floats an answer that is off by 0.01 has D = 0.01
only up to rounding error, and a comparison with 0.01 comes out either way.

A distribution has entries in [0, 1] whose hundredths sum to 100, give or take half a hundredth an entry for
rounding. Anything else may earn the rewards for form, never those for being right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

PARSERS = ("lenient", "official")

_OFFICIAL = re.compile(r"ANSWER\s*\[([0-9.\-]+(?:,\s+[0-9.\-]+)*)\]")
_OFFICIAL_NUMBER = re.compile(r"-?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})")

# Each begins with a literal, which the search of `re` is fast for.
_MARKERS = (
    re.compile(r"ANSWER\b"),  # the heading that the prompt asks for
    re.compile(r"\\boxed\b"),
    re.compile(r"nswer(?<=\b[Aa]nswer)[ \t*_`]{0,8}(?:[:=\[]|is\b[^\[\n.()=]{0,40}\[)"),
    re.compile(r"nswer(?<=\bAnswer)[ \t*_`]{0,8}\n"),
)
_BRACKET = re.compile(r"[\[\]]")
_LATEX = re.compile(r"\\(?:left|right|[,;! ])|\\(?=%)|\$")
_FRACTION = re.compile(r"\\[dt]?frac\{([0-9.]{1,40})\}\{([0-9.]{1,40})\}")
_ENTRY = re.compile(
    r"(?P<number>[+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20}))"
    r"(?:\s{0,4}(?P<percent>%)|\s{0,4}/\s{0,4}(?P<below>[0-9]{1,20}(?:\.[0-9]{0,20})?))?"
)


def parse_distribution(
    completion: str, parser: str = "lenient", which: str | None = None
) -> list[float] | None:
    """Read the list of numbers that a completion gives as its answer, or None.

    `parser="official"` is the regular expression of the RLCausal release: `ANSWER`, optional white space, and
    a list with a comma and white space between plain numbers. `which` says whether the "first" such match
    counts (the default, as there) or the "last".

    `parser="lenient"` reads what models write: entries such as `.1`, `10%`, `1/4` or `\\frac{1}{4}`, and
    markup around the list. Where the answer is looked for:

    * A marker announces it: `ANSWER`, `\\boxed`, `answer:`, `the answer is [..]`, or a heading `Answer`. The
      first bracket group between a marker and the next is an answer; a marker without one is passed over.
      The "last" answer counts (the default), or the "first". An answer that cannot be read is no answer:
      lists elsewhere, such as quoted table rows, do not stand in for it.
    * Without any marker the last list of numbers counts (or the first).

    A list inside another pair of brackets is not an answer. Takes time linear in the length.
    """
    if parser == "official":
        return _parse_official(completion, which or "first")
    return _parse_lenient(completion, which or "last")


def _parse_official(completion: str, which: str) -> list[float] | None:
    found = None
    for match in _OFFICIAL.finditer(completion):
        found = match
        if which == "first":
            break
    if found is None:
        return None
    numbers = [number.strip() for number in found[1].split(",")]
    if not all(_OFFICIAL_NUMBER.fullmatch(number) for number in numbers):
        return None  # such as 1.2.3
    return [float(number) for number in numbers]


def _parse_lenient(completion: str, which: str) -> list[float] | None:
    order = 1 if which == "first" else -1
    markers = sorted(match.start() for marker in _MARKERS for match in marker.finditer(completion))
    if markers:
        for start, end in list(pairwise([*markers, len(completion)]))[::order]:
            segment = completion[start:end]
            if groups := _outer_groups(segment):
                return _read_group(segment, groups[0])
        return None
    for group in _outer_groups(completion)[::order]:
        if (numbers := _read_group(completion, group)) is not None:
            return numbers
    return None


def _outer_groups(text: str) -> list[tuple[int, int]]:
    """The spans of bracket pairs not inside another pair, in order. Unpaired brackets are ignored."""
    if "[" not in text or "]" not in text:
        return []
    opened: list[int] = []
    groups: list[tuple[int, int]] = []
    for match in _BRACKET.finditer(text):
        if match[0] == "[":
            opened.append(match.start())
        elif opened:
            start = opened.pop()
            is_math = start > 0 and text[start - 1] == "\\"  # \[ .. \] around a list is no list
            if is_math and groups and groups[-1][0] > start:
                continue
            while groups and groups[-1][0] > start:
                groups.pop()  # it is inside the pair that closes here
            groups.append((start, match.end()))
    return groups


def _read_group(text: str, group: tuple[int, int]) -> list[float] | None:
    inside = text[group[0] + 1 : group[1] - 1]
    if "\\" in inside or "$" in inside:
        inside = _LATEX.sub("", _FRACTION.sub(r"\1/\2", inside)).removesuffix("\\")
    numbers = []
    for part in inside.split(","):
        match = _ENTRY.fullmatch(part.strip())
        if match is None:
            return None
        below = 100.0 if match["percent"] else float(match["below"] or 1)
        if below == 0:
            return None
        numbers.append(float(match["number"]) / below)
    return numbers


def _hundredths(answer: Sequence[float] | None, truth: Sequence[float]) -> int | None:
    """N = sum |100 p - 100 q| in hundredths, or None unless the answer is a distribution of that length."""
    if answer is None or len(answer) != len(truth):
        return None
    rounded = [round(100 * p) for p in answer]
    if not all(0 <= p <= 1 for p in answer) or 2 * abs(sum(rounded) - 100) > len(rounded):
        return None
    return sum(abs(p - round(100 * q)) for p, q in zip(rounded, truth, strict=True))


def parsed(completion: str, parser: str = "lenient", which: str | None = None) -> float:
    """1 if an answer can be read (`parse_distribution`), else 0."""
    return float(parse_distribution(completion, parser, which) is not None)


def right_length(
    completion: str, truth: list[float], parser: str = "lenient", which: str | None = None
) -> float:
    """1 if the answer has as many entries as the truth, else 0."""
    answer = parse_distribution(completion, parser, which)
    return float(answer is not None and len(answer) == len(truth))


def answer_format(
    completion: str, truth: list[float], parser: str = "lenient", which: str | None = None
) -> float:
    """Half for an answer that can be read, half for its length: the format term of arXiv 2512.20760 (1)."""
    answer = parse_distribution(completion, parser, which)
    return 0.0 if answer is None else 0.5 + 0.5 * (len(answer) == len(truth))


def distribution(
    completion: str,
    truth: list[float],
    tolerance: float = 0.01,
    strict: bool = False,
    *,
    parser: str = "lenient",
    which: str | None = None,
) -> float:
    """1 if the total variation distance D to the truth is within the tolerance, else 0.

    D <= tolerance is the metric of arXiv 2512.20760 (eq. 3); with `strict` D < tolerance, its training reward
    (eq. 1). Both in whole hundredths.
    """
    distance = _hundredths(parse_distribution(completion, parser, which), truth)
    if distance is None:
        return 0.0
    limit = round(200 * tolerance, 6)
    return float(distance < limit if strict else distance <= limit)


def total_variation(
    completion: str, truth: list[float], parser: str = "lenient", which: str | None = None
) -> float:
    """1 - D where D is the total variation distance to the truth; 0 for what is not a distribution."""
    distance = _hundredths(parse_distribution(completion, parser, which), truth)
    return 0.0 if distance is None else max(1 - distance / 200, 0.0)
