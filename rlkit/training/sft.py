"""Supervised fine-tuning on TRL's trainer (`rlkit sft`), with atomic checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import trl
from trl import get_peft_config

from rlkit.arguments.parse import SFTRunConfig
from rlkit.errors import UserError
from rlkit.models.load import check_is_model, load_model
from rlkit.rollouts.loop import RolloutLimits
from rlkit.rollouts.sampler import open_sampler
from rlkit.rollouts.tokenize import check_prompts, eos_token_ids
from rlkit.rollouts.types import Rollout
from rlkit.runs.guard_conditions import SFT_LOGGED
from rlkit.runs.guards import Guards
from rlkit.scoring import load_rewards
from rlkit.training.demonstrations import demonstrations, rejection_samples, scripted_demonstrations
from rlkit.training.local_engine import transformers_engine
from rlkit.training.resume import RunningMetrics, Stateful
from rlkit.training.session import Session, make_environment, make_runner


def sft(run: SFTRunConfig) -> None:
    """Fine-tune on demonstrations, evaluate before and after, and save the model and a report."""
    args, trainer_args = run.args, run.trainer_args
    environment = make_environment(args)
    session = Session(run, "sft", environment, args.max_completion_length)
    with closing(session):
        session.prepare()
        guards = Guards(args.mapping("guards"), record=session.directory.log, logged=SFT_LOGGED, reward=None)
        check_is_model(run.model_args.model_name_or_path)
        tasks = session.tasks()
        rewards, _ = load_rewards(None, environment, None)
        kind, _, path = args.demonstrations.partition(":")
        script = rejection_samples(path, environment) if kind == "best" else None
        is_scripted = script is not None or (environment.max_turns > 1 and kind == "solution")
        if not is_scripted:
            rows = demonstrations(environment, tasks, args.demonstrations)
        model, tokenizer = load_model(run.model_args, trust_remote_code=trainer_args.trust_remote_code)
        if trainer_args.chat_template_path is None:
            check_prompts(tokenizer, tasks[:8]["prompt"])
        if is_scripted:
            if trainer_args.chat_template_path or trainer_args.eos_token:
                raise UserError(
                    "scripted demonstrations are tokenized before chat_template_path and eos_token take "
                    "effect; set both in the model's folder instead"
                )
            rows = scripted_demonstrations(
                environment,
                tasks,
                tokenizer,
                eos_token_ids(model.generation_config.eos_token_id, tokenizer),
                max_completion_length=args.max_completion_length,
                max_length=trainer_args.max_length,
                script=script,
            )
        with make_runner(args, rewards, environment) as runner:
            trainer = session.make_trainer(
                SFTTrainer,
                model,
                args=trainer_args,
                train_dataset=rows,
                processing_class=tokenizer,
                peft_config=get_peft_config(run.model_args),
            )

            def answer(tasks: Sequence[dict[str, Any]], samples: int) -> list[list[Rollout]]:
                # TRL's keys chat_template_path and eos_token change the trainer's tokenizer and model.
                tokenizer: Any = trainer.processing_class
                declared = trainer.accelerator.unwrap_model(trainer.model).generation_config.eos_token_id
                limits = RolloutLimits(args.max_completion_length, max_turns=environment.max_turns)
                sampler = open_sampler(environment, tokenizer, eos_token_ids(declared, tokenizer), limits)
                with transformers_engine(trainer, tokenizer, args.evaluation_batch_size) as engine:
                    return sampler(engine, tasks, samples)

            watch = {"loss": "loss", "token accuracy": "mean_token_accuracy"}
            session.fit(trainer, trainer.stateful(), runner, watch=watch, answer=answer, guards=guards)


class SFTTrainer(trl.SFTTrainer):
    """TRL's SFTTrainer with state: TRL's own starts `num_tokens` at 0 again when a run is resumed.

    Raises:
        UserError: No demonstration is left after truncation to `max_length`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        dataset: Any = self.train_dataset
        if not len(dataset):
            max_length = kwargs["args"].max_length
            raise UserError(
                f"no demonstration has tokens to train on within max_length {max_length}; raise max_length"
            )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card only for the Hub: the card omits a base model from a local folder."""
        if self.args.push_to_hub:
            super().create_model_card(*args, **kwargs)

    def stateful(self) -> dict[str, Stateful]:
        """Return the stateful objects, by name, that a checkpoint holds besides what transformers saves."""
        metrics = RunningMetrics(self, self._metrics["train"])
        return {"since the last log": metrics, "tokens": TokenCounter(self)}


class TokenCounter:
    """State of TRL's counter of the tokens trained on, logged as `num_tokens`."""

    def __init__(self, trainer: SFTTrainer):
        self.trainer = trainer

    def state_dict(self) -> dict[str, int]:
        """Return the count, which TRL holds as an int and after its first step as a tensor."""
        return {"count": int(self.trainer._total_train_tokens)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the count."""
        self.trainer._total_train_tokens = state["count"]
