r"""Parse the tokens of an answer into nodes.

The grammar, from the outside in: a list of relations, a relation of unions, a union of sums, sums, products,
powers, and what is in brackets. What it does not know is unreadable; it never guesses. A value may be
followed by a unit. An answer that mixes words and expressions is a `Template`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

from rlkit.rewards.latex.expressions import ExpressionParser
from rlkit.rewards.latex.names import read_name
from rlkit.rewards.latex.nodes import (
    Call,
    Node,
    Number,
    Quantity,
    Relation,
    Sequence,
    Side,
    Template,
    UnreadableError,
    Words,
    height,
)
from rlkit.rewards.latex.tokens import RELATIONS, Token, clean, tokenize
from rlkit.rewards.latex.units import Unit, read_unit
from rlkit.rewards.latex.words import normalize_words, read_words, without_text_commands

MAX_CHARACTERS = 2000
MAX_TOKENS = 1000
MAX_HEIGHT = 150  # maximum height of the tree, which all functions traverse recursively

_CURRENCIES = {"\\$": "money", "pounds": "pound", "euro": "euro"}
# Signs in the phrase behind a value, and how `read_unit` spells them.
_UNIT_SIGNS = {
    ".": "", "/": "/", "*": "*", "-": "-", "^": "^", "{": "", "}": "", "(": "(", ")": ")",
    "\\$": "$", "circ": "°", "Omega": "Ω", "pounds": "£", "euro": "€",
}  # fmt: skip
_TIME = re.compile(r"([0-9]{1,2})(?::([0-9]{2}))?\s{0,4}([ap])\.?\s?m\.?", re.IGNORECASE)


def parse(text: str) -> Node:
    """Parse an answer.

    Raises:
        UnreadableError: The text is not an answer that can be compared.
    """
    if len(text) > MAX_CHARACTERS:
        raise UnreadableError(f"longer than {MAX_CHARACTERS} characters")
    text = clean(text)
    if words := read_words(text):
        return words
    if time := _TIME.fullmatch(without_text_commands(text)):
        hours, minutes = (Number(Fraction(int(digits or "0"))) for digits in time.groups()[:2])
        return Call(":", (hours, minutes, Words(time[3].lower())))
    tokens = _without_prefix(tokenize(text))
    if not tokens:
        raise UnreadableError("empty")
    if len(tokens) > MAX_TOKENS:
        raise UnreadableError(f"more than {MAX_TOKENS} tokens")
    try:
        node = _AnswerParser(tokens).parse_all()
    except UnreadableError:
        node = _parse_template(tokens)
    if height(node) > MAX_HEIGHT:
        raise UnreadableError("too many terms")
    return node


def _without_prefix(tokens: list[Token]) -> list[Token]:
    """Remove leading signs: `=`, `\\approx`, `\\therefore` and `\\implies`."""
    while tokens and tokens[0].text in ("=", "approx", "therefore", "implies"):
        tokens = tokens[1:]
    return tokens


def _parse_template(tokens: list[Token]) -> Template:
    """Parse words and expressions in turn."""
    parts: list[Node] = []
    expression: list[Token] = []
    for token in [*tokens, Token("word", "")]:
        if token.kind not in ("word", "separator"):
            expression.append(token)
            continue
        stripped = [t for t in expression if t.text not in (",", ";", ":", ".", "(", ")")]
        if stripped:
            while expression[0].text in (",", ";", ":", "."):
                expression = expression[1:]
            while expression[-1].text in (",", ";", ":", "."):
                expression = expression[:-1]
            parts.append(_AnswerParser(expression).parse_all())
        expression = []
        words = normalize_words(token.text)
        if words and parts and isinstance(parts[-1], Words):
            parts[-1] = Words(f"{parts[-1].text} {words}")
        elif words:
            parts.append(Words(words))
    if not any(isinstance(part, Words) for part in parts):
        raise UnreadableError("not an expression")
    return Template(tuple(parts))


class _AnswerParser(ExpressionParser):
    """Adds what surrounds expressions in an answer."""

    def parse_all(self) -> Node:
        """Parse all tokens."""
        node = self.parse_list()
        if self.at("over", "choose"):
            operator = "/" if self.take().text == "over" else "binom"
            node = Call(operator, (node, self.parse_sum()))
        if self.peek() is not None:
            raise UnreadableError(f"unexpected {self.tokens[self.position].text!r}")
        return node

    def parse_list(self) -> Node:
        """Parse items between commas, semicolons, `and` and `or`; a single item is no list."""
        items = [self.parse_relation()]
        separator = ","
        while True:
            token = self.peek()
            if token is not None and token.kind == "separator":
                separator = token.text
            elif not self.at(",", ";"):
                break
            self.position += 1
            following = self.peek()
            if following is not None and following.kind == "separator":
                separator = following.text
                self.position += 1
            items.append(self.parse_relation())
        return items[0] if len(items) == 1 else Sequence("", tuple(items), separator)

    def parse_relation(self) -> Node:
        """Parse sides with relation signs between them; one side alone is no relation."""
        sides = [self.parse_side()]
        operators = []
        while (token := self.peek()) is not None:
            if self.at("not"):
                following = self.peek(1)
                negated = {"=": "!=", "in": "notin"}.get(following.text if following else "")
                if negated is None:
                    raise UnreadableError("unknown negation")
                operators.append(negated)
                self.position += 2
            elif token.kind in ("symbol", "command") and token.text in RELATIONS:
                operators.append(RELATIONS[token.text])
                self.position += 1
            else:
                break
            sides.append(self.parse_side())
        return Relation(tuple(sides), tuple(operators)) if operators else sides[0].node

    def parse_side(self) -> Side:
        """Parse one side of a relation, which may be the name of a quantity in words."""
        start = self.position
        token = self.peek()
        if token is not None and token.kind == "word":
            following = self.peek(1)
            if following is None or (following.text in ("=", ":", ",", ";") and following.kind == "symbol"):
                if read_unit(token.text) is None and normalize_words(token.text) != "answer":
                    raise UnreadableError("not a name")
                self.position += 1
                return Side(Words(normalize_words(token.text)), normalize_words(token.text))
        node = self.parse_union()
        return Side(node, read_name(self.tokens[start : self.position]))

    def parse_union(self) -> Node:
        """Parse sets with set operators between them."""
        node = self.parse_value()
        while self.at("cup", "cap", "setminus"):
            operator = self.take().text
            node = Call(operator, (node, self.parse_value()))
        return node

    def parse_value(self) -> Node:
        """Parse a sum, and the unit behind it."""
        if self.at(*_CURRENCIES):
            currency = _CURRENCIES[self.take().text]
            amount = self.parse_sum()
            following = self.peek()
            if following is not None and following.kind == "word":
                amount = self.parse_unit(amount)
            if not isinstance(amount, Quantity):
                return Quantity(amount, Unit(((currency, 1),)))
            if amount.unit.dimensions:
                return amount
            return Quantity(amount.value, replace(amount.unit, dimensions=((currency, 1),)))
        value = self.parse_sum()
        token = self.peek()
        if token is not None and (token.kind == "word" or self.at(*_CURRENCIES, "mod")):
            return self.parse_unit(value)
        if self.at(":"):
            return self.parse_ratio(value)
        return value

    def parse_ratio(self, first: Node) -> Node:
        """Parse the other parts of a ratio."""
        if self.in_builder:
            return first
        parts = [first]
        while self.accept(":"):
            parts.append(self.parse_sum())
        return Call(":", tuple(parts))

    def parse_unit(self, value: Node) -> Node:
        """Parse the words behind a value, up to the end of the item."""
        if self.accept("mod"):
            return Call("mod", (value, self.parse_primary()))
        phrase = ""
        while (token := self.peek()) is not None:
            if token.kind == "word":
                phrase += f" {token.text} "
            elif token.kind == "number" and phrase.endswith(("^", "^-")):
                phrase += token.text
            elif token.kind in ("symbol", "command") and token.text in _UNIT_SIGNS:
                phrase = phrase.rstrip() + _UNIT_SIGNS[token.text]
            else:
                break
            self.position += 1
        unit = read_unit(phrase.replace("^°", "°"))
        if unit is None:
            raise UnreadableError("not a unit")
        if unit.multiplier != 1:
            value = Call("*", (value, Number(Fraction(unit.multiplier))))
        return Quantity(value, unit)
