"""Arithmetic problems with exact whole answers and worked solutions, for when there is no data set.

Problem i of a split depends on the law, the split, the seed and i alone. The calculation decides the split,
so that none is in two of them, whatever the seeds and however it is told.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from rlkit.environment import SPLITS
from rlkit.errors import UserError

OPERATIONS = ("+", "-", "*")
KINDS = ("expression", "story")
SOLUTION_STYLES = ("steps", "verbose", "mixed")

_MOST_DRAWS = 10_000
_NAMES = ("Ann", "Ben", "Eva", "Leo", "Mia", "Tom")
_THINGS = ("apples", "books", "coins", "eggs", "pens", "stones")
_MORE = ("gets {} more", "buys {}", "finds {}")
_LESS = ("gives away {}", "loses {}", "sells {}")
_UNDO = {"+": "-", "-": "+"}


@dataclass(frozen=True)
class ArithmeticLaw:
    """What problems are drawn: the arguments of `MathEnvironment`, checked."""

    terms: tuple[int, int]  # least and most numbers
    max_number: int  # numbers are from 1 to this
    operations: Sequence[str]
    kinds: Sequence[str]


@dataclass(frozen=True)
class Calculation:
    """Numbers and the signs between them."""

    numbers: Sequence[int]
    signs: Sequence[str]

    def __str__(self) -> str:
        return str(self.numbers[0]) + "".join(
            f" {sign} {number}" for sign, number in zip(self.signs, self.numbers[1:], strict=True)
        )

    def step(self) -> tuple[Calculation, str, str]:
        """Work out one operation, products first: what is left, what was worked out, and its inverse."""
        i = self.signs.index("*") if "*" in self.signs else 0
        a, sign, b = self.numbers[i], self.signs[i], self.numbers[i + 1]
        value = a * b if sign == "*" else a + b if sign == "+" else a - b
        numbers = [*self.numbers[:i], value, *self.numbers[i + 2 :]]
        left = Calculation(numbers, [*self.signs[:i], *self.signs[i + 1 :]])
        inverse = f"{b} * {a} = {value}" if sign == "*" else f"{value} {_UNDO[sign]} {b} = {a}"
        return left, f"{a} {sign} {b} = {value}", inverse

    def value(self) -> int:
        """The result."""
        rest = self
        while rest.signs:
            rest = rest.step()[0]
        return rest.numbers[0]


def make_problem(law: ArithmeticLaw, split: str, seed: int, i: int) -> tuple[Calculation, str, str]:
    """Make problem i: the calculation, the kind, and the problem's text.

    Raises:
        UserError: so few calculations satisfy the law that none belongs to the split.
    """
    rng = random.Random(f"math-v1 {split} {seed} {i}")
    for _ in range(_MOST_DRAWS):
        calculation = _draw(law, rng)
        if split_of(str(calculation)) == split:
            kind = rng.choice(law.kinds)
            text = _story(calculation, rng) if kind == "story" else f"What is {calculation}?"
            return calculation, kind, text
    raise UserError(f"no calculation of this kind is in the split {split!r}: raise max_number or terms")


def _draw(law: ArithmeticLaw, rng: random.Random) -> Calculation:
    count = rng.randint(*law.terms)
    numbers = [rng.randint(1, law.max_number) for _ in range(count)]
    signs = [rng.choice(law.operations) for _ in range(count - 1)]
    if "*" not in law.operations:  # the first number can be raised so that nothing on the way is negative
        total = lowest = numbers[0]
        for sign, number in zip(signs, numbers[1:], strict=True):
            total += number if sign == "+" else -number
            lowest = min(lowest, total)
        numbers[0] -= min(lowest, 0)
    return Calculation(numbers, signs)


def split_of(text: str, fractions: Sequence[float] = (0.8, 0.1, 0.1)) -> str:
    """The split that a text belongs to by its hash, given the shares of train, dev and test."""
    digest = hashlib.sha256(f"math-v1 split {text}".encode()).digest()
    place = int.from_bytes(digest[:6], "big") / 2**48 * sum(fractions)  # 48 bits are exact in a float
    bounds = accumulate(fractions)
    return next(split for split, bound in zip(SPLITS, bounds, strict=True) if place < bound)


def _story(calculation: Calculation, rng: random.Random) -> str:
    name, things = rng.choice(_NAMES), rng.choice(_THINGS)
    first, *others = calculation.numbers
    events = [
        rng.choice(_MORE if sign == "+" else _LESS).format(number)
        for sign, number in zip(calculation.signs, others, strict=True)
    ]
    told = " ".join(f"{'Then she' if i else 'She'} {event}." for i, event in enumerate(events))
    told = told if name in ("Ann", "Eva", "Mia") else told.replace("She", "He").replace("she", "he")
    return f"{name} has {first} {things}. {told} How many {things} does {name} have now?"


def solve(calculation: Calculation, style: str) -> str:
    r"""Work a problem out, one operation at a time, and end in `\boxed{}`.

    `steps` writes only the operations. `verbose` restates the problem, says after each step what is left, and
    checks every step. `mixed` is one of these or half of `verbose` (restated only, checked only), as the
    calculation decides: a model that imitates it writes at different lengths.
    """
    choice = int.from_bytes(hashlib.sha256(f"style {calculation}".encode()).digest()[:1], "big") % 4
    restates, checks = {"steps": (0, 0), "verbose": (1, 1)}.get(style, (choice & 1, choice >> 1))
    lines = [f"Find {calculation}."] if restates else []
    inverses = []
    rest = calculation
    while rest.signs:
        rest, done, inverse = rest.step()
        lines.append(f"{done}, then {rest}." if restates and rest.signs else done)
        inverses.append(inverse)
    if checks:
        lines.append(f"Check: {', '.join(inverses)}.")
    return "\n".join([*lines, f"\\boxed{{{rest.numbers[0]}}}"])
