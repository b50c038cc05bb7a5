"""Rewards for an answer that is a probability distribution, such as `ANSWER [0.35, 0.65]`.

An answer is compared with the truth in integer hundredths: with N = sum |100 p - 100 q| over the rounded
entries, the total variation distance is D = N / 200. In floats, an answer that is off by 0.01 has D = 0.01
only up to rounding error, so whether it passes a tolerance of 0.01 would depend on that error.

The entries of a distribution are in [0, 1], and their hundredths sum to 100, within half a hundredth per
entry for rounding. Any other list can earn the format rewards but not the accuracy rewards.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from rlkit.rewards.thinking import after_thinking

PARSERS = ("lenient", "official")

_OFFICIAL = re.compile(r"ANSWER\s*\[([0-9.\-]+(?:,\s+[0-9.\-]+)*)\]")
# At most 20 digits, so that a number cannot overflow to infinity.
_OFFICIAL_NUMBER = re.compile(r"-?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})")

# Each pattern begins with a literal, because `re` searches for a literal prefix fast.
_MARKERS = (
    re.compile(r"ANSWER\b"),  # the heading that the prompt requires
    re.compile(r"\\boxed\b"),
    re.compile(r"nswer(?<=\b[Aa]nswer)[ \t*_`]{0,8}(?:[:=\[]|is\b[^\[\n.()=]{0,40}\[)"),
    re.compile(r"nswer(?<=\bAnswer)[ \t*_`]{0,8}\n"),
)
_BRACKET = re.compile(r"[\[\]]")
_LATEX = re.compile(r"\\(?:left|right|[,;! ])|\\(?=%)|\$")
_FRACTION = re.compile(r"\\[dt]?frac\{([0-9.]{1,40})\}\{([0-9.]{1,40})\}")
_ENTRY = re.compile(
    r"(?P<number>[+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20}))"
    r"(?:\s{0,4}(?P<percent>%)|\s{0,4}/\s{0,4}(?P<denominator>[0-9]{1,20}(?:\.[0-9]{0,20})?))?"
)


def parse_distribution(
    completion: str, parser: str = "lenient", which: str | None = None
) -> list[float] | None:
    """Parse the list of numbers that a completion gives as its answer; None if there is none.

    `parser="official"` uses the regular expression of the RLCausal release: `ANSWER`, optional white space,
    and a list of plain numbers separated by a comma and white space. `which` selects the "first" match (the
    default, as in the release) or the "last". Like the release, it also reads thoughts.

    `parser="lenient"` accepts what models write: entries such as `.1`, `10%`, `1/4` or `\\frac{1}{4}`, and
    markup around the list. It ignores thoughts (`rlkit.rewards.thinking`) and locates the answer as follows:

    * With markers: `ANSWER`, `\\boxed`, `answer:`, `the answer is [..]`, or a heading `Answer`. The first
      bracket group between a marker and the next marker is an answer; a marker without one is skipped. The
      "last" answer counts (the default), or the "first". If that answer cannot be parsed, the result is None:
      other lists, such as quoted table rows, do not replace it.
    * Without any marker, the last list of numbers counts (or the first).

    A list inside another pair of brackets is not an answer. Runs in time linear in the length.
    """
    if parser == "official":
        return _parse_official(completion, use_first=(which or "first") == "first")
    return _parse_lenient(after_thinking(completion), use_first=which == "first")


def _parse_official(completion: str, use_first: bool) -> list[float] | None:
    answer = None
    for match in _OFFICIAL.finditer(completion):
        answer = match
        if use_first:
            break
    if answer is None:
        return None
    numbers = [number.strip() for number in answer[1].split(",")]
    if not all(_OFFICIAL_NUMBER.fullmatch(number) for number in numbers):
        return None  # the pattern also matches `1.2.3`
    return [float(number) for number in numbers]


def _parse_lenient(completion: str, use_first: bool) -> list[float] | None:
    order = 1 if use_first else -1
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
    """Return the spans of the outermost bracket pairs, in order. Unpaired brackets are ignored."""
    if "[" not in text or "]" not in text:
        return []
    open_brackets: list[int] = []
    groups: list[tuple[int, int]] = []
    for match in _BRACKET.finditer(text):
        if match[0] == "[":
            open_brackets.append(match.start())
        elif open_brackets:
            start = open_brackets.pop()
            is_display_math = start > 0 and text[start - 1] == "\\"
            if is_display_math and groups and groups[-1][0] > start:
                continue  # \[ .. \] only encloses the list
            while groups and groups[-1][0] > start:
                groups.pop()  # nested in the pair that closes here
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
        denominator = 100.0 if match["percent"] else float(match["denominator"] or 1)
        if denominator == 0:
            return None
        numbers.append(float(match["number"]) / denominator)
    return numbers


def _hundredths(answer: Sequence[float] | None, truth: Sequence[float]) -> int | None:
    """Return N = sum |100 p - 100 q|, or None unless the answer is a distribution as long as the truth."""
    if answer is None or len(answer) != len(truth):
        return None
    rounded = [round(100 * p) for p in answer]
    if not all(0 <= p <= 1 for p in answer) or 2 * abs(sum(rounded) - 100) > len(rounded):
        return None
    return sum(abs(p - round(100 * q)) for p, q in zip(rounded, truth, strict=True))


def parsed(completion: str, parser: str = "lenient", which: str | None = None) -> float:
    """Return 1 if an answer can be parsed (`parse_distribution`), else 0."""
    return float(parse_distribution(completion, parser, which) is not None)


def right_length(
    completion: str, truth: list[float], parser: str = "lenient", which: str | None = None
) -> float:
    """Return 1 if the answer has the same number of entries as the truth, else 0."""
    answer = parse_distribution(completion, parser, which)
    return float(answer is not None and len(answer) == len(truth))


def answer_format(
    completion: str, truth: list[float], parser: str = "lenient", which: str | None = None
) -> float:
    """Return 1/2 for an answer that can be parsed, 1 if its length is right, too; 0 without an answer.

    This is the format term of arXiv 2512.20760, eq. 1.
    """
    answer = parse_distribution(completion, parser, which)
    if answer is None:
        return 0.0
    return 1.0 if len(answer) == len(truth) else 0.5


def distribution(
    completion: str,
    truth: list[float],
    tolerance: float = 0.01,
    strict: bool = False,
    *,
    parser: str = "lenient",
    which: str | None = None,
) -> float:
    """Return 1 if the total variation distance D to the truth is within the tolerance, else 0.

    D <= tolerance is the metric of arXiv 2512.20760 (eq. 3). `strict` requires D < tolerance, the paper's
    training reward (eq. 1). Both compare integer hundredths.
    """
    distance = _hundredths(parse_distribution(completion, parser, which), truth)
    if distance is None:
        return 0.0
    limit = round(200 * tolerance, 6)  # D = N / 200; rounding removes the float error of 200 * tolerance
    return float(distance < limit if strict else distance <= limit)


def total_variation(
    completion: str, truth: list[float], parser: str = "lenient", which: str | None = None
) -> float:
    """Return 1 - D, with D the total variation distance to the truth; 0 if it is not a distribution."""
    distance = _hundredths(parse_distribution(completion, parser, which), truth)
    return 0.0 if distance is None else max(1 - distance / 200, 0.0)
