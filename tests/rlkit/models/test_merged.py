"""Merged parameters equal those of PEFT's `merge_and_unload`, and the model keeps its weights to the bit."""

import copy
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from rlkit.models.merged import merged_parameters

LINEAR = ["q_proj", "down_proj"]
ADAPTERS = {
    "lora": {"target_modules": LINEAR},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "bias": {"target_modules": LINEAR, "bias": "lora_only"},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "modules_to_save": {"target_modules": LINEAR, "modules_to_save": ["lm_head", "norm"]},
    "dora and modules_to_save": {
        "target_modules": LINEAR,
        "use_dora": True,
        "modules_to_save": ["embed_tokens"],
    },
}
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}


def gather(parameters):
    return nullcontext()


def adapt(model, dtype=torch.float32, **config):
    """Return a model with a trained adapter: all of its trainable weights are random."""
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(model).to(dtype), LoraConfig(r=4, task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_merges(model, is_tied):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = {name: value.clone() for name, value in merged_parameters(model, gather)}
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module.merged for module in model.modules() if hasattr(module, "merged"))
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    if is_tied:
        del expected["lm_head.weight"]
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_parameters_equal_those_of_the_merged_model(tiny_model, name, dtype):
    assert_merges(adapt(tiny_model(), dtype, **ADAPTERS[name]), is_tied=False)


@pytest.mark.parametrize("name", ["lora", "all-linear", "dora"])
def test_tied_weights_are_yielded_once(tiny_model, name):
    assert_merges(adapt(tiny_model(tie_word_embeddings=True), **ADAPTERS[name]), is_tied=True)


def test_adapters_of_expert_parameters_are_merged(tiny_model):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    assert_merges(adapt(tiny_model("qwen3_moe", **sizes), **EXPERTS), is_tied=False)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["all-linear", "dora", "dora and modules_to_save", "embedding"])
def test_parameters_that_fsdp2_shards_are_merged(tiny_model, process_group, name):
    model = adapt(tiny_model(), **ADAPTERS[name])
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    ids = torch.arange(5, 15)[None]
    logits = model(ids).logits
    merged = dict(merged_parameters(model, gather))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert torch.equal(model(ids).logits, logits)


@settings(max_examples=10)
@given(st.integers(0, 21))
def test_model_is_unchanged_if_the_caller_stops_early(tiny_model, number):
    model = adapt(tiny_model(), torch.bfloat16, **ADAPTERS["all-linear"])
    before = copy.deepcopy(model.state_dict())
    iterator = merged_parameters(model, gather)
    for _ in range(number):
        next(iterator, None)
    iterator.close()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
