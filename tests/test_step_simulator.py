"""The step simulator on cases that can be worked out by hand, and what must hold for all."""

import importlib.util
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.quick import ROOT

PATH = ROOT / "benchmarks" / "step_simulator.py"
spec = importlib.util.spec_from_file_location("step_simulator", PATH)
sim = importlib.util.module_from_spec(spec)
sys.modules["step_simulator"] = sim
spec.loader.exec_module(sim)

MODEL, GPU = sim.QWEN_7B, sim.H100


@given(mean=st.integers(50, 3000), longest=st.integers(4000, 30_000))
def test_lengths_have_their_mean_and_end(mean, longest):
    found = sim.lengths(2000, mean, longest)
    assert found.mean() == pytest.approx(mean, rel=0.01)
    assert found.min() >= 1 and found.max() <= longest


def test_equal_lengths_by_hand():
    """16 completions of 100 tokens on 4 GPUs: 100 steps of a + 4 b."""
    step = sim.Step(np.full(16, 100.0))
    a = 2 * MODEL.parameters / GPU.bandwidth + GPU.overhead
    b = 2 * MODEL.parameters / (GPU.flops * GPU.sampling_share) + MODEL.cache * 250 / GPU.bandwidth
    assert sim.sampling_seconds(MODEL, GPU, step, 4) == pytest.approx(100 * (a + 4 * b))


def test_a_long_one_is_waited_for():
    step = sim.Step(np.array([10.0] * 63 + [5000.0]))
    a = 2 * MODEL.parameters / GPU.bandwidth + GPU.overhead
    for gpus in (8, 64, 512):
        assert sim.sampling_seconds(MODEL, GPU, step, gpus) > 5000 * a


def test_training_is_shared_out():
    step = sim.Step(np.full(10, 300.0), prompt=100, passes=4)
    whole = 4 * 2 * MODEL.parameters * 4000 / (GPU.flops * GPU.training_share)
    assert sim.training_seconds(MODEL, GPU, step, 8) == pytest.approx(whole / 8)


@given(
    gpus=st.integers(4, 256),
    part=st.floats(0.1, 0.9),
    mean=st.integers(100, 4000),
    rollouts=st.integers(64, 2048),
)
def test_what_holds_for_all(gpus, part, mean, rollouts):
    step = sim.Step(sim.lengths(rollouts, mean, 8000))
    samplers = min(max(int(gpus * part), 1), gpus - 1)
    found = sim.schedules(MODEL, GPU, step, gpus, samplers)
    assert found["one step off"]["seconds"] <= found["split"]["seconds"]
    assert found["colocated"]["seconds"] <= found["split"]["seconds"]
    assert all(0 <= one["idle"] <= 1 for one in found.values())
    more = sim.sampling_seconds(MODEL, GPU, step, 2 * gpus)
    assert more <= sim.sampling_seconds(MODEL, GPU, step, gpus) * 1.001


def test_a_cache_that_does_not_fit_takes_longer():
    step = sim.Step(sim.lengths(4096, 4000, 16_000))
    small = sim.replace(GPU, memory=20e9)
    assert sim.sampling_seconds(MODEL, small, step, 4) > sim.sampling_seconds(MODEL, GPU, step, 4)


@pytest.mark.parametrize("one", sim.PUBLISHED, ids=lambda one: one["name"])
def test_published_figures_are_met_as_docs_say(one):
    """docs/scaling.md: within 40 %."""
    assert abs(sim.check(one)["off"]) < 0.4
