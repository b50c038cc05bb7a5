"""Speed and memory of a GRPO step, compared with TRL's trainer.

    python benchmarks/grpo_step.py

Both trainers are in one process and train the same model on the same tasks. Completions are forced to their
full length, so that both have the same shapes. For each shape (prompt tokens, completion tokens, rollouts per
prompt), the script measures complete steps in pairs, one of each trainer, in alternating order: a machine
that becomes slower for a while then slows down both. A step is sampling, the rewards, and the forward and
backward pass of the loss. The result has the median and the range of the ratios of the pairs.

Every shape has at least two pairs. More follow while they fit into `--minutes`, the ones of the cheapest
shapes first. Before the first pair, the forward and backward pass of each side is run once to warm up, and
the peak memory of its tensors is measured. `resident_gib` is the peak of what the process takes from the
kernel during the steps of a side, which includes both models, libraries and freed memory.

On a CPU, TRL's trainer gets rlkit's CPU settings, too. The result goes to benchmarks/results/grpo_step.json.
The same comparison on a GPU is the part `step` of benchmarks/gpu.py.
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
from rlkit.models.cpu import FreedMemoryCallback, tune_for_cpu
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


class Side:
    """One of the two trainers with its own copy of the model.

    Args:
        name: "trl" or "rlkit".
        shape: Prompt tokens, completion tokens, rollouts.
        folder: Folder of the run.
        freed_memory: Callback that bounds the memory that the process keeps between steps.
    """

    def __init__(
        self, name: str, shape: tuple[int, int, int], folder: str, freed_memory: FreedMemoryCallback
    ):
        self.name = name
        self.shape = shape
        self.freed_memory = freed_memory
        path = bundled_path("bundled:smollm2-135m")
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        weights = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        # bf16=False: the weights are bfloat16 already.
        settings = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "optim": "sgd"}
        prompts = random_prompts(tokenizer, shape[0])
        self.trainer = make_trainer(name, weights, tokenizer, prompts, shape, folder, **settings)
        self.model = self.trainer._wrap_model(self.trainer.model_wrapped)
        self.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        self.batches = iter(self.trainer.get_train_dataloader())
        self.forward_backward_s: list[float] = []
        self.step_s: list[float] = []
        self.resident_gib = 0.0
        self.peak_gib = peak_gib(lambda: self.forward_backward(self.random_batch()))

    def random_batch(self) -> dict[str, torch.Tensor]:
        """Return a batch of random tokens, as `step` samples them."""
        prompt, completion, group = self.shape
        random = torch.Generator().manual_seed(0)
        prompt_ids = torch.randint(1000, 20000, (1, prompt), generator=random).expand(group, -1)
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": torch.ones_like(prompt_ids),
            "completion_ids": torch.randint(1000, 20000, (group, completion), generator=random),
            "completion_mask": torch.ones(group, completion, dtype=torch.long),
            "advantages": torch.randn(group, generator=random),
            "num_items_in_batch": torch.tensor(group * completion),
        }

    def forward_backward(self, batch: Any) -> None:
        """Compute the loss and its gradient, and clear it."""
        self.trainer.compute_loss(self.model, batch).backward()
        self.model.zero_grad()

    def step(self) -> None:
        """Sample, judge, and compute the loss and its gradient; record how long that takes."""
        reset_peak_resident()
        start = time.perf_counter()
        batch = self.trainer._generate_and_score_completions(next(self.batches))
        sampled = time.perf_counter()
        self.forward_backward(batch)
        end = time.perf_counter()
        assert batch["completion_mask"].sum() == self.shape[1] * self.shape[2]
        self.forward_backward_s.append(end - sampled)
        self.step_s.append(end - start)
        self.resident_gib = max(self.resident_gib, peak_resident_gib())
        trainer = self.trainer
        self.freed_memory.on_step_end(trainer.args, trainer.state, trainer.control)

    def result(self) -> dict[str, float]:
        """Return the medians of what was measured."""
        return {
            "forward_backward_s": round(statistics.median(self.forward_backward_s), 3),
            "step_s": round(statistics.median(self.step_s), 3),
            "peak_gib": round(self.peak_gib, 3),
            "resident_gib": round(self.resident_gib, 3),
        }

    def close(self) -> None:
        """Stop the background work of rlkit's trainer."""
        if self.name == "rlkit":
            close(self.trainer)


def reset_peak_resident() -> None:
    """Set the recorded peak of the process's resident memory to its current value."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident_gib() -> float:
    """Return the peak of the process's resident memory since the last reset, in GiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


class Pairs:
    """Both trainers at one shape, and the pairs of steps measured so far."""

    def __init__(self, shape: tuple[int, int, int], folder: str, freed_memory: FreedMemoryCallback):
        self.shape = shape
        self.sides: list[Side] = []
        for name in ("trl", "rlkit"):
            path = Path(folder) / f"{name}-{'-'.join(map(str, shape))}"
            path.mkdir()
            self.sides.append(Side(name, shape, str(path), freed_memory))
        self.num_pairs = 0

    def run_pair(self) -> None:
        """Measure a step of each side; the order changes with every pair."""
        for side in self.sides if self.num_pairs % 2 == 0 else reversed(self.sides):
            side.step()
        self.num_pairs += 1

    def seconds(self) -> float:
        """Return the median duration of a pair."""
        return sum(statistics.median(side.step_s) for side in self.sides)

    def result(self) -> dict[str, Any]:
        """Return the medians of each side, and median and range of the ratios of the pairs."""
        trl_side, rlkit_side = self.sides
        ratios = {
            "forward_backward": pair_ratios(trl_side.forward_backward_s, rlkit_side.forward_backward_s),
            "step": pair_ratios(trl_side.step_s, rlkit_side.step_s),
            "peak": round(trl_side.peak_gib / rlkit_side.peak_gib, 2),
        }
        sides = {side.name: side.result() for side in self.sides}
        return {"pairs": self.num_pairs, **sides, "ratio_to_trl": ratios}


def pair_ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Return the median, minimum and maximum of the ratios of paired durations."""
    ratios = [s / f for s, f in zip(slow, fast, strict=True)]
    return {
        "median": round(statistics.median(ratios), 2),
        "min": round(min(ratios), 2),
        "max": round(max(ratios), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="time for pairs beyond the first two")
    parser.add_argument("--shapes", type=int, nargs="*", default=range(len(SHAPES)), help="indices of SHAPES")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    start = time.perf_counter()
    tune_for_cpu()
    freed_memory = FreedMemoryCallback()
    with tempfile.TemporaryDirectory() as folder:
        all_pairs = [Pairs(SHAPES[i], folder, freed_memory) for i in options.shapes]
        for _ in range(2):
            for pairs in all_pairs:
                pairs.run_pair()
                print(pairs.shape, json.dumps(pairs.result()), flush=True)
        while True:
            # The shape with the fewest seconds so far: each shape gets about the same time.
            pairs = min(all_pairs, key=lambda pairs: pairs.num_pairs * pairs.seconds())
            if time.perf_counter() - start + pairs.seconds() > 60 * options.minutes:
                break
            pairs.run_pair()
        for pairs in all_pairs:
            print(pairs.shape, json.dumps(pairs.result()), flush=True)
            for side in pairs.sides:
                side.close()
    result = {
        "model": "SmolLM2-135M, bfloat16",
        "shape": "prompt tokens, completion tokens, rollouts",
        "device": f"{torch.get_num_threads()} CPU threads",
        "platform": platform.machine(),
        "torch": torch.__version__,
        "trl": trl.__version__,
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "shapes": {str(pairs.shape): pairs.result() for pairs in all_pairs},
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
