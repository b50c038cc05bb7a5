"""`rlkit sft`: teach a model the environment's own answers, as a baseline or as the start of a policy.

Tasks become prompt and completion, the loss is on the completion alone. Also a module for launchers:
`accelerate launch -m rlkit.sft --config FILE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlkit.environment import Environment
from rlkit.errors import UserError

if TYPE_CHECKING:
    import datasets


def main(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune as the keys say and return the exit code."""
    import sys

    from rlkit.config import parse_sft

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
            raise UserError(f"{environment.id} writes no worked solution for task {task['task_id']}")
        if isinstance(task["prompt"], str):
            return {"prompt": task["prompt"], "completion": text}
        return {"prompt": task["prompt"], "completion": [{"role": "assistant", "content": text}]}

    return tasks.map(demonstrate, remove_columns=tasks.column_names, load_from_cache_file=False)


def sft(run: Any) -> None:
    """Fine-tune on demonstrations, with evaluation before and after, model and report at the end."""
    from trl import get_peft_config

    from rlkit.algorithms.sft import SFTTrainer
    from rlkit.models import load_model
    from rlkit.rewarding import RewardRunner, load_rewards
    from rlkit.rollouts.generator import require_chat_template
    from rlkit.session import Session

    keys, args = run.task, run.trainer
    environment = keys.make_environment()
    session = Session(run, "sft", environment, keys.max_completion_length)
    tasks = demonstrations(environment, session.tasks(), keys.demonstrations)
    rewards, _ = load_rewards(None, environment, None)
    model, tokenizer = load_model(run.model, trust_remote_code=args.trust_remote_code)
    if args.chat_template_path is None:
        require_chat_template(tokenizer, tasks[:1]["prompt"])
    session.open()
    with RewardRunner(
        rewards, keys.reward_time_limit, keys.reward_workers, metric=environment.metric
    ) as runner:
        trainer = SFTTrainer(
            model,
            args=args,
            train_dataset=tasks,
            processing_class=tokenizer,
            peft_config=get_peft_config(run.model),
        )
        session.fit(trainer, runner, {"loss": "loss", "token accuracy": "mean_token_accuracy"})


if __name__ == "__main__":
    from rlkit.cli import run_command

    raise SystemExit(run_command(main))
