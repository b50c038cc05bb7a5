"""`benchmarks/grpo_step.py` alternates its sides, keeps to its time, and summarizes ratios of pairs."""

import sys

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

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


def test_tensor_memory_counts_each_storage_while_it_exists():
    before = torch.ones(100)
    with grpo_step.TensorMemory() as memory:
        view = before.view(10, 10).add_(1)
        doubled = [view * 2, view * 2]
        parts = doubled[0].split(5)
        assert memory.num_bytes == 800
        doubled.clear()
        assert memory.num_bytes == 400  # `parts` are views of the first
        del parts
    assert (memory.num_bytes, memory.peak_bytes) == (0, 800)


def test_tensor_memory_has_the_peak_of_torchs_tracker(tiny_model):
    peaks = []
    for tracker in (MemTracker(), grpo_step.TensorMemory()):
        model = tiny_model("llama")
        with tracker:
            model(input_ids=torch.ones(4, 50, dtype=torch.long)).logits.sum().backward()
        peaks.append(tracker)
    expected = sum(total["Total"] for total in peaks[0].get_tracker_snapshot("peak").values())
    expected -= sum(w.numel() * w.element_size() for w in model.parameters())  # existed before
    assert peaks[1].peak_bytes == pytest.approx(expected, rel=0.02)
