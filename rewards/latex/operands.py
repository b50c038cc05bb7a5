r"""Parse operands: numbers, names, brackets, fractions, roots, functions and matrices."""

from __future__ import annotations

import re
from fractions import Fraction

from rlkit.rewards.latex.nodes import (
    Builder,
    Call,
    Matrix,
    Name,
    NamedSet,
    Node,
    Number,
    Sequence,
    Template,
    UnreadableError,
    Words,
)
from rlkit.rewards.latex.numerals import MAX_LITERAL_DIGITS, read_number
from rlkit.rewards.latex.tokens import FUNCTIONS, RELATIONS, Token
from rlkit.rewards.latex.units import words_of
from rlkit.rewards.latex.words import normalize_words

MAX_DEPTH = 40  # maximum number of nested groups; the parser is recursive

_SETS = ("R", "Z", "Q", "N", "C")
_CLOSING = {"langle": "rangle", "lfloor": "rfloor", "lceil": "rceil"}
_INVERSE = {name: f"arc{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc")}
_MATRICES = {
    "matrix": "matrix", "pmatrix": "matrix", "bmatrix": "matrix", "Bmatrix": "matrix",
    "smallmatrix": "matrix",
    "array": "matrix", "vmatrix": "determinant", "cases": "cases", "aligned": "cases", "gathered": "cases",
}  # fmt: skip
_BIG_OPERATORS = ("sum", "int", "prod", "lim", "iint", "iiint", "oint", "bigcup", "bigcap")
ACCENTS = ("dot", "ddot", "hat", "bar", "tilde", "widehat", "widetilde", "overline")
NOT_NAMES = words_of(
    "cup cap setminus cdot frac sqrt binom left right begin end over choose text rangle rfloor rceil"
    " circ prime pm mp"
    " mid mod dot hat bar tilde ddot overline widehat widetilde pounds euro quad because therefore"
    " implies neg lnot not"
) | frozenset(RELATIONS)


class OperandParser:
    """A cursor over the tokens, and the operands of an expression."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.open_bars = 0
        self.in_builder = False

    def parse_list(self) -> Node:
        """Parse the content of brackets."""
        raise NotImplementedError

    def parse_relation(self) -> Node:
        """Parse an item of a list."""
        raise NotImplementedError

    def parse_sum(self) -> Node:
        """Parse a sum."""
        raise NotImplementedError

    def parse_power(self) -> Node:
        """Parse an operand with its exponents and other signs behind it."""
        raise NotImplementedError

    def parse_script(self) -> Node:
        """Parse an exponent."""
        raise NotImplementedError

    def starts_factor(self) -> bool:
        """Return whether the next token begins a factor that is multiplied without a sign."""
        raise NotImplementedError

    def peek(self, offset: int = 0) -> Token | None:
        """Return a token ahead, or None at the end."""
        index = self.position + offset
        return self.tokens[index] if index < len(self.tokens) else None

    def at(self, *texts: str) -> bool:
        """Return whether the next token is one of these signs or commands."""
        token = self.peek()
        return token is not None and token.text in texts and token.kind in ("symbol", "command")

    def take(self) -> Token:
        """Consume the next token."""
        token = self.peek()
        if token is None:
            raise UnreadableError("incomplete")
        self.position += 1
        return token

    def accept(self, *texts: str) -> bool:
        """Consume the next token if it is one of these; return whether it was."""
        if self.at(*texts):
            self.position += 1
            return True
        return False

    def expect(self, text: str) -> None:
        """Consume the next token, which must be this one."""
        if not self.accept(text):
            raise UnreadableError(f"{text!r} is missing")

    def read_script(self) -> str:
        """Return the text of a subscript without its braces."""
        if not self.at("{"):
            return self.take().text
        start = self.position
        self.skip_group()
        return "".join(token.text.replace(" ", "") for token in self.tokens[start + 1 : self.position - 1])

    def skip_group(self) -> None:
        """Consume a group in braces."""
        self.expect("{")
        depth = 1
        while depth:
            token = self.take()
            depth += (token.text == "{") - (token.text == "}")

    def parse_group(self) -> Node:
        """Parse `{...}`, which only groups."""
        self.expect("{")
        bars, self.open_bars = self.open_bars, 0
        node = self.parse_list()
        if self.at("choose", "over"):
            operator = "binom" if self.take().text == "choose" else "/"
            node = Call(operator, (node, self.parse_sum()))
        self.expect("}")
        self.open_bars = bars
        return node

    def parse_primary(self) -> Node:
        """Parse one operand."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError("nested too deeply")
        node = self.parse_operand()
        self.depth -= 1
        return node

    def parse_operand(self) -> Node:
        """Parse a number, a name, a command or what is in brackets."""
        token = self.take()
        if token.kind == "number":
            return self.parse_decimal(token)
        if token.kind == "letter" or (token.kind == "word" and token.is_roman and len(token.text) == 1):
            return self.parse_name(token.text)
        if token.kind == "symbol":
            self.position -= 1
            if token.text == "{":
                return self.parse_group()
            if token.text in ("(", "[", "\\{"):
                return self.parse_brackets()
            if token.text in ("|", "\\|"):
                return self.parse_bars()
            raise UnreadableError(f"unexpected {token.text!r}")
        if token.kind == "command":
            return self.parse_command(token.text)
        raise UnreadableError(f"unexpected {token.text!r}")

    def parse_name(self, name: str) -> Node:
        """Parse a name, with the number it is applied to: `I(0)` is not I times 0."""
        if name in ("e", "i"):
            return Name(name, is_constant=True)
        number, closing = self.peek(1), self.peek(2)
        is_number = number is not None and number.kind == "number"
        if self.at("(") and number is not None and is_number and closing is not None and closing.text == ")":
            self.position += 3
            return Name(f"{name}({number.text})")
        return Name(name)

    def parse_decimal(self, token: Token) -> Node:
        """Parse a number, with the repeating digits `0.1\\overline{6}` if there are any."""
        if self.at("overline", "dot", "bar") and "." in token.text:
            self.position += 1
            group = [self.take() for _ in range(3)]
            repeating = group[1].text
            if group[0].text != "{" or not repeating.isdigit() or group[2].text != "}":
                raise UnreadableError("not a repeating decimal")
            places = len(token.text.partition(".")[2])
            period = Fraction(int(repeating[:MAX_LITERAL_DIGITS]), 10**places * (10 ** len(repeating) - 1))
            return Number(read_number(token.text).value + period)
        return read_number(token.text)

    def parse_brackets(self) -> Node:
        """Parse a group, tuple, interval or set in brackets."""
        opening = self.take().text
        is_set = opening == "\\{"
        if is_set and self.accept("\\}"):
            return NamedSet("empty")
        bars, self.open_bars = self.open_bars, 0
        in_builder, self.in_builder = self.in_builder, is_set
        node = self.parse_list()
        if is_set and self.accept("|", "mid", ":"):
            self.in_builder = False
            node = Builder(node, self.parse_list())
        self.open_bars, self.in_builder = bars, in_builder
        closing = self.take().text
        if is_set:
            if closing != "\\}":
                raise UnreadableError("a brace is missing")
            if isinstance(node, Builder):
                return node
            items = node.items if isinstance(node, Sequence) and not node.brackets else (node,)
            return Sequence("{}", items)
        is_pair = isinstance(node, Sequence) and not node.brackets and len(node.items) == 2
        if closing not in (")", "]") or (opening + closing in ("(]", "[)") and not is_pair):
            raise UnreadableError("unpaired brackets")
        if isinstance(node, Sequence) and not node.brackets:
            return Sequence(opening + closing, node.items)
        return node

    def parse_bars(self) -> Node:
        """Parse an absolute value."""
        bar = self.take().text
        self.open_bars += 1
        node = self.parse_sum()
        self.open_bars -= 1
        self.expect(bar)
        return Call("abs", (node,))

    def parse_command(self, name: str) -> Node:
        """Parse the operand that begins with a command, which is already consumed."""
        if name == "frac":
            return Call("/", (self.parse_argument(), self.parse_argument()))
        if name == "binom":
            return Call("binom", (self.parse_argument(), self.parse_argument()))
        if name == "sqrt":
            return self.parse_root()
        if name == "begin":
            return self.parse_environment()
        if name in ("langle", "lfloor", "lceil"):
            node = self.parse_list()
            self.expect(_CLOSING[name])
            if name == "langle":
                items = node.items if isinstance(node, Sequence) and not node.brackets else (node,)
                return Sequence("()", items)
            return Call(name[1:], (node,))
        if name in _BIG_OPERATORS:
            return self.parse_opaque(name)
        if name in FUNCTIONS:
            return self.parse_function(name)
        return self.parse_symbol(name)

    def parse_symbol(self, name: str) -> Node:
        """Parse a constant, a set or a variable that is a command."""
        if name == "mathbb":
            letter = self.read_script()
            if letter not in _SETS:
                raise UnreadableError("an unknown set")
            return NamedSet(letter)
        if name == "emptyset":
            return NamedSet("empty")
        if name in ("pi", "infty"):
            return Name({"pi": "pi", "infty": "infinity"}[name], is_constant=True)
        if name in ACCENTS:
            return Name(f"{name} {self.read_script()}")
        if name in NOT_NAMES:
            raise UnreadableError(f"unexpected \\{name}")
        return self.parse_name(name)  # a Greek letter or another symbol

    def parse_argument(self) -> Node:
        """Parse an argument of `\\frac`: a group, or the next digit or symbol, as TeX reads it."""
        if self.at("{"):
            return self.parse_group()
        token = self.peek()
        if token is not None and token.kind == "number" and len(token.text) > 1:
            if not token.text.isdigit():
                raise UnreadableError("a decimal without braces")
            self.tokens[self.position : self.position + 1] = [
                Token("number", token.text[0], token.spaced), Token("number", token.text[1:])
            ]  # fmt: skip
        return self.parse_primary()

    def parse_root(self) -> Node:
        """Parse the index and the argument of a root."""
        index: Node = Number(Fraction(2))
        if self.at("["):
            self.position += 1
            index = self.parse_sum()
            self.expect("]")
        return Call("root", (index, self.parse_group() if self.at("{") else self.parse_primary()))

    def parse_function(self, name: str) -> Node:
        """Parse the arguments of a function: `\\sin^2 2x` takes the product 2x, `\\sin(x) y` only x."""
        base: Node | None = None
        exponent: Node | None = None
        while self.at("^", "_"):
            if self.take().text == "^":
                exponent = self.parse_script()
            else:
                base = self.parse_group() if self.at("{") else self.parse_primary()
        if self.at("(", "{", "|", "["):
            argument = self.parse_primary()
            if self.tokens[self.position - 1].text != ")" and self.starts_argument():
                argument = self.parse_argument_product(argument)
        else:
            argument = self.parse_argument_product(self.parse_signed_power())
        arguments = argument.items if isinstance(argument, Sequence) else (argument,)
        if exponent == Call("unary -", (Number(Fraction(1)),)) and name in _INVERSE:
            name, exponent = _INVERSE[name], None
        if base is not None:
            if name not in ("log", "ln"):
                raise UnreadableError("a subscript after a function")
            arguments = (*arguments, base)
        node = Call(name, arguments)
        return node if exponent is None else Call("^", (node, exponent))

    def parse_signed_power(self) -> Node:
        """Parse a power with an optional minus sign."""
        return Call("unary -", (self.parse_power(),)) if self.accept("-") else self.parse_power()

    def starts_argument(self) -> bool:
        """Return whether the next token continues the argument of a function."""
        token = self.peek()
        is_function = token is not None and token.kind == "command" and token.text in FUNCTIONS
        return not is_function and not self.at("(", "[") and self.starts_factor()

    def parse_argument_product(self, node: Node) -> Node:
        """Parse the remaining factors of the argument of a function."""
        while self.starts_argument():
            node = Call("*", (node, self.parse_power()))
        return node

    def parse_environment(self) -> Node:
        """Parse a matrix or the cases of a definition."""
        kind = _MATRICES.get(self.read_script().rstrip("*"))
        if kind is None:
            raise UnreadableError("an unknown environment")
        if kind == "matrix" and self.at("{"):
            self.skip_group()  # columns of an array
        rows: list[tuple[Node, ...]] = []
        row: list[Node] = []
        while not self.at("end"):
            if self.at("&"):
                self.position += 1
            elif self.at("\\\\"):
                self.position += 1
                rows.append(tuple(row))
                row = []
            elif self.at("hline"):
                self.position += 1
            else:
                row.append(self.parse_cell(is_case=kind == "cases"))
        self.position += 1
        self.read_script()
        if row:
            rows.append(tuple(row))
        if not rows or not all(rows) or (kind != "cases" and len({len(row) for row in rows}) > 1):
            raise UnreadableError("not a matrix")
        return Matrix(kind, tuple(rows))

    def parse_cell(self, is_case: bool) -> Node:
        """Parse a cell of a matrix, which may be words."""
        words = ""
        while (token := self.peek()) is not None and token.kind == "word":
            words += f" {self.take().text}"
        if is_case:  # `x, & \text{if } x > 0`
            words = re.sub(r"^\s*(?:if|for|when)\b", "", words)
        at_end = self.at("&", "\\\\", "end")
        if words.strip() and at_end:
            return Words(normalize_words(words))
        node = self.parse_relation() if is_case else self.parse_list()
        if is_case:
            self.accept(",", ".", ";")
        return Template((Words(normalize_words(words)), node)) if words.strip() else node

    def parse_opaque(self, name: str) -> Node:
        """Return a sum, integral or limit as a name: it equals only the same one, written the same way."""
        start, depth = self.position, 0
        while (token := self.peek()) is not None and token.kind != "separator":
            if self.at("{"):
                self.skip_group()
                continue
            depth += self.at("(", "[", "\\{") - self.at(")", "]", "\\}")
            is_end = self.at(",", ";", "}", "|") or (token.text in RELATIONS and token.kind != "letter")
            if depth < 0 or (depth == 0 and is_end):
                break
            self.position += 1
        body = " ".join(token.text for token in self.tokens[start : self.position])
        body = re.sub(r"\{ (\S+) \}", r"\1", body)
        return Name(f"\\{name} {body}")
