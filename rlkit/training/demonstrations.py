"""What `rlkit sft` imitates: an environment's answers, solutions and scripts, or a model's best answers.

Tasks become prompt and completion, the loss is on the completion alone. Scripts of an environment of several
turns are played: its replies stand between the turns, outside the loss. So are a model's own best answers of
an evaluation (rejection sampling).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rlkit.environment import Environment
from rlkit.errors import UserError
from rlkit.evaluation.result import Evaluation
from rlkit.rollouts.loop import RolloutLimits
from rlkit.rollouts.sampler import open_sampler
from rlkit.rollouts.scripted import ScriptedEngine

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PATIENCE = 3600.0  # seconds for an environment to answer a turn of all demonstrations


def demonstrations(environment: Environment, tasks: datasets.Dataset, kind: str) -> datasets.Dataset:
    """Return rows with prompt and completion.

    Args:
        kind: "answer", the bare right answer, or "solution", a worked one.

    Raises:
        UserError: the environment has no worked solution for some task.
    """

    def demonstrate(task: dict[str, Any]) -> dict[str, Any]:
        text = environment.answer(task) if kind == "answer" else environment.solution(task)
        if text is None:
            what = "answer" if kind == "answer" else "worked solution"
            raise UserError(f"{environment.id} writes no {what} for task {task['task_id']}")
        if isinstance(task["prompt"], str):
            return {"prompt": task["prompt"], "completion": text}
        return {"prompt": task["prompt"], "completion": [{"role": "assistant", "content": text}]}

    return tasks.map(demonstrate, remove_columns=tasks.column_names, load_from_cache_file=False)


Script = Callable[[dict[str, Any]], Sequence[str] | None]


def best_answers(path: str, environment: Environment) -> Script:
    """What a model's best answer to each task was, turn by turn, in an evaluation with several samples.

    Fine-tuning on it, and repeating that, is rejection sampling (RAFT). A task has none where no answer was
    above 0 by the environment's metric, or all of several were alike: there is nothing to prefer.

    Raises:
        UserError: no such evaluation, or one of another environment.
    """
    evaluation = Evaluation.load(path)
    if evaluation.environment != environment.id:
        raise UserError(f"{path} evaluates {evaluation.environment}, not {environment.id}")
    answers: dict[str, list[tuple[float, list[str]]]] = {}
    for one in evaluation.completions:
        if one["score"] is not None and not one["truncated"]:
            turns = [turn["content"] for turn in one["turns"] if turn["role"] == "assistant"]
            answers.setdefault(one["task_id"], []).append((one["score"], turns))
    best = {}
    for task, found in answers.items():
        score, turns = max(found, key=lambda pair: pair[0])
        if score > 0 and (len(found) == 1 or score > min(found, key=lambda pair: pair[0])[0]):
            best[task] = turns
    return lambda task: best.get(task["task_id"])


def played(
    environment: Environment,
    tasks: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    *,
    tokens: int,
    in_all: int | None = None,
    script: Script | None = None,
) -> datasets.Dataset:
    """Play scripts, the environment's unless others are given, and return rows for training.

    Columns: `input_ids` and `labels`, -100 outside the loss. Tasks without a script are left out, and so is
    what does not get into `tokens` tokens after the prompt or `in_all` with it, and what the environment ends
    before its script does.

    Raises:
        UserError: nothing is left, or the environment failed.
    """
    import datasets

    write = environment.script if script is None else script
    scripted = [(task, turns) for task in tasks if (turns := write(task)) is not None]
    rows = [task for task, _ in scripted]
    limits = RolloutLimits(tokens, turns=environment.max_turns, reply_seconds=PATIENCE)
    sampler = open_sampler(environment, tokenizer, ends, limits)
    engine = ScriptedEngine(tokenizer, [turns for _, turns in scripted], sampler.loop.replies.end)
    rollouts = [rollout for (rollout,) in sampler(engine, rows, 1)]
    if failed := [rollout.invalid for rollout in rollouts if rollout.invalid is not None]:
        raise UserError(f"{environment.id}: {len(failed)} demonstrations failed, the first: {failed[0]}")
    whole = [
        rollout
        for rollout, (_, turns) in zip(rollouts, scripted, strict=True)
        if not rollout.truncated
        and sum(turn["role"] == "assistant" for turn in rollout.turns) == len(turns)
        and (in_all is None or len(rollout.prompt_ids) + len(rollout.ids) <= in_all)
    ]
    if not whole:
        raise UserError(
            f"{environment.id}: none of {len(tasks)} tasks has a script that is played to its end in "
            f"{tokens} tokens: raise max_completion_length or max_length ({in_all})"
        )
    if len(whole) < len(tasks):
        logger.warning("%d of %d tasks have a demonstration that fits in", len(whole), len(tasks))
    return datasets.Dataset.from_list(
        [
            {
                "input_ids": rollout.prompt_ids + rollout.ids,
                "labels": [-100] * len(rollout.prompt_ids)
                + [token if own else -100 for token, own in zip(rollout.ids, rollout.mask, strict=True)],
            }
            for rollout in whole
        ]
    )
