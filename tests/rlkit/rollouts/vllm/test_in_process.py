"""Real vLLM in the trainer's process: tokens, log-probabilities and weight transfer match transformers."""

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
    pytest.mark.usefixtures("forked_commands"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def results(vllm_folder):
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, str(SCRIPT), vllm_folder]
    process = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.partition("results: ")[2])


def test_vllm_samples_the_greedy_tokens_of_transformers(results):
    assert results["same greedy"] and results["same finish reasons"]


def test_vllm_applies_stop_strings_and_limits_like_transformers(results):
    assert results["same stops"] and results["stopped"] == [True] * 3
    assert results["limits"] == [1, 2, 3]


def test_vllm_returns_a_finished_turn_before_the_others(results):
    assert (results["first finished"], results["second finished"]) == ([1], [0])
    assert results["finished last"] == []


def test_sync_weights_sends_all_weights(results):
    assert results["gap"] < 1e-4 and results["gap after sync"] < 1e-4
    assert results["gap without sync"] > 0.05
    assert results["bytes"] == results["parameters"]


def test_sync_weights_merges_the_adapter(results):
    assert max(results["gaps with the adapter"]) < 1e-4
    assert min(results["gaps without the adapter"]) > 0.05
    assert not results["trainer is merged"] and not results["changed"]


def test_log_probs_differ_at_another_temperature_or_top_p(results):
    assert results["gap at the same temperature"] < 1e-4
    assert results["gap at another temperature"] > 0.05
    assert results["gap with top_p"] > 0.05


def test_log_probs_differ_with_a_stale_prefix_cache(results):
    assert results["gap with a fresh prefix"] < 1e-4
    assert results["gap with a stale prefix"] > 0.01
