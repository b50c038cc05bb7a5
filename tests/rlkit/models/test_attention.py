"""Every way of attending gives what attention written out gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlkit.models.attention
from rlkit.models.attention import grouped_attention


def written_out(query, key, value, mask, scale):
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
def test_equals_the_formula(rows, heads, queries, before, seed, keys):  # noqa: PLR0917
    torch.manual_seed(seed)
    total = before + queries
    query = torch.randn(rows, heads[0], queries, 8, requires_grad=True)
    key, value = (torch.randn(rows, heads[1], total, 8, requires_grad=True) for _ in range(2))
    mask = torch.ones(queries, total, dtype=torch.bool).tril(before).expand(rows, 1, -1, -1).clone()
    mask[:, :, :, :before] &= torch.rand(rows, 1, 1, before) > 0.3
    weights = torch.randn(rows, heads[0], queries, 8)
    expected = written_out(query, key, value, mask, 8**-0.5)
    gradients = torch.autograd.grad((expected * weights).sum(), (query, key, value))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlkit.models.attention, "MATMUL_KEYS", keys)
        bf16 = [x.detach().bfloat16().requires_grad_() for x in (query, key, value)]
        found = grouped_attention(*bf16, mask)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
        half = torch.autograd.grad((found * weights).sum(), bf16)
        for a, b in zip(half, gradients, strict=True):
            assert (a.float() - b).norm() < 0.03 * b.norm() + 0.03
    exact = grouped_attention(query, key, value, mask)
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-5)


def test_without_a_mask_it_is_causal():
    query, key, value = (torch.randn(2, 2, 5, 8).bfloat16() for _ in range(3))
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(
        grouped_attention(query, key, value, None), grouped_attention(query, key, value, mask)
    )


def test_autocast_decides_the_arithmetic():
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_attention(query, key, value, None).dtype == torch.bfloat16
    assert grouped_attention(query, key, value, None).dtype == torch.float32


def test_an_encoder_is_not_made_causal():
    import types

    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from rlkit.models.attention import cpu_attention

    tensors = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    module = types.SimpleNamespace(is_causal=False, num_key_value_groups=1)
    for kwargs in ({}, {"is_causal": None}):
        found, _ = cpu_attention(module, *tensors, None, **kwargs)
        torch.testing.assert_close(found, sdpa_attention_forward(module, *tensors, None)[0])
