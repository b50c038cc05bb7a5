"""`rlkit sft`: teach a model the environment's own answers, as a baseline or as the start of a policy.

Tasks become prompt and completion, the loss is on the completion alone. Scripts of an environment of several
turns are played: its replies stand between the turns, outside the loss. So are a model's own best answers of
an evaluation (rejection sampling). Also a module for launchers:
`accelerate launch -m rlkit.sft --config FILE`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rlkit.environment import Environment
from rlkit.errors import UserError
from rlkit.evaluation.result import Evaluation

if TYPE_CHECKING:
    import datasets

PATIENCE = 3600.0  # seconds for an environment to answer a turn of all demonstrations


def main(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune as the keys say and return the exit code."""
    from rlkit.config import parse_sft
    from rlkit.launch import use_one_gpu
    from rlkit.preemption import shield_children

    use_one_gpu()
    shield_children()
    run = parse_sft(sys.argv[1:] if arguments is None else arguments)
    sft(run)
    return 0


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
        if one["invalid"] is None and not one["truncated"]:
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
    tokenizer: Any,
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

    from rlkit.rollouts import Sampling
    from rlkit.rollouts.generator import tokenize
    from rlkit.rollouts.loop import Limits, Loop
    from rlkit.rollouts.scripted import ScriptedEngine

    write = environment.script if script is None else script
    scripted = [(task, turns) for task in tasks if (turns := write(task)) is not None]
    rows = [task for task, _ in scripted]
    limits = Limits(tokens, turns=environment.max_turns, reply_seconds=PATIENCE)
    loop = Loop(environment, tokenizer, limits, ends)
    engine = ScriptedEngine(tokenizer, [turns for _, turns in scripted], loop.replies.end)
    prompts = tokenize(tokenizer, [task["prompt"] for task in rows], **loop.template) if rows else []
    rollouts = loop(engine, Sampling(tuple(ends), tuple(environment.stop)), rows, prompts)
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
        print(f"rlkit: {len(whole)} of {len(tasks)} tasks have a demonstration that fits in", file=sys.stderr)
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


def sft(run: Any) -> None:
    """Fine-tune on demonstrations, with evaluation before and after, model and report at the end."""
    from trl import get_peft_config

    from rlkit.algorithms.sft import SFTTrainer
    from rlkit.models import load_model
    from rlkit.rewarding import RewardRunner, load_rewards
    from rlkit.rollouts.generator import end_tokens, require_chat_template
    from rlkit.session import Session

    keys, args = run.task, run.trainer
    environment = keys.make_environment()
    session = Session(run, "sft", environment, keys.max_completion_length)
    tasks = session.tasks()
    rewards, _ = load_rewards(None, environment, None)
    kind, _, path = keys.demonstrations.partition(":")
    script = best_answers(path, environment) if kind == "best" else None
    scripted = script is not None or (environment.max_turns > 1 and kind == "solution")
    if not scripted:
        rows = demonstrations(environment, tasks, keys.demonstrations)
    model, tokenizer = load_model(run.model, trust_remote_code=args.trust_remote_code)
    if args.chat_template_path is None:
        require_chat_template(tokenizer, tasks[:1]["prompt"])
    if scripted:
        ends = end_tokens(model, tokenizer)
        if args.chat_template_path or args.eos_token:
            raise UserError(
                "turns are tokenised beforehand: chat_template_path and eos_token come too late, set them in "
                "the model's folder"
            )
        rows = played(
            environment,
            tasks,
            tokenizer,
            ends,
            tokens=keys.max_completion_length,
            in_all=args.max_length,
            script=script,
        )
    session.open()
    with RewardRunner(
        rewards, keys.reward_time_limit, keys.reward_workers, metric=environment.metric
    ) as runner:
        trainer = SFTTrainer(
            model,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=get_peft_config(run.model),
        )
        session.fit(trainer, runner, {"loss": "loss", "token accuracy": "mean_token_accuracy"})


if __name__ == "__main__":
    from rlkit.cli import run_command

    raise SystemExit(run_command(main))
