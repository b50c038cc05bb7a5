"""Supervised fine-tuning on TRL's trainer (`rlkit sft`), with checkpoints that are known to be complete."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import trl
from trl import get_peft_config

from rlkit.arguments.parse import SFTRunConfig
from rlkit.errors import UserError
from rlkit.models.load import load_model
from rlkit.rollouts.loop import RolloutLimits
from rlkit.rollouts.sampler import open_sampler
from rlkit.rollouts.tokenize import eos_token_ids, require_chat_template
from rlkit.rollouts.types import Rollout
from rlkit.scoring import RewardRunner, load_rewards
from rlkit.training.demonstrations import best_answers, demonstrations, played
from rlkit.training.local_engine import transformers_engine
from rlkit.training.resume import SinceLog, Stateful
from rlkit.training.session import Session, make_environment


def sft(run: SFTRunConfig) -> None:
    """Fine-tune on demonstrations, with evaluation before and after, model and report at the end."""
    args, trainer_args = run.args, run.trainer_args
    environment = make_environment(args)
    session = Session(run, "sft", environment, args.max_completion_length)
    with closing(session):
        session.prepare()
        tasks = session.tasks()
        rewards, _ = load_rewards(None, environment, None)
        kind, _, path = args.demonstrations.partition(":")
        script = best_answers(path, environment) if kind == "best" else None
        scripted = script is not None or (environment.max_turns > 1 and kind == "solution")
        if not scripted:
            rows = demonstrations(environment, tasks, args.demonstrations)
        model, tokenizer = load_model(run.model_args, trust_remote_code=trainer_args.trust_remote_code)
        if trainer_args.chat_template_path is None:
            require_chat_template(tokenizer, tasks[:1]["prompt"])
        if scripted:
            if trainer_args.chat_template_path or trainer_args.eos_token:
                raise UserError(
                    "turns are tokenized before chat_template_path and eos_token apply: set both in the "
                    "model's folder"
                )
            rows = played(
                environment,
                tasks,
                tokenizer,
                eos_token_ids(model.generation_config.eos_token_id, tokenizer),
                tokens=args.max_completion_length,
                in_all=trainer_args.max_length,
                script=script,
            )
        with RewardRunner(
            rewards, args.reward_time_limit, args.reward_workers, metric=environment.metric
        ) as runner:
            trainer = session.make_trainer(
                SFTTrainer,
                model,
                args=trainer_args,
                train_dataset=rows,
                processing_class=tokenizer,
                peft_config=get_peft_config(run.model_args),
            )

            def answer(tasks: Sequence[dict[str, Any]], samples: int) -> list[list[Rollout]]:
                # Of the trainer, which may have changed both by its keys chat_template_path and eos_token.
                tokenizer: Any = trainer.processing_class
                declared = trainer.accelerator.unwrap_model(trainer.model).generation_config.eos_token_id
                limits = RolloutLimits(args.max_completion_length, turns=environment.max_turns)
                sampler = open_sampler(environment, tokenizer, eos_token_ids(declared, tokenizer), limits)
                with transformers_engine(trainer, tokenizer, args.evaluation_batch_size) as engine:
                    return sampler(engine, tasks, samples)

            watch = {"loss": "loss", "token accuracy": "mean_token_accuracy"}
            session.fit(trainer, trainer.stateful(), runner, watch=watch, answer=answer)


class SFTTrainer(trl.SFTTrainer):
    """TRL's SFTTrainer, which forgets how many tokens it has seen when it is resumed."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card only for the hub: it omits a base model loaded from a local folder."""
        if self.args.push_to_hub:
            super().create_model_card(*args, **kwargs)

    def stateful(self) -> dict[str, Stateful]:
        """The stateful objects that a checkpoint keeps besides what transformers saves, by name."""
        return {"since the last log": SinceLog(self, self._metrics["train"]), "tokens": Tokens(self)}


class Tokens:
    """TRL's count of the tokens trained on, logged as `num_tokens`."""

    def __init__(self, trainer: SFTTrainer):
        self.trainer = trainer

    def state_dict(self) -> dict[str, int]:
        """The count; TRL keeps an int, or a tensor after its first step."""
        return {"count": int(self.trainer._total_train_tokens)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the count."""
        self.trainer._total_train_tokens = state["count"]
