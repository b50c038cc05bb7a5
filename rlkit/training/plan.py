"""`rlkit train … --dry_run`: what a run would do, and whether it fits, before it is launched.

The config is resolved, a few tasks are loaded, the rewards judge the environment's own answers to them, and
the memory of a device is estimated from the model's shape. No weight is loaded and nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoTokenizer

from rlkit.arguments.parse import TrainConfig
from rlkit.environment import Environment
from rlkit.errors import UserError, first_line
from rlkit.evaluation.splits import load_tasks, read_fold
from rlkit.models.load import resolve
from rlkit.models.memory import Memory, Shape, Sharding, estimate
from rlkit.registry import load_yaml
from rlkit.reward import Reward
from rlkit.rollouts import Rollout
from rlkit.rollouts.tokenize import tokenize
from rlkit.runs.launch import config_file
from rlkit.scoring import RewardRunner, check_columns
from rlkit.training.session import load_run_rewards, make_environment

if TYPE_CHECKING:
    from datasets import Dataset

TASKS = 32  # whose prompts are counted
JUDGED = 8  # answers that the rewards judge
GIB = 2**30


@dataclass(frozen=True)
class Devices:
    """Where a run would go: processes in all, and how they share the model out."""

    count: int
    sharding: Sharding


def plan(run: TrainConfig, options: Mapping[str, str], memory: float | None = None) -> bool:
    """Print the plan of a run of `rlkit train`, and return whether it fits.

    Args:
        options: `--accelerate` and `--num_processes`, where given.
        memory: GiB of a device; None: those of this machine.

    Raises:
        UserError: what the run would raise.
    """
    environment = make_environment(run.args)
    rewards, run.trainer_args.reward_weights = load_run_rewards(run, environment)
    fold = None if run.args.fold is None else read_fold(run.args.fold, environment)
    tasks = load_tasks(environment, "train", run.args.num_tasks, run.trainer_args.seed, fold)
    check_columns(rewards, tasks.column_names)
    name = resolve(run.model_args.model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=run.trainer_args.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=run.trainer_args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {name!r}: {first_line(error)}") from error
    asked = devices(options)
    some = tasks.select(range(min(TASKS, len(tasks))))
    lengths = [len(ids) for ids in tokenize(tokenizer, some["prompt"])]
    shape = shape_of(run, lengths)
    on_cpu = run.trainer_args.device.type == "cpu" and memory is None
    needed = estimate(run, config, shape, asked.sharding, on_cpu=on_cpu)
    there = memory * GIB if memory is not None else of_this_machine(asked.count)
    processes = "1 process" if asked.count == 1 else f"{asked.count} processes"
    print(f"run         {run.trainer_args.output_dir}, {run.args.algorithm}, {processes}")
    print(
        f"tasks       {len(tasks):,} of {environment.id}; prompts of {min(lengths)} to {max(lengths)} tokens"
    )
    print(f"rewards     {judged(run, environment, rewards, some)}")
    print(f"step        {step_of(run, asked.count, lengths)}")
    print(f"memory      {said(needed)}")
    fits = needed.peak <= there
    verdict = "it fits" if fits else "IT DOES NOT FIT"
    print(f"            {needed.peak / GIB:.1f} of {there / GIB:.1f} GiB a device: {verdict}")
    return fits


def devices(options: Mapping[str, str]) -> Devices:
    """How many processes an accelerate config starts, and what each holds."""
    if "--accelerate" not in options:
        return Devices(1, Sharding())
    text = load_yaml(config_file(options["--accelerate"]))
    count = int(options.get("--num_processes") or text.get("num_processes", 1))
    kind = text.get("distributed_type")
    stage = int(text.get("deepspeed_config", {}).get("zero_stage", 0)) if kind == "DEEPSPEED" else 0
    stage = 3 if kind == "FSDP" else stage
    weights, gradients, optimizer = (count if stage >= least else 1 for least in (3, 2, 1))
    return Devices(count, Sharding(weights, gradients, optimizer, deepspeed=kind == "DEEPSPEED"))


def shape_of(run: TrainConfig, lengths: Sequence[int]) -> Shape:
    """A micro-batch at its largest: the longest prompt, answers of full length."""
    trainer_args = run.trainer_args
    rows = trainer_args.per_device_train_batch_size
    shared = run.args.shared_prefix
    prompts = max(rows // trainer_args.num_generations, 1) if shared else rows
    sampled = rows * trainer_args.steps_per_generation
    return Shape(rows, prompts, max(lengths), trainer_args.max_completion_length, sampled)


def step_of(run: TrainConfig, processes: int, lengths: Sequence[int]) -> str:
    """How much one optimizer step is made of."""
    trainer_args = run.trainer_args
    rollouts = trainer_args.per_device_train_batch_size * trainer_args.gradient_accumulation_steps * processes
    prompts = rollouts / trainer_args.num_generations
    most = rollouts * (sum(lengths) / len(lengths) + trainer_args.max_completion_length)
    steps = trainer_args.max_steps
    return f"{rollouts} rollouts of {prompts:g} prompts, at most {most:,.0f} tokens; {steps} steps"


def judged(run: TrainConfig, environment: Environment, rewards: Mapping[str, Reward], tasks: Dataset) -> str:
    """What each reward gives for the environment's own answers."""
    if environment.max_turns > 1:
        return f"{', '.join(rewards)} (several turns: rlkit check plays them)"
    rows = []
    for task in tasks.select(range(min(JUDGED, len(tasks)))):
        text = environment.answer(task)
        if text is None:
            return f"{', '.join(rewards)} (the environment writes no answers to judge)"
        columns = Rollout.single(text, [0], False).columns()
        row = task | columns | {"max_length": run.trainer_args.max_completion_length}
        rows += [row, row]  # a group of two
    limit, workers = run.args.reward_time_limit, run.args.reward_workers
    with RewardRunner(rewards, limit, workers, metric=environment.metric) as runner:
        scores = runner(rows, 2)
    if failed := [reason for reason in scores.invalid if reason is not None]:
        raise UserError(f"rewards fail on the environment's own answers: {failed[0]}")
    means = torch.tensor(scores.values, dtype=torch.float64).nanmean(0).tolist()
    said = ", ".join(f"{name} {mean:.3g}" for name, mean in zip(runner.names, means, strict=True))
    return f"{said} (means on {len(rows) // 2} of the environment's own answers)"


def said(needed: Memory) -> str:
    """The parts of an estimate, in GiB."""
    parts = {name.replace("_", " "): size for name, size in vars(needed).items() if size}
    return ", ".join(f"{name} {size / GIB:.2g}" for name, size in parts.items()) + " GiB"


def of_this_machine(processes: int) -> float:
    """Bytes of a GPU here, or of the memory that each of the processes has on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
