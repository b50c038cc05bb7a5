r"""Time to compare a math answer with its reference, for rlkit and math-verify.

The answers are expressions from a small grammar (numbers, roots, powers, trigonometric functions, lists,
intervals, equations), each compared with itself in another notation or with another one, and expressions that
are huge or slow to simplify. Nothing is cached between two comparisons. math-verify has its default time
limits, five seconds each for parsing and for comparing.

    python benchmarks/math_verifier.py
"""

import argparse
import json
import logging
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import math_verify

from rlkit.rewards import boxed
from rlkit.rewards.latex import compare

RESULT = Path(__file__).parent / "results" / "math_verifier.json"
HARD = [
    r"(\sin x+\cos x)^{20}(\tan x+\sec x)^{12}",
    "(x+1)^{99}",
    r"(\sqrt{2}+\sqrt{3}+\sqrt{5})^{40}",
    r"\sin(\cos(\tan(\sin(\cos(\tan x)))))",
    r"\frac{3^{5000}+1}{2\cdot 3^{5000}}",
    r"\sqrt{10^{1000}+1}",
    "9^{9^{9^{9}}}",
    "2000!",
    r"\binom{2000}{1000}",
    "e^{e^{e^{e}}}",
    "(" * 30 + "1" + ")" * 30,
    "+".join(f"x_{{{i}}}^{i}" for i in range(1, 60)),
    ", ".join(rf"\sqrt{{{i}}}" for i in range(2, 102)),
]
REFERENCES = ["5", "x^2+1", r"\sin x", r"\sqrt{2}", "1, 2, 3", r"\frac{1}{2}"]


def random_expression(rng: random.Random, depth: int) -> str:
    if depth == 0:
        return rng.choice([str(rng.randint(1, 999)), "x", "y", r"\pi", f"{rng.random():.3f}"])
    a, b = (random_expression(rng, depth - 1) for _ in range(2))
    forms = [
        rf"\frac{{{a}}}{{{b}}}",
        rf"\left({a} + {b}\right)",
        f"{a} - {b}",
        rf"\left({a}\right)\left({b}\right)",
        rf"\sqrt{{{a}}}",
        rf"\left({a}\right)^{{{rng.randint(2, 9)}}}",
        rf"\sin\left({a}\right)",
        rf"\ln\left({a}^2+1\right)",
    ]
    return rng.choice(forms)


def random_pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """Return (reference, answer) pairs: every second one is another notation of the reference."""
    rng = random.Random(seed)
    pairs = []
    for i in range(n):
        wraps = ["{}", "x = {}", "({0}, {0})", r"\left[0, {}\right)", "{0}, {0}", r"{}\text{{ cm}}"]
        wrap = rng.choice(wraps)
        answer = wrap.format(random_expression(rng, rng.randint(0, 2)))
        other = wrap.format(random_expression(rng, rng.randint(0, 2)))
        rewritten = answer.replace(r"\frac", r"\dfrac").replace(r"\left", "").replace(r"\right", "")
        pairs.append((answer, f"${rewritten}$" if i % 2 else other))
    return pairs


def compare_with_rlkit(reference: str, answer: str) -> bool:
    compare.readings.cache_clear()
    boxed._spelling.cache_clear()
    return boxed.correct(rf"\boxed{{{answer}}}", reference) == 1.0


def compare_with_math_verify(reference: str, answer: str) -> bool:
    gold, text = (math_verify.parse(rf"\boxed{{{part}}}") for part in (reference, answer))
    return math_verify.verify(gold, text)


def measure(function: Callable[[str, str], bool], pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Return statistics of the time per comparison, in milliseconds."""
    times = []
    for reference, answer in pairs:
        start = time.perf_counter()
        function(reference, answer)
        times.append(1000 * (time.perf_counter() - start))
    ordered = sorted(times)
    return {
        "num_answers": len(times),
        "median_ms": statistics.median(times),
        "percentile_99_ms": ordered[int(0.99 * len(ordered))],
        "max_ms": ordered[-1],
        "mean_ms": statistics.mean(times),
        "share_within_10_ms": sum(t <= 10 for t in times) / len(times),
        "num_over_1_s": sum(t > 1000 for t in times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=1500, help="Number of random pairs.")
    parser.add_argument("--out", type=Path, default=RESULT, help="File for the result.")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # math-verify logs every time limit that it reaches
    hard = [(reference, answer) for answer in HARD for reference in REFERENCES]
    result: dict[str, object] = {}
    for name, pairs in (("random", random_pairs(arguments.pairs, seed=0)), ("hard", hard)):
        ours, theirs = measure(compare_with_rlkit, pairs), measure(compare_with_math_verify, pairs)
        result[name] = {
            "rlkit": ours,
            "math_verify": theirs,
            "mean_time_ratio": theirs["mean_ms"] / ours["mean_ms"],
        }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
