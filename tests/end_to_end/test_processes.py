"""Two processes train like one process with twice the batch: same tasks, rollouts, rewards and weights."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.quick import QUICK, ROOT, TOY

KEYS = QUICK | {
    "num_tasks": 20,
    "save_steps": 3,
    "max_steps": 6,
    "max_completion_length": 6,
    "num_generations": 4,
    "optim": "sgd",  # Adam would amplify rounding errors in small gradients
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "ddp_backend": "gloo",
}
pytestmark = pytest.mark.usefixtures("forked_commands")
# Effect of summing float32 gradients in another order, relative to the distance that the weights moved.
TOLERANCE = 1e-3
ALGORITHMS = {
    "grpo": {"environment": f"{TOY}:Rising"},  # whose state depends on the training so far
    "hapo": {"algorithm": "hapo", "beta": 0.0},
    "hrpo": {"algorithm": "hrpo", "group_by": "hops", "num_generations": 1},
    "dynamic sampling": {"dynamic_sampling": True},
}


@pytest.fixture
def launch(tmp_path, tiny_folder):
    """Return a function that trains in several processes, with 16 rollouts per step in total.

    It returns the run directory.
    """

    def launch(name, processes, *argv, **keys):
        path = tmp_path / f"{name}.yaml"
        defaults = KEYS | {"per_device_train_batch_size": 16 // processes, "model_name_or_path": tiny_folder}
        path.write_text(yaml.safe_dump(defaults | {"output_dir": str(tmp_path / name)} | keys))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *launcher, "-m", "rlkit", "train", "--config", str(path), *argv]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert process.returncode == 0, process.stderr[-3000:]
        return tmp_path / name

    return launch


def rollouts(run):
    columns = ["step", "task_id", "completion", "reward", "advantage"]
    frame = pd.read_parquet(run / "rollouts")[columns]
    return frame.sort_values(columns[:3], kind="stable").reset_index(drop=True)


def rewards(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["reward"] for line in lines if "reward" in line]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def distance(a, b):
    return sum((a[key] - b[key]).norm() ** 2 for key in a) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_processes_train_like_one(launch, tiny_folder, name):
    keys = ALGORITHMS[name]
    single, double = launch("single", 1, **keys), launch("double", 2, **keys)
    if name != "dynamic sampling":  # each process draws its own replacements
        pd.testing.assert_frame_equal(rollouts(single), rollouts(double), rtol=1e-4, atol=1e-5)
        assert rewards(single) == pytest.approx(rewards(double), abs=1e-6)
        start, a, b = weights(tiny_folder), weights(single / "model"), weights(double / "model")
        assert distance(a, start) > 1e-4
        assert distance(a, b) < TOLERANCE * distance(a, start)
    states = [torch.load(double / "checkpoint-6" / f"rlkit_state_{r}.pt", weights_only=True) for r in (0, 1)]
    expected_state = torch.load(single / "checkpoint-6" / "rlkit_state_0.pt", weights_only=True)
    if name == "grpo":
        levels = [state["environment"]["level"] for state in (expected_state, *states)]
        assert levels[0] > 1 and levels == pytest.approx([levels[0]] * 3)
    if name == "hapo":
        histories = []
        for state in (expected_state, *states):
            history = state["reward hapo"]
            histories.append(dict(zip(history["tasks"], history["lengths"], strict=True)))
        assert histories[0] and histories[0] == histories[1] == histories[2]
    if name == "dynamic sampling":
        frame = pd.read_parquet(double / "rollouts")
        assert (frame[frame["kept"]].groupby("step").size() == 16).all()
        assert states[0]["dynamic_sampling"] == states[1]["dynamic_sampling"]


@pytest.mark.slow
def test_two_processes_resume_like_an_uninterrupted_run(launch, tmp_path):
    uninterrupted = launch("uninterrupted", 2)
    launch("resumed", 2, "--max_steps", "3")
    resumed = launch("resumed", 2, "--resume")
    pd.testing.assert_frame_equal(rollouts(resumed), rollouts(uninterrupted))
    a, b = weights(resumed / "model"), weights(uninterrupted / "model")
    assert max((a[key] - b[key]).abs().max() for key in a) < 1e-6
