"""The step simulator agrees with hand-computed cases, invariants and published figures."""

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
def test_lengths_have_the_given_mean_and_maximum(mean, longest):
    lengths = sim.lengths(2000, mean, longest)
    assert lengths.mean() == pytest.approx(mean, rel=0.01)
    assert lengths.min() >= 1 and lengths.max() <= longest


def test_sampling_seconds_of_equal_lengths_equal_the_formula():
    """16 completions of 100 tokens on 4 GPUs take 100 steps of a + 4 b: a per step, b per sequence."""
    step = sim.Step(np.full(16, 100.0))
    a = 2 * MODEL.parameters / GPU.bandwidth + GPU.overhead
    b = 2 * MODEL.parameters / (GPU.flops * GPU.sampling_share) + MODEL.cache * 250 / GPU.bandwidth
    assert sim.sampling_seconds(MODEL, GPU, step, 4) == pytest.approx(100 * (a + 4 * b))


def test_sampling_takes_at_least_as_long_as_the_longest_completion():
    step = sim.Step(np.array([10.0] * 63 + [5000.0]))
    a = 2 * MODEL.parameters / GPU.bandwidth + GPU.overhead
    for gpus in (8, 64, 512):
        assert sim.sampling_seconds(MODEL, GPU, step, gpus) > 5000 * a


def test_training_seconds_are_divided_by_the_number_of_gpus():
    step = sim.Step(np.full(10, 300.0), prompt=100, passes=4)
    on_one_gpu = 4 * 2 * MODEL.parameters * 4000 / (GPU.flops * GPU.training_share)
    assert sim.training_seconds(MODEL, GPU, step, 8) == pytest.approx(on_one_gpu / 8)


@given(
    gpus=st.integers(4, 256),
    part=st.floats(0.1, 0.9),
    mean=st.integers(100, 4000),
    rollouts=st.integers(64, 2048),
)
def test_schedules_keep_their_invariants(gpus, part, mean, rollouts):
    step = sim.Step(sim.lengths(rollouts, mean, 8000))
    samplers = min(max(int(gpus * part), 1), gpus - 1)
    schedules = sim.schedules(MODEL, GPU, step, gpus, samplers)
    assert schedules["one step off"]["seconds"] <= schedules["split"]["seconds"]
    assert schedules["colocated"]["seconds"] <= schedules["split"]["seconds"]
    assert all(0 <= schedule["idle"] <= 1 for schedule in schedules.values())
    with_twice_the_gpus = sim.sampling_seconds(MODEL, GPU, step, 2 * gpus)
    assert with_twice_the_gpus <= sim.sampling_seconds(MODEL, GPU, step, gpus) * 1.001


def test_sampling_takes_longer_if_the_kv_cache_does_not_fit():
    step = sim.Step(sim.lengths(4096, 4000, 16_000))
    small = sim.replace(GPU, memory=20e9)
    assert sim.sampling_seconds(MODEL, small, step, 4) > sim.sampling_seconds(MODEL, GPU, step, 4)


@pytest.mark.parametrize("published", sim.PUBLISHED, ids=lambda published: published["name"])
def test_simulation_is_near_published_figures(published):
    """docs/scaling.md reports deviations of up to a third."""
    assert abs(sim.check(published)["off"]) < 0.4
