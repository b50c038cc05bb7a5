"""Log-probabilities of completions that share prompts, with each prompt computed once.

GRPO scores G completions of one prompt. TRL runs prompt and completion through the model for each of them;
here the prompt runs once, its keys and values stay in the autograd graph and are repeated over the group,
and only the completions run G times. The result is the same up to floating-point order.
"""

from typing import Any

import torch
from transformers import DynamicCache

from rlkit.rollouts.generate import is_plain, position_ids


def completion_log_probs(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int
) -> Any:
    """Score the last `completion_length` tokens (T) of each row.

    Args:
        model: a causal LM with TRL's fused head (`trl.trainer.utils.add_fused_lm_head`).
        input_ids: (B, P+T), prompts padded on the left, completions on the right.
        attention_mask: (B, P+T).

    Returns:
        TRL's `FusedCausalLMOutput` with `log_probs` and `entropy` of shape (B, T), or None where the
        model's cache cannot be repeated (sliding window, linear attention).
    """
    prompt_length = input_ids.size(1) - completion_length
    prompts = torch.stack([input_ids[:, :prompt_length], attention_mask[:, :prompt_length]])
    (ids, mask), rows = torch.unique(prompts, dim=1, return_inverse=True)
    cache = DynamicCache(config=model.config)
    # The last prompt token goes with the completions: its output scores their first token.
    if prompt_length > 1:
        model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=position_ids(mask[:, :-1]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    if not is_plain(cache):
        return None
    cache.batch_select_indices(rows)
    start = prompt_length - 1
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    return model(
        input_ids=input_ids[:, start:-1],
        attention_mask=attention_mask[:, :-1],
        position_ids=position_ids(attention_mask)[:, start:-1],
        past_key_values=cache,
        shift_labels=labels[:, prompt_length:],
        fused_lm_head=True,
    )
