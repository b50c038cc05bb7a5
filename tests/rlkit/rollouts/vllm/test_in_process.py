"""vLLM in the trainer's process, the real one: its tokens, its log-probabilities, its weights."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "in_process.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def found(vllm_folder):
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, str(SCRIPT), vllm_folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("found: ")[2])


def test_its_greedy_tokens_are_those_of_transformers(found):
    assert found["same greedy"] and found["same ends"]


def test_stop_strings_and_limits_are_those_of_transformers(found):
    assert found["same stops"] and found["stopped"] == [True] * 3
    assert found["limits"] == [1, 2, 3]


def test_a_finished_turn_does_not_wait_for_the_others(found):
    assert (found["first finished"], found["then"], found["nothing left"]) == ([1], [0], [])


def test_new_weights_arrive(found):
    assert found["gap"] < 1e-4 and found["gap after sync"] < 1e-4
    assert found["gap without sync"] > 0.05
    assert found["bytes"] == found["parameters"]


def test_a_lora_model_arrives_with_its_adapter(found):
    assert found["gap with the adapter"] < 1e-4
    assert found["gap without the adapter"] > 0.05
    assert not found["merged here"]


def test_another_temperature_or_nucleus_shows(found):
    assert found["gap at its own"] < 1e-4
    assert found["gap at another temperature"] > 0.05
    assert found["gap with top_p"] > 0.05


def test_a_stale_prefix_cache_shows(found):
    assert found["gap with a fresh prefix"] < 1e-4
    assert found["gap with a stale prefix"] > 0.01
