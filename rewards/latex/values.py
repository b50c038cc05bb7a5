"""Evaluate expressions: exactly as fractions where possible, otherwise with as many digits as needed.

Every value is a `Fraction`, or a real or complex number of mpmath. The digits grow with the sizes of the
intermediate values, so that `\\sqrt{10^{40}+1}` differs from `10^{20}`, and `e^{-1000}` from 0.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import mpmath

from rlkit.rewards.latex.nodes import Call, Name, Node, Number, UnreadableError

Value: TypeAlias = "Fraction | mpmath.mpf | mpmath.mpc"

BASE_DIGITS = 60  # digits with which a value of moderate size is computed
MAX_PRECISION = 1500  # maximum digits of a computation; a value that needs more is unreadable
MAX_BITS = 40_000  # maximum size of a numerator or denominator
LONG_FRACTION = 1_500  # bits from which a fraction at a random point becomes a float
MAX_WORK = 1_500  # maximum number of operations, weighted by their digits
MAX_FACTORIAL = 3_000

_local = threading.local()  # a context has a precision, so threads cannot share it

_TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc")
_NUMERIC = {
    "exp": "exp", "sin": "sin", "cos": "cos", "tan": "tan", "cot": "cot", "sec": "sec", "csc": "csc",
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "arcsec": "asec",
    "arccsc": "acsc",
    "sinh": "sinh", "cosh": "cosh", "tanh": "tanh", "coth": "coth", "sech": "sech", "csch": "csch",
}  # fmt: skip


class TooLarge(UnreadableError):  # noqa: N818
    """A value is too large or too expensive to be computed."""


class Undefined(UnreadableError):  # noqa: N818
    """The expression has no value at this point, such as 1/0."""


class Evaluator:
    """Evaluates expressions at one point.

    Attributes:
        magnitude: Largest |log10 |v|| of the values v so far.
    """

    def __init__(self, point: Mapping[str, Fraction], digits: int = BASE_DIGITS) -> None:
        self.point = point
        self.digits = digits
        self.magnitude = 0.0
        self.work = 0.0
        self.has_complex_parts = False
        if not hasattr(_local, "context"):
            _local.context = mpmath.MPContext()
        self.context = _local.context
        self.context.dps = digits

    def evaluate(self, node: Node) -> Value:
        """Return the value of an expression.

        Raises:
            UnreadableError: The node is no expression, or too large; `Undefined` if it has no value here.
        """
        if isinstance(node, Number):
            if node.value:
                self.note_size(node.value)
            return self.check(node.value)
        if isinstance(node, Name):
            return self.evaluate_name(node)
        if not isinstance(node, Call):
            raise UnreadableError("not an expression")
        arguments = [self.evaluate(argument) for argument in node.arguments]
        self.work += (
            1 if all(isinstance(value, Fraction) for value in arguments) else self.digits / BASE_DIGITS
        )
        if self.work > MAX_WORK:
            raise TooLarge("too expensive")
        try:
            value = self.apply(node.operator, arguments)
        except (ZeroDivisionError, ValueError, OverflowError, TypeError) as error:
            raise Undefined(str(error)) from error
        return self.check(value)

    def evaluate_name(self, node: Name) -> Value:
        """Return the value of a variable or constant."""
        if not node.is_constant:
            return self.point[node.name]
        if node.name == "i":
            return self.context.mpc(0, 1)
        if node.name == "infinity":
            raise UnreadableError("infinite")
        return self.context.pi() if node.name == "pi" else self.context.e()

    def check(self, value: Value) -> Value:
        """Return a value, real if its imaginary part is 0. Raise if it is too large or infinite."""
        if isinstance(value, Fraction):
            num_bits = max(value.numerator.bit_length(), value.denominator.bit_length())
            if num_bits > MAX_BITS:
                raise TooLarge("too large")
            # At a random point, a long fraction is slow and no more exact than its digits.
            return value if num_bits < LONG_FRACTION or not self.point else self.number(value)
        if hasattr(value, "_mpc_") and value.imag == 0:
            value = value.real
        self.has_complex_parts |= hasattr(value, "_mpc_")
        if not self.context.isfinite(value):
            raise Undefined("infinite")
        if value != 0:
            self.note_size(value)
        return value

    def note_size(self, value: Value) -> None:
        """Keep the largest size of a value, which decides about the digits."""
        if isinstance(value, Fraction):
            bits = value.numerator.bit_length() - value.denominator.bit_length() if value else 0
        else:
            bits = int(self.context.mag(value))
        self.magnitude = max(self.magnitude, abs(bits) * math.log10(2))
        if self.magnitude > MAX_PRECISION / 2:
            raise TooLarge("too large")

    def number(self, value: Value) -> Any:
        """Return a value as a number of mpmath."""
        if isinstance(value, Fraction):
            self.note_size(value)
            return self.context.mpf(value.numerator) / value.denominator
        return value

    def apply(self, operator: str, arguments: list[Value]) -> Value:
        """Return the value of an operator or function."""
        first = arguments[0]
        second = arguments[1] if len(arguments) > 1 else None
        match operator:
            case "+" | "-" | "*" | "/" if second is not None:
                return self.arithmetic(operator, first, second)
            case "unary -":
                return -first
            case "^" if second is not None:
                return self.power(first, second)
            case "root" if second is not None:
                return self.power(second, 1 / first)
            case "%":
                return self.arithmetic("/", first, Fraction(100))
            case "degree":
                return self.number(first) * self.context.pi / 180
        return self.function(operator, arguments)

    def function(self, operator: str, arguments: list[Value]) -> Value:
        """Return the value of a function."""
        first = arguments[0]
        second = arguments[1] if len(arguments) > 1 else None
        match operator:
            case "abs":
                return abs(first)
            case "floor" | "ceil":
                if isinstance(first, Fraction):
                    return Fraction(math.floor(first) if operator == "floor" else math.ceil(first))
                return getattr(self.context, operator)(first)
            case "!" | "!!":
                return self.factorial(operator, first)
            case "binom" if second is not None:
                return self.binomial(first, second)
            case "max" | "min" | "gcd" | "lcm":
                return self.select(operator, arguments)
            case "ln" | "log" | "lg":
                base = self.context.e() if operator == "ln" else Fraction(10)
                return self.logarithm(first, base if second is None else second)
            case "mod" if isinstance(first, Fraction) and isinstance(second, Fraction):
                return first % second
        if operator in _NUMERIC and len(arguments) == 1:
            return self.numeric(operator, first)
        if operator in ("arg", "det", "deg"):
            return self.unknown_function(operator, first)
        raise UnreadableError(f"cannot evaluate {operator}")

    def arithmetic(self, operator: str, a: Value, b: Value) -> Value:
        """Return a sum, difference, product or quotient."""
        if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
            a, b = self.number(a), self.number(b)
        match operator:
            case "+":
                return self.without_noise(a + b, max(abs(a), abs(b)))
            case "-":
                return self.without_noise(a - b, max(abs(a), abs(b)))
            case "*":
                return a * b
        return a / b

    def without_noise(self, value: Value, size: Value) -> Value:
        """Return 0 for a value that cancellation left, far below the size of what was cancelled."""
        if isinstance(value, Fraction) or abs(value) > size * self.context.mpf(10) ** (10 - self.digits):
            return value
        return Fraction(0)

    def power(self, base: Value, exponent: Value) -> Value:
        """Return a power; odd roots of negative numbers are real."""
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            exact = self.exact_power(base, exponent)
            if exact is not None:
                return exact
            if base < 0 and exponent.denominator % 2 == 1:
                sign = -1 if exponent.numerator % 2 else 1
                return sign * self.power(-base, exponent)
        elif isinstance(exponent, Fraction) and exponent.denominator % 2 and exponent.denominator > 1:
            is_negative = not isinstance(base, Fraction) and self.context.im(base) == 0 and base < 0
            if is_negative:
                sign = -1 if exponent.numerator % 2 else 1
                return sign * self.power(-base, exponent)
        if base == 0:
            if self.context.re(exponent) <= 0:
                raise Undefined("0 to a power that is not positive")
            return Fraction(0)
        number, power = self.number(base), self.number(exponent)
        self.check_exponent(power * self.context.log(number))
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            return number**exponent.numerator
        return number**power

    def check_exponent(self, logarithm: Any) -> None:
        """Raise if e to this power is too large or too small to be computed."""
        if abs(self.context.re(logarithm)) > MAX_PRECISION * 1.15:
            raise TooLarge("too large")
        self.check_phase(self.context.im(logarithm))

    def check_phase(self, angle: Any) -> None:
        """Raise if an angle is too large to be reduced exactly."""
        if abs(self.context.re(angle)) > 10**30:
            raise TooLarge("too large an angle")

    def exact_power(self, base: Fraction, exponent: Fraction) -> Fraction | None:
        """Return a power as a fraction; None if it is irrational."""
        if exponent.denominator == 1:
            if abs(base) in (0, 1):
                if base == 0 and exponent <= 0:
                    raise Undefined("0 to a power that is not positive")
                return base if base >= 0 or exponent.numerator % 2 else -base
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if bits * abs(exponent.numerator) > MAX_BITS * 1.05:
                raise TooLarge("too large")
            return base**exponent.numerator
        if base < 0 or exponent.denominator > 64 or abs(exponent.numerator) > 1000:
            return None
        top = integer_root(base.numerator, exponent.denominator)
        bottom = integer_root(base.denominator, exponent.denominator)
        if top is None or bottom is None:
            return None
        return self.exact_power(Fraction(top, bottom), Fraction(exponent.numerator))

    def factorial(self, operator: str, n: Value) -> Value:
        """Return n! or n!!, for fractions by the gamma function."""
        if isinstance(n, Fraction) and n.denominator == 1:
            if n < 0:
                raise Undefined("the factorial of a negative integer")
            if n > MAX_FACTORIAL:
                raise TooLarge("too large a factorial")
            if operator == "!":
                return Fraction(math.factorial(n.numerator))
            return Fraction(math.prod(range(n.numerator, 0, -2)))
        if operator == "!!":
            raise UnreadableError("a double factorial of a fraction")
        return self.gamma(self.number(n) + 1)

    def gamma(self, x: Any) -> Value:
        """Return the gamma function of a number that is not an integer."""
        if self.digits > 4 * BASE_DIGITS or abs(x) > MAX_FACTORIAL:
            raise TooLarge("too large a factorial")
        return self.context.gamma(x)

    def binomial(self, n: Value, k: Value) -> Value:
        """Return n choose k."""
        if (
            isinstance(n, Fraction)
            and isinstance(k, Fraction)
            and n.denominator == k.denominator == 1
            and n >= 0
        ):
            if n > MAX_FACTORIAL:
                raise TooLarge("too large a binomial")
            return Fraction(math.comb(n.numerator, k.numerator)) if k >= 0 else Fraction(0)
        top, bottom = self.number(n), self.number(k)
        return self.gamma(top + 1) / (self.gamma(bottom + 1) * self.gamma(top - bottom + 1))

    def select(self, operator: str, arguments: list[Value]) -> Value:
        """Return the maximum, minimum, greatest common divisor or least common multiple."""
        if operator in ("max", "min"):
            return (max if operator == "max" else min)(arguments)
        integers = [
            value.numerator for value in arguments if isinstance(value, Fraction) and value.denominator == 1
        ]
        if len(integers) != len(arguments):
            raise UnreadableError("not integers")
        return Fraction((math.gcd if operator == "gcd" else math.lcm)(*integers))

    def logarithm(self, x: Value, base: Value) -> Value:
        """Return a logarithm, exactly if it is an integer."""
        if x == 0 or base in (0, 1):
            raise Undefined("logarithm of 0")
        if isinstance(x, Fraction) and isinstance(base, Fraction) and x > 0 and base > 1:
            log_base = math.log(base.numerator) - math.log(base.denominator)
            log_x = math.log(x.numerator) - math.log(x.denominator)
            k = round(log_x / log_base) if log_base else 0
            for power in (k - 1, k, k + 1):
                if abs(power) < 1000 and self.exact_power(base, Fraction(power)) == x:
                    return Fraction(power)
        numerator, denominator = self.context.log(self.number(x)), self.context.log(self.number(base))
        return self.without_noise(numerator, Fraction(1)) / denominator

    def numeric(self, name: str, x: Value) -> Value:
        """Return the value of a transcendental function."""
        number = self.number(x)
        if name == "exp" or name in ("sinh", "cosh", "tanh", "coth", "sech", "csch"):
            self.check_exponent(number)
            if name != "exp" and abs(number) > BASE_DIGITS:
                raise TooLarge("too close to its limit")
        elif name in _TRIGONOMETRIC:
            self.check_phase(number)
            self.check_exponent(self.context.im(number))
        value = getattr(self.context, _NUMERIC[name])(number)
        if name in _TRIGONOMETRIC and abs(number) > 1:
            if abs(value) > self.context.mpf(10) ** (self.digits - 10):
                raise Undefined("a pole")
            return self.without_noise(value, abs(number))
        return value

    def unknown_function(self, name: str, x: Value) -> Value:
        """Return a value that depends on the name and the argument, for a function that is not known."""
        seed = Fraction(int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "big"), 9973)
        return self.context.cos(self.number(x) * self.number(seed) + self.number(seed))


def integer_root(number: int, index: int) -> int | None:
    """Return the exact root of a non-negative integer, or None if it is irrational."""
    if number in (0, 1):
        return number
    if index == 2:
        root = math.isqrt(number)
    elif number.bit_length() > 1024:
        return None
    else:
        root, high = 1, 1 << (number.bit_length() // index + 1)
        while root < high:
            middle = (root + high + 1) // 2
            root, high = (middle, high) if middle**index <= number else (root, middle - 1)
    return root if root**index == number else None


def point_for(names: frozenset[str], seed: int) -> dict[str, Fraction]:
    """Return a value for each variable that depends on its name and the seed alone.

    The points are of different kinds, because formulas with `|x|`, `\\lfloor x \\rfloor` or `\\max` agree on
    some: 0 positive, 1 negative, 2 and 3 of either sign, 4 and 5 integers up to 100, 6 and 7 large, of either
    sign.
    """
    point = {}
    for name in sorted(names):
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        # An odd numerator over 256: no power of a negative number with this exponent is real.
        value = Fraction(int.from_bytes(digest[:2], "big") % 300 * 2 + 45, 256)
        if seed in (4, 5):
            value = Fraction(int.from_bytes(digest[:2], "big") % 90 + 7 + seed % 2)
        elif seed in (6, 7):
            value *= 37
        is_negative = seed == 1 or (seed in (2, 3, 6, 7) and digest[3] % 2 == 1)
        point[name] = -value if is_negative else value
    return point


class Pair(NamedTuple):
    """The values of two expressions at a point, None if undefined.

    Attributes:
        first, second: The values.
        is_first_complex, is_second_complex: Whether a part of the expression is not real, such as the root of
            a negative number.
        magnitude: Largest |log10 |v|| of all parts.
        digits: Digits with which both were computed.
    """

    first: Value | None
    second: Value | None
    is_first_complex: bool
    is_second_complex: bool
    magnitude: float
    digits: int


def evaluate_both(a: Node, b: Node, point: Mapping[str, Fraction]) -> Pair:
    """Return the values of two expressions at a point."""
    digits = BASE_DIGITS
    while True:
        evaluator = Evaluator(point, digits)
        values: list[Value | None] = []
        complex_parts = []
        for node in (a, b):
            evaluator.has_complex_parts = False
            try:
                values.append(evaluator.evaluate(node))
            except Undefined:
                values.append(None)
            complex_parts.append(evaluator.has_complex_parts)
        required = BASE_DIGITS + 2 * math.ceil(evaluator.magnitude)
        if digits >= required or digits > MAX_PRECISION:
            return Pair(values[0], values[1], complex_parts[0], complex_parts[1], evaluator.magnitude, digits)
        digits = required


def evaluate(node: Node, point: Mapping[str, Fraction]) -> Value | None:
    """Return the value of an expression at a point, or None if it is undefined there."""
    try:
        return Evaluator(point).evaluate(node)
    except Undefined:
        return None


def is_real(value: Value) -> bool:
    """Return whether a value is real, up to rounding errors of its imaginary part."""
    if isinstance(value, Fraction):
        return True
    return bool(abs(value.imag) <= abs(value) * mpmath.mpf(10) ** -(BASE_DIGITS // 2))


def as_float(value: Value) -> Any:
    """Return a value as a number of mpmath, in the precision of the last evaluation."""
    if isinstance(value, Fraction):
        return _local.context.mpf(value.numerator) / value.denominator
    return value


def difference(a: Value, b: Value) -> Any:
    """Return a - b."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a - b
    return as_float(a) - as_float(b)


def power_of_ten(exponent: float) -> Any:
    """Return 10 to a power, which may be far below the smallest float."""
    return _local.context.mpf(10) ** math.floor(exponent)


def half_unit(size: Any, digits: int) -> Any:
    """Return half a unit in the last place of a float of this size with `digits` significant digits."""
    exponent = int(_local.context.floor(_local.context.log10(size)))
    return _local.context.mpf(10) ** (exponent - digits + 1) / 2
