"""Units of measurement: which words are units, and how they convert."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction


def words_of(text: str) -> frozenset[str]:
    """Return the words of a string as a set."""
    return frozenset(text.split())


MAX_WORDS = 6  # maximum number of words after a value, as in `3 red marbles`

# One line per base unit: name, factor, spellings. Units of the same base convert into each other.
_TABLE = """
length 1/1000 mm millimeter millimetre
length 1/100 cm centimeter centimetre
length 1 m meter metre
length 1000 km kilometer kilometre
length 127/5000 in inch inches
length 381/1250 ft foot feet
length 1143/1250 yd yard
length 201168/125 mi mile
mass 1/1000 mg milligram
mass 1 g gram gm
mass 1000 kg kilogram kilo
mass 45359237/100000 lb lbs
mass 45359237/1600000 oz ounce
time 1/1000 ms millisecond
time 1 s sec second
time 60 min minute
time 3600 h hr hour
time 86400 day
time 604800 week
month 1 month
month 12 yr year
volume 1/1000 ml mL milliliter millilitre
volume 1 l L liter litre
volume 473176473/125000000 gal gallon
money 1 dollar USD $ buck
money 1/100 cent ¢
euro 1 euro €
pound 1 pound £ GBP
yuan 1 yuan RMB
rupee 1 rupee Rs
angle 1 ° degree deg
radian 1 rad radian
newton 1 N newton
joule 1 J joule
watt 1 W watt
pascal 1 Pa pascal
volt 1 V volt
ampere 1 A amp ampere
ohm 1 Ω ohm
hertz 1 Hz hertz
kelvin 1 K kelvin
mole 1 mol mole
tesla 1 T tesla
coulomb 1 C coulomb
fahrenheit 1 F fahrenheit
celsius 1 celsius
unit 1 unit
"""
_UNITS: dict[str, tuple[str, Fraction]] = {}
for _line in _TABLE.split("\n"):
    _base, _factor, *_spellings = _line.split() or ("", "1")
    for _spelling in _spellings:
        _UNITS[_spelling] = (_base, Fraction(_factor))
        if len(_spelling) > 3:
            _UNITS[_spelling + "s"] = _UNITS[_spelling]
for _spelling in ("kgs", "hrs", "mins", "secs", "yrs", "yds", "gals", "amps", "days"):
    _UNITS[_spelling] = _UNITS[_spelling[:-1]]

# Abbreviations that are units in plain text, too: `5 cm`. `mg` and `ml` may also be products.
ABBREVIATIONS = words_of(
    "mm cm km ft yd mi kg kgs lb lbs oz sec min mins secs hr hrs yr yrs gal mph kmh Hz Pa mol deg rad USD"
    " sq cu in cc"
)
_MULTIPLIERS = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
}  # fmt: skip
_COMPOUND = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h", "kmph": "km/h"}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
# Words that retract or change a value, or add another one. They are never the name of what is counted.
_NOT_UNITS = words_of(
    "is are was were be been not no nor or and but if when while unless except than then else otherwise wrong"
    " incorrect invalid false true correct right maybe perhaps possibly probably either neither never"
    " none nothing"
    " cannot cant isnt arent wasnt werent dont doesnt didnt wont without instead rather approximately"
    " approx about"
    " around roughly nearly almost over under above below less fewer least most greater larger smaller bigger"
    " plus minus divided multiplied half third quarter twice double triple pair couple zero one two"
    " three four five"
    " six seven eight nine ten eleven twelve twenty thirty forty fifty base mod modulo remainder"
    " excluded excluding"
    " exclude rejected impossible undefined unknown nope error mistake sorry actually answer answers only"
    " should could would might must may can will does do did has have had this that it its these those"
    " which who"
    " where because since so thus hence therefore for with as to from until till any some each other another"
    " different hmm wait vs versus via squareroot root infinity infinite negative positive what how why"
    " plusminus"
    " equals equal correction ignore discard discarded unlikely guess guessing alternatively elsewhere"
    " ans false"
    " bad untrue contradiction extraneous reject retract refute withdraw remove disregard delete cancel void"
    " strike skip mistaken erroneous inaccurate nonsense fake spurious inadmissible contradicts fail unsure"
    " uncertain doubtful unverified nah todo placeholder oder falsch nicht neun acht ou factorial halve tenth"
    " hundredth thousandth millionth hundred thousand million billion trillion quadrillion quintillion lakh"
    " crore score gross dozen ten double halved tripled"
    " negated inverse reciprocal opposite complement exponent"
    " logarithm multiple more too many few low high minimum maximum permille per squared bound upper lower"
)
_COMMENT = re.compile(r"\w\w[^e]ed$|(?:[fxnhrd]|ie)th$")
_PART = re.compile(r"[^\W\d_]+|[°$¢€£Ω]|[/^()]|-?[0-9]+|[*·.,:;!?' \-~]+")


@dataclass(frozen=True)
class Unit:
    """What follows a value.

    Attributes:
        dimensions: Powers of base units, sorted.
        scale: Factor to the base units.
        words: Other words, in the singular: what is counted.
        multiplier: 1,000,000 for `5 million`.
    """

    dimensions: tuple[tuple[str, int], ...] = ()
    scale: Fraction = Fraction(1)
    words: frozenset[str] = frozenset()
    multiplier: int = 1


def is_unit(word: str) -> bool:
    """Return whether a word is a unit."""
    return word in _UNITS or word.lower() in _UNITS


def read_unit(phrase: str) -> Unit | None:
    """Read the phrase after a value, such as `cm^2`, `miles per hour` or `red marbles`.

    None if it says more than the unit or what is counted, such as `is wrong` or `or 5`.
    """
    phrase = re.sub(r"\b(?:mph|kmh|kph|kmph)\b", lambda match: _COMPOUND[match[0]], phrase)
    parts = [part for part in _PART.findall(phrase) if part.strip("^*·.,:;!?' -~()")]
    if "".join(_PART.findall(phrase)) != phrase or len(parts) > 2 * MAX_WORDS:
        return None
    dimensions: Counter[str] = Counter()
    scale, multiplier = Fraction(1), 1
    words: list[str] = []
    sign, power = 1, 1
    last: tuple[str, Fraction, int] | None = None  # base, factor and sign of the unit before
    for part in parts:
        if part.lstrip("-").isdigit() or part in ("squared", "cubed"):
            exponent = _POWERS.get(part) or int(part)
            if last is None or not 0 < abs(exponent) < 10:
                return None
            base, factor, unit_sign = last
            dimensions[base] += (exponent - 1) * unit_sign
            scale *= factor ** ((exponent - 1) * unit_sign)
            last = None
        elif part in ("/", "per"):
            sign = -1
        elif part in _MULTIPLIERS:
            multiplier *= _MULTIPLIERS[part]
        elif part in _POWERS:
            power = _POWERS[part]
        elif is_unit(part):
            base, factor = _UNITS.get(part) or _UNITS[part.lower()]
            dimensions[base] += sign * power
            scale *= factor ** (sign * power)
            last, power = (base, factor, sign), 1
        elif _is_counted(part):
            words.append(_singular(part.lower()))
        else:
            return None
    # A bracket, or a participle or an ordinal at the end, is a comment: `7 (extraneous)`, `7 doubled`.
    is_comment = bool(words) and ("(" in phrase or _COMMENT.search(words[-1]) is not None)
    if len(words) > MAX_WORDS or power != 1 or is_comment:
        return None
    # "units" says nothing about which, so it fits any unit.
    nonzero = sorted((base, exponent) for base, exponent in dimensions.items() if exponent and base != "unit")
    return Unit(tuple(nonzero), scale, frozenset(words), multiplier)


def _is_counted(word: str) -> bool:
    """Return whether a word may name what is counted, rather than take a value back or change it."""
    lower = word.lower()
    is_name = word.isascii() and word.isalpha() and len(word) > 1 and not lower.endswith("ly")
    return is_name and lower not in _NOT_UNITS and _singular(lower) not in _NOT_UNITS


def _singular(word: str) -> str:
    irregular = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse"}
    if word in irregular:
        return irregular[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word
