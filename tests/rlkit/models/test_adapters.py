"""An adapter that is accepted can be merged: the saved model is the trained one."""

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlkit.errors import UserError
from rlkit.models.adapters import check_mergeable
from rlkit.models.load import save_model

SIZES = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
SIZES |= {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
OPT = {"ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 64}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
# By model type: sizes, and the names of the embeddings, the head and a linear layer.
FAMILIES = {
    "llama": ({}, "embed_tokens", "lm_head", "q_proj"),
    "gpt2": (GPT2, "wte", "lm_head", "c_attn"),
    "opt": (OPT, "decoder.embed_tokens", "lm_head", "q_proj"),
    "gpt_neox": ({}, "embed_in", "lm_head", "query_key_value"),
    "qwen3_moe": (MOE, "embed_tokens", "lm_head", "q_proj"),
}
IDS = torch.arange(3, 20)[None]


def lora_configs(embeddings, head, linear):
    """Return the arguments of LoraConfig by name, and whether they adapt tied embeddings."""
    return {
        "all-linear": ({"target_modules": "all-linear"}, False),
        "rslora": ({"target_modules": [linear], "use_rslora": True}, False),
        "dora": ({"target_modules": [linear], "use_dora": True}, False),
        "embeddings": ({"target_modules": [linear, embeddings]}, True),
        "embeddings with dora": ({"target_modules": [embeddings], "use_dora": True}, True),
        "head": ({"target_modules": [head]}, True),
        "pattern": ({"target_modules": f".*({embeddings}|{linear})"}, True),
        "parameter": ({"target_modules": [], "target_parameters": [f"{embeddings}.weight"]}, True),
        "embeddings in full": ({"target_modules": [linear], "modules_to_save": [embeddings]}, False),
        "head in full": ({"target_modules": "all-linear", "modules_to_save": [head]}, False),
        "head, embeddings in full": ({"target_modules": [head], "modules_to_save": [embeddings]}, False),
    }


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_check_mergeable_rejects_exactly_the_adapters_whose_saved_model_differs(kind, tie, tmp_path):
    sizes, *names = FAMILIES[kind]
    config = AutoConfig.for_model(kind, **(SIZES | sizes | {"tie_word_embeddings": tie}))
    for label, (arguments, on_tied) in lora_configs(*names).items():

        def add_lora(model, arguments=arguments):
            # A config for each model, because PEFT changes it.
            return peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **arguments))

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        adapted = add_lora(model).eval()
        with torch.device("meta"):
            without_weights = add_lora(AutoModelForCausalLM.from_config(config))
        for name, weight in adapted.named_parameters():
            if weight.requires_grad and "magnitude" not in name:
                nn.init.normal_(weight, std=0.3)
        with torch.no_grad():
            trained = adapted(IDS).logits
            save_model(adapted, None, tmp_path / label)
            saved = AutoModelForCausalLM.from_pretrained(tmp_path / label)(IDS).logits
        differs = (saved - trained).abs().max().item() > 1e-4
        assert differs == (tie and on_tied), label
        for checked in (adapted, without_weights):
            if differs:
                with pytest.raises(UserError, match=r"LoRA must not adapt .* shares its weight with"):
                    check_mergeable(checked, "choose other modules")
            else:
                check_mergeable(checked, "choose other modules")


def test_check_mergeable_rejects_adapters_on_layers_that_share_weights():
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4), "third": nn.Linear(4, 4)})
    model["second"].weight = model["first"].weight
    lora = peft.LoraConfig(target_modules=["second", "third"])
    with pytest.raises(
        UserError, match=r"LoRA must not adapt second, which shares its weight with first: .*; no"
    ):
        check_mergeable(peft.inject_adapter_in_model(lora, model), "no")
