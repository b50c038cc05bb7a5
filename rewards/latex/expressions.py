r"""Parse sums, products and powers."""

from __future__ import annotations

import re
from fractions import Fraction

from rlkit.rewards.latex.nodes import Call, Name, Node, Number, UnreadableError
from rlkit.rewards.latex.numerals import BASES, number_in_base, read_number
from rlkit.rewards.latex.operands import ACCENTS, NOT_NAMES, OperandParser
from rlkit.rewards.latex.tokens import FUNCTIONS, Token


class ExpressionParser(OperandParser):
    """A recursive-descent parser of expressions."""

    def parse_sum(self) -> Node:
        """Parse terms with signs between them."""
        node = self.parse_signed_product()
        while self.at("+", "-", "pm", "mp"):
            operator = self.take().text
            node = Call(operator, (node, self.parse_signed_product()))
        return node

    def parse_signed_product(self) -> Node:
        """Parse a product with the signs before it."""
        signs = []
        while self.at("+", "-", "pm", "mp"):
            signs.append(self.take().text)
        if len(signs) > 2:
            raise UnreadableError("too many signs")
        node = self.parse_product()
        for sign in reversed(signs):
            node = node if sign == "+" else Call(f"unary {sign}", (node,))
        return node

    def parse_product(self) -> Node:
        """Parse factors, with or without signs between them."""
        start = self.peek()
        node = self.parse_power()
        if mixed := self.parse_mixed_number(start, node):
            node = mixed
        while True:
            if self.at_minutes(node):
                node = Call("+", (node, self.parse_minutes()))
            elif self.at("*", "/"):
                operator = self.take().text
                negative = self.accept("-")
                self.accept("+")
                right = self.parse_power()
                node = Call(operator, (node, Call("unary -", (right,)) if negative else right))
            elif self.starts_factor():
                node = Call("*", (node, self.parse_power()))
            else:
                return node

    def parse_mixed_number(self, start: Token | None, integer: Node) -> Node | None:
        """Parse the fraction of a mixed number, `2\\frac{1}{2}` or `2 1/2`, if there is one."""
        is_literal = start is not None and start is self.tokens[self.position - 1]
        if not is_literal or not isinstance(integer, Number) or integer.digits is not None:
            return None
        if self.at("frac"):
            position = self.position
            fraction = self.parse_power()
            if isinstance(fraction, Call) and fraction.operator == "/":
                top, bottom = fraction.arguments
                if isinstance(top, Number) and isinstance(bottom, Number):
                    if not 0 < top.value < bottom.value:
                        raise UnreadableError("an improper fraction after a number")
                    return Call("+", (integer, fraction))
            self.position = position
            return None
        tokens = self.tokens[self.position : self.position + 3]
        if [token.kind for token in tokens] != ["number", "symbol", "number"]:
            return None
        if tokens[1].text != "/" or not tokens[0].spaced:
            return None
        top, bottom = read_number(tokens[0].text), read_number(tokens[2].text)
        if top.digits is not None or bottom.digits is not None or not 0 < top.value < bottom.value:
            raise UnreadableError("not a mixed number")
        self.position += 3
        return Call("+", (integer, Call("/", (top, bottom))))

    def at_minutes(self, node: Node) -> bool:
        """Return whether minutes of an angle follow, as in `63^\\circ 45'`."""
        token, sign = self.peek(), self.peek(1)
        if token is None or sign is None or token.kind != "number":
            return False
        return isinstance(node, Call) and node.operator == "degree" and sign.text in ("'", "^")

    def parse_minutes(self) -> Node:
        """Parse the minutes and seconds of an angle."""
        angle: Node = Number(Fraction(0))
        for scale in (60, 3600):
            token = self.peek()
            if token is None or token.kind != "number":
                break
            self.position += 1
            written = ""
            while (sign := self.peek()) is not None and sign.text in ("'", "^", "{", "}", "prime"):
                written += {"'": "'", "prime": "'"}.get(self.take().text, "")
            if written != "'" * (1 if scale == 60 else 2):
                raise UnreadableError("not minutes and seconds")
            part = Call("/", (read_number(token.text), Number(Fraction(scale))))
            angle = Call("+", (angle, part))
        return Call("degree", (angle,))

    def starts_factor(self) -> bool:
        """Return whether the next token begins a factor that is multiplied without a sign."""
        token = self.peek()
        if token is None or token.kind in ("word", "separator"):
            return False
        if token.kind == "number":
            if self.tokens[self.position - 1].text in ("!", "i"):
                return True
            raise UnreadableError("two numbers without a sign between them")
        if token.kind == "letter":
            return True
        if token.kind == "symbol":
            if token.text == "|":
                return not self.open_bars and not self.in_builder
            if token.text == "{":
                following = self.peek(1)
                if following is not None and following.kind == "number":
                    raise UnreadableError("two numbers without a sign between them")
                return True
            return token.text in ("(", "[")
        return token.text not in NOT_NAMES or token.text in ("frac", "sqrt", "binom", "begin", *ACCENTS)

    def parse_power(self) -> Node:
        """Parse an operand with its exponents and other signs behind it."""
        start = self.position
        return self.parse_postfix(self.parse_primary(), start)

    def parse_postfix(self, node: Node, start: int) -> Node:
        """Parse what follows an operand: exponents, subscripts, `!`, `%` and degrees."""
        has_exponent = False
        while (token := self.peek()) is not None and token.kind in ("symbol", "command"):
            if token.text == "^":
                if has_exponent:
                    raise UnreadableError("two exponents")
                self.position += 1
                node = self.parse_exponent(node)
                has_exponent = isinstance(node, Call) and node.operator == "^"
            elif token.text == "_":
                self.position += 1
                node = self.parse_subscript(node, start)
            elif token.text == "!":
                self.position += 1
                node = Call("!!" if self.accept("!") else "!", (node,))
            elif token.text == "%":
                self.position += 1
                node = Call("%", (node,))
            elif token.text == "'":
                self.position += 1
                node = self.add_prime(node)
            elif token.text == "circ":
                self.position += 1
                node = Call("degree", (node,))
            else:
                break
        return node

    def add_prime(self, node: Node) -> Node:
        """Return the name of a derivative, `y'`."""
        if isinstance(node, Name) and not node.is_constant:
            return Name(f"{node.name}'")
        raise UnreadableError("a prime after an expression")

    def parse_exponent(self, base: Node) -> Node:
        """Parse the exponent after `^`, which may be a prime or a degree sign."""
        if self.accept("prime"):
            return self.add_prime(base)
        if self.accept("circ"):
            return Call("degree", (base,))
        sign = "".join(token.text for token in self.tokens[self.position : self.position + 3])
        if sign in ("{circ}", "{prime}", "{*}"):
            self.position += 3
            return Call("degree", (base,)) if sign == "{circ}" else self.add_prime(base)
        return Call("^", (base, self.parse_script()))

    def parse_script(self) -> Node:
        """Parse the exponent after `^`: a group, a bracket, or a signed number, name or command."""
        negative = self.accept("-")
        self.accept("+")
        token = self.peek()
        if token is not None and token.kind == "command" and token.text in FUNCTIONS:
            raise UnreadableError("a function as an exponent without braces")
        node = self.parse_group() if self.at("{") else self.parse_primary()
        return Call("unary -", (node,)) if negative else node

    def parse_subscript(self, node: Node, start: int) -> Node:
        """Parse a subscript: part of a name, or the base of a number."""
        script = self.read_script()
        if isinstance(node, Name):
            return Name(f"{node.name}_{script}")
        if isinstance(node, Number) and node.base is None:
            script = re.sub(r"base|[()]", "", script)
            base = BASES.get(script) or (int(script) if re.fullmatch("[0-9]{1,2}", script) else 0)
            numeral = next(token.text for token in self.tokens[start:] if token.kind == "number")
            if not 2 <= base <= 36 or not numeral.isdigit():
                raise UnreadableError("an unknown base")
            return number_in_base(numeral, base)
        raise UnreadableError("a subscript after an expression")
