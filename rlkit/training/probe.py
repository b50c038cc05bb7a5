"""Inspect a model during a few forward passes without changing it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CheckBatch(NamedTuple):
    """Batch of four rollouts of two prompts: ids and mask (4, P+T), and the width T of the completions."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_length: int


def check_batch(
    model: PreTrainedModel,
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    device: torch.device,
) -> CheckBatch:
    """Return a batch of random tokens, in which each prompt has as many completions as the others."""
    config = model.config.get_text_config()
    # Without special tokens, which models treat differently: padding, or placeholders of an image.
    special = {value for key, value in config.to_dict().items() if key.endswith("token_id")}
    allowed = torch.tensor([token for token in range(min(config.vocab_size, 1000)) if token not in special])
    generator = torch.Generator().manual_seed(0)  # the same tokens in every process
    B, P, T = len(completion_lengths), max(prompt_lengths), max(completion_lengths)
    group = B // len(prompt_lengths)
    ids = allowed[torch.randint(len(allowed), (B, P + T), generator=generator)]
    ids[:, :P] = ids[::group, :P].repeat_interleave(group, 0)
    columns = torch.arange(P + T)
    begin = P - torch.tensor(prompt_lengths).repeat_interleave(group)[:, None]
    end = P + torch.tensor(completion_lengths)[:, None]
    mask = ((begin <= columns) & (columns < end)).long()
    padding = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
    ids = ids.masked_fill(mask == 0, padding)
    return CheckBatch(ids.to(device), mask.to(device), T)


@contextmanager
def undisturbed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block, the model is in evaluation mode; afterward it and the random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            # Rotary embeddings that depend on the length replace theirs.
            for module, name, buffer, values in buffers:
                module._buffers[name] = buffer
                buffer.copy_(values)


def uses_tf32() -> bool:
    """Return whether a GPU may compute products of float32 matrices in TF32, with the 10 bits of float16."""
    return torch.cuda.is_available() and torch.backends.cuda.matmul.fp32_precision == "tf32"


def lowest_precision(model: torch.nn.Module, mixed_precision: str) -> torch.dtype:
    """Return the least precise of the float types that a forward pass computes in."""
    if mixed_precision in ("bf16", "fp8"):
        return torch.bfloat16
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if mixed_precision == "fp16" or uses_tf32():
        dtypes.add(torch.float16)
    if dtypes <= {torch.float32, torch.float64}:
        return torch.float32
    return torch.float16 if dtypes <= {torch.float16, torch.float32, torch.float64} else torch.bfloat16


def can_upcast(model: torch.nn.Module) -> bool:
    """Return whether float32 is exact, all weights are floats, and there is memory for them in float32."""
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        return False  # quantized
    if getattr(model, "is_quantized", False) or uses_tf32():
        return False
    parameter = next(model.parameters())
    if parameter.device.type != "cuda":
        return True
    num_bytes = 4 * sum(p.numel() for p in model.parameters() if p.dtype != torch.float32)
    return num_bytes < 0.8 * torch.cuda.mem_get_info(parameter.device)[0]


@contextmanager
def upcast(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, weights and buffers are float32. That and the conversion back change no value."""
    tensors = [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()]
    dtypes = [tensor.dtype for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)


def in_float32(model: torch.nn.Module) -> Callable[..., Any]:
    """Return a function that calls a model without autocast."""

    def forward(**inputs: object) -> object:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            return model(**inputs)

    return forward


def module_names(model: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """Return the names of a model's modules, without those of wrappers for sharding and compilation."""
    wrappers = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")
    names = {}
    for name, module in model.named_modules():
        names[module] = functools.reduce(lambda short, wrapper: short.replace(wrapper, ""), wrappers, name)
    return names


class Event(NamedTuple):
    """Tensor that a module received or returned during a forward pass."""

    name: str
    tensor: torch.Tensor


@contextmanager
def recorded_tensors(model: torch.nn.Module) -> Iterator[list[Event]]:
    """Yield a list of the tensors that layers and their parts receive and return in the block."""
    names = module_names(model)
    modules = list(model.modules())
    listed = [layer for module in modules if isinstance(module, torch.nn.ModuleList) for layer in module]
    in_layers = {inner for layer in listed for inner in layer.modules() if inner is not layer}
    layers = [layer for layer in listed if layer not in in_layers]  # not experts in a layer
    parts = [part for layer in layers for part in layer.children()]
    outside = [module for module in modules if module not in in_layers and module not in layers]
    events: list[Event] = []

    def before(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        tensor = _first_tensor([*args, *kwargs.values()])
        if tensor is not None:
            events.append(Event(f"the input of {names[module]}", tensor.clone()))

    def after(module: torch.nn.Module, args: object, output: object) -> None:
        tensor = _first_tensor(output)
        if tensor is not None:
            events.append(Event(names[module], tensor.clone()))

    # The input of an embedding or a norm outside the layers is the output of the module before it.
    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in [*layers, *parts]]
    handles += [m.register_forward_hook(after) for m in dict.fromkeys([*layers, *parts, *outside])]
    try:
        yield events
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(value: object) -> torch.Tensor | None:
    """Return the first float tensor of at least two dimensions in nested outputs, or None."""
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() and value.dim() > 1 else None
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next((x for x in map(_first_tensor, value) if x is not None), None)
    return None
