"""Computing each prompt once changes neither log-probabilities, nor entropy, nor gradients."""

import functools

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.utils import add_fused_lm_head

from rlkit.training.shared_prefix import add_shared_prefix, completion_log_probs, supports_shared_prefix

KINDS = ("llama", "qwen2", "qwen3")
# float32: a sum of some hundred terms in another order.
LOG_PROBS, GRADIENTS = 1e-4, 1e-5


@pytest.fixture(scope="module")
def fused(tiny_model):
    """Models with TRL's fused head, as its trainer makes them."""

    @functools.cache
    def make(kind, lora=False, **options):
        model = tiny_model(kind, **options)
        if lora:
            config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
            model = peft.get_peft_model(model, config)
        base = model.get_base_model() if lora else model
        add_fused_lm_head(base, outputs=("entropy",))
        add_shared_prefix()
        return model

    return make


def batch_of(generator, group, prompt_lengths, completion_lengths):
    """Groups of equal prompts padded on the left, completions padded on the right."""
    width, length = max(prompt_lengths), max(completion_lengths)
    ids = torch.full((len(completion_lengths), width + length), 2)
    mask = torch.zeros_like(ids)
    for first in range(0, len(completion_lengths), group):
        size = prompt_lengths[first // group]
        prompt = torch.randint(3, 100, (size,), generator=generator)
        for row in range(first, first + group):
            end = width + completion_lengths[row]
            ids[row, width - size : width] = prompt
            ids[row, width:end] = torch.randint(3, 100, (end - width,), generator=generator)
            mask[row, width - size : end] = 1
    return ids, mask, length


def in_full(model, ids, mask, length):
    """What TRL does: prompt and completion through the model, for each row."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-length] = -100
    output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return output.log_probs[:, -length:], output.entropy[:, -length:]


def shared(model, ids, mask, length):
    return completion_log_probs(model, ids, mask, length)


def gradient(model, log_probs, weights):
    model.zero_grad()
    (log_probs * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_equal(model, ids, mask, length):
    weights = torch.randn(ids.size(0), length, generator=torch.Generator().manual_seed(1))
    expected, expected_entropy = in_full(model, ids, mask, length)
    expected_gradient = gradient(model, expected, weights)
    found, found_entropy = shared(model, ids, mask, length)
    found_gradient = gradient(model, found, weights)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < LOG_PROBS
    assert (found_entropy - expected_entropy).abs().max() < LOG_PROBS
    assert expected_gradient.norm() > 0
    assert (found_gradient - expected_gradient).norm() < GRADIENTS * expected_gradient.norm()


@st.composite
def batches(draw):
    group = draw(st.integers(1, 4))
    prompts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    sizes = st.lists(st.integers(0, 7), min_size=group * len(prompts), max_size=group * len(prompts))
    completions = draw(sizes.filter(any))
    return batch_of(torch.Generator().manual_seed(draw(st.integers(0, 99))), group, prompts, completions)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(batch=batches())
def test_equals_the_forward_in_full(fused, kind, batch):
    """A completion of length 0 is an invalid rollout: all of its tokens are masked."""
    assert_equal(fused(kind), *batch)


@pytest.mark.parametrize("prompts", [[5, 5], [3, 6], [1, 1], [12, 12]])
def test_equals_the_forward_in_full_where_completions_are_long(fused, monkeypatch, prompts):
    """Longer than the prompt, they attend without a mask where all prompts have one length."""
    monkeypatch.setattr("rlkit.training.shared_prefix.MATMUL_KEYS", 0)
    batch = batch_of(torch.Generator().manual_seed(4), 3, prompts, [9, 2, 8, 0, 9, 4])
    assert_equal(fused("qwen2"), *batch)


@settings(max_examples=15, deadline=None)
@given(batch=batches())
def test_equals_the_forward_in_full_with_lora(fused, batch):
    model = fused("llama", lora=True)
    assert_equal(model, *batch)
    assert all("lora" in name for name, p in model.named_parameters() if p.grad is not None)


def test_no_token_is_computed_twice_and_no_padding_at_all(fused):
    model = fused("llama")
    ids, mask, length = batch_of(torch.Generator(), 4, [10, 6], [3] * 7 + [1])
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda _, args: seen.append(tuple(args[0].shape[:2]))
    )
    try:
        shared(model, ids, mask, length)
    finally:
        handle.remove()
    assert seen == [(1, 9 + 5 + 7 * 3 + 1)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(tiny_model, reentrant):
    model = tiny_model("llama")
    add_fused_lm_head(model, outputs=("entropy",))
    add_shared_prefix()
    batch = batch_of(torch.Generator(), 4, [10, 6], [3] * 7 + [1])
    weights = torch.randn(8, 3)
    expected = gradient(model, in_full(model, *batch)[0], weights)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    found = gradient(model, shared(model, *batch)[0], weights)
    assert (found - expected).norm() < GRADIENTS * expected.norm()


def test_a_group_whose_rows_stand_apart_still_shares_its_prompt(fused):
    """What a micro-batch has of groups that were split."""
    ids, mask, length = batch_of(torch.Generator().manual_seed(3), 3, [7, 5], [4, 2, 3, 1, 4, 4])
    order = [4, 0, 3, 2]
    assert_equal(fused("qwen3"), ids[order], mask[order], length)


def test_without_a_layout_attention_is_what_it_was(tiny_model):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    ids = torch.arange(3, 20)[None]
    model = tiny_model("llama")
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    expected = model(ids).logits
    add_shared_prefix()
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("mistral", {"sliding_window": 4}, "whole prompt"),
        ("gemma3_text", {"sliding_window": 4}, "whole prompt"),
        ("mamba", {}, "attention"),
        ("llama", {"attn_implementation": "eager"}, "eager"),
    ],
)
def test_what_is_declined(tiny_model, kind, options, reason):
    assert reason in supports_shared_prefix(tiny_model(kind, **options))


@pytest.mark.parametrize("kind", [*KINDS, "mistral"])
def test_what_is_supported(tiny_model, kind):
    options = {"sliding_window": None} if kind == "mistral" else {}
    assert supports_shared_prefix(tiny_model(kind, **options)) is None


def test_soft_capped_attention_is_an_error_and_no_wrong_number(tiny_model):
    model = tiny_model("llama")
    add_fused_lm_head(model, outputs=("entropy",))
    add_shared_prefix()
    layer = model.model.layers[0].self_attn
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, softcap=30.0, **kwargs)
    with pytest.raises(NotImplementedError, match="softcap"):
        shared(model, *batch_of(torch.Generator(), 2, [8], [3, 4]))
