"""Speed and memory of a GRPO step, compared with TRL's trainer.

    python benchmarks/grpo_step.py               # ten minutes on two CPU cores

The two trainers are in one process, with a copy of the same model each, and take complete steps in turn: one
of each is a pair. The order is reversed from pair to pair, so that a change of the machine's speed affects
both alike. Completions are forced to their full length, so that both have the same shapes. On a CPU, TRL's
trainer gets rlkit's CPU settings, too.

For each shape (prompt tokens, completion tokens, rollouts per prompt), the result has

- `forward_backward_s` and `step_s`: median, minimum and maximum of the seconds of the forward and backward
  pass, and of the complete step: sampling, rewards, forward and backward pass, optimizer;
- `peak_gib` and `resident_gib`: how much the memory of the tensors, and of the process, grew at most in the
  first forward and backward pass, starting without freed memory. Measuring it slows this pass down a little,
  on both sides;
- `ratio_to_trl`: TRL's numbers divided by rlkit's. For times, it is the median, minimum and maximum of the
  ratios of the `pairs`;
- `process_gib`: how much the memory of the process grew at most in all pairs of both trainers, with the freed
  memory that it keeps.

The time is split over the shapes, each of which gets at least two pairs, after sampling a few tokens as a
warm-up. The result goes to
benchmarks/results/grpo_step.json. The same comparison on a GPU is the part `step` of benchmarks/gpu.py.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import platform
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import trl
from fixed_prompts import FixedPrompts, code_sum
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkit.models.bundled import bundled_path
from rlkit.models.cpu import FreedMemoryCallback, resident_bytes, tune_for_cpu
from rlkit.rollouts.loop import RolloutLimits
from rlkit.runs.directory import RunDirectory
from rlkit.scoring import ErrorBudget, RewardRunner
from rlkit.training.grpo import GRPOTrainer

RESULT = Path(__file__).parent / "results" / "grpo_step.json"
SHAPES = ((900, 100, 8), (300, 300, 8), (100, 1000, 8))
SIDES = ("trl", "rlkit")
MIN_PAIRS = 2
GIB = 2**30


def random_prompts(tokenizer: Any, length: int) -> list[str]:
    """Return 64 prompts of `length` tokens."""
    ids = torch.randint(1000, 20000, (64, length), generator=torch.Generator().manual_seed(0)).tolist()
    # Decoding and encoding again gives about the same number of tokens; cut them to the exact length.
    return [tokenizer.decode(tokenizer(tokenizer.decode(row))["input_ids"][:length]) for row in ids]


class TensorMemory(TorchDispatchMode):
    """Inside a `with` block, tracks the bytes of the tensors that operations create.

    torch's MemTracker gives the same peak, but also attributes it to modules, which takes longer than the
    forward and backward pass of a short row.

    Attributes:
        num_bytes: Bytes of the tensors that exist now.
        peak_bytes: Maximum of `num_bytes` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = self.peak_bytes = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count the memory of its outputs that is not that of an input."""
        inputs = {id(x.untyped_storage()) for x in args if isinstance(x, torch.Tensor)}
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(output, torch.Tensor):
                storage = output.untyped_storage()
                if id(storage) not in inputs and id(storage) not in self._alive:
                    self._count(storage)
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = id(storage), storage.nbytes()

        def freed(_: object) -> None:
            del self._alive[key]
            self.num_bytes -= num_bytes

        self._alive[key] = weakref.ref(storage, freed)
        self.num_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)


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
    """A trainer that takes one step at a time.

    Args:
        name: Name of the trainer, "trl" or "rlkit".
        shape: Prompt tokens, completion tokens, rollouts per step.
        folder: Empty folder of the run.
    """

    def __init__(self, name: str, shape: tuple[int, int, int], folder: Path):
        path = bundled_path("bundled:smollm2-135m")
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        weights = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        prompts = random_prompts(tokenizer, shape[0])
        folder.mkdir()
        # bf16=False: the weights are bfloat16 already.
        settings = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "optim": "sgd"}
        self.name = name
        self.memory: dict[str, float] = {}
        self.num_completion_tokens = shape[1] * shape[2]
        self.trainer = make_trainer(name, weights, tokenizer, prompts, shape, str(folder), **settings)
        self.trainer.create_optimizer_and_scheduler(self.trainer.args.max_steps)
        self.model = self.trainer._wrap_model(self.trainer.model_wrapped)
        self.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        self.loader = iter(self.trainer.get_train_dataloader())

    def sample(self) -> Any:
        """Sample and judge the rollouts of the next prompt, and return the batch of the loss."""
        batch = self.trainer._prepare_inputs(next(self.loader))
        assert batch["completion_mask"].sum() == self.num_completion_tokens, "a completion ended early"
        return batch

    def forward_backward(self, batch: Any) -> None:
        """Compute the loss of a batch and its gradient, which `step` or `clear` must clear."""
        self.trainer.compute_loss(self.model, batch).backward()

    def clear(self) -> None:
        """Clear the gradient."""
        self.model.zero_grad()

    def step(self) -> dict[str, float]:
        """Take a step; return the seconds of its forward and backward pass, and of all of it.

        The first step also measures the memory: a separate pass would take too long for the longest shape.
        """
        start = time.perf_counter()
        batch = self.sample()
        sampling = time.perf_counter() - start
        is_first = not self.memory
        before = without_freed_memory() if is_first else 0
        start = time.perf_counter()
        with TensorMemory() if is_first else nullcontext() as tensors:
            self.forward_backward(batch)
        learning = time.perf_counter() - start
        if is_first:
            resident = resident_peak_bytes() - before
            self.memory = {
                "peak_gib": round(tensors.peak_bytes / GIB, 3),
                "resident_gib": round(resident / GIB, 3),
            }
        start = time.perf_counter()
        self.trainer.optimizer.step()
        self.clear()
        update = time.perf_counter() - start
        return {"forward_backward": learning, "step": sampling + learning + update}

    def warm_up(self, tokens: int = 4) -> None:
        """Sample and judge completions of a few tokens, which starts the workers of the rewards."""
        trainer, full_length = self.trainer, self.trainer.max_completion_length
        for length in (tokens, full_length):
            if self.name == "trl":
                trainer.generation_config.update(max_new_tokens=length, min_new_tokens=length)
            else:
                trainer.loop.limits = RolloutLimits(length)
                trainer.args.generation_kwargs["min_new_tokens"] = length
            if length == tokens:
                trainer._prepare_inputs(next(self.loader))

    def close(self) -> None:
        """Finish background work."""
        if self.name == "rlkit":
            close(self.trainer)


def without_freed_memory() -> int:
    """Return freed memory to the kernel, reset the peak of the resident memory, and return that memory."""
    ctypes.CDLL(None).malloc_trim(0)
    reset_resident_peak()
    return resident_bytes()


def reset_resident_peak() -> None:
    """Make the peak of the process's resident memory start again from the current value."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_peak_bytes() -> int:
    """Return the peak of the process's resident memory since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure_pairs(
    steps: Mapping[str, Callable[[], dict[str, float]]], deadline: float, min_pairs: int = MIN_PAIRS
) -> dict[str, list[dict[str, float]]]:
    """Take steps of the sides in turn until another pair would end after the deadline.

    Args:
        steps: Function of each side that takes a step and returns its seconds, by what was timed.
        deadline: Time by which to finish, as `time.monotonic()` counts.
        min_pairs: Number of pairs to measure in any case.

    Returns:
        What the functions returned, for each side in the order of the pairs.
    """
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    start, num_pairs = time.monotonic(), 0
    while True:
        names = list(steps) if num_pairs % 2 == 0 else list(reversed(steps))
        for name in names:
            measured[name].append(steps[name]())
        num_pairs += 1
        now = time.monotonic()
        if num_pairs >= min_pairs and now + (now - start) / num_pairs > deadline:
            return measured


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Return the median, the minimum and the maximum."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(number, digits) for name, number in numbers.items()}


def compare(
    seconds: Mapping[str, Sequence[Mapping[str, float]]], memory: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Return the summary of each side, and the ratios of TRL's numbers to rlkit's.

    Args:
        seconds: Seconds of each side's steps, by what was timed, from `measure_pairs`.
        memory: Memory of each side, by what was measured.
    """
    parts = list(seconds["trl"][0])
    result: dict[str, Any] = {"pairs": len(seconds["trl"])}
    for name, steps in seconds.items():
        times = {f"{part}_s": spread([step[part] for step in steps]) for part in parts}
        result[name] = times | dict(memory[name])
    pairs = list(zip(seconds["trl"], seconds["rlkit"], strict=True))
    ratios: dict[str, Any] = {
        part: spread([trl_step[part] / step[part] for trl_step, step in pairs], 2) for part in parts
    }
    for key, gib in memory["trl"].items():
        ratios[key.removesuffix("_gib")] = round(gib / memory["rlkit"][key], 2)
    return result | {"ratio_to_trl": ratios}


def measure(shape: tuple[int, int, int], deadline: float) -> dict[str, Any]:
    """Return the times and the memory of both trainers for a shape, and their ratios."""
    freed_memory = FreedMemoryCallback()
    peaks = []

    def take_step(side: Side) -> dict[str, float]:
        seconds = side.step()
        peaks.append(resident_peak_bytes())
        freed_memory.on_step_end(None, None, None)  # type: ignore[arg-type]
        return seconds

    with tempfile.TemporaryDirectory() as folder:
        sides = {name: Side(name, shape, Path(folder) / name) for name in SIDES}
        for side in sides.values():
            side.warm_up()
        before = without_freed_memory()
        seconds = measure_pairs({name: partial(take_step, side) for name, side in sides.items()}, deadline)
        for side in sides.values():
            side.close()
        memory = {name: side.memory for name, side in sides.items()}
    return compare(seconds, memory) | {"process_gib": round((max(peaks) - before) / GIB, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="time for all shapes (default: 10)")
    parser.add_argument("--shapes", type=int, nargs="*", default=range(len(SHAPES)), help="indices of SHAPES")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    start = time.monotonic()
    deadline = start + 60 * options.minutes
    tune_for_cpu()
    shapes = [SHAPES[i] for i in options.shapes]
    measured: dict[str, dict[str, Any]] = {str(shape): {} for shape in shapes}
    # The most expensive shape first: the others share the time that its minimum leaves.
    by_cost = sorted(shapes, key=lambda shape: shape[1], reverse=True)
    for i, shape in enumerate(by_cost):
        now = time.monotonic()
        measured[str(shape)] = measure(shape, now + (deadline - now) / (len(by_cost) - i))
        print(shape, json.dumps(measured[str(shape)]), flush=True)
    result = {
        "model": "SmolLM2-135M, bfloat16",
        "shape": "prompt tokens, completion tokens, rollouts",
        "device": f"{torch.get_num_threads()} CPU threads, {torch.backends.cpu.get_cpu_capability()}",
        "platform": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "date": datetime.date.today().isoformat(),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "shapes": measured,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
