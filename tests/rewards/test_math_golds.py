"""Gold answers of public math datasets: readable, equal to their rewrites, different from each other."""

import functools
import itertools
import json
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from rlkit.envs.math.data import final_answer
from rlkit.rewards.boxed import equivalent, why_unreadable

GOLDS = Path(__file__).resolve().parents[3] / "shared/data/math_golds/golds.jsonl"
SETS = ["minerva_math", "olympiadbench", "gaokao2023en", "aime24", "amc23", "gsm8k", "college_math"]
UNREADABLE = {"college_math": 0.1}  # many of its answers are prose

pytestmark = pytest.mark.skipif(not GOLDS.exists(), reason="needs ../shared/data/math_golds")

SIGNS = {
    r"\pi": "π", r"\infty": "∞", r"\times": "×", r"\cdot": "·", r"\cup": "∪", r"\leq": "≤", r"\geq": "≥",
    r"\pm": "±", r"\theta": "θ", r"\alpha": "α", r"\omega": "ω",
}  # fmt: skip


def to_unicode(gold):
    for command, sign in SIGNS.items():
        gold = re.sub(re.escape(command) + "(?![A-Za-z])", sign, gold)
    gold = re.sub(
        r"\^(\d)(?![\d{])|\^\{(\d)\}", lambda m: "⁰¹²³⁴⁵⁶⁷⁸⁹"[int(m[1] or m[2])], gold.replace("-", "−")
    )
    return re.sub(r"\^\{?\\circ\}?", "°", re.sub(r"\\sqrt(?=[\s{\d])", "√", gold))


REWRITES = {
    "math mode": lambda gold: f"${gold}$",
    "display": lambda gold: rf"\[ \displaystyle {gold} \]",
    "bold": lambda gold: rf"\mathbf{{{gold}}}",
    "color": lambda gold: rf"\color{{red}}{{{gold}}}",
    "comma": lambda gold: f"{gold},",
    "full stop": lambda gold: f"{gold}.",
    "markdown": lambda gold: f"**{gold}**",
    "code": lambda gold: f"`{gold}`",
    "spaces": lambda gold: rf"\ \quad {gold}\;\ ",
    "fractions": lambda gold: gold.replace(r"\frac", r"\dfrac"),
    "delimiters": lambda gold: re.sub(r"\\(?:left|right)(?![A-Za-z]|\s*\.)", "", gold),
    "large delimiters": lambda gold: re.sub(r"\\(left|right)(?=[()\[\]])", lambda m: rf"\Big{m[1][0]}", gold),
    "Unicode": to_unicode,
    "heading": lambda gold: rf"\text{{Answer: }}{gold}",
    "thin spaces": lambda gold: re.sub(r"(?<=[^\\])([+=<>])", r"\\,\1\\,", gold),
    "group": lambda gold: f"{{{gold}}}",
}  # fmt: skip


def number_rewrites(gold):
    """Return the rewrites of an integer or of a number in e-notation."""
    if re.fullmatch(r"-?\d+", gold):
        grouped = f"{int(gold):,}"
        return [
            rf"\text{{{gold}}}", rf"\mathrm{{{gold}}}", f"{gold}.0", f"x = {gold}", f"{gold} people",
            grouped,
            grouped.replace(",", r"\,"), grouped.replace(",", "{,}"), rf"{gold}\text{{ cm}}", f"{gold}e0",
            rf"\frac{{{2 * int(gold)}}}{{2}}",
            "".join(chr(ord(c) + 0xFEE0) if c.isdigit() else c for c in gold),
        ]  # fmt: skip
    if match := re.fullmatch(r"(-?\d+(?:\.\d+)?)e(-?\d+)", gold):
        m, x = match.groups()
        return [
            rf"{m}\times 10^{{{x}}}",
            rf"{m}\cdot 10^{{{x}}}",
            f"{m} x 10^{x}",
            f"{m} × 10^{{{x}}}",
            f"{m}E{x}",
        ]
    return []


@functools.cache
def golds(name):
    """Return the answers of a set, and the distinct readable ones."""
    rows = [json.loads(line) for line in GOLDS.read_text().splitlines()]
    answers = [final_answer(row["answer"]) for row in rows if row["set"] == name]
    readable = list(dict.fromkeys(gold for gold in answers if gold and why_unreadable(gold) is None))
    return answers, readable


@pytest.mark.parametrize("name", SETS)
def test_nearly_all_golds_are_readable(name):
    answers, _ = golds(name)
    unreadable = [gold for gold in answers if why_unreadable(gold) is not None]
    assert len(unreadable) <= UNREADABLE.get(name, 0.02) * len(answers), unreadable


@pytest.mark.parametrize("name", SETS)
def test_golds_equal_their_rewrites(name):
    _, readable = golds(name)
    wrong = [
        (gold, rewrite(gold))
        for gold in readable
        for rewrite in [lambda gold: gold, *REWRITES.values()]
        if not equivalent(rewrite(gold), gold)
    ]
    wrong += [
        (gold, text) for gold in readable for text in number_rewrites(gold) if not equivalent(text, gold)
    ]
    assert wrong == []


def plain(gold):
    """Return a gold without what is optional: name, unit, spelling, order, and the notation of a fraction."""
    text = re.sub(r"\\(?:text|mathrm)\{[^{}]*\}|[\s~$]|^\+|^[a-z]=|-?hours|-?cm\^\{2\}|in$|\\?%", "", gold)
    text = text.rstrip(".-\\/").casefold()
    if text.count("=") > 1 or text.startswith("\\"):  # a calculation
        text = text.rpartition("=")[2]
    if match := re.fullmatch(r"(-?)(\d*)(?:\\frac\{(\d+)\}\{(\d+)\}|(\d+)/(\d+))", text):
        sign, whole, *parts = match.groups()
        if parts[2] is not None:
            whole, parts = "", [whole + parts[2], parts[3]]
        return str(int(whole or 0) + Fraction(int(parts[0]), int(parts[1]))) if not sign else text
    if re.fullmatch(r"\d*\.\d+", text):
        return str(Fraction(text))
    return ",".join(sorted(text.split(","))) if re.fullmatch(r"[-\d,]+", text) else text


@pytest.mark.parametrize("name", SETS)
def test_no_gold_equals_another(name):
    _, readable = golds(name)
    pairs = list(itertools.permutations(readable, 2))
    if len(pairs) > 20_000:
        pairs = random.Random(0).sample(pairs, 20_000)
    equal = [
        (gold, other) for gold, other in pairs if equivalent(other, gold) and plain(gold) != plain(other)
    ]
    assert equal == []
