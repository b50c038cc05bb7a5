"""GRPO on TRL's trainer: the seams between TRL and `rlkit.training.step`, and nothing else.

TRL keeps the loss, the optimizer, the reference model, checkpoints and vLLM's start. Its sampling step
(`_generate_and_score_completions`) is replaced as a whole. Every private name of TRL's GRPOTrainer that rlkit
needs is used in this file alone; `tests/rlkit/training/test_grpo.py` has a sentence for each that TRL moves.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import trl
from accelerate.utils import gather_object
from peft import PeftModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from rlkit.arguments.bounds import CHOICES
from rlkit.environment import Environment
from rlkit.errors import UserError, check_choice
from rlkit.models.patches import replaced_vllm_generation
from rlkit.reward import RewardCall, as_trl_reward
from rlkit.rollouts.loop import RolloutLimits
from rlkit.rollouts.sampler import open_sampler
from rlkit.rollouts.types import Engine, Rollout
from rlkit.runs.directory import RunDirectory
from rlkit.scoring import ErrorBudget, RewardRunner
from rlkit.training.batches import Batch, shuffle_groups, split
from rlkit.training.dynamic_sampling import DynamicSampling
from rlkit.training.local_engine import transformers_engine
from rlkit.training.resume import InEpoch, Reference, SinceLog, Stateful
from rlkit.training.shared_prefix import add_shared_prefix, completion_log_probs, supports_shared_prefix
from rlkit.training.step import SampledBatch, Task, training_batch
from rlkit.training.timing import StepClock

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlkit.arguments.parse import PolicyConfig
    from rlkit.rollouts.vllm.in_process import SyncedVLLM

logger = logging.getLogger(__name__)

# From the rewards (N,) of all processes, NaN where a rollout is invalid, and their groups to advantages (N,).
Advantages = Callable[[torch.Tensor, Sequence[Hashable]], torch.Tensor]

LIMITS_OF_GENERATION = ("max_new_tokens", "max_length", "max_tokens")


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's GRPOTrainer with rlkit's step: environments, rewards that may fail, any baseline.

    Checkpoints of a trainer alone are TRL's. `rlkit.training.session.Session` adds a
    `rlkit.training.resume.CheckpointCallback`, which saves and restores what `stateful()` returns.

    Args:
        environment: Answers the turns of a rollout, and names the metric.
        runner: Runs the rewards; their weights are `args.reward_weights`.
        budget: Stops a run whose rewards fail too often.
        run: Where rollouts are saved; None: nowhere.
        limits: Limits of a rollout; None: one turn of `args.max_completion_length` tokens.
        weights_dir: Directory through which vLLM servers on other machines get their weights.
        shared_prefix: Compute each prompt once in the loss where the model's attention allows it.
        advantages: Replaces GRPO's baseline; see `rlkit.training.advantages`.
        group_by: Column whose values are the groups; None: the rollouts of a prompt are a group.
        difficulty_weighting: Weight advantages by the solve rate of their group (GRPO-LEAD).
        kl_in_reward: Subtract `args.beta` times a rollout's KL divergence from its reward, instead of adding
            it to the loss.
        dynamic_sampling: Maximum attempts at replacing groups whose rewards are all alike; 0 turns it off.

    Raises:
        UserError: The settings exclude one another.
    """

    # Narrower types than TRL declares.
    args: PolicyConfig
    model: PreTrainedModel
    num_generations: int
    num_generations_eval: int
    chat_template_kwargs: dict[str, Any]
    vllm_generation: SyncedVLLM
    _buffered_inputs: list[Batch] | None  # type: ignore[assignment]
    _logs: dict[str, Any]

    def __init__(
        self,
        *args: Any,
        environment: Environment,
        runner: RewardRunner,
        budget: ErrorBudget | None = None,
        run: RunDirectory | None = None,
        limits: RolloutLimits | None = None,
        weights_dir: str | None = None,
        shared_prefix: bool = True,
        advantages: Advantages | None = None,
        group_by: str | None = None,
        difficulty_weighting: bool = False,
        kl_in_reward: bool = False,
        dynamic_sampling: int = 0,
        **kwargs: Any,
    ):
        self.environment = environment
        self.runner = runner
        self.budget = budget or ErrorBudget()
        self.run = run
        self.advantages = advantages
        self.group_by = group_by
        self.difficulty_weighting = difficulty_weighting
        self.kl_in_reward = kl_in_reward
        self.generation = 0  # samplings so far
        self._synced_step = -1  # the optimizer step whose weights vLLM has

        def make_vllm(**settings: Any) -> SyncedVLLM:
            from rlkit.rollouts.vllm.in_process import SyncedVLLM

            return SyncedVLLM(weights_dir=weights_dir, **settings)

        # TRL counts and names the rewards; they are never called by it.
        kwargs["reward_funcs"] = [as_trl_reward(reward, name) for name, reward in runner.rewards.items()]
        with replaced_vllm_generation(make_vllm):
            super().__init__(*args, **kwargs)
        if kl_in_reward:
            self.beta = 0.0  # TRL's loss adds no KL term; the step reads `args.beta`

        # The sampler answers held-out tasks greedily; training uses its loop with other settings.
        self.sampler = open_sampler(
            environment,
            self.tokenizer,
            self.eos_token_ids,
            limits or RolloutLimits(self.args.max_completion_length),
            template=self.chat_template_kwargs,
        )
        self.loop = self.sampler.loop
        self.shared_prefix = shared_prefix and self._can_share_prefix()
        self.dynamic_sampling = DynamicSampling(self, dynamic_sampling) if dynamic_sampling else None
        self.clock = StepClock(self._metrics["train"])
        self.add_callback(self.clock)
        self._check_settings()

    def _can_share_prefix(self) -> bool:
        model = self.accelerator.unwrap_model(self.model)
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        reason = supports_shared_prefix(base)
        if reason:
            if self.accelerator.is_main_process:
                logger.warning("shared_prefix is off for this model: %s", reason)
            return False
        add_shared_prefix()
        return True

    def _check_settings(self) -> None:
        args, G = self.args, self.num_generations
        for key in ("scale_rewards", "multi_objective_aggregation", "vllm_importance_sampling_mode"):
            check_choice(key, getattr(args, key), CHOICES[key])
        for key in LIMITS_OF_GENERATION:
            if key in (args.generation_kwargs or {}):
                raise UserError(f"generation_kwargs must not contain `{key}`; use `max_completion_length`")
        if args.sync_ref_model and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise UserError("sync_ref_model: a sharded reference model cannot be kept in checkpoints yet")
        if self.samples_with_trl and self.loop.limits.turns > 1:
            raise UserError(
                f"{self.environment.id} has several turns, which transformers cannot sample with FSDP 1, "
                "ds3_gather_for_generation off or continuous batching: set use_vllm"
            )
        if (
            self.kl_in_reward
            and self.advantages is None
            and args.multi_objective_aggregation == "normalize_then_sum"
        ):
            raise UserError("kl_in_reward requires multi_objective_aggregation: sum_then_normalize")
        whole_groups = [
            f"the reward {n!r}" for n, r in self.runner.rewards.items() if RewardCall(r).per_group
        ]
        if whole_groups and G == 1:
            raise UserError(
                f"{whole_groups[0]} needs at least 2 rollouts for each task: raise num_generations"
            )
        whole_groups += ["dynamic_sampling"] * bool(self.dynamic_sampling)
        rows = args.per_device_train_batch_size * args.steps_per_generation
        if whole_groups and rows % G:
            raise UserError(
                f"{whole_groups[0]} judges whole groups, but a process gets {rows} rollouts at a "
                f"time: make that a multiple of num_generations ({G})"
            )

    # --- What the step reads --------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._tokenizer

    @property
    def pad_token_id(self) -> int:
        """Token that fills up prompts and completions."""
        return self._tokenizer.pad_token_id

    @property
    def group_size(self) -> int:
        """Rollouts of a task: `num_generations`, in an evaluation by TRL `num_generations_eval`."""
        return self.num_generations if self.model.training else self.num_generations_eval

    @property
    def corrects_sampler(self) -> bool:
        """Whether the loss is corrected for the difference between the sampler and the trained model."""
        return self.use_vllm and self.args.vllm_importance_sampling_correction

    @property
    def micro_batches(self) -> int:
        """Micro-batches that have been learned from."""
        return self._step

    def log_sampling(self, sampled: SampledBatch) -> None:
        """Hand the metrics of a sampling step to TRL, which logs means; and its rollouts if asked to."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in sampled.metrics.items():
            metrics[name].append(value)
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]  # a running total: the last one alone
        if self.log_completions:
            records = gather_object(sampled.judged.records)
            for column in ("prompt", "completion"):
                self._logs[column].extend(record[column] for record in records)
            self._logs["advantages"].extend(record["advantage"] for record in records)
            for name in self.runner.names:
                rewards = [record[f"rewards/{name}"] for record in records]
                # TRL formats numbers: NaN, not None, where a reward does not apply.
                self._logs["rewards"][name].extend(math.nan if r is None else r for r in rewards)

    # --- Sampling -------------------------------------------------------------------------------------------

    @contextmanager
    def engine(self, batch_size: int | None = None) -> Iterator[Engine]:
        """An engine with the current weights; all processes enter together.

        Args:
            batch_size: Turns at a time with transformers; None: all.
        """
        if self.use_vllm:
            if self.state.global_step != self._synced_step:
                with self.clock("sync"):
                    self.vllm_generation.sync_weights()
                self._synced_step = self.state.global_step
                self._metrics["train"]["sampling/sync_bytes"].append(float(self.vllm_generation.sync_bytes))
            with self.vllm_generation.engine() as engine:
                yield engine
            return
        with transformers_engine(
            self,
            self.tokenizer,
            batch_size,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as engine:
            yield engine

    @property
    def samples_with_trl(self) -> bool:
        """Whether all processes must take part in each token, since the model stays in shards."""
        fsdp1 = self.is_fsdp_enabled and not self.accelerator.is_fsdp2
        zero3 = is_deepspeed_zero3_enabled() and not self.args.ds3_gather_for_generation
        return not self.use_vllm and bool(fsdp1 or zero3 or self.args.use_transformers_continuous_batching)

    def roll_out_with_trl(self, prompt_ids: list[list[int]]) -> list[Rollout]:
        """Sample one turn for each prompt with TRL, which knows models in shards."""
        completions, _ = self._generate_single_turn(prompt_ids, None, {}, self.group_size)
        rollouts = []
        for prompt, ids in zip(prompt_ids, completions, strict=True):
            text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
            truncated = not ids or ids[-1] not in self.eos_token_ids
            rollout = Rollout.single(text, ids, truncated)
            rollout.prompt_ids = prompt
            rollouts.append(rollout)
        return rollouts

    def close(self) -> None:
        """Stop vLLM, where it runs for this trainer."""
        if self.use_vllm:
            self.vllm_generation.close()

    # --- Log-probabilities ----------------------------------------------------------------------------------

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Turn off gradients, and gradient checkpointing, which would warn that no input needs one."""
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            yield

    @contextmanager
    def reference_model(self) -> Iterator[torch.nn.Module]:
        """Yield the reference of the KL divergence; for a LoRA model, the model with its adapter off."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        model = self.accelerator.unwrap_model(self.model)
        # TRL keeps a copy of an adapter that is trained further, under the name "ref".
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            yield self.model

    def token_log_probs(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Log-probability of each completion token of a batch under a model, (B, T); 0 where it is masked."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        args, training = self.args, self.model.training
        size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        length = batch["completion_ids"].size(1)
        return self._get_per_token_logps_and_entropies(model, ids, mask, length, batch_size=size)[0]

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """TRL's, for the loss and for frozen log-probabilities alike, with each prompt computed once."""
        plain = not any(v is not None and v is not False for k, v in kwargs.items() if k != "compute_entropy")
        if not (self.shared_prefix and plain):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs
            )
        size = batch_size or len(input_ids)
        log_probs, entropies = [], []
        for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            with self.accelerator.autocast():
                chunk_log_probs, chunk_entropies = completion_log_probs(model, ids, mask, logits_to_keep)
            log_probs.append(chunk_log_probs)
            if chunk_entropies is not None:
                entropies.append(chunk_entropies)
        return torch.cat(log_probs), torch.cat(entropies) if kwargs.get("compute_entropy") else None, None

    # --- Where TRL calls the step ---------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[Task]) -> Batch:
        return training_batch(self, inputs)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, with whole groups shuffled and not single rollouts, so that their prompt stays shared."""
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            with self.clock("scores"):
                batch = self._generate_and_score_completions(generation_batch)
            batch = shuffle_groups(batch, self.num_generations, (self.args.seed, self.generation))
            self._buffered_inputs = split(batch, steps)
        return self._buffered_inputs[self._step % steps]

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """TRL's, timed."""
        with self.clock("forward_backward"):
            return super().training_step(model, inputs, num_items_in_batch)

    # --- Resuming -------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Dataset | None = None) -> InEpoch:
        sampler: Any = super()._get_train_sampler(dataset)
        return InEpoch(sampler, lambda: int(self.state.epoch or 0))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card only for the hub: it omits a base model loaded from a local folder."""
        if self.args.push_to_hub:
            super().create_model_card(*args, **kwargs)

    def stateful(self) -> dict[str, Stateful]:
        """The stateful objects that a checkpoint keeps besides what transformers saves, by name."""
        parts: dict[str, Stateful] = {
            "since the last log": SinceLog(self, self._metrics["train"]),
            "progress": TrainerPosition(self),
            "budget": self.budget,
        }
        stateful: dict[str, Any] = {f"reward {name}": r for name, r in self.runner.stateful.items()}
        if hasattr(self.environment, "state_dict"):
            stateful["environment"] = self.environment
        parts |= stateful
        if self.dynamic_sampling is not None:
            parts["dynamic_sampling"] = self.dynamic_sampling
        if self.args.sync_ref_model:
            parts["reference model"] = Reference(self.accelerator.unwrap_model(self.ref_model))
        return parts


class TrainerPosition:
    """Where a trainer is between two optimizer steps.

    A generation may serve several steps: the rest of it is kept, or a resumed run would sample it again.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Micro-batches and samplings so far, and the rollouts that are still to be learned from."""
        trainer = self.trainer
        every = trainer.args.steps_per_generation * trainer.num_iterations
        return {
            "step": trainer._step,
            "generation": trainer.generation,
            "buffered": trainer._buffered_inputs if trainer._step % every else None,
            "shape": self._shape(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue there; with a new generation where the run's shape is not the one that was saved."""
        trainer = self.trainer
        trainer.generation = state["generation"]
        if state["shape"] != self._shape():
            return
        trainer._step = state["step"]
        device = trainer.accelerator.device
        if state["buffered"] is not None:
            trainer._buffered_inputs = [
                {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                for batch in state["buffered"]
            ]

    def _shape(self) -> list[int]:
        """What a generation is split into: processes, micro-batches, passes, and rollouts of each."""
        trainer, args = self.trainer, self.trainer.args
        passes = [args.steps_per_generation, trainer.num_iterations]
        return [trainer.accelerator.num_processes, *passes, args.per_device_train_batch_size]
