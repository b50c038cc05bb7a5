r"""Rewards for an answer in `\boxed{}`, such as `... so \boxed{\frac{1}{2}}`.

The last box of a completion is the answer. `COMPARISONS` lists the two ways to compare it with the reference
answer:

* "math" compares integers exactly and everything else with math-verify
  (https://github.com/huggingface/Math-Verify), which parses LaTeX and compares with sympy. `equivalent` adds
  stricter rules where math-verify is too lenient.
* "integer" requires an integer literal in the box. An expression is not an answer, so copying "7 + 12" from
  the question into the box earns nothing.

math-verify's own timeouts work only in the main thread, so they are off. Instead, an expression that would be
expensive to evaluate is rejected beforehand (`rlkit.rewards.expressions`) and counts as wrong. The rejection
relies on an estimate; an expression that slips through is killed by the time limit of the reward process.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rlkit.rewards.expressions import is_cheap_to_parse, parse_latex, same_value

if TYPE_CHECKING:
    from sympy import Basic

COMPARISONS = ("math", "integer")

# The start of a box, an escaped character (`\{` does not open a group), or a brace.
_TOKEN = re.compile(r"\\{1,4}boxed\s{0,4}\{|\\.|[{}]", re.DOTALL)
# `int` raises on more than 4,300 digits, so the repeats are bounded.
_INTEGER = re.compile(r"[+-]?(?:[0-9]{1,1000}|[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3}){1,300})")
_SPACE = r"(?:\\[,!;: ]|~|\s)+"
_SPACING = re.compile(rf"(?<![0-9]){_SPACE}|{_SPACE}(?![0-9,!;: ~\\])")  # not between two digits
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_WORD = re.compile(r"[A-Za-z]{3,}|[A-Z]{2}")  # `Monday`, or the points of a line, `AB`
_NEGATION = re.compile(r"\bnot\b|\\not|\\neq?(?![A-Za-z])|!=|\u2260")
_EQUALS = re.compile(r"(?<![!<>:=\\])=(?!=)")
_COMMAND = re.compile(r"\\[A-Za-z]+")
# One pair of brackets around the entire answer: a set, a tuple or an interval.
_GROUP = re.compile(r"(\\\{|[(\[])[^()\[\]{}]*(\\\}|[)\]])")


def find_boxes(completion: str) -> list[tuple[int, int]]:
    r"""Return the (start, end) span of the content of each outermost `\boxed{}`, in order.

    Unescaped braces must balance; a box that is never closed is ignored. The backslash may be doubled, as in
    prompts that were escaped once too often. Runs in linear time.
    """
    open_braces: list[tuple[bool, int]] = []  # (opens a box, start of its content)
    boxes: list[tuple[int, int]] = []
    for token in _TOKEN.finditer(completion):
        if token[0].endswith("{") and token[0] != "\\{":
            open_braces.append((token[0] != "{", token.end()))
        elif token[0] == "}" and open_braces:
            is_box, start = open_braces.pop()
            if is_box:
                while boxes and boxes[-1][0] > start:  # nested in the box that closes here
                    boxes.pop()
                boxes.append((start, token.start()))
    return boxes


def last_box(completion: str) -> str | None:
    r"""Return the content of the last `\boxed{}`, or None. `\boxed{\boxed{7}}` is unwrapped to `7`."""
    boxes = find_boxes(completion)
    if not boxes:
        return None
    content = completion[slice(*boxes[-1])].strip()
    inner = find_boxes(content)
    is_only_a_box = (
        len(inner) == 1 and content.lstrip("\\").startswith("boxed") and inner[0][1] == len(content) - 1
    )
    if is_only_a_box:
        return content[slice(*inner[0])].strip()
    return content


def correct(completion: str, answer: str, comparison: str = "math") -> float:
    """Return 1 if the last box matches the answer, else 0. `comparison` is one of `COMPARISONS`."""
    text = last_box(completion)
    if text is None:
        return 0.0
    if comparison == "integer":
        number = read_integer(text)
        return float(number is not None and number == read_integer(answer))
    return float(equivalent(text, answer))


def box_format(completion: str, most_after: int = 20) -> float:
    r"""Return 1 if there is exactly one `\boxed{}`, followed by at most `most_after` characters, else 0."""
    boxes = find_boxes(completion)
    if len(boxes) != 1 or completion.count("\\boxed") != 1 or not completion[slice(*boxes[0])].strip():
        return 0.0
    return float(len(completion[boxes[0][1] + 1 :].strip()) <= most_after)


def read_integer(text: str) -> int | None:
    """Parse an integer literal: `-1,000`, `$1000$`, `1{,}000` or `1\\,000.`. None for anything else."""
    text = strip_decoration(text)
    if not _INTEGER.fullmatch(text):
        return None
    return int(re.sub(r"[{},]", "", text))


def strip_decoration(text: str) -> str:
    r"""Remove what has no meaning: enclosing `$`, a final period, spaces inside a number, `\left`."""
    text = text.replace("\\$", "").strip().removesuffix(".")
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\displaystyle", "", text).strip("$ \n")
    return re.sub(r"(?<=[0-9])\\[,!; ](?=[0-9]{3}(?![0-9]))", "", text).strip()


def equivalent(text: str, answer: str) -> bool:
    """Return whether a model's answer `text` is equivalent to the reference `answer`.

    Two answers are equivalent if they are equal up to spacing, if both are the same integer, or if
    math-verify finds them equal. The rules are stricter than math-verify alone:

    * Every part of a chain of equalities must equal the answer. math-verify reads only the last part, so
      `2 + 2 = 5` would match 5. A name before the first sign (`x = 5`) is ignored.
    * Words and names of points are compared as strings, not as products of letters (`ABC` is not `ACB`).
    * `7 \\text{ is not it}` and `x \\ne 7` do not match 7.
    * `\\{1, 2\\}`, `(1, 2)` and `[1, 2]` differ.
    """
    text, answer = strip_decoration(text), strip_decoration(answer)
    text_without_spaces, answer_without_spaces = _SPACING.sub("", text), _SPACING.sub("", answer)
    if not text_without_spaces or "\\boxed" in text_without_spaces:
        return False
    if text_without_spaces == answer_without_spaces:
        return True
    numbers = read_integer(text), read_integer(answer)
    if None not in numbers:
        return numbers[0] == numbers[1]
    word = _WRAPPED.sub(r"\1", answer).strip()
    if _WORD.fullmatch(word):
        return _WRAPPED.sub(r"\1", text).strip().casefold() == word.casefold()
    if _contradicts(text, answer):
        return False
    return all(_has_same_value(part, answer) for part in _parts_to_compare(text, answer))


def _contradicts(text: str, answer: str) -> bool:
    """Return whether a negation or the kind of brackets alone makes the text differ from the answer."""
    if _NEGATION.search(text) and not _NEGATION.search(answer):
        return True
    answer_brackets, text_brackets = _GROUP.fullmatch(answer), _GROUP.fullmatch(text)
    return bool(answer_brackets and text_brackets and answer_brackets.groups() != text_brackets.groups())


def _parts_to_compare(text: str, answer: str) -> list[str]:
    """Return every part of a chain `a = b = c`, or the text itself if the answer is an equation, too."""
    name, *parts = _EQUALS.split(text)
    if not parts or "=" in answer:
        return [text]
    if not name.strip():
        return parts
    is_name = re.search("[A-Za-z]", _COMMAND.sub("", name))  # of a variable or a function: `f(2) = 5`
    return [f"{name}={part}" for part in parts] if is_name else [name, *parts]


def _has_same_value(text: str, answer: str) -> bool:
    try:
        return same_value(_parse(answer), _parse(text))
    except Exception:  # sympy raises almost anything on a model's output; then the answer is wrong
        return False


def _parse(text: str) -> Basic:
    expression = parse_latex(text)
    if expression is None:
        raise ValueError(f"cannot parse {text[:100]!r}")
    return expression


def is_readable(answer: str) -> bool:
    """Return whether an answer can be a reference: it can be parsed cheaply and equals itself."""
    plain = strip_decoration(answer)
    if read_integer(answer) is not None or _WORD.fullmatch(_WRAPPED.sub(r"\1", plain).strip()):
        return True
    try:
        return is_cheap_to_parse(plain) and _has_same_value(plain, plain)
    except Exception:  # see `_has_same_value`
        return False
