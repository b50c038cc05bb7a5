"""A training that is killed in the middle of a step and resumed is the training that was never killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlkit import cli

ROOT = Path(__file__).parents[2]
TOY = str(ROOT / "tests" / "toy.py")
KEYS = {
    "environment": f"{TOY}:Even",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "evaluation_tasks": 3,
    "num_tasks": 26,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "max_completion_length": 6,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "save_steps": 2,
    "max_steps": 4,
}
# What is measured of time, and of this start of the run alone.
CLOCKS = (
    "train_loss",
    "seconds",
    "step_time",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
)


@pytest.fixture
def run_in(tmp_path, tiny_folder, monkeypatch, capsys):
    """Run the command in this process; return its exit code and what it said on stderr."""

    def run(name, *words, stage="train", **keys):
        path = tmp_path / f"{name}.yaml"
        defaults = (
            KEYS if stage == "train" else {k: v for k, v in KEYS.items() if k not in ("num_generations",)}
        )
        keys = defaults | {"model_name_or_path": tiny_folder, "output_dir": str(tmp_path / name)} | keys
        path.write_text(yaml.safe_dump(keys))
        monkeypatch.setattr(sys, "argv", ["rlkit", stage, "--config", str(path), *words])
        code = cli.main()
        return code, capsys.readouterr().err

    return run


def killed(tmp_path, name, at, **keys):
    """Run the same in a process of its own, which dies at the reward's call `at`."""
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(KEYS | {"output_dir": str(tmp_path / name)} | keys))
    environment = os.environ | {"KILL_AT": str(at), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "rlkit", "train", "--config", str(path)]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def states(folder, step):
    return torch.load(folder / f"checkpoint-{step}" / "rlkit_state_0.pt", weights_only=True)


VARIANTS = {
    "grpo": {},
    "hapo, history": {"algorithm": "hapo", "num_tasks": 4, "max_steps": 6, "save_steps": 3},
    "middle of a generation": {
        "steps_per_generation": 2,
        "num_iterations": 2,
        "save_steps": 3,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
    },
    "second epoch": {"num_tasks": 6, "save_steps": 4, "max_steps": 6},
    "end of an epoch": {"num_tasks": 4, "save_steps": 2, "max_steps": 4},
    "dynamic sampling": {"dynamic_sampling": True, "logging_steps": 3, "max_steps": 4},
    "hrpo": {"algorithm": "hrpo", "group_by": "hops", "num_generations": 1},
}
FAST = ("grpo",)


def marked(name):
    return pytest.param(name, marks=() if name in FAST else pytest.mark.slow)


@pytest.mark.parametrize("name", [marked(name) for name in VARIANTS])
def test_killed_with_sigkill_and_resumed(run_in, tmp_path, tiny_folder, name):
    keys = VARIANTS[name]
    assert run_in("whole", **keys)[0] == 0
    whole, again = tmp_path / "whole", tmp_path / "again"
    last = len(list((whole / "rollouts").iterdir()))
    rows = len(pd.read_parquet(whole / "rollouts"))
    # In the middle of the last step that samples; the reward also judges the evaluation before.
    frame = pd.read_parquet(sorted((whole / "rollouts").iterdir())[-1])
    at = 3 + rows - len(frame) // 2
    assert last >= 2
    killed(tmp_path, "again", at, model_name_or_path=tiny_folder, **keys)
    assert not (again / "model").exists() and (again / f"checkpoint-{states_step(again)}").is_dir()
    code, said = run_in("again", "--resume", **keys)
    assert code == 0, said
    expected, found = metrics(whole), metrics(again)
    if keys.get("logging_steps", 1) > 1:  # transformers forgets the losses since the last log
        expected, found = ([{**line, "loss": None} for line in lines] for lines in (expected, found))
    assert found == expected
    pd.testing.assert_frame_equal(pd.read_parquet(again / "rollouts"), pd.read_parquet(whole / "rollouts"))
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole, again))
    start = load_file(Path(tiny_folder) / "model.safetensors")
    assert any((expected[key] != start[key]).any() for key in expected)
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key
    ours, theirs = (states(folder, keys.get("max_steps", 4)) for folder in (whole, again))
    for part in ours:
        if part != "progress":
            assert ours[part] == theirs[part], part
    if "hapo" in name:
        assert ours["reward hapo"]["tasks"]


def states_step(folder):
    return max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def test_sft_goes_on(run_in, tmp_path):
    keys = {"stage": "sft", "demonstrations": "answer", "num_tasks": 8, "per_device_train_batch_size": 4}
    assert run_in("whole", **keys)[0] == 0
    assert run_in("again", **keys)[0] == 0
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    shutil.rmtree(tmp_path / "again" / "model")
    assert run_in("again", "--resume", **keys)[0] == 0
    expected, found = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "again")
    )
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    assert metrics(tmp_path / "again") == metrics(tmp_path / "whole")


def test_the_checkpoint_before_a_broken_one_is_used(run_in, tmp_path):
    keys = {"save_steps": 1, "max_steps": 3, "evaluation_tasks": 0}
    run_in("run", **keys)
    run = tmp_path / "run"
    optimizer = run / "checkpoint-3" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    shutil.rmtree(run / "model")
    code, said = run_in("run", "--resume", **keys)
    assert code == 0 and "checkpoint-3 is cut short and skipped: optimizer.pt has 100 of" in said
    assert (run / "model").is_dir() and [line["step"] for line in metrics(run) if "reward" in line] == [
        1,
        2,
        3,
    ]
    for file in run.glob("checkpoint-*/rlkit.json"):
        file.unlink()
    code, said = run_in("run", "--resume", **keys)
    assert code == 2 and "no whole checkpoint" in said


def test_a_run_that_changed_says_so_and_stops(run_in, tmp_path):
    keys = {"max_steps": 2, "save_steps": 1, "evaluation_tasks": 0}
    run_in("run", **keys)
    changed = keys | {"rewards": ["variety"], "algorithm": "dr_grpo", "max_steps": 3}
    code, said = run_in("run", "--resume", **changed)
    said = said.strip().splitlines()[-1]  # after what transformers says of the model
    assert code == 2
    assert "algorithm: grpo -> dr_grpo" in said and "--resume_anyway goes on" in said
    assert "rewards: {'even': 1.0} -> {'variety': 1.0, 'even': 0.0}" in said
    code, said = run_in("run", "--resume", "--resume_anyway", "true", **changed)
    assert code == 0 and "algorithm: grpo -> dr_grpo" in said
    assert [line["step"] for line in metrics(tmp_path / "run") if "reward" in line] == [1, 2, 3]


def test_without_a_checkpoint_it_starts_from_the_beginning_and_says_so(run_in, tmp_path):
    keys = {"max_steps": 2, "save_strategy": "no", "evaluation_tasks": 0}
    run_in("run", **keys)
    code, said = run_in("run", "--resume", **keys)
    assert code == 0 and "no checkpoint yet" in said
    assert [line["step"] for line in metrics(tmp_path / "run") if "reward" in line] == [1, 2]


def test_a_failure_before_the_seal_leaves_the_checkpoint_before(run_in, tmp_path, monkeypatch):
    """The old checkpoint may go only when the new one is whole."""
    import rlkit.state

    keys = {"max_steps": 2, "save_steps": 1, "save_total_limit": 1, "evaluation_tasks": 0}
    real = rlkit.state.seal

    def seal(folder, step, identity):
        if step == 2:
            raise OSError("the power is gone")
        real(folder, step, identity)

    monkeypatch.setattr(rlkit.state, "seal", seal)
    with pytest.raises(OSError, match="the power is gone"):
        run_in("run", **keys)
    monkeypatch.setattr(rlkit.state, "seal", real)
    assert rlkit.state.last_checkpoint(tmp_path / "run").name == "checkpoint-1"
    assert run_in("run", "--resume", **keys)[0] == 0
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
