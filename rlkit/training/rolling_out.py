"""How a trainer gets its rollouts: an engine, a loop through the environment, and what TRL wants to know.

The seams of TRL that this stands on: `rollout_func`, `_tokenize_prompts`, `VLLMGeneration` by name in the
module of its trainer, `_last_loaded_step`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models import unwrap_model_for_generation
from trl.trainer import grpo_trainer

from rlkit.environment import Environment
from rlkit.errors import UserError
from rlkit.rollouts import Engine, Rollout, Sampling
from rlkit.rollouts.local.engine import TransformersEngine
from rlkit.rollouts.loop import RolloutLimits
from rlkit.rollouts.sampler import open_sampler
from rlkit.rollouts.tokenize import tokenize
from rlkit.training.sharding import whole_weights
from rlkit.training.timing import StepClock


class RollingOut:
    """The part of `rlkit.training.grpo.GRPOTrainer` that replaces TRL's generation."""

    environment: Environment
    accelerator: Any
    args: Any
    model: Any
    model_wrapped: Any
    use_vllm: Any
    vllm_generation: Any
    state: Any
    eos_token_ids: Any
    chat_template_kwargs: Any
    generation: int
    rollout_func: Any
    clock: StepClock
    _tokenizer: Any
    _last_loaded_step: Any
    _tokenize_prompts: Any
    _metrics: Any

    def _start_rolling_out(self, limits: RolloutLimits) -> None:
        self.generation = 0  # counts samplings, so that each has random numbers of its own
        self._tasks: Sequence[Mapping[str, Any]] = []  # of this rank's sampling now
        self._rollouts: Sequence[Rollout] = []  # of it; TRL would hand them on in rows that may be one object
        # Answers held-out tasks greedily; training samples with the same loop and settings of its own.
        self.sampler = open_sampler(
            self.environment,
            self._tokenizer,
            self.eos_token_ids,
            limits,
            template=self.chat_template_kwargs,
        )
        self.loop = self.sampler.loop
        for key in ("max_new_tokens", "max_length", "max_tokens"):
            if key in (self.args.generation_kwargs or {}):
                raise UserError(f"generation_kwargs: {key} is not for there, set max_completion_length")
        if not self._trl_generates():
            self.rollout_func = self._roll_out
        elif limits.turns > 1:
            raise UserError(
                f"{self.environment.id} has several turns, which transformers cannot sample with FSDP 1, "
                "ds3_gather_for_generation off or continuous batching: set use_vllm"
            )

    def _trl_generates(self) -> bool:
        """Whether TRL must sample by itself: all ranks take part in each token of a model left in shards."""
        fsdp1 = self.is_fsdp_enabled and not self.accelerator.is_fsdp2  # type: ignore[attr-defined]
        zero3 = is_deepspeed_zero3_enabled() and not self.args.ds3_gather_for_generation
        return not self.use_vllm and bool(fsdp1 or zero3 or self.args.use_transformers_continuous_batching)

    def sampling(self) -> Sampling:
        """How training samples."""
        chosen = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        settings = {name: getattr(self.args, name) for name in chosen}
        settings["top_k"] = max(settings["top_k"], 0)  # -1 is vLLM's word for all
        further = dict(self.args.generation_kwargs or {})
        if self.use_vllm and self.args.vllm_structured_outputs_regex:
            further["structured_outputs"] = {"regex": self.args.vllm_structured_outputs_regex}
        return replace(
            self.sampler.sampling, **settings, key=(self.args.seed, self.generation), further=further
        )

    @contextmanager
    def engine(self, batch_size: int | None = None) -> Iterator[Engine]:
        """What samples, with the trainer's weights of now; all ranks enter together.

        Args:
            batch_size: turns at a time for transformers; None: all.
        """
        if self.use_vllm:
            self._sync()
            with self.vllm_generation.engine() as engine:
                yield engine
            return
        with transformers_engine(
            self,
            self._tokenizer,
            batch_size,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as engine:
            yield engine

    def close(self) -> None:
        """End the sampler, where it is one of its own."""
        if self.use_vllm:
            self.vllm_generation.close()

    def _sync(self) -> None:
        if self.state.global_step == self._last_loaded_step:
            return
        with self.clock("sync"):
            self.vllm_generation.sync_weights()
        self._last_loaded_step = self.state.global_step
        self._metrics["train"]["sampling/sync_bytes"].append(float(self.vllm_generation.sync_bytes))

    def _generate(self, prompts: Any) -> Any:
        if self.use_vllm:
            self._sync()  # before TRL would do it without counting
        return super()._generate(prompts)  # type: ignore[misc]

    def _roll_out(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """TRL's `rollout_func`: roll out the tasks of this rank."""
        if self.environment.tools:  # TRL would call the functions of its own tools
            ids = tokenize(self._tokenizer, prompts, **self.loop.template)
        else:
            ids = self._tokenize_prompts(prompts)[0]
        first = self.accelerator.process_index * len(prompts)
        with self.clock("generation"), self.engine() as engine:
            self._rollouts = rollouts = self.loop(engine, self.sampling(), self._tasks, ids, first)
        output = {
            "prompt_ids": [rollout.prompt_ids for rollout in rollouts],
            "completion_ids": [rollout.ids for rollout in rollouts],
            "logprobs": [_log_probs(rollout) for rollout in rollouts] if self.use_vllm else None,
        }
        if self.loop.limits.turns > 1 or self.environment.stop:
            output["env_mask"] = [rollout.mask for rollout in rollouts]
        return output


@contextmanager
def transformers_engine(
    trainer: Any, tokenizer: Any, batch_size: int | None, **unwrapping: Any
) -> Iterator[TransformersEngine]:
    """A trainer's model as it is trained, unwrapped (`unwrap_model_for_generation`), as an engine."""
    with (
        whole_weights(trainer.model_wrapped, trainer.accelerator),
        unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator, **unwrapping) as model,
        trainer.accelerator.autocast(),
    ):
        yield TransformersEngine(model, tokenizer, batch_size=batch_size)


def sampler_gap(batch: Mapping[str, Any], mask: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the sampler's probabilities are from the trainer's.

    Args:
        batch: TRL's, with `old_per_token_logps`, `sampling_per_token_logps` (B, T) and
            `importance_sampling_ratio` (B, T) or (B, 1).
        mask: (B, T) 1 for the tokens that were sampled.
        args: TRL's, for the limits of the ratio.

    Returns:
        Mean absolute difference of log-probabilities in nats a token (B,), and whether the importance
        correction has cut or masked something of the rollout (B,).
    """
    delta = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]).abs()
    delta = delta.masked_fill(mask == 0, torch.nan)  # as are tokens that vLLM could not score
    ratio = batch["importance_sampling_ratio"]
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    cut = ratio == 0 if args.vllm_importance_sampling_mode.endswith("_mask") else torch.zeros_like(ratio) > 0
    if high is not None:
        cut |= ratio >= high
    if low is not None:
        cut |= ratio <= low
    return delta.nanmean(1).nan_to_num(0.0), (cut & (mask > 0)).any(1)


def _log_probs(rollout: Rollout) -> list[float]:
    return rollout.log_probs or [0.0] * len(rollout.ids)


@contextmanager
def our_vllm(weights_dir: str | None) -> Iterator[None]:
    """While a trainer is made it takes our vLLM for TRL's."""

    def make(**kwargs: Any) -> Any:
        from rlkit.rollouts.vllm.in_process import SyncedVLLM

        return SyncedVLLM(weights_dir=weights_dir, **kwargs)

    with mock.patch.object(grpo_trainer, "VLLMGeneration", make):
        yield
