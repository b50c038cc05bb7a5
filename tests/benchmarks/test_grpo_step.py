"""`benchmarks/grpo_step.py` alternates its sides, keeps to its time, and summarizes ratios of pairs."""

import sys

import pytest

from tests.quick import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import grpo_step


def steps(calls, **seconds):
    """Return a function of each side that records its call and returns the next seconds."""
    remaining = {name: iter(values) for name, values in seconds.items()}

    def step(name):
        calls.append(name)
        value = next(remaining[name])
        return {"forward_backward": value, "step": 2 * value}

    return {name: lambda name=name: step(name) for name in seconds}


@pytest.mark.parametrize("min_pairs", [1, 2, 5])
def test_measure_pairs_reverses_the_order_and_stops_at_the_deadline(min_pairs):
    calls = []
    measured = grpo_step.measure_pairs(steps(calls, trl=[1.0] * 9, rlkit=[1.0] * 9), float("-inf"), min_pairs)
    pairs = [("trl", "rlkit") if i % 2 == 0 else ("rlkit", "trl") for i in range(min_pairs)]
    assert calls == [name for pair in pairs for name in pair]
    assert [len(values) for values in measured.values()] == [min_pairs] * 2


def test_compare_gives_ratios_within_pairs():
    # The machine is three times as slow during the second pair: its ratio is the same.
    measured = grpo_step.measure_pairs(steps([], trl=[2.0, 6.0], rlkit=[1.0, 3.0]), float("-inf"))
    memory = {"trl": {"peak_gib": 3.0}, "rlkit": {"peak_gib": 2.0}}
    result = grpo_step.compare(measured, memory)
    assert result["pairs"] == 2
    assert result["trl"]["step_s"] == {"median": 8.0, "min": 4.0, "max": 12.0}
    assert result["rlkit"]["peak_gib"] == 2.0
    spread = {"median": 2.0, "min": 2.0, "max": 2.0}
    assert result["ratio_to_trl"] == {"forward_backward": spread, "step": spread, "peak": 1.5}
