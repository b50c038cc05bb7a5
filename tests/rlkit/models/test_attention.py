"""Every kernel of grouped attention agrees with the formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlkit.models.attention
from rlkit.models.attention import grouped_attention


def reference_attention(query, key, value, mask, scale):
    """softmax(scale * Q K^T + mask) V, with keys and values repeated for each query head."""
    groups = query.size(1) // key.size(1)
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 3),
    heads=st.sampled_from([(2, 2), (4, 2), (6, 1)]),
    queries=st.integers(1, 9),
    before=st.integers(0, 9),
    seed=st.integers(0, 99),
    keys=st.sampled_from([0, 1024]),
)
def test_grouped_attention_equals_the_formula(rows, heads, queries, before, seed, keys):  # noqa: PLR0917
    torch.manual_seed(seed)
    total = before + queries
    query = torch.randn(rows, heads[0], queries, 8, requires_grad=True)
    key, value = (torch.randn(rows, heads[1], total, 8, requires_grad=True) for _ in range(2))
    mask = torch.ones(queries, total, dtype=torch.bool).tril(before).expand(rows, 1, -1, -1).clone()
    mask[:, :, :, :before] &= torch.rand(rows, 1, 1, before) > 0.3
    weights = torch.randn(rows, heads[0], queries, 8)
    expected = reference_attention(query, key, value, mask, 8**-0.5)
    gradients = torch.autograd.grad((expected * weights).sum(), (query, key, value))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlkit.models.attention, "MATMUL_KEYS", keys)  # 0 turns the matrix products off
        bf16_inputs = [x.detach().bfloat16().requires_grad_() for x in (query, key, value)]
        actual = grouped_attention(*bf16_inputs, mask)
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)
        bf16_gradients = torch.autograd.grad((actual * weights).sum(), bf16_inputs)
        for bf16_gradient, gradient in zip(bf16_gradients, gradients, strict=True):
            assert (bf16_gradient.float() - gradient).norm() < 0.03 * gradient.norm() + 0.03
    actual = grouped_attention(query, key, value, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_grouped_attention_without_a_mask_is_causal():
    query, key, value = (torch.randn(2, 2, 5, 8).bfloat16() for _ in range(3))
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(
        grouped_attention(query, key, value, None), grouped_attention(query, key, value, mask)
    )


def test_grouped_attention_computes_in_the_dtype_of_autocast():
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_attention(query, key, value, None).dtype == torch.bfloat16
    assert grouped_attention(query, key, value, None).dtype == torch.float32


def test_cpu_attention_of_an_encoder_is_not_causal():
    import types

    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from rlkit.models.attention import cpu_attention

    tensors = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    module = types.SimpleNamespace(is_causal=False, num_key_value_groups=1)
    for kwargs in ({}, {"is_causal": None}):
        actual, _ = cpu_attention(module, *tensors, None, **kwargs)
        torch.testing.assert_close(actual, sdpa_attention_forward(module, *tensors, None)[0])
