"""Duration of an RL step on a cluster, and the share of time that GPUs are idle, for three schedules.

- colocated: All GPUs sample, then all train.
- split: Some GPUs sample, then the others train, so one side always waits.
- one step off: Both sides work at the same time. The rollouts come from the weights before the last update.

A GPU that decodes n completions produces one token of each in `a + b n` seconds: `a` to read the weights, `b`
for the work of a completion. Finished completions leave the batch. A step therefore ends with the longest
completion alone, which more GPUs do not speed up. Training time is proportional to the number of tokens and
divided evenly among the GPUs.

    python benchmarks/step_simulator.py          # the published figures and the table of docs/scaling.md
    python benchmarks/step_simulator.py --gpus 64 --samplers 24 --params 7 --mean 4000 --longest 16000
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

RESULT = Path(__file__).parent / "results" / "step_simulator.json"
SEED = 0


@dataclass(frozen=True)
class Gpu:
    """Published specifications of a GPU, and the share of its FLOPS that sampling and training reach."""

    flops: float  # bfloat16, without sparsity
    bandwidth: float  # bytes per second
    memory: float  # bytes
    network: float  # bytes per second to other machines
    sampling_share: float = 0.6
    training_share: float = 0.35
    overhead: float = 0.002  # seconds per decoding step, for kernel launches and the scheduler


H20 = Gpu(148e12, 4.0e12, 96e9, 50e9)
H100 = Gpu(989e12, 3.35e12, 80e9, 50e9)


@dataclass(frozen=True)
class Model:
    """Dense model in bfloat16: number of parameters, and bytes of KV cache per token."""

    parameters: float
    cache: float


QWEN_7B = Model(7.6e9, 57_344)
MODELS = {1.5: Model(1.5e9, 28_672), 3: Model(3.1e9, 36_864), 7: QWEN_7B, 32: Model(32.8e9, 262_144)}


@dataclass(frozen=True)
class Step:
    """Workload of one step.

    Attributes:
        lengths: Completion lengths in tokens, shape (rollouts,).
        prompt: Number of prompt tokens of each rollout.
        passes: Training work per token in forward passes: 3 for an update, 4 with a forward pass before it.
    """

    lengths: np.ndarray
    prompt: int = 200
    passes: float = 4.0


def lengths(rollouts: int, mean: float, longest: int, spread: float = 1.0) -> np.ndarray:
    """Return completion lengths that are log-normal and cut at a maximum, like those of reasoning models."""
    unscaled = np.random.default_rng(SEED).lognormal(0.0, spread, rollouts)
    low, high = 0.0, 1e3 * mean
    for _ in range(60):  # bisection: the scale at which the lengths have this mean after the cut
        middle = (low + high) / 2
        if np.minimum(unscaled * middle, longest).mean() < mean:
            low = middle
        else:
            high = middle
    return np.clip(unscaled * low, 1, longest)


def sampling_seconds(model: Model, gpu: Gpu, step: Step, samplers: int, tensor_parallel: int = 1) -> float:
    """Return the seconds until the last completion ends, with rollouts split evenly over the replicas."""
    replicas = max(samplers // tensor_parallel, 1)
    weight_bytes = 2 * model.parameters / tensor_parallel  # per GPU, in bfloat16
    a = weight_bytes / gpu.bandwidth + gpu.overhead
    mean_context = step.prompt + step.lengths.mean() / 2
    # A token costs 2 FLOPs per parameter (the same number as bytes of weights) and reads its KV cache.
    cache_seconds = model.cache * mean_context / tensor_parallel / gpu.bandwidth
    b = weight_bytes / (gpu.flops * gpu.sampling_share) + cache_seconds
    cache_bytes = model.cache * (step.prompt + step.lengths.mean()) / tensor_parallel  # per completion
    capacity = max(int((0.9 * gpu.memory - weight_bytes) / cache_bytes), 1)
    slowest = 0.0
    for i in range(min(replicas, len(step.lengths))):
        slowest = max(slowest, _decode(step.lengths[i::replicas], a, b, capacity))
    return slowest


def _decode(tokens: np.ndarray, a: float, b: float, capacity: int) -> float:
    """Return the seconds of a replica that decodes up to `capacity` completions at a time."""
    work = float(tokens.sum()) * b
    if len(tokens) <= capacity:
        return float(tokens.max()) * a + work
    # A waiting completion starts as soon as another one ends, so the batch is full for sum / capacity steps.
    return max(float(tokens.sum()) / capacity, float(tokens.max())) * a + work


def training_seconds(model: Model, gpu: Gpu, step: Step, trainers: int) -> float:
    """Return the seconds of all forward and backward passes, with tokens split evenly over the trainers."""
    tokens = float(step.lengths.sum()) + step.prompt * len(step.lengths)
    return step.passes * 2 * model.parameters * tokens / (gpu.flops * gpu.training_share * trainers)


def sync_seconds(model: Model, gpu: Gpu) -> float:
    """Return the seconds to send new weights to all samplers, pipelined: each receives them once."""
    return 2 * model.parameters / gpu.network


def schedules(
    model: Model, gpu: Gpu, step: Step, gpus: int, samplers: int, *, tp: int = 1
) -> dict[str, dict[str, float]]:
    """Return the seconds per step and the idle share of GPU time for each schedule."""
    sample_all, train_all = (
        sampling_seconds(model, gpu, step, gpus, tp),
        training_seconds(model, gpu, step, gpus),
    )
    sample = sampling_seconds(model, gpu, step, samplers, tp)
    train = training_seconds(model, gpu, step, gpus - samplers)
    sync = sync_seconds(model, gpu)
    busy = train_all * gpus + useful_sampling(model, gpu, step)
    step_seconds = {
        "colocated": sample_all + train_all,
        "split": sample + sync + train,
        "one step off": max(sample, train) + sync,
    }
    result = {}
    for name, seconds in step_seconds.items():
        idle = max(0.0, 1 - busy / (gpus * seconds))
        result[name] = {"seconds": round(seconds, 1), "idle": round(idle, 2)}
    return result


def useful_sampling(model: Model, gpu: Gpu, step: Step) -> float:
    """Return the GPU seconds of sampling if every batch were full; more is waiting for long completions."""
    mean_context = step.prompt + step.lengths.mean() / 2
    b = 2 * model.parameters / (gpu.flops * gpu.sampling_share) + model.cache * mean_context / gpu.bandwidth
    return float(step.lengths.sum()) * b


def best_split(model: Model, gpu: Gpu, step: Step, gpus: int, tp: int = 1) -> int:
    """Return the number of samplers for which one step off is fastest."""
    choices = range(tp, gpus, max(tp, gpus // 32))
    return min(choices, key=lambda k: schedules(model, gpu, step, gpus, k, tp=tp)["one step off"]["seconds"])


# From verl's documentation, docs/advance/one_step_off.md (2025-07) and fully_async.md (2025-10): DAPO with
# Qwen2.5-Math-7B on H20 GPUs. The model is given two numbers of the colocated run, the seconds of sampling
# and of training. It then predicts the other schedule, or another number of GPUs.
PUBLISHED = [
    {"name": "one step off, FSDP2, 4 + 12 GPUs", "gpus": 16, "to": (4, 12), "sampling": 247,
     "training": 88 + 286, "longest": 20_480, "published": 520},
    {"name": "one step off, Megatron, 4 + 12 GPUs", "gpus": 16, "to": (4, 12), "sampling": 162,
     "training": 119 + 344, "longest": 8_192, "published": 566},
    {"name": "colocated, FSDP2, 32 to 64 GPUs", "gpus": 32, "to": (64, 64), "sampling": 357,
     "training": 108 + 314, "longest": 28_672, "published": 365},
    {"name": "colocated, FSDP2, 32 to 128 GPUs", "gpus": 32, "to": (128, 128), "sampling": 357,
     "training": 108 + 314, "longest": 28_672, "published": 356},
]  # fmt: skip
ROLLOUTS = 512 * 16


def fitted(seconds: float, gpus: int, longest: int) -> Step:
    """Return the workload whose mean length reproduces the published sampling time."""
    low, high = 1.0, float(longest)
    for _ in range(40):  # bisection
        middle = (low + high) / 2
        step = Step(lengths(ROLLOUTS, middle, longest))
        if sampling_seconds(QWEN_7B, H20, step, gpus) < seconds:
            low = middle
        else:
            high = middle
    return Step(lengths(ROLLOUTS, low, longest))


def check(figure: dict) -> dict:
    """Return a published figure next to the model's prediction."""
    step = fitted(figure["sampling"], figure["gpus"], figure["longest"])
    samplers, trainers = figure["to"]
    sample = sampling_seconds(QWEN_7B, H20, step, samplers)
    train = figure["training"] * figure["gpus"] / trainers
    colocated = samplers == trainers
    seconds = sample + train if colocated else max(sample, train) + sync_seconds(QWEN_7B, H20)
    return {
        "name": figure["name"],
        "mean_length_fitted": round(float(step.lengths.mean())),
        "published_s": figure["published"],
        "simulated_s": round(seconds),
        "off": round(seconds / figure["published"] - 1, 2),
    }


def scaling() -> list[dict]:
    """Return the table of docs/scaling.md: 8, 64 and 512 H100s, each with a suitable model and batch."""
    cases = [
        (8, MODELS[1.5], 1, 128 * 8, 1_000, 4_096),
        (64, MODELS[7], 1, 256 * 16, 4_000, 16_384),
        (512, MODELS[32], 4, 1024 * 16, 8_000, 32_768),
    ]
    rows = []
    for gpus, model, tp, rollouts, mean, longest in cases:
        step = Step(lengths(rollouts, mean, longest))
        samplers = best_split(model, H100, step, gpus, tp)
        rows.append(
            {
                "gpus": gpus,
                "parameters": model.parameters,
                "tensor_parallel": tp,
                "rollouts": rollouts,
                "mean": mean,
                "longest": longest,
                "samplers": samplers,
                "weights_gb": round(2 * model.parameters / 1e9, 1),
                **schedules(model, H100, step, gpus, samplers, tp=tp),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--gpus", type=int, help="number of H100 GPUs (default: the published figures and docs/scaling.md)")
    add("--samplers", type=int, help="number of GPUs that sample (default: fastest for one step off)")
    add("--params", type=float, choices=list(MODELS), default=7, help="billions of parameters (default: 7)")
    add("--rollouts", type=int, default=4096, help="rollouts per step (default: 4096)")
    add("--mean", type=float, default=4000, help="mean tokens per completion (default: 4000)")
    add("--longest", type=int, default=16_384, help="maximum tokens per completion (default: 16384)")
    add("--tensor-parallel", type=int, default=1, help="GPUs per replica that samples (default: 1)")
    add("--sampling-share", type=float, help="measured share of the GPU's FLOPS that sampling reaches")
    add("--training-share", type=float, help="measured share of the GPU's FLOPS that training reaches")
    options = parser.parse_args()
    if options.gpus is None:
        result = {"published": [check(figure) for figure in PUBLISHED], "scaling": scaling()}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))
        return
    shares = {key: getattr(options, key) for key in ("sampling_share", "training_share")}
    gpu = replace(H100, **{key: value for key, value in shares.items() if value})
    step = Step(lengths(options.rollouts, options.mean, options.longest))
    model, tp = MODELS[options.params], options.tensor_parallel
    samplers = options.samplers or best_split(model, gpu, step, options.gpus, tp)
    if not 0 < samplers < options.gpus:
        parser.error(f"--samplers must be between 1 and {options.gpus - 1}, got {samplers}")
    result = schedules(model, gpu, step, options.gpus, samplers, tp=tp)
    print(json.dumps({"samplers": samplers} | result, indent=1))


if __name__ == "__main__":
    main()
