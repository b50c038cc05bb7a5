"""Computing each prompt once changes neither log-probabilities nor entropies nor gradients."""

import functools

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.utils import add_fused_lm_head

from rlkit.training.shared_prefix import (
    add_shared_prefix,
    completion_log_probs,
    make_layout,
    supports_shared_prefix,
)

KINDS = ("llama", "qwen2", "qwen3", "gemma")
# The order of float32 sums of a few hundred terms differs.
LOG_PROB_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-5


@pytest.fixture(scope="module")
def fused(tiny_model):
    """Return a function that builds a model with TRL's fused head, as TRL's trainer does."""

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
    """Return ids, mask and completion length of groups with equal prompts, padded left and right."""
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


def score_without_sharing(model, ids, mask, length):
    """Run prompt and completion of each row through the model, as TRL does."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-length] = -100
    output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return output.log_probs[:, -length:], output.entropy[:, -length:]


def gradient(model, log_probs, weights):
    model.zero_grad()
    (log_probs * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_equals_unshared(model, ids, mask, length):
    weights = torch.randn(ids.size(0), length, generator=torch.Generator().manual_seed(1))
    expected, expected_entropy = score_without_sharing(model, ids, mask, length)
    expected_gradient = gradient(model, expected, weights)
    actual, actual_entropy, _ = completion_log_probs(model, ids, mask, length)
    actual_gradient = gradient(model, actual, weights)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < LOG_PROB_TOLERANCE
    assert (actual_entropy - expected_entropy).abs().max() < LOG_PROB_TOLERANCE
    assert expected_gradient.norm() > 0
    assert (actual_gradient - expected_gradient).norm() < GRADIENT_TOLERANCE * expected_gradient.norm()


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
def test_shared_prefix_equals_separate_forward_passes(fused, kind, batch):
    """A completion of length 0 is an invalid rollout, of which all tokens are masked."""
    assert_equals_unshared(fused(kind), *batch)


@pytest.mark.parametrize("prompts", [[5, 5], [3, 6], [1, 1], [12, 12]])
def test_shared_prefix_equals_separate_forward_passes_of_long_completions(fused, monkeypatch, prompts):
    """Completions longer than their prompt attend causally without a mask if no prompt is padded."""
    monkeypatch.setattr("rlkit.training.shared_prefix.MATMUL_KEYS", 0)
    batch = batch_of(torch.Generator().manual_seed(4), 3, prompts, [9, 2, 8, 0, 9, 4])
    assert_equals_unshared(fused("qwen2"), *batch)


@pytest.mark.parametrize(
    ("prompts", "completion", "has_mask"),
    [([1, 1], 2, False), ([4, 4], 4, False), ([5, 5], 3, True), ([2, 4], 9, True)],
)
def test_layout_has_no_mask_if_attention_is_causal(monkeypatch, prompts, completion, has_mask):
    """The mask of a long completion takes hundreds of megabytes."""
    monkeypatch.setattr("rlkit.training.shared_prefix.MATMUL_KEYS", 0)
    # The last token of each prompt is part of its completions.
    prompt_tokens = torch.arange(max(prompts) - 1) >= max(prompts) - torch.tensor(prompts)[:, None]
    layout = make_layout(prompt_tokens, torch.ones(2, completion, dtype=torch.bool), torch.arange(2))
    assert (layout.mask is not None) == has_mask


@settings(max_examples=15, deadline=None)
@given(batch=batches())
def test_shared_prefix_equals_separate_forward_passes_with_lora(fused, batch):
    model = fused("llama", lora=True)
    assert_equals_unshared(model, *batch)
    assert all("lora" in name for name, p in model.named_parameters() if p.grad is not None)


def test_shared_prefix_computes_each_token_once_and_no_padding(fused):
    model = fused("llama")
    ids, mask, length = batch_of(torch.Generator(), 4, [10, 6], [3] * 7 + [1])
    shapes = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda _, args: shapes.append(tuple(args[0].shape[:2]))
    )
    try:
        completion_log_probs(model, ids, mask, length)
    finally:
        handle.remove()
    assert shapes == [(1, 9 + 5 + 7 * 3 + 1)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_shared_prefix_works_with_gradient_checkpointing(tiny_model, reentrant):
    model = tiny_model("llama")
    add_fused_lm_head(model, outputs=("entropy",))
    add_shared_prefix()
    batch = batch_of(torch.Generator(), 4, [10, 6], [3] * 7 + [1])
    weights = torch.randn(8, 3)
    expected = gradient(model, score_without_sharing(model, *batch)[0], weights)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    actual = gradient(model, completion_log_probs(model, *batch)[0], weights)
    assert (actual - expected).norm() < GRADIENT_TOLERANCE * expected.norm()


def test_shared_prefix_works_for_rows_of_a_group_that_are_not_adjacent(fused):
    """A micro-batch may contain parts of several groups in any order."""
    ids, mask, length = batch_of(torch.Generator().manual_seed(3), 3, [7, 5], [4, 2, 3, 1, 4, 4])
    order = [4, 0, 3, 2]
    assert_equals_unshared(fused("qwen3"), ids[order], mask[order], length)


def test_add_shared_prefix_does_not_change_attention_without_a_layout(tiny_model):
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
        ("mistral", {"sliding_window": 4, "attn_implementation": "eager"}, "set attn_implementation: sdpa"),
        ("mamba", {}, "recurrent"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "(conv)"),
        ("bloom", {}, "has no sdpa"),
        ("stablelm", {}, "attention interface"),
        ("llama", {"attn_implementation": "eager"}, "eager"),
    ],
)
def test_supports_shared_prefix_returns_the_reason_if_not(tiny_model, kind, options, reason):
    assert reason in supports_shared_prefix(tiny_model(kind, **options))


@pytest.mark.parametrize("kind", [*KINDS, "mistral"])
def test_supports_shared_prefix_returns_none_for_full_attention(tiny_model, kind):
    options = {"sliding_window": None} if kind == "mistral" else {}
    assert supports_shared_prefix(tiny_model(kind, **options)) is None


def test_unsupported_attention_argument_raises(tiny_model):
    model = tiny_model("llama")
    add_fused_lm_head(model, outputs=("entropy",))
    add_shared_prefix()
    layer = model.model.layers[0].self_attn
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, softcap=30.0, **kwargs)
    with pytest.raises(NotImplementedError, match="softcap"):
        completion_log_probs(model, *batch_of(torch.Generator(), 2, [8], [3, 4]))
