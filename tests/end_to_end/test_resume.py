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
CLOCKS = (
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
    environment = os.environ | {"KILL_AT": str(at)}
    words = [sys.executable, "-m", "rlkit", "train", "--config", str(path)]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not is_clock(k)} for line in lines]


def is_clock(key):
    return key in CLOCKS or key.startswith("time/")


def states(folder, step):
    states = torch.load(folder / f"checkpoint-{step}" / "rlkit_state_0.pt", weights_only=True)
    logged = states["since the last log"]["metrics"]
    for key in filter(is_clock, list(logged)):
        del logged[key]
    return states


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
    assert metrics(again) == metrics(whole)
    pd.testing.assert_frame_equal(pd.read_parquet(again / "rollouts"), pd.read_parquet(whole / "rollouts"))
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole, again))
    start = load_file(Path(tiny_folder) / "model.safetensors")
    assert any((expected[key] != start[key]).any() for key in expected)
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key
    ours, theirs = (states(folder, keys.get("max_steps", 4)) for folder in (whole, again))
    for part in ours:
        if part != "progress":
            assert str(ours[part]) == str(theirs[part]), part
    if name == "curriculum":
        assert ours["environment"]["level"] > 1
    if "hapo" in name:
        assert ours["reward hapo"]["tasks"]


def states_step(folder):
    return max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


# Dropout draws random numbers in every step; logs stand on other steps than checkpoints.
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
STOPPED = {
    "sft": SFT | {"num_tasks": 8, "max_steps": 4},
    "sft, dropout, second epoch": SFT | DROPOUT | {"max_steps": 6},
    "dropout, accumulation": DROPOUT | {"max_steps": 8, "gradient_accumulation_steps": 2, "beta": 0.04},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "sft" else pytest.mark.slow) for n in STOPPED]
)
def test_the_last_checkpoint_lost_and_resumed(run_in, tmp_path, name):
    keys = STOPPED[name]
    assert run_in("whole", **keys)[0] == 0
    assert run_in("again", **keys)[0] == 0
    shutil.rmtree(tmp_path / "again" / f"checkpoint-{keys['max_steps']}")
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
    config = (tmp_path / "run" / "config.yaml").read_text()
    changed = keys | {"rewards": ["variety"], "algorithm": "dr_grpo", "max_steps": 3}
    code, said = run_in("run", "--resume", **changed)
    said = said.strip().splitlines()[-1]  # after what transformers says of the model
    assert code == 2
    assert "algorithm: grpo -> dr_grpo" in said and "--resume_anyway resumes it anyway" in said
    assert "rewards: even=1.0 -> variety=1.0, even=0.0" in said
    assert (tmp_path / "run" / "config.yaml").read_text() == config
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
    keys = {"max_steps": 2, "save_steps": 1, "save_total_limit": 1, "evaluation_tasks": 0}
    real = resume.seal

    def seal(folder, step, identity):
        if step == 2:
            raise OSError("the power is gone")
        real(folder, step, identity)

    monkeypatch.setattr(resume, "seal", seal)
    with pytest.raises(OSError, match="the power is gone"):
        run_in("run", **keys)
    monkeypatch.setattr(resume, "seal", real)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-1"
    assert run_in("run", "--resume", **keys)[0] == 0
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_broken_checkpoint_is_not_taken_for_the_newest(run_in, tmp_path):
    """Rotation keeps the highest number: with a limit of 1 it would delete the only whole checkpoint."""
    keys = {"max_steps": 2, "save_steps": 1, "evaluation_tasks": 0}
    run_in("run", **keys)
    run = tmp_path / "run"
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-9")
    (run / "checkpoint-9" / "rlkit.json").unlink()
    assert run_in("run", "--resume", **(keys | {"max_steps": 3, "save_total_limit": 1}))[0] == 0
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-3"]


def test_another_deal_of_generations_begins_with_a_new_one(run_in, tmp_path):
    """A checkpoint in the middle of a generation of 2 x 4 rollouts cannot serve one of 4 x 2."""
    keys = {"max_steps": 3, "save_steps": 3, "evaluation_tasks": 0, "steps_per_generation": 2}
    run_in("run", **keys, per_device_train_batch_size=4)
    keys |= {"max_steps": 5, "steps_per_generation": 4, "per_device_train_batch_size": 2}
    code, said = run_in("run", "--resume", **keys)
    assert code == 2 and "steps_per_generation: 2 -> 4" in said
    assert run_in("run", "--resume", "--resume_anyway", "true", **keys)[0] == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("change", [{"algorithm": "hapo"}, {"dynamic_sampling": True}])
def test_what_a_checkpoint_lacks_is_an_error_or_starts_anew(run_in, tmp_path, change):
    keys = {"max_steps": 1, "save_steps": 1, "evaluation_tasks": 0}
    run_in("run", **keys)
    config = (tmp_path / "run" / "config.yaml").read_text()
    keys |= change | {"max_steps": 2}
    code, said = run_in("run", "--resume", **keys)
    assert code == 2 and "--resume_anyway resumes it anyway" in said.strip().splitlines()[-1]
    assert (tmp_path / "run" / "config.yaml").read_text() == config
    code, said = run_in("run", "--resume", "--resume_anyway", "true", **keys)
    assert code == 0 and "has no state of" in said and "resuming without it" in said


def test_a_checkpoint_of_the_model_alone_is_no_place_to_go_on_from(run_in):
    keys = {"max_steps": 1, "save_steps": 1, "evaluation_tasks": 0, "save_only_model": True}
    run_in("run", **keys)
    code, said = run_in("run", "--resume", **(keys | {"max_steps": 2}))
    assert code == 2 and "save_only_model" in said


@pytest.mark.slow
def test_with_another_number_of_processes(run_in, tmp_path, tiny_folder):
    keys = {"max_steps": 1, "save_steps": 1, "evaluation_tasks": 0}
    run_in("run", **keys)
    path = tmp_path / "two.yaml"
    keys |= {"max_steps": 2, "per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    keys |= {"output_dir": str(tmp_path / "run"), "model_name_or_path": tiny_folder}
    path.write_text(yaml.safe_dump(KEYS | keys))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [sys.executable, *words, "-m", "rlkit", "train", "--config", str(path), "--resume"]
    options = {"cwd": ROOT, "timeout": 300}
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    assert done.returncode != 0 and "processes: 1 -> 2" in done.stderr
    words += ["--resume_anyway", "true"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "has no state of process 1, only that of process 0" in done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run") if "reward" in line] == [1, 2]
