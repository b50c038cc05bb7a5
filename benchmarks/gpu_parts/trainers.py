"""GRPO trainers with random weights, one step at a time, for the parts `step` and `long`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fixed_prompts import random_letters
from grpo_step import close, make_trainer
from peft import LoraConfig

from gpu_parts.common import Bench, make_tokenizer
from rlkit.rollouts.types import Rollout
from rlkit.training.step import collate

# Model, and whether to train an adapter of rank 16 instead of all weights.
MODELS = {"0.6B full": ("qwen3-0.6b", False), "4B LoRA": ("qwen3-4b", True)}
MAX_TOKEN_ID = 512  # the tiny model has no more


class SteppedTrainer:
    """A trainer of TRL or rlkit whose steps are called one by one.

    All weights are trained in float32 with bfloat16 autocast. An adapter's frozen weights are bfloat16.

    Args:
        bench: Device, and whether the sizes are tiny.
        side: Name of the trainer, "trl" or "rlkit".
        model_name: Key of `MODELS`.
        shape: Prompt tokens, completion tokens, rollouts per step.
        folder: Empty folder of the run.
        settings: Further arguments of TRL's `GRPOConfig`.
    """

    def __init__(
        self,
        bench: Bench,
        side: str,
        model_name: str,
        shape: tuple[int, int, int],
        folder: Path,
        **settings: Any,
    ):
        name, lora = MODELS[model_name]
        model = bench.model(name, torch.bfloat16 if lora else torch.float32)
        tokenizer = make_tokenizer(model.config.vocab_size)
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        folder.mkdir()
        self.side = side
        self.num_completion_tokens = shape[1] * shape[2]
        self.trainer = make_trainer(
            side,
            model,
            tokenizer,
            random_letters(64, shape[0]),
            shape,
            str(folder),
            adapter if lora else None,
            use_cpu=bench.on_cpu,
            bf16=True,
            optim="adamw_torch_fused",
            **settings,
        )
        trainer = self.trainer
        trainer.create_optimizer_and_scheduler(trainer.args.max_steps)
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = self.model
        self.model.train()
        if trainer.args.gradient_checkpointing:  # as `train` does, which is not called here
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        trainer.current_gradient_accumulation_steps = 1
        self.loader = iter(trainer.get_train_dataloader())
        bench.free()

    def sample(self) -> Any:
        """Sample and judge the rollouts of the next prompt, and return the batch of the loss."""
        batch = self.trainer._prepare_inputs(next(self.loader))
        assert batch["completion_mask"].sum() == self.num_completion_tokens, "a completion ended early"
        return batch

    def forward_backward(self, batch: Any) -> None:
        """Compute the loss and its gradient, which `clear` or `step` must clear."""
        loss = self.trainer.compute_loss(self.model, batch)
        self.trainer.accelerator.backward(loss)

    def clear(self) -> None:
        """Clear the gradient."""
        self.optimizer.zero_grad()

    def step(self, batch: Any = None) -> None:
        """Run a whole step, or with a batch all of it but the sampling."""
        self.forward_backward(self.sample() if batch is None else batch)
        self.optimizer.step()
        self.clear()

    def close(self) -> None:
        """Finish background work."""
        if self.side == "rlkit":
            close(self.trainer)


def random_batch(
    bench: Bench, prompt_lengths: Sequence[int], completion_lengths: Sequence[int], group: int
) -> dict[str, Any]:
    """Return a batch of the loss with random tokens and advantages.

    Args:
        bench: Device of the batch.
        prompt_lengths: Tokens of each distinct prompt.
        completion_lengths: Tokens of each completion; `group` in a row share a prompt.
        group: Number of completions per prompt.
    """
    generator = torch.Generator().manual_seed(0)

    def random_ids(length: int) -> list[int]:
        return torch.randint(1, MAX_TOKEN_ID, (length,), generator=generator).tolist()

    rollouts = []
    for i, length in enumerate(completion_lengths):
        if i % group == 0:
            prompt = random_ids(prompt_lengths[i // group])
        rollout = Rollout.single("", random_ids(length), False)
        rollout.prompt_ids = prompt
        rollouts.append(rollout)
    batch = collate(rollouts, pad_token_id=0, device=bench.device, environment_mask=False)
    batch["advantages"] = torch.randn(len(rollouts), generator=generator).to(bench.device)
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    return batch
