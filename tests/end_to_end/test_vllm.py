"""Multi-turn training with real vLLM, in the trainer's process and on servers."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pandas as pd
import pytest
import yaml

from rlkit.runs.checkpoints import last_checkpoint
from tests.quick import TOY
from tests.waiting import wait_until

KEYS = {
    "environment": f"{TOY}:Talk",
    "use_vllm": True,
    "vllm_max_model_length": 128,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "evaluation_tasks": 3,
    "num_tasks": 26,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "max_completion_length": 40,
    "max_turn_tokens": 16,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "save_steps": 2,
}
GAP = "sampling/sampling_logp_difference/mean"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("forked_commands"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def train(tmp_path_factory, vllm_folder):
    """Return a function that trains in another process and returns the run directory and stderr."""
    folder = tmp_path_factory.mktemp("vllm")

    def run(name, *argv, code=0, **keys):
        path = folder / f"{name}.yaml"
        keys = KEYS | {"model_name_or_path": vllm_folder, "output_dir": str(folder / name)} | keys
        path.write_text(yaml.safe_dump(keys))
        command = [sys.executable, "-m", "rlkit", "train", "--config", str(path), *argv]
        environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
        process = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        assert process.returncode == code, process.stderr[-3000:]
        return Path(keys["output_dir"]), process.stderr

    return run


@pytest.fixture(scope="module")
def resumed(train):
    """Train for two steps, then resume for two more."""
    train("run", max_steps=2)
    return train("run", "--resume", max_steps=4)


def logged(folder, key):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if line.get(key) is not None]


def test_each_step_samples_with_the_weights_of_that_step(resumed):
    """Also after a resume. In float32, log-probabilities of vLLM and the trainer agree up to rounding."""
    folder, _ = resumed
    assert len(logged(folder, GAP)) == 4
    assert max(logged(folder, GAP)) < 1e-4
    assert min(logged(folder, "grad_norm")) > 0
    assert logged(folder, "sampling/cut") == [0.0] * 4


def test_multi_turn_rollouts_are_saved(resumed):
    folder, _ = resumed
    frame = pd.concat([pd.read_parquet(file) for file in sorted((folder / "rollouts").glob("*.parquet"))])
    multi_turn = frame[frame["turns"].map(len) > 1]
    assert len(frame) == 32 and len(multi_turn) > 0
    for row in multi_turn.to_dict("records"):
        roles = [turn["role"] for turn in row["turns"]]
        assert roles[:2] == ["assistant", "user"]
        assert row["turns"][1]["content"].endswith("]</>")  # escaped: its "e" is a stop string
        # The limit is 40 tokens, and an EOS token may be appended after a stop string.
        assert row["length"] + row["environment_tokens"] <= 41
    assert frame["log_prob_gap"].max() < 1e-3


def test_mean_length_counts_only_the_models_tokens(resumed):
    folder, _ = resumed
    frame = pd.concat([pd.read_parquet(file) for file in sorted((folder / "rollouts").glob("*.parquet"))])
    means = frame.groupby("step")["length"].mean()
    assert logged(folder, "completions/mean_length") == pytest.approx(means.tolist())


def test_guard_reports_sampling_from_another_distribution(train):
    """`top_p` changes the distribution of the sampler, but not the log-probabilities of the trainer."""
    # At a high learning rate, one token soon has most of the probability, and the distributions agree again.
    keys = {"top_p": 0.3, "learning_rate": 1e-5, "max_steps": 7, "evaluation_tasks": 0}
    folder, stderr = train("nucleus", **keys)
    assert min(logged(folder, GAP)) > 0.1
    assert "guard sampler" in stderr


@pytest.fixture
def serve(vllm_folder):
    """Return a function that starts a server on a port; all servers are killed after the test."""
    servers = []

    def start(port):
        command = [sys.executable, "-m", "rlkit", "serve", vllm_folder, "--port", str(port)]
        environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
        command += ["--max_model_len", "128", "--enforce-eager", "--dtype", "float32"]
        servers.append(subprocess.Popen(command, env=environment, start_new_session=True))
        return servers[-1]

    yield start
    for server in servers:
        kill(server)


def kill(server):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_run_continues_after_a_server_restarts(train, serve, tmp_path):
    """A thread kills the server while step 3 is sampled, and starts another on the same port."""
    port = free_port()
    server = serve(port)
    kill_times = []

    def kill_at_step_3():
        folder = tmp_path / "run" / "rollouts"
        wait_until((folder / "step-000002.parquet").exists)
        kill(server)
        kill_times.append(time.time())
        serve(port)

    threading.Thread(target=kill_at_step_3, daemon=True).start()
    keys = {
        "vllm_mode": "server",
        "vllm_server_base_url": f"http://127.0.0.1:{port}",
        "output_dir": str(tmp_path / "run"),
        "max_steps": 5,
        "evaluation_tasks": 0,
        # The server does not accept adapters, so it gets merged weights.
        "use_peft": True,
        "use_dora": True,
        "lora_target_modules": "all-linear",
        "lora_modules_to_save": ["norm"],
        "lora_dropout": 0.0,  # the trainer's log-probabilities would differ by it
    }
    folder, stderr = train("killed", **keys)
    assert kill_times and f"127.0.0.1:{port}" in stderr  # a warning that the server is unavailable
    assert len(logged(folder, GAP)) == 5
    assert max(logged(folder, GAP)) < 1e-4


def wait_until_healthy(port, server):
    def healthy():
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).is_success

    wait_until(healthy, process=server)


def test_run_ends_with_a_checkpoint_if_the_server_stays_down(train, serve, tmp_path):
    port = free_port()
    server = serve(port)
    wait_until_healthy(port, server)

    def kill_after_a_checkpoint():
        wait_until((tmp_path / "run" / "checkpoint-2" / "rlkit.json").exists)
        kill(server)

    threading.Thread(target=kill_after_a_checkpoint, daemon=True).start()
    keys = {
        "vllm_mode": "server",
        "vllm_server_base_url": f"http://127.0.0.1:{port}",
        "vllm_server_timeout": 10,
        "output_dir": str(tmp_path / "run"),
        "max_steps": 500,
        "save_steps": 2,
        "evaluation_tasks": 0,
    }
    _, stderr = train("lost", code=1, **keys)
    assert f"http://127.0.0.1:{port}" in stderr and "--resume" in stderr
    assert "Traceback" not in stderr
    assert last_checkpoint(tmp_path / "run") is not None
