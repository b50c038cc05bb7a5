r"""Split an answer into tokens, with everything removed that changes only its looks.

Unicode signs become LaTeX commands (`≤` is `\le`), fonts, spaces and delimiter sizes disappear, and
`\text{41}` is 41. Words stay together as one token, while other letters are single-letter variables: `2ab` is
a product, and `2 apples` is not.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from itertools import pairwise

from rlkit.rewards.latex.nodes import UnreadableError
from rlkit.rewards.latex.units import ABBREVIATIONS, is_unit, words_of

MAX_NESTING = 12  # maximum nesting of commands with text, such as `\text{\textbf{a}}`

FUNCTIONS = words_of(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth sech csch"
    " ln log lg exp sqrt det gcd lcm max min arg deg"
)
RELATIONS = {
    "=": "=", "<": "<", ">": ">", "leq": "<=", "geq": ">=", "neq": "!=", "approx": "~", "in": "in",
    "equiv": "equiv",
    "sim": "sim", "cong": "equiv", "to": "to", "perp": "perp", "parallel": "parallel", "propto": "propto",
    "subset": "subset", "subseteq": "subset", "notin": "notin", "mapsto": "to",
}  # fmt: skip
_SYNONYMS = {
    "le": "leq", "ge": "geq", "leqslant": "leq", "geqslant": "geq", "leqq": "leq", "geqq": "geq",
    "lt": "<", "gt": ">", "ne": "neq", "dfrac": "frac", "tfrac": "frac", "cfrac": "frac",
    "dbinom": "binom", "tbinom": "binom", "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]",
    "lvert": "|", "rvert": "|", "vert": "|", "lVert": "\\|", "rVert": "\\|", "Vert": "\\|",
    "colon": ":", "ast": "*", "cdot": "*", "times": "*", "div": "/", "slash": "/", "bullet": "*",
    "varnothing": "emptyset", "oslash": "emptyset", "infinity": "infty", "inf": "infty", "oo": "infty",
    "imath": "i", "dots": "ldots", "cdots": "ldots", "dotsc": "ldots", "dotsb": "ldots", "vdots": "ldots",
    "degree": "circ", "simeq": "approx", "thickapprox": "approx", "doteq": "approx", "varphi": "phi",
    "varepsilon": "epsilon", "vartheta": "theta", "bmod": "mod", "pmod": "mod",
    "backslash": "setminus", "smallsetminus": "setminus", "arcctg": "arccot", "ctg": "cot", "tg": "tan",
    "acos": "arccos", "asin": "arcsin", "atan": "arctan", "cosec": "csc", "lor": "or", "land": "and",
    "vee": "or", "wedge": "and", "rightarrow": "to", "longrightarrow": "to", "Rightarrow": "implies",
}  # fmt: skip
# Commands whose argument is text, commands that only change the appearance, and those that are dropped with
# their argument.
_TEXT = words_of("text textbf textrm textit textsf texttt textnormal textup mbox hbox")
_ROMAN = words_of("mathrm rm operatorname mathop")
_IGNORED = words_of(
    "mathbf mathit mathsf mathtt mathnormal mathcal mathscr mathfrak boldsymbol bm pmb bf it em emph vec"
    " overrightarrow underline ensuremath displaystyle textstyle scriptstyle scriptscriptstyle limits"
    " nolimits"
    " left right middle big Big bigg Bigg bigl Bigl biggl Biggl bigr Bigr biggr Biggr bigm Bigm quad"
    " qquad enspace"
    " thinspace medspace thickspace nonumber notag hfill strut mathstrut mathord mathrel mathbin mleft mright"
)
_IGNORED_WITH_ARGUMENT = words_of("color textcolor hspace vspace phantom hphantom vphantom label tag")

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": "\\times ", "·": "\\cdot ",
    "⋅": "\\cdot ",
    "∗": "*", "∙": "\\cdot ", "÷": "/", "∕": "/", "⁄": "/", "≤": "\\leq ", "≥": "\\geq ", "⩽": "\\leq ",
    "⩾": "\\geq ", "≦": "\\leq ", "≧": "\\geq ", "≠": "\\neq ", "≈": "\\approx ", "≡": "\\equiv ",
    "±": "\\pm ",
    "∓": "\\mp ", "∞": "\\infty ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ",
    "∖": "\\setminus ",
    "√": "\\sqrt ", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]", "°": "^\\circ ", "º": "^\\circ ", "′": "'", "″": "''",
    "’": "'", "‘": "'", "∠": "\\angle ", "△": "\\triangle ", "→": "\\to ", "…": "\\ldots ",
    "ℝ": "\\mathbb{R}",
    "ℤ": "\\mathbb{Z}", "ℚ": "\\mathbb{Q}", "ℕ": "\\mathbb{N}", "ℂ": "\\mathbb{C}", "∣": "|", "‖": "\\|",
    "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ", "⟨": "\\langle ", "⟩": "\\rangle ",
    "，": ", ", "、": ", ", "。": ".", "；": ";", "∨": "\\lor ", "∧": "\\land ", "∑": "\\sum ", "∫": "\\int ",
    "∆": "\\Delta ", "Ω": "\\Omega ", "µ": "\\mu ", "ı": "i", "∂": "\\partial ", "£": "\\pounds ",
    "€": "\\euro ",
    "“": '"', "”": '"', "℃": "^\\circ C", "℉": "^\\circ F", "∥": "\\parallel ", "∶": ":",
}  # fmt: skip
_GREEK = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho
    sigma tau upsilon phi chi psi omega"""
for _name, _code in zip(_GREEK.split(), [*range(0x3B1, 0x3C2), *range(0x3C3, 0x3CA)], strict=True):
    _UNICODE[chr(_code)] = f"\\{_name} "
    _UNICODE[chr(_code - 32)] = f"\\{_name.capitalize()} "
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱˣ⁽⁾", "0123456789+-nix()", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₙₓ", "0123456789+-nx", strict=True))
_SCRIPTS = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+|[{''.join(_SUBSCRIPTS)}]+")

_ASCII_SIGNS = (
    ("**", "^"), ("<=", "\\leq "), (">=", "\\geq "), ("=<", "\\leq "), ("!=", "\\neq "), ("==", "="),
    ("->", "\\to "),
)  # fmt: skip
# A separator of thousands, as in `1\,000`, `1 000` and `1{,}000`; plain commas are ambiguous.
_THOUSANDS = re.compile(
    r"(?<![0-9.,])([0-9]{1,3})((?:(?:\\[,!;: ]|~|\{,\}|,\\!|[ \u00a0\u2009\u202f])[0-9]{3})+)(?![0-9])"
)
_COMMA_GROUPS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
# An interval whose open ends are brackets turned outwards, such as `[0, 1[`.
_INTERVAL = re.compile(r"([\[\]])([^\[\](),]{1,60},[^\[\](),]{1,60})([\[\]])")
_SCALES = {"C": "celsius", "F": "fahrenheit"}
# Other notations, each bounded so that it takes linear time.
_NOTATIONS = (
    (re.compile(r"(?<=[)\]}])\s{0,4}U\s{0,4}(?=[(\[{\\])"), r"\\cup "),  # a union
    (
        re.compile(r"\(\s{0,4}(?:\\(?:text|mathrm|operatorname)\{\s{0,4}mod\s{0,4}\}|\\?mod)([^()]{1,20})\)"),
        r"\\pmod{\1}",
    ),
    (re.compile(r"(?<=[0-9])\s{0,4}(?:\\text\{\s{0,4})?\(?(?:in )?base\s{1,4}([0-9]{1,2})\)?\}?"), r"_{\1}"),
    (
        re.compile(
            r"\^\{?\\circ\}?(?:\s|~|\\[ ,;]){0,4}(?:\\(?:mathrm|text)\{[\s~]{0,4}([CF])\}|([CF])(?![A-Za-z]))"
        ),
        lambda match: rf"\text{{ {_SCALES[match[1] or match[2]]}}}",
    ),
    (
        re.compile(r"(?<=[0-9}])\s{0,4}(?:\\text\{\s{0,4})?(?:percent|per cent|pct)(?![A-Za-z])\s{0,4}\}?"),
        r"\%",
    ),
    (
        re.compile(r"(?:\bdegrees?|\^\{?\\circ\}?)\s{1,4}(celsius|fahrenheit)", re.IGNORECASE),
        lambda match: match[1].lower(),
    ),
    (re.compile(r"(?<=[0-9])\"(?!\w)"), "''"),  # seconds of an angle
    (
        re.compile(
            r"\\\{\s{0,4}\\begin\{array\}\s{0,4}\{[^{}]{0,20}\}(.{1,1000})\\end\{array\}\s{0,4}(?:\\right\s{0,4}\.?)?$",
            re.DOTALL,
        ),
        r"\\begin{cases}\1\\end{cases}",
    ),
    # A family of values for every integer: `n \in \mathbb{Z}`.
    (
        re.compile(
            r"(?:,|\\q?quad|\\text\{\s?(?:for|where)\s?\}|\\ |\s|\(){1,8}"
            r"[a-z]\s{0,4}\\in\s{0,4}\\mathbb\s?\{?[ZN]\}?\)?$"
        ),
        "",
    ),
)
_TOKEN = re.compile(
    r"""
    (?P<space>\s+|[~$`"]|\\[,;:!>\s\[\]()]|\\(?:left|right)\s{0,4}\.)
    |(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+(?![0-9.A-Za-z{^_(]))?)
    |\\(?P<command>[A-Za-z]+)\*?
    |(?P<escaped>\\.)
    |(?P<letters>[^\W\d_]+)
    |(?P<symbol>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_WRAPPER = re.compile(
    r"(?:\\(?:math(?:bf|it|sf|tt|normal)|boldsymbol|bm|pmb|underline|ensuremath|(?:text)?color\{[^{}]{0,40}\})\s{0,4})?\{"
)
_PHRASE = r"(?:the\s)?(?:final\s)?(?:answer|solution|result)(?:\sis)?\s{0,4}:"
_HEADING = re.compile(rf"\\text(?:bf)?\{{\s{{0,4}}{_PHRASE}\s{{0,4}}\}}|{_PHRASE}", re.IGNORECASE)
_SEPARATOR = re.compile(r"[\s,;]*(and|or)[\s,]*", re.IGNORECASE)
# A unit such as `m/s^2`.
_UNIT_TEXT = re.compile(
    r"[^\W\d_]{1,20}(?:\^?\{?-?[1-9]\}?)?(?:[\s/*·.]{1,3}[^\W\d_]{1,20}(?:\^?\{?-?[1-9]\}?)?){0,7}"
)
_PLAIN_TEXT = re.compile(r"[^\d\\^_$={}<>+*|\[\]]+")
_WORD = re.compile(r"[A-Z]?[a-z]*[aeiouy][a-z]*|[A-Z]{3,}")
_APPLIED = re.compile(r"(sin|cos|tan|ln|log|exp)([a-z])")


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
        kind: "number", "command", "letter", "word", "separator" ("and", "or") or "symbol".
        text: The token, without the backslash of a command.
        spaced: Whether white space precedes it.
        is_roman: Whether it is from `\\text` or `\\mathrm`.
    """

    kind: str
    text: str
    spaced: bool = False
    is_roman: bool = False


def clean(text: str) -> str:
    """Return the string with LaTeX for Unicode signs, and without thousands separators except commas."""
    if not text.isascii():
        text = _SCRIPTS.sub(_replace_scripts, text)
        text = "".join(_replace_character(character) for character in text)
    text = unwrap(text)
    for sign, command in _ASCII_SIGNS:
        text = text.replace(sign, command)
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z]{2})", r"\\", text)  # escaped once too often
    text = re.sub(r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)", r"\\times ", text)
    for pattern, replacement in _NOTATIONS:
        text = pattern.sub(replacement, text)
    text = _INTERVAL.sub(_replace_interval, text)
    text = _THOUSANDS.sub(lambda match: match[1] + re.sub(r"[^0-9]", "", match[2]), text)
    return text.replace("\\!", "")


def unwrap(text: str) -> str:
    """Remove what encloses the entire text: spaces, punctuation, math mode, braces, fonts, and `Answer:`."""
    for _ in range(2 * MAX_NESTING):
        before = text
        text = text.strip(" \t\n\r`~").lstrip(",;").removeprefix("\\displaystyle")
        while text.endswith((".", ",", ";", "$")) and not text.endswith("\\$"):
            text = text[:-2] if text.endswith(("\\,", "\\;")) else text[:-1]
        if text.endswith("\\") and not text.endswith("\\\\"):
            text = text[:-1]  # of a space, `\ `
        text = text.lstrip("$")
        for spacing in ("\\ ", "\\,", "\\;", "\\:", "\\!", "\\quad", "\\qquad"):
            text = text.removeprefix(spacing).removesuffix(spacing)
        for opening, closing in (("**", "**"), ("\\[", "\\]"), ("\\(", "\\)")):
            if len(text) > 4 and text.startswith(opening) and text.endswith(closing):
                text = text[2:-2]
        if text.endswith("}") and (wrapper := _WRAPPER.match(text)):
            try:
                content, end = read_group(text, wrapper.end() - 1)
            except UnreadableError:
                return text
            if end == len(text):
                text = content
        if heading := _HEADING.match(text):
            text = text[heading.end() :]
        if text == before:
            break
    return text


def without_comma_groups(text: str) -> str:
    """Return the text with `1,000` replaced by `1000`, which may also be a list of two numbers."""
    return _COMMA_GROUPS.sub(lambda match: match[0].replace(",", ""), text)


def _replace_interval(match: re.Match[str]) -> str:
    return {"[": "[", "]": "("}[match[1]] + match[2] + {"[": ")", "]": "]"}[match[3]]


def _replace_scripts(match: re.Match[str]) -> str:
    if match[0][0] in _SUPERSCRIPTS:
        return "^{" + "".join(_SUPERSCRIPTS[character] for character in match[0]) + "}"
    return "_{" + "".join(_SUBSCRIPTS[character] for character in match[0]) + "}"


def _replace_character(character: str) -> str:
    if character.isascii():
        return character
    if character in _UNICODE:
        return _UNICODE[character]
    category = unicodedata.category(character)
    if category == "Cf":
        return ""
    compatible = unicodedata.normalize("NFKC", character)
    if category == "No" and "\u2044" in compatible:  # a fraction such as ½
        numerator, denominator = compatible.split("\u2044")
        return f"\\frac{{{numerator}}}{{{denominator}}}"
    if len(compatible) == 1 and (
        compatible.isascii() or compatible in _UNICODE
    ):  # full-width, mathematical italic
        return _UNICODE.get(compatible, compatible)
    return character


def tokenize(text: str, depth: int = 0) -> list[Token]:
    """Split a cleaned text into tokens.

    Raises:
        UnreadableError: A group is not closed.
    """
    if depth > MAX_NESTING:
        raise UnreadableError("nested too deeply")
    tokens: list[Token] = []
    position, spaced = 0, False
    while position < len(text):
        match = _TOKEN.match(text, position)
        assert match is not None  # the last alternative matches any character
        position, kind = match.end(), match.lastgroup
        if kind == "space":
            spaced = True
            continue
        value = match[kind or 0]
        if kind == "command":
            added, position = _read_command(text, position, value, depth)
            if not added:
                spaced = True
        elif kind == "letters":
            added = _split_letters(value, text, match.start(), tokens)
        elif kind == "number":
            added = [Token("number", value)]
        else:
            added = [Token("symbol", value if kind == "symbol" else _unescape(value))]
        if added:
            first = added[0]
            added[0] = Token(first.kind, first.text, spaced or first.spaced, first.is_roman)
            tokens += added
            spaced = False
    return tokens


def _unescape(escaped: str) -> str:
    return escaped if escaped in ("\\{", "\\}", "\\|", "\\\\", "\\$") else escaped[1:]


def _read_command(text: str, position: int, name: str, depth: int) -> tuple[list[Token], int]:
    """Return the tokens of a command and the position after it and after an argument that it formats."""
    if name in _IGNORED:
        return [], position
    if name in _IGNORED_WITH_ARGUMENT:
        return [], read_group(text, position)[1]
    if name in _TEXT or name in _ROMAN:
        content, end = read_group(text, position)
        return _read_text(content, depth, is_text=name in _TEXT), end
    name = _SYNONYMS.get(name, name)
    if name in ("and", "or"):
        return [Token("separator", name)], position
    if name == "i":
        return [Token("letter", "i")], position
    is_symbol = not name.isalpha()
    return [Token("symbol" if is_symbol else "command", name)], position


def read_group(text: str, position: int) -> tuple[str, int]:
    """Return the content of the brace group at a position, or the next character, and its end."""
    while position < len(text) and text[position].isspace():
        position += 1
    if position >= len(text) or text[position] != "{":
        return text[position : position + 1], min(position + 1, len(text))
    depth, i = 0, position
    while i < len(text):
        if text[i] == "\\":
            i += 1
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[position + 1 : i], i + 1
        i += 1
    raise UnreadableError("a brace is not closed")


def _read_text(content: str, depth: int, is_text: bool) -> list[Token]:
    """Return the tokens of `\\text{content}` or `\\mathrm{content}`."""
    stripped = re.sub(r"\\[,;:! ]|~", " ", content).strip()
    if separator := _SEPARATOR.fullmatch(stripped):
        return [Token("separator", separator[1].lower(), spaced=True)]
    if not is_text and stripped in FUNCTIONS - {"min", "sec", "deg"}:
        return [Token("command", stripped)]
    if stripped in ("e", "i"):
        return [Token("letter", stripped)]
    if _PLAIN_TEXT.fullmatch(stripped) or _UNIT_TEXT.fullmatch(stripped):
        return [Token("word", stripped, spaced=True, is_roman=True)]
    tokens = tokenize(content, depth + 1)
    if tokens:
        tokens[0] = Token(tokens[0].kind, tokens[0].text, True, tokens[0].is_roman)
    return tokens


def is_product(letters: str) -> bool:
    """Return whether a run of letters must be a product: without a vowel, or in a row as in `abc`."""
    is_row = all(ord(b) - ord(a) == 1 for a, b in pairwise(letters))
    return letters.islower() and letters != "no" and (is_row or not re.search("[aeiouy]", letters))


def _split_letters(letters: str, text: str, start: int, before: list[Token]) -> list[Token]:
    """Return a run of letters as a function, a word or a unit, or as one variable per letter."""
    lower = letters.lower()
    follows_number = bool(before) and before[-1].kind == "number"
    if follows_number and (letters in ("min", "sec", "deg") or (len(letters) > 3 and is_unit(letters))):
        return [Token("word", letters)]
    if letters in FUNCTIONS or letters in ("pi", "infinity", "inf", "infty", "theta", "alpha", "beta"):
        return [Token("command", _SYNONYMS.get(letters, letters))]
    if lower in ("and", "or"):
        return [Token("separator", lower)]
    if applied := _APPLIED.fullmatch(letters):
        return [Token("command", applied[1]), Token("letter", applied[2])]
    if len(letters) == 1 and letters.isascii():
        return [Token("letter", letters)]
    end = start + len(letters)
    if not letters.isascii():
        return [Token("word", letters)]
    stands_alone = (start == 0 or text[start - 1] in " \t\n(,;:=-/}'") and (
        end == len(text) or text[end] in " \t\n).,;:=!?-/'\\"
    )
    if letters in ABBREVIATIONS and (follows_number or (before and stands_alone)):
        return [Token("word", letters)]
    if stands_alone and len(letters) > 2 and _WORD.fullmatch(letters) and not is_product(letters):
        return [Token("word", letters)]
    return [Token("letter", letter) for letter in letters]
