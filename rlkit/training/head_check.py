"""Comparison, at the start of training, of TRL's fused head with the model's own logits.

TRL computes log-probabilities from the hidden states and the weights of the head, with the scalings of logits
that it knows. A model whose code changes its logits in another way would be trained on log-probabilities that
are not those of its sampler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rlkit.errors import UserError
from rlkit.training.prefix_check import MAX_FLOAT32_TOLERANCE, RELATIVE_TOLERANCES, SHAPES
from rlkit.training.probe import check_batch, lowest_precision, undisturbed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlkit.training.grpo import GRPOTrainer


def check_fused_head(trainer: GRPOTrainer) -> None:
    """Raise UserError if TRL's log-probabilities are not those of the model's logits.

    A model that is sharded, or that cannot score the short rows of the check, is not checked.
    """
    model: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    batch = check_batch(model, *SHAPES[0][:2], trainer.accelerator.device)
    targets = batch.input_ids[:, -batch.completion_length :]
    is_scored = batch.attention_mask[:, -batch.completion_length :].bool()
    with undisturbed(model, trainer.accelerator.device), trainer.accelerator.autocast():
        try:
            fused = trainer.padded_scores(model, *batch).log_probs[is_scored]
            forward = trainer.prefix.with_position_ids(model)
            output = forward(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            logits = output.logits[:, -batch.completion_length - 1 : -1].float() / trainer.temperature
        except Exception:
            return
        own = logits.log_softmax(-1).gather(2, targets[..., None]).squeeze(2)[is_scored]
    precision = lowest_precision(model, trainer.accelerator.mixed_precision)
    tolerance = RELATIVE_TOLERANCES.get(precision, MAX_FLOAT32_TOLERANCE)
    # Differences grow with the logits: those of a low temperature are large.
    tolerance *= max(1.0, 1 / trainer.temperature)
    if precision != torch.float32:
        tolerance *= float(own.max() - own.min())
    difference = float((fused - own).abs().max())
    if not difference <= tolerance:
        raise UserError(
            f"{type(model).__name__} changes its logits in a way that TRL does not know: the "
            f"log-probabilities of the loss would differ from its own by up to {difference:.2g}"
        )
