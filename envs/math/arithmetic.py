"""Generated arithmetic problems with integer answers and worked solutions, used if no dataset is given.

Problem i of a split depends on the config, the split, the seed and i alone. A hash of the calculation
determines its split, so no calculation is in two splits, whatever the seeds and the wording of the problem.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from rlkit.environment import SPLITS, hashed_choice
from rlkit.errors import UserError

OPERATIONS = ("+", "-", "*")
KINDS = ("expression", "story")
SOLUTION_STYLES = ("steps", "verbose", "mixed")

_MAX_DRAWS = 10_000  # of calculations per problem, until one belongs to the split
_NAMES = ("Ann", "Ben", "Eva", "Leo", "Mia", "Tom")
_THINGS = ("apples", "books", "coins", "eggs", "pens", "stones")
_GAIN_EVENTS = ("gets {} more", "buys {}", "finds {}")
_LOSS_EVENTS = ("gives away {}", "loses {}", "sells {}")
_INVERSE_SIGNS = {"+": "-", "-": "+"}


@dataclass(frozen=True)
class ArithmeticConfig:
    """Distribution of problems: the validated arguments of `MathEnvironment`."""

    terms: tuple[int, int]  # minimum and maximum number of terms
    max_number: int  # numbers are from 1 to max_number
    operations: Sequence[str]
    kinds: Sequence[str]


@dataclass(frozen=True)
class Calculation:
    """Expression of n numbers and the n - 1 signs between them."""

    numbers: Sequence[int]
    signs: Sequence[str]

    def __str__(self) -> str:
        text = str(self.numbers[0])
        for sign, number in zip(self.signs, self.numbers[1:], strict=True):
            text += f" {sign} {number}"
        return text

    def step(self) -> tuple[Calculation, str, str]:
        """Perform one operation, products first.

        Returns:
            The remaining calculation, the equation of this step (`3 * 4 = 12`), and its inverse as a check.
        """
        i = self.signs.index("*") if "*" in self.signs else 0
        a, sign, b = self.numbers[i], self.signs[i], self.numbers[i + 1]
        if sign == "*":
            value = a * b
            inverse = f"{b} * {a} = {value}"
        else:
            value = a + b if sign == "+" else a - b
            inverse = f"{value} {_INVERSE_SIGNS[sign]} {b} = {a}"
        numbers = [*self.numbers[:i], value, *self.numbers[i + 2 :]]
        remaining = Calculation(numbers, [*self.signs[:i], *self.signs[i + 1 :]])
        return remaining, f"{a} {sign} {b} = {value}", inverse

    def value(self) -> int:
        """Return the result."""
        remaining = self
        while remaining.signs:
            remaining = remaining.step()[0]
        return remaining.numbers[0]


def make_problem(config: ArithmeticConfig, split: str, seed: int, i: int) -> tuple[Calculation, str, str]:
    """Generate problem i of a split and return its calculation, kind and wording.

    Raises:
        UserError: The config allows so few calculations that none belongs to the split.
    """
    rng = random.Random(f"math-v1 {split} {seed} {i}")
    for _ in range(_MAX_DRAWS):
        calculation = _draw(config, rng)
        if split_of(str(calculation)) == split:
            # Drawn after the calculation, so that both kinds share the same calculations.
            kind = rng.choice(config.kinds)
            text = _story(calculation, rng) if kind == "story" else f"What is {calculation}?"
            return calculation, kind, text
    raise UserError(
        f"no calculation with these arguments belongs to the split {split!r}: raise max_number or terms"
    )


def _draw(config: ArithmeticConfig, rng: random.Random) -> Calculation:
    num_terms = rng.randint(*config.terms)
    numbers = [rng.randint(1, config.max_number) for _ in range(num_terms)]
    signs = [rng.choice(config.operations) for _ in range(num_terms - 1)]
    if "*" not in config.operations:
        # Raise the first number so that no intermediate result is negative: a story cannot have -2 apples.
        total = lowest = numbers[0]
        for sign, number in zip(signs, numbers[1:], strict=True):
            total += number if sign == "+" else -number
            lowest = min(lowest, total)
        numbers[0] -= min(lowest, 0)
    return Calculation(numbers, signs)


def split_of(text: str, fractions: Sequence[float] = (0.8, 0.1, 0.1)) -> str:
    """Return the split that a string belongs to by its hash, given the fractions of train, dev and test."""
    digest = hashlib.sha256(f"math-v1 split {text}".encode()).digest()
    point = int.from_bytes(digest[:6], "big") / 2**48 * sum(fractions)  # 48 bits are exact in a float
    bounds = accumulate(fractions)
    return next(split for split, bound in zip(SPLITS, bounds, strict=True) if point < bound)


def _story(calculation: Calculation, rng: random.Random) -> str:
    name, things = rng.choice(_NAMES), rng.choice(_THINGS)
    pronoun = "she" if name in ("Ann", "Eva", "Mia") else "he"
    sentences = [f"{name} has {calculation.numbers[0]} {things}."]
    for i, (sign, number) in enumerate(zip(calculation.signs, calculation.numbers[1:], strict=True)):
        event = rng.choice(_GAIN_EVENTS if sign == "+" else _LOSS_EVENTS).format(number)
        sentences.append(f"{f'Then {pronoun}' if i else pronoun.capitalize()} {event}.")
    sentences.append(f"How many {things} does {name} have now?")
    return " ".join(sentences)


def solve(calculation: Calculation, style: str) -> str:
    r"""Return a worked solution, one operation per line, that ends in `\boxed{}`.

    `steps` has only the operations. `verbose` also restates the problem, gives the remaining calculation
    after each step, and checks every step. `mixed` is `steps`, `verbose` or one half of it (restated only, or
    checked only), selected by a hash of the calculation, so that a model that imitates it varies in length.
    """
    if style == "mixed":
        choice = hashed_choice(f"style {calculation}", 4)
        restates, checks = bool(choice & 1), bool(choice >> 1)
    else:
        restates = checks = style == "verbose"
    lines = [f"Find {calculation}."] if restates else []
    inverses = []
    remaining = calculation
    while remaining.signs:
        remaining, equation, inverse = remaining.step()
        if restates and remaining.signs:
            lines.append(f"{equation}, then {remaining}.")
        else:
            lines.append(equation)
        inverses.append(inverse)
    if checks:
        lines.append(f"Check: {', '.join(inverses)}.")
    return "\n".join([*lines, f"\\boxed{{{remaining.numbers[0]}}}"])
