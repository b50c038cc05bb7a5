"""Check that rlkit computes the right thing on this device, and that a run trains and resumes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from trl.trainer.utils import add_fused_lm_head

from gpu_parts.common import Bench, Cases, gradient_error
from gpu_parts.runs import run, save_model, train_argv
from gpu_parts.trainers import random_batch
from rlkit.training.shared_prefix import add_shared_prefix, completion_log_probs

MODELS = ("llama-3.2-1b", "qwen3-0.6b", "gemma-2b")
# Prompts, completions, rollouts per prompt. Attention needs a mask for the first and none for the second.
BATCHES = {
    "mask": (([300, 420], [100, 40, 120, 1, 64, 120, 7, 99], 4), ([9, 14], [5, 3, 8, 1, 2, 8, 7, 4], 4)),
    "causal": (([64], [400, 31, 256, 399], 4), ([6], [20, 3, 14, 19], 4)),
}
FLOAT32_TOLERANCE = 1e-3
# Bound on the bfloat16 error with sharing, as a multiple of the error without it.
BFLOAT16_FACTOR = 1.5
NUM_STEPS = 5


def cases(bench: Bench) -> Cases:
    """Return a case per model, and one per run."""
    shared: Cases = {f"{name}, shared prefix": partial(shared_prefix, bench, name) for name in MODELS}
    return shared | {
        "five steps of rlkit train": partial(five_steps, bench),
        "resume after a kill": partial(resume, bench),
    }


def shared_prefix(bench: Bench, name: str) -> dict[str, Any]:
    """Compare log-probabilities and gradients with those of a plain forward pass in float32.

    Raises:
        AssertionError: Sharing the prefix changes them by more than rounding does.
    """
    result: dict[str, Any] = {}
    add_shared_prefix()
    models = {}
    for dtype in (torch.float32, torch.bfloat16):
        for side in ("plain", "shared"):
            model = bench.model(name, dtype).train()
            add_fused_lm_head(model, outputs=("entropy",))
            models[side, dtype] = model
    reference = models["plain", torch.float32]
    for batch_name, sizes in BATCHES.items():
        batch = random_batch(bench, *bench.size(*sizes))
        expected = backward(reference, "plain", batch)
        for (side, dtype), model in models.items():
            if model is reference:
                continue
            log_probs = backward(model, side, batch)
            result[f"{batch_name}, {side}, {str(dtype).removeprefix('torch.')}"] = {
                "log_prob_error": (log_probs - expected).square().mean().sqrt().item(),
                "gradient_error": gradient_error(model, reference),
            }
            model.zero_grad()
        reference.zero_grad()
        check(batch_name, result)
    return result


def check(batch_name: str, errors: dict[str, dict[str, float]]) -> None:
    """Raise AssertionError if sharing the prefix adds an error beyond rounding."""
    for measure in ("log_prob_error", "gradient_error"):
        float32 = errors[f"{batch_name}, shared, float32"][measure]
        plain, shared = (errors[f"{batch_name}, {side}, bfloat16"][measure] for side in ("plain", "shared"))
        if not (float32 < FLOAT32_TOLERANCE and shared < BFLOAT16_FACTOR * plain + FLOAT32_TOLERANCE):
            raise AssertionError(f"{batch_name}: {measure} is too large: {errors}")


def backward(model: Any, side: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute log-probabilities (B, T) and the gradient of their weighted sum; return the former."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length = batch["completion_ids"].size(1)
    if side == "shared":
        log_probs = completion_log_probs(model, ids, mask, length).log_probs
    else:  # each row by itself, as in TRL's trainer
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-length] = -100
        output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        log_probs = output.log_probs[:, -length:]
    (log_probs * batch["advantages"][:, None]).sum().backward()
    return log_probs.detach().float()


def five_steps(bench: Bench) -> dict[str, Any]:
    """Train a model with random weights for five steps, evaluating before and after."""
    with tempfile.TemporaryDirectory() as folder:
        argv = run_argv(bench, Path(folder), "run", evaluation_tasks=4)
        start = time.perf_counter()
        run(argv)
        seconds = time.perf_counter() - start
        steps = logged_steps(Path(folder) / "run")
        evaluations = sorted(path.stem for path in (Path(folder) / "run" / "evaluation").glob("*.json"))
    assert list(steps) == list(range(1, NUM_STEPS + 1)), f"logged the steps {list(steps)}"
    assert evaluations == ["after", "before"], f"evaluated {evaluations}"
    gradient_norms = [step["grad_norm"] for step in steps.values()]
    assert all(norm > 0 for norm in gradient_norms), f"gradient norms {gradient_norms}"
    return {"process_s": round(seconds, 1), "gradient_norms": gradient_norms}


def resume(bench: Bench) -> dict[str, Any]:
    """Kill a run after its second checkpoint, resume it, and compare its steps with an uninterrupted run."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
        run(run_argv(bench, Path(folder), "uninterrupted"))
        expected = logged_steps(Path(folder) / "uninterrupted")
        argv = run_argv(bench, Path(folder), "killed", **checkpoints)
        log = Path(folder) / "log"
        with log.open("w") as file:
            command = [sys.executable, "-m", "rlkit", "train", *argv]
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        # A checkpoint is renamed to this name when it is complete.
        checkpoint = Path(folder) / "killed" / "checkpoint-2"
        try:
            while not checkpoint.exists() and process.poll() is None:
                time.sleep(0.05)
            assert process.poll() is None, f"the run ended before it was killed: {log.read_text()[-1500:]}"
        finally:
            process.kill()
            process.wait()
        run([*argv, "--resume", "true"])
        steps = logged_steps(Path(folder) / "killed")
    assert list(steps) == list(range(1, NUM_STEPS + 1)), f"logged the steps {list(steps)}"
    # Sums in another order can change a sampled token on a GPU; then all later steps differ.
    equal = [step for step in steps if steps[step]["reward"] == expected[step]["reward"]]
    assert 1 in equal, "the first steps of both runs have different rewards"
    return {"steps": list(steps), "steps_with_equal_rewards": equal}


def run_argv(bench: Bench, folder: Path, name: str, **keys: Any) -> list[str]:
    """Return the arguments of `rlkit train` for a run of five steps; save its model if there is none yet."""
    model = folder / "model"
    if not model.exists():
        save_model(bench, "qwen3-0.6b", model, num_hidden_layers=bench.size(4, 2))  # small checkpoints
    shape = bench.size((128, 64, 8), (16, 8, 4))
    return train_argv(bench, model, folder / name, shape=shape, max_steps=NUM_STEPS, **keys)


def logged_steps(folder: Path) -> dict[int, dict[str, float]]:
    """Return the training metrics of a run, by step; each step must be logged once."""
    steps: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        if "grad_norm" in metrics:
            assert metrics["step"] not in steps, f"step {metrics['step']} is logged twice"
            steps[metrics["step"]] = metrics
    return steps
