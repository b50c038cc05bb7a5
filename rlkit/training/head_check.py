"""Comparison, at the start of training, of TRL's fused head with the model's own logits.

TRL computes log-probabilities from the hidden states and the weights of the head, with the scalings of logits
that it knows. A model whose code changes its logits in another way would be trained on log-probabilities that
are not those of its sampler.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from rlkit.errors import UserError
from rlkit.training.prefix_check import SHAPES
from rlkit.training.probe import check_batch, lowest_precision, undisturbed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlkit.training.grpo import GRPOTrainer

logger = logging.getLogger(__name__)

# Maximum difference of log-probabilities in float32, and relative to their range in half precision. The
# hidden states are the same, so that only the rounding of the head itself differs.
FLOAT32_TOLERANCE = 1e-3
RELATIVE_TOLERANCE = 0.02


def check_fused_head(trainer: GRPOTrainer) -> float | None:
    """Check that TRL's log-probabilities are those of the model's logits.

    Call it before prompts are shared. A model that is sharded, is random, or cannot score the short rows of
    the check is not checked.

    Returns:
        The largest difference, or None if the model was not checked.

    Raises:
        UserError: The log-probabilities differ, or are not finite.
    """
    model: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    ids, mask, length = check_batch(model, *SHAPES[0][:2], trainer.accelerator.device)
    is_scored = mask[:, -length:].bool()
    rollouts = {
        "prompt_ids": ids[:, :-length],
        "prompt_mask": mask[:, :-length],
        "completion_ids": ids[:, -length:],
        "completion_mask": mask[:, -length:],
    }
    forward = trainer.prefix.with_position_ids(model)
    with undisturbed(model, trainer.accelerator.device), trainer.accelerator.autocast():
        try:
            fused, again = (trainer.token_log_probs(model, rollouts) for _ in range(2))
            logits = forward(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1].float()
            log_probs = (logits / trainer.temperature).log_softmax(-1)
            log_probs = log_probs.gather(2, ids[:, -length:, None]).squeeze(2)[is_scored]
        except Exception:
            logger.debug("the head of the model is not checked", exc_info=True)
            return None
    if not log_probs.isfinite().all():
        raise UserError("the model's logits are not finite: check config.json and the weights")
    if not torch.equal(fused, again):
        return None
    tolerance = FLOAT32_TOLERANCE * max(1.0, 1 / trainer.temperature)
    if lowest_precision(model, trainer.accelerator.mixed_precision) != torch.float32:
        tolerance = RELATIVE_TOLERANCE * float(log_probs.max() - log_probs.min())
    difference = float((fused[is_scored] - log_probs).abs().max())
    if difference > tolerance:
        raise UserError(
            f"{type(model).__name__} changes its logits in a way that TRL does not know: the "
            f"log-probabilities of the loss would differ from its own by up to {difference:.2g}; set "
            "logit_scale or final_logit_softcapping in config.json instead"
        )
    return difference
