"""Evaluation of a model by its name on an environment by its name (`rlkit eval`, `rlkit.evaluate`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rlkit.arguments.bounds import check_evaluation
from rlkit.environment import Environment
from rlkit.errors import UserError
from rlkit.evaluation.evaluate import evaluate
from rlkit.evaluation.result import Evaluation
from rlkit.evaluation.splits import load_tasks, read_fold
from rlkit.logs import logging_as_command
from rlkit.registry import load_environment
from rlkit.rollouts.loop import RolloutLimits
from rlkit.rollouts.sampler import open_sampler
from rlkit.rollouts.tokenize import eos_token_ids
from rlkit.scoring import RewardRunner, load_rewards

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from rlkit.rollouts.local.engine import TransformersEngine


@logging_as_command()
def evaluate_model(
    model: str | Path,
    environment: str | Environment,
    *,
    environment_args: Mapping[str, Any] | None = None,
    evaluation_split: str = "test",
    evaluation_tasks: int | None = None,
    evaluation_batch_size: int = 64,
    fold: str | None = None,
    seed: int = 0,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_completion_length: int = 512,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    name: str = "evaluation",
) -> Evaluation:
    """Sample a model's answers to held-out tasks, score them, and return accuracy, rewards and all answers.

    Args:
        model: Hub name, folder such as `runs/smollm2/model`, or `bundled:smollm2-135m`.
        environment: Environment, or its id, `package.module:Class` or `path/file.py:Class`.
        environment_args: Arguments of an environment that is given by name.
        evaluation_split: `train`, `dev` or `test`.
        evaluation_tasks: Number of tasks; defaults to the environment's own number.
        evaluation_batch_size: Number of completions that are generated at a time.
        fold: `FILE:NAME`, a fold in a file of `scripts/split_tasks.py`; only its tasks are evaluated.
        seed: Seed of the tasks and of sampling.
        samples: Number of answers per task, for pass@k and avg@k.
        temperature: Sampling temperature; 0 is greedy decoding.
        top_p: Cumulative probability for nucleus sampling; 1 keeps all tokens.
        max_completion_length: Maximum number of tokens of an answer, over all turns.
        dtype: `auto`, `bfloat16`, `float16` or `float32`.
        trust_remote_code: Whether to run code that comes with the model.
        name: Name of the result.

    Raises:
        UserError: If the model or environment does not exist, or a value is invalid.
    """
    check_evaluation(
        {
            "evaluation_tasks": evaluation_tasks,
            "evaluation_batch_size": evaluation_batch_size,
            "seed": seed,
            "samples": samples,
            "temperature": temperature,
            "top_p": top_p,
            "max_completion_length": max_completion_length,
            "dtype": dtype,
            "evaluation_split": evaluation_split,
        }
    )
    if isinstance(environment, str):
        environment = load_environment(environment, **(environment_args or {}))
    elif environment_args:
        raise UserError("environment_args requires an environment name; pass them to the environment itself")
    task_ids = None if fold is None else read_fold(fold, environment)
    rewards, _ = load_rewards(None, environment, None)
    # Invalid tasks, and a search server that is down, must show before the model is loaded.
    load_tasks(environment, evaluation_split, 1, seed)
    engine, tokenizer, eos_ids = _load(str(model), seed, evaluation_batch_size, dtype, trust_remote_code)
    limits = RolloutLimits(max_completion_length, max_turns=environment.max_turns)
    sampler = open_sampler(environment, tokenizer, eos_ids, limits, temperature=temperature, top_p=top_p)
    with RewardRunner(rewards, metric=environment.metric) as runner:
        return evaluate(
            partial(sampler, engine),
            environment,
            runner,
            split=evaluation_split,
            n=evaluation_tasks,
            seed=seed,
            fold=task_ids,
            samples=samples,
            name=name,
            model=str(model),
            environment_args=dict(environment_args or {}),
            temperature=temperature,
            max_length=max_completion_length,
        )


def _load(
    model_name: str, seed: int, batch_size: int, dtype: str, trust_remote_code: bool
) -> tuple[TransformersEngine, PreTrainedTokenizerBase, Sequence[int]]:
    """Load a model; return the engine that samples from it, its tokenizer and its EOS token ids."""
    import torch
    from transformers import set_seed
    from trl import ModelConfig

    from rlkit.models.cpu import tune_for_cpu, warn_if_bfloat16_is_slow
    from rlkit.models.load import load_model
    from rlkit.rollouts.local.engine import TransformersEngine

    set_seed(seed)
    config = ModelConfig(model_name_or_path=model_name, dtype=dtype)
    model, tokenizer = load_model(config, trust_remote_code=trust_remote_code)
    if torch.cuda.is_available():
        model.to("cuda")
    else:
        tune_for_cpu()
        if model.dtype == torch.bfloat16:
            warn_if_bfloat16_is_slow("--dtype float32")
    model.eval()
    eos_ids = eos_token_ids(model.generation_config.eos_token_id, tokenizer)
    return TransformersEngine(model, tokenizer, batch_size=batch_size), tokenizer, eos_ids
