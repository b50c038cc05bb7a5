"""A run that is killed or loses power at any moment resumes and ends like an uninterrupted one, bit for bit.

Each run is a fork of this process that kills itself before a random operation on its files; at least every
second one while it writes a checkpoint. A run is killed several times before it may finish.
"""

import json
import math
import random
import signal
from functools import partial

import pytest
import torch

from rlkit.errors import PREEMPTED
from tests.end_to_end.killing import (
    KILLED,
    Run,
    files_of,
    lose_power,
    truncate_file_being_written,
)
from tests.quick import QUICK, ROOT, TOY

KEYS = QUICK | {
    "environment": f"{TOY}:Odd",
    "num_tasks": 12,
    "evaluation_tasks": 3,
    "evaluation_steps": 2,
    "learning_rate": 1e-2,
    "max_steps": 6,
    "save_steps": 2,
    "save_total_limit": 2,
}
POLICY = {"max_completion_length": 6, "num_generations": 4, "per_device_train_batch_size": 8}
LORA = {"use_peft": True, "lora_r": 2, "lora_dropout": 0.5, "lora_target_modules": "all-linear"}
KINDS = {
    "grpo": ("train", POLICY | {"beta": 0.1, "num_iterations": 2, "steps_per_generation": 2}),
    "hapo": ("train", POLICY | {"algorithm": "hapo", "num_tasks": 4, "save_total_limit": 1}),
    "dapo": (
        "train",
        POLICY | LORA | {"algorithm": "dapo", "dynamic_sampling": True, "logging_steps": 4, "save_steps": 1},
    ),
    "sft": ("sft", LORA | {"demonstrations": "answer", "per_device_train_batch_size": 4, "save_steps": 1}),
    "rank": (
        "rank",
        {
            "environment": f"{ROOT / 'tests' / 'toy_ranking.py'}:Echo",
            "per_device_train_batch_size": 4,
            "rankings": 4,
            "adapter_rank": 2,
            "temperature": 5.0,  # the tasks are easy: otherwise all rankings drawn have the same utility
        },
    ),
}
TIMES = ("seconds", "step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")


def is_time(key):
    return (
        key in TIMES or key.startswith("time/") or key.endswith(("/latency", "/latency_max", "_per_second"))
    )


def without_times(value):
    """Return a nested value that can be compared: without times, tensors as lists, NaN as a string."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not is_time(str(key))}
    if isinstance(value, list | tuple):
        return [without_times(item) for item in value]
    if hasattr(value, "tolist"):
        return [str(value.dtype), without_times(value.tolist())]
    return "NaN" if isinstance(value, float) and math.isnan(value) else value


def final_state(run):
    """Return everything that a run leaves on disk, by path, except times and the run's own name."""
    state = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or path.name in (".lock", "training_args.bin", "config.yaml", "README.md"):
            continue
        if path.suffix in (".pt", ".pth"):
            value = without_times(torch.load(path, weights_only=False))
            if path.name.startswith("rlkit_state"):
                value.pop("progress", None)
        elif path.name == "metrics.jsonl":
            value = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            value = without_times(json.loads(path.read_text().replace(str(run), "")))
            if path.name == "rlkit.json":  # times have different numbers of digits
                value["files"] = sorted(value["files"])
        else:
            value = None if path.name == "report.html" else path.read_bytes()
        state[name] = value
    return state


def kill_and_resume(folder, stage, keys, num_kills, seed):
    """Kill runs and resume them, until `num_kills` kills; compare each with an uninterrupted run.

    Returns:
        Number of kills during a checkpoint write.
    """
    reference = Run(folder, "reference", stage, keys)
    assert reference(reference.operations.install) == 0, reference.log.read_text()[-3000:]
    operations = reference.operations.recorded()
    expected = final_state(reference.path)
    weights = [value for name, value in expected.items() if "checkpoint-" in name and "safetensors" in name]
    assert len(weights) == len(set(weights)) >= 1, "the run does not learn"
    num_operations = len(operations)
    num_in_checkpoint = sum("checkpoint-" in path for _, path, _ in operations) // keys["max_steps"]
    num_in_checkpoint *= 2 * keys["save_steps"]  # kill in the first or the second checkpoint of each process
    rng = random.Random(str(seed))
    kills = 0
    in_checkpoints = 0
    chain = 0
    while kills < num_kills:
        chain += 1
        run = Run(folder, f"killed-{chain}", stage, keys)
        code, in_chain = KILLED, 0
        while code == KILLED:
            part = "checkpoint-" if kills % 2 or kills - in_checkpoints > in_checkpoints else ""
            number = rng.randint(1, num_in_checkpoint if part else num_operations)
            before = files_of(run.path)
            finish = kills == num_kills or in_chain == 6
            code = run(
                run.operations.install if finish else partial(run.operations.kill_before, number, part)
            )
            if code != KILLED:
                break
            kills, in_chain = kills + 1, in_chain + 1
            operations = run.operations.recorded()
            in_checkpoints += "checkpoint-" in operations[-1][1]
            if rng.random() < 0.5:
                lose_power(run.path, operations, before, rng)
            else:
                truncate_file_being_written(operations, rng)
        assert code == 0, f"{number} {part} {operations[-1]}\n{run.log.read_text()[-3000:]}"
        actual = final_state(run.path)
        assert sorted(actual) == sorted(expected), run.log.read_text()[-3000:]
        for name, value in expected.items():
            assert actual[name] == value, f"{name}\n{run.log.read_text()[-3000:]}"
    return in_checkpoints


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "num_kills", [pytest.param(10, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.exhaustive)]
)
def test_killed_run_ends_like_an_uninterrupted_one(tmp_path, models, kind, num_kills):
    stage, keys = KINDS[kind]
    keys = KEYS | {"model_name_or_path": models[stage]} | keys
    assert kill_and_resume(tmp_path, stage, keys, num_kills, f"{kind} {num_kills}") >= num_kills // 2


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, models):
    """Return the stage, the keys and the final state of a run without evaluations during training."""
    stage, keys = KINDS["sft"]
    keys = KEYS | {"model_name_or_path": models[stage]} | keys
    keys |= {"evaluation_steps": 0, "save_steps": 2, "max_steps": 4}
    run = Run(tmp_path_factory.mktemp("uninterrupted"), "run", stage, keys)
    assert run(lambda: None) == 0, run.log.read_text()[-3000:]
    return stage, keys, final_state(run.path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "numbers"),
    [
        ("evaluation/before", (signal.SIGTERM,) * 3),
        ("checkpoint-2/optimizer", (signal.SIGTERM,) * 3),
        ("checkpoint-2/optimizer", (signal.SIGUSR1, signal.SIGKILL)),
        ("model.partial", (signal.SIGTERM,) * 3),
        ("report.html", (signal.SIGUSR2, signal.SIGKILL)),
    ],
)
def test_preempted_run_ends_like_an_uninterrupted_one(tmp_path, uninterrupted, part, numbers):
    stage, keys, expected = uninterrupted
    run = Run(tmp_path, "run", stage, keys)
    code = run(partial(run.operations.signal_before, numbers, part))
    assert code in (PREEMPTED, *([KILLED] if signal.SIGKILL in numbers else [])), run.log.read_text()[-3000:]
    if code == PREEMPTED:
        assert "rlkit: stopped by SIGTERM" in run.log.read_text().splitlines()[-1]
    if part.startswith("checkpoint-2"):  # no other step is trained in the grace period
        assert not (run.path / "checkpoint-4").exists() and not (run.path / "checkpoint-3").exists()
    assert not (run.path / "model").exists() or part == "report.html"
    assert run(lambda: None) == 0, run.log.read_text()[-3000:]
    assert final_state(run.path) == expected
