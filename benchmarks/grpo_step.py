"""Speed and memory of a GRPO step, compared with TRL's trainer.

    python benchmarks/grpo_step.py

Both trainers train the same model on the same tasks in one process, one after the other. Completions are
forced to their full length, so that both have the same shapes. For each shape (prompt tokens, completion
tokens, rollouts per prompt), the script measures the forward and backward pass of the loss, the complete step
with sampling, and the peak tensor memory. On a CPU, TRL's trainer gets rlkit's CPU settings, too. With
`--untuned`, it also runs without them, before anything else changes a setting.

The result goes to benchmarks/results/grpo_step.json. The same comparison on a GPU is the part `step` of
benchmarks/gpu.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from fixed_prompts import FixedPrompts, code_sum
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkit.models.bundled import bundled_path
from rlkit.models.cpu import tune_for_cpu
from rlkit.runs.directory import RunDirectory
from rlkit.scoring import ErrorBudget, RewardRunner
from rlkit.training.grpo import GRPOTrainer

RESULT = Path(__file__).parent / "results" / "grpo_step.json"
SHAPES = ((900, 100, 8), (300, 300, 8), (100, 1000, 8))


def random_prompts(tokenizer: Any, length: int) -> list[str]:
    """Return 64 prompts of `length` tokens."""
    ids = torch.randint(1000, 20000, (64, length), generator=torch.Generator().manual_seed(0)).tolist()
    # Decoding and encoding again gives about the same number of tokens; cut them to the exact length.
    return [tokenizer.decode(tokenizer(tokenizer.decode(row))["input_ids"][:length]) for row in ids]


def peak_gib(step: Callable[[], object]) -> float:
    """Return the peak memory in GiB that tensors take while `step` runs, beyond what they took before."""
    # Not the resident memory of the process: the allocator keeps freed memory.
    with MemTracker() as tracker:
        step()
    return sum(total["Total"] for total in tracker.get_tracker_snapshot("peak").values()) / 2**30


def make_trainer(  # noqa: PLR0917
    side: str,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    shape: tuple[int, int, int],
    folder: str,
    peft_config: Any = None,
    **settings: Any,
) -> Any:
    """Return TRL's trainer ("trl") or rlkit's ("rlkit") for one prompt per step.

    Args:
        side: Name of the trainer.
        model: Model to train.
        tokenizer: Tokenizer of the model.
        prompts: Prompts of the tasks.
        shape: Prompt tokens, completion tokens, rollouts. Every completion is sampled to its full length.
        folder: Folder of the run.
        peft_config: Config of an adapter, or None to train all weights.
        settings: Further arguments of TRL's `GRPOConfig`.
    """
    _, completion, group = shape
    environment = FixedPrompts(prompts)
    args = trl.GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=group,
        num_generations=group,
        max_completion_length=completion,
        generation_kwargs={"min_new_tokens": completion},
        max_steps=1000,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-6,
        **settings,
    )
    common = {"args": args, "train_dataset": environment.tasks("train"), "processing_class": tokenizer}
    common |= {"peft_config": peft_config}
    if side == "trl":
        return trl.GRPOTrainer(
            model, reward_funcs=lambda completions, **_: list(map(code_sum, completions)), **common
        )
    (Path(folder) / "rollouts").mkdir()
    return GRPOTrainer(
        model,
        environment=environment,
        runner=RewardRunner(environment.rewards, metric="code_sum"),
        budget=ErrorBudget(),
        run_dir=RunDirectory(Path(folder), "train"),
        **common,
    )


def close(trainer: Any) -> None:
    """Stop the background work of rlkit's trainer: writing rollouts and computing rewards."""
    trainer.run_dir.flush()
    trainer.runner.close()


def measure(side: str, shape: tuple[int, int, int], repeats: int) -> dict[str, float]:
    """Return median seconds of a step and of its forward and backward pass, and that pass's peak memory."""
    path = bundled_path("bundled:smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    weights = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    prompts = random_prompts(tokenizer, shape[0])
    # bf16=False: the weights are bfloat16 already.
    settings = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "optim": "sgd"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(side, weights, tokenizer, prompts, shape, folder, **settings)
        model = trainer._wrap_model(trainer.model_wrapped)
        model.train()
        trainer.current_gradient_accumulation_steps = 1
        loader = iter(trainer.get_train_dataloader())
        sampling, learning = [], []
        for _ in range(repeats + 1):  # the first one is a warm-up
            start = time.perf_counter()
            batch = trainer._generate_and_score_completions(next(loader))
            sampling.append(time.perf_counter() - start)
            assert batch["completion_mask"].sum() == shape[1] * shape[2]
            start = time.perf_counter()
            trainer.compute_loss(model, batch).backward()
            learning.append(time.perf_counter() - start)
            model.zero_grad()
        peak = peak_gib(lambda: trainer.compute_loss(model, batch).backward())
        if side == "rlkit":
            close(trainer)
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
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    shapes = [SHAPES[i] for i in options.shapes]
    measured: dict[str, dict[str, Any]] = {str(shape): {} for shape in shapes}
    if options.untuned:
        for shape in shapes:
            measured[str(shape)]["trl_as_it_is"] = measure("trl", shape, options.repeats)
    tune_for_cpu()
    for shape in shapes:
        entry = measured[str(shape)]
        entry |= {name: measure(name, shape, options.repeats) for name in ("trl", "rlkit")}
        entry |= {
            f"ratio_to_{name}": ratios(entry[name], entry["rlkit"]) for name in list(entry) if "trl" in name
        }
        print(shape, json.dumps(entry), flush=True)
    result = {
        "model": "SmolLM2-135M, bfloat16",
        "shape": "prompt tokens, completion tokens, rollouts",
        "device": f"{torch.get_num_threads()} CPU threads",
        "platform": platform.machine(),
        "torch": torch.__version__,
        "trl": trl.__version__,
        "shapes": measured,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
