"""A run that is killed in the middle of a step and resumed ends like a run that was never interrupted."""

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

from rlkit.commands import main as cli
from rlkit.runs.checkpoints import last_checkpoint
from rlkit.training import resume
from tests.quick import QUICK, ROOT, TOY

KEYS = QUICK | {
    "evaluation_tasks": 3,
    "num_tasks": 26,
    "learning_rate": 1e-3,
    "max_completion_length": 6,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "save_steps": 2,
    "max_steps": 4,
}
TIME_METRICS = (
    "seconds",
    "step_time",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
)


@pytest.fixture
def run_in(tmp_path, tiny_folder, monkeypatch, capsys):
    """Return a function that runs a command in this process and returns its exit code and stderr."""

    def run(name, *argv, stage="train", **keys):
        path = tmp_path / f"{name}.yaml"
        defaults = dict(KEYS)
        if stage != "train":
            del defaults["num_generations"]
        keys = defaults | {"model_name_or_path": tiny_folder, "output_dir": str(tmp_path / name)} | keys
        path.write_text(yaml.safe_dump(keys))
        monkeypatch.setattr(sys, "argv", ["rlkit", stage, "--config", str(path), *argv])
        code = cli.main()
        return code, capsys.readouterr().err

    return run


def run_and_kill(tmp_path, name, call, **keys):
    """Train in another process, which the reward kills with SIGKILL when it is called the `call`-th time."""
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(KEYS | {"output_dir": str(tmp_path / name)} | keys))
    environment = os.environ | {"KILL_AT": str(call)}
    command = [sys.executable, "-m", "rlkit", "train", "--config", str(path)]
    process = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, timeout=300, check=False
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not is_time(k)} for line in lines]


def is_time(key):
    return key in TIME_METRICS or key.startswith("time/") or key.endswith(("/latency", "/latency_max"))


def states(folder, step):
    states = torch.load(folder / f"checkpoint-{step}" / "rlkit_state_0.pt", weights_only=True)
    logged = states["since the last log"]["metrics"]
    for key in filter(is_time, list(logged)):
        del logged[key]
    return states


VARIANTS = {
    "grpo": {},
    "hapo, history": {"algorithm": "hapo", "num_tasks": 4, "max_steps": 6, "save_steps": 3},
    "middle of a generation batch": {
        "steps_per_generation": 2,
        "num_iterations": 2,
        "save_steps": 3,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
    },
    "second epoch": {"num_tasks": 6, "save_steps": 4, "max_steps": 6},
    "end of an epoch": {"num_tasks": 4, "save_steps": 2, "max_steps": 4},
    "refreshed reference": {
        "beta": 0.1,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "use_adaptive_entropy": True,
        "entropy_target": 9.0,
    },
    "dynamic sampling": {"dynamic_sampling": True, "logging_steps": 3, "max_steps": 4},
    "hrpo": {"algorithm": "hrpo", "group_by": "hops", "num_generations": 1},
    "curriculum": {
        "environment": f"{TOY}:Rising",
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 1,
    },
}
pytestmark = pytest.mark.usefixtures("forked_commands")
FAST = ("grpo", "sft")


def mark_slow(name):
    return pytest.param(name, marks=() if name in FAST else pytest.mark.slow)


@pytest.mark.parametrize("name", [mark_slow(name) for name in VARIANTS])
def test_killed_run_resumes_like_an_uninterrupted_run(run_in, tmp_path, tiny_folder, name):
    keys = VARIANTS[name]
    assert run_in("uninterrupted", **keys)[0] == 0
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    num_sampling_steps = len(list((uninterrupted / "rollouts").iterdir()))
    assert num_sampling_steps >= 2
    # Kill in the middle of the last step that samples. The initial evaluation calls the reward 3 times.
    rows = len(pd.read_parquet(uninterrupted / "rollouts"))
    last_rows = len(pd.read_parquet(sorted((uninterrupted / "rollouts").iterdir())[-1]))
    call = 3 + rows - last_rows // 2
    run_and_kill(tmp_path, "resumed", call, model_name_or_path=tiny_folder, **keys)
    assert not (resumed / "model").exists() and list(resumed.glob("checkpoint-*"))
    code, stderr = run_in("resumed", "--resume", **keys)
    assert code == 0, stderr
    assert metrics(resumed) == metrics(uninterrupted)
    pd.testing.assert_frame_equal(
        pd.read_parquet(resumed / "rollouts"), pd.read_parquet(uninterrupted / "rollouts")
    )
    expected, actual = (
        load_file(folder / "model" / "model.safetensors") for folder in (uninterrupted, resumed)
    )
    start = load_file(Path(tiny_folder) / "model.safetensors")
    assert any((expected[key] != start[key]).any() for key in expected)
    for key, tensor in expected.items():
        assert torch.equal(tensor, actual[key]), key
    expected_states, actual_states = (
        states(folder, keys.get("max_steps", 4)) for folder in (uninterrupted, resumed)
    )
    for part in expected_states:
        if part != "progress":
            assert str(expected_states[part]) == str(actual_states[part]), part
    if name == "curriculum":
        assert expected_states["environment"]["level"] > 1
    if "hapo" in name:
        assert expected_states["reward hapo"]["tasks"]


# Dropout draws random numbers in every step. Logging steps and checkpoints do not coincide.
DROPOUT = {
    "use_peft": True,
    "lora_r": 2,
    "lora_dropout": 0.5,
    "lora_target_modules": "all-linear",
    "learning_rate": 1e-2,
    "num_tasks": 12,
    "save_steps": 5,
    "logging_steps": 3,
    "per_device_train_batch_size": 4,
    "evaluation_tasks": 0,
}
SFT = {"stage": "sft", "demonstrations": "answer", "per_device_train_batch_size": 4}
INTERRUPTED = {
    "sft": SFT | {"num_tasks": 8, "max_steps": 4},
    "sft, dropout, second epoch": SFT | DROPOUT | {"max_steps": 6},
    "dropout, accumulation": DROPOUT | {"max_steps": 8, "gradient_accumulation_steps": 2, "beta": 0.04},
}


@pytest.mark.parametrize("name", [mark_slow(name) for name in INTERRUPTED])
def test_run_without_its_last_checkpoint_resumes_like_an_uninterrupted_run(run_in, tmp_path, name):
    keys = INTERRUPTED[name]
    assert run_in("uninterrupted", **keys)[0] == 0
    assert run_in("resumed", **keys)[0] == 0
    shutil.rmtree(tmp_path / "resumed" / f"checkpoint-{keys['max_steps']}")
    shutil.rmtree(tmp_path / "resumed" / "model")
    assert run_in("resumed", "--resume", **keys)[0] == 0
    expected, actual = (
        load_file(tmp_path / run / "model" / "model.safetensors") for run in ("uninterrupted", "resumed")
    )
    assert all(torch.equal(tensor, actual[key]) for key, tensor in expected.items())
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "uninterrupted")


def test_resume_skips_an_incomplete_checkpoint(run_in, tmp_path):
    keys = {"save_steps": 1, "max_steps": 3, "evaluation_tasks": 0}
    run_in("run", **keys)
    run = tmp_path / "run"
    optimizer = run / "checkpoint-3" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    shutil.rmtree(run / "model")
    code, stderr = run_in("run", "--resume", **keys)
    assert code == 0 and "checkpoint-3: optimizer.pt has 100 of" in stderr
    assert (run / "model").is_dir()
    assert [line["step"] for line in metrics(run) if "reward" in line] == [1, 2, 3]
    rollouts = sorted((run / "rollouts").iterdir())
    for file in run.glob("checkpoint-*/scheduler.pt"):
        file.unlink()
    code, stderr = run_in("run", "--resume", **keys)
    assert code == 2 and "checkpoint-3 is damaged: scheduler.pt is missing, and there is no other" in stderr
    assert sorted((run / "rollouts").iterdir()) == rollouts
    for file in run.glob("checkpoint-*/rlkit.json"):
        file.unlink()
    code, stderr = run_in("run", "--resume", **keys)
    assert code == 0 and "there is no checkpoint to resume from; starting from the beginning" in stderr
    assert [line["step"] for line in metrics(run) if "reward" in line] == [1, 2, 3]


def test_resume_stops_if_the_config_has_changed(run_in, tmp_path):
    keys = {"max_steps": 2, "save_steps": 1, "evaluation_tasks": 0}
    run_in("run", **keys)
    config = (tmp_path / "run" / "config.yaml").read_text()
    changed = keys | {"rewards": ["variety"], "algorithm": "dr_grpo", "max_steps": 3}
    code, stderr = run_in("run", "--resume", **changed)
    message = stderr.strip().splitlines()[-1]  # transformers' warnings about the model come first
    assert code == 2
    assert "algorithm: grpo -> dr_grpo" in message
    assert "--resume_anyway resumes with the new settings" in message
    assert "rewards: even=1.0 -> variety=1.0, even=0.0" in message
    assert (tmp_path / "run" / "config.yaml").read_text() == config
    code, stderr = run_in("run", "--resume", "--resume_anyway", "true", **changed)
    assert code == 0 and "algorithm: grpo -> dr_grpo" in stderr
    assert [line["step"] for line in metrics(tmp_path / "run") if "reward" in line] == [1, 2, 3]


def test_resume_without_a_checkpoint_starts_from_scratch(run_in, tmp_path):
    keys = {"max_steps": 2, "save_strategy": "no", "evaluation_tasks": 0}
    run_in("run", **keys)
    code, stderr = run_in("run", "--resume", **keys)
    assert code == 0 and "there is no checkpoint to resume from" in stderr
    assert [line["step"] for line in metrics(tmp_path / "run") if "reward" in line] == [1, 2]


def test_failed_save_keeps_the_previous_checkpoint(run_in, tmp_path, monkeypatch):
    """The old checkpoint may be deleted only when the new one is complete."""
    keys = {"max_steps": 2, "save_steps": 1, "save_total_limit": 1, "evaluation_tasks": 0}
    original = resume.seal

    def seal(folder, step, *args):
        if step == 2:
            raise OSError("power failure")
        original(folder, step, *args)

    monkeypatch.setattr(resume, "seal", seal)
    with pytest.raises(OSError, match="power failure"):
        run_in("run", **keys)
    monkeypatch.setattr(resume, "seal", original)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-1"
    assert run_in("run", "--resume", **keys)[0] == 0
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_rotation_does_not_count_an_incomplete_checkpoint(run_in, tmp_path):
    """Rotation keeps the highest number: with a limit of 1 it would delete the only complete checkpoint."""
    keys = {"max_steps": 2, "save_steps": 1, "evaluation_tasks": 0}
    run_in("run", **keys)
    run = tmp_path / "run"
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-9")
    (run / "checkpoint-9" / "rlkit.json").unlink()
    assert run_in("run", "--resume", **(keys | {"max_steps": 3, "save_total_limit": 1}))[0] == 0
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-3"]


def test_resume_samples_again_if_the_generation_batch_has_another_shape(run_in, tmp_path):
    """A checkpoint in the middle of a generation batch of 2 x 4 rollouts does not fit one of 4 x 2."""
    keys = {"max_steps": 3, "save_steps": 3, "evaluation_tasks": 0, "steps_per_generation": 2}
    run_in("run", **keys, per_device_train_batch_size=4)
    keys |= {"max_steps": 5, "steps_per_generation": 4, "per_device_train_batch_size": 2}
    code, stderr = run_in("run", "--resume", **keys)
    assert code == 2 and "steps_per_generation: 2 -> 4" in stderr
    assert run_in("run", "--resume", "--resume_anyway", "true", **keys)[0] == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("change", [{"algorithm": "hapo"}, {"dynamic_sampling": True}])
def test_state_that_a_checkpoint_lacks_is_an_error_or_starts_from_scratch(run_in, tmp_path, change):
    keys = {"max_steps": 1, "save_steps": 1, "evaluation_tasks": 0}
    run_in("run", **keys)
    config = (tmp_path / "run" / "config.yaml").read_text()
    keys |= change | {"max_steps": 2}
    code, stderr = run_in("run", "--resume", **keys)
    assert code == 2 and "--resume_anyway resumes with the new settings" in stderr.strip().splitlines()[-1]
    assert (tmp_path / "run" / "config.yaml").read_text() == config
    code, stderr = run_in("run", "--resume", "--resume_anyway", "true", **keys)
    assert code == 0 and "has no state of" in stderr and "starts from scratch" in stderr


def test_resume_rejects_checkpoints_without_optimizer_state(run_in):
    keys = {"max_steps": 1, "save_steps": 1, "evaluation_tasks": 0, "save_only_model": True}
    run_in("run", **keys)
    code, stderr = run_in("run", "--resume", **(keys | {"max_steps": 2}))
    assert code == 2 and "save_only_model" in stderr


@pytest.mark.slow
def test_resume_with_another_number_of_processes(run_in, tmp_path, tiny_folder):
    keys = {"max_steps": 1, "save_steps": 1, "evaluation_tasks": 0}
    run_in("run", **keys)
    path = tmp_path / "two.yaml"
    keys |= {"max_steps": 2, "per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    keys |= {"output_dir": str(tmp_path / "run"), "model_name_or_path": tiny_folder}
    path.write_text(yaml.safe_dump(KEYS | keys))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, "-m", "rlkit", "train", "--config", str(path), "--resume"]
    options = {"cwd": ROOT, "timeout": 300}
    process = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert process.returncode != 0 and "processes: 1 -> 2" in process.stderr
    command += ["--resume_anyway", "true"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert process.returncode == 0, process.stderr[-2000:]
    assert "has no state of process 1, only that of process 0" in process.stderr
    assert [line["step"] for line in metrics(tmp_path / "run") if "reward" in line] == [1, 2]
