"""A model whose logits TRL's fused head does not reproduce is refused."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlkit.errors import UserError
from rlkit.training.head_check import check_fused_head
from tests.rlkit.training.recorded_steps import Judge

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


class ScaledHead(torch.nn.Linear):
    def forward(self, x):
        return 0.9 * super().forward(x)


class ScaledModel(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * torch.linspace(0.9, 1.1, 128)
        return output


def build(kind=LlamaForCausalLM, dtype=torch.float32):
    torch.manual_seed(0)
    return kind(LlamaConfig(**SIZES, **HEADS, initializer_range=0.3)).to(dtype)


@pytest.mark.parametrize("options", [{}, {"shared_prefix": False}, {"temperature": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["head", "model"])
def test_logits_that_trl_does_not_reproduce_are_refused(make_trainer, place, dtype, options):
    model = build(ScaledModel if place == "model" else LlamaForCausalLM, dtype)
    if place == "head":
        model.lm_head.__class__ = ScaledHead
    with pytest.raises(UserError, match=r"changes its logits in a way that TRL does not .* by up to"):
        make_trainer({"judge": Judge(())}, model=model, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_prefix": False},
        {"temperature": 0.1},
        {"bf16": True},
        {"cast_lm_head_to_fp32": True},
        {"lora": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_usual_logits_are_accepted(make_trainer, dtype, options):
    model = build(dtype=dtype)
    if options.get("lora"):
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
        model = peft.get_peft_model(model, config)
    options = {key: value for key, value in options.items() if key != "lora"}
    trainer = make_trainer({"judge": Judge(())}, model=model, **options)
    trainer.shared_prefix = False
    assert check_fused_head(trainer) is not None


@pytest.mark.parametrize("kind", ["gemma2", "cohere2", "granite", "qwen3_moe", "gpt2"])
def test_scalings_that_trl_knows_are_accepted(make_trainer, tiny_model, kind):
    trainer = make_trainer({"judge": Judge(())}, model=tiny_model(kind), shared_prefix=False)
    assert check_fused_head(trainer) is not None


def test_logits_that_are_not_finite_are_named_as_such(make_trainer):
    model = build()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(UserError, match=r"logits are not finite: check config\.json"):
        make_trainer({"judge": Judge(())}, model=model)
