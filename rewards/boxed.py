r"""Rewards for an answer that stands in `\boxed{}`, such as `... so \boxed{\frac{1}{2}}`.

The last box of a completion counts. It is compared with the right answer in one of two ways (`COMPARISONS`):

* "math": whole numbers exactly, everything else by math-verify (https://github.com/huggingface/Math-Verify),
  which reads LaTeX and compares with sympy. Where it is too kind, `equivalent` is stricter.
* "integer": the box must be a whole number written out. An expression is no answer, so copying "7 + 12" from
  the question into the box earns nothing.

math-verify's own time limits work in the main thread only, so they are off. An expression that would take
long is turned down before it is evaluated (`rlkit.rewards.expressions`), which makes it wrong. That rests on
an estimate; what slips through is killed by the time limit of the process that runs the rewards.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rlkit.rewards.expressions import is_modest, parse_latex, same_value

if TYPE_CHECKING:
    from sympy import Basic

COMPARISONS = ("math", "integer")

_TOKEN = re.compile(r"\\{1,4}boxed\s{0,4}\{|\\.|[{}]", re.DOTALL)
_INTEGER = re.compile(r"[+-]?(?:[0-9]{1,1000}|[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3}){1,300})")
_SPACE = r"(?:\\[,!;: ]|~|\s)+"
_SPACING = re.compile(rf"(?<![0-9]){_SPACE}|{_SPACE}(?![0-9,!;: ~\\])")  # not between two digits
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_WORD = re.compile(r"[A-Za-z]{3,}|[A-Z]{2}")
_DENIAL = re.compile(r"\bnot\b|\\not|\\neq?(?![A-Za-z])|!=|\u2260")
_EQUALS = re.compile(r"(?<![!<>:=\\])=(?!=)")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_GROUP = re.compile(r"(\\\{|[(\[])[^()\[\]{}]*(\\\}|[)\]])")


def find_boxes(completion: str) -> list[tuple[int, int]]:
    r"""The spans of what is inside each `\boxed{}`, in order; of a box in a box only the outer one.

    Braces must balance, escaped ones aside; a box that is never closed is none. The backslash may be doubled,
    as it is in prompts that were quoted once too often. Takes linear time.
    """
    opened: list[tuple[bool, int]] = []
    boxes: list[tuple[int, int]] = []
    for token in _TOKEN.finditer(completion):
        if token[0].endswith("{") and token[0] != "\\{":
            opened.append((token[0] != "{", token.end()))
        elif token[0] == "}" and opened:
            is_box, start = opened.pop()
            if is_box:
                while boxes and boxes[-1][0] > start:
                    boxes.pop()
                boxes.append((start, token.start()))
    return boxes


def last_box(completion: str) -> str | None:
    r"""What the last `\boxed{}` holds, or None. If that is only a box, what the inner one holds."""
    boxes = find_boxes(completion)
    if not boxes:
        return None
    content = completion[slice(*boxes[-1])].strip()
    inner = find_boxes(content)
    alone = len(inner) == 1 and content.lstrip("\\").startswith("boxed") and inner[0][1] == len(content) - 1
    return content[slice(*inner[0])].strip() if alone else content


def correct(completion: str, answer: str, comparison: str = "math") -> float:
    """1 if the last box says the same as the answer, else 0. `comparison` is one of `COMPARISONS`."""
    text = last_box(completion)
    if text is None:
        return 0.0
    if comparison == "integer":
        number = read_integer(text)
        return float(number is not None and number == read_integer(answer))
    return float(equivalent(text, answer))


def box_format(completion: str, most_after: int = 20) -> float:
    r"""1 if there is exactly one `\boxed{}` and at most `most_after` characters behind it, else 0."""
    boxes = find_boxes(completion)
    if len(boxes) != 1 or completion.count("\\boxed") != 1 or not completion[slice(*boxes[0])].strip():
        return 0.0
    return float(len(completion[boxes[0][1] + 1 :].strip()) <= most_after)


def read_integer(text: str) -> int | None:
    """A whole number written out: `-1,000`, `$1000$`, `1{,}000` or `1\\,000.`; None for anything else."""
    text = tidy(text)
    if not _INTEGER.fullmatch(text):
        return None
    return int(re.sub(r"[{},]", "", text))


def tidy(text: str) -> str:
    r"""Leave out what means nothing: `$` around, a full stop at the end, a space within a number, `\left`."""
    text = text.replace("\\$", "").strip().removesuffix(".")
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\displaystyle", "", text).strip("$ \n")
    return re.sub(r"(?<=[0-9])\\[,!; ](?=[0-9]{3}(?![0-9]))", "", text).strip()


def equivalent(text: str, answer: str) -> bool:
    """Whether a model's text says the same as the right answer.

    The texts are equal but for spacing, or both whole numbers that are equal, or math-verify takes them for
    the same. Stricter than math-verify alone:

    * a chain of equalities must hold: of `2 + 2 = 5` and 5 it reads only the last part. A name before the
      first sign (`x = 5`) is left out;
    * words and names of points are compared as such, not as products of letters (`ABC` is not `ACB`);
    * `7 \\text{ is not it}`, `x \\ne 7` do not say 7;
    * `\\{1, 2\\}`, `(1, 2)` and `[1, 2]` differ.
    """
    text, answer = tidy(text), tidy(answer)
    plain, right = _SPACING.sub("", text), _SPACING.sub("", answer)
    if not plain or "\\boxed" in plain:
        return False
    if plain == right:
        return True
    numbers = read_integer(text), read_integer(answer)
    if None not in numbers:
        return numbers[0] == numbers[1]
    word = _WRAPPED.sub(r"\1", answer).strip()
    if _WORD.fullmatch(word):
        return _WRAPPED.sub(r"\1", text).strip().casefold() == word.casefold()
    if _contradicts(text, answer):
        return False
    return all(_same(part, answer) for part in _chain(text, answer))


def _contradicts(text: str, answer: str) -> bool:
    """Whether it says something else by its form alone."""
    if _DENIAL.search(text) and not _DENIAL.search(answer):
        return True
    ours, theirs = _GROUP.fullmatch(answer), _GROUP.fullmatch(text)
    return bool(ours and theirs and ours.groups() != theirs.groups())


def _chain(text: str, answer: str) -> list[str]:
    """What must be the same as the answer: every part of `a = b = c`, unless the answer is an equation."""
    name, *parts = _EQUALS.split(text)
    if not parts or "=" in answer:
        return [text]
    if not name.strip():
        return parts
    is_name = re.search("[A-Za-z]", _COMMAND.sub("", name))
    return [f"{name}={part}" for part in parts] if is_name else [name, *parts]


def _same(text: str, answer: str) -> bool:
    try:
        return same_value(_parse(answer), _parse(text))
    except Exception:  # whatever sympy raises on what a model writes: it is no right answer
        return False


def _parse(text: str) -> Basic:
    expression = parse_latex(text)
    if expression is None:
        raise ValueError(f"cannot read {text[:100]!r}")
    return expression


def is_readable(answer: str) -> bool:
    """Whether an answer can serve as the right one: it can be read, is modest, and equals itself."""
    if read_integer(answer) is not None or _WORD.fullmatch(_WRAPPED.sub(r"\1", tidy(answer)).strip()):
        return True
    try:
        return is_modest(tidy(answer)) and _same(tidy(answer), tidy(answer))
    except Exception:  # as above
        return False
