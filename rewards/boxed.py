r"""Rewards for an answer in `\boxed{}`, such as `... so \boxed{\frac{1}{2}}`.

The last box of a completion is the answer. `COMPARISONS` lists the two ways to compare it with the reference
answer:

* "math" reads LaTeX and plain text and compares what they mean, see `equivalent`.
* "integer" requires an integer literal in the box. An expression is not an answer, so copying "7 + 12" from
  the question into the box earns nothing.

Time is bounded by counting: a box that is longer than `MAX_CHARACTERS` in `rlkit.rewards.latex.parser`, or
needs more operations or digits than `rlkit.rewards.latex.values` allows, equals only the same string.
"""

from __future__ import annotations

import re
from functools import lru_cache

from rlkit.rewards.latex.compare import is_same_text, readings, reference_readings, same
from rlkit.rewards.latex.nodes import Call, Number, Quantity, UnreadableError
from rlkit.rewards.latex.parser import MAX_CHARACTERS, parse
from rlkit.rewards.latex.tokens import clean, tokenize, unwrap, without_comma_groups
from rlkit.rewards.latex.words import without_text_commands
from rlkit.rewards.thinking import after_thinking

COMPARISONS = ("math", "integer")

# The start of a box, an escaped character (`\{` does not open a group), or a brace.
_TOKEN = re.compile(
    r"\\{1,4}(?:boxed|fbox)\s{0,4}\{|\\{1,4}boxed\s{1,4}([+-]?[0-9A-Za-z][0-9A-Za-z.,/]{0,40})|\\.|[{}]",
    re.DOTALL,
)
# `int` raises on more than 4,300 digits.
_INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")
# A letter of a multiple-choice question, and the text of the option behind it.
_CHOICE = re.compile(
    r"(?:(?:option|choice)\s*)?(?:\(([A-Z])\)(?![\w^+*/(-])|([A-Z])(?:[).:](?=\s|$)|$))[).:]?\s*(.*)",
    re.DOTALL | re.IGNORECASE,
)
# An option that names others: `Both A and B`, `A and B only`.
_OPTION_OF_OPTIONS = re.compile(
    r"(?:(?i:both|neither|either)\s+)?[A-Z](?:,\s*[A-Z])*,?\s+(?:and|or|nor)\s+[A-Z](?:\s+only)?"
)
_OTHER_CHOICE = re.compile(
    r"\([A-Z]\)|(?<![A-Za-z])[A-Z][).:]|\b(?:or|and|not|is|be|its|choose|mean)\s+\(?[A-Z](?![A-Za-z])|^not$"
    r"|(?:^|[\s,;/&(])[A-Z]\)?\s*$|\b(?i:wait|nope|oops|actually)\b|\brather\b|^(?:or|no)\b|^(?i:wrong|incorrect)$",
)


def find_boxes(completion: str) -> list[tuple[int, int]]:
    r"""Return the (start, end) span of the content of each outermost `\boxed{}`, in order.

    `\fbox{}` is a box, too, and so is `\boxed 5`. Unescaped braces must balance; a box that is never closed
    is ignored. The backslash may be doubled, as in prompts that were escaped once too often. Runs in linear
    time.
    """
    open_braces: list[tuple[bool, int]] = []  # (opens a box, start of its content)
    boxes: list[tuple[int, int]] = []
    for token in _TOKEN.finditer(completion):
        if token[1] is not None:  # a box without braces
            boxes.append((token.start(1), token.start(1) + len(token[1].rstrip(".,"))))
        elif token[0].endswith("{") and token[0] != "\\{":
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
        len(inner) == 1
        and content.lstrip("\\").startswith(("boxed", "fbox"))
        and inner[0][1] == len(content) - 1
    )
    if is_only_a_box:
        return content[slice(*inner[0])].strip()
    return content


def correct(completion: str, answer: str, comparison: str = "math") -> float:
    """Return 1 if the last box matches the answer, else 0. `comparison` is one of `COMPARISONS`.

    Only what follows the model's thoughts counts, see `rlkit.rewards.thinking`.
    """
    text = last_box(after_thinking(completion))
    if text is None:
        return 0.0
    if comparison == "integer":
        number = read_integer(text)
        return float(number is not None and number == read_integer(answer))
    return float(equivalent(text, answer))


def box_format(completion: str, most_after: int = 20) -> float:
    r"""Return 1 if there is exactly one `\boxed{}`, followed by at most `most_after` characters, else 0.

    Only what follows the model's thoughts counts, as in `correct`.
    """
    completion = after_thinking(completion)
    boxes = find_boxes(completion)
    if len(boxes) != 1 or completion.count("\\boxed") != 1 or not completion[slice(*boxes[0])].strip():
        return 0.0
    start, end = boxes[0]
    return float(completion[start - 1] == "{" and len(completion[end + 1 :].strip()) <= most_after)


def read_integer(text: str) -> int | None:
    r"""Parse an integer literal; None for anything else, such as `7 + 5` and `x = 12`.

    Thousands separators, a currency, a unit, a percent sign and zeros after the point are allowed: `-1,000`,
    `$1{,}000.00`, `12\text{ apples}`.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    plain = without_comma_groups(clean(text)).strip("$ ")
    if _INTEGER.fullmatch(plain):
        return int(plain)
    try:
        node = parse(without_comma_groups(text))
    except (UnreadableError, RecursionError):
        return None
    node = node.value if isinstance(node, Quantity) else node
    sign = 1
    while isinstance(node, Call) and node.operator in ("%", "degree", "unary -"):
        sign = -sign if node.operator == "unary -" else sign
        node = node.arguments[0]
    if isinstance(node, Number) and node.base is None and node.value.denominator == 1:
        return sign * node.value.numerator
    return None


def equivalent(text: str, answer: str) -> bool:
    r"""Return whether a model's answer `text` is equivalent to the reference `answer`.

    * **Numbers** are compared exactly. A decimal equals another number if it is that number rounded to six or
      more significant digits: `0.333333` is 1/3, `0.33` is not.
    * **Formulas** are equal if their values are. Upper and lower case are different letters. `i` is the
      imaginary unit, `e` is Euler's number.
    * **A name** in front, as in `x = 5` or `f(x) = 2x`, is optional but must not be another one. Every part
      of `a = b = c` must equal the answer. Equations are equal if they are multiples of each other.
    * **A unit** is optional; another unit of the same kind is converted.
    * **A percent sign** is optional if the number is at least 1: `50\%` is 50 and 0.5.
    * **The base** of a numeral is optional in `text`: `52_8` is 52, but not `52_9`.
    * **Lists** have an order in `(1, 2)`, and none in `1, 2` and `\{1, 2\}`. `(1, 2)`, `[1, 2]` and
      `\{1, 2\}` differ.
    * **Intervals** equal the inequalities that describe them.
    * **Words** are compared without regard to case, and after a value they must be a unit or what is counted:
      `7 \text{ or 8}` and `7 \text{ is wrong}` are not 7.
    * **A choice**, `D`, may be followed by the text of the option.
    """
    if len(text) > MAX_CHARACTERS or len(answer) > MAX_CHARACTERS:
        return text.strip() == answer.strip() != ""
    if find_boxes(text):
        return False
    if is_same_spelling(text, answer):
        return True
    if (choice := _read_choice(answer)) is not None:
        return _is_same_choice(text, *choice)
    return is_same_text(text, reference_readings(answer))


def is_same_spelling(text: str, answer: str) -> bool:
    """Return whether two strings differ only in fonts and spaces."""
    spelling = _spelling(text)
    return bool(spelling) and spelling == _spelling(answer)


@lru_cache(maxsize=4096)
def _spelling(text: str) -> tuple[tuple[str, str], ...]:
    """Return the tokens of a string without the spaces between them; none if a group is not closed."""
    try:
        return tuple((token.kind, token.text) for token in tokenize(clean(text)))
    except UnreadableError:
        return ()


def _read_choice(text: str) -> tuple[str, str] | None:
    """Return the letter of a multiple-choice answer and its option, which may be empty."""
    plain = without_text_commands(unwrap(text.replace("**", "")))
    plain = re.sub(r"\\(?:quad|qquad|left|right)(?![A-Za-z])", " ", plain)
    match = _CHOICE.fullmatch(plain)
    letter = (match[1] or match[2]) if match else ""
    return (letter, match[3].strip()) if match and letter.isupper() else None


def _is_same_choice(text: str, letter: str, option: str) -> bool:
    """Return whether a string chooses this letter and no other, or states the option if that is known."""
    choice = _read_choice(text)
    if choice is None:
        return bool(option) and is_same_text(text, reference_readings(option))
    is_other = _OTHER_CHOICE.search(choice[1])
    if choice[0] != letter or (is_other and not _OPTION_OF_OPTIONS.fullmatch(choice[1])):
        return False
    if not option or not choice[1]:
        return True
    return choice[1] == option or is_same_text(choice[1], reference_readings(option))


def why_unreadable(answer: str) -> str | None:
    """Return why an answer cannot be a reference, or None if it can: it can be parsed and equals itself."""
    if _read_choice(answer) is not None:
        return None
    try:
        parse(answer)
    except UnreadableError as error:
        if not readings(answer):
            return str(error)
    except RecursionError:
        return "nested too deeply"
    if not any(same(node, node) for node in readings(answer)):
        return "it has no value that can be compared"
    return None


def is_readable(answer: str) -> bool:
    """Return whether an answer can be a reference, see `why_unreadable`."""
    return why_unreadable(answer) is None
