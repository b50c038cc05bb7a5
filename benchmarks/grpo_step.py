"""Speed and memory of a GRPO step, compared with TRL's trainer.

    python benchmarks/grpo_step.py

Both trainers train the same model on the same tasks in one process, one after the other. Completions are
forced to their full length, so that both have the same shapes. For each shape (prompt tokens, completion
tokens, rollouts per prompt), the script measures the forward and backward pass of the loss, the complete step
with sampling, and the peak tensor memory. On a CPU, TRL's trainer gets rlkit's CPU settings, too. With
`--untuned`, it also runs without them, before anything else changes a setting.

The result goes to benchmarks/results/grpo_step.json (grpo_step_cuda.json on an accelerator).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkit.environment import Environment
from rlkit.models.bundled import bundled_path
from rlkit.models.cpu import tune_for_cpu
from rlkit.runs.directory import RunDirectory
from rlkit.scoring import ErrorBudget, RewardRunner
from rlkit.training.grpo import GRPOTrainer

SHAPES = ((900, 100, 8), (300, 300, 8), (100, 1000, 8))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def digits(completion: str) -> float:
    """Return a reward that differs between rollouts, so that there is a gradient."""
    return float(sum(map(ord, completion)) % 7)


class Words(Environment):
    """Random prompts with a given number of tokens."""

    id = "words-v1"
    metric = "digits"
    rewards = {"digits": digits}  # noqa: RUF012
    reward_weights = {"digits": 1.0}  # noqa: RUF012

    def __init__(self, tokenizer: Any, length: int):
        ids = torch.randint(1000, 20000, (64, length), generator=torch.Generator().manual_seed(0)).tolist()
        # Decoding and encoding again gives about the same number of tokens; cut them to the exact length.
        self.texts = [tokenizer.decode(tokenizer(tokenizer.decode(row))["input_ids"][:length]) for row in ids]

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        return datasets.Dataset.from_list(
            [{"prompt": text, "task_id": str(i)} for i, text in enumerate(self.texts)]
        )

    def answer(self, task: Any) -> str:
        return ""


def peak_gib(step: Any) -> float:
    """Return the peak memory in GiB that tensors take while `step` runs, beyond what they took before."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    # Not the resident memory of the process: the allocator keeps freed memory.
    with MemTracker() as tracker:
        step()
    return sum(total["Total"] for total in tracker.get_tracker_snapshot("peak").values()) / 2**30


def make_trainer(use_rlkit: bool, shape: tuple[int, int, int], folder: str) -> Any:
    prompt, completion, group = shape
    path = bundled_path("bundled:smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    environment = Words(tokenizer, prompt)
    args = trl.GRPOConfig(
        output_dir=folder,
        use_cpu=DEVICE == "cpu",
        bf16=False,  # the weights are bfloat16 already
        gradient_checkpointing=False,
        per_device_train_batch_size=group,
        num_generations=group,
        max_completion_length=completion,
        generation_kwargs={"min_new_tokens": completion},
        max_steps=1000,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-6,
        optim="sgd",
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    common = {"args": args, "train_dataset": environment.tasks("train"), "processing_class": tokenizer}
    if not use_rlkit:
        return trl.GRPOTrainer(
            model, reward_funcs=lambda completions, **_: list(map(digits, completions)), **common
        )
    return GRPOTrainer(
        model,
        environment=environment,
        runner=RewardRunner(environment.rewards, metric="digits"),
        budget=ErrorBudget(),
        run_dir=RunDirectory(Path(folder), "train"),
        **common,
    )


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure(use_rlkit: bool, shape: tuple[int, int, int], repeats: int) -> dict[str, float]:
    """Return median seconds of a step and of its forward and backward pass, and that pass's peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rollouts").mkdir()
        trainer = make_trainer(use_rlkit, shape, folder)
        model = trainer._wrap_model(trainer.model_wrapped).to(DEVICE)
        model.train()
        trainer.current_gradient_accumulation_steps = 1
        loader = iter(trainer.get_train_dataloader())
        sampling, learning = [], []
        for _ in range(repeats + 1):  # the first one is a warm-up
            synchronize()
            start = time.perf_counter()
            batch = trainer._generate_and_score_completions(next(loader))
            synchronize()
            sampling.append(time.perf_counter() - start)
            assert batch["completion_mask"].sum() == shape[1] * shape[2]
            start = time.perf_counter()
            trainer.compute_loss(model, batch).backward()
            synchronize()
            learning.append(time.perf_counter() - start)
            model.zero_grad()
        peak = peak_gib(lambda: trainer.compute_loss(model, batch).backward())
        if use_rlkit:
            trainer.run_dir.flush()
            trainer.runner.close()
    forward_backward, sample = statistics.median(learning[1:]), statistics.median(sampling[1:])
    return {
        "forward_backward_s": round(forward_backward, 3),
        "step_s": round(forward_backward + sample, 3),
        "peak_gib": round(peak, 3),
    }


def ratios(slow: dict[str, float], fast: dict[str, float]) -> dict[str, float]:
    return {key.rpartition("_")[0]: round(slow[key] / fast[key], 2) for key in slow if fast[key]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", type=int, nargs="*", default=range(len(SHAPES)), help="indices of SHAPES")
    parser.add_argument("--untuned", action="store_true", help="also run TRL without rlkit's CPU settings")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shapes = [SHAPES[i] for i in options.shapes]
    measured: dict[str, dict[str, Any]] = {str(shape): {} for shape in shapes}
    if options.untuned:
        for shape in shapes:
            measured[str(shape)]["trl_as_it_is"] = measure(False, shape, options.repeats)
    if DEVICE == "cpu":
        tune_for_cpu()
    for shape in shapes:
        entry = measured[str(shape)]
        entry |= {name: measure(name == "rlkit", shape, options.repeats) for name in ("trl", "rlkit")}
        entry |= {
            f"ratio_to_{name}": ratios(entry[name], entry["rlkit"]) for name in list(entry) if "trl" in name
        }
        print(shape, json.dumps(entry), flush=True)
    result = {
        "model": "SmolLM2-135M, bfloat16",
        "shape": "prompt tokens, completion tokens, rollouts",
        "device": torch.cuda.get_device_name()
        if DEVICE == "cuda"
        else f"{torch.get_num_threads()} CPU threads",
        "platform": platform.machine(),
        "torch": torch.__version__,
        "trl": trl.__version__,
        "shapes": measured,
    }
    name = "grpo_step.json" if DEVICE == "cpu" else "grpo_step_cuda.json"
    path = options.out or Path(__file__).parent / "results" / name
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
