"""Training data of `rlkit sft`: an environment's answers, solutions and scripts, or a model's best samples.

For a single turn, a demonstration is a prompt and a completion. For several turns, and for the best samples
of an evaluation (rejection sampling), the assistant's turns are given and the environment replies to them as
in a rollout. The loss is on the assistant's tokens only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rlkit.environment import Environment, hashed_choice
from rlkit.errors import UserError
from rlkit.evaluation.result import Evaluation
from rlkit.rollouts.chat_template import ChatTemplate
from rlkit.rollouts.loop import RolloutLimits
from rlkit.rollouts.sampler import open_sampler
from rlkit.rollouts.scripted import ScriptedEngine

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

REPLY_TIMEOUT_SECONDS = 3600.0  # generous: a turn of all demonstrations is one batch for the environment


def demonstrations(environment: Environment, tasks: datasets.Dataset, kind: str) -> datasets.Dataset:
    """Return a dataset with the columns `prompt` and `completion`, in the format of TRL's SFTTrainer.

    Args:
        environment: Environment that the tasks are from.
        tasks: Tasks to demonstrate.
        kind: Kind of demonstration: "answer" for the bare answer, "solution" for a worked solution,
            "mixed" for the answer to about half of the tasks and a worked solution to the others, or
            "example" for an example that need not be the best answer.

    Raises:
        UserError: The environment has no demonstration of this kind for a task, or `kind` is "mixed" and the
            environment has several turns.
    """
    if kind == "mixed" and environment.max_turns > 1:
        raise UserError(
            f"demonstrations: mixed is for environments with one turn, but {environment.id} has up to "
            f"{environment.max_turns}; use demonstrations: solution"
        )

    def demonstrate(task: dict[str, Any]) -> dict[str, Any]:
        is_bare = kind == "answer"
        if kind == "mixed":
            is_bare = hashed_choice(f"demonstration {task['task_id']}", 2) == 1
        if kind == "example":
            name, text = "example", environment.example(task)
        elif is_bare:
            name, text = "answer", environment.answer(task)
        else:
            name, text = "worked solution", environment.solution(task)
        if text is None:
            raise UserError(f"{environment.id} has no {name} for task {task['task_id']}")
        if isinstance(task["prompt"], str):
            return {"prompt": task["prompt"], "completion": text}
        return {"prompt": task["prompt"], "completion": [{"role": "assistant", "content": text}]}

    return tasks.map(demonstrate, remove_columns=tasks.column_names, load_from_cache_file=False)


Script = Callable[[dict[str, Any]], Sequence[str] | None]  # a task's assistant turns, None if it has none


def rejection_samples(path: str, environment: Environment) -> Script:
    """Return a function from a task to the turns of the best sample of it in an evaluation.

    Alternating such evaluations and fine-tuning is rejection sampling (RAFT). Truncated and invalid samples
    are ignored. A task has no best sample if none scores above 0 on the environment's metric, or if several
    samples all score the same, since none is then better than the model's average.

    Args:
        path: Path of the evaluation, which should have several samples per task.
        environment: Environment of the tasks.

    Raises:
        UserError: The evaluation does not exist, or is of another environment.
    """
    evaluation = Evaluation.load(path)
    if evaluation.environment != environment.id:
        raise UserError(f"{path} evaluates {evaluation.environment}, not {environment.id}")
    samples: dict[str, list[tuple[float, list[str]]]] = {}  # (score, assistant turns) by task id
    for record in evaluation.completions:
        if record["score"] is not None and not record["truncated"]:
            turns = [turn["content"] for turn in record["turns"] if turn["role"] == "assistant"]
            samples.setdefault(record["task_id"], []).append((record["score"], turns))
    best_turns = {}
    for task_id, scored_turns in samples.items():
        best_score, turns = max(scored_turns, key=lambda pair: pair[0])
        worst_score = min(score for score, _ in scored_turns)
        if best_score > 0 and (len(scored_turns) == 1 or best_score > worst_score):
            best_turns[task_id] = turns
    return lambda task: best_turns.get(task["task_id"])


def _rewrite_calls(environment: Environment, template: ChatTemplate, turns: Sequence[str]) -> list[str]:
    """Return scripted turns in which function calls have the form of the model's chat template."""
    calls_by_turn = [environment.read_tool_calls(turn) for turn in turns]
    return [
        template.write_calls(calls) if calls else turn
        for turn, calls in zip(turns, calls_by_turn, strict=True)
    ]


def scripted_demonstrations(
    environment: Environment,
    tasks: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Sequence[int],
    *,
    max_completion_length: int,
    max_length: int | None = None,
    script: Script | None = None,
) -> datasets.Dataset:
    """Roll out tasks with scripted assistant turns, and return the rollouts as training data.

    Tasks without a script are omitted, and so are rollouts that exceed a limit or that the environment ends
    before the script does.

    Args:
        environment: Environment that replies to the turns.
        tasks: Tasks to demonstrate.
        tokenizer: Tokenizer of the model to train.
        eos_token_ids: Ids of the tokens that end a turn.
        max_completion_length: Maximum number of tokens after the prompt.
        max_length: Maximum number of tokens including the prompt, or None for no limit.
        script: Function that returns the turns of a task, or None for `environment.script`.

    Returns:
        Dataset with the columns `input_ids` and `labels`, which are -100 for tokens outside the loss: the
        prompt and the environment's replies.

    Raises:
        UserError: No demonstration is left, or the environment failed.
    """
    import datasets

    write = environment.script if script is None else script
    scripted = [(task, turns) for task in tasks if (turns := write(task)) is not None]
    limits = RolloutLimits(
        max_completion_length, max_turns=environment.max_turns, reply_timeout=REPLY_TIMEOUT_SECONDS
    )
    sampler = open_sampler(environment, tokenizer, eos_token_ids, limits)
    template = sampler.loop.replies.template
    if script is None and template is not None:
        # The environment does not know the model, and writes its calls in one form for all.
        scripted = [(task, _rewrite_calls(environment, template, turns)) for task, turns in scripted]
    engine = ScriptedEngine(tokenizer, [turns for _, turns in scripted], sampler.loop.replies.eos_token_id)
    rollouts = [rollout for (rollout,) in sampler(engine, [task for task, _ in scripted], 1)]
    if failures := [rollout.invalid for rollout in rollouts if rollout.invalid is not None]:
        raise UserError(f"{environment.id}: {len(failures)} demonstrations failed; the first: {failures[0]}")
    rows = []
    for rollout, (_, turns) in zip(rollouts, scripted, strict=True):
        num_turns = sum(turn["role"] == "assistant" for turn in rollout.turns)
        input_ids = rollout.prompt_ids + rollout.ids
        is_complete = not rollout.truncated and num_turns == len(turns)
        if not is_complete or (max_length is not None and len(input_ids) > max_length):
            continue
        prompt_labels = [-100] * len(rollout.prompt_ids)
        labels = [
            token if sampled else -100 for token, sampled in zip(rollout.ids, rollout.mask, strict=True)
        ]
        rows.append({"input_ids": input_ids, "labels": prompt_labels + labels})
    if not rows:
        raise UserError(
            f"{environment.id}: none of {len(tasks)} tasks has a complete demonstration of at most "
            f"{max_completion_length} tokens; increase max_completion_length or max_length ({max_length})"
        )
    if len(rows) < len(tasks):
        logger.warning("only %d of %d tasks have a demonstration within the limits", len(rows), len(tasks))
    return datasets.Dataset.from_list(rows)
