"""The settings for a CPU change the speed but not the results, and TRL still has the functions they patch."""

import pytest
import torch
import trl.trainer.utils
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlkit.models import cpu
from rlkit.models.attention import cpu_attention
from rlkit.models.cpu import tune_for_cpu, warn_if_bfloat16_is_slow


class Attention(torch.nn.Module):
    """Stub of the module that transformers passes to an attention function."""

    is_causal = True

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


def inputs(batch, heads, groups, queries, keys):
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, requires_grad=True)  # noqa: E731
    return make(batch, heads * groups, queries, 8), make(batch, heads, keys, 8), make(batch, heads, keys, 8)


def assert_same(groups, tensors, mask, **options):
    results = []
    for attend in (sdpa_attention_forward, cpu_attention):
        output, weights = attend(Attention(groups), *tensors, mask, **options)
        assert weights is None
        results.append((output, *torch.autograd.grad(output.square().sum(), tensors)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    queries=st.integers(1, 6),
    past=st.integers(0, 6),
    kind=st.sampled_from(["bool", "float", "broadcast"]),
    scaling=st.sampled_from([None, 0.5]),
)
def test_cpu_attention_equals_transformers_with_a_mask(sizes, queries, past, kind, scaling):
    batch, heads, groups = sizes
    tensors = inputs(batch, heads, groups, queries, queries + past)
    rows = 1 if kind == "broadcast" else batch
    allowed = torch.rand(rows, 1, queries, queries + past, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed[..., 0] = True  # attention of a query without any key is undefined
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -1e9) if kind == "float" else allowed
    assert_same(groups, tensors, mask, scaling=scaling)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 5), (4, 4)])
def test_cpu_attention_equals_transformers_without_a_mask(groups, queries, keys):
    assert_same(groups, inputs(2, 2, groups, queries, keys), None)


@pytest.mark.parametrize("shape", [(2, 6, 4, 7), (2, 1, 1, 7), (1, 6, 1, 7)], ids=str)
def test_cpu_attention_equals_transformers_with_a_mask_per_head_or_for_all_queries(shape):
    assert_same(3, inputs(2, 2, 3, 4, 7), torch.randn(*shape))


def test_cpu_attention_equals_transformers_with_a_position_bias():
    tensors, bias = inputs(2, 2, 3, 4, 7), torch.randn(1, 6, 4, 7)
    assert_same(3, tensors, torch.zeros(2, 1, 4, 7), position_bias=bias)


@pytest.fixture
def untuned(monkeypatch):
    """Start without the CPU settings, and restore the global state after the test."""
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda device: False)
    registered = AttentionInterface()["sdpa"]
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    monkeypatch.setattr(cpu, "_keep_memory", lambda: None)
    yield
    AttentionInterface.register("sdpa", registered)


def test_tune_for_cpu_changes_neither_loss_nor_gradients(untuned, tiny_model):
    model = tiny_model("llama", attn_implementation="sdpa")
    trl.trainer.utils.add_fused_lm_head(model, outputs=("entropy",))
    ids = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :6] = -100
    results = []
    for tune in (lambda: None, tune_for_cpu):
        tune()
        model.zero_grad()
        output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        output.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((output.loss.detach(), output.entropy, gradient))
    assert AttentionInterface()["sdpa"] is cpu_attention
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_keep_memory_is_accepted_by_the_allocator():
    cpu._keep_memory()
    assert torch.randn(1 << 20).sum().isfinite()


@pytest.mark.parametrize(
    ("machine", "capability", "warns"),
    [("x86_64", "AVX2", True), ("x86_64", "AVX512", False), ("aarch64", "DEFAULT", False)],
)
def test_slow_bfloat16_is_a_warning_with_its_remedy(monkeypatch, caplog, machine, capability, warns):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    warn_if_bfloat16_is_slow("--bf16 false")
    assert ("set --bf16 false" in caplog.text) is warns
