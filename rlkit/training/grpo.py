"""GRPO on TRL's trainer: the connections between TRL and `rlkit.training.step`, and nothing else.

TRL provides the loss, the optimizer, the reference model and the checkpoints, and it starts vLLM. rlkit
replaces TRL's sampling step (`_generate_and_score_completions`). Only this file uses private names of TRL's
GRPOTrainer. If TRL moves one, a test in `tests/rlkit/training/test_grpo.py` fails and says which.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import trl
from accelerate.utils import gather_object
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import has_length
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from rlkit.environment import Environment
from rlkit.models.patches import replaced_vllm_generation
from rlkit.reward import as_trl_reward
from rlkit.rollouts.loop import RolloutLimits
from rlkit.rollouts.sampler import open_sampler
from rlkit.rollouts.tokenize import decode_turn
from rlkit.rollouts.types import Engine, Rollout
from rlkit.runs.directory import RunDirectory
from rlkit.scoring import ErrorBudget, RewardRunner
from rlkit.training.batches import Batch, shuffle_groups, split
from rlkit.training.dynamic_sampling import DynamicSampling
from rlkit.training.head_check import check_fused_head
from rlkit.training.local_engine import transformers_engine
from rlkit.training.prefix_check import SharedPrefix
from rlkit.training.resume import EpochSeededSampler, ReferenceWeights, RunningMetrics, Stateful
from rlkit.training.rollout_counts import RolloutCounts
from rlkit.training.settings import check_constructor, check_settings, disable_attention_dropout
from rlkit.training.shared_prefix import Scores
from rlkit.training.step import SampledBatch, Task, training_batch
from rlkit.training.timing import StepClock

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlkit.arguments.parse import PolicyConfig
    from rlkit.rollouts.vllm.in_process import SyncedVLLM

logger = logging.getLogger(__name__)

# Function that maps the total rewards (N,) of all processes (NaN for invalid rollouts) and the group of each
# rollout to advantages (N,).
Advantages = Callable[[torch.Tensor, Sequence[Hashable]], torch.Tensor]


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's GRPOTrainer with rlkit's step: multi-turn environments, rewards that may fail, any baseline.

    Used alone, it writes TRL's checkpoints. `rlkit.training.session.Session` adds a
    `rlkit.training.resume.CheckpointCallback`, which also saves and restores what `stateful()` returns.

    Args:
        environment: Environment that replies to the turns of a rollout and names the metric.
        runner: Runner of the rewards, whose weights are `args.reward_weights`.
        budget: Error budget; a run whose rewards fail more often is stopped.
        run_dir: Run directory in which rollouts are saved, or None to save none.
        limits: Limits of a rollout, or None for one turn of `args.max_completion_length` tokens.
        weights_dir: Directory through which vLLM servers on other machines get the weights.
        shared_prefix: Whether to compute each prompt once in the loss if the model's attention allows it.
        advantages: Function that replaces GRPO's baseline; see `rlkit.training.advantages`.
        group_by: Column of the tasks whose values define the groups, or None to group by prompt.
        difficulty_weighting: Whether to weight advantages by the solve rate of their group (GRPO-LEAD).
        kl_in_reward: Whether to subtract `args.beta` times the KL divergence of a rollout from its reward,
            instead of adding a KL term to the loss.
        dynamic_sampling: Maximum number of attempts to replace groups of equal rewards; 0 turns it off.

    Raises:
        UserError: Settings contradict each other.
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
        run_dir: RunDirectory | None = None,
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
        self.run_dir = run_dir
        self.advantages = advantages
        self.group_by = group_by
        self.difficulty_weighting = difficulty_weighting
        self.kl_in_reward = kl_in_reward
        self.sampling_step = 0  # number of calls of `step.sample`; dynamic sampling makes several per batch
        self._synced_step = -1  # the optimizer step whose weights vLLM has

        def make_vllm(**settings: Any) -> SyncedVLLM:
            from rlkit.rollouts.vllm.in_process import SyncedVLLM

            return SyncedVLLM(weights_dir=weights_dir, **settings)

        check_constructor(args, kwargs)
        # TRL needs the number and the names of the rewards but never calls them: the step does.
        kwargs["reward_funcs"] = [as_trl_reward(reward, name) for name, reward in runner.rewards.items()]
        with replaced_vllm_generation(make_vllm):
            super().__init__(*args, **kwargs)
        if self.args.disable_dropout:
            disable_attention_dropout(self.model)
        if kl_in_reward:
            self.beta = 0.0  # TRL's loss must not add a KL term as well; the step reads `args.beta`

        # The sampler answers held-out tasks greedily. Training uses its loop with `step.sampling_settings`.
        self.sampler = open_sampler(
            environment,
            self.tokenizer,
            self.eos_token_ids,
            limits or RolloutLimits(self.args.max_completion_length),
            template=self.chat_template_kwargs,
        )
        self.loop = self.sampler.loop
        self.shared_prefix = False  # until `enable` has compared it with TRL's forward pass
        self.prefix = SharedPrefix(self)
        check_fused_head(self)
        self.prefix.enable(share=shared_prefix)
        self.dynamic_sampling = DynamicSampling(self, dynamic_sampling) if dynamic_sampling else None
        self.clock = StepClock(self._metrics["train"])
        self.rollout_counts = RolloutCounts(warns=self.accelerator.is_main_process)
        self.add_callback(self.clock)
        self.add_callback(self.rollout_counts)
        check_settings(self)

    # --- What `rlkit.training.step` reads -------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model."""
        return self._tokenizer

    @property
    def pad_token_id(self) -> int:
        """Id of the token that pads prompts and completions."""
        return self._tokenizer.pad_token_id

    @property
    def group_size(self) -> int:
        """Number of rollouts per task: `num_generations`, or `num_generations_eval` in TRL's evaluations."""
        return self.num_generations if self.model.training else self.num_generations_eval

    @property
    def corrects_sampler(self) -> bool:
        """Whether the loss is corrected for the difference between the sampler and the trained model."""
        return self.use_vllm and self.args.vllm_importance_sampling_correction

    @property
    def sampling_progress(self) -> tuple[int, int]:
        """Number of the sampling step that the current micro-batch is from, from 1, and their total number.

        Micro-batches are counted, not optimizer steps, because either of the two steps may span several of
        the other kind.
        """
        size = self.args.steps_per_generation * self.num_iterations  # micro-batches of a sampling step
        num_steps = math.ceil(self.num_micro_batches(self.state.max_steps) / size)
        return self._step // size + 1, max(num_steps, 1)

    def num_micro_batches(self, step: int) -> int:
        """Return the number of micro-batches in the first `step` optimizer steps of a run."""
        accumulation = self.args.gradient_accumulation_steps
        loader = self.callback_handler.train_dataloader
        # Training has not begun, or the tasks are a stream, whose epochs are not counted in advance.
        if loader is None or not has_length(loader):
            return step * accumulation
        # The last optimizer step of an epoch has fewer micro-batches if they do not divide evenly.
        steps_per_epoch = math.ceil(len(loader) / accumulation)
        epochs, steps = divmod(step, steps_per_epoch)
        return epochs * len(loader) + steps * accumulation

    def log_sampling(self, sampled: SampledBatch) -> None:
        """Pass metrics to TRL, which logs their means, and with `log_completions` the rollouts, too."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in sampled.metrics.items():
            metrics[name].append(value)
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]  # a running total: log only the last value
        if self.log_completions:
            # TRL creates the folder in its constructor, before --overwrite deletes it.
            os.makedirs(f"{self.args.output_dir}/completions", exist_ok=True)
            records = gather_object(sampled.judged.records)
            for column in ("prompt", "completion"):
                self._logs[column].extend(record[column] for record in records)
            self._logs["advantages"].extend(record["advantage"] for record in records)
            for name in self.runner.names:
                rewards = [record[f"rewards/{name}"] for record in records]
                # TRL formats these as numbers, so a reward that does not apply is NaN, not None.
                self._logs["rewards"][name].extend(math.nan if r is None else r for r in rewards)
            # A column of `log_extra` that this step lacks must not keep the values of another step.
            new = {key.removeprefix("extra/") for r in records for key in r if key.startswith("extra/")}
            for name in sorted(new | self._logs["extra"].keys()):
                column = self._logs["extra"][name]
                num_missing = len(self._logs["prompt"]) - len(records) - len(column)
                column.extend([None] * num_missing)
                column.extend(record.get(f"extra/{name}") for record in records)

    # --- Sampling -------------------------------------------------------------------------------------------

    @contextmanager
    def engine(self, batch_size: int | None = None) -> Iterator[Engine]:
        """Yield an engine with the current weights. All processes must enter together.

        Args:
            batch_size: Maximum number of turns that transformers samples at a time, or None for no limit.
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
        """Whether TRL samples, not rlkit's engines: the weights stay sharded, or batching is continuous."""
        fsdp1 = self.is_fsdp_enabled and not self.accelerator.is_fsdp2
        zero3 = is_deepspeed_zero3_enabled() and not self.args.ds3_gather_for_generation
        return not self.use_vllm and bool(fsdp1 or zero3 or self.args.use_transformers_continuous_batching)

    def roll_out_with_trl(self, prompt_ids: list[list[int]]) -> list[Rollout]:
        """Sample one turn for each prompt with TRL, which supports sharded weights."""
        completions, _ = self._generate_single_turn(prompt_ids, None, {}, self.group_size)
        rollouts = []
        for prompt, ids in zip(prompt_ids, completions, strict=True):
            text = decode_turn(self.tokenizer, ids, self.eos_token_ids)
            truncated = not ids or ids[-1] not in self.eos_token_ids
            rollout = Rollout.single(text, ids, truncated)
            rollout.prompt_ids = prompt
            rollouts.append(rollout)
        return rollouts

    def close(self) -> None:
        """Stop the vLLM engine of this trainer, if it has one."""
        if self.use_vllm:
            self.vllm_generation.close()

    # --- Log-probabilities ----------------------------------------------------------------------------------

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """Turn off gradients, and gradient checkpointing, which would warn that no input requires one."""
        model: Any = self.accelerator.unwrap_model(self.model)
        is_checkpointing = model.is_gradient_checkpointing
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            if is_checkpointing:
                # Re-enabling registers another hook of the embeddings; without this, one would leak per call.
                model.disable_input_require_grads()
            yield

    @contextmanager
    def reference_model(self) -> Iterator[torch.nn.Module]:
        """Yield the reference model of the KL divergence: for a LoRA model, the model without its adapter."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        model = self.accelerator.unwrap_model(self.model)
        # If training starts from an adapter, TRL keeps a copy of that as the reference, named "ref".
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            yield self.model

    def token_log_probs(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the log-probability of each completion token under a model, (B, T); 0 for masked tokens."""
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
        """Run the forward pass of each prompt once, in TRL's loss and in `token_log_probs` alike."""
        # The other arguments are for images, which the shared prefix does not support.
        options = ("compute_entropy", "compute_aux_loss")
        is_text = all(value is None for name, value in kwargs.items() if name not in options)
        if self.shared_prefix and is_text:
            needs_aux_loss = bool(kwargs.get("compute_aux_loss"))
            inputs = input_ids, attention_mask, logits_to_keep
            scores = self.prefix.score(model, *inputs, batch_size, compute_aux_loss=needs_aux_loss)
            return scores if kwargs.get("compute_entropy") else scores._replace(entropies=None)
        forward: Any = self.prefix.with_position_ids(model) if is_text else model
        return super()._get_per_token_logps_and_entropies(
            forward, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs
        )

    def padded_scores(
        self, model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int
    ) -> Scores:
        """Return the scores of completions of a length by TRL's forward pass, for `SharedPrefix`."""
        scores = self._get_per_token_logps_and_entropies(
            model,
            input_ids,
            attention_mask,
            length,
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
        )
        return Scores(*scores)

    # --- Where TRL calls the step ---------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[Task]) -> Batch:
        return training_batch(self, inputs)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Return the next micro-batch; sample when the buffered rollouts are used up.

        TRL shuffles single rollouts before it splits them into micro-batches. Here whole groups are shuffled,
        so that the rollouts of a prompt stay together and its forward pass can be shared.
        """
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            with self.clock("scores"):
                batch = self._generate_and_score_completions(generation_batch)
            batch = shuffle_groups(batch, self.num_generations, (self.args.seed, self.sampling_step))
            self._buffered_inputs = split(batch, steps)
        return self._buffered_inputs[self._step % steps]

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run TRL's training step, timed."""
        with self.clock("forward_backward"):
            return super().training_step(model, inputs, num_items_in_batch)

    # --- Resuming -------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSeededSampler:
        sampler: Any = super()._get_train_sampler(dataset)
        return EpochSeededSampler(sampler, lambda: int(self.state.epoch or 0))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card only for the Hub: it cannot name a base model that is a local folder."""
        if self.args.push_to_hub:
            super().create_model_card(*args, **kwargs)

    def stateful(self) -> dict[str, Stateful]:
        """Return the stateful objects, by name, that a checkpoint holds besides what transformers saves."""
        parts: dict[str, Stateful] = {
            "since the last log": RunningMetrics(self, self._metrics["train"]),
            "progress": TrainerPosition(self),
            "budget": self.budget,
            "rollouts": self.rollout_counts,
        }
        stateful: dict[str, Any] = {f"reward {name}": r for name, r in self.runner.stateful.items()}
        if hasattr(self.environment, "state_dict"):
            stateful["environment"] = self.environment
        parts |= stateful
        if self.dynamic_sampling is not None:
            parts["dynamic_sampling"] = self.dynamic_sampling
        if self.args.sync_ref_model:
            parts["reference model"] = ReferenceWeights(self.accelerator.unwrap_model(self.ref_model))
        return parts


class TrainerPosition:
    """State of a trainer between two optimizer steps.

    The rollouts of one sampling step may serve several optimizer steps. Their micro-batches are part of the
    state: a resumed run that sampled again would train on different rollouts.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, and the buffered micro-batches that are not used up."""
        trainer = self.trainer
        per_generation = trainer.args.steps_per_generation * trainer.num_iterations
        return {
            "step": trainer._step,
            "generation": trainer.sampling_step,
            "buffered": trainer._buffered_inputs if trainer._step % per_generation else None,
            "shape": self._layout(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the position. If the batch layout has changed, drop the rollouts and sample again."""
        trainer = self.trainer
        trainer.sampling_step = state["generation"]
        if state["shape"] != self._layout():
            # Curricula continue at the same fraction of the run, with the next whole sampling step.
            size = trainer.args.steps_per_generation * trainer.num_iterations
            trainer._step = math.ceil(trainer.num_micro_batches(trainer.state.global_step) / size) * size
            return
        trainer._step = state["step"]
        device = trainer.accelerator.device
        if state["buffered"] is not None:
            trainer._buffered_inputs = [
                {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
                for batch in state["buffered"]
            ]

    def _layout(self) -> list[int]:
        """Return what determines how rollouts are split over processes, steps and micro-batches."""
        args = self.trainer.args
        return [
            self.trainer.accelerator.num_processes,
            args.steps_per_generation,
            self.trainer.num_iterations,
            args.per_device_train_batch_size,
        ]
