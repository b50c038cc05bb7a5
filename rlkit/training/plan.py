"""`rlkit train … --dry_run`: show what a run would do and whether it fits in memory, without launching it.

The plan resolves the config, loads a few tasks, runs the rewards on the environment's reference answers to
them, and estimates the memory of a device from the model's config. It loads no weights and writes no files.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoTokenizer

from rlkit.arguments.parse import TrainConfig
from rlkit.environment import Environment
from rlkit.errors import UserError
from rlkit.evaluation.splits import read_fold
from rlkit.models.load import loading, without_weights
from rlkit.models.memory import BatchShape, MemoryEstimate, Sharding, estimate_memory
from rlkit.models.names import resolve
from rlkit.registry import load_yaml
from rlkit.reward import Reward
from rlkit.rollouts import Rollout
from rlkit.rollouts.loop import Loop, RolloutLimits
from rlkit.rollouts.tokenize import tokenize
from rlkit.runs.directory import RunDirectory
from rlkit.runs.launch import config_file
from rlkit.scoring import check_columns
from rlkit.scoring.reward_model import RewardModel
from rlkit.training.disk import GIB, check_room, count_steps, estimate_disk, format_disk, free_bytes
from rlkit.training.session import load_run_rewards, load_training_tasks, make_environment, make_runner
from rlkit.training.start_checks import check_saving

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

MAX_TASKS = 32  # tasks whose prompts are tokenized to find their lengths
MAX_REFERENCE_ANSWERS = 8  # reference answers that the rewards are run on


@dataclass(frozen=True)
class DeviceLayout:
    """Number of processes of a run, one per device, and how they shard the model."""

    num_processes: int
    sharding: Sharding


def plan(run: TrainConfig, options: Mapping[str, str], memory_gib: float | None = None) -> bool:
    """Print the plan of a run of `rlkit train`, and return whether the run fits in memory.

    Args:
        run: Arguments of the run.
        options: Launch options `--accelerate` and `--num_processes`, if given.
        memory_gib: Memory of a device in GiB, or None for that of this machine's devices.

    Raises:
        UserError: Anything that the run itself would raise before training.
    """
    environment = make_environment(run.args)
    rewards, run.trainer_args.reward_weights = load_run_rewards(run, environment)
    fold = None if run.args.fold is None else read_fold(run.args.fold, environment)
    tasks = load_training_tasks(run, environment, fold)
    check_columns(rewards, tasks.column_names)
    name = resolve(run.model_args.model_name_or_path)
    with loading(repr(name)):
        config = AutoConfig.from_pretrained(name, trust_remote_code=run.trainer_args.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=run.trainer_args.trust_remote_code)
    # The replies and tool calls of the chat template, which training checks after it has loaded the model.
    limits = RolloutLimits(1, max_turns=environment.max_turns)
    template: Mapping[str, Any] = run.trainer_args.chat_template_kwargs or {}  # type: ignore[assignment]
    Loop(environment, tokenizer, limits, [tokenizer.eos_token_id], template)
    layout = read_device_layout(options)
    sample = tasks.select(range(min(MAX_TASKS, len(tasks))))
    prompt_lengths = [len(ids) for ids in tokenize(tokenizer, sample["prompt"])]
    shape = largest_micro_batch(run, prompt_lengths)
    on_cpu = run.trainer_args.device.type == "cpu" and memory_gib is None
    estimate = estimate_memory(
        run,
        config,
        shape,
        layout.sharding,
        on_cpu=on_cpu,
        reward_model_bytes=reward_model_bytes(rewards, on_cpu=on_cpu),
    )
    available_bytes = device_memory_bytes(layout.num_processes)
    if memory_gib is not None:
        available_bytes = memory_gib * GIB
    fits = estimate.peak_bytes <= available_bytes

    processes = "1 process" if layout.num_processes == 1 else f"{layout.num_processes} processes"
    shortest, longest = min(prompt_lengths), max(prompt_lengths)
    peak_gib, available_gib = estimate.peak_bytes / GIB, available_bytes / GIB
    verdict = "it fits" if fits else "IT DOES NOT FIT"
    print(f"run         {run.trainer_args.output_dir}, {run.args.algorithm}, {processes}")
    print(f"tasks       {len(tasks):,} of {environment.id}; prompts of {shortest} to {longest} tokens")
    print(f"rewards     {score_reference_answers(run, environment, rewards, sample)}")
    print(f"step        {describe_step(run, layout.num_processes, prompt_lengths)}")
    print(f"memory      {format_memory(estimate)}")
    print(f"            peak {peak_gib:.1f} of {available_gib:.1f} GiB per device: {verdict}")
    has_room = print_disk(run, config, tokenizer, len(tasks), layout)
    return fits and has_room


def print_disk(
    run: TrainConfig,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    num_tasks: int,
    layout: DeviceLayout,
) -> bool:
    """Print the disk space that a run needs and that is free, and return whether the run can end with it.

    Args:
        run: Arguments of the run.
        config: Config of the model, from transformers.
        tokenizer: Tokenizer of the model.
        num_tasks: Number of training tasks.
        layout: Processes of the run.

    Raises:
        UserError: The config, the tokenizer or the adapter cannot be saved.
    """
    trainer_args, model_args = run.trainer_args, run.model_args
    shape = copy.deepcopy(config)
    if model_args.dtype not in (None, "auto"):
        shape.dtype = getattr(torch, str(model_args.dtype))
    model = without_weights(shape, model_args, trust_remote_code=trainer_args.trust_remote_code)
    size = check_saving(model, tokenizer, trainer_args, trust_remote_code=trainer_args.trust_remote_code)
    estimate = estimate_disk(
        model,
        trainer_args,
        count_steps(trainer_args, num_tasks, layout.num_processes),
        deepspeed=layout.sharding.deepspeed,
        processing_bytes=size,
    )
    folder = Path(str(trainer_args.output_dir))
    print(f"disk        {format_disk(estimate)}")
    try:
        RunDirectory(folder, "train").check_writable()
        room = check_room(estimate, folder, resume=run.args.resume, overwrite=run.args.overwrite)
    except UserError as error:
        print(f"            {error}")
        return False
    free_gib = free_bytes(folder, overwrite=run.args.overwrite) / GIB
    verdict = f"at most {estimate.peak_bytes / GIB:.2g} of {free_gib:.1f} GiB free: it fits"
    print(f"            {room or verdict}")
    return True


def read_device_layout(options: Mapping[str, str]) -> DeviceLayout:
    """Return the number of processes that an accelerate config starts, and how it shards the model."""
    if "--accelerate" not in options:
        return DeviceLayout(1, Sharding())
    config = load_yaml(config_file(options["--accelerate"]))
    num_processes = int(options.get("--num_processes") or config.get("num_processes", 1))
    backend = config.get("distributed_type")
    # FSDP shards what ZeRO-3 shards. Stage 1 shards the optimizer state, 2 the gradients, too, 3 all.
    stage = 3 if backend == "FSDP" else 0
    if backend == "DEEPSPEED":
        stage = int(config.get("deepspeed_config", {}).get("zero_stage", 0))
    sharding = Sharding(
        weights=num_processes if stage >= 3 else 1,
        gradients=num_processes if stage >= 2 else 1,
        optimizer=num_processes if stage >= 1 else 1,
        deepspeed=backend == "DEEPSPEED",
    )
    return DeviceLayout(num_processes, sharding)


def largest_micro_batch(run: TrainConfig, prompt_lengths: Sequence[int]) -> BatchShape:
    """Return the largest possible micro-batch: the longest prompt, and completions of maximum length."""
    trainer_args = run.trainer_args
    num_completions = trainer_args.per_device_train_batch_size
    num_prompts = num_completions
    if run.args.shared_prefix:
        num_prompts = max(num_completions // trainer_args.num_generations, 1)
    return BatchShape(
        num_completions=num_completions,
        num_prompts=num_prompts,
        prompt_tokens=max(prompt_lengths),
        completion_tokens=trainer_args.max_completion_length,
        num_sampled=num_completions * trainer_args.steps_per_generation,
    )


def reward_model_bytes(rewards: Mapping[str, Reward], *, on_cpu: bool) -> int:
    """Return the bytes of the weights of reward models on the device of a trainer on a CPU or on a GPU."""
    reward_models = [reward for reward in rewards.values() if isinstance(reward, RewardModel)]
    return sum(
        reward_model.weight_bytes()
        for reward_model in reward_models
        if reward_model.device in (None, "cpu" if on_cpu else "cuda")
    )


def describe_step(run: TrainConfig, num_processes: int, prompt_lengths: Sequence[int]) -> str:
    """Return a line with the number of rollouts, prompts and tokens of an optimizer step."""
    trainer_args = run.trainer_args
    rollouts_per_process = trainer_args.per_device_train_batch_size * trainer_args.gradient_accumulation_steps
    num_rollouts = rollouts_per_process * num_processes
    num_prompts = num_rollouts / trainer_args.num_generations
    mean_prompt_length = sum(prompt_lengths) / len(prompt_lengths)
    max_tokens = num_rollouts * (mean_prompt_length + trainer_args.max_completion_length)
    duration = f"{trainer_args.max_steps} steps"
    if trainer_args.max_steps < 0:  # TRL's default: the length is given in epochs
        duration = f"{trainer_args.num_train_epochs:g} epochs"
    return f"{num_rollouts} rollouts of {num_prompts:g} prompts, at most {max_tokens:,.0f} tokens; {duration}"


def score_reference_answers(
    run: TrainConfig, environment: Environment, rewards: Mapping[str, Reward], tasks: Dataset
) -> str:
    """Return a line with the mean of each reward on the environment's reference answers.

    Raises:
        UserError: A reward fails on a reference answer.
    """
    if environment.max_turns > 1:
        return f"{', '.join(rewards)} (not run: several turns; use rlkit check)"
    # A plan loads no weights.
    not_run = [name for name, reward in rewards.items() if isinstance(reward, RewardModel)]
    rows = []
    for task in tasks.select(range(min(MAX_REFERENCE_ANSWERS, len(tasks)))):
        text = environment.answer(task)
        if text is None:
            return f"{', '.join(rewards)} (not run: the environment has no reference answers)"
        columns = Rollout.single(text, [0], False).columns()
        row = task | columns | {"max_length": run.trainer_args.max_completion_length}
        rows += [row, row]  # twice, because some rewards compare the rollouts of a group
    with make_runner(run.args, rewards, environment, excluded=not_run) as runner:
        scores = runner(rows, 2)
    if errors := [reason for reason in scores.invalid if reason is not None]:
        raise UserError(f"rewards fail on the environment's reference answers: {errors[0]}")
    means = torch.tensor(scores.values, dtype=torch.float64).nanmean(0).tolist()
    by_name = ", ".join(f"{name} {mean:.3g}" for name, mean in zip(runner.names, means, strict=True))
    line = f"{by_name} (means on {len(rows) // 2} of the environment's own answers)"
    return f"{line}; {', '.join(not_run)} not run" if not_run else line


def format_memory(estimate: MemoryEstimate) -> str:
    """Return the parts of an estimate that are not 0, in GiB."""
    parts = {name.replace("_", " "): size for name, size in vars(estimate).items() if size}
    return ", ".join(f"{name} {size / GIB:.2g}" for name, size in parts.items()) + " GiB"


def device_memory_bytes(num_processes: int) -> float:
    """Return the memory of a GPU or, on a machine without GPUs, the share of RAM of each process."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / num_processes
