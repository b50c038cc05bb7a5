"""A model whose logits TRL's fused head does not reproduce is refused."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlkit.errors import UserError
from tests.rlkit.training.recorded_steps import Judge

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


class ScaledHead(torch.nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


class ScaledModel(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * torch.linspace(0.5, 1.5, 128)
        return output


def build(kind=LlamaForCausalLM, dtype=torch.float32):
    torch.manual_seed(0)
    return kind(LlamaConfig(**SIZES, **HEADS, initializer_range=0.3)).to(dtype)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["head", "model"])
def test_logits_that_trl_does_not_reproduce_are_refused(make_trainer, place, dtype, shared):
    model = build(ScaledModel if place == "model" else LlamaForCausalLM, dtype)
    if place == "head":
        model.lm_head.__class__ = ScaledHead
    with pytest.raises(UserError, match=r"changes its logits in a way that TRL does not .* by up to"):
        make_trainer({"judge": Judge(())}, model=model, shared_prefix=shared)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"bf16": True}, {"cast_lm_head_to_fp32": True}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_usual_logits_are_accepted(make_trainer, dtype, options):
    assert make_trainer({"judge": Judge(())}, model=build(dtype=dtype), **options).shared_prefix
