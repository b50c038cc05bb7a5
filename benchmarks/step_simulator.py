"""How long a step of RL takes on a cluster, and how much of it GPUs are idle: a model of three schedules.

- colocated: all GPUs sample, then all train.
- split: some sample, the others train, in turns, so one side always waits.
- one step off: they do so at the same time, on rollouts of the weights before.

A GPU that samples n completions makes one token of each in `a + b n` seconds: reading the weights, and the
work for each. Completions that are finished leave the batch, so a step ends with the longest alone, which no
further GPU makes faster. Training takes seconds for each token, shared out evenly.

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
    """Published figures of one GPU, and the share of its arithmetic that is reached."""

    flops: float  # bfloat16, without sparsity
    bandwidth: float  # bytes a second
    memory: float  # bytes
    network: float  # bytes a second to other machines
    sampling_share: float = 0.6
    training_share: float = 0.35
    overhead: float = 0.002  # seconds a decoding step, launches and the scheduler


H20 = Gpu(148e12, 4.0e12, 96e9, 50e9)
H100 = Gpu(989e12, 3.35e12, 80e9, 50e9)


@dataclass(frozen=True)
class Model:
    """A dense model in bfloat16: parameters, and bytes of keys and values a token."""

    parameters: float
    cache: float


QWEN_7B = Model(7.6e9, 57_344)
MODELS = {1.5: Model(1.5e9, 28_672), 3: Model(3.1e9, 36_864), 7: QWEN_7B, 32: Model(32.8e9, 262_144)}


@dataclass(frozen=True)
class Step:
    """One step: rollouts with lengths in tokens, a prompt each, and how often training reads them.

    `passes` counts the trainer's work in forwards: 3 for one update, 4 with a forward before it.
    """

    lengths: np.ndarray
    prompt: int = 200
    passes: float = 4.0


def lengths(rollouts: int, mean: float, longest: int, spread: float = 1.0) -> np.ndarray:
    """Lengths of completions: log-normal, cut at the longest, as those of reasoning models are."""
    drawn = np.random.default_rng(SEED).lognormal(0.0, spread, rollouts)
    low, high = 0.0, 1e3 * mean
    for _ in range(60):  # the scale at which what is left after the cut has this mean
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(drawn * middle, longest).mean() < mean else (low, middle)
    return np.clip(drawn * low, 1, longest)


def sampling_seconds(model: Model, gpu: Gpu, step: Step, samplers: int, tensor_parallel: int = 1) -> float:
    """Until the last completion ends, with the rollouts dealt out over the samplers."""
    replicas = max(samplers // tensor_parallel, 1)
    share = 2 * model.parameters / tensor_parallel
    a = share / gpu.bandwidth + gpu.overhead
    context = step.prompt + step.lengths.mean() / 2
    b = share / (gpu.flops * gpu.sampling_share) + model.cache * context / tensor_parallel / gpu.bandwidth
    room = (0.9 * gpu.memory - share) / (model.cache * (step.prompt + step.lengths.mean()) / tensor_parallel)
    slowest = 0.0
    for i in range(min(replicas, len(step.lengths))):
        slowest = max(slowest, _decode(step.lengths[i::replicas], a, b, max(int(room), 1)))
    return slowest


def _decode(tokens: np.ndarray, a: float, b: float, room: int) -> float:
    """Seconds for one replica: at most `room` completions at a time, the next as soon as one ends."""
    work = float(tokens.sum()) * b
    if len(tokens) <= room:
        return float(tokens.max()) * a + work
    # While others wait, room is full: their steps are shared. Then the last of them drain.
    return max(float(tokens.sum()) / room, float(tokens.max())) * a + work


def training_seconds(model: Model, gpu: Gpu, step: Step, trainers: int) -> float:
    """Forward and backward of all tokens; each token once a pass, evenly over the trainers."""
    tokens = float(step.lengths.sum()) + step.prompt * len(step.lengths)
    return step.passes * 2 * model.parameters * tokens / (gpu.flops * gpu.training_share * trainers)


def sync_seconds(model: Model, gpu: Gpu) -> float:
    """New weights to all samplers, pipelined: each receives them once."""
    return 2 * model.parameters / gpu.network


def schedules(
    model: Model, gpu: Gpu, step: Step, gpus: int, samplers: int, *, tp: int = 1
) -> dict[str, dict[str, float]]:
    """Seconds a step and the share of GPU time that is idle, of each schedule."""
    sample, train = sampling_seconds(model, gpu, step, gpus, tp), training_seconds(model, gpu, step, gpus)
    sample_part = sampling_seconds(model, gpu, step, samplers, tp)
    train_part = training_seconds(model, gpu, step, gpus - samplers)
    sync = sync_seconds(model, gpu)
    busy = train * gpus + useful_sampling(model, gpu, step)
    seconds = {
        "colocated": sample + train,
        "split": sample_part + sync + train_part,
        "one step off": max(sample_part, train_part) + sync,
    }
    found = {}
    for name, taken in seconds.items():
        found[name] = {"seconds": round(taken, 1), "idle": round(max(0.0, 1 - busy / (gpus * taken)), 2)}
    return found


def useful_sampling(model: Model, gpu: Gpu, step: Step) -> float:
    """GPU seconds of sampling if every batch were full: what is above that is waiting for the longest."""
    context = step.prompt + step.lengths.mean() / 2
    b = 2 * model.parameters / (gpu.flops * gpu.sampling_share) + model.cache * context / gpu.bandwidth
    return float(step.lengths.sum()) * b


def best_split(model: Model, gpu: Gpu, step: Step, gpus: int, tp: int = 1) -> int:
    """The number of samplers with which one step off is fastest."""
    choices = range(tp, gpus, max(tp, gpus // 32))
    return min(choices, key=lambda k: schedules(model, gpu, step, gpus, k, tp=tp)["one step off"]["seconds"])


# verl's documentation, docs/advance/one_step_off.md (2025-07) and fully_async.md (2025-10): Qwen2.5-Math-7B
# on H20, DAPO. Of the colocated run two numbers are taken, the seconds of sampling and of training; then the
# other schedule, or the other number of GPUs, is foretold.
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
    """Rollouts whose mean length makes sampling take as long as was published."""
    low, high = 1.0, float(longest)
    for _ in range(40):
        middle = (low + high) / 2
        step = Step(lengths(ROLLOUTS, middle, longest))
        low, high = (middle, high) if sampling_seconds(QWEN_7B, H20, step, gpus) < seconds else (low, middle)
    return Step(lengths(ROLLOUTS, low, longest))


def check(one: dict) -> dict:
    """A published figure beside what the model says."""
    step = fitted(one["sampling"], one["gpus"], one["longest"])
    samplers, trainers = one["to"]
    sample = sampling_seconds(QWEN_7B, H20, step, samplers)
    train = one["training"] * one["gpus"] / trainers
    together = samplers == trainers
    seconds = sample + train if together else max(sample, train) + sync_seconds(QWEN_7B, H20)
    return {
        "name": one["name"],
        "mean_length_fitted": round(float(step.lengths.mean())),
        "published_s": one["published"],
        "simulated_s": round(seconds),
        "off": round(seconds / one["published"] - 1, 2),
    }


def scaling() -> list[dict]:
    """docs/scaling.md: 8, 64 and 512 H100, each with a model and a batch that suit it."""
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
    add("--gpus", type=int)
    add("--samplers", type=int, help="default: those with which one step off is fastest")
    add("--params", type=float, choices=list(MODELS), default=7, help="billions")
    add("--rollouts", type=int, default=4096)
    add("--mean", type=float, default=4000, help="tokens of a completion")
    add("--longest", type=int, default=16_384)
    add("--tensor-parallel", type=int, default=1)
    add("--sampling-share", type=float, help="of the GPU's arithmetic that sampling reaches, measured")
    add("--training-share", type=float, help="the same of training")
    options = parser.parse_args()
    if options.gpus is None:
        result = {"published": [check(one) for one in PUBLISHED], "scaling": scaling()}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))
        return
    shares = {key: getattr(options, key) for key in ("sampling_share", "training_share")}
    gpu = replace(H100, **{key: value for key, value in shares.items() if value})
    step = Step(lengths(options.rollouts, options.mean, options.longest))
    model, tp = MODELS[options.params], options.tensor_parallel
    samplers = options.samplers or best_split(model, gpu, step, options.gpus, tp)
    if not 0 < samplers < options.gpus:
        parser.error(f"--samplers must be between 1 and {options.gpus - 1}")
    found = schedules(model, gpu, step, options.gpus, samplers, tp=tp)
    print(json.dumps({"samplers": samplers} | found, indent=1))


if __name__ == "__main__":
    main()
