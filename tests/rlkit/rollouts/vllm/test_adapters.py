"""LoRA adapters that vLLM can hold: as an adapter, merged into the weights, or not at all."""

import pytest
from peft import LoraConfig, get_peft_model

from rlkit.errors import UserError
from rlkit.rollouts.vllm.in_process import check_adapter, is_low_rank

LINEAR = ["q_proj", "down_proj"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"use_rslora": True}, True),
        ({"use_dora": True}, False),
        ({"modules_to_save": ["norm"]}, False),
        ({"target_parameters": ["experts.down_proj"]}, False),
    ],
    ids=str,
)
def test_only_low_rank_updates_of_modules_are_sent_as_an_adapter(options, expected):
    assert is_low_rank(LoraConfig(target_modules=LINEAR, **options)) is expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("options", "unties"),
    [
        ({"target_modules": "all-linear"}, False),
        ({"target_modules": LINEAR, "modules_to_save": ["norm"]}, False),
        ({"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": LINEAR, "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["embed_tokens"]}, True),
    ],
    ids=str,
)
def test_adapter_that_unties_embeddings_is_rejected(tiny_model, tied, options, unties):
    config = LoraConfig(task_type="CAUSAL_LM", **options)
    model = get_peft_model(tiny_model(tie_word_embeddings=tied), config)
    if tied and unties:
        with pytest.raises(UserError, match="vLLM keeps them tied; remove them from lora_target"):
            check_adapter(model)
    else:
        check_adapter(model)
