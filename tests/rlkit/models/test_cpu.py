"""The settings for a CPU change the speed but not the results, and TRL still has the functions they patch."""

import ctypes
import json
import os
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
import trl.trainer.utils
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AttentionInterface, TrainerCallback
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlkit.models import cpu, patches
from rlkit.models.attention import cpu_attention
from rlkit.models.cpu import FreedMemoryCallback, tune_for_cpu, warn_if_bfloat16_is_slow


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
    tokens, vocabulary = patches.GPU_LOGITS_TILE
    monkeypatch.setattr(trl.kernels.chunked_logprob, "TOKEN_CHUNK_SIZE", tokens)
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", vocabulary)
    registered = AttentionInterface()["sdpa"]
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    monkeypatch.setattr(cpu, "_keep_memory", lambda: None)
    yield
    AttentionInterface.register("sdpa", registered)


@pytest.mark.parametrize("tile", [(1024, 8192), (1, 100), (5, 7), (24, 99)], ids=str)
def test_tune_for_cpu_changes_neither_loss_nor_gradients(untuned, tiny_model, monkeypatch, tile):
    monkeypatch.setattr(patches, "CPU_LOGITS_TILE", tile)
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


def peak_bytes(function):
    """Return the peak bytes of tensors while a function runs, beyond those before."""
    with MemTracker() as tracker:
        function()
    return sum(total["Total"] for total in tracker.get_tracker_snapshot("peak").values())


def test_tune_for_cpu_bounds_the_memory_of_the_logits(untuned, tiny_model, monkeypatch):
    monkeypatch.setattr(patches, "CPU_LOGITS_TILE", (128, 1024))
    model = tiny_model("llama", vocab_size=8192)
    trl.trainer.utils.add_fused_lm_head(model)
    ids = torch.randint(3, 8192, (1, 500), generator=torch.Generator().manual_seed(0))

    def forward_backward():
        model(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()

    before = peak_bytes(forward_backward)
    tune_for_cpu()
    assert peak_bytes(forward_backward) < before / 3


def status_bytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def in_a_fork(function, *args):
    """Return what a function returns in a copy of this process, whose allocator settings stay there."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            os.write(writer, json.dumps(function(*args)).encode())
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(writer)
    with os.fdopen(reader) as pipe:
        return json.load(pipe)


def fill_gaps():
    """Take the gaps that other tests have left in the heap, without touching their pages."""
    libc = ctypes.CDLL(None)
    libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
    end = libc.sbrk(0)
    while libc.sbrk(0) == end:  # the end moves once no gap is large enough
        libc.malloc(4_000_000)


def resident_peak(steps, keep_memory, callback):
    """Return the resident memory before the steps, and its peak."""
    if keep_memory:
        cpu._keep_memory()
        fill_gaps()
    ctypes.CDLL(None).malloc_trim(0)  # what other tests have freed must not serve the steps
    callback.on_train_begin(None, None, None)
    before = cpu.resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the current value
    for step in steps:
        step()
        callback.on_step_end(None, None, None)
    lines = Path("/proc/self/status").read_text().splitlines()
    return before, next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def peaks(*args):
    """Return three results of `resident_peak`: the kernel may reclaim idle pages meanwhile."""
    return [in_a_fork(resident_peak, *args) for _ in range(3)]


def growth(result):
    before, peak = result
    return peak - before


needs_glibc = pytest.mark.skipif(not cpu._has_mallopt(), reason="needs glibc")


@needs_glibc
def test_kept_memory_is_less_than_training_needs(tiny_model):
    model, random = tiny_model("llama", vocab_size=16_000), Random(0)

    def step():
        ids = torch.randint(3, 100, (8, random.randint(20, 120)))
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    added = []
    for keep_memory in (False, True):
        results = peaks([step] * 12, keep_memory, FreedMemoryCallback())
        added.append((min if keep_memory else max)(map(growth, results)))
    assert added[0] > 100e6
    assert added[1] < 2 * added[0]


@needs_glibc
def test_kept_memory_does_not_grow_with_every_new_length():
    live, pins = [], []

    def step(size):
        live.append(torch.empty(size, dtype=torch.uint8))
        live[0].numpy().fill(1)
        # What a step keeps, e.g. its rollouts. It is too large for any gap, so it ends up behind the tensor.
        pins.append(torch.empty(size + 500_000, dtype=torch.uint8))
        pins[-1].numpy()[:100_000].fill(1)
        live.clear()  # the next tensor is larger, and does not fit between the pins

    sizes = range(4_000_000, 40_000_000, 1_000_000)
    steps = [partial(step, size) for size in sizes]
    before, unbounded = max(peaks(steps, True, TrainerCallback()), key=growth)
    assert unbounded > before + 10 * max(sizes)
    before, bounded = min(peaks(steps, True, FreedMemoryCallback()), key=growth)
    needed = before + max(sizes) + 100_000 * len(steps)
    # Within a step, its tensors come on top of what is kept, and the allocator's own pages on top of them.
    assert bounded < 1.25 * needed + 2 * max(sizes)


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
