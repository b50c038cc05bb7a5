"""Two processes train as one with twice the batch: same tasks, same answers, same rewards, same weights."""

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
    "optim": "sgd",  # Adam makes much of the rounding of a small gradient
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "ddp_backend": "gloo",
}
# What a sum of float32 gradients in another order may change, relative to how far the weights moved.
TOLERANCE = 1e-3
ALGORITHMS = {
    "grpo": {"environment": f"{TOY}:Rising"},  # which remembers how the training went
    "hapo": {"algorithm": "hapo", "beta": 0.0},
    "hrpo": {"algorithm": "hrpo", "group_by": "hops", "num_generations": 1},
    "dynamic sampling": {"dynamic_sampling": True},
}


@pytest.fixture
def launch(tmp_path, tiny_folder):
    """Train in `processes` processes with 16 rollouts a step in all; return the run directory."""

    def launch(name, processes, *words, **keys):
        path = tmp_path / f"{name}.yaml"
        defaults = KEYS | {"per_device_train_batch_size": 16 // processes, "model_name_or_path": tiny_folder}
        path.write_text(yaml.safe_dump(defaults | {"output_dir": str(tmp_path / name)} | keys))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *launcher, "-m", "rlkit", "train", "--config", str(path), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
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
def test_the_same_trajectory(launch, tiny_folder, name):
    keys = ALGORITHMS[name]
    one, two = launch("one", 1, **keys), launch("two", 2, **keys)
    if name != "dynamic sampling":  # which replacements are drawn depends on what each process lacks
        pd.testing.assert_frame_equal(rollouts(one), rollouts(two), rtol=1e-4, atol=1e-5)
        assert rewards(one) == pytest.approx(rewards(two), abs=1e-6)
        start, a, b = weights(tiny_folder), weights(one / "model"), weights(two / "model")
        assert distance(a, start) > 1e-4
        assert distance(a, b) < TOLERANCE * distance(a, start)
    states = [torch.load(two / "checkpoint-6" / f"rlkit_state_{r}.pt", weights_only=True) for r in (0, 1)]
    if name == "grpo":
        alone = torch.load(one / "checkpoint-6" / "rlkit_state_0.pt", weights_only=True)
        levels = [state["environment"]["level"] for state in (alone, *states)]
        assert levels[0] > 1 and levels == pytest.approx([levels[0]] * 3)
    if name == "hapo":
        alone = torch.load(one / "checkpoint-6" / "rlkit_state_0.pt", weights_only=True)["reward hapo"]
        pairs = [
            dict(zip(s["tasks"], s["lengths"], strict=True))
            for s in (alone, *(s["reward hapo"] for s in states))
        ]
        assert pairs[0] and pairs[0] == pairs[1] == pairs[2]
    if name == "dynamic sampling":
        frame = pd.read_parquet(two / "rollouts")
        assert (frame[frame["kept"]].groupby("step").size() == 16).all()
        assert states[0]["dynamic_sampling"] == states[1]["dynamic_sampling"]


@pytest.mark.slow
def test_two_processes_go_on_where_they_were_stopped(launch, tmp_path):
    whole = launch("whole", 2)
    launch("again", 2, "--max_steps", "3")
    again = launch("again", 2, "--resume")
    pd.testing.assert_frame_equal(rollouts(again), rollouts(whole))
    a, b = weights(again / "model"), weights(whole / "model")
    assert max((a[key] - b[key]).abs().max() for key in a) < 1e-6
